"""Schedules that are due: what happens if the send is refused, and what one owner can hold up."""
import json
import sqlite3
import time

import pytest

import bus_server
from bus_server import State, nothing_follows
from tests.core.test_connection import come_true
from tests.extensions.test_later import (  # noqa: F401
    BEGIN,
    EXAMPLE,
    MINUTE,
    bus,
    closed,
    due_of,
    give,
    listed,
    looked,
    mail,
    refused,
    schedules,
    sending,
)
from tests.faults.test_kinds_bounds import Guest
from tests.kit import inside
from tests.kit.processes import in_cpu


def fill(bus, monkeypatch, full):  # noqa: F811
    monkeypatch.setattr(bus_server, "MAILBOX_MESSAGES", 2 if full else 10000)
    monkeypatch.setattr(bus_server, "MUCH_MESSAGES", 1 if full else 7500)


def test_a_message_for_a_full_mailbox_waits_with_its_reason_until_there_is_room(bus, monkeypatch):  # noqa: F811
    guest = Guest(bus)
    guest.sends("bob")
    guest.sends("bob")
    give(guest, "late", after=0)
    fill(bus, monkeypatch, True)
    looked(bus)
    [found] = listed(guest)
    assert (found["state"], found["tries"]) == ("waiting", 1) and "the mailbox of bob is full" in found["reason"]
    assert found["due"] * 1e6 >= bus.wall.now + 60 * 1000000  # as its Retry-After says
    looked(bus)
    assert listed(guest) == [found]
    fill(bus, monkeypatch, False)
    bus.wall.now = round(found["due"] * 1e6)
    looked(bus)
    assert mail(bus) == ["x", "x", "late"] and listed(guest) == []


def test_it_is_tried_so_often_and_a_repeat_goes_on_at_its_next_time(bus, monkeypatch):  # noqa: F811
    guest = Guest(bus)
    guest.sends("bob")
    guest.sends("bob")
    give(guest, "once", after=0)
    give(guest, "each", cron="0 * * * *")
    fill(bus, monkeypatch, True)
    bus.wall.now += 20 * MINUTE
    at = []
    for _ in range(sending().TRIES):
        looked(bus)
        at.append([each["due"] for each in listed(guest)])
        bus.wall.now += 11 * MINUTE
    once, each = listed(guest)
    assert once["state"] == "failed" and once["tries"] == sending().TRIES and "is full" in once["reason"]
    assert each["state"] == "waiting" and each["tries"] == 0 and "is full" in each["reason"] and each["at"] > at[0][1]
    waits = [later[0] - earlier[0] for earlier, later in zip(at, at[1:-1])]
    assert sorted(waits)[-1] >= 600 and sum(waits) > 3000


@pytest.mark.parametrize("members", [{"reply_to": "1"}, {"type": "task"}])
def test_a_refusal_for_good_is_not_tried_again(bus, members, monkeypatch):  # noqa: F811
    guest = Guest(bus)
    guest.asks("POST", "/later", {"after": 0, "message": {**EXAMPLE, **members}})

    def never(messages):
        raise bus_server.Refused(400, "no such message any more")

    monkeypatch.setattr(bus, "checks", [never])
    looked(bus)
    [found] = listed(guest)
    assert (found["state"], found["reason"], found["due"]) == ("failed", "no such message any more", None)


def test_the_rate_of_its_sender_holds_back_what_is_due(bus):  # noqa: F811
    guest = Guest(bus)
    for number in range(5):
        give(guest, str(number), after=1 + number / 1000)  # none of them before the clock moves
    bus.storms.sends = bus_server.Budget(time.monotonic, 0.001, 2)
    bus.wall.now += MINUTE
    looked(bus)
    assert mail(bus) == ["0", "1"]
    assert ["sends faster than" in each["reason"] for each in listed(guest)] == [True] * 3


def test_a_failed_schedule_leaves_the_list_after_keep(bus, monkeypatch):  # noqa: F811
    guest = Guest(bus)
    give(guest, after=0)
    monkeypatch.setattr(bus, "checks", [lambda messages: (_ for _ in ()).throw(bus_server.Refused(400, "no"))])
    looked(bus)
    bus.retention.keep = 86400.0
    monkeypatch.setattr(bus.retention, "clock_is_trusted", lambda: True)
    due = due_of(bus)
    due.tidy()
    looked(bus)
    assert len(listed(guest)) == 1 and due.held.all > 0
    bus.wall.now += 86401 * 1000000
    due.tidy()
    looked(bus)
    assert listed(guest) == [] and due.held.all == 0


def test_a_full_disk_leaves_a_schedule_as_it_is(bus, monkeypatch):  # noqa: F811
    guest = Guest(bus)
    give(guest, after=0)
    real = State.apply

    def full(self, operations, now):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(State, "apply", full)
    looked(bus)
    assert due_of(bus).pause > time.monotonic()
    monkeypatch.setattr(State, "apply", real)
    assert mail(bus) == [] and [each["tries"] for each in listed(guest)] == [0]
    looked(bus)
    assert mail(bus) == ["x"]


def test_a_schedule_that_fails_the_bus_is_tried_again_later_and_holds_up_no_other(bus, monkeypatch, capfd):  # noqa: F811
    guest = Guest(bus)
    give(guest, "poison", after=0)
    give(guest, "whole", after=0)

    def check(messages):
        assert messages[0]["msg"] != "poison"

    monkeypatch.setattr(bus, "checks", [check])
    looked(bus)
    [found] = listed(guest)
    assert mail(bus) == ["whole"] and (found["tries"], found["state"]) == (1, "waiting")
    assert "AssertionError" in inside.said(capfd)


# Bounds


def test_the_schedules_of_one_owner_and_of_all_have_a_budget(closed, monkeypatch):  # noqa: F811
    assert sending().EACH // sending().ROW < 100_000
    alice, bob = Guest(closed, closed.tokens["alice"]), Guest(closed, closed.tokens["bob"])
    due = due_of(closed)
    due.held.most_each, due.held.most = 5 * 1100, 8 * 1100
    ids = [give(alice)["id"] for _ in range(5)]
    status, error = refused(alice, {"after": 1, "message": {"to": "bob", "msg": "x"}})
    assert status == 429 and "take some back" in error
    for _ in range(3):
        give(bob)
    assert refused(bob, {"after": 1, "message": {"to": "bob", "msg": "x"}})[0] == 429
    alice.asks("POST", "/later", {"cancel": ids[0]})
    assert give(alice)["duplicate"] is False
    held = due.held.all
    inside_again = due.__class__(closed)
    assert inside_again.held.all == held and inside_again.held.held == due.held.held  # as a start counts them


def test_while_most_of_the_room_for_schedules_is_taken_there_is_some_for_those_who_have_few(closed, monkeypatch):  # noqa: F811
    """Eight tokens with as much as one may have took all of it."""
    assert sending().ALL - sending().MUCH >= 32 * sending().FEW
    monkeypatch.setattr(sending(), "MUCH", 6 * 1100)
    monkeypatch.setattr(sending(), "FEW", 2 * 1100)
    alice, bob = Guest(closed, closed.tokens["alice"]), Guest(closed, closed.tokens["bob"])
    for _ in range(6):
        give(alice)
    for who in (bob, bob, alice):
        status = who.begins("POST", "/later", {"after": 1, "message": {"to": "bob", "msg": "x"}}).answer().status
        assert status == (429 if who is alice else 200)
    assert refused(bob, {"after": 1, "message": {"to": "bob", "msg": "x"}})[0] == 429


def test_ten_thousand_that_are_due_go_in_slices_in_order_and_each_once(bus):  # noqa: F811
    many = 10_000

    def facts(number):
        message = {**EXAMPLE, "to": f"bob{number % 7}", "msg": str(number)}
        return [f"{number:016x}", "ann", "", "127.0.0.1", None, json.dumps(message)]

    keeps = [schedules().Keep(facts(number), BEGIN + number) for number in range(many)]
    bus.do(bus_server.Raise(BEGIN), None, nothing_follows)
    come_true(bus.ledger.idle)
    bus.state.apply(keeps, bus.clock.now())
    bus.wall.now += MINUTE
    due, most = due_of(bus), 0
    due.first, slow = {"127.0.0.1": BEGIN}, []  # as at a start
    while bus.view.ask("SELECT 1 FROM later LIMIT 1"):
        began = time.thread_time()
        due.pause = 0.0
        due.look()
        most = max(most, len(due.sending))
        assert not bus.view.ask("SELECT reason FROM later WHERE reason IS NOT NULL")
        bus.loop.take_turn()
        slow.append(time.thread_time() - began)
    assert most == sending().SLICE
    assert sorted(slow)[-5] < in_cpu(0.1)  # with the commit, which is aside
    ticks = bus.view.database.execute("SELECT text FROM messages ORDER BY tick").fetchall()
    assert [json.loads(f"{{{text}}}")["msg"] for (text,) in ticks] == [str(number) for number in range(many)]


@pytest.mark.parametrize("count, msg", [(250, "x"), (20, "y" * 200_000)])
def test_what_is_due_of_one_owner_holds_up_no_other(closed, count, msg):  # noqa: F811
    """Each look sends a slice, so 250 small or 20 large ones alone would take three looks."""
    alice, bob = Guest(closed, closed.tokens["alice"]), Guest(closed, closed.tokens["bob"])
    for number in range(count):
        give(bob, f"{number} {msg}", to="alice", after=1 + number / 1000)
    give(alice, "mine", to="admin", after=30)
    closed.wall.now += MINUTE
    looked(closed)
    looked(closed)
    assert mail(closed, "admin") == ["mine"]
    while listed(bob, "?max=1"):
        looked(closed)
    assert [each.split()[0] for each in mail(closed, "alice")] == [*map(str, range(count))]


def test_an_owner_above_its_rate_holds_up_no_other(closed):  # noqa: F811
    """What is refused takes as much time as what is sent."""
    alice, bob = Guest(closed, closed.tokens["alice"]), Guest(closed, closed.tokens["bob"])
    for number in range(300):
        give(bob, to="alice", after=1 + number / 1000)
    give(alice, "mine", to="admin", after=30)
    closed.storms.sends = bus_server.Budget(time.monotonic, 0.001, 2)
    closed.wall.now += MINUTE
    looked(closed)
    assert mail(closed, "admin") == ["mine"] and len(mail(closed, "alice")) == 2


def test_more_owners_than_a_look_has_time_for_come_in_turns(bus):  # noqa: F811
    many = 3 * sending().SLICE
    for number in range(many):
        give(Guest(bus, address=f"127.1.{number % 3}.{number // 3}"), str(number))
    bus.wall.now += MINUTE
    for number in range(3):
        looked(bus)
        assert len(mail(bus)) == (number + 1) * sending().SLICE
    for _ in range(3):
        looked(bus)
    assert due_of(bus).first == {}, "who has nothing to be sent is forgotten"
