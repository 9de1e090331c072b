"""bus_file.py: a file passes whole or not at all, goes on where it was cut, and costs no memory."""
import contextlib
import hashlib
import json
import os
import pty
import random
import socket
import subprocess
import sys
import threading

import pytest

import bus_recv
import bus_send
from tests.clients.test_clients import refusing
from tests.kit import forked, peers
from tests.kit.bad_servers import FAULTS, Scripted, page
from tests.kit.peers import mint
from tests.kit.processes import PATIENCE, ROOT, Server, wait_until
from tools import bus_file

pytestmark = pytest.mark.usefixtures("home")

FILE_MB = int(os.environ.get("FILE_MB", 40))  # 1024 for the full figure
ROOM = 8 << 20  # bytes of memory that a large file may cost more than a small one
AS_ROOT = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, to make such a file")
WRONG = (bus_send.Unreachable, bus_file.Damaged)


@pytest.fixture(autouse=True)
def spark(home, monkeypatch):
    monkeypatch.setenv("AGENT_NAME", "spark")
    monkeypatch.setattr(bus_send, "FIRST_PAUSE", 0.001)


def start(*arguments, url, popen=forked.Popen, **options):
    command = [sys.executable, "-I", "-S", str(ROOT / "tools" / "bus_file.py"), *map(str, arguments)]
    return popen(command, env={**os.environ, "AGENT_BUS_URL": url}, **options)


def run(*arguments, url):
    """Exit code, stdout, stderr."""
    process = start(*arguments, url=url, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = process.communicate(timeout=PATIENCE)
    assert "Traceback" not in err
    return process.returncode, out, err


def made(path, size):
    """A file of random bytes; its hash."""
    path.write_bytes(random.Random(size).randbytes(size))
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Cutting:
    """Passes bytes on to the bus, and cuts the n-th connection after so many; those behind it not. `passed` counts."""

    def __init__(self, url, *limits):
        self.host, port = url.rpartition("/")[2].split(":")
        self.port, self.limits, self.passed = int(port), list(limits), 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        with contextlib.suppress(OSError):  # until the listener is closed
            while True:
                self._join(self.listener.accept()[0], socket.create_connection((self.host, self.port)))

    def _join(self, near, far):
        left = [self.limits.pop(0) if self.limits else float("inf")]
        for ends in ((near, far), (far, near)):
            threading.Thread(target=self._pass, args=[*ends, left], daemon=True).start()

    def _pass(self, source, sink, left):
        with contextlib.suppress(OSError):
            while left[0] > 0 and (data := source.recv(65536)):
                left[0] -= len(data)
                self.passed += len(data)
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listener.close()


def test_a_file_is_left_for_somebody_who_is_told_its_hash(bus, tmp_path):
    source, got = tmp_path / "two words.bin", tmp_path / "got"
    digest = made(source, 300000)
    code, out, _ = run("put", source, "--to", "dell", "--subject", "weights", url=bus.url)
    told = next(bus_recv.receive("dell", url=bus.url, timeout=PATIENCE))
    assert code == 0 and json.loads(out)["id"] == told["id"]
    first, second, third = told["msg"].split("\n")
    assert (first, second) == ('file "two words.bin" 300000 bytes', f"sha256 {digest}")
    assert "bus_file.py get SHA256" in third and max(len(second), len(third)) <= 78, "behind `| `, in 80 columns"
    assert [told[field] for field in ("type", "name", "size", "sha256", "subject")] == [
        "file", "two words.bin", 300000, digest, "weights",
    ]  # fmt: skip
    assert run("get", digest, "-o", got, url=bus.url) == (0, "", f"bus_file: the file is in {got}\n")
    assert got.read_bytes() == source.read_bytes()


def test_a_file_whose_name_is_not_utf_8_is_announced_with_that_byte_replaced(bus, tmp_path):
    """It was uploaded whole, and then the bus refused the announcement."""
    source = os.path.join(tmp_path, os.fsdecode(b"b\xffd.bin"))
    with open(source, "wb") as file:
        file.write(b"data")
    process = start("put", source, "--to", "dell", url=bus.url, popen=subprocess.Popen,
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    err = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0, err
    told = next(bus_recv.receive("dell", url=bus.url, timeout=PATIENCE))
    assert told["name"] == "b?d.bin" and told["msg"].startswith('file "b?d.bin" 4 bytes\nsha256 ')


@pytest.mark.parametrize("size", [0, 1, bus_file.PIECE, bus_file.PIECE + 1])
def test_files_of_any_size_pass(bus, size, tmp_path):
    digest = made(tmp_path / "source", size)
    assert bus_file.put(str(tmp_path / "source"), bus.url, 0) == (digest, size)
    bus_file.get(digest, str(tmp_path / "got"), bus.url, 0)
    assert (tmp_path / "got").read_bytes() == (tmp_path / "source").read_bytes()


def test_what_the_bus_has_is_not_sent_again(bus, tmp_path):
    made(tmp_path / "source", 1 << 20)
    with Cutting(bus.url) as way:
        bus_file.put(str(tmp_path / "source"), way.url, 0)
        first = way.passed
        bus_file.put(str(tmp_path / "source"), way.url, 0)
    assert first > 1 << 20 and way.passed - first < 2000


def test_a_token_that_may_only_send_leaves_files_too(tmp_path, monkeypatch):
    """It may not ask what the bus has of the file; so it sends all of it, also a second time."""
    of = mint(tmp_path / "bus.db", spark=["--send-only"], dell=[])
    with Server(tmp_path / "bus.db") as bus:
        digest = made(tmp_path / "file", 300_000)
        monkeypatch.setenv("AGENT_BUS_TOKEN", of["spark"])
        for _ in range(2):
            code, _, err = run("put", tmp_path / "file", "--to", "dell", url=bus.url)
            assert code == 0, err
        assert (tmp_path / "bus.db.blobs" / digest).read_bytes() == (tmp_path / "file").read_bytes()
        told = peers.ask(bus, "GET", "/recv?to=dell", token=of["dell"]).json["messages"]
        assert [message["sha256"] for message in told] == [digest] * 2
        code, _, err = run("get", digest, "-o", tmp_path / "got", url=bus.url)
        assert code == 1 and "it needs an invitation without --send-only" in err, "what it left it cannot get"


def test_what_was_cut_goes_on_from_there_both_ways(bus, tmp_path, monkeypatch):
    """Cut after 1, 2, 3 and 2 MB of 10, in the middle of a head, and before anything. From the start it would be 18."""
    monkeypatch.setattr(bus_send, "FIRST_PAUSE", 0.1)  # until then the bus knows that we were cut
    size, cuts = 10 << 20, (1 << 20, 2 << 20, 100, 3 << 20, 0, 2 << 20)
    digest = made(tmp_path / "source", size)
    asking = float("inf")  # every other connection of a put only asks how far it came
    with Cutting(bus.url, *(limit for cut in cuts for limit in (asking, cut))) as way:
        bus_file.put(str(tmp_path / "source"), way.url, PATIENCE)
    assert way.passed < 1.5 * size
    with Cutting(bus.url, *cuts) as way:
        bus_file.get(digest, str(tmp_path / "got"), way.url, PATIENCE)
    assert way.passed < 1.5 * size and (tmp_path / "got").read_bytes() == (tmp_path / "source").read_bytes()


def test_a_call_that_was_killed_is_taken_up_by_the_next_one(bus, tmp_path):
    size = 4 << 20
    digest = made(tmp_path / "source", size)
    with Cutting(bus.url, float("inf"), size // 2) as way, pytest.raises(bus_send.Unreachable):
        bus_file.put(str(tmp_path / "source"), way.url, 0)
    wait_until(lambda: bus_file.held(bus.url, digest, size) > 0.49 * size)
    with Cutting(bus.url) as way:
        bus_file.put(str(tmp_path / "source"), way.url, PATIENCE)
    assert way.passed < 0.6 * size
    with Cutting(bus.url, size // 2) as way, pytest.raises(bus_send.Unreachable):
        bus_file.get(digest, str(tmp_path / "got"), way.url, 0)
    assert not (tmp_path / "got").exists()
    with Cutting(bus.url) as way:
        bus_file.get(digest, str(tmp_path / "got"), way.url, 0)
    assert way.passed < 0.6 * size and (tmp_path / "got").read_bytes() == (tmp_path / "source").read_bytes()
    assert [name for name in os.listdir(tmp_path) if "part" in name] == []


def test_a_part_that_is_wrong_costs_one_more_try(bus, tmp_path):
    digest = made(tmp_path / "source", 100000)
    bus_file.put(str(tmp_path / "source"), bus.url, 0)
    for junk in (b"junk", b"x" * 100000, b"x" * 100001):
        (tmp_path / f"got.{digest[:16]}.part").write_bytes(junk)
        bus_file.get(digest, str(tmp_path / "got"), bus.url, 0)
        assert (tmp_path / "got").read_bytes() == (tmp_path / "source").read_bytes()


@pytest.mark.parametrize("left", ["a link", pytest.param("a file", marks=AS_ROOT)])
def test_a_part_that_another_user_left_there_is_not_written_to(left, bus, tmp_path):
    """In a folder that several may write to, a link would lead into a file of ours, and a file could change later."""
    hash = made(tmp_path / "a", 1000)
    bus_file.put(tmp_path / "a", bus.url, 10)
    part, ours = tmp_path / f"b.{hash[:16]}.part", tmp_path / "ours"
    ours.write_text("ours")
    if left == "a link":
        part.symlink_to(ours)
    else:
        part.touch()
        os.chown(part, 65534, 65533)
    code, _, said = run("get", hash, "-o", tmp_path / "b", url=bus.url)
    assert code == 2 and part.name in said
    assert ours.read_text() == "ours" and not (tmp_path / "b").exists()


def test_a_part_that_the_bus_has_wrong_is_sent_again(bus, tmp_path):
    digest = made(tmp_path / "source", 1 << 20)
    with Cutting(bus.url, float("inf"), 1 << 19) as way, pytest.raises(bus_send.Unreachable):
        bus_file.put(str(tmp_path / "source"), way.url, 0)
    (part,) = wait_until(lambda: list(tmp_path.glob("bus.db.blobs/*")))
    part.write_bytes(b"x" * part.stat().st_size)
    assert bus_file.put(str(tmp_path / "source"), bus.url, PATIENCE)[0] == digest
    bus_file.get(digest, str(tmp_path / "got"), bus.url, 0)


@pytest.mark.parametrize("headers, body", [
    ((), b"y" * 999 + b"x"), ((), b"y" * 999), ((), b"y" * 2000), (("Content-Range: bytes 0-999/1000",), b"z" * 1000),
])  # fmt: skip
def test_a_file_that_is_not_what_its_hash_says_is_refused(headers, body, tmp_path):
    digest = hashlib.sha256(b"y" * 1000).hexdigest()
    with Scripted(page(200, body, *headers)) as server:
        code, out, err = run("get", digest, "-o", tmp_path / "got", url=server.url)
    assert (code, out) == (1, "") and digest in err and not [name for name in os.listdir(tmp_path) if "got" in name]


def test_a_proxy_that_knows_no_ranges_costs_only_time(tmp_path):
    whole = random.Random(1).randbytes(3 * bus_file.PIECE)
    digest = hashlib.sha256(whole).hexdigest()
    (tmp_path / f"got.{digest[:16]}.part").write_bytes(whole[: bus_file.PIECE + 5])
    with Scripted(page(200, whole)) as server:
        bus_file.get(digest, str(tmp_path / "got"), server.url, 0)
        assert server.asked[0].headers["range"] == f"bytes={bus_file.PIECE + 5}-" and len(server.asked) == 1
    assert (tmp_path / "got").read_bytes() == whole


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_never_taken_for_a_file(fault, tmp_path, monkeypatch):
    monkeypatch.setattr(bus_file, "STALL_SECONDS", 0.1)
    monkeypatch.setattr(bus_file, "RATE", 1 << 20)
    (tmp_path / "source").write_bytes(b"hi")
    with Scripted(FAULTS[fault]) as server:
        with pytest.raises(WRONG):
            bus_file.get("0" * 64, str(tmp_path / "got"), server.url, 0)
        with pytest.raises(WRONG):
            bus_file.put(str(tmp_path / "source"), server.url, 0)
    assert not (tmp_path / "got").exists()


def test_a_page_is_not_taken_for_a_stored_file(tmp_path):
    (tmp_path / "source").write_bytes(b"hi")
    for status in (200, 201):
        absent = page(404, "", "Upload-Offset: 0")
        with Scripted(absent, page(status, "<html>")) as server, pytest.raises(bus_send.Unreachable):
            bus_file.put(str(tmp_path / "source"), server.url, 0)


@pytest.mark.parametrize("changed", [b"other", b"x", b""])
def test_a_file_that_changes_while_it_is_sent_is_refused(changed, bus, tmp_path, monkeypatch):
    source, held = tmp_path / "source", bus_file.held
    monkeypatch.setattr(bus_file, "held", lambda *which: (source.write_bytes(changed), held(*which))[1])
    source.write_bytes(b"first")
    with pytest.raises(bus_file.Damaged, match="changed"):
        bus_file.put(str(source), bus.url, 0)


def test_what_the_bus_refuses_is_told_in_its_words(tmp_path):
    made(tmp_path / "source", 2000)
    with Server(tmp_path / "small.db", "--files", "1000") as bus:
        code, out, err = run("put", tmp_path / "source", "--to", "dell", url=bus.url)
        assert (code, out) == (1, "") and "2000 bytes" in err
        assert run("get", "0" * 64, "-o", tmp_path / "got", url=bus.url)[0] == 1
    with Server(tmp_path / "none.db", "--files", "0") as bus:
        code, _, err = run("put", tmp_path / "source", "--to", "dell", url=bus.url)
        assert code == 1 and "no files" in err
    assert not [name for name in os.listdir(tmp_path) if "part" in name]


def test_exit_codes_of_what_never_reaches_a_bus(tmp_path):
    made(tmp_path / "source", 10)
    nowhere = refusing()
    assert run("get", "0" * 64, "-o", tmp_path / "got", "--timeout", "0", url=nowhere)[0] == 75
    code, _, err = run("put", tmp_path / "source", "--to", "dell", "--timeout", "0", url=nowhere)
    assert code == 75 and err.startswith(f"bus_file: no bus at {nowhere} (Connection refused). Is bus_server running")
    process = start("put", tmp_path / "source", "--to", "dell", url=nowhere, stderr=subprocess.PIPE, text=True)
    first = process.stderr.readline()  # at once, not at the end
    process.kill()
    process.communicate(timeout=PATIENCE)
    says = f"bus_file: no bus at {nowhere} (Connection refused); still trying, up to 60 s. Is bus_server running"
    assert first.startswith(says)
    for wrong in (["get", "abc"], ["get", "0" * 63 + "G"], ["put", tmp_path / "none", "--to", "dell"], ["put"], [],
                  ["put", tmp_path, "--to", "dell"], ["get", "0" * 64, "-o", tmp_path / "no" / "where"]):  # fmt: skip
        code, out, err = run(*wrong, url=nowhere)
        assert (code, out) == (2, "") and err and "[Errno" not in err


@pytest.mark.parametrize("wrong", [
    ["--to", "a b"], ["--to", "dell,a b"], ["--to", ""], ["--to", "dell", "--from", "a b"],
    ["--to", "dell", "--channel", "a b"],
])  # fmt: skip
def test_names_are_checked_before_the_file_is_uploaded(wrong, tmp_path):
    made(tmp_path / "f", 1000)
    with Scripted() as server:
        code, out, err = run("put", tmp_path / "f", *wrong, url=server.url)
        assert (code, out, server.asked) == (2, "", []) and "is not a name: give 1 to 64" in err


def test_two_who_put_and_two_who_get_the_same_file_do_not_disturb_each_other(bus, tmp_path):
    digest = made(tmp_path / "source", 8 << 20)
    for command in (["put", tmp_path / "source", "--to", "dell"], ["get", digest, "-o"]):
        both = [start(*command, *([tmp_path / f"got{n}"] if command[0] == "get" else []), url=bus.url,
                      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for n in range(2)]  # fmt: skip
        assert [process.wait(PATIENCE) for process in both] == [0, 0]
    assert hashlib.sha256((tmp_path / "got1").read_bytes()).hexdigest() == digest


def test_a_bar_is_drawn_on_a_terminal_only(bus, tmp_path):
    made(tmp_path / "source", 1 << 20)
    terminal, end = pty.openpty()
    process = start("put", tmp_path / "source", "--to", "dell", url=bus.url, stdout=subprocess.DEVNULL, stderr=end)
    os.close(end)
    drawn = b""
    with contextlib.suppress(OSError):  # the terminal ends with its last writer
        while part := os.read(terminal, 1000):
            drawn += part
    os.close(terminal)
    assert process.wait(PATIENCE) == 0 and b"\rsource [" + b"#" * 30 + b"] 100% of 1,048,576 bytes" in drawn
    assert "#" not in run("put", tmp_path / "source", "--to", "dell", url=bus.url)[2]


def test_a_large_file_costs_no_memory(bus, tmp_path):
    def most(*arguments):
        streams = dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL)
        process = start(*arguments, url=bus.url, popen=subprocess.Popen, **streams)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        return used.ru_maxrss * 1024

    def both(path, digest):
        return most("put", path, "--to", "dell"), most("get", digest, "-o", f"{path}, got")

    small = both(tmp_path / "small", made(tmp_path / "small", 1000))
    digest, part = hashlib.sha256(), random.Random(1).randbytes(1 << 20)
    with (tmp_path / "large").open("wb") as file:
        for n in range(FILE_MB):
            file.write(n.to_bytes(4, "big") + part[4:])
            digest.update(n.to_bytes(4, "big") + part[4:])
    large = both(tmp_path / "large", digest.hexdigest())
    assert all(much - little < ROOM for much, little in zip(large, small)), (large, small)
    assert (tmp_path / "large, got").stat().st_size == FILE_MB << 20
    for name in ("large", "large, got"):
        (tmp_path / name).unlink()


@pytest.mark.parametrize("what", ["a pipe", "a link to nothing", "-"])
def test_what_is_no_file_is_not_replaced_by_one(what, bus, tmp_path):
    """Found by a newcomer: -o /dev/full made the device of the machine a file."""
    digest, place = made(tmp_path / "a.bin", 1000), tmp_path / "there"
    assert run("put", tmp_path / "a.bin", "--to", "dell", url=bus.url)[0] == 0
    if what == "a pipe":
        os.mkfifo(place)
    elif what != "-":
        place.symlink_to(tmp_path / "nowhere" / "x")
    was = [(path, path.lstat().st_mode) for path in sorted(tmp_path.iterdir())]
    code, out, err = run("get", digest, "-o", what if what == "-" else place, url=bus.url)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "is no plain file, and stays as it is: give -o another path" in err
    assert [(path, path.lstat().st_mode) for path in sorted(tmp_path.iterdir())] == was


def test_another_file_is_not_replaced_and_a_folder_gets_the_file(bus, tmp_path):
    digest = made(tmp_path / "a.bin", 1000)
    code, _, err = run("put", tmp_path / "a.bin", "--to", "dell", url=bus.url)
    assert code == 0 and f"a.bin is on the bus, its sha256 is {digest}\n" in err
    keep, folder = tmp_path / "keep.txt", tmp_path / "folder"
    keep.write_text("mine")
    code, _, err = run("get", digest, "-o", keep, url=bus.url)
    assert code == 2 and f"{keep} is there already, and is another file: remove it first" in err
    assert keep.read_text() == "mine"
    folder.mkdir()
    for _ in range(2):  # the same file may come again
        said = f"bus_file: the file is in {folder / digest}\n"
        assert run("get", digest, "-o", folder, url=bus.url) == (0, "", said)
    assert [path.name for path in folder.iterdir()] == [digest]
    assert sorted(path.name for path in tmp_path.iterdir() if ".part" in path.name) == []
