"""Who is there, whose token it is, and names similar to one that nobody knows (PROTOCOL.md section 18)."""

from __future__ import annotations

import argparse
import math
from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING

from bus_server import (
    ANSWER_BYTES,
    EVERYONE,
    GRACE,
    HOLD,
    VERSION,
    Answer,
    Bus,
    Grant,
    Mailbox,
    Message,
    Page,
    Poll,
    Request,
    agent,
    boolean,
    encode,
    is_name,
    ok,
    parts_of,
    put_newest,
    seconds,
)

if TYPE_CHECKING:
    from _people_similar import Similar
    from _people_statuses import Statuses
else:
    similar, statuses = parts_of(__file__, "_people_similar", "_people_statuses")
    Similar, Statuses = similar.Similar, statuses.Statuses

TABLES, NOUN, OPERATIONS = None, "", ()


def options(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def start(bus: Bus, options: argparse.Namespace) -> None:
    Similar(bus)
    People(bus, Statuses(bus))
    bus.route("GET", "/whoami", partial(whoami, bus), "whose token this is, and what it allows")


def whoami(bus: Bus, request: Request) -> Answer:
    bus.storms.read(request.owner())
    grant, token = request.grant, bus.gate.tokens.valid.get(request.grant.token)
    rights = {
        "name": grant.name or None,
        "operator": grant.operator,
        "send_only": grant.send_only,
        "reads": [grant.name, *grant.also] if grant.name and not grant.send_only else [],
        "expires": int(token.ends) if token and token.ends < math.inf else None,
        "open": not bus.gate.tokens.closed,
        "address": request.peer.address,
        "version": VERSION,
    }
    return ok(bus, encode(rights)[1:-1])


class People:
    """Adds names to /agents that never polled, but sent or have mail; and more members of each name. Owned by the loop.

    When a name sent last is in memory only, in its Mailbox: a start takes it from the newest messages.
    """

    NEWEST = 20000  # messages that a start looks at, some 20 ms
    LOOKED = 5000  # messages that one answer looks at to find the oldest unread of all its names, some 5 ms
    READERS = 16  # of one name that are told apart
    SENDERS = 20000  # names that only send, some 600 bytes each; of more, the quietest is no longer listed

    def __init__(self, bus: Bus, statuses: Statuses) -> None:
        self.bus, self.statuses = bus, statuses
        # Of a name: until when each program listens; on the monotonic clock, s.
        self.readers: dict[tuple[str, str], OrderedDict[str, float]] = {}
        self.senders: OrderedDict[tuple[str, str], Mailbox] = OrderedDict()  # without mail and without a poll
        self.left = self.LOOKED  # messages that the current answer may still look at
        bus.route("GET", "/agents", self.agents, "who listens, who sent, and when each name was last seen")
        bus.about.append(self.members)
        bus.on_announced.append(self.announced)
        bus.on_polled.append(self.polled)
        bus.on_tidy.append(self.forget)
        self.load()

    def load(self) -> None:
        newest = (
            "(SELECT mailbox, sender, tick FROM messages ORDER BY tick DESC LIMIT ?) JOIN mailboxes ON mailbox = id"
        )
        rows = f"SELECT channel, sender, max(tick) FROM {newest} GROUP BY channel, sender ORDER BY 3"
        for channel, sender, tick in self.bus.view.database.execute(rows, (self.NEWEST,)).fetchall():
            if is_name(channel) and is_name(sender):  # else it is damaged
                self.sent((channel, sender), tick)

    def announced(self, visible: list[Message]) -> None:
        for key, tick in {(message.channel, message.sender): message.tick for message in visible}.items():
            self.sent(key, tick)

    def sent(self, key: tuple[str, str], tick: int) -> None:
        """Note it in the mailbox of a sender. If that is made for it alone, the bus forgets the quietest of those."""
        box = self.bus.mailboxes.box(*key)
        box.sent = tick
        if box.firm:
            return
        self.senders[key] = box
        self.senders.move_to_end(key)
        if len(self.senders) > self.SENDERS:
            _, quietest = self.senders.popitem(last=False)
            if not quietest.firm:
                quietest.sent = 0  # so it is dropped as a name that was only looked at

    def polled(self, request: Request, poll: Poll) -> None:
        """A poll says which program it comes from: of two that read one name, each may get only a part of the mail."""
        reader = request.query().name("reader", None)
        if reader:
            key = str(poll.channel), str(poll.me)
            until = self.bus.mailboxes.clock() + (poll.hold or HOLD) + GRACE
            put_newest(self.readers.setdefault(key, OrderedDict()), reader, until, self.READERS)

    def forget(self) -> None:
        now = self.bus.mailboxes.clock()
        self.readers = {key: each for key, each in self.readers.items() if max(each.values()) > now}

    def agents(self, request: Request) -> Answer:
        bus, online = self.bus, request.query().flag("online")
        now = bus.mailboxes.clock()

        def shows(own: str, box: Mailbox) -> bool:
            if online is not None and online != (now < box.until):
                return False  # first, because there may be a hundred thousand names
            has_mail = box.newest > 0 and request.grant.reads(own)
            return own != EVERYONE and (box.seen > 0 or box.sent > 0 or has_mail or box in self.statuses.boxes)

        page = Page(bus, request, shows)
        self.left = self.LOOKED
        rows: list[str] = []
        size = 0
        for channel, own, box in page:
            rows.append(agent(bus, request.grant, channel, own, box))
            size += len(rows[-1])
            if size > ANSWER_BYTES:
                bus.looks = 0  # the page ends here
        return ok(bus, f'"agents": [{", ".join(rows)}]{page.more}')

    def members(self, grant: Grant, channel: str, own: str, box: Mailbox) -> str:
        text = f', "listens": {boolean(box.seen > 0)}, "sent": {seconds(box.sent) if box.sent else "null"}'
        if grant.reads(own):
            now, oldest = self.bus.mailboxes.clock(), self.oldest(channel, own, box)
            readers = sum(until > now for until in self.readers.get((channel, own), {}).values())
            text += f', "oldest": {seconds(oldest) if oldest else "null"}, "readers": {readers}'
        return text + ("" if grant.send_only else self.statuses.member(channel, own))

    def oldest(self, channel: str, own: str, box: Mailbox) -> int | None:
        """The tick of the oldest unread message.

        When an answer has looked at LOOKED messages, the oldest that it has not looked at counts as unread, expired or
        not. The next answer goes on there.
        """
        mark = box.mark()
        _, back = self.bus.mailboxes.back(channel, own, mark)
        if back or mark >= box.newest:
            return back
        self.bus.looks -= 1
        if not box.perishable:
            return self.bus.view.oldest(channel, own, mark)
        look = partial(self.bus.view.look, channel, own, box.newest, self.left)
        oldest, looked = box.oldest(mark, self.bus.view.clock(), look)
        self.left = max(self.left - looked, 0)
        return oldest
