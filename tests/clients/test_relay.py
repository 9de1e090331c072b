"""bus_relay.py: mail passes from one bus to another, once and in order, and each reply finds its message."""
import contextlib
import itertools
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

import bus_recv
import bus_send
from tests.kit import forked, relaying
from tests.kit.bad_servers import Scripted, answer, silence, stored
from tests.kit.peers import mint
from tests.kit.processes import PATIENCE, ROOT, Server, comes_true, wait_until
from tests.kit.relaying import log, profile, relay, say, sends, texts, waiting
from tools import bus_relay

home, buses = relaying.home, relaying.buses  # fixtures

KILLS = int(os.environ.get("RELAY_KILLS", "8"))  # of each of two relays; 20 and more in full
EACH = 5 * KILLS  # messages of each of three senders on each bus


@contextlib.contextmanager
def started(*arguments, a="a", b="b"):
    """A relay as people run it, for as long as this lasts."""
    command = [sys.executable, "-I", "-S", str(ROOT / "tools" / "bus_relay.py"), *arguments, "--bus", a, "--to-bus", b]
    with forked.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


# ── Once and in order ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow(f"{2 * KILLS} relays are killed and started again while {6 * EACH} messages pass")
def test_each_message_arrives_once_and_in_order_both_ways_though_the_relays_are_killed(buses):
    a, b = buses("a", "b")

    def speak(bus, sender, to):
        for n in range(EACH):
            say(bus, sender, to, f"{n}")

    def arrive(process, there, to, enough):
        if not comes_true(lambda: waiting(there, to) >= enough, 3 * PATIENCE):
            process.kill()
            raise AssertionError(f"{waiting(there, to)} of {enough} have come to {to}: {process.stderr.read()}")

    def pass_on(to, there, **way):
        with contextlib.ExitStack() as stack:
            process = stack.enter_context(started(to, **way))
            for kill in range(KILLS):
                enough = (kill + 1) * 3 * EACH // (KILLS + 1) + random.randrange(5)
                arrive(process, there, to, enough)
                process.kill()
                process = stack.enter_context(started(to, **way))
            arrive(process, there, to, 3 * EACH)
            process.terminate()
            assert process.wait(PATIENCE) == 0

    with ThreadPoolExecutor(8) as pool:
        work = [pool.submit(speak, a, sender, "bob") for sender in ("spark", "nano", "mini")]
        work += [pool.submit(speak, b, sender, "alice") for sender in ("dell", "gb10", "orin")]
        work += [pool.submit(pass_on, "bob", b), pool.submit(pass_on, "alice", a, a="b", b="a")]
        for each in work:
            each.result()
    for bus, to, senders in ((b, "bob", ("spark", "nano", "mini")), (a, "alice", ("dell", "gb10", "orin"))):
        for sender in senders:
            assert texts(bus, to=to, **{"from": sender}) == [f"{n}" for n in range(EACH)]
    assert len(log(a)) == len(log(b)) == 6 * EACH


def test_a_relay_that_is_killed_before_the_other_bus_has_answered_sends_it_again(buses, home):
    a, b = buses("a", "b")
    say(a, "spark", "bob", "T1")
    with Scripted(silence) as other:
        profile(home, "b", other)
        with started("bob") as process:
            wait_until(lambda: sends(other))
            process.kill()
    profile(home, "b", b)
    assert relay("bob") == (0, "") and texts(b) == ["T1"]
    assert relay("bob") == (3, "") and texts(b) == ["T1"]


def test_a_relay_that_ends_before_the_cursor_moves_does_not_store_it_twice(buses, monkeypatch):
    a, b = buses("a", "b")
    for n in range(3):
        say(a, "spark", "bob", f"{n}", ttl=1000 + n)  # less is left of it each time, and that is another message
    with monkeypatch.context() as patch:
        patch.setattr(bus_recv.Cursor, "pass_over", lambda *_: sys.exit(9))
        assert relay("bob")[0] == 9 and texts(b) == ["0"]
        monkeypatch.setattr(bus_relay.Relay, "time_left", lambda self, one: 500)
        assert relay("bob")[0] == 9 and texts(b) == ["0"]
    assert relay("bob") == (0, "") and texts(b) == ["0", "1", "2"]


def test_what_was_stored_though_no_answer_came_is_not_stored_twice(buses, monkeypatch):
    a, b = buses("a", "b")
    post, lost = bus_send.post, []

    def loses(url, copy, *seconds):
        found = post(url, copy, *seconds)
        if copy["key"] in lost:
            return found
        lost.append(copy["key"])
        raise bus_send.Unreachable("lost")

    monkeypatch.setattr(bus_send, "post", loses)
    monkeypatch.setattr(bus_send, "FIRST_PAUSE", 0.001)
    for n in range(3):
        say(a, "spark", "bob", f"{n}")
    lost.clear()
    code, err = relay("bob")
    assert code == 0 and texts(b) == ["0", "1", "2"] and len(lost) == 3
    first, second, *_ = err.splitlines()
    assert first.startswith(f"bus_relay: no bus at {b.url} (lost); trying again. ")
    assert second == f"bus_relay: {b.url}: connected again"


def test_while_the_other_bus_is_away_mail_waits_and_the_sender_sees_it(buses):
    a, b = buses("a", "b")
    b.kill()
    with started("bob") as process:
        said = f"bus_relay: no bus at {b.url} (Connection refused); trying again. Is bus_server running there, "
        assert process.stderr.readline().startswith(said)
        for n in range(3):
            say(a, "spark", "bob", f"{n}")
        assert json.loads(a.get("/agents?name=bob"))["agents"][0]["online"] is False and waiting(a, "bob") == 3
        b.start()
        wait_until(lambda: texts(b) == ["0", "1", "2"])
        wait_until(lambda: json.loads(a.get("/agents?name=bob"))["agents"][0]["online"] and not waiting(a, "bob"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0 and process.stderr.read() == f"bus_relay: {b.url}: connected again\n"
    assert json.loads(a.get("/agents?name=bob"))["agents"][0]["online"] is False


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("asked, endured", [("7", 7.0), ("9" * 12, 900.0), ("9" * 99, 900.0)])
def test_it_waits_as_long_as_the_other_bus_says_up_to_15_minutes(asked, endured, status, buses, home, monkeypatch):
    (a,) = buses("a")
    slept = []
    time = SimpleNamespace(monotonic=lambda: 0.0, sleep=slept.append)
    monkeypatch.setattr(bus_relay, "time", time)
    monkeypatch.setattr(bus_recv, "HOLD_SECONDS", 1e6)
    say(a, "spark", "bob", "T1")
    with Scripted(answer({"error": "wait"}, f"Retry-After: {asked}", status=status), stored()) as other:
        profile(home, "b", other)
        code, err = relay("bob")
    assert (code, slept) == (0, [endured]) and f"not now: the bus at {other.url} ({status}: wait); trying again." in err
    first, second = sends(other)
    assert first.body == second.body


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_ends_it_also_while_the_other_bus_is_away(number, code, buses, home, interruptible):
    (a,) = buses("a")
    say(a, "spark", "bob", "T1")
    with Scripted(b"") as other:
        profile(home, "b", other)
        with started("bob") as process:
            assert "trying again" in process.stderr.readline()
            process.send_signal(number)
            assert process.wait(PATIENCE) == code and process.stderr.read() == ""
    assert waiting(a, "bob") == 1


def test_with_once_a_bus_that_is_away_ends_it_with_75(buses, monkeypatch):
    monkeypatch.setattr(bus_recv, "HOLD_SECONDS", 0.2)  # s; the time that a bus has to come back
    a, b = buses("a", "b")
    say(a, "spark", "bob", "T1")
    b.kill()
    code, err = relay("bob")
    assert code == 75 and err.startswith(f"bus_relay: no bus at {b.url} (Connection refused)") and err.count("\n") == 1


# ── What is passed on ────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_kind_of_message_arrives_as_it_was_sent(buses):
    a, b = buses("a", "b")
    strange = 'e\u0301 \U0001f980 \u202e \x1b[0m "quoted" \\ \r\n\t\u2028 end'
    fields = {"n": 0.1, "tiny": 1e-300, "large": 12345678901234567890, "deep": {"a": [1, 2.5, None, True, {"ü": []}]}}
    say(a, "spark", "bob", strange, subject=strange, type="task", priority="high", fields=fields)
    say(a, "spark", "bob", '{"a": [1.50, 1e3]}', content_type="application/json")
    say(a, "spark", "bob", "| --- \n```\n<script>", content_type="text/markdown", channel="default")
    say(a, "spark", "bob", "x" * 65536)
    say(a, "spark", ["carol", "bob"], "to two")
    with urllib.request.urlopen(f"{a.url}/send?from=spark&to=bob&subject=raw", strange.encode()):
        pass
    assert relay("bob") == (0, "")
    sent = [one for one in log(a) if one["to"] == "bob"]
    got = log(b)
    assert len(sent) == len(got) == 6
    (bus,) = {one["via"][0]["bus"] for one in got}
    for before, after in zip(sent, got):
        assert after.pop("via") == [{"bus": bus, "id": before["id"], "from": "spark"}]
        assert {**after, "ts": 0, "id": ""} == {**before, "ts": 0, "id": ""}


def test_only_the_named_receivers_and_this_channel_are_passed_on(buses):
    a, b = buses("a", "b")
    for to in ("bob", "carol", "dave", "all"):
        say(a, "spark", to, to)
    say(a, "spark", "bob", "elsewhere", channel="ops")
    assert relay("bob,carol") == (0, "") and texts(b) == ["bob", "carol"]
    assert relay("all") == (0, "") and texts(b) == ["bob", "carol", "all"]
    assert relay("bob", "--channel", "ops") == (0, "") and texts(b, channel="ops") == ["elsewhere"]
    assert relay("bob", "--since", "0") == (0, "") and len(log(b)) == 4


def test_of_several_names_all_unread_mail_is_passed_on_at_the_first_start(buses):
    """The first has no mail, so the bus would begin at the end; the third has read some."""
    a, b = buses("a", "b")
    for to, msg in (("carol", "1"), ("dave", "read"), ("dave", "2"), ("carol", "3")):
        say(a, "spark", to, msg)
    read = next(bus_recv.receive("dave", url=a.url, once=True))
    a.get(f"/recv?to=dave&since={read['ts']}&ack=true")
    code, _ = relay("bob", "carol", "dave")
    assert code == 0 and texts(b, to="carol") == ["1", "3"] and "2" in texts(b, to="dave")
    assert relay("carol", "dave")[0] == 0 and texts(b, to="carol") == ["1", "3"]


def test_another_reader_of_the_name_on_this_machine_and_the_relay_have_cursors_of_their_own(buses):
    a, b = buses("a", "b")
    say(a, "spark", "bob", "T1")
    assert [one["msg"] for one in bus_recv.receive("bob", url=a.url, once=True)] == ["T1"]
    with bus_recv.Cursor(json.loads(a.get("/healthz"))["bus"], "default", "bob", print).lock:
        assert relay("bob", "--since", "0") == (0, "") and texts(b) == ["T1"]


def test_a_ttl_is_what_is_left_of_it(buses, home, monkeypatch):
    a, b = buses("a", "b")
    say(a, "spark", "bob", "T1", ttl=60)
    say(a, "spark", "bob", "T2", ttl=5)
    say(a, "spark", "bob", "T3")
    monkeypatch.setattr(bus_relay.Relay, "time_left", aged(10))
    code, err = relay("bob")
    assert code == 0 and "its ttl was over before it could be passed on" in err
    assert [one["msg"] for one in log(b)] == ["T1", "T3"] and 45 < log(b)[0]["ttl"] <= 51


def aged(seconds):
    """Relay.time_left() so many seconds later."""
    whole = bus_relay.Relay.time_left

    def time_left(self, one):
        self.answered -= seconds
        try:
            return whole(self, one)
        finally:
            self.answered += seconds

    return time_left


# ── No loops ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ways", [["ab", "ba"], ["ab", "bc", "ca"], ["ab", "bc", "ca", "ba", "cb", "ac"]],
                         ids=["there and back", "a ring", "a ring both ways round"])  # fmt: skip
def test_each_bus_of_a_ring_gets_each_message_once(ways, buses):
    names = sorted({*"".join(ways)})
    made = buses(*names)
    for name, bus in zip(names, made):
        say(bus, "spark", "all", f"all from {name}")
        say(bus, "spark", "bob", f"bob from {name}")
    before = None
    for rounds in itertools.count():
        assert rounds < 9, "it goes round and round"
        for one, other in ways:
            code, err = relay("bob", "all", a=one, b=other)
            assert code in (0, 3) and err == ""
        before, now = now_of(made), before
        if now == before:
            break
    for bus in made:
        assert sorted(texts(bus)) == sorted(f"{to} from {name}" for to in ("all", "bob") for name in names)


def now_of(made):
    return [[one["id"] for one in log(bus)] for bus in made]


def test_the_same_bus_twice_is_refused(buses, home):
    (a,) = buses("a")
    profile(home, "b", a)
    say(a, "spark", "bob", "T1")
    assert relay("bob") == (2, f"bus_relay: {a.url} and {a.url} are the same bus: give two\n")
    assert waiting(a, "bob") == 1


@pytest.mark.parametrize("closed", ["a", "b"])
def test_a_bus_that_refuses_it_is_named(closed, buses, home):
    buses("b" if closed == "a" else "a")
    mint(home / "closed.db", carol=[])
    with Server(home / "closed.db") as refusing:
        profile(home, closed, refusing)
        code, err = relay("bob")
    assert (code, err.startswith(f"bus_relay: {refusing.url}: this bus needs a token")) == (1, True), err


def test_whatever_somebody_writes_into_a_member_ends_no_relay(buses):
    """One that ends begins again with the same message."""
    a, b = buses("a", "b")
    members = "ttl reply_to via relayed_from type subject priority content_type redacted attempt".split()
    values = None, True, [], {}, [[None]], {"x": []}, -1, 0.5, "", "\n x"
    for member, value in itertools.product(members, values):
        strange = {"from": "spark", "to": "bob", "msg": "strange", member: value}  # bus_send.py sends no null
        with contextlib.suppress(urllib.error.HTTPError):  # a bus takes no ttl of -1
            urllib.request.urlopen(f"{a.url}/send", json.dumps(strange).encode()).close()
    say(a, "spark", "bob", "last")
    assert relay("bob")[0] == 0 and texts(b)[-1] == "last"
    assert texts(b, msg="strange")[0] and any(one.get("subject") == {"x": []} for one in log(b))


@pytest.mark.parametrize("via", [
    "b", 7, {"bus": "b"}, [1, None, "b"], [{"bus": 5, "id": []}], [{"bus": "a b", "id": "zz"}], [{}],
    [{"bus": "x" * 999, "id": "1"}], [{"bus": ["b", 0.5], "id": 5, "from": 1}],
])  # fmt: skip
def test_whatever_somebody_writes_into_via_the_message_arrives_with_it(via, buses):
    a, b = buses("a", "b")
    for n in range(2):
        say(a, "spark", "bob", f"{n}", fields={"via": via})
    assert relay("bob") == (0, "") and texts(b) == ["0", "1"]
    before = via if isinstance(via, list) else [via]
    assert all(one["via"][:-1] == before for one in log(b))


# ── Replies ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_reply_answers_the_same_message_on_the_other_bus(buses):
    a, b = buses("a", "b")
    question = say(a, "spark", "bob", "Is T1 done?")
    assert relay("bob") == (0, "")
    reply = say(b, "bob", "spark", "Yes.", reply_to=log(b)[-1]["id"])
    assert relay("spark", a="b", b="a") == (0, "")
    got = log(a)[-1]
    assert (got["from"], got["to"], got["msg"], got["reply_to"]) == ("bob", "spark", "Yes.", question)
    say(a, "spark", "bob", "Thanks.", reply_to=got["id"])
    say(a, "spark", "bob", "And T2?", reply_to=question)
    assert relay("bob") == (0, "")
    thanks, more = log(b)[-2:]
    assert thanks["reply_to"] == reply and "reply_to" not in more and more["via"][0]["reply_to"] == question


def test_a_reply_at_the_end_of_a_long_chain_on_the_other_bus_holds_up_nobody(buses):
    """The chain has 33 messages on b, so that an answer to its last one is 429 there; a has a copy of the last one."""
    a, b = buses("a", "b")
    last = None
    for n in range(33):
        last = say(b, "mallory", "alice" if n == 32 else "mallory", f"{n}", reply_to=last)
    assert relay("alice", a="b", b="a") == (0, "")
    copy = log(a)[-1]["id"]
    answered = say(a, "alice", "mallory", "answer", reply_to=copy)
    say(a, "carol", "mallory", "innocent")
    assert relay("mallory") == (0, "")
    answer, innocent = log(b)[-2:]
    assert (answer["msg"], innocent["msg"]) == ("answer", "innocent") and "reply_to" not in answer
    assert (answer["via"][-1]["id"], answer["via"][-1]["reply_to"]) == (answered, copy)


def test_a_question_gets_its_answer_from_the_other_network(buses):
    """agent-bus ask waits on one bus, and bob answers on the other."""
    a, b = buses("a", "b")
    with ThreadPoolExecutor(1) as pool, started("bob"), started("spark", a="b", b="a"):
        asked = pool.submit(bus_send.ask, "bob", "Is T1 done?", timeout=PATIENCE, url=a.url, sender="spark")
        wait_until(lambda: texts(b, to="bob"))
        say(b, "bob", "spark", "Yes.", reply_to=log(b)[0]["id"])
        assert asked.result()["reply"]["msg"] == "Yes."


# ── As documented ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_lines_of_deploy_md_connect_two_networks(buses, home):
    lines = re.findall(r"^python3 (tools/bus_relay.py .*)$", (ROOT / "docs" / "deploy.md").read_text(), re.MULTILINE)
    assert len(lines) == 2
    a, b = buses("home", "work")
    with contextlib.ExitStack() as stack:
        for line in lines:
            command = [sys.executable, "-S", *shlex.split(line)]
            process = stack.enter_context(forked.Popen(command, cwd=ROOT, stderr=subprocess.PIPE))
            stack.callback(process.kill)
        say(a, "alice", "bob", "there")
        wait_until(lambda: texts(b, to="bob") == ["there"])
        say(b, "bob", "alice", "and back", reply_to=log(b)[0]["id"])
        wait_until(lambda: texts(a, to="alice") == ["and back"])
