"""The tables of reservations, and the operations that change them. Part of locks.py, which is loaded with this file."""

from __future__ import annotations

import itertools
from sqlite3 import Connection as Database
from typing import Any, NamedTuple

from _locks_names import Wanted, is_wild

from bus_server import Now, Operation, Refused, State, encode, too_much

TTL_MAX = 43200.0  # s
LONGEST = int(TTL_MAX * 1000000)  # us

TABLES = [
    """
    CREATE TABLE locks(
        fence INTEGER PRIMARY KEY,  -- a tick
        channel TEXT NOT NULL, holder TEXT NOT NULL, shared INTEGER NOT NULL,
        until INTEGER NOT NULL,     -- steady clock, us
        why TEXT NOT NULL,
        token TEXT NOT NULL,        -- the id of the token that asked for it; '' on a bus without tokens
        owner TEXT NOT NULL);       -- whose limits it counts for
    CREATE TABLE lock_names(
        channel TEXT NOT NULL, name TEXT NOT NULL, fence INTEGER NOT NULL,
        wild INTEGER NOT NULL,      -- it has a wildcard
        PRIMARY KEY(channel, name, fence)) WITHOUT ROWID;
    CREATE INDEX ends_of_locks ON locks(until);
    CREATE INDEX owners_of_locks ON locks(owner);
    CREATE INDEX names_of_locks ON lock_names(fence);
    CREATE TRIGGER lock_removed AFTER DELETE ON locks BEGIN DELETE FROM lock_names WHERE fence = old.fence; END;
    CREATE VIEW locks_kept AS SELECT -fence AS tick FROM locks WHERE until > 1000000 * strftime('%s', 'now');
    """
]
BOTH = "lock_names JOIN locks USING (fence)"
LASTING = "until > ? AND until <= ?"  # now, now + LONGEST: a text, which is damage, lies above every number
AMONG = "IN (SELECT value FROM json_each(?))"


class Held(NamedTuple):
    """A reservation that is in the way of a request."""

    fence: int
    name: str  # one of its names
    wanted: str  # the name in the request that overlaps it
    holder: str
    shared: bool
    until: int  # steady clock, us
    why: str
    token: str


class Taken(NamedTuple):
    """The result of a Lock that succeeded."""

    fence: int
    until: int  # steady clock, us
    is_new: bool  # else its holder had this reservation before


def end_some(state: State, now: Now) -> None:
    """Remove what has ended. A time that is damaged, or comes from a clock that was ahead, becomes the longest ttl."""
    state.writing.execute("DELETE FROM locks WHERE until <= ?", (now.steady,))
    longest = now.steady + LONGEST
    state.writing.execute("UPDATE locks SET until = ? WHERE until > ?", (longest, longest))


class Comparing(Operation):
    """An operation that compares names. What that cost is no part of its data: it is known after apply()."""

    noted = __slots__ = ("cost",)  # a front applies a copy, which has it then, and gives it back


class Lock(Comparing):
    """Reserve names, all or none. The result is Taken, or a list of what is in the way.

    If the holder has the very same reservation, that one goes on with the same fence, so a retry makes no second one.
    """

    __slots__ = ("channel", "holder", "names", "owner", "shared", "token", "ttl_us", "why")
    kind = "lock"

    EACH, EACH_WILD = 1024, 32  # names of one owner; those with a wildcard, which each request is compared with
    ALL, ALL_WILD = 8192, 256  # the same of all owners

    def __init__(
        self, channel: str, holder: str, names: list[str], shared: bool, ttl_us: int, why: str, token: str, owner: str
    ) -> None:
        self.channel, self.holder, self.shared = channel, holder, shared
        self.names = names  # in order, each once
        self.ttl_us, self.why, self.token, self.owner = ttl_us, why, token, owner
        self.cost = 0

    def apply(self, state: State, now: Now) -> Taken | list[Held]:
        end_some(state, now)
        held = self.in_the_way(state)
        if held:
            return held
        until, before = now.steady + self.ttl_us, self.before(state)
        if before:
            change = "until = max(until, ?), why = ifnull(?, why), token = ?, owner = ?"
            values = until, self.why or None, self.token, self.owner, before
            state.writing.execute(f"UPDATE locks SET {change} WHERE fence = ?", values)
            [until] = state.writing.execute("SELECT until FROM locks WHERE fence = ?", (before,)).fetchone()
            return Taken(before, until, False)
        self.check_room(state)
        fence = state.last = max(now.wall, state.last + 1)  # a tick of its own, as Raise makes one
        state.ahead = True
        row = fence, self.channel, self.holder, self.shared, until, self.why, self.token, self.owner
        state.writing.execute("INSERT INTO locks VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        rows = [(self.channel, own, fence, is_wild(own)) for own in self.names]
        state.writing.executemany("INSERT INTO lock_names VALUES (?, ?, ?, ?)", rows)
        return Taken(fence, until, True)

    def in_the_way(self, state: State) -> list[Held]:
        """The reservations of others that overlap a name, the oldest first. Shared ones do not exclude each other."""
        wanted, found = Wanted(self.names), dict[int, Held]()
        try:
            for fence, stored, its_wild, holder, shared, until, why, token in self.candidates(state, wanted):
                own = str(stored)
                mine = None if fence in found else wanted.overlapping(own, bool(its_wild))
                if mine is not None:
                    found[fence] = Held(fence, own, mine, str(holder), bool(shared), until, str(why), str(token))
        finally:
            self.cost = wanted.cost
        return [*found.values()]

    def candidates(self, state: State, wanted: Wanted) -> list[Any]:
        """Names of others that may overlap: the same ones, those with wildcards, and those that begin as ours do."""
        which = f"lock_names.channel = ? AND (wild OR name {AMONG}{' OR name BETWEEN ? AND ?' * len(wanted.wild)})"
        begin = [(first, f"{first}\U0010ffff") for _, (first, _) in wanted.wild]
        values = self.channel, encode(self.names), *itertools.chain(*begin)
        [many] = state.writing.execute(f"SELECT count(*) FROM lock_names WHERE {which}", values).fetchone()
        wanted.spend(3 * many)  # one takes some 3 us
        rows = (
            f"SELECT fence, name, wild, holder, shared, until, why, token FROM {BOTH} WHERE {which} "
            "AND holder != ? AND NOT (shared AND ?) ORDER BY fence, name"
        )
        return state.writing.execute(rows, (*values, self.holder, self.shared)).fetchall()

    def before(self, state: State) -> int | None:
        """The fence of the holder's reservation of the same names."""
        with_first = f"SELECT fence FROM {BOTH} WHERE lock_names.channel = ? AND name = ? AND holder = ? AND shared = ?"
        values = self.channel, self.names[0], self.holder, self.shared
        for (fence,) in state.writing.execute(f"{with_first} ORDER BY fence", values).fetchall():
            rows = state.writing.execute("SELECT name FROM lock_names WHERE fence = ? ORDER BY name", (fence,))
            if [own for (own,) in rows.fetchall()] == self.names:
                return int(fence)
        return None

    def check_room(self, state: State) -> None:
        wild = sum(map(is_wild, self.names))
        count = f"SELECT count(*), ifnull(sum(wild), 0) FROM {BOTH}"
        for which, values, most, most_wild, who in (
            ("owner = ?", (self.owner,), self.EACH, self.EACH_WILD, self.holder),
            ("1", (), self.ALL, self.ALL_WILD, "all agents together"),
        ):
            [its, its_wild] = state.writing.execute(f"{count} WHERE {which}", values).fetchone()
            if its + len(self.names) > most or its_wild + wild > most_wild:
                limits = f"{most} names, {most_wild} of them with wildcards"
                raise too_much(f"{who} would reserve more than {limits}: release what is done, or wait", 60)


class Renew(Operation):
    """The holder wants more time for a reservation. The result is its new end on the steady clock."""

    __slots__ = ("fence", "holder", "owner", "token", "ttl_us")
    kind = "renew"

    def __init__(self, fence: int, holder: str, ttl_us: int, token: str, owner: str) -> None:
        self.fence, self.holder, self.ttl_us, self.token, self.owner = fence, holder, ttl_us, token, owner

    def apply(self, state: State, now: Now) -> int:
        end_some(state, now)
        until = now.steady + self.ttl_us
        change = "UPDATE locks SET until = ?, token = ?, owner = ? WHERE fence = ? AND holder = ?"
        values = until, self.token, self.owner, self.fence, self.holder
        if not state.writing.execute(change, values).rowcount:
            raise Refused(409, "you have no such reservation, or it has ended: ask for it again before you go on")
        return until


class Unlock(Operation):
    """Release one reservation by its fence, or names of the holder. The result: the fences, and how many names."""

    __slots__ = ("channel", "fence", "holder", "names")
    kind = "unlock"

    def __init__(self, channel: str, holder: str, fence: int, names: list[str]) -> None:
        self.channel, self.holder = channel, holder  # '': an operator, who may release any fence
        self.fence, self.names = fence, names  # 0: these names

    def apply(self, state: State, now: Now) -> tuple[list[int], int]:
        end_some(state, now)
        mine = f"lock_names.channel = ? AND holder = ? AND name {AMONG}"
        which, *values = (
            ("fence = ?", self.fence) if self.fence else (mine, self.channel, self.holder, encode(self.names))
        )
        rows = f"SELECT fence, name, holder FROM {BOTH} WHERE {which} ORDER BY fence, name"
        gone = state.writing.execute(rows, values).fetchall()
        for _, _, holder in gone:
            if self.holder not in ("", holder):
                raise Refused(403, f"{holder} holds this: only {holder} or an operator can release it")
        state.writing.executemany("DELETE FROM lock_names WHERE fence = ? AND name = ?", [each[:2] for each in gone])
        fences = [*dict.fromkeys(fence for fence, _, _ in gone)]
        empty = "fence = ? AND NOT EXISTS (SELECT 1 FROM lock_names WHERE lock_names.fence = locks.fence)"
        state.writing.executemany(f"DELETE FROM locks WHERE {empty}", [(fence,) for fence in fences])
        return fences, len(gone)


class Lapse(Operation):
    """Remove what has ended, and what was reserved with these tokens, which are revoked. The result: their fences."""

    __slots__ = ("tokens",)
    kind = "lapse"

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens

    def apply(self, state: State, now: Now) -> list[int]:
        end_some(state, now)
        revoked, values = f"token {AMONG}", (encode(self.tokens),)
        rows = state.writing.execute(f"SELECT fence FROM locks WHERE {revoked} ORDER BY fence", values).fetchall()
        state.writing.execute(f"DELETE FROM locks WHERE {revoked}", values)
        return [fence for (fence,) in rows]


def tokens_used(database: Database, steady: int) -> tuple[list[str], bool]:
    """The tokens of all reservations, and whether one has ended and is still in the table."""
    tokens = database.execute("SELECT DISTINCT token FROM locks").fetchall()
    ended = database.execute("SELECT 1 FROM locks WHERE until <= ? LIMIT 1", (steady,)).fetchone()
    return [str(token) for (token,) in tokens], bool(ended)
