"""What a session does: the status that its hooks give the bus, beside what the agent says of itself by bus_status."""
from __future__ import annotations  # needs Python 3.9 or later

import contextlib
import json
import os
import re
import time
from typing import Any

from session import Self, bus_recv, place_of

SAID_SECONDS = 1200.0  # after which a hook says again what has not changed; the bus forgets it after an hour
KEPT_SECONDS = 3600.0  # for so long what the agent has said of itself goes along
ROOM = {"text": 250, "cwd": 120, "branch": 100}  # characters; the bus takes 500 together
HEAD_BYTES = 4096  # of a file of git


def status(me: Self, state: str, directory: str | None) -> dict[str, Any]:
    """An order for POST /status. `state`: busy, idle or waiting."""
    home = os.path.expanduser("~")
    folder = os.path.abspath(directory) if directory else ""
    shown = f"~{folder[len(home) :]}" if f"{folder}/".startswith(f"{home}/") else folder
    words = {"cwd": shown, "branch": branch_of(folder), **said(me.name)}
    kept = {member: text.encode(errors="replace").decode()[: ROOM[member]] for member, text in words.items() if text}
    channel = bus_recv.settings().get("AGENT_BUS_CHANNEL", "default")
    return {"from": me.name, "channel": channel, **kept, "state": state}


def branch_of(folder: str) -> str:
    """The branch of the repository around a folder; "" without one. To ask git would take longer than a hook may."""
    while folder:
        git = os.path.join(folder, ".git")
        with contextlib.suppress(OSError, ValueError):
            if os.path.isfile(git):  # of a worktree: where its own files are
                git = os.path.join(folder, beginning(git).removeprefix("gitdir:").strip())
            found = re.match(r"ref: refs/heads/(.+)", beginning(os.path.join(git, "HEAD")))
            return found[1] if found else ""
        above = os.path.dirname(folder)
        folder = above if above != folder else ""
    return ""


def beginning(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read(HEAD_BYTES)


def keep_said(name: str, words: dict[str, str]) -> None:
    """Note what an agent says of itself, because a status of a hook takes the place of it on the bus."""
    with bus_recv.private_file(said_path(name), os.O_WRONLY | os.O_TRUNC, "w") as file:
        file.write(json.dumps(words))


def said(name: str) -> dict[str, str]:
    """What an agent has said of itself within an hour."""
    path = said_path(name)
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        if time.time() - os.path.getmtime(path) < KEPT_SECONDS:
            its = json.loads(beginning(path))
            return {member: str(text) for member, text in its.items() if member in ROOM}
    return {}


def said_path(name: str) -> str:
    return place_of("said", name)
