"""Waiting: how fast a parked reader is woken, what it costs to be parked, and what a broadcast takes."""
from __future__ import annotations

import contextlib
import random
import time

from bench import machine
from bench.crowd import parked
from bench.figures import Claim, Figure, Result, Run, interleaved, quantile, ratios
from bench.load import Line
from bench.peers import AgentBus, NchanPeer, Peer, RedisPeer, ThreadedBus
from bench.session import Session, row

WARM = 20  # wakings that do not count
PAUSE = 0.004  # s between two wakings: the reader must be parked again, and the disk at rest


def names(count: int, prefix: str = "elsewhere") -> list[str]:
    return [f"{prefix}-{number}" for number in range(count)]


def ours(session: Session, figures: dict[str, Figure]) -> list[Figure]:
    return [figures[bus.name] for bus in session.buses()]


@row(first="p99 under 3x nchan, which writes nothing to disk", goal="p99 under 2x nchan")
def a_parked_reader_is_woken_at_once(session: Session) -> Result:
    crowd, wakings = session.count(15000), session.count(1000, 50)

    def threaded() -> Run:
        """Threads that look twice a second: fewer of them, and fewer looks. Those of the round before look on."""
        peer = ThreadedBus(session.new_folder())
        with session.running([peer]):
            return woken(peer, min(crowd, 1000), min(wakings, 20))

    with session.running([*session.buses(), *session.peers(RedisPeer, NchanPeer)]) as running:
        runs = {name: lambda peer=peer: woken(peer, crowd, wakings) for name, peer in running.items()}
        runs[ThreadedBus.name] = threaded
        figures = interleaved(runs, session.settings.rounds, "ms (p99)")
    session.notes.append(
        f"{crowd} other readers are parked, each on its own name. A round has {wakings} wakings, one after the other, "
        f"in one process. A server with a thread for each reader gets {min(crowd, 1000)} readers, "
        f"{min(wakings, 20)} wakings and a new process in each round. The time runs from just before the send is "
        "written until the reader's whole answer is read.")
    claims = []
    for figure in ours(session, figures):
        if NchanPeer.name in figures:
            multiple = ratios(figure.rounds, figures[NchanPeer.name].rounds)
            claims.append(Claim(f"{figure.contender}, p99 of nchan", "x", multiple, 3, 2, False))
    return Result(list(figures.values()), claims, session.notes)


def woken(peer: Peer, crowd: int, wakings: int) -> Run:
    """The reader is the one that is measured; the crowd is only there."""
    times = []
    wire, to = peer.wire, "dell"
    with parked(peer, names(crowd)) as others, Line(wire, peer.port) as reader, Line(wire, peer.port) as sender:
        cursor = peer.cursor()
        for _ in range(wakings + WARM):
            reader.ask(wire.wait(to, cursor))
            time.sleep(PAUSE + random.random() * peer.period)
            start = time.perf_counter()
            sender.ask(wire.send(to))
            answer = reader.answer()
            times.append(time.perf_counter() - start)
            sender.answer()
            cursor = wire.cursor(answer)
        others.check()
    times = [one * 1000 for one in times[WARM:]]
    return Run(quantile(times, 0.99), {"p50 ms": quantile(times, 0.5), "worst ms": max(times)})


@row(first="2.5 KB", goal="2 KB")
def a_parked_reader_takes_little_memory(session: Session) -> Result:
    crowd, before = session.count(10000), session.count(1000)

    def grown(peer: Peer) -> Run:
        count = min(crowd, 1000) if isinstance(peer, ThreadedBus) else crowd
        with session.running([peer]), parked(peer, names(before, "first")):
            few = machine.memory(peer.pids())
            with parked(peer, names(count)):
                grown = machine.memory(peer.pids()) - few
        return Run(grown / count / 1024)

    def fresh(kind: type[Peer], **options: str) -> Run:
        return grown(kind(session.new_folder(), **options))

    runs = {bus.name: lambda bus=bus: fresh(AgentBus, python=bus.python) for bus in session.buses()}
    for peer in session.peers(RedisPeer, NchanPeer, ThreadedBus):
        runs[peer.name] = lambda peer=peer: fresh(type(peer))
    figures = interleaved(runs, session.settings.rounds, "KB")
    session.notes.append(
        f"The growth of the server (PSS of all its processes) between {before} parked readers and {crowd} more, each "
        f"on its own name; {min(crowd, 1000)} more for a server with a thread for each reader. Each round has a new "
        "process. The memory of the kernel for sockets is not counted.")
    claims = [Claim(figure.contender, "KB", figure.rounds, 2.5, 2, False) for figure in ours(session, figures)]
    return Result(list(figures.values()), claims, session.notes)


@row(first="under 2.2x nchan", goal="under 1.5x nchan")
def a_broadcast_reaches_ten_thousand_parked_readers_fast(session: Session) -> Result:
    crowd = session.count(10000)
    with session.running([*session.buses(), *session.peers(RedisPeer, NchanPeer)]) as running:
        runs = {name: lambda peer=peer: broadcast(peer, crowd) for name, peer in running.items()}
        figures = interleaved(runs, session.settings.rounds, "ms")
    session.notes.append(
        f"{crowd} readers. The time runs from just before the send is written until the last answer has reached the "
        "kernel (by the kernel's timestamp of the packet). No reader reads before all answers are there, so the "
        "readers take no CPU from the server. With agent-bus, each reader has its own name and the message is for "
        "`all`; with the others, all readers wait on one channel.")
    claims = []
    if NchanPeer.name in figures:
        for figure in ours(session, figures):
            multiple = ratios(figure.rounds, figures[NchanPeer.name].rounds)
            claims.append(Claim(f"{figure.contender}, of nchan", "x", multiple, 2.2, 1.5, False))
    return Result(list(figures.values()), claims, session.notes)


def broadcast(peer: Peer, crowd: int) -> Run:
    with parked(peer, peer.audience(crowd)) as readers, Line(peer.wire, peer.port) as sender:
        start = time.time_ns()
        sender.exchange(peer.wire.send("all"))
        return Run((readers.last_arrival() - start) / 1e6)


@row(first="0.4 % of a CPU", goal="0.1 %")
def ten_thousand_parked_readers_cost_no_cpu(session: Session) -> Result:
    crowd, windows, span = session.count(10000), session.settings.rounds, 1 if session.settings.quick else 4
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(session.running([*session.buses(), *session.peers(NchanPeer)]))
        crowds = [stack.enter_context(parked(peer, names(crowd))) for peer in running.values()]
        figures = {name: Figure(name, "% of a CPU", [], {}) for name in running}
        for _ in range(windows):
            before = {name: machine.running_seconds(peer.pids()) for name, peer in running.items()}
            start = time.perf_counter()
            time.sleep(span)
            share = 100 / (time.perf_counter() - start)
            for name, peer in running.items():
                figures[name].rounds.append((machine.running_seconds(peer.pids()) - before[name]) * share)
        for readers in crowds:
            readers.check()
    session.notes.append(f"All servers run at the same time, each with {crowd} parked readers. In the windows of "
                         f"{span} s nothing is sent and no hold ends.")
    mine = ours(session, figures)
    claims = [Claim(figure.contender, "% of a CPU", figure.rounds, 0.4, 0.1, False) for figure in mine]
    return Result(list(figures.values()), claims, session.notes)
