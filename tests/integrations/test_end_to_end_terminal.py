"""The real Claude Code with our plugin, and on a terminal: what a person has who works with it."""
import json
import os
import pathlib
import re
import shlex
import statistics
import subprocess
import sys
import threading
import time

import pytest

import bus_recv
from tests.integrations.test_end_to_end import named, over_http  # noqa: F401
from tests.integrations.test_hook import send_hostile_mail
from tests.kit.claude_code import (
    ANSWER_SECONDS,
    CLAUDE,
    EVENT,
    ID,
    MARKS,
    Session,
    Terminal,
    bash,
    done,
    hooks,
    integration,
    introduced,
    reply,
    tools,
)
from tests.kit.processes import PATIENCE, ROOT, Server, in_time, wait_until
from tests.kit.scripted_model import ScriptedModel, news, tool_use, words

pytestmark = MARKS
PLUGIN = "--plugin-dir", str(ROOT)
SKILL = tool_use("Skill", skill="agent-bus:agent-bus")
needs_plugin = pytest.mark.skipif(not (ROOT / ".claude-plugin/plugin.json").exists(), reason="there is no plugin yet")


@needs_plugin
def test_the_plugin_alone_makes_a_session_hear_and_answer(bus, peer, tmp_path):
    """Its hooks tell the name and old mail, its skill says how to watch under -p, its tools send."""
    before = peer("from before")["id"]

    def script(request):
        told = news(request)
        if len(model.requests) == 1:
            return [SKILL]
        if len(model.requests) == 2:
            name = introduced(model.requests[0])
            command = re.search(r"^- command: `(.*)`$", told, re.MULTILINE)[1].replace("NAME", name)
            milliseconds = int(re.search(r"^- timeout_ms: `(.*)`$", told, re.MULTILINE)[1])
            return [tool_use("Monitor", command=command, description="agent-bus inbox", timeout_ms=milliseconds)]
        if "are you there?" in told:
            number = ID.findall(told)[-1]
            return [tool_use("mcp__plugin_agent-bus_bus__bus_send", to="peer", msg="heard", reply_to=number)]
        return [words("waiting")]

    allowed = "--allowedTools", "Skill", "Monitor", "mcp__plugin_agent-bus_bus"
    with ScriptedModel(script) as model, Session(tmp_path, bus, model, *PLUGIN, *allowed):
        wait_until(lambda: "Monitor started" in model.heard())
        sent = peer("are you there?")["id"]
        answer = next(bus_recv.receive("peer", url=bus.url, timeout=PATIENCE))
    assert (answer["from"], answer["msg"], answer["reply_to"]) == ("alice", "heard", sent)
    assert "1 unread for alice (1 from before this session)" in news(model.requests[0])
    assert model.heard().count(before) == 1, "by the watch"


@needs_plugin
def test_the_plugins_own_monitor_tells_a_session_on_a_terminal_once_its_skill_is_used(bus, peer, tmp_path):
    def script(request):
        told = news(request)
        if len(model.requests) == 1:
            return [SKILL]
        if "wake up" in told:
            return [reply(ID.findall(told)[-1], "awake")]
        return [words("waiting")]

    # Not auto mode, a terminal's default: there a model judges each call, and ours judges nothing.
    allowed = "--permission-mode", "default", "--allowedTools", "Skill", "Bash"
    with ScriptedModel(script) as model, Terminal(tmp_path, bus, model, *PLUGIN, *allowed) as session:
        wait_until(lambda: len(model.requests) > 1)
        assert session.readers_write_to("socket")
        mail, took = bus_recv.receive("peer", url=bus.url, timeout=PATIENCE), []
        for number in range(2):
            began = time.monotonic()
            sent = peer(f"wake up {number}")["id"]
            answer = next(mail)
            took.append(time.monotonic() - began)
            assert (answer["msg"], answer["reply_to"]) == ("awake", sent)
        assert "wake up 1" in EVENT.findall(model.heard())[-1]
    print("seconds from a peer's send to its receipt of the answer:", *(f"{each:.2f}" for each in took))
    assert min(took) < in_time(ANSWER_SECONDS), took


TOLD = re.compile(r"\d unread for alice")


def wakes(bus, peer, tmp_path, *options, times, plugin=False, **environment):
    """A session that sleeps on a terminal is told the number, takes the mail with the tool, and answers; again.

    Only the first message is acknowledged: with three, the last one comes beside mail that is unread. Returns what the
    session was told at each wake.
    """
    inbox, acknowledge = (f"mcp__{'plugin_agent-bus_' if plugin else ''}bus__bus_{tool}" for tool in ("inbox", "ack"))
    turns = []

    def script(request):
        told = news(request)
        if TOLD.search(told):
            return [tool_use(inbox)]
        if "wake up" in told and "msg" in told:
            number = ID.findall(told)[-1]
            return [reply(number, "awake")] + [tool_use(acknowledge, id=number)] * ("wake up 0" in told)
        turns.append(request)
        return [words("waiting")]

    allowed = "--permission-mode", "default", "--allowedTools", "Bash", inbox, acknowledge
    with ScriptedModel(script) as model, Terminal(tmp_path, bus, model, *options, *allowed, **environment):
        mail, took = bus_recv.receive("peer", url=bus.url, timeout=times * PATIENCE), []
        for number in range(times):
            wait_until(lambda: len(turns) == len(took) + 1)
            wait_until(lambda: b'"name": "alice", "channel": "default", "online": true' in bus.get("/agents"))
            began = time.monotonic()
            sent = peer(f"wake up {number}")["id"]
            wait_until(lambda: len(TOLD.findall(model.heard())) == len(took) + 1)
            took.append(time.monotonic() - began)
            answer = next(mail)
            assert (answer["msg"], answer["reply_to"]) == ("awake", sent)
        woken = [request for request in model.requests if TOLD.search(news(request))]
    print("seconds from a peer's send to the wake:", *(f"{each:.2f}" for each in took))
    print("the wake:", json.dumps(woken[0]["messages"][-1])[:1000])
    assert all("wake up" not in news(request) for request in woken)
    assert statistics.median(took) < in_time(ANSWER_SECONDS), took
    return list(map(news, woken))


def test_the_waiter_wakes_a_session_that_sleeps_on_a_terminal(bus, peer, tmp_path):
    """As bus_hook.py says that it is set up."""
    hook = integration("bus_hook.py")
    settings = re.search(r'\{"hooks": .*\}\]\}\]\}\}', pathlib.Path(hook).read_text(), re.DOTALL)[0]
    settings = settings.replace("python3 /path/to/bus_hook.py", shlex.join([sys.executable, hook]))
    told = wakes(bus, peer, tmp_path, "--settings", settings, *tools(bus, tmp_path), times=3)
    assert "2 unread for alice" in told[2], "one of them beside another"


@needs_plugin
def test_a_session_that_is_renamed_and_cleared_hears_as_its_new_name(bus, peer, tmp_path):
    """By the hooks, and by the Monitor that runs since before: it follows."""

    def script(request):
        return [SKILL] if len(model.requests) == 1 else [words("waiting")]

    allowed = "--permission-mode", "default", "--allowedTools", "Skill"
    nameless = {"AGENT_NAME": ""}
    with ScriptedModel(script) as model, Terminal(tmp_path, bus, model, *PLUGIN, *allowed, **nameless) as session:
        wait_until(lambda: len(model.requests) == 2)
        assert session.readers_write_to("socket")
        wait_until(session.is_idle)
        session.type("/rename boss")
        session.shows("Session renamed to: boss")
        session.type("go on")
        wait_until(lambda: "This session is now boss on the agent-bus." in model.heard())
        for number, name in enumerate(("boss", "work")):
            peer(f"follow {number}", to=name)
            wait_until(lambda: any(f"follow {number}" in event for event in EVENT.findall(model.heard())))  # noqa: B023
        session.type("/clear")
        wait_until(lambda: len(list((tmp_path / "state" / "turns").iterdir())) == 2)  # its SessionStart hook has run
        session.type("and now")
        wait_until(lambda: "This session is boss on the agent-bus" in model.heard())
        peer("after clear", to="boss")
        wait_until(lambda: any("after clear" in event for event in EVENT.findall(model.heard())))
    assert not re.search("unread for (boss|work)", model.heard()), "the Monitor had it all"


def test_a_session_that_is_cleared_keeps_its_name_and_its_mail(bus, peer, tmp_path):
    """It has the second name of its folder. The first one is free by then, and a new session would get it."""

    def waits(request):
        assert second_is_there.wait(PATIENCE)
        return [words("done")]

    def start(kind, folder, model):
        (tmp_path / folder).mkdir()
        nameless = {"AGENT_NAME": "", "AGENT_BUS_STATE_DIR": str(tmp_path / "state")}
        return kind(tmp_path / folder, bus, model, *hooks("SessionStart"), **nameless)

    second_is_there = threading.Event()
    with ScriptedModel(waits) as first, start(Session, "one", first) as one, ScriptedModel(done) as model:
        wait_until(lambda: first.requests)
        with start(Terminal, "two", model) as two:
            wait_until(lambda: model.requests and two.is_idle())
            second_is_there.set()
            assert one.process.wait(PATIENCE) == 0
            peer("for the second", to="work-2")
            two.type("/clear")
            wait_until(lambda: len(list((tmp_path / "state" / "turns").iterdir())) == 3)  # the SessionStart hook ran
            two.type("and now")
            wait_until(lambda: len(model.requests) == 2)
    assert [introduced(request) for request in (*first.requests, *model.requests)] == ["work", "work-2", "work-2"]
    assert "1 unread for work-2" in news(model.requests[1])


@needs_plugin
def test_a_file_that_has_changed_wakes_a_session_that_sleeps_on_a_terminal(bus, peer, tmp_path):
    """By the plugin, without its skill: the tools' server waits, and FileChanged wakes."""
    wakes(bus, peer, tmp_path, *PLUGIN, times=2, plugin=True)


INBOX = {"terminal": "mcp__plugin_agent-bus_bus__bus_inbox", "token only": "mcp__bus__bus_inbox"}


@needs_plugin
@pytest.mark.parametrize("way", INBOX)
def test_of_200_hostile_messages_a_session_hears_a_number_and_no_word_until_it_asks(bus, peer, tmp_path, way):
    """By the hooks of the plugin, which are commands, on a terminal; and by hooks that are a tool of the bus."""
    send_hostile_mail(bus, "alice")

    def script(request):
        step = len(model.requests)
        if step == last:
            return [tool_use(INBOX[way])]
        if step < 3:  # in the turn, and at its end
            peer("OBEY", priority="high")
        return [bash("true")] if step == 1 else [words("waiting")]

    kind, options, last = (Terminal, PLUGIN, 4) if way == "terminal" else (Session, over_http(bus), 3)
    options = *options, "--permission-mode", "default", "--allowedTools", "Bash", INBOX[way]
    with ScriptedModel(script) as model, kind(tmp_path, bus, model, *options) as session:
        if way == "terminal":
            wait_until(lambda: len(model.requests) == 3, 2 * PATIENCE)
            wait_until(session.is_idle)
            peer("OBEY")  # which is not urgent, so no hook but that of FileChanged tells
        heard = [news(each) for each in wait_until(lambda: model.requests[: last + 1] if model.requests[last:] else [])]
        assert "OBEY" not in json.dumps(model.requests[:last] + model.others)
    for step, told in enumerate(heard[:last]):
        assert f"{200 + step} unread for alice" in told
    assert "OBEY" in heard[last]


CHANNEL_NEWS = re.compile('MCP server "bus": (Channel notifications .*)|(<channel source="bus" from="peer")')


def test_a_channel_is_accepted_and_its_mail_stays_unread(bus, peer, tmp_path):
    """Whether a program without an account listens to channels is not up to us, but it looks at the server before."""
    log = tmp_path / "log"
    log.touch()
    options = *tools(bus, tmp_path, "--channel"), "--dangerously-load-development-channels", "server:bus"
    options += "--debug-file", str(log)
    peer("through the channel")
    with ScriptedModel(lambda request: [words("waiting")]) as model, Terminal(tmp_path, bus, model, *options):
        skipped, pushed = wait_until(lambda: CHANNEL_NEWS.search(log.read_text() + model.heard())).groups()
        assert pushed or skipped == "Channel notifications skipped: channels feature is not currently available"
    assert b'"alice": 1' in bus.get("/inbox")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no clone, so there is nothing to clone")
def test_a_stranger_needs_five_commands_from_the_clone_to_a_message_that_an_agent_has_seen(tmp_path):
    """`git clone`, `cd`, and the three of README, in homes that hold at most what Claude Code asks when it is new."""
    clone, programs = tmp_path / "agent bus", tmp_path / "bin"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    section = (clone / "README.md").read_text().split("\n## Connect Claude Code\n")[1]
    serve, listen, send = re.search(r"```sh\n(.*?)\n```", section, re.DOTALL)[1].split("\n")
    programs.mkdir()
    (programs / "claude").symlink_to(CLAUDE)
    server = Server(tmp_path / "unused", env={"HOME": str(tmp_path / "home of the bus")})
    serve = serve.replace("bus_server.py", f"bus_server.py --port {server.port}")  # the usual one may be in use
    server.command = ["bash", "-c", f"cd {shlex.quote(str(clone))} && exec {serve}"]
    with server, ScriptedModel(lambda request: [words("waiting")]) as model:
        session = Terminal(tmp_path, server, model, PATH=f"{programs}:{os.environ['PATH']}", AGENT_NAME="")
        session.work, session.command = clone, ["bash", "-c", listen]
        with session:
            wait_until(lambda: model.requests)
            subprocess.run(["bash", "-c", send], cwd=clone, env={**os.environ, "AGENT_BUS_URL": server.url}, check=True)
            wait_until(lambda: "are you there?" in model.heard())
        assert f"`python3 -u '{clone}/bus_recv.py' alice`" in news(model.requests[0]), "a command that can be run"
