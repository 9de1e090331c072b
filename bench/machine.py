"""What this machine is, what it can do at most, and what a process takes of it. Linux only."""
from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import pathlib
import platform
import re
import socket
import statistics
import subprocess
import time
from collections.abc import Iterable

PAGE = 4096  # bytes; what SQLite writes at least
ROOT = pathlib.Path(__file__).resolve().parent.parent
CLOSE_WAIT = "08"  # of /proc/net/tcp: the other side has hung up


# Processes


def tree(pid: int) -> list[int]:
    """A process and all that it started."""
    found = [pid]
    for own in found:
        for children in pathlib.Path(f"/proc/{own}/task").glob("*/children"):
            with contextlib.suppress(FileNotFoundError):  # that thread has ended
                found += map(int, children.read_text().split())
    return found


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time, threads that have ended included; in hundredths."""
    total = 0
    for pid in pids:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def running_seconds(pids: Iterable[int]) -> float:
    """The same of the threads that are alive, in nanoseconds: for who does next to nothing."""
    files = [file for pid in pids for file in pathlib.Path(f"/proc/{pid}/task").glob("*/schedstat")]
    return sum(int(file.read_text().split()[0]) for file in files) / 1e9


class Others:
    """What of this machine's CPUs went to whom we did not start, since this was made."""

    def __init__(self) -> None:
        self.start, self.busy, self.own = time.monotonic(), busy_seconds(), own_seconds()

    def share(self) -> float:
        """Of all CPUs, with what the hypervisor took; our children count once they have ended."""
        multiprocessing.active_children()  # waits for those that have
        busy, own = busy_seconds() - self.busy, own_seconds() - self.own
        return max(0, busy - own) / (time.monotonic() - self.start) / (os.cpu_count() or 1)


def busy_seconds() -> float:
    """Of all CPUs: everything but idle and waiting for the disk."""
    fields = pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, _, _, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """Of this process, and of all its children that have ended."""
    return sum(os.times()[:4])


def written_bytes(pids: Iterable[int]) -> int | None:
    """How much they wrote to disks, in whole pages; a page counts each time that it has to be written out again.

    What the file system writes for itself is not in it, and a file on a tmpfs counts 0. None if a process does not show
    it, because it belongs to another user or has ended.
    """
    total = 0
    for pid in pids:
        try:
            counters = pathlib.Path(f"/proc/{pid}/io").read_text()
        except OSError:
            return None
        total += int(re.search(r"^write_bytes: (\d+)", counters, re.M)[1])
    return total


def memory(pids: Iterable[int]) -> int:
    """Bytes of memory, what is shared counted once."""
    total = 0
    for pid in pids:
        total += int(re.search(r"^Pss: +(\d+) kB", pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)[1])
    return total * 1024


def unread_bytes(port: int) -> int:
    """What came to this port and its process has not accepted or read; 0 says that all who ask are served or parked.

    Who has hung up does not count: the kernel shows one byte for the end of a stream.
    """
    waiting = 0
    for line in pathlib.Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, queues, *_ = line.split()
        if local.endswith(f":{port:04X}") and state != CLOSE_WAIT:
            waiting += int(queues.partition(":")[2], 16)
    return waiting


# The disk


def device(folder: pathlib.Path) -> str:
    """The block device below a folder, as `vda`; empty if there is none (tmpfs, overlay)."""
    number = folder.stat().st_dev
    link = pathlib.Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not link.exists():
        return ""
    block = link.resolve()
    return block.parent.name if (block / "partition").exists() else block.name


def flushes(disk: str) -> int | None:
    """How often the disk was told to write its cache, since the start of the machine; None if it is not counted."""
    fields = pathlib.Path(f"/sys/block/{disk}/stat").read_text().split() if disk else []
    return int(fields[15]) if len(fields) > 15 else None


def filesystem(folder: pathlib.Path) -> str:
    return subprocess.check_output(["df", "--output=fstype", folder], text=True).split()[-1]


class Scratch:
    """A file on the disk, written over and over as SQLite does with its WAL: only data changes, never its length."""

    SIZE = 4 << 20

    def __init__(self, folder: pathlib.Path) -> None:
        self.path = folder / "scratch"
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT)
        os.pwrite(self.file, bytes(self.SIZE), 0)
        os.fsync(self.file)

    def sync_seconds(self, span: float) -> list[float]:
        """How long it takes to write 4 KB and have them on the disk, again and again for `span` seconds."""
        page, times, start = os.urandom(PAGE), [], time.perf_counter()
        while time.perf_counter() < start + span:
            before = time.perf_counter()
            os.pwrite(self.file, page, len(times) * PAGE % self.SIZE)
            os.fdatasync(self.file)
            times.append(time.perf_counter() - before)
        return times

    def close(self) -> None:
        os.close(self.file)
        self.path.unlink()


# The loopback


def echo(peer: socket.socket) -> None:
    while data := peer.recv(PAGE):
        peer.sendall(data)


def round_trip_seconds(span: float, size: int = 250) -> list[float]:
    """There and back between two processes that block, `size` bytes (a send, with its head) at a time."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = socket.create_connection(listener.getsockname())
        there, _ = listener.accept()
    other = multiprocessing.get_context("spawn").Process(target=echo, args=(there,), daemon=True)
    with here, there:
        other.start()
        here.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        data, times = b"x" * size, []
        here.sendall(data)  # waits until the other one has started
        here.recv(PAGE)
        start = time.perf_counter()
        while time.perf_counter() < start + span:
            before = time.perf_counter()
            here.sendall(data)
            here.recv(PAGE)
            times.append(time.perf_counter() - before)
        here.shutdown(socket.SHUT_RDWR)
    other.join()
    return times


# What the document says about it


def description(folder: pathlib.Path) -> dict[str, str]:
    cpu = re.search(r"^model name\s*: (.*)$", pathlib.Path("/proc/cpuinfo").read_text(), re.M)
    total = re.search(r"^MemTotal: +(\d+) kB", pathlib.Path("/proc/meminfo").read_text(), re.M)
    return {
        "CPU": f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores",
        "memory": f"{int(total[1]) / 2**20:.0f} GiB" if total else "unknown",
        "kernel": f"{platform.system()} {platform.release()}",
        "disk": f"{device(folder) or 'no block device'}, {filesystem(folder)}",
        "fdatasync of 4 KB": f"{statistics.median(sample_syncs(folder)) * 1000:.2f} ms (median of 1 s)",
    }


def sample_syncs(folder: pathlib.Path) -> list[float]:
    scratch = Scratch(folder)
    try:
        return scratch.sync_seconds(1)
    finally:
        scratch.close()


def moment() -> dict[str, str]:
    """When a row is measured, and with what code."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC",
        "commit": commit.stdout.strip() or "unknown",
    }
