"""The server ends again and again while others send and receive: what was acknowledged is there, once, in order."""
import contextlib
import itertools
import random
import sqlite3
import threading

from tests import new_client, old_client
from tests.faults import Result, faulty
from tests.faults.history import Conversation, observed, violations
from tests.processes import Server, wait_until

LIFE = 150  # sends that a server lives through at most; at least none: some die before their first


def storm(directory, deaths, end=Server.kill, **server):
    """End a bus so often, each time after some sends, while three conversations go on; then ask all who were there.

    `end` ends the process, and may do to its disk what goes with it.
    """
    calm = threading.Event()
    with contextlib.ExitStack() as stack:
        bus = stack.enter_context(Server(directory / "bus.db", **server))
        talks = [stack.enter_context(talk) for talk in conversations(bus.url, calm)]
        for _ in range(deaths):
            wait_for_sends(talks, random.randrange(LIFE))
            end(bus)
            bus.start()
        calm.set()
        found = [f"{talk.name}: {violation}" for talk in talks for violation in talk.finish()]
        everything = [each for talk in talks for each in talk.sent]
        found += [f"the log: {violation}" for violation in violations(everything, observed(bus.url))]
        bus.stop()
    with contextlib.closing(sqlite3.connect(bus.db)) as database:
        found += [f"the database: {row[0]}" for row in database.execute("PRAGMA integrity_check") if row[0] != "ok"]
    return Result(f"{deaths} times; {told(talks)}", found)


def told(talks):
    """What there was in these conversations, in figures."""
    sent = [each for talk in talks for each in talk.sent]
    known = sum(each.tick is not None for each in sent)
    delivered = sum(len(talk.delivered) for talk in talks)
    return f"{known:,} acknowledged, {len(sent) - known:,} unknown, {delivered:,} delivered"


def wait_for_sends(talks, more):
    enough = sum(len(talk.sent) for talk in talks) + more
    wait_until(lambda: sum(len(talk.sent) for talk in talks) >= enough)


def conversations(url, calm):
    """One reader that keeps its cursor, one that relies on the bus for it, and one of the old contract."""
    for name, client, senders, settings in (
        ("keeper", new_client, 2, {}),
        ("asker", new_client, 2, {"forgetful": True}),
        ("veteran", old_client, 2, {}),
    ):
        talk = Conversation(client, url, name)
        talk.listen(**settings)
        for number in range(senders):
            texts = (f"message {count}" for count in itertools.count())
            talk.speak(f"{name}-{number}", itertools.takewhile(lambda _: not calm.is_set(), texts))
        yield talk


def early(directory, deaths=5, end=Server.kill):
    """The control: a bus that acknowledges before it commits."""
    return storm(directory, deaths, end, **faulty("early"))
