"""The table of faults: what each row must hold to, what runs it in full, and how much that is."""
import functools
import importlib.util
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

from tests import fuzz
from tests.faults import Result, clock, crash, disk, everything, faulty, linux, network, program, siege, soak, unless
from tests.kit.processes import ROOT


class Control(NamedTuple):
    """What has the fault on purpose, and the run in which it must be found out."""

    what: str
    run: Callable[[pathlib.Path], Result]


class Row(NamedTuple):
    name: str  # on the command line
    fault: str
    bar: str
    run: Callable[[pathlib.Path, int], Result]
    full: int  # cycles, seconds, sends: what `fault` counts
    control: "Control | None" = None
    needs: tuple = ()


def suite(command, directory, size, **env):
    """A row that is a command of its own; its last line is its figure."""
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env={**os.environ, **env},
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(done.stdout, flush=True)  # all of it: the next run is another one
    last = (done.stdout.strip().splitlines() or ["it said nothing"])[-1]
    return Result(last, unless(done.returncode == 0, f"exit code {done.returncode}: {done.stdout[-2000:]}"))


def module(name):
    return lambda: None if importlib.util.find_spec(name) else f"{name} is not here"


ROWS = [
    Row("kill-server", "kill -9 of the server under load, 1,000 times",
        "0 acknowledged lost, 0 duplicated at a reader that drops repeats, order strict, integrity ok",
        crash.storm, 1000, Control("acknowledges before it commits", crash.early)),
    Row("kill-crowd", "kill -9 of the server under 150 senders at once, 300 times",
        "0 acknowledged lost, 0 duplicated, order strict, integrity ok",
        crash.crowd, 300,
        Control("acknowledges before it commits", lambda place: crash.crowd(place, 3, **faulty("early")))),
    Row("kill-reader", "kill -9 of the reader (bus_recv.py) amidst its answers, 200 times",
        "0 lost, redelivery at most one batch",
        crash.reader_storm, 200,
        Control("saves its cursor before it shows",
                lambda place: crash.reader_storm(place, 20, script="tests/faults/hasty_reader.py"))),
    Row("standstill", "SIGSTOP of the server for 45 s, then SIGCONT",
        "0 lost, healthy within 5 s",
        crash.standstill, 45),
    Row("power-cut", "the power goes 40 times: a loop-mounted ext4 is shut down without a flush",
        "0 acknowledged lost with synchronous=FULL",
        disk.power_cut, 40, Control("synchronous=NORMAL", disk.not_flushed),
        needs=(linux, disk.mounts, program("mkfs.ext4"))),
    Row("failing-fsync", "fsync fails with EIO, 100 times: once, or until the bus has ended",
        "what was acknowledged is there after reopening; the bus stops acknowledging (it ends within 3 s)",
        disk.failing_fsync, 100,
        Control("takes no notice", lambda place: disk.failing_fsync(place, 2, fault="deaf")),
        needs=(linux, program("gcc"))),
    Row("slow-fsync", "each fsync takes 2 s, for 60 s",
        "receives and /healthz p99 under 50 ms meanwhile",
        disk.slow_fsync, 60, Control("commits in the loop", lambda place: disk.slow_fsync(place, 5, fault="inline")),
        needs=(linux, program("gcc"))),
    Row("disk-full", "the disk (a small tmpfs) is full, 10 times by the bus itself and 10 times by others",
        "every answer is 200 or 507; reads work; pruning works; recovers within 5 s of room, no restart",
        disk.disk_full, 10, needs=(linux, disk.mounts)),
    Row("flipped-bit", "a flipped bit in the database file, 300 times",
        "never a wrong payload delivered; what is missing is reported",
        disk.flipped_bits, 300),
    Row("flipped-log", "kill -9 and a flipped bit in the write-ahead log, but for its last transaction, 300 times",
        "nothing is missing, or it is told at start and to each reader that lacks a message",
        disk.flipped_log, 300,
        Control("takes what is left for all", lambda place: disk.flipped_log(place, 20, "blind"))),
    Row("clock", "the wall clock steps by -1 h and by +1 day, with crashes, during 24,000 sends",
        "0 lost, `ts` increasing, hold times right",
        clock.clock_steps, 24000,
        Control("ticks are the clock as it is",
                lambda place: clock.clock_steps(place, 800, fault="raw clock", patience=2))),
    Row("retention", "retention removes what a reader has not read, between 100 visits of it",
        "what was not delivered lies in a gap that was announced",
        clock.retention, 100,
        Control("says nothing of gaps", lambda place: clock.retention(place, 5, faults="tidy,silent"))),
    Row("bad-proxy", "a proxy cuts, stalls, loses or duplicates half of 5,000 sends, and of what is received",
        "each exactly once in the mailbox, and at its reader",
        network.bad_proxy, 5000,
        Control("sends without keys", lambda place: network.bad_proxy(place, 160, body=network.unkeyed, patience=2))),
    Row("live", "a client of the first contract gets 1,000 queued messages and 4,000 that are sent meanwhile",
        "0 lost",
        network.reading, 5000, Control("`now` is the wall clock", network.wall_clock)),
    Row("nginx", "nginx in front, with default settings, and with a 3 s read timeout; 10 bursts each",
        "0 lost",
        network.behind_nginx, 10, needs=(program("nginx"),)),
    Row("framing", "190 framing cases, each split at every byte",
        "0 smuggled, 0 tracebacks, 0 empty replies; each answered as it should be",
        network.framing, 100000),
    Row("slow-peers", "10,000 slow heads, then 10,000 slow bodies",
        "normal traffic p99 at most 3x its base; closed at deadline + 2 s; memory +50 MB at most",
        siege.slow_peers, 10000, needs=(linux, siege.ten_thousand_descriptors)),
    Row("descriptors", "descriptor limit 64 with 120 connections",
        "CPU under 10 %, back within 1 s",
        siege.no_descriptors, 120, needs=(linux,)),
    Row("silent-tls", "200 silent TLS connections",
        "p99 at most 2x base",
        siege.silent_handshakes, 200, needs=(linux, program("openssl"))),
    Row("soak", "100,000 messages, 300 a second (an hour of it on demand: soak=1000000)",
        "0 lost; memory and descriptors flat",
        soak.soak, 100000, needs=(linux,)),
    Row("siege",
        "an hour of everything at once: disk, lock, clock, kills, descriptors, memory, hostile connections",
        "0 lost; it ends by our kills alone; each request is answered; p99 of a send at most 5x its quiet value (and "
        "twice an injected delay), of receives and /healthz under 50 ms; memory in the half without kills +5 % at most",
        everything.siege, 3600, Control("acknowledges before it commits", everything.early),
        needs=(linux, disk.mounts, program("mkfs.ext4"), program("gcc"))),
    Row("fuzzing", "1 million raw requests, schema-driven requests, 10 min coverage-guided",
        "0 answers of 5xx, memory +20 MB at most",
        functools.partial(suite, ["tests.fuzz"]), 1, needs=(fuzz.missing,)),
    Row("model", "1,000 runs of 50 steps (send, retry, read, restart, clock) beside a model",
        "no difference",
        functools.partial(suite, ["pytest", "-o", "faulthandler_timeout=0", "tests/core/test_model.py"], RUNS="1000"),
        1, needs=(module("tests.core.test_model"), module("hypothesis"))),
]  # fmt: skip
