"""The page for people, at the URL of the bus in a browser (PROTOCOL.md section 23). Its files are in page/."""

from __future__ import annotations

import argparse
import pathlib
from collections import Counter, OrderedDict, deque
from functools import partial
from typing import NamedTuple

from bus_server import (
    EVERYONE,
    LOADED,
    Answer,
    Bus,
    Headers,
    Poll,
    Refused,
    Request,
    encode,
    interned,
    ok,
    put_newest,
    seconds,
    show_help,
)

TABLES, NOUN, OPERATIONS = None, "", ()

FOLDER = pathlib.Path(__file__).with_name("page")
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# No script, style or request but those of this bus; no HTML is made of text, and no other page may frame this one.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
Files = dict[str, tuple[bytes, str]]  # of a name: content and type
HEADERS: Headers = (
    ("Content-Security-Policy", POLICY),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Permissions-Policy", "camera=(), geolocation=(), microphone=(), payment=(), usb=()"),
)


def options(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def start(bus: Bus, options: argparse.Namespace) -> None:
    files = {file.name: (file.read_bytes(), KINDS[file.suffix]) for file in FOLDER.glob("*") if file.suffix in KINDS}
    bus.gate.public.add("/ui/")
    bus.gate.pages |= {"/", "/ui/"}
    bus.route("GET", "/ui/", partial(show, bus, files), "the page for people, in a browser")
    bus.route("GET", "/", partial(front, bus), "this text; in a browser, the page")
    Activity(bus)


def front(bus: Bus, request: Request) -> Answer:
    """A browser is led to the page, by a relative path: the bus may be under a path of a proxy."""
    if "text/html" in request.fields.get("accept", ""):
        bus.storms.read(request.owner())
        return Answer(302, b"", "text/plain; charset=utf-8", (("Location", "ui/"),))
    return show_help(bus, request)


def show(bus: Bus, files: Files, request: Request) -> Answer:
    """One of the files that were there at the start. They hold no data of the bus, so everybody may have them."""
    bus.storms.read(request.owner())
    file = request.parsed.rest or "index.html"
    found = (places(bus, files), KINDS[".js"]) if file == "extensions.js" else files.get(file)
    if not found:
        where = f"copy the folder {FOLDER} from the same version"
        where = "open /ui/, and in AGENT_BUS_URL leave /ui out" if files else where
        raise Refused(404, f"the page has no such file: {where}")
    return Answer(200, *found, HEADERS)


def places(bus: Bus, files: Files) -> bytes:
    """The module with the places of the extensions that are loaded and have one. At the start, not all are loaded.

    A module of the page itself has no default export: an extension may bear its name, as mail.py.
    """
    loaded = [name for name, state in bus.extensions.items() if state == LOADED]
    names = [name for name in loaded if b"\nexport default " in files.get(f"{name}.js", (b"", ""))[0]]
    return "".join(f'export {{ default as {name} }} from "./{name}.js";\n' for name in names).encode()


class Minute(NamedTuple):
    """What the bus did in a minute."""

    begin: int  # tick
    messages: int
    refused: int

    def json(self) -> str:
        return f'{{"ts": {seconds(self.begin)}, "messages": {self.messages}, "refused": {self.refused}}}'


class Activity:
    """What was said and refused in each of the last minutes, and who listened. In memory only. Owned by the loop.

    Minutes are counted from the start of the bus. A send costs nothing here: the figures are read once a minute.
    """

    MINUTES = 60
    NEWEST = 20000  # messages that a start looks at, some 10 ms
    NAMES = 10000  # whose presence is known, some 200 bytes each; of more, the one that polled longest ago is forgotten

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.number = 0  # of the running minute, since the start
        self.begin = bus.view.clock()
        self.before = self.sums()  # at the beginning of the running minute
        self.past = deque(self.before_the_start(), self.MINUTES - 1)
        # Of a name: the minute of its last poll and, in the lowest bits, `presence` then. A pair takes twice the memory
        self.polls: OrderedDict[tuple[str, str], int] = OrderedDict()
        bus.route("GET", "/activity", self.activity, "messages in each of the last minutes; and when a name listened")
        bus.on_polled.append(self.polled)
        bus.loop.every(60, self.minute_over)

    def sums(self) -> tuple[int, int]:
        return self.bus.figures.messages, sum(self.bus.figures.refused.values())

    def before_the_start(self) -> list[Minute]:
        """The oldest first; not the minutes of which the newest messages tell only a part."""
        ticks = "SELECT tick FROM messages WHERE tick > ? ORDER BY tick DESC LIMIT ?"
        since = self.begin - (self.MINUTES - 1) * 60_000_000
        rows = self.bus.view.database.execute(ticks, (since, self.NEWEST)).fetchall()
        said = Counter((self.begin - tick) // 60_000_000 for (tick,) in rows)
        whole = self.MINUTES - 1 if len(rows) < self.NEWEST else max(said)
        return [Minute(self.begin - (ago + 1) * 60_000_000, said[ago], 0) for ago in reversed(range(whole))]

    def running(self) -> Minute:
        (messages, refused), (before, refused_before) = self.sums(), self.before
        return Minute(self.begin, messages - before, refused - refused_before)

    def minute_over(self) -> None:
        self.past.append(self.running())
        self.number += 1
        self.begin, self.before = self.bus.view.clock(), self.sums()

    def polled(self, request: Request, poll: Poll) -> None:
        for own in set(poll.present()) - {EVERYONE}:
            key = interned((str(poll.channel), own))
            put_newest(self.polls, key, self.number << self.MINUTES | self.presence(key) | 1, self.NAMES)

    def presence(self, key: tuple[str, str]) -> int:
        """A bit for each of the last minutes, 1 if the name listened; the lowest is that of the running minute."""
        polled, box = self.polls.get(key, self.number << self.MINUTES), self.bus.mailboxes.boxes.get(key)
        passed = min(self.number - (polled >> self.MINUTES), self.MINUTES)
        since = (1 << passed) - 1 if box and self.bus.mailboxes.online(box) else 0  # it was parked all the time
        return (polled << passed | since) & ((1 << self.MINUTES) - 1)

    def activity(self, request: Request) -> Answer:
        self.bus.storms.read(request.owner())
        request.grant.check_operator()
        query = request.query()
        channel, known = query.name("channel", "default"), min(self.number + 1, self.MINUTES)
        presence = {own: format(self.presence((str(channel), own)), f"0{known}b") for own in query.names("name")}
        minutes = ", ".join(minute.json() for minute in (*self.past, self.running()))
        return ok(self.bus, f'"minutes": [{minutes}], "presence": {encode(presence)}')
