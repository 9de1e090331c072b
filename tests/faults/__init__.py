"""The faults that the bus must survive, each as a figure that anyone can make again.

    python -m tests.faults                   every row in full; writes docs/reliability.md (make faults)
    python -m tests.faults kill-server       one row again
    python -m tests.faults soak=1000000      a row of another size, on the terminal only
    python -m tests.faults kinds             the second table of the report, from kinds.py; it runs nothing

A row (rows.py) is a function of an empty directory and a size: cycles, seconds, sends. It drives real processes through
one fault under a load whose history is kept (history.py), and comes to a Result. Many have a control: the same with a
bus, or a client, that has the fault on purpose (faulty_server.py). What a row cannot find in its control it cannot rule
out either, so a control that passes fails its row. The tests beside this are the same functions with small sizes.
"""
from __future__ import annotations

import os
import shutil
import sys
from typing import NamedTuple

import pytest

from tests.kit.processes import ROOT, SERVER


class Result(NamedTuple):
    """What a run came to: the figures, for people, and everything in which it missed its bar."""

    figures: str
    violations: list[str]


def unless(holds, violation):
    return [] if holds else [violation]


def faulty(fault):
    """The settings of a Server that has this fault."""
    return {"program": [str(ROOT / "tests/faults/faulty_server.py")], "env": {"FAULT": fault}}


def patched(code):
    """The settings of a Server in which this Python has run first."""
    return {"program": ("-S", "-c", SERVER.replace("sys.exit", f"exec({code!r}); sys.exit"))}


# What a row needs: each is the reason to skip it here, or nothing


def root():
    return None if os.geteuid() == 0 else "needs root, to mount"


def linux():
    return None if sys.platform.startswith("linux") else "needs Linux: it looks into /proc"


def program(name):
    return lambda: None if shutil.which(name) else f"{name} is not installed"


def reason_to_skip(needs):
    return next(filter(None, (need() for need in needs)), None)


def skipped_without(*needs):
    reason = reason_to_skip(needs)
    return pytest.mark.skipif(bool(reason), reason=reason or "")
