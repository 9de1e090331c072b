#!/usr/bin/env python3
"""Send one message to an agent-bus.

    AGENT_BUS_URL=http://10.0.0.5:8080 AGENT_NAME=spark python3 bus_send.py dell "T1 is done" --subject T1
    python3 bus_send.py dell,gb10 < report.md
    python3 bus_send.py dell "Is T1 done?" --ask
    python3 bus_send.py --reply-to 660ba678a1b40 "It is."

Without a text, stdin is sent. --ask waits for the answer, and prints it. Words behind `--reply-to ID` are the text, and
go to the sender of that message, unless TO stands before it: `dell "It is." --reply-to ID`. Or
in a program: `bus_send.send("dell", "T1 is done", sender="spark")`, `bus_send.ask("dell", "Is T1 done?")["reply"]`.
The receiver is a name, several names as `dell,gb10`, or `all`. On a terminal it says in a sentence what became of the
message. Else, or with --json, it prints the bus's answer, one line of JSON, and says on stderr if a receiver is not
listening.

The parts of this file, in order: send() and ask() for programs; persist (when to try again); compose, keep_copy, post
(one message); the marked part, which bus_recv.py has too and which speaks HTTP (proxies, tokens, faults); the command
line.

Only a 200 with the bus's own JSON means that the message is on its disk, and only its own 4xx means that it never will
be. After anything else (silence, half an answer, a redirect, a proxy's page) nobody knows. So the same message is sent
again under the same key, and the bus stores a key once.

Standard library only, Python 3.9 and later. It reads stdin, the environment (AGENT_BUS_URL, AGENT_NAME,
AGENT_BUS_CHANNEL, AGENT_BUS_TOKEN or AGENT_BUS_TOKEN_FILE, AGENT_BUS_CA, AGENT_BUS_UA; http_proxy, https_proxy,
no_proxy) and below it the file ~/.config/agent-bus/default.env, or PROFILE.env (--bus, AGENT_BUS_PROFILE). It talks to
that URL (http, https, or unix:/path; with commas between the URLs of a bus that has several), follows it nowhere else,
and writes one file, if AGENT_BUS_OUTBOX names one: a copy of each message that the bus stored, as its reader gets it;
`{name}` in that path is the sender.
Exit code: 0 stored, 1 refused by the bus, 2 usage, 3 stored but not answered in time, 75 not known to be stored (try
again with the key it names).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import socket
import sys
import threading
import time
from urllib.parse import SplitResult, quote, unquote, urlsplit

TYPE_CHECKING = False  # as in typing, whose import would take a tenth of the time of a send
if TYPE_CHECKING:
    from typing import Any

# Python 3.8 prints this text. Older ones show the line in a SyntaxError, because they do not know `:=`.
if sys.version_info < (3, 9) and (needs := "bus_send.py needs Python 3.9 or later"):  # noqa: UP036
    sys.exit(needs)

USUAL = {"subject", "reply_to", "type", "priority", "ttl", "content_type"}  # members of a message, arguments of send()
HOLD_SECONDS = 25.0  # the bus may hold a question; common proxies cut a quiet request after 30 s
LASTS = ("gaierror", "SSLCertVerificationError", "SSLError")  # faults that time does not heal


def send(to: str | list[str], msg: str, *, patience: float = 30.0, warn: Any = None, **given: Any) -> dict[str, Any]:
    """Store `msg` for `to`; returns the bus's answer (`id`, `ts`, `duplicate`, `receiver`: see PROTOCOL.md).

    `to` is a name, `all`, or several names, in a list or as `a,b`.
    `given` may have `url`, `sender` and `channel`, which default to the environment's or the configuration file's;
    `key`, by default a new one; the members of a message that have a meaning (`subject`, `reply_to`, `type`,
    `priority`, `ttl` in seconds, `content_type`); and `fields`, a dict of further members. None leaves one out.
    The first attempt is always made, and the last starts within `patience` seconds; before the second, `warn` is called
    with a sentence. Raises Refused, Unreachable; ValueError for a missing sender or a wrong URL.
    """
    url, message = compose(to, msg, **given)
    found = persist(lambda left: post(url, message, min(left, GRACE_SECONDS)), patience, url, message["key"], warn)
    keep_copy(url, message, found)
    return found


def ask(to: str, msg: str, *, timeout: float = 300, warn: Any = None, tell: Any = None, **given: Any) -> dict[str, Any]:
    """send() to one name, and wait for the reply: `reply` in the result is a message, or None after `timeout` seconds.

    The same question is asked again and again, each time for as long as a request may be held. An answer is found
    whenever it came, and is in the sender's mailbox too. `tell` is called with the bus's answer as soon as the question
    is stored, if it has no reply then. `given` are further arguments of send().
    """
    url, message = compose(to, msg, **given)
    end, holds, began = time.monotonic() + timeout, [HOLD_SECONDS], 0.0 if tell else time.monotonic()
    answer = persist(lambda _: post_held(url, message, 0.0 if tell else end, holds), timeout, url, message["key"], warn)
    keep_copy(url, message, answer)
    tell and "bus" in answer and not answer.get("reply") and tell(answer)
    with contextlib.suppress(Unreachable):  # the question is stored, so it has no reply yet
        # A bus of the first contract, whose answer has no `bus`, would store the question again.
        while "bus" in answer and not isinstance(answer.get("reply"), dict) and time.monotonic() < end:
            time.sleep(max(min(began + 1, end) - time.monotonic(), 0))  # in case the bus does not hold a question
            began = time.monotonic()
            answer = persist(lambda _: post_held(url, message, end, holds), end - began, url, message["key"], warn)
    return answer


def post_held(url: str, message: dict[str, Any], end: float, holds: list[float]) -> dict[str, Any]:
    """Ask once. The last of `holds` is how long the bus may hold the question; it adapts to proxies on the way."""
    began, hold = time.monotonic(), holds[-1]
    wait = min(hold, max(end - began, 0))
    try:
        answer = post(url, message, wait + GRACE_SECONDS, f"/ask?wait={wait:.3f}")
    except Unreachable:
        # After 1 s the question was held, perhaps for longer than something on the way allows.
        holds.append(max(hold / 2, 1) if time.monotonic() - began >= 1 else hold)
        raise
    holds.append(min(hold * 1.1, HOLD_SECONDS))
    return answer


def sender_of(number: str, channel: str | None, patience: float) -> tuple[str, str]:
    """Who sent the message with this id, and on which channel, unless one is given. Raises as send() does."""
    url, path = settings()["AGENT_BUS_URL"], f"/message/{quote(number, safe='')}"
    answer = persist(lambda left: exchange(url, path, None, min(left, GRACE_SECONDS))[0], patience, url)
    with contextlib.suppress(KeyError, TypeError):
        return answer["message"]["from"], channel or answer["message"]["channel"]
    raise Unreachable(f"{url} does not say who sent {number}: give the receiver's name")


def persist(attempt: Any, patience: float, url: str, key: str = "", warn: Any = None) -> dict[str, Any]:
    """Call `attempt(seconds left)` until it returns. The first call is always made, the last one starts in time.

    A fault that time does not heal ends it at once. Unreachable says what to do, and names the key for another send.
    """
    end, failures = time.monotonic() + patience, 0
    while True:
        try:
            return dict(attempt(max(end - time.monotonic(), 1)))  # s; an attempt needs some time
        except Unreachable as fault:
            failures += 1
            lasts = type(fault.__cause__).__name__ in LASTS and getattr(fault.__cause__, "errno", 0) != socket.EAI_AGAIN
            pause = max(pause_after(failures) * random.uniform(0.5, 1), fault.retry_after)
            if lasts or time.monotonic() + pause >= end:
                raise Unreachable(no_bus(url, fault) + (f" To send it again: --key {key}" if key else "")) from fault
            warn and failures == 1 and warn(no_bus(url, fault, f"; still trying, up to {patience:.0f} s"))
        time.sleep(pause)


def new_key() -> str:
    """It begins with the time, so that a bus appends it to its keys; a random one costs it a page of the disk."""
    return f"{int(time.time() * 1000000):014x}{os.urandom(9).hex()}"


def compose(to: Any, msg: str, *, fields: Any = None, **given: Any) -> tuple[str, dict[str, Any]]:
    """The URL of the bus, and the message, from the arguments of send(), the environment and the file."""
    own = settings(given.pop("url", None))
    sender, channel, key = (given.pop(name, None) for name in ("sender", "channel", "key"))
    if strange := given.keys() - USUAL:
        raise TypeError(f"send() has no argument {min(strange)!r}: further members of a message go into fields=")
    sender = own.get("AGENT_NAME") if sender is None else sender
    channel = channel or own.get("AGENT_BUS_CHANNEL", "default")
    if sender and sender == own.get("AGENT_NAME") and not re.fullmatch("[A-Za-z0-9][A-Za-z0-9._:@-]{0,63}", sender):
        rule = "give 1 to 64 of A-Z a-z 0-9 . _ : @ - with a letter or digit first"
        raise ValueError(f"AGENT_NAME is {sender!r}, which is not a name: {rule}")
    if not sender and not credentials(own["AGENT_BUS_URL"]):  # a token names its sender
        raise ValueError(f"the sender is missing: give --from NAME or set AGENT_NAME{unused_file()}")
    to = [name.strip() for name in to.split(",") if name.strip()] or to if isinstance(to, str) and "," in to else to
    message = {"from": sender, "to": to, "channel": channel, "msg": msg, "key": key or new_key()}
    members = {**message, **given, **dict(fields or ()), **message}  # the order of the first, the value of the last
    return own["AGENT_BUS_URL"], {field: value for field, value in members.items() if value is not None}


def keep_copy(url: str, message: dict[str, Any], answer: dict[str, Any]) -> None:
    """Append what is stored to the file that AGENT_BUS_OUTBOX names: a line for each receiver, as that one gets it."""
    try:
        if path := settings(url).get("AGENT_BUS_OUTBOX", ""):
            path = os.path.expanduser(path.replace("{name}", message.get("from", "-").replace("/", "_")))
            append(path, "".join(copies(message, answer)))
    except Exception as error:  # it is stored, whatever goes wrong here
        complain(f"stored, but no copy is kept: {error}")


def copies(message: dict[str, Any], answer: dict[str, Any]) -> Any:
    names = message["to"] if isinstance(message["to"], list) else [message["to"]]
    given = {field: value for field, value in message.items() if field not in ("to", "key")}
    for name, number in (answer.get("ids") or dict.fromkeys(names, answer.get("id"))).items():
        ts = int(number, 16) / 1e6 if number else answer["ts"]  # an id is the time in us; the first contract has none
        known = {"id": number, "to": name, **given} if number else {"to": name, **given}
        yield f'{{"ts": {ts:.6f}, {json.dumps(known)[1:]}\n'


def post(url: str, message: dict[str, Any], seconds: float, path: str = "/send") -> dict[str, Any]:
    """One attempt: the bus's answer about the message that it stored. Raises Refused, Unreachable."""
    body = body_of(message)
    answer, _ = exchange(url, path, body, seconds + len(body) / SLOWEST_RATE)
    if answer.get("ok") is True and isinstance(answer.get("ts"), (int, float)):
        return dict(answer)
    raise Unreachable()


def body_of(value: Any) -> bytes:
    r"""JSON in UTF-8, whose bytes the bus counts. Half of a surrogate pair, which is not in UTF-8, stays as \ud800."""
    return json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace")


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

# The command line


def advised(error: BaseException, to: Any) -> str:
    """The sentence of an error. If the bus says to send a file, it names the command."""
    said = str(error)
    put = called("bus_file.py put", "file put")
    return f"{said} ({put} PATH --to {to})" if said.endswith(": send a file") else said


def told(answer: dict[str, Any], to: str | list[str]) -> str:
    """A sentence about a stored message. It begins with `queued` if not all its receivers listen."""
    names = to if isinstance(to, str) else ",".join(to)
    names += "" if (channel := answer.get("channel", "default")) == "default" else f" on the channel {channel}"
    with contextlib.suppress(KeyError, TypeError, ArithmeticError):  # a bus of the first contract says nothing of them
        online, seen = (receiver := answer["receiver"])["online"], receiver.get("last_seen")
        everyone = online + receiver.get("offline", not online)  # of one receiver, `online` is true or false
        if 0 < online == everyone:
            return f"sent to {names}, {'all' if 'offline' in receiver else 'who is'} listening (now, or a moment ago)"
        who = f"{names} was last seen {span(answer['ts'] - seen) or 'under 1m'} ago" if seen else ""
        who = f"{online} of {everyone} are listening" if "offline" in receiver else who
        unread = f", {receiver['unread']} unread" if "unread" in receiver else ""
        unread += f"; nobody has ever listened as {', '.join(receiver['unknown'])}" if receiver.get("unknown") else ""
        near = " or ".join(map(str, receiver.get("similar") or ()))
        return f"queued: {who or f'nobody has ever listened as {names}'}{unread}{near and f'; did you mean {near}?'}"
    return f"sent to {names}"


def command_line(purpose: str) -> argparse.ArgumentParser:
    """A parser for a message; message_of() takes its results."""
    parser = argparse.ArgumentParser(usage="%(prog)s [-h] [OPTIONS] [TO] [--] [TEXT ...]", description=purpose)
    add = parser.add_argument
    add("to", metavar="TO", nargs="?", help="a name, names as a,b,c, or all")
    add("text", metavar="TEXT", nargs="*", help="the message (behind -- if it begins with -); without it, stdin")
    add("--from", dest="sender", metavar="NAME", help="the sender ($AGENT_NAME)")
    add("--subject", help="subject of the message, in one line")
    add("--reply-to", metavar="ID", help="the id of the message that this one answers; what follows it is TEXT")
    add("--type", help="a word that your agents agree on: task, result, question ...")
    add("--priority", choices=("low", "normal", "high"), help="low, normal or high")
    add("--ttl", type=duration, metavar="TIME", help="do not deliver the message after TIME: 90s, 5m, 1h, 3d")
    add("--field", dest="fields", action="append", type=pair, default=[], metavar="K=V", help="add the member K=V")
    add("--content-type", metavar="TYPE", help="what TEXT is: text/markdown, application/json ...")
    add("--json-body", dest="content_type", action="store_const", const="application/json", help="TEXT is JSON")
    add("--key", help="the bus stores one message with this key, however often it is sent (default: a new key)")
    add("--channel", help="the channel ($AGENT_BUS_CHANNEL, or 'default')")
    add("--bus", type=profile, metavar="PROFILE", help="the bus in ~/.config/agent-bus/PROFILE.env (default.env)")
    add("--json", action="store_true", help="print the bus's answer as JSON, also on a terminal")
    add("--version", action="version", version=f"%(prog)s {VERSION}")
    return parser


def pair(text: str) -> list[str]:
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} has no value: write it as K=V")
    if text.split("=")[0] in ("from", "to", "channel", "msg", "key"):
        raise argparse.ArgumentTypeError(f"{text!r} as a --field: give it as the argument or the option of that name")
    return text.split("=", 1)


def message_of(given: dict[str, Any]) -> str:
    """The message, from the command line or stdin; `given` becomes arguments of send(). ValueError if it is none."""
    if twice := [field[0] for at, field in enumerate(given["fields"]) if field[0] in dict(given["fields"][:at])]:
        raise ValueError(f"--field: {twice[0]} is given twice, and a message has each member once")
    words = given.pop("text")
    not words and sys.stdin and sys.stdin.isatty() and complain("type the message, end with Ctrl-D")
    try:
        msg = " ".join(words) if words or not sys.stdin else sys.stdin.buffer.read().decode()
        given["content_type"] == "application/json" and json.loads(msg)
    except ValueError as error:
        fault = f"UTF-8 at byte {error.start}" if isinstance(error, UnicodeDecodeError) else f"JSON: {error}"
        raise ValueError(f"the message is not {fault}") from None
    if not msg.strip():
        raise ValueError("the message is empty: give TEXT, or a text on stdin")
    return msg


def main(argv: list[str] | None = None) -> int:
    parser = command_line("Send a message to an agent-bus: TEXT, or else the text on stdin.")
    parser.add_argument("--ask", action="store_true", help="wait for the reply, and print it; it is mail, too")
    parser.add_argument("--timeout", type=duration, metavar="S", help="keep trying for S seconds (30; with --ask: 300)")
    given = vars(parser.parse_intermixed_args(argv))
    to, question, seconds, as_json, _ = map(given.pop, ("to", "ask", "timeout", "json", "bus"))
    seconds = seconds if seconds is not None else 300.0 if question else 30.0
    named = to and (given["text"] or not re.search(r"[^,\s]\s+[^,\s]", to))  # or it is the text
    named or given["reply_to"] or parser.error("the receiver is missing: give TO before TEXT, or --reply-to ID")
    if given["reply_to"] and not re.fullmatch("[0-9a-f]{13}", given["reply_to"]):
        parser.error(f"--reply-to {given['reply_to']!a} is not the id of a message: that is 13 of 0-9 a-f")
    words = sys.argv[1:] if argv is None else argv
    first = next((at for at, word in enumerate(words) if word.startswith("--r")), len(words))  # where --reply-to is
    if given["reply_to"] and to and not parser.parse_intermixed_args(words[:first]).to:  # it stands behind
        to, given["text"] = None, [to, *given["text"]]
    tell_people(complain)
    try:
        compose("", "", sender=given["sender"])  # before somebody types a text: is a sender known?
        msg = message_of(given)
        if not to:
            to, given["channel"] = sender_of(given["reply_to"], given["channel"], seconds)
        if question:
            tell = (lambda answer: show_reply(answer, to, seconds)) if sys.stderr and sys.stderr.isatty() else None
            return show_reply(ask(to, msg, timeout=seconds, warn=complain, tell=tell, **given), to)
        report(send(to, msg, patience=seconds, warn=complain, **given), to, as_json)
    except (KeyboardInterrupt, ValueError, Refused, Unreachable) as error:
        said = advised(error, to)  # Ctrl-C has no text of its own
        if said or not question:  # a question may be stored, and only its answer is waited for
            complain(said or "stopped; the bus has not said that it has the message")
        return {KeyboardInterrupt: 130, Refused: 1, Unreachable: 75}.get(type(error), 2)
    return 0


def show_reply(answer: dict[str, Any], to: str, waits: float = 0.0) -> int:
    r"""The text of the reply on stdout, with invisible characters written out (\x1b); its sender on stderr.

    Without a reply, it says what became of the question, and that it `waits` (s) or has waited.
    """
    reply = answer.get("reply")
    waits or ("warning" in answer and complain(f"warning: {answer['warning']}", ""))
    if not isinstance(reply, dict) or not isinstance(reply.get("msg"), str):
        is_new = waits or not (sys.stderr and sys.stderr.isatty())  # a person was told when the question was stored
        is_new and told(answer, to).startswith("queued") and complain(told(answer, to), "")
        said = f"waiting up to {waits:.0f} s for the" if waits else "no"
        complain(f"{said} answer to {answer.get('id')}{';' if waits else ' yet:'} it will arrive as mail")
        return 3
    complain(f"{reply.get('id')} from {reply.get('from')}")
    with contextlib.suppress(OSError):  # if nobody reads our output, the question is stored and answered all the same
        emit(visible(re.sub("\r\n?", "\n", reply["msg"]).removesuffix("\n")) + "\n")
    return 0


def report(answer: dict[str, Any], to: str | list[str], as_json: bool = False) -> None:
    """What became of a send: one sentence for a person, one line of JSON for a program."""
    sentence = told(answer, to) + " (stored before, with the same key)" * (answer.get("duplicate") is True)
    person = bool(sys.stdout) and sys.stdout.isatty() and not as_json
    with contextlib.suppress(OSError):  # if nobody reads our output, the message is stored all the same
        emit(f"{visible(sentence)}\n" if person else json.dumps(answer) + "\n")
    person or (sentence.startswith("queued") and complain(sentence, ""))
    "warning" in answer and complain(f"warning: {answer['warning']}", "")


if __name__ == "__main__":
    sys.exit(main())
