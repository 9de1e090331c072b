"""What requests about reservations say, and their answers. Part of locks.py, which is loaded with this file."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from sqlite3 import Connection as Database
from typing import Any, NamedTuple

from _locks_names import Wanted, fault, is_wild
from _locks_state import AMONG, LASTING, LONGEST, TTL_MAX, Held, Lock

from bus_server import (
    HOLD_MAX,
    Answer,
    Bus,
    Draft,
    Key,
    Message,
    Now,
    Query,
    Refused,
    Request,
    boolean,
    channel_of,
    draft,
    encode,
    iso,
    ok,
    parse_json,
    seconds,
    speaker,
)

TTL, TTL_MIN = 600.0, 1.0  # s a reservation lasts when its holder does not say; and at least
NAMES, WILD = 64, 8  # names in one request; those with a wildcard
WHY = 200  # characters
WORK, COMPARED = 1 << 16, 128  # bytes of answers that a request costs, and that each compared character costs
WANTED = "reservations wanted"  # with a fence: who waits for it waits here


class Row(NamedTuple):
    """A reservation in a list."""

    fence: int
    channel: str
    holder: str
    shared: bool
    until: int  # steady clock, us
    why: str
    token: str
    names: list[str]


class Waiter(NamedTuple):
    """A request that waits for names that others hold."""

    request: Request  # without a large body
    lock: Lock
    until: float  # monotonic clock, s
    fence: int = 0  # of one reservation in its way
    name: str = ""  # in it, which overlaps

    @property
    def channel(self) -> str:
        return self.lock.channel

    @property
    def hold(self) -> float:
        return self.until - time.monotonic()

    @property
    def token(self) -> str:
        return self.request.grant.token

    @property
    def who(self) -> str:
        return self.lock.holder

    def places(self) -> Sequence[Key]:
        return [(WANTED, self.fence), (f"{WANTED} on {self.channel}", self.who)]

    def present(self) -> Sequence[str]:
        return ()

    def wants(self, message: Message) -> bool:
        return False


class Said(NamedTuple):
    """What all requests that change reservations say."""

    members: dict[str, Any]
    holder: str
    channel: str

    @classmethod
    def by(cls, request: Request) -> Said:
        may_know(request)
        members = request.grant.sign(parse_json(request.body))
        if not isinstance(members, dict):
            raise Refused(400, "the body must be a JSON object")
        return cls(members, speaker(members.get("from"), "from"), channel_of(members.get("channel")))

    def seconds(self, field: str, default: float, low: float, high: float) -> float:
        return Query.of_members(self.members).number(field, default, low, high)

    def ttl_us(self) -> int:
        return int(self.seconds("ttl", TTL, TTL_MIN, TTL_MAX) * 1000000)

    def until(self) -> float:
        """Until when the request may wait, on the monotonic clock."""
        return time.monotonic() + self.seconds("wait", 0, 0, HOLD_MAX)

    def names(self) -> list[str]:
        given = self.members.get("names")
        names = [given] if isinstance(given, str) else given
        if not isinstance(names, list) or not 1 <= len(names) <= NAMES:
            raise Refused(400, f"names must be a list of 1 to {NAMES} names, like src/a.py or src/db/*")
        for each in names:
            if wrong := fault(each):
                raise Refused(400, wrong)
        return sorted({*names})

    def fence(self) -> int:
        fence = self.members.get("fence")
        if isinstance(fence, bool) or not isinstance(fence, int) or not 0 < fence < 1 << 53:
            raise Refused(400, "fence must be the number that /lock has answered")
        return fence

    def lock(self, token: str, owner: str) -> Lock:
        names, shared, why = self.names(), self.members.get("shared", False), self.members.get("why", "")
        if not isinstance(shared, bool):
            raise Refused(400, "shared must be true or false")
        if not isinstance(why, str) or len(why) > WHY:
            raise Refused(400, f"why must be a text of at most {WHY} characters")
        if sum(map(is_wild, names)) > WILD:
            raise Refused(400, f"at most {WILD} names of one request may have wildcards")
        return Lock(self.channel, self.holder, names, shared, self.ttl_us(), why, token, owner)


def may_know(request: Request) -> None:
    """Reservations show names: 403 if the token may only send."""
    request.grant.check((request.grant.name,))


def path_of(given: str) -> str:
    wrong = fault(given) or ("*" in given or "?" in given) and f"{given!a} has wildcards: name is one path here"
    if wrong:
        raise Refused(400, wrong)
    return given


def listed(
    database: Database, steady: int, after: int, limit: int, only: dict[str, str], fences: list[int] | None
) -> Iterator[Row]:
    """Reservations that last, in the order of their fences. `only`: columns and the values they must have."""
    columns = "fence, channel, holder, shared, until, why, token"
    which = "".join(f" AND {column} = ?" for column in only) + (f" AND fence {AMONG}" if fences is not None else "")
    values = [after, steady, steady + LONGEST, *only.values(), *([] if fences is None else [encode(fences)])]
    rows = f"SELECT {columns} FROM locks WHERE fence > ? AND {LASTING}{which} ORDER BY fence LIMIT ?"
    names = "SELECT name FROM lock_names WHERE fence = ? ORDER BY name"
    for fence, channel, holder, shared, until, why, token in database.execute(rows, (*values, limit)).fetchall():
        its = [str(own) for (own,) in database.execute(names, (fence,)).fetchall()]
        yield Row(fence, str(channel), str(holder), bool(shared), until, str(why), str(token), its)


def fences_over(database: Database, channel: str, path: Wanted) -> list[int]:
    """The fences of all reservations that cover one path."""
    rows = "SELECT fence, name FROM lock_names WHERE channel = ? AND (wild OR name = ?)"
    named = database.execute(rows, (channel, path.names[0][0])).fetchall()
    return [fence for fence, own in named if path.covered(str(own))]


def covering(bus: Bus, request: Request, channel: str, given: str) -> list[int]:
    """The fences of all reservations that cover a path. Its reader pays for what is compared."""
    path = Wanted([path_of(given)])
    bus.storms.pay(request.owner())
    try:
        return fences_over(bus.view.database, channel, path)
    finally:
        bus.storms.worked(request.owner(), "", path.cost * COMPARED)


def wall(steady: int, now: Now) -> str:
    """A moment of the steady clock, as the wire writes times."""
    return seconds(now.wall + steady - now.steady)


def entry(row: Row, now: Now, waiting: str) -> str:
    """A reservation in a list, as JSON."""
    about = {"channel": row.channel, "holder": row.holder, "names": row.names, "shared": row.shared, "why": row.why}
    times = f'"since": {seconds(row.fence)}, "until": {wall(row.until, now)}'
    return f'{{"fence": {row.fence}, {encode(about)[1:-1]}, {times}, "waiting": {waiting}}}'


def wish(lock: Lock, held: Held, now: Now) -> Draft:
    """A message to a holder, from who waits. Its key makes it one for each reservation and waiter."""
    message = {
        "from": lock.holder,
        "to": held.holder,
        "channel": lock.channel,
        "type": "lock-wanted",
        "subject": f"{lock.holder} waits for {held.wanted}",
        "msg": f"You hold {held.name}, with fence {held.fence}. Release it when you are done: {lock.holder} waits.",
        "fence": held.fence,
        "ttl": max((held.until - now.steady) / 1000000, 1),
    }
    return draft(message, f"lock-{held.fence}-{lock.holder}")


def in_the_way(bus: Bus, held: list[Held], now: Now) -> Answer:
    """409, with the reservations that are in the way, as many as fit."""
    rows = [
        f'{{"fence": {each.fence}, "holder": {encode(each.holder)}, "name": {encode(each.name)}, '
        f'"wanted": {encode(each.wanted)}, "shared": {boolean(each.shared)}, "why": {encode(each.why)}, '
        f'"until": {wall(each.until, now)}}}'
        for each in held[:NAMES]
    ]
    first, others = held[0], f", and {len(held) - 1} more are in the way" if len(held) > 1 else ""
    until = iso(now.wall + first.until - now.steady)
    its = first.name if first.name == first.wanted else f"{first.name} ({first.wanted} was asked for)"
    why = f"{first.holder} holds {its} until {until}{others}: do something else, or wait for it"
    return ok(bus, f'"error": {encode(why)}, "held": [{", ".join(rows)}]')._replace(status=409)
