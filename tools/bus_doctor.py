#!/usr/bin/env python3
"""Check each hop on the way to an agent-bus; say which one fails, and what to try.

    AGENT_BUS_URL=https://bus.example AGENT_NAME=spark python3 tools/bus_doctor.py

It prints one line for each hop: `ok`, `warn` (it works, with a problem), `-` (skipped), or `FAIL`. The line below a
`warn` or `FAIL` says what to do. The first `FAIL` ends the check. If AGENT_BUS_URL has several URLs, each is checked,
and a last line names those that fail. For a bus with several fronts it also says which machine of the ledger leads,
whether acknowledged messages are on a second machine, and how far each front is. The environment and the code are
those of the clients, so a client has the same faults.

Nothing is stored, no mail is read and no cursor moves: the bus must refuse the test send, and the test polls use the
channel `doctor`, where nobody sends, and leave no name behind. The token is never shown. Exit code: 0 no hop failed; 1
a hop failed; 2 usage.
"""
from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import re
import sys
import time
from collections.abc import Callable, Sequence

# Python 3.8 prints this text. Older ones show the line in a SyntaxError, because they do not know `:=`.
if sys.version_info < (3, 9) and (needs := "bus_doctor.py needs Python 3.9 or later"):  # noqa: UP036
    sys.exit(needs)
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path += [HERE, os.path.dirname(HERE)]  # the clients lie beside this file or one folder up, or are installed
sys.path.sort(key=lambda folder: folder.endswith("-packages"))  # else an older version that is installed wins
try:
    import bus_recv  # noqa: I001  first, as the next two need it
    import bus_send
    from bus_doctor_bus import BETWEEN, Bus
    from bus_doctor_way import Fault, Finding, Skipped
except ModuleNotFoundError as missing:
    print(f"bus_doctor: {missing.name}.py is missing in {HERE}: run curl -fO $AGENT_BUS_URL/{missing.name}.py there",
          file=sys.stderr)  # fmt: skip
    sys.exit(2)

CATCH_UP = 2.0  # s; a front hears of an entry within 1 s, also if no hint comes
HOPS: dict[str, Callable[[Bus], Finding]] = {
    "url": Bus.spelling, "proxy": Bus.proxy, "dns": Bus.dns, "tcp": Bus.tcp, "tls": Bus.tls, "http": Bus.answer,
    "bus": Bus.kind, "clock": Bus.clock, "token": Bus.token, "ledger": Bus.ledger,
    "send": Bus.send, "recv": Bus.recv, "hold": Bus.long_poll, "file": Bus.database,
}  # fmt: skip
FAULTS = (bus_recv.Refused, bus_recv.Unreachable, bus_send.Unreachable, OSError, ValueError, http.client.HTTPException)


def printable(text: str) -> str:
    """One line, without the secrets that a URL or a stranger's answer may hold."""
    for secret, shown in ((r"abt_[0-9a-f]{8}_[\w-]+", "abt_..."), (r"//[^/@\s]*@", "//...@")):
        text = re.sub(secret, shown, text)
    return bus_recv.visible("".join(c if c.isprintable() else " " for c in text))


def examine(way: Bus) -> bool:
    """Print a line for each hop, and below a fault or a warning what to do. True if no hop failed."""
    for hop, look in HOPS.items():
        verdict, advice = "ok", ""
        try:
            with patience_for(hop):
                found = look(way)
            if isinstance(found, tuple):
                verdict, (found, advice) = "warn", found
        except Skipped as why:
            verdict, found = "-", f"skipped: {why}"
        except Fault as fault:
            verdict, found, advice = "FAIL", str(fault), fault.advice
        except FAULTS as error:  # although the hops before it went well
            verdict, found, advice = "FAIL", bus_recv.worded(error), BETWEEN
        except (LookupError, TypeError, AttributeError):
            verdict, found, advice = "FAIL", "the answer is not that of a bus", BETWEEN
        if found:
            tell(verdict, hop, found, advice)
        if verdict == "FAIL":
            return False
    return True


def patience_for(hop: str) -> contextlib.ExitStack:
    """A person at a terminal is told if a hop takes longer than a moment. The hop `hold` says so itself."""
    if hop == "hold" or not (sys.stdout and sys.stdout.isatty()):
        return contextlib.ExitStack()
    return bus_recv.later(bus_recv.SILENCE_SECONDS, lambda: print(f"      (waiting for {hop})", flush=True))


def compare(fronts: list[Bus]) -> None:
    """How far is each of these fronts of one bus? Within CATCH_UP each must come as far as one of them was before."""
    newest, end = max(each.front["position"] for each in fronts), time.monotonic() + CATCH_UP
    while (behind := [each for each in fronts if each.look()["position"] < newest]) and time.monotonic() < end:
        time.sleep(0.1)
    for each in behind:
        found = f"{each.url} is at entry {each.front['position']}; another was at {newest} {CATCH_UP:.0f} s before"
        tell("warn", "fronts", found, "its readers get messages late: is its machine busy, or its network slow?")
    if not behind:
        tell("ok", "fronts", f"each has come to entry {newest}", "")
    leaders = {each.front["ledger"]["leads"] for each in fronts}
    if len(leaders) > 1:
        found = f"they are told of different leaders: {', '.join(sorted(leaders))}"
        tell("warn", "fronts", found, "run this again: if it stays so, a front does not reach the one that leads")
    live = max(each.front["fronts"] for each in fronts)
    if live > len(fronts):
        found = f"{live} live, and {len(fronts)} were asked"
        tell("warn", "fronts", found, "add the URLs of the others to AGENT_BUS_URL, or the clients never find them")


def examine_all(hold: float) -> bool:
    """examine() for each URL of the bus. True if no hop failed, and all URLs are of one bus."""
    urls = [""]
    with contextlib.suppress(ValueError):  # the hop `url` tells it
        urls = bus_recv.settings()["AGENT_BUS_URL"].split(",")
    ways = [Bus(url, hold) for url in urls]
    failed = [way.url for way in ways if not examine(way)]
    fronts = [way for way in ways if way.url not in failed and "ledger" in getattr(way, "front", {})]
    if fronts and urls[1:]:
        compare(fronts)
    buses = {way.health.get("bus") for way in ways if way.url not in failed}
    if len(buses) > 1:
        tell("FAIL", "urls", f"they are of {len(buses)} buses", "AGENT_BUS_URL may have several URLs only of one bus")
    elif failed and urls[1:]:
        works = [url for url in urls if url not in failed]
        advice = f"until that is mended, the clients use {', '.join(works)}" if works else "the clients reach no bus"
        tell("FAIL", "urls", f"{len(failed)} of {len(urls)} fail: {', '.join(failed)}", advice)
    return not failed and len(buses) == 1


def tell(verdict: str, hop: str, found: str, advice: str) -> None:
    print(printable(f"{verdict:5} {hop:6} {found}"), flush=True)
    if advice:
        print(printable(f"{'':12} -> {advice}"), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Find the hop that fails on the way to an agent-bus.")
    hold = "length of the test poll, 0 to 60 s (25)"
    parser.add_argument("--hold", type=bus_recv.duration, default=25.0, metavar="S", help=hold)
    parser.add_argument("--bus", type=bus_recv.profile, metavar="PROFILE", help="the bus in PROFILE.env")
    options = parser.parse_args(argv)
    if not 0 <= options.hold <= 60:
        parser.error("--hold must be 0 to 60 seconds")
    try:
        return 0 if examine_all(options.hold) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # nobody reads us any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python would try again at exit, and complain
        return 0


if __name__ == "__main__":
    sys.exit(main())
