"""Reservations: an agent says what it is about to change, and others see it (PROTOCOL.md section 24).

A reservation is a row of the table `locks`, with its names in `lock_names`. It belongs to a holder and ends by itself:
`until` is on the steady clock, so that a step of the wall clock ends none. Its fence is a tick, so fences only grow,
also over a restart or a restored copy. A request that waits is parked at the fence of one reservation in its way. It
asks again when that one is released or has ended, because before that it cannot succeed. Each commit compares one
request. Its owner pays for what was compared, each time that the request asks.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from bus_server import (
    ANSWER_BYTES,
    BUSY,
    LINGER,
    PARKED,
    PARKED_PER_NAME,
    Answer,
    Bus,
    Connection,
    Message,
    Now,
    Refused,
    Request,
    Waits,
    encode,
    nothing_follows,
    ok,
    parts_of,
    refusal,
)

if TYPE_CHECKING:
    import _locks_names as paths
    import _locks_state as its
    import _locks_words as words
    from _locks_words import WANTED, Waiter
else:
    paths, its, words = parts_of(__file__, "_locks_names", "_locks_state", "_locks_words")
    WANTED, Waiter = words.WANTED, words.Waiter

TABLES, NOUN, OPERATIONS = its.TABLES, "reservations", (its.Lock, its.Renew, its.Unlock, its.Lapse)

WAITING, SHOWN = 256, 16  # requests that wait for one reservation; the names of those that are shown
PAGE = 1000  # reservations


def options(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def start(bus: Bus, options: argparse.Namespace) -> None:
    Locks(bus)


class Locks:
    """The endpoints of reservations, and who waits for one. Owned by the loop."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.queue: deque[tuple[Connection, Waiter]] = deque()
        self.asking = False  # one of them is with the ledger
        bus.route("POST", "/lock", self.lock, "reserve names, all or none; wait=25 waits for who holds them")
        bus.route("POST", "/renew", self.renew, "more time for a reservation")
        bus.route("POST", "/unlock", self.unlock, "release a reservation, or names of it")
        bus.route("GET", "/locks", self.listing, "who holds which names; name=PATH: who holds this one")
        bus.waits[Waiter] = Waits(self.woken, self.woken)
        bus.on_tidy.append(self.lapse)
        for each, then in ((its.Renew, self.renewed), (its.Unlock, self.unlocked), (its.Lapse, self.lapsed)):
            bus.ledger.elsewhere[each.kind] = partial(then, None)

    # Endpoints

    def lock(self, request: Request) -> None:
        said = self.said(request)
        lock = said.lock(request.grant.token, request.owner())
        self.bus.storms.pay(request.owner())
        if request.is_large():
            request.shrink()
        self.ask(request.peer, Waiter(request, lock, said.until()))

    def said(self, request: Request) -> words.Said:
        self.bus.check_open()
        self.bus.storms.read(request.owner())
        return words.Said.by(request)

    def renew(self, request: Request) -> None:
        said = self.said(request)
        renew = its.Renew(said.fence(), said.holder, said.ttl_us(), request.grant.token, request.owner())
        self.bus.do(renew, request.peer, self.renewed)

    def unlock(self, request: Request) -> None:
        said, grant = self.said(request), request.grant
        if ("fence" in said.members) == ("names" in said.members):
            raise Refused(400, "give fence, or names: what to release")
        fence, names = (said.fence(), []) if "fence" in said.members else (0, said.names())
        holder = "" if fence and grant.operator and grant.token else said.holder
        self.bus.do(its.Unlock(said.channel, holder, fence, names), request.peer, self.unlocked)

    def listing(self, request: Request) -> Answer:
        """The reservations in the order of their fences, or those that cover one path."""
        bus, query, database = self.bus, request.query(), self.bus.view.database
        bus.storms.read(request.owner())
        words.may_know(request)
        after, limit, path = query.one("after") or "0", int(query.number("max", PAGE, 1, PAGE)), query.one("name")
        if not (after.isdecimal() and len(after) <= 16):
            raise Refused(400, "after must be the number that the last answer has as `next`")
        only = {each: own for each in ("channel", "holder") if (own := query.name(each, None))}
        fences = None
        if path is not None:
            fences = words.covering(self.bus, request, only.setdefault("channel", "default"), path)
        now, size, more, last = bus.clock.now(), 0, "", after
        shown: list[str] = []
        with bus.storms.parsing(request.owner(), 0):  # it pays for the time: 15 us for each of them
            for looked, row in enumerate(words.listed(database, now.steady, int(after), limit + 1, only, fences)):
                if looked == limit or size > ANSWER_BYTES:
                    more = f', "more": true, "next": "{last}"'
                    break
                last = str(row.fence)
                if bus.gate.holds(row.token):
                    shown.append(words.entry(row, now, self.waiting(row.fence)))
                    size += len(shown[-1])
        return ok(bus, f'"locks": [{", ".join(shown)}]{more}')

    def waiting(self, fence: int) -> str:
        """Those who wait for a reservation, some of them, as JSON."""
        mailboxes = self.bus.mailboxes
        names = (mailboxes.parked[each].who for each in mailboxes.waiting.get((WANTED, fence), ()))
        return encode([*islice(dict.fromkeys(names), SHOWN)])

    # After an operation

    def ask(self, connection: Connection, waiter: Waiter) -> None:
        """A comparison may take 20 ms of a commit, so there is one in each: the others wait for their turn.

        With an idle ledger the last one is over, even if asked() has failed."""
        self.queue.append((connection, waiter))
        if not self.asking or self.bus.draining or self.bus.ledger.idle():
            self.ask_next()

    def ask_next(self) -> None:
        self.asking = False
        while self.queue and (not self.asking or self.bus.draining):
            connection, waiter = self.queue.popleft()
            try:
                self.bus.storms.pay(waiter.lock.owner)
            except Refused as refused:
                connection.answer(refusal(refused))
            else:
                self.bus.do(waiter.lock, connection, partial(self.asked, waiter), self.tried)
                self.asking = True

    def tried(self, lock: its.Lock) -> None:
        """It was refused, or answered by asked(): its owner pays, and the next one asks."""
        self.bus.storms.worked(lock.owner, "", words.WORK + lock.cost * words.COMPARED)
        self.ask_next()

    def asked(
        self, waiter: Waiter, connection: Connection, lock: its.Lock, result: its.Taken | list[its.Held]
    ) -> Answer | None:
        """Answer a request for names, or park it. If a token in its way was revoked, its reservations go first."""
        self.tried(lock)
        bus, now = self.bus, self.bus.clock.now()
        if isinstance(result, its.Taken):
            has_gone = connection.phase is LINGER or (connection.ended and waiter.fence)  # it hung up while it waited
            if has_gone and result.is_new:  # others can have it at once
                bus.do(its.Unlock(lock.channel, lock.holder, result.fence, []), None, self.unlocked)
                raise Refused(409, "you hung up while you waited: the names are free again")
            return ok(bus, f'"fence": {result.fence}, "until": {words.wall(result.until, now)}')
        revoked = [held.token for held in result if not bus.gate.holds(held.token)]
        if revoked:
            bus.do(its.Lapse(revoked), connection, partial(self.lapsed_for, waiter))
            return None
        first = result[0]
        waits = waiter._replace(fence=first.fence, name=first.name)
        crowds = [len(bus.mailboxes.waiting.get(place, ())) for place in waits.places()]
        is_full = crowds[0] >= WAITING or crowds[1] >= PARKED_PER_NAME
        if waiter.hold <= 0 or is_full or connection.phase is not BUSY or connection.ended or bus.draining:
            return words.in_the_way(bus, result, now)
        bus.park(connection, waits, max(first.until - now.steady, 0) / 1000000)
        if waiter.fence != first.fence and bus.gate.holds(waits.token):
            self.tell(waits, first, now)
        return None

    def tell(self, waiter: Waiter, held: its.Held, now: Now) -> None:
        """Tell the holder who waits."""
        with contextlib.suppress(Refused):  # its mailbox is full, or they write to each other too often
            drafts = [words.wish(waiter.lock, held, now)]
            self.bus.sending.check(waiter.request.owner(), drafts)
            self.bus.do(self.bus.ledger.put(drafts, waiter.request.owner()), None, nothing_follows)

    def renewed(self, connection: Connection | None, renew: its.Renew, until: int) -> Answer:
        """Those who wait ask again when it ends, which may be earlier than before. Now that would not help them."""
        mailboxes, now = self.bus.mailboxes, self.bus.clock.now()
        for waiting in mailboxes.waiting.get((WANTED, renew.fence), ()):
            waiting.wait(PARKED, min(mailboxes.parked[waiting].hold, max(until - now.steady, 0) / 1000000))
        members = f'"fence": {renew.fence}, "until": {words.wall(until, now)}, "waiting": {self.waiting(renew.fence)}'
        return ok(self.bus, members)

    def unlocked(self, connection: Connection | None, unlock: its.Unlock, result: tuple[list[int], int]) -> Answer:
        fences, names = result
        self.wake(fences, unlock.names)
        return ok(self.bus, f'"ok": true, "released": {names}')

    def lapse(self) -> None:
        """Remove what has ended, and the reservations of revoked tokens."""
        tokens, has_ended = its.tokens_used(self.bus.view.database, self.bus.clock.now().steady)
        revoked = [token for token in tokens if not self.bus.gate.holds(token)]
        if revoked or has_ended:
            self.bus.do(its.Lapse(revoked), None, self.lapsed)

    def lapsed(self, connection: Connection | None, lapse: its.Lapse, fences: list[int]) -> None:
        self.wake(fences)

    def lapsed_for(self, waiter: Waiter, connection: Connection, lapse: its.Lapse, fences: list[int]) -> None:
        self.wake(fences)
        self.ask(connection, waiter)

    # Waiting

    def wake(self, fences: Iterable[int], names: Sequence[str] = ()) -> None:
        """Those who wait for these, or for these names of them, ask again in the order in which they came."""
        mailboxes = self.bus.mailboxes
        for fence in fences:
            for connection in mailboxes.waiting.get((WANTED, fence), ()):
                parked = mailboxes.parked[connection]
                if isinstance(parked, Waiter) and (not names or parked.name in names):
                    connection.soon(partial(self.again, connection, parked))

    def again(self, connection: Connection, waiter: Waiter) -> None:
        if self.bus.mailboxes.parked.get(connection) is waiter and not connection.ends_if_revoked():
            self.bus.mailboxes.unpark(connection)
            self.woken(connection, waiter)

    def woken(self, connection: Connection, waiter: Waiter, messages: Sequence[Message] = ()) -> None:
        """What it waited for has ended, or its hold is over: the answer to the last try says what is in the way."""
        connection.phase, connection.due = BUSY, math.inf
        self.ask(connection, waiter)
