"""The tool that finds messages by their words."""

from __future__ import annotations

from urllib.parse import urlencode

from _mcp_tools import PAGE, ROOM, TEXT, WORDS, Ask, Session, Steps, Tool, aged, fitting, shown


def search(me: Session, /, words: str, **filters: str) -> Steps:
    answer = yield Ask(f"/search?{urlencode({'q': words, 'max': PAGE, **filters})}")
    found = answer["messages"]
    lines = fitting((shown(me, aged(me, each)) for each in found), ROOM)
    rest = found[len(lines) - 1]["ts"] if len(lines) < len(found) else answer["next"]
    more = [f"(there may be more, which are older: bus_search with before {rest})"] if rest else []
    if not lines:
        return "\n".join(["no message has these words" if not rest else "none yet of the newest messages", *more])
    return "\n".join([f"{len(lines)} messages with these words, the newest first. {WORDS}", *lines, *more])


TOOLS = {
    "bus_search": Tool(
        search,
        "Find messages by their words, among all that you may read: your mail, mail to all, and what you sent.",
        {
            "words": {**TEXT, "description": 'all of these words; "in quotes": a phrase'},
            "from": {**TEXT, "description": "only messages from this name"},
            "to": {**TEXT, "description": "only messages to this name"},
            "thread": {**TEXT, "description": "only this conversation: the id of its first message"},
            "before": {**TEXT, "description": "only older messages: the time that the last answer named"},
        },
        ("words",),
    ),
}
