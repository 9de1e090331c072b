"""Files and the database: nothing is checked and then used, nothing is lost in silence, one file has one server.

| test | seen red on 2026-11-28's code |
|---|---|
| files_beside_somebody_who_makes_and_removes_them | PUTs are never answered (files alone: green) |
| a_name_of_the_same_database | a second server starts on a symlink; not through a folder's link or dots |
| a_database_with_several_names | it starts |
| what_lies_beside_a_database, and what is given by a link | the bus stays open, prune never ends, a loss is silent |
| a_broken_frame_with_others_behind_it | nothing is said, there is no gap; the last two of FLIPPED until 2026-11-29 |
| what_a_broken_log_has_lost | the copy lacks it, and nothing is said |
| a_restore_that_was_killed, half a restore | an empty bus starts |
| a_clock_that_jumps | all unread mail is removed |
"""
import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import signal
import struct
import subprocess
import sys
import time

import pytest

import bus_server
from tests.faults.crash import broken
from tests.faults.disk import starts
from tests.kit import forked
from tests.kit.moved import Moved
from tests.kit.peers import Peer, alive, ask, command, invite, run, stored
from tests.kit.processes import COMMAND, PATIENCE, ROOT, Server, wait_until

# Files


MEDDLER = """
import random, contextlib, threading, time
bus_server.TIDY_SECONDS = 0.02
def meddle():
    blobs, chance = pathlib.Path(os.environ["BLOBS"]), random.Random(7)
    while True:
        try:
            names, what = json.loads(pathlib.Path(os.environ["MEDDLED"]).read_text())
        except (OSError, ValueError):
            time.sleep(0.02)  # it has nothing to do yet
            continue
        if not names:
            pathlib.Path(os.environ["MEDDLED"] + ".over").touch()
            return
        kinds = ["", ".part"]
        for _ in range(50):
            file = blobs / (chance.choice(names) + chance.choice(kinds))
            with contextlib.suppress(OSError):
                if what == "folders" and chance.random() < 0.1:
                    file.mkdir()
                    file.rmdir()
                elif chance.random() < 0.5:
                    file.write_bytes(b"x" * chance.choice([0, 1000, 1500]))
                else:
                    file.unlink()
threading.Thread(target=meddle, daemon=True).start()
"""  # in the same process: its turns and the thread take each other's place at every call of the system


@pytest.mark.parametrize("what", ["both", "folders"])
def test_files_beside_somebody_who_makes_and_removes_them(tmp_path, what):
    """Each request gets an answer, none is 500, and the bus goes on; what it keeps is still counted."""
    program = [str(ROOT / "tests/kit/raising_server.py")]
    env = {"PATCH": MEDDLER, "FAULT_PORT": "0", "BLOBS": f"{tmp_path / 'bus.db'}.blobs"}
    meddled = tmp_path / "meddled"
    env["MEDDLED"] = str(meddled)
    with Server(tmp_path / "bus.db", "--keep", "1s", program=program, env=env) as bus:
        blobs = pathlib.Path(f"{bus.db}.blobs")
        blobs.mkdir()
        some = [os.urandom(3000) for _ in range(3)]
        names = [hashlib.sha256(data).hexdigest() for data in some]
        meddled.write_text(json.dumps([names, what]))
        count, wrong, end = 0, [], time.monotonic() + 1
        try:
            while (time.monotonic() < end or count < 60) and len(wrong) < 5:
                for data, name in zip(some, names):
                    requests = [("PUT", data, {}), ("GET", b"", {}), ("GET", b"", {"Range": "bytes=100-"})]
                    requests.append(("PUT", data[1000:], {"Content_Range": "bytes 1000-2999/3000"}))
                    requests.append(("PUT", data[:1000], {"Content_Range": "bytes 0-999/3000"}))
                    for method, body, fields in requests:
                        with Peer(bus) as peer:
                            status = peer.send(method, f"/blob/{name}", body, **fields).outcome()
                        count += 1
                        if status in (None, 500) or (status == 0 and method == "PUT"):
                            wrong.append((method, fields, status))
        finally:
            fresh = meddled.with_suffix(".fresh")
            fresh.write_text(json.dumps([[], ""]))
            fresh.replace(meddled)
            wait_until(pathlib.Path(f"{meddled}.over").exists)
        assert not wrong
        assert alive(bus) and "Traceback" not in bus.log.read_text()
        for data, name in zip(some, names):
            for file in (blobs / name, blobs / f"{name}.part"):
                with contextlib.suppress(FileNotFoundError):  # a folder stays where the bus gave it the name of a part
                    file.rmdir() if file.is_dir() else file.unlink()
            assert ask(bus, "PUT", f"/blob/{name}", data).status == 201
            assert ask(bus, "GET", f"/blob/{name}").body == data


# One file, one server


def start(path, *options):
    """The exit code and the words of a server that is expected not to start; 0 if it does."""
    process = forked.Popen(
        [sys.executable, "-S", *COMMAND[1:], "--port", "0", "--db", str(path), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        if line.startswith("listening"):
            return 0, ""
        said = process.stderr.read()
        return process.wait(PATIENCE), said
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


@pytest.mark.parametrize(
    ("through", "first"),
    [
        ("a link", "the file"),
        ("a link", "the link"),
        ("a link to a link", "the file"),
        ("a link to its folder", "the link"),
        ("a path with dots", "the file"),
    ],
)
def test_a_name_of_the_same_database_is_in_use(tmp_path, through, first):
    place = tmp_path / "place"
    place.mkdir()
    file = place / "bus.db"
    with Server(file):
        pass
    link = tmp_path / "link.db"
    if through == "a link to its folder":
        (tmp_path / "other").symlink_to(place)
        link = tmp_path / "other" / "bus.db"
    elif through == "a path with dots":
        link = place / ".." / "place" / "bus.db"
    else:
        link.symlink_to(file)
        if through == "a link to a link":
            second = tmp_path / "second.db"
            second.symlink_to(link)
            link = second
    running, other = (file, link) if first == "the file" else (link, file)
    with Server(running) as bus:
        code, said = start(other)
        assert code == 2 and "in use" in said and len(said.splitlines()) == 1
        stored(bus, "bob", "still whole")
        assert [each["msg"] for each in ask(bus, "GET", "/recv?to=bob&since=0").json["messages"]] == ["still whole"]
    assert broken(file) == []


@pytest.mark.parametrize("running", [True, False])
def test_a_database_with_several_names_is_refused(tmp_path, running):
    file, hard = tmp_path / "bus.db", tmp_path / "hard.db"
    with Server(file) as bus:
        os.link(file, hard)
        if running:
            code, said = start(hard)
            assert code == 2 and len(said.splitlines()) == 1
        assert alive(bus)
    code, said = start(hard)
    assert code == 2 and "link" in said and len(said.splitlines()) == 1


@pytest.fixture
def linked(tmp_path):
    """(a database, which is not there yet; a link to a link to it, in another folder)."""
    place = tmp_path / "place"
    (place / "links").mkdir(parents=True)
    (place / "links" / "link.db").symlink_to("../bus.db")
    (tmp_path / "second.db").symlink_to(place / "links" / "link.db")
    return place / "bus.db", tmp_path / "second.db"


def test_what_lies_beside_a_database_goes_by_its_own_name(linked, tmp_path):
    """Each command and each start, by a link and by the file: both have the same tokens, files, requests and log."""
    file, link = linked
    blob = hashlib.sha256(b"a file").hexdigest()
    with Server(link) as bus:
        token = invite(bus, "ann", "--yes")
        assert ask(bus, "GET", "/agents").status == 401, "a running bus sees its first token"
        stored(bus, "bob", "kept", token=token)
        assert ask(bus, "PUT", f"/blob/{blob}", b"a file", token=token).status == 201
        assert "1 messages, 1 files, 1 tokens" in command(bus, "backup", tmp_path / "copy.db")
        assert "1 removed" in command(bus, "prune", "--older", "0", "--pending")
        assert "revoked" in command(bus, "revoke", "ann")
        assert "ann" in command(bus, "tokens")
    (tmp_path / "latest.db").symlink_to("copy.db")
    (tmp_path / "latest.db.tokens").symlink_to("copy.db.tokens")  # whoever has linked these as well
    (tmp_path / "latest.db.blobs").symlink_to("copy.db.blobs")
    for path in (file.with_name("bus.db.tokens"), file.with_name("bus.db.blobs") / blob):
        path.unlink()
    assert "1 messages, and got back 1 files" in command(bus, "restore", tmp_path / "latest.db")
    assert link.is_symlink() and not file.is_symlink()
    for name in (file, link):
        with Server(name) as bus:
            assert ask(bus, "GET", "/agents").status == 401
            assert ask(bus, "GET", f"/blob/{blob}", token=token).body == b"a file"
            assert [each["msg"] for each in ask(bus, "GET", "/log", token=token).json["messages"]] == ["kept"]
    assert {each.name for each in tmp_path.glob("second.db*")} == {"second.db", "second.db.stderr"}, "that of Server"
    assert [each.name for each in (file.parent / "links").iterdir()] == ["link.db"]


COMMANDS = ["start", "invite ann", "revoke ann", "tokens", "prune", "backup COPY", "restore COPY", "move --back"]


@pytest.mark.parametrize("words", COMMANDS)
@pytest.mark.parametrize("why", ["tokens beside the link", "other users may write"])
def test_a_link_that_cannot_be_followed_safely_is_refused(linked, tmp_path, words, why):
    """An older bus has put its tokens beside the link: without them it would be open now."""
    file, link = linked
    file.touch()
    if why == "other users may write":
        file.with_name("links").chmod(0o777)
        says = "link.db is a link where other users may write"
    else:
        link.with_name("second.db.tokens").write_text("{}\n")
        says = "second.db.tokens lies beside a link"
    name, *rest = words.replace("COPY", str(tmp_path / "copy.db")).split()
    code, said = start(link) if name == "start" else run(name, *rest, "--db", link)[::2]
    assert code == 2 and says in said and len(said.splitlines()) == 1, said
    assert file.read_bytes() == b"" and sorted(os.listdir(file.parent)) == ["bus.db", "links"]


def test_a_link_to_itself_is_no_database(tmp_path):
    (tmp_path / "bus.db").symlink_to("bus.db")
    code, said = start(tmp_path / "bus.db")
    assert code == 2 and len(said.splitlines()) == 1 and "bus.db" in said, said


# Damage that is not silent


def frames(wal):
    """(offset of its page, page number, is it a commit) of each frame."""
    data = wal.read_bytes()
    size = struct.unpack(">I", data[8:12])[0]
    for at in range(32, len(data) - size - 23, 24 + size):
        number, commit = struct.unpack(">II", data[at : at + 8])
        if data[at + 8 : at + 16] == data[16:24]:  # of this log, not an older one
            yield at + 24, number, bool(commit)


FLIPPED = ["page", "head of a frame", "salts of the last commit but one", "page size in the head of the log"]
BY_A_LINK = "page of a database that is given by a link"


def flip(file, flipped):
    """Change one bit of the log of a bus that was killed, in the third of its last nine transactions."""
    wal = pathlib.Path(f"{file}-wal")
    found = list(frames(wal))
    commits = [place for place, (_, _, commit) in enumerate(found) if commit]
    assert len(commits) >= 9
    third, eighth = found[commits[-7]][0], found[commits[-2]][0]
    at = dict(zip([*FLIPPED, BY_A_LINK], (third + 2000, third - 12, eighth - 16, 10, third + 2000)))
    data = bytearray(wal.read_bytes())
    data[at[flipped]] ^= 1
    wal.write_bytes(data)


@pytest.mark.parametrize("flipped", [*FLIPPED, BY_A_LINK])
def test_a_broken_frame_with_others_behind_it_is_damage_and_is_told(linked, flipped):
    """kill -9, one bit of the third of nine transactions, a start: damage is said, and readers are told of a gap."""
    file, link = linked
    with Server(link if flipped == BY_A_LINK else file) as bus:
        ids = [stored(bus, "bob", f"message {number}") for number in range(9)]
        bus.kill()
        flip(file, flipped)
        before = len(bus.log.read_text())
        bus.start()
        said = bus.log.read_text()[before:]
        kept = [each["msg"] for each in ask(bus, "GET", "/log?max=1000").json["messages"]]
        assert len(kept) < 9, "the test has flipped something that did not matter"
        assert "damage" in said and "Traceback" not in said, said
        behind = f"{int(ids[0], 16) / 1e6:.6f}"
        for since in ("0", behind):
            answer = ask(bus, "GET", f"/recv?to=bob&since={since}").json
            assert answer["gap"]["to"] > answer["gap"]["from"], "a reader is told"
        again = stored(bus, "bob", "afterwards")
        assert int(again, 16) > int(ids[-1], 16), "no tick comes twice"
        after = ask(bus, "GET", f"/recv?to=bob&since={int(ids[-1], 16) / 1e6:.6f}").json["messages"]
        assert after[-1]["msg"] == "afterwards"


def test_what_was_torn_at_the_end_is_no_damage(tmp_path):
    """The control: half a transaction at the end is what a crash leaves; nobody is told of a loss that is none."""
    with Server(tmp_path / "bus.db") as bus:
        for number in range(5):
            stored(bus, "bob", f"message {number}")
        bus.kill()
        wal = pathlib.Path(f"{bus.db}-wal")
        with wal.open("ab") as file:
            file.write(wal.read_bytes()[32:1500])
        bus.start()
        assert "damage" not in bus.log.read_text()
        answer = ask(bus, "GET", "/recv?to=bob&since=0").json
        assert len(answer["messages"]) == 5 and "gap" not in answer


@pytest.mark.parametrize("flipped", FLIPPED)
def test_what_a_broken_log_has_lost_is_not_left_out_of_a_copy_in_silence(tmp_path, flipped):
    """backup refuses until a start has told the loss; it takes nothing away of what that start tells it by."""
    copy = tmp_path / "copy.db"
    with Server(tmp_path / "bus.db") as bus:
        for number in range(9):
            stored(bus, "bob", f"message {number}")
        bus.kill()
        flip(bus.db, flipped)
        said = command(bus, "backup", copy, code=2)
        assert "bus.db-wal is damaged" in said and "start the bus" in said and len(said.splitlines()) == 1, said
        assert not copy.exists() and not (tmp_path / "copy.db.new").exists()
        shutil.copy(bus.db, tmp_path / "raw.db")
        shutil.copy(f"{bus.db}-wal", tmp_path / "raw.db-wal")
        said = command(bus, "restore", tmp_path / "raw.db", code=2)
        assert "raw.db-wal is damaged" in said and len(said.splitlines()) == 1, said
        bus.start()
        assert "damage" in bus.log.read_text()
        assert f"{len(kept(bus))} messages" in command(bus, "backup", copy)


@pytest.mark.parametrize("torn", [False, True])
def test_the_log_of_a_bus_that_was_killed_is_copied(tmp_path, torn):
    """The control: also with half a transaction at its end."""
    with Server(tmp_path / "bus.db") as bus:
        for number in range(9):
            stored(bus, "bob", f"message {number}")
        bus.kill()
        wal = pathlib.Path(f"{bus.db}-wal")
        with wal.open("ab") as file:
            file.write(wal.read_bytes()[32:1500] if torn else b"")
        assert "9 messages" in command(bus, "backup", tmp_path / "copy.db")


def test_a_log_that_grows_while_it_is_read_is_no_damage(tmp_path, monkeypatch):
    """The control: the bus that runs has put transactions behind those that SQLite knew when the copy began."""
    monkeypatch.setattr(bus_server, "commits_in_wal", lambda path: [10**6, 10**6 + 1])
    with Server(tmp_path / "bus.db") as bus:
        stored(bus, "bob", "x")
        assert bus_server.copy_database(str(bus.db), str(tmp_path / "copy.db")) == 1
        bus.kill()
        with pytest.raises(bus_server.Unusable, match="is damaged"):
            bus_server.copy_database(str(bus.db), str(tmp_path / "another.db"))


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import bus_server
left = int(sys.argv[1])
def counted(real):
    def call(*arguments, **options):
        global left
        result = real(*arguments, **options)
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call
for name in ("rename", "replace", "unlink", "remove", "link", "symlink"):
    setattr(os, name, counted(getattr(os, name)))
sys.exit(bus_server.main(sys.argv[2:]))
"""


def restore(path, copy, kill_after=0):
    command = [sys.executable, "-S", "-c", KILLED.format(root=str(ROOT)), str(kill_after), "restore", str(copy)]
    return subprocess.run([*command, "--db", str(path)], capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.slow("restores, is killed and starts about six times")
def test_a_restore_that_was_killed_is_no_empty_bus(tmp_path):
    """At each rename, the old one's WAL beside it: a start has all of the one or of the other, or says how to go on."""
    copy = tmp_path / "copy.db"
    with Server(tmp_path / "first.db") as bus:
        stored(bus, "bob", "copied")
        forked.run([*COMMAND, "backup", str(copy), "--db", bus.db], check=True, capture_output=True)
    old = tmp_path / "old"
    old.mkdir()
    with Server(old / "bus.db") as bus:
        for number in range(3):
            stored(bus, "bob", f"old {number}")
        bus.kill()  # what it was told is in the WAL
    for step in range(1, 20):
        place = tmp_path / str(step)
        shutil.copytree(old, place)
        done = restore(place / "bus.db", copy, step)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done
        bus = Server(place / "bus.db")
        refused = not starts(bus)
        if refused:
            code, said = bus.process.returncode, bus.log.read_text()
            assert code == 2 and "restore" in said and len(said.splitlines()) == 1, said
            assert restore(place / "bus.db", copy).returncode == 0, "it can be done again"
            bus.start()
        try:
            found = [each["msg"] for each in ask(bus, "GET", "/recv?to=bob&since=0").json["messages"]]
        finally:
            bus.kill()
        assert found == ["copied"] or (found == ["old 0", "old 1", "old 2"] and not refused), f"step {step}: {found}"
    else:
        pytest.fail("it was never done")
    assert step > 2


@pytest.mark.parametrize("half", ["moved away", "moved away but for its log"])
def test_a_start_beside_half_a_restore_refuses(tmp_path, half):
    """Both halves as they were before this was known: the new one is there, the old one has another name."""
    file = tmp_path / "bus.db"
    with Server(file) as bus:
        stored(bus, "bob", "old")
        forked.run([*COMMAND, "backup", str(tmp_path / "bus.db.new"), "--db", bus.db], check=True)
        bus.kill()
    old = f"{file}.1795912180887118"
    os.rename(file, old)
    if half == "moved away":
        for suffix in ("-wal", "-shm"):
            os.rename(f"{file}{suffix}", f"{old}{suffix}")
    code, said = start(file)
    assert code == 2 and "restore" in said and len(said.splitlines()) == 1, (code, said)
    assert not file.exists(), "nothing was made"


# Time


def kept(bus):
    return [each["msg"] for each in ask(bus, "GET", "/log?max=1000").json["messages"]]


DAY = 86400


@pytest.mark.parametrize("keep, ahead", [("30d", 31 * DAY), ("30d", 400 * DAY), ("10m", 3000), ("1m", 70)])
def test_a_clock_that_jumps_removes_nothing(tmp_path, keep, ahead):
    """For a minute, in which retention looks; here it looks five times meanwhile."""
    moved = Moved(tmp_path, "--keep", keep, wall_alone=True)
    with moved.bus as bus:
        for number in range(5):
            stored(bus, "bob", f"message {number}")
        moved.looks(2)
        moved.go(ahead)
        moved.looks(5)
        moved.go(0)
        assert len([each for each in kept(bus) if each.startswith("message")]) == 5
        moved.looks(2)
        assert len([each for each in kept(bus) if each.startswith("message")]) == 5
        answer = ask(bus, "GET", "/recv?to=bob&since=0").json
        assert len(answer["messages"]) == 5 and "gap" not in answer


@pytest.mark.parametrize("keep, ahead", [("30d", 31 * DAY), ("12h", 20 * 3600), ("1h", 7200), ("10m", 3000)])
def test_a_start_with_a_clock_that_is_wrong_removes_nothing(tmp_path, keep, ahead):
    """The newest message says which time it was. If the bus was really off for so long, it waits for an hour."""
    moved = Moved(tmp_path, "--keep", keep)
    with moved.bus as bus:
        stored(bus, "bob", "message")
    moved.go(ahead)
    with moved.bus as bus:
        moved.looks(5)
        assert kept(bus) == ["message"]
        moved.go(ahead + 1900)
        moved.looks(2)
        assert kept(bus) == ["message"]
        moved.go(ahead + 3700)
        wait_until(lambda: kept(bus) == [])


@pytest.mark.parametrize("keep", ["30d", "12h", "1h", "10m", "1m"])
def test_a_start_with_a_clock_that_is_right_removes_what_is_too_old(tmp_path, keep):
    """Of a bus that is used. With a `--keep` below four hours each start distrusted its clock, for an hour."""
    wall, step = bus_server.wall_clock(), int(bus_server.duration(keep) * 1000000) // 50
    one = bus_server.draft({"from": "ann", "to": "bob", "msg": "x"}, None)
    with contextlib.closing(bus_server.State(str(tmp_path / "bus.db"))) as state:
        for age in range(60, 0, -1):
            state.apply([bus_server.Put([one])], bus_server.Now(wall - age * step, 0))
    with Server(tmp_path / "bus.db", "--keep", keep) as bus:
        wait_until(lambda: len(kept(bus)) <= 50)
        assert "nothing is removed for an hour" not in bus.log.read_text()


@pytest.mark.parametrize("keep, ahead", [("30d", 31 * DAY), ("10m", 3000)])
def test_a_second_start_with_a_wrong_clock_removes_nothing(tmp_path, keep, ahead):
    """What was sent before it, by the same clock, does not say that this clock is right."""
    moved = Moved(tmp_path, "--keep", keep, wall_alone=True)
    with moved.bus as bus:
        stored(bus, "bob", "message")
        moved.go(ahead)
        for number in range(2):
            bus.stop()
            bus.start()
            stored(bus, "bob", f"{number}")
            moved.looks(2)
        assert kept(bus) == ["message", "0", "1"]


def test_a_clock_that_was_right_after_all_is_believed_after_an_hour(tmp_path):
    """Seen twice, an hour apart: then what is too old goes, as always."""
    moved = Moved(tmp_path, "--keep", "30d", wall_alone=True)
    with moved.bus as bus:
        stored(bus, "bob", "message")
        moved.looks(2)
        moved.go(31 * 86400)
        moved.looks(5)
        assert kept(bus) == ["message"]
        moved.go(31 * 86400 + 1900)
        moved.looks(2)
        assert kept(bus) == ["message"]
        moved.go(31 * 86400 + 3700)
        wait_until(lambda: kept(bus) == [])
