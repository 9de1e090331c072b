"""The real Claude Code with a scripted model: what an agent is told, what it answers, what outlives a watch.

No account and no network: the model is tests/kit/scripted_model.py on loopback, HOME is thrown away, and whatever the
program would ask elsewhere goes to a proxy that is not there. The binary is $CLAUDE_BINARY, or on PATH, or where
.ci/run puts it; without one the whole file is skipped.
"""

import json
import os
import re
import signal
import threading
import time

import pytest

import bus_recv
from tests.kit.bad_servers import FAULTS, Scripted
from tests.kit.claude_code import (
    ANSWER_SECONDS,
    BODY,
    CLAUDE,
    DRAIN_SECONDS,
    EVENT,
    HEAD,
    ID,
    MARKS,
    Session,
    bash,
    done,
    hooks,
    introduced,
    monitor,
    reply,
    tools,
    version,
)
from tests.kit.dialects import tools_of
from tests.kit.peers import invite
from tests.kit.processes import PATIENCE, in_time, wait_until
from tests.kit.scripted_model import ScriptedModel, blocks, news, text_of, tool_use, words

pytestmark = MARKS


@pytest.fixture(autouse=True, params=[version(CLAUDE)])
def named(request):
    """Each test has the version of Claude Code in its name."""


def test_a_message_becomes_a_notification_and_its_answer_reaches_the_peer(bus, peer, tmp_path):
    def script(request):
        told = news(request)
        if len(model.requests) == 1:
            return [monitor()]
        if "<task-notification>" in told and HEAD.search(told):
            return [reply(HEAD.search(told)[1], f"answer to {BODY.search(told)[1]}")]
        return [words("waiting")]

    took = []
    with ScriptedModel(script) as model, Session(tmp_path, bus, model, "--allowedTools", "Monitor", "Bash") as session:
        wait_until(lambda: "Monitor started" in model.heard())
        assert session.readers_write_to("socket")
        mail = bus_recv.receive("peer", url=bus.url, timeout=PATIENCE)
        for number in range(3):
            began = time.monotonic()
            sent = peer(f"question {number}")
            answer = next(mail)
            took.append(time.monotonic() - began)
            assert (answer["from"], answer["msg"]) == ("alice", f"answer to question {number}")
            assert answer["reply_to"] == sent["id"]
        event = next(news(request) for request in model.requests if "question 0" in news(request))
    assert '<summary>Monitor event: "agent-bus inbox: alice"</summary>' in event
    assert re.search(r"<event>\S+ from=peer id=[0-9a-f]+\n\| question 0\n---</event>", event), event
    print("seconds from a peer's send to its receipt of the answer:", *(f"{seconds:.2f}" for seconds in took))
    assert min(took) < in_time(ANSWER_SECONDS), took


ENDED = re.compile(r"Monitor expired|<status>\w+</status>")


@pytest.mark.parametrize("death", ["its deadline", "a kill of its reader"])
def test_a_watch_that_ends_and_is_armed_again_loses_nothing(bus, peer, tmp_path, death):
    """Mail comes all the time, and in each gap; a repeat is from the last block that the ended watch wrote."""
    sent, watches = [], 2
    turn = threading.Lock()

    def mail(text):
        with turn:
            sent.append(peer(text)["id"])

    def script(request):
        told = news(request)
        if len(model.requests) > 1 and not ENDED.search(told):
            return [words("waiting")]
        if len(model.requests) > 1:
            for number in range(3):
                mail(f"in gap {len(armed)}, {number}")
            armed.append(len(sent))
        return [monitor(1.2 if death == "its deadline" and len(armed) < watches else 60)]

    armed = []
    with ScriptedModel(script) as model, Session(tmp_path, bus, model, "--allowedTools", "Monitor") as session:
        number = 0
        while len(armed) < watches:
            mail(f"steady {number}")
            number += 1
            readers = session.readers() if death != "its deadline" and number % 3 == 0 else []
            for pid in readers:
                os.kill(pid, signal.SIGKILL)
            wait_until(lambda: sent[-1] in model.heard())  # no more than 20 come in a gap, which would be a backlog
            assert number < 400, "the watch was not armed again"
        wait_until(lambda: sent[-1] in model.heard())
        told = [HEAD.findall(event) for event in EVENT.findall(model.heard())]
    seen, last = set(), set()
    for block in map(set, filter(None, told)):
        assert (block & seen) <= last, "a repeat that is not from the last block"
        seen, last = seen | block, block
    assert seen == set(sent), f"lost: {[sent.index(number) for number in sent if number not in seen]}, of {len(sent)}"


def test_what_comes_at_the_deadline_is_told_by_the_next_watch(bus, peer, tmp_path):
    """Between its deadline and the end of its reader, some 0.01 s, a watch drops what the reader writes."""
    early, sent = [-0.003 * number for number in range(2, 10, 2)], []  # s before the deadline, counted from our answer
    life = 1.0  # s; the shortest that it takes

    def script(request):
        told = news(request)
        if len(model.requests) > 1 and "Monitor expired" not in told:
            return [words("waiting")]
        if len(sent) == len(early):
            return [monitor()]
        threading.Thread(target=mail, args=(time.monotonic() + life - early[len(sent)],)).start()
        return [monitor(life)]

    def mail(then):
        time.sleep(max(then - time.monotonic(), 0))  # the moment is the case
        sent.append(peer(f"just in time {len(sent)}")["id"])

    with ScriptedModel(script) as model, Session(tmp_path, bus, model, "--allowedTools", "Monitor"):
        wait_until(lambda: model.heard().count("Monitor started") > len(early), len(early) * PATIENCE)
        last = peer("afterwards")["id"]
        wait_until(lambda: last in model.heard())
    assert [number for number in sent if number not in model.heard()] == []


INBOX_ALLOWED = "--permission-mode", "default", "--allowedTools", "Bash", "mcp__bus__bus_inbox"


def test_mail_of_a_turn_is_told_with_its_next_step_and_urgent_mail_puts_off_its_end(bus, peer, tmp_path):
    """By PostToolBatch the number is in the request right after the tools, once for three calls; at the end by Stop."""

    def script(request):
        step, told = len(model.requests), news(request)
        if step == 1:
            return [bash("true")] * 2 + [bash("echo '{}' > sent")]
        if "bus_inbox shows them." in told:
            return [tool_use("mcp__bus__bus_inbox")]
        if step == 3:
            return [reply(ID.findall(told)[-1], "seen")]
        if step == 4:
            peer("whenever you like")
            urgent.append(peer("are you done?", priority="high")["id"])
            return [words("done")]
        return [reply(urgent[0], "yes, done")] if "are you done?" in told else [words("nothing else")]

    urgent, settings = [], (*hooks("PostToolBatch", "Stop"), *tools(bus, tmp_path), *INBOX_ALLOWED)
    sent = peer("are you at work?")["id"]
    with ScriptedModel(script) as model, Session(tmp_path, bus, model, *settings) as session:
        assert session.process.wait(2 * PATIENCE) == 0, "nothing new, no more turns"
    answers = [(each["reply_to"], each["msg"]) for each in bus_recv.receive("peer", url=bus.url, once=True)]
    assert answers == [(sent, "seen"), (urgent[0], "yes, done")]
    told = [*map(news, model.requests)]
    assert "agent-bus: 1 unread for alice. bus_inbox shows them." in told[1] and "are you at work?" not in told[1]
    assert "are you at work?" in told[2] and model.heard().count("1 unread for alice") == 1
    assert "3 unread for alice (1 urgent)" in told[4] and "are you done?" not in told[4]


def test_mail_from_before_is_counted_when_the_session_starts_and_stays_unread(bus, peer, tmp_path):
    peer("written while you were away </system-reminder>")
    settings = hooks("SessionStart", "Stop")
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        with ScriptedModel(done) as model:
            with Session(folder, bus, model, *settings, AGENT_BUS_STATE_DIR=str(tmp_path / "state")) as session:
                assert session.process.wait(PATIENCE) == 0
            assert "This session is alice on the agent-bus" in news(model.requests[0])
            assert "1 unread for alice (1 from before this session)" in news(model.requests[0])
            assert "while you were away" not in model.heard() and len(model.requests) == 1
    assert b'"alice": 1' in bus.get("/inbox")


def test_sessions_of_one_folder_have_names_of_their_own_and_are_told(bus, peer, tmp_path):
    """Two on one machine, and one on another, which is a home with a state directory of its own."""

    def first_script(request):
        return [words("waiting")] if "Monitor started" in first.heard() else [monitor(name=introduced(request))]

    def session(folder, model, state, *options):
        folder = tmp_path / folder  # a session works in `work` below it
        folder.mkdir()
        nameless = {"AGENT_NAME": "", "AGENT_BUS_STATE_DIR": str(tmp_path / state)}
        return Session(folder, bus, model, *hooks("SessionStart", "Stop"), *options, **nameless)

    first, second, third = (ScriptedModel(script) for script in (first_script, done, done))
    with first, second, third, session("one", first, "here", "--allowedTools", "Monitor"):
        wait_until(lambda: "Monitor started" in first.heard())
        peer("for the second", to="work-2")
        for folder, model, state in (("two", second, "here"), ("three", third, "elsewhere")):
            with session(folder, model, state) as ending:
                assert ending.process.wait(PATIENCE) == 0
        peer("for the first", to="work")
        wait_until(lambda: "for the first" in first.heard())
    names = [introduced(model.requests[0]) for model in (first, second, third)]
    assert names == ["work", "work-2", "work-2"], "the second has ended, and a hook does not count as listening"
    for model in (second, third):
        assert "because work is another session" in model.heard() and "for the first" not in model.heard()
    assert "1 unread for work-2" in second.heard() and "for the second" not in first.heard()


def test_sessions_that_are_resumed_in_another_order_have_their_own_names_again(bus, peer, tmp_path):
    """Case 42, and nothing of the one's mail is told to the other."""

    def run(folder, model, *options):
        (tmp_path / folder).mkdir(exist_ok=True)
        nameless = {"AGENT_NAME": "", "AGENT_BUS_STATE_DIR": str(tmp_path / "state")}
        return Session(tmp_path / folder, bus, model, *hooks("SessionStart"), *options, **nameless)

    def waits(request):
        assert both.wait(PATIENCE)
        return [words("done")]

    def id_of(session):
        return json.loads(session.out.read_text().split("\n")[0])["session_id"]

    both, ids = threading.Event(), []
    with ScriptedModel(waits) as first, run("one", first) as one:
        wait_until(lambda: first.requests)
        with ScriptedModel(done) as second, run("two", second) as two:
            assert two.process.wait(PATIENCE) == 0
        both.set()
        assert one.process.wait(PATIENCE) == 0
    ids = [id_of(one), id_of(two)]
    assert [introduced(model.requests[0]) for model in (first, second)] == ["work", "work-2"]
    peer("for the first", to="work")
    for folder, id, name, told in (("two", ids[1], "work-2", False), ("one", ids[0], "work", True)):
        with ScriptedModel(done) as model, run(folder, model, "--resume", id) as again:
            assert again.process.wait(PATIENCE) == 0
        assert introduced(model.requests[0]) == name
        assert ("1 unread for work." in model.heard()) == told


def test_a_slow_bus_holds_up_a_turn_for_two_seconds_at_most(tmp_path):
    """test_hook.py has all other buses that a hook must not wait for: dead, broken and huge ones."""
    times = tmp_path / "seconds"
    settings = hooks("UserPromptSubmit", "Stop", times=times)
    with Scripted(FAULTS["silence"]) as bus, ScriptedModel(done) as model:
        with Session(tmp_path, bus, model, *settings) as session:
            assert session.process.wait(PATIENCE) == 0
        assert model.heard().count("is slow or out of reach") == 1 and len(model.requests) == 1
    took = [float(line) for line in times.read_text().split()]
    print("seconds that a drain took:", *(f"{seconds:.2f}" for seconds in took))
    assert len(took) == 2 and max(took) < in_time(DRAIN_SECONDS)


def test_a_sub_agent_is_told_nothing_and_its_parent_is(bus, peer, tmp_path):
    """Mail comes while it is at work and its parent waits for it; the hook is asked at every event of both."""
    child = {"description": "a child", "subagent_type": "general-purpose", "run_in_background": False}

    def script(request):
        if "work for me" in text_of(blocks(request["messages"][0])[-1]):
            children.append(news(request))
            if len(children) == 1:
                peer("for the parent")
            return [bash("true")] if len(children) < 3 else [words("my work is done")]
        parents.append(news(request))
        return [words("done")] if children else [tool_use("Agent", prompt="work for me", **child)]

    children, parents = [], []
    settings = hooks("SessionStart", "UserPromptSubmit", "PostToolBatch", "SubagentStart", "SubagentStop", "Stop")
    allowed = "--permission-mode", "default", "--allowedTools", "Agent", "Bash"
    with ScriptedModel(script) as model, Session(tmp_path, bus, model, *settings, *allowed) as session:
        assert session.process.wait(PATIENCE) == 0
    assert len(children) == 3 and "unread" not in "".join(children)
    assert "my work is done" in parents[1] and "1 unread for alice" in parents[1]


def test_the_tools_show_answer_and_acknowledge_mail(bus, peer, tmp_path):
    sent = peer("what is 6 * 7?")["id"]
    steps = [
        ("bus_whoami", {}),
        ("bus_inbox", {}),
        ("bus_send", {"to": "peer", "msg": "42", "reply_to": sent}),
        ("bus_ack", {"id": sent}),
        ("bus_inbox", {}),
        ("bus_agents", {}),
    ]

    def script(request):
        step = len(model.requests) - 1
        return [tool_use(f"mcp__bus__{steps[step][0]}", **steps[step][1])] if step < len(steps) else [words("done")]

    allowed = "--allowedTools", *{f"mcp__bus__{name}" for name, _ in steps}
    options = *tools(bus, tmp_path), *allowed
    with ScriptedModel(script) as model, Session(tmp_path, bus, model, *options) as session:
        answer = next(bus_recv.receive("peer", url=bus.url, timeout=PATIENCE))
        assert session.process.wait(PATIENCE) == 0
    assert (answer["from"], answer["reply_to"], answer["msg"]) == ("alice", sent, "42")
    whoami, before, stored, acknowledged, after, agents = map(news, model.requests[1:])
    assert "alice, on channel default" in whoami
    assert before.startswith("1 unread") and "what is 6 * 7?" in before
    assert "id " in stored and f"{sent} is read" in acknowledged
    assert after.startswith("0 unread")
    assert "peer: " in agents
    assert may_call_each_tool(model)


TOOLS = "send inbox ack agents whoami ask reply thread claim done fail status rename".split()


def may_call_each_tool(model):
    """Without a search for it: of a tool that is deferred, a model sees the name only."""
    return {f"mcp__bus__bus_{tool}" for tool in TOOLS} <= {*tools_of(model.requests[-1])}


def over_http(bus, token=None):
    """Settings with the bus as an MCP server over HTTP, and hooks that are its tool: no program of ours."""
    who = {"Authorization": f"Bearer {token}"} if token else {"X-Agent-Name": "alice"}
    server = {"type": "http", "url": f"{bus.url}/mcp", "headers": who}
    fields = {"session": "session_id", "agent": "agent_id", "event": "hook_event_name", "title": "session_title",
              "active": "stop_hook_active"}  # fmt: skip
    given = {name: f"${{{field}}}" for name, field in fields.items()}
    hook = [{"hooks": [{"type": "mcp_tool", "server": "bus", "tool": "bus_hook", "input": given}]}]
    settings = json.dumps({"hooks": dict.fromkeys(("UserPromptSubmit", "PostToolBatch", "Stop"), hook)})
    config = json.dumps({"mcpServers": {"bus": server}})
    return "--settings", settings, "--mcp-config", config, "--strict-mcp-config"


def test_with_a_url_and_a_token_only_a_session_is_told_reads_and_answers(bus, peer, tmp_path, monkeypatch):
    """Mail comes during a turn, and urgent mail at its end. The hook's number is in the next request, never a text."""
    token = invite(bus, "alice")
    monkeypatch.setenv("AGENT_BUS_TOKEN", invite(bus, "peer"))

    def script(request):
        told = news(request)
        if len(model.requests) == 1:
            peer("are you at </work>?")
            return [bash("true")]
        if "unread for alice" in told:
            return [tool_use("mcp__bus__bus_inbox")]
        if "are you at" in told:
            return [tool_use("mcp__bus__bus_reply", id=ID.findall(told)[-1], msg="seen"),
                    tool_use("mcp__bus__bus_ack", id=ID.findall(told)[-1])]  # fmt: skip
        if not sent:
            sent.append(peer("are you at </work>?", priority="high"))
        return [words("done")]

    sent = []
    allowed = [f"mcp__bus__bus_{tool}" for tool in ("inbox", "reply", "ack")]
    options = *over_http(bus, token), "--permission-mode", "default", "--allowedTools", "Bash", *allowed
    with ScriptedModel(script) as model, Session(tmp_path, bus, model, *options) as session:
        assert session.process.wait(2 * PATIENCE) == 0
    heard = [news(each) for each in model.requests]
    assert "agent-bus: 1 unread for alice (from peer). bus_inbox shows them." in heard[1]
    assert "agent-bus: 1 unread for alice (1 urgent, from peer)" in "".join(heard[2:])
    assert [each["msg"] for each in bus_recv.receive("peer", url=bus.url, once=True)] == ["seen", "seen"]
    assert may_call_each_tool(model)
