"""Connections that wait: what they cost others, however many there are.

Found by an attack on 2026-11-29; each test was red on the code that it attacked.

| test | what was seen before |
|---|---|
| an_owner_has_eight_observers | one token parks 3,000 |
| each_observer_looks_at_new_messages_in_a_turn_of_its_own | 3,000 of them and 5,000 messages: 2.2 s in one turn |
| messages_that_are_read_one_by_one_find_their_own_watchers | each walks all watchers of the mailbox: 308 ms |
| a_list_of_names_looks_at_so_many_expired_messages | it looks at all of them, each time: 416 ms |
"""
import time

import pytest

from bus_extensions.replies import fetches
from bus_server import PARKED, PARKED_PER_NAME, Poll, wall_clock
from tests.faults.test_kinds_bounds import Guest, counted, part_of, passed, steps_of
from tests.kit.peers import mint
from tests.kit.wire import a_bus, come_true


@pytest.fixture
def bus(tmp_path):
    with a_bus(time.monotonic, tmp_path / "bus.db") as bus:
        yield bus


# Observers


def observers(bus, count, query="", **who):
    """So many that wait for new messages; each from an address of its own, if nobody says who."""
    since = f"{bus.last / 1000000:.6f}"
    guests = [Guest(bus, **(who or {"address": f"10.0.0.{number}"})) for number in range(count)]
    return [guest.begins("GET", f"/log?since={since}&wait=60{query}") for guest in guests]


def texts(guest):
    return [each["msg"] for each in guest.answer().json()["messages"]]


@pytest.mark.parametrize("owner", ["a token", "an address"])
def test_an_owner_has_eight_observers(tmp_path, owner):
    """Who waits longest is told that there is nothing new. Those of another owner are not counted."""
    of = mint(tmp_path / "bus.db", ann=["--operator"], bob=[]) if owner == "a token" else {}
    with a_bus(time.monotonic, tmp_path / "bus.db") as bus:
        mine, other = [{"token": of[name]} if of else {"address": name} for name in ("ann", "bob")]
        first = observers(bus, 1, **other)
        guests = observers(bus, PARKED_PER_NAME + 4, **mine)
        come_true(lambda: bus.sweep() or all(guest.heard for guest in guests[:4]))
        assert [texts(guest) for guest in guests[:4]] == [[]] * 4
        Guest(bus, **mine).asks("POST", "/send", {"from": "ann", "to": "bob", "msg": "x"})
        assert [texts(guest) for guest in first + guests[4:]] == [["x"]] * (PARKED_PER_NAME + 1)
        assert not bus.mailboxes.parked and not bus.mailboxes.waiting


def test_each_observer_looks_at_new_messages_in_a_turn_of_its_own(bus, monkeypatch):
    """And no observer looks at a message again: its cursor moves."""
    guests = observers(bus, 20, "&from=nobody")
    looks, wants = [], Poll.wants
    monkeypatch.setattr(Poll, "wants", lambda poll, message: looks.append(1) or wants(poll, message))
    bus.loop.BUDGET = -1  # one action in each turn
    with counted(bus.loop, "take_turn", lambda arguments, result: len(looks)) as turns:
        Guest(bus).asks("POST", "/send", [{"from": "eve", "to": "bob", "msg": "x"}] * 50)
        come_true(lambda: len(looks) >= 20 * 50 and not bus.loop.actions)
    most = max(after - before for before, after in zip([0, *turns], turns))
    assert most <= 50, f"{most} looks in a turn"
    assert {poll.since for poll in bus.mailboxes.parked.values()} == {bus.last}
    del looks[:]
    Guest(bus).asks("POST", "/send", {"from": "nobody", "to": "bob", "msg": "y"})
    assert [texts(guest) for guest in guests] == [["y"]] * 20 and len(looks) <= 2 * 20


def test_an_observer_is_woken_by_all_that_it_may_read(bus):
    [guest] = observers(bus, 1)
    bus.view.clock = lambda: wall_clock() + 3600 * 1000000
    Guest(bus).sends("bob", "expired", ttl=1)
    come_true(lambda: not bus.loop.actions)
    assert not guest.heard, "there is nothing that it may read"
    sent = ("bob", "lab"), ("ann", "x")
    drafts = [{"from": "eve", "to": to, "channel": channel, "msg": to} for to, channel in sent]
    Guest(bus).asks("POST", "/send", drafts)
    answer = guest.answer().json()
    assert [each["msg"] for each in answer["messages"]] == ["bob", "ann"] and not answer["more"]


def test_an_observer_whose_time_is_over_before_its_turn_gets_what_came(bus):
    [guest] = observers(bus, 1)
    bus.receiving.observe = lambda connection, visible: None  # its turn does not come
    Guest(bus).sends("bob", "x")
    guest.connection.wait(PARKED, 0)
    come_true(lambda: bus.sweep() or guest.heard)
    assert texts(guest) == ["x"]


# Those who wait for a fetch


class Walked(dict):
    """Connections; counts how many were looked at one after the other."""

    looked = 0

    def __iter__(self):
        for each in super().__iter__():
            self.looked += 1
            yield each


@pytest.mark.parametrize(("how", "walked"), [("/thread/{root}", 0), ("/recv?to=dell&since={behind}", 1)])
def test_messages_that_are_read_one_by_one_find_their_own_watchers(tmp_path, how, walked):
    """All watchers of a mailbox are walked once by a mark, and by no message that is read alone."""
    of = mint(tmp_path / "bus.db", spark=[], dell=[])
    with a_bus(time.monotonic, tmp_path / "bus.db") as bus:
        spark, dell = Guest(bus, of["spark"]), Guest(bus, of["dell"])
        root = spark.asks("POST", "/send", {"to": "dell", "msg": "x"}).json()["id"]
        sent = spark.asks("POST", "/send", [{"to": "dell", "msg": "x", "reply_to": root}] * 30).json()["results"]
        guests = [Guest(bus, of["spark"]).begins("GET", f"/message/{each['id']}?wait_fetched=50") for each in sent]
        come_true(lambda: len(bus.mailboxes.parked) == 30)
        key = f"{fetches.FETCHES} default", "dell"
        watchers = bus.mailboxes.waiting[key] = Walked(bus.mailboxes.waiting[key])
        dell.asks("GET", how.format(root=root, behind=f"{sent[-1]['ts']:.6f}"))
        assert {guest.answer().json()["state"] for guest in guests} <= {"fetched", "acknowledged"}
        assert watchers.looked == 30 * walked and not bus.mailboxes.waiting


# The oldest unread message of each name


def oldest(guest):
    return {each["name"]: each["oldest"] for each in guest.asks("GET", "/agents").json()["agents"]}


def test_a_list_of_names_looks_at_so_many_expired_messages(bus):
    """And the next one goes on there, until it has what there is."""
    part_of(bus, "/agents", "GET").LOOKED = 100
    guest, names = Guest(bus), ["n1", "n2", "n3"]
    for own in names:
        guest.asks("GET", f"/recv?to={own}&since=0")
    guest.asks("POST", "/send", [{"from": "eve", "to": names, "msg": "x", "ttl": 0.001}] * 500)
    living = guest.sends("n2")["ts"]
    passed(bus)
    guest.asks("GET", "/inbox")  # it counts the expired
    for _ in range(17):
        with steps_of(bus.view.database) as steps:
            found = oldest(guest)
        assert len(steps) < 60, f"{len(steps)} hundred steps of SQLite"
    assert found == {"n1": None, "n2": living, "n3": None, "eve": None}
    later = guest.sends("n1")["ts"]
    assert oldest(guest)["n1"] == later and oldest(guest)["n2"] == living


def test_what_had_expired_above_the_mark_of_a_group_says_nothing_of_its_new_owner(bus):
    """A group's mark is behind what was delivered; a new owner has read nothing yet."""
    guest = Guest(bus)
    living = guest.sends("team")["ts"]
    guest.asks("GET", "/recv?to=me,team&since=0")
    guest.asks("POST", "/send", [{"from": "eve", "to": "team", "msg": "x", "ttl": 0.001}] * 3)
    passed(bus)
    assert oldest(guest).get("team") is None
    guest.asks("GET", "/recv?to=team&since=0")
    assert oldest(guest)["team"] == living


def test_what_had_expired_is_mail_again_when_the_clock_steps_back(bus):
    """For a list of names, and for the mark of a group: it moves over no message that nobody got."""
    guest = Guest(bus)
    first = guest.sends("team", ttl=3600)["ts"]
    guest.sends("team", ttl=3600)
    guest.asks("GET", "/recv?to=me,team&since=now")
    running = bus.view.clock
    for ahead, found in ((0, first), (86400, None), (0, first)):
        bus.view.clock = lambda ahead=ahead: running() + ahead * 1000000
        assert oldest(guest)["team"] == found
    guest.asks("GET", f"/recv?to=me,team&since={first:.6f}")
    assert oldest(guest)["team"] == first
