"""Who has the turn: the thread that runs the loop, and while that waits for the disk the deputy."""
import contextlib
import io
import os
import queue
import selectors
import signal
import socket
import sys
import threading
from collections import deque
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest

import bus_server
from bus_server import Loop, Put, State
from tests.kit.hostile import GET, HOST, WAITING, a_send, head
from tests.kit.inside import said
from tests.kit.loops import stop
from tests.kit.processes import PATIENCE, wait_until
from tests.kit.wire import Peer, a_bus, come_true, statuses, told
from tests.kit.wire import while_the_disk_is_busy as meanwhile


@pytest.fixture
def loop():
    loop = Loop()
    yield loop
    stop(loop)


class Caller:
    """At one end of a socket pair: what the loop calls when somebody writes at the other."""

    def __init__(self, loop, action):
        self.sock, self.other = socket.socketpair()
        self.events, self.action = 0, action
        loop.watch(self, selectors.EVENT_READ)
        self.other.send(b"x")

    def ready(self, events):
        self.sock.recv(1)
        self.action()

    def failed(self):
        self.has_failed = True

    def close(self):
        self.sock.close()
        self.other.close()


def test_while_the_disk_is_busy_everybody_but_the_senders_is_served():
    with a_bus() as bus:
        sender, reader, asker = Peer(bus), Peer(bus), Peer(bus)
        who = []

        def others():
            who.append(threading.current_thread().name)
            reader.says(WAITING)
            asker.says(head(GET, HOST))
            assert statuses(asker.heard) == [200] and not sender.heard and bus.mailboxes.parked

        meanwhile(bus, others)
        sender.says(a_send("alice", to="carl"))
        assert told(sender)[0] == 200 and who == ["deputy"]
        assert [each["msg"] for each in told(reader)[1]["messages"]] == ["hello"], "parked meanwhile, and woken"


def test_what_is_sent_while_the_disk_is_busy_is_the_next_transaction():
    with a_bus() as bus:
        first, second, third = Peer(bus), Peer(bus), Peer(bus)
        lists, apply = [], bus.state.apply

        def count(operations, now):
            lists.append(sum(isinstance(operation, Put) for operation in operations))
            return apply(operations, now)

        bus.state.apply = count
        meanwhile(bus, lambda: [each.says(a_send("bob")) for each in (second, third)])
        first.says(a_send("alice"))
        come_true(lambda: third.heard)
        assert [statuses(each.heard) for each in (first, second, third)] == [[200]] * 3 and lists == [1, 2]


def test_a_disk_that_is_fast_needs_no_deputy(monkeypatch):
    monkeypatch.setattr(Loop, "PATIENCE", 2)  # s; longer than a commit to memory takes, and the end waits for it
    with a_bus() as bus:
        sender, threads, apply = Peer(bus), set(), bus.state.apply
        bus.state.apply = lambda *what: (threads.add(threading.current_thread()), apply(*what))[1]
        for _ in range(50):
            sender.says(a_send("alice"))
        assert len(statuses(sender.heard)) < 50
        come_true(lambda: len(statuses(sender.heard)) == 50)
        assert threads == {threading.current_thread()}
        monkeypatch.setattr(Loop, "PATIENCE", 0)  # for the end of this one


def test_a_failing_disk_is_told_also_when_it_took_its_time(monkeypatch, capfd):
    def fails(state, operations, now):
        busy.wait(PATIENCE)
        raise OSError("it is broken")

    busy = threading.Event()
    with a_bus() as bus:
        monkeypatch.setattr(State, "apply", fails)
        bus.loop.tell(busy.set)
        sender = Peer(bus)
        sender.says(a_send("alice"))
        assert told(sender)[0] == 503 and bus.broken
    assert "it is broken" in said(capfd)


@contextlib.contextmanager
def signals(loop, action):
    before = signal.getsignal(signal.SIGUSR1)
    loop.on_signal(signal.SIGUSR1, action)
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGUSR1, before)


def test_a_signal_is_heard_while_the_main_thread_waits_for_the_disk(loop):
    heard, disk = [], threading.Event()
    with signals(loop, lambda: (heard.append(threading.current_thread().name), disk.set())):
        os.kill(os.getpid(), signal.SIGUSR1)
        loop.aside(lambda: disk.wait(PATIENCE))
        loop.every(0.01, lambda: None)
        loop.run(lambda: heard)
    assert heard == ["deputy"]


def test_a_signal_is_heard_though_other_threads_have_rung_often(loop):
    """A turn takes long, and meanwhile the ledger of a front gives its hints, each of which rings."""
    heard, told = [], []
    with signals(loop, lambda: heard.append(1)):
        for number in range(5000):
            loop.tell(partial(told.append, number))
        os.kill(os.getpid(), signal.SIGUSR1)
        loop.take_turn()
    assert heard == [1]
    while loop.actions:
        loop.take_turn()
    assert told == [*range(5000)]


def test_an_error_in_serving_one_is_told_and_the_others_are_served(loop, capfd):
    served = []
    callers = [Caller(loop, lambda: 1 / 0), Caller(loop, lambda: served.append(1))]
    loop.soon(lambda: 1 / 0)
    loop.soon(lambda: served.append(2))
    loop.run(lambda: len(served) == 2)
    bus_server.REPORT.flush(PATIENCE)
    assert capfd.readouterr().err.count("ZeroDivisionError") == 2
    for caller in callers:
        caller.close()


@pytest.mark.parametrize("who", ["the thread that runs it", "the deputy"])
def test_an_error_in_a_timer_costs_that_call_and_nothing_else(loop, who, capfd):
    """Without sweeps no poll would ever be answered: the timers behind it come, and it comes again itself."""
    over, came = threading.Event(), []
    loop.every(0.01, lambda: came.append("again") or 1 / 0)
    loop.later(0.005, lambda: came.append("once"))
    if who == "the deputy":
        loop.soon(lambda: loop.aside(lambda: over.wait(PATIENCE / 10)))
        loop.later(0.05, over.set)
    loop.run(lambda: came.count("again") > 2 and "once" in came and (who != "the deputy" or over.is_set()))
    bus_server.REPORT.flush(PATIENCE)
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_what_is_due_comes_in_its_order_and_not_before(loop):
    came = []
    for patience in (0.02, 0.0, 0.01):
        loop.later(patience, lambda patience=patience: came.append(patience))
    loop.run(lambda: len(came) == 3)
    assert came == [0.0, 0.01, 0.02]


def test_what_was_put_off_behind_a_commit_does_not_wait_for_the_disk(loop):
    """The next piece of a file, for example, that somebody downloads."""
    who, done = [], threading.Event()
    loop.soon(lambda: loop.aside(lambda: who.append(done.wait(PATIENCE / 10))))
    loop.soon(done.set)
    loop.take_turn()
    assert who == [True]


def test_sockets_for_which_a_turn_has_no_time_come_first_in_the_next_one(loop, monkeypatch):
    """Five that are always ready, and time for one in each turn: no order of the system lets one wait for ever."""
    monkeypatch.setattr(Loop, "BUDGET", -1)  # s
    served, callers = [], []

    def serve(number):
        served.append(number)
        callers[number].other.send(b"x")

    callers += [Caller(loop, lambda number=number: serve(number)) for number in range(5)]
    for _ in range(5):
        loop.take_turn()
    assert sorted(served) == [0, 1, 2, 3, 4]
    for caller in callers:
        caller.close()


@pytest.mark.parametrize("who", ["MainThread", "deputy"])
def test_a_turn_for_which_there_is_no_memory_is_begun_again(loop, monkeypatch, who):
    """In an hour of siege it ended the bus."""
    select, failures, over = loop.selector.select, [MemoryError()], threading.Event()

    def fails_once(patience):
        if failures and threading.current_thread().name == who:
            raise failures.pop()
        return select(patience)

    monkeypatch.setattr(loop.selector, "select", fails_once)
    loop.soon(lambda: loop.aside(lambda: over.wait(PATIENCE / 10)))
    loop.later(0.02, over.set)
    loop.run(lambda: over.is_set() and not failures)


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])  # the latter for a file: `can't allocate read lock`
def test_without_memory_to_report_an_exception_the_others_are_served_all_the_same(error, loop, monkeypatch):
    monkeypatch.setattr(bus_server.traceback, "format_exception", mock.Mock(side_effect=error()))
    failed = []
    loop.each(lambda item: 1 / 0, failed.append, [1, 2, 3])
    assert failed == [1, 2, 3] and not loop.attempt(lambda: 1 / 0)


def fails_once(of, name, monkeypatch, error=MemoryError):
    """The next call of this method finds no memory. Returns a list that is empty once that has happened."""
    failures, method = [error()], getattr(of, name)

    def call(*arguments):
        if failures:
            raise failures.pop()
        return method(*arguments)

    monkeypatch.setattr(of, name, call)
    return failures


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])  # the latter for a lock: `can't allocate lock`
@pytest.mark.parametrize("of, method", [("lines", "get"), ("stderr", "write"), ("stderr", "flush")])
def test_without_memory_to_write_a_line_the_next_one_is_written(of, method, error, monkeypatch):
    """An exception would end the thread, and Python without memory may end the process because of that."""
    report, stderr = bus_server.Report(), io.StringIO()
    report.lines = SimpleNamespace(put=report.lines.put, get=report.lines.get, qsize=report.lines.qsize)
    monkeypatch.setattr(sys, "stderr", stderr)
    failures = fails_once({"lines": report.lines, "stderr": stderr}[of], method, monkeypatch, error)
    report.start()
    for line in ("one", "two", "three"):
        report.say(line)
    wait_until(lambda: not failures and stderr.getvalue().endswith("three\n"))
    report.flush(PATIENCE)


def test_that_lines_were_dropped_is_told_before_the_next_line_though_somebody_waits_meanwhile(capfd):
    report = bus_server.Report()
    report.dropped = 3
    report.flush(PATIENCE)
    report.say("the next one")
    report.flush(PATIENCE)
    assert capfd.readouterr().err == "bus_server: 3 lines were dropped here\nthe next one\n"


def test_a_loop_has_no_lock_whose_code_is_in_python(loop):
    """Without memory, such code may end after it has taken its lock and before it can give it back: all would wait."""
    in_python = threading.Event, threading.Condition, queue.Queue
    both = *vars(loop).values(), *vars(bus_server.Report()).values()
    assert not [each for each in both if isinstance(each, in_python)]


def test_a_loop_starts_no_thread_once_it_runs(loop, monkeypatch):
    """Without memory Thread.start() can wait for ever: for a thread that ended before it could say that it began."""
    monkeypatch.setattr(threading.Thread, "start", mock.Mock(side_effect=AssertionError()))
    told = []
    for number in range(6):
        loop.in_thread(lambda number=number: number, told.append)
    bus_server.say("a line")
    loop.run(lambda: len(told) == 6)
    assert sorted(told) == [*range(6)]


def test_work_whose_result_finds_no_memory_is_answered_all_the_same(loop, monkeypatch):
    class Actions(deque):
        """One whose methods can be replaced."""

    loop.actions, told, done = Actions(), [], []
    failures = fails_once(loop.actions, "append", monkeypatch)
    loop.in_thread(lambda: done.append("once"), told.append)
    loop.later(PATIENCE, lambda: told.append("too late"))
    loop.run(lambda: told)
    assert not failures and told == [None] and done == ["once"]


def in_words(lock):
    """A lock whose methods a test can replace."""
    return SimpleNamespace(acquire=lock.acquire, release=lock.release, locked=lock.locked)


def test_a_commit_that_finds_no_memory_to_step_aside_is_begun_again(loop, monkeypatch):
    monkeypatch.setattr(loop, "RETRY", 0)
    loop.alert = in_words(loop.alert)
    failures, done = fails_once(loop.alert, "locked", monkeypatch), []
    loop.soon(lambda: loop.aside(lambda: done.append(loop.lock.locked())))
    loop.later(PATIENCE, lambda: done.append("too late"))
    loop.run(lambda: done)
    assert not failures and done == [False] and loop.lock.locked()


def test_a_deputy_that_found_no_memory_takes_the_next_turns(loop, monkeypatch):
    alert, turns = loop.alert, []
    loop.alert = in_words(alert)
    failures = fails_once(loop.alert, "acquire", monkeypatch)
    wait_until(lambda: not failures or (alert.locked() and alert.release()))
    loop.soon(lambda: (loop.later(0, lambda: turns.append(threading.current_thread().name)),
                       loop.aside(lambda: wait_until(lambda: turns))))  # fmt: skip
    loop.run(lambda: turns)
    assert turns == ["deputy"]
