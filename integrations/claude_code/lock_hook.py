#!/usr/bin/env python3
"""A hook for Claude Code: before an edit, says that another agent has reserved the file on the agent-bus.

    AGENT_BUS_LOCKS=warn    the model is told who holds the file, and until when, and the edit goes on
    AGENT_BUS_LOCKS=ask     the user is asked first

Without that variable the hook of the plugin does nothing. It takes the event PreToolUse on stdin, asks the bus once
(GET /locks?name=PATH; and GET /whoami for a name), and prints one JSON object, or nothing. PATH is the file's path from
the top of the project, as agents reserve it; a file outside of the project is asked for by its whole path. It ends
within 1 s with exit code 0, silent if the bus is slow, out of reach or without reservations: no edit waits for a bus.

A hook is read as the word of the program, so no text of another agent is in it: only the path, until when it is held,
and the name of the holder if a token vouches for names on this bus. bus_locks shows the rest.
"""
from __future__ import annotations  # needs Python 3.9 or later

import contextlib
import json
import os
import sys
import threading
import time
from typing import Any
from urllib.parse import urlencode

# Python 3.8 prints this text. Older ones show the line in a SyntaxError, because they do not know `:=`.
if sys.version_info < (3, 9) and (needs := "lock_hook.py needs Python 3.9 or later"):  # noqa: UP036
    sys.exit(needs)
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # python3 -I does not
import processes  # noqa: E402
import session  # noqa: E402
from session import Nameless, bus_recv, harmless  # noqa: E402

ANSWER_SECONDS, WHOSE_SECONDS, DEADLINE_SECONDS = 0.5, 0.2, 0.9
WAYS = ("warn", "ask")


def path_of(event: dict[str, Any]) -> str:
    """The file that is about to change, as agents reserve it; "" if the event names none."""
    given = event.get("tool_input")
    given = given if isinstance(given, dict) else {}
    file, project = str(given.get("file_path") or given.get("notebook_path") or ""), project_of(event)
    if not file or not project:
        return ""
    inside = os.path.relpath(os.path.join(project, file), project).replace(os.sep, "/")
    return os.path.abspath(file) if inside == ".." or inside.startswith("../") else inside


def project_of(event: dict[str, Any]) -> str:
    return str(os.environ.get("CLAUDE_PROJECT_DIR") or event.get("cwd") or "")


def held(path: str, own: str) -> list[dict[str, Any]]:
    """The reservations of others for a path. Raises as session.get()."""
    given = bus_recv.settings()
    query = urlencode({"name": path, "channel": given.get("AGENT_BUS_CHANNEL", "default")})
    answer = session.get(given["AGENT_BUS_URL"], f"/locks?{query}", ANSWER_SECONDS)
    rows = answer.get("locks")
    rows = rows if isinstance(rows, list) else []
    return [row for row in rows if isinstance(row, dict) and row.get("holder") != own]


def warning(path: str, rows: list[dict[str, Any]]) -> str:
    """One sentence about the reservation that lasts longest."""
    last = max(rows, key=lambda row: bus_recv.seconds_of(row.get("until")))
    until = time.strftime("%H:%M UTC", time.gmtime(bus_recv.seconds_of(last.get("until"))))
    holder = str(last.get("holder"))
    who = holder if bus_recv.NAME.fullmatch(holder) and vouches() else "another agent"
    return f"agent-bus: {who} has reserved {path} until {until}. bus_locks shows why; bus_lock with wait waits for it."


def vouches() -> bool:
    """Does a token stand behind each name on this bus? That we have one does not say so: an open bus asks for none."""
    url = bus_recv.settings()["AGENT_BUS_URL"]
    with contextlib.suppress(bus_recv.Refused, bus_recv.Unreachable):  # an older bus does not say
        return bool(bus_recv.credentials(url)) and session.get(url, "/whoami", WHOSE_SECONDS).get("open") is False
    return False


def look(way: str) -> None:
    event = json.loads(sys.stdin.buffer.read())
    path = path_of(event) if isinstance(event, dict) else ""
    if not path or event.get("hook_event_name") != "PreToolUse":
        return
    me = session.this_session(processes.its_process(), project_of(event), event.get("session_id"))
    rows = held(path, me.name)
    if rows:
        text = harmless(warning(path, rows))
        asks = {"permissionDecision": "ask", "permissionDecisionReason": text}
        told = asks if way == "ask" else {"additionalContext": text}
        bus_recv.emit(json.dumps({"hookSpecificOutput": {"hookEventName": "PreToolUse", **told}}) + "\n")


def in_silence(way: str) -> None:
    with contextlib.suppress(Nameless, bus_recv.Refused, bus_recv.Unreachable, bus_recv.Busy, OSError, ValueError):
        look(way)


def main() -> None:
    way = os.environ.get("AGENT_BUS_LOCKS", "")
    if way and way not in WAYS:
        bus_recv.complain(f"AGENT_BUS_LOCKS is {way!a}: set it to {' or '.join(WAYS)}", "lock_hook")
        os._exit(1)  # not 2, with which a hook forbids the edit
    if way:
        thread = threading.Thread(target=in_silence, args=(way,), daemon=True)  # a name server may hold it for ever
        thread.start()
        thread.join(DEADLINE_SECONDS)
    os._exit(0)


if __name__ == "__main__":
    main()
