"""How long a peer may take, with a clock that the test moves; and files, which take long."""
import math
import sys
import time
from typing import NamedTuple

import pytest

import bus_server
from bus_server import LINGER_SECONDS, Deadlines
from tests.kit import hostile, inside
from tests.kit.clock import Clock
from tests.kit.hostile import ALICE, GET, HOST, a_send, head
from tests.kit.peers import mint
from tests.kit.wire import LAST, LATE, Peer, a_bus, answers, come_true, named, settle, statuses, stored


class Slow(NamedTuple):
    """A peer that says `sent` and then dawdles: it sends `drip` every second, or nothing."""

    name: str
    sent: bytes
    patience: float
    answer: int  # or 0: the connection is closed without one
    drip: bytes = b""


def announced(size):
    return head("POST /send?from=mallory&to=bob HTTP/1.1", HOST, f"Content-Length: {size}")


SLOW = [
    Slow("no byte at all", b"", 10, 0),
    Slow("half a head", b"GET /heal", 10, 408),
    Slow("a head that drips", b"G", 10, 408, drip=b"E"),
    Slow("headers that drip", head(GET, HOST)[:-2], 10, 408, drip=b"A: b\r\n"),
    Slow("half a head behind an answer", head(GET, HOST) + b"GET /heal", 10, 408),
    Slow("no byte behind an answer", head(GET, HOST), 75, 0),
    Slow("no body of 1 byte", announced(1), 10 + 1 / 8192, 408),
    Slow("no body of 80 KiB", announced(81920), 20, 408),
    Slow("a body of 80 KiB that drips", announced(81920) + b"a", 20, 408, drip=b"a"),
    Slow("half a body of 256 KiB", announced(262144) + b"a" * 131072, 42, 408),
    Slow("no body that was asked for", a_send("mallory", "Expect: 100-continue")[: -hostile.SIZE], 10 + 43 / 8192, 408),
]  # fmt: skip


@named(SLOW)
def test_a_deadline_is_absolute(case):
    clock = Clock()
    with a_bus(clock) as bus:
        peer = Peer(bus)
        peer.says(*([case.sent] if case.sent else []))
        settle(bus)
        before, started = peer.heard, clock.now
        while clock.now + 1 < started + case.patience:
            clock.now += 1
            bus.sweep()
            peer.says(*([case.drip] if case.drip else []))
            settle(bus)
        assert peer.heard == before and not peer.over, "given up too early"
        clock.now = started + case.patience + LATE
        bus.sweep()
        assert peer.over and not peer.aborted
        assert statuses(peer.heard[len(before) :]) == [case.answer] * bool(case.answer)
        assert stored(bus) == 0


@pytest.mark.parametrize("query, hold", [("block=true", 25), ("wait=7", 7), ("wait=1000", 60), ("wait=0.5", 0.5)])
def test_a_parked_reader_is_answered_when_its_hold_is_over(query, hold):
    clock = Clock()
    with a_bus(clock) as bus:
        peer = Peer(bus)
        peer.says(head(f"GET /recv?to=bob&{query} HTTP/1.1", HOST))
        clock.now += hold - 0.01
        bus.sweep()
        assert not peer.heard
        clock.now += 0.01 + LATE
        bus.sweep()
        (answer,) = answers(peer.heard)
        assert answer.json()["messages"] == [] and not peer.over


def test_who_does_not_read_an_answer_in_30_seconds_is_dropped_however_it_trickles():
    clock = Clock()
    with a_bus(clock) as bus:
        peer = Peer(bus)
        peer.reads = False
        peer.says(head(GET, HOST) * 2)
        for _ in range(29):
            clock.now += 1
            peer.unread = peer.unread[1:]
            bus.sweep()
        assert not peer.aborted and peer.unread.count(b"HTTP/1.1") <= 1, "the second answer waits for the first"
        clock.now += 1 + LATE
        bus.sweep()
        assert peer.aborted


def test_who_reads_an_answer_in_time_gets_the_next():
    clock = Clock()
    with a_bus(clock) as bus:
        peer = Peer(bus)
        peer.reads = False
        peer.says(head(GET, HOST) + LAST)
        for _ in range(2):
            clock.now += 29
            bus.sweep()
            peer.reads_on()
        assert statuses(peer.heard) == [200, 200] and not peer.aborted


def test_a_file_must_move_by_80_kib_every_10_seconds(tmp_path):
    clock = Clock()
    with a_bus(clock, str(tmp_path / "bus.db")) as bus:
        peer = Peer(bus)
        peer.says(head(f"PUT /blob/{'0' * 64} HTTP/1.1", HOST, "Content-Length: 1000000"))
        for piece in [b"a" * 81920] * 5 + [b"a" * 80000]:
            clock.now += 9
            bus.sweep()
            assert not peer.heard
            peer.says(piece)
            come_true(lambda: not peer.connection.pouring())
        clock.now += 1 + LATE
        bus.sweep()
        assert statuses(peer.heard) == [408] and peer.over
        peer.leaves()


def test_a_file_that_cannot_be_read_to_its_end_ends_the_connection(tmp_path, monkeypatch):
    """Else the next answer would look like the rest of the file."""
    def torn(stream):
        raise OSError(5, "Input/output error")

    with a_bus(time.monotonic, str(tmp_path / "bus.db")) as bus:
        peer = Peer(bus)
        peer.says(head(f"PUT {inside.FILE_PATH} HTTP/1.1", HOST, f"Content-Length: {len(inside.FILE)}"), inside.FILE)
        come_true(lambda: statuses(peer.heard) == [201])
        monkeypatch.setattr(sys.modules["bus_extensions.files"].Download, "read", torn)
        peer.heard = b""
        peer.says(head(f"GET {inside.FILE_PATH} HTTP/1.1", HOST) + head(GET, HOST))
        come_true(lambda: peer.over)
        settle(bus)
        assert peer.heard.count(b"HTTP/1.1 ") == 1
        peer.leaves()


def test_the_pieces_of_a_file_that_nobody_reads_count_as_unread_answers(tmp_path, monkeypatch):
    with a_bus(time.monotonic, str(tmp_path / "bus.db")) as bus:
        first, second = Peer(bus), Peer(bus)
        first.says(head(f"PUT {inside.FILE_PATH} HTTP/1.1", HOST, f"Content-Length: {len(inside.FILE)}"), inside.FILE)
        come_true(lambda: statuses(first.heard) == [201])
        get = head(f"GET {inside.FILE_PATH} HTTP/1.1", HOST)
        monkeypatch.setattr(bus.door.unsent, "most_each", 100_000)
        monkeypatch.setattr(bus_server, "ANSWER_BYTES", 4096)  # that a GET must have room for when it comes
        for peer in (first, second):
            peer.heard = b""
            peer.says(get)
            come_true(lambda peer=peer: peer.heard.startswith(b"HTTP/1.1 200"))
            peer.reads = False
            come_true(lambda peer=peer: peer.unread or peer.aborted)
        assert not first.aborted and bus.door.unsent.all == len(first.unread) == 65536
        assert second.aborted
        first.leaves()
        second.leaves()
        assert not bus.door.unsent.held and not bus.door.unsent.all


class From(Peer):
    def __init__(self, bus, address):
        self.address = address
        super().__init__(bus)

    def peer(self):
        return self.address


@pytest.mark.parametrize("addresses", [1, 9])
def test_what_strangers_do_not_read_leaves_room_for_the_answers_to_a_token(tmp_path, monkeypatch, addresses):
    """At the address of the token itself, and at as many others as they like."""
    [token] = mint(tmp_path / "bus.db", ann=[]).values()
    with a_bus(time.monotonic, str(tmp_path / "bus.db")) as bus:
        page = head("GET /bus_recv.py HTTP/1.1", HOST)
        strangers = [From(bus, f"127.0.0.{number % addresses}") for number in range(9)]
        first = strangers[0]
        first.reads = False
        first.says(page)
        come_true(lambda: first.unread)
        size = len(first.unread)
        monkeypatch.setattr(bus_server, "ANSWER_BYTES", size)  # that a GET must have room for when it comes
        monkeypatch.setattr(bus.door, "KEPT", 2 * size, raising=False)
        monkeypatch.setattr(bus.door.unsent, "most", 4 * size)
        monkeypatch.setattr(bus.door.unsent, "most_each", 4 * size // min(addresses, 4))
        for peer in strangers[1:]:
            peer.reads = False
            peer.says(page)
            come_true(lambda peer=peer: peer.unread)
        ann = From(bus, "127.0.0.0")
        ann.says(head("GET /recv?to=ann HTTP/1.1", HOST, f"Authorization: Bearer {token}"))
        come_true(lambda: ann.heard)
        assert statuses(ann.heard) == [200]
        assert {statuses(peer.unread)[0] for peer in strangers} == {200, 503}


def test_an_upload_that_broke_while_its_piece_could_not_be_written_can_begin_again(tmp_path, monkeypatch):
    upload = head(f"PUT {inside.FILE_PATH} HTTP/1.1", HOST, f"Content-Length: {len(inside.FILE)}")
    with a_bus(time.monotonic, str(tmp_path / "bus.db")) as bus:
        first, second = Peer(bus), Peer(bus)
        with monkeypatch.context() as full:
            full.setattr(sys.modules["bus_extensions.files"].Upload, "write", lambda sink, data: 0)
            first.says(upload + b"a piece")
            sink = first.connection.request.sink
            assert sink.busy
            first.leaves()
            come_true(lambda: not sink.busy)
        assert sink.stream.closed
        second.says(upload, inside.FILE)
        come_true(lambda: second.heard)
        assert statuses(second.heard) == [201]
        second.leaves()


def test_a_commit_may_take_as_long_as_the_disk_does():
    clock = Clock()
    with a_bus(clock) as bus:
        peer = Peer(bus)
        peer.says(ALICE)
        clock.now += 3600
        bus.sweep()
        assert not peer.over and not peer.heard
        come_true(lambda: peer.heard)
        assert statuses(peer.heard) == [200]


def test_who_does_not_close_after_the_last_answer_is_dropped():
    clock = Clock()
    with a_bus(clock) as bus:
        peer = Peer(bus)
        peer.says(b"?\r\n\r\n")
        assert peer.over and not peer.aborted
        for _ in range(9):
            clock.now += LINGER_SECONDS / 10
            peer.says(b"a" * 100000)
            bus.sweep()
        assert not peer.aborted and not peer.connection.buffer
        clock.now += LINGER_SECONDS / 10 + LATE
        bus.sweep()
        assert peer.aborted and statuses(peer.heard) == [400]


def test_no_deadline_is_filed_under_a_time_before_it():
    """Floats round: 0.9000000000000001 / 0.1 is 9. Filed there, it would be neither late nor to come, for ever."""
    for slot in range(1, 20000):
        clock = Clock()
        clock.now = math.nextafter(slot * Deadlines.SLOT, math.inf)
        deadlines, peer = Deadlines(clock), Clock()
        peer.slot = sys.maxsize
        deadlines.set(peer, 0.0)
        assert min(deadlines.slots) * Deadlines.SLOT >= peer.due
