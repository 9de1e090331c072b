"""A ledger: the log of operations that several fronts of one bus share, kept by a database that people already run.

An engine only orders entries and keeps them; it does not know what is in one. There is one file for each engine.
A front is a bus_server.py with `--ledger URL`:

    start.py       from the options of the server to a front that has caught up
    front.py       the queue of operations of a front: append, follow, apply, announce
    mirror.py      its copy of the ledger: what is in an entry, and how it is applied
    operations.py  an operation as bytes, and operations that only fronts have, as those of marks.py, heartbeat.py,
                   tokens.py, recall.py
    clock.py       the time of the ledger
    copies.py      DATABASE.copy of each front, and what leaves the ledger
    move.py        the command move
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

READ_BYTES = 4 << 20  # of entries in one read; the last one may go beyond


class Unknown(Exception):
    """The engine did not answer in time, or the connection broke: an entry may be stored, or may be stored later."""


class Ledger(Protocol):
    """What a front needs of an engine. tests/ledgers/ has the tests that each engine passes.

    Positions are 1, 2, 3 and so on, without a hole; the oldest may have been removed. Times are us since 1970, on the
    clock of the engine; they may step back. One thread at a time calls append() and read(). `deadline` is on the
    monotonic clock, in s: a call that has no answer by then raises Unknown, also if the engine is frozen.
    """

    def append(self, entry: bytes, id: str, deadline: float) -> tuple[int, int]:
        """Store an entry behind all others; returns its position and its time when it is as durable as it will be.

        If there is an entry with this id already, nothing is stored, and the answer is that of the first time.
        """

    def read(self, above: int, limit: int, deadline: float) -> list[tuple[int, int, bytes]]:
        """The entries that follow a position: position, time, entry. It ends after `limit` of them, or READ_BYTES."""

    def listen(self, tell: Callable[[int], None]) -> None:
        """From now on call `tell(position)`, in any thread, when an entry has come.

        It is a hint: it may be late, missing, out of order, or come twice.
        """

    def trim(self, upto: int, before: int, deadline: float) -> None:
        """Remove the oldest entries: up to a position, and up to the first one that is from `before` (us) or later.

        The newest entry always stays. Unknown if not all are removed. Another thread may append and read meanwhile.
        """

    def about(self) -> tuple[str, str]:
        """For people: who took the last entry, and who else had to have it then ("" if nobody). It does not wait."""

    def close(self) -> None:
        """Give up the connections, and call `tell` no more."""
