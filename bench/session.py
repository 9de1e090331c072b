"""What all rows share: the table of rows, the settings of this run, and contenders started side by side."""
from __future__ import annotations

import contextlib
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from bench import load, machine
from bench.figures import Result, Run
from bench.peers import AgentBus, Peer


class Settings(NamedTuple):
    """`quick` makes everything smaller: to see that a row works, never for a figure."""

    folder: pathlib.Path  # on the disk that is measured
    pythons: Sequence[str] = (sys.executable,)
    rounds: int = 5
    seconds: float = 3  # of one round of one contender
    quick: bool = False


class Row(NamedTuple):
    """A function whose name is the sentence, and what the goals table says of it."""

    measure: Callable[[Session], Result]
    first: str
    goal: str


ROWS: dict[str, Row] = {}


def row(first: str, goal: str) -> Callable[[Callable[[Session], Result]], Callable[[Session], Result]]:
    def note(measure: Callable[[Session], Result]) -> Callable[[Session], Result]:
        ROWS[measure.__name__] = Row(measure, first, goal)
        return measure

    return note


class Session:
    """One row being measured."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.notes: list[str] = []
        self.started = 0
        self.kept = settings.folder.parent  # what outlives this run

    def count(self, full: int, least: int = 1) -> int:
        """So many of something: a twentieth in a quick look."""
        return max(least, full // 20) if self.settings.quick else full

    def buses(self, kind: type[AgentBus] = AgentBus, **options: Any) -> list[AgentBus]:
        """Ours, on each Python."""
        return [kind(self.new_folder(), python, **options) for python in self.settings.pythons]

    def new_folder(self) -> pathlib.Path:
        self.started += 1
        return self.settings.folder / f"{self.started}"

    def peers(self, *kinds: type[Peer]) -> list[Peer]:
        """Those that are here; who is absent is noted by name."""
        found = []
        for kind in kinds:
            reason = kind.missing()
            if reason:
                self.notes.append(f"{kind.name} was skipped: {reason}.")
            else:
                found.append(kind(self.new_folder()))
        return found

    @contextlib.contextmanager
    def running(self, peers: Sequence[Peer]) -> Iterator[dict[str, Peer]]:
        """All of them at once, by name. Idle ones take nothing from the one that is asked."""
        with contextlib.ExitStack() as stack:
            for peer in peers:
                stack.callback(peer.stop)
                peer.start()
            yield {peer.name: peer for peer in peers}

    def observed(self, peer: Peer, generate: Callable[[], load.Count], each: int = 1) -> Run:
        """Messages per second, of `each` in an answer, and what it took. What was acknowledged must be there."""
        disk = machine.device(self.settings.folder)
        mark, pids = peer.mark(), peer.pids()
        written, flushed = machine.written_bytes(pids), machine.flushes(disk)
        cpu, start = machine.cpu_seconds(pids), time.perf_counter()
        found = generate()
        span = time.perf_counter() - start
        beside = {"server CPU": (machine.cpu_seconds(pids) - cpu) / span, "generator CPU": found.cpu}
        written_now, flushed_now = machine.written_bytes(pids), machine.flushes(disk)
        stored, acknowledged = peer.stored(mark), found.answers * each
        if stored is not None and stored < acknowledged:
            raise load.Refused(f"{peer.name} acknowledged {acknowledged} messages and has {stored}")
        for what, before, now in (("flushes", flushed, flushed_now), ("bytes", written, written_now)):
            if before is not None and now is not None:
                beside[f"{what}/message"] = (now - before) / (stored or acknowledged)
        beside.update({f"{name} ms": value for name, value in found.latencies.items()})
        return Run(found.rate * each, beside)


def warmed(runs: dict[str, Callable[[float], Run]], seconds: float) -> dict[str, Callable[[], Run]]:
    """The same runs for `seconds`, after each had a short one that does not count."""
    for run in runs.values():
        run(min(1, seconds))
    return {name: lambda run=run: run(seconds) for name, run in runs.items()}
