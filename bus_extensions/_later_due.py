"""The sending of the messages whose time has come. For later.py beside this file."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Generator
from functools import partial
from typing import Any

from _later_schedule import COLUMNS, MINUTE, Drop, Keep, Move, Schedule, cron_of

from bus_server import (
    ANSWER_BYTES,
    BUSY,
    OPEN,
    SOUND,
    Answer,
    Bus,
    Connection,
    Deadlines,
    Grant,
    Refused,
    Request,
    Shares,
    ok,
    our_fault,
    refusal,
    say_exception,
)

SLICE = 100  # schedules that are sent in one go
ROW = 1024  # bytes that a schedule takes beside its message
EACH, ALL = 16 << 20, 128 << 20  # bytes of one owner's schedules, and of all: some 15,000 small ones of each
MUCH, FEW = ALL * 3 // 4, 1 << 20  # above MUCH in all an owner gets no more than FEW, so that 32 others have room
TRIES = 15  # of one message: the waits between them add up to an hour
WAIT_MAX = 600  # s between two tries
OLD = 10  # schedules that a minute looks at because they failed long ago, or are damaged
DAMAGED = "the disk has changed this schedule: give it again"
PAUSE = 1.0  # s without a try after an operation failed
SEND = b"POST /send HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Sender:
    """What stands for the connection of a client, in a request of the bus itself. `then` takes the answer."""

    request, phase = None, BUSY

    def __init__(self, schedule: Schedule, then: Any) -> None:
        self.token, self.address, self.answer = schedule.token, schedule.address, then

    def fail(self) -> None:
        self.answer(refusal(our_fault()))


class Due:
    """The schedules in the database, and which of them have an operation on its way. Owned by the loop."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.sending: set[int] = set()  # numbers of the schedules whose message is on its way
        self.leaving: set[int] = set()  # of those that are being taken back
        self.pause = 0.0  # monotonic clock, s: nothing is sent before
        self.looked = 0  # wall clock, us, at the last look
        self.right = 0  # up to this number no schedule waits for a time that only a wrong clock has written
        self.held = Shares(ALL, EACH)
        first = "SELECT owner, min(due) FROM later WHERE failed IS NULL AND due < '' GROUP BY 1"
        # Of each owner: none of its schedules is due before. Whose turn is next comes first.
        self.first: dict[str, int] = dict(bus.view.database.execute(first).fetchall())
        whose = "SELECT owner, sum(length(message) + ?) FROM later GROUP BY 1"
        for owner, size in bus.view.database.execute(whose, (ROW,)).fetchall():
            self.held.add(str(owner), size)
        bus.on_tidy.append(self.tidy)
        bus.loop.every(Deadlines.SLOT, self.look)
        bus.ledger.elsewhere[Keep.kind] = self.kept_elsewhere
        bus.ledger.elsewhere[Drop.kind] = self.left

    def has_room(self, owner: str, size: int) -> bool:
        held = self.held
        return not held.is_full(owner, size) and (held.all + size <= MUCH or held.held[owner] + size <= FEW)

    def rows(self, where: str, *values: Any) -> Generator[Schedule, None, None]:
        """Exhaust or close it."""
        statement = f"SELECT {COLUMNS} FROM later WHERE {where}"
        with contextlib.closing(self.bus.view.database.execute(statement, values)) as rows:
            yield from map(Schedule._make, rows)

    def is_sound(self, schedule: Schedule) -> bool:
        if not schedule.is_sound():
            self.bus.view.damaged(f"the schedule {schedule.number}")
        return schedule.is_sound()

    # Whose turn it is

    def given(self, owner: str, at: int) -> None:
        self.first[owner] = min(self.first.get(owner, at), at)

    def kept_elsewhere(self, keep: Keep, result: tuple[int, bool]) -> None:
        """Another front was given a schedule. Each front sends what is due, and its key makes that one message."""
        _, _, token, address, _, message = keep.facts
        owner, (at, duplicate) = str(token or address), result
        self.given(owner, at)
        if not duplicate:
            self.held.add(owner, ROW + len(str(message)))

    def ready(self, now: int) -> Generator[tuple[int, int], None, None]:
        """The numbers of what is due, and bytes: of each owner as many, so that those of one hold up no other's.

        Close it.
        """
        ask, execute = self.bus.view.ask, self.bus.view.database.execute
        own = "FROM later WHERE failed IS NULL AND owner = ? AND due"
        due = [owner for owner, first in self.first.items() if first <= now][:SLICE]
        for owner in due:
            del self.first[owner]  # its next turn comes after all others
            [first] = ask(f"SELECT min(due) {own} < ''", owner)  # in SQLite each number is below each text
            if first is not None:
                self.first[owner] = first
            rows = f"SELECT number, length(message) {own} <= ? ORDER BY due, number LIMIT ?"
            with contextlib.closing(execute(rows, (owner, now, SLICE // len(due)))) as found:
                yield from found

    # Sending

    def look(self) -> None:
        """Ten times a second: send what is due, a slice of it. The next slice waits until this one is settled.

        A front that may know too little to serve others sends nothing: meanwhile it may have been taken back.
        """
        bus, now = self.bus, self.bus.view.clock()
        if self.sending or bus.draining or not self.pause <= time.monotonic() <= bus.gate.until:
            return
        numbers = self.unchecked(now)
        if numbers:
            self.sending = set(numbers)
            bus.loop.gradually(self.put_right, self.not_sent, iter(numbers))
            return
        size = 0
        with contextlib.closing(self.ready(now)) as ready:
            for number, length in ready:
                numbers += [] if number in self.leaving else [number]
                size += length
                if size > ANSWER_BYTES:
                    break
        self.sending = set(numbers)
        bus.loop.gradually(self.send, self.not_sent, iter(numbers))

    def unchecked(self, now: int) -> list[int]:
        """Some of those whose time may be wrong: after the start and after a step back, as the clock was ahead then."""
        self.right = 0 if now < self.looked - MINUTE else self.right
        self.looked = now
        which = "number > ? AND failed IS NULL AND due > ? AND (cron IS NOT NULL OR tries > 0) ORDER BY number LIMIT ?"
        rows = self.bus.view.database.execute(f"SELECT number FROM later WHERE {which}", (self.right, now, 10 * SLICE))
        numbers = [number for (number,) in rows.fetchall()]
        self.right = numbers[-1] if numbers else SOUND
        return numbers

    def put_right(self, number: int) -> None:
        """A repeat goes on at its next time from now on: its keys let none be sent twice. A retry waits its longest."""
        now = self.bus.view.clock()
        for each in filter(Schedule.is_sound, [*self.rows("number = ?", number)]):
            at = min(each.at, cron_of(each.cron).after(now)) if each.cron else each.at
            due = min(each.due, now + WAIT_MAX * 1000000 if each.tries and at == each.at else at)
            self.given(each.owner(), due)
            if due < each.due:
                tries = each.tries if at == each.at else 0
                self.bus.do(Move(number, at, due, tries, each.reason), None, self.done, self.not_done)
                return
        self.sending.discard(number)

    def send(self, number: int) -> None:
        found = [] if self.bus.draining else [*self.rows("number = ?", number)]
        if not found:
            self.sending.discard(number)
            return
        [schedule] = found
        if not self.is_sound(schedule):
            self.bus.do(Move(number, self.bus.view.clock(), None, 0, DAMAGED), None, self.done, self.not_done)
            return
        sent = partial(self.sent, schedule)
        try:
            self.bus.check_token(schedule.token)
            key = f"{schedule.id}.{schedule.at // 1000000}" if schedule.cron else schedule.id
            text = f'{{"key": "{key}", {schedule.message[1:]}'
            tokens = self.bus.gate.tokens
            grant = tokens.valid[schedule.token].grant if tokens.closed else OPEN
            answer = self.bus.answer(self.request(Sender(schedule, sent), grant, text))
        except Refused as refused:
            answer = refusal(refused)
        except Exception as error:  # it must not come again and again, ten times a second
            say_exception(error)
            answer = refusal(our_fault())
        if answer:
            sent(answer)

    def request(self, peer: Any, grant: Grant, text: str) -> Request:
        """The request that a client would send."""
        request = Request(peer, SEND)
        request.parse_head()
        request.grant, request.endpoint, request.body = grant, self.bus.routes["POST", "/send"], text.encode()
        return request

    def sent(self, schedule: Schedule, answer: Answer) -> None:
        """Its message is stored or was refused. If it may be stored later, it is tried again. Then a repeat goes on."""
        number, at, tries, now = schedule.number, schedule.at, schedule.tries + 1, self.bus.view.clock()
        reason = None if answer.status == 200 else json.loads(answer.body)["error"]
        may_pass = answer.status == 429 or answer.status >= 500
        if may_pass and tries < TRIES:
            wait = max(int(dict(answer.headers).get("Retry-After", 0)), min(2**tries, WAIT_MAX))
            move = Move(number, at, now + wait * 1000000, tries, reason)
        elif schedule.cron and (may_pass or not reason):
            at = cron_of(schedule.cron).after(max(now, at))  # also if the clock stepped back
            move = Move(number, at, at, 0, reason)
        elif reason:
            move = Move(number, at, None, tries, reason)
        else:
            self.drop(schedule)
            return
        self.bus.do(move, None, self.done, self.not_done)

    def done(self, peer: Connection | None, operation: Any, result: None) -> None:
        self.sending.discard(operation.number)
        self.leaving.discard(operation.number)

    def not_done(self, operation: Any) -> None:
        """The disk was full or locked: the row is as it was."""
        self.done(None, operation, None)
        self.pause = time.monotonic() + PAUSE

    def not_sent(self, number: int) -> None:
        self.sending.discard(number)
        self.pause = time.monotonic() + PAUSE

    # Housekeeping

    def tidy(self) -> None:
        """Schedules that failed stay in the list for as long as mail. One whose time is damaged is never due."""
        bus = self.bus
        if bus.retention.keep and bus.retention.clock_is_trusted():
            before = bus.view.clock() - int(bus.retention.keep * 1000000)
            for each in [*self.rows("failed < ? LIMIT ?", before, OLD)]:
                self.drop(each)
        for each in [*self.rows("failed IS NULL AND due >= '' LIMIT ?", OLD)]:
            self.send(each.number)

    def take_back(self, schedule: Schedule, peer: Connection) -> None:
        if schedule.number in self.sending | self.leaving:
            raise Refused(409, "it is too late: this message is being sent, or taken back")
        self.drop(schedule, peer)
        self.leaving.add(schedule.number)

    def drop(self, schedule: Schedule, peer: Connection | None = None) -> None:
        self.bus.do(Drop(schedule.number), peer, self.dropped, self.not_done)

    def dropped(self, peer: Connection | None, drop: Drop, was: tuple[str, int] | None) -> Answer | None:
        self.done(peer, drop, None)
        self.left(drop, was)
        if peer and not was:
            raise gone()
        return ok(self.bus, '"ok": true')

    def left(self, drop: Drop, was: tuple[str, int] | None) -> None:
        """A schedule is not in the database any more."""
        if was:
            self.held.add(was[0], -ROW - was[1])


def gone() -> Refused:
    return Refused(404, "no schedule of yours has this id: its message was sent or taken back, or there never was one")
