"""The tools that send a message, ask and reply, and show a conversation."""

from __future__ import annotations

import secrets
import time
from typing import Any
from urllib.parse import quote, urlencode

from _mcp_tools import (
    BODY,
    FIELDS,
    HOLD,
    ID,
    PAGE,
    ROOM,
    SECONDS,
    TEXT,
    WORDS,
    Answer,
    Ask,
    Session,
    Steps,
    Tool,
    aged,
    fields,
    fitting,
    forget,
    id_of,
    shown,
    span,
    tick_of_ts,
)


def send(me: Session, /, to: str, msg: str, **fields: Any) -> Steps:
    answer = yield from me.send({"to": receivers(to), "msg": msg, **fields})
    return stored(answer, to)


def receivers(text: str) -> str | list[str]:
    """`a,b` is a list: a send to it is stored whole or not at all."""
    return text if "," not in text else [name.strip() for name in text.split(",") if name.strip()]


def stored(answer: Answer, to: str) -> str:
    """A sentence about a stored message: who of its receivers listens."""
    warning = answer.get("warning")
    return f"{told(answer, to)}; id {answer.get('id')}{f'; {warning}' if warning else ''}"


def told(answer: Answer, to: str) -> str:
    receiver = answer.get("receiver")
    if not isinstance(receiver, dict) or "online" not in receiver:  # a bus of the first contract
        return f"sent to {to}"
    online, unread = receiver["online"], f", {receiver['unread']} unread" if "unread" in receiver else ""
    if not isinstance(online, bool):  # of several receivers it is a number
        everyone = online + receiver["offline"]
        who = f"{online} of {everyone} are listening" if online else "nobody is listening"
        all_listen = f"sent to {to}, all listening (now, or a moment ago)"
        return all_listen if 0 < online == everyone else f"queued: {who}{unread}"
    if online:
        return f"sent to {to}, who is listening (now, or a moment ago)"
    if receiver.get("known") is False:
        similar = " or ".join(map(str, receiver.get("similar") or ()))
        return f"queued: nobody has ever listened as {to}{similar and f'; did you mean {similar}?'}"
    if not receiver["last_seen"]:
        return f"queued: nobody has listened as {to} yet{unread}"
    ago = (tick_of_ts(answer["ts"]) - tick_of_ts(receiver["last_seen"])) / 1000000
    return f"queued: {to} was last seen {span(ago)} ago{unread}"


def ask(me: Session, /, to: str, msg: str, wait: float = HOLD, key: str | None = None, **fields: Any) -> Steps:
    key = key or new_key()
    answer = yield from me.send({"to": to, "msg": msg, **fields, "key": key}, min(max(wait, 0), HOLD))
    reply = answer.get("reply")
    me.asked[str(answer.get("id"))] = None
    forget(me.asked)
    if isinstance(reply, dict):
        return f"{shown(me, aged(me, reply))}\nThe reply is in your inbox, too. {WORDS}"
    again = f"no reply yet: it will be in bus_inbox, and bus_ask with the same text and key {key} waits again"
    return f"{stored(answer, to)}; {again}"


def new_key() -> str:
    """It begins with the time: the bus stores such keys one after the other."""
    return f"{time.time_ns() // 1000:014x}{secrets.token_hex(9)}"


def reply(me: Session, /, id: str, msg: str, **fields: Any) -> Steps:
    message = (yield Ask(f"/message/{quote(id, safe='')}"))["message"]
    own = message["from"] in me.names  # one adds to what one said oneself
    to, channel = message["to"] if own else message["from"], message["channel"]
    answer = yield from me.send({"to": to, "channel": channel, "msg": msg, "reply_to": id, **fields})
    return stored(answer, to)


def thread(me: Session, /, id: str, after: str | None = None) -> Steps:
    query = urlencode({"max": PAGE, **({"after": after} if after else {})})
    answer = yield Ask(f"/thread/{quote(id, safe='')}?{query}")
    lines = fitting((shown(me, aged(me, each)) for each in answer["messages"]), ROOM)
    last = id_of(answer["messages"][len(lines) - 1]) if len(lines) < len(answer["messages"]) else answer.get("next")
    rest = [f"(there are more: bus_thread with after {last})"] if last else []
    return "\n".join([f"{len(lines)} messages of a conversation, oldest first. {WORDS}", *lines, *rest])


TOOLS = {
    "bus_send": Tool(
        send,
        f"Send a message to another agent. The result says if that agent listens; it is stored anyway. {WORDS}",
        {"to": {**TEXT, "description": "a name, several as dell,gb10, or all"}, "msg": BODY, **FIELDS},
        ("to", "msg"),
        reads_only=False,
    ),
    "bus_ask": Tool(
        ask,
        f"Send a question to one agent, and wait for its reply. {WORDS}",
        {
            "to": {**TEXT, "description": "a name"},
            "msg": BODY,
            "wait": {**SECONDS, "description": "seconds, at most 25 (25)"},
            **fields(("subject", "type", "priority", "ttl")),
            "key": {**TEXT, "description": "to wait again for the same question: the key that the first call named"},
        },
        ("to", "msg"),
        reads_only=False,
    ),
    "bus_reply": Tool(
        reply,
        "Answer a message: the answer goes to its sender, and belongs to its conversation.",
        {"id": ID, "msg": BODY, **fields(("subject", "type", "priority", "ttl", "key"))},
        ("id", "msg"),
        reads_only=False,
    ),
    "bus_thread": Tool(
        thread,
        "Show the conversation of a message: its first message and all replies.",
        {"id": ID, "after": {**TEXT, "description": "only what follows this id, as the last answer named it"}},
        ("id",),
    ),
}
