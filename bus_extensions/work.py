"""Queues: a message is handed to one worker at a time (PROTOCOL.md section 13).

A queue is a mailbox whose messages are claimed. A row of the table `work` is a message that was handed out at least
once. `due` is the time from which another worker can get the message. It is on the steady clock, so that a step of the
wall clock ends no lease; it is NULL when the message is done or dead. A message that failed `--max-attempts` times goes
to the queue NAME.dead.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import secrets
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from bus_server import (
    ANSWER_BYTES,
    BUSY,
    EVERYONE,
    HOLD,
    HOLD_MAX,
    LINGER,
    MAILBOX,
    MAX_MESSAGES,
    PARKED,
    PLACED_ROW,
    RECALLED,
    SOUND,
    Answer,
    Bus,
    Connection,
    Deadlines,
    Draft,
    Grant,
    Key,
    Mailbox,
    Message,
    Metric,
    Now,
    Operation,
    Query,
    Refused,
    Request,
    State,
    Waits,
    checksum,
    encode,
    is_name,
    name,
    ok,
    one_of,
    seconds,
    unread,
)

LEASE = 60.0  # s a worker has for a message when it does not say
LEASE_MAX = 43200.0  # s; for so long no other worker gets the message of a worker that died
CLAIM_MAX = 100  # messages in one claim; it ends at ANSWER_BYTES too
DEAD = ".dead"  # a queue's name and this: the mailbox of the messages that failed too often

TABLES = [""]  # version 1: the core's schema 3 made it
NOUN = "jobs"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-attempts",
        type=int,
        default=5,
        metavar="N",
        help="after N failed attempts a message of the queue NAME goes to NAME.dead (%(default)s)",
    )


def start(bus: Bus, options: argparse.Namespace) -> None:
    Work(bus, options.max_attempts)


class Worker(NamedTuple):
    """The request of a worker for messages of a queue; it is the Parked of a worker that waits."""

    queue: str
    channel: str
    limit: int
    lease: float  # s
    called: str
    until: float  # monotonic clock, s
    token: str

    @property
    def exclusive(self) -> bool:
        return True

    @property
    def hold(self) -> float:
        return self.until - time.monotonic()

    @property
    def who(self) -> str:
        return self.called

    def places(self) -> Sequence[Key]:
        return [(self.channel, self.queue)]

    def present(self) -> Sequence[str]:
        return (self.queue,)

    def wants(self, message: Message) -> bool:
        return True


class Job(NamedTuple):
    """A message that was handed out to a worker."""

    message: Message
    attempt: int  # 1 for the first
    lease: str  # the secret with which its worker settles it
    until: int  # wall clock, us


class Claimed(NamedTuple):
    """The result of a Claim."""

    jobs: list[Job]
    due: int | None  # us until the next message may come back; None: no worker has one
    looked: int  # the highest tick at the time of the claim


class Claim(Operation):
    """Hand out messages of a queue: first messages that came back, then new messages."""

    __slots__ = ("attempts", "called", "channel", "lease", "lease_us", "limit", "queue")
    kind, is_large = "claim", True

    def __init__(
        self, channel: str, queue: str, limit: int, lease_us: int, lease: int, called: str, attempts: int
    ) -> None:
        self.channel, self.queue, self.limit = channel, queue, limit
        self.lease_us = lease_us  # how long the worker has for them
        self.lease = lease  # of the first job, 64 random bits; the next job has the next number
        self.called = called  # the worker
        self.attempts = attempts  # after so many failed attempts a message is dead

    def apply(self, state: State, now: Now) -> Claimed:
        """Up to `limit` messages, and no more than one above ANSWER_BYTES."""
        mailbox, _ = state.mailbox(self.channel, self.queue)
        state.insert()
        came_back = "UPDATE work SET due = ? WHERE mailbox = ? AND due >= ''"  # a text lies above every number
        if state.writing.execute(came_back, (now.steady, mailbox)).rowcount:
            state.damaged(f"the end of a lease in the queue {self.queue}")
        found: list[tuple[Message, int]] = []
        room, looked = ANSWER_BYTES, state.last
        for again in self.came_back(state, mailbox, now):
            found.append(again)
            room -= len(again[0].text)
            if room < 0 or len(found) == self.limit:
                break
        else:
            new, looked = self.untaken(state, mailbox, self.limit - len(found), room, now)
            found += new
        due = now.steady + self.lease_us
        jobs = [
            Job(message, attempt, f"{(self.lease + n) % (1 << 64):016x}", now.wall + self.lease_us)
            for n, (message, attempt) in enumerate(found)
        ]
        state.writing.executemany(
            "INSERT OR REPLACE INTO work VALUES (?, ?, ?, ?, ?, ?, NULL)",
            [(job.message.tick, mailbox, job.attempt, due, job.lease, self.called) for job in jobs],
        )
        undone = "mailbox = ? AND due IS NOT NULL"  # in these words, so that SQLite uses the index `undone`
        [first] = state.writing.execute(f"SELECT min(due) FROM work WHERE {undone}", (mailbox,)).fetchone()
        return Claimed(jobs, None if first is None else first - now.steady, looked)

    def came_back(self, state: State, mailbox: int, now: Now) -> Iterator[tuple[Message, int]]:
        """The messages that were given back, or whose lease ran out; each with the number of its next attempt."""
        rows = state.writing.execute(
            "SELECT tick, attempt, reason FROM work WHERE mailbox = ? AND due <= ? ORDER BY due, tick LIMIT ?",
            (mailbox, now.steady, self.limit),
        ).fetchall()
        for tick, attempt, reason in rows:
            message = state.message(tick)
            attempt = state.number(attempt, 0, f"the attempt of {tick:x}")
            if not message or is_expired(message, now):
                state.writing.execute("DELETE FROM work WHERE tick = ?", (tick,))
            elif attempt >= self.attempts and not message.to.endswith(DEAD):
                bury(state, message, attempt, reason, now)
            else:
                yield message, attempt + 1

    def untaken(
        self, state: State, mailbox: int, limit: int, room: int, now: Now
    ) -> tuple[list[tuple[Message, int]], int]:
        """Messages that no worker has had, up to `limit` or `room` (bytes), without the expired and damaged ones.

        And up to which tick it looked: after MAX_MESSAGES it stops.
        """
        [stored] = state.writing.execute("SELECT taken FROM mailboxes WHERE id = ?", (mailbox,)).fetchone()
        taken = 1 if stored == 0 else stored  # not 0: from now on, every message in this mailbox is work
        if not isinstance(taken, int):
            state.damaged(f"how far the queue in mailbox {mailbox} was handed out")
            highest = "SELECT ifnull(max(tick), 1) FROM work WHERE mailbox = ?"
            [taken] = state.writing.execute(highest, (mailbox,)).fetchone()
        queue = self.channel, self.queue
        rows = state.mail(PLACED_ROW, queue, taken)
        found: list[tuple[Message, int]] = []
        reached = state.last
        with contextlib.closing(rows):
            for looked, row in enumerate(rows, 1):
                taken = row[0]
                message = state.checked(row)
                room -= len(row[4] or "")
                if message and not is_expired(message, now):
                    found.append((message, 1))
                if room < 0 or len(found) == limit or looked == MAX_MESSAGES:
                    reached = taken
                    break
        if taken != stored:
            state.writing.execute("UPDATE mailboxes SET taken = ? WHERE id = ?", (taken, mailbox))
        return found, reached


class Settle(Operation):
    """A worker acknowledges its message, gives it back, or asks for more time. The result is the queue.

    If a message did not reach its worker, the bus settles it with `return`, which does not count as an attempt.
    """

    __slots__ = ("attempts", "delay_us", "lease", "reason", "tick", "verb")
    kind = "settle"

    def __init__(self, verb: str, tick: int, lease: str, delay_us: int, reason: str, attempts: int) -> None:
        self.verb = verb  # ack, nack, extend or return
        self.tick, self.lease, self.reason = tick, lease, reason
        self.delay_us = delay_us  # until another worker can get it
        self.attempts = attempts

    def apply(self, state: State, now: Now) -> Key:
        row = state.writing.execute(
            "SELECT attempt, due, channel, name FROM work JOIN mailboxes ON mailbox = id WHERE tick = ? AND lease = ?",
            (self.tick, self.lease),
        ).fetchone()
        if not row or (row[1] is None and self.verb != "ack"):
            raise Refused(409, "this message is no longer yours: its lease ran out, or it was settled already")
        due = None if self.verb == "ack" else now.steady + self.delay_us
        state.writing.execute("UPDATE work SET due = ? WHERE tick = ?", (due, self.tick))
        if self.verb == "return":
            undo = "UPDATE work SET lease = NULL, attempt = attempt - 1, reason = ? WHERE tick = ?"
            state.writing.execute(undo, (self.reason, self.tick))
        if self.verb == "nack":
            state.writing.execute("UPDATE work SET lease = NULL, reason = ? WHERE tick = ?", (self.reason, self.tick))
            message = state.message(self.tick)
            attempt = state.number(row[0], 0, f"the attempt of {self.tick:x}")
            if message and attempt >= self.attempts and not message.to.endswith(DEAD):
                bury(state, message, attempt, self.reason, now)
        return row[2], row[3]


class Bury(Operation):
    """Move messages that are due and failed too often to the dead letters, a slice.

    The result is the [mailbox, due, tick] above which to go on; None: no job is left.
    """

    __slots__ = ("above", "attempts")
    kind = "bury"

    def __init__(self, attempts: int, above: Sequence[int] = (0, 0, 0)) -> None:
        self.attempts, self.above = attempts, above

    LOOKED = 1000  # jobs, most of which may stay: those that are not due, or are dead letters themselves
    SLICE = 200  # messages that are moved, or somewhat more than ANSWER_BYTES of them

    def apply(self, state: State, now: Now) -> list[int] | None:
        queue = "(SELECT mailbox FROM messages WHERE messages.tick = work.tick)"
        if state.writing.execute(
            f"UPDATE OR IGNORE work SET mailbox = {queue} WHERE mailbox >= '' AND due IS NOT NULL"
        ).rowcount:
            state.damaged("the queue of a job")
        rows = state.writing.execute(
            "SELECT mailbox, due, tick, attempt, reason, due <= ? AND typeof(attempt) = 'integer' AND attempt >= ? "
            "AND substr(name, ?) != ? FROM work CROSS JOIN mailboxes ON mailbox = id "
            "WHERE due IS NOT NULL AND due < ? AND (mailbox, due, tick) > (?, ?, ?) "
            "ORDER BY mailbox, due, tick LIMIT ?",
            (now.steady, self.attempts, -len(DEAD), DEAD, 2 * SOUND, *self.above, self.LOOKED),
        ).fetchall()
        buried = size = 0
        for mailbox, due, tick, attempt, reason, has_failed in rows:
            message = state.message(tick) if has_failed else None
            if message:
                bury(state, message, attempt, reason, now)
                buried += 1
                size += len(message.text)
            if buried == self.SLICE or size > ANSWER_BYTES:
                return [mailbox, due, tick]
        return [mailbox, due, tick] if len(rows) == self.LOOKED else None


class Again(Operation):
    """Put a dead letter back into its queue, as a new message without what bury() added, and take it out of NAME.dead.

    The result is the tick of the new message. The dead letter counts as expired from then on.
    """

    __slots__ = ("tick",)
    kind = "again"

    def __init__(self, tick: int) -> None:
        self.tick = tick

    def apply(self, state: State, now: Now) -> int:
        letter = state.message(self.tick)
        work = state.writing.execute("SELECT due, lease FROM work WHERE tick = ?", (self.tick,)).fetchone()
        if not letter or not letter.to.endswith(DEAD) or is_expired(letter, now) or (work and work[0] is None):
            raise Refused(409, "this dead letter is gone: it was sent again, settled, or has expired")
        if work and work[1] is not None and work[0] > now.steady:
            raise Refused(409, "a worker has this dead letter: wait until its lease ends")
        left = None if letter.expires is None else letter.expires - now.wall
        members = json.loads(f"{{{letter.text}}}")
        text = encode({member: value for member, value in members.items() if member not in OF_A_LETTER})[1:-1]
        queue = letter.to[: -len(DEAD)]
        [tick] = state.place(Draft(letter.channel, (queue,), letter.sender, text, None, left), now.wall)
        state.insert()
        gone = letter._replace(expires=RECALLED)
        state.writing.execute(
            "UPDATE messages SET expires = ?, sum = ? WHERE tick = ?", (RECALLED, checksum(gone), gone.tick)
        )
        state.writing.execute("UPDATE work SET due = NULL WHERE tick = ?", (gone.tick,))
        return tick


OPERATIONS = (Claim, Settle, Bury, Again)
OF_A_LETTER = ("dead_of", "attempts", "reason")  # the members of a dead letter that its message does not have


def is_expired(message: Message, now: Now) -> bool:
    return message.expires is not None and message.expires <= now.wall


def bury(state: State, message: Message, attempt: int, reason: str | None, now: Now) -> None:
    """Move a message to the dead letters of its queue, with the reason and what is left of its ttl.

    A message that has expired is done instead.
    """
    if is_expired(message, now):
        state.writing.execute("DELETE FROM work WHERE tick = ?", (message.tick,))
        return
    left = None if message.expires is None else message.expires - now.wall
    reason = reason if isinstance(reason, str) else "its lease ran out"
    why = {"dead_of": f"{message.tick:x}", "attempts": attempt, "reason": reason}
    members = {**json.loads(f"{{{message.text}}}"), **why}
    letter = Draft(message.channel, (message.to + DEAD,), message.sender, encode(members)[1:-1], None, left, None)
    state.place(letter, now.wall)
    state.insert()
    state.writing.execute("UPDATE work SET due = NULL, lease = NULL WHERE tick = ?", (message.tick,))


class Work:
    """The endpoints of queues, and what follows an operation on one. Owned by the loop."""

    def __init__(self, bus: Bus, attempts: int) -> None:
        self.bus, self.attempts = bus, attempts
        self.burying = False
        self.queues = set(self.known_queues())
        self.ends: set[int] = set()  # monotonic clock, s: when leases end, and bury() is planned
        bus.route("POST", "/claim", self.claim, "take messages from a queue; wait=25 waits for one")
        bus.route("POST", "/ack", self.settle, "tell the bus that a claimed message is done")
        bus.route("POST", "/nack", self.settle, "give a claimed message back to the queue")
        bus.route("POST", "/extend", self.settle, "ask for more time for a claimed message")
        bus.route("POST", "/again", self.again, "put a dead letter back into its queue")
        bus.waits[Worker] = Waits(self.found, self.over)
        bus.states.append(self.state_of)
        bus.about.append(self.of_queue)
        bus.on_lost.append(self.lost)
        bus.on_tidy.append(lambda: self.queues.intersection_update(bus.mailboxes.boxes))
        bus.on_tidy.append(self.bury)  # a lease from before the start of the bus has no timer
        bus.metrics.append(self.undone)
        bus.ledger.elsewhere["claim"] = self.claimed_elsewhere
        bus.ledger.elsewhere["settle"] = partial(self.settled, None)
        bus.ledger.elsewhere["again"] = self.again_elsewhere

    # Endpoints

    def claim(self, request: Request) -> None:
        self.bus.check_open()
        worker = worker_of(request.members(), request.grant)
        request.grant.check([worker.queue])
        self.bus.storms.read(request.owner(), worker.called)
        self.bus.storms.check_work(request.owner(), "", 0)
        self.bus.storms.name(request.owner(), self.bus.mailboxes.new(worker.channel, [worker.queue]))
        self.bus.mailboxes.polled(worker, request.peer.address, self.bus.view.clock())
        self.queues.add((worker.channel, worker.queue))
        # Its row says that whatever comes from now on is work; it goes when nobody asks for as long as mail is kept.
        self.bus.mailboxes.box(worker.channel, worker.queue).firm = True
        self.ask(request.peer, worker)

    def ask(self, connection: Connection, worker: Worker) -> None:
        operation = Claim(
            worker.channel,
            worker.queue,
            worker.limit,
            int(worker.lease * 1000000),
            secrets.randbits(64),
            worker.called,
            self.attempts,
        )
        queue = worker.channel, worker.queue
        self.bus.do(
            operation,
            connection,
            lambda peer, claim, result: self.claimed(peer, worker, claim, result),
            lambda claim: self.look_again(queue, 0),  # what has woken it is for another worker
        )

    def settle(self, request: Request) -> None:
        """A worker acknowledges its message, gives it back, or asks for more time. The lease is the permission."""
        self.bus.check_open()
        self.bus.storms.read(request.owner())
        members = request.members()
        delay = members.number("delay", 0, 0, LEASE_MAX)
        lease = members.number("seconds", LEASE, 1, LEASE_MAX)
        reason = (members.one("reason") or "a worker gave it back")[:200]
        wait = lease if request.route == "/extend" else delay
        operation = Settle(
            request.route[1:], members.id(), members.needed("lease"), int(wait * 1000000), reason, self.attempts
        )
        self.bus.do(operation, request.peer, self.settled)

    def again(self, request: Request) -> None:
        """Whoever may read the dead letters of a queue may put one back. It needs no limit of its own.

        There are only as many of them as jobs that have failed.
        """
        self.bus.check_open()
        letter = one_of(self.bus, request, request.members().id())
        request.grant.check([letter.to])
        if not letter.to.endswith(DEAD) or '"dead_of"' not in letter.text:
            raise Refused(400, f"this is no dead letter: those are in the mailbox NAME{DEAD} of a queue")
        self.bus.do(Again(letter.tick), request.peer, partial(self.sent_again, letter))

    # After an operation

    def sent_again(self, letter: Message, connection: Connection, again: Again, tick: int) -> Answer:
        self.bus.mailboxes.box(letter.channel, letter.to).recalled(letter)
        return ok(self.bus, f'"ok": true, "id": "{tick:x}", "ts": {seconds(tick)}')

    def claimed(self, connection: Connection, worker: Worker, claim: Claim, result: Claimed) -> Answer | None:
        """Answer a claim, or park its worker. A message on its last attempt is buried when its lease runs out."""
        bus = self.bus
        if result.jobs and connection.phase is LINGER:  # the worker has gone: others can get them at once
            self.give_back(result.jobs)
        elif result.jobs:
            self.look_again((worker.channel, worker.queue), worker.lease)
            if max(job.attempt for job in result.jobs) >= self.attempts and not worker.queue.endswith(DEAD):
                self.bury_after(worker.lease)
        elif worker.hold > 0 and connection.phase is BUSY and not connection.ended | bus.draining:
            if bus.mailboxes.box(worker.channel, worker.queue).newest > result.looked:  # one arrived since the claim
                self.ask(connection, worker)
            else:
                bus.park(connection, worker, math.inf if result.due is None else result.due / 1000000)
            return None
        return handed(bus, worker, result.jobs)

    def claimed_elsewhere(self, claim: Claim, result: Claimed) -> None:
        """Another front has handed out jobs: those who wait here look when their leases end."""
        queue = claim.channel, claim.queue
        self.queues.add(queue)
        self.bus.mailboxes.box(*queue).firm = True
        if result.jobs:
            self.look_again(queue, claim.lease_us / 1000000)

    def again_elsewhere(self, again: Again, tick: int) -> None:
        """Another front has taken back a dead letter: what was counted in its mailbox is counted anew."""
        letter = self.bus.view.message(again.tick)
        if letter:
            box = self.bus.mailboxes.box(letter.channel, letter.to)
            box.perishable, box.expired, box.pending = True, None, None

    def lost(self, reader: Any, tick: int) -> None:
        """An answer with jobs did not reach its worker whole."""
        if isinstance(reader, Handed):
            self.give_back(reader.jobs)

    def give_back(self, jobs: list[Job]) -> None:
        for job in jobs:
            back = Settle("return", job.message.tick, job.lease, 0, "its worker hung up", self.attempts)
            self.bus.do(back, None, self.settled)

    def settled(self, connection: Connection | None, settle: Settle, queue: Key) -> Answer:
        delay = settle.delay_us / 1000000
        if settle.verb in ("nack", "return"):
            self.look_again(queue, delay)
        elif settle.verb == "extend":
            self.bury_after(delay)
        return ok(self.bus, '"ok": true')

    def look_again(self, queue: Key, delay: float) -> None:
        """In `delay` seconds the queue may have a job: the workers that wait there ask again then, or earlier."""
        mailboxes, due = self.bus.mailboxes, self.bus.door.deadlines.clock() + delay
        for connection in mailboxes.waiting.get(queue, ()):
            if connection.due > due and isinstance(mailboxes.parked[connection], Worker):
                connection.wait(PARKED, delay)

    def bury_after(self, lease: float) -> None:
        """One timer for all leases that end in the same second: one for each request would stay for up to 12 hours."""
        now = time.monotonic()
        end = math.ceil(now + lease + Deadlines.SLOT)
        if end not in self.ends:
            self.ends.add(end)
            self.bus.loop.later(end - now, self.bury)

    def bury(self, above: Sequence[int] = (0, 0, 0)) -> None:
        now = time.monotonic()
        self.ends = {end for end in self.ends if end > now}
        if not self.burying:
            self.bus.do(Bury(self.attempts, above), None, self.buried, self.not_buried)
            self.burying = True  # only now: if the line above raises, it is tried again

    def buried(self, connection: None, operation: Bury, reached: list[int] | None) -> None:
        self.burying = False
        if reached and not self.bus.draining:
            self.bury(reached)

    def not_buried(self, operation: Bury) -> None:
        self.burying = False

    # Waiting

    def found(self, connection: Connection, worker: Worker, messages: list[Message]) -> None:
        connection.phase, connection.due = BUSY, math.inf
        self.ask(connection, worker)

    def over(self, connection: Connection, worker: Worker) -> Answer | None:
        if worker.hold <= 0 or connection.ended or self.bus.draining:
            return handed(self.bus, worker, [])
        self.found(connection, worker, [])  # a lease or a delay has run out
        return None

    # For other parts of the bus

    def state_of(self, message: Message) -> tuple[str, str] | None:
        """The state of a message that was handed out."""
        row = self.bus.view.database.execute(
            "SELECT attempt, due, lease, worker FROM work WHERE tick = ?", (message.tick,)
        ).fetchone()
        if not row:
            return None
        attempt, due, lease, worker = row
        if not (isinstance(attempt, int) and all(map(is_name, str(worker).split("/")))):
            self.bus.view.damaged(f"the worker of {message.tick:x}")
            return None
        state = "fetched" if due else "acknowledged" if lease else "dead"
        return state, f', "attempt": {attempt}, "by": "{worker}"'

    def known_queues(self) -> Iterator[tuple[str, str]]:
        """The mailboxes that workers had messages of."""
        rows = self.bus.view.database.execute("SELECT channel, name FROM mailboxes WHERE taken > 0").fetchall()
        return ((channel, own) for channel, own in rows if is_name(channel) and is_name(own))

    def of_queue(self, grant: Grant, channel: str, queue: str, box: Mailbox) -> str:
        """The member `work` of a queue in /agents. A page counts at most as many jobs as the bus allows it."""
        bus, key = self.bus, (channel, queue)
        if key not in self.queues or not grant.reads(queue):
            return ""
        had = f"SELECT worker FROM work WHERE mailbox = {MAILBOX} AND due > ? AND lease IS NOT NULL LIMIT ?"
        values = *key, bus.clock.now().steady, max(bus.countable, 0)
        holders = [worker for [worker] in bus.view.database.execute(had, values).fetchall()]
        bus.countable -= len(holders)
        bus.looks -= 1
        parked = [bus.mailboxes.parked[each] for each in bus.mailboxes.waiting.get(key, ())]
        waiting = [each.called for each in parked if isinstance(each, Worker)]
        letters = bus.mailboxes.boxes.get((channel, queue + DEAD))
        dead = unread(bus, channel, queue + DEAD, letters) if letters else 0
        workers = len(waiting) + len(set(holders) - set(waiting))
        return f', "work": {{"in_hand": {len(holders)}, "dead": {dead}, "workers": {workers}}}'

    def undone(self) -> list[Metric]:
        rows = self.bus.view.database.execute(
            "SELECT channel, name, count(*) FROM work JOIN mailboxes ON mailbox = id WHERE due IS NOT NULL "
            "GROUP BY mailbox"
        ).fetchall()
        jobs = [(f'{{channel="{channel}",name="{own}"}}', number) for channel, own, number in rows]
        return [("undone_jobs", "gauge", "handed out at least once and not done", jobs)]


def worker_of(query: Query, grant: Grant) -> Worker:
    queue = name(query.needed("to"), "to")
    if len(queue + DEAD) > 64 or queue == EVERYONE:
        raise Refused(400, f"to must be a queue: a name of at most {64 - len(DEAD)} characters, not {EVERYONE}")
    called = str(query.name("worker", "worker"))
    return Worker(
        queue,
        str(query.name("channel", "default")),
        int(query.number("max", 1, 1, CLAIM_MAX)),
        query.number("lease", LEASE, 1, LEASE_MAX),
        f"{grant.name}/{called}" if grant.name else called,
        time.monotonic() + query.number("wait", HOLD, 0, HOLD_MAX),
        grant.token,
    )


class Handed(NamedTuple):
    """The reader in `delivers` of an answer with jobs. Once the answer was written out whole, the worker has them."""

    worker: Worker
    jobs: list[Job]

    @property
    def exclusive(self) -> bool:
        return True

    @property
    def channel(self) -> str:
        return self.worker.channel

    @property
    def hold(self) -> float:
        return self.worker.hold

    @property
    def token(self) -> str:
        return self.worker.token

    @property
    def who(self) -> str:
        return self.worker.called

    def places(self) -> Sequence[Key]:
        return ()

    def present(self) -> Sequence[str]:
        return (self.worker.queue,)

    def wants(self, message: Message) -> bool:
        return False

    def covers(self, upto: int, message: Message) -> bool:
        return any(job.message.tick == message.tick for job in self.jobs)


OF_A_JOB = {"attempt", "lease", "lease_until"}  # a sender's own members with these names are left out of an answer


def render(job: Job) -> str:
    message = job.message
    if any(f'"{member}"' in message.text for member in OF_A_JOB):
        members = json.loads(f"{{{message.text}}}")
        others = {member: value for member, value in members.items() if member not in OF_A_JOB}
        message = message._replace(text=encode(others)[1:-1])
    lease = f'"lease": "{job.lease}", "lease_until": {seconds(job.until)}'
    return f'{message.render()[:-1]}, "attempt": {job.attempt}, {lease}}}'


def handed(bus: Bus, worker: Worker, jobs: list[Job]) -> Answer:
    """The answer to a claim. The jobs count as fetched once it was written out whole."""
    bus.figures.delivered += len(jobs)
    answer = ok(bus, f'"messages": [{", ".join(map(render, jobs))}]')
    if not jobs:
        return answer
    return answer._replace(delivers=(Handed(worker, jobs), max(job.message.tick for job in jobs)))
