"""bus_send.py and bus_recv.py: whatever the network does, a send never lies and a reader never loses its place."""
import contextlib
import json
import os
import random
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.request
from decimal import Decimal

import pytest

import bus_recv
import bus_send
from tests.kit import bad_servers
from tests.kit.bad_servers import DATE, FAULTS, HTML, NOON, Scripted, answer, mail, message, page, silence, stored
from tests.kit.processes import PATIENCE, ROOT, Server, free_port, no_settings, runs, wait_until


class Clock:
    """Stands for the module time; sleeping takes no time, and is noted. `during` is called with each sleep."""

    def __init__(self, during=lambda seconds: None):
        self.slept, self.during, self.offset = [], during, 0.0

    def monotonic(self):
        return time.monotonic() + self.offset

    def time(self):
        return NOON + self.offset

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.offset += seconds
        self.during(seconds)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """No setting of whoever runs the tests, and a state directory of each test's own."""
    no_settings(monkeypatch)
    monkeypatch.setenv("AGENT_BUS_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def hurry(monkeypatch):
    """Real deadlines, but short ones."""
    monkeypatch.setattr(bus_send, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(bus_send, "SLOWEST_RATE", 1 << 20)
    monkeypatch.setattr(bus_send, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(bus_recv, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(bus_recv, "SLOWEST_RATE", 1 << 20)


def program(script, *arguments, stdin=b"", env=None, **options):
    """A client as people run it: without site packages, and with nothing on the path."""
    command = [sys.executable, "-I", "-S", str(ROOT / script), *arguments]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    process = subprocess.Popen(command, env={**os.environ, **(env or {})}, **streams)
    if stdin is not None and process.stdin:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(stdin)
        process.stdin.close()
        process.stdin = None
    return process


def run(script, *arguments, **options):
    """Exit code, stdout, stderr."""
    process = program(script, *arguments, **options)
    out, err = process.communicate(timeout=PATIENCE)
    assert b"Traceback" not in err and b"Exception" not in err, err.decode()
    return process.returncode, (out or b"").decode(), err.decode()


def send(server, *arguments, stdin=b"hi", **env):
    return run("bus_send.py", "dell", *arguments, stdin=stdin,
               env={"AGENT_BUS_URL": server.url, "AGENT_NAME": "spark", **env})  # fmt: skip


def recv(server, *arguments, **env):
    return run("bus_recv.py", "dell", *arguments, env={"AGENT_BUS_URL": server.url, **env})


def reader(url, names=("dell",), since=None, wait=25.0, clock=None):
    """A Reader whose time costs nothing; `said` has what it announced and `warned` what it complained about."""
    made = bus_recv.Reader(names, url, None, since, wait)
    made.clock, made.said, made.warned = clock or Clock(), [], []
    made.announce, made.warn = made.said.append, made.warned.append
    return made


def cursors(home):
    return {str(path.relative_to(home / "cursors")): path.read_text().strip()
            for path in home.glob("cursors/**/*") if path.is_file() and not path.name.endswith("~lock")}  # fmt: skip


def refusing():
    """The URL of a port where nobody listens."""
    return f"http://127.0.0.1:{free_port()}"


# ── Sending ──────────────────────────────────────────────────────────────────────────────────────────────────────────


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


def test_a_send_imports_nothing_slow():
    with Scripted(stored()) as server:
        command = [sys.executable, "-I", "-S", "-X", "importtime", str(ROOT / "bus_send.py"), "dell", "--from", "spark"]
        env = {**os.environ, "AGENT_BUS_URL": server.url}
        imported = subprocess.run(command, input=b"hi", capture_output=True, env=env, timeout=PATIENCE).stderr.decode()
    modules = {line.rpartition("|")[2].strip() for line in imported.splitlines()}
    assert "http.client" in modules and not modules & {"urllib.request", "typing", "asyncio", "decimal", "uuid"}


# ── Proxies ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_proxy_is_asked_for_other_hosts_and_never_for_loopback(monkeypatch):
    with Scripted(stored(), mail(message(1))) as proxy, Scripted(stored()) as bus:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        bus_send.send("dell", "hi", url="http://bus.example:8080/x", sender="spark")
        assert next(reader("http://bus.example:8080/x").messages())["id"] == "1"
        assert [asked.target.partition("?")[0] for asked in proxy.asked] == [
            "http://bus.example:8080/x/send", "http://bus.example:8080/x/healthz", "http://bus.example:8080/x/recv"
        ]  # fmt: skip
        assert proxy.asked[0].headers["host"] == "bus.example:8080"
        bus_send.send("dell", "hi", url=bus.url, sender="spark")
        assert len(bus.asked) == 1 and len(proxy.asked) == 3


def test_no_proxy_and_the_scheme_are_honoured(monkeypatch):
    monkeypatch.setenv("http_proxy", "127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "example.org,10.0.0.5:8080")
    for client in (bus_send, bus_recv):
        assert client.proxy_for("http", "bus.example.org", 80) is None
        assert client.proxy_for("http", "10.0.0.5", 8080) is None
        assert client.proxy_for("https", "bus.example.com", 443) is None
        assert client.proxy_for("http", "bus.example.com", 80) == "http://127.0.0.1:9" or "127.0.0.1:9"
        assert client.connect("http://bus.example.com", 1)[0].port == 9


def test_https_goes_through_a_tunnel(monkeypatch, hurry):
    with Scripted(page(403, HTML)) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        with pytest.raises(bus_send.Unreachable, match="403"):
            bus_send.send("dell", "secret", url="https://bus.example", sender="spark", patience=0)
        (asked,) = proxy.asked
        assert (asked.method, asked.target, asked.body) == ("CONNECT", "bus.example:443", b"")


# ── Receiving ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_moves_no_cursor_and_loses_no_message(fault, hurry, home):
    began, saved = time.monotonic(), []
    clock = Clock(during=lambda seconds: saved.append(cursors(home)))
    with Scripted(mail(message(1)), FAULTS[fault], FAULTS[fault], mail(message(2))) as server:
        messages = reader(server.url, wait=0.1, clock=clock).messages()
        assert [next(messages)["id"], next(messages)["id"]] == ["1", "2"]
    assert {poll.query["since"] for poll in server.polls[1:]} == {f"{NOON}.900000"} and len(server.polls) == 4
    assert saved == [{"b1/default/dell": f"{NOON}.900000"}] * 2 and time.monotonic() - began < bad_servers.DRIP_SECONDS


def test_a_poll_says_who_asks_for_what_and_for_how_long():
    with Scripted(mail(message(1))) as server:
        next(reader(server.url, ["dell", "reviewers"], wait=25).messages())
    assert server.polls[0].query == {
        "to": ["dell", "reviewers"], "since": "last", "block": "true", "wait": "25.000", "channel": "default",
        "bus": "b1", "reader": server.polls[0].query["reader"],
    }  # fmt: skip
    assert server.polls[0].headers["user-agent"] == "Mozilla/5.0"


def test_the_bus_can_tell_two_machines_that_read_one_name(bus, monkeypatch, tmp_path):
    for place, number in (("state", 1), ("state", 1), ("elsewhere", 2)):
        monkeypatch.setenv("AGENT_BUS_STATE_DIR", str(tmp_path / place))
        list(bus_recv.receive("dell", url=bus.url, timeout=0))
        assert json.loads(bus.get("/agents"))["agents"][0]["readers"] == number


def test_a_message_counts_as_received_when_the_next_one_is_asked_for(home):
    with Scripted(mail(message(1), message(2))) as server:
        messages = bus_recv.receive("dell", url=server.url)
        assert next(messages)["id"] == "1" and cursors(home) == {"b1/default/dell": "last"}
        assert next(messages)["id"] == "2" and cursors(home) == {"b1/default/dell": f"{NOON}.000001"}
        with contextlib.suppress(StopIteration):
            assert next(messages)["id"] == "1"  # the script repeats
        assert cursors(home) == {"b1/default/dell": f"{NOON}.900000"}


def test_a_cursor_is_never_rounded(home):
    exact, tenth, end = "1795203596.123456789", "0.1000000000000000055511151231257827", "1795203597.000000001"
    with Scripted(mail(f'{{"ts": {exact}, "msg": "x", "n": {tenth}}}', now=end)) as server:
        code, out, _ = recv(server, "--json", "--once")
        assert (code, out) == (0, f'{{"ts": {exact}, "msg": "x", "n": {tenth}}}\n')
        messages = reader(server.url, since="0").messages()
        assert next(messages)["ts"] == Decimal(exact)
        next(messages)
        assert server.polls[2].query["since"] == end and cursors(home) == {"b1/default/dell": end}


def test_a_reader_starts_where_it_was_or_is_told_to(home):
    with Scripted(mail(message(1))) as server:
        for since in (None, None, "0", "now", "last", "17.5"):
            next(iter(bus_recv.receive("dell", url=server.url, since=since, timeout=0, once=True)))
        list(bus_recv.receive("dell", url=server.url, timeout=0))
        list(bus_recv.receive("dell", url=server.url, timeout=0))
    asked = [poll.query["since"] for poll in server.polls if "peek" not in poll.query]
    assert asked == ["last", "last", "0", "now", "last", "17.5", "last", f"{NOON}.900000"]


def test_files_of_cursors_are_private_and_never_the_same_or_elsewhere(home):
    names = ["dell", "Dell", "DELL", "a:b@c", "a.b", "a"]
    for bus in ("b1", "B1", "..", "../../x", "a/b", ".", "ü", ""):
        for name in names:
            bus_recv.Cursor(bus, "Ops", name, print)
    files = [str(path.relative_to(home)) for path in home.parent.rglob("*") if path.is_file() and "~" not in path.name]
    assert len({file.lower() for file in files}) == 8 * len(names) and "cursors/%421/%4Fps/%44ell" in files
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert all(stat.S_IMODE((home / file).stat().st_mode) == 0o600 for file in files)


@pytest.mark.parametrize("content", [b"", b"\0\0\0", b"yesterday", b"1795203596.5\n17", b"-1", b"\xff\xfe", b"1e9"])
def test_a_file_that_holds_no_cursor_is_said_once_and_the_bus_remembers(content, home):
    path = home / "cursors" / "b1" / "default" / "dell"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with Scripted(mail(message(1))) as server:
        code, out, err = recv(server, "--once")
        assert code == 0 and "| hi" in out and err.count("\n") == 1 and str(path) in err
    assert server.polls[0].query["since"] == "last" and path.read_text() == f"{NOON}.900000\n"


@pytest.mark.parametrize("place", ["/proc/nowhere", "/dev/null/x"])
def test_without_a_place_for_the_cursor_no_message_is_asked_for(place):
    with Scripted(mail(message(1))) as server:
        code, out, err = recv(server, AGENT_BUS_STATE_DIR=place)
        assert (code, out, server.polls) == (2, "", []) and err.count("\n") == 1
        assert place in err and "AGENT_BUS_STATE_DIR" in err


def test_the_state_directory_follows_the_customs(monkeypatch, tmp_path):
    monkeypatch.delenv("AGENT_BUS_STATE_DIR")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    bus_recv.Cursor("b1", "ops", "dell", print)
    assert cursors(tmp_path / "home/.local/state/agent-bus") == {"b1/ops/dell": "last"}
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    bus_recv.Cursor("b1", "ops", "dell", print)
    assert cursors(tmp_path / "xdg/agent-bus") == {"b1/ops/dell": "last"}


def test_another_bus_is_read_with_its_own_cursor(home):
    with Scripted(mail(), mail(message(1), now=f"{NOON}.5"), mail(bus="b2", now=f"{NOON}.6"),
                  mail(message(9), bus="b2"), mail(message(8), now=f"{NOON}.7"),
                  mail(message(7), now=f"{NOON}.8")) as server:  # fmt: skip
        first = reader(server.url, since="17.5")
        messages = first.messages()
        assert [next(messages)["id"], next(messages)["id"], next(messages)["id"]] == ["1", "9", "7"]
    assert server.polls[0].query["peek"] == "true"
    asked = [(poll.query["bus"], poll.query["since"]) for poll in server.polls[1:]]
    assert asked == [("b1", "17.5"), ("b1", f"{NOON}.5"), ("b2", "last"), ("b2", f"{NOON}.900000"), ("b1", f"{NOON}.5")]
    assert cursors(home) == {"b1/default/dell": f"{NOON}.5", "b2/default/dell": f"{NOON}.900000"}
    assert len(first.warned) == 4 and not first.said  # each other bus is told, and that it is connected again


def test_a_bus_of_the_old_contract_is_read_from_the_beginning_once(home):
    with Scripted(mail(message(1), bus=None), bus=None) as server:
        assert recv(server, "--once")[1].count("| hi") == 1
        assert recv(server, "--once")[0] == 0
        assert recv(server, "--once", "--since", "now")[0] == 0
    assert [poll.query["since"] for poll in server.polls] == ["0", f"{NOON}.900000", f"{NOON}.25"]
    assert cursors(home) == {"-/default/dell": f"{NOON}.900000"}


def test_a_hold_that_is_cut_is_halved_and_restored_slowly():
    clock = Clock()

    def cut(sock):
        clock.offset += 3  # what the proxy took until it gave up
        sock.sendall(page(504, HTML))

    with Scripted(*[cut] * 6, mail(), mail(), mail(message(1))) as server:
        next(reader(server.url, wait=25, clock=clock).messages())
    assert [float(poll.query["wait"]) for poll in server.polls] == [25, 12.5, 6.25, 3.125, 1.562, 1, 1, 1.1, 1.21]


def test_a_bus_that_does_not_hold_is_not_run_down():
    clock = Clock()
    with Scripted(*[mail()] * 5, mail(message(1))) as server:
        next(reader(server.url, clock=clock).messages())
    assert len(clock.slept) == 5 and min(clock.slept) > 0.5


def test_an_outage_is_told_once_after_a_minute_and_once_when_it_is_over(monkeypatch):
    monkeypatch.setattr(bus_recv.random, "uniform", lambda low, high: high)
    told, clock = [], Clock(during=lambda seconds: told.append((round(clock.offset, 1), list(watched.said))))
    with Scripted(*[page(502, HTML)] * 7, b"", b"", mail(message(1))) as server:
        watched = reader(server.url, clock=clock)
        next(watched.messages())
    start, end = watched.said
    assert start == f"{server.url} out of reach since 19:39:56Z (502: not from a bus); still trying"
    assert end == f"{server.url} is back, after 4m"
    silent = [at for at, said in told if not said][-1]
    assert silent == pytest.approx(60, abs=1) and len(watched.warned) == 2  # the polls take real time, too


def test_a_short_fault_is_for_stderr_only():
    with Scripted(page(502, HTML), mail(message(1))) as server:
        code, out, err = recv(server, "--once")
        assert code == 0 and out.startswith("2026-11-20T19:39:56Z from=spark id=1 ") and out.endswith("\n| hi\n---\n")
        said = ("502: not from a bus; trying again", "connected again")
        assert err == "".join(f"bus_recv: {server.url}: {line}\n" for line in said)


def test_what_retention_removed_is_told():
    with Scripted(mail(message(1), gap={"from": NOON, "to": NOON + 9})) as server:
        code, out, _ = recv(server, "--once")
        assert code == 0 and out.startswith("-- agent-bus: messages are gone") and str(NOON + 9) in out.split("\n")[0]
        code, out, err = recv(server, "--once", "--json")
        assert json.loads(out)["id"] == "1" and "messages are gone" in err


# ── The program ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_exit_codes_of_a_reader():
    with Scripted(mail(message(1))) as server:
        assert recv(server, "--once")[0] == 0
        assert recv(server, "--timeout", "0")[0] == 0
    with Scripted(mail()) as server:
        assert recv(server, "--once", "--timeout", "0") == (3, "", "")
        assert recv(server, "--timeout", "0.1") == (3, "", "")
    with Scripted(silence) as server:  # an old bus holds a poll as long as it likes
        assert recv(server, "--timeout", "0") == (3, "", "")
    code, out, err = run("bus_recv.py", "dell", "--timeout", "0.1", env={"AGENT_BUS_URL": refusing()})
    assert (code, out) == (75, "") and "no bus at http" in err and "bus_doctor.py tells" in err


@pytest.mark.parametrize("arguments", [
    ["a b"], ["a,,b"], [""], ["-"], [".."], ["dell\n"], ["ü"], ["a" * 65], ["dell"] * 17, ["dell", "--channel", "a b"],
    ["dell", "--since", "1e9"], ["dell", "--since", "٣"], ["dell", "--since", "yesterday"], ["dell", "--timeout", "x"],
    [],
])  # fmt: skip
def test_wrong_usage_is_2_and_asks_nothing(arguments):
    with Scripted(mail(message(1))) as server:
        code, out, err = run("bus_recv.py", *arguments, env={"AGENT_BUS_URL": server.url})
        assert (code, out, server.asked) == (2, "", []) and err


def test_once_takes_all_that_waits():
    with Scripted(mail(message(1), more=True, now=f"{NOON}.1"), mail(message(2), more=True, now=f"{NOON}.2"),
                  mail(message(3)), mail(message(4))) as server:  # fmt: skip
        out = recv(server, "--once", "--json")[1]
        assert [json.loads(line)["id"] for line in out.splitlines()] == ["1", "2", "3"]


@pytest.mark.parametrize("arguments", [["--once"], ["--exec", "true", "--once"], ["--monitor", "--once"]])
def test_a_reader_that_ends_says_goodbye_with_its_cursor(arguments, home):
    with Scripted(mail(message(1))) as server:
        assert recv(server, *arguments)[0] == 0
        (goodbye,) = server.left
        asked = {name: goodbye.query[name] for name in ("to", "since", "ack", "leave", "bus")}
        since = cursors(home)["b1/default/dell"]
        assert asked == {"to": ["dell"], "since": since, "ack": "true", "leave": "true", "bus": "b1"}


def test_a_reader_that_has_ended_is_not_listening(bus):
    """By itself, or by a signal while the bus holds its poll."""
    for arguments in (["--once", "--timeout", "0"], []):
        process = program("bus_recv.py", "fresh", *arguments, env={"AGENT_BUS_URL": bus.url})
        arguments or wait_until(lambda: bus_send.send("fresh", "1", url=bus.url, sender="a")["receiver"]["online"])
        arguments or process.terminate()
        process.communicate(timeout=PATIENCE)
        assert not bus_send.send("fresh", "2", url=bus.url, sender="a")["receiver"]["online"]


@pytest.mark.parametrize("command", ["nosuchcmd", "", "nosuchcmd | cat"])
def test_a_command_that_does_not_exist_is_said_before_a_message_is_taken(command):
    with Scripted(mail(message(1))) as server:
        code, out, err = recv(server, "--exec", command, "--once")
        assert (code, out) == (2, "") and "nothing was taken" in err and server.asked == []


def test_a_page_that_was_for_others_is_not_the_end():
    with Scripted(mail(more=True, now=f"{NOON}.1"), mail(message(1))) as server:
        assert recv(server, "--timeout", "0")[0] == 0


def test_a_closed_stdout_ends_quietly_and_the_lost_block_is_not_received(home):
    with Scripted(mail(message(1))) as server:
        read, write = os.pipe()
        os.close(read)
        process = program("bus_recv.py", "dell", env={"AGENT_BUS_URL": server.url}, stdout=write)
        os.close(write)
        assert process.communicate(timeout=PATIENCE) == (None, b"") and process.returncode == 0
        assert cursors(home) == {"b1/default/dell": "last"}
        closed = f'exec "{sys.executable}" -I -S "{ROOT}/bus_recv.py" dell >&-'
        environment = {**os.environ, "AGENT_BUS_URL": server.url}
        done = subprocess.run(["sh", "-c", closed], env=environment, stderr=subprocess.PIPE, timeout=PATIENCE)
        assert (done.returncode, done.stderr) == (0, b"") and cursors(home) == {"b1/default/dell": "last"}


@pytest.mark.parametrize("buffered", [[], ["-u"]], ids=["buffered", "-u"])
@pytest.mark.parametrize("blocking", [True, False])
def test_all_of_a_large_block_is_out(buffered, blocking, home):
    """A write may take a part of it, or nothing. With -u, as in many containers, sys.stdout has no buffer."""
    with Scripted(mail(message(1, "x" * 300000))) as server:
        read, write = os.pipe()
        os.set_blocking(write, blocking)
        command = [sys.executable, *buffered, str(ROOT / "bus_recv.py"), "dell", "--once"]
        process = subprocess.Popen(command, env={**os.environ, "AGENT_BUS_URL": server.url}, stdout=write)
        os.close(write)
        with open(read) as pipe:
            assert pipe.read().endswith(f"| {'x' * 300000}\n---\n")
        assert process.wait(PATIENCE) == 0


def test_a_full_disk_under_stdout_is_an_error_and_the_block_is_not_received(home):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with Scripted(mail(message(1))) as server, open("/dev/full", "wb") as full:
        process = program("bus_recv.py", "dell", env={"AGENT_BUS_URL": server.url}, stdout=full)
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 2 and err.count(b"\n") == 1 and cursors(home) == {"b1/default/dell": "last"}


SIGNALS = [(signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGHUP, 0)]  # and the exit code
HELD = "echo $$ > {0}/pid; until [ -e {0}/enough ]; do sleep 0.02; done"  # a command that runs until it is let go


@pytest.mark.parametrize("number, code", SIGNALS)
def test_a_signal_ends_a_waiting_reader_quietly(number, code, interruptible):
    with Scripted(silence) as server:
        process = program("bus_recv.py", "dell", env={"AGENT_BUS_URL": server.url})
        wait_until(lambda: server.polls)
        process.send_signal(number)
        assert process.communicate(timeout=PATIENCE) == (b"", b"") and process.returncode == code


@pytest.mark.parametrize("number, code", SIGNALS)
def test_a_signal_ends_a_reader_together_with_its_command(number, code, tmp_path, interruptible):
    with Scripted(mail(message(1))) as server:
        process = program("bus_recv.py", "dell", "--exec", HELD.format(tmp_path), env={"AGENT_BUS_URL": server.url})
        pid = int(wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()))
        process.send_signal(number)
        assert process.communicate(timeout=PATIENCE) == (b"", b"") and process.returncode == code
        wait_until(lambda: not runs(pid))


def test_a_reader_under_nohup_and_its_command_outlive_a_hangup(tmp_path):
    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with Scripted(mail(message(1))) as server:
        arguments, env = ("dell", "--once", "--exec", HELD.format(tmp_path)), {"AGENT_BUS_URL": server.url}
        process = program("bus_recv.py", *arguments, env=env, preexec_fn=ignore)
        wait_until((tmp_path / "pid").exists)
        process.send_signal(signal.SIGHUP)
        (tmp_path / "enough").touch()
        assert process.communicate(timeout=PATIENCE) == (b"", b"") and process.returncode == 0


def test_ctrl_c_ends_a_waiting_send_quietly(interruptible):
    with Scripted(silence) as server:
        process = program("bus_send.py", "dell", "--from", "spark", stdin=b"hi", env={"AGENT_BUS_URL": server.url})
        wait_until(lambda: server.asked)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=PATIENCE) == (b"", b"") and process.returncode == 130


def test_output_is_utf_8_whatever_the_locale():
    with Scripted(mail(message(1, "grüße 😀 \ud83d", subject="ü"))) as server:
        for env in ({"LC_ALL": "C"}, {"LC_ALL": "POSIX", "PYTHONIOENCODING": "latin-1"}):
            code, out, _ = recv(server, "--once", "--since", "0", **env)
            assert code == 0 and out.endswith('subject="ü"\n| grüße 😀 \\ud83d\n---\n')
            assert recv(server, "--once", "--json", **env)[1].isascii()


# ── What a message looks like ────────────────────────────────────────────────────────────────────────────────────────


def shown(msg="hi", now=NOON, **fields):
    return bus_recv.block({"ts": NOON, "id": "652a", "from": "spark", "to": "dell", "msg": msg, **fields}, "dell", now)


def test_a_block_says_what_is_not_the_rule():
    fields = {"channel": "ops", "reply_to": "652a", "priority": "high", "type": "result", "subject": "T1 done"}
    assert shown("one\ntwo\n", NOON + 6 * 3600, to="reviewers", **fields) == (
        "2026-11-20T19:39:56Z from=spark id=652a to=reviewers channel=ops reply_to=652a age=6h priority=high "
        'type=result subject="T1 done"\n| one\n| two\n---\n'
    )
    usual = {"channel": "default", "priority": "normal", "reply_to": None, "age": "9d", "color": "red"}
    assert shown(**usual) == "2026-11-20T19:39:56Z from=spark id=652a\n| hi\n---\n"


def test_an_age_is_told_from_a_minute_up():
    ages = {-9: "", 59.9: "", 60: "1m", 3599: "59m", 3600: "1h", 86399: "23h", 86400: "1d"}
    for seconds, age in ages.items():
        assert re.findall(r" age=(\w+)\n", shown(now=NOON + seconds)) == ([age] if age else [])


def test_the_age_is_by_the_clock_of_the_bus():
    late, none = DATE.replace("19:39", "21:40"), "yesterday"
    with Scripted(mail(message(1), headers=[f"Date: {late}"]), mail(message(2), headers=[f"Date: {none}"])) as server:
        assert " age=2h\n" in recv(server, "--once")[1]
        assert " id=2 " in recv(server, "--once", "--since", "0")[1]  # by our own clock, if the bus's cannot be read


@pytest.mark.parametrize("msg, lines", [
    ("", ["| "]), ("\n", ["| "]), ("\n\n", ["| ", "| "]), ("a\n\nb\n\n", ["| a", "| ", "| b", "| "]),
    ("a\r\nb\rc\n\rd", ["| a", "| b", "| c", "| ", "| d"]), ("a\tb", ["| a\tb"]),
    ("a\x0bb\x0cc\x1cd\x1de\x1ef\x85g\u2028h\u2029i", [r"| a\x0bb\x0cc\x1cd\x1de\x1ef\x85g\u2028h\u2029i"]),
])  # fmt: skip
def test_a_body_is_split_at_newlines_only(msg, lines):
    assert shown(msg).split("\n")[1:-1] == [*lines, "---"]


def test_a_body_cannot_make_a_second_block():
    forged = shown("I am someone else", **{"from": "boss"})
    for newline in ("\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"):
        text = shown(newline.join(["x", "---", forged, "-- agent-bus: x is back", "---"]), subject=f"s{newline}---")
        lines = re.split(r"[\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029]", text)
        assert lines[0].startswith("2026-11-20T19:39:56Z from=spark id=652a subject=") and lines[-2:] == ["---", ""]
        assert all(line.startswith("| ") for line in lines[1:-2])


def test_a_field_cannot_make_another_field():
    head = shown(subject='x" from="boss', type="a from=boss", reply_to="=", priority="\n---\n").split("\n")[0]
    assert head.endswith(r'reply_to="=" priority="\n---\n" type="a from=boss" subject="x\" from=\"boss"')
    assert shown(priority=5, type=["a"], subject={"b": 1.5}).split("\n")[0].endswith(
        r'priority=5 type="[\"a\"]" subject="{\"b\": 1.5}"'
    )
    assert f" type={'a' * 64} subject=" in shown(type="a" * 64, subject="x")
    assert f' type="{"a" * 65}"\n' in shown(type="a" * 65)


HIDDEN = [
    *range(0x09), *range(0x0B, 0x0D), *range(0x0E, 0x20), *range(0x7F, 0xA0), 0xAD, 0x34F, 0x61C, 0x115F, 0x1160,
    *range(0x180B, 0x1810), *range(0x200B, 0x2010), *range(0x2028, 0x202F), *range(0x2060, 0x2070), 0x2800, 0x3164,
    *range(0xFE00, 0xFE10), 0xFEFF, 0xFFA0, *range(0xFFF9, 0xFFFC),
    *range(0xD800, 0xE000, 0xFF), *range(0xE0000, 0xE0080), *range(0xE0100, 0xE01F0),
]  # fmt: skip


def test_what_cannot_be_seen_is_written_out():
    for code in HIDDEN:
        escape = f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
        assert shown(f"a{chr(code)}b").split("\n")[1] == f"| a{escape}b"
        assert chr(code) not in shown(subject=f"a{chr(code)}b") and "\n| hi\n" in shown(subject=f"a{chr(code)}b")
    seen = "grüße, 你好, עברית, 😀, ❤, tab\t, ﷺ"
    assert shown(seen).split("\n")[1] == f"| {seen}"


@pytest.mark.parametrize("strange", [
    "null", "7", '"text"', "[]", "{}", '{"ts": 1}', '{"ts": 1, "msg": 7}', '{"ts": 1, "msg": null}',
    '{"ts": "now", "msg": "x"}',  '{"ts": null, "msg": "x"}', '{"ts": 1e400, "msg": "x"}', '{"ts": NaN, "msg": "x"}',
    '{"ts": -1e300, "msg": "x"}', '{"ts": {"a": [1.50]}, "msg": "\\u001b"}',
])  # fmt: skip
def test_a_message_that_cannot_be_shown_is_shown_as_json_and_wedges_nothing(strange, home):
    with Scripted(mail(strange, message(2))) as server:
        code, out, err = recv(server, "--once")
        first, second = out.split("\n", 1)
        assert code == 0 and err == "" and first.startswith("-- agent-bus: not a message: ") and first.isprintable()
        assert second.endswith("\n| hi\n---\n") and cursors(home) == {"b1/default/dell": f"{NOON}.900000"}
        code, out, _ = recv(server, "--once", "--json")
        assert code == 0 and len([json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()]) == 2


# ── With the real bus ────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_clients_and_the_bus_agree(bus):
    code, out, err = send(bus, "--subject", "T1 done", "--ttl", "60", stdin=b"zwei\n---\n\x1b[31m Zeilen\r\n\n")
    assert code == 0 and json.loads(out)["ok"] and err == "queued: nobody has ever listened as dell, 1 unread\n"
    first, again = (json.loads(send(bus, "--key", "k")[1]) for _ in range(2))
    assert first["id"] == again["id"] and (first["duplicate"], again["duplicate"]) == (False, True)
    assert send(bus, "--key", "k", stdin=b"another message")[0] == 1
    code, blocks, err = recv(bus, "--once")
    assert (code, err) == (0, "") and 'subject="T1 done"\n| zwei\n| ---\n| \\x1b[31m Zeilen\n| \n---\n20' in blocks
    assert recv(bus, "--once", "--timeout", "0") == (3, "", "")
    request = urllib.request.Request(f"{bus.url}/recv?to=dell", headers={"Accept": "text/plain"})
    with urllib.request.urlopen(request, timeout=PATIENCE) as plain:
        assert plain.read().decode() == blocks


def test_a_reader_is_woken_by_its_message(bus):
    process = program("bus_recv.py", "dell", env={"AGENT_BUS_URL": bus.url})
    wait_until(lambda: json.loads(bus.get("/agents"))["agents"])
    bus_send.send("dell", "wake up", url=bus.url, sender="spark")
    assert b"from=spark" in process.stdout.readline() and process.stdout.readline() == b"| wake up\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0
    process.communicate()


def test_a_bus_that_was_replaced_gives_its_queued_mail(bus, tmp_path):
    bus_send.send("dell", "old", url=bus.url, sender="spark")
    process = program("bus_recv.py", "dell", "--json", env={"AGENT_BUS_URL": bus.url})
    assert json.loads(process.stdout.readline())["msg"] == "old"
    bus.kill()
    other = Server(tmp_path / "other.db")
    other.start()
    bus_send.send("dell", "queued before the reader knew", url=other.url, sender="spark")
    other.kill()
    other.command[other.command.index("--port") + 1] = str(bus.port)
    with other:
        assert json.loads(process.stdout.readline())["msg"] == "queued before the reader knew"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 0


def test_a_bus_that_was_restarted_loses_nothing_and_repeats_nothing(bus):
    process = program("bus_recv.py", "dell", "--json", env={"AGENT_BUS_URL": bus.url})
    for n in range(4):
        bus_send.send("dell", str(n), url=bus.url, sender="spark")
        assert json.loads(process.stdout.readline())["msg"] == str(n)
        bus.kill()
        bus.start()
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=PATIENCE)[0] == b""


def test_a_reader_killed_at_any_moment_shows_every_message(bus, tmp_path):
    count, chance, log = 400, random.Random(7), tmp_path / "out"
    texts = {str(n) for n in range(count)}

    def seen():
        return {json.loads(line)["msg"] for line in log.read_bytes().splitlines()}

    def send_all():
        for text in texts:
            bus_send.send("dell", text, url=bus.url, sender="spark")

    sending = threading.Thread(target=send_all)
    sending.start()
    kills = 0
    with log.open("ab") as out:
        while seen() != texts:
            process = program("bus_recv.py", "dell", "--json", env={"AGENT_BUS_URL": bus.url}, stdout=out)
            enough = min(len(seen()) + chance.randrange(1, 40), count)
            wait_until(lambda enough=enough: len(seen()) >= enough)
            process.kill()
            process.communicate()
            kills += 1
    sending.join()
    assert kills > 5
