"""What is stored: a reader far behind, ten million messages against a thousand, and starting with them."""
from __future__ import annotations

import os
import random
import time
from collections.abc import Callable

from bench import figures, stored
from bench.figures import Claim, Result, Run, interleaved, ratios
from bench.load import Line, wrk
from bench.peers import AgentBus, Peer, RedisPeer
from bench.session import Session, row, warmed
from bench.stored import Stored
from bench.wires import Refused

TEN_MILLION = 10_000_000
FEW = 1000
NAMES = 1000  # that have the ten million
PAGE = 1000  # messages that a reader takes at once
READ = 10  # messages in an answer of a random read
PLACES = 5000  # where the random reads begin


@row(first="100,000 messages/s", goal="300,000 messages/s")
def a_reader_that_is_far_behind_catches_up_fast(session: Session) -> Result:
    behind = session.count(100000)
    others = session.peers(RedisPeer)
    copies = [stored.database(session.kept, session.new_folder(), behind, ["dell"])
              for _ in session.settings.pythons]
    buses = [AgentBus(here.path.parent, python, here.path) for python, here in zip(session.settings.pythons, copies)]
    with session.running([*buses, *others]) as running:
        for peer in others:
            with Line(peer.wire, peer.port) as line:
                line.ask(peer.wire.send("dell") * behind)
                for _ in range(behind):
                    line.answer()
        runs = {name: lambda peer=peer: caught_up(peer, behind) for name, peer in running.items()}
        for run in runs.values():
            run()
        found = interleaved(runs, session.settings.rounds, "messages/s")
    session.notes.append(f"One reader that has {behind} messages to read and asks for {PAGE} at a time, the next when "
                         "it has the last; what it gets is counted and not parsed.")
    claims = [Claim(bus.name, "messages/s", found[bus.name].rounds, 100000, 300000, True) for bus in buses]
    return Result(list(found.values()), claims, session.notes)


def caught_up(peer: Peer, behind: int) -> Run:
    redis = isinstance(peer, RedisPeer)
    cursor, found, start = "0", 0, time.perf_counter()
    with Line(peer.wire, peer.port) as line:
        while found < behind:
            if redis:
                request = peer.wire.command("XREAD", "COUNT", str(PAGE), "STREAMS", "dell", cursor)
            else:
                request = peer.wire.get(f"/recv?to=dell&since={cursor}&max={PAGE}")
            answer = line.exchange(request)
            cursor = peer.wire.cursor(answer)
            got = answer.count(b"honeypots")
            if not got:
                raise Refused(f"{peer.name} has {found} of {behind} messages")
            found += got
    return Run(found / (time.perf_counter() - start))


@row(first="within 15 %", goal="within 5 %")
def sends_do_not_slow_down_with_ten_million_stored(session: Session) -> Result:
    def run(bus: AgentBus, here: Stored, seconds: float) -> Run:
        requests = [bus.wire.send(name) for name in here.names]  # the first 16 have a reader, the others have room
        return session.observed(bus, lambda: bus.requests(requests, 16, seconds))

    return grown(session, run, "messages/s")


@row(first="within 15 %", goal="within 5 %")
def reads_do_not_slow_down_with_ten_million_stored(session: Session) -> Result:
    chosen = random.Random(6)

    def run(bus: AgentBus, here: Stored, seconds: float) -> Run:
        numbers = [chosen.randrange(here.messages - READ * len(here.names)) for _ in range(PLACES)]
        requests = [bus.wire.get(f"/recv?to={here.name(number)}&since={here.since(number)}&max={READ}")
                    for number in numbers]
        for request in requests[:20]:
            if bus.ask(request).count(b"honeypots") != READ:
                raise Refused(f"{bus.name} did not answer {READ} messages")
        return Run(wrk(bus.port, requests, 16, seconds).rate)

    session.notes.append(f"Polls on 16 connections, each from another one of {PLACES} places at random and answered "
                         f"with {READ} messages.")
    return grown(session, run, "polls/s")


def grown(session: Session, measure: Callable[[AgentBus, Stored, float], Run], unit: str) -> Result:
    """Ours on each Python, with few messages stored and with very many."""
    runs, buses = {}, {}
    for python in session.settings.pythons:
        for count in (FEW, many(session)):
            bus, here = holding(session, python, count)
            bus.name += f", {figures.shown(count)} stored"
            buses[bus.name] = bus
            runs[bus.name] = lambda seconds, bus=bus, here=here: measure(bus, here, seconds)
    with session.running(list(buses.values())):
        found = list(interleaved(warmed(runs, session.settings.seconds), session.settings.rounds, unit).values())
    claims = [Claim(f"{much.contender}, of few", "x", ratios(much.rounds, few.rounds), 0.85, 0.95, True)
              for few, much in zip(found[::2], found[1::2])]
    return Result(found, claims, session.notes)


def many(session: Session) -> int:
    return session.count(TEN_MILLION)


def holding(session: Session, python: str, count: int) -> tuple[AgentBus, Stored]:
    """A bus that has so many messages: a few for the names that have a reader, or many for a thousand names."""
    others = [] if count <= FEW else [f"name-{number}" for number in range(NAMES - len(AgentBus.listeners))]
    here = stored.database(session.kept, session.new_folder(), count, [*AgentBus.listeners, *others])
    return AgentBus(here.path.parent, python, here.path), here


@row(first="1 s", goal="0.3 s")
def a_start_with_ten_million_stored_is_short(session: Session) -> Result:
    runs = {}
    for python in session.settings.pythons:
        few, _ = holding(session, python, FEW)
        much, _ = holding(session, python, many(session))
        for label, bus, cold in (("few", few, False), ("many", much, False), ("many, not in memory", much, True)):
            runs[f"{bus.name}, {label}"] = lambda bus=bus, cold=cold: started(bus, cold)
    for run in runs.values():
        run()
    found = interleaved(runs, session.settings.rounds, "s")
    session.notes.append(f"From starting the process until the first answer to /healthz. Few is {FEW} messages, many "
                         f"is {figures.shown(many(session))}; not in memory: the system was told to drop the database "
                         "from its cache, as after a start of the machine.")
    claims = [Claim(name, "s", figure.rounds, 1, 0.3, False) for name, figure in found.items() if ", many" in name]
    return Result(list(found.values()), claims, session.notes)


def started(bus: AgentBus, cold: bool) -> Run:
    if cold:
        with open(bus.db, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    try:
        bus.start()
        bus.ask(bus.wire.get("/healthz"))
        return Run(time.perf_counter() - start)
    finally:
        bus.stop()
