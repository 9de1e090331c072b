"""Readers that wait: thousands of them cost next to nothing, each is woken by its own message, no hold is too long.

    READERS=10000 python -m pytest tests/core/test_parked.py    the same with more of them
"""
import contextlib
import gc
import json
import os
import pathlib
import resource
import selectors
import socket
import statistics
import sys
import time
import tracemalloc
import warnings
from typing import NamedTuple

import pytest

import bus_server
from tests.kit import inside
from tests.kit.processes import PATIENCE, SERVER, Server, in_time, wait_until

READERS = int(os.environ.get("READERS", "3000"))
FIRST = 300  # readers before all others: what the bus takes once, for the first of them, is no reader's
ROUNDS = 4  # crowds that come after the first, at most
SPARE = 200  # descriptors for all that is not a reader, here and in the bus
WAVE = 100  # connections of which the bus has read nothing yet, at most; it hangs up on what is above STRANGERS
ARRAY = 1000  # messages that are sent at once
HOLD = 900  # s; longer than a slow machine takes for all of it
PATIENT = SERVER.replace("sys.exit", f"bus_server.HOLD_MAX = bus_server.IDLE_SECONDS = {HOLD}.0; sys.exit")
IDLE_SECONDS = 1  # a span of real time

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc, which only Linux has")


# HTTP on bare sockets, so that thousands of readers fit into this process


class Peer:
    """A connection to the bus."""

    def __init__(self, bus):
        self.socket = socket.create_connection(("127.0.0.1", bus.port), PATIENCE)
        self.data = b""

    def fileno(self):
        return self.socket.fileno()

    def ask(self, request):
        self.socket.sendall(request)

    def read(self):
        """Take what is there; the JSON of the answer once it is whole, until then None."""
        part = self.socket.recv(1 << 16)
        assert part, "the bus hung up"
        self.data += part
        head, _, body = self.data.partition(b"\r\n\r\n")
        if b"Content-Length: %d\r\n" % len(body) not in head:
            return None
        assert head.startswith(b"HTTP/1.1 200 "), self.data
        self.data = b""
        return json.loads(body, parse_float=str)

    def answer(self):
        while True:
            answer = self.read()
            if answer:
                return answer

    def exchange(self, request):
        self.ask(request)
        return self.answer()


HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


def poll(name, since=0, hold=HOLD):
    return f"GET /recv?to={name}&since={since}&block=true&wait={hold} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def post(message):
    body = json.dumps(message).encode()
    return f"POST /send HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def answers(peers):
    """(peer, answer, when) for each of them, as they come."""
    with selectors.DefaultSelector() as selector:
        for peer in peers:
            selector.register(peer, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(PATIENCE)
            assert ready, f"{len(selector.get_map())} readers were not answered in {PATIENCE} s"
            for key, _ in ready:
                answer = key.fileobj.read()
                if answer:
                    selector.unregister(key.fileobj)
                    yield key.fileobj, answer, time.monotonic()


# What a process takes, as Linux counts it


class Footprint(NamedTuple):
    memory: int  # bytes
    threads: int
    descriptors: int


def footprint(process):
    with open(f"/proc/{process.pid}/status") as file:
        status = dict(line.split(":", 1) for line in file)
    return Footprint(int(status["VmRSS"].split()[0]) * 1024, int(status["Threads"]), descriptors(process))


def descriptors(process):
    return len(os.listdir(f"/proc/{process.pid}/fd"))


def cpu_seconds(process):
    with open(f"/proc/{process.pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def computed(process):
    """s of CPU of its threads, to the nanosecond; `cpu_seconds` has hundredths of a second."""
    tasks = pathlib.Path(f"/proc/{process.pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def idle_load(process):
    """The share of a CPU it takes while nothing is asked of it: the least of up to three spans, as others are busy."""
    load = 1.0
    for _ in range(3):
        start = computed(process)
        time.sleep(IDLE_SECONDS)  # the span over which the load is measured
        load = min(load, (computed(process) - start) / IDLE_SECONDS)
        if load < 0.01:
            break
    return load


def all_read(port):
    """The kernel holds nothing that came to this port and that its process has not accepted or read."""
    with open("/proc/net/tcp") as file:
        lines = [line.split() for line in file if f":{port:04X} " in line]
    return all(queues.endswith(":00000000") for _, local, _, _, queues, *_ in lines if local.endswith(f":{port:04X}"))


# Thousands of readers


class Crowd:
    """Readers with names of their own, each parked on a connection of its own."""

    def __init__(self, bus, control, count, empty):
        """`empty` is what the bus takes without them."""
        self.control, self.readers = control, {}
        for number in range(count):
            reader = self.readers[f"reader-{number}"] = Peer(bus)
            reader.ask(poll(f"reader-{number}"))
            if len(self.readers) % WAVE == 0 or len(self.readers) == count:
                wait_until(lambda: descriptors(bus.process) >= empty.descriptors + len(self.readers))
                control.exchange(HEALTH)  # it is behind the polls of this wave
        wait_until(lambda: all_read(bus.port))
        control.exchange(HEALTH)  # the bus parks a reader in the step that reads its poll, and this is a later step

    def wake(self):
        """Send a message to each; returns what each is told, by name."""
        messages = [{"from": "alice", "to": name, "msg": f"wake up, {name}"} for name in self.readers]
        for start in range(0, len(messages), ARRAY):
            self.control.exchange(post(messages[start : start + ARRAY]))
        names = {reader: name for name, reader in self.readers.items()}
        return {names[reader]: [each["msg"] for each in answer["messages"]] for reader, answer, _ in answers(names)}

    def leave(self):
        for reader in self.readers.values():
            reader.socket.close()


def is_next_to_nothing(growth, readers):
    return growth / readers < 200


class Figures(NamedTuple):
    readers: int
    empty: Footprint  # of a bus without readers
    parked: Footprint  # with all of them
    load: float  # of one CPU, meanwhile
    left: Footprint  # when all are gone
    growth: list  # in bytes, each time that as many come again, until it is next to nothing
    heard: dict


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """What a bus takes while crowds of readers come, wait and leave; the last one is woken."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    count = min(READERS, hard - SPARE)
    if count < READERS:
        warnings.warn(f"only {count} parked readers: {hard} descriptors are allowed here", stacklevel=1)
    with Server(tmp_path_factory.mktemp("crowd") / "bus.db", program=("-S", "-c", PATIENT)) as bus:
        control = Peer(bus)
        control.exchange(HEALTH)
        empty = footprint(bus.process)
        Crowd(bus, control, FIRST, empty).leave()
        wait_until(lambda: descriptors(bus.process) == empty.descriptors)
        empty = footprint(bus.process)
        crowd = Crowd(bus, control, count, empty)
        parked = footprint(bus.process)
        load = idle_load(bus.process)
        memory, growth = [parked.memory], []
        while len(growth) < ROUNDS and not (growth and is_next_to_nothing(growth[-1], count)):
            crowd.leave()
            with contextlib.suppress(AssertionError):  # a test of its own says so
                wait_until(lambda: descriptors(bus.process) == empty.descriptors, 3 * PATIENCE)
            left = footprint(bus.process)
            crowd = Crowd(bus, control, count, empty)
            memory.append(footprint(bus.process).memory)
            growth.append(memory[-1] - memory[-2])
        heard = crowd.wake()
        crowd.leave()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    print(Figures(count, empty, parked, load, left, growth, {}))
    return Figures(count, empty, parked, load, left, growth, heard)


crowded = pytest.mark.slow("3,000 readers come, wait and leave, several times")


@linux
@crowded
def test_a_parked_reader_takes_less_than_3_kb(figures):
    each = (figures.parked.memory - figures.empty.memory) / figures.readers
    assert each < 3072


@linux
@crowded
def test_parked_readers_take_no_threads(figures):
    assert figures.parked.threads == figures.empty.threads


@linux
@crowded
def test_parked_readers_take_no_time(figures):
    assert figures.load < 0.01


@linux
@crowded
def test_each_of_many_parked_readers_is_woken_by_its_own_message(figures):
    names = [f"reader-{number}" for number in range(figures.readers)]
    assert figures.heard == {name: [f"wake up, {name}"] for name in names}


@linux
@crowded
def test_readers_that_leave_give_back_their_descriptors(figures):
    assert figures.left.descriptors == figures.empty.descriptors


@linux
@crowded
def test_readers_that_leave_give_back_their_memory(figures):
    """To those who come next. Not to the system: the names are remembered, and lie scattered over what the crowd took.

    What leaks is missing each time, so one crowd that needs next to nothing shows that nothing does. Next to: the sets
    of Deadlines stay until their time comes, with the allocator's give and take up to 100 bytes a reader. The smallest
    record of a reader, its Poll, is 250.
    """
    assert is_next_to_nothing(figures.growth[-1], figures.readers)


# What one more reader takes of Python's memory, to the byte

FEW, MORE = 300, 500  # readers that are there, and that come
# Bytes, by --rate. On 2026-12-01 up to 2,016 and 2,312, with Python 3.9 to 3.13. When it falls, lower this.
MOST = {"0": 2060, "50": 2360}


def park(bus, port, names):
    """The numbers of the sockets of readers that are parked and whose marks are saved."""
    before, numbers = len(bus.mailboxes.parked), []
    for count, name in enumerate(names, before + 1):
        reader = socket.create_connection(("127.0.0.1", port), PATIENCE)
        reader.sendall(poll(name, hold=60))
        numbers.append(reader.detach())
        while len(bus.mailboxes.parked) < count:
            bus.loop.take_turn()
    while bus.saving or bus.mailboxes.changed:
        bus.loop.take_turn()
    for cache in (bus_server.known_head, bus_server.known_query, bus_server.interned):  # of the last ones alone
        cache.cache_clear()
    gc.collect()
    return numbers


@pytest.mark.parametrize("rate", MOST)
def test_a_parked_reader_takes_no_more_memory_than_it_did(monkeypatch, rate):
    """The clock of the deadlines stands still: on a slow machine the readers would lie in more slots."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 2 * (FEW + MORE) + SPARE), hard))
    monkeypatch.setattr(bus_server, "MARKS_SECONDS", 0)
    bus, now = inside.make(":memory:", "--rate", rate), time.monotonic()
    monkeypatch.setattr(bus.door.deadlines, "clock", lambda: now)
    listener = bus_server.Listener(bus.door, bus_server.listen("127.0.0.1", 0), None)
    port = listener.sock.getsockname()[1]
    numbers = park(bus, port, [f"first-{number}" for number in range(FEW)])
    tracemalloc.start()
    try:
        numbers += park(bus, port, [f"reader-{number}" for number in range(MORE)])
        each = tracemalloc.get_traced_memory()[0] / MORE
    finally:
        tracemalloc.stop()
        for number in numbers:
            os.close(number)
        listener.close()
        for connection in bus.door.connections:
            connection.transport.sock.close()
        inside.close(bus)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert each < MOST[rate]


# One reader, quickly


def delays(bus, name, count):
    """s that an exchange takes in which nothing happens, and s from just before a send to the answer of its reader.

    Between these lie the request, the commit and the delivery; the 200 comes later.
    """
    reader, sender = Peer(bus), Peer(bus)
    since = 0
    for number in range(count):
        reader.ask(poll(name, since))
        start = time.monotonic()
        sender.exchange(HEALTH)  # the reader wrote before, so it is parked after this
        parked = time.monotonic()
        sender.ask(post({"from": "alice", "to": name, "msg": f"message {number}"}))
        since = reader.answer()["now"]
        yield parked - start, time.monotonic() - parked
        sender.answer()


@pytest.mark.slow("more rounds while others use the machine")
def test_a_parked_reader_has_its_message_within_5_ms(bus):
    """99 of 100, so the median too. The best round counts: others who use this machine can only make it slower.

    So a round is over when it cannot be that any more.
    """
    idle = []
    for number in range(100):
        late = 0
        for nothing, delivery in delays(bus, f"reader-{number}", 200):
            idle.append(nothing)
            late += delivery >= 0.005
            if late > 2:
                break
        else:
            return
    noise = statistics.quantiles(idle, n=100)[98]
    if noise > 0.0025:
        pytest.skip(f"this machine is too busy: an exchange with nothing in it takes {noise:.4f} s")
    pytest.fail("100 rounds, and in none of them")


def test_an_empty_hold_ends_when_it_said(bus):
    due = {}
    for hold in (0.2, 0.5, 0.75, 1, 1.33, 2):
        reader = Peer(bus)
        due[reader] = time.monotonic() + hold
        reader.ask(poll(f"reader-{hold}", hold=hold))
    for reader, answer, when in answers(due):
        assert answer["messages"] == []
        assert abs(when - due[reader]) < in_time(0.2)
