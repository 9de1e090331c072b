"""Databases with many messages, written by the bus's own State, so that checksums, numbers and marks are right."""
from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Optional

from bench import machine, wires

sys.path.insert(0, str(machine.ROOT))
import bus_server  # noqa: E402  (it lies beside this folder, installed or not)

AT_ONCE = 20000  # messages in a transaction
STEP = 100000  # us between two messages: ten million of them are the last eleven days, and none is too old to keep


WEEK = 7 * 86400  # s; an older database is made anew, before retention reaches it
MakeKey = Callable[[int], Optional[str]]  # the idempotency key of the message that has a tick


class Stored(NamedTuple):
    path: pathlib.Path
    messages: int
    names: Sequence[str]  # they have messages in turn
    first: int  # tick

    def tick(self, number: int) -> int:
        """Of the message with this number, from 0; those of one transaction follow each other directly."""
        return self.first + number // AT_ONCE * AT_ONCE * STEP + number % AT_ONCE

    def since(self, number: int) -> str:
        """The cursor just before it."""
        return bus_server.seconds(self.tick(number) - 1)

    def name(self, number: int) -> str:
        return self.names[number % len(self.names)]


def no_key(tick: int) -> None:
    return None


def timed_key(tick: int) -> str:
    """As bus_send.py would have made it at that time."""
    return f"{tick:014x}{os.urandom(9).hex()}"


def random_key(tick: int) -> str:
    return os.urandom(16).hex()


def database(
    kept: pathlib.Path, folder: pathlib.Path, messages: int, names: Sequence[str], key: MakeKey = no_key
) -> Stored:
    """A database in `folder`, copied from one that is made once and stays in `kept`: ten million take minutes.

    All of it is on the disk when this returns, so that writing it out does not disturb what is measured then. It is
    copied by the page: of a file that came in large pieces, Linux keeps large pieces in memory, and counts all of a
    piece as written when a page of it is.
    """
    kind = repr((bus_server.MIGRATIONS, messages, list(names), key.__name__))
    original = kept / f"agent-bus-bench-{messages}-{hashlib.sha256(kind.encode()).hexdigest()[:12]}.db"
    if not original.exists() or original.stat().st_mtime < time.time() - WEEK:
        make(original, messages, names, key)
    copy = folder / "stored.db"
    folder.mkdir(parents=True, exist_ok=True)
    with original.open("rb") as source, copy.open("wb", buffering=0) as target:
        shutil.copyfileobj(source, target, machine.PAGE)
    os.sync()
    state = bus_server.State(str(copy))
    first = int(state.view.database.execute("SELECT min(tick) FROM messages").fetchone()[0])
    state.close()
    return Stored(copy, messages, names, first)


def make(path: pathlib.Path, messages: int, names: Sequence[str], key: MakeKey) -> None:
    """Everybody has read everything: a mailbox that is full refuses more."""
    unfinished = path.with_suffix(".unfinished")
    for leftover in path.parent.glob(f"{unfinished.name}*"):
        leftover.unlink()
    now = bus_server.wall_clock() - messages * STEP
    state = bus_server.State(str(unfinished))
    state.writing.executescript("PRAGMA synchronous=OFF; PRAGMA cache_size=-500000")
    drafts = [bus_server.draft(json.loads(wires.message(name)), None) for name in names]
    for start in range(0, messages, AT_ONCE):
        numbers = range(start, min(start + AT_ONCE, messages))
        put = [drafts[number % len(drafts)]._replace(key=key(now + number - start)) for number in numbers]
        state.apply([bus_server.Put(put)], bus_server.Now(now, now))
        now += AT_ONCE * STEP
    marks = [bus_server.Mark("default", name, True, state.last, state.last, now) for name in names]
    state.apply([bus_server.Marks(marks, [], {})], bus_server.Now(now, now))
    state.close()
    unfinished.replace(path)
    pathlib.Path(f"{unfinished}.lock").unlink()
