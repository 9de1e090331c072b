"""The page for people, in a real Chromium: what it shows, what it must never do, and what it costs.

It needs Debian's chromium and the package playwright (extra `page`). With axe-core in
~/.cache/agent-bus-page/node_modules the page is checked for people who cannot see it, or only little of it.
`python -m tests.extensions.page_pictures FOLDER` writes pictures of what these tests cannot judge.
"""

import contextlib
import http.client
import http.server
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import pytest

import bus_server
from bus_extensions import page as extension
from tests.core.test_identity import ask
from tests.kit.peers import Peer, command, invite, mint
from tests.kit.processes import PATIENCE, ROOT, Server, in_time, wait_until

playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra `page`")
CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")
AXE = pathlib.Path.home() / ".cache/agent-bus-page/node_modules/axe-core/axe.min.js"
VIEWS = ("#/", "#/messages", "#/agents", "#/agents/dell", "#/work", "#/messages/planner/dell")
MS = PATIENCE * 1000
SECONDS = int(os.environ.get("PAGE_SECONDS", "4"))  # of messages, for storm and memory; 30 in CI, 300: make page
WATCH = """addEventListener("securitypolicyviolation", event => (window.violations ??= []).push(event.blockedURI));
window.shift = 0;
new PerformanceObserver(list => list.getEntries().forEach(each => window.shift += each.hadRecentInput ? 0 : each.value))
  .observe({type: "layout-shift", buffered: true});"""
# What a browser does with a tab that another one covers. Without a screen, all of them count as seen.
COVERED = """Object.defineProperty(document, "hidden", { get: () => true });
document.dispatchEvent(new Event("visibilitychange"));"""
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
HOSTILE = [  # each is sent as text, as subject and in further members
    "<img src=x onerror='window.pwned=1'>",
    "<script>window.pwned=1</script>",
    "<svg onload='window.pwned=1'>",
    "<a href='javascript:window.pwned=1'>x</a>",
    "javascript:window.pwned=1",
    "<iframe srcdoc='<script>parent.pwned=1</script>'></iframe>",
    "{{constructor.constructor('window.pwned=1')()}}",
    "</textarea><script>window.pwned=1</script>",
    "```\n<script>window.pwned=1</script>\n```",
    "<style>*{display:none}</style>",
    "<meta http-equiv=refresh content='0;url=http://evil.example'>",
    "http://evil.example/?a=b",
    "\x1b[31mred\x1b[0m",
    "\u202egnp.exe",
    "a\u200bb",
    "\U000e0041\U000e0042",
    "\ufeffx",
    "Z" + "\u0301" * 60,
    "x" * (250 << 10),
    "\u2066\u2067",
    "\r\rover",
    "<img srcset='http://evil.example/x 1x'>",
    "<object data='http://evil.example/x'></object>",
    "<embed src='http://evil.example/x'>",
    "<form action='http://evil.example/'><button>Send</button></form>",
    "<base href='http://evil.example/'>",
    "<link rel=stylesheet href='http://evil.example/x.css'>",
    "<video src=x onerror='window.pwned=1'></video>",
    "<details open ontoggle='window.pwned=1'>",
    "<math><mtext><img src=x onerror='window.pwned=1'></mtext></math>",
    "<noscript><p title=\"</noscript><img src=x onerror='window.pwned=1'>\">",
    "<template><script>window.pwned=1</script></template>",
    "data:text/html,<script>parent.pwned=1</script>",
    "&lt;script&gt;window.pwned=1&lt;/script&gt;",
    "${alert(1)} `${window.pwned=1}`",
    "\x1b]8;;http://evil.example\x1b\\link\x1b]8;;\x1b\\",
    "\x9b31mred",
    "in\u034fvisible",
    "<button autofocus onfocus='window.pwned=1'>x</button>",
    FAMILY,
]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        flags = ["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP evil.example 127.0.0.1"]
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    with opened(browser) as page:
        yield page


@contextlib.contextmanager
def opened(browser, **options):
    """A tab of a browser of its own, which fails the test on an error of its scripts."""
    context = browser.new_context(viewport={"width": 1360, "height": 860}, **options)
    context.set_default_timeout(MS)
    context.add_init_script(WATCH)
    page = context.new_page()
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("dialog", lambda dialog: page.errors.append(dialog.message))
    yield page
    context.close()
    assert not page.errors


@pytest.fixture(scope="module")
def busy(tmp_path_factory):
    """A bus with some talk, a deaf agent, a queue with a failed job, and hostile messages. Nothing changes it."""
    with Server(tmp_path_factory.mktemp("busy") / "bus.db", "--max-attempts", "1") as bus:
        fill(bus)
        yield bus


def fill(bus):
    for name in ("dell", "planner", "spark"):
        bus.get(f"/recv?to={name}&since=0")
    for number in range(12):
        send(bus, "planner", "dell", f"number {number}", subject="p95" if number % 4 == 0 else None)
        send(bus, "dell", "planner", "the tests are green")
    question = send(bus, "oncall", "planner", "Which application is it?")
    send(bus, "planner", "oncall", "svc-report", reply_to=question["id"])
    send(bus, "dell", "archivist", "store this")
    send(bus, "planner", ["spark", "dell"], "still quiet?")
    send(bus, "nano", "builds", "make bench")
    job = ask(bus, "POST", "/claim", {"to": "builds", "worker": "w"})[1]["messages"][0]
    assert ask(bus, "POST", "/nack", {"id": job["id"], "lease": job["lease"], "reason": "exit 137"})[0] == 200
    for number, text in enumerate(HOSTILE):  # of four senders: 20 of one in a minute would be one row
        odd = {"__proto__": text[:40], "constructor": {"a": [text[:40]]}}
        send(bus, f"mallory-{number % 4}", "spark", text, subject=text[:40], **odd)


def send(bus, sender, to, text, token=None, **members):
    message = {"from": sender, "to": to, "msg": text, **{name: value for name, value in members.items() if value}}
    status, answer = ask(bus, "POST", "/send", message, token)
    assert status == 200, answer
    return answer


def show(page, bus, path="#/"):
    """The page at a view, once the bus has answered."""
    page.goto(f"{bus.url}/ui/{path}")
    page.wait_for_selector("#live.good")
    return page


def texts(page, selector=".message-row"):
    return page.locator(selector).all_inner_texts()


def test_a_browser_is_led_to_the_page_and_curl_to_the_help(busy, page):
    page.goto(busy.url)
    assert page.url == f"{busy.url}/ui/"
    assert busy.get("/").startswith(b"agent-bus")


def test_each_file_has_the_policy_letter_for_letter(busy, page):
    for file in ("", *(file.name for file in extension.FOLDER.iterdir())):
        answer = page.request.get(f"{busy.url}/ui/{file}")
        assert answer.ok and answer.headers["content-security-policy"] == extension.POLICY
        assert answer.headers["x-frame-options"] == "DENY" and answer.headers["x-content-type-options"] == "nosniff"
    assert page.request.get(f"{busy.url}/ui/page.py").status == 404
    assert page.request.get(f"{busy.url}/ui/%2e%2e/bus_server.py").status == 404


@pytest.mark.parametrize("view", VIEWS)
def test_hostile_messages_are_text_and_nothing_else(busy, page, view):
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    show(page, busy, view)
    page.wait_for_function("() => document.querySelector('main').innerText.length > 40")
    assert page.evaluate("[window.pwned, window.violations ?? []]") == [None, []]
    assert all(url.startswith(busy.url) for url in asked)


def test_what_hostile_messages_say_is_there_to_be_read(busy, page):
    page.set_viewport_size({"width": 1360, "height": 3000})  # with room for a row of each
    show(page, busy, "#/messages")
    page.wait_for_selector(".message-row")
    found = "\n".join(texts(page))
    assert found.count("mallory") == len(HOSTILE) == 40
    assert "<script>window.pwned=1</script>" in found and "\\u{202e}gnp.exe" in found and "\\u{1b}[31mred" in found
    assert "a\\u{200b}b" in found and "\\u{feff}x" in found and "\\u{e0041}" in found
    assert FAMILY in found and "in\\u{34f}visible" in found and "\\u{9b}31mred" in found
    for row in page.locator(".message-row", has_text="mallory").all()[:6]:
        row.click()
        page.wait_for_selector("#panel .body")
    assert page.evaluate("[window.pwned, window.violations ?? []]") == [None, []]
    assert page.evaluate("document.documentElement.scrollWidth == innerWidth")


def test_no_html_can_be_made_of_text(busy, page):
    show(page, busy)
    assert "TypeError" in page.evaluate("try { document.body.innerHTML = '<b>x</b>' } catch (error) { String(error) }")


def test_one_word_of_6000_letters_does_not_widen_a_phone(busy, browser):
    with opened(browser) as page:
        page.set_viewport_size({"width": 390, "height": 844})
        show(page, busy, "#/messages")
        page.fill("#filter", "xxxxxxxx")
        page.wait_for_selector(".message-row:has-text('xxxxxxxx')")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        page.click(".message-row")
        page.wait_for_selector("#panel .body")
        assert page.evaluate("document.documentElement.scrollWidth") == 390


@pytest.mark.parametrize(
    "path",
    ["#/constructor", "#/__proto__", "#/%E0%A4%A", "#/<img src=x>", "#/messages/a b/c", "#/messages?id=zz"],
)
def test_an_address_that_leads_nowhere_is_no_error(busy, page, path):
    show(page, busy, path)
    page.wait_for_selector("main > div")


def test_a_thread_and_its_receipt_are_beside_a_message(busy, page):
    show(page, busy, "#/messages")
    page.fill("#filter", "svc-report")
    page.locator(".message-row", has_text="svc-report").click()
    page.wait_for_selector(".thread")
    assert "Thread of 2" in page.inner_text("#panel") and "nobody has fetched it" in page.inner_text("#panel")


def test_a_send_to_a_list_is_one_row(busy, page):
    show(page, busy, "#/messages")
    page.fill("#filter", "still quiet")
    page.wait_for_function("() => document.querySelectorAll('.message-row').length == 1")
    assert "spark, dell" in texts(page)[0]


def test_a_filter_knows_words_senders_receivers_and_channels(busy, page):
    show(page, busy, "#/messages")
    for text, number in [("from:dell green", 12), ("to:archivist", 1), ("#nowhere", 0), ("number 11", 1)]:
        page.fill("#filter", text)
        page.wait_for_function(f"() => document.querySelectorAll('.message-row').length == {number}")


def test_who_does_not_hear_and_what_failed_are_said_first(busy, page):
    show(page, busy)
    page.wait_for_selector(".trouble-card")
    trouble = page.inner_text(".trouble")
    assert "archivist does not hear" in trouble and "1 job of builds failed" in trouble
    assert page.inner_text("nav").count("1") >= 1
    page.goto(f"{busy.url}/ui/#/agents/archivist")
    page.wait_for_selector("code")
    assert f"AGENT_BUS_URL={busy.url} python3 bus_recv.py archivist" in texts(page, "code")


def test_the_last_minutes_are_counted_by_the_bus_and_refusals_with_them(bus, page):
    for _ in range(3):
        send(bus, "ann", "bob", "x")
    assert ask(bus, "POST", "/send", {"from": "ann"})[0] == 400
    show(page, bus)
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


def test_an_empty_bus_says_what_to_do(bus, page):
    show(page, bus)
    page.wait_for_selector("code")
    lines = texts(page, "code")
    assert len(lines) == 3 and all(bus.url in line for line in lines)
    subprocess.run(["sh", "-c", lines[0]], check=True, capture_output=True, timeout=PATIENCE)
    page.wait_for_selector("text=Last said")


def test_a_message_is_there_as_soon_as_it_was_sent(bus, page):
    send(bus, "ann", "bob", "first")
    show(page, bus, "#/messages")
    page.wait_for_selector("text=first")
    began = time.monotonic()
    send(bus, "ann", "bob", "second")
    page.wait_for_selector("text=second")
    assert time.monotonic() - began < in_time(1)
    assert [text.split("\n")[-1] for text in texts(page)] == ["second", "first"]


def test_many_of_one_pair_in_one_minute_are_one_row_that_unfolds(bus, page):
    minute = time.time() // 60
    for number in range(25):
        send(bus, "ann", "bob", f"n{number}")
    if time.time() // 60 != minute:
        pytest.skip("a minute ended meanwhile")
    show(page, bus, "#/messages")
    page.get_by_text("25 messages in this minute").click()
    page.wait_for_selector("text=n24")
    assert page.evaluate("document.querySelector('.space').clientHeight") == 25 * 46


def test_what_is_before_the_eyes_stays_while_others_come(bus, page):
    for number in range(60):
        send(bus, f"a{number}", "bob", f"n{number}")
    show(page, bus, "#/messages")
    page.wait_for_selector(".message-row")
    page.evaluate("document.querySelector('.list').scrollTop = 800")
    page.wait_for_function("() => document.querySelector('.list').scrollTop == 800")
    page.wait_for_selector("text=n40")
    where = page.get_by_text("n40", exact=True).bounding_box()
    ask(bus, "POST", "/send", [{"from": f"b{number}", "to": "bob", "msg": "new"} for number in range(100)])
    page.wait_for_selector("text=100 new messages")
    assert page.get_by_text("n40", exact=True).bounding_box() == where
    page.click(".pill")
    page.wait_for_function("() => document.querySelector('.list').scrollTop == 0")
    assert "new" in texts(page)[0]


def test_of_more_than_can_be_followed_the_newest_are_shown_and_the_others_come_as_older_ones(bus, page):
    show(page, bus, "#/messages")
    page.evaluate(COVERED)  # so all of them come between two looks
    for _ in range(3):
        some = [{"from": f"s{number % 50}", "to": f"r{number % 60}", "msg": "x"} for number in range(1000)]
        assert ask(bus, "POST", "/send", some)[0] == 200
    page.wait_for_selector(".foot:has-text('older ones come as you scroll')")
    send(bus, "ann", "bob", "the last one")
    page.wait_for_selector("text=the last one")
    to_the_end(page, "from the first on")
    assert page.inner_text(".foot").startswith("3,001 messages loaded")


def to_the_end(page, foot):
    """Scroll down until the line below the list says this."""
    page.evaluate(
        """async says => {
            const list = document.querySelector(".list"), foot = document.querySelector(".foot");
            while (!foot.textContent.includes(says)) {
                list.scrollTop = list.scrollHeight;
                await new Promise(done => setTimeout(done, 20));
            }
            list.scrollTop = 0;
        }""",
        foot,
    )


def test_a_pause_holds_what_is_shown(bus, page):
    send(bus, "ann", "bob", "first")
    show(page, bus, "#/messages")
    page.wait_for_selector("text=first")
    page.keyboard.press("p")
    send(bus, "ann", "bob", "second")
    page.wait_for_selector("text=1 new message")
    assert page.locator(".message-row").count() == 1
    page.keyboard.press("p")
    page.wait_for_selector("text=second")


def test_a_person_says_something_and_is_told_the_truth(bus, page):
    bus.get("/recv?to=bob&since=0")
    show(page, bus)
    page.keyboard.press("c")
    page.fill("#say-as", "maria")
    page.fill("#say-to", "bbo")
    page.wait_for_selector("text=Nobody has ever listened as bbo.")
    page.fill("#say-to", "all")
    page.wait_for_selector("text=This reaches 1 name.")
    page.fill("#say-to", "bob")
    page.fill("#say-text", "stop, please")
    page.click("dialog button.main")
    page.wait_for_selector("text=bob is listening")
    [message] = json.loads(bus.get("/log"))["messages"]
    assert (message["from"], message["to"], message["msg"]) == ("maria", "bob", "stop, please")


def test_all_is_done_by_keyboard(bus, page):
    sent = send(bus, "ann", "maria", "which way?")
    show(page, bus, "#/messages")
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
    answer = json.loads(bus.get("/log?from=maria"))["messages"][0]
    assert (answer["to"], answer["msg"], answer["reply_to"]) == ("ann", "left", sent["id"])


def until_focused(page, text, selector="*"):
    """Press Tab until something with this text has the focus."""
    for _ in range(40):
        page.keyboard.press("Tab")
        found = "([text, selector]) => document.activeElement.matches(selector) && document.activeElement.textContent"
        if page.evaluate(found, [text, selector]) == text:
            return
    raise AssertionError(f"Tab does not lead to {text or selector}")


def test_single_keys_are_text_in_a_field_and_can_be_switched_off(busy, page):
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


def test_a_failed_job_is_sent_again_and_reaches_a_worker(tmp_path, page):
    with Server(tmp_path / "bus.db", "--max-attempts", "1") as bus:
        fill(bus)
        show(page, bus, "#/work")
        page.wait_for_selector("text=exit 137")
        page.click("text=Send again")
        page.wait_for_selector("text=Sent again: it waits for a worker of builds.")
        page.wait_for_selector("text=exit 137", state="detached")
        job = ask(bus, "POST", "/claim", {"to": "builds", "worker": "w"})[1]["messages"][0]
        assert job["msg"] == "make bench" and "dead_of" not in job


def test_a_server_that_ends_is_said_and_what_was_known_stays(tmp_path, page):
    with Server(tmp_path / "bus.db") as bus:
        send(bus, "ann", "bob", "before")
        show(page, bus, "#/messages")
        page.wait_for_selector("text=before")
        began = time.monotonic()
        bus.kill()
        page.wait_for_selector("#banner:has-text('out of reach')")
        assert time.monotonic() - began < in_time(2)
        assert "before" in texts(page)[0] and not page.locator("#say").is_visible()
        bus.start()
        began = time.monotonic()
        for number in range(3):
            send(bus, "ann", "bob", f"after {number}")
        page.wait_for_selector("#live.good", timeout=35000)
        page.wait_for_selector("text=after 2")
        assert [text.split("\n")[-1] for text in texts(page)] == ["after 2", "after 1", "after 0", "before"]
        assert page.inner_text(".foot") == "4 messages loaded, from the first on"
        assert time.monotonic() - began < in_time(35)


def test_another_database_begins_anew_and_says_so(tmp_path, page):
    bus = Server(tmp_path / "one.db")
    with bus:
        send(bus, "ann", "bob", "before")
        show(page, bus, "#/messages")
        page.wait_for_selector("text=before")
        bus.kill()
        other = Server(tmp_path / "other.db")
        other.port, other.url = bus.port, bus.url
        other.command[other.command.index("--port") + 1] = str(bus.port)
        with other:
            send(other, "ann", "bob", "after")
            page.wait_for_selector("text=This is another bus")
            page.wait_for_selector("text=after")
            assert [text.split("\n")[-1] for text in texts(page)] == ["after"]


@pytest.fixture(scope="module")
def closed(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("closed") / "bus.db") as bus:
        grants = {"maria": ["--operator"], "ann": [], "sensor": ["--send-only"]}
        bus.tokens = {name: invite(bus, name, *options) for name, options in grants.items()}
        wait_until(lambda: ask(bus, "GET", "/agents")[0] == 401)
        send(bus, "maria", "ann", "for ann", bus.tokens["maria"])
        send(bus, "maria", "bob", "for bob", bus.tokens["maria"])
        send(bus, "sensor", "bob", "21 degrees", bus.tokens["sensor"])
        yield bus


def test_the_token_of_a_link_is_nowhere_but_in_this_tab(closed, page):
    token, asked = closed.tokens["maria"], []
    page.on("request", lambda request: asked.append(request.url))
    show(page, closed, f"#token={token}")
    assert token not in page.url and not any(token in url for url in asked)
    assert page.evaluate("[JSON.stringify(localStorage), document.cookie, history.length]") == ["{}", "", 2]
    page.wait_for_selector("text=for bob")


def test_a_wrong_token_is_said_and_the_field_is_empty(closed, page):
    page.goto(f"{closed.url}/ui/")
    page.fill("#token", "abt_00000000_wrong")
    page.click("text=Open")
    page.wait_for_selector("text=does not know this token")
    assert page.input_value("#token") == ""
    page.fill("#token", closed.tokens["maria"])
    page.click("text=Open")
    page.wait_for_selector("#live.good")


def test_an_ordinary_token_shows_its_own_mail_and_says_so(closed, page):
    show(page, closed, f"#token={closed.tokens['ann']}")
    page.wait_for_selector("text=You see who is there, and the mail of ann.")
    assert "Messages per minute" not in page.inner_text("main")
    page.goto(f"{closed.url}/ui/#/messages")
    page.wait_for_selector("text=for ann")
    assert len(texts(page)) == 1


def test_a_token_that_only_sends_sees_what_it_sent(closed, page):
    show(page, closed, f"#token={closed.tokens['sensor']}")
    page.wait_for_selector("text=This token may only send")
    page.goto(f"{closed.url}/ui/#/messages")
    page.wait_for_selector("text=21 degrees")
    assert len(texts(page)) == 1
    page.keyboard.press("c")
    assert page.input_value("#say-as") == "sensor" and not page.locator("#say-as").is_editable()
    page.fill("#say-to", "bob")
    page.fill("#say-text", "22 degrees")
    page.click("dialog button.main")
    page.wait_for_selector("dialog >> text=Stored")
    page.wait_for_selector(".message-row:has-text('22 degrees')")


def test_a_revoked_token_leads_to_the_login_while_the_page_is_open(tmp_path, page):
    with Server(tmp_path / "bus.db") as bus:
        token = invite(bus, "maria", "--operator")
        wait_until(lambda: ask(bus, "GET", "/agents")[0] == 401)
        show(page, bus, f"#token={token}")
        command(bus, "revoke", "maria")
        page.wait_for_selector("text=This bus wants a token")
        assert page.evaluate("sessionStorage.length") == 0


class Stranger(http.server.BaseHTTPRequestHandler):
    """A page of another site."""

    def do_GET(self):
        body = b"<!doctype html><a href=BUS/>to the bus</a><iframe src=BUS/ui/></iframe>"
        body = body.replace(b"BUS", self.server.bus)
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_link_on_another_site_opens_the_page_and_nothing_else_there_reaches_the_bus(busy, page):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stranger) as site:
        site.bus = busy.url.encode()
        threading.Thread(target=site.serve_forever, daemon=True).start()
        page.goto(f"http://localhost:{site.server_port}/")
        fetched = "url => fetch(url, {mode: 'no-cors'}).then(answer => answer.text()).catch(String)"
        assert not page.evaluate(fetched, f"{busy.url}/log") or "Error" in page.evaluate(fetched, f"{busy.url}/log")
        frame = page.frames[1]
        assert "agent-bus" not in frame.content()
        page.click("a")
        page.wait_for_selector("#live.good")
        assert page.url == f"{busy.url}/ui/"
        site.shutdown()


def test_a_name_of_a_stranger_for_the_address_of_an_open_bus_gets_nothing(busy, page):
    answer = page.goto(f"http://evil.example:{busy.port}/ui/")
    assert answer.status == 403


def test_six_tabs_leave_room_to_send(bus, browser):
    """A browser has six connections to a bus for all its tabs, so a tab that nobody sees must not hold one."""
    with opened(browser) as tab:
        show(tab, bus)
        for _ in range(5):
            tab.evaluate(COVERED)
            tab = show(tab.context.new_page(), bus)
        began = time.monotonic()
        # As the page itself sends: Chromium has other connections for a fetch with cookies.
        tab.evaluate("import('./bus.js').then(bus => bus.send({ from: 'tab', to: 'bob', msg: 'from the sixth' }))")
        assert time.monotonic() - began < in_time(1)
        wait_until(lambda: b"from the sixth" in bus.get("/log"))


# For people who see little


def opens_a_message(page):
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_selector("#panel .body")


def loses_the_bus(page):
    page.route("**/log?*", lambda route: route.abort())
    page.reload()
    page.wait_for_selector("#banner:has-text('out of reach')")


STATES = {  # name: (the bus, where, and what a person does there)
    "now": ("busy", "#/", None),
    "messages": ("busy", "#/messages", None),
    "conversation": ("busy", "#/messages/planner/dell", None),
    "one message": ("busy", "#/messages", opens_a_message),
    "agents": ("busy", "#/agents", None),
    "deaf agent": ("busy", "#/agents/archivist", None),
    "work": ("busy", "#/work", None),
    "mail": ("busy", "#/mail", None),
    "say": ("busy", "#/", lambda page: page.keyboard.press("c")),
    "keys": ("busy", "#/", lambda page: page.keyboard.press("?")),
    "a place": ("noted", "#/more/notes", None),
    "a place with fields": ("noted", "#/more/seek", None),
    "300 agents": ("crowd", "#/", None),
    "empty": ("bus", "#/", None),
    "token": ("closed", None, None),
    "out of reach": ("busy", None, loses_the_bus),
}


@pytest.mark.skipif(not AXE.exists(), reason="axe-core is not installed in ~/.cache/agent-bus-page")
@pytest.mark.parametrize("state", STATES)
def test_people_who_see_little_can_use_it(request, page, state):
    name, where, act = STATES[state]
    bus = request.getfixturevalue(name)
    if where is None:
        page.goto(f"{bus.url}/ui/")
        page.wait_for_selector("main > *")
    else:
        show(page, bus, where)
        page.wait_for_function("() => document.querySelector('main').innerText.length > 40")
    if act:
        page.wait_for_selector("main > *")
        act(page)
    page.evaluate(AXE.read_text())
    for width in (390, 1360):
        page.set_viewport_size({"width": width, "height": 860})
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.evaluate("new Promise(requestAnimationFrame)")  # a page hears of its new size with its next frame
            assert violations(page) == [], (width, scheme)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, scheme


def violations(page):
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [(each["id"], node["target"], node.get("failureSummary")) for each in found for node in each["nodes"]]


# Much of it


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """A bus that 300 agents have polled; six of them have mail."""
    with Server(tmp_path_factory.mktemp("crowd") / "bus.db") as bus:
        with Peer(bus) as peer:
            for number in range(300):
                assert peer.send("GET", f"/recv?to=agent-{number:03}&since=0").answer().status == 200
        for number in range(6):
            send(bus, f"agent-{number:03}", f"agent-{number + 20:03}", "are you there?")
        yield bus


def test_of_300_agents_all_are_there_and_nothing_moves(crowd, page):
    show(page, crowd)
    page.wait_for_selector(".cell")
    assert page.locator(".cell").count() == 300
    page.wait_for_function("() => document.querySelectorAll('.agent-row').length == 8")
    assert page.evaluate("window.shift") < 0.02
    page.goto(f"{crowd.url}/ui/#/agents")
    page.wait_for_selector(".list .agent-row")
    assert page.locator(".row").count() < 60


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A bus with 100,000 messages of many pairs, a thousand in each of the last 100 minutes."""
    database, now = tmp_path_factory.mktemp("stored") / "bus.db", bus_server.wall_clock()
    state = bus_server.State(str(database))
    state.writing.executescript("PRAGMA synchronous=OFF")
    for minute in range(100):
        numbers = range(1000 * minute, 1000 * minute + 1000)
        some = [{"from": f"a{n % 97}", "to": f"b{n % 89}", "msg": f"message {n}"} for n in numbers]
        at = now - (100 - minute) * 60_000_000
        state.apply([bus_server.Put([bus_server.draft(one, None) for one in some])], bus_server.Now(at, at))
    state.close()
    with Server(database) as bus:
        yield bus


def test_with_100000_stored_the_first_row_is_there_at_once_for_one_request(stored, page):
    asked = []
    page.on("request", lambda request: "/log" in request.url and asked.append(request.url))
    began = time.monotonic()
    page.goto(f"{stored.url}/ui/#/messages")
    page.wait_for_selector(".message-row")
    assert time.monotonic() - began < in_time(1.5)
    assert len([url for url in asked if "before" in url]) == 1


def heap(page):
    """Bytes of JavaScript in use, without what is garbage."""
    session = page.context.new_cdp_session(page)
    session.send("HeapProfiler.collectGarbage")
    return session.send("Runtime.getHeapUsage")["usedSize"]


def test_10000_messages_are_few_nodes_and_memory_stays_flat(stored, page):
    show(page, stored, "#/messages")
    page.wait_for_selector(".message-row")
    to_the_end(page, "are kept here")
    page.wait_for_function("() => document.querySelectorAll('.row').length <= 60")
    before = heap(page)
    flood(stored, 50, SECONDS)
    send(stored, "ann", "bob", "the last one")
    page.wait_for_selector("text=the last one")
    assert page.locator(".row").count() <= 60
    assert heap(page) < 1.2 * before + (2 << 20)


def flood(bus, rate, seconds):
    """So many messages a second, of ten pairs, in ten requests a second."""
    began = time.monotonic()
    with Peer(bus) as peer:
        for turn in range(10 * seconds):
            numbers = range(turn * rate // 10, (turn + 1) * rate // 10)
            some = [{"from": f"s{n % 10}", "to": f"r{n % 10}", "msg": f"number {n} of a flood"} for n in numbers]
            assert peer.send("POST", "/send", some).answer().status == 200
            for name in {each["to"] for each in some}:  # else its mailbox would be full
                assert peer.send("GET", f"/recv?to={name}&since=now").answer().status == 200
            time.sleep(max(0, began + (turn + 1) / 10 - time.monotonic()))


def test_a_storm_of_300_a_second_is_few_requests_and_no_long_task(bus, page):
    show(page, bus)
    page.evaluate("""() => {
        window.long = [0];
        new PerformanceObserver(list => list.getEntries().forEach(each => window.long.push(each.duration)))
            .observe({ type: "longtask" });
    }""")
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    began = time.monotonic()
    flood(bus, 300, SECONDS)
    page.wait_for_selector("text=floods")
    took = time.monotonic() - began
    assert len(asked) <= 6 * took + 6, asked
    assert max(page.evaluate("window.long")) <= in_time(200)


# Behind a proxy


class Under(http.server.BaseHTTPRequestHandler):
    """A reverse proxy that has the bus under /team/bus/."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if not self.path.startswith("/team/bus/"):
            self.send_error(404)
            return
        behind = http.client.HTTPConnection("127.0.0.1", self.server.bus.port, timeout=60)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        behind.request(self.command, self.path[len("/team/bus") :], body, dict(self.headers))
        answer = behind.getresponse()
        text = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "date", "server", "content-length"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_POST = do_GET

    def log_message(self, *_):
        pass


def test_under_a_path_of_a_proxy_all_works(bus, page):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Under) as proxy:
        proxy.bus = bus
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        send(bus, "ann", "bob", "through the proxy")
        page.goto(f"http://127.0.0.1:{proxy.server_port}/team/bus/")
        page.wait_for_selector("#live.good")
        assert page.url == f"http://127.0.0.1:{proxy.server_port}/team/bus/ui/"
        page.keyboard.press("2")
        page.wait_for_selector("text=through the proxy")
        page.keyboard.press("c")
        page.fill("#say-as", "maria")
        page.fill("#say-to", "bob")
        page.fill("#say-text", "and back")
        page.click("dialog button.main")
        page.wait_for_selector(".message-row:has-text('and back')")
        page.goto("about:blank")
        proxy.shutdown()


# The places of extensions


NOTHING = '''
TABLES, NOUN, OPERATIONS = None, "", ()


def options(parser):
    pass


def start(bus, options):
    pass
'''
NOTES = r'''
from bus_server import Refused, encode, ok, parse_json

TABLES, NOUN, OPERATIONS = None, "", ()
notes = [{"id": "1", "text": "buy <b>milk</b>"}, {"id": "2", "text": "\u202egnp.exe"}]


def options(parser):
    pass


def start(bus, options):
    def found(request):
        words = request.query().one("words") or ""
        return ok(bus, f'"notes": {encode([note for note in notes if words in note["text"]])}')

    def drop(request):
        asked = parse_json(request.body)
        for note in notes:
            if note["id"] == asked["id"]:
                notes.remove(note)
                return ok(bus, f'"by": {encode(asked["by"])}')
        raise Refused(409, f"there is no note {asked['id']}")

    bus.route("GET", "/notes", found)
    bus.route("POST", "/notes", drop)
'''
NOTES_PLACE = """
export default {
  title: "Notes", says: "what people keep in mind", path: "notes", rows: answer => answer.notes,
  columns: { number: note => note.id, text: note => note.text },
  actions: [{ title: "Drop", may: note => note.id === "1", sure: "The note is gone then.",
    ask: (note, me) => ["notes", { id: note.id, by: me }], done: (note, answer) => `dropped by ${answer.by}` }],
  onMessage: [{ title: "Note", ask: message => ["notes", { id: message.id }] }],
};
"""
FIND_PLACE = """
export default {
  title: "Find a note", says: "notes with a word", path: "notes", fields: { words: "Words" },
  rows: answer => answer.notes, columns: { text: note => note.text },
};
"""


def extended(folder, **extensions):
    """A bus with the page, what the page needs, these extensions, and the place of one that it does not have."""
    ours = folder / "bus_extensions"
    shutil.copytree(extension.FOLDER, ours / "page")
    for file in ("bus_server.py", *(f"bus_extensions/{name}.py" for name in ("history", "page", "people"))):
        shutil.copy(ROOT / file, folder / file)
    for name, (code, place) in extensions.items():
        (ours / f"{name}.py").write_text(code)
        (ours / "page" / f"{name}.js").write_text(place)
    (ours / "page/gone.js").write_text(NOTES_PLACE)
    return Server(folder / "bus.db", program=("-S", str(folder / "bus_server.py")))


@pytest.fixture
def noted(tmp_path):
    with extended(tmp_path, notes=(NOTES, NOTES_PLACE), seek=(NOTHING, FIND_PLACE)) as bus:
        send(bus, "ann", "bob", "hello")
        yield bus


def test_an_extension_has_a_place_of_its_own_if_the_bus_has_the_extension(noted, page):
    show(page, noted)
    page.evaluate("sessionStorage.setItem('agent-bus name', 'maria')")
    page.keyboard.press("5")
    page.wait_for_selector("th:has-text('number')")
    assert texts(page, ".button") == ["Notes", "Find a note"]
    assert texts(page, "td:nth-child(2)") == ["buy <b>milk</b>", "\\u{202e}gnp.exe"]
    assert page.locator("tr button").count() == 1
    page.click("tr:has-text('milk') button")
    page.wait_for_selector("text=The note is gone then. Press Drop again to do it.")
    page.click("tr:has-text('milk') button")
    page.wait_for_selector("text=dropped by maria")
    page.wait_for_selector("tr:has-text('milk')", state="detached")


def test_a_place_with_fields_is_asked_when_the_person_wants_it(noted, page):
    show(page, noted, "#/more/seek")
    page.wait_for_selector(".fields")
    assert not page.locator("tr").count()
    page.fill(".fields input", "milk")
    page.keyboard.press("Enter")
    page.wait_for_selector("tr:has-text('milk')")
    assert page.locator("tr").count() == 2
    page.fill(".fields input", "butter")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=There are none.")


def test_an_extension_may_do_something_with_a_message_and_its_refusal_is_shown(noted, page):
    show(page, noted, "#/messages")
    page.wait_for_selector(".message-row")
    opens_a_message(page)
    page.click("#panel button:has-text('Note')")
    page.wait_for_selector("#panel >> text=there is no note")


def test_messages_are_found_by_their_words(page, tmp_path):
    with Server(tmp_path / "bus.db") as bus:
        for sender, text in (("ann", "the disk is full"), ("eve", "full of <b>disks</b>"), ("ann", "x")):
            send(bus, sender, "bob", text)
        show(page, bus, "#/more/search")
        page.fill("input[name=q]", "full")
        page.keyboard.press("Enter")
        page.wait_for_selector("tr:has-text('disk is full')")
        assert texts(page, "td:nth-child(4)") == ["full of <b>disks</b>", "the disk is full"]
        page.fill("input[name=from]", "ann")
        page.keyboard.press("Enter")
        page.wait_for_selector("tr:has-text('eve')", state="detached")
        page.fill("input[name=q]", "*")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=q has no word to look for")
        page.click("td a")
        page.wait_for_selector("#panel .body")


def test_an_operator_redacts_a_message(page, tmp_path):
    with Server(tmp_path / "bus.db") as bus:
        send(bus, "ann", "bob", "the password is swordfish")
        show(page, bus, "#/messages")
        page.wait_for_selector(".message-row")
        opens_a_message(page)
        page.click("#panel button:has-text('Redact')")
        page.wait_for_selector("#panel >> text=Press Redact again to do it.")
        page.click("#panel button:has-text('Redact')")
        page.wait_for_selector("#panel >> text=Redacted. Fetched by nobody; revoke the secret")
        page.reload()
        page.wait_for_selector(".message-row:has-text('an operator has redacted this message')")


def test_without_such_extensions_there_is_no_place_for_them(tmp_path, page):
    with extended(tmp_path) as bus:
        assert page.request.get(f"{bus.url}/ui/extensions.js").text() == ""
        show(page, bus, "#/more/gone")
        page.wait_for_selector("main code")
        assert page.locator("nav a").count() == 4


# The person


def test_own_mail_is_read_only_if_the_person_asks_for_it(tmp_path, page):
    tokens = mint(tmp_path / "bus.db", maria=["--operator"], ann=[])
    with Server(tmp_path / "bus.db") as bus:
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


def test_a_deaf_agent_is_no_trouble_any_more_when_it_has_polled(bus, page):
    send(bus, "ann", "archivist", "store this")
    show(page, bus)
    page.wait_for_selector("text=archivist does not hear")
    page.wait_for_selector("nav .alarm")
    now = json.loads(bus.get("/recv?to=archivist&since=0"))["now"]
    bus.get(f"/recv?to=archivist&since={now}")
    began = time.monotonic()
    page.wait_for_selector("text=Nothing is stuck.")
    assert time.monotonic() - began < in_time(6) and not page.locator("nav .alarm").count()


def test_a_connection_that_is_not_encrypted_is_said(tmp_path, page):
    with Server(tmp_path / "bus.db", "--allow-host", "evil.example") as bus:
        page.goto(f"http://evil.example:{bus.port}/ui/")
        page.wait_for_selector("text=This connection is not encrypted")
        page.goto(f"{bus.url}/ui/")
        page.wait_for_selector("#live.good")
        assert "not encrypted" not in page.inner_text("body")


def test_a_link_for_a_person_is_printed_and_opens_the_page(closed, page):
    printed = command(closed, "invite", "erik", "--operator", "--page", "--for", "12h", "--yes")
    [link] = [line.strip() for line in printed.splitlines() if "/ui/#token=" in line]
    page.goto(link)
    page.wait_for_selector("#live.good")
    page.wait_for_selector("text=for bob")
    program = [sys.executable, ROOT / "tools/agent_bus.py", "open"]
    env = {"PATH": "", "AGENT_BUS_URL": closed.url, "AGENT_BUS_TOKEN": closed.tokens["ann"]}
    done = subprocess.run(program, env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout == f"{closed.url}/ui/#token={closed.tokens['ann']}\n", done


def test_what_is_sent_later_is_listed_and_taken_back(bus, page):
    message = {"from": "ann", "to": "bob", "msg": "remember the milk"}
    assert ask(bus, "POST", "/later", {"cron": "0 9 * * 1-5", "message": message})[0] == 200
    assert ask(bus, "POST", "/later", {"after": 900, "message": {**message, "to": ["bob", "carl"]}})[0] == 200
    show(page, bus, "#/more/later")
    page.wait_for_selector("tr:has-text('0 9 * * 1-5 (UTC)')")
    page.click("tr:has-text('bob, carl') button")
    page.wait_for_selector("text=The message is not sent then. Press Take back again to do it.")
    page.click("tr:has-text('bob, carl') button")
    page.wait_for_selector("text=taken back: the message to bob, carl")
    page.wait_for_selector("tr:has-text('bob, carl')", state="detached")
    assert [each["message"]["to"] for each in ask(bus, "GET", "/later")[1]["schedules"]] == ["bob"]


def test_the_rules_of_notices_are_listed(tmp_path, page):
    rules = tmp_path / "rules.json"
    rule = {"rule": "lead-waits", "when": "unread", "to": "lead", "template": "ntfy", "url": "https://ntfy.sh/SECRET"}
    rules.write_text(json.dumps({"hosts": ["ntfy.sh"], "rules": [rule]}))
    rules.chmod(0o600)
    with Server(tmp_path / "bus.db", "--notify", str(rules)) as bus:
        show(page, bus, "#/more/notify")
        page.wait_for_selector("tr:has-text('unread: lead on default')")
        assert texts(page, "td") == ["lead-waits", "unread: lead on default", "never", "0 sent, 0 failed"]
        assert "SECRET" not in page.content()
