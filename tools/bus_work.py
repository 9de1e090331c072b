#!/usr/bin/env python3
"""Do the jobs of a queue on an agent-bus: run a command for each message, one at a time.

    AGENT_BUS_URL=http://10.0.0.5:8080 python3 tools/bus_work.py builds --exec ./build.sh

Any number of workers may share a queue: the bus gives each job to one of them. The command has the message as JSON on
its stdin, and MSG_FROM, MSG_ID, MSG_SUBJECT ... AGENT_BUS_ATTEMPT in its environment. If it ends with 0 the job is
done. If it ends with anything else, or the worker disappears, the bus gives the job to a worker again, later. After
--max-attempts of the bus (5) the job is given up: it lies in NAME.dead until somebody puts it back.

    python3 tools/bus_work.py builds --again all

The parts of this file, in order: Worker (takes jobs, runs the command, tells the bus how that ended), put_back
(--again), main.
bus_recv.Reader asks the bus and endures an outage, bus_recv.running runs a command; so this program needs bus_recv.py
beside it or one folder up. PROTOCOL.md (queues) says what a lease and a dead letter are.

It takes the variables of bus_recv.py, and AGENT_NAME, the name of this worker in receipts. It writes no file.
Exit code: 0 done or stopped by SIGTERM, 1 refused by the bus, or the one job of --once failed, 2 usage, or there is no
such command, 3 no job came, or none was put back, 75 out of reach, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

if TYPE_CHECKING:
    import subprocess

# Python 3.8 prints this text. Older ones show the line in a SyntaxError, because they do not know `:=`.
if sys.version_info < (3, 9) and (needs := "bus_work.py needs Python 3.9 or later"):  # noqa: UP036
    sys.exit(needs)
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path += [HERE, os.path.dirname(HERE)]  # the clients lie beside this file or one folder up, or are installed
sys.path.sort(key=lambda folder: folder.endswith("-packages"))  # else an older version that is installed wins
try:
    import bus_recv
except ModuleNotFoundError as missing:
    print(f"bus_work: {missing.name}.py is missing in {HERE}: run curl -fO $AGENT_BUS_URL/{missing.name}.py there",
          file=sys.stderr)  # fmt: skip
    sys.exit(2)


LONGEST_LEASE = 43200.0  # s; as PROTOCOL.md has it (queues)
DEAD = ".dead"  # a queue's name and this: the mailbox of the jobs that were given up


class NoCursor(bus_recv.Cursor):
    """Stands for a cursor: the bus itself remembers which jobs are done."""

    def __init__(self) -> None:
        self.at = "0"

    def move(self, since: str) -> None:
        pass


class Worker(bus_recv.Reader):
    """Takes jobs from a queue, one at a time, runs a command for each, and tells the bus how that ended.

    A job is ours while its lease lasts. While the command runs, the lease is extended. If the bus says that the lease
    is lost, another worker may have the job, so the command is killed. The first SIGTERM lets the command end; a second
    one, SIGHUP, or Ctrl-C, kills it and gives the job back.
    """

    def __init__(self, names: Sequence[str], channel: str | None, command: str, lease: float) -> None:
        if len(names) > 1:
            raise ValueError("a worker has one queue: give one NAME")
        super().__init__(names, None, channel, None, bus_recv.HOLD_SECONDS)
        self.command, self.lease = command, min(max(lease, 1), LONGEST_LEASE)  # s; the bus gives no other
        self.order = {"to": names[0], "channel": self.channel, "lease": self.lease}  # the body of a claim
        if name := bus_recv.settings().get("AGENT_NAME"):
            self.order["worker"] = name
        self.at_work = self.ending = self.failed = False  # failed: the last job
        self.on = ""  # the options with which another command reaches our queue
        self.most = 0  # attempts; 0: the bus has not said, or it gives up none

    def stop(self, *_: Any) -> None:
        """The handler of SIGTERM."""
        if self.ending or not self.at_work:
            sys.exit(0)
        self.ending = True

    def read_as_mail(self) -> str:
        """For a person: the queue is a mailbox that somebody reads. "" if it is not, or the bus does not tell."""
        query = urlencode({"name": self.names[0], "channel": self.channel})
        strange = LookupError, TypeError, ValueError, AttributeError
        with contextlib.suppress(bus_recv.Refused, bus_recv.Unreachable, *strange):
            agents = bus_recv.ask(self.url, f"/agents?{query}", bus_recv.GRACE_SECONDS)[0]["agents"]
            its = [each for each in agents if (each["name"], each["channel"]) == (self.names[0], self.channel)]
            # A claim moves the cursor too, and counts no reader.
            if any(each.get("readers") or ("work" not in each and float(each["cursor"] or 0)) for each in its):
                return f"; {self.names[0]} is read as mail too, and each of its messages is a job, also if it was read"
        return ""

    def take_up(self, answer: dict[str, Any]) -> None:
        self.bus, self.cursor = str(answer.get("bus", bus_recv.OLD_CONTRACT)), NoCursor()
        if self.bus == bus_recv.OLD_CONTRACT:  # it would store a claim as a message
            bus_recv.ask(self.url, "/inbox", bus_recv.GRACE_SECONDS)  # a closed bus that does not know us refuses this
            raise bus_recv.Refused(404, f"{self.url} is a bus of the first contract, which has no queues")

    def request(self, hold: float, seconds: float) -> tuple[dict[str, Any], float]:
        """Claim one job; see bus_recv.ask()."""
        answer, now = bus_recv.ask(self.url, "/claim", seconds, {**self.order, "wait": round(hold, 3)})
        try:
            for job in answer["messages"]:
                if not (isinstance(job["id"], str) and isinstance(job["lease"], str) and int(job["attempt"])):
                    raise TypeError
            self.most = int(answer.get("max_attempts") or 0)
        except (KeyError, TypeError, ValueError):
            raise bus_recv.Unreachable() from None
        return answer, now

    def work(self, answers: Iterator[dict[str, Any]]) -> None:
        """Do the jobs in these answers, until SIGTERM."""
        for answer in answers:
            for job in answer["messages"]:
                self.at_work = True
                self.do(job)
                self.at_work = False
                if self.ending:
                    return

    def do(self, job: dict[str, Any]) -> None:
        """Run the command for one job, and tell the bus how that ended."""
        attempt, began = int(job["attempt"]), False
        try:
            with bus_recv.running(self.command, bus_recv.dump(job), job, attempt) as process:
                began = True
                code = self.attend(process, job)
        except BaseException as why:  # the worker has to end now
            fails = isinstance(why, Exception)
            reason = f"the command did not begin: {why}" if fails and not began else "the worker was stopped"
            self.give_back(job, began and fails, reason)
            raise
        self.failed = code != 0
        if code == 0:
            self.settle("ack", job)
        elif code is not None:
            reason, pause = f"the command ended with {code}", bus_recv.pause_after(attempt)
            self.warn(f"{reason} for {job['id']}, attempt {attempt}{self.what_follows(job['id'], attempt, pause)}")
            self.settle("nack", job, reason=reason, delay=pause)

    def what_follows(self, id: str, attempt: int, pause: float) -> str:
        """What becomes of a job whose attempt failed."""
        if not self.most or attempt < self.most:
            return f"{f' of {self.most}' if self.most else ''}; the next one in {pause:.0f} s"
        back = f"{bus_recv.called('bus_work.py', 'work')} {self.names[0]} --again {id}{self.on}"
        return f" of {self.most}; it is given up and lies in {self.names[0]}{DEAD} now. To put it back: {back}"

    def give_back(self, job: dict[str, Any], counts: bool, reason: str) -> None:
        """Tell the bus that we end. The attempt `counts` only if the command began, and nobody has stopped us."""
        try:
            self.tell("nack", job, reason=reason, **({} if counts else {"counts": False}))
            free = ", and this attempt does not count" if self.most and not counts else f", attempt {job['attempt']}"
            then = f"to its queue{free}"
        except (bus_recv.Refused, bus_recv.Unreachable) as fault:
            then = f"when its lease ends: {fault}"
        with contextlib.suppress(OSError):  # perhaps we end because the terminal was closed
            self.warn(f"{job['id']} goes back {then}")

    def settle(self, verb: str, job: dict[str, Any], **members: Any) -> None:
        """Tell the bus, however long that takes: if the bus does not learn it, another worker repeats the job."""
        while True:
            try:
                return self.tell(verb, job, **members)
            except bus_recv.Refused as refused:
                return self.warn(f"{verb} of {job['id']}: {refused}")
            except bus_recv.Unreachable as fault:
                self.endure(fault, 0, float("inf"))

    def attend(self, process: subprocess.Popen[bytes], job: dict[str, Any]) -> int | None:
        """Extend the lease while the command runs. Its exit code, or None if the lease was lost meanwhile."""
        import subprocess

        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(self.lease / 3)
            try:
                self.tell("extend", job, seconds=self.lease)
            except bus_recv.Refused as refused:
                self.warn(f"the lease of {job['id']} is lost, its command is killed: {refused}")
                return None
            except bus_recv.Unreachable as fault:
                self.warn(f"the lease of {job['id']} is not extended yet: {fault}")

    def tell(self, verb: str, job: dict[str, Any], **members: Any) -> None:
        bus_recv.ask(self.url, f"/{verb}", bus_recv.GRACE_SECONDS, {"id": job["id"], "lease": job["lease"], **members})


def letters(url: str, queue: str, channel: str) -> Iterator[dict[str, Any]]:
    """The jobs of a queue that were given up, oldest first. This takes none."""
    query = {"to": f"{queue}{DEAD}", "channel": channel, "since": "0"}
    while True:
        answer, _ = bus_recv.ask(url, f"/recv?peek=true&{urlencode(query)}", bus_recv.GRACE_SECONDS)
        page = answer.get("messages")
        if not isinstance(page, list) or not all(isinstance(each, dict) for each in page):
            raise bus_recv.Unreachable()
        theirs = (each for each in page if each.get("to") == query["to"] and "dead_of" in each)
        yield from (each for each in theirs if isinstance(each.get("id"), str))
        if not answer.get("more") or str(answer.get("now")) in ("None", query["since"]):  # else it is asked for ever
            return
        query["since"] = str(answer["now"])


def put_back(queue: str, channel: str | None, id: str) -> int:
    """Put a job that was given up back into its queue; `id` is its own, or that of its dead letter, or `all`."""
    given = bus_recv.settings()
    channel, number = channel or given.get("AGENT_BUS_CHANNEL", "default"), 0
    look = f"{bus_recv.called('agent_bus.py inbox', 'inbox')} {queue}{DEAD}"
    why = f"{queue}{DEAD} has {'no job' if id == 'all' else f'no job {id}'}; {look} shows what it has"
    for letter in letters(given["AGENT_BUS_URL"], queue, channel):
        if id in ("all", letter.get("id"), letter["dead_of"]):
            try:
                bus_recv.ask(given["AGENT_BUS_URL"], "/again", bus_recv.GRACE_SECONDS, {"id": letter.get("id")})
                number += 1
            except bus_recv.Refused as refused:
                if refused.status not in (404, 409):  # it was removed; or somebody else put it back, or a worker has it
                    raise
                why = str(refused)
            except bus_recv.Unreachable:
                if number:
                    complain(f"put back into {queue} so far: {number}; run this again for the others")
                raise
    complain(f"put back into {queue}: {number} job{'s' * (number > 1)}" if number else f"nothing is put back: {why}")
    return 0 if number else 3


def complain(line: str) -> None:
    bus_recv.complain(line, "bus_work")


def command_line(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Run a command for each job of the queue NAME on an agent-bus.", epilog=GIVEN_UP
    )
    add = parser.add_argument
    send = bus_recv.called("bus_send.py", "send").replace("%", "%%")  # for argparse
    add("names", nargs="+", metavar="NAME", help=f"the queue; {send} NAME TEXT puts a job into it")
    either = parser.add_mutually_exclusive_group(required=True).add_argument
    fields = "MSG_FROM, MSG_ID, MSG_TO, MSG_SUBJECT, MSG_TYPE ..."
    either("--exec", metavar="CMD", help=f"run CMD for each job: JSON on stdin, {fields} as variables")
    either("--again", metavar="ID", help="put a job back that was given up; `all` is every one")
    add("--lease", type=bus_recv.duration, default=60.0, metavar="S",
        help="a worker that is silent for S seconds loses its job (60)")  # fmt: skip
    add("--once", action="store_true", help="end after one job")
    add("--timeout", type=bus_recv.duration, metavar="S", help="take no new job after S seconds (with --once: 25)")
    add("--channel", metavar="C", help="the channel ($AGENT_BUS_CHANNEL, or 'default')")
    add("--bus", type=bus_recv.profile, metavar="PROFILE", help="the bus in ~/.config/agent-bus/PROFILE.env")
    for ignored in ("--claim", "--json"):  # `bus_recv.py --claim` took these, and runs us with its own arguments
        add(ignored, action="store_true", help=argparse.SUPPRESS)
    for ignored in ("--since", "--tries"):
        add(ignored, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.again is not None and len(options.names) > 1:
        parser.error("a job goes back to one queue: give one NAME")
    return options


GIVEN_UP = """\
A job that failed in all its attempts (5, or --max-attempts of the bus) is given up: it lies in the mailbox NAME.dead,
with its attempts and the reason, until --again puts it back."""


def main(argv: Sequence[str] | None = None) -> int:
    options = command_line(argv)
    timeout = bus_recv.HOLD_SECONDS if options.once and options.timeout is None else options.timeout
    for number in bus_recv.ENDS:
        signal.signal(number, lambda *_: sys.exit(0))
    bus_recv.tell_people(complain)
    try:
        if options.again is not None:
            return put_back(options.names[0], options.channel, options.again)
        bus_recv.check_command(options.exec)
        worker = Worker(options.names, options.channel, options.exec, options.lease)
        signal.signal(signal.SIGTERM, worker.stop)
        worker.warn = worker.announce = complain
        given = (("--channel", options.channel), ("--bus", options.bus))
        worker.on = "".join(f" {option} {value}" for option, value in given if value)
        waiting, greets = f"waiting for jobs of {options.names[0]} on {worker.url}, until Ctrl-C", list(bus_recv.PEOPLE)
        if not options.once and timeout != 0:
            worker.greet = lambda: bus_recv.once(greets, waiting + worker.read_as_mail() if greets else waiting)
        with contextlib.closing(worker):
            worker.work(worker.answers(options.once, timeout))
    except bus_recv.FAULTS as fault:
        return bus_recv.ended(fault, "bus_work")
    return 3 if not worker.came else int(options.once and worker.failed)


if __name__ == "__main__":
    sys.exit(main())
