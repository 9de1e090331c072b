"""The log backwards, the newest messages first, at GET /log?before=TS (PROTOCOL.md section 22)."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from typing import Any

from bus_server import (
    ALIVE,
    ANSWER_BYTES,
    MAX_MESSAGES,
    ROW,
    SEES,
    Answer,
    Bus,
    Message,
    Refused,
    Request,
    cursor,
    encode,
    ok,
    seconds,
    tick_of,
)

TABLES, NOUN, OPERATIONS = None, "", ()


def options(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def start(bus: Bus, options: argparse.Namespace) -> None:
    History(bus)


class History:
    """Answers GET /log if the query has `before`; else the core does."""

    LOOKED = 5000  # messages that are looked at for one answer: a few ms, however few of them are wanted

    def __init__(self, bus: Bus) -> None:
        self.bus, self.forwards = bus, bus.routes["GET", "/log"]
        bus.route("GET", "/log", self.log, self.forwards.says, takes=True)

    def log(self, request: Request) -> Answer | None:
        query = request.query()
        before = query.one("before")
        if before is None:
            return self.forwards.call(request)
        try:
            below = cursor("" if before == "last" else before)
        except Refused:
            raise Refused(400, "before must be 'now' or seconds like 1795203596.123456") from None
        self.bus.storms.read(request.owner())
        limit = int(query.number("max", 100, 1, MAX_MESSAGES))
        found, end = self.below(below, *conditions(request, self.bus.view.clock()), limit)
        messages = ", ".join(message.render() for message in found)
        return ok(self.bus, f'"messages": [{messages}], "next": {seconds(end) if end else "null"}')

    def below(self, before: int, only: str, values: Sequence[Any], limit: int) -> tuple[list[Message], int | None]:
        """The messages below a tick, newest first, and below which tick to go on; None: there is nothing more.

        Nobody sees a message that is being recalled, or one that was not announced yet.
        """
        view, withheld = self.bus.view, {each.tick for each in self.bus.withheld.values()}
        upto = min(before - 1, self.bus.last) if before >= 0 else self.bus.last
        last = "SELECT tick FROM messages WHERE tick <= ? ORDER BY tick DESC LIMIT 1 OFFSET ?"
        [low] = view.ask(last, upto, self.LOOKED - 1) or [0]
        rows = (
            f"SELECT {ROW} FROM messages CROSS JOIN mailboxes ON mailbox = id WHERE tick <= ? AND tick >= ? AND {only}"
        )
        found: list[Message] = []
        size = reached = 0
        with contextlib.closing(view.database.execute(f"{rows} ORDER BY tick DESC", (upto, low, *values))) as statement:
            for row in statement:
                if len(found) == limit or size > ANSWER_BYTES:
                    return found, reached
                message, reached = view.checked(row), row[0]
                size += len(row[4] or "")
                if message and message.tick not in withheld:
                    found.append(message)
        return found, low or None


def conditions(request: Request, now: int) -> tuple[str, list[Any]]:
    """In SQL: what the query asks for, of what the token may see and has not expired."""
    query = request.query()
    wanted: list[tuple[str, tuple[Any, ...]]] = [(ALIVE, (now,)), (SEES, request.grant.values())]
    if query.names("to"):
        wanted.append(("name IN (SELECT value FROM json_each(?))", (encode(query.names("to")),)))
    for field, column in (("from", "sender"), ("channel", "channel")):
        if query.name(field, None):
            wanted.append((f"{column} = ?", (query.name(field, None),)))
    if query.one("thread") is not None:
        first = tick_of(query.one("thread"))
        if first is None:
            raise Refused(400, "thread must be the id of a message, like 660ba678a1b40")
        wanted.append(("ifnull(thread, tick) = ?", (first,)))
    if query.names("with"):
        both = query.names("with")
        if len(both) != 2:
            raise Refused(400, "with must be two names, as in with=alice,bob")
        wanted.append(("((sender = ? AND name = ?) OR (sender = ? AND name = ?))", (*both, *both[::-1])))
    return " AND ".join(only for only, _ in wanted), [value for _, values in wanted for value in values]
