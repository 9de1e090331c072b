#!/usr/bin/env python3
"""agent-bus server: a message bus for coding agents, in one file, with the standard library only.

The file is written in layers. A layer uses only the layers above it; tests/core/test_layers.py checks that.

    Words       names, cursors, ids, JSON and the records: the data of requests and messages
    Loop        turns, timers, and slow work that must not hold up a turn
    Wire        the grammar of a request and of an answer: Head, Query, Answer
    Connection  one socket, one phase, one deadline; it calls an App and does not know the Bus
    Identity    tokens, who is admitted, and limits for runaway agents
    State       the SQLite file, and the operations that change it
    Mailboxes   how far each name has read, and which connections wait
    Bus         sending, receiving, the work after a commit, the endpoints of the core
    start       the command line, the commands, the extensions

How a message travels:

    sender --POST /send--> Connection -> Bus.send -> Ledger -> State.apply   (one transaction for many sends, one fsync)
                                                       | Applied: the messages that are visible now, in tick order
    reader <--parked /recv-- Connection <- Mailboxes.wake <- Bus.announce -> the answer to the sender

Every message has a tick: the microsecond of its commit. State, the only writer, makes ticks unique and increasing. The
tick gives a message its time, its place in the order and its id; a reader's cursor is a tick too. On the wire a tick is
`ts` (seconds), `id` (hex), `since` or `now`.

A turn of the loop never waits for the disk. A commit runs in Loop.aside(): if it is slow, a second thread runs the
turns. The reading, writing and hashing of large files runs in a pool of threads, with Loop.in_thread().

The optional features are in bus_extensions/: a file NAME.py for each section of PROTOCOL.md, and its parts,
_NAME_*.py. PROTOCOL.md is the contract, docs/design.md has the reasons, and docs/changing.md says how to add an
endpoint, an option, a column, an operation or an extension.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import errno
import fcntl
import hashlib
import heapq
import hmac
import importlib.util
import ipaddress
import json
import math
import os
import pathlib
import queue
import re
import resource
import secrets
import selectors
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import sys
import tempfile
import threading
import time
import traceback
import zlib
from bisect import bisect_left, bisect_right, insort
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from email.utils import formatdate
from functools import lru_cache, partial
from http import HTTPStatus
from itertools import accumulate, chain, count, filterfalse, islice, takewhile
from operator import attrgetter, length_hint
from types import ModuleType
from typing import IO, Any, ClassVar, NamedTuple, NoReturn, Protocol, TypeVar, Union
from urllib.parse import parse_qsl, unquote

VERSION = "0.2.0"
# Python 3.8 prints this text. Older ones show the line in a SyntaxError, because they do not know `:=`.
if sys.version_info < (3, 9) and (needs := "bus_server.py needs Python 3.9 or later"):  # noqa: UP036
    sys.exit(needs)

# ── Words ────────────────────────────────────────────────────────────────────────────────────────────────────────────
# The data of requests and messages, as Python values. Text from outside is parsed here, once; the layers below handle
# names, ticks and records only. To add a member that the bus interprets, begin at draft(); to add a record, put it
# beside Message.

HOLD = 25.0  # s; the hold of a poll without `wait`; common proxies cut a request that is quiet for 30 s
HOLD_MAX = 60.0  # s; a poll that asks for more is answered after this time, and its client polls again
AHEAD = 300 * 1000000  # us; a cursor from a host with a fast clock may be this far ahead of the bus's clock
NAMES_PER_SEND = 64
MAX_MESSAGES = 1000  # in one answer
PLAIN_BYTES = 1 << 17  # of messages in an answer as text, whose invisible characters take more time
MESSAGE_BYTES = 10 << 20  # of one message in an answer; as text it may take half as much again, and clients read 16 MiB
ANSWER_BYTES = 1 << 20  # of messages in an answer that has more than one; it bounds memory and the time of a turn
DEPTH = 32  # levels of JSON; at about 1000 Python's parser raises an error that is not a ValueError
TTL_MIN = 0.001  # s; a shorter one could round to 0
TTL_MAX = 1000000000  # s, 30 years; the end of a ttl must fit into an integer of SQLite
DIGITS = 4300  # of an integer in JSON, the limit of newer Pythons; parsing time grows with the square

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,63}")
KEY = re.compile(r"[!-~]{1,128}")
RESERVED = {"all", "system", "operator", "user"}  # an agent with such a name could fool another agent
EVERYONE = "all"
RECALLED = 1  # the value of `expires` in a message that its sender took back


Headers = tuple[tuple[str, str], ...]
T = TypeVar("T")


class Refused(Exception):
    """A request that cannot be served: a status, and one sentence for the client. refusal() makes the answer of it."""

    def __init__(self, status: int, sentence: str, *headers: tuple[str, str]) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.headers = status, sentence, headers


class Unusable(Exception):
    """The bus or a command cannot start. The text is one sentence that says why."""


class InUse(Unusable):
    """Another process uses the database."""


class Planted(Unusable):
    """A file beside the database that another user may have put there: nothing in it holds."""


def called(command: str) -> str:
    """How the user of this host runs a command of the bus: it is installed, or lies in a folder."""
    if os.path.basename(sys.argv[0]).startswith("agent-bus"):
        return f"agent-bus {command}"
    return f"python3 bus_server.py {command}".removesuffix(" serve")


def wall_clock() -> int:
    """Microseconds since 1970. This clock may step back; the ticks that State makes of it do not."""
    return time.time_ns() // 1000


def seconds(tick: int) -> str:
    """A tick as the wire writes it: exact decimal seconds. Arithmetic with floats would round its 16 digits."""
    return "%d.%06d" % divmod(tick, 1000000)  # noqa: UP031  (0.28 us; an f-string takes 0.37)


def iso(tick: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(tick // 1000000))


def name(text: Any, what: str) -> str:
    """The text, if it is a name; else Refused, which says `what` must be one."""
    if not isinstance(text, str) or not NAME.fullmatch(text):
        given = f", not {text[:64]!r}{'…' * (len(text) > 64)}" if isinstance(text, str) else ""
        names = "1 to 64 of A-Z a-z 0-9 . _ : @ - with a letter or digit first"
        raise Refused(400, f"{what} must be a name: {names}{given}")
    return text


def speaker(text: Any, what: str) -> str:
    """The text, if it is the name of one that may send; else Refused, with a name that is free (unless guessed)."""
    own = name(text, what)
    if own.lower() in RESERVED:
        why = "this name is reserved, because it could be taken for a person or for the bus"
        another = f"{own.lower()}-{secrets.token_hex(2)} or another name"
        raise Refused(400, f"{what} must not be {own}: {why}; use {another}")
    return own


def channel_of(text: Any) -> str:
    return "default" if text in (None, "") else name(text, "channel")


def is_name(text: Any) -> bool:
    return isinstance(text, str) and bool(NAME.fullmatch(text))


def tick_of(text: Any) -> int | None:
    """The tick that an id stands for, or None if the text is not an id."""
    return int(text, 16) if isinstance(text, str) and re.fullmatch("[0-9a-f]{1,13}", text) else None


NOW, LAST = -1, -2  # they stand for the words `now` and `last`: no tick is negative
SINCE = re.compile(r"([0-9]{1,10})(?:\.([0-9]{1,9}))?")


def cursor(text: str) -> int:
    """`since` as a tick, NOW or LAST. It is rounded to a microsecond, because jq 1.6 prints 17 digits of a float."""
    if text in ("now", "last"):
        return NOW if text == "now" else LAST
    match = SINCE.fullmatch(text)
    if not match:
        hint = ", and this looks like milliseconds" if re.fullmatch(r"[0-9]{11,}(\.[0-9]*)?", text) else ""
        raise Refused(400, f"since must be 'now', 'last' or seconds like 1795203596.123456{hint}")
    return int(match[1]) * 1000000 + (int((match[2] or "").ljust(9, "0")) + 500) // 1000


# The records: what the layers below pass to each other.

made = tuple.__new__  # makes a NamedTuple of all its members in order, in 0.12 us; its constructor takes 0.27


class Message(NamedTuple):
    """A committed message. `text` has the JSON members that follow ts, id and to; `n` is its number in its mailbox."""

    tick: int
    channel: str
    to: str
    sender: str
    text: str
    n: int
    expires: int | None  # wall clock, us; RECALLED when its sender took it back
    answers: int | None = None  # the tick of the message that it replies to

    def render(self) -> str:
        return f'{{"ts": {seconds(self.tick)}, "id": "{self.tick:x}", "to": "{self.to}", {self.text}}}'

    def without_text(self) -> str:
        """A message that nobody may read any more: its names only."""
        return self._replace(text=f'"from": "{self.sender}", "channel": "{self.channel}"').render()


class Draft(NamedTuple):
    """A valid message that is not committed yet. The commit makes one Message of it for each name in `to`."""

    channel: str
    to: tuple[str, ...]
    sender: str
    text: str
    key: str | None  # the idempotency key
    ttl: int | None  # us
    answers: int | None = None  # the tick of the message that it replies to
    thread: int | None = None  # the tick of the message that began its chain of replies
    depth: int = 0  # its place in that chain; 0 begins one


class Stored(NamedTuple):
    """The result of storing one Draft; the answer to its sender is made of it."""

    ticks: list[int]  # one for each name in `to`
    duplicate: bool  # an earlier send with the same key stored it


class Poll(NamedTuple):
    """The request of one reader for messages. None and () mean any."""

    me: str | None  # whose cursor it is; None for an observer
    names: tuple[str, ...]
    channel: str | None
    sender: str | None
    since: int
    limit: int
    hold: float  # s
    plain: bool  # the reader wants text, not JSON
    token: str = ""  # the id of the token that let the reader in
    sees: Grant | None = None  # an observer gets only what this token may see; None: everything
    owner: str = ""  # of an observer: whose limits it counts for

    @property
    def who(self) -> str:
        return str(self.me)

    def places(self) -> Sequence[Key]:
        mailboxes: list[Key] = [(str(self.channel), own) for own in self.names]
        return [(OBSERVERS, self.owner), EVERYTHING] if self.me is None else mailboxes

    def present(self) -> Sequence[str]:
        return () if self.me is None else self.names

    def wants(self, message: Message) -> bool:
        return (
            (self.channel is None or message.channel == self.channel)
            and (not self.names or message.to in self.names)
            and (self.sender is None or message.sender == self.sender)
            and not (message.to == EVERYONE and message.sender == self.me)
            and (self.sees is None or self.sees.may_see(message))
        )

    @property
    def room(self) -> int:
        """Bytes of messages after which an answer ends."""
        return PLAIN_BYTES if self.plain else ANSWER_BYTES

    def covers(self, upto: int, message: Message) -> bool:
        """Is the message in an answer to this poll that ends at the tick `upto`?"""
        return self.since < message.tick <= upto and self.wants(message)


Key = tuple[str, Union[str, int]]  # a place to wait at: channel and name of a mailbox, or a pair that no mailbox has:
EVERYTHING: Key = ("", "")  # observers wait here
OBSERVERS = "observers of"  # with the owner of a token or address: its observers wait here
REPLIES = "replies to"  # with the tick of a message: senders wait here for a reply to it


@lru_cache(1024)
def interned(key: Any) -> Any:
    """The first key that was equal to this one. A poll makes its key several times, and all who keep it share one."""
    return key


class Mark(NamedTuple):
    """How far a mailbox was read, as stored in the database. `read` and `fetched` are ticks."""

    channel: str
    name: str
    own: bool
    read: int | None
    fetched: int
    seen: int  # wall clock, us


FETCHED, ACKNOWLEDGED, ALONE = 0, 1, 2  # kinds of a Receipt; ALONE: this message was read by its id, out of order


class Receipt(NamedTuple):
    """Which reader moved a mark of this mailbox to which tick, and when. The last receipt of each second is kept."""

    channel: str
    name: str
    kind: int
    tick: int
    reader: str
    at: int  # wall clock, us

    def slot(self) -> tuple[str, str, int | str]:
        """Where it waits to be saved: one place for each mark, and one for each message that was read alone."""
        return self.channel, self.name, f"{self.tick:x}" if self.kind == ALONE else self.kind


class Grant(NamedTuple):
    """The rights of one token. OPEN is the grant of every request on a bus without tokens."""

    token: str  # its id, which is not secret
    name: str
    also: Sequence[str]  # names it may read beside its own
    send_only: bool
    operator: bool

    def sign(self, message: Any) -> Any:
        """The message with this token's name as sender; 403 if the message claims another sender."""
        if not self.name or not isinstance(message, dict):
            return message
        if message.get("from", self.name) != self.name:
            raise Refused(403, f"this token sends as {self.name} only: leave out from (--from, AGENT_NAME), or give it")
        return {**message, "from": self.name}

    def reads(self, own: str) -> bool:
        return not self.send_only and (self.operator or own in (self.name, EVERYONE, *self.also))

    def mailboxes(self) -> list[str]:
        """The names that reads() allows; of an operator only some of them."""
        return [] if self.send_only else [self.name, EVERYONE, *self.also]

    def may_see(self, message: Message) -> bool:
        return self.reads(message.to) or message.sender == self.name

    def values(self) -> tuple[bool, str, str]:
        """The values of SEES."""
        return self.operator, self.name, encode(self.mailboxes())

    def check(self, names: Iterable[str]) -> None:
        for own in filterfalse(self.reads, names):
            need = "an invitation without --send-only" if self.send_only else f"invite --also {own}"
            raise Refused(403, f"the token of {self.name} may not read {own}: it needs {need}")

    def check_operator(self) -> None:
        if not self.operator:
            raise Refused(403, f"the token of {self.name} may not read everyone's mail: it needs invite --operator")


OPEN = Grant("", "", (), False, True)
SEES = "(? OR sender = ? OR name IN (SELECT value FROM json_each(?)))"  # Grant.may_see() in SQL; see Grant.values()

Way = tuple[str, str, str]  # channel, sender, receiver: of one copy of a message


# From JSON to a Draft.

OURS = {"from", "to", "channel", "msg", "key", "ts", "id"}  # members that the server writes; others pass unchanged


def draft(fields: Any, key: str | None) -> Draft:
    """Make a Draft of a message as its sender gave it, or raise Refused. `key` is the header's; a member `key` wins.

    Invariant: a message is validated whole before it becomes an operation, so no message can fail its neighbours.
    """
    if not isinstance(fields, dict):
        raise Refused(400, "a message must be a JSON object")
    try:
        sender, to, msg = fields["from"], fields["to"], fields["msg"]
    except KeyError as missing:
        raise Refused(400, f"{missing.args[0]} is missing: a message has from, to and msg") from None
    try:
        known = addresses.__wrapped__ if isinstance(to, list) else addresses  # lists of names are large, and rare
        channel, to, start = known(sender, tuple(to) if isinstance(to, list) else to, fields.get("channel", "default"))
    except TypeError:  # one of them is a list or an object, which no cache can look up
        raise Refused(400, "from, to and channel must be names") from None
    parent = fields.get("reply_to")
    if not isinstance(msg, str) or not (parent is None or isinstance(parent, str)):
        raise Refused(400, "msg and reply_to must be strings")
    key = key_of(fields, key)
    text, ttl, answers = start + quote(msg), None, None
    if not fields.keys() <= OURS:  # else it is as most messages
        ttl, answers = lifetime(fields.get("ttl")), tick_of(parent) if parent else None
        text += f", {encode({member: value for member, value in fields.items() if member not in OURS})[1:-1]}"
    return made(Draft, (channel, to, sender, text, key, ttl, answers, None, 0))


def key_of(fields: dict[str, Any], header: str | None) -> str | None:
    """The idempotency key of these members or, if they have none, that of the header; else None."""
    key = header if fields.get("key") is None else fields["key"]
    if key is not None and not (isinstance(key, str) and KEY.fullmatch(key)):
        raise Refused(400, "key must be 1 to 128 printable ASCII characters without a space")
    return key


@lru_cache(4096)
def addresses(sender: Any, to: Any, channel: Any) -> tuple[str, tuple[str, ...], str]:
    """The channel and the receivers of a message, each once, and the first members of its text.

    Cached, because few pairs of names write many messages: 0.2 us, not 1.
    """
    receivers = to if isinstance(to, tuple) else (to,)
    if not 1 <= len(receivers) <= NAMES_PER_SEND:
        raise Refused(400, f"to must be a name or a list of 1 to {NAMES_PER_SEND} names")
    sender, channel = speaker(sender, "from"), channel_of(channel)
    start = f'"from": "{sender}", "channel": "{channel}", "msg": '
    return channel, tuple(dict.fromkeys(name(one, "to") for one in receivers)), start


def lifetime(ttl: Any) -> int | None:
    """A ttl in microseconds."""
    if ttl is None:
        return None
    if isinstance(ttl, bool) or not isinstance(ttl, (int, float)) or not TTL_MIN <= ttl <= TTL_MAX:
        raise Refused(400, f"ttl must be a number of seconds from {TTL_MIN} to {TTL_MAX}")
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
).raw_decode  # decode() would look for blanks with two patterns: 0.5 us
encode = json.JSONEncoder(allow_nan=False).encode  # ASCII, so that our output passes every terminal and every jq
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
    """The value of a JSON body. Refused, if Python's parser would accept it and the parser of a reader might not."""
    text = parse_text(body).lstrip("\ufeff").strip(" \t\r\n")  # some editors begin a file with a BOM
    try:
        value, end = decode(text)
        if end < len(text):
            raise ValueError(f"there is more text after the value, at character {end}")
        beside = [*map(type, value)].count(dict) - 1 if isinstance(value, list) else 0  # not nested
        if "\\u" in text or text.count("{") + text.count("[") - beside > DEPTH:
            inspect(value, DEPTH)  # in every other text it finds nothing, and takes 2 us for each message
    except RecursionError:
        raise Refused(400, f"the JSON of this request is not usable: {TOO_DEEP}") from None
    except ValueError as error:
        raise Refused(400, f"the JSON of this request is not usable: {error}") from None
    return value


TOO_DEEP = f"it is nested more than {DEPTH} levels deep"
HALF_A_PAIR = re.compile("[\ud800-\udfff]")


def inspect(value: Any, depth: int) -> None:
    """ValueError for NUL, for half of a surrogate pair (SQLite and jq would fail on it later), for deep nesting."""
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("a text has a NUL character, which no message may have: send a file")
        if HALF_A_PAIR.search(value):
            raise ValueError("a text has half of a surrogate pair, which is not in UTF-8: send a file")
    elif isinstance(value, (dict, list)):
        if not depth:
            raise ValueError(TOO_DEEP)
        for part in value:
            inspect(part, depth - 1)
            if isinstance(value, dict):
                inspect(value[part], depth - 1)


# ── Loop ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
# One loop runs everything. A turn serves every socket that is ready, runs every timer that is due, then runs the
# actions that sockets and timers have queued with soon(). A commit runs in aside(): if it is slow, a second thread runs
# the turns. To add work that follows a turn, call soon(); to add a timer, call later() or every().


class Report:
    """Lines for stderr. A separate thread writes them, so a full pipe or a full disk does not delay the loop.

    If ROOM lines are waiting, more lines are dropped; the next line that is written says how many.
    """

    ROOM = 1000  # lines

    def __init__(self) -> None:
        # And what flush() calls. No Queue: without memory, its code in Python may keep its lock for ever.
        self.lines: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.dropped = 0
        self.begin = threading.Thread(target=self.write, name="report", daemon=True).start

    def start(self) -> None:
        """Start the thread, if it does not run yet. Without memory this may wait for ever, so a Loop does it early."""
        with contextlib.suppress(RuntimeError):  # it has begun already
            self.begin()

    def say(self, line: Any) -> None:
        self.start()
        if self.lines.qsize() < self.ROOM:
            self.lines.put(line)
        else:
            self.dropped += 1

    def write(self) -> None:
        while True:
            # stderr is full or closed; or there is no memory: that would end the thread, and then Python the process
            with contextlib.suppress(Exception):
                line = self.lines.get()
                if self.dropped and not callable(line):
                    line, self.dropped = f"bus_server: {self.dropped} lines were dropped here\n{line}", 0
                line() if callable(line) else print(line, file=sys.stderr, flush=True)

    def flush(self, patience: float) -> bool:
        """Wait until all lines are written, for at most `patience` seconds; are they?"""
        over = threading.Event()
        self.start()
        self.lines.put(over.set)  # also if ROOM lines wait
        return over.wait(patience)


REPORT = Report()
say = REPORT.say


class Watched(Protocol):
    """An object whose socket the loop watches."""

    sock: socket.socket
    events: int  # of selectors.EVENT_READ and EVENT_WRITE; only Loop.watch changes it

    def ready(self, events: int) -> None:
        """Some of the events have come."""

    def failed(self) -> None:
        """ready() raised an exception."""


def say_exception(error: Exception) -> None:
    """Report it, if there is memory for that and to read the lines of the source."""
    with contextlib.suppress(Exception):  # Python calls it a RuntimeError if there is no memory for the lock of a file
        say("".join(traceback.format_exception(type(error), error, error.__traceback__)))


class Loop:
    """Runs the turns and the timers, and slow work in aside() and in_thread().

    Invariant: only the thread that holds `lock` runs turns. Normally that is the thread that called run(). If it stays
    in aside() for longer than PATIENCE, a second thread, the deputy, runs the turns, so a slow disk delays only the
    requests that wait for a commit. If the disk is fast, the deputy is not woken. Compared with a thread that makes all
    commits, this gives 19 % more sends a second with one sender, 15 % with 16, and 4 % with 128.

    Invariant: an exception ends only the call that raised it. attempt() catches it.

    asyncio's loop cannot be used here, because it cannot go on in another thread.
    """

    PATIENCE = 0.005  # s; the deputy takes over after one to two times this
    RETRY = 1.0  # s until a timer or an action that raised is called again
    BUDGET = 0.01  # s for the sockets of a turn, and for the actions at its end; the rest comes in the next turn
    FILE_THREADS = 4  # threads for in_thread()

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.actions: deque[Callable[[], object]] = deque()  # for the end of this turn
        self.timers: list[tuple[float, int, Callable[[], object]]] = []  # when, on the monotonic clock; a number; what
        self.numbers = count()  # timers that are due at the same time run in the order they were set
        self.unserved: dict[int, int] = {}  # sockets for which the last turn had no time: the place of each in the next
        self.signals: dict[int, Callable[[], None]] = {}
        self.sock, self.bell = socket.socketpair()
        self.events = 0
        self.rung = False  # a byte of ring() is unread
        for end in (self.sock, self.bell):
            end.setblocking(False)
        self.watch(self, selectors.EVENT_READ)
        self.lock = threading.Lock()
        self.lock.acquire()
        self.away: object | None = None  # a new object each time that the thread of run() is aside
        self.failure: Exception | None = None  # what ended the deputy
        self.alert = threading.Lock()  # free: the deputy is to look
        self.works: queue.SimpleQueue[tuple[Callable[[], Any], Callable[[Any], None]]] = queue.SimpleQueue()
        deputy = threading.Thread(target=self.stand_in, name="deputy", daemon=True)
        files = [threading.Thread(target=self.work, name="files", daemon=True) for _ in range(self.FILE_THREADS)]
        # All threads begin here: one that gets no memory for its first step leaves Thread.start() waiting for ever.
        self.threads = [deputy, *files]
        REPORT.start()
        for thread in self.threads:
            thread.start()

    def attempt(self, action: Callable[..., object], *arguments: Any) -> bool:
        """Call `action`, and report an exception. True if there was none."""
        try:
            action(*arguments)
        except Exception as error:
            say_exception(error)
            return False
        return True

    def watch(self, watched: Watched, events: int) -> None:
        """Watch the socket of `watched` for these events from now on; 0 for none."""
        if events == watched.events:
            return
        if not watched.events:
            self.selector.register(watched.sock, events, watched)
        elif events:
            self.selector.modify(watched.sock, events, watched)
        else:
            self.selector.unregister(watched.sock)
        watched.events = events

    def soon(self, action: Callable[[], None]) -> None:
        """Call `action` at the end of this turn."""
        self.actions.append(action)

    def each(self, action: Callable[[T], object], failed: Callable[[T], object], items: Iterable[T]) -> None:
        """Call the action with each of them; after an exception call `failed` with that one, and go on."""
        for item in items:
            try:
                action(item)
            except Exception as error:
                say_exception(error)
                self.attempt(failed, item)

    def gradually(self, action: Callable[[T], object], failed: Callable[[T], object], items: Iterator[T]) -> None:
        """each() with the items for which this turn has time; the next turns take the others. `items`: of a list."""
        self.each(action, failed, self.timely(items))
        if length_hint(items):
            self.soon(partial(self.gradually, action, failed, items))

    def insist(self, action: Callable[[], object]) -> None:
        """Call `action`; after an exception call it again in RETRY seconds, because somebody may wait for it."""
        if not self.attempt(action):
            self.later(self.RETRY, action)

    def later(self, patience: float, action: Callable[[], object]) -> None:
        """Call `action` in `patience` seconds."""
        heapq.heappush(self.timers, (time.monotonic() + patience, next(self.numbers), action))

    def every(self, period: float, action: Callable[[], None]) -> None:
        """Call `action` at each multiple of `period` (s) of the monotonic clock."""

        def again() -> None:
            self.every(period, action)
            self.attempt(action)

        self.later(period - time.monotonic() % period, again)

    def on_signal(self, number: int, action: Callable[[], None]) -> None:
        """Call `action` in a turn. The signal writes a byte to the bell, so it is noticed even if the disk stalls."""
        self.signals[number] = action
        signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self.bell.fileno(), warn_on_full_buffer=False)

    def tell(self, action: Callable[[], None]) -> None:
        """Call `action` in a turn, and once. Other threads use this."""
        self.actions.append(partial(self.attempt, action))
        self.ring()

    def in_thread(self, work: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Call `work`, which may wait for a file, in a thread, then `then` in a turn, with its result or exception."""
        self.works.put((work, then))

    def work(self) -> None:
        """A thread of in_thread()."""
        while True:
            self.attempt(self.finish, *self.works.get())

    def finish(self, work: Callable[[], Any], then: Callable[[Any], None]) -> None:
        def note() -> None:
            self.actions.append(partial(self.attempt, then, result))

        try:
            result = work()
        except Exception as error:
            result = error
        while not self.attempt(note):  # without memory; but somebody waits
            time.sleep(self.PATIENCE)
        self.ring()

    def ring(self) -> None:
        """One byte is enough. If they filled the bell, a signal would be lost, because its byte had no room."""
        if not self.rung:
            with contextlib.suppress(BlockingIOError):  # it is full of signals, so the loop wakes anyway
                self.rung = True
                self.bell.send(b"\0")

    def ready(self, events: int) -> None:
        """The bell rang: another thread told us something, a signal came, or run() wants its turns back."""
        said, self.rung = self.sock.recv(4096), False  # only then run what was told
        for number in said:
            if number in self.signals:
                self.attempt(self.signals[number])

    def failed(self) -> None:
        """Nobody waits for the bell itself."""

    def run(self, over: Callable[[], bool]) -> None:
        """Take turns until over() is true."""
        while not over():
            self.patiently(self.take_turn)
            if self.failure:
                raise self.failure

    def patiently(self, turn: Callable[[], None]) -> None:
        """If there is no memory for a turn, begin it again a little later: its sockets are still ready."""
        try:
            turn()
        except MemoryError:
            time.sleep(self.PATIENCE)

    def take_turn(self) -> None:
        """Serve the sockets that are ready, run the timers that are due, then the actions that these two queued."""
        patience = None
        if self.actions:
            patience = 0.0
        elif self.timers:
            patience = self.timers[0][0] - time.monotonic()
        events = self.selector.select(patience)
        if self.unserved:  # in their order: the system always has the same one
            events.sort(key=lambda ready: self.unserved.get(ready[0].fd, sys.maxsize))
        rest = iter(events)
        for key, ready in self.timely(rest):
            if not self.attempt(key.data.ready, ready):
                self.attempt(key.data.failed)
        self.unserved = {key.fd: place for place, (key, _) in enumerate(rest)}
        now = time.monotonic()
        while self.timers and self.timers[0][0] <= now:
            self.insist(heapq.heappop(self.timers)[2])
        for _ in range(len(self.actions)):
            if self.actions:  # the deputy may have run them while one of them was aside
                self.insist(self.actions.popleft())
            if time.monotonic() > now + self.BUDGET:
                break

    def timely(self, items: Iterator[T]) -> Iterator[T]:
        """The items, until BUDGET is over. The rest stays in `items`."""
        over = time.monotonic() + self.BUDGET
        for item in items:
            yield item
            if time.monotonic() > over:
                return

    def aside(self, work: Callable[[], None]) -> None:
        """Call `work`, which may take long, and release the turn meanwhile. Only an action of soon() may call this."""
        self.away = object()
        self.lock.release()
        try:
            if self.alert.locked():  # the deputy takes it first and then looks, so it misses nothing
                self.alert.release()
            work()
        finally:
            self.away = None
            if not self.lock.acquire(blocking=False):
                self.ring()
                self.lock.acquire()

    def stand_in(self) -> None:
        """The deputy's thread."""
        while True:
            self.patiently(self.watch_over)

    def watch_over(self) -> None:
        """Wait until the thread of run() is aside, and take the turns while it stays there."""
        self.alert.acquire()  # no Event, whose code in Python may keep a lock for ever if it has no memory
        away = self.away
        time.sleep(self.PATIENCE)
        if away and self.away is away and self.lock.acquire(blocking=False):
            try:
                while self.away is away:
                    self.patiently(self.take_turn)
            except Exception as error:
                self.failure = error
            finally:
                self.lock.release()


# ── Wire ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
# HTTP/1.1 as text: Head parses the head of a request, Query its query, http_bytes() makes an answer. No code here
# uses a socket. A request that breaks the grammar is refused before any part of it is interpreted.

HEAD_BYTES, LINE_BYTES, HEADERS = 16384, 8192, 64  # limits of a request's head; beyond them: 431, 414, 431


class Stream(Protocol):
    """A file, or the rest of one, that is read and sent in pieces as the body of an answer."""

    length: int  # bytes
    busy: bool  # a thread reads

    def read(self) -> bytes:
        """In a thread: the next piece; empty if somebody cut the file short."""

    def close(self) -> None: ...


class Answer(NamedTuple):
    """The answer to a request. `delivers`: a reader and a tick; the reader then has all mail up to the tick."""

    status: int
    body: bytes
    kind: str = "application/json"
    headers: Headers = ()
    delivers: tuple[Any, int] | None = None
    file: Stream | None = None


REASONS = {status.value: status.phrase for status in HTTPStatus}


def http_bytes(answer: Answer, bare: bool, closing: bool) -> bytes:
    """The answer as HTTP/1.1, in one piece: head and body written apart would cost 40 ms (Nagle and delayed ACK)."""
    status, body, kind, headers, _, file = answer
    length = -1 if status == 204 else file.length if file else len(body)
    head = head_of(int(time.time()), status, kind, length, closing, headers)
    return head if bare else head + body


@lru_cache(64)  # many answers of one second have the same head: 0.2 us, not 1.7
def head_of(second: int, status: int, kind: str, length: int, closing: bool, headers: Headers) -> bytes:
    content = "" if length < 0 else f"Content-Type: {kind}\r\nContent-Length: {length}\r\n"
    further = "".join([f"{header}: {value}\r\n" for header, value in headers])
    return (
        f"HTTP/1.1 {status} {REASONS[status]}\r\nDate: {formatdate(second, usegmt=True)}\r\n{content}"
        "Cache-Control: no-store\r\nX-Accel-Buffering: no\r\n"
        f"Connection: {'close' if closing else 'keep-alive'}\r\n{further}\r\n"
    ).encode("latin-1")


def too_much(sentence: str, wait: int) -> Refused:
    """429; `wait` is in s."""
    return Refused(429, sentence, ("Retry-After", str(wait)))


def unavailable(sentence: str, wait: int) -> Refused:
    """503; after `wait` s it may succeed."""
    return Refused(503, sentence, ("Retry-After", str(wait)))


def refusal(refused: Refused) -> Answer:
    return Answer(refused.status, encode({"error": refused.sentence}).encode() + b"\n", headers=refused.headers)


TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(rf'({TOKEN}) (/[!"$-~]*) HTTP/([0-9])\.([0-9])')  # without a fragment
LEAK = re.compile("abt_[0-9a-f]{8}_")  # the beginning of a token
FIELD = re.compile(rf"({TOKEN}):([\t -~\x80-\xff]*)")  # a pattern for the blanks around a value would backtrack
ONCE = {"host", "content-length", "transfer-encoding", "authorization", "idempotency-key", "expect"}


def early_check(head: bytes | bytearray) -> None:
    """Refuse a head as soon as no further byte can make it valid, instead of waiting for its deadline.

    A head that comes byte by byte is checked at each byte. Counting takes 3 us for the largest, a pattern took 1600.
    """
    start = head[:HEAD_BYTES]
    lines = start.count(b"\r\n")
    if b"\0" in start or start.count(b"\n") > lines or start.count(b"\r") - start.endswith(b"\r") > lines:
        raise Refused(400, "the head of the request is not HTTP/1.1: each line must end with CRLF")
    if len(head) > LINE_BYTES + 1 and start.find(b"\r\n", 0, LINE_BYTES + 2) < 0:
        raise Refused(414, f"the request line is longer than {LINE_BYTES} bytes: put the message in the body")
    if len(head) > HEAD_BYTES:
        raise Refused(431, f"the head of the request is larger than {HEAD_BYTES} bytes")


class Head:
    """The head of a request, checked and parsed; never changed afterwards.

    The whole head must fit one strict grammar before any of it is interpreted. If a proxy and the bus read a head
    differently, a second request can hide in the first. The parser of http.server is too lax: it takes the first of two
    Content-Length headers, ignores Transfer-Encoding, and drops every header after one that has no colon. It also takes
    45 us, which is more than the rest of a request.
    """

    def __init__(self, text: bytes) -> None:
        early_check(text)
        request_line, *lines = text[:-4].decode("latin-1").split("\r\n")
        line = REQUEST_LINE.fullmatch(request_line)
        if not line:
            raise Refused(400, "the request line must be: METHOD /path HTTP/1.1")
        if LEAK.search(unquote(line[2])):
            raise Refused(400, "a token belongs in the header Authorization, not in a URL: revoke this one")
        if line[3] != "1" or line[4] not in "01":
            raise Refused(505, "this bus speaks HTTP/1.0 and HTTP/1.1 only")
        if len(lines) > HEADERS:
            raise Refused(431, f"the request has more than {HEADERS} headers")
        self.command, self.path, self.version = line[1], line[2], f"HTTP/1.{line[4]}"
        path, _, query = self.path.partition("?")
        self.query = query
        end = path.find("/", 1) + 1
        self.route, self.rest = (path[:end], path[end:]) if end else (path, "")  # "/message/" and an id, or all of it
        self.asks = "GET" if self.command == "HEAD" else self.command, self.route  # HEAD is for the endpoint of GET
        self.fields: dict[str, str] = {}
        for text_line in lines:
            self.add_field(text_line)
        self.check_framing()
        self.host = re.sub(r":[0-9]{1,5}\Z", "", self.fields.get("host", "")).lower()  # without its port
        self.foreign, self.silent = self.is_foreign(), self.is_silent()
        self.form = self.fields.get("content-type", "").lower().startswith("multipart/")

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
        """Find where the request ends: the length of its body, and whether the connection goes on after it."""
        fields = self.fields
        if "host" not in fields and self.version == "HTTP/1.1":
            raise Refused(400, "the Host header is missing")
        if "transfer-encoding" in fields:
            if "content-length" in fields:
                raise Refused(400, "the request has Content-Length and Transfer-Encoding: send only Content-Length")
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
            raise Refused(417, "the header Expect must be 100-continue or absent")
        self.expects = "expect" in fields and self.version == "HTTP/1.1"
        options = {option.strip().lower() for option in fields.get("connection", "").split(",")}
        self.closes = "close" in options or (self.version == "HTTP/1.0" and "keep-alive" not in options)

    def opens_page(self) -> bool:
        """Does a browser show the answer as a page of its own, as after a click on a link? No script sees it then."""
        says = self.fields.get("sec-fetch-mode"), self.fields.get("sec-fetch-dest"), self.fields.get("origin")
        return says == ("navigate", "document", None)

    def is_foreign(self) -> bool:
        """Did a page of another site send this, in a browser? Such a request has an Origin, or a Sec-Fetch-Site."""
        origin, host = self.fields.get("origin"), self.fields.get("host", "")
        own = origin in (None, f"http://{host}", f"https://{host}")
        return not own or self.fields.get("sec-fetch-site", "none") not in SAME_SITE

    def is_silent(self) -> bool:
        """Does a browser not say which page sent this?

        To an http URL that is not of its own machine, it sends no Sec-Fetch-Site, and with an image no Origin. All call
        themselves Mozilla, as some programs do, and name a language. A page of another site can take neither away, nor
        add the header of our page.
        """
        browser = "accept-language" in self.fields and self.fields.get("user-agent", "").startswith("Mozilla/")
        return browser and "sec-fetch-site" not in self.fields and "x-agent-page" not in self.fields


TAKING = ("/recv", "/log", "/search", "/digest", "/message/", "/thread/")  # with GET; a read may fetch, or listen
SAME_SITE = ("same-origin", "none")  # values of Sec-Fetch-Site; none: a person typed the URL


KNOWN_HEAD = 1024  # bytes
known_head = lru_cache(1024)(Head)  # of a head up to KNOWN_HEAD: one client repeats its head: 0.2 us instead of 5
NO_HEAD = Head(b"GET / HTTP/1.0\r\n\r\n")


STRAY_PERCENT = re.compile("%(?![0-9A-Fa-f]{2})")


class Query:
    """The query string. A field that the bus reads is refused if it is given twice or has a wrong form."""

    NAMES = 64  # in one field

    def __init__(self, text: str) -> None:
        self.fields: dict[str, list[str]] = {}
        try:
            if STRAY_PERCENT.search(text):
                raise ValueError("parse_qsl would let it pass")
            pairs = parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=HEADERS)
        except ValueError:
            raise Refused(400, f"the query must be UTF-8, percent-encoded, at most {HEADERS} fields") from None
        for field, value in pairs:
            if "\0" in field + value:
                raise Refused(400, "the query has a NUL character")
            self.fields.setdefault(field, []).append(value)

    @classmethod
    def of_members(cls, members: dict[str, Any]) -> Query:
        """The members of a small JSON object, as if they had come in a query."""
        query = cls("")
        query.fields = {member: [value if isinstance(value, str) else encode(value)]
                        for member, value in members.items() if value is not None}  # fmt: skip
        return query

    def one(self, field: str) -> str | None:
        values = self.fields.get(field, [None])
        if len(values) > 1:
            raise Refused(400, f"{field} is given twice")
        return values[0]

    def names(self, field: str) -> tuple[str, ...]:
        """Names given as a=x&a=y or as a=x,y."""
        parts = [part for value in self.fields.get(field, []) for part in value.split(",")]
        if len(parts) > self.NAMES:
            raise Refused(400, f"{field} has {len(parts)} names, and {self.NAMES} are the most: ask several times")
        return tuple(dict.fromkeys(name(part, field) for part in parts))

    def name(self, field: str, default: str | None) -> str | None:
        value = self.one(field)
        return default if value is None or (not value and field == "channel") else name(value, field)

    def number(self, field: str, default: float, low: float, high: float) -> float:
        value = self.one(field)
        if value is None:
            return default
        if not re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", value):
            raise Refused(400, f"{field} must be a number")
        return min(max(float(value), low), high)

    def flag(self, field: str) -> bool | None:
        value = self.one(field)
        word = value and value.lower()
        if word not in (None, "true", "false", "1", "0"):
            raise Refused(400, f"{field} must be true or false")
        return None if word is None else word in ("true", "1")

    def id(self) -> int:
        tick = tick_of(self.one("id"))
        if tick is None:
            raise Refused(400, "id must be the id of a message, like 660ba678a1b40")
        return tick

    def needed(self, field: str) -> str:
        value = self.one(field)
        if not value:
            raise Refused(400, f"{field} is missing")
        return value


known_query = lru_cache(8)(Query)  # one request asks for it several times


# ── Connection ───────────────────────────────────────────────────────────────────────────────────────────────────────
# A Connection turns the bytes of one socket into requests; it has one phase and one deadline. A Listener accepts
# connections, the Door lists the open ones, Plain and Tls read and write bytes, and the App answers the requests. To
# let something new wait on a connection, see Phase and App; to take a body in pieces, see Sink.

HEAD_SECONDS = BODY_SECONDS = 10.0  # for a whole head; for a whole body, plus its size at BODY_RATE
BODY_RATE = 8192  # bytes per second; a slower body is 408
ANSWER_SECONDS = 30.0  # for the peer to read an answer, plus its size at BODY_RATE; then the socket is aborted
IDLE_SECONDS = 75.0  # between two requests; above HOLD_MAX, so a pooled connection outlives a poll on another one
LINGER_SECONDS = 1.5  # we read on for so long after the last answer: closing on unread bytes resets the connection
STRANGERS = 256  # connections that have not finished a first request; the oldest goes first


class Phase(enum.Enum):
    """What a connection waits for. Each phase has one deadline; Connection.late is called when it passes."""

    IDLE = "the first byte of a request"
    HEAD = "the rest of a head"
    BODY = "the rest of a body"
    BUSY = "a commit"
    PARKED = "a message"
    WRITING = "the peer, to read its answer"
    LINGER = "the peer, to close"


IDLE, HEAD, BODY, BUSY, PARKED, WRITING, LINGER = Phase  # a look-up in the class takes 0.08 us, a dozen times a request
READING = IDLE, HEAD, BODY


class Sink(Protocol):
    """Takes a body in pieces, if the body is too large for memory."""

    missing: int  # bytes
    busy: bool  # a thread writes

    def write(self, data: bytes) -> int:
        """In a thread: write a piece; returns how many bytes of it were written."""

    def wrote(self, written: Any, size: int) -> None:
        """In a turn: the result of write() for `size` bytes, or its exception. Refused if not all was written."""

    def far_enough(self) -> bool:
        """Have BODY_SECONDS * BODY_RATE bytes arrived since the last call that returned True?"""

    def offset(self) -> tuple[tuple[str, str]]:
        """The header that says how many bytes have arrived."""

    def close(self) -> None:
        """The request is answered, or its connection has gone."""


class App(Protocol):
    """The methods of the Bus that connections call. They are called in a turn and never wait."""

    draining: bool  # the bus is shutting down

    def admit(self, request: Request) -> None:
        """A head has arrived. Raise Refused, or set the request's grant, endpoint and, for a body in pieces, sink."""

    def answer(self, request: Request) -> Answer | None:
        """A request has arrived. None if its answer comes later, through Connection.answer."""

    def over(self, connection: Connection) -> Answer | None:
        """The hold of a parked connection has passed, or its peer sends no more."""

    def left(self, connection: Any) -> None:
        """A parked connection broke."""

    def delivered(self, reader: Any, tick: int) -> None:
        """An answer with `delivers` was written out whole."""

    def lost(self, reader: Any, tick: int) -> None:
        """An answer with `delivers` was not written out whole: the connection broke, or too many answers are unread."""

    def check_token(self, token: str) -> None:
        """Refused, if this token was revoked."""

    def answered(self, connection: Any, answer: Answer) -> None:
        """An answer is about to be written; for figures and for the log of requests."""


class Request:
    """One HTTP request in memory, and what the App found out about it."""

    METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE")
    grant: Grant
    parsed: Head
    endpoint: Any  # the Route of the App
    body, command = b"", "-"
    sink: Sink | None = None
    reader = ""  # the name it reads; several readers of one owner have limits of their own

    def __init__(self, peer: Connection, head: bytes) -> None:
        self.peer, self.head = peer, head

    def line(self) -> str:
        """For the log of requests, which must not show a token, and no control character of a malformed line."""
        line = self.head.partition(b"\r\n")[0].decode("latin-1")
        leaks = LEAK.search(unquote(line))
        return ascii(f"{line.partition(' ')[0]} (a token in a URL)" if leaks else line or "-")[1:-1]

    def parse_head(self) -> None:
        """Check the head and take it apart, or raise Refused."""
        try:
            head = self.parsed = known_head(self.head) if len(self.head) <= KNOWN_HEAD else Head(self.head)
        except Refused:
            self.command = self.line().partition(" ")[0]  # no answer to HEAD has a body, not even this one
            raise
        self.command, self.fields, self.route = head.command, head.fields, head.route

    def answer(self, token: str = "") -> Answer | None:
        """The answer; None if it comes later. An unexpected error is 500, and costs this connection only.

        A `token` is checked again: it may have been revoked since the head came.
        """
        try:
            if token:
                self.peer.door.app.check_token(token)
            return self.peer.door.app.answer(self)
        except Refused as refused:
            return refusal(refused)
        except Exception as error:
            if getattr(error, "errno", 0) in (errno.EMFILE, errno.ENFILE):
                return refusal(unavailable("the bus has no file descriptor left: try again", 2))
            say_exception(error)
            self.peer.closing = True
            return refusal(our_fault())

    def log(self, answer: Answer) -> None:
        at = time.strftime("%d/%b/%Y %H:%M:%S")
        say(f'{self.peer.address} [{at}] "{self.line()}" {answer.status} {len(answer.body)}')

    def query(self) -> Query:
        return known_query(self.parsed.query)

    def members(self) -> Query:
        """The members of a small request: those of its JSON body, or those of its query."""
        if not self.body:
            return self.query()
        value = parse_json(self.body)
        if not isinstance(value, dict):
            raise Refused(400, "the body must be a JSON object")
        return Query.of_members(value)

    def is_large(self) -> bool:
        """A request that is not large has few bytes, and shares its parsed head with many requests."""
        return len(self.head) + len(self.body) > KNOWN_HEAD

    def shrink(self) -> None:
        """It waits for a commit: keep what its answer and the log need, and no headers and no body."""
        self.body, self.fields, self.parsed = b"", {}, NO_HEAD
        self.head = self.head[:KNOWN_HEAD].partition(b"\r\n")[0]

    def owner(self) -> str:
        """Whose limits this request counts for: those of a token, or of an address."""
        return self.grant.token or self.peer.address

    def plain(self) -> bool:
        """Does the client want text?"""
        return self.fields.get("accept", "").startswith("text/plain")


class Deadlines:
    """The deadline of each connection. Used by the loop only; the clock is passed in.

    Each connection is in a slot: the tenth of a second in which its deadline lies. If the deadline moves to a later
    time, the connection stays in its slot, and moves on when that slot is due. So a request that is answered in time,
    as most are, costs nothing here.
    """

    SLOT = 0.1  # s; a hold ends at most this much late

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.slots: dict[int, set[Connection]] = {}
        self.order: list[int] = []

    def set(self, connection: Any, patience: float) -> None:
        connection.due = self.clock() + patience
        if connection.due < (connection.slot - 1) * self.SLOT:
            self.forget(connection)
            self._file(connection)

    def forget(self, connection: Connection) -> None:
        if connection.slot < sys.maxsize:
            self.slots[connection.slot].discard(connection)
            connection.slot = sys.maxsize

    def _file(self, connection: Connection) -> None:
        """Put it into a slot above due / SLOT: rounded down, that could lie in the past, and late() would never end."""
        slot = connection.slot = int(connection.due / self.SLOT) + 1
        if slot not in self.slots:
            self.slots[slot] = set()
            heapq.heappush(self.order, slot)
        self.slots[slot].add(connection)

    def overdue(self) -> bool:
        return bool(self.order) and self.order[0] * self.SLOT <= self.clock()

    def late(self) -> Iterator[Connection]:
        """Every connection whose deadline has passed, once. Who takes only some of them finds the others next time."""
        while self.overdue():
            slot = self.slots[self.order[0]]
            while slot:
                connection = slot.pop()
                connection.slot = sys.maxsize
                if connection.due <= self.clock():
                    yield connection
                elif connection.due < math.inf:
                    self._file(connection)
            del self.slots[heapq.heappop(self.order)]


class Shares:
    """Bytes that the bus holds for its peers: limited in all, and for each owner."""

    def __init__(self, most: float, most_each: float) -> None:
        self.most, self.most_each = most, most_each
        self.held: Counter[str] = Counter()  # by owner
        self.all = 0

    def add(self, owner: str, size: int) -> None:
        self.all += size
        self.held[owner] += size
        if not self.held[owner]:
            del self.held[owner]

    def is_full(self, owner: str, size: int, kept: int = 0) -> bool:
        """Would so many more bytes exceed a limit? Never if nothing else is held. So many are `kept` for others."""
        each = self.held[owner]
        return bool(self.all and self.all + size > self.most - kept) or bool(each and each + size > self.most_each)


class Held(Shares):
    """Bytes of requests that have not arrived whole, or that wait behind another one, by connection.

    Beyond the limit the owner that has most gives up its oldest connection.
    """

    def __init__(self, most: int) -> None:
        super().__init__(most, math.inf)
        self.of: OrderedDict[Connection, tuple[str, int]] = OrderedDict()  # owner, and bytes; oldest first

    def hold(self, connection: Any, size: int) -> None:
        """From now on there are so many bytes for this connection."""
        if not size and connection not in self.of:
            return
        owner, before = self.of.get(connection) or (connection.owner(), 0)
        self.add(owner, size - before)
        self.of[connection] = owner, size
        if not size:
            del self.of[connection]
        while self.all > self.most:
            most = max(self.held, key=self.held.__getitem__)  # the owner
            oldest = next(each for each, (its, _) in self.of.items() if its == most)
            self.hold(oldest, 0)
            oldest.soon(oldest.give_up)


class Door:
    """All open connections, and the state that they share. Used by the loop only."""

    # Bytes of answers that peers have not read: in all, for one owner, and those of all that only tokens may have
    UNSENT, UNSENT_EACH, KEPT = 64 << 20, 16 << 20, 32 << 20
    SMALL = 4096  # bytes; an answer up to this size is always written
    BODIES = 128 << 20  # bytes of large bodies that have not arrived whole
    EARLY = 16 << 20  # bytes of all else that was read before its time: parts of heads and bodies, pipelined requests
    CROWD = 32  # connections of who has most that are closed at once, if no descriptor is left
    LONG, SLOW_FOR = 0.002, 0.1  # s that a request may take until those of its token take turns; how long they do

    def __init__(self, app: App, loop: Loop) -> None:
        self.app, self.loop = app, loop
        self.deadlines = Deadlines(time.monotonic)
        self.connections: set[Connection] = set()
        self.strangers: dict[Connection, None] = {}  # those that have not finished a first request, oldest first
        self.unsent = Shares(self.UNSENT, self.UNSENT_EACH)
        # `waiting`: requests in `put_off` that are large
        self.arriving, self.early, self.waiting = Held(self.BODIES), Held(self.EARLY), Held(self.EARLY)
        self.slow: dict[str, float] = {}  # tokens, of which there are few: until when their requests take turns
        self.put_off: dict[str, deque[Connection]] = {}  # the connections with such requests, by token

    def enter(self, connection: Connection) -> None:
        self.connections.add(connection)
        self.strangers[connection] = None
        if len(self.strangers) > STRANGERS:
            oldest = next(iter(self.strangers))
            del self.strangers[oldest]
            oldest.transport.abort()

    def leave(self, connection: Connection) -> None:
        self.connections.discard(connection)
        self.strangers.pop(connection, None)
        for held in (self.arriving, self.early, self.waiting):
            held.hold(connection, 0)
        self.deadlines.forget(connection)

    def puts_off(self, connection: Connection, request: Request) -> bool:
        """If a request of this token took long a moment ago, its next ones take turns, on however many connections.

        Those with large bodies do not: these would wait too, and their owner pays for them anyway.
        """
        token, body = connection.token, len(request.body)
        if not token or self.slow.get(token, 0.0) < time.monotonic() or request.sink or body > HEAD_BYTES:
            return False
        if not self.put_off:
            self.loop.soon(self.next_put_off)
        self.put_off.setdefault(token, deque()).append(connection)
        self.waiting.hold(connection, len(request.head) + body if request.is_large() else 0)
        return True

    def next_put_off(self) -> None:
        """Serve one of them in this turn; tokens take turns, too. It may have been revoked meanwhile."""
        token = next(iter(self.put_off))
        waiting = self.put_off.pop(token)
        connection = waiting.popleft()
        while waiting and connection.phase is not BUSY:  # it has gone
            connection = waiting.popleft()
        if waiting:
            self.put_off[token] = waiting
        if self.put_off:
            self.loop.soon(self.next_put_off)
        self.waiting.hold(connection, 0)
        if connection.phase is BUSY and connection.request:
            connection.guard(partial(connection.serve, connection.request, token))

    def owe(self, connection: Outgoing, size: int) -> None:
        """Note that this many bytes of the answer are unsent now."""
        self.unsent.add(connection.owner(), size - connection.unsent)
        connection.unsent = size

    def is_full(self, connection: Outgoing, size: int, token: str = "") -> bool:
        """Would an answer of this size exceed a limit for unread answers? `token`: that of the request in its hand."""
        token = token or connection.token or ""
        return size > self.SMALL and self.unsent.is_full(token or connection.address, size, self.KEPT * (not token))

    def sweep(self) -> None:
        """Serve those whose deadline has passed. Thousands may have the same one: the rest comes in the next turn."""
        self.loop.each(Connection.late, Connection.fail, self.loop.timely(self.deadlines.late()))
        if self.deadlines.overdue() and self.sweep not in self.loop.actions:
            self.loop.soon(self.sweep)

    def drop_idle(self) -> None:
        """File descriptors have run out: close the idle connections, except those made or answered a moment ago.

        The next request of these may be under way. If none is idle, the owner with the most connections loses some:
        first those that wait for a message.
        """
        ago = self.deadlines.clock() - 1
        everybody = [each for each in self.connections if each not in self.strangers or each.due <= ago + HEAD_SECONDS]
        idle = [each for each in everybody if each.phase is IDLE and each.due < ago + IDLE_SECONDS]
        if not idle:
            [(most, _)] = Counter(map(Connection.owner, self.connections)).most_common(1) or [("", 0)]
            crowd = [each for each in everybody if each.phase is not BUSY and each.owner() == most]
            idle = sorted(crowd, key=lambda each: each.phase is not PARKED)[: self.CROWD]
        for connection in idle:
            connection.transport.abort()

    def drain(self) -> None:
        self.loop.gradually(Connection.drain, Connection.fail, iter([*self.connections]))

    def evict(self) -> None:
        """Close the connections whose tokens were revoked. Before that, no such one is told of a message."""
        self.loop.gradually(Connection.ends_if_revoked, Connection.fail, iter([*self.connections]))


class Outgoing:
    """The base of Connection: its state, and the writing of answers. Connection adds the reading of requests."""

    __slots__ = (
        "address buffer closing delivering door due ended file phase queued request slot then token transport unsent"
    ).split()
    address: str
    transport: Plain
    request: Request | None
    file: Stream | None  # the rest of the answer being written
    delivering: tuple[Any, int] | None  # `delivers` of that answer
    # An endpoint that asks others for its request takes their answers with it, and returns its own or sets it again.
    then: Callable[[Answer], Answer | None] | None

    def __init__(self, door: Door) -> None:
        self.door = door
        self.buffer: bytes | bytearray = b""
        self.phase, self.slot, self.due = IDLE, sys.maxsize, math.inf
        self.closing = self.ended = False  # we want to close after the answer; the peer sends no more
        self.request = self.delivering = self.file = self.then = None
        self.token: str | None = None  # the id of the last token that a request had; "": none had one; None: no request
        self.unsent = 0  # bytes of the answer
        self.queued = False  # advance() comes in the next turn

    def owner(self) -> str:
        """Whose limit its unread answers count for: that of a token, or of an address."""
        return self.token or self.address

    def guard(self, action: Callable[[], object]) -> None:
        """Call `action`; an exception ends this connection."""
        if not self.door.loop.attempt(action):
            self.door.loop.attempt(self.fail)

    def soon(self, action: Callable[[], object]) -> None:
        self.door.loop.soon(partial(self.guard, action))

    def fail(self) -> None:
        """Serving this connection raised an exception. If there is no memory even to say so, the connection ends."""
        if not self.door.loop.attempt(self.refuse, our_fault()):
            self.transport.abort()

    def refuse(self, refused: Refused) -> None:
        """End this connection with a refusal or, if an answer is under way already, without one."""
        if self.phase is PARKED:
            self.door.loop.attempt(self.door.app.left, self)
        if self.phase in (WRITING, LINGER):
            self.transport.abort()
        else:
            self.closing = True
            self.write(refusal(refused))

    def wait(self, phase: Phase, patience: float) -> None:
        self.phase = phase
        self.door.deadlines.set(self, patience)

    def advance(self) -> None:
        """Take the next request."""
        raise NotImplementedError

    def count(self) -> None:
        """Count what is in the buffer, except the part of a large body, which is counted whole."""
        if self.buffer or self in self.door.early.of:
            self.door.early.hold(self, 0 if self in self.door.arriving.of else len(self.buffer))

    def answer(self, answer: Answer | None) -> None:
        """Answer the current request. A request that is pipelined behind it waits for the next turn."""
        if answer and self.then and self.phase is not LINGER:
            then, self.then = self.then, None
            self.phase, self.due = BUSY, math.inf
            answer = then(answer)
        if answer and self.phase is not LINGER:  # None: it is answered later; LINGER: the peer has gone meanwhile
            self.write(answer)
            if self.phase is IDLE and (self.buffer or self.ended) and not self.queued:
                self.soon(self.go_on)
                self.queued = True

    def go_on(self) -> None:
        self.queued = False
        self.advance()

    def write(self, answer: Answer) -> None:
        door, app = self.door, self.door.app
        self.closing = self.closing or app.draining
        bare = self.request is not None and self.request.command == "HEAD"
        answer, data = self.within_memory(answer, bare)
        self.phase = WRITING
        app.answered(self, answer)
        request, self.request, self.then = self.request, None, None
        self.delivering, self.file = answer.delivers, answer.file
        if request and request.sink and not request.sink.busy:
            request.sink.close()
        if self.file and bare:
            self.file.close()
            self.file = None
        transport = self.transport
        transport.write(data)
        if transport.closing:  # the connection broke: nobody has the answer, and connection_lost comes next
            return
        if transport.unsent:
            door.owe(self, len(transport.unsent))
            self.wait(WRITING, ANSWER_SECONDS + len(answer.body) / BODY_RATE)
        elif self.file:
            self.soon(self.resume_writing)
        else:
            self.written()

    def within_memory(self, answer: Answer, bare: bool) -> tuple[Answer, bytes]:
        """The answer and its bytes; or a refusal, if too much is unread or there is no memory for these bytes."""
        try:
            if self.door.is_full(self, len(answer.body)):
                raise unread_answers()
            return answer, http_bytes(answer, bare, self.closing)
        except Refused as full:
            refused = refusal(full)
        except MemoryError as error:
            say_exception(error)
            refused = refusal(our_fault())
        if answer.delivers:
            self.door.app.lost(*answer.delivers)
        return refused, http_bytes(refused, bare, self.closing)

    def resume_writing(self) -> None:
        """The system has taken all that was written so far."""
        if self.phase is WRITING:
            self.door.owe(self, 0)
            if self.file and not self.file.busy:
                self.wait(WRITING, ANSWER_SECONDS)
                self.file.busy = True
                file = self.file
                self.door.loop.in_thread(file.read, lambda piece: self.write_piece(file, piece))
            elif not self.file:
                self.written()
                self.advance()

    def write_piece(self, file: Stream, piece: Any) -> None:
        """Write one more piece of a file."""
        file.busy = False
        if self.phase is LINGER:
            file.close()
            return
        piece = b"" if isinstance(piece, Exception) else piece
        self.closing = self.closing or not piece  # the file was cut short: the next answer must not look like the rest
        try:
            self.door.app.check_token(self.token or "")
            if self.door.is_full(self, len(piece)):
                raise unread_answers()
            self.transport.write(piece)
            self.door.owe(self, len(self.transport.unsent))
        except Refused:
            self.transport.abort()
        if not file.length or self.transport.closing or not piece:
            file.close()
            self.file = None
        if not self.transport.closing and not self.transport.unsent:
            self.soon(self.resume_writing)

    def written(self) -> None:
        """The system has taken the whole answer."""
        delivering, self.delivering = self.delivering, None
        if delivering:
            self.door.app.delivered(*delivering)
        if self.closing:
            self.hang_up()
        else:
            self.wait(IDLE, IDLE_SECONDS)
            if len(self.buffer) <= HEAD_BYTES:
                self.transport.resume_reading()

    def hang_up(self) -> None:
        """Close without losing the answer: say that we are done, then read on until the peer has closed too."""
        self.buffer = b""
        self.count()
        self.wait(LINGER, LINGER_SECONDS)
        self.transport.write_eof()
        if self.ended:
            self.transport.close()
        else:
            self.transport.resume_reading()


class Connection(Outgoing):
    """One socket, and the phase in which it is. Owned by the loop.

    IDLE -> HEAD -> BODY -> BUSY or PARKED -> WRITING -> IDLE, or -> LINGER and closed. A phase that need not wait is
    skipped: one call of data_received can read a short request and write its answer.

    Invariants: a connection has one request at a time; a pipelined request waits in `buffer` for the next turn. A call
    of answer() never leads to another one inside it. After an exception only this connection gets a 500: see Loop.
    """

    __slots__ = ()

    # Called by the transport

    def connection_made(self, transport: Plain) -> None:
        self.transport = transport
        self.address = transport.peer()
        self.wait(IDLE, HEAD_SECONDS)
        self.door.enter(self)

    def connection_lost(self) -> None:
        self.door.leave(self)
        self.door.owe(self, 0)
        if self.phase is PARKED:
            self.door.app.left(self)
        self.phase = LINGER
        if self.file and not self.file.busy:
            self.file.close()
        request, self.request, self.buffer = self.request, None, b""  # else we and our transport hold each other
        self.then = None
        if request and request.sink and not request.sink.busy:
            request.sink.close()
        if self.delivering:
            self.door.app.lost(*self.delivering)

    def data_received(self, data: bytes) -> None:
        if self.phase is LINGER:
            return
        if not self.buffer:
            self.buffer = data
        else:
            if isinstance(self.buffer, bytes):
                self.buffer = bytearray(self.buffer)
            self.buffer += data
        if self.phase in READING and not self.queued:
            self.advance()
        else:
            self.count()
        if self.phase is not BODY and len(self.buffer) > HEAD_BYTES:  # the peer pipelines faster than it is answered
            self.transport.pause_reading()

    def eof_received(self) -> None:
        """The peer sends no more. If it is parked it counts as gone, and its answer is empty: no message is lost."""
        self.ended = True
        if self.phase is PARKED:
            self.release()
        elif self.phase is LINGER:
            self.transport.close()
        else:
            self.advance()

    # Requests

    def advance(self) -> None:
        """Take one request from the buffer, if the one before is answered; the next one is for the next turn."""
        if self.phase not in READING:
            return
        try:
            request = self.take()
        except Refused as refused:  # the head or the body was not HTTP; the bytes after it could be anything
            self.refuse(refused)
            return
        finally:
            self.count()
        if request is None:
            if not self.pouring():
                self.transport.resume_reading()
            return
        self.phase, self.due = BUSY, math.inf  # a commit has no deadline
        self.closing = request.parsed.closes
        self.door.strangers.pop(self, None)
        if not self.door.puts_off(self, request):
            self.serve(request)

    def serve(self, request: Request, token: str = "") -> None:
        """Answer the request that was taken from the buffer, and note if that takes long. `token`: it was put off."""
        began = time.monotonic()
        answer = request.answer(token)
        if answer:
            self.answer(answer)
        if self.token and time.monotonic() - began > self.door.LONG:
            self.door.slow[self.token] = time.monotonic() + self.door.SLOW_FOR

    def take(self) -> Request | None:
        """The next whole request; None if it has not arrived yet."""
        if self.request is None:
            end = self.buffer.find(b"\r\n\r\n", 0, HEAD_BYTES) + 4
            if end < 4:
                self.want_head()
                return None
            self.take_head(end)
        request = self.request
        assert request
        length = request.parsed.length
        if request.sink:
            return request if self.pour(request.sink) else None
        if len(self.buffer) < length:
            if self.ended:
                raise Refused(400, f"the body ended after {len(self.buffer)} of {length} bytes; nothing was stored")
            if self.phase is not BODY:
                self.wait(BODY, BODY_SECONDS + length / BODY_RATE)
                if length > HEAD_BYTES:  # any connection may have as much in its buffer
                    self.door.arriving.hold(self, length)
            return None
        if self.phase is BODY:
            self.door.arriving.hold(self, 0)
        request.body, self.buffer = bytes(self.buffer[:length]), self.buffer[length:]
        return request

    def take_head(self, end: int) -> None:
        request = self.request = Request(self, bytes(self.buffer[:end]))
        self.buffer = self.buffer[end:]
        request.parse_head()
        self.door.app.admit(request)
        self.token = request.grant.token or self.token or ""  # GET /healthz has none, and the connection stays its
        if self.token or request.sink:  # its body may take minutes, and strangers must not push it out
            self.door.strangers.pop(self, None)
        if request.parsed.expects and len(self.buffer) < request.parsed.length:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def pour(self, sink: Sink) -> bool:
        """Hand the bytes that arrived to the sink; true if the body is complete. A body below BODY_RATE gets 408."""
        part = b"" if sink.busy else bytes(self.buffer[: sink.missing])
        if part:
            self.buffer = self.buffer[len(part) :]
            sink.busy = True
            self.transport.pause_reading()
            self.door.loop.in_thread(partial(sink.write, part), lambda written: self.poured(sink, written, len(part)))
        elif not sink.missing:
            return True
        elif self.ended and not sink.busy:
            raise Refused(400, f"the file ended {sink.missing} bytes early; send the rest", *sink.offset())
        if self.phase is not BODY:
            self.wait(BODY, BODY_SECONDS)
        return False

    def pouring(self) -> bool:
        """Is a thread writing a piece of the body?"""
        return bool(self.request and self.request.sink and self.request.sink.busy)

    def poured(self, sink: Sink, written: Any, size: int) -> None:
        """The sink wrote a piece of `size` bytes, perhaps in part, or failed: `written` is then an exception."""
        sink.busy = False
        gone = self.request is None or self.request.sink is not sink  # it was answered, or the connection broke
        if gone:
            sink.close()
        try:
            sink.wrote(written, size)
            if gone:
                return
            self.door.app.check_token(self.token or "")
        except Refused as refused:
            if not gone:
                self.refuse(refused)
            return
        if sink.far_enough():
            self.wait(BODY, BODY_SECONDS)
        self.transport.resume_reading()
        self.guard(self.advance)

    def want_head(self) -> None:
        if not self.buffer:
            if self.ended or self.door.app.draining:
                self.hang_up()
            return
        early_check(self.buffer)
        if self.ended:
            raise Refused(400, "the request ended before the empty line after its headers")
        if self.phase is not HEAD:  # an absolute deadline: a byte now and then does not extend it
            self.wait(HEAD, HEAD_SECONDS)

    # Ends

    def give_up(self) -> None:
        """Too many bytes of requests wait, and its owner has most: drop these, and close when this one is answered."""
        self.closing, self.buffer = True, b""
        refused = Refused(408, "too many requests of yours have begun: finish one before you begin the next")
        if self.phase in READING:
            self.stop_waiting(refused)
        elif self in self.door.put_off.get(self.token or "", ()):
            self.refuse(refused)

    def release(self) -> None:
        self.answer(self.door.app.over(self))

    def drain(self) -> None:
        """The bus is shutting down."""
        self.stop_waiting(shutting_down())

    def stop_waiting(self, refused: Refused) -> None:
        """Answer a parked request, refuse one that has not arrived whole, or close a connection without a request."""
        if self.phase is PARKED:
            self.release()
        elif self.phase is IDLE:
            self.hang_up()
        elif self.phase in READING:
            self.refuse(refused)

    def ends_if_revoked(self) -> bool:
        """True if its token was revoked: it is ended then. In BUSY, Bus.entitled() and Bus.park() check it instead."""
        waits = self.phase in (BODY, PARKED)
        if self.token is None or not (waits or (self.token and self.phase in (IDLE, HEAD, WRITING))):
            return False
        try:
            self.door.app.check_token(self.token)
        except Refused as refused:
            if self.phase is IDLE:
                self.hang_up()
            else:
                self.refuse(refused)
            return True
        return False

    def late(self) -> None:
        """The deadline of this phase has passed."""
        if self.phase in (WRITING, LINGER):
            self.transport.abort()
        elif self.pouring():
            self.wait(BODY, BODY_SECONDS)  # it is our disk that is slow
        else:
            self.stop_waiting(Refused(408, f"the request took too long: the bus waited for {self.phase.value}"))


def unread_answers() -> Refused:
    return unavailable("read the answers to your earlier requests first", 5)


def our_fault() -> Refused:
    return Refused(500, "the bus failed on this request; the log of the bus says why")


def shutting_down() -> Refused:
    return unavailable("the bus is shutting down: send again in a second", 1)


class Plain:
    """Reads and writes a TCP connection: those methods of an asyncio transport that Connection uses.

    asyncio's own transport takes 1.0 to 1.8 KB more for each parked reader, and a new buffer of 256 KiB for each read.
    """

    __slots__ = ("closing", "events", "loop", "protocol", "sock", "unsent")
    READ = 16384  # bytes; the largest that malloc takes from its heap without asking the system each time
    RETRY = 0.05  # s until it reads again, if there was no memory for that
    BLOCKED = BlockingIOError, InterruptedError

    def __init__(self, loop: Loop, sock: socket.socket, protocol: Connection) -> None:
        self.loop, self.sock, self.protocol = loop, sock, protocol
        self.unsent = b""
        self.events = 0  # that we wait for
        self.closing = False

    def begin(self) -> None:
        self.protocol.connection_made(self)
        self.resume_reading()

    def peer(self) -> str:
        """The address of the other end."""
        try:
            name = self.sock.getpeername()
            address = str(name[0]) if isinstance(name, tuple) else "local"  # a Unix socket
            return sys.intern(address[7:] if address.startswith("::ffff:") else address)  # many come from one host
        except OSError:  # it has gone again
            return "?"

    def resume_reading(self) -> None:
        if not self.closing and not self.events & selectors.EVENT_READ:
            self.loop.watch(self, self.events | selectors.EVENT_READ)

    def pause_reading(self) -> None:
        self.loop.watch(self, self.events & ~selectors.EVENT_READ)

    def ready(self, events: int) -> None:
        """Some events have come. We may have closed, or stopped watching for them, earlier in the same turn."""
        if events & self.events & selectors.EVENT_WRITE:
            self.write_on()
        if events & self.events & selectors.EVENT_READ:
            self.read()

    def failed(self) -> None:
        self.protocol.fail()

    def read(self) -> None:
        try:
            data = self.sock.recv(self.READ)
        except self.BLOCKED:
            return
        except MemoryError:  # the bytes stay where they are
            self.pause_reading()
            self.loop.later(self.RETRY, self.resume_reading)
            return
        except OSError:
            self.abort()
            return
        self.received(data)

    def received(self, data: bytes) -> None:
        if data:
            self.protocol.data_received(data)
        else:
            self.pause_reading()
            self.protocol.eof_received()

    def write(self, data: bytes) -> None:
        if self.closing or not data:
            return
        if self.unsent:
            self.unsent += data
            return
        sent = self.send(data)
        if sent < len(data) and not self.closing:
            self.unsent = data[sent:]
            self.loop.watch(self, self.events | selectors.EVENT_WRITE)

    def write_on(self) -> None:
        self.unsent = self.unsent[self.send(self.unsent) :]
        if not self.unsent and self.events:
            self.loop.watch(self, self.events & ~selectors.EVENT_WRITE)
            if self.closing:
                self.end()
            else:
                self.protocol.resume_writing()

    def send(self, data: bytes) -> int:
        """Returns how many bytes the system took."""
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
        """Write what is left, then close."""
        if not self.closing:
            self.closing = True
            self.pause_reading()
            if not self.unsent:
                self.loop.soon(self.end)

    def abort(self) -> None:
        if self.sock.fileno() >= 0:
            self.closing = True
            self.loop.watch(self, 0)
            self.unsent = b""
            self.loop.soon(self.end)

    def end(self) -> None:
        if self.sock.fileno() >= 0:
            self.sock.close()
            self.protocol.connection_lost()


class Tls(Plain):
    """Plain with TLS between. OpenSSL gets one record of the peer at a time.

    By itself it reads on while records come, although they have no data (new keys, attempts to renegotiate): 1.6 MB of
    them held up the whole bus for 4 s.
    """

    __slots__ = ("coming", "dry", "going", "queued", "raw", "tls")
    LARGEST, DRY = 18437, 32  # bytes of a record; records without data, of one connection: a handshake has about five

    def __init__(self, loop: Loop, sock: socket.socket, protocol: Connection, context: ssl.SSLContext) -> None:
        super().__init__(loop, sock, protocol)
        self.coming, self.going, self.raw, self.dry = ssl.MemoryBIO(), ssl.MemoryBIO(), b"", 0
        self.tls, self.queued = context.wrap_bio(self.coming, self.going, server_side=True), False

    def resume_reading(self) -> None:
        super().resume_reading()
        if self.first() and not self.queued:
            self.queued = True
            self.protocol.soon(self.read_on)

    def read_on(self) -> None:
        self.queued = False
        if self.events & selectors.EVENT_READ:
            self.read()

    def read(self) -> None:
        self.open_record() if self.first() else super().read()

    def received(self, data: bytes) -> None:
        data = b"" if self.protocol.ended else data  # OpenSSL would keep what comes after the end
        self.raw += data
        self.open_record() if data else super().received(data)

    def open_record(self) -> None:
        """Open one record, if all of it is here. The next one is for the next turn."""
        size, data = self.first(), None
        if not size:
            return
        self.coming.write(self.raw[:size])
        self.raw, self.dry = self.raw[size:], self.dry + 1
        try:
            data = self.tls.read(self.READ)  # nothing: the peer has said that it is done
            self.dry -= 1
        except OSError as error:
            if not isinstance(error, ssl.SSLWantReadError) or self.dry > self.DRY:
                self.loop.soon(self.abort)
        super().write(self.going.read())
        if data is not None:
            super().received(data)
        if self.events & selectors.EVENT_READ:
            self.resume_reading()

    def first(self) -> int:
        """The size of the first record, if all of it is here. What is no record goes to OpenSSL, which refuses it."""
        size = 5 + int.from_bytes(self.raw[3:5], "big")
        if self.raw[:1] not in b"\x14\x15\x16\x17" or size > self.LARGEST:
            return len(self.raw)
        return size if size <= len(self.raw) else 0

    def write(self, data: bytes) -> None:
        sealed = []
        try:
            for at in range(0, len(data), self.READ):  # in parts: `going` keeps as much memory as it ever had bytes
                self.tls.write(data[at : at + self.READ])
                sealed.append(self.going.read())
            super().write(b"".join(sealed))
        except OSError:  # there is no TLS yet, or no more
            self.abort()

    def write_eof(self) -> None:
        with contextlib.suppress(OSError):
            self.tls.unwrap()  # makes the bytes that say that we are done; it raises, as the peer has not said it yet
        super().write(self.going.read())
        super().write_eof()


class Listener:
    """Accepts connections on one socket. If file descriptors run out, it pauses for RETRY (else it takes 98 % CPU)."""

    SEND_BYTES = 262144  # of an answer that the system may hold for a peer
    RETRY = 0.05  # s
    AT_ONCE = 32  # in one turn; a request is read a turn later, and must not be dropped as a stranger before

    def __init__(self, door: Door, sock: socket.socket, tls: ssl.SSLContext | None) -> None:
        self.door, self.sock, self.tls = door, sock, tls
        self.events = 0
        sock.setblocking(False)
        self.open()

    def open(self) -> None:
        if self.sock.fileno() >= 0:
            self.door.loop.watch(self, selectors.EVENT_READ)

    def close(self) -> None:
        self.door.loop.watch(self, 0)
        self.sock.close()

    def ready(self, events: int) -> None:
        for _ in range(self.AT_ONCE):
            try:
                guest, _ = self.sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:  # out of descriptors, or of memory for them
                self.door.loop.later(self.RETRY, self.open)  # first: if this raises, it stays open
                self.door.loop.watch(self, 0)
                self.door.drop_idle()
                return
            if not self.door.loop.attempt(self.welcome, guest):
                guest.close()

    def failed(self) -> None:
        """The guest has gone, and the listener stays."""

    def welcome(self, guest: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the peer may have gone already; reading will tell
            guest.setblocking(False)
            guest.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.SEND_BYTES)  # else unread bytes hide there
            guest.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # last: a Unix socket has no such option
        given = self.door.loop, guest, Connection(self.door)
        transport = Tls(*given, self.tls) if self.tls else Plain(*given)
        if not self.door.loop.attempt(transport.begin):
            transport.abort()


# ── Identity ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# Which requests are admitted, what a token allows, and how much an agent may send. These decisions are made in a turn,
# from the request and from memory; only Tokens reads or writes a file. To add a right, add a member to Grant and to the
# rows that invite writes.

BEARER = re.compile(r"[Bb]earer (abt_[0-9a-f]{8})_([A-Za-z0-9_-]{43})")
TOOLS = "work log doctor doctor_way doctor_bus file outbox relay join who inbox later lock search redact".split()
CLIENTS = ["/bus_recv.py", "/bus_send.py", "/bus_listener.sh", "/agent_bus.py", *(f"/bus_{tool}.py" for tool in TOOLS)]
PUBLIC = {"/", "/healthz", "/certificate", *CLIENTS}  # open to all, because a new host begins with these


def owner_of(path: str) -> os.stat_result:
    """Who has the database that this file lies beside or, without a database, the folder."""
    database = re.sub(r"(\.(tokens|prune|restoring|front)|-wal|-shm)?(\.lock|\.new)?$", "", path)
    return os.lstat(database if os.path.lexists(database) else pathlib.Path(path).parent)


def give_to_owner(file: int | str, path: str) -> None:
    """Give a file that root makes beside a database to the owner of that: the server must be able to use it."""
    if os.geteuid() == 0:
        owner = owner_of(path)
        os.chown(file, owner.st_uid, owner.st_gid, follow_symlinks=isinstance(file, int))


def no_link(path: str) -> int:
    """O_NOFOLLOW where another user may have left a link, which would lead us to what that user may not have; or 0."""
    folder = os.stat(pathlib.Path(path).parent)
    return os.O_NOFOLLOW if folder.st_uid not in (0, os.geteuid()) or folder.st_mode & 0o022 else 0


def check_is_no_link(path: str) -> None:
    if no_link(path) and os.path.islink(path):
        raise Planted(f"{path} is a link where other users may write: put the file that it leads to in its place")


def in_the_way(path: str) -> str:
    """Why a file cannot be opened or written, as far as the names and the permissions tell; else empty."""
    file = pathlib.Path(os.path.abspath(path))
    found = [f"{at} is a file, not a folder" for at in file.parents if os.path.exists(at) and not os.path.isdir(at)]
    there = next(filter(os.path.exists, file.parents))  # as far as we may look
    shut = (each for each in (file, there) if os.path.exists(each) and not os.access(each, os.W_OK))
    found += map("you may not write {}".format, shut)
    return f"{found[0]}; --db gives another place" if found else ""


def unwritable(path: str, error: Exception) -> str:
    """Why a file could not be opened or written, in words: what is in its way or, without that, the error."""
    return in_the_way(path) or str(getattr(error, "strerror", None) or error)


@contextlib.contextmanager
def or_unusable(what: str, why: Callable[..., object] = attrgetter("strerror"), fault: Any = OSError) -> Iterator[None]:
    """Unusable, if an error of these kinds is raised: what could not be done, and the words for the error."""
    try:
        yield
    except fault as error:
        raise Unusable(f"{what}: {why(error)}") from None


def check_owner(its: os.stat_result, path: str) -> None:
    """Planted, unless this is a plain file of a user who may say what lies beside the database."""
    folder = os.stat(pathlib.Path(path).parent)
    if not stat.S_ISREG(its.st_mode) or its.st_uid not in (0, os.geteuid(), owner_of(path).st_uid, folder.st_uid):
        whose = "of yours, of root, or of the owner of the database or its folder"
        raise Planted(f"{path} is no plain file {whose}: find out who made it; remove it, or chown it to one of these")


def opened_beside(path: str) -> IO[bytes]:
    """Open a file beside the database to read it, or say that another user may have put it there."""
    check_is_no_link(path)
    check_owner(os.stat(path), path)  # first: we may not be able to open it, or a pipe would hold us up
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | no_link(path)), "rb")
    check_owner(os.fstat(file.fileno()), path)  # another one may be there by now
    return file


def open_beside(path: str, how: int = 0) -> IO[str]:
    """Open a file beside the database; make it if there is none. Never follow a link that another user left there."""
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    is_new = not os.path.lexists(path)
    if not is_new:
        check_owner(os.lstat(path), path)
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | how, 0o600), "r+", encoding="ascii")
    if is_new:
        give_to_owner(file.fileno(), path)
    check_owner(os.fstat(file.fileno()), path)  # another one may be there by now
    return file


@contextlib.contextmanager
def written_anew(path: str) -> Iterator[IO[str]]:
    """Write a file beside the database. A reader gets the whole old file or the whole new one, never a part."""
    pathlib.Path(f"{path}.new").unlink(missing_ok=True)  # else it would stay whose it is
    with open_beside(f"{path}.new", os.O_EXCL) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.new", path)
    keep_names(path)


def write_out(folder: int) -> None:
    """The names in this open folder stay after a power cut, unless its file system cannot do that (CIFS, 9p)."""
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def keep_names(path: str) -> None:
    """What was renamed or removed beside this file stays so after a power cut."""
    folder = os.open(pathlib.Path(path).absolute().parent, os.O_RDONLY)
    try:
        write_out(folder)
    finally:
        os.close(folder)


Row = dict[str, Any]  # of one token, as the file has it


class Token(NamedTuple):
    """A token that was not revoked."""

    hash: str  # sha256 of its secret
    grant: Grant
    ends: float  # when it expires, s since 1970

    @classmethod
    def of(cls, row: Row) -> Token:
        grant = Grant(row["id"], *(row[field] for field in Grant._fields[1:]))
        return cls(row["hash"], grant, row.get("expires") or math.inf)


NOBODY = Token("0" * 64, OPEN, 0)  # compared when the id is unknown, so that both refusals take equally long


class Tokens:
    """The tokens of a bus. DATABASE.tokens has a line of JSON for each, with the sha256 of its secret and its rights.

    The commands replace the file; the server reads it again when it has changed. A token is `abt_`, 8 hex digits of id,
    and 256 random bits. Revoked and expired tokens stay in the file: a bus that once had a token is never open again.
    """

    def __init__(self, database: str, clock: Callable[[], float] = lambda: time.time()) -> None:
        self.path, self.clock = f"{database}.tokens", clock
        self.closed, self.first = False, math.inf  # and when the first token was made, s since 1970
        self.valid: dict[str, Token] = {}  # by id
        self.expired: dict[str, Token] = {}
        self.since, self.until = -math.inf, math.inf  # between these times no token expires; s since 1970, as all here
        self.named: dict[str, list[Grant]] = {}  # of the valid ones, by name
        self.used: dict[str, int] = {}  # token: s since 1970; since they were last saved
        # A descriptor that is given up to read the file: peers may have used up all others.
        self.spare = open(os.devnull)  # noqa: SIM115
        self.stamp = self.told = self.look()
        self.changed = False  # and the connections were not looked at since
        self.load()

    def rows(self) -> list[Row]:
        try:
            self.spare.close()
            with opened_beside(self.path) as file:
                if rows := [json.loads(line) for line in file]:
                    return rows
            raise ValueError("it is empty: put a copy of it there, or remove it, which opens the bus to everybody")
        except (FileNotFoundError, NotADirectoryError):
            return []
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise Unusable(f"cannot read the tokens in {self.path}: {why}") from None
        finally:
            with contextlib.suppress(OSError):  # another thread has taken the descriptor; the next look needs one
                self.spare = open(os.devnull)  # noqa: SIM115

    def look(self) -> tuple[int, ...]:
        """Numbers that change when the file is replaced, or when its owner or permissions change."""
        with contextlib.suppress(OSError):
            status = os.stat(self.path)
            return status.st_ino, status.st_ctime_ns, status.st_size
        return ()

    def refresh(self) -> bool:
        """Read the file again if it has changed, or if a token has expired; returns whether that was so.

        An unreadable file does not open the bus.
        """
        stamp = self.look()
        if stamp == self.stamp and self.since <= self.clock() < self.until:
            return False
        try:
            self.load()
        except Unusable as error:  # it is tried again at each look
            self.closed = self.closed or not isinstance(error, Planted)
            if stamp != self.told:
                say(f"bus_server: {error}; keeping the tokens that were read before")
            self.told = stamp
            return False
        self.stamp, self.changed = stamp, True
        return True

    def load(self) -> None:
        rows, now = self.rows(), self.clock()
        self.closed = self.closed or bool(rows)
        try:
            self.first = min((row["made"] for row in rows), default=math.inf)
            kept = {row["id"]: Token.of(row) for row in rows if not row["revoked"]}
            self.valid = {id: token for id, token in kept.items() if token.ends > now}
        except (KeyError, TypeError):
            raise Unusable(f"cannot read the tokens in {self.path}: a line in it is not a token") from None
        self.expired = {id: token for id, token in kept.items() if id not in self.valid}
        self.since = max((token.ends for token in self.expired.values()), default=-math.inf)  # the clock may step back
        self.until = min((token.ends for token in self.valid.values()), default=math.inf)
        self.named = {}
        for token in self.valid.values():
            self.named.setdefault(token.grant.name, []).append(token.grant)

    def change(self, change: Callable[[list[Row]], list[Row]]) -> None:
        """Write the file anew, one command at a time."""
        failed = f"cannot write the tokens in {self.path}"
        with or_unusable(failed, partial(unwritable, self.path)), open_beside(f"{self.path}.lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if rows := change(self.rows()):
                with written_anew(self.path) as file:
                    file.writelines(f"{encode(row)}\n" for row in rows)
            else:  # the first one is taken back
                pathlib.Path(self.path).unlink(missing_ok=True)
                keep_names(self.path)
        time.sleep(2 * Deadlines.SLOT)  # until a running server has looked

    def grant(self, authorization: str) -> Grant:
        """What this Authorization header allows, or 401."""
        token, digest = presented(authorization[:99])  # longer ones are no token, and the cache stays small
        known = self.valid.get(token, NOBODY)
        if hmac.compare_digest(digest, known.hash):
            self.used[token] = int(self.clock())
            return known.grant
        if self.refresh():  # it may have been made a moment ago
            return self.grant(authorization)
        known = self.expired.get(token, NOBODY)
        raise unauthorized(known.ends if hmac.compare_digest(digest, known.hash) else 0, bool(authorization))


@lru_cache(1024)  # each client shows the same each time: 0.1 us, not 2
def presented(authorization: str) -> tuple[str, str]:
    """The id of a token, and the sha256 of its secret. Without a token in the header: "" and the sha256 of ""."""
    match = BEARER.fullmatch(authorization)
    token, secret = (match[1], match[2]) if match else ("", "")
    return token, hashlib.sha256(secret.encode()).hexdigest()


def unauthorized(expired: float, shown: bool) -> Refused:
    """401. `expired`: when the token of this request expired; 0 if it did not. `shown`: it had a token at all."""
    wrong = "this bus does not accept this token, which is wrong, cut off or revoked"
    why = wrong if shown else "this bus needs a token"
    why = f"this token expired at {iso(int(expired) * 1000000)}" if expired else why
    advice = "set AGENT_BUS_TOKEN (curl: -H 'Authorization: Bearer TOKEN') to one made on the machine of the bus by"
    return Refused(401, f"{why}: {advice} {called('invite')} NAME", ("WWW-Authenticate", "Bearer"))


class Gate:
    """Decides from the head of a request, before its body is read, whether the request is admitted.

    A web page of another site can send requests to a bus on localhost. Such a request has the Origin of the page, or
    says that it is cross-site. If the name of the page was rebound to 127.0.0.1, the Host header has that name.
    """

    def __init__(self, tokens: Tokens, hosts: Iterable[str]) -> None:
        self.tokens = tokens
        self.hosts = {"localhost", *(host.lower() for host in hosts)}
        self.public = set(PUBLIC)
        self.pages: set[str] = set()  # paths to which a link on another site may lead
        self.until = math.inf  # monotonic clock, s; then a front that cannot reach its ledger may know too little

    def holds(self, token: str) -> bool:
        """May this token be used? On a bus without tokens every request may, and its token is empty."""
        return not self.tokens.closed or token in self.tokens.valid

    def unauthorized(self, token: str) -> Refused:
        """The refusal of a token that was good when its request came."""
        return unauthorized(self.tokens.expired.get(token, NOBODY).ends, bool(token))

    def knows(self, head: Head) -> bool:
        """Does the request have a valid token, or has the bus no tokens?"""
        with contextlib.suppress(Refused):
            return not self.tokens.closed or bool(self.tokens.grant(head.fields.get("authorization", "")))
        return False

    def readers(self, mailbox: str) -> set[str] | None:
        """The names that have a token that may read the mailbox. None on a bus without tokens: everybody may."""
        known = {token.grant.name for token in self.tokens.valid.values() if token.grant.reads(mailbox)}
        return known if self.tokens.closed else None

    def may_read(self, name: str, mailbox: str) -> bool:
        """Has this name a token that may read the mailbox?"""
        return not self.tokens.closed or any(grant.reads(mailbox) for grant in self.tokens.named.get(name, ()))

    def admit(self, head: Head) -> Grant:
        if time.monotonic() > self.until and (head.route == "/healthz" or head.route not in self.public):
            why = "this bus cannot reach its ledger, so it can neither store messages nor say what is stored"
            raise unavailable(f"{why}: try again, or use another front", 2)
        if head.foreign and not (head.route in self.pages and head.opens_page()):
            raise Refused(403, "pages of other sites may not use this bus")
        if self.tokens.closed:
            return OPEN if head.route in self.public else self.tokens.grant(head.fields.get("authorization", ""))
        if head.host and head.host not in self.hosts and not ip_address(head.host.strip("[]")):
            raise Refused(403, f"this bus does not answer to {head.host}: start it with --allow-host, or with tokens")
        if head.silent and head.route in TAKING:
            raise Refused(403, "a browser that hides which page asks gets no messages here: open /ui/, or use curl")
        return OPEN


@lru_cache(256)
def ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host)
    return None


def put_newest(entries: OrderedDict[Any, Any], key: Any, value: Any, most: int) -> None:
    """Make an entry the newest; of more than `most`, the oldest is dropped.

    With a dict this would take longer each time: it walks over all the entries that were deleted before its first one.
    """
    entries[key] = value
    entries.move_to_end(key)
    if len(entries) > most:
        entries.popitem(last=False)


class Budget:
    """A limit for each owner: `burst` at once, and `rate` a second (0: no limit). The clock is passed in."""

    OWNERS = 20000  # some 300 bytes each; of more, the quietest is forgotten, and its budget is full

    def __init__(self, clock: Callable[[], float], rate: float, burst: float) -> None:
        self.clock, self.rate, self.burst = clock, rate, burst
        self.left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # what each owner has left, at which time

    def left_of(self, owner: str, now: float) -> float:
        left, before = self.left.get(owner, (self.burst, now))
        return min(self.burst, left + (now - before) * self.rate)

    def spend(self, owner: str, amount: float) -> int:
        """Spend `amount` and return 0; or return the seconds until that is possible.

        Of a full budget any amount can be spent: it is below 0 then.
        """
        if not self.rate:
            return 0
        now = self.clock()
        left = self.left_of(owner, now)
        if amount > left and left < self.burst:
            return math.ceil((min(amount, self.burst) - left) / self.rate)
        if left - amount < self.burst:  # else it needs no entry, which takes 300 bytes
            put_newest(self.left, owner, (left - amount, now), self.OWNERS)
        return 0

    def take(self, owner: str, amount: float) -> None:
        """Spend `amount`, which was not known before; the budget may go below 0."""
        now = self.clock()
        put_newest(self.left, owner, (self.left_of(owner, now) - amount, now), self.OWNERS)


class Storms:
    """Limits for runaway agents: their rates, chains of replies, and turns between two agents. Used by the loop only.

    A send above a limit gets 429 with the reason in words, because an agent that reads the reason may stop by itself.
    """

    BURST = 1000  # messages a sender may send at once, before `rate` (messages per second) holds it back
    READS, READS_BURST = 200, 2000  # requests of one reader: per second, and in one burst
    WORK, WORK_BURST = 8 << 20, 128 << 20  # bytes of large answers to one reader: the same
    WORK_SHARE = 0.07  # of the time of the loop that WORK takes
    PARSING = 4  # a byte of a request takes up to so many times as long as a byte of an answer
    ESCAPING = 4  # so does a byte of an answer as text: its invisible characters are escaped
    NAMES, NAMES_BURST = 10 / 60, 1000  # names that one owner uses for the first time: the same
    DEPTH = 32  # replies to replies; people change the subject earlier
    WITHIN = 600.0  # s in which changes of direction between two names are counted
    NOTED = 60.0  # s after which it is noted again that a sender or a pair still speaks
    SENDERS, PAIRS = 100000, 50000  # that are known at most, some 300 bytes each; the quietest is forgotten

    def __init__(self, clock: Callable[[], float], rate: float, turns: int = 120) -> None:
        self.clock = clock
        self.most_turns = turns  # changes of direction between two names; a quarter of it is a warning; 0: any
        self.sends = Budget(clock, rate, self.BURST)
        self.reads = Budget(clock, self.READS if rate else 0, self.READS_BURST)
        self.names = Budget(clock, self.NAMES if rate else 0, self.NAMES_BURST)
        self.work = Budget(clock, self.WORK if rate else 0, self.WORK_BURST)
        # By pair: who sent last, when, and the times of the changes of direction.
        self.turns: OrderedDict[tuple[str, str, str], tuple[str, float, list[float]]] = OrderedDict()
        # When each name sent last on each channel. One that is not listed, and has no mailbox there, is new.
        self.senders: OrderedDict[tuple[str, str], float] = OrderedDict()

    def read(self, owner: str, reader: str = "") -> None:
        """A request of one reader: several of them may be on one machine, and several owners may read one name."""
        wait = self.reads.spend(f"{owner}/{reader}", 1)
        if wait:
            raise too_much(f"{reader or owner} reads faster than {self.READS} times a second: wait {wait} s", wait)
        self.pay(owner, reader)

    def pay(self, owner: str, reader: str = "", work: int = 0) -> None:
        """429 if the requests of this reader took too much time; else it pays for `work`, bytes of an answer."""
        wait = self.work.spend(f"{owner}/{reader}", work)
        if wait:
            raise too_much(f"{reader or owner} makes more work than the bus has time for: wait {wait} s", wait)

    def worked(self, owner: str, reader: str, size: float) -> None:
        """An answer of `size` bytes was made."""
        if self.work.rate:
            self.work.take(f"{owner}/{reader}", size)

    @contextlib.contextmanager
    def parsing(self, owner: str, size: int) -> Iterator[None]:
        """429, or the owner pays for a large body: for its bytes and, if it takes longer than those do, for its time.

        JSON of many small parts takes up to ten times as long as other JSON.
        """
        self.pay(owner, work=size * self.PARSING)
        began = time.thread_time()
        try:
            yield
        finally:
            took = (time.thread_time() - began) / self.WORK_SHARE * self.WORK
            self.worked(owner, "", max(took - size * self.PARSING, 0))

    def name(self, owner: str, names: int) -> None:
        wait = self.names.spend(owner, names) if names else 0
        if wait:
            why = f"{owner} used over {self.NAMES_BURST} new names, and more than 10 a minute since: wait {wait} s"
            raise too_much(f"{why}, or use a name that the bus knows", wait)

    def spend(self, sender: str, messages: int) -> None:
        wait = self.sends.spend(sender, messages)
        if wait:
            raise too_much(f"{sender} sends faster than {self.sends.rate:g} messages a second: wait {wait} s", wait)

    def check(self, drafts: Sequence[Draft], each: Iterable[Way], new: Iterable[tuple[str, str]], owner: str) -> str:
        """429 for a storm; else a warning for the sender, or an empty text. `new`: channels and names of no mailbox."""
        now, warning = self.clock(), ""
        for one in drafts:
            if one.depth > self.DEPTH:
                why = f"this is reply {one.depth} in one chain, and only {self.DEPTH} are allowed: stop answering"
                raise too_much(f"{why}; for a new subject, send without reply_to", 600)
        if new:
            self.name(owner, sum(key not in self.senders for key in new))
        for channel, sender, to in each:
            if self.senders.get((channel, sender), -math.inf) < now - self.NOTED:
                put_newest(self.senders, (channel, sender), now, self.SENDERS)
            if to != EVERYONE:
                warning = self.turn(channel, sender, to, now) or warning
        return warning

    def turn(self, channel: str, sender: str, to: str, now: float, stored: bool = False) -> str:
        """A warning, or an empty text; 429 above the limit, unless it is `stored`, by another front."""
        pair = (channel, sender, to) if sender < to else (channel, to, sender)
        if not self.most_turns:
            return ""
        last, noted, turns = self.turns.get(pair) or ("", now, [])
        if last == sender and not turns and noted > now - self.NOTED:
            return ""
        while turns and turns[0] < now - self.WITHIN:
            del turns[0]
        if last not in ("", sender):
            if len(turns) >= self.most_turns and not stored:
                wait = math.ceil(turns[-self.most_turns] + self.WITHIN - now)  # fronts may have stored more
                often = f"{self.most_turns} times in {self.WITHIN / 60:g} minutes"
                raise too_much(f"{sender} and {to} have answered each other {often}: stop, or wait {wait} s", wait)
            turns.append(now)
        put_newest(self.turns, pair, (sender, now, turns), self.PAIRS)
        if len(turns) < max(self.most_turns // 4, 1):
            return ""
        often = f"{len(turns)} times in {self.WITHIN / 60:g} minutes"
        limit = f"the bus refuses more than {self.most_turns}: send only what {to} needs"
        return f"{sender} and {to} have answered each other {often}; {limit}"


# ── State ────────────────────────────────────────────────────────────────────────────────────────────────────────────
# The SQLite file, and the operations that change it. An operation is a plain value with all the data that the change
# needs. State.apply() applies a list of operations in one transaction, in Loop.aside(). The turns go on meanwhile, and
# read the file through View. To add an operation, write a subclass of Operation; to add a column, add a step to
# MIGRATIONS and the column to ROW.
#
# Every message has a checksum; the rows of the other tables have none. If a number or a name in such a row is damaged,
# the bus reports it on stderr and goes on without it, so that no row can end the bus.

MAILBOX_MESSAGES, MAILBOX_BYTES = 10000, 64 << 20  # unfetched, for one name; beyond it senders get 429
RECOUNT_SECONDS = 60  # s after which a mailbox that seems to be nearly full is counted again: 10 ms
# From here on, no sender gets more than a quarter of them.
MUCH_MESSAGES, MUCH_BYTES = MAILBOX_MESSAGES * 3 // 4, MAILBOX_BYTES * 3 // 4
REMOVE_SLICE = 100  # messages removed in one transaction: 9 ms that a send may have to wait (500: 32 ms)
LOOKED_PER_REMOVED = 10  # messages that it looks at for each one that it may remove: another 8 ms
RESERVE_BYTES = 16 << 20  # of the disk are kept free: to remove messages and to write marks, the WAL needs room
CHECKED_BYTES = 64 << 20  # a database up to this size is checked whole at start; every message has its checksum anyway
BUSY_SECONDS = 2.0  # to wait for a lock of another program, before senders get 503
SOUND = 1 << 53  # a tick or a count above it is damage: as us it is the year 2255

INDEX_TABLES = """
    CREATE TABLE places(
        run INTEGER NOT NULL, mailbox INTEGER NOT NULL, tick INTEGER NOT NULL, PRIMARY KEY(run, mailbox, tick)
        ) WITHOUT ROWID;
    CREATE TABLE runs(
        run INTEGER PRIMARY KEY,
        level INTEGER NOT NULL,              -- runs of one level are merged; below 0: its places are being deleted
        upto INTEGER NOT NULL UNIQUE,        -- the highest tick it covers; below 0: it is no part of the index
        checksum INTEGER NOT NULL);
"""
MIGRATIONS = [  # a database with user_version n has the first n of them; only ever add at the end
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
    # From here on an extension brings its own tables, and a row in `extensions`. Its view NAME_kept has the ticks of
    # the messages that retention spares for it, and a trigger removes its rows with their message: both hold also when
    # the extension is not loaded.
    """
    ALTER TABLE mailboxes ADD COLUMN gone INTEGER NOT NULL DEFAULT 0;  -- n of the last message that was removed
    ALTER TABLE bus ADD COLUMN lost INTEGER NOT NULL DEFAULT 0;  -- up to this tick messages may be lost by damage
    CREATE TABLE extensions(name TEXT PRIMARY KEY, version INTEGER NOT NULL, noun TEXT NOT NULL);
    CREATE VIEW work_kept AS SELECT tick FROM work WHERE due IS NOT NULL UNION ALL
        SELECT tick FROM messages JOIN mailboxes ON mailbox = id WHERE taken > 0 AND tick > taken;
    CREATE TRIGGER work_removed AFTER DELETE ON messages BEGIN DELETE FROM work WHERE tick = old.tick; END;
    INSERT INTO extensions VALUES ('work', 1, 'jobs');
    """,
    # The keys of messages that were removed before they were as old as --keep.
    """
    CREATE TABLE keys(
        tick INTEGER PRIMARY KEY, key TEXT NOT NULL, sender TEXT NOT NULL, channel TEXT NOT NULL, name TEXT NOT NULL,
        hash TEXT NOT NULL,                  -- hash_of() its text
        sum INTEGER NOT NULL);
    CREATE INDEX retries_of_removed ON keys(key, sender);
    DROP VIEW readable;
    CREATE VIEW readable AS SELECT datetime(tick / 1000000, 'unixepoch') AS time, printf('%x', tick) AS id,
        sender AS "from", name AS "to", channel, json_extract(json, '$.subject') AS subject,
        json_extract(json, '$.type') AS type, printf('%x', ifnull(thread, tick)) AS thread,
        CASE WHEN expires = 1 THEN 'recalled' WHEN name = 'all' THEN 'sent'
            WHEN own AND tick <= read THEN 'acknowledged' WHEN tick <= max(fetched, ifnull(read, 0)) THEN 'fetched'
            WHEN expires <= 1000000 * strftime('%s', 'now') THEN 'expired' ELSE 'queued' END AS state,
        CASE WHEN expires = 1 THEN NULL ELSE ifnull(json_extract(json, '$.msg'), text) END AS msg  -- text: damaged
        FROM (SELECT *, CASE WHEN expires IS NOT 1 AND json_valid('{' || text || '}') THEN '{' || text || '}' END
        AS json FROM messages) JOIN mailboxes ON mailbox = id;
    """,
    # The index by mailbox is written in runs: see Index and build_index(), which is called after this step.
    f"""
    {INDEX_TABLES}
    ALTER TABLE bus ADD COLUMN forgotten INTEGER NOT NULL DEFAULT 0;  -- highest tick removed from a forgotten mailbox
    CREATE INDEX replies ON messages(answers, tick, sender) WHERE answers IS NOT NULL;
    CREATE VIEW states AS SELECT channel, name, own AS "is a reader's own",
        datetime(nullif(seen, 0) / 1000000, 'unixepoch') AS "last poll",
        datetime(nullif(read, 0) / 1000000, 'unixepoch') AS "acknowledged up to",
        datetime(nullif(fetched, 0) / 1000000, 'unixepoch') AS "fetched up to",
        datetime(nullif(removed, 0) / 1000000, 'unixepoch') AS "removed up to" FROM mailboxes;
    """,
]
INDEX_IN_RUNS = 5  # the schema that has it
MAILBOX = "(SELECT id FROM mailboxes WHERE channel = ? AND name = ?)"
RECEIPT = f"INSERT OR IGNORE INTO receipts VALUES ({MAILBOX}, ?, ?, ?, ?)"  # the first reading of a message counts
# One statement for many messages: 10,000 instructions less for each of 16 sends than with executemany (callgrind).
# OR ROLLBACK: to undo one statement of a transaction, SQLite writes what the statement overwrites to a file in
# /var/tmp, 1,250 writes for 1,600 messages in arrays. We undo the whole transaction anyway: 23 % more messages a
# second.
INSERT_ROWS = 90  # in one statement; SQLite before 3.32 takes 999 values
WHOLE_ROW = "(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
PLAIN_ROW = "(?, ?, ?, ?, ?, NULL, 0, ?, ?, NULL, NULL)"  # without ttl and reply_to, as most: 5,000 instructions less
# In messages JOIN mailboxes LEFT JOIN SLOWEST: nobody has fetched this message or, for one to `all`, a reader has not
# acknowledged it; and it is not expired at %d (wall clock, us).
UNFETCHED = """(CASE name WHEN 'all' THEN ifnull(tick > slowest, 0) ELSE
    tick > max(CAST(fetched AS INTEGER), CAST(ifnull(read, 0) AS INTEGER)) END AND ifnull(expires > %d, 1))"""
SLOWEST = """(SELECT channel AS its_channel, min(CAST(ifnull(read, 0) AS INTEGER)) AS slowest FROM mailboxes WHERE own
    GROUP BY channel) ON its_channel = channel"""  # the readers of each channel, once for a statement
ROW = "tick, channel, name, sender, text, n, expires, answers, sum"
SELECT = f"SELECT {ROW} FROM mailboxes JOIN messages ON mailbox = id"
# Messages by their places: those in runs, and a list of ticks in JSON.
PLACED = f"""FROM runs CROSS JOIN places ON places.run = runs.run
    %s JOIN messages ON messages.tick = places.tick AND messages.mailbox = places.mailbox
    %s JOIN mailboxes ON id = messages.mailbox
    WHERE runs.upto > ? AND places.mailbox = {MAILBOX} AND places.tick > ? AND places.tick <= ?"""
LISTED = """FROM (SELECT value AS tick FROM json_each(?)) AS places CROSS JOIN messages ON messages.tick = places.tick
    JOIN mailboxes ON id = messages.mailbox WHERE 1"""
PLACED_ROW = "places.tick, sender, text, n, expires, answers, sum"  # mail() adds channel and name: then it is a ROW
TICKS_LISTED = 256
ALIVE = "(expires IS NULL OR expires > ?)"
IS_FRONT = "SELECT 1 FROM sqlite_master WHERE name = 'front'"  # a row, if the database is a front's copy of a ledger
SOUND_N = "typeof(n) = 'integer' AND n < 1 << 53"
# Each mailbox with its newest message in a run.
NEWEST = """SELECT channel, name, id, gone, newest, n FROM (SELECT *,
    (SELECT places.tick FROM runs CROSS JOIN places ON places.run = runs.run
        WHERE runs.upto > 0 AND places.mailbox = mailboxes.id ORDER BY upto DESC, places.tick DESC LIMIT 1) AS newest
    FROM mailboxes) LEFT JOIN messages ON tick = newest"""
# Two sums that are equal if the index is whole: of the places in runs, and of the messages that belong there.
IN_PLACES, IN_MESSAGES = (
    f"SELECT count(*), ifnull(sum(tick % 1000003 * 1009 + mailbox % 1000003), 0) FROM {them}"
    for them in ("runs JOIN places USING (run) WHERE upto > 0", "messages WHERE tick <= (SELECT max(upto) FROM runs)")
)
ITS_KEYS = """(SELECT json_extract(value, '$[0]') AS its_sender, json_extract(value, '$[1]') AS its_channel,
    json_extract(value, '$[2]') AS its_key FROM json_each(?))"""
EARLIER = f"""SELECT tick, key, sender, channel, name, '', NULL FROM {ITS_KEYS}
    CROSS JOIN messages ON key = its_key AND sender = its_sender
    CROSS JOIN mailboxes ON mailbox = id AND channel = its_channel
    UNION ALL SELECT tick, key, sender, channel, name, hash, sum FROM {ITS_KEYS}
    CROSS JOIN keys ON key = its_key AND sender = its_sender AND channel = its_channel"""
KEYED = f"""SELECT {ROW}, key FROM messages JOIN mailboxes ON mailbox = id
    WHERE tick IN (SELECT value FROM json_each(?)) AND key IS NOT NULL"""


def kept_for(extension: str) -> str:
    """In SQL: an extension needs this message, so retention must spare it."""
    return f"EXISTS (SELECT 1 FROM {extension}_kept AS kept WHERE kept.tick = messages.tick)"


# Without an adapter, sqlite3 looks for one in vain each time that it binds a None: 2,500 instructions.
sqlite3.register_adapter(type(None), {None: None}.get)


@lru_cache(2 * INSERT_ROWS)
def insert_statement(row: str, rows: int) -> str:
    return f"INSERT OR ROLLBACK INTO messages VALUES {', '.join([row] * rows)}"


def checksum(message: Message) -> int:
    tick, channel, to, _, text, n, expires, _ = message  # the text has sender and answers
    return zlib.crc32(f"({tick}, '{channel}', '{to}', {text!r}, {n}, {expires})".encode())


ONLY_MSG = re.compile(r'"from": "[^"]*", "channel": "[^"]*", "msg": "[^"\\]*(?:\\.[^"\\]*)*"')
sort = json.JSONEncoder(sort_keys=True).encode


def hash_of(text: str) -> str:
    """16 bytes in hex, the same for each order of the members: some encoders change it, and it has no meaning."""
    in_order = text if ONLY_MSG.fullmatch(text) else sort(json.loads(f"{{{text}}}"))
    return hashlib.sha256(in_order.encode()).hexdigest()[:32]


def no_room() -> Refused:
    return Refused(507, f"the bus's disk has under {RESERVE_BYTES >> 20} MiB free: nothing was stored, try again later")


class Now(NamedTuple):
    """The time at which a list of operations is applied, in us."""

    wall: int  # since 1970; for ticks, ttl and retention
    steady: int  # it never steps; for leases and delays


class Clock:
    """The two clocks of a bus. `steady` begins at the wall clock, but at most AHEAD before the tick `last`."""

    def __init__(self, wall: Callable[[], int], last: int) -> None:
        self.wall = wall
        self.epoch = max(wall(), last - AHEAD) - time.monotonic_ns() // 1000

    def now(self) -> Now:
        return Now(self.wall(), self.epoch + time.monotonic_ns() // 1000)


class Applied(NamedTuple):
    """The effects of a list of operations. They are announced in a turn; until then no reader sees them."""

    results: list[Any]  # one for each operation; Refused if it was refused
    visible: list[Message]  # in tick order
    removed: dict[Key, int]  # mailbox: its highest tick that was removed
    last: int  # the highest tick


class Operation:
    """A change of the State, as a plain value. Its slots have all the data that the change needs.

    apply() uses no clock but `now`, no option and no random number, so the same operations make the same State
    everywhere. If apply() raises Refused, it has changed nothing.
    """

    __slots__: tuple[str, ...] = ()
    kind: ClassVar[str]  # its word in a ledger
    is_large: ClassVar[bool] = False  # its result may take a mebibyte
    rank: ClassVar[int] = 2  # the order in one list: 0 Raise, 1 Put, 2 those of extensions, 3 Marks, 4 Forget, 5 Remove
    is_local: ClassVar[bool] = False  # for this machine alone: a front puts it in no entry, and its result in no sum

    def apply(self, state: State, now: Now) -> Any:
        raise NotImplementedError

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Operation:
        """The operation with these members, which were read from JSON."""
        return cls(**fields)


class Put(Operation):
    """Store one send: all of its drafts, or none. The result is a list of Stored, one for each draft."""

    __slots__ = ("drafts", "room")
    kind, rank = "put", 1

    def __init__(self, drafts: list[Draft], room: bool = True) -> None:
        self.drafts = drafts
        self.room = room  # the disk has room for new messages

    def apply(self, state: State, now: Now) -> list[Stored]:
        result: list[Any] = [stored_earlier(one, state.known) if one.key else None for one in self.drafts]
        if not self.room and None in result:
            raise no_room()
        for number, one in enumerate(self.drafts):
            if result[number] is None:
                stored = result[number] = made(Stored, (state.place(one, now.wall), False))
                if one.key:
                    state.known[one.sender, one.channel, one.key] = one.to, one.text, "", stored
        return result

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Put:
        return cls([Draft(channel, tuple(to), *others) for channel, to, *others in fields["drafts"]], fields["room"])


# What was sent earlier, by sender, channel and key: the receivers, the text or its hash, and what the sender was told.
Known = dict[tuple[str, str, str], tuple[tuple[str, ...], str, str, Stored]]


def stored_earlier(one: Draft, known: Known) -> Stored | None:
    """What the first send with this sender, channel and key was told; 409 if it had another message."""
    first = known.get((one.sender, one.channel, str(one.key)))
    if first is None:
        return None
    to, text, its_hash, stored = first
    if to != one.to or (text != one.text and (its_hash or hash_of(text)) != hash_of(one.text)):
        raise Refused(409, f"the key {one.key} was used for another message: a new message needs a new key")
    return stored._replace(duplicate=True)


class Raise(Operation):
    """Raise the highest tick to a reader's cursor that is ahead, so that all later ticks lie above the cursor."""

    __slots__ = ("tick",)
    kind, rank = "raise", 0

    def __init__(self, tick: int) -> None:
        self.tick = tick

    def apply(self, state: State, now: Now) -> None:
        if self.tick > state.last:
            state.last, state.ahead = self.tick, True


class Marks(Operation):
    """Store how far mailboxes were read, who read them, and when tokens were used (s since 1970)."""

    __slots__ = ("marks", "receipts", "used")
    kind, rank = "marks", 3

    def __init__(self, marks: list[Mark], receipts: list[Receipt], used: dict[str, int]) -> None:
        self.marks = [Mark(*mark) for mark in marks]
        self.receipts = [Receipt(*receipt) for receipt in receipts]
        self.used = used

    def apply(self, state: State, now: Now) -> None:
        for mark in self.marks:
            state.mailbox(mark.channel, mark.name)
        state.insert()
        state.writing.executemany("INSERT OR REPLACE INTO uses VALUES (?, ?)", list(self.used.items()))
        state.writing.executemany(
            "UPDATE mailboxes SET own = ?, read = ?, fetched = ?, seen = ? WHERE channel = ? AND name = ?",
            [(*mark[2:], *mark[:2]) for mark in self.marks],
        )
        state.writing.executemany(RECEIPT, [receipt for receipt in self.receipts if receipt.tick])


class Remove(Operation):
    """Remove the `slice` oldest messages between two ticks. The result is the tick to go on above; None: none is left.

    It looks at LOOKED_PER_REMOVED times as many: most may be spared.
    """

    __slots__ = ("above", "before", "fetched_only", "keys_from", "kept_for", "slice")
    kind, rank = "remove", 5

    def __init__(
        self,
        above: int,
        before: int,
        fetched_only: bool,
        kept_for: list[str],
        keys_from: int,
        slice: int = REMOVE_SLICE,
    ) -> None:
        self.above, self.before = above, before
        self.fetched_only = fetched_only  # messages that nobody has fetched stay
        self.kept_for = kept_for  # extensions; the messages in their views stay
        self.keys_from = keys_from  # from this tick on the keys of messages are kept
        self.slice = slice  # messages

    def next(self, reached: int) -> Remove:
        return Remove(reached, self.before, self.fetched_only, self.kept_for, self.keys_from, self.slice)

    def apply(self, state: State, now: Now) -> int | None:
        reached, rows = self.found(state, now)
        if reached is None:
            return None
        state.keep_keys([row[0] for row in rows if row[0] >= self.keys_from])
        gone = {(channel, own): (tick, n if isinstance(n, int) else 0) for tick, channel, own, n, _ in rows}
        state.writing.executemany(  # first, for readers of :memory:, who see the messages go
            "UPDATE mailboxes SET removed = max(CAST(removed AS INTEGER), ?), gone = max(CAST(gone AS INTEGER), ?) "
            "WHERE channel = ? AND name = ?",
            [(*numbers, *key) for key, numbers in gone.items()],
        )
        state.index.remove((tick, mailbox) for tick, _, _, _, mailbox in rows)  # first, for the same readers
        ticks = encode([row[0] for row in rows])
        state.writing.execute("DELETE FROM messages WHERE tick IN (SELECT value FROM json_each(?))", (ticks,))
        removed = {key: tick for key, (tick, _) in gone.items()}
        state.writing.executemany(
            f"DELETE FROM receipts WHERE mailbox = {MAILBOX} AND kind IN (0, 1, 2) AND tick < ? "
            f"AND (kind != {ALONE} OR tick NOT IN (SELECT tick FROM messages))",  # ALONE: its message may be spared
            [(*key, tick) for key, tick in removed.items()],
        )
        state.removed.update(removed)
        state.ahead = True  # the newest message may go, and `last` must not
        return reached

    def found(self, state: State, now: Now) -> tuple[int | None, list[Any]]:
        """How far this slice comes, and the rows that go: no others, as Python may wait for its lock at each row."""
        some = "SELECT tick FROM messages WHERE tick > ? AND tick < ? ORDER BY tick LIMIT ?"
        looked = self.above, self.before, self.slice * LOOKED_PER_REMOVED
        (reached,) = state.writing.execute(f"SELECT max(tick) FROM ({some})", looked).fetchone()
        spared = [kept_for(each) for each in sorted({*self.kept_for} & {*state.extensions()})]
        spared += [UNFETCHED % now.wall] if self.fetched_only else []
        joined = f"LEFT JOIN {SLOWEST}" if self.fetched_only else ""
        going = state.writing.execute(
            "SELECT tick, channel, name, n, mailbox, length(text) "
            f"FROM mailboxes JOIN messages ON mailbox = id {joined} WHERE tick > ? AND tick <= ? "
            f"AND NOT ifnull({' OR '.join(spared or '0')}, 0) ORDER BY tick LIMIT ?",
            (self.above, reached, self.slice),
        )
        rows, size = list[Any](), 0
        with contextlib.closing(going):
            for *row, length in going:
                rows.append(row)
                size += length or 0
                if len(rows) == self.slice or size > ANSWER_BYTES:
                    return int(row[0]), rows
        return reached, rows


class Forget(Operation):
    """Forget mailboxes that have no mail and that nobody polls. The result is the [channel, name] of each one."""

    __slots__ = ("names",)
    kind, rank = "forget", 4

    def __init__(self, names: list[list[str]]) -> None:
        self.names = names

    def apply(self, state: State, now: Now) -> list[list[str]]:
        gone = [[channel, own] for channel, own in self.names if not state.first("1", (channel, own), 0)]
        numbers = [state.counts.pop((channel, own), (0, 0))[:1] for channel, own in gone]
        its_mark = "SELECT CAST(removed AS INTEGER) FROM mailboxes WHERE id = ?"
        highest = f"UPDATE bus SET forgotten = max(CAST(forgotten AS INTEGER), ifnull(({its_mark}), 0))"
        rows = "DELETE FROM mailboxes WHERE id = ?", "DELETE FROM receipts WHERE mailbox = ?"
        for statement in (highest, *rows):
            state.writing.executemany(statement, numbers)
        [state.mailboxes_made] = state.ask("SELECT ifnull(max(id), 0) FROM mailboxes")  # as reload() would
        return gone


class ForgetKeys(Operation):
    """Forget the `slice` oldest keys of removed messages that are older than a tick. The result is how many."""

    __slots__ = ("before", "slice")
    kind, rank = "forget keys", 4

    def __init__(self, before: int, slice: int = REMOVE_SLICE) -> None:
        self.before, self.slice = before, slice

    def apply(self, state: State, now: Now) -> int:
        oldest = "SELECT tick FROM keys WHERE tick < ? ORDER BY tick LIMIT ?"
        keys = state.writing.execute(oldest, (self.before, self.slice)).fetchall()
        state.writing.executemany("DELETE FROM keys WHERE tick = ?", keys)
        return len(keys)


OPERATIONS: dict[str, type[Operation]] = {each.kind: each for each in (Put, Raise, Marks, Remove, Forget, ForgetKeys)}


def is_of_the_machine(error: Exception) -> bool:
    """Did the disk or the memory fail, or is the file damaged? Then the whole list fails, not one operation."""
    return isinstance(error, (sqlite3.OperationalError, OSError, MemoryError)) or type(error) is sqlite3.DatabaseError


class Tail(NamedTuple):
    """The part of the index that is in memory."""

    above: int  # a tick; every message up to it is in a run
    ticks: defaultdict[Key, list[int]]  # mailbox: its messages above that tick, in order


MERGED = -1  # the level of a run whose places are copied, and are being deleted


class Run(NamedTuple):
    """A row of the table `runs`."""

    run: int
    level: int
    upto: int


class Index:
    """Where the messages of each mailbox are: an index as of a log-structured merge tree. State writes it, aside.

    A commit appends to `messages`, and to nothing that is spread over the file. So its cost does not depend on how many
    mailboxes there are. The index is written later: the newest FLUSH_MESSAGES are in memory, in the *tail*; then they
    are *flushed*, all at once, as a *run*. A run is a part of the table `places`, sorted by mailbox. The key of that
    table begins with the number of the run, so a new run is appended to the file too. RUNS_MERGED runs of one level are
    *merged* into one of the next, a slice with each commit, so that a mailbox with few messages is in few runs.

    Invariants:
    - Each message up to `tail.above` has one place in the runs in use, and each of their places has a message.
    - The runs in use follow each other in the order of ticks, and those of a higher level come first.
    - The tail is replaced only when its run is committed. A turn reads with the tail of the last announcement. If a
      newer run is in the file already, its messages are in that tail too, and Rows.mail() ignores that run.
    """

    FLUSH_MESSAGES = 4000  # some 2 ms of a commit
    RUNS_MERGED = 10  # 10,000,000 messages are in at most 4 * 9 runs
    SLICE = 2000  # places to copy or to delete at once, 1 ms
    PLACES_PER_MESSAGE = 8  # to copy or delete for each new message: each is copied up to 4 times

    def __init__(self, writing: sqlite3.Connection, merges: bool) -> None:
        self.writing = writing
        self.merges = merges  # not in :memory:, where readers could see half a merge
        self.reload()

    def reload(self) -> None:
        """Read from the file the values that are kept in memory."""
        [above] = self.ask("SELECT ifnull(max(upto), 0) FROM runs WHERE upto BETWEEN 1 AND ?", SOUND)
        self.tail = Tail(above, defaultdict(list))
        late = "SELECT channel, name, tick FROM messages JOIN mailboxes ON mailbox = id WHERE tick > ? ORDER BY tick"
        for channel, own, tick in self.writing.execute(late, (above,)).fetchall():
            self.tail.ticks[channel, own].append(tick)
        self.size = sum(map(len, self.tail.ticks.values()))
        self.flushed: Tail | None = None  # the next tail, once the transaction is committed
        self.owed = 0  # places to copy or to delete
        self.behind = self.merges  # there may be runs to merge or to delete

    def ask(self, statement: str, *values: Any) -> Any:
        return self.writing.execute(statement, values).fetchone()

    def is_due(self, messages: int) -> bool:
        """Is it time to write into the index, in the transaction that stores so many messages?"""
        owed = self.owed + self.PLACES_PER_MESSAGE * messages if self.behind else 0
        return bool(messages) and (self.size + messages >= self.FLUSH_MESSAGES or owed >= self.SLICE)

    def write(self, messages: int, last: int) -> None:
        """Before the commit of so many messages, with ticks up to `last`: flush the tail and merge runs, if it is due.

        A list without messages writes nothing here: when the disk is full, removing must not need more room.
        """
        self.size += messages
        self.owed += self.PLACES_PER_MESSAGE * messages if self.behind else 0
        if messages and self.size >= self.FLUSH_MESSAGES:
            self.flush(last)
        if messages and self.owed >= self.SLICE:
            self.merge(self.owed)
            self.owed = 0

    def committed(self) -> None:
        if self.flushed:
            self.tail, self.flushed, self.size = self.flushed, None, 0

    def flush(self, last: int) -> None:
        run = self.new_run(0)
        new = "SELECT ?, mailbox, tick FROM messages WHERE tick > ? ORDER BY mailbox, tick"
        self.writing.execute(f"INSERT INTO places {new}", (run, self.tail.above))
        write_run(self.writing, run, 0, last)
        self.flushed = Tail(last, defaultdict(list))
        self.behind = self.merges

    def new_run(self, level: int) -> int:
        """One that is not in use yet."""
        [run] = self.ask("SELECT ifnull(max(run), 0) + 1 FROM runs")
        write_run(self.writing, run, level, -run)
        return int(run)

    def merge(self, places: int) -> None:
        """Copy or delete so many places, or as many as there are to copy or to delete."""
        while places > 0 and self.behind:
            runs = sound_runs(self.writing) or []  # what is damaged is mended at the next start
            levels = Counter(run.level for run in runs if run.upto > 0)
            full = [level for level, count in levels.items() if count >= self.RUNS_MERGED]
            merged = [run for run in runs if run.level == MERGED]
            if full:  # the lowest first: its runs are small, and soon there are many
                places -= self.copy(runs, min(full), places)
            elif merged:
                places -= self.delete(merged[0].run, places)
            else:
                self.behind = False

    def delete(self, run: int, places: int) -> int:
        ordered = "SELECT mailbox, tick FROM places WHERE run = ? ORDER BY mailbox, tick"
        last = self.ask(f"{ordered} LIMIT 1 OFFSET ?", run, places - 1)
        some = "DELETE FROM places WHERE run = ? AND (mailbox, tick) <= (?, ?)"
        deleted = self.writing.execute(some, (run, *(last or (SOUND, SOUND)))).rowcount
        if not last:
            self.writing.execute("DELETE FROM runs WHERE run = ?", (run,))
        return deleted

    def copy(self, runs: list[Run], level: int, places: int) -> int:
        """Go on to copy the oldest runs of a level into one run; when it is complete, it takes their place."""
        parts = [run for run in runs if run.level == level and run.upto > 0][: self.RUNS_MERGED]
        begun = [run.run for run in runs if run.level == level + 1 and run.upto < 0]
        into = begun[0] if begun else self.new_run(level + 1)
        newest = "SELECT mailbox, tick FROM places WHERE run = ? ORDER BY mailbox DESC, tick DESC LIMIT 1"
        last = self.ask(newest, into) or (0, 0)
        part = "SELECT ?, mailbox, tick FROM places WHERE run = ? AND (mailbox, tick) > (?, ?)"
        union = " UNION ALL ".join([part] * len(parts))  # of ordered parts: it is merged as it is read
        values = [value for each in parts for value in (into, each.run, *last)]
        insert = f"INSERT INTO places {union} ORDER BY mailbox, tick LIMIT ?"
        copied = self.writing.execute(insert, (*values, places)).rowcount
        if copied < places:
            for each in parts:
                write_run(self.writing, each.run, MERGED, -each.run)
            write_run(self.writing, into, level + 1, parts[-1].upto)
        return copied

    def remove(self, places: Iterable[tuple[int, int]]) -> None:
        """The messages with these ticks and mailboxes are removed: from their run, and from a copy of it."""
        its_run = "SELECT run FROM (SELECT run FROM runs WHERE upto >= ? ORDER BY upto LIMIT 1)"
        runs = f"({its_run} UNION ALL SELECT run FROM runs WHERE upto < 0 AND level > 0)"
        self.writing.executemany(
            f"DELETE FROM places WHERE run IN {runs} AND mailbox = ? AND tick = ?",
            [(tick, mailbox, tick) for tick, mailbox in places if tick <= self.tail.above],
        )


class Rows:
    """The base of State and View: reads messages on one connection to the database, and checks their checksums."""

    tail: Tail  # of the index

    def __init__(self, path: str, database: sqlite3.Connection) -> None:
        self.path, self.database = path, database

    def damaged(self, what: str) -> None:
        say(f"bus_server: {self.path}: {what} is damaged; skipped")

    def number(self, value: Any, otherwise: int, what: str) -> int:
        """The stored number, or `otherwise` if it is damaged."""
        if isinstance(value, int) and abs(value) < SOUND:
            return value
        self.damaged(what)
        return otherwise

    def checked(self, row: Sequence[Any]) -> Message | None:
        """The message in a row. If a bit of it has changed since it was written: None, and a line on stderr."""
        message = made(Message, row[:8])
        if checksum(message) == row[8] and message.text.startswith(f'"from": "{message.sender}"'):
            return message
        self.damaged(f"message {message.tick:x} to {message.to}")
        return None

    def ask(self, statement: str, *values: Any) -> Any:
        """The first row of an answer, or None."""
        return self.database.execute(statement, values).fetchone()

    def message(self, tick: int) -> Message | None:
        row = self.ask(f"{SELECT} WHERE tick = ?", tick)
        return self.checked(row) if row else None

    def mail(
        self, columns: str, mailbox: Key, above: int, upto: int = SOUND, *, only: str = "1", backwards: bool = False
    ) -> Generator[tuple[Any, ...], None, None]:
        """Rows of messages and their mailbox, above one tick and up to another, in order. `only`: a condition in SQL.

        Exhaust or close it: an open statement would let the WAL grow for ever.
        """
        channel, own = mailbox
        order = "DESC" if backwards else "ASC"
        placed: list[tuple[str, Sequence[Any]]] = []
        if above < self.tail.above:
            # A place without its message is damage. A read of whole rows returns NULLs for it, and checked() tells.
            join = "LEFT" if columns == PLACED_ROW else "CROSS"
            source = f"{PLACED % (join, join)} AND {only} ORDER BY runs.upto {order}, places.tick {order}"
            placed.append((source, (above, *mailbox, above, min(upto, self.tail.above))))
        ticks = self.tail.ticks.get(mailbox, [])
        ticks = ticks[bisect_right(ticks, above) : bisect_right(ticks, upto)]
        if backwards:
            ticks.reverse()
        lists = (ticks[start : start + TICKS_LISTED] for start in range(0, len(ticks), TICKS_LISTED))
        listed = ((f"{LISTED} AND {only}", (encode(some),)) for some in lists)  # made when it is their turn
        for source, its in chain(listed, placed) if backwards else chain(placed, listed):
            with contextlib.closing(self.database.execute(f"SELECT {columns} {source}", its)) as rows:
                if columns == PLACED_ROW:
                    for tick, sender, text, n, expires, answers, check in rows:
                        yield tick, channel, own, sender, text, n, expires, answers, check
                else:
                    yield from rows

    def merged(self, columns: str, marks: dict[Key, int], upto: int) -> Generator[tuple[Any, ...], None, None]:
        """mail() of several mailboxes, each above its mark, in the order of ticks. Exhaust or close it.

        They are merged as they are read: a reader far behind costs no more than the rows it takes. Each statement has a
        text of its own, `AND 1` or `AND 2`: while one is open, sqlite3 compiles another one of the same text anew.
        """
        with contextlib.ExitStack() as opened:
            each = (self.mail(columns, *mark, upto, only=str(number)) for number, mark in enumerate(marks.items(), 1))
            yield from heapq.merge(*[opened.enter_context(contextlib.closing(rows)) for rows in each])

    def first(self, *wanted: Any, **how: Any) -> Any:
        """The first row of mail(), or None."""
        with contextlib.closing(self.mail(*wanted, **how)) as rows:
            return next(rows, None)

    def newest(self) -> dict[Key, tuple[int, int, int]]:
        """Each mailbox: its number, the n of its newest message ever, and the tick of its newest message or 0."""
        found: dict[Key, tuple[int, int, int]] = {}
        for channel, own, number, gone, tick, n in self.database.execute(NEWEST).fetchall():
            if (channel, own) in self.tail.ticks:
                tick, n = self.first("places.tick, n", (channel, own), 0, backwards=True) or (tick, n)
            if not (isinstance(n, int) and n < SOUND):
                [n] = self.first("n", (channel, own), 0, only=SOUND_N, backwards=True) or [0]
            found[channel, own] = number, max(gone if isinstance(gone, int) and gone < SOUND else 0, n), tick or 0
        return found

    def extensions(self) -> dict[str, str]:
        """The extensions that have tables in this database, each with the noun for its messages."""
        return dict(self.database.execute("SELECT name, noun FROM extensions").fetchall())


class State(Rows):
    """The SQLite file, and the one connection that writes it. One list of operations is applied at a time.

    Invariants: ticks are unique and increase in the order of the log, also after a restart or a step of the clock. If
    apply() raises, nothing of its list is on disk, provided that the disk reports its errors.

    If two connections write, SQLite before 3.51.3 may damage the WAL. So View's connection can only read.
    """

    def __init__(self, path: str, clock: Callable[[], int] = wall_clock) -> None:
        memory = path == ":memory:"
        target = f"file:bus-{secrets.token_hex(4)}?mode=memory&cache=shared" if memory else path
        if not memory:
            check_names(path)
        self.lock = None if memory else locked(path)
        self.is_new = not memory and not os.path.exists(path)  # and no bus has run with it
        faults = sqlite3.Error, UnicodeDecodeError  # the latter: SQLite's error has unreadable text
        with or_unusable(f"cannot use the database {path}", partial(unwritable, path), faults):
            commits = [] if memory else commits_in_wal(f"{path}-wal")
            connect = partial(sqlite3.connect, target, isolation_level=None, check_same_thread=False, uri=memory)
            self.writing = connect(cached_statements=128, timeout=BUSY_SECONDS)
            super().__init__(path, self.writing)
            damaged = not memory and self.damaged_wal(commits)
            prepare(self.writing, path, "memory" if memory else "wal")
            if damaged:
                self.tell_loss(clock())
            reading = connect()
            for each in (self.writing, reading):  # text that is not UTF-8 is a damaged row, not an error
                each.text_factory = lambda text: text.decode("utf-8", "replace")
                each.execute("PRAGMA temp_store=MEMORY")  # no statement opens a file: descriptors may be used up
            # Dirty reads exist in :memory: only, and are harmless: a turn never reads above `last`, the announced tick.
            reading.executescript("PRAGMA query_only=ON; PRAGMA read_uncommitted=ON; PRAGMA wal_autocheckpoint=0")
            self.index = Index(self.writing, merges=not memory)
            self.view = View(path, reading, clock, self.index.tail)
            self.check_use()
            self.reload()
            self.announced = self.last  # of the last list that was applied

    def check_use(self) -> None:
        """Unusable, if the file is a front's copy of a ledger: what is written to it alone would be nowhere else."""
        if self.ask(IS_FRONT):
            bus_alone = f"make it a bus of its own ({called('move')} --back)"
            raise Unusable(f"{self.path} is a front's copy of a ledger: start its front with --ledger, or {bus_alone}")

    def damaged_wal(self, commits: list[int]) -> bool:
        """Did SQLite leave two or more transactions of the log unread? A single one may be torn by a power cut."""
        [version] = self.writing.execute("PRAGMA user_version").fetchone()  # now it has read the log
        [_, frames, _] = self.writing.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone() if version else (0, 0, 0)
        return sum(commit > max(frames, 0) for commit in commits) > 1

    def tell_loss(self, wall: int) -> None:
        """Report the loss, and give a gap to every reader whose cursor is from before now."""
        say(f"bus_server: {self.path}-wal is damaged: its last transactions are lost, and readers get a gap")
        [newest] = self.writing.execute("SELECT ifnull(max(tick), 0) FROM messages").fetchone()
        self.writing.execute("UPDATE bus SET lost = max(last, ?, ?), last = max(last, ?, ?)", (wall, newest) * 2)

    def close(self) -> None:
        self.view.database.close()  # first: the last to close folds the WAL into the database, which is a write
        self.writing.close()
        if self.lock:
            self.lock.close()

    def sign(self, url: str) -> None:
        """Write into the lock file which bus holds it: its URL, then its version. The commands read both."""
        self.is_new = False
        if self.lock:
            self.lock.truncate(0)
            self.lock.write(f"{url}\n{VERSION}\n")
            self.lock.flush()

    def add_tables(self, extension: str, noun: str, steps: Sequence[str]) -> None:
        """Bring the tables of an extension up to date. `steps` are its migrations; only ever add at the end."""
        [version] = self.ask("SELECT version FROM extensions WHERE name = ?", extension) or [0]
        if version > len(steps):
            raise Unusable(f"the database {self.path} was used with a newer {extension}.py: use that newer file")
        if version < len(steps):
            self.writing.execute("BEGIN IMMEDIATE")
            migrate(self.writing, steps[version:])
            self.writing.execute("INSERT OR REPLACE INTO extensions VALUES (?, ?, ?)", (extension, len(steps), noun))
            self.writing.execute("COMMIT")

    def reload(self) -> None:
        """Read the values that the writer keeps in memory from the file: at start, and after a rollback."""
        self.bus: str
        self.last: int
        newest = "(SELECT ifnull(max(tick), 0) FROM messages)"
        self.bus, last, lost, forgotten, newest = self.ask(f"SELECT id, last, lost, forgotten, {newest} FROM bus")
        self.lost = self.number(lost, 0, "how far messages are lost")
        self.forgotten = self.number(forgotten, 0, "how far forgotten mailboxes had mail")
        self.last = max(self.number(last, 0, "the newest tick"), newest)
        self.index.reload()
        self.tail = self.index.tail
        self.counts = {key: (number, n) for key, (number, n, _) in self.newest().items()}
        self.mailboxes_made = max((number for number, _ in self.counts.values()), default=0)
        self.forget_list()
        self.stale = False  # what is in memory is what the file has

    def forget_list(self) -> None:
        """Begin with an empty list."""
        self.new_mailboxes: list[tuple[Any, ...]] = []  # rows to be inserted
        self.new_messages: dict[str, list[Any]] = {PLAIN_ROW: [], WHOLE_ROW: []}  # values, one row after the other
        self.visible: list[Message] = []
        self.removed: dict[Key, int] = {}
        self.known: Known = {}
        self.ahead = False  # `last` is above the newest message, and must be written down

    # Aside

    def apply(self, operations: Sequence[Operation], now: Now) -> Applied:
        """Apply a list of operations in one transaction. sqlite3.Error, OSError or MemoryError if the list failed."""
        if self.stale:  # there was no memory to roll back, or to reload
            if self.writing.in_transaction:
                self.writing.execute("ROLLBACK")
            self.reload()
            if self.last != self.announced:
                raise sqlite3.DatabaseError("a list that failed for want of memory was stored")
        try:
            self.known = self.sent_with_keys(operations)
            results = [self.apply_one(operation, now) for operation in operations]
            if self.writing.in_transaction or not self.is_one_statement():
                self.begin()
                if self.ahead:
                    self.writing.execute("UPDATE bus SET last = ?", (self.last,))
                self.index.write(len(self.visible), self.last)
                self.writing.execute("COMMIT")
            else:
                self.index.write(len(self.visible), self.last)
                self.insert()
        except BaseException as error:
            self.stale = True
            with contextlib.suppress(sqlite3.Error):
                self.writing.execute("ROLLBACK")
            if "malformed" in str(error):  # perhaps the index: then the next start makes it anew
                with contextlib.suppress(sqlite3.Error):
                    self.writing.execute("UPDATE runs SET checksum = -1")
            self.reload()
            raise
        self.index.committed()
        self.tail = self.index.tail
        applied = Applied(results, self.visible, self.removed, self.last)
        self.announced = self.last
        self.forget_list()
        return applied

    def apply_one(self, operation: Operation, now: Now) -> Any:
        """The result of one operation. If it fails alone, a Refused is its result, and the others go on."""
        if operation.rank < 2:  # Put and Raise change nothing until they are sure to succeed
            before = self.last
            try:
                return operation.apply(self, now)
            except Exception as error:
                if is_of_the_machine(error) or before != self.last:
                    raise
                return error if isinstance(error, Refused) else self.failed(operation, error)
        self.begin()
        visible, last, mailboxes = len(self.visible), self.last, self.mailboxes_made
        self.writing.execute("SAVEPOINT operation")
        try:
            result = operation.apply(self, now)
            self.insert()
        except Exception as error:
            if is_of_the_machine(error):
                raise
            self.writing.execute("ROLLBACK TO operation")
            if (visible, last, mailboxes) != (len(self.visible), self.last, self.mailboxes_made):
                kept = self.visible[:visible], self.removed, self.known, self.ahead
                self.reload()
                self.visible, self.removed, self.known, self.ahead = kept
                self.last = last
            result = error if isinstance(error, Refused) else self.failed(operation, error)
        self.writing.execute("RELEASE operation")
        return result

    def failed(self, operation: Operation, error: Exception) -> Refused:
        say_exception(error)
        return Refused(500, f"the bus failed on this {operation.kind}: {type(error).__name__}; its log says why")

    def begin(self) -> None:
        """Begin a transaction of several statements, and write the messages that were placed so far."""
        if not self.writing.in_transaction:
            self.writing.execute("BEGIN IMMEDIATE")
        self.insert()

    def is_one_statement(self) -> bool:
        """Are there only messages to write, and few? Then one INSERT is the transaction, without BEGIN and COMMIT.

        A lone send takes 27,000 instructions less, of 297,000 (callgrind).
        """
        if self.new_mailboxes or self.ahead or len(self.visible) > INSERT_ROWS or self.index.is_due(len(self.visible)):
            return False
        plain, whole = self.new_messages.values()
        return bool(plain) != bool(whole)

    def sent_with_keys(self, operations: Iterable[Operation]) -> Known:
        """The earlier sends that had the same keys as those in this list."""
        found: Known = {}
        texts = defaultdict[Any, set[str]](set)
        for operation in operations:
            for one in operation.drafts if isinstance(operation, Put) else ():
                if one.key:
                    texts[one.sender, one.channel, one.key].add(one.text)
        if not texts:
            return found
        for *row, check in sorted(self.writing.execute(EARLIER, [encode([*texts])] * 2).fetchall()):
            tick, key, sender, channel, to, its_hash = row
            if check not in (None, zlib.crc32(repr(row).encode())):
                self.damaged(f"the key {key} of {sender}")
                continue
            its = sender, channel, key
            known = found.get(its) or self.first_copy(tick, its_hash, texts[its])
            if known:
                known[3].ticks.append(tick)
                found[its] = (*known[0], to), *known[1:]
        return found

    def first_copy(self, tick: int, its_hash: str, texts: set[str]) -> Any:
        """What is Known of the first copy of a message, to compare it with `texts`; None if the message is damaged.

        A large text is read only if it may be the same. Members in another order have the same length.
        """
        length = "SELECT length(text) FROM messages WHERE tick = ?"
        if not its_hash and self.ask(length, tick)[0] not in map(len, texts):
            its_hash = "of another text"
        message = None if its_hash else self.message(tick)
        if message and texts != {message.text}:
            its_hash = hash_of(message.text)
        known = "" if its_hash or not message else message.text
        return ((), known, its_hash, Stored([], True)) if its_hash or message else None

    def keep_keys(self, ticks: list[int]) -> None:
        """These messages are about to be removed: a retry must still get the first answer."""
        rows = []
        for *row, key in self.writing.execute(KEYED, (encode(ticks),)):
            each = self.checked(row)
            if each:
                rows.append([each.tick, key, each.sender, each.channel, each.to, hash_of(each.text)])
        self.writing.executemany(
            "INSERT OR REPLACE INTO keys VALUES (?, ?, ?, ?, ?, ?, ?)",
            [(*row, zlib.crc32(repr(row).encode())) for row in rows],
        )

    def place(self, one: Draft, wall: int) -> list[int]:
        """Make a Message and a row for each receiver of a draft; returns their ticks."""
        channel, receivers, sender, text, key, ttl, answers, thread, depth = one
        expires = None if ttl is None else wall + ttl
        plain, whole = self.new_messages.values()
        late = self.index.tail.ticks
        ticks = []
        for to in receivers:
            tick = self.last = max(wall, self.last + 1)  # the clock may step back; the cursor must not
            its = channel, to
            mailbox, n = self.counts.get(its) or self.mailbox(channel, to)
            n += 1
            self.counts[its] = mailbox, n
            late[its].append(tick)
            message = made(Message, (tick, channel, to, sender, text, n, expires, answers))
            self.visible.append(message)
            if answers is expires is None:
                plain += tick, mailbox, n, sender, key, checksum(message), text
            else:
                whole += tick, mailbox, n, sender, key, expires, depth, checksum(message), text, answers, thread
            ticks.append(tick)
        return ticks

    def mailbox(self, channel: str, own: str) -> tuple[int, int]:
        """The number of a mailbox, and how many messages it ever had; it is made if there is none."""
        known = self.counts.get((channel, own))
        if known is None:
            self.mailboxes_made += 1
            known = self.counts[interned((channel, own))] = self.mailboxes_made, 0
            self.new_mailboxes.append((self.mailboxes_made, channel, own))
        return known

    def insert(self) -> None:
        """Write the mailboxes and messages that are new."""
        if self.new_mailboxes:
            self.writing.executemany("INSERT INTO mailboxes(id, channel, name) VALUES (?, ?, ?)", self.new_mailboxes)
            self.new_mailboxes = []
        for row, values in self.new_messages.items():
            width = row.count("?")
            while values:
                some = values[: INSERT_ROWS * width]
                self.writing.execute(insert_statement(row, len(some) // width), some)
                del values[: len(some)]


Expiry = tuple[int, int]  # when a message expires (wall clock, us) and its tick: messages are counted in this order
Look = tuple[Union[int, None], int, int]  # the tick that was found, up to which tick all are expired, how many rows


class View(Rows):
    """The reads of the turns, on a connection that can only read.

    Each read takes all its rows or closes its statement, because an open statement would let the WAL grow for ever.
    Each read ends at the tick that was announced last, because later messages are not visible to anybody yet.
    """

    def __init__(self, path: str, database: sqlite3.Connection, clock: Callable[[], int], tail: Tail) -> None:
        super().__init__(path, database)
        self.clock, self.tail = clock, tail

    def is_expired(self, message: Message) -> bool:
        return message.expires is not None and message.expires <= self.clock()

    def has_room(self) -> bool:
        """Will the disk have more than RESERVE_BYTES for messages, after the WAL is folded into the database?

        The room of removed messages counts as free. The WAL has no limit: while readers are busy it only grows.
        """
        if self.path == ":memory:":
            return True
        disk = os.statvfs(self.path)
        free = disk.f_bavail * disk.f_frsize
        if free < 64 * RESERVE_BYTES:  # with more, asking the database is not worth its time
            pages = "(freelist_count - page_count) * page_size FROM pragma_freelist_count, pragma_page_count"
            [unused] = self.ask(f"SELECT {pages}, pragma_page_size")
            free += unused + os.path.getsize(self.path)
        return bool(free >= RESERVE_BYTES)

    def after(self, poll: Poll, upto: int) -> tuple[list[Message], int | None]:
        """The messages that a poll wants above its cursor and up to `upto`, oldest first.

        The read stops at the poll's limit, after as many bytes as the poll has room for, and after MAX_MESSAGES, wanted
        or not. Then the second value is the tick it got to; it is None when nothing is left.
        """
        found: list[Message] = []
        reached, end, room = 0, upto, poll.room
        rows: Any = self.merged(PLACED_ROW, dict.fromkeys(poll.places(), poll.since), upto)
        if poll.me is None:
            rows, end = self.log(poll, upto)
        with contextlib.closing(rows):
            for looked, row in enumerate(rows):
                if len(found) == poll.limit or room < 0 or looked == MAX_MESSAGES:
                    return found, reached
                message = self.checked(row)
                reached = row[0]
                room -= len(row[4] or "")  # of its text, which was read also if nobody wants it
                if message and poll.wants(message) and not self.is_expired(message):
                    found.append(message)
        return found, end if end < upto else None

    LOOKED = 5000  # messages that are looked at for one answer to an observer; its token may not see most of them

    def log(self, poll: Poll, upto: int) -> tuple[sqlite3.Cursor, int]:
        """The rows for an observer, and up to which tick. SQLite passes over those that its token may not see."""
        sees, some = poll.sees or OPEN, "SELECT tick FROM messages WHERE tick > ? ORDER BY tick LIMIT 1 OFFSET ?"
        [end] = (None if sees.operator else self.ask(some, poll.since, self.LOOKED - 1)) or [upto]
        only = f"tick > ? AND tick <= ? AND {SEES}"
        rows = f"SELECT {ROW} FROM messages CROSS JOIN mailboxes ON mailbox = id WHERE {only} ORDER BY tick"
        return self.database.execute(rows, (poll.since, min(end, upto), *sees.values())), min(end, upto)

    def removed_up_to(self, poll: Poll) -> dict[tuple[str, str], int]:
        """How far retention has come in each mailbox that the poll looks at."""
        where, values = "", list[Any]()
        if poll.me is not None:
            where = f"AND channel = ? AND name IN ({', '.join('?' * len(poll.names))})"
            values = [poll.channel, *poll.names]
        known = f"typeof(removed) = 'integer' AND removed > 0 {where}"
        rows = self.database.execute(f"SELECT channel, name, removed FROM mailboxes WHERE {known}", values)
        return {(channel, own): tick for channel, own, tick in rows.fetchall()}

    def oldest(self, channel: str, own: str, mark: int) -> int | None:
        """The oldest tick of a mailbox above a mark."""
        return (self.first("places.tick", (channel, own), mark) or (None,))[0]

    def receipt(self, message: Message, kind: int) -> tuple[str, int] | None:
        """Which reader moved a mark over this message, and when."""
        above = f"mailbox = {MAILBOX} AND kind = ? AND tick BETWEEN ? AND ? ORDER BY tick LIMIT 1"
        values = message.channel, message.to, kind, message.tick, message.tick if kind == ALONE else 1 << 62
        row: tuple[str, int] | None = self.ask(f"SELECT reader, at FROM receipts WHERE {above}", *values)
        if row and not (all(map(is_name, str(row[0]).split("/"))) and isinstance(row[1], int)):
            self.damaged(f"who read {message.tick:x}")
            return None
        return row

    def count_up_to(self, channel: str, own: str, tick: int) -> int | None:
        """The number (n) of the last message of a mailbox up to `tick`; None if nothing is retained."""
        below = self.first("n", (channel, own), 0, tick, only=SOUND_N, backwards=True)
        row = below or self.first("n - 1", (channel, own), tick, only=SOUND_N)
        return int(row[0]) if row else None

    def sizes(self, channel: str, own: str, above: int, upto: int, at: int) -> Generator[tuple[Any, ...], None, None]:
        """Each message of a mailbox between two ticks: tick, sender, bytes, and whether it had not expired then.

        Exhaust or close it, as mail().
        """
        columns = f"messages.tick, sender, length(text), {ALIVE.replace('?', str(at))}"
        return self.mail(columns, (channel, own), above, upto)

    def look(self, channel: str, own: str, upto: int, most: int, above: int) -> Look:
        """The oldest message of a mailbox between two ticks that is not expired. It passes over `most`, and no more.

        Then the next one counts as not expired.
        """
        now, reached, looked = self.clock(), above, 0
        with contextlib.closing(self.mail("messages.tick, expires", (channel, own), above, upto)) as rows:
            for looked, (tick, expires) in enumerate(rows, 1):
                if expires is None or expires > now or looked > most:
                    return tick, reached, looked
                reached = tick
        return None, reached, looked

    def lineage(self, tick: int) -> tuple[int, int]:
        """The tick that began the chain of replies of a message, and its depth; a removed message begins a new one."""
        row = self.ask("SELECT ifnull(thread, tick), depth FROM messages WHERE tick = ?", tick)
        where = f"the place of {tick:x} in its thread"
        return (self.number(row[0], tick, where), self.number(row[1], 0, where)) if row else (tick, 0)

    def count_expired(
        self, channel: str, own: str, above: int, since: Expiry, now: int, most: int
    ) -> tuple[int, Expiry, int]:
        """How many messages of a mailbox above a tick expired after `since` and up to `now` (wall clock, us).

        It looks at `most`, above the tick or not. Returns also up to where, and at how many it has looked.
        """
        some = f"mailbox = {MAILBOX} AND (expires, tick) > (?, ?) AND expires <= ? ORDER BY expires, tick LIMIT ?"
        values = channel, own, *since, now, most
        some = f"FROM (SELECT expires, tick FROM messages WHERE {some})"
        looked, found = self.ask(f"SELECT count(*), ifnull(sum(tick > ?), 0) {some}", above, *values)
        upto = self.ask(f"SELECT expires, tick {some} LIMIT 1 OFFSET ?", *values, looked - 1) if looked else since
        return found, upto if looked == most else (now, SOUND), looked

    def count_gone(self, channel: str, own: str, above: int, upto: int, counted: Expiry) -> tuple[int, int]:
        """Of the messages of a mailbox between two ticks: how many had been counted as expired, and how many it has.

        If the second number is above COUNTED_READ, there are more.
        """
        with contextlib.closing(self.mail("expires, messages.tick", (channel, own), above, upto)) as rows:
            ends = [*islice(rows, self.COUNTED_READ + 1)]
        return sum(end is not None and (end, tick) <= counted for end, tick in ends), len(ends)

    COUNTED_READ = 1000  # messages: 2 ms

    def mailboxes(self, last: int) -> list[tuple[Any, ...]]:
        """A row for each mailbox: channel, name, own, read, fetched, seen, removed, n, newest, perishable."""
        rows = self.database.execute(
            "SELECT channel, name, own, read, fetched, seen, removed, "
            "EXISTS(SELECT 1 FROM messages WHERE mailbox = id AND expires > 0) FROM mailboxes"
        ).fetchall()
        newest = self.newest()
        whole = ((*row[:7], *newest[row[:2]][1:], row[7]) for row in rows)
        return [mailbox for mailbox in (self.sound(row, last) for row in whole) if mailbox]

    def sound(self, row: tuple[Any, ...], last: int) -> tuple[Any, ...] | None:
        """The row of a mailbox without its damaged marks; None if its name is damaged.

        If a mark is damaged, too many messages count as unread. If the mark of retention is damaged, all missing
        messages count as removed: a needless gap is better than one that no reader is told of.
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
            removed = (self.oldest(channel, called, 0) or last + 1) - 1
        return (channel, called, own or 0, read, fetched or read or 0, seen or 0, removed, *marks[5:])


def check_names(path: str) -> None:
    """Unusable, if this path is not the one whole name of a database."""
    if os.path.exists(path) and os.stat(path).st_nlink > 1:
        raise Unusable(f"{path} has several names (hard links), each with its own log: remove all names but one")
    if os.path.exists(restoring(path)) or (os.path.exists(f"{path}.new") and not os.path.exists(path)):
        raise Unusable(f"a restore of {path} was cut off: run it again ({called('restore')} COPY)")


def restoring(path: str) -> str:
    """A file that exists while restore renames files; in it is the name that the old database gets."""
    return f"{path}.restoring"


def locked(path: str) -> IO[str]:
    """The file PATH.lock, locked until it is closed or this process ends. A reader with sqlite3 needs no lock."""
    with or_unusable(f"cannot use the database {path}", partial(unwritable, path)):
        lock = open_beside(f"{path}.lock")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            by = lock.readline().strip() or "another bus_server"  # State.sign() wrote it
            raise InUse(f"the database {path} is in use by {by}: stop that bus, or give another --db") from None
        lock.truncate(0)  # it may name a bus that was killed
    return lock


def check_is_ours(database: sqlite3.Connection, path: str) -> None:
    """Unusable, if another program has made this database. An empty one is nobody's yet."""
    [version] = database.execute("PRAGMA user_version").fetchone()
    tables, ours = database.execute("SELECT count(*), total(name = 'bus') FROM sqlite_master").fetchone()
    if tables and not (version and ours):
        raise Unusable(f"{path} is not a database of agent-bus: choose another --db")


def prepare(database: sqlite3.Connection, path: str, journal: str) -> None:
    """Open for durable writing, check that this was granted, and bring the schema up to date."""

    def ask(statement: str) -> Any:
        return database.execute(statement).fetchone()[0]

    check_is_ours(database, path)
    version = ask("PRAGMA user_version")
    if version > len(MIGRATIONS):
        raise Unusable(f"the database {path} was made by a newer bus_server (schema {version}): use that newer version")
    database.execute("PRAGMA fullfsync=ON")  # macOS: fsync alone leaves the data in the disk's own memory
    database.execute("PRAGMA synchronous=FULL")
    database.execute("PRAGMA secure_delete=FAST")  # Debian's SQLite would write zeros over all that is removed
    if ask(f"PRAGMA journal_mode={journal}") != journal or ask("PRAGMA synchronous") != 2:
        raise Unusable(f"the database {path} cannot be written durably here: is this a network file system?")
    small = bool(version) and journal == "wal" and os.path.getsize(path) <= CHECKED_BYTES
    if small:
        mend(database, path, version)
    database.execute("BEGIN IMMEDIATE")
    migrate(database, MIGRATIONS[version:])
    if not version:
        database.execute("INSERT INTO bus(id, last) VALUES (?, 0)", (secrets.token_hex(8),))
    if version < INDEX_IN_RUNS:
        build_index(database)
    elif sound_runs(database) is None or (small and not index_is_whole(database)):
        say(f"bus_server: the index by mailbox of {path} is damaged; making it anew")
        renew_index(database)
    database.execute(f"PRAGMA user_version={len(MIGRATIONS)}")
    database.execute("COMMIT")
    # A WAL found here may have a part that an fsync failed to write. The system has that part in memory, marked as
    # written; a power cut would remove it and everything after it. Folding the WAL into the database writes it again.
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def mend(database: sqlite3.Connection, path: str, version: int) -> None:
    """If the file is damaged, make its indexes anew. Unusable if that does not help."""

    def check() -> str:
        return str(database.execute("PRAGMA integrity_check(1)").fetchone()[0])

    report = check()
    if report == "ok":
        return
    say(f"bus_server: the database {path} is damaged ({report}); rebuilding its indexes")
    with contextlib.suppress(sqlite3.DatabaseError):
        if version >= INDEX_IN_RUNS:
            database.execute("BEGIN IMMEDIATE")
            renew_index(database)
            database.execute("COMMIT")
        database.execute("REINDEX")
        database.execute("VACUUM")  # frees the pages of what was forgotten
        report = check()
    if report != "ok":
        raise Unusable(f"the database {path} is damaged ({report}): restore a backup, or move it away")


def renew_index(database: sqlite3.Connection) -> None:
    """Make the index anew, in the transaction of the caller. DROP would fail on damaged pages."""
    database.execute("PRAGMA writable_schema=ON")
    database.execute("DELETE FROM sqlite_master WHERE tbl_name IN ('places', 'runs')")
    database.execute("PRAGMA writable_schema=RESET")
    migrate(database, [INDEX_TABLES])
    build_index(database)


def index_is_whole(database: sqlite3.Connection) -> bool:
    """Has the Index all places that it should have, and no others?"""
    return bool(database.execute(IN_PLACES).fetchone() == database.execute(IN_MESSAGES).fetchone())


def sound_runs(database: sqlite3.Connection) -> list[Run] | None:
    """The runs in the order of ticks; None if one of them is damaged."""
    rows = database.execute("SELECT run, level, upto, checksum FROM runs ORDER BY upto").fetchall()
    runs = [Run(*row[:3]) for row in rows]
    return runs if [row[3] for row in rows] == list(map(run_checksum, runs)) else None


def run_checksum(run: Run) -> int:
    return zlib.crc32(repr(tuple(run)).encode())


def write_run(database: sqlite3.Connection, number: int, level: int, upto: int) -> None:
    run = Run(number, level, upto)
    database.execute("INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?)", (*run, run_checksum(run)))


def build_index(database: sqlite3.Connection) -> None:
    """Make one run of all messages. A database of an older version had the index `in_order`, whose order is right."""
    database.execute("INSERT INTO places SELECT 1, mailbox, tick FROM messages ORDER BY mailbox, tick")
    [upto] = database.execute("SELECT max(tick) FROM messages").fetchone()
    if upto:
        write_run(database, 1, 3, upto)
    database.execute("DROP INDEX IF EXISTS in_order")


def commits_in_wal(path: str) -> list[int]:
    """The numbers of the frames in a write-ahead log that say that they end a transaction; the first frame is 1.

    The format is SQLite's (fileformat2.html, section 4). A frame belongs to the log if it, or one behind it, has the
    salts of its head.
    """
    commits: list[int] = []
    last = 0  # the last frame with these salts; what is behind it, an older log has left
    with contextlib.suppress(OSError, Planted), opened_beside(path) as wal:
        head = wal.read(32)
        size, salts = int.from_bytes(head[8:12], "big"), head[16:24]
        first = wal.read(24)
        if wal_checksum(head[:24]) != head[24:]:  # the head itself is damaged
            salts = first[8:16]
            size = max(wal.read(1 << 17).find(salts) - 8, 0)  # of a page, which is at most 64 KiB
        for number in count(1):
            wal.seek(32 + (number - 1) * (24 + size))
            frame = wal.read(24)
            if len(frame) < 24:
                break
            if frame[8:16] == salts:
                last = number
            if frame[4:8] != b"\0\0\0\0":
                commits.append(number)
    return [number for number in commits if number <= last]


def wal_checksum(data: bytes) -> bytes:
    order: Any = "big" if data[3:4] == b"\x83" else "little"  # as the magic number says
    one = two = 0
    for start in range(0, len(data) - 7, 8):
        one = (one + int.from_bytes(data[start : start + 4], order) + two) & 0xFFFFFFFF
        two = (two + int.from_bytes(data[start + 4 : start + 8], order) + one) & 0xFFFFFFFF
    return one.to_bytes(4, "big") + two.to_bytes(4, "big")


def migrate(database: sqlite3.Connection, steps: Iterable[str]) -> None:
    """Run the statements of these steps; a statement ends with a semicolon at the end of a line."""
    for step in steps:
        for statement in re.split(r";(?: *--.*)?\n", step):
            database.execute(statement)


# ── Mailboxes ────────────────────────────────────────────────────────────────────────────────────────────────────────
# How far each name has read, and which connections wait for what. All of it is in memory, and only the loop uses it. A
# waiting connection has a record (Parked), and is listed under each place where it waits, for example a mailbox. To add
# a kind of waiting, write a record with the members of Parked, park it with Bus.park(), and put the functions that
# answer it into Bus.waits.

GRACE = 10.0  # s after its hold in which a reader still counts as listening: the time to print and to poll again
PARKED_PER_NAME = 8  # connections that wait alike for one name; older ones have probably broken without a sign


class Reader(Protocol):
    """Who gets messages: a Parked, or the reader in `delivers` of an Answer."""

    @property
    def channel(self) -> str | None: ...

    @property
    def who(self) -> str:
        """Its name in a Receipt."""

    def present(self) -> Sequence[str]:
        """The names that count as listening while it waits, its own first. It gets the mail of these."""


class Parked(Reader, Protocol):
    """The record of a connection that waits: what it waits for, and for whom."""

    @property
    def hold(self) -> float:
        """s"""

    @property
    def token(self) -> str:
        """The id of the token that let it in."""

    def places(self) -> Sequence[Key]:
        """Where it waits: mailboxes, EVERYTHING, (REPLIES, tick), or what an extension looks up itself."""

    def wants(self, message: Message) -> bool: ...


class Unfetched:
    """The messages of a mailbox between two ticks, counted; without those that had expired by then."""

    __slots__ = ("above", "at", "by_sender", "counts_senders", "messages", "size", "upto")

    def __init__(self, above: int, by_sender: bool, at: int) -> None:
        self.above = self.upto = above
        self.messages = self.size = 0  # size: bytes
        self.at = at  # wall clock, us
        self.counts_senders = by_sender
        self.by_sender: dict[str, tuple[int, int]] = {}  # the same of each sender

    def recalled(self, message: Message) -> None:
        if self.above < message.tick <= self.upto and (message.expires is None or message.expires > self.at):
            self.add(message.sender, -1, -len(message.text))

    def is_much(self) -> bool:
        return self.messages >= MUCH_MESSAGES or self.size >= MUCH_BYTES

    def add(self, sender: str, messages: int, size: int) -> None:
        self.messages += messages
        self.size += size
        if self.counts_senders:
            before, size_before = self.by_sender.pop(sender, (0, 0))
            if before + messages:
                self.by_sender[sender] = before + messages, size_before + size


class Mailbox:
    """One name on one channel, and how far its messages were read. Values are ticks unless a comment says otherwise."""

    __slots__ = (
        "above address base below expired fetched firm gone listening n newest own pending perishable reached read "
        "removed seen sent until"
    ).split()
    own: bool
    read: int | None
    fetched: int
    seen: int  # wall clock, us
    removed: int
    n: int  # of the newest message
    newest: int
    perishable: bool  # a message in it has or had a ttl

    NEW = (False, None, 0, 0, 0, 0, 0, False)

    def __init__(self, *stored: Any) -> None:
        values = stored or self.NEW
        self.own, self.read, self.fetched, self.seen, self.removed, self.n, self.newest, self.perishable = values
        self.above = (0, 0)  # above a hole: between these ticks messages were delivered
        self.reached = self.fetched  # highest tick delivered, above holes too; later messages fill the mailbox
        self.firm = bool(stored)  # it has a row on disk, or should get one; else it was only looked at
        self.base = None if self.removed else 0  # a mark whose messages are counted; None: they are to be counted
        self.below = 0  # how many messages lie up to `base`
        self.expired: tuple[int, Expiry, int] | None = None  # above which mark, counted up to where, how many
        self.gone = (0, 0, 0)  # above the one tick, up to the other, all messages were expired then (wall clock, us)
        self.pending: Unfetched | None = None  # None: to be counted
        self.sent = 0  # of the last message that this name sent, if an extension notes it
        self.address = ""  # of the reader that polled last
        self.listening = 0  # wall clock, us: since when without a break
        self.until = 0.0  # monotonic clock, s: when it stops to count as listening

    def has_room(self) -> bool:
        """Is it counted, up to now, and far from full? Else Sending.check_room() finds out whether it has room."""
        known = self.pending
        return known is not None and known.upto == self.newest and known.above == self.reached and not known.is_much()

    def mark(self) -> int:
        """Messages above this tick are unread: the owner's cursor or, if it is only read as a group, `fetched`."""
        return (self.read or 0) if self.own else self.fetched

    def oldest(self, mark: int, now: int, look: Callable[[int], Look]) -> tuple[int | None, int]:
        """The oldest message above a mark that is not expired, and how many were looked at. `look`: View.look().

        It begins where the last look has ended, unless the clock stepped back since then. `now`: wall clock, us.
        """
        low, high = self.gone[:2] if self.gone[2] <= now else (0, 0)
        found, reached, looked = look(max(mark, high) if low <= mark else mark)
        if low <= mark <= high or mark <= low <= reached:
            low, high = min(low, mark), max(high, reached)
        elif reached > mark:
            low, high = mark, reached
        self.gone = low, high, now
        return found, looked

    def recalled(self, message: Message) -> None:
        """Its sender took this message back: correct what was counted."""
        self.perishable = True
        mark, upto, known = self.expired or (message.tick, (0, 0), 0)
        was_counted = message.expires is not None and (message.expires, message.tick) <= upto
        if message.tick > mark and not was_counted and upto >= (RECALLED, message.tick):  # else it will be counted
            self.expired = mark, upto, known + 1
        if self.pending:
            self.pending.recalled(message)


class Mailboxes:
    """All mailboxes, and the connections that are parked. Used by the loop only; the clock is passed in.

    A parked reader is a connection and its Poll, listed under each place where it waits. It has no thread and no task.
    """

    def __init__(self, clock: Callable[[], float], state: State, holds: Callable[[str], bool]) -> None:
        self.clock, self.wall, self.look = clock, state.view.clock, state.view.look
        self.holds = holds  # Gate.holds
        self.lost = state.lost  # up to this tick messages may be lost by damage
        self.forgotten = state.forgotten  # highest tick removed from a forgotten mailbox, which has no mark any more
        self.boxes = {(row[0], row[1]): Mailbox(*row[2:]) for row in state.view.mailboxes(state.last)}
        self.ordered = sorted(self.boxes)  # their keys
        self.removed = max((box.removed for box in self.boxes.values()), default=0)  # no message above was removed
        self.highest = max((box.newest for box in self.boxes.values()), default=0)
        self.changed: set[tuple[str, str]] = set()  # mailboxes whose marks are newer than on disk
        self.receipts: dict[tuple[str, str, int | str], Receipt] = {}  # newer than on disk
        self.back: Callable[[str, str, int], tuple[int, int | None]] = lambda *_: (0, None)  # see unread()
        self.on_fetched: list[Callable[[str, str, int, int], None]] = []  # see note()
        self.parked: dict[Connection, Parked] = {}
        self.exclusive: set[type] = set()  # kinds of Parked: a message goes to only one of these that wait for it
        self.waiting: dict[Key, tuple[Connection] | dict[Connection, None]] = {}  # by place; a dict if several wait
        # Polls for whose mailboxes messages came, before they are told: these messages, a list for each mailbox.
        self.behind: OrderedDict[Connection, list[list[Message]]] = OrderedDict()

    def box(self, channel: str, own: str) -> Mailbox:
        box = self.boxes.get(key := (channel, own))
        if box is None:
            box = self.boxes[interned(key)] = Mailbox()
            insort(self.ordered, interned(key))
        return box

    def keys(self, after: tuple[str, str]) -> Iterator[tuple[str, str]]:
        """The mailboxes that come after one, in the order of channel and name."""
        return islice(self.ordered, bisect_right(self.ordered, after), None)

    def drop(self, keys: Iterable[tuple[str, str]]) -> None:
        for key in keys:
            box = self.boxes.pop(key, None)
            if box:
                self.forgotten = max(self.forgotten, box.removed)
                del self.ordered[bisect_left(self.ordered, key) : bisect_right(self.ordered, key)]

    def new(self, channel: str, names: Sequence[str]) -> int:
        """How many of these names have no mailbox yet. `all` counts only if it is the one name: each poll has it."""
        return sum((channel, own) not in self.boxes for own in names if own != EVERYONE or len(names) == 1)

    def of(self, reader: Reader) -> Iterator[tuple[str, Mailbox]]:
        """The mailboxes a reader listens to, its own first, with their names; their marks are about to change."""
        channel = str(reader.channel)
        for own in reader.present():
            self.changed.add((channel, own))
            yield own, self.box(channel, own)

    # Presence and marks

    def polled(self, reader: Parked, address: str, wall: int) -> None:
        now = self.clock()
        for _, box in self.of(reader):
            if box.until < now:
                box.listening = wall
            box.until = max(box.until, now + (reader.hold or HOLD) + GRACE)
            box.seen, box.address = wall, address

    def owned(self, poll: Poll) -> None:
        """The first name of a poll is the reader's own. Until now it may have been a group, which has another mark."""
        if poll.me != EVERYONE:  # `all` is nobody's own
            self.box(str(poll.channel), poll.names[0]).own = True

    def left(self, parked: Parked, grace: float = GRACE) -> None:
        """A reader hung up, or says that it leaves: its names listen for `grace` s only, unless another waits there."""
        for own in parked.present():
            if (str(parked.channel), own) not in self.waiting:
                box = self.box(str(parked.channel), own)
                box.until = min(box.until, self.clock() + grace)

    def online(self, box: Mailbox) -> bool:
        """From the start of its last poll until GRACE after its hold. Presence is derived, never declared."""
        return self.clock() < box.until

    def presented(self, poll: Poll) -> None:
        """The cursor says that the reader has its own mailbox up to there. It says nothing about other mailboxes."""
        if poll.me in (None, EVERYONE):
            return
        own = self.box(str(poll.channel), str(poll.me))
        self.changed.add((str(poll.channel), str(poll.me)))
        own.firm = own.firm or poll.since > 0
        if own.read is None or own.read < poll.since:
            if own.newest > (own.read or 0):
                self.note(str(poll.channel), str(poll.me), ACKNOWLEDGED, poll.since, poll.who)
            own.read = poll.since
        self.fetched(poll, str(poll.me), own, poll.since)

    def delivered(self, reader: Reader, tick: int) -> None:
        """An answer with messages up to `tick` was written out whole, or they were handed to a worker.

        A mark says that everything up to it was delivered. So it does not move over a hole: in a group's mailbox, the
        messages between its mark and the reader's cursor were not delivered.
        """
        for own, box in self.of(reader):
            box.reached = max(box.reached, tick)
            if own == EVERYONE:  # it is nobody's own mailbox, and has no marks
                self.note(str(reader.channel), own, FETCHED, tick, reader.who)
                continue
            since = reader.since if isinstance(reader, Poll) and own != reader.me else 0
            if since > box.fetched:
                look = partial(self.look, str(reader.channel), own, since, self.LOOKED_FOR_HOLE)
                if box.oldest(box.fetched, self.wall(), look)[0]:
                    low, high = box.above
                    box.above = min(low or since, since), max(high, tick)
                    continue
            self.fetched(reader, own, box, tick)

    def fetched(self, reader: Reader, own: str, box: Mailbox, tick: int) -> None:
        box.reached = max(box.reached, tick)
        if tick > box.fetched:
            if box.newest > box.fetched:  # else the receipt is for no message, and nothing would ever remove it
                self.note(str(reader.channel), own, FETCHED, tick, reader.who)
            box.fetched = tick
        mark = box.mark()
        if mark >= box.newest:  # then it need not be counted
            box.base, box.below = mark, box.n

    def came(self, message: Message) -> int:
        """Highest tick that a reader has of the message's mailbox or, for a message to `all`, that any reader has."""
        box = self.box(message.channel, message.to)
        return box.reached if message.to == EVERYONE else max(box.fetched, box.read or 0)

    def note(self, channel: str, own: str, kind: int, tick: int, reader: str) -> None:
        """Mail was fetched: keep a receipt, and tell between which ticks. Each way to fetch a message ends here."""
        if own != EVERYONE or kind == ALONE:
            receipt = made(Receipt, (channel, own, kind, tick, reader, self.wall()))
            if kind != ALONE or receipt.slot() not in self.receipts:  # the first reading counts
                self.receipts[receipt.slot()] = receipt
        for tell in self.on_fetched if kind != ACKNOWLEDGED else ():  # what is acknowledged becomes fetched as well
            tell(channel, own, tick - 1 if kind == ALONE else 0, tick)

    def resume(self, poll: Poll, first: int | None, last: int) -> Poll:
        """A poll with `since=last` starts at its name's cursor or, without one, at the `first` tick of its mailbox."""
        box = self.box(str(poll.channel), str(poll.me))
        if box.read is not None:
            return poll._replace(since=box.read)
        if box.removed:
            return poll._replace(since=box.removed - 1)  # one below, so that the gap is reported
        return poll._replace(since=last if first is None else first - 1)

    def perhaps_forgotten(self, poll: Poll) -> bool:
        """Has the reader a cursor, and reads a name without a row? Then the name may have been forgotten."""
        names = [own for own in poll.names if own != EVERYONE]
        return poll.since > 0 and not all(self.box(str(poll.channel), own).firm for own in names)

    def gap(self, poll: Poll, perhaps_forgotten: bool = False) -> tuple[int, int] | None:
        """From the cursor to the last message that retention removed, if that is ahead of the cursor."""
        if poll.since >= max(self.removed, self.lost, self.forgotten):
            return None  # without a look at each of many mailboxes
        if poll.me is None:
            boxes = [
                box
                for (channel, own), box in self.boxes.items()
                if poll.channel in (None, channel) and (not poll.names or own in poll.names)
            ]
        else:
            boxes = [self.box(str(poll.channel), own) for own in poll.names]
        removed = max((box.removed for box in boxes), default=0)
        removed = max(removed, self.lost, self.forgotten if poll.me is None or perhaps_forgotten else 0)
        return (poll.since, removed) if removed > poll.since else None

    def note_removed(self, removed: dict[Any, int]) -> None:
        for key, tick in removed.items():
            box = self.boxes.get(key)
            if box:  # else its name on the disk is damaged
                box.removed, box.base, box.below, box.expired = max(box.removed, tick), None, 0, None
                self.removed = max(self.removed, tick)
                if box.pending and box.pending.above < tick:
                    box.pending = None

    LOOKED_FOR_HOLE = 1000  # messages: 1 ms
    SLICE = 500  # marks, and receipts, in one transaction: 6 ms

    def take_marks(self) -> list[Mark]:
        """A slice of the marks that changed since they were taken."""
        changed = [self.changed.pop() for _ in range(min(len(self.changed), self.SLICE))]
        boxes = [(key, self.boxes[key]) for key in changed if key in self.boxes and self.boxes[key].firm]
        return [Mark(*key, box.own, box.read, box.fetched, box.seen) for key, box in boxes]

    def take_receipts(self) -> list[Receipt]:
        """A slice of the receipts, the oldest. They stay known until they are on the disk: marks_saved()."""
        return list(islice(self.receipts.values(), self.SLICE))

    LOOKED_SECONDS = 600.0  # s that a name stays in memory if it was only looked at

    def idle(self, keys: Iterable[tuple[str, str]], wall: int, keep: int) -> list[list[str]]:
        """Drop the names that were only looked at; returns those with a row, without mail, not polled for `keep` us."""
        looked_at, gone = [], []
        for key in keys:
            box = self.boxes[key]
            quiet = wall - max(box.seen, box.sent)
            if key in self.waiting or box.newest > box.removed or self.online(box):
                continue
            if not box.firm and quiet > ((keep or math.inf) if box.sent else self.LOOKED_SECONDS * 1000000):
                looked_at.append(key)
            elif box.firm and keep and min(quiet, wall - box.removed - keep) > keep and box.mark() >= box.removed:
                # until then a reader of the name may still have to be told of a gap
                gone.append([*key])
        self.drop(looked_at)
        return gone

    # Messages and parked connections

    def add(self, visible: list[Message]) -> None:
        for tick, channel, to, sender, text, n, expires, _ in visible:
            box = self.boxes.get((channel, to)) or self.box(channel, to)
            if box.pending and box.pending.upto >= box.newest:  # else it will be counted
                box.pending.add(sender, 1, len(text))
                box.pending.upto = tick
            box.newest, box.n, box.firm = tick, n, True
            if expires is not None:
                box.perishable = True
                if box.expired and (expires, tick) <= box.expired[1]:  # the clock stepped back
                    box.expired = None
        if visible:
            self.highest = visible[-1].tick

    def park(self, connection: Connection, parked: Parked) -> None:
        self.parked[connection] = parked
        for own in parked.present():
            self.box(str(parked.channel), own).firm = True
        for key in parked.places():
            here = self.waiting.setdefault(interned(key), (connection,))  # most are alone; a dict takes 180 bytes more
            if connection not in here:
                several = self.waiting[key] = here if isinstance(here, dict) else dict.fromkeys(here)
                several[connection] = None

    def unpark(self, connection: Connection) -> Parked:
        parked = self.parked.pop(connection)
        self.behind.pop(connection, None)
        for key in parked.places():
            here = self.waiting[key]
            if len(here) == 1:
                del self.waiting[key]
            else:
                del here[connection]
        return parked

    def surplus(self, parked: Parked) -> list[Connection]:
        """The oldest of those that wait in the same way for the same name, if there are many: their peers have gone."""
        here = self.waiting[parked.places()[0]]
        if type(parked) in self.exclusive or len(here) <= PARKED_PER_NAME:
            return []
        its = type(parked), parked.who
        return [each for each in here if (type(self.parked[each]), self.parked[each].who) == its][:-PARKED_PER_NAME]

    def wake(self, visible: list[Message]) -> dict[Connection, list[Message]]:
        """The parked connections that these messages are for, each with its messages in order: but no observers.

        Polls are no part of the result: from now on they are `behind`.
        """
        woken: dict[Connection, list[Message]] = {}
        came: dict[Key, list[Message]] = {}
        for message in visible if self.waiting else ():
            for key in ((message.channel, message.to), (REPLIES, message.answers or 0)):
                if key in self.waiting:
                    came.setdefault(key, []).append(message)
        for place, messages in came.items():
            left = iter(messages)
            for connection in self.waiting[place]:
                parked = self.parked[connection]
                if isinstance(parked, Poll):
                    self.behind.setdefault(connection, []).append(messages)
                    continue
                alone = type(parked) in self.exclusive
                wanted = (message for message in (left if alone else messages) if parked.wants(message))
                most = int(self.holds(parked.token)) if alone else None  # 0: it is about to be closed
                its = [*islice(wanted, most)]
                woken.update({connection: its} if its else {})
        return woken


def news(mailboxes: Mailboxes, poll: Poll) -> Poll | None:
    """The poll, for only those names that have a message above its cursor; None if nobody has. It asks no disk."""
    if poll.me is None:
        return poll if mailboxes.highest > poll.since else None
    names = tuple([own for own in poll.names if mailboxes.box(str(poll.channel), own).newest > poll.since])
    return poll._replace(names=names) if names else None


# ── Bus ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
# Sending and receiving. An endpoint checks its request in a turn and gives an operation to the Ledger. After the commit
# Bus.announce() makes new messages visible, wakes their readers, and answers the request of each operation. To add an
# endpoint, register it in core_routes() or, in an extension, with Bus.route().

NAMES_PER_READER = 16
COPIES_PER_SEND = 5000  # messages times names in one request: 40 ms of one transaction
COUNTED_EXPIRED = 20000  # expired messages counted at once, to tell how many are unread: 2 ms
LOOKS = 260  # at the disk, for one list of names or the answers of one announcement: 10 to 20 ms
ROWS_PER_LOOK = 20  # messages that take as long to read as one look
LOOKS_EACH = 60  # that one name in a list may take; with fewer left, the list ends
TIDY_SECONDS = 60.0  # between two searches for messages and names that are too old
TELL_SECONDS = 600.0  # between two lines on stderr about a full disk
MARKS_SECONDS = 1.0  # s a mark may be newer in memory than on disk; after a crash `since=last` repeats that much
DRAIN_SECONDS = 10.0  # for accepted sends to be committed and answered after SIGTERM


class Figures:
    """Counts and times of the work since the start of the bus. metrics.py shows them."""

    def __init__(self) -> None:
        self.sends = self.messages = self.delivered = self.commits = 0
        self.commit_seconds = self.slowest_commit = 0.0
        self.refused: Counter[int] = Counter()  # by status

    def committed(self, sends: int, applied: Applied, seconds: float) -> None:
        self.sends += sends
        self.messages += len(applied.visible)
        self.commits += 1
        self.commit_seconds += seconds
        self.slowest_commit = max(self.slowest_commit, seconds)


Then = Callable[[Any, Any, Any], Union[Answer, None]]
Undone = Callable[[Any], None]


class Step(NamedTuple):
    """An operation that is to be applied, and the functions that are called afterwards.

    `then(connection, operation, result)` returns the answer, or None if nobody waits for one. If the operation was
    refused, or its list failed, the connection gets the error as its answer, and `undone(operation)` is called.
    """

    operation: Operation
    connection: Connection | None
    then: Then
    undone: Undone | None


operation_in, by_rank = attrgetter("operation"), attrgetter("operation.rank")


class Ledger:
    """The queue of operations. Those of one turn are one list, one transaction and one fsync. Owned by the loop.

    Invariant: one list at a time is applied and announced, so lists are announced in the order of their commits. While
    a list is being applied, every new operation waits in the next list.
    """

    WAITING, WAITING_EACH = 64 << 20, 16 << 20  # bytes of large sends that wait for their commit: in all, for one owner
    LARGE = 4096  # bytes
    KEEPS = ""  # where each text stays, also if it is replaced in the file

    def __init__(self, bus: Bus) -> None:
        self.bus, self.loop, self.state = bus, bus.loop, bus.state
        self.next: list[Step] = []
        self.out: list[Step] = []  # the list that is being applied
        self.planned = False  # commit() is called at the end of this turn
        self.told = -math.inf  # when our stderr was told of a full disk, on the monotonic clock, s
        self.waiting = Shares(self.WAITING, self.WAITING_EACH)
        self.large: dict[int, tuple[str, int]] = {}  # by the id of an operation: its owner, and its bytes in `waiting`
        # By the kind of an operation: what follows in memory, in a turn, if another front of this bus made it.
        self.elsewhere: dict[str, Callable[[Any, Any], object]] = {}

    def add(self, step: Step) -> None:
        self.next.append(step)
        self.plan()

    def plan(self) -> None:
        """Commit when all sockets of this turn were read: they share a transaction."""
        if self.next and not self.planned and not self.out:
            self.loop.soon(self.commit)
            self.planned = True  # only now: if the line above raises, the next step plans

    def put(self, drafts: list[Draft], owner: str) -> Put:
        """The operation that stores these drafts; 503 if too much of this owner, or of all, waits for the disk."""
        operation = Put(drafts)
        size = sum([len(one.text) * len(one.to) for one in drafts])
        if size > self.LARGE:
            copied = size - sum([len(one.text) for one in drafts])  # a list may have 64 names, and each gets a copy
            if copied:
                self.bus.storms.pay(owner, work=copied)
            if self.waiting.is_full(owner, min(size, self.WAITING_EACH)):  # a larger one passes if no other waits
                raise unavailable("too many bytes wait for the disk of the bus: nothing was stored, try again", 2)
            self.waiting.add(owner, size)
            self.large[id(operation)] = owner, size
        return operation

    def count_out(self, steps: list[Step]) -> None:
        """These wait no longer."""
        for step in steps if self.large else ():
            owner, size = self.large.pop(id(step.operation), ("", 0))
            self.waiting.add(owner, -size)

    def idle(self) -> bool:
        return not self.next and not self.out

    def drain(self) -> None:
        """The bus is about to end. A Front waits for what it shares, but not for ever."""

    def removes(self) -> bool:
        """Does the list that is being applied remove messages?"""
        return bool(self.out) and type(self.out[-1].operation) is Remove

    LARGE_RESULTS = 16  # in one list: they are in memory together, and are answered in one turn

    def next_list(self) -> list[Step]:
        large = [number for number, step in enumerate(self.next, 1) if step.operation.is_large]
        return self.next[: large[self.LARGE_RESULTS - 1]] if len(large) >= self.LARGE_RESULTS else self.next[:]

    def commit(self) -> None:
        taken = self.next_list()
        steps = sorted(self.bus.entitled(taken), key=by_rank)
        del self.next[: len(taken)]
        self.out, self.planned = steps, False  # only now: what comes before could add a step, and plan
        if not steps:
            self.loop.attempt(self.count_out, taken)
            self.plan()
            return
        began = time.monotonic()
        outcome: Applied | Exception
        try:
            outcome = self.apply([step.operation for step in steps])
        except Exception as error:
            outcome = error
        seconds, self.out = time.monotonic() - began, []
        self.loop.attempt(self.count_out, taken)
        self.state.view.tail = self.state.tail  # only now: until then a turn needs the older one
        self.loop.insist(self.plan)  # what came while the deputy served
        if not self.loop.attempt(self.bus.announce, steps, outcome, seconds):
            for step in steps:
                if not step.connection or step.connection.phase is BUSY:
                    self.loop.attempt(self.bus.not_concluded, (step, None))

    def note_room(self, operations: list[Operation]) -> None:
        """Without room nothing of these is stored, and the operator is told."""
        if self.state.view.has_room():
            return
        for operation in operations:
            if type(operation) is Put:
                operation.room = False
        if time.monotonic() > self.told + TELL_SECONDS:
            self.told = time.monotonic()
            say(f"bus_server: {no_room().sentence}")

    def apply(self, operations: list[Operation]) -> Applied:
        """The effects of a list. A Front does this in another way: its list goes through a ledger that it shares."""
        self.note_room(operations)
        now = self.bus.clock.now()
        applied: list[Applied] = []
        self.loop.aside(lambda: applied.append(self.state.apply(operations, now)))
        return applied[0]


Endpoint = Callable[[Request], Union[Answer, None]]


class Route(NamedTuple):
    """An endpoint. `says` is its line in the help at GET /."""

    call: Endpoint
    says: str
    takes: bool = False  # GET takes messages or waits for them, so HEAD says nothing
    sink: Callable[[Request], Sink] | None = None  # where its body goes, when it is too large for memory


class Waits(NamedTuple):
    """The functions that answer one kind of Parked. They return None if the answer comes later."""

    found: Callable[[Connection, Any, list[Message]], Answer | None]  # there are messages for it
    over: Callable[[Connection, Any], Answer | None]  # its hold is over, or its peer sends no more


Metric = tuple[str, str, str, Iterable[tuple[str, float]]]  # its name, kind and help; labels and values


class Bus:
    """The work after a commit, and the lists that extensions add to. Owned by the loop; no method waits. It is an App.

    Invariants:
    - The request of an operation is answered after the commit, never before.
    - `now` is never above a message that its reader did not get: reads stop at `last`, the highest announced tick.
    - If it is unknown whether a list was stored, its senders get 503 and the bus ends. If it certainly was not stored
      (the disk or the memory is full, or another program has locked the file), they get an error and the bus goes on.
    - A token is checked again when the list with its operation is about to be applied: see entitled().
    """

    def __init__(self, state: State, gate: Gate, storms: Storms, *, max_body: int, keep: float, verbose: bool) -> None:
        self.state, self.view, self.gate, self.storms = state, state.view, gate, storms
        self.max_body, self.verbose = max_body, verbose
        self.last = state.last  # the highest tick that was announced
        self.loop = Loop()
        self.door, self.ledger = Door(self, self.loop), Ledger(self)
        self.clock = Clock(state.view.clock, state.last)
        self.mailboxes = Mailboxes(time.monotonic, state, gate.holds)
        self.figures = Figures()
        self.sending, self.receiving, self.retention = Sending(self), Receiving(self), Retention(self, keep)
        self.withheld: dict[Step, Message] = {}  # messages that no cursor may pass until the step is announced
        # The same for all sends of one announcement: truth() of receivers, everybody() on a channel, unread().
        self.truths: dict[tuple[str, tuple[str, ...], str], str] = {}
        self.readers: dict[str, tuple[int, int]] = {}
        self.unread: dict[Mailbox, int] = {}
        # In this announcement, or for this list of names: expired messages that may still be counted, and LOOKS left.
        self.countable = self.looks = 0
        self.draining = self.broken = self.saving = False  # saving: save_marks() is planned, or follows a commit
        self.sure = True  # each message was told to Mailboxes and its readers; if not, each poll looks at the disk
        # The seams: what the core and the extensions register.
        self.routes: dict[tuple[str, str], Route] = {}
        self.waits: dict[type, Waits] = {Poll: Waits(self.receiving.poll_answer, self.receiving.poll_over)}
        self.checks: list[Callable[[list[Any]], None]] = []  # Refused if one of these messages may not be sent
        self.states: list[Callable[[Message], tuple[str, str] | None]] = []  # how far a message came
        self.about: list[Callable[[Grant, str, str, Mailbox], str]] = []  # further JSON about a name in /agents
        self.unknown: list[Callable[[Draft, str], str]] = []  # further JSON about a receiver that is not known
        self.on_polled: list[Callable[[Request, Poll], None]] = []
        self.on_announced: list[Callable[[list[Message]], object]] = []
        self.on_lost: list[Callable[[Any, int], None]] = []  # an answer with `delivers` did not arrive whole
        self.on_tidy: list[Callable[[], None]] = []
        self.metrics: list[Callable[[], Iterable[Metric]]] = []
        self.metrics_by_name: list[Callable[[list[Key]], Iterable[Metric]]] = []  # of these mailboxes: those of a page
        self.listeners: list[tuple[str, Listener]] = []  # each with its URL
        self.extensions: dict[str, str] = dict.fromkeys(ELSEWHERE, "")  # why each is not loaded; "": it is not there
        core_routes(self)

    def route(self, method: str, path: str, call: Endpoint, says: str = "", **more: Any) -> None:
        """Register an endpoint, as a Route. A path that ends with / is followed by an id. A later route wins."""
        self.routes[method, path] = Route(call, says, **more)

    # What connections ask: it is an App

    def admit(self, request: Request) -> None:
        head = request.parsed
        request.grant = self.gate.admit(head)
        endpoint = request.endpoint = self.routes.get(head.asks)
        may_be_large = head.command == "GET" and head.route not in self.gate.public
        if may_be_large and self.door.is_full(request.peer, ANSWER_BYTES, request.grant.token):
            raise unread_answers()
        if endpoint and endpoint.sink:
            request.sink = endpoint.sink(request)
        elif head.length > self.max_body:
            raise Refused(413, f"{head.length} bytes are over {self.max_body}, so nothing was stored: send a file")
        elif head.length > HEAD_BYTES and not endpoint:
            self.answer(request)  # refuses it; nobody would read the body

    def answer(self, request: Request) -> Answer | None:
        method = request.command
        route: Route | None = request.endpoint
        if method == "OPTIONS":
            return Answer(204, b"", headers=(("Allow", ", ".join(self.allowed(request))),))
        if not route:
            if method not in request.METHODS:
                raise Refused(501, f"the method {method} is not supported")
            allowed = self.allowed(request)
            raise Refused(405, f"{request.route} takes {' or '.join(allowed)}", ("Allow", ", ".join(allowed)))
        if method == "HEAD" and route.takes:
            return Answer(200, b"")
        if len(request.body) <= HEAD_BYTES:
            return route.call(request)
        with self.storms.parsing(request.owner(), len(request.body)):
            return route.call(request)

    def allowed(self, request: Request) -> list[str]:
        methods = [method for method, route in self.routes if route == request.route]
        if methods:
            return [*methods, *(["HEAD"] if "GET" in methods else []), "OPTIONS"]
        for extension, brings in ELSEWHERE.items():
            if request.route in brings:
                raise Refused(404, missing(request.route, extension, self.extensions[extension]))
        raise Refused(404, f"there is nothing at {request.parsed.path.partition('?')[0]}: GET / lists the endpoints")

    def over(self, connection: Connection) -> Answer | None:
        if connection.ends_if_revoked():
            return None
        parked = self.mailboxes.unpark(connection)
        if connection.ended:
            self.mailboxes.left(parked)
        return self.waits[type(parked)].over(connection, parked)

    def left(self, connection: Connection) -> None:
        if connection in self.mailboxes.parked:  # else it was woken, and its answer failed
            self.mailboxes.left(self.mailboxes.unpark(connection))

    def delivered(self, reader: Reader, tick: int) -> None:
        self.mailboxes.delivered(reader, tick)
        self.save_marks_soon()

    def lost(self, reader: Any, tick: int) -> None:
        for tell in self.on_lost:
            tell(reader, tick)

    def check_token(self, token: str) -> None:
        if not self.gate.holds(token):
            raise self.gate.unauthorized(token)

    def answered(self, connection: Connection, answer: Answer) -> None:
        if answer.status >= 400:
            self.figures.refused[answer.status] += 1
        if len(answer.body) > HEAD_BYTES:
            parked, _ = answer.delivers or ("", 0)  # what waits has no request
            reader = connection.request.reader if connection.request else getattr(parked, "me", "")
            times = self.storms.ESCAPING if answer.kind.startswith("text/") else 1
            self.storms.worked(connection.owner(), reader, len(answer.body) * times)
        if self.verbose:
            (connection.request or Request(connection, b"")).log(answer)

    # Operations

    def do(self, operation: Operation, connection: Connection | None, then: Then, undone: Undone | None = None) -> Step:
        """Apply an operation with the next list; see Step for what follows."""
        if connection and connection.request and connection.request.is_large():
            connection.request.shrink()
        step = made(Step, (operation, connection, then, undone))
        self.ledger.add(step)
        return step

    def entitled(self, steps: list[Step]) -> list[Step]:
        """The steps whose tokens are valid; the others are refused now."""
        if not self.gate.tokens.closed:  # if tokens have come since, sweep() sees them
            return steps
        self.gate.tokens.refresh()
        revoked = [step for step in steps if step.connection and not self.gate.holds(step.connection.token or "")]
        for step in revoked:
            self.withheld.pop(step, None)
        self.settle((step, self.gate.unauthorized(step.connection.token or "")) for step in revoked if step.connection)
        return [step for step in steps if step not in revoked] if revoked else steps

    def announce(self, steps: list[Step], outcome: Applied | Exception, seconds: float) -> None:
        """A list was applied, or has failed: answer everyone who waited for it, readers first."""
        if self.withheld:
            for step in steps:
                self.withheld.pop(step, None)
        if isinstance(outcome, Exception):
            refused = outcome if isinstance(outcome, Refused) else self.failed(outcome)
            self.settle((step, refused) for step in steps)
            return
        sure, self.sure = self.sure, False
        self.last = outcome.last
        self.figures.committed([*map(type, map(operation_in, steps))].count(Put), outcome, seconds)
        added = self.loop.attempt(self.mailboxes.add, outcome.visible)
        if not added:
            for each in outcome.visible:
                self.loop.attempt(self.mailboxes.add, [each])
        for tell in self.on_announced:
            self.loop.attempt(tell, outcome.visible)
        noted = not outcome.removed or self.loop.attempt(self.mailboxes.note_removed, outcome.removed)
        self.truths, self.readers, self.unread = {}, {}, {}
        self.countable, self.looks = COUNTED_EXPIRED, LOOKS
        woken = not self.mailboxes.parked or self.loop.attempt(self.wake, outcome.visible)
        self.sure = sure and added and noted and woken
        self.settle(zip(steps, outcome.results))

    def wake(self, visible: list[Message]) -> None:
        alive = [each for each in visible if each.expires is None or not self.view.is_expired(each)]
        self.loop.each(self.found, lambda found: found[0].fail(), self.mailboxes.wake(alive).items())
        self.receiving.catch_up()
        for connection in self.mailboxes.waiting.get(EVERYTHING, ()) if visible else ():
            connection.soon(partial(self.receiving.observe, connection, visible))

    def found(self, found: tuple[Connection, list[Message]]) -> None:
        connection, messages = found
        if messages and not connection.ends_if_revoked():
            parked = self.mailboxes.unpark(connection)
            connection.answer(self.waits[type(parked)].found(connection, parked, messages))

    def settle(self, results: Iterable[tuple[Step, Any]]) -> None:
        """Answer each step. If one raises an exception, the others must be answered all the same."""
        self.loop.each(self.conclude, self.not_concluded, results)

    def conclude(self, concluded: tuple[Step, Any]) -> None:
        (operation, connection, then, undone), result = concluded
        try:
            if isinstance(result, Refused):
                answer: Answer | None = refusal(result)
                if undone:
                    undone(operation)
            else:
                answer = then(connection, operation, result)
        except Refused as refused:
            answer = refusal(refused)
        if connection:
            connection.answer(answer)

    def not_concluded(self, concluded: tuple[Step, Any]) -> None:
        step, _ = concluded
        if step.connection:
            step.connection.fail()
        else:
            self.conclude((step, our_fault()))

    def failed(self, error: Exception) -> Refused:
        """The error for the senders of a list that could not be applied."""
        if isinstance(error, MemoryError) and (self.state.stale or self.state.last == self.last):
            # The file has nothing new, or the next list finds out whether it has.
            return unavailable("the bus has no memory left: nothing was stored, try again", 2)
        if isinstance(error, sqlite3.OperationalError):
            if "full" in str(error):
                return no_room()
            if "unable to open" in str(error):  # a file for temporary data, before any commit
                return unavailable("the bus has no file descriptor left: nothing was stored, try again", 2)
            if "locked" in str(error):
                why = "another program has locked the database of the bus"
                return unavailable(f"{why}: nothing was stored, try again", 2)
        if not isinstance(error, (sqlite3.Error, OSError, MemoryError)):
            say_exception(error)
        say(f"bus_server: {self.state.path}: {error}; stopping, because later messages could be lost")
        self.broken = True
        return Refused(503, "the bus could not write to its disk, and does not know whether the request was stored")

    def park(self, connection: Connection, parked: Parked, patience: float = math.inf) -> None:
        """Let it wait until something arrives for it, its hold is over, or `patience` (s) has passed."""
        if not self.verbose:
            connection.request = None  # what waits is small: its record says it all
        self.mailboxes.park(connection, parked)
        connection.wait(PARKED, min(parked.hold, patience))
        for other in self.mailboxes.surplus(parked):
            other.wait(PARKED, 0)  # not answered in here, as each may ask again
        if not self.gate.holds(parked.token):
            connection.soon(connection.ends_if_revoked)  # the token was revoked during a commit

    def check_open(self) -> None:
        if self.draining:
            raise shutting_down()

    # Housekeeping

    def save_marks_soon(self) -> None:
        if not self.saving:
            self.loop.later(MARKS_SECONDS, self.save_marks)
            self.saving = True

    def save_marks(self) -> None:
        """Save a slice of them. If that is not all, the next one follows its commit."""
        self.saving = max(len(self.mailboxes.changed), len(self.mailboxes.receipts)) > self.mailboxes.SLICE
        used, self.gate.tokens.used = self.gate.tokens.used, {}
        marks = Marks(self.mailboxes.take_marks(), self.mailboxes.take_receipts(), used)
        self.do(marks, None, partial(marks_saved, self, self.saving), self.not_saved)

    def not_saved(self, marks: Marks) -> None:
        """The disk was full or locked: they are saved a second later, with what is newer."""
        self.saving = False
        self.mailboxes.changed.update(mark[:2] for mark in marks.marks)
        self.gate.tokens.used = {**marks.used, **self.gate.tokens.used}
        self.save_marks_soon()

    def sweep(self) -> None:
        for look in (self.door.sweep, self.look_at_tokens, self.retention.look_for_request):
            self.loop.attempt(look)

    def look_at_tokens(self) -> None:
        self.gate.tokens.refresh()
        if self.gate.tokens.changed:
            self.door.evict()
            self.gate.tokens.changed = False

    def tidy(self) -> None:
        if self.draining:
            return
        for tidy in (self.retention.forget_names, self.retention.age, *self.on_tidy):
            self.loop.attempt(tidy)
        if self.gate.tokens.used:
            self.save_marks_soon()

    def drain(self) -> None:
        """The bus is about to end: answer all parked connections, refuse new requests, finish the accepted ones."""
        if not self.draining:
            self.draining = True
            self.ledger.drain()
            self.door.drain()

    def end(self) -> None:
        """Wait until all connections are answered and closed, and the marks are saved."""
        self.drain()
        deadline = time.monotonic() + DRAIN_SECONDS
        self.loop.run(lambda: not self.door.connections or time.monotonic() > deadline)
        self.save_marks()
        self.loop.run(self.ledger.idle)


def marks_saved(bus: Bus, more: bool, connection: None, marks: Marks, result: None) -> None:
    """These receipts are on the disk, unless a newer one has taken the place of one. Then the next slice follows."""
    known = bus.mailboxes.receipts
    for each in marks.receipts:
        if known.get(each.slot()) == each:
            del known[each.slot()]
    if more:
        bus.save_marks()


def nothing_follows(connection: None, operation: Operation, result: Any) -> None:
    """For a Step that nobody waits for."""


class Sending:
    """Makes drafts of the body of a send, checks if they may be stored, and makes the answer. Owned by the loop."""

    def __init__(self, bus: Bus) -> None:
        self.bus, self.view, self.mailboxes, self.storms = bus, bus.view, bus.mailboxes, bus.storms
        self.rows = self.COUNTED  # that this send, or action, may still look at
        self.uncounted: dict[Mailbox, tuple[str, str]] = {}  # to be counted by actions

    COUNTED = 10000  # messages that one send, or one action, looks at to count what nobody has fetched: 10 to 20 ms

    def drafts(self, request: Request) -> tuple[list[Draft], bool]:
        """The messages in a request, each of them valid, and whether it was an array of them."""
        self.bus.check_open()
        if not request.body:
            raise Refused(400, "the body is empty: send JSON, or any text with ?from=NAME&to=NAME")
        query = request.query()
        if request.parsed.form and ("to" in query.fields or request.body.lstrip()[:1] not in b"{["):
            raise Refused(400, "the body is a form: send the text itself with curl --data-binary")
        raw = "to" in query.fields or ("from" in query.fields and request.body.lstrip()[:1] not in b"{[")
        value: Any = verbatim(request.body, query) if raw else parse_json(request.body)
        several = isinstance(value, list)
        messages: list[Any] = value if several else [value]
        if request.grant.name:
            messages = [request.grant.sign(message) for message in messages]
        for check in self.bus.checks:
            check(messages)
        if isinstance(value, dict) and value.get("to") == "" and not self.view.has_room():
            raise no_room()  # the doctor asks with a message to nobody, which is refused in any case
        key = request.fields.get("idempotency-key")
        drafts = []
        for message in messages:
            one = draft(message, key)
            if len(one.text) > MESSAGE_BYTES:
                why = f"an answer with this message would have {len(one.text)} bytes, and the limit is {MESSAGE_BYTES}"
                raise Refused(413, f"{why}; nothing was stored")
            if one.answers is not None:  # it has a place in a chain of replies
                thread, depth = self.view.lineage(one.answers)
                one = one._replace(thread=thread, depth=depth + 1)
            drafts.append(one)
        return drafts, several

    def check(self, owner: str, drafts: list[Draft]) -> str:
        """Refused, if these messages cannot be stored together and now; else a warning, or an empty text.

        A refused send stores nothing. Cheap checks come first.
        """
        bus, boxes = self.bus, self.mailboxes.boxes
        each: list[Way] = [(one.channel, one.sender, to) for one in drafts for to in one.to]
        if len(each) != 1:
            check_number(drafts, len(each))
            each = list(dict.fromkeys(each))  # check once what is the same for many messages
        self.rows, is_counted = self.COUNTED, True
        new: set[tuple[str, str]] = set()  # channels and names of no mailbox
        senders = {drafts[0].sender: 1} if len(drafts) == 1 else Counter(one.sender for one in drafts)
        for sender, messages in senders.items():
            bus.storms.spend(sender, messages)
        for channel, sender, to in each:
            if (channel, sender) not in boxes:
                new.add((channel, sender))
            box = boxes.get((channel, to))
            if not box:
                new.add((channel, to))
            elif box.reached >= box.newest:
                box.pending = None  # all is fetched: the next count has fewer messages than this one would take off
            elif not box.has_room() and not self.check_room(box, channel, sender, to):
                is_counted = False
        if not is_counted:
            raise unavailable("the bus counts the messages that nobody has fetched: nothing was stored, try again", 1)
        return bus.storms.check(drafts, each, new, owner)

    def check_room(self, box: Mailbox, channel: str, sender: str, to: str) -> bool:
        """Is it known whether a mailbox has room?

        429 if it is full of unfetched messages, or nearly full with over a quarter from this sender.
        """
        pending = self.unfetched(box, channel, to)
        is_old = pending and pending.is_much() and pending.at < self.view.clock() - RECOUNT_SECONDS * 1000000
        if pending and is_old and pending.messages <= self.rows:  # else a later send counts; until then it is too many
            box.pending = None  # since then some may have expired
            pending = self.unfetched(box, channel, to, pending.counts_senders)
        if not pending:
            return False
        messages, size = pending.messages, pending.size
        if messages >= MAILBOX_MESSAGES or size >= MAILBOX_BYTES:
            raise too_much(f"the mailbox of {to} is full: wait until readers fetch some of its {messages} messages", 60)
        if not pending.is_much():
            return True
        pending = self.unfetched(box, channel, to, by_sender=True)
        own_messages, own_size = pending.by_sender.get(sender, (0, 0)) if pending else (0, 0)
        if own_messages > MAILBOX_MESSAGES // 4 or own_size > MAILBOX_BYTES // 4:
            own = f"{own_messages} of its {messages} unfetched messages are from {sender}"
            raise too_much(f"the mailbox of {to} is nearly full, and {own}: wait until they are fetched", 60)
        return pending is not None

    def unfetched(self, box: Mailbox, channel: str, to: str, by_sender: bool = False) -> Unfetched | None:
        """Counted once, until all is fetched; meanwhile, what was fetched since the last count is taken off.

        None if that is more than it may look at: actions go on.
        """
        pending = box.pending
        if not pending or pending.upto < box.reached or (by_sender and not pending.counts_senders):
            pending = box.pending = Unfetched(box.reached, by_sender, self.view.clock())
        known = True  # else they are too many
        if pending.above < box.reached and not self.bus.ledger.removes():  # else some may be gone already
            pending.above = self.count(channel, to, pending, -1, pending.above, box.reached)
            known = pending.above == box.reached
        if pending.upto < box.newest:
            pending.upto = self.count(channel, to, pending, 1, pending.upto, box.newest)
        is_counted = pending.upto >= box.newest
        if not (known and is_counted):
            self.uncounted[box] = channel, to
            self.plan()
        return pending if is_counted and (known or not pending.is_much()) else None

    def count(self, channel: str, to: str, pending: Unfetched, sign: int, above: int, upto: int) -> int:
        """Count the messages between two ticks as more or as less, and return how far it came."""
        with contextlib.closing(self.view.sizes(channel, to, above, upto, pending.at)) as rows:
            for tick, sender, size, is_alive in islice(rows, self.rows):
                self.rows -= 1
                above = tick
                if is_alive:
                    pending.add(sender, sign, sign * size)
        return upto if self.rows else above

    def plan(self) -> None:
        if self.uncounted and self.count_on not in self.bus.loop.actions:
            self.bus.loop.soon(self.count_on)

    def count_on(self) -> None:
        self.rows = self.COUNTED // 10  # others wait for each action
        if self.uncounted:  # after an error it is called again, and there may be none left
            box, (channel, to) = self.uncounted.popitem()
            self.unfetched(box, channel, to, bool(box.pending and box.pending.counts_senders))
        self.plan()

    def answer(self, warning: str, several: bool, connection: Connection, put: Put, stored: list[Stored]) -> Answer:
        if several:
            each = "}, {".join([entry(self.bus, one, its) for one, its in zip(put.drafts, stored)])
            results = f'"ok": true, "results": [{{{each}}}]'
        else:
            results = entry(self.bus, put.drafts[0], stored[0])
        return ok(self.bus, f'{results}, "warning": {quote(warning)}' if warning else results)


class Receiving:
    """Answers a poll with messages, or parks it until there are some. Owned by the loop.

    Invariant: no message is announced between the read of a poll and its parking, because look() does both in one
    turn.
    """

    def __init__(self, bus: Bus) -> None:
        self.bus, self.view, self.mailboxes = bus, bus.view, bus.mailboxes

    def check(self, poll: Poll) -> None:
        """400 if its cursor is far ahead; before anything of the poll is noted."""
        if poll.since > max(self.bus.last, self.view.clock() + AHEAD):
            raise Refused(400, f"since is over {AHEAD // 1000000} s ahead of this bus's clock: give seconds since 1970")

    def look(self, request: Request, poll: Poll) -> Answer | None:
        """The answer to a poll, now or later. If its cursor is ahead of `last`, first `last` is raised, durably."""
        if poll.since == NOW:
            return delivery(self.bus, poll._replace(since=self.bus.last), [])
        if poll.since <= self.bus.last:
            return self.read_or_park(request, poll)

        def raised(connection: Connection, operation: Raise, result: None) -> Answer | None:
            return None if connection.transport.closing else self.read_or_park(request, poll)

        self.bus.do(Raise(poll.since), request.peer, raised)
        return None

    def read_or_park(self, request: Request, poll: Poll) -> Answer | None:
        perhaps_forgotten = self.mailboxes.forgotten > poll.since and self.mailboxes.perhaps_forgotten(poll)
        self.mailboxes.presented(poll)
        found, reached = self.read_new(poll)
        self.note_removed(poll)
        gap = self.mailboxes.gap(poll, perhaps_forgotten)
        if found or reached or gap or not poll.hold or self.bus.draining:
            return delivery(self.bus, poll, found, reached, gap)
        if request.peer.ended:  # the reader went away during the commit of its cursor
            self.mailboxes.left(poll)
            return delivery(self.bus, poll, [])
        self.bus.park(request.peer, poll._replace(token=request.grant.token))
        return None

    def peek(self, poll: Poll, ack: bool) -> Answer:
        """The answer to a poll that takes nothing: nothing becomes fetched. If `ack`, its cursor is presented."""
        ack = ack and poll.since > 0
        poll = poll._replace(since=self.bus.last if poll.since == NOW else min(poll.since, self.bus.last))
        if ack:
            self.mailboxes.owned(poll)
            self.mailboxes.presented(poll)
            self.bus.save_marks_soon()
        found, reached = self.read(poll)
        self.note_removed(poll)
        gap = self.mailboxes.gap(poll, self.mailboxes.perhaps_forgotten(poll))
        return delivery(self.bus, poll, found, reached, gap)._replace(delivers=None)

    def read(self, poll: Poll) -> tuple[list[Message], int | None]:
        """The messages for a poll, up to a withheld one: no reader gets that message, and no cursor passes it."""
        withheld = [each.tick for each in self.bus.withheld.values() if poll.covers(self.bus.last, each)]
        upto = min(withheld, default=self.bus.last + 1) - 1
        found, reached = self.view.after(poll, upto)
        if withheld and not reached:
            reached = found[-1].tick if found else upto
        return found, reached

    def read_new(self, poll: Poll) -> tuple[list[Message], int | None]:
        """The same, without a look at the disk where there can be none."""
        may_have = news(self.mailboxes, poll) if self.bus.sure else poll
        return self.read(may_have) if may_have else ([], None)

    def note_removed(self, poll: Poll) -> None:
        """A message that the current commit removes must already count as a gap for readers that look now."""
        if self.bus.ledger.removes():
            self.mailboxes.note_removed(self.view.removed_up_to(poll))

    def catch_up(self) -> None:
        """Answer the polls that are behind. There may be many, and many messages: the rest comes in the next turn."""
        self.bus.loop.each(self.bus.found, lambda found: found[0].fail(), self.bus.loop.timely(self.fresh()))
        if self.mailboxes.behind and self.catch_up not in self.bus.loop.actions:
            self.bus.loop.soon(self.catch_up)

    def fresh(self) -> Iterator[tuple[Connection, list[Message]]]:
        """Each poll that is behind, with the messages that it wants. Who takes only some finds the others next time."""
        while self.mailboxes.behind:
            connection, came = self.mailboxes.behind.popitem(last=False)
            poll = self.mailboxes.parked[connection]
            yield connection, [message for message in sorted(sum(came, [])) if poll.wants(message)]

    def observe(self, connection: Connection, visible: list[Message]) -> None:
        """An observer that may want one of these messages reads the log as if it polled now; else its cursor moves.

        There may be many observers and messages. So this is an action for each observer.
        """
        poll = self.mailboxes.parked.get(connection)
        if isinstance(poll, Poll) and poll.me is None and not connection.ends_if_revoked():  # else it was answered
            found, reached = self.read(poll) if any(map(poll.wants, visible)) else ([], None)
            if found or reached:
                self.mailboxes.unpark(connection)
                connection.answer(delivery(self.bus, poll, found, reached))
            elif self.bus.sure:
                self.mailboxes.parked[connection] = poll._replace(since=max(poll.since, visible[-1].tick))

    def poll_over(self, connection: Connection, poll: Poll) -> Answer:
        """Its hold is over. It gets now what has not woken it: see `sure`; or its turn is still to come."""
        return delivery(self.bus, poll, *self.read_new(poll))

    def poll_answer(self, connection: Connection, poll: Poll, messages: Sequence[Message] = ()) -> Answer:
        """The messages of a commit that woke this poll, up to the limits of one answer."""
        count = min(poll.limit, 1 + bisect_right([*accumulate([len(message.text) for message in messages])], poll.room))
        return delivery(self.bus, poll, messages[:count], messages[count - 1].tick if count < len(messages) else None)


class Retention:
    """Removes messages that are older than --keep or that `prune` asks to remove. Both removals may run at once."""

    def __init__(self, bus: Bus, keep: float) -> None:
        self.bus, self.keep = bus, keep  # s; 0: for ever
        self.aging = False  # a removal of --keep is being applied
        self.looked: float | None = None  # wall clock, s, at the last look
        self.steady = 0.0  # monotonic clock, s, at the last look
        self.trusted = -math.inf  # wall clock, s: from then on the clock is believed
        self.request: tuple[int, bool] | None = None  # the request of prune that is being applied

    def remove(self, removal: Remove, end: Callable[[bool], None], wanted: Callable[[], bool] = lambda: True) -> None:
        """Remove slice after slice while it is wanted, then call `end`, with True if nothing is left to remove."""

        def removed(connection: None, removal: Remove, reached: int | None) -> None:
            if reached is None or self.bus.draining or not wanted():
                end(reached is None)
            else:
                self.remove(removal.next(reached), end, wanted)

        self.bus.do(removal, None, removed, lambda _: end(False))

    JUMP = 3600.0  # s; a wall clock that jumps by more is believed only after as long, if it stays
    SLACK = 10.0  # s; by so much each clock may be corrected, however short --keep is

    def clock_is_trusted(self) -> bool:
        """A clock that is wrong for a minute must not remove all mail: it may jump by a quarter of --keep at most."""
        wall, steady = self.bus.view.clock() / 1000000, time.monotonic()
        most = max(self.keep / 4, self.SLACK) if self.keep else math.inf
        jump = min(self.JUMP, most)
        if self.looked is None:  # the bus has just started; nobody may have sent for some hours
            # What was sent just now proves nothing: it had the same clock. What is a little older must be young enough
            # for the jump that is allowed below, or a clock that is right would never be trusted.
            just = min(self.JUMP, most / 2)
            [tick] = self.bus.view.ask("SELECT max(tick) FROM messages WHERE tick < ?", int((wall - just) * 1000000))
            self.looked, self.steady = (tick or self.bus.last) / 1000000 or wall, steady
            jump = min(self.JUMP * 24, most)
        moved = wall - self.looked - (steady - self.steady)
        self.looked, self.steady = wall, steady
        if abs(moved) > jump:
            self.trusted = wall + self.JUMP
            since = f"the clock moved by {moved:.0f} s since the last look or message"
            say(f"bus_server: {since}: nothing is removed for an hour, in case it is wrong")
        return wall >= self.trusted

    def age(self) -> None:
        """Remove what is older than --keep."""
        if self.clock_is_trusted() and self.keep and not self.bus.draining and not self.aging:
            before = max(self.bus.view.clock() - int(self.keep * 1000000), 0)
            self.bus.do(ForgetKeys(before), None, self.forgot_keys, lambda _: self.aged(False))
            self.aging = True  # only now: if the line above raises, it is tried again

    def forgot_keys(self, connection: None, forget: ForgetKeys, keys: int) -> None:
        """Go on with the next slice; after the last one, with the messages."""
        if keys == forget.slice and not self.bus.draining:
            self.bus.do(forget, None, self.forgot_keys, lambda _: self.aged(False))
        else:
            absent = [each for each in self.bus.view.extensions() if self.bus.extensions.get(each) != LOADED]
            self.remove(Remove(0, forget.before, False, absent, forget.before), self.aged)

    def aged(self, whole: bool) -> None:
        self.aging = False

    NAMES = 200  # names looked at in one turn, and forgotten in one transaction: a few ms that a send may have to wait

    def forget_names(self, after: tuple[str, str] = ("", "")) -> None:
        """Forget the names that were only looked at, and the rows of names without mail that nobody polls."""
        if self.bus.draining or not self.clock_is_trusted():
            return
        names = list(islice(self.bus.mailboxes.keys(after), self.NAMES))
        idle = self.bus.mailboxes.idle(names, self.bus.view.clock(), int(self.keep * 1000000))

        def go_on(*forgotten: Any) -> None:
            if forgotten:
                self.forgotten(*forgotten)
            self.bus.loop.later(self.NEXT_SECONDS, partial(self.forget_names, names[-1]))

        if idle:
            self.bus.do(Forget(idle), None, go_on)
        elif names:
            go_on()

    NEXT_SECONDS = 0.002  # s until the next names are looked at

    def forgotten(self, connection: None, forget: Forget, names: list[list[str]]) -> None:
        mailboxes = self.bus.mailboxes
        gone = [(channel, own) for channel, own in names]
        polled = [key for key in gone if key in mailboxes.boxes and mailboxes.online(mailboxes.boxes[key])]
        mailboxes.changed.update(polled)  # meanwhile: their rows are made anew
        mailboxes.drop(key for key in gone if key not in polled)

    def look_for_request(self) -> None:
        """The command prune leaves a file beside the database that says what to remove."""
        if not self.request and not self.bus.draining:
            request = prune_request(self.bus.state.path)
            if request:
                keys_from = self.bus.view.clock() - int(self.keep * 1000000) if self.keep else 0
                self.remove(pruning(self.bus.view, *request, keys_from), self.pruned, self.is_requested)
                self.request = request

    def is_requested(self) -> bool:
        """Is the file still there, with this request? A command that is interrupted takes it back."""
        return prune_request(self.bus.state.path) == self.request

    def pruned(self, whole: bool) -> None:
        """The command waits until its file is gone. After a failure the file stays, and is looked for again."""
        if whole and self.is_requested():  # else there is another one by now
            prune_file(self.bus.state.path).unlink(missing_ok=True)
        self.request = None


def pruning(rows: Rows, before: int, fetched_only: bool, keys_from: int) -> Remove:
    """The operation for a request of the command prune."""
    return Remove(0, before, fetched_only, list(rows.extensions()) if fetched_only else [], keys_from)


def prune_file(database: str) -> pathlib.Path:
    return pathlib.Path(f"{database}.prune")


def prune_request(database: str) -> tuple[int, bool] | None:
    """The request of the command prune: (below this tick, only fetched messages?). None if there is no valid one."""
    try:
        with opened_beside(str(prune_file(database))) as file:
            request = parse_json(file.read())
        before, fetched_only = request["before"], request["fetched_only"]
    except (OSError, Planted, Refused, TypeError, KeyError):
        return None
    fits = type(before) is int and 0 <= before < 1 << 63 and type(fetched_only) is bool
    return (before, fetched_only) if fits else None


# The extensions. The core depends on none; it knows their names, so that it can say which file is missing.

LOADED = "loaded"
ELSEWHERE = {  # extension: the endpoints and options that it brings
    "work": ("/claim", "/ack", "/nack", "/extend", "/again", "--max-attempts"),
    "replies": ("/ask", "/recall", "/thread/"),
    "files": ("/blob/", "--files", "--files-dir"),
    "metrics": ("/metrics",),
    "schemas": ("--schemas", "--strict"),
    "channels": ("/channels",),
    "people": ("/whoami", "/status"),
    "sockets": ("--listen",),
    "digest": ("/digest",),
    "mcp": ("/mcp",),
    "history": (),  # `before` of /log
    "page": ("/ui/", "/activity"),
    "locks": ("/lock", "/renew", "/unlock", "/locks"),
    "search": ("/search",),
    "redact": ("/redact",),
    "later": ("/later",),
    "notify": ("/notices", "--notify", "--notify-dry-run"),
}


def missing(what: str, extension: str, why: str) -> str:
    """The sentence of a 404, or of an option that is not known. `why`: "" or --without."""
    if why:
        return f"{what} is off: this bus was started --without {extension}"
    needs = f"{what} needs bus_extensions/{extension}.py, which is not beside bus_server.py"
    return f"{needs}: copy it from the same version"


# The words of the core's endpoints


def core_routes(bus: Bus) -> None:
    bus.route("POST", "/send", partial(send, bus), "store a message, or an array of them")
    bus.route("GET", "/recv", partial(recv, bus), "messages of NAME after a cursor; wait=25 waits for one", takes=True)
    bus.route("GET", "/log", partial(log, bus), "everybody's messages, for an observer; no cursor moves", takes=True)
    bus.route("GET", "/inbox", partial(inbox, bus), "how many unread messages each name has")
    bus.route("GET", "/agents", partial(agents, bus), "who listens, and when each name was last seen")
    bus.route("GET", "/message/", partial(message, bus), "one message and its state")
    bus.route("GET", "/healthz", partial(healthz, bus), "is the bus running?")
    bus.route("GET", "/", partial(show_help, bus), "this text")
    for client in CLIENTS:
        bus.route("GET", client, partial(show_client, bus, {}))


def send(bus: Bus, request: Request) -> None:
    owner, (drafts, several) = request.owner(), bus.sending.drafts(request)
    warning = bus.sending.check(owner, drafts)
    bus.do(bus.ledger.put(drafts, owner), request.peer, partial(bus.sending.answer, warning, several))


def verbatim(body: bytes, query: Query) -> dict[str, Any]:
    """The message whose text is the body of the request; the query has its other members."""
    fields: dict[str, Any] = {field: query.one(field) for field in query.fields if field not in ("to", "wait")}
    if "ttl" in fields:
        fields["ttl"] = query.number("ttl", 0, 0, math.inf)
    return {**fields, "to": list(query.names("to")), "msg": parse_text(body)}


def check_number(drafts: list[Draft], copies: int) -> None:
    keys = [(one.sender, one.channel, one.key) for one in drafts if one.key]
    if not drafts or len(set(keys)) < len(keys):
        raise Refused(400, "an array needs a message, and each key only once; Idempotency-Key is the key of all")
    if copies > COPIES_PER_SEND:
        raise Refused(400, f"one request stores at most {COPIES_PER_SEND} messages: send several requests")


def recv(bus: Bus, request: Request) -> Answer | None:
    poll = recv_poll(request)
    request.grant.check(poll.names)
    request.reader = str(poll.me)
    bus.storms.read(request.owner(), request.reader)
    if request.query().one("bus") not in (None, bus.state.bus):  # a cursor from another bus: say so, and mark nothing
        return delivery(bus, poll._replace(since=bus.last), [])
    bus.storms.name(request.owner(), bus.mailboxes.new(str(poll.channel), poll.names))
    peek, ack, leave = map(request.query().flag, ("peek", "ack", "leave"))
    resumes = poll.since == LAST
    bus.receiving.check(poll)
    if not (peek or ack or leave):
        for tell in bus.on_polled:  # first, as they may refuse it
            tell(request, poll)
        bus.mailboxes.polled(poll, request.peer.address, bus.view.clock())
        bus.mailboxes.owned(poll)
        bus.save_marks_soon()
    if resumes:
        first = bus.view.oldest(str(poll.channel), str(poll.me), 0)
        bus.receiving.note_removed(poll)
        poll = bus.mailboxes.resume(poll, first, bus.last)
    if leave:
        bus.mailboxes.left(poll, 0.0)
    if peek or ack or leave:
        return bus.receiving.peek(poll, bool(ack) and not resumes)
    return bus.receiving.read_or_park(request, poll) if resumes else bus.receiving.look(request, poll)


def recv_poll(request: Request) -> Poll:
    query = request.query()
    names = query.names("to")
    if not 1 <= len(names) <= NAMES_PER_READER:
        raise Refused(400, f"to must be 1 to {NAMES_PER_READER} names: /recv?to=NAME")
    everyone = () if EVERYONE in names else (EVERYONE,)
    return poll_of(request, names[0], names + everyone, query.name("channel", "default"), None)


def log(bus: Bus, request: Request) -> Answer | None:
    bus.storms.read(request.owner())
    query = request.query()
    if query.one("before") is not None:
        raise Refused(404, missing("/log?before", "history", bus.extensions["history"]))
    poll = poll_of(request, None, query.names("to"), query.name("channel", None), query.name("from", None))
    if poll.since == LAST:
        raise Refused(400, "the bus keeps no cursor for an observer: since must be seconds or 'now'")
    bus.receiving.check(poll)
    sees = None if request.grant.operator else request.grant
    return bus.receiving.look(request, poll._replace(sees=sees, owner=request.owner()))


def poll_of(request: Request, me: str | None, names: tuple[str, ...], channel: str | None, sender: str | None) -> Poll:
    """A poll with these filters, and with `since`, `max`, `wait` and `block` of the query."""
    query = request.query()
    wait, limit = query.number("wait", HOLD, 0, HOLD_MAX), int(query.number("max", 100, 1, MAX_MESSAGES))
    since, block = cursor(query.one("since") or "0"), query.flag("block")
    hold = wait if block or (block is None and query.one("wait") is not None) else 0
    return Poll(me, names, channel, sender, since, limit, hold, request.plain())


def boolean(value: bool) -> str:
    return "true" if value else "false"


def ok(bus: Bus, members: str) -> Answer:
    body = f"{{{members}{ending(bus.last, bus.state.bus)}".encode()
    return made(Answer, (200, body, "application/json", (), None, None))


@lru_cache(1)  # all answers of one announcement have the same: 0.1 us, not 0.7
def ending(now: int, bus: str) -> str:
    return f', "now": {seconds(now)}, "bus": "{bus}"}}\n'


def delivery(
    bus: Bus, poll: Poll, found: Sequence[Message], reached: int | None = None, gap: tuple[int, int] | None = None
) -> Answer:
    """The answer to a poll. `reached`: the last tick that was looked at, if it is not the end."""
    now = reached or max(poll.since, bus.last)
    bus.figures.delivered += len(found)
    delivers = (poll, found[-1].tick) if found and poll.me else None
    if not poll.plain:
        body = in_json(tuple(found), now, bool(reached), gap, bus.state.bus)
        return made(Answer, (200, body, "application/json", (), delivers, None))
    text = "".join(block(json.loads(message.render()), poll.me, bus.view.clock()) for message in found)
    if gap:
        text = f"-- messages from {iso(gap[0])} to {iso(gap[1])} are gone: retention removed them\n{text}"
    headers = (("Bus-Now", seconds(now)), ("Bus-More", boolean(bool(reached))), ("Bus-Id", bus.state.bus))
    return Answer(200, text.encode(), "text/plain; charset=utf-8", headers, delivers)


@lru_cache(1)  # a broadcast has the same bytes for all of its readers
def in_json(found: tuple[Message, ...], now: int, more: bool, gap: tuple[int, int] | None, bus: str) -> bytes:
    lost = f', "gap": {{"from": {seconds(gap[0])}, "to": {seconds(gap[1])}}}' if gap else ""
    messages = ", ".join([message.render() for message in found])
    body = f'{{"messages": [{messages}], "now": {seconds(now)}, "more": {boolean(more)}{lost}, "bus": "{bus}"}}\n'
    return body.encode()


def entry(bus: Bus, one: Draft, stored: Stored) -> str:
    """The result for the sender of one message. One announcement calls truth() once for the same receivers."""
    which = one.channel, one.to, one.sender
    receiver = bus.truths.get(which)
    if receiver is None:
        receiver = bus.truths[which] = truth(bus, one)
    (*others, last), duplicate = stored
    ids = f', "ids": {encode({to: f"{tick:x}" for to, tick in zip(one.to, stored.ticks)})}' if others else ""
    return (
        f'"ok": true, "ts": {seconds(last)}, "channel": "{one.channel}", "id": "{last:x}"{ids}, '
        f'"duplicate": {"true" if duplicate else "false"}, "receiver": {receiver}'
    )


def truth(bus: Bus, one: Draft) -> str:
    """`receiver` in the answer to a send: who of the receivers listens, and how many messages they have not read."""
    to = one.to[0]
    if len(one.to) > 1 or to == EVERYONE:
        counts, strangers = encode(receivers(bus, one)), [own for own in one.to if not known(bus, one, own)]
        unknown = ", ".join(f'"{own}": {{{similar(bus, one, own)[2:]}}}' for own in strangers)
        return f'{counts[:-1]}, "unknown": {{{unknown}}}}}' if unknown else counts
    box = bus.mailboxes.box(one.channel, to)
    seen = seconds(box.seen) if box.seen else "null"
    online, count = boolean(bus.mailboxes.online(box)), unread(bus, one.channel, to, box)
    more = "true" if box.seen or to in bus.gate.tokens.named else f"false{similar(bus, one, to)}"
    return f'{{"online": {online}, "last_seen": {seen}, "unread": {count}, "known": {more}}}'


def known(bus: Bus, one: Draft, own: str) -> bool:
    """Has this receiver ever polled, or a token?"""
    return own == EVERYONE or bus.mailboxes.box(one.channel, own).seen > 0 or own in bus.gate.tokens.named


def similar(bus: Bus, one: Draft, own: str) -> str:
    """What extensions say of a receiver that is not known: further members, as JSON."""
    return "".join([about(one, own) for about in bus.unknown])


def receivers(bus: Bus, one: Draft) -> dict[str, int]:
    """How many of several receivers listen. `all` is everyone who ever listened, except the sender."""
    mailboxes, sender = bus.mailboxes, bus.mailboxes.boxes.get((one.channel, one.sender))
    if EVERYONE in one.to:
        readers, online = everybody(bus, one.channel)
        if sender and sender.own:
            readers, online = readers - 1, online - mailboxes.online(sender)
        return {"online": online, "offline": readers - online}
    boxes = [(own, mailboxes.box(one.channel, own)) for own in one.to]  # a retry may name one that was forgotten
    online = sum(mailboxes.online(box) for _, box in boxes)
    for own, box in boxes:
        if box not in bus.unread:  # one request may name a mailbox in many lists
            bus.unread[box] = unread(bus, one.channel, own, box)
    return {"online": online, "offline": len(boxes) - online, "unread": sum(bus.unread[box] for _, box in boxes)}


def everybody(bus: Bus, channel: str) -> tuple[int, int]:
    """How many read on a channel, and how many of them listen: counted once for all sends of an announcement."""
    if not bus.readers:
        now, ends = bus.mailboxes.clock(), defaultdict[str, list[float]](list)
        for (its, _), box in bus.mailboxes.boxes.items():  # 0.2 us for each, and not 1.4: there may be 100,000
            if box.own:
                ends[its].append(box.until)
        bus.readers = {its: (len(until), sum(end > now for end in until)) for its, until in ends.items()}
    return bus.readers.get(channel, (0, 0))


def unread(bus: Bus, channel: str, own: str, box: Mailbox) -> int:
    """Messages addressed to the name above its mark, less the expired. Broadcasts are not counted.

    And of what lies below it those that came back to a queue: see Mailboxes.back(). When the looks of this answer are
    used up, the number may be too high.
    """
    mark, looks = box.mark(), bus.looks > 0
    back = bus.mailboxes.back(channel, own, mark)[0] if looks else 0
    if mark >= box.newest:
        return back
    if looks and box.base != mark:
        bus.looks -= 1
        counted = bus.view.count_up_to(channel, own, mark)
        box.base, box.below = mark, box.n if counted is None else counted
    below = box.below if (box.base or 0) <= mark else 0
    return back + box.n - below - (box.perishable and expired(bus, channel, own, box, looks))


def expired(bus: Bus, channel: str, own: str, box: Mailbox, looks: bool) -> int:
    """How many of the unread messages are expired. It looks at those that expired or were read since the last count.

    It counts `bus.countable`, and the next look goes on there; until then the others count as unread.
    """
    now, mark = bus.view.clock(), box.mark()
    above, upto, count = box.expired or (mark, (0, 0), 0)
    if above > mark or upto[0] > now:  # the name has an owner now, or the clock stepped back
        above, upto, count = mark, (0, 0), 0
    if not looks:
        return count if above == mark else 0
    if above < mark:
        gone, looked = bus.view.count_gone(channel, own, above, mark, upto)
        bus.looks -= 1 + looked // ROWS_PER_LOOK
        upto, count = (upto, count - gone) if looked <= bus.view.COUNTED_READ else ((0, 0), 0)
    if upto < (now, SOUND):
        found, upto, looked = bus.view.count_expired(channel, own, mark, upto, now, bus.countable)
        bus.looks -= 1
        bus.countable -= looked
        count += found
    box.expired = mark, upto, count
    return count


class Page:
    """Some mailboxes in the order of channel and name; at its end, `more` has the members that say how to go on.

    The query has max, after=CHANNEL/NAME, name and channel; `shows` says whether a mailbox belongs into the list, and
    `names` are all that can. It ends before the answer would take more than WALKED names or LOOKS.
    """

    WALKED = 10000  # names, whether they are listed or not: 10 ms

    def __init__(self, bus: Bus, request: Request, shows: Callable[[str, Mailbox], bool], names: Sequence[str] = ()):
        bus.storms.read(request.owner())
        bus.countable, bus.looks = COUNTED_EXPIRED, LOOKS
        self.bus, self.shows, self.more = bus, shows, ""
        query = request.query()
        self.limit = int(query.number("max", 1000, 1, 1000))
        channel, _, own = (query.one("after") or "").partition("/")
        self.after, self.channel = (channel, own), query.name("channel", None)
        self.names = query.names("name") or names

    def __iter__(self) -> Iterator[tuple[str, str, Mailbox]]:
        """Channel, name and mailbox of each."""
        boxes, listed, last = self.bus.mailboxes.boxes, 0, self.after
        for walked, key in enumerate(self.keys()):
            box = boxes.get(key)
            is_listed = box and self.shows(key[1], box)
            if walked == self.WALKED or (is_listed and (listed == self.limit or self.bus.looks < LOOKS_EACH)):
                self.more = f', "more": true, "next": {encode("/".join(last))}'
                return
            last = key
            if box and is_listed:
                listed += 1
                yield (*key, box)

    def keys(self) -> Iterator[tuple[str, str]]:
        """The mailboxes that the list may have. With names, where these would be: there may be no such mailbox."""
        behind = self.bus.mailboxes.keys(max(self.after, (self.channel or "", "")))
        if not self.names:
            return takewhile(lambda key: self.channel in (None, key[0]), behind)
        channels, names = [self.channel] if self.channel else self.channels(), sorted({*self.names})
        return (key for channel in channels for own in names if (key := (channel, own)) > self.after)

    def channels(self) -> Iterator[str]:
        """The channels from that of `after` on, in order; without a look at each mailbox."""
        ordered = self.bus.mailboxes.ordered
        place = bisect_left(ordered, (self.after[0],))
        while place < len(ordered):
            yield ordered[place][0]
            place = bisect_left(ordered, (ordered[place][0] + "\0",), place)


def inboxes(bus: Bus, request: Request) -> Page:
    """The mailboxes with mail for a name that this token may read. If it may not read all, its names are looked up."""

    def shows(own: str, box: Mailbox) -> bool:
        return own != EVERYONE and (box.firm or box.seen > 0) and request.grant.reads(own)

    return Page(bus, request, shows, () if request.grant.operator else (request.grant.name, *request.grant.also))


def inbox(bus: Bus, request: Request) -> Answer:
    recipients: dict[str, dict[str, int]] = {}
    page = inboxes(bus, request)
    for channel, own, box in page:
        recipients.setdefault(channel, {})[own] = unread(bus, channel, own, box)
    return ok(bus, f'"recipients": {encode(recipients)}{page.more}')


def agents(bus: Bus, request: Request) -> Answer:
    online = request.query().flag("online")

    def shows(own: str, box: Mailbox) -> bool:
        return own != EVERYONE and box.seen > 0 and online in (None, bus.mailboxes.online(box))

    page = Page(bus, request, shows)
    return ok(bus, f'"agents": [{", ".join([agent(bus, request.grant, *each) for each in page])}]{page.more}')


def agent(bus: Bus, grant: Grant, channel: str, own: str, box: Mailbox) -> str:
    since, seen = (seconds(box.listening), seconds(box.seen)) if box.seen else ("null", "null")
    online = boolean(bus.mailboxes.online(box))
    text = f'"name": "{own}", "channel": "{channel}", "online": {online}, "since": {since}, "last_seen": {seen}'
    if grant.reads(own):
        number, cursor = unread(bus, channel, own, box), seconds(box.mark())
        text += f', "address": {encode(box.address)}, "unread": {number}, "cursor": {cursor}'
    return f"{{{text}{''.join([about(grant, channel, own, box) for about in bus.about])}}}"


def message(bus: Bus, request: Request) -> Answer:
    """One message and how far it came; asking moves nothing."""
    return told(bus, one_of(bus, request), reader_of(request))


def reader_of(request: Request) -> Grant:
    """Who reads a message by its id: the holder of the token; without tokens, the names in `as`; with HEAD nobody."""
    own = () if request.grant.name else request.query().names("as")
    return OPEN if request.command == "HEAD" else Grant("", own[0], own[1:], False, False) if own else request.grant


def one_of(bus: Bus, request: Request, tick: int | None = None) -> Message:
    """The message with this tick, or with the id in the path. 404 if there is none, or if the token may not see it."""
    bus.storms.read(request.owner())
    tick = tick_of(request.parsed.rest) if tick is None else tick
    found = None if tick is None or tick > bus.last else bus.view.message(tick)  # above it, it is not announced yet
    if not found or not request.grant.may_see(found):
        raise no_message(request.parsed.rest or (f"{tick:x}" if tick else ""))
    if len(found.text) > HEAD_BYTES:
        bus.storms.worked(request.owner(), "", len(found.text))
    return found


def no_message(number: str) -> Refused:
    return Refused(404, f"there is no message {number[:64]!r}: it never existed, or it was too old and was removed")


def told(bus: Bus, message: Message, grant: Grant = OPEN) -> Answer:
    """What the holder of a token may know about a message."""
    state, details = state_of(bus, message)
    return ok(bus, f'"message": {readable(bus, message, grant)}, "state": "{state}"{details}')


def readable(bus: Bus, message: Message, grant: Grant) -> str:
    """A message that is asked for by its id. If it is being recalled, was recalled or has expired: without its text.

    A receiver that reads a message this way has fetched it. No mark moves, as older messages may still be unread.
    """
    withheld = any(each.tick == message.tick for each in bus.withheld.values())
    if withheld or message.expires == RECALLED or bus.view.is_expired(message):
        return message.without_text()
    own = grant.name, *grant.also, *(() if grant.operator else (EVERYONE,))
    is_receiver = grant.name not in ("", message.sender) and message.to in own
    if is_receiver and message.tick > bus.mailboxes.came(message):  # else the mark says so already
        bus.mailboxes.note(message.channel, message.to, ALONE, message.tick, grant.name)
        bus.save_marks_soon()
    return message.render()


def receipt_of(bus: Bus, message: Message, kind: int) -> tuple[str, int] | None:
    """Which reader moved a mark over this message, and when; also while that is on its way to the disk."""
    newer = bus.mailboxes.receipts.get(Receipt(message.channel, message.to, kind, message.tick, "", 0).slot())
    return bus.view.receipt(message, kind) or (newer and (newer.reader, newer.at))


def state_of(bus: Bus, message: Message) -> tuple[str, str]:
    """The state of a message, and further members of JSON that say more."""
    box = bus.mailboxes.boxes[message.channel, message.to]
    if message.expires == RECALLED:
        return "recalled", ""
    for state in bus.states:
        known = state(message)
        if known:
            return known
    mark = bus.mailboxes.came(message)
    if message.tick > mark and not receipt_of(bus, message, ALONE):
        return "expired" if bus.view.is_expired(message) else "queued", ""
    kind = ALONE if message.tick > mark else ACKNOWLEDGED if box.own and message.tick <= box.mark() else FETCHED
    receipt = receipt_of(bus, message, kind)
    details = f', "by": "{receipt[0]}", "at": {seconds(receipt[1])}' if receipt else ""
    return ("fetched", "acknowledged", "fetched")[kind], details


def healthz(bus: Bus, request: Request) -> Answer:
    """Without a token, a closed bus tells neither its id nor its exact newest tick."""
    if bus.gate.knows(request.parsed):
        return ok(bus, '"ok": true')
    return Answer(200, f'{{"ok": true, "now": {seconds(bus.last // 1000000 * 1000000)}}}\n'.encode())


def show_help(bus: Bus, request: Request) -> Answer:
    bus.storms.read(request.owner())
    secure = request.fields.get("x-forwarded-proto") == "https" or any(each.tls for _, each in bus.listeners)
    host = (re.fullmatch(r"[A-Za-z0-9.:\[\]_-]{1,255}", request.fields.get("host", "")) or ["HOST:PORT"])[0]
    endpoints = "".join(
        f"{method:7}{path + ('ID' if path.endswith('/') and path != '/' else ''):15}{route.says}\n"
        for (method, path), route in bus.routes.items()
        if route.says
    )
    text = HELP.format(version=VERSION, url=f"http{'s' if secure else ''}://{host}", endpoints=endpoints)
    return Answer(200, text.encode(), "text/plain; charset=utf-8")


def show_client(bus: Bus, kept: dict[str, bytes], request: Request) -> Answer:
    """A client or a tool, so that a new host needs only the URL. Each file has a route, and is read once."""
    bus.storms.read(request.owner())
    file = request.route[1:]
    try:
        kept[file] = kept.get(file) or beside(file).read_bytes()
    except (FileNotFoundError, PermissionError):
        raise Refused(404, f"{file} is not beside bus_server.py on this host: copy it from the same version") from None
    return Answer(200, kept[file], "text/plain; charset=utf-8")


def show_certificate(bus: Bus, file: str, request: Request) -> Answer:
    """The certificate of this bus, which is the first one in its file. The private key may be there too."""
    bus.storms.read(request.owner())
    found = re.search(rb"-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----", pathlib.Path(file).read_bytes())
    return Answer(200, found[0] + b"\n" if found else b"", "application/x-pem-file")


def beside(file: str) -> pathlib.Path:
    """Where a program of ours is: beside this file, in a clone, or installed."""
    here = pathlib.Path(__file__).resolve().parent
    folders = here, here / "tools", here / "agent_bus_tools", pathlib.Path(sys.prefix, "bin")
    return next((folder / file for folder in folders if (folder / file).exists()), here / file)


HEADLINE = ("from", "relayed_from", "id", "to", "channel", "reply_to", "age", "priority", "type", "subject")
HIDDEN = re.compile(  # as in bus_recv.py
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    r"\u2060-\u206f\u2800\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb"
    r"\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]+"
)
RUNS = re.compile(f"({HIDDEN.pattern})")


def shown(text: str) -> str:
    """Text with its control characters and its invisible characters escaped; CRLF and CR become newlines."""
    parts = RUNS.split(text.replace("\r\n", "\n").replace("\r", "\n"))
    escaped = {run: run.encode("unicode_escape").decode() for run in set(parts[1::2])}  # each run once: 0.5 us
    parts[1::2] = map(escaped.__getitem__, parts[1::2])
    return "".join(parts)


def label(value: Any) -> str:
    text = value if isinstance(value, str) else encode(value)
    return text if re.fullmatch(r"[A-Za-z0-9._:@/-]{1,64}", text) else shown(json.dumps(text, ensure_ascii=False))


def block(message: dict[str, Any], me: str | None, now: int) -> str:
    """A message as bus_recv.py prints it. No line of a body can be taken for a head, or for the end of a block."""
    tick = int(message["id"], 16)
    says = {**message, "age": span((now - tick) // 1000000)}
    usual = {"to": me, "channel": "default", "age": "", "priority": "normal"}
    head = [f"{each}={label(says[each])}" for each in HEADLINE if says.get(each) not in (None, usual.get(each))]
    text = shown(message["msg"])
    lines = (text[:-1] if text.endswith("\n") else text).replace("\n", "\n| ")
    return f"{iso(tick)} {' '.join(head)}\n| {lines}\n---\n"


def span(age: int) -> str:
    """Seconds as 90m, 6h or 2d; nothing under a minute."""
    return next((f"{age // size}{unit}" for unit, size in (("d", 86400), ("h", 3600), ("m", 60)) if age >= size), "")


HELP = """\
agent-bus {version}: messages between coding agents. If /send answers 200, the message is on disk.

send     curl --data-binary 'tests are green' '{url}/send?from=alice&to=bob'
receive  curl -H 'Accept: text/plain' '{url}/recv?to=bob&since=last&wait=25'
         (the next `since` is the header Bus-Now; without Accept you get JSON, and the next `since` is its `now`)
         On a bus with tokens: curl -H 'Authorization: Bearer TOKEN'; for the clients, export AGENT_BUS_TOKEN=TOKEN

The clients need Python 3.9 and nothing else:
         curl -fO {url}/bus_send.py; curl -fO {url}/bus_recv.py
         export AGENT_BUS_URL={url} AGENT_NAME=bob
         python3 bus_recv.py bob
         echo 'tests are green' | python3 bus_send.py alice
Bash, curl and jq: curl -fO {url}/bus_listener.sh; AGENT_NAME=bob bash bus_listener.sh

{endpoints}"""


# ── start ────────────────────────────────────────────────────────────────────────────────────────────────────────────
# The command line, the start and the end of a server, the loading of extensions, and the commands (invite, backup and
# others). To add an option, add it in command_line() and pass it to the class that uses it; to add a command, add it to
# COMMANDS.


def duration(text: str, zero: str = "ever") -> float:
    """'30d', '12h', '90m', '45s' in seconds; 0 is for `zero`.

    A number alone is refused: clients take it for seconds, but who writes `--keep 30` means days.
    """
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhd]?)", text)
    if not match or (float(match[1]) == 0 if match[2] else match[1] != "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time like 30d, 12h, 90m, 45s, or 0 for {zero}")
    return float(match[1]) * {"": 0, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def default_path() -> str:
    if os.environ.get("HOME") == "":  # then ~ would be the root folder
        del os.environ["HOME"]
    return os.path.join(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state"), "agent-bus", "bus.db")


def database_file(path: str) -> str:
    """The type of --db. A link is the database that it leads to: the tokens and all other files lie beside that one."""
    if os.path.isdir(path) or path.endswith("/"):
        raise argparse.ArgumentTypeError(f"{path} is a folder: give a file in it, like {os.path.join(path, 'bus.db')}")
    if not os.path.islink(path) or os.path.islink(os.path.realpath(path)):  # the latter: it leads to itself
        return path
    check_is_no_link(path)
    target = os.path.join(os.path.dirname(path), os.readlink(path))
    for beside in (".tokens", ".blobs"):  # until 0.2.0 they had the name of the link
        if os.path.exists(path + beside) and os.path.realpath(path + beside) != os.path.realpath(target + beside):
            raise Unusable(f"{path}{beside} lies beside a link, where no bus looks: move it to {target}{beside}")
    return database_file(target)


def within(least: float, most: float = math.inf, kind: Callable[[str], float] = int) -> Callable[[str], float]:
    """The type of an option whose value is a number in these bounds."""

    def number(text: str) -> float:
        with contextlib.suppress(ValueError):
            if least <= kind(text) <= most:
                return kind(text)
        what = "number" if kind is float else "whole number"
        bounds = f"of {least} or more" if most == math.inf else f"from {least} to {most}"
        raise argparse.ArgumentTypeError(f"give a {what} {bounds}, not {text!r}")

    return number


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the core."""
    add = parser.add_argument
    add("--host", type=lambda text: text.strip("[]"), help="address to listen on (127.0.0.1)")
    add("--port", type=within(0, 65535), help="port to listen on; 0: any free one (8080)")
    add("--db", type=database_file, default=default_path(), metavar="PATH", help="database, or :memory: (%(default)s)")
    add("--keep", type=duration, default="30d", help="remove messages older than this, like 12h; 0: keep all (30d)")
    largest = "largest body of a request (%(default)s)"
    add("--max-body", type=within(1024, 9999999), default=262144, metavar="BYTES", help=largest)
    most = "messages per second and sender; 0: no limit (%(default)s)"
    add("--rate", type=within(0, kind=float), default=50, metavar="N", help=most)
    turns = "how often two names may answer each other in 10 minutes; a quarter warns; 0: no limit (%(default)s)"
    add("--turns", type=within(0), default=120, metavar="N", help=turns)
    add("--without", action="append", metavar="NAME,...", help="do not load these extensions: " + ", ".join(ELSEWHERE))
    further_name = "another host name that clients use in the bus's URL; only needed without tokens"
    add("--allow-host", action="append", default=[], metavar="NAME", help=further_name)
    shared = "be a front: keep the bus in this ledger, together with other fronts (docs/cluster.md)"
    add("--ledger", default=os.environ.get("AGENT_BUS_LEDGER"), metavar="URL", help=shared)
    add("--ledger-single", action="store_true", help="accept a ledger that keeps its entries on one machine only")
    add("--open", action="store_true", help="let other machines use the bus although it has no tokens")
    add("--tls-cert", metavar="FILE", help="speak HTTPS with this certificate chain (PEM); SIGHUP reloads it")
    add("--tls-key", metavar="FILE", help="the key of the certificate, if it is in another file")
    add("--verbose", action="store_true", help="print a line on stderr for each request")
    add("--version", action="version", version=f"agent-bus {VERSION}")


class Parser(argparse.ArgumentParser):
    """Says which option may be meant by one that does not exist."""

    def error(self, message: str) -> NoReturn:
        strange = re.findall("^unrecognized arguments: (--[^ =]+)", message)
        super().error(message + "".join(meant(option, self._option_string_actions) for option in strange))


def command_line(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a server, those of the extensions too. `extensions` and `without` are among the results."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--without", action="append", default=[])
    without = [each for each in ",".join(first.parse_known_args(arguments)[0].without).split(",") if each]
    extensions = load_extensions(without)
    parser = Parser(
        prog=called("serve"),
        usage="%(prog)s [-h] [OPTIONS]",
        description="A message bus for coding agents over HTTP.",
        epilog=f"Commands: {called('invite')} NAME, revoke NAME, tokens, prune, backup COPY, also while the bus runs; "
        "restore COPY and move, only while it is stopped. Each has --help.",
    )
    add_options(parser)
    for module in extensions.values():
        module.options(parser)
    check_extensions(parser, arguments, without, extensions)
    options = parser.parse_args(arguments)
    for wrong, sentence in (
        (options.tls_key and not options.tls_cert, "--tls-key needs --tls-cert"),
        (options.ledger_single and not options.ledger, "--ledger-single needs --ledger"),
    ):
        if wrong:
            parser.error(sentence)
    options.extensions, options.without = extensions, without
    options.front = load_ledgers("start") if options.ledger else None
    options.tcp = options.host is not None or options.port is not None  # else only if nothing else listens
    options.host, options.port = options.host or "127.0.0.1", 8080 if options.port is None else options.port
    return options


# The extensions. One is a module with:
#   options(parser)     adds its options
#   start(bus, options) registers what it brings on the seams of the Bus; Unusable if it cannot start
#   OPERATIONS          its subclasses of Operation
#   TABLES, NOUN        the steps of its schema, or None; the noun for the messages in its view NAME_kept


def load_extensions(without: Collection[str]) -> dict[str, ModuleType]:
    """Every module in bus_extensions/ beside this file, or in the installed package, but those in `without`."""
    sys.modules.setdefault("bus_server", sys.modules[__name__])  # else an extension would import a second Refused
    modules = {}
    for file in sorted(folder_of("bus_extensions", "agent_bus_extensions").glob("[a-z]*.py")):
        if file.stem not in without:
            with or_unusable(f"cannot load the extension {file}", str, Exception):
                modules[file.stem] = load(file)
    return modules


def folder_of(beside: str, installed: str) -> pathlib.Path:
    """A folder beside this file or, if it is not there, the installed package."""
    folder = pathlib.Path(__file__).resolve().parent / beside
    found = None if folder.is_dir() else importlib.util.find_spec(installed)
    return pathlib.Path(*(found.submodule_search_locations or [])) if found else folder


def module_at(file: pathlib.Path, name: str) -> ModuleType:
    """The module in a file, by its path: a folder with files of any name must not be on sys.path."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parts_of(file: str, *names: str) -> list[ModuleType]:
    """The other files of an extension, which lie beside its first one. Each may import those before it."""
    return [module_at(pathlib.Path(file).with_name(f"{name}.py"), name) for name in names]


def load(file: pathlib.Path) -> ModuleType:
    module = module_at(file, f"bus_extensions.{file.stem}")
    OPERATIONS.update((each.kind, each) for each in module.OPERATIONS)
    return module


def load_ledgers(module: str) -> ModuleType:
    """A module of ledgers/, beside this file or in the installed package: how a bus shares a ledger with others."""
    folder = folder_of("ledgers", "agent_bus_ledgers")
    if not folder.is_dir():
        raise Unusable("a ledger needs the folder ledgers/ beside bus_server.py: copy it from the same version")
    if "ledgers" not in sys.modules:
        module_at(folder / "__init__.py", "ledgers")
    return importlib.import_module(f"ledgers.{module}")


def check_extensions(
    parser: argparse.ArgumentParser, arguments: Sequence[str], without: Sequence[str], loaded: Collection[str]
) -> None:
    """Say what is wrong with --without, and with an option whose extension is not loaded."""
    for extension in without:
        if extension not in ELSEWHERE and extension not in loaded:
            parser.error(f"--without {extension}: there is no such extension, only {', '.join(ELSEWHERE)}")
    for extension, brings in ELSEWHERE.items():
        for argument in arguments if extension not in loaded else ():
            option = argument.partition("=")[0]
            if option.startswith("--") and option in brings:
                parser.error(missing(option, extension, "--without" if extension in without else ""))


def check_kept(state: State, loaded: Collection[str], without: Collection[str]) -> None:
    """Unusable, if the database has data of an extension that is neither loaded nor named by --without."""
    kept = {"files": (len(list(pathlib.Path(f"{state.path}.blobs").glob("?" * 64))), "files")}
    for extension, noun in state.extensions().items():
        if extension not in loaded:
            kept[extension] = state.ask(f"SELECT count(*) FROM {extension}_kept")[0], noun
    for extension, (number, noun) in kept.items():
        if number and extension not in loaded and extension not in without:
            raise Unusable(
                f"{state.path} has {number} {noun if number > 1 else noun[:-1]} of {extension}.py, which is not beside "
                f"bus_server.py: copy bus_extensions/ from the same version, or give --without {extension}"
            )


def start_extensions(bus: Bus, options: argparse.Namespace) -> str:
    """Start each extension; returns the line that names them."""
    for extension in options.without:
        bus.extensions[extension] = "--without"
    for extension, module in options.extensions.items():
        if module.TABLES is not None:
            bus.state.add_tables(extension, module.NOUN, module.TABLES)
        module.start(bus, options)
        bus.extensions[extension] = LOADED
    if options.extensions:
        return f"extensions: {', '.join(options.extensions)}"
    return "extensions: none" + ("" if options.without else ", because bus_extensions/ is not beside bus_server.py")


# The server


def is_loopback(host: str) -> bool:
    address = ip_address(host)
    return address.is_loopback if address else host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, or Unusable. The backlog is what may arrive in one turn of a busy loop."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        both = address[0] == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(address[:2], family=family, backlog=4096, dualstack_ipv6=both)
    except UnicodeError:
        raise Unusable(f"cannot listen on {host!r}: no host has such a name: --host must be an address") from None
    except OSError as error:
        why = str(error.strerror).partition(" (while")[0]  # Python goes on to say where
        advice = "--host must be an address of this machine, without a port"
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            has_it = "an agent-bus" if is_bus(host, port) else "another program, or the system (if below 1024),"
            advice = f"{has_it} has this port; choose another --port, and give clients that URL in AGENT_BUS_URL"
        raise Unusable(f"cannot listen on {host} port {port}: {why}: {advice}") from None


def is_bus(host: str, port: int) -> bool:
    """Does a bus answer there?"""
    with contextlib.suppress(OSError), socket.create_connection((host, port), 1.0) as peer:
        peer.sendall(b"GET /healthz HTTP/1.0\r\nHost: localhost\r\n\r\n")
        peer.settimeout(1.0)
        return b'{"ok": true, "now": ' in peer.recv(4096)
    return False


def tls_context(certificate: str | None, key: str | None) -> ssl.SSLContext | None:
    if not certificate:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    try:
        context.load_cert_chain(certificate, key, password="")  # else OpenSSL asks for it on the terminal, and waits
    except (OSError, ssl.SSLError) as error:
        raise Unusable(unfit(certificate, key or certificate, error)) from None
    return context


def unfit(certificate: str, key: str, error: OSError) -> str:
    """Why OpenSSL does not take a certificate and its key. Its own words name neither the file nor the reason."""
    for path in (certificate, key):
        try:
            with open(path, "rb") as pem:
                whole = pem.read()
        except OSError as unreadable:
            return f"cannot read {path}: {unreadable.strerror}"
    if getattr(error, "reason", "") == "KEY_VALUES_MISMATCH":
        return f"the key in {key} is not the key of the certificate in {certificate}: give the --tls-key made with it"
    if b"PRIVATE KEY-----" not in whole:
        return f"there is no private key (PEM) in {key}: give its file as --tls-key"
    if b"ENCRYPTED" in whole:
        return f"the key in {key} has a password, and the bus cannot ask for it: decrypt it with openssl pkey"
    return f"there is no certificate (PEM) in {certificate}, or it is damaged: {error.strerror or error}"


def make_bus(options: argparse.Namespace, state: State) -> Bus:
    tokens = Tokens(options.db)
    if not (is_loopback(options.host) or tokens.closed or options.open):
        host = options.host if options.host.strip("0.:") else socket.gethostname()
        url = f"http://{f'[{host}]' if ':' in host else host}:{options.port}"
        its = f" --url {shlex.quote(url)}" if options.port and not options.tls_cert else ""  # its pin is not known yet
        raise Unusable(
            f"everyone who can reach {options.host} could use this bus: make a token first ({called('invite')} NAME"
            f"{its} --db {shlex.quote(options.db)}), or give --open if something else guards the bus"
        )
    check_kept(state, options.extensions, options.without)
    gate = Gate(tokens, [options.host, *options.allow_host])
    storms = Storms(time.monotonic, options.rate, options.turns)
    return Bus(state, gate, storms, max_body=options.max_body, keep=options.keep, verbose=options.verbose)


def tcp_listener(bus: Bus, options: argparse.Namespace, tls: ssl.SSLContext | None) -> tuple[str, Listener]:
    sock = listen(options.host, options.port)
    host, port = sock.getsockname()[:2]
    if host == "::" and sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
        say("WARNING: this machine lets [::] take IPv6 only: start with --host 0.0.0.0 for IPv4")
    if not is_loopback(options.host) and not bus.gate.tokens.closed:
        say(f"WARNING: anyone who can reach {host}:{port} can read and send every message")
    return f"http{'s' if tls else ''}://{f'[{host}]' if ':' in host else host}:{port}", Listener(bus.door, sock, tls)


def run_server(options: argparse.Namespace, state: State) -> int:
    """Run until SIGTERM or SIGINT, or until the disk fails. Returns the exit code."""
    tls = tls_context(options.tls_cert, options.tls_key)
    bus = make_bus(options, state)
    extensions = start_extensions(bus, options)
    if options.front:
        options.front.start(bus, options)
    if options.tcp or not bus.listeners:
        bus.listeners.insert(0, tcp_listener(bus, options, tls))
    elif tls:
        raise Unusable("--tls-cert is for a port, and this bus has only Unix sockets: give --port too, or leave it out")
    state.sign(bus.listeners[0][0])
    for number in (signal.SIGTERM, signal.SIGINT):
        bus.loop.on_signal(number, bus.drain)
    if tls:
        bus.loop.on_signal(signal.SIGHUP, lambda: reload(bus.listeners[0][1], options))
        bus.route("GET", "/certificate", partial(show_certificate, bus, options.tls_cert), "its certificate, as PEM")
    with contextlib.suppress(OSError):  # a full disk of the log must not keep the bus from its start
        for url, _ in bus.listeners:
            print(f"listening on {url}", flush=True)
        where = state.path if state.path == ":memory:" else os.path.abspath(state.path)
        print(f"messages are in {where}\n{extensions}", flush=True)
    if not state.view.has_room():
        say(f"WARNING: {no_room().sentence.partition(':')[0]}: each send gets 507 until you make room")
    bus.tidy()
    bus.loop.every(TIDY_SECONDS, bus.tidy)
    bus.loop.every(Deadlines.SLOT, bus.sweep)
    bus.loop.run(lambda: bus.draining or bus.broken)
    for _, listener in bus.listeners:
        listener.close()
    bus.end()
    return 1 if bus.broken else 0


def reload(listener: Listener, options: argparse.Namespace) -> None:
    """SIGHUP: read the certificate again, for new connections. If it cannot be used, keep the old one."""
    try:
        listener.tls = tls_context(options.tls_cert, options.tls_key)
    except Unusable as error:
        say(f"bus_server: {error}; keeping the old one")


# Commands beside a running server


def command(function: str, description: str) -> argparse.ArgumentParser:
    parser = Parser(prog=called(function), description=description)
    whose = "database of the bus (%(default)s)"
    parser.add_argument("--db", type=database_file, default=default_path(), metavar="PATH", help=whose)
    return parser


def is_there(path: str) -> bool:
    """Unlike os.path.exists(), it raises Unusable where we may not look."""
    try:
        return bool(os.stat(path))
    except PermissionError:
        shut = next(filter(os.path.exists, pathlib.Path(os.path.abspath(path)).parents))
        raise Unusable(f"you may not look into {shut} for {path}: ask its owner, or give another path") from None
    except OSError:
        return False


def existing(path: str) -> str:
    """The database of a bus. Unusable if there is none: a mistyped --db makes no file, and is not an empty bus."""
    if not is_there(path) and not is_there(f"{path}.tokens"):
        raise Unusable(f"there is no bus with the database {path}: give --db PATH, as the bus prints it at its start")
    check_file(path)
    return path


def check_file(path: str) -> None:
    """Unusable, if a file of another program is there. One that has tokens beside it is a bus's, even a damaged one."""
    if is_there(f"{path}.tokens"):
        return
    try:
        with contextlib.closing(read_only(path)) as database:
            check_is_ours(database, path)
    except sqlite3.OperationalError:  # there is none, or it is in use: who needs more than its tokens will see
        return
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # the latter: SQLite's error has unreadable text
        raise Unusable(f"cannot use the database {path}: {error}") from None


def check_new(path: str) -> None:
    """Before a bus puts its lock beside a file: Unusable, if that is another program's, or where we may not look.

    A database in WAL mode, as ours, is left to State: even a reader makes files beside it.
    """
    if is_there(path) and os.path.isfile(path) and not is_there(f"{path}.lock"):
        with contextlib.suppress(OSError), open(path, "rb") as file:  # State says why it may not be read
            if file.read(19)[18:] != b"\2":
                check_file(path)


def meant(wrong: str, right: Iterable[str]) -> str:
    """`: did you mean x?` for a word that is not among the right ones, if some are similar."""
    import difflib  # only for a typo

    cases = {each.lower(): each for each in sorted(right)}
    similar = [cases[each] for each in difflib.get_close_matches(wrong.lower(), cases)]
    return f": did you mean {' or '.join(similar)}?" if similar else ""


def invite(arguments: Sequence[str]) -> None:
    """Make a token, and print once what to run on the other machine. The words are in tools/bus_invite.py."""
    parser = command("invite", "Make a token for NAME and print it. It is shown only once.")
    parser.add_argument("name", metavar="NAME", help="the agent or the person that the token is for")
    parser.add_argument("--also", default="", metavar="NAME,...", help="other names whose mail the token may read")
    parser.add_argument("--send-only", action="store_true", help="the token may send, but not read")
    parser.add_argument("--operator", action="store_true", help="the token may read everything: /log and every mailbox")
    how = "the token is valid for TIME, as 90d or 12h; 0: for ever (0; with --page 12h)"
    parser.add_argument("--expires", type=duration, metavar="TIME", help=how)
    page = "print a link to the page of the bus, for a browser, and not the line that joins a machine"
    parser.add_argument("--page", action="store_true", help=page)
    parser.add_argument("--label", default="", metavar="TEXT", help="tells the tokens of NAME apart: `revoke --label`")
    parser.add_argument("--url", default="", help="URL of the bus for the other machine (that of the running server)")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    options = parser.parse_args(arguments)
    options.also = [each for each in options.also.split(",") if each]
    check_invitation(parser, options)
    file, words, here = Tokens(options.db), invitations(), running(options.db)
    if words and not words.agreed(options.name, options.db, here, file.closed, options.yes, options.url):
        raise Unusable("no token was made")
    row = token_row(options, secret := secrets.token_urlsafe(32))
    token = f"{row['id']}_{secret}"
    for own in [own for own in file.rows() if own["name"] == options.name and not over(own)]:
        made = day(own["made"])
        print(f"{options.name} has the token {own['id']} already, made {made}: this is one more", file=sys.stderr)
    file.change(lambda rows: [*rows, row])
    print_it = words and (partial(words.page_link, row["expires"]) if options.page else words.invitation)
    try:
        print(print_it(options.name, token, here, options.url) if print_it else token, flush=True)
    except OSError:  # nobody has seen the token
        file.change(lambda rows: [each for each in rows if each["id"] != row["id"]])
        file.closed or print("the token is taken back; a running bus stays closed until it restarts", file=sys.stderr)
        raise


def token_row(options: argparse.Namespace, secret: str) -> Row:
    lasts = PAGE_SECONDS * options.page if options.expires is None else options.expires
    names = {name: getattr(options, name) for name in ("name", "also", "send_only", "operator", "label")}
    now, digest = time.time(), hashlib.sha256(secret.encode()).hexdigest()
    its = {"id": f"abt_{secrets.token_hex(4)}", "hash": digest, "made": max(now, newest_time(options.db))}
    return {**its, **names, "expires": int(now + lasts) if lasts else None, "revoked": None}


PAGE_SECONDS = 12 * 3600  # a link to the page is valid for so long, unless --expires says: browsers keep links


def check_invitation(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    folder = os.path.dirname(os.path.abspath(options.db))
    if not is_there(folder) and options.db != default_path():
        raise Unusable(f"there is no folder {folder}: correct --db, or make that folder first")
    check_file(options.db)
    if found := in_the_way(f"{options.db}.tokens.new"):  # else the words about what is to happen come first
        raise Unusable(f"cannot write the tokens in {options.db}.tokens: {found}")
    try:
        for each in options.also:
            name(each, "--also")
        speaker(options.name, "NAME")
    except Refused as refused:
        parser.error(refused.sentence)
    url = re.fullmatch(r"https?://[^\s?#@]+", options.url) and options.url.isprintable()
    for wrong, sentence in (
        (options.send_only and (options.also or options.operator), "--send-only excludes --also and --operator"),
        (options.url and not url, f"--url {options.url!a} is not the URL of a bus: write it like https://bus.lan:8080"),
        (not options.label.isprintable(), "--label must not have control characters"),
    ):
        if wrong:
            parser.error(sentence)


def invitations() -> Any:
    """tools/bus_invite.py, or None if it is not there."""
    sys.path.append(str(beside("bus_invite.py").parent))
    try:
        return importlib.import_module("bus_invite")
    except ModuleNotFoundError:
        return None


def running(path: str) -> str:
    """The URL of the server that uses this database; empty if none does."""
    with contextlib.suppress(InUse):
        if os.path.exists(f"{path}.lock"):
            locked(path).close()
        return ""
    return signature(path)[0]


def revoke(arguments: Sequence[str]) -> int:
    """Take back the tokens of a name, all or those with one label, or one by its id. A server sees it within 0.1 s."""
    parser = command("revoke", "Revoke the tokens of NAME, or one token by its id.")
    parser.add_argument("name", metavar="NAME", help="a name, or the id of one token: `tokens` lists both")
    parser.add_argument("--label", metavar="TEXT", help="only those with this label")
    options = parser.parse_args(arguments)
    file = Tokens(existing(options.db))
    rows = [row for row in file.rows() if not row["revoked"]]
    labels = {row["id"]: row.get("label", "") for row in rows if options.name in (row["name"], row["id"])}
    wanted = [token for token, label in labels.items() if options.label in (None, label)]
    which = f"{options.name} {options.label or ''}".strip()
    if wanted:
        file.change(lambda rows: [{**row, "revoked": int(time.time())} if row["id"] in wanted else row for row in rows])
        owner = {row["id"]: row["name"] for row in rows}.get(options.name)
        print(f"revoked {f'one token of {owner}' if owner else f'the tokens of {which}'}: {' '.join(wanted)}")
        return 0
    is_over = options.name in [row["id"] for row in file.rows()] and not labels
    why = f"{which} has no token{meant(options.label or '', labels.values())}" if labels else absent(options.name, rows)
    print(f"{which} is revoked already" if is_over else why, file=sys.stderr)
    return 1


def absent(name: str, rows: Collection[Row]) -> str:
    """What to say if these rows have no token of this name or id. The secret of a pasted token is not shown."""
    if part := re.fullmatch("(abt_(?![0-9a-f]{8}$)[0-9a-f]*).*", name):
        looks = "looks like a token, whole or cut short, and is no id (abt_ and 8 digits)"
        return f"{part[1]}... {looks}{meant(part[1], {row['id'] for row in rows})}"
    if re.fullmatch("abt_[0-9a-f]{8}", name):
        return f"there is no token with the id {name}"
    return f"{name} has no token{meant(name, {row['name'] for row in rows})}"


def tokens(arguments: Sequence[str]) -> int:
    """List the tokens and their names. The bus does not know the secrets."""
    parser = command("tokens", "List the tokens of a bus.")
    parser.add_argument("name", metavar="NAME", nargs="?", help="only those of NAME, or the one with this id")
    options = parser.parse_args(arguments)
    used, rows = last_used(existing(options.db)), Tokens(options.db).rows()
    if options.name and not any(options.name in (row["name"], row["id"]) for row in rows):
        print(absent(options.name, rows), file=sys.stderr)
        return 1
    header = f"{'id':13} {'name':20} {'made':10} {'last used':10} {'expires (UTC)':20} grants"
    print(header if rows else "no tokens: the bus is open")
    for row in (row for row in rows if options.name in (None, row["name"], row["id"])):
        reads = [] if row["send_only"] else ["read", *(f"read:{each}" for each in row["also"])]
        state = over(row) or " ".join(["send", *reads, *(["operator"] if row["operator"] else [])])
        state += f" ({shown(row['label'])})" if row.get("label") else ""
        ends = iso(int(row["expires"]) * 1000000) if row.get("expires") else "never"
        print(f"{row['id']:13} {row['name']:20} {day(row['made']):10} {day(used.get(row['id'])):10} {ends:20} {state}")
    return 0


def over(row: Row) -> str:
    """Why the token is not valid any more; empty if it is."""
    expired = "expired" if (row.get("expires") or math.inf) <= time.time() else ""
    return f"revoked {day(row['revoked'])}" if row["revoked"] else expired


def prune(arguments: Sequence[str]) -> None:
    """Remove old messages now. If a server runs, it removes them, because only its connection may write."""
    parser = command("prune", "Remove old messages that were fetched, and old jobs that are done.")
    older = partial(duration, zero="all, also those of this moment")
    parser.add_argument("--older", type=older, default="30d", help="only if older than this, like 12h; 0: all (30d)")
    parser.add_argument("--pending", action="store_true", help="also remove unfetched messages, and jobs not done")
    parser.add_argument("--dry-run", action="store_true", help="only print how many there are")
    options = parser.parse_args(arguments)
    before = max(wall_clock() - int(options.older * 1000000), 0)
    path = existing(options.db)
    with contextlib.nullcontext() if options.dry_run else turn_to_prune(path):
        old, pending = count_old(path, before)
        going = old if options.pending else old - pending
        stay = f"; unfetched or not done, so they stay: {pending} (--pending removes them too)" if old > going else ""
        print(f"messages from before {iso(before)}: {old}{stay}")
        if options.dry_run or not going:
            return
        try:
            remove_old(path, before, not options.pending, old - going)
        except KeyboardInterrupt:
            time.sleep(2 * Deadlines.SLOT)  # by then a running server has stopped, too
            print(f"stopped: {old - count_old(path, before)[0]} removed")
            raise
        print(f"{old - count_old(path, before)[0]} removed")


def count_old(path: str, before: int) -> tuple[int, int]:
    """(messages older than a tick, how many of them are unfetched or not done). The server may be running."""
    try:
        with contextlib.closing(read_only(path)) as database:
            rows = Rows(path, database)
            pending = " OR ".join([UNFETCHED % wall_clock(), *map(kept_for, rows.extensions())])
            counted = f"SELECT count(*), count(*) FILTER (WHERE {pending}) FROM messages JOIN mailboxes ON mailbox = id"
            old, unread = rows.ask(f"{counted} LEFT JOIN {SLOWEST} WHERE tick < ?", before)
            return old, unread
    except sqlite3.Error as error:
        if "no such table: extensions" in str(error):
            migrate_alone(path)
            return count_old(path, before)
        raise Unusable(f"cannot read the database {path}: {error}") from None


def migrate_alone(path: str) -> None:
    """Bring the database of an older version up to date, unless a server of that version runs."""
    try:
        State(path).close()
    except InUse:
        raise other_version(path) from None


def other_version(path: str) -> Unusable:
    url, version = signature(path)
    if not url:
        return Unusable(f"a bus that uses {path} is starting, or is of a version before 0.2.0: try again in a moment")
    return Unusable(
        f"the bus at {url} is version {version or 'before 0.2.0'}, and this is {VERSION}: use the bus_server.py "
        "of that version, or restart the bus with this one"
    )


@contextlib.contextmanager
def turn_to_prune(path: str) -> Iterator[None]:
    """Wait until no other prune of this database runs. There is one file for its request to the server."""
    with or_unusable(f"cannot use the database {path}", partial(unwritable, path)):
        turn = open_beside(f"{prune_file(path)}.lock")
    with turn:
        try:
            fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for a prune of {path} that is under way", file=sys.stderr)
            fcntl.flock(turn, fcntl.LOCK_EX)
        yield


def remove_old(path: str, before: int, fetched_only: bool, stay: int) -> None:
    """Remove messages from before a tick. So many older ones `stay`."""
    try:
        remove_alone(path, before, fetched_only)
    except InUse:
        remove_beside(path, before, fetched_only, stay)


def remove_alone(path: str, before: int, fetched_only: bool) -> None:
    """Remove the messages in this process, because no server runs."""
    with contextlib.closing(State(path)) as state:
        removal = pruning(state, before, fetched_only, 0)
        while True:
            [reached] = state.apply([removal], Clock(wall_clock, state.last).now()).results
            if isinstance(reached, Refused):
                raise Unusable(f"cannot remove messages from {path}: {reached.sentence}")
            if reached is None:
                return
            removal = removal.next(reached)


def remove_beside(path: str, before: int, fetched_only: bool, stay: int) -> None:
    """Leave a file with the request for the running server, and wait until the server has removed that file.

    However this ends, no server finds the request later: by then the bus may be another one, from a copy.
    """
    if signature(path)[1] != VERSION:
        raise other_version(path)
    file = prune_file(path)
    try:
        failed = f"cannot write the request to the running server: {file}"
        with or_unusable(failed), written_anew(str(file)) as request:
            request.write(encode({"before": before, "fetched_only": fetched_only}))
        while file.exists():
            if sys.stderr.isatty():
                print(f"\r{count_old(path, before)[0] - stay} to go ", end="", file=sys.stderr)
            time.sleep(Deadlines.SLOT)
            with contextlib.suppress(InUse):  # the server may end before it is done
                remove_alone(path, before, fetched_only)
                break
    finally:
        file.unlink(missing_ok=True)


def day(second: int | None) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(second)) if second else "never"


def last_used(path: str) -> dict[str, int]:
    """When the server last saw each token: s since 1970, up to a minute late; 0: damaged. Read beside the server."""
    try:
        with contextlib.closing(read_only(path)) as database:
            number = Rows(path, database).number
            rows = database.execute("SELECT token, used FROM uses").fetchall()
            return {token: number(used, 0, f"when {token} was used") for token, used in rows}
    except sqlite3.Error:  # the bus was never started
        return {}


def newest_time(path: str) -> float:
    """Behind all messages of this bus, s since 1970: 1 s, as a server may still take some. 0, if there is no bus yet.

    A cursor may have moved the bus ahead of the clock.
    """
    newest = "SELECT max(last, ifnull((SELECT max(tick) FROM messages), 0)) FROM bus"
    with contextlib.suppress(sqlite3.Error, TypeError, ValueError), contextlib.closing(read_only(path)) as database:
        last = int(database.execute(newest).fetchone()[0]) / 1000000
        return last + (last > time.time())
    return 0.0


def read_only(path: str) -> sqlite3.Connection:
    """A connection beside the server's. It neither writes nor folds the log into the database."""
    return sqlite3.connect(f"{pathlib.Path(path).absolute().as_uri()}?mode=ro", uri=True)


def opened(path: str, is_ours: bool) -> sqlite3.Connection:
    """read_only() for a copy by root: a link that the owner of the file puts there meanwhile leads to nothing new."""
    root = os.geteuid() == 0 and no_link(path)
    if root:
        os.seteuid(os.lstat(path).st_uid)
    try:
        database = read_only(path)
        database.execute("SELECT count(*) FROM sqlite_master").fetchone()  # opens the log, too
        check_log(path, is_ours)
        return database
    finally:
        if root:
            os.seteuid(0)


def check_log(path: str, is_ours: bool) -> None:
    """Unusable, if SQLite has left transactions of the log unread. A connection must be open, and have read the log.

    A process that serves the database (`is_ours`) may not look: it would close a file of SQLite's, and lose its locks.
    """
    if is_ours or not has_unread(path):
        return
    unread = False
    with contextlib.suppress(Unusable), locked(path):  # else a bus writes the log, and may have done so just now
        unread = has_unread(path)
    if unread:
        lacks = f"{path}-wal is damaged, and a copy would lack its last transactions"
        raise Unusable(f"{lacks}: start the bus, which reports the loss and gives readers a gap; then copy it")


def has_unread(path: str) -> bool:
    """As State.damaged_wal(), for a connection that can only read: SQLite's own notes say how far it has read."""
    with contextlib.suppress(OSError, Planted), opened_beside(f"{path}-shm") as notes:
        frames = int.from_bytes(notes.read(20)[16:], sys.byteorder)  # mxFrame (walformat.html, section 2.1)
        return sum(commit > frames for commit in commits_in_wal(f"{path}-wal")) > 1
    return False


def is_front(path: str) -> bool:
    """Is this database a front's copy of a ledger? False too if it cannot be read."""
    with contextlib.suppress(sqlite3.Error), contextlib.closing(read_only(path)) as database:
        return bool(database.execute(IS_FRONT).fetchone())
    return False


def signature(path: str) -> tuple[str, str]:
    """(URL, version) of the running server, from its lock file."""
    lines = ["", ""]
    with contextlib.suppress(OSError, Planted), opened_beside(f"{path}.lock") as file:
        lines[:0] = file.read().decode("ascii", "replace").splitlines()
    return lines[0], lines[1]


# What a copy has beside itself, in the end or meanwhile, and what SQLite would take for a part of it.
COPY_SUFFIXES = ("", ".new", ".tokens", ".tokens.new", ".blobs", ".prune", ".restoring", "-wal", "-shm", "-journal")


def backup(arguments: Sequence[str]) -> None:
    """Copy a bus, even while it runs. The copy has every message acknowledged before; tokens and files go beside it."""
    parser = command("backup", "Copy a bus to COPY. The bus may be running.")
    parser.add_argument("copy", metavar="COPY", help="a new file; tokens and files go to COPY.tokens and COPY.blobs")
    options = parser.parse_args(arguments)
    own = [f"{options.copy}{suffix}" for suffix in COPY_SUFFIXES]
    if taken := next(filter(os.path.lexists, own), None):
        raise Unusable(f"{taken} exists already: choose another name")
    if not os.access(folder := os.path.dirname(os.path.abspath(options.copy)), os.W_OK) or os.path.isfile(folder):
        raise Unusable(f"there is no folder {folder} in which you may write: make it first, or give another COPY")
    rows = Tokens(existing(options.db)).rows()
    try:
        messages, files = copy_bus(options.db, options.copy, rows)
    except BaseException:  # the disk may be full; and beside a part of a copy, the next backup would refuse the name
        shutil.rmtree(f"{options.copy}.blobs", ignore_errors=True)
        for made in own:
            with contextlib.suppress(OSError):
                os.unlink(made)
        raise
    print(f"{options.copy}: {messages} messages, {files} files, {len(rows)} tokens")


def restore(arguments: Sequence[str]) -> None:
    """Replace a stopped bus by a copy. It gets a new bus id, so that readers of the old bus notice.

    They may have read messages that are not in the copy. Under the old id, their cursors would skip new messages. The
    copy of a front keeps its id: its front reads what it lacks from the ledger.
    """
    parser = command("restore", "Replace the bus by COPY. Stop the bus first.")
    whose = "a copy made by backup; its tokens are used if the bus has none"
    parser.add_argument("copy", type=database_file, metavar="COPY", help=whose)
    options = parser.parse_args(arguments)
    if not is_there(options.copy):
        raise Unusable(f"there is no file {options.copy}: give the COPY that backup has made")
    if os.path.exists(f"{options.db}.new") and os.path.samefile(options.copy, f"{options.db}.new"):
        raise Unusable(f"{options.copy} has the name under which restore writes first: rename it, then restore that")
    with turn_to_prune(options.db), locked(options.db):  # a prune that is under way is for the bus from before
        old = f"{options.db}.{cut_off(options.db) or wall_clock()}"
        bus = None if is_front(options.copy) else secrets.token_hex(8)
        messages, files = copy_bus(options.copy, options.db, missing_tokens(options.copy, options.db), old, bus)
    what = f"bus {bus}" if bus else "a front's copy of a ledger"
    print(f"{options.db} is {what} now. It has {messages} messages, and got back {files} files")
    if os.path.exists(old):
        print(f"the database that was there before is now {old}")
    elif options.db == default_path():
        print("there was no bus before: if another one is meant, give its --db")


def cut_off(path: str) -> str:
    """What the name of the old database ends with, if a restore was cut off."""
    try:
        with opened_beside(restoring(path)) as marker:
            return "".join(re.findall("[0-9]+$", marker.read(64).decode("ascii", "replace")))
    except FileNotFoundError:
        return ""


def copy_bus(source: str, target: str, tokens: list[Row], old: str = "", bus: str | None = None) -> tuple[int, int]:
    """Copy a database, its tokens and its files; returns how many. The database at `target` is renamed `old`."""
    new = f"{target}.new"
    messages = copy_database(source, new, bus)
    if tokens:
        Tokens(target).change(lambda _: tokens)
    files = copy_files(source, target)  # after the messages, which point to them
    give_to_owner(new, target)
    if old:
        with or_unusable(f"cannot write {restoring(target)}"), written_anew(restoring(target)) as marker:
            marker.write(old.rpartition(".")[2])
    for suffix in ("", "-wal", "-shm") if old else ():  # so named, they stay one database
        if os.path.lexists(target + suffix) and not os.path.lexists(old + suffix):  # else it was done before the cut
            os.rename(target + suffix, old + suffix)
    # Of a command that was killed: it was for the bus from before. What another user has put there is no request.
    with contextlib.suppress(OSError):
        prune_file(target).unlink()
    os.rename(new, target)
    keep_names(target)
    pathlib.Path(restoring(target)).unlink(missing_ok=True)
    keep_names(target)
    return messages, files


def missing_tokens(copy: str, path: str) -> list[Row]:
    """The tokens of a copy, for a bus that has none. A bus with tokens keeps them: it knows the later revocations."""
    if os.path.exists(f"{path}.tokens"):
        return []
    rows = Tokens(copy).rows()
    if last_used(copy) and not rows and not is_front(copy):
        raise Unusable(
            f"the bus in {copy} had tokens, and would be open without them: put {copy}.tokens beside {copy}, "
            f"or make a token first ({called('invite')} NAME --db {shlex.quote(path)})"
        )
    return rows


def copy_files(source: str, target: str) -> int:
    """Copy the files that the other database lacks; returns how many. A file gets its name when it is complete."""
    if not os.path.lexists(f"{source}.blobs"):
        return 0
    copied = 0
    with or_unusable(f"cannot copy the files in {source}.blobs", where), opened_folder(f"{source}.blobs") as there:
        if names := {each for each in os.listdir(there) if len(each) == 64}:
            pathlib.Path(f"{target}.blobs").mkdir(0o700, exist_ok=True)
            with opened_folder(f"{target}.blobs") as here:
                give_to_owner(here, target)
                for each in names - {*os.listdir(here)}:
                    with contextlib.suppress(FileNotFoundError):  # retention removed it just now
                        copy_file(each, there, here, target)
                        copied += 1
    return copied


def where(error: OSError) -> str:
    """The words for an error, which names no file if the disk is full."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)


@contextlib.contextmanager
def opened_folder(path: str) -> Iterator[int]:
    check_is_no_link(path)
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | no_link(path))
    try:
        yield folder
    finally:
        os.close(folder)


def copy_file(name: str, there: int, here: int, target: str) -> None:
    """Copy a file, with its age, from one folder into another. Neither it nor its .part may be a link."""
    part = f"{name}.part"
    with os.fdopen(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=there), "rb") as old:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part, dir_fd=here)
        try:
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=here), "wb") as new:
                shutil.copyfileobj(old, new)
                new.flush()
                os.fsync(new.fileno())
                age = os.fstat(old.fileno())
                os.utime(new.fileno(), ns=(age.st_atime_ns, age.st_mtime_ns))
                give_to_owner(new.fileno(), target)
            os.replace(part, name, src_dir_fd=here, dst_dir_fd=here)
        finally:
            with contextlib.suppress(FileNotFoundError):  # if it failed: the disk may be full
                os.unlink(part, dir_fd=here)
    write_out(here)


def copy_database(source: str, target: str, bus: str | None = None, is_ours: bool = False) -> int:
    """The database as of one moment, checked, as one file without a log; returns how many messages it has.

    If `bus` is given, it becomes the bus id of the copy. `is_ours`: this process serves the database.
    """
    check_is_no_link(source)
    try:
        if no_link(target):  # SQLite would follow a link that another user puts there meanwhile
            folder, file = os.path.split(os.path.abspath(target))
            with tempfile.TemporaryDirectory() as own, opened_folder(own) as there, opened_folder(folder) as here:
                messages = copy_database(source, f"{own}/{file}", bus, is_ours)
                copy_file(file, there, here, target)
            return messages
        pathlib.Path(target).unlink(missing_ok=True)
        with contextlib.closing(opened(source, is_ours)) as old, contextlib.closing(sqlite3.connect(target)) as new:
            old.backup(new)
            new.execute("PRAGMA journal_mode=DELETE")
            new.execute("UPDATE bus SET id = ifnull(?, id)", (bus,))
            new.commit()
            report = new.execute("PRAGMA integrity_check(1)").fetchone()[0]
            messages = int(new.execute("SELECT count(*) FROM messages").fetchone()[0])
        if report != "ok":
            raise sqlite3.DatabaseError(f"it is damaged: {report}")
    except (sqlite3.Error, OSError) as error:
        pathlib.Path(target).unlink(missing_ok=True)
        raise Unusable(f"cannot copy the database {source} to {target}: {error}") from None
    return messages


def move(arguments: Sequence[str]) -> None:
    """Move a stopped bus onto a ledger, or back: ledgers/move.py."""
    extensions = load_extensions(())  # first: what load_ledgers() imports needs it
    load_ledgers("move").move(arguments, extensions)


COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    function.__name__: function for function in (invite, revoke, tokens, prune, backup, restore, move)
}


def run_command(name: str, *arguments: str) -> int:
    try:
        code = COMMANDS[name](arguments) or 0
        print(end="", flush=True)
        return code
    except OSError as error:
        if error.filename:
            raise
        if isinstance(error, BrokenPipeError):  # nobody reads us any more
            return 0
        raise Unusable(f"cannot write the output: {error.strerror}") from None


def let_go(number: int, stream: Any) -> None:
    """Drop what cannot be written: Python would try again at exit, complain, and exit with 120."""
    try:
        print(end="", file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    os.umask(0o077)  # the database and what lies beside it are for this user alone
    try:
        if arguments and arguments[0] in COMMANDS:
            return run_command(*arguments)
        if arguments and not arguments[0].startswith("-"):
            similar = meant(arguments[0], COMMANDS) or f": there are {', '.join(COMMANDS)}; without one, the bus runs"
            raise Unusable(f"there is no command {arguments[0]!r}{similar}")
        options = command_line(arguments)
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):  # a parked reader is a descriptor
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        folder = os.path.dirname(os.path.abspath(options.db))
        was_there = os.path.isdir(folder) or options.db == default_path()
        check_new(options.db)
        with contextlib.closing(options.front.open_state(options) if options.front else State(options.db)) as state:
            if not was_there:
                say(f"there was no folder {folder}: it is made for the database")
            try:
                return run_server(options, state)
            except (Unusable, PermissionError):
                # The lock file stays: another server may have it open. A front has read its copy from the ledger.
                for made in ("", "-wal", "-shm") if state.is_new and not options.front else ():
                    pathlib.Path(options.db + made).unlink(missing_ok=True)
                raise
    except (Unusable, PermissionError) as error:  # the latter has the path in its text
        own = re.search(r"agent[-_]bus(\.py)? [a-z]+$", sys.argv[0])
        print(f"{own[0] if own else 'bus_server'}: {re.sub('^.Errno [0-9]+. ', '', str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # in a command, or before the server listens
        return 130
    finally:
        let_go(1, sys.stdout)
        if REPORT.flush(1.0):  # else its thread has stderr, and waits
            let_go(2, sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
