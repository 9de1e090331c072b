"""Agents that run away are stopped, and told why: floods, chains of replies, pairs, full mailboxes."""

import http.client
import json
import threading
import time

import pytest

import bus_server
from bus_server import Budget, Refused, Storms, draft
from tests.faults import patched
from tests.kit import wire
from tests.kit.clock import Clock
from tests.kit.hostile import HOST, head
from tests.kit.processes import PATIENCE, Server, wait_until


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def storms(clock):
    return Storms(clock, rate=50)


def message(sender, to, depth=0, **members):
    return draft({"from": sender, "to": to, "msg": "x", **members}, None)._replace(depth=depth)


def check(storms, *drafts):
    storms.spend(drafts[0].sender, len(drafts))
    ways = [(one.channel, one.sender, to) for one in drafts for to in one.to]
    return storms.check(drafts, ways, {(one.channel, one.sender) for one in drafts}, "here")


def refusal(storms, *drafts):
    with pytest.raises(Refused) as refused:
        check(storms, *drafts)
    assert refused.value.status == 429
    [(header, seconds)] = refused.value.headers
    assert header == "Retry-After" and int(seconds) > 0
    return refused.value.sentence, int(seconds)


def test_a_flood_is_held_to_the_rate_after_its_burst(storms, clock):
    for _ in range(Storms.BURST):
        check(storms, message("alice", "bob"))
    sentence, wait = refusal(storms, message("alice", "bob"))
    assert "faster than 50" in sentence and wait == 1
    check(storms, message("eve", "bob"))
    clock.now += wait
    for _ in range(50):
        check(storms, message("alice", "bob"))
    refusal(storms, message("alice", "bob"))


def test_an_array_counts_each_message_and_one_above_the_burst_passes_once(storms, clock):
    check(storms, *[message("alice", "bob")] * 5000)
    refusal(storms, message("alice", "bob"))
    clock.now += 80 + 1
    check(storms, message("alice", "bob"))


def test_rate_0_is_no_limit(clock):
    storms = Storms(clock, rate=0)
    for _ in range(3 * Storms.BURST):
        check(storms, message("alice", "bob"))


def test_a_chain_of_replies_ends(storms):
    check(storms, message("alice", "bob", depth=Storms.DEPTH))
    sentence, _ = refusal(storms, message("alice", "bob", depth=Storms.DEPTH + 1))
    assert "stop answering" in sentence


def test_two_that_answer_each_other_are_stopped_and_may_go_on_later(storms, clock):
    warnings = [check(storms, message("alice", "bob"))]
    for turn in range(storms.most_turns):
        clock.now += 1
        warnings.append(check(storms, message(*(("bob", "alice") if turn % 2 == 0 else ("alice", "bob")))))
    assert [bool(warning) for warning in warnings].index(True) == storms.most_turns // 4
    assert "alice and bob have answered each other 120 times" in warnings[-1]
    sentence, wait = refusal(storms, message("bob", "alice"))
    assert "answered each other" in sentence and wait == Storms.WITHIN - (storms.most_turns - 1)
    check(storms, message("alice", "bob"))  # who spoke last may add something
    clock.now += wait + 1
    check(storms, message("bob", "alice"))


def test_what_another_front_has_stored_counts_and_is_not_refused(storms, clock):
    for turn in range(storms.most_turns + 1):
        check(storms, message(*(("bob", "alice") if turn % 2 else ("alice", "bob"))))
    refusal(storms, message("bob", "alice"))
    storms.turn("default", "bob", "alice", clock.now, stored=True)
    sentence, _ = refusal(storms, message("alice", "bob"))
    assert "answered each other 120 times" in sentence


def test_the_wait_ends_when_there_is_room_for_a_turn_also_after_turns_that_were_stored(clock):
    storms = Storms(clock, rate=0, turns=2)
    for sender, to in [("alice", "bob"), ("bob", "alice")] * 2:
        storms.turn("default", sender, to, clock.now, stored=True)
        clock.now += 100
    _, wait = refusal(storms, message("alice", "bob"))
    clock.now += float(wait) + 1
    assert check(storms, message("alice", "bob"))


def test_turns_0_is_no_limit_and_no_warning(clock):
    storms = Storms(clock, rate=0, turns=0)
    for _ in range(500):
        assert not check(storms, message("alice", "bob")) and not check(storms, message("bob", "alice"))


def test_readers_and_new_names_have_a_rate_each(storms, clock):
    for _ in range(Storms.READS_BURST):
        storms.read("bob")
    with pytest.raises(Refused):
        storms.read("bob")
    storms.read("eve")
    storms.name("10.0.0.1", Storms.NAMES_BURST)
    with pytest.raises(Refused):
        storms.name("10.0.0.1", 1)
    storms.name("10.0.0.1", 0)
    clock.now += 6.1
    storms.name("10.0.0.1", 1)
    storms.read("bob")


def test_who_gave_the_bus_too_much_work_is_refused_before_its_next_request_is_parsed(storms, clock):
    """What an answer took is known only afterwards."""
    storms.read("10.0.0.1", "bob")
    storms.worked("10.0.0.1", "bob", Storms.WORK_BURST + Storms.WORK)
    with pytest.raises(Refused, match="bob makes more work than the bus has time for: wait [12] s"):
        storms.read("10.0.0.1", "bob")  # large answers are work, and so are a search and a comparison of names
    storms.read("10.0.0.1", "carl")
    clock.now += 1.1
    storms.read("10.0.0.1", "bob")
    storms.pay("10.0.0.1", work=Storms.WORK_BURST)
    with pytest.raises(Refused):
        storms.pay("10.0.0.1", work=1 << 20)


def test_the_time_before_much_work_is_no_credit_for_it(storms, clock):
    """A reader that waited for an hour pays for what it gets as any other."""
    storms.read("10.0.0.1", "bob")
    clock.now += 3600
    storms.worked("10.0.0.1", "bob", Storms.WORK_BURST + Storms.WORK)
    with pytest.raises(Refused):
        storms.read("10.0.0.1", "bob")


def test_who_speaks_all_day_is_no_new_name_the_day_after(storms, clock, monkeypatch):
    """A new name is taken from the budget of its address."""
    new = []
    monkeypatch.setattr(storms, "name", lambda owner, names: new.append(names))
    for _ in range(30):
        check(storms, message("alice", "bob"))
        clock.now += 3600
    assert sum(new) == 1


def test_two_owners_that_read_one_name_have_a_rate_each(storms):
    for _ in range(Storms.READS_BURST):
        storms.read("mallory", "all")
    with pytest.raises(Refused):
        storms.read("mallory", "all")
    storms.read("ann", "all")


def test_the_pairs_whose_turns_are_known_have_a_limit_and_the_oldest_go(storms, clock, monkeypatch):
    monkeypatch.setattr(Storms, "PAIRS", 3)
    for name in ("bob", "carl", "bob", "dora", "bob", "eve"):
        check(storms, message("alice", name))
        clock.now += Storms.NOTED
    assert [pair[2] for pair in storms.turns] == ["dora", "bob", "eve"]


def test_speaking_without_being_answered_is_no_loop(clock):
    storms = Storms(clock, rate=0)
    for _ in range(10 * storms.most_turns):
        check(storms, message("alice", "bob"))
        check(storms, message("alice", "all"))
        check(storms, message("bob", "all"))


def test_whoever_is_known_is_among_a_number_and_the_quietest_are_forgotten(storms, clock, monkeypatch):
    monkeypatch.setattr(Storms, "SENDERS", 3)
    monkeypatch.setattr(Storms, "PAIRS", 3)
    monkeypatch.setattr(Budget, "OWNERS", 3)
    for name in ("ann", "bob", "carl", "ann", "dora", "eve"):
        check(storms, message(name, "zoe"))
        storms.read(name)
        clock.now += Storms.NOTED + 1
    assert [name for _, name in storms.senders] == [*storms.sends.left] == ["ann", "dora", "eve"]
    assert [*storms.reads.left] == ["ann/", "dora/", "eve/"] and len(storms.turns) == 3


class Peer:
    def __init__(self, bus):
        self.connection = http.client.HTTPConnection("127.0.0.1", bus.port, timeout=PATIENCE)

    def ask(self, method, path, body=None):
        self.connection.request(method, path, None if body is None else json.dumps(body))
        answer = self.connection.getresponse()
        return answer.status, answer.headers, json.loads(answer.read(), parse_float=str)


def test_automatic_repliers_in_a_ring_stop_by_themselves_and_each_is_told_why(bus):
    """A to B to C to A, each answering whatever it gets, at once, as polite agents do. Three storms at a time."""
    told, over = {}, threading.Event()
    ring = {"alice": "bob", "bob": "carl", "carl": "alice"}

    def replier(name):
        peer, since = Peer(bus), "0"
        while not over.is_set():
            answer = peer.ask("GET", f"/recv?to={name}&since={since}&wait=0.2")[2]
            since = answer["now"]
            for message in answer["messages"]:
                reply = {"from": name, "to": ring[name], "msg": "thanks!", "reply_to": message["id"]}
                status, headers, said = peer.ask("POST", "/send", reply)
                if status == 429:
                    told[name] = said["error"], int(headers["Retry-After"])

    threads = [threading.Thread(target=replier, args=(name,)) for name in ring]
    for thread in threads:
        thread.start()
    try:
        peer = Peer(bus)
        for name in ring:  # begun at each place of the ring, the storms end at each of them
            assert peer.ask("POST", "/send", {"from": "dora", "to": name, "msg": "hello"})[0] == 200
        wait_until(lambda: len(told) == 3)
        seen = peer.ask("GET", "/healthz")[2]["now"]
        assert not peer.ask("GET", f"/log?since={seen}&wait=1")[2]["messages"], "it goes on"
    finally:
        over.set()
        for thread in threads:
            thread.join(PATIENCE)
    assert all("stop answering" in reason and seconds > 0 for reason, seconds in told.values())
    assert len(peer.ask("GET", "/log?max=1000")[2]["messages"]) == 3 * (1 + Storms.DEPTH)


def test_the_server_holds_a_flood_to_its_rate_and_says_so(tmp_path):
    """Five a second: a machine on which a send takes 150 ms still makes a flood."""
    with Server(tmp_path / "bus.db", "--rate", "5") as bus:
        peer, began = Peer(bus), time.monotonic()
        assert peer.ask("POST", "/send", [{"from": "alice", "to": "bob", "msg": "x"}] * Storms.BURST)[0] == 200
        statuses = [peer.ask("POST", "/send", {"from": "alice", "to": "bob", "msg": "x"})[:2] for _ in range(200)]
        took = time.monotonic() - began
        refused = [headers["Retry-After"] for status, headers in statuses if status == 429]
        assert len(refused) > 50 and set(refused) == {"1"}, "a flood came through"
        assert 200 - len(refused) <= 5 * took + 1, "more than the rate came through"


def test_a_full_mailbox_refuses_in_words_until_it_is_fetched(tmp_path):
    with Server(tmp_path / "bus.db") as bus:
        peer = Peer(bus)
        batch = [{"from": "alice", "to": "bob", "msg": "x"}] * 1000
        for sender in range(bus_server.MAILBOX_MESSAGES // 1000):
            assert peer.ask("POST", "/send", [{**each, "from": f"alice-{sender}"} for each in batch])[0] == 200
        status, headers, said = peer.ask("POST", "/send", batch[0])
        assert status == 429 and "mailbox of bob is full" in said["error"] and headers["Retry-After"]
        assert peer.ask("POST", "/send", {"from": "alice", "to": "eve", "msg": "x"})[0] == 200
        bus.kill()
        bus.start()
        peer = Peer(bus)
        assert peer.ask("POST", "/send", batch[0])[0] == 429, "a restart forgot what waits"
        assert len(peer.ask("GET", "/recv?to=bob&max=1000")[2]["messages"]) == 1000
        wait_until(lambda: peer.ask("POST", "/send", batch[0])[0] == 200)


def test_who_holds_a_quarter_of_a_mailbox_that_is_nearly_full_is_refused_and_the_others_are_not(tmp_path):
    with Server(tmp_path / "bus.db", "--rate", "0") as bus:
        peer = Peer(bus)
        for _ in range(bus_server.MAILBOX_MESSAGES * 3 // 4 // 500):
            assert peer.ask("POST", "/send", [{"from": "flood", "to": "bob", "msg": "x"}] * 500)[0] == 200
        status, headers, said = peer.ask("POST", "/send", {"from": "flood", "to": "bob", "msg": "x"})
        assert status == 429 and "nearly full" in said["error"] and "from flood" in said["error"]
        assert peer.ask("POST", "/send", {"from": "alice", "to": "bob", "msg": "x"})[0] == 200


def test_large_messages_fill_a_mailbox_by_their_bytes(tmp_path):
    small = patched("bus_server.MAILBOX_BYTES, bus_server.MUCH_BYTES = 4 << 20, 3 << 20")
    with Server(tmp_path / "bus.db", **small) as bus:
        peer, text = Peer(bus), "x" * 250_000
        needed = (4 << 20) // 250_000 + 1
        statuses = [
            peer.ask("POST", "/send", {"from": f"alice-{number % 9}", "to": "bob", "msg": text})[0]
            for number in range(needed + 2)
        ]
        assert statuses[: needed - 1] == [200] * (needed - 1) and statuses[-1] == 429


@pytest.mark.parametrize("options", [(), ("--verbose",)], ids=" ".join)
def test_a_large_answer_counts_for_the_name_that_waited_for_it(options):
    with wire.a_bus(time.monotonic, ":memory:", *options) as bus:
        bus.storms = Storms(time.monotonic, rate=50)
        reader, sender = wire.Peer(bus), wire.Peer(bus)
        reader.says(head("GET /recv?to=bob&since=0&wait=20 HTTP/1.1", HOST))
        assert bus.mailboxes.parked, "it waits"
        sender.says(wire.posted("/send", **{"from": "alice", "to": "bob", "msg": "x" * 20_000}))
        wire.come_true(lambda: reader.heard)
        assert "127.0.0.1/bob" in bus.storms.work.left and bus.storms.work.left["127.0.0.1/bob"][0] < Storms.WORK_BURST
