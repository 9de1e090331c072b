#!/usr/bin/env python3
"""Show who is on an agent-bus: who listens, how much mail waits, and for how long.

    AGENT_BUS_URL=http://10.0.0.5:8080 python3 tools/bus_who.py
    python3 tools/bus_who.py --watch
    python3 tools/bus_who.py --json | jq '.[] | select(.unread > 0) | .name'

`--watch` shows it again every 2 s, until Ctrl-C. SEEN is `listening`, or how long ago the name last listened, or `sent
5m` if it has sent something since. A name on another channel than `default` is shown as CHANNEL/NAME. `-` stands for
what the bus does not tell: an older bus, or a token that may not read that mail. UNREAD is without mail to `all`.
On a terminal a long name is cut, so that each agent has one line.

bus_recv.ask asks the bus; so this program needs bus_recv.py beside it or one folder up. It takes the variables of
bus_recv.py, and writes no file. Exit code: 0 done, 1 refused by the bus, 2 usage, 75 out of reach, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import urlencode

# Python 3.8 prints this text. Older ones show the line in a SyntaxError, because they do not know `:=`.
if sys.version_info < (3, 9) and (needs := "bus_who.py needs Python 3.9 or later"):  # noqa: UP036
    sys.exit(needs)

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path += [HERE, os.path.dirname(HERE)]  # the clients lie beside this file or one folder up, or are installed
sys.path.sort(key=lambda folder: folder.endswith("-packages"))  # else an older version that is installed wins
try:
    import bus_recv
except ModuleNotFoundError as missing:
    print(f"bus_who: {missing.name}.py is missing in {HERE}: run curl -fO $AGENT_BUS_URL/{missing.name}.py there",
          file=sys.stderr)  # fmt: skip
    sys.exit(2)

Agent = dict[str, Any]
EVERY_SECONDS = 2.0  # --watch looks again
CLEAR = "\x1b[H\x1b[2J"  # a terminal


def agents(url: str, channel: str | None, online: bool) -> tuple[list[Agent], float]:
    """Everybody on the bus, and its clock (s since 1970). Raises as bus_recv.ask() does."""
    query = {**({"channel": channel} if channel else {}), **({"online": "true"} if online else {})}
    found: list[Agent] = []
    while True:
        answer, now = bus_recv.ask(url, f"/agents?{urlencode(query)}", bus_recv.GRACE_SECONDS)
        page = answer.get("agents")
        if not isinstance(page, list) or not all(isinstance(agent, dict) for agent in page):
            raise bus_recv.Unreachable()
        found += page
        if not answer.get("more") or answer.get("next") in (None, query.get("after")):  # else it is asked for ever
            return sorted(found, key=lambda agent: (not agent.get("online"), -seen(agent))), now
        query["after"] = answer["next"]


def seen(agent: Agent) -> float:
    """When the name last listened or sent; s since 1970, 0 for never."""
    return max(number(agent.get("last_seen")), number(agent.get("sent")))


def number(value: Any) -> float:
    return float(value) if bus_recv.DECIMAL.fullmatch(str(value)) else 0.0


# The table


def name(agent: Agent, now: float) -> str:
    channel = "" if agent.get("channel") == "default" else f"{bus_recv.word(agent.get('channel'))}/"
    return f"{channel}{bus_recv.word(agent.get('name'))}"


def state(agent: Agent, now: float) -> str:
    if agent.get("online"):
        return "listening"
    listened, sent = number(agent.get("last_seen")), number(agent.get("sent"))
    return f"sent {ago(sent, now)}" if sent > listened else ago(listened, now) or "never"


def ago(place: Any, now: float) -> str:
    return bus_recv.span(now - number(place)) or "<1m" if number(place) else ""


def count(value: Any) -> str:
    return "-" if value is None else bus_recv.word(value)


def work(agent: Agent, member: str) -> str:
    figures = agent.get("work")
    return count(figures.get(member)) if isinstance(figures, dict) else ""


def doing(agent: Agent, now: float) -> str:
    """What an agent said of itself, and how long ago, at most DOING characters."""
    status = agent.get("status")
    if not isinstance(status, dict):
        return ""
    members = ("state", "text", "cwd", "branch")
    said = {member: bus_recv.word(status[member]) for member in members if status.get(member)}
    place = " ".join(said[member] for member in ("cwd", "branch") if member in said)
    since = " ".join(filter(None, [said.get("state"), ago(status.get("at"), now)]))
    text = ": ".join(filter(None, [since, said.get("text") or place]))
    return clipped(text, DOING)


def clipped(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: room - 1]}…"


DOING, LEAST = 40, 10  # characters, at most and at least

COLUMNS: dict[str, Callable[[Agent, float], str]] = {
    "NAME": name,
    "SEEN": state,
    "UNREAD": lambda agent, now: count(agent.get("unread")),
    "OLDEST": lambda agent, now: ago(agent.get("oldest"), now),
    "IN HAND": lambda agent, now: work(agent, "in_hand"),
    "DEAD": lambda agent, now: work(agent, "dead"),
    "DOING": doing,
}
WORDS = ("NAME", "SEEN", "DOING")  # columns of words; the others have figures


def table(found: Sequence[Agent], now: float, columns: int | None) -> Iterator[str]:
    """The lines of a table, at most `columns` wide if that is given. A column in which nothing stands is left out.

    So are the last ones, where the names need their room: up to half of the width.
    """
    rows = [list(COLUMNS), *([cell(agent, now) for cell in COLUMNS.values()] for agent in found)]
    filled = [column for column in zip(*rows) if any(column[1:]) or column[0] in ("NAME", "SEEN", "UNREAD")]
    widths = [max(map(len, column)) for column in filled]
    while columns and len(filled) > 3:
        room = columns - min(widths[0], columns // 2) - sum(widths[1:-1]) - 2 * len(widths[1:])  # for the last column
        if widths[-1] <= room:
            break
        if filled[-1][0] != "DOING" or room < LEAST:
            del filled[-1], widths[-1]
        else:
            filled[-1], widths[-1] = tuple(clipped(text, room) for text in filled[-1]), room
    if columns:
        widths[0] = max(min(widths[0], columns - sum(widths[1:]) - 2 * len(widths[1:])), 4)
    for first, *others in zip(*filled):
        texts = zip([column[0] for column in filled], [clipped(first, widths[0]), *others], widths)
        cells = [(str.ljust if name in WORDS else str.rjust)(text, width) for name, text, width in texts]
        yield "  ".join(cells).rstrip()


def nobody(url: str, channel: str | None, online: bool) -> str:
    """The sentence for a bus, or a channel, where no name was found; it says which channels there are."""
    there = sorted({bus_recv.word(agent.get("channel")) for agent in agents(url, None, False)[0]})
    if not there:
        return "nobody has listened or sent on this bus yet"
    if channel and channel not in there:
        return f"nobody has listened or sent on the channel {channel} yet; there is {', '.join(there)}"
    return f"nobody listens now{f' on the channel {channel}' * bool(channel)}"


def show(found: Sequence[Agent], now: float, as_json: bool, clear: bool, empty: Callable[[], str]) -> None:
    on_terminal, size = bool(sys.stdout and sys.stdout.isatty()), shutil.get_terminal_size()
    lines = list(table(found, now, size.columns if on_terminal else None))
    lines = [bus_recv.fitted(line).partition("\n")[0] for line in lines]  # what somebody says of itself may be wide
    if clear and on_terminal:  # what does not fit would push the beginning off the screen
        lines = [f"{CLEAR}{lines[0]}", *lines[1 : size.lines - 2]]
    listening = sum(bool(agent.get("online")) for agent in found)
    hidden = "; - means that the bus does not tell you" * any(agent.get("unread") is None for agent in found)
    legend = f"{listening} of {len(found)} listen, or did a moment ago. UNREAD leaves out mail to all{hidden}"
    lines.append(legend if found or as_json else empty())
    bus_recv.emit((bus_recv.dump(list(found)) if as_json else "\n".join(lines)) + "\n")


def complain(line: str) -> None:
    bus_recv.complain(line, "bus_who")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Show who is on an agent-bus, who listens, and how much mail waits.")
    parser.add_argument("--online", action="store_true", help="only names that listen now")
    parser.add_argument("--channel", metavar="C", help="only names on the channel C (every channel)")
    parser.add_argument("--json", action="store_true", help="print what the bus tells of each name, as JSON")
    parser.add_argument("--watch", action="store_true", help=f"show it again every {EVERY_SECONDS:.0f} s, until Ctrl-C")
    parser.add_argument("--bus", type=bus_recv.profile, metavar="PROFILE", help="the bus of PROFILE.env")
    options = parser.parse_args(argv)
    bus_recv.tell_people(complain)
    try:
        url = bus_recv.settings()["AGENT_BUS_URL"]
        while True:
            try:
                found = agents(url, options.channel, options.online)
                show(*found, options.json, options.watch, lambda: nobody(url, options.channel, options.online))
            except bus_recv.Unreachable as fault:
                if not options.watch:
                    raise
                complain(bus_recv.no_bus(url, fault, "; trying again"))
            if not options.watch:
                return 0
            time.sleep(EVERY_SECONDS)
    except bus_recv.FAULTS as fault:
        return bus_recv.ended(fault, "bus_who")


if __name__ == "__main__":
    sys.exit(main())
