"""The code that the hook and the MCP server share: the name of a session, and how a message may enter its context."""
from __future__ import annotations  # needs Python 3.9 or later

import glob
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

ROOT = os.path.abspath(os.path.join(__file__, "..", "..", ".."))
TOOLS = next(filter(os.path.isdir, (os.path.join(ROOT, folder) for folder in ("agent_bus_tools", "tools"))), ROOT)
sys.path[:0] = [ROOT, TOOLS]  # in a clone or a plugin, or installed
import bus_recv  # noqa: E402

ASK_SECONDS = 0.5  # for the bus to say who listens; a prompt waits for it
RECENT_SECONDS = 60.0  # a poll is held for 25 s, and its reader counts as listening for 10 s more; the rest is reserve
READER = shlex.quote(os.path.join(ROOT, "bus_recv.py"))  # for a command line
RESERVED = ("all", "system", "operator", "user", "root", "claude")  # as senders; root and claude only of an older bus
UNSEEN = re.compile(f"{bus_recv.HIDDEN.pattern}|<")  # `<`: no tag of any kind in the text of another agent


class Nameless(Exception):
    """AGENT_NAME is not set, and the directory gives no name."""


def quoted(value: Any) -> str:
    """JSON in one harmless line. A number with a fraction, such as a ts, stays as the bus wrote it."""
    return harmless(json.dumps(value, ensure_ascii=False, default=str))


def harmless(text: str) -> str:
    r"""The text with each invisible character and each `<` written out as in JSON: \u001b, \u202e, \u003c."""
    return UNSEEN.sub(lambda found: "\\u003c" if found[0] == "<" else json.dumps(found[0])[1:-1], text)


def name_of(process: int | None, directory: str | None) -> str:
    """AGENT_NAME, else the name of the directory, with -2, -3 ... while another session has that, here or elsewhere.

    `process` is the program that runs the session; if it is not known, None: then only AGENT_NAME keeps two sessions
    apart. A session keeps its name while it lives; without a directory it gets the name that it has already. Of
    sessions on other machines, only those that listen are known, and AGENT_NAME is not compared with them. Raises
    Nameless; ValueError if AGENT_NAME is not a name, or is another session's; OSError without a place for the list.
    """
    wanted = wishes(directory)
    if process is None or os.name != "posix":  # elsewhere it takes more to know whether a process lives
        return wanted[0]
    return claim(wanted, process, any_of_mine=not (directory or bus_recv.settings().get("AGENT_NAME")))


def wishes(directory: str | None) -> list[str]:
    """The names that a session may have, the best first: only AGENT_NAME, or many."""
    given = bus_recv.settings().get("AGENT_NAME")
    if given:
        if not bus_recv.NAME.fullmatch(given):
            raise ValueError(f"AGENT_NAME is {given!r}, which is not a name")
        return [given]
    folder = os.path.basename((directory or os.getcwd()).rstrip("/\\"))
    base = re.sub(r"[^A-Za-z0-9._:@-]+", "-", folder).strip("-._:@")[:60]
    if not base:
        raise Nameless(f"the folder name {folder!r} cannot be a name on the bus: set AGENT_NAME")
    return [name for name in (base, *(f"{base}-{n}" for n in range(2, 100))) if name.lower() not in RESERVED]


def claim(wanted: Sequence[str], process: int, any_of_mine: bool) -> str:
    """The first of `wanted` that is ours or free; now it is ours. Each bus and channel has a list of its own."""
    given = bus_recv.settings()
    url, channel = given["AGENT_BUS_URL"], given.get("AGENT_BUS_CHANNEL", "default")
    bus_recv.parts_of(url)  # ValueError if it has a login, which is not for the name of a file
    path = os.path.join(bus_recv.state_directory(), "names", *map(bus_recv.file_name, (url, channel)))
    with bus_recv.private_file(path, os.O_RDWR, "r+") as file:
        while not bus_recv.try_lock(file, path):  # another session is choosing its name
            time.sleep(0.05)
        lines = re.findall(r"^(\S+) ([0-9]{1,9})$", file.read(), re.MULTILINE)
        taken = {name: int(owner) for name, owner in lines if is_alive(int(owner))}
        mine = [name for name, owner in taken.items() if owner == process and (any_of_mine or name in wanted)]
        free = [name for name in wanted if name not in taken]
        elsewhere = heard_elsewhere(url, channel, free) if len(wanted) > 1 and not mine else ()
        name = next((name for name in (*mine, *free) if name not in elsewhere), None)
        if name is None:
            owner = taken.get(wanted[0])
            raise ValueError(f"{wanted[0]} is another session (process {owner}): this one needs its own AGENT_NAME")
        taken[name] = process
        file.seek(0)
        file.write("".join(f"{name} {owner}\n" for name, owner in taken.items()))
        file.truncate()
    return name


def heard_elsewhere(url: str, channel: str, names: Sequence[str]) -> set[str]:
    """The names under which another machine listens, if the bus answers at once.

    The bus cannot say which machine, as behind a tunnel all addresses are one. But each reader here writes a file
    before each poll.
    """
    try:
        agents = bus_recv.ask(url, f"/agents?channel={channel}&online=true", ASK_SECONDS)[0]["agents"]
        heard = {agent["name"] for agent in agents if agent["online"] and agent["channel"] == channel}
    except (bus_recv.Refused, bus_recv.Unreachable, LookupError, TypeError):  # or a bus of the old contract
        return set()
    return {name for name in heard.intersection(names) if not was_here(channel, name)}


def was_here(channel: str, name: str) -> bool:
    """May the reader that the bus still counts as listening be one of this machine?"""
    cursors = os.path.join(glob.escape(bus_recv.state_directory()), "cursors", "*")  # of any bus
    files = glob.glob(os.path.join(cursors, *map(bus_recv.file_name, (channel, name))))
    return any(time.time() - os.path.getmtime(path) < RECENT_SECONDS for path in files)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it exists, and is another user's
        pass
    return True
