"""A schedule: its row in the database, the operations that change it, and its cron line. For later.py beside this file.

Times are on the wall clock, in us, and so in UTC.
"""

from __future__ import annotations

import calendar
import datetime
import re
import zlib
from bisect import bisect_left
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from bus_server import Now, Operation, Refused, State, encode, seconds

TABLES = [
    """
    CREATE TABLE later(
        number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, sender TEXT NOT NULL,
        token TEXT NOT NULL, address TEXT NOT NULL,  -- of the request that gave it
        cron TEXT, message TEXT NOT NULL,
        sum INTEGER NOT NULL,                -- the checksum of what is before it, without the number
        at INTEGER NOT NULL,                 -- the time it was given for, us; with a cron line: the next such time
        due INTEGER NOT NULL,                -- the time of the next try
        tries INTEGER NOT NULL, reason TEXT,
        failed INTEGER,                      -- since when it is not tried any more
        owner TEXT NOT NULL);                -- whose turn it is to send it: its token, or its address
    CREATE INDEX later_due ON later(owner, due) WHERE failed IS NULL;
    CREATE INDEX later_damaged ON later(due) WHERE failed IS NULL AND due >= '';
    CREATE INDEX later_failed ON later(failed) WHERE failed IS NOT NULL;
    CREATE INDEX later_senders ON later(sender);
    CREATE VIEW later_kept AS SELECT -number AS tick FROM later;
    """
]
COLUMNS = "number, id, sender, token, address, cron, message, sum, at, due, tries, reason, failed"


class Schedule(NamedTuple):
    """A row of the table."""

    number: int
    id: str
    sender: str
    token: str
    address: str
    cron: str | None
    message: str
    sum: int
    at: int
    due: int
    tries: int
    reason: str | None
    failed: int | None

    def is_sound(self) -> bool:
        numbers = self.at, self.due, self.tries, self.failed or 0
        return all(isinstance(each, int) for each in numbers) and self.sum == zlib.crc32(repr(self[1:7]).encode())

    def owner(self) -> str:
        return self.token or self.address

    def render(self) -> str:
        state, due = ("waiting", seconds(self.due)) if self.failed is None else ("failed", "null")
        return (
            f'{{"id": "{self.id}", "state": "{state}", "at": {seconds(self.at)}, "cron": {encode(self.cron)}, '
            f'"due": {due}, "tries": {self.tries}, "reason": {encode(self.reason)}, "message": {self.message}}}'
        )


class Keep(Operation):
    """Store a schedule. `facts` are its id, sender, token, address, cron and message.

    The result: the time for which it is stored, and whether it was stored earlier.
    """

    __slots__ = ("at", "facts")
    kind = "later keep"

    def __init__(self, facts: list[str | None], at: int) -> None:
        self.facts, self.at = facts, at

    def apply(self, state: State, now: Now) -> tuple[int, bool]:
        known = state.ask("SELECT cron, message, at FROM later WHERE id = ?", self.facts[0])
        if known and list(known[:2]) != self.facts[4:]:
            raise Refused(409, "the key was used for another schedule: a new schedule needs a new key")
        if known:
            return state.number(known[2], self.at, f"the time of the schedule {self.facts[0]}"), True
        row = *self.facts, zlib.crc32(repr(tuple(self.facts)).encode()), self.at, self.at
        columns = "id, sender, token, address, cron, message, sum, at, due, owner, tries"
        values = *row, self.facts[2] or self.facts[3]
        state.writing.execute(f"INSERT INTO later({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 0)", values)
        return self.at, False


class Move(Operation):
    """Say when a schedule is tried next, and why it was refused. Without `due` it is not tried any more."""

    __slots__ = ("at", "due", "number", "reason", "tries")
    kind = "later move"

    def __init__(self, number: int, at: int, due: int | None, tries: int, reason: str | None) -> None:
        self.number, self.at, self.due, self.tries, self.reason = number, at, due, tries, reason

    def apply(self, state: State, now: Now) -> None:
        values = self.at, self.due or self.at, self.tries, self.reason, None if self.due else now.wall, self.number
        state.writing.execute(
            "UPDATE later SET at = ?, due = ?, tries = ?, reason = ?, failed = ? WHERE number = ?", values
        )


class Drop(Operation):
    """Remove a schedule. The result: its owner, and the bytes of its message; None if it was not there."""

    __slots__ = ("number",)
    kind = "later drop"

    def __init__(self, number: int) -> None:
        self.number = number

    def apply(self, state: State, now: Now) -> tuple[str, int] | None:
        known = state.ask("SELECT owner, length(message) FROM later WHERE number = ?", self.number)
        state.writing.execute("DELETE FROM later WHERE number = ?", (self.number,))
        return (str(known[0]), int(known[1])) if known else None


# The cron line

FIELDS = (("minute", 0, 59), ("hour", 0, 23), ("day", 1, 31), ("month", 1, 12), ("weekday", 0, 7))  # 0 and 7: Sunday
CHARACTERS = 200  # of a line; lines are kept
PART = re.compile(r"(?:\*|([0-9]{1,2})-([0-9]{1,2}))(?:/([0-9]{1,2}))?|([0-9]{1,2})")
MINUTE = 60 * 1000000  # us
DAY = 1440  # minutes
YEARS = 41  # until a 29 February is a given day of the week
EPOCH = datetime.date(1970, 1, 1).toordinal()


class Cron:
    """The minutes that a line names. ValueError, with a sentence for its author, if it names none.

    As in cron, a day must fit both the day and the weekday if one of the two fields begins with `*`, else one of them.
    """

    def __init__(self, line: str) -> None:
        self.line, fields = line, line.split()
        if len(fields) != len(FIELDS) or len(line) > CHARACTERS:
            raise ValueError("cron must be five fields, minute hour day month weekday, like '30 9 * * 1-5', in UTC")
        minutes, hours, self.days, self.months, weekdays = map(numbers, fields, FIELDS)
        self.times = [hour * 60 + minute for hour in sorted(hours) for minute in sorted(minutes)]  # of a day
        self.weekdays = {each % 7 for each in weekdays}
        self.both = "*" in (fields[2][0], fields[4][0])
        self.after(0)

    def after(self, tick: int) -> int:
        """The first of these minutes after a time (us since 1970, as the result)."""
        today, minute = divmod(tick // MINUTE + 1, DAY)
        for day in self.fitting(today):
            place = bisect_left(self.times, minute if day == today else 0)
            if place < len(self.times):
                return (day * DAY + self.times[place]) * MINUTE
        raise ValueError(f"cron {self.line!r} names a day that no year has")

    def fitting(self, first: int) -> Iterator[int]:
        """The days from one on that fit; as days since 1970."""
        began = datetime.date.fromordinal(EPOCH + first)
        for months in range(began.year * 12 + began.month - 1, (began.year + YEARS) * 12):
            year, month = months // 12, months % 12 + 1
            weekday, length = calendar.monthrange(year, month) if month in self.months else (0, 0)
            start = datetime.date(year, month, 1).toordinal() - EPOCH
            for day in range(length):
                fits = day + 1 in self.days, (weekday + day + 1) % 7 in self.weekdays
                if start + day >= first and (all(fits) if self.both else any(fits)):
                    yield start + day


cron_of = lru_cache(64)(Cron)  # some 12 KB for each minute of the day


def numbers(text: str, field: tuple[str, int, int]) -> set[int]:
    """What a field names: `*`, a number, a range 1-5, each with a step /2, or several of them with commas."""
    what, low, high = field
    found: set[int] = set()
    for part in text.split(","):
        match = PART.fullmatch(part)
        first, last, step, alone = (int(each or -1) for each in match.groups()) if match else (high, low, 0, -1)
        if alone >= 0:
            first = last = alone
        elif first < 0:
            first, last = low, high
        if not low <= first <= last <= high or step == 0:
            right = f"*, a number from {low} to {high}, or like 1-5 or */2"
            raise ValueError(f"cron has {part[:32]!a} as {what}: it must be {right}")
        found.update(range(first, last + 1, max(step, 1)))
    return found
