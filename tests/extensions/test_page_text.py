"""The page in a real Chromium: whatever an agent wrote is text there, and nothing of it runs or loads."""
import json
import re
import unicodedata

import pytest

from bus_extensions import page as extension
from tests.core.test_identity import ask
from tests.kit import peers
from tests.kit.near import Near
from tests.kit.page import FAMILY, HOSTILE, IN_CHROMIUM, go_to, opened_beside, send, show, texts

pytestmark = IN_CHROMIUM
VIEWS = (
    "#/",
    "#/messages",
    "#/agents",
    "#/agents/spark",
    "#/work",
    "#/messages/mallory-1/spark",
    "#/mail",
    "#/more/search",
    "#/more/locks",
)
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
        "trusted-types 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}


def test_each_file_has_the_policy_letter_for_letter(busy):
    for file in ("", "extensions.js", *(file.name for file in extension.FOLDER.iterdir())):
        answer = peers.ask(busy, "GET", f"/ui/{file}")
        assert answer.status == 200 and HEADERS.items() <= answer.fields.items(), file
    assert peers.ask(busy, "GET", "/ui/page.py").status == 404
    assert peers.ask(busy, "GET", "/ui/%2e%2e/bus_server.py").status == 404
    assert peers.ask(busy, "GET", "/ui/../bus_server.py").status == 404


def test_hostile_messages_are_text_and_nothing_else(busy, walk):
    page = walk
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    go_to(page, VIEWS[0])
    for view in VIEWS:
        go_to(page, view)
        page.wait_for_function("() => document.querySelector('main').innerText.length > 40")
        assert page.evaluate("[window.pwned, window.violations ?? []]") == [None, []], view
        assert all(url.startswith(busy.url) for url in asked), view


def test_what_hostile_messages_say_is_there_to_be_read(walk):
    page = walk
    page.set_viewport_size({"width": 1360, "height": 3000})  # with room for a row of each
    go_to(page, "#/messages")
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


def test_of_each_hostile_message_every_letter_is_there_and_none_is_hidden(busy, walk):
    """What is written out is read back, and compared with what was sent."""
    page = walk
    sent = [message for message in json.loads(busy.get("/log?to=spark&max=1000"))["messages"] if "__proto__" in message]
    assert [message["msg"] for message in sent] == HOSTILE
    go_to(page, "#/messages")
    for message, (body, members) in zip(sent, opened_beside(page, [message["id"] for message in sent])):
        kinds = {letter: unicodedata.category(letter) for letter in body.replace(FAMILY, "")}
        assert {letter for letter, kind in kinds.items() if kind in ("Cc", "Cf", "Zl", "Zp")} <= {"\n"}, message
        text = re.sub(r"(?m)^```[^\n]*\n?", "", message["msg"]).replace("\u0301" * 60, "\u0301" * 4 + "…")
        assert re.sub(r"\\u\{([0-9a-f]+)\}", lambda found: chr(int(found[1], 16)), body) == text
        assert members.count("constructor") == 1
    assert page.evaluate("[window.pwned, window.violations ?? []]") == [None, []]


ODD = [None, True, 7, -1e300, "", "x" * 3000, [], {}, [None], {"a": None}, {"toString": 1, "length": -1}]
MEMBERS = ("subject", "attempts", "reason", "dead_of", "state", "type", "redacted", "status", "work", "read")


def test_members_of_a_stranger_break_no_view(tmp_path, page):
    """A message to NAME.dead without attempts once blinded the view of failed jobs for everybody."""
    with Near(tmp_path / "bus.db", "--max-attempts", "1") as bus:
        send(bus, "nano", "builds", "make bench")
        job = ask(bus, "POST", "/claim", {"to": "builds", "worker": "w"})[1]["messages"][0]
        assert ask(bus, "POST", "/nack", {"id": job["id"], "lease": job["lease"], "reason": "exit 137"})[0] == 200
        for number, odd in enumerate(ODD):
            for to in ("builds.dead", "maria"):
                message = {"from": f"mallory-{number}", "to": to, "msg": odd, **dict.fromkeys(MEMBERS, odd)}
                stored = [ask(bus, "POST", "/send", each)[0] for each in (message, {**message, "msg": "text"})]
                assert stored[1] == 200, odd
        send(bus, "alice", "maria", "the real one")
        show(page, bus, "#/work")
        page.wait_for_selector(".letter >> text=exit 137")
        assert page.locator(".letter").count() > len(ODD)
        go_to(page, "#/mail")
        page.fill("#mail-name", "maria")
        page.click("button.main:has-text('Read my mail here')")
        page.wait_for_selector(".bubble >> text=the real one")
        go_to(page, "#/")
        page.wait_for_selector(".said .message-row >> text=the real one")
        go_to(page, "#/messages")
        page.wait_for_selector(".message-row >> text=the real one")
        opened_beside(page, [message["id"] for message in json.loads(bus.get("/log?max=1000"))["messages"]])
        for number in range(len(ODD)):
            go_to(page, f"#/messages/mallory-{number}/maria")
            page.wait_for_selector(".bubble >> text=text")


def test_a_message_of_125000_hidden_characters_hides_no_other(near, page):
    """It once ended the mail of its reader: one call got 250,000 arguments."""
    for sender, text in (("alice", "first"), ("mallory", "\x7fa" * 125000), ("alice", "second")):
        assert peers.ask(near, "POST", f"/send?from={sender}&to=maria", text.encode()).status == 200
    show(page, near, "#/mail")
    page.fill("#mail-name", "maria")
    page.click("button.main:has-text('Read my mail here')")
    page.wait_for_selector(".bubble:has-text('second')")
    page.goto(f"{near.url}/ui/#/messages/mallory/maria")
    page.click("text=show all")
    written = "document.querySelector('SELECTOR')?.textContent.length == 125000 * '\\\\u{7f}a'.length"
    page.wait_for_function(written.replace("SELECTOR", ".bubble .body"))
    page.click(".bubble a")
    page.wait_for_function(written.replace("SELECTOR", "#panel .body"))
    assert page.locator("#panel .hidden-character").count() < 2000


MANY = {  # each once held up the tab that opened it for half a minute and more
    "pieces of code": {"msg": "```\nx\n" * 20000 + "end"},
    "hidden characters in pieces of code": {"msg": ("```\n" + "\x7f" * 200 + "\n") * 190 + "end"},
    "members": {"msg": "end", **{f"m{number}": 1 for number in range(10000)}},
}


@pytest.mark.parametrize("what", MANY)
def test_a_message_of_very_many_parts_makes_few_nodes(near, page, what):
    members = {**MANY[what]}
    text = members.pop("msg")
    stored = send(near, "mallory", "maria", text, **members)
    show(page, near, f"#/messages?id={stored['id']}")
    page.wait_for_function("document.querySelector('#panel .body')?.textContent.endsWith('end')")
    page.wait_for_selector("#panel .state")
    assert page.evaluate("document.querySelectorAll('#panel *').length") < 3000
    assert page.evaluate("document.querySelector('#panel .body').textContent.length") >= len(text) * 0.9


def test_what_an_agent_says_of_itself_is_written_out_in_a_tooltip_too(near, page):
    for number in range(13):  # above 12 there is a field of cells
        near.get(f"/recv?to=agent-{number}&since=0")
    assert ask(near, "POST", "/status", {"from": "agent-3", "text": "ok \u202egnihton"})[0] == 200
    show(page, near)
    page.wait_for_selector(".cell")
    titles = page.evaluate("[...document.querySelectorAll('.cell')].map(cell => cell.title + cell.ariaLabel)")
    [title] = [title for title in titles if "gnihton" in title]
    assert title.count("\\u{202e}") == 2 and "\u202e" not in title


def test_no_html_can_be_made_of_text(busy, page):
    show(page, busy)
    assert "TypeError" in page.evaluate("try { document.body.innerHTML = '<b>x</b>' } catch (error) { String(error) }")


def test_one_word_of_6000_letters_does_not_widen_a_phone(walk):
    page = walk
    page.set_viewport_size({"width": 390, "height": 844})
    go_to(page, "#/messages")
    page.fill("#filter", "xxxxxxxx")
    page.wait_for_selector(".message-row:has-text('xxxxxxxx')")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.click(".message-row")
    page.wait_for_selector("#panel .body")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    go_to(page, "#/messages/mallory-2/spark")
    page.wait_for_selector(".bubble >> text=xxxxxxxx")
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_an_address_that_leads_nowhere_is_no_error(walk):
    page = walk
    go_to(page, "#/constructor")
    page.wait_for_selector("main > div")
    for path in ("#/__proto__", "#/%E0%A4%A", "#/<img src=x>", "#/messages/a b/c", "#/messages?id=zz"):
        go_to(page, path)
        page.wait_for_selector("main > div")
