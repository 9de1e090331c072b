"""bus_send.py: what is sent, what a fault does to it, and what its sender is told."""
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time

import pytest

import bus_send
from tests.clients.test_clients import Clock, program, reader, recv, refusing, run, send
from tests.kit import bad_servers
from tests.kit.bad_servers import FAULTS, HTML, NOON, Scripted, answer, mail, message, page, stored
from tests.kit.processes import PATIENCE, ROOT

pytestmark = pytest.mark.usefixtures("home")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_send_through_a_fault_never_says_ok_and_is_repeated_with_the_same_key(fault, hurry):
    began = time.monotonic()
    with Scripted(FAULTS[fault]) as server, pytest.raises(bus_send.Unreachable):
        bus_send.send("dell", "hi", url=server.url, sender="spark", patience=0)
    with Scripted(FAULTS[fault], stored()) as server:
        assert bus_send.send("dell", "hi", url=server.url, sender="spark")["id"] == "652a7c1b2f3e1"
        first, second = server.asked
    assert first.body == second.body and first.json["key"] and first.json["msg"] == "hi"
    assert time.monotonic() - began < bad_servers.DRIP_SECONDS


def test_a_send_to_a_closed_port_is_unreachable_and_names_its_key(hurry):
    code, out, err = run("bus_send.py", "dell", "--from", "spark", "--timeout", "0", stdin=b"hi",
                         env={"AGENT_BUS_URL": refusing()})  # fmt: skip
    assert code == 75 and out == "" and err.count("\n") == 1
    assert "refused" in err and re.search(r"--key [0-9a-f]{32}$", err)


def test_what_watches_an_exchange_never_holds_up_the_end_of_the_program():
    """SIGTERM may come when the watch has begun and nobody could cancel it yet."""
    here, there = socket.socketpair()
    with here, there, bus_send.hung_up_after(60, here):
        assert [thread for thread in threading.enumerate() if not thread.daemon] == [threading.main_thread()]


def test_every_send_makes_its_own_key_and_a_given_key_is_kept():
    with Scripted(stored()) as server:
        for key in (None, None, "mine"):
            bus_send.send("dell", "hi", url=server.url, sender="spark", key=key)
        one, other, given = (asked.json["key"] for asked in server.asked)
    assert one != other and given == "mine"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_never_followed(status, hurry):
    with Scripted(stored(), mail()) as elsewhere:
        moved = page(status, HTML, f"Location: {elsewhere.url}/send")
        with Scripted(moved, stored(), moved, mail(message(1))) as server:
            bus_send.send("dell", "hi", url=server.url, sender="spark")
            assert next(reader(server.url).messages())["id"] == "1"
        assert not elsewhere.asked


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 422])
def test_a_refusal_of_the_bus_ends_with_its_sentence_and_1(status):
    with Scripted(answer({"error": "to is \x1b[31m no name"}, status=status)) as server:
        assert send(server) == (1, "", "bus_send: to is \\x1b[31m no name\n")
        assert recv(server) == (1, "", "bus_recv: to is \\x1b[31m no name\n")
        with pytest.raises(bus_send.Refused) as refused:
            bus_send.send("dell", "hi", url=server.url, sender="spark")
        assert refused.value.status == status and len(server.asked) == 4  # the reader asked /healthz too


def test_pauses_double_up_to_a_minute_and_retry_after_makes_them_longer(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(bus_send, "time", clock)
    monkeypatch.setattr(bus_send.random, "uniform", lambda low, high: high)
    busy = answer({"error": "busy"}, "Retry-After: 7", status=503)
    with Scripted(b"", b"", busy, *[b""] * 5, stored()) as server:
        bus_send.send("dell", "hi", url=server.url, sender="spark", patience=1000)
    assert clock.slept == [1, 2, 7, 8, 16, 32, 60, 60]


def test_patience_ends_a_send(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(bus_send, "time", clock)
    with Scripted(b"") as server, pytest.raises(bus_send.Unreachable):
        bus_send.send("dell", "hi", url=server.url, sender="spark", patience=30)
    assert 15 < sum(clock.slept) < 30


def test_everything_said_about_a_message_reaches_the_bus():
    with Scripted(stored()) as server:
        given = ["--subject", "T1 ü", "--reply-to", "652a7c1b2f3e1", "--type", "result", "--priority", "high",
                 "--ttl", "60",
                 "--key", "k", "--channel", "ops", "--from", "gb10"]  # fmt: skip
        assert send(server, *given, stdin=b"zwei\n\tZeilen\r\n\n")[0] == 0
        assert server.asked[0].json == {
            "from": "gb10", "to": "dell", "msg": "zwei\n\tZeilen\r\n\n", "subject": "T1 ü", "reply_to": "652a7c1b2f3e1",
            "type": "result", "priority": "high", "ttl": 60, "key": "k", "channel": "ops",
        }  # fmt: skip
        assert (server.asked[0].method, server.asked[0].target) == ("POST", "/send")
        assert server.asked[0].headers["user-agent"] == "Mozilla/5.0"


def test_names_with_commas_are_a_list_and_the_environment_fills_in():
    with Scripted(stored()) as server:
        env = {"AGENT_NAME": "spark", "AGENT_BUS_CHANNEL": "ops", "AGENT_BUS_UA": "x/1"}
        assert run("bus_send.py", "a,b", stdin=b"hi", env={**env, "AGENT_BUS_URL": f"{server.url}/bus/"})[0] == 0
        asked = server.asked[0]
    assert asked.json["to"] == ["a", "b"] and asked.json["from"] == "spark" and asked.json["channel"] == "ops"
    assert asked.target == "/bus/send" and asked.headers["user-agent"] == "x/1"


@pytest.mark.parametrize("stdin, sentence", [
    (b"", "empty"), (b" \n\t\n", "empty"), (b"gr\xfc\xdfe", "not UTF-8 at byte 2"), (b"\xed\xa0\x80", "not UTF-8"),
])  # fmt: skip
def test_a_message_that_is_none_is_not_sent(stdin, sentence):
    with Scripted(stored()) as server:
        code, out, err = send(server, stdin=stdin)
        assert (code, out, server.asked) == (2, "", []) and sentence in err and err.count("\n") == 1


def test_a_send_without_a_sender_or_a_url_is_a_wrong_configuration():
    with Scripted(stored()) as server:
        code, _, err = send(server, AGENT_NAME="")
        assert code == 2 and "--from" in err and "AGENT_NAME" in err
        for url in ("localhost:8080", "ftp://x", "http://", "http://a b", "http://x:99999", "http://x/?y", "http://[::1"):
            code, out, err = send(server, AGENT_BUS_URL=url)
            assert (code, out) == (2, "") and err.count("\n") == 1, (url, err)
        assert not server.asked


@pytest.mark.parametrize("receiver, truth", [
    ({"online": True, "last_seen": NOON, "unread": 7}, ""),
    ({"online": False, "last_seen": NOON - 6 * 3600, "unread": 7}, "queued: dell was last seen 6h ago, 7 unread\n"),
    ({"online": False, "last_seen": NOON - 59, "unread": 1}, "queued: dell was last seen under 1m ago, 1 unread\n"),
    ({"online": False, "last_seen": None, "unread": 7}, "queued: nobody has ever listened as dell, 7 unread\n"),
    ({"online": 5, "offline": 0, "unread": 7}, ""),
    ({"online": 2, "offline": 3, "unread": 7}, "queued: 2 of 5 are listening, 7 unread\n"),
    ({"online": 2, "offline": 3}, "queued: 2 of 5 are listening\n"),
    ({"online": 1, "offline": 2, "unknown": {"a": {}, "b": {"similar": ["bb"]}}},
     "queued: 1 of 3 are listening; nobody has ever listened as a, b\n"),
    ({"online": 0, "offline": 0}, "queued: 0 of 0 are listening\n"),
    ("a strange bus", ""),
    ({"online": False, "last_seen": "yesterday"}, ""),
])  # fmt: skip
def test_the_sender_is_told_when_nobody_is_there(receiver, truth):
    with Scripted(stored(receiver=receiver)) as server:
        code, out, err = send(server)
    assert code == 0 and json.loads(out)["receiver"] == receiver and out.count("\n") == 1 and err == truth


def test_a_warning_of_the_bus_and_a_repeated_key_are_told(capfd):
    with Scripted(stored(warning="30 turns with dell", receiver={"online": True, "last_seen": NOON})) as server:
        assert send(server)[2] == "warning: 30 turns with dell\n"
        assert send(server, "hi", "--ask", "--timeout", "0")[2].startswith("warning: 30 turns")
    nobody = {"online": False, "last_seen": None}
    bus_send.report({"ok": True, "ts": NOON, "duplicate": True, "receiver": nobody}, "dell")
    assert capfd.readouterr().err == "queued: nobody has ever listened as dell (stored before, with the same key)\n"


@pytest.mark.parametrize("given, says", [
    (["--priority", "urgent"], "invalid choice: 'urgent'"), (["--reply-to", "deadbeef"], "not the id of a message"),
])  # fmt: skip
def test_a_value_that_means_nothing_is_refused(given, says):
    with Scripted(stored()) as server:
        code, _, err = send(server, *given)
        assert code == 2 and says in err and not server.asked


def test_the_file_of_another_bus_is_named_when_a_setting_is_missing(tmp_path):
    (tmp_path / "agent-bus").mkdir()
    file = tmp_path / "agent-bus" / "default.env"
    file.touch(0o600)
    file.write_text("AGENT_BUS_URL=http://other:1\nAGENT_NAME=dell\n")
    env = {"XDG_CONFIG_HOME": str(tmp_path), "AGENT_BUS_URL": "http://127.0.0.1:9", "AGENT_NAME": ""}
    for program_, *arguments in (["bus_send.py", "dell"], ["bus_recv.py"], ["tools/bus_inbox.py", "look"]):
        code, _, err = run(program_, *arguments, stdin=b"hi", env=env)
        assert code == 2 and f"AGENT_NAME; {file} is for http://other:1, which is not AGENT_BUS_URL" in err, err


def test_a_stored_message_is_a_success_when_nobody_reads_the_answer():
    with Scripted(stored()) as server, open(os.devnull, "wb") as nowhere:
        read, write = os.pipe()
        os.close(read)
        env = {"AGENT_BUS_URL": server.url, "AGENT_NAME": "spark"}
        process = program("bus_send.py", "dell", stdin=b"hi", env=env, stdout=write, stderr=nowhere)
        os.close(write)
        assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize("to", ["a,b", ["a", "b"]])
def test_several_receivers_are_a_list_or_names_with_commas(to):
    with Scripted(stored()) as server:
        bus_send.send(to, "hi", url=server.url, sender="spark")
    assert server.asked[0].json["to"] == ["a", "b"]


def test_a_send_imports_nothing_slow():
    with Scripted(stored()) as server:
        command = [sys.executable, "-I", "-S", "-X", "importtime", str(ROOT / "bus_send.py"), "dell", "--from", "spark"]
        env = {**os.environ, "AGENT_BUS_URL": server.url}
        imported = subprocess.run(command, input=b"hi", capture_output=True, env=env, timeout=PATIENCE).stderr.decode()
    modules = {line.rpartition("|")[2].strip() for line in imported.splitlines()}
    assert "http.client" in modules and not modules & {"urllib.request", "typing", "asyncio", "decimal", "uuid"}
