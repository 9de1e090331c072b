"""Real processes for the tests: a bus server that can be killed and started again, and a wait for facts."""
import collections
import contextlib
import importlib.util
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

from tests.kit import forked

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
UNHURRIED = ("--rate", "0")  # tests send as fast as they can
# bus_server.py as a module, whose compiled form is kept, and without site packages: 85 ms of CPU, not 139; forked: 40
SERVER = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import bus_server; sys.exit(bus_server.main())"
COMMAND = [sys.executable, "-c", SERVER]  # for `python3 bus_server.py`
forked.WARM[SERVER] = str(ROOT), "bus_server"
PATIENCE = 20  # s; a fact that has not come true by then will not: slower than any machine we know


def comes_true(fact, patience):
    """The first true value of `fact()`; the last one after `patience` seconds without one."""
    deadline = time.monotonic() + patience
    while True:
        value = fact()
        if value or time.monotonic() >= deadline:
            return value
        time.sleep(0.01)


def wait_until(fact, patience=PATIENCE):
    """The first true value of `fact()`; AssertionError after `patience` seconds without one."""
    value = comes_true(fact, patience)
    assert value, f"waited {patience} s for a fact that never came true"
    return value


@contextlib.contextmanager
def full_disk(size):
    """No file that we or our children write may grow beyond this size. What has room is written, as on a disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class Standstills:
    """When this process did not run though it wanted to: a thread of it looks at the clock now and then."""

    EACH, LEAST = 0.05, 0.02  # s between two looks; what is later than that by less is usual

    def __init__(self, clock=time.monotonic):
        self.clock, self.last = clock, clock()
        self.found = collections.deque(maxlen=1000)  # (when it ran again, how many s later than it wanted)

    def look(self):
        now = self.clock()
        if now - self.last > self.EACH + self.LEAST:
            self.found.append((now, now - self.last - self.EACH))
        self.last = now

    def run(self, sleep=time.sleep):
        while True:
            sleep(self.EACH)
            self.look()

    def longer(self, seconds):
        """The s until now in which it ran for so many."""
        now = self.clock()
        for when, late in [(now, now - self.last - self.EACH - self.LEAST), *reversed(list(self.found))]:
            if now - when > seconds:
                break
            seconds += max(late, 0)
        return seconds


STANDSTILLS = Standstills()
threading.Thread(target=STANDSTILLS.run, daemon=True).start()


def in_cpu(seconds):
    """A bound of CPU time for a machine that is not busy, as a bound for this one."""
    return seconds * max(1, os.getloadavg()[0] / (os.cpu_count() or 1))


def in_time(seconds):
    """A bound for a machine that is not busy, as a bound for this one, for what is just over in another process.

    It is longer where more runs than there are cores, and by as long as this process, so the machine, stood still.
    """
    return STANDSTILLS.longer(in_cpu(seconds))


def free_port():
    """One that no connection takes by chance until the server has it: the system gives those from 32768 on.

    Nor does a server of another worker of pytest-xdist: each worker has ports of its own.
    """
    worker, count = (os.environ.get(f"PYTEST_XDIST_WORKER{each}", "") for each in ("", "_COUNT"))
    with socket.socket() as probe:
        while True:
            port = random.randrange(16384 + int(worker[2:] or 0), 32768, int(count or 1))
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port


def copied(file, folder):
    """A module of ours in another folder, with its compiled form, if there is one: who loads it need not compile it."""
    compiled = pathlib.Path(importlib.util.cache_from_source(file))
    shutil.copy2(file, folder)
    if compiled.exists():
        (folder / compiled.parent.name).mkdir(exist_ok=True)
        shutil.copy2(compiled, folder / compiled.parent.name)


def no_settings(monkeypatch, *prefixes):
    """Take away what whoever runs the tests has set for the clients, and variables with these prefixes."""
    for variable in list(os.environ):
        if variable.startswith(("AGENT_", *prefixes)) or variable.lower().endswith("_proxy"):
            monkeypatch.delenv(variable)


def run_checks(url, **env):
    """test_bus.py as people run it: what subprocess.run returns."""
    theirs = {name: value for name, value in os.environ.items() if not name.startswith(("AGENT_", "BUS_"))}
    command = [sys.executable, str(ROOT / "test_bus.py")]
    env = {**theirs, "BUS_URL": url, **env}
    return forked.run(command, env=env, capture_output=True, text=True, timeout=18 * PATIENCE)


def runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def has_taken_its_signals(pid):
    """The process has handled every signal that was sent to it, and waits for something else. It has one thread.

    While a signal is pending, or its handler runs, the kernel does not call the process asleep.
    """
    with open(f"/proc/{pid}/status") as file:
        status = {field: value.strip() for field, value in (line.split(":", 1) for line in file)}
    return status["State"].startswith("S") and not int(status["SigPnd"], 16) | int(status["ShdPnd"], 16)


class Server:
    """One bus_server.py process. `kill` and `start` keep the port and the database, as a crash and a restart do."""

    def __init__(self, db, *options, program=("-S", "-c", SERVER), env=None, python=sys.executable):
        self.db = str(db)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [python, *program, "--port", str(self.port), "--db", self.db, *UNHURRIED, *options]
        self.env = {**os.environ, **(env or {})}
        self.log = pathlib.Path(self.db + ".stderr")
        self.process = None

    def start(self):
        with self.log.open("ab") as stderr:
            self.process = forked.Popen(self.command, stdout=subprocess.PIPE, stderr=stderr, env=self.env)
        first = self.process.stdout.readline().decode()
        assert first.startswith("listening on http"), f"{first!r}; {self.log.read_text()}"
        return self

    def kill(self):
        """kill -9, and wait until the kernel has taken the port back."""
        self.process.kill()
        self.reap()

    def stop(self):
        """SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.reap()

    def reap(self):
        code = self.process.wait(PATIENCE)
        self.process.stdout.close()
        return code

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=70) as answer:
            return answer.read()

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        if self.process and self.process.poll() is None:
            self.kill()
