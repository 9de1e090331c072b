#!/usr/bin/env python3
"""agent-bus server: a message bus for coding agents, in one file, with the standard library only.

It is written in the order a message travels. Read it from top to bottom:

    sender ──POST /send──► Connection ─► Request ─► Bus.send ─► Journal ─► Log   (one transaction per batch, fsync)
                                                                   │ visible messages, in tick order
    reader ◄─ parked /recv ◄─ Connection ◄─ Mailboxes.wake ◄─ Bus.committed ─► answer the sender

    Words         names, cursors, messages: what the wire says, parsed once, at the edge
    Loop          turns: who is ready is served, then what was sent is committed
    Connection    one socket and the one thing it waits for; Deadlines is the clock of all
    Request       one HTTP request in memory: its grammar, its query, its body
    Bus           sending and receiving; the only class that knows both sides
    Journal       what one turn brought becomes one transaction; Log is the SQLite file it goes to
    Mailboxes     who reads, how far, and who is parked
    Files         blobs by their hash: they pass in pieces, past the journal
    Answers       what the wire says back, and the table of endpoints
    main          the command line, the start, the drain

One thread does everything, and there is one lock: who has it runs the loop. While a commit lasts that is free, and if
it lasts long a second thread, the deputy, takes it and serves everybody meanwhile; it never touches the Batch, nor the
connection to SQLite that writes. (A third thread checks the hash of a large file.)

The tick is the one number: the microsecond of the commit, made unique and increasing by the one writer. It is clock,
order, cursor and identity at once; on the wire it is `ts` (seconds), `id` (hex), `since` and `now`. PROTOCOL.md is the
contract; docs/design.md has the reasons, and the shapes that were rejected.
"""
from __future__ import annotations

import argparse
import contextlib
import enum
import fcntl
import hashlib
import heapq
import hmac
import ipaddress
import json
import math
import os
import pathlib
import re
import resource
import secrets
import selectors
import shutil
import signal
import socket
import sqlite3
import ssl
import sys
import threading
import time
import traceback
import zlib
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from itertools import count
from typing import IO, Any, NamedTuple, NoReturn, Protocol, Union
from urllib.parse import parse_qsl

VERSION = "0.1.0"

HOLD = 25.0  # s a poll is parked when it does not say; under the 30 s after which common proxies cut a quiet request
HOLD_MAX = 60.0  # s; a client that asks for more is answered then, and asks again
GRACE = 10.0  # s after its hold in which a reader still counts as listening: the time to print and poll again
AHEAD = 300 * 1000000  # us a cursor may be ahead of our clock: a fast clock; beyond it is milliseconds or a broken one

HEAD_BYTES, LINE_BYTES, HEADERS = 16384, 8192, 64  # of a request head; more is 431, 414, 431
HEAD_SECONDS = BODY_SECONDS = 10.0  # for the whole head, then for the whole body, plus
BODY_RATE = 8192  # bytes of it per second; slower is 408
ANSWER_SECONDS = 30.0  # for the peer to read an answer, plus its size at BODY_RATE; then the socket is aborted
IDLE_SECONDS = 75.0  # between two requests on a connection; above HOLD_MAX, so a pooled one outlives a poll elsewhere
LINGER_SECONDS = 1.5  # we go on reading after the last answer: closing on unread bytes would destroy it (TCP reset)
DRAIN_SECONDS = 10.0  # for accepted sends to be committed and answered after SIGTERM

NAMES_PER_READER = 16
PARKED_PER_NAME = 8  # polls in hand for one name; more are readers that were cut off and do not know it
STRANGERS = 256  # connections that have not finished a first request; the oldest goes first
MAILBOX_MESSAGES, MAILBOX_BYTES = 10000, 64 << 20  # for a name and not fetched by anybody; then its senders get 429
NAMES_PER_SEND = 64
COPIES_PER_SEND = 5000  # messages times names in one request: 40 ms of one transaction
MAX_MESSAGES = 1000  # in one answer
ANSWER_BYTES = 1 << 20  # of messages in an answer that has more than one: bounds memory and a turn of the loop
DEPTH = 32  # of JSON; the parser itself fails at about 1000, with an error that is not a ValueError
TTL_MAX = 1000000000  # s a message may be delivered: 30 years; its end fits into an integer of SQLite
DIGITS = 4300  # of an integer in JSON: the limit of newer Pythons, for all; the time it takes grows with the square
PRUNE_SLICE = 500  # messages removed in one transaction: a few ms that a send may have to wait
PRUNE_SECONDS = 60.0  # between two looks for messages that are too old
MARKS_SECONDS = 1.0  # s a reader's cursor may be newer in memory than on disk; a crash repeats so much to `since=last`
RESERVE_BYTES = 16 << 20  # of the disk that no message takes: removing messages, and marks, need room in the WAL
CHECKED_BYTES = 64 << 20  # a database up to this size is checked whole at start; every row has its checksum anyway

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,63}")
KEY = re.compile(r"[!-~]{1,128}")
RESERVED = {"all", "system", "operator", "user", "root", "claude"}  # an agent that signs as one could fool another
EVERYONE = "all"
RECALLED = 1  # as the time at which a message expired: its sender took it back

LEASE = 60.0  # s a worker has for a message when it does not say
LEASE_MAX = 43200.0  # s; a worker that dies keeps its message from the others for so long
CLAIM_MAX = 100  # messages in one claim; it ends at ANSWER_BYTES too
DEAD = ".dead"  # a queue's name and this: where its messages go that failed too often


# ── Words ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Refused(Exception):
    """A request that cannot be served: a status, and one sentence that says what to do. Rendered once, in refusal()."""

    def __init__(self, status: int, sentence: str, *headers: tuple[str, str]) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.headers = status, sentence, headers


def wall_clock() -> int:
    """Microseconds since 1970. It may step; only Log makes a tick of it."""
    return time.time_ns() // 1000


def seconds(tick: int) -> str:
    """A tick as the wire writes it, in exact decimal seconds: a float holds the 16 digits, arithmetic rounds them."""
    return "%d.%06d" % divmod(tick, 1000000)  # noqa: UP031  (0.28 us; an f-string takes 0.37)


def name(text: Any, what: str) -> str:
    if not isinstance(text, str) or not NAME.fullmatch(text):
        raise Refused(400, f"{what} must be a name: 1 to 64 of A-Z a-z 0-9 . _ : @ - and first a letter or digit")
    return text


def is_name(text: Any) -> bool:
    return isinstance(text, str) and bool(NAME.fullmatch(text))


def tick_of(text: Any) -> int | None:
    """The tick that an id is, or None if it is no id."""
    return int(text, 16) if isinstance(text, str) and re.fullmatch("[0-9a-f]{1,13}", text) else None


NOW, LAST = -1, -2  # the words `now` and `last`, as cursors that no tick can be
SINCE = re.compile(r"([0-9]{1,10})(?:\.([0-9]{1,9}))?")


def cursor(text: str) -> int:
    """`since` as a tick, NOW or LAST. Rounded to the nearest microsecond: jq 1.6 prints 17 digits of a float."""
    if text in ("now", "last"):
        return NOW if text == "now" else LAST
    match = SINCE.fullmatch(text)
    if not match:
        hint = ", and this looks like milliseconds" if re.fullmatch(r"[0-9]{11,}(\.[0-9]*)?", text) else ""
        raise Refused(400, f"since must be 'now', 'last' or seconds like 1795203596.123456{hint}")
    return int(match[1]) * 1000000 + (int((match[2] or "").ljust(9, "0")) + 500) // 1000


made = tuple.__new__  # of a NamedTuple, from all its members in order: 0.12 us, where its own constructor takes 0.27


class Message(NamedTuple):
    """A committed message. `text` is its JSON members after ts, id and to; `n` numbers the messages of its mailbox."""

    tick: int
    channel: str
    to: str
    sender: str
    text: str
    n: int
    expires: int | None  # wall clock, us; RECALLED by its sender
    answers: int | None = None  # the tick it replies to

    def render(self) -> str:
        return f'{{"ts": {seconds(self.tick)}, "id": "{self.tick:x}", "to": "{self.to}", {self.text}}}'


class Draft(NamedTuple):
    """A message that is valid and has no tick yet; it becomes one Message for each name in `to`."""

    channel: str
    to: tuple[str, ...]
    sender: str
    text: str
    key: str | None
    ttl: int | None  # us
    answers: int | None = None  # the tick it replies to
    thread: int | None = None  # the tick that began its chain of replies
    depth: int = 0  # in that chain; 0 begins one


Route = tuple[str, str, str]  # channel, sender, receiver


def routes(drafts: Iterable[Draft]) -> list[Route]:
    """The ways these messages go: one for each copy."""
    return [(one.channel, one.sender, to) for one in drafts for to in one.to]


OURS = {"from", "to", "channel", "msg", "key", "ts", "id"}  # members the server writes; all others pass unchanged


def draft(fields: Any, key: str | None) -> Draft:
    """One message as its sender gave it, made into a Draft, or Refused. `key` is the header's; the member goes first.

    Invariant: a message is validated whole before it joins a batch. One poison message must not fail its neighbours.
    """
    if not isinstance(fields, dict):
        raise Refused(400, "a message must be a JSON object")
    try:
        sender, to, msg = fields["from"], fields["to"], fields["msg"]
    except KeyError as missing:
        raise Refused(400, f"{missing.args[0]} is missing: a message has from, to and msg") from None
    try:
        channel, to, start = addresses(
            sender, tuple(to) if isinstance(to, list) else to, fields.get("channel", "default")
        )
    except TypeError:  # one of them cannot be looked up
        raise Refused(400, "from, to and channel must be names") from None
    parent = fields.get("reply_to")
    if not isinstance(msg, str) or not (parent is None or isinstance(parent, str)):
        raise Refused(400, "msg and reply_to must be strings")
    key = fields.get("key", key)
    if key is not None and not (isinstance(key, str) and KEY.fullmatch(key)):
        raise Refused(400, "key must be 1 to 128 printable ASCII characters without a space")
    text = start + quote(msg)
    if len(fields) == 3:  # and has nothing else
        return made(Draft, (channel, to, sender, text, key, None, None, None, 0))
    ttl, answers = lifetime(fields.get("ttl")), tick_of(parent) if parent else None
    return Draft(channel, to, sender, text + further(fields), key, ttl, answers)


def further(fields: dict[str, Any]) -> str:
    """The members that the bus passes on as they are."""
    rest = {member: value for member, value in fields.items() if member not in OURS}
    return f", {encode(rest)[1:-1]}" if rest else ""


@lru_cache(4096)
def addresses(sender: Any, to: Any, channel: Any) -> tuple[str, tuple[str, ...], str]:
    """The channel and the receivers of a message, each once, and how its text begins.

    Few pairs of names write many messages: 0.2 us, not 1.
    """
    receivers = to if isinstance(to, tuple) else (to,)
    if not 1 <= len(receivers) <= NAMES_PER_SEND:
        raise Refused(400, f"to must be a name or a list of 1 to {NAMES_PER_SEND} names")
    if name(sender, "from").lower() in RESERVED:
        raise Refused(400, f"from must not be {sender}: this name is reserved")
    name(channel, "channel")
    start = f'"from": "{sender}", "channel": "{channel}", "msg": '
    return channel, tuple(dict.fromkeys(name(one, "to") for one in receivers)), start


def lifetime(ttl: Any) -> int | None:
    if ttl is None:
        return None
    if isinstance(ttl, bool) or not isinstance(ttl, (int, float)) or not 0 < ttl <= TTL_MAX:
        raise Refused(400, f"ttl must be a number of seconds above 0 and up to {TTL_MAX}")
    return int(ttl * 1000000)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member is given twice")
    return members


def no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def integer(digits: str) -> int:
    if len(digits.lstrip("-")) > DIGITS:
        raise ValueError(f"an integer has more than {DIGITS} digits")
    return int(digits)


def finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise ValueError("a number is too large for JSON")
    return value


decode = json.JSONDecoder(
    object_pairs_hook=unique, parse_constant=no_constant, parse_int=integer, parse_float=finite
).raw_decode  # and not decode, which looks for blanks with two patterns: 0.5 us
encode = json.JSONEncoder(allow_nan=False).encode  # ASCII, so that what we emit passes every terminal and every jq
quote = json.encoder.encode_basestring_ascii


def parse_text(body: bytes) -> str:
    try:
        text = body.decode("utf-8", "strict")
    except UnicodeDecodeError as error:
        raise Refused(400, f"the body is not UTF-8 at byte {error.start}") from None
    if "\0" in text:
        raise Refused(400, "the body has a NUL character")
    return text


def parse_json(body: bytes) -> Any:
    """The body as JSON that every reader can take. What Python lets through and others choke on is refused here."""
    text = parse_text(body).strip(" \t\r\n")
    try:
        value, end = decode(text)
        if end < len(text):
            raise ValueError(f"something follows it at character {end}")
        beside = [*map(type, value)].count(dict) - 1 if isinstance(value, list) else 0  # not in each other
        if "\\u" in text or text.count("{") + text.count("[") - beside > DEPTH:
            inspect(value, DEPTH)  # else it would find nothing, and take 2 us for each message
    except RecursionError:
        raise Refused(400, f"the body is not usable JSON: {TOO_DEEP}") from None
    except ValueError as error:
        raise Refused(400, f"the body is not usable JSON: {error}") from None
    return value


def in_order(text: str) -> str:
    """The text of a Message with its members sorted: their order says nothing, and some encoders change it."""
    return json.dumps(json.loads(f"{{{text}}}"), sort_keys=True)


TOO_DEEP = f"it is nested more than {DEPTH} deep"
HALF_A_PAIR = re.compile("[\ud800-\udfff]")


def inspect(value: Any, depth: int) -> None:
    """ValueError for NUL, for half a surrogate pair (SQLite and jq would fail on it, later), for deep nesting."""
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("a string has a NUL character")
        if HALF_A_PAIR.search(value):
            raise ValueError("a string has half of a surrogate pair")
    elif isinstance(value, (dict, list)):
        if not depth:
            raise ValueError(TOO_DEEP)
        for part in value:
            inspect(part, depth - 1)
            if isinstance(value, dict):
                inspect(value[part], depth - 1)


# ── Loop ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Watched(Protocol):
    """What the loop watches a socket for."""

    sock: socket.socket
    events: int  # that it waits for, of selectors.EVENT_READ and EVENT_WRITE; only Loop.watch changes them

    def ready(self, events: int) -> None:
        """Some of them have come."""


class Loop:
    """Turns: who is ready is served, what is due is done, and what these put off until all were served follows.

    Invariant: one thread at a time has a turn, the one that holds the lock `turn`. That is the one which called `run`;
    but what may take long, it does `aside`, and if that takes longer than PATIENCE the deputy, a second thread, has the
    turns until it is done: a slow disk delays only senders. A fast one wakes no thread: with one sender there are 19 %
    more sends in a second than with a thread for all commits, with sixteen 15 %, with 128 4 %.

    Not asyncio's, as that stays in the thread it was started in.
    """

    PATIENCE = 0.005  # s; the deputy comes after one to two of it

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.actions: deque[Callable[[], None]] = deque()  # for the end of this turn
        self.timers: list[tuple[float, int, Callable[[], None]]] = []  # when, on the monotonic clock; a number; what
        self.numbers = count()  # those due at the same time follow each other as they were planned
        self.told: deque[Callable[[], None]] = deque()  # by other threads
        self.signals: dict[int, Callable[[], None]] = {}
        self.sock, self.bell = socket.socketpair()
        self.events = 0
        for end in (self.sock, self.bell):
            end.setblocking(False)
        self.watch(self, selectors.EVENT_READ)
        self.turn = threading.Lock()
        self.turn.acquire()
        self.away: object | None = None  # different each time that who runs the loop is aside
        self.failure: Exception | None = None  # what ended the deputy
        self.alert, self.closed = threading.Event(), False
        self.deputy = threading.Thread(target=self.stand_in, name="deputy", daemon=True)
        self.deputy.start()

    def watch(self, watched: Watched, events: int) -> None:
        """From now on for these events, 0 for none."""
        if not watched.events:
            self.selector.register(watched.sock, events, watched)
        elif events:
            self.selector.modify(watched.sock, events, watched)
        else:
            self.selector.unregister(watched.sock)
        watched.events = events

    def soon(self, action: Callable[[], None]) -> None:
        """Call it when all who are ready now have been served."""
        self.actions.append(action)

    def later(self, patience: float, action: Callable[[], None]) -> None:
        """Call it in so many seconds. Without what was planned nothing goes on, so an error of it ends the loop."""
        heapq.heappush(self.timers, (time.monotonic() + patience, next(self.numbers), action))

    def every(self, period: float, action: Callable[[], None]) -> None:
        """On the multiples of a period (s): those of Deadlines.SLOT are when a slot is due, and not in between."""

        def again() -> None:
            action()
            self.every(period, action)

        self.later(period - time.monotonic() % period, again)

    def on_signal(self, number: int, action: Callable[[], None]) -> None:
        """As the system's handler writes to the bell, it is heard also while the main thread waits for the disk."""
        self.signals[number] = action
        signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self.bell.fileno(), warn_on_full_buffer=False)

    def tell(self, action: Callable[[], None]) -> None:
        """Call it in the loop; for other threads."""
        self.told.append(action)
        self.ring()

    def ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # then it is full of rings
            self.bell.send(b"\0")

    def ready(self, events: int) -> None:
        """The bell rang: for what we were told, for a signal with its number, or because we are wanted back."""
        for number in self.sock.recv(4096):
            if number in self.signals:
                self.signals[number]()
        while self.told:
            self.told.popleft()()

    def run(self, over: Callable[[], bool]) -> None:
        """Turns, until it is over."""
        while not over():
            self.serve()
            if self.failure:
                raise self.failure

    def serve(self) -> None:
        """One turn. An error in what we do for one is told, and the others are served."""
        patience = None
        if self.actions:
            patience = 0.0
        elif self.timers:
            patience = self.timers[0][0] - time.monotonic()
        for key, events in self.selector.select(patience):
            try:
                key.data.ready(events)
            except Exception:
                traceback.print_exc()
        if self.timers:
            now = time.monotonic()
            while self.timers and self.timers[0][0] <= now:
                heapq.heappop(self.timers)[2]()
        for _ in range(len(self.actions)):
            if self.actions:  # else the deputy has done them, while one of them was aside
                try:
                    self.actions.popleft()()
                except Exception:
                    traceback.print_exc()

    def aside(self, work: Callable[[], None]) -> None:
        """Do what may take long, and nothing else; for what was put off until the end of a turn."""
        self.away = object()
        self.turn.release()
        if not self.alert.is_set():  # after that: a deputy that finds no free turn looks once more
            self.alert.set()
        try:
            work()
        finally:
            self.away = None
            if not self.turn.acquire(blocking=False):
                self.ring()
                self.turn.acquire()

    def stand_in(self) -> None:
        """The deputy: it looks now and then whether somebody stays aside, for as long as somebody goes there."""
        while not self.closed:
            self.alert.wait()
            self.alert.clear()
            away = self.away
            time.sleep(self.PATIENCE)
            if away and self.away is away and self.turn.acquire(blocking=False):
                try:
                    while self.away is away:
                        self.serve()
                except Exception as error:
                    self.failure = error
                finally:
                    self.turn.release()

    def close(self) -> None:
        self.closed = True
        self.alert.set()
        self.deputy.join()
        self.selector.close()
        self.sock.close()
        self.bell.close()


# ── Connection ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Answer(NamedTuple):
    """What goes back: `fetched` is what its reader has once the last byte was written."""

    status: int
    body: bytes
    kind: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()
    fetched: tuple[Poll | Question, int] | None = None
    file: Download | None = None  # follows the head, in place of a body


class State(enum.Enum):
    """What a connection waits for. Each state has one deadline; Connection.late says what follows when it passes."""

    IDLE = "the first byte of a request"
    HEAD = "the rest of a head"
    BODY = "the rest of a body"
    BUSY = "a commit"
    PARKED = "a message"
    WRITING = "the peer, to read its answer"
    LINGER = "the peer, to close"


IDLE, HEAD, BODY, BUSY, PARKED, WRITING, LINGER = State  # to look one up in its class takes 0.08 us, a dozen times
READING = IDLE, HEAD, BODY


class Deadlines:
    """When each connection's patience ends. Used by the loop only; the clock is passed in.

    Connections are filed under the tenth of a second in which they are due. A later deadline is only noted, and the
    connection filed anew when its old tenth comes: so the usual case, a request that is served in time, costs nothing.
    """

    SLOT = 0.1  # s; the hold ends at most this much late

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.slots: dict[int, set[Connection]] = {}
        self.order: list[int] = []

    def set(self, connection: Connection, patience: float) -> None:
        connection.due = self.clock() + patience
        slot = self._slot(connection)
        if slot < connection.slot:
            self.forget(connection)
            self._file(connection, slot)

    def forget(self, connection: Connection) -> None:
        if connection.slot < sys.maxsize:
            self.slots[connection.slot].discard(connection)
            connection.slot = sys.maxsize

    def _slot(self, connection: Connection) -> int:
        """Always above due / SLOT: that is a float, and one rounded down would be filed in the past, for ever."""
        return int(connection.due / self.SLOT) + 1

    def _file(self, connection: Connection, slot: int) -> None:
        if slot not in self.slots:
            self.slots[slot] = set()
            heapq.heappush(self.order, slot)
        self.slots[slot].add(connection)
        connection.slot = slot

    def late(self) -> Iterator[Connection]:
        """Every connection whose deadline has passed, once."""
        now = self.clock()
        while self.order and self.order[0] * self.SLOT <= now:
            for connection in self.slots.pop(heapq.heappop(self.order)):
                connection.slot = sys.maxsize
                if connection.due <= now:
                    yield connection
                elif connection.due < math.inf:
                    self._file(connection, self._slot(connection))


class Connection:
    """One socket, and the one thing it waits for. Owned by the loop.

    IDLE ─► HEAD ─► BODY ─► BUSY or PARKED ─► WRITING ─► IDLE, or ─► LINGER and closed. A step that need not wait is
    skipped: a short request that is answered at once never leaves the first call of data_received.

    Invariant: one request in hand per connection; pipelined ones wait in `buffer`, in order.
    """

    __slots__ = ("address", "buffer", "bus", "closing", "due", "ended", "fetched", "file", "request", "slot", "state",
                 "transport")
    transport: Plain
    request: Request | None
    file: Download | None  # what is left of the answer being written
    fetched: tuple[Poll | Question, int] | None  # what the reader of the answer being written has then

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.buffer: bytes | bytearray = b""
        self.state, self.slot, self.due = IDLE, sys.maxsize, math.inf
        self.closing = self.ended = False  # we want to close after the answer; the peer has closed its side
        self.request = self.fetched = self.file = None

    def connection_made(self, transport: Plain) -> None:
        self.transport = transport
        self.address = transport.peer()
        self.bus.connections.add(self)
        self.bus.strangers[self] = None
        self.wait(IDLE, HEAD_SECONDS)

    def connection_lost(self) -> None:
        self.bus.connections.discard(self)
        self.bus.strangers.pop(self, None)
        self.bus.deadlines.forget(self)
        self.bus.lost(self)
        self.state = LINGER
        if self.file:
            self.file.close()
        if self.request and self.request.upload:
            self.request.upload.close()
        self.buffer, self.request = b"", None  # we and our transport hold each other until the collector comes

    def wait(self, state: State, patience: float) -> None:
        self.state = state
        self.bus.deadlines.set(self, patience)

    def data_received(self, data: bytes) -> None:
        if self.state is LINGER:
            return
        if not self.buffer:
            self.buffer = data
        else:
            if isinstance(self.buffer, bytes):
                self.buffer = bytearray(self.buffer)
            self.buffer += data
        if self.state in READING:
            self.advance()
        elif len(self.buffer) > HEAD_BYTES:
            self.transport.pause_reading()

    def eof_received(self) -> None:
        """The peer sends no more. One that is parked has gone: its answer is empty, so that no message goes astray."""
        self.ended = True
        if self.state is PARKED:
            self.bus.release(self)
        elif self.state is LINGER:
            self.transport.close()
        else:
            self.advance()

    def advance(self) -> None:
        """Take requests from the buffer, in order, for as long as the one before is answered."""
        while self.state in READING:
            try:
                request = self.take()
            except Refused as refused:  # the head or the body was not HTTP; what follows it could be anything
                self.closing = True
                self.write(refusal(refused))
                return
            if request is None:
                return
            self.state, self.due = BUSY, math.inf  # the disk may take its time
            self.closing = request.parsed.closes
            self.bus.strangers.pop(self, None)
            answer = request.answer()
            if answer is not None:
                self.write(answer)

    def take(self) -> Request | None:
        """The next whole request; None when it has not arrived yet."""
        if self.request is None:
            end = self.buffer.find(b"\r\n\r\n", 0, HEAD_BYTES) + 4
            if end < 4:
                self.want_head()
                return None
            request = self.request = Request(self, bytes(self.buffer[:end]))
            self.buffer = self.buffer[end:]
            request.parse_request()
            request.grant = self.bus.gate.admit(request.parsed)
            if request.route == "/blob/" and request.command == "PUT":
                request.upload = self.bus.blobs.upload(request)
            else:
                request.check_body(self.bus.max_body)
            if request.parsed.expects and len(self.buffer) < request.parsed.length:
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request = self.request
        length = request.parsed.length
        if request.upload:
            return request if self.pour(request.upload) else None
        if len(self.buffer) < length:
            if self.ended:
                raise Refused(400, f"the body ended after {len(self.buffer)} of {length} bytes; nothing was stored")
            if self.state is not BODY:
                self.wait(BODY, BODY_SECONDS + length / BODY_RATE)
            return None
        request.body, self.buffer = bytes(self.buffer[:length]), self.buffer[length:]
        return request

    def pour(self, upload: Upload) -> bool:
        """What has come of a file goes to its disk; true if that was all. Slower than BODY_RATE is 408 here too."""
        part, self.buffer = self.buffer[: upload.missing], self.buffer[upload.missing :]
        upload.write(part)
        if upload.missing and self.ended:
            raise Refused(400, f"the file ended {upload.missing} bytes early; send the rest", *upload.offset())
        if upload.missing and (self.state is not BODY or upload.far_enough()):
            self.wait(BODY, BODY_SECONDS)
        return not upload.missing

    def want_head(self) -> None:
        if not self.buffer:
            if self.ended or self.bus.draining:
                self.hang_up()
            return
        early_check(self.buffer)
        if self.ended:
            raise Refused(400, "the request ended before its empty line")
        if self.state is not HEAD:  # an absolute deadline: a byte now and then does not extend it
            self.wait(HEAD, HEAD_SECONDS)

    def answer(self, answer: Answer | None) -> None:
        """Answer the request in hand, which was BUSY or PARKED, and go on with what was pipelined behind it."""
        if answer and self.state is not LINGER:  # else it is answered later, or the peer has gone meanwhile
            self.write(answer)
            if self.buffer or self.ended:
                self.advance()

    def write(self, answer: Answer) -> None:
        self.state = WRITING
        self.closing = self.closing or self.bus.draining
        request, self.request = self.request, None
        bare = request is not None and request.command == "HEAD"
        self.fetched, self.file = answer.fetched, answer.file
        if answer.status >= 400:
            self.bus.figures.refused[answer.status] += 1
        if self.bus.verbose:
            (request or Request(self, b"")).log_request(answer.status, len(answer.body))
        if request and request.upload:
            request.upload.close()
        if self.file and bare:
            self.file.close()
            self.file = None
        self.transport.write(to_bytes(answer, bare, self.closing))
        if self.transport.is_closing():  # it broke: nobody has the answer, and connection_lost comes next
            return
        if self.transport.unsent:
            self.wait(WRITING, ANSWER_SECONDS + len(answer.body) / BODY_RATE)
        elif self.file:
            self.bus.loop.soon(self.resume_writing)
        else:
            self.written()

    def resume_writing(self) -> None:
        """The peer's system has what was written so far."""
        if self.state is WRITING and self.file:
            self.write_on(self.file)
        elif self.state is WRITING:
            self.written()
            self.advance()

    def write_on(self, file: Download) -> None:
        """One more piece of a file, and the others a turn of the loop."""
        piece = file.read()
        self.closing = self.closing or not piece  # somebody cut the file: its peer must not take what follows for it
        self.wait(WRITING, ANSWER_SECONDS)
        if not file.length:
            file.close()
            self.file = None
        self.transport.write(piece)
        if not self.transport.is_closing() and not self.transport.unsent:
            self.bus.loop.soon(self.resume_writing)

    def written(self) -> None:
        """The peer's system has the whole answer."""
        if self.fetched:
            self.bus.fetched(*self.fetched)
            self.fetched = None
        if self.closing:
            self.hang_up()
        else:
            self.wait(IDLE, IDLE_SECONDS)
            self.transport.resume_reading()

    def hang_up(self) -> None:
        """Close without losing the answer: say that we are done, then read on until the peer has closed too."""
        self.buffer = b""
        self.wait(LINGER, LINGER_SECONDS)
        self.transport.write_eof()
        if self.ended:
            self.transport.close()
        else:
            self.transport.resume_reading()

    def drain(self) -> None:
        """The bus is shutting down."""
        if self.state is PARKED:
            self.bus.release(self)
        elif self.state is IDLE:
            self.hang_up()
        elif self.state in (HEAD, BODY):
            self.write(refusal(Refused(503, "the bus is shutting down: send again in a second", ("Retry-After", "1"))))

    def late(self) -> None:
        """The deadline of this state has passed."""
        if self.state is PARKED:
            self.bus.release(self)
        elif self.state in (HEAD, BODY):
            self.closing = True
            self.write(refusal(Refused(408, f"the request took too long: we waited for {self.state.value}")))
        elif self.state is IDLE:
            self.hang_up()
        else:
            self.transport.abort()


REASONS = {status.value: status.phrase for status in HTTPStatus}
http_date = lru_cache(1)(lambda second: formatdate(second, usegmt=True))


class Plain:
    """A TCP connection: as much of a transport, as asyncio calls it, as Connection uses.

    asyncio's own takes 1.0 to 1.8 KB more for each parked reader, and reads into a new buffer of 256 KiB every time.
    """

    __slots__ = ("closing", "events", "loop", "protocol", "sock", "unsent")
    READ = 16384  # bytes; the largest that malloc takes from its heap without asking the system each time
    BLOCKED = BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError

    def __init__(self, loop: Loop, sock: socket.socket, protocol: Connection) -> None:
        self.loop, self.sock, self.protocol = loop, sock, protocol
        self.unsent = b""
        self.events = 0  # that we wait for
        self.closing = False
        protocol.connection_made(self)
        self.resume_reading()

    def peer(self) -> str:
        """The address of who sits at the other end."""
        try:
            return str((self.sock.getpeername() or ("?",))[0])
        except OSError:  # it has gone again
            return "?"

    def is_closing(self) -> bool:
        return self.closing

    def wait(self, events: int) -> None:
        if events != self.events:
            self.loop.watch(self, events)

    def resume_reading(self) -> None:
        if not self.closing:
            self.wait(self.events | selectors.EVENT_READ)

    def pause_reading(self) -> None:
        self.wait(self.events & ~selectors.EVENT_READ)

    def ready(self, events: int) -> None:
        """What has come of the events that we wait for; it may be late, and we closed meanwhile."""
        if events & self.events & selectors.EVENT_WRITE:
            self.write_on()
        if events & self.events & selectors.EVENT_READ:
            self.read()

    def read(self) -> None:
        try:
            data = self.sock.recv(self.READ)
        except self.BLOCKED:
            return
        except OSError:
            self.abort()
            return
        if data:
            self.protocol.data_received(data)
        else:
            self.pause_reading()
            self.protocol.eof_received()

    def write(self, data: bytes) -> None:
        if self.closing:
            return
        if self.unsent:
            self.unsent += data
            return
        sent = self.send(data)
        if sent < len(data) and not self.closing:
            self.unsent = data[sent:]
            self.wait(self.events | selectors.EVENT_WRITE)

    def write_on(self) -> None:
        self.unsent = self.unsent[self.send(self.unsent) :]
        if not self.unsent and self.events:
            self.wait(self.events & ~selectors.EVENT_WRITE)
            if self.closing:
                self.end()
            else:
                self.protocol.resume_writing()

    def send(self, data: bytes) -> int:
        """How much of it was taken."""
        try:
            return self.sock.send(data)
        except self.BLOCKED:
            return 0
        except OSError:
            self.abort()
            return len(data)

    def write_eof(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Write what is left, then end."""
        if not self.closing:
            self.closing = True
            self.pause_reading()
            if not self.unsent:
                self.loop.soon(self.end)

    def abort(self) -> None:
        if self.sock.fileno() >= 0:
            self.closing = True
            self.wait(0)
            self.unsent = b""
            self.loop.soon(self.end)

    def end(self) -> None:
        if self.sock.fileno() >= 0:
            self.sock.close()
            self.protocol.connection_lost()


class Tls(Plain):
    """The same over an ssl.SSLSocket, which shakes hands when it is read for the first time, and never blocks.

    READ is the size of the largest TLS record too, so OpenSSL keeps nothing back that the selector cannot see.
    """

    __slots__ = ()
    sock: ssl.SSLSocket

    def write_eof(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.sock.unwrap()  # says that we are done; it would say BLOCKED until the peer says so too
        super().write_eof()  # from here on it is a plain socket: what still comes is dropped as it is


def to_bytes(answer: Answer, bare: bool, closing: bool) -> bytes:
    """The answer as HTTP/1.1, in one piece: head and body written apart would cost 40 ms (Nagle and delayed ACK)."""
    length = -1 if answer.status == 204 else answer.file.length if answer.file else len(answer.body)
    head = head_of(int(time.time()), answer.status, answer.kind, length, closing, answer.headers)
    return head if bare else head + answer.body


@lru_cache(64)  # those of many answers in one second are the same: 0.2 us, not 1.7
def head_of(
    second: int, status: int, kind: str, length: int, closing: bool, headers: tuple[tuple[str, str], ...]
) -> bytes:
    content = "" if length < 0 else f"Content-Type: {kind}\r\nContent-Length: {length}\r\n"
    further = "".join([f"{header}: {value}\r\n" for header, value in headers])
    return (
        f"HTTP/1.1 {status} {REASONS[status]}\r\nDate: {http_date(second)}\r\n{content}"
        "Cache-Control: no-store\r\nX-Accel-Buffering: no\r\n"
        f"Connection: {'close' if closing else 'keep-alive'}\r\n{further}\r\n"
    ).encode("latin-1")


def refusal(refused: Refused) -> Answer:
    return Answer(refused.status, encode({"error": refused.sentence}).encode() + b"\n", headers=refused.headers)


# ── Request ──────────────────────────────────────────────────────────────────────────────────────────────────────────

TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(rf'({TOKEN}) (/[!"$-~]*) HTTP/([0-9])\.([0-9])')  # without a fragment
FIELD = re.compile(rf"({TOKEN}):([\t -~\x80-\xff]*)")  # with no blanks of its own around the value: they backtrack
ONCE = {"host", "content-length", "transfer-encoding", "authorization", "idempotency-key", "expect"}


def early_check(head: bytes | bytearray) -> None:
    """Refuse now what no further byte can make into a head, instead of waiting for its deadline.

    A head that comes byte by byte is looked at as often: counting takes 3 us for the largest, a pattern took 1600.
    """
    start = head[:HEAD_BYTES]
    lines = start.count(b"\r\n")
    if b"\0" in start or start.count(b"\n") > lines or start.count(b"\r") - start.endswith(b"\r") > lines:
        raise Refused(400, "the head of the request is not HTTP/1.1: each line ends with CRLF")
    if len(head) > LINE_BYTES + 1 and start.find(b"\r\n", 0, LINE_BYTES + 2) < 0:
        raise Refused(414, f"the request line is longer than {LINE_BYTES} bytes: put the message in the body")
    if len(head) > HEAD_BYTES:
        raise Refused(431, f"the head of the request is larger than {HEAD_BYTES} bytes")


class Head:
    """The head of a request, checked and taken apart; never changed afterwards.

    It passes one strict grammar before anything in it is interpreted, because where two programs read a head
    differently a second request can hide. The stock parser takes the first of two lengths, ignores Transfer-Encoding,
    and drops every header behind one without a colon; it also costs more than all else together (45 us).
    """

    def __init__(self, text: bytes) -> None:
        early_check(text)
        request_line, *lines = text[:-4].decode("latin-1").split("\r\n")
        line = REQUEST_LINE.fullmatch(request_line)
        if not line:
            raise Refused(400, "the request line must be: METHOD /path HTTP/1.1")
        if "abt_" in line[2]:
            raise Refused(400, "a token belongs in the header Authorization, not in a URL: revoke this one")
        if line[3] != "1" or line[4] not in "01":
            raise Refused(505, "only HTTP/1.0 and HTTP/1.1 are spoken here")
        if len(lines) > HEADERS:
            raise Refused(431, f"the request has more than {HEADERS} headers")
        self.command, self.path, self.version = line[1], line[2], f"HTTP/1.{line[4]}"
        self.method = f"do_{self.command}"
        path, _, query = self.path.partition("?")
        self.query = query
        end = path.find("/", 1) + 1
        self.route, self.rest = (path[:end], path[end:]) if end else (path, "")  # "/message/" and an id, or all of it
        self.fields: dict[str, str] = {}
        for text_line in lines:
            self.add_field(text_line)
        self.check_framing()
        self.host = without_port(self.fields.get("host", ""))
        self.foreign = self.is_foreign()

    def add_field(self, text: str) -> None:
        field = FIELD.fullmatch(text)
        if not field:
            raise Refused(400, "a header must be 'Name: value', without control characters")
        key, value = field[1].lower(), field[2].strip(" \t")
        if key not in self.fields:
            self.fields[key] = value
        elif key in ONCE:
            raise Refused(400, f"the header {field[1]} is given twice")
        else:
            self.fields[key] += f", {value}"

    def check_framing(self) -> None:
        """How long the body is, and whether the connection goes on: where requests begin and end."""
        fields = self.fields
        if "host" not in fields and self.version == "HTTP/1.1":
            raise Refused(400, "the Host header is missing")
        if "transfer-encoding" in fields:
            if "content-length" in fields:
                raise Refused(400, "Content-Length and Transfer-Encoding exclude each other")
            raise Refused(501, "Transfer-Encoding is not supported: send a Content-Length")
        length = fields.get("content-length", "0")
        if not re.fullmatch("[0-9]+", length):
            raise Refused(400, "Content-Length must be a number of bytes")
        if len(length) > 15:
            raise Refused(413, "Content-Length has more than 15 digits")
        self.length = int(length)
        if self.length and self.command in ("GET", "HEAD", "OPTIONS"):
            raise Refused(400, f"{self.command} takes no body")
        if fields.get("expect", "100-continue").lower() != "100-continue":
            raise Refused(417, "of all expectations only 100-continue is met here")
        self.expects = "expect" in fields and self.version == "HTTP/1.1"
        options = {option.strip().lower() for option in fields.get("connection", "").split(",")}
        self.closes = "close" in options or (self.version == "HTTP/1.0" and "keep-alive" not in options)

    def is_foreign(self) -> bool:
        """Was it made by a page of another site, in a browser? Such a request bears an Origin, or says it of itself."""
        origin, host = self.fields.get("origin"), self.fields.get("host", "")
        own = origin in (None, f"http://{host}", f"https://{host}")
        return not own or self.fields.get("sec-fetch-site", "none") not in SAME_SITE


known_head = lru_cache(1024)(Head)  # one client's requests have the same head: 0.2 us instead of 5


class Request(BaseHTTPRequestHandler):
    """One HTTP request in memory, with the do_GET and do_POST that Python readers know. It never sees a socket."""

    grant: Grant
    parsed: Head
    upload: Upload | None = None  # where its body goes, if that is a file

    def __init__(self, peer: Connection, head: bytes) -> None:  # no super(): that one reads and answers a socket
        self.peer, self.head, self.body = peer, head, b""
        self.command = "-"

    @property
    def client_address(self) -> tuple[str, int]:  # type: ignore[override]
        return self.peer.address, 0

    @property
    def requestline(self) -> str:  # type: ignore[override]
        """As the log has it: without a token, which must not stay there as well."""
        line = self.head.partition(b"\r\n")[0].decode("latin-1")
        return f"{line.partition(' ')[0]} (a token in a URL)" if "abt_" in line else line or "-"

    def parse_request(self) -> bool:
        """Check and take apart the head; Refused where the stock one would return False."""
        try:
            head = self.parsed = known_head(self.head) if len(self.head) <= 1024 else Head(self.head)
        except Refused:
            self.command = self.requestline.partition(" ")[0]  # an answer to HEAD has no body, not even this one
            raise
        self.command, self.path, self.fields, self.route = head.command, head.path, head.fields, head.route
        return True

    def check_body(self, limit: int) -> None:
        if self.parsed.length > limit:
            raise Refused(413, f"the body has {self.parsed.length} bytes and may have {limit}; nothing was stored")

    def answer(self) -> Answer | None:
        """The answer; None if it comes later, through the connection."""
        try:
            method = getattr(self, self.parsed.method, None)
            if not method:
                raise Refused(501, f"the method {self.command} is not supported")
            answer: Answer | None = method()
            return answer
        except Refused as refused:
            return refusal(refused)
        except Exception:
            traceback.print_exc()
            self.peer.closing = True
            return refusal(Refused(500, "the bus failed on this request; its log says why"))

    def do_GET(self) -> Answer | None:
        return self.endpoint("GET")(self.peer.bus, self)

    def do_POST(self) -> Answer | None:
        return self.endpoint("POST")(self.peer.bus, self)

    def do_PUT(self) -> Answer | None:
        return self.endpoint("PUT")(self.peer.bus, self)

    def do_HEAD(self) -> Answer | None:
        """As GET, but where GET would take messages or wait for them there is nothing to say in a head."""
        endpoint = self.endpoint("GET")
        return Answer(200, b"") if endpoint in (Bus.recv, Bus.log) else endpoint(self.peer.bus, self)

    def do_OPTIONS(self) -> Answer:
        return Answer(204, b"", headers=(("Allow", ", ".join(self.allowed())),))

    def endpoint(self, method: str) -> Callable[[Bus, Request], Answer | None]:
        endpoint = ROUTES.get((method, self.route))
        if not endpoint:
            allowed = self.allowed()
            raise Refused(405, f"{self.route} takes {' or '.join(allowed)}", ("Allow", ", ".join(allowed)))
        return endpoint

    def allowed(self) -> list[str]:
        methods = [method for method, route in ROUTES if route == self.route]
        if not methods:
            raise Refused(404, f"there is nothing at {self.path.partition('?')[0]}: GET / lists what there is")
        return [*methods, *(["HEAD"] if "GET" in methods else []), "OPTIONS"]

    def query(self) -> Query:
        return Query(self.parsed.query) if self.parsed.query else NO_QUERY

    def members(self) -> Query:
        """What a small request says, in a JSON object or in its query."""
        if not self.body:
            return self.query()
        value = parse_json(self.body)
        if not isinstance(value, dict):
            raise Refused(400, "the body must be a JSON object")
        query = Query("")
        query.fields = {member: [one if isinstance(one, str) else encode(one)] for member, one in value.items()
                        if one is not None}  # fmt: skip
        return query

    def plain(self) -> bool:
        return self.fields.get("accept", "").startswith("text/plain")


STRAY_PERCENT = re.compile("%(?![0-9A-Fa-f]{2})")


class Query:
    """The query string, parsed strictly: a field that is read is given once, and is what it should be."""

    def __init__(self, text: str) -> None:
        self.fields: dict[str, list[str]] = {}
        try:
            if STRAY_PERCENT.search(text):
                raise ValueError("parse_qsl would take it for itself")
            pairs = parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=HEADERS)
        except ValueError:
            raise Refused(400, f"the query must be UTF-8, percent-encoded, at most {HEADERS} fields") from None
        for field, value in pairs:
            if "\0" in field + value:
                raise Refused(400, "the query has a NUL character")
            self.fields.setdefault(field, []).append(value)

    def one(self, field: str) -> str | None:
        values = self.fields.get(field, [None])
        if len(values) > 1:
            raise Refused(400, f"{field} is given twice")
        return values[0]

    def names(self, field: str) -> tuple[str, ...]:
        """Names given as a=x&a=y or as a=x,y."""
        parts = [part for value in self.fields.get(field, []) for part in value.split(",")]
        return tuple(dict.fromkeys(name(part, field) for part in parts))

    def name(self, field: str, default: str | None) -> str | None:
        value = self.one(field)
        return default if value is None else name(value, field)

    def number(self, field: str, default: float, low: float, high: float) -> float:
        value = self.one(field)
        if value is None:
            return default
        if not re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", value):
            raise Refused(400, f"{field} must be a number")
        return min(max(float(value), low), high)

    def flag(self, field: str) -> bool | None:
        value = self.one(field)
        if value not in (None, "true", "false", "1", "0"):
            raise Refused(400, f"{field} must be true or false")
        return None if value is None else value in ("true", "1")


    def id(self) -> int:
        tick = tick_of(self.one("id"))
        if tick is None:
            raise Refused(400, "id must be that of a message, like 660ba678a1b40")
        return tick

    def needed(self, field: str) -> str:
        value = self.one(field)
        if not value:
            raise Refused(400, f"{field} is missing")
        return value


NO_QUERY = Query("")


class Parked(Protocol):
    """The record of a parked connection: what it waits for, and what it is told."""

    @property
    def channel(self) -> str | None: ...

    @property
    def hold(self) -> float:
        """s"""

    @property
    def token(self) -> str:
        """What let it in."""

    def places(self) -> Sequence[Key]:
        """Under what it waits: a mailbox, or one of EVERYTHING, REPLIES and FETCHES."""

    def present(self) -> Sequence[str]:
        """The names that count as listening while it waits."""

    def wants(self, message: Message) -> bool: ...

    def found(self, bus: Bus, connection: Connection, messages: list[Message]) -> Answer | None:
        """What it is told now that these are there; None if it will be told later."""

    def nothing(self, bus: Bus, connection: Connection) -> Answer | None:
        """What it is told when its hold is over."""


Key = tuple[str, Union[str, int]]  # a channel and a name; or what no mailbox can be called:
EVERYTHING: Key = ("", "")  # observers wait here
REPLIES, FETCHES = "replies to", "fetches of"  # with a tick; or with a channel and a name


class Poll(NamedTuple):
    """What one reader asks for, parsed. None and () mean any."""

    me: str | None  # whose cursor it is; None for an observer
    names: tuple[str, ...]
    channel: str | None
    sender: str | None
    since: int
    limit: int
    hold: float
    plain: bool
    token: str = ""  # what let it in

    @classmethod
    def recv(cls, query: Query, plain: bool) -> Poll:
        names = query.names("to")
        if not 1 <= len(names) <= NAMES_PER_READER:
            raise Refused(400, f"to must be 1 to {NAMES_PER_READER} names: /recv?to=NAME")
        everyone = () if EVERYONE in names else (EVERYONE,)
        return cls(names[0], names + everyone, query.name("channel", "default"), None, *cls.common(query), plain)

    @classmethod
    def log(cls, query: Query, plain: bool) -> Poll:
        since, limit, hold = cls.common(query)
        if since == LAST:
            raise Refused(400, "an observer has no cursor here: since must be seconds or 'now'")
        return cls(None, query.names("to"), query.name("channel", None), query.name("from", None),
                   since, limit, hold, plain)

    @staticmethod
    def common(query: Query) -> tuple[int, int, float]:
        wait = query.number("wait", HOLD, 0, HOLD_MAX)
        block = query.flag("block")
        hold = wait if block or (block is None and query.one("wait") is not None) else 0
        since = query.one("since")
        return cursor("0" if since is None else since), int(query.number("max", 100, 1, MAX_MESSAGES)), hold

    def places(self) -> Sequence[Key]:
        return [EVERYTHING] if self.me is None else [(str(self.channel), own) for own in self.names]

    def present(self) -> Sequence[str]:
        return () if self.me is None else self.names

    def wants(self, message: Message) -> bool:
        return (
            (self.channel is None or message.channel == self.channel)
            and (not self.names or message.to in self.names)
            and (self.sender is None or message.sender == self.sender)
            and not (message.to == EVERYONE and message.sender == self.me)
        )

    def found(self, bus: Bus, connection: Connection, messages: list[Message]) -> Answer:
        reached = messages[self.limit - 1].tick if len(messages) > self.limit else None
        return delivery(bus, self, messages[: self.limit], reached)

    def nothing(self, bus: Bus, connection: Connection) -> Answer:
        return delivery(bus, self, [])

    def covers(self, upto: int, message: Message) -> bool:
        """Is the message in an answer to this that goes up to a tick?"""
        return self.since < message.tick <= upto and self.wants(message)


class Question(NamedTuple):
    """A message whose sender waits for the answer to it."""

    tick: int
    sender: str
    receipt: str  # what the sender of it is told in any case
    grant: Grant
    hold: float
    channel: str

    @property
    def token(self) -> str:
        return self.grant.token

    def places(self) -> Sequence[Key]:
        return [(REPLIES, self.tick)]

    def present(self) -> Sequence[str]:
        return (self.sender,)

    def wants(self, message: Message) -> bool:
        return message.sender != self.sender and self.grant.reads(message.to)

    def found(self, bus: Bus, connection: Connection, messages: list[Message]) -> Answer:
        """What is the next message of its mailbox is fetched with that: who only asks would fill it."""
        answer, tick = ok(bus, f'{self.receipt}, "reply": {messages[0].render()}'), messages[0].tick
        mark = bus.mailboxes.box(self.channel, self.sender).fetched
        following = bus.store.oldest(self.channel, self.sender, mark)
        return answer._replace(fetched=(self, tick)) if tick == following else answer

    def nothing(self, bus: Bus, connection: Connection) -> Answer:
        return ok(bus, f'{self.receipt}, "reply": null')

    def covers(self, reply: int, message: Message) -> bool:
        return message.tick == reply


class Worker(NamedTuple):
    """Who asks a queue for work. A queue is a mailbox whose messages are handed out, each to one worker at a time."""

    queue: str
    channel: str
    limit: int
    lease: float  # s
    called: str
    until: float  # monotonic clock, s
    token: str

    @classmethod
    def claim(cls, query: Query, token: str) -> Worker:
        queue = name(query.needed("to"), "to")
        if len(queue + DEAD) > 64 or queue == EVERYONE:
            raise Refused(400, f"a queue is a name of at most {64 - len(DEAD)} characters, and not {EVERYONE}")
        return cls(queue, str(query.name("channel", "default")), int(query.number("max", 1, 1, CLAIM_MAX)),
                   query.number("lease", LEASE, 1, LEASE_MAX), str(query.name("worker", "worker")),
                   time.monotonic() + query.number("wait", HOLD, 0, HOLD_MAX), token)

    @property
    def hold(self) -> float:
        return self.until - time.monotonic()

    def places(self) -> Sequence[Key]:
        return [(self.channel, self.queue)]

    def present(self) -> Sequence[str]:
        return (self.queue,)

    def wants(self, message: Message) -> bool:
        return True

    def found(self, bus: Bus, connection: Connection, messages: list[Message]) -> None:
        connection.state, connection.due = BUSY, math.inf
        bus.journal.do(Claim(connection, self))

    def nothing(self, bus: Bus, connection: Connection) -> Answer | None:
        if self.hold <= 0 or connection.ended or bus.draining:
            return handed(bus, [])
        self.found(bus, connection, [])  # a lease or a delay has run out
        return None


class Watch(NamedTuple):
    """A sender that waits until its message was fetched."""

    message: Message
    token: str
    hold: float
    @property
    def channel(self) -> str:
        return self.message.channel

    def places(self) -> Sequence[Key]:
        return [(f"{FETCHES} {self.message.channel}", self.message.to)]

    def present(self) -> Sequence[str]:
        return ()

    def wants(self, message: Message) -> bool:
        return False

    def found(self, bus: Bus, connection: Connection, messages: list[Message]) -> Answer:
        return told(bus, bus.store.message(self.message.tick) or self.message)  # it may have been recalled

    def nothing(self, bus: Bus, connection: Connection) -> Answer:
        return self.found(bus, connection, [])


# ── Identity ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Grant(NamedTuple):
    """What one token allows; OPEN is what everybody may on a bus that has none."""

    token: str  # its id, which is no secret
    name: str
    also: Sequence[str]  # names it may read beside its own
    send_only: bool
    operator: bool

    def sign(self, message: Any) -> Any:
        """The message with this token's sender; 403 if it claims another: what a sender says is no proof."""
        if not self.name or not isinstance(message, dict):
            return message
        if message.get("from", self.name) != self.name:
            raise Refused(403, f"this token sends as {self.name}: leave from out, or use that")
        return {**message, "from": self.name}

    def reads(self, own: str) -> bool:
        return not self.send_only and (self.operator or own in (self.name, EVERYONE, *self.also))

    def check(self, names: Iterable[str]) -> None:
        for own in names:
            if not self.reads(own):
                raise Refused(403, f"this token may not read {own}: an operator can grant it with invite --also")

    def check_operator(self) -> None:
        if not self.operator:
            raise Refused(403, "this token may not read everyone's mail: it needs invite --operator")


OPEN = Grant("", "", (), False, True)
NOBODY = "0" * 64  # the hash of no secret, compared when the id is unknown, so that both refusals take as long
BEARER = re.compile(r"[Bb]earer (abt_[0-9a-f]{8})_([A-Za-z0-9_-]{43})")
PUBLIC = {"/", "/healthz", "/bus_recv.py", "/bus_send.py", "/bus_listener.sh"}  # a new host needs them to begin


class Tokens:
    """The tokens of a bus: a line of JSON each in DATABASE.tokens, with the sha256 of the secret and what it may do.

    The commands write it (a new file, renamed), the server reads it again when it changes. A token is `abt_`, 8 hex
    digits of id, and 256 random bits. Revoked ones stay listed: a bus that had a token once never falls open again.
    """

    def __init__(self, database: str) -> None:
        self.path = f"{database}.tokens"
        self.closed = False
        self.grants: dict[str, tuple[str, Grant]] = {}
        self.used: dict[str, int] = {}  # token: s since 1970; since they were last saved
        self.stamp = self.look()
        self.load()

    def rows(self) -> list[dict[str, Any]]:
        try:
            with open(self.path, encoding="ascii") as file:
                return [json.loads(line) for line in file]
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise Unusable(f"cannot read the tokens in {self.path}: {error}") from None

    def look(self) -> tuple[int, ...]:
        """What differs when the file is another one, or somebody else may read it."""
        try:
            status = os.stat(self.path)
        except OSError:
            return ()
        return status.st_ino, status.st_ctime_ns, status.st_size

    def refresh(self) -> bool:
        """Read the file again if it is not the one we know; true if it was. What cannot be read is no open bus."""
        stamp = self.look()
        if stamp == self.stamp:
            return False
        self.stamp = stamp
        try:
            self.load()
        except Unusable as error:
            self.closed = True
            print(f"bus_server: {error}; going on with those that were known", file=sys.stderr)
        return True

    def load(self) -> None:
        rows = self.rows()
        self.closed = self.closed or bool(rows)
        self.grants = {
            row["id"]: (row["hash"], Grant(*(row[field] for field in ("id", "name", "also", "send_only", "operator"))))
            for row in rows
            if not row["revoked"]
        }

    def create(self, suffix: str) -> IO[str]:
        """A file beside the database."""
        file = os.open(f"{self.path}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        give_to_folder(file, self.path)
        return os.fdopen(file, "w", encoding="ascii")

    def change(self, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
        """Write the file anew. One command at a time; the server reads the old file or the new one, never a part."""
        try:
            pathlib.Path(self.path).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self.create("lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                with self.create("new") as file:
                    file.writelines(f"{encode(row)}\n" for row in change(self.rows()))
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(f"{self.path}.new", self.path)
            time.sleep(2 * Deadlines.SLOT)  # until a running server has looked
        except OSError as error:
            raise Unusable(f"cannot write the tokens in {self.path}: {error.strerror}") from None

    def grant(self, authorization: str) -> Grant:
        """What this Authorization header allows, or 401."""
        token, digest = presented(authorization)
        known, grant = self.grants.get(token, (NOBODY, OPEN))
        if hmac.compare_digest(digest, known):
            self.used[token] = int(time.time())
            return grant
        if self.refresh():  # it may have been made a moment ago
            return self.grant(authorization)
        raise unauthorized()


@lru_cache(1024)  # each client shows the same each time: 0.1 us, not 2
def presented(authorization: str) -> tuple[str, str]:
    """The id of a token, and the sha256 of its secret; of what is no token, those of none."""
    match = BEARER.fullmatch(authorization)
    token, secret = (match[1], match[2]) if match else ("", "")
    return token, hashlib.sha256(secret.encode()).hexdigest()


def unauthorized() -> Refused:
    advice = "set AGENT_BUS_TOKEN to one that was made with: python3 bus_server.py invite NAME"
    return Refused(401, f"this bus wants a token that it knows: {advice}", ("WWW-Authenticate", "Bearer"))


SAME_SITE = ("same-origin", "none")  # none: somebody typed the URL


class Gate:
    """Who may come in, decided from the head alone, before a body is read.

    A browser runs pages of strangers beside a bus on localhost. What such a page sends bears its Origin, or says that
    it is cross-site; and a page whose name was rebound to 127.0.0.1 bears that name as Host.
    """

    def __init__(self, tokens: Tokens, hosts: Iterable[str]) -> None:
        self.tokens = tokens
        self.hosts = {"localhost", *(host.lower() for host in hosts)}

    def admit(self, head: Head) -> Grant:
        if head.foreign:
            raise Refused(403, "pages of other sites may not use this bus")
        if self.tokens.closed:
            return OPEN if head.route in PUBLIC else self.tokens.grant(head.fields.get("authorization", ""))
        if head.host and head.host not in self.hosts and not is_address(head.host):
            raise Refused(403, f"this bus does not answer to {head.host}: start it with --allow-host, or with tokens")
        return OPEN


def without_port(host: str) -> str:
    return re.sub(r":[0-9]{1,5}\Z", "", host).lower()


@lru_cache(256)
def is_address(host: str) -> bool:
    try:
        return bool(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        return False


class Storms:
    """Agents that run away: floods, endless chains of replies, two that cannot stop. Used by the loop only.

    Each is 429 with its reason in words, because an agent that is told why may stop by itself.
    """

    BURST = 1000  # messages a sender may send at once, before `rate` (messages per second) holds it back
    DEPTH = 32  # replies to replies; people change the subject earlier
    TURNS, WITHIN = 30, 600.0  # changes of direction between two names, in so many seconds

    def __init__(self, clock: Callable[[], float], rate: float) -> None:
        self.clock, self.rate = clock, rate
        self.budgets: dict[str, tuple[float, float]] = {}  # sender: messages left, at which time
        self.turns: dict[tuple[str, str, str], tuple[str, deque[float]]] = {}  # pair: who sent last, when turns were

    def forget(self) -> None:
        """Drop what no longer says anything; called now and then."""
        now = self.clock()
        for sender, (left, then) in list(self.budgets.items()):
            if left + (now - then) * self.rate >= self.BURST:
                del self.budgets[sender]
        for pair, (_, turns) in list(self.turns.items()):
            if not turns or turns[-1] < now - self.WITHIN:
                del self.turns[pair]

    def check(self, drafts: Sequence[Draft], each: Iterable[Route]) -> None:
        now = self.clock()
        if self.rate:
            self.spend(drafts[0].sender, len(drafts), now)
        for one in drafts:
            if one.depth > self.DEPTH:
                raise Refused(429, f"this is reply {one.depth} in one chain, {self.DEPTH} are allowed: stop answering; "
                              "what is new begins a new thread, without reply_to", ("Retry-After", "600"))
        for channel, sender, to in each:
            if to != EVERYONE:
                self.turn(channel, sender, to, now)

    def spend(self, sender: str, messages: int, now: float) -> None:
        left, before = self.budgets.get(sender, (self.BURST, now))
        left = min(self.BURST, left + (now - before) * self.rate)
        if messages > left and left < self.BURST:
            wait = math.ceil((min(messages, self.BURST) - left) / self.rate)
            raise Refused(429, f"{sender} sends faster than {self.rate:g} messages a second: wait {wait} s",
                          ("Retry-After", str(wait)))
        self.budgets[sender] = left - messages, now

    def turn(self, channel: str, sender: str, to: str, now: float) -> None:
        pair = (channel, sender, to) if sender < to else (channel, to, sender)
        last, turns = self.turns.get(pair) or ("", deque())
        if last == sender:
            return
        if last:
            while turns and turns[0] < now - self.WITHIN:
                turns.popleft()
            if len(turns) >= self.TURNS:
                wait = math.ceil(turns[0] + self.WITHIN - now)
                raise Refused(429, f"{sender} and {to} have answered each other {self.TURNS} times in "
                              f"{self.WITHIN / 60:g} minutes: stop, or wait {wait} s", ("Retry-After", str(wait)))
            turns.append(now)
        self.turns[pair] = sender, turns


# ── Bus ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Figures:
    """What the bus has done since it was started, for /metrics."""

    def __init__(self) -> None:
        self.sends = self.messages = self.delivered = self.commits = 0
        self.commit_seconds = self.slowest_commit = 0.0
        self.refused: Counter[int] = Counter()  # by status

    def committed(self, batch: Batch) -> None:
        self.sends += len(batch.sends)
        self.messages += len(batch.visible)
        self.commits += 1
        self.commit_seconds += batch.seconds
        self.slowest_commit = max(self.slowest_commit, batch.seconds)


class Schemas:
    """What the messages of a type look like: a JSON Schema in DIR/TYPE.json. The one thing that needs a package."""

    def __init__(self, folder: str, strict: bool) -> None:
        try:
            import jsonschema
        except ImportError:
            raise Unusable("--schemas needs the package jsonschema: pip install 'agent-bus[schemas]'") from None
        self.strict = strict
        self.types = {}
        for file in sorted(pathlib.Path(folder).glob("*.json")):
            try:
                schema = json.loads(file.read_text())
                kind = jsonschema.validators.validator_for(schema)
                kind.check_schema(schema)
            except (OSError, ValueError, jsonschema.SchemaError) as error:
                raise Unusable(f"{file} is not a JSON Schema: {str(error).splitlines()[0]}") from None
            self.types[file.stem] = kind(schema)
        if not self.types:
            raise Unusable(f"there is no TYPE.json in {folder}")

    def check(self, message: Any) -> None:
        """422, with the member that does not fit, if a message is not what its type says."""
        of = message.get("type") if isinstance(message, dict) else None
        schema = self.types.get(of) if isinstance(of, str) else None
        if not schema:
            if self.strict:
                raise Refused(422, f"type must be one of: {', '.join(self.types)}")
            return
        for error in schema.iter_errors(message):
            where = ".".join(map(str, error.absolute_path)) or "the message"
            raise Refused(422, f"{where} does not fit the type {of}: {error.message[:200]}")


class Bus:
    """Sending and receiving, and what happens when a batch is committed. Owned by the loop; its methods never wait.

    Invariants:
    - Nothing is answered before its commit: `send` hands its drafts to the journal, `committed` answers them.
    - A reader that found nothing is parked before any later message is announced: `serve` looks and parks in one turn.
    - `now` never passes a message that was not delivered: reads stop at `last`, the highest tick announced so far.
    - A failed commit fails every sender in it, and the bus recovers (disk full) or ends: it never acknowledges on.
    """

    def __init__(
        self, log: Log, gate: Gate, storms: Storms, *, max_body: int, keep: float, blobs: int = 0,
        schemas: Schemas | None = None, verbose: bool = False
    ) -> None:
        self.store, self.gate, self.storms, self.schemas = log, gate, storms, schemas
        self.blobs = Blobs(log.path, blobs)
        self.max_body, self.keep, self.verbose = max_body, keep, verbose
        self.last = log.last
        self.connections: set[Connection] = set()
        self.strangers: dict[Connection, None] = {}  # kept by Door, oldest first
        self.deadlines = Deadlines(time.monotonic)
        self.mailboxes = Mailboxes(time.monotonic, log.mailboxes(), log.clock)
        self.loop = Loop()
        self.journal = Journal(log, self.committed, self.loop)
        self.figures = Figures()
        self.recalls: set[Recall] = set()  # those the journal has
        self.order: Removal | None = None  # of the command `prune`
        self.draining = self.broken = False
        self.saving = False  # of marks, planned

    def send(self, request: Request) -> None:
        drafts, several = self.drafts(request)
        self.check(drafts)
        self.journal.add(Send(request.peer, drafts, several))

    def ask(self, request: Request) -> None:
        """A send that is answered when its answer is there. Asked again with the same key, it waits again."""
        drafts, several = self.drafts(request)
        if several or len(drafts[0].to) > 1 or EVERYONE in drafts[0].to:
            raise Refused(400, "a question is one message to one name")
        request.grant.check([drafts[0].sender])
        hold = request.query().number("wait", HOLD, 0, HOLD_MAX)
        self.check(drafts)
        self.journal.add(Send(request.peer, drafts, False, (request.grant, hold)))

    def drafts(self, request: Request) -> tuple[list[Draft], bool]:
        """The messages in a request, each of them valid, and whether it was an array of them."""
        self.check_open()
        if not request.body:
            raise Refused(400, "the body is empty: send JSON, or any text with ?from=NAME&to=NAME")
        query = request.query()
        value = self.verbatim(request.body, query) if "to" in query.fields else parse_json(request.body)
        several = isinstance(value, list)
        messages = value if several else [value]
        if request.grant.name:
            messages = [request.grant.sign(message) for message in messages]
        if self.schemas:
            for message in messages:
                self.schemas.check(message)
        key = request.fields.get("idempotency-key")
        drafts = [draft(message, key) for message in messages]
        return [self.placed(one) if one.answers is not None else one for one in drafts], several

    def verbatim(self, body: bytes, query: Query) -> dict[str, Any]:
        """The message whose text is the body, and all else of it is in the query."""
        fields: dict[str, Any] = {field: query.one(field) for field in query.fields if field not in ("to", "wait")}
        if "ttl" in fields:
            fields["ttl"] = query.number("ttl", 0, 0, math.inf)
        return {**fields, "to": list(query.names("to")), "msg": parse_text(body)}

    def check(self, drafts: list[Draft]) -> None:
        """Refused, if these messages cannot be stored together and now."""
        ways: Collection[Route] = routes(drafts)
        if len(ways) != 1:
            self.check_number(drafts, len(ways))
            ways = dict.fromkeys(ways)  # what is the same for many messages is looked at once
        for channel, _, to in ways:
            self.check_room(channel, to)
        self.storms.check(drafts, ways)

    def check_number(self, drafts: list[Draft], copies: int) -> None:
        keys = [(one.sender, one.channel, one.key) for one in drafts if one.key]
        if not drafts or len(set(keys)) < len(keys):
            raise Refused(400, "an array holds at least one message, and no key twice (that of the head is for each)")
        if copies > COPIES_PER_SEND:
            raise Refused(400, f"one request stores at most {COPIES_PER_SEND} messages: send several")

    def check_open(self) -> None:
        if self.draining:
            raise Refused(503, "the bus is shutting down: send again in a second", ("Retry-After", "1"))

    def check_room(self, channel: str, to: str) -> None:
        """429 if a mailbox is full of what nobody has fetched yet."""
        box = self.mailboxes.box(channel, to)
        if box.fetched >= box.newest:
            return
        if box.pending is None:
            box.pending = self.store.count_between(channel, to, box.fetched, box.newest)
        count, size = box.pending
        if count >= MAILBOX_MESSAGES or size >= MAILBOX_BYTES:
            raise Refused(429, f"the mailbox of {to} is full: {count} messages wait and nobody fetches them",
                          ("Retry-After", "60"))

    def placed(self, one: Draft) -> Draft:
        """An answer with its place in a chain of replies."""
        assert one.answers is not None
        thread, depth = self.store.lineage(one.answers)
        return one._replace(thread=thread, depth=depth + 1)

    def recv(self, request: Request) -> Answer | None:
        query = request.query()
        poll = Poll.recv(query, request.plain())
        request.grant.check(poll.names)
        if query.one("bus") not in (None, self.store.bus):  # a cursor from another bus: tell, and mark nothing
            return delivery(self, poll._replace(since=self.last), [])
        self.mailboxes.polled(poll, request.peer.address, self.store.clock())
        self.save_marks_soon()
        if poll.since == LAST:
            first = self.store.oldest(str(poll.channel), str(poll.me), 0)
            self.note_removed(poll)
            return self.serve(request, self.mailboxes.resume(poll, first, self.last), presented=True)
        return self.look(request, poll)

    def log(self, request: Request) -> Answer | None:
        request.grant.check_operator()
        return self.look(request, Poll.log(request.query(), request.plain()))

    def claim(self, request: Request) -> None:
        self.check_open()
        worker = Worker.claim(request.members(), request.grant.token)
        request.grant.check([worker.queue])
        self.mailboxes.polled(worker, request.peer.address, self.store.clock())
        self.journal.do(Claim(request.peer, worker))

    def settle(self, request: Request) -> None:
        """A worker acknowledges its message, gives it back, or asks for more time. Who has the lease may."""
        self.check_open()
        members = request.members()
        delay = members.number("delay", 0, 0, LEASE_MAX)
        lease = members.number("seconds", LEASE, 1, LEASE_MAX)
        reason = (members.one("reason") or "a worker gave it back")[:200]
        self.journal.do(Settle(request.peer, request.route[1:], members.id(), members.needed("lease"),
                               lease if request.route == "/extend" else delay, reason))

    def recall(self, request: Request) -> Answer | None:
        """Its sender takes a message back, if nobody has fetched it, nor is just being sent it."""
        self.check_open()
        message = one_of(self, request.grant, request.members().id())
        if request.grant.name not in ("", message.sender):
            raise Refused(403, "only its sender can recall a message")
        if message.expires == RECALLED:  # a retry, whatever was fetched since
            return ok(self, '"ok": true')
        answers = [each.fetched for each in self.connections if each.fetched]
        on_its_way = any(reader.covers(upto, message) for reader, upto in answers)
        if on_its_way or message.tick <= self.mailboxes.box(message.channel, message.to).fetched:
            raise Refused(409, "it is too late to recall this message: it was fetched")
        recall = Recall(request.peer, message)
        self.recalls.add(recall)
        self.journal.do(recall)
        return None

    def look(self, request: Request, poll: Poll) -> Answer | None:
        """What the poll asks for, now or when it comes. A cursor ahead of us first moves us, durably, up to itself."""
        if poll.since == NOW:
            return delivery(self, poll._replace(since=self.last), [])
        if poll.since <= self.last:
            return self.serve(request, poll, presented=True)
        if poll.since > self.store.clock() + AHEAD:
            raise Refused(400, f"since is over {AHEAD // 1000000} s ahead of this bus; it is in seconds since 1970")

        def raised() -> None:
            answer = None if request.peer.transport.is_closing() else self.serve(request, poll, presented=True)
            if answer:
                request.peer.answer(answer)

        self.journal.raise_last(poll.since, request.peer, raised)
        return None

    def serve(self, request: Request, poll: Poll, presented: bool = False) -> Answer | None:
        if presented:
            self.mailboxes.presented(poll)
        found: list[Message] = []
        reached = None
        if self.mailboxes.newest(poll) > poll.since:
            found, reached = self.read(poll)
        self.note_removed(poll)
        gap = self.mailboxes.gap(poll)
        if found or reached or gap or not poll.hold or self.draining:
            return delivery(self, poll, found, reached, gap)
        if request.peer.ended:  # it has gone while its cursor was written down
            self.mailboxes.left(poll)
            return delivery(self, poll, [])
        if not self.verbose:
            request.peer.request = None  # a parked reader is small: its poll says it all
        self.park(request.peer, poll._replace(token=request.grant.token))
        for connection in self.mailboxes.crowd(poll)[:-PARKED_PER_NAME]:
            connection.wait(PARKED, 0)  # the newest are still alive; not released here, as each may poll again
        return None

    def read(self, poll: Poll) -> tuple[list[Message], int | None]:
        """What the disk has for a poll, up to a message that is being recalled: until that is committed, or refused,
        nobody gets the message, and nobody passes it.
        """
        recalled = [each.message.tick for each in self.recalls if poll.covers(self.last, each.message)]
        upto = min(recalled, default=self.last + 1) - 1
        found, reached = self.store.after(poll, upto)
        if recalled and not reached:
            reached = found[-1].tick if found else upto
        return found, reached

    def note_removed(self, poll: Poll) -> None:
        """What the batch in hand removes is gone before it is announced: who looked for it just now is told as well."""
        if self.journal.removing:
            self.mailboxes.removed(self.store.removed(poll))

    def park(self, connection: Connection, parked: Parked, patience: float = math.inf) -> None:
        """Let it wait until there is something for it, its hold is over, or `patience` (s) has passed."""
        self.mailboxes.park(connection, parked)
        connection.wait(PARKED, min(parked.hold, patience))
        if self.gate.tokens.closed and parked.token not in self.gate.tokens.grants:
            self.evict()  # it was revoked while a commit was waited for

    # What happens later

    def committed(self, batch: Batch) -> None:
        """A batch is on disk, or has failed: answer everyone who waited for it, readers first."""
        self.recalls.difference_update(batch.tasks)
        if batch.error:
            self.failed(batch, batch.error)
            return
        self.last = batch.last
        self.figures.committed(batch)
        self.mailboxes.add(batch.visible)
        self.mailboxes.removed(batch.removed)
        alive = [message for message in batch.visible
                 if message.expires is None or not self.store.is_expired(message)]
        for connection, parked, fresh in self.mailboxes.wake(alive):
            connection.answer(parked.found(self, connection, fresh))
        truths: dict[Any, str] = {}  # of one moment, for all who wrote to the same
        for send in batch.sends:
            send.connection.answer(refusal(send.refused) if send.refused else acknowledged(self, send, truths))
        for task in batch.tasks:
            task.connection.answer(refusal(task.refused) if task.refused else self.done(task))
        for _, raised in batch.raised:
            raised()
        if batch.removal:
            self.removed(batch, batch.removal)

    def done(self, task: Task) -> Answer | None:
        try:
            return task.answer(self)
        except Refused as refused:
            return refusal(refused)

    def claimed(self, claim: Claim) -> None:
        """Handed out is fetched. A message that is out for the last time is buried when its lease runs out."""
        worker = claim.worker
        self.fetched(worker, max(job.message.tick for job in claim.jobs))
        self.look_again((worker.channel, worker.queue), worker.lease)
        if max(job.attempt for job in claim.jobs) >= self.store.attempts:
            self.bury_after(worker.lease)

    def settled(self, settle: Settle) -> None:
        if settle.verb == "nack":
            self.look_again(settle.mailbox, settle.delay)
        elif settle.verb == "extend":
            self.bury_after(settle.delay)

    def look_again(self, queue: Key, delay: float) -> None:
        """Those who wait for work ask again when this may be had, if they do not sooner."""
        due = self.deadlines.clock() + delay
        for connection in self.mailboxes.waiting.get(queue, ()):
            if connection.due > due and isinstance(self.mailboxes.parked[connection], Worker):
                connection.wait(PARKED, delay)

    def stored(self, connection: Connection, upload: Upload, done: Future[int]) -> None:
        """A file was checked and made durable, or was not."""
        upload.finishing = False
        error = done.exception()
        status = 507 if error else done.result()
        if status in (200, 422):  # after an error its part is still there
            self.blobs.used -= upload.at
        if status == 422:
            answer = refusal(Refused(422, "what arrived does not have this sha256: nothing was stored"))
        elif error:
            answer = refusal(Refused(507, f"the bus cannot store the file: {error}"))
        else:
            answer = Answer(status, b'{"ok": true}\n')
        upload.close()
        connection.answer(answer)

    def bury_after(self, lease: float) -> None:
        self.loop.later(lease + Deadlines.SLOT, self.journal.bury)

    def failed(self, batch: Batch, error: Exception) -> None:
        full = isinstance(error, sqlite3.OperationalError) and "full" in str(error)
        if full:
            refused = no_room()
        else:
            refused = Refused(503, "the bus could not write to its disk: it is not known whether this was stored")
            print(f"bus_server: {self.store.path}: {error}; ending: what follows could be lost", file=sys.stderr)
            self.broken = True
        self.mailboxes.changed.update(mark[:2] for mark in batch.marks)
        if batch.removal:
            self.order = None  # its file is still there, and is looked for again
        waiting: list[Send | Task] = [*batch.sends, *batch.tasks]
        for connection in [each.connection for each in waiting] + [connection for connection, _ in batch.raised]:
            connection.answer(refusal(refused))

    def release(self, connection: Connection) -> None:
        """The hold of a parked reader is over, or it hung up: its answer is empty."""
        parked = self.mailboxes.unpark(connection)
        if connection.ended:
            self.mailboxes.left(parked)
        connection.answer(parked.nothing(self, connection))

    def lost(self, connection: Connection) -> None:
        if connection.state is PARKED:
            self.mailboxes.left(self.mailboxes.unpark(connection))

    def fetched(self, reader: Poll | Worker | Question, tick: int) -> None:
        self.mailboxes.fetched(reader, tick)
        for connection in self.mailboxes.watching(reader, tick):
            if connection in self.mailboxes.parked:  # answering one may serve a read behind it that tells the next
                connection.answer(self.mailboxes.unpark(connection).found(self, connection, []))
        self.save_marks_soon()

    def save_marks_soon(self) -> None:
        if not self.saving:
            self.saving = True
            self.loop.later(MARKS_SECONDS, self.save_marks)

    def save_marks(self) -> None:
        self.saving = False
        used, self.gate.tokens.used = self.gate.tokens.used, {}
        self.journal.save(self.mailboxes.take_marks(), self.mailboxes.take_moves(), used)

    def prune(self) -> None:
        """Remove a slice of what is too old; when it is gone, `removed` asks for the next."""
        if self.keep and not self.draining and not self.order:  # the slices of an order must not be replaced
            self.journal.remove(Removal(0, max(self.store.clock() - int(self.keep * 1000000), 0), False))

    def removed(self, batch: Batch, removal: Removal) -> None:
        if batch.removed and not self.draining:
            self.journal.remove(removal._replace(above=max(batch.removed.values())))
        elif self.order and self.order.before == removal.before:
            if ordered(self.store.path) == self.order:  # else there is another one by now
                order_file(self.store.path).unlink(missing_ok=True)  # the command waits for that
            self.order = None

    def look_for_order(self) -> None:
        """The command `prune` has left a file beside the database: what it says is to go, goes."""
        if not self.order:
            self.order = ordered(self.store.path)
            if self.order:
                self.journal.remove(self.order)

    def sweep(self) -> None:
        for connection in self.deadlines.late():
            connection.late()
        if self.gate.tokens.refresh() and self.gate.tokens.closed:  # `revoke` may have left a file without a token
            self.evict()
        self.look_for_order()

    def evict(self) -> None:
        """Answer the parked whose tokens were revoked."""
        for connection, parked in list(self.mailboxes.parked.items()):
            if parked.token not in self.gate.tokens.grants:
                self.mailboxes.unpark(connection)
                connection.closing = True
                connection.answer(refusal(unauthorized()))

    def drain(self) -> None:
        """We are to end: answer who is parked, refuse what comes now. What was accepted goes its way."""
        if not self.draining:
            self.draining = True
            for connection in list(self.connections):
                connection.drain()

    def end(self) -> None:
        """Wait until all are answered and gone, and the marks are saved."""
        self.drain()
        deadline = time.monotonic() + DRAIN_SECONDS
        self.loop.run(lambda: not self.connections or time.monotonic() > deadline)
        self.save_marks()
        self.loop.run(lambda: not self.journal.busy and not self.journal.planned)

    def tidy(self) -> None:
        self.storms.forget()
        self.prune()
        self.journal.bury()  # a lease from before the start has no timer
        self.blobs.forget(time.time(), self.keep)
        if self.gate.tokens.used:
            self.save_marks_soon()

    def drop_idle(self) -> None:
        """Descriptors have run out: close the connections that wait for nobody, but those that came this second."""
        fresh = self.deadlines.clock() + HEAD_SECONDS - 1
        for connection in list(self.connections):
            if connection.state is IDLE and not (connection in self.strangers and connection.due > fresh):
                connection.transport.abort()


# ── Journal and Log ──────────────────────────────────────────────────────────────────────────────────────────────────


class Receipt(NamedTuple):
    ticks: list[int]  # one for each name in `to`
    duplicate: bool


def receipt_of(one: Draft, known: dict[tuple[str, str, str], tuple[Draft, Receipt]]) -> Receipt | None:
    """That of the first send with this sender, channel and key; 409 if it was of another message."""
    first, receipt = known.get((one.sender, one.channel, str(one.key))) or (one, None)
    if first.to != one.to or (first.text != one.text and in_order(first.text) != in_order(one.text)):
        raise Refused(409, f"the key {one.key} was used for another message: a new message needs a new key")
    return receipt and receipt._replace(duplicate=True)


class Send:
    """One POST /send on its way through a batch: all of its drafts are stored, or none."""

    __slots__ = ("asked", "connection", "drafts", "receipts", "refused", "several")

    def __init__(
        self, connection: Connection, drafts: list[Draft], several: bool, asked: tuple[Grant, float] | None = None
    ) -> None:
        self.connection, self.drafts, self.several = connection, drafts, several
        self.asked = asked  # by whom, and for how many seconds the answer to it is waited for
        self.receipts: list[Receipt] = []
        self.refused: Refused | None = None


class Task:
    """What else must be on disk before it is answered. `commit` is done aside, `answer` in a turn."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.refused: Refused | None = None

    def commit(self, log: Log, batch: Batch) -> None:
        """Within the transaction. Refused before anything was changed, or not at all."""
        raise NotImplementedError

    def answer(self, bus: Bus) -> Answer | None:
        raise NotImplementedError


class Claim(Task):
    def __init__(self, connection: Connection, worker: Worker) -> None:
        super().__init__(connection)
        self.worker = worker
        self.jobs: list[Job] = []
        self.due = math.inf  # s until the next one could be had, as far as is known

    def commit(self, log: Log, batch: Batch) -> None:
        self.jobs, self.due = log.claim(self.worker, batch)

    def answer(self, bus: Bus) -> Answer | None:
        worker = self.worker
        if self.jobs and self.connection.state is LINGER:  # the worker has gone: others may have them at once
            for job in self.jobs:
                tick = job.message.tick
                bus.journal.do(Settle(self.connection, "nack", tick, job.lease, 0, "its worker hung up"))
        elif self.jobs:
            bus.claimed(self)
        elif worker.hold > 0 and self.connection.state is BUSY and not self.connection.ended | bus.draining:
            bus.park(self.connection, worker, self.due)
            return None
        return handed(bus, self.jobs)


class Settle(Task):
    def __init__(
        self, connection: Connection, verb: str, tick: int, lease: str, delay: float, reason: str
    ) -> None:
        super().__init__(connection)
        self.verb, self.tick, self.lease, self.delay, self.reason = verb, tick, lease, delay, reason
        self.mailbox: Key = EVERYTHING

    def commit(self, log: Log, batch: Batch) -> None:
        self.mailbox = log.settle(self, batch)

    def answer(self, bus: Bus) -> Answer:
        bus.settled(self)
        return ok(bus, '"ok": true')


class Recall(Task):
    """Its sender takes a message back. Bus.read keeps it from readers meanwhile, so what is refused stays readable."""

    def __init__(self, connection: Connection, message: Message) -> None:
        super().__init__(connection)
        self.message = message

    def commit(self, log: Log, batch: Batch) -> None:
        log.withdraw(self.message)

    def answer(self, bus: Bus) -> Answer:
        box = bus.mailboxes.box(self.message.channel, self.message.to)
        box.perishable, box.pending = True, None
        return ok(bus, '"ok": true')


class Job(NamedTuple):
    """A message in the hands of a worker."""

    message: Message
    attempt: int  # 1 for the first
    lease: str  # who has this may settle it
    until: int  # wall clock, us


FETCHED, ACKNOWLEDGED = 0, 1  # what a Receipt of a reader says


class Move(NamedTuple):
    """Who moved a mark of a mailbox up to a tick, and when: the last one of about a second stands for all of it."""

    channel: str
    name: str
    kind: int
    tick: int
    reader: str
    at: int  # wall clock, us


class Removal(NamedTuple):
    """What is to go, a slice at a time: messages between two ticks; with `sparing`, those that are PENDING stay."""

    above: int
    before: int
    sparing: bool


class Mark(NamedTuple):
    """How far a mailbox was read, as it is stored."""

    channel: str
    name: str
    own: bool
    read: int | None
    fetched: int
    seen: int


class Batch:
    """Everything for the next transaction, and, after it, what came of it."""

    def __init__(self) -> None:
        self.sends: list[Send] = []
        self.tasks: list[Task] = []
        self.at_least = 0  # a reader's cursor that `last` must reach
        self.raised: list[tuple[Connection, Callable[[], None]]] = []  # who waits for that, and how they go on
        self.marks: list[Mark] = []
        self.moves: list[Move] = []
        self.used: dict[str, int] = {}  # when each token was last seen, s since 1970
        self.removal: Removal | None = None  # of one slice
        self.burying = False  # move what failed too often to the dead letters

        self.mailboxes: list[tuple[Any, ...]] = []  # rows to be inserted
        self.messages: list[tuple[Any, ...]] = []
        self.plain: list[Any] = []  # rows one after the other, of messages without key, ttl and reply_to
        self.last = 0
        self.seconds = 0.0  # that the commit took
        self.visible: list[Message] = []
        self.removed: dict[tuple[str, str], int] = {}  # mailbox: its highest removed tick
        self.error: Exception | None = None

    def is_one_statement(self) -> bool:
        """Nothing but messages, and few: SQLite makes a transaction of it without BEGIN and COMMIT.

        A lone send takes 27,000 instructions less, of 297,000 (callgrind).
        """
        others = self.mailboxes or self.tasks or self.at_least or self.marks or self.used or self.removal
        statements = len(self.messages) + math.ceil(len(self.plain) / PLAIN_VALUES)
        return not (others or self.burying) and statements == 1


class Journal:
    """Group commit: what one turn of the loop brought is one transaction. Owned by the loop.

    Invariant: one Batch at a time is stamped, committed and announced, so all three are in one order.
    """

    def __init__(self, log: Log, committed: Callable[[Batch], None], loop: Loop) -> None:
        self.log, self.committed, self.loop = log, committed, loop
        self.next = Batch()
        self.planned = self.busy = self.removing = False  # removing: the batch in hand does

    def add(self, send: Send) -> None:
        self.next.sends.append(send)
        self.plan()

    def do(self, task: Task) -> None:
        self.next.tasks.append(task)
        self.plan()

    def raise_last(self, tick: int, connection: Connection, raised: Callable[[], None]) -> None:
        self.next.at_least = max(self.next.at_least, tick)
        self.next.raised.append((connection, raised))
        self.plan()

    def save(self, marks: Iterable[Mark], moves: Iterable[Move], used: dict[str, int]) -> None:
        self.next.marks.extend(marks)
        self.next.moves.extend(moves)
        self.next.used.update(used)
        self.plan()

    def remove(self, removal: Removal) -> None:
        self.next.removal = removal
        self.plan()

    def bury(self) -> None:
        self.next.burying = True
        self.plan()

    def plan(self) -> None:
        """Commit when all who were ready in this turn have been read: they share a transaction."""
        if not self.planned:
            self.planned = True
            if not self.busy:
                self.loop.soon(self.commit)

    def commit(self) -> None:
        batch, self.next = self.next, Batch()
        self.planned, self.busy, self.removing = False, True, batch.removal is not None
        began = time.monotonic()
        try:
            self.log.stamp(batch)
        except Exception as error:
            batch.error = error
        try:
            self.loop.aside(lambda: self.log.commit(batch))
        except Exception as error:
            batch.error = error
        batch.seconds = time.monotonic() - began
        self.busy = self.removing = False
        if self.planned:  # what came while the deputy served
            self.loop.soon(self.commit)
        self.committed(batch)


def no_room() -> Refused:
    return Refused(507, "the disk of the bus is full: nothing was stored, try again later")


class Unusable(Exception):
    """The bus cannot start; one sentence that says why."""


class InUse(Unusable):
    """Because another one has its database."""


MIGRATIONS = [  # user_version n is what the first n of them made; only ever add at the end
    """
    CREATE TABLE bus(id TEXT NOT NULL, last INTEGER NOT NULL);
    CREATE TABLE mailboxes(
        id INTEGER PRIMARY KEY, channel TEXT NOT NULL, name TEXT NOT NULL,
        own INTEGER NOT NULL DEFAULT 0,      -- somebody reads it as their own, first name
        read INTEGER,                        -- highest cursor its owner presented; NULL before the first
        fetched INTEGER NOT NULL DEFAULT 0,  -- highest tick in an answer that was written out
        seen INTEGER NOT NULL DEFAULT 0,     -- wall clock of the last poll, us
        removed INTEGER NOT NULL DEFAULT 0,  -- highest tick that retention removed
        UNIQUE(channel, name));
    CREATE TABLE messages(
        tick INTEGER PRIMARY KEY, mailbox INTEGER NOT NULL, n INTEGER NOT NULL, sender TEXT NOT NULL,
        key TEXT, expires INTEGER, depth INTEGER NOT NULL, sum INTEGER NOT NULL, text TEXT NOT NULL);
    CREATE TABLE uses(token TEXT PRIMARY KEY, used INTEGER NOT NULL);
    CREATE INDEX in_order ON messages(mailbox, tick);
    CREATE INDEX retries ON messages(key, sender) WHERE key IS NOT NULL;
    CREATE INDEX expiring ON messages(mailbox, expires, tick) WHERE expires IS NOT NULL;
    CREATE VIEW readable AS SELECT datetime(tick / 1000000, 'unixepoch') AS time, channel, sender, name AS "to",
        json_extract('{' || text || '}', '$.msg') AS msg FROM messages JOIN mailboxes ON mailbox = id;
    """,
    """
    ALTER TABLE messages ADD COLUMN answers INTEGER;  -- the tick it replies to
    ALTER TABLE messages ADD COLUMN thread INTEGER;  -- the tick that began its chain of replies
    ALTER TABLE mailboxes ADD COLUMN taken INTEGER NOT NULL DEFAULT 0;  -- highest tick handed out as work
    CREATE TABLE work(
        tick INTEGER PRIMARY KEY, mailbox INTEGER NOT NULL, attempt INTEGER NOT NULL,
        due INTEGER,                         -- when it can be had again, us; NULL when it is done or dead
        lease TEXT,                          -- of who has it; NULL when it was given back, or is dead
        worker TEXT NOT NULL, reason TEXT);
    CREATE TABLE receipts(
        mailbox INTEGER NOT NULL, kind INTEGER NOT NULL, tick INTEGER NOT NULL,
        reader TEXT NOT NULL, at INTEGER NOT NULL, PRIMARY KEY(mailbox, kind, tick)) WITHOUT ROWID;
    CREATE INDEX threads ON messages(thread, tick) WHERE thread IS NOT NULL;
    CREATE INDEX undone ON work(mailbox, due) WHERE due IS NOT NULL;
    """,
]
MAILBOX = "(SELECT id FROM mailboxes WHERE channel = ? AND name = ?)"
# OR ROLLBACK: to undo a statement of a transaction, SQLite writes what it overwrites to a file in /var/tmp, 1,250 times
# for 1,600 messages in arrays; we undo the whole transaction anyway, and 23 % more messages go through in a second.
INSERT = "INSERT OR ROLLBACK INTO messages VALUES "
PLAIN_ROWS, PLAIN_VALUES = 100, 100 * 6  # in one statement; SQLite before 3.32 takes 999 values
PENDING = (  # reading it is not doing it: work stays, whoever looked at the queue
    "(tick > max(CAST(fetched AS INTEGER), CAST(ifnull(read, 0) AS INTEGER)) "  # nobody has fetched it
    "OR (taken > 0 AND tick > taken) "  # workers ask here, and none has had it
    "OR tick IN (SELECT tick FROM work WHERE due IS NOT NULL))"  # one has had it, and it is not done
)
NEWEST_N = "(SELECT n FROM messages WHERE mailbox = id AND typeof(n) = 'integer' ORDER BY tick DESC LIMIT 1)"
ROW = "tick, channel, name, sender, text, n, expires, answers, sum"
SELECT = f"SELECT {ROW} FROM mailboxes JOIN messages ON mailbox = id"
EARLIER = f"""SELECT {ROW}, key FROM
    (SELECT json_extract(value, '$[0]') AS its_key, json_extract(value, '$[1]') AS its_sender FROM json_each(?))
    CROSS JOIN messages ON key = its_key AND sender = its_sender JOIN mailboxes ON mailbox = id ORDER BY tick"""


@lru_cache(PLAIN_ROWS)
def insert_plain(rows: int) -> str:
    """Many plain messages in one statement: of 16 sends each takes 10,000 instructions less than with executemany, and
    another 5,000, as what they do not have is no parameter (callgrind).
    """
    return INSERT + ", ".join(["(?, ?, ?, ?, NULL, NULL, 0, ?, ?, NULL, NULL)"] * rows)


def checksum(message: Message) -> int:
    tick, channel, to, _, text, n, expires, _ = message  # the text has the sender and what it answers
    return zlib.crc32(f"({tick}, '{channel}', '{to}', {text!r}, {n}, {expires})".encode())


class Log:
    """The messages on disk, in tick order. A batch is stamped, then committed: `commit` is done aside, while
    somebody else may have the turns; everything else in a turn.

    Invariant: the tick is unique and increasing, assigned here by the one writer, across restarts and clock steps. One
    batch is under way at a time, so the order of ticks is that of commits.

    One connection writes, another reads and can do nothing else (SQLite before 3.51.3 may damage a WAL that two
    connections write). A read takes all its rows or closes its statement: an open one would let the WAL grow for ever.
    """

    def __init__(self, path: str, clock: Callable[[], int] = wall_clock, attempts: int = 5) -> None:
        self.path, self.clock, self.attempts = path, clock, attempts
        memory = path == ":memory:"
        target = f"file:bus-{secrets.token_hex(4)}?mode=memory&cache=shared" if memory else path
        self.lock = None if memory else locked(path)
        try:
            self.writing = sqlite3.connect(
                target, isolation_level=None, check_same_thread=False, uri=memory, cached_statements=128
            )
            prepare(self.writing, path, "memory" if memory else "wal")
            self.reading = sqlite3.connect(target, isolation_level=None, check_same_thread=False, uri=memory)
            for each in (self.writing, self.reading):  # what is no UTF-8 any more is a damaged row, not an error
                each.text_factory = lambda text: text.decode("utf-8", "replace")
            # Dirty reads exist in :memory: only, and are harmless: the loop never asks beyond what was announced.
            self.reading.executescript("PRAGMA query_only=ON; PRAGMA read_uncommitted=ON; PRAGMA wal_autocheckpoint=0")
            self.recall()
            self.epoch = max(clock(), self.last - AHEAD) - time.monotonic_ns() // 1000  # not in what has been
        except (sqlite3.Error, UnicodeDecodeError) as error:  # the latter: SQLite names what it cannot read
            raise Unusable(f"cannot use the database {path}: {error}") from None

    def close(self) -> None:
        self.reading.close()  # first: the last to close folds the WAL into the database, and that is the writer's work
        self.writing.close()
        if self.lock:
            self.lock.close()

    def sign(self, url: str) -> None:
        """Write into the lock file who holds it; `invite` reads it."""
        if self.lock:
            self.lock.truncate(0)
            self.lock.write(f"{url}\n".encode())
            self.lock.flush()

    # A message has a checksum. What is known of it, in the other tables, has none: a number or a name that is none any
    # more is told and done without, so that no row can end the bus.

    def damaged(self, what: str) -> None:
        print(f"bus_server: {self.path}: {what} is damaged; skipped", file=sys.stderr)

    def number(self, value: Any, otherwise: int, what: str) -> int:
        """A number as it is stored, or what stands for it."""
        if isinstance(value, int):
            return value
        self.damaged(what)
        return otherwise

    # What the writer knows: used by who commits, from the stamping of a batch until it is on disk

    def recall(self) -> None:
        """What the writer knows, read back from disk: at start, and when a transaction was undone."""
        self.bus: str
        self.last: int
        self.bus, last, newest = self.writing.execute(
            "SELECT id, last, (SELECT ifnull(max(tick), 0) FROM messages) FROM bus"
        ).fetchone()
        self.last = max(self.number(last, 0, "the newest tick"), newest)
        rows = self.writing.execute(f"SELECT channel, name, id, ifnull({NEWEST_N}, 0) FROM mailboxes").fetchall()
        self.counts = {(channel, own): (number, n) for channel, own, number, n in rows}
        self.mailboxes_made = max((number for _, _, number, _ in rows), default=0)

    def stamp(self, batch: Batch) -> None:
        """Before its commit, after that of all others: give each draft its ticks, or the receipt it got at first."""
        self.last = max(self.last, batch.at_least)  # first, so that what is sent now lies above that cursor
        for mark in batch.marks:
            self.mailbox(mark.channel, mark.name, batch)
        if not batch.sends:
            return
        now, room, known = self.clock(), self.has_room(), self.known(batch)
        for send in batch.sends:
            try:
                earlier = [receipt_of(one, known) if one.key else None for one in send.drafts]
                if not room and None in earlier:
                    raise no_room()
            except Refused as refused:
                send.refused = refused
                continue
            for one, receipt in zip(send.drafts, earlier):
                if receipt is None:
                    receipt = made(Receipt, (self.place(one, now, batch), False))
                    if one.key:
                        known[one.sender, one.channel, one.key] = one, receipt
                send.receipts.append(receipt)

    def known(self, batch: Batch) -> dict[tuple[str, str, str], tuple[Draft, Receipt]]:
        """What was sent earlier with the keys of this batch: by sender, channel and key."""
        keys = {(one.key, one.sender) for send in batch.sends for one in send.drafts if one.key}
        found: dict[tuple[str, str, str], tuple[Draft, Receipt]] = {}
        for *row, key in self.reading.execute(EARLIER, (encode([*keys]),)).fetchall() if keys else ():
            message = self.checked(row)
            if message:
                tick, channel, to, sender, text, *_ = message
                nothing = Draft(channel, (), sender, text, key, None), Receipt([], True)
                first, receipt = found.get((sender, channel, key), nothing)
                receipt.ticks.append(tick)
                found[sender, channel, key] = first._replace(to=(*first.to, to)), receipt
        return found

    def place(self, one: Draft, now: int, batch: Batch) -> list[int]:
        """Make a Message, and a row, of a draft for each of its receivers; their ticks."""
        channel, receivers, sender, text, key, ttl, answers, thread, depth = one
        expires = None if ttl is None else now + ttl
        ticks = []
        for to in receivers:
            tick = self.last = max(now, self.last + 1)  # the clock may step back; the cursor must not
            mailbox, n = self.mailbox(channel, to, batch)
            n += 1
            self.counts[channel, to] = mailbox, n
            message = made(Message, (tick, channel, to, sender, text, n, expires, answers))
            batch.visible.append(message)
            if key or ttl or depth:
                batch.messages.append(
                    (tick, mailbox, n, sender, key, expires, depth, checksum(message), text, answers, thread)
                )
            else:
                batch.plain += tick, mailbox, n, sender, checksum(message), text
            ticks.append(tick)
        return ticks

    def mailbox(self, channel: str, own: str, batch: Batch) -> tuple[int, int]:
        """The number of a mailbox, and how many messages it ever got; made with this batch if there is none."""
        known = self.counts.get((channel, own))
        if known is None:
            self.mailboxes_made += 1
            known = self.counts[channel, own] = self.mailboxes_made, 0
            batch.mailboxes.append((self.mailboxes_made, channel, own))
        return known

    def has_room(self) -> bool:
        """Is there more than RESERVE_BYTES of the disk for messages, beside what folding in the WAL will take?

        The room of messages that were removed counts. The WAL has no limit: while readers are busy it only grows.
        """
        if self.path == ":memory:":
            return True
        disk = os.statvfs(self.path)
        free = disk.f_bavail * disk.f_frsize
        if free < 64 * RESERVE_BYTES:  # else not worth the time to ask
            pages = "(freelist_count - page_count) * page_size FROM pragma_freelist_count, pragma_page_count"
            free += self.reading.execute(f"SELECT {pages}, pragma_page_size").fetchone()[0] + os.path.getsize(self.path)
        return bool(free >= RESERVE_BYTES)

    # Aside

    def commit(self, batch: Batch) -> None:
        """One transaction. When it raises, nothing of the batch is on disk, as far as the disk can be believed."""
        try:
            if batch.error:
                raise batch.error
            if batch.is_one_statement():
                self.insert(batch)
            else:
                self.writing.execute("BEGIN IMMEDIATE")
                self.commit_all(batch)
                self.writing.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self.writing.execute("ROLLBACK")
            self.recall()
            raise
        batch.last = self.last

    def commit_all(self, batch: Batch) -> None:
        self.insert(batch)
        for task in batch.tasks:
            try:
                task.commit(self, batch)
            except Refused as refused:
                task.refused = refused
        if batch.burying:
            self.bury_all(batch)
        if batch.at_least or batch.removal:
            self.writing.execute("UPDATE bus SET last = ?", (self.last,))
        self.save(batch.marks, batch.moves, batch.used)
        if batch.removal:
            self.remove(batch, batch.removal)

    def insert(self, batch: Batch) -> None:
        """The mailboxes and messages that are new."""
        if batch.mailboxes:
            self.writing.executemany("INSERT INTO mailboxes(id, channel, name) VALUES (?, ?, ?)", batch.mailboxes)
        for start in range(0, len(batch.plain), PLAIN_VALUES):
            values = batch.plain[start : start + PLAIN_VALUES]
            self.writing.execute(insert_plain(len(values) * PLAIN_ROWS // PLAIN_VALUES), values)
        if batch.messages:
            self.writing.executemany(f"{INSERT}(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", batch.messages)
        batch.mailboxes, batch.messages, batch.plain = [], [], []

    def save(self, marks: list[Mark], moves: list[Move], used: dict[str, int]) -> None:
        self.writing.executemany("INSERT OR REPLACE INTO uses VALUES (?, ?)", list(used.items()))
        self.writing.executemany(
            "UPDATE mailboxes SET own = ?, read = ?, fetched = ?, seen = ? WHERE channel = ? AND name = ?",
            [(*mark[2:], *mark[:2]) for mark in marks],
        )
        self.writing.executemany(
            f"INSERT OR REPLACE INTO receipts VALUES ({MAILBOX}, ?, ?, ?, ?)",
            [move for move in moves if move.tick],
        )

    def remove(self, batch: Batch, removal: Removal) -> None:
        """Remove the oldest slice of what is to go, and note for each mailbox how far it is gone."""
        fetched = f"AND NOT {PENDING}" if removal.sparing else ""
        rows = self.writing.execute(
            f"{SELECT} WHERE tick > ? AND tick < ? {fetched} ORDER BY tick LIMIT {PRUNE_SLICE}",
            (removal.above, removal.before),
        ).fetchall()
        for tick, channel, own, *_ in rows:
            batch.removed[channel, own] = tick
        self.writing.executemany(  # first, for readers of :memory:, who see the messages go
            "UPDATE mailboxes SET removed = ? WHERE channel = ? AND name = ?",
            [(tick, channel, own) for (channel, own), tick in batch.removed.items()],
        )
        for table in ("messages", "work"):
            self.writing.executemany(f"DELETE FROM {table} WHERE tick = ?", [row[:1] for row in rows])
        self.writing.executemany(
            f"DELETE FROM receipts WHERE mailbox = {MAILBOX} AND kind IN (0, 1) AND tick < ?",
            [(*key, tick) for key, tick in batch.removed.items()],
        )

    # Work, still aside. A row of `work` is a message that was handed out at least once; `due` is when it
    # can be had again, and NULL when it is done. `steady` runs on when the wall clock steps, so that a lease is as long
    # as it was said to be.

    def steady(self) -> int:
        return self.epoch + time.monotonic_ns() // 1000

    def claim(self, worker: Worker, batch: Batch) -> tuple[list[Job], float]:
        """Up to `limit` messages for a worker, and no more than one above ANSWER_BYTES: first what came back, then what
        is new. And s until more come back.
        """
        mailbox, _ = self.mailbox(worker.channel, worker.queue, batch)
        self.insert(batch)
        now = self.steady()
        if self.writing.execute("UPDATE work SET due = ? WHERE mailbox = ? AND due >= ''", (now, mailbox)).rowcount:
            self.damaged(f"when work of {worker.queue} comes back")  # a text lies above every number
        found: list[tuple[Message, int]] = []
        room = ANSWER_BYTES
        for again in self.came_back(mailbox, worker.limit, now, batch):
            found.append(again)
            room -= len(again[0].text)
            if room < 0 or len(found) == worker.limit:
                break
        else:
            found += self.untaken(mailbox, worker.limit - len(found), room)
        due = now + int(worker.lease * 1000000)
        jobs = [Job(message, attempt, secrets.token_hex(8), due + self.clock() - now) for message, attempt in found]
        self.writing.executemany(
            "INSERT OR REPLACE INTO work VALUES (?, ?, ?, ?, ?, ?, NULL)",
            [(job.message.tick, mailbox, job.attempt, due, job.lease, worker.called) for job in jobs],
        )
        undone = "mailbox = ? AND due IS NOT NULL"  # in these words, so that the index `undone` has the first of them
        first = self.writing.execute(f"SELECT min(due) FROM work WHERE {undone}", (mailbox,)).fetchone()[0]
        return jobs, math.inf if first is None else (first - now) / 1000000

    def came_back(self, mailbox: int, limit: int, now: int, batch: Batch) -> Iterator[tuple[Message, int]]:
        """What was given back or whose lease ran out, with the number of the next attempt."""
        rows = self.writing.execute(
            "SELECT tick, attempt, reason FROM work WHERE mailbox = ? AND due <= ? ORDER BY due LIMIT ?",
            (mailbox, now, limit),
        ).fetchall()
        for tick, attempt, reason in rows:
            message = self.message(tick, self.writing)
            attempt = self.number(attempt, 0, f"the attempt of {tick:x}")
            if not message or self.is_expired(message):
                self.writing.execute("DELETE FROM work WHERE tick = ?", (tick,))
            elif attempt >= self.attempts and not message.to.endswith(DEAD):
                self.bury(message, attempt, reason, batch)
            else:
                yield message, attempt + 1

    def untaken(self, mailbox: int, limit: int, room: int) -> list[tuple[Message, int]]:
        """What no worker has had yet, `limit` messages or `room` bytes; the expired and the damaged are passed over."""
        [stored] = self.writing.execute("SELECT taken FROM mailboxes WHERE id = ?", (mailbox,)).fetchone()
        taken = 1 if stored == 0 else stored  # below every message, and not 0: from now on what comes is work (PENDING)
        if not isinstance(taken, int):
            self.damaged(f"how far the queue in mailbox {mailbox} was handed out")
            highest = "SELECT ifnull(max(tick), 1) FROM work WHERE mailbox = ?"
            [taken] = self.writing.execute(highest, (mailbox,)).fetchone()
        rows = self.writing.execute(
            f"{SELECT} WHERE mailbox = ? AND tick > ? AND (expires IS NULL OR expires > ?) ORDER BY tick",
            (mailbox, taken, self.clock()),
        )
        found: list[tuple[Message, int]] = []
        with contextlib.closing(rows):
            for row in rows:
                taken = row[0]
                message = self.checked(row)
                if message:
                    found.append((message, 1))
                    room -= len(message.text)
                if room < 0 or len(found) == limit:
                    break
        if taken != stored:
            self.writing.execute("UPDATE mailboxes SET taken = ? WHERE id = ?", (taken, mailbox))
        return found

    def settle(self, settle: Settle, batch: Batch) -> Key:
        """Do what a worker says of its message; 409 if it is not its any more. Returns the queue."""
        row = self.writing.execute(
            "SELECT attempt, due, channel, name FROM work JOIN mailboxes ON mailbox = id WHERE tick = ? AND lease = ?",
            (settle.tick, settle.lease),
        ).fetchone()
        if not row or (row[1] is None and settle.verb != "ack"):
            raise Refused(409, "this message is not yours any more: its lease ran out, or it was settled")
        due = None if settle.verb == "ack" else self.steady() + int(settle.delay * 1000000)
        self.writing.execute("UPDATE work SET due = ? WHERE tick = ?", (due, settle.tick))
        if settle.verb == "nack":
            self.writing.execute(
                "UPDATE work SET lease = NULL, reason = ? WHERE tick = ?", (settle.reason, settle.tick)
            )
            message = self.message(settle.tick, self.writing)
            attempt = self.number(row[0], 0, f"the attempt of {settle.tick:x}")
            if message and attempt >= self.attempts and not message.to.endswith(DEAD):
                self.bury(message, attempt, settle.reason, batch)
        return row[2], row[3]

    def bury(self, message: Message, attempt: int, reason: str | None, batch: Batch) -> None:
        """Move a message to the dead letters of its queue, with what happened to it."""
        reason = reason if isinstance(reason, str) else "its worker was not heard of"
        why = {"dead_of": f"{message.tick:x}", "attempts": attempt, "reason": reason}
        members = {**json.loads(f"{{{message.text}}}"), **why}
        letter = Draft(message.channel, (message.to + DEAD,), message.sender, encode(members)[1:-1], None, None, None)
        self.place(letter, self.clock(), batch)
        self.insert(batch)
        self.writing.execute("UPDATE work SET due = NULL, lease = NULL WHERE tick = ?", (message.tick,))

    def bury_all(self, batch: Batch) -> None:
        """Bury all that are due and failed too often. Jobs that are in no queue any more go back into theirs before."""
        queue = "(SELECT mailbox FROM messages WHERE messages.tick = work.tick)"
        if self.writing.execute(
            f"UPDATE OR IGNORE work SET mailbox = {queue} WHERE mailbox >= '' AND due IS NOT NULL"
        ).rowcount:
            self.damaged("the queue of a job")
        rows = self.writing.execute(
            "SELECT tick, attempt, reason FROM work WHERE due <= ? AND typeof(attempt) = 'integer' AND attempt >= ?",
            (self.steady(), self.attempts),
        ).fetchall()
        for tick, attempt, reason in rows:
            message = self.message(tick, self.writing)
            if message and not message.to.endswith(DEAD):
                self.bury(message, attempt, reason, batch)

    def withdraw(self, message: Message) -> None:
        """Make a message as expired as one can be. Its row stays, so that a retry of its send is not stored again."""
        if self.writing.execute("SELECT 1 FROM work WHERE tick = ?", (message.tick,)).fetchone():
            raise Refused(409, "it is too late to recall this message: a worker has it")
        gone = message._replace(expires=RECALLED)
        self.writing.execute(
            "UPDATE messages SET expires = ?, sum = ? WHERE tick = ?", (RECALLED, checksum(gone), gone.tick)
        )

    # In a turn

    def after(self, poll: Poll, upto: int) -> tuple[list[Message], int | None]:
        """What the poll wants above its cursor and up to `upto`, oldest first; and the tick it got to, if not the end.

        It stops at the poll's limit, at ANSWER_BYTES, and after looking at MAX_MESSAGES that were not wanted.
        """
        if poll.me is None:
            where = ["tick > ? AND tick <= ?"]
            values: list[str | int | None] = [poll.since, upto]
        else:
            where = ["mailbox = (SELECT id FROM mailboxes WHERE channel = ? AND name = ?) AND tick > ? AND tick <= ?"]
            where *= len(poll.names)
            values = [value for own in poll.names for value in (poll.channel, own, poll.since, upto)]
        # A union of ordered parts is merged as it is read: a reader far behind costs no more than what it takes.
        statement = " UNION ALL ".join(f"{SELECT} WHERE {part}" for part in where)
        rows = self.reading.execute(f"{statement} ORDER BY tick", values)
        found: list[Message] = []
        size = reached = 0
        with contextlib.closing(rows):
            for looked, row in enumerate(rows):
                if len(found) == poll.limit or size > ANSWER_BYTES or looked == MAX_MESSAGES:
                    return found, reached
                message = self.checked(row)
                reached = row[0]
                if message and poll.wants(message) and not self.is_expired(message):
                    found.append(message)
                    size += len(message.text)
        return found, None

    def removed(self, poll: Poll) -> dict[tuple[str, str], int]:
        """How far retention has come in each mailbox that the poll looks at."""
        where, values = "", list[Any]()
        if poll.me is not None:
            where = f"AND channel = ? AND name IN ({', '.join('?' * len(poll.names))})"
            values = [poll.channel, *poll.names]
        known = f"typeof(removed) = 'integer' AND removed > 0 {where}"
        rows = self.reading.execute(f"SELECT channel, name, removed FROM mailboxes WHERE {known}", values)
        return {(channel, own): tick for channel, own, tick in rows.fetchall()}

    def message(self, tick: int, database: sqlite3.Connection | None = None) -> Message | None:
        row = (database or self.reading).execute(f"{SELECT} WHERE tick = ?", (tick,)).fetchone()
        return self.checked(row) if row else None

    def replies(self, parent: int) -> list[Message]:
        """The answers to a message that are not expired or recalled, oldest first."""
        thread = self.thread(self.lineage(parent)[0])
        return [each for each in thread if each.answers == parent and not self.is_expired(each)]

    def thread(self, root: int) -> list[Message]:
        """A message and all that were sent in answer to it, or to those: at most MAX_MESSAGES, oldest first."""
        first = self.message(root)
        rows = self.reading.execute(
            f"{SELECT} WHERE thread = ? ORDER BY tick LIMIT {MAX_MESSAGES - 1}", (root,)
        ).fetchall()
        return [each for each in (first, *map(self.checked, rows)) if each]

    def job(self, tick: int) -> tuple[int, int | None, str | None, str] | None:
        """(attempt, due, lease, worker) of a message that was handed out."""
        row: tuple[int, int | None, str | None, str] | None = self.reading.execute(
            "SELECT attempt, due, lease, worker FROM work WHERE tick = ?", (tick,)
        ).fetchone()
        if row and not (isinstance(row[0], int) and is_name(row[3])):
            self.damaged(f"who has {tick:x}")
            return None
        return row

    def checked(self, row: Sequence[Any]) -> Message | None:
        """The message in a row, or None and a line on stderr if a bit of it has changed since it was written."""
        message = made(Message, row[:8])
        if checksum(message) == row[8] and message.text.startswith(f'"from": "{message.sender}"'):
            return message
        self.damaged(f"message {message.tick:x} to {message.to}")
        return None

    def is_expired(self, message: Message) -> bool:
        return message.expires is not None and message.expires <= self.clock()

    def oldest(self, channel: str, own: str, mark: int) -> int | None:
        """The oldest tick of a mailbox above a mark."""
        statement = f"SELECT min(tick) FROM messages WHERE mailbox = {MAILBOX} AND tick > ?"
        tick: int | None = self.reading.execute(statement, (channel, own, mark)).fetchone()[0]
        return tick

    def undone(self) -> list[tuple[str, str, int]]:
        """(channel, queue, jobs) of all that were handed out and are not done."""
        return self.reading.execute(
            "SELECT channel, name, count(*) FROM work JOIN mailboxes ON mailbox = id WHERE due IS NOT NULL "
            "GROUP BY mailbox"
        ).fetchall()

    def moved(self, message: Message, kind: int) -> tuple[str, int] | None:
        """Who moved a mark over this message, and when."""
        row: tuple[str, int] | None = self.reading.execute(
            f"SELECT reader, at FROM receipts WHERE mailbox = {MAILBOX} AND kind = ? AND tick >= ? "
            "ORDER BY tick LIMIT 1",
            (message.channel, message.to, kind, message.tick),
        ).fetchone()
        if row and not (is_name(row[0]) and isinstance(row[1], int)):
            self.damaged(f"who read {message.tick:x}")
            return None
        return row

    def count_up_to(self, channel: str, own: str, tick: int) -> int | None:
        """The number (n) of the last message of a mailbox up to `tick`; None if nothing is retained."""
        where = f"FROM messages WHERE mailbox = {MAILBOX} AND typeof(n) = 'integer' AND"  # not of a damaged message
        below = f"SELECT n {where} tick <= ? ORDER BY tick DESC LIMIT 1"
        above = f"SELECT n - 1 {where} tick > ? ORDER BY tick LIMIT 1"
        values = (channel, own, tick)
        row = self.reading.execute(below, values).fetchone() or self.reading.execute(above, values).fetchone()
        return int(row[0]) if row else None

    def count_between(self, channel: str, own: str, tick: int, last: int) -> tuple[int, int]:
        """How many messages of a mailbox lie above `tick` and up to `last`, and their bytes.

        Looks at no more than would fill it. What is on disk above `last` has not been announced yet.
        """
        where = f"WHERE mailbox = {MAILBOX} AND tick > ? AND tick <= ? LIMIT {MAILBOX_MESSAGES}"
        row = self.reading.execute(
            f"SELECT count(*), ifnull(sum(length(text)), 0) FROM (SELECT text FROM messages {where})",
            (channel, own, tick, last),
        ).fetchone()
        return int(row[0]), int(row[1])

    def lineage(self, tick: int) -> tuple[int, int]:
        """What began the chain of replies a message is in, and how deep in it that is; what is gone began a new one."""
        statement = "SELECT ifnull(thread, tick), depth FROM messages WHERE tick = ?"
        row = self.reading.execute(statement, (tick,)).fetchone()
        where = f"the place of {tick:x} in its thread"
        return (self.number(row[0], tick, where), self.number(row[1], 0, where)) if row else (tick, 0)

    def count_expired(self, channel: str, own: str, above: int) -> int:
        statement = f"SELECT count(*) FROM messages WHERE mailbox = {MAILBOX} AND expires <= ? AND tick > ?"
        count: int = self.reading.execute(statement, (channel, own, self.clock(), above)).fetchone()[0]
        return count

    def mailboxes(self) -> list[tuple[Any, ...]]:
        """A row for each: channel, name, own, read, fetched, seen, removed, n, newest, perishable."""
        newest = "(SELECT tick FROM messages WHERE mailbox = id ORDER BY tick DESC LIMIT 1)"
        rows = self.reading.execute(
            f"SELECT channel, name, own, read, fetched, seen, removed, ifnull({NEWEST_N}, 0), ifnull({newest}, 0), "
            "EXISTS(SELECT 1 FROM messages WHERE mailbox = id AND expires > 0) FROM mailboxes"
        ).fetchall()
        return [mailbox for mailbox in map(self.sound, rows) if mailbox]

    def sound(self, row: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """A mailbox with those of its marks that are still numbers; None if its name is none.

        Without a mark more is unread than is. Without the one of retention all that is not there counts as removed: a
        gap too many is better than one that nobody is told of.
        """
        channel, called, *marks = row
        if not is_name(channel) or not is_name(called):
            self.damaged(f"the mailbox {called!r} on {channel!r}")
            return None
        if all(mark is None or isinstance(mark, int) for mark in marks):
            return row
        self.damaged(f"how far the mailbox {called} was read")
        own, read, fetched, seen, removed = [mark if isinstance(mark, int) else None for mark in marks[:5]]
        if removed is None:
            removed = (self.oldest(channel, called, 0) or self.last + 1) - 1
        return (channel, called, own or 0, read, fetched or read or 0, seen or 0, removed, *marks[5:])


def locked(path: str) -> IO[bytes]:
    """A file that holds PATH.lock until it is closed or this process ends. A reader with sqlite3 needs no lock."""
    try:
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = open(f"{path}.lock", "ab")  # noqa: SIM115  (held for as long as the database)
        give_to_folder(lock.fileno(), path)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InUse(f"the database {path} is in use by another bus_server") from None
    except OSError as error:
        raise Unusable(f"cannot use the database {path}: {error.strerror}") from None
    return lock


def give_to_folder(file: int | str, path: str) -> None:
    """What root makes beside a database is for the user whose folder that is: the server must be able to use it."""
    if os.geteuid() == 0:
        folder = os.stat(pathlib.Path(path).parent)
        os.chown(file, folder.st_uid, folder.st_gid)


def prepare(database: sqlite3.Connection, path: str, journal: str) -> None:
    """Open for durable writing, check that this was granted, and bring the schema up to date."""

    def ask(statement: str) -> Any:
        return database.execute(statement).fetchone()[0]

    version = ask("PRAGMA user_version")
    if version > len(MIGRATIONS):
        raise Unusable(f"the database {path} was made by a newer bus_server (schema {version}): use that one")
    if not version and ask("SELECT count(*) FROM sqlite_master"):
        raise Unusable(f"{path} is not a database of agent-bus: choose another --db")
    database.execute("PRAGMA fullfsync=ON")  # macOS: fsync alone leaves the data in the disk's own memory
    database.execute("PRAGMA synchronous=FULL")
    database.execute("PRAGMA secure_delete=FAST")  # Debian's SQLite would write zeros over all that is removed
    if ask(f"PRAGMA journal_mode={journal}") != journal or ask("PRAGMA synchronous") != 2:
        raise Unusable(f"the database {path} cannot be written durably here: is this a network file system?")
    if version and journal == "wal" and os.path.getsize(path) <= CHECKED_BYTES:
        report = ask("PRAGMA integrity_check(1)")
        if report != "ok":
            print(f"bus_server: the database {path} is damaged ({report}); making its indexes anew", file=sys.stderr)
            database.execute("REINDEX")
            report = ask("PRAGMA integrity_check(1)")
        if report != "ok":
            raise Unusable(f"the database {path} is damaged ({report}): restore a backup, or move it away")
    database.execute("BEGIN IMMEDIATE")
    for step in MIGRATIONS[version:]:
        for statement in re.split(r";(?: *--.*)?\n", step):
            database.execute(statement)
    if not version:
        database.execute("INSERT INTO bus VALUES (?, 0)", (secrets.token_hex(8),))
    database.execute(f"PRAGMA user_version={len(MIGRATIONS)}")
    database.execute("COMMIT")
    # A WAL that is found here may have a part that could not be flushed: it is in the system's memory, but marked as
    # written, and would be missing after a power cut, with all behind it. Folded in, it is written anew.
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


# ── Mailboxes ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Mailbox:
    """One name on one channel: what it holds, and how far it was read. Ticks, except where it says otherwise."""

    __slots__ = ("address", "base", "fetched", "listening", "n", "newest", "own", "pending", "perishable", "read",
                 "removed", "seen", "until")
    own: bool
    read: int | None
    fetched: int
    seen: int  # wall clock, us
    removed: int
    n: int  # of the newest message
    newest: int
    perishable: bool  # a message in it has or had a ttl

    def __init__(self, *stored: Any) -> None:
        (self.own, self.read, self.fetched, self.seen, self.removed, self.n, self.newest,
         self.perishable) = stored or (False, None, 0, 0, 0, 0, 0, False)
        self.base: int | None = None  # how many messages lie up to the mark; None: to be counted
        self.pending: tuple[int, int] | None = None  # how many, and bytes, lie above `fetched`; None: to be counted
        self.address = ""  # of who polled last
        self.listening = 0  # wall clock, us: since when without a break
        self.until = 0.0  # monotonic clock, s: when it stops to count as listening

    def mark(self) -> int:
        """Unread is what lies above: its owner's cursor or, in a mailbox that only groups read, what nobody fetched."""
        return (self.read or 0) if self.own else self.fetched


class Mailboxes:
    """Who reads, how far, and who is parked. Used by the loop only; the clock is passed in.

    A parked reader is a connection and its Poll, found under each (channel, name) it listens to: no thread, no task.
    Others that wait are such a record too (Parked).
    """

    def __init__(
        self, clock: Callable[[], float], stored: Iterable[Sequence[Any]] = (), wall: Callable[[], int] = wall_clock
    ) -> None:
        self.clock, self.wall = clock, wall
        self.boxes = {(row[0], row[1]): Mailbox(*row[2:]) for row in stored}
        self.highest = max((box.newest for box in self.boxes.values()), default=0)
        self.changed: set[tuple[str, str]] = set()  # mailboxes whose marks are newer than on disk
        self.moves: dict[tuple[str, str, int], Move] = {}  # what moved them
        self.parked: dict[Connection, Parked] = {}
        self.waiting: dict[Key, dict[Connection, None]] = {}

    def box(self, channel: str, own: str) -> Mailbox:
        box = self.boxes.get((channel, own))
        if box is None:
            box = self.boxes[channel, own] = Mailbox()
        return box

    def of(self, reader: Poll | Worker | Question) -> Iterator[Mailbox]:
        """The mailboxes a reader listens to, its own first; about to be changed."""
        for own in reader.present():
            key = (str(reader.channel), own)
            self.changed.add(key)
            yield self.box(*key)

    # Presence and marks

    def polled(self, reader: Poll | Worker | Question, address: str, wall: int) -> None:
        now = self.clock()
        for box in self.of(reader):
            if box.until < now:
                box.listening = wall
            box.until = max(box.until, now + (reader.hold or HOLD) + GRACE)
            box.seen, box.address = wall, address
        if isinstance(reader, Poll):
            own = self.box(str(reader.channel), reader.names[0])
            if not own.own:  # until now a group's: its mark is another one
                own.own, own.base = True, None

    def left(self, parked: Parked) -> None:
        """A parked reader hung up. Unless another one waits there, it counts as listening for GRACE only."""
        for own in parked.present():
            if (str(parked.channel), own) not in self.waiting:
                box = self.box(str(parked.channel), own)
                box.until = min(box.until, self.clock() + GRACE)

    def online(self, box: Mailbox) -> bool:
        """Derived, never declared: it has a poll in hand, or had one within its hold and GRACE."""
        return self.clock() < box.until

    def presented(self, poll: Poll) -> None:
        """A reader that presents a cursor has everything up to it."""
        if poll.me is not None:
            own = self.box(str(poll.channel), poll.me)
            if own.read is None or own.read < poll.since:
                own.read = poll.since
                self.move(poll, poll.me, ACKNOWLEDGED, poll.since)
            self.fetched(poll, poll.since)

    def fetched(self, reader: Poll | Worker | Question, tick: int) -> None:
        """An answer with messages up to `tick` was written out whole, or they were handed to a worker."""
        for own, box in zip(reader.present(), self.of(reader)):
            if tick > box.fetched:
                box.fetched = tick
                self.move(reader, own, FETCHED, tick)
            box.base = box.pending = None

    def move(self, reader: Poll | Worker | Question, own: str, kind: int, tick: int) -> None:
        who = reader.called if isinstance(reader, Worker) else reader.present()[0]
        move = Move(str(reader.channel), own, kind, tick, who, self.wall())
        self.moves[move[:3]] = move

    def watching(self, reader: Poll | Worker | Question, tick: int) -> list[Connection]:
        """Who waits until a message of these mailboxes is fetched, and now it is."""
        keys = [(f"{FETCHES} {reader.channel}", own) for own in reader.present()]
        watchers = [(each, self.parked[each]) for key in keys for each in self.waiting.get(key, ())]
        return [each for each, watch in watchers if isinstance(watch, Watch) and watch.message.tick <= tick]



    def resume(self, poll: Poll, first: int | None, last: int) -> Poll:
        """`since=last`: where this name last was; before it ever was, just before what is `first` in its mailbox."""
        box = self.box(str(poll.channel), str(poll.me))
        if box.read is not None:
            return poll._replace(since=box.read)
        if box.removed:
            return poll._replace(since=box.removed - 1)  # one below, so that the gap is told
        return poll._replace(since=last if first is None else first - 1)

    def gap(self, poll: Poll) -> tuple[int, int] | None:
        """From the cursor to the last message that retention removed, if that is ahead of the cursor."""
        if poll.me is None:
            boxes = [box for (channel, own), box in self.boxes.items()
                     if poll.channel in (None, channel) and (not poll.names or own in poll.names)]
        else:
            boxes = [self.box(str(poll.channel), own) for own in poll.names]
        removed = max((box.removed for box in boxes), default=0)
        return (poll.since, removed) if removed > poll.since else None

    def removed(self, removed: dict[tuple[str, str], int]) -> None:
        for key, tick in removed.items():
            if key in self.boxes:  # else its name on the disk is damaged
                self.boxes[key].removed = tick
                self.boxes[key].base = self.boxes[key].pending = None

    def take_marks(self) -> list[Mark]:
        """The marks that changed since the last call."""
        changed, self.changed = self.changed, set()
        boxes = [(key, self.boxes[key]) for key in changed]
        return [Mark(*key, box.own, box.read, box.fetched, box.seen) for key, box in boxes]

    def take_moves(self) -> list[Move]:
        moves, self.moves = self.moves, {}
        return list(moves.values())

    # Messages and parked readers

    def add(self, visible: list[Message]) -> None:
        for tick, channel, to, _, text, n, expires, _ in visible:
            box = self.box(channel, to)
            box.newest, box.n = tick, n
            if expires is not None:
                box.perishable = True
            if box.pending is not None:
                box.pending = box.pending[0] + 1, box.pending[1] + len(text)
        if visible:
            self.highest = visible[-1].tick

    def newest(self, poll: Poll) -> int:
        """The newest tick there could be for this poll, without asking the disk."""
        if poll.me is None:
            return self.highest
        return max(self.box(str(poll.channel), own).newest for own in poll.names)

    def park(self, connection: Connection, parked: Parked) -> None:
        self.parked[connection] = parked
        for key in parked.places():
            self.waiting.setdefault(key, {})[connection] = None

    def crowd(self, poll: Poll) -> list[Connection]:
        """The parked readers that have the same name as their own, oldest first."""
        parked = self.waiting.get((str(poll.channel), str(poll.me)), {})
        if len(parked) <= PARKED_PER_NAME:
            return []
        polls = [(connection, self.parked[connection]) for connection in parked]
        return [connection for connection, other in polls if isinstance(other, Poll) and other.me == poll.me]

    def unpark(self, connection: Connection) -> Parked:
        parked = self.parked.pop(connection)
        for key in parked.places():
            del self.waiting[key][connection]
            if not self.waiting[key]:
                del self.waiting[key]
        return parked

    def wake(self, visible: list[Message]) -> Iterator[tuple[Connection, Parked, list[Message]]]:
        """Every parked connection that one of these messages is for, unparked, with all that are for it, in order."""
        woken: dict[Connection, list[Message]] = {}
        for message in visible if self.waiting else ():
            for key in ((message.channel, message.to), EVERYTHING, (REPLIES, message.answers or 0)):
                taken = False
                for connection in self.waiting.get(key, ()):
                    parked = self.parked[connection]
                    works = isinstance(parked, Worker)  # a message is for one of them
                    if parked.wants(message) and not (works and (taken or connection in woken)):
                        woken.setdefault(connection, []).append(message)
                        taken = taken or works
        for connection, messages in woken.items():
            yield connection, self.unpark(connection), messages


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Blobs:
    """Files by the sha256 of what is in them, in DATABASE.blobs: they pass in pieces and never through a message.

    A part that has not arrived whole is HASH.part; the next upload may go on where it ends. Owned by the loop; only
    `Upload.finish`, which reads a whole file, runs in a thread of its own.
    """

    PIECE = 65536  # bytes read or written in one turn of the loop
    PART_SECONDS = 7 * 86400.0  # a part waits for the rest: a sender that was cut off before a weekend is back by then

    def __init__(self, database: str, quota: int) -> None:
        self.folder = pathlib.Path(f"{database}.blobs")
        self.quota = 0 if database == ":memory:" else quota
        self.arriving: set[str] = set()
        self.checking = ThreadPoolExecutor(4)  # a thread each while there are files to check
        self.used = sum(file.stat().st_size for file in self.folder.glob("*") if file.is_file())

    def place(self, request: Request) -> pathlib.Path:
        """The file that a request is about, whether it is there or not."""
        if not self.quota:
            raise Refused(501, "this bus keeps no files")
        if not re.fullmatch("[0-9a-f]{64}", request.parsed.rest):
            raise Refused(400, "a file is called by its sha256: /blob/ and 64 hex digits")
        return self.folder / request.parsed.rest

    def upload(self, request: Request) -> Upload:
        file, length = self.place(request), request.parsed.length
        part = file.with_suffix(".part")
        there = part.stat().st_size if part.exists() else 0
        start, total = content_range(request.fields.get("content-range"), length)
        if file.name in self.arriving or start not in (0, there):
            raise Refused(409, "go on where the file ends, one upload at a time", ("Upload-Offset", str(there)))
        if total > self.quota:
            raise Refused(413, f"the file has {total} bytes and the bus keeps {self.quota} in all; nothing was stored")
        if self.used + total - there > self.quota:
            raise Refused(507, "the bus has no room for this file: those nobody asks for go after --keep")
        return Upload(self, file, start, length, total)

    def get(self, request: Request) -> Answer:
        file = self.place(request)
        try:
            stream = file.open("rb")
        except FileNotFoundError:
            part = file.with_suffix(".part")
            offset = ("Upload-Offset", str(part.stat().st_size if part.exists() else 0))
            raise Refused(404, "the bus does not have this file, or not all of it", offset) from None
        with contextlib.suppress(OSError):  # it was removed just now, or belongs to another user
            os.utime(file)
        size = os.fstat(stream.fileno()).st_size
        wanted = re.fullmatch("bytes=([0-9]{1,15})-", request.fields.get("range", ""))
        start = int(wanted[1]) if wanted else 0
        if wanted and start >= size:
            stream.close()
            raise Refused(416, f"the file has {size} bytes", ("Content-Range", f"bytes */{size}"))
        stream.seek(start)
        span = (("Content-Range", f"bytes {start}-{size - 1}/{size}"),) if wanted else ()
        status, rest = (206 if wanted else 200), Download(stream, size - start)
        return Answer(status, b"", "application/octet-stream", span, file=rest)

    def forget(self, now: float, keep: float) -> None:
        """Remove what nobody sent or asked for during `keep` s (0: for ever), and parts that nobody went on with.

        `now` is in s since 1970. A part takes room, and nobody can have it: it goes also where all else stays.
        """
        for file in self.folder.glob("*"):
            with contextlib.suppress(OSError):  # a folder, a link to nothing: somebody else's, and no reason to end
                status = file.stat()
                patience = min(keep or math.inf, self.PART_SECONDS if file.suffix == ".part" else math.inf)
                if status.st_mtime < now - patience and file.stem not in self.arriving:
                    file.unlink()
                    self.used -= status.st_size


def content_range(field: str | None, length: int) -> tuple[int, int]:
    """(start, total) of `Content-Range: bytes START-END/TOTAL`; without one, the body is the whole file."""
    if field is None:
        return 0, length
    match = re.fullmatch("bytes ([0-9]{1,15})-([0-9]{1,15})/([0-9]{1,15})", field)
    if not match or int(match[2]) - int(match[1]) + 1 != length or int(match[2]) >= int(match[3]):
        raise Refused(400, "Content-Range must be: bytes START-END/TOTAL, and the body as long as that")
    return int(match[1]), int(match[3])


class Upload:
    """A file that is arriving. What came before a broken connection stays."""

    def __init__(self, blobs: Blobs, file: pathlib.Path, start: int, length: int, total: int) -> None:
        self.blobs, self.file, self.part = blobs, file, file.with_suffix(".part")
        self.at = self.marked = start
        self.missing, self.total = length, total
        self.finishing = False
        try:
            blobs.folder.mkdir(mode=0o700, exist_ok=True)
            there = self.part.stat().st_size if self.part.exists() else 0
            self.stream = self.part.open("ab" if start else "wb", buffering=0)  # what was written is on the disk
        except OSError as error:
            raise Refused(507, f"the bus cannot store the file: {error.strerror}") from None
        blobs.arriving.add(file.name)
        blobs.used -= there - start

    def write(self, data: bytes | bytearray) -> None:
        if self.blobs.used + len(data) > self.blobs.quota:  # others arrived meanwhile
            raise Refused(507, "the bus has no room for the rest of this file", *self.offset())
        try:
            while data:
                written = self.stream.write(data)
                data = data[written:]
                self.at += written
                self.missing -= written
                self.blobs.used += written
        except OSError as error:
            raise Refused(507, f"the bus cannot store the file: {error.strerror}", *self.offset()) from None

    def far_enough(self) -> bool:
        """Has it moved by as much as it must in BODY_SECONDS?"""
        moved = self.at - self.marked >= BODY_SECONDS * BODY_RATE
        self.marked = self.at if moved else self.marked
        return moved

    def offset(self) -> tuple[tuple[str, str]]:
        return (("Upload-Offset", str(self.at)),)

    def finish(self) -> int:
        """In a thread: is it what it is called? Then it is made durable and gets its name. Returns the status."""
        digest = hashlib.sha256()
        with self.part.open("rb") as whole:
            for piece in iter(lambda: whole.read(1 << 20), b""):
                digest.update(piece)
            os.fsync(whole.fileno())
        if digest.hexdigest() != self.file.name:
            self.part.unlink()
            return 422
        known = self.file.exists()
        self.part.replace(self.file)
        folder = os.open(self.blobs.folder, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        return 200 if known else 201

    def close(self) -> None:
        if not self.finishing:
            self.stream.close()
            self.blobs.arriving.discard(self.file.name)


class Download:
    """What is left to send of a file."""

    def __init__(self, stream: IO[bytes], length: int) -> None:
        self.stream, self.length = stream, length

    def read(self) -> bytes:
        piece = self.stream.read(min(Blobs.PIECE, self.length))
        self.length = self.length - len(piece) if piece else 0
        return piece

    def close(self) -> None:
        self.stream.close()


# ── Answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def boolean(value: bool) -> str:
    return "true" if value else "false"


def ok(bus: Bus, members: str) -> Answer:
    return Answer(200, f"{{{members}{ending(bus.last, bus.store.bus)}".encode())


@lru_cache(1)  # all who are answered at one moment have the same: 0.1 us, not 0.7
def ending(now: int, bus: str) -> str:
    return f', "now": {seconds(now)}, "bus": "{bus}"}}\n'


def delivery(
    bus: Bus, poll: Poll, found: list[Message], reached: int | None = None, gap: tuple[int, int] | None = None
) -> Answer:
    """The answer to a poll. `reached`: the last tick that was looked at, if it is not the end."""
    now = reached or max(poll.since, bus.last)
    bus.figures.delivered += len(found)
    headers: tuple[tuple[str, str], ...] = ()
    if poll.plain:
        body = "".join(block(json.loads(message.render()), poll.me, bus.store.clock()) for message in found)
        if gap:
            body = f"-- messages from {iso(gap[0])} to {iso(gap[1])} are gone: retention removed them\n{body}"
        headers = (("Bus-Now", seconds(now)), ("Bus-More", boolean(bool(reached))), ("Bus-Id", bus.store.bus))
    else:
        lost = f', "gap": {{"from": {seconds(gap[0])}, "to": {seconds(gap[1])}}}' if gap else ""
        body = (
            f'{{"messages": [{", ".join(message.render() for message in found)}], "now": {seconds(now)}, '
            f'"more": {boolean(bool(reached))}{lost}, "bus": "{bus.store.bus}"}}\n'
        )
    kind = "text/plain; charset=utf-8" if poll.plain else "application/json"
    fetched = (poll, found[-1].tick) if found and poll.me else None
    return Answer(200, body.encode(), kind, headers, fetched)


def acknowledged(bus: Bus, send: Send, truths: dict[Any, str]) -> Answer | None:
    """The answer to a send. `truths` has what was already said of receivers."""
    texts = []
    for one, receipt in zip(send.drafts, send.receipts):
        which = one.channel, one.to, one.sender
        receiver = truths.get(which)
        if receiver is None:
            receiver = truths[which] = truth(bus, one)
        texts.append(entry(one, receipt, receiver))
    if send.asked:
        return asked(bus, send, texts[0])
    results = "}, {".join(texts)
    return ok(bus, f'"ok": true, "results": [{{{results}}}]' if send.several else results)


def asked(bus: Bus, send: Send, text: str) -> Answer | None:
    """The answer to a question, if it is there already; else the one who asked is parked."""
    assert send.asked
    grant, hold = send.asked
    tick, duplicate = send.receipts[0].ticks[0], send.receipts[0].duplicate
    question = Question(tick, send.drafts[0].sender, text, grant, hold, send.drafts[0].channel)
    there = bus.store.replies(tick) if duplicate else []
    recalled = [each.message.tick for each in bus.recalls]
    replies = [each for each in there if question.wants(each) and each.tick not in recalled]
    if replies:
        return question.found(bus, send.connection, replies)
    if not hold or bus.draining or send.connection.ended or send.connection.state is not BUSY:
        return question.nothing(bus, send.connection)
    bus.mailboxes.polled(question, send.connection.address, bus.store.clock())
    bus.park(send.connection, question)
    return None


def handed(bus: Bus, jobs: list[Job]) -> Answer:
    """The answer to a claim."""
    messages = ", ".join(
        f'{job.message.render()[:-1]}, "attempt": {job.attempt}, "lease": "{job.lease}", '
        f'"lease_until": {seconds(job.until)}}}' for job in jobs
    )
    bus.figures.delivered += len(jobs)
    return ok(bus, f'"messages": [{messages}]')


def entry(one: Draft, receipt: Receipt, receiver: str) -> str:
    ticks, duplicate = receipt
    ids = "" if len(ticks) == 1 else f', "ids": {encode({each: f"{tick:x}" for each, tick in zip(one.to, ticks)})}'
    return (
        f'"ok": true, "ts": {seconds(ticks[-1])}, "channel": "{one.channel}", "id": "{ticks[-1]:x}"{ids}, '
        f'"duplicate": {"true" if duplicate else "false"}, "receiver": {receiver}'
    )


def truth(bus: Bus, one: Draft) -> str:
    """What is known of who will read it."""
    to = one.to[0]
    if len(one.to) > 1 or to == EVERYONE:
        return encode(receivers(bus, one))
    box = bus.mailboxes.box(one.channel, to)
    seen = seconds(box.seen) if box.seen else "null"
    count = unread(bus, one.channel, to, box)
    return f'{{"online": {boolean(bus.mailboxes.online(box))}, "last_seen": {seen}, "unread": {count}}}'


def receivers(bus: Bus, one: Draft) -> dict[str, int]:
    """The truth about several receivers: how many listen. `all` is everyone who ever did, but the sender."""
    if EVERYONE in one.to:
        boxes = [box for (channel, own), box in bus.mailboxes.boxes.items()
                 if channel == one.channel and box.own and own != one.sender]
        online = sum(map(bus.mailboxes.online, boxes))
        return {"online": online, "offline": len(boxes) - online}
    named = [(to, bus.mailboxes.box(one.channel, to)) for to in one.to]
    online = sum(bus.mailboxes.online(box) for _, box in named)
    waiting = sum(unread(bus, one.channel, to, box) for to, box in named)
    return {"online": online, "offline": len(named) - online, "unread": waiting}


def unread(bus: Bus, channel: str, own: str, box: Mailbox) -> int:
    """Messages addressed to the name above its mark, less the expired. Broadcasts are not counted."""
    mark = box.mark()
    if mark >= box.newest:
        return 0
    if box.base is None:
        counted = bus.store.count_up_to(channel, own, mark)
        box.base = box.n if counted is None else counted
    return box.n - box.base - (bus.store.count_expired(channel, own, mark) if box.perishable else 0)


def get_inbox(bus: Bus, request: Request) -> Answer:
    recipients: dict[str, dict[str, int]] = {}
    for (channel, own), box in bus.mailboxes.boxes.items():
        if own != EVERYONE and request.grant.reads(own):
            recipients.setdefault(channel, {})[own] = unread(bus, channel, own, box)
    return ok(bus, f'"recipients": {encode(recipients)}')


def get_agents(bus: Bus, request: Request) -> Answer:
    found = []
    for (channel, own), box in bus.mailboxes.boxes.items():
        if box.seen and own != EVERYONE:
            text = (
                f'"name": "{own}", "channel": "{channel}", "online": {boolean(bus.mailboxes.online(box))}, '
                f'"since": {seconds(box.listening)}, "last_seen": {seconds(box.seen)}'
            )
            if request.grant.reads(own):
                text += (
                    f', "address": {encode(box.address)}, "unread": {unread(bus, channel, own, box)}, '
                    f'"cursor": {seconds(box.mark())}'
                )
            found.append(f"{{{text}}}")
    return ok(bus, f'"agents": [{", ".join(found)}]')


def one_of(bus: Bus, grant: Grant, tick: int | None) -> Message:
    """The message, if this grant lets its holder see it; 404 otherwise."""
    found = None if tick is None or tick > bus.last else bus.store.message(tick)  # above it, it is not announced yet
    if not found or not may_see(grant, found):
        raise Refused(404, "there is no message with this id: it never was, or retention removed it")
    return found


def may_see(grant: Grant, message: Message) -> bool:
    return grant.reads(message.to) or message.sender == grant.name


def get_message(bus: Bus, request: Request) -> Answer | None:
    """One message and how far it came; asking moves nothing. With `wait_fetched` the answer waits until it came."""
    found = one_of(bus, request.grant, tick_of(request.parsed.rest))
    hold = request.query().number("wait_fetched", 0, 0, HOLD_MAX)
    if not hold or bus.draining or state_of(bus, found)[0] != "queued":
        return told(bus, found)
    bus.park(request.peer, Watch(found, request.grant.token, hold))
    return None


def told(bus: Bus, message: Message) -> Answer:
    """What a sender can know of its message."""
    state, details = state_of(bus, message)
    return ok(bus, f'"message": {message.render()}, "state": "{state}"{details}')


def state_of(bus: Bus, message: Message) -> tuple[str, str]:
    """How far a message came, and further members that say more."""
    box = bus.mailboxes.boxes[message.channel, message.to]
    if message.expires == RECALLED:
        return "recalled", ""
    job = bus.store.job(message.tick)
    if job:
        attempt, due, lease, worker = job
        state = "fetched" if due else "acknowledged" if lease else "dead"
        return state, f', "attempt": {attempt}, "by": "{worker}"'
    if message.tick > max(box.fetched, box.read or 0):
        return "expired" if bus.store.is_expired(message) else "queued", ""
    kind = ACKNOWLEDGED if box.own and message.tick <= box.mark() else FETCHED
    last = bus.mailboxes.moves.get((message.channel, message.to, kind))  # not yet on disk
    moved = bus.store.moved(message, kind) or (last and last[4:])
    details = f', "by": "{moved[0]}", "at": {seconds(moved[1])}' if moved else ""
    return ("fetched", "acknowledged")[kind], details


def put_blob(bus: Bus, request: Request) -> Answer | None:
    """The body of a PUT has arrived; if that was the end of the file, it is checked."""
    upload = request.upload
    assert upload
    if upload.at < upload.total:
        return Answer(202, b'{"ok": true}\n', headers=upload.offset())
    upload.finishing = True
    work = bus.blobs.checking.submit(upload.finish)
    work.add_done_callback(lambda done: bus.loop.tell(lambda: bus.stored(request.peer, upload, done)))
    return None


def get_blob(bus: Bus, request: Request) -> Answer:
    if request.grant.send_only:
        raise Refused(403, "this token may send, and read nothing")
    return bus.blobs.get(request)


def get_thread(bus: Bus, request: Request) -> Answer:
    """A conversation: what began it, and the answers, and the answers to them."""
    wanted = tick_of(request.parsed.rest)
    thread = bus.store.thread(bus.store.lineage(wanted)[0]) if wanted is not None else []
    seen = [each.render() for each in thread if may_see(request.grant, each)]
    if not seen:
        raise Refused(404, "there is no message with this id: it never was, or retention removed it")
    return ok(bus, f'"messages": [{", ".join(seen)}]')


def get_metrics(bus: Bus, request: Request) -> Answer:
    """In the text format of Prometheus."""
    request.grant.check_operator()
    text = "".join(
        f"# HELP agent_bus_{metric} {says}\n# TYPE agent_bus_{metric} {kind}\n"
        + "".join(f"agent_bus_{metric}{labels} {value:.16g}\n" for labels, value in values)
        for metric, kind, says, values in [*totals(bus), *by_name(bus)]
    )
    return Answer(200, text.encode(), "text/plain; version=0.0.4; charset=utf-8")


Metric = tuple[str, str, str, Iterable[tuple[str, float]]]  # its name, kind and help; labels and values


def totals(bus: Bus) -> list[Metric]:
    figures = bus.figures
    return [
        ("sends_total", "counter", "sends that were committed, repeated ones too", [("", figures.sends)]),
        ("messages_total", "counter", "messages stored, one for each receiver", [("", figures.messages)]),
        ("delivered_total", "counter", "messages put into answers", [("", figures.delivered)]),
        ("refused_total", "counter", "answers of 400 and above, by status",
         [(f'{{status="{status}"}}', count) for status, count in sorted(figures.refused.items())]),
        ("commits_total", "counter", "transactions", [("", figures.commits)]),
        ("commit_seconds_total", "counter", "time they took", [("", figures.commit_seconds)]),
        ("commit_seconds_max", "gauge", "the slowest", [("", figures.slowest_commit)]),
        ("connections", "gauge", "open", [("", len(bus.connections))]),
        ("parked", "gauge", "connections that wait for a message", [("", len(bus.mailboxes.parked))]),
        ("files_bytes", "gauge", "kept by hash", [("", bus.blobs.used)]),
    ]


def by_name(bus: Bus) -> list[Metric]:
    def labels(channel: str, own: str) -> str:
        return f'{{channel="{channel}",name="{own}"}}'

    now, waiting, ages = bus.store.clock(), [], []
    for (channel, own), box in bus.mailboxes.boxes.items():
        count = 0 if own == EVERYONE else unread(bus, channel, own, box)
        oldest = bus.store.oldest(channel, own, box.mark()) if count else None
        waiting.append((labels(channel, own), count))
        ages.append((labels(channel, own), max(now - oldest, 0) / 1000000 if oldest else 0))
    jobs = [(labels(channel, own), count) for channel, own, count in bus.store.undone()]
    return [
        ("unread", "gauge", "messages for a name above its cursor", waiting),
        ("oldest_unread_seconds", "gauge", "the age of the oldest of them", ages),
        ("undone_jobs", "gauge", "handed out at least once and not done", jobs),
    ]


def get_health(bus: Bus, request: Request) -> Answer:
    return ok(bus, '"ok": true')


def get_help(bus: Bus, request: Request) -> Answer:
    scheme = "https" if request.fields.get("x-forwarded-proto") == "https" else "http"
    host = request.fields.get("host", "")
    if not re.fullmatch(r"[A-Za-z0-9.:\[\]_-]{1,255}", host):
        host = "HOST:PORT"
    return Answer(200, HELP.format(version=VERSION, url=f"{scheme}://{host}").encode(), "text/plain; charset=utf-8")


def get_client(bus: Bus, request: Request) -> Answer:
    """A client file from beside this one, so that a new host needs only the URL. The routes name all there are."""
    try:
        text = (pathlib.Path(__file__).parent / request.route[1:]).read_bytes()
    except OSError:
        raise Refused(404, f"{request.route[1:]} is not beside bus_server.py on this host") from None
    return Answer(200, text, "text/plain; charset=utf-8")


HEADLINE = ("from", "id", "to", "channel", "reply_to", "age", "priority", "type", "subject")
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff"
    "\ud800-\udfff\U000e0000-\U000e007f\U000e0100-\U000e01ef]"
)


def iso(tick: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(tick // 1000000))


def shown(text: str) -> str:
    """Text without what a terminal or an eye obeys and does not see; CRLF and CR are newlines."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return HIDDEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def label(value: Any) -> str:
    text = value if isinstance(value, str) else encode(value)
    if re.fullmatch(r"[A-Za-z0-9._:@/-]{1,64}", text):
        return text
    return shown(json.dumps(text, ensure_ascii=False))


def block(message: dict[str, Any], me: str | None, now: int) -> str:
    """A message as bus_recv.py prints it. No line of a body can be taken for a head, or for the end of a block."""
    tick = int(message["id"], 16)
    says = {**message, "age": span((now - tick) // 1000000)}
    goes_without_saying = {"to": me, "channel": "default", "age": "", "priority": "normal"}
    head = [f"{member}={label(says[member])}" for member in HEADLINE
            if says.get(member) not in (None, goes_without_saying.get(member))]
    text = shown(message["msg"])
    lines = (text[:-1] if text.endswith("\n") else text).split("\n")
    return "\n".join([f"{iso(tick)} {' '.join(head)}", *(f"| {line}" for line in lines), "---\n"])


def span(age: int) -> str:
    """Seconds as 90m, 6h or 2d; nothing under a minute."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if age >= size:
            return f"{age // size}{unit}"
    return ""


HELP = """\
agent-bus {version}: messages between coding agents. A 200 to /send means: on disk.

send     curl --data-binary 'tests are green' '{url}/send?from=alice&to=bob'
receive  curl -H 'Accept: text/plain' '{url}/recv?to=bob&since=last&wait=25'
         (the next since is in the header Bus-Now; without Accept it is JSON, and `now` in it)

The clients need Python 3.9 and nothing else:
         curl -fO {url}/bus_send.py; curl -fO {url}/bus_recv.py
         export AGENT_BUS_URL={url} AGENT_NAME=bob
         python3 bus_recv.py bob
         echo 'tests are green' | python3 bus_send.py alice
Bash, curl and jq: curl -fO {url}/bus_listener.sh; AGENT_NAME=bob bash bus_listener.sh

ask      curl --data-binary 'is it green?' '{url}/ask?from=alice&to=bob&wait=50'      (answered with bob's answer)
work     curl -d '{{"to": "builds"}}' {url}/claim
         curl -d '{{"id": "ID", "lease": "LEASE"}}' {url}/ack      (it is done; /nack: another may try)

Also     /agents  /inbox  /message/<id>  /thread/<id>  /log  /healthz; /nack, /extend, /recall
"""

ROUTES: dict[tuple[str, str], Callable[[Bus, Request], Answer | None]] = {
    ("POST", "/send"): Bus.send,
    ("POST", "/ask"): Bus.ask,
    ("GET", "/recv"): Bus.recv,
    ("POST", "/claim"): Bus.claim,
    ("POST", "/ack"): Bus.settle,
    ("POST", "/nack"): Bus.settle,
    ("POST", "/extend"): Bus.settle,
    ("POST", "/recall"): Bus.recall,
    ("GET", "/inbox"): get_inbox,
    ("GET", "/agents"): get_agents,
    ("PUT", "/blob/"): put_blob,
    ("GET", "/blob/"): get_blob,
    ("GET", "/message/"): get_message,
    ("GET", "/thread/"): get_thread,
    ("GET", "/log"): Bus.log,
    ("GET", "/healthz"): get_health,
    ("GET", "/metrics"): get_metrics,
    ("GET", "/"): get_help,
    ("GET", "/bus_recv.py"): get_client,
    ("GET", "/bus_send.py"): get_client,
    ("GET", "/bus_listener.sh"): get_client,
}


# ── main ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def duration(text: str) -> float:
    """'30d', '12h', '90m', '45s' in seconds; '0' is for ever."""
    match = re.fullmatch(r"([0-9]{1,9})([smhd]?)", text)
    if not match or not (match[2] or match[1] == "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time like 30d, 12h, 90m, 45s, or 0 for ever")
    return int(match[1]) * {"": 0, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def size(text: str) -> int:
    """'10g', '500m' in bytes; '0' is none."""
    match = re.fullmatch(r"([0-9]{1,9})([kmgt]?)", text.lower())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 500m, 10g, or 0")
    return int(match[1]) << {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}[match[2]]


def default_path() -> str:
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.join(state, "agent-bus", "bus.db")


def command_line(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bus_server.py", description="A message bus for coding agents over HTTP.",
        epilog="Beside a running bus: bus_server.py invite NAME, revoke NAME, tokens, prune, backup COPY; "
        "in place of a stopped one: restore COPY (each with --help).")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8080, help="port, 0 for a free one (%(default)s)")
    parser.add_argument("--db", default=default_path(), metavar="PATH", help="database, or :memory: (%(default)s)")
    parser.add_argument("--keep", type=duration, default="30d", help="how long messages stay: 12h; 0: for ever (30d)")
    parser.add_argument("--max-body", type=int, default=262144, metavar="BYTES", help="of one request (%(default)s)")
    parser.add_argument("--rate", type=float, default=50, metavar="N", help="messages per second from one sender, "
                        "sustained; 0 for no limit (%(default)s)")
    parser.add_argument("--files", type=size, default="10g", metavar="SIZE", help="room for files, all together; "
                        "0: keep none (%(default)s)")
    parser.add_argument("--max-attempts", type=int, default=5, metavar="N", help="a message that N workers of a queue "
                        "failed at goes to NAME.dead (%(default)s)")
    parser.add_argument("--schemas", metavar="DIR", help="refuse messages that do not fit DIR/TYPE.json (JSON Schema; "
                        "needs agent-bus[schemas])")
    parser.add_argument("--strict", action="store_true", help="with --schemas: refuse a type that has none")
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="a further name of this bus, "
                        "as it stands in a URL; only needed without tokens")
    parser.add_argument("--open", action="store_true", help="listen beyond this machine without any token")
    parser.add_argument("--tls-cert", metavar="FILE", help="certificate chain, PEM: speak HTTPS; SIGHUP reads it again")
    parser.add_argument("--tls-key", metavar="FILE", help="its key, if it is in a file of its own")
    parser.add_argument("--verbose", action="store_true", help="a line for each request on stderr")
    parser.add_argument("--version", action="version", version=f"agent-bus {VERSION}")
    options = parser.parse_args(arguments)
    if not 0 <= options.port <= 65535:
        parser.error("--port must be 0 to 65535")
    if options.rate < 0:
        parser.error("--rate must not be negative")
    if options.max_attempts < 1:
        parser.error("--max-attempts must be at least 1")
    if options.tls_key and not options.tls_cert:
        parser.error("--tls-key goes with --tls-cert")
    if options.strict and not options.schemas:
        parser.error("--strict goes with --schemas")
    if not 1024 <= options.max_body <= 9999999:
        parser.error("--max-body must be 1024 to 9999999")
    return options


class Door:
    """Accepts connections. When descriptors run out it closes for RETRY seconds, instead of spinning (98 % CPU).

    A stranger is a connection that has not finished a first request, or its TLS handshake: they cost a descriptor each
    and anyone can make them, so there are at most STRANGERS, and the oldest goes first.
    """

    RETRY = 0.05  # s
    AT_ONCE = 32  # in one turn of the loop; a request is read a turn later, and must not be dropped before

    def __init__(self, bus: Bus, listener: socket.socket, tls: ssl.SSLContext | None) -> None:
        self.bus, self.sock, self.tls = bus, listener, tls
        self.events = 0
        listener.setblocking(False)
        self.open()

    def open(self) -> None:
        if self.sock.fileno() >= 0:
            self.bus.loop.watch(self, selectors.EVENT_READ)

    def close(self) -> None:
        if self.events:
            self.bus.loop.watch(self, 0)
        self.sock.close()

    def ready(self, events: int) -> None:
        for _ in range(self.AT_ONCE):
            try:
                guest, _ = self.sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:  # out of descriptors, or of memory for them
                self.bus.loop.watch(self, 0)
                self.bus.loop.later(self.RETRY, self.open)
                self.bus.drop_idle()
                return
            with contextlib.suppress(OSError):  # it may have gone already; reading will tell
                guest.setblocking(False)
                guest.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.welcome(guest)

    def welcome(self, guest: socket.socket) -> None:
        if self.tls:
            guest = self.tls.wrap_socket(guest, server_side=True, do_handshake_on_connect=False)
        kind = Tls if self.tls else Plain
        kind(self.bus.loop, guest, Connection(self.bus))
        if len(self.bus.strangers) > STRANGERS:
            oldest = next(iter(self.bus.strangers))
            del self.bus.strangers[oldest]
            oldest.transport.abort()


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, or Unusable. The backlog is what may arrive in one turn of a busy loop."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=4096)
    except OSError as error:
        why = str(error.strerror).partition(" (while")[0]  # it goes on to say where, as Python does
        raise Unusable(f"cannot listen on {host} port {port}: {why}") from None


def tls_context(certificate: str | None, key: str | None) -> ssl.SSLContext | None:
    if not certificate:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    try:
        context.load_cert_chain(certificate, key, password="")  # else OpenSSL asks for it on the terminal, and waits
    except (OSError, ssl.SSLError) as error:
        raise Unusable(f"cannot use the certificate {certificate}: {error.strerror or error}") from None
    return context


def serve(options: argparse.Namespace, log: Log) -> int:
    """Run until SIGTERM or SIGINT, or until the disk fails. Returns the exit code."""
    tokens, tls = Tokens(options.db), tls_context(options.tls_cert, options.tls_key)
    if not (is_loopback(options.host) or tokens.closed or options.open):
        raise Unusable(f"{options.host} lets in whoever can reach it: make a token first (python3 bus_server.py invite "
                       "NAME), or say --open if something else guards it")
    bus = Bus(log, Gate(tokens, [options.host, *options.allow_host]), Storms(time.monotonic, options.rate),
              max_body=options.max_body, keep=options.keep, blobs=options.files, verbose=options.verbose,
              schemas=Schemas(options.schemas, options.strict) if options.schemas else None)
    listener = listen(options.host, options.port)
    host, port = listener.getsockname()[:2]
    url = f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
    log.sign(url)
    door = Door(bus, listener, tls)
    for number in (signal.SIGTERM, signal.SIGINT):
        bus.loop.on_signal(number, bus.drain)
    if tls:
        bus.loop.on_signal(signal.SIGHUP, lambda: reload(door, options))
    print(f"listening on {url}", flush=True)
    print(f"messages are in {log.path}", flush=True)
    if not is_loopback(options.host) and not tokens.closed:
        print(f"WARNING: anyone who can reach {host}:{port} can read and send every message", file=sys.stderr)
    bus.tidy()
    bus.loop.every(PRUNE_SECONDS, bus.tidy)
    bus.loop.every(Deadlines.SLOT, bus.sweep)
    bus.loop.run(lambda: bus.draining or bus.broken)
    door.close()
    bus.end()
    return 1 if bus.broken else 0


def reload(door: Door, options: argparse.Namespace) -> None:
    """SIGHUP: new connections get the certificate as it is on disk now; with a bad one, as it was."""
    try:
        door.tls = tls_context(options.tls_cert, options.tls_key)
    except Unusable as error:
        print(f"bus_server: {error}; going on with the old one", file=sys.stderr)


# Commands beside a running server


def invite(arguments: Sequence[str]) -> int:
    """Mint a token and print, once, what to paste on the other machine."""
    parser = argparse.ArgumentParser(prog="bus_server.py invite", description="Make a token for NAME; print it, once.")
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--also", default="", metavar="NAME,...", help="names it may read beside its own")
    parser.add_argument("--send-only", action="store_true", help="it may send, and read nothing")
    parser.add_argument("--operator", action="store_true", help="it may read everything: /log and every mailbox")
    parser.add_argument("--db", default=default_path(), metavar="PATH", help="of the bus (%(default)s)")
    parser.add_argument("--url", help="under which the other machine reaches the bus (that of the running server)")
    options = parser.parse_args(arguments)
    also = [each for each in options.also.split(",") if each]
    for each in [options.name, *also]:
        try:
            name(each, "NAME")
        except Refused as refused:
            parser.error(refused.sentence)
    if options.name.lower() in RESERVED:
        parser.error(f"{options.name} is reserved: choose another name")
    if options.send_only and (also or options.operator):
        parser.error("--send-only excludes --also and --operator")
    token, secret = f"abt_{secrets.token_hex(4)}", secrets.token_urlsafe(32)
    row = {"id": token, "hash": hashlib.sha256(secret.encode()).hexdigest(), "name": options.name, "also": also,
           "send_only": options.send_only, "operator": options.operator, "made": int(time.time()), "revoked": None}
    Tokens(options.db).change(lambda rows: [*rows, row])
    url = (options.url or signature(options.db)).rstrip("/")
    print(INVITATION.format(name=options.name, token=f"{token}_{secret}", url=url))
    return 0


def revoke(arguments: Sequence[str]) -> int:
    """Take back every token of a name. The running server sees it within a tenth of a second."""
    parser = argparse.ArgumentParser(prog="bus_server.py revoke", description="Revoke every token of NAME.")
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--db", default=default_path(), metavar="PATH", help="of the bus (%(default)s)")
    options = parser.parse_args(arguments)
    revoked: list[str] = []

    def change(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for row in rows:
            if row["name"] == options.name and not row["revoked"]:
                row["revoked"] = int(time.time())
                revoked.append(row["id"])
        return rows

    tokens = Tokens(options.db)
    if tokens.rows():  # else there may be no bus either, and no file is made for it
        tokens.change(change)
    print(f"revoked of {options.name}: {' '.join(revoked)}" if revoked else f"{options.name} has no token")
    return 0 if revoked else 1


def list_tokens(arguments: Sequence[str]) -> int:
    """Who has which token, never the secret."""
    parser = argparse.ArgumentParser(prog="bus_server.py tokens", description="List the tokens of a bus.")
    parser.add_argument("--db", default=default_path(), metavar="PATH", help="of the bus (%(default)s)")
    options = parser.parse_args(arguments)
    used = last_used(options.db)
    print(f"{'id':13} {'name':20} {'made':10} {'last used':10} grants")
    for row in Tokens(options.db).rows():
        grants = ["send"] if row["send_only"] else ["send", "read", *(f"read:{each}" for each in row["also"])]
        grants += ["operator"] if row["operator"] else []
        state = f"revoked {day(row['revoked'])}" if row["revoked"] else " ".join(grants)
        print(f"{row['id']:13} {row['name']:20} {day(row['made'])} {day(used.get(row['id'])):10} {state}")
    return 0


def prune(arguments: Sequence[str]) -> int:
    """Remove old messages now: through the running server, which has the one connection that writes, or without it."""
    parser = argparse.ArgumentParser(prog="bus_server.py prune",
                                     description="Remove messages that were fetched, and work that is done.")
    parser.add_argument("--older", type=duration, default="30d", help="than this: 30d, 12h; 0: all (%(default)s)")
    parser.add_argument("--pending", action="store_true", help="also what nobody has fetched, and work not done")
    parser.add_argument("--dry-run", action="store_true", help="only say how many")
    parser.add_argument("--db", default=default_path(), metavar="PATH", help="of the bus (%(default)s)")
    options = parser.parse_args(arguments)
    removal = Removal(0, max(wall_clock() - int(options.older * 1000000), 0), not options.pending)
    old, pending = count_old(options.db, removal.before)
    going = old if options.pending else old - pending
    stay = f"; {pending} that nobody has fetched or done stay: --pending removes them too" if old > going else ""
    print(f"{old} messages are so old{stay}")
    if going and not options.dry_run:
        left = old - going
        try:
            remove_alone(options.db, removal)
        except InUse:
            give_order(options.db, removal)
            while order_file(options.db).exists():
                if sys.stderr.isatty():
                    print(f"\r{count_old(options.db, removal.before)[0] - left} to go ", end="", file=sys.stderr)
                time.sleep(Deadlines.SLOT)
                with contextlib.suppress(InUse):  # the server may end before it is done
                    remove_alone(options.db, removal)
                    order_file(options.db).unlink(missing_ok=True)
        print(f"{old - count_old(options.db, removal.before)[0]} removed")
    return 0


def order_file(database: str) -> pathlib.Path:
    return pathlib.Path(f"{database}.prune")


def give_order(path: str, removal: Removal) -> None:
    """Leave it for the running server, whole and readable, also when it is root who asks."""
    new = f"{path}.prune.new"
    try:
        pathlib.Path(new).write_text(encode(removal))
        give_to_folder(new, path)
        os.replace(new, order_file(path))
    except OSError as error:
        raise Unusable(f"cannot tell the running server: {order_file(path)}: {error.strerror}") from None


def ordered(path: str) -> Removal | None:
    """What the order file says; None if there is none, or none that makes sense."""
    try:
        match = ORDER.fullmatch(order_file(path).read_text())
    except (OSError, ValueError):
        return None
    return Removal(int(match[1]), int(match[2]), match[3] == "true") if match else None


ORDER = re.compile(r"\[([0-9]{1,18}), ([0-9]{1,18}), (true|false)\]")


def count_old(path: str, before: int) -> tuple[int, int]:
    """(messages older than a tick, those of them that are PENDING), read beside a running server."""
    try:
        with contextlib.closing(read_only(path)) as database:
            row = database.execute(
                f"SELECT count(*), count(*) FILTER (WHERE {PENDING}) "
                "FROM messages JOIN mailboxes ON mailbox = id WHERE tick < ?", (before,)
            ).fetchone()
            return int(row[0]), int(row[1])
    except sqlite3.Error as error:
        raise Unusable(f"cannot read the database {path}: {error}") from None


def remove_alone(path: str, removal: Removal) -> None:
    """When no server runs."""
    with contextlib.closing(Log(path)) as log:
        while True:
            batch = Batch()
            batch.removal = removal
            log.commit(batch)
            if not batch.removed:
                return
            removal = removal._replace(above=max(batch.removed.values()))


def day(second: int | None) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(second)) if second else "never"


def last_used(path: str) -> dict[str, int | None]:
    """When the server last saw each token (s since 1970, up to a minute late), read beside it from its database."""
    try:
        with contextlib.closing(read_only(path)) as database:
            rows = database.execute("SELECT token, used FROM uses").fetchall()
    except sqlite3.Error:  # the bus was never started
        return {}
    for token, used in rows:
        if not isinstance(used, int):
            print(f"bus_server: {path}: when {token} was used is damaged; skipped", file=sys.stderr)
    return {token: used if isinstance(used, int) else None for token, used in rows}


def read_only(path: str) -> sqlite3.Connection:
    """A connection beside the server's, which neither writes nor folds the log into the database."""
    return sqlite3.connect(f"{pathlib.Path(path).absolute().as_uri()}?mode=ro", uri=True)


def signature(path: str) -> str:
    """The URL that a running server wrote into its lock file, with our name where it listens on every address."""
    try:
        url = pathlib.Path(f"{path}.lock").read_text().strip()
    except OSError:
        url = ""
    return re.sub(r"//(0\.0\.0\.0|\[::\]):", f"//{socket.gethostname()}:", url) or "http://HOST:8080"


def backup(arguments: Sequence[str]) -> int:
    """Copy a bus, also while it runs: everything acknowledged before, in one file; its tokens and files beside that."""
    parser = argparse.ArgumentParser(prog="bus_server.py backup", description="Copy a bus to COPY, also while it runs.")
    parser.add_argument("copy", metavar="COPY", help="a new file; beside it COPY.tokens and COPY.blobs")
    parser.add_argument("--db", default=default_path(), metavar="PATH", help="of the bus (%(default)s)")
    options = parser.parse_args(arguments)
    if os.path.exists(options.copy):
        raise Unusable(f"{options.copy} is there already: choose another name")
    messages = copy_database(options.db, f"{options.copy}.new")
    rows = Tokens(options.db).rows()
    if rows:
        Tokens(options.copy).change(lambda _: rows)
    files = copy_files(options.db, options.copy)  # after the messages, which point to them
    os.rename(f"{options.copy}.new", options.copy)
    print(f"{options.copy}: {messages} messages, {files} files, {len(rows)} tokens")
    return 0


def restore(arguments: Sequence[str]) -> int:
    """Put a copy in the place of a bus that is stopped. It is another bus then, and says so to readers of the old one.

    They may have read what is in no copy. With the old id they would go on behind that, and were never told.
    """
    parser = argparse.ArgumentParser(prog="bus_server.py restore", description="Go back to COPY; the bus is stopped.")
    parser.add_argument("copy", metavar="COPY", help="what backup made; its tokens are taken if PATH has none")
    parser.add_argument("--db", default=default_path(), metavar="PATH", help="of the bus (%(default)s)")
    options = parser.parse_args(arguments)
    with locked(options.db):
        new, old, bus = f"{options.db}.new", f"{options.db}.{wall_clock()}", secrets.token_hex(8)
        rows = missing_tokens(options.copy, options.db)
        messages = copy_database(options.copy, new, bus)
        if rows:
            Tokens(options.db).change(lambda _: rows)
        files = copy_files(options.copy, options.db)
        give_to_folder(new, options.db)
        for suffix in ("", "-wal", "-shm"):  # so named, they stay one database
            with contextlib.suppress(FileNotFoundError):
                os.rename(options.db + suffix, old + suffix)
        os.rename(new, options.db)
    print(f"{options.db} is bus {bus} now, with {messages} messages; {files} files came back")
    if os.path.exists(old):
        print(f"what was there before is in {old}")
    return 0


def missing_tokens(copy: str, path: str) -> list[dict[str, Any]]:
    """The tokens of a copy, for a bus that has none. Where some are, these know better who was revoked since."""
    if os.path.exists(f"{path}.tokens"):
        return []
    rows = Tokens(copy).rows()
    if last_used(copy) and not rows:
        raise Unusable(f"the bus in {copy} had tokens, and would be open without: put {copy}.tokens beside it, or make "
                       f"one first (python3 bus_server.py invite NAME --db {path})")
    return rows


def copy_files(source: str, target: str) -> int:
    """The files of one database that the other lacks; returns how many those were. Half of one never has its name."""
    there, copied = pathlib.Path(f"{target}.blobs"), 0
    try:
        for file in pathlib.Path(f"{source}.blobs").glob("?" * 64):
            if not (there / file.name).exists():
                there.mkdir(mode=0o700, exist_ok=True)
                part = there / f"{file.name}.part"
                with contextlib.suppress(FileNotFoundError):  # retention removed it just now
                    shutil.copy2(file, part)  # with its age
                    give_to_folder(str(part), target)
                    part.replace(there / file.name)
                    copied += 1
        if copied:
            give_to_folder(str(there), target)
    except OSError as error:
        raise Unusable(f"cannot copy the files in {source}.blobs: {error.strerror}") from None
    return copied


def copy_database(source: str, target: str, bus: str | None = None) -> int:
    """The database as of one moment, checked, as one file without a log; returns how many messages it has.

    With `bus` the copy has that as its id.
    """
    with contextlib.suppress(FileNotFoundError):
        os.remove(target)
    try:
        with contextlib.closing(read_only(source)) as old, contextlib.closing(sqlite3.connect(target)) as new:
            old.backup(new)
            new.execute("PRAGMA journal_mode=DELETE")
            new.execute("UPDATE bus SET id = ifnull(?, id)", (bus,))
            new.commit()
            report = new.execute("PRAGMA integrity_check(1)").fetchone()[0]
            messages = int(new.execute("SELECT count(*) FROM messages").fetchone()[0])
        if report != "ok":
            raise sqlite3.DatabaseError(f"it is damaged: {report}")
    except sqlite3.Error as error:
        with contextlib.suppress(FileNotFoundError):
            os.remove(target)
        raise Unusable(f"cannot copy the database {source} to {target}: {error}") from None
    return messages


INVITATION = """\
The token of {name}, shown this once (the bus keeps only its hash):

    {token}

On the machine of {name}:

    curl -fO {url}/bus_recv.py; curl -fO {url}/bus_send.py
    export AGENT_BUS_URL={url} AGENT_NAME={name} AGENT_BUS_TOKEN={token}
    python3 -u bus_recv.py {name}      # in Claude Code: the command of a Monitor

    printf 'header = "Authorization: Bearer %s"' "$AGENT_BUS_TOKEN" | curl -K - "$AGENT_BUS_URL/agents"     # a test
"""

COMMANDS = {"invite": invite, "revoke": revoke, "tokens": list_tokens, "prune": prune, "backup": backup,
            "restore": restore}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    os.umask(0o077)  # the database and what lies beside it are for this user alone
    try:
        if arguments and arguments[0] in COMMANDS:
            return COMMANDS[arguments[0]](arguments[1:])
        options = command_line(arguments)
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):  # a parked reader is a descriptor
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        log = Log(options.db, attempts=options.max_attempts)
        try:
            return serve(options, log)
        finally:
            log.close()
    except Unusable as error:
        print(f"bus_server: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # in a command, or before the server listens
        return 130


if __name__ == "__main__":
    sys.exit(main())
