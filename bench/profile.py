"""`python -m bench.profile`: where each microsecond of a durable send goes, into docs/profile.txt."""
from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

from bench import machine
from bench.__main__ import interpreter
from bench.load import Count
from bench.peers import AgentBus, output
from bench.staged_server import STAGES

DOCUMENT = machine.ROOT / "docs" / "profile.txt"
LEAST = 0.5  # % of the samples; what is below is not listed


class Load(NamedTuple):
    """What a load gave, and what the bus took for each send, us of CPU."""

    count: Count
    cpu: float


class StagedBus(AgentBus):
    """The bus with a clock around each stage."""

    clock = "wall"

    def command(self) -> list[str]:
        python, _, *arguments = super().command()
        return [python, str(pathlib.Path(__file__).with_name("staged_server.py")), *arguments]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "CLOCK": self.clock, "STAGES": str(self.folder / "stages")}

    def result(self) -> dict[str, Any]:
        self.stop()
        return dict(json.loads((self.folder / "stages").read_text()))


def loaded(bus: AgentBus, connections: int, seconds: float) -> Load:
    """After a warm-up."""
    bus.sends(connections, 1)
    assert bus.process
    pid = bus.process.pid
    if isinstance(bus, StagedBus):
        bus.process.send_signal(signal.SIGUSR1)
    before = cpu_seconds(pid)
    count = bus.sends(connections, seconds)
    return Load(count, (cpu_seconds(pid) - before) / count.answers * 1e6)


def cpu_seconds(pid: int) -> float:
    """Of all its threads."""
    threads = pathlib.Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


class Line(NamedTuple):
    """One stage: us for each send, without the stages it calls, and how often it is called for each."""

    own: float
    calls: float
    name: str
    what: str


def table(found: dict[str, Any], whole: float, rest: str) -> list[str]:
    """The stages, what the clock took of `whole` us for itself, and what is left of it."""
    sends, lines, clock = found["stages"]["send"]["calls"] * 1000, [], 0.0
    for name, what in STAGES:
        stage = found["stages"][name]
        taken = stage["calls"] * found["own"] + stage["called"] * found["callers"]
        lines.append(Line((stage["own"] - taken) / sends, stage["calls"] * 1000 / sends, name, what))
        clock += taken / sends
    return [
        f"{'us/send':>8} {'calls/send':>10}  stage",
        *(f"{line.own:8.2f} {line.calls:10.2f}  {line.name:24}  {line.what}" for line in lines),
        f"{clock:8.2f} {'':10}  the clock of this table",
        f"{whole - clock - sum(line.own for line in lines):8.2f} {'':10}  {rest}",
        f"{whole:8.2f} {'':10}  all of it",
    ]


class Profile:
    """The three parts of the document."""

    def __init__(self, folder: pathlib.Path, python: str, seconds: float) -> None:
        self.folder, self.python, self.seconds = folder, python, seconds

    def measured(self, kind: type[AgentBus], connections: int, clock: str = "wall") -> tuple[Load, dict[str, Any]]:
        bus = kind(pathlib.Path(tempfile.mkdtemp(dir=self.folder)), self.python)
        if isinstance(bus, StagedBus):
            bus.clock = clock
        bus.start()
        try:
            load = loaded(bus, connections, self.seconds)
            return load, bus.result() if isinstance(bus, StagedBus) else {}
        finally:
            bus.stop()

    def one_sender(self) -> list[str]:
        """By the clock on the wall. Waiting for the sender is in Loop.take_turn."""
        plain, _ = self.measured(AgentBus, 1)
        staged, found = self.measured(StagedBus, 1)
        return [
            "One sender, wall clock: what a send waits for", "",
            *table(found, 1e6 / staged.count.rate, "what has no stage"), "",
            f"Without the clock it is {1e6 / plain.count.rate:.0f} us.",
        ]

    def sixteen_senders(self) -> list[str]:
        plain, _ = self.measured(AgentBus, 16)
        staged, found = self.measured(StagedBus, 16, "cpu")
        return [
            "Sixteen senders, CPU time", "",
            *table(found, staged.cpu, "the deputy, and what has no stage"), "",
            f"Without the clock it is {plain.cpu:.1f} us, at {plain.count.rate:.0f} sends/s; "
            f"with it they were {staged.count.rate:.0f}.",
        ]

    def below_python(self) -> list[str]:
        """By library and by symbol, kernel included, from samples."""
        title = "Sixteen senders, by library and by symbol: shares of the CPU time of the bus"
        if not shutil.which("perf"):
            return [title, "", "skipped: perf is not installed"]
        bus = AgentBus(pathlib.Path(tempfile.mkdtemp(dir=self.folder)), self.python)
        bus.start()
        try:
            assert bus.process
            bus.sends(16, 1)
            samples = str(bus.folder / "samples")
            record = ["perf", "record", "-q", "-e", "cpu-clock", "-F", "999", "-p", str(bus.process.pid), "-o", samples]
            with subprocess.Popen([*record, "--", "sleep", str(self.seconds)], stderr=subprocess.PIPE) as process:
                bus.sends(16, self.seconds + 1)
                if process.wait():
                    assert process.stderr
                    return [title, "", f"skipped: {process.stderr.read().decode().strip()}"]
            report = ["perf", "report", "-i", samples, "--stdio", "--percent-limit", str(LEAST), "--sort"]
            parts = [output(*report, sort).splitlines() for sort in ("dso", "sym")]
            return [title, *(line.rstrip() for part in parts for line in ["", *part] if not line.startswith("#"))]
        finally:
            bus.stop()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description="Profile a durable send.")
    parser.add_argument("--python", default=sys.executable, metavar="PATH", help="an interpreter to run the bus with")
    parser.add_argument("--seconds", type=float, default=5, help="of each load (%(default)s)")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where, and so on which disk (%(default)s)")
    parser.add_argument("--print", action="store_true", dest="printed", help="print it, write nothing")
    options = parser.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="agent-bus-profile-", dir=options.folder))
    moment, others = machine.moment(), machine.Others()
    try:
        profile = Profile(folder, interpreter(options.python), options.seconds)
        parts = [*profile.one_sender(), "", "", *profile.sixteen_senders(), "", "", *profile.below_python()]
        about = {**machine.description(folder), "Python": output(profile.python, "--version").split()[-1], **moment,
                 "others took": f"{others.share():.0%} of the CPUs"}
    finally:
        shutil.rmtree(folder)
    head = ["Where each microsecond of a durable send goes: written by `make profile`.", "",
            *(f"{what}: {text}" for what, text in about.items()), "", ""]
    text = "\n".join([*head, *parts]) + "\n"
    print(text)
    if not options.printed:
        DOCUMENT.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
