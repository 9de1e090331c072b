import pytest

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
