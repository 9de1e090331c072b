"""Copies of fronts: a new front begins with one, and what two of them have leaves the ledger (ledgers/copies.py)."""
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import pytest

import bus_server
import ledgers.copies
from bus_server import Mark, Marks, Put, Raise, Remove, Unusable
from ledgers import Unknown
from ledgers.copies import Copies
from tests.kit import inside, postgres
from tests.kit.clock import Clock
from tests.kit.ledger import SECOND, Fake, common_look, do, draft, end, front, invited, log_of, put, same, settle
from tests.kit.processes import wait_until


def run(command, *arguments):
    bus_server.COMMANDS[command](list(map(str, arguments)))


def restored(bus, name, copy=None):
    """The path of a new front's file, which is a copy of this front's."""
    path = pathlib.Path(bus.state.path).with_name(f"{name}.db")
    if not copy:
        copy = path.with_name(f"{name}-copy.db")
        run("backup", copy, "--db", bus.state.path)
    run("restore", copy, "--db", path)
    return path


def copies_of(bus):
    [copies] = [each.__self__ for each in bus.on_tidy if isinstance(getattr(each, "__self__", None), Copies)]
    return copies


def tidy(*buses):
    """As each minute: copies and trims; then all fronts know of it."""
    for bus in buses:
        copies = copies_of(bus)
        copies.look()
        wait_until(lambda: settle(*buses) or not copies.busy)  # noqa: B023
        bus.ledger.fronts.beat()
    settle(*buses)


@pytest.fixture
def at_once(monkeypatch):
    """Copies are taken at each look, and entries may leave the ledger as soon as two fronts have them."""
    monkeypatch.setattr(ledgers.copies, "EVERY", 0.0)
    monkeypatch.setattr(ledgers.copies, "KEPT", -1.0)


def test_entries_that_share_a_transaction_have_the_results_of_entries_that_do_not(fronts, log):
    """Among them: a key again, a key that is refused, a cursor ahead, a clock that steps back, a removal."""
    a, refused = fronts("a"), []
    for number in range(40):
        put(a, msg=str(number), key=f"k{number % 7}", ttl=number % 3 or None) if number < 7 else put(a, msg=str(number))
        if number % 9 == 4:
            put(a, msg=str(number // 9), key=f"k{number // 9}", ttl=(number // 9) % 3 or None)
            a.do(Put([draft(msg="other", key="k1")]), None, lambda *_: None, refused.append)
            settle(a)
        if number in (12, 36):  # the second one is behind the removal, with which the highest tick is written down too
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


def test_a_new_front_begins_with_a_copy_and_reads_what_came_since(fronts, log, capsys):
    a = fronts("a")
    secret = invited(a)
    common_look(a)
    put(a, msg="in the copy")
    path = restored(a, "b")
    assert "b.db is a front's copy of a ledger now. It has 1 messages" in capsys.readouterr().out
    put(a, msg="since")
    reads, ledger = [], Fake(log)
    read, ledger.read = ledger.read, lambda above, *more: reads.append(above) or read(above, *more)
    b = front(path, ledger)
    texts = b.state.writing.execute("SELECT msg FROM readable ORDER BY id").fetchall()
    assert 0 not in reads and texts == [("in the copy",), ("since",)] and a.state.bus == b.state.bus
    b.gate.tokens.refresh()
    assert b.gate.tokens.grant(f"Bearer {secret}").name == "ann", "the copy has the tokens"
    same(a, b)
    end(b)


def test_what_two_fronts_have_copies_of_leaves_the_ledger(fronts, log, at_once):
    a, b = fronts("a"), fronts("b")
    for number in range(20):
        put(a, msg=str(number))
    tidy(a, b)
    before = min(each.ledger.fronts.copy for each in (a, b))
    assert before > 20 and log.entries[0][0] == 1, "no front has heard of two copies yet"
    tidy(a)
    assert log.entries[0][0] == before
    with pytest.raises(Unusable, match="the ledger begins with entry .*: make a copy beside a front that runs"):
        fronts("c")
    d = front(restored(a, "d", f"{b.state.path}.copy"), Fake(log))
    assert len(log_of(d)) == 20
    same(a, b, d)
    end(d)


def test_what_is_young_stays_in_the_ledger(fronts, log, at_once, monkeypatch):
    monkeypatch.setattr(ledgers.copies, "KEPT", 60.0)
    a, b = fronts("a"), fronts("b")
    put(a)
    tidy(a, b, a)
    assert log.entries[0][0] == 1 and a.ledger.fronts.copy
    log.wall.wall += 61 * SECOND
    put(a)
    settle(b, a)
    tidy(a)
    assert log.entries[0][0] > 1


def test_with_one_front_nothing_leaves_the_ledger(fronts, log, at_once):
    """If its machine is lost, the ledger has all. A front that does not live may have lost its copy."""
    a, b = fronts("a"), fronts("b")
    tidy(a, b)
    end(b)
    settle(a)
    tidy(a, a)
    assert log.entries[0][0] == 1
    end(a)
    assert log_of(fronts("new")) == []


def test_a_copy_is_taken_when_it_is_time_and_a_failure_leaves_the_old_one(fronts, monkeypatch, capfd):
    a = fronts("a")
    tidy(a)
    first = a.ledger.fronts.copy
    put(a)
    tidy(a)
    assert a.ledger.fronts.copy == first > 0, "one an hour"
    monkeypatch.setattr(ledgers.copies, "EVERY", 0.0)
    copies_of(a).next = 0.0
    half = SimpleNamespace(free=pathlib.Path(a.state.path).stat().st_size * 3 // 2)  # the new one would not fit twice
    monkeypatch.setattr(ledgers.copies.shutil, "disk_usage", lambda _: half)
    tidy(a)
    assert a.ledger.fronts.copy == first and "the disk has no room for a copy" in inside.said(capfd)
    monkeypatch.undo()
    copies_of(a).next = 0.0
    tidy(a)
    assert a.ledger.fronts.copy > first


def test_a_copy_that_fails_is_tried_again_a_minute_later_and_not_an_hour(fronts, monkeypatch, capfd):
    """The bus looks once a minute, also when the attempt itself has taken a second. A failure is told once."""
    a, clock = fronts("a"), Clock()
    copies, room = copies_of(a), ledgers.copies.shutil.disk_usage
    monkeypatch.setattr(ledgers.copies, "time", SimpleNamespace(monotonic=clock))

    def full(_):
        clock.now += 1
        return SimpleNamespace(free=0)

    def taken_after(seconds, usage=room):
        clock.now += seconds
        monkeypatch.setattr(ledgers.copies.shutil, "disk_usage", usage)
        put(a)
        before = a.ledger.fronts.copy
        tidy(a)
        return a.ledger.fronts.copy > before

    assert not taken_after(0, full) and taken_after(59) and copies.next == clock.now + 3600
    assert not taken_after(3599) and taken_after(2)
    assert inside.said(capfd).count("the disk has no room for a copy") == 1
    assert not taken_after(3600, full) and not taken_after(59, full) and not taken_after(59, full)
    assert inside.said(capfd).count("the disk has no room for a copy") == 1


def test_a_copy_that_was_renamed_stays_so_after_a_power_cut(fronts, tmp_path, monkeypatch):
    a, happened, replace, fsync = fronts("a"), [], os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda *its: (happened.append(its[1]), replace(*its)))
    monkeypatch.setattr(
        os, "fsync", lambda file: (happened.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file))
    )
    tidy(a)
    renamed = happened.index(f"{a.state.path}.copy")
    assert str(tmp_path) in happened[renamed:], "the folder is written out"


def test_a_copy_that_fails_in_the_middle_leaves_the_old_one(fronts, at_once, monkeypatch):
    a = fronts("a")
    tidy(a)
    copy = pathlib.Path(f"{a.state.path}.copy")
    before = copy.read_bytes()

    def fail(source, target):
        pathlib.Path(target).write_bytes(b"half of it")
        raise Unusable("the disk is full")

    monkeypatch.setattr(ledgers.copies, "copy_database", fail)
    put(a)
    tidy(a)
    assert copy.read_bytes() == before


def test_a_copy_is_taken_though_the_ledger_removes_nothing(fronts, at_once):
    a, b = fronts("a"), fronts("b")
    tidy(a, b)

    def fail(*_):
        raise Unknown("too slow")

    a.state.ledger.trim, before = fail, a.ledger.fronts.copy
    put(a)
    tidy(a)
    assert a.ledger.fronts.copy > before


def test_one_copy_at_a_time_is_taken(fronts, monkeypatch):
    a, works = fronts("a"), []
    monkeypatch.setattr(a.loop, "in_thread", lambda work, then: works.append(then))
    a.tidy()
    a.tidy()
    assert works.count(copies_of(a).done) == 1
    copies_of(a).done(0)
    a.tidy()
    assert works.count(copies_of(a).done) == 2


def test_a_copy_and_a_front_that_are_too_old_are_refused_in_words(fronts, log, at_once, capfd):
    a, b, c = fronts("a"), fronts("b"), fronts("c")
    old = restored(a, "old")
    c.state.ledger.out = True
    for number in range(5):
        put(a, msg=str(number))
    tidy(a, b)
    tidy(a)
    with pytest.raises(Unusable, match="old.db ends before: make a copy beside a front that runs"):
        front(old, Fake(log))
    c.state.ledger.out = False
    settle(c)
    assert c.broken and "c.db ends before: make a copy beside a front that runs" in inside.said(capfd)


@pytest.mark.skipif(bool(postgres.reason_to_skip()), reason=str(postgres.reason_to_skip()))
def test_old_entries_leave_a_real_postgresql_and_a_new_front_begins_with_a_copy(tmp_path, at_once):
    from ledgers.postgres import connect

    with postgres.Postgres() as server:
        a, b = [front(tmp_path / name, connect(server.url, single=True)) for name in ("a.db", "b.db")]
        for number in range(20):
            put(a, msg=str(number))

        def old_ones_have_left():
            """A heartbeat is known to the other front when that has read it."""
            tidy(a, b)
            [[first, number]] = server.ask("SELECT min(position), count(*) FROM agent_bus_ledger WHERE position > 0")
            return first > 20 and number < 20

        wait_until(old_ones_have_left)
        with pytest.raises(Unusable, match="make a copy beside a front that runs"):
            front(tmp_path / "c.db", connect(server.url, single=True))
        d = front(restored(a, "d", tmp_path / "b.db.copy"), connect(server.url, single=True))
        assert log_of(d) == [str(number) for number in range(20)]
        same(a, b, d)
        for each in (a, b, d):
            end(each)


def test_a_front_that_takes_a_copy_keeps_its_locks(fronts, at_once):
    """Without them, whoever opens the database next takes it for one that nobody uses, and makes its WAL index anew."""
    a = fronts("a")
    put(a)
    tidy(a)
    take = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'rb+'), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 128)"
    command = [sys.executable, "-I", "-S", "-c", take, f"{a.state.path}-shm"]
    assert "BlockingIOError" in subprocess.run(command, capture_output=True, text=True).stderr
