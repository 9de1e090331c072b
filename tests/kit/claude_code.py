"""The real Claude Code in a test: where it is, its settings, and a session of it that a scripted model answers."""
import contextlib
import fcntl
import json
import os
import pathlib
import pty
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading

import pytest

from tests.kit.processes import PATIENCE, ROOT, wait_until
from tests.kit.scripted_model import news, tool_use, words

CACHE = pathlib.Path.home() / ".cache" / "agent-bus-claude"  # of .ci/run


def program(variable, cached, name=None):
    """The program that the variable names, or that is on PATH, or that .ci/run has put into its cache; or None."""
    return os.environ.get(variable) or (name and shutil.which(name)) or shutil.which(str(CACHE / cached))


CLAUDE = program("CLAUDE_BINARY", "node_modules/.bin/claude", "claude")


def version(binary):
    """Of a program from npm, by the file beside it; "?" if that is not there."""
    for folder in pathlib.Path(binary or "").resolve().parents:
        with contextlib.suppress(OSError):
            return json.loads((folder / "package.json").read_text())["version"]
    return "?"


ANSWER_SECONDS = 2  # from a peer's send to the peer's receipt of the answer
DRAIN_SECONDS = 2  # that a prompt, or the end of a turn, may wait for a hook
HEAD = re.compile(r"from=peer id=([0-9a-f]+)")
EVENT = re.compile(r"<event>(.*?)</event>", re.DOTALL)
# What asks for news elsewhere finds no network here, and to optimize code takes longer than a short session runs it:
# a fifth of the CPU of a session, with 2.1.329.
LIGHT = {
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "DISABLE_AUTOUPDATER": "1",
    "BUN_JSC_useDFGJIT": "0",
}
CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]| ")  # of a terminal, and blanks, which it may draw in other ways
BODY = re.compile(r"^\| (.*)$", re.MULTILINE)
ID = re.compile(r'(?:\bid=|"id": ")([0-9a-f]+)')  # in a block, or in what the drain tells
MARKS = [  # of each file whose tests start it
    pytest.mark.slow("each test starts Claude Code, once or more, and waits for its turns"),
    pytest.mark.skipif(not CLAUDE, reason="no claude binary: see the head of tests/integrations/test_end_to_end.py"),
    pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc to see that every process has ended"),
]


def python(script, *arguments):
    return shlex.join([sys.executable, str(ROOT / script), *arguments])


def integration(name):
    """A program of integrations/claude_code; a test whose program is not there is skipped."""
    path = ROOT / "integrations" / "claude_code" / name
    if not path.exists():
        pytest.skip(f"there is no {path.relative_to(ROOT)} yet")
    return str(path)


def tools(bus, folder, *options):
    """Settings with the MCP server of alice, as `bus`, and no other."""
    environment = {"AGENT_BUS_URL": bus.url, "AGENT_NAME": "alice", "AGENT_BUS_STATE_DIR": str(folder / "state")}
    server = {"command": sys.executable, "args": [integration("bus_mcp.py"), *options], "env": environment}
    return "--mcp-config", json.dumps({"mcpServers": {"bus": server}}), "--strict-mcp-config"


STOPWATCH = """
import subprocess, sys, time
began = time.monotonic()
subprocess.call(sys.argv[2:])
print(time.monotonic() - began, file=open(sys.argv[1], "a"))
"""


def hooks(*events, times=None):
    """Settings with the drain on these events; how many seconds each took goes to the file `times`."""
    measured = [sys.executable, "-c", STOPWATCH, str(times)] if times else []
    command = shlex.join([*measured, sys.executable, integration("bus_hook.py"), "--format", "claude"])
    hook = [{"hooks": [{"type": "command", "command": command, "timeout": 10}]}]
    return "--settings", json.dumps({"hooks": dict.fromkeys(events, hook)})


def monitor(seconds=120, name="alice"):
    command = shlex.join([sys.executable, "-u", str(ROOT / "bus_recv.py"), name])
    return tool_use("Monitor", command=command, description=f"agent-bus inbox: {name}", timeout_ms=int(seconds * 1000))


def done(request):
    return [words("done")]


def introduced(request):
    """The name that the session was told to be its own."""
    return re.search(r"This session is (\S+) on the agent-bus", news(request))[1]


def bash(command):
    return tool_use("Bash", command=command, description="run it")


def reply(number, text):
    sending = python("bus_send.py", "peer", "--reply-to", number)
    return bash(f"printf %s {shlex.quote(text)} | {sending}")


class Session:
    """One `claude -p` process whose agent is alice; at the end nothing that it started is left."""

    start = "-p", "begin", "--output-format", "stream-json", "--verbose"

    def __init__(self, folder, bus, model, *options, **environment):
        self.home, self.out = folder / "home", folder / "out.jsonl"
        self.work = folder / "work"
        self.command = [CLAUDE, *self.start, *options]
        nowhere = "http://127.0.0.1:9"
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "AGENT_BUS_URL": bus.url,
            "AGENT_NAME": "alice",
            "AGENT_BUS_STATE_DIR": str(folder / "state"),
            "ANTHROPIC_BASE_URL": model.url,
            "ANTHROPIC_API_KEY": "dummy",
            "CLAUDE_CODE_MAX_RETRIES": "0",
            **LIGHT,
            "http_proxy": nowhere,
            "https_proxy": nowhere,
            "no_proxy": "127.0.0.1,localhost",
            **environment,
        }
        self.model = model

    def processes(self):
        """The pids of all that was started with our HOME."""
        mine, found = f"HOME={self.home}\0".encode(), []
        for entry in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mine in b"\0" + (entry / "environ").read_bytes() + b"\0":
                    found.append(int(entry.name))
        return found

    def children(self):
        """The pids of those of them that Claude Code, or one below it, has started and waits for."""
        found = [self.process.pid]
        for pid in found:
            for task in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
                with contextlib.suppress(OSError):
                    found += map(int, task.read_text().split())
        return found

    def running(self, path):
        """The pids of its children that run this program; a shell that does is none."""
        found = []
        for pid in self.children():
            with contextlib.suppress(OSError):
                arguments = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if str(path).encode() in arguments and b"-c" not in arguments:
                    found.append(pid)
        return found

    def readers(self):
        return self.running(ROOT / "bus_recv.py")

    def readers_write_to(self, kind):
        """Is the stdout of each reader a `socket`, or a `pipe`? bus_recv.py paces and wraps for a socket.

        A shell that is about to become a reader has another one for a moment.
        """

        def found():
            with contextlib.suppress(OSError):  # one has just ended
                return {os.readlink(f"/proc/{pid}/fd/1").partition(":")[0] for pid in self.readers()} == {kind}

        return wait_until(found)

    def end(self):
        """As its user would end it; returns what does not end by itself."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(PATIENCE)
            wait_until(lambda: not self.processes(), 5)
        except (subprocess.TimeoutExpired, AssertionError):
            left = self.processes()
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait(PATIENCE)
            return left
        return []

    def __enter__(self):
        self.home.mkdir(exist_ok=True)  # a session that is resumed is in the home of its first run
        self.work.mkdir(exist_ok=True)
        with self.out.open("wb") as out:
            self.process = subprocess.Popen(
                self.command, cwd=self.work, env=self.env, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
        return self

    def __exit__(self, kind, *_):
        left = self.end()
        if kind:
            print(self.out.read_text(errors="replace")[-6000:])  # pytest shows it with the failure
        assert kind or not left, f"these outlived the session: {left}"
        assert kind or not self.model.failures, self.model.failures[0]


class Terminal(Session):
    """The same program as a person runs it, on a terminal of its own; it waits for input between turns."""

    start = ("begin",)

    def __enter__(self):
        self.home.mkdir()
        self.work.mkdir(exist_ok=True)
        trusted = {"hasTrustDialogAccepted": True, "hasCompletedProjectOnboarding": True}
        known = {"approved": [self.env["ANTHROPIC_API_KEY"]], "rejected": []}
        config = {"hasCompletedOnboarding": True, "theme": "dark", "customApiKeyResponses": known}
        (self.home / ".claude.json").write_text(json.dumps({**config, "projects": {str(self.work): trusted}}))
        ours, its = pty.openpty()
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 120, 0, 0))
        env = {**self.env, "TERM": "xterm-256color"}
        self.process = subprocess.Popen(
            self.command, cwd=self.work, env=env, stdin=its, stdout=its, stderr=its, start_new_session=True
        )
        os.close(its)
        self.keyboard = ours
        threading.Thread(target=self.record, args=(ours,), daemon=True).start()
        return self

    def type(self, line):
        """As a user does, who sees the line before the return key takes it."""
        os.write(self.keyboard, line.encode())
        self.shows(line)
        os.write(self.keyboard, b"\r")

    def is_idle(self):
        """The title begins with a star then; while Claude works, with half a moon."""
        return re.findall("\x1b\\]0;(.)", self.out.read_text(errors="replace"))[-1:] == ["✳"]

    def shows(self, words):
        wait_until(lambda: words.replace(" ", "") in CONTROLS.sub("", self.out.read_text(errors="replace")))

    def record(self, ours):
        with self.out.open("wb", buffering=0) as out, contextlib.suppress(OSError):  # EIO: nobody has it any more
            while part := os.read(ours, 1 << 16):
                out.write(part)
        os.close(ours)
