"""What the clients take on the command line, and what they say to a person, to a program, and when it goes wrong."""
import argparse
import json
import os
import pathlib
import pty
import re
import select
import socket
import subprocess
import sys
import time

import pytest

import bus_recv
import bus_send
import bus_server
from tests.clients.test_clients import Clock, program, reader, recv, refusing, run, send
from tests.kit import forked
from tests.kit.bad_servers import HTML, NOON, Scripted, answer, mail, message, page, silence, stored
from tests.kit.naive_server import Naive
from tests.kit.peers import invite
from tests.kit.processes import PATIENCE, ROOT, Server, in_time

pytestmark = pytest.mark.usefixtures("home")

VERSIONS = pathlib.Path("~/.pyenv/versions").expanduser()
PROGRAMS = [
    "bus_server.py", "bus_send.py", "bus_recv.py", "test_bus.py", "tools/agent_bus.py",
    *(f"tools/bus_{tool}.py" for tool in "doctor file inbox install join log outbox who work".split()),
    *(f"examples/{name}.py" for name in ("handover", "incident", "two_hosts", "work_queue")),
    "integrations/claude_code/bus_hook.py", "integrations/claude_code/bus_mcp.py",
]  # fmt: skip
TICK = 0x652A7C1B2F3E1


def on_a_terminal(script, *arguments, typed=b"", until=b"\n", **env):
    """The program as a person runs it: what its terminal shows until that text comes, or until the program ends."""
    ours, its = pty.openpty()
    env = {**os.environ, **env}
    command = [sys.executable, str(ROOT / script), *arguments]
    process = forked.Popen(command, stdin=its, stdout=its, stderr=its, env=env)
    os.close(its)
    os.write(ours, typed)
    shown = b""
    try:
        while until not in shown and select.select([ours], [], [], PATIENCE)[0]:
            shown += os.read(ours, 65536)
    except OSError:  # it has ended
        pass
    process.kill()
    process.wait(PATIENCE)
    os.close(ours)
    return shown.decode().replace("\r\n", "\n")


# ── What is sent ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("arguments, msg", [
    (["hello there"], "hello there"), (["hello", "there"], "hello there"), (["--subject", "s", "hello"], "hello"),
    (["--", "--no", "option"], "--no option"),
])  # fmt: skip
def test_the_text_is_taken_from_the_command_line(arguments, msg):
    """Case 20."""
    with Scripted(stored()) as server:
        assert send(server, *arguments, stdin=b"not this")[0] == 0
        assert server.asked[0].json["msg"] == msg and server.asked[0].json["to"] == "dell"


@pytest.mark.parametrize("to", ["dell, nano", " dell ,nano,"])
def test_names_may_have_a_space_and_a_comma_beside_them(to, home):
    with Scripted(stored()) as server:
        code, _, err = run("bus_send.py", to, "hi", env={"AGENT_BUS_URL": server.url, "AGENT_NAME": "spark"})
        assert code == 0 and server.asked[0].json["to"] == ["dell", "nano"], err


def test_without_a_text_a_terminal_says_how_to_end_it(home):
    """Case 21."""
    with Scripted(stored()) as server:
        env = {"AGENT_BUS_URL": server.url, "AGENT_NAME": "spark"}
        shown = on_a_terminal("bus_send.py", "dell", typed=b"hi\n\x04", until=b"sent to", **env)
        assert "bus_send: type the message, end with Ctrl-D\n" in shown and server.asked[0].json["msg"] == "hi\n"
        code, _, err = send(server)
        assert code == 0 and "Ctrl-D" not in err
        shown = on_a_terminal("bus_send.py", "dell", until=b"AGENT_NAME", AGENT_BUS_URL=server.url, AGENT_NAME="")
        assert shown.startswith("bus_send: the sender is missing"), "before a text is typed"


def test_a_person_who_asks_is_told_at_once_who_listens(home):
    said = {"online": False, "last_seen": None, "known": False, "similar": ["bob"], "unread": 1}
    reply = {"id": "652a7c1b2f3e2", "from": "bub", "msg": "yes"}
    with Scripted(stored(receiver=said, reply=None), stored(receiver=said, reply=reply)) as server:
        env = {"AGENT_BUS_URL": server.url, "AGENT_NAME": "spark"}
        shown = on_a_terminal("bus_send.py", "bub", "well?", "--ask", until=b"yes", **env)
        first, second, _ = shown.split("\n", 2)
        assert first == "queued: nobody has ever listened as bub, 1 unread; did you mean bob?"
        assert second == f"bus_send: waiting up to 300 s for the answer to {TICK:x}; it will arrive as mail"
        assert [asked.query["wait"] for asked in server.asked] == ["0.000", "25.000"]
        assert len({asked.body for asked in server.asked}) == 1


def test_a_text_without_a_receiver_is_told_that_one_is_missing():
    for words in (["hello bob"], ["hello\nbob"], []):
        code, out, err = run("bus_send.py", "--from", "alice", *words, stdin=b"")
        assert (code, out) == (2, "")
        assert err.endswith("the receiver is missing: give TO before TEXT, or --reply-to ID\n")
    said = run("bus_send.py", "--from", "alice", "bob, carol", stdin=b"")[2]
    assert "the message is empty" in said, "these are two names"


def test_an_empty_text_is_not_an_absent_one():
    with Scripted(stored()) as server:
        code, out, err = send(server, "", stdin=b"not this")
        assert (code, out) == (2, "") and err == "bus_send: the message is empty: give TEXT, or a text on stdin\n"
        assert server.asked == []


def test_fields_types_and_times():
    with Scripted(stored()) as server:
        given = ["--field", "build=17", "--field", "x=a=b", "--content-type", "text/markdown", "--ttl", "5m", "hi"]
        assert send(server, *given)[0] == 0 and send(server, "--json-body", '{"topic": 1}')[0] == 0
        first, second = (asked.json for asked in server.asked)
        assert (first["build"], first["x"], first["content_type"], first["ttl"]) == ("17", "a=b", "text/markdown", 300)
        assert second["content_type"] == "application/json" and second["msg"] == '{"topic": 1}'
        code, _, err = send(server, "--json-body", "{topic}")
        assert code == 2 and "is not JSON" in err and len(server.asked) == 2
        assert "'build' has no value: write it as K=V" in send(server, "--field", "build", "hi")[2]
        code, _, err = send(server, "--field", "a=1", "--field", "b=1", "--field", "b=2", "hi")
        assert code == 2 and err.startswith("bus_send: --field: b is given twice, and") and err.count("\n") == 1
        assert send(server, "--ttl", "soon", "hi")[0] == 2


def test_a_field_cannot_take_the_place_of_a_member():
    with Scripted(stored()) as server:
        bus_send.send("dell", "hi", url=server.url, sender="spark", fields={"to": "boss", "from": "boss", "msg": "x"})
        assert [server.asked[0].json[each] for each in ("to", "from", "msg")] == ["dell", "spark", "hi"]


@pytest.mark.parametrize("call", [bus_send.send, bus_send.ask])
def test_an_argument_that_send_does_not_know_is_no_member_of_the_message(call):
    """Case 32."""
    strange = {"patience": 1} if call == bus_send.ask else {"timeout": 1}
    with Scripted(stored()) as server:
        with pytest.raises(TypeError, match=r"has no argument .*fields="):
            call("x", "hi", url=server.url, sender="me", **strange)
        assert not server.asked
        bus_send.send("x", "hi", url=server.url, sender="me", fields={"timeout": 1}, subject="s", type=None)
        sent = server.asked[0].json
        assert sent["timeout"] == 1 and sent["subject"] == "s" and "type" not in sent


@pytest.mark.parametrize("text, seconds", [("0", 0), ("90", 90), ("0.5", 0.5), ("90s", 90), ("5m", 300), ("1.5h", 5400),
                                           ("30d", 2592000)])  # fmt: skip
def test_a_time_is_written_alike_everywhere(text, seconds):
    """Case 39."""
    assert bus_send.duration(text) == bus_recv.duration(text) == seconds
    if text == "0" or text[-1].isalpha():
        assert bus_server.duration(text) == seconds
    else:  # `--keep 30` with 30 s would remove all mail of somebody who means days
        with pytest.raises(argparse.ArgumentTypeError, match="not a time like 30d"):
            bus_server.duration(text)


@pytest.mark.parametrize("option", [
    ["bus_send.py", "dell", "hi", "--ttl"], ["bus_send.py", "dell", "hi", "--timeout"],
    ["bus_recv.py", "x", "--timeout"], ["bus_recv.py", "x", "--since"], ["tools/bus_log.py", "--since"],
    ["tools/bus_work.py", "q", "--exec", "true", "--lease"],
    ["tools/bus_outbox.py", "dell", "hi", "--ttl"], ["tools/bus_outbox.py", "dell", "hi", "--timeout"],
    ["tools/bus_work.py", "q", "--exec", "true", "--timeout"], ["tools/bus_log.py", "--timeout"],
    ["tools/bus_file.py", "get", "0" * 64, "--timeout"], ["tools/bus_doctor.py", "--hold"],
    ["bus_server.py", "--keep"], ["bus_server.py", "prune", "--older"], ["bus_server.py", "invite", "x", "--expires"],
])  # fmt: skip
def test_what_is_no_time_is_refused_everywhere(option):
    server = ["0d", "0.0h"] * (option[0] == "bus_server.py")  # there 0 has a meaning of its own, which a unit hides
    for wrong in ("5x", "m", "-1", "1e3", "5 m", *server):
        code, _, err = run(*option, wrong, env={"AGENT_BUS_URL": refusing(), "AGENT_NAME": "me"})
        assert code == 2 and err, wrong


@pytest.mark.parametrize("option, zero", [
    (["--keep"], "0 for ever"), (["prune", "--older"], "0 for all, also those of this moment"),
    (["invite", "x", "--expires"], "0 for ever"),
])  # fmt: skip
def test_what_0_means_is_said_for_each_option_of_the_bus(option, zero):
    assert run("bus_server.py", *option, "x")[2].endswith(f"45s, or {zero}\n")


# ── What is said of a send ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("to, receiver, sentence", [
    ("bob", {"online": True, "last_seen": NOON, "unread": 1, "known": True},
     "sent to bob, who is listening (now, or a moment ago)"),
    ("Laed", {"online": False, "last_seen": None, "unread": 1, "known": False, "similar": ["Lead"]},
     "queued: nobody has ever listened as Laed, 1 unread; did you mean Lead?"),
    ("Laed", {"online": False, "last_seen": None, "unread": 1, "known": False, "similar": ["Lead", "lead"]},
     "queued: nobody has ever listened as Laed, 1 unread; did you mean Lead or lead?"),
    ("x", {"online": False, "last_seen": None, "unread": 1, "known": False, "similar": []},
     "queued: nobody has ever listened as x, 1 unread"),
    ("x", {"online": False, "last_seen": None, "unread": 1, "known": True},
     "queued: nobody has ever listened as x, 1 unread"),
    ("bob", {"online": False, "last_seen": NOON - 6 * 3600, "unread": 7},
     "queued: bob was last seen 6h ago, 7 unread"),
    (["a", "b"], {"online": 2, "offline": 0}, "sent to a,b, all listening (now, or a moment ago)"),
    ("all", {"online": 1, "offline": 1, "unread": 7}, "queued: 1 of 2 are listening, 7 unread"),
    ("bob", "a bus of the first contract", "sent to bob"),
])  # fmt: skip
def test_a_person_is_told_in_one_sentence(to, receiver, sentence):
    assert bus_send.told({"ts": NOON, "receiver": receiver}, to) == sentence


def test_a_channel_that_is_not_the_usual_one_is_named():
    """Else a channel that was mistyped looks as if nobody had ever had that name."""
    nobody = {"online": False, "last_seen": None, "known": False}
    sentence = "queued: nobody has ever listened as alice on the channel swram"
    assert bus_send.told({"ts": NOON, "channel": "swram", "receiver": nobody}, "alice") == sentence


def test_a_terminal_gets_a_sentence_and_a_program_gets_json(home):
    said = {"online": False, "last_seen": None, "unread": 1, "known": False, "similar": ["\x1b[2JLead"]}
    with Scripted(stored(receiver=said)) as server:
        env = {"AGENT_BUS_URL": server.url, "AGENT_NAME": "spark"}
        sentence = "queued: nobody has ever listened as Laed, 1 unread; did you mean \\x1b[2JLead?\n"
        assert on_a_terminal("bus_send.py", "Laed", "hi", **env) == sentence
        assert json.loads(on_a_terminal("bus_send.py", "Laed", "hi", "--json", **env).split("\n")[0])["ok"] is True
        code, out, err = run("bus_send.py", "Laed", "hi", env=env)
        assert (code, json.loads(out)["receiver"]) == (0, said) and err.startswith("queued: nobody has ever listened")


def test_the_first_failure_is_said_at_once_and_the_last_line_says_what_to_try(home):
    """Case 22."""
    url = refusing()
    env = {"AGENT_BUS_URL": url, "AGENT_NAME": "spark"}

    def took():
        began = time.monotonic()
        process = program("bus_send.py", "dell", "hi", stdin=None, env=env)
        first = process.stderr.readline().decode()
        seconds = time.monotonic() - began
        process.kill()
        process.communicate(timeout=PATIENCE)
        said = f"bus_send: no bus at {url} (Connection refused); still trying, up to 30 s. Is bus_server"
        assert first.startswith(said)
        return seconds

    assert any(took() < in_time(0.5) for _ in range(5)), "the best counts"
    code, _, err = run("bus_send.py", "dell", "hi", "--timeout", "1.2", env=env)
    *_, last = err.splitlines()
    assert code == 75 and err.count("still trying") == 1 and "bus_doctor.py" in last
    assert re.search("To send it again: --key [0-9a-f]{32}$", last)


def test_to_read_one_message_of_a_bus_that_is_not_there_says_what_to_do():
    code, out, err = run("bus_recv.py", "--read", "660ba678a1b40", env={"AGENT_BUS_URL": (url := refusing())})
    assert (code, out) == (75, "") and err.startswith(f"bus_recv: no bus at {url} (Connection refused). Is bus_server")


@pytest.mark.parametrize(
    "script",
    ["bus_send.py dell hi", *(f"tools/agent_bus.py {rest}" for rest in ("who", "search T1", "redact 660ba678a1b40"))],
)
def test_a_person_is_told_of_a_silence_and_what_is_waited_for(script, home):
    with Scripted(silence) as server:
        shown = on_a_terminal(*script.split(), AGENT_BUS_URL=server.url, AGENT_NAME="spark")
        assert re.fullmatch(rf"(bus_send|agent_bus.py (who|search|redact)): waiting for {server.url}\n", shown)


@pytest.mark.parametrize("client", [bus_send, bus_recv])
def test_it_is_told_once_and_not_while_the_bus_may_hold_the_request(client, monkeypatch):
    monkeypatch.setattr(client, "SILENCE_SECONDS", 0.05)
    with Scripted(silence) as server:

        def told(path, body, *patience):
            said = []
            monkeypatch.setattr(client, "PEOPLE", [said.append])
            for seconds in patience:
                with pytest.raises(client.Unreachable):
                    client.exchange(server.url, path, body, seconds)
            return said

        for held in (("/recv?block=true&wait=1.000", None), ("/lock", b'{"names": ["a"], "wait": 0.5}')):
            assert [] in (told(*held, 0.3) for _ in range(5)), "a machine that is busy may be slow to connect"
        assert told("/recv?block=true&wait=0.000", None, 1, 0.1) == [f"waiting for {server.url}"]


def test_a_short_poll_of_a_bus_that_answers_is_no_silence(bus, home, monkeypatch):
    said = []
    monkeypatch.setattr(bus_recv, "PEOPLE", [said.append])
    monkeypatch.setattr(bus_recv, "SILENCE_SECONDS", seconds := in_time(1.5))
    monkeypatch.setenv("AGENT_BUS_URL", bus.url)
    assert list(bus_recv.receive("carol", timeout=seconds + 0.5)) == said == []


def test_to_look_at_schedules_allows_a_bus_that_is_slow(home):
    def slow(sock):
        time.sleep(1.3)
        sock.sendall(answer({"ok": True, "schedules": [], "bus": "b1"}))

    with Scripted(slow) as server:
        code, out, err = run("tools/bus_later.py", "--list", env={"AGENT_BUS_URL": server.url, "AGENT_NAME": "spark"})
    assert (code, out, err) == (0, "", "")


def test_a_program_is_told_of_the_first_failure_if_it_wants(monkeypatch):
    monkeypatch.setattr(bus_send, "time", Clock())
    said = []
    with Scripted(b"", b"", stored()) as server:
        bus_send.send("dell", "hi", url=server.url, sender="spark", warn=said.append)
    assert len(said) == 1 and "still trying" in said[0]


@pytest.mark.parametrize("number, attempts", [(socket.EAI_NONAME, 1), (socket.EAI_AGAIN, 3)])
def test_an_unknown_host_is_not_tried_again(number, attempts, monkeypatch):
    asked = []

    def resolve(*_, **__):
        asked.append(1)
        raise socket.gaierror(number, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(bus_send, "time", Clock())
    with pytest.raises(bus_send.Unreachable, match=r"no bus at .*not known\)\. .*which hop fails\. To send"):
        bus_send.send("dell", "hi", url="http://bus.example", sender="spark", patience=4)
    assert len(asked) >= attempts and (attempts > 1 or len(asked) == 1)


def test_tls_that_fails_is_not_tried_again(authority, bus, monkeypatch, tmp_path):
    certificate = authority.sign("IP:127.0.0.1")
    plain, tls = bus, ("--tls-cert", certificate.file, "--tls-key", certificate.key)
    with Server(tmp_path / "tls.db", *tls) as bus:
        url = bus.url.replace("http:", "https:")
        clock = Clock()
        monkeypatch.setattr(bus_send, "time", clock)
        says = r"\(the certificate there is not trusted by this machine: .*\)\. python3 .*/bus_doctor\.py"
        with pytest.raises(bus_send.Unreachable, match=says):
            bus_send.send("dell", "hi", url=url, sender="spark")
        other = authority.sign("IP:127.0.0.1").file
        monkeypatch.setenv("AGENT_BUS_CA", str(other))
        with pytest.raises(bus_send.Unreachable, match=f"is not trusted by {other}: set AGENT_BUS_CA to its file"):
            bus_send.send("dell", "hi", url=url, sender="spark")
        monkeypatch.setenv("AGENT_BUS_CA", authority.file)
        with pytest.raises(bus_send.Unreachable, match=r"\(Hostname mismatch, [^(_]*'localhost'\.?\)\. python3"):
            bus_send.send("dell", "hi", url=url.replace("127.0.0.1", "localhost"), sender="spark")
        with pytest.raises(bus_send.Unreachable, match="this port speaks http, not https[^?]*which hop"):
            bus_send.send("dell", "hi", url=plain.url.replace("http:", "https:"), sender="spark")
        assert clock.slept == []
        code, _, err = run("bus_recv.py", "dell", env={"AGENT_BUS_URL": plain.url.replace("http:", "https:")})
        assert code == 75 and err.startswith("bus_recv: no bus at https:") and err.endswith("which hop fails.\n")


@pytest.mark.parametrize("call", ["bus_send.py dell hi", "bus_recv.py --timeout 0"])
def test_an_agent_name_that_is_none_is_refused_before_the_bus_is_asked(call):
    code, out, err = run(*call.split(), env={"AGENT_BUS_URL": refusing(), "AGENT_NAME": "my agent"})
    assert (code, out) == (2, "") and "'my agent'" in err and "A-Z a-z 0-9" in err
    assert "AGENT_NAME" in err or call.startswith("bus_recv")
    _, _, err = run(*call.split(), env={"AGENT_BUS_URL": refusing(), "AGENT_NAME": "-spark"})
    assert "'-spark'" in err and "with a letter or digit first" in err  # each of its characters is one of those


@pytest.mark.parametrize("call", [
    "bus_recv.py dell --timeout 0", "bus_log.py --no-follow", "bus_log.py --last 2", "bus_inbox.py look dell",
    "bus_inbox.py ack 660ba678a1b40 dell", "bus_who.py", "bus_search.py disk full", "bus_search.py disk --since 1h",
    "bus_search.py --rebuild",
    "bus_later.py --list",
])  # fmt: skip
def test_every_look_without_a_bus_says_what_to_try(call, home):
    script, *arguments = call.split()
    url = refusing()
    path = script if script == "bus_recv.py" else f"tools/{script}"
    code, out, err = run(path, *arguments, env={"AGENT_BUS_URL": url})
    assert (code, out) == (75, "")
    asks = "Is bus_server running there, or elsewhere (AGENT_BUS_URL)?"
    assert err == (f"{script[:-3]}: no bus at {url} (Connection refused). {asks} "
                   f"python3 {ROOT}/tools/bus_doctor.py tells which hop fails.\n")  # fmt: skip


@pytest.mark.parametrize("client", [bus_send, bus_recv])
def test_a_page_and_a_proxy_are_named(client, monkeypatch):
    with Scripted(page(200, HTML), page(502, HTML)) as proxy:
        with pytest.raises(client.Unreachable, match="^200: a web page, not a bus$"):
            client.exchange(proxy.url, "/recv", None, 5)
        monkeypatch.setenv("http_proxy", proxy.url.replace("//", "//me:secret@"))
        where = re.escape(proxy.url.partition("//")[2])
        with pytest.raises(client.Unreachable, match=f"^502: not from a bus, through the proxy {where}$"):
            client.exchange("http://bus.example", "/recv", None, 5)
    monkeypatch.setenv("https_proxy", refusing())
    with pytest.raises(client.Unreachable, match="^Connection refused, through the proxy 127.0.0.1:"):
        client.exchange("https://bus.example", "/recv", None, 5)


# ── A bus of the first contract ──────────────────────────────────────────────────────────────────────────────────────


def test_what_a_bus_of_the_first_contract_cannot_do_is_said(home):
    """Case 36."""
    with Naive() as bus:
        env = {"AGENT_BUS_URL": bus.url, "AGENT_NAME": "spark"}
        for command, lack in ((["log.py"], "no log"), (["work.py", "q", "--exec", "true"], "no queues")):
            code, _, err = run(f"tools/bus_{command[0]}", *command[1:], env=env)
            assert code == 1 and f"a bus of the first contract, which has {lack}" in err and err.count("\n") == 1
        code, out, _ = run("tools/bus_doctor.py", env=env)
        assert code == 0 and "a bus of the first contract: it can send, receive and list" in out
        assert "bus_recv.py and bus_listener.sh work with it" in out
        assert not any(bus.mailboxes.values()), "the doctor stored a message"
        code, _, err = run("bus_send.py", "dell", "well?", "--ask", "--timeout", "2", env=env)
        assert code == 3 and len(bus.mailboxes["default", "dell"]) == 1, "a question was stored more than once"


def test_a_closed_bus_is_no_bus_of_the_first_contract(home, tmp_path):
    """Its /healthz has no `bus` either, for those without a token."""
    with Server(tmp_path / "bus.db") as bus:
        token = invite(bus, "dell")
        env = {"AGENT_BUS_URL": bus.url, "AGENT_NAME": "dell"}
        for command in (["bus_recv.py", "dell"], ["tools/bus_log.py"], ["tools/bus_work.py", "q", "--exec", "true"]):
            code, _, err = run(*command, env=env)
            assert code == 1 and "token" in err and "first contract" not in err
        code, out, _ = run("tools/bus_doctor.py", env=env)
        assert code == 1 and "an agent-bus, which is closed" in out and "FAIL  token" in out
        code, out, _ = run("tools/bus_doctor.py", "--hold", "1", env={**env, "AGENT_BUS_TOKEN": token})
        assert code == 0 and "first contract" not in out and "open for 1 s" in out


# ── What is read ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_reader_without_a_name_takes_agent_name(home):
    """Case 30."""
    with Scripted(mail(message(1))) as server:
        assert run("bus_recv.py", "--once", env={"AGENT_BUS_URL": server.url, "AGENT_NAME": "bob"})[0] == 0
        assert server.polls[0].query["to"] == ["bob"]
        code, _, err = run("bus_recv.py", "--once", env={"AGENT_BUS_URL": server.url})
        assert code == 2 and err == "bus_recv: the name is missing: give NAME, or set AGENT_NAME\n"


def test_a_reader_takes_commas_as_a_sender_does(home):
    with Scripted(mail(message(1))) as server:
        assert run("bus_recv.py", "bob,nano", "crew", "--once", env={"AGENT_BUS_URL": server.url})[0] == 0
        assert server.polls[0].query["to"] == ["bob", "nano", "crew"]


def test_a_reader_says_when_it_is_connected(home):
    with Scripted(mail(message(1))) as server:
        process = program("bus_recv.py", "dell", "reviewers", env={"AGENT_BUS_URL": server.url})
        assert process.stderr.readline().decode() == f"bus_recv: listening as dell, reviewers on {server.url}\n"
        process.kill()
        process.communicate()
        assert recv(server, "--once")[2] == ""
    with Scripted(answer({"error": "a valid token is needed"}, status=401)) as server:
        assert recv(server) == (1, "", "bus_recv: a valid token is needed\n"), "it was not connected"


LONG = "word " * 4000


@pytest.mark.parametrize("output", ["a pipe", "a file", "a terminal", "a socket", "--monitor", "--json"])
def test_a_message_is_whole_unless_a_monitor_reads_it(output, home, tmp_path):
    """Case 27."""
    with Scripted(mail(message(1, LONG))) as server:
        env = {"AGENT_BUS_URL": server.url}
        options = [output] if output.startswith("--") else []
        command = [sys.executable, str(ROOT / "bus_recv.py"), "dell", "--once", *options]
        if output == "a terminal":
            rows = on_a_terminal("bus_recv.py", "dell", "--once", until=b"---", **env)
            shown = rows.replace("\n|+", "")
        else:
            ours, its = socket.socketpair()
            with ours, its, (tmp_path / "log").open("w+b") as file:
                out = {"a file": file, "a socket": its}.get(output, subprocess.PIPE)
                done = forked.run(command, env={**os.environ, **env}, stdout=out, timeout=PATIENCE)
                file.seek(0)
                shown = {"a file": file.read, "a socket": lambda: ours.recv(1 << 20)}.get(output, lambda: done.stdout)()
            shown = shown.decode()
    paced = output in ("a socket", "--monitor")
    assert (LONG in shown) is not paced and (f"more characters: python3 {ROOT}/bus_recv.py --read 1" in shown) is paced
    assert paced is (max(map(len, shown.split("\n"))) <= bus_recv.LINE_UNITS)


@pytest.mark.parametrize("since, cursor", [
    ("1h", f"{NOON - 3600}.000000"), ("90s", f"{NOON - 90}.000000"), ("now", "now"), ("last", "last"), ("0", "0"),
    ("652a7c1b2f3e1", f"{(TICK - 1) // 10**6}.{(TICK - 1) % 10**6:06d}"), ("1795203596.5", "1795203596.5"),
])  # fmt: skip
def test_a_reader_begins_where_it_is_told(since, cursor, home):
    """Case 35, and case 39."""
    headers = ["Date: Fri, 20 Nov 2026 19:39:56 GMT"]
    health = page(200, json.dumps({"ok": True, "now": NOON, "bus": "b1"}), *headers)
    with Scripted(mail(message(1)), health=health) as server:
        next(reader(server.url, since=since).messages())
        assert server.polls[-1].query["since"] == cursor
        code, *_ = run("tools/bus_log.py", "--no-follow", "--since", since, env={"AGENT_BUS_URL": server.url})
        assert (code, server.asked[-1].query["since"]) == (0, cursor) or since == "last"


def test_an_id_of_digits_alone_is_one_if_its_time_is_near():
    tick = int("6615909133323", 16)
    assert bus_recv.moment("6615909133323", tick / 1e6) == f"{(tick - 1) // 10**6}.{(tick - 1) % 10**6:06d}"
    for milliseconds in ("1795203596123", "1000000000000"):
        with pytest.raises(ValueError, match="give now, last, 1h"):
            bus_recv.moment(milliseconds, NOON)


def test_a_reader_may_begin_at_a_time_as_messages_show_it():
    for text in ("2026-11-30T17:00:00Z", "2026-11-30T17:00Z", "2026-11-30T18:00:00+01:00"):
        assert bus_recv.moment(text, NOON) == "1796058000.000000"
    assert bus_recv.moment("1969-12-31T00:00Z", NOON) == "0.000000"
    for text in ("2026-11-31", "30.11.2026", "yesterday"):
        with pytest.raises(ValueError, match=f"{text}': give .* like 2026-12-01T09:00Z"):
            bus_recv.moment(text, NOON)
    for file in ("bus_recv.py", "tools/bus_relay.py", "tools/bus_log.py", "tools/bus_search.py"):
        assert "2026-12-01T09:00Z" in " ".join(run(file, "--help")[1].split()), file


def test_how_long_ago_is_read_without_argparse_and_hides_no_fault(monkeypatch):
    """A hook, which a turn waits for, imports no argparse; and a fault of ours is not taken for a wrong `since`."""
    asked = "import bus_recv, sys; print(bus_recv.moment('1h', 7200.0), 'argparse' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout == "3600.000000 False\n"
    monkeypatch.setattr(bus_recv, "duration", lambda text: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bus_recv.moment("1h", NOON)


def test_from_a_message_on_means_with_it(bus, home):
    _, number, _ = (bus_send.send("dell", text, url=bus.url, sender="spark")["id"] for text in ("one", "two", "three"))
    out = run("bus_recv.py", "dell", "--once", "--json", "--since", number, env={"AGENT_BUS_URL": bus.url})[1]
    assert [json.loads(line)["msg"] for line in out.splitlines()] == ["two", "three"]
    out = run("tools/bus_log.py", "--no-follow", "--json", "--since", number, env={"AGENT_BUS_URL": bus.url})[1]
    assert [json.loads(line)["msg"] for line in out.splitlines()] == ["two", "three"]


@pytest.mark.parametrize("since, told", [
    ("now", "3 waiting are passed over; to read them: --since {0}"), ("{1}", "1 waiting are passed over"),
    ("{0}", ""), ("0", ""), ("last", ""), ("1h", ""),
])  # fmt: skip
def test_what_since_passes_over_is_told(since, told, bus, home):
    ids = [bus_send.send("dell", text, url=bus.url, sender="spark")["id"] for text in ("one", "two", "three")]
    given = ("--once", "--json", "--timeout", "0")
    code, out, err = recv(bus, *given, "--since", since.format(*ids))
    assert told.format(*ids) in err and bool(told) is ("passed over" in err)
    if since == "now":
        assert (code, out) == (3, "") and recv(bus, *given)[0] == 3
        _, out, err = recv(bus, *given, "--since", re.search(r"--since (\w+)", err)[1])
        assert [json.loads(line)["msg"] for line in out.splitlines()] == ["one", "two", "three"] and err == ""


# ── The programs themselves ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_first_names_that_people_try_may_send(bus, home):
    """Case 31. They were reserved, without a reason."""
    for name in ("claude", "root"):
        code, out, err = run("bus_send.py", "bob", "hi", env={"AGENT_BUS_URL": bus.url, "AGENT_NAME": name})
        assert code == 0 and json.loads(out)["ok"], err
    code, _, err = run("bus_send.py", "bob", "hi", env={"AGENT_BUS_URL": bus.url, "AGENT_NAME": "user"})
    assert code == 1 and "this name is reserved, because" in err and "use user-" in err, "with a reason and a free name"


def test_a_mistyped_receiver_gets_the_name_that_listens(bus, home):
    """Case 34."""
    env = {"AGENT_BUS_URL": bus.url, "AGENT_NAME": "spark"}
    assert run("bus_recv.py", "Lead2", "--timeout", "0", env=env)[0] == 3
    shown = on_a_terminal("bus_send.py", "Laed2", "hi", **env)
    assert shown == "queued: nobody has ever listened as Laed2, 1 unread; did you mean Lead2?\n"


def test_the_clients_say_their_version():
    assert bus_send.VERSION == bus_server.VERSION
    for client in ("bus_send.py", "bus_recv.py"):
        assert run(client, "--version") == (0, f"{client} {bus_server.VERSION}\n", "")


def test_the_help_says_what_reading_by_id_acknowledges():
    assert "it stays unread" in " ".join(run("bus_recv.py", "--help")[1].split())


@pytest.mark.parametrize("path", PROGRAMS)
@pytest.mark.parametrize("version", ["2.7", "3.6", "3.7", "3.8"])
def test_an_older_python_is_told_what_it_needs(version, path, tmp_path):
    """Case 40. Before 3.8 it is a SyntaxError that shows the sentence."""
    pythons = sorted(VERSIONS.glob(f"{version}.*/bin/python"))
    if not pythons:
        pytest.skip(f"there is no Python {version} in {VERSIONS}")
    done = subprocess.run([pythons[0], "-B", ROOT / path, "--help"], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1 and f"{pathlib.Path(path).name} needs Python 3.9 or later" in done.stderr
    assert version != "3.8" or done.stderr.count("\n") == 1
