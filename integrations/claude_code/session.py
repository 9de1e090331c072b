"""The code that the hook and the MCP server share: the name of a session, and how a message may enter its context.

Read it in this order: harmless (a text for a context), this_session and rename (what others call), Register (which
session has which name), wishes (the names that a session may have). Beside it, processes.py knows which
process runs a session, places.py how far names were read, and quick.py asks the bus.
"""
from __future__ import annotations  # needs Python 3.9 or later

import contextlib
import glob
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
TOOLS = next(filter(os.path.isdir, (os.path.join(ROOT, folder) for folder in ("agent_bus_tools", "tools"))), ROOT)
sys.path[:0] = [HERE, ROOT, TOOLS]  # in a clone or a plugin, or installed
import bus_recv  # noqa: E402, I001  which places and quick need
import processes  # noqa: E402
from places import Places, bus_at, cursors, keep_bus, own_cursor  # noqa: E402
from quick import get  # noqa: E402

ASK_SECONDS = 0.5  # for the bus to say who listens; a prompt waits for it
RECENT_SECONDS = 60.0  # a poll is held for 25 s, and its reader counts as listening for 10 s more; the rest is reserve
DAY = 86400.0  # s: a renamed session reads its old name for so long, and a session that ended may be resumed
KEPT_SECONDS = 30 * DAY  # after its last look a name is forgotten, with the ids of the sessions that had it
IDS = 20  # of sessions that a name remembers; /clear, /branch and a fork give a session a new one
READER = shlex.quote(os.path.join(ROOT, "bus_recv.py"))  # for a command line
RESERVED = ("all", "system", "operator", "user")  # as senders
NEVER_OURS = (*RESERVED, "root", "claude")  # an older bus refuses these two as well
UNSEEN = re.compile(f"{bus_recv.HIDDEN.pattern}|<")  # `<`: no tag of any kind in the text of another agent


def mcp_part(name: str) -> Any:
    """_mcp_tools, or a module that needs it, by its path: its folder has a file mcp.py, which may hide a package."""
    if name not in sys.modules:
        import importlib.util

        folders = [os.path.join(ROOT, folder) for folder in ("bus_extensions", "agent_bus_extensions")]
        file = os.path.join(next(filter(os.path.isdir, folders), folders[0]), f"{name}.py")
        spec: Any = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


class Nameless(Exception):
    """AGENT_NAME is not set, and the directory gives no name."""


def quoted(value: Any) -> str:
    """JSON in one harmless line. A number with a fraction, such as a ts, stays as the bus wrote it."""
    return harmless(json.dumps(value, ensure_ascii=False, default=str))


def harmless(text: str) -> str:
    r"""The text with each invisible character and each `<` written out as in JSON: \u001b, \u202e, \u003c."""
    return UNSEEN.sub(lambda found: "\\u003c" if found[0] == "<" else json.dumps(found[0])[1:-1], text)


class Self(NamedTuple):
    """Who a session is.

    `also`: older names that it reads too. `why`: why it has this name and no other, or "". `news`: a sentence about a
    change of the name in this moment, or "".
    """

    name: str
    also: tuple[str, ...] = ()
    why: str = ""
    news: str = ""

    @property
    def names(self) -> list[str]:
        """The names for a poll, the session's own first."""
        return [self.name, *self.also][:16]


def this_session(
    process: int | None,
    directory: str | None = None,
    session: str | None = None,
    title: str | None = None,
) -> Self:
    """Who the session is that the program `process` runs; None if that is not known.

    The name is AGENT_NAME, else the title of the session, else the name of the directory, with -2, -3 ... while another
    session has that, here or elsewhere. A session keeps its name while its process lives, and gets it back when it is
    resumed, unless another session has it by then. A hook gives `session` and `title`, the id and the title of now: a
    title that has changed renames the session. Other programs leave them out, because the id in their environment stays
    the old one after /clear, /branch and /resume.

    Of sessions on other machines, only those that listen are known, and AGENT_NAME is not compared with them. Raises
    Nameless; ValueError if AGENT_NAME is not a name, or is another session's; OSError without a place for the list.
    """
    asked = bus_recv.settings().get("AGENT_NAME")
    if asked and not bus_recv.NAME.fullmatch(asked):
        rule = "give 1 to 64 of A-Z a-z 0-9 . _ : @ - with a letter or digit first"
        raise ValueError(f"AGENT_NAME is {asked!r}, which is not a name: {rule}")
    if asked and asked.lower() in RESERVED:
        raise ValueError(f"AGENT_NAME is {asked}, which is reserved: set another name")
    born = processes.birth(process) if process else ""
    if not born:  # or on Windows, where it takes more to know whether a process lives
        return Self(asked or next(wishes(directory)))
    with Register() as register:
        return register.find(Asking(born, asked, directory, session or os.environ.get("CLAUDE_CODE_SESSION_ID"),
                                    title, bool(session)))  # fmt: skip


def rename(process: int, new: str) -> str:
    """Give the session that `process` runs a new name; returns its old one, which it reads for a day more.

    Raises ValueError, if the name is not free, not a name, or fixed by a token.
    """
    asked = bus_recv.settings().get("AGENT_NAME")
    with Register() as register:
        mine = register.of(processes.birth(process), asked)
        if not mine:
            raise ValueError("this session has no name on the bus yet: ask for its name first")
        register.rename(mine, new)
    return mine


class Asking(NamedTuple):
    """Who asks for a name. `current`: is the id that of now, and not an old one of the environment?"""

    born: str
    asked: str | None
    directory: str | None
    session: str | None
    title: str | None
    current: bool


EMPTY: dict[str, Any] = {"process": "", "ids": [], "seen": 0, "asked": None, "title": None, "old": {}, "why": ""}


class Register:
    """Which session has which name, on one bus and channel: a file, locked while it is used.

    Each line is a name, a blank, and JSON: `process` (its birth; alive or not), `ids` (of the sessions whose name it
    is), `seen` (time of the last look), `asked` (the AGENT_NAME that it was given), `title` (the last one seen), `old`
    (names that the session had, and until when it reads them) and `why` (it has this name and no other). A line of an
    older version has the number of the process in place of JSON.

    Rules: a living process has one name, beside those that it was given by AGENT_NAME. No two living processes have
    the same name. A session id is on one line.
    """

    def __init__(self) -> None:
        given = bus_recv.settings()
        self.url, self.channel = given["AGENT_BUS_URL"], given.get("AGENT_BUS_CHANNEL", "default")
        self.places = Places(self.url, self.channel)
        self.path = bus_recv.place_of("names", self.url, self.channel)  # ValueError, if a URL has a login

    def __enter__(self) -> Register:
        folder = os.path.dirname(self.path)
        if not os.path.isdir(folder):
            for older in bus_recv.older_places(folder)[:1]:
                with contextlib.suppress(OSError):  # another session has just done so
                    os.rename(older, folder)
        self.file = bus_recv.private_file(self.path, os.O_RDWR, "r+")
        while not bus_recv.try_lock(self.file, self.path):  # another session is choosing its name
            time.sleep(0.02)
        self.text, self.now = self.file.read(), time.time()
        self.names: dict[str, dict[str, Any]] = {}
        for name, rest in re.findall(r"^(\S+) ([0-9]{1,9}|\{.*\})$", self.text, re.MULTILINE):
            with contextlib.suppress(ValueError):  # somebody else wrote into the file
                line = {**EMPTY, **({"process": rest, "seen": self.now} if rest.isdecimal() else json.loads(rest))}
                if line["seen"] > self.now - KEPT_SECONDS or self.lives(line):
                    self.names[name] = line
        return self

    def __exit__(self, *_: object) -> None:
        text = "".join(f"{name} {json.dumps(line)}\n" for name, line in self.names.items())
        if text != self.text:
            self.file.seek(0, os.SEEK_END)  # on a full disk this fails, before a name is overwritten
            self.file.write(" " * (len(text) - len(self.text)))
            self.file.flush()
            self.file.seek(0)
            self.file.write(text)
            self.file.truncate()
        self.file.close()

    def find(self, who: Asking) -> Self:
        """The name of a session, given to it if it has none."""
        news = ""
        mine = self.of(who.born, who.asked)
        by_id = next((name for name, line in self.names.items() if who.session in line["ids"]), "")
        taken = self.taken(who.born)
        if by_id not in ("", mine, *taken) and (who.current or not mine) and self.names[by_id]["asked"] == who.asked:
            self.leave(mine)  # the session is resumed, perhaps in the process of another one
            mine = by_id
            self.names[mine].update(process=who.born, why="")
        is_new = not mine
        if not mine:
            mine = self.choose(who, taken, by_id if by_id in taken else "")
        elif who.title and who.title != self.names[mine]["title"]:
            mine, news = self.retitle(mine, who.title)
        line = self.names[mine]
        line["title"] = who.title or line["title"]
        if who.session and (who.current or is_new):
            for other in self.names.values():
                other["ids"] = [each for each in other["ids"] if each != who.session]
            line["ids"] = [*line["ids"], who.session][-IDS:]
        if not self.was_seen(line, RECENT_SECONDS):  # not each time: a look need not write the file
            line["seen"] = self.now
        return Self(mine, tuple(self.also(mine)), line["why"], news)

    def of(self, born: str, asked: str | None) -> str:
        """The name of a process, or "". A part of a session without AGENT_NAME has the name of a part that has it."""
        mine = {name: line["asked"] for name, line in self.names.items() if processes.same(line["process"], born)}
        for name in mine:
            self.names[name]["process"] = born
        return next((name for name in mine if mine[name] == asked), "" if asked else next(iter(mine), ""))

    def choose(self, who: Asking, taken: set[str], before: str) -> str:
        """A free name for a session that has none. `before` is the one that it had, if another session has it now."""
        wanted = [who.asked] if who.asked else list(wishes(who.directory, who.title))
        free = [name for name in wanted if name not in taken]
        elsewhere = self.heard_elsewhere(free) if len(wanted) > 1 else ()
        free = sorted((name for name in free if name not in elsewhere), key=lambda name: self.may_return(name, wanted))
        if not free:
            number = self.names.get(wanted[0], {}).get("process", "").partition(" ")[0]
            raise ValueError(f"{wanted[0]} is another session (process {number}): this one needs its own AGENT_NAME")
        name, loose = free[0], self.of(who.born, None)
        if who.asked and loose and not self.names[loose]["asked"]:  # one part of this session had no AGENT_NAME
            self.move(loose, name)
        else:
            self.take(name)
            self.names[name] = {**EMPTY, "process": who.born, "title": who.title, "seen": self.now}
            self.forward(name)
        missed = before or wanted[0]
        why = f"because {missed} is another session" if name != missed else ""
        if not who.asked and not why and not from_words(who.title or folder_of(who.directory))[1]:
            why = "because a name has only letters from a to z; AGENT_NAME sets another one"
        self.names[name].update(asked=who.asked, why=why)
        return name

    def may_return(self, name: str, wanted: Sequence[str]) -> bool:
        """Had a session this name today that may be resumed? Then others take it last; but the first goes to anyone."""
        line = self.names.get(name, EMPTY)
        return name != wanted[0] and bool(line["ids"]) and self.was_seen(line, DAY)

    def lives(self, line: dict[str, Any]) -> bool:
        """Does the session live? One that another PID namespace runs cannot be seen: it lives a day after its look."""
        return processes.is_alive(line["process"], self.was_seen(line, DAY))

    def was_seen(self, line: dict[str, Any], seconds: float) -> bool:
        """Was the last look so lately? One that lies further ahead was at a wrong time of the clock."""
        return abs(self.now - float(line["seen"])) < seconds

    def taken(self, born: str) -> set[str]:
        """The names that other living processes have, or had within the last day and still read."""
        others = {name: line for name, line in self.names.items() if not processes.same(line["process"], born)}
        living = [name for name, line in others.items() if self.lives(line)]
        return {each for name in living for each in (name, *self.also(name))}

    def heard_elsewhere(self, names: Sequence[str]) -> set[str]:
        """The names under which another machine listens; not those that a reader here reads as old ones."""
        readers: dict[str, list[str]] = {}
        for own in self.names:
            for old in self.also(own):
                readers.setdefault(old, []).append(own)
        return heard_elsewhere(self.url, self.channel, names, readers) if names else set()

    def leave(self, name: str) -> None:
        if name:
            self.names[name].update(process="", seen=self.now)

    def also(self, name: str) -> Iterator[str]:
        """The names that this session had within a day, the last one first."""
        old = self.names[name]["old"]
        return (each for each in sorted(old, key=old.__getitem__, reverse=True) if old[each] > self.now)

    def retitle(self, mine: str, title: str) -> tuple[str, str]:
        """The name of a session whose user gave it this title, and what the session is told of that."""
        new = from_words(title)[0]
        try:
            if new and new != mine:
                self.rename(mine, new)
                return new, f"This session is now {new} on the agent-bus. For a day it also gets the mail for {mine}."
        except ValueError as error:
            return mine, f"This session stays {mine} on the agent-bus, whatever its title is: {error}."
        return mine, ""

    def rename(self, mine: str, new: str) -> None:
        bus_recv.check_name(new)
        if bus_recv.credentials(self.url):
            raise ValueError(
                f"{mine} is the name in this session's token. On the machine of the bus, this makes a token for {new}: "
                f"{bus_recv.called('python3 bus_server.py invite', 'invite')} {new}"
            )
        if new.lower() in NEVER_OURS:
            raise ValueError(f"{new} is reserved: choose another name")
        born = self.names[mine]["process"]
        if new in self.taken(born) or self.heard_elsewhere([new]):
            raise ValueError(f"{new} is another session: choose another name")
        self.move(mine, new)

    def move(self, mine: str, new: str) -> None:
        """Give a session another name. It goes on where it was: its readers follow, and nothing is lost."""
        if new == mine:
            return
        self.take(new)
        for old in self.also(mine):
            self.pass_on(mine, old)
        names = [mine, *self.also(mine), "all"]
        line = self.names.pop(mine)
        self.names[new] = {**line, "old": {**line["old"], mine: self.now + DAY}, "why": ""}
        for bus, (at, start) in self.begins(mine, new).items():
            before = self.places.reached(bus, mine)
            known = {name: max(at, before.get(name, "0"), key=Decimal) for name in names}
            known[new] = self.places.of(bus, new, new)
            self.places.write(bus, new, start, known)
        self.forward(new)

    def take(self, name: str) -> None:
        """From now on, no session that may be resumed has this name, not as an old one either."""
        for old in self.also(name) if name in self.names else ():
            self.pass_on(name, old)
        for each, line in self.names.items():
            if name in line["old"]:
                if name in self.also(each):  # after that day nobody has read it
                    self.pass_on(each, name)
                line["old"] = {old: until for old, until in line["old"].items() if old != name}
                self.forward(each)

    def pass_on(self, reader: str, old: str) -> None:
        """What a session has read of its old name is read, whoever has that name next."""
        for bus in self.places.by_bus(reader):
            at = self.places.of(bus, reader, old)
            if Decimal(at) > Decimal(self.places.of(bus, old, old)):
                self.places.write(bus, old, at, self.places.reached(bus, old))

    def begins(self, mine: str, new: str) -> dict[str, tuple[str, str]]:
        """By bus: how far the old name was read, and the cursor from which both are read now.

        That is below the oldest message that waits for either. If the bus does not say which that is, it is the lower
        one of their cursors.
        """
        try:
            answer = self.digest(new, own_cursor(bus_at(self.url), self.channel, new))
            bus = str(answer["bus"])
            keep_bus(self.url, bus)
            at = own_cursor(bus, self.channel, mine)
            if at == "last":  # nobody read the old name here
                its = self.digest(mine)
                at = below(its["oldest"]) if its["oldest"] else str(its["now"])
            return {bus: (at, min(at, below(answer["oldest"]) if answer["oldest"] else at, key=Decimal))}
        except (bus_recv.Refused, bus_recv.Unreachable, LookupError, TypeError, ArithmeticError):
            known = self.places.by_bus(mine).items()
            return {bus: (at, min(at, self.places.of(bus, new, new), key=Decimal)) for bus, at in known}

    def digest(self, name: str, since: str = "last") -> dict[str, Any]:
        return get(self.url, f"/digest?to={name}&channel={self.channel}&since={since}", ASK_SECONDS)

    def forward(self, name: str) -> None:
        """Tell the readers of this name, and of its old ones, which names they read from now on, and until when."""
        old = self.names[name]["old"]
        names = {name: self.now + KEPT_SECONDS, **{each: old[each] for each in self.also(name)}}
        text = "".join(f"{each} {until:.0f}\n" for each, until in names.items())
        for each in names:
            path = bus_recv.beside(self.path, each)
            if len(names) > 1:
                with bus_recv.private_file(path, os.O_WRONLY | os.O_TRUNC, "w") as file:
                    file.write(text)
            elif os.path.exists(path):
                os.remove(path)


def wishes(directory: str | None, title: str | None = None) -> Iterator[str]:
    """The names that a session without AGENT_NAME may have, the best first."""
    base = from_words(title or "")[0] or from_words(folder_of(directory))[0]
    if not base:
        raise Nameless(f"the folder {directory or os.getcwd()!r} gives this session no name: set AGENT_NAME")
    for name in (base, *(f"{base}-{n}" for n in range(2, 1000))):
        if name.lower() not in NEVER_OURS:
            yield name


def folder_of(directory: str | None) -> str:
    return os.path.basename((directory or os.getcwd()).rstrip("/\\"))


def from_words(text: str) -> tuple[str, bool]:
    """A name made of a text in any script, and: is it the text, but for blanks and signs?

    Accents are left out. A name may only have letters from a to z: if others are lost, a number stands for them, which
    is the same for the same text.
    """
    import unicodedata  # slow to import

    plain = "".join(each for each in unicodedata.normalize("NFKD", text) if not unicodedata.combining(each))
    name = re.sub(r"[^A-Za-z0-9._:@-]+", "-", plain).strip("-._:@")[:60]
    if plain.isascii() or not any(each.isalnum() and not each.isascii() for each in plain):
        return name, True
    import zlib

    return f"{name[:54] or 'folder'}-{zlib.crc32(text.encode(errors='replace')) & 0xFFFFF:05x}", False


def heard_elsewhere(url: str, channel: str, names: Sequence[str], readers: dict[str, list[str]]) -> set[str]:
    """The names under which another machine listens, if the bus answers at once.

    The bus cannot say which machine, as behind a tunnel all addresses are one. But each reader here touches a file
    before each poll. `readers`: the names whose readers here read a name, too.
    """
    try:
        asked = ",".join(names[:64])  # more names are refused
        answer = get(url, f"/agents?channel={channel}&online=true&name={asked}", ASK_SECONDS)
        heard = {agent["name"] for agent in answer["agents"] if agent["online"] and agent["channel"] == channel}
    except (bus_recv.Refused, bus_recv.Unreachable, LookupError, TypeError):  # or a bus of the old contract
        return set()
    bus, those = id_of(answer), {name: (name, *readers.get(name, ())) for name in heard.intersection(names)}
    keep_bus(url, bus)
    return {name for name in those if not any(was_here(bus, channel, each) for each in those[name])}


def id_of(answer: dict[str, Any]) -> str:
    """Which bus has answered."""
    return str(answer.get("bus", bus_recv.OLD_CONTRACT))


def was_here(bus: str, channel: str, name: str) -> bool:
    """May the reader that this bus still counts as listening be one of this machine?"""
    files = [*cursors(bus, channel, name), *glob.glob(f"{glob.escape(wake_path(name))}~*")]
    return any(time.time() - os.path.getmtime(path) < RECENT_SECONDS for path in files)


def place_of(kind: str, *names: str) -> str:
    """The path of a file of this kind for our bus and channel, or a name there: elsewhere another may have the name."""
    given = bus_recv.settings()
    return bus_recv.place_of(kind, given["AGENT_BUS_URL"], given.get("AGENT_BUS_CHANNEL", "default"), *names)


def wake_path(name: str) -> str:
    """The file that wakes an idle session of this name; see notice.py. Beside it is the lock of who writes it."""
    return f"{place_of('wake', name)}.wake"


def below(message: dict[str, Any]) -> str:
    """The cursor of a reader that gets this message next."""
    return str(Decimal(str(message["ts"])) - Decimal("0.000001"))
