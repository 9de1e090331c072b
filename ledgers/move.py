"""The command move: a bus that has mail goes onto an empty ledger, or the file of a front becomes a bus of its own.

Onto a ledger, its first entry says that a bus was moved there. What the bus has is in its file, which becomes the copy
of the first front; each further front begins with a copy of that one.

With --back, the last entry says that the bus has left, and every front stops there. The file then has all entries
before it.

Each way ends with one transaction of SQLite. Killed before it, the bus is where it was, and the same command goes on.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
import time
import zlib
from collections.abc import Sequence
from types import ModuleType

from bus_server import AHEAD, IS_FRONT, State, Tokens, Unusable, command, encode, existing, migrate

from . import Ledger, Unknown, tokens
from .heartbeat import live
from .mirror import CALL, TABLES, Differs, Entry, Mirror
from .operations import Left, Moved, to_line
from .start import connect

Extensions = dict[str, ModuleType]
CONTENT = "SELECT id, last, (SELECT count(*) FROM messages), (SELECT total(sum) FROM messages) FROM bus"
LOST = (  # a front takes `lost` for damage of its copy: from now on each mailbox says to its readers what is lost
    "UPDATE mailboxes SET removed = max(removed, (SELECT lost FROM bus))",
    "UPDATE bus SET forgotten = max(forgotten, lost), lost = 0",
)


def move(arguments: Sequence[str], extensions: Extensions) -> None:
    parser = command("move", "Move a stopped bus onto an empty ledger, as its first front. Or back, with --back.")
    url = os.environ.get("AGENT_BUS_LEDGER")
    which = "postgresql://HOST/DATABASE, the same as for `serve --ledger`"
    lost = "as --back, if the ledger is lost: the bus has what this front's file has, and a new id"
    parser.add_argument("--ledger", default=url, metavar="URL", help=which)
    parser.add_argument("--ledger-single", action="store_true", help="it keeps its entries on one machine only")
    parser.add_argument("--back", action="store_true", help="the stopped front's file becomes a bus; all fronts stop")
    parser.add_argument("--ledger-lost", action="store_true", help=lost)
    options = parser.parse_args(arguments)
    if not options.ledger_lost and not options.ledger:
        parser.error("the ledger is missing: give --ledger URL, as postgresql://HOST/DATABASE")
    path = existing(options.db)
    try:
        if options.ledger_lost:
            print(f"{path} is bus {alone(path, secrets.token_hex(8))} now, with what it had of its ledger")
        else:
            with contextlib.closing(connect(options.ledger, options.ledger_single)) as ledger:
                print(back(path, ledger, extensions) if options.back else onto(path, ledger))
    except Unknown as error:
        raise Unusable(f"the ledger does not answer ({error}): nothing is lost, so run this line again") from None
    except Differs as error:
        raise Unusable(str(error)) from None
    except sqlite3.Error as error:
        raise Unusable(f"cannot use the database {path}: {error}") from None


def onto(path: str, ledger: Ledger) -> str:
    """Make the file of a stopped bus the copy of the first front of a ledger."""
    with contextlib.closing(State(path)) as state:
        head = encode([Mirror.FORMATS[0], os.path.realpath(path), 0, 0])  # of a format that every front understands
        first = f"{head}\n{to_line(Moved(state.bus))}".encode()
        known = ledger.read(0, 2, time.monotonic() + CALL)
        if not known:
            ledger.append(first, secrets.token_hex(16), time.monotonic() + CALL)
            known = ledger.read(0, 2, time.monotonic() + CALL)
        if len(known) != 1 or known[0][::2] != (1, first):  # it is there if this command was killed before
            raise Unusable("this ledger is not empty: give another database, or remove the table agent_bus_ledger")
        wall = known[0][1]
        values = wall, max(wall, state.last - AHEAD), zlib.crc32(repr(state.ask(CONTENT)).encode())
        migrate(state.writing, ["BEGIN IMMEDIATE", *LOST, *TABLES.values()])
        state.writing.execute("INSERT INTO front VALUES (1, ?, ?, ?)", values)
        state.writing.execute("COMMIT")
        return f"bus {state.bus} is on the ledger: start its first front with --db {path}"


def back(path: str, ledger: Ledger, extensions: Extensions) -> str:
    """Make the file of a stopped front a bus of its own, with all that is in the ledger."""
    with contextlib.closing(Mirror(path, ledger)) as mirror:
        mirror.add_all_tables(extensions)
        mirror.check_ledger()
        mirror.replay()
        if not mirror.left:  # else this command was killed before, here or beside another front
            mirror.choose_format(live(mirror.writing, mirror.time.entry.steady))
            mirror.append(Entry([Left(mirror.front.partition("#")[0])], []), time.monotonic() + CALL)
            mirror.replay()
        tokens.write(Tokens(path), list(tokens.stored(mirror.writing).values()))
    return f"{path} is bus {alone(path)} now, and its ledger has come to its end: start the bus without --ledger"


class Copy(State):
    """The file of a front, whatever is in its ledger."""

    def check_use(self) -> None:
        if not self.ask(IS_FRONT):
            raise Unusable(f"{self.path} is a bus of its own already")


def alone(path: str, bus: str | None = None) -> str:
    """Remove what makes the file a front's, and give it a new bus id if there is one; returns the id."""
    with contextlib.closing(Copy(path)) as state:
        migrate(state.writing, ["BEGIN IMMEDIATE", *(f"DROP TABLE IF EXISTS {table}" for table in TABLES)])
        state.writing.execute("UPDATE bus SET id = ifnull(?, id)", (bus,))
        state.writing.execute("COMMIT")
        state.reload()
        return state.bus
