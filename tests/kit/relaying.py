"""Two buses and the relay between them: what the tests of bus_relay.py share."""
import contextlib
import io
import json
import os
import signal
import urllib.error
import urllib.request
from unittest import mock

import pytest

import bus_recv
import bus_send
from tests.kit.processes import PATIENCE, Server, no_settings
from tools import bus_relay


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """No setting of whoever runs the tests; profiles and cursors of each test's own; time for a bus to answer."""
    no_settings(monkeypatch)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("AGENT_BUS_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr(bus_recv, "HOLD_SECONDS", float(PATIENCE))
    (tmp_path / "config" / "agent-bus").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def buses(home):
    """buses("a", "b"): buses that run, each with a profile of its name. More arguments are options of all."""
    with contextlib.ExitStack() as stack:

        def start(*names, options=()):
            made = [stack.enter_context(Server(home / f"{name}.db", *options)) for name in names]
            for name, bus in zip(names, made):
                profile(home, name, bus)
            return made

        yield start


def profile(home, name, bus, **more):
    path = home / "config" / "agent-bus" / f"{name}.env"
    path.write_text("".join(f"{field}={value}\n" for field, value in {"AGENT_BUS_URL": bus.url, **more}.items()))
    path.chmod(0o600)


def relay(*names, a="a", b="b", **env):
    """Pass on what waits, in this process: the exit code, and what it said on stderr."""
    err, handlers = io.StringIO(), {number: signal.getsignal(number) for number in bus_recv.ENDS}
    with mock.patch.dict(os.environ, **env), contextlib.redirect_stderr(err):
        try:
            code = bus_relay.main([*names, "--bus", a, "--to-bus", b, "--once"])
        except SystemExit as usage:
            code = usage.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return code, err.getvalue()


def say(bus, sender, to, msg, token=None, **given):
    """Send; returns the id. With a token only one thread may do this: it changes the environment, and puts it back."""
    with mock.patch.dict(os.environ, AGENT_BUS_TOKEN=token) if token else contextlib.nullcontext():
        return bus_send.send(to, msg, url=bus.url, sender=sender, **given)["id"]


def log(bus, token=None):
    """All that the bus has, as an observer gets it."""
    header = {"Authorization": f"Bearer {token}"} if token else {}
    with urllib.request.urlopen(urllib.request.Request(f"{bus.url}/log?max=1000", headers=header)) as found:
        return json.load(found)["messages"]


def texts(bus, **fields):
    return [one["msg"] for one in log(bus) if fields.items() <= one.items()]


def sends(other):
    """What a scripted bus was sent."""
    return [asked for asked in other.asked if asked.target == "/send"]


def waiting(bus, name):
    return json.loads(bus.get(f"/inbox?name={name}"))["recipients"].get("default", {}).get(name, 0)
