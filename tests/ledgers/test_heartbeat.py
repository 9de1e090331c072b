"""What fronts say of themselves in the ledger, and that no front is stopped by what only another one understands."""
import contextlib
import json
import os
import sqlite3

import pytest

import bus_server
from bus_server import Operation, Unusable
from ledgers import heartbeat
from ledgers.heartbeat import Beat
from tests.kit import inside
from tests.kit.ledger import (
    SECOND,
    Fake,
    ask,
    common_look,
    do,
    end,
    front,
    invited,
    kill,
    log_of,
    put,
    request,
    rows,
    same,
    settle,
)
from tests.ledgers.newer import Newer

DROP_UPTO = "ALTER TABLE fronts DROP COLUMN upto"


def live(bus):
    """The fronts that this one takes for alive, by the names of their files."""
    return {each.front.rpartition("/")[2].partition(".db#")[0]: each for each in bus.ledger.fronts.live}


def test_each_front_is_known_to_the_others_before_it_serves_and_until_it_ends(fronts):
    a = fronts("a")
    assert set(live(a)) == {"a"}
    b = fronts("b")
    assert set(live(b)) == {"a", "b"}
    settle(a)
    assert set(live(a)) == {"a", "b"}
    end(b)
    settle(a)
    assert set(live(a)) == {"a"}


def test_two_fronts_of_one_name_are_two(tmp_path, fronts, log, monkeypatch):
    """Two machines, or two containers, of one hostname, and the same path on each of them; one killed and run again."""
    with contextlib.ExitStack() as stack:

        def start(folder):
            (tmp_path / folder).mkdir(exist_ok=True)
            monkeypatch.chdir(tmp_path / folder)
            return front("bus.db", Fake(log))

        first = start("one")
        stack.callback(end, first)
        kill(start("two"))
        second = start("two")
        stack.callback(end, second)
        assert first.state.front in [each.front for each in second.ledger.fronts.live], "nobody has said that it ended"
        settle(first, second)
        assert [each.front for each in first.ledger.fronts.live] == sorted([first.state.front, second.state.front])
        assert first.state.front.partition("#")[0] == second.state.front.partition("#")[0]


def test_a_front_that_is_started_by_another_path_knows_its_earlier_runs(tmp_path, log, monkeypatch):
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path)
    kill(front("bus.db", Fake(log)))
    monkeypatch.chdir(tmp_path / "x")
    again = front("../bus.db", Fake(log))
    assert [each.front for each in again.ledger.fronts.live] == [again.state.front]
    end(again)


def test_a_front_that_is_said_to_have_ended_says_at_once_that_it_lives(fronts):
    a, b = fronts("a"), fronts("b")
    do(a, Beat(b.state.front, {}))
    a.ledger.fronts.look()
    assert set(live(a)) == {"a"}
    settle(b)
    settle(a)
    assert set(live(a)) == {"a", "b"} == set(live(b))


def test_a_front_that_says_nothing_is_forgotten(fronts, log):
    a, b = fronts("a"), fronts("b")
    log.wall.wall += heartbeat.LIVE - SECOND
    beats(a)
    assert set(live(a)) == {"a", "b"}
    log.wall.wall += 2 * SECOND
    beats(a)
    assert set(live(a)) == {"a"}
    settle(b)
    assert set(live(b)) == {"a", "b"}, "it says at once that it is back"
    settle(a)
    assert set(live(a)) == {"a", "b"} and same(a, b) is None
    log.wall.wall -= 2 * heartbeat.FORGOTTEN
    beats(a)
    log.wall.wall += heartbeat.FORGOTTEN + SECOND
    beats(a)
    assert a.state.ask("SELECT count(*) FROM fronts") == (1,)


def test_a_heartbeat_says_how_far_a_front_and_its_copy_are_and_what_it_understands(fronts):
    a, b = fronts("a"), fronts("b")
    put(a)
    position = a.state.position
    a.ledger.fronts.copy = 7
    beats(a)
    settle(b)
    its = live(b)["a"]
    assert (its.position, its.copy, its.formats) == (position, 7, [1]) and its.at == b.state.time.entry.wall
    assert {"put", "claim", "beat"} <= set(its.kinds)
    c = fronts("c")
    assert live(c)["a"] == its, "it is kept for a front that starts later"


def test_a_front_beats_by_itself(fronts, log, monkeypatch):
    monkeypatch.setattr(heartbeat, "EVERY", 0.01)
    a = fronts()
    for _ in range(1000):
        a.loop.take_turn()
        if a.state.position > 2:
            break
    assert len(log.written()) == 1 and len(log.entries) > 2


def test_healthz_and_metrics_say_how_far_a_front_is_and_how_many_live(fronts):
    a = fronts("a")
    fronts("b")
    settle(a)
    [tick] = put(a)
    status, answer = ask(a, "GET", "/healthz")
    assert status == 200 and answer["now"] == tick / SECOND
    assert (answer["position"], answer["fronts"]) == (a.state.position, 2)
    assert answer["ledger"] == {"leads": "memory", "waits_for": ""}
    figures = {name: [value for _, value in values] for each in a.metrics for name, _, _, values in each()}
    assert figures["ledger_position"] == [a.state.position] and figures["fronts"] == [2]
    assert len(figures["front_position"]) == 2 and all(each < 5 for each in figures["front_position"])


def test_a_stranger_is_told_nothing_of_the_fronts(fronts):
    a = fronts()
    secret = invited(a)
    common_look(a)
    settle(a)
    a.gate.tokens.refresh()
    assert not {"position", "fronts", "ledger"} & ask(a, "GET", "/healthz")[1].keys()
    assert {"position", "fronts", "ledger"} <= ask(a, "GET", "/healthz", None, f"Bearer {secret}")[1].keys()


def test_a_file_of_before_there_were_heartbeats_is_brought_up_to_date(fronts):
    a, b = fronts("a"), fronts("b")
    put(a)
    settle(b)
    for name, statements in (("a", ["DROP TABLE fronts", "DROP TABLE withheld"]), ("b", [DROP_UPTO])):
        bus = {"a": a, "b": b}[name]
        end(bus)
        with contextlib.closing(sqlite3.connect(bus.state.path)) as database:
            for statement in statements:
                database.execute(statement)
    a, b = fronts("a"), fronts("b")
    assert set(live(a)) == {"a"} and set(live(b)) == {"a", "b"}
    put(b)
    settle(a)
    assert log_of(a) == log_of(b) == ["x", "x"]


def beats(bus):
    bus.ledger.fronts.beat()
    settle(bus)


class Dance(Operation):
    """What only the extension of a newer front knows."""

    kind = "dance"

    def apply(self, state, now):
        return state.mailbox("default", "dancer")


def test_what_one_front_does_not_know_is_not_written_while_it_lives(fronts, monkeypatch, log):
    a = fronts("a")
    monkeypatch.setitem(bus_server.OPERATIONS, "dance", Dance)
    b = fronts("b")
    settle(a, b)
    before, refused = log.written(), []
    b.do(Dance(), None, lambda *_: None, refused.append)
    settle(b, a)
    assert len(refused) == 1 and log.written() == before and not a.broken
    assert put(b, msg="what both know")
    end(a)
    settle(b)
    assert do(b, Dance())
    monkeypatch.delitem(bus_server.OPERATIONS, "dance")
    with pytest.raises(Unusable, match="'dance' of format 1 is not known here: use the version and the extensions"):
        fronts("a")


def test_who_asks_for_what_another_front_does_not_know_is_told_which_one(fronts, monkeypatch):
    monkeypatch.delitem(bus_server.OPERATIONS, "claim")
    a = fronts("a", "--without", "work")
    b = fronts("b")
    settle(a, b)
    asked = request(b, "POST", "/claim", {"to": "builds", "wait": 0, "worker": "w"})
    settle(b)
    status, answer = asked()
    assert b"\r\nRetry-After: 2\r\n" in asked.written()
    assert status == 503 and f"{a.state.front} does not know 'claim'" in answer["error"]
    assert "give all fronts the same version and the same extensions" in answer["error"]
    beats(b)
    settle(a, b)
    assert rows(a)["front"] == rows(b)["front"], "and both go on; the tables of work.py are those of one"


def formats(log):
    return [json.loads(entry.partition(b"\n")[0])[0] for _, _, entry in log.entries]


def test_two_versions_side_by_side_write_what_the_older_one_understands(fronts, log, monkeypatch, capfd):
    """A rolling upgrade: each front is stopped, and started again with the next version."""
    a, b = fronts("a"), fronts("b")
    put(a, msg="both old")
    monkeypatch.setattr("ledgers.start.Mirror", Newer)
    end(b)
    b = fronts("b")
    settle(a, b)
    for bus, text in ((a, "from the old one"), (b, "from the new one")):
        put(bus, msg=text)
        beats(bus)
        settle(a, b)
    same(a, b)
    assert set(formats(log)) == {1} and not a.broken
    end(a)
    settle(b)
    put(b, msg="the old one has ended")
    assert formats(log)[-1] == 2
    monkeypatch.undo()
    with pytest.raises(Unusable, match="an entry of format 2: upgrade this front"):
        fronts("a")
    monkeypatch.setattr("ledgers.start.Mirror", Newer)
    a = fronts("a")
    same(a, b)
    assert log_of(a) == ["both old", "from the old one", "from the new one", "the old one has ended"]


def test_an_older_front_that_is_silent_for_long_stops_when_it_comes_back(fronts, log, monkeypatch, capfd):
    a = fronts("a")
    monkeypatch.setattr("ledgers.start.Mirror", Newer)
    b = fronts("b")
    log.wall.wall += heartbeat.LIVE + SECOND
    beats(b)
    put(b)
    assert formats(log)[-1] == 2
    settle(a)
    assert a.broken and "an entry of format 2: upgrade this front" in inside.said(capfd)
    assert ask(a, "POST", "/send", {"from": "ann", "to": "bob", "msg": "x"})[0] == 503


def test_a_pipe_in_the_place_of_its_name_holds_up_no_front(tmp_path):
    """Another user may have left it, where others may create files."""
    os.mkfifo(tmp_path / "a.db.front")
    with pytest.raises(Unusable, match=r"a\.db\.front is no plain file of yours"):
        heartbeat.name_of(str(tmp_path / "a.db"))
