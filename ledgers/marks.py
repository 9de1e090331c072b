"""How far readers have read: each front knows it of those that it serves, and all fronts learn it from the ledger."""

from __future__ import annotations

from bus_server import RECEIPT, Marks, Now, State


class Maxima(Marks):
    """Marks, as fronts apply them: two fronts know different ones, and a later entry must not set back an earlier."""

    __slots__ = ()

    def apply(self, state: State, now: Now) -> None:
        for mark in self.marks:
            state.mailbox(mark.channel, mark.name)
        state.insert()
        state.writing.executemany(
            "INSERT INTO uses VALUES (?, ?) ON CONFLICT(token) DO UPDATE SET used = max(used, excluded.used)",
            sorted(self.used.items()),
        )
        state.writing.executemany(
            "UPDATE mailboxes SET own = max(own, ?1), read = max(ifnull(read, ?2), ifnull(?2, read)), "
            "fetched = max(fetched, ?3), seen = max(seen, ?4) WHERE channel = ?5 AND name = ?6",
            [(*mark[2:], *mark[:2]) for mark in self.marks],
        )
        state.writing.executemany(RECEIPT, [receipt for receipt in self.receipts if receipt.tick])
