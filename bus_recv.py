#!/usr/bin/env python3
"""Receive messages from an agent-bus: each as a block of text, or as a line of JSON.

    AGENT_BUS_URL=http://10.0.0.5:8080 python3 bus_recv.py spark     # until it is killed: for an agent's Monitor
    python3 bus_recv.py spark reviewers --once                       # what waits, or else the first to arrive
    python3 bus_recv.py --read 660ba678a1b40                         # one message, whole
    python3 bus_recv.py spark --exec ./on_mail.sh                    # a command for each message
    python3 bus_recv.py builds --claim --exec ./build.sh             # work: each job to one of those who do this
    python3 bus_recv.py --log --since 1h                             # look on: everybody's messages, of an hour
    for message in bus_recv.receive("spark"): ...                    # the same, in a program

Read it in the order an answer travels: ask, Reader (which bus, how far, how long a poll is held), Cursor (how far, on
disk), Outage (when there is no answer), Observer (who looks on), block (what a message looks like), the ways out (text,
JSON, a command), Worker (who takes jobs from a queue), main.

A message is shown at least once. Its cursor is saved after it was written out, so a reader that is killed shows its
last message again and never loses one; the id tells the repeat. Only a 200 with the bus's own JSON moves the cursor,
and only its own 4xx ends the program. Anything else (silence, half an answer, a redirect, a proxy's page) is an outage.

Standard library only, Python 3.9 and later. It reads the environment (AGENT_BUS_URL, AGENT_BUS_CHANNEL, AGENT_BUS_TOKEN
or AGENT_BUS_TOKEN_FILE, AGENT_BUS_CA, AGENT_BUS_UA, AGENT_BUS_STATE_DIR; http_proxy, https_proxy, no_proxy), talks to
that URL, follows it nowhere else, and writes one small file per bus, channel and name.
Exit code: 0 done, 1 refused by the bus, 2 usage or no place for the file, 3 nothing arrived, 75 out of reach.
"""
from __future__ import annotations

import argparse
import contextlib
import email.utils
import http.client
import json
import math
import os
import random
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import quote, urlencode, urlsplit

if TYPE_CHECKING:
    import subprocess

DEFAULT_URL = "http://127.0.0.1:8080"
HOLD_SECONDS = 25.0  # a poll may be held; under the 30 s after which common proxies cut a quiet request
GRACE_SECONDS = 10.0  # to connect, and beyond the hold: a bus of the old contract holds up to 30 s, whatever we say
DOWNLOAD_RATE = 8192  # bytes per second; an answer that comes slower is cut
ANSWER_BYTES = 64 << 20  # read at most; the bus ends an answer at 1 MiB, and a single message has at most a few
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # s before the next attempt; doubled each time, less up to half by chance
LOUD_SECONDS = 60.0  # of outage, until whoever reads the messages is told: silence must not look like health
LOCK_SECONDS = 3.0  # to wait for the reader that we replace to end

# What a Monitor of Claude Code takes without cutting or dropping, a little less of each. In UTF-16 units: a line has
# 500, and what comes within 0.2 s is one event of 3000; 10 events at once, then one every 2 s.
LINE_UNITS, WRITE_UNITS = 480, 2700
BURST, EVERY_SECONDS, APART_SECONDS = 8, 2.1, 0.3
SETTLE_SECONDS = 0.3  # until what was written counts as seen: a watch drops what it gets while it expires

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,63}")
DECIMAL = re.compile(r"[0-9]{1,10}(\.[0-9]{1,9})?")  # s since 1970: what a bus takes for a cursor
AGO, SECONDS = re.compile("([0-9]{1,9})([smhd])"), {"s": 1, "m": 60, "h": 3600, "d": 86400}
OLD_CONTRACT = "-"  # stands for the id of a bus that gives none; it knows no words for `since` either
HEAD = ("from", "id", "to", "channel", "reply_to", "age", "priority", "type", "subject")
HIDDEN = re.compile(  # what acts on a terminal, or on a reader, without being seen: controls, bidi, zero width, tags
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff"
    r"\U000e0000-\U000e007f\U000e0100-\U000e01ef]"
)


class Refused(Exception):
    """The bus said no and would say it again. `status` is HTTP's; the text says what to do."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Busy(Exception):
    """Another reader of this name is at work in this state directory; the text says which."""


class Unreachable(Exception):
    """No answer that is the bus's own; the text says why. `retry_after` is in seconds."""

    def __init__(self, sentence: str, retry_after: float = 0.0) -> None:
        super().__init__(sentence)
        self.retry_after = retry_after


def receive(
    names: str | Sequence[str],
    *,
    url: str | None = None,
    channel: str | None = None,
    since: str | None = None,
    wait: float = HOLD_SECONDS,
    once: bool = False,
    timeout: float | None = None,
) -> Iterator[dict[str, Any]]:
    """The messages for `names` as they arrive, as dicts (PROTOCOL.md, a message); the first name is the reader's own.

    A message counts as received when the next one is asked for: then its cursor is saved. `url` and `channel` default
    to the environment's. `since` is a decimal, `now` or `last`, and overrules the saved cursor. A poll is held `wait`
    seconds, 1 to 60. It ends after `timeout` seconds; with `once`, when it has given all that waited, or else the first
    that came; otherwise never. A number with a fraction is a Decimal, so that no `ts` is ever rounded.
    Raises Refused; Unreachable, if time runs out while the bus is out of reach; Busy, if another reader of the name is
    at work; ValueError for a name, a URL or a `since` that is none; OSError if the cursor cannot be saved.
    """
    return Reader([names] if isinstance(names, str) else names, url, channel, since, wait).messages(once, timeout)


def ask(url: str, path: str, seconds: float, order: dict[str, Any] | None = None) -> tuple[dict[str, Any], float]:
    """GET `path`, or POST an order: the bus's JSON, and its clock (s since 1970). Refused; Unreachable for all else.

    `seconds` until the head of the answer is here; for the rest, what its length needs on a slow line.
    """
    agent = os.environ.get("AGENT_BUS_UA") or "Mozilla/5.0"  # because firewalls drop what looks like a script
    connection, prefix = connect(url, min(seconds, GRACE_SECONDS))
    who = credentials(url)
    try:
        connection.connect()
        sock = connection.sock
        sock.settimeout(seconds)
        with hung_up_after(seconds, sock):
            body = None if order is None else json.dumps(order).encode()
            connection.request("POST" if body else "GET", prefix + path, body, {"User-Agent": agent, **who})
            response = connection.getresponse()
        content = bytearray()
        with hung_up_after(GRACE_SECONDS + (response.length or 0) / DOWNLOAD_RATE, sock):
            while len(content) < ANSWER_BYTES and (part := response.read(1 << 16)):
                content += part
        if response.length:
            raise http.client.IncompleteRead(bytes(content), response.length)
    except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: a chunk of negative size
        raise Unreachable(getattr(error, "strerror", None) or str(error) or type(error).__name__) from error
    finally:
        connection.close()
    return judged(response, content), clock_of(response)


def connect(url: str, seconds: float) -> tuple[http.client.HTTPConnection, str]:
    """A connection towards `url`, not yet open, and what stands before the path in its request line."""
    if not re.fullmatch(r"https?://[^\s?#]+", url):
        raise ValueError(f"the URL of the bus must be like http://host:8080, and is {url!r}")
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    host, port = parts.hostname or "", parts.port or (443 if secure else 80)
    trust = {"context": authorities()} if secure else {}
    proxy = proxy_for(parts.scheme, host, port)
    if not proxy:
        return kind(host, port, timeout=seconds, **trust), parts.path.rstrip("/")
    via = urlsplit(proxy if "://" in proxy else f"//{proxy}")
    connection = kind(via.hostname or "", via.port or 80, timeout=seconds, **trust)
    if secure:
        connection.set_tunnel(host, port)
    return connection, parts.path.rstrip("/") if secure else url.rstrip("/")


def authorities() -> Any:
    """Whom TLS trusts: the system's authorities, or those in the file that AGENT_BUS_CA names."""
    import ssl  # http.client has it, where there is one

    try:
        return ssl.create_default_context(cafile=os.environ.get("AGENT_BUS_CA") or None)
    except OSError as error:
        raise ValueError(f"AGENT_BUS_CA names no file of certificates: {error.strerror or error}") from None


def credentials(url: str) -> dict[str, str]:
    """The header that says who we are, by AGENT_BUS_TOKEN or the file AGENT_BUS_TOKEN_FILE; none without them.

    ValueError if others may read that file, or a network could: AGENT_BUS_PLAIN_HTTP=1 says that something guards it.
    """
    token, path = os.environ.get("AGENT_BUS_TOKEN", ""), os.environ.get("AGENT_BUS_TOKEN_FILE")
    if path and not token:
        try:
            with open(path, encoding="ascii") as file:
                if os.name == "posix" and os.fstat(file.fileno()).st_mode & 0o077:
                    raise ValueError(f"the token in {path} can be read by others: chmod 600 {path}")
                token = file.read(256)
        except OSError as error:
            raise ValueError(f"the token in {path} cannot be read: {error.strerror}") from None
    token = token.strip()
    if not token:
        return {}
    if not re.fullmatch("[!-~]+", token):
        raise ValueError("AGENT_BUS_TOKEN is no token: it has blanks or other characters in it")
    parts = urlsplit(url)
    if parts.scheme == "http" and not is_here(parts.hostname or "") and not os.environ.get("AGENT_BUS_PLAIN_HTTP"):
        advice = "use https, or in a tunnel or a VPN set AGENT_BUS_PLAIN_HTTP=1"
        raise ValueError(f"the token would cross the network to {url} in the clear: {advice}")
    return {"Authorization": f"Bearer {token}"}


def is_here(host: str) -> bool:
    return bool(re.fullmatch(r"localhost|::1|127(\.[0-9]+){3}", host))


def proxy_for(scheme: str, host: str, port: int) -> str | None:
    """The proxy that the environment names for this host; for this machine itself there is none."""
    if is_here(host) or f"{scheme}_proxy" not in map(str.lower, os.environ):
        return None
    from urllib.request import getproxies, proxy_bypass  # slow to import, and seldom needed

    return None if proxy_bypass(f"{host}:{port}") else getproxies().get(scheme)


@contextlib.contextmanager
def hung_up_after(seconds: float, sock: socket.socket) -> Iterator[None]:
    """Ends an exchange from outside. A socket's own timeout is per read, so an answer that drips would never end."""

    def hang_up() -> None:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)  # of the TCP under TLS: an SSLSocket is not for two threads

    timer = threading.Timer(seconds * 1.1, hang_up)  # a little after the socket's own timeout, whose error says more
    try:
        timer.start()
        yield
    finally:
        timer.cancel()


def judged(response: http.client.HTTPResponse, body: bytearray) -> dict[str, Any]:
    """The JSON object of a 200, or what anything else in its place means: Refused, Unreachable."""
    said: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        said = json.loads(body.decode(), parse_float=Decimal, parse_constant=str)
    answer: dict[str, Any] = said if isinstance(said, dict) else {}
    if response.status == 200 and answer:
        return answer
    error = answer.get("error")
    if 400 <= response.status < 500 and response.status not in (408, 425, 429) and isinstance(error, str):
        raise Refused(response.status, error)
    wait = response.headers.get("Retry-After", "")
    raise Unreachable(f"{response.status}: {error or 'no JSON of a bus'}", float(wait) if wait.isdecimal() else 0.0)


def clock_of(response: http.client.HTTPResponse) -> float:
    """The clock of the bus, which makes the ages right where ours is wrong; ours if it does not tell."""
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return email.utils.parsedate_to_datetime(response.headers.get("Date", "")).timestamp()
    return time.time()


class Reader:
    """One name's place on the bus: which bus answers, how far it is read there, how long the next poll may be held.

    `announce` takes a line for whoever reads the messages, `warn` one for whoever looks after the program, and `clock`
    is the module time, or what stands for it in a test.
    """

    cursor: Cursor  # on `bus`

    def __init__(
        self, names: Sequence[str], url: str | None, channel: str | None, since: str | None, wait: float
    ) -> None:
        self.url = url or os.environ.get("AGENT_BUS_URL") or DEFAULT_URL
        self.channel = channel or os.environ.get("AGENT_BUS_CHANNEL") or "default"
        if not 1 <= len(names) <= 16:
            raise ValueError("a reader has 1 to 16 names")
        for name in (*names, self.channel):
            check_name(name)
        if since not in (None, "now", "last") and not DECIMAL.fullmatch(str(since)):
            raise ValueError(f"since is 'now', 'last' or seconds like 1795203596.123456, and not {since!r}")
        self.names, self.since, self.wait, self.hold = names, since, wait, wait
        self.path, self.query = "/recv", [*(("to", name) for name in names), ("channel", self.channel)]
        self.bus: str | None = None  # the id of the one that answered last
        self.bus_time = 0.0  # s since 1970, by its clock, when it did
        self.outage: Outage | None = None  # if it does not answer now
        self.came = False  # a message, ever
        self.open_cursor = Cursor  # or a kind of it
        self.announce: Callable[[str], None] = lambda line: None
        self.warn: Callable[[str], None] = lambda line: None
        self.clock: Any = time

    def messages(self, once: bool = False, timeout: float | None = None) -> Iterator[dict[str, Any]]:
        """See receive(). What is not a dict, from a strange bus, is given as it is."""
        for answer in self.answers(once, timeout):
            for message in answer["messages"]:
                yield message
                self.cursor.pass_over(message)

    def answers(self, once: bool, timeout: float | None) -> Iterator[dict[str, Any]]:
        """Answers of the bus. When the next one is asked for, the cursor moves to the end of this one."""
        end = math.inf if timeout is None else self.clock.monotonic() + timeout
        while True:
            began = self.clock.monotonic()
            left = max(end - began, 0)
            allowed = min(self.wait + GRACE_SECONDS, left + 2)  # s; 2 for an answer that is on its way
            try:
                answer = self.poll(min(self.hold, left), allowed)
            except Unreachable as fault:
                now = self.clock.monotonic()
                if now < end:
                    self.endure(fault, now - began, end - now)
                    continue
                held = self.bus and not self.outage and now - began >= allowed
                if self.came or held:  # a bus of the old contract holds as long as it likes
                    return
                raise Unreachable(f"{self.url} is out of reach ({fault}); tools/bus_doctor.py says where") from fault
            self.came = self.came or bool(answer["messages"])
            yield answer
            self.cursor.move(str(answer["now"]))
            if answer.get("more") and not self.came:
                continue  # so much was looked at that was for others
            now = self.clock.monotonic()
            if now >= end or (once and self.came and not answer.get("more")):
                return
            if not answer["messages"]:
                self.clock.sleep(min(max(began + 1 - now, 0), end - now))  # a bus that does not hold is not run down

    def endure(self, fault: Unreachable, spent: float, left: float) -> None:
        if spent >= 1:  # s; it was not turned away but held, perhaps for longer than something on the way allows
            self.hold = max(self.hold / 2, 1)
        self.outage = self.outage or Outage(self)
        self.outage.endure(fault, left)

    def poll(self, hold: float, seconds: float) -> dict[str, Any]:
        """One answer of the bus whose cursor we have. If it is another one's, that is an outage, and ends with it."""
        if self.bus is None:
            health, self.bus_time = ask(self.url, "/healthz", min(seconds, GRACE_SECONDS))
            if health.get("ok") is not True:
                raise Unreachable("no JSON of a bus")
            self.take_up(health)
        answer, self.bus_time = self.request(hold, seconds)
        if not isinstance(answer.get("messages"), list) or not DECIMAL.fullmatch(str(answer.get("now"))):
            raise Unreachable("no JSON of a bus")
        if id_of(answer) != self.bus:
            self.take_up(answer)
            raise Unreachable("another bus answers now")
        if self.outage:
            self.outage.over()
            self.outage = None
        if not answer["messages"]:
            self.hold = min(self.hold * 1.1, self.wait)  # slowly, for each step too far costs a poll
        if "gap" in answer:
            self.announce(f"messages are gone, retention removed them before they were read: {dump(answer['gap'])}")
        return answer

    def request(self, hold: float, seconds: float) -> tuple[dict[str, Any], float]:
        query = [*self.query, ("since", self.cursor.at), ("block", "true"), ("wait", f"{hold:.3f}")]
        return ask(self.url, f"{self.path}?{urlencode([*query, ('bus', str(self.bus))])}", seconds)

    def take_up(self, answer: dict[str, Any]) -> None:
        """Go on with our cursor on the bus that answers. Where the caller wants to start is meant for the first one."""
        self.bus = id_of(answer)
        self.cursor = self.open_cursor(self.bus, self.channel, self.names[0], self.warn)
        if self.since:
            self.cursor.at, self.since = self.since, None
        if self.bus == OLD_CONTRACT:
            self.cursor.at = {"last": "0", "now": str(answer.get("now"))}.get(self.cursor.at, self.cursor.at)


def check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name: 1 to 64 of A-Z a-z 0-9 . _ : @ - and first a letter or digit")


def id_of(answer: dict[str, Any]) -> str:
    return str(answer.get("bus", OLD_CONTRACT))


class Cursor:
    """How far one name has read on one bus: a decimal or the word `last`, in a file of its own.

    Written to another file and renamed: a reader that is killed leaves the old one or the new one. No fsync: a power
    cut may bring back an older or an empty file, then messages come again, and that is within at-least-once.
    """

    def __init__(self, bus: str, channel: str, name: str, warn: Callable[[str], None]) -> None:
        self.state = state_directory()
        self.path = os.path.join(self.state, "cursors", *map(file_name, (bus, channel, name)))
        self.lock = self.only_one(name)
        self.at, self.warn = "last", warn
        self.load()
        self.move(self.at)  # where it cannot be written, fail before a message is asked for

    def only_one(self, name: str) -> IO[str]:
        """A file, locked until it is closed or this process ends: two readers would each see half of the mail."""
        try:
            os.makedirs(self.state, 0o700, exist_ok=True)
            os.makedirs(os.path.dirname(self.path), 0o700, exist_ok=True)
            file = open(os.open(f"{self.path}~lock", os.O_RDWR | os.O_CREAT, 0o600), "r+", encoding="ascii")  # noqa: SIM115
        except OSError as error:
            raise self.unwritable(error) from error
        end = time.monotonic() + LOCK_SECONDS
        while not try_lock(file):
            if time.monotonic() >= end:
                raise Busy(f"{name} is read already, by process {file.read(20).strip()}: end that one first")
            time.sleep(0.05)
        file.truncate()
        file.write(f"{os.getpid()}\n")
        file.flush()
        return file

    def load(self) -> None:
        """Where the file says that we are; what it does not know stays as it was."""
        with contextlib.suppress(OSError), open(self.path, encoding="ascii", errors="replace") as file:
            at = file.read(64).strip()
            if DECIMAL.fullmatch(at):
                self.at = at
            elif at != "last":
                self.warn(f"{self.path} holds no cursor: starting where the bus remembers us")

    def move(self, since: str) -> None:
        self.at = since
        new = f"{self.path}~{os.getpid()}"
        try:
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as file:
                file.write(f"{since}\n")
            os.replace(new, self.path)
        except OSError as error:
            raise self.unwritable(error) from error

    def pass_over(self, message: Any) -> None:
        """This message was received."""
        ts = str(message.get("ts")) if isinstance(message, dict) else ""
        if DECIMAL.fullmatch(ts):
            self.move(ts)

    def unwritable(self, error: OSError) -> OSError:
        advice = "set AGENT_BUS_STATE_DIR to a directory that can be written"
        return OSError(f"the cursor cannot be saved in {self.path} ({error.strerror}): {advice}")


def try_lock(file: IO[Any]) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(file.fileno(), 1 << 20, os.SEEK_SET)  # beyond the text, which the other one may want to read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            os.lseek(file.fileno(), 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def state_directory() -> str:
    state = os.environ.get("XDG_STATE_HOME") or os.path.join("~", ".local", "state")
    state = os.environ.get("AGENT_BUS_STATE_DIR") or os.path.join(state, "agent-bus")
    return os.path.abspath(os.path.expanduser(state))


def file_name(text: str) -> str:
    """The text as a file name: never `.` or `..`, without a `~`, and no other's, even where A and a are one file."""
    return re.sub(rb"^\.|[^a-z0-9._-]", lambda byte: b"%%%02X" % ord(byte[0]), text.encode()).decode()


class Outage:
    """From the first failed attempt to the next answer: when to try again, who has been told. Used by one Reader."""

    def __init__(self, reader: Reader) -> None:
        self.url, self.announce, self.warn, self.clock = reader.url, reader.announce, reader.warn, reader.clock
        self.began, self.since = self.clock.monotonic(), time.strftime("%H:%M:%SZ", time.gmtime(self.clock.time()))
        self.pause, self.reason, self.announced = FIRST_PAUSE, "", False

    def endure(self, fault: Unreachable, left: float) -> None:
        """Wait until it is time for the next attempt, but not more than `left` seconds."""
        if str(fault) != self.reason:
            self.reason = str(fault)
            self.warn(f"{self.url}: {self.reason}; trying again")
        pause = min(max(self.pause * random.uniform(0.5, 1), fault.retry_after), LONGEST_PAUSE, left)
        self.pause = min(2 * self.pause, LONGEST_PAUSE)
        loud = max(self.began + LOUD_SECONDS - self.clock.monotonic(), 0)
        if not self.announced and loud <= pause:
            self.clock.sleep(loud)
            pause -= loud
            self.announced = True
            self.announce(f"{self.url} out of reach since {self.since} ({self.reason}); still trying")
        self.clock.sleep(pause)

    def over(self) -> None:
        if self.announced:
            self.announce(f"{self.url} is back, after {span(self.clock.monotonic() - self.began)}")


class Observer(Reader):
    """Looks on: everybody's messages, of which it consumes none. It counts as nobody, and its place is in memory.

    `filters` are those of GET /log; `since` is a decimal, `now`, or how long ago, as 90s, 5m, 1h or 3d.
    """

    def __init__(self, filters: dict[str, str | None], since: str) -> None:
        super().__init__(["nobody"], None, None, None, HOLD_SECONDS)
        if since != "now" and not DECIMAL.fullmatch(since) and not AGO.fullmatch(since):
            raise ValueError(f"since is 'now', 90s, 5m, 1h, 3d, or seconds like 1795203596.123456, and not {since!r}")
        for name in filter(None, filters.values()):
            for one in name.split(","):
                check_name(one)
        self.path, self.query = "/log", [(field, name) for field, name in filters.items() if name]
        self.begin, self.marks = since, dict[str, Mark]()

    def take_up(self, answer: dict[str, Any]) -> None:
        self.bus = id_of(answer)
        ago = AGO.fullmatch(self.begin)
        begin = f"{max(self.bus_time - int(ago[1]) * SECONDS[ago[2]], 0):.6f}" if ago else self.begin
        self.cursor = self.marks.setdefault(self.bus, Mark(begin))

    def pages(self) -> Iterator[dict[str, Any]]:
        """What there is by now. One fault ends it, so that half of the log never looks like all."""
        more = True
        while more:
            answer = self.poll(0, GRACE_SECONDS)
            yield answer
            self.cursor.move(str(answer["now"]))
            more = bool(answer.get("more"))


class Mark(Cursor):
    """A cursor without a file."""

    def __init__(self, at: str) -> None:
        self.at = at

    def move(self, since: str) -> None:
        self.at = since


def block(message: dict[str, Any], reader: str, now: float, whole: bool = False) -> str:
    """A message as text: a line of what is known about it, each line of its body behind `| `, and `---`.

    The prefix is what keeps a body from looking like another message. `now` is the bus's clock, in s since 1970; the
    age is told from a minute up, the receiver if it is not `reader`, anything else if it is given and not the default.
    Unless it is to be `whole`, a long line goes on behind `|+`, and a long body ends with how to read the rest.
    """
    ts = float(message["ts"])
    fields = {**message, "age": span(now - ts)}
    usual = {"to": reader, "channel": "default", "age": "", "priority": "normal"}
    head = [f"{name}={word(fields[name])}" for name in HEAD if fields.get(name) not in (None, usual.get(name))]
    body = visible(re.sub("\r\n?", "\n", message["msg"]).removesuffix("\n"))
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(ts))
    first, lines = " ".join([stamp, *head]), [f"| {line}" for line in body.split("\n")]
    if not whole:
        first, lines = next(pieces(first, LINE_UNITS)), cut(lines, str(message.get("id")))
    return "\n".join([first, *lines, "---\n"])


def cut(lines: Sequence[str], number: str) -> list[str]:
    """Lines that a Monitor shows: none too long, and as many as go into one write."""
    kept: list[str] = []
    room = WRITE_UNITS - LINE_UNITS - 120  # for the head, and for what is said about the rest
    for place, line in enumerate(lines):
        for part, piece in enumerate(pieces(line, LINE_UNITS - 2)):
            text = f"|+{piece}" if part else piece
            room -= units(text) + 1
            if room < 0:
                rest = sum(map(len, lines[place:])) - part * (LINE_UNITS - 2)
                return [*kept, f"|~ {rest} more characters: python3 bus_recv.py --read {word(number)}"]
            kept.append(text)
    return kept


def units(text: str) -> int:
    return len(text.encode("utf-16-le")) // 2


def pieces(line: str, width: int) -> Iterator[str]:
    """The line in parts of at most so many UTF-16 units; the two halves of a character stay together."""
    raw, start = line.encode("utf-16-le"), 0
    while True:
        end = min(start + 2 * width, len(raw))
        if end < len(raw) and raw[end - 1] & 0xFC == 0xD8:
            end -= 2
        yield raw[start:end].decode("utf-16-le")
        start = end
        if start >= len(raw):
            return


def word(value: Any) -> str:
    text = value if isinstance(value, str) else dump(value)
    return text if re.fullmatch("[A-Za-z0-9._:@/-]{1,64}", text) else visible(json.dumps(text, ensure_ascii=False))


def visible(text: str) -> str:
    r"""The text with all that cannot be seen written out, as in \x1b, \u202e, \U000e0041."""
    return HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def span(seconds: float) -> str:
    """As 5m, 6h or 3d; nothing under a minute."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f}{unit}"
    return ""


def dump(value: Any) -> str:
    """JSON in ASCII, as json.dumps writes it, with the fractions as the bus wrote them."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(key)}: {dump(value[key])}' for key in value)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(dump, value))}]"
    return str(value) if isinstance(value, Decimal) else json.dumps(value)


def show(message: Any, reader: str, now: float, whole: bool = False) -> str:
    try:
        return block(message, reader, now, whole)
    except Exception:  # a strange bus may get a message wrong in any way, and the next one must be shown all the same
        return f"-- agent-bus: not a message: {visible(dump(message))}\n"


def emit(text: str) -> None:
    """Write to stdout, in UTF-8 whatever the locale; when this returns, it is out."""
    if sys.stdout is None:  # `>&-`
        raise BrokenPipeError
    try:
        sys.stdout.buffer.write(text.encode())
        sys.stdout.buffer.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter would try once more at exit, and complain
        raise


def unread() -> int:
    """Bytes of our output that nobody has read, where the system can tell: Linux, of a socket, such as a Monitor's."""
    try:
        import fcntl
        import termios

        return int.from_bytes(fcntl.ioctl(1, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except (ImportError, OSError):
        return 0


def announce(line: str) -> None:
    emit(next(pieces(visible(f"-- agent-bus: {line}".replace("\n", " ")), LINE_UNITS)) + "\n")


class Pace:
    """When the next write may be: a Monitor drops what comes too often. Used by one program."""

    def __init__(self, clock: Any = time) -> None:
        self.clock, self.left, self.last = clock, float(BURST), -math.inf

    def wait(self) -> None:
        now = self.clock.monotonic()
        self.left = min(BURST, self.left + (now - self.last) / EVERY_SECONDS)
        self.clock.sleep(max(self.last + APART_SECONDS - now, (1 - self.left) * EVERY_SECONDS, 0))
        self.left = max(self.left - 1, 0)
        self.last = self.clock.monotonic()


# The ways out. Each moves the cursor as soon as a message is out, and not before.


def show_blocks(reader: Reader, answers: Iterator[dict[str, Any]], settle: float = SETTLE_SECONDS) -> None:
    """What arrived together is written together, as much as one event of a Monitor holds."""
    pace = Pace(reader.clock)

    def write(text: str, last: Any) -> None:
        pace.wait()
        emit(text)
        while settle and unread():  # a busy watch may expire before it reads this
            reader.clock.sleep(settle)
        reader.clock.sleep(settle)  # killed in here, we show it again
        reader.cursor.pass_over(last)

    for answer in answers:
        text, last = "", None
        for message in answer["messages"]:
            more = show(message, reader.names[0], reader.bus_time)
            if text and units(text + more) > WRITE_UNITS:
                write(text, last)
                text = ""
            text, last = text + more, message
        if text:
            write(text, last)


def show_log(observer: Observer, answers: Iterator[dict[str, Any]]) -> None:
    """Whole and at once, for people and pipes."""
    for answer in answers:
        emit("".join(show(message, "", observer.bus_time, whole=True) for message in answer["messages"]))


def show_json(reader: Reader, answers: Iterator[dict[str, Any]]) -> None:
    for answer in answers:
        for message in answer["messages"]:
            emit(f"{dump(message)}\n")
            reader.cursor.pass_over(message)


def run_command(command: str, tries: int, reader: Reader, answers: Iterator[dict[str, Any]]) -> None:
    """The command for each message. After so many tries the message goes to a file, and the next one has its turn."""
    for answer in answers:
        for message in answer["messages"]:
            for attempt in range(1, tries + 1):
                with running(command, message, attempt) as process:
                    code = process.wait()
                if code == 0:
                    break
                reader.warn(f"the command ended with {code} for {message.get('id')}, attempt {attempt} of {tries}")
                if attempt < tries:
                    reader.clock.sleep(pause_after(attempt))
            else:
                dead = f"{reader.cursor.path}~dead"
                with open(os.open(dead, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w", encoding="ascii") as file:
                    file.write(f"{dump(message)}\n")
                reader.warn(f"{message.get('id')} is given up, and in {dead}")
            reader.cursor.pass_over(message)


def pause_after(attempt: int) -> float:
    return min(FIRST_PAUSE * 2.0 ** min(attempt - 1, 10), LONGEST_PAUSE)


@contextlib.contextmanager
def running(command: str, message: dict[str, Any], attempt: int) -> Iterator[subprocess.Popen[bytes]]:
    """The command, which ends with this: JSON on stdin, MSG_FROM, MSG_ID, MSG_SUBJECT ... in its environment."""
    import subprocess  # slow to import, these two
    import tempfile

    fields = {f"MSG_{name.upper()}": str(message.get(name, ""))[:1000] for name in HEAD if name != "age"}
    environment = {**os.environ, **fields, "AGENT_BUS_ATTEMPT": str(attempt)}
    with tempfile.TemporaryFile() as file:  # and no pipe: nobody has to be there to fill it
        file.write(dump(message).encode())
        file.seek(0)
        process = None
        try:
            with signals_put_off():
                process = subprocess.Popen(command, shell=True, stdin=file, env=environment, start_new_session=True)
            yield process
        finally:
            if process and process.poll() is None:
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.killpg(process.pid, signal.SIGKILL) if os.name == "posix" else process.kill()
                process.wait()


@contextlib.contextmanager
def signals_put_off() -> Iterator[None]:
    """A signal that comes while a command is being started is obeyed when we know whom to kill."""
    came: list[int] = []
    ours = [number for number in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(number))]
    before = [signal.signal(number, lambda number, _: came.append(number)) for number in ours]
    try:
        yield
    finally:
        for number, handler in zip(ours, before):
            signal.signal(number, handler)
        for one in came:
            signal.raise_signal(one)


class Worker(Reader):
    """Takes jobs from a queue, one at a time, and runs a command for each. What it has done is told to the bus.

    A job is ours while its lease lasts. While the command runs we extend it; when the bus says that it is not ours any
    more, another may have it, and the command is killed. The first SIGTERM lets the command end, the second one, or
    Ctrl-C, kills it and gives the job back.
    """

    def __init__(self, names: Sequence[str], channel: str | None, command: str, lease: float) -> None:
        if len(names) > 1:
            raise ValueError("a worker has one queue")
        super().__init__(names, None, channel, None, HOLD_SECONDS)
        self.command, self.lease = command, lease
        self.order = {"to": names[0], "channel": self.channel, "lease": lease}
        if os.environ.get("AGENT_NAME"):
            self.order["worker"] = os.environ["AGENT_NAME"]
        self.at_work = self.ending = False

    def stop(self, *_: Any) -> None:
        """On SIGTERM."""
        if self.ending or not self.at_work:
            sys.exit(0)
        self.ending = True

    def take_up(self, answer: dict[str, Any]) -> None:
        self.bus, self.cursor = id_of(answer), Mark("0")  # the bus remembers what is done

    def request(self, hold: float, seconds: float) -> tuple[dict[str, Any], float]:
        answer, now = ask(self.url, "/claim", seconds, {**self.order, "wait": round(hold, 3)})
        try:
            [(job["id"], job["lease"], int(job["attempt"])) for job in answer["messages"]]
        except (KeyError, TypeError, ValueError):
            raise Unreachable("no JSON of a bus") from None
        return answer, now

    def work(self, answers: Iterator[dict[str, Any]]) -> None:
        for answer in answers:
            for job in answer["messages"]:
                self.at_work = True
                self.do(job)
                self.at_work = False
                if self.ending:
                    return

    def do(self, job: dict[str, Any]) -> None:
        """Run the command, and tell the bus how that ended."""
        attempt = int(job["attempt"])
        try:
            with running(self.command, job, attempt) as process:
                code = self.attend(process, job)
        except BaseException:  # we are to end now
            with contextlib.suppress(Refused, Unreachable):
                self.tell("nack", job, reason="the worker was stopped")
            raise
        if code == 0:
            self.settle("ack", job)
        elif code is not None:
            reason = f"the command ended with {code}"
            self.warn(f"{reason} for {job['id']}, attempt {attempt}")
            self.settle("nack", job, reason=reason, delay=pause_after(attempt))

    def settle(self, verb: str, job: dict[str, Any], **members: Any) -> None:
        """Tell the bus, however long it takes: what it does not hear, another does once more."""
        while True:
            try:
                return self.tell(verb, job, **members)
            except Refused as refused:
                return self.warn(f"{verb} of {job['id']}: {refused}")
            except Unreachable as fault:
                self.endure(fault, 0, math.inf)

    def attend(self, process: subprocess.Popen[bytes], job: dict[str, Any]) -> int | None:
        """The exit code of the command, or None if we lost the lease while it ran."""
        import subprocess

        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(self.lease / 3)
            try:
                self.tell("extend", job, seconds=self.lease)
            except Refused as refused:
                self.warn(f"{job['id']} is given up, its command is killed: {refused}")
                return None
            except Unreachable as fault:
                self.warn(f"the lease of {job['id']} is not extended yet: {fault}")

    def tell(self, verb: str, job: dict[str, Any], **members: Any) -> None:
        ask(self.url, f"/{verb}", GRACE_SECONDS, {"id": job["id"], "lease": job["lease"], **members})


def read_one(number: str) -> int:
    """Print one message, whole. It needs no cursor and moves none."""
    url = os.environ.get("AGENT_BUS_URL") or DEFAULT_URL
    answer, now = ask(url, f"/message/{quote(number, safe='')}", GRACE_SECONDS)
    emit(block(answer["message"], "", now, whole=True))
    return 0


def look_on(options: argparse.Namespace) -> int:
    filters = {"to": options.to, "from": options.sender, "channel": options.channel}
    observer = Observer(filters, options.since or "0")
    observer.warn = observer.announce = complain
    answers = observer.pages() if options.no_follow else observer.answers(False, options.timeout)
    (show_json if options.json else show_log)(observer, answers)
    return 0


def complain(line: str) -> None:
    print("bus_recv:", visible(line.replace("\n", " ")), file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Show the messages for NAME on an agent-bus, as they arrive.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="the reader's own, then others it reads along")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each message")
    parser.add_argument("--once", action="store_true", help="end after what waits, or after the first to arrive")
    parser.add_argument("--timeout", type=float, metavar="S", help="end after S seconds (with --once: 25)")
    parser.add_argument("--since", metavar="X", help="a time (s since 1970), now, or last; default: the saved cursor. "
                        "Of --log: a time, now, or 90s, 5m, 1h, 3d ago; default: all there is")
    parser.add_argument("--channel", metavar="C", help="default: $AGENT_BUS_CHANNEL, or 'default'")
    parser.add_argument("--exec", metavar="CMD", help="run CMD for each message: JSON on stdin, MSG_FROM ... in its "
                        "environment; the cursor moves when it ends with 0")
    parser.add_argument("--tries", type=int, default=5, metavar="N", help="of --exec, then the message goes to a file")
    parser.add_argument("--claim", action="store_true", help="with --exec: NAME is a queue, and each message of it "
                        "goes to one of those who do this; what fails is tried again, by any of them")
    parser.add_argument("--lease", type=float, default=60.0, metavar="S", help="of --claim: a worker that is gone "
                        "for S seconds loses its job to another (60)")
    parser.add_argument("--read", metavar="ID", help="print this message, whole, and end")
    parser.add_argument("--log", action="store_true", help="look on: the messages of everybody on every channel")
    parser.add_argument("--to", metavar="NAME", help="of --log: only what is for NAME; several as a,b,c")
    parser.add_argument("--from", dest="sender", metavar="NAME", help="of --log: only what is from NAME")
    parser.add_argument("--no-follow", action="store_true", help="of --log: what there is, and end")
    options = parser.parse_args(argv)
    if bool(options.names) + bool(options.read) + options.log != 1:
        parser.error("give at least one NAME, or --read ID, or --log")
    if (options.to or options.sender or options.no_follow) and not options.log:
        parser.error("--to, --from and --no-follow belong to --log")
    if options.claim and not (options.names and options.exec):
        parser.error("--claim is for a NAME with --exec")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    timeout = HOLD_SECONDS if options.once and options.timeout is None else options.timeout
    try:
        if options.read:
            return read_one(options.read)
        if options.log:
            return look_on(options)
        reader = Reader(options.names, None, options.channel, options.since, HOLD_SECONDS)
        if options.claim:
            reader = Worker(options.names, options.channel, options.exec, options.lease)
            signal.signal(signal.SIGTERM, reader.stop)
        reader.warn = complain
        # A program that reads JSON, or a command's own output, reads nothing else.
        reader.announce = complain if options.json or options.exec else announce
        answers = reader.answers(options.once, timeout)
        if isinstance(reader, Worker):
            reader.work(answers)
        elif options.exec:
            run_command(options.exec, options.tries, reader, answers)
        elif options.json:
            show_json(reader, answers)
        else:
            show_blocks(reader, answers, settle=0 if options.once else SETTLE_SECONDS)
    except BrokenPipeError:  # nobody reads us any more
        return 0
    except KeyboardInterrupt:
        return 130
    except (Refused, Unreachable, Busy, ValueError, OSError) as error:
        complain(str(error))
        return {Refused: 1, Unreachable: 75}.get(type(error), 2)
    return 0 if reader.came else 3


if __name__ == "__main__":
    sys.exit(main())
