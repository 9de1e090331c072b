#!/usr/bin/env python3
"""Pass the mail for some names on from one agent-bus to another: for two networks that cannot reach each other.

    python3 tools/bus_relay.py bob --bus home --to-bus work
    python3 tools/bus_relay.py alice --bus work --to-bus home

It runs on a machine that reaches both buses, which are the profiles home.env and work.env. The first line is for the
mail to bob, who reads on the bus of work; the second is for his answers to alice. `--once` passes on what waits.

The parts of this file, in order: at (which profile is used); Other (the bus that the mail goes to); Relay (reads one
bus, stores each message on the other); main. bus_recv.Reader reads, bus_send.send sends; so this program needs both
files beside it or one folder up. docs/deploy.md (Two networks) says what becomes of a message.

Each message is stored once and in order, also if this program is killed or an answer is lost: the cursor moves when the
other bus has stored the message, and the key of a message is made of its id, its bus and its content. The order is kept
by waiting: while the other bus is away, or says 429 or 503, nothing else is passed on, and the rest stays on the first
bus. What the other bus refuses for good, or with 429 for 15 minutes, is appended to a file, and its sender is told.

It takes the variables of bus_recv.py, without AGENT_NAME and all that names a bus: these are in the two profiles. Its
cursor and that file are in the folder relay/PROFILE of AGENT_BUS_STATE_DIR.
Exit code: 0 stopped by SIGTERM, or --once is done; 1 one of the buses refuses us, 2 usage or no place for the cursor, 3
nothing came, 75 only with --once: a bus is out of reach; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from typing import Any
from urllib.parse import quote, urlencode

# Python 3.8 prints this text. Older ones show the line in a SyntaxError, because they do not know `:=`.
if sys.version_info < (3, 9) and (needs := "bus_relay.py needs Python 3.9 or later"):  # noqa: UP036
    sys.exit(needs)
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path += [HERE, os.path.dirname(HERE)]  # the clients lie beside this file or one folder up, or are installed
sys.path.sort(key=lambda folder: folder.endswith("-packages"))  # else an older version that is installed wins
try:
    import bus_recv
    import bus_send
except ModuleNotFoundError as missing:
    print(f"bus_relay: {missing.name}.py is missing in {HERE}: run curl -fO $AGENT_BUS_URL/{missing.name}.py there",
          file=sys.stderr)  # fmt: skip
    sys.exit(2)

PATIENCE = 5.0  # s to tell a sender that its message was refused: the next messages wait for it
OURS = {401, 403, 404, 405}  # the fault is ours (our token, our name, the URL), not the message's
STORED_BEFORE = 409  # our key is there: with another ttl, before we were killed; or the message came another way
STILL_FULL = 900.0  # s of 429 for one receiver; all others wait meanwhile. Turns are counted for less: 10 minutes
DEAD_BYTES = 16 << 20  # of the file of refused messages; there are two of them at most
REFUSES, AWAY = (bus_recv.Refused, bus_send.Refused), (bus_recv.Unreachable, bus_send.Unreachable)
NO_KEYS = "it is a bus of the first contract, which has no keys: a relay needs a newer bus there"
REFUSED = "undeliverable"  # the type of what we send to the sender of a refused message
ID = re.compile("[0-9a-f]{1,16}")
# Who sent a message, and the relays that it came by; so much of a field each program shows.
CHAIN, SHOWN = re.compile("[A-Za-z0-9][A-Za-z0-9._:@-]*( via [A-Za-z0-9][A-Za-z0-9._:@-]*)*"), 100
NEW = {"ts", "id", "from", "to", "channel", "msg", "key", "ttl", "reply_to", "via"}  # members that are not just copied


@contextlib.contextmanager
def at(profile: str) -> Iterator[str]:
    """In here the clients have the configuration of this profile. ArgumentTypeError if the environment has a bus."""
    before = os.environ.get("AGENT_BUS_PROFILE")
    try:
        yield bus_recv.profile(profile)
    finally:
        os.environ.pop("AGENT_BUS_PROFILE", None)
        os.environ.update({} if before is None else {"AGENT_BUS_PROFILE": before})


def to_bus(name: str) -> str:
    """The value of --to-bus."""
    with at(name):
        return name


class Other:
    """The bus that the messages go to. It is asked until it answers, so that no message overtakes another.

    `end` is the time of time.monotonic() at which it is given up.
    """

    def __init__(self, profile: str, end: float) -> None:
        self.profile, self.end = profile, end
        with at(profile):
            self.url = bus_send.settings()["AGENT_BUS_URL"]
            bus_send.urls_of(self.url)
            self.signs = bool(bus_send.credentials(self.url))  # a token sends under its own name only

    def id(self) -> str:
        """The id of the bus. It is asked each time, because a bus that was restored has a new one."""
        health = self.ask("/healthz")
        if "bus" not in health:
            self.ask("/inbox")  # a closed bus that does not know us refuses this
            raise bus_send.Refused(404, NO_KEYS)
        return str(health["bus"])

    def ask(self, path: str) -> dict[str, Any]:
        return self.persist(lambda: dict(bus_send.exchange(self.url, path, None, bus_send.GRACE_SECONDS)[0]))

    def persist(self, attempt: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The first answer. Raises bus_send.Refused; bus_send.Unreachable when we have no time left."""
        failures, reason = 0, ""
        while True:
            try:
                with at(self.profile):
                    answer = attempt()
                if failures:
                    complain(f"{self.url}: connected again")
                return answer
            except bus_send.Unreachable as fault:
                failures += 1
                pause = max(bus_send.pause_after(failures) * random.uniform(0.5, 1), min(fault.retry_after, STILL_FULL))
                if time.monotonic() + pause >= self.end:
                    raise bus_send.Unreachable(bus_send.no_bus(self.url, fault)) from fault
                if str(fault) != reason:
                    reason = str(fault)
                    complain(bus_send.no_bus(self.url, fault, "; trying again"))
            time.sleep(pause)


class Relay(bus_recv.Reader):
    """Reads the mail for `names` on one bus, and stores each message on the `other` one.

    It listens as the first name, so that who sends to it learns whether the relay works. A message to everyone is
    passed on only if `all` is one of the names.
    """

    def __init__(self, names: Sequence[str], channel: str | None, since: str | None, other: Other) -> None:
        super().__init__(names, None, channel, since)
        self.other = other
        self.passed = 0  # so many messages the other bus has stored
        self.waits: dict[str, float] = {}  # receivers for whom the last answer was 429, and until when it is endured

    def take_up(self, answer: dict[str, Any]) -> None:
        bus = str(answer.get("bus", bus_recv.OLD_CONTRACT))
        if bus == bus_recv.OLD_CONTRACT:
            bus_recv.ask(self.url, "/inbox", bus_recv.GRACE_SECONDS)  # a closed bus that does not know us refuses this
            raise bus_recv.Refused(404, NO_KEYS)
        if bus == self.other.id():
            raise ValueError(f"{self.url} and {self.other.url} are the same bus: give two")
        super().take_up(answer)
        if self.cursor.at == "last" and len(self.names) > 1:
            self.cursor.at = min(map(self.beginning, self.names), key=Decimal)

    def beginning(self, name: str) -> str:
        """Where the unread mail of a name begins. The bus takes `last` as that of the first name alone."""
        query = {"to": name, "channel": self.channel, "since": "last", "max": 1, "bus": self.bus}
        answer, _ = bus_recv.ask(self.url, f"/recv?peek=true&{urlencode(query)}", bus_recv.GRACE_SECONDS)
        first = [Decimal(message["ts"]) - Decimal("0.000001") for message in answer["messages"]]
        return str(first[0] if first else answer["now"])

    def relay(self, answers: Iterator[dict[str, Any]], once: bool) -> None:
        """Pass on the messages of these answers, until they end; or `once`, until no more wait."""
        for answer in answers:
            self.answered = time.monotonic()
            for message in answer["messages"]:
                if not isinstance(message, dict) or not {"id", "from", "to", "msg"} <= message.keys():
                    self.warn(f"{self.url} has sent something that is not a message: {bus_recv.dump(message)}")
                elif message["to"] in self.names:
                    self.pass_on(message)
                self.cursor.pass_over(message)
            if once and not answer["more"]:
                self.cursor.move(str(answer["now"]))
                return

    def pass_on(self, message: dict[str, Any]) -> None:
        """When this returns, the other bus has the message, or had it before, or has refused it for good."""
        via = hops(message)
        if via and self.other.id() in [hop.get("bus") for hop in via]:
            return
        to, reply_to = self.addressed(message)
        try:
            answer = self.other.persist(lambda: self.store(message, to, reply_to))
            self.passed += 1
            if "warning" in answer:
                self.warn(f"{self.other.url}: {answer['warning']}")
        except bus_send.Refused as refused:
            if refused.status in OURS:
                raise
            if refused.status != STORED_BEFORE:
                self.put_aside(message, str(refused))

    def store(self, message: dict[str, Any], to: str, reply_to: str | None) -> dict[str, Any]:
        """One attempt to store a message on the other bus. Raises as send(); Refused for a 429 that lasts.

        A reply that gets 429 is sent once more without `reply_to`: its chain may be too long there, for weeks.
        """
        try:
            answer = self.send(message, to, reply_to)
        except bus_send.Unreachable as fault:
            reason = told_to_wait(fault)
            if str(fault).startswith("413: "):  # of a proxy: the bus says it in JSON
                raise bus_send.Refused(413, f"a proxy on the way takes no message so large ({fault})") from fault
            if reason and reply_to:
                return self.store(message, to, None)
            if not reason:
                self.waits.pop(to, None)
            elif time.monotonic() >= self.waits.setdefault(to, time.monotonic() + STILL_FULL):
                raise bus_send.Refused(429, reason) from fault
            raise
        self.waits.pop(to, None)
        return answer

    def send(self, message: dict[str, Any], to: str, reply_to: str | None) -> dict[str, Any]:
        """One request that stores a message on the other bus. bus_send.send() would go on with the same `ttl`."""
        hop = {"bus": self.bus, "id": message["id"], "from": message["from"]}
        if "reply_to" in message and not reply_to:
            hop["reply_to"] = message["reply_to"]
        sender, via = message["from"], message.get("via", [])
        fields = {field: value for field, value in message.items() if field not in NEW}
        fields["via"] = [*(via if isinstance(via, list) else [via]), hop]
        if self.other.signs:
            fields["relayed_from"], sender = relayed_from(message), None
        fields = json.loads(bus_recv.dump(fields))  # no Decimal, which json.dumps() does not take
        left = None if message.get("ttl") is None else self.time_left(message)
        given = {"sender": sender, "channel": self.channel, "key": self.key(message), "reply_to": reply_to, "ttl": left}
        url, copy = bus_send.compose(to, message["msg"], url=self.other.url, fields=fields, **given)
        return bus_send.post(url, copy, bus_send.GRACE_SECONDS)

    def key(self, message: dict[str, Any]) -> str:
        """The same on each way to a bus: the id that the message had first, and a hash of its first bus and content.

        Without the content, whoever writes the `via` of another message could take its key. No relay brings a message
        back to a bus that it came by: who names our bus in `via` may have guessed the id of a message that comes later.
        """
        first = [hop for hop in hops(message)[:1] if ID.fullmatch(str(hop.get("id"))) and hop.get("bus") != self.bus]
        number, bus = (first[0]["id"], first[0].get("bus")) if first else (message["id"], self.bus)
        content = {field: value for field, value in message.items() if field not in NEW or field == "msg"}
        content.pop("relayed_from", None)
        text = json.dumps(json.loads(bus_recv.dump([bus, content])), sort_keys=True)
        return f"{number}-{hashlib.sha256(text.encode()).hexdigest()}"

    def time_left(self, message: dict[str, Any]) -> float:
        """Seconds until the message expires, by the clock of our bus. Refused if it has."""
        now = self.bus_time + time.monotonic() - self.answered
        left = round(float(message["ts"]) + float(message["ttl"]) - now, 3)
        if left <= 0:
            raise bus_send.Refused(410, "its ttl was over before it could be passed on")
        return left

    def addressed(self, message: dict[str, Any]) -> tuple[str, str | None]:
        """For whom a message is on the other bus, and which message it answers there.

        If it answers a message that came from the other bus, `via` of that message says both.
        """
        to = str(message["to"])
        if "reply_to" in message:
            question = self.message(str(message["reply_to"]))
            for hop in hops(question):
                if hop.get("bus") == self.other.id() and isinstance(hop.get("id"), str):
                    return str(hop.get("from", to)) if to == question.get("from") else to, hop["id"]
        return to, None

    def message(self, number: str) -> dict[str, Any]:
        """The message with this id on our bus; an empty one if it is gone or not for us, or if that is no id."""
        while ID.fullmatch(number):
            try:
                answer, _ = bus_recv.ask(self.url, f"/message/{quote(number, safe='')}", bus_recv.GRACE_SECONDS)
                return dict(answer["message"])
            except bus_recv.Refused:
                return {}
            except bus_recv.Unreachable as fault:
                if time.monotonic() >= self.other.end:
                    raise
                self.endure(fault, 0, self.other.end - time.monotonic())
        return {}

    def put_aside(self, message: dict[str, Any], reason: str) -> None:
        """Keep a message that the other bus does not take, and tell its sender."""
        path, number, to = f"{self.cursor.path}~dead", message["id"], message["to"]
        self.make_room(path)
        bus_recv.append(path, f"{bus_recv.dump({**message, 'reason': reason})}\n")
        self.warn(f"{number} from {message['from']} to {to} is not passed on, and is in {path} now: {reason}")
        if message.get("type") == REFUSED:
            return
        own = bus_send.settings().get("AGENT_NAME") or (None if bus_send.credentials(self.url) else "relay")
        text = f"Your message {number} to {to} could not be passed on to the bus where {to} is: {reason}"
        try:
            bus_send.send(message["from"], text, patience=PATIENCE, url=self.url, sender=own, reply_to=number,
                          channel=self.channel, type=REFUSED, key=f"{number}-{REFUSED}")  # fmt: skip
        except (bus_send.Refused, bus_send.Unreachable) as fault:
            self.warn(f"its sender was not told: {fault}")

    def make_room(self, path: str) -> None:
        """Begin a new file of refused messages when this one is full. It replaces the one that was full before."""
        if not os.path.exists(path) or os.path.getsize(path) < DEAD_BYTES:
            return
        old = f"{path}~old"
        if os.path.exists(old):
            with open(old, "rb") as file:
                lost = sum(1 for _ in file)
            self.warn(f"{path} is full, so the oldest {lost} messages that were not passed on, in {old}, are removed")
        os.replace(path, old)


def hops(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The buses that a message has come by, the first one first. Anybody may send a message with a strange `via`."""
    via = message.get("via")
    return [hop for hop in via if isinstance(hop, dict)] if isinstance(via, list) else []


def relayed_from(message: dict[str, Any]) -> str:
    """Who sent a message; before that, what the message says of earlier relays.

    Anybody can write that. So it is left out if it could look like anything else, or push its sender out of sight.
    """
    sender, before = str(message["from"]), message.get("relayed_from")
    whole = f"{before} via {sender}"
    return whole if isinstance(before, str) and CHAIN.fullmatch(whole) and len(whole) <= SHOWN else sender


def told_to_wait(fault: bus_send.Unreachable) -> str:
    """The reason of a 429 of the bus itself. Empty for other faults, and for a 429 of a proxy: that is for any mail."""
    found = re.fullmatch(r"429: (?!a web page, not a bus|not from a bus)(.*)", str(fault), re.DOTALL)
    return found[1] if found else ""


def complain(line: str) -> None:
    bus_recv.complain(line, "bus_relay")


def is_seen() -> bool:
    """Does a person see what we say?"""
    return bool(sys.stderr and sys.stderr.isatty())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Pass the mail for NAME on from one agent-bus to another.")
    add = parser.add_argument
    add("names", nargs="+", metavar="NAME", help="whose mail is passed on; `all`: the messages to everyone")
    add("--bus", type=bus_recv.profile, metavar="PROFILE", help="read on the bus in ~/.config/agent-bus/PROFILE.env")
    add("--to-bus", type=to_bus, required=True, metavar="PROFILE", help="send to the bus in PROFILE.env there")
    since = "go on from X, also next time: 1h (ago), a time (2026-12-01T09:00Z), an id, now, last (saved place)"
    add("--since", metavar="X", help=since)
    add("--channel", metavar="C", help="the channel ($AGENT_BUS_CHANNEL, or 'default')")
    add("--once", action="store_true", help="pass on what waits, and end")
    options = parser.parse_args(argv)
    for number in bus_recv.ENDS:
        signal.signal(number, lambda *_: sys.exit(0))
    for client in (bus_recv, bus_send):
        client.tell_people(complain)
    os.environ.pop("AGENT_NAME", None)  # it would be our name on both buses
    seconds = bus_recv.HOLD_SECONDS if options.once else None
    try:
        other = Other(options.to_bus, time.monotonic() + seconds if seconds else float("inf"))
        own = os.path.join(bus_recv.state_directory(), "relay", bus_recv.file_name(options.to_bus))
        os.environ["AGENT_BUS_STATE_DIR"] = own  # a cursor of our own, whoever reads as this name on this machine
        relay = Relay(",".join(options.names).split(","), options.channel, options.since, other)
        relay.warn = relay.announce = complain
        relay.hold = 0.0 if options.once else relay.hold
        way = f"the mail for {', '.join(relay.names)} on from {relay.url} to {other.url}"
        if not options.once and is_seen():
            relay.greet = lambda: complain(f"passing {way}")
        with contextlib.closing(relay):
            relay.relay(relay.answers(options.once, seconds), options.once)
        if options.once and is_seen():
            complain(f"passed {way}: {relay.passed} message{'s' * (relay.passed != 1)}")
    except KeyboardInterrupt:
        return 130
    except (*REFUSES, *AWAY, bus_recv.Busy, ValueError, OSError) as error:
        bus = other if isinstance(error, bus_send.Refused) else relay if isinstance(error, bus_recv.Refused) else None
        complain(f"{bus.url}: {error}" if bus else str(error))
        return 1 if isinstance(error, REFUSES) else 75 if isinstance(error, AWAY) else 2
    return 0 if relay.came else 3


if __name__ == "__main__":
    sys.exit(main())
