"""Questions: ask and wait for the answer, conversations, taking a message back (PROTOCOL.md section 12).

It also adds `wait_fetched` to GET /message/ID: the answer waits until somebody has fetched the message.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Generator, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from bus_server import (
    ALIVE,
    ANSWER_BYTES,
    BUSY,
    EVERYONE,
    HOLD,
    HOLD_MAX,
    MAX_MESSAGES,
    REPLIES,
    ROW,
    SEES,
    SELECT,
    Answer,
    Bus,
    Connection,
    Gate,
    Grant,
    Key,
    Message,
    Put,
    Refused,
    Request,
    Stored,
    Waits,
    encode,
    entry,
    no_message,
    ok,
    parts_of,
    quote,
    readable,
    reader_of,
    tick_of,
)

if TYPE_CHECKING:
    import _replies_fetches as fetches
    import _replies_recalls as recalls
    from _replies_recalls import TOO_LATE, Recall, was_fetched
else:
    recalls, fetches = parts_of(__file__, "_replies_recalls", "_replies_fetches")
    TOO_LATE, Recall, was_fetched = recalls.TOO_LATE, recalls.Recall, recalls.was_fetched  # two of them for a front

TABLES, NOUN, OPERATIONS = None, "", (Recall,)


def options(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def start(bus: Bus, options: argparse.Namespace) -> None:
    Replies(bus)
    recalls.Recalls(bus)
    fetches.Fetches(bus)


class Question(NamedTuple):
    """A sender that waits for the reply to its message."""

    tick: int
    sender: str
    asked: str  # the name that the question went to
    gate: Gate
    receipt: str  # members of JSON: the answer to the send itself
    grant: Grant
    hold: float  # s
    channel: str

    @property
    def token(self) -> str:
        return self.grant.token

    @property
    def who(self) -> str:
        return self.sender

    def places(self) -> Sequence[Key]:
        return [(REPLIES, self.tick)]

    def present(self) -> Sequence[str]:
        return (self.sender,)

    def wants(self, message: Message) -> bool:
        """A reply counts only if its sender may read the mailbox of the question, because an id is no secret."""
        may_count = message.sender != self.sender and self.grant.reads(message.to)
        return may_count and self.gate.may_read(message.sender, self.asked)

    def covers(self, reply: int, message: Message) -> bool:
        return message.tick == reply


class Replies:
    """The endpoints of questions and answers. Owned by the loop."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        bus.route("POST", "/ask", self.ask, "send a message and get its reply; wait=50 waits for one")
        bus.route("GET", "/thread/", self.thread, "a conversation: its first message and all replies")
        bus.waits[Question] = Waits(self.answered, self.unanswered)

    # Questions

    def ask(self, request: Request) -> None:
        """A send that is answered when its reply arrives. If it is asked again with the same key, it waits again."""
        drafts, several = self.bus.sending.drafts(request)
        if several or len(drafts[0].to) > 1 or EVERYONE in drafts[0].to:
            raise Refused(400, "a question must be one message to one name, not to all")
        request.grant.check([drafts[0].sender])
        hold = request.query().number("wait", HOLD, 0, HOLD_MAX)
        warning = self.bus.sending.check(request.owner(), drafts)
        put = self.bus.ledger.put(drafts, request.owner())
        self.bus.do(put, request.peer, partial(self.asked, request.grant, hold, warning))

    def asked(
        self, grant: Grant, hold: float, warning: str, connection: Connection, put: Put, stored: list[Stored]
    ) -> Answer | None:
        """The question is stored: answer with its reply if there is one already, else park its sender."""
        bus, one = self.bus, put.drafts[0]
        tick, duplicate = stored[0].ticks[0], stored[0].duplicate
        said = entry(bus, one, stored[0]) + (f', "warning": {quote(warning)}' if warning else "")
        question = Question(tick, one.sender, one.to[0], bus.gate, said, grant, hold, one.channel)
        reply = self.reply_to(question) if duplicate else None
        if reply:
            return self.answered(connection, question, [reply])
        if not hold or bus.draining or connection.ended or connection.phase is not BUSY:
            return self.unanswered(connection, question)
        bus.mailboxes.polled(question, connection.address, bus.view.clock())
        bus.park(connection, question)
        return None

    PASSED = 1000  # expired messages that it passes over to find the oldest unfetched one: 1 ms

    def answered(self, connection: Connection, question: Question, messages: list[Message]) -> Answer:
        """A reply that is its mailbox's oldest unfetched message becomes fetched; else an asker's mailbox fills up."""
        bus, reply = self.bus, messages[0]
        answer = ok(bus, f'{question.receipt}, "reply": {readable(bus, reply, question.grant)}')
        box = bus.mailboxes.box(question.channel, question.sender)
        look = partial(bus.view.look, question.channel, question.sender, box.newest, self.PASSED)
        following, _ = box.oldest(box.fetched, bus.view.clock(), look)
        return answer._replace(delivers=(question, reply.tick)) if reply.tick == following else answer

    def unanswered(self, connection: Connection, question: Question) -> Answer:
        return ok(self.bus, f'{question.receipt}, "reply": null')

    # Conversations

    def reply_to(self, question: Question) -> Message | None:
        """The oldest announced reply to a question that counts, and is neither expired nor recalled.

        Anybody may have sent thousands that do not count: SQLite passes over the first LOOKED in the index `replies`.
        """
        view, names, grant = self.bus.view, question.gate.readers(question.asked), question.grant
        which, whose = "who != ?", question.sender
        if names is not None:
            which, whose = "who IN (SELECT value FROM json_each(?))", encode(list(names - {question.sender}))
        some = "SELECT tick AS its, sender AS who FROM messages WHERE answers = ? AND tick <= ? ORDER BY tick LIMIT ?"
        joined = f"({some}) CROSS JOIN messages ON tick = its JOIN mailboxes ON mailbox = id"
        where = f"{which} AND (? OR name IN (SELECT value FROM json_each(?))) AND {ALIVE} ORDER BY tick"
        mine = encode(grant.mailboxes())
        values = question.tick, self.bus.last, self.LOOKED, whose, grant.operator, mine, view.clock()
        withheld = [each.tick for each in self.bus.withheld.values()]
        with contextlib.closing(self.found(f"SELECT {ROW} FROM {joined} WHERE {where}", *values)) as replies:
            return next((each for each in replies if question.wants(each) and each.tick not in withheld), None)

    def found(self, statement: str, *values: Any) -> Generator[Message, None, None]:
        view = self.bus.view
        with contextlib.closing(view.database.execute(statement, values)) as rows:
            yield from filter(None, map(view.checked, rows))

    LOOKED = 3000  # replies that are looked at for one answer, some 10 ms; most of them may not be for who asks

    def last_of_page(self, root: int, after: int) -> int:
        """The highest tick that a page of a thread looks at."""
        replies = "FROM messages WHERE thread = ? AND tick > ? ORDER BY tick LIMIT 1 OFFSET ?"
        [tick] = self.bus.view.ask(f"SELECT tick {replies}", root, after, self.LOOKED - 1) or [self.bus.last]
        return min(int(tick), self.bus.last)

    def thread(self, request: Request) -> Answer:
        """A conversation: its first message, the replies, and the replies to those."""
        self.bus.storms.read(request.owner())
        wanted, query = tick_of(request.parsed.rest), request.query()
        after, limit = tick_of(query.one("after") or "0"), int(query.number("max", 1000, 1, MAX_MESSAGES))
        if after is None:
            raise Refused(400, "after must be the id that the last answer has as `next`")
        root, grant, reader = self.bus.view.lineage(wanted or 0)[0], request.grant, reader_of(request)
        where = f"WHERE thread = ? AND tick > ? AND tick <= ? AND {SEES} ORDER BY tick"  # it passes over others' mail
        upto = self.last_of_page(root, after)
        values = root, after, upto, *grant.values()
        first = self.bus.view.message(root) if root > after else None
        seen: list[str] = []
        size, last = 0, 0
        next_after = upto if upto < self.bus.last else 0
        with contextlib.closing(self.found(f"{SELECT} {where}", *values)) as replies:
            for each in filter(grant.may_see, chain([first] if first else [], replies)):
                if len(seen) == limit or size > ANSWER_BYTES:
                    next_after = last
                    break
                seen.append(readable(self.bus, each, reader))
                size, last = size + len(each.text), each.tick  # an expired text is not shown, and was read too
        if not seen and not after and not next_after:
            raise no_message(request.parsed.rest)
        more = f', "more": true, "next": "{next_after:x}"' if next_after else ""
        return ok(self.bus, f'"messages": [{", ".join(seen)}]{more}')
