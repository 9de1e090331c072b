"""The time of the fronts is that of their ledger, whatever their own clocks say."""
import pytest

import ledgers.clock
import ledgers.front
from tests.kit.ledger import SECOND, ask, end, log_of, put, settle


def test_the_time_of_an_earlier_attempt_does_not_set_the_clock_back(fronts, log, monkeypatch):
    a = fronts()
    a.state.time.offset += 10 * SECOND
    monkeypatch.setattr(ledgers.front, "LOOK", 0.0)
    put(a)
    assert a.state.time.guess() - log.wall.wall > 9 * SECOND
    monkeypatch.undo()
    put(a)
    assert a.state.time.guess() - log.wall.wall < 5 * SECOND


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
