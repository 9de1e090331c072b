"""The index of search.py, with SQLite's FTS5, in the file DATABASE.search. Standard library only.

It may be lost. If it is damaged, or does not match the messages in the database, it is removed and made anew.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import sqlite3
import time
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

TABLES_OF_INDEX = """
    CREATE TABLE IF NOT EXISTS made(source TEXT NOT NULL);
    CREATE TABLE IF NOT EXISTS parts(part INTEGER PRIMARY KEY, above INTEGER NOT NULL, upto INTEGER NOT NULL,
        messages INTEGER NOT NULL, bytes INTEGER NOT NULL);
"""
PART = "CREATE VIRTUAL TABLE part_%d USING fts5(whose, subject, msg, content='', columnsize=0)"  # no text stored twice
# A text that is damaged, or was recalled, has no words. `whose` has the names of a message, each as one word.
ADD = """INSERT INTO part_%d(rowid, whose, subject, msg)
    SELECT tick, 'from' || hex(sender) || ' to' || hex(name),
        substr(json_extract(json, '$.subject'), 1, :most), substr(json_extract(json, '$.msg'), 1, :most)
    FROM (SELECT tick, sender, name, CASE WHEN json_valid('{' || text || '}') THEN '{' || text || '}' END AS json
        FROM mail.messages JOIN mail.mailboxes ON mailbox = id
        WHERE tick > :above AND tick <= :upto AND expires IS NOT 1)"""
# Each row that Python takes from SQLite takes the interpreter's lock away from the loop: so one row has them all.
HITS = """SELECT json_group_array(its) FROM (SELECT rowid AS its FROM part_%d
    WHERE part_%d MATCH ? AND rowid > ? AND rowid < ? ORDER BY rowid DESC LIMIT ?)"""
SIZES = """SELECT count(*), ifnull(sum(length(text)), 0), min(tick), max(tick) FROM
    (SELECT tick, text FROM mail.messages WHERE tick > ? AND tick <= ? ORDER BY tick %s LIMIT ?)"""


class Wanted(NamedTuple):
    """What a search looks for, and in whose mail."""

    match: str  # words and phrases, for FTS5
    sender: str  # if `readers` is a list: only in mail from this name, or to those
    readers: list[str] | None  # None: in all mail

    def expression(self) -> str:
        """What FTS5 is to match."""
        words = f"{{subject msg}} : ({self.match})"
        if self.readers is None:
            return words
        names = [f"from{self.sender.encode().hex()}", *(f"to{own.encode().hex()}" for own in self.readers)]
        return f"whose : ({' OR '.join(names)}) AND {words}"


class Hits(NamedTuple):
    """What the index knows of a search."""

    ticks: list[int]  # of messages, the newest first; some may be gone, or not what else the query asks for
    below: int | None  # below which tick to go on; None: there is nothing more
    upto: int  # the index has all messages up to this tick
    took: float  # s of CPU


class Index:
    """The words of the messages between two ticks. Its methods are called in a thread, one at a time.

    FTS5 cannot be stopped before it has found something. So the index is in parts, each with the words of messages that
    follow each other: a search takes one part after the other, and may stop between two. The index begins with the
    newest messages and grows at both ends, so the first search finds what is new.

    Where an answer ends must not tell of mail that who searches may not see. So only hits in their own mail count, and
    the answer ends at a part that follows from the sizes of the parts, not from the time that the words took.
    """

    FORMAT = 2
    SLICE, SLICE_BYTES = 1000, 1 << 20  # messages in one transaction, and bytes of their texts: some 20 ms
    PART, PART_BYTES = 20000, 8 << 20  # messages of a part, and bytes of their texts: 0.1 s for the worst phrase
    MOST = 1 << 16  # characters of a text; a word that comes later is not found
    HITS = 2000  # in one answer: the turn that looks at these messages takes some 5 ms
    FIND_SECONDS = 0.03  # of CPU, after which a search of all mail looks into no other part
    FIND_BYTES = 16 << 20  # of texts in the parts, after which another search does so: 0.2 s for the worst phrase
    GROW_SECONDS = 0.5  # that a search waits for an index that is not whole

    def __init__(self, path: str) -> None:
        self.file = pathlib.Path(f"{pathlib.Path(path).absolute()}.search")
        self.mail = f"{pathlib.Path(path).absolute().as_uri()}?mode=ro"
        self.database: sqlite3.Connection | None = None
        self.taken = self.SLICE  # messages that the next slice takes; fewer, if they are large

    def grow(self, last: int) -> bool:
        """Add a slice. Returns: may there be more to add?"""
        with self.opened(last) as database:
            return self.add(database, last)

    def search(self, wanted: Wanted, above: int, below: int, last: int) -> Hits:
        """Look for words in messages between two ticks."""
        with self.opened(last) as database:
            ends = time.monotonic() + self.GROW_SECONDS
            while self.add(database, last) and time.monotonic() < ends:
                pass
            low, high = self.reach(database)
            began = time.thread_time()
            ticks, end = self.find(database, wanted, above, below)
            end = low + 1 if end is None and low > above else end
            return Hits(ticks, end, high, time.thread_time() - began)

    def renew(self, last: int) -> bool:
        self.remove()
        return self.grow(last)

    def remove(self) -> None:
        """Remove the file; the next call begins a new one."""
        self.close()
        for suffix in ("-wal", "", "-shm"):
            pathlib.Path(f"{self.file}{suffix}").unlink(missing_ok=True)

    def close(self) -> None:
        if self.database:
            self.database.close()
        self.database = None

    @contextlib.contextmanager
    def opened(self, last: int) -> Iterator[sqlite3.Connection]:
        """The index, with the database of the messages beside it as `mail`.

        That one is open for the length of a call only: else the bus could not fold its WAL when it ends.
        """
        try:
            database = self.connected()
            of = f"SELECT '{self.FORMAT} ' || id || ' ' || changes FROM mail.bus, mail.search"
            [source] = database.execute(of).fetchone()
            its = "SELECT 1 FROM made WHERE source = ? AND (SELECT max(upto) FROM parts) <= ?"
            if not database.execute(its, (source, last)).fetchone():
                self.remove()
                database = self.connected()
                self.begin(database, source, last)
            yield database
            database.execute("DETACH mail")
        except BaseException as error:
            self.close()
            if type(error) is sqlite3.DatabaseError:  # the file is damaged
                self.remove()
            raise

    def connected(self) -> sqlite3.Connection:
        if not self.database:
            connect = partial(sqlite3.connect, isolation_level=None, check_same_thread=False, uri=True)
            self.database = connect(self.file.as_uri(), cached_statements=512)
            self.database.execute("PRAGMA journal_mode=WAL")
            self.database.executescript(f"PRAGMA synchronous=NORMAL; PRAGMA temp_store=MEMORY; {TABLES_OF_INDEX}")
        self.database.execute("ATTACH ? AS mail", (self.mail,))
        return self.database

    def begin(self, database: sqlite3.Connection, source: str, last: int) -> None:
        database.execute("BEGIN")
        database.execute("INSERT INTO made VALUES (?)", (source,))
        self.begin_part(database, last)
        database.execute("COMMIT")

    def begin_part(self, database: sqlite3.Connection, at: int) -> int:
        [part] = database.execute("SELECT ifnull(max(part), 0) + 1 FROM parts").fetchone()
        database.execute("INSERT INTO parts VALUES (?, ?, ?, 0, 0)", (part, at, at))
        database.execute(PART % part)
        return int(part)

    def reach(self, database: sqlite3.Connection) -> tuple[int, int]:
        """The index has the messages above the first tick and up to the second."""
        low, high = database.execute("SELECT min(above), max(upto) FROM parts").fetchone()
        return int(low), int(high)

    def add(self, database: sqlite3.Connection, last: int) -> bool:
        """Add the oldest messages above the index or, if there are none, the newest below it. False: it has all."""
        low, high = self.reach(database)
        newer = high < last
        if not newer and not low:
            return False
        order, above, upto = ("ASC", high, last) if newer else ("DESC", 0, low)
        number = size = self.SLICE_BYTES + 1
        while number > 1 and size > self.SLICE_BYTES:
            number, size, oldest, newest = database.execute(SIZES % order, (above, upto, self.taken)).fetchone()
            if number == self.taken:  # there may be more
                above, upto = (above, newest) if newer else (oldest - 1, upto)
            self.taken = max(number // 2, 1) if size > self.SLICE_BYTES else min(self.taken * 2, self.SLICE)
        database.execute("BEGIN IMMEDIATE")
        part = self.part(database, newer, above if newer else upto)
        database.execute(ADD % part, {"above": above, "upto": upto, "most": self.MOST})
        database.execute(
            "UPDATE parts SET above = min(above, ?), upto = max(upto, ?), messages = messages + ?, bytes = bytes + ? "
            "WHERE part = ?",
            (above, upto, number, size, part),
        )
        database.execute("COMMIT")
        return True

    def part(self, database: sqlite3.Connection, newer: bool, at: int) -> int:
        """The part at this end of the index. If it is full, a new one; then parts of removed messages go."""
        at_end = f"SELECT part, messages, bytes FROM parts ORDER BY {'upto DESC' if newer else 'above'} LIMIT 1"
        part, messages, size = database.execute(at_end).fetchone()
        if messages < self.PART and size < self.PART_BYTES:
            return int(part)
        database.execute(f"INSERT INTO part_{part}(part_{part}) VALUES ('optimize')")
        removed = "SELECT part FROM parts WHERE upto < (SELECT ifnull(min(tick), 0) FROM mail.messages) AND part != ?"
        for (old,) in database.execute(removed, (part,)).fetchall():
            database.execute(f"DROP TABLE part_{old}")
            database.execute("DELETE FROM parts WHERE part = ?", (old,))
        return self.begin_part(database, at)

    def find(
        self, database: sqlite3.Connection, wanted: Wanted, above: int, below: int
    ) -> tuple[list[int], int | None]:
        """The ticks of messages between two ticks, newest first; and below which to go on, or None if that is all."""
        began, ticks, looked, match = time.thread_time(), list[int](), 0, wanted.expression()
        parts = "SELECT part, above, bytes FROM parts WHERE above < ? - 1 AND upto > ? ORDER BY upto DESC"
        for part, start, size in database.execute(parts, (below, above)).fetchall():
            hits = database.execute(HITS % (part, part), (match, above, below, self.HITS - len(ticks)))
            ticks += sorted(json.loads(hits.fetchone()[0]), reverse=True)
            if len(ticks) == self.HITS:
                return ticks, ticks[-1]
            looked += size
            is_late = wanted.readers is None and time.thread_time() - began > self.FIND_SECONDS
            is_far = wanted.readers is not None and looked >= self.FIND_BYTES
            if start > above and (is_late or is_far):
                return ticks, start + 1
        return ticks, None


def why_not(path: str) -> str:
    """Why there can be no index of this database; empty if there can be one."""
    if path == ":memory:":
        return "its messages are in no file"
    with contextlib.closing(sqlite3.connect(":memory:")) as trial:
        try:
            trial.execute(PART % 1)
        except sqlite3.OperationalError:
            return "the SQLite of its Python has no FTS5"
    return ""
