"""Sending: one message per POST, on disk before the answer, on 1, 16 and 128 connections; batches; tokens; the rate."""
from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable

from bench import machine, peers, wires
from bench.figures import Claim, Figure, Result, Run, interleaved, ratios
from bench.peers import AgentBus, DefaultBus, NchanPeer, RedisPeer, StarletteBus, TokenBus
from bench.session import Session, row, warmed

EVERYONE = (RedisPeer, peers.NatsPeer, StarletteBus, peers.ThreadedBus, NchanPeer, peers.MosquittoPeer)
UNIT = "messages/s"
LIMIT = "fdatasync + one round trip"
CEILING = "wrk itself, on nginx answering 200"


def sends(
    session: Session, connections: int, limits: dict[str, Callable[[float], Run]], *least: type[peers.Peer]
) -> dict[str, Figure]:
    """Every contender on so many connections, and what bounds them."""
    with session.running([*session.buses(), *session.peers(*EVERYONE, *least)]) as contenders:
        runs = {
            name: lambda seconds, peer=peer: session.observed(peer, lambda: peer.sends(connections, seconds))
            for name, peer in contenders.items()
        }
        nginx = contenders.get(NchanPeer.name)
        if isinstance(nginx, NchanPeer):
            runs[CEILING] = lambda seconds: session.observed(nginx, lambda: nginx.ceiling(connections, seconds))
        return interleaved(warmed({**runs, **limits}, session.settings.seconds), session.settings.rounds, UNIT)


def against(session: Session, figures: dict[str, Figure], other: str, first: float, goal: float) -> list[Claim]:
    """Ours, on each Python, as a multiple of another contender; nothing if that one is absent."""
    if other not in figures:
        return []
    return [
        Claim(f"{bus}, of {other}", "x", ratios(figures[bus].rounds, figures[other].rounds), first, goal, True)
        for bus in names(session)
    ]


def names(session: Session) -> list[str]:
    return [bus.name for bus in session.buses()]


@row(first="0.55x of fdatasync and one round trip", goal="0.9x")
def one_sender_is_as_fast_as_the_disk(session: Session) -> Result:
    scratch = machine.Scratch(session.settings.folder)

    def limit(seconds: float) -> Run:
        sync = statistics.mean(scratch.sync_seconds(seconds / 2))
        trip = statistics.mean(machine.round_trip_seconds(seconds / 2))
        return Run(1 / (sync + trip), {"fdatasync ms": sync * 1000, "round trip ms": trip * 1000})

    figures = sends(session, 1, {LIMIT: limit}, peers.LeastServer, peers.LeastLoop)
    scratch.close()
    claims = against(session, figures, LIMIT, 0.55, 0.9)
    session.notes.append("The two rows with one INSERT are limits for a server in Python. They parse nothing; one "
                         "commits in a thread, the other in the loop, as the bus does.")
    if any(max(claim.rounds) > 1 for claim in claims):
        session.notes.append("A ratio above 1.00x means only that the speed of the disk changed between two rounds.")
    return Result(list(figures.values()), claims, session.notes)


@row(first="0.6x Redis, 1.5x Starlette without fsync", goal="1.0x Redis")
def sixteen_senders_are_as_fast_as_redis(session: Session) -> Result:
    figures = sends(session, 16, {})
    claims = [
        *against(session, figures, RedisPeer.name, 0.6, 1.0),
        *against(session, figures, StarletteBus.name, 1.5, 1.5),
    ]
    return Result(list(figures.values()), claims, session.notes)


@row(first="0.5x Redis", goal="1.0x Redis")
def a_hundred_and_twenty_eight_senders_are_as_fast_as_redis(session: Session) -> Result:
    figures = sends(session, 128, {})
    return Result(list(figures.values()), against(session, figures, RedisPeer.name, 0.5, 1.0), session.notes)


@row(first="150,000 messages/s", goal="300,000 messages/s")
def batches_of_a_hundred_are_cheap(session: Session) -> Result:
    size, connections = 100, 16
    with session.running([*session.buses(), *session.peers(RedisPeer)]) as contenders:

        def run(peer: peers.Peer, seconds: float) -> Run:
            if isinstance(peer, AgentBus):
                to = itertools.islice(itertools.cycle(peer.listeners), size)
                request = peer.wire.post("/send", wires.batch(to))
                return session.observed(
                    peer, lambda: peer.requests([request], connections, seconds, peer.listeners), size)
            assert isinstance(peer, RedisPeer)
            return session.observed(peer, lambda: peer.batches(connections, seconds, size))

        runs = {name: lambda seconds, peer=peer: run(peer, seconds) for name, peer in contenders.items()}
        figures = interleaved(warmed(runs, session.settings.seconds), session.settings.rounds, UNIT)
    session.notes.append(f"{connections} connections. Each POST is an array of {size} messages for "
                         f"{len(AgentBus.listeners)} names in turn, in one transaction. Redis gets {size} XADD in one "
                         "write.")
    claims = [Claim(bus, UNIT, figures[bus].rounds, 150000, 300000, True) for bus in names(session)]
    return Result(list(figures.values()), claims, session.notes)


@row(first="0.9x", goal="0.97x")
def tokens_cost_next_to_nothing(session: Session) -> Result:
    figures = beside(session, TokenBus, lambda bus: [bus.wire.send("dell")])
    claims = [
        Claim(f"{closed.name}, of without", "x", ratios(figures[closed.name].rounds, figures[bus.name].rounds),
              0.9, 0.97, True)
        for closed, bus in zip(session.buses(TokenBus), session.buses())
    ]
    return Result(list(figures.values()), claims, session.notes)


@row(first="none", goal="none; the row shows that --rate 0, which the other rows use, does not change the figures")
def the_default_rate_costs_next_to_nothing(session: Session) -> Result:
    senders = 900  # so that each stays below 50 messages/s up to 45,000 together; 1,000 new names are the limit

    def requests(bus: AgentBus) -> list[bytes]:
        return [bus.wire.post("/send", wires.message("dell", f"agent-{number}")) for number in range(senders)]

    figures = beside(session, DefaultBus, requests)
    session.notes.append(f"{senders} senders take turns on 16 connections.")
    return Result(list(figures.values()), [], session.notes)


def beside(session: Session, kind: type[AgentBus], requests: Callable[[AgentBus], list[bytes]]) -> dict[str, Figure]:
    """Ours as in the other rows, and of another kind, with the same requests on 16 connections."""
    with session.running([*session.buses(), *session.buses(kind)]) as contenders:
        runs = {
            name: lambda seconds, bus=bus: session.observed(bus, lambda: bus.requests(requests(bus), 16, seconds))
            for name, bus in contenders.items()
            if isinstance(bus, AgentBus)
        }
        return interleaved(warmed(runs, session.settings.seconds), session.settings.rounds, UNIT)
