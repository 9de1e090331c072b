"""The figures of docs/cluster.md.

    python -m tests.ledgers                  all of them but `beside`
    python -m tests.ledgers speed            fronts on one PostgreSQL on this machine, beside a bus of one server
    python -m tests.ledgers beside           fronts on three nodes, beside NATS JetStream on three (the extra `bench`)
    python -m tests.ledgers kill-leader      a row of rows.py, with three nodes; its result goes into the table
    python -m tests.ledgers kill-leader=1    a row of another size, on the terminal only
"""
import contextlib
import itertools
import pathlib
import re
import statistics
import sys
import tempfile
import time

from tests.faults.__main__ import in_a_directory, kinds, machine, moment
from tests.faults.crash import CROWD, live
from tests.faults.history import background, get
from tests.kit import new_client, postgres
from tests.kit.nodes import no_networks, reason_to_skip
from tests.kit.peers import metric
from tests.kit.processes import ROOT, Server, wait_until
from tests.ledgers.beside import beside
from tests.ledgers.rows import ROWS
from tests.ledgers.storm import storm
from tests.ledgers.test_cluster import copies, front
from tests.ledgers.test_cluster import kills as kills_of

ROUNDS = 300  # sends, one after the other
ANSWERS = 6000  # to CROWD senders at once
KEYS = itertools.count()
REPORT = ROOT / "docs" / "cluster.md"
TABLE = "| row | fault | bar | result | when |\n|---|---|---|---|---|\n"


def waking(at, to):
    """(ms until a send is answered, ms until the reader at `to` has the message), medians of many single sends."""
    answered, woken, name = [], [], f"reader-{next(KEYS)}"
    messages = new_client.receive(to.url, name)
    first = background(next, messages)
    wait_until(lambda: name in get(to.url, "/inbox")["recipients"].get("default", {}))
    for number in range(ROUNDS):
        began = time.monotonic()
        new_client.send(at.url, "sender", name, f"{number} to {name}")
        answered.append(time.monotonic() - began)
        first.result(20)
        woken.append(time.monotonic() - began)
        first = background(next, messages)
        wait_until(lambda: metric(to, "parked"))  # it polls again
    return [statistics.median(each) * 1000 for each in (answered, woken)]


def throughput(*buses):
    """Sends a second, when CROWD senders are at each of these at once; each send has a key of its own."""
    began, futures = time.monotonic(), []
    for bus in buses:
        first = next(KEYS) * ANSWERS
        futures.append(background(live, bus, [], [first] * CROWD, ANSWERS // len(buses)))
    for future in futures:
        future.result(300)
    return ANSWERS / (time.monotonic() - began)


@contextlib.contextmanager
def two_fronts():
    """A folder, and two fronts on a ledger of their own."""
    with tempfile.TemporaryDirectory() as folder, postgres.Postgres() as engine:
        folder = pathlib.Path(folder)
        with front(folder / "a.db", engine.url) as a, front(folder / "b.db", engine.url) as b:
            yield folder, a, b


def speed():
    with two_fronts() as (folder, a, b), Server(folder / "alone.db") as alone:
        for what, at, to in (("one server", alone, alone), ("one front", a, a), ("two fronts", a, b)):
            answered, woken = waking(at, to)
            print(f"{what}: a send is answered in {answered:.1f} ms, its reader has it in {woken:.1f} ms", flush=True)
        for what, buses in (("one server", [alone]), ("one front", [a]), ("two fronts", [a, b])):
            print(f"{what}: {throughput(*buses):,.0f} sends/s, {CROWD} senders at each", flush=True)
        copies(a, b)
        print("the copies of both fronts are equal")


def storms(kills=30):
    """Kills of fronts on a ledger of one PostgreSQL; true if all was well."""
    found = []
    for with_copy in (False, True):
        with two_fronts() as (_, a, b):
            result = storm([a, b], kills_of([a, b], kills, with_copy))
            print("front and copy killed:" if with_copy else "front killed:", result.figures, flush=True)
            found += result.violations
            copies(a, b)
    print(*found, sep="\n")
    return not found


def outcome_of(row, size):
    """(all was well, the row of the table without its name)."""
    began, when = time.monotonic(), moment()
    result = in_a_directory(row.run, size)
    control, caught = "", True
    if row.control:
        _, found = in_a_directory(row.control)
        caught = any(not violation.startswith("broke off") for violation in found)
        control = f"; control: {f'found out ({kinds(found)})' if caught else 'NOT FOUND OUT'}"
    for violation in result.violations[:20]:
        print(f"    {violation[:300]}")
    well = caught and not result.violations
    missed = f"; **{kinds(result.violations)}**" if result.violations else ""
    words = f"{'passed' if well else 'FAILED'}: {result.figures}{missed}{control}"
    print(f"{row.name}: {words} in {time.monotonic() - began:.0f} s", flush=True)
    return well, f"{row.fault} | {row.bar} | {words} | {when}"


def keep(name, line):
    """Put the row of this name into the table of the report."""
    first, _, table = REPORT.read_text().partition(TABLE)
    lines = dict(re.findall(r"^[|] ([a-z0-9-]+) [|] (.*) [|]$", table, re.MULTILINE))
    lines[name] = line
    known = [row.name for row in ROWS]
    rows = (f"| {name} | {lines[name]} |\n" for name in sorted(lines, key=known.index))
    facts = "".join(f"- {name}: {value}\n" for name, value in machine())
    REPORT.write_text(f"{first}{TABLE}{''.join(rows)}\n{facts}")


def main(arguments):
    wanted = dict((*argument.split("=", 1), None)[:2] for argument in arguments)
    unknown = wanted.keys() - {row.name for row in ROWS} - {"speed", "beside"}
    if unknown:
        print(f"no row is called {', '.join(unknown)}; there are speed, beside, {', '.join(row.name for row in ROWS)}")
        return 2
    well = True
    if not wanted or "speed" in wanted:
        speed()
        well = storms()
    if reason_to_skip():
        print(f"without three nodes: {reason_to_skip()}")
        return not well
    if "beside" in wanted:
        beside(int(wanted["beside"] or 5))
    for row in ROWS:
        if row.name in wanted or not wanted:
            if row.networks and no_networks():
                print(f"{row.name}: {no_networks()}")
                continue
            size = wanted.get(row.name)
            passed, line = outcome_of(row, int(size or row.full))
            well = well and passed
            if not size:
                keep(row.name, line)
    return not well


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
