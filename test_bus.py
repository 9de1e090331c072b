#!/usr/bin/env python3
"""Does a bus keep its promises? A real server, real clients, one numbered sentence for each promise.

    python3 test_bus.py                          starts bus_server.py on a free port and checks it
    BUS_URL=http://host:8080 python3 test_bus.py checks any server that speaks PROTOCOL.md, and skips what only ours has

It needs nothing installed; with pytest, `pytest test_bus.py` collects the same checks. Every check uses names of its
own, so a bus that is in use can be checked too. Exit code 0 and ALL TESTS PASS, or 1 and what went wrong.
"""

import concurrent.futures
import contextlib
import http.client
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.parse
import uuid

HERE = pathlib.Path(__file__).resolve().parent
PATIENCE = 20  # s for a client program to finish; a program that takes longer hangs


class Bus:
    """A bus to check, over http.client: what a client in another language would send."""

    def __init__(self, url):
        self.url = url
        self.parts = urllib.parse.urlsplit(url)

    def ask(self, method, path, body=None, **headers):
        """(status, headers, body bytes) of one request on a connection of its own."""
        secure = self.parts.scheme == "https"
        connection = (http.client.HTTPSConnection if secure else http.client.HTTPConnection)(
            self.parts.netloc, timeout=90
        )
        if isinstance(body, str):
            body = body.encode()
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        with contextlib.closing(connection):
            connection.request(
                method, self.parts.path.rstrip("/") + path, body, {"User-Agent": "Mozilla/5.0", **headers}
            )
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def json(self, method, path, body=None, **headers):
        """(status, JSON) of one request."""
        status, _, text = self.ask(method, path, body, **headers)
        return status, json.loads(text, parse_float=str)

    def send(self, to, msg="hello", sender="tester", **members):
        """The answer to a send that must succeed."""
        status, answer = self.json("POST", "/send", json.dumps({"from": sender, "to": to, "msg": msg, **members}))
        assert status == 200 and answer["ok"] is True, (status, answer)
        return answer

    def refused(self, fields, **headers):
        """The status of a send that must be refused in words."""
        status, answer = self.json(
            "POST", "/send", fields if isinstance(fields, str) else json.dumps(fields), **headers
        )
        assert status >= 400 and answer["error"], (status, answer)
        return status

    def recv(self, to, since="0", **query):
        """The answer to a poll that must succeed."""
        query = urllib.parse.urlencode({"to": to, "since": since, **query}, doseq=True)
        status, answer = self.json("GET", f"/recv?{query}")
        assert status == 200, (status, answer)
        return answer

    def texts(self, to, since="0", **query):
        return [message["msg"] for message in self.recv(to, since, **query)["messages"]]

    def run(self, program, *arguments, stdin="", **env):
        """A client program that ends by itself: (exit code, stdout, stderr)."""
        state = tempfile.mkdtemp(prefix="agent-bus-test-")
        env = {**os.environ, "AGENT_BUS_URL": self.url, "AGENT_BUS_STATE_DIR": state, **env}
        done = subprocess.run(
            [sys.executable, str(HERE / program), *arguments],
            input=stdin.encode(),
            env=env,
            capture_output=True,
            timeout=PATIENCE,
        )
        return done.returncode, done.stdout.decode(), done.stderr.decode()


@contextlib.contextmanager
def running():
    """The bus named by BUS_URL, or one of our own on a free port with an empty database."""
    if os.environ.get("BUS_URL"):
        yield Bus(os.environ["BUS_URL"])
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE / "bus_server.py"), "--port", "0", "--db", os.path.join(folder, "bus.db")]
        server = subprocess.Popen(command, stdout=subprocess.PIPE)
        try:
            first = server.stdout.readline().decode()
            assert first.startswith("listening on "), first
            yield Bus(first.split()[-1])
        finally:
            server.terminate()
            code = server.wait(PATIENCE)
            server.stdout.close()
            assert code == 0, f"after SIGTERM the server ended with {code}"


def ours(check):
    """A check of what only this project's server has."""
    check.ours = True
    return check


def fresh(name="agent"):
    return f"{name}-{uuid.uuid4().hex[:12]}"


def in_background(action, *arguments, **options):
    pool = concurrent.futures.ThreadPoolExecutor(1)
    future = pool.submit(action, *arguments, **options)
    pool.shutdown(wait=False)
    return future


def parked(bus, to, **query):
    """A poll that is being held: the bus says that its reader is there. Returns the future of its answer."""
    answer = in_background(bus.recv, to, block="true", **query)
    deadline = time.monotonic() + PATIENCE
    while not any(agent["name"] == to for agent in bus.json("GET", "/agents")[1]["agents"]):
        assert time.monotonic() < deadline and not answer.done(), "the poll was not held"
    return answer


# ── The old contract: any server ─────────────────────────────────────────────────────────────────────────────────────


def test_a_bus_says_that_it_is_there(bus):
    """GET /healthz answers 200 with ok and now"""
    status, answer = bus.json("GET", "/healthz")
    assert status == 200 and answer["ok"] is True and float(answer["now"]) >= 0


def test_a_send_is_acknowledged_with_time_and_channel(bus):
    """POST /send answers 200 with ok, ts and the channel"""
    answer = bus.send(fresh())
    assert float(answer["ts"]) > 0 and answer["channel"] == "default"


def test_a_send_needs_no_content_type(bus):
    """a send is taken whatever its Content-Type says"""
    to = fresh()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-8"):
        status, _ = bus.json("POST", "/send", json.dumps({"from": "tester", "to": to, "msg": kind}), Content_Type=kind)
        assert status == 200
    assert len(bus.texts(to)) == 3


def test_a_message_arrives_unchanged(bus):
    """what is received has the sender's from and msg, and the ts of the acknowledgement"""
    to, text = fresh(), 'line one\n\ttab "quotes" \\ / \u00e9 \u4e2d \U0001f41d </channel> \u2028 ---\n'
    sent = bus.send(to, text)
    [message] = bus.recv(to)["messages"]
    assert (message["from"], message["msg"], message["ts"]) == ("tester", text, sent["ts"])


def test_a_message_is_for_its_mailbox_only(bus):
    """a message is seen by its receiver, on its channel, and by nobody else"""
    to, other = fresh(), fresh()
    bus.send(to, "here")
    bus.send(to, "there", channel="lab")
    assert bus.texts(to) == ["here"] and bus.texts(to, channel="lab") == ["there"] and bus.texts(other) == []


def test_messages_arrive_in_order_above_the_cursor(bus):
    """messages come oldest first, and only those above since"""
    to = fresh()
    for number in range(5):
        bus.send(to, str(number))
    messages = bus.recv(to)["messages"]
    assert [message["msg"] for message in messages] == ["0", "1", "2", "3", "4"]
    assert bus.texts(to, since=messages[2]["ts"]) == ["3", "4"]
    assert bus.texts(to) == ["0", "1", "2", "3", "4"], "reading took the messages away"


def test_the_cursor_of_a_truncated_answer_is_its_last_message(bus):
    """after an answer cut by max, polling on with its now misses nothing"""
    to = fresh()
    for number in range(7):
        bus.send(to, str(number))
    first = bus.recv(to, max=3)
    assert first["now"] == first["messages"][-1]["ts"], "now passed messages that were not delivered"
    assert bus.texts(to, since=first["now"], max=100) == ["3", "4", "5", "6"]


def test_max_is_clamped(bus):
    """max below 1 means 1"""
    to = fresh()
    bus.send(to)
    bus.send(to)
    assert len(bus.texts(to, max=0)) == 1


def test_a_parked_poll_is_answered_by_its_message(bus):
    """block=true holds the poll until a message arrives, and answers it then"""
    to = fresh()
    waiting = in_background(bus.recv, to, block="true", since=bus.json("GET", "/healthz")[1]["now"])
    bus.send(fresh())
    bus.send(to, "wake up")
    assert [message["msg"] for message in waiting.result(PATIENCE)["messages"]] == ["wake up"]


def test_a_poll_that_does_not_block_is_answered_at_once(bus):
    """without block an empty mailbox is answered with an empty list"""
    start = time.monotonic()
    assert bus.texts(fresh()) == []
    assert time.monotonic() - start < 5


def test_the_inbox_counts_what_waits(bus):
    """GET /inbox has the number of unread messages by channel and name"""
    to, channel = fresh(), fresh("channel")
    for _ in range(3):
        bus.send(to, channel=channel)
    assert bus.json("GET", "/inbox")[1]["recipients"][channel][to] == 3


def test_a_long_message_passes(bus):
    """64 KiB of msg pass unchanged"""
    to, text = fresh(), "0123456789abcdef" * 4096
    bus.send(to, text)
    assert bus.texts(to) == [text]


def test_a_malformed_send_is_refused_and_nothing_stored(bus):
    """what is no message is 400, in words, and stores nothing"""
    to = fresh()
    for fields in (
        "",
        "{",
        "[[]]",
        "7",
        {"from": "tester", "msg": "x"},
        {"to": to, "msg": "x"},
        {"from": "tester", "to": to},
        {"from": "tester", "to": to, "msg": 7},
        {"from": "a b", "to": to, "msg": "x"},
    ):
        assert bus.refused(fields) == 400, fields
    assert bus.texts(to) == []


# ── What this contract adds ──────────────────────────────────────────────────────────────────────────────────────────


@ours
def test_every_answer_names_its_bus(bus):
    """bus, a message's id and to are there, and id is the ts"""
    to = fresh()
    sent = bus.send(to)
    answer = bus.recv(to)
    [message] = answer["messages"]
    assert answer["bus"] == sent["bus"] == bus.json("GET", "/healthz")[1]["bus"]
    assert message["id"] == sent["id"] and message["to"] == to
    assert int(sent["id"], 16) == int(sent["ts"].replace(".", ""))


@ours
def test_a_retry_with_the_same_key_is_stored_once(bus):
    """the same key again is answered as the first time; with another body it is 409"""
    to, key = fresh(), uuid.uuid4().hex
    first, again = bus.send(to, key=key), bus.send(to, key=key)
    assert (first["id"], first["duplicate"], again["id"], again["duplicate"]) == (first["id"], False, first["id"], True)
    assert bus.refused({"from": "tester", "to": to, "msg": "another", "key": key}) == 409
    status, answer = bus.json(
        "POST", "/send", json.dumps({"from": "tester", "to": to, "msg": "hello"}), Idempotency_Key=key
    )
    assert status == 200 and answer["duplicate"] is True
    assert bus.texts(to) == ["hello"]


@ours
def test_an_array_is_stored_whole_or_not_at_all(bus):
    """an array of messages is one transaction with one result each"""
    to = fresh()
    good = [{"from": "tester", "to": to, "msg": str(number)} for number in range(3)]
    status, answer = bus.json("POST", "/send", json.dumps(good))
    assert status == 200 and len({result["id"] for result in answer["results"]}) == 3
    assert bus.refused([*good, {"from": "tester", "to": to}]) == 400
    assert bus.texts(to) == ["0", "1", "2"]


@ours
def test_a_list_of_names_is_one_send(bus):
    """to may be a list; each name has its own copy, and several names may be read with one cursor"""
    one, two = fresh(), fresh()
    sent = bus.send([one, two], "both")
    assert bus.texts(one) == bus.texts(two) == ["both"]
    messages = bus.recv([one, two])["messages"]
    assert [message["to"] for message in messages] == [one, two] == list(sent["ids"])
    assert [message["id"] for message in messages] == list(sent["ids"].values())
    assert bus.texts(f"{one},{two}") == ["both", "both"]


@ours
def test_a_raw_body_is_the_message(bus):
    """with to in the query the body is the message, verbatim, and the query its other members"""
    to = fresh()
    status, _ = bus.json("POST", f"/send?from=tester&to={to}&subject=x%20y", '{"not": "parsed"}\n')
    [message] = bus.recv(to)["messages"]
    assert status == 200 and (message["msg"], message["subject"]) == ('{"not": "parsed"}\n', "x y")


@ours
def test_broadcast_reaches_everyone_but_its_sender(bus):
    """to=all reaches every reader of the channel once, and not who sent it"""
    channel, one, two = fresh("channel"), fresh(), fresh()
    bus.send("all", "hear me", sender=one, channel=channel)
    assert bus.texts(two, channel=channel) == ["hear me"] and bus.texts(one, channel=channel) == []


@ours
def test_further_members_pass_unchanged(bus):
    """members that the bus does not know are delivered as they were given"""
    to, extra = (
        fresh(),
        {"subject": "S", "type": "result", "priority": "high", "reply_to": "65", "x-new": [1, {"a": None}]},
    )
    bus.send(to, **extra)
    [message] = bus.recv(to)["messages"]
    assert {member: message[member] for member in extra} == extra


@ours
def test_since_now_and_since_last(bus):
    """since=now skips what is there; since=last goes on where the name was, from its first message if it never was"""
    to = fresh()
    bus.send(to, "before")
    now = bus.recv(to, since="now", block="true")
    assert now["messages"] == [] and bus.texts(to, since=now["now"]) == []
    other = fresh()
    bus.send(other, "queued")
    first = bus.recv(other, since="last")
    assert [message["msg"] for message in first["messages"]] == ["queued"]
    assert bus.texts(other, since="last") == ["queued"], "nothing was presented yet"
    bus.recv(other, since=first["now"])
    assert bus.texts(other, since="last") == []
    bus.send(other, "new")
    assert bus.texts(other, since="last") == ["new"]


@ours
def test_since_last_is_remembered_from_its_first_use(bus):
    """a new name that asks since=last again, before it presented anything, misses no broadcast in between"""
    channel, to = fresh("channel"), fresh()
    assert bus.texts(to, since="last", channel=channel) == []
    bus.send("all", "hear me", channel=channel)
    assert bus.texts(to, since="last", channel=channel) == bus.texts(to, since="last", channel=channel) == ["hear me"]


@ours
def test_a_cursor_ahead_of_the_bus_loses_nothing(bus):
    """a reader whose clock is fast gets what is sent after it came; far ahead is 400 with a hint"""
    to = fresh()
    ahead = f"{time.time() + 120:.6f}"
    bus.recv(to, since=ahead)
    bus.send(to, "after")
    assert bus.texts(to, since=ahead) == ["after"]
    for far in (f"{time.time() + 3600:.6f}", f"{time.time() * 1000:.0f}"):
        status, answer = bus.json("GET", f"/recv?to={to}&since={far}")
        assert status == 400 and "seconds" in answer["error"]


@ours
def test_a_malformed_cursor_is_refused(bus):
    """since is decimal seconds or a word; anything else is 400"""
    for since in ("nan", "inf", "1e9", "1_000", "-1", "\u0663", "", "1.", ".5", "+1", "0x10", "12345678901"):
        status, _ = bus.json("GET", f"/recv?to=x&since={urllib.parse.quote(since)}")
        assert status == 400, since


@ours
def test_the_sender_is_told_the_truth_about_the_receiver(bus):
    """the answer to a send says whether somebody listens, since when not, and how much is unread"""
    to = fresh()
    never = bus.send(to)["receiver"]
    assert never == {"online": False, "last_seen": None, "unread": 1}
    waiting = parked(bus, to, since=bus.recv(to, since="0")["now"])
    there = bus.send(to)["receiver"]
    assert there["online"] is True and there["last_seen"] and there["unread"] == 1
    assert len(waiting.result(PATIENCE)["messages"]) == 1
    assert bus.send([to, fresh()])["receiver"] == {"online": 1, "offline": 1, "unread": 3}


@ours
def test_a_message_outlived_by_its_ttl_is_not_delivered(bus):
    """after its ttl a message is not delivered, not counted, and shown as expired"""
    to = fresh()
    sent = bus.send(to, ttl=0.001)
    deadline = time.monotonic() + PATIENCE
    while bus.json("GET", f"/message/{sent['id']}")[1]["state"] != "expired":
        assert time.monotonic() < deadline
    assert bus.texts(to) == [] and bus.json("GET", "/inbox")[1]["recipients"]["default"][to] == 0
    for ttl in (0, -1, "5", True, None.__class__, 1e300):
        if not isinstance(ttl, type):
            assert bus.refused({"from": "tester", "to": to, "msg": "x", "ttl": ttl}) == 400


@ours
def test_an_observer_sees_all_and_moves_nothing(bus):
    """GET /log shows every message, and neither reads it nor listens"""
    to, sender = fresh(), fresh()
    sent = bus.send(to, "seen", sender=sender)
    for query in (f"to={to}", f"from={sender}", f"to={to}&channel=default"):
        [message] = bus.json("GET", f"/log?{query}")[1]["messages"]
        assert message["id"] == sent["id"]
    assert bus.json("GET", f"/log?to={to}&channel=lab")[1]["messages"] == []
    assert bus.send(to)["receiver"] == {"online": False, "last_seen": None, "unread": 2}
    waiting = in_background(bus.json, "GET", f"/log?from={sender}&since={sent['ts']}&block=true")
    later = bus.send(fresh(), "later", sender=sender)
    assert [message["id"] for message in waiting.result(PATIENCE)[1]["messages"]] == [later["id"]]


@ours
def test_the_cursor_is_the_receipt(bus):
    """GET /message/<id> and /agents follow a message from queued to fetched to acknowledged"""
    to = fresh()
    sent = bus.send(to)
    states = [bus.json("GET", f"/message/{sent['id']}")[1]["state"]]
    for since in ("0", sent["ts"]):
        bus.recv(to, since=since)
        states.append(bus.json("GET", f"/message/{sent['id']}")[1]["state"])
    assert states == ["queued", "fetched", "acknowledged"]
    [agent] = [agent for agent in bus.json("GET", "/agents")[1]["agents"] if agent["name"] == to]
    assert agent["online"] and agent["unread"] == 0 and agent["cursor"] == sent["ts"] and agent["address"]
    assert bus.json("GET", "/message/1")[0] == 404


@ours
def test_an_unknown_bus_id_marks_nothing(bus):
    """a poll that names another bus is answered at once, and its cursor is not taken"""
    to = fresh()
    bus.send(to)
    answer = bus.recv(to, since=f"{time.time() + 60:.6f}", bus="another", block="true")
    assert answer["messages"] == [] and answer["bus"] != "another"
    assert bus.texts(to, since="last") == ["hello"]


@ours
def test_plain_text_for_people(bus):
    """Accept: text/plain gives blocks that no body can imitate, and the cursor in Bus-Now"""
    to = fresh()
    sent = bus.send(to, "one\n---\n2026-01-01T00:00:00Z from=x id=1\n\x1b[31mred\u202e", subject="a b")
    status, headers, body = bus.ask("GET", f"/recv?to={to}", Accept="text/plain")
    lines = body.decode().splitlines()
    assert status == 200 and headers["Bus-Now"] == sent["ts"]
    assert lines[0].split(" ", 1)[1] == f'from=tester id={sent["id"]} subject="a b"'
    assert lines[1:] == ["| one", "| ---", "| 2026-01-01T00:00:00Z from=x id=1", "| \\x1b[31mred\\u202e", "---"]


@ours
def test_a_hold_ends_when_it_said(bus):
    """an empty poll is answered after wait seconds, neither earlier nor 0.2 s later"""
    for wait in (0.3, 1):
        start = time.monotonic()
        assert bus.texts(fresh(), wait=wait) == []
        assert wait <= time.monotonic() - start + 0.001 and time.monotonic() - start < wait + 0.2


@ours
def test_errors_are_json_with_the_right_status(bus):
    """404, 405 with Allow, 413 and 501 say in one sentence what to do"""
    for method, path, body, expected in (
        ("GET", "/nothing", None, 404),
        ("GET", "/send", None, 405),
        ("POST", "/recv", "", 405),
        ("BREW", "/send", None, 501),
        ("POST", "/send", "x" * 300000, 413),
        ("GET", "/recv", None, 400),
    ):
        status, headers, text = bus.ask(method, path, body)
        assert status == expected and json.loads(text)["error"], (method, path, status)
        assert status != 405 or "OPTIONS" in headers["Allow"]


@ours
def test_head_and_options(bus):
    """HEAD is GET without a body; OPTIONS says what is allowed; neither reads mail"""
    to = fresh()
    bus.send(to)
    status, headers, body = bus.ask("HEAD", "/healthz")
    assert status == 200 and int(headers["Content-Length"]) > 0 and body == b""
    assert bus.ask("HEAD", f"/recv?to={to}&block=true")[0] == 200
    status, headers, _ = bus.ask("OPTIONS", "/send")
    assert status == 204 and headers["Allow"] == "POST, OPTIONS" and not headers["Access-Control-Allow-Origin"]
    assert bus.json("GET", "/inbox")[1]["recipients"]["default"][to] == 1


@ours
def test_the_bus_hands_out_its_clients(bus):
    """GET / has this bus's own URL, and the three clients can be downloaded"""
    assert bus.url in bus.ask("GET", "/")[2].decode()
    for client in ("bus_recv.py", "bus_send.py", "bus_listener.sh"):
        assert bus.ask("GET", f"/{client}")[2] == (HERE / client).read_bytes()


@ours
def test_the_clients_talk(bus):
    """bus_send.py sends what bus_recv.py prints"""
    to = fresh()
    code, out, err = bus.run("bus_send.py", to, "--subject", "T1 done", stdin="4/4 are honeypots\n", AGENT_NAME="spark")
    assert code == 0 and json.loads(out)["ok"], err
    assert "queued" in err and to in err
    code, out, err = bus.run("bus_recv.py", to, "--once")
    assert code == 0 and out.endswith('subject="T1 done"\n| 4/4 are honeypots\n---\n') and "from=spark" in out, (
        out,
        err,
    )
    code, out, _ = bus.run("bus_recv.py", fresh(), "--once", "--timeout", "0.2")
    assert code == 3 and out == ""


# ── Running ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def main():
    checks = [check for name, check in globals().items() if name.startswith("test_")]
    failed = 0
    with running() as bus:
        print(f"checking {bus.url}")
        for number, check in enumerate(checks, 1):
            if os.environ.get("BUS_URL") and hasattr(check, "ours") and not os.environ.get("BUS_OURS"):
                print(f"{number:3}. skipped: {check.__doc__}")
                continue
            try:
                check(bus)
                print(f"{number:3}. {check.__doc__}")
            except Exception:
                failed += 1
                print(f"{number:3}. FAILED: {check.__doc__}\n{traceback.format_exc()}")
    print(f"{failed} FAILED" if failed else "ALL TESTS PASS")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

if "pytest" in sys.modules:
    import pytest

    @pytest.fixture(scope="module", name="bus")
    def the_bus():
        with running() as bus:
            yield bus
