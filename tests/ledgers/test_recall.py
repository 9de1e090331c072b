"""Taking a message back on several fronts: not if a reader of any front has it; and then no reader gets it."""
import pytest

import ledgers.front
from bus_server import ALONE, Marks, Put, Raise, presented
from ledgers import heartbeat, recall
from ledgers.mirror import Entry
from ledgers.recall import Release, Retract, Withhold
from tests.kit.ledger import (
    SECOND,
    ask,
    common_look,
    do,
    draft,
    end,
    invited,
    kill,
    log_of,
    put,
    request,
    same,
    settle,
    turns,
)


def take_back(bus, tick):
    return request(bus, "POST", "/recall", {"id": f"{tick:x}"})


def received(bus, since=0):
    """What a reader of bob's mail gets, and its next cursor."""
    status, answer = ask(bus, "GET", f"/recv?to=bob&since={since}")
    assert status == 200
    return [each["msg"] for each in answer["messages"]], answer["now"]


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """A slow machine is no front that does not answer."""
    monkeypatch.setattr(recall, "VOTES", 60)


@pytest.fixture
def sent(fronts):
    """Two fronts, and a message from ann that both have."""
    a, b = fronts("a"), fronts("b")
    [tick] = put(a)
    settle(a, b)
    return a, b, tick


def test_what_nobody_has_is_taken_back_and_reaches_no_reader_of_any_front(sent):
    a, b, tick = sent
    answer = take_back(a, tick)
    settle(a, b, a)
    assert answer()[0] == 200
    for bus in (a, b):
        assert received(bus)[0] == []
        assert ask(bus, "GET", f"/message/{tick:x}")[1]["state"] == "recalled"
        assert not bus.withheld
    assert ask(b, "POST", "/recall", {"id": f"{tick:x}"})[0] == 200, "a retry"
    assert a.state.ask("SELECT count(*) FROM withheld") == (0,)
    same(a, b)


def test_what_a_reader_of_another_front_has_is_not_taken_back(sent):
    """Though the other front has not yet said it by its marks."""
    a, b, tick = sent
    assert received(b)[0] == ["x"]
    answer = take_back(a, tick)
    settle(a, b, a, b)
    status, said = answer()
    assert status == 409 and "it was fetched" in said["error"]
    assert received(a)[0] == ["x"] and not a.withheld and not b.withheld
    same(a, b)


def test_what_was_read_by_its_id_at_another_front_is_not_taken_back(sent):
    a, b, tick = sent
    b.mailboxes.note("default", "bob", ALONE, tick, "bob")
    answer = take_back(a, tick)
    settle(a, b, a, b)
    assert answer()[0] == 409


def test_while_fronts_decide_no_reader_gets_the_message_and_no_cursor_passes_it(sent):
    a, b, tick = sent
    answer = take_back(a, tick)
    settle(a)
    settle(b)
    assert answer() is None
    for bus in (b, a):
        messages, cursor = received(bus)
        assert messages == [] and cursor < tick / SECOND
        assert ask(bus, "GET", f"/message/{tick:x}")[1].get("msg") is None
        assert log_of(bus) == []
    settle(a)
    assert answer()[0] == 200
    settle(b)
    assert received(b, cursor)[0] == []


def test_the_answer_of_each_front_is_waited_for(fronts):
    a, b, c = fronts("a"), fronts("b"), fronts("c")
    [tick] = put(a)
    settle(a, b, c)
    assert received(c)[0] == ["x"]
    answer = take_back(a, tick)
    settle(a, b, a)
    assert answer() is None, "one of two has answered"
    settle(c, a)
    assert answer()[0] == 409


def test_a_front_that_does_not_answer_keeps_the_message_and_its_readers_get_it(sent, monkeypatch):
    a, b, tick = sent
    monkeypatch.setattr(recall, "VOTES", 0)
    answer = take_back(a, tick)
    b.state.ledger.out = True
    settle(a)
    a.loop.take_turn()
    settle(a)
    status, said = answer()
    assert status == 503 and f"{b.state.front} did not say" in said["error"]
    assert received(a)[0] == ["x"]
    b.state.ledger.out = False
    settle(b, a, b)
    assert received(b)[0] == ["x"] and not b.withheld
    same(a, b)


def test_who_asks_again_and_again_keeps_no_mail_from_its_reader(sent, monkeypatch):
    """While a front does not answer, each request would withhold the message, and all behind it, for 2 s."""
    a, b, tick = sent
    monkeypatch.setattr(recall, "VOTES", 0)
    first = take_back(a, tick)
    settle(a)
    a.loop.take_turn()
    settle(a)
    assert first()[0] == 503
    monkeypatch.setattr(recall, "VOTES", 60)
    entries = len(a.state.ledger.log.written())
    again = take_back(a, tick)
    turns(a)
    assert again()[0] == 503 and b.state.front in again()[1]["error"] and not a.withheld
    assert len(a.state.ledger.log.written()) == entries and received(a)[0] == ["x"]
    settle(b)
    b.ledger.fronts.beat()
    [later] = put(a, to="carol")
    settle(b, a)
    answer = take_back(a, later)
    settle(a, b, a)
    assert answer()[0] == 200, "it is asked again as soon as it was heard of"
    same(a, b)


def test_each_front_that_did_not_answer_is_remembered(fronts, log, monkeypatch):
    """Not only the last one: another request for the first message would withhold it for 2 s."""
    a, b, c = fronts("a"), fronts("b"), fronts("c")
    [first] = put(a)
    settle(c)
    b.state.ledger.out = True
    log.wall.wall += heartbeat.LIVE + SECOND
    for bus in (a, c):
        bus.ledger.fronts.beat()
        settle(bus)
    monkeypatch.setattr(recall, "VOTES", 0)
    [second] = put(a)
    for tick, votes, silent in ((first, c, b), (second, None, c)):
        answer = take_back(a, tick)
        turns(a)
        if votes:
            settle(votes, a)
        a.loop.take_turn()
        turns(a)
        assert answer()[0] == 503 and silent.state.front in answer()[1]["error"]
    entries = len(log.entries)
    answer = take_back(a, first)
    turns(a)
    assert answer()[0] == 503 and b.state.front in answer()[1]["error"] and len(log.entries) == entries


def test_a_front_that_fell_silent_before_the_message_was_sent_is_not_waited_for(fronts, log):
    a, b = fronts("a"), fronts("b")
    [before] = put(a, msg="before")
    log.wall.wall += heartbeat.LIVE + SECOND
    a.ledger.fronts.beat()
    settle(a)
    [after] = put(a, msg="after")
    a.ledger.fronts.beat()
    settle(a)
    answers = [take_back(a, tick) for tick in (before, after)]
    settle(a)
    assert answers[0]() is None and answers[1]()[0] == 200
    settle(b, a)
    assert answers[0]()[0] == 200
    same(a, b)


def test_a_front_that_comes_back_gives_nobody_what_was_taken_back_without_it(fronts, log):
    """Its readers wait there, and it reads the message before it reads that the message was taken back."""
    a, b = fronts("a"), fronts("b")
    settle(a, b)
    parked = request(b, "GET", "/recv?to=bob&since=0&block=true")
    settle(b)
    b.state.ledger.out = True
    log.wall.wall += heartbeat.LIVE + SECOND
    a.ledger.fronts.beat()
    settle(a)
    answer = take_back(a, *put(a))
    settle(a)
    assert answer()[0] == 200
    b.state.ledger.out, refused = False, []
    take, b.ledger.take = b.ledger.take, lambda *entry: (take(*entry), refused.append(ask_now(b)))[0]
    assert parked() is None
    settle(b)
    assert parked()[1]["messages"] == [] and received(b)[0] == []
    settle(a)
    assert 503 in refused and len(a.ledger.fronts.live) == 2
    [later] = put(a, msg="later")
    settle(b)
    assert received(b)[0] == ["later"], "it serves again as soon as the others have heard of it"
    same(a, b)


def ask_now(bus):
    """The status of a look at a mailbox, in the middle of a turn."""
    answer = request(bus, "GET", "/recv?to=bob&since=0&peek=true")()
    return answer and answer[0]


def test_a_front_that_is_not_heard_of_serves_nobody(fronts, log):
    """The clock of the ledger went forward: until its next heartbeat, the others do without it."""
    a, b = fronts("a"), fronts("b")
    log.wall.wall += 3600 * SECOND
    for bus in (a, b):
        bus.loop.timers.clear()  # on a slow machine the next heartbeat would be due
        bus.ledger.fronts.beat = lambda: None
    put(a)
    settle(b)
    for bus in (a, b):
        assert ask(bus, "GET", "/recv?to=bob&since=0")[0] == 503
        del bus.ledger.fronts.beat
        bus.ledger.fronts.beat()
        settle(bus)
        assert received(bus)[0] == ["x"]


def test_a_poll_that_came_before_a_front_finds_that_it_is_silent_is_refused(fronts, log):
    """Its cursor is ahead, from another front: the front reads on to answer it."""
    a, b = fronts("a"), fronts("b")
    log.wall.wall += heartbeat.LIVE + SECOND
    a.ledger.fronts.beat()
    settle(a)
    [tick], _ = put(a, msg="seen there"), put(a, msg="x")
    b.loop.timers.clear()  # on a slow machine the next heartbeat would be due
    b.ledger.fronts.beat = lambda: None
    answer = request(b, "GET", f"/recv?to=bob&since={tick / SECOND:.6f}")
    turns(b)
    assert answer()[0] == 503 and "have not heard of this one" in answer()[1]["error"] and b.last > tick
    del b.ledger.fronts.beat
    b.ledger.fronts.beat()
    turns(b)
    assert received(b, tick / SECOND)[0] == ["x"]


def test_a_send_that_is_under_way_when_a_front_finds_that_it_is_silent_is_unknown(fronts, log, monkeypatch):
    """What it stores could be taken back without this front. It comes as an entry of another front, and once."""
    a, b = fronts("a"), fronts("b")
    b.ledger.catch_up = lambda: None  # it finds it when its entry has its place, behind one of the other front
    log.wall.wall += heartbeat.LIVE + SECOND
    a.ledger.fronts.beat()
    settle(a)
    answer = request(b, "POST", "/send", {"from": "ann", "to": "bob", "msg": "x", "key": "k"})
    turns(b)
    assert answer()[0] == 503 and "it is unknown whether this was stored" in answer()[1]["error"]
    del b.ledger.catch_up
    settle(b)
    assert received(b)[0] == ["x"]
    same(a, b)


def test_a_message_whose_tick_is_ahead_is_not_taken_back_without_a_front_that_may_have_given_it(fronts, log):
    """A reader of the first contract raised the ticks by its cursor. The front gave it the message, and was cut off."""
    a, b = fronts("a"), fronts("b")
    do(a, Raise(log.wall.wall + 299 * SECOND))
    [tick] = put(a)
    settle(b)
    assert received(b)[0] == ["x"]
    b.state.ledger.out = True
    log.wall.wall += heartbeat.LIVE + SECOND
    a.ledger.fronts.beat()
    settle(a)
    answer = take_back(a, tick)
    settle(a)
    assert answer() is None
    b.state.ledger.out = False
    settle(b, a)
    assert answer()[0] == 409
    same(a, b)


def test_a_front_that_has_ended_or_runs_again_is_not_waited_for(fronts):
    a, b = fronts("a"), fronts("b")
    [one], [two] = put(a), put(a)
    settle(b)
    end(b)
    first = take_back(a, one)
    settle(a)
    assert first()[0] == 200
    kill(fronts("b"))
    b = fronts("b")
    second = take_back(a, two)
    settle(a, b, a)
    assert second()[0] == 200
    same(a, b)


def test_a_front_that_starts_while_others_decide_withholds_the_message_too(sent, fronts):
    a, b, tick = sent
    answer = take_back(a, tick)
    settle(a)
    c = fronts("c")
    assert received(c)[0] == []
    settle(b, a)
    assert answer()[0] == 200
    settle(c)
    assert received(c)[0] == [] and not c.withheld
    same(a, b, c)


def test_what_a_front_withholds_for_one_that_died_is_released(sent, fronts, monkeypatch):
    a, b, tick = sent
    monkeypatch.setattr(recall, "HELD", 0)
    take_back(a, tick)
    turns(a)
    kill(a)
    settle(b)
    b.loop.take_turn()
    settle(b)
    assert received(b)[0] == ["x"]
    a = fronts("a")
    assert received(a)[0] == ["x"]
    same(a, b)


def test_a_release_that_the_ledger_does_not_take_is_tried_again(sent, monkeypatch):
    a, b, tick = sent
    monkeypatch.setattr(ledgers.front, "PAUSE", 0.001)
    monkeypatch.setattr(ledgers.front, "GIVE_UP", 0.02)
    later, recalls = [], b.ledger.detours["recall"].__self__
    monkeypatch.setattr(b.loop, "later", lambda seconds, action: later.append(action))
    take_back(a, tick)
    turns(a)
    kill(a)
    settle(b)
    for faults in (["lost"] * 1000000, []):
        b.state.ledger.faults = faults
        [let_go] = [each for each in later if getattr(each, "func", None) == recalls.let_go]
        later.clear()
        let_go()
        settle(b)
        assert bool(b.withheld) == bool(faults)
    assert received(b)[0] == ["x"]


def test_what_was_released_is_not_taken_back_by_an_entry_that_comes_late(sent, monkeypatch):
    a, b, tick = sent
    monkeypatch.setattr(ledgers.front, "PAUSE", 0.001)
    monkeypatch.setattr(ledgers.front, "GIVE_UP", 0.02)
    answer = take_back(a, tick)
    settle(a)
    settle(b)
    a.state.ledger.faults = ["late"] + ["lost"] * 1000000
    settle(a)
    assert answer()[0] == 503
    a.state.ledger.faults = []
    recalls = b.ledger.detours["recall"].__self__
    [id] = recalls.held
    recalls.let_go(id)
    settle(b)
    assert received(b)[0] == ["x"]
    a.state.ledger.deliver()
    settle(a, b)
    for bus in (a, b):
        assert ask(bus, "GET", f"/message/{tick:x}")[1]["state"] != "recalled"
    same(a, b)


def test_two_requests_for_one_message_at_once_are_both_granted(sent):
    a, b, tick = sent
    answers = [take_back(bus, tick) for bus in (a, b)]
    settle(a, b)
    settle(a, b)
    assert [answer()[0] for answer in answers] == [200, 200] and not a.withheld and not b.withheld
    same(a, b)


def test_a_job_that_a_worker_at_another_front_has_is_not_taken_back(sent):
    a, b, tick = sent
    answer = take_back(a, tick)
    settle(a)
    settle(b)
    claimed = ask(b, "POST", "/claim", {"to": "bob", "wait": 0, "lease": 5, "worker": "w"})
    assert len(claimed[1]["messages"]) == 1, "though the front has said that nobody has the message"
    settle(a, b)
    status, said = answer()
    assert status == 409 and "a worker has it" in said["error"] and not a.withheld and not b.withheld
    same(a, b)


def test_a_message_that_is_gone_cannot_be_withheld(fronts):
    a, b = fronts("a"), fronts("b")
    assert do(a, Withhold(a.state.front, "1", 5)) == [b.state.front]
    settle(b)
    assert not b.withheld
    refused = []
    a.do(Retract("1", 5), None, lambda *_: None, refused.append)
    do(a, Release("1"))
    assert len(refused) == 1
    same(a, b)


def test_with_one_front_a_message_is_taken_back_at_once(fronts):
    a = fronts()
    [tick] = put(a)
    assert ask(a, "POST", "/recall", {"id": f"{tick:x}"})[0] == 200
    assert received(a)[0] == []


def test_what_was_counted_for_the_receiver_is_counted_anew_at_each_front(sent):
    a, b, tick = sent
    for bus in (a, b):
        assert ask(bus, "GET", "/inbox?name=bob")[1]["recipients"]["default"]["bob"] == 1
    answer = take_back(a, tick)
    settle(a, b, a, b)
    assert answer()[0] == 200
    for bus in (a, b):
        assert ask(bus, "GET", "/inbox?name=bob")[1]["recipients"]["default"].get("bob", 0) == 0


def test_a_send_whose_token_was_revoked_at_another_front_before_is_not_stored(fronts):
    """The front that admitted it did not know."""
    a, b = fronts("a"), fronts("b")
    secret = invited(a)
    common_look(a)
    settle(a, b)
    b.gate.tokens.refresh()
    a.gate.tokens.change(lambda rows: [{**row, "revoked": 5} for row in rows])
    b.ledger.catch_up = lambda: None  # it knows nothing new when it admits and writes
    answer = request(b, "POST", "/send", {"from": "ann", "to": "bob", "msg": "x"}, f"Bearer {secret}")
    common_look(a)
    turns(a)
    turns(b)
    del b.ledger.catch_up
    status, said = answer()
    assert status == 401 and "revoked at another front: nothing was stored" in said["error"]
    settle(a, b)
    assert a.state.ask("SELECT count(*) FROM messages") == (0,)
    assert do(b, Marks([], [], {})) is None and not b.broken
    same(a, b)


def test_a_front_that_catches_up_refuses_the_sends_that_others_have_refused(fronts, log):
    """Entries that share a transaction there: which token asked for which of their operations?"""
    a = fronts("a")
    valid, revoked = (presented(f"Bearer {invited(a)}")[0] for _ in range(2))
    a.gate.tokens.change(lambda rows: [{**row, "revoked": 5 if row["id"] == revoked else None} for row in rows])
    common_look(a)
    settle(a)
    for token in (valid, revoked, valid):
        log.store(a.state.to_bytes(Entry([Put([draft(msg=token)])], [token])), f"{len(log.entries)}")
    settle(a)
    c = fronts("c")
    same(a, c)
    assert c.state.writing.execute("SELECT msg FROM readable").fetchall() == [(valid,)] * 2 and not a.broken
