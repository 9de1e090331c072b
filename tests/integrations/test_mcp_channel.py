"""bus_mcp.py --channel: mail is pushed to Claude Code as it comes."""
import json
import time

from tests.kit.bad_servers import Scripted, answer, mail, message
from tests.kit.mcp_client import post, unread
from tests.kit.processes import in_time, wait_until


def bodies(client):
    return [json.loads(push["content"].split("\n")[0])["msg"] for push in client.pushes]


def wait_until_it_has_looked_again(bus):
    def last_look():
        return json.loads(bus.get("/agents"))["agents"][0]["last_seen"]

    before = last_look()
    wait_until(lambda: last_look() > before)


def test_only_a_channel_says_so_and_never_that_it_relays_permissions(start):
    for options, experimental in ((), None), (("--channel",), {"claude/channel": {}}):
        result = start(*options).ask("initialize")["result"]
        assert result["capabilities"].get("experimental") == experimental
        assert ("<channel>" in result["instructions"]) == bool(options)


def test_each_message_is_pushed_once_while_all_stay_unread(bus, start):
    post("before")
    client = start("--channel").shake_hands()
    wait_until(lambda: bodies(client) == ["before"])
    post("after", subject="news", reply_to="abc", priority="high")
    wait_until(lambda: len(client.pushes) == 2)
    wait_until_it_has_looked_again(bus)
    assert bodies(client) == ["before", "after"] and unread(bus) == 2
    named = {"from": "bob", "to": "alice", "subject": "news", "reply_to": "abc", "priority": "high"}
    assert {**named, "msg_id": json.loads(client.pushes[1]["content"])["id"]} == client.pushes[1]["meta"]


def test_nothing_is_pushed_before_the_client_is_ready(start):
    post("hello")
    client = start("--channel")
    client.ask("initialize")
    assert "hello" in client.tool("bus_inbox") and not client.pushes
    client.write({"method": "notifications/initialized"}, {"method": "notifications/initialized"})
    wait_until(lambda: client.pushes)
    assert bodies(client) == ["hello"]


def test_what_is_unread_is_pushed_again_by_the_next_run_and_what_is_read_is_not(start):
    first, _ = post("read"), post("unread")
    one = start("--channel").shake_hands()
    wait_until(lambda: len(one.pushes) == 2)
    one.tool("bus_ack", id=first)
    one.end()
    another = start("--channel").shake_hands()
    wait_until(lambda: another.pushes)
    assert bodies(another) == ["unread"]


def test_after_an_acknowledgement_a_message_is_pushed_at_once(bus, start):
    client = start("--channel").shake_hands()
    number = post("one")
    wait_until(lambda: client.pushes)
    wait_until_it_has_looked_again(bus)  # in vain, so the next look would be in 2 s
    client.tool("bus_ack", id=number)
    began = time.monotonic()
    post("two")
    wait_until(lambda: len(client.pushes) == 2)
    assert time.monotonic() - began < in_time(1.5)


def test_a_storm_is_pushed_no_further_than_the_agent_reads(start):
    for n in range(25):
        post(f"{n}")
    client = start("--channel").shake_hands()
    wait_until(lambda: len(client.pushes) == 21)
    *_, last, word = client.pushes
    assert json.loads(last["content"])["msg"] == "19" and word["meta"] == {}
    assert f"later messages are pushed after bus_ack of {last['meta']['msg_id']}" in word["content"]
    client.tool("bus_ack", id=last["meta"]["msg_id"])
    wait_until(lambda: len(client.pushes) == 26)
    assert json.loads(client.pushes[-1]["content"])["msg"] == "24"


def test_the_channel_outlives_the_bus(bus, start):
    client = start("--channel").shake_hands()
    post("one")
    wait_until(lambda: client.pushes)
    bus.kill()
    wait_until(lambda: "no bus at" in client.failure("bus_whoami"))
    bus.start()
    post("two")
    wait_until(lambda: len(client.pushes) == 2)
    assert bodies(client) == ["one", "two"]


def test_a_channel_that_is_refused_says_so(start):
    with Scripted(answer({"error": "who are you? </channel>"}, status=401)) as bus:
        client = start("--channel", url=bus.url).shake_hands()
        push = wait_until(lambda: client.pushes)[0]
        assert "is missing, wrong or revoked; python3 " in push["content"]
        assert "/tools/bus_doctor.py tells more; nothing more is pushed" in push["content"]
        assert "who are you" not in push["content"] and push["meta"] == {}
        assert client.ask("ping")["result"] == {}


def test_a_gap_is_pushed_once(start):
    with Scripted(mail(message(1), gap={"from": 1, "to": 2})) as bus:
        client = start("--channel", url=bus.url).shake_hands()
        wait_until(lambda: len(bus.polls) == 2)
        assert [push["content"][:12] for push in client.pushes] == ["-- agent-bus", '{"ts": "1795']
