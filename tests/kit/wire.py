"""A bus in this process, and peers whose sockets are lists of bytes; how answers are read."""
import contextlib
import json
import threading
import time
from typing import NamedTuple

import pytest

from bus_server import Connection, Deadlines, Storms
from tests.kit import inside
from tests.kit.hostile import GET, HOST, head
from tests.kit.processes import PATIENCE

LAST = head(GET, HOST, "Connection: close")  # behind it nothing is answered: so that "exactly so many" can be seen
LATE = Deadlines.SLOT * 1.01  # s; at most so long after a deadline the bus acts on it


class Answer(NamedTuple):
    status: int
    fields: dict
    body: bytes

    def json(self):
        return json.loads(self.body)


def answers(wire, bare=False):
    """The answers in `wire`, which must be exactly so long. `bare`: those to HEAD, which have no body."""
    found = []
    while wire:
        lines, empty_line, wire = wire.partition(b"\r\n\r\n")
        assert empty_line, f"half an answer: {lines!r}"
        status, *fields = lines.decode().split("\r\n")
        version, number, _ = status.split(" ", 2)
        assert version == "HTTP/1.1", status
        fields = {name.lower(): value for name, value in (field.split(": ", 1) for field in fields)}
        length = 0 if bare or number in ("100", "204") else int(fields["content-length"])
        assert len(wire) >= length, f"an answer is cut short: {lines!r}"
        found.append(Answer(int(number), fields, wire[:length]))
        wire = wire[length:]
    return found


def statuses(wire):
    return [answer.status for answer in answers(wire) if answer.status != 100]


def named(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name.replace(" ", "-"))


def heard(peer):
    """Everything up to the end that the bus makes."""
    return b"".join(iter(lambda: peer.recv(65536), b""))


class Peer:
    """A socket that is a list of bytes, and who sits at its other end."""

    def __init__(self, bus):
        self.coming, self.unread, self.heard = [], b"", b""
        self.reads = True  # else what is written stays unread
        self.breaks = self.broken = False  # at the next write; now
        self.ended = self.paused = self.aborted = False
        self.writes = 0
        self.over = False  # the bus has closed its side
        self.connection = Connection(bus.door)
        self.connection.connection_made(self)

    def says(self, *pieces):
        """Like recv on the other side, an empty piece is the end."""
        self.coming += pieces
        while self.coming and not self.paused and not self.closing:
            self.ended = not self.coming[0]
            piece = self.coming.pop(0)
            self.connection.data_received(piece) if piece else self.connection.eof_received()

    def reads_on(self):
        self.heard, self.unread = self.heard + self.unread, b""
        self.connection.resume_writing()

    def leaves(self):
        self.connection.connection_lost()

    # What a Connection uses of its transport

    def peer(self):
        return "127.0.0.1"

    def write(self, data):
        self.writes += 1
        self.broken = self.broken or self.breaks
        if self.reads and not self.broken:
            self.heard += data
        elif not self.broken:
            self.unread += data

    @property
    def unsent(self):
        return self.unread

    def pause_reading(self):
        self.paused = True

    def resume_reading(self):
        """As with a socket, the end can be read again."""
        self.paused = False
        self.connection.door.loop.soon(lambda: self.says(*[b""] * self.ended))

    def write_eof(self):
        self.over = True

    def close(self):
        self.over = True

    def abort(self):
        self.aborted = True
        self.over = True

    @property
    def closing(self):
        return self.aborted or self.broken


@contextlib.contextmanager
def a_bus(clock=time.monotonic, path=":memory:", *options):
    """A bus without a socket, and in memory if it has no path. Its deadlines go by `clock`."""
    bus = inside.make(path, *options)
    bus.storms = Storms(clock, rate=0)
    bus.door.deadlines = Deadlines(clock)
    bus.loop.every(0.01, lambda: None)  # so that no turn is longer
    LOOPS.append(bus.loop)
    try:
        yield bus
    finally:
        LOOPS.remove(bus.loop)
        inside.close(bus)


LOOPS = []  # those that turn while a test waits


def come_true(fact):
    deadline = time.monotonic() + 3 * PATIENCE
    while not fact():
        assert time.monotonic() < deadline
        for loop in LOOPS:
            loop.take_turn()


def settle(bus):
    """Take turns until nothing is left for another one: each pipelined request is answered in a turn of its own."""
    while bus.loop.actions:
        bus.loop.take_turn()


def while_the_disk_is_busy(bus, action):
    """The next list of operations is being applied until this was done, by the deputy."""
    apply, done = bus.state.apply, threading.Event()

    def slow(operations, now):
        bus.state.apply = apply
        bus.loop.tell(lambda: (action(), done.set()))
        assert done.wait(PATIENCE)
        return apply(operations, now)

    bus.state.apply = slow


def stored(bus):
    return sum(box.n for box in bus.mailboxes.boxes.values())


def told(peer):
    """Status and members of its next answer."""
    come_true(lambda: peer.heard)
    [answer] = answers(peer.heard)
    peer.heard = b""
    return answer.status, answer.json()


def posted(path, **message):
    body = json.dumps(message).encode()
    return head(f"POST {path} HTTP/1.1", HOST, f"Content-Length: {len(body)}", body=body)


def a_read(since="0"):
    return head(f"GET /recv?to=bob&since={since} HTTP/1.1", HOST)
