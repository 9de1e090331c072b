"""Files on a bus with several fronts: they are in one folder, which all fronts have (--files-dir)."""
import hashlib

import pytest

import bus_server
from bus_server import Unusable
from tests.kit.inside import FILE, FILE_PATH
from tests.kit.ledger import Transport, settle
from tests.kit.processes import wait_until


@pytest.fixture
def two(fronts, tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()
    return [fronts(name, "--files-dir", str(folder)) for name in ("a", "b")]


class Pausing(Transport):
    def pause_reading(self):
        """A sink takes what came; the rest comes when the test gives it."""


def begin(bus, method, path, body=b"", length=None, content_range=""):
    """Begin a request: (connection, what was written to it)."""
    length = f"Content-Length: {length or len(body)}\r\n"
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{length}{content_range}\r\n"
    connection, transport = bus_server.Connection(bus.door), Pausing()
    connection.connection_made(transport)
    connection.data_received(head.encode() + body)
    return connection, transport


def answered(bus, *asked):
    """(status, headers, body) of a request."""
    connection, transport = begin(bus, *asked)

    def whole():
        settle(bus)
        connection.resume_writing()
        head, end, body = transport.written.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split()[0]) if end else 0
        return end and len(body) >= length and (int(head.split()[1]), head.decode(), body)

    return wait_until(whole)


def test_a_file_that_is_sent_at_one_front_is_there_at_the_other(two):
    a, b = two
    assert answered(b, "GET", FILE_PATH)[0] == 404
    assert answered(a, "PUT", FILE_PATH, FILE)[0] == 201
    status, _, body = answered(b, "GET", FILE_PATH)
    assert status == 200 and hashlib.sha256(body).digest() == hashlib.sha256(FILE).digest()
    assert answered(b, "PUT", FILE_PATH, FILE)[0] == 200


def test_an_upload_goes_on_at_the_other_front_but_not_while_it_arrives_at_the_first(two, tmp_path):
    a, b = two
    half = len(FILE) // 2
    first, _ = begin(a, "PUT", FILE_PATH, FILE[:half], len(FILE))
    part = tmp_path / "shared" / f"{FILE_PATH[6:]}.part"
    wait_until(lambda: settle(a) or part.stat().st_size == half)
    rest = f"Content-Range: bytes {half}-{len(FILE) - 1}/{len(FILE)}\r\n"
    status, head, _ = answered(b, "PUT", FILE_PATH, FILE, None)
    assert status == 409 and "Upload-Offset: " in head
    first.connection_lost()
    settle(a)
    assert answered(b, "PUT", FILE_PATH, FILE[half:], None, rest)[0] == 201
    assert answered(a, "GET", FILE_PATH)[2] == FILE


def test_each_front_counts_the_files_of_the_others(two):
    a, b = two
    answered(a, "PUT", FILE_PATH, FILE)
    for tidy in b.on_tidy:
        tidy()
    figures = lambda: [rows for metric in b.metrics for name, *_, rows in metric() if name == "files_bytes"]  # noqa: E731
    wait_until(lambda: settle(b) or figures() == [[("", len(FILE))]])


def test_a_folder_that_is_not_there_is_refused_in_words(fronts, tmp_path):
    with pytest.raises(Unusable, match="there is no folder .*: make or mount it first"):
        fronts("a", "--files-dir", str(tmp_path / "nowhere"))
