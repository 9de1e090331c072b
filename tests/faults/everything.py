"""An hour of everything at once: honest agents go on (honest.py) while all that can go wrong does, alone and combined.

The first part is quiet and says what an honest send takes. Then come the faults: up to the half with kills, and without
them in the second half, in which memory must not grow. What is done, and when, follows from a seed, which the report
has: SEED=n python -m tests.faults siege=600 does it again.
"""
import contextlib
import os
import pathlib
import random
import resource
import sqlite3
import statistics
import subprocess
import sys
import time
from collections import Counter
from typing import NamedTuple

from tests.core.test_parked import descriptors, footprint
from tests.faults import Result, unless
from tests.faults.clock import DAY, HOUR, SteppedServer, make_wrong
from tests.faults.crash import broken
from tests.faults.disk import READ_WITHIN, Disk, Fsync, p99, starts
from tests.faults.honest import GRANTS, Field, begin, finish, judged
from tests.kit.peers import mint
from tests.kit.processes import PATIENCE, ROOT, wait_until
from tests.kit.strangers import KINDS

OPTIONS = ["--rate", "50", "--turns", "0", "--keep", "365d"]  # turns: one agent asks another for an hour
ROOM = 1024  # MiB of the disk, most of which nothing uses
SLOWEST = 0.5  # s more for an fsync, or for the first write of a transaction
JUMPS = [-HOUR, -30, 30, HOUR, DAY]
SLOWER = 5  # times the quiet p99 of a send
LONG = 1800  # s from which on the memory is judged
GROWTH = 1.05  # of its last quarter, to its second
UNANSWERED = {0: "hung up on", None: "not answered"}


class Window(NamedTuple):
    """A fault, and when. `delay` is by how much it may hold up a commit; None, if it is no fault of the disk."""

    fault: str
    began: float
    ended: float
    delay: "float | None"

    def meets(self, exchange):
        """A commit that was slow when the window ended is so for a while."""
        return exchange.began <= self.ended + 2 * (self.delay or 0) and exchange.began + exchange.took >= self.began


class Siege:
    """The bus and what is done to it. Owned by the thread that does it."""

    def __init__(self, bus, disk, fsync, field, span, chance):
        self.bus, self.disk, self.fsync, self.field, self.span, self.chance = bus, disk, fsync, field, span, chance
        self.slowness, self.error = {"fsync": 0.0, "write": 0.0}, 0  # s; the clock's, in s
        self.windows, self.downs, self.found, self.memory = [], [], [], []

    def is_slow(self, **more):
        self.slowness.update(more)
        self.fsync.becomes(" ".join(f"{1000 * seconds:.0f}" for seconds in self.slowness.values()))

    def set_clock(self, error):
        make_wrong(self.bus.error, error)
        self.field.jumped = time.monotonic()

    def start_again(self):
        """After a kill, or after its own end. Somebody else may have the database just then: it is tried again."""
        began = time.monotonic()
        if self.bus.process.poll() is None:
            self.bus.kill()
        else:
            code = self.bus.reap()
            self.found.append(f"it ended by itself, with {code}: {self.bus.log.read_text()[-300:]}")
        wait_until(lambda: starts(self.bus))
        self.downs.append(Window("down", began, time.monotonic(), None))

    def strike(self, faults):
        """These faults at once, for a while. A bus that was killed starts before its disk is full or locked."""
        with contextlib.ExitStack() as stack:
            for fault in sorted(faults, key="kill".__ne__):
                stack.enter_context(self.window(fault))
            self.watch(self.span * self.chance.uniform(0.5, 1.5))

    @contextlib.contextmanager
    def window(self, fault):
        began = time.monotonic()
        with FAULTS[fault](self) as delay:
            yield
        ended = time.monotonic()
        self.windows.append(Window(fault, began, ended, ended - began if fault == "lock" else delay))

    def watch(self, seconds):
        """Let so much time pass. A bus that ends meanwhile is started again."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.bus.process.wait(max(end - time.monotonic(), 0))
                self.start_again()

    def wage(self, faults, end, first=()):
        """First these lists of them, however slow this machine is, then one to three at once, with pauses."""
        first, most = list(first), min(len(faults), 3)
        while faults and (first or time.monotonic() < end):
            self.strike(first.pop(0) if first else self.chance.sample(faults, self.chance.randint(1, most)))
            self.watch(self.span * self.chance.uniform(0.1, 0.5))
            self.memory.append(footprint(self.bus.process).memory)


# The faults: each begins, gives its delay (s), or None if the disk has no part in it, and ends


def slow(what):
    @contextlib.contextmanager
    def fault(siege):
        delay = siege.chance.uniform(0, SLOWEST)
        siege.is_slow(**{what: delay})
        yield delay
        siege.is_slow(**{what: 0.0})

    return fault


@contextlib.contextmanager
def limited(siege, what, limit):
    """A limit for the process that runs now; one that is started meanwhile has none."""
    process = siege.bus.process
    before = resource.prlimit(process.pid, what)
    resource.prlimit(process.pid, what, (limit, before[1]))
    yield None
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(process.pid, what, before)


def no_descriptors(siege):
    return limited(siege, resource.RLIMIT_NOFILE, descriptors(siege.bus.process))


def no_memory(siege):
    """It may keep what it has. A thread that is new, or an answer that is large, would need more."""
    pages = pathlib.Path(f"/proc/{siege.bus.process.pid}/statm").read_text().split()[0]
    return limited(siege, resource.RLIMIT_AS, int(pages) * resource.getpagesize())


@contextlib.contextmanager
def full_disk(siege):
    """Somebody else takes all the room."""
    others = siege.disk.place / "of others"
    with others.open("wb") as file:
        free, taken = os.statvfs(siege.disk.place), 0
        size = free.f_bfree * free.f_frsize
        while size >= free.f_frsize:
            try:
                os.posix_fallocate(file.fileno(), taken, size)
                taken += size
            except OSError:
                size //= 2
    yield 0.0
    others.unlink()


@contextlib.contextmanager
def clock_jump(siege):
    """Ahead, and it stays there; or back, and after a while it is right again."""
    jump = siege.chance.choice(JUMPS)
    siege.set_clock(siege.error + jump)
    yield None
    siege.error += max(jump, 0)
    siege.set_clock(siege.error)


@contextlib.contextmanager
def lock(siege):
    """Another program writes; it has until the end of the window, or SQLite's patience, to get its lock."""
    with contextlib.closing(sqlite3.connect(siege.bus.db, PATIENCE, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        yield 0.0
        database.execute("ROLLBACK")


@contextlib.contextmanager
def kill(siege):
    siege.start_again()
    yield None


def hostile(kind):
    @contextlib.contextmanager
    def fault(siege):
        arguments = [kind, str(siege.bus.port), siege.field.tokens["mallory"]]
        with subprocess.Popen([sys.executable, "-m", "tests.kit.strangers", *arguments], cwd=ROOT) as process:
            try:
                yield None
            finally:
                process.kill()

    return fault


FAULTS = {"slow fsync": slow("fsync"), "slow write": slow("write"), "no descriptors": no_descriptors,
          "no memory": no_memory, "full disk": full_disk, "clock jump": clock_jump, "lock": lock, "kill": kill,
          **{kind: hostile(kind) for kind in KINDS}}  # fmt: skip


def siege(directory, seconds, slack=1.0, fault="none", faults=None, at_once=1):
    """The row. The bars in seconds are `slack` times as wide: for a machine on which others work as well.

    Each fault comes alone first, or in a short siege `at_once` of them together.
    """
    seed = int(os.environ.get("SEED", random.randrange(10**6)))
    print(f"siege: seed {seed}", flush=True)
    fsync = Fsync(directory, fault)
    with Disk(directory, ROOM) as disk:
        db = disk.place / "bus.db"
        tokens = mint(db, **GRANTS)
        with SteppedServer(db, *OPTIONS, fault=fault, beside=directory, env=fsync.settings["env"]) as bus:
            field = Field(bus, tokens, directory, seed)
            field.patience = PATIENCE if fault == "none" else 4  # what a control has lost does not come
            it = Siege(bus, disk, fsync, field, min(max(seconds / 60, 0.8), 5), random.Random(seed))
            try:
                quiet = endure(it, seconds, list(faults or FAULTS), at_once)
            finally:
                field.over.set()
            found = it.found + judged(field) + unless(bus.stop() == 0, "it did not end in order")
        found += broken(bus.db)
    figures, late = times(it, quiet, slack)
    growth = grown(it.memory, seconds)
    injected = listed(Counter(window.fault for window in it.windows))
    return Result(f"seed {seed}; {tally(field)}; {figures}; {growth.figures}; faults: {injected}",
                  found + unanswered(it) + late + growth.violations)


def early(directory, seconds=30, faults=("kill", "clock jump", "slow heads")):
    """The control: a bus that acknowledges before it commits, often killed. It counts that messages are lost."""
    result = siege(directory, seconds, 10.0, "early", faults)
    return result._replace(violations=[each for each in result.violations if "lost: " in each])


def endure(it, seconds, faults, at_once):
    """The whole of it; returns when the quiet part was over."""
    began = time.monotonic()
    quiet = began + max(seconds / 30, 3)
    end = began + seconds
    begin(it.field)
    it.watch(quiet - time.monotonic())
    each = it.chance.sample(faults, len(faults))
    it.wage(faults, (quiet + end) / 2, [each[start : start + at_once] for start in range(0, len(each), at_once)])
    del it.memory[:-1]
    it.wage([fault for fault in faults if fault != "kill"], end)
    finish(it.field)
    return quiet


# What it came to


def tally(field):
    sent = [each for _, each in field.sent()]
    known = sum(each.tick is not None for each in sent)
    delivered = sum(len(reader.got) for reader in field.readers)
    statuses = Counter(exchange.status for exchange in field.exchanges())
    done = Counter(exchange.kind for exchange in field.exchanges() if exchange.status in (200, 201))
    return (f"{known:,} acknowledged, {len(sent) - known:,} unknown or recalled, {delivered:,} delivered; "
            f"done: {listed(done)}; answers: {listed(statuses)}")


def listed(counts):
    return ", ".join(f"{what} {count:,}" for what, count in counts.most_common())


def unanswered(it):
    """Each honest request has an answer. Its connection may end by our kill; for want of descriptors, while it is idle,
    which may cross a request; and because its guest's token was revoked. Without memory an idle one may end, too.
    """
    excused = it.downs + [window for window in it.windows if window.fault == "no descriptors"]
    return [f"{UNANSWERED[exchange.status]}: {exchange} in {[*map(str, met(it.windows, exchange))]}"
            for exchange in it.field.exchanges()
            if exchange.status is None
            or (exchange.status == 0 and exchange.kind != "guest"
                and not any(window.meets(exchange) for window in excused))]


def met(windows, exchange):
    """The faults at that time, and the last one before."""
    before = [window for window in windows if window.ended < exchange.began]
    return [*before[-1:], *(window for window in windows if window.meets(exchange))]


def times(it, quiet, slack):
    """The figures of sends and reads, and where they are too high. Of a send in windows, what is above its delay."""
    slow = [window for window in it.windows if window.delay is not None]
    base, outside, inside = [], [], []
    reads = {"read": [], "health": []}
    for exchange in it.field.exchanges():
        if exchange.status and exchange.kind in reads:
            reads[exchange.kind].append(exchange.took)
        if exchange.status and exchange.kind == "send":
            met = [window.delay for window in slow if window.meets(exchange)]
            if exchange.began + exchange.took < quiet:
                base.append(exchange.took)
            elif met:
                inside.append(max(exchange.took - 2 * sum(met), 0))
            else:
                outside.append(exchange.took)
    shown = {name: p99(each) if len(each) > 1 else 0.0 for name, each in
             {"quiet": base, "under siege": outside, "above twice the delay": inside, **reads}.items()}  # fmt: skip
    limit = SLOWER * shown["quiet"] * slack
    found = [f"p99 of {name} {shown[name] * 1e3:.0f} ms, more than {limit * 1e3:.0f}"
             for name in ("under siege", "above twice the delay") if shown[name] > limit]
    found += [f"p99 of {name} {shown[name] * 1e3:.0f} ms" for name in reads if shown[name] > READ_WITHIN * slack]
    return "p99 in ms: " + ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in shown.items()), found


def grown(memory, seconds):
    """The second half of the siege, in which nobody kills: its second quarter, and its last."""
    quarter = max(len(memory) // 4, 1)
    second, last = (statistics.median(part) for part in (memory[quarter : 2 * quarter] or memory, memory[-quarter:]))
    figures = f"memory {second / (1 << 20):.1f} MiB, then {last / (1 << 20):.1f}"
    return Result(figures, unless(seconds < LONG or last <= GROWTH * second, figures))
