"""The file of tokens, as operators and accidents treat it."""
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
    assert done.returncode == 2 and "cannot write the tokens" in done.stderr
    assert target.read_text() == "precious"


def test_a_row_of_another_shape_shuts_the_bus_and_ends_nothing(bus):
    pathlib.Path(f"{bus.db}.tokens").write_text(json.dumps({"id": "abt_00000000"}) + "\n")
    wait_until(lambda: "a line in it is not a token" in bus.log.read_text())
    assert ask(bus, "GET", "/agents")[0] == 401 and bus.process.poll() is None
