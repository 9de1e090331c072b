"""Unix sockets: PROTOCOL.md section 19."""

import http.client
import json
import os
import socket
import stat
import subprocess
import sys

import pytest

from tests.core.test_server import refused
from tests.kit.peers import invite
from tests.kit.processes import PATIENCE, SERVER, Server, wait_until


class Local(http.client.HTTPConnection):
    """A connection to a Unix socket."""

    def __init__(self, path):
        super().__init__("localhost", timeout=PATIENCE)
        self.path = str(path)

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(self.path)


def ask(path, method, target, body=None, token=None):
    peer = Local(path)
    peer.request(method, target, body and json.dumps(body), {"Authorization": f"Bearer {token}"} if token else {})
    answer = peer.getresponse()
    status, text = answer.status, answer.read()
    peer.close()
    return status, json.loads(text)


class OnlyLocal(Server):
    """A bus that listens on a Unix socket alone. `lines` is what it said at its start."""

    def __init__(self, folder, *options):
        super().__init__(folder / "bus.db", *options)
        self.path = folder / "socket"
        at = self.command.index("--port")
        self.command[at : at + 2] = ["--listen", f"unix:{self.path}"]

    def start(self):
        with self.log.open("ab") as stderr:
            self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=stderr, env=self.env)
        assert self.process.stdout.readline().decode() == f"listening on unix:{self.path}\n", self.log.read_text()
        return self


@pytest.fixture
def local(tmp_path):
    with OnlyLocal(tmp_path) as bus:
        yield bus


def test_a_bus_on_a_socket_alone_sends_and_receives_and_has_no_port(local):
    sent = ask(local.path, "POST", "/send", {"from": "ann", "to": "bob", "msg": "hello"})
    assert sent[0] == 200
    found = ask(local.path, "GET", "/recv?to=bob")
    assert [each["msg"] for each in found[1]["messages"]] == ["hello"]
    assert ask(local.path, "GET", "/agents?name=bob")[1]["agents"][0]["address"] == "local"
    assert ask(local.path, "GET", "/whoami")[1]["address"] == "local"
    assert local.process.stdout.readline().startswith(b"messages are in"), "it listens on a port too"


def test_the_socket_is_for_this_user_alone_and_is_removed_at_the_end(local):
    mode = os.stat(local.path).st_mode
    assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o600
    assert local.stop() == 0 and not local.path.exists()


def test_a_reader_on_the_socket_is_woken(local):
    peer = Local(local.path)
    peer.request("GET", "/recv?to=bob&wait=20")
    wait_until(lambda: [each for each in ask(local.path, "GET", "/agents")[1]["agents"] if each["online"]])
    ask(local.path, "POST", "/send", {"from": "ann", "to": "bob", "msg": "wake up"})
    assert [each["msg"] for each in json.loads(peer.getresponse().read())["messages"]] == ["wake up"]
    peer.close()


def test_a_socket_beside_a_port(tmp_path):
    with Server(tmp_path / "bus.db", "--listen", f"unix:{tmp_path}/a", "--listen", f"unix:{tmp_path}/b") as bus:
        assert bus.process.stdout.readline().decode() == f"listening on unix:{tmp_path}/a\n"
        for path in ("a", "b"):
            assert ask(tmp_path / path, "POST", "/send", {"from": "ann", "to": "bob", "msg": path})[0] == 200
        assert [each["msg"] for each in json.loads(bus.get("/recv?to=bob"))["messages"]] == ["a", "b"]
        assert bus.stop() == 0
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_a_stale_socket_is_replaced(local):
    local.kill()
    assert local.path.exists()
    local.start()
    assert ask(local.path, "GET", "/healthz")[1]["ok"] is True


def test_a_socket_that_is_in_use_is_refused_in_words_and_stays(local, tmp_path):
    said = refused("--listen", f"unix:{local.path}", "--db", tmp_path / "other.db")
    assert f"another server listens there: use it (AGENT_BUS_URL=unix:{local.path}), or choose another path" in said
    assert ask(local.path, "GET", "/healthz")[1]["ok"] is True


@pytest.mark.parametrize("path, words", [
    ("file", "it is there, and is no socket"), ("none/socket", "No such file"), ("s" * 120, "too long"),
])  # fmt: skip
def test_a_path_that_cannot_be_a_socket_is_refused_in_words(tmp_path, path, words):
    (tmp_path / "file").write_text("precious")
    said = refused("--listen", f"unix:{tmp_path}/{path}", "--db", tmp_path / "bus.db")
    assert words in said and "choose another path" in said
    assert (tmp_path / "file").read_text() == "precious"


def test_what_is_not_unix_is_refused(tmp_path):
    command = [sys.executable, "-c", SERVER, "--db", str(tmp_path / "bus.db"), "--listen", "tcp:8080"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and "is not a socket like unix:" in done.stderr


def test_a_closed_bus_wants_its_token_on_the_socket_too(local):
    token = invite(local, "ann")
    wait_until(lambda: ask(local.path, "GET", "/agents")[0] == 401)
    assert ask(local.path, "GET", "/whoami", token=token)[1]["name"] == "ann"


def test_a_socket_that_another_server_has_replaced_is_not_removed(local):
    os.unlink(local.path)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(local.path))
        assert local.stop() == 0 and local.path.exists()
