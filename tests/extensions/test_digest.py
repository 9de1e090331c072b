"""GET /digest: PROTOCOL.md section 20, as far as one token and one outside look cannot show it."""

import contextlib
import json
import sqlite3
import time

import pytest

from bus_server import PARKED_PER_NAME, draft, nothing_follows
from tests.core.test_identity import ask, may_read
from tests.kit import inside
from tests.kit.peers import Peer, invite
from tests.kit.processes import Server, in_cpu, wait_until

GRANTS = {"alice": [], "bob": [], "boss": ["--also", "bob,carl"], "sensor": ["--send-only"], "admin": ["--operator"]}


@pytest.fixture(scope="module")
def closed(tmp_path_factory):
    """A bus on which a message was sent before it had tokens."""
    with Server(tmp_path_factory.mktemp("closed") / "bus.db") as bus:
        assert ask(bus, "POST", "/send", {"from": "stranger", "to": "bob", "msg": "x"})[0] == 200
        bus.tokens = {name: invite(bus, name, *options) for name, options in GRANTS.items()}
        wait_until(lambda: ask(bus, "GET", "/agents")[0] == 401)
        for sender in ("alice", "sensor"):
            assert ask(bus, "POST", "/send", {"to": "bob", "msg": "x"}, bus.tokens[sender])[0] == 200
        yield bus


@pytest.mark.parametrize("who", GRANTS)
def test_a_digest_is_for_whoever_may_read_the_name(closed, who):
    for name in GRANTS:
        status, answer = ask(closed, "GET", f"/digest?to={name}", token=closed.tokens[who])
        assert status == (200 if may_read(who, name) else 403), (who, name, answer)
        assert ask(closed, "GET", f"/digest?to={name},bob", token=closed.tokens[who])[0] == (
            200 if may_read(who, name) and may_read(who, "bob") else 403
        )
    assert ask(closed, "GET", "/digest?to=bob")[0] == 401


def test_a_digest_vouches_for_names_that_hold_a_token(closed, bus):
    found = ask(closed, "GET", "/digest?to=bob", token=closed.tokens["bob"])[1]
    assert set(found["senders"]) == {"alice", "sensor", "stranger"} and found["vouched"] == ["alice", "sensor"]
    assert ask(bus, "POST", "/send", {"from": "alice", "to": "bob", "msg": "x"})[0] == 200
    assert ask(bus, "GET", "/digest?to=bob")[1]["vouched"] == []


def test_nobody_vouches_for_mail_of_before_the_first_token(tmp_path):
    """Anybody could send it, as anybody."""
    with Server(tmp_path / "bus.db") as bus:
        order = {"from": "boss", "to": "bob", "msg": "x"}
        assert ask(bus, "POST", "/send", order)[0] == 200
        boss, bob = (invite(bus, name) for name in ("boss", "bob"))
        wait_until(lambda: ask(bus, "GET", "/agents")[0] == 401)
        assert ask(bus, "POST", "/send", order, token=boss)[0] == 200
        digest = ask(bus, "GET", "/digest?to=bob", token=bob)[1]
        assert (digest["unread"], digest["vouched"]) == (2, [])
        assert ask(bus, "POST", "/send", {**order, "channel": "later"}, token=boss)[0] == 200
        assert ask(bus, "GET", "/digest?to=bob&channel=later", token=bob)[1]["vouched"] == ["boss"]


def test_nobody_vouches_for_mail_that_a_cursor_dated_after_the_first_token(tmp_path):
    with Server(tmp_path / "bus.db") as bus:
        assert ask(bus, "GET", f"/recv?to=mallory&since={time.time() + 299:.6f}")[0] == 200
        assert ask(bus, "POST", "/send", {"from": "boss", "to": "bob", "msg": "forged"})[0] == 200
        boss, bob = (invite(bus, name) for name in ("boss", "bob"))
        wait_until(lambda: ask(bus, "GET", "/agents")[0] == 401)
        digest = ask(bus, "GET", "/digest?to=bob", token=bob)[1]
        assert (digest["unread"], digest["vouched"]) == (1, [])


def test_only_who_may_read_the_mailbox_of_a_question_counts_as_its_answer(tmp_path):
    """An id is no secret: a sensor that may only send answers no question, and prolongs no turn."""
    with Server(tmp_path / "bus.db") as bus:
        tokens = {name: invite(bus, name, *options) for name, options in {**GRANTS, "carl": []}.items()}

        def sent(who, to, **more):
            return ask(bus, "POST", "/send", {"to": to, "msg": "x", **more}, tokens[who])[1]["id"]

        def threads(since="last"):
            found = ask(bus, "GET", f"/digest?to=alice&since={since}", token=tokens["alice"])[1]["threads"]
            return {each["id"]: (each["unread"], each["answers"]) for each in found}

        wait_until(lambda: ask(bus, "GET", "/agents")[0] == 401)
        question, to_all, own = sent("alice", "bob"), sent("alice", "all"), sent("alice", "alice")
        for forger in ("sensor", "carl", "alice"):
            sent(forger, "alice", reply_to=question)
        assert threads() == {question: (3, 0), own: (1, 0)}
        for who in ("bob", "boss", "admin"):
            sent(who, "alice", reply_to=question)
        for who in ("carl", "sensor"):
            sent(who, "alice", reply_to=to_all)
        assert threads() == {question: (6, 3), own: (1, 0), to_all: (2, 1)}


def test_on_a_bus_without_tokens_everybody_else_may_answer(bus):
    def sent(sender, to, **more):
        return ask(bus, "POST", "/send", {"from": sender, "to": to, "msg": "x", **more})[1]["id"]

    question = sent("ann", "bob")
    for sender in ("bob", "carl", "ann"):
        sent(sender, "ann", reply_to=question)
    assert ask(bus, "GET", "/digest?to=ann")[1]["threads"] == [{"id": question, "unread": 3, "answers": 2}]


def filled(messages):
    """A bus inside the test that has stored these."""
    bus = inside.make(":memory:")
    drafts = [draft({"from": "ann", "to": "bob", "msg": "x", **each}, None) for each in messages]
    bus.do(bus.ledger.put(drafts, "x"), None, nothing_follows)
    bus.loop.run(bus.ledger.idle)
    return bus


def counted(bus, query="to=bob"):
    return json.loads(bus.routes["GET", "/digest"].call(inside.Asks(query)).body)


def test_a_digest_looks_at_so_many_messages_and_bytes_and_says_that_there_are_more(monkeypatch):
    bus = filled([{"msg": "y" * 1000}] * 8 + [{"msg": "y" * 1000, "priority": "high"}] * 8)
    module = bus.routes["GET", "/digest"].call.func.__globals__
    found = counted(bus)
    assert (found["unread"], found["urgent"], found["more"]) == (16, 8, False)
    for limit, value, number in (("LOOKED", 16, 16), ("LOOKED", 15, 15), ("LOOKED_BYTES", 17000, 10)):
        with monkeypatch.context() as patch:
            patch.setitem(module, limit, value)
            found = counted(bus)
            assert (found["unread"], found["more"]) == (number, number < 16)
    inside.close(bus)


def test_a_digest_is_small_whatever_is_unread():
    """Each of 300 senders has a name of 64 letters and a conversation of its own."""
    bus = filled({"from": f"{number:064}", "priority": "high" if number % 2 else "x" * 900} for number in range(300))
    found = counted(bus)
    assert len(json.dumps(found)) < 8000 and found["unread"] == 300 and found["priorities"]["other"] == 150
    assert len(found["senders"]) == len(found["threads"]) == 20 and len(found["first_urgent"]) == 16
    assert all(each["urgent"] for each in found["senders"].values())
    inside.close(bus)


LONG = {"msg": "y" * 60000}


@pytest.mark.parametrize("each", [{}, {"priority": "high"}, LONG, {**LONG, "priority": "low"}])
def test_a_digest_takes_under_50_ms_of_the_loop(each):
    bus = filled([each] * 2001)

    def took():
        start = time.thread_time()
        counted(bus)
        return time.thread_time() - start

    assert min(took() for _ in range(3)) < in_cpu(0.05)
    inside.close(bus)


def test_of_those_that_wait_for_one_name_the_newest_are_live(bus):
    """A poll that waits for it is not one of them."""
    paths = ["/recv?to=bob&wait=50", *["/digest?to=bob&wait=50"] * (PARKED_PER_NAME + 1)]
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(Peer(bus)) for _ in paths]
        for number, (peer, path) in enumerate(zip(peers, paths), 1):
            peer.send("GET", path)
            wait_until(lambda: f"agent_bus_parked {min(number, len(paths) - 1)}\n".encode() in bus.get("/metrics"))  # noqa: B023
        assert peers[1].answer().json["unread"] == 0
        ask(bus, "POST", "/send", {"from": "ann", "to": "bob", "msg": "x"})
        assert [peer.answer().json["unread"] for peer in peers[2:]] == [1] * PARKED_PER_NAME
        assert peers[0].answer().json["messages"]


def test_a_message_that_is_being_recalled_is_not_counted():
    bus = filled([{}, {"priority": "high"}])
    message = bus.view.message(bus.last)
    bus.withheld["a step"] = message
    assert (counted(bus)["unread"], counted(bus)["urgent"]) == (1, 0)
    inside.close(bus)


def test_damaged_rows_are_passed_over(bus):
    for sender, priority in (("ann", "high"), ("eve", "high"), ("ann", "low")):
        ask(bus, "POST", "/send", {"from": sender, "to": "bob", "msg": "x", "priority": priority})
    assert bus.stop() == 0
    with contextlib.closing(sqlite3.connect(bus.db)) as database:
        database.execute("UPDATE messages SET sender = 'not a name' WHERE sender = 'eve'")
        database.execute("UPDATE messages SET text = text || '}' WHERE text LIKE '%low%'")
        database.commit()
    bus.start()
    status, found = ask(bus, "GET", "/digest?to=bob")
    assert status == 200 and set(found["senders"]) == {"ann"} and found["unread"] == 2
    assert found["priorities"] == {"high": 1, "normal": 1, "low": 0, "other": 0}
