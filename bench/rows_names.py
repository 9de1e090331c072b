"""Names and idempotency keys: a bus has many names, and bus_send.py sends a key with each message."""
from __future__ import annotations

from collections.abc import Callable, Sequence

from bench import stored, wires
from bench.figures import Claim, Figure, Result, Run, interleaved, ratios, spaced
from bench.peers import ManyNames, ManyStreams, Peer
from bench.session import Session, row, warmed

CONNECTIONS = 128
FEW, SOME, MANY, VERY_MANY = 16, 400, 10_000, 100_000  # names
STORED = 3_000_000
KEYED = 2_000_000
UNIT, BYTES = "messages/s", "bytes/message"


def names(count: int) -> list[str]:
    return [f"name-{number}" for number in range(count)]


def called(count: int) -> str:
    return f"{spaced(count)} name{'s' * (count > 1)}"


def holding(
    session: Session, python: str, messages: int, to: Sequence[str], made: stored.MakeKey, **options: str
) -> ManyNames:
    """A bus that has so many messages for these names."""
    here = stored.database(session.kept, session.new_folder(), session.count(messages), to, made)
    return ManyNames(here.path.parent, python, here.path, names=to, **options)


def sends(session: Session, peer: Peer, connections: int = CONNECTIONS) -> Callable[[float], Run]:
    return lambda seconds: session.observed(peer, lambda: peer.sends(connections, seconds))


def side_by_side(session: Session, buses: Sequence[ManyNames]) -> dict[str, Figure]:
    with session.running(buses) as running:
        runs = {name: sends(session, bus) for name, bus in running.items()}
        return interleaved(warmed(runs, session.settings.seconds), session.settings.rounds, UNIT)


@row(first="0.9x with 400 names, 0.7x with 100,000, of 16 names; 700 bytes/message with 400, 900 with 10,000",
     goal="1.0x, 0.9x; twice the message")
def the_cost_of_a_send_does_not_grow_with_names(session: Session) -> Result:
    buses, full = [], f"{called(MANY)}, {spaced(session.count(STORED))} stored"
    for count in (1, FEW, SOME, MANY, VERY_MANY):
        buses += session.buses(ManyNames, names=names(count), what=called(count))
    for python in session.settings.pythons:
        buses.append(holding(session, python, STORED, names(MANY), stored.no_key, what=full))
    found = side_by_side(session, buses)
    session.notes.append(f"{CONNECTIONS} connections send to the names in turn. Each figure has its own bus. Each "
                         "name has two messages before the first round, so that no name is made in a round. "
                         f"Up to {ManyNames.READ} names of a bus have a reader.")
    claims = []
    for own in session.buses():
        few, some, very_many, stored_many = (
            found[f"{own.name}, {what}"] for what in (called(FEW), called(SOME), called(VERY_MANY), full))
        for figure, first, goal in ((some, 0.9, 1.0), (very_many, 0.7, 0.9)):
            rounds = ratios(figure.rounds, few.rounds)
            claims.append(Claim(f"{figure.contender}, of {called(FEW)}", "x", rounds, first, goal, True))
        for figure, first, goal in ((some, 700, 2 * wires.SIZE), (stored_many, 900, None)):
            if BYTES in figure.beside:
                claims.append(Claim(figure.contender, BYTES, figure.beside[BYTES], first, goal, False))
    return Result(list(found.values()), claims, session.notes)


@row(first="0.55x Redis on 16 connections, 0.4x on 128", goal="1.0x Redis")
def sends_to_four_hundred_names_are_as_fast_as_redis_with_four_hundred_streams(session: Session) -> Result:
    bars, runs, claims = {16: 0.55, 128: 0.4}, {}, []
    buses = session.buses(ManyNames, names=names(len(ManyStreams.streams)), what=called(len(ManyStreams.streams)))
    with session.running([*buses, *session.peers(ManyStreams)]) as contenders:
        for connections in bars:
            for name, peer in contenders.items():
                runs[f"{name}, {connections} connections"] = sends(session, peer, connections)
        found = interleaved(warmed(runs, session.settings.seconds), session.settings.rounds, UNIT)
    for bus in buses:
        for connections, first in bars.items():
            ours, redis = (f"{name}, {connections} connections" for name in (bus.name, ManyStreams.name))
            if redis in found:
                rounds = ratios(found[ours].rounds, found[redis].rounds)
                claims.append(Claim(f"{ours}, of {ManyStreams.name}", "x", rounds, first, 1.0, True))
    session.notes.append("The bus gets its messages for each name in turn, and Redis for a random stream.")
    return Result(list(found.values()), claims, session.notes)


@row(first="0.8x with keys that begin with the time", goal="0.95x")
def keys_cost_little(session: Session) -> Result:
    kinds = {  # what is sent, and the keys of what is stored
        "without keys": ("", stored.timed_key),
        "keys that begin with the time": (wires.TIMED_KEY, stored.timed_key),
        "random keys": (wires.RANDOM_KEY, stored.random_key),
    }
    found = side_by_side(session, [
        holding(session, python, KEYED, names(SOME), made, what=what, key=key)
        for python in session.settings.pythons for what, (key, made) in kinds.items()])
    without, timed, _ = kinds
    claims = [
        Claim(f"{bus.name}, {timed}, of {without}", "x",
              ratios(found[f"{bus.name}, {timed}"].rounds, found[f"{bus.name}, {without}"].rounds), 0.8, 0.95, True)
        for bus in session.buses()
    ]
    session.notes.append(
        f"{CONNECTIONS} connections send to {called(SOME)} in turn. Each database has {spaced(session.count(KEYED))} "
        "messages with keys of the kind that is sent; where none is sent, they begin with the time. bus_send.py makes "
        "such keys. Each message has another one.")
    return Result(list(found.values()), claims, session.notes)
