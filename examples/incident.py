#!/usr/bin/env python3
"""Five agents handle an incident, each a process of its own: a thread of replies that survives its bus.

    AGENT_BUS_URL=http://127.0.0.1:8080 python3 examples/incident.py

    watch --alarm--> triage --question--> logs, metrics --answers--> triage --finding--> scribe --closed--> all of them

What it shows: `reply_to` makes one thread of all that is said about the alarm (GET /thread/ID). Kill the bus at any
moment and start it again: receive() keeps its place, and send() tries again. Each message has a key that is made from
the message it answers, so an agent that sees a question twice, after a crash, still answers it once.
"""
import argparse
import os
import pathlib
import subprocess
import sys
import tempfile

# Python 3.8 prints this text. Older ones show the line in a SyntaxError, because they do not know `:=`.
if sys.version_info < (3, 9) and (needs := "incident.py needs Python 3.9 or later"):  # noqa: UP036
    sys.exit(needs)
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))  # the clients, unless they are installed
import bus_recv
import bus_send

PATIENCE = 120  # s that an agent goes on without a bus, or without the others


def say(to, msg, kind, about=None):
    """Send; `about` is the message that this one answers. It is stored once, however often we come here for that."""
    parent = about and about["id"]
    bus_send.send(to, msg, type=kind, reply_to=parent, key=f"{kind}-{parent}", patience=PATIENCE)


def heard(*kinds):
    """The messages of these types for us, until somebody says that the incident is closed."""
    for message in bus_recv.receive(os.environ["AGENT_NAME"], timeout=PATIENCE):
        print(f"{os.environ['AGENT_NAME']}: {message['from']} says: {message['msg']}", flush=True)
        if message.get("type") in kinds:
            yield message
        if message.get("type") == "closed":
            return


def watch():
    say("triage", "db1: the disk is 97 % full", "alarm")
    for _ in heard():
        pass


def triage():
    answers = {}
    for message in heard("alarm", "answer"):
        if message["type"] == "alarm":
            alarm = message
            say(["logs", "metrics"], f"what do you see? {alarm['msg']}", "question", alarm)
        else:
            answers[message["from"]] = message["msg"]
        if len(answers) == 2:
            finding = ", and ".join(answers[name] for name in sorted(answers))
            say("scribe", finding, "finding", alarm)


def logs():
    for question in heard("question"):
        say("triage", "a query writes 2 GB of temporary files", "answer", question)


def metrics():
    for question in heard("question"):
        say("triage", "the disk grows by 1 % a minute since 14:02", "answer", question)


def scribe():
    for finding in heard("finding"):
        say(["watch", "triage", "logs", "metrics"], f"the cause is known: {finding['msg']}", "closed", finding)
        print(f"all that was said: {bus_recv.settings()['AGENT_BUS_URL']}/thread/{finding['id']}", flush=True)
        return


AGENTS = {agent.__name__: agent for agent in (watch, triage, logs, metrics, scribe)}


def main():
    """Start the five, on a channel of their own, and wait for them."""
    parser = argparse.ArgumentParser(description="Five agents handle an incident on the bus at $AGENT_BUS_URL.")
    parser.add_argument("agent", nargs="?", choices=AGENTS, help="be only this one (all five)")
    if agent := parser.parse_args().agent:
        os.environ.setdefault("AGENT_NAME", agent)
        return AGENTS[agent]()
    url = bus_recv.settings()["AGENT_BUS_URL"]
    try:
        bus_recv.ask(url, "/inbox", 5)  # a look: is a bus there, and may we use it?
    except bus_recv.Unreachable as fault:
        raise OSError(bus_recv.no_bus(url, fault)) from fault
    with tempfile.TemporaryDirectory() as state:
        given = {**os.environ, "AGENT_BUS_STATE_DIR": state}
        given["AGENT_BUS_CHANNEL"] = f"incident-{os.urandom(4).hex()}"
        agents = []
        for name in AGENTS:
            agents.append(subprocess.Popen([sys.executable, __file__, name], env={**given, "AGENT_NAME": name}))
        return max(agent.wait() for agent in agents)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (bus_recv.Refused, bus_recv.Unreachable, bus_send.Refused, bus_send.Unreachable) as error:
        sys.exit(f"incident: {error}")
    except (ValueError, OSError) as error:
        sys.exit(f"incident: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
