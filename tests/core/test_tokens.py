"""The file of tokens, as operators and accidents treat it."""
import fcntl
import json
import os
import pathlib
import sys
import time

import pytest

import bus_server
from tests.core.test_identity import ask
from tests.kit import forked
from tests.kit.peers import invite
from tests.kit.processes import PATIENCE, ROOT, Server, wait_until


def test_tokens_that_cannot_be_read_shut_the_bus_and_stop_nothing_else(bus):
    """They are tokens, so it is no longer open; and polls still end, which is the work of the sweep that reads them."""
    assert ask(bus, "GET", "/agents")[0] == 200
    replaced(pathlib.Path(f"{bus.db}.tokens"), "no JSON\n")
    wait_until(lambda: ask(bus, "GET", "/agents")[0] == 401)
    wait_until(lambda: "cannot read the tokens" in bus.log.read_text())
    pathlib.Path(f"{bus.db}.tokens").unlink()
    token = invite(bus, "spark")
    assert ask(bus, "GET", "/recv?to=spark&wait=0.3", token=token)[1]["messages"] == []
    assert bus.log.read_text().count("cannot read the tokens") == 1


def test_a_clock_that_was_ahead_for_a_moment_ends_no_token(tmp_path, monkeypatch):
    bus_server.invite(["spark", "--db", str(tmp_path / "bus.db"), "--expires", "90d", "--yes"])
    tokens, real = bus_server.Tokens(str(tmp_path / "bus.db")), time.time
    assert len(tokens.valid) == 1
    for ahead, good in ((91 * 86400, 0), (0, 1), (91 * 86400, 0)):
        monkeypatch.setattr(time, "time", lambda: real() + ahead)  # noqa: B023
        tokens.refresh()
        assert len(tokens.valid) == good


def replaced(path, text):
    """At once, as the commands do: no look of the bus meets half of it."""
    fresh = path.with_suffix(".fresh")
    fresh.write_text(text)
    fresh.replace(path)


@pytest.mark.parametrize("damaged", ["{", ""])
def test_a_known_token_is_good_while_the_file_is_damaged(bus, damaged):
    token = invite(bus, "spark")
    path = pathlib.Path(f"{bus.db}.tokens")
    good = path.read_text()
    wait_until(lambda: ask(bus, "GET", "/recv?to=spark", token=token)[0] == 200)
    replaced(path, damaged)
    wait_until(lambda: "cannot read the tokens" in bus.log.read_text())
    assert ask(bus, "GET", "/recv?to=spark&wait=0.3", token=token)[0] == 200
    replaced(path, good.replace('"revoked": null', '"revoked": 1'))
    wait_until(lambda: ask(bus, "GET", "/recv?to=spark", token=token)[0] == 401)


@pytest.mark.parametrize("damaged", ["no JSON\n", ""])
def test_a_bus_with_damaged_tokens_does_not_start(tmp_path, damaged):
    """It would be open to everybody if a file that has lost its tokens were one that never had any."""
    (tmp_path / "bus.db.tokens").write_text(damaged)
    command = [sys.executable, str(ROOT / "bus_server.py"), "--port", "0", "--db", str(tmp_path / "bus.db")]
    done = forked.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and "cannot read the tokens" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, as an operator with sudo is")
def test_what_root_invites_belongs_to_whom_the_bus_belongs_to(tmp_path):
    folder = tmp_path / "state"
    folder.mkdir()
    os.chown(folder, 65534, 65533)
    bus = Server(folder / "bus.db")
    invite(bus, "spark")
    made = {path.name: path.stat() for path in folder.iterdir()}
    assert set(made) == {"bus.db.tokens", "bus.db.tokens.lock"}
    for status in made.values():
        assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (65534, 65533, 0o600)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, as an operator with sudo is")
@pytest.mark.parametrize("command", ["invite", "prune"])
def test_what_root_makes_beside_a_database_belongs_to_whom_that_belongs_to(command, tmp_path):
    """Also in a folder of root; and what was there stays whose it was, else the bus could not start again."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    bus_server.State(str(folder / "bus.db")).close()
    for path in folder.iterdir():
        os.chown(path, 65534, 65533)
    arguments = {"invite": ["ann", "--yes"], "prune": ["--older", "0"]}
    bus_server.run_command(command, *arguments[command], "--db", str(folder / "bus.db"))
    assert {path.name: path.stat().st_uid for path in folder.iterdir() if path.stat().st_uid != 65534} == {}


def test_a_link_is_not_written_through(tmp_path):
    """Root may run the command in a folder of another user, who could have laid one."""
    target = tmp_path / "target"
    target.write_text("precious")
    (tmp_path / "bus.db.tokens.new").symlink_to(target)
    command = [sys.executable, str(ROOT / "bus_server.py"), "invite", "spark", "--db", str(tmp_path / "bus.db")]
    done = forked.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, target.read_text()) == (0, "precious")
    assert not (tmp_path / "bus.db.tokens").is_symlink() and not (tmp_path / "bus.db.tokens.new").is_symlink()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, as an operator with sudo is")
def test_a_file_that_another_user_has_laid_does_not_become_the_tokens(tmp_path):
    """It stayed that user's, who could write tokens into it afterwards."""
    laid = tmp_path / "bus.db.tokens.new"
    laid.touch()
    os.chown(laid, 65534, 65533)
    bus_server.run_command("invite", "ann", "--yes", "--db", str(tmp_path / "bus.db"))
    assert (tmp_path / "bus.db.tokens").stat().st_uid == 0 and not laid.exists()


def test_a_row_of_another_shape_shuts_the_bus_and_ends_nothing(bus):
    pathlib.Path(f"{bus.db}.tokens").write_text(json.dumps({"id": "abt_00000000"}) + "\n")
    wait_until(lambda: "a line in it is not a token" in bus.log.read_text())
    assert ask(bus, "GET", "/agents")[0] == 401 and bus.process.poll() is None


NEEDS_ROOT = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="makes files of others")
ROW = {"id": "abt_00000000", "hash": "0" * 64, "name": "eve", "also": [], "send_only": False, "operator": True,
       "made": 1, "revoked": None}  # fmt: skip


def plant(path, what, text):
    """Another user puts this there, at once."""
    fresh = path.with_suffix(".fresh")
    if what == "pipe":
        os.mkfifo(fresh)
    elif what == "folder":
        fresh.mkdir()
    else:
        fresh.write_text(text)
        fresh.chmod(0o644 if what == "file" else 0)
    os.chown(fresh, 65534, 65533)
    fresh.replace(path)


@NEEDS_ROOT
@pytest.mark.parametrize("what", ["file", "pipe"])
def test_tokens_of_another_user_neither_close_a_bus_nor_let_that_user_in(bus, what):
    """In a folder where others may create files, as /tmp. The bus was closed, but to that user; or stood still."""
    plant(pathlib.Path(f"{bus.db}.tokens"), what, json.dumps(ROW) + "\n")
    wait_until(lambda: "bus.db.tokens is no plain file of yours" in bus.log.read_text())
    assert ask(bus, "GET", "/agents")[0] == 200
    pathlib.Path(f"{bus.db}.tokens").unlink()
    assert ask(bus, "GET", "/agents", token=invite(bus, "spark"))[0] == 200 and ask(bus, "GET", "/agents")[0] == 401


@NEEDS_ROOT
def test_a_bus_does_not_start_with_tokens_of_another_user(tmp_path):
    plant(tmp_path / "bus.db.tokens", "file", json.dumps(ROW) + "\n")
    command = [sys.executable, str(ROOT / "bus_server.py"), "--port", "0", "--db", str(tmp_path / "bus.db")]
    done = forked.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and "is no plain file of yours" in done.stderr and done.stderr.count("\n") == 1


@NEEDS_ROOT
@pytest.mark.parametrize("what", ["file", "pipe", "folder", "link"])
def test_a_request_of_another_user_removes_nothing_and_stops_nobody(bus, tmp_path, what):
    request, text = pathlib.Path(f"{bus.db}.prune"), json.dumps({"before": 1 << 60, "fetched_only": False})
    assert ask(bus, "POST", "/send", {"from": "alice", "to": "bob", "msg": "x"})[0] == 200
    if what == "link":
        tmp_path.chmod(0o1777)
        (tmp_path / "ours").write_text(text)
        request.symlink_to(tmp_path / "ours")
    else:
        plant(request, what, text)
    for _ in range(2):
        assert ask(bus, "GET", "/recv?to=eve&wait=0.3")[0] == 200  # the sweep that ends this poll looks for a request
    assert len(ask(bus, "GET", "/log?to=bob")[1]["messages"]) == 1


@NEEDS_ROOT
def test_the_url_in_a_lock_file_of_another_user_is_in_no_invitation(tmp_path):
    """Who joins by that line would send the token there."""
    lock = tmp_path / "bus.db.lock"
    plant(lock, "file", "http://127.0.0.1:9\n0.2.0\n")
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        path, program = str(tmp_path / "bus.db"), str(ROOT / "bus_server.py")
        command = [sys.executable, program, "invite", "spark", "--yes", "--db", path]
        done = forked.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert "127.0.0.1:9" not in done.stdout + done.stderr
    assert done.returncode == 2 and "bus.db.lock is no plain file of yours" in done.stderr


@pytest.mark.parametrize("suffix", [".tokens", ".lock", ".restoring", "-wal"])
def test_a_pipe_beside_the_database_holds_up_no_start(tmp_path, suffix):
    bus_server.State(str(tmp_path / "bus.db")).close()
    (tmp_path / f"bus.db{suffix}").unlink(missing_ok=True)
    os.mkfifo(tmp_path / f"bus.db{suffix}")
    command = [sys.executable, str(ROOT / "bus_server.py"), "--port", "0", "--db", str(tmp_path / "bus.db")]
    done = forked.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1
