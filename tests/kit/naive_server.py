"""A bus as it is often written: the control of test_bus.py and of tests/faults/history.py. Never trust it with mail.

    python3 tests/kit/naive_server.py [PORT]

It speaks the first contract and a little more, with the faults that such servers have; each has a name and can be left
out. Others a client does not see at once: nothing is on disk, and a parked reader is a thread that looks and sleeps.
"""

import collections
import http.server
import itertools
import json
import pathlib
import sys
import threading
import time
from urllib.parse import parse_qsl, urlsplit

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent.parent))
from bus_server import Refused, name, parse_json  # noqa: E402
from tests.kit.serving import Serving  # noqa: E402

HOLD = 25  # s
LOOK = 0.01  # s that a parked reader sleeps; in the field up to a second
BUSY = 0.002  # s between one step and the next, about: a machine that has more to do; in the field also much longer
OVERTAKEN = 0.2  # s at most that a message waits to be overtaken
KEPT = 100  # messages for a name; in the field 1,000
FAULTS = frozenset({
    "now is the wall clock", "a time is older than its place", "reading takes away", "the oldest are evicted",
    "the last one comes again",
    "a cursor ahead is left there", "max is not known", "wait is not known", "there is one channel",
    "a broadcast comes back", "a retry is stored again", "anything is a name", "any JSON is good",
    "members may be missing", "any page may send",
})  # fmt: skip


class Naive(Serving, http.server.ThreadingHTTPServer):
    """It serves from when it is entered until it is left. The mail is in lists, in memory."""

    daemon_threads, request_queue_size = True, 128

    def __init__(self, faults=FAULTS, port=0):
        super().__init__(("127.0.0.1", port), Request)
        self.faults, self.url = faults, f"http://127.0.0.1:{self.server_port}"
        kept = KEPT if "the oldest are evicted" in faults else None
        self.mailboxes = collections.defaultdict(lambda: collections.deque(maxlen=kept))
        self.keys, self.last, self.lock = {}, 0, threading.Lock()
        self.begun, self.seen = itertools.count(), 0  # messages; the newest tick when a reader looked last

    def append(self, channel, message, key):
        """The tick of a message, and whether it has it from an earlier send."""
        early = time.time_ns() // 1000
        if "a time is older than its place" in self.faults:
            self.wait_for_a_look()
        with self.lock:
            if key in self.keys and "a retry is stored again" not in self.faults:
                first, tick = self.keys[key]
                if first != message:
                    raise Refused(409, "the key was used for another message")
                return tick, True
            tick = early if "a time is older than its place" in self.faults else max(early, self.last + 1)
            self.last = max(tick, self.last)
            self.mailboxes[channel, message["to"]].append({**message, "ts": tick / 1e6})
            if key:
                self.keys[key] = message, tick
            return tick, False

    def wait_for_a_look(self):
        """Every tenth message stands still until another one is in its place and a reader has looked, or OVERTAKEN."""
        if next(self.begun) % 10:
            return
        last, deadline = self.last, time.monotonic() + OVERTAKEN
        while self.seen <= last and time.monotonic() < deadline:
            time.sleep(BUSY)

    def above(self, channel, names, since, limit):
        """The messages for a reader, and its next cursor."""
        start = since - 1e-6 * ("the last one comes again" in self.faults)
        with self.lock:
            boxes = [self.mailboxes[channel, each] for each in dict.fromkeys([*names, "all"])]
            found = [each for box in boxes for each in box if each["ts"] > start]
            if "a broadcast comes back" not in self.faults:
                found = [each for each in found if each["to"] != "all" or each["from"] != names[0]]
            found = sorted(found, key=lambda each: each["ts"])[:limit]
            if "reading takes away" in self.faults:
                for box in boxes:
                    left = [each for each in box if each not in found]
                    box.clear()
                    box.extend(left)
            if "a cursor ahead is left there" not in self.faults:
                self.last = max(self.last, round(since * 1e6))
            now = found[-1]["ts"] if len(found) == limit else max(since, self.last / 1e6)
            self.seen = self.last
        if "now is the wall clock" in self.faults:
            time.sleep(BUSY)
            now = time.time()
        return found, now


class Request(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({"/recv": self.recv, "/inbox": self.inbox}.get(urlsplit(self.path).path, self.health))

    def do_POST(self):
        self.answer(self.send)

    def answer(self, endpoint):
        here = f"http://{self.headers['Host']}"
        foreign = self.headers.get("Origin", here) != here or self.headers.get("Sec-Fetch-Site", "").endswith("-site")
        try:
            if foreign and "any page may send" not in self.server.faults:
                raise Refused(403, "pages of other sites may not use this bus")
            status, said = 200, endpoint()
        except Refused as refused:
            status, said = refused.status, {"error": refused.sentence}
        except ValueError as error:
            status, said = 400, {"error": f"{error}; times are in seconds"}
        text = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def has(self, fault):
        return fault in self.server.faults

    def name(self, fields, member, default=None):
        value = fields.get(member, default)
        return value if self.has("anything is a name") else name(value, member)

    def channel(self, fields):
        return "default" if self.has("there is one channel") else self.name(fields, "channel", "default")

    def send(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        fields = json.loads(body) if self.has("any JSON is good") else parse_json(body)
        if self.has("members may be missing"):
            fields = {"from": "nobody", "to": "nobody", "msg": "", **(fields if isinstance(fields, dict) else {})}
        elif not isinstance(fields, dict) or not isinstance(fields.get("msg"), str):
            raise Refused(400, "a message has from, to and msg")
        key, channel = fields.pop("key", None) or self.headers["Idempotency-Key"], self.channel(fields)
        signed = self.name(fields, "from"), self.name(fields, "to"), channel, key
        tick, again = self.server.append(channel, fields, key and signed)
        return {"ok": True, "ts": tick / 1e6, "channel": channel, "id": f"{tick:x}", "duplicate": again}

    def recv(self):
        pairs = parse_qsl(urlsplit(self.path).query, keep_blank_values=True)
        query = dict(pairs)
        names = [self.name({field: value}, "to") for field, value in pairs if field == "to"]
        since, channel = float(query.get("since", 0)), self.channel(query)
        if since > time.time() + 300 and not self.has("a cursor ahead is left there"):
            raise ValueError("since is too far ahead")
        limit = None if self.has("max is not known") else min(max(int(query.get("max", 100)), 1), 1000)
        block, hold = query.get("block", "true" if "wait" in query else "false"), HOLD
        if self.has("wait is not known"):
            block = query.get("block")
        elif block not in ("true", "false"):
            raise ValueError("block is true or false")
        else:
            hold = float(query.get("wait", HOLD))
        until = time.monotonic() + hold * (block == "true")
        while True:
            found, now = self.server.above(channel, names, since, limit)
            if found or time.monotonic() >= until:
                return {"messages": found, "now": now}
            time.sleep(LOOK)

    def inbox(self):
        recipients = collections.defaultdict(dict)
        for (channel, own), box in list(self.server.mailboxes.items()):
            recipients[channel][own] = len(box)
        return {"recipients": recipients, "now": self.server.last / 1e6}

    def health(self):
        return {"ok": True, "now": self.server.last / 1e6}

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    with Naive(port=int(sys.argv[1]) if sys.argv[1:] else 0) as bus:
        print(f"listening on {bus.url}", flush=True)
        threading.Event().wait()
