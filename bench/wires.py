"""What each server speaks, as bytes, for the clients of our own in `load` and `crowd`.

A wire has no state. `hello` is what a connection sends first, a request each; `send`, `wait`, and `claim` with
`acknowledge` are the requests that are measured; `end` says where the first whole answer in a buffer ends, 0 when it is
not whole, and raises Refused for one that says no; `cursor` is where the next wait begins; `acknowledge` settles the
job in the answer to a claim. `keeps` says whether a connection outlives an answer.
"""
from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable


class Refused(Exception):
    """The server did not do what was asked; what was measured then would be something else."""


SIZE = 84  # bytes of a message, as JSON


# wrk.lua puts another idempotency key in place of each, as long as they are: one that begins with the time, as that of
# bus_send.py does, and a random one.
TIMED_KEY, RANDOM_KEY = "a-key-that-begins-with-the-time.", "a-random-key...................."


def message(to: str, sender: str = "spark", key: str = "") -> bytes:
    """The message that everybody sends, padded to the same size whatever the names are. A key is not part of it."""
    fields = {"from": sender, "to": to, "msg": ""}
    fields["msg"] = "T1 done, 4/4 are honeypots; T2 next.".ljust(SIZE - len(json.dumps(fields)), ".")
    body = json.dumps(fields)[: SIZE - 2] + '"}'
    assert len(body) == SIZE == len(json.dumps(json.loads(body))), body
    return (body[:-1] + f', "key": "{key}"}}' if key else body).encode()


def batch(to: Iterable[str]) -> bytes:
    """An array: a message for each of these names."""
    return b"[" + b", ".join(map(message, to)) + b"]"


class Wire:
    keeps = True

    def hello(self, number: int) -> list[bytes]:
        return []


class Http(Wire):
    """The wire of agent-bus, and of whoever has the same paths. `token` goes into each head."""

    def __init__(self, port: int, token: str = "", keeps: bool = True) -> None:
        self.keeps = keeps
        self.head = f"Host: 127.0.0.1:{port}\r\n" + (f"Authorization: Bearer {token}\r\n" if token else "")

    def post(self, path: str, body: bytes) -> bytes:
        return f"POST {path} HTTP/1.1\r\n{self.head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    def get(self, path: str) -> bytes:
        return f"GET {path} HTTP/1.1\r\n{self.head}\r\n".encode()

    def send(self, to: str, number: int = 0) -> bytes:
        return self.post("/send", message(to))

    def wait(self, name: str, cursor: str) -> bytes:
        return self.get(f"/recv?to={name}&since={cursor}&block=true&wait=60")

    def claim(self, queue: str) -> bytes:
        return self.post("/claim", json.dumps({"to": queue, "wait": 0}).encode())

    def acknowledge(self, answer: bytes) -> bytes:
        job = re.search(rb'"id": "(\w+)".*"lease": "(\w+)"', answer)
        if not job:
            raise Refused(f"no job: {answer.decode(errors='replace')}")
        return self.post("/ack", b'{"id": "%s", "lease": "%s"}' % job.groups())

    def end(self, data: bytes | bytearray) -> int:
        head = data.find(b"\r\n\r\n")
        if head < 0:
            return 0
        if not data.startswith((b"HTTP/1.1 20", b"HTTP/1.0 20")):
            raise Refused(bytes(data).decode(errors="replace"))
        length = re.search(rb"\r\ncontent-length: *(\d+)", bytes(data[:head]).lower())
        end = head + 4 + int(length[1] if length else 0)
        return end if len(data) >= end else 0

    def cursor(self, answer: bytes) -> str:
        return re.findall(rb'"now": ([0-9.]+)', answer)[-1].decode()


class Nchan(Http):
    """Publishing and long-polling as nchan has it: a channel for each name."""

    def send(self, to: str, number: int = 0) -> bytes:
        return self.post(f"/pub/{to}", message(to))

    def wait(self, name: str, cursor: str) -> bytes:
        return self.get(f"/sub/{name}")

    def cursor(self, answer: bytes) -> str:
        return ""


class Redis(Wire):
    """RESP, with a stream for each name."""

    def command(self, *words: str | bytes) -> bytes:
        parts = [word.encode() if isinstance(word, str) else word for word in words]
        return b"".join([b"*%d\r\n" % len(parts), *(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)])

    def send(self, to: str, number: int = 0) -> bytes:
        return self.command("XADD", to, "*", "m", message(to))

    def wait(self, name: str, cursor: str) -> bytes:
        return self.command("XREAD", "BLOCK", "600000", "STREAMS", name, cursor)

    def end(self, data: bytes | bytearray) -> int:
        if data.startswith(b"-"):
            raise Refused(bytes(data).decode(errors="replace"))
        return self.value_end(data, 0)

    def value_end(self, data: bytes | bytearray, start: int) -> int:
        line = data.find(b"\r\n", start)
        if line < 0:
            return 0
        kind, end = data[start : start + 1], line + 2
        if kind == b"$":
            end += max(int(data[start + 1 : line]) + 2, 0)
        elif kind == b"*":
            for _ in range(int(data[start + 1 : line])):
                end = self.value_end(data, end)
                if not end:
                    return 0
        return end if end <= len(data) else 0

    def cursor(self, answer: bytes) -> str:
        return re.findall(rb"\r\n(\d+-\d+)\r\n", answer)[-1].decode()


class Nats(Wire):
    """JetStream: a publish with an inbox of its own, acknowledged there once it is in the stream."""

    def hello(self, number: int) -> list[bytes]:
        options = b'CONNECT {"verbose": false, "pedantic": false, "headers": true, "no_responders": true}\r\n'
        return [options + b"SUB _INBOX.%d 1\r\nPING\r\n" % number]

    def publish(self, subject: str, body: bytes, number: int) -> bytes:
        return b"PUB %s _INBOX.%d %d\r\n%s\r\n" % (subject.encode(), number, len(body), body)

    def send(self, to: str, number: int = 0) -> bytes:
        return self.publish(f"bus.{to}", message(to), number)

    def end(self, data: bytes | bytearray) -> int:
        """The end of PONG, or of a message; what the server says unasked goes with it."""
        start = 0
        while (line := data.find(b"\r\n", start)) >= 0:
            words = bytes(data[start:line]).split()
            start = line + 2
            if words[0] in (b"-ERR", b"HMSG"):
                raise Refused(bytes(data).decode(errors="replace"))
            if words[0] == b"PONG":
                return start
            if words[0] == b"MSG":
                end = start + int(words[-1]) + 2
                if len(data) >= end and b'"error"' in data[start:end]:
                    raise Refused(bytes(data).decode(errors="replace"))
                return end if len(data) >= end else 0
        return 0


class Mqtt(Wire):
    """MQTT 3.1.1 at QoS 1: a publish is answered by its PUBACK."""

    def packet(self, kind: int, body: bytes) -> bytes:
        assert len(body) < 128 * 128
        length = bytes([len(body)]) if len(body) < 128 else bytes([len(body) % 128 | 128, len(body) // 128])
        return bytes([kind]) + length + body

    def text(self, value: bytes) -> bytes:
        return struct.pack(">H", len(value)) + value

    def hello(self, number: int) -> list[bytes]:
        settings = self.text(b"MQTT") + b"\x04\x02" + struct.pack(">H", 600)
        return [self.packet(0x10, settings + self.text(b"bench-%d" % number))]

    def send(self, to: str, number: int = 0) -> bytes:
        return self.packet(0x32, self.text(f"bus/{to}".encode()) + b"\x00\x01" + message(to))

    def end(self, data: bytes | bytearray) -> int:
        if len(data) < 4:
            return 0
        if data[0] not in (0x20, 0x40) or (data[0] == 0x20 and data[3]):
            raise Refused(repr(bytes(data)))
        return 4


class Beanstalk(Wire):
    """beanstalkd, whose queue is its default tube whatever name is given."""

    def send(self, to: str, number: int = 0) -> bytes:
        body = message(to)
        return b"put 0 0 60 %d\r\n%s\r\n" % (len(body), body)

    def claim(self, queue: str) -> bytes:
        return b"reserve-with-timeout 0\r\n"

    def acknowledge(self, answer: bytes) -> bytes:
        return b"delete %s\r\n" % answer.split()[1]

    def stats(self) -> bytes:
        return b"stats\r\n"

    def end(self, data: bytes | bytearray) -> int:
        line = data.find(b"\r\n")
        if line < 0:
            return 0
        words, end = bytes(data[:line]).split(), line + 2
        if words[0] not in (b"INSERTED", b"RESERVED", b"DELETED", b"OK"):
            raise Refused(bytes(data).decode(errors="replace"))
        if words[0] in (b"RESERVED", b"OK"):
            end += int(words[-1]) + 2
        return end if len(data) >= end else 0
