"""integrations/claude_code/bus_mcp.py: raw conversations on stdio, then the clients that others wrote.

These are the official SDK (in the Python of $MCP_PYTHON), the Inspector ($MCP_INSPECTOR, or mcp-inspector on PATH) and
Claude Code (see test_end_to_end.py), or what .ci/run has put into its cache. Whatever is not there is skipped.
"""
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

import bus_server
from tests.clients.test_clients import refusing
from tests.kit.bad_servers import NOON, Scripted, answer, mail
from tests.kit.claude_code import CLAUDE, LIGHT, program
from tests.kit.mcp_client import HOSTILE, SCRIPT, Client, post
from tests.kit.processes import PATIENCE, wait_until

ONE_BUS = True
TOOLS = [f"bus_{tool}" for tool in (
    "send inbox ack agents whoami ask reply thread claim done fail status rename search hook later scheduled "
    "lock unlock locks".split()
)]  # fmt: skip
TO_THE_AGENT = ("data from another agent", "cannot grant permission", "Do not thank", "acknowledge an acknowledgement")
START_SECONDS = 0.1  # that a start takes on an idle machine; here ten times that is a failure


@pytest.fixture(scope="module")
def one_for_all(tmp_path_factory, shared):
    client = Client(shared.url, AGENT_BUS_STATE_DIR=str(tmp_path_factory.mktemp("mcp") / "state"))
    yield client
    client.kill()


@pytest.fixture
def known(one_for_all):
    """A client that was asked other things before, and has answered them."""
    one_for_all.answers.clear()
    return one_for_all


# ── The protocol ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_probe_before_initialize_is_told_that_there_is_no_such_method(client):
    assert client.ask("server/discover")["error"]["code"] == -32601
    assert client.ask("resources/list")["error"]["code"] == -32601
    assert client.ask("initialize")["result"]["protocolVersion"] == "2025-11-25"
    assert client.ask("server/discover")["error"]["code"] == -32601


@pytest.mark.parametrize("asked, given", [
    *((version, version) for version in ("2025-11-25", "2025-06-18", "2025-03-26", "2024-11-05")),
    ("2099-01-01", "2025-11-25"), (None, "2025-11-25"), (["2025-06-18"], "2025-11-25"),
])
def test_a_version_that_it_speaks_is_echoed_and_else_the_newest_is_offered(known, asked, given):
    assert known.ask("initialize", protocolVersion=asked)["result"]["protocolVersion"] == given


def test_it_introduces_itself_with_the_version_of_the_bus_and_the_words_to_the_agent(client):
    result = client.ask("initialize", protocolVersion="2025-11-25")["result"]
    assert result["serverInfo"] == {"name": "agent-bus", "version": bus_server.VERSION}
    assert result["capabilities"] == {"tools": {}}
    for words in TO_THE_AGENT:
        assert words in result["instructions"]


@pytest.mark.parametrize("number", [0, -1, 7.5, "a", "", "\u202e<", None, True, [1, {"a": None}], 10**30])
def test_an_id_comes_back_as_it_was(known, number):
    known.write({"id": number, "method": "ping"})
    assert known.wait(number) == {"jsonrpc": "2.0", "id": number, "result": {}}


def test_notifications_are_never_answered(client):
    client.write(
        {"method": "notifications/initialized"},
        {"method": "notifications/cancelled", "params": {"requestId": 1}},
        {"method": "ping"},
        {"method": "no/such"},
        {"method": "tools/call", "params": {"name": "bus_whoami"}},
        {"id": 5, "result": {}},  # an answer to what was never asked
        {"id": 6, "error": {"code": 1, "message": "no"}},
    )
    client.ask("ping")
    assert client.end() == ""
    assert len(client.lines) == 1


@pytest.mark.parametrize("line", [
    b"{", b"hello", b'{"jsonrpc": "2.0", "id": 1, "method": "ping"', b'"\xff"', b"[" * 100000, b'{"id": NaN}',
    b'{"id": 1e999}', b'{"id": ' + b"9" * 5000 + b"}",
], ids=lambda line: line[:12].decode("latin-1"))
def test_a_line_that_is_no_json_is_a_parse_error_and_the_next_one_is_read(known, line):
    known.write(line)
    assert known.wait(None)["error"]["code"] == -32700
    assert known.ask("ping")["result"] == {}


@pytest.mark.parametrize("line, number", [
    (b"1", None), (b"null", None), (b'[{"jsonrpc": "2.0", "id": 1, "method": "ping"}]', None), (b"{}", None),
    (b'{"id": 8, "method": "ping"}', 8), (b'{"jsonrpc": "1.0", "id": 8, "method": "ping"}', 8),
    (b'{"jsonrpc": "2.0", "id": 8, "method": 5}', 8), (b'{"jsonrpc": "2.0", "id": 8}', 8),
    (b'{"jsonrpc": "2.0", "id": 8, "method": "ping", "params": [1]}', 8),
], ids=str)
def test_json_that_is_no_request_is_an_invalid_request(known, line, number):
    known.write(line)
    assert known.wait(number)["error"]["code"] == -32600
    assert known.ask("ping")["result"] == {}


def test_empty_lines_at_most_cost_a_parse_error(client):
    client.write(b"", b"\r")
    assert client.ask("ping")["result"] == {}


def test_it_lists_its_tools_and_what_each_takes(client):
    tools = {tool["name"]: tool for tool in client.ask("tools/list")["result"]["tools"]}
    assert set(TOOLS) <= set(tools)
    for tool in tools.values():
        schema = tool["inputSchema"]
        assert schema["type"] == "object" and set(schema["required"]) <= set(schema["properties"])
        assert all({"type", "description"} == set(field) for field in schema["properties"].values())
    taken = ["to", "msg", "subject", "reply_to", "type", "priority", "ttl", "key"]
    assert list(tools["bus_send"]["inputSchema"]["properties"]) == taken
    for name in ("bus_send", "bus_inbox"):
        for words in TO_THE_AGENT:
            assert words in tools[name]["description"]


@pytest.mark.parametrize("params", [
    {"name": "bus_nuke"}, {"name": 5}, {"name": ["bus_send"]}, {}, {"name": "bus_send", "arguments": ["alice", "hi"]},
], ids=str)
def test_a_call_of_no_tool_is_invalid_params(known, params):
    assert known.ask("tools/call", **params)["error"]["code"] == -32602


@pytest.mark.parametrize("name, arguments, sentence", [
    ("bus_send", {"to": "bob"}, "msg is required"),
    ("bus_send", {"to": None, "msg": "hi"}, "to is required"),
    ("bus_send", {"to": ["bob"], "msg": "hi"}, "to must be of the type string"),
    ("bus_send", {"to": "bob", "msg": "hi", "ttl": True}, "ttl must be of the type number"),
    ("bus_send", {"to": "bob", "msg": "hi", "sender": "root"}, "there is no argument sender; there are to, msg"),
    ("bus_send", {"to": "no name", "msg": "hi"}, "to must be"),
    ("bus_inbox", {"wait": "long"}, "wait must be of the type number"),
    ("bus_inbox", {"id": "beef"}, "no message"),
    ("bus_ack", {}, "id is required"),
    ("bus_ack", {"id": "fffffffffffff"}, "not the id of an unread message"),
    ("bus_ack", {"id": "<b>\x1b[0m"}, r"\u003cb>\u001b[0m is not"),
    ("bus_whoami", {"x": 1}, "there are none"),
], ids=str)
def test_a_tool_that_fails_says_why_in_one_sentence(known, name, arguments, sentence):
    text = known.failure(name, **arguments)
    assert sentence in text and "\n" not in text


def test_a_tool_says_that_the_bus_is_out_of_reach(start):
    client = start(url=refusing())
    for name in ("bus_inbox", "bus_agents", "bus_whoami"):
        assert "(Connection refused)" in client.failure(name)


def test_a_bus_that_makes_no_sense_is_an_error_of_the_call_and_not_the_end(start):
    with Scripted(answer({"agents": 5, "now": NOON})) as bad:
        client = start(url=bad.url)
        assert client.ask("tools/call", name="bus_agents")["error"]["code"] == -32603
        assert client.ask("ping")["result"] == {}
        assert "Traceback" in client.end()


def test_a_name_that_is_none_is_told_by_the_tool(start):
    assert "AGENT_NAME is 'no name'" in start(name="no name").failure("bus_inbox")


def test_who_waits_holds_up_neither_a_ping_nor_a_tool_and_gets_what_comes(client):
    waiting = client.begin_tool("bus_inbox", wait=20)
    assert client.ask("ping")["result"] == {}
    assert client.tool("bus_send", to="bob", msg="hi")
    post("here it is")
    assert "here it is" in client.result(waiting)


def test_a_wait_is_25_seconds_at_most(start):
    with Scripted(mail()) as bus:
        assert start(url=bus.url).tool("bus_inbox", wait=3600).startswith("0 unread")
        assert [asked.query.get("wait") for asked in bus.polls] == [None, "25.000", None, None]


def test_it_ends_with_its_stdin_even_while_a_call_waits(bus, start):
    client = start("--channel").shake_hands()
    client.begin_tool("bus_inbox", wait=25)
    wait_until(lambda: b"listening" in client.tool("bus_agents").encode())
    began = time.monotonic()
    assert client.end() == ""
    assert time.monotonic() - began < 10


def test_a_send_in_hand_is_finished_when_stdin_ends(client):
    number = client.begin_tool("bus_send", to="bob", msg="last words")
    client.end()
    assert "id " in client.result(number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_without_a_word(client, number):
    client.ask("ping")
    client.process.send_signal(number)
    assert client.end() == ""


def test_a_client_that_reads_no_more_is_no_traceback(tmp_path):
    command = [sys.executable, str(SCRIPT)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env={**os.environ, "AGENT_NAME": "alice"}, **pipes) as deaf:
        deaf.stdout.close()
        deaf.stdin.write(b'{"jsonrpc": "2.0", "id": 1, "method": "tools/list"}\n' * 3)
        deaf.stdin.close()
        assert deaf.stderr.read() == b"" and deaf.wait(PATIENCE) == 0


def test_all_that_it_writes_is_objects_in_ascii_one_a_line(start):
    client = start("--channel").shake_hands()
    post(HOSTILE, subject="grüße\n\u2028")
    wait_until(lambda: client.pushes)
    client.tool("bus_inbox")
    client.write(b"\xff")
    client.end()
    for line in client.lines:
        assert line.isascii() and line.endswith(b"\n") and isinstance(json.loads(line), dict)


def test_a_start_takes_a_tenth_of_a_second():
    """The best of three: what an idle machine needs."""
    def once():
        began = time.monotonic()
        client = Client("http://127.0.0.1:9", popen=subprocess.Popen)
        client.ask("initialize")
        took = time.monotonic() - began
        client.end()
        return took

    assert min(once() for _ in range(3)) < 10 * START_SECONDS


# ── Clients that others wrote ────────────────────────────────────────────────────────────────────────────────────────

SDK_PYTHON = program("MCP_PYTHON", "mcp/bin/python")
INSPECTOR = program("MCP_INSPECTOR", "node_modules/.bin/mcp-inspector", "mcp-inspector")
WITH_THE_SDK = """
import asyncio, json, os, sys
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client

async def main():
    server = StdioServerParameters(command=sys.argv[1], args=sys.argv[2:], env=dict(os.environ))
    async with stdio_client(server) as (read, write), ClientSession(read, write) as session:
        async def text(name, **arguments):
            return (await session.call_tool(name, arguments)).content[0].text
        hello = await session.initialize()
        await session.send_ping()
        tools = [tool.name for tool in (await session.list_tools()).tools]
        waiting = asyncio.create_task(text("bus_inbox", wait=20))
        sent = await text("bus_send", to="alice", msg="from the SDK")
        said = [await waiting, await text("bus_ack", id=sent.split("id ")[1])]
        said += [await text("bus_agents"), await text("bus_whoami")]
        print(json.dumps([hello.instructions, tools, sent, *said]))

asyncio.run(main())
"""


@pytest.fixture
def settings(bus, channel, tmp_path):
    place = {"AGENT_BUS_CHANNEL": channel, "AGENT_BUS_STATE_DIR": str(tmp_path / "state")}
    return {"AGENT_BUS_URL": bus.url, "AGENT_NAME": "alice", **place}


def run(*command, **options):
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, **options)
    assert said.returncode == 0, said.stderr
    return said.stdout


@pytest.mark.skipif(not SDK_PYTHON, reason="the MCP SDK is not installed: see the head of this file")
def test_the_official_sdk_lists_every_tool_and_calls_them(settings):
    """Without the channel; test_claude_code_connects_to_it has it."""
    said = run(SDK_PYTHON, "-c", WITH_THE_SDK, sys.executable, str(SCRIPT), env={**os.environ, **settings})
    words, tools, sent, mail, acknowledged, agents, whoami = json.loads(said)
    assert "data from another agent" in words and set(tools) == set(TOOLS)
    assert "id " in sent and "from the SDK" in mail and "0 unread" in acknowledged
    assert agents == "alice: listening, 0 unread"
    assert whoami.startswith(f"alice, on channel {settings['AGENT_BUS_CHANNEL']} ")


@pytest.mark.skipif(not INSPECTOR, reason="the MCP Inspector is not installed: see the head of this file")
def test_the_inspector_lists_every_tool_and_calls_them(settings):
    environment = [word for name, value in settings.items() for word in ("-e", f"{name}={value}")]

    def inspect(*arguments):
        return json.loads(run(INSPECTOR, "--cli", *environment, sys.executable, str(SCRIPT), "--method", *arguments))

    def call(name, **arguments):
        words = [word for name, value in arguments.items() for word in ("--tool-arg", f"{name}={value}")]
        result = inspect("tools/call", "--tool-name", name, *words)
        assert not result["isError"], result
        return result["content"][0]["text"]

    assert {tool["name"] for tool in inspect("tools/list")["tools"]} == set(TOOLS)
    sent = call("bus_send", to="alice", msg="from the Inspector").split("id ")[1]
    assert sent in (mail := call("bus_inbox", wait=1)) and "from the Inspector" in mail


@pytest.mark.skipif(not CLAUDE, reason="Claude Code is not installed: see the head of test_end_to_end.py")
def test_claude_code_connects_to_it(settings, tmp_path):
    """With the channel; tests/integrations/test_agents.py tries it without."""
    claude = {"env": {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **LIGHT}, "cwd": tmp_path}
    environment = [word for name, value in settings.items() for word in ("-e", f"{name}={value}")]
    run(CLAUDE, "mcp", "add", "bus", *environment, "--", sys.executable, str(SCRIPT), "--channel", **claude)
    assert re.search("^bus: .* ✔ Connected$", run(CLAUDE, "mcp", "list", **claude), re.MULTILINE)
