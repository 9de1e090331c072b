#!/usr/bin/env python3
"""Wake an agent whose program is closed, or idle, when urgent mail waits for it: start a turn of its session.

    python3 integrations/wake/bus_wake.py alice claude SESSION_ID --folder ~/project
    python3 integrations/wake/bus_wake.py alice codex THREAD_ID                          # an open terminal
    python3 integrations/wake/bus_wake.py alice codex-exec THREAD_ID --folder ~/project  # a closed one
    python3 integrations/wake/bus_wake.py alice opencode http://127.0.0.1:4096/SESSION_ID

It runs until it is stopped. The policy: only messages with the priority `high` wake (--any: all), each once; never
while a program listens as the name, or says that it is busy; at most --budget times an hour (4), also over restarts.
One program wakes a name on a bus: a second one ends with 1. Each decision is a line on stderr and in the log.

An agent is told how many messages wait, never what they say: a model trusts a prompt as if its user had written it.
RECIPES has the whole command of each program. None skips a permission. Claude Code may call two tools without a
question, bus_inbox and bus_ack; what it may do besides, such as bus_send, is for your own settings to say.

The parts of this file, in order: RECIPES; Decision and decide, which asks nobody; Waker, which asks the bus and wakes;
main. Standard library only; it needs GET /digest of the bus, and takes the variables of bus_recv.py. The files are in
the state directory: wake/BUS/CHANNEL/NAME.json and NAME.log.
Exit code: 1 refused by the bus, or another one runs; 2 usage; 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations  # needs Python 3.9 or later

import argparse
import base64
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__)))))
import bus_recv  # noqa: E402

LOOK_SECONDS = 10.0  # between two looks, each of which is two small requests
BUDGET = 4  # wakes an hour: each costs a turn of a model
HOUR = 3600.0  # s
TURN_SECONDS = 1800.0  # then a turn that we have started is ended
ANSWER_SECONDS = 10.0  # for the bus, and for OpenCode

READING = [f"mcp__{server}__{tool}" for server in ("bus", "plugin_agent-bus_bus") for tool in ("bus_inbox", "bus_ack")]


class Failed(Exception):
    """The agent could not be woken; the text says why."""


# How each program is woken


def claude(session: str, text: str) -> None:
    """A turn without a terminal. The text comes on stdin, behind which no option can hide."""
    reading = ["--permission-mode", "default", "--allowedTools", ",".join(READING)]
    run(["claude", "-p", "--resume", session, *reading], text)


def codex(session: str, text: str) -> None:
    """An open terminal that is idle starts a turn; a closed one has the message when it is opened again."""
    run(["codex", "queue", "--thread", session, "--message", text], "")


def codex_exec(session: str, text: str) -> None:
    """A turn without a terminal, in a folder that Codex trusts or that is under git."""
    run(["codex", "exec", "resume", session, "-"], text)


class Stays(urllib.request.HTTPRedirectHandler):
    """A redirect is an error."""

    def redirect_request(self, *_: Any) -> None:
        return None


def opencode(place: str, text: str) -> None:
    """A running `opencode serve`, or an open terminal of it: a prompt that it answers when it can."""
    server, _, session = place.rpartition("/")
    body = json.dumps({"parts": [{"type": "text", "text": text}]}).encode()
    headers = {"Content-Type": "application/json"}
    if password := os.environ.get("OPENCODE_SERVER_PASSWORD"):
        login = f"{os.environ.get('OPENCODE_SERVER_USERNAME', 'opencode')}:{password}"
        headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    # This machine is reached without a proxy, and no redirect is followed: neither must get the password.
    proxies = [urllib.request.ProxyHandler({})] if bus_recv.is_here(urlsplit(server).hostname) else []
    try:
        order = urllib.request.Request(f"{server}/session/{session}/prompt_async", body, headers)
        urllib.request.build_opener(Stays, *proxies).open(order, timeout=ANSWER_SECONDS).close()
    except (OSError, ValueError) as error:
        raise Failed(f"OpenCode at {server}: {error}") from None


RECIPES: dict[str, Callable[[str, str], None]] = {
    "claude": claude,
    "codex": codex,
    "codex-exec": codex_exec,
    "opencode": opencode,
}


def check_program(program: str) -> None:
    if not shutil.which(program):
        raise Failed(f"there is no program {program} on PATH")


def run(command: list[str], text: str) -> None:
    """Run the command to its end, in the folder of the session. What it prints is for nobody."""
    check_program(command[0])
    with bus_recv.running(f"exec {shlex.join(command)} >/dev/null", text, {}, 1) as process:
        try:
            code = process.wait(TURN_SECONDS)
        except subprocess.TimeoutExpired:
            raise Failed(f"{command[0]} did not end within {TURN_SECONDS:.0f} s and is ended") from None
    if code:
        raise Failed(f"{command[0]} ended with {code}")


# The policy


class Decision(NamedTuple):
    """Wake now, or not; and why, for the log ("": nothing to say)."""

    wakes: bool
    why: str


def decide(counts: dict[str, Any], agent: dict[str, Any], memory: dict[str, Any], options: Any, now: float) -> Decision:
    """`counts` is the answer of /digest, `agent` the agent's entry in /agents, `memory` what Waker keeps; `now`, s."""
    number, newest = counts["unread" if options.any else "urgent"], latest(counts, options.any)
    if number <= memory["number"] and newest <= memory["newest"]:
        return Decision(False, "")
    waiting = f"{number} {'unread' if options.any else 'urgent'}"
    if agent.get("online"):
        return Decision(False, f"{waiting}, but a program listens")
    if agent.get("status", {}).get("state") == "busy":
        return Decision(False, f"{waiting}, but the agent says that it is busy")
    if len([wake for wake in memory["wakes"] if abs(now - wake) < HOUR]) >= options.budget:  # the clock may step back
        return Decision(False, f"{waiting}, but it was woken {options.budget} times within an hour")
    return Decision(True, waiting)


def latest(counts: dict[str, Any], any: bool) -> float:
    """The time of the newest message that may wake, s. Of urgent ones the bus lists the oldest 16."""
    listed = [counts["newest"] or {}] if any else counts["first_urgent"]
    return max((float(one.get("ts", 0)) for one in listed), default=0.0)


# At work


class Waker:
    """Looks for the mail of one name and wakes its agent. For each name on a bus and channel one runs: it has a lock.

    Memory: `wakes`, when it woke, s; `number` and `newest`, what waited when it woke last.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        given = bus_recv.settings()
        self.url, self.channel = given["AGENT_BUS_URL"], given.get("AGENT_BUS_CHANNEL", "default")
        self.options, self.said = options, ""
        place = bus_recv.place_of("wake", self.url, self.channel, options.name)
        self.log = f"{place}.log"
        self.file = bus_recv.private_file(f"{place}.json", os.O_RDWR, "r+")
        if not bus_recv.try_lock(self.file, self.file.name):
            raise bus_recv.Busy(f"another one wakes {options.name}: {self.file.name} is locked")
        bus_recv.append(self.log, "")  # if it cannot be written, fail before a wake
        self.memory: dict[str, Any] = {"wakes": [], "number": 0, "newest": 0.0}
        with contextlib.suppress(ValueError, TypeError, LookupError, ArithmeticError, RecursionError):  # it is new
            kept, numbers = json.load(self.file), {"number": int, "newest": float}
            wakes = [float(wake) for wake in kept["wakes"]]
            self.memory = {"wakes": wakes, **{member: kind(kept[member]) for member, kind in numbers.items()}}

    def ask(self, what: str) -> dict[str, Any]:
        return bus_recv.ask(self.url, f"/{what}={self.options.name}&channel={self.channel}", ANSWER_SECONDS)[0]

    def look(self, counts: dict[str, Any], found: dict[str, Any]) -> None:
        """Wake the agent if the policy says so. `counts` is the answer of /digest, `found` that of /agents."""
        name, channel = self.options.name, self.channel
        agent = next((one for one in found["agents"] if (one["name"], one["channel"]) == (name, channel)), {})
        numbers = {member: int(counts[member]) for member in ("unread", "urgent")}  # no text gets into the prompt
        counts, number = {**counts, **numbers}, numbers["unread" if self.options.any else "urgent"]
        self.keep(number=min(number, self.memory["number"]))  # what was read may come again
        decision = decide(counts, agent, self.memory, self.options, time.time())
        if decision.why != self.said:
            line = f"{'wakes' if decision.wakes else 'does not wake'} {name}: {decision.why}"
            self.say(line if decision.why else "", decision.why)
        if decision.wakes:
            self.wake(counts, number)

    def wake(self, counts: dict[str, Any], number: int) -> None:
        """One attempt counts, whatever comes of it; after a failed one the same mail may wake again."""
        self.keep(wakes=[wake for wake in self.memory["wakes"] if wake > time.time() - HOUR] + [time.time()])
        more = " or more" if counts["more"] else ""
        text = f"agent-bus: {counts['unread']}{more} unread for {self.options.name} ({counts['urgent']} urgent). "
        try:
            RECIPES[self.options.program](self.options.session, f"{text}bus_inbox shows them.")
            self.keep(number=number, newest=latest(counts, self.options.any))
            self.say(f"{self.options.name} was woken")
        except Failed as failed:
            self.say(f"{self.options.name} could not be woken: {failed}")

    def keep(self, **its: Any) -> None:
        if {**self.memory, **its} != self.memory:
            self.memory.update(its)
            self.file.seek(0)
            self.file.write(json.dumps(self.memory))
            self.file.truncate()
            self.file.flush()

    def say(self, line: str, said: str = "") -> None:
        """A line for a person, with the time; `said` is what must not be said again at each look."""
        if line:
            said_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            bus_recv.append(self.log, f"{said_at} {bus_recv.visible(line)}\n")
            bus_recv.complain(line, "bus_wake")
        self.said = said

    @contextlib.contextmanager
    def judged(self) -> Iterator[None]:
        """Refused, if an answer has not the form of a bus's."""
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise bus_recv.Refused(0, f"{self.url} does not answer /digest as a bus does ({error!r})") from None

    def work(self) -> None:
        while True:
            try:
                answers = self.ask("digest?to"), self.ask("agents?name")  # ValueError: our configuration is wrong
                with self.judged():
                    self.look(*answers)
            except bus_recv.Unreachable as fault:
                if (why := bus_recv.no_bus(self.url, fault)) != self.said:
                    self.say(why, why)
            if self.options.once:
                return
            time.sleep(LOOK_SECONDS)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Wake an agent that is closed or idle when urgent mail waits for it.")
    parser.add_argument("name", metavar="NAME", help="whose mail")
    parser.add_argument("program", choices=RECIPES, help="the agent's program")
    parser.add_argument("session", metavar="SESSION", help="its session or thread; OpenCode: http://HOST:PORT/SESSION")
    parser.add_argument("--folder", help="the folder of the session; Claude Code finds it only there")
    parser.add_argument("--any", action="store_true", help="wake for every message, not only for urgent ones")
    budget = f"wakes in one hour at most ({BUDGET})"
    parser.add_argument("--budget", type=bus_recv.count, default=BUDGET, metavar="N", help=budget)
    parser.add_argument("--once", action="store_true", help="look once and end, for cron")
    parser.add_argument("--bus", type=bus_recv.profile, metavar="PROFILE", help="the bus of PROFILE.env")
    options = parser.parse_args(argv)
    try:
        bus_recv.check_name(options.name)
        if options.session.startswith("-"):
            raise ValueError(f"{options.session!r} is an option, not a session")
        for number in bus_recv.ENDS:
            signal.signal(number, lambda *_: sys.exit(143))  # a turn that we have started is killed
        bus_recv.tell_people(lambda line: bus_recv.complain(line, "bus_wake"))
        waker = Waker(options)
        if options.folder:
            os.chdir(options.folder)
        if options.program != "opencode":  # that one is asked by HTTP
            check_program(options.program.partition("-")[0])
        waker.work()
    except KeyboardInterrupt:
        return 130
    except (bus_recv.Refused, bus_recv.Busy) as refused:
        bus_recv.complain(str(refused), "bus_wake")
        return 1
    except (ValueError, OSError, Failed) as error:
        named = isinstance(error, OSError) and error.filename
        bus_recv.complain(f"{named}: {error.strerror}" if named else str(error), "bus_wake")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
