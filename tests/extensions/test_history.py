"""The log backwards: PROTOCOL.md section 22, as far as one token and one outside look cannot show it."""
import pytest

from bus_extensions.history import History
from bus_server import Now, Put, draft
from tests.core.test_identity import ask
from tests.kit import inside
from tests.kit.peers import fill, mint
from tests.kit.processes import Server

LOOKED = History.LOOKED


@pytest.fixture(scope="module")
def closed(tmp_path_factory):
    path = tmp_path_factory.mktemp("closed") / "bus.db"
    tokens = mint(path, ann=[], boss=["--operator"], sensor=["--send-only"])
    with Server(path) as bus:
        bus.tokens = tokens
        for sender, to, text in (("ann", "bob", "a"), ("boss", "ann", "b"), ("boss", "bob", "c"), ("sensor", "x", "d")):
            assert ask(bus, "POST", "/send", {"to": to, "msg": text}, tokens[sender])[0] == 200
        yield bus


@pytest.mark.parametrize("name, sees", [("boss", "dcba"), ("ann", "ba"), ("sensor", "d")])
def test_a_token_sees_of_the_log_what_it_may_see(closed, name, sees):
    status, answer = ask(closed, "GET", "/log?before=now", token=closed.tokens[name])
    assert status == 200 and "".join(message["msg"] for message in answer["messages"]) == sees


def test_an_answer_looks_at_5000_messages_and_says_where_to_go_on(bus):
    fill(bus, "bob", 1)
    fill(bus, "carl", LOOKED, sender="zoe", at_once=1000)
    first = ask(bus, "GET", "/log?before=now&to=bob")[1]
    assert first["messages"] == [] and first["next"]
    second = ask(bus, "GET", f"/log?before={first['next']}&to=bob")[1]
    assert len(second["messages"]) == 1 and second["next"] is None


def test_what_was_taken_back_or_has_expired_is_not_there(bus):
    for text, more in (("stays", {}), ("taken", {}), ("over", {"ttl": 0.001})):
        sent = ask(bus, "POST", "/send", {"from": "ann", "to": "bob", "msg": text, **more})[1]
        if text == "taken":
            assert ask(bus, "POST", "/recall", {"id": sent["id"]})[0] == 200
    found = ask(bus, "GET", "/log?before=now")[1]["messages"]
    assert [message["msg"] for message in found if message["msg"] != "over"] == ["stays"]


def test_large_messages_that_are_damaged_do_not_end_the_log(tmp_path):
    """They count for their bytes. So an answer may end before it has a message, and the next one goes on."""
    bus = inside.make(tmp_path / "bus.db")
    try:
        large = [draft({"from": "ann", "to": "bob", "msg": "x" * 250000}, None) for _ in range(6)]
        [first, *_] = bus.state.apply([Put([draft({"from": "ann", "to": "bob", "msg": "sound"}, None), *large])],
                                      Now(1000000, 1)).visible  # fmt: skip
        bus.last = bus.state.last
        bus.state.writing.execute("UPDATE messages SET sum = sum + 1 WHERE tick > ?", (first.tick,))
        log = bus.routes["GET", "/log"].call.__self__
        found, end = log.below(bus.last + 1, "1", (), 100)
        assert found == [] and log.below(end, "1", (), 100) == ([first], None)
    finally:
        inside.close(bus)


def test_a_reader_of_the_log_leaves_no_trace(bus):
    sent = ask(bus, "POST", "/send", {"from": "ann", "to": "bob", "msg": "x"})[1]
    ask(bus, "GET", "/log?before=now&to=bob")
    assert ask(bus, "GET", f"/message/{sent['id']}")[1]["state"] == "queued"
    assert not [each for each in ask(bus, "GET", "/agents")[1]["agents"] if each["listens"]]


@pytest.mark.parametrize("before", ["xyz", "last", "-1", ""])
def test_a_wrong_place_is_refused_by_its_name(before, bus):
    status, answer = ask(bus, "GET", f"/log?before={before}")
    assert status == 400 and answer["error"].startswith("before must be 'now' or seconds like ")


def test_without_the_extension_the_bus_does_not_answer_something_else(tmp_path):
    with Server(tmp_path / "bus.db", "--without", "history") as bus:
        status, answer = ask(bus, "GET", "/log?before=now")
        assert status == 404 and answer["error"] == "/log?before is off: this bus was started --without history"
