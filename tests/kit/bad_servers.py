"""A server on loopback that answers from a script: what a bus, a proxy or a broken thing in between might say."""
import contextlib
import json
import socket
import struct
import threading
import time
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

DATE = "Fri, 20 Nov 2026 19:39:56 GMT"
NOON = 1795203596  # the same instant, s since 1970
DRIP_SECONDS = 15  # how long "for ever" lasts here: far longer than the deadline of a client in a hurry


class Asked(NamedTuple):
    method: str
    target: str
    headers: dict
    body: bytes

    @property
    def query(self):
        return {field: values if field == "to" else values[0] for field, values in self.fields.items()}

    @property
    def fields(self):
        return parse_qs(urlsplit(self.target).query, keep_blank_values=True)

    @property
    def json(self):
        return json.loads(self.body)


def page(status, text, *headers, length=None):
    """An HTTP answer, with a length that may be a lie."""
    body = text if isinstance(text, bytes) else text.encode()
    head = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(body) if length is None else length}", *headers]
    return "\r\n".join([*head, "", ""]).encode() + body


def answer(value, *headers, status=200):
    return page(status, json.dumps(value), "Content-Type: application/json", *headers)


def stored(**fields):
    return answer({"ok": True, "ts": NOON + 0.5, "id": "652a7c1b2f3e1", "channel": "default", "bus": "b1", **fields})


def mail(*messages, now=f"{NOON}.900000", bus="b1", headers=(), **fields):
    """A bus's answer to a poll. Numbers are put in as text, because json.dumps would round them."""
    members = {"more": False, **({"bus": bus} if bus else {}), **fields}
    text = f'{{"messages": [{", ".join(messages)}], "now": {now}, {json.dumps(members)[1:]}'
    return page(200, text, "Content-Type: application/json", *headers)


def message(n, msg="hi", **fields):
    """The n-th message of the day, as the wire has it."""
    fields = {"id": f"{n:x}", "from": "spark", "to": "dell", "channel": "default", "msg": msg, **fields}
    return f'{{"ts": {NOON}.{n:06d}, {json.dumps(fields)[1:]}'


def silence(sock):
    """Accept, and never answer."""
    with contextlib.suppress(OSError):
        sock.recv(1)


def reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def drip(start, forever=b"x"):
    """A byte now and then, so that no single read ever times out."""

    def behave(sock):
        end = time.monotonic() + DRIP_SECONDS
        with contextlib.suppress(OSError):
            sock.sendall(start)
            while time.monotonic() < end:
                sock.sendall(forever)
                time.sleep(0.02)

    return behave


HTML = "<html><body>Please log in</body></html>"
JSON_TYPE = "Content-Type: application/json"
# What must never be taken for an answer of the bus, to a send or to a poll. Each says `ok` and `messages` if it can.
WHOLE = json.dumps({"ok": True, "ts": NOON, "messages": [], "now": NOON, "bus": "b1"})
FAULTS = {
    "an empty reply": b"",
    "a reset": reset,
    "half a status line": b"HTTP/1.1 20",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Len",
    "half a body": page(200, WHOLE[:30], length=len(WHOLE)),
    "a body shorter than its length": page(200, WHOLE, length=len(WHOLE) + 9),
    "a length shorter than its body": page(200, WHOLE, length=len(WHOLE) - 9),
    "a chunk that is cut": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n60\r\n" + WHOLE[:30].encode(),
    "chunks without an end": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n"
    % (len(WHOLE), WHOLE.encode()),
    "a chunk of no size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" + WHOLE.encode(),
    "a chunk of negative size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n" + WHOLE.encode(),
    "no head at all": WHOLE.encode(),
    "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n",
    "a header without an end": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70000,
    "101 headers": page(200, WHOLE, *(f"X-{n}: x" for n in range(101))),
    "early hints and no answer": b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n",
    "a switch of protocols": page(101, ""),
    "an HTML page with 200": page(200, HTML, "Content-Type: text/html"),
    "an HTML page that says it is JSON": page(200, HTML, JSON_TYPE),
    "an empty page with 200": page(200, ""),
    "201 with the right JSON": page(201, WHOLE, JSON_TYPE),
    "204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "206 with the right JSON": page(206, WHOLE, JSON_TYPE),
    "304": b"HTTP/1.1 304 Not Modified\r\n\r\n",
    "400 as HTML": page(400, HTML),
    "403 from a firewall": page(403, HTML),
    "404 from a proxy": page(404, HTML),
    "407 from a proxy": page(407, HTML),
    "400 with another JSON": answer({"message": "no"}, status=400),
    "400 with an error that is no text": answer({"error": {"code": 7}}, status=400),
    "408 from the bus": answer({"error": "too slow"}, status=408),
    "425 from the bus": answer({"error": "too early"}, status=425),
    "429 from the bus": answer({"error": "too many"}, "Retry-After: 0", status=429),
    "500 from the bus": answer({"error": "failed"}, status=500),
    "502 from a proxy": page(502, HTML),
    "503 from the bus": answer({"error": "draining"}, "Retry-After: 0", status=503),
    "503 until a date": page(503, HTML, f"Retry-After: {DATE}"),
    "504 from a proxy": page(504, HTML),
    "507 from the bus": answer({"error": "disk full"}, status=507),
    "524 from a proxy": page(524, HTML),
    "JSON null": answer(None),
    "a JSON list": answer([True]),
    "JSON of something else": answer({"status": "ok"}),
    "ok that is not true": page(200, WHOLE.replace("true", '"true"').replace("[]", "{}"), JSON_TYPE),
    "a time that is no number": page(200, WHOLE.replace(str(NOON), "NaN"), JSON_TYPE),
    "a time that is missing": answer({"ok": True, "messages": []}),
    "JSON in Latin-1": page(200, WHOLE[:-1].encode() + b', "x": "\xe4"}', JSON_TYPE),
    "JSON nested too deep": page(200, WHOLE[:-1] + ', "x": ' + "[" * 100000 + "]" * 100000 + "}", JSON_TYPE),
    "gzip that nobody asked for": page(200, b"\x1f\x8b\x08\x00" + b"\x00" * 60, JSON_TYPE, "Content-Encoding: gzip"),
    "silence": silence,
    "a head that drips": drip(b"HTTP/1.1 200 OK\r\n", b"X: x\r\n"),
    "a body that drips": drip(page(200, WHOLE, length=100000), b" "),
    "a body that drips without a length": drip(b"HTTP/1.1 200 OK\r\n\r\n" + WHOLE[:-1].encode(), b" "),
    "100 Continue for ever": drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
}


def full(messages):
    return page(200, b'{"messages": [' + messages + b'], "now": 1.5, "bus": "b1"}', JSON_TYPE)


WORST = 4 << 20  # bytes of an answer that a hook just takes (bus_hook.ANSWER_BYTES), of what takes a parser longest
HUGE = {
    "far more than a hook takes": full(b"[[]]," * (6 << 20) + b"1"),
    "lists of lists": full(b"[[]]," * (WORST // 5 - 99) + b"1"),
    "numbers": full(b"1.5," * (WORST // 4 - 99) + b"1"),
    "a word": full(b'{"ts": 1.5, "msg": "' + b"\\u202e" * (WORST // 6 - 99) + b'"}'),
}


class Scripted:
    """Answers the n-th request with the n-th of `script`: bytes, or a function of the socket. The last one repeats.

    `/healthz` is not part of the script: it says that the bus is `bus` (None: a bus of the old contract), or `health`.
    `asked` has all that was asked, `polls` what was asked of /recv. `left` has the requests with which readers leave;
    they are not in `asked`, nor in the script. With `path`, it listens on that Unix socket.
    """

    def __init__(self, *script, bus="b1", health=None, path=None):
        self.script = list(script)
        self.health = health
        if health is None:
            self.health = answer({"ok": True, "now": NOON + 0.25, **({"bus": bus} if bus else {})})
        self.asked, self.left = [], []
        if path:
            self.listener = socket.socket(socket.AF_UNIX)
            self.listener.bind(str(path))
            self.listener.listen(64)
        else:
            self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"unix:{path}" if path else f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def polls(self):
        return [asked for asked in self.asked if asked.target.startswith("/recv")]

    def _serve(self):
        with contextlib.suppress(OSError):  # until the listener is closed
            while True:
                threading.Thread(target=self._answer, args=[self.listener.accept()[0]], daemon=True).start()

    def _answer(self, sock):
        with sock, contextlib.suppress(ConnectionError):
            head, _, body = self._read(sock, b"", lambda data: b"\r\n\r\n" in data).partition(b"\r\n\r\n")
            if not head:
                return
            first, *lines = head.decode("latin-1").split("\r\n")
            headers = {key.lower(): value for key, _, value in (line.partition(": ") for line in lines)}
            body = self._read(sock, body, lambda data: len(data) >= int(headers.get("content-length", 0)))
            asked = Asked(*first.split(" ")[:2], headers, body)
            leaves = "&leave=true&" in asked.target
            (self.left if leaves else self.asked).append(asked)
            if leaves or asked.target.endswith("/healthz"):
                behave = self.health
            else:
                behave = self.script.pop(0) if len(self.script) > 1 else self.script[0]
            sock.sendall(behave) if isinstance(behave, bytes) else behave(sock)

    def _read(self, sock, data, enough):
        while not enough(data):
            part = sock.recv(65536)
            if not part:
                return b""
            data += part
        return data

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):  # else its thread waits on for a connection, and gets one
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
