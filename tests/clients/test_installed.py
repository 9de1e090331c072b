"""Installed by pip, with the clone out of reach: every command works, and says the commands that this user has.

setuptools itself installs a copy of the repository into an empty environment, as pip would do with the network; then
the copy is removed.
"""

import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
import venv

import pytest

from tests.clients.test_install_claude import shook_hands, tree
from tests.kit.claude_code import CLAUDE
from tests.kit.processes import PATIENCE, ROOT
from tools import agent_bus

needs_setuptools = pytest.mark.skipif(not importlib.util.find_spec("setuptools"), reason="setuptools installs it")
pytestmark = needs_setuptools
COPIED = ("bus_*.py", "bus_listener.sh", "pyproject.toml", "README.md", "LICENSE", "tools", "bus_extensions",
          "ledgers", "integrations", ".claude-plugin")  # fmt: skip
SETUP = "import setuptools; setuptools.setup()"
NOWHERE = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}  # for what Claude Code asks
SCRIPTS = re.findall(r'^(agent-bus[a-z-]*) = "', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder of the scripts."""
    place = tmp_path_factory.mktemp("installed")
    copy, env = place / "copy", place / "venv"
    copy.mkdir()
    for path in (path for pattern in COPIED for path in ROOT.glob(pattern)):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(path, copy / path.name, ignore=ignored) if path.is_dir() else shutil.copy(path, copy)
    venv.create(env, symlinks=True)
    ours = pathlib.Path(importlib.util.find_spec("setuptools").origin).parent.parent
    options = ["-q", "install", "--single-version-externally-managed", "--record", str(place / "record")]
    command = [str(env / "bin" / "python"), "-W", "ignore", "-c", SETUP, *options]
    theirs = {**os.environ, "PYTHONPATH": str(ours)}
    done = subprocess.run(command, cwd=copy, env=theirs, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(copy)
    return env / "bin"


@pytest.fixture
def house(tmp_path):
    (tmp_path / "house").mkdir()
    return tmp_path / "house"


@pytest.fixture
def run(installed, house):
    """Runs a script in an empty environment: stdout and stderr together."""

    def command(script, *arguments, stdin="", code=0, **env):
        env = {"HOME": str(house), "PATH": f"{installed}:/usr/bin:/bin", **env}
        done = subprocess.run([installed / script, *arguments], cwd="/", env=env, input=stdin, capture_output=True,
                              text=True, timeout=PATIENCE)  # fmt: skip
        said = done.stdout + done.stderr
        assert done.returncode == code and "Traceback" not in said, said
        return said

    return command


@pytest.fixture(scope="module")
def bus(installed, tmp_path_factory):
    """The URL of a bus that the one command runs."""
    place = tmp_path_factory.mktemp("bus")
    env = {"HOME": str(place), "PATH": "/usr/bin:/bin"}
    process = subprocess.Popen([installed / "agent-bus", "serve", "--port", "0"], cwd="/", env=env, text=True,
                               stdout=subprocess.PIPE)  # fmt: skip
    yield re.fullmatch("listening on (.*)\n", process.stdout.readline())[1]
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0
    extensions = ", ".join(sorted(path.stem for path in ROOT.glob("bus_extensions/[a-z]*.py")))
    assert f"extensions: {extensions}\n" in process.stdout.read()
    process.stdout.close()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_runs(script, run):
    said = run(script, "--help")
    assert re.match(rf"usage: {script}|usage: agent-bus", said) and "python3" not in said


@pytest.mark.parametrize("name", agent_bus.COMMANDS)
def test_every_command_of_the_one_command_runs(name, run):
    said = run("agent-bus", "help", name)
    assert said.startswith("usage: agent-bus ") and "bus_" not in said and "python3" not in said


def test_the_extensions_and_the_tools_work(bus, run, house):
    env = {"AGENT_BUS_URL": bus, "AGENT_NAME": "bob"}
    run("agent-bus", "send", "bob", stdin="hi", **env)
    assert "| hi" in run("agent-bus", "inbox", **env) and "| hi" in run("agent-bus", "recv", "bob", "--once", **env)
    assert "bob" in run("agent-bus", "who", **env)
    run("agent-bus", "send", "jobs", stdin="do it", **env)
    run("agent-bus", "work", "jobs", "--once", "--exec", "cat > $HOME/job", **env)
    assert json.loads((house / "job").read_text())["msg"] == "do it"
    (house / "a.txt").write_text("content")
    digest = re.search("[0-9a-f]{64}", run("agent-bus", "file", "put", str(house / "a.txt"), "--to", "bob", **env))
    if not digest:
        digest = re.search("[0-9a-f]{64}", run("agent-bus", "inbox", **env))
    run("agent-bus", "file", "get", digest[0], "-o", str(house / "b.txt"), **env)
    assert (house / "b.txt").read_text() == "content"
    assert "FAIL" not in run("agent-bus", "doctor", "--hold", "0", **env)
    assert run("agent-bus", "open", **env) == f"{bus}/ui/\n"
    for file in (ROOT / "bus_extensions" / "page").iterdir():
        with urllib.request.urlopen(f"{bus}/ui/{file.name}") as answer:
            assert answer.read() == file.read_bytes()
    assert "do it" in run("agent-bus-log", "--no-follow", **env)


def test_a_front_finds_what_it_is_made_of(run):
    assert "--ledger must be a URL like postgresql://" in run("agent-bus-server", "--ledger", "mysql://x/y", code=2)


@pytest.mark.parametrize("file", ["bus_recv.py", "bus_send.py", "bus_listener.sh", "bus_doctor.py", "bus_work.py"])
def test_the_bus_hands_out_the_clients(file, bus):
    with urllib.request.urlopen(f"{bus}/{file}") as answer:
        assert answer.read().startswith(b"#!")


def test_an_invitation_to_join_and_the_token_of_it(run):
    said = run("agent-bus", "invite", "dell", "--url", "http://127.0.0.1:9")
    assert "bus_join.py" in said and re.search("abt_[0-9a-f]{8}_", said)
    assert " dell " in run("agent-bus", "tokens") and "revoked the tokens of dell" in run("agent-bus", "revoke", "dell")


def test_messages_name_the_commands_that_this_user_has(run, house):
    said = run("agent-bus", "serve", "--host", "0.0.0.0", "--port", "0", code=2)
    assert "agent-bus invite NAME" in said
    nobody = {"AGENT_BUS_URL": "http://127.0.0.1:9", "AGENT_NAME": "bob"}
    for line in ("agent-bus-send bob", "agent-bus send bob", "agent-bus-recv bob --once", "agent-bus recv bob --once"):
        assert "agent-bus doctor" in run(*line.split(), "--timeout", "0", stdin="hi", code=75, **nobody)


def test_install_claude_names_the_script_and_the_plugin(run, installed, house, bus):
    was = tree(house)
    said = run("agent-bus", "install", "claude", AGENT_BUS_URL=bus)
    entry = json.loads((house / ".claude.json").read_text())["mcpServers"]["bus"]
    assert entry["command"] == str(installed / "agent-bus-mcp") and entry["args"] == []
    assert shook_hands(entry, house, {"HOME": str(house), "PATH": "/usr/bin:/bin"}) == "agent-bus"
    plugin = re.search(r"claude --plugin-dir (\S+)", said)[1]
    assert plugin == str(installed.parent / "share" / "agent-bus")
    run("agent-bus", "uninstall", "claude")
    assert tree(house) == was


def test_install_service_names_the_script(run, installed, house):
    (house / "bin").mkdir()
    (house / "bin" / "systemctl").write_text("#!/bin/sh\n")
    (house / "bin" / "systemctl").chmod(0o755)
    run("agent-bus", "install", "service", "--port", "9000", PATH=f"{house}/bin:/usr/bin:/bin")
    unit = (house / ".config" / "systemd" / "user" / "agent-bus.service").read_text()
    assert f"\nExecStart={installed}/agent-bus serve --port 9000\n" in unit


def test_the_plugin_is_whole(installed, house, bus):
    """Its hooks and its server run with the Python of the machine, which has nothing of ours."""
    plugin = installed.parent / "share" / "agent-bus"
    ours = json.loads((plugin / ".claude-plugin" / "plugin.json").read_text())
    for part in (ours["commands"], ours["skills"], ours["hooks"], ours["experimental"]["monitors"]):
        assert tree(plugin / part) or (plugin / part).is_file()
        assert tree(ROOT / part).keys() == tree(plugin / part).keys()
    hook = json.loads((plugin / ours["hooks"]).read_text())["hooks"]["SessionStart"][0]["hooks"][0]["command"]
    env = {"HOME": str(house), "PATH": f"{pathlib.Path(sys.executable).parent}:/usr/bin:/bin", "AGENT_BUS_URL": bus,
           "CLAUDE_PLUGIN_ROOT": str(plugin), "AGENT_NAME": "plug"}  # fmt: skip
    event = json.dumps({"hook_event_name": "SessionStart", "session_id": "s", "cwd": "/"})
    done = subprocess.run(hook, shell=True, cwd="/", env=env, input=event, capture_output=True, text=True)
    assert "plug on the agent-bus" in json.loads(done.stdout)["hookSpecificOutput"]["additionalContext"], done.stderr
    server = ours["mcpServers"]["bus"]
    arguments = [each.replace("${CLAUDE_PLUGIN_ROOT}", str(plugin)) for each in server["args"]]
    assert shook_hands({"command": sys.executable, "args": ["-S", *arguments], "env": {}}, "/", env) == "agent-bus"


def test_the_hook_runs(run, bus):
    event = json.dumps({"hook_event_name": "SessionStart", "session_id": "s", "cwd": "/"})
    said = run("agent-bus-hook", "--format", "claude", stdin=event, AGENT_BUS_URL=bus, AGENT_NAME="hooked")
    assert "hooked on the agent-bus" in said


@pytest.mark.skipif(not CLAUDE, reason="no claude binary: see the head of tests/integrations/test_end_to_end.py")
def test_claude_loads_the_plugin(installed, house):
    plugin = str(installed.parent / "share" / "agent-bus")
    env = {"HOME": str(house), "PATH": os.environ["PATH"], "DISABLE_AUTOUPDATER": "1"}
    command = [CLAUDE, "--plugin-dir", plugin, "plugin", "list", "--json"]
    done = subprocess.run(command, cwd=house, env={**env, **NOWHERE}, capture_output=True, check=True, timeout=PATIENCE)
    (loaded,) = (plugin for plugin in json.loads(done.stdout) if plugin["id"] == "agent-bus@inline")
    assert loaded["enabled"] and "errors" not in loaded
