#!/usr/bin/env python3
"""A queue of jobs and two workers, one of which dies in the middle of a job: the other one does it.

    AGENT_BUS_URL=http://127.0.0.1:8080 python3 examples/work_queue.py

What it shows: a worker is `tools/bus_work.py QUEUE --exec CMD`, and there may be any number of them. A job belongs to
one for the length of a lease, which is extended while CMD runs. Who dies says nothing, so the lease runs out, and the
next one gets the job with a higher AGENT_BUS_ATTEMPT. So CMD may run twice for a job: its result has the id of the job
for a key, and the bus stores it once.
"""
import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

# Python 3.8 prints this text. Older ones show the line in a SyntaxError, because they do not know `:=`.
if sys.version_info < (3, 9) and (needs := "work_queue.py needs Python 3.9 or later"):  # noqa: UP036
    sys.exit(needs)
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))  # the clients, unless they are installed
import bus_recv
import bus_send

JOBS = 6
PATIENCE = 60  # s until we give up


def do(job):
    """What a worker runs: the job on stdin. The third one takes its worker with it, the first time."""
    attempt = os.environ["AGENT_BUS_ATTEMPT"]
    if job["msg"] == "3" and attempt == "1":
        os.kill(os.getppid(), signal.SIGKILL)  # as it goes when memory runs out
        return 1
    square = int(job["msg"]) ** 2
    bus_send.send(job["from"], f"{job['msg']} squared is {square}, on attempt {attempt}", key=job["id"])
    return 0


def worker(queue, name):
    command = f'exec "{sys.executable}" "{os.path.abspath(__file__)}" do'
    call = [sys.executable, bus_recv.__file__, queue, "--claim", "--lease", "3", "--exec", command]
    return subprocess.Popen(call, env={**os.environ, "AGENT_NAME": name})


def main():
    """Hand out the jobs, and wait for as many results."""
    parser = argparse.ArgumentParser(description="Two workers, one of which dies, do the jobs of a queue on a bus.")
    parser.add_argument("do", nargs="?", choices=["do"], help="do one job, the JSON on stdin: a worker runs this")
    if parser.parse_args().do:
        return do(json.load(sys.stdin))
    url = bus_recv.settings()["AGENT_BUS_URL"]
    try:
        bus_recv.ask(url, "/inbox", 5)  # a look: is a bus there, and may we use it?
    except bus_recv.Unreachable as fault:
        raise OSError(bus_recv.no_bus(url, fault)) from fault
    run = os.urandom(4).hex()
    boss, queue = f"boss-{run}", f"squares-{run}"
    with tempfile.TemporaryDirectory() as state:
        os.environ["AGENT_BUS_STATE_DIR"] = state
        workers = [worker(queue, name) for name in ("ann", "bob")]
        try:
            for n in range(JOBS):
                bus_send.send(queue, f"{n}", sender=boss)
            results = []
            for result in bus_recv.receive(boss, timeout=PATIENCE):
                print(result["msg"], flush=True)
                results.append(result)
                if len(results) == JOBS:
                    break
        finally:
            for one in workers:
                one.terminate()
            ends = [one.wait() for one in workers]
    print(f"{ends.count(-signal.SIGKILL)} of 2 workers died, {len(results)} of {JOBS} jobs are done")
    return 0 if len(results) == JOBS else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (bus_recv.Refused, bus_send.Refused, bus_send.Unreachable, ValueError, OSError) as error:
        sys.exit(f"work_queue: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
