"""What an agent is told and held to: loops, full mailboxes, attempts, and what it wrote by mistake.

| test | seen red on 2026-11-28's code |
|---|---|
| two_that_answer_each_other, turns_0 | no warning, 429 at 31, no --turns |
| a_sender_that_fills_a_mailbox | it stores 10,000, and then all get 429 |
| an_attempt_that_was_none | after five the job is a dead letter |
| a_ttl_below_a_millisecond | 200 |
| a_form_is_refused, json_after_a_bom | the frame is delivered; 400 |
"""
import contextlib
import itertools
import json
import socket
import struct
import subprocess

import pytest

from tests.faults import program, skipped_without
from tests.kit.peers import Peer, ask, metric, mint, post, stored
from tests.kit.processes import PATIENCE, Server, wait_until

# Loops


def turns(bus, count, names=("ann", "bob")):
    """The answers to messages that two send each other in turn; the first makes no turn."""
    replies = []
    with Peer(bus) as peer:
        for number in range(count + 1):
            body = {"from": names[number % 2], "to": names[1 - number % 2], "msg": "and you?"}
            replies.append(peer.send("POST", "/send", body).answer())
            if replies[-1].status != 200:
                break
    return replies[1:]


def first(replies, true):
    """The number of the first turn of which it is true, from 1; 0 if of none."""
    return next((number for number, reply in enumerate(replies, 1) if true(reply)), 0)


def is_warned(reply):
    return reply.status == 200 and "warning" in reply.json


def is_stopped(reply):
    return reply.status == 429


@pytest.mark.parametrize(("options", "warned", "stopped"), [((), 30, 120), (("--turns", "40"), 10, 40)])
def test_two_that_answer_each_other_are_warned_and_then_stopped(tmp_path, options, warned, stopped):
    with Server(tmp_path / "bus.db", *options) as bus:
        replies = turns(bus, 130)
        assert abs(first(replies, is_warned) - warned) <= 1
        assert abs(first(replies, is_stopped) - stopped) <= 1
        warning = replies[warned + 2].json["warning"]
        assert isinstance(warning, str) and "ann" in warning and "bob" in warning
        assert all(map(is_warned, replies[warned + 1 : stopped - 2])), "as long as it goes on"
        refused = replies[-1]
        assert 1 <= int(refused.fields["retry-after"]) <= 600 and "stop" in refused.json["error"]
        other = turns(bus, 3, ("carl", "dora"))
        assert not any(map(is_warned, other)), "others are not meant"
        assert not is_warned(post(bus, "carl")), "nor is one who was never answered"


def test_turns_0_turns_both_off(tmp_path):
    with Server(tmp_path / "bus.db", "--turns", "0") as bus:
        replies = turns(bus, 150)
        assert len(replies) == 150 and not first(replies, is_warned) and not first(replies, is_stopped)


def test_the_figures_of_the_guard_are_those_of_its_option(tmp_path):
    from tests.kit.processes import COMMAND

    text = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, timeout=PATIENCE).stdout
    assert "--turns" in text and "120" in text


def test_a_question_is_warned_of_too(bus):
    """What is sent by another door counts, and is told, as well."""
    turns(bus, 40)
    reply = ask(bus, "POST", "/ask?wait=0", {"from": "ann", "to": "bob", "msg": "and you?"})
    assert "warning" in reply.json


# An innocent


@pytest.mark.parametrize("kind", ["open", "closed"])
@pytest.mark.slow("fills a mailbox with 7,500 messages")
def test_a_sender_that_fills_a_mailbox_does_not_make_others_pay(tmp_path, kind):
    of = {"flood": None, "ann": None, "carl": None, "bob": None}
    if kind == "closed":
        of = mint(tmp_path / "bus.db", flood=["--send-only"], ann=[], carl=[], bob=[])
    with Server(tmp_path / "bus.db") as bus:

        def send(sender, count):
            body = [{"from": sender, "to": "bob", "msg": "x"}] * count
            return ask(bus, "POST", "/send", body, of[sender])

        sent = 0
        for _ in range(55):
            reply = send("flood", 200)
            if reply.status != 200:
                break
            sent += 200
        assert reply.status == 429 and 7400 <= sent <= 7700, (reply.status, sent)
        assert int(reply.fields["retry-after"]) >= 1
        for sender in ("ann", "carl"):
            for _ in range(3):
                assert send(sender, 100).status == 200, f"{sender} holds little of it"
        assert send("flood", 1).status == 429
        ask(bus, "GET", "/recv?to=bob&since=0&max=1000", token=of["bob"])
        since = int(stored(bus, "bob", sender="ann", token=of["ann"]), 16) / 1e6
        ask(bus, "GET", f"/recv?to=bob&since={since:.6f}", token=of["bob"])
        assert send("flood", 1).status == 200, "it was read"


def test_a_mailbox_that_many_fill_a_little_takes_all_of_it(bus):
    """Eight senders hold an eighth each: none of them is refused before the mailbox is full."""
    with Peer(bus) as peer:
        for number in range(48):
            body = [{"from": f"s{number % 8}", "to": "bob", "msg": "x"}] * 200
            assert peer.send("POST", "/send", body).answer().status == 200, number


# Attempts


def break_off(peer):
    """As when its machine goes: no FIN, a reset."""
    peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


@pytest.mark.parametrize("waits", [False, True])
def test_an_attempt_that_was_none_does_not_count(tmp_path, waits):
    """A worker's connection breaks before it has the whole answer, five times: the job is as new."""
    with Server(tmp_path / "bus.db", "--max-body", "9999999") as bus:
        if not waits:
            one = stored(bus, "queue", "x" * 8_000_000)
        for number in range(5):
            with Peer(bus, room=4096) as peer:
                peer.send("POST", "/claim", {"to": "queue", "wait": 20, "lease": 600})
                if waits and not number:
                    wait_until(lambda: metric(bus, "parked") == 1)
                    one = stored(bus, "queue", "x" * 8_000_000)
                assert peer.sock.recv(100).startswith(b"HTTP/1.1 200 ")
                break_off(peer)
        reply = ask(bus, "POST", "/claim", {"to": "queue", "wait": 20}).json["messages"]
        assert [(each["id"], each["attempt"]) for each in reply] == [(one, 1)]
        assert ask(bus, "POST", "/claim", {"to": "queue.dead", "wait": 0}).json["messages"] == []


def test_an_attempt_counts_when_it_was_handed_out_whole(bus):
    stored(bus, "queue")
    for attempt in range(1, 4):
        [job] = ask(bus, "POST", "/claim", {"to": "queue", "wait": 0}).json["messages"]
        assert job["attempt"] == attempt
        assert ask(bus, "POST", "/nack", {"id": job["id"], "lease": job["lease"]}).status == 200


# What was written by mistake


def test_a_ttl_below_a_millisecond_is_400(bus):
    for door, ttl in itertools.product(("/send", "/ask"), (1e-7, 0.0009, 0.000999, 0, -1, 1e-300)):
        body = {"from": "ann", "to": "bob", "msg": "x", "ttl": ttl}
        assert ask(bus, "POST", f"{door}?wait=0", body).status == 400, (door, ttl)
        assert ask(bus, "POST", f"{door}?wait=0&from=ann&to=bob&ttl={ttl:.7f}", b"x").status == 400, (door, ttl)
    assert ask(bus, "GET", "/log").json["messages"] == []


def test_a_ttl_of_a_millisecond_is_one(bus):
    one = stored(bus, "bob", ttl=0.001)
    wait_until(lambda: ask(bus, "GET", f"/message/{one}").json["state"] == "expired")


@skipped_without(program("curl"))
def test_a_form_is_refused_with_what_to_do(bus):
    """`curl -F` makes a form of the text; that frame is no message."""
    url = f"{bus.url}/send?from=w&to=x"
    done = subprocess.run(["curl", "-s", "-F", "msg=hello", url], capture_output=True, text=True, timeout=PATIENCE)
    assert "--data-binary" in json.loads(done.stdout)["error"]
    assert ask(bus, "GET", "/log").json["messages"] == []
    done = subprocess.run(["curl", "-s", "--data-binary", "hello", url], capture_output=True, timeout=PATIENCE)
    assert json.loads(done.stdout)["ok"] is True


def test_a_form_is_400_at_every_door(bus):
    frame = b'--x\r\nContent-Disposition: form-data; name="msg"\r\n\r\nhello\r\n--x--\r\n'
    for path in ("/send?from=w&to=x", "/send", "/ask?from=w&to=x&wait=0", "/ask"):
        reply = ask(bus, "POST", path, frame, Content_Type="multipart/form-data; boundary=x")
        assert reply.status == 400 and "--data-binary" in reply.json["error"], path


BOM = b"\xef\xbb\xbf"


def test_json_after_a_bom_is_json(bus):
    one = stored(bus, "queue")
    body = {"from": "ann", "to": "queue", "msg": "x", "id": one, "wait": 0}
    for path in ("/recall", "/send", "/ask?wait=0", "/claim"):
        assert ask(bus, "POST", path, BOM + json.dumps(body).encode()).status == 200, path


def test_an_array_after_a_bom_is_one_and_a_bom_inside_stays(bus):
    body = [{"from": "ann", "to": "bob", "msg": "\ufeffx"}]
    assert ask(bus, "POST", "/send", BOM + json.dumps(body, ensure_ascii=False).encode()).status == 200
    assert ask(bus, "GET", "/recv?to=bob&since=0").json["messages"][0]["msg"] == "\ufeffx"
    with contextlib.suppress(ValueError):
        assert ask(bus, "POST", "/send", BOM + BOM + b"{}").status == 400
