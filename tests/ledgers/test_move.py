"""A bus that has mail goes onto a ledger, and back (ledgers/move.py): all stays, and killed it is where it was."""
import contextlib
import gc
import sqlite3

import pytest

import bus_server
from bus_server import State, Unusable, load_extensions
from ledgers import Unknown
from ledgers.mirror import TABLES
from ledgers.move import alone, back, onto
from tests.kit import inside
from tests.kit.ledger import Fake, Log, ask, common_look, do, draft, end, invited, log_of, put, request, same, settle
from tests.kit.ledger import turns as turns_of

EXTENSIONS = load_extensions(())
OF_FRONTS = set(TABLES)


def facts(path):
    """What is in the file of a bus or a front, but what only fronts have, and the index."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        known = sorted(tables - OF_FRONTS - {"places", "runs"})
        return {table: sorted(map(repr, database.execute(f"SELECT * FROM {table}"))) for table in known}


@pytest.fixture
def log():
    """Of the real clock, as that of the bus alone."""
    return Log()


@pytest.fixture
def path(tmp_path):
    """A bus of its own, with all kinds of things in it."""
    path = tmp_path / "bus.db"
    bus = inside.make(path)
    for body in (
        {"from": "ann", "to": "bob", "msg": "one", "key": "k1"},
        {"from": "ann", "to": "bob", "msg": "two"},
        {"from": "ann", "to": "builds", "msg": "job"},
    ):
        assert ask_alone(bus, "POST", "/send", body)[0] == 200
    tick = ask_alone(bus, "GET", "/recv?to=bob&since=0&max=1")[1]["now"]
    ask_alone(bus, "GET", f"/recv?to=bob&since={tick}&max=1")
    assert ask_alone(bus, "POST", "/claim", {"to": "builds", "worker": "w1", "lease": 3600})[1]["messages"]
    assert ask_alone(bus, "POST", "/lock", {"from": "ann", "names": ["a.py"]})[0] == 200
    bus.save_marks()
    turns(bus)
    inside.close(bus)
    return str(path)


def turns(bus):
    while bus.loop.actions or not bus.ledger.idle():
        bus.loop.take_turn()


def ask_alone(bus, *asked):
    answer = request(bus, *asked)
    turns(bus)
    return answer()


def test_everything_stays_on_the_way_onto_a_ledger_and_back(path, log, fronts):
    before = facts(path)
    assert "is on the ledger" in onto(path, Fake(log))
    a = fronts("bus")
    assert facts(path) == before, "but what makes it a front"
    assert log_of(a) == ["one", "two", "job"]
    again = ask(a, "POST", "/send", {"from": "ann", "to": "bob", "msg": "one", "key": "k1"})
    assert again[1]["duplicate"] is True
    assert ask(a, "POST", "/claim", {"to": "builds", "worker": "w2", "wait": 0})[1]["messages"] == [], "its lease holds"
    assert ask(a, "POST", "/lock", {"from": "bob", "names": ["a.py"]})[0] == 409
    [tick] = put(a, msg="three")
    end(a)
    now = facts(path)
    assert "start the bus without --ledger" in back(path, Fake(log), EXTENSIONS)
    assert facts(path) == now
    bus = inside.make(path)
    assert f"('{bus.state.bus}'" in before["bus"][0], "the same bus id"
    assert ask_alone(bus, "GET", "/log?since=0")[1]["messages"][-1]["id"] == f"{tick:x}"
    assert ask_alone(bus, "POST", "/claim", {"to": "builds", "worker": "w2", "wait": 0})[1]["messages"] == []
    inside.close(bus)


def test_a_move_that_was_killed_leaves_the_bus_and_goes_on(path, log, monkeypatch, fronts):
    """The first entry is in the ledger, and the file is as it was."""
    before = facts(path)
    monkeypatch.setattr("ledgers.move.migrate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        onto(path, Fake(log))
    monkeypatch.undo()
    bus = inside.make(path)
    ask_alone(bus, "POST", "/send", {"from": "ann", "to": "bob", "msg": "meanwhile"})
    inside.close(bus)
    assert facts(path)["messages"] != before["messages"]
    onto(path, Fake(log))
    assert len(log.entries) == 1
    a = fronts("bus")
    assert log_of(a) == ["one", "two", "job", "meanwhile"]
    end(a)


def test_a_move_without_an_answer_of_the_ledger_leaves_the_bus_and_goes_on(path, log):
    before, ledger = facts(path), Fake(log)
    ledger.faults = ["stored"]
    with pytest.raises(Unknown):
        onto(path, ledger)
    assert facts(path) == before
    onto(path, Fake(log))
    assert len(log.entries) == 1


def test_a_bus_is_moved_onto_an_empty_ledger_only(path, log, fronts):
    end(fronts("other"))
    before = facts(path)
    with pytest.raises(Unusable, match="this ledger is not empty"):
        onto(path, Fake(log))
    assert facts(path) == before
    State(path).close()


def test_after_a_move_a_front_without_a_copy_is_refused_and_with_one_it_starts(path, log, tmp_path, fronts):
    onto(path, Fake(log))
    a = fronts("bus")
    with pytest.raises(Unusable, match="its mail is in copies only: make a copy beside a front"):
        fronts("b")
    run("backup", tmp_path / "copy.db", "--db", path)
    put(a, msg="after the copy")
    run("restore", tmp_path / "copy.db", "--db", tmp_path / "b.db")
    b = fronts("b")
    assert log_of(b) == ["one", "two", "job", "after the copy"] and b.state.bus == a.state.bus
    same(a, b)


def run(command, *arguments):
    bus_server.COMMANDS[command](list(map(str, arguments)))


def test_two_files_that_differ_are_not_the_same_bus(path, log, tmp_path, fronts):
    """Somebody has a second file of the bus that was moved, made by cp: its results differ, and that is found."""
    second = tmp_path / "second" / "bus.db"
    second.parent.mkdir()
    second.write_bytes((tmp_path / "bus.db").read_bytes())
    onto(path, Fake(log))
    with contextlib.closing(sqlite3.connect(second)) as database:
        database.execute("DELETE FROM messages WHERE tick = (SELECT min(tick) FROM messages)")
        database.commit()
    log.entries[0] = (*log.entries[0][:2], log.entries[0][2].replace(path.encode(), str(second).encode()))
    onto(str(second), Fake(log))
    log.entries[0] = (*log.entries[0][:2], log.entries[0][2].replace(str(second).encode(), path.encode()))
    a, b = fronts("bus"), fronts("second/bus")
    settle(a, b)
    do(a, bus_server.Put([draft()]))
    settle(b)
    assert a.broken or b.broken


def test_what_damage_took_from_a_bus_is_told_to_readers_after_its_move(path, log, fronts):
    with contextlib.closing(State(path)) as state:
        state.tell_loss(state.last)
        lost = state.ask("SELECT lost FROM bus")
    onto(path, Fake(log))
    a = fronts("bus")
    gap = ask(a, "GET", "/recv?to=bob&since=1")[1]["gap"]
    assert lost != (0,) and gap["to"] * 1000000 == pytest.approx(lost[0], abs=2)


def test_all_fronts_stop_when_the_bus_has_left_and_none_acknowledges_more(path, log, tmp_path, capfd, fronts):
    onto(path, Fake(log))
    a = fronts("bus")
    put(a, msg="at a")
    run("backup", tmp_path / "copy.db", "--db", path)
    run("restore", tmp_path / "copy.db", "--db", tmp_path / "b.db")
    b = fronts("b")
    put(b, msg="at b")
    end(a)
    b.state.ledger.hints = lambda position: []
    back(path, Fake(log), EXTENSIONS)
    status, answer = ask(b, "POST", "/send", {"from": "ann", "to": "bob", "msg": "late"})
    assert status == 503 and b.broken and "the bus has left this ledger" in inside.said(capfd)
    end(b)
    with pytest.raises(Unusable, match="the bus has left this ledger: it is served from the file of .*bus.db"):
        fronts("b")
    with pytest.raises(Unusable, match="a bus of its own, and its mail is not in the ledger"):
        fronts("bus")
    bus = inside.make(path)
    assert [each["msg"] for each in ask_alone(bus, "GET", "/log?since=0")[1]["messages"]][-2:] == ["at a", "at b"]
    inside.close(bus)


def test_a_front_whose_entry_came_behind_the_last_one_never_starts_again(path, log, tmp_path, fronts):
    """Its entry is in the ledger, because it had not heard yet that the bus has left. A service starts it each time."""
    onto(path, Fake(log))
    a = fronts("bus")
    run("backup", tmp_path / "copy.db", "--db", path)
    run("restore", tmp_path / "copy.db", "--db", tmp_path / "b.db")
    b = fronts("b")
    behind = tmp_path / "c.db"
    run("restore", tmp_path / "copy.db", "--db", behind)
    end(a)
    settle(b)
    b.loop.timers.clear()  # no look of its own comes between
    quiet = Fake(log)
    quiet.hints = lambda position: []
    back(path, quiet, EXTENSIONS)
    late = request(b, "POST", "/send", {"from": "ann", "to": "bob", "msg": "late"})
    turns_of(b)
    assert late()[0] == 503 and b.broken and log.written()[-2:] == [["left"], ["put"]]
    end(b)
    entries = len(log.entries)
    for _ in range(3):
        with pytest.raises(Unusable, match="the bus has left this ledger: it is served from the file of .*bus.db"):
            fronts("b")
        gc.collect()  # what holds the lock of its file
    assert len(log.entries) == entries, "nobody serves this ledger"
    second = tmp_path / "b.db"
    back(str(second), Fake(log), EXTENSIONS)
    back(str(behind), Fake(log), EXTENSIONS)
    for each in (second, behind):
        assert "late" not in "".join(facts(each)["messages"]), "each file that goes back ends at the same entry"


def test_what_is_stored_while_the_bus_leaves_comes_along(log, fronts):
    """Another front does not know yet, and its entry comes before the last one: it has acknowledged it."""
    a, b = fronts("a"), fronts("b")
    path = b.state.path
    end(b)
    ledger = Fake(log)
    append, ledger.append = ledger.append, lambda *entry: (put(a, msg="just before"), append(*entry))[1]
    back(path, ledger, EXTENSIONS)
    assert "just before" in "".join(facts(path)["messages"])


def test_a_token_that_came_while_the_front_was_stopped_is_there_on_the_way_back(log, fronts):
    a, b = fronts("a"), fronts("b")
    path = b.state.path
    end(b)
    invited(a)
    common_look(a)
    settle(a)
    end(a)
    back(path, Fake(log), EXTENSIONS)
    assert [row["name"] for row in bus_server.Tokens(path).rows()] == ["ann"]


def test_a_way_back_that_was_killed_leaves_the_front_and_goes_on(path, log, monkeypatch, fronts):
    onto(path, Fake(log))
    end(fronts("bus"))
    monkeypatch.setattr("ledgers.move.alone", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        back(path, Fake(log), EXTENSIONS)
    monkeypatch.undo()
    with pytest.raises(Unusable, match="the bus has left this ledger"):
        fronts("bus")
    entries = len(log.entries)
    back(path, Fake(log), EXTENSIONS)
    assert len(log.entries) == entries
    State(path).close()


def test_without_its_ledger_a_front_becomes_another_bus(path, log, fronts):
    onto(path, Fake(log))
    a = fronts("bus")
    put(a, msg="last")
    end(a)
    bus = alone(path, "0123456789abcdef")
    assert bus == "0123456789abcdef"
    alone_again = inside.make(path)
    assert ask_alone(alone_again, "GET", "/log?since=0")[1]["bus"] == bus
    inside.close(alone_again)
    with pytest.raises(Unusable, match="a bus of its own already"):
        alone(path)
