"""The SQLite file under the state: durable, indexed, checked, on a full disk, read beside the bus, and refused."""
import os
import shutil
import sqlite3

import pytest

import bus_server
from bus_extensions.replies import Recall
from bus_extensions.work import NOUN, TABLES, Claim
from bus_server import (
    MIGRATIONS,
    Mark,
    Marks,
    Refused,
    State,
    Unusable,
)
from tests.kit.inside import said
from tests.kit.store import OnSqlite, commit, message, remove, texts


class TestDatabase(OnSqlite):
    def test_it_is_durable_and_in_order(self, store):
        assert store.writing.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert store.writing.execute("PRAGMA synchronous").fetchone() == (2,)
        with pytest.raises(sqlite3.OperationalError):
            store.view.database.execute("INSERT INTO bus VALUES ('x', 0)")

    def test_reading_several_names_sorts_nothing(self, store):
        """A sort would read everything that waits before the first message, and a scan everything that is stored."""
        plans = []
        store.index.FLUSH_MESSAGES = 2
        commit(store, message("bob"), message("team"))
        store.view.database.set_trace_callback(plans.append)
        commit(store, message("bob"))
        assert texts(store, "bob", "team") == ["x"] * 3
        store.view.oldest("default", "bob", 0)
        store.view.count_up_to("default", "bob", store.index.tail.above)
        store.view.database.set_trace_callback(None)
        asked = [plan for plan in plans if "FROM runs" in plan]
        assert len(asked) == 5 and "DESC" in asked[4]  # bob, team, all, the oldest, and backwards
        steps = [row[3] for each in asked for row in store.view.database.execute(f"EXPLAIN QUERY PLAN {each}")]
        assert all(" USING " in step for step in steps if step.startswith(("SCAN", "SEARCH"))), steps
        assert not [step for step in steps if "TEMP B-TREE" in step], steps

    def test_a_claim_searches_nothing_without_an_index(self, store):
        """The work that was done in 30 days is much, and would be looked through with each claim."""
        store.add_tables("work", NOUN, TABLES)
        commit(store, message("builds"))
        plans = []
        store.writing.set_trace_callback(plans.append)
        commit(store, also=[Claim("default", "builds", 1, 60_000_000, 7, "worker", 5)])
        store.writing.set_trace_callback(None)
        asked = [plan.replace("?", "1") for plan in plans if plan.startswith(("SELECT", "UPDATE"))]
        steps = [row[3] for each in asked for row in store.writing.execute(f"EXPLAIN QUERY PLAN {each}")]
        assert len(asked) >= 5 and all(" USING " in step or step.startswith("SCAN json_each") for step in steps), steps

    @pytest.mark.parametrize(
        "change",
        [
            "text = replace(text, 'pay 100', 'pay 900')",
            "text = CAST(replace(CAST(text AS BLOB), CAST('100' AS BLOB), x'B13030') AS TEXT)",  # 1 with its top bit
            "sender = 'malice'",
            "tick = tick + 1",
        ],
        ids=["text", "no-utf-8", "sender", "tick"],
    )

    def test_a_changed_bit_is_reported_and_never_delivered(self, store, clock, capfd, change):
        store.index.FLUSH_MESSAGES = 1  # the newest messages are read by their ticks in memory
        commit(store, message("bob", "first"), message("bob", "pay 100"))
        clock.now += 10
        commit(store, message("bob", "last"))
        store.writing.execute(f"UPDATE messages SET {change} WHERE text LIKE '%pay 100%'")
        assert texts(store, "bob") == ["first", "last"]
        assert "damaged" in said(capfd)
        commit(store, also=[remove(clock.now)])
        assert texts(store, "bob") == ["last"], "it could not be removed"

    def test_an_index_with_a_changed_bit_is_reported_and_made_anew(self, store, clock, tmp_path, capfd):
        store.index.FLUSH_MESSAGES = 2
        commit(store, message("bob", "first"), message("bob", "last"))
        [root] = store.writing.execute("SELECT rootpage FROM sqlite_master WHERE name = 'places'").fetchone()
        store.close()
        content = bytearray((tmp_path / "bus.db").read_bytes())
        content[root * 4096 - 2] ^= 1  # in the tick of the first message; pages are numbered from 1
        (tmp_path / "bus.db").write_bytes(content)
        again = State(str(tmp_path / "bus.db"), clock)
        assert texts(again, "bob") == ["first", "last"] and "is damaged" in said(capfd)
        again.close()

    def test_a_full_disk_takes_no_message_but_knows_those_it_has_and_removes_them(self, store, clock, monkeypatch):
        commit(store, message("bob", "stored", key="k"))
        monkeypatch.setattr(bus_server, "RESERVE_BYTES", 1 << 60)
        applied = commit(store, message("bob", "new"), message("bob", "stored", key="k"))
        refused, [known] = applied.results
        assert refused.status == 507 and known.duplicate and texts(store, "bob") == ["stored"]
        commit(store, also=[remove(clock.now + 1)])
        assert texts(store, "bob") == []

    def test_room_that_removed_messages_left_is_room(self, store, clock, tmp_path, monkeypatch):
        commit(store, *[message("bob", "x" * 100_000) for _ in range(10)])
        store.writing.execute("PRAGMA wal_checkpoint").fetchall()
        disk = os.statvfs(tmp_path)
        monkeypatch.setattr(os, "statvfs", lambda path: disk)
        monkeypatch.setattr(bus_server, "RESERVE_BYTES", disk.f_bavail * disk.f_frsize + 500_000)
        assert isinstance(commit(store, message("bob")).results[0], Refused)
        commit(store, also=[remove(clock.now + 100)])
        assert not isinstance(commit(store, message("bob")).results[0], Refused)

    def test_removing_messages_takes_little_room(self, store, clock, tmp_path):
        commit(store, *[message("bob", "x" * 100_000) for _ in range(50)])
        store.writing.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        above = 0
        while above is not None:  # a slice ends also after a mebibyte
            [above] = commit(store, also=[remove(clock.now + 100, above)]).results
        assert texts(store, "bob") == [] and (tmp_path / "bus.db-wal").stat().st_size < 500_000

    def test_room_that_folding_in_the_wal_will_take_is_no_room(self, store, tmp_path, monkeypatch):
        disk = os.statvfs(tmp_path)
        monkeypatch.setattr(os, "statvfs", lambda path: disk)
        monkeypatch.setattr(bus_server, "RESERVE_BYTES", disk.f_bavail * disk.f_frsize - 500_000)
        first = commit(store, *[message("bob", "x" * 100_000) for _ in range(10)]).results[0]
        assert not isinstance(first, Refused)
        assert isinstance(commit(store, message("bob")).results[0], Refused)
        store.writing.execute("PRAGMA wal_checkpoint").fetchall()
        assert not isinstance(commit(store, message("bob")).results[0], Refused)

    def test_what_an_earlier_process_left_in_the_wal_is_written_anew_at_start(self, store, clock, tmp_path):
        """A copy beside the running bus is what a killed one leaves."""
        commit(store, message("bob", "kept"))
        for file in ("bus.db", "bus.db-wal"):
            shutil.copy(tmp_path / file, tmp_path / file.replace("bus", "left"))
        assert (tmp_path / "left.db-wal").stat().st_size > 0
        again = State(str(tmp_path / "left.db"), clock)
        assert (tmp_path / "left.db-wal").stat().st_size == 0 and texts(again, "bob") == ["kept"]
        again.close()

    def test_people_can_read_it_beside_the_bus(self, store, tmp_path):
        parent = commit(store, message("bob", 'say "hi"', subject="greeting", type="odd")).last
        reply, recalled = [
            commit(store, one).last
            for one in (
                message("bob", "hello")._replace(answers=parent, thread=parent, depth=1),
                message("carl", "no", subject="never mind"),
            )
        ]
        commit(store, also=[Marks([Mark("default", "bob", True, parent, reply, 0)], [], {})])
        commit(store, also=[Recall(recalled)])
        beside = sqlite3.connect(f"file:{tmp_path}/bus.db?mode=ro", uri=True)
        columns = 'id, "from", "to", channel, subject, type, thread, state, msg'
        assert beside.execute(f"SELECT {columns} FROM readable").fetchall() == [
            (f"{parent:x}", "alice", "bob", "default", "greeting", "odd", f"{parent:x}", "acknowledged", 'say "hi"'),
            (f"{reply:x}", "alice", "bob", "default", None, None, f"{parent:x}", "fetched", "hello"),
            (f"{recalled:x}", "alice", "carl", "default", None, None, f"{recalled:x}", "recalled", None),
        ]
        beside.close()

    def test_people_can_see_how_far_each_name_has_read(self, store, tmp_path):
        commit(store, message("bob"), message("team"))
        minute = 1_795_000_020_000_000
        commit(store, also=[Marks([Mark("default", "bob", True, minute, minute + 60_000_000, 0)], [], {})])
        beside = sqlite3.connect(f"file:{tmp_path}/bus.db?mode=ro", uri=True)
        assert beside.execute("SELECT * FROM states").fetchall() == [
            ("default", "bob", 1, None, "2026-11-18 11:07:00", "2026-11-18 11:08:00", None),
            ("default", "team", 0, None, None, None, None),
        ]
        beside.close()

    def test_people_can_read_what_is_beside_a_damaged_message(self, store, tmp_path):
        for text in ("one", "two", "three"):
            commit(store, message("bob", text))
        store.writing.execute("UPDATE messages SET text = replace(text, '\"two', 'two')")
        beside = sqlite3.connect(f"file:{tmp_path}/bus.db?mode=ro", uri=True)
        found = [msg for [msg] in beside.execute("SELECT msg FROM readable ORDER BY id").fetchall()]
        assert found[::2] == ["one", "three"] and 'two"' in found[1]
        beside.close()

    def test_memory_is_a_database_too(self):
        store = State(":memory:")
        commit(store, message("bob", "gone soon"))
        assert texts(store, "bob") == ["gone soon"]
        store.close()


def test_a_second_server_is_refused(tmp_path):
    store = State(str(tmp_path / "bus.db"))
    with pytest.raises(Unusable, match="in use by another bus_server: stop that bus, or give another --db"):
        State(str(tmp_path / "bus.db"))
    store.close()


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (f"PRAGMA user_version={len(MIGRATIONS) + 1}", "newer bus_server"),
        ("CREATE TABLE recipes(title)", "not a database of agent-bus"),
    ],
)
def test_a_database_that_is_not_ours_is_refused_and_left_alone(tmp_path, prepare, reason):
    path = tmp_path / "bus.db"
    database = sqlite3.connect(path)
    database.execute(prepare)
    database.close()
    before = path.read_bytes()
    with pytest.raises(Unusable, match=reason):
        State(str(path))
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "bus.db").write_text("hello, I am a text file, and nobody's database" * 100)
    with pytest.raises(Unusable, match="cannot use the database"):
        State(str(tmp_path / "bus.db"))


def test_a_database_with_a_broken_page_is_refused(tmp_path):
    store = State(str(tmp_path / "bus.db"))
    commit(store, *[message("bob", "x" * 500) for _ in range(200)])
    store.close()
    content = bytearray((tmp_path / "bus.db").read_bytes())
    content[5 * 4096 : 6 * 4096] = b"\xff" * 4096
    (tmp_path / "bus.db").write_bytes(content)
    with pytest.raises(Unusable, match="damaged|malformed"):
        State(str(tmp_path / "bus.db"))
