"""Requests that nobody meant to send, and what the bus must hold to meanwhile.

    python -m tests.fuzz                              all modes in full: a million raw requests, ten minutes of coverage
    python -m tests.fuzz raw --requests 20000         bytes on sockets: the hostile cases of the tests, mutated
    python -m tests.fuzz schema --seconds 60          requests that schemathesis makes of docs/openapi.json
    python -m tests.fuzz coverage --seconds 60        the head gate and the edge of JSON under atheris, in process

A mode is a function of a directory and a size; it starts what it needs and comes to Findings. The bar of raw and
schema: no answer of 5xx but 501, 505 and 507, no traceback, every connection ends, the bus is healthy afterwards, has
every message that it acknowledged, and has grown by at most 20 MB (resident memory, from after the first tenth on).
"""
from __future__ import annotations

import importlib.util
import json
import pathlib
import subprocess
import sys
import urllib.request
from typing import Any, NamedTuple

from tests.kit.processes import PATIENCE, Server

GROWTH = 20.0  # MB
UNSUPPORTED = {501, 505, 507}  # a method or coding, a version, no room for a file: the only 5xx that are no defect
ROOM = "64m"  # for files: less than a fuzzer can fill


# What a mode needs beside the standard library: `make fuzz` puts it into an environment outside of the repository
NEEDS = {"raw": None, "schema": "schemathesis", "coverage": "atheris"}
INSTALLED = pathlib.Path.home() / ".cache" / "agent-bus-fuzz" / "bin" / "python"


def python_for(mode):
    """The interpreter that has what this mode needs, or None."""
    needed = NEEDS[mode]
    if not needed or importlib.util.find_spec(needed):
        return sys.executable
    if INSTALLED.exists() and not subprocess.run([INSTALLED, "-c", f"import {needed}"], capture_output=True).returncode:
        return str(INSTALLED)
    return None


def missing():
    """Why a full run is not possible here, or None."""
    lacking = [NEEDS[mode] for mode in NEEDS if not python_for(mode)]
    return f"{' and '.join(lacking)} are not here: make fuzz installs them" if lacking else None


class Findings(NamedTuple):
    figures: dict[str, Any]
    violations: list[str]


class Siege:
    """A server under test, and messages that it must still have afterwards."""

    def __init__(self, folder, **settings):
        self.server = Server(folder / "bus.db", "--files", ROOM, **settings)
        self.kept = []  # (id, msg)
        self.memory = None  # MB; none until it was measured

    def __enter__(self):
        self.server.start()
        return self

    def __exit__(self, *error):
        self.server.__exit__(*error)

    def keep(self, msg):
        body = json.dumps({"from": "witness", "to": "archive", "channel": "kept", "msg": msg}).encode()
        with urllib.request.urlopen(f"{self.server.url}/send", body, timeout=PATIENCE) as answer:
            self.kept.append((json.load(answer)["id"], msg))

    def resident(self):
        """MB of memory that the server has."""
        told = subprocess.run(["ps", "-o", "rss=", "-p", str(self.server.process.pid)], capture_output=True, check=True)
        return int(told.stdout) / 1024

    def begin(self):
        """Caches are filled, and the heap has the size that it needs for a request: from here on it may grow."""
        self.memory = self.resident()

    def end(self):
        """The figures and violations that both modes have in common."""
        violations = []
        found, answer = [], {"now": 0, "more": True}
        while answer["more"]:
            answer = json.loads(self.server.get(f"/log?channel=kept&since={answer['now']}"))
            found += [(each["id"], each["msg"]) for each in answer["messages"]]
        if found != self.kept:
            violations.append(f"of {len(self.kept)} acknowledged messages the bus has {len(found)}")
        grown = self.resident() - (self.memory or self.resident())
        if grown > GROWTH:
            violations.append(f"the server has grown by {grown:.1f} MB")
        if self.server.process.poll() is not None:
            violations.append(f"the server has ended with {self.server.process.returncode}")
        said = self.server.log.read_text()
        if "Traceback" in said:
            violations.append(f"the server said: {said[said.index('Traceback'):][:2000]}")
        return {"kept messages": len(found), "MB grown": round(grown, 1)}, violations


def told(name, findings):
    """One line."""
    figures = ", ".join(f"{figure} {value}" for figure, value in findings.figures.items())
    return f"{name}: {figures}; {len(findings.violations)} violations"
