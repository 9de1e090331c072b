"""The same operations make the same State everywhere: the property test of State.apply.

Random lists of operations are applied to three files. `plain` gets them as they are. `other` gets them from bytes, on
what could be another machine: other clocks, a full disk, other options, no index, SQLite's unordered rows in reverse,
restarts, and commits that fail and are tried again. `accepted` gets only those that were not refused. After each list
the results are equal, and in the end all rows of all tables. test_replay_mistakes.py plants mistakes that this finds.

    python -m tests.core.test_replay 900    so many lists, 30 for each seed, and one hash of all results, which is the
                                            same on every Python and machine
    REPLAY_LISTS=900 python -m pytest tests/core/test_replay.py    the same in pytest, without the hash
"""

import contextlib
import copy
import hashlib
import os
import pathlib
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from unittest import mock

import pytest

import bus_server
from bus_server import (
    OPERATIONS,
    Forget,
    ForgetKeys,
    Mark,
    Marks,
    Now,
    Operation,
    Put,
    Raise,
    Receipt,
    Refused,
    Remove,
    State,
    index_is_whole,
)
from ledgers.operations import operation_of, to_line
from tests.kit.processes import ROOT

EXTENSIONS = bus_server.load_extensions(())
work, replies, later, redact = (EXTENSIONS[name] for name in ("work", "replies", "later", "redact"))
locks = EXTENSIONS["locks"].its
LISTS = 30  # for a seed
SEEDS = -(-int(os.environ.get("REPLAY_LISTS", "120")) // LISTS)
BEGIN = 1795000000 * 1000000  # us
SECOND = 1000000
CHANNELS, NAMES, QUEUES = ("default", "other"), ("ann", "bob", "all", "cleo"), ("builds", "tests", "builds.dead")


class Broken(Operation):
    """It changes all that there is to change, and then fails."""

    __slots__ = ("refuses", "tick")
    kind = "broken"

    def __init__(self, refuses, tick):
        self.refuses, self.tick = refuses, tick

    def apply(self, state, now):
        state.place(message("mallory", ["ann", f"new-{self.tick:x}"], "never stored"), now.wall)
        state.insert()
        state.writing.execute("UPDATE mailboxes SET fetched = 7, gone = gone + 100")
        state.writing.execute("DELETE FROM messages WHERE tick = ?", (self.tick,))
        raise Refused(409, "as it should be") if self.refuses else KeyError("a mistake of its author")


@pytest.fixture(autouse=True, scope="module")
def _broken_is_known():
    with mock.patch.dict(OPERATIONS, broken=Broken):
        yield


def message(sender, to, msg, key=None, **members):
    return bus_server.draft({"from": sender, "to": to, "msg": msg, **members}, key)


class World:
    """It makes the lists, and knows ticks, leases and keys of the last ones, so that operations hit something.

    A new operation gets a method here, and a place in KINDS.
    """

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.wall = self.steady = BEGIN
        self.skew = 0
        self.ticks, self.leases, self.sent, self.fences = [BEGIN], [(BEGIN, "no")], [], [BEGIN]

    def now(self):
        """The wall clock steps back and forth, the steady one grows."""
        self.steady += self.random.choice((1, 300, SECOND // 10, 2 * SECOND, 70 * SECOND))
        if self.random.random() < 0.2:
            self.skew = self.random.choice((-3600, -5, 0, 5, 3600)) * SECOND
        return Now(self.steady + self.skew, self.steady)

    def tick(self):
        return self.random.choice(self.ticks[-30:]) + self.random.choice((0,) * 9 + (1,))

    def place(self, *more):
        return self.random.choice(CHANNELS), self.random.choice(NAMES + QUEUES + more)

    def draft(self):
        pick = self.random.choice
        key = pick((None, None, None, *(f"key{number}" for number in range(6))))
        if self.sent and pick((True, *[False] * 4)):
            again = pick(self.sent[-8:])  # a retry, perhaps by an encoder that writes the members in another order
            first, *rest = again.text.split(", ")
            return again._replace(text=", ".join([first, *reversed(rest)]) if pick((True, False)) else again.text)
        channel, _ = self.place()
        to = self.random.sample(NAMES + QUEUES * 2, pick((1, 1, 1, 3)))
        members = {} if pick((True, True, False)) else {"ttl": pick((0.1, 1, 60, 10000))}
        sender = pick(("ann", "bob", "dora"))
        one = message(sender, list(dict.fromkeys(to)), f"{pick(range(3))}", key, channel=channel, n=1, **members)
        if pick((True, *[False] * 4)):
            parent = self.tick()
            one = one._replace(answers=parent, thread=pick((parent, self.tick())), depth=pick((1, 2)))
        if key:
            self.sent.append(one)
        return one

    def put(self):
        if self.random.random() < 0.02:  # more than one statement takes
            return Put([message("ann", "bulk", str(number)) for number in range(120)])
        return Put([self.draft() for _ in range(self.random.choice((1, 1, 2, 4)))], self.random.random() > 0.05)

    def raise_(self):
        return Raise(self.tick() + self.random.choice((-1, 0, 1, 100)) * SECOND)

    def marks(self):
        marks, receipts = [], []
        for channel, name in dict.fromkeys((self.place("erin"), self.place("frank"), self.place())):
            marks.append(
                Mark(channel, name, self.random.choice((True, False)), self.random.choice((None, self.tick())),
                     self.tick(), self.wall)
            )  # fmt: skip
            receipts.append(Receipt(channel, name, self.random.choice((0, 1)), self.tick(), "gil", self.wall))
        receipts.append(receipts[0]._replace(tick=0))
        return Marks(marks, receipts, {self.random.choice(("aa", "bb")): self.steady // SECOND})

    def remove(self):
        pick = self.random.choice
        kept_for = pick(([], ["work"], ["work", "nowhere"]))
        above, keys_from = pick((0, self.tick())), pick((0, self.tick()))
        return Remove(above, self.tick() + 1, pick((True, False)), kept_for, keys_from, pick((1, 3, 40)))

    def forget(self):
        return Forget([list(self.place("erin", "erin", "frank", "frank")) for _ in range(self.random.choice((1, 3)))])

    def forget_keys(self):
        return ForgetKeys(self.tick() + 1, self.random.choice((1, 3, 40)))

    def claim(self):
        channel, queue = self.random.choice(CHANNELS), self.random.choice(QUEUES)
        pick, lease = self.random.choice, self.random.getrandbits(64)
        return work.Claim(channel, queue, pick((1, 2, 5)), pick((1, 30)) * SECOND, lease, pick(NAMES), pick((1, 2, 5)))

    def settle(self):
        pick = self.random.choice
        tick, lease = pick(self.leases[-8:])
        lease = pick((lease,) * 7 + ("other",))
        verb, delay = pick(("ack", "nack", "nack", "extend")), pick((0, SECOND, 50 * SECOND))
        return work.Settle(verb, tick, lease, delay, pick(("why", "no disk")), pick((1, 2, 5)))

    def bury(self):
        above = self.random.choice(([0, 0, 0], [self.random.randrange(6), self.wall, self.tick()]))
        return work.Bury(self.random.choice((1, 2)), above)

    def recall(self):
        return replies.Recall(self.tick())

    def redact(self):
        return redact.Redact(self.tick())

    def fold(self):
        return redact.Fold()

    def again(self):
        return work.Again(self.tick())

    def paths(self):
        """In order, each once, as requests are taken apart."""
        return sorted(self.random.sample(("a", "b", "src/a", "src/*", "src/**", "?"), self.random.choice((1, 1, 2, 3))))

    def lock(self):
        pick = self.random.choice
        whose = pick(("", "aa", "bb")), pick(("aa", "bb"))
        return locks.Lock(
            pick(CHANNELS), pick(NAMES), self.paths(), pick((True, False)), pick((1, 30, 300)) * SECOND, "why", *whose
        )

    def renew(self):
        pick = self.random.choice
        return locks.Renew(pick(self.fences[-4:]), pick(NAMES), pick((1, 100)) * SECOND, pick(("aa", "bb")), "bb")

    def unlock(self):
        pick = self.random.choice
        fence = pick((0, pick(self.fences[-4:])))
        return locks.Unlock(pick(CHANNELS), pick((*NAMES, "")), fence, [] if fence else self.paths())

    def lapse(self):
        return locks.Lapse(self.random.choice(([], ["aa"], ["bb", "cc"])))

    def later_keep(self):
        facts = [f"{self.random.randrange(9):016x}", "ann", "", "::1", self.random.choice((None, "* * * * *")), "{}"]
        return later.schedules.Keep(facts, self.tick())

    def later_move(self):
        due, reason = self.random.choice((None, self.tick())), self.random.choice((None, "no room"))
        return later.schedules.Move(self.random.randrange(1, 30), self.tick(), due, self.random.choice((0, 3)), reason)

    def later_drop(self):
        return later.schedules.Drop(self.random.randrange(1, 30))

    def broken(self):
        return Broken(self.random.choice((True, False)), self.tick())

    RARE = (forget, forget_keys, bury, recall, again, lapse, redact, fold, later_move, later_drop, broken)
    KINDS = (put,) * 8 + (claim, settle, lock) * 4 + (marks, remove, raise_, renew, unlock, later_keep) * 2 + RARE

    def list(self):
        operations = [self.random.choice(self.KINDS)(self) for _ in range(self.random.choice((1, 1, 2, 5, 9)))]
        return sorted(operations, key=lambda operation: operation.rank)  # as the Ledger does

    def learn(self, operations, applied):
        self.ticks += [each.tick for each in applied.visible]
        self.ticks.append(applied.last)
        for operation, result in zip(operations, applied.results):
            if operation.kind == "claim" and not isinstance(result, Refused):
                self.leases += [(job.message.tick, job.lease) for job in result.jobs]
            if isinstance(result, locks.Taken):
                self.fences.append(result.fence)


class Connection:
    """The writing connection of a State, of which one statement can fail. A planted mistake may set `rewrite`."""

    rewrite = staticmethod(lambda statement: statement)

    def __init__(self, database):
        self.database, self.failing = database, None

    def execute(self, statement, *values):
        self.fail(statement)
        return self.database.execute(self.rewrite(statement), *values)

    def executemany(self, statement, *values):
        self.fail(statement)
        return self.database.executemany(self.rewrite(statement), *values)

    def fail(self, statement):
        if self.failing and statement.startswith(self.failing):
            self.failing = None
            raise random.choice((sqlite3.OperationalError("disk I/O error"), OSError(5, "EIO"), MemoryError()))

    def __getattr__(self, name):
        return getattr(self.database, name)


class Place:
    """A file, and how a list is applied to it: as it is."""

    messages_in_a_run = 3

    def __init__(self, path):
        self.path = str(path)
        self.open()

    def open(self):
        self.state = State(self.path, self.clock)
        for name, module in EXTENSIONS.items():
            if module.TABLES is not None:
                self.state.add_tables(name, module.NOUN, module.TABLES)
        self.state.writing.execute("PRAGMA synchronous=OFF")  # nobody pulls the plug here
        self.state.writing = self.state.database = self.state.index.writing = Connection(self.state.writing)
        index = self.state.index
        index.FLUSH_MESSAGES, index.RUNS_MERGED, index.SLICE = self.messages_in_a_run, 2, 2

    def clock(self):
        return BEGIN

    def apply(self, operations, now):
        return self.state.apply(operations, now)

    def rows(self):
        """All that is in all tables, but the id of the bus, which is random, and the index by mailbox."""
        assert index_is_whole(self.state.writing), "a place is missing or too many"
        ask = self.state.writing.database.execute
        tables = [name for (name,) in ask("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
        facts = [table for table in tables if table not in ("bus", "places", "runs")]
        found = {table: sorted(map(repr, ask(f"SELECT * FROM {table}"))) for table in facts}
        found["bus"] = ask("SELECT last FROM bus").fetchall()
        return found


class OtherPlace(Place):
    """A file on another machine."""

    messages_in_a_run = 5

    def open(self):
        super().open()
        for (index,) in self.state.writing.execute(
            "SELECT name FROM sqlite_master WHERE type = 'index' AND sql LIKE 'CREATE INDEX%'"
        ).fetchall():
            self.state.writing.execute(f"DROP INDEX {index}")
        self.state.writing.execute("PRAGMA reverse_unordered_selects=ON")

    def clock(self):
        return random.randrange(1 << 50)

    def apply(self, operations, now):
        if random.random() < 0.2:
            self.state.close()
            self.open()
        operations = [operation_of(to_line(operation), OPERATIONS) for operation in operations]
        with self.other_process():
            for _ in range(random.choice((0, 0, 1, 2))):
                failing = random.choice(
                    ("COMMIT", "COMMIT", "INSERT", "UPDATE", "SELECT", "BEGIN", "RELEASE", "DELETE")
                )
                self.state.writing.failing = failing
                try:
                    return self.state.apply(operations, now)
                except (sqlite3.OperationalError, OSError, MemoryError):
                    assert not self.state.writing.failing
                finally:
                    self.state.writing.failing = None
            return self.state.apply(operations, now)

    @contextlib.contextmanager
    def other_process(self):
        """What apply must not ask is not what it is elsewhere."""
        shift = random.randrange(1 << 50)
        with contextlib.ExitStack() as stack:
            for clock in ("time_ns", "monotonic_ns"):
                stack.enter_context(mock.patch.object(time, clock, lambda: shift * 1000))
            for clock in ("time", "monotonic"):
                stack.enter_context(mock.patch.object(time, clock, lambda: shift / 1e6))
            stack.enter_context(mock.patch.object(self.state.view, "has_room", lambda: False))
            stack.enter_context(mock.patch.object(bus_server, "REMOVE_SLICE", 2))
            stack.enter_context(mock.patch.object(work.words, "LEASE", 3))
            yield


class Difference(AssertionError):
    """Two files that should have become the same have not."""


def told(results):
    """Results that can be compared."""
    return [repr((each.status, each.sentence) if isinstance(each, Refused) else each) for each in results]


def same(what, first, second):
    if first != second:
        pairs = zip(first, second) if isinstance(first, list) else [(first, second)]
        a, b = next(((a, b) for a, b in pairs if a != b), (first, second))
        raise Difference(f"{what}:\n  {a}\n  {b}")


def replay(folder, seed, lists=LISTS):
    """Apply random lists to the three files; Difference if they do not become the same. Returns a hash of it all."""
    world, digest = World(seed), hashlib.sha256()
    random.seed(seed)  # what is random in the other place
    plain, accepted = Place(folder / "plain.db"), Place(folder / "accepted.db")
    other = OtherPlace(folder / "other.db")
    try:
        for number in range(lists):
            where, now, operations = f"seed {seed}, list {number}", world.now(), world.list()
            lines, before = [to_line(operation) for operation in operations], plain.state.last
            with mock.patch.object(bus_server, "say"):  # it tells of the operations that broke
                applied = plain.apply(copy.deepcopy(operations), now)
                elsewhere = other.apply(operations, now)
                fine = [each for each, result in zip(operations, applied.results) if not isinstance(result, Refused)]
                alone = accepted.apply(copy.deepcopy(fine), now) if fine else applied._replace(results=[])
            same(f"{where}: results\n{lines}", told(applied.results), told(elsewhere.results))
            for part in ("visible", "removed", "last"):
                same(f"{where}: {part}\n{lines}", getattr(applied, part), getattr(elsewhere, part))
                same(f"{where}: {part} without the refused\n{lines}", getattr(applied, part), getattr(alone, part))
            kept = [each for each in applied.results if not isinstance(each, Refused)]
            same(f"{where}: results without the refused\n{lines}", told(kept), told(alone.results))
            ticks = [before, *(each.tick for each in applied.visible)]
            same(f"{where}: ticks grow", ticks, sorted(set(ticks)))
            same(f"{where}: an operation is a value\n", lines, [to_line(operation) for operation in operations])
            if number % 10 == 9 or number == lists - 1:
                for table, rows in plain.rows().items():
                    same(f"{where}: the rows of {table}", rows, other.rows()[table])
                    same(f"{where}: the rows of {table} without the refused", rows, accepted.rows()[table])
                digest.update(repr(plain.rows()).encode())
            digest.update(repr((told(applied.results), applied[1:])).encode())
            world.learn(operations, applied)
    finally:
        for place in (plain, accepted, other):
            place.state.close()
    return digest.hexdigest()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_the_same_operations_make_the_same_state_everywhere(seed, tmp_path):
    replay(tmp_path, seed)


def test_so_they_do_for_any_seed(tmp_path_factory):
    hypothesis = pytest.importorskip("hypothesis")

    @hypothesis.settings(max_examples=5, deadline=None, database=None, phases=[hypothesis.Phase.generate])
    @hypothesis.given(hypothesis.strategies.integers(0, 1 << 64), hypothesis.strategies.integers(1, LISTS))
    def run(seed, lists):
        replay(tmp_path_factory.mktemp("any"), seed, lists)

    run()


def test_neither_the_seed_of_hashes_nor_the_process_changes_the_result():
    command = [sys.executable, "-m", "tests.core.test_replay", "30"]
    theirs = [
        subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True)
        for seed in ("1", "2")
    ]
    assert theirs[0].stdout == theirs[1].stdout and len(theirs[0].stdout.split()[-1]) == 64, theirs


def put(to, msg="x", **members):
    return Put([message("ann", [to], msg, **members)])


@pytest.mark.parametrize("refuses", [True, False], ids=["refused", "broken"])
def test_an_operation_that_fails_is_refused_alone_and_changes_nothing(tmp_path, refuses, monkeypatch):
    said = []
    monkeypatch.setattr(bus_server, "say", said.append)
    place, now = Place(tmp_path / "bus.db"), Now(BEGIN, BEGIN)
    place.apply([put("builds")], now)
    claim = work.Claim("default", "builds", 1, SECOND, 1, "ann", 5)
    before, broken, after = put("ann"), Broken(refuses, place.state.last), Marks([], [], {"aa": 1})
    stored, refused, claimed, marked = place.apply([before, broken, claim, after], now).results
    assert isinstance(refused, Refused) and refused.status == (409 if refuses else 500)
    assert stored[0].ticks and claimed.jobs and marked is None
    rows = place.rows()
    assert len(rows["messages"]) == 2 and len(rows["mailboxes"]) == 2 and rows["uses"] == ["('aa', 1)"]
    assert not [row for row in rows["mailboxes"] if "new-" in row]
    place.state.close()
    assert ("KeyError: 'a mistake of its author'" in "".join(said)) is not refuses


@pytest.mark.parametrize(
    "error", [sqlite3.OperationalError("disk I/O error"), OSError(5, "EIO"), MemoryError()], ids=repr
)
def test_an_error_of_the_machine_fails_the_whole_list_and_leaves_nothing(tmp_path, error, monkeypatch):
    place, now = Place(tmp_path / "bus.db"), Now(BEGIN, BEGIN)
    place.apply([put("ann")], now)
    before, last = place.rows(), place.state.last
    monkeypatch.setattr(Broken, "apply", mock.Mock(side_effect=error))
    with pytest.raises(type(error)):
        place.apply([put("bob"), Broken(True, 1), Marks([], [], {"aa": 1})], now)
    assert (place.rows(), place.state.last) == (before, last)
    assert place.apply([put("bob")], now).visible[0].tick == last + 1
    place.state.close()


def test_every_kind_of_operation_is_among_the_random_ones():
    world = World(0)
    made = {operation.kind for _ in range(100) for operation in world.list()}
    assert made == set(OPERATIONS)


def test_bytes_of_another_format_or_of_an_unknown_kind_are_refused():
    for line in ('[2, "put", {}]', '[1, "pat", {}]'):
        with pytest.raises(ValueError, match="is not known here"):
            operation_of(line, OPERATIONS)


DAMAGE = ("'text'", "NULL", "x'00ff'", "1.5", "-1", "9223372036854775807", "9223372036854775807")


@pytest.mark.parametrize("seed", range(SEEDS))
def test_no_damaged_row_makes_apply_fail(seed, tmp_path, monkeypatch):
    """Before each list random cells get values that no bus writes; half the time, a restart follows."""
    monkeypatch.setattr(bus_server, "say", lambda line: None)
    world, place = World(seed), Place(tmp_path / "bus.db")
    chance = world.random
    for number in range(2 * LISTS):
        ask = place.state.writing.database.execute
        for _ in range(3 if number > 8 else 0):
            often = ("messages", "mailboxes") * 2
            table = chance.choice((*often, "work", "work_passed", "receipts", "bus", "uses", "runs"))
            key = {"receipts": "tick", "uses": "token"}.get(table, "rowid")
            rows = ask(f"SELECT {key} FROM {table} ORDER BY {key}").fetchall()
            keys = ("id", "tick", "run", "mailbox" if table == "work_passed" else "")
            columns = [name for _, name, *_ in ask(f"PRAGMA table_info({table})") if name not in keys]
            if rows:
                change = f"UPDATE OR IGNORE {table} SET {chance.choice(columns)} = {chance.choice(DAMAGE)}"
                ask(f"{change} WHERE {key} = ?", chance.choice(rows))
        if chance.random() < 0.5:
            place.state.close()
            place.open()
        operations = world.list()
        world.learn(operations, place.apply(operations, world.now()))
    place.state.close()


# Planted mistakes. Each is a way in which a change of the code could break what is tested here.


def main():
    OPERATIONS["broken"] = Broken
    lists, digest = int(sys.argv[1]) if len(sys.argv) > 1 else 900, hashlib.sha256()
    for seed in range(-(-lists // LISTS)):
        with tempfile.TemporaryDirectory() as folder:
            digest.update(replay(pathlib.Path(folder), seed).encode())
    print(f"{lists} lists on three files: {digest.hexdigest()}")


if __name__ == "__main__":
    main()
