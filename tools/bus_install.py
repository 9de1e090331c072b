#!/usr/bin/env python3
"""Connect an agent program to the bus, or start the bus at login; and take that away again.

    python3 tools/bus_install.py install claude
    python3 tools/bus_install.py install codex --dry-run
    python3 tools/bus_install.py install gemini --http --url http://10.0.0.5:8080 --name alice
    python3 tools/bus_install.py install service --port 8080
    python3 tools/bus_install.py uninstall claude

An agent program gets the MCP server `bus` and, where it has hooks, the hook that tells of waiting mail. AGENTS is the
table of them: which files, and what is written there. What else is in these files stays as it is, with its comments.
What the files were before is kept in the state directory, so `uninstall` leaves every byte as it was; if somebody
changed a file meanwhile, only our entries go. --dry-run shows the difference and changes nothing. With --http the
program needs a URL and a token only; then the server is POST /mcp of the bus, and nothing of ours runs on the
machine.

What is written names this program's own files, so it works in every folder; after you move or remove this program,
install again. No token is written: it is in AGENT_BUS_TOKEN, or in our configuration file.

`service` writes a unit for systemd's user manager, or on macOS an agent for launchd (which nobody has tried yet): the
bus runs whenever this user is logged in. The entry of an agent program also gets the AGENT_BUS_... variables that are
set at the install, except secrets and names. The bus of a service has the options that follow the word, with absolute
paths, and XDG_STATE_HOME; it knows no other variable.
Exit code: 0 done, 1 refused (another's file or entry is in the way), 2 usage.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import hashlib
import importlib
import json
import os
import plistlib
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

# Python 3.8 says this sentence; older ones show the line, as a SyntaxError, because they do not know `:=`.
if sys.version_info < (3, 9) and (needs := "bus_install.py needs Python 3.9 or later"):  # noqa: UP036
    sys.exit(needs)

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path += [HERE, os.path.dirname(HERE)]  # the clients lie beside this file or one folder up, or are installed
import bus_edit  # noqa: E402

import bus_recv  # noqa: E402

SERVER = "bus"  # the name of our MCP server in each agent program
MARK = "Written by `agent-bus install service`; `agent-bus uninstall service` removes it."
PATHS = ("AGENT_BUS_CA", "AGENT_BUS_TOKEN_FILE", "AGENT_BUS_STATE_DIR")
TAKEN_ALONG = [f"AGENT_BUS_{name}" for name in "PROFILE URL CA TOKEN_FILE CHANNEL PLAIN_HTTP STATE_DIR".split()]


class InTheWay(Exception):
    """A file or an entry is not ours; the text says which, and what to do."""


def ours(script: str, *file: str) -> list[str]:
    """The command line of one of our programs: a script that pip has installed, else Python and the file."""
    script = shutil.which(script, path=os.path.dirname(os.path.abspath(sys.argv[0]))) or ""
    return [script] if script else [sys.executable, os.path.join(*file)]


def integrations() -> str:
    """The folder of the integrations, in a clone or installed."""
    above = os.path.dirname(HERE)
    installed = os.path.join(above, "agent_bus_integrations")
    return installed if os.path.isdir(installed) else os.path.join(above, "integrations")


def replace(path: str, content: bytes) -> None:
    """Write a file whole or not at all, with the mode that it has; a new one is for this user alone."""
    path = os.path.realpath(path)  # a link stays a link
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    mode = os.stat(path).st_mode & 0o777 if os.path.exists(path) else 0o600
    with open(os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        os.chmod(f"{path}.new", mode)  # whatever the umask is
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.new", path)


def remove_empty(folder: str) -> None:
    """Remove a folder and those above it, as long as they are empty and below HOME."""
    home = os.path.join(os.path.expanduser("~"), "")
    with contextlib.suppress(OSError):
        while folder.startswith(home):
            os.rmdir(folder)
            folder = os.path.dirname(folder)


def content_of(path: str) -> bytes | None:
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        return file.read()
    return None


# The agent programs


class File(NamedTuple):
    """A configuration file of an agent program: `name` in the folder of `variable` or, without it, in `folder`."""

    variable: str
    folder: str
    name: str
    at: bus_edit.Path  # of what is ours

    def path(self) -> str:
        path = os.path.join(os.path.expanduser(os.environ.get(self.variable) or self.folder), self.name)
        return next(filter(os.path.exists, (path, f"{path}c")), path)  # .jsonc, where there is one

    def form(self) -> str:
        return "toml" if self.name.endswith(".toml") else "json"


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


def plain(command: list[str], variables: dict[str, str]) -> dict[str, Any]:
    return {"command": command[0], "args": command[1:], "env": variables}


def grouped(**more: Any) -> Callable[[str], dict[str, Any]]:
    """A hook as Claude Code writes it."""
    return lambda command: {"hooks": [{"type": "command", "command": command, **more}]}


# Gemini CLI keeps variables with such names from a server, unless its entry names them; empty ones are as good as none.
KEPT_BACK = {"AGENT_BUS_TOKEN": "${AGENT_BUS_TOKEN:-}"}
# Codex gives a server only the variables that its entry names.
FORWARDED = [
    *(f"AGENT_BUS_{name}" for name in "URL TOKEN TOKEN_FILE CA CHANNEL PROFILE STATE_DIR".split()),
    "AGENT_NAME",
]
AGENTS = {
    "claude": Agent(
        "Claude Code",
        File("CLAUDE_CONFIG_DIR", "~", ".claude.json", ("mcpServers", SERVER)),
        lambda command, variables: {"type": "stdio", **plain(command, variables)},
        lambda url, headers: {"type": "http", "url": url, "headers": headers},
        "${{{}}}",
        File("CLAUDE_CONFIG_DIR", "~/.claude", "settings.json", ("hooks",)),
        grouped(timeout=5),
        "claude",
        wake={"FileChanged": {"asyncRewake": True, "timeout": 30}},
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
        File("CODEX_HOME", "~/.codex", "hooks.json", ("hooks",)),
        grouped(timeout=5),
        "codex",
        allow="Codex runs a hook only after you have trusted it: type /hooks in a session",
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


class Change:
    """What one file of an agent program is now, what it is without our entries, and what it shall become."""

    def __init__(self, path: str, form: str, record: dict[str, Any]) -> None:
        self.path, self.form, self.record = path, form, record
        try:
            content = content_of(path)
            self.now = None if content is None else content.decode()
            self.base = self.shall = self.without_ours()
        except (bus_edit.Unreadable, UnicodeDecodeError) as error:
            self.refuse(error)

    def refuse(self, error: Exception) -> NoReturn:
        why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error
        raise InTheWay(f"{self.path} is left as it is, because {why}: correct it first") from None

    def without_ours(self) -> str | None:
        """None: without our entries there is no such file. Unreadable, if it is not what we know."""
        before = self.record.get("before")
        if self.now is None or ("before" in self.record and digest(self.now) == self.record["after"]):
            return before if self.now is not None else None
        left = bus_edit.without(self.form, self.now, is_ours, before)
        emptied = left != self.now and "before" in self.record and is_bare(left) and is_bare(before or "")
        return before if emptied else left

    def add(self, entries: Sequence[tuple[bus_edit.Path, Any]]) -> None:
        try:
            there = bus_edit.paths(self.form, self.shall or "")
            for path, _ in entries:
                if path[-1] == SERVER and path in there:
                    raise InTheWay(
                        f"{self.path} has another server {SERVER}, which is not of agent-bus: rename it first"
                    )
            fresh = [(path, value) for path, value in entries if path not in there]
            self.shall = bus_edit.edited(self.form, self.shall or "", fresh)
        except bus_edit.Unreadable as error:
            self.refuse(error)

    def difference(self) -> str:
        """For a person. Lines that stay are not shown, also if a comma follows now: they may hold secrets."""
        now, shall = ([line.removesuffix(",") for line in (text or "").splitlines()] for text in (self.now, self.shall))
        return "\n".join(difflib.unified_diff(now, shall, self.path, self.path, n=0, lineterm=""))

    def write(self) -> dict[str, Any]:
        """Write the file, or remove it; returns what is to be remembered."""
        made = self.record.get("made") or missing_above(self.path)
        if self.shall is None and self.now is not None:
            os.remove(os.path.realpath(self.path))  # a link stays: it is the user's
        elif self.shall is not None and self.shall != self.now:
            replace(self.path, self.shall.encode())
        return {"before": self.base, "made": made, "after": digest(self.shall or "")}


def is_bare(text: str) -> bool:
    """Is there nothing in this JSON but, maybe, the version that some programs ask for?"""
    return not re.sub(r'"version"\s*:\s*1', "", text).strip(" \t\r\n{}")


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def missing_above(path: str) -> list[str]:
    """The folders that will be made for this file, the lowest first."""
    missing = []
    while not os.path.isdir(path := os.path.dirname(path)):
        missing.append(path)
    return missing


def write_all(files: dict[str, Change]) -> dict[str, Any]:
    """Write the files, and remove the folders that an install has made if nothing is in them; what to remember."""
    records = {path: change.write() for path, change in files.items()}
    gone = [change for change in files.values() if change.shall is None]
    made = {folder for change in gone for folder in change.record.get("made", [])}
    for folder in sorted(made, key=len, reverse=True):
        with contextlib.suppress(OSError):  # one that is not empty is in use
            os.rmdir(folder)
    return records


def record_file(name: str) -> str:
    """Where the files of an agent program are kept as they were before the install, and the digests of those after."""
    return os.path.join(bus_recv.state_directory(), "installed", f"{name}.json")


def changes(name: str) -> dict[str, Change]:
    """The files of an agent program, by path."""
    agent, kept = AGENTS[name], {}
    with contextlib.suppress(ValueError):  # a damaged record is none
        kept = dict(json.loads(content_of(record_file(name)) or b"{}"))
    files = [file for file in (agent.servers, agent.hooks) if file]
    return {path: Change(path, file.form(), kept.get(path, {})) for file in files for path in [file.path()]}


def install_agent(name: str, options: argparse.Namespace) -> int:
    agent, files = AGENTS[name], changes(name)
    entries = [(agent.servers, [(agent.servers.at, server(agent, options))])]
    if agent.hooks and (hooks := hooks_of(agent, options)):
        entries.append((agent.hooks, [*agent.skeleton, *hooks]))
    for file, added in entries:
        files[file.path()].add(added)
    if options.dry_run:
        return show(files)
    already = " already" * all(change.now == change.shall for change in files.values())
    ours_in = list(dict.fromkeys(file.path() for file, _ in entries))
    records = write_all(files)
    keep(name, {path: records[path] for path in ours_in})
    tell(f"{agent.title} has the tools of the bus{already}, from its next start on: {' and '.join(ours_in)}")
    for line in advice(name, options, hooked=len(entries) > 1):
        tell(line)
    return 0


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


def advice(name: str, options: argparse.Namespace, hooked: bool) -> list[str]:
    """What the user must know, or still has to do."""
    agent, lines = AGENTS[name], []
    if name == "claude" and (plugin := plugin_folder()):
        lines.append(
            f"to hear mail between turns too, use the plugin instead: claude --plugin-dir {shlex.quote(plugin)}"
        )
    if options.http and token_of(options):
        file = bus_recv.configuration()[0]
        lines.append(
            f"{agent.title} takes the token from its environment; before you start it: set -a; . {shlex.quote(file)}"
        )
    elif not options.http and os.environ.get("AGENT_BUS_TOKEN"):
        lines.append(
            "AGENT_BUS_TOKEN is not written there: put the token into our configuration file, or AGENT_BUS_TOKEN_FILE"
        )
    if agent.allow:
        lines.append(agent.allow)
    if not hooked:
        lines.append(f"{agent.title} has no hook of ours: it hears of mail when it calls bus_inbox")
    return lines


def uninstall_agent(name: str, options: argparse.Namespace) -> int:
    files = changes(name)
    mine = {path: change for path, change in files.items() if change.now != change.shall}
    if not mine:
        raise InTheWay(f"there is nothing of agent-bus in {' and '.join(files)}: nothing is changed")
    if options.dry_run:
        return show(mine)
    write_all(mine)
    keep(name, {})
    tell(f"the entries of agent-bus are removed from {' and '.join(mine)}")
    return 0


def show(files: dict[str, Change]) -> int:
    for change in files.values():
        bus_recv.emit("".join(f"{bus_recv.visible(line)}\n" for line in change.difference().split("\n") if line))
    return 0


def keep(name: str, files: dict[str, Any]) -> None:
    """Remember what the files were, or forget it."""
    path = record_file(name)
    if files:
        replace(path, json.dumps(files).encode())
        return
    with contextlib.suppress(OSError):
        os.remove(path)
        remove_empty(os.path.dirname(path))


def taken_along() -> dict[str, str]:
    """The settings that are set at the install, for a program that runs in any folder."""
    given = {name: os.environ[name] for name in TAKEN_ALONG if os.environ.get(name)}
    return {name: os.path.abspath(value) if name in PATHS else value for name, value in given.items()}


def plugin_folder() -> str | None:
    """The folder of our plugin, if it is here: the clone, or what pip has put beside the programs."""
    schemes = [scheme for scheme in ("", f"{os.name}_user") if not scheme or scheme in sysconfig.get_scheme_names()]
    data = [sysconfig.get_path("data", scheme) if scheme else sysconfig.get_path("data") for scheme in schemes]
    places = [os.path.dirname(HERE), *(os.path.join(place, "share", "agent-bus") for place in data)]
    return next((place for place in places if os.path.isdir(os.path.join(place, ".claude-plugin"))), None)


# The service


def service_file() -> str:
    if sys.platform == "darwin":
        return os.path.expanduser("~/Library/LaunchAgents/agent-bus.plist")
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.join(config, "systemd", "user", "agent-bus.service")


def install_service(options: Sequence[str]) -> int:
    import bus_server

    bus_server.command_line(options)  # it ends here, with its own words, if one of them is wrong
    check_service()
    path, command = service_file(), [*ours("agent-bus", HERE, "agent_bus.py"), "serve", *absolute(options)]
    state = os.environ.get("XDG_STATE_HOME", "")  # where the database is
    state = state and os.path.abspath(state)
    replace(path, (launchd if sys.platform == "darwin" else systemd)(command, state))
    tell(f"wrote {path}: with it, the bus starts when you log in")
    if sum(not manage(step) for step in STEPS[sys.platform == "darwin"]["install"]):  # each, for the user sees its line
        complain("the file is written, but the bus does not run yet")
        return 1
    for line in AFTERWARDS[sys.platform == "darwin"]:
        tell(line.replace("FILE", shlex.quote(path)))
    tell(f"to take it away: {bus_recv.called('python3 tools/agent_bus.py uninstall', 'uninstall')} service")
    return 0


OF_PATHS = ("--db", "--tls-cert", "--tls-key", "--schemas", "--listen")


def absolute(options: Sequence[str]) -> list[str]:
    """The options of a bus, with absolute paths: a service runs in another folder. An option may be shortened."""
    words, option = [], ""
    for word in options:
        name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        option = name or option
        if value and any(each.startswith(option) for each in OF_PATHS):
            scheme = "unix:" if option.startswith("--l") else ""
            value = scheme + os.path.abspath(value[len(scheme) :])
        words.append(f"{name}{equals}{value}")
    return words


def uninstall_service() -> int:
    path = service_file()
    if content_of(path) is None:
        raise InTheWay(f"there is no {path}: nothing is changed")
    check_service()
    steps = STEPS[sys.platform == "darwin"]["uninstall"]
    manage(steps[0])
    os.remove(path)
    remove_empty(os.path.dirname(path))
    for step in steps[1:]:
        manage(step)
    tell(f"removed {path}, and stopped the bus that it started; the messages stay where they are")
    return 0


def check_service() -> None:
    """InTheWay, if there is a file that we did not write."""
    content = content_of(service_file())
    if content is not None and MARK.encode() not in content:
        raise InTheWay(f"{service_file()} was not written by agent-bus: move it away first")


def systemd(command: Sequence[str], state: str) -> bytes:
    variable = f"Environment={quoted(f'XDG_STATE_HOME={state}', '$')}\n" if state else ""
    return f"""\
# {MARK}
[Unit]
Description=agent-bus, a message bus for coding agents

[Service]
ExecStart={" ".join(map(quoted, command))}
{variable}Restart=on-failure
RestartSec=2
TimeoutStopSec=20
UMask=0077

[Install]
WantedBy=default.target
""".encode()


def quoted(argument: str, dollar: str = "$$") -> str:
    """An argument as systemd reads it: % has a meaning there, and $ in a command, also in quotes."""
    text = argument.replace("%", "%%").replace("$", dollar)
    return text if re.fullmatch(r"[\w@%+=:,./$-]+", text) else '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def launchd(command: Sequence[str], state: str) -> bytes:
    """Nobody has tried this yet."""
    job: dict[str, Any] = {"Label": "agent-bus", "Comment": MARK, "ProgramArguments": list(command), "RunAtLoad": True}
    job["KeepAlive"] = {"SuccessfulExit": False}
    return plistlib.dumps({**job, **({"EnvironmentVariables": {"XDG_STATE_HOME": state}} if state else {})})


STEPS: dict[bool, dict[str, list[list[str]]]] = {  # by: is this macOS?
    False: {
        "install": [["systemctl", "--user", "daemon-reload"], ["systemctl", "--user", "enable", "--now", "agent-bus"]],
        "uninstall": [
            ["systemctl", "--user", "disable", "--now", "agent-bus"],
            ["systemctl", "--user", "daemon-reload"],
        ],
    },
    True: {"install": [["launchctl", "load", "-w", "FILE"]], "uninstall": [["launchctl", "unload", "-w", "FILE"]]},
}


AFTERWARDS = {  # what the user wants to know once it runs
    False: [
        "the bus runs now; its state: systemctl --user status agent-bus",
        "its log: journalctl --user -u agent-bus -f",
        "to stop it and start it: systemctl --user stop agent-bus, systemctl --user start agent-bus",
        "to keep it when you log out: loginctl enable-linger",
    ],
    True: [
        "the bus runs now; its state: launchctl list agent-bus",
        "to stop it and start it: launchctl unload FILE, launchctl load FILE",
    ],
}


def manage(step: Sequence[str]) -> bool:
    """Tell the manager of services; if it does not take it, tell the user the line. Did it work?"""
    command = [service_file() if word == "FILE" else word for word in step]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        why = done.stderr.strip().split("\n")[-1] if done.returncode else ""
    except OSError as error:
        why = f"{command[0]}: {error.strerror}"
    if why:
        complain(f"this did not work, run it yourself: {shlex.join(command)} ({why})")
    return not why


# The program


def tell(line: str) -> None:
    bus_recv.emit(f"{bus_recv.visible(line)}\n")


def complain(line: str) -> None:
    bus_recv.complain(line, "bus_install")


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Connect an agent program to the bus, or start the bus at login.")
    commands = parser.add_subparsers(dest="command", required=True)
    own = parser.prog if " " in parser.prog else None  # `agent-bus install` is a whole name
    after = "What follows `install service` are the options of the bus."
    for word, purpose in (("install", "add it"), ("uninstall", "take it away again")):
        installs = word == "install"
        command = commands.add_parser(word, prog=own, help=purpose, allow_abbrev=False, epilog=after * installs)
        choices = ",".join([*AGENTS, "service"])
        command.add_argument("agent", metavar=f"{{{choices}}}", help="an agent program, or the bus itself, at login")
        command.add_argument("--bus", type=bus_recv.profile, metavar="PROFILE", help="the bus of PROFILE.env")
        command.add_argument("--dry-run", action="store_true", help="show what would change, and change nothing")
        if installs:
            command.add_argument(
                "--http", action="store_true", help="by URL and token only: nothing of ours runs there"
            )
            command.add_argument("--url", help="the bus, if it is not that of the configuration")
            command.add_argument("--name", help="the agent's name on the bus, in every folder")
    return parser


def run(options: argparse.Namespace, further: Sequence[str]) -> int:
    installs = options.command == "install"
    if options.agent == "service":
        return install_service(further) if installs else uninstall_service()
    if options.agent in AGENTS:
        if installs and options.name:
            bus_recv.check_name(options.name)
        return install_agent(options.agent, options) if installs else uninstall_agent(options.agent, options)
    known = ", ".join([*AGENTS, "service"])
    complain(f"{options.agent!r} is not known, only {known}: another agent can run the MCP server, agent-bus-mcp")
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line()
    options, further = parser.parse_known_args(argv)
    if further and (options.agent != "service" or options.command != "install"):
        parser.error(f"unrecognized arguments: {' '.join(further)}")
    if options.agent == "service" and [
        given for given in ("dry_run", "http", "url", "name") if getattr(options, given, 0)
    ]:
        parser.error("--dry-run, --http, --url and --name are for an agent program")
    try:
        return run(options, further)
    except InTheWay as error:
        complain(str(error))
        return 1
    except (ValueError, OSError) as error:
        complain(f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error))
        return 2


if __name__ == "__main__":
    sys.exit(main())
