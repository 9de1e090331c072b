"""A sender that waits until its message was fetched. Part of replies.py, which is loaded with this file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from bus_server import (
    HOLD_MAX,
    Answer,
    Bus,
    Connection,
    Grant,
    Key,
    Message,
    Request,
    Waits,
    no_message,
    one_of,
    reader_of,
    refusal,
    state_of,
    told,
)

# With a channel, then a name: senders wait here until somebody reads that mailbox. Alone, then a tick: for one message.
FETCHES = "fetches of"


class Watch(NamedTuple):
    """A sender that waits until somebody has fetched its message."""

    message: Message  # without its text, which may be large
    grant: Grant
    hold: float  # s

    @property
    def token(self) -> str:
        return self.grant.token

    @property
    def channel(self) -> str:
        return self.message.channel

    @property
    def who(self) -> str:
        return self.message.sender

    def places(self) -> Sequence[Key]:
        return [(FETCHES, self.message.tick), (f"{FETCHES} {self.message.channel}", self.message.to)]

    def present(self) -> Sequence[str]:
        return ()

    def wants(self, message: Message) -> bool:
        return False


class Fetches:
    """The endpoint that tells the state of a message, and those that wait for its fetch. Owned by the loop."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        bus.route("GET", "/message/", self.message, "one message and its state; wait_fetched=25 waits for a fetch")
        bus.waits[Watch] = Waits(self.watched, self.unwatched)
        bus.mailboxes.on_fetched.append(self.tell_watchers)

    def message(self, request: Request) -> Answer | None:
        """One message and its state; asking moves no mark. With `wait_fetched` the answer waits until it is fetched."""
        bus = self.bus
        found = one_of(bus, request)
        hold = request.query().number("wait_fetched", 0, 0, HOLD_MAX)
        if not hold or request.command == "HEAD" or bus.draining or state_of(bus, found)[0] != "queued":
            return told(bus, found, reader_of(request))
        bus.park(request.peer, Watch(found._replace(text=""), reader_of(request), hold))
        return None

    def tell_watchers(self, channel: str, own: str, above: int, upto: int) -> None:
        """Messages between two ticks were fetched: at the end of this turn, answer those who wait for that.

        A request may fetch a thousand messages one by one, so a single one is looked up by its tick.
        """
        mailboxes = self.bus.mailboxes
        key: Key = (FETCHES, upto) if upto == above + 1 else (f"{FETCHES} {channel}", own)
        for connection in mailboxes.waiting.get(key, ()):
            watch = mailboxes.parked[connection]
            if isinstance(watch, Watch) and above < watch.message.tick <= upto:
                connection.soon(partial(self.tell, connection, watch))

    def tell(self, connection: Connection, watch: Watch) -> None:
        if self.bus.mailboxes.parked.get(connection) is watch:
            self.bus.mailboxes.unpark(connection)
            connection.answer(self.unwatched(connection, watch))

    def watched(self, connection: Connection, watch: Watch, messages: list[Message]) -> Answer:
        return self.unwatched(connection, watch)

    def unwatched(self, connection: Connection, watch: Watch) -> Answer:
        message = self.bus.view.message(watch.message.tick)  # it may have been recalled or removed
        return told(self.bus, message, watch.grant) if message else refusal(no_message(f"{watch.message.tick:x}"))
