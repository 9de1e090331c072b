"""What asks the servers: wrk, redis-benchmark, and a client of our own where neither speaks the wire.

Each generator is a process of its own, and says how much of a CPU it took: one that took all of it was the limit.
"""
from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import select
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

from bench.wires import Refused, message

PATIENCE = 60  # s for an answer
CHUNK = 1 << 18  # bytes that are read at once


class Count(NamedTuple):
    """What was answered, in which time, and what the generator took of one CPU."""

    answers: int
    seconds: float
    cpu: float  # share of one CPU, 1.0 is all of it
    latencies: dict[str, float] = {}  # p50 and p99 in ms, where the generator has them; never changed

    @property
    def rate(self) -> float:
        return self.answers / self.seconds


def timed(command: Sequence[str]) -> tuple[str, float, float]:
    """What a command printed, its seconds, and its share of a CPU."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        file.seek(0)
        printed = file.read()
    seconds = time.perf_counter() - start
    if process.returncode:
        raise Refused(f"{command[0]} ended with {process.returncode}: {printed}")
    return printed, seconds, (usage.ru_utime + usage.ru_stime) / seconds


def wrk(port: int, requests: Sequence[bytes], connections: int, seconds: float) -> Count:
    """The requests in turn, from one thread of wrk."""
    with tempfile.NamedTemporaryFile(suffix=".requests") as file:
        for request in requests:
            file.write(b"%d\n%s" % (len(request), request))
        file.flush()
        printed, _, cpu = timed([
            "wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", f"{PATIENCE}s",
            "-s", str(pathlib.Path(__file__).with_name("wrk.lua")), f"http://127.0.0.1:{port}/", "--", file.name])
    found = json.loads(printed.splitlines()[-1])
    if found["refused"] or found["broken"] or not found["answers"]:
        raise Refused(f"of {found['answers']} requests {found['refused']} were refused, {found['broken']} broke")
    return Count(found["answers"], found["seconds"], cpu, {"p50": found["p50"], "p99": found["p99"]})


def redis_benchmark(
    port: int, connections: int, seconds: float, pipeline: int, stream: str = "dell", streams: int = 1
) -> Count:
    """XADD of the message, to a random one of `streams` if `stream` has the placeholder that redis-benchmark fills.

    It counts requests and not seconds, so a short run says how many make `seconds`.
    """

    def run(requests: int) -> Count:
        printed, _, cpu = timed([
            "redis-benchmark", "-p", str(port), "-c", str(connections), "-n", str(requests), "-P", str(pipeline),
            "-r", str(streams), "--csv", "XADD", stream, "*", "m", message("dell").decode()])
        last = printed.splitlines()[-1]  # the command, its quotes as they are, then seven numbers
        rate, _, _, half, _, most, _ = map(float, re.findall(r'"([0-9.]+)"', last)[-7:])
        return Count(requests, requests / rate, cpu, {"p50": half, "p99": most})

    rate = run(max(500, 50 * connections * pipeline)).rate
    return run(max(500, round(rate * seconds)))


# A client of our own


class Line:
    """A connection that blocks: a request, then its answer. It is made anew where a server closes after each."""

    def __init__(self, wire: Any, port: int) -> None:
        self.wire, self.port = wire, port
        self.data = bytearray()
        self.connect()
        for request in wire.hello(1):
            self.exchange(request)

    def connect(self) -> None:
        self.peer = socket.create_connection(("127.0.0.1", self.port), PATIENCE)
        self.peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, request: bytes) -> None:
        self.peer.sendall(request)

    def answer(self) -> bytes:
        while not (end := self.wire.end(self.data)):
            part = self.peer.recv(CHUNK)
            if not part:
                raise Refused(f"hung up after {bytes(self.data)!r}")
            self.data += part
        answer = bytes(self.data[:end])
        del self.data[:end]
        if not self.wire.keeps:
            self.peer.close()
            self.connect()
        return answer

    def exchange(self, request: bytes) -> bytes:
        self.ask(request)
        return self.answer()

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: Any) -> None:
        self.peer.close()


Talk = Generator[bytes, bytes, None]  # what one connection asks: it yields requests, and gets the answer of each


def sending(wire: Any, number: int, to: str) -> Talk:
    request = wire.send(to, number)
    while True:
        yield request


def working(wire: Any, number: int, queue: str, jobs: int) -> Talk:
    """A worker does so many jobs: it claims one and acknowledges it, then the next."""
    claim = wire.claim(queue)
    for _ in range(jobs):
        job = yield claim
        yield wire.acknowledge(job)


def sends(port: int, wire: Any, to: str, connections: int, seconds: float) -> Count:
    """Sends, each after the one before was answered, on so many connections."""
    return closed_loop(port, wire, connections, seconds, sending, to)


def works(port: int, wire: Any, queue: str, workers: int, jobs: int) -> Count:
    """So many jobs by each worker, on a connection of its own. A job is two answers."""
    found = closed_loop(port, wire, workers, PATIENCE, working, queue, jobs)
    return found._replace(answers=found.answers // 2)


def closed_loop(
    port: int, wire: Any, connections: int, seconds: float, talk: Callable[..., Talk], *arguments: Any
) -> Count:
    """A talk on each connection, from a process of our own, until the talks or the seconds are over."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(loop, (port, wire, connections, seconds, talk, *arguments))


def loop(port: int, wire: Any, connections: int, seconds: float, talk: Callable[..., Talk], *arguments: Any) -> Count:
    peers: dict[int, tuple[socket.socket, Talk]] = {}
    ready = select.epoll()
    with contextlib.ExitStack() as stack:
        for number in range(connections):
            peer = stack.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE))
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for request in wire.hello(number):
                peer.sendall(request)
                data = b""
                while not wire.end(data):
                    data += peer.recv(CHUNK)
            peers[peer.fileno()] = peer, talk(wire, number, *arguments)
            ready.register(peer, select.EPOLLIN)
        answers, parts = 0, dict.fromkeys(peers, b"")
        start, cpu = time.perf_counter(), time.process_time()
        for peer, its in peers.values():
            peer.sendall(next(its))
        while parts and time.perf_counter() < start + seconds:
            for descriptor, _ in ready.poll(1):
                peer, its = peers[descriptor]
                data = peer.recv(CHUNK)
                if not data:
                    raise Refused("hung up")
                data = parts[descriptor] + data
                end = wire.end(data)
                parts[descriptor] = data[end:]
                if end:
                    answers += 1
                    try:
                        peer.sendall(its.send(data[:end]))
                    except StopIteration:
                        del parts[descriptor]
        taken = time.perf_counter() - start
        return Count(answers, taken, (time.process_time() - cpu) / taken)


class Reader:
    """Reads along what is sent to some names of agent-bus, one of them every 25 ms, without taking the messages.

    Names without a reader are full after 10,000 messages. It presents the newest cursor, as a reader does that has
    everything; a cursor speaks for the first name of a poll only. What it takes from the bus for that is part of what
    is measured.
    """

    PERIOD = 0.025  # s; N names are each read once in N periods, after at most 7,500 messages: 300,000 a second in all

    def __init__(self, port: int, wire: Any, names: Sequence[str]) -> None:
        self.port, self.wire, self.names = port, wire, names
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self) -> None:
        for name in itertools.cycle(self.names):
            if self.over.wait(self.PERIOD):
                return
            self.read(name)

    def read(self, name: str) -> None:
        with Line(self.wire, self.port) as line:
            cursor = self.wire.cursor(line.exchange(self.wire.get(f"/recv?to={name}&since=now")))
            line.exchange(self.wire.get(f"/recv?to={name}&since={cursor}&max=1"))

    def __enter__(self) -> None:
        for name in self.names:
            self.read(name)
        self.thread.start()

    def __exit__(self, *_: Any) -> None:
        self.over.set()
        self.thread.join()
