"""The command: see the package. Exit code 1 if a row failed; one that was skipped has not failed, nor passed."""
import contextlib
import datetime
import os
import pathlib
import platform
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from typing import NamedTuple

from tests.faults import Result, reason_to_skip
from tests.faults.rows import ROWS
from tests.processes import ROOT

REPORT = ROOT / "docs" / "reliability.md"

PREFACE = """\
# How much it survives

Written by `make faults`. One row again: `python -m tests.faults NAME`, where NAME is in
[tests/faults/rows.py](../tests/faults/rows.py). *Lost*, *duplicated*, *reordered* and so on are what the checker in
[tests/faults/history.py](../tests/faults/history.py) says of all that was sent, answered and delivered. A control has
the fault on purpose; it must be found out, or its row fails. What was skipped has not passed.
"""
TABLE = ["| fault | bar | result | control and its result | seconds |", "|---|---|---|---|---|"]


class Outcome(NamedTuple):
    row: object
    verdict: str  # passed, FAILED or skipped
    result: str
    control: str
    took: float  # s


def main(arguments):
    wanted = dict((*argument.split("=", 1), None)[:2] for argument in arguments)
    unknown = wanted.keys() - {row.name for row in ROWS}
    if unknown:
        print(f"no row is called {', '.join(unknown)}; there are {', '.join(row.name for row in ROWS)}")
        return 2
    load = os.getloadavg()[0]
    outcomes = []
    for row in ROWS:
        if row.name in wanted or not wanted:
            outcome = outcome_of(row, int(wanted.get(row.name) or row.full))
            print(f"{row.name}: {outcome.verdict} in {outcome.took:.0f} s: {outcome.result}", flush=True)
            print(f"    control: {outcome.control}", flush=True)
            outcomes.append(outcome)
    if not wanted:
        REPORT.write_text(report(outcomes, load))
    return 1 if any(outcome.verdict == "FAILED" for outcome in outcomes) else 0


def outcome_of(row, size):
    reason = reason_to_skip(row.needs)
    if reason:
        return Outcome(row, "skipped", reason, "—", 0)
    began = time.monotonic()
    result = in_a_directory(row.run, size)
    control, caught = "—", True
    if row.control:
        figures, found = in_a_directory(row.control.run)
        caught = bool(found)
        control = f"{row.control.what}: {f'found out ({kinds(found)})' if caught else f'NOT found out ({figures})'}"
    for violation in result.violations[:20]:
        print(f"    {violation}")
    verdict = "passed" if caught and not result.violations else "FAILED"
    figures = f"{result.figures}; **{kinds(result.violations)}**" if result.violations else result.figures
    return Outcome(row, verdict, figures, control, time.monotonic() - began)


def in_a_directory(run, *size):
    """The Result of a run in an empty directory; a run that breaks off has missed its bar."""
    place = tempfile.mkdtemp(prefix="faults-")
    try:
        return run(pathlib.Path(place), *size)
    except Exception as error:
        traceback.print_exc()
        return Result("it broke off", [f"broke off: {type(error).__name__}: {error}"])
    finally:
        shutil.rmtree(place, ignore_errors=True)


def kinds(found):
    """'12 lost, 3 reordered': violations by their kind, which stands before a colon, perhaps behind a place."""
    known = "lost|gap not announced|duplicated|unexpected|reordered|broke off"
    matches = (re.search(rf"({known}): ", violation) for violation in found)
    counts = Counter(match[1] if match else found[place] for place, match in enumerate(matches))
    return ", ".join(f"{count:,} {kind}" if kind in known else kind for kind, count in counts.most_common(5))


def report(outcomes, load):
    rows = [
        f"| {each.row.fault} | {each.row.bar} | {each.verdict}: {each.result} | {each.control} | {each.took:.0f} |"
        for each in outcomes
    ]
    facts = [f"- {name}: {value}" for name, value in machine(load)]
    return "\n".join([PREFACE, *facts, "", *TABLE, *(row.replace("\n", " ") for row in rows), ""])


def machine(load):
    yield "date", datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    yield "commit", subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True,
                                   text=True).stdout.strip()  # fmt: skip
    yield "machine", f"{cpu()}, {os.cpu_count()} cores; load {load:.1f} when it began"
    yield "system", f"{platform.system()} {platform.release()}, {file_system(tempfile.gettempdir())}"
    yield "software", f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"


def cpu():
    with contextlib.suppress(OSError):
        names = re.findall(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
        return names[0] if names else platform.machine()
    return platform.machine()


def file_system(path):
    """Type and options of the file system that `path` is on."""
    done = subprocess.run(["findmnt", "-no", "FSTYPE,OPTIONS", "--target", path], capture_output=True, text=True)
    return f"{path} on {done.stdout.strip()}"


sys.exit(main(sys.argv[1:]))
