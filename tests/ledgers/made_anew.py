"""The copy of a front is behind by many messages, removed, or damaged: how soon, and with what, does it serve again?

Another front has all messages. The damaged copy is taken away, and the front begins with a copy of that other front, as
docs/cluster.md says.
"""
import contextlib
import itertools
import pathlib
import secrets
import sqlite3
import time

from bench import load, wires
from tests.faults import Result, unless
from tests.faults.history import background, get
from tests.kit import new_client
from tests.kit.nodes import Nodes
from tests.kit.processes import PATIENCE, wait_until
from tests.ledgers.test_cluster import hasty, ran

READY = 60  # s
SENDERS = 50
TOGETHER = 10  # messages in one request
NAMES = 10  # for each sender, so that no mailbox is full
PAGE = 4096  # bytes


def arrays(wire, number, count):
    its = [wire.post("/send", wires.batch([f"r-{number}-{each}"] * TOGETHER)) for each in range(NAMES)]
    for each in range(count):
        yield its[each % NAMES]


def fill(bus, size):
    """How many messages were sent and acknowledged."""
    each = size // SENDERS // TOGETHER
    return TOGETHER * load.closed_loop(bus.port, wires.Http(bus.port), SENDERS, 20 * READY, arrays, each).answers


def take_away(bus):
    for file in pathlib.Path(bus.db).parent.glob(f"{pathlib.Path(bus.db).name}*"):
        file.unlink()


def refused(bus):
    """A front whose copy is damaged must end, and say so."""
    with contextlib.suppress(AssertionError):
        bus.start()
        bus.kill()
        return ["a damaged copy was served"]
    code, said = bus.reap(), bus.log.read_text()
    is_told = code == 2 and "cannot use the database" in said
    return unless(is_told, f"of a damaged copy was said, with code {code}: {said}")


def first_answer(bus):
    """Start a front: how many s later /healthz answers 200, and that answer."""
    began, start = time.monotonic(), background(bus.start)

    def answer():
        if start.done():
            start.result()  # an error, if it has ended
        with contextlib.suppress(*new_client.ERRORS):
            return get(bus.url, "/healthz")
        return None

    found = wait_until(answer, 5 * READY)
    took = time.monotonic() - began
    start.result(PATIENCE)
    return took, found


def differences(count, *buses):
    """What is wrong with the messages of fronts that should have the same, and so many."""
    with contextlib.ExitStack() as stack:
        files = (contextlib.closing(sqlite3.connect(f"file:{bus.db}?mode=ro", uri=True)) for bus in buses)
        rows = [stack.enter_context(each).execute("SELECT * FROM messages ORDER BY tick") for each in files]
        found = 0
        for found, (one, other) in enumerate(itertools.zip_longest(*rows), 1):  # noqa: B007
            if one != other:
                return [f"lost: a front has {one}, and the other {other}"]
    return unless(found == count, f"lost: there are {found} of {count} messages")


def print_logs(*buses):
    for bus in buses:
        said = bus.log.read_text()[-2000:] if bus.log.exists() else ""
        print(f"    {bus.db} has ended with {bus.process.poll()}: {said}")


def serves_again(what, count, a, b, copied=0.0):
    """(figures, what is wrong): b starts, and must soon have what a has had before."""
    try:
        needed = get(a.url, "/healthz")["position"]
        took, answer = first_answer(b)
    except Exception:
        print_logs(a, b)
        raise
    lacks = max(needed - answer["position"], 0)
    found = unless(took <= READY, f"{what}: it answered after {took:.1f} s")
    found += unless(not lacks, f"{what}: it answered though it lacked {lacks} entries")
    copy = f" and {copied:.1f} s for the copy" if copied else ""
    return f"{what}: after {took:.1f} s{copy}", found + differences(count, a, b)


def made_anew(place, size):
    with Nodes() as nodes, nodes.front(place / "a.db") as a, nodes.front(place / "b.db") as b:
        b.kill()
        count = fill(a, size)
        outcomes = [serves_again("behind", count, a, b)]
        b.kill()
        take_away(b)
        outcomes.append(serves_again("removed", count, a, b))
        b.stop()  # so that nothing of the first page is in the log that SQLite writes ahead
        with open(b.db, "r+b") as file:
            file.write(secrets.token_bytes(PAGE))
        outcomes.append(("damaged: refused", refused(b)))
        take_away(b)
        began = time.monotonic()
        ran("backup", place / "copy.db", "--db", a.db)
        ran("restore", place / "copy.db", "--db", b.db)
        outcomes.append(serves_again("then", count, a, b, time.monotonic() - began))
    figures = ", ".join(figure for figure, _ in outcomes)
    return Result(f"{count:,} messages; {figures}", [each for _, found in outcomes for each in found])


def unready(place):
    """The control: a front that serves before it has read the ledger."""
    with Nodes() as nodes, nodes.front(place / "a.db") as a, nodes.front(place / "b.db", **hasty("unready")) as b:
        count = fill(a, 10 * SENDERS * TOGETHER)
        b.kill()
        take_away(b)
        return Result(*serves_again("removed", count, a, b))
