"""Words and phrases in messages, at GET /search (PROTOCOL.md section 25).

The first search begins an index in a file of its own (_search_index.py). A commit does nothing for it: it is written
later, in a thread, which also looks for the words. A turn then takes the messages that were found from the database.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import time
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from bus_server import (
    ALIVE,
    ANSWER_BYTES,
    MAX_MESSAGES,
    ROW,
    SINCE,
    Answer,
    Bus,
    Connection,
    Query,
    Refused,
    Request,
    cursor,
    encode,
    ok,
    parts_of,
    refusal,
    say,
    seconds,
    tick_of,
    too_much,
)

if TYPE_CHECKING:
    import _search_index as index
else:
    [index] = parts_of(__file__, "_search_index")

# If a text was replaced, its words must leave the disk: the index is made anew.
TABLES = [
    """
    CREATE TABLE search(changes INTEGER NOT NULL);  -- how many texts were ever replaced
    INSERT INTO search VALUES (0);
    CREATE TRIGGER search_changed AFTER UPDATE OF text ON messages BEGIN UPDATE search SET changes = changes + 1; END;
    CREATE VIEW search_kept AS SELECT changes AS tick FROM search WHERE 0;
    """,
    # Or its message was removed before, and what was replaced is the hash of the text.
    "CREATE TRIGGER search_forgets AFTER UPDATE OF hash ON keys BEGIN UPDATE search SET changes = changes + 1; END",
]
NOUN, OPERATIONS = "words", ()

FOUND = f"""SELECT {ROW} FROM (SELECT value AS its FROM json_each(:ticks)) CROSS JOIN messages ON tick = its
    CROSS JOIN mailboxes ON mailbox = id WHERE {ALIVE.replace("?", ":now")}
    AND (:operator OR sender = :me OR name IN (SELECT value FROM json_each(:mine)))
    AND (:sender IS NULL OR sender = :sender) AND (:channel IS NULL OR channel = :channel)
    AND (:any OR name IN (SELECT value FROM json_each(:to))) AND (:thread IS NULL OR ifnull(thread, tick) = :thread)"""
RENEWING = "anew"  # the owner of the one renewal that may wait; no token and no address is called so
CHARACTERS, WORDS = 200, 20  # in q; FTS5 takes longer for more
WORD = re.compile(r'"([^"]*)"|([^\s"]+)')


def options(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def start(bus: Bus, options: argparse.Namespace) -> None:
    Search(bus)


class Job(NamedTuple):
    """Work for the thread of the index, and who waits for it."""

    work: Callable[[int], Any]  # it gets the tick that was announced last
    connection: Connection | None
    owner: str
    then: Callable[[Any], Answer | None]


class Search:
    """The endpoints, and the queue of work for the Index. Owned by the loop."""

    LOOK_SECONDS = 1.0  # after which the index is looked at
    PAUSE = 30  # times as long as a slice took, if messages came meanwhile: to index takes 3 % of the time then
    WAITING = 4  # searches of one owner
    FAILED_SECONDS = 60.0  # after a failure of the index, until it is written again without a search

    def __init__(self, bus: Bus) -> None:
        self.bus, self.index = bus, index.Index(bus.state.path)
        self.jobs: deque[Job] = deque()  # the first one is being done
        self.waiting: Counter[str] = Counter()  # searches, by owner
        self.whole: Any = None  # the newest tick, and how many texts were replaced, when the index was whole
        self.rests = 0.0  # no slice is added before; monotonic clock, s
        self.missing = index.why_not(bus.state.path)
        bus.route("GET", "/search", self.search, "messages with these words, the newest first: q=WORDS", takes=True)
        bus.route("POST", "/search", self.renew, "make the index of /search anew; for an operator")
        if not self.missing:
            bus.loop.every(self.LOOK_SECONDS, self.look)

    def search(self, request: Request) -> None:
        self.check(request)
        bus, owner, query, grant = self.bus, request.owner(), request.query(), request.grant
        mine = grant.mailboxes()
        wanted = index.Wanted(match_of(query.needed("q")), grant.name, None if grant.operator else mine)
        values = values_of(request, mine)
        above, below = moment(query, "since", 0, bus.last), moment(query, "before", bus.last + 1, bus.last + 1)
        limit = int(query.number("max", 100, 1, MAX_MESSAGES))
        if self.waiting[owner] >= self.WAITING:
            raise too_much(f"{self.WAITING} searches of {owner} wait already: search again when one is answered", 1)
        work = partial(self.index.search, wanted, above, below)
        self.do(Job(work, request.peer, owner, partial(self.found, owner, values, limit)))

    def check(self, request: Request) -> None:
        self.bus.storms.read(request.owner())
        if self.missing:
            raise Refused(501, f"this bus cannot search: {self.missing}")
        if not self.bus.view.has_room():
            raise Refused(507, "the disk of the bus is nearly full, and searching needs room: make some, or prune")

    def found(self, owner: str, values: dict[str, Any], limit: int, hits: index.Hits) -> Answer:
        """Of the hits, newest first: what the token may see and its query asks for. No mark moves, as in /log."""
        bus, end = self.bus, hits.below
        bus.storms.worked(owner, "", hits.took / bus.storms.WORK_SHARE * bus.storms.WORK)  # as bytes of an answer
        withheld = {each.tick for each in bus.withheld.values()}
        values = {**values, "ticks": encode(hits.ticks), "now": bus.view.clock()}
        found: list[str] = []
        size = reached = 0
        with contextlib.closing(bus.view.database.execute(FOUND, values)) as rows:
            for row in rows:
                if len(found) == limit or size > ANSWER_BYTES:
                    end = reached
                    break
                message, reached = bus.view.checked(row), row[0]
                size += len(row[4] or "")
                if message and reached not in withheld:
                    found.append(message.render())
        members = f'"messages": [{", ".join(found)}], "next": {seconds(end) if end else "null"}'
        return ok(bus, f'{members}, "indexed": {seconds(hits.upto)}')

    def renew(self, request: Request) -> None:
        if not request.grant.operator:
            raise Refused(403, "only an operator may have the index made anew: this needs invite --operator")
        self.check(request)
        if self.waiting[RENEWING]:
            raise too_much("the index is being made anew already: its words are found within a second or two", 2)
        self.do(Job(self.index.renew, request.peer, RENEWING, self.renewed))

    def renewed(self, more: bool) -> Answer:
        self.whole = None
        return ok(self.bus, '"ok": true')

    # The queue

    def look(self) -> None:
        """Add a slice, if a search has begun an index and that lacks messages. Then rest, if the bus is in use."""
        bus, began = self.bus, time.monotonic()
        if self.jobs or bus.draining or began < self.rests or not self.index.file.exists():
            return
        state = last, _ = bus.last, bus.view.ask("SELECT changes FROM search")

        def grown(more: bool) -> None:
            ended = time.monotonic()
            pause = (ended - began) * self.PAUSE if bus.last > last else 0
            self.rests = ended + pause
            if more:
                bus.loop.later(pause, self.look)
            else:
                self.whole = state

        if state != self.whole and bus.view.has_room():
            self.do(Job(self.index.grow, None, "", grown))

    def do(self, job: Job) -> None:
        self.waiting[job.owner] += 1
        self.jobs.append(job)
        if len(self.jobs) == 1:
            self.begin()

    def begin(self) -> None:
        job, last = self.jobs[0], self.bus.last
        self.bus.loop.in_thread(lambda: job.work(last), partial(self.done, job))

    def done(self, job: Job, result: Any) -> None:
        """The first job is done. `result`: of its work, or its exception."""
        self.jobs.popleft()
        self.waiting -= Counter([job.owner])
        if self.jobs:
            self.begin()
        if isinstance(result, Exception):
            say(f"bus_server: the index {self.index.file}: {type(result).__name__}: {result}")
            self.rests = time.monotonic() + self.FAILED_SECONDS
        if job.connection:
            job.connection.guard(partial(self.answer, job.connection, job, result))
        elif not isinstance(result, Exception):
            job.then(result)

    def answer(self, connection: Connection, job: Job, result: Any) -> None:
        try:
            self.bus.check_token(connection.token or "")  # it may have been revoked meanwhile
            if isinstance(result, Exception):
                why = "the bus failed on its index, and its log says why: search again; the messages are safe"
                raise Refused(503, why, ("Retry-After", "2"))
            connection.answer(job.then(result))
        except Refused as refused:
            connection.answer(refusal(refused))


def match_of(text: str) -> str:
    """What FTS5 is to match: all the words and "phrases" of a query. Each is quoted, so none is syntax."""
    words = [part for part in map(max, WORD.findall(text)) if any(map(str.isalnum, part))]
    if not words:
        raise Refused(400, "q has no word to look for: give letters or digits, as in q=disk+full")
    if len(text) > CHARACTERS or len(words) > WORDS:
        raise Refused(400, f"q may have {CHARACTERS} characters and {WORDS} words or phrases: look for fewer")
    return " ".join(f'"{word}"' for word in words)


def moment(query: Query, field: str, otherwise: int, last: int) -> int:
    """A time in the query as a tick; `now` is the tick that was announced last."""
    text = query.one(field)
    if text not in (None, "now") and not SINCE.fullmatch(text):
        raise Refused(400, f"{field} must be 'now' or seconds like 1795203596.123456")
    return otherwise if text is None else last if text == "now" else cursor(text)


def values_of(request: Request, mine: list[str]) -> dict[str, Any]:
    """The values of FOUND: what the token may see, and what its query asks for."""
    query, grant, thread = request.query(), request.grant, request.query().one("thread")
    first, to = tick_of(thread), query.names("to")
    if thread is not None and first is None:
        raise Refused(400, "thread must be the id of a message, like 660ba678a1b40")
    return {
        "operator": grant.operator,
        "me": grant.name,
        "mine": encode(mine),
        "sender": query.name("from", None),
        "channel": query.name("channel", None),
        "any": not to,
        "to": encode(to),
        "thread": first,
    }
