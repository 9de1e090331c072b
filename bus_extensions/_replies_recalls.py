"""Taking a message back. Part of replies.py, which is loaded with this file."""

from __future__ import annotations

from functools import partial

from bus_server import (
    ALONE,
    RECALLED,
    Answer,
    Bus,
    Connection,
    Mailboxes,
    Message,
    Now,
    Operation,
    Refused,
    Request,
    State,
    checksum,
    no_message,
    ok,
    one_of,
    receipt_of,
)


class Recall(Operation):
    """Take a message back for its sender: from now on it counts as expired. The result: was it not taken back before?

    The row of the message stays, so that a retry of its send is not stored again.
    """

    __slots__ = ("tick",)
    kind = "recall"

    def __init__(self, tick: int) -> None:
        self.tick = tick

    def apply(self, state: State, now: Now) -> bool:
        # The table `work` is part of every database, with or without work.py.
        if state.writing.execute("SELECT 1 FROM work WHERE tick = ?", (self.tick,)).fetchone():
            raise Refused(409, "it is too late to recall this message: a worker has it")
        message = state.message(self.tick)
        if not message:
            raise no_message(f"{self.tick:x}")
        gone = message._replace(expires=RECALLED)
        state.writing.execute(
            "UPDATE messages SET expires = ?, sum = ? WHERE tick = ?", (RECALLED, checksum(gone), gone.tick)
        )
        return message.expires != RECALLED


def was_fetched(bus: Bus, message: Message) -> bool:
    """May a reader have it? Then it is too late to recall it."""
    deliveries = [each.delivering for each in bus.door.connections if each.delivering]
    on_its_way = any(reader.covers(upto, message) for reader, upto in deliveries)
    return on_its_way or bool(receipt_of(bus, message, ALONE)) or has_passed(bus.mailboxes, message)


def has_passed(mailboxes: Mailboxes, message: Message) -> bool:
    """May a reader have this message, above a hole or below the marks?"""
    low, high = mailboxes.box(message.channel, message.to).above
    on_their_way = {id(messages): messages for came in mailboxes.behind.values() for messages in came}.values()
    passed = low < message.tick <= high or message.tick <= mailboxes.came(message)
    return passed or any(message in messages for messages in on_their_way)


TOO_LATE = "it is too late to recall this message: it was fetched"


class Recalls:
    """The endpoint that takes a message back. Owned by the loop."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        bus.route("POST", "/recall", self.recall, "take back a message of yours that nobody has fetched")

    def recall(self, request: Request) -> Answer | None:
        """The sender takes a message back, if nobody has fetched it and it is not being sent to a reader.

        The message is withheld from readers until the recall succeeds or fails; if it fails, they can read the message.
        """
        bus = self.bus
        bus.check_open()
        message = one_of(bus, request, request.members().id())
        if request.grant.name not in ("", message.sender):
            raise Refused(403, "only the sender of a message can recall it")
        if message.expires == RECALLED:  # a retry; it succeeds, whatever was fetched since
            return ok(bus, '"ok": true')
        if was_fetched(bus, message):
            raise Refused(409, TOO_LATE)
        step = bus.do(Recall(message.tick), request.peer, partial(self.recalled, message))
        bus.withheld[step] = message
        return None

    def recalled(self, message: Message, connection: Connection, recall: Recall, is_new: bool) -> Answer:
        box = self.bus.mailboxes.box(message.channel, message.to)
        if is_new:
            box.recalled(message)
        return ok(self.bus, '"ok": true')
