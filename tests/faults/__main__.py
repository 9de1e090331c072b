"""The command: see the package. Exit code 1 if a row failed; one that was skipped has not failed, nor passed."""
import contextlib
import datetime
import json
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
from tests.faults.kinds import table_of_kinds
from tests.faults.rows import ROWS
from tests.kit.processes import ROOT

REPORT = ROOT / "docs" / "reliability.md"
KEPT = ROOT / "docs" / "reliability.json"  # what each row gave when it was last run in full, and the time before

PREFACE = """\
# How much it survives

`make faults` wrote this. To run one row again: `.venv/bin/python -m tests.faults NAME`, with a NAME from
[tests/faults/rows.py](../tests/faults/rows.py). `NAME=SIZE` runs it at another size and writes nothing here. A checker,
[tests/faults/history.py](../tests/faults/history.py), compares everything that was sent, answered and delivered, and
finds what was *lost*, *duplicated*, *reordered* and so on. A control is a server or client with a deliberate
mistake: the checker must find that mistake, or the row fails. A skipped row has not passed. Two runs in a row *agree*
if both passed. Below is a second table: the kinds of fault and the tests of `make test` that show each.
"""
TABLE = ["| fault | bar | result | control and its result | seconds | when | the run before |",
         "|---|---|---|---|---|---|---|"]  # fmt: skip


class Outcome(NamedTuple):
    verdict: str  # passed, FAILED or skipped
    result: str
    control: str
    took: float  # s
    when: str  # it began, and at which commit and load


def main(arguments):
    if arguments == ["kinds"]:
        first, _, _ = REPORT.read_text().partition("## Kinds of fault")
        REPORT.write_text(first.rstrip("\n") + "\n\n" + table_of_kinds())
        return 0
    wanted = dict((*argument.split("=", 1), None)[:2] for argument in arguments)
    unknown = wanted.keys() - {row.name for row in ROWS}
    if unknown:
        print(f"no row is called {', '.join(unknown)}; there are {', '.join(row.name for row in ROWS)}")
        return 2
    failed = False
    for row in ROWS:
        if row.name in wanted or not wanted:
            size = wanted.get(row.name)
            outcome = outcome_of(row, int(size or row.full))
            print(f"{row.name}: {outcome.verdict} in {outcome.took:.0f} s: {outcome.result}", flush=True)
            print(f"    control: {outcome.control}", flush=True)
            failed = failed or outcome.verdict == "FAILED"
            if not size:
                keep(row.name, outcome)
    return 1 if failed else 0


def keep(name, outcome):
    """A row's outcome goes at once into the report, beside its last one; those of the other rows stay as they were."""
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    kept[name] = [outcome, *kept.get(name, [])[:1]]
    KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    REPORT.write_text(report({name: [Outcome(*each) for each in last] for name, last in kept.items()}))


def outcome_of(row, size):
    when, reason = moment(), reason_to_skip(row.needs)
    if reason:
        return Outcome("skipped", reason, "—", 0, when)
    began = time.monotonic()
    result = in_a_directory(row.run, size)
    control, caught = "—", True
    if row.control:
        figures, found = in_a_directory(row.control.run)
        caught = any(not violation.startswith("broke off") for violation in found)
        control = f"{row.control.what}: {f'found out ({kinds(found)})' if caught else f'NOT found out ({figures})'}"
    for violation in result.violations[:20]:
        print(f"    {violation[:300]}")
    verdict = "passed" if caught and not result.violations else "FAILED"
    figures = f"{result.figures}; **{kinds(result.violations)}**" if result.violations else result.figures
    return Outcome(verdict, figures, control, time.monotonic() - began, when)


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
    return ", ".join(f"{count:,} {kind}" if kind in known else kind[:300] for kind, count in counts.most_common(5))


def report(kept):
    """The whole text. `kept` has the last outcomes of each row: one or two, the newest first."""
    rows = [(row, *kept[row.name]) for row in ROWS if row.name in kept]
    agree = sum(len(runs) == 2 and all(run.verdict == "passed" for run in runs) for _, *runs in rows)
    lines = [
        f"| {row.fault} | {row.bar} | {last.verdict}: {last.result} | {last.control} | {last.took:.0f} | {last.when} | "
        f"{before(*earlier)} |"
        for row, last, *earlier in rows
    ]
    facts = [f"- {name}: {value}" for name, value in machine()]
    facts.append(f"- two runs in a row agree in {agree} of {len(rows)} rows")
    first = [PREFACE, *facts, "", *TABLE, *(line.replace("\n", " ") for line in lines), ""]
    return "\n".join([*first, table_of_kinds()])


def before(earlier=None):
    """The run before the last one, without its control and the load."""
    return f"{earlier.verdict}: {earlier.result}; {earlier.when.partition(', load')[0]}" if earlier else "—"


def moment():
    """When, at which commit, with how much other work."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    now = datetime.datetime.now(datetime.timezone.utc)
    return f"{now:%Y-%m-%d %H:%M} UTC, {commit.stdout.strip()}, load {os.getloadavg()[0]:.1f}"


def machine():
    yield "machine", f"{cpu()}, {os.cpu_count()} cores"
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
