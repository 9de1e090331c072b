"""The page in a real Chromium: a server that ends, another database, six tabs, a proxy before the bus."""
import http.client
import http.server
import threading
import time

from tests.kit.page import COVERED, IN_CHROMIUM, opened, send, show, texts
from tests.kit.processes import Server, in_time, wait_until

pytestmark = IN_CHROMIUM


def test_a_server_that_ends_is_said_and_what_was_known_stays(tmp_path, page):
    with Server(tmp_path / "bus.db") as bus:
        send(bus, "ann", "bob", "before")
        show(page, bus, "#/messages")
        page.wait_for_selector("text=before")
        began = time.monotonic()
        bus.kill()
        page.wait_for_selector("#banner:has-text('out of reach')")
        assert time.monotonic() - began < in_time(2)
        page.focus("#again")
        countdown = page.inner_text("#countdown")
        page.wait_for_function("before => document.querySelector('#countdown').textContent !== before", arg=countdown)
        assert page.evaluate("document.activeElement.id") == "again", "who uses the keyboard can press it"
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


def test_six_tabs_leave_room_to_send(near, browser):
    """A browser has six connections to a bus for all its tabs, so a tab that nobody sees must not hold one."""
    with opened(browser) as tab:
        show(tab, near)
        for _ in range(5):
            tab.evaluate(COVERED)
            tab = show(tab.context.new_page(), near)
        began = time.monotonic()
        # As the page itself sends: Chromium has other connections for a fetch with cookies.
        tab.evaluate("import('./follow.js').then(bus => bus.send({ from: 'tab', to: 'bob', msg: 'from the sixth' }))")
        assert time.monotonic() - began < in_time(1)
        wait_until(lambda: b"from the sixth" in near.get("/log"))


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


def test_under_a_path_of_a_proxy_all_works(near, page):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Under) as proxy:
        proxy.bus = near
        threading.Thread(target=proxy.serve_forever, args=[0.02], daemon=True).start()
        send(near, "ann", "bob", "through the proxy")
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
