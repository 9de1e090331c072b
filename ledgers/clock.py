"""The clock of the ledger, as a front knows it: ticks, ttl, leases and retention follow it on all fronts alike."""

from __future__ import annotations

import time

from bus_server import Clock, Now, wall_clock


class Time(Clock):
    """The ledger's clock, as far as a front knows it: the time of an entry, and what has passed here since."""

    def __init__(self) -> None:
        self.offset = wall_clock() - time.monotonic_ns() // 1000
        self.entry = Now(0, 0)  # at which the last entry was applied
        super().__init__(self.guess, 0)

    def guess(self) -> int:
        return time.monotonic_ns() // 1000 + self.offset

    def now(self) -> Now:
        return self.at(self.guess(), self.entry)

    def at(self, wall: int, before: Now) -> Now:
        """The time of an entry. If the ledger's clock stepped back, no lease ends earlier, and none later."""
        return Now(wall, before.steady + max(wall - before.wall, 0))

    def heard(self, wall: int, just_now: bool) -> None:
        if just_now or wall > self.guess():
            self.offset = wall - time.monotonic_ns() // 1000
