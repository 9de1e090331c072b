"""A session that sleeps: what wakes it when mail comes."""
import contextlib
import errno
import fcntl
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest

import bus_recv
from tests.integrations.test_hook import (  # noqa: F401
    FOLDER,
    NOTICE,
    START,
    STOP,
    a_reader,
    a_session,
    digest,
    here,
    notice,
    project,
    run,
    send,
    session,
    started,
    text,
    unread,
)
from tests.kit.bad_servers import NOON, Scripted
from tests.kit.processes import PATIENCE, Server, wait_until

ONE_BUS = True


def has_watch(bus, channel=None):
    path = bus_recv.place_of("wake", bus.url, channel or os.environ["AGENT_BUS_CHANNEL"], "dell")
    return notice.is_locked(f"{path}.wake~wait")


def waiter(bus, event=STOP, way="--wait", **env):
    process = started(way, AGENT_BUS_URL=bus.url, AGENT_NAME="dell", **env)
    process.stdin.write(json.dumps(event))
    process.stdin.close()
    process.stdin = None
    return process


def test_a_waiter_wakes_its_session_with_the_number(bus):
    with a_session() as alive:
        waiting = waiter(bus, **alive)
        wait_until(lambda: b'"online": true' in bus.get(here("/agents?name=dell")))
        send(bus, "wake up", priority="high")
        out, err = waiting.communicate(timeout=PATIENCE)
        assert (waiting.returncode, out, err) == (2, "", f"{NOTICE}\n")
        assert text(bus.url, STOP, **alive) == "", "it was told"
        assert unread(bus) == 1


@pytest.fixture(params=["bus", "channel"])
def apart(request, bus, tmp_path):
    """Another bus, or another channel of the same one; and the channel."""
    if request.param == "channel":
        yield bus, "elsewhere"
        return
    with Server(tmp_path / "other.db") as other:
        yield other, os.environ["AGENT_BUS_CHANNEL"]


def test_two_sessions_of_one_name_are_both_woken_if_they_are_apart(apart, bus):
    other, channel = apart
    with a_session() as first, a_session() as second:
        second["AGENT_BUS_CHANNEL"] = channel
        waiting = [waiter(bus, **first)]
        wait_until(lambda: has_watch(bus))
        waiting.append(waiter(other, {**STOP, "session_id": "s2"}, **second))
        wait_until(lambda: has_watch(other, channel) or waiting[1].poll() is not None)
        send(bus, "wake up", priority="high")
        send(other, "wake up", priority="high", channel=channel)
        assert [each.communicate(timeout=PATIENCE)[1] for each in waiting] == [f"{NOTICE}\n"] * 2


def test_a_session_hears_that_nobody_listens_whoever_waits_for_its_name_elsewhere(apart, bus, monkeypatch):
    other, channel = apart
    monkeypatch.setenv("AGENT_BUS_URL", bus.url)
    with notice.alone("dell", "lock") as ours, a_session() as second:
        assert ours and "nobody listens" not in text(bus.url, START, **second)
        second["AGENT_BUS_CHANNEL"] = channel
        assert "Between turns nobody listens as dell." in text(other.url, START, **second)


def test_no_waiter_under_p_and_none_beside_another(bus):
    with a_session() as alive:
        unattended = {**alive, "CLAUDE_CODE_SESSION_ATTENDED": "0"}
        for environment in ({}, unattended):
            ended = run("--wait", event=STOP, AGENT_BUS_URL=bus.url, AGENT_NAME="dell", **environment)
            assert ended[:3] == (0, "", "")
        first = waiter(bus, **alive)
        wait_until(lambda: has_watch(bus))
        second = waiter(bus, **alive)
        assert (second.communicate(timeout=PATIENCE), second.returncode) == (("", ""), 0)
        assert first.poll() is None
        first.kill()
        first.communicate()


def test_a_waiter_ends_when_its_session_has_ended(bus):
    code = "import bus_hook, notice; notice.HOLD_SECONDS = notice.SOON = 0.1; bus_hook.main()"
    env = {**os.environ, "AGENT_BUS_URL": bus.url, "AGENT_NAME": "dell", "PYTHONPATH": FOLDER}
    with a_session() as alive:
        command = [sys.executable, "-c", code, "--wait"]
        pipe = subprocess.PIPE
        waiting = subprocess.Popen(command, env={**env, **alive}, stdin=pipe, stderr=pipe, text=True)
        waiting.stdin.write(json.dumps(STOP))
        waiting.stdin.close()
        waiting.stdin = None
        wait_until(lambda: has_watch(bus))
        assert waiting.poll() is None
    assert (waiting.communicate(timeout=PATIENCE)[1], waiting.returncode) == ("", 0)


def test_a_file_that_has_changed_wakes_a_session_that_was_not_told(bus):
    changed = {"hook_event_name": "FileChanged", "session_id": "s1", "file_path": "dell.wake"}
    send(bus, "wake up", priority="high")
    with a_session() as alive:
        env = {"AGENT_BUS_URL": bus.url, "AGENT_NAME": "dell", **alive}
        assert run("--wake", event=changed, **{**env, "CLAUDE_CODE_SESSION_ATTENDED": "0"})[:3] == (0, "", "")
        with a_reader(bus) as reader:
            assert json.loads(reader.stdout.readline())["msg"] == "wake up"
            assert run("--wake", event=changed, **env)[:3] == (0, "", "")
        send(bus, "wake up", priority="high")
        assert run("--wake", event=changed, **env)[:3] == (2, "", f"{NOTICE}\n")
        assert run("--wake", event=changed, **env)[:3] == (0, "", ""), "it was told"


def has_open(process, path):
    with contextlib.suppress(OSError):  # it has just closed one of them, and opens the next
        return str(path) in [os.readlink(link) for link in pathlib.Path(f"/proc/{process.pid}/fd").iterdir()]


def test_a_hook_that_looks_at_the_same_moment_takes_no_wake_away(bus):
    changed = {"hook_event_name": "FileChanged", "session_id": "s1", "file_path": "dell.wake"}
    send(bus, "wake up", priority="high")
    memory = pathlib.Path(bus_recv.state_directory(), "turns", "s1")
    memory.parent.mkdir(parents=True, exist_ok=True)
    with a_session() as alive, memory.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        waking = waiter(bus, changed, "--wake", **alive)
        wait_until(lambda: has_open(waking, memory))
        fcntl.flock(other, fcntl.LOCK_UN)
        assert (waking.communicate(timeout=PATIENCE)[1], waking.returncode) == (f"{NOTICE}\n", 2)


class Ending(notice.Waker):
    """Its thread may be ended."""

    def run(self):
        with contextlib.suppress(SystemExit):
            super().run()


@pytest.fixture
def waker(monkeypatch):
    """The Waker of dell. `stay` is a behaviour of a Scripted: it answers nothing while the test runs."""
    monkeypatch.setattr(notice, "LATER", 0.0)
    monkeypatch.setattr(notice, "SOON", 0.0)
    over = threading.Event()

    def who():
        if over.is_set():
            sys.exit()
        return session.Self("dell")

    waker = Ending(who, lambda line: None)
    waker.stay = lambda sock: over.wait(PATIENCE)
    yield waker
    over.set()
    waker.join(PATIENCE)


def the_file():
    return pathlib.Path(notice.wake_file("dell"))


def test_a_waker_writes_a_line_when_more_has_come_and_takes_nothing(bus, waker, monkeypatch):
    monkeypatch.setenv("AGENT_BUS_URL", bus.url)
    monkeypatch.setattr(notice, "HOLD_SECONDS", 0.5)
    complaints = []
    waker.warn = complaints.append
    waker.start()
    wait_until(lambda: b'"online": true' in bus.get(here("/agents?name=dell")))
    ids = [send(bus, "1")]
    wait_until(lambda: the_file().read_text() == "1 unread for dell\n")
    ids.append(send(bus, "2"))
    wait_until(lambda: the_file().read_text() == "1 unread for dell\n2 unread for dell\n")
    assert unread(bus) == 2 and complaints == []
    assert all(b'"state": "queued"' in bus.get(f"/message/{id}") for id in ids), "nobody has seen them"


def test_a_full_disk_costs_no_wake(waker, monkeypatch):
    """The thread ended, and no later mail woke the session."""
    told, wake_file = [], notice.wake_file

    def full(name):
        if not told:
            raise OSError(errno.ENOSPC, "No space left on device")
        return wake_file(name)

    waker.warn = told.append
    with Scripted(digest(1), digest(1), waker.stay) as server:
        monkeypatch.setenv("AGENT_BUS_URL", server.url)
        file = the_file()
        monkeypatch.setattr(notice, "wake_file", full)
        waker.start()
        wait_until(lambda: file.read_text() == "1 unread for dell\n")
    assert told == ["no mail can wake the session now: [Errno 28] No space left on device"]


def test_a_waker_hears_at_once_what_comes_beside_mail_that_nobody_reads(waker, monkeypatch):
    """The bus holds its look until something later than the last look has come."""
    held, later = threading.Event(), threading.Event()

    def hold(sock):
        held.set()
        assert later.wait(PATIENCE)
        sock.sendall(digest(1))

    with Scripted(digest(1), hold, digest(2, now=NOON + 1), waker.stay) as server:
        monkeypatch.setenv("AGENT_BUS_URL", server.url)
        waker.start()
        assert held.wait(PATIENCE)
        assert the_file().read_text() == "1 unread for dell\n"
        later.set()
        wait_until(lambda: len(server.asked) == 4)
        assert the_file().read_text() == "1 unread for dell\n2 unread for dell\n"
    looks = [(asked.query.get("since"), asked.query.get("wait")) for asked in server.asked]
    wait = f"{notice.HOLD_SECONDS}"
    assert looks == [(None, None), (f"{NOON}", wait), (None, None), (f"{NOON + 1}", wait)]


def test_a_waker_is_quiet_while_a_reader_shows_the_mail_and_wakes_for_what_comes_after_its_end(waker, monkeypatch):
    def hold(sock):
        reader.lock.close()
        sock.sendall(digest(1))

    with Scripted(digest(1), hold, digest(2), waker.stay) as server:
        monkeypatch.setenv("AGENT_BUS_URL", server.url)
        reader = bus_recv.Cursor("b1", "default", "dell", print)
        waker.start()
        wait_until(lambda: len(server.asked) == 4)
        assert the_file().read_text() == "2 unread for dell\n"


def test_a_waker_looks_at_once_when_something_comes(waker, monkeypatch):
    """However soon after its last look."""
    monkeypatch.setattr(notice, "SOON", 3600.0)
    with Scripted(digest(0), digest(1), digest(1), waker.stay) as server:
        monkeypatch.setenv("AGENT_BUS_URL", server.url)
        waker.start()
        wait_until(lambda: len(server.asked) == 4)
        assert the_file().read_text() == "1 unread for dell\n"


def test_a_waker_looks_once_in_a_while_in_a_storm(waker, monkeypatch):
    """Each look may change the file, and Claude Code reports no change until the file has stayed as it is."""
    monkeypatch.setattr(notice, "SOON", 0.3)
    later = digest(1)  # the answer to a request that is not held for long
    with Scripted(digest(0), later, digest(1), later, digest(2), later, digest(3), waker.stay) as server:
        monkeypatch.setenv("AGENT_BUS_URL", server.url)
        began = time.monotonic()
        waker.start()
        wait_until(lambda: len(server.asked) == 8)
    assert time.monotonic() - began >= 2 * 0.3, "before the second look that told, and before the third"
