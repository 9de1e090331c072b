"""The plugin for machines without Python: the real Claude Code with a URL and a token only, and a scripted model."""

import json
import os
import re
import shlex
import subprocess

import pytest

import bus_server
from tests.kit.claude_code import CLAUDE, LIGHT
from tests.kit.dialects import tools_of
from tests.kit.peers import invite, post
from tests.kit.processes import PATIENCE, ROOT
from tests.kit.scripted_model import ScriptedModel, news, tool_use, words

FOLDER = ROOT / "integrations" / "claude_code_http"
PLUGIN = json.loads((FOLDER / ".claude-plugin" / "plugin.json").read_text())
needs_claude = pytest.mark.skipif(not CLAUDE, reason="no claude binary: see the head of test_end_to_end.py")


def test_it_has_the_version_of_the_bus_and_no_program():
    assert PLUGIN["version"] == bus_server.VERSION
    texts = [path.read_text() for path in FOLDER.glob("**/*") if path.is_file()]
    assert len(texts) == 2 and not re.search(r"python|\.py|\"command\"", "".join(texts))


def test_its_token_is_kept_as_a_secret():
    assert PLUGIN["userConfig"]["token"]["sensitive"]
    assert PLUGIN["mcpServers"]["bus"]["headers"]["Authorization"] == "Bearer ${user_config.token}"


@pytest.fixture
def claude(tmp_path):
    """Runs the binary in a HOME that is thrown away, without Python on PATH; its stdout, after it ended with 0."""
    nowhere = "http://127.0.0.1:9"
    (tmp_path / "home").mkdir()
    home = {"HOME": str(tmp_path / "home"), **LIGHT, "http_proxy": nowhere, "https_proxy": nowhere,
            "no_proxy": "127.0.0.1", "PATH": os.environ["PATH"]}  # fmt: skip

    def run(*arguments, **env):
        done = subprocess.run([CLAUDE, *arguments], cwd=tmp_path, env={**home, **env}, stdin=subprocess.DEVNULL,
                              capture_output=True, timeout=4 * PATIENCE)  # fmt: skip
        assert done.returncode == 0, (done.stdout + done.stderr).decode()
        return done.stdout.decode()

    return run


@needs_claude
def test_claude_finds_nothing_wrong_with_it(claude):
    said = claude("plugin", "validate", str(FOLDER), "--strict")
    assert "Validation passed" in said and "mcpServers: bus http" in said
    assert all(f"hooks: {event} mcp_tool" in said for event in ("UserPromptSubmit", "PostToolBatch", "Stop"))


@needs_claude
@pytest.mark.slow("a turn of Claude Code with three steps")
@pytest.mark.parametrize("has_tokens", [True, False])
def test_with_a_url_and_a_token_only_a_session_hears_of_mail_in_its_turn_and_reads_it(claude, bus, has_tokens):
    """The number by a hook in the next request, the text by the tool in the one after."""
    token, peer = (invite(bus, "alice"), invite(bus, "peer")) if has_tokens else ("", None)
    claude("plugin", "marketplace", "add", str(ROOT))
    settings = {"url": bus.url, "token": token, "name": "" if has_tokens else "alice"}
    given = [word for name, value in settings.items() if value for word in ("--config", f"{name}={value}")]
    claude("plugin", "install", "agent-bus-http@agent-bus", *given)
    listed = json.loads(claude("plugin", "list", "--json"))  # newer ones have plugins of their own
    (loaded,) = (plugin for plugin in listed if plugin["id"] == "agent-bus-http@agent-bus")
    assert loaded["enabled"] and "errors" not in loaded

    def script(request):
        number = len(model.requests)
        if number == 1:
            post(bus, "alice", "the body", "peer", peer, priority="high")
            return [tool_use("Bash", command="true", description="wait")]
        mine = [tool for tool in tools_of(request) if tool.endswith("bus_inbox")]
        if mine and not any("the body" in news(one) for one in model.requests):
            return [tool_use(mine[0])]
        if not mine and "ToolSearch" in tools_of(request) and number < 5:
            return [tool_use("ToolSearch", query="bus_inbox", max_results=1)]
        return [words("done")]

    with ScriptedModel(script) as model:
        model_env = {"ANTHROPIC_BASE_URL": model.url, "ANTHROPIC_API_KEY": "dummy", "CLAUDE_CODE_MAX_RETRIES": "0"}
        allowed = "mcp__plugin_agent-bus-http_bus__bus_inbox"
        options = shlex.split("--permission-mode default --allowedTools Bash")
        claude("-p", "begin", *options, allowed, **model_env)
        assert not model.failures, model.failures[0]
    second = news(model.requests[1])
    assert re.search(r"1 unread for alice \(1 urgent", second) and "the body" not in second, second
    assert any("the body" in news(request) for request in model.requests[2:])
