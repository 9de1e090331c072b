"""A front: a bus that shares a ledger with other fronts, so that each of them may die (docs/cluster.md).

An entry of the ledger is the list of operations of one turn of one front. Each front applies all entries, in their
order, to its own SQLite file: its copy. It answers its clients from the result of its own entry, after all entries
before. So the copies are equal, and a copy that is lost is made anew from the ledger.

    a turn's operations -> Front.apply -> Ledger.append        (durable; its position and time)
                                       -> Front.follow         (what other fronts wrote before: applied and announced)
                                       -> Mirror.take          (its own entry: applied; the Bus announces it)
"""

from __future__ import annotations

import faulthandler
import math
import secrets
import sqlite3
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import bus_server
from bus_server import (
    DRAIN_SECONDS,
    EVERYONE,
    SOUND,
    Applied,
    Bus,
    Connection,
    Forget,
    Operation,
    Put,
    Raise,
    Refused,
    Remove,
    Step,
    Stored,
    say,
    say_exception,
)

from . import READ_BYTES, Unknown
from .heartbeat import Beat, Fronts
from .marks import marked
from .mirror import CALL, ENTRIES, Differs, Entry, Mirror
from .operations import to_line

GIVE_UP = 8.0  # s after the last answer; then who sent is told that it is unknown whether the message was stored
PAUSE = 0.1  # s between two attempts
CUT_OFF = 5.0  # s without the ledger, and then this front refuses what it may know too little about
LOOK = 1.0  # s between two looks at the ledger, because a hint may be missing
MARKS = 5.0  # s for the marks of readers, after the requests that were accepted before SIGTERM
END = 20.0  # s after SIGTERM; if the process still runs then, it ends, and says on stderr where it waited
ENTRY_BYTES = 1 << 20  # of operations in one entry; the last one may go beyond
UNKNOWN = "it is unknown whether this was stored: send it again, with the same key"
AGAIN = ("Retry-After", "2")
LOCKED = "another program has locked the database of this front of the bus"


class Locked(Unknown):
    """The copy is locked by another program. What was not applied is in the ledger: a later look applies it."""


class Front(bus_server.Ledger):
    """The queue of operations of a front. One entry at a time is applied and announced, its own and those of others.

    Invariant: an entry is announced only after it was read from the ledger, or its append was answered. An append
    without an answer fails its senders, who may send again; if it was stored, its entry comes as one of another front.
    """

    KEEPS = "the ledger in PostgreSQL (for an hour also DATABASE.copy of each front)"

    def __init__(self, bus: Bus, mirror: Mirror) -> None:
        super().__init__(bus)
        self.mirror, self.fronts = mirror, Fronts(bus, mirror)
        self.elsewhere = {**bus.ledger.elsewhere, "forget": self.forgotten, "put": self.sent}
        self.elsewhere["marks"] = partial(marked, bus, mirror.time)
        self.elsewhere[Beat.kind] = self.fronts.heard
        self.detours: dict[str, Callable[[Step], object]] = {}  # by the kind: what a step needs before it is appended
        self.upto = 0  # the highest position of a hint
        self.first: Callable[[], object] = lambda: None  # it adds what the other operations of a list depend on
        self.due = self.busy = self.removing = False
        self.is_locked = False  # an entry could not be applied, and was not since: see Locked
        self.ends = math.inf  # on the monotonic clock, s: then nothing is waited for any more
        bus.clock = mirror.time
        self.reaches = 0.0  # on the monotonic clock, s: until then the ledger counts as reachable
        self.is_quiet = False  # the others do without this front, so it serves nobody
        self.reached(mirror.asked)  # the extensions may have taken long to start since
        self.look()
        bus.loop.every(LOOK, self.look)
        mirror.ledger.listen(lambda position: bus.loop.tell(partial(self.hinted, position)))

    def hinted(self, position: int) -> None:
        self.upto = max(self.upto, position)
        self.plan()

    def look(self) -> None:
        if not self.bus.draining:
            self.due = True
            self.plan()

    def plan(self) -> None:
        if (self.next or self.due or self.upto > self.mirror.position) and not self.planned and not self.busy:
            self.loop.soon(self.commit)
            self.planned = True

    def add(self, step: Step) -> None:
        lacking = self.fronts.lacking(step.operation.kind)
        if lacking and not step.operation.is_local:
            why = f"the front {lacking} does not know {step.operation.kind!r}: nothing was stored"
            why += "; give all fronts the same version and the same extensions"
            self.loop.soon(partial(self.turn_down, step, Refused(503, why, AGAIN)))
        else:
            self.detours.get(step.operation.kind, self.append_soon)(step)

    def append_soon(self, step: Step) -> None:
        super().add(step)

    def turn_down(self, step: Step, refused: Refused) -> None:
        """Refuse a step that is in no list."""
        self.bus.withheld.pop(step, None)
        self.count_out([step])
        self.bus.settle([(step, refused)])

    def idle(self) -> bool:
        return (super().idle() and not self.busy) or time.monotonic() > self.ends

    def drain(self) -> None:
        """From now on this front begins nothing of its own, and ends soon, however its ledger behaves."""
        self.ends = time.monotonic() + DRAIN_SECONDS + MARKS
        faulthandler.dump_traceback_later(END, file=2, exit=True)

    def removes(self) -> bool:
        return self.removing or super().removes()

    def next_list(self) -> list[Step]:
        """The operations of one entry: about ENTRY_BYTES, and the rest of the last one. Local ones are a list alone.

        The last one is bounded, too: it is of one request (--max-body). A byte of a text that is escaped twice, in its
        message and in the entry, becomes up to seven.
        """
        steps, size = super().next_list(), 0
        for number, step in enumerate(steps):
            if size >= ENTRY_BYTES or step.operation.is_local != steps[0].operation.is_local:
                return steps[:number]
            size += self.size(step.operation)
        return steps

    def size(self, operation: Operation) -> int:
        """About how many bytes an operation has in an entry. Most are sends, whose size is known."""
        if type(operation) is Put:
            return self.large.get(id(operation), ("", self.LARGE))[1]
        return len(to_line(operation))

    def commit(self) -> None:
        """First what other fronts wrote, then the list of this turn."""
        self.busy = True
        try:
            if self.due or self.upto > self.mirror.position or any(type(each.operation) is Raise for each in self.next):
                self.due = False
                self.catch_up()
            self.first()
            super().commit()
        finally:
            self.busy = False
            self.plan()

    def catch_up(self) -> None:
        self.upto = 0  # a hint counts once: after a failure the next look is the next attempt
        try:
            if not self.bus.broken:
                self.follow(SOUND, min(time.monotonic() + GIVE_UP, self.ends))
        except Unknown:
            return
        except Exception as error:
            self.stop(error)

    def apply(self, operations: list[Operation]) -> Applied:
        last = self.state.last
        if self.bus.broken:
            self.refuse("this front of the bus stops: nothing was stored, use another one, or try again")
        if all(each.is_local for each in operations):
            return Applied(self.aside(partial(self.here, operations)), [], {}, last)
        says_it_lives = any(type(each) is Beat for each in operations)
        if self.is_quiet and not says_it_lives:
            self.refuse("the other fronts have not heard of this one for a while: nothing was stored, try again")
        if all(type(each) is Raise and each.tick <= last for each in operations):
            return Applied([None] * len(operations), [], {}, last)
        if self.is_locked:
            self.refuse(f"{LOCKED}: nothing was stored, try again, or use another front")
        if time.monotonic() > min(self.reaches, self.ends):
            self.refuse("this bus cannot reach its ledger: nothing was stored, try again, or use another front")
        self.note_room(operations)
        senders = [(step.connection.token or "") if step.connection else "" for step in self.out]
        began, entry = time.monotonic(), self.mirror.to_bytes(Entry(operations, senders))
        its = self.mirror.from_bytes(entry)  # as all others apply it
        end = min(self.reaches - CUT_OFF + GIVE_UP, self.ends)  # a look may have waited in vain since the last answer
        try:
            position, wall = self.aside(partial(self.append, entry, end))
            self.mirror.check_place(position, self.mirror.front, self.mirror.position)
            self.follow(position - 1, end)
            if self.mirror.position != position - 1 or (self.is_quiet and not says_it_lives):
                raise Unknown
            applied = self.take(position, wall, its, end)
            give_back(its.operations, operations)
        except Locked:
            self.refuse(f"{LOCKED}, and {UNKNOWN}")
        except Unknown:
            self.refuse(f"the ledger of this bus did not answer, and {UNKNOWN}")
        except Exception as error:
            self.stop(error)
            self.refuse(f"this front of the bus stops, and {UNKNOWN}")
        self.mirror.time.heard(wall, just_now=time.monotonic() - began < LOOK)  # else it may be of an earlier attempt
        self.reached(began)
        return applied

    def here(self, operations: list[Operation]) -> list[Any]:
        """The results of local operations. They are in no entry, and change no row."""
        return [each.apply(self.state, self.mirror.time.entry) for each in operations]

    def reached(self, began: float) -> None:
        """The ledger has answered a call that began then (monotonic clock, s)."""
        self.reaches = began + CUT_OFF
        if not self.mirror.is_silent():
            self.is_quiet, self.bus.gate.until = False, self.reaches
        elif not self.is_quiet:
            self.quiet()

    def quiet(self) -> None:
        """Serve nobody until the others have heard of this front: they may take a message back without asking it."""
        self.is_quiet, self.bus.gate.until = True, 0.0
        self.loop.each(Connection.release, Connection.fail, [*self.bus.mailboxes.parked])
        self.fronts.beat()

    def refuse(self, sentence: str) -> NoReturn:
        raise Refused(503, sentence, AGAIN)

    def stop(self, error: Exception) -> None:
        """This copy cannot follow the ledger any more. What it would answer from now on could be wrong."""
        if not isinstance(error, (Differs, sqlite3.Error, OSError, MemoryError)):
            say_exception(error)
        say(f"bus_server: {self.mirror.path}: {error}; this front stops")
        self.bus.broken, self.mirror.is_live = True, False

    def aside(self, call: Callable[[], Any]) -> Any:
        """The result of a call that may wait."""
        result: list[Any] = []
        self.loop.aside(lambda: result.append(call()))
        return result[0]

    def append(self, entry: bytes, end: float) -> tuple[int, int]:
        """Append an entry; after Unknown try it again with the same id, until `end` (monotonic clock, s)."""
        id = secrets.token_hex(16)
        while True:
            try:
                return self.mirror.ledger.append(entry, id, min(time.monotonic() + CALL, end))
            except Unknown:
                if time.monotonic() + PAUSE > end:
                    raise
                time.sleep(PAUSE)

    def follow(self, upto: int, end: float) -> None:
        """Apply and announce the entries of other fronts, up to a position, or up to the newest. `end`: as of take()"""
        while self.mirror.position < upto:
            began = time.monotonic()
            entries = self.aside(partial(self.mirror.ledger.read, self.mirror.position, ENTRIES, began + CALL))
            for position, wall, entry in entries:
                if position > upto:
                    return
                self.announce(position, wall, self.mirror.from_bytes(entry, position), end)
            if len(entries) < ENTRIES and sum(len(entry) for _, _, entry in entries) < READ_BYTES:
                self.reached(began)
                return

    def take(self, position: int, wall: int, entry: Entry, end: float) -> Applied:
        """Apply an entry. Locked, if another program holds the copy until `end` (monotonic clock, s)."""
        self.removing = any(type(each) is Remove for each in entry.operations)
        try:
            applied: Applied = self.aside(partial(self.insist, partial(self.mirror.take, position, wall, entry), end))
        except Locked:
            self.is_locked = True
            raise
        finally:
            self.state.view.tail, self.removing = self.state.tail, False
        self.is_locked = False
        return applied

    def insist(self, take: Callable[[], Applied], end: float) -> Applied:
        """Busy is not broken: while another program has locked the copy, try it again."""
        while True:
            try:
                return take()
            except sqlite3.OperationalError as error:
                if "locked" not in str(error):
                    raise
                if time.monotonic() + PAUSE > end:
                    raise Locked from None
                time.sleep(PAUSE)

    def announce(self, position: int, wall: int, entry: Entry, end: float) -> None:
        """Apply an entry of another front, wake the readers here, and note in memory what it noted."""
        began = time.monotonic()
        applied = self.take(position, wall, entry, end)
        if self.mirror.is_silent() and not self.is_quiet:
            self.quiet()
        self.loop.attempt(self.bus.announce, [], applied, time.monotonic() - began)
        for operation, result in zip(entry.operations, applied.results):
            if operation.kind in self.elsewhere and not isinstance(result, Refused):
                self.loop.attempt(self.elsewhere[operation.kind], operation, result)
        self.mirror.check_left()

    def sent(self, put: Put, stored: list[Stored]) -> None:
        """Two names that answer each other across fronts are warned and refused as at one, so each front counts all."""
        storms, clock = self.bus.storms, self.mirror.time
        sent = storms.clock() - max(clock.guess() - clock.entry.wall, 0) / 1000000  # this front may have been cut off
        for one, its in zip(put.drafts, stored):
            for to in one.to if not its.duplicate else ():
                if to != EVERYONE:
                    storms.turn(one.channel, one.sender, to, sent, stored=True)

    def forgotten(self, forget: Forget, names: list[list[str]]) -> None:
        self.bus.retention.forgotten(None, forget, names)


def give_back(copies: list[Operation], operations: list[Operation]) -> None:
    """What apply() has noted in copies of these operations; `noted` of their class names it. Who asked pays by it."""
    for copy, operation in zip(copies, operations):
        for slot in getattr(operation, "noted", ()):
            setattr(operation, slot, getattr(copy, slot))
