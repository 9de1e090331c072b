"""Schedules: messages that are sent later, once or again and again (PROTOCOL.md section 27).

A row of the table `later` is a schedule. When it is due, the bus makes a POST /send of its message, as if its sender
did so then. So every check of a send and the limits of its sender apply. Its key is the id of the schedule, so it is
stored once, also if the bus is killed before the row is gone. Times are on the wall clock, in us.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import secrets
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from bus_server import (
    ANSWER_BYTES,
    MAX_MESSAGES,
    SOUND,
    TTL_MAX,
    Answer,
    Bus,
    Connection,
    Metric,
    Refused,
    Request,
    encode,
    key_of,
    ok,
    parse_json,
    parts_of,
    seconds,
    too_much,
)

if TYPE_CHECKING:
    import _later_due as sending
    import _later_schedule as schedules
else:
    schedules, sending = parts_of(__file__, "_later_schedule", "_later_due")

TABLES, NOUN, OPERATIONS = schedules.TABLES, "schedules", (schedules.Keep, schedules.Move, schedules.Drop)

EXAMPLE = '{"after": 60, "message": {...}}'


def options(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def start(bus: Bus, options: argparse.Namespace) -> None:
    Later(bus)


class Later:
    """The endpoints. Owned by the loop."""

    def __init__(self, bus: Bus) -> None:
        self.bus, self.due = bus, sending.Due(bus)
        bus.route("POST", "/later", self.post, "send a message later, or take it back until then")
        bus.route("GET", "/later", self.list, "the messages that are to be sent later")
        bus.metrics.append(self.figures)

    # Giving

    def post(self, request: Request) -> None:
        self.bus.check_open()
        self.bus.storms.read(request.owner())
        said = parse_json(request.body)
        if not isinstance(said, dict):
            raise Refused(400, f"the body must be a JSON object, like {EXAMPLE}")
        if "cancel" in said:
            self.cancel(request, said["cancel"])
        else:
            self.give(request, said)

    def give(self, request: Request, said: dict[str, Any]) -> None:
        bus, owner, message = self.bus, request.owner(), request.grant.sign(said.get("message"))
        if isinstance(message, list) or (isinstance(message, dict) and message.get("key") is not None):
            raise Refused(400, "message must be one message without a key: give the key beside it")
        if isinstance(message, dict):
            message.pop("key", None)  # null is none, and the schedule gets one
        text = encode(message)
        [one], _ = bus.sending.drafts(self.due.request(request.peer, request.grant, text))
        with bus.storms.parsing(owner, 0):  # it pays for the time: a line that hardly any day fits takes 3 ms
            at, cron = self.time(said)
        key = key_of(said, request.fields.get("idempotency-key"))
        bus.storms.spend(one.sender, 1)
        size = sending.ROW + len(text)
        if not self.due.has_room(owner, size):
            why = "too many messages wait to be sent later: take some back with cancel, or wait until they are sent"
            raise too_much(why, 60)
        whole = f"{one.sender} {one.channel} {key}".encode()
        id = hashlib.sha256(whole).hexdigest()[:16] if key else secrets.token_hex(8)
        keep = schedules.Keep([id, one.sender, request.grant.token, request.peer.address, cron, text], at)
        bus.do(keep, request.peer, partial(self.kept, owner, size), lambda keep: self.due.held.add(owner, -size))
        self.due.held.add(owner, size)

    def time(self, said: dict[str, Any]) -> tuple[int, str | None]:
        """The time that a request names, and its cron line."""
        now = self.bus.view.clock()
        given = [member for member in ("at", "after", "cron") if said.get(member) is not None]
        if len(given) != 1:
            raise Refused(400, f"a schedule needs one of at, after and cron, and a message: {EXAMPLE}")
        value = said[given[0]]
        if given[0] == "cron":
            try:
                return schedules.cron_of(str(value)).after(now), str(value)
            except ValueError as error:
                raise Refused(400, str(error)) from None
        since, what = (0, "seconds since 1970") if given[0] == "at" else (now, "seconds from now")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= (now - since) / 1000000 + TTL_MAX:
            raise Refused(400, f"{given[0]} must be a number of {what}, at most 30 years ahead")
        return since + round(value * 1000000), None

    def kept(self, owner: str, size: int, peer: Connection, keep: schedules.Keep, result: tuple[int, bool]) -> Answer:
        at, duplicate = result
        self.due.given(owner, at)
        if duplicate:
            self.due.held.add(owner, -size)
        return ok(
            self.bus, f'"ok": true, "id": "{keep.facts[0]}", "at": {seconds(at)}, "duplicate": {encode(duplicate)}'
        )

    # Taking back, and the list

    def cancel(self, request: Request, id: Any) -> None:
        for found in [*self.due.rows("id = ?", str(id))]:
            if request.grant.operator or found.sender == request.grant.name:
                self.due.take_back(found, request.peer)
                return
        raise sending.gone()

    def list(self, request: Request) -> Answer:
        """A page, in the order in which they were given."""
        self.bus.storms.read(request.owner())
        query, grant = request.query(), request.grant
        whose = query.name("from", None if grant.operator else grant.name)
        if not grant.operator and whose != grant.name:
            raise Refused(403, f"this token may see the schedules of {grant.name} only: leave from out")
        limit, after = int(query.number("max", 100, 1, MAX_MESSAGES)), int(query.number("after", 0, 0, SOUND))
        shown: list[str] = []
        more, size = "", 0
        where = "sender = ? AND number > ?" if whose else "? IS NULL AND number > ?"
        found = contextlib.closing(self.due.rows(f"{where} ORDER BY number", whose, after))
        with self.bus.storms.parsing(request.owner(), 0), found as rows:  # it pays for the time: 9 us for each of them
            for each in filter(self.due.is_sound, rows):
                if len(shown) == limit or size > ANSWER_BYTES:
                    more = f', "more": true, "next": "{after}"'
                    break
                shown.append(each.render())
                after, size = each.number, size + len(shown[-1])
        return ok(self.bus, f'"schedules": [{", ".join(shown)}]{more}')

    def figures(self) -> Iterator[Metric]:
        number = "(SELECT count(*) FROM later WHERE failed IS NULL), (SELECT count(*) FROM later WHERE failed > 0)"
        waiting, failed = self.bus.view.ask(f"SELECT {number}")
        states = [('{state="waiting"}', waiting), ('{state="failed"}', failed)]
        yield "schedules", "gauge", "messages that are to be sent later, or could not be", states
