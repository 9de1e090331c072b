"""The page in a real Chromium: who gets it, what each token shows, and what pages of strangers get."""
import http.server
import subprocess
import sys
import threading

from tests.core.test_identity import ask
from tests.kit.page import IN_CHROMIUM, show, texts
from tests.kit.peers import command, invite
from tests.kit.processes import PATIENCE, ROOT, Server, wait_until

pytestmark = IN_CHROMIUM


def test_a_browser_is_led_to_the_page_and_curl_to_the_help(busy, page):
    page.goto(busy.url)
    assert page.url == f"{busy.url}/ui/"
    assert busy.get("/").startswith(b"agent-bus")


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
