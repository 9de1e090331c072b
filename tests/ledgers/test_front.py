"""Fronts that share a ledger, in this process: their copies are equal, and each fault of the ledger loses nothing."""
import json
import math
import time

import pytest

import bus_server
import ledgers.clock
import ledgers.front
import tests.kit.ledger
from bus_server import Put, Refused, Remove
from ledgers import Unknown
from ledgers.mirror import Entry
from tests.kit.ledger import SECOND, ask, do, draft, end, log_of, put, request, same, settle, turns


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
        while b.loop.actions:
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


@pytest.mark.parametrize("names", ["ab", "aa"], ids=["two fronts", "the control: one front"])
def test_two_that_answer_each_other_across_fronts_are_warned_and_then_stopped(fronts, names):
    buses = {name: fronts(name) for name in set(names)}
    sent = []
    for turn in range(130):
        sender, to = ("ann", "bob") if turn % 2 == 0 else ("bob", "ann")
        bus = buses[names[turn % 2]]
        sent.append(ask(bus, "POST", "/send", {"from": sender, "to": to, "msg": "x", "key": str(turn)}))
        settle(*buses.values())
    assert [status for status, _ in sent] == [200] * 121 + [429, 200] * 4 + [429]
    assert ["warning" in answer for _, answer in sent[:121]] == [False] * 30 + [True] * 91
    assert "answered each other 30 times" in sent[30][1]["warning"]


def test_what_is_no_turn_at_one_front_is_none_when_another_front_has_it(fronts):
    """A message to all, one that was stored before, and one more of who sent last."""
    a, b = fronts("a"), fronts("b")
    pair = "default", "ann", "bob"
    put(a)
    put(a)
    put(a, sender="bob", to="all")
    settle(b)
    [(last, _, turns)] = b.storms.turns.values()
    assert (last, turns) == ("ann", [])
    put(a, sender="bob", to="ann", key="k")
    put(a)
    put(a, sender="bob", to="ann", key="k")
    settle(b)
    last, _, turns = b.storms.turns[pair]
    assert last == "ann" and len(turns) == 2


def test_turns_that_a_front_learns_late_count_when_they_were(fronts, log):
    """It was cut off for two hours, in which two agents answered each other once a minute."""
    a, b = fronts("a"), fronts("b")
    b.state.ledger.out = True
    for turn in range(130):
        sender, to = ("ann", "bob") if turn % 2 == 0 else ("bob", "ann")
        put(a, sender=sender, to=to)
        log.wall.wall += 60 * SECOND
    b.state.time.offset += 130 * 60 * SECOND
    b.state.ledger.out = False
    settle(b)
    status, answer = ask(b, "POST", "/send", {"from": "ann", "to": "bob", "msg": "x"})
    assert (status, "warning" in answer) == (200, False), answer
    _, _, turns = b.storms.turns["default", "ann", "bob"]
    assert 5 < len(turns) < 15


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


def test_a_look_without_an_answer_gives_a_send_no_more_time(fronts, monkeypatch):
    """What a send may wait counts from the last answer of the ledger, so the time of the look is in it."""
    monkeypatch.setattr(ledgers.front, "PAUSE", 0.01)
    monkeypatch.setattr(ledgers.front, "CALL", 0.2)
    monkeypatch.setattr(ledgers.front, "GIVE_UP", 0.3)
    a, given = fronts(), []
    put(a)

    def frozen(*arguments):
        given.append(arguments)
        time.sleep(max(arguments[-1] - time.monotonic(), 0))
        raise Unknown("frozen")

    a.state.ledger.read = a.state.ledger.append = frozen
    began = time.monotonic()
    assert ask(a, "POST", "/send", {"from": "ann", "to": "bob", "msg": "x"})[0] == 503
    look, first, *more = given
    assert type(look[0]) is int, "it looks before it appends"
    assert all(deadline <= began + 0.3 for _, id, deadline in [first, *more] if id == first[1])


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


def test_a_power_cut_takes_only_the_newest_entries_of_a_copy(fronts, log, tmp_path):
    """SQLite brings the log to the disk before it is folded into the database, so what a cut may take is its end."""
    a = fronts("a")
    assert a.state.writing.execute("PRAGMA synchronous").fetchone() == (1,), "NORMAL"
    for number in range(50):
        put(a, msg=str(number))
    log_file = (tmp_path / "a.db-wal").read_bytes()
    for tenths in (0, 3, 9):
        (tmp_path / f"cut{tenths}.db").write_bytes((tmp_path / "a.db").read_bytes())
        (tmp_path / f"cut{tenths}.db-wal").write_bytes(log_file[: len(log_file) * tenths // 10])
        same(a, fronts(f"cut{tenths}"))


def test_a_crash_between_append_and_answer_loses_nothing(fronts, tmp_path, log):
    """The entry is in the ledger, and the front dies before it has applied it."""
    a = fronts("a")
    log.store(a.state.to_bytes(Entry([Put([draft(msg="in the ledger")])], [])), "of a front that died")
    end(a)
    assert log_of(fronts("a")) == ["in the ledger"]


def test_large_lists_become_several_entries(fronts, log):
    a = fronts()
    done = []
    for number in range(5):
        put = a.ledger.put([draft(msg=f"{number}" * 400_000)], "owner")
        a.do(put, None, lambda *_: done.append(1))
    settle(a)
    assert len(done) == 5 and len(log.written()) == 1 + 2
    assert all(len(entry) < 2 << 20 for _, _, entry in log.entries)


def test_large_schedules_of_one_turn_become_several_entries(fronts, log):
    """Also an operation that is no send has its bytes."""
    a, message = fronts(), {"from": "ann", "to": "bob", "msg": "x" * 200_000}
    answers = [request(a, "POST", "/later", {"after": 3600, "message": message}) for _ in range(12)]
    settle(a)
    assert {answer()[0] for answer in answers} == {200} and len(log.written()) == 1 + 2
    assert all(len(entry) < ledgers.front.ENTRY_BYTES + 300_000 for _, _, entry in log.entries)


def test_a_text_is_at_most_seven_times_as_long_in_its_entry(fronts, log):
    """Each byte of a text that is a control character becomes six in the message, and seven in the entry."""
    a, body = fronts(), "\x01" * 200_000
    head = f"POST /send?from=ann&to=bob HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    connection = bus_server.Connection(a.door)
    connection.connection_made(tests.kit.ledger.Transport())
    connection.data_received((head + body).encode())
    settle(a)
    [size] = [len(entry) for _, _, entry in log.entries if b"u0001" in entry]
    assert 7 * len(body) < size < 7 * len(body) + 1000


def test_the_deputy_serves_while_the_ledger_is_slow(fronts):
    a = fronts()
    a.state.ledger.slow = 0.2
    told = []
    a.do(Put([draft()]), None, lambda *_: told.append("stored"))
    a.loop.tell(lambda: told.append("served"))
    settle(a)
    assert told == ["served", "stored"]


def test_a_refused_operation_is_refused_alone(fronts):
    a, b = fronts("a"), fronts("b")
    put(a, key="k", msg="one")
    refused = []
    a.do(Put([draft(key="k", msg="two")]), None, lambda *_: None, refused.append)
    a.do(Put([draft(msg="three")]), None, lambda *_: None, refused.append)
    settle(a, b)
    assert len(refused) == 1 and log_of(b) == ["one", "three"] and not isinstance(refused[0], Refused)
    assert time.monotonic() < a.gate.until
