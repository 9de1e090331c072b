"""tools/bus_log.py: everybody's messages, for people and pipes, and nobody notices."""
import json
import signal

import pytest

import bus_send
from tests.clients.test_clients import Clock, program, refusing, run
from tests.kit.bad_servers import DATE, NOON, Scripted, answer, mail, message, page
from tests.kit.peers import mint
from tests.kit.processes import PATIENCE, Server, wait_until
from tools import bus_log

pytestmark = pytest.mark.usefixtures("home")

QUIET = {"AGENT_NAME": "dell", "AGENT_BUS_CHANNEL": "ops"}  # what a reader goes by, and an observer does not


def log(url, *arguments, **env):
    return run("tools/bus_log.py", *arguments, env={"AGENT_BUS_URL": url, **QUIET, **env})


def texts(url, *arguments):
    code, out, err = log(url, "--json", "--no-follow", *arguments)
    assert (code, err) == (0, "")
    return [json.loads(line)["msg"] for line in out.splitlines()]


def test_an_observer_sees_all_that_passes_or_what_it_asks_for(bus):
    for sender, to, channel in [("a", "dell", "ops"), ("a", "nano", None), ("b", "all", None), ("b", "dell", None)]:
        bus_send.send(to, f"{sender} {to}", url=bus.url, sender=sender, channel=channel)
    assert texts(bus.url) == ["a dell", "a nano", "b all", "b dell"]
    assert texts(bus.url, "--to", "dell") == ["a dell", "b dell"]
    assert texts(bus.url, "--to", "nano,all") == ["a nano", "b all"]
    assert texts(bus.url, "--from", "a", "--channel", "default") == ["a nano"]
    assert texts(bus.url, "--since", "1h") == ["a dell", "a nano", "b all", "b dell"]
    assert texts(bus.url, "--since", "now") == []


def test_an_observer_leaves_no_trace(bus, home):
    bus_send.send("dell", "hi", url=bus.url, sender="spark")
    before = [json.loads(bus.get(path)) for path in ("/inbox", "/agents")]
    process = program("tools/bus_log.py", "--json", env={"AGENT_BUS_URL": bus.url, **QUIET})
    assert json.loads(process.stdout.readline())["msg"] == "hi"
    assert [json.loads(bus.get(path)) for path in ("/inbox", "/agents")] == before and not home.exists()
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=PATIENCE) == (b"", b"") and process.returncode == 0


def test_an_observer_follows_through_a_restart_and_sees_each_message_once(bus):
    process = program("tools/bus_log.py", "--json", env={"AGENT_BUS_URL": bus.url})
    for n in range(2):
        bus_send.send("dell", f"{n}", url=bus.url, sender="spark")
        assert json.loads(process.stdout.readline())["msg"] == f"{n}"
        bus.kill()
        bus.start()
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=PATIENCE)[0] == b""


def test_a_block_of_the_log_names_its_receiver_and_is_whole():
    long = "x" * 5000
    with Scripted(mail(message(1, long, channel="ops", subject="T1"), headers=[f"Date: {DATE}"])) as server:
        code, out, _ = log(server.url, "--no-follow")
    assert code == 0
    assert out == f"2026-11-20T19:39:56Z from=spark id=1 to=dell channel=ops subject=T1\n| {long}\n---\n"


def test_the_whole_log_is_read_page_by_page():
    with Scripted(mail(message(1), more=True, now=f"{NOON}.1"), mail(more=True, now=f"{NOON}.2"), mail(message(3)),
                  mail(message(4))) as server:  # fmt: skip
        out = log(server.url, "--no-follow", "--json", "--to", "a,b", "--from", "c", "--channel", "d")[1]
    assert [json.loads(line)["id"] for line in out.splitlines()] == ["1", "3"]
    pages = [asked for asked in server.asked if asked.target.startswith("/log?")]
    assert [page.query["since"] for page in pages] == ["0", f"{NOON}.1", f"{NOON}.2"]
    assert {**pages[0].query, "since": ""} == {
        "to": ["a,b"], "from": "c", "channel": "d", "since": "", "block": "true", "wait": "0.000", "bus": "b1",
    }  # fmt: skip


@pytest.mark.parametrize("since, asked", [
    ("90s", f"{NOON - 90}.000000"), ("1h", f"{NOON - 3600}.000000"), ("3d", f"{NOON - 3 * 86400}.000000"),
    ("999999999d", "0.000000"), ("now", "now"), (f"{NOON}.25", f"{NOON}.25"), (None, "0"),
])  # fmt: skip
def test_how_long_ago_is_by_the_clock_of_the_bus(since, asked):
    health = answer({"ok": True, "now": NOON, "bus": "b1"}, f"Date: {DATE}")
    with Scripted(mail(), health=health) as server:
        assert log(server.url, "--no-follow", *(["--since", since] if since else []))[0] == 0
    assert server.asked[-1].query["since"] == asked


def test_half_of_a_log_is_not_a_log():
    with Scripted(mail(message(1), more=True), page(502, "<html>")) as server:
        code, out, err = log(server.url, "--no-follow")
        assert code == 75 and "| hi" in out and "502" in err
    assert log(refusing(), "--no-follow")[0] == 75


def test_another_bus_is_looked_at_from_the_beginning_once():
    with Scripted(mail(message(1), now=f"{NOON}.5"), mail(bus="b2"), mail(message(2), bus="b2", now=f"{NOON}.7"),
                  mail(now=f"{NOON}.5"), mail(message(3))) as server:  # fmt: skip
        observer = bus_log.Observer({}, "17.5")
        observer.url, observer.clock = server.url, Clock()
        messages = observer.messages()
        assert [next(messages)["id"] for _ in range(3)] == ["1", "2", "3"]
    asked = [(page.query["bus"], page.query["since"]) for page in server.asked[1:]]
    assert asked == [("b1", "17.5"), ("b1", f"{NOON}.5"), ("b2", "17.5"), ("b2", f"{NOON}.7"), ("b1", f"{NOON}.5")]


def test_many_may_look_on_at_once_and_a_pipe_may_close(bus):
    bus_send.send("dell", "hi", url=bus.url, sender="spark")
    both = [program("tools/bus_log.py", env={"AGENT_BUS_URL": bus.url}) for _ in range(2)]
    for process in both:
        assert b"from=spark" in process.stdout.readline()
        process.stdout.close()
    bus_send.send("dell", "to nobody", url=bus.url, sender="spark")
    for process in both:
        wait_until(lambda process=process: process.poll() == 0)
        assert process.stderr.read() == b""
        process.stderr.close()


@pytest.mark.parametrize("arguments", [
    ["dell"], ["--read", "1"], ["--since", "last"], ["--since", "1w"], ["--since", "-1h"], ["--to", "a b"],
    ["--to", "a,"], ["--from", "ü"], ["--channel", "a/b"],
])  # fmt: skip
def test_wrong_usage_of_the_log_is_2_and_asks_nothing(arguments):
    with Scripted(mail(message(1))) as server:
        assert run("bus_recv.py", "dell", "--from", "spark", env={"AGENT_BUS_URL": server.url})[0] == 2
        code, out, err = log(server.url, *arguments)
        assert (code, out, server.asked) == (2, "", []) and err


def test_an_observer_that_may_not_look_is_told():
    with Scripted(answer({"error": "the log is the operator's"}, status=403)) as server:
        assert log(server.url, "--no-follow") == (1, "", "bus_log: the log is the operator's\n")


def test_a_token_of_no_operator_is_told_that_it_sees_its_own_mail_only(tmp_path, home):  # noqa: F811
    tokens = mint(tmp_path / "bus.db", dell=[], op=["--operator"])
    with Server(tmp_path / "bus.db") as bus:
        err = log(bus.url, "--no-follow", AGENT_BUS_TOKEN=tokens["dell"])[2]
        assert err == "bus_log: this is only what dell got or sent: the token is not that of an operator\n"
        assert log(bus.url, "--no-follow", AGENT_BUS_TOKEN=tokens["op"])[2] == ""
    assert "only an operator sees all" in " ".join(run("tools/bus_log.py", "--help")[1].split())
