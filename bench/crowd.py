"""Readers that are parked: thousands of connections, in processes of their own that do nothing while they wait."""
from __future__ import annotations

import contextlib
import multiprocessing
import resource
import select
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from bench import machine
from bench.peers import Peer
from bench.wires import Refused

EACH = 10000  # connections of one process; some systems give a process 20000 descriptors
PATIENCE = 120  # s for all of them to be parked, or to be answered
SO_TIMESTAMPNS = 35  # socket.SO_TIMESTAMPNS is new in Python 3.14
QUIET = 0.1  # of a CPU; a server that takes less has nothing left to do for those who came
WINDOW = 1.2  # s in which it must be quiet; agent-bus writes the marks of its readers a second after they came


class Crowd:
    """Readers parked at one server. They are told apart only by the names they wait for."""

    def __init__(self, peer: Peer, names: Sequence[str]) -> None:
        self.peer, self.size = peer, len(names)
        self.pipes: list[Connection] = []
        context = multiprocessing.get_context("spawn")
        cursor = peer.cursor()
        for start in range(0, len(names), EACH):
            here, there = context.Pipe()
            part = list(names[start : start + EACH])
            context.Process(target=hold, args=(there, peer.port, peer.wire, part, cursor), daemon=True).start()
            self.pipes.append(here)

    def ask(self, command: str) -> list[Any]:
        """The answer of each process; what went wrong there is raised here."""
        for pipe in self.pipes:
            pipe.send(command)
        answers = [pipe.recv() for pipe in self.pipes]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def settle(self) -> None:
        """Wait until the server has read every poll, has answered none, and has nothing left to do."""
        deadline = time.monotonic() + PATIENCE
        self.ask("park")
        pids = self.peer.pids()
        while True:
            before, start = machine.cpu_seconds(pids), time.monotonic()
            time.sleep(WINDOW)
            load = (machine.cpu_seconds(pids) - before) / (time.monotonic() - start)
            if load < QUIET and machine.unread_bytes(self.peer.port) == 0:
                break
            if time.monotonic() > deadline:
                raise Refused(f"{self.peer.name} did not come to rest with {self.size} readers: {load:.0%} of a CPU")
        self.check()

    def check(self) -> None:
        """They are all still parked: what was measured is not the end of their holds."""
        if answered := sum(self.ask("count")):
            raise Refused(f"{self.peer.name} answered {answered} of {self.size} readers that should be parked")

    def last_arrival(self) -> int:
        """When the last of the answers came to this machine's kernel, ns since 1970, once everybody has one.

        Nobody reads before all are there, so that the readers take nothing from the server while it answers.
        """
        deadline = time.monotonic() + PATIENCE
        while (answered := sum(self.ask("count"))) < self.size:
            if time.monotonic() > deadline:
                raise Refused(f"{self.peer.name} answered {answered} of {self.size} readers")
            time.sleep(0.2)
        return max(self.ask("read"))

    def leave(self) -> None:
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send("leave")


@contextlib.contextmanager
def parked(peer: Peer, names: Sequence[str]) -> Iterator[Crowd]:
    crowd = Crowd(peer, names)
    try:
        crowd.settle()
        yield crowd
    finally:
        crowd.leave()


# In a process of its own


def hold(pipe: Connection, port: int, wire: Any, names: Sequence[str], cursor: str) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    readers: list[socket.socket] = []
    ready = select.epoll()
    with contextlib.suppress(EOFError):  # the bench has gone
        while (command := pipe.recv()) != "leave":
            try:
                if command == "park":
                    for name in names:
                        readers.append(park(port, wire.wait(name, cursor)))
                        ready.register(readers[-1], select.EPOLLIN)
                    pipe.send(len(readers))
                elif command == "count":
                    pipe.send(len(ready.poll(0, len(readers))))
                else:
                    pipe.send(max(arrival(reader, wire) for reader in readers))
            except Exception as error:
                pipe.send(Refused(f"{type(error).__name__}: {error}"))


def park(port: int, request: bytes) -> socket.socket:
    reader = socket.create_connection(("127.0.0.1", port), PATIENCE)
    reader.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    reader.sendall(request)
    return reader


def arrival(reader: socket.socket, wire: Any) -> int:
    """When the last byte of a whole answer came, ns since 1970, as the kernel noted it."""
    data, when = b"", 0
    while not wire.end(data):
        part, notes, _, _ = reader.recvmsg(1 << 16, socket.CMSG_SPACE(16))
        if not part:
            raise Refused(f"hung up after {data!r}")
        data += part
        for _, kind, value in notes:
            if kind == SO_TIMESTAMPNS:
                whole, rest = struct.unpack("qq", value)
                when = whole * 10**9 + rest
    return when
