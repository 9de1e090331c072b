"""bus_relay.py and what cannot be passed on: it is kept and told, and holds up nobody."""
import json
import pathlib
import re
from types import SimpleNamespace

import pytest

import bus_recv
from tests.kit import relaying
from tests.kit.bad_servers import NOON, Scripted, answer, mail, message, page, stored
from tests.kit.processes import full_disk
from tests.kit.relaying import log, profile, relay, say, sends, texts
from tools import bus_relay

home, buses = relaying.home, relaying.buses  # fixtures


def test_a_refused_message_is_kept_and_told_and_holds_up_nobody(buses, home):
    (a,) = buses("a")
    (b,) = buses("b", options=["--max-body", "5000"])
    say(a, "spark", "bob", "1")
    large = say(a, "spark", "bob", "x" * 6000)
    say(a, "spark", "bob", "2")
    code, err = relay("bob")
    assert code == 0 and texts(b) == ["1", "2"]
    path = re.search(rf"{large} from spark to bob is not passed on, and is in (\S+) now: ", err)[1]
    kept = json.loads(pathlib.Path(path).read_text())
    assert kept["id"] == large and len(kept["msg"]) == 6000 and "5000" in kept["reason"]
    told = log(a)[-1]
    assert (told["from"], told["to"], told["reply_to"], told["type"]) == ("relay", "spark", large, "undeliverable")
    assert f"Your message {large} to bob could not be passed on" in told["msg"] and b.url not in told["msg"]


def test_a_refused_message_for_which_there_is_no_room_is_kept_later_in_a_line_of_its_own(buses, home):
    (a,) = buses("a")
    buses("b", options=["--max-body", "5000"])
    numbers = [say(a, "spark", "bob", "x" * 6000)]
    assert relay("bob")[0] == 0
    [dead] = home.rglob("*~dead")
    numbers.append(say(a, "spark", "bob", "x" * 6000))
    with full_disk(8192):
        code, err = relay("bob")
    assert code == 2 and f"cannot write {dead}: " in err
    assert relay("bob")[0] == 0
    assert [json.loads(line)["id"] for line in dead.read_text().splitlines()] == numbers


@pytest.mark.parametrize("sees", [True, False])
def test_a_person_is_told_how_many_messages_one_run_has_passed_on(sees, buses, monkeypatch):
    a, b = buses("a", "b")
    monkeypatch.setattr(bus_relay, "is_seen", lambda: sees)
    for number, said in ((2, "2 messages"), (1, "1 message"), (0, "0 messages")):
        for each in range(number):
            say(a, "spark", "bob", f"{number}.{each}")
        code, err = relay("bob")
        told = f"bus_relay: passed the mail for bob on from {a.url} to {b.url}: {said}\n"
        assert (code, err) == (0 if number else 3, told * sees)


@pytest.fixture
def clock(monkeypatch):
    """The relay sleeps without waiting. Its time in seconds, and what was slept."""
    clock = SimpleNamespace(now=0.0, slept=[])

    def sleep(seconds):
        clock.slept.append(seconds)
        clock.now += seconds

    monkeypatch.setattr(bus_relay, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep))
    monkeypatch.setattr(bus_recv, "HOLD_SECONDS", 1e6)
    return clock


FULL = answer({"error": "the mailbox is full"}, "Retry-After: 600", status=429)


def test_a_mailbox_that_stays_full_stops_the_mail_of_other_receivers_for_minutes_only(buses, home, clock):
    (a,) = buses("a")
    first, second = [say(a, "spark", "bob", f"{n}") for n in (1, 2)]
    for to, msg in (("carol", "3"), ("bob", "4"), ("bob", "5")):
        say(a, "spark", to, msg)
    # 1 three times, 2 once, 3, 4, then 5 has as much time as 1 had
    with Scripted(FULL, FULL, FULL, FULL, stored(), stored(), FULL, FULL, stored()) as other:
        profile(home, "b", other)
        code, err = relay("bob", "carol")
    tried = [json.loads(asked.body)["msg"] for asked in sends(other)]
    assert code == 0 and tried == ["1", "1", "1", "2", "3", "4", "5", "5", "5"] and clock.slept == [600.0] * 4
    for number in (first, second):
        assert f"{number} from spark to bob is not passed on, and is in " in err
    told = {one["reply_to"]: one["msg"] for one in log(a) if one.get("type") == "undeliverable"}
    assert told.keys() == {first, second} and told[second].endswith("the mailbox is full")


def test_a_message_that_is_too_large_for_a_proxy_is_refused_as_by_the_bus(buses, home):
    """No proxy says that in JSON; and it would say so as often as it is asked."""
    (a,) = buses("a")
    large, _ = (say(a, "spark", "bob", text) for text in ("too large", "2"))
    with Scripted(page(413, "<html>"), stored()) as other:
        profile(home, "b", other)
        code, err = relay("bob")
    assert code == 0 and f"{large} from spark to bob is not passed on" in err
    assert [json.loads(asked.body)["msg"] for asked in sends(other)] == ["too large", "2"]
    assert log(a)[-1]["type"] == "undeliverable"


@pytest.mark.parametrize("fault", [answer({"error": "starting"}, status=503), page(429, "<html>"), page(429, "no")],
                         ids=["503", "a page", "a proxy"])  # fmt: skip
def test_minutes_of_another_fault_are_not_those_of_a_full_mailbox(fault, buses, home, clock):
    (a,) = buses("a")
    say(a, "spark", "bob", "T1")
    with Scripted(FULL, *[fault] * 30, FULL, stored()) as other:
        profile(home, "b", other)
        code, err = relay("bob")
    assert code == 0 and "is not passed on" not in err and len(sends(other)) == 33 and clock.now > 1800


def test_the_file_of_refused_messages_has_a_limit_and_what_is_removed_is_told(buses, monkeypatch):
    (a,) = buses("a")
    buses("b", options=["--max-body", "5000"])
    monkeypatch.setattr(bus_relay, "DEAD_BYTES", 10000)  # two messages
    numbers = [say(a, "spark", "bob", "x" * 6000) for _ in range(7)]
    code, err = relay("bob")
    path = re.search(r"is not passed on, and is in (\S+) now: ", err)[1]
    kept = [[json.loads(line)["id"] for line in pathlib.Path(name).read_text().splitlines()]
            for name in (f"{path}~old", path)]  # fmt: skip
    assert code == 0 and kept == [numbers[4:6], numbers[6:]]
    assert err.count(f"the oldest 2 messages that were not passed on, in {path}~old, are removed") == 2


def test_a_sender_that_cannot_be_told_holds_up_nobody_either(buses, home, monkeypatch):
    (a,) = buses("a")
    (b,) = buses("b", options=["--max-body", "5000"])
    say(a, "spark", "bob", "x" * 6000)
    say(a, "spark", "bob", "x" * 6000, type="undeliverable")
    say(a, "spark", "bob", "2")
    profile(home, "a", a, AGENT_NAME="all")  # a name that no sender may have
    code, err = relay("bob")
    assert code == 0 and texts(b) == ["2"] and err.count("is not passed on") == 2 and err.count("was not told: ") == 1


def test_a_message_that_was_removed_before_it_was_passed_on_is_told(home):
    health = answer({"ok": True, "now": NOON, "bus": "b2"})
    gap = mail(message(1, to="bob"), gap={"from": 1, "to": 2})
    with Scripted(gap, mail()) as a, Scripted(stored(bus="b2"), health=health) as b:
        profile(home, "a", a)
        profile(home, "b", b)
        code, err = relay("bob")
    assert code == 0 and "messages are no longer on the bus" in err


def test_what_is_not_a_message_stops_nothing(home):
    health = answer({"ok": True, "now": NOON, "bus": "b2"})
    answers = mail('"strange"', '{"ts": 1}', message(2, to="bob")), mail()
    with Scripted(*answers) as a, Scripted(stored(), health=health) as b:
        profile(home, "a", a)
        profile(home, "b", b)
        code, err = relay("bob")
    assert code == 0 and err.count("something that is not a message") == 2 and len(sends(b)) == 1


def test_a_reply_to_what_is_no_id_is_not_looked_up(home):
    """A proxy answers so long a URL with a page of its own, which looks like a bus that is out of reach."""
    health = answer({"ok": True, "now": NOON, "bus": "b2"})
    with Scripted(mail(message(1, to="bob", reply_to="z" * 9000)), mail()) as a, Scripted(stored(), health=health) as b:
        profile(home, "a", a)
        profile(home, "b", b)
        assert relay("bob")[0] == 0
    assert len(sends(b)) == 1 and not [asked for asked in a.asked if asked.target.startswith("/message/")]


@pytest.mark.parametrize("old", ["a", "b"])
def test_a_bus_of_the_first_contract_is_refused(old, buses, home):
    (new,) = buses(*{"a", "b"} - {old})
    with Scripted(mail(bus=None), bus=None) as other:
        profile(home, old, other)
        code, err = relay("bob")
    assert code == 1 and f"bus_relay: {other.url}: it is a bus of the first contract, which has no keys" in err


def test_a_bus_in_the_environment_is_refused(buses, home):
    a, b = buses("a", "b")
    code, err = relay("bob", AGENT_BUS_URL=a.url)
    assert code == 2 and "unset AGENT_BUS_URL" in err
    code, err = relay("bob", b="nowhere")
    assert code == 2 and "nowhere.env cannot be read" in err
