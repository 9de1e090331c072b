"""What is stored: a reader far behind, ten million messages against a thousand, and starting with them."""
from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable, Sequence

from bench import stored
from bench.figures import Claim, Result, Run, interleaved, ratios, spaced
from bench.load import Line, wrk
from bench.peers import AgentBus, Peer, RedisPeer
from bench.session import Session, row, warmed
from bench.stored import Stored
from bench.wires import Refused

TEN_MILLION = 10_000_000
NAMES = 1000  # that have what is stored, in turn
PAGE = 1000  # messages that a reader takes at once
READ = 10  # messages in an answer of a random read
FEW = READ * NAMES  # the least that has an answer for each name
PLACES = 5000  # where the random reads begin


@row(first="150,000 messages/s", goal="300,000 messages/s")
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
    session.notes.append(f"One reader has {behind} messages to read and asks for {PAGE} at a time, one request after "
                         "the other. It counts the messages and does not parse them.")
    claims = [Claim(bus.name, "messages/s", found[bus.name].rounds, 150000, 300000, True) for bus in buses]
    return Result(list(found.values()), claims, session.notes)


def caught_up(peer: Peer, behind: int) -> Run:
    redis = isinstance(peer, RedisPeer)
    cursor, found, start, cpu = "0", 0, time.perf_counter(), time.process_time()
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
    span = time.perf_counter() - start
    return Run(found / span, {"generator CPU": (time.process_time() - cpu) / span})


@row(first="0.9x of with ten thousand stored", goal="1.0x")
def sends_do_not_slow_down_with_ten_million_stored(session: Session) -> Result:
    def runs(bus: AgentBus, here: Stored) -> dict[str, Callable[[float], Run]]:
        requests = [bus.wire.send(name) for name in here.names]
        return {bus.name: lambda seconds: session.observed(
            bus, lambda: bus.requests(requests, 16, seconds, here.names))}

    session.notes.append(f"16 connections send to {NAMES} names in turn. The small database "
                         "grows meanwhile.")
    return grown(session, runs, "messages/s")


@row(first="0.9x of with ten thousand stored", goal="1.0x")
def reads_do_not_slow_down_with_ten_million_stored(session: Session) -> Result:
    def runs(bus: AgentBus, here: Stored) -> dict[str, Callable[[float], Run]]:
        """The newest are what a live reader reads; anywhere is one that was away, and another page of the disk."""
        last = here.messages - READ * NAMES
        places = {bus.name: [last + number for number in range(NAMES)]}
        if here.messages > FEW:
            places = {f"{bus.name}, the newest": places[bus.name],
                      f"{bus.name}, anywhere": random.Random(6).choices(range(last), k=PLACES)}
        return {name: lambda seconds, numbers=numbers: polled(bus, here, numbers, seconds)
                for name, numbers in places.items()}

    session.notes.append(f"16 connections. Each poll is for another of {NAMES} names and gets {READ} messages: the "
                         f"newest of that name, or those at one of {PLACES} random places.")
    return grown(session, runs, "polls/s")


def polled(bus: AgentBus, here: Stored, numbers: Sequence[int], seconds: float) -> Run:
    """As no reader sends the same poll twice, all are different: the bus rounds off what is below a microsecond."""
    polls = ((here.name(number), f"{here.since(number)}{place // len(numbers):03}")
             for place, number in zip(range(PLACES), itertools.cycle(numbers)))
    requests = [bus.wire.get(f"/recv?to={name}&since={since}&max={READ}") for name, since in polls]
    for request in requests[:NAMES]:
        if bus.ask(request).count(b"honeypots") != READ:
            raise Refused(f"{bus.name} did not answer {READ} messages")
    return Run(wrk(bus.port, requests, 16, seconds).rate)


def grown(
    session: Session, runs: Callable[[AgentBus, Stored], dict[str, Callable[[float], Run]]], unit: str
) -> Result:
    """Ours on each Python, with few messages stored and with very many."""
    pairs, buses, every = [], [], {}
    for python in session.settings.pythons:
        few, many = (runs(*holding(session, python, count, buses)) for count in (FEW, session.count(TEN_MILLION)))
        pairs += [(next(iter(few)), much) for much in many]
        every.update({**few, **many})
    with session.running(buses):
        found = interleaved(warmed(every, session.settings.seconds), session.settings.rounds, unit)
    claims = [Claim(f"{much}, of few", "x", ratios(found[much].rounds, found[few].rounds), 0.9, 1.0, True)
              for few, much in pairs]
    return Result(list(found.values()), claims, session.notes)


def holding(session: Session, python: str, count: int, buses: list[AgentBus]) -> tuple[AgentBus, Stored]:
    """A bus that has so many messages; it joins the others."""
    names = [*AgentBus.listeners, *(f"name-{number}" for number in range(NAMES - len(AgentBus.listeners)))]
    here = stored.database(session.kept, session.new_folder(), count, names)
    bus = AgentBus(here.path.parent, python, here.path)
    bus.name += f", {spaced(count)} stored"
    buses.append(bus)
    return bus, here


@row(first="0.3 s", goal="0.1 s")
def a_start_with_ten_million_stored_is_short(session: Session) -> Result:
    runs, buses = {}, []
    for python in session.settings.pythons:
        for count in (FEW, session.count(TEN_MILLION)):
            bus, _ = holding(session, python, count, buses)
            runs[bus.name] = lambda bus=bus: started(bus, cold=False)
            if count > FEW:
                runs[f"{bus.name}, not in memory"] = lambda bus=bus: started(bus, cold=True)
    for run in runs.values():
        run()
    found = interleaved(runs, session.settings.rounds, "s")
    session.notes.append("The time runs from the start of the process until the first answer to /healthz. *Not in "
                         "memory*: the system was told to drop the database from its cache, as after a reboot.")
    claims = [Claim(name, "s", figure.rounds, 0.3, 0.1, False) for name, figure in found.items()
              if not name.endswith(f"{spaced(FEW)} stored")]
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
