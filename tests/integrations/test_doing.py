"""What a session does is told to the bus by its hooks, beside the look for mail and in no more time."""
import contextlib
import json
import os
import socket
import sys
import threading

import pytest

from tests.integrations.test_hook import (  # noqa: F401
    FOLDER,
    NOTICE,
    PROMPT,
    START,
    STEP,
    STOP,
    after,
    changed,
    digest,
    drain,
    here,
    project,
    send,
    text,
)
from tests.kit import forked
from tests.kit.bad_servers import Scripted, answer
from tests.kit.processes import PATIENCE, ROOT, Server

sys.path += [FOLDER, str(ROOT / "tools")]
import bus_who  # noqa: E402
import doing  # noqa: E402

ONE_BUS = True
WAITING = {"hook_event_name": "Notification", "session_id": "s1", "notification_type": "permission_prompt"}
IDLE = {**WAITING, "notification_type": "idle_prompt"}
OK = answer({"ok": True, "now": 1.5, "bus": "b1"})


def status(bus, name="dell"):
    [agent] = json.loads(bus.get(here(f"/agents?name={name}")))["agents"]
    return {member: value for member, value in agent.get("status", {}).items() if member != "at"}


def orders(server):
    """The statuses that came behind the requests of a Scripted."""
    return [json.loads(asked.body.rpartition(b"\r\n\r\n")[2]) for asked in server.asked if b"POST" in asked.body]


class Patient:
    """A bus that answers a connection when it has both requests, and counts the connections."""

    def __init__(self, *answers):
        self.listener, self.answers = socket.create_server(("127.0.0.1", 0)), answers
        self.url, self.came = f"http://127.0.0.1:{self.listener.getsockname()[1]}", []
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            self.came.append(b"")
            while b'"state": "busy"}' not in self.came[-1]:
                self.came[-1] += sock.recv(65536)
            sock.sendall(b"".join(self.answers))
            self.silent = sock if len(self.answers) < 2 else sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listener.close()


# ── In no more time ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_status_takes_no_round_trip_of_its_own():
    """The bus answers only when it has both requests: if the second one waited for an answer, nobody would go on."""
    with Patient(digest(1, urgent=1), OK) as bus:
        assert text(bus.url, PROMPT) == NOTICE
        [came] = bus.came
    assert came.count(b"HTTP/1.0\r\n") == 2 and came.startswith(b"GET /digest?") and b"POST /status HTTP/1.0" in came


def test_a_bus_that_never_answers_to_a_status_loses_no_notice(monkeypatch):
    changed(monkeypatch, "bus_hook.ANSWER_SECONDS = 0.5")  # so that a busy machine has time left for the rest
    with Patient(digest(1, urgent=1)) as bus:
        assert text(bus.url, PROMPT) == NOTICE


def test_only_what_has_changed_is_told_and_it_is_told_again_in_time(monkeypatch):
    with Scripted(digest(0)) as server:
        for event in (START, PROMPT, STEP, STEP, WAITING, STEP, STOP, IDLE, PROMPT):
            text(server.url, event)
        assert [each["state"] for each in orders(server)] == ["idle", "busy", "waiting", "busy", "idle", "busy"]
        path = os.path.join(os.environ["AGENT_BUS_STATE_DIR"], "turns", "s1")
        with open(path) as file:
            its = json.load(file)
        for number, later in enumerate((-doing.SAID_SECONDS, 86400), 7):  # or the clock was ahead by a day
            with open(path, "w") as file:
                json.dump({**its, "said_at": its["said_at"] + later}, file)
            text(server.url, STEP)
            assert len(orders(server)) == number


def test_through_a_proxy_a_status_is_told_only_to_a_bus_that_is_fast(monkeypatch):
    changed(monkeypatch, "quick.QUICK_SECONDS = 0.8")  # so that a machine that has much to do is fast as well
    with Scripted(digest(0), OK, after(0.8, digest(0))) as proxy:
        for event in (PROMPT, STOP):
            assert text("http://bus.example:8080", event, http_proxy=proxy.url) == ""
        asked = [each.target.partition("?")[0].rpartition("/")[2] for each in proxy.asked]
        assert asked == ["digest", "status", "digest"] and proxy.asked[1].json["state"] == "busy"


def test_what_is_asked_again_of_an_older_bus_has_no_second_status():
    gone = answer({"error": "/digest needs bus_extensions/digest.py"}, status=404)
    counted = answer({"recipients": {"default": {"dell": 3}}, "now": 1.5, "bus": "b1"})
    with Scripted(gone, counted) as server:
        assert text(server.url, PROMPT) == "agent-bus: 3 unread for dell. bus_inbox shows them."
        assert len(orders(server)) == 1


# ── What is told ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_others_see_what_a_session_does_where_and_on_which_branch(bus, tmp_path):
    (tmp_path / "project" / ".git").mkdir()
    (tmp_path / "project" / ".git" / "HEAD").write_text("ref: refs/heads/fix-3\n")
    place = {"cwd": str(tmp_path / "project"), "branch": "fix-3"}
    for event, state in ((START, "idle"), (PROMPT, "busy"), (WAITING, "waiting"), (STEP, "busy"), (STOP, "idle")):
        text(bus.url, {**event, "cwd": place["cwd"]})
        assert status(bus) == {**place, "state": state}
    [dell] = json.loads(bus.get(here("/agents?max=9")))["agents"]
    assert bus_who.doing(dell, float(dell["status"]["at"])).startswith("idle <1m: ")
    assert not dell["online"] and not dell["listens"], "a word is not presence"
    text(bus.url, {**PROMPT, "cwd": place["cwd"]}, HOME=str(tmp_path))
    assert status(bus)["cwd"] == "~/project"


def test_what_the_agent_says_of_itself_goes_along(bus):
    environment = {**os.environ, "AGENT_BUS_URL": bus.url, "AGENT_NAME": "dell"}

    def tool(name, **arguments):
        call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": name, "arguments": arguments}}
        command = [sys.executable, str(ROOT / "integrations" / "claude_code" / "bus_mcp.py")]
        done = forked.run(command, input=json.dumps(call) + "\n", env=environment, capture_output=True, text=True,
                              timeout=PATIENCE)  # fmt: skip
        return json.loads(done.stdout)["result"]["content"][0]["text"]

    place = {"cwd": os.getcwd()}
    text(bus.url, {**PROMPT, **place})
    tool("bus_status", text="T1 <b>" + "x" * 400, branch="main")
    text(bus.url, {**STEP, **place})
    assert status(bus)["text"] == ("T1 <b>" + "x" * 400)[:250] and status(bus)["branch"] == "main"
    assert status(bus)["state"] == "busy" and status(bus)["cwd"] == os.getcwd()
    assert '"state": "busy"' in tool("bus_agents") and "T1 \\u003cb>" in tool("bus_agents")
    tool("bus_status")
    text(bus.url, {**STOP, **place})
    assert status(bus) == {"cwd": os.getcwd(), "state": "idle"}
    doing.keep_said("dell", {"text": "long ago"})
    os.utime(doing.said_path("dell"), (0, 0))
    assert doing.said("dell") == {}


@pytest.mark.parametrize("apart", ["bus", "channel"])
def test_what_the_agent_says_of_itself_is_for_its_own_bus_and_channel(apart, bus, tmp_path, monkeypatch):
    monkeypatch.setenv("AGENT_BUS_URL", bus.url)
    doing.keep_said("dell", {"text": "of customers of this bus", "branch": "acme"})
    with contextlib.ExitStack() as stack:
        other = bus if apart == "channel" else stack.enter_context(Server(tmp_path / "other.db"))
        if apart == "channel":
            monkeypatch.setenv("AGENT_BUS_CHANNEL", "elsewhere")
        text(other.url, {**PROMPT, "session_id": "s2"})
        assert status(other) == {"state": "busy"}


def test_a_session_that_is_resumed_on_another_bus_tells_its_status_there_too(bus, tmp_path):
    with Server(tmp_path / "other.db") as other:
        send(other, "hi")
        send(bus, "later")
        text(bus.url, PROMPT)
        assert "1 unread for dell" in text(other.url, STEP), "what was told is of the first bus"
        text(other.url, PROMPT)
        assert status(other)["state"] == "busy"


def test_a_permission_that_is_asked_for_is_no_text_for_the_session(bus):
    send(bus, "hi", priority="high")
    assert drain(bus.url, WAITING) is None and drain(bus.url, IDLE) is None
    assert drain("http://127.0.0.1:9", WAITING) is None
    assert text(bus.url, PROMPT) == NOTICE, "it was not told"
    assert drain(bus.url, {**WAITING, "agent_id": "a1"}) is None


def test_a_program_that_never_says_that_a_turn_begins_is_not_called_idle(bus):
    drain(bus.url, {"hook_event_name": "sessionStart", "conversation_id": "c1"}, "cursor")
    assert json.loads(bus.get(here("/agents?max=9")))["agents"] == []


def test_a_bus_that_takes_no_status_is_looked_at_as_ever(tmp_path):
    with Server(tmp_path / "other.db", "--without", "people") as bus:
        send(bus, "hi", priority="high")
        assert text(bus.url, PROMPT) == NOTICE


def test_the_branch_is_that_of_the_repository_around_the_folder(tmp_path):
    git, below = tmp_path / "repo" / ".git", tmp_path / "repo" / "a" / "b"
    below.mkdir(parents=True)
    git.mkdir()
    assert doing.branch_of(str(tmp_path)) == doing.branch_of(str(below)) == ""
    for head, branch in (("ref: refs/heads/feature/x\n", "feature/x"), ("0123456789abcdef\n", ""), ("", "")):
        (git / "HEAD").write_text(head)
        assert doing.branch_of(str(below)) == doing.branch_of(str(tmp_path / "repo")) == branch
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "worktrees" / "w").mkdir(parents=True)
    (git / "worktrees" / "w" / "HEAD").write_text("ref: refs/heads/other\n")
    for name, place in (("w", f"{git}/worktrees/w"), ("v", "../repo/.git/worktrees/w")):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".git").write_text(f"gitdir: {place}\n")
        assert doing.branch_of(str(tmp_path / name)) == "other"
    (below / ".git").write_bytes(b"gitdir: \0\xff")
    assert doing.branch_of(str(below)) == "main", "what is not git's is passed"
