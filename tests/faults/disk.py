"""The disk loses its power, fails, takes its time, fills up, or changes a bit."""
import contextlib
import fcntl
import http.client
import itertools
import json
import os
import pathlib
import random
import signal
import statistics
import struct
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import Counter

from tests.faults import Result, faulty, root, unless
from tests.faults.clock import KEEP, LATER, SteppedServer
from tests.faults.crash import storm, told
from tests.faults.history import Conversation, background, get
from tests.kit import new_client
from tests.kit.processes import PATIENCE, ROOT, Server, wait_until

SHUTDOWN, WITHOUT_FLUSH = 0x8004587D, 2  # ioctl FS_IOC_SHUTDOWN and EXT4_GOING_FLAGS_NOLOGFLUSH of Linux


def mounts():
    if root():
        return root()
    allowed = subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0
    return None if allowed else "this root may not mount"


def run(*command):
    subprocess.run([*map(str, command)], check=True, capture_output=True, timeout=PATIENCE)


class Disk:
    """An ext4 file system of its own, on a file, mounted on `place`."""

    def __init__(self, directory, megabytes=64):
        self.image, self.place = directory / "disk.image", directory / "disk"
        self.place.mkdir()
        with self.image.open("wb") as image:
            image.truncate(megabytes << 20)
        run("mkfs.ext4", "-q", "-F", self.image)

    def mount(self):
        run("mount", "-o", "loop", self.image, self.place)

    def unmount(self):
        run("umount", self.place)

    def cut(self, bus):
        """The power goes: what no fsync has brought to the disk is gone. Then it comes back.

        The bus stops first, as the whole machine would. It must not see the file system being shut down: an fsync that
        is under way then may say that all is well (Linux 6.18: 29 of 400 times, to a program that did nothing else).
        """
        stop(bus)
        place = os.open(self.place, os.O_RDONLY)
        fcntl.ioctl(place, SHUTDOWN, struct.pack("I", WITHOUT_FLUSH))
        os.close(place)
        bus.kill()
        self.unmount()
        self.mount()
        bus.start()

    def __enter__(self):
        self.mount()
        return self

    def __exit__(self, *_):
        with contextlib.suppress(subprocess.CalledProcessError):
            run("umount", "--lazy", self.place)


def stop(bus):
    """SIGSTOP; returns when no thread of it runs. One that is in the kernel, waiting for the disk, comes no further."""
    bus.process.send_signal(signal.SIGSTOP)
    wait_until(lambda: states(bus.process) <= {"T", "D"})


def states(process):
    """What the threads of a process do, in the letters of Linux."""
    stats = pathlib.Path(f"/proc/{process.pid}/task").glob("*/stat")
    return {stat.read_text().rpartition(")")[2].split()[0] for stat in stats}


def power_cut(directory, cuts, **how):
    with Disk(directory) as disk:
        return storm(disk.place, cuts, disk.cut, **how)


def not_flushed(directory, cuts=5, **how):
    """The control: a bus that leaves it to the system when a commit is on the disk."""
    return power_cut(directory, cuts, **how, **faulty("synchronous=NORMAL"))


# fsync


class Fsync:
    """The fsync of a bus that is started with these settings; `becomes` says what it does from now on."""

    def __init__(self, directory, fault):
        library, self.fault = directory / "fsync_fault.so", directory / "fsync_fault"
        run("gcc", "-shared", "-fPIC", "-o", library, ROOT / "tests" / "faults" / "fsync_fault.c", "-ldl")
        self.settings = faulty(fault)
        self.settings["env"].update(LD_PRELOAD=str(library), FSYNC_FAULT=str(self.fault))

    def becomes(self, fault):
        fresh = self.fault.with_suffix(".new")
        fresh.write_text(fault)
        os.replace(fresh, self.fault)

    def becomes_well(self):
        self.fault.unlink(missing_ok=True)


SOON = 3.0  # s in which a bus whose disk fails must have ended; it is asked to write all the time


def failing_fsync(directory, failures, fault="none", soon=SOON, **how):
    """By turns one fsync fails, or all of them until the bus has ended and was refused a new start.

    A single failure may also hit the folding in of the WAL, which is tried again: then the bus goes on, and may.
    """
    fsync, turns, found = Fsync(directory, fault), itertools.cycle(["fails", "once"]), []
    ended = Counter()

    def fail(bus):
        turn = next(turns)
        fsync.becomes(turn)
        with contextlib.suppress(subprocess.TimeoutExpired):
            bus.process.wait(soon)
        if bus.process.poll() is None:
            found.extend(unless(turn == "once" and not fsync.fault.exists(), f"it went on when fsync {turn}"))
            bus.kill()
        else:
            code = bus.reap()
            found.extend(unless(code == 1, f"it ended with exit code {code}"))
            ended[turn] += 1
            if turn == "fails":
                found.extend(unless(not starts(bus), "it started on a disk that fails"))
        fsync.becomes_well()
        bus.start()

    result = storm(directory, failures, fail, **how, **fsync.settings)
    ends = f"ended {ended['once']} times after one EIO, {ended['fails']} times when it lasted"
    return Result(f"{result.figures}; {ends}", result.violations + found)


def starts(bus):
    try:
        bus.start()
    except AssertionError:
        bus.reap()
        return False
    return True


READ_WITHIN = 0.050  # s, the 99th percentile
WAITING = 20  # messages that each of the reads receives


def slow_fsync(directory, seconds, pause=2.0, fault="none", busy=lambda bar: bar):
    """Everyone but the senders goes on while each fsync takes `pause` seconds. `busy` says a bar for a busy machine."""
    fsync = Fsync(directory, fault)
    with Server(directory / "bus.db", **fsync.settings) as bus:
        for number in range(WAITING):
            new_client.send(bus.url, "ann", "bob", f"message {number}")
        fsync.becomes(f"{1000 * pause:.0f}")
        over = threading.Event()
        sends = [background(timed_sends, bus.url, f"sender-{number}", over) for number in range(2)]
        peer = http.client.HTTPConnection("127.0.0.1", bus.port, timeout=PATIENCE)
        health, mail = [], []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            health.append(timed(peer, "/healthz", b'"ok": true'))
            mail.append(timed(peer, "/recv?to=bob&since=0", b'"message 19"'))
        over.set()
        took = [each for send in sends for each in send.result(PATIENCE)]
        fsync.becomes_well()
    figures = f"p99 of {len(health):,} /healthz {p99(health) * 1000:.1f} ms, of receives {p99(mail) * 1000:.1f} ms"
    found = unless(max(p99(health), p99(mail)) < busy(READ_WITHIN), figures)
    found += unless(min(took) >= pause, "fsync was not slow")
    return Result(f"{figures}; {len(took)} sends took {min(took):.1f} to {max(took):.1f} s", found)


def timed(peer, path, expected):
    began = time.monotonic()
    peer.request("GET", path)
    body = peer.getresponse().read()
    took = time.monotonic() - began
    assert expected in body, body
    return took


def timed_sends(url, sender, over):
    times = []
    while not over.is_set():
        began = time.monotonic()
        new_client.send(url, sender, "eve", f"message {len(times)}")
        times.append(time.monotonic() - began)
    return times


def p99(times):
    return statistics.quantiles(times, n=100)[98]


# Room

SMALL_DISK = 40  # MiB, of which 16 are the bus's reserve
LARGEST = 100000  # bytes of a message
ROOM_WITHIN = 5.0  # s from room to the next acknowledgement


class Persistent:
    """new_client, with messages of many sizes. `statuses` counts what the bus said to each attempt."""

    receive = staticmethod(new_client.receive)

    def __init__(self):
        self.statuses = Counter()

    def send(self, url, sender, to, msg, pause):
        body = new_client.keyed(sender, to, msg)
        while True:
            try:
                with urllib.request.urlopen(f"{url}/send", body, timeout=PATIENCE) as response:
                    ts = json.load(response)["ts"]
                    self.statuses[response.status] += 1
                    return ts
            except urllib.error.HTTPError as error:
                self.statuses[error.code] += 1
            except OSError as error:
                self.statuses[type(error).__name__] += 1
            if pause(new_client.PAUSE):
                return None

    def wait_for_refusals(self):
        """Returns when the disk is full: a score of refusals in a row, and nothing was stored meanwhile."""
        while True:
            stored, refused = self.statuses[200], self.statuses[507]
            wait_until(lambda: self.statuses[507] >= refused + 20 or self.statuses[200] > stored)  # noqa: B023
            if self.statuses[200] == stored:
                return

    def wait_for_stores(self):
        """How many seconds it takes until a score of messages more is stored."""
        began, stored = time.monotonic(), self.statuses[200]
        wait_until(lambda: self.statuses[200] >= stored + 20)
        return time.monotonic() - began


def disk_full(directory, rounds, size=SMALL_DISK):
    """The bus fills its disk and old messages make room; then somebody else fills it, and makes room."""
    place, client, calm, found, waits = directory / "small", Persistent(), threading.Event(), [], []
    place.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", place)
    try:
        bus = SteppedServer(place / "bus.db", "--keep", f"{KEEP}s", fault="tidy", beside=directory)
        with bus, Conversation(client, bus.url, "keeper") as talk:
            talk.listen()
            for number in range(4):
                texts = (f"{count} {'x' * random.randrange(LARGEST)}" for count in itertools.count())
                talk.speak(f"sender-{number}", itertools.takewhile(lambda _: not calm.is_set(), texts))
            for turn in range(1, rounds + 1):
                client.wait_for_refusals()
                found += unreadable(bus)
                wait_until(lambda: len(talk.delivered) >= sum(each.tick is not None for each in talk.sent))
                bus.step(turn * LATER)
                waits.append(client.wait_for_stores())
                others = place / "of others"
                fill(others)
                client.wait_for_refusals()
                found += unreadable(bus)
                others.unlink()
                waits.append(client.wait_for_stores())
            calm.set()
            found += talk.finish()
            found += unless(bus.process.poll() is None, "it ended")
    finally:
        run("umount", "--lazy", place)
    found += unless(set(client.statuses) == {200, 507}, f"answers: {dict(client.statuses)}")
    found += unless(max(waits) < ROOM_WITHIN, f"it took {max(waits):.1f} s to recover")
    return Result(f"full {len(waits)} times; {told([talk])}; {client.statuses[507]:,} answers of 507; "
                  f"stored again after {max(waits):.1f} s at most", found)


def unreadable(bus):
    """What could not be read from the bus."""
    mail = get(bus.url, "/recv?to=keeper&since=0&max=1")["messages"]
    return unless(mail and get(bus.url, "/healthz")["ok"], "its messages could not be read")


def fill(path):
    """Take what is left of a disk."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


# Bits


def flipped_bits(directory, flips, count=300):
    """Each time one bit of the database is another, and the bus starts or refuses; then everything is read."""
    original, damaged = directory / "original.db", directory / "bus.db"
    with Server(original) as bus:
        for number in range(count):
            new_client.send(bus.url, "ann", READERS[number % 3], f"{number} {'y' * 4 ** (number % 7)}")
        right = {message["id"]: message for _, message in everything(bus.url)}
        bus.stop()
    content, outcomes, found = original.read_bytes(), Counter(), []
    for _ in range(flips):
        place, bit = random.randrange(len(content)), random.randrange(8)
        for file in directory.glob("bus.db*"):
            file.unlink()
        changed = bytearray(content)
        changed[place] ^= 1 << bit
        damaged.write_bytes(changed)
        outcome, what = read_damaged(Server(damaged), right)
        outcomes[outcome] += 1
        found += [f"{each}: bit {bit} of byte {place}" for each in what]
    return Result(", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common()), found)


READERS = ["reader-0", "reader-1", "reader-2"]


def everything(url):
    """(mailbox, message) for all that can be read, as a reader of each name and as an observer."""
    for query in [f"/recv?to={name}&" for name in READERS] + ["/log?"]:
        answer = {"more": True, "now": 0}
        while answer["more"]:
            answer = get(url, f"{query}since={answer['now']}&max=1000")
            yield from ((query, message) for message in answer["messages"])


def read_damaged(bus, right, further=lambda url: []):
    """What became of a damaged database, in words, and what of it was wrong."""
    if not starts(bus):
        said = bus.log.read_text()
        return "refused at start", unless(said and "Traceback" not in said, f"refused without a reason: {said[-500:]}")
    try:
        try:
            found = [message for _, message in everything(bus.url)]
            missing = len({message["id"] for message in found} ^ set(right))
        except urllib.error.HTTPError as error:
            found, missing = [], f"all ({error})"
        wrong = [f"a wrong payload: {message}" for message in found if message != right.get(message["id"])]
        said = bus.log.read_text()
        silent = unless(said or not missing, f"lost: {missing} messages, and nothing was said")
        wrong += [*silent, *further(bus.url)]
        return "skipped and reported" if missing else "reported and mended" if said else "harmless", wrong
    finally:
        bus.kill()


# A flipped bit in the log that SQLite writes ahead


def flipped_log(directory, flips, fault="none"):
    """kill -9 leaves 60 transactions in the log; one bit of it changes, but not of the last one, and the bus starts."""
    original, outcomes, found = directory / "original.db", Counter(), []
    with Server(original) as bus:
        cursors = dict.fromkeys(READERS, 0.0)
        for number in range(60):
            new_client.send(bus.url, "ann", READERS[number % 3], f"{number} {'y' * 4 ** (number % 6)}")
            if number == 20:  # each reader has seven
                cursors = {name: get(bus.url, f"/recv?to={name}&since=0")["now"] for name in READERS}
        right = {message["id"]: message for _, message in everything(bus.url)}
        bus.kill()
    files = {suffix: pathlib.Path(f"{original}{suffix}").read_bytes() for suffix in ("", "-wal")}
    heads, end = heads_of(files["-wal"])
    places = itertools.cycle([range(end), heads, range(32)])  # anywhere, the head of a frame, that of the log
    for _, some in zip(range(flips), places):
        place, bit = random.choice(some), random.randrange(8)
        for file in directory.glob("bus.db*"):
            file.unlink()
        for suffix, content in files.items():
            changed = bytearray(content)
            if suffix:
                changed[place] ^= 1 << bit
            pathlib.Path(f"{directory / 'bus.db'}{suffix}").write_bytes(changed)
        bus = Server(directory / "bus.db", **faulty(fault))
        outcome, wrong = read_damaged(bus, right, lambda url: untold(url, cursors, right))
        outcomes[outcome] += 1
        found += [f"{each}: bit {bit} of byte {place} of {end}" for each in wrong]
    return Result(", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common()), found)


def heads_of(log):
    """Where the bytes of the heads of all frames but those of the last transaction are; and where that one begins.

    It begins behind the last frame but one that says that it ends a transaction.
    """
    size = int.from_bytes(log[8:12], "big") + 24
    frames = range(32, len(log) - size + 1, size)
    end = [at + size for at in frames if log[at + 4 : at + 8] != b"\0\0\0\0"][-2]
    return [at + each for at in frames if at < end for each in range(24)], end


def untold(url, cursors, right):
    """Readers that lack messages and hear of no gap; and whether what is sent now comes behind all that there was."""
    for name, cursor in cursors.items():
        answer = get(url, f"/recv?to={name}&since={cursor}")
        there = {message["id"] for message in answer["messages"]}
        due = {one for one, message in right.items() if message["to"] == name and int(one, 16) / 1e6 > float(cursor)}
        if due - there and "gap" not in answer:
            yield f"gap not announced: {name} lacks {len(due - there)} messages"
    if float(new_client.send(url, "ann", "late", "afterwards")) <= max(int(one, 16) for one in right) / 1e6:
        yield "a message has the place of one that is gone"
