"""How far readers have read: each front knows it of those that it serves, and all fronts learn it from the ledger."""

from __future__ import annotations

from bus_server import ACKNOWLEDGED, ALONE, GRACE, HOLD, RECEIPT, Bus, Marks, Now, State

from .clock import Time


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
            "UPDATE mailboxes SET own = max(own, :own), read = max(ifnull(read, :read), ifnull(:read, read)), "
            "fetched = max(fetched, :fetched), seen = max(seen, :seen) WHERE channel = :channel AND name = :name",
            [mark._asdict() for mark in self.marks],
        )
        state.writing.executemany(RECEIPT, [receipt for receipt in self.receipts if receipt.tick])


def marked(bus: Bus, time: Time, marks: Marks, result: None) -> None:
    """How far the readers of another front have read, and that they are there."""
    mailboxes, now = bus.mailboxes, time.wall()
    for mark in marks.marks:
        box = mailboxes.box(mark.channel, mark.name)
        box.firm, box.own = True, box.own or bool(mark.own)
        if mark.read is not None:
            box.read = max(box.read or 0, mark.read)
        box.fetched, box.seen = max(box.fetched, mark.fetched), max(box.seen, mark.seen)
        box.reached = max(box.reached, box.fetched, box.read or 0)
        if box.mark() >= box.newest:
            box.base, box.below = box.mark(), box.n
        left = HOLD + GRACE - max(now - mark.seen, 0) / 1000000
        if left > 0:
            box.listening = box.listening if mailboxes.online(box) else mark.seen
            box.until = max(box.until, mailboxes.clock() + left)
    for receipt in marks.receipts:
        above = receipt.tick - 1 if receipt.kind == ALONE else 0
        for tell in mailboxes.on_fetched if receipt.kind != ACKNOWLEDGED else ():
            tell(receipt.channel, receipt.name, above, receipt.tick)
