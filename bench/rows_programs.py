"""Programs: what it takes to send one message from a shell, and what a hook adds to each step of an agent."""
from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterable, Sequence
from functools import partial
from statistics import median

from bench import load, machine, wires
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


STEP = json.dumps({"hook_event_name": "PostToolBatch", "session_id": "s1", "cwd": "/tmp"}).encode()


@row(first="60 ms over python3 -c '', 10 ms for the tool of a hook", goal="the same")
def a_hook_takes_little_more_than_python_itself(session: Session) -> Result:
    times = session.count(20, 5)
    with session.running(session.buses()) as running:
        bus = next(iter(running.values()))
        environment = {**os.environ, "AGENT_BUS_URL": f"http://127.0.0.1:{bus.port}", "AGENT_NAME": "dell",
                       "AGENT_BUS_STATE_DIR": str(session.new_folder())}
        hook = str(machine.ROOT / "integrations" / "claude_code" / "bus_hook.py")
        runs = {}
        for python in session.settings.pythons:
            version = python_version(python)
            for what, command in {"nothing": ["-c", ""], "bus_hook.py": [hook, "--format", "claude"]}.items():
                runs[f"{what}, Python {version}"] = partial(ran, [python, *command], environment, times, STEP)
        wire = wires.Http(bus.port)
        wire.head += "X-Agent-Name: dell\r\n"
        with load.Line(wire, bus.port) as line:
            line.exchange(wire.send("dell"))
            runs["the tool of a hook"] = partial(called, line, times)
            for run in runs.values():
                run()
            found = list(interleaved(runs, session.settings.rounds, "ms").values())
    session.notes.append(f"A hook that tells nothing, with one unread message. A round is the median of {times}.")
    *programs, tool = found
    claims = [Claim(f"{its.contender}, over nothing", "ms", differences(its.rounds, bare.rounds), 60, None, False)
              for bare, its in zip(programs[::2], programs[1::2])]
    return Result(found, [*claims, Claim(tool.contender, "ms", tool.rounds, 10, None, False)], session.notes)


def differences(ours: Iterable[float], theirs: Iterable[float]) -> list[float]:
    return [one - other for one, other in zip(ours, theirs)]


def called(line: load.Line, times: int) -> Run:
    """POST /mcp, as a hook of the kind mcp_tool does."""
    arguments = {"event": "PostToolBatch", "agent": ""}
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "bus_hook", "arguments": arguments}}
    request = line.wire.post("/mcp", json.dumps(call).encode())
    spans = []
    for _ in range(times):
        start = time.perf_counter()
        answer = line.exchange(request)
        spans.append((time.perf_counter() - start) * 1000)
        assert b'"isError": true' not in answer, answer
    return Run(median(spans))


def ran(command: Sequence[str], environment: dict[str, str], times: int, given: bytes = b"T1 done") -> Run:
    spans = []
    for _ in range(times):
        start = time.perf_counter()
        subprocess.run(command, input=given, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                       env=environment, check=True)
        spans.append((time.perf_counter() - start) * 1000)
    return Run(median(spans))
