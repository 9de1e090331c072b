#!/usr/bin/env python3
"""Three agents change the same files, each a process of its own: nobody overwrites what another has just written.

    AGENT_BUS_URL=http://127.0.0.1:8080 python3 examples/reserve.py

Each adds its name to two of three files, six times. It reads both, works for a while, and writes them.

What it shows: an agent reserves its files before it reads them (`lock` of tools/bus_lock.py, POST /lock), waits for
whoever has them, and releases them when they are written. The fence grows from holder to holder: each file has the
fence of who wrote it last, and a writer with a lower one is refused. So also an agent that slept longer than its ttl
does no harm. Without the bus, names are lost: try --without-locks.
"""
import argparse
import contextlib
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

# Python 3.8 prints this text. Older ones show the line in a SyntaxError, because they do not know `:=`.
if sys.version_info < (3, 9) and (needs := "reserve.py needs Python 3.9 or later"):  # noqa: UP036
    sys.exit(needs)
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))  # the clients, unless they are installed
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent / "tools"))
import bus_lock

import bus_recv

AGENTS, FILES, TIMES = ("dell", "nano", "spark"), ("a.txt", "b.txt", "c.txt"), 6
PATIENCE = 60  # s that an agent waits for the others


class Stale(Exception):
    """Somebody with a higher fence has written the file since."""


@contextlib.contextmanager
def reserved(name, files):
    """The fence with which these files are ours; inside, nobody else has them."""
    url = bus_recv.settings()["AGENT_BUS_URL"]
    order = {"from": name, "names": [f"example/{file}" for file in files], "ttl": 30, "why": "to add my name"}
    fence = bus_lock.lock(url, order, PATIENCE)[0]["fence"]
    try:
        yield fence
    finally:
        bus_recv.ask(url, "/unlock", PATIENCE, {"from": name, "fence": fence})


def read(file):
    """(the fence of the last writer, the lines)"""
    fence, *lines = file.read_text().splitlines()
    return int(fence), lines


def write(file, fence, lines):
    if read(file)[0] > fence:
        raise Stale(f"{file.name} was written with a higher fence than {fence}")
    file.write_text("\n".join([str(fence), *lines, ""]))


def work(name, folder, locks):
    chance = random.Random(name)
    for _ in range(TIMES):
        files = chance.sample(FILES, 2)
        with reserved(name, files) if locks else contextlib.nullcontext(0) as fence:
            before = {file: read(folder / file)[1] for file in files}
            time.sleep(chance.random() / 50)  # work
            for file, lines in before.items():
                write(folder / file, fence, [*lines, name])


def main():
    parser = argparse.ArgumentParser(description="Three agents change the same files, with reservations.")
    parser.add_argument("--without-locks", action="store_true", help="what happens when nobody reserves anything")
    parser.add_argument("--agent", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.agent:
        work(given.agent[0], pathlib.Path(given.agent[1]), not given.without_locks)
        return 0
    url = bus_recv.settings()["AGENT_BUS_URL"]
    try:
        bus_recv.ask(url, "/locks", 5)  # a look: is a bus there, and may we use it?
    except bus_recv.Unreachable as fault:
        raise OSError(bus_recv.no_bus(url, fault)) from fault
    with tempfile.TemporaryDirectory() as folder:
        for file in FILES:
            pathlib.Path(folder, file).write_text("0\n")
        command = [sys.executable, __file__, *(["--without-locks"] if given.without_locks else [])]
        agents = [subprocess.Popen([*command, "--agent", name, folder], env=os.environ) for name in AGENTS]
        failed = [agent for agent in agents if agent.wait()]
        found = sum(len(read(pathlib.Path(folder, file))[1]) for file in FILES)
    print(f"{found} of {2 * TIMES * len(AGENTS)} names are there")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (bus_recv.Refused, bus_recv.Unreachable, Stale, ValueError, OSError) as error:
        sys.exit(f"reserve: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
