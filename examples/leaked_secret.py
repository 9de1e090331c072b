#!/usr/bin/env python3
"""A password was sent by mistake: find every message that has it, take it away, and tell who must change it.

    AGENT_BUS_URL=http://127.0.0.1:8080 python3 examples/leaked_secret.py

    ann --the password--> bob, carl      bob reads it      ops: search, redact, tell ann      carl reads what is left

What it shows: `GET /search` finds words in all messages that a token may read, and `POST /redact` replaces a text, also
on the disk of the bus. Its answer names who has fetched the message before: for these, only a new password helps. On a
bus with tokens, AGENT_BUS_TOKEN must be an operator's.
"""
import argparse
import os
import pathlib
import secrets
import sys
import tempfile
from urllib.parse import urlencode

# Python 3.8 prints this text. Older ones show the line in a SyntaxError, because they do not know `:=`.
if sys.version_info < (3, 9) and (needs := "leaked_secret.py needs Python 3.9 or later"):  # noqa: UP036
    sys.exit(needs)
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))  # the clients, unless they are installed
import bus_recv
import bus_send

PATIENCE = 10  # s


def ask(path, order=None):
    return bus_recv.ask(bus_recv.settings()["AGENT_BUS_URL"], path, PATIENCE, order)[0]


def read(name):
    """The texts that wait for a name."""
    return [message["msg"] for message in bus_recv.receive(name, timeout=PATIENCE, once=True)]


def with_words(words):
    """The ids of all messages that have these words, in all pages of the answer."""
    before = "now"
    while before:
        answer = ask(f"/search?{urlencode({'q': words, 'before': before})}")
        yield from (message["id"] for message in answer["messages"])
        before = answer["next"]


def show():
    password = f"swordfish-{secrets.token_hex(8)}"
    bus_send.send(["bob", "carl"], f"log in with {password}", sender="ann", patience=PATIENCE)
    print(f"bob reads: {read('bob')[0].replace(password, '(the password)')}")
    while ids := list(with_words(f'"{password}"')):  # until the search finds nothing
        answer = ask("/redact", {"id": ids[0]})
        for each in answer["redacted"]:
            print(f"ops: the message to {each['to']} is redacted; it was {each['state']}")
        knows = ", ".join(answer["fetched_by"]) or "nobody"
        bus_send.send("ann", f"change the password, because of {knows}", sender="ops", patience=PATIENCE)
    print(f"carl reads: {read('carl')[0]}")
    print(f"ann reads: {read('ann')[0]}")
    return 0


def main():
    parser = argparse.ArgumentParser(description="A secret is found and redacted, on the bus at $AGENT_BUS_URL.")
    parser.parse_args()
    url = bus_recv.settings()["AGENT_BUS_URL"]
    try:
        bus_recv.ask(url, "/inbox", 5)  # a look: is a bus there, and may we use it?
    except bus_recv.Unreachable as fault:
        raise OSError(bus_recv.no_bus(url, fault)) from fault
    with tempfile.TemporaryDirectory() as state:
        os.environ["AGENT_BUS_STATE_DIR"] = state
        os.environ["AGENT_BUS_CHANNEL"] = f"leak-{os.urandom(4).hex()}"
        return show()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (bus_recv.Refused, bus_recv.Unreachable, bus_send.Refused, bus_send.Unreachable) as error:
        sys.exit(f"leaked_secret: {error}")
    except (ValueError, OSError) as error:
        sys.exit(f"leaked_secret: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
