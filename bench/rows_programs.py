"""Programs: what it takes to send one message from a shell."""
from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from statistics import median

from bench import machine
from bench.figures import Claim, Result, Run, interleaved, ratios
from bench.peers import python_version
from bench.session import Session, row


@row(first="1.5x of python3 -c 'import http.client, json'", goal="1.3x")
def sending_from_a_shell_takes_little_more_than_python_itself(session: Session) -> Result:
    times = session.count(20, 5)
    with session.running(session.buses()) as running:
        bus = next(iter(running.values()))
        environment = {**os.environ, "AGENT_BUS_URL": f"http://127.0.0.1:{bus.port}", "AGENT_NAME": "spark"}
        runs = {}
        for python in session.settings.pythons:
            version = python_version(python)
            for what, command in {
                "http.client and json": [python, "-c", "import http.client, json"],
                "bus_send.py": [python, str(machine.ROOT / "bus_send.py"), "dell"],
            }.items():
                runs[f"{what}, Python {version}"] = lambda command=command: ran(command, environment, times)
        for run in runs.values():
            run()
        found = list(interleaved(runs, session.settings.rounds, "ms").values())
    session.notes.append(f"The time of the whole process, from its start to its end; the bus is on this machine. A "
                         f"round is the median of {times} processes.")
    claims = [Claim(f"{send.contender}, of importing", "x", ratios(send.rounds, bare.rounds), 1.5, 1.3, False)
              for bare, send in zip(found[::2], found[1::2])]
    return Result(found, claims, session.notes)


def ran(command: Sequence[str], environment: dict[str, str], times: int) -> Run:
    spans = []
    for _ in range(times):
        start = time.perf_counter()
        subprocess.run(command, input=b"T1 done", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                       env=environment, check=True)
        spans.append((time.perf_counter() - start) * 1000)
    return Run(median(spans))
