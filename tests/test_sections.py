"""test_bus.py skips the sections of the extensions that a bus lacks, names them, and checks all the others.

Real files that are absent: tests/extensions/test_alone.py."""

import json
import pathlib
import socket
import socketserver
import threading

import pytest

import bus_send
import test_bus
from test_bus import EXTENSIONS, FILES, QUESTIONS, QUEUES
from tests.clients.test_clients import refusing
from tests.clients.test_clients import run as program
from tests.kit import checks
from tests.kit.peers import command, invite
from tests.kit.processes import run_checks
from tests.kit.serving import Serving

CHECKS = list(checks.CHECKS.values())
ROUTES = {QUEUES: ("/claim", "/ack", "/nack", "/extend", "/again"), FILES: ("/blob/",)}
MISSING = "{route} needs bus_extensions/{file}, which is not beside bus_server.py: copy it from the same version"
OFF = "{route} is off: this bus was started --without page,{name}"


class Lacking(Serving, socketserver.ThreadingTCPServer):
    """It stands before a bus and answers 404 where an extension would; everything else passes as it is."""

    daemon_threads, allow_reuse_address, request_queue_size = True, True, 128

    def __init__(self, bus, *extensions, error=MISSING):
        super().__init__(("127.0.0.1", 0), Passing)
        self.behind, self.extensions, self.error = ("127.0.0.1", bus.port), extensions, error
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def refusal(self, path):
        """What this path is answered here; None if it passes."""
        for extension in self.extensions:
            for route in ROUTES[extension]:
                if path.startswith(route):
                    names = {"route": route, "file": extension.file, "name": extension.file[:-3]}
                    return json.dumps({"error": self.error.format(**names)}) if self.error else "Not Found"
        return None


class Passing(socketserver.BaseRequestHandler):
    def handle(self):
        first = self.request.recv(65536)
        said = self.server.refusal(first.decode("latin-1").split(" ", 2)[1]) if first.count(b" ") > 1 else None
        if said is not None:
            head = f"HTTP/1.1 404 Not Found\r\nConnection: close\r\nContent-Length: {len(said)}\r\n\r\n"
            self.request.sendall((head + said).encode())
            return
        with socket.create_connection(self.server.behind) as behind:
            behind.sendall(first)
            threading.Thread(target=self.copy, args=[self.request, behind], daemon=True).start()
            self.copy(behind, self.request)

    @staticmethod
    def copy(source, target):
        try:
            for piece in iter(lambda: source.recv(65536), b""):
                target.sendall(piece)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # one side has gone, and the other is told by its own copy


def test_a_bus_that_has_removed_a_broadcast_passes(bus):
    """There each new name is told of a gap, at once. Those for a bus with tokens: tests/core/test_conformance.py."""
    bus_send.send("all", "hello", url=bus.url, sender="ann")
    command(bus, "prune", "--older", "0", "--pending")
    checked = test_bus.Bus(bus.url)
    assert "gap" in checked.get("/recv?to=nobody&since=0")
    made = [check for check in CHECKS if getattr(check, "needs", None) == "a bus without tokens"]
    checks.make(checked, made)
    assert len(made) > 10


@pytest.mark.parametrize(
    "error, reason",
    [
        (MISSING, "bus_extensions/work.py is not there"),
        (OFF, "the bus was started --without page,work"),
        ("there is nothing here", "/claim is answered 404"),
        (None, "/claim is answered 404"),
    ],
    ids=["no file", "off", "another error", "no JSON"],
)
def test_the_reason_is_what_the_bus_says_and_a_plain_404_is_one(bus, error, reason):
    with Lacking(bus, QUEUES, error=error) as proxy:
        checked = test_bus.Bus(proxy.url)
        lacking = {each.name: checked.lacks(each) for each in EXTENSIONS.values() if checked.lacks(each)}
        assert lacking == {"queues": reason}


def test_a_bus_that_lacks_nothing_skips_nothing(bus):
    checked = test_bus.Bus(bus.url)
    assert not any(map(checked.lacks, EXTENSIONS.values()))


def test_a_bus_that_has_the_file_has_no_excuse(bus, tmp_path, monkeypatch):
    """A 404 of the bus that test_bus.py has started from these files is a fault, and fails the check."""
    (tmp_path / "bus_extensions").mkdir()
    pathlib.Path(tmp_path, "bus_extensions", QUEUES.file).touch()
    monkeypatch.setattr(test_bus, "HERE", tmp_path)
    [check] = [check for check in CHECKS if check.__doc__.startswith("13.7 ")]
    with Lacking(bus, QUEUES, FILES) as proxy:
        mine = test_bus.Bus(proxy.url, mine=True)
        assert mine.lacks(FILES) and test_bus.reason_to_skip(check, mine) is None
        with pytest.raises(AssertionError):
            check(mine)


def test_waiting_until_a_message_is_fetched_belongs_to_the_questions():
    [check] = [check for check in CHECKS if check.__doc__.startswith("11.5 ")]
    assert test_bus.extension_of(check) is QUESTIONS


def test_an_argument_is_refused_and_the_help_says_how_to_name_a_server():
    code, out, err = program("test_bus.py", "http://127.0.0.1:8080")
    assert (code, out) == (2, "") and err.startswith("test_bus: unknown: http://127.0.0.1:8080: ") and "BUS_URL" in err
    for option in ("-h", "--help"):
        code, out, err = program("test_bus.py", option)
        assert (code, err) == (0, "") and "BUS_URL=http://host:8080 python3 test_bus.py" in out


def test_a_url_where_no_check_could_pass_is_one_sentence(bus):
    url = refusing()
    for given, says in ((url, f"test_bus: no bus at {url} (Connection refused): does it run there?"),
                        ("127.0.0.1:80", "test_bus: BUS_URL must be like http://host:8080, and is '127"),
                        ("http://127.0.0.1:x", "test_bus: no bus at http://127.0.0.1:x (")):  # fmt: skip
        done = run_checks(given)
        assert done.returncode == 1 and done.stderr.startswith(says) and done.stderr.count("\n") == 1
    token = invite(bus, "dell")
    for more in ({}, {"AGENT_BUS_TOKEN": token}, {"AGENT_BUS_TOKEN": "abt_1"}):
        done = run_checks(bus.url, **more)
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"test_bus: {bus.url}: ")
        assert "set AGENT_BUS_TOKEN to the token of an operator" in done.stderr


def test_every_check_is_in_a_section_with_a_title():
    assert {test_bus.section_of(check) for check in CHECKS} == set(test_bus.SECTIONS)
    assert set(EXTENSIONS) <= set(test_bus.SECTIONS) and len(CHECKS) >= 90


def test_a_parked_poll_is_this_poll_and_not_an_earlier_one(bus, monkeypatch):
    """`parked` waits for the poll that it starts, also where the name has polled a moment ago and counts as online."""
    checked = test_bus.Bus(bus.url)
    to, held = test_bus.fresh(), threading.Event()
    since = checked.recv(to)["now"]
    assert test_bus.agent(checked, to)["online"]
    really = checked.recv

    def late(*arguments, **query):
        assert held.wait(test_bus.PATIENCE)
        return really(*arguments, **query)

    monkeypatch.setattr(checked, "recv", late)
    waiting = test_bus.in_background(test_bus.parked, checked, to, since)
    with pytest.raises(test_bus.concurrent.futures.TimeoutError):
        waiting.result(0.3)
    held.set()
    answer = waiting.result(test_bus.PATIENCE)
    assert checked.send(to)["receiver"]["unread"] == 1 and len(answer.result(test_bus.PATIENCE)["messages"]) == 1
