"""The tools for reservations."""

from __future__ import annotations

import time
from urllib.parse import urlencode

from _mcp_tools import HOLD, ROOM, SECONDS, TEXT, Ask, Failed, Session, Steps, Tool, fitting, tick_of_ts


def lock(me: Session, /, names: str, why: str = "", ttl: float = 600, wait: float = 0, shared: str = "") -> Steps:
    order = {**me.signed(), "names": lines_of(names), "why": why, "ttl": ttl, "shared": shared == "true"}
    answer = yield Ask("/lock", {**order, "wait": min(max(wait, 0), HOLD)})
    return f"yours until {moment(answer['until'])}, fence {answer['fence']}. When you are done: bus_unlock."


def unlock(me: Session, /, names: str = "", fence: int = 0) -> Steps:
    if bool(names) == bool(fence):
        raise Failed(0, "give names, or fence: what to release")
    what = {"fence": fence} if fence else {"names": lines_of(names)}
    released = (yield Ask("/unlock", {**me.signed(), **what}))["released"]
    its = "this reservation" if fence else "you have reserved nothing by that name, or it"
    return f"released: {released}" if released else f"nothing is released: {its} has ended"


def locks(me: Session, /, path: str = "", holder: str = "") -> Steps:
    query = {"channel": me.channel, **({"name": path} if path else {}), **({"holder": holder} if holder else {})}
    answer = yield Ask(f"/locks?{urlencode(query)}")
    rows = [{**row, "since": moment(row["since"]), "until": moment(row["until"])} for row in answer["locks"]]
    shown = fitting(map(me.quoted, rows), ROOM)
    if answer.get("more") or len(shown) < len(rows):
        shown.insert(0, f"(the first {len(shown)} only; there are more)")
    return "\n".join(shown) or f"nobody has reserved {'that' if path or holder else 'anything'}"


def lines_of(names: str) -> list[str]:
    return [name.strip() for name in names.splitlines() if name.strip()]


def moment(ts: str) -> str:
    return time.strftime("%H:%M:%SZ", time.gmtime(tick_of_ts(ts) / 1000000))


NAMES = {**TEXT, "description": "paths from the top of the repository, one in a line; * ? [a-z] and ** are wildcards"}

TOOLS = {
    "bus_lock": Tool(
        lock,
        "Reserve files before you edit them: all of these names, or none. If others hold one, it says who, and until "
        "when. It keeps nobody out: it is a promise among agents. Ask again with the same names for more time.",
        {
            "names": NAMES,
            "why": {**TEXT, "description": "what you do, for the others, in at most 200 characters"},
            "ttl": {**SECONDS, "description": "it ends by itself after this many seconds (600)"},
            "wait": {**SECONDS, "description": "if others hold them, wait: seconds, at most 25"},
            "shared": {**TEXT, "description": "true: others may hold them too, if they also say so"},
        },
        ("names",),
        reads_only=False,
    ),
    "bus_unlock": Tool(
        unlock,
        "Release names that you have reserved, or a whole reservation by its fence.",
        {"names": NAMES, "fence": {"type": "integer", "description": "the fence that bus_lock gave you"}},
        reads_only=False,
    ),
    "bus_locks": Tool(
        locks,
        "Who has reserved which names, until when and why. What `why` says is the word of another agent.",
        {
            "path": {**TEXT, "description": "only who holds this path"},
            "holder": {**TEXT, "description": "only what this name holds"},
        },
    ),
}
