"""Copies of fronts: a new front starts from one, and what all of them have leaves the ledger (ledgers/copies.py)."""
import contextlib

import pytest

from bus_server import Mark, Marks, Put, Raise, Remove
from tests.kit import inside
from tests.kit.ledger import Fake, Log, front, settle
from tests.ledgers.test_front import SECOND, Clock, do, draft, put, same


@pytest.fixture
def log():
    return Log(Clock())


@pytest.fixture
def fronts(tmp_path, log):
    """front(name): a front with the copy NAME.db; again, after it was closed, the same one started anew."""
    with contextlib.ExitStack() as stack:

        def make(name="a", *options):
            bus = front(tmp_path / f"{name}.db", Fake(log), *options)
            stack.callback(lambda: bus.loop.closed or inside.close(bus))
            return bus

        yield make


def test_entries_that_share_a_transaction_have_the_results_of_entries_that_do_not(fronts, log):
    """Among them: a key again, a key that is refused, a cursor ahead, a clock that steps back, a removal."""
    a, refused = fronts("a"), []
    for number in range(40):
        put(a, msg=str(number), key=f"k{number % 7}", ttl=number % 3 or None) if number < 7 else put(a, msg=str(number))
        if number % 9 == 4:
            put(a, msg=str(number // 9), key=f"k{number // 9}", ttl=(number // 9) % 3 or None)
            a.do(Put([draft(msg="other", key="k1")]), None, lambda *_: None, refused.append)
            settle(a)
        if number == 12:
            do(a, Raise(a.last + 5 * SECOND))
        if number == 20:
            log.wall.wall -= 100 * SECOND
        if number == 30:
            do(a, Marks([Mark("default", "bob", True, a.last, a.last, a.last)], [], {}))
            do(a, Remove(0, a.last, True, [], 0))
    assert len(refused) == 4
    b = fronts("b")
    same(a, b)
    assert list(a.state.sums) == list(b.state.sums), "after each entry, also within a transaction"


def test_a_front_that_catches_up_makes_few_transactions(fronts):
    a, b = fronts("a"), fronts("b")
    for number in range(150):
        put(a, msg=str(number))
    commits = []
    b.state.writing.set_trace_callback(lambda statement: commits.append(statement) if statement == "COMMIT" else None)
    b.state.replay()
    assert b.state.position == a.state.position and len(commits) < 5
