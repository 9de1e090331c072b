"""Replace the text of a message that has a secret, also on the disk, at POST /redact (PROTOCOL.md section 26)."""

from __future__ import annotations

import argparse
import sqlite3
import zlib
from collections import deque
from collections.abc import Iterator
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bus_server import (
    ACKNOWLEDGED,
    ALONE,
    BUSY_SECONDS,
    EVERYONE,
    FETCHED,
    LOADED,
    Answer,
    Bus,
    Connection,
    Message,
    Now,
    Operation,
    Refused,
    Request,
    State,
    boolean,
    checksum,
    encode,
    no_message,
    ok,
    parts_of,
    quote,
    receipt_of,
    state_of,
)

if TYPE_CHECKING:
    import _redact_copies as copies
else:
    [copies] = parts_of(__file__, "_redact_copies")

TABLES, NOUN = None, ""

SAID = "(an operator has redacted this message: %x)"  # in place of the text; the id tells redactions apart
NO_HASH = "redacted"  # in place of the hash of a text that is removed; no text has this hash
FREE_PAGES = 4096  # that one redaction overwrites, 16 MiB: some 50 ms in which senders wait


def options(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def start(bus: Bus, options: argparse.Namespace) -> None:
    Redaction(bus)


class Redacted(NamedTuple):
    """The result of a Redact."""

    ticks: list[int]
    whole: bool  # False: there may be other copies


class Redact(Operation):
    """Replace the text of a message, and of all that the bus made of it.

    Of the members that its sender gave, only the names and `reply_to` stay; the idempotency key is no member. It stays
    too: a retry of the send then gets 409, and the secret is not stored again.
    """

    __slots__ = ("tick",)
    kind = "redact"

    def __init__(self, tick: int) -> None:
        self.tick = tick

    def apply(self, state: State, now: Now) -> Redacted:
        message = state.message(self.tick)
        state.insert()  # so that what is in the same list of operations is found
        found, whole = copies.Copies(state, message).all() if message else ([], True)
        hashes = kept_hashes(state, [self.tick, *copies.jobs_of(state, found)])
        if not message and not hashes:
            raise no_message(f"{self.tick:x}")
        said = SAID % min((each.tick for each in found), default=self.tick)
        state.writing.execute("PRAGMA secure_delete=ON")
        try:
            for each in found:
                gone = each._replace(text=redacted(each, said))
                values = gone.text, checksum(gone), gone.tick
                state.writing.execute("UPDATE messages SET text = ?, sum = ? WHERE tick = ?", values)
                why = "UPDATE work SET reason = ? WHERE tick = ? AND reason IS NOT NULL"  # it may quote the text
                state.writing.execute(why, (said, gone.tick))
            state.writing.executemany("UPDATE keys SET hash = ?, sum = ? WHERE tick = ?", hashes)
            overwrite_free_pages(state)
        finally:
            state.writing.execute("PRAGMA secure_delete=FAST")  # as it was
        return Redacted([each.tick for each in found], whole)


class Fold(Operation):
    """Fold the write-ahead log into the database and empty it: it has older pages. The result: is it empty?

    It is not, if another program reads the database. SQLite can do this only outside of a transaction, which begins
    with the first operation of a higher rank. Each front folds its own log: earlier versions wrote it into the ledger.
    """

    kind, rank, is_local = "fold", 0, True
    PATIENCE = 100  # ms that senders wait for the other program

    def apply(self, state: State, now: Now) -> bool:
        ask = state.writing.execute
        ask(f"PRAGMA busy_timeout={self.PATIENCE}")
        try:
            [busy, _, _] = ask("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.OperationalError:  # the disk is full: nothing is lost
            busy = True
        finally:
            ask(f"PRAGMA busy_timeout={int(BUSY_SECONDS * 1000)}")
        return not busy


OPERATIONS = (Redact, Fold)


def redacted(message: Message, said: str) -> str:
    """The text of a message whose text was replaced."""
    parent = f', "reply_to": "{message.answers:x}"' if isinstance(message.answers, int) else ""
    names = f'"from": "{message.sender}", "channel": "{message.channel}"'
    return f'{names}, "msg": {quote(said)}, "redacted": true{parent}'


def kept_hashes(state: State, ticks: list[int]) -> list[tuple[str, int, int]]:
    """New values for the rows of `keys` with a hash of this text: of its sends that were removed, for retries.

    Whoever has such a hash could find out a short secret by trying.
    """
    its_key, some = "SELECT key, sender, channel FROM", "tick IN (SELECT value FROM json_each(?))"
    whose = f"{its_key} keys WHERE {some} UNION {its_key} messages JOIN mailboxes ON mailbox = id WHERE {some}"
    columns = "tick, key, sender, channel, name FROM keys WHERE (key, sender, channel)"
    rows = state.writing.execute(f"SELECT {columns} IN ({whose}) ORDER BY tick", (encode(ticks),) * 2).fetchall()
    return [(NO_HASH, zlib.crc32(repr([*row, NO_HASH]).encode()), row[0]) for row in rows]


def overwrite_free_pages(state: State) -> None:
    """When the messages beside it were removed, SQLite may have moved a message, and left it in a page that is free."""
    ask = state.writing.execute
    free, size = ask("SELECT freelist_count, page_size FROM pragma_freelist_count, pragma_page_size").fetchone()
    if state.path != ":memory:" and 0 < free <= FREE_PAGES:
        ask("CREATE TABLE free_pages(zeros)")
        ask("INSERT INTO free_pages VALUES (zeroblob(?))", (free * size,))
        ask("DROP TABLE free_pages")


class Redaction:
    """The endpoint. Owned by the loop."""

    FOLD_SECONDS = 10.0  # after which it is tried again to empty the write-ahead log
    LOOKED, NAMED = 10000, 1000  # of the readers of a channel: names that are looked at, and named, for a broadcast
    UNREAD = ("queued", "expired", "recalled")  # states of a message that nobody has fetched
    WORK = 1 << 20  # bytes of answers that a redaction counts as: some 0.1 s of a commit

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.queue: deque[tuple[Connection, Redact]] = deque()
        self.asking = False  # one of them is with the ledger
        self.folding = False  # a Fold that no request waits for is planned, or on its way
        bus.route("POST", "/redact", self.redact, "replace the text of a message, also on the disk; for an operator")
        bus.ledger.elsewhere[Redact.kind] = self.redacted_elsewhere

    def redact(self, request: Request) -> None:
        """On a bus without tokens everybody may, as everybody may recall and acknowledge there."""
        self.bus.check_open()
        if not request.grant.operator:
            raise Refused(403, "only an operator can redact a message: ask one, or get a token with invite --operator")
        self.bus.storms.read(request.owner())
        redact = Redact(request.members().id())
        self.bus.storms.worked(request.owner(), "", self.WORK)
        self.queue.append((request.peer, redact))
        if not self.asking or self.bus.ledger.idle():  # with an idle ledger the last one is over, even if that failed
            self.ask_next()

    def ask_next(self) -> None:
        """One in each commit: who sends meanwhile waits for one, however many are asked for."""
        self.asking = bool(self.queue)
        if self.queue:
            connection, redact = self.queue.popleft()
            self.bus.do(redact, connection, self.replaced, lambda _: self.ask_next())

    def replaced(self, connection: Connection, redact: Redact, done: Redacted) -> None:
        """The text is replaced; older pages of the file may still have it."""
        self.ask_next()
        self.bus.do(Fold(), connection, partial(self.folded, done))

    def folded(self, done: Redacted, connection: Connection, fold: Fold, is_empty: bool) -> Answer:
        bus = self.bus
        if not is_empty:
            self.fold_later()
        messages = [each for each in map(bus.view.message, done.ticks) if each]
        states = [(each, *state_of(bus, each)) for each in messages]
        rows = [f'{{"id": "{each.tick:x}", "to": "{each.to}", "state": "{word}"{more}}}' for each, word, more in states]
        fetched = {name for each, word, _ in states for name in (*self.named(each, word), *self.readers(each))}
        members = f'"redacted": [{", ".join(rows)}], "fetched_by": {encode(sorted(fetched))}'
        free_pages = bus.view.ask("PRAGMA freelist_count")[0] > FREE_PAGES
        warning = self.warning(is_empty, free_pages, done.whole)
        overwritten = boolean(is_empty and not free_pages and done.whole and not bus.ledger.KEEPS)
        return ok(bus, f'"ok": true, {members}, "overwritten": {overwritten}, "warning": {quote(warning)}')

    def fold_later(self) -> None:
        """One Fold is for all redactions whose texts are still in the log: senders wait while it tries."""
        if not self.folding and not self.bus.draining:  # else the next start empties it
            self.folding = True
            self.bus.loop.later(self.FOLD_SECONDS, self.fold)

    def fold(self) -> None:
        self.folding = True
        self.bus.do(Fold(), None, self.folded_again, lambda fold: self.folded_again(None, fold, False))

    def folded_again(self, connection: None, fold: Fold, is_empty: bool) -> None:
        self.folding = False
        if not is_empty:
            self.fold_later()

    def redacted_elsewhere(self, redact: Redact, done: Redacted) -> None:
        """Another front has replaced a text. A Fold that is planned here comes behind that, and removes it too."""
        if not self.folding and not self.bus.draining:
            self.fold()

    def named(self, message: Message, state: str) -> Iterator[str]:
        """Whoever has fetched the message, as its receipts say; of those who read it by its id, the first."""
        kinds = (ALONE,) if message.to == EVERYONE or state in self.UNREAD else (FETCHED, ACKNOWLEDGED, ALONE)
        receipts = [receipt for kind in kinds if (receipt := receipt_of(self.bus, message, kind))]
        yield from (reader.partition("/")[0] for reader, _ in receipts)  # of a worker, its token
        if not receipts and len(kinds) > 1:
            yield message.to

    def readers(self, message: Message) -> Iterator[str]:
        """Whoever is being sent the message now and, if it is for all, whose cursor has passed it."""
        bus = self.bus
        for connection in bus.door.connections:
            if connection.delivering:
                reader, upto = connection.delivering
                if reader.present() and reader.covers(upto, message):  # an observer is no name
                    yield reader.who
        if message.to == EVERYONE:
            names = takewhile(lambda key: key[0] == message.channel, bus.mailboxes.keys((message.channel, "")))
            boxes = ((own, bus.mailboxes.boxes[channel, own]) for channel, own in islice(names, self.LOOKED))
            passed = (own for own, box in boxes if own != EVERYONE and box.own and box.mark() >= message.tick)
            yield from islice(passed, self.NAMED)

    def warning(self, is_empty: bool, free_pages: bool, whole: bool) -> str:
        path = self.bus.state.path
        found = "revoke the secret: backups, outboxes, observers of /log, the files of readers, messages that quote it "
        found += "and schedules that will send it may still have it"
        if self.bus.ledger.KEEPS:
            found += f"; {self.bus.ledger.KEEPS} has it until the entry is removed"
        if not whole:
            found += "; its queue has too many messages to look at all, so search for it, and redact what is found"
        if not is_empty:
            found += f"; another program reads {path}, so {path}-wal still has it: the bus empties that later"
        if free_pages:
            found += f"; free pages of {path} may have older copies: stop the bus and run sqlite3 {path} VACUUM"
        if self.bus.extensions.get("search") != LOADED and Path(f"{path}.search").exists():
            found += f"; its words are in {path}.search, the index of an extension that is off: remove that file"
        return found
