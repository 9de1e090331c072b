"""The figures of docs/cluster.md: fronts on one PostgreSQL on this machine, beside a bus of one server.

    python -m tests.ledgers          all of them, with 30 kills
    python -m tests.ledgers 100      with 100 kills
"""
import contextlib
import itertools
import pathlib
import statistics
import sys
import tempfile
import time

from tests.faults.crash import CROWD, live
from tests.faults.history import background, get
from tests.kit import new_client, postgres
from tests.kit.processes import Server, wait_until
from tests.ledgers.test_cluster import copies, front, storm

ROUNDS = 300  # sends, one after the other
ANSWERS = 6000  # to CROWD senders at once
KEYS = itertools.count()


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
        time.sleep(0.005)  # until it polls again
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


def main(kills=30):
    speed()
    found = []
    for with_copies in (False, True):
        with two_fronts() as (_, a, b):
            print("front and copy killed:" if with_copies else "front killed:", end=" ", flush=True)
            found += storm([a, b], kills, with_copies)
            copies(a, b)
    print(*found, sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
