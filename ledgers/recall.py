"""Taking a message back on a bus with several fronts: first each of them says that no reader has the message.

    Withhold   from now on no front gives the message to a reader
    Vote       of each front that lived then: does a reader that it served have the message?
    Retract    nobody has it: it is taken back
    Release    a reader has it, or a front does not answer: readers get it again

Each is an operation in the ledger, so all fronts agree on their order: what was released is not taken back.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from bus_server import (
    OPERATIONS,
    Answer,
    Bus,
    Message,
    Now,
    Operation,
    Refused,
    State,
    Step,
    Then,
    Undone,
    nothing_follows,
)

if TYPE_CHECKING:
    from .front import Front

VOTES = 2.0  # s in which the other fronts must have answered; a reader of this mailbox asks again and again meanwhile
RETRY = ("Retry-After", "2")
HELD = 10.0  # s; then the front that asked may have ended, and any other releases the message
TABLE = """CREATE TABLE IF NOT EXISTS withheld(
    id TEXT PRIMARY KEY,                 -- of the request to take the message back
    tick INTEGER NOT NULL)               -- of the message"""


class Withhold(Operation):
    """A front asks if a message can be taken back. The result: the other fronts that may have given it to a reader.

    A front that was found silent before the message was sent gives it to nobody until it is heard of again (quiet() in
    front.py). One that fell silent later may have given it to a reader, though it cannot say so. Ticks are compared
    with ticks: they may be ahead of every clock.
    """

    __slots__ = ("front", "id", "tick")
    kind = "withhold"

    def __init__(self, front: str, id: str, tick: int) -> None:
        self.front, self.id, self.tick = front, id, tick

    def apply(self, state: State, now: Now) -> list[str]:
        state.writing.execute("INSERT INTO withheld VALUES (?, ?)", (self.id, self.tick))
        return [*others(state.writing, self.front, self.tick)]


def others(database: Any, me: str, tick: int) -> dict[str, int]:
    """The other fronts that may have given a message to a reader; and when each was heard of last, us."""
    which = "front != ? AND ifnull(upto, ?) >= ? ORDER BY front"
    return dict(database.execute(f"SELECT front, at FROM fronts WHERE {which}", (me, tick, tick)).fetchall())


class Vote(Operation):
    """What a front answers to a Withhold: does a reader that it served have the message?"""

    __slots__ = ("fetched", "front", "id")
    kind = "vote"

    def __init__(self, front: str, id: str, fetched: bool) -> None:
        self.front, self.id, self.fetched = front, id, fetched

    def apply(self, state: State, now: Now) -> None:
        """All that follows is in the memory of the front that asked."""


class Release(Operation):
    """The message is not taken back, or was: it is withheld no longer."""

    __slots__ = ("id",)
    kind = "release"

    def __init__(self, id: str) -> None:
        self.id = id

    def apply(self, state: State, now: Now) -> None:
        state.writing.execute("DELETE FROM withheld WHERE id = ?", (self.id,))


class Retract(Operation):
    """Take a message back that is withheld by all fronts. The result is that of the Recall of a bus with one server."""

    __slots__ = ("id", "tick")
    kind = "retract"

    def __init__(self, id: str, tick: int) -> None:
        self.id, self.tick = id, tick

    def apply(self, state: State, now: Now) -> Any:
        if not state.ask("SELECT 1 FROM withheld WHERE id = ?", self.id):
            raise Refused(503, "taking this message back took too long: try again", RETRY)
        is_new = OPERATIONS["recall"].from_fields({"tick": self.tick}).apply(state, now)
        state.writing.execute("DELETE FROM withheld WHERE id = ?", (self.id,))
        return is_new


KINDS: tuple[type[Operation], ...] = (Withhold, Vote, Release, Retract)  # of a front with replies.py


def no_answer(fronts: Iterable[str]) -> Refused:
    why = f"{' and '.join(sorted(fronts))} did not say whether a reader has this message: try again"
    return Refused(503, why, RETRY)


class Recalls:
    """The requests to take a message back that are under way. Owned by the loop.

    Invariant: while the table has a row, all fronts but the one that asked withhold its message, and only the one that
    asked may take it back.
    """

    def __init__(self, front: Front, was_fetched: Callable[[Bus, Message], bool], too_late: str) -> None:
        self.front, self.bus, self.me = front, front.bus, front.mirror.front
        self.was_fetched, self.too_late = was_fetched, too_late
        self.asked: dict[str, tuple[Step, set[str]]] = {}  # here, by id: who waits, and the fronts without an answer
        self.held: dict[str, Step] = {}  # for another front, by id: the key in Bus.withheld
        self.silent: dict[str, int] = {}  # fronts that did not answer; and when each was heard of last then, us
        front.detours["recall"] = self.ask
        front.elsewhere[Withhold.kind] = self.hold
        front.elsewhere[Vote.kind] = self.voted
        front.elsewhere[Retract.kind] = self.retracted
        front.elsewhere[Release.kind] = self.released
        for id, tick in front.mirror.writing.execute("SELECT id, tick FROM withheld ORDER BY id").fetchall():
            self.hold(Withhold("", id, tick), [])

    def append(self, operation: Operation, then: Then = nothing_follows, undone: Undone | None = None) -> None:
        self.front.append_soon(Step(operation, None, then, undone))

    def release(self, id: str, undone: Undone | None = None) -> None:
        self.append(Release(id), lambda _, release, result: self.released(release, result), undone)

    # Asked here

    def ask(self, step: Step) -> None:
        """Instead of the Recall of a client. This front withholds the message already.

        A front that did not answer is asked again when it was heard of: else who asks again and again would keep the
        message, and all behind it, from its readers.
        """
        id = secrets.token_hex(8)
        recall: Any = step.operation
        silent = self.silent.items() & self.others(recall.tick).items()
        if silent:
            self.bus.loop.soon(partial(self.front.turn_down, step, no_answer(name for name, _ in silent)))
            return
        self.asked[id] = step, set()
        self.append(Withhold(self.me, id, recall.tick), self.withheld, self.not_withheld)

    def others(self, tick: int) -> dict[str, int]:
        return others(self.bus.view.database, self.me, tick)

    def not_withheld(self, withhold: Withhold) -> None:
        step, _ = self.asked.pop(withhold.id)
        why = "the ledger of this bus did not answer, and the message was not taken back: try again"
        self.front.turn_down(step, Refused(503, why, RETRY))

    def withheld(self, connection: Any, withhold: Withhold, others: list[str]) -> None:
        _, waits = self.asked[withhold.id]
        waits.update(others)
        if waits:
            self.bus.loop.later(VOTES, partial(self.overdue, withhold.id))
        else:
            self.retract(withhold.id)

    def voted(self, vote: Vote, result: None) -> None:
        if vote.id in self.asked:
            _, waits = self.asked[vote.id]
            waits.discard(vote.front)
            if vote.fetched:
                self.refuse(vote.id, Refused(409, self.too_late))
            elif not waits:
                self.retract(vote.id)

    def overdue(self, id: str) -> None:
        if id in self.asked:
            step, waits = self.asked[id]
            recall: Any = step.operation
            known = self.others(recall.tick)
            self.silent = {**self.silent, **{name: known[name] for name in waits & known.keys()}}
            self.refuse(id, no_answer(waits))

    def refuse(self, id: str, refused: Refused) -> None:
        step, _ = self.asked.pop(id)
        self.front.turn_down(step, refused)
        self.release(id)

    def retract(self, id: str) -> None:
        """Nobody has the message. From here on the answer is made as on a bus with one server."""
        step, _ = self.asked.pop(id)
        recall: Any = step.operation

        def then(connection: Any, retract: Retract, is_new: bool) -> Answer | None:
            self.bus.withheld.pop(step, None)
            return step.then(connection, recall, is_new)

        def undone(retract: Retract) -> None:
            self.bus.withheld.pop(step, None)
            self.release(id)

        self.front.append_soon(step._replace(operation=Retract(id, recall.tick), then=then, undone=undone))

    # Asked at another front

    def hold(self, withhold: Withhold, others: list[str]) -> None:
        """Another front asks: from now on no reader here gets the message. Say if one may have it already."""
        message, fetched = self.bus.view.message(withhold.tick), False
        if message:
            self.held[withhold.id] = key = Step(withhold, None, nothing_follows, None)
            self.bus.withheld[key] = message
            self.bus.loop.later(HELD, partial(self.let_go, withhold.id))
            fetched = self.was_fetched(self.bus, message)
        self.append(Vote(self.me, withhold.id, fetched))

    def let_go(self, id: str) -> None:
        if id in self.held and not self.bus.draining:
            self.release(id, lambda release: self.bus.loop.later(HELD, partial(self.let_go, id)))

    def released(self, release: Release, result: None) -> None:
        if release.id in self.held:
            del self.bus.withheld[self.held.pop(release.id)]

    def retracted(self, retract: Retract, is_new: bool) -> None:
        """What was counted in its mailbox is counted anew."""
        self.released(Release(retract.id), None)
        message = self.bus.view.message(retract.tick)
        if message:
            box = self.bus.mailboxes.box(message.channel, message.to)
            box.perishable, box.pending, box.expired = True, None, None
