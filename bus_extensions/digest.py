"""What is unread, in numbers and without any text, at GET /digest (PROTOCOL.md section 20)."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections import Counter
from collections.abc import Generator, Sequence
from functools import partial
from typing import Any, NamedTuple

from bus_server import (
    ALIVE,
    EVERYONE,
    LAST,
    NOW,
    Answer,
    Bus,
    Key,
    Message,
    Poll,
    Request,
    Waits,
    cursor,
    encode,
    is_name,
    ok,
    recv_poll,
    seconds,
)

TABLES, NOUN, OPERATIONS = None, "", ()

LOOKED = 2000  # messages that one answer looks at: 20 ms
LOOKED_BYTES = 4 << 20  # of their text: 20 ms
PARSED = 8  # bytes that each byte of a text that may have a priority counts as, because it takes so long
NAMED = 20  # senders, and threads, that are listed
URGENT, OF_EACH = 16, 3  # ids of urgent messages that are listed, and so many of each sender before more of one
PRIORITIES = ("high", "normal", "low")


def options(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def start(bus: Bus, options: argparse.Namespace) -> None:
    bus.route("GET", "/digest", partial(digest, bus), "how much is unread for NAME, and from whom; no text", takes=True)
    told = partial(tell, bus)
    bus.waits[Asked] = Waits(lambda connection, asked, messages: told(asked), lambda connection, asked: told(asked))


class Unread(NamedTuple):
    """One message that is unread. `tick` is its place, `thread` the tick of the first message of its conversation."""

    tick: int
    sender: str
    thread: int
    priority: str

    def named(self) -> str:
        return f'{{"id": "{self.tick:x}", "ts": {seconds(self.tick)}, "from": "{self.sender}"}}'


class Asked(NamedTuple):
    """A request for a digest, which may wait until something is unread. `poll` is the /recv that would get it."""

    poll: Poll
    owner: str  # whose limits it counts for

    @property
    def channel(self) -> str | None:
        return self.poll.channel

    @property
    def hold(self) -> float:
        return self.poll.hold

    @property
    def token(self) -> str:
        return self.poll.token

    @property
    def who(self) -> str:
        return self.poll.who

    def places(self) -> Sequence[Key]:
        return self.poll.places()

    def present(self) -> Sequence[str]:
        return self.poll.present()

    def wants(self, message: Message) -> bool:
        return self.poll.wants(message)


def digest(bus: Bus, request: Request) -> Answer | None:
    """Counts of what /recv would give. It moves no cursor and makes nothing fetched.

    It counts as listening only while it waits: see `wait` of /recv.
    """
    poll = recv_poll(request)
    request.grant.check(poll.names)
    bus.storms.read(request.owner())
    since = cursor(request.query().one("since") or "last")
    poll = poll._replace(since=bus.last if since == NOW else since, token=request.grant.token)
    asked = Asked(poll, request.owner())
    found, more = look(bus, asked)
    if found or more or not poll.hold or bus.draining:
        return counts(bus, found, more)
    wait(bus, request, asked)
    return None


def wait(bus: Bus, request: Request, asked: Asked) -> None:
    """Park the connection."""
    poll, mailboxes = asked.poll, bus.mailboxes
    bus.storms.name(asked.owner, mailboxes.new(str(poll.channel), poll.names))
    for each in bus.on_polled:
        each(request, poll)
    mailboxes.polled(poll, request.peer.address, bus.view.clock())
    mailboxes.owned(poll)
    bus.save_marks_soon()
    bus.park(request.peer, asked)


def tell(bus: Bus, asked: Asked) -> Answer:
    """The answer to a request that has waited."""
    return counts(bus, *look(bus, asked))


def counts(bus: Bus, found: list[Unread], more: bool) -> Answer:
    senders = by_sender(found)
    listed = sorted(senders, key=lambda name: (-senders[name]["urgent"], -senders[name]["unread"], name))[:NAMED]
    urgent = [each for each in found if each.priority == "high"]
    priorities = Counter(each.priority for each in found)
    vouched = {each.sender for each in found} & bus.gate.tokens.named.keys()
    vouched -= {each.sender for each in found if each.tick < bus.gate.tokens.first * 1000000}  # anybody signed these
    numbers = {
        "unread": len(found),
        "urgent": len(urgent),
        "senders": {name: senders[name] for name in listed},
        "vouched": [name for name in listed if name in vouched],
        "priorities": {each: priorities[each] for each in (*PRIORITIES, "other")},
        "threads": conversations(bus, found),
    }
    ends = found[0].named() if found else "null", found[-1].named() if found else "null"
    first = ", ".join(each.named() for each in fairly(urgent))
    members = f'"oldest": {ends[0]}, "newest": {ends[1]}, "first_urgent": [{first}], "more": {encode(more)}'
    return ok(bus, f"{encode(numbers)[1:-1]}, {members}")


def conversations(bus: Bus, found: list[Unread]) -> list[dict[str, Any]]:
    """The largest of them: how many of these messages are in each, and how many of those are answers.

    As with /ask, an answer is from another name, and from one that may read the mailbox of the first message.
    """
    largest = Counter(each.thread for each in found).most_common(NAMED)
    firsts = "tick IN (SELECT value FROM json_each(?))"
    rows = f"SELECT tick, sender, name FROM messages JOIN mailboxes ON mailbox = id WHERE {firsts}"
    asked = dict.fromkeys((tick for tick, _ in largest), ("", ""))  # it may have been removed
    asked.update((tick, its) for tick, *its in bus.view.database.execute(rows, (encode([*asked]),)).fetchall())
    answers: Counter[int] = Counter()
    for each in found:
        asker, mailbox = asked.get(each.thread, (each.sender, ""))
        answers[each.thread] += each.sender != asker and bus.gate.may_read(each.sender, mailbox)
    return [{"id": f"{tick:x}", "unread": number, "answers": answers[tick]} for tick, number in largest]


def fairly(urgent: list[Unread]) -> list[Unread]:
    """The oldest of each sender before more of one."""
    number: Counter[str] = Counter()
    turns: list[tuple[int, Unread]] = []
    for each in urgent:
        turns.append((number[each.sender] // OF_EACH, each))
        number[each.sender] += 1
    return [each for _, each in sorted(turns)[:URGENT]]


def by_sender(found: list[Unread]) -> dict[str, dict[str, int]]:
    senders: dict[str, dict[str, int]] = {}
    for each in found:
        counts = senders.setdefault(each.sender, {"unread": 0, "urgent": 0})
        counts["unread"] += 1
        counts["urgent"] += each.priority == "high"
    return senders


def marks(bus: Bus, poll: Poll) -> dict[str, int]:
    """Of each name that has a mailbox: the tick above which its messages are unread.

    Broadcasts have no cursor of their own: the cursor of the first name stands for them.
    """
    channel, boxes = str(poll.channel), bus.mailboxes.boxes
    known = {own: boxes[channel, own] for own in poll.names if (channel, own) in boxes}
    if poll.since != LAST:
        return dict.fromkeys(known, poll.since)
    found = {own: box.mark() for own, box in known.items()}
    first = known.get(str(poll.me))
    if first is None:
        found.pop(EVERYONE, None)
    elif EVERYONE in found:
        oldest = bus.view.oldest(channel, str(poll.me), 0)
        unseen = max(bus.last if oldest is None else oldest - 1, first.removed)
        found[EVERYONE] = unseen if first.read is None else first.read
    return found


def look(bus: Bus, asked: Asked) -> tuple[list[Unread], bool]:
    """The unread messages, oldest first; and: were there more than it looks at?"""
    began, poll = time.thread_time(), asked.poll
    withheld = {each.tick for each in bus.withheld.values()}  # somebody is taking these back
    found: list[Unread] = []
    size, more = 0, False
    with contextlib.closing(rows(bus, poll, marks(bus, poll))) as unread:
        for looked, (tick, sender, thread, to, is_alive, length, has_priority, given) in enumerate(unread):
            if looked == LOOKED or size > LOOKED_BYTES:
                more = True
                break
            size += length * (PARSED if has_priority else 1)
            own_broadcast = to == EVERYONE and sender == poll.me
            if is_alive and not own_broadcast and tick not in withheld and is_name(sender):  # else it is damaged
                priority = "normal" if given is None else given if given in PRIORITIES else "other"
                found.append(Unread(tick, sender, thread, priority))
    took = (time.thread_time() - began) / bus.storms.WORK_SHARE * bus.storms.WORK  # as bytes of an answer
    bus.storms.worked(asked.owner, "", took)
    return found, more


def rows(bus: Bus, poll: Poll, above: dict[str, int]) -> Generator[tuple[Any, ...], None, None]:
    """Of each message: tick, sender, thread, its mailbox, is it alive, bytes, may it have a priority, and which.

    A quote inside of a text is written with a backslash, so these letters stand nowhere but at a member. The text of a
    damaged message has no priority.
    """
    may_have_one = "instr(text, '\"priority\": ') > 0"
    json = "'{' || text || '}'"
    given = f"CASE WHEN {may_have_one} AND json_valid({json}) THEN json_extract({json}, '$.priority') END"
    alive = ALIVE.replace("?", str(bus.view.clock()))
    columns = f"places.tick, sender, ifnull(thread, places.tick), name, {alive}, length(text), {may_have_one}, {given}"
    return bus.view.merged(columns, {(str(poll.channel), own): mark for own, mark in above.items()}, bus.last)
