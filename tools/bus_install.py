#!/usr/bin/env python3
"""Connect an agent program to the bus, or start the bus at login; and take that away again.

    python3 tools/bus_install.py install claude
    python3 tools/bus_install.py install service --port 8080
    python3 tools/bus_install.py uninstall claude

Each install says which file it writes, and uninstall leaves that file as it was. What it writes names this program's
own files, so it works in every folder; after you move or remove this program, install again.

`claude` adds the MCP server `bus` to the user's ~/.claude.json: every session of Claude Code has the tools of the bus.
`service` writes a unit for systemd's user manager, or on macOS an agent for launchd (which nobody has tried yet): the
bus runs whenever this user is logged in. Both take the AGENT_BUS_... variables of now along, except secrets and names.
The bus of a service has the options that follow the word.
Exit code: 0 done, 1 refused (another's file or entry is in the way), 2 usage.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
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
from typing import Any

# Python 3.8 says this sentence; older ones show the line, as a SyntaxError, because they do not know `:=`.
if sys.version_info < (3, 9) and (needs := "bus_install.py needs Python 3.9 or later"):  # noqa: UP036
    sys.exit(needs)

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path += [HERE, os.path.dirname(HERE)]  # the clients lie beside this file or one folder up, or are installed
import bus_recv  # noqa: E402

SERVER = "bus"  # the name of our MCP server in Claude Code
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


# Claude Code


def claude_file() -> str:
    return os.path.join(os.environ.get("CLAUDE_CONFIG_DIR") or os.path.expanduser("~"), ".claude.json")


def before_file() -> str:
    """Where the content of Claude Code's file from before the install is kept, and the digest of that after it."""
    return os.path.join(bus_recv.state_directory(), "installed", "claude.json")


def settings_in(content: bytes | None) -> dict[str, Any]:
    try:
        settings = json.loads(content or b"{}")
        if isinstance(settings, dict) and isinstance(settings.get("mcpServers", {}), dict):
            return settings
    except ValueError:
        pass
    raise InTheWay(f"{claude_file()} is not a file of settings as Claude Code writes them: correct it first")


def is_ours(entry: Any) -> bool:
    return bool(re.search(r"agent-bus-mcp|bus_mcp\.py", json.dumps(entry)))


def install_claude(options: Sequence[str]) -> int:
    path = claude_file()
    if SERVER in settings_in(content_of(path)).get("mcpServers", {}):
        remove_from_claude()  # ours, of an earlier install, or InTheWay
    before = content_of(path)
    settings = settings_in(before)
    command, *arguments = ours("agent-bus-mcp", integrations(), "claude_code", "bus_mcp.py")
    entry = {"type": "stdio", "command": command, "args": arguments, "env": taken_along()}
    settings.setdefault("mcpServers", {})[SERVER] = entry
    after = written(settings)
    kept = {"before": before.decode() if before is not None else None, "after": hashlib.sha256(after).hexdigest()}
    replace(before_file(), json.dumps(kept).encode())
    replace(path, after)
    tell(f"from its next start on, Claude Code has the tools of the bus in every folder: server {SERVER} in {path}")
    if plugin := plugin_folder():
        tell(f"to hear mail at once, use the plugin instead: claude --plugin-dir {shlex.quote(plugin)}")
    if os.environ.get("AGENT_BUS_TOKEN"):
        complain(
            "the token in AGENT_BUS_TOKEN is not written there: put it into a file that AGENT_BUS_TOKEN_FILE names"
        )
    return 0


def uninstall_claude() -> None:
    if SERVER not in settings_in(content_of(claude_file())).get("mcpServers", {}):
        raise InTheWay(f"there is no server {SERVER} in {claude_file()}: nothing is changed")
    remove_from_claude()
    tell(f"server {SERVER} is removed from {claude_file()}")


def remove_from_claude() -> None:
    """The file gets the content that it had, if nobody changed it since the install; else only our entry goes."""
    path = claude_file()
    content = content_of(path) or b""
    settings = settings_in(content)
    if not is_ours(settings["mcpServers"].pop(SERVER)):
        raise InTheWay(f"server {SERVER} in {path} is not of agent-bus: claude mcp remove --scope user {SERVER}")
    if not settings["mcpServers"]:
        del settings["mcpServers"]
    kept = json.loads(content_of(before_file()) or b"{}")
    if hashlib.sha256(content).hexdigest() != kept.get("after"):
        replace(path, written(settings))
    elif kept["before"] is None:
        os.remove(path)
    else:
        replace(path, kept["before"].encode())
    with contextlib.suppress(OSError):
        os.remove(before_file())
        remove_empty(os.path.dirname(before_file()))


def written(settings: dict[str, Any]) -> bytes:
    """As Claude Code writes it."""
    return json.dumps(settings, indent=2, ensure_ascii=False).encode()


def taken_along() -> dict[str, str]:
    """These settings of now, for a program that runs in any folder."""
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
    path, command = service_file(), [*ours("agent-bus", HERE, "agent_bus.py"), "serve", *options]
    state = os.environ.get("XDG_STATE_HOME", "")  # where the database is
    replace(path, (launchd if sys.platform == "darwin" else systemd)(command, state))
    tell(f"wrote {path}: with it, the bus starts when you log in")
    if sum(not manage(step) for step in STEPS[sys.platform == "darwin"]["install"]):  # each, for the user sees its line
        complain("the file is written, but the bus does not run yet")
        return 1
    for line in AFTERWARDS[sys.platform == "darwin"]:
        tell(line.replace("FILE", shlex.quote(path)))
    tell(f"to take it away: {bus_recv.called('python3 tools/agent_bus.py uninstall', 'uninstall')} service")
    return 0


def uninstall_service() -> None:
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


def check_service() -> None:
    """InTheWay, if there is a file that we did not write."""
    content = content_of(service_file())
    if content is not None and MARK.encode() not in content:
        raise InTheWay(f"{service_file()} was not written by agent-bus: move it away first")


def systemd(command: Sequence[str], state: str) -> bytes:
    variable = f"Environment={quoted(f'XDG_STATE_HOME={state}')}\n" if state else ""
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


def quoted(argument: str) -> str:
    """An argument as systemd reads it: $ and % have a meaning there, also in quotes."""
    text = argument.replace("%", "%%").replace("$", "$$")
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

AGENTS: dict[str, tuple[Callable[[Sequence[str]], int], Callable[[], None]]] = {
    "claude": (install_claude, uninstall_claude),
    "service": (install_service, uninstall_service),
}


def tell(line: str) -> None:
    bus_recv.emit(f"{bus_recv.visible(line)}\n")


def complain(line: str) -> None:
    bus_recv.complain(line, "bus_install")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Connect an agent program to the bus, or start the bus at login.")
    commands = parser.add_subparsers(dest="command", required=True)
    own = parser.prog if " " in parser.prog else None  # `agent-bus install` is a whole name
    for word, purpose in (("install", "add it"), ("uninstall", "take it away again")):
        command = commands.add_parser(word, prog=own, help=purpose)
        command.add_argument("agent", metavar="{claude,service}", help="Claude Code, or the bus itself, at login")
        command.add_argument("--bus", type=bus_recv.profile, metavar="PROFILE", help="the bus of PROFILE.env")
        if word == "install":
            command.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="service: options of the bus")
    options = parser.parse_args(argv)
    if options.agent not in AGENTS:
        known = " and ".join(AGENTS)
        complain(f"{options.agent!r} is not known, only {known}: another agent can run the MCP server, agent-bus-mcp")
        return 2
    if options.agent != "service" and getattr(options, "options", None):
        parser.error(f"unrecognized arguments: {' '.join(options.options)}")
    install, uninstall = AGENTS[options.agent]
    try:
        if options.command == "install":
            return install(options.options)
        uninstall()
    except InTheWay as error:
        complain(str(error))
        return 1
    except (ValueError, OSError) as error:
        complain(f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
