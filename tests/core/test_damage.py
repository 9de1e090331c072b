"""A damaged row, with a text where a number belongs, or no name where a name does: it is told, and done without.

Messages have a checksum (test_log.py). Here it is what the bus knows of them: a row of that may be lost, but with it
neither the bus, nor a queue or a mailbox.
"""
import contextlib
import shutil
import sqlite3

import pytest

from tests.kit.peers import invite, run
from tests.kit.processes import Server, wait_until
from tests.kit.queues import ask, claim, mail, prune, send, settle

NO_NAME = "x'ff22'"  # bytes, and among them a quote
DAMAGE = [
    *[("work", column, "'x'") for column in ("attempt", "due")],
    *[("work", column, NO_NAME) for column in ("attempt", "due", "worker", "mailbox")],
    *[("mailboxes", column, "'x'") for column in ("own", "read", "fetched", "seen", "removed", "taken")],
    *[("mailboxes", column, NO_NAME) for column in ("channel", "name", "fetched", "taken")],
    ("receipts", "at", "'x'"),
    ("receipts", "reader", NO_NAME),
    *[("messages", column, "'x'") for column in ("n", "depth", "thread")],
    ("bus", "last", "'x'"),
]


def damage(bus, table, column, value, where="1"):
    with contextlib.closing(sqlite3.connect(bus.db)) as database:
        database.execute(f"UPDATE OR IGNORE {table} SET {column} = {value} WHERE {where}")
        database.commit()


@pytest.fixture(scope="module")
def worn(tmp_path_factory):
    """The file of a bus of which all tables have something in them, and the ids of its messages."""
    with Server(tmp_path_factory.mktemp("damage") / "worn.db") as bus:
        idents = [send(bus, msg=msg) for msg in ("done", "in hand", "given back", "later")]
        done, _, back, later = claim(bus, max=4)
        settle(bus, "ack", done)
        settle(bus, "nack", back)
        settle(bus, "nack", later, delay=3000)
        idents += [send(bus, "bob", "question"), send(bus, "bob", "not read")]
        idents.append(send(bus, "alice", "answer", "bob", reply_to=idents[-2]))
        now = ask(bus, "GET", "/recv?to=bob&max=1")[1]["now"]
        assert ask(bus, "GET", f"/recv?to=bob&max=1&since={now}")[0] == 200
        assert bus.stop() == 0
        return bus.db, idents


@pytest.fixture
def copy(worn, tmp_path):
    """A copy of it, which is not running."""
    shutil.copy(worn[0], tmp_path / "bus.db")
    with contextlib.ExitStack() as end:
        bus = Server(tmp_path / "bus.db")
        end.push(bus)
        yield bus


def everything(bus, idents):
    """All that a bus can be asked, and must answer."""
    statuses = [ask(bus, "GET", f"/message/{ident}")[0] for ident in idents]
    assert set(statuses) <= {200, 404}
    for path in ("/inbox", "/agents", "/log", "/recv?to=bob", "/recv?to=bob&since=last", "/recv?to=builds"):
        assert ask(bus, "GET", path)[0] == 200, path
    assert ask(bus, "GET", f"/thread/{idents[-1]}")[0] in (200, 404)
    assert b"agent_bus_unread" in bus.get("/metrics")
    for to in ("bob", "builds"):
        assert ask(bus, "POST", "/send", {"from": "eve", "to": to, "msg": "x", "reply_to": idents[-1]})[0] == 200
    for job in claim(bus, max=10):
        assert settle(bus, "nack", job) == 200


@pytest.mark.parametrize("table, column, value", DAMAGE)
def test_a_damaged_row_is_told_and_ends_neither_the_bus_nor_a_mailbox(worn, copy, table, column, value):
    damage(copy, table, column, value)
    copy.start()
    everything(copy, worn[1])
    damage(copy, table, column, value)
    everything(copy, worn[1])
    assert copy.stop() == 0
    said = copy.log.read_text()
    assert "is damaged; skipped" in said and "Traceback" not in said


@pytest.mark.parametrize("running", [False, True], ids=["at-start", "running"])
@pytest.mark.parametrize("column", ["attempt", "due"])
def test_a_job_of_which_not_enough_is_known_is_handed_out_again(worn, copy, column, running):
    if running:
        copy.start()
    damage(copy, "work", column, "'x'", f"tick = {int(worn[1][2], 16)}")
    if not running:
        copy.start()
    send(copy, msg="new")
    jobs = claim(copy, max=10)
    assert sorted(job["msg"] for job in jobs) == ["given back", "new"]
    assert {settle(copy, "ack", job) for job in jobs} == {200} and claim(copy) == []


def test_a_job_that_is_in_no_queue_any_more_comes_back_into_its_own(copy):
    damage(copy, "work", "mailbox", "'x'")
    copy.start()
    wait_until(lambda: [job["msg"] for job in claim(copy)] == ["given back"])


def test_a_queue_that_does_not_know_how_far_it_is_hands_out_nothing_twice(copy):
    damage(copy, "mailboxes", "taken", "'x'")
    copy.start()
    send(copy, msg="new")
    assert sorted(job["msg"] for job in claim(copy, max=10)) == ["given back", "new"]


def test_a_reader_whose_place_is_not_known_begins_with_the_first_message(copy):
    damage(copy, "mailboxes", "read", "'x'")
    copy.start()
    found = ask(copy, "GET", "/recv?to=bob&since=last")[1]["messages"]
    assert [message["msg"] for message in found] == ["question", "not read"]


def test_where_nobody_knows_what_was_removed_a_gap_is_told(copy):
    damage(copy, "mailboxes", "removed", "'x'", "name = 'bob'")
    copy.start()
    answer = ask(copy, "GET", "/recv?to=bob")[1]
    assert answer["gap"]["to"] < answer["messages"][0]["ts"] and len(answer["messages"]) == 2


def test_prune_spares_what_may_not_have_been_fetched(copy):
    copy.start()
    damage(copy, "mailboxes", "fetched", "'x'")
    damage(copy, "mailboxes", "read", "NULL")
    prune(copy)
    assert mail(copy, "bob") == ["question", "not read"]


def test_when_a_token_was_used_may_be_damaged_and_its_bus_stays_closed(tmp_path):
    with Server(tmp_path / "bus.db") as bus:
        token = invite(bus, "op", "--operator")
        with contextlib.closing(sqlite3.connect(bus.db)) as database:
            database.execute("INSERT OR REPLACE INTO uses VALUES (?, 'x')", (token[:12],))
            database.commit()
        code, out, err = run("tokens", "--db", bus.db)
        assert code == 0 and "op " in out and "never" in out and "damaged; skipped" in err
        bus.stop()
    code, _, err = run("restore", bus.db, "--db", tmp_path / "again.db")
    assert code == 0, err
    (tmp_path / "bus.db.tokens").unlink()
    assert "had tokens" in run("restore", bus.db, "--db", tmp_path / "third.db")[2]
