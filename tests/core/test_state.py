"""The state: ticks, what each reader finds, what is removed, and what a list that fails leaves."""
import resource
import sqlite3

import pytest

import bus_server
from bus_server import (
    EVERYONE,
    FETCHED,
    MAX_MESSAGES,
    NOW,
    REMOVE_SLICE,
    Forget,
    Grant,
    Mark,
    Marks,
    Raise,
    Receipt,
    Refused,
    Remove,
    draft,
)
from tests.kit.inside import said
from tests.kit.store import OnSqlite, commit, message, poll, remove, texts


class TestState(OnSqlite):
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

    def test_how_far_forgotten_mailboxes_had_mail_is_durable(self, store, reopen):
        """Their own marks are gone, and a reader that is behind must be told of a gap."""
        for name in ("bob", "eve"):
            last = commit(store, message(name)).last
            commit(store, also=[remove(last + 1)])
        assert commit(store, also=[Forget([["default", "eve"], ["default", "bob"]])]).results[0]
        assert reopen().forgotten == last

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

    def test_a_slice_of_a_removal_is_short_for_who_sends_meanwhile(self, store, clock):
        """Seen under siege: nearly all sends that were slow came beside a removal, of slices of 500 messages."""
        commit(store, *[message(name, str(n)) for n in range(500) for name in ("ann", "bob", "carol")])
        steps = []
        store.writing.set_progress_handler(lambda: steps.append(1), 1000)
        commit(store, also=[remove(clock.now + 10_000_000)])
        store.writing.set_progress_handler(None, 1000)
        assert len(steps) < 25, f"{len(steps)} thousand steps of SQLite"

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
