"""Where requests begin and end, and what becomes of peers that go away. The cases are in hostile.py.

All is said to a Connection in this process, over a transport that is a list of bytes: so every split of every case
takes seconds. tests/core/test_requests.py says the cases to a real server.
"""
import os
import re
import socket
import struct
import time
import types
from typing import NamedTuple

import pytest

import bus_server
from bus_server import HEAD_BYTES, Listener, Refused, Request
from tests.kit import hostile
from tests.kit.hostile import ALICE, GET, HOST, SMUGGLED, WAITING, a_send, head
from tests.kit.processes import PATIENCE
from tests.kit.wire import LAST, Peer, a_bus, answers, come_true, named, statuses, stored

RUN = re.compile(rb"(.)\1{1000,}", re.DOTALL)
WORD = re.compile(rb"[A-Za-z0-9]{4,}")


def cuts(sent):
    """`sent` in two pieces, cut at every byte, and all bytes apart.

    Within a word it is cut near its ends only, and within a long run of one byte at every 64th. CUTS=all: everywhere.
    """
    inside = {at for run in RUN.finditer(sent) for at in range(run.start() + 64, run.end() - 64) if at % 64}
    if os.environ.get("CUTS") != "all":
        words = [word for word in WORD.finditer(sent) if len(word[0]) < 1000]
        inside |= {at for word in words for at in range(word.start() + 2, word.end() - 1)}
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
        bus.loop.BUDGET = 60  # s; no turn ends before
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
    """Each turn answers one request, and could read 100 more: what waits in the buffer must not grow for ever."""
    with a_bus() as bus:
        one, peer, requests = Peer(bus), Peer(bus), 20 * 100
        one.says(head(GET, HOST))
        come_true(lambda: one.heard)
        size = len(one.heard)
        for _ in range(20):
            peer.says(head(GET, HOST) * 100)  # kept on the way while the bus does not read
            bus.loop.take_turn()
            assert len(peer.connection.buffer) <= HEAD_BYTES + 100 * len(head(GET, HOST))
        come_true(lambda: len(peer.heard) >= requests * size)
        assert peer.heard.count(b"HTTP/1.1 200") == requests


def test_a_peer_that_pipelines_without_end_is_read_no_further_than_a_head():
    with a_bus() as bus:
        peer = Peer(bus)
        peer.says(WAITING, *[head(GET, HOST)] * 800)
        assert peer.paused and len(peer.connection.buffer) < 17000
        peer.connection.release()
        peer.says(LAST)
        come_true(lambda: peer.over)
        assert statuses(peer.heard) == [200] * 802


def test_a_defect_is_500_in_words_and_its_log_says_why(monkeypatch, capfd):
    with a_bus() as bus:
        peer = Peer(bus)
        monkeypatch.setattr(bus.mailboxes, "ordered", None)
        peer.says(head("GET /inbox HTTP/1.1", HOST) + SMUGGLED)
        (answer,) = answers(peer.heard)
        assert answer.status == 500 and answer.json()["error"] and answer.fields["connection"] == "close"
        bus_server.REPORT.flush(PATIENCE)
        assert "Traceback" in capfd.readouterr().err and not bus.last


def test_no_head_takes_long_to_refuse():
    """16,000 blanks and a wrong byte kept a backtracking pattern busy for two seconds, in which nobody was served."""
    blanks = " " * 16000
    for line in (f"A:{blanks}\x01", f"A:b{blanks}\x01", f"A:{'b ' * 8000}\x01", f"A{blanks}: b", "A" * 16000):
        started = time.thread_time()
        with pytest.raises(Refused):
            Request(types.SimpleNamespace(address="127.0.0.1"), head(GET, HOST, line)).parse_head()
        assert time.thread_time() - started < 0.2, line[:3]


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
        peer.says(head("POST /send?from=mallory&to=bob HTTP/1.1", HOST, "Content-Length: 262144") + b"a" * 200000)
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
