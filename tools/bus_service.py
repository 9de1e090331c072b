"""The bus as a service of this user, for bus_install.py: it runs whenever the user is logged in."""

from __future__ import annotations

import os
import plistlib
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from bus_agents import HERE, ours
from bus_change import InTheWay, complain, content_of, remove_empty, replace, show, tell

import bus_recv

MARK = "Written by `agent-bus install service`; `agent-bus uninstall service` removes it."


def service_file() -> str:
    if sys.platform == "darwin":
        return os.path.expanduser("~/Library/LaunchAgents/agent-bus.plist")
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.join(config, "systemd", "user", "agent-bus.service")


def install_service(options: Sequence[str], dry_run: bool) -> int:
    import bus_server

    bus_server.command_line(options)  # it ends here, with its own words, if one of them is wrong
    check_service()
    path, command = service_file(), [*ours("agent-bus", HERE, "agent_bus.py"), "serve", *absolute(options)]
    state = os.environ.get("XDG_STATE_HOME", "")  # where the database is
    state = state and os.path.abspath(state)
    unit = (launchd if sys.platform == "darwin" else systemd)(command, state)
    if dry_run:
        show(path, (content_of(path) or b"").decode(), unit.decode())
        return 0
    replace(path, unit)
    tell(f"wrote {path}: with it, the bus starts when you log in")
    if sum(not manage(step) for step in STEPS[sys.platform == "darwin"]["install"]):  # each, for the user sees its line
        serve = " ".join([bus_recv.called("bus_server.py", "serve"), *map(shlex.quote, options)])
        complain(f"the file is written, but the bus does not run yet; to run it without a manager of services: {serve}")
        return 1
    for line in AFTERWARDS[sys.platform == "darwin"]:
        tell(line.replace("FILE", shlex.quote(path)))
    tell(f"to take it away: {bus_recv.called('agent_bus.py uninstall', 'uninstall')} service")
    return 0


OF_PATHS = ("--db", "--tls-cert", "--tls-key", "--schemas", "--listen", "--notify", "--files-dir")


def absolute(options: Sequence[str]) -> list[str]:
    """The options of a bus, with absolute paths: a service runs in another folder. An option may be shortened."""
    words, option = [], ""
    for word in options:
        name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        option = name or option
        if value and option != "--files" and any(each.startswith(option) for each in OF_PATHS):  # that one is a size
            scheme = "unix:" if option.startswith("--l") else ""
            value = scheme + os.path.abspath(value[len(scheme) :])
        words.append(f"{name}{equals}{value}")
    return words


def uninstall_service(dry_run: bool) -> int:
    path = service_file()
    if content_of(path) is None:
        raise InTheWay(f"there is no {path}: nothing is changed")
    check_service()
    if dry_run:
        show(path, (content_of(path) or b"").decode(), None)
        return 0
    steps = STEPS[sys.platform == "darwin"]["uninstall"]
    stopped = manage(steps[0])
    os.remove(path)
    remove_empty(os.path.dirname(path))
    for step in steps[1:]:
        manage(step)
    its_bus = "and stopped the bus that it started" if stopped else "but if the bus that it started runs, it still does"
    tell(f"removed {path}, {its_bus}; the messages stay where they are")
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
    why = f"{why}: that bus is D-Bus, and no systemd of this user answers there" if "connect to bus" in why else why
    if why:
        complain(f"this did not work, run it yourself: {shlex.join(command)} ({why})")
    return not why
