"""What the requests of workers say, and their answers. Part of work.py, which is loaded with this file."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import NamedTuple

from _work_letters import DEAD
from _work_state import LEASE_MAX, Job

from bus_server import (
    EVERYONE,
    HOLD,
    HOLD_MAX,
    Answer,
    Bus,
    Grant,
    Key,
    Message,
    Query,
    Refused,
    encode,
    name,
    ok,
    seconds,
)

LEASE = 60.0  # s a worker has for a message when it does not say
CLAIM_MAX = 100  # messages in one claim; it ends at ANSWER_BYTES too


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
    def channel(self) -> str:
        return self.worker.channel

    @property
    def who(self) -> str:
        return self.worker.called

    def present(self) -> Sequence[str]:
        return (self.worker.queue,)

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


def handed(bus: Bus, worker: Worker, jobs: list[Job], attempts: int) -> Answer:
    """The answer to a claim. The jobs count as fetched once it was written out whole."""
    bus.figures.delivered += len(jobs)
    most = "null" if worker.queue.endswith(DEAD) else attempts
    answer = ok(bus, f'"messages": [{", ".join(map(render, jobs))}], "max_attempts": {most}')
    if not jobs:
        return answer
    return answer._replace(delivers=(Handed(worker, jobs), max(job.message.tick for job in jobs)))
