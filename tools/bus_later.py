#!/usr/bin/env python3
"""Send a message later, once or again and again; list what waits to be sent; take it back.

    AGENT_BUS_URL=http://10.0.0.5:8080 AGENT_NAME=ann python3 tools/bus_later.py bob 'Is T1 done?' --after 1h
    python3 tools/bus_later.py bob 'Status, please' --cron '0 9 * * 1-5'
    python3 tools/bus_later.py --list
    python3 tools/bus_later.py --cancel 5970df518cebaf17

The bus keeps the message and sends it, so this program need not run then. A cron line is in UTC. `--list` prints a line
for each message that waits, or that could not be sent, with the reason; it shows those of $AGENT_NAME, or of --from.

bus_send.py has the options of the message, so this program needs it and bus_recv.py beside it or one folder up. It has
the environment of bus_send.py, and writes no file. Exit code: 0 done, 1 refused by the bus, 2 usage, 75 out of reach,
130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import math
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlencode

# Python 3.8 prints this text. Older ones show the line in a SyntaxError, because they do not know `:=`.
if sys.version_info < (3, 9) and (needs := "bus_later.py needs Python 3.9 or later"):  # noqa: UP036
    sys.exit(needs)

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path += [HERE, os.path.dirname(HERE)]  # the clients lie beside this file or one folder up, or are installed
sys.path.sort(key=lambda folder: folder.endswith("-packages"))  # else an older version that is installed wins
try:
    import bus_recv
    import bus_send
except ModuleNotFoundError as missing:
    print(f"bus_later: {missing.name}.py is missing in {HERE}: run curl -fO $AGENT_BUS_URL/{missing.name}.py there",
          file=sys.stderr)  # fmt: skip
    sys.exit(2)

PATIENCE = 30.0  # s in which the bus is asked again


def ask(url: str, path: str, order: dict[str, Any] | None = None) -> tuple[dict[str, Any], float]:
    """The bus's answer, and its clock (s since 1970). It is asked again, as that does no harm: a schedule has a key."""

    body = None if order is None else bus_send.body_of(order)

    def attempt(left: float) -> Any:
        limit = min(left if order else math.inf, bus_send.GRACE_SECONDS)
        answer, headers = bus_send.exchange(url, path, body, limit)
        return {"answer": answer, "clock": bus_recv.clock_of(headers)}

    patience = PATIENCE if order else 0.0  # who only looks is told after one attempt
    found = bus_send.persist(attempt, patience, url, warn=complain)
    return found["answer"], found["clock"]


def schedules(url: str, sender: str | None) -> Iterator[dict[str, Any]]:
    query = {"from": sender} if sender else {}
    while True:
        answer, _ = ask(url, f"/later?{urlencode(query)}")
        page = answer.get("schedules")
        if not isinstance(page, list) or not all(isinstance(each, dict) for each in page):
            raise bus_send.Unreachable()
        yield from page
        if not answer.get("more") or answer.get("next") in (None, query.get("after")):  # else it is asked for ever
            return
        query["after"] = str(answer["next"])


def line_of(schedule: dict[str, Any]) -> str:
    message = schedule["message"] if isinstance(schedule.get("message"), dict) else {}
    known = {**schedule, **message, "msg": str(message.get("msg", ""))[:SHOWN]}
    words = [f"{field}={bus_recv.word(known[field])}" for field in FIELDS if known.get(field)]
    at = bus_recv.iso(bus_recv.seconds_of(schedule.get("at")))
    return " ".join([bus_recv.word(schedule.get("state")), at, *words])


FIELDS = ("id", "from", "to", "cron", "reason", "msg")  # in a line of the list
SHOWN = 60  # characters of a message there


def moment(text: str) -> float:
    """Seconds since 1970, from such a number or from a date and time; without Z or an offset it is local time."""
    if bus_recv.DECIMAL.fullmatch(text):
        return float(text)
    try:
        return datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    except ValueError:
        why = f"{text!r} is not a time like 2026-12-01T09:00, 2026-12-01T09:00Z or 1795203596"
        raise argparse.ArgumentTypeError(why) from None


def give(given: dict[str, Any], when: dict[str, Any], as_json: bool) -> None:
    draft = bus_send.compose(given["to"], "", sender=given["sender"], channel=given["channel"])[1]
    to = [draft["to"]] if isinstance(draft["to"], str) else draft["to"]
    for name in [draft[member] for member in ("from", "channel") if member in draft] + to:  # before a text is typed
        bus_recv.check_name(name)
    msg = bus_send.message_of(given)
    url, message = bus_send.compose(given.pop("to"), msg, **given)
    key = message.pop("key")
    answer, now = ask(url, "/later", {**when, "key": key, "message": message})
    said = bus_recv.dump(answer)
    if not as_json and sys.stdout and sys.stdout.isatty():
        at = bus_recv.seconds_of(answer.get("at"))
        then = f"it will be sent at {bus_recv.iso(at)}; its id for --cancel is {bus_recv.word(answer.get('id'))}"
        said = f"it is sent at once, because {bus_recv.iso(at)} is over" if at < now else then
    with contextlib.suppress(OSError):  # if nobody reads our output, the message is on the bus all the same
        bus_recv.emit(f"{said}\n")


def complain(line: str) -> None:
    bus_recv.complain(line, "bus_later")


def command_line() -> argparse.ArgumentParser:
    parser = bus_send.command_line("Send TEXT, or the text on stdin, later; list such messages, or take one back.")
    when = parser.add_mutually_exclusive_group()
    when.add_argument("--after", type=bus_send.duration, metavar="TIME", help="send it after TIME: 90s, 5m, 1h, 3d")
    when.add_argument(
        "--at", type=moment, metavar="TIME", help="send it then: 2026-12-01T09:00 is local time, Z is UTC"
    )
    when.add_argument("--cron", metavar="LINE", help="send it at each of these minutes, in UTC: '0 9 * * 1-5'")
    when.add_argument("--list", action="store_true", help="only list what waits, or could not be sent")
    when.add_argument("--cancel", metavar="ID", help="only take this one back; --list shows the ids")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line()
    given = vars(parser.parse_intermixed_args(argv))
    after, at, cron, shows, id, as_json, _ = map(given.pop, ("after", "at", "cron", "list", "cancel", "json", "bus"))
    when = {member: value for member, value in (("after", after), ("at", at), ("cron", cron)) if value is not None}
    if bool(given["to"]) != bool(when) or not (when or shows or id):
        parser.error("give TO and one of --after, --at and --cron; or --list; or --cancel ID")
    bus_send.tell_people(complain)
    to = given["to"]
    try:
        own = bus_send.settings()
        if shows:
            found = schedules(own["AGENT_BUS_URL"], given["sender"] or own.get("AGENT_NAME"))
            lines = [f"{bus_recv.dump(each) if as_json else bus_recv.fitted(line_of(each))}\n" for each in found]
            bus_recv.emit("".join(lines))
            if not lines and sys.stderr and sys.stderr.isatty():
                complain("no message waits to be sent")
        elif id:
            ask(own["AGENT_BUS_URL"], "/later", {"cancel": id})
            complain(f"{id} is taken back")
        else:
            give(given, when, as_json)
    except BrokenPipeError:  # nobody reads us any more
        return 0
    except KeyboardInterrupt:
        if not (shows or id):
            complain("stopped; the bus has not said that it has the message")
        return 130
    except (bus_send.Unreachable, bus_send.Refused, ValueError, OSError) as error:
        complain(bus_send.advised(error, to))
        return {bus_send.Refused: 1, bus_send.Unreachable: 75}.get(type(error), 2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
