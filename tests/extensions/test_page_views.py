"""The page in a real Chromium: what its views show, and that nothing moves before the eyes."""
import json
import os
import subprocess
import time

from tests.core.test_identity import ask
from tests.kit.page import IN_CHROMIUM, go_to, send, show, texts
from tests.kit.processes import PATIENCE, in_time

pytestmark = IN_CHROMIUM


def test_a_thread_and_its_receipt_are_beside_a_message(walk):
    page = walk
    go_to(page, "#/messages")
    page.fill("#filter", "svc-report")
    page.locator(".message-row", has_text="svc-report").click()
    page.wait_for_selector(".thread")
    assert "Thread of 2" in page.inner_text("#panel") and "nobody has fetched it" in page.inner_text("#panel")


def test_a_message_that_a_relay_passed_on_names_the_relay_and_its_first_sender(near, page):
    """In this order: anybody can write `relayed_from`."""
    first = send(near, "home", "bob", "it came from afar", relayed_from="spark")["id"]
    send(near, "bob", "home", "and this goes back", reply_to=first)
    show(page, near, "#/messages")
    row = page.locator(".message-row", has_text="it came from afar")
    row.wait_for()
    assert "home for spark → bob" in " ".join(row.inner_text().split())
    row.click()
    page.wait_for_selector(".thread >> text=home for spark → bob")
    show(page, near, "#/messages/home/bob")
    page.wait_for_selector(".bubble >> text=home for spark")


def test_a_send_to_a_list_is_one_row(walk):
    page = walk
    go_to(page, "#/messages")
    page.fill("#filter", "still quiet")
    page.wait_for_function("() => document.querySelectorAll('.message-row').length == 1")
    assert "spark, dell" in texts(page)[0]


def test_a_conversation_and_its_messages_are_found_behind_thousands_of_others(near, page):
    """One answer of the bus looks at 5,000 messages, and may have none of those that are wanted."""
    send(near, "ann", "bob", "which way?", subject="the way")
    send(near, "bob", "ann", "\n".join(f"line {number}" for number in range(40)))
    some = [{"from": f"s{number % 50}", "to": f"r{number % 60}", "msg": "x"} for number in range(1000)]
    for _ in range(6):
        assert ask(near, "POST", "/send", some)[0] == 200
    show(page, near, "#/messages/ann/bob")
    page.wait_for_selector(".bubble >> text=which way?")
    assert "line 11" in page.inner_text(".talk") and "line 12" not in page.inner_text(".talk")
    page.click("text=show all")
    page.wait_for_selector("text=line 39")


def test_a_message_is_opened_beside_the_view_that_is_shown(busy, hurried):
    page = hurried
    places = (("#/", ".said .message-row"), ("#/messages/oncall/planner", ".bubble a"), ("#/work", ".letter a"))
    for view, selector in places:
        show(page, busy, view)
        page.locator(selector).first.click()
        page.wait_for_selector("#panel .state")
        assert page.locator(f"main {selector}").first.is_visible() and page.url.startswith(f"{busy.url}/ui/{view}?id=")
        if view == "#/work":  # its jobs are drawn anew every few seconds: then the focus goes to the new link
            page.evaluate("document.querySelector('.letter').isOld = true")
            page.wait_for_function("() => !document.querySelector('.letter').isOld")
        page.keyboard.press("Escape")
        page.wait_for_selector("#panel", state="hidden")
        assert page.evaluate("location.hash") == view and page.evaluate("document.activeElement.tagName") == "A"


def test_a_conversation_stays_at_its_end_when_a_keyboard_takes_half_of_a_phone(walk):
    page = walk
    page.set_viewport_size({"width": 390, "height": 844})
    go_to(page, "#/messages/planner/dell")
    end = "() => { const { bottom } = document.querySelector('.bubble:last-child').getBoundingClientRect();"
    end += " return bottom <= document.querySelector('.talk').getBoundingClientRect().bottom + 1; }"
    page.wait_for_selector(".bubble:last-child >> text=still quiet?")
    page.wait_for_function(end)
    page.set_viewport_size({"width": 390, "height": 500})
    page.wait_for_function(end)


def test_who_reads_a_conversation_by_keyboard_keeps_the_place_while_others_come(near, page):
    send(near, "ann", "bob", "first")
    show(page, near, "#/messages/ann/bob")
    page.focus(".bubble a")
    send(near, "bob", "ann", "second")
    page.wait_for_selector("text=second")
    assert page.evaluate("document.activeElement.closest('.bubble').textContent").endswith("first")


def test_a_filter_knows_words_senders_receivers_and_channels(walk):
    page = walk
    go_to(page, "#/messages")
    for text, number in [("from:dell green", 12), ("to:archivist", 1), ("#nowhere", 0), ("number 11", 1)]:
        page.fill("#filter", text)
        page.wait_for_function(f"() => document.querySelectorAll('.message-row').length == {number}")


def test_a_name_on_two_channels_is_two_rows_that_differ(near, page):
    """Found by a newcomer: two rows `bob`, one of which heard and one of which did not."""
    ask(near, "GET", "/recv?to=bob&since=0")
    send(near, "ann", "bob", "hello", channel="swarm")
    show(page, near)
    page.wait_for_selector(".trouble-card >> text=swarm/bob does not hear")
    page.wait_for_function("() => document.querySelectorAll('.agent-row b').length == 3")
    assert sorted(page.locator(".agent-row b").all_inner_texts()) == ["bob", "swarm/ann", "swarm/bob"]
    show(page, near, "#/agents")
    page.fill("#filter", "swarm/bob")
    page.wait_for_function("() => document.querySelectorAll('.agent-row').length == 1")


def test_a_filter_works_whatever_a_subject_is(near, page):
    """Who wrote a subject that is no text could have kept a person from finding anything."""
    for number, subject in enumerate([{"toString": 1}, {"valueOf": 1, "toString": {}}, ["x"], 7, True]):
        send(near, "mallory", "spark", f"odd {number}", subject=subject)
    send(near, "dell", "spark", "needle")
    show(page, near, "#/messages")
    page.wait_for_function("() => document.querySelectorAll('.message-row').length == 6")
    for text, number in [("needle", 1), ("odd", 5), ("tostring", 2)]:
        page.fill("#filter", text)
        page.wait_for_function(f"() => document.querySelectorAll('.message-row').length == {number}")


def test_who_does_not_hear_and_what_failed_are_said_first(busy, walk):
    page = walk
    go_to(page, "#/")
    page.wait_for_selector(".trouble-card")
    trouble = page.inner_text(".trouble")
    assert "archivist does not hear" in trouble and "1 job of builds failed" in trouble
    assert page.inner_text("nav").count("1") >= 1
    go_to(page, "#/agents/archivist")
    page.wait_for_selector("code")
    assert f"AGENT_BUS_URL={busy.url} python3 bus_recv.py archivist" in texts(page, "code")


def test_the_last_minutes_are_counted_by_the_bus_and_refusals_with_them(near, page):
    for _ in range(3):
        send(near, "ann", "bob", "x")
    assert ask(near, "POST", "/send", {"from": "ann"})[0] == 400
    show(page, near)
    page.wait_for_selector("text=1 request refused")
    label = page.get_attribute(".bars.wide", "aria-label")
    assert label.startswith("Messages in each of the last 30 minutes, now last: 0, ")
    assert sum(int(number) for number in label.rpartition(": ")[2].split(", ")) == 3


def test_an_agent_has_a_strip_of_the_minutes_in_which_it_listened(busy, closed, page):
    show(page, busy, "#/agents/dell")
    page.wait_for_selector("text=/It listened in (1 minute|2 minutes) of the \\d+ since the bus started./")
    rects = {kind: page.locator(f".presence .{kind}").count() for kind in ("there", "gone", "unknown")}
    assert rects["there"] in (1, 2) and sum(rects.values()) == 60 and rects["unknown"] > 0
    page.goto(f"{closed.url}/ui/#token={closed.tokens['ann']}")
    page.wait_for_selector("#live.good")
    page.goto(f"{closed.url}/ui/#/agents/ann")
    page.wait_for_selector("h1:has-text('ann')")
    assert not page.locator(".presence").count()


def test_nothing_moves_when_the_first_screen_is_drawn(busy, page):
    show(page, busy)
    page.wait_for_selector(".ring a")
    assert page.evaluate("window.shift") < 0.02


def test_an_empty_bus_says_what_to_do(near, page, tmp_path):
    show(page, near)
    page.wait_for_selector("code")
    lines = texts(page, "code")
    assert len(lines) == 3 and all(near.url in line for line in lines)
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    said, heard, client = (
        subprocess.run(["sh", "-c", line], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=PATIENCE)
        for line in (lines[0], lines[1], f"{lines[2]} --once")
    )
    assert said.returncode == heard.returncode == client.returncode == 0, client
    assert json.loads(heard.stdout)["messages"][0]["msg"] == "hello" and "hello" in client.stdout
    page.wait_for_selector("text=Last said")


def test_a_message_is_there_as_soon_as_it_was_sent(near, page):
    send(near, "ann", "bob", "first")
    show(page, near, "#/messages")
    page.wait_for_selector("text=first")
    began = time.monotonic()
    send(near, "ann", "bob", "second")
    page.wait_for_selector("text=second")
    assert time.monotonic() - began < in_time(1)
    assert [text.split("\n")[-1] for text in texts(page)] == ["second", "first"]


def test_many_of_one_pair_in_one_minute_are_one_row_that_unfolds(near, page):
    some = [{"from": "ann", "to": "bob", "msg": f"n{number}"} for number in range(25)]
    assert ask(near, "POST", "/send", some)[0] == 200  # microseconds apart
    show(page, near, "#/messages")
    page.get_by_text("25 messages in this minute").click()
    page.wait_for_selector("text=n24")
    assert page.evaluate("document.querySelector('.space').clientHeight") == 25 * 46


def test_what_is_before_the_eyes_stays_while_others_come(near, page):
    for number in range(60):
        send(near, f"a{number}", "bob", f"n{number}")
    show(page, near, "#/messages")
    page.wait_for_function("() => document.querySelector('.list')?.scrollHeight >= 60 * 46")  # all rows are in it
    page.evaluate("document.querySelector('.list').scrollTop = 800")
    page.wait_for_selector("text=n40")
    where = page.get_by_text("n40", exact=True).bounding_box()
    ask(near, "POST", "/send", [{"from": f"b{number}", "to": "bob", "msg": "new"} for number in range(100)])
    page.wait_for_selector("text=100 new messages")
    assert page.get_by_text("n40", exact=True).bounding_box() == where
    page.click(".pill")
    page.wait_for_function("() => document.querySelector('.list').scrollTop == 0")
    assert "new" in texts(page)[0]


def test_a_pause_holds_what_is_shown(near, page):
    send(near, "ann", "bob", "first")
    show(page, near, "#/messages")
    page.wait_for_selector("text=first")
    page.keyboard.press("p")
    send(near, "ann", "bob", "second")
    page.wait_for_selector("text=1 new message")
    assert page.locator(".message-row").count() == 1
    page.keyboard.press("p")
    page.wait_for_selector("text=second")


def test_a_deaf_agent_is_no_trouble_any_more_when_it_has_polled(near, page):
    send(near, "ann", "archivist", "store this")
    show(page, near)
    page.wait_for_selector("text=archivist does not hear")
    page.wait_for_selector("nav .alarm")
    now = json.loads(near.get("/recv?to=archivist&since=0"))["now"]
    near.get(f"/recv?to=archivist&since={now}")
    began = time.monotonic()
    page.wait_for_selector("text=Nothing is stuck.")
    assert time.monotonic() - began < in_time(6) and not page.locator("nav .alarm").count()
