#!/usr/bin/env python3
"""Receive messages from an agent-bus: each as a block of text, or as a line of JSON.

    AGENT_BUS_URL=http://10.0.0.5:8080 python3 bus_recv.py spark
    python3 bus_recv.py spark reviewers --once
    python3 bus_recv.py --read 660ba678a1b40
    python3 bus_recv.py spark --exec ./on_mail.sh

The first runs until it is killed, also in an agent's Monitor. --once shows all waiting messages, or else the first to
arrive; --read one message, whole; --exec runs a command for each message. In a program: `bus_recv.receive("spark")`.
Two other programs are run from here, if they lie beside this file: bus_work.py by --claim (take jobs from a queue) and
bus_log.py by --log (show everybody's messages).

The parts of this file, in order: receive() and ask() for programs; Reader (polls a bus, rides out an outage);
SessionReader (what a session of an agent needs more); Cursor (how far a name has read, on disk); the
marked part, which bus_send.py has too and which speaks HTTP (proxies, tokens, faults); block (a message as text);
show_blocks and run_command (the outputs); main.

Messages are whole on a terminal, in a file and in a pipe. A Monitor of Claude Code cuts and drops what exceeds its
limits; its end of our output is a socket (seen with 2.1.329), so for a socket, or with --monitor, they are paced and
wrapped. There, if more than 20 messages wait, only urgent ones and the number are shown, and all stay unread.

A message is shown at least once. Its cursor is saved after the message was written out, so a reader that is killed
shows its last message again and never loses one; the id tells the repeat. Only a 200 with the bus's own JSON moves the
cursor, and only the bus's own 4xx ends the program. Anything else (silence, half an answer, a redirect, a proxy's page)
is an outage. --read acknowledges nothing: the message stays unread. On a bus with tokens its sender sees that it was
fetched. --since X skips the messages from before X that are still unread, and says how many they are; or it shows
earlier ones again. X is where the next start goes on, too, unless it shows more.

Standard library only, Python 3.9 and later. It reads the environment (AGENT_BUS_URL, AGENT_NAME, AGENT_BUS_CHANNEL,
AGENT_BUS_TOKEN or AGENT_BUS_TOKEN_FILE, AGENT_BUS_CA, AGENT_BUS_UA, AGENT_BUS_STATE_DIR; http_proxy, https_proxy,
no_proxy) and below it the file ~/.config/agent-bus/default.env, or PROFILE.env (--bus, AGENT_BUS_PROFILE). It talks to
that URL (http, https, or unix:/path; with commas between the URLs of a bus that has several), follows no redirect, and
writes one small file per bus, channel and name.
Exit code: 0 done, 1 refused by the bus, 2 usage or no place for the file, 3 nothing arrived, 75 out of reach.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from typing import IO, Any
from urllib.parse import SplitResult, quote, unquote, urlencode, urlsplit

# Python 3.8 prints this text. Older ones show the line in a SyntaxError, because they do not know `:=`.
if sys.version_info < (3, 9) and (needs := "bus_recv.py needs Python 3.9 or later"):  # noqa: UP036
    sys.exit(needs)

HOLD_SECONDS = 25.0  # that the bus may hold a poll: common proxies cut a quiet request after 30 s
FOLLOW_SECONDS = 10.0  # the same, for a session: it may be renamed meanwhile
LOUD_SECONDS = 60.0  # of outage, after which the user is told: silence must not look like health
GREET_SECONDS = 0.3  # after a bus was found; a refused poll is answered sooner
LEAVE_SECONDS = 2.0  # for the last request of a reader that ends
TELL_SECONDS = 0.2  # until we say that another process reads as this name
LOCK_SECONDS = 3.0  # that we wait for its end

# A Monitor of Claude Code cuts or drops what exceeds its limits; these are a little lower. In UTF-16 units: a line has
# 500, and what comes within 0.2 s is one event of 3000; 10 events at once, then one every 2 s. SETTLE_SECONDS: until a
# block counts as seen, because a Monitor drops a block that arrives while it expires.
LINE_UNITS, WRITE_UNITS = 480, 2700
BURST, EVERY_SECONDS, APART_SECONDS, SETTLE_SECONDS = 8, 2.1, 0.3, 0.3
BACKLOG, EARLY = 20, 3  # messages that may wait until they are a backlog; urgent ones of it that are shown

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,63}")
DECIMAL = re.compile(r"[0-9]{1,10}(?:\.[0-9]{1,9})?")  # s since 1970: the form of a cursor
# An id of digits alone is one if its time is so near, else it may be milliseconds. An answer may be so far ahead of our
# clock and our cursor; a bus takes as much from a cursor.
TEN_YEARS, AHEAD_SECONDS = 10 * 365.25 * 86400, 300.0
NAME_BYTES = 200  # of a file name that stands for a text
OLD_CONTRACT = "-"  # stands for the id of a bus that gives none; such a bus knows no words for `since` either
HEAD = ("from", "relayed_from", "id", "to", "channel", "reply_to", "age", "priority", "type", "subject")


class Busy(Exception):
    """Another process reads as this name, with this state directory; the text says which."""


def receive(names: str | Sequence[str], *, once: bool = False, timeout: Any = None, **given: Any) -> Iterator[Any]:
    """Yields the messages for `names` as they arrive, as dicts (PROTOCOL.md, a message).

    The first name is the reader's own. A message counts as received when the next one is asked for: then its cursor is
    saved. The messages end after `timeout` seconds; with `once`, after all that waited, or else after the first to
    arrive; otherwise never. `given` may have `url` and `channel`, which default to the environment's or the
    configuration file's; `since`, which overrules the saved cursor (`now`, `last`, a decimal, `1h` for an hour ago, a
    time like `2026-12-01T09:00Z`, or the id of a message); and `wait`, for how long a poll is held (25 s, at most 60).
    A number with a fraction is a Decimal, so that no `ts` is ever rounded.
    Raises Refused; Unreachable, if time runs out while the bus is out of reach; Busy, if another process reads as this
    name; ValueError for a wrong name, URL or `since`; OSError if the cursor cannot be saved.
    """
    return Reader([names] if isinstance(names, str) else names, **given).messages(once, timeout)


def ask(url: str, path: str, seconds: float, order: dict[str, Any] | None = None) -> tuple[dict[str, Any], float]:
    """GET `path`, or POST `order`: the bus's JSON, and its clock (s since 1970). Raises as exchange()."""
    answer, headers = exchange(url, path, None if order is None else json.dumps(order).encode(), seconds, Decimal)
    return answer, clock_of(headers)


def clock_of(headers: Any) -> float:
    """The clock of the bus, so that ages are right where ours is wrong; our clock if the answer does not tell."""
    import email.utils

    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return email.utils.parsedate_to_datetime(headers.get("Date", "")).timestamp()
    return time.time()


class Reader:
    """One name's place on the bus: which bus answers, how far the name has read there, since when nothing answers.

    After the first answer, `cursor` is the cursor for that bus, and `bus_time` its clock at the answer (s since 1970).
    `announce` takes a line for the reader of the messages, `warn` a line for the operator of the program. `clock` is
    the module time, or its replacement in a test.
    """

    def __init__(self, names: Any, url: Any = None, channel: Any = None, since: Any = None, wait: float = HOLD_SECONDS):
        given = settings(url)
        self.url, self.channel = given["AGENT_BUS_URL"], channel or given.get("AGENT_BUS_CHANNEL", "default")
        if not 1 <= len(names) <= 16:
            raise ValueError(f"{len(names)} names are given: give 1 to 16")
        for name in (*names, self.channel):
            check_name(name)
        if since is not None:
            moment(str(since), time.time())
        self.names, self.since, self.wait, self.hold = names, since, wait, wait  # hold: s, of the next poll
        self.bus: str | None = None  # the id of the bus that answered last
        # The same for all that share a cursor: so the bus can tell that two machines read one name.
        self.reader = f"{random.Random(f'{socket.gethostname()} {state_directory()}').getrandbits(64):x}"
        # failures: in this outage; announced: was it announced?; came: any mail yet?
        self.failures, self.announced, self.came = 0, False, False
        self.announce: Callable[[str], None] = lambda line: None
        self.greet: Callable[[], Any] = bool  # called when a bus was found
        self.warn, self.open_cursor, self.clock = self.announce, Cursor, time  # or a subclass; or the clock of a test

    def messages(self, once: bool = False, timeout: float | None = None) -> Iterator[dict[str, Any]]:
        """See receive(). If a strange bus sends something that is not a dict, it is given as it is."""
        for answer in self.answers(once, timeout):
            for message in answer["messages"]:
                yield message
                self.cursor.pass_over(message)

    def answers(self, once: bool, timeout: float | None) -> Iterator[dict[str, Any]]:
        """Answers of the bus. When the next one is asked for, the cursor moves to the end of this one."""
        self.end = end = float("inf") if timeout is None else self.clock.monotonic() + timeout
        while True:
            began = self.clock.monotonic()
            left = max(end - began, 0)
            allowed = min(self.wait + GRACE_SECONDS, left + 2)  # s; 2 for an answer that is on its way
            try:
                answer = self.poll(min(self.hold, left), allowed)
            except Unreachable as fault:
                now = self.clock.monotonic()
                if now < end and (self.bus or type(fault.__cause__).__name__ != "SSLError"):  # https, where http is
                    self.endure(fault, now - began, end - now)
                    continue
                # A bus of the old contract holds a poll as long as it likes.
                if self.came or (self.bus and not self.failures and now - began >= allowed):
                    return
                raise Unreachable(no_bus(self.url, fault)) from fault
            self.came = self.came or bool(answer["messages"])
            yield answer
            self.cursor.move(str(answer["now"]))
            now, more = self.clock.monotonic(), answer.get("more")  # more without a message: a page that was for others
            if (once and self.came and not more) or (now >= end and (self.came or not more)):
                return
            if not answer["messages"] and not more:
                self.clock.sleep(min(max(began + 1 - now, 0), end - now))  # in case the bus does not hold a poll

    def endure(self, fault: Unreachable, spent: float, left: float) -> None:
        """Wait until it is time for the next attempt, but not more than `left` seconds."""
        # After 1 s the poll was not turned away but held, perhaps for longer than something on the way allows.
        self.hold = max(self.hold / 2, 1) if spent >= 1 else self.hold
        if not self.failures:
            self.failing_since, self.failing_at, self.reason = self.clock.monotonic(), self.clock.time(), ""
        self.failures += 1
        if str(fault) != self.reason:
            self.reason = str(fault)
            self.warn(no_bus(self.url, fault, "; trying again"))
        pause = min(max(pause_after(self.failures) * random.uniform(0.5, 1), fault.retry_after), LONGEST_PAUSE, left)
        quiet = self.failing_since + LOUD_SECONDS - self.clock.monotonic()
        if quiet <= 0 and not self.announced:
            self.announced, since = True, time.strftime("%H:%M:%SZ", time.gmtime(self.failing_at))
            # Without what an answer says, which may be anybody's: this line stands among messages in our name.
            self.announce(f"{self.url} out of reach since {since} ({self.reason.partition(':')[0][:60]}); still trying")
        self.clock.sleep(pause if self.announced else min(pause, quiet))

    def poll(self, hold: float, seconds: float) -> dict[str, Any]:
        """One answer of the bus whose cursor we have. Another bus's answer counts as a fault; its cursor is opened."""
        if self.bus is None:
            health, self.bus_time = ask(self.url, "/healthz", min(seconds, GRACE_SECONDS))
            if health.get("ok") is not True:
                raise Unreachable()
            self.take_up(health)
            self.greet()
        answer, self.bus_time = self.request(hold, seconds)
        if not isinstance(answer.get("messages"), list) or not DECIMAL.fullmatch(str(answer.get("now"))):
            raise Unreachable()
        answer["more"] = bool(answer.get("more")) and str(answer["now"]) != self.cursor.at  # else it is asked for ever
        if str(answer.get("bus", OLD_CONTRACT)) != self.bus:
            self.take_up(answer)
            raise Unreachable("another bus answers now")
        self.check_times(answer)
        answer["messages"] = [one for one in answer["messages"] if not self.cursor.has_read(one)]
        if self.announced:
            self.announce(f"{self.url} is back, after {span(self.clock.monotonic() - self.failing_since)}")
        elif self.failures:
            self.warn(f"{self.url}: connected again")
        self.failures, self.announced = 0, False
        # Longer holds again, but slowly: each step too far costs a poll.
        self.hold = self.hold if answer["messages"] else min(self.hold * 1.1, self.wait)
        if "gap" in answer:
            found = DECIMAL.findall(dump(answer["gap"]))[:2]
            self.announce(f"messages are no longer on the bus: {' to '.join(map(iso, found))}")
        return answer

    def check_times(self, answer: dict[str, Any]) -> None:
        """Take no answer that would move the cursor into the future, past later messages. That is a fault.

        Another program may have answered at this address, or a bus of the first contract whose clock is wrong. If our
        own clock is wrong, the /healthz of the same bus confirms the times.
        """
        latest = max(map(seconds_of, (answer["now"], *answer["messages"]))) - AHEAD_SECONDS
        if latest > max(self.clock.time(), seconds_of(self.cursor.at)):
            health, _ = ask(self.url, "/healthz", GRACE_SECONDS)
            if health.get("bus") != self.bus or latest > seconds_of(health.get("now")):
                raise Unreachable("its time is far ahead of ours, so the cursor stays; is a clock wrong?")

    def request(self, hold: float, seconds: float) -> tuple[dict[str, Any], float]:
        """One poll; see ask()."""
        how = "peek=true" if self.cursor.backlog else f"block=true&wait={hold:.3f}"
        return ask(self.url, f"/recv?{how}&{self.query()}", seconds)

    def query(self, since: str = "") -> str:
        place = {"to": self.names, "channel": self.channel, "since": since or self.cursor.at, "bus": self.bus}
        return urlencode({**place, "reader": self.reader}, doseq=True)

    def take_up(self, answer: dict[str, Any]) -> None:
        """Go on with our cursor on the bus that answers. `since`, if the caller gave it, is for the first bus only."""
        bus = str(answer.get("bus", OLD_CONTRACT))
        self.cursor, self.bus = self.open_cursor(bus, self.channel, self.names[0], self.warn), bus
        self.cursor.reached = self.cursor.reached if self.since in (None, "last") else {}  # it may want that again
        since, self.since = moment(str(self.since or self.cursor.at), self.bus_time), None
        if self.bus == OLD_CONTRACT:
            now = min(str(answer.get("now")), f"{self.clock.time() + AHEAD_SECONDS:.6f}", key=seconds_of)
            since = {"last": "0", "now": now}.get(since, since)
        elif (end := float("inf") if since == "now" else seconds_of(since)) > seconds_of(self.cursor.at):
            self.tell_passed(end)
        self.cursor.at = since

    def close(self) -> None:
        """Tell the bus that this reader ends, and how far it has read. An older bus takes that for a look (peek)."""
        if self.bus not in (None, OLD_CONTRACT) and not self.failures:
            with contextlib.suppress(Refused, Unreachable, ValueError):  # the bus finds it out by itself, later
                ack = "false" if self.cursor.backlog else "true"
                ask(self.url, f"/recv?peek=true&ack={ack}&leave=true&max=1&{self.query()}", LEAVE_SECONDS)

    def tell_passed(self, end: float) -> None:
        """Warn of the mail between the saved cursor and `end`: we do not get it. A look (peek) takes none of it."""
        with contextlib.suppress(Refused, Unreachable, LookupError, TypeError):  # it is only a warning
            answer, _ = ask(self.url, f"/recv?peek=true&{self.query()}", GRACE_SECONDS)
            passed = [one for one in answer["messages"] if 0 < seconds_of(one) <= end]
            number = f"{len(passed)}{' or more' if answer.get('more') else ''}"
            if passed:
                self.warn(f"{number} waiting are passed over; to read them: --since {passed[0]['id']}")


class Notice(str):
    """A line of our own among the messages of an answer."""


class SessionReader(Reader):
    """Reads on with the new name when the session that it reads for is renamed, and for a day with the old one too.

    An integration writes these names into a file, each with the time (s since 1970) until which it is read.

    With `leaves`, leaves a backlog unread, because it would fill the context of the agent that reads us. If more than
    BACKLOG messages wait at the start or after an outage, it gives the oldest EARLY urgent ones of them, and a Notice
    how many wait. It goes on behind them, and takes nothing until the bus says that they are read. With several names
    it leaves nothing: who reads the mail of one name does not see the others.
    """

    leaves = False

    def request(self, hold: float, seconds: float) -> tuple[dict[str, Any], float]:
        """One poll, or the urgent messages of a backlog; see ask()."""
        hold = self.follow(hold)
        if self.leaves and len(self.names) == 1 and (self.failures or self.cursor.backlog is None):
            self.cursor.backlog = self.cursor.backlog or ""
            # An older bus has no digest, and a proxy may not know it: then all is shown.
            with contextlib.suppress(Refused, Unreachable, LookupError, TypeError, ValueError):
                counts, now = ask(self.url, f"/digest?{self.query()}", GRACE_SECONDS)
                if counts["unread"] > BACKLOG:
                    return self.leave(counts), now
        if self.cursor.backlog:
            ask(self.url, f"/recv?{self.query('now')}", seconds)  # the name counts as listening; nothing is taken
            oldest, _ = ask(self.url, f"/recv?peek=true&max=1&{self.query('last')}", seconds)
            with contextlib.suppress(LookupError, TypeError):
                found, end = oldest["messages"], seconds_of(self.cursor.backlog)
                is_read = seconds_of(found[0]) > end if found else not oldest["more"]
                self.cursor.backlog = "" if is_read else self.cursor.backlog
        return super().request(hold, seconds)

    def leave(self, counts: dict[str, Any]) -> dict[str, Any]:
        """Go behind the messages of this digest. The oldest urgent ones of them, which become fetched, as an answer."""
        urgent, name = list[Any](), self.names[0]
        for each in counts["first_urgent"][:EARLY]:
            with contextlib.suppress(Refused):  # it is gone
                one = ask(self.url, f"/message/{quote(each['id'])}?as={name}", GRACE_SECONDS)[0]["message"]
                urgent += [one] if "msg" in one else []  # else it was recalled
        number = f"{counts['unread']}{' or more' if counts['more'] else ''} messages wait for {name}"
        self.cursor.backlog, shown = str(counts["now"]), f", the first {len(urgent)} are above" if urgent else ""
        inbox = f"bus_inbox shows them, or {called('agent_bus.py inbox', 'inbox')} {name}"
        told = f"{number} ({counts['urgent']} urgent{shown}). {inbox}; newer ones come here."
        return {**counts, "messages": [*urgent, Notice(told)], "more": False}

    def follow(self, hold: float) -> float:
        """Take the names that the session has now. On a machine with sessions a poll is short, to hear of new ones."""
        sessions = place_of("names", self.url, self.channel)
        mine, until = self.names, dict[str, str]()
        with contextlib.suppress(OSError), open(beside(sessions, mine[0]), encoding="ascii") as file:
            until = dict(re.findall(r"^(\S+) ([0-9]+)$", file.read(), re.MULTILINE))
        if names := [name for name in until if int(until[name]) > self.clock.time()]:
            self.names = [*names, *(name for name in mine if name not in until)]
        if self.names[0] != mine[0]:
            before, self.cursor = self.cursor, self.open_cursor(str(self.bus), self.channel, self.names[0], self.warn)
            before.lock.close()
            its = self.cursor.reached  # of the moment when the session got its new name; since then we have read on
            further = {name: max(before.at, its.get(name, "0"), key=seconds_of) for name in (*mine, "all")}
            self.cursor.reached = {**its, **further}
            self.warn(f"reading as {', '.join(self.names)} from now on")
        return min(hold, FOLLOW_SECONDS) if os.path.exists(sessions) else hold


def moment(since: str, now: float) -> str:
    """The cursor for now, last, a cursor, how long ago, a time, or an id: from that on. `now`: the bus's clock."""
    number = int(since, 16) - 1 if re.fullmatch("[0-9a-f]{13}", since) else 0
    if number and not (since.isdecimal() and abs(number / 1e6 - now) > TEN_YEARS):
        return f"{number // 1000000}.{number % 1000000:06d}"
    if since in ("now", "last") or DECIMAL.fullmatch(since):
        return since
    if DURATION.fullmatch(since):
        return f"{max(now - duration(since), 0):.6f}"
    with contextlib.suppress(ValueError, OverflowError, OSError):  # some systems know no such time
        import datetime  # slow to import

        return f"{max(datetime.datetime.fromisoformat(since.replace('Z', '+00:00')).timestamp(), 0):.6f}"
    raise ValueError(f"since is {since!r}: give now, last, 1h, an id, seconds since 1970, or like 2026-12-01T09:00Z")


def seconds_of(place: Any) -> float:
    """The place of a message or a cursor, in s since 1970; 0 if it has none."""
    place = place.get("ts") if isinstance(place, dict) else place
    return float(place) if not isinstance(place, (dict, list)) and DECIMAL.fullmatch(str(place)) else 0.0


def check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a name: give 1 to 64 of A-Z a-z 0-9 . _ : @ - with a letter or digit first")


class Cursor:
    """How far one name has read on one bus: a decimal or the word `last`, in a file of its own.

    It is written to another file and renamed, so a reader that is killed leaves the old cursor or the new one. There is
    no fsync: after a power cut the file may be old or empty, and messages arrive again, as at-least-once allows.
    """

    # The cursor behind messages that are left unread; until they are read, the file stays as it is. None: not looked.
    backlog: str | None = None
    reached: dict[str, str] = {}  # of a session that was renamed: how far mail to each of its names was read before

    def __init__(self, bus: str, channel: str, name: str, warn: Callable[[str], None]) -> None:
        self.path = os.path.join(state_directory(), "cursors", *map(file_name, (bus, channel, name)))
        self.at, self.warn = "last", warn
        self.lock = self.only_one(name)
        self.load()
        self.move(self.at)  # if the file cannot be written, fail before a message is asked for

    def only_one(self, name: str) -> IO[str]:
        """A file, locked until it is closed or this process ends: two readers would each see half of the mail."""
        file, end = private_file(f"{self.path}~lock", os.O_RDWR, "r+"), time.monotonic() + LOCK_SECONDS
        other = f"process {file.read(20).strip()} reads as {name}"
        with later(TELL_SECONDS, self.warn, f"{other}; waiting up to {LOCK_SECONDS:.0f} s for its end"):
            while not try_lock(file, self.path):
                if time.monotonic() >= end:
                    raise Busy(f"{other}: end it or set a new AGENT_BUS_STATE_DIR")
                time.sleep(0.05)
        file.seek(0)
        print(f"{os.getpid():<20}", file=file, flush=True)  # blanks replace the digits of an earlier, longer number
        return file

    def load(self) -> None:
        """Read the cursor from the file. If the file has none, the cursor stays as it is."""
        with contextlib.suppress(OSError, ValueError, TypeError), open(f"{self.path}~reached") as file:
            self.reached = dict(json.load(file))
        none = contextlib.suppress(FileNotFoundError, NotADirectoryError)  # of the latter, move() says more
        with none, open(self.path, encoding="ascii", errors="replace") as file:
            at = file.read(64).strip()
            if DECIMAL.fullmatch(at):
                self.at = at
            elif at != "last":
                self.warn(f"{self.path} holds no cursor: starting where the bus remembers this name")

    def move(self, since: str) -> None:
        """Save that everything up to `since` was received, unless there is a backlog before it."""
        self.at, new = since, f"{self.path}~{os.getpid()}"
        if not self.backlog:
            with private_file(new, os.O_WRONLY | os.O_TRUNC, "w") as file:
                file.write(f"{since}\n")
            os.replace(new, self.path)

    def has_read(self, message: Any) -> bool:
        """Was this message read before the session that reads was renamed?"""
        to = message.get("to") if isinstance(message, dict) else None
        return 0 < seconds_of(message) <= seconds_of(self.reached.get(str(to)))

    def pass_over(self, message: Any) -> None:
        """Save that this message was received."""
        if isinstance(message, dict) and seconds_of(message):
            self.move(str(message["ts"]))


def private_file(path: str, flags: int, mode: str) -> IO[str]:
    """A file in the state directory, made if need be, that only this user can read. OSError says what to do."""
    try:
        os.makedirs(state_directory(), 0o700, exist_ok=True)
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        return open(os.open(path, flags | os.O_CREAT, 0o600), mode, encoding="ascii", errors="replace")
    except OSError as error:
        place = error.filename if isinstance(error, FileExistsError) else os.path.dirname(error.filename or "")
        why = f"{place} is a file, not a folder" if os.path.isfile(place) else error.strerror
        raise OSError(f"cannot write {path}: {why}; set AGENT_BUS_STATE_DIR to another place") from error


def try_lock(file: IO[Any], path: str) -> bool:
    """Lock this file, which is at `path`, for this process, without waiting. False if another process has the lock."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(file.fileno(), 1 << 20, os.SEEK_SET)  # beyond the text, which others may want to read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            os.lseek(file.fileno(), 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the latter on Windows
        return False
    except OSError as error:
        said = f"locks do not work in {os.path.dirname(path)}: set AGENT_BUS_STATE_DIR ({error.strerror})"
        raise OSError(said) from error
    return True


def state_directory() -> str:
    base = os.environ.get("XDG_STATE_HOME") or os.path.join("~", ".local", "state")
    return os.path.abspath(os.path.expanduser(settings().get("AGENT_BUS_STATE_DIR") or os.path.join(base, "agent-bus")))


def file_name(text: str) -> str:
    """The text as a file name: never `.` or `..`, without a `~`, and unique even where A and a are the same file.

    A long one ends with a hash of the whole in place of the rest: a file system takes 255 bytes, and some are ours.
    """
    return shortened(re.sub(rb"^\.|[^a-z0-9._-]", lambda byte: b"%%%02X" % ord(byte[0]), text.encode()).decode())


def shortened(name: str) -> str:
    if len(name) <= NAME_BYTES:
        return name
    import hashlib  # slow to import

    return f"{name[: NAME_BYTES - 33]}.{hashlib.sha256(name.encode()).hexdigest()[:32]}"


def beside(path: str, name: str) -> str:
    """The path of the file of a name, beside this file of its channel."""
    folder, file = os.path.split(path)
    return os.path.join(folder, shortened(f"{file}~{file_name(name)}"))


def place_of(kind: str, url: str, *names: str) -> str:
    """The path of a file of this kind that belongs to one bus, and there to a channel or a name."""
    return os.path.join(state_directory(), kind, *map(file_name, (bus_of(url), *names)))


def bus_of(url: str) -> str:
    """A bus for the name of a file: the first of its URLs by the alphabet, each in one form for all its spellings."""
    return min(map(plain, urls_of(url)))


def plain(url: str) -> str:
    """A URL with its host in small letters, 127.0.0.1 for this machine, and without the usual port or a last `/`."""
    parts = parts_of(url)
    if parts.scheme == "unix":
        return f"unix:{os.path.normpath(parts.path)}"
    host = "127.0.0.1" if parts.hostname in ("localhost", "::1") else parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    port = "" if parts.port in (None, 443 if parts.scheme == "https" else 80) else f":{parts.port}"
    return f"{parts.scheme}://{host}{port}{parts.path.rstrip('/')}"


def older_places(place: str) -> list[str]:
    """The folders that an older version made for this bus, one for each spelling of its URL."""
    top, own = os.path.split(place)
    found = []
    for name in os.listdir(top) if os.path.isdir(top) else ():
        with contextlib.suppress(ValueError):  # it is that of no URL
            if name != own and file_name(bus_of(unquote(name))) == own:
                found.append(os.path.join(top, name))
    return found


# -- shared by bus_recv.py and bus_send.py: begin (a test keeps the two copies equal) --

VERSION = "0.2.0"
DEFAULT_URL = "http://127.0.0.1:8080"
GRACE_SECONDS = 10.0  # to connect; and for an answer to begin, beyond the time for which the bus may hold the request
SLOWEST_RATE = 8192  # bytes per second; the bus cuts off a slower request, and we cut off a slower answer
ANSWER_BYTES = 16 << 20  # read at most, as a parser may make 30 times as much of it; no answer of a bus is longer
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # s before the next attempt
QUICK_SECONDS = 0.25  # to connect, while another URL or address has not been tried
SILENCE_SECONDS = 0.5  # until people at a terminal are told what we wait for
FAILURES: dict[str, int] = {}  # of each URL of a bus, in a row
PEOPLE: list[Any] = []  # functions that tell them: see tell_people()
DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhd]?)")
HELD = re.compile(r'[?&]wait=[0-9.]*[1-9]|"wait": [0-9.]*[1-9]')  # the bus may wait for news: silence is no fault
HIDDEN = re.compile(  # controls, and what Unicode lets a program leave out: bidi, zero width, fillers, variations, tags
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    r"\u2060-\u206f\u2800\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb"
    r"\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]+"
)
ANEW = "if the bus has a new key, ask its operator for a new invitation, and run its line"
if not os.environ.get("HOME"):
    os.environ.pop("HOME", "")  # if it is empty, `~` would be the root folder
# A line of a configuration file, as far as systemd's EnvironmentFile and docker's --env-file read it alike.
LINE = re.compile(r"\s*(?:[#;].*|([A-Za-z_][A-Za-z0-9_]*)=([^\s'\"\\][^\\]*?)?)?\s*")


class Refused(Exception):
    """The bus refused the request and would refuse it again. `status` is HTTP's; the text says what to do."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Unreachable(Exception):
    """No answer from the bus itself; the text says why. Whether a message was stored is then unknown."""

    def __init__(self, sentence: str = "the answer is not from a bus", retry_after: float = 0.0) -> None:
        super().__init__(sentence)
        self.retry_after = retry_after  # s; the wait that the answer asked for


def settings(url: str | None = None) -> dict[str, str]:
    """The variables AGENT_... that are not empty: those of the environment, above those of the configuration file.

    A token, a certificate or a name belongs to the bus of its file. So nothing is taken from the file if `url`, or
    AGENT_BUS_URL in the environment, has a URL that the file has not. AGENT_BUS_URL is always in the result.
    """
    own = {name: value for name, value in os.environ.items() if name.startswith("AGENT_") and value}
    file = {"AGENT_BUS_URL": DEFAULT_URL, **configuration()[1]}
    wanted = url or own.get("AGENT_BUS_URL", file["AGENT_BUS_URL"])
    file = file if is_within(wanted, file["AGENT_BUS_URL"]) else {}
    if "AGENT_BUS_TOKEN_FILE" in own:
        file.pop("AGENT_BUS_TOKEN", "")  # which would come before it
    return {**file, **own, "AGENT_BUS_URL": wanted}


def is_within(url: str, urls: str) -> bool:
    return {one.rstrip("/") for one in url.split(",")} <= {one.rstrip("/") for one in urls.split(",")}


def configuration() -> tuple[str, dict[str, str]]:
    """The path of the configuration file, and its variables; none without a file. ValueError says what is wrong."""
    chosen = os.environ.get("AGENT_BUS_PROFILE")
    folder = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser(os.path.join("~", ".config"))
    path = os.path.join(folder, "agent-bus", f"{chosen or 'default'}.env")
    lines = [*map(LINE.fullmatch, private(path, bool(chosen)).split("\n"))]
    if None in lines:
        raise ValueError(f"line {lines.index(None) + 1} of {path}: write KEY=VALUE, without quotes, \\ or export")
    return path, {line[1]: line[2] for line in lines if line and line[2]}


def is_joined() -> bool:
    """Do we trust the certificate that bus_join.py has kept beside the configuration file, and no other?"""
    return settings().get("AGENT_BUS_CA") == configuration()[0][: -len("env")] + "pem"


def unused_file() -> str:
    """For an error about a setting that is missing: the configuration file is of another bus, so it was not used."""
    path, file = configuration()
    url = file.get("AGENT_BUS_URL", DEFAULT_URL)
    differs = file and not is_within(settings()["AGENT_BUS_URL"], url)
    return f"; {path} is for {url}, which is not AGENT_BUS_URL, so it was not used" if differs else ""


def file_of_token() -> str:
    """For an error about the token that is used: the configuration file has it, and the environment has none."""
    path, file = configuration()
    tokens = {"AGENT_BUS_TOKEN", "AGENT_BUS_TOKEN_FILE"}
    return f"; the token is that of {path}" if tokens & file.keys() and not any(map(os.environ.get, tokens)) else ""


def private(path: str, must: bool = True) -> str:
    """The text of a file that is ours, and that nobody else can read; "" without a file that `must` not be there.

    Else ValueError says what to do. A folder that we may not enter may have the file.
    """
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:  # editors put a BOM before it
            state, text = os.fstat(file.fileno()), file.read(1 << 16)
    except OSError as error:
        if not must and isinstance(error, (FileNotFoundError, NotADirectoryError)):
            return ""
        advice = "; it must be yours, in folders that you may enter" if isinstance(error, PermissionError) else ""
        raise ValueError(f"{path} cannot be read: {error.strerror}{advice}") from None
    if os.name == "posix" and (state.st_mode & 0o077 or state.st_uid != os.geteuid()):
        raise ValueError(f"{path} must be yours and for you alone: chmod 600 {path}, or make it anew")
    return text


def append(path: str, text: str) -> None:
    """Add lines to a file, all or none. Two processes do not mix theirs. OSError names the file.

    A line that was torn in it, as by a power cut, stays a line of its own. A new file is for us alone.
    """
    done = 0
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb", buffering=0) as file:
            with contextlib.suppress(ImportError, OSError):  # Windows and some file systems have no such lock
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX)  # another process may be within its line
            data = b"\n" * is_torn(path) + text.encode()
            try:
                while done < len(data):
                    done += os.write(file.fileno(), data[done:])
            except OSError:
                with contextlib.suppress(OSError):  # a pipe has no size
                    if os.fstat(file.fileno()).st_size == file.tell():  # else another process has written behind us
                        file.truncate(file.tell() - done)
                raise
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error


def is_torn(path: str) -> bool:
    """Does this file end within a line? No, if it is a pipe or a terminal: reading would take what is for others."""
    if os.path.isfile(path):
        with contextlib.suppress(OSError), open(path, "rb") as file:  # we may have the right to write only
            file.seek(-1, os.SEEK_END)  # OSError if it is empty
            return file.read(1) != b"\n"
    return False


def profile(name: str) -> str:
    """The value of --bus. From here on, and in commands that we run, the configuration is that of another bus."""
    import argparse  # slow to import, as http.client is

    if own := [f"AGENT_BUS_{of}" for of in ("URL", "TOKEN", "TOKEN_FILE", "CA") if os.environ.get(f"AGENT_BUS_{of}")]:
        raise argparse.ArgumentTypeError(f"--bus {name} does not go with the environment: unset {' '.join(own)}")
    os.environ["AGENT_BUS_PROFILE"] = name
    return name


def duration(text: str) -> float:
    """Seconds: `90`, `90s`, `5m`, `1h` or `3d`."""
    if match := DURATION.fullmatch(text):
        return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
    import argparse

    raise argparse.ArgumentTypeError(f"{text!r} is not a time like 90s, 5m, 1h or 3d")


def exchange(url: str, path: str, body: bytes | None, seconds: float, fraction: Any = float) -> Any:
    """One request: a POST if there is a body, else a GET. Returns the bus's JSON, and the headers of the answer.

    The head must arrive within `seconds`. The rest gets more time, by its length and SLOWEST_RATE.
    Raises as judged(); Unreachable for a fault of the network; ValueError for a wrong URL, token or certificate file.
    """
    return first_answer(url, seconds, lambda *where: exchange_at(path, body, fraction, credentials(url), *where))


def first_answer(url: str, seconds: float, attempt: Any) -> Any:
    """The result of attempt(one, s to connect, s in all), for one URL of a bus after the other, until one answers.

    The URL that failed least is tried first. After a fault that took 1 s, too little time is left for the next URL:
    then the caller's next attempt begins there.
    """
    faults: dict[str, Unreachable] = {}
    began, urls = time.monotonic(), urls_of(url)
    while urls and (not faults or time.monotonic() < began + 1):
        one, left = urls.pop(0), max(began + seconds - time.monotonic(), 0.001)
        try:
            answer = attempt(one, min(left, QUICK_SECONDS if urls and not FAILURES.get(one) else GRACE_SECONDS), left)
            FAILURES.pop(one, None)
            return answer
        except Unreachable as fault:
            faults[str(fault)] = fault
            FAILURES[one] = FAILURES.get(one, 0) + 1
    (first, *others), soon = faults.values(), min(fault.retry_after for fault in faults.values())
    raise Unreachable("; ".join(faults), soon) from (None if others else first.__cause__)


def urls_of(url: str) -> list[str]:
    """The URLs of one bus, which have commas between them. ValueError says what is wrong with one."""
    return sorted(filter(parts_of, url.split(",")), key=lambda one: FAILURES.get(one, 0))


def exchange_at(path: str, body: Any, fraction: Any, login: Any, url: str, connecting: float, seconds: float) -> Any:
    """exchange() with one URL of the bus. It gets `connecting` seconds to connect; `login` is of credentials()."""
    import http.client  # slow to import: a hook, which a turn waits for, does without it

    connection, prefix, headers = connect(url, connecting)
    proxied = "://" in prefix or getattr(connection, "_tunnel_host", None)
    through = f", through the proxy {connection.host}:{connection.port}" if proxied else ""
    headers.update(login, **({"Content-Type": "application/json"} if body else {}))
    held = HELD.search(f"{path} {(body or b'').decode('latin-1')}")
    try:
        with contextlib.closing(connection):
            with told_of_silence(url):
                connection.connect()
            sock = connection.sock
            sock.settimeout(seconds)
            with hung_up_after(seconds, sock), told_of_silence("" if held else url):
                connection.request("POST" if body else "GET", prefix + path, body, headers)
                head: Any = connection.getresponse()
            # A length may be a lie, which must not allow a drip for years.
            with hung_up_after(min(seconds, GRACE_SECONDS) + min(head.length or 0, ANSWER_BYTES) / SLOWEST_RATE, sock):
                content = head.read(ANSWER_BYTES)
            if head.length:
                raise http.client.IncompleteRead(content, head.length)
            return judged(head, content, fraction, through), head.headers
    except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: a chunk of negative size
        raise Unreachable(worded(error, "" if held or through else url) + through) from error


def worded(error: Exception, url: str = "") -> str:
    """A fault of the network in words. `url` is given if nothing was heard from there: TLS may have cut us off."""
    said = getattr(error, "verify_message", "") or getattr(error, "strerror", "") or str(error) or type(error).__name__
    if 18 <= getattr(error, "verify_code", 0) <= 21:  # of OpenSSL: signed by nobody whom we trust
        trust = settings().get("AGENT_BUS_CA", "this machine")
        advice = ANEW if is_joined() else "set AGENT_BUS_CA to its file"
        return f"the certificate there is not trusted by {trust}: {advice}"
    if url.startswith("http:") and isinstance(error, (ConnectionResetError, BrokenPipeError)):
        return f"{said}; if this port speaks https, set AGENT_BUS_URL=https{url[4:]}"
    return "this port speaks http, not https" if "WRONG_VERSION_NUMBER" in said else said.rstrip(".")


def connect(url: str, seconds: float) -> tuple[Any, str, dict[str, str]]:
    """An HTTPConnection towards `url`, not open yet; the text before the path in a request line; the usual headers."""
    import http.client

    parts, given = parts_of(url), settings(url)
    headers = {"User-Agent": given.get("AGENT_BUS_UA", "Mozilla/5.0")}  # firewalls drop what looks like a script
    if parts.scheme == "unix":
        local: Any = http.client.HTTPConnection("localhost")
        local.sock = socket.socket(socket.AF_UNIX)
        local.sock.settimeout(seconds)
        local.connect = lambda: local.sock.connect(parts.path)
        return local, "", headers
    secure = parts.scheme == "https"
    host, port = parts.hostname or "", parts.port or (443 if secure else 80)
    proxy = proxy_for(parts.scheme, host, port)
    via = urlsplit(proxy if "://" in proxy else f"//{proxy}") if proxy else parts
    trust = {"context": authorities(given.get("AGENT_BUS_CA"))} if secure else {}
    kind: Any = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    connection = kind(via.hostname or "", (via.port or 80) if proxy else port, timeout=seconds, **trust)
    connection._create_connection = dial  # in place of socket.create_connection
    if proxy and secure:
        connection.set_tunnel(host, port, login_of(via))
    headers.update({} if secure else login_of(via))
    return connection, url.rstrip("/") if proxy and not secure else parts.path.rstrip("/"), headers


def parts_of(url: str) -> SplitResult:
    """The parts of a bus's URL. ValueError if it is not a URL, or has a login, which error messages would show."""
    if "@" in url and not url.startswith("unix:"):
        raise ValueError("the URL of the bus has a login (user@): remove it; a bus takes the token in AGENT_BUS_TOKEN")
    host = r"(\[[^\s?#/\]]+\]|[^\s?#/:\[\]]+)(:[0-9]{0,5})?"
    if not re.fullmatch(rf"https?://{host}(/(?!(.*/)?ui/?$)[^\s?#]*)?|unix:/[^?#]+", url):
        raise ValueError(f"{url!r} is not the URL of a bus: write it like http://host:8080 or unix:/path/of/socket")
    return urlsplit(url)


def login_of(proxy: SplitResult) -> dict[str, str]:
    """The Proxy-Authorization header, if the URL of the proxy has a login."""
    import base64

    login = f"{unquote(proxy.username or '')}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"} if proxy.username else {}


def dial(address: tuple[str, int], seconds: float, _source: Any = None) -> socket.socket:
    """A connection to the first address of the host that answers. Raises OSError.

    Each address gets 250 ms, and more in the next rounds: a dead address must not hold up the next ones.
    """
    end, fault = time.monotonic() + seconds, OSError("it has no address")
    places: list[Any] = [place[:2] for *_, place in socket.getaddrinfo(*address, type=socket.SOCK_STREAM)]
    for limit in (QUICK_SECONDS, 1.0, 3.0, seconds) if len(places) > 1 else (seconds,):
        for place in places:
            try:
                sock = socket.create_connection(place, max(min(limit, end - time.monotonic()), 0.001))
                sock.settimeout(seconds)
                return sock
            except OSError as error:  # it was slow, or refused at once
                fault = error
    raise fault


def authorities(file: str | None) -> Any:
    """The certificates that TLS trusts: the system's, or those in the file that AGENT_BUS_CA names."""
    import ssl  # http.client has imported it, if this Python has it

    try:
        return ssl.create_default_context(cafile=file)
    except OSError:  # OpenSSL's own text is for its authors
        raise ValueError(f"AGENT_BUS_CA must name a file of certificates that you can read; {file} is none") from None


def credentials(url: str) -> dict[str, str]:
    """The Authorization header, from AGENT_BUS_TOKEN or the file AGENT_BUS_TOKEN_FILE; empty without them.

    ValueError if other users could read that file, or others on the network could read the token.
    """
    given = settings(url)
    path = given.get("AGENT_BUS_TOKEN_FILE")
    token = (given.get("AGENT_BUS_TOKEN") or (private(path) if path else "")).strip("\ufeff \t\r\n")
    if not token:
        return {}
    if not re.fullmatch("[!-~]+", token):
        raise ValueError("the token has blanks or other characters that no token has: copy it again")
    safe = all(one.startswith(("https:", "unix:")) or is_here(parts_of(one).hostname) for one in urls_of(url))
    if not safe and "AGENT_BUS_PLAIN_HTTP" not in given:
        raise ValueError(f"the token would cross to {url} in the clear: use https, or in a VPN AGENT_BUS_PLAIN_HTTP=1")
    return {"Authorization": f"Bearer {token}"}


def is_here(host: str | None) -> bool:
    return bool(re.fullmatch(r"localhost|::1|127(\.[0-9]+){3}", host or ""))


def proxy_for(scheme: str, host: str, port: int) -> str | None:
    """The proxy that the environment names for this host. This machine itself is reached without one."""
    if is_here(host) or f"{scheme}_proxy" not in map(str.lower, os.environ):
        return None
    from urllib.request import getproxies, proxy_bypass  # slow to import, and seldom needed

    return None if proxy_bypass(f"{host}:{port}") else getproxies().get(scheme)


def hung_up_after(seconds: float, sock: socket.socket) -> contextlib.ExitStack:
    """Ends an exchange from outside. A socket's own timeout is per read, so a dripping answer would never end."""

    def hang_up() -> None:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)  # of the TCP under TLS: an SSLSocket is not for two threads

    return later(seconds * 1.1, hang_up)  # a little after the socket's own timeout, whose error says more


def tell_people(tell: Any) -> None:
    """From now on, a person at our terminal is told of a silence, once; `tell` takes the line."""
    PEOPLE[:] = [tell] if sys.stderr and sys.stderr.isatty() else []


def told_of_silence(url: str) -> contextlib.ExitStack:
    """People at a terminal must know what they wait for, before the time is over. Without `url` they need not."""
    return later(SILENCE_SECONDS, once, PEOPLE, f"waiting for {url}") if PEOPLE and url else contextlib.ExitStack()


def once(functions: list[Any], line: str) -> None:
    """Tell a line by the function in this list, if no thread has done so yet."""
    while functions:
        functions.pop()(line)


def later(seconds: float, act: Any, *given: Any) -> contextlib.ExitStack:
    """Calls act(*given) in a thread, unless what is inside ends before."""
    stack = contextlib.ExitStack()
    timer = threading.Timer(seconds, act, given)
    timer.daemon = True  # a signal may come before the next two lines; then nothing would cancel it
    timer.start()
    stack.callback(timer.cancel)
    return stack


def judged(response: Any, body: bytes, fraction: Any = float, through: str = "") -> dict[str, Any]:
    """The JSON object of an HTTPResponse of 200. Raises Refused for the bus's own 4xx, Unreachable for anything else.

    `fraction` converts the text of a number with a fraction; `through` names the proxy on the way, for the error.
    """
    answer: dict[str, Any] = {}
    with contextlib.suppress(ValueError, RecursionError, TypeError, ArithmeticError):  # TypeError: not an object
        answer = dict(**json.loads(body.decode(), parse_float=fraction, parse_constant=str))
    if response.status == 200 and answer and re.fullmatch("[!-~]{1,64}", str(answer.get("bus", "none"))):
        return answer
    error = answer.get("error")
    if 400 <= response.status < 500 and response.status not in (408, 425, 429) and isinstance(error, str):
        about = (unused_file() or file_of_token()) if response.status == 401 else ""
        raise Refused(response.status, error + about)
    wait = response.headers.get("Retry-After", "")
    page = "a web page, not a bus" if response.status < 500 and body.lstrip()[:1] == b"<" else "not from a bus"
    page = "this port speaks https, not http" if response.status == 400 and b"HTTPS" in body else page
    raise Unreachable(f"{response.status}: {error or page}{through}", float(wait) if wait.isdecimal() else 0.0)


def pause_after(failures: int) -> float:
    """Seconds to wait after this many failures in a row. They double up to a minute."""
    return min(FIRST_PAUSE * 2.0 ** min(max(failures - 1, 0), 10), LONGEST_PAUSE)


def no_bus(url: str, fault: Unreachable, then: str = "") -> str:
    """The sentence about a fault: which bus, why, and what to try. Some faults are the bus's own word: see judged()."""
    own, doctor = re.match(r"\d+: (?!a web page|not from|this port)", str(fault)), called("bus_doctor.py", "doctor")
    heard = own or re.search("certificate|speaks", str(fault))
    asks = "" if heard else f" Is {called('bus_server', 'serve')} running there, or elsewhere (AGENT_BUS_URL)?"
    return f"{'not now: the' if own else 'no'} bus at {url} ({fault}){then}.{asks} {doctor} tells which hop fails."


def called(program: str, command: str) -> str:
    """How to run one of our programs that is here, from any folder. If they are installed, it is of agent-bus."""
    import shlex

    here, (file, *words) = os.path.dirname(os.path.realpath(__file__)), program.split()
    places = [os.path.join(here, folder, file) for folder in ("agent_bus_tools", "tools", "")]
    program = next((shlex.join(["python3", path, *words]) for path in filter(os.path.exists, places)), program)
    return f"agent-bus {command}" if "agent-bus" in os.path.basename(sys.argv[0]) else program


def span(seconds: float) -> str:
    """As 5m, 6h or 3d; nothing under a minute."""
    return next((f"{seconds // s:.0f}{unit}" for s, unit in ((86400, "d"), (3600, "h"), (60, "m")) if seconds >= s), "")


def visible(text: str) -> str:
    r"""The text with each invisible character written out, as in \x1b, \u202e, \U000e0041."""
    return HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def complain(line: str, program: str = os.path.basename(__file__).partition(".")[0]) -> Any:
    """One line on stderr, if that takes it. An empty `program` is left out; `line` may be whatever the bus has said."""
    whole = os.path.basename(sys.argv[0])  # `agent-bus who`: what the user has typed
    program = whole if program and whole.startswith(("agent-bus ", "agent_bus.py ")) else program
    with contextlib.suppress(OSError, AttributeError):  # it is full, or closed: what we have done stays done
        sys.stderr.write(": ".join(filter(None, [program, visible(line.replace("\n", " "))])) + "\n")


def emit(text: str) -> None:
    """Write to stdout, in UTF-8 whatever the locale. When this returns, the text is out."""
    if sys.stdout is None:  # `>&-`
        raise BrokenPipeError
    # No buffer, whose rest Python would write at exit.
    raw, rest = getattr(sys.stdout.buffer, "raw", sys.stdout.buffer), text.encode()
    try:
        while rest:
            rest = rest[raw.write(rest) or 0 :]  # None: it does not block, and takes nothing now
    except OSError as error:
        raise type(error)(f"cannot write the output: {error.strerror}") from None


# -- shared by bus_recv.py and bus_send.py: end --


# A message as text


def block(message: Any, reader: str, now: float, whole: bool = False) -> str:
    """A message as text: a line with its fields, each line of its body behind `| `, and `---`.

    The prefix keeps a body from looking like another message. `now` is the bus's clock, in s since 1970. The first line
    has the age from one minute up, the receiver if it is not `reader`, and each other field that differs from its
    default. Unless `whole`, a long line continues after `|+`, and a long body ends with the command that shows the
    rest. Anything that is not a message becomes one line that says so.
    """
    if isinstance(message, Notice):
        return pieces(visible(f"-- agent-bus: {message}".replace("\n", " ")), LINE_UNITS)[0] + "\n"
    with contextlib.suppress(Exception):  # whatever is wrong with a message, the next one must be shown
        fields = {**message, "age": span(now - float(message["ts"]))}
        usual = {"to": reader, "channel": "default", "age": "", "priority": "normal"}
        head = [f"{name}={word(fields[name])}" for name in HEAD if fields.get(name) not in (None, usual.get(name))]
        first = " ".join([iso(message["ts"]), *head])
        lines = [f"| {line}" for line in visible(re.sub("\r\n?", "\n", message["msg"]).removesuffix("\n")).split("\n")]
        if not whole:
            first, lines = pieces(first, LINE_UNITS)[0], cut(lines, str(message.get("id")))
        return fitted("\n".join([first, *lines, "---\n"]))
    return fitted(f"-- agent-bus: not a message: {visible(dump(message))}\n")


def fitted(text: str) -> str:
    """On a terminal, what does not fit into a row goes on after `|+`. Alone in a row it could look like a line of ours.

    A tab or a wide character takes several cells. No text has a NUL, so that stands for the first of two. A character
    counts as wide if it is in any version of Unicode, or may become so: the terminal may know another one than we do.
    """
    if not (sys.stdout and sys.stdout.isatty()):
        return text
    import shutil

    width, rows = max(shutil.get_terminal_size().columns, 4), list[str]()
    wide = re.compile("[\u1100-\u115f\u2300-\u23ff\u25fd-\u27bf\u2b00-\ud7a3\uf900-\uff60\uffe0-\U0010ffff]")
    for cells in wide.sub("\0\\g<0>", text.expandtabs()).split("\n"):
        rows += [cells[:width], *(f"|+{cells[at : at + width - 3]}" for at in range(width, len(cells), width - 3))]
    return "\n".join(rows).replace("\0", "")


def cut(lines: Sequence[str], id: str) -> list[str]:
    """Lines for a Monitor: none is too long, and all fit into one write."""
    room, width = WRITE_UNITS - LINE_UNITS - 120, LINE_UNITS - 2  # 120 for the line about the rest
    parts = [("|+" if part else "") + piece for line in lines for part, piece in enumerate(pieces(line, width))]
    kept = [part for part in parts if (room := room - units(part) - 1) >= 0]
    rest = sum(len(part) - 1 for part in parts[len(kept) :])  # without the prefix of two, with the end of a line
    return [*kept, f"|~ {rest} more characters: {called('bus_recv.py', 'recv')} --read {word(id)}"] if rest else kept


def units(text: str) -> int:
    return len(text.encode("utf-16-le")) // 2


def pieces(line: str, width: int) -> list[str]:
    """The line in parts of at most `width` UTF-16 units. No character is cut in two."""
    width = width // 2 if units(line) > len(line) else width
    return [line[start : start + width] for start in range(0, len(line), width)] or [""]


def iso(at: Any) -> str:
    """A time (s since 1970), in UTC, as in 2026-12-01T09:00:00Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(float(at)))


def word(value: Any) -> str:
    text = value if isinstance(value, str) else dump(value)
    return text if re.fullmatch("[A-Za-z0-9._:@/-]{1,64}", text) else visible(json.dumps(text, ensure_ascii=False))


def dump(value: Any, depth: int = 99) -> str:
    """JSON in ASCII, as json.dumps writes it, with the fractions as the bus wrote them; null for what is too deep."""
    if isinstance(value, dict) and depth:
        return f"{{{', '.join(f'{json.dumps(key)}: {dump(value[key], depth - 1)}' for key in value)}}}"
    if isinstance(value, list) and depth:
        return f"[{', '.join(dump(one, depth - 1) for one in value)}]"
    return str(value) if isinstance(value, Decimal) else json.dumps(value if depth else None)


# Signals that end a program and its command. What is ignored stays so, as SIGHUP under nohup; Windows has no SIGHUP.
ENDS = [it for it in (signal.SIGTERM, getattr(signal, "SIGHUP", 0)) if it and signal.getsignal(it) != signal.SIG_IGN]


# The outputs. Each moves the cursor as soon as a message is out, and not before.


def show_blocks(reader: Reader, answers: Iterator[dict[str, Any]], settle: float = SETTLE_SECONDS) -> None:
    """Messages that arrived together are written together, as many as one event of a Monitor holds.

    A Monitor drops events that come too often: `budget` is how many writes may follow each other at once.
    """
    budget, wrote = float(BURST), float("-inf")  # wrote: time of the last write
    for answer in answers:
        waiting = [(block(one, reader.names[0], reader.bus_time), one) for one in answer["messages"]]
        while waiting:
            text, last = waiting.pop(0)
            while waiting and units(text + waiting[0][0]) <= WRITE_UNITS:
                more, last = waiting.pop(0)
                text += more
            now = reader.clock.monotonic()
            budget = min(BURST, budget + (now - wrote) / EVERY_SECONDS) - 1
            reader.clock.sleep(max(wrote + APART_SECONDS - now, -budget * EVERY_SECONDS, 0))
            budget, wrote = max(budget, 0), reader.clock.monotonic()
            emit(text)
            while settle and unread_output():  # a busy Monitor may expire before it reads this
                reader.clock.sleep(settle)
            reader.clock.sleep(settle)  # if we are killed in here, we show it again
            reader.cursor.pass_over(last)


def unread_output() -> int:
    """Bytes of our output that nobody has read. Only Linux tells, for a socket such as a Monitor's; else 0."""
    with contextlib.suppress(ImportError, OSError):
        import fcntl
        import termios

        return int.from_bytes(fcntl.ioctl(1, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    return 0


def run_command(command: str, tries: int, reader: Reader, message: dict[str, Any]) -> None:
    """Run the command for one message. If all the tries fail, append the message to a file."""
    known = message if isinstance(message, dict) else {"id": "an answer that is no message"}
    for attempt in range(1, tries + 1):
        with running(command, dump(message), known, attempt) as process:
            if process.wait() == 0:
                return
        reader.warn(f"command ended with {process.returncode} for {known.get('id')}, attempt {attempt} of {tries}")
        # The end cuts a pause short, but not to nothing: what fails for a moment only must not end in that file.
        left = max(reader.end - reader.clock.monotonic(), FIRST_PAUSE)
        reader.clock.sleep((attempt < tries) * min(pause_after(attempt), left))
    append(f"{reader.cursor.path}~dead", f"{dump(message)}\n")
    reader.warn(f"the command failed {tries} times for {known.get('id')}: it is in {reader.cursor.path}~dead now")


def count(text: str) -> int:
    """The value of an option that is a number of things."""
    import argparse

    if not re.fullmatch("0*[1-9][0-9]{0,17}", text):
        raise argparse.ArgumentTypeError(f"give a whole number of 1 or more, not {text!r}")
    return int(text)


def check_command(command: str) -> None:
    """ValueError if the shell does not find the first word of a command, unless that is quoted or has a variable."""
    word = re.match(r"\s*([\w./][\w./+@:-]*)(?=[\s;&|<>]|$)", command)
    if not command.strip():
        raise ValueError("--exec is empty: give a command; nothing was taken")
    if word and os.name == "posix" and os.system(f"command -v {word[1]} >/dev/null 2>&1"):
        raise ValueError(f"--exec: there is no command {word[1]} that can be run here; nothing was taken")


@contextlib.contextmanager
def running(command: str, text: str, known: dict[str, Any], attempt: int) -> Iterator[Any]:
    """The process of a command, killed at the end. JSON is on its stdin, MSG_FROM, MSG_ID ... in its environment."""
    import subprocess  # slow to import, these two
    import tempfile

    fields = {f"MSG_{name.upper()}": str(known.get(name, ""))[:1000] for name in HEAD if name != "age"}
    # UTF-8 in every locale: one character that the locale does not have must not end the reader.
    fields = {name: os.fsdecode(its.replace("\0", "").encode(errors="replace")) for name, its in fields.items()}
    fields = {**os.environ, **fields, "AGENT_BUS_ATTEMPT": str(attempt)}
    with tempfile.TemporaryFile() as file, contextlib.ExitStack() as stack:  # a file: a pipe needs us to fill it
        came: list[int] = []
        file.write(text.encode())
        file.seek(0)
        with contextlib.ExitStack() as started:  # a signal that comes meanwhile waits until we know whom to kill
            for number in filter(lambda one: callable(signal.getsignal(one)), (signal.SIGINT, *ENDS)):
                started.callback(signal.signal, number, signal.signal(number, lambda one, _: came.append(one)))
            process = subprocess.Popen(command, shell=True, stdin=file, env=fields, start_new_session=True)
            stack.callback(kill, process)
        for one in came:
            signal.raise_signal(one)
        yield process


def kill(process: Any) -> None:
    """Kill a command with all that it started, unless it has ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL) if os.name == "posix" else process.kill()
        process.wait()


# The program


def main(argv: list[str] | None = None) -> int:
    """Show the messages for NAME on an agent-bus, as they arrive."""
    import argparse

    cli = argparse.ArgumentParser(usage="%(prog)s [-h] [OPTIONS] [NAME ...]", description=main.__doc__)
    cli.add_argument("names", nargs="*", metavar="NAME", help="your own name ($AGENT_NAME), then other names to read")
    cli.add_argument("--monitor", action="store_true", help="pace and wrap messages for a Monitor, as for a socket")
    cli.add_argument("--json", action="store_true", help="print each message as a line of JSON")
    cli.add_argument("--once", action="store_true", help="end after the waiting messages, or after the first new one")
    cli.add_argument("--timeout", type=duration, metavar="S", help="end after S s (with --once: 25), not inside a CMD")
    since = "go on from X, also next time: 1h (ago), a time (2026-12-01T09:00Z), an id, now, last (saved cursor)"
    cli.add_argument("--since", metavar="X", help=since)
    cli.add_argument("--channel", metavar="C", help="the channel ($AGENT_BUS_CHANNEL, or 'default')")
    fields = "MSG_FROM, MSG_ID, MSG_TO, MSG_SUBJECT, MSG_TYPE ..."
    cli.add_argument("--exec", metavar="CMD", help=f"run CMD for each message: JSON on stdin, {fields} as variables")
    cli.add_argument("--tries", type=count, default=5, metavar="N", help="put a message in a file after N failures (5)")
    cli.add_argument("--read", metavar="ID", help="print this message whole, and end: it stays unread")
    cli.add_argument("--bus", type=profile, metavar="PROFILE", help="the bus in ~/.config/agent-bus/PROFILE.env")
    cli.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    cli.add_argument("--claim", dest="tool", action="store_const", const="bus_work", help="do the jobs of a queue")
    cli.add_argument("--log", dest="tool", action="store_const", const="bus_log", help="show everybody's messages")
    options, unknown = cli.parse_known_args(argv)
    if not options.tool and (unknown or (options.names and options.read)):
        cli.error(f"unknown: {' '.join(unknown)}" if unknown else "give NAME or --read ID, not both")
    for number in ENDS:
        signal.signal(number, lambda *_: sys.exit(0))
    tell_people(complain)
    try:
        return run_tool(options.tool, argv) if options.tool else show(options.read) if options.read else listen(options)
    except FAULTS as fault:
        return ended(fault)


FAULTS = (KeyboardInterrupt, Refused, Unreachable, Busy, ValueError, OSError)  # that end our programs


def ended(fault: BaseException, program: str = "bus_recv", then: str = "") -> int:
    """The exit code of one of our programs that ends with a fault, which is told on stderr.

    An Unreachable of ask() becomes a whole sentence, which no_bus() makes with `then`; one of a Reader is one already.
    """
    if isinstance(fault, Unreachable) and not isinstance(fault.__cause__, Unreachable):
        fault = Unreachable(no_bus(settings()["AGENT_BUS_URL"], fault, then))
    # BrokenPipeError: nobody reads us any more.
    isinstance(fault, (KeyboardInterrupt, BrokenPipeError)) or complain(str(fault), program)
    return {KeyboardInterrupt: 130, BrokenPipeError: 0, Refused: 1, Unreachable: 75}.get(type(fault), 2)


def run_tool(name: str, argv: list[str] | None) -> int:
    """Run another of our programs in this process. It is beside this file, in a clone, or installed."""
    here = os.path.dirname(os.path.realpath(__file__))
    for folder in (here, os.path.join(here, "tools"), os.path.join(here, "agent_bus_tools")):
        if os.path.exists(os.path.join(folder, f"{name}.py")):
            sys.path.insert(0, folder)
            return int(__import__(name).main(argv))
    raise ValueError(f"{name}.py is missing in {here}: run curl -fO $AGENT_BUS_URL/{name}.py there")


def show(number: str) -> int:
    """Print the message with this id. This needs no cursor, and moves none."""
    answer, now = ask(settings()["AGENT_BUS_URL"], f"/message/{quote(number, safe='')}", GRACE_SECONDS)
    emit(block(answer.get("message"), "", now, whole=True))
    return 0


def settle_down(greets: list[Any], greeting: str, writes: bool) -> None:
    """Greet; then end this process as soon as nobody reads what it writes: it would take the next reader's mail."""
    import select

    once(greets, greeting)
    if writes and hasattr(select, "poll"):  # not on Windows
        output = select.poll()
        output.register(1, 0)  # tells a hangup and an error, and nothing else
        output.poll()
        os._exit(0)


def listen(options: Any) -> int:
    """Show the messages for these names, or run the command for each. The exit code."""
    names = ",".join(options.names or [settings().get("AGENT_NAME", "")]).split(",")
    if names == [""]:
        raise ValueError(f"the name is missing: give NAME, or set AGENT_NAME{unused_file()}")
    if options.exec is not None:
        check_command(options.exec)
    reader = SessionReader(names, channel=options.channel, since=options.since)
    # A program that reads our JSON, or the output of the command, must get nothing else on stdout.
    for_program = options.json or options.exec
    reader.warn = complain
    reader.announce = complain if for_program else lambda line: emit(block(Notice(line), "", 0))
    paced = bool(options.monitor or not for_program and sys.stdout and stat.S_ISSOCK(os.fstat(1).st_mode))
    reader.leaves = paced and not options.once and options.since is None
    timeout = HOLD_SECONDS if options.once and options.timeout is None else options.timeout
    greets = [] if options.once or timeout == 0 else [complain]
    on = "" if reader.channel == "default" else f" on the channel {reader.channel} of"
    greeting = f"listening as {', '.join(reader.names)}{on or ' on'} {reader.url}"
    if greets:  # a refusal ends this process before it settles
        reader.greet = lambda: later(GREET_SECONDS, settle_down, greets, greeting, sys.stdout and not options.exec)
    with contextlib.closing(reader):
        if paced:
            show_blocks(reader, reader.answers(options.once, timeout), 0 if options.once else SETTLE_SECONDS)
        else:
            for number, message in enumerate(reader.messages(options.once, timeout)):
                if options.exec and number and options.timeout and reader.clock.monotonic() >= reader.end:
                    break  # the rest stays unread; with 0 s it is all that waits
                once(greets, greeting)
                text = f"{dump(message)}\n" if options.json else block(message, names[0], reader.bus_time, whole=True)
                run_command(options.exec, options.tries, reader, message) if options.exec else emit(text)
    reader.came or (sys.stderr and sys.stderr.isatty() and complain(f"nothing came for {', '.join(names)}"))
    return 0 if reader.came else 3


if __name__ == "__main__":
    sys.exit(main())
