"""The tokens of a bus with several fronts: what a command writes beside one front holds at all of them.

The commands invite and revoke write DATABASE.tokens, as on a bus of one machine. Its front puts what is new there into
the ledger, and every front writes what comes from the ledger into its own file. A token is made once, and may be
revoked once. So when two files are merged, a token is revoked if either of them says so.

What came from the ledger holds from the moment at which its entry was applied, before the file has it. A token is in
the ledger before all that was done with it, and expires by the ledger's clock. So no front takes a token for revoked
that another one accepts.
"""

from __future__ import annotations

import fcntl
import json
from itertools import chain
from typing import Any

from bus_server import (
    Bus,
    Now,
    Operation,
    Row,
    State,
    Tokens,
    Unusable,
    encode,
    open_beside,
    say,
    written_anew,
)

TABLE = "CREATE TABLE front_tokens(id TEXT PRIMARY KEY, line TEXT NOT NULL)"


class Grants(Operation):
    """Tokens that were made or revoked beside one front."""

    __slots__ = ("rows",)
    kind = "tokens"

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def apply(self, state: State, now: Now) -> None:
        lines = [(row["id"], encode(row)) for row in merged(stored(state.writing), self.rows).values()]
        state.writing.executemany("INSERT OR REPLACE INTO front_tokens VALUES (?, ?)", lines)


def stored(database: Any) -> dict[str, Row]:
    """The tokens that came from the ledger, by their id."""
    rows = [json.loads(line) for (line,) in database.execute("SELECT line FROM front_tokens ORDER BY id").fetchall()]
    return {row["id"]: row for row in rows}


def revoked(database: Any, tokens: list[str]) -> set[str]:
    """Those of these tokens that were revoked by an entry of the ledger before this one."""
    asked = "SELECT line FROM front_tokens WHERE id IN (SELECT value FROM json_each(?))"
    found = database.execute(asked, (encode(tokens),)).fetchall()
    return {row["id"] for row in map(json.loads, chain(*found)) if row["revoked"]}


def merged(known: dict[str, Row], others: list[Row]) -> dict[str, Row]:
    known = dict(known)
    for row in others:
        first = known.get(row["id"], row)
        known[row["id"]] = {**first, "revoked": first["revoked"] or row["revoked"]}
    return known


def write(tokens: Tokens, rows: list[Row], lock_how: int = fcntl.LOCK_EX) -> None:
    """Bring the file up to date. A command that is writing it too is waited for; with LOCK_NB: BlockingIOError."""
    if rows:
        with open_beside(f"{tokens.path}.lock") as lock:
            fcntl.flock(lock, lock_how)
            before = Tokens.rows(tokens)
            after = list(merged({row["id"]: row for row in before}, rows).values())
            if after != before:
                with written_anew(tokens.path) as file:
                    file.writelines(f"{encode(row)}\n" for row in after)


class Held(Tokens):
    """The tokens of a front: those of its file, and those that came from the ledger."""

    def __init__(self, bus: Bus) -> None:
        self.view, self.came = bus.view, 0  # entries with tokens that were applied
        super().__init__(bus.state.path, lambda: bus.view.clock() / 1000000)

    def rows(self) -> list[Row]:
        return list(merged({row["id"]: row for row in super().rows()}, [*stored(self.view.database).values()]).values())

    def look(self) -> tuple[int, ...]:
        return *super().look(), self.came


class Common:
    """Keeps the file and the ledger alike. Owned by the loop; a turn that meets a new token writes the file."""

    def __init__(self, bus: Bus) -> None:
        bus.gate.tokens.spare.close()
        self.bus, self.tokens = bus, Held(bus)
        bus.gate.tokens = self.tokens
        self.stamp: tuple[int, ...] = ()  # of the tokens when the ledger had all of them
        self.asked: tuple[int, ...] = ()  # and of those that are being put into it
        self.behind = False  # the file lacks what came from the ledger
        self.told = ""  # why it could not be written

    def first(self) -> None:
        """Put a new token into the ledger in front of what was done with it."""
        if self.tokens.stamp != self.stamp:
            self.look()

    def look(self) -> None:
        """Put what is new in the file into the ledger, and the other way round if that failed before."""
        if self.bus.draining:
            return
        if self.behind:
            self.write()
        stamp = self.tokens.look()
        if stamp not in (self.stamp, self.asked):
            try:
                rows = Tokens.rows(self.tokens)
            except Unusable:  # the bus has said so
                return
            known = stored(self.bus.view.database)
            after = merged(known, rows)
            new = [row for token, row in after.items() if row != known.get(token)]
            if new:
                self.put(Grants(new), stamp)
            else:
                self.stamp = stamp

    def put(self, grants: Grants, stamp: tuple[int, ...]) -> None:
        step = self.bus.do(grants, None, lambda *_: self.noted(stamp), lambda _: self.not_noted())
        self.asked, waiting = stamp, self.bus.ledger.next
        if step in waiting:  # else it will be refused
            waiting.remove(step)
            waiting.insert(0, step)

    def noted(self, stamp: tuple[int, ...]) -> None:
        self.stamp = stamp

    def not_noted(self) -> None:
        self.asked = ()

    def came(self, grants: Grants, result: None) -> None:
        """Another front has made or revoked tokens."""
        self.tokens.came += 1
        self.tokens.refresh()
        self.behind = True
        self.write()

    def write(self) -> None:
        """What came holds here, whether or not this succeeds. The next look tries again."""
        try:
            write(self.tokens, list(stored(self.bus.view.database).values()), fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.behind, self.told = False, ""
        except BlockingIOError:  # a command is writing it
            pass
        except (OSError, Unusable) as error:
            if self.told != str(error):
                say(f"bus_server: {error}; until it is written, what other fronts made holds all the same")
            self.told = str(error)
