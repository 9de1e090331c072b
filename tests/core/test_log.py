"""The store's contract. A store on another engine inherits StoreContract and passes `make` a function that opens it."""

import os
import shutil
import sqlite3

import pytest

import bus_server
from bus_server import (
    EVERYONE,
    MIGRATIONS,
    NOW,
    PRUNE_SLICE,
    Batch,
    Claim,
    Log,
    Mark,
    Poll,
    Refused,
    Removal,
    Send,
    Unusable,
    Worker,
    draft,
)


def message(to, msg="x", sender="alice", key=None, **members):
    return draft({"from": sender, "to": to, "msg": msg, **members}, key)


def poll(*names, since=0, limit=1000, channel="default", observer=False, sender=None):
    me = None if observer else names[0]
    return Poll(me, names + (() if observer else (EVERYONE,)), channel, sender, since, limit, 0, False)


def commit(store, *drafts, **work):
    """One send for each draft, in one batch; returns the batch after its commit."""
    batch = Batch()
    batch.sends = [Send(None, each if isinstance(each, list) else [each], False) for each in drafts]
    for name, value in work.items():
        setattr(batch, name, value)
    store.stamp(batch)
    store.commit(batch)
    return batch


def texts(store, *names, **query):
    return [found.text.split('"msg": ')[1].strip('"') for found in store.after(poll(*names, **query), 1 << 62)[0]]


class Clock:
    def __init__(self, now=1_000_000_000_000):
        self.now = now

    def __call__(self):
        return self.now


class StoreContract:
    def test_ticks_are_unique_and_increase_when_the_clock_stands_still_or_steps_back(self, store, clock):
        first = commit(store, message("bob"), message("bob")).visible
        clock.now -= 3_600_000_000
        second = commit(store, message("bob")).visible
        ticks = [each.tick for each in first + second]
        assert ticks == [1_000_000_000_000, 1_000_000_000_001, 1_000_000_000_002]

    def test_the_tick_goes_on_after_a_restart_with_the_clock_behind(self, store, clock, reopen):
        last = commit(store, message("bob")).last
        clock.now -= 3_600_000_000
        again = reopen()
        assert again.last == last and commit(again, message("bob")).last == last + 1

    def test_a_raised_last_is_durable_and_lies_below_what_is_sent_with_it(self, store, clock, reopen):
        ahead = clock.now + 120_000_000
        batch = commit(store, message("bob"), at_least=ahead)
        assert batch.visible[0].tick > ahead
        commit(store, at_least=ahead + 500)
        assert reopen().last == ahead + 500

    def test_after_gives_what_lies_above_the_cursor_oldest_first(self, store):
        ticks = [each.tick for each in commit(store, *[message("bob", str(n)) for n in range(5)]).visible]
        assert texts(store, "bob") == ["0", "1", "2", "3", "4"]
        assert texts(store, "bob", since=ticks[2]) == ["3", "4"]
        assert store.after(poll("bob"), ticks[1])[0][-1].tick == ticks[1], "it looked beyond what was announced"

    def test_a_truncated_read_says_how_far_it_got(self, store):
        ticks = [each.tick for each in commit(store, *[message("bob", str(n)) for n in range(5)]).visible]
        found, reached = store.after(poll("bob", limit=2), ticks[-1])
        assert len(found) == 2 and reached == ticks[1]
        assert store.after(poll("bob", limit=5), ticks[-1])[1] is None, "all was read, and more was promised"

    def test_several_names_come_in_one_order(self, store):
        commit(
            store,
            message("bob", "1"),
            message("team", "2"),
            message("eve", "3"),
            message(EVERYONE, "4"),
            message("bob", "5"),
        )
        assert texts(store, "bob", "team") == ["1", "2", "4", "5"]

    def test_a_broadcast_is_not_for_its_sender(self, store):
        commit(store, message(EVERYONE, "hear", sender="bob"))
        assert texts(store, "bob") == [] and texts(store, "eve") == ["hear"]

    def test_looking_at_much_that_is_not_wanted_ends_in_time(self, store):
        commit(store, [message(EVERYONE, sender="bob") for _ in range(1000)], message("bob", "found"))
        found, reached = store.after(poll("bob"), 1 << 62)
        assert not found and reached, "it read on without end"
        assert texts(store, "bob", since=reached) == ["found"]

    def test_a_large_answer_is_cut_by_its_bytes(self, store):
        commit(store, *[message("bob", "x" * 200_000) for _ in range(20)])
        found, reached = store.after(poll("bob"), 1 << 62)
        assert 1 <= len(found) < 10 and reached == found[-1].tick

    def test_observers_see_every_mailbox_and_filter(self, store):
        commit(store, message("bob", "1"), message("eve", "2", channel="lab"), message("bob", "3", sender="carl"))
        assert texts(store, observer=True, channel=None) == ["1", "2", "3"]
        assert texts(store, "bob", observer=True, channel=None, sender="carl") == ["3"]
        assert texts(store, observer=True, channel="lab") == ["2"]

    def test_a_key_is_stored_once_also_within_a_batch_and_after_a_restart(self, store, reopen):
        first = commit(store, message("bob", "x", key="k"), message("bob", "x", key="k"))
        receipts = [send.receipts[0] for send in first.sends]
        assert [receipt.duplicate for receipt in receipts] == [False, True]
        again = commit(reopen(), message("bob", "x", key="k")).sends[0].receipts[0]
        assert again.duplicate and again.ticks == receipts[0].ticks == receipts[1].ticks and len(first.visible) == 1

    def test_a_key_that_many_senders_use_is_looked_up_for_one(self, store):
        commit(store, *[message("bob", sender=f"agent-{n}", key="1") for n in range(2000)])
        steps = []
        store.reading.set_progress_handler(lambda: steps.append(1), 1000)
        assert commit(store, message("bob", sender="agent-7", key="1")).sends[0].receipts[0].duplicate
        assert len(steps) < 5, "it looked through the messages of the others"

    def test_a_key_belongs_to_its_sender_and_channel(self, store):
        batch = commit(
            store,
            message("bob", key="k"),
            message("bob", key="k", sender="eve"),
            message("bob", key="k", channel="lab"),
        )
        assert [send.receipts[0].duplicate for send in batch.sends] == [False, False, False]

    def test_a_key_with_another_message_is_refused_and_its_neighbours_are_stored(self, store):
        batch = commit(
            store,
            message("bob", "1", key="k"),
            [message("bob", "2", key="k"), message("bob", "3")],
            message("bob", "4"),
        )
        assert [bool(send.refused) for send in batch.sends] == [False, True, False] and batch.sends[
            1
        ].refused.status == 409
        assert texts(store, "bob") == ["1", "4"], "a refused array left something behind"
        assert commit(store, message(["bob", "eve"], "1", key="k")).sends[0].refused.status == 409

    def test_a_retry_may_give_the_members_in_another_order(self, store):
        first = commit(store, message("bob", key="k", a=1, b={"c": 1, "d": [2]})).sends[0].receipts[0]
        again = commit(store, message("bob", key="k", b={"d": [2], "c": 1}, a=1)).sends[0]
        assert again.receipts[0].duplicate and again.receipts[0].ticks == first.ticks
        for other in ({"a": 1, "b": {"c": 1, "d": [3]}}, {"a": True, "b": {"c": 1, "d": [2]}}, {"a": 1}):
            assert commit(store, message("bob", key="k", **other)).sends[0].refused.status == 409

    def test_a_list_of_names_is_one_receipt(self, store):
        receipt = commit(store, message(["bob", "eve"], key="k")).sends[0].receipts[0]
        assert len(receipt.ticks) == 2
        assert commit(store, message(["bob", "eve"], key="k")).sends[0].receipts[0].ticks == receipt.ticks

    def test_a_failed_commit_leaves_nothing_and_the_next_one_works(self, store):
        commit(store, message("bob", "before"))
        impossible = Mark("default", "bob", None, 0, 0, 0)
        with pytest.raises(sqlite3.IntegrityError):
            commit(store, message("bob", "lost"), message("nobody-yet"), marks=[impossible])
        assert texts(store, "bob") == ["before"]
        assert [each.n for each in commit(store, message("bob"), message("nobody-yet")).visible] == [2, 1]

    def test_marks_are_kept(self, store, reopen):
        commit(
            store,
            message("bob", ttl=5),
            marks=[Mark("default", "bob", True, 7, 8, 9), Mark("lab", "eve", False, None, 0, 3)],
        )
        commit(store, marks=[Mark("default", "bob", True, 70, 80, 90)])
        rows = {row[:2]: row[2:] for row in reopen().mailboxes()}
        assert rows["default", "bob"][:5] == (1, 70, 80, 90, 0) and rows["default", "bob"][7] == 1
        assert rows["lab", "eve"] == (0, None, 0, 3, 0, 0, 0, 0)

    def test_what_is_too_old_is_removed_in_slices_and_told(self, store, clock, reopen):
        old = commit(store, [message("bob", str(n)) for n in range(PRUNE_SLICE + 5)], message("eve")).visible
        clock.now += 10_000_000
        commit(store, message("bob", "new"))
        first = commit(store, removal=Removal(0, clock.now, False))
        assert first.removed == {("default", "bob"): old[PRUNE_SLICE - 1].tick}
        second = commit(store, removal=Removal(0, clock.now, False))
        assert second.removed == {("default", "bob"): old[-2].tick, ("default", "eve"): old[-1].tick}
        assert not commit(store, removal=Removal(0, clock.now, False)).removed and texts(store, "bob") == ["new"]
        rows = {row[:2]: row[6] for row in reopen().mailboxes()}
        assert rows == {("default", "bob"): old[-2].tick, ("default", "eve"): old[-1].tick}

    def test_removing_everything_does_not_set_the_tick_back(self, store, clock, reopen):
        last = commit(store, message("bob")).last
        commit(store, removal=Removal(0, clock.now + 1, False))
        clock.now -= 3_600_000_000
        assert reopen().last == last

    def test_what_waits_is_counted_without_reading_it(self, store, clock):
        ticks = [each.tick for each in commit(store, *[message("bob") for _ in range(10)]).visible]
        assert [store.count_up_to("default", "bob", tick) for tick in (0, ticks[3], ticks[9], 1 << 62)] == [
            0,
            4,
            10,
            10,
        ]
        assert store.count_up_to("default", "nobody", 0) is None and store.oldest("default", "nobody", 0) is None
        assert store.oldest("default", "bob", 0) == ticks[0]
        commit(store, message("bob", ttl=5), message("bob", ttl=500))
        clock.now += 6_000_000
        assert store.count_expired("default", "bob", 0) == 1 and store.count_expired("default", "bob", 1 << 62) == 0
        assert len(texts(store, "bob")) == 11


class TestSqlite(StoreContract):
    @pytest.fixture
    def clock(self):
        return Clock()

    @pytest.fixture
    def reopen(self, store, clock, tmp_path):
        opened = []

        def again():
            store.close()
            opened.append(Log(str(tmp_path / "bus.db"), clock))
            return opened[-1]

        yield again
        for each in opened:
            each.close()

    @pytest.fixture
    def store(self, tmp_path, clock):
        log = Log(str(tmp_path / "bus.db"), clock)
        yield log
        log.close()

    def test_it_is_durable_and_in_order(self, store):
        assert store.writing.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert store.writing.execute("PRAGMA synchronous").fetchone() == (2,)
        with pytest.raises(sqlite3.OperationalError):
            store.reading.execute("INSERT INTO bus VALUES ('x', 0)")

    def test_reading_several_names_sorts_nothing(self, store):
        """The plan of the union is a merge: a sort would read everything that waits before the first message."""
        plans = []
        store.reading.set_trace_callback(plans.append)
        commit(store, message("bob"), message("team"))
        texts(store, "bob", "team")
        store.reading.set_trace_callback(None)
        [statement] = [plan for plan in plans if "UNION ALL" in plan]
        steps = [row[3] for row in store.reading.execute(f"EXPLAIN QUERY PLAN {statement}")]
        assert not [step for step in steps if "TEMP B-TREE" in step or step.startswith("SCAN")], steps

    def test_a_claim_searches_nothing_without_an_index(self, store):
        """The work that was done in 30 days is much, and would be looked through with each claim."""
        commit(store, message("builds"))
        plans = []
        store.writing.set_trace_callback(plans.append)
        commit(store, tasks=[Claim(None, Worker("builds", "default", 1, 60.0, "worker", 0.0, ""))])
        store.writing.set_trace_callback(None)
        asked = [plan.replace("?", "1") for plan in plans if plan.startswith(("SELECT", "UPDATE"))]
        steps = [row[3] for each in asked for row in store.writing.execute(f"EXPLAIN QUERY PLAN {each}")]
        assert len(asked) >= 5 and all(" USING " in step for step in steps), steps

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
    def test_a_changed_bit_is_reported_and_never_delivered(self, store, clock, capsys, change):
        commit(store, message("bob", "first"), message("bob", "pay 100"))
        clock.now += 10
        commit(store, message("bob", "last"))
        store.writing.execute(f"UPDATE messages SET {change} WHERE text LIKE '%pay 100%'")
        assert texts(store, "bob") == ["first", "last"]
        assert "damaged" in capsys.readouterr().err
        commit(store, removal=Removal(0, clock.now, False))
        assert texts(store, "bob") == ["last"], "it could not be removed"

    def test_an_index_with_a_changed_bit_is_reported_and_made_anew(self, store, clock, tmp_path, capsys):
        commit(store, message("bob", "first"), message("bob", "last"))
        [root] = store.writing.execute("SELECT rootpage FROM sqlite_master WHERE name = 'in_order'").fetchone()
        store.close()
        content = bytearray((tmp_path / "bus.db").read_bytes())
        content[root * 4096 - 2] ^= 1  # in the tick of the first message; pages are numbered from 1
        (tmp_path / "bus.db").write_bytes(content)
        again = Log(str(tmp_path / "bus.db"), clock)
        assert texts(again, "bob") == ["first", "last"] and "is damaged" in capsys.readouterr().err
        again.close()

    def test_a_full_disk_takes_no_message_but_knows_those_it_has_and_removes_them(self, store, clock, monkeypatch):
        commit(store, message("bob", "stored", key="k"))
        monkeypatch.setattr(bus_server, "RESERVE_BYTES", 1 << 60)
        batch = commit(store, message("bob", "new"), message("bob", "stored", key="k"))
        refused, known = batch.sends
        assert refused.refused.status == 507 and known.receipts[0].duplicate and texts(store, "bob") == ["stored"]
        commit(store, removal=Removal(0, clock.now + 1, False))
        assert texts(store, "bob") == []

    def test_room_that_removed_messages_left_is_room(self, store, clock, tmp_path, monkeypatch):
        commit(store, *[message("bob", "x" * 100_000) for _ in range(10)])
        store.writing.execute("PRAGMA wal_checkpoint").fetchall()
        disk = os.statvfs(tmp_path)
        monkeypatch.setattr(os, "statvfs", lambda path: disk)
        monkeypatch.setattr(bus_server, "RESERVE_BYTES", disk.f_bavail * disk.f_frsize + 500_000)
        assert commit(store, message("bob")).sends[0].refused
        commit(store, removal=Removal(0, clock.now + 100, False))
        assert not commit(store, message("bob")).sends[0].refused

    def test_removing_messages_takes_little_room(self, store, clock, tmp_path):
        commit(store, *[message("bob", "x" * 100_000) for _ in range(50)])
        store.writing.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        commit(store, removal=Removal(0, clock.now + 100, False))
        assert texts(store, "bob") == [] and (tmp_path / "bus.db-wal").stat().st_size < 500_000

    def test_room_that_folding_in_the_wal_will_take_is_no_room(self, store, tmp_path, monkeypatch):
        disk = os.statvfs(tmp_path)
        monkeypatch.setattr(os, "statvfs", lambda path: disk)
        monkeypatch.setattr(bus_server, "RESERVE_BYTES", disk.f_bavail * disk.f_frsize - 500_000)
        assert not commit(store, *[message("bob", "x" * 100_000) for _ in range(10)]).sends[0].refused
        assert commit(store, message("bob")).sends[0].refused
        store.writing.execute("PRAGMA wal_checkpoint").fetchall()
        assert not commit(store, message("bob")).sends[0].refused

    def test_what_an_earlier_process_left_in_the_wal_is_written_anew_at_start(self, store, clock, tmp_path):
        """A copy beside the running bus is what a killed one leaves."""
        commit(store, message("bob", "kept"))
        for file in ("bus.db", "bus.db-wal"):
            shutil.copy(tmp_path / file, tmp_path / file.replace("bus", "left"))
        assert (tmp_path / "left.db-wal").stat().st_size > 0
        again = Log(str(tmp_path / "left.db"), clock)
        assert (tmp_path / "left.db-wal").stat().st_size == 0 and texts(again, "bob") == ["kept"]
        again.close()

    def test_people_can_read_it_beside_the_bus(self, store, tmp_path):
        commit(store, message("bob", 'say "hi"'))
        beside = sqlite3.connect(f"file:{tmp_path}/bus.db?mode=ro", uri=True)
        assert beside.execute('SELECT sender, "to", msg FROM readable').fetchall() == [("alice", "bob", 'say "hi"')]
        beside.close()

    def test_memory_is_a_database_too(self):
        log = Log(":memory:")
        commit(log, message("bob", "gone soon"))
        assert texts(log, "bob") == ["gone soon"]
        log.close()


def test_a_second_server_is_refused(tmp_path):
    log = Log(str(tmp_path / "bus.db"))
    with pytest.raises(Unusable, match="in use by another bus_server"):
        Log(str(tmp_path / "bus.db"))
    log.close()


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
        Log(str(path))
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "bus.db").write_text("hello, I am a text file, and nobody's database" * 100)
    with pytest.raises(Unusable, match="cannot use the database"):
        Log(str(tmp_path / "bus.db"))


def test_a_database_with_a_broken_page_is_refused(tmp_path):
    log = Log(str(tmp_path / "bus.db"))
    commit(log, *[message("bob", "x" * 500) for _ in range(200)])
    log.close()
    content = bytearray((tmp_path / "bus.db").read_bytes())
    content[5 * 4096 : 6 * 4096] = b"\xff" * 4096
    (tmp_path / "bus.db").write_bytes(content)
    with pytest.raises(Unusable, match="damaged|malformed"):
        Log(str(tmp_path / "bus.db"))


def test_a_message_is_validated_before_it_joins_a_batch():
    for fields in (
        {"from": "a", "to": "b"},
        {"from": "ALL", "to": "b", "msg": "x"},
        {"from": "a", "to": [], "msg": "x"},
        [],
        7,
    ):
        with pytest.raises(Refused):
            draft(fields, None)
    assert NOW < 0
