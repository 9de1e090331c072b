"""The page in a real Chromium: who gets it, what each token shows, and what pages of strangers get."""
import http.server
import json
import subprocess
import sys
import threading

from tests.core.test_identity import ask
from tests.kit.near import Near
from tests.kit.page import IN_CHROMIUM, show, texts
from tests.kit.peers import command, invite, mint, set_expires, set_revoked
from tests.kit.processes import PATIENCE, ROOT, wait_until

pytestmark = IN_CHROMIUM


def test_a_browser_is_led_to_the_page_and_curl_to_the_help(busy, page):
    page.goto(busy.url)
    assert page.url == f"{busy.url}/ui/"
    assert busy.get("/").startswith(b"agent-bus")


# Where the page is when it asks
PLACES = """const asks = window.fetch; window.places = [];
window.fetch = (...all) => { window.places.push(location.href); return asks(...all); };"""


def test_the_token_of_a_link_is_nowhere_but_in_this_tab(closed, page):
    token, asked = closed.tokens["maria"], []
    page.on("request", lambda request: asked.append(request.url))
    page.add_init_script(PLACES)
    show(page, closed, f"#token={token}")
    assert token not in page.url and not any(token in url for url in asked)
    assert set(page.evaluate("window.places")) == {f"{closed.url}/ui/#/"}, "the address has it when something is asked"
    assert page.evaluate("[JSON.stringify(localStorage), document.cookie, history.length]") == ["{}", "", 2]
    page.wait_for_selector("text=for bob")
    page.keyboard.press("2")
    page.wait_for_selector(".message-row")
    page.go_back()
    assert page.url == f"{closed.url}/ui/#/"
    page.go_forward()
    assert page.url == f"{closed.url}/ui/#/messages"


def test_a_link_that_is_pasted_where_the_page_is_open_opens_it(closed, page):
    page.goto(f"{closed.url}/ui/")
    page.wait_for_selector("#token")
    page.goto(f"{closed.url}/ui/#token={closed.tokens['maria']}")  # the same page: nothing is loaded anew
    page.wait_for_selector("#live.good")
    page.wait_for_selector("text=for bob")
    assert page.url == f"{closed.url}/ui/#/"


def test_a_link_with_another_token_asks_before_it_takes_the_place_of_that_of_the_tab(closed, page):
    maria, ann = closed.tokens["maria"], closed.tokens["ann"]
    show(page, closed, f"#token={maria}")
    for answer, whose in (("dismiss", maria), ("accept", ann)):
        page.once("dialog", lambda dialog, answer=answer: getattr(dialog, answer)())
        page.goto("about:blank")
        show(page, closed, f"#token={ann}")
        assert page.evaluate("sessionStorage.getItem('agent-bus token')") == whose and ann not in page.url
    assert len(page.errors) == 2 and all("another token" in asked for asked in page.errors)
    page.errors.clear()


def test_a_wrong_token_is_said_and_the_field_is_empty(closed, page):
    page.goto(f"{closed.url}/ui/")
    page.fill("#token", "abt_00000000_wrong")
    page.click("text=Open")
    page.wait_for_selector("text=does not know this token")
    assert page.input_value("#token") == "" and not page.locator("nav").is_visible()
    page.fill("#token", closed.tokens["maria"])
    page.click("text=Open")
    page.wait_for_selector("#live.good")


def test_an_ordinary_token_shows_its_own_mail_and_says_so(closed, page):
    show(page, closed, f"#token={closed.tokens['ann']}")
    page.wait_for_selector("text=You see who is there, and the mail of ann.")
    page.wait_for_selector("text=1 message for you")
    main = page.inner_text("main")
    assert "Messages per minute" not in main
    assert "with mail for you" in main and "does not hear" not in main, "one's own mail is no trouble of an agent"
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


def test_a_revoked_token_leads_to_the_login_while_the_page_is_open(tmp_path, hurried):
    page = hurried
    tokens = mint(tmp_path / "bus.db", maria=["--operator"])
    with Near(tmp_path / "bus.db") as bus:
        show(page, bus, f"#token={tokens['maria']}")
        set_revoked(bus, "maria")
        page.wait_for_selector("text=This bus wants a token")
        page.wait_for_selector("text=The bus does not know this token.")
        assert page.evaluate("sessionStorage.length") == 0


def test_the_token_of_a_link_ends_after_12_hours_or_when_it_was_said(tmp_path, hurried):
    """A browser keeps links in its history."""
    page = hurried
    with Near(tmp_path / "bus.db") as bus:
        for name, options, lasts in (("erik", [], 12 * 3600), ("maria", ["--expires", "30m"], 1800)):
            token = invite(bus, name, "--operator", "--page", *options)
            [row] = [row for row in map(json.loads, (tmp_path / "bus.db.tokens").open()) if row["name"] == name]
            assert abs(row["expires"] - row["made"] - lasts) <= 1
        wait_until(lambda: ask(bus, "GET", "/agents")[0] == 401)
        show(page, bus, f"#token={token}")
        set_expires(bus, "maria", 1)
        page.wait_for_selector("text=This bus wants a token")


class Stranger(http.server.BaseHTTPRequestHandler):
    """A page of another site."""

    def do_GET(self):
        body = b"""<!doctype html><a href=BUS/>to the bus</a><iframe src=BUS/ui/></iframe><iframe name=answers></iframe>
            <form action="BUS/send?from=mallory&amp;to=bob" method=post target=answers><button>Send</button></form>"""
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
        threading.Thread(target=site.serve_forever, args=[0.02], daemon=True).start()
        with page.expect_response("**/ui/") as framed:
            page.goto(f"http://localhost:{site.server_port}/")
        assert framed.value.status == 403
        fetched = page.evaluate("url => fetch(url).then(answer => answer.text()).catch(String)", f"{busy.url}/log")
        assert fetched == "TypeError: Failed to fetch"
        with page.expect_response("**/send?*") as posted:
            page.click("button")
        assert posted.value.status == 403 and b"mallory" not in busy.get("/log?to=bob")
        page.click("a")
        page.wait_for_selector("#live.good")
        assert page.url == f"{busy.url}/ui/"
        site.shutdown()


def test_no_page_frames_it_where_a_browser_does_not_say_which_page_asks(tmp_path, page):
    """No browser says it to an http://ADDRESS other than 127.0.0.1: the bus gives the page, and its headers forbid."""
    site = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stranger)
    with Near(tmp_path / "bus.db", "--allow-host", "evil.example") as bus, site:
        site.bus = f"http://evil.example:{bus.port}".encode()
        threading.Thread(target=site.serve_forever, args=[0.02], daemon=True).start()
        with page.expect_response("**/ui/") as answer:
            page.goto(f"http://localhost:{site.server_port}/")
        assert answer.value.status == 200 and "sec-fetch-site" not in answer.value.request.all_headers()
        wait_until(lambda: page.evaluate("true") and page.frames[1].url.startswith("chrome-error:"))
        site.shutdown()


def test_a_name_of_a_stranger_for_the_address_of_an_open_bus_gets_nothing(busy, page):
    answer = page.goto(f"http://evil.example:{busy.port}/ui/")
    assert answer.status == 403


def test_a_connection_that_is_not_encrypted_is_said(tmp_path, page):
    with Near(tmp_path / "bus.db", "--allow-host", "evil.example") as bus:
        page.goto(f"http://evil.example:{bus.port}/ui/")
        page.wait_for_selector("text=This connection is not encrypted")
        page.goto(f"{bus.url}/ui/")
        page.wait_for_selector("#live.good")
        assert "not encrypted" not in page.inner_text("body")


def test_a_link_for_a_person_is_printed_and_opens_the_page(closed, page):
    printed = command(closed, "invite", "erik", "--operator", "--page", "--expires", "12h", "--yes")
    [link] = [line.strip() for line in printed.splitlines() if "/ui/#token=" in line]
    page.goto(link)
    page.wait_for_selector("#live.good")
    page.wait_for_selector("text=for bob")
    program = [sys.executable, ROOT / "tools/agent_bus.py", "open"]
    env = {"PATH": "", "AGENT_BUS_URL": closed.url, "AGENT_BUS_TOKEN": closed.tokens["ann"]}
    done = subprocess.run(program, env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout == f"{closed.url}/ui/#token={closed.tokens['ann']}\n", done
