"""The page for people: what three tabs that are open take from those who send and wait."""
from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from bench.figures import Claim, Figure, Result, Run, interleaved, ratios
from bench.load import Line
from bench.peers import Peer
from bench.rows_names import sends
from bench.rows_wait import woken
from bench.session import Session, row, warmed

TABS = 3
CROWD = 300  # names that the page shows


class Tab:
    """Asks for what an open page asks for, at the same moments (bus_extensions/page/follow.js)."""

    GAP, BEHIND, LOOK = 0.25, 1.0, 3.0  # s: answers of the log; if it is behind; looks at who is there
    HOLD = 2  # s; the page holds for 25, but a round ends sooner

    def __init__(self, port: int, wire: Any) -> None:
        self.port, self.wire = port, wire
        self.over = threading.Event()
        self.threads = [threading.Thread(target=run, daemon=True) for run in (self.log, self.look)]

    def log(self) -> None:
        with Line(self.wire, self.port) as line:
            since, behind = self.wire.cursor(line.exchange(self.wire.get("/log?since=now"))), False
            while not self.over.wait(self.BEHIND if behind else self.GAP):
                fresh = f"since={since}&max=1000&block=true&wait={self.HOLD}"
                answer = line.exchange(self.wire.get(f"/log?{'before=now&max=500' if behind else fresh}"))
                found = json.loads(answer.partition(b"\r\n\r\n")[2])
                behind = (found["next"] or 0) > float(since) if behind else found["more"]
                since = self.wire.cursor(answer)

    def look(self) -> None:
        with Line(self.wire, self.port) as line:
            while not self.over.is_set():
                for path in ("/agents?max=300", "/activity", "/recv?to=maria&since=last&max=100&wait=0"):
                    line.exchange(self.wire.get(path))
                self.over.wait(self.LOOK)

    def __enter__(self) -> None:
        for thread in self.threads:
            thread.start()

    def __exit__(self, *_: Any) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()


def watched(peer: Peer, run: Callable[[float], Run], seconds: float) -> Run:
    """The same while the tabs are open."""
    with contextlib.ExitStack() as stack:
        for _ in range(TABS):
            stack.enter_context(Tab(peer.port, peer.wire))
        return run(seconds)


def side_by_side(session: Session, peer: Peer, what: str, unit: str, run: Callable[[float], Run]) -> list[Figure]:
    """Without pages, and with them."""
    alone, watching = f"{peer.name}, {what}", f"{peer.name}, {what}, {TABS} pages open"
    runs = warmed({alone: run, watching: partial(watched, peer, run)}, session.settings.seconds)
    found = interleaved(runs, session.settings.rounds, unit)
    return [found[alone], found[watching]]


@row(first="0.95x of the same without", goal="1.0x")
def three_open_pages_take_little_from_sends_and_parked_readers(session: Session) -> Result:
    wakings, figures, claims = session.count(1000, 50), [], []
    with session.running(session.buses()) as running:
        for peer in running.values():
            wakes = partial(lambda peer, _: woken(peer, CROWD, wakings), peer)
            alone, watching = side_by_side(session, peer, "wakings", "ms (p99)", wakes)
            plain, beside = side_by_side(session, peer, "16 connections", "messages/s", sends(session, peer, 16))
            figures += [alone, watching, plain, beside]
            shares = ratios(alone.beside["p50 ms"], watching.beside["p50 ms"]), ratios(beside.rounds, plain.rounds)
            for figure, rounds in zip((watching, beside), shares):
                claims.append(Claim(f"{figure.contender}, of the same without", "x", rounds, 0.95, 1.0, True))
    session.notes.append(
        "A page is two threads of the generator that ask for what an open page asks for, at the same moments. "
        f"In the rounds of wakings {CROWD} other readers are parked, and listed in all. Their p50 is compared.")
    return Result(figures, claims, session.notes)
