"""GET /activity: PROTOCOL.md section 23, as far as it takes minutes."""
import json

import pytest

from bus_server import Now, Poll, Put, draft
from tests.kit import inside
from tests.kit.clock import Clock

START = 1_795_203_600_000_000  # a tick
MINUTE = 60_000_000


@pytest.fixture
def bus():
    bus = inside.make(":memory:")
    bus.mailboxes.clock = Clock()
    yield bus
    inside.close(bus)


def asked(bus, query=""):
    return json.loads(bus.routes["GET", "/activity"].call(inside.Asks(query)).body)


def activity(bus):
    return bus.routes["GET", "/activity"].call.__self__


def poll(bus, name, hold=50.0):
    its = Poll(name, (name, "all"), "default", None, 0, 1, hold, False)
    activity(bus).polled(None, its)
    bus.mailboxes.polled(its, "127.0.0.1", bus.view.clock())
    return its


def passes(bus, minutes=1):
    for _ in range(minutes):
        bus.mailboxes.clock.now += 60
        activity(bus).minute_over()


def test_what_was_said_and_refused_in_a_minute_stays_with_it(bus):
    bus.figures.messages, bus.figures.refused[429] = 7, 2
    passes(bus)
    bus.figures.messages += 3
    bus.figures.refused[404] += 1
    *_, last, running = asked(bus)["minutes"]
    assert [(each["messages"], each["refused"]) for each in (last, running)] == [(7, 2), (3, 1)]
    passes(bus, 100)
    found = asked(bus)["minutes"]
    assert len(found) == 60 and not any(each["messages"] for each in found)


def test_a_name_was_there_in_the_minutes_in_which_it_listened(bus):
    def presence(*names):
        return list(asked(bus, f"name={','.join(names)}")["presence"].values())

    assert presence("bob", "carl") == ["0", "0"]
    passes(bus)
    its = poll(bus, "bob")
    assert presence("bob", "carl", "all") == ["01", "00", "00"]
    passes(bus)  # its hold and the time after it last 60 s, and it polls in time
    bus.mailboxes.clock.now -= 1
    poll(bus, "bob", 25.0)
    bus.mailboxes.clock.now += 1
    assert presence("bob") == ["011"]
    passes(bus, 2)
    assert presence("bob") == ["01100"]
    poll(bus, "bob", 60.0)
    passes(bus)
    assert presence("bob") == ["011011"], "it is parked"
    bus.mailboxes.left(its)
    passes(bus)
    assert presence("bob")[0][-1] == "0"
    passes(bus, 100)
    assert presence("bob") == ["0" * 60]


def test_of_very_many_names_those_that_polled_last_are_known(bus, monkeypatch):
    monkeypatch.setattr(activity(bus), "NAMES", 2)
    for name in ("ann", "bob", "ann", "carl"):
        poll(bus, name)
    assert asked(bus, "name=ann,bob,carl")["presence"] == {"ann": "1", "bob": "0", "carl": "1"}


def test_the_minutes_before_the_start_are_told_as_far_as_the_newest_messages_tell(bus, monkeypatch):
    for ago, number in ((70, 5), (30, 2), (3, 4), (1, 3)):
        at = START - ago * MINUTE + 1
        some = [draft({"from": "ann", "to": "bob", "msg": "x"}, None) for _ in range(number)]
        bus.state.apply([Put(some)], Now(at, at))
    here = activity(bus)
    here.begin = START
    found = {(START - minute.begin) // MINUTE: minute.messages for minute in here.before_the_start()}
    assert list(found) == list(range(59, 0, -1)) and {ago: n for ago, n in found.items() if n} == {30: 2, 3: 4, 1: 3}
    monkeypatch.setattr(here, "NEWEST", 8)  # of the minute 30 ago they would show one message of two
    assert [minute.messages for minute in here.before_the_start()][-3:] == [4, 0, 3]
    assert len(here.before_the_start()) == 29
