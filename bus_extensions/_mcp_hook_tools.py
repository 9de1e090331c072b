"""The tool of a hook. A model trusts its text: only numbers, and names that a token vouches for."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Generator

from _mcp_tools import NAME, TEXT, Answer, Ask, Failed, Session, Steps, Tool, notice_of

SAID_SECONDS = 1200.0  # after which a hook says again what the session does; the bus forgets it after an hour
STARTS = ("SessionStart", "UserPromptSubmit")
STATES = {"SessionStart": "idle", "Stop": "idle", "Notification": "waiting"}  # any other event: busy
LASTING = (0, 401, 403)  # statuses of a refusal that time does not heal


def hook(me: Session, /, agent: str = "", event: str = "", title: str = "", **_: str) -> Steps:
    """The JSON of a hook. A sub-agent is told nothing. A turn that ends goes on for urgent mail, and for replies."""
    if given(agent) or not re.fullmatch("[A-Za-z]{1,40}", event):
        return "{}"
    try:
        facts = [(yield from renamed(me, given(title)))] if event in STARTS else []
        facts.append((yield from notice(me, event)))
        yield from say_state(me, STATES.get(event, "busy"))
    except Failed as failed:
        facts = []
        if event in STARTS and me.told is None and failed.status in LASTING:
            facts, me.told = [f"This session gets no mail from the agent-bus: {reason(failed)}."], ""
    text = " ".join(filter(None, facts))
    output = {"hookEventName": event, "additionalContext": me.harmless(text)}
    return json.dumps({"hookSpecificOutput": output} if text else {})


def reason(failed: Failed) -> str:
    """In our words: another program may have the port of the bus, and a hook is believed."""
    return f"the bus answers {failed.status}; bus_whoami tells why" if failed.status else str(failed)


def given(value: str) -> str:
    """The value of a field of a hook; "" if there was none, so its ${...} was left as it was."""
    return "" if value.startswith("${") else value


def notice(me: Session, event: str) -> Steps:
    """One line, whatever waits; "" if nothing has come since the last one."""
    me.me()
    counts = yield from me.digest()
    newest = counts["newest"]["id"] if counts and counts["newest"] else ""
    if not counts or not newest or (newest == me.told and event != "SessionStart"):
        return ""
    awaited = sum(each.get("answers", 0) for each in counts["threads"] if each["id"] in me.asked)
    urgent = int(counts["urgent"])
    if event == "Stop" and not urgent and not awaited:
        return ""
    me.told = newest
    senders = [name for name in counts["vouched"] if NAME.fullmatch(name)]
    others = len(counts["senders"]) > len(senders)
    return notice_of(me.me(), counts["unread"], counts["more"], urgent, awaited, senders, others)


def renamed(me: Session, title: str) -> Steps:
    """The title that a user gives a session is its name on the bus, if it can be one."""
    if title == me.title or not NAME.fullmatch(title):
        return ""
    me.title = title
    if title in me.names[:1]:
        return ""
    try:
        return (yield from me.rename(title))
    except Failed as failed:
        return f"{reason(failed)}."


def say_state(me: Session, state: str) -> Generator[Ask, Answer, None]:
    """Say what the session does, if that is news."""
    if me.said.get("state") != state or time.monotonic() > me.said_at + SAID_SECONDS:
        try:
            yield from me.say({**me.said, "state": state})
        except Failed:  # an older bus, or too many: it is not asked again for each step of a turn
            me.said, me.said_at = {**me.said, "state": state}, time.monotonic()


TOOLS = {
    "bus_hook": Tool(
        hook,
        "Only for hooks: how many messages wait, as the JSON of a hook. Call bus_inbox instead.",
        {
            "session": {**TEXT, "description": "session_id of the hook"},
            "agent": {**TEXT, "description": "agent_id"},
            "event": {**TEXT, "description": "hook_event_name"},
            "title": {**TEXT, "description": "session_title"},
            "active": {**TEXT, "description": "stop_hook_active"},
        },
        reads_only=False,
    ),
}
