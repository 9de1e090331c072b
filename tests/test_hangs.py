"""A test that hangs is told as a failure of that test, and the others are run; tests that run at once meet nowhere."""
import random
import subprocess
import sys

import pytest

from tests.kit.clock import Clock
from tests.kit.processes import PATIENCE, ROOT, Standstills, free_port

HANGING = """
import contextlib
import socket
import subprocess
import threading
import time

import pytest

from tests import conftest


@pytest.fixture
def short():
    conftest.HANGS = 0.1  # s, for the test alone: what else takes its time, on a busy machine, does not hang


def recv():
    ours, _theirs = socket.socketpair()
    ours.recv(1)


def swallow():
    while True:
        with contextlib.suppress(Exception):
            time.sleep(60)


WAITS = [lambda: time.sleep(60), threading.Event().wait, threading.Thread(target=time.sleep, args=[9], daemon=True),
         recv, swallow, lambda: subprocess.run(["sleep", "60"])]


@pytest.mark.parametrize("number", range(len(WAITS)))
def test_hangs(number, short):
    conftest.HANGS = 480
    if number == 2:
        WAITS[2].start()
        WAITS[2].join()
    WAITS[number]()


@pytest.fixture
def late():
    yield
    conftest.HANGS = 480
    time.sleep(60)


def test_whose_end_hangs(late):
    conftest.HANGS = 0.1


def test_behind_them():
    pass
"""


def test_a_test_that_hangs_fails_and_those_behind_it_are_run(tmp_path):
    file = tmp_path / "test_hanging.py"
    file.write_text(HANGING)
    options = ["-c", "/dev/null", "--rootdir", str(tmp_path), "-p", "no:cacheprovider", "-p", "tests.conftest"]
    command = [sys.executable, "-m", "pytest", "--tb=line", *options, str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * PATIENCE)
    assert "6 failed, 2 passed, 1 error" in done.stdout, done.stdout
    assert done.stdout.count("hangs: not over after ") >= 7


DYING = """
import os

import pytest


@pytest.mark.parametrize("number", range(20))
def test_dies(number):
    if number == 7:
        os._exit(3)
"""


def test_a_run_of_which_a_worker_died_has_not_just_failed_tests(tmp_path):
    """`make check` runs failed tests again, after exit code 1; here tests are left that nobody has run."""
    pytest.importorskip("xdist")
    file = tmp_path / "test_dying.py"
    file.write_text(DYING)
    options = ["-c", "/dev/null", "--rootdir", str(tmp_path), "-p", "no:cacheprovider", "-p", "tests.conftest"]
    command = [sys.executable, "-m", "pytest", "-n", "2", "--max-worker-restart", "0", *options, str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * PATIENCE)
    assert "crashed while running" in done.stdout and done.returncode == pytest.ExitCode.INTERRUPTED, done.stdout


def test_workers_that_run_at_once_give_their_servers_different_ports(monkeypatch):
    """Two took the same one now and then: a server has its port some tenths of a second after it was chosen."""
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", "3")
    really, of = random.randrange, []
    monkeypatch.setattr(random, "randrange", lambda *bounds: of.append({*range(*bounds)}) or really(*bounds))
    for worker in ("gw0", "gw1", "gw2"):
        monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
        assert free_port() in of[-1]
    assert len(set.union(*of)) == sum(map(len, of)), "no port is in two of them"


def test_a_bound_in_time_is_longer_by_what_the_machine_stood_still_and_by_nothing_else():
    """A machine whose load is small may stand still for a second, for all that runs on it."""
    found = Standstills(clock := Clock())
    for slept in [found.EACH] * 20 + [found.EACH + 3] + [found.EACH] * 20:
        clock.now += slept
        found.look()
    assert found.longer(0.5) == 0.5, "it stood still before"
    assert round(found.longer(1.5), 6) == 4.5
    clock.now += found.EACH + found.LEAST + 2  # and it stands still, and its thread has not looked yet
    assert round(found.longer(0.5), 6) == 2.5
