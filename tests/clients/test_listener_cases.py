"""bus_listener.sh in odd places: rotated files, a server of the first contract, no home, no locks, a wrong clock."""
import json
import os
import pathlib
import random
import shutil
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.kit import listening, naive_server, old_client
from tests.kit.listening import NO_MAIL, SCRIPT, TICK, answer, mail, message, path_with, send
from tests.kit.naive_server import Naive
from tests.kit.processes import PATIENCE, Server, wait_until

listen, scripted = listening.listen, listening.scripted  # fixtures
FUTURE = TICK + 10**13  # four months later
TOKEN = "abt_00000000_" + "s" * 43
LAST = "the last one"  # a message whose arrival says that all before it have arrived, and how often


# ── Rotation ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def rename(path):
    path.rename(f"{path}.1")


@pytest.mark.parametrize("block, suffixes, move", [
    ("0", ["jsonl"], rename), ("0", ["log", "jsonl"], pathlib.Path.unlink),
    ("1", ["log", "jsonl"], rename), ("1", ["jsonl"], pathlib.Path.unlink),
], ids=["0-jsonl-rename", "0-log+jsonl-remove", "1-log+jsonl-rename", "1-jsonl-remove"])  # fmt: skip
def test_after_a_rotation_each_message_is_once_in_a_new_file(bus, listen, move, suffixes, block):
    listener = listen(bus.url, BLOCK=block)
    send(bus.url, "one", "two")
    listener.start().has_logged("one", "two")
    for body in ("three", "four"):
        for suffix in suffixes:
            move(listener.file(suffix))
        send(bus.url, body)
        wait_until(lambda: listener.messages())
        send(bus.url, LAST)  # a copy of what came before it would come before it, or with it
        listener.has_logged(body, LAST)
    wait_until(lambda: not json.loads(bus.get("/inbox"))["recipients"].get("default", {}).get("spark"))
    listener.stop()
    for suffix in suffixes:
        move(listener.file(suffix))
    listener.start()
    send(bus.url, "five")
    wait_until(lambda: listener.messages())
    listener.has_logged("five")


class Dropping(Naive):
    """A server of the first contract that hangs up on what it cannot parse, and whose `now` is no cursor."""

    def __init__(self):
        super().__init__({"wait is not known", "now is the wall clock"})

    def finish_request(self, sock, address):
        HangsUp(sock, address, self)


class HangsUp(naive_server.Request):
    def do_GET(self):
        if "since=last" not in self.path:
            super().do_GET()


ROTATIONS = int(os.environ.get("ROTATIONS", "5"))  # with 20 messages to each


@pytest.mark.slow("twenty messages for each of some rotations, a process for each; ROTATIONS=30 for more")
@pytest.mark.parametrize("server", ["ours", "of the first contract"])
def test_messages_that_arrive_during_rotations_are_stored_once_each(listen, tmp_path, server):
    with Server(tmp_path / "bus.db") if server == "ours" else Dropping() as bus, ThreadPoolExecutor(1) as sender:
        listener = listen(bus.url, BLOCK="1").start()
        wait_until(lambda: listener.file("jsonl").exists())
        chance = random.Random(7)
        for first in range(0, 20 * ROTATIONS, 20):
            sending = sender.submit(send_some, bus.url, range(first, first + 20))
            amidst = first + chance.randrange(20)  # not before or after it, but while they arrive
            wait_until(lambda: [each for each in listener.messages() if int(each["msg"]) >= amidst])  # noqa: B023
            for path in (listener.file("log"), listener.file("jsonl")):
                wait_until(path.exists)
                path.rename(f"{path}.{first:03}")
            sending.result()

        def found():
            files = sorted(listener.file("jsonl").parent.glob("spark.jsonl.[0-9]*")) + [listener.file("jsonl")]
            return [json.loads(line)["msg"] for file in files if file.exists() for line in file.open()]

        wait_until(lambda: len(found()) >= 20 * ROTATIONS)
        assert old_client.send(bus.url, "dell", "spark", LAST)
        wait_until(lambda: LAST in found())
        assert found() == [*map(str, range(20 * ROTATIONS)), LAST]


def send_some(url, numbers):
    for number in numbers:
        assert old_client.send(url, "dell", "spark", str(number))
        time.sleep(0.005)  # the rate of the mail


MOVED = ["tail jsonl", "tail log", "grep log", "grep jsonl"]  # when each program is about to run, the file goes


@pytest.mark.parametrize("moved", MOVED)
def test_a_rotation_in_the_middle_of_its_start_is_quiet_and_loses_nothing(bus, listen, tmp_path, moved):
    """The file is moved away, once, when its start is about to run the program."""
    program, suffix = moved.split()
    send(bus.url, "one")
    listener = listen(bus.url)
    listener.start().has_logged("one")
    listener.stop()
    script, file = tmp_path / "bin" / program, listener.file(suffix)
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\n[ -e {file}.1 ] || mv {file} {file}.1\nexec {shutil.which(program)} \"$@\"\n")
    script.chmod(0o755)
    listener.env["PATH"] = f"{script.parent}:{os.environ['PATH']}"
    send(bus.url, "two")
    listener.start()
    wait_until(lambda: "two" in [message["msg"] for message in listener.messages()])
    listener.has_logged(*[message["msg"] for message in listener.messages()])
    assert listener.said() == []
    if suffix == "log":
        assert [line.split("\t")[-1] for line in pathlib.Path(f"{file}.1").read_text().splitlines()] == ["one"]


def test_a_LOG_that_was_moved_alone_is_made_anew_from_FULL(bus, listen):
    listener = listen(bus.url)
    send(bus.url, "one")
    listener.start().has_logged("one")
    listener.file("log").unlink()
    send(bus.url, "two")
    listener.has_logged("one", "two")


def test_a_symbolic_link_in_place_of_a_rotated_file_is_not_followed(bus, listen, tmp_path):
    listener = listen(bus.url).start()
    wait_until(lambda: listener.file("heartbeat").exists())
    listener.file("jsonl").unlink()
    listener.file("jsonl").symlink_to(tmp_path / "target")
    assert listener.process.wait(PATIENCE) == 2
    assert "symbolic link" in listener.said()[-1] and not (tmp_path / "target").exists()


# ── The first contract ───────────────────────────────────────────────────────────────────────────────────────────────


def reset(request):
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


@pytest.mark.parametrize("drop", [b"", reset], ids=["closed", "reset"])
def test_a_server_that_drops_the_connection_on_last_is_read_from_0(scripted, listen, drop):
    old = {"ts": 1795205226.5, "from": "dell", "msg": "hi"}
    empty = answer({"messages": [], "now": 1795205299.5})
    server = scripted(drop, answer({"messages": [old], "now": 1795205299.5}), empty)
    listener = listen(server.url).start()
    assert [poll["since"] for poll in server.polled(3)[:3]] == ["last", "0", "1795205226.5"]
    assert [one["msg"] for one in listener.messages()] == ["hi"] and listener.said() == []


def test_a_bus_that_dropped_the_connection_once_is_asked_for_last_again(scripted, listen):
    server = scripted(b"", mail(message(TICK - 5, msg="read long ago")), mail(message(TICK)), NO_MAIL)
    listener = listen(server.url).start()
    assert [poll["since"] for poll in server.polled(4)[:4]] == ["last", "0", "last", "1795205226.000007"]
    assert [one["msg"] for one in listener.messages()] == ["hi"]


# ── A clock that is wrong ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("bad", [
    mail(now=FUTURE / 1e6), mail(message(FUTURE)), mail(message(TICK + 1), message(FUTURE), now=FUTURE / 1e6),
    mail(message(FUTURE), bus=None, now=FUTURE / 1e6),
], ids=["now", "a message", "the last message", "the first contract"])  # fmt: skip
def test_an_answer_from_the_future_moves_no_cursor_and_is_named(scripted, listen, bad):
    first = json.loads(bad.partition(b"\r\n\r\n")[2]).get("bus") or ""
    server = scripted(mail(message(TICK), bus=first), bad, mail(message(TICK + 2), bus=first), mail(bus=first))
    listener = listen(server.url).start()
    since = [poll["since"] for poll in server.polled(4)[:4]]
    assert since[1] == since[2] and float(since[3]) == (TICK + 2) / 1e6
    assert [one["ts"] for one in listener.messages()] == [TICK / 1e6, (TICK + 2) / 1e6]
    assert "far ahead" in listener.said()[0] and "works again" in listener.said()[1]


@pytest.mark.parametrize("number", ["f" * 13, "0\n9999999999", f"{TICK + 9:x}\n9999999999"])
def test_an_id_that_does_not_fit_its_ts_moves_no_cursor_into_the_future(scripted, listen, number):
    server = scripted(mail(message(TICK, id=number)), NO_MAIL, mail(message(TICK + 2)), NO_MAIL)
    listener = listen(server.url).start()
    assert abs(float(server.polled(2)[1]["since"]) - TICK / 1e6) < 1
    listener.wait_for_line(2)
    listener.stop()


@pytest.mark.parametrize("ts", [-5, 1e-7])
def test_a_ts_that_is_no_cursor_is_not_taken_from_any_server(scripted, listen, ts):
    """A bus would refuse it, now and after each restart."""
    server = scripted(mail(message(TICK)), mail(message(TICK + 1, ts=ts)), mail(message(TICK + 2)), NO_MAIL)
    listener = listen(server.url).start()
    listener.wait_for_line(2)
    assert [one["ts"] for one in listener.messages()] == [TICK / 1e6, (TICK + 2) / 1e6]


def test_if_healthz_of_the_same_bus_has_the_same_time_it_is_our_clock_that_is_wrong(scripted, listen):
    late = message(FUTURE)
    health = answer({"ok": True, "now": FUTURE / 1e6, "bus": "bus-1"})
    server = scripted(mail(late), mail(late), mail(late), health, mail(now=FUTURE / 1e6))
    listener = listen(server.url).start()
    listener.wait_for_line(1)
    assert [poll["path"] for poll in server.polled(5)[:5]] == 3 * ["/recv"] + ["/healthz", "/recv"]


# ── Where it runs ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_without_HOME_it_writes_where_the_python_clients_do(scripted, tmp_path):
    """The default folder is only compared, not written to: it is the real home of this user."""
    server = scripted(answer({"error": "enough"}, "403 Forbidden"))
    env = {"AGENT_NAME": "spark", "AGENT_BUS_URL": server.url, "XDG_STATE_HOME": str(tmp_path / "xdg")}
    done = subprocess.run(["env", "-i", *(f"{k}={v}" for k, v in env.items()), SCRIPT],
                          capture_output=True, text=True, timeout=PATIENCE)  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "bus_listener: enough\n")
    assert (tmp_path / "xdg/agent-bus/listener/spark.jsonl").exists()
    text = pathlib.Path(SCRIPT).read_text()
    part = text[text.index("dir=${AGENT_BUS_STATE_DIR") : text.index("{ mkdir -p")]
    for home in ({}, {"HOME": "/here"}):
        said = subprocess.run(["bash", "-c", f"set -u; die() {{ exit $1; }}\n{part}\necho $dir"], env=home,
                              capture_output=True, text=True)  # fmt: skip
        code = "import os, bus_recv; print(os.path.join(bus_recv.state_directory(), 'listener'))"
        theirs = subprocess.run([shutil.which("python3"), "-c", code], env=home, capture_output=True, text=True,
                                cwd=os.path.dirname(SCRIPT))  # fmt: skip
        assert said.stdout == theirs.stdout and said.stdout.startswith("/"), (said, theirs)


@pytest.mark.parametrize("flock", [
    "echo 'flock: 7: No locks available' >&2; exit 71", "echo 'flock: No locks available' >&2; exit 1", None,
])  # fmt: skip
def test_where_locks_do_not_work_it_says_so(listen, tmp_path, flock):
    path = path_with(tmp_path, "env bash curl jq chmod dd grep mkdir mkfifo rm sleep tail touch wc")
    if flock:
        script = pathlib.Path(path, "flock")
        script.write_text(f"#!/bin/sh\n{flock}\n")
        script.chmod(0o755)
    listener = listen("http://127.0.0.1:1", PATH=path).start()
    assert listener.process.wait(PATIENCE) == 2
    (line,) = listener.said()
    folder = listener.home / "listener"
    assert line.startswith(f"bus_listener: locks do not work in {folder}: set AGENT_BUS_STATE_DIR")
    assert ("install flock" in line) == (flock is None)


@pytest.mark.parametrize("content", [
    f"{TOKEN}\n", f"\ufeff{TOKEN}\r\n", f"\n \n{TOKEN}", f"\ufeff\r\n\r\n{TOKEN}\r\n\r\n",
])  # fmt: skip
@pytest.mark.parametrize("variable", ["AGENT_BUS_TOKEN", "AGENT_BUS_TOKEN_FILE"])
def test_a_token_with_a_byte_order_mark_or_empty_lines_is_read(scripted, listen, tmp_path, content, variable):
    asked = threading.Event()

    def check(request):
        if request.headers["Authorization"] == f"Bearer {TOKEN}":
            asked.set()
        request.wfile.write(NO_MAIL)

    path = tmp_path / "token"
    path.write_bytes(content.encode())
    path.chmod(0o600)
    listen(scripted(check).url, **{variable: str(path) if variable.endswith("FILE") else content}).start()
    assert asked.wait(PATIENCE)


@pytest.mark.parametrize("content", [f"{TOKEN}\n{TOKEN}".encode(), f"x: {TOKEN}".encode(), TOKEN.encode("utf-16")])
def test_a_file_that_holds_more_than_a_token_is_refused(listen, tmp_path, content):
    (tmp_path / "token").write_bytes(content)
    (tmp_path / "token").chmod(0o600)
    listener = listen("http://127.0.0.1:1", AGENT_BUS_TOKEN_FILE=str(tmp_path / "token")).start()
    assert listener.process.wait(PATIENCE) == 2
    assert "no token" in listener.said()[0]


def test_a_login_in_the_url_is_refused_and_not_shown(listen):
    listener = listen("http://me:secret@127.0.0.1:1").start()
    assert listener.process.wait(PATIENCE) == 2
    assert "login" in listener.said()[0] and "secret" not in "".join(listener.said())


def test_a_login_of_the_proxy_is_sent(scripted, listen):
    seen = []

    def note(request):
        seen.append(request.headers["Proxy-Authorization"])
        request.wfile.write(NO_MAIL)

    proxy = scripted(note).url.replace("//", "//me:p%20w@")
    listen("http://bus.example:8080", http_proxy=proxy).start()
    wait_until(lambda: seen)
    assert seen[0] == "Basic bWU6cCB3"  # me:p w


HIDDEN = "a\ufe0fb\u115fc\u3164d\uffa0e\u2800f\u206ag\ufffbh\U000e0100i\u180bj\u034fk"


def test_what_cannot_be_seen_is_a_blank_in_LOG(bus, listen):
    send(bus.url, HIDDEN)
    listener = listen(bus.url).start()
    listener.wait_for_line(1)
    wait_until(listener.log)
    assert listener.log()[0][5] == "a b c d e f g h i j k"
