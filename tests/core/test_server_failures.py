"""The server without room, memory or a disk that works: what is stored is told, and it goes on or ends."""
import contextlib
import json
import queue
import sqlite3
from unittest import mock

import pytest

import bus_server
from bus_server import Poll, Put, Raise, Remove, draft, nothing_follows
from tests.kit import inside
from tests.kit.processes import PATIENCE, wait_until


class Desk:
    """A bus inside the test, and what it answered to the sends that were handed to it."""

    def __init__(self, path):
        self.bus = inside.make(path)
        self.answers = []

    phase, request, token = None, None, ""

    def answer(self, answer):
        self.answers.append(answer)

    def fail(self):
        raise AssertionError("the bus failed on this")

    @property
    def statuses(self):
        return [answer.status for answer in self.answers]

    def owner(self):
        return "desk"

    def post(self, size):
        put = Put([draft({"from": "a", "to": "b", "msg": "x" * size}, None)])
        self.bus.do(put, self, lambda *told: self.bus.sending.answer("", False, *told))

    def turn(self):
        while self.bus.loop.actions:
            self.bus.loop.take_turn()

    def send(self, size):
        self.post(size)
        self.turn()
        return self.statuses[-1]

    def remove(self, before):
        self.bus.do(Remove(0, before, False, [], 0), None, nothing_follows)
        self.turn()

    def close(self):
        inside.close(self.bus)


@contextlib.contextmanager
def full_disk(bus):
    """A database that may not grow stands for a disk that is full."""
    bus.state.writing.execute("PRAGMA max_page_count=1")  # it becomes the size that it has
    yield
    bus.state.writing.execute("PRAGMA max_page_count=1000000")


def test_a_full_disk_is_507_and_it_goes_on_when_there_is_room(tmp_path):
    desk = Desk(tmp_path / "bus.db")
    assert desk.send(10) == 200
    with full_disk(desk.bus):
        assert desk.send(200_000) == 507
    poll = Poll("b", ("b",), "default", None, 0, 10, 0, False)
    assert [message.n for message in desk.bus.view.after(poll, desk.bus.last)[0]] == [1]
    assert desk.send(200_000) == 200 and not desk.bus.broken
    desk.close()


def test_a_disk_with_little_room_takes_no_message_and_still_removes_them(tmp_path, monkeypatch):
    desk = Desk(tmp_path / "bus.db")
    assert desk.send(10) == 200
    tick = desk.bus.last
    with monkeypatch.context() as patched:
        patched.setattr(bus_server, "RESERVE_BYTES", 1 << 60)
        assert desk.send(10) == 507
        desk.remove(tick + 1)
        assert desk.bus.view.message(tick) is None and not desk.bus.broken
    assert desk.send(10) == 200
    desk.close()


def test_a_list_for_which_no_file_could_be_opened_is_503_and_the_bus_goes_on(tmp_path, monkeypatch):
    """Seen in an hour of siege: the descriptors were used up, and SQLite wanted a file for temporary data."""
    desk = Desk(tmp_path / "bus.db")

    def used_up(operations, now):
        raise sqlite3.OperationalError("unable to open database file")

    with monkeypatch.context() as patched:
        patched.setattr(desk.bus.state, "apply", used_up)
        assert desk.send(1) == 503 and not desk.bus.broken
    assert desk.send(1) == 200
    desk.close()


def test_marks_that_a_full_disk_did_not_take_are_saved_later_with_what_is_newer(tmp_path, monkeypatch):
    desk = Desk(tmp_path / "bus.db")
    bus = desk.bus
    assert [desk.send(1), desk.send(1)] == [200, 200]
    poll = Poll("b", ("b", "all"), "default", None, 0, 10, 0, False)
    first, second = [message.tick for message in bus.view.after(poll, bus.last)[0]]

    def full(operations, now):
        raise sqlite3.OperationalError("database or disk is full")

    def saved():
        bus.save_marks()
        desk.turn()
        [[read]] = bus.state.writing.execute("SELECT read FROM mailboxes WHERE name = 'b'")
        return read, bus.view.receipt(bus.view.message(first), bus_server.ACKNOWLEDGED) is not None

    bus.gate.tokens.used["abt_1"] = 7
    bus.mailboxes.owned(poll)
    bus.mailboxes.presented(poll._replace(since=first))
    with monkeypatch.context() as patched:
        patched.setattr(bus.state, "apply", full)
        assert saved() == (None, False) and bus.saving
    bus.mailboxes.presented(poll._replace(since=second))
    assert saved() == (second, True)
    assert bus.state.ask("SELECT used FROM uses WHERE token = 'abt_1'") == (7,)
    desk.close()


@pytest.mark.parametrize("reloads", [True, False], ids=["", "and none to reload"])
def test_without_memory_nothing_is_stored_and_it_goes_on(tmp_path, monkeypatch, reloads):
    """What fails is a statement of the list, and perhaps also what State reads afterwards."""
    desk = Desk(tmp_path / "bus.db")
    assert desk.send(10) == 200
    state, fails = desk.bus.state, MemoryError()
    with monkeypatch.context() as patch:
        patch.setattr(state, "insert", mock.Mock(side_effect=fails))
        if not reloads:
            patch.setattr(state, "reload", mock.Mock(side_effect=fails))
        assert desk.send(20) == 503 and not desk.bus.broken
    assert desk.send(30) == 200 and not state.stale
    poll = Poll("b", ("b",), "default", None, 0, 10, 0, False)
    assert len(desk.bus.view.after(poll, desk.bus.last)[0]) == 2, "what was refused is there"
    desk.close()


def test_if_a_list_that_failed_for_want_of_memory_was_stored_all_the_same_the_bus_ends(tmp_path, monkeypatch):
    """Else its messages would lie there, and nobody would be told of them."""
    desk = Desk(tmp_path / "bus.db")
    monkeypatch.setattr(desk.bus.state.index, "committed", mock.Mock(side_effect=MemoryError()))
    assert desk.send(10) == 503 and desk.bus.broken
    desk.close()


class NoMemoryToRollBack:
    """The connection of State, which fails at its first ROLLBACK."""

    def __init__(self, real):
        self.real, self.failures = real, [MemoryError()]

    def __getattr__(self, name):
        return getattr(self.real, name)

    def execute(self, statement, *values):
        if statement == "ROLLBACK" and self.failures:
            raise self.failures.pop()
        return self.real.execute(statement, *values)


def test_what_could_not_be_rolled_back_for_want_of_memory_is_rolled_back_before_the_next_list(tmp_path, monkeypatch):
    """Else that list could not begin its transaction, or would commit what was refused."""
    desk = Desk(tmp_path / "bus.db")
    state = desk.bus.state
    with monkeypatch.context() as patch:
        patch.setattr(state, "writing", NoMemoryToRollBack(state.writing))
        patch.setattr(state.index, "write", mock.Mock(side_effect=MemoryError()))
        desk.bus.do(Raise(desk.bus.last + 1000), None, nothing_follows)
        assert desk.send(10) == 503 and state.stale and state.writing.in_transaction and not desk.bus.broken
    assert desk.send(20) == 200 and not state.stale
    poll = Poll("b", ("b",), "default", None, 0, 10, 0, False)
    assert [each.text.count("x") for each in desk.bus.view.after(poll, desk.bus.last)[0]] == [20]
    desk.close()


def test_after_retention_and_a_full_disk_a_sender_is_told_how_much_is_unread(tmp_path):
    """What counts the messages of a mailbox is read back from a file in which none of them is left."""
    desk = Desk(tmp_path / "bus.db")
    assert [desk.send(1) for _ in range(5)] == [200] * 5
    assert json.loads(desk.answers[-1].body)["receiver"]["unread"] == 5
    desk.remove(desk.bus.last + 1)
    box = desk.bus.mailboxes.box("default", "b")
    assert bus_server.unread(desk.bus, "default", "b", box) == 0  # as somebody sees at /inbox, and it is remembered
    with full_disk(desk.bus):
        assert desk.send(200_000) == 507
    assert desk.send(1) == 200
    assert json.loads(desk.answers[-1].body)["receiver"]["unread"] == 1
    desk.close()


def test_a_failing_disk_is_503_and_the_server_ends(tmp_path):
    """Invariant: a failed list fails every sender in it, and the bus never acknowledges on."""

    def fails(operations, now):
        raise sqlite3.OperationalError("disk I/O error")

    desk = Desk(tmp_path / "bus.db")
    desk.bus.state.apply = fails
    for _ in range(3):
        desk.post(1)
    desk.bus.loop.run(lambda: desk.bus.broken)
    assert desk.statuses == [503, 503, 503]
    desk.close()


@pytest.mark.parametrize("path", ["bus.db", ":memory:"])
def test_a_reader_is_told_of_a_gap_that_is_on_disk_and_not_yet_announced(tmp_path, path):
    desk = Desk(tmp_path / path if path == "bus.db" else path)
    desk.send(1)
    tick, apply, seen = desk.bus.last, desk.bus.state.apply, queue.SimpleQueue()

    def look():
        """The deputy's turn, before the thread that commits has told of it."""
        for names, since in ((("b",), 0), (("c", "b"), tick - 1), ((), 0)):
            poll = Poll(names[0] if names else None, names, "default", None, since, 10, 0, False)
            seen.put(json.loads(desk.bus.receiving.read_or_park(None, poll).body))

    def slow(operations, now):
        applied = apply(operations, now)
        desk.bus.loop.tell(look)
        for _ in range(3):
            answer = seen.get(timeout=PATIENCE)
            assert answer["messages"] == [] and round(answer["gap"]["to"] * 1e6) == tick
        return applied

    desk.bus.state.apply = slow
    desk.remove(tick + 1)
    assert desk.bus.view.message(tick) is None and not desk.bus.broken
    desk.close()


def test_what_follows_a_step_that_nobody_waits_for_may_fail_and_its_flag_is_taken_back(tmp_path):
    """Else retention would wait for ever for the end of a removal that has ended."""
    desk = Desk(tmp_path / "bus.db")
    undone = []
    desk.bus.do(Remove(0, 1, False, [], 0), None, lambda *_: 1 / 0, undone.append)
    desk.turn()
    assert [type(each) for each in undone] == [Remove] and not desk.bus.broken
    desk.close()


@pytest.mark.parametrize("place", ["soon", "count_out", "announce"])
def test_after_one_failure_on_the_way_to_a_commit_the_next_send_is_stored(tmp_path, monkeypatch, place):
    """Without memory any line may fail. Seen: no commit was planned any more, and each send hung without an answer."""
    desk = Desk(tmp_path / "bus.db")
    owner = {"soon": desk.bus.loop, "count_out": desk.bus.ledger, "announce": desk.bus}[place]
    with monkeypatch.context() as patch:
        patch.setattr(owner, place, mock.Mock(side_effect=MemoryError()))
        with contextlib.suppress(MemoryError):
            desk.post(10)
            desk.bus.loop.take_turn()
    desk.failed = desk.fail = lambda: None
    assert desk.send(20) == 200
    poll = Poll("b", ("b",), "default", None, 0, 10, 0, False)
    assert len(desk.bus.view.after(poll, desk.bus.last)[0]) == 2, "what was handed in first is stored too"
    desk.close()


def test_a_message_that_nobody_could_be_told_of_is_found_by_each_poll(tmp_path, monkeypatch):
    """Mailboxes did not hear of it, and no parked reader was woken: at the end of its hold a poll looks at the disk."""
    desk = Desk(tmp_path / "bus.db")
    poll = Poll("b", ("b",), "default", None, 0, 10, 0, False)
    with monkeypatch.context() as patch:
        for method in ("add", "wake"):
            patch.setattr(desk.bus.mailboxes, method, mock.Mock(side_effect=MemoryError()))
        patch.setattr(desk.bus.mailboxes, "parked", {None: poll})
        desk.post(10)
        desk.bus.loop.take_turn()
    assert not desk.bus.sure
    assert desk.bus.last > 0 and b"xxxxxxxxxx" in desk.bus.waits[Poll].over(None, poll).body
    desk.close()


@pytest.mark.parametrize("fails", ["add", "note_removed", "wake"])
def test_after_any_part_of_an_announcement_failed_each_poll_looks_at_the_disk(tmp_path, monkeypatch, fails):
    """From then on: what comes later is told to everybody, and what was missed is not."""
    desk = Desk(tmp_path / "bus.db")
    desk.send(10)
    poll = Poll("b", ("b",), "default", None, desk.bus.last, 10, 0, False)
    with monkeypatch.context() as patch:
        patch.setattr(desk.bus.mailboxes, fails, mock.Mock(side_effect=MemoryError()))
        patch.setattr(desk.bus.mailboxes, "parked", {None: poll})
        desk.remove(desk.bus.last + 1)
        desk.send(20)
    assert not desk.bus.sure
    assert b"xxxxxxxxxx" in desk.bus.receiving.read_or_park(None, poll).body
    assert desk.send(30) == 200 and not desk.bus.sure
    desk.close()


def test_a_step_that_is_added_while_a_list_is_made_waits_for_that_list(tmp_path, monkeypatch):
    """Else the deputy would begin a second list while the first one is being applied."""
    desk = Desk(tmp_path / "bus.db")
    planned, real = [], desk.bus.entitled

    def adds_one(steps):
        if not planned:
            desk.post(20)
            planned.append(len(desk.bus.loop.actions))
        return real(steps)

    monkeypatch.setattr(desk.bus, "entitled", adds_one)
    desk.post(10)
    commit = desk.bus.loop.actions.pop()  # as a turn does: else the deputy would run it as well
    before = len(desk.bus.loop.actions)
    commit()
    assert planned == [before], "a second commit was planned"
    desk.turn()
    assert desk.statuses == [200, 200], desk.answers
    desk.close()


def test_what_came_while_a_list_was_stored_is_planned_again_if_that_failed(tmp_path, monkeypatch):
    """Else its sender would wait until somebody else sends."""
    desk = Desk(tmp_path / "bus.db")
    ledger, loop = desk.bus.ledger, desk.bus.loop
    apply, soon = ledger.apply, loop.soon
    with monkeypatch.context() as patch:

        def fails_once(action):
            patch.setattr(loop, "soon", soon)
            raise MemoryError

        def one_more(operations):
            desk.post(20)
            patch.setattr(ledger, "apply", apply)
            patch.setattr(loop, "soon", fails_once)  # planning calls it first
            return apply(operations)

        patch.setattr(ledger, "apply", one_more)
        desk.post(10)
        desk.turn()
    assert desk.statuses == [200] and loop.timers
    wait_until(lambda: desk.bus.loop.take_turn() or len(desk.answers) == 2)
    assert desk.statuses == [200, 200]
    desk.close()
