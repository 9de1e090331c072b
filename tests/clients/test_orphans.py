"""A reader that nobody reads any more ends at once, whatever it waits for, and the bus knows soon."""
import json
import os
import socket
import subprocess
import sys

import pytest

import bus_send
from tests.kit import forked
from tests.kit.processes import PATIENCE, ROOT, in_time, no_settings, wait_until

NOTICED_SECONDS = 2


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    no_settings(monkeypatch)
    monkeypatch.setenv("AGENT_BUS_STATE_DIR", str(tmp_path / "state"))


def reader(bus, stdout, *options):
    env = {**os.environ, "AGENT_BUS_URL": bus.url}
    command = [sys.executable, "-u", str(ROOT / "bus_recv.py"), "bob", *options]
    return forked.Popen(command, env=env, stdout=stdout, stderr=subprocess.DEVNULL)


def listening(bus):
    return [each["name"] for each in json.loads(bus.get("/agents?online=true"))["agents"]] == ["bob"]


def pipe():
    return os.pipe()


def unix_socket():
    return [each.detach() for each in socket.socketpair()]


@pytest.mark.parametrize("output", [pipe, unix_socket])
@pytest.mark.parametrize("options", [[], ["--json"], ["--monitor"]], ids=str)
def test_a_reader_whose_output_is_closed_while_it_waits_ends(bus, output, options):
    """Case 44. Its poll is held for 25 s, and there is no mail."""
    ours, its = output()
    process = reader(bus, its, *options)
    os.close(its)
    try:
        wait_until(lambda: listening(bus))
        assert process.poll() is None
        os.close(ours)
        assert process.wait(in_time(NOTICED_SECONDS)) == 0
    finally:
        process.kill()
        process.wait(PATIENCE)


@pytest.mark.parametrize("options", [[], ["--exec", "cat > got"]], ids=["a file", "a command"])
def test_a_reader_that_needs_nobody_to_read_it_goes_on(bus, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    ours, its = pipe()
    with open("got", "wb") as file:
        process = reader(bus, its if options else file, *options)
    os.close(its)
    os.close(ours)
    try:
        wait_until(lambda: listening(bus))
        bus_send.send("bob", "hello", url=bus.url, sender="spark")
        wait_until(lambda: "hello" in (tmp_path / "got").read_text())
        assert process.poll() is None
    finally:
        process.kill()
        process.wait(PATIENCE)
