#!/usr/bin/env python3
"""Look at the unread mail of a name on an agent-bus, and take none of it; or mark it as read.

    AGENT_BUS_URL=http://10.0.0.5:8080 python3 tools/bus_inbox.py look bob
    python3 tools/bus_inbox.py ack 660ba678a1b40 bob

`ack` marks that message, and every one before it, and says how many those were. A look moves no cursor, writes no file,
marks no message as fetched, and does not count as listening. An older bus does not know such a look (PROTOCOL.md,
`peek`): there, the messages that were shown count as fetched.

The parts of this file, in order: SharedCursor and Inbox, which the MCP server uses too; main. bus_recv.Reader asks the
bus, so this program needs bus_recv.py beside it or one folder up. It takes the variables of bus_recv.py, and
AGENT_NAME. Exit code: 0 done, 1 refused by the bus, 2 usage, 3 no mail, 75 out of reach, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import threading
from collections.abc import Sequence
from decimal import Decimal
from typing import Any
from urllib.parse import urlencode

# Python 3.8 prints this text. Older ones show the line in a SyntaxError, because they do not know `:=`.
if sys.version_info < (3, 9) and (needs := "bus_inbox.py needs Python 3.9 or later"):  # noqa: UP036
    sys.exit(needs)

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path += [HERE, os.path.dirname(HERE)]  # the clients lie beside this file or one folder up, or are installed
sys.path.sort(key=lambda folder: folder.endswith("-packages"))  # else an older version that is installed wins
try:
    import bus_recv
except ModuleNotFoundError as missing:
    print(f"bus_inbox: {missing.name}.py is missing in {HERE}: run curl -fO $AGENT_BUS_URL/{missing.name}.py there",
          file=sys.stderr)  # fmt: skip
    sys.exit(2)


class SharedCursor(bus_recv.Cursor):
    """The cursor's file without its lock, because other readers of the name may run. The cursor never goes back."""

    moving = threading.Lock()  # held while one of our threads moves a cursor

    def only_one(self, name: str) -> Any:
        """Nothing is locked; move() makes the folder."""

    def move(self, since: str) -> None:
        with self.moving:
            self.load()
            if since != "last" and (self.at == "last" or Decimal(self.at) < Decimal(since)):
                super().move(since)


class Glance(SharedCursor):
    """For a look that leaves nothing on the disk: how far it came is in memory."""

    def move(self, since: str) -> None:
        self.at = since


class Inbox(bus_recv.Reader):
    """The mail of a name above its cursor. All readers of the name share that cursor.

    A poll that peeks tells the bus nothing of us: neither that the name listens, nor its cursor. With `acks`, it tells
    the cursor alone.
    """

    def __init__(self, name: str, channel: str | None = None, peeks: bool = False) -> None:
        super().__init__([name], None, channel, None, bus_recv.HOLD_SECONDS)
        self.open_cursor, self.peeks, self.acks = SharedCursor, peeks, False

    def request(self, hold: float, seconds: float) -> tuple[dict[str, Any], float]:
        """One poll; see bus_recv.ask()."""
        if not self.peeks:
            return super().request(hold, seconds)
        query = {"to": ",".join(self.names), "channel": self.channel, "since": self.cursor.at, "bus": self.bus}
        return bus_recv.ask(self.url, f"/recv?{'ack' if self.acks else 'peek'}=true&{urlencode(query)}", seconds)

    def look(self, hold: float) -> tuple[list[dict[str, Any]], bool]:
        """The unread messages or, without any, the first that arrive within `hold` seconds; and: are there more?"""
        if self.bus:
            self.cursor.load()
        while True:
            answer = self.poll(hold, hold + bus_recv.GRACE_SECONDS)
            if not answer["messages"]:
                self.cursor.move(str(answer["now"]))
            if answer["messages"] or not answer.get("more"):  # else this page had only messages for others
                mail = filter(is_mail, answer["messages"])
                return [{**message, "age": self.age(message)} for message in mail], bool(answer.get("more"))

    def acknowledge(self, id: str) -> tuple[list[str], bool]:
        """Mark this message, and every one before it, as read. ValueError if it is not the id of a message for us.

        Returns the ids of the older ones that were unread until now, and: are there more?
        """
        mail, more = self.look(0)
        places = {label(message): str(message["ts"]) for message in mail}
        ts = places.get(id) or (self.further(id) if more else None)
        older = [other for other, its in places.items() if ts and float(its) < float(ts)]
        if ts and (older or id in places):
            self.cursor.move(ts)
            return older, more and len(older) == len(places)
        if not self.has_read(id):
            raise ValueError(f"{id} is not the id of an unread message for {self.names[0]}: take it from the inbox")
        self.check_is_ours(id)
        return [], False

    def check_is_ours(self, id: str) -> None:
        """ValueError if the bus has no such message, or has it no more, or has it for somebody else."""
        try:
            answer, _ = bus_recv.ask(self.url, f"/message/{id}", bus_recv.GRACE_SECONDS)
        except bus_recv.Refused as refused:
            if refused.status != 404:
                raise
            raise ValueError(f"there is no message {id} on this bus: take the id from the inbox") from None
        message = answer["message"] if isinstance(answer.get("message"), dict) else {}
        to, channel = message.get("to", self.names[0]), message.get("channel", self.channel)
        if to not in (*self.names, "all") or channel != self.channel:
            whose = bus_recv.word(to) + ("" if channel == self.channel else f" on the channel {bus_recv.word(channel)}")
            raise ValueError(f"{id} is mail for {whose}, not for {self.names[0]}: take the id from the inbox")

    def age(self, message: dict[str, Any]) -> str:
        """The age of a message, by the clock of the bus: old mail has another meaning."""
        return bus_recv.span(self.bus_time - float(message["ts"])) or "under 1m"

    def further(self, id: str) -> str | None:
        """The ts of this message, if it is mail for us; a look shows the oldest 100 of the unread ones only."""
        if not re.fullmatch("[0-9a-f]{1,16}", id):
            return None
        with contextlib.suppress(bus_recv.Refused):
            message: Any = bus_recv.ask(self.url, f"/message/{id}", bus_recv.GRACE_SECONDS)[0].get("message")
            if is_mail(message) and message.get("to") in (*self.names, "all"):
                return str(message["ts"]) if message.get("channel", self.channel) == self.channel else None
        return None

    def has_read(self, id: str) -> bool:
        """Is the message below the cursor as it is now? An id is the ts of its message, in microseconds and hex."""
        self.cursor.load()
        at = self.cursor.at
        return at != "last" and bool(re.fullmatch("[0-9a-f]{1,16}", id)) and int(id, 16) <= Decimal(at) * 1000000


def is_mail(message: Any) -> bool:
    """Is this a message, with a ts? A strange bus may send anything; without a ts it can be neither named nor read."""
    return isinstance(message, dict) and bool(bus_recv.DECIMAL.fullmatch(str(message.get("ts"))))


def label(message: dict[str, Any]) -> str:
    return str(message.get("id", message["ts"]))  # a bus of the old contract gives no id


def complain(line: str) -> None:
    bus_recv.complain(line, "bus_inbox")


def show(box: Inbox, as_json: bool) -> int:
    """Print the unread mail, and on stderr how to go on. The exit code."""
    import bus_log  # it knows how a message looks on a terminal

    mail, more = box.look(0)
    for message in mail:
        text = bus_log.whole(message, box.bus_time, box.names[0])
        bus_recv.emit(f"{bus_recv.dump(message)}\n" if as_json else text)
    if not mail:
        similar = bus_log.meant(box.url, box.names[0], box.channel)
        complain(f"nothing is unread for {box.names[0]}{on_channel(box)}{returned(box)}{similar}")
        return 3
    number, ack = f"{len(mail)}{' or more' if more else ''}", bus_recv.called("agent_bus.py ack", "ack")
    if its := queue_of(box):
        which, jobs = "the oldest of its messages" if more else "its messages", its["work"]
        complain(f"{box.names[0]} is a queue, and these are {which}. Of all, {its['unread']} wait for a worker, "
                 f"{jobs['in_hand']} are in hand, {jobs['dead']} were given up; the others are done")  # fmt: skip
        return 0
    whose = f"{label(mail[-1])} {place(box)}"
    complain(f"{number} unread for {box.names[0]}, oldest first; to mark these as read: {ack} {whose}")
    return 0


def place(box: Inbox) -> str:
    """The name, and the option that another command needs to reach it."""
    usual = bus_recv.settings().get("AGENT_BUS_CHANNEL", "default")
    return f"{box.names[0]}{'' if box.channel == usual else f' --channel {box.channel}'}"


def returned(box: Inbox) -> str:
    """What else the bus counts as unread when no mail is: jobs that were given back, which no look shows."""
    number = (queue_of(box) or {}).get("unread")
    if not isinstance(number, int) or number < 1:
        return ""
    jobs = f"{number} jobs wait" if number > 1 else "1 job waits"
    return f"; {jobs} for a worker ({bus_recv.called('agent_bus.py work', 'work')} {place(box)})"


def queue_of(box: Inbox) -> dict[str, Any] | None:
    """What /agents has of this name, if its mail is jobs: workers take these, and no cursor moves over them."""
    query = urlencode({"name": box.names[0], "channel": box.channel})
    with contextlib.suppress(bus_recv.Refused, bus_recv.Unreachable, LookupError, TypeError, AttributeError):
        agents = bus_recv.ask(box.url, f"/agents?{query}", bus_recv.GRACE_SECONDS)[0]["agents"]
        its = (agent for agent in agents if (agent["name"], agent["channel"]) == (box.names[0], box.channel))
        return next((agent for agent in its if {"in_hand", "dead"} <= {*agent["work"]} and "unread" in agent), None)
    return None


def with_it(box: Inbox, older: Sequence[str], more: bool) -> str:
    """What an `ack` has marked as read besides its message. A Monitor shows urgent mail first, so it may be unseen."""
    if not older:
        return "all earlier messages"
    number = f"{len(older)}{' or more' if more else ''} older unread message{'s' if more or older[1:] else ''}"
    channel = "" if box.channel == "default" else f" --channel {box.channel}"
    log = bus_recv.called("agent_bus.py log", "log")
    return f"{number} with it (to look: {log} --to {box.names[0]},all{channel} --since {older[0]} --no-follow)"


def on_channel(box: Inbox) -> str:
    """Which channel that is, if it is not the usual one; and which there are, if nobody is on it."""
    if box.channel == "default":
        return ""
    import bus_who  # it knows who is where

    with contextlib.suppress(bus_recv.Refused, bus_recv.Unreachable):  # it is only a hint
        there = sorted({bus_recv.word(agent.get("channel")) for agent in bus_who.agents(box.url, None, False)[0]})
        if there and box.channel not in there:
            return f" on the channel {box.channel}, where nobody is: there is {', '.join(there)}"
    return f" on the channel {box.channel}"


def command_line(argv: Sequence[str] | None) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """The arguments, and the parser of the command that they are of."""
    parser = argparse.ArgumentParser(description="Look at unread mail and take none of it, or mark it as read.")
    commands = parser.add_subparsers(dest="command", required=True)
    own = parser.prog if " " in parser.prog else None  # `agent-bus inbox` and `agent-bus ack` are whole names
    purposes = "print the unread messages of NAME, oldest first", "mark a message, and every one before it, as read"
    looking, marking = (
        commands.add_parser(word, prog=own, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.")
        for word, purpose in zip(("look", "ack"), purposes)
    )
    looking.add_argument("--json", action="store_true", help="print each message as a line of JSON")
    marking.add_argument("id", metavar="ID", help="the id of the last message that is done with")
    for command in (looking, marking):
        command.add_argument("name", metavar="NAME", nargs="?", help="whose mail ($AGENT_NAME)")
        command.add_argument("--channel", metavar="C", help="the channel ($AGENT_BUS_CHANNEL, or 'default')")
        command.add_argument("--bus", type=bus_recv.profile, metavar="PROFILE", help="the bus of PROFILE.env")
    options, unknown = parser.parse_known_args(argv)
    command = {"look": looking, "ack": marking}[options.command]
    if unknown:
        command.error(f"unrecognized arguments: {' '.join(unknown)}")
    return options, command


def main(argv: Sequence[str] | None = None) -> int:
    options, command = command_line(argv)
    bus_recv.tell_people(complain)
    try:
        name = options.name or bus_recv.settings().get("AGENT_NAME")
        if not name:
            after = " after the ID" if options.command == "ack" else ""
            command.error(f"whose mail? Give NAME{after} or set AGENT_NAME{bus_recv.unused_file()}")
        box = Inbox(name, options.channel, peeks=True)
        box.warn = box.announce = complain
        if options.command == "look":
            box.open_cursor = Glance
            return show(box, options.json)
        also = with_it(box, *box.acknowledge(options.id))
        box.acks = True
        left, more = box.look(0)  # presents the cursor: now the bus knows, too
        rest = f"{len(left)}{' or more' if more else ''} unread{'' if left else returned(box)}"
        complain(f"{options.id} is read, and {also}; {rest}")
    except bus_recv.FAULTS as fault:
        return bus_recv.ended(fault, "bus_inbox")
    return 0


if __name__ == "__main__":
    sys.exit(main())
