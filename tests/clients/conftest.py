"""What several tests of the clients share: who runs agent-bus, an empty home, a configuration, short deadlines."""
import os

import pytest

import bus_recv
import bus_send
from tests.clients.test_clients import run
from tests.kit.processes import PATIENCE


@pytest.fixture
def agent(bus):
    """Runs a command as bob, against a bus: exit code, stdout, stderr."""

    def command(*arguments, stdin=b"", **env):
        env = {"AGENT_BUS_URL": bus.url, "AGENT_NAME": "bob", **env}
        return run("tools/agent_bus.py", *arguments, stdin=stdin, env=env)

    command.url, command.bus = bus.url, bus
    return command


@pytest.fixture
def house(tmp_path, monkeypatch):
    """An empty HOME, and a systemctl that writes down what it was asked."""
    place = tmp_path / "house"
    place.mkdir()
    (tmp_path / "bin").mkdir()
    for manager in ("systemctl", "launchctl"):
        (place.parent / "bin" / manager).write_text(f'#!/bin/sh\necho {manager} "$@" >> {tmp_path / "asked"}\n')
        (place.parent / "bin" / manager).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(place))
    for variable in ("XDG_CONFIG_HOME", "XDG_STATE_HOME", "CLAUDE_CONFIG_DIR", "CODEX_HOME", "COPILOT_HOME"):
        monkeypatch.delenv(variable, raising=False)
    return place


@pytest.fixture
def configure(tmp_path, monkeypatch, home):
    """configure(text, profile) -> the path of the file, written as `join` writes it."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    folder = tmp_path / "config" / "agent-bus"
    folder.mkdir(parents=True)

    def configure(text, profile="default", mode=0o600):
        path = folder / f"{profile}.env"
        path.write_bytes(text.encode())
        path.chmod(mode)
        return path

    return configure


@pytest.fixture(autouse=True)
def unhurried(monkeypatch):
    """A reader in this process does not say that another one has its name, however long the machine stands still."""
    monkeypatch.setattr(bus_recv, "TELL_SECONDS", PATIENCE)


@pytest.fixture
def hurry(monkeypatch):
    """Real deadlines, but short ones."""
    monkeypatch.setattr(bus_send, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(bus_send, "SLOWEST_RATE", 1 << 20)
    monkeypatch.setattr(bus_send, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(bus_recv, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(bus_recv, "SLOWEST_RATE", 1 << 20)
