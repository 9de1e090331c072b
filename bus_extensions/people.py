"""Who is there, whose a token is, and similar names for a name that nobody knows (PROTOCOL.md section 18)."""

from __future__ import annotations

import argparse
import math
import os
import time
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from bus_server import (
    ANSWER_BYTES,
    EVERYONE,
    GRACE,
    HOLD,
    RESERVED,
    VERSION,
    Answer,
    Budget,
    Bus,
    Draft,
    Grant,
    Mailbox,
    Message,
    Page,
    Poll,
    Query,
    Refused,
    Request,
    Shares,
    agent,
    boolean,
    encode,
    is_name,
    name,
    ok,
    parse_json,
    put_newest,
    reserved,
    seconds,
    too_much,
)

TABLES, NOUN, OPERATIONS = None, "", ()


def options(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def start(bus: Bus, options: argparse.Namespace) -> None:
    Similar(bus)
    People(bus, Statuses(bus))
    bus.route("GET", "/whoami", partial(whoami, bus), "whose token this is, and what it allows")


def whoami(bus: Bus, request: Request) -> Answer:
    bus.storms.read(request.owner())
    grant = request.grant
    rights = {
        "name": grant.name or None,
        "operator": grant.operator,
        "send_only": grant.send_only,
        "reads": [grant.name, *grant.also] if grant.name and not grant.send_only else [],
        "expires": int(ends) if (ends := bus.gate.tokens.ends.get(grant.token, math.inf)) < math.inf else None,
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
        if mark >= box.newest:
            return None
        self.bus.looks -= 1
        if not box.perishable:
            return self.bus.view.oldest(channel, own, mark)
        look = partial(self.bus.view.look, channel, own, box.newest, self.left)
        oldest, looked = box.oldest(mark, self.bus.view.clock(), look)
        self.left = max(self.left - looked, 0)
        return oldest


class Status(NamedTuple):
    """What an agent says of itself."""

    said: str  # members of JSON
    until: float  # monotonic clock, s
    owner: str

    def size(self) -> int:
        return len(self.said) + 300  # bytes; about what its entries take beside the text


class Statuses:
    """What agents say of themselves, at POST /status. It does not count as listening. In memory, owned by the loop."""

    STATES = ("busy", "idle", "waiting")
    CHARACTERS = 500  # of text, cwd and branch together
    TTL, TTL_MAX = 3600.0, 86400.0  # s; a session that says nothing for an hour has probably ended
    EACH, ALL = 1 << 20, 16 << 20  # bytes of one owner's statuses, and of all: 2000 and 30,000 usual ones

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.known: dict[tuple[str, str], Status] = {}
        self.boxes: set[Mailbox] = set()  # of the names in `known`: /agents lists them
        self.held = Shares(self.ALL, self.EACH)
        bus.route("POST", "/status", self.say, "say what an agent is doing; it is shown in /agents")
        bus.on_tidy.append(self.forget)

    def say(self, request: Request) -> Answer:
        """Keep what an agent says, in place of what it said before. Without text, state, cwd and branch: forget it."""
        bus, owner = self.bus, request.owner()
        bus.storms.read(owner)
        said = request.grant.sign(parse_json(request.body))
        if not isinstance(said, dict):
            raise Refused(400, "a status must be a JSON object with from and text, state, cwd or branch")
        own, channel = name(said.get("from"), "from"), said.get("channel")
        if own.lower() in RESERVED:
            raise Refused(400, f"from must not be {reserved(own)}")
        key = "default" if channel in (None, "") else name(channel, "channel"), own
        words, before = self.words(said), self.known.get(key)
        ttl = Query.of_members(said).number("ttl", self.TTL, 1, self.TTL_MAX)
        bus.storms.name(owner, bus.mailboxes.new(key[0], [own]))
        at = f'"at": {seconds(bus.view.clock())}'
        status = Status(f"{encode(words)[1:-1]}, {at}", bus.mailboxes.clock() + ttl, owner)
        if words and self.held.is_full(owner, status.size() - (before.size() if before else 0)):
            raise too_much("too many agents have said what they do: let some say it for a shorter ttl", 60)
        self.drop(key)
        if words:
            self.held.add(owner, status.size())
            self.known[key] = status
            self.boxes.add(bus.mailboxes.box(*key))
        return ok(bus, '"ok": true')

    def words(self, said: dict[str, Any]) -> dict[str, str]:
        """The members of a status that are not empty."""
        words = {member: said.get(member) or "" for member in ("text", "state", "cwd", "branch")}
        if not all(isinstance(word, str) for word in words.values()):
            raise Refused(400, "text, state, cwd and branch must be strings")
        if words["state"] not in ("", *self.STATES):
            raise Refused(400, f"state must be one of {', '.join(self.STATES)}")
        if sum(map(len, words.values())) > self.CHARACTERS:
            raise Refused(400, f"a status has at most {self.CHARACTERS} characters: say it shorter")
        return {member: word for member, word in words.items() if word}

    def drop(self, key: tuple[str, str]) -> None:
        before, box = self.known.pop(key, None), self.bus.mailboxes.boxes.get(key)
        if before:
            self.held.add(before.owner, -before.size())
        if box:
            self.boxes.discard(box)

    def member(self, channel: str, own: str) -> str:
        status = self.known.get((channel, own))
        over = not status or status.until <= self.bus.mailboxes.clock()
        return "" if over or not status else f', "status": {{{status.said}}}'

    def forget(self) -> None:
        """Drop those that are over. The bus forgets a name that never polls or sends: it is made anew."""
        now = self.bus.mailboxes.clock()
        for key in [key for key, status in self.known.items() if status.until <= now]:
            self.drop(key)
        self.boxes = {self.bus.mailboxes.box(*key) for key in self.known}


class Similar:
    """Finds the names that a sender may have meant. Used by the loop only.

    It looks at a bounded number of names, however many there are: names that differ from the wanted one by one letter
    and need one look-up each, then names that are near to it in the order of names. On a bus with few names it finds
    every similar name; with many, most that differ by one letter, and some that differ by two.
    """

    SHOWN = 3
    LETTERS = 2  # a name that differs by more is another name
    LOOKED_UP, NEAR, COMPARED = 300, 40, 25  # names; 0.5 ms for the worst of them
    SHARE, BURST = 0.05, 0.02  # s of CPU that looks may take: in each second, at once
    FRESH = 0.1  # s; so long the last look is good for further sends to the same name

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.looks = Budget(time.monotonic, self.SHARE, self.BURST)
        self.last: tuple[str, str, float, str] = "", "", 0.0, ""  # channel, name, until when it is good, the member
        bus.unknown.append(self.member)

    def member(self, one: Draft) -> str:
        """A member of the answer to a sender that may see names; a token that may only send must not learn any."""
        grants = self.bus.gate.tokens.named.get(one.sender, ())
        if any(grant.send_only for grant in grants):
            return ""
        channel, own, good, member = self.last
        if (channel, own) == (one.channel, one.to[0]) and time.monotonic() < good:
            return member
        if self.looks.wait("", 0):
            return ""
        start = time.thread_time()
        found = self.to(one.channel, one.to[0])
        self.looks.take("", time.thread_time() - start)
        member = f', "similar": {encode(found)}' if found else ""
        self.last = one.channel, one.to[0], time.monotonic() + self.FRESH, member
        return member

    def to(self, channel: str, unknown: str) -> list[str]:
        """The known names on a channel that are most like this one, the nearest first."""
        own, letters = unknown.lower(), set(unknown.lower())
        found = {each: 1 for each in islice(spelled(unknown), self.LOOKED_UP) if self.is_known(channel, each)}
        alike = (
            each
            for each in dict.fromkeys(self.near(channel, unknown) if len(found) < self.SHOWN else ())
            if abs(len(each) - len(own)) <= self.LETTERS
            and len(letters.symmetric_difference(each.lower())) <= 2 * self.LETTERS
        )
        for each in islice(alike, self.COMPARED):
            if differ(own, each.lower(), self.LETTERS) and self.is_known(channel, each):
                found.setdefault(each, 1 if differ(own, each.lower(), 1) else 2)
        found.pop(EVERYONE, None)
        return sorted(found, key=lambda each: (each.lower() != own, found[each], each))[: self.SHOWN]

    def is_known(self, channel: str, own: str) -> bool:
        box = self.bus.mailboxes.boxes.get((channel, own))
        return bool(box and box.seen) or own in self.bus.gate.tokens.named

    def near(self, channel: str, unknown: str) -> Iterator[str]:
        """Names that are beside this one in the order of names, in each case; then new names, and those with tokens."""
        ordered, new = self.bus.mailboxes.ordered, self.bus.mailboxes.unordered
        for each in (unknown, unknown.lower(), unknown.capitalize(), unknown.upper()):
            place = bisect_left(ordered, (channel, each))
            for at in sorted(range(max(place - self.NEAR, 0), place + self.NEAR), key=lambda at: abs(at - place)):
                if at < len(ordered) and ordered[at][0] == channel:
                    yield ordered[at][1]
        yield from (own for its, own in islice(reversed(new), self.NEAR) if its == channel)
        yield from islice(self.bus.gate.tokens.named, self.NEAR)


LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789-_."


def spelled(text: str) -> Iterator[str]:
    """The text in other cases, and with one letter more, less or changed, or with two neighbours swapped."""
    yield from (text.lower(), text.upper(), text.capitalize(), text.swapcase())
    for at in range(len(text)):
        yield text[:at] + text[at + 1 :]
        yield text[:at] + text[at + 1 : at + 2] + text[at] + text[at + 2 :]
    for at in range(len(text)):
        for letter in LETTERS:
            yield text[:at] + letter + text[at:]
            yield text[:at] + letter + text[at + 1 :]


def differ(one: str, other: str, letters: int) -> bool:
    """Do the texts differ by at most so many letters that were changed, added or left out?"""
    same = len(os.path.commonprefix([one, other]))
    one, other = one[same:], other[same:]
    if not one or not other or not letters:
        return len(one) + len(other) <= letters
    return abs(len(one) - len(other)) <= letters and (
        differ(one[1:], other[1:], letters - 1)
        or differ(one[1:], other, letters - 1)
        or differ(one, other[1:], letters - 1)
    )
