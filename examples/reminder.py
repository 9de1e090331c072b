#!/usr/bin/env python3
"""A boss asks for a report and gives a reminder to the bus, which is sent only if no report has come by then.

    AGENT_BUS_URL=http://127.0.0.1:8080 python3 examples/reminder.py

What it shows: `tools/bus_later.py` gives a message to the bus that is sent later, also if its sender has ended by then;
`--cancel` takes it back. One of the two workers answers at once, and is not reminded. The other one waits until it is.
"""
import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

# Python 3.8 prints this text. Older ones show the line in a SyntaxError, because they do not know `:=`.
if sys.version_info < (3, 9) and (needs := "reminder.py needs Python 3.9 or later"):  # noqa: UP036
    sys.exit(needs)
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))  # the clients, unless they are installed
import bus_recv
import bus_send

ROOT = pathlib.Path(__file__).resolve().parent.parent
PATIENCE = 60  # s until we give up
HOUR, SOON = "1h", "2s"  # until a worker is reminded; in life it would be an hour for both


def later(*arguments):
    """What bus_later.py prints."""
    command = [sys.executable, str(ROOT / "tools" / "bus_later.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr.strip())
    return done.stdout


def next_message(name):
    [message] = bus_recv.receive(name, once=True, timeout=PATIENCE)
    return message


def main():
    """Ask both, give a reminder for each, and wait for the two reports."""
    argparse.ArgumentParser(description="A reminder is sent to the worker that has not answered.").parse_args()
    url = bus_recv.settings()["AGENT_BUS_URL"]
    try:
        bus_recv.ask(url, "/inbox", 5)  # a look: is a bus there, and may we use it?
    except bus_recv.Unreachable as fault:
        raise OSError(bus_recv.no_bus(url, fault)) from fault
    run = os.urandom(4).hex()
    boss, quick, slow = f"boss-{run}", f"quick-{run}", f"slow-{run}"
    reminders = {}
    for worker, after in ((quick, HOUR), (slow, SOON)):
        bus_send.send(worker, "the report, please", sender=boss)
        given = json.loads(later(worker, "where is the report?", "--from", boss, "--after", after))
        reminders[worker] = given["id"]
    next_message(quick)
    bus_send.send(boss, "the report of quick", sender=quick)
    print(f"to boss: {next_message(boss)['msg']}", flush=True)
    later("--cancel", reminders[quick])
    next_message(slow)
    print(f"to slow: {next_message(slow)['msg']}", flush=True)  # it forgot the first message
    bus_send.send(boss, "the report of slow", sender=slow)
    print(f"to boss: {next_message(boss)['msg']}", flush=True)
    waiting = later("--list", "--from", boss).splitlines()
    print(f"{len(waiting)} reminders are left")
    return 0


if __name__ == "__main__":
    try:
        with tempfile.TemporaryDirectory() as state:
            os.environ["AGENT_BUS_STATE_DIR"] = state
            sys.exit(main())
    except (bus_recv.Refused, bus_send.Refused, bus_send.Unreachable, ValueError, OSError) as error:
        sys.exit(f"reminder: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
