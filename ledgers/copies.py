"""Each front keeps a copy of its own file, so that a new front has one to begin with, and old entries leave the ledger.

An entry that is in the copies of two fronts is on two machines, and no new front needs it from the ledger. It is
removed there once it is older than KEPT. With one front alone nothing goes: if its machine is lost, the ledger has all.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from typing import TYPE_CHECKING, Any

from bus_server import Unusable, copy_database, keep_names, read_only, say

from . import Unknown

if TYPE_CHECKING:
    from .front import Front

EVERY = 3600.0  # s between two copies of a front
AGAIN = 30.0  # s after a copy that could not be made: the next look, a minute after this one, tries again
KEPT = 3600.0  # s that an entry stays in the ledger, whoever has it
TRIM = 60.0  # s that the ledger has to remove entries; what it has not removed by then is left to the next time


class Copies:
    """The copy of this front, DATABASE.copy, and what leaves the ledger because of copies. Owned by the loop.

    Copying and trimming are done in a thread, at most one at a time.
    """

    def __init__(self, front: Front) -> None:
        self.bus, self.mirror, self.fronts = front.bus, front.mirror, front.fronts
        self.path = f"{self.mirror.path}.copy"
        self.next = -math.inf  # on the monotonic clock, s; an older file of this name may be of another ledger
        self.busy = False
        self.told = ""  # why the last one could not be made
        self.bus.on_tidy.append(self.look)

    def look(self) -> None:
        if not self.busy and self.mirror.path != ":memory:":
            self.busy = True
            upto = kept_twice([each.copy for each in self.fronts.live])
            self.bus.loop.in_thread(lambda: self.work(upto), self.done)

    def work(self, upto: int) -> int:
        """In a thread: trim the ledger, and take a copy if it is time. Returns the position of the newest copy."""
        if upto:
            before = self.mirror.time.guess() - int(KEPT * 1000000)
            with contextlib.suppress(Unknown):  # the next look is the next attempt
                self.mirror.ledger.trim(upto - 1, before, time.monotonic() + TRIM)
        return self.copy() if time.monotonic() >= self.next else self.fronts.copy

    def copy(self) -> int:
        wait = AGAIN
        try:
            folder = os.path.dirname(os.path.abspath(self.path))
            if shutil.disk_usage(folder).free < 2 * os.path.getsize(self.mirror.path):
                raise Unusable("the disk has no room for a copy")
            copy_database(self.mirror.path, f"{self.path}.new", is_ours=True)
            os.replace(f"{self.path}.new", self.path)
            keep_names(self.path)  # by what it says, the ledger forgets entries
            position = position_of(self.path)
            wait, self.told = EVERY, ""
        finally:
            self.next = time.monotonic() + wait
        return position

    def done(self, outcome: Any) -> None:
        """The end of work(): its result, or the exception that it raised."""
        self.busy = False
        if isinstance(outcome, int):
            self.fronts.copy = outcome
        elif self.told != str(outcome):
            self.told = str(outcome)
            say(f"bus_server: {self.path}: {outcome}; until there is a newer copy, the ledger keeps its entries")


def kept_twice(copies: list[int]) -> int:
    """The highest position that is in the copies of two fronts; 0 if there is none.

    Its own entry stays in the ledger, because it proves to a copy which ledger this is.
    """
    return sorted([0, 0, *copies])[-2]


def position_of(path: str) -> int:
    """Up to which entry a copy has come."""
    with contextlib.closing(read_only(path)) as database:
        return int(database.execute("SELECT position FROM front").fetchone()[0])
