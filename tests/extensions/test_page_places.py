"""The page in a real Chromium: the places of extensions, those of the bus and one of a test."""
import json

from bus_extensions.page import FOLDER
from tests.core.test_identity import ask
from tests.kit.near import Near
from tests.kit.notes import NOTHING, extended
from tests.kit.page import IN_CHROMIUM, opens_a_message, send, show, texts

pytestmark = IN_CHROMIUM


def test_an_extension_has_a_place_of_its_own_if_the_bus_has_the_extension(noted, hurried):
    page = hurried
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
    with Near(tmp_path / "bus.db") as bus:
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


def test_what_an_operator_redacts_is_shown_so_at_once_wherever_it_was(hurried, tmp_path):
    page = hurried
    gone = "an operator has redacted this message"
    with Near(tmp_path / "bus.db") as bus:
        send(bus, "ann", ["bob", "carl"], "the password is swordfish")  # its copies are redacted too
        send(bus, "ann", "maria", "and mine is hunter2")
        for view, row, secret in (
            ("#/messages", ".message-row:has-text('swordfish'):has-text('carl')", "swordfish"),
            ("#/mail", ".bubble:has-text('hunter2') a", "hunter2"),
        ):
            show(page, bus, view)
            if view == "#/mail":
                page.fill("#mail-name", "maria")
                page.click("button.main:has-text('Read my mail here')")
            page.click(row)
            page.click("#panel button:has-text('Redact')")
            page.wait_for_selector("#panel >> text=Press Redact again to do it.")
            page.click("#panel button:has-text('Redact')")
            page.wait_for_selector("#panel >> text=/Redacted. Fetched by (nobody|maria); revoke the secret/")
            page.wait_for_selector(f"#panel .body >> text={gone}")
            page.wait_for_selector(f"main >> text={gone}")
            assert secret not in page.content()
        page.goto(f"{bus.url}/ui/#/messages/ann/carl")
        page.wait_for_selector(f".bubble >> text={gone}")
        page.goto(f"{bus.url}/ui/#/messages")
        page.wait_for_selector(f".message-row >> text={gone}")
        assert "swordfish" not in page.content() and "hunter2" not in page.content()


def test_who_was_asked_whether_to_redact_is_not_asked_again_when_the_message_is_drawn_anew(page, tmp_path):
    """It is, when its thread has come: on a slow bus the second press asked once more."""
    with Near(tmp_path / "bus.db") as bus:
        send(bus, "ann", "bob", "the password is swordfish")
        held = []
        page.route("**/thread/*", lambda route: held.append(route))  # playwright takes no method of a list
        show(page, bus, "#/messages")
        page.click(".message-row:has-text('swordfish')")
        page.click("#panel button:has-text('Redact')")
        page.wait_for_selector("#panel >> text=Press Redact again to do it.")
        page.evaluate("document.querySelector('#panel .buttons').isOld = true")
        held.pop().continue_()
        page.wait_for_function("() => !document.querySelector('#panel .buttons').isOld")
        page.click("#panel button:has-text('Redact')")
        page.wait_for_selector("#panel >> text=/Redacted. Fetched by nobody/")


def test_without_such_extensions_there_is_no_place_for_them(tmp_path, page):
    with extended(tmp_path) as bus:
        assert page.request.get(f"{bus.url}/ui/extensions.js").text() == ""
        show(page, bus, "#/more/gone")
        page.wait_for_selector("main code")
        assert page.locator("nav a").count() == 4


def test_an_extension_may_bear_the_name_of_a_module_of_the_page(tmp_path, page):
    with extended(tmp_path, mail=(NOTHING, (FOLDER / "mail.js").read_text())) as bus:
        show(page, bus)
        assert page.locator("nav a").count() == 4


def test_what_is_sent_later_is_listed_and_taken_back(near, hurried):
    page = hurried
    message = {"from": "ann", "to": "bob", "msg": "remember the milk"}
    assert ask(near, "POST", "/later", {"cron": "0 9 * * 1-5", "message": message})[0] == 200
    assert ask(near, "POST", "/later", {"after": 900, "message": {**message, "to": ["bob", "carl"]}})[0] == 200
    show(page, near, "#/more/later")
    page.wait_for_selector("tr:has-text('0 9 * * 1-5 (UTC)')")
    page.click("tr:has-text('bob, carl') button")
    page.wait_for_selector("text=The message is not sent then. Press Take back again to do it.")
    page.click("tr:has-text('bob, carl') button")
    page.wait_for_selector("text=taken back: the message to bob, carl")
    page.wait_for_selector("tr:has-text('bob, carl')", state="detached")
    assert [each["message"]["to"] for each in ask(near, "GET", "/later")[1]["schedules"]] == ["bob"]


def test_the_rules_of_notices_are_listed(tmp_path, page):
    rules = tmp_path / "rules.json"
    rule = {"rule": "lead-waits", "when": "unread", "to": "lead", "template": "ntfy", "url": "https://ntfy.sh/SECRET"}
    rules.write_text(json.dumps({"hosts": ["ntfy.sh"], "rules": [rule]}))
    rules.chmod(0o600)
    with Near(tmp_path / "bus.db", "--notify", str(rules)) as bus:
        show(page, bus, "#/more/notify")
        page.wait_for_selector("tr:has-text('unread: lead on default')")
        assert texts(page, "td") == ["lead-waits", "unread: lead on default", "never", "0 sent, 0 failed"]
        assert "SECRET" not in page.content()


def test_reservations_are_shown_and_a_person_may_release_one(near, hurried):
    page = hurried
    hostile = "<img src=x onerror='window.pwned=1'>"
    for holder, why in (("dell", hostile), ("nano", "T2")):
        body = {"from": holder, "names": [f"src/{holder}/*", "<b>"], "why": why, "shared": True}
        assert ask(near, "POST", "/lock", body)[0] == 200
    show(page, near, "#/more/locks")
    page.wait_for_selector("tr:has-text('dell')")
    rows = [text for text in texts(page, "tbody tr") if "src/" in text]
    assert len(rows) == 2 and "<b> src/dell/* (shared)" in rows[0] and hostile in rows[0]
    assert not page.evaluate("window.pwned")
    page.click("tr:has-text('dell') button")
    page.wait_for_selector("text=The holder may be in the middle of a change.")
    page.click("tr:has-text('dell') button")
    page.wait_for_selector("tr:has-text('dell')", state="detached")
    assert [each["holder"] for each in json.loads(near.get("/locks"))["locks"]] == ["nano"]


def test_how_long_a_reservation_holds_is_counted_on_the_clock_of_the_bus(near, page):
    page.add_init_script("const own = Date.now; Date.now = () => own() + 3600e3;")  # this machine's is an hour ahead
    body = {"from": "dell", "names": ["src/*"], "ttl": 7200}
    assert ask(near, "POST", "/lock", body)[0] == 200
    show(page, near, "#/more/locks")
    page.wait_for_selector("tr:has-text('src/*') >> text=/^2 h, until/")
