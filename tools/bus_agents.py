"""The agent programs that bus_install.py knows: where their settings are, and what is written there for each.

AGENTS is the table of them. An entry names this program's own files, and takes along the variables that are set now.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import bus_edit

import bus_recv

SERVER = "bus"  # the name of our MCP server in each agent program
PATHS = ("AGENT_BUS_CA", "AGENT_BUS_TOKEN_FILE", "AGENT_BUS_STATE_DIR")
TAKEN_ALONG = [f"AGENT_BUS_{name}" for name in "PROFILE URL CA TOKEN_FILE CHANNEL PLAIN_HTTP STATE_DIR".split()]
HERE = os.path.dirname(os.path.realpath(__file__))


def ours(script: str, *file: str) -> list[str]:
    """The command line of one of our programs: a script that pip has installed, else Python and the file."""
    script = shutil.which(script, path=os.path.dirname(os.path.abspath(sys.argv[0]))) or ""
    return [script] if script else [sys.executable, os.path.join(*file)]


def integrations() -> str:
    """The folder of the integrations, in a clone or installed."""
    above = os.path.dirname(HERE)
    installed = os.path.join(above, "agent_bus_integrations")
    return installed if os.path.isdir(installed) else os.path.join(above, "integrations")


class File(NamedTuple):
    """A configuration file of an agent program: `name` in the folder of `variable` or, without it, in `folder`."""

    variable: str
    folder: str
    name: str
    at: bus_edit.Path  # of what is ours
    strict: bool = False  # the program reads JSON only: no comments, and no comma before a closing bracket

    def path(self) -> str:
        path = os.path.join(os.path.expanduser(os.environ.get(self.variable) or self.folder), self.name)
        return next(filter(os.path.exists, (path, f"{path}c")), path)  # .jsonc, where there is one

    def form(self) -> str:
        return "toml" if self.name.endswith(".toml") else "json" if self.strict else "jsonc"


class Agent(NamedTuple):
    """A row of AGENTS: what an agent program is called, where its settings are, and how it writes them."""

    title: str
    servers: File
    local: Callable[[list[str], dict[str, str]], dict[str, Any]]  # the entry of a command and its variables
    remote: Callable[[str, dict[str, str]], dict[str, Any]]  # the entry of a URL and its headers
    variable: str  # how a header names the variable of the environment {}
    hooks: File | None = None
    hook: Callable[[str], dict[str, Any]] = lambda command: {"command": command}  # the entry of a command
    dress: str = ""  # the format of its hooks, for bus_hook.py
    wake: dict[str, dict[str, Any]] = {}  # by event: its hook that wakes an idle session, without its command
    names_event: bool = True  # does it tell a hook which event it is?
    skeleton: tuple[tuple[bus_edit.Path, Any], ...] = ()  # what its file of hooks cannot be without
    allow: str = ""  # what the user still has to do
    allow_hook: str = ""  # and for the hook
    removes: str = ""  # its own command that removes a server with our name


def plain(command: list[str], variables: dict[str, str]) -> dict[str, Any]:
    return {"command": command[0], "args": command[1:], "env": variables}


def grouped(**more: Any) -> Callable[[str], dict[str, Any]]:
    """A hook as Claude Code writes it."""
    return lambda command: {"hooks": [{"type": "command", "command": command, **more}]}


# Gemini CLI keeps variables with such names from a server, unless its entry names them; empty ones are as good as none.
KEPT_BACK = {"AGENT_BUS_TOKEN": "${AGENT_BUS_TOKEN:-}"}
# Codex gives a server only the variables that its entry names.
FORWARDED = [*TAKEN_ALONG, "AGENT_BUS_TOKEN", "AGENT_BUS_UA", "AGENT_BUS_OUTBOX", "AGENT_NAME"]
AGENTS = {
    "claude": Agent(
        "Claude Code",
        File("CLAUDE_CONFIG_DIR", "~", ".claude.json", ("mcpServers", SERVER), strict=True),
        lambda command, variables: {"type": "stdio", **plain(command, variables)},
        lambda url, headers: {"type": "http", "url": url, "headers": headers},
        "${{{}}}",
        File("CLAUDE_CONFIG_DIR", "~/.claude", "settings.json", ("hooks",), strict=True),
        grouped(timeout=5),
        "claude",
        wake={"FileChanged": {"asyncRewake": True, "timeout": 30}},
        removes=f"claude mcp remove {SERVER} -s user",
    ),
    "codex": Agent(
        "Codex",
        File("CODEX_HOME", "~/.codex", "config.toml", ("mcp_servers", SERVER)),
        lambda command, variables: {
            **plain(command, variables),
            "env_vars": [name for name in FORWARDED if name not in variables],
        },
        lambda url, headers: {"url": url, **codex_headers(headers)},
        "{}",
        File("CODEX_HOME", "~/.codex", "hooks.json", ("hooks",), strict=True),
        grouped(timeout=5),
        "codex",
        allow_hook="Codex runs a hook only after you have trusted it: type /hooks in a session",
        removes=f"codex mcp remove {SERVER}",
    ),
    "gemini": Agent(
        "Gemini CLI",
        File("", "~/.gemini", "settings.json", ("mcpServers", SERVER)),
        lambda command, variables: plain(command, {**variables, **KEPT_BACK}),
        lambda url, headers: {"httpUrl": url, "headers": headers},
        "${{{}}}",
        File("", "~/.gemini", "settings.json", ("hooks",)),
        grouped(timeout=5000),
        "gemini",
        allow="Gemini CLI starts no server in a folder that you have not trusted: type /permissions in a session",
    ),
    "qwen": Agent(
        "Qwen Code",
        File("", "~/.qwen", "settings.json", ("mcpServers", SERVER)),
        plain,
        lambda url, headers: {"httpUrl": url, "headers": headers},
        "${{{}}}",
        File("", "~/.qwen", "settings.json", ("hooks",)),
        grouped(),
        "qwen",
    ),
    "opencode": Agent(
        "OpenCode",
        File("XDG_CONFIG_HOME", "~/.config", "opencode/opencode.json", ("mcp", SERVER)),
        lambda command, variables: {"type": "local", "command": command, "environment": variables, "enabled": True},
        lambda url, headers: {"type": "remote", "url": url, "headers": headers, "enabled": True},
        "{{env:{}}}",
    ),
    "copilot": Agent(
        "Copilot CLI",
        File("COPILOT_HOME", "~/.copilot", "mcp-config.json", ("mcpServers", SERVER)),
        lambda command, variables: {"type": "local", **plain(command, variables), "tools": ["*"]},
        lambda url, headers: {"type": "http", "url": url, "headers": headers, "tools": ["*"]},
        "${{{}}}",
        File("COPILOT_HOME", "~/.copilot", "hooks/agent-bus.json", ("hooks",)),
        lambda command: {"type": "command", "bash": command, "timeoutSec": 10},
        "copilot",
        names_event=False,
        skeleton=((("version",), 1),),
    ),
    "cursor": Agent(
        "Cursor",
        File("", "~/.cursor", "mcp.json", ("mcpServers", SERVER)),
        plain,
        lambda url, headers: {"url": url, "headers": headers},
        "${{env:{}}}",
        File("", "~/.cursor", "hooks.json", ("hooks",)),
        dress="cursor",
        skeleton=((("version",), 1),),
    ),
    "amp": Agent(
        "Amp",
        File("XDG_CONFIG_HOME", "~/.config", "amp/settings.json", ("amp.mcpServers", SERVER)),
        plain,
        lambda url, headers: {"url": url, "headers": headers},
        "${{{}}}",
    ),
}


def codex_headers(headers: dict[str, str]) -> dict[str, Any]:
    """Codex has a key of its own for a token that is in the environment."""
    bearer = headers.pop("Authorization", "").rpartition(" ")[2]
    return {**({"bearer_token_env_var": bearer} if bearer else {}), **({"http_headers": headers} if headers else {})}


OUR_SERVER = re.compile(r"agent-bus-mcp|bus_mcp\.py|X-Agent-Name|AGENT_BUS_TOKEN")
OUR_HOOK = re.compile(r'(agent-bus-hook|bus_hook\.py)\b.* --(format|wake)\b|"tool": "bus_hook"')


def is_ours(path: bus_edit.Path, value: Any) -> bool:
    """Is this a server or a hook of ours? In TOML the value is the text of a table."""
    if path in {agent.servers.at for agent in AGENTS.values()}:
        return bool(OUR_SERVER.search(json.dumps(value)))
    is_hook = path[:1] == ("hooks",) and isinstance(value, dict) and isinstance(path[-1], int) and "hooks" not in value
    return is_hook and bool(OUR_HOOK.search(json.dumps(value)))


def server(agent: Agent, options: argparse.Namespace) -> dict[str, Any]:
    """The entry of our MCP server. ValueError, if the bus would not know who the agent is."""
    if not options.http:
        return agent.local(ours("agent-bus-mcp", integrations(), "claude_code", "bus_mcp.py"), variables(options))
    given = bus_recv.settings(options.url)
    name, headers = options.name or given.get("AGENT_NAME"), {}
    if not given["AGENT_BUS_URL"].startswith(("http://", "https://")):
        raise ValueError(f"--http is for a bus at http:// or https://, not {given['AGENT_BUS_URL']}: leave it out")
    if "," in given["AGENT_BUS_URL"]:
        raise ValueError(f"--http takes one URL, and these are several: {given['AGENT_BUS_URL']}: add --url URL")
    if token_of(options):
        headers["Authorization"] = "Bearer " + agent.variable.format("AGENT_BUS_TOKEN")
    if name:
        headers["X-Agent-Name"] = name
    if not headers:
        raise ValueError("with --http the bus knows the agent by its token or its name: add --name NAME")
    if channel := given.get("AGENT_BUS_CHANNEL"):
        headers["X-Agent-Channel"] = channel
    return agent.remote(f"{given['AGENT_BUS_URL'].rstrip('/')}/mcp", headers)


def token_of(options: argparse.Namespace) -> bool:
    given = bus_recv.settings(options.url)
    return bool(given.get("AGENT_BUS_TOKEN") or given.get("AGENT_BUS_TOKEN_FILE"))


def variables(options: argparse.Namespace) -> dict[str, str]:
    """Those that are set at the install, and what the options say."""
    own = {"AGENT_BUS_URL": options.url, "AGENT_NAME": options.name}
    return {**taken_along(), **{name: value for name, value in own.items() if value}}


def hooks_of(agent: Agent, options: argparse.Namespace) -> list[tuple[bus_edit.Path, Any]]:
    """Our hook at each event that bus_hook.py knows of this program. With --http only Claude Code can have one."""
    dresses = load_hook().DRESSES
    if options.http:
        events = MCP_EVENTS if agent.dress == "claude" else ()
        return [(("hooks", event, bus_edit.ITEM), {"hooks": [mcp_hook(event)]}) for event in events]
    command = ours("agent-bus-hook", integrations(), "claude_code", "bus_hook.py")
    command[1:1] = ["-IS"] * (len(command) - 1)  # Python starts faster so
    settings = [f"{name}={shlex.quote(value)}" for name, value in variables(options).items()]
    entries = []
    for event in dresses.get(agent.dress, ()):
        form = ["--format", agent.dress, *([] if agent.names_event else ["--event", event])]
        # A hook that ends with 2 would hold up the turn, and Python does when its file is gone.
        line = " ".join([*settings, shlex.join([*command, *form]), "|| true"])
        entries.append((("hooks", event, bus_edit.ITEM), agent.hook(line)))
    for event, members in agent.wake.items():  # here 2 has a meaning
        line = (
            f"[ -f {shlex.quote(command[-1])} ] || exit 0; exec env {' '.join([*settings, shlex.join(command)])} --wake"
        )
        entries.append((("hooks", event, bus_edit.ITEM), grouped(**members)(line)))
    return entries


MCP_EVENTS = ("UserPromptSubmit", "PostToolBatch", "Stop")  # when a session starts, the server is not connected yet


def mcp_hook(event: str) -> dict[str, Any]:
    """A hook of Claude Code that calls a tool of our server, so no program is needed."""
    members = {"session": "session_id", "agent": "agent_id", "title": "session_title", "active": "stop_hook_active"}
    given = {"event": event, **{name: f"${{{of}}}" for name, of in members.items()}}
    return {"type": "mcp_tool", "server": SERVER, "tool": "bus_hook", "input": given}


def load_hook() -> Any:
    folder = os.path.join(integrations(), "claude_code")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("bus_hook")


def taken_along() -> dict[str, str]:
    """The settings that are set at the install, for a program that runs in any folder."""
    given = {name: os.environ[name] for name in TAKEN_ALONG if os.environ.get(name)}
    return {name: os.path.abspath(value) if name in PATHS else value for name, value in given.items()}
