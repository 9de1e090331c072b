import os

import pytest

import bus_send
from test_bus import fresh
from tests.kit.mcp_client import Client
from tests.kit.processes import Server


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A bus for all tests of a file. It must be fine with each of them: whoever harms it takes `bus`."""
    with Server(tmp_path_factory.mktemp("shared") / "bus.db") as server:
        yield server


@pytest.fixture
def channel(monkeypatch):
    """A channel of the test's own, which all clients take: there each name is new."""
    monkeypatch.setenv("AGENT_BUS_CHANNEL", name := fresh("channel"))
    return name


@pytest.fixture
def bus(request):
    """A running bus. In a file that says ONE_BUS it is one for all tests, each of which has a channel of its own."""
    if not getattr(request.module, "ONE_BUS", False):
        with Server(request.getfixturevalue("tmp_path") / "bus.db") as server:
            yield server
        return
    request.getfixturevalue("channel")
    yield request.getfixturevalue("shared")


@pytest.fixture
def start(bus, tmp_path, monkeypatch):
    """Starts clients of the running bus; all have one state directory."""
    monkeypatch.setenv("AGENT_BUS_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("AGENT_BUS_URL", bus.url)
    clients = []

    def start(*options, url=bus.url, **env):
        known = {name: os.environ[name] for name in ("AGENT_BUS_STATE_DIR", "AGENT_BUS_CHANNEL") if name in os.environ}
        clients.append(Client(url, *options, **{**known, **env}))
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
