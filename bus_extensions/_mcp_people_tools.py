"""The tools that show who is on the bus, who a session is and what it does."""

from __future__ import annotations

from typing import Any

from _mcp_tools import NAME, ROOM, TEXT, Ask, Failed, Session, Steps, Tool, fitting, span


def status(me: Session, /, **said: str) -> Steps:
    yield from me.say(said)
    return "bus_agents shows it to others" if said else "it is no longer shown"


def rename(me: Session, /, name: str) -> Steps:
    if not NAME.fullmatch(name):
        raise Failed(0, "a name is 1 to 64 of A-Z a-z 0-9 . _ : @ - with a letter or digit first")
    return (yield from me.rename(name))


def agents(me: Session, /) -> Steps:
    answer = yield Ask(f"/agents?channel={me.channel}")
    known = [agent for agent in answer["agents"] if agent["channel"] == me.channel]  # an older bus has no filter
    known.sort(key=lambda agent: (agent["online"], float(agent["last_seen"] or 0)), reverse=True)
    lines = fitting((line_of(me, agent) for agent in known), ROOM)
    if answer.get("more") or len(lines) < len(known):
        lines.insert(0, f"(the first {len(lines)} names only; there are more)")
    return "\n".join(lines) or f"nobody has listened on channel {me.channel} yet"


def line_of(me: Session, agent: dict[str, Any]) -> str:
    seen = agent["last_seen"]  # None: it only sends
    ago = f"last seen {span(me.clock() - float(seen))} ago" if seen else "has never listened"
    unread = f", {agent['unread']} unread" if "unread" in agent else ""
    said = agent.get("status")
    about = f"; says {me.quoted({**said, 'at': span(me.clock() - float(said['at'])) + ' ago'})}" if said else ""
    return f"{agent['name']}: {'listening' if agent['online'] else ago}{unread}{about}"


def whoami(me: Session, /) -> Steps:
    name = me.me()
    recipients = (yield Ask(f"/inbox?channel={me.channel}&name={name}"))["recipients"]
    unread = recipients.get(me.channel, {}).get(name, 0)
    before = f"; it still reads {', '.join(me.names[1:])}" if me.names[1:] else ""
    return f"{name}, on channel {me.channel} of {me.where}; {unread} unread addressed to this name{before}"


TOOLS = {
    "bus_agents": Tool(
        agents,
        "Who is on the bus: listening or last seen when, with how much unread mail, and what each says that it does.",
        {},
    ),
    "bus_whoami": Tool(whoami, "Your own name and channel, which bus it is, and how much unread mail you have.", {}),
    "bus_status": Tool(
        status,
        "Say what you are doing; bus_agents shows it to the others. Without arguments it is no longer shown.",
        {
            "text": {**TEXT, "description": "one sentence"},
            "state": {**TEXT, "description": "busy, idle or waiting"},
            "cwd": {**TEXT, "description": "the folder you work in"},
            "branch": {**TEXT, "description": "the branch you work on"},
        },
        reads_only=False,
    ),
    "bus_rename": Tool(
        rename,
        "Give this session another name on the bus. It still reads what waits for the old one.",
        {"name": {**TEXT, "description": "the new name"}},
        ("name",),
        reads_only=False,
    ),
}
