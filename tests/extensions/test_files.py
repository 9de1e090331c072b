"""Files by hash: they pass in pieces, go on where they were cut, and are what they are called."""
import contextlib
import errno
import hashlib
import http.client
import json
import os
import pathlib
import resource
import socket
import stat
import subprocess
import time
import types

import pytest

from bus_extensions.files import Blobs
from bus_server import wall_clock
from tests.kit import inside
from tests.kit.ledger import request
from tests.kit.processes import PATIENCE, Server, wait_until

SIZE = int(os.environ.get("FILE_MB", "40")) << 20
ROOM = 16 << 20  # bytes of memory a file may cost the server, whatever its size: buffers, and the pages of the hash
PIECE = 1 << 20


def ask(bus, method, path, body=None, **headers):
    peer = http.client.HTTPConnection("127.0.0.1", bus.port, timeout=PATIENCE)
    with contextlib.closing(peer):
        peer.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = peer.getresponse()
        return answer.status, answer.headers, answer.read()


def name(data):
    return hashlib.sha256(data).hexdigest()


def memory(bus):
    """Resident bytes at their highest so far."""
    status = pathlib.Path(f"/proc/{bus.process.pid}/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))


def test_a_large_file_passes_both_ways_with_flat_memory(bus, tmp_path):
    file, digest = tmp_path / "large", hashlib.sha256()
    with file.open("wb") as out:
        for number in range(SIZE // PIECE):
            piece = number.to_bytes(8, "big") * (PIECE // 8)
            digest.update(piece)
            out.write(piece)
    before = memory(bus)
    with file.open("rb") as source:
        status, _, _ = ask(bus, "PUT", f"/blob/{digest.hexdigest()}", source, Content_Length=str(SIZE))
    assert status == 201
    got = subprocess.run(["curl", "-sf", f"{bus.url}/blob/{digest.hexdigest()}", "-o", str(tmp_path / "got")])
    assert got.returncode == 0
    assert (tmp_path / "got").stat().st_size == SIZE
    assert subprocess.run(["cmp", str(file), str(tmp_path / "got")]).returncode == 0
    assert memory(bus) - before < ROOM


def test_the_same_file_again_is_stored_once(bus):
    data = b"x" * 100000
    assert [ask(bus, "PUT", f"/blob/{name(data)}", data)[0] for _ in range(2)] == [201, 200]
    assert b"files_bytes 100000\n" in bus.get("/metrics")
    status, headers, body = ask(bus, "HEAD", f"/blob/{name(data)}")
    assert (status, headers["Content-Length"], body) == (200, "100000", b"")


def test_a_file_that_is_not_what_it_is_called_is_refused_and_gone(bus):
    wanted = name(b"another")
    status, _, body = ask(bus, "PUT", f"/blob/{wanted}", b"this one")
    assert status == 422 and b"nothing was stored" in body
    status, headers, _ = ask(bus, "HEAD", f"/blob/{wanted}")
    assert (status, headers["Upload-Offset"]) == (404, "0")


def test_an_interrupted_upload_goes_on_where_it_was_cut(bus):
    data = os.urandom(300000)
    with socket.create_connection(("127.0.0.1", bus.port)) as peer:
        peer.sendall(f"PUT /blob/{name(data)} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 300000\r\n\r\n".encode())
        peer.sendall(data[:100000])
        wait_until(lambda: offset(bus, data))
        status, _, _ = ask(bus, "PUT", f"/blob/{name(data)}", data)
        assert status == 409, "one upload at a time"
    wait_until(lambda: offset(bus, data) == 100000)
    status, _, _ = ask(bus, "PUT", f"/blob/{name(data)}", data[100000:], Content_Range="bytes 100000-299999/300000")
    assert status == 201 and ask(bus, "GET", f"/blob/{name(data)}")[2] == data


def offset(bus, data):
    return int(ask(bus, "HEAD", f"/blob/{name(data)}")[1].get("Upload-Offset", -1))


def test_a_file_in_several_parts_is_complete_with_the_last(bus):
    data = os.urandom(1000)
    first = ask(bus, "PUT", f"/blob/{name(data)}", data[:400], Content_Range="bytes 0-399/1000")
    assert (first[0], first[1]["Upload-Offset"]) == (202, "400")
    wrong = ask(bus, "PUT", f"/blob/{name(data)}", data[500:], Content_Range="bytes 500-999/1000")
    assert (wrong[0], wrong[1]["Upload-Offset"]) == (409, "400")
    assert ask(bus, "PUT", f"/blob/{name(data)}", data[400:], Content_Range="bytes 400-999/1000")[0] == 201


def test_a_download_goes_on_from_where_it_was(bus):
    data = os.urandom(200000)
    ask(bus, "PUT", f"/blob/{name(data)}", data)
    status, headers, body = ask(bus, "GET", f"/blob/{name(data)}", Range="bytes=150000-")
    assert (status, headers["Content-Range"], body) == (206, "bytes 150000-199999/200000", data[150000:])
    assert ask(bus, "GET", f"/blob/{name(data)}", Range="bytes=200000-")[0] == 416


@pytest.mark.parametrize("size", [100, 300_000])
@pytest.mark.parametrize("damaged", [lambda data: bytes([data[0] ^ 1]) + data[1:], lambda data: data[:-1]])
def test_a_file_that_the_disk_has_damaged_is_not_sent_to_its_end_and_can_be_sent_again(damaged, size, bus, tmp_path):
    data = bytes(range(100)) * (size // 100)
    path, stored = f"/blob/{name(data)}", tmp_path / "bus.db.blobs" / name(data)
    assert ask(bus, "PUT", path, data)[0] == 201
    stored.write_bytes(damaged(data))
    with pytest.raises(http.client.IncompleteRead):
        ask(bus, "GET", path)
    assert [ask(bus, method, path)[0] for method in ("HEAD", "GET")] == [404, 404]
    wait_until(lambda: f"which is now {stored}.damaged: send it again" in bus.log.read_text())
    assert ask(bus, "PUT", path, data)[0] == 201 and ask(bus, "GET", path)[2] == data
    assert stored.with_suffix(".damaged").read_bytes() == damaged(data), "nothing is lost"


def test_the_files_of_a_bus_have_room_of_their_own(tmp_path):
    with Server(tmp_path / "bus.db", "--files", "1k") as bus:
        small, other, large = b"s" * 600, b"o" * 600, b"l" * 1025
        assert [ask(bus, "PUT", f"/blob/{name(data)}", data)[0] for data in (large, small, other)] == [413, 201, 507]
    with Server(tmp_path / "none.db", "--files", "0") as bus:
        assert ask(bus, "PUT", f"/blob/{name(small)}", small)[0] == 501


def kept(bus):
    """Bytes of files as the bus counts them, which must be what is on the disk."""
    counted = int(bus.get("/metrics").partition(b"\nagent_bus_files_bytes ")[2].split()[0])
    assert counted == sum(file.stat().st_size for file in pathlib.Path(f"{bus.db}.blobs").iterdir())
    return counted


def test_uploads_at_once_share_the_room_of_all(tmp_path):
    with Server(tmp_path / "bus.db", "--files", "1k") as bus, contextlib.ExitStack() as peers:
        files = [bytes([letter]) * 600 for letter in b"ab"]
        both = [peers.enter_context(socket.create_connection(("127.0.0.1", bus.port), PATIENCE)) for _ in files]
        for peer, data in zip(both, files):
            peer.sendall(f"PUT /blob/{name(data)} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 600\r\n\r\n".encode())
            peer.sendall(data[:300])
            wait_until(lambda data=data: offset(bus, data) == 300)
        answers = []
        for peer, data in zip(both, files):
            peer.sendall(data[300:])
            answers.append(peer.recv(65536)[9:12])
        assert answers == [b"201", b"507"] and kept(bus) <= 1024


def test_an_upload_that_meets_a_full_disk_goes_on_when_there_is_room(bus):
    data, none = os.urandom(3000000), resource.RLIM_INFINITY
    resource.prlimit(bus.process.pid, resource.RLIMIT_FSIZE, (2000000, none))
    status, headers, _ = ask(bus, "PUT", f"/blob/{name(data)}", data)
    assert (status, headers["Upload-Offset"]) == (507, "2000000") and kept(bus) == 2000000
    resource.prlimit(bus.process.pid, resource.RLIMIT_FSIZE, (none, none))
    rest = ask(bus, "PUT", f"/blob/{name(data)}", data[2000000:], Content_Range="bytes 2000000-2999999/3000000")
    assert rest[0] == 201 and kept(bus) == 3000000


def test_a_place_for_files_that_cannot_be_used_is_told(bus):
    pathlib.Path(f"{bus.db}.blobs").write_text("a file")
    status, _, body = ask(bus, "PUT", f"/blob/{name(b'x')}", b"x")
    assert status == 507 and b"cannot store the file: " in body


def blobs_of(path, keep, looked):
    """What the bus knows of the files beside a database; they are kept for `keep` s. Its clock said `looked`."""
    bus = types.SimpleNamespace(
        state=types.SimpleNamespace(path=str(path)),
        retention=types.SimpleNamespace(keep=keep, trusted=0, looked=looked),
        view=types.SimpleNamespace(clock=wall_clock),
        route=lambda *_, **__: None,
        on_tidy=[],
        metrics=[],
    )
    return Blobs(bus, SIZE, None)


def test_what_is_no_file_among_the_files_is_passed_over(tmp_path):
    folder = tmp_path / "bus.db.blobs"
    (folder / name(b"folder")).mkdir(parents=True)
    (folder / name(b"link")).symlink_to("nowhere")
    (folder / name(b"file")).write_bytes(b"file")
    blobs = blobs_of(tmp_path / "bus.db", keep=1, looked=time.time() + 2)
    assert blobs.used == len(b"file")
    blobs.forgotten(blobs.forget())
    assert blobs.used == 0 and not (folder / name(b"file")).exists()


def test_a_file_that_cannot_be_opened_for_want_of_descriptors_is_not_called_missing(tmp_path, monkeypatch):
    """Seen in an hour of siege: a file that was stored a moment ago was not there."""

    def no_descriptor(*_, **__):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    folder = tmp_path / "bus.db.blobs"
    folder.mkdir()
    (folder / name(b"file")).write_bytes(b"file")
    bus = inside.make(str(tmp_path / "bus.db"))
    with monkeypatch.context() as used_up:
        for used in ("open", "read_bytes"):
            used_up.setattr(pathlib.Path, used, no_descriptor)
        for path in (f"/blob/{name(b'file')}", "/bus_recv.py"):
            status, answer = request(bus, "GET", path)()
            assert (status, answer["error"]) == (503, "the bus has no file descriptor left: try again"), path
    assert request(bus, "GET", f"/blob/{name(b'none')}")()[0] == 404
    inside.close(bus)


def test_a_clock_that_jumps_after_the_look_at_it_removes_no_file(tmp_path, monkeypatch):
    """The thread that looks for old files may begin later than that."""
    folder = tmp_path / "bus.db.blobs"
    folder.mkdir()
    (folder / name(b"file")).write_bytes(b"file")
    blobs = blobs_of(tmp_path / "bus.db", keep=1000, looked=time.time())
    later = time.time_ns() + 2000 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: later)
    assert blobs.forget() == ([], len(b"file"), 1)


def test_a_file_that_nobody_asked_for_is_removed_after_keep(bus):
    wanted, forgotten, folder = b"wanted", b"forgotten", pathlib.Path(f"{bus.db}.blobs")
    for data in (wanted, forgotten):
        ask(bus, "PUT", f"/blob/{name(data)}", data)
        os.utime(folder / name(data), (1000, 1000))  # s since 1970
    ask(bus, "GET", f"/blob/{name(wanted)}")
    blobs = blobs_of(bus.db, keep=1000, looked=3000)
    blobs.forgotten(blobs.forget())
    assert [file.name for file in folder.iterdir()] == [name(wanted)] and blobs.used == len(wanted)


def test_a_part_that_nobody_goes_on_with_is_removed_though_all_else_is_kept_for_ever(tmp_path):
    with Server(tmp_path / "bus.db", "--keep", "0") as bus:
        given_up, young, whole = os.urandom(1000), os.urandom(1000), os.urandom(1000)
        for data in (given_up, young):
            assert ask(bus, "PUT", f"/blob/{name(data)}", data[:400], Content_Range="bytes 0-399/1000")[0] == 202
        assert ask(bus, "PUT", f"/blob/{name(whole)}", whole)[0] == 201
        ages = [(given_up, ".part", 8), (young, ".part", 6), (whole, "", 8000)]  # days
        for data, suffix, days in ages:
            then = time.time() - days * 86400
            os.utime(tmp_path / "bus.db.blobs" / f"{name(data)}{suffix}", (then, then))
        bus.stop()
        bus.start()
        wait_until(lambda: offset(bus, given_up) == 0)
        assert offset(bus, young) == 400 and ask(bus, "GET", f"/blob/{name(whole)}")[2] == whole
        assert kept(bus) == 1400


def done_by(bus, done):
    """Take the turns of a bus in this process until it is done."""
    wait_until(lambda: bus.loop.take_turn() or done())


@pytest.mark.parametrize("right", [0, 31], ids=["ahead", "behind"])
def test_a_clock_that_is_wrong_for_a_moment_removes_no_file(tmp_path, monkeypatch, right):
    """Ahead while the bus looks for old files; or behind while a file is sent, as where no battery keeps the clock."""
    real = time.time_ns()

    def set_clock(days):
        monkeypatch.setattr(time, "time_ns", lambda: real + days * 86400 * 10**9)
        monkeypatch.setattr(time, "time", lambda: real / 10**9 + days * 86400)

    set_clock(right)
    bus = inside.make(tmp_path / "bus.db", "--keep", "30d")
    done_by(bus, request(bus, "POST", "/send?from=ann&to=bob", "mail"))
    bus.tidy()
    set_clock(0)
    text = {"sent": "when the clock was right, or behind"}
    file = name(json.dumps(text).encode())
    done_by(bus, request(bus, "PUT", f"/blob/{file}", text))
    set_clock(31)
    looked = []
    if not bus.retention.clock_is_trusted() and right:
        bus.retention.trusted = 0  # an hour later
    bus.tidy()
    bus.loop.in_thread(lambda: None, looked.append)
    done_by(bus, lambda: looked)
    assert (tmp_path / "bus.db.blobs" / file).exists()
    inside.close(bus)


def test_a_file_is_stored_where_a_folder_cannot_be_written_out(tmp_path, monkeypatch):
    """As on CIFS and 9p: the file had its name, and its sender was told 507."""
    write_out = os.fsync

    def fsync(file):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        write_out(file)

    monkeypatch.setattr(os, "fsync", fsync)
    bus, text = inside.make(tmp_path / "bus.db"), {"some": "text"}
    answer = request(bus, "PUT", f"/blob/{name(json.dumps(text).encode())}", text)
    done_by(bus, answer)
    assert answer()[0] == 201
    inside.close(bus)


def test_files_outlive_a_crash(bus):
    data = os.urandom(1000)
    ask(bus, "PUT", f"/blob/{name(data)}", data)
    bus.kill()
    bus.start()
    assert ask(bus, "GET", f"/blob/{name(data)}")[2] == data


HASH = name(b"x")
NO_HASH = ["", "abc", "G" * 64, "A" * 64, "../bus.db", "..", "/", f"/{HASH}", f"../blob/{HASH}", f"{HASH}/", "%00",
           f"{HASH}%00", f"{HASH}%0A", f"{HASH}.part", "%2e%2e"]  # fmt: skip


@pytest.mark.parametrize("rest", NO_HASH)
def test_where_no_hash_is_there_is_no_file(bus, rest):
    for method in ("PUT", "GET", "HEAD"):
        status, headers, said = ask(bus, method, f"/blob/{rest}", b"x" if method == "PUT" else None)
        assert (status, headers["Upload-Offset"]) == (404, None), method
        assert method == "HEAD" or b"/blob/HASH, its sha256 in 64 of the digits 0-9 a-f" in said


@pytest.mark.parametrize("span", ["bytes 0-0/0", "bytes 1-1/1", "bytes 0-9/5", "0-1/2", "bytes 0-99/200"])
def test_a_wrong_range_is_refused(bus, span):
    assert ask(bus, "PUT", f"/blob/{name(b'xy')}", b"xy", Content_Range=span)[0] == 400


def test_put_is_for_files_only(bus):
    status, headers, _ = ask(bus, "PUT", "/send", b"{}")
    assert (status, headers["Allow"]) == (405, "POST, OPTIONS")
    assert ask(bus, "PUT", "/nothing", b"")[0] == 404
