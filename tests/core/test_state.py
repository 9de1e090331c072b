"""The store's contract. A store on another engine inherits StoreContract and passes `make` a function that opens it."""

import contextlib
import os
import resource
import shutil
import sqlite3

import pytest

import bus_server
from bus_extensions.replies import Recall
from bus_extensions.work import Claim
from bus_server import (
    EVERYONE,
    FETCHED,
    MAX_MESSAGES,
    MIGRATIONS,
    NOW,
    REMOVE_SLICE,
    Forget,
    ForgetKeys,
    Grant,
    Mark,
    Marks,
    Now,
    Poll,
    Put,
    Raise,
    Receipt,
    Refused,
    Remove,
    State,
    Unusable,
    draft,
)
from tests.kit.clock import Clock
from tests.kit.inside import said


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
        applied = commit(store, message("bob"), also=[Raise(ahead)])
        assert applied.visible[0].tick > ahead
        commit(store, also=[Raise(ahead + 500)])
        assert reopen().last == ahead + 500

    def test_after_gives_what_lies_above_the_cursor_oldest_first(self, store):
        ticks = [each.tick for each in commit(store, *[message("bob", str(n)) for n in range(5)]).visible]
        assert texts(store, "bob") == ["0", "1", "2", "3", "4"]
        assert texts(store, "bob", since=ticks[2]) == ["3", "4"]
        assert store.view.after(poll("bob"), ticks[1])[0][-1].tick == ticks[1], "it looked beyond what was announced"

    def test_a_truncated_read_says_how_far_it_got(self, store):
        ticks = [each.tick for each in commit(store, *[message("bob", str(n)) for n in range(5)]).visible]
        found, reached = store.view.after(poll("bob", limit=2), ticks[-1])
        assert len(found) == 2 and reached == ticks[1]
        assert store.view.after(poll("bob", limit=5), ticks[-1])[1] is None, "all was read, and more was promised"

    def test_a_page_of_a_tokens_log_ends_after_5000_messages(self, store):
        """However few of them the token may see, and whatever the others are; an operator's ends as it did."""
        commit(store, message("bob", "first"))
        for _ in range(3):
            commit(store, *[message("carl", sender="dora") for _ in range(3000)])
        last = commit(store, message("carl", "last", sender="bob")).last
        token = Grant("abt_1", "bob", (), False, False)
        pages, since = [], 0
        while since is not None:
            found, since = store.view.after(poll(since=since, observer=True)._replace(channel=None, sees=token), last)
            pages.append([each.text.split('"msg": ')[1] for each in found])
        assert pages == [['"first"'], ['"last"']]
        assert len(store.view.after(poll(observer=True), last)[0]) == MAX_MESSAGES

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
        found, reached = store.view.after(poll("bob"), 1 << 62)
        assert not found and reached, "it read on without end"
        assert texts(store, "bob", since=reached) == ["found"]

    def test_a_large_answer_is_cut_by_its_bytes(self, store):
        commit(store, *[message("bob", "x" * 200_000) for _ in range(20)])
        found, reached = store.view.after(poll("bob"), 1 << 62)
        assert 1 <= len(found) < 10 and reached == found[-1].tick

    def test_observers_see_every_mailbox_and_filter(self, store):
        commit(store, message("bob", "1"), message("eve", "2", channel="lab"), message("bob", "3", sender="carl"))
        assert texts(store, observer=True, channel=None) == ["1", "2", "3"]
        assert texts(store, "bob", observer=True, channel=None, sender="carl") == ["3"]
        assert texts(store, observer=True, channel="lab") == ["2"]

    def test_a_key_is_stored_once_also_within_a_list_and_after_a_restart(self, store, reopen):
        first = commit(store, message("bob", "x", key="k"), message("bob", "x", key="k"))
        [one], [other] = first.results
        assert [one.duplicate, other.duplicate] == [False, True]
        [[again]] = commit(reopen(), message("bob", "x", key="k")).results
        assert again.duplicate and again.ticks == one.ticks == other.ticks and len(first.visible) == 1

    def test_a_removal_looks_at_ten_messages_for_each_that_it_may_remove_and_says_how_far_it_came(self, store):
        """The others are spared: nobody has fetched them. What comes behind it in the same list waits meanwhile."""
        ticks = [each.tick for each in commit(store, [message("bob") for _ in range(45)]).visible]
        reached, slices = 0, []
        while reached is not None:
            [reached] = commit(store, also=[Remove(reached, ticks[-1] + 1, True, [], 0, 2)]).results
            slices.append(reached)
        assert slices == [ticks[19], ticks[39], ticks[44], None]
        assert len(texts(store, "bob")) == 45

    def test_a_slice_of_a_removal_ends_by_bytes_too(self, store):
        ticks = [commit(store, message("bob", "x" * 250_000)).last for _ in range(9)]
        assert commit(store, also=[remove(ticks[-1] + 1)]).results == [ticks[4]]

    def test_whether_a_broadcast_was_read_is_asked_once_for_all_readers(self, store):
        """And not of 400 readers for each of 300 messages."""
        last = commit(store, [message(EVERYONE) for _ in range(300)]).last
        names = [f"agent-{number}" for number in range(400)]
        behind = [Mark("default", name, True, last if name != "agent-399" else 0, 0, 1) for name in names]
        commit(store, also=[Marks(behind, [], {})])
        steps = []
        store.writing.set_progress_handler(lambda: steps.append(1), 1000)
        assert commit(store, also=[Remove(0, last + 1, True, [], 0)]).results == [last]
        store.writing.set_progress_handler(None, 1000)
        assert len(texts(store, "agent-399")) == 300, "one has not read them"
        assert len(steps) < 100, f"{len(steps)},000 steps"

    def test_what_is_kept_of_keys_is_read_from_what_is_removed_and_not_from_what_is_spared(self, store, monkeypatch):
        ticks = []
        for number in range(40):
            ticks.append(commit(store, message("bob" if number % 20 else "eve", key=f"k{number}")).last)
        commit(store, also=[Marks([Mark("default", "eve", True, ticks[-1], ticks[-1], 1)], [], {})])
        read = []
        monkeypatch.setattr(store, "checked", lambda row: read.append(row[0]) or type(store).checked(store, row))
        commit(store, also=[Remove(0, ticks[-1] + 1, True, [], 0)])
        assert read == [ticks[0], ticks[20]]

    def test_how_far_forgotten_mailboxes_had_mail_is_durable(self, store, reopen):
        """Their own marks are gone, and a reader that is behind must be told of a gap."""
        for name in ("bob", "eve"):
            last = commit(store, message(name)).last
            commit(store, also=[remove(last + 1)])
        assert commit(store, also=[Forget([["default", "eve"], ["default", "bob"]])]).results[0]
        assert reopen().forgotten == last

    def test_a_key_that_many_senders_use_is_looked_up_for_one(self, store):
        commit(store, *[message("bob", sender=f"agent-{n}", key="1") for n in range(2000)])
        steps = []
        store.view.database.set_progress_handler(lambda: steps.append(1), 1000)
        assert commit(store, message("bob", sender="agent-7", key="1")).results[0][0].duplicate
        assert len(steps) < 5, "it looked through the messages of the others"

    def test_a_key_belongs_to_its_sender_and_channel(self, store):
        applied = commit(
            store,
            message("bob", key="k"),
            message("bob", key="k", sender="eve"),
            message("bob", key="k", channel="lab"),
        )
        assert [stored.duplicate for [stored] in applied.results] == [False, False, False]

    def test_a_key_with_another_message_is_refused_and_its_neighbours_are_stored(self, store):
        applied = commit(
            store,
            message("bob", "1", key="k"),
            [message("bob", "2", key="k"), message("bob", "3")],
            message("bob", "4"),
        )
        first, refused, last = applied.results
        assert not isinstance(first, Refused) and refused.status == 409 and not isinstance(last, Refused)
        assert texts(store, "bob") == ["1", "4"], "a refused array left something behind"
        assert commit(store, message(["bob", "eve"], "1", key="k")).results[0].status == 409

    @pytest.mark.parametrize("other", ["2", "a text of another length"])
    def test_a_retry_beside_another_message_with_its_key_has_its_answer(self, store, other):
        [first] = commit(store, message("bob", "1", key="k")).results[0]
        retry, refused = commit(store, message("bob", "1", key="k"), message("bob", other, key="k")).results
        assert retry[0].ticks == first.ticks and refused.status == 409

    def test_a_retry_may_give_the_members_in_another_order(self, store):
        first = commit(store, message("bob", key="k", a=1, b={"c": 1, "d": [2]})).results[0][0]
        [[again]] = commit(store, message("bob", key="k", b={"d": [2], "c": 1}, a=1)).results
        assert again.duplicate and again.ticks == first.ticks
        for other in ({"a": 1, "b": {"c": 1, "d": [3]}}, {"a": True, "b": {"c": 1, "d": [2]}}, {"a": 1}):
            assert commit(store, message("bob", key="k", **other)).results[0].status == 409

    def test_a_list_of_names_is_stored_as_one(self, store):
        [[stored]] = commit(store, message(["bob", "eve"], key="k")).results
        assert len(stored.ticks) == 2
        assert commit(store, message(["bob", "eve"], key="k")).results[0][0].ticks == stored.ticks

    @pytest.mark.parametrize("gone", ["one copy", "all copies"])
    def test_a_retry_after_its_messages_were_removed_has_the_first_answer(self, store, gone):
        [[stored]] = commit(store, message(["bob", "eve"], key="k")).results
        commit(store, also=[remove(stored.ticks[0 if gone == "one copy" else 1] + 1)])
        [[again]] = commit(store, message(["bob", "eve"], key="k")).results
        assert again.duplicate and again.ticks == stored.ticks
        assert commit(store, message("bob", "other", key="k")).results[0].status == 409

    def test_a_key_is_forgotten_when_it_is_older_than_keep_and_not_before(self, store):
        old, new = [commit(store, message("bob", key=key)).last for key in ("old", "new")]
        commit(store, also=[remove(new + 1)])
        assert commit(store, also=[ForgetKeys(old), ForgetKeys(new, 1), ForgetKeys(new)]).results == [0, 1, 0]
        assert not commit(store, message("bob", key="old")).results[0][0].duplicate
        assert commit(store, message("bob", key="new")).results[0][0].duplicate

    def test_what_is_as_old_as_keep_leaves_no_key(self, store):
        old, new = [commit(store, message("bob", key=key)).last for key in ("old", "new")]
        commit(store, also=[remove(new + 1, keys_from=new)])
        assert store.writing.execute("SELECT key FROM keys").fetchall() == [("new",)]

    def test_a_key_whose_name_is_damaged_is_forgotten_too(self, store):
        """Else ForgetKeys would find it again and again."""
        last = commit(store, message("bob", key="k")).last
        commit(store, also=[remove(last + 1)])
        store.writing.execute("UPDATE keys SET key = CAST(x'ff6b' AS TEXT)")
        assert commit(store, also=[ForgetKeys(last + 1, 1), ForgetKeys(last + 1, 1)]).results == [1, 0]

    def test_no_operation_needs_a_file_descriptor(self, store):
        """To take back a change of many pages, SQLite would open a file. With no descriptor left the bus ended."""
        names = [f"agent-{number}" for number in range(2000)]
        last = commit(store, *[message(name, "x" * 100) for name in names]).last
        receipts = [Receipt("default", name, FETCHED, last, "bob", 0) for name in names]
        marks = Marks([Mark("default", name, True, 1, last, 1) for name in names], receipts, {})
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            results = [commit(store, also=[each]).results for each in (marks, remove(last + 1))]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert results[0] == [None] and results[1] != [None]

    def test_a_damaged_key_is_told_and_its_retry_is_stored_anew(self, store, capfd):
        first = commit(store, message("bob", key="k")).last
        commit(store, also=[remove(first + 1)])
        store.writing.execute("UPDATE keys SET name = 'cob'")
        assert not commit(store, message("bob", key="k")).results[0][0].duplicate
        assert "the key k of alice is damaged" in said(capfd)
        assert commit(store, message("bob", key="k")).results[0][0].duplicate

    def test_a_damaged_message_with_a_key_can_be_removed(self, store):
        last = commit(store, message("bob", key="k"), message("bob", key="l")).last
        store.writing.execute("UPDATE messages SET text = 'no JSON' WHERE key = 'k'")
        assert commit(store, also=[remove(last + 1)]).results == [last]

    def test_a_list_that_fails_leaves_nothing_and_the_next_one_works(self, store, full_disk):
        commit(store, message("bob", "before"))
        with full_disk(), pytest.raises(sqlite3.OperationalError, match="full"):
            commit(store, message("bob", "lost" * 100_000), message("nobody-yet"), also=[Raise(1 << 60)])
        assert texts(store, "bob") == ["before"] and texts(store, "nobody-yet") == [] and store.last < 1 << 60
        assert [each.n for each in commit(store, message("bob"), message("nobody-yet")).visible] == [2, 1]

    def test_an_operation_that_fails_alone_leaves_nothing_and_its_neighbours_are_applied(self, store, reopen, capfd):
        impossible = Marks([Mark("default", "ghost", None, 0, 0, 0)], [], {})
        possible = Marks([Mark("default", "bob", True, 7, 8, 9)], [], {"abt_00000000": 5})
        applied = commit(store, message("bob", "kept"), also=[impossible, possible])
        [stored], failed, nothing = applied.results
        assert failed.status == 500 and "IntegrityError" in failed.sentence and nothing is None
        assert "Traceback" in said(capfd), "its log does not say why"
        assert stored.ticks == [each.tick for each in applied.visible] and texts(store, "bob") == ["kept"]
        assert [each.n for each in commit(store, message("ghost", "1"), message("bob")).visible] == [1, 2]
        again = reopen()
        rows = {row[:2]: row[2:] for row in again.view.mailboxes(again.last)}
        assert rows["default", "bob"][:4] == (1, 7, 8, 9) and rows["default", "ghost"][:4] == (0, None, 0, 0)

    def test_a_mailbox_goes_on_counting_after_all_its_messages_were_removed_and_a_send_failed(
        self, store, clock, reopen, full_disk
    ):
        """It counts in memory; when a list fails, the count is read back from a file in which no message is left."""
        last = commit(store, *[message("bob", str(number)) for number in range(5)]).visible[-1]
        commit(store, also=[remove(clock.now + 100)])
        assert last.n == 5 and texts(store, "bob") == []
        with full_disk(), pytest.raises(sqlite3.OperationalError, match="full"):
            commit(store, message("bob", "lost" * 100_000))
        assert [each.n for each in commit(store, message("bob")).visible] == [6]
        assert [each.n for each in commit(reopen(), message("bob")).visible] == [7]

    def test_marks_are_kept(self, store, reopen):
        commit(
            store,
            message("bob", ttl=5),
            also=[Marks([Mark("default", "bob", True, 7, 8, 9), Mark("lab", "eve", False, None, 0, 3)], [], {})],
        )
        commit(store, also=[Marks([Mark("default", "bob", True, 70, 80, 90)], [], {})])
        again = reopen()
        rows = {row[:2]: row[2:] for row in again.view.mailboxes(again.last)}
        assert rows["default", "bob"][:5] == (1, 70, 80, 90, 0) and rows["default", "bob"][7] == 1
        assert rows["lab", "eve"] == (0, None, 0, 3, 0, 0, 0, 0)

    def test_what_is_too_old_is_removed_in_slices_and_told(self, store, clock, reopen):
        old = commit(store, [message("bob", str(n)) for n in range(REMOVE_SLICE + 5)], message("eve")).visible
        clock.now += 10_000_000
        commit(store, message("bob", "new"))
        first = commit(store, also=[remove(clock.now)])
        assert first.results == [old[REMOVE_SLICE - 1].tick]
        assert first.removed == {("default", "bob"): old[REMOVE_SLICE - 1].tick}
        second = commit(store, also=[remove(clock.now).next(*first.results)])
        assert second.results == [old[-1].tick]
        assert second.removed == {("default", "bob"): old[-2].tick, ("default", "eve"): old[-1].tick}
        last = commit(store, also=[remove(clock.now)])
        assert last.results == [None] and not last.removed and texts(store, "bob") == ["new"]
        again = reopen()
        rows = {row[:2]: row[6] for row in again.view.mailboxes(again.last)}
        assert rows == {("default", "bob"): old[-2].tick, ("default", "eve"): old[-1].tick}

    def test_what_is_removed_later_though_it_is_older_sets_no_mark_back(self, store, reopen):
        older, newer = [commit(store, message("bob")).last for _ in range(2)]
        commit(store, also=[remove(newer + 1, above=older)])
        commit(store, also=[remove(newer + 1)])
        again = reopen()
        [row] = again.view.mailboxes(again.last)
        assert row[6] == newer, "a reader that has the older one is told of no gap"

    def test_removing_everything_does_not_set_the_tick_back(self, store, clock, reopen):
        last = commit(store, message("bob")).last
        commit(store, also=[remove(clock.now + 1)])
        clock.now -= 3_600_000_000
        assert reopen().last == last

    def test_what_waits_is_counted_without_reading_it(self, store, clock):
        ticks = [each.tick for each in commit(store, *[message("bob") for _ in range(10)]).visible]
        assert [store.view.count_up_to("default", "bob", tick) for tick in (0, ticks[3], ticks[9], 1 << 62)] == [
            0,
            4,
            10,
            10,
        ]
        assert store.view.count_up_to("default", "nobody", 0) is None
        assert store.view.oldest("default", "nobody", 0) is None
        assert store.view.oldest("default", "bob", 0) == ticks[0]
        commit(store, message("bob", ttl=5), message("bob", ttl=500))
        clock.now += 6_000_000
        all_of_them = (clock.now, bus_server.SOUND)
        assert store.view.count_expired("default", "bob", 0, (0, 0), clock.now, 9) == (1, all_of_them, 1)
        assert store.view.count_expired("default", "bob", 1 << 62, (0, 0), clock.now, 9) == (0, all_of_them, 1)
        assert store.view.count_expired("default", "bob", 0, (clock.now - 1, 0), clock.now, 9) == (0, all_of_them, 0)
        assert len(texts(store, "bob")) == 11


class TestSqlite(StoreContract):
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


def test_a_message_is_validated_before_it_becomes_an_operation():
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
