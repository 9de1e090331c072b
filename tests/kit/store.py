"""A State on a file of its own, and the lists of operations that its tests give it."""
import contextlib

import pytest

from bus_server import (
    EVERYONE,
    Now,
    Poll,
    Put,
    Remove,
    State,
    draft,
)
from tests.kit.clock import Clock


def message(to, msg="x", sender="alice", key=None, **members):
    return draft({"from": sender, "to": to, "msg": msg, **members}, key)


def poll(*names, since=0, limit=1000, channel="default", observer=False, sender=None):
    me = None if observer else names[0]
    return Poll(me, names + (() if observer else (EVERYONE,)), channel, sender, since, limit, 0, False)


def commit(store, *drafts, also=()):
    """One send for each draft, and the operations in `also`, in one list; what was applied.

    As the Ledger does, it asks first whether the disk has room.
    """
    room, wall = store.view.has_room(), store.view.clock()
    puts = [Put(each if isinstance(each, list) else [each], room) for each in drafts]
    operations = sorted([*puts, *also], key=lambda operation: operation.rank)
    applied = store.apply(operations, Now(wall, wall))
    store.view.tail = store.tail
    results = dict(zip(map(id, operations), applied.results))
    return applied._replace(results=[results[id(operation)] for operation in [*puts, *also]])


def remove(before, above=0, keys_from=0):
    return Remove(above, before, False, [], keys_from)


def texts(store, *names, **query):
    return [found.text.split('"msg": ')[1].strip('"') for found in store.view.after(poll(*names, **query), 1 << 62)[0]]


class OnSqlite:
    """Fixtures of a test class: the store, its clock, and what opens it anew or fills its disk."""

    @pytest.fixture
    def clock(self):
        return Clock(1_000_000_000_000)

    @pytest.fixture
    def reopen(self, store, clock, tmp_path):
        opened = []

        def again():
            store.close()
            opened.append(State(str(tmp_path / "bus.db"), clock))
            return opened[-1]

        yield again
        for each in opened:
            each.close()

    @pytest.fixture
    def full_disk(self, store):
        """A database that may not grow stands for a disk that is full."""

        @contextlib.contextmanager
        def full():
            store.writing.execute("PRAGMA max_page_count=1")  # it becomes the size that it has
            yield
            store.writing.execute("PRAGMA max_page_count=1000000")

        return full

    @pytest.fixture
    def store(self, tmp_path, clock):
        store = State(str(tmp_path / "bus.db"), clock)
        yield store
        store.close()
