"""Heartbeats: what each front says of itself in the ledger, and what the others know of it from that.

Each front writes, each few seconds: the formats and the operations that it understands, how far it has come, and the
position of its newest copy. All fronts keep the newest heartbeat of each in a table of their file. So they know the
same fronts at the same entry, and an operation may depend on it.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import socket
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from bus_server import (
    Answer,
    Bus,
    Metric,
    Now,
    Operation,
    Request,
    Route,
    State,
    encode,
    opened_beside,
    written_anew,
)

if TYPE_CHECKING:
    from .mirror import Mirror

EVERY = 5.0  # s between two heartbeats of a front
LIVE = 15000000  # us of the ledger's time: a front that was silent for longer does not count
FORGOTTEN = 3600000000  # us; then its row goes
TABLE = """CREATE TABLE IF NOT EXISTS fronts(
    front TEXT PRIMARY KEY,
    at INTEGER NOT NULL,                 -- time of its newest heartbeat on the ledger's clock, us
    steady INTEGER NOT NULL,             -- the same on the clock of leases
    says TEXT NOT NULL,                  -- JSON: what that heartbeat said
    upto INTEGER)                        -- the highest tick when it was first found silent; NULL if it was not"""
UPTO = "ALTER TABLE fronts ADD COLUMN upto INTEGER"  # for a file of before


class Beat(Operation):
    """A front says what it is. `says` is JSON: see says(); {} if it ends. Newer fronts may say more."""

    __slots__ = ("front", "says")
    kind = "beat"

    def __init__(self, front: str, says: dict[str, Any]) -> None:
        self.front, self.says = front, says

    def apply(self, state: State, now: Now) -> None:
        mirror = cast("Mirror", state)
        state.writing.execute("DELETE FROM fronts WHERE front = ? OR steady < ?", (self.front, now.steady - FORGOTTEN))
        silent = "UPDATE fronts SET upto = ? WHERE upto IS NULL AND steady < ?"
        state.writing.execute(silent, (state.last, now.steady - LIVE))
        if self.says:
            row = self.front, now.wall, now.steady, encode(self.says)
            state.writing.execute("INSERT INTO fronts VALUES (?, ?, ?, ?, NULL)", row)
        if self.front == mirror.front:
            mirror.said = now.steady if self.says else -math.inf


class Heard(NamedTuple):
    """The newest heartbeat of a front."""

    front: str
    at: int  # us on the ledger's clock
    formats: list[int]  # of entries, that it understands
    kinds: list[str]  # the operations that it understands, those of its extensions too
    position: int  # of the last entry that it had applied
    copy: int  # the position of its newest copy; 0: none


def says(mirror: Mirror, copy: int) -> dict[str, Any]:
    """What a front says of itself: the members of Heard."""
    return {"formats": mirror.FORMATS, "kinds": sorted(mirror.kinds), "position": mirror.position, "copy": copy}


def live(database: Any, steady: int) -> list[Heard]:
    """The fronts that live at a time of the ledger (us, on the clock of leases), in the order of their names."""
    asked = "SELECT front, at, says FROM fronts WHERE steady >= ? ORDER BY front"
    found = []
    for front, at, said in database.execute(asked, (steady - LIVE,)).fetchall():
        its = json.loads(said)
        found.append(Heard(front, at, its["formats"], its["kinds"], its["position"], its["copy"]))
    return found


def name_of(path: str) -> str:
    """A new name for the front of this file: HOST:PATH#FILE.RUN.

    FILE is a random id beside the database. Two machines may have one hostname, and files of one name; and a copy of
    the database is the file of another front.
    """
    beside = f"{path}.front"
    if not os.path.exists(beside):
        with written_anew(beside) as file:
            file.write(secrets.token_hex(4))
    with opened_beside(beside) as own:
        return f"{socket.gethostname()}:{path}#{own.read().decode()}.{secrets.token_hex(4)}"


def earlier_runs(database: Any, front: str) -> list[str]:
    """What this front was called when it ran before, if it could not say that it ended."""
    rows = database.execute("SELECT front FROM fronts ORDER BY front").fetchall()
    return [each for (each,) in rows if host_and_file(each) == host_and_file(front)]


def host_and_file(front: str) -> tuple[str, str]:
    """Of the name of a front. Its path may be written in several ways."""
    return front.partition(":")[0], front.rpartition("#")[2].partition(".")[0]


class Fronts:
    """The heartbeats of this front, and what it knows of the fronts that live. Owned by the loop."""

    def __init__(self, bus: Bus, mirror: Mirror) -> None:
        self.bus, self.mirror = bus, mirror
        self.copy = 0  # what the next heartbeat says of it
        self.look()
        bus.loop.every(EVERY, self.beat)
        bus.metrics.append(self.figures)
        route = bus.routes["GET", "/healthz"]
        bus.route("GET", "/healthz", partial(self.healthz, route), route.says)

    def beat(self) -> None:
        if not self.bus.draining:
            self.bus.do(Beat(self.mirror.front, says(self.mirror, self.copy)), None, lambda *_: self.look())

    def heard(self, beat: Beat, result: None) -> None:
        self.look()

    def look(self) -> None:
        """A heartbeat was applied: who lives now, and what do all of them understand?"""
        self.live = live(self.bus.view.database, self.mirror.time.entry.steady)
        self.known = set(self.mirror.kinds).intersection(*(each.kinds for each in self.live))
        self.mirror.choose_format(self.live)

    def lacking(self, kind: str) -> str:
        """A front that lives and does not understand this operation, so that it would stop; "" if there is none."""
        if kind in self.known:
            return ""
        return next((each.front for each in self.live if kind not in each.kinds), self.mirror.front)

    def figures(self) -> Iterable[Metric]:
        said = [(f"{{front={encode(each.front)}}}", float(each.position)) for each in self.live]
        return [
            ("ledger_position", "gauge", "the entry up to which this front has come", [("", self.mirror.position)]),
            ("fronts", "gauge", "fronts that live", [("", len(self.live))]),
            ("front_position", "gauge", "the entry up to which each front had come at its last heartbeat", said),
        ]

    def healthz(self, route: Route, request: Request) -> Answer | None:
        """The answer of any bus; and who has a token is told how far this front is, and how many live."""
        answer = route.call(request)
        if answer and self.bus.gate.knows(request.parsed):
            ledger = encode(dict(zip(("leads", "waits_for"), self.mirror.ledger.about())))
            more = f', "position": {self.mirror.position}, "fronts": {len(self.live)}, "ledger": {ledger}}}\n'
            return answer._replace(body=answer.body[: -len(b"}\n")] + more.encode())
        return answer
