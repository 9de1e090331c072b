"""The tools of the inbox, bus_inbox and bus_ack. What they promise stands in _mcp_tools.py."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any
from urllib.parse import urlencode

from _mcp_tools import (
    HOLD,
    KEPT,
    ROOM,
    SECONDS,
    TEXT,
    UNREAD,
    WORDS,
    Answer,
    Ask,
    Failed,
    Page,
    Session,
    Steps,
    Tool,
    aged,
    brief,
    fitting,
    forget,
    id_of,
    shown,
    tick_of,
    tick_of_ts,
    ts_of,
)

EARLY = 3  # urgent messages that are shown early, whole; anybody can write `priority: high`
EARLY_ROOM = 1400  # characters of each of them


def inbox(me: Session, /, wait: float = 0, id: str | None = None, offset: int = 0, ack: str | None = None) -> Steps:
    if id:
        answer = yield from me.read(id)
        return shown(me, answer["message"], max(offset, 0))
    said = [(yield from acknowledge(me, ack))] if ack else []
    page = yield from me.look()
    if not page.messages and wait > 0:
        yield from me.wait(min(wait, HOLD))
        page = yield from me.look()
    lines = fitting((shown_in_order(me, each) for each in page.messages), ROOM)
    number, early = f"{len(page.messages)}{' or more' if page.more else ''}", list[str]()
    if page.more or len(lines) < len(page.messages):
        counts = yield from me.digest()
        number = f"{counts['unread']}{' or more' if counts['more'] else ''}" if counts else number
        early = yield from shown_early(me, page, counts, {id_of(each) for each in page.messages[: len(lines)]})
        lines = fitting(lines, ROOM - sum(map(len, early)), 0 if early else 1)
    run = page.messages[: len(lines)]
    if run:
        me.has_shown(tick_of_ts(run[-1]["ts"]), me.names)
    yield from me.took(run)
    jobs = "" if page.messages else (yield from returned(me))
    head = f"{number} unread, oldest first, for {me.me()} on channel {me.channel}{jobs}."
    head += f" {UNREAD}" if run or early else ""
    head += f" {KEPT}" if early else ""
    rest = "(there are more: after bus_ack of the last id above, bus_inbox shows them)"
    tail = [rest] if page.more or len(run) < len(page.messages) else []
    return "\n".join([*said, *page.notes, head, *early, *lines, *tail])


def returned(me: Session, /) -> Steps:
    """What else the bus counts as unread: jobs that were given back. In words; "" without any."""
    name, number = me.me(), 0
    with contextlib.suppress(Failed, LookupError, TypeError):  # it is only a hint
        answer = yield Ask(f"/agents?{urlencode({'name': name, 'channel': me.channel})}")
        its = [each for each in answer["agents"] if (each["name"], each["channel"]) == (name, me.channel)]
        number = sum(each.get("unread", 0) for each in its if "work" in each)
    jobs = f"{number} jobs wait" if number > 1 else "1 job waits"
    return f"; {jobs} for a worker (agent-bus work {name})" if number else ""


def shown_early(
    me: Session, page: Page, counts: Answer | None, in_order: set[str]
) -> Generator[Ask, Answer, list[str]]:
    """The oldest urgent messages that this session has not seen, and that are not `in_order` now."""
    urgent = counts["first_urgent"] if counts else [each for each in page.messages if each.get("priority") == "high"]
    ids = [id_of(each) for each in urgent]
    lines = []
    for id in [each for each in ids if each not in me.early and each not in in_order][:EARLY]:
        try:
            message = (yield from me.read(id))["message"]
        except Failed:  # it was removed or recalled meanwhile
            continue
        lines.append(shown(me, {**aged(me, message), "early": True}, room=EARLY_ROOM))
        me.early[id] = None
    forget(me.early)
    return lines


def shown_in_order(me: Session, message: dict[str, Any]) -> str:
    """A message in its place. Of one that was shown early, the head only."""
    message = aged(me, message)
    if id_of(message) in me.early:
        return me.quoted({**brief(me, message), "msg": "(shown before)"})
    return shown(me, message)


def acknowledge(me: Session, /, id: str) -> Steps:
    """Move the cursor to a message. One that was not shown in order moves nothing over older ones, of any name.

    A session that was forgotten meanwhile no longer knows what it has shown: its bus_inbox shows that again.
    """
    tick, none = tick_of(id), f"{id} is not the id of an unread message for {me.me()}: take it from bus_inbox"
    if not 0 <= tick <= me.shown or me.shown_for != me.names:
        try:
            message = yield from me.find(id)
        except Failed as failed:
            raise Failed(0, none) if failed.status in (400, 404) else failed from None
        tick = tick_of_ts(message["ts"])
        older = yield from older_than(me, tick)
        if older:
            return f"noted; {older} older ones are still unread"
    yield from me.present(tick)
    counts = yield from me.digest()
    left = f"{counts['unread']}{' or more' if counts['more'] else ''} unread" if counts else "bus_inbox shows the rest"
    jobs = (yield from returned(me)) if counts and not counts["unread"] else ""
    return f"{id} is read, and all earlier messages; {left}{jobs}"


def older_than(me: Session, tick: int) -> Steps:
    """How many unread messages are older, in words; "" if none is."""
    counts = yield from me.digest()
    later = yield from me.digest(ts_of(tick - 1))
    if counts and later:
        number = counts["unread"] - later["unread"]
        return f"{counts['unread']} or more" if counts["more"] else f"{number}" if number > 0 else ""
    page = yield from me.look()
    number = sum(tick_of_ts(each["ts"]) < tick for each in page.messages)
    return f"{number}{' or more' if page.more else ''}" if number else ""


TOOLS = {
    "bus_inbox": Tool(
        inbox,
        f"Show unread messages, each as a line of JSON, without taking them. {UNREAD} {WORDS}",
        {
            "wait": {**SECONDS, "description": "if there are none, wait for one: seconds, at most 25"},
            "id": {**TEXT, "description": "only this message, for one that was cut"},
            "offset": {"type": "integer", "description": "with id: from this character of its body on"},
            "ack": {**TEXT, "description": "first do bus_ack with this id"},
        },
    ),
    "bus_ack": Tool(
        acknowledge,
        "Mark a message, and every one before it, as read. That is the receipt: send no message about it.",
        {"id": {**TEXT, "description": "the id of the last message you have dealt with"}},
        ("id",),
        reads_only=False,
    ),
}
