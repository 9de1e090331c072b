"""A front's copy of a ledger: a State whose lists of operations are the entries of the ledger, in their order.

Its results follow from the entries and their times alone, so all copies are equal. Each entry has a checksum of the
results of the front that wrote it; a front that has other results stops.
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import time
import zlib
from collections import deque
from itertools import groupby
from types import ModuleType
from typing import Any, NamedTuple

from bus_server import (
    IS_FRONT,
    OPERATIONS,
    Applied,
    Now,
    Operation,
    Put,
    Refused,
    State,
    Unusable,
    called,
    encode,
    migrate,
    say,
)

from . import Ledger, Unknown, recall, tokens
from .clock import Time
from .heartbeat import LIVE, UPTO, Beat, Heard, earlier_runs, live, name_of, says
from .heartbeat import TABLE as FRONTS
from .marks import Maxima
from .operations import Begin, Left, Moved, Next, Position, operation_of, to_line

CALL = 4.0  # s that the engine has for one answer
LEAVE = 1.0  # s for the last words of a front that ends
ENTRIES = 100  # in one read
STORING = {Put}  # operations that look at no row but those of messages with their keys, and remove none
# A Raise is alone: with it goes the highest tick of its transaction into the file, and files must be alike.
SUMS = 10000  # positions whose sum is remembered
TABLE = """CREATE TABLE front(
    position INTEGER NOT NULL,           -- of the last entry that was applied
    time INTEGER NOT NULL,               -- of that entry, us
    steady INTEGER NOT NULL,             -- the sum of the steps of that time that went forward, us
    sum INTEGER NOT NULL)                -- a checksum of the results of all entries"""
# What the file of a front has, and no bus of its own.
TABLES = {"front": TABLE, "front_tokens": tokens.TABLE, "fronts": FRONTS, "withheld": recall.TABLE}
NEEDS_COPY = (
    f"make a copy beside a front that runs ({called('backup')} COPY), and begin with it ({called('restore')} COPY)"
)
RESCUE = f"{called('move')} --back --ledger-lost"
USE = "use the version and the extensions of the other fronts"
REVOKED = Refused(401, "this token was revoked at another front: nothing was stored", ("WWW-Authenticate", "Bearer"))


class Differs(Exception):
    """The ledger has what this front cannot apply, or results that this front does not have."""


class Entry(NamedTuple):
    """What one turn of a front puts into the ledger: [format, front, position, sum, tokens], then the operations.

    A line each. `tokens`: of who asked for each operation, "" if nobody did; the member is missing on an open bus.
    """

    operations: list[Operation]
    tokens: list[str]


class Mirror(State):
    """A front's copy: a State whose lists are the entries of a ledger. Its position is part of each transaction.

    A new format is needed if the lines of an entry change, or if an operation gets another result than before.
    """

    FORMATS = (1,)  # that this version understands; it writes the highest that all live fronts understand

    def __init__(self, path: str, ledger: Ledger) -> None:
        self.ledger, self.time = ledger, Time()
        self.position = self.sum = 0
        self.said = -math.inf  # when this front was last heard of in the ledger, us on the clock of leases
        super().__init__(path, self.time.wall)
        self.front = name_of(path)  # another one at each start
        self.writing.execute("PRAGMA synchronous=NORMAL")  # a power cut takes the newest entries, which the ledger has
        self.position, wall, steady, self.sum = self.ask("SELECT position, time, steady, sum FROM front")
        self.time.entry = Now(wall, steady)
        self.sums = deque([self.sum], SUMS)  # after each of the last entries
        self.now = self.time.entry  # of the entry that is being applied
        self.ended: list[int] = []  # the sums after each entry of the list that is being applied
        self.counted = 0  # messages of this list that are in one of these sums
        of_fronts: list[type[Operation]] = [Maxima, Begin, Beat, Moved, Left, tokens.Grants]
        of_fronts += recall.KINDS if "recall" in OPERATIONS else ()
        self.kinds = {**OPERATIONS, **{each.kind: each for each in of_fronts}}
        self.is_live = False  # it has caught up
        self.asked = 0.0  # on the monotonic clock, s: the begin of its last read, after which it had all
        self.left = ""  # the front whose file has the bus now, which has left this ledger
        self.barred: set[int] = set()  # the id() of each operation in this list whose token was revoked before it

    def close(self) -> None:
        if self.is_live:
            with contextlib.suppress(Unknown):
                self.append(Entry([Beat(self.front, {})], []), time.monotonic() + LEAVE)
        self.ledger.close()
        super().close()

    def check_use(self) -> None:
        if not self.ask(IS_FRONT):
            if self.ask("SELECT last FROM bus") != (0,) or self.ask("SELECT 1 FROM mailboxes"):
                advice = f"give another --db, or move it there ({called('move')})"
                raise Unusable(f"{self.path} is a bus of its own, and its mail is not in the ledger: {advice}")
            migrate(self.writing, ["BEGIN IMMEDIATE", *TABLES.values(), "INSERT INTO front VALUES (0, 0, 0, 0)"])
            self.writing.execute("COMMIT")
        for table in (FRONTS, recall.TABLE):  # a file of before may lack them
            self.writing.execute(table)
        if not self.ask("SELECT 1 FROM pragma_table_info('fronts') WHERE name = 'upto'"):
            self.writing.execute(UPTO)
        if self.ask("SELECT lost FROM bus") != (0,):
            raise Unusable(f"{self.path} is damaged, and only a copy: move it away, and the front makes it anew")

    def add_all_tables(self, extensions: dict[str, ModuleType]) -> None:
        for extension, module in extensions.items():
            if module.TABLES is not None:
                self.add_tables(extension, module.NOUN, module.TABLES)

    def check_ledger(self) -> None:
        """Unusable or Differs, if the last entry that was applied is not in this ledger."""
        if self.position:
            found = self.ledger.read(self.position - 1, 1, time.monotonic() + CALL)
            if found:
                self.check_begin(self.position, found[0][0])
            if not found or found[0][1] != self.time.entry.wall:
                raise Unusable(f"{self.path} is a copy of another ledger: give another --db, or the --ledger it has")
            for each in self.from_bytes(found[0][2], self.position).operations:
                self.left = each.front if type(each) is Left else ""

    def check_begin(self, needed: int, found: int) -> None:
        if found != needed:
            raise Differs(f"the ledger begins with entry {found}, and {self.path} ends before: {NEEDS_COPY}")

    def check_left(self) -> None:
        if self.left:
            raise Differs(f"the bus has left this ledger: it is served from the file of {self.left} now")

    def catch_up(self) -> None:
        """Apply what is in the ledger, and then an entry of this front, which tells what time it is there."""
        self.replay()
        self.check_left()
        self.choose_format(live(self.writing, self.time.entry.steady))
        ended = [Beat(each, {}) for each in earlier_runs(self.writing, self.front)]
        begin = Entry([Begin(self.bus), *ended, Beat(self.front, says(self, 0))], [])
        _, wall = self.append(begin, time.monotonic() + CALL)
        self.time.heard(wall, just_now=True)
        self.replay()
        self.writing.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()  # it may have texts that were redacted
        self.is_live = True

    def replay(self) -> None:
        """Apply what is in the ledger. Entries that only store messages share a transaction: they look at nothing else.

        Of those, only the first is compared with the results of the front that wrote it: a difference stays in the sum.
        Nothing behind a Left is applied: by its last entry, a file must tell that the bus has left.
        """
        while not self.left and (entries := self.read_on()):
            read = ((at, wall, self.from_bytes(entry, at)) for at, wall, entry in entries if not self.left)
            for only_stores, some in groupby(read, lambda each: {*map(type, each[2].operations)} <= STORING):
                if only_stores:
                    self.take_all(list(some))
                else:
                    for each in some:
                        self.take(*each)
        self.view.tail = self.tail

    def read_on(self) -> list[tuple[int, int, bytes]]:
        self.asked = time.monotonic()
        return self.ledger.read(self.position, ENTRIES, self.asked + CALL)

    def append(self, entry: Entry, deadline: float) -> tuple[int, int]:
        return self.ledger.append(self.to_bytes(entry), secrets.token_hex(16), deadline)

    def is_silent(self) -> bool:
        """By what was applied so far: do the others do without this front, because they have not heard of it?"""
        return self.time.entry.steady - self.said > LIVE

    def choose_format(self, fronts: list[Heard]) -> None:
        its = [each for each in self.FORMATS if all(each in front.formats for front in fronts)]
        self.format = max(its or self.FORMATS)

    def to_bytes(self, entry: Entry) -> bytes:
        senders = [entry.tokens] if any(entry.tokens) else []
        head = encode([self.format, self.front, self.position, self.sums[-1], *senders])
        return "\n".join([head, *map(to_line, entry.operations)]).encode()

    def from_bytes(self, entry: bytes, at: float = math.inf) -> Entry:
        """What is in an entry, which has this place in the ledger if it has one.

        Differs, if this front cannot apply it, or has other results than the one that wrote it.
        """
        head, *lines = entry.decode().split("\n")
        version, front, position, its_sum, *senders = json.loads(head)
        if version not in self.FORMATS:
            raise Differs(f"the ledger has an entry of format {version}: upgrade this front")
        self.check_place(at, front, position)
        index = position - self.position - 1
        if -len(self.sums) <= index < 0 and self.sums[index] != its_sum:
            why = f"{front} has other results than {self.front} up to entry {position} of the ledger"
            if self.is_live:
                raise Differs(f"{why}: one of them is wrong; move the wrong file away, and its front makes it anew")
            say(f"bus_server: {why}")
        try:
            return Entry([operation_of(line, self.kinds) for line in lines], *(senders or [[]]))
        except (KeyError, TypeError) as error:
            raise Differs(f"{front} wrote an operation with members that are not known here ({error}): {USE}") from None
        except ValueError as error:
            raise Differs(f"{error}: {USE}") from None

    def check_place(self, at: float, front: str, position: int) -> None:
        """Differs, if the entry at a place was written by a front that had applied one for that place before."""
        if position >= at:
            wrote = f"{front} had applied entry {position}, and what it wrote next is entry {at:.0f}"
            rescue = f"find the database with the highest position, and run {RESCUE} with its --db (docs/cluster.md)"
            raise Differs(f"the ledger has lost entries: {wrote}; stop all fronts, {rescue}")

    def take(self, position: int, wall: int, entry: Entry) -> Applied:
        """Apply an entry: the next one, with the time of the ledger."""
        return self.take_all([(position, wall, entry)])

    def take_all(self, entries: list[tuple[int, int, Entry]]) -> Applied:
        """Apply the next entries in one transaction; if there are several, they have STORING operations only."""
        times, operations, senders = [self.time.entry], list[Operation](), list[str]()
        for number, (position, wall, its) in enumerate(entries, 1):
            self.check_begin(self.position + number, position)
            if any(type(each) is Moved for each in its.operations):
                raise Differs(f"a bus was moved onto this ledger, and its mail is in copies only: {NEEDS_COPY}")
            times.append(self.time.at(wall, times[-1]))
            operations += [*([Next(times[-1])] if number > 1 else []), *its.operations]
            senders += [*([""] if number > 1 else []), *(its.tokens or [""] * len(its.operations))]
        revoked = tokens.revoked(self.writing, senders) if any(senders) else ()
        self.barred = {id(each) for each, token in zip(operations, senders) if token in revoked}
        self.sum, self.now, self.ended, self.counted = self.sums[-1], times[1], [], 0
        applied = self.apply([*operations, Position(position)], times[1])
        self.position, self.time.entry = position, times[-1]
        self.sums.extend(self.ended)
        self.time.heard(wall, just_now=False)
        return applied._replace(results=applied.results[:-1])

    def apply_one(self, operation: Operation, now: Now) -> Any:
        result = REVOKED if id(operation) in self.barred else super().apply_one(operation, self.now)
        if not operation.is_local:
            self.add_to_sum((result.status, result.sentence) if isinstance(result, Refused) else result)
        return result

    def add_entry_to_sum(self) -> None:
        self.add_to_sum((self.last, len(self.visible) - self.counted, sorted(self.removed.items())))
        self.ended.append(self.sum)
        self.counted = len(self.visible)

    def add_to_sum(self, value: Any) -> None:
        self.sum = zlib.crc32(repr(value).encode(), self.sum)
