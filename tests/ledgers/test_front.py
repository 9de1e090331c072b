"""Fronts that share a ledger, in this process: their copies are equal, and each fault of the ledger loses nothing."""
import contextlib
import json
import math
import pathlib
import sqlite3
import time

import pytest

import bus_server
import ledgers.clock
import ledgers.front
import tests.kit.ledger
from bus_server import Mark, Marks, Now, Put, Raise, Receipt, Refused, Remove, State, Unusable
from ledgers import Unknown
from ledgers.mirror import Entry
from ledgers.recall import Retract
from tests.kit import inside
from tests.kit.ledger import (
    SECOND,
    Fake,
    Log,
    ask,
    common_look,
    do,
    draft,
    end,
    front,
    invited,
    log_of,
    put,
    request,
    same,
    settle,
    turns,
)
from tests.kit.processes import wait_until


def test_what_is_sent_at_one_front_wakes_the_reader_at_the_other(fronts):
    a, b = fronts("a"), fronts("b")
    reader = request(b, "GET", "/recv?to=bob&since=0&block=true")
    settle(b)
    assert reader() is None
    sent = ask(a, "POST", "/send", {"from": "ann", "to": "bob", "msg": "hello"})
    settle(b)
    status, answer = reader()
    assert (sent[0], status) == (200, 200) and [each["id"] for each in answer["messages"]] == [sent[1]["id"]]
    assert sent[1]["bus"] == answer["bus"]
    same(a, b)


def test_a_hint_is_enough_and_none_too(fronts, log):
    a, b = fronts("a"), fronts("b")
    for hints, looks in (
        (lambda position: [position], False),
        (lambda position: [position, position - 1, position], False),
        (lambda position: [position, position - 1], False),
        (lambda position: [position + 7], False),  # more than there is, as after a restore
        (lambda position: [], True),
    ):
        a.state.ledger.hints = hints
        [tick] = put(a)
        if looks:
            b.ledger.look()
        while b.loop.told or b.loop.actions:
            b.loop.take_turn()
        assert b.last == tick and not b.ledger.busy


def test_the_fronts_have_one_order_and_their_copies_are_equal(fronts):
    a, b = fronts("a"), fronts("b")
    ticks = [put(bus, msg=str(number))[0] for number, bus in enumerate((a, b, b, a, b, a, a))]
    assert ticks == sorted(ticks)
    same(a, b)
    assert a.state.sums[-1] == b.state.sums[-1]
    assert log_of(a) == log_of(b) == list("0123456")


def test_a_front_announces_what_came_between_before_its_own(fronts, log):
    """Another front's entry takes the place that this front would have had."""
    a, b = fronts("a"), fronts("b")
    announced = []
    b.on_announced.append(lambda visible: announced.extend(each.text for each in visible))
    append = b.state.ledger.append

    def late(*arguments):
        b.state.ledger.append = append
        put(a, msg="first")
        return append(*arguments)

    a.state.ledger.hints = lambda position: []
    b.state.ledger.append = late
    assert put(b, msg="second")
    assert ["first" in announced[0], "second" in announced[1]] == [True, True]
    same(a, b)


@pytest.mark.parametrize("limit", ["ENTRIES", "READ_BYTES"])
def test_what_does_not_fit_into_one_read_is_followed_by_further_ones(fronts, monkeypatch, limit):
    """Before its own entry, and after a hint or a look."""
    monkeypatch.setattr(ledgers.front, limit, 2)
    monkeypatch.setattr(tests.kit.ledger, "READ_BYTES", ledgers.front.READ_BYTES)
    a, b = fronts("a"), fronts("b")
    a.state.ledger.hints = b.state.ledger.hints = lambda position: []
    b.ledger.catch_up, b.gate.until = lambda: None, math.inf
    for number in range(5):
        put(a, msg=str(number))
    assert put(b, msg="own")
    del b.ledger.catch_up
    ticks = [put(a, msg=str(number)) for number in range(5)]
    b.ledger.look()
    turns(b)
    assert [b.last] == ticks[-1]
    same(a, b)


def test_a_read_that_shows_less_than_was_appended_is_no_difference(fronts):
    """The engine has answered from a machine that is behind: the sender is told to try again, and the front goes on."""
    a, b = fronts("a"), fronts("b")
    a.state.ledger.hints = b.state.ledger.hints = lambda position: []
    b.ledger.catch_up, b.gate.until = lambda: None, math.inf
    put(a, msg="1")
    read, b.state.ledger.read = b.state.ledger.read, lambda *_: []
    status, answer = ask(b, "POST", "/send", {"from": "ann", "to": "bob", "msg": "2", "key": "k"})
    assert status == 503 and "it is unknown whether this was stored" in answer["error"] and not b.broken
    b.state.ledger.read = read
    del b.ledger.catch_up
    settle(b)
    assert log_of(b) == ["1", "2"]
    same(a, b)


def test_an_answer_keeps_the_front_open_for_as_long_as_is_said(fronts):
    """From the begin of the call: what was true then may have changed while it waited."""
    a = fronts()
    a.ledger.catch_up, a.gate.until = lambda: None, math.inf
    a.state.ledger.slow, before = 0.2, time.monotonic()
    put(a)
    assert before < a.gate.until - ledgers.front.CUT_OFF < time.monotonic() - 0.2


def test_the_time_of_an_earlier_attempt_does_not_set_the_clock_back(fronts, log, monkeypatch):
    a = fronts()
    a.state.time.offset += 10 * SECOND
    monkeypatch.setattr(ledgers.front, "LOOK", 0.0)
    put(a)
    assert a.state.time.guess() - log.wall.wall > 9 * SECOND
    monkeypatch.undo()
    put(a)
    assert a.state.time.guess() - log.wall.wall < 5 * SECOND


def test_an_unknown_outcome_is_mended_by_the_same_id(fronts, log):
    a = fronts()
    a.state.ledger.faults = ["stored", "lost", "stored"]
    put(a, msg="once")
    assert log_of(a) == ["once"] and len(log.written()) == 2, "the entry of the start, and this one"


def test_each_attempt_has_its_deadline_and_all_of_them_one(fronts, monkeypatch):
    """A connection to a machine that is frozen must be given up while there is time for another one."""
    monkeypatch.setattr(ledgers.front, "PAUSE", 0.01)
    monkeypatch.setattr(ledgers.front, "CALL", 0.1)
    monkeypatch.setattr(ledgers.front, "GIVE_UP", 0.5)
    a, given = fronts(), []

    def append(entry, id, deadline):
        given.append((time.monotonic(), deadline, id))
        time.sleep(max(deadline - time.monotonic(), 0))
        raise Unknown("frozen")

    a.state.ledger.append = append
    assert ask(a, "POST", "/send", {"from": "ann", "to": "bob", "msg": "x"})[0] == 503
    its = [each for each in given if each[2] == given[0][2]]  # a heartbeat may follow
    assert len(its) >= 2 and all(deadline - began <= 0.1 for began, deadline, _ in its)
    assert its[-1][1] <= its[0][0] + 0.5


def test_a_refusal_says_when_to_try_again(fronts):
    a = fronts()
    a.broken = True
    with pytest.raises(Refused, match="use another one") as refused:
        a.ledger.apply([Put([draft()])])
    assert refused.value.status == 503 and refused.value.headers == (("Retry-After", "2"),)


def test_a_front_whose_disk_is_full_takes_no_mail_and_neither_do_the_others_for_it(fronts, monkeypatch):
    a, b = fronts("a"), fronts("b")
    monkeypatch.setattr(a.state.view, "has_room", lambda: False)
    assert ask(a, "POST", "/send", {"from": "ann", "to": "bob", "msg": "x"})[0] == 507
    assert put(b, msg="there is room here")
    same(a, b)
    assert log_of(a) == ["there is room here"]


class Echo(bus_server.Operation):
    __slots__ = ("value",)
    kind = "echo"

    def __init__(self, value):
        self.value = value

    def apply(self, state, now):
        return self.value


def test_a_front_applies_its_own_entry_as_all_others_read_it(fronts, monkeypatch):
    """What JSON makes of an operation is not always what it was; and a result is part of the checksum."""
    monkeypatch.setitem(bus_server.OPERATIONS, "echo", Echo)
    a, b = fronts("a"), fronts("b")
    assert do(a, Echo((1, 2))) == [1, 2]
    settle(b)
    put(a)
    settle(b)
    assert not b.broken and a.state.sums[-1] == b.state.sums[-1]


def test_a_send_that_stays_unknown_is_refused_and_comes_once(fronts, log, monkeypatch):
    a, b = fronts("a"), fronts("b")
    monkeypatch.setattr(ledgers.front, "PAUSE", 0.001)
    monkeypatch.setattr(ledgers.front, "GIVE_UP", 0.02)
    message = {"from": "ann", "to": "bob", "msg": "late", "key": "k1"}
    a.state.ledger.faults = ["late"] + ["lost"] * 1000000
    status, answer = ask(a, "POST", "/send", message)
    assert status == 503 and "send it again, with the same key" in answer["error"]
    a.state.ledger.faults = []
    assert log_of(b) == []
    a.state.ledger.deliver()
    settle(a, b)
    assert log_of(a) == ["late"] == log_of(b)
    status, again = ask(b, "POST", "/send", message)
    assert status == 200 and again["duplicate"] is True
    assert log_of(a) == ["late"]
    same(a, b)


def test_a_key_is_one_send_at_all_fronts(fronts):
    a, b = fronts("a"), fronts("b")
    message = {"from": "ann", "to": "bob", "msg": "once", "key": "k1"}
    first, again = ask(a, "POST", "/send", message), ask(b, "POST", "/send", message)
    assert first[1]["id"] == again[1]["id"] and again[1]["duplicate"] is True
    assert ask(b, "POST", "/send", {**message, "msg": "other"})[0] == 409
    same(a, b)


def test_without_its_ledger_a_front_serves_nobody_and_then_again(fronts, monkeypatch):
    a = fronts()
    put(a)
    monkeypatch.setattr(ledgers.front, "CUT_OFF", 0.0)
    settle(a)
    monkeypatch.undo()
    a.state.ledger.out = True
    for path in ("/healthz", "/recv?to=bob&since=0", "/log", "/inbox"):
        status, answer = ask(a, "GET", path)
        assert status == 503 and "cannot reach its ledger" in answer["error"], path
    assert ask(a, "POST", "/send", {"from": "ann", "to": "bob", "msg": "x"})[0] == 503
    help_text = request(a, "GET", "/")
    with pytest.raises(json.JSONDecodeError):
        help_text()  # it is text, and status 200
    a.state.ledger.out = False
    settle(a)
    assert ask(a, "GET", "/healthz")[0] == 200 and len(log_of(a)) == 1


def test_a_front_that_took_long_to_start_serves_nobody_until_it_has_looked_again(fronts, log, monkeypatch):
    """What it knew when it had caught up may be old: its extensions have started meanwhile."""
    a = fronts("a")
    follow = bus_server.load_ledgers("start").follow

    def slow(*arguments):
        mirror = follow(*arguments)
        put(a, msg="meanwhile")
        mirror.asked -= 10.0
        return mirror

    monkeypatch.setattr("ledgers.start.follow", slow)
    b = fronts("b")
    for path in ("/healthz", "/recv?to=bob&since=0", f"/recv?to=bob&since={a.last / SECOND:.6f}"):
        assert request(b, "GET", path)()[0] == 503, path
    turns(b)
    assert request(b, "GET", "/healthz")()[0] == 200
    assert [each["msg"] for each in request(b, "GET", "/recv?to=bob&since=0")()[1]["messages"]] == ["meanwhile"]


def test_a_list_that_waits_for_a_ledger_that_is_out_is_refused_in_words(fronts):
    a = fronts()
    a.ledger.reaches, a.state.ledger.out = 0.0, True
    refused, tried = [], []
    a.state.ledger.append = lambda *_: tried.append(1)
    a.do(Put([draft()]), None, lambda *_: None, refused.append)
    settle(a)
    assert len(refused) == 1 and not tried and len(a.state.ledger.log.written()) == 1 and not a.broken


def test_marks_are_maxima(fronts):
    """Each front knows other marks of the same names; what comes later may be older."""
    a, b = fronts("a"), fronts("b")
    low, middle, high = (put(a, msg=str(number))[0] for number in range(3))
    settle(a, b)
    do(a, Marks([Mark("default", "bob", True, high, high, high)], [], {"aa": 7}))
    do(b, Marks([Mark("default", "bob", False, middle, middle, middle)], [], {"aa": 5}))
    do(b, Marks([Mark("default", "bob", False, None, low, low), Mark("default", "eve", False, None, 0, 5)], [], {}))
    same(a, b)
    for bus in (a, b):
        asked = "SELECT own, read, fetched, seen FROM mailboxes WHERE name = ?"
        assert bus.state.ask(asked, "bob") == (1, high, high, high)
        assert bus.state.ask(asked, "eve") == (0, None, 0, 5)
        assert bus.state.ask("SELECT used FROM uses") == (7,)
    box = b.mailboxes.boxes["default", "bob"]
    assert (box.own, box.read, box.fetched, box.seen) == (True, high, high, high), "what the other front noted"


def test_an_older_mark_of_another_front_sets_nothing_back_in_memory(fronts):
    a, b = fronts("a"), fronts("b")
    low, high = (put(a, msg=str(number))[0] for number in range(2))
    settle(b)
    for own, tick in ((True, high), (False, low), (False, None)):
        do(a, Marks([Mark("default", "bob", own, tick, tick or low, tick or low)], [], {}))
        settle(b)
    box = b.mailboxes.boxes["default", "bob"]
    assert (box.own, box.firm) == (True, True) and {box.read, box.fetched, box.seen, box.reached} == {high}
    assert ask(b, "GET", "/inbox?name=bob")[1]["recipients"]["default"]["bob"] == 0


def test_a_reader_of_another_front_listens_for_as_long_as_it_would_there(fronts, log):
    a, b = fronts("a"), fronts("b")
    now = log.wall.wall
    for name, ago in (("gone", 36), ("here", 5), ("here", 1)):
        do(a, Marks([Mark("default", name, True, 0, 0, now - ago * SECOND)], [], {}))
        settle(b)
        if ago == 5:
            assert b.mailboxes.boxes["default", "here"].until - b.mailboxes.clock() <= 30
    gone, here = (b.mailboxes.boxes["default", name] for name in ("gone", "here"))
    assert not b.mailboxes.online(gone) and b.mailboxes.online(here)
    assert here.listening == now - 5 * SECOND, "since its first poll"
    assert gone.firm and here.firm, "they have rows in the file"


def test_what_is_read_at_one_front_is_known_at_the_other(fronts):
    a, b = fronts("a"), fronts("b")
    [tick] = put(a)
    settle(b)
    watched = request(a, "GET", f"/message/{tick:x}?wait_fetched=25")
    settle(a)
    assert watched() is None and ask(b, "GET", "/inbox?name=bob")[1]["recipients"]["default"]["bob"] == 1
    assert len(ask(b, "GET", "/recv?to=bob&since=0")[1]["messages"]) == 1
    b.save_marks()
    settle(b, a)
    assert watched()[1]["state"] == "fetched"
    ask(b, "GET", f"/recv?to=bob&since={tick / SECOND:.6f}")
    b.save_marks()
    settle(b, a)
    assert ask(a, "GET", "/inbox?name=bob")[1]["recipients"]["default"]["bob"] == 0
    [agent] = ask(a, "GET", "/agents?name=bob")[1]["agents"]
    assert agent["online"] is True


def test_a_cursor_ahead_at_one_front_holds_at_the_other(fronts, log):
    """An old client whose clock is 100 s ahead polls at A; 10 ms later somebody sends at B."""
    a, b = fronts("a"), fronts("b")
    ahead = log.wall.wall + 100 * SECOND
    reader = request(a, "GET", f"/recv?to=bob&since={ahead / SECOND:.6f}&block=true")
    settle(a)
    log.wall.wall += SECOND // 100
    [tick] = put(b)
    assert tick > ahead
    settle(a)
    assert [each["id"] for each in reader()[1]["messages"]] == [f"{tick:x}"]


def test_a_cursor_that_another_front_gave_needs_no_entry(fronts, log):
    a, b = fronts("a"), fronts("b")
    a.state.ledger.hints = lambda position: []
    [tick] = put(a)
    before = log.written()
    assert b.last < tick
    answer = request(b, "GET", f"/recv?to=bob&since={tick / SECOND:.6f}")
    turns(b)
    assert answer()[1]["messages"] == []
    assert b.last == tick and log.written() == before


@pytest.mark.parametrize("error", [-300, 300], ids=["behind", "ahead"])
def test_the_time_is_that_of_the_ledger(fronts, log, monkeypatch, error):
    """A front whose own clock is wrong has the same ticks, ends of ttl and `seen` as the others."""
    monkeypatch.setattr(ledgers.clock, "wall_clock", lambda: log.wall() + error * SECOND)
    a = fronts()
    [tick] = put(a, ttl=10)
    assert abs(tick - log.wall.wall) < SECOND and abs(a.view.clock() - log.wall.wall) < SECOND
    assert len(ask(a, "GET", "/recv?to=bob&since=0")[1]["messages"]) == 1
    log.wall.wall += 11 * SECOND
    put(a, to="eve")
    assert ask(a, "GET", "/recv?to=bob&since=0")[1]["messages"] == []


def test_a_front_learns_from_the_entries_of_others_what_time_it_is(fronts, log):
    """A primary whose clock is ahead: what has expired by it is given to nobody at any front."""
    a, b = fronts("a"), fronts("b")
    put(a, ttl=5)
    log.wall.wall += 10 * SECOND  # not so much that it has to say anew that it lives, and learns the time by that
    put(a, to="eve")
    settle(b)
    assert abs(b.view.clock() - log.wall.wall) < SECOND and log_of(b) == log_of(a)
    assert ask(b, "GET", "/recv?to=bob&since=0")[1]["messages"] == []


def test_a_ledger_whose_clock_steps_back_ends_no_lease_and_lengthens_none(fronts, log):
    a = fronts()
    ticks = [put(a)[0]]
    before = a.state.time.entry.steady
    log.wall.wall -= 3600 * SECOND
    ticks += put(a)
    assert ticks == sorted(ticks) and a.state.time.entry.steady == before
    log.wall.wall += 5 * SECOND
    ticks += put(a)
    assert ticks == sorted(ticks) and 0 <= a.state.time.entry.steady - before - 5 * SECOND < 100
    steady = a.state.time.entry.steady
    end(a)
    again = fronts()
    assert again.state.time.entry.steady - steady < 100, "it is kept in the file"


def test_a_front_that_starts_again_goes_on_and_a_new_one_reads_all(fronts):
    a, b = fronts("a"), fronts("b")
    put(a, msg="before")
    settle(a, b)
    end(b)
    put(a, msg="meanwhile")
    do(a, Remove(0, a.last, False, [], 0))
    b, c = fronts("b"), fronts("c")
    same(a, b, c)
    assert log_of(c) == log_of(b) == log_of(a) == ["meanwhile"]
    assert a.state.bus == b.state.bus == c.state.bus


def test_a_crash_between_append_and_answer_loses_nothing(fronts, tmp_path, log):
    """The entry is in the ledger, and the front dies before it has applied it."""
    a = fronts("a")
    log.store(a.state.to_bytes(Entry([Put([draft(msg="in the ledger")])], [])), "of a front that died")
    end(a)
    assert log_of(fronts("a")) == ["in the ledger"]


def test_retention_and_forgotten_names_reach_the_other_front(fronts):
    a, b = fronts("a"), fronts("b")
    put(a)
    do(a, Marks([Mark("default", "idle", True, 1, 1, 1)], [], {}))
    settle(a, b)
    assert ("default", "idle") in b.mailboxes.boxes
    do(a, Remove(0, a.last + 1, False, [], 0))
    do(a, bus_server.Forget([["default", "idle"]]))
    settle(b)
    assert b.mailboxes.boxes["default", "bob"].removed == a.last and ("default", "idle") not in b.mailboxes.boxes
    assert ask(b, "GET", "/recv?to=bob&since=1")[1].get("gap"), "readers of the other front are told of the gap"
    same(a, b)


def test_a_job_goes_to_one_worker_at_one_front(fronts):
    a, b = fronts("a"), fronts("b")
    claim = {"to": "builds", "wait": 25, "lease": 5}
    waiting = [request(bus, "POST", "/claim", {**claim, "worker": name}) for bus, name in ((a, "w1"), (b, "w2"))]
    more = [request(bus, "POST", "/claim", {**claim, "worker": "another"}) for bus in (a, b)]
    settle(a, b)
    ask(a, "POST", "/send", {"from": "ann", "to": "builds", "msg": "job"})
    settle(b, a)
    has, other = sorted(waiting, key=lambda answer: answer() is None)
    [job] = has()[1]["messages"]
    assert [answer() for answer in (other, *more)] == [None] * 3
    its, others = (a, b) if has is waiting[0] else (b, a)
    assert len(others.mailboxes.parked) == 2
    left = [each.due - others.door.deadlines.clock() for each in others.mailboxes.parked]
    assert max(left) < 6, "they look again when the lease ends"
    nack = {"id": job["id"], "lease": job["lease"]}
    assert ask(its, "POST", "/nack", nack)[0] == 200
    settle(others)
    left = [each.due - others.door.deadlines.clock() for each in others.mailboxes.parked]
    assert max(left) < 0.1, "at once, when the job was given back"
    same(a, b)


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


def test_what_is_not_built_is_refused_in_words(fronts):
    a = fronts()
    for method in ("GET", "PUT"):
        status, answer = ask(a, method, inside.FILE_PATH)
        assert status == 501 and "has no files" in answer["error"]


ALONE = {"bury", "recall", "redact", "later move", "lock"}  # what follows these in memory, no other front needs


def test_what_follows_an_operation_of_an_extension_follows_at_the_other_fronts_too(fronts):
    """An operation that is new is in one of the two lists, because somebody has thought of it."""
    kinds = {each.kind for module in bus_server.load_extensions(()).values() for each in module.OPERATIONS}
    a = fronts()
    assert kinds >= ALONE and kinds - ALONE == a.ledger.elsewhere.keys() & kinds


def test_a_redaction_stops_no_front_whose_copy_is_being_read(fronts, tmp_path, monkeypatch):
    """A backup, or the index of words, reads it: then this front cannot empty its log at once, and another one can."""
    a, b = fronts("a"), fronts("b")
    [tick] = put(a, msg="secret")
    settle(b)
    later = []
    monkeypatch.setattr(b.loop, "later", lambda seconds, action: later.append(action))
    with contextlib.closing(sqlite3.connect(tmp_path / "b.db")) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM messages").fetchall()
        status, answer = ask(a, "POST", "/redact", {"id": f"{tick:x}"})
        settle(b)
    assert status == 200 and answer["overwritten"] is False and "ledger in PostgreSQL" in answer["warning"]
    assert b"secret" in (tmp_path / "b.db-wal").read_bytes()
    later[-1]()
    settle(b, a)
    assert b"secret" not in (tmp_path / "b.db-wal").read_bytes() + (tmp_path / "b.db").read_bytes()
    put(a, msg="2")
    put(b, msg="3")
    same(a, b)
    assert not a.broken and not b.broken


def test_what_was_scheduled_at_a_front_that_has_died_is_sent_by_the_others(fronts, log):
    a, b, c = fronts("a"), fronts("b"), fronts("c")
    others = [each.routes["POST", "/later"].call.__self__.due for each in (a, b, c)]
    for msg in ("once", "taken back"):
        message = {"from": "ann", "to": "bob", "msg": msg}
        status, given = ask(a, "POST", "/later", {"after": 60, "message": message})
        assert status == 200
    settle(b, c)
    assert ask(b, "POST", "/later", {"cancel": given["id"]})[0] == 200
    settle(a, c)
    [held] = {each.held.all for each in others}
    assert 0 < held < 1200
    end(a)
    log.wall.wall += 61 * SECOND
    put(b, to="nobody", msg="and the others learn what time it is")
    settle(c)

    def all_are_sent():
        """In one turn both of them send. On a slow machine an earlier look asked for a pause, or was cut short."""
        for each in others[1:]:
            each.pause = 0
            each.look()
        settle(b, c)
        return not any(each.held.all for each in others[1:])

    wait_until(all_are_sent)
    assert log_of(b) == log_of(c) == ["and the others learn what time it is", "once"]
    assert [each.held.all for each in others[1:]] == [0, 0] and not b.view.ask("SELECT 1 FROM later")
    same(b, c)


def test_who_waits_for_names_is_told_when_they_are_released_at_another_front(fronts):
    a, b = fronts("a"), fronts("b")
    _, held = ask(a, "POST", "/lock", {"from": "ann", "names": ["x"], "ttl": 40})
    waiting = request(b, "POST", "/lock", {"from": "bob", "names": ["x"], "wait": 60})
    settle(b)
    assert ask(a, "POST", "/renew", {"from": "ann", "fence": held["fence"], "ttl": 50})[0] == 200
    settle(b)
    [parked] = b.mailboxes.parked
    assert 40 < parked.due - b.door.deadlines.clock() < 51 and waiting() is None
    assert ask(a, "POST", "/unlock", {"from": "ann", "names": ["x"]})[1]["released"] == 1
    settle(b)
    assert waiting()[0] == 200
    same(a, b)


def test_large_lists_become_several_entries(fronts, log):
    a = fronts()
    done = []
    for number in range(5):
        put = a.ledger.put([draft(msg=f"{number}" * 400_000)], "owner")
        a.do(put, None, lambda *_: done.append(1))
    settle(a)
    assert len(done) == 5 and len(log.written()) == 1 + 2
    assert all(len(entry) < 2 << 20 for _, _, entry in log.entries)


def test_the_deputy_serves_while_the_ledger_is_slow(fronts):
    a = fronts()
    a.state.ledger.slow = 0.2
    told = []
    a.do(Put([draft()]), None, lambda *_: told.append("stored"))
    a.loop.tell(lambda: told.append("served"))
    settle(a)
    assert told == ["served", "stored"]


def test_a_receipt_of_another_front_is_shown(fronts):
    a, b = fronts("a"), fronts("b")
    [tick] = put(a)
    settle(b)
    receipt = Receipt("default", "bob", bus_server.ACKNOWLEDGED, tick, "bob", tick)
    do(b, Marks([Mark("default", "bob", True, tick, tick, tick)], [receipt], {}))
    settle(a)
    assert ask(a, "GET", f"/message/{tick:x}")[1]["by"] == "bob"


def test_a_cursor_ahead_is_an_entry_of_its_own(fronts, log):
    a = fronts()
    put(a)
    do(a, Raise(a.last + 5 * SECOND))
    put(a)
    assert a.last > log.wall.wall


def test_what_was_refused_is_not_followed_in_memory(fronts):
    a, b = fronts("a"), fronts("b")
    told = []
    b.ledger.elsewhere["retract"] = lambda *what: told.append(what)
    do(a, Retract("1", 5))
    settle(b)
    assert told == [] and b.state.position == a.state.position


def test_readers_that_look_while_others_messages_are_removed_are_told_of_the_gap(fronts):
    a, b = fronts("a"), fronts("b")
    put(a)
    settle(b)
    take, seen = b.state.take, []
    b.state.take = lambda *what: (seen.append(b.ledger.removes()), take(*what))[1]
    do(a, Remove(0, a.last + 1, False, [], 0))
    settle(b)
    assert seen == [True] and not b.ledger.removes()


def test_a_refused_operation_is_refused_alone(fronts):
    a, b = fronts("a"), fronts("b")
    put(a, key="k", msg="one")
    refused = []
    a.do(Put([draft(key="k", msg="two")]), None, lambda *_: None, refused.append)
    a.do(Put([draft(msg="three")]), None, lambda *_: None, refused.append)
    settle(a, b)
    assert len(refused) == 1 and log_of(b) == ["one", "three"] and not isinstance(refused[0], Refused)
    assert time.monotonic() < a.gate.until


def test_a_token_made_beside_one_front_holds_at_all_and_so_does_its_revocation(fronts, tmp_path):
    a, b = fronts("a"), fronts("b")
    secret = invited(a)
    for bus in (a, b):
        common_look(a)
        settle(a, b)
        bus.gate.tokens.refresh()
        assert bus.gate.tokens.closed and bus.gate.tokens.grant(f"Bearer {secret}").name == "ann"
    assert pathlib.Path(f"{b.state.path}.tokens").read_text() == pathlib.Path(f"{a.state.path}.tokens").read_text()
    end(a)
    bus_server.COMMANDS["revoke"](["ann", "--db", b.state.path])
    common_look(b)
    settle(b)
    a, c = fronts("a"), fronts("c")
    for bus in (a, b, c):
        bus.gate.tokens.refresh()
        assert bus.gate.tokens.closed
        with pytest.raises(Refused, match="revoked"):
            bus.gate.tokens.grant(f"Bearer {secret}")
    same(a, b, c)
    common_look(a)
    assert not a.loop.actions, "what is in the ledger is not put there again"


def test_the_file_of_tokens_is_read_and_written_only_when_something_is_new(fronts, monkeypatch):
    """A front looks each second."""
    a, b = fronts("a"), fronts("b")
    invited(a)
    common_look(a)
    settle(a, b)
    file = pathlib.Path(f"{b.state.path}.tokens")
    before = file.stat().st_ino
    end(b)
    b = fronts("b")
    assert file.stat().st_ino == before
    common_look(b)
    reads = []
    for bus in (a, b):
        monkeypatch.setattr(bus.gate.tokens, "rows", lambda: reads.append(1) or [])
        common_look(bus)
    assert not reads


def test_a_damaged_file_of_tokens_is_no_exception_each_second(fronts, capfd):
    a = fronts("a")
    invited(a)
    pathlib.Path(f"{a.state.path}.tokens").write_text("{")
    common_look(a)
    assert "Traceback" not in inside.said(capfd)


def test_a_token_that_is_not_in_the_ledger_yet_stays_in_the_file_when_others_come(fronts):
    a, b = fronts("a"), fronts("b")
    for bus in (a, b):
        invited(bus)
    common_look(a)
    settle(a, b)
    assert len(b.gate.tokens.rows()) == 2


def test_a_revocation_beside_a_front_that_was_stopped_holds(fronts):
    a, b = fronts("a"), fronts("b")
    secret = invited(a)
    common_look(a)
    settle(a, b)
    end(a)
    bus_server.COMMANDS["revoke"](["ann", "--db", a.state.path])
    a = fronts("a")
    common_look(a)
    settle(a, b)
    b.gate.tokens.refresh()
    with pytest.raises(Refused, match="revoked"):
        b.gate.tokens.grant(f"Bearer {secret}")
