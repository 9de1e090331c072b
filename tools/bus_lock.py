#!/usr/bin/env python3
"""Reserve names on an agent-bus before you change what they stand for, release them, or see who holds which.

    AGENT_BUS_URL=http://10.0.0.5:8080 AGENT_NAME=dell python3 tools/bus_lock.py lock src/a.py 'src/db/*' --why T2
    python3 tools/bus_lock.py unlock src/a.py 'src/db/*'
    python3 tools/bus_lock.py list src/a.py

Names are paths that all agents write in the same way, best from the top of the repository. `*`, `?`, `[a-z]` and `**`
are wildcards: quote them, so that your shell leaves them alone. A reservation keeps nobody from changing a file: it is
a promise among agents. It ends by itself after --ttl; the same `lock` again gives it more time.

`lock` prints the fence, the number of the reservation; a later holder of a name has a higher one. This program
needs bus_recv.py beside it or one folder up. It takes the variables of bus_recv.py, and AGENT_NAME, and writes no file.
Exit code: 0 done, 1 refused by the bus, 2 usage, 3 others hold a name, or nothing was released, 75 out of reach, 130
Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlencode

# Python 3.8 prints this text. Older ones show the line in a SyntaxError, because they do not know `:=`.
if sys.version_info < (3, 9) and (needs := "bus_lock.py needs Python 3.9 or later"):  # noqa: UP036
    sys.exit(needs)

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path += [HERE, os.path.dirname(HERE)]  # the clients lie beside this file or one folder up, or are installed
sys.path.sort(key=lambda folder: folder.endswith("-packages"))  # else an older version that is installed wins
try:
    import bus_recv
except ModuleNotFoundError as missing:
    print(f"bus_lock: {missing.name}.py is missing in {HERE}: run curl -fO $AGENT_BUS_URL/{missing.name}.py there",
          file=sys.stderr)  # fmt: skip
    sys.exit(2)

WILD = re.compile(r"[*?]")  # what no path has; the bus takes a name with [ for that very path, too
TTL_LEAST, TTL_MOST = 1.0, 43200.0  # s that a bus gives, whatever is asked for
WAIT_SECONDS = 25.0  # of one request; common proxies cut a request that is quiet for 30 s


def lock(url: str, order: dict[str, Any], wait: float) -> tuple[dict[str, Any], float]:
    """The answer of the bus when the names are ours, and its clock. Refused (409) if others hold them for `wait` s."""
    end, tells = time.monotonic() + wait, list(bus_recv.PEOPLE) if wait else []
    while True:
        left = max(end - time.monotonic(), 0)
        hold = 0.0 if tells else min(left, WAIT_SECONDS)  # who looks on is told first what we wait for
        try:
            return bus_recv.ask(url, "/lock", hold + bus_recv.GRACE_SECONDS, {**order, "wait": round(hold, 3)})
        except bus_recv.Refused as refused:
            if refused.status != 409 or (left <= WAIT_SECONDS and not tells):
                raise
            bus_recv.once(tells, f"waiting for {bus_recv.span(wait) or f'{wait:.0f}s'} at most: {refused}")
        except bus_recv.Unreachable as fault:
            pause = max(fault.retry_after, 1.0)
            if left <= pause:
                raise
            time.sleep(pause)


def locks(url: str, **query: str | None) -> Iterator[tuple[dict[str, Any], float]]:
    """Each reservation, and the clock of the bus (s since 1970). Raises as bus_recv.ask() does.

    The bus compares a `name` that is a path; for one with wildcards it lists all, and we compare.
    """
    given = {field: value for field, value in query.items() if value}
    pattern = given.pop("name") if WILD.search(given.get("name", "")) else ""
    while True:
        answer, now = bus_recv.ask(url, f"/locks?{urlencode(given)}", bus_recv.GRACE_SECONDS)
        page = answer.get("locks")
        if not isinstance(page, list) or not all(isinstance(each, dict) for each in page):
            raise bus_recv.Unreachable()
        yield from ((each, now) for each in page if not pattern or may_meet(pattern, each.get("names")))
        if not answer.get("more") or answer.get("next") in (None, given.get("after")):  # else it is asked for ever
            return
        given["after"] = str(answer["next"])


def may_meet(pattern: str, names: Any) -> bool:
    """May one of these names and the pattern have a path in common? What stands between wildcards is not compared."""
    for name in names if isinstance(names, list) else ():
        ends = [(re.split(r"[*?\[]", one)[0], re.split(r"[*?\]]", one)[-1]) for one in (pattern, str(name))]
        (start, its_start), (end, its_end), is_wild = *zip(*ends), ends[1][0] != str(name)
        fits = its_start.startswith(start) or (is_wild and start.startswith(its_start))
        fits = fits and (its_end.endswith(end) or (is_wild and end.endswith(its_end)))
        if fits and ("**" in f"{pattern} {name}" or pattern.count("/") == str(name).count("/")):
            return True
    return False


def line(row: dict[str, Any], now: float) -> str:
    """A reservation in words."""
    names = " ".join(map(bus_recv.word, row["names"])) if isinstance(row.get("names"), list) else ""
    waiting = ", ".join(map(bus_recv.word, row["waiting"])) if isinstance(row.get("waiting"), list) else ""
    channel = "" if row.get("channel") == "default" else f" on {bus_recv.word(row.get('channel'))}"
    shared, more = " (shared)" if row.get("shared") else "", f": {bus_recv.word(row['why'])}" if row.get("why") else ""
    holder, left = bus_recv.word(row.get("holder")), still(row.get("until"), now)
    return f"{holder}{channel}{shared}, {left} more: {names}{more}{f'; {waiting} waits' if waiting else ''}"


def still(until: Any, now: float) -> str:
    """How long that is from now."""
    left = float(until) - now if bus_recv.DECIMAL.fullmatch(str(until)) else 0.0
    return bus_recv.span(left) or f"{max(left, 0):.0f}s"


def complain(text: str) -> None:
    bus_recv.complain(text, "bus_lock")


def parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(description="Reserve names before you change them, release them, or list them.")
    commands = parser.add_subparsers(dest="command", required=True)
    own = parser.prog if " " in parser.prog else None  # `agent-bus lock` is a whole name
    purposes = {
        "lock": "reserve all of these names, or none",
        "unlock": "release names that you have reserved",
        "list": "show who has reserved which names",
    }
    locking, unlocking, listing = (
        commands.add_parser(word, prog=own, help=it, description=f"{it[0].upper()}{it[1:]}.", epilog=more)
        for (word, it), more in zip(purposes.items(), (PATTERNS, AS_RESERVED, None))
    )
    path = "a path from the top of the repository, or in quotes a pattern for several paths"
    locking.add_argument("names", metavar="PATH", nargs="+", help=path)
    ends = "the reservation ends by itself after S seconds (600)"
    locking.add_argument("--ttl", type=bus_recv.duration, metavar="S", help=ends)
    locking.add_argument("--shared", action="store_true", help="others may hold the names too, if they also say so")
    locking.add_argument("--why", metavar="TEXT", help="for the others: what you do, at most 200 characters")
    locking.add_argument("--wait", type=bus_recv.duration, default=0.0, metavar="S", help="wait so long for others (0)")
    unlocking.add_argument("names", metavar="PATH", nargs="*", help="a path or a pattern, exactly as you reserved it")
    unlocking.add_argument("--fence", type=bus_recv.count, metavar="N", help="all names of this reservation")
    about = "only reservations that cover this path; or, of a pattern in quotes, those that may overlap it"
    listing.add_argument("name", metavar="PATH", nargs="?", help=about)
    listing.add_argument("--holder", metavar="NAME", help="only what NAME holds")
    listing.add_argument("--json", action="store_true", help="print each reservation as a line of JSON")
    named = {"lock": locking, "unlock": unlocking, "list": listing}
    for command in named.values():
        command.add_argument("--channel", metavar="C", help="the channel ($AGENT_BUS_CHANNEL, or 'default')")
        command.add_argument("--bus", type=bus_recv.profile, metavar="PROFILE", help="the bus of PROFILE.env")
    return parser, named


PATTERNS = """\
In a pattern, * is any number of characters of one part of a path, ? is one character, [a-z] is one of some, and ** is
any number of parts: 'src/*' is each file in src, 'src/**' is everything below it. Without the quotes, your shell puts
the files that are there now in its place."""
AS_RESERVED = """\
'src/*' releases what was reserved as 'src/*', and nothing that was reserved by another name, like src/a.py. The list
of reservations has the names, and --fence N takes the number that `lock` has given."""


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    given = bus_recv.settings()
    url, channel = given["AGENT_BUS_URL"], options.channel or given.get("AGENT_BUS_CHANNEL")
    if options.command == "list":
        channel = channel or ("default" if options.name else None)
        is_empty = True
        for row, now in locks(url, name=options.name, holder=options.holder, channel=channel):
            bus_recv.emit((bus_recv.dump(row) if options.json else bus_recv.fitted(line(row, now))) + "\n")
            is_empty = False
        if is_empty and not options.json:
            filtered = options.name or options.holder or options.channel
            complain("there is no such reservation" if filtered else "nothing is reserved")
        return 0
    if not given.get("AGENT_NAME") and not bus_recv.credentials(url):
        parser.error(f"who are you? Set AGENT_NAME{bus_recv.unused_file()}")
    order = {"from": given.get("AGENT_NAME"), "channel": channel}
    order = {member: value for member, value in order.items() if value}
    if options.command == "unlock":
        return unlock(url, order, options, parser)
    order.update({"names": options.names, "shared": options.shared, "why": options.why or ""})
    order.update({} if options.ttl is None else {"ttl": options.ttl})
    for name in filter(os.path.lexists, options.names):
        if (whole := from_top(name)) != name:
            its = f"{bus_recv.word(name)} here is {bus_recv.word(whole)} from the top of the repository"
            complain(f"{its}: to protect this file, reserve {bus_recv.word(whole)}")
    answer, now = lock(url, order, options.wait)
    fence, is_person = bus_recv.word(answer.get("fence")), bool(sys.stdout) and sys.stdout.isatty()
    unlocks = bus_recv.called("bus_lock.py unlock", "unlock")
    places = {"--bus": options.bus, "--channel": options.channel}
    where = [word for option, place in places.items() if place for word in (option, place)]
    about = f"; {unlocks} {shlex.join([*where, *options.names])} releases it before" if is_person else ""
    asked = TTL_LEAST if options.ttl is None else options.ttl
    limit = ", the least that a bus gives" * (asked < TTL_LEAST) + ", the most that a bus gives" * (asked > TTL_MOST)
    its = " ".join(map(bus_recv.word, options.names))
    complain(f"{its}: yours for {still(answer.get('until'), now)}{limit}{about}")
    if not is_person:
        bus_recv.emit(f"{fence}\n")
    return 0


def from_top(path: str) -> str:
    """A path from the top of the repository that this folder is in, as all agents should name it; else as it is."""
    here = pathlib.Path.cwd()
    top = next((folder for folder in (here, *here.parents) if (folder / ".git").exists()), here)
    whole = os.path.relpath(os.path.join(here, path), top)
    return path if whole.startswith("..") else whole


def unlock(url: str, order: dict[str, Any], options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if bool(options.names) == (options.fence is not None):
        parser.error("give paths, or --fence N: what to release")
    what = {"names": options.names} if options.names else {"fence": options.fence}
    answer, _ = bus_recv.ask(url, "/unlock", bus_recv.GRACE_SECONDS, {**order, **what})
    released = answer.get("released")
    if released:
        complain(f"released: {bus_recv.word(released)}")
        return 0
    its = "you have reserved nothing by that name, or it" if options.names else "this reservation"
    complain(f"nothing is released: {its} has ended")
    for held in instead(url, order, options.names):
        complain(held)
    complain(f"{bus_recv.called('bus_lock.py list', 'locks')} shows all reservations")
    return 3


def instead(url: str, order: dict[str, Any], names: Sequence[str]) -> list[str]:
    """Who has reserved these names, for one who could not release them; a sentence for each."""
    channel, held = order.get("channel", "default"), []
    with contextlib.suppress(bus_recv.Refused, bus_recv.Unreachable):  # it is only a hint
        held = [line(*row) for name in names for row in locks(url, name=name, channel=channel)]
    nobody = [f"reserved by nobody: {' '.join(map(bus_recv.word, names))}"] if names else []
    return [f"reserved by {each}" for each in dict.fromkeys(held)] or nobody


def main(argv: Sequence[str] | None = None) -> int:
    parser, named = parsers()
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        named[options.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    bus_recv.tell_people(complain)
    try:
        return run(options, named[options.command])
    except bus_recv.FAULTS as fault:
        code = bus_recv.ended(fault, "bus_lock")
        return 3 if getattr(fault, "status", 0) == 409 else code


if __name__ == "__main__":
    sys.exit(main())
