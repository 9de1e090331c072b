"""A front that differs, does not understand or cannot write stops in words, and harms no other."""
import contextlib
import sqlite3

import pytest

import bus_server
import ledgers.front
from bus_server import Now, Put, Remove, State, Unusable
from tests.kit import inside
from tests.kit.ledger import Fake, Log, ask, do, draft, end, front, log_of, put, request, same, settle


def test_a_front_with_other_results_is_found_and_stops(fronts):
    a, b = fronts("a"), fronts("b")
    put(a, msg="1")
    settle(a, b)
    a.state.writing.execute("DELETE FROM messages")
    a.state.writing.execute("UPDATE mailboxes SET removed = 0")
    do(a, Remove(0, a.last + 1, False, [], 0))
    settle(b)
    put(a, msg="2")
    assert not b.broken
    settle(b)
    settle(b)
    assert b.broken and b.last < a.last, "it applies nothing of a front that has other results, now or later"
    before = a.state.position
    end(b)
    settle(a)
    assert not a.broken and a.state.position == before, "a front that has stopped writes nothing, so it stops nobody"


@pytest.mark.parametrize(
    "entry, why",
    [
        (b'[2, "other", 0, 0]', "format 2: upgrade this front"),
        (b'[1, "other", 0, 0]\n[1, "dance", {}]', "'dance' of format 1 is not known here"),
        (b'[1, "other", 0, 0]\n[9, "put", {}]', "'put' of format 9 is not known here"),
        (b'[1, "other", 0, 0]\n[1, "put", {}]', "other wrote an operation with members that are not known here"),
        (b'[1, "other", 0, 0]\n[1, "raise", {"tick": 1, "new": 1}]', "members that are not known here"),
    ],
    ids=["entry", "kind", "operation", "a member less", "a member more"],
)
def test_what_a_front_does_not_understand_stops_it_in_words(fronts, log, entry, why, capfd, tmp_path):
    a = fronts()
    put(a)
    log.store(entry, "new")
    put_after = []
    a.do(Put([draft()]), None, lambda *_: None, put_after.append)
    settle(a)
    assert a.broken and len(put_after) == 1 and why in inside.said(capfd)
    with pytest.raises(Unusable, match=why.replace("'", ".")):
        fronts("new")


def test_an_operation_that_fails_has_that_as_its_result_everywhere(fronts, monkeypatch, capfd):
    a, b = fronts("a"), fronts("b")
    monkeypatch.setattr(bus_server.Forget, "apply", lambda *_: 1 / 0)
    do(a, bus_server.Forget([["default", "x"]]))
    settle(b)
    put(a)
    settle(b)
    assert not a.broken and not b.broken and a.last == b.last
    assert inside.said(capfd).count("ZeroDivisionError") >= 2


@pytest.mark.parametrize("error", [sqlite3.OperationalError("database or disk is full"), MemoryError()], ids=repr)
def test_a_front_whose_own_file_fails_stops_and_says_that_it_is_unknown(fronts, error, monkeypatch):
    a = fronts()

    def fail(*_):
        raise error

    monkeypatch.setattr(a.state, "apply", fail)
    status, answer = ask(a, "POST", "/send", {"from": "ann", "to": "bob", "msg": "x", "key": "k"})
    assert status == 503 and "it is unknown whether this was stored" in answer["error"] and a.broken
    monkeypatch.undo()
    end(a)
    assert log_of(fronts()) == ["x"]


@pytest.fixture
def locked(monkeypatch):
    """locked(bus): another program locks the copy of this front, until what is returned is called."""
    with contextlib.ExitStack() as stack:

        def lock(bus, give_up=ledgers.front.GIVE_UP):
            monkeypatch.setattr(ledgers.front, "PAUSE", 0.01)
            monkeypatch.setattr(ledgers.front, "GIVE_UP", give_up)
            bus.state.writing.execute("PRAGMA busy_timeout=0")  # SQLite itself waits for 2 s, else
            other = sqlite3.connect(bus.state.path, isolation_level=None, check_same_thread=False)
            stack.callback(other.close)
            other.execute("BEGIN IMMEDIATE")
            return lambda: other.execute("ROLLBACK")

        yield lock


SEND = "POST", "/send", {"from": "ann", "to": "bob", "msg": "x", "key": "k"}


def test_a_send_waits_while_another_program_has_locked_the_copy_and_turns_go_on(fronts, locked, monkeypatch):
    a, b = fronts("a"), fronts("b")
    reader = request(a, "GET", "/recv?to=bob&since=0&block=true")
    settle(a, b)
    unlock, answer, apply, told = locked(a), request(a, *SEND), a.state.apply, []

    def begin(*arguments):
        a.loop.tell(lambda: told.append(answer()) or unlock())  # in a turn
        monkeypatch.setattr(a.state, "apply", apply)
        return apply(*arguments)

    monkeypatch.setattr(a.state, "apply", begin)
    settle(a)
    assert not a.broken and told == [None] and answer()[0] == 200
    assert [each["msg"] for each in reader()[1]["messages"]] == ["x"]
    same(a, b)


def test_a_copy_that_stays_locked_stops_nothing_and_what_was_sent_comes_once(fronts, locked, log):
    a, b = fronts("a"), fronts("b")
    settle(a, b)
    unlock = locked(a, give_up=0.3)
    status, answer = ask(a, *SEND)
    assert status == 503 and "locked the database of this front" in answer["error"]
    assert "it is unknown whether this was stored" in answer["error"] and not a.broken
    before = log.written()
    for _ in range(2):
        status, answer = ask(a, "POST", "/send", {"from": "ann", "to": "bob", "msg": "y"})
        assert status == 503 and "locked" in answer["error"] and "nothing was stored" in answer["error"]
    settle(b)
    assert log.written() == before and log_of(b) == ["x"] and put(b, msg="z")
    unlock()
    settle(a)
    assert log_of(a) == ["x", "z"]
    status, again = ask(a, *SEND)
    assert status == 200 and again["duplicate"] is True and not a.broken
    same(a, b)


def test_what_others_send_reaches_a_copy_when_it_is_locked_no_longer(fronts, locked):
    a, b = fronts("a"), fronts("b")
    reader = request(b, "GET", "/recv?to=bob&since=0&block=true")
    settle(a, b)
    unlock = locked(b, give_up=0.3)
    put(a, msg="1")
    settle(b)
    put(a, msg="2")
    settle(b)
    assert not b.broken and reader() is None
    unlock()
    settle(b)
    assert [each["msg"] for each in reader()[1]["messages"]][:1] == ["1"] and log_of(b) == ["1", "2"]
    same(a, b)


def test_a_ledger_that_has_lost_entries_stops_the_fronts_in_words(fronts, log, capfd):
    """As after a restore. What was acknowledged is in the files of the fronts, and no new front could have it."""
    a, b, c = fronts("a"), fronts("b"), fronts("c")
    settle(a, b, c)
    c.state.ledger.out = True
    put(a, msg="1")
    put(a, msg="2")
    settle(b)
    del log.entries[-2:]
    status, answer = ask(a, "POST", "/send", {"from": "ann", "to": "bob", "msg": "3"})
    assert status == 503 and "this front of the bus stops" in answer["error"] and a.broken
    b.ledger.fronts.beat()
    c.state.ledger.out = False
    settle(b, c)
    assert b.broken and c.broken, "one that has them, too, and one that lacks them"
    said = inside.said(capfd)
    assert said.count("the ledger has lost entries") == 3 and "move --back --ledger-lost" in said
    with pytest.raises(Unusable, match="the ledger has lost entries: .* stop all fronts"):
        fronts("new")


def test_a_copy_of_another_ledger_and_a_bus_of_its_own_are_refused(fronts, tmp_path, log):
    a = fronts()
    put(a)
    end(a)
    with pytest.raises(Unusable, match="copy of another ledger"):
        front(tmp_path / "a.db", Fake(Log()))
    with pytest.raises(Unusable, match="a front's copy of a ledger: start its front"):
        State(str(tmp_path / "a.db"))
    alone = State(str(tmp_path / "alone.db"))
    alone.apply([Put([draft()])], Now(1, 1))
    alone.close()
    with pytest.raises(Unusable, match="a bus of its own"):
        front(tmp_path / "alone.db", Fake(log))


def test_a_damaged_copy_is_refused(fronts, tmp_path):
    a = fronts()
    put(a)
    a.state.writing.execute("UPDATE bus SET lost = 5")
    end(a)
    with pytest.raises(Unusable, match="move it away, and the front makes it anew"):
        fronts()
