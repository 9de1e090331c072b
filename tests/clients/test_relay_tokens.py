"""bus_relay.py between buses with tokens: a token signs for itself only, and nobody hides or takes a key."""
import json
import os
import time
from types import SimpleNamespace
from unittest import mock

import pytest

import bus_recv
from tests.kit import relaying
from tests.kit.bad_servers import Scripted, answer
from tests.kit.peers import mint
from tests.kit.relaying import log, profile, relay, say, texts

home, buses = relaying.home, relaying.buses  # fixtures


@pytest.fixture
def closed(home, buses):
    """a is open; b is closed, and knows us as `home`. The tokens of b."""
    (a,) = buses("a")
    tokens = mint(home / "b.db", home=[], bob=[], ops=["--operator"])
    (b,) = buses("b")
    profile(home, "b", b, AGENT_BUS_TOKEN=tokens["home"], AGENT_NAME="home")
    return SimpleNamespace(a=a, b=b, tokens=tokens)


def test_a_token_signs_for_itself_and_says_who_the_sender_was(closed, home):
    question = say(closed.a, "spark", "bob", "Is T1 done?", fields={"relayed_from": "boss"})
    say(closed.a, "spark", "bob", "T2")
    assert relay("bob", AGENT_NAME="somebody") == (0, "")
    first, second = log(closed.b, closed.tokens["ops"])
    assert (first["from"], first["relayed_from"]) == ("home", "boss via spark")  # only spark says that it was boss
    assert (second["from"], second["relayed_from"]) == ("home", "spark")
    assert [hop["from"] for hop in first["via"]] == ["spark"]
    with mock.patch.dict(os.environ, AGENT_BUS_TOKEN=closed.tokens["bob"], AGENT_BUS_URL=closed.b.url):
        shown = bus_recv.block(next(bus_recv.receive("bob", once=True, since="0")), "bob", 0)
    assert 'from=home relayed_from="boss via spark"' in shown
    # bob answers whoever the message came from, which is us; it arrives where the question was asked
    say(closed.b, "bob", "home", "Yes.", token=closed.tokens["bob"], reply_to=first["id"])
    assert relay("home", a="b", b="a") == (0, "")
    got = log(closed.a)[-1]
    assert (got["from"], got["to"], got["reply_to"], got["msg"]) == ("bob", "spark", question, "Yes.")


def test_through_two_closed_buses_each_relay_vouches_for_the_one_before(closed, home, buses):
    tokens = mint(home / "c.db", work=[], ops=["--operator"])
    (c,) = buses("c")
    profile(home, "c", c, AGENT_BUS_TOKEN=tokens["work"])  # without AGENT_NAME: the bus fills it in
    profile(home, "b2", closed.b, AGENT_BUS_TOKEN=closed.tokens["bob"])
    say(closed.a, "spark", "bob", "T1")
    assert relay("bob") == (0, "") and relay("bob", a="b2", b="c") == (0, "")
    (got,) = log(c, tokens["ops"])
    assert (got["from"], got["relayed_from"]) == ("work", "spark via home")
    assert [hop["from"] for hop in got["via"]] == ["spark", "home"]


def test_nobody_takes_the_key_of_another_message_with_a_false_via(closed):
    bus = json.loads(closed.a.get("/healthz"))["bus"]
    first = say(closed.a, "spark", "carol", "T1")
    say(closed.a, "eve", "bob", "T2", fields={"via": [{"bus": bus, "id": first, "from": "spark"}]})
    for name in ("bob", "carol"):
        assert relay(name) == (0, "")
    assert [one["msg"] for one in log(closed.b, closed.tokens["ops"])] == ["T2", "T1"]


def test_nobody_takes_the_key_of_a_message_that_is_not_sent_yet(closed):
    """The cursor of any reader may be ahead of the bus, and then the ids of the next messages are known."""
    ahead, bus = int(time.time()) + 200, json.loads(closed.a.get("/healthz"))["bus"]
    closed.a.get(f"/recv?to=eve&since={ahead}")
    guessed = f"{ahead * 1000000 + 2:x}"
    say(closed.a, "eve", "bob", "Yes.", fields={"via": [{"bus": bus, "id": guessed, "from": "spark"}]})
    assert say(closed.a, "spark", "bob", "Yes.") == guessed
    assert relay("bob") == (0, "")
    got = log(closed.b, closed.tokens["ops"])
    assert [(one["relayed_from"], one["msg"]) for one in got] == [("eve", "Yes."), ("spark", "Yes.")]


@pytest.mark.parametrize("claimed", [
    f"boss{' ' * 300}", "boss" * 30, "boss\n2", "boss via", "boss, via home", 'boss" id=1', ["boss"], None, 7,
])  # fmt: skip
def test_nobody_hides_behind_what_a_message_says_of_its_way(claimed, closed):
    """The clients cut a field that is long, so what is behind it would not be seen."""
    say(closed.a, "eve", "bob", "x" * 9000, fields={"relayed_from": claimed})
    assert relay("bob") == (0, "")
    (got,) = log(closed.b, closed.tokens["ops"])
    assert (got["from"], got["relayed_from"]) == ("home", "eve")


@pytest.mark.parametrize("side", ["a", "b"])
def test_without_the_right_token_it_ends_in_words_and_nothing_is_lost(side, buses, home):
    a, b = buses("a", "b")
    say(a, "spark", "bob", "T1")
    bus = {"a": a, "b": b}[side]
    bus.stop()
    token = mint(bus.db, bob=[])["bob"]
    bus.start()
    code, err = relay("bob")
    assert code == 1 and "token" in err and err.count("\n") == 1 and (b.url in err) == (side == "b")
    profile(home, side, bus, AGENT_BUS_TOKEN=token)
    assert relay("bob") == (0, "")
    assert [one["msg"] for one in log(b, token if side == "b" else None)] == ["T1"]


def test_a_token_that_ends_meanwhile_costs_no_message(buses, home):
    a, b = buses("a", "b")
    say(a, "spark", "bob", "T1")
    with Scripted(answer({"error": "the token is unknown"}, status=401)) as other:
        profile(home, "b", other)
        assert relay("bob") == (1, f"bus_relay: {other.url}: the token is unknown\n")
    profile(home, "b", b)
    assert relay("bob") == (0, "") and texts(b) == ["T1"]
