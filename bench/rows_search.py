"""Searching: how long an answer takes among a million messages, and what the index costs those who send."""
from __future__ import annotations

import json
import time
from collections.abc import Callable
from urllib.parse import quote

from bench.figures import Claim, Result, Run, interleaved, quantile, ratios
from bench.peers import AgentBus
from bench.rows_stored import holding
from bench.session import Session, row, warmed

MILLION = 1_000_000
EACH = 50  # searches in a round
# All stored messages are the same, so a word is in all of them or in none.
SEARCHES = {
    "a word of all messages": "honeypots",
    "a word of no message": "needle",
    "a phrase of no message": '"honeypots honeypots"',
}


@row(first="50 ms", goal="20 ms")
def a_search_of_a_million_messages_is_short(session: Session) -> Result:
    buses: list[AgentBus] = []
    for python in session.settings.pythons:
        holding(session, python, session.count(MILLION), buses)
    with session.running(buses):
        began = time.perf_counter()
        for bus in buses:
            while searched(bus, "needle")["next"]:  # until the index is whole
                pass
        built = (time.perf_counter() - began) / len(buses)
        runs = {f"{bus.name}: {what}": lambda bus=bus, words=words: timed(bus, words)
                for bus in buses for what, words in SEARCHES.items()}
        found = interleaved(runs, session.settings.rounds, "ms")
    session.notes.append(f"The slowest of {EACH} searches, one after the other, each for the newest 100 messages. To "
                         f"make the index took {built:.0f} s; searches were answered meanwhile, from what it had.")
    claims = [Claim(name, "ms", figure.rounds, 50, 20, False) for name, figure in found.items()]
    return Result(list(found.values()), claims, session.notes)


def searched(bus: AgentBus, words: str) -> dict[str, object]:
    text = bus.ask(bus.wire.get(f"/search?q={quote(words)}"))
    answer: dict[str, object] = json.loads(text[text.index(b"{") :])
    return answer


def timed(bus: AgentBus, words: str) -> Run:
    took = []
    for _ in range(EACH):
        start = time.perf_counter()
        searched(bus, words)
        took.append((time.perf_counter() - start) * 1000)
    return Run(max(took), {"median ms": quantile(took, 0.5)})


@row(first="0.95x of a bus without an index", goal="0.98x")
def an_index_does_not_slow_down_who_sends(session: Session) -> Result:
    pairs = [(session.buses()[number], session.buses()[number]) for number in range(len(session.settings.pythons))]
    for bare, indexed in pairs:
        bare.name, indexed.name = f"{bare.name}, no index", f"{indexed.name}, an index"
    with session.running([bus for pair in pairs for bus in pair]) as running:
        for _, indexed in pairs:
            searched(indexed, "needle")  # from the first search on there is one
        runs: dict[str, Callable[[float], Run]] = {
            name: lambda seconds, bus=bus: session.observed(bus, lambda: bus.sends(16, seconds))
            for name, bus in running.items()
        }
        found = interleaved(warmed(runs, session.settings.seconds), session.settings.rounds, "messages/s")
    claims = [Claim(f"{indexed.name}, of {bare.name}", "x", ratios(found[indexed.name].rounds, found[bare.name].rounds),
                    0.95, 0.98, True) for bare, indexed in pairs]
    session.notes.append("16 connections. The index is written meanwhile, and after the sends.")
    return Result(list(found.values()), claims, session.notes)
