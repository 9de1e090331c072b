"""Where requests begin and end, and how long a peer may take. The cases are in hostile.py.

What concerns sockets is said to a real server. What concerns the cutting of bytes and the passing of time is said to a
Connection in this process, over a transport that is a list of bytes and with a clock that the test moves: so every
split of every case takes seconds, and a deadline takes none.
"""
import contextlib
import json
import math
import re
import socket
import sqlite3
import struct
import sys
import threading
import time
import types
from typing import NamedTuple

import pytest

import bus_server
from bus_server import (
    HEAD_BYTES,
    LINGER_SECONDS,
    OPERATIONS,
    Connection,
    Deadlines,
    Listener,
    Now,
    Put,
    Refused,
    Request,
    Storms,
    draft,
)
from tests.kit import hostile, inside
from tests.kit.clock import Clock
from tests.kit.hostile import ALICE, GET, HOST, SMUGGLED, WAITING, a_send, head
from tests.kit.processes import PATIENCE, Server, wait_until

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


# ── Over sockets ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("connection") / "bus.db") as server:
        yield server


@pytest.fixture
def server(running):
    """A server that must come out of the test without a trace of mallory, without a traceback, and in good health."""
    heard = running.log.read_text()
    alice, mallory = signed(running, "alice"), signed(running, "mallory")
    running.stored = lambda: signed(running, "alice") - alice
    yield running
    assert running.log.read_text() == heard, "the server complained on stderr"
    assert signed(running, "mallory") == mallory, "something was smuggled"
    assert json.loads(running.get("/healthz"))["ok"]


def listeners(server):
    return {agent["name"] for agent in json.loads(server.get("/agents"))["agents"] if agent["listens"]}


def signed(server, sender):
    """How many messages of this sender are stored."""
    answer = json.loads(server.get(f"/log?from={sender}&max=1000"))
    assert not answer["more"]
    return len(answer["messages"])


def connect(server):
    peer = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return peer


def heard(peer):
    """Everything up to the end that the bus makes."""
    return b"".join(iter(lambda: peer.recv(65536), b""))


def talk(server, sent, ends=False):
    with connect(server) as peer:
        peer.sendall(sent)
        if ends:
            peer.shutdown(socket.SHUT_WR)
        return heard(peer)


@named(hostile.BROKEN)
def test_a_framing_error_gets_one_answer_and_what_follows_is_never_read(server, case):
    (answer,) = answers(talk(server, case.sent + SMUGGLED))
    assert answer.status == case.status
    assert answer.fields["connection"] == "close" and answer.fields["content-type"] == "application/json"
    assert answer.json()["error"]


@named(hostile.BROKEN)
def test_a_framing_error_behind_a_good_request_leaves_that_one_alone(server, case):
    assert statuses(talk(server, ALICE + case.sent + SMUGGLED)) == [200, case.status]
    assert server.stored() == 1


@named(hostile.WHOLE)
def test_a_whole_request_gets_its_answer_and_the_connection_goes_on(server, case):
    found = answers(talk(server, case.sent + (SMUGGLED if case.closes else LAST)))
    assert tuple(answer.status for answer in found if answer.status != 100) == case.answers + (200,) * (not case.closes)
    assert server.stored() == case.stored
    for answer in found:
        assert answer.status in (100, 200) or answer.json()["error"]


@named(hostile.WHOLE)
def test_pipelined_requests_are_answered_in_order(server, case):
    first = head("GET /first HTTP/1.1", HOST)
    found = statuses(talk(server, first + ALICE + case.sent + (SMUGGLED if case.closes else LAST)))
    assert tuple(found) == (404, 200) + case.answers + (200,) * (not case.closes)
    assert server.stored() == case.stored + 1


@named(hostile.CUT)
def test_who_closes_its_side_still_hears_every_answer_and_nothing_half_is_stored(server, case):
    assert tuple(statuses(talk(server, case.sent, ends=True))) == case.answers
    assert server.stored() == case.stored


def test_what_is_pipelined_behind_a_parked_reader_waits_for_it(server):
    with connect(server) as peer:
        peer.sendall(WAITING.replace(b"carl", b"fred") + head("GET /nothing HTTP/1.1", HOST) + ALICE + LAST)
        wait_until(lambda: "fred" in listeners(server))
        talk(server, a_send("alice", "Connection: close", to="fred"))
        found = answers(heard(peer))
    assert [answer.status for answer in found] == [200, 404, 200, 200]
    assert [message["to"] for message in found[0].json()["messages"]] == ["fred"]
    assert server.stored() == 2


def test_a_client_that_goes_on_sending_too_large_a_body_receives_the_413(server):
    with connect(server) as peer:
        peer.sendall(head("POST /send?from=mallory&to=bob HTTP/1.1", HOST, "Content-Length: 8000000"))
        for _ in range(8):
            peer.sendall(b"a" * 1000000)
        (answer,) = answers(heard(peer))
    assert answer.status == 413 and "262144" in answer.json()["error"]


def test_a_body_is_asked_for_only_after_its_length_was_accepted(server):
    with connect(server) as peer:
        sent = a_send("alice", "Expect: 100-continue")
        ending = sent.index(b"\r\n\r\n") + 4
        peer.sendall(sent[:ending])
        assert answers(peer.recv(65536)) == [Answer(100, {}, b"")]
        peer.sendall(sent[ending:] + LAST)
        assert [answer.status for answer in answers(heard(peer))] == [200, 200]
    assert server.stored() == 1


@pytest.mark.parametrize("path", ["/healthz", "/", "/inbox", "/agents", "/bus_send.py", "/nothing", "/message/1"])
def test_head_is_get_without_the_body(server, path):
    whole = head(f"GET {path} HTTP/1.1", HOST, "Connection: close")
    (get,) = answers(talk(server, whole))
    (bare,) = answers(talk(server, b"HEAD" + whole[3:]), bare=True)
    del get.fields["date"], bare.fields["date"]
    assert (bare.status, bare.fields) == (get.status, get.fields) and get.body


def test_a_body_on_head_is_refused_without_one(server):
    sent = head("HEAD / HTTP/1.1", HOST, f"Content-Length: {len(SMUGGLED)}", body=SMUGGLED)
    (answer,) = answers(talk(server, sent), bare=True)
    assert answer.status == 400 and answer.fields["connection"] == "close"


def test_head_neither_reads_mail_nor_waits_for_it(server):
    talk(server, a_send("alice", "Connection: close", to="dora"))
    for path in ("/recv?to=dora&block=true", "/recv?to=emil&block=true", "/log?block=true&since=now"):
        (answer,) = answers(talk(server, head(f"HEAD {path} HTTP/1.1", HOST, "Connection: close")), bare=True)
        assert answer.status == 200
    assert not {"dora", "emil"} & listeners(server)


@pytest.mark.parametrize("path, allowed", [
    ("/send", "POST, OPTIONS"), ("/recv", "GET, HEAD, OPTIONS"), ("/healthz", "GET, HEAD, OPTIONS"),
    ("/message/1", "GET, HEAD, OPTIONS"),
])  # fmt: skip
def test_options_says_what_a_path_takes_and_so_does_a_refusal(server, path, allowed):
    wrong = "GET" if path == "/send" else "POST"
    sent = head(f"OPTIONS {path} HTTP/1.1", HOST) + head(f"{wrong} {path} HTTP/1.1", HOST) + LAST
    options, refusal, _ = answers(talk(server, sent))
    assert (options.status, options.fields["allow"]) == (204, allowed)
    assert (refusal.status, refusal.fields["allow"]) == (405, allowed)
    assert "content-length" not in options.fields, "RFC 9110, 8.6: not in a 204"
    assert not [field for field in options.fields if field.startswith("access-control")], "no CORS"


def test_readers_that_push_each_other_out_do_not_do_it_all_at_once(server):
    """A name has 8 parked readers. Each that is pushed out has its next poll at hand, which pushes out another."""
    crowd = [connect(server) for _ in range(9)]
    for peer in crowd:
        peer.sendall(WAITING.replace(b"carl", b"gina") * 200)
    talk(server, a_send("alice", "Connection: close", to="gina"))
    for peer in crowd:
        assert peer.recv(65536).startswith(b"HTTP/1.1 200 OK")
        peer.close()


# ── In this process ──────────────────────────────────────────────────────────────────────────────────────────────────


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


RUN = re.compile(rb"(.)\1{1000,}", re.DOTALL)


def cuts(sent):
    """`sent` in two pieces, cut at every byte, but within a long run of one byte at every 64th; and all bytes apart."""
    inside = {at for run in RUN.finditer(sent) for at in range(run.start() + 64, run.end() - 64) if at % 64}
    yield from ([sent[:at], sent[at:]] for at in range(1, len(sent)) if at not in inside)
    yield [sent[at : at + 1] for at in range(len(sent))]


class Expected(NamedTuple):
    sent: bytes  # the case, and behind it what must not be read, or what must
    answers: list  # their statuses
    stored: int  # messages
    ends: bool  # the peer closes its side then


def expected(case):
    if isinstance(case, hostile.Broken):
        return Expected(case.sent + SMUGGLED, [case.status], 0, False)
    if isinstance(case, hostile.Cut):
        return Expected(case.sent, [*case.answers], case.stored, True)
    return Expected(case.sent + LAST, [*case.answers] + [200] * (not case.closes), case.stored, False)


@named(hostile.BROKEN + hostile.WHOLE + hostile.CUT)
def test_however_the_bytes_are_cut_the_answers_are_the_same(case):
    sent, right, messages, ends = expected(case)
    with a_bus() as bus:
        for number, pieces in enumerate(cuts(sent), 1):
            peer = Peer(bus)
            peer.says(*pieces, *[b""] * ends)
            come_true(lambda peer=peer: peer.over)
            assert statuses(peer.heard) == right, f"cut at {len(pieces[0])}"
            assert stored(bus) == messages * number, f"cut at {len(pieces[0])}"
            assert bus.door.early.all == bus.door.arriving.all == 0, f"cut at {len(pieces[0])}"
            peer.leaves()
        assert not bus.door.connections


def test_nothing_is_answered_before_the_commit_and_not_out_of_order():
    with a_bus() as bus:
        peer = Peer(bus)
        peer.says(ALICE + head("GET /nothing HTTP/1.1", HOST) + ALICE + LAST)
        assert not peer.heard
        come_true(lambda: peer.over)
        assert statuses(peer.heard) == [200, 404, 200, 200] and stored(bus) == 2


def test_between_two_pipelined_requests_the_other_connections_are_served():
    with a_bus() as bus:
        peer, other = Peer(bus), Peer(bus)
        bus.loop.soon(lambda: other.says(head(GET, HOST)))  # it is ready in the turn that follows
        peer.says(head("GET /first HTTP/1.1", HOST) + head(GET, HOST) + head("GET /third HTTP/1.1", HOST))
        served = [(statuses(peer.heard), statuses(other.heard))]
        while bus.loop.actions:
            bus.loop.take_turn()
            served.append((statuses(peer.heard), statuses(other.heard)))
        assert served[:3] == [([404], []), ([404, 200], [200]), ([404, 200, 404], [200])]


def test_a_pipelined_send_is_stored_after_the_one_before_was_answered():
    with a_bus() as bus:
        peer, lists, apply = Peer(bus), [], bus.state.apply

        def count(operations, now):
            lists.append((len(operations), len(statuses(peer.heard))))
            return apply(operations, now)

        bus.state.apply = count
        peer.says(ALICE * 3 + LAST)
        come_true(lambda: peer.over)
        assert lists == [(1, 0), (1, 1), (1, 2)] and statuses(peer.heard) == [200] * 4


def test_who_pipelines_faster_than_it_is_answered_is_read_no_further_than_a_head():
    """Each turn answers one request, and could read 400 more: what waits in the buffer must not grow for ever."""
    with a_bus() as bus:
        one, peer, requests = Peer(bus), Peer(bus), 40 * 400
        one.says(head(GET, HOST))
        come_true(lambda: one.heard)
        size = len(one.heard)
        for _ in range(40):
            peer.says(head(GET, HOST) * 400)  # kept on the way while the bus does not read
            bus.loop.take_turn()
            assert len(peer.connection.buffer) <= HEAD_BYTES + 400 * len(head(GET, HOST))
        come_true(lambda: len(peer.heard) >= requests * size)
        assert peer.heard.count(b"HTTP/1.1 200") == requests


def test_a_peer_that_pipelines_without_end_is_read_no_further_than_a_head():
    with a_bus() as bus:
        peer = Peer(bus)
        peer.says(WAITING, *[head(GET, HOST)] * 2000)
        assert peer.paused and len(peer.connection.buffer) < 17000
        peer.connection.release()
        peer.says(LAST)
        come_true(lambda: peer.over)
        assert statuses(peer.heard) == [200] * 2002


# Patience


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


def test_a_defect_is_500_in_words_and_its_log_says_why(monkeypatch, capfd):
    with a_bus() as bus:
        peer = Peer(bus)
        monkeypatch.setattr(bus.mailboxes, "ordered", None)
        peer.says(head("GET /inbox HTTP/1.1", HOST) + SMUGGLED)
        (answer,) = answers(peer.heard)
        assert answer.status == 500 and answer.json()["error"] and answer.fields["connection"] == "close"
        bus_server.REPORT.flush(PATIENCE)
        assert "Traceback" in capfd.readouterr().err and not bus.last


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


# Peers that go away


@pytest.mark.parametrize("abruptly", [False, True], ids=["closes", "resets"])
def test_a_client_that_goes_away_while_parked_is_unparked(abruptly):
    with a_bus() as bus:
        listener = Listener(bus.door, socket.create_server(("127.0.0.1", 0)), None)
        with socket.create_connection(listener.sock.getsockname()) as peer:
            peer.sendall(WAITING)
            come_true(lambda: bus.mailboxes.parked)
            if abruptly:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        come_true(lambda: not bus.door.connections)
        assert not bus.mailboxes.parked and not bus.mailboxes.waiting
        listener.close()


def test_a_connection_that_is_gone_keeps_nothing_of_what_it_got():
    """It is in a cycle with its transport. 1000 peers that left half bodies of 200 KB took 380 MB, for minutes."""
    with a_bus() as bus:
        peer = Peer(bus)
        peer.says(announced(262144) + b"a" * 200000)
        peer.leaves()
        assert not peer.connection.buffer and not peer.connection.request


def test_a_socket_that_broke_is_not_written_to_again():
    with a_bus() as bus:
        peer = Peer(bus)
        peer.breaks = True
        peer.says(head(GET, HOST) * 10)
        assert peer.writes == 1


def test_a_parked_reader_whose_socket_breaks_just_before_its_message_is_no_error():
    """A socket that broke is closed at the end of the turn: the message may be announced before."""
    with a_bus() as bus:
        peer, sender = Peer(bus), Peer(bus)
        peer.says(WAITING)
        peer.broken = True
        sender.says(a_send("alice", to="carl"))
        come_true(lambda: sender.heard)
        peer.leaves()
        assert not bus.mailboxes.parked and not bus.mailboxes.box("default", "carl").fetched


@pytest.mark.parametrize("end", ["breaks", "stuck", "read"])
def test_a_message_counts_as_fetched_only_when_its_answer_was_written_whole(end):
    with a_bus() as bus:
        sender = Peer(bus)
        sender.says(ALICE)
        come_true(lambda: sender.heard)
        peer = Peer(bus)
        peer.breaks, peer.reads = end == "breaks", end != "stuck"
        peer.says(head("GET /recv?to=bob HTTP/1.1", HOST))
        peer.leaves()
        assert bool(bus.mailboxes.box("default", "bob").fetched) == (end == "read")


def test_a_connection_whose_answer_is_being_read_when_the_bus_drains_is_closed_after_it():
    with a_bus() as bus:
        peer = Peer(bus)
        peer.reads = False
        peer.says(head(GET, HOST))
        bus.draining = True
        peer.connection.drain()
        assert not peer.over
        peer.reads_on()
        assert peer.over and statuses(peer.heard) == [200]


# Taking back


def a_read(since="0"):
    return head(f"GET /recv?to=bob&since={since} HTTP/1.1", HOST)


def a_recall(ident):
    return head(f"POST /recall?id={ident} HTTP/1.1", HOST)


@contextlib.contextmanager
def two_messages():
    """A bus, its sender, and the ids of what that has sent to bob."""
    with a_bus() as bus:
        sender = Peer(bus)
        sender.says(ALICE + ALICE)
        come_true(lambda: len(statuses(sender.heard)) == 2)
        idents = [answer.json()["id"] for answer in answers(sender.heard)]
        sender.heard = b""
        yield bus, sender, idents


def told(peer):
    """Status and members of its next answer."""
    come_true(lambda: peer.heard)
    [answer] = answers(peer.heard)
    peer.heard = b""
    return answer.status, answer.json()


def state(peer, ident):
    peer.says(head(f"GET /message/{ident} HTTP/1.1", HOST))
    return (told(peer))[1]["state"]


@pytest.mark.parametrize("which", [0, 1], ids=["the-next", "one-behind"])
def test_what_is_being_recalled_nobody_gets_and_nobody_passes(which):
    """The reader asks while the recall is on its way to the disk."""
    with two_messages() as (bus, sender, idents):
        reader = Peer(bus)
        sender.says(a_recall(idents[which]))
        reader.says(a_read())
        _, first = told(reader)
        assert [message["id"] for message in first["messages"]] == idents[:which] and first["more"]
        assert int(first["now"] * 1e6 + 0.5) < int(idents[which], 16), "it was passed"
        assert (told(sender))[0] == 200 and state(sender, idents[which]) == "recalled"
        reader.says(a_read(f"{first['now']:.6f}"))
        _, rest = told(reader)
        assert [message["id"] for message in rest["messages"]] == idents[which + 1:] and not rest["more"]


def test_what_could_not_be_recalled_stays_to_be_read(monkeypatch):
    def full(recall, state, now):
        raise sqlite3.OperationalError("database or disk is full")

    with two_messages() as (bus, sender, idents):
        monkeypatch.setattr(OPERATIONS["recall"], "apply", full)
        reader = Peer(bus)
        sender.says(a_recall(idents[1]))
        reader.says(a_read())
        _, first = told(reader)
        assert (told(sender))[0] == 507 and state(sender, idents[1]) == "queued"
        reader.says(a_read(f"{first['now']:.6f}"))
        assert [message["id"] for message in (told(reader))[1]["messages"]] == idents[1:]


def test_what_is_on_its_way_to_a_reader_is_not_recalled():
    with two_messages() as (bus, sender, idents):
        reader = Peer(bus)
        reader.reads = False
        reader.says(a_read())
        sender.says(a_recall(idents[0]))
        assert (told(sender))[0] == 409 and state(sender, idents[0]) == "queued"
        reader.reads_on()
        assert [message["id"] for message in (told(reader))[1]["messages"]] == idents
        assert state(sender, idents[0]) == "fetched"


def posted(path, **message):
    body = json.dumps(message).encode()
    return head(f"POST {path} HTTP/1.1", HOST, f"Content-Length: {len(body)}", body=body)


def test_an_answer_that_is_being_recalled_is_not_handed_to_who_asks():
    """The recall comes while the question, asked again, is on its way to the disk."""
    question = posted("/ask?wait=0", **{"from": "bob", "to": "alice", "msg": "T1?", "key": "k"})
    with a_bus() as bus:
        asker, sender = Peer(bus), Peer(bus)
        asker.says(question)
        _, asked = told(asker)
        sender.says(posted("/send", **{"from": "alice", "to": "bob", "msg": "yes", "reply_to": asked["id"]}))
        _, reply = told(sender)
        while_the_disk_is_busy(bus, lambda: sender.says(a_recall(reply["id"])))
        asker.says(question)
        assert told(asker)[1]["reply"] is None
        assert told(sender)[0] == 200 and state(sender, reply["id"]) == "recalled"


def test_an_answer_on_its_way_to_who_asked_is_not_recalled():
    with a_bus() as bus:
        asker, sender = Peer(bus), Peer(bus)
        asker.says(posted("/ask?wait=9", **{"from": "bob", "to": "alice", "msg": "T1?"}))
        come_true(lambda: bus.mailboxes.parked)
        [question] = bus.mailboxes.parked.values()
        asker.reads = False
        reply = {"from": "alice", "to": "bob", "msg": "yes", "reply_to": f"{question.tick:x}"}
        sender.says(posted("/send", **reply))
        ident = (told(sender))[1]["id"]
        sender.says(a_recall(ident))
        assert (told(sender))[0] == 409 and state(sender, ident) == "queued"
        asker.reads_on()
        assert (told(asker))[1]["reply"]["id"] == ident and state(sender, ident) == "fetched"


def test_what_is_not_announced_yet_cannot_be_asked_about_nor_recalled():
    """Its sender has no answer yet: who knows its id has guessed it."""
    with two_messages() as (bus, sender, _):
        wall = bus.view.clock()
        applied = bus.state.apply([Put([draft({"from": "alice", "to": "new", "msg": "x"}, None)])], Now(wall, wall))
        for request in (a_recall(f"{applied.last:x}"), head(f"GET /message/{applied.last:x} HTTP/1.1", HOST)):
            sender.says(request)
            assert (told(sender))[0] == 404


# The grammar


# An endpoint that asks others for its request


def asking(bus, *steps):
    """POST /several: its answer is the bodies of the answers to `steps`, each asked when the one before is answered."""

    def several(request):
        heads, found = iter(steps), []

        def answered(answer):
            found.append(json.loads(answer.body))
            return go_on()

        def go_on():
            for step in heads:
                inner = Request(request.peer, step.partition(b"\r\n\r\n")[0] + b"\r\n\r\n")
                inner.parse_request()
                inner.body, inner.grant = step.partition(b"\r\n\r\n")[2], request.grant
                inner.endpoint = bus.routes[inner.command, inner.route]
                request.peer.then = answered
                answer = bus.answer(inner)
                if not answer:
                    return None
                request.peer.then = None
                found.append(json.loads(answer.body))
            return bus_server.Answer(200, json.dumps(found).encode())

        return go_on()

    bus.route("POST", "/several", several)
    return head("POST /several HTTP/1.1", HOST, "Content-Length: 0")


STEPS = [posted("/send", **{"from": "ann", "to": "bob", "msg": "1"}), a_read(), WAITING,
         posted("/send", **{"from": "ann", "to": "bob", "msg": "2"}), a_read()]  # fmt: skip


def test_an_endpoint_may_ask_others_that_commit_and_that_wait():
    """WAITING is a poll of carl, which is woken; what is pipelined behind it waits for the whole of it."""
    with a_bus() as bus:
        peer, other = Peer(bus), Peer(bus)
        peer.says(asking(bus, *STEPS) + a_read())
        come_true(lambda: bus.mailboxes.parked)
        assert not peer.heard
        other.says(a_send("alice", to="carl"))
        come_true(lambda: peer.heard)
        settle(bus)
        several, behind = answers(peer.heard)
        sent, read, woken, _, again = several.json()
        assert sent["ok"] and [each["msg"] for each in read["messages"]] == ["1"]
        assert [each["to"] for each in woken["messages"]] == ["carl"]
        assert [each["msg"] for each in again["messages"]] == ["1", "2"] and behind.status == 200
        assert not bus.mailboxes.parked and peer.connection.then is None


@pytest.mark.parametrize("end", ["leaves", "late", "closes"])
def test_an_endpoint_that_waits_in_another_one_ends_as_any_that_waits(end):
    clock = Clock()
    with a_bus(clock) as bus:
        peer = Peer(bus)
        peer.says(asking(bus, *STEPS))
        come_true(lambda: bus.mailboxes.parked)
        if end == "leaves":
            peer.leaves()
        elif end == "closes":
            peer.says(b"")
        else:
            clock.now += 51
            bus.door.sweep()
        come_true(lambda: peer.heard or end == "leaves")
        assert not bus.mailboxes.parked and peer.connection.then is None
        assert stored(bus) == (1 if end == "leaves" else 2)


def test_no_head_takes_long_to_refuse():
    """16,000 blanks and a wrong byte kept a backtracking pattern busy for two seconds, in which nobody was served."""
    blanks = " " * 16000
    for line in (f"A:{blanks}\x01", f"A:b{blanks}\x01", f"A:{'b ' * 8000}\x01", f"A{blanks}: b", "A" * 16000):
        started = time.thread_time()
        with pytest.raises(Refused):
            Request(types.SimpleNamespace(address="127.0.0.1"), head(GET, HOST, line)).parse_request()
        assert time.thread_time() - started < 0.2, line[:3]
