"""The index by mailbox, in runs, answers as a plain index would, before, during and after each flush and merge.

    INDEX_LISTS=10000 python -m pytest tests/core/test_index.py    the same with more lists of operations
"""

import contextlib
import json
import os
import random
import shutil
import sqlite3
from unittest import mock

import pytest

import bus_server
from bus_extensions.replies import Recall
from bus_extensions.work import Claim
from bus_server import MAILBOX, Forget, Index, Now, Put, Refused, Remove, State, draft, index_is_whole, load_extensions
from tests.kit.inside import said

LISTS = int(os.environ.get("INDEX_LISTS", "360"))
BEGIN = 1795000000 * 1000000  # us
NAMES = ("ann", "bob", "cleo", "all", "rare")
WEIGHTS = (40, 40, 10, 10, 1)
WORK = load_extensions(())["work"]
IN_ORDER = f"SELECT tick, sender FROM messages WHERE mailbox = {MAILBOX} AND tick > ? AND tick <= ? ORDER BY tick"


class World:
    """A State with small runs, and random lists of operations for it."""

    def __init__(self, path, seed):
        self.path, self.random, self.now = path, random.Random(seed), BEGIN
        self.flush, self.merged = self.random.choice((1, 3, 7)), self.random.choice((2, 3))
        self.slice, self.per_message = self.random.choice((1, 2, 5)), self.random.choice((3, 8))
        self.open()

    def open(self):
        self.state = State(str(self.path), lambda: self.now)
        self.state.add_tables("work", WORK.NOUN, WORK.TABLES)
        self.state.writing.execute("PRAGMA synchronous=OFF")  # nobody pulls the plug here
        index = self.state.index
        index.FLUSH_MESSAGES, index.RUNS_MERGED = self.flush, self.merged
        index.SLICE, index.PLACES_PER_MESSAGE = self.slice, self.per_message

    def killed(self):
        """What a kill -9 leaves: the file and its log as they are on the disk."""
        other = self.path.with_name(f"{self.random.random()}.db")
        for suffix in ("", "-wal"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(f"{self.path}{suffix}", f"{other}{suffix}")
        self.state.close()
        self.path = other
        self.open()

    def tick(self):
        """Any, the newest, or one at the edge of a run."""
        edges = [upto for (upto,) in self.state.writing.execute("SELECT upto FROM runs WHERE upto > 0").fetchall()]
        return self.random.choice((BEGIN, self.now, self.state.last, self.random.randint(BEGIN, self.now), *edges))

    def put(self):
        to = self.random.choices(NAMES, WEIGHTS, k=self.random.choice((1, 1, 1, 3, 30)))
        ttl = self.random.choice(({}, {}, {"ttl": 0.001}, {"ttl": 60}))
        return Put([draft({"from": "dora", "to": each, "msg": "x", **ttl}, None) for each in to])

    def list(self):
        operations = [self.put() for _ in range(self.random.choice((0, 1, 1, 2)))]
        also = self.random.random()
        name = self.random.choice(NAMES)
        if also < 0.15:
            fetched_only, some = self.random.random() < 0.5, self.random.choice((2, 50))
            operations.append(Remove(0, self.tick() + 1, fetched_only, [], 0, some))
        elif also < 0.3:
            operations.append(Claim("default", name, 2, 1000, self.random.getrandbits(64), "worker", 5))
        elif also < 0.4:
            operations.insert(len(operations), Recall(self.tick()))
        elif also < 0.45:
            operations.append(Forget([["default", name]]))
        return sorted(operations, key=lambda operation: operation.rank)

    def apply(self):
        self.now += self.random.choice((1, 1000, 100000))
        operations, announced = self.list(), self.state.last
        fails = self.random.random() < 0.1
        if fails:
            self.state.writing.set_authorizer(lambda action, *_: sqlite3.SQLITE_DENY if action == 22 else 0)  # COMMIT
        try:
            self.state.apply(operations, Now(self.now, self.now))
            check(self, announced)  # it is committed, and turns read up to the tick that was announced before
        except sqlite3.DatabaseError:
            assert fails
        finally:
            if fails:
                self.state.writing.set_authorizer(None)
        self.state.view.tail = self.state.tail


def ticks_of(rows):
    with contextlib.closing(rows):
        return list(rows)


def check(world, announced=1 << 52):
    """Every way to look into the index, on both connections, against the rows themselves."""
    state = world.state
    low, high = sorted((world.tick(), world.tick()))
    for name in NAMES:
        for rows, last in ((state, 1 << 52), (state.view, announced)):
            for above, upto in ((0, last), (low, min(high, last))):
                expected = rows.database.execute(IN_ORDER, ("default", name, above, upto)).fetchall()
                mail = ("places.tick, sender", ("default", name), above, upto)
                assert ticks_of(rows.mail(*mail)) == expected, (name, above, upto)
                assert ticks_of(rows.mail(*mail, backwards=True)) == expected[::-1], (name, above, upto)
                alive = [row for row in expected if row[0] % 3]
                assert ticks_of(rows.mail(*mail, only="places.tick % 3")) == alive
    assert index_is_whole(state.writing)
    for key, (number, n, newest) in state.newest().items():
        last = "SELECT ifnull(max(tick), 0) FROM messages WHERE mailbox = ?"
        assert [newest] == list(state.ask(last, number)) and state.counts[key] == (number, n)


@pytest.mark.parametrize("seed", range(6))
def test_every_read_gives_what_a_plain_index_gives(tmp_path, seed):
    """60 lists for each seed, with some 100 reads after each."""
    world = World(tmp_path / "bus.db", seed)
    levels = set()
    for _ in range(LISTS // 6):
        world.apply()
        check(world)
        levels |= set(world.state.writing.execute("SELECT level FROM runs WHERE upto > 0").fetchall())
        if world.random.random() < 0.05:
            world.killed()
            check(world)
    assert len(levels) > 2, "no run was merged twice"
    world.state.close()


@pytest.mark.parametrize("messages", [1, 2, 89, 90, 91, 700])
def test_the_part_in_memory_is_bounded_however_large_a_list_is(tmp_path, messages):
    world = World(tmp_path / "bus.db", 0)
    index = world.state.index
    index.FLUSH_MESSAGES, index.RUNS_MERGED, index.SLICE = 50, 3, 20
    index.PLACES_PER_MESSAGE = Index.PLACES_PER_MESSAGE
    for _ in range(3000 // messages):
        world.now += 1
        to = [draft({"from": "dora", "to": world.random.choice(NAMES), "msg": "x"}, None) for _ in range(messages)]
        world.state.apply([Put(to)], Now(world.now, world.now))
        assert sum(map(len, index.tail.ticks.values())) == index.size < index.FLUSH_MESSAGES
        runs = dict(world.state.writing.execute("SELECT level, count(*) FROM runs WHERE upto > 0 GROUP BY level"))
        assert all(count < 3 * index.RUNS_MERGED for count in runs.values()), runs
    world.state.close()


def test_a_list_that_stores_no_message_writes_nothing_into_the_index(tmp_path):
    """A full disk must take the removal of messages."""
    world = World(tmp_path / "bus.db", 0)
    world.state.index.FLUSH_MESSAGES = 100
    for _ in range(9):
        world.now += 1
        world.state.apply([Put([draft({"from": "dora", "to": "bob", "msg": "x"}, None)])], Now(world.now, world.now))
    world.state.index.FLUSH_MESSAGES = 1
    world.state.apply([Remove(0, BEGIN + 1, False, [], 0)], Now(world.now, world.now))
    assert world.state.ask("SELECT count(*) FROM places") == (0,)
    world.state.close()


CHANGES = {
    "a place gone": "DELETE FROM places WHERE tick % 2",
    "another mailbox": "UPDATE places SET mailbox = 2 WHERE tick % 2",
    "a run that covers more": "UPDATE runs SET upto = upto + (1 << 40) WHERE upto = (SELECT max(upto) FROM runs)",
    "a run that covers less": "UPDATE runs SET upto = upto - (1 << 40) WHERE upto = (SELECT max(upto) FROM runs)",
    "a text for a tick": "UPDATE runs SET upto = 'x' WHERE upto = (SELECT max(upto) FROM runs)",
    "a text for a level": "UPDATE runs SET level = 'x'",
    "another level": "UPDATE runs SET level = level + 1",
    "another run": "UPDATE runs SET run = 9223372036854775807 WHERE upto = (SELECT max(upto) FROM runs)",
}


@pytest.mark.parametrize("checked_bytes", [0, 1 << 30], ids=["large", "small"])
@pytest.mark.parametrize("change", CHANGES)
def test_at_start_what_is_damaged_in_the_index_is_told_and_it_is_made_anew(
    tmp_path, capfd, monkeypatch, change, checked_bytes
):
    """In a large database the list of the runs is checked, and not each place."""
    if not checked_bytes and "places" in CHANGES[change]:
        pytest.skip("a place in a large database is checked when its message is read")
    monkeypatch.setattr(bus_server, "CHECKED_BYTES", checked_bytes)
    world = World(tmp_path / "bus.db", 0)
    for _ in range(30):
        world.now += 1
        world.state.apply([Put([draft({"from": "dora", "to": "bob", "msg": "x"}, None)])], Now(world.now, world.now))
    world.state.writing.execute(CHANGES[change])
    world.state.close()
    world.open()
    assert "index by mailbox" in said(capfd)
    check(world)
    world.state.close()


def test_a_damaged_list_of_runs_is_merged_no_further_and_mended_at_the_next_start(tmp_path, capfd):
    """What is damaged could be anything: a merge would spread it. Until then each send is stored."""
    world = World(tmp_path / "bus.db", 0)
    index = world.state.index
    index.FLUSH_MESSAGES, index.RUNS_MERGED, index.SLICE = 3, 3, 1

    def send(messages):
        for _ in range(messages):
            world.now += 1
            put = Put([draft({"from": "dora", "to": "bob", "msg": "x"}, None)])
            world.state.apply([put], Now(world.now, world.now))

    def levels():
        return {level for [level] in world.state.writing.execute("SELECT level FROM runs WHERE upto > 0").fetchall()}

    send(8)
    world.state.writing.execute("UPDATE runs SET checksum = 7 WHERE run = 1")
    send(30)
    assert levels() == {0}
    world.state.close()
    world.open()
    assert "index by mailbox" in said(capfd) and levels() == {3}
    check(world)
    world.state.close()


def test_a_message_whose_row_is_gone_is_told_with_the_mailbox_that_has_its_place(tmp_path, capfd):
    """Its place is there, and its row is not."""
    world = World(tmp_path / "bus.db", 0)
    world.state.index.FLUSH_MESSAGES = 1
    world.state.apply([Put([draft({"from": "dora", "to": "bob", "msg": "x"}, None)])], Now(BEGIN, BEGIN))
    world.state.writing.execute("DELETE FROM messages")
    [row] = ticks_of(world.state.mail(bus_server.PLACED_ROW, ("default", "bob"), 0))
    assert world.state.checked(row) is None
    assert f"message {BEGIN:x} to bob is damaged" in said(capfd)
    world.state.close()


def test_an_operation_that_is_refused_leaves_no_place_behind(tmp_path):
    """Its messages are taken back with a savepoint; those of the others in the list stay."""
    world = World(tmp_path / "bus.db", 0)

    class Refusing(Remove):
        def apply(self, state, now):
            state.place(draft({"from": "dora", "to": "bob", "msg": "never"}, None), now.wall)
            raise Refused(409, "as it should be")

    put = Put([draft({"from": "dora", "to": "bob", "msg": "x"}, None)])
    world.state.apply([put, Refusing(0, 1, False, [], 0)], Now(world.now, world.now))
    world.state.view.tail = world.state.tail
    world.now += 10
    check(world)
    world.state.close()


def test_a_turn_reads_with_the_index_as_it_was_announced(tmp_path):
    """A flush between the reads of two mailboxes: the first statement is open, so the second sees no newer file."""
    world = World(tmp_path / "bus.db", 0)
    names = ["bob", "bob", "ann", "all"]
    world.state.index.FLUSH_MESSAGES = 6
    world.state.apply([Put([draft({"from": "dora", "to": to, "msg": "x"}, None) for to in names])], Now(BEGIN, BEGIN))
    world.state.view.tail = world.state.tail
    with contextlib.closing(world.state.view.mail("1", ("default", "bob"), 0)) as first:
        next(first)
        world.state.apply([Put([draft({"from": "dora", "to": "cleo", "msg": "x"}, None)] * 3)], Now(BEGIN, BEGIN))
        assert world.state.tail.above and not world.state.view.tail.above, "it was not flushed"
        for name in ("ann", "all"):
            assert ticks_of(world.state.view.mail("1", ("default", name), 0)) == [(1,)]
    world.state.close()


@pytest.mark.parametrize("flush", [1, 100], ids=["in runs", "in memory"])
def test_a_read_of_several_mailboxes_compiles_no_statement_twice(tmp_path, monkeypatch, flush):
    monkeypatch.setattr(Index, "FLUSH_MESSAGES", flush)
    state, compiled = State(str(tmp_path / "bus.db")), []
    put = Put([draft({"from": "dora", "to": each, "msg": "x"}, None) for each in NAMES for _ in range(3)])
    state.apply([put], Now(BEGIN, BEGIN))
    view = state.view
    view.tail = state.tail
    view.database.set_authorizer(lambda *what: compiled.append(what) or sqlite3.SQLITE_OK)
    poll = bus_server.Poll("ann", NAMES, "default", None, 0, 100, 0, False)
    first, _ = view.after(poll, state.last)
    assert len(first) == 3 * len(NAMES) and compiled
    compiled.clear()
    assert view.after(poll, state.last)[0] == first
    assert compiled == []
    state.close()


@pytest.mark.parametrize("backwards", [False, True])
def test_a_read_makes_no_more_of_the_part_in_memory_than_it_takes(tmp_path, monkeypatch, backwards):
    """A count takes one row, of up to some thousands."""
    state = State(str(tmp_path / "bus.db"), lambda: BEGIN)
    ticks = [state.apply([Put([draft({"from": "ann", "to": "bob", "msg": "x"}, None)])], Now(BEGIN, BEGIN)).last
             for _ in range(2 * bus_server.TICKS_LISTED)]  # fmt: skip
    state.view.tail, made = state.tail, []
    monkeypatch.setattr(bus_server, "encode", lambda value: made.extend(value) or json.dumps(value))
    [found] = state.view.first("messages.tick", ("default", "bob"), 0, backwards=backwards)
    assert found == ticks[-backwards] and len(made) == bus_server.TICKS_LISTED
    state.close()


def test_after_a_failed_commit_turns_read_with_the_tail_they_had_until_it_is_announced(tmp_path):
    world = World(tmp_path / "bus.db", 0)
    world.state.index.FLUSH_MESSAGES = 100
    put = Put([draft({"from": "dora", "to": "bob", "msg": "x"}, None)])
    world.state.apply([put], Now(BEGIN, BEGIN))
    before = world.state.view.tail = world.state.tail
    world.state.writing.set_authorizer(lambda action, *_: sqlite3.SQLITE_DENY if action == sqlite3.SQLITE_INSERT else 0)
    with pytest.raises(sqlite3.DatabaseError):
        world.state.apply([put], Now(BEGIN, BEGIN))
    world.state.writing.set_authorizer(None)
    assert world.state.tail is not before and world.state.view.tail is before
    assert len(ticks_of(world.state.view.mail("1", ("default", "bob"), 0))) == 1
    world.state.close()


def test_after_an_error_of_a_damaged_page_the_next_start_makes_the_index_anew(tmp_path, capfd, monkeypatch):
    """In a large database, where no start looks at each page."""
    monkeypatch.setattr(bus_server, "CHECKED_BYTES", 0)
    world = World(tmp_path / "bus.db", 0)
    put = Put([draft({"from": "dora", "to": "bob", "msg": "x"}, None)] * 30)
    world.state.apply([put], Now(BEGIN, BEGIN))
    with monkeypatch.context() as patch:
        malformed = mock.Mock(side_effect=sqlite3.DatabaseError("database disk image is malformed"))
        patch.setattr(world.state.index, "write", malformed)
        with pytest.raises(sqlite3.DatabaseError):
            world.state.apply([put], Now(BEGIN, BEGIN))
    world.state.close()
    world.open()
    assert "index by mailbox" in said(capfd) and len(ticks_of(world.state.mail("1", ("default", "bob"), 0))) == 30
    world.state.close()


def test_a_damaged_page_that_also_takes_no_mark_fails_its_list_alone(tmp_path, monkeypatch):
    """The mark for the next start is made in a table that may be damaged as well."""
    state = World(tmp_path / "bus.db", 0).state
    put = Put([draft({"from": "dora", "to": "bob", "msg": "x"}, None)])
    with monkeypatch.context() as patch:
        malformed = mock.Mock(side_effect=sqlite3.DatabaseError("database disk image is malformed"))
        patch.setattr(state.index, "write", malformed)
        state.writing.set_authorizer(lambda action, *_: sqlite3.SQLITE_DENY if action == sqlite3.SQLITE_UPDATE else 0)
        with pytest.raises(sqlite3.DatabaseError, match="malformed"):
            state.apply([put], Now(BEGIN, BEGIN))
    assert not state.stale
    state.writing.set_authorizer(None)
    assert len(state.apply([put], Now(BEGIN, BEGIN)).visible) == 1
    state.close()


@pytest.mark.parametrize("checked_bytes", [0, 1 << 30], ids=["large", "small"])
def test_an_index_whose_pages_no_statement_can_read_is_made_anew_at_start(tmp_path, capfd, monkeypatch, checked_bytes):
    """Its tables cannot be dropped. A small database is checked whole; in a large one an error had left its mark."""
    world = World(tmp_path / "bus.db", 0)
    world.state.index.FLUSH_MESSAGES = 3
    for _ in range(30):
        world.now += 1
        put = Put([draft({"from": "dora", "to": "bob", "msg": "x"}, None)])
        world.state.apply([put], Now(world.now, world.now))
    [page] = world.state.ask("SELECT rootpage FROM sqlite_master WHERE name = 'places'")
    [[size], [pages]] = map(world.state.ask, ("PRAGMA page_size", "PRAGMA page_count"))
    if not checked_bytes:
        world.state.writing.execute("UPDATE runs SET checksum = -1")
    world.state.close()
    with world.path.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    monkeypatch.setattr(bus_server, "CHECKED_BYTES", checked_bytes)
    world.open()
    assert ("rebuilding its indexes" if checked_bytes else "index by mailbox") in said(capfd)
    check(world)
    if checked_bytes:
        assert world.state.ask("PRAGMA page_count")[0] <= pages, "what was forgotten is still in the file"
    world.state.close()


@pytest.mark.parametrize("owner, limit, value", [(WORK.Bury, "SLICE", 2), (WORK.letters, "ANSWER_BYTES", 60)])
def test_dead_letters_are_buried_in_slices(tmp_path, monkeypatch, owner, limit, value):
    """A slice ends by its number and by its bytes: two messages here have more than 60."""
    world = World(tmp_path / "bus.db", 0)
    jobs = Put([draft({"from": "dora", "to": "bob", "msg": "x"}, None)] * 5)
    world.state.apply([jobs, Claim("default", "bob", 9, 1000, 7, "worker", 1)], Now(BEGIN, BEGIN))
    monkeypatch.setattr(owner, limit, value)
    later = Now(BEGIN + 10**6, BEGIN + 10**6)
    reached, left = [0, 0, 0], []
    while reached:
        [reached] = world.state.apply([WORK.Bury(1, reached)], later).results
        left.append(bool(reached))
    assert left == [True, True, False]
    assert len(ticks_of(world.state.mail("1", ("default", "bob.dead"), 0))) == 5
    world.state.close()
