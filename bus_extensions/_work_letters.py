"""Dead letters: the jobs that failed too often. Part of work.py, which is loaded with this file."""

from __future__ import annotations

import json
from collections.abc import Sequence

from bus_server import ANSWER_BYTES, RECALLED, SOUND, Draft, Message, Now, Operation, Refused, State, checksum, encode

DEAD = ".dead"  # a queue's name and this: the mailbox of the messages that failed too often
OF_A_LETTER = ("dead_of", "attempts", "reason", "of_job")  # what a dead letter has, and in `of_job` those of its job


def is_expired(message: Message, now: Now) -> bool:
    return message.expires is not None and message.expires <= now.wall


BELIEVED = 3600 * 1000000  # us; a wall clock that was wrong for longer is believed


def pass_over(state: State, mailbox: int, tick: int, now: Now) -> None:
    """A job is passed over because it has expired. Its queue is looked through from here on if the clock goes back.

    For as long as BELIEVED, the first of such jobs is kept in mind: a clock that is wrong for a moment loses no job.
    """
    row = state.writing.execute("SELECT first, wall, since FROM work_passed WHERE mailbox = ?", (mailbox,)).fetchone()
    first, wall, since = tick, now.wall, now.steady
    if row:
        its_first, its_wall, its_since = (state.number(each, 0, f"what mailbox {mailbox} passed over") for each in row)
        wall = max(wall, its_wall)
        if abs(now.steady - its_since) <= BELIEVED:
            first, since = min(tick, its_first), its_since
    state.writing.execute("INSERT OR REPLACE INTO work_passed VALUES (?, ?, ?, ?)", (mailbox, first, wall, since))


def look_back(state: State, mailbox: int, now: Now) -> None:
    """If the clock has gone back, jobs that were passed over have perhaps not expired: begin again at the first."""
    later = "SELECT first FROM work_passed WHERE mailbox = ? AND wall > ?"
    row = state.writing.execute(later, (mailbox, now.wall)).fetchone()
    if row:
        above = max(state.number(row[0], 0, f"what mailbox {mailbox} passed over") - 1, 1)
        state.writing.execute("UPDATE mailboxes SET taken = min(taken, ?) WHERE id = ?", (above, mailbox))
        state.writing.execute("DELETE FROM work_passed WHERE mailbox = ?", (mailbox,))


def drop(state: State, message: Message, now: Now) -> None:
    """A job that was handed out has expired, so it is done; if the clock was wrong, it is as new."""
    state.writing.execute("DELETE FROM work WHERE tick = ?", (message.tick,))
    if message.expires != RECALLED:
        mailbox, _ = state.mailbox(message.channel, message.to)
        pass_over(state, mailbox, message.tick, now)


def bury(state: State, message: Message, attempt: int, reason: str | None, now: Now) -> None:
    """Move a message to the dead letters of its queue, with the reason and what is left of its ttl.

    A message that has expired is done instead.
    """
    if is_expired(message, now):
        drop(state, message, now)
        return
    left = None if message.expires is None else message.expires - now.wall
    reason = reason if isinstance(reason, str) else "its lease ran out"
    why = {"dead_of": f"{message.tick:x}", "attempts": attempt, "reason": reason}
    members = json.loads(f"{{{message.text}}}")
    own = {member: members.pop(member) for member in OF_A_LETTER if member in members}
    members.update(why, **({"of_job": own} if own else {}))
    letter = Draft(message.channel, (message.to + DEAD,), message.sender, encode(members)[1:-1], None, left, None)
    state.place(letter, now.wall)
    state.insert()
    state.writing.execute("UPDATE work SET due = NULL, lease = NULL WHERE tick = ?", (message.tick,))


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
        own = members.get("of_job")  # anybody may have written it
        its = {member: own[member] for member in OF_A_LETTER if isinstance(own, dict) and member in own}
        others = {member: value for member, value in members.items() if member not in OF_A_LETTER}
        text = encode({**others, **its})[1:-1]
        queue = letter.to[: -len(DEAD)]
        [tick] = state.place(Draft(letter.channel, (queue,), letter.sender, text, None, left), now.wall)
        state.insert()
        gone = letter._replace(expires=RECALLED)
        state.writing.execute(
            "UPDATE messages SET expires = ?, sum = ? WHERE tick = ?", (RECALLED, checksum(gone), gone.tick)
        )
        state.writing.execute("UPDATE work SET due = NULL WHERE tick = ?", (gone.tick,))
        return tick
