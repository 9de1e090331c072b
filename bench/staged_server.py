"""bus_server.py with a clock around each stage of a send; what it saw is written to $STAGES when it ends.

    CLOCK=wall|cpu STAGES=FILE python staged_server.py [arguments of bus_server.py]

A stage is a function; what it calls of other stages is not counted as its own. Each thread has its own stack of them.
The clock costs time too: `calibrate` measures how much a stage sees of that itself, and how much its caller.
"""
from __future__ import annotations

import functools
import json
import os
import pathlib
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import bus_server  # noqa: E402

STAGES = [  # in the order a send travels: function, what it does
    ("Loop.take_turn", "a turn: who is ready"),
    ("Plain.read", "recv"),
    ("Connection.data_received", "into the buffer"),
    ("Connection.advance", "one request in a turn"),
    ("Connection.take", "where the request begins and ends"),
    ("Request.parse_head", "the head: request line, fields, framing"),
    ("Bus.admit", "how long may its body be"),
    ("Gate.admit", "who may come in"),
    ("Request.answer", "dispatch"),
    ("Bus.answer", "the route"),
    ("send", "the endpoint"),
    ("Sending.drafts", "from body to drafts"),
    ("Query.__init__", "the query string"),
    ("parse_json", "JSON"),
    ("draft", "validation, the text that is stored"),
    ("Sending.check", "is there room in its mailbox"),
    ("Storms.check", "rate, chains, turns"),
    ("Bus.do", "the operation"),
    ("Ledger.add", "into the list"),
    ("Ledger.commit", "the list"),
    ("View.has_room", "is there room on the disk"),
    ("Loop.aside", "the turn is free for the deputy"),
    ("State.apply", "the transaction, around what follows"),
    ("State.sent_with_keys", "what was sent before"),
    ("Put.apply", "all of a send, or none"),
    ("State.place", "the tick, the row"),
    ("checksum", "crc32"),
    ("BEGIN", "SQLite"),
    ("State.insert", "SQLite: INSERT"),
    ("Marks.apply", "marks of readers"),
    ("COMMIT", "SQLite: the write and the fsync"),
    ("Bus.announce", "readers first, then senders"),
    ("Mailboxes.add", "what each mailbox has now"),
    ("Bus.conclude", "what follows for each sender"),
    ("entry", "the answer, with the truth about the receiver"),
    ("Connection.answer", "back to the connection"),
    ("Connection.write", "phase, deadline"),
    ("http_bytes", "head and body in one piece"),
    ("Plain.write", "what is unsent"),
    ("Plain.send", "send"),
]
clock = time.thread_time_ns if os.environ.get("CLOCK") == "cpu" else time.perf_counter_ns


class Stage:
    """What one function took itself: ns, how often, and how many stages it called."""

    def __init__(self) -> None:
        self.own = self.calls = self.called = 0


stages: dict[str, Stage] = {}


class Stacks(threading.local):
    """Of each thread: the stages it is in, each as the time in stages that it called, and how many those were."""

    def __init__(self) -> None:
        self.stack = [[0, 0]]


stacks = Stacks()


def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    stage = stages[name] = Stage()

    @functools.wraps(function)
    def around(*arguments: Any, **named: Any) -> Any:
        stack, inner = stacks.stack, [0, 0]
        stack.append(inner)
        start = clock()
        try:
            return function(*arguments, **named)
        finally:
            span = clock() - start
            stack.pop()
            stage.own += span - inner[0]
            stage.calls += 1
            stage.called += inner[1]
            stack[-1][0] += span
            stack[-1][1] += 1

    return around


def calibrate(times: int = 100000) -> tuple[float, float]:
    """ns that the clock adds to a stage itself, and ns that it adds to the stage which calls it."""

    def nothing() -> None:
        pass

    def span(function: Callable[[], None]) -> float:
        start = clock()
        for _ in range(times):
            function()
        return (clock() - start) / times

    wrapped = timed("calibration", nothing)
    bare, whole = span(nothing), span(wrapped)
    seen = stages.pop("calibration").own / times
    return seen - bare, whole - seen


def find(path: str) -> tuple[Any, str]:
    """Where a function of bus_server.py hangs, and its name there; AttributeError if it is not there."""
    owner: Any = bus_server
    *classes, name = path.split(".")
    for each in classes:
        owner = getattr(owner, each)
    getattr(owner, name)
    return owner, name


class Database(sqlite3.Connection):
    """What begins and ends a transaction are stages."""

    statements: dict[str, Callable[..., Any]] = {}

    def execute(self, statement: str, *values: Any) -> Any:
        return self.statements.get(statement.partition(" ")[0], sqlite3.Connection.execute)(self, statement, *values)


def install() -> None:
    for path, _ in STAGES:
        if path in ("BEGIN", "COMMIT"):
            Database.statements[path] = timed(path, sqlite3.Connection.execute)
            continue
        owner, name = find(path)
        function = getattr(owner, name)
        around = timed(path, function)
        setattr(owner, name, around)
    sqlite3.connect = functools.partial(sqlite3.connect, factory=Database)  # type: ignore[assignment]


def forget(*_: Any) -> None:
    """SIGUSR1: the warm-up is over."""
    for stage in stages.values():
        stage.own = stage.calls = stage.called = 0


def main() -> int:
    own, callers = calibrate()
    install()
    signal.signal(signal.SIGUSR1, forget)
    code = bus_server.main(sys.argv[1:])
    found = {name: vars(stage) for name, stage in stages.items()}
    pathlib.Path(os.environ["STAGES"]).write_text(json.dumps({"own": own, "callers": callers, "stages": found}))
    return code


if __name__ == "__main__":
    sys.exit(main())
