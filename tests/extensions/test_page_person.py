"""The page in a real Chromium: what a person does there, by mouse and by keyboard."""
import json

from tests.core.test_identity import ask
from tests.kit.near import Near
from tests.kit.page import IN_CHROMIUM, fill, opened, send, show
from tests.kit.peers import mint
from tests.kit.processes import wait_until

pytestmark = IN_CHROMIUM


def test_a_person_says_something_and_is_told_the_truth(near, page):
    near.get("/recv?to=bob&since=0")
    show(page, near)
    page.keyboard.press("c")
    page.fill("#say-as", "maria")
    page.fill("#say-to", "bbo")
    page.wait_for_selector("text=Nobody has ever listened as bbo.")
    page.fill("#say-to", "all")
    page.wait_for_selector("text=This reaches 1 name.")
    page.fill("#say-to", "bob")
    page.fill("#say-text", "stop, please")
    page.click("dialog button.main")
    page.wait_for_selector("dialog >> text=bob is listening")
    [message] = json.loads(near.get("/log"))["messages"]
    assert (message["from"], message["to"], message["msg"]) == ("maria", "bob", "stop, please")


def test_a_person_says_something_to_several(near, page):
    near.get("/recv?to=bob&since=0")
    show(page, near)
    page.keyboard.press("c")
    page.fill("#say-as", "maria")
    page.fill("#say-to", "bob, crl")
    page.wait_for_selector("text=Nobody has ever listened as crl.")
    page.fill("#say-text", "to both of you")
    page.click("dialog button.main")
    page.wait_for_selector("dialog >> text=1 listen now, 1 will see it later. Nobody has ever listened as crl.")
    messages = json.loads(near.get("/log"))["messages"]
    assert sorted((message["to"], message["msg"]) for message in messages) == [
        ("bob", "to both of you"), ("crl", "to both of you"),
    ]  # fmt: skip


def test_what_is_told_of_a_message_is_what_the_bus_says_of_its_receiver(near, page):
    for name in ("bob", "carl"):
        near.get(f"/recv?to={name}&since=0")
    assert near.get("/recv?to=carl&since=0&leave=true")  # carl listens no more
    show(page, near)
    page.keyboard.press("c")
    page.fill("#say-as", "maria")
    for to, told in (
        ("all", "Stored. 1 listen now, 1 will see it later."),
        ("bob, ", "Sent: bob is listening."),
        ("carl", "Stored. carl does not listen now; 1 message waits."),
        ("bbo", "Stored, but nobody has ever listened as bbo. Did you mean bob?"),
        ("no name", "to must be"),
    ):
        page.fill("#say-to", to)
        page.fill("#say-text", "stop, please")
        page.click("dialog button.main")
        page.wait_for_selector(f"dialog p >> text={told}")
        assert page.input_value("#say-text") == ("stop, please" if to == "no name" else "")


def test_all_is_done_by_keyboard(near, page):
    sent = send(near, "ann", "maria", "which way?")
    show(page, near, "#/messages")
    page.wait_for_selector(".message-row")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_selector("#panel .body")
    until_focused(page, "Answer")
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open]")
    page.keyboard.type("maria")
    until_focused(page, "", "#say-text")
    page.keyboard.type("left")
    until_focused(page, "Send")
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog >> text=Stored")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="hidden")
    page.keyboard.press("Escape")
    page.wait_for_selector("#panel", state="hidden")
    assert page.evaluate("document.activeElement.dataset.id") == sent["id"]
    answer = json.loads(near.get("/log?from=maria"))["messages"][0]
    assert (answer["to"], answer["msg"], answer["reply_to"]) == ("ann", "left", sent["id"])


def test_beside_an_open_message_j_and_k_lead_to_the_next_one_and_back(near, page):
    for number in range(4):
        send(near, "ann", "bob", f"n{number}")
    show(page, near, "#/messages")
    page.wait_for_selector(".message-row")
    for keys, text in (("jj", "n2"), ("j", "n1"), ("kk", "n3")):
        for key in (*keys, "Enter"):
            page.keyboard.press(key)
        page.wait_for_selector(f"#panel .body:text-is('{text}')")


def until_focused(page, text, selector="*"):
    """Press Tab until something with this text has the focus."""
    for _ in range(40):
        page.keyboard.press("Tab")
        found = "([text, selector]) => document.activeElement.matches(selector) && document.activeElement.textContent"
        if page.evaluate(found, [text, selector]) == text:
            return
    raise AssertionError(f"Tab does not lead to {text or selector}")


def test_single_keys_are_text_in_a_field_and_can_be_switched_off(busy, browser):
    with opened(browser) as page:
        show(page, busy, "#/messages")
        page.wait_for_selector(".message-row")
        page.keyboard.press("/")
        page.keyboard.type("c1?")
        assert page.input_value("#filter") == "c1?" and not page.locator("dialog[open]").count()
        page.click("#keys")
        page.check("#keys-off")
        page.click("dialog button:has-text('Close')")
        page.keyboard.press("1")
        page.keyboard.press("c")
        assert page.url.endswith("#/messages") and not page.locator("dialog[open]").count()


def test_a_failed_job_is_sent_again_and_reaches_a_worker(tmp_path, hurried):
    page = hurried
    with Near(tmp_path / "bus.db", "--max-attempts", "1") as bus:
        fill(bus)
        show(page, bus, "#/work")
        page.wait_for_selector("text=exit 137")
        assert "1 attempt" in page.inner_text(".letter") and page.inner_text(".letter .badge") == "bu"
        page.click("text=Send again")
        page.wait_for_selector("text=Sent again: it waits for a worker of builds.")
        page.wait_for_selector("text=exit 137", state="detached")
        job = ask(bus, "POST", "/claim", {"to": "builds", "worker": "w"})[1]["messages"][0]
        assert job["msg"] == "make bench" and "dead_of" not in job


def test_jobs_without_a_worker_are_told(tmp_path, page):
    """A job that was given back was in no number of the page."""
    with Near(tmp_path / "bus.db") as bus:
        send(bus, "nano", "builds", "make bench")
        [job] = ask(bus, "POST", "/claim", {"to": "builds", "worker": "w"})[1]["messages"]
        ask(bus, "POST", "/nack", {"id": job["id"], "lease": job["lease"], "delay": 600})
        bus.get("/recv?to=builds&leave=true")  # its worker has gone
        show(page, bus, "#/")
        page.wait_for_selector(".trouble-card:has-text('builds has no worker'):has-text('1 job waits for one')")
        page.goto(f"{bus.url}/ui/#/work")
        page.wait_for_selector(".card .waiting dd:has-text('1')")


def test_own_mail_is_read_only_if_the_person_asks_for_it(tmp_path, hurried):
    page = hurried
    tokens = mint(tmp_path / "bus.db", maria=["--operator"], ann=[])
    with Near(tmp_path / "bus.db") as bus:
        sent = send(bus, "ann", "maria", "which way?", tokens["ann"])
        show(page, bus, f"#token={tokens['maria']}")
        page.wait_for_selector(".trouble-card:first-child:has-text('1 message for you')")
        assert state(bus, sent, tokens["ann"]) == "queued"
        page.click("text=look")
        page.click("button.main:has-text('Read my mail here')")
        page.wait_for_selector(".bubble:has-text('which way?')")
        wait_until(lambda: state(bus, sent, tokens["ann"]) == "acknowledged")
        page.goto(f"{bus.url}/ui/#/")
        page.wait_for_selector("text=Nothing is stuck.")
        later = send(bus, "ann", "maria", "and now?", tokens["ann"])
        wait_until(lambda: state(bus, later, tokens["ann"]) == "fetched")  # it was on no screen
        page.wait_for_selector("text=1 message for you")
        for _ in range(2):
            with page.expect_response("**/recv?*"):
                pass
        assert state(bus, later, tokens["ann"]) == "fetched"


def state(bus, sent, token):
    return ask(bus, "GET", f"/message/{sent['id']}", token=token)[1]["state"]


def test_what_was_taken_back_is_gone_from_the_panel_and_from_the_view(near, page):
    for number in range(3):
        send(near, "maria", "bob", f"oops {number}")
    page.add_init_script("sessionStorage.setItem('agent-bus name', 'maria')")
    for view, selector in (("#/messages", ".message-row"), ("#/messages/maria/bob", ".bubble a")):
        show(page, near, view)
        page.locator(selector).first.click()
        text = page.inner_text("#panel .body")
        page.click("#panel button:has-text('Take back')")
        page.wait_for_selector("#panel .state:text-is('taken back')")
        page.wait_for_selector("#panel >> text=Taken back: nobody gets it.")
        assert text not in page.content() and not page.locator("#panel button:has-text('Take back')").count()
        assert page.evaluate("document.activeElement.textContent") == "Message"
    assert len(json.loads(near.get("/recv?to=bob&since=0"))["messages"]) == 1


def test_a_failed_job_that_is_sent_again_is_shown_so_beside_the_view(tmp_path, page):
    """Its letter is found, although 6,000 messages are newer: one answer of the bus looks at 5,000."""
    with Near(tmp_path / "bus.db", "--max-attempts", "1") as bus:
        fill(bus)
        some = [{"from": f"s{number % 50}", "to": f"r{number % 60}", "msg": "x"} for number in range(1000)]
        for _ in range(6):
            assert ask(bus, "POST", "/send", some)[0] == 200
        show(page, bus, "#/work")
        page.click(".letter a")
        page.wait_for_selector("#panel .state:text-is('nobody has fetched it')")
        page.click(".letter button")
        page.wait_for_selector("#panel .state:text-is('sent again')")
        page.wait_for_selector(".letter", state="detached")
        page.wait_for_selector("main >> text=Sent again: it waits for a worker of builds.")
        assert not page.locator("#panel .body").count()
