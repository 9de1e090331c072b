"""All that the bus made of a text, for redact.py."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from bus_server import NAMES_PER_SEND, PLACED_ROW, SELECT, Message, State, tick_of

DEAD = ".dead"  # the dead letters of the queue NAME are in NAME.dead (section 13)
OF_A_LETTER = {"dead_of", "attempts", "reason", "of_job"}  # the members that the job of a dead letter does not have
COPIES = 256  # of a text that one redaction replaces: at most 64 are of one send, the rest are in queues
LOOKED, LOOKED_BYTES = 20000, 64 << 20  # messages of queues that it looks at, and bytes of their texts: some 0.1 s


class Copies:
    """What the bus made of a text: a message for each receiver, dead letters, and jobs that /again made of these.

    A job of /again does not name its letter. So each message in the queue and in its dead letters is compared.
    """

    def __init__(self, state: State, message: Message) -> None:
        self.state, self.message, self.members = state, message, members_of(message.text)
        self.looked = self.size = 0

    def all(self) -> tuple[list[Message], bool]:
        """And: are these all of them?"""
        found, todo, queues = dict[int, Message](), [self.message], set[str]()
        for each in todo:  # which grows
            if each.tick in found:
                continue
            if len(found) == COPIES:
                return [*found.values()], False
            found[each.tick] = each
            todo += self.of_send(each)
            queue = each.to[: -len(DEAD)] if each.to.endswith(DEAD) else each.to
            if queue not in queues and (queue != each.to or self.is_queue(queue)):
                queues.add(queue)
                todo += [*self.inside(queue + DEAD), *self.inside(queue)]
        return [found[tick] for tick in sorted(found)], self.looked < LOOKED and self.size < LOOKED_BYTES

    def of_send(self, message: Message) -> list[Message]:
        """Their ticks follow each other without a gap. What is damaged may be one of them, and ends nothing."""
        ends = message.tick - NAMES_PER_SEND, message.tick + NAMES_PER_SEND
        rows = self.state.writing.execute(f"{SELECT} WHERE tick > ? AND tick < ? ORDER BY tick", ends).fetchall()
        same = message.sender, message.channel, message.text
        near = {row[0]: self.state.checked(row) for row in rows}
        here = [tick for tick, each in near.items() if not each or (each.sender, each.channel, each.text) == same]
        first = last = message.tick
        while first - 1 in here:
            first -= 1
        while last + 1 in here:
            last += 1
        return [each for tick in range(first, last + 1) if (each := near[tick])]

    def is_queue(self, own: str) -> bool:
        place = self.message.channel, own
        row = self.state.ask("SELECT taken FROM mailboxes WHERE channel = ? AND name = ?", *place)
        return bool(row and row[0])

    def inside(self, own: str) -> Iterator[Message]:
        """The messages in a mailbox with this text, from this sender, the newest first."""
        with contextlib.closing(self.state.mail(PLACED_ROW, (self.message.channel, own), 0, backwards=True)) as rows:
            for row in rows:
                if self.looked >= LOOKED or self.size >= LOOKED_BYTES:
                    return
                self.looked += 1
                self.size += len(row[4] or "")
                each = self.state.checked(row) if row[3] == self.message.sender else None
                if each and members_of(each.text) == self.members:
                    yield each


def jobs_of(state: State, found: list[Message]) -> Iterator[int]:
    """The jobs that were removed, and whose dead letters these may be; only such of the same sender and channel.

    Anybody may write a letter that names the message of another.
    """
    for each in found:
        tick = tick_of(json.loads(f"{{{each.text}}}").get("dead_of")) if each.to.endswith(DEAD) else None
        its = "SELECT 1 FROM keys WHERE tick = ? AND sender = ? AND channel = ?"
        if tick and state.ask(its, tick, each.sender, each.channel):
            yield tick


def members_of(text: str) -> dict[str, Any]:
    return {member: value for member, value in json.loads(f"{{{text}}}").items() if member not in OF_A_LETTER}
