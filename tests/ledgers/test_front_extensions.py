"""The extensions on a bus with several fronts: what happens at one of them is followed by the others."""
import contextlib
import sqlite3
import time

import bus_server
import ledgers.front
from ledgers.recall import Retract
from tests.extensions.test_redact import planned_folds, reading
from tests.kit import inside
from tests.kit.ledger import SECOND, ask, do, end, log_of, put, request, same, settle
from tests.kit.processes import wait_until


def test_what_is_not_built_is_refused_in_words(fronts):
    a = fronts()
    for method in ("GET", "PUT"):
        status, answer = ask(a, method, inside.FILE_PATH)
        assert status == 501 and "has no files" in answer["error"]


ALONE = {"bury", "recall", "fold", "later move", "lock"}  # what follows these in memory, no other front needs


def test_what_follows_an_operation_of_an_extension_follows_at_the_other_fronts_too(fronts):
    """An operation that is new is in one of the two lists, because somebody has thought of it."""
    kinds = {each.kind for module in bus_server.load_extensions(()).values() for each in module.OPERATIONS}
    a = fronts()
    assert kinds >= ALONE and kinds - ALONE == a.ledger.elsewhere.keys() & kinds


def test_the_jobs_of_a_claim_whose_answer_was_lost_are_free_again(fronts, monkeypatch):
    """As if the answer had not reached the worker: the attempt does not count."""
    a = fronts("a")
    put(a, to="builds")
    monkeypatch.setattr(ledgers.front, "GIVE_UP", 0.05)  # before a second attempt
    a.state.ledger.faults = ["stored"]
    claim = {"to": "builds", "wait": 0, "lease": 3600, "worker": "w"}
    assert ask(a, "POST", "/claim", claim)[0] == 503
    monkeypatch.undo()
    settle(a)
    [job] = ask(a, "POST", "/claim", claim)[1]["messages"]
    assert job["attempt"] == 1


def test_what_was_refused_is_not_followed_in_memory(fronts):
    a, b = fronts("a"), fronts("b")
    told = []
    b.ledger.elsewhere["retract"] = lambda *what: told.append(what)
    do(a, Retract("1", 5))
    settle(b)
    assert told == [] and b.state.position == a.state.position


def test_a_job_goes_to_one_worker_at_one_front(fronts):
    a, b = fronts("a"), fronts("b")
    claim = {"to": "builds", "wait": 25, "lease": 5}
    waiting = [request(bus, "POST", "/claim", {**claim, "worker": name}) for bus, name in ((a, "w1"), (b, "w2"))]
    more = [request(bus, "POST", "/claim", {**claim, "worker": "another"}) for bus in (a, b)]
    settle(a, b)
    ask(a, "POST", "/send", {"from": "ann", "to": "builds", "msg": "job"})
    settle(b, a)
    has, other = sorted(waiting, key=lambda answer: answer() is None)
    [job] = has()[1]["messages"]
    assert [answer() for answer in (other, *more)] == [None] * 3
    its, others = (a, b) if has is waiting[0] else (b, a)
    assert len(others.mailboxes.parked) == 2
    left = [each.due - others.door.deadlines.clock() for each in others.mailboxes.parked]
    assert max(left) < 6, "they look again when the lease ends"
    nack = {"id": job["id"], "lease": job["lease"]}
    assert ask(its, "POST", "/nack", nack)[0] == 200
    settle(others)
    left = [each.due - others.door.deadlines.clock() for each in others.mailboxes.parked]
    assert max(left) < 0.1, "at once, when the job was given back"
    same(a, b)


def test_a_redaction_stops_no_front_whose_copy_is_being_read(fronts, tmp_path, monkeypatch):
    """A backup, or the index of words, reads it: then this front cannot empty its log at once, and another one can."""
    a, b = fronts("a"), fronts("b")
    [tick] = put(a, msg="secret")
    settle(b)
    later = []
    monkeypatch.setattr(b.loop, "later", lambda seconds, action: later.append(action))
    with contextlib.closing(sqlite3.connect(tmp_path / "b.db")) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM messages").fetchall()
        status, answer = ask(a, "POST", "/redact", {"id": f"{tick:x}"})
        settle(b)
    assert status == 200 and answer["overwritten"] is False and "ledger in PostgreSQL" in answer["warning"]
    assert b"secret" in (tmp_path / "b.db-wal").read_bytes()
    later[-1]()
    settle(b, a)
    assert b"secret" not in (tmp_path / "b.db-wal").read_bytes() + (tmp_path / "b.db").read_bytes()
    put(a, msg="2")
    put(b, msg="3")
    same(a, b)
    assert not a.broken and not b.broken


def test_a_front_whose_copy_is_being_read_tries_again_alone_and_once(fronts, log, tmp_path, monkeypatch):
    """What one front writes into the ledger, each other one does too: their attempts doubled every ten seconds."""
    a, b = fronts("a"), fronts("b")
    ticks = [put(a, msg=f"secret {number}")[0] for number in range(2)]
    settle(b)
    planned = [planned_folds(bus, monkeypatch) for bus in (a, b)]

    def tried():
        for its in planned:
            for attempt in its[:]:
                its.remove(attempt)
                attempt()
        settle(a, b)
        return not any(planned)

    with reading(tmp_path / "a.db"), reading(tmp_path / "b.db"):
        for tick in ticks:
            assert ask(a, "POST", "/redact", {"id": f"{tick:x}"})[0] == 200
            settle(b)
        written = log.written()
        assert not tried() and not tried() and [*map(len, planned)] == [1, 1]
    wait_until(tried)
    assert log.written() == written
    same(a, b, fronts("new"))
    for name in ("a", "b", "new"):
        assert b"secret" not in (tmp_path / f"{name}.db").read_bytes() + (tmp_path / f"{name}.db-wal").read_bytes()


def test_what_was_scheduled_at_a_front_that_has_died_is_sent_by_the_others(fronts, log):
    a, b, c = fronts("a"), fronts("b"), fronts("c")
    others = [each.routes["POST", "/later"].call.__self__.due for each in (a, b, c)]
    for msg in ("once", "taken back"):
        message = {"from": "ann", "to": "bob", "msg": msg}
        status, given = ask(a, "POST", "/later", {"after": 60, "message": message})
        assert status == 200
    settle(b, c)
    assert ask(b, "POST", "/later", {"cancel": given["id"]})[0] == 200
    settle(a, c)
    [held] = {each.held.all for each in others}
    assert 0 < held < 1200
    end(a)
    log.wall.wall += 61 * SECOND
    put(b, to="nobody", msg="and the others learn what time it is")
    settle(c)

    def all_are_sent():
        """In one turn both of them send. On a slow machine an earlier look asked for a pause, or was cut short."""
        for each in others[1:]:
            each.pause = 0
            each.look()
        settle(b, c)
        return not any(each.held.all for each in others[1:])

    wait_until(all_are_sent)
    assert log_of(b) == log_of(c) == ["and the others learn what time it is", "once"]
    assert [each.held.all for each in others[1:]] == [0, 0] and not b.view.ask("SELECT 1 FROM later")
    same(b, c)


def test_what_was_taken_back_is_not_sent_by_a_front_that_stood_still(fronts):
    """It was told of neither that nor its time; its timer comes before its next look at the ledger."""
    a, b = fronts("a"), fronts("b")
    message = {"from": "ann", "to": "bob", "msg": "taken back"}
    _, given = ask(a, "POST", "/later", {"after": 60, "message": message})
    settle(b)
    assert ask(a, "POST", "/later", {"cancel": given["id"]})[0] == 200
    b.ledger.reached(time.monotonic() - 61)
    b.state.time.offset += 61 * SECOND
    b.routes["POST", "/later"].call.__self__.due.look()
    settle(b)
    assert not log_of(b)
    same(a, b)


def test_who_waits_for_names_is_told_when_they_are_released_at_another_front(fronts):
    a, b = fronts("a"), fronts("b")
    _, held = ask(a, "POST", "/lock", {"from": "ann", "names": ["x"], "ttl": 40})
    waiting = request(b, "POST", "/lock", {"from": "bob", "names": ["x"], "wait": 60})
    settle(b)
    assert ask(a, "POST", "/renew", {"from": "ann", "fence": held["fence"], "ttl": 50})[0] == 200
    settle(b)
    [parked] = b.mailboxes.parked
    assert 40 < parked.due - b.door.deadlines.clock() < 51 and waiting() is None
    assert ask(a, "POST", "/unlock", {"from": "ann", "names": ["x"]})[1]["released"] == 1
    settle(b)
    assert waiting()[0] == 200
    same(a, b)


def test_who_has_names_compared_at_a_front_pays_for_it(fronts):
    """What was compared is known to the copy of the request that the front applied, as all others do."""
    a = fronts("a")
    a.storms = storms = bus_server.Storms(lambda: 0.0, 50)

    def paid_by(name, path):
        ask(a, "POST", "/lock", {"from": name, "names": [path]})
        return storms.WORK_BURST - storms.work.left["127.0.0.1/"][0]

    alone = paid_by("ann", "src/*.py")
    assert 0 < alone < paid_by("bob", "src/?.py") - alone
