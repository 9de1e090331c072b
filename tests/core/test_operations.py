"""What the one who runs a bus uses: prune, metrics."""
import contextlib
import errno
import fcntl
import http.client
import json
import os
import pathlib
import re
import signal
import sqlite3
import stat
import subprocess
import sys
import time

import pytest

import bus_server
from tests.kit import forked, inside
from tests.kit.peers import fill, log_of, run
from tests.kit.processes import COMMAND, PATIENCE, ROOT, Server, free_port, in_time, wait_until


def send(bus, to="bob", msg="x", **members):
    peer = http.client.HTTPConnection("127.0.0.1", bus.port, timeout=PATIENCE)
    peer.request("POST", "/send", json.dumps({"from": "alice", "to": to, "msg": msg, **members}))
    answer = peer.getresponse()
    return answer.status, json.loads(answer.read())


def test_prune_removes_what_was_fetched_and_says_what_stays(bus):
    for number in range(3):
        send(bus, "bob", str(number))
        send(bus, "eve", str(number))
    bus.get("/recv?to=bob")
    dry = "prune", "--older", "0", "--dry-run", "--db", bus.db
    told = r"messages from before \S+Z: 6; unfetched or not done, so they stay: 3"
    wait_until(lambda: re.match(told, run(*dry)[1]))
    assert len(log_of(bus, "bob")) == 3, "a dry run removes nothing"
    code, out, _ = run("prune", "--older", "0", "--db", bus.db)
    assert code == 0 and out.endswith("3 removed\n") and (log_of(bus, "bob"), len(log_of(bus, "eve"))) == ([], 3)
    code, out, _ = run("prune", "--older", "0", "--pending", "--db", bus.db)
    assert code == 0 and out.endswith("3 removed\n") and log_of(bus, "eve") == []


def test_prune_needs_no_server_and_spares_the_young(bus):
    fill(bus, "bob", 1200)
    bus.stop()
    assert re.fullmatch(r"messages from before \S+Z: 0\n", run("prune", "--older", "1h", "--db", bus.db)[1])
    assert run("prune", "--older", "0", "--pending", "--db", bus.db)[1].endswith("1200 removed\n")
    bus.start()
    assert log_of(bus, "bob") == []


@pytest.mark.parametrize("running", [True, False])
def test_prune_keeps_a_broadcast_until_each_reader_of_its_channel_has_acknowledged_it(bus, running):
    def prune():
        """What stays, after a restart that writes all marks."""
        bus.stop()
        if running:
            bus.start()
        code, out, _ = run("prune", "--older", "0", "--db", bus.db)
        assert code == 0, out
        if not running:
            bus.start()
        return log_of(bus, "all")

    for query in ("to=bob", "to=eve", "to=carl&channel=lab"):
        bus.get(f"/recv?{query}&since=0&wait=0.01")  # parked: so that it is a reader for longer than ten minutes
    send(bus, "all", "hear me")
    assert prune() == ["hear me"], "nobody has it"
    now = json.loads(bus.get("/recv?to=bob&since=last"), parse_float=str)["now"]
    bus.get("/recv?to=eve&since=last")
    assert prune() == ["hear me"], "both have fetched it"
    bus.get(f"/recv?to=bob&since={now}")
    assert prune() == ["hear me"], "bob has acknowledged it, and eve has not"
    bus.get(f"/recv?to=eve&since={now}")
    assert prune() == [], "carl reads another channel"


def test_prune_of_no_database_is_one_clear_line(tmp_path):
    code, out, err = run("prune", "--db", tmp_path / "none.db")
    assert code == 2 and not out and err.startswith("bus_server: there is no bus with the database")
    assert err.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [["tokens"], ["revoke", "x"], ["invite", "ann", "--yes"], ["prune"],
                                     ["backup", "COPY"]])  # fmt: skip
@pytest.mark.parametrize("version", [None, 0, 3], ids=["a text", "a database", "a database with a version"])
def test_a_file_of_another_program_is_no_bus_and_gets_nothing_beside_it(version, command, tmp_path):
    """`tokens` said that the bus is open, and `invite` made a token."""
    file = tmp_path / "notes.db"
    if version is None:
        file.write_text("hello\n" * 1000)
    else:
        with contextlib.closing(sqlite3.connect(file)) as database:
            database.execute("CREATE TABLE notes(text)")
            database.execute(f"PRAGMA user_version={version}")
    before = file.read_bytes()
    code, out, err = run(*[str(tmp_path / each) if each == "COPY" else each for each in command], "--db", file)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "is not a database of agent-bus: choose" in err or f"cannot use the database {file}: file is not a" in err
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("garbage", [b"", b"[0, NaN, true]", b"[{}, [], 1]", b"[" * 100000, b"[0, %d, true]" % 10**30,
                                     b"\xff", b"null"])  # fmt: skip
def test_an_order_that_makes_no_sense_harms_nobody(bus, garbage):
    pathlib.Path(f"{bus.db}.prune").write_bytes(garbage)
    json.loads(bus.get("/recv?to=bob&wait=0.3"))  # the sweep that ends this poll then looks for orders
    assert send(bus)[0] == 200 and bus.process.poll() is None
    code, out, _ = run("prune", "--older", "0", "--pending", "--db", bus.db)
    assert code == 0 and out.endswith("1 removed\n") and log_of(bus, "bob") == []


def test_prune_ends_though_the_server_ends_before_it(bus):
    send(bus)
    bus.process.send_signal(signal.SIGSTOP)  # it has the database and does nothing
    command = [sys.executable, str(ROOT / "bus_server.py"), "prune", "--older", "0", "--pending", "--db", bus.db]
    with forked.Popen(command, stdout=subprocess.PIPE, text=True) as pruning:
        wait_until(pathlib.Path(f"{bus.db}.prune").exists)
        bus.kill()
        assert pruning.communicate(timeout=PATIENCE)[0].endswith("1 removed\n") and pruning.returncode == 0
    assert not pathlib.Path(f"{bus.db}.prune").exists()


def pruning(bus, *options):
    command = [sys.executable, str(ROOT / "bus_server.py"), "prune", "--older", "0", *options, "--db", bus.db]
    return forked.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def waits_for_its_turn(command):
    waiting = [line.split() for line in pathlib.Path("/proc/locks").read_text().splitlines() if "-> FLOCK" in line]
    return str(command.pid) in [fields[5] for fields in waiting]


@pytest.mark.parametrize("killed", [False, True])
def test_two_prunes_at_once_are_done_one_after_the_other(bus, killed):
    """There is one file for the request: the second one's took the place of the first one's, which was not done."""
    request = pathlib.Path(f"{bus.db}.prune")
    send(bus, "bob", "unfetched")
    send(bus, "eve", "fetched")
    bus.get("/recv?to=eve")
    bus.stop()  # which writes down what was fetched
    bus.start()
    bus.process.send_signal(signal.SIGSTOP)
    with pruning(bus, "--pending") as first, pruning(bus) as second:
        try:
            wait_until(request.exists)
            [waits] = wait_until(lambda: [each for each in (first, second) if waits_for_its_turn(each)])
            if killed:
                (first if waits is second else second).kill()
            bus.process.send_signal(signal.SIGCONT)
            for each in (first, second):
                said = f"waiting for a prune of {bus.db} that is under way\n" if each is waits else ""
                err = each.communicate(timeout=PATIENCE)[1]
                assert (each.returncode, err) == (-signal.SIGKILL if killed and each is not waits else 0, said)
        finally:
            for process in (bus.process, first, second):
                process.send_signal(signal.SIGCONT)
            first.kill()
            second.kill()
    wait_until(lambda: not request.exists())  # perhaps the server does what the killed one has left
    assert killed or log_of(bus, "bob") + log_of(bus, "eve") == []


@pytest.mark.parametrize("first_removes", [False, True])
def test_a_prune_without_a_server_waits_for_another_one_and_counts_only_what_it_removes_itself(bus, first_removes):
    """It took the other for a server of another version, or what that one removed for its own."""
    send(bus)
    bus.stop()
    with open(f"{bus.db}.prune.lock", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        with pruning(bus, "--pending") as second:
            wait_until(lambda: waits_for_its_turn(second))
            if first_removes:
                bus_server.remove_alone(bus.db, 1 << 60, False)
            fcntl.flock(turn, fcntl.LOCK_UN)
            out, err = second.communicate(timeout=PATIENCE)
    said = r": 0\n" if first_removes else r": 1\n1 removed\n"
    assert re.fullmatch(rf"messages from before \S+Z{said}", out) and second.returncode == 0
    assert err == f"waiting for a prune of {bus.db} that is under way\n"


@pytest.mark.parametrize("version", ["0.1.9\n", ""], ids=["another", "one-that-does-not-say"])
def test_prune_beside_a_server_of_another_version_is_refused_in_words_at_once(bus, version):
    """That server may read the request otherwise, or never look for it: the command would wait for ever."""
    send(bus)
    pathlib.Path(f"{bus.db}.lock").write_text(f"{bus.url}\n{version}")
    began = time.monotonic()
    code, out, err = run("prune", "--older", "0", "--pending", "--db", bus.db)
    assert time.monotonic() - began < in_time(2)
    assert code == 2 and err.count("\n") == 1
    assert f"the bus at {bus.url} is version {version.strip() or 'before'}" in err
    assert f"this is {bus_server.VERSION}" in err and "removed" not in out
    assert not pathlib.Path(f"{bus.db}.prune").exists() and log_of(bus, "bob") == ["x"]


def test_prune_beside_a_server_that_is_starting_says_to_try_again(bus):
    """Its lock file is empty until it listens, which a large database may delay."""
    send(bus)
    pathlib.Path(f"{bus.db}.lock").write_text("")
    code, _, err = run("prune", "--older", "0", "--pending", "--db", bus.db)
    assert code == 2 and "is starting" in err and err.endswith("try again in a moment\n")


def test_a_server_says_its_version_so_that_prune_beside_it_works(bus):
    send(bus)
    assert pathlib.Path(f"{bus.db}.lock").read_text() == f"{bus.url}\n{bus_server.VERSION}\n"
    code, out, err = run("prune", "--older", "0", "--pending", "--db", bus.db)
    assert (code, err) == (0, "") and out.endswith("1 removed\n") and log_of(bus, "bob") == []


def test_retention_and_prune_remove_side_by_side_and_none_of_them_is_lost(tmp_path):
    """Each needs several slices. What one of them removes is done with that one: the other still ends."""
    bus, ours = inside.make(tmp_path / "bus.db"), []
    wall = bus_server.wall_clock()
    kept = bus_server.draft({"from": "alice", "to": "bob", "msg": "x"}, None)
    for age in (3000, 2000, 1000):  # s
        bus.state.apply([bus_server.Put([kept] * 1200)], bus_server.Now(wall - age * 1000000, 0))
    bus.last = bus.state.last
    bus.retention.keep, bus.retention.clock_is_trusted = 2500, lambda: True
    apply = bus.state.apply

    def note(operations, now):
        ours.append([operation.before for operation in operations if isinstance(operation, bus_server.Remove)])
        return apply(operations, now)

    bus.state.apply = note
    request = {"before": wall - 1500 * 1000000, "fetched_only": False}
    pathlib.Path(f"{bus.state.path}.prune").write_text(json.dumps(request))
    bus.retention.age()
    bus.retention.look_for_request()
    bus.retention.age()  # while they go on, neither begins a second time
    bus.retention.look_for_request()
    while bus.loop.actions:
        bus.loop.take_turn()
    assert [len(each) for each in ours[:2]] == [1, 2], "they went on one after the other"  # --keep forgets keys first
    assert {before for list_ in ours for before in list_} >= {request["before"]} and len(set(sum(ours, []))) == 2
    [(left, oldest)] = bus.state.view.database.execute("SELECT count(*), min(tick) FROM messages").fetchall()
    assert left == 1200 and oldest == wall - 1000 * 1000000
    assert not pathlib.Path(f"{bus.state.path}.prune").exists(), "the command would wait for ever"
    assert not bus.retention.aging and bus.retention.request is None
    inside.close(bus)


def test_ctrl_c_ends_a_prune_without_a_traceback(bus, interruptible):
    send(bus)
    bus.process.send_signal(signal.SIGSTOP)
    command = [sys.executable, str(ROOT / "bus_server.py"), "prune", "--older", "0", "--pending", "--db", bus.db]
    with forked.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as pruning:
        wait_until(pathlib.Path(f"{bus.db}.prune").exists)
        pruning.send_signal(signal.SIGINT)
        try:
            assert pruning.communicate(timeout=PATIENCE)[1] == "" and pruning.returncode == 130
        finally:
            pruning.kill()  # else it is waited for without an end, as its bus stands


def test_a_prune_that_is_interrupted_takes_its_request_back_and_says_what_was_removed(bus, interruptible):
    """The server went on, or removed all of it at its next start."""
    request = pathlib.Path(f"{bus.db}.prune")
    send(bus)
    bus.process.send_signal(signal.SIGSTOP)
    with pruning(bus, "--pending") as stopped:
        try:
            wait_until(request.exists)
            stopped.send_signal(signal.SIGINT)
            out, err = stopped.communicate(timeout=PATIENCE)
        finally:
            stopped.kill()
            bus.process.send_signal(signal.SIGCONT)
    assert (stopped.returncode, err) == (130, "") and not request.exists()
    assert out.endswith("\nstopped: 0 removed\n")
    json.loads(bus.get("/recv?to=eve&wait=0.3"))  # the sweep that ends this poll has looked for a request
    assert log_of(bus, "bob") == ["x"]


def test_a_server_stops_in_the_middle_of_a_request_that_is_taken_back(tmp_path):
    bus, request = inside.make(tmp_path / "bus.db"), tmp_path / "bus.db.prune"
    kept = bus_server.draft({"from": "alice", "to": "bob", "msg": "x"}, None)
    bus.state.apply([bus_server.Put([kept] * 1200)], bus_server.Now(bus_server.wall_clock(), 0))
    bus.last = bus.state.last

    def left():
        return bus.state.view.database.execute("SELECT count(*) FROM messages").fetchone()[0]

    request.write_text(json.dumps({"before": 1 << 60, "fetched_only": False}))
    bus.retention.look_for_request()
    wait_until(lambda: bus.loop.take_turn() or left() < 1200)
    request.unlink()
    while bus.loop.actions:
        bus.loop.take_turn()
    assert 900 <= left() < 1200 and bus.retention.request is None
    inside.close(bus)


def test_a_request_that_a_killed_prune_has_left_does_not_run_on_a_restored_bus(bus, tmp_path):
    """It was for the bus from before; what it has removed may be why there was a restore."""
    send(bus, "bob", "unread")
    assert run("backup", tmp_path / "copy.db", "--db", bus.db)[0] == 0
    bus.stop()
    request = pathlib.Path(f"{bus.db}.prune")
    request.write_text(json.dumps({"before": 1 << 60, "fetched_only": False}))
    assert run("restore", tmp_path / "copy.db", "--db", bus.db)[0] == 0
    assert not request.exists()
    bus.start()
    json.loads(bus.get("/recv?to=eve&wait=0.3"))  # the sweep that ends this poll has looked for a request
    assert log_of(bus, "bob") == ["unread"]


def test_a_restore_waits_for_a_prune_that_is_under_way(bus, tmp_path):
    """Else that would go on, and remove from the restored bus what was to be removed from the other one."""
    assert run("backup", tmp_path / "copy.db", "--db", bus.db)[0] == 0
    bus.stop()
    command = [*COMMAND, "restore", str(tmp_path / "copy.db"), "--db", bus.db]
    with open(f"{bus.db}.prune.lock", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        with forked.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as restoring:
            wait_until(lambda: waits_for_its_turn(restoring))
            fcntl.flock(turn, fcntl.LOCK_UN)
            restoring.communicate(timeout=PATIENCE)
    assert restoring.returncode == 0


def test_times_longer_than_there_has_been_time_are_all_of_it(tmp_path):
    with Server(tmp_path / "bus.db", "--keep", "999999999d") as bus:
        send(bus)
        told = "messages from before 1970-01-01T00:00:00Z: 0\n"
        assert run("prune", "--older", "999999999d", "--db", bus.db)[:2] == (0, told)
        assert log_of(bus, "bob") == ["x"] and bus.stop() == 0


def values(bus):
    """The metrics as a program of others reads them, where it is installed; else line by line."""
    text = bus.get("/metrics").decode()
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError:
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{label}="{value}"' for label, value in sample.labels.items())
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def test_the_metrics_tell_what_happened(bus):
    send(bus, "bob", "one")
    send(bus, ["bob", "eve"], "two")
    assert send(bus, "not a name")[0] == 400
    bus.get("/recv?to=bob&max=1")
    found = values(bus)
    assert (found["agent_bus_sends_total"], found["agent_bus_messages_total"]) == (2, 3)
    assert found["agent_bus_delivered_total"] == 1 and found['agent_bus_refused_total{status="400"}'] == 1
    assert found['agent_bus_unread{channel="default",name="bob"}'] == 2
    assert found['agent_bus_oldest_unread_seconds{channel="default",name="eve"}'] > 0
    assert 0 < found["agent_bus_commit_seconds_max"] <= found["agent_bus_commit_seconds_total"]


def test_retention_goes_on_after_a_list_that_could_not_be_announced(tmp_path, monkeypatch):
    """Nobody waits for the answer to its operations, so no connection that fails ends them."""
    bus = inside.make(tmp_path / "bus.db")
    bus.retention.keep = 1
    pathlib.Path(f"{bus.state.path}.prune").write_text(json.dumps({"before": 1, "fetched_only": False}))
    with monkeypatch.context() as patch:
        patch.setattr(bus.figures, "committed", None)
        bus.retention.age()
        bus.retention.look_for_request()
        bus.loop.take_turn()
    assert not bus.retention.aging and bus.retention.request is None
    inside.close(bus)


def test_a_retry_to_a_list_whose_mailboxes_were_forgotten_has_the_first_answer(tmp_path):
    """The key outlives them, for example for the hour in which a clock that jumped is not trusted."""
    bus, now = inside.make(tmp_path / "bus.db"), bus_server.Now(bus_server.wall_clock(), 0)
    drafts = [bus_server.draft({"from": "alice", "to": ["bob", "eve"], "msg": "x", "key": "k"}, None)]
    [first] = bus.state.apply([bus_server.Put(drafts)], now).results
    gone = [bus_server.Remove(0, 1 << 60, False, [], 0), bus_server.Forget([["default", "bob"], ["default", "eve"]])]
    for each in gone:
        bus.state.apply([each], now)
    put = bus_server.Put(drafts)
    [again] = bus.state.apply([put], now).results
    answer = json.loads(bus.sending.answer("", False, None, put, again).body)
    assert answer["duplicate"] and answer["id"] == f"{first[0].ticks[-1]:x}"
    assert answer["receiver"] == {"online": 0, "offline": 2, "unread": 0, "unknown": {"bob": {}, "eve": {}}}
    inside.close(bus)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    server = Server(tmp_path / "new" / "bus.db")
    server.log = tmp_path / "stderr"
    with server as bus:
        code, _, err = run("backup", str(tmp_path / "nowhere" / "a.db"), "--db", bus.db)
        assert code and f"there is no folder {tmp_path}/nowhere" in err and "make it first" in err
    assert f"there was no folder {tmp_path}/new: it is made for the database" in server.log.read_text()


def test_a_command_whose_output_cannot_be_written_says_so_and_leaves_no_token_that_nobody_saw(bus):
    for command in (["invite", "ann", "--yes"], ["tokens"], ["prune", "--dry-run"]):
        with open("/dev/full", "wb") as full:
            line = [sys.executable, str(ROOT / "bus_server.py"), *command, "--db", bus.db]
            done = forked.run(line, stdout=full, stderr=subprocess.PIPE, text=True, timeout=PATIENCE)
        assert done.returncode == 2 and done.stderr.endswith(": cannot write the output: No space left on device\n")
        assert "Traceback" not in done.stderr
    assert run("tokens", "--db", bus.db)[1] == "no tokens: the bus is open\n"


@pytest.mark.parametrize("both", [False, True])
def test_a_bus_starts_where_nobody_can_read_what_it_says(tmp_path, both):
    port = free_port()
    with open("/dev/full", "wb") as full:
        command = [sys.executable, str(ROOT / "bus_server.py"), "--port", str(port), "--db", f"{tmp_path}/new/bus.db"]
        buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        options = {"stdout": full, "stderr": full if both else subprocess.DEVNULL, "env": buffered}
        with subprocess.Popen([*command, "--verbose"], **options) as process:
            try:
                wait_until(lambda: bus_server.is_bus("127.0.0.1", port))
                process.terminate()
                assert process.wait(PATIENCE) == 0, "systemd would call it failed"
            finally:
                process.kill()


@pytest.mark.parametrize("command", ["invite", "take back", "backup", "restore"])
def test_what_a_command_has_renamed_stays_so_after_a_power_cut(command, tmp_path, monkeypatch):
    """The folder is written out after the last change in it; else a token that was revoked would be valid again.

    Or a start would say of a restore that is done that it was cut off; or a token would be back that nobody has seen.
    """
    path = str(tmp_path / "bus.db")
    bus_server.State(path).close()
    bus_server.State(str(tmp_path / "copy.db")).close()
    if command == "take back":
        bus_server.run_command("invite", "ann", "--yes", "--db", path)
    happened = []

    def noted(module, name, note):
        real = getattr(module, name)

        def call(*its, **options):
            if isinstance(its[0], int) or os.path.lexists(its[0]):
                happened.append(note(its[0]))
            real(*its, **options)

        monkeypatch.setattr(module, name, call)

    for module, name in ((os, "replace"), (os, "rename"), (pathlib.Path, "unlink")):
        noted(module, name, lambda _: "changed")
    noted(os, "fsync", lambda file: pathlib.Path(f"/proc/self/fd/{file}").resolve())
    arguments = {"invite": ["ann", "--yes"], "backup": [tmp_path / "new.db"], "restore": [tmp_path / "copy.db"]}
    if command == "take back":
        bus_server.Tokens(path).change(lambda rows: [])
    else:
        bus_server.run_command(command, *map(str, arguments[command]), "--db", path)
    last = len(happened) - happened[::-1].index("changed")
    assert tmp_path in happened[last:]


def test_a_restore_that_is_done_twice_keeps_the_database_from_before(tmp_path, capsys):
    """A power cut may bring back the mark that it was cut off. The second one put the restored one in its place."""
    path, copy = tmp_path / "bus.db", str(tmp_path / "copy.db")
    kept = bus_server.draft({"from": "a", "to": "b", "msg": "x"}, None)
    bus_server.State(copy).close()
    with contextlib.closing(bus_server.State(str(path))) as state:
        state.apply([bus_server.Put([kept])], bus_server.Now(bus_server.wall_clock(), 0))
    bus_server.run_command("restore", copy, "--db", str(path))
    [old] = [each for each in tmp_path.iterdir() if re.fullmatch(r"bus\.db\.[0-9]+", each.name)]
    (tmp_path / "bus.db.restoring").write_text(old.suffix[1:])
    bus_server.run_command("restore", copy, "--db", str(path))
    assert "the database that was there before is now" in capsys.readouterr().out

    def messages(file):
        with contextlib.closing(bus_server.read_only(str(file))) as database:
            return database.execute("SELECT count(*) FROM messages").fetchone()[0]

    assert (messages(old), messages(path)) == (1, 0) and not (tmp_path / "bus.db.restoring").exists()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_cannot_write_out_a_folder_is_no_failure(number, tmp_path, monkeypatch, capsys):
    """As CIFS and 9p. The token was made, the bus closed, and the secret never shown. A disk that fails is one."""
    write_out = os.fsync

    def fsync(file):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(number, os.strerror(number))
        write_out(file)

    monkeypatch.setattr(os, "fsync", fsync)
    code = bus_server.main(["invite", "ann", "--yes", "--db", str(tmp_path / "bus.db")])
    out, err = capsys.readouterr()
    assert code == (2 if number == errno.EIO else 0) and bool(re.search("abt_[0-9a-f]{8}_", out)) is (code == 0), err


def test_a_name_that_no_file_can_have_is_no_bus(tmp_path):
    code, _, err = run("tokens", "--db", str(tmp_path / ("x" * 300)))
    assert code == 2 and ": there is no bus with the database " in err and err.count("\n") == 1


def test_where_no_token_can_be_written_nothing_else_is_said(tmp_path, monkeypatch, capsys):
    """It said first that the first token closes the bus. Root may write everywhere, so the refusal is planted."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    db = tmp_path / "agent-bus" / "bus.db"
    monkeypatch.setattr(bus_server, "default_path", lambda: str(db))
    assert bus_server.main(["invite", "dell", "--yes"]) == 2
    why = f"you may not write {tmp_path}; --db gives another place"
    said = f"bus_server: cannot write the tokens in {db}.tokens: {why}\n"
    assert capsys.readouterr() == ("", said) and not db.parent.exists()


@pytest.mark.parametrize("command", [["tokens"], ["prune"], ["invite", "ann"], ["restore", "COPY"], []])
def test_a_database_behind_a_closed_door_is_not_called_missing(command, tmp_path, monkeypatch, capsys):
    """Root may look everywhere, so the refusal of the system is planted."""
    hidden, stat = str(tmp_path / "its" / "bus.db"), os.stat

    def refusing(path, *given, **more):
        if str(path).startswith(str(tmp_path / "its")):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *given, **more)

    monkeypatch.setattr(os, "stat", refusing)
    command = [hidden if word == "COPY" else word for word in command]
    assert bus_server.main([*command, "--db", hidden]) == 2
    said = f"bus_server: you may not look into {tmp_path} for {tmp_path}/its.*: ask its owner, or give another path\n"
    assert re.fullmatch(said, capsys.readouterr().err)


def test_a_home_behind_a_closed_door_is_not_called_an_unreadable_file_of_tokens(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "its"))
    test_a_database_behind_a_closed_door_is_not_called_missing(["invite", "ann"], tmp_path, monkeypatch, capsys)
