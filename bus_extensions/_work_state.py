"""The operations of workers: they claim jobs, and settle them. Part of work.py, which is loaded with this file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from _work_letters import DEAD, bury, drop, is_expired, look_back, pass_over

from bus_server import ANSWER_BYTES, MAX_MESSAGES, PLACED_ROW, RECALLED, Key, Message, Now, Operation, Refused, State

LEASE_MAX = 43200.0  # s; for so long no other worker gets the message of a worker that died
LONGEST = int(LEASE_MAX * 1000000)  # us
# A bus that started while its clock was ahead wrote an end that nobody may wait for: a worker may have the longest
# lease, and what was given back is free.
TOO_FAR = """UPDATE work SET due = CASE WHEN lease IS NULL THEN :now ELSE :longest END
    WHERE mailbox = :mailbox AND due > :longest"""


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
        ends = {"now": now.steady, "longest": now.steady + LONGEST, "mailbox": mailbox}
        state.writing.execute(TOO_FAR, ends)
        look_back(state, mailbox, now)
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
            if not message:
                state.writing.execute("DELETE FROM work WHERE tick = ?", (tick,))
            elif is_expired(message, now):
                drop(state, message, now)
            elif attempt >= self.attempts and not message.to.endswith(DEAD):
                bury(state, message, attempt, reason, now)
            else:
                yield message, attempt + 1

    def untaken(
        self, state: State, mailbox: int, limit: int, room: int, now: Now
    ) -> tuple[list[tuple[Message, int]], int]:
        """Messages that no worker has, up to `limit` or `room` (bytes), without the expired and damaged ones.

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
        reached, passed = state.last, 0
        with contextlib.closing(rows):
            for looked, row in enumerate(rows, 1):
                taken = row[0]
                message = state.checked(row)
                room -= len(row[4] or "")
                if message and is_expired(message, now):
                    passed = passed or (taken if message.expires != RECALLED else 0)
                elif message and not self.is_work(state, taken):
                    found.append((message, 1))
                if room < 0 or len(found) == limit or looked == MAX_MESSAGES:
                    reached = taken
                    break
        if passed:
            pass_over(state, mailbox, passed, now)
        if taken != stored:
            state.writing.execute("UPDATE mailboxes SET taken = ? WHERE id = ?", (taken, mailbox))
        return found, reached

    def is_work(self, state: State, tick: int) -> bool:
        """Was it handed out before? Such jobs come again after look_back()."""
        return bool(state.writing.execute("SELECT 1 FROM work WHERE tick = ?", (tick,)).fetchone())


class Settle(Operation):
    """A worker acknowledges its message, gives it back, or asks for more time. The result is the queue.

    `return` does not count as an attempt: the message did not reach its worker, or that was stopped (`counts`).
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
