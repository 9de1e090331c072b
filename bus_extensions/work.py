"""Queues: a message is handed to one worker at a time (PROTOCOL.md section 13).

A queue is a mailbox whose messages are claimed. A row of the table `work` is a message that was handed out at least
once. `due` is the time from which another worker can get the message. It is on the steady clock, so that a step of the
wall clock ends no lease; it is NULL when the message is done or dead. A message that failed `--max-attempts` times goes
to the queue NAME.dead.
"""

from __future__ import annotations

import argparse
import math
import secrets
import time
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from bus_server import (
    BUSY,
    LINGER,
    PARKED,
    Answer,
    Bus,
    Connection,
    Deadlines,
    Key,
    Message,
    Refused,
    Request,
    Waits,
    ok,
    one_of,
    parts_of,
    put_newest,
    seconds,
    within,
)

if TYPE_CHECKING:
    import _work_letters as letters
    import _work_queues as queues
    import _work_state as its
    import _work_words as words
    from _work_letters import DEAD, Again, Bury
    from _work_state import Claim, Claimed, Job, Settle
    from _work_words import Worker
else:
    letters, its, words, queues = parts_of(__file__, "_work_letters", "_work_state", "_work_words", "_work_queues")
    DEAD, Again, Bury = letters.DEAD, letters.Again, letters.Bury
    Claim, Claimed, Job, Settle, Worker = its.Claim, its.Claimed, its.Job, its.Settle, words.Worker

TABLES = [
    "",  # version 1: the core's schema 3 made it
    """
    CREATE TABLE work_passed(  -- the jobs that were passed over because they had expired: see letters.pass_over()
        mailbox INTEGER PRIMARY KEY,
        first INTEGER NOT NULL,  -- the tick of the first one
        wall INTEGER NOT NULL,   -- when the last one was passed over, us
        since INTEGER NOT NULL); -- when the first one was, on the steady clock, us
    CREATE TRIGGER work_passed_removed AFTER DELETE ON mailboxes BEGIN
        DELETE FROM work_passed WHERE mailbox = old.id; END;
    """,
]
NOUN = "jobs"
OPERATIONS = (Claim, Settle, Bury, Again)

UNANSWERED = 1000  # claims; 100 bytes each


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-attempts",
        type=within(1),
        default=5,
        metavar="N",
        help="after N failed attempts a message of the queue NAME goes to NAME.dead (%(default)s)",
    )


def start(bus: Bus, options: argparse.Namespace) -> None:
    Work(bus, options.max_attempts)


class Work:
    """The endpoints of queues, and what follows an operation on one. Owned by the loop."""

    def __init__(self, bus: Bus, attempts: int) -> None:
        self.bus, self.attempts = bus, attempts
        self.burying = False
        self.queues = queues.Queues(bus)
        self.unanswered: OrderedDict[int, None] = OrderedDict()  # leases of claims that were answered with an error
        self.ends: set[int] = set()  # monotonic clock, s: when leases end, and bury() is planned
        bus.route("POST", "/claim", self.claim, "take messages from a queue; wait=25 waits for one")
        bus.route("POST", "/ack", self.settle, "tell the bus that a claimed message is done")
        bus.route("POST", "/nack", self.settle, "give a claimed message back to the queue")
        bus.route("POST", "/extend", self.settle, "ask for more time for a claimed message")
        bus.route("POST", "/again", self.again, "put a dead letter back into its queue")
        bus.mailboxes.exclusive.add(Worker)
        bus.waits[Worker] = Waits(self.found, self.over)
        bus.on_lost.append(self.lost)
        bus.on_tidy.append(self.bury)  # a lease from before the start of the bus has no timer
        bus.ledger.elsewhere["claim"] = self.claimed_elsewhere
        bus.ledger.elsewhere["settle"] = partial(self.settled, None)
        bus.ledger.elsewhere["again"] = self.again_elsewhere

    # Endpoints

    def claim(self, request: Request) -> None:
        self.bus.check_open()
        worker = words.worker_of(request.members(), request.grant)
        request.grant.check([worker.queue])
        storms, owner = self.bus.storms, request.owner()
        is_new = f"{owner}/{worker.called}" not in storms.reads.left  # it names itself, and has a rate of its own
        storms.name(owner, self.bus.mailboxes.new(worker.channel, [worker.queue]) + (is_new and storms.reads.rate > 0))
        storms.read(owner, worker.called)
        storms.pay(owner)
        self.bus.mailboxes.polled(worker, request.peer.address, self.bus.view.clock())
        self.queues.begin(worker.channel, worker.queue)
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
        self.bus.do(
            operation,
            connection,
            lambda peer, claim, result: self.claimed(peer, worker, claim, result),
            self.not_claimed,
        )

    def not_claimed(self, claim: Claim) -> None:
        """What has woken this worker is for another one. At a front the claim may be stored, and is heard of later."""
        put_newest(self.unanswered, claim.lease, None, UNANSWERED)
        self.look_again((claim.channel, claim.queue), 0)

    def settle(self, request: Request) -> None:
        """A worker acknowledges its message, gives it back, or asks for more time. The lease is the permission."""
        self.bus.check_open()
        self.bus.storms.read(request.owner())
        members = request.members()
        delay = members.number("delay", 0, 0, its.LEASE_MAX)
        lease = members.number("seconds", words.LEASE, 1, its.LEASE_MAX)
        reason = (members.one("reason") or "a worker gave it back")[:200]
        verb, wait = request.route[1:], lease if request.route == "/extend" else delay
        if verb == "nack" and members.flag("counts") is False:
            verb = "return"
        operation = Settle(verb, members.id(), members.needed("lease"), int(wait * 1000000), reason, self.attempts)
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
        elif worker.hold > 0 and connection.phase is BUSY and not (connection.ended or bus.draining):
            if bus.mailboxes.box(worker.channel, worker.queue).newest > result.looked:  # one arrived since the claim
                self.ask(connection, worker)
            else:
                bus.park(connection, worker, math.inf if result.due is None else result.due / 1000000)
            return None
        return words.handed(bus, worker, result.jobs, self.attempts)

    def claimed_elsewhere(self, claim: Claim, result: Claimed) -> None:
        """Another front has handed out jobs: those who wait here look when their leases end."""
        queue = claim.channel, claim.queue
        self.queues.begin(*queue)
        if claim.lease in self.unanswered:  # it was asked here, and its worker has got an error
            self.give_back(result.jobs)
        elif result.jobs:
            self.look_again(queue, claim.lease_us / 1000000)

    def again_elsewhere(self, again: Again, tick: int) -> None:
        """Another front has taken back a dead letter: what was counted in its mailbox is counted anew."""
        letter = self.bus.view.message(again.tick)
        if letter:
            box = self.bus.mailboxes.box(letter.channel, letter.to)
            box.perishable, box.expired, box.pending = True, None, None

    def lost(self, reader: Any, tick: int) -> None:
        """An answer with jobs did not reach its worker whole."""
        if isinstance(reader, words.Handed):
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
        if not self.burying and not self.bus.draining:
            self.bus.do(Bury(self.attempts, above), None, self.buried, self.not_buried)
            self.burying = True  # only now: if the line above raises, it is tried again

    def buried(self, connection: None, operation: Bury, reached: list[int] | None) -> None:
        self.burying = False
        if reached:
            self.bury(reached)

    def not_buried(self, operation: Bury) -> None:
        self.burying = False

    # Waiting

    def found(self, connection: Connection, worker: Worker, messages: list[Message]) -> None:
        connection.phase, connection.due = BUSY, math.inf
        self.ask(connection, worker)

    def over(self, connection: Connection, worker: Worker) -> Answer | None:
        if worker.hold <= 0 or connection.ended or self.bus.draining:
            return words.handed(self.bus, worker, [], self.attempts)
        self.found(connection, worker, [])  # a lease or a delay has run out
        return None
