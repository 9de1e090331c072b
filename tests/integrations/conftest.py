import pytest

import bus_send
from tests.kit.mcp_client import Client


@pytest.fixture
def start(bus, tmp_path, monkeypatch):
    """Starts clients of the running bus; all have one state directory."""
    monkeypatch.setenv("AGENT_BUS_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("AGENT_BUS_URL", bus.url)
    clients = []

    def start(*options, url=bus.url, **env):
        clients.append(Client(url, *options, **{"AGENT_BUS_STATE_DIR": str(tmp_path / "state"), **env}))
        return clients[-1]

    yield start
    for client in clients:
        if client.process.poll() is None:
            client.kill()


@pytest.fixture
def client(start):
    return start()


@pytest.fixture
def peer(bus, tmp_path, monkeypatch):
    """Sends as peer; the other end of a conversation."""
    monkeypatch.setenv("AGENT_BUS_STATE_DIR", str(tmp_path / "peer-state"))
    for name in ("AGENT_BUS_TOKEN", "AGENT_BUS_TOKEN_FILE", "AGENT_BUS_CHANNEL"):
        monkeypatch.delenv(name, raising=False)

    def send(text, to="alice", **fields):
        return bus_send.send(to, text, sender="peer", url=bus.url, **fields)

    return send
