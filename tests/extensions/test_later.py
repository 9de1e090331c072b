"""POST and GET /later: PROTOCOL.md section 27, as far as one token and one outside look cannot show it."""

import contextlib
import datetime
import json
import math
import random
import sqlite3
import sys
import time

import pytest

import bus_server
from bus_server import State
from tests.core.test_connection import a_bus, come_true
from tests.core.test_identity import ask
from tests.extensions.test_alone import copy, refuses_to_start, server
from tests.faults.clock import SteppedServer
from tests.faults.test_kinds_bounds import Guest
from tests.kit import inside
from tests.kit.clock import Clock
from tests.kit.peers import mint, set_revoked
from tests.kit.processes import ROOT, Server, wait_until

BEGIN = 1795203600 * 1000000  # us: 2026-11-20, 19:40:00 UTC
MINUTE = 60 * 1000000
GRANTS = {"alice": [], "bob": [], "sensor": ["--send-only"], "admin": ["--operator"]}


def schedules():
    """The second file of the extension, as the bus has loaded it last."""
    return sys.modules["_later_schedule"]


def sending():
    return sys.modules["_later_due"]


def due_of(bus):
    """The part of the extension that sends."""
    return bus.routes["POST", "/later"].call.__self__.due


def set_clock(bus, clock):
    bus.view.clock = bus.clock.wall = bus.mailboxes.wall = clock


@pytest.fixture
def bus(tmp_path):
    """A bus inside the test, whose wall clock the test moves."""
    with a_bus(time.monotonic, tmp_path / "bus.db") as bus:
        bus.wall = Clock(BEGIN)
        set_clock(bus, bus.wall)
        due_of(bus).pause = math.inf
        yield bus


@pytest.fixture
def closed(tmp_path):
    """The same with tokens."""
    tokens = mint(tmp_path / "bus.db", **GRANTS)
    with a_bus(time.monotonic, tmp_path / "bus.db") as bus:
        bus.tokens, bus.wall, bus.db = tokens, Clock(BEGIN), str(tmp_path / "bus.db")
        set_clock(bus, bus.wall)
        due_of(bus).pause = math.inf
        yield bus


def test_who_gives_lines_that_take_long_pays_for_them(bus):
    """Each such line is looked at day by day, for 41 years."""
    guest, storms = Guest(bus, address="127.0.0.9"), bus.storms
    storms.work.rate = storms.WORK
    order = {"cron": "0 0 31 2,4,6,9,11 *", "message": {"from": "eve", "to": "bob", "msg": "x"}}
    assert guest.begins("POST", "/later", order).answer().status == 400
    assert storms.work.left["127.0.0.9/"][0] < storms.WORK_BURST - 50_000
    storms.worked("127.0.0.9", "", 2 * storms.WORK_BURST)
    assert guest.begins("POST", "/later", order).answer().status == 429


def give(guest, msg="x", to="bob", **members):
    """The answer to a schedule that must be taken; due in a minute if nothing else is said."""
    sender = {} if guest.token else {"from": "ann"}
    when = {} if {"at", "after", "cron"} & set(members) else {"after": 60}
    return guest.asks("POST", "/later", {**when, **members, "message": {**sender, "to": to, "msg": msg}}).json()


def refused(guest, body, path="/later"):
    """(status, sentence)."""
    answer = guest.begins("POST", path, body).answer()
    assert answer.status >= 400
    return answer.status, answer.json()["error"]


def listed(guest, query=""):
    return guest.asks("GET", f"/later{query}").json()["schedules"]


def mail(bus, to="bob"):
    """All that was ever sent to a name, as an operator sees it."""
    rows = bus.view.database.execute(
        "SELECT '{' || text || '}' FROM messages JOIN mailboxes ON mailbox = id WHERE name = ? ORDER BY tick", (to,)
    ).fetchall()
    return [json.loads(text)["msg"] for (text,) in rows]


def looked(bus):
    """Let the bus look once at what is due, and finish all that follows. Its own timer never looks: see `bus`."""
    due = due_of(bus)
    due.pause = 0.0
    due.look()
    come_true(lambda: not due.sending and bus.ledger.idle())
    due.pause = math.inf


# What is given


EXAMPLE = {"from": "ann", "to": "bob", "msg": "x"}
WRONG = [
    ([], "must be a JSON object, like"),
    ({"after": 1}, "a message must be a JSON object"),
    ({"after": 1, "message": [EXAMPLE]}, "must be one message without a key"),
    ({"after": 1, "message": {**EXAMPLE, "key": "k"}}, "give the key beside it"),
    ({"after": 1, "message": {"from": "ann", "to": "bob"}}, "msg is missing"),
    ({"after": 1, "message": {**EXAMPLE, "to": "b b"}}, "to must be a name"),
    ({"message": EXAMPLE}, "one of at, after and cron"),
    ({"message": EXAMPLE, "at": BEGIN // 1000000, "after": 1}, "one of at, after and cron"),
    ({"message": EXAMPLE, "after": -1}, "after must be a number of seconds from now"),
    ({"message": EXAMPLE, "after": True}, "after must be a number of seconds from now"),
    ({"message": EXAMPLE, "at": "tomorrow"}, "at must be a number of seconds since 1970"),
    ({"message": EXAMPLE, "at": BEGIN // 1000}, "at most 30 years ahead"),
    ({"message": EXAMPLE, "after": 1, "key": "a b"}, "key must be 1 to 128"),
    ({"message": EXAMPLE, "cron": "* * *"}, "cron must be five fields"),
    ({"message": EXAMPLE, "cron": 5}, "cron must be five fields"),
    ({"message": EXAMPLE, "cron": "0 0 30 2 *"}, "names a day that no year has"),
]


@pytest.mark.parametrize("body, sentence", WRONG)
def test_a_wrong_schedule_gets_its_sentence_and_is_not_kept(bus, body, sentence):
    guest = Guest(bus)
    status, error = refused(guest, body)
    assert status == 400 and sentence in error
    assert listed(guest) == []


def test_a_schedule_becomes_an_ordinary_send_with_its_id_as_key_and_a_tick_of_then(bus):
    guest = Guest(bus)
    given = give(guest, "in a minute", to=["bob", "carl"])
    bus.wall.now += MINUTE - 1
    looked(bus)
    assert mail(bus) == []
    bus.wall.now += 1
    looked(bus)
    [message] = guest.asks("GET", "/recv?to=bob").json()["messages"]
    assert (
        message["ts"] == bus.wall.now / 1e6 == given["at"]
        and message["msg"] == "in a minute"
        and message["to"] == "bob"
    )
    assert mail(bus, "carl") == ["in a minute"] and listed(guest) == []
    again = guest.asks(
        "POST", "/send", {**EXAMPLE, "to": ["bob", "carl"], "msg": "in a minute", "key": given["id"]}
    ).json()
    assert again["duplicate"] is True and again["ids"]["bob"] == message["id"]


def test_a_retry_of_the_request_is_one_schedule_also_after_its_message_was_sent(bus):
    guest = Guest(bus)
    first = give(guest, key="k")
    bus.wall.now += 1000
    again = give(guest, key="k")
    assert (first["duplicate"], again["duplicate"]) == (False, True) and (again["id"], again["at"]) == (
        first["id"],
        first["at"],
    )
    header = guest.begins("POST", "/later", {"after": 9, "message": EXAMPLE}, "Idempotency-Key: k").answer().json()
    assert header["id"] == first["id"] and header["duplicate"]
    assert refused(guest, {"after": 9, "key": "k", "message": {**EXAMPLE, "msg": "y"}})[0] == 409
    bus.wall.now += MINUTE
    looked(bus)
    assert give(guest, key="k", after=0)["duplicate"] is False
    looked(bus)
    assert mail(bus) == ["x"] and listed(guest) == []


# The cron line


def naive(line, tick):
    """The next minute that a line names, found by looking at one minute after the other."""
    fields = [schedules().numbers(text, field) for text, field in zip(line.split(), schedules().FIELDS)]
    when = datetime.datetime.fromtimestamp(tick // 1000000, datetime.timezone.utc).replace(second=0)
    while True:
        when += datetime.timedelta(minutes=1)
        both = "*" in (line.split()[2][0], line.split()[4][0])
        fits = when.day in fields[2], bool({when.isoweekday(), when.isoweekday() % 7} & fields[4])
        is_time = when.minute in fields[0] and when.hour in fields[1] and when.month in fields[3]
        if is_time and (all(fits) if both else any(fits)):
            return round(when.timestamp()) * 1000000


def random_field(pick, low, high):
    low, high = max(low, 1), min(high, 28)
    first, last = sorted((pick.randint(low, high), pick.randint(low, high)))
    return pick.choice(
        ["*", "*", f"*/{pick.randint(1, 9)}", str(first), f"{first}-{last}", f"{first},{last}", f"{low}-{last}/3"]
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_cron_line_names_the_minutes_that_cron_would(bus, seed):
    pick = random.Random(seed)
    line = " ".join(random_field(pick, low, high) for _, low, high in schedules().FIELDS)
    tick = BEGIN + pick.randrange(10**15)
    for _ in range(3):
        found = schedules().cron_of(line).after(tick)
        assert found - tick > 40 * 1440 * MINUTE or found == naive(line, tick), line
        tick = found


@pytest.mark.parametrize(
    "line, expected",
    [
        ("*/5 * * * *", "2026-11-20T19:45"),
        ("0 9 * * 1-5", "2026-11-23T09:00"),
        ("40 19 20 11 *", "2027-11-20T19:40"),  # strictly after
        ("0 0 29 2 *", "2028-02-29T00:00"),
        ("0 0 1 * 0", "2026-11-22T00:00"),  # the first of a month, or a Sunday
        ("0 0 1 * */7", "2027-08-01T00:00"),  # both, as a field begins with *
        ("59 23 31 12 7", "2026-12-06T23:59"),
        ("0,30 8-9/1 1 1 *", "2027-01-01T08:00"),
    ],
)
def test_a_cron_line_is_utc_and_a_day_may_fit_either_field(bus, line, expected):
    found = schedules().cron_of(line).after(BEGIN)
    assert time.strftime("%Y-%m-%dT%H:%M", time.gmtime(found // 1000000)) == expected


@pytest.mark.parametrize("part", ["60", "*/0", "5-1", "-1", "x", "1/2", "", "1,", "1-", "100"])
def test_a_wrong_part_of_a_cron_line_is_named(bus, part):
    status, error = refused(Guest(bus), {"cron": f"{part} * * * *", "message": EXAMPLE})
    assert status == 400
    assert "as minute: it must be *, a number from 0 to 59, or like 1-5 or */2" in error or not part


def test_a_repeat_is_sent_at_each_of_its_times_until_it_is_taken_back(bus):
    guest = Guest(bus)
    id = give(guest, cron="*/5 * * * *")["id"]
    for number in range(3):
        bus.wall.now = BEGIN + (number + 1) * 5 * MINUTE
        looked(bus)
        assert mail(bus) == ["x"] * (number + 1)
    assert [each["at"] for each in listed(guest)] == [(bus.wall.now + 5 * MINUTE) / 1e6]
    guest.asks("POST", "/later", {"cancel": id})
    bus.wall.now += 60 * MINUTE
    looked(bus)
    assert len(mail(bus)) == 3


# Steps of the clock, and restarts


def test_a_repeat_that_was_missed_is_sent_once_and_a_step_back_sends_nothing_twice(bus):
    guest = Guest(bus)
    give(guest, "each", cron="* * * * *")
    give(guest, "once", after=3600)
    bus.wall.now += 24 * 60 * MINUTE  # the clock steps forward
    looked(bus)
    assert mail(bus) == ["each", "once"]
    at = listed(guest)[0]["at"]
    bus.wall.now -= MINUTE  # a little: it waits until its minute comes again
    looked(bus)
    assert mail(bus) == ["each", "once"] and listed(guest)[0]["at"] == at
    bus.wall.now = round(at * 1e6)
    due_of(bus).pause = 0
    due_of(bus).look()
    bus.wall.now -= 24 * 60 * MINUTE  # while it is sent
    looked(bus)
    assert mail(bus) == ["each", "once", "each"] and listed(guest)[0]["at"] == at + 60


@pytest.mark.parametrize("restarts", [False, True])
def test_a_repeat_does_not_wait_for_a_day_that_a_wrong_clock_has_named(bus, monkeypatch, restarts):
    """A month ahead for a moment, in which the next one was sent: the others are sent in their minutes."""
    guest = Guest(bus)
    give(guest, "each", cron="* * * * *")
    give(guest, "refused", to="eve", after=0)
    bus.wall.now += MINUTE
    right = bus.wall.now
    monkeypatch.setattr(bus, "checks", [lambda messages: refuse("eve" in messages[0]["to"])])
    looked(bus)
    assert mail(bus) == ["each"]
    bus.wall.now += 31 * 24 * 60 * MINUTE
    looked(bus)
    assert mail(bus) == ["each", "each"]
    bus.wall.now = right
    if restarts:
        due_of(bus).looked = due_of(bus).right = 0  # as at a start
    looked(bus)
    each, once = listed(guest)
    assert each["at"] * 1e6 <= right + MINUTE and once["due"] * 1e6 <= right + 600 * 1000000
    for number in range(1, 4):
        bus.wall.now = right + number * MINUTE
        looked(bus)
    assert mail(bus) == ["each"] * 4
    bus.wall.now += 600 * 1000000
    monkeypatch.setattr(bus, "checks", [])
    looked(bus)
    assert mail(bus, "eve") == ["refused"]


def refuse(this):
    if this:
        raise bus_server.Refused(503, "not now")


@pytest.mark.slow("the clock of a real server steps")
def test_a_step_of_the_clock_of_a_running_bus_sends_what_is_due_once(tmp_path):
    with SteppedServer(tmp_path / "bus.db") as bus:
        assert ask(bus, "POST", "/later", {"after": 3600, "message": EXAMPLE})[0] == 200
        bus.step(7200)
        wait_until(lambda: texts(bus) == ["x"])
        wait_until(lambda: ask(bus, "GET", "/later")[1]["schedules"] == [])  # it is removed when its message is stored
        bus.step(0)
        bus.kill()
        bus.start()
        assert texts(bus) == ["x"] and ask(bus, "GET", "/later")[1]["schedules"] == []


def texts(bus, to="bob"):
    return [each["msg"] for each in ask(bus, "GET", f"/recv?to={to}&since=0&max=1000")[1]["messages"]]


def test_what_was_due_while_the_bus_was_down_is_sent_at_its_start_in_the_order_of_time(tmp_path):
    with Server(tmp_path / "bus.db") as bus:
        for after in (50, 30, 900, 40):
            message = {**EXAMPLE, "msg": str(after)}
            assert ask(bus, "POST", "/later", {"after": after, "message": message})[0] == 200
        bus.kill()
        with contextlib.closing(sqlite3.connect(bus.db)) as database:  # as if a minute had passed
            database.execute("UPDATE later SET due = due - 60000000")
            database.commit()
        bus.start()
        assert wait_until(lambda: len(texts(bus)) == 3 and texts(bus)) == ["30", "40", "50"]
        wait_until(lambda: [each["message"]["msg"] for each in ask(bus, "GET", "/later")[1]["schedules"]] == ["900"])


# A bus that is killed when a message is stored and its schedule is not removed yet
KILLS = """
import os
do = bus_server.Bus.do
def kill(self, operation, *arguments):
    if operation.kind in ("later drop", "later move"):
        os.kill(os.getpid(), 9)
    return do(self, operation, *arguments)
bus_server.Bus.do = kill
"""


def test_a_bus_that_is_killed_between_the_send_and_the_removal_sends_once(tmp_path):
    """Without its key the message would be stored again."""
    program = [str(ROOT / "tests/kit/raising_server.py")]
    with Server(tmp_path / "bus.db", program=program, env={"PATCH": KILLS, "FAULT_PORT": "0"}) as bus:
        assert ask(bus, "POST", "/later", {"after": 0, "message": EXAMPLE})[0] == 200
        bus.reap()
    with Server(tmp_path / "bus.db") as bus:
        wait_until(lambda: ask(bus, "GET", "/later")[1]["schedules"] == [])
        assert texts(bus) == ["x"]


def test_a_bus_is_killed_again_and_again_and_every_message_comes_once(tmp_path):
    with Server(tmp_path / "bus.db") as bus:
        for number in range(300):
            message = {**EXAMPLE, "msg": str(number)}
            assert ask(bus, "POST", "/later", {"after": 0.002 * number, "message": message})[0] == 200
        for _ in range(4):
            before = len(texts(bus))
            wait_until(lambda: len(texts(bus)) > before or len(texts(bus)) == 300)  # noqa: B023
            bus.kill()
            bus.start()
        wait_until(lambda: ask(bus, "GET", "/later")[1]["schedules"] == [])
        assert sorted(map(int, texts(bus))) == [*range(300)]


def test_a_start_without_the_file_names_it(tmp_path):
    folder = copy(tmp_path / "bus", ["later"])
    with server(folder) as bus:
        assert ask(bus, "POST", "/later", {"after": 900, "message": EXAMPLE})[0] == 200
    copy(folder, [])
    assert "bus.db has 1 schedule of later.py, which is not beside bus_server.py" in refuses_to_start(folder)


# Whose it is


def test_a_token_sees_and_takes_back_its_own_and_an_operator_all(closed):
    alice, bob, sensor, admin = (Guest(closed, closed.tokens[name]) for name in GRANTS)
    ids = [give(guest, to="bob")["id"] for guest in (alice, bob, sensor)]
    for guest, own in ((alice, ids[:1]), (bob, ids[1:2]), (sensor, ids[2:]), (admin, ids)):
        assert [each["id"] for each in listed(guest)] == own
    assert [each["id"] for each in listed(admin, "?from=bob")] == ids[1:2] and listed(bob, "?from=bob")
    assert bob.begins("GET", "/later?from=alice").answer().status == 403
    assert (
        refused(bob, {"cancel": ids[0]}) == refused(bob, {"cancel": "nothing"})
        and refused(bob, {"cancel": ids[0]})[0] == 404
    )
    assert refused(bob, {"after": 1, "message": {**EXAMPLE, "from": "alice"}})[0] == 403
    alice.asks("POST", "/later", {"cancel": ids[0]})
    admin.asks("POST", "/later", {"cancel": ids[1]})
    closed.wall.now += MINUTE
    looked(closed)
    assert mail(closed) == ["x"] and Guest(closed).begins("GET", "/later").answer().status == 401


@pytest.mark.parametrize("when", ["before it is due", "when its operation is in the list"])
def test_a_schedule_of_a_revoked_token_is_not_sent_and_says_why(closed, when, monkeypatch):
    give(Guest(closed, closed.tokens["alice"]))
    give(Guest(closed, closed.tokens["alice"]), cron="* * * * *")
    closed.wall.now += MINUTE
    if when == "before it is due":
        set_revoked(closed, "alice")
        closed.gate.tokens.refresh()
    else:
        really = closed.ledger.commit
        monkeypatch.setattr(closed.ledger, "commit", lambda: (set_revoked(closed, "alice"), really()))
    looked(closed)
    found = listed(Guest(closed, closed.tokens["admin"]))
    assert mail(closed) == [] and [each["state"] for each in found] == ["failed", "failed"]
    assert all("revoked" in each["reason"] and each["due"] is None for each in found)
    closed.wall.now += 60 * MINUTE
    looked(closed)
    assert mail(closed) == []


def test_a_schedule_from_before_the_bus_had_tokens_is_not_sent(tmp_path):
    with a_bus(time.monotonic, tmp_path / "bus.db") as bus:
        give(Guest(bus), after=0)
        bus.db = str(tmp_path / "bus.db")
        tokens = mint(bus.db, **GRANTS)
        bus.gate.tokens.refresh()
        looked(bus)
        [found] = listed(Guest(bus, tokens["admin"]))
        assert mail(bus) == [] and "this bus needs a token" in found["reason"]


def test_what_is_being_sent_cannot_be_taken_back_and_what_is_taken_back_is_not_sent(bus, monkeypatch):
    guest = Guest(bus)
    id = give(guest, after=0)["id"]
    due = due_of(bus)
    due.sending.add(1)
    assert refused(guest, {"cancel": id})[0] == 409
    due.sending.clear()
    operations, really = [], bus.do
    monkeypatch.setattr(bus, "do", lambda *arguments: operations.append(arguments))
    guest.begins("POST", "/later", {"cancel": id})
    come_true(lambda: operations)
    assert due.leaving == {1}
    due.look()
    assert not due.sending
    monkeypatch.setattr(bus, "do", really)
    bus.do(*operations[0])
    assert guest.answer().status == 200
    looked(bus)
    assert mail(bus) == [] and not due.leaving


# Refusals


def test_a_key_of_null_is_none(bus):
    """It was taken, and refused when its time had come: the schedule writes a key of its own into the message."""
    Guest(bus).asks("POST", "/later", {"after": 60, "message": {**EXAMPLE, "key": None}})
    bus.wall.now += MINUTE
    looked(bus)
    assert mail(bus) == ["x"]


def test_the_list_comes_in_pages_in_the_order_of_giving(bus):
    guest = Guest(bus)
    ids = [give(guest, str(number), after=900 - number)["id"] for number in range(5)]
    found, query = [], "?max=2"
    while query:
        answer = guest.asks("GET", f"/later{query}").json()
        found.append([each["id"] for each in answer["schedules"]])
        query = f"?max=2&after={answer['next']}" if answer.get("more") else ""
    assert found == [ids[:2], ids[2:4], ids[4:]]


def made_without(*extensions):
    """A bus inside the test that has all other extensions."""
    options = bus_server.command_line(["--db", ":memory:"])
    for extension in extensions:
        del options.extensions[extension]
    bus = bus_server.make_bus(options, State(options.db))
    bus_server.start_extensions(bus, options)
    return bus


def test_a_bus_without_schedules_does_nothing_more_for_a_send():
    """What a send passes is the same with the extension and without it; the timer is one that the core has anyway."""
    seams = ("checks", "unknown", "on_announced", "on_polled", "states", "about")
    counts = []
    for lacks in ((), ("later",)):
        bus = made_without(*lacks)
        counts.append([len(getattr(bus, seam)) for seam in seams])
        inside.close(bus)
    assert counts[0] == counts[1]


# Damage


ANOTHER = json.dumps({**EXAMPLE, "to": "eve"})
DAMAGE = [("message", f"'{ANOTHER}'"), ("token", "'x'"), ("due", "'x'"), ("at", "x'ff22'"), ("tries", "'x'")]


@pytest.mark.parametrize("column, value", DAMAGE)
def test_a_damaged_schedule_is_told_and_not_sent_and_the_others_are(bus, column, value, capfd):
    guest = Guest(bus)
    give(guest, "whole")
    give(guest, "broken")
    bus.state.writing.execute(f"UPDATE later SET {column} = {value} WHERE number = 2")
    bus.wall.now += MINUTE
    looked(bus)
    due_of(bus).tidy()
    looked(bus)
    looked(bus)
    assert mail(bus) == ["whole"] and mail(bus, "eve") == []
    assert listed(guest) == [] or listed(guest)[0]["state"] == "failed"
    assert "the schedule 2 is damaged; skipped" in inside.said(capfd)
    assert bus.view.ask("SELECT count(*) FROM later WHERE failed IS NULL") == (0,)
