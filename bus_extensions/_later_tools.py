"""The tools that send a message later, and list or take back what waits to be sent."""

from __future__ import annotations

import datetime
import secrets
import time
from typing import Any
from urllib.parse import urlencode

from _mcp_tools import BODY, FIELDS, ROOM, SECONDS, TEXT, Ask, Failed, Session, Steps, Tool, fitting, tick_of_ts

WHEN = ("after", "at", "cron")
SHOWN = 200  # characters of a message in the list


def later(me: Session, /, to: str, msg: str, **given: Any) -> Steps:
    when = {member: given.pop(member) for member in WHEN if member in given}
    if "at" in when:
        when["at"] = moment(when["at"])
    key = given.pop("key", None) or secrets.token_hex(8)
    names = [name.strip() for name in to.split(",") if name.strip()] if "," in to else to
    message = {**me.signed(), "to": names, "msg": msg, **given}
    try:
        answer = yield Ask("/later", {**when, "key": key, "message": message})
    except Failed as failed:
        if 400 <= failed.status < 500:
            raise
        raise Failed(failed.status, f"{failed}; to give it again: key {key}") from None
    at = utc(answer["at"])
    return f"it is sent to {to} at {at}; bus_scheduled with cancel {answer['id']} takes it back"


def moment(text: str) -> float:
    """Seconds since 1970. Without an offset it is UTC."""
    try:
        when = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        raise Failed(0, f"at must be a time like 2026-12-01T09:00Z, not {text[:64]}") from None
    return (when if when.tzinfo else when.replace(tzinfo=datetime.timezone.utc)).timestamp()


def utc(ts: Any) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(tick_of_ts(ts) // 1000000))


def scheduled(me: Session, /, cancel: str = "") -> Steps:
    if cancel:
        yield Ask("/later", {"cancel": cancel})
        return f"{cancel} is taken back: it is not sent any more"
    own = {name: value for name, value in me.signed().items() if name == "from"}  # a token lists its own anyway
    answer = yield Ask(f"/later?{urlencode(own)}")
    lines = fitting((line_of(me, each) for each in answer["schedules"]), ROOM)
    if answer.get("more") or len(lines) < len(answer["schedules"]):
        lines.append("(there are more)")
    return "\n".join(lines) or "nothing waits to be sent"


def line_of(me: Session, schedule: dict[str, Any]) -> str:
    message = schedule["message"]
    shown = {**{member: schedule[member] for member in ("id", "state", "cron", "reason") if schedule[member]},
             "at": utc(schedule["at"]), "to": message["to"], "msg": message["msg"][:SHOWN]}  # fmt: skip
    return me.quoted(shown)


TOOLS = {
    "bus_later": Tool(
        later,
        "Send a message to another agent later, once or again and again. The bus keeps it, also when you have ended.",
        {
            "to": {**TEXT, "description": "a name, several as dell,gb10, or all"},
            "msg": BODY,
            "after": {**SECONDS, "description": "send it after this many seconds; or give at, or cron"},
            "at": {**TEXT, "description": "send it then, like 2026-12-01T09:00Z"},
            "cron": {**TEXT, "description": "send it at each such minute, in UTC: minute hour day month weekday"},
            **FIELDS,
        },
        ("to", "msg"),
        reads_only=False,
    ),
    "bus_scheduled": Tool(
        scheduled,
        "List your messages that wait to be sent later, and those that could not be sent and why; or take one back.",
        {"cancel": {**TEXT, "description": "take back the one with this id"}},
        reads_only=False,
    ),
}
