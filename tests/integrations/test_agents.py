"""Real agent programs with what `agent-bus install` writes for them, and with a scripted model: offline.

Each runs one turn in a HOME that is thrown away. The bus has tokens; the agent's is in its environment only. The
programs are those of the folder $AGENT_BUS_AGENTS, which `make agents` fills with the newest of each. Without it only
Claude Code is tried, the one that the other tests use.
"""

import os
import re
import subprocess
import sys
from typing import NamedTuple

import pytest

from tests.clients.test_install import bus_agents, files_of
from tests.kit.claude_code import CLAUDE, LIGHT
from tests.kit.dialects import DIALECTS, tools_of
from tests.kit.peers import invite, post
from tests.kit.processes import ROOT, Server
from tests.kit.scripted_model import ScriptedModel, news, tool_use, words
from tools import bus_edit

FOLDER = os.environ.get("AGENT_BUS_AGENTS")
TURN_SECONDS = 120  # for one turn of one program; Gemini CLI takes 6 s where nothing else runs
OFFLINE = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.1"}

pytestmark = pytest.mark.slow("each program is started three times")


class Program(NamedTuple):
    """An agent program of npm, and how it is told of the scripted model."""

    package: str
    listing: str  # the command that lists the MCP servers
    listed: str  # what that says of ours
    turn: str  # the command that takes one turn
    settings: dict  # files in HOME before the install; MODEL is the URL of the model, WORK the folder
    environment: dict


PROGRAMS = {
    "claude": Program(
        "@anthropic-ai/claude-code",
        "mcp list",
        "bus: .* Connected",
        "-p go --permission-mode default --allowedTools mcp__bus__bus_whoami",
        {".claude/settings.json": '{\n    "cleanupPeriodDays": 20\n}\n'},
        {"ANTHROPIC_BASE_URL": "MODEL", "ANTHROPIC_API_KEY": "dummy", "CLAUDE_CODE_MAX_RETRIES": "0", **LIGHT},
    ),
    "codex": Program(
        "@openai/codex",
        "mcp list",
        "bus .* enabled",
        "exec --skip-git-repo-check --dangerously-bypass-hook-trust go",
        {
            ".codex/config.toml": '# mine\nmodel = "m"\nmodel_provider = "x"\n\n[model_providers.x]\nname = "x"\n'
            'base_url = "MODEL/v1"\nwire_api = "responses"  # the only one\nrequest_max_retries = 0'
        },
        {},
    ),
    "gemini": Program(
        "@google/gemini-cli",
        "mcp list",
        "bus: .* Connected",
        "--approval-mode yolo -m gemini-2.5-pro -p go",
        {
            ".gemini/settings.json": '{\n  // mine\n  "security": {"auth": {"selectedType": "gemini-api-key"}}\n}\n',
            ".gemini/trustedFolders.json": '{"WORK": "TRUST_FOLDER"}',
        },
        {"GEMINI_API_KEY": "dummy", "GOOGLE_GEMINI_BASE_URL": "MODEL"},
    ),
    "qwen": Program(
        "@qwen-code/qwen-code",
        "mcp list",
        "bus: .* Connected",
        "--auth-type openai --approval-mode yolo -p go",
        {".qwen/settings.json": '{\n  // mine\n  "$version": 99\n}\n'},
        {"OPENAI_API_KEY": "dummy", "OPENAI_BASE_URL": "MODEL/v1", "OPENAI_MODEL": "m"},
    ),
    "opencode": Program(
        "opencode-ai",
        "mcp list",
        "bus .*connected",
        "run go",
        {
            ".config/opencode/opencode.jsonc": '{\n  // mine\n  "model": "x/m",\n  "provider": {"x": {"npm": '
            '"@ai-sdk/openai-compatible", "options": {"baseURL": "MODEL/v1", "apiKey": "k"}, "models": {"m": {}}}}\n}\n'
        },
        {"OPENCODE_DISABLE_AUTOUPDATE": "1", "OPENCODE_DISABLE_MODELS_FETCH": "1"},
    ),
    "copilot": Program(
        "@github/copilot",
        "mcp list",
        "bus \\((local|http)\\)",
        "-p go --allow-all-tools",
        {},
        {"COPILOT_OFFLINE": "true", "COPILOT_PROVIDER_BASE_URL": "MODEL/v1", "COPILOT_PROVIDER_TYPE": "openai",
         "COPILOT_PROVIDER_API_KEY": "k", "COPILOT_MODEL": "m"},
    ),
}  # fmt: skip


def binary(name):
    """The path of a program, or None."""
    path = os.path.join(FOLDER or "", "node_modules", ".bin", name)
    return path if FOLDER and os.path.exists(path) else CLAUDE if name == "claude" else None


class Used:
    """One turn of a program between install and uninstall. `name` and `way`: which, and over stdio or HTTP."""

    def __init__(self, name, way, place):
        self.name, self.program, self.called = name, PROGRAMS[name], []
        self.home, self.work = place / "home", place / "work"
        self.work.mkdir(parents=True)
        with Server(place / "bus.db") as bus, ScriptedModel(self.script, DIALECTS) as model:
            if way == "http" and b"/mcp" not in bus.get("/"):
                pytest.skip("this bus has no /mcp")
            self.replaced = {"MODEL": model.url, "WORK": str(self.work)}
            token, peers = invite(bus, "alice"), invite(bus, "peer")
            its = {variable: self.filled(value) for variable, value in self.program.environment.items()}
            own = {"HOME": str(self.home), "AGENT_BUS_STATE_DIR": str(place / "state"), "TERM": "xterm-256color"}
            known = {"AGENT_BUS_URL": bus.url, "AGENT_NAME": "alice", "AGENT_BUS_TOKEN": token}
            self.env = {"PATH": os.environ["PATH"], **own, **OFFLINE, **known, **its}
            for path, text in self.program.settings.items():
                (self.home / path).parent.mkdir(parents=True, exist_ok=True)
                (self.home / path).write_text(self.filled(text))
            self.before = self.files()
            post(bus, "alice", "the text of a message", "peer", peers)
            self.install("install", name, *(["--http"] if way == "http" else []))
            self.installed = self.files()
            assert token not in "".join(self.installed.values())
            self.listing = self.run(self.program.listing) if way == "stdio" else ""
            self.said = self.run(self.program.turn)
            self.after = self.files()
            self.install("uninstall", name)
            self.left = self.files()
            self.heard = [news(request) for request in model.requests]
            assert not model.failures, model.failures[0]

    def filled(self, text):
        return re.sub("MODEL|WORK", lambda word: self.replaced[word[0]], text)

    def files(self):
        """The content of the program's files, by path."""
        paths = [path.replace(os.path.expanduser("~"), str(self.home)) for path in files_of(self.name)]
        paths += [f"{path}c" for path in paths]
        contents = {}
        for path in filter(os.path.exists, paths):
            with open(path, newline="") as file:
                contents[path] = file.read()
        return contents

    def install(self, *arguments):
        command = [sys.executable, str(ROOT / "tools" / "agent_bus.py"), *arguments]
        subprocess.run(command, cwd=self.work, env=self.env, check=True, capture_output=True)

    def run(self, arguments):
        command = [binary(self.name), *arguments.split()]
        done = subprocess.run(command, cwd=self.work, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, timeout=TURN_SECONDS)  # fmt: skip
        assert done.returncode == 0, done.stdout
        return done.stdout

    def script(self, request):
        """Calls our tool once: by its name, or as a program wants it whose tools are deferred."""
        tools = tools_of(request)
        mine = [tool for tool in tools if tool.endswith("bus_whoami")]
        if self.called or not ({*mine} or {"tool_call", "ToolSearch"}.intersection(tools)):
            return [words("done")]
        if not mine and "ToolSearch" in tools:
            return [tool_use("ToolSearch", query="select:mcp__bus__bus_whoami", max_results=1)]
        self.called.append(True)
        if mine:
            return [tool_use(mine[0])]
        return [{**tool_use("tool_call"), "input": {"name": "mcp__bus__bus_whoami", "arguments": {}}}]


@pytest.fixture(scope="module")
def uses():
    """What was tried already, by program and way."""
    return {}


@pytest.fixture
def used(uses, tmp_path):
    def use(name, way="stdio"):
        if not binary(name):
            pytest.skip(f"no {name}: `make agents` installs it, and tries it")
        if (name, way) not in uses:
            uses[name, way] = Used(name, way, tmp_path)
        return uses[name, way]

    return use


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_accepts_what_install_writes(name, used):
    assert re.search(PROGRAMS[name].listed, used(name).listing), used(name).listing


@pytest.mark.parametrize("way", ["stdio", "http"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_call_of_a_tool_comes_back(name, way, used):
    assert any("alice, on channel default" in told for told in used(name, way).heard), used(name, way).said


HOOKED = [name for name in PROGRAMS if bus_agents.AGENTS[name].dress in bus_agents.load_hook().DRESSES]


@pytest.mark.parametrize("name, way", [*((name, "stdio") for name in HOOKED), ("claude", "http")])
def test_its_hook_brings_a_notice(name, way, used):
    assert any("1 unread for alice" in told for told in used(name, way).heard), used(name, way).said


@pytest.mark.parametrize("name", PROGRAMS)
def test_uninstall_leaves_its_files_as_they_were(name, used):
    """A file that the program itself has written meanwhile has lost our entries only."""
    its = used(name)
    for path in {*its.before, *its.left, *its.installed}:
        if its.after.get(path) == its.installed.get(path):
            assert its.left.get(path) == its.before.get(path)
        else:
            form = "toml" if path.endswith("toml") else "jsonc"
            now = bus_edit.without(form, its.after[path], bus_agents.is_ours, its.before.get(path))
            assert its.left[path] == now and "bus_mcp" not in now
