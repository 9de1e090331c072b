"""The server as a process: how it starts, refuses to start, drains, removes what is old, and tells."""
import contextlib
import http.client
import json
import os
import re
import shlex
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from bus_server import State, unwritable
from tests.kit import forked
from tests.kit.clock import Clock
from tests.kit.peers import run
from tests.kit.processes import PATIENCE, ROOT, SERVER, Server, free_port, wait_until
from tests.kit.wire import Peer, a_bus


def refused(*options, **env):
    """Start a server that must not start; returns its one line."""
    command = [sys.executable, str(ROOT / "bus_server.py"), *map(str, options)]
    done = forked.run(command, capture_output=True, text=True, timeout=PATIENCE, env={**os.environ, **env})
    assert done.returncode == 2 and not done.stdout, done
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def send(bus, to="bob", msg="x", **members):
    peer = http.client.HTTPConnection("127.0.0.1", bus.port, timeout=PATIENCE)
    with contextlib.closing(peer):
        peer.request("POST", "/send", json.dumps({"from": "alice", "to": to, "msg": msg, **members}))
        return json.loads(peer.getresponse().read())


def recv(bus, query):
    return json.loads(bus.get(f"/recv?{query}"))


def test_a_busy_port_is_one_clear_line(bus, tmp_path):
    said = refused("--port", bus.port, "--db", tmp_path / "other.db")
    assert f"port {bus.port}: Address already in use: an agent-bus has this port; choose another --port" in said
    assert "AGENT_BUS_URL" in said


@pytest.mark.parametrize("answer", [b"HTTP/1.0 200 OK\r\n\r\nhello", b"\x15\x03\x01\x00\x02\x02\x16", b""])
def test_a_port_of_another_program_is_said_to_be_one(tmp_path, answer):
    """Also if it is silent, or speaks TLS."""
    with socket.create_server(("127.0.0.1", 0)) as other, ThreadPoolExecutor() as pool:

        def serve():
            peer, _ = other.accept()
            with peer:
                peer.sendall(answer)
                peer.recv(4096)

        serving = pool.submit(serve)
        said = refused("--port", other.getsockname()[1], "--db", tmp_path / "bus.db")
        serving.result(PATIENCE)
    assert "another program, or the system (if below 1024), has this port; choose another --port" in said


@pytest.mark.parametrize("host", ["192.0.2.1", "not a host"])
def test_a_host_that_is_not_this_machine_is_said_to_be_none(tmp_path, host):
    said = refused("--open", "--host", host, "--port", 0, "--db", tmp_path / "bus.db")
    assert "--host must be an address of this machine, without a port" in said


def test_a_host_that_cannot_be_a_name_is_one_clear_line(tmp_path):
    said = refused("--open", "--host", "a..b", "--port", 0, "--db", tmp_path / "bus.db")
    assert said.endswith("cannot listen on 'a..b': no host has such a name: --host must be an address\n")


def test_a_certificate_for_a_unix_socket_alone_is_refused_in_words(tmp_path, authority):
    """It would be unused, and after SIGHUP the socket would speak TLS."""
    socket_alone = "--listen", f"unix:{tmp_path}/socket", "--db", tmp_path / "bus.db"
    certificate, key = authority.self_signed("IP:127.0.0.1")
    said = refused(*socket_alone, "--tls-cert", certificate, "--tls-key", key)
    assert "--tls-cert is for a port, and this bus has only Unix sockets: give --port too, or leave it out" in said


def test_an_extension_is_left_out_by_a_shortened_option_too(tmp_path):
    with Server(tmp_path / "bus.db", "--witho", "redact") as bus:
        loaded = [bus.process.stdout.readline() for _ in range(2)][1]
        assert loaded.startswith(b"extensions: ") and b"redact" not in loaded


def test_a_method_that_there_is_not_gets_501_however_large_its_body_is(bus):
    for size in (2, 20_000):
        peer = http.client.HTTPConnection("127.0.0.1", bus.port, timeout=PATIENCE)
        with contextlib.closing(peer):
            peer.request("PATCH", "/send", b"x" * size)
            assert peer.getresponse().status == 501


def test_a_command_that_holds_the_database_is_not_taken_for_the_bus_that_was_there_before(bus):
    assert bus.stop() == 0
    with contextlib.closing(State(str(bus.db))):
        said = refused("--port", 0, "--db", bus.db)
    assert "in use by another bus_server: stop" in said and bus.url not in said


def test_a_second_server_on_the_same_database_is_told_the_first_one_and_the_option(bus):
    said = refused("--port", 0, "--db", bus.db)
    assert f"in use by {bus.url}: stop that bus, or give another --db\n" in said


def has_ipv6():
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return socket.has_dualstack_ipv6()
    return False


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_a_bus_on_every_ipv6_address_answers_ipv4_too(tmp_path):
    with Server(tmp_path / "bus.db", "--host", "::", "--open") as bus:
        for host, own in (("127.0.0.1", "four"), ("[::1]", "six")):
            with urllib.request.urlopen(f"http://{host}:{bus.port}/recv?to={own}", timeout=PATIENCE) as answer:
                assert json.load(answer)["messages"] == []
        found = {each["name"]: each["address"] for each in json.loads(bus.get("/agents"))["agents"]}
        assert found == {"four": "127.0.0.1", "six": "::1"}
        assert "IPv6 only" not in bus.log.read_text()


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_a_bus_that_cannot_answer_ipv4_too_says_so(tmp_path):
    cannot = f"import socket; socket.has_dualstack_ipv6 = lambda: False; {SERVER}"
    with Server(tmp_path / "bus.db", "--host", "::", "--open", program=("-S", "-c", cannot)) as bus:
        assert bus.stop() == 0
        assert "IPv6 only: start with --host 0.0.0.0" in bus.log.read_text()


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_a_host_may_be_in_brackets_as_in_the_url_that_the_bus_prints(tmp_path):
    with Server(tmp_path / "bus.db", "--host", "[::1]") as bus:  # loopback, so that it needs no token
        answer = urllib.request.urlopen(f"http://[::1]:{bus.port}/healthz", timeout=PATIENCE)
        assert json.load(answer)["ok"]


@pytest.mark.parametrize("host, url", [
    ("10.215.15.1", "http://10.215.15.1:8081"), ("fd00::1", "http://[fd00::1]:8081"),
    ("0.0.0.0", f"http://{socket.gethostname()}:8081"), ("::", f"http://{socket.gethostname()}:8081"),
])  # fmt: skip
def test_the_invitation_that_a_refused_start_names_gives_the_line_to_run(host, url, tmp_path):
    said = refused("--host", host, "--port", 8081, "--db", tmp_path / "bus.db")
    [command] = re.findall(r"make a token first \((.*)\), or give --open", said)
    assert f" NAME --url {shlex.quote(url)} --db " in command
    done = forked.run(shlex.split(command.replace("NAME", "dell")), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0 and "/bus_join.py) && " in done.stdout and f" {shlex.quote(url)} dell " in done.stdout
    assert "--url" not in refused("--host", host, "--port", 0, "--db", tmp_path / "other.db"), "it has no port yet"


def test_a_name_that_is_none_is_shown_as_it_was_given(bus):
    assert send(bus, to="b\u00f6b\x1b")["error"].endswith("not 'b\u00f6b\\x1b'")


@pytest.mark.parametrize("rest", ["", "xyz", "660ba678a1b40"])
def test_an_id_of_no_message_is_named(rest, bus):
    with pytest.raises(urllib.error.HTTPError) as refused:
        bus.get(f"/message/{rest}")
    assert refused.value.code == 404 and f"there is no message '{rest}'" in json.load(refused.value)["error"]


def test_an_unusable_database_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "text.db").write_text("this is no database " * 100)
    for below in ("bus.db", "agent-bus/bus.db"):
        said = refused("--port", 0, "--db", tmp_path / "file" / below)
        assert said.endswith(f": {tmp_path}/file is a file, not a folder; --db gives another place\n")
    said = refused("--port", 0, "--db", tmp_path / "bus.db", "--files-dir", tmp_path / "file")
    assert said.endswith(f"--files-dir: {tmp_path}/file is a file, not a folder\n")
    code, _, err = run("invite", "x", "--db", tmp_path / "file" / "bus.db")
    assert code == 2 and err.endswith(f": {tmp_path}/file is a file, not a folder; --db gives another place\n")
    assert "not a database" in refused("--port", 0, "--db", tmp_path / "text.db")
    newer = sqlite3.connect(tmp_path / "newer.db")
    newer.execute("PRAGMA user_version=99")
    newer.close()
    assert "newer bus_server" in refused("--port", 0, "--db", tmp_path / "newer.db")


@pytest.mark.parametrize("journal", [None, "delete"])
def test_beside_a_file_of_another_program_nothing_is_put(journal, tmp_path):
    file = tmp_path / "README.md"
    if journal:
        with contextlib.closing(sqlite3.connect(file)) as database:
            database.executescript(f"PRAGMA journal_mode={journal}; CREATE TABLE t(x)")
    else:
        file.write_text("# A text\n")
    before = file.read_bytes()
    said = refused("--port", 0, "--db", file)
    assert ("is not a database of agent-bus: choose another --db" if journal else "file is not a database") in said
    assert [*tmp_path.iterdir()] == [file] and file.read_bytes() == before


def test_the_path_of_the_messages_is_whole(tmp_path):
    command = [sys.executable, str(ROOT / "bus_server.py"), "--port", "0", "--db", "../bus.db"]
    (tmp_path / "here").mkdir()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path / "here") as server:
        server.stdout.readline()
        assert server.stdout.readline() == f"messages are in {tmp_path / 'bus.db'}\n"
        server.terminate()
        assert server.wait(PATIENCE) == 0


@pytest.mark.parametrize("command", [["--port", "0"], ["tokens"], ["invite", "x", "--yes"], ["revoke", "x"], ["prune"],
                                     ["backup", "copy"], ["restore", "copy"]])  # fmt: skip
def test_a_folder_is_no_database_and_the_error_has_a_path_that_is(command, tmp_path):
    for folder in (tmp_path, f"{tmp_path / 'new'}/"):
        code, _, err = run(*command, "--db", folder)
        said = f"error: argument --db: {folder} is a folder: give a file in it, like {os.path.join(folder, 'bus.db')}\n"
        assert code == 2 and err.endswith(said) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong, says", [
    ("invte", ": did you mean invite?\n"), ("Tokens", ": did you mean tokens?\n"),
    ("bakcup", ": did you mean backup?\n"),
    ("start", "without one, the bus runs\n"),
])  # fmt: skip
def test_a_command_that_does_not_exist_gets_the_one_that_may_be_meant(wrong, says):
    code, out, err = run(wrong, "dell")
    assert (code, out) == (2, "") and err.startswith(f"bus_server: there is no command {wrong!r}: ")
    assert err.endswith(says) and err.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_one_clear_line(tmp_path):
    tmp_path.chmod(0o500)
    said = refused("--port", 0, "--db", tmp_path / "bus.db")
    assert f"you may not write {tmp_path}; --db gives another place" in said


@pytest.mark.parametrize("shut, found", [("bus.db", "bus.db"), ("", "")])
def test_what_may_not_be_written_is_named(shut, found, tmp_path, monkeypatch):
    """SQLite says only `attempt to write a readonly database`, of a file or of its folder."""
    (tmp_path / "bus.db").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path / shut))  # root may write all
    said = unwritable(str(tmp_path / "bus.db"), sqlite3.OperationalError("attempt to write a readonly database"))
    assert said == f"you may not write {tmp_path / found}; --db gives another place"


def test_the_folder_that_may_not_be_entered_is_named(tmp_path, monkeypatch):
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: "/shut/" not in str(path) and exists(path))
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("/shut"))
    (tmp_path / "shut").mkdir()
    said = unwritable(str(tmp_path / "shut/.local/state/bus.db"), PermissionError(13, "Permission denied"))
    assert said == f"you may not write {tmp_path / 'shut'}; --db gives another place"


@pytest.mark.parametrize("wrong, right", [
    (["--prot", "8080"], "--port"), (["--prot=8080"], "--port"), (["tokens", "--dbb", "x"], "--db"),
    (["invite", "ann", "--expirse", "3d"], "--expires"),
])  # fmt: skip
def test_an_option_that_does_not_exist_gets_the_one_that_may_be_meant(wrong, right, tmp_path):
    code, out, err = run(*wrong)
    assert (code, out) == (2, "") and re.search(f"unrecognized arguments: --.*: did you mean {right}\\b", err), err
    assert "did you mean" not in run("--zzzzzz")[2]


@pytest.mark.parametrize("options", [["--host", "0.0.0.0"], ["--tls-cert", "/nowhere"], []])
def test_a_server_that_never_ran_leaves_no_database_and_one_that_was_there_stays(options, bus, tmp_path):
    """Else `tokens --db` and `invite --db` take it for a bus. The empty lock file stays: another may have it open."""
    options = [*options, "--port", bus.port, "--db", tmp_path / "other.db"]
    refused(*options)
    assert [file.name for file in tmp_path.glob("other.db*")] == ["other.db.lock"]
    with Server(tmp_path / "other.db"):
        pass
    refused(*options)
    assert (tmp_path / "other.db").stat().st_size


@pytest.mark.parametrize(
    "options", [["--port", "70000"], ["--keep", "soon"], ["--max-body", "5"], ["--host", "not a host"]]
)
def test_bad_options_end_with_2(options, tmp_path):
    command = [sys.executable, str(ROOT / "bus_server.py"), "--port", "0", "--db", str(tmp_path / "bus.db"), *options]
    done = forked.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.strip()


def test_the_default_database_is_under_the_users_state_and_private(tmp_path):
    port, env = free_port(), {**os.environ, "HOME": str(tmp_path)}
    env.pop("XDG_STATE_HOME", None)
    command = [sys.executable, str(ROOT / "bus_server.py"), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as server:
        assert server.stdout.readline() == f"listening on http://127.0.0.1:{port}\n"
        path = tmp_path / ".local" / "state" / "agent-bus" / "bus.db"
        assert server.stdout.readline() == f"messages are in {path}\n"
        there = sorted(file.stem for file in (ROOT / "bus_extensions").glob("[a-z]*.py"))
        assert server.stdout.readline() == f"extensions: {', '.join(there)}\n"
        assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
        server.terminate()
        assert server.wait(PATIENCE) == 0


def test_binding_the_world_warns_loudly(tmp_path):
    with Server(tmp_path / "bus.db", "--host", "0.0.0.0", "--open") as bus:
        wait_until(lambda: "WARNING: anyone who can reach 0.0.0.0" in bus.log.read_text())
    with Server(tmp_path / "quiet.db") as bus:
        bus.get("/healthz")
        assert bus.log.read_text() == ""


def test_a_start_on_a_disk_without_room_warns(tmp_path):
    little = SERVER.replace("sys.exit", "bus_server.RESERVE_BYTES = 1 << 60; sys.exit")
    with Server(tmp_path / "bus.db", program=("-S", "-c", little)) as bus:
        wait_until(lambda: "MiB free: each send gets 507 until you make room" in bus.log.read_text())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_drain_answers_the_parked_and_exits_0(bus, number):
    answers = []
    reader = threading.Thread(target=lambda: answers.append(recv(bus, "to=bob&since=0&block=true")))
    reader.start()
    wait_until(lambda: b'"bob"' in bus.get("/agents"))
    bus.process.send_signal(number)
    assert bus.process.wait(PATIENCE) == 0
    reader.join(PATIENCE)
    assert answers[0]["messages"] == []


def test_a_drain_refuses_what_is_half_there_in_words(bus):
    with socket.create_connection(("127.0.0.1", bus.port), timeout=PATIENCE) as peer:
        peer.sendall(b"POST /send HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\nExpect: 100-continue\r\n\r\n{")
        assert peer.recv(25, socket.MSG_WAITALL) == b"HTTP/1.1 100 Continue\r\n\r\n"  # so the bus has read the head
        bus.process.terminate()
        answer = b"".join(iter(lambda: peer.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 503 ") and b"Retry-After: 1" in answer and b'{"error"' in answer
    assert bus.process.wait(PATIENCE) == 0


def test_marks_survive_a_restart(bus):
    first = send(bus, "bob")
    recv(bus, f"to=bob&since={first['ts']}")
    later = send(bus, "bob", "later")
    assert bus.stop() == 0
    bus.start()
    [message] = recv(bus, "to=bob&since=last")["messages"]
    assert message["id"] == later["id"]
    [agent] = json.loads(bus.get("/agents?name=bob"))["agents"]
    assert agent["name"] == "bob" and agent["last_seen"] > 0


def test_a_reader_that_hangs_up_while_its_cursor_is_written_down_is_not_parked(bus):
    with socket.create_connection(("127.0.0.1", bus.port), timeout=PATIENCE) as peer:
        ahead = f"to=bob&since={time.time() + 100:.6f}&wait=60"
        peer.sendall(f"GET /recv?{ahead} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        peer.shutdown(socket.SHUT_WR)
        assert b'"messages": []' in b"".join(iter(lambda: peer.recv(65536), b""))


def test_a_group_that_somebody_reads_as_their_own_has_unread_what_they_did_not_read(bus):
    def unread():
        return json.loads(bus.get("/inbox"))["recipients"]["default"]["team"]

    send(bus, "team")
    send(bus, "team")
    recv(bus, "to=bob,team&since=0&max=1")
    assert unread() == 1
    recv(bus, "to=team&since=now")
    assert unread() == 2


def test_what_expired_during_its_commit_does_not_reach_a_parked_reader(bus):
    with ThreadPoolExecutor() as pool:
        reader = pool.submit(recv, bus, "to=bob&since=0&block=true")
        wait_until(lambda: b'"bob"' in bus.get("/agents"))
        send(bus, "bob", "gone", ttl=1e-6)
        send(bus, "bob", "here")
        assert [message["msg"] for message in reader.result(PATIENCE)["messages"]] == ["here"]


def test_old_messages_are_removed_and_a_reader_behind_is_told(tmp_path):
    with Server(tmp_path / "bus.db", "--keep", "0") as bus:
        sent = send(bus, "bob", "old")
        send(bus, "eve", "old")
        bus.stop()
        bus.command += ["--keep", "1s"]
        wait_until(lambda: time.time() > sent["ts"] + 1)
        bus.start()
        gap = wait_until(lambda: recv(bus, "to=bob&since=0").get("gap"))
        assert gap["from"] == 0 and gap["to"] == sent["ts"]
        assert "gap" not in recv(bus, f"to=bob&since={sent['ts']}") and "gap" in recv(bus, "to=eve&since=last")
        plain = wait_until(lambda: text(bus, "/recv?to=bob&since=0"))
        assert plain.startswith("-- messages from ") and "are gone" in plain


def text(bus, path):
    peer = http.client.HTTPConnection("127.0.0.1", bus.port, timeout=PATIENCE)
    with contextlib.closing(peer):
        peer.request("GET", path, headers={"Accept": "text/plain"})
        return peer.getresponse().read().decode()


def test_the_access_log_is_only_there_when_asked_for(tmp_path):
    with Server(tmp_path / "bus.db", "--verbose") as bus:
        bus.get("/healthz")
        assert '"GET /healthz HTTP/1.1" 200' in wait_until(bus.log.read_text)
    with Server(tmp_path / "quiet.db") as bus:
        bus.get("/healthz")
        assert bus.stop() == 0 and bus.log.read_text() == ""


def test_it_all_runs_isolated_without_site_packages(tmp_path):
    """-I -S: no environment, no site-packages: proof that the standard library is enough."""
    port = free_port()
    isolated = [sys.executable, "-I", "-S"]
    env = {
        **os.environ,
        "AGENT_BUS_URL": f"http://127.0.0.1:{port}",
        "AGENT_NAME": "spark",
        "AGENT_BUS_STATE_DIR": str(tmp_path),
    }
    command = [*isolated, str(ROOT / "bus_server.py"), "--port", str(port), "--db", str(tmp_path / "bus.db")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        assert server.stdout.readline().startswith(b"listening on")
        sent = subprocess.run(
            [*isolated, str(ROOT / "bus_send.py"), "bob"], input=b"hi\n", env=env, capture_output=True, timeout=PATIENCE
        )
        read = subprocess.run(
            [*isolated, str(ROOT / "bus_recv.py"), "bob", "--once"], env=env, capture_output=True, timeout=PATIENCE
        )
        server.terminate()
        assert server.wait(PATIENCE) == 0
    assert sent.returncode == 0 and read.returncode == 0, (sent.stderr, read.stderr)
    assert read.stdout.endswith(b"\n| hi\n---\n")


def test_a_connection_that_was_answered_a_moment_ago_keeps_its_descriptor():
    """Its next request may be under way: an hour of faults hung up on three readers that had just got a message."""
    clock = Clock()
    with a_bus(clock) as bus:
        old, fresh = (Peer(bus) for _ in range(2))
        for peer in (old, fresh):
            clock.now += 5
            peer.says(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        bus.door.drop_idle()
        assert (old.aborted, fresh.aborted) == (True, False)
