#!/usr/bin/env python3
"""Find messages on an agent-bus by their words, the newest first. No reader notices it, and no mail is marked as read.

    AGENT_BUS_URL=http://10.0.0.5:8080 python3 tools/bus_search.py disk full
    python3 tools/bus_search.py '"disk is full"' --from spark --since 2d
    python3 tools/bus_search.py T1 --json --max 1000 | jq .subject

It finds the messages that you may read and that have all of the words, in any case; words in quotes are a phrase.
`--all` goes on until there are no more. The bus makes an index for it (PROTOCOL.md, "Search"); an operator has it made
anew with `--rebuild`.

bus_recv.ask asks the bus, and bus_log makes the text of a message. So this program needs bus_log.py beside it, and
bus_recv.py there or one folder up. It takes the variables of bus_recv.py, and writes no file.
Exit code: 0 found, 1 refused by the bus, 2 usage, 3 nothing found, 75 out of reach, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlencode

# Python 3.8 prints this text. Older ones show the line in a SyntaxError, because they do not know `:=`.
if sys.version_info < (3, 9) and (needs := "bus_search.py needs Python 3.9 or later"):  # noqa: UP036
    sys.exit(needs)

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path += [HERE, os.path.dirname(HERE)]  # the clients lie beside this file or one folder up, or are installed
sys.path.sort(key=lambda folder: folder.endswith("-packages"))  # else an older version that is installed wins
try:
    import bus_recv
except ModuleNotFoundError as missing:
    print(f"bus_search: {missing.name}.py is missing in {HERE}: run curl -fO $AGENT_BUS_URL/{missing.name}.py there",
          file=sys.stderr)  # fmt: skip
    sys.exit(2)

SECONDS = 60.0  # the first search on a large bus may wait for the index
Page = tuple[list[dict[str, Any]], float, "str | None"]  # messages, the clock of the bus, and the `before` of the next


def pages(url: str, query: dict[str, Any]) -> Iterator[Page]:
    """The answers, one after the other. Raises as bus_recv.ask() does."""
    before: str | None = "now"
    while before:
        answer, now = bus_recv.ask(url, f"/search?{urlencode({**query, 'before': before})}", SECONDS)
        messages, following = answer.get("messages"), answer.get("next")
        if not isinstance(messages, list):
            raise bus_recv.Unreachable()
        before = str(following) if following and str(following) != before else None  # else it is asked for ever
        yield messages, now, before


def show(found: Iterator[Page], wanted: int, goes_on: bool, text: Any) -> int:
    """Print up to `wanted` messages, or all; then say on stderr how to go on. The exit code."""
    number, more = 0, False
    for messages, now, before in found:
        some = messages if goes_on else messages[: wanted - number]
        for message in some:
            bus_recv.emit(text(message, now))
        number += len(some)
        more = bool(before) or len(some) < len(messages)
        if number >= wanted and not goes_on:
            break
    if more:
        complain(f"{number} found, the newest first; there may be more: --all shows all of them")
    elif not number:
        complain("no message that you may read has these words")
    return 0 if number else 3


def query_of(options: argparse.Namespace, url: str) -> dict[str, Any]:
    """The query of /search. ValueError if an option is none."""
    query = {"q": " ".join(options.words), "to": options.to, "from": options.sender, "channel": options.channel,
             "thread": options.thread, "max": min(options.max, 1000)}  # fmt: skip
    for names in filter(None, (options.to, options.sender, options.channel)):
        for name in names.split(","):
            bus_recv.check_name(name)
    if options.since:
        _, now = bus_recv.ask(url, "/healthz", bus_recv.GRACE_SECONDS)
        query["since"] = bus_recv.moment(options.since, now)
    return {field: value for field, value in query.items() if value}


def complain(line: str) -> None:
    bus_recv.complain(line, "bus_search")


def rebuild(url: str) -> int:
    bus_recv.ask(url, "/search", SECONDS, {})
    complain("the bus makes its index anew; the next searches may find only the newest messages")
    return 0


def options_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Find messages on an agent-bus by their words, the newest first.")
    add = parser.add_argument
    add("words", nargs="*", metavar="WORDS", help="""all of these words; '"in quotes"': a phrase""")
    add("--from", dest="sender", metavar="NAME", help="only messages from NAME")
    add("--to", metavar="NAME", help="only messages for NAME; several as a,b,c")
    add("--channel", metavar="C", help="only messages on the channel C (every channel)")
    add("--thread", metavar="ID", help="only the conversation that the message ID began")
    add("--since", metavar="X", help="only messages after X: 2d (ago), a time (2026-12-01T09:00Z), or an id")
    add("--max", type=bus_recv.count, default=20, metavar="N", help="at most N messages (%(default)s)")
    add("--all", action="store_true", help="all messages, however many")
    add("--short", action="store_true", help="print each message in one line")
    add("--json", action="store_true", help="print each message as a line of JSON")
    add("--rebuild", action="store_true", help="have the bus make its index anew; for an operator")
    add("--bus", type=bus_recv.profile, metavar="PROFILE", help="the bus of PROFILE.env")
    options = parser.parse_args(argv)
    if options.rebuild == bool(options.words):
        parser.error("give the WORDS to look for" if not options.rebuild else "--rebuild looks for no WORDS: omit them")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = options_of(argv)
    bus_recv.tell_people(complain)
    try:
        url = bus_recv.settings()["AGENT_BUS_URL"]
        if options.rebuild:
            return rebuild(url)
        import bus_log  # it knows how a message looks on a terminal

        text = bus_log.short if options.short else bus_log.whole
        as_json = options.json and (lambda message, _: f"{bus_recv.dump(message)}\n")
        return show(pages(url, query_of(options, url)), options.max, options.all, as_json or text)
    except bus_recv.FAULTS as fault:
        return bus_recv.ended(fault, "bus_search")


if __name__ == "__main__":
    sys.exit(main())
