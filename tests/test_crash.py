"""kill -9 of the server under load, again and again: what was acknowledged is there, once, in order.

KILLS=100 python3 -m pytest tests/test_crash.py for more crashes than every day; python3 -m tests.test_crash 1000 for as
many without pytest and with figures.
"""
import contextlib
import http.client
import itertools
import os
import pathlib
import random
import sqlite3
import sys
import tempfile
import threading

from tests import new_client, old_client
from tests.history import Conversation, observed, tick, violations
from tests.processes import Server, wait_until

KILLS = int(os.environ.get("KILLS", "60"))
LIFE = 150  # sends that a server lives through at most; at least none: some die before their first


def storm(directory, deaths, script="bus_server.py", end=Server.kill):
    """End a bus so often while others send and receive; returns the conversations, and what is wrong with them."""
    calm = threading.Event()
    with contextlib.ExitStack() as stack:
        bus = stack.enter_context(Server(directory / "bus.db", script=script))
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
    return talks, found


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


def test_nothing_acknowledged_is_lost_when_the_server_is_killed(tmp_path):
    _, found = storm(tmp_path, KILLS)
    assert found == []


def test_a_bus_that_acknowledges_before_it_commits_is_found_out(tmp_path_factory):
    _, stopped = storm(tmp_path_factory.mktemp("stopped"), 5, script="tests/early_server.py", end=Server.stop)
    assert stopped == []
    _, killed = storm(tmp_path_factory.mktemp("killed"), 5, script="tests/early_server.py")
    assert any(": lost: " in violation for violation in killed)


def test_a_retry_of_a_send_whose_answer_the_crash_took_is_stored_once(bus):
    connection = http.client.HTTPConnection("127.0.0.1", bus.port)
    connection.request("POST", "/send", new_client.keyed("ann", "bob", "did you get this?"))
    stored = wait_until(lambda: observed(bus.url))
    bus.kill()
    bus.start()
    ts = new_client.send(bus.url, "ann", "bob", "did you get this?")
    assert [each.tick for each in stored] == [tick(ts)]
    assert observed(bus.url) == stored


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        talks, found = storm(pathlib.Path(directory), int(sys.argv[1]))
    for talk in talks:
        known = sum(each.tick is not None for each in talk.sent)
        print(f"{talk.name}: {known} acknowledged, {len(talk.sent) - known} unknown, {len(talk.delivered)} delivered")
    print("\n".join(found) or "no violation")
    sys.exit(1 if found else 0)
