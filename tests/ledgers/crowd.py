"""Thousands of readers wait at two fronts of three nodes, half of them at each, and one front dies.

A reader keeps its cursor, and polls at the other front when one hangs up. Nobody sends to it while it is at the first
front: one message comes when that front has died, and one when all readers wait at the other front.
"""
import contextlib
import itertools
import selectors
import threading
import time
from collections import Counter

from tests.core.test_parked import ARRAY, HEALTH, WAVE, Peer, poll, post
from tests.faults import Result, unless
from tests.faults.history import background
from tests.kit.nodes import Nodes
from tests.kit.peers import many_files, metric

HOLD = 60  # s of a poll, the longest that the bus allows
PATIENCE = 60  # s for something to come to all
ENGINE = 3  # connections to PostgreSQL that a front may have: deploy/cluster/patroni.yml counts on it
CONNECTIONS = "SELECT application_name, count(*) FROM pg_stat_activity WHERE usename = 'bus' GROUP BY 1"
TEXTS = "meanwhile", "and then"


class Reader:
    def __init__(self, name, buses, since):
        self.name, self.buses, self.since, self.got = name, itertools.cycle(buses), since, []
        self.reach()

    def reach(self):
        """The next front that takes a connection."""
        for bus in self.buses:
            with contextlib.suppress(OSError):
                self.peer = Peer(bus)
                self.poll()
                return

    def poll(self):
        self.peer.ask(poll(self.name, self.since, HOLD))


class Crowd:
    """`anew`: at another front, its readers begin with what comes from now on."""

    def __init__(self, size, a, b, anew):
        self.anew, self.readers, self.selector, self.came = anew, [], selectors.DefaultSelector(), 0
        since = Peer(a).exchange(HEALTH)["now"]
        controls = [Peer(a), Peer(b)]
        for number in range(size):
            reader = Reader(f"reader-{number}", (b, a) if number % 2 else (a, b), since)
            self.readers.append(reader)
            self.selector.register(reader.peer, selectors.EVENT_READ, reader)
            if number % WAVE == 0:
                for control in controls:
                    control.exchange(HEALTH)  # it is behind the polls before

    def attend(self, fact, patience=PATIENCE):
        """Let them read, and poll again, until this is so; False if it is not in time."""
        deadline = time.monotonic() + patience
        while not fact():
            if time.monotonic() > deadline:
                return False
            for key, _ in self.selector.select(0.1):
                self.read(key.data)
        return True

    def read(self, reader):
        try:
            answer = reader.peer.read()
        except (AssertionError, OSError):  # it hung up
            self.selector.unregister(reader.peer)
            reader.peer.socket.close()
            reader.since = "now" if self.anew else reader.since
            reader.reach()
            self.selector.register(reader.peer, selectors.EVENT_READ, reader)
            return
        if answer:
            reader.got += [each["msg"] for each in answer["messages"]]
            self.came += len(answer["messages"])
            reader.since = answer["now"]
            reader.poll()

    def tell(self, bus, text):
        """Send this to each of them."""
        control, messages = Peer(bus), [{"from": "ann", "to": each.name, "msg": text} for each in self.readers]
        for start in range(0, len(messages), ARRAY):
            control.exchange(post(messages[start : start + ARRAY]))

    def violations(self):
        found = [f"lost: {text!r} to {each.name}" for each in self.readers for text in TEXTS if text not in each.got]
        return found + [f"duplicated: {each.got} to {each.name}" for each in self.readers if len(each.got) > len(TEXTS)]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for reader in self.readers:
            reader.peer.socket.close()
        self.selector.close()


class Connections:
    """How many each front has to PostgreSQL: the most at once, of some looks in each second."""

    def __init__(self, leader):
        self.leader, self.most, self.over = leader, Counter(), threading.Event()
        self.work = background(self.look)

    def look(self):
        while not self.over.wait(0.2):
            for name, count in (line.split("|") for line in self.leader.ask(CONNECTIONS)):
                self.most[name] = max(self.most[name], int(count))

    def violations(self):
        found = unless(set(self.most) == {"a", "b"}, f"the connections are those of {sorted(self.most)}")
        return found + unless(max(self.most.values()) <= ENGINE, f"connections to PostgreSQL: {dict(self.most)}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.over.set()
        self.work.result(PATIENCE)


def front_dies(place, size, anew=False, patience=PATIENCE):
    with many_files(), Nodes() as nodes, contextlib.ExitStack() as stack:
        a, b = (stack.enter_context(nodes.front(place / f"{name}.db", env={"PGAPPNAME": name})) for name in "ab")
        connections = stack.enter_context(Connections(nodes.leader()))
        crowd = stack.enter_context(Crowd(size, a, b, anew))
        half = [size / 2, size / 2]
        assert crowd.attend(lambda: [metric(bus, "parked") for bus in (a, b)] == half), "not all of them wait"
        a.kill()
        times = []
        for number, text in enumerate(TEXTS, 1):
            began = time.monotonic()
            crowd.tell(b, text)
            crowd.attend(lambda: crowd.came >= number * size, patience)  # noqa: B023
            times.append(time.monotonic() - began)
            assert crowd.attend(lambda: metric(b, "parked") == size), "not all of them wait at the other front"
        found = crowd.violations() + connections.violations()
    all_had = "after {:.1f} s all had what was sent at the kill, after {:.1f} s what was sent then".format(*times)
    return Result(f"{all_had}; {max(connections.most.values())} connections to PostgreSQL at most", found)


def begin_anew(place):
    """The control: they lose what was sent while they were at no front."""
    return front_dies(place, 400, anew=True, patience=5)
