#!/usr/bin/env python3
"""Show the messages of everybody on an agent-bus, as they pass. No reader notices it, and no mail is marked as read.

    AGENT_BUS_URL=http://10.0.0.5:8080 python3 tools/bus_log.py --since 1h
    python3 tools/bus_log.py --to dell,nano --from spark --no-follow
    python3 tools/bus_log.py --last 20 --short
    python3 tools/bus_log.py --json | jq .subject

It prints what `--since` or `--last` selects, then new messages; with `--no-follow` it ends there. `--short` prints one
line for each message. On a terminal each sender has a colour, unless NO_COLOR is set, and a short line ends where the
terminal does.

The parts of this file, in order: Observer (reads the log, keeps its place in memory), a message as people see it, the
outputs, main. bus_recv.Reader asks the bus and endures an outage, bus_recv.block makes the text of a message; so this
program needs bus_recv.py beside it or one folder up.

It takes the variables of bus_recv.py without AGENT_BUS_CHANNEL, and writes no file.
Exit code: 0 done, 1 refused by the bus, 2 usage, 75 out of reach, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any
from urllib.parse import urlencode

# Python 3.8 prints this text. Older ones show the line in a SyntaxError, because they do not know `:=`.
if sys.version_info < (3, 9) and (needs := "bus_log.py needs Python 3.9 or later"):  # noqa: UP036
    sys.exit(needs)
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path += [HERE, os.path.dirname(HERE)]  # the clients lie beside this file or one folder up, or are installed
sys.path.sort(key=lambda folder: folder.endswith("-packages"))  # else an older version that is installed wins
try:
    import bus_recv
except ModuleNotFoundError as missing:
    print(f"bus_log: {missing.name}.py is missing in {HERE}: run curl -fO $AGENT_BUS_URL/{missing.name}.py there",
          file=sys.stderr)  # fmt: skip
    sys.exit(2)


class Place(bus_recv.Cursor):
    """A cursor without a file."""

    def __init__(self, at: str) -> None:
        self.at = at

    def move(self, since: str) -> None:
        self.at = since


class Observer(bus_recv.Reader):
    """Reads everybody's messages and consumes none. The bus counts it as nobody, and its place is in memory.

    `filters` are those of GET /log. `since` is that of bus_recv.receive(), but not `last`: nobody's cursor is read.
    """

    def __init__(self, filters: dict[str, str | None], since: str) -> None:
        if since == "last":
            raise ValueError("since is 'last': an observer has no place of its own; give now, 1h, a time or an id")
        super().__init__(["nobody"], None, None, since, bus_recv.HOLD_SECONDS)
        for names in filter(None, filters.values()):
            for name in names.split(","):
                bus_recv.check_name(name)
        self.filters = {field: names for field, names in filters.items() if names}
        self.begin, self.places = since, dict[str, Place]()  # places: by the id of the bus

    def take_up(self, answer: dict[str, Any]) -> None:
        self.bus = str(answer.get("bus", bus_recv.OLD_CONTRACT))
        if self.bus == bus_recv.OLD_CONTRACT:
            bus_recv.ask(self.url, "/inbox", bus_recv.GRACE_SECONDS)  # a closed bus that does not know us refuses this
            recv = bus_recv.called("bus_recv.py", "recv")
            raise bus_recv.Refused(404, f"{self.url} is a bus of the first contract, which has no log: use {recv}")
        self.cursor = self.places.setdefault(self.bus, Place(bus_recv.moment(self.begin, self.bus_time)))

    def request(self, hold: float, seconds: float) -> tuple[dict[str, Any], float]:
        """One poll; see bus_recv.ask()."""
        query = {**self.filters, "since": self.cursor.at, "bus": self.bus}
        return bus_recv.ask(self.url, f"/log?block=true&wait={hold:.3f}&{urlencode(query)}", seconds)

    def once(self) -> dict[str, Any]:
        """An answer, without a wait. One fault ends this: the sentence says what to try."""
        try:
            return self.poll(0, bus_recv.GRACE_SECONDS)
        except bus_recv.Unreachable as fault:
            raise bus_recv.Unreachable(bus_recv.no_bus(self.url, fault)) from fault

    def pages(self) -> Iterator[dict[str, Any]]:
        """The messages that exist now. One fault ends this, so that half of the log never looks like all of it."""
        more = True
        while more:
            answer = self.once()
            yield answer
            self.cursor.move(str(answer["now"]))
            more = bool(answer.get("more"))

    def last(self, number: int) -> dict[str, Any]:
        """An answer with the newest messages, at most `number`. The place is behind them; `since` must be `now`.

        Only a bus with the extension `history` reads a log backwards. So look at the last second, then at eight times
        as much, until there are enough.
        """
        end, back = float(self.once()["now"]), 1
        told, self.announce = self.announce, lambda line: None  # of a gap in what is only looked through
        try:
            while True:
                kept, start = deque[Any](maxlen=number), max(end - back, 0)
                self.cursor.move(f"{start:.6f}")
                for answer in self.pages():
                    kept.extend(answer["messages"])
                if len(kept) == number or not start:
                    return {**answer, "messages": list(kept)}
                back *= 8
        finally:
            self.announce = told


# A message as people see it


def painted(text: str, name: Any) -> str:
    """The text in the colour of this name, if our output is a terminal whose user wants colours (no-color.org)."""
    if not is_terminal() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{31 + zlib.crc32(str(name).encode(errors='replace')) % 6}m{text}\x1b[0m"


def is_terminal() -> bool:
    return bool(sys.stdout and sys.stdout.isatty())


def whole(message: Any, now: float, reader: str = "") -> str:
    """All of the message as a block; see bus_recv.block()."""
    head, _, rest = bus_recv.block(message, reader, now, whole=True).partition("\n")
    if rest.endswith("---\n"):
        rest = f"{rest[:-4]}{given_up(message)}---\n"
    return f"{painted(head, message.get('from') if isinstance(message, dict) else '')}\n{rest}"


def given_up(message: Any) -> str:
    """Why a message in NAME.dead is there: a job that failed too often. Its sender may have written that, too."""
    if not str(message.get("to")).endswith(".dead") or not {"dead_of", "attempts", "reason"} <= {*message}:
        return ""
    job, attempts, reason = (bus_recv.word(message[member]) for member in ("dead_of", "attempts", "reason"))
    return bus_recv.fitted(f"-- the job {job} was given up after attempt {attempts}: {reason}\n")


def short(message: Any, now: float) -> str:
    """The message in one line: when, its id, from whom to whom, the subject, and the text as far as it fits."""
    with contextlib.suppress(Exception):  # whatever is wrong with a message, the next one must be shown
        when = time.strftime("%m-%d %H:%M:%SZ", time.gmtime(float(message["ts"])))
        head = f"{when} {bus_recv.word(message.get('id', '-'))}"
        via = f"{bus_recv.word(message['relayed_from'])} via " if message.get("relayed_from") else ""
        names = f"{via}{bus_recv.word(message['from'])} > {bus_recv.word(message.get('to', '-'))}:"
        subject = f"[{message['subject']}] " if message.get("subject") else ""
        text = bus_recv.visible(" ".join(f"{subject}{message['msg']}".split()))
        columns = shutil.get_terminal_size().columns
        if is_terminal() and columns < len(f"{head} {names} ") + LEAST:  # so that some text is left
            head = when[6:11]
            names = clipped(names, max(columns - len(head) - LEAST - 2, LEAST))
        row, _, more = bus_recv.fitted(f"{head} {names} {text}").partition("\n")
        return (f"{row[:-1]}…" if more else row).replace(names, painted(names, message["from"]), 1) + "\n"
    return bus_recv.block(None, "", now)  # it says that this is not a message


LEAST = 12  # characters of the text, on a narrow terminal


def clipped(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: room - 1]}…"


# The outputs. Each prints a message at once.


def noted(answers: Iterable[dict[str, Any]], quiet: list[Any]) -> Iterator[dict[str, Any]]:
    """The same answers. `quiet` tells a person that there is nothing to show; the first message empties it."""
    for answer in answers:
        if answer["messages"]:
            quiet.clear()
        yield answer


def show(observer: Observer, answers: Iterable[dict[str, Any]], text: Callable[[Any, float], str]) -> None:
    for answer in answers:
        bus_recv.emit("".join(text(message, observer.bus_time) for message in answer["messages"]))


def show_json(observer: Observer, answers: Iterable[dict[str, Any]]) -> None:
    for answer in answers:
        for message in answer["messages"]:
            bus_recv.emit(f"{bus_recv.dump(message)}\n")
            observer.cursor.pass_over(message)


def complain(line: str) -> None:
    bus_recv.complain(line, "bus_log")


def tell_filter(url: str) -> None:
    """Say that a token shows its own mail only. A bus without the extension `people` does not tell."""
    with contextlib.suppress(bus_recv.Refused, bus_recv.Unreachable):
        mine, _ = bus_recv.ask(url, "/whoami", bus_recv.GRACE_SECONDS) if bus_recv.credentials(url) else ({}, 0)
        if mine.get("operator") is False and not mine.get("open"):
            whose = bus_recv.word(mine.get("name"))
            complain(f"this is only what {whose} got or sent: the token is not that of an operator")


def meant(url: str, names: str, channel: str | None) -> str:
    """`; did you mean bob?` for those of these names (`a,b`) that the bus does not know, if it knows similar ones."""
    import difflib  # only for a typo

    similar: list[str] = []
    with contextlib.suppress(ModuleNotFoundError, bus_recv.Refused, bus_recv.Unreachable):  # it is only a hint
        import bus_who  # it knows who is there

        there = {str(agent.get("name")) for agent in bus_who.agents(url, channel, False)[0]}
        cases = {each.lower(): each for each in sorted(there)}
        for name in sorted({*names.split(",")} - {*there, "all"}):
            similar += [cases[near] for near in difflib.get_close_matches(name.lower(), cases)]
    return f"; did you mean {' or '.join(map(bus_recv.word, dict.fromkeys(similar)))}?" if similar else ""


def options_of(argv: Sequence[str] | None) -> argparse.Namespace:
    purpose = "Show the messages of everybody on an agent-bus, as they pass."
    filtered = "On a bus with tokens, only an operator sees all; another token shows what its name got or sent."
    parser = argparse.ArgumentParser(description=f"{purpose} {filtered}")
    add = parser.add_argument
    begin = parser.add_mutually_exclusive_group()
    since = "begin at X: 1h (ago), a time (2026-12-01T09:00Z), an id, now, or 0 for all"
    begin.add_argument("--since", metavar="X", default="0", help=since)
    begin.add_argument("--last", type=bus_recv.count, metavar="N", help="begin with the last N messages")
    add("--to", metavar="NAME", help="only messages for NAME; several as a,b,c")
    add("--from", dest="sender", metavar="NAME", help="only messages from NAME")
    add("--channel", metavar="C", help="only messages on the channel C (every channel)")
    add("--short", action="store_true", help="print each message in one line")
    add("--json", action="store_true", help="print each message as a line of JSON")
    add("--bus", type=bus_recv.profile, metavar="PROFILE", help="the bus in ~/.config/agent-bus/PROFILE.env")
    add("--no-follow", action="store_true", help="print the messages that exist now, and end")
    add("--timeout", type=bus_recv.duration, metavar="S", help="end after S seconds")
    add("--once", dest="no_follow", action="store_true", help=argparse.SUPPRESS)  # as bus_recv.py calls it
    add("--log", action="store_true", help=argparse.SUPPRESS)  # `bus_recv.py --log` runs us with its own arguments
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = options_of(argv)
    quiet: list[Any] = [complain] if sys.stderr and sys.stderr.isatty() else []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    bus_recv.tell_people(complain)
    try:
        filters = {"to": options.to, "from": options.sender, "channel": options.channel}
        observer = Observer(filters, options.since if options.last is None else "now")
        observer.warn = observer.announce = complain
        waiting = f"waiting for messages on {observer.url}, until Ctrl-C"
        if not options.no_follow:
            seconds, writes = bus_recv.SILENCE_SECONDS, bool(sys.stdout)
            observer.greet = lambda: bus_recv.later(seconds, bus_recv.settle_down, quiet, waiting, writes)
        tell_filter(observer.url)
        first = [] if options.last is None else [observer.last(options.last)]
        rest = observer.pages() if options.no_follow else observer.answers(False, options.timeout)
        answers = noted(chain(first, rest), quiet)
        if options.json:
            show_json(observer, answers)
        else:
            show(observer, answers, short if options.short else whole)
        if quiet:  # nothing was shown
            names = ",".join(filter(None, [options.to, options.sender]))
            similar = meant(observer.url, names, options.channel) if names else ""
            bus_recv.once(quiet, f"there are no such messages{similar}")
    except bus_recv.FAULTS as fault:
        return bus_recv.ended(fault, "bus_log")
    return 0


if __name__ == "__main__":
    sys.exit(main())
