"""Questions: ask and wait for the answer, conversations, taking a message back (PROTOCOL.md section 12).

It also adds `wait_fetched` to GET /message/ID: the answer waits until somebody has fetched the message.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from bus_server import (
    ANSWER_BYTES,
    BUSY,
    EVERYONE,
    HOLD,
    HOLD_MAX,
    MAX_MESSAGES,
    RECALLED,
    REPLIES,
    SELECT,
    Answer,
    Bus,
    Connection,
    Gate,
    Grant,
    Key,
    Message,
    Now,
    Operation,
    Parked,
    Put,
    Refused,
    Request,
    State,
    Stored,
    Waits,
    checksum,
    encode,
    entry,
    no_message,
    ok,
    one_of,
    quote,
    read_alone,
    readable,
    state_of,
    tick_of,
    told,
)

TABLES, NOUN = None, ""


def options(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def start(bus: Bus, options: argparse.Namespace) -> None:
    Replies(bus)


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
    def exclusive(self) -> bool:
        return False

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
        readers = self.gate.readers(self.asked)
        may_answer = message.sender != self.sender and (readers is None or message.sender in readers)
        return may_answer and self.grant.reads(message.to)

    def covers(self, reply: int, message: Message) -> bool:
        return message.tick == reply


FETCHES = "fetches of"  # with a channel, then a name: senders wait here until somebody reads that mailbox


class Watch(NamedTuple):
    """A sender that waits until somebody has fetched its message."""

    message: Message
    token: str
    hold: float  # s

    @property
    def exclusive(self) -> bool:
        return False

    @property
    def channel(self) -> str:
        return self.message.channel

    @property
    def who(self) -> str:
        return self.message.sender

    def places(self) -> Sequence[Key]:
        return [(f"{FETCHES} {self.message.channel}", self.message.to)]

    def present(self) -> Sequence[str]:
        return ()

    def wants(self, message: Message) -> bool:
        return False


class Recall(Operation):
    """Take a message back for its sender: from now on it counts as expired.

    The row of the message stays, so that a retry of its send is not stored again.
    """

    __slots__ = ("tick",)
    kind = "recall"

    def __init__(self, tick: int) -> None:
        self.tick = tick

    def apply(self, state: State, now: Now) -> None:
        # The table `work` is part of every database, with or without work.py.
        if state.writing.execute("SELECT 1 FROM work WHERE tick = ?", (self.tick,)).fetchone():
            raise Refused(409, "it is too late to recall this message: a worker has it")
        message = state.message(self.tick)
        if not message:
            raise no_message()
        gone = message._replace(expires=RECALLED)
        state.writing.execute(
            "UPDATE messages SET expires = ?, sum = ? WHERE tick = ?", (RECALLED, checksum(gone), gone.tick)
        )


OPERATIONS = (Recall,)


class Replies:
    """The endpoints of questions and answers. Owned by the loop."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        bus.route("POST", "/ask", self.ask, "send a message and get its reply; wait=50 waits for one")
        bus.route("GET", "/thread/", self.thread, "a conversation: its first message and all replies")
        bus.route("POST", "/recall", self.recall, "take back a message of yours that nobody has fetched")
        bus.route("GET", "/message/", self.message, "one message and its state; wait_fetched=25 waits for a fetch")
        bus.waits[Question] = Waits(self.answered, self.unanswered)
        bus.waits[Watch] = Waits(self.watched, self.unwatched)
        bus.on_delivered.append(self.tell_watchers)

    # Questions

    def ask(self, request: Request) -> None:
        """A send that is answered when its reply arrives. If it is asked again with the same key, it waits again."""
        drafts, several = self.bus.sending.drafts(request)
        if several or len(drafts[0].to) > 1 or EVERYONE in drafts[0].to:
            raise Refused(400, "a question must be one message to one name, not to all")
        request.grant.check([drafts[0].sender])
        hold = request.query().number("wait", HOLD, 0, HOLD_MAX)
        warning = self.bus.sending.check(request, drafts)
        self.bus.do(Put(drafts), request.peer, partial(self.asked, request.grant, hold, warning))

    def asked(
        self, grant: Grant, hold: float, warning: str, connection: Connection, put: Put, stored: list[Stored]
    ) -> Answer | None:
        """The question is stored: answer with its reply if there is one already, else park its sender."""
        bus, one = self.bus, put.drafts[0]
        tick, duplicate = stored[0].ticks[0], stored[0].duplicate
        said = entry(bus, one, stored[0]) + (f', "warning": {quote(warning)}' if warning else "")
        question = Question(tick, one.sender, one.to[0], bus.gate, said, grant, hold, one.channel)
        there = self.replies_to(question) if duplicate else iter(())
        withheld = [each.tick for each in bus.withheld.values()]
        reply = next((each for each in there if question.wants(each) and each.tick not in withheld), None)
        if reply:
            return self.answered(connection, question, [reply])
        if not hold or bus.draining or connection.ended or connection.phase is not BUSY:
            return self.unanswered(connection, question)
        bus.mailboxes.polled(question, connection.address, bus.view.clock())
        bus.park(connection, question)
        return None

    def answered(self, connection: Connection, question: Question, messages: list[Message]) -> Answer:
        """A reply that is its mailbox's oldest unfetched message becomes fetched; else an asker's mailbox fills up."""
        bus, reply = self.bus, messages[0]
        answer = ok(bus, f'{question.receipt}, "reply": {readable(bus, reply, question.grant)}')
        mark = bus.mailboxes.box(question.channel, question.sender).fetched
        following = bus.view.oldest(question.channel, question.sender, mark)
        return answer._replace(delivers=(question, reply.tick)) if reply.tick == following else answer

    def unanswered(self, connection: Connection, question: Question) -> Answer:
        return ok(self.bus, f'{question.receipt}, "reply": null')

    # Conversations

    def replies_to(self, question: Question) -> Iterator[Message]:
        """The announced replies to a question, oldest first, without the expired and the recalled ones.

        Anybody may have sent thousands that do not count. SQLite passes over them; here each would take 20 us.
        """
        view, names = self.bus.view, question.gate.readers(question.asked)
        known = "(? OR sender IN (SELECT value FROM json_each(?)))"
        only = f"sender != ? AND {known} AND ifnull(expires > ?, 1) AND answers = ?"  # `answers` lies behind the text
        values = question.sender, names is None, encode(list(names or ())), view.clock(), question.tick
        return self.messages_of(view.lineage(question.tick)[0], question.tick, only, *values)

    def messages_of(self, root: int, after: int, only: str, *values: Any) -> Iterator[Message]:
        """A message, the replies to it, and the replies to those, oldest first; only ticks above `after`."""
        view = self.bus.view
        first = view.message(root) if root > after else None
        if first:
            yield first
        where = f"WHERE thread = ? AND tick > ? AND tick <= ? AND {only} ORDER BY tick"
        rows = view.database.execute(f"{SELECT} {where}", (root, after, self.bus.last, *values))
        with contextlib.closing(rows):
            yield from filter(None, map(view.checked, rows))

    def thread(self, request: Request) -> Answer:
        """A conversation: its first message, the replies, and the replies to those."""
        self.bus.storms.read(request.owner())
        wanted, query = tick_of(request.parsed.rest), request.query()
        after, limit = tick_of(query.one("after") or "0"), int(query.number("max", 1000, 1, MAX_MESSAGES))
        if after is None:
            raise Refused(400, "after must be the id that the last answer has as `next`")
        root, grant = self.bus.view.lineage(wanted or 0)[0], request.grant
        mine = [] if grant.send_only else [grant.name, EVERYONE, *grant.also]  # SQLite passes over others' mail
        only = "(? OR sender = ? OR name IN (SELECT value FROM json_each(?)))"
        thread = self.messages_of(root, after, only, grant.operator, grant.name, encode(mine))
        seen: list[str] = []
        more, size, last = "", 0, 0
        for each in thread:
            if grant.may_see(each):
                if len(seen) == limit or size > ANSWER_BYTES:
                    more = f', "more": true, "next": "{last:x}"'
                    break
                seen.append(readable(self.bus, each, grant))
                size, last = size + len(seen[-1]), each.tick
        if not seen and not after:
            raise no_message()
        return ok(self.bus, f'"messages": [{", ".join(seen)}]{more}')

    # Taking back

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
        deliveries = [each.delivering for each in bus.door.connections if each.delivering]
        on_its_way = any(reader.covers(upto, message) for reader, upto in deliveries)
        if on_its_way or read_alone(bus, message) or bus.mailboxes.has_passed(message):
            raise Refused(409, "it is too late to recall this message: it was fetched")
        step = bus.do(Recall(message.tick), request.peer, partial(self.recalled, message))
        bus.withheld[step] = message
        return None

    def recalled(self, message: Message, connection: Connection, recall: Recall, result: None) -> Answer:
        box = self.bus.mailboxes.box(message.channel, message.to)
        box.perishable, box.pending, box.by_sender = True, None, None
        return ok(self.bus, '"ok": true')

    # Waiting until a message was fetched

    def message(self, request: Request) -> Answer | None:
        """One message and its state; asking moves no mark. With `wait_fetched` the answer waits until it is fetched."""
        bus = self.bus
        found = one_of(bus, request)
        hold = request.query().number("wait_fetched", 0, 0, HOLD_MAX)
        if not hold or bus.draining or state_of(bus, found)[0] != "queued":
            return told(bus, found, request.grant)
        bus.park(request.peer, Watch(found, request.grant.token, hold))
        return None

    def tell_watchers(self, reader: Parked, tick: int) -> None:
        """A reader fetched these mailboxes up to a tick: at the end of this turn, answer those who wait for that."""
        mailboxes = self.bus.mailboxes
        for own in reader.present():
            for connection in mailboxes.waiting.get((f"{FETCHES} {reader.channel}", own), ()):
                watch = mailboxes.parked[connection]
                if isinstance(watch, Watch) and watch.message.tick <= tick:
                    connection.soon(partial(self.tell, connection, watch))

    def tell(self, connection: Connection, watch: Watch) -> None:
        if self.bus.mailboxes.parked.get(connection) is watch:
            self.bus.mailboxes.unpark(connection)
            connection.answer(self.unwatched(connection, watch))

    def watched(self, connection: Connection, watch: Watch, messages: list[Message]) -> Answer:
        return self.unwatched(connection, watch)

    def unwatched(self, connection: Connection, watch: Watch) -> Answer:
        return told(self.bus, self.bus.view.message(watch.message.tick) or watch.message)  # it may have been recalled
