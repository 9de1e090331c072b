"""A peer: the bus that is widely copied. A thread for each connection, lists in memory, a look every half second."""
import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

HOLD = 600  # s; longer than a thousand threads take to begin on a slow machine
mailboxes = {}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        message = {**json.loads(self.rfile.read(int(self.headers["Content-Length"]))), "ts": time.time()}
        mailboxes.setdefault(message["to"], []).append(message)
        self.answer({"ok": True, "ts": message["ts"]})

    def do_GET(self):
        query = parse_qs(urlsplit(self.path).query)
        name, since, end = query["to"][0], float(query["since"][0]), time.time() + HOLD
        while not (fresh := self.fresh(name, since)) and time.time() < end:
            time.sleep(0.5)
        self.answer({"messages": fresh, "now": time.time()})

    def fresh(self, name, since):
        return [message for message in mailboxes.get(name, [])[-100:] if message["ts"] > since]

    def answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 4096
    daemon_threads = True


Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
