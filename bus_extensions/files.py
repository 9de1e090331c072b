"""Files by their hash at /blob/ (PROTOCOL.md section 14).

A file is sent in pieces, never inside a message. The message has the sha256 of the file, and its receiver fetches it.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import pathlib
import re
from typing import TYPE_CHECKING, Any

from bus_server import Answer, Bus, Connection, Refused, Request, Shares, Unusable, parts_of, refusal

if TYPE_CHECKING:
    from _files_streams import Download, Upload, content_range, not_here, size_of
else:
    [streams] = parts_of(__file__, "_files_streams")
    Download = streams.Download
    Upload = streams.Upload
    content_range = streams.content_range
    not_here = streams.not_here
    size_of = streams.size_of

TABLES, NOUN, OPERATIONS = None, "", ()


def size(text: str) -> int:
    """'10g', '500m' in bytes; '0' is none."""
    match = re.fullmatch(r"([0-9]{1,9})([kmgt]?)", text.lower())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 500m, 10g, or 0")
    return int(match[1]) << {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}[match[2]]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--files",
        type=size,
        default="10g",
        metavar="SIZE",
        help="room for all files together; 0: store no files (%(default)s)",
    )
    where = "a folder for the files, instead of DATABASE.blobs; all fronts of a bus give the same, on shared storage"
    parser.add_argument("--files-dir", metavar="FOLDER", help=where)


def start(bus: Bus, options: argparse.Namespace) -> None:
    if options.files_dir and not os.path.isdir(options.files_dir):  # perhaps it is not mounted yet
        missing = f"there is no folder {options.files_dir}: make or mount it first"
        is_file = os.path.exists(options.files_dir)
        raise Unusable(f"--files-dir: {f'{options.files_dir} is a file, not a folder' if is_file else missing}")
    Blobs(bus, options.files, options.files_dir)


class Blobs:
    """Files by the sha256 of their content, in DATABASE.blobs or --files-dir. Owned by the loop.

    A file of which only a part has arrived is named HASH.part; the next upload may continue it. HASH.damaged is one
    that the disk has changed: nobody gets it any more, and it may be sent again. Files are read, written, hashed and
    removed in a thread (Loop.in_thread).
    """

    BLOCK = 4096  # bytes that a small file takes from the disk, so `quota` / BLOCK is the most files (at least 100)
    PART_SECONDS = 7 * 86400.0  # a part waits so long for its rest: a sender cut off on a Friday has another week

    def __init__(self, bus: Bus, quota: int, shared: str | None) -> None:
        self.bus = bus
        self.folder = pathlib.Path(shared or f"{bus.state.path}.blobs")
        self.shared = bool(shared)  # other fronts may store and remove files there
        self.quota = quota if shared or bus.state.path != ":memory:" else 0  # bytes
        self.arriving: set[str] = set()
        sizes = [size_of(file) for file in self.folder.glob("*")]
        self.used, self.files = sum(sizes), len(sizes)  # bytes; files and parts
        self.shares = Shares(self.quota, self.quota / 4)  # by token: bytes, and a block for each file and part
        self.owners: dict[str, str] = {}  # the token that sent a file first, or a part last, since the bus started
        bus.route("PUT", "/blob/", self.put, "store a file; ID is its sha256", sink=self.upload)
        bus.route("GET", "/blob/", self.get, "get a file; ID is its sha256")
        bus.on_tidy.append(lambda: bus.loop.in_thread(self.forget, self.forgotten))
        bus.metrics.append(lambda: [("files_bytes", "gauge", "bytes of all stored files", [("", self.used)])])

    def place(self, request: Request) -> pathlib.Path:
        """The path of the file that a request is about. The file may be missing."""
        if not self.quota:
            raise Refused(501, "this bus keeps no files")
        if not re.fullmatch("[0-9a-f]{64}", request.parsed.rest):
            raise Refused(404, "no file is here: a file is at /blob/HASH, its sha256 in 64 of the digits 0-9 a-f")
        return self.folder / request.parsed.rest

    def upload(self, request: Request) -> Upload:
        file, length = self.place(request), request.parsed.length
        self.bus.storms.spend(f"{request.owner()}/files", 1)  # as a message; no sender has this name
        there = size_of(file.with_suffix(".part"))
        start, total = content_range(request.fields.get("content-range"), length)
        if file.name in self.arriving or start not in (0, there):
            raise not_here(("Upload-Offset", str(there)))
        if total > self.quota:
            raise Refused(413, f"the file has {total} bytes, and the limit for all is {self.quota}; nothing was stored")
        full = self.full(request.grant.token, total - there, 0 if there else 1)
        if full:
            raise Refused(507, f"{full}: files that nobody uses are removed after --keep")
        return Upload(self, file, start, length, total, request.grant.token)

    def full(self, token: str, size: int, files: int = 0) -> str:
        """Why a token may not store so many bytes and files more; empty if it may.

        Only in a room that is three quarters full does its share count: a quarter of the room. Without tokens everyone
        is one owner.
        """
        used, most = self.used + size, max(self.quota // self.BLOCK, 100)
        if used > self.quota or self.files + files > most:
            return "the bus has no room for this file now"
        nearly = used > self.quota * 3 / 4 or self.files + files > most * 3 / 4
        if token and nearly and self.shares.held[token] + size + files * self.BLOCK > self.shares.most_each:
            return "the room for files is nearly full, and over a quarter of it would be of this token"
        return ""

    def count(self, file: pathlib.Path, size: int, files: int = 0) -> None:
        """Count so many bytes and files more, or less."""
        self.used += size
        self.files += files
        token = self.owners.get(file.name)
        if token:
            self.shares.add(token, size + files * self.BLOCK)

    def own(self, part: pathlib.Path, token: str, size: int, files: int) -> None:
        """From now on a part is of the token that goes on with it, whoever began it."""
        self.count(part, -size, -files)
        if token:
            self.owners[part.name] = token
        self.count(part, size, files)

    def removed(self, file: pathlib.Path, size: int) -> None:
        self.count(file, -size, -1)
        self.owners.pop(file.name, None)

    def put(self, request: Request) -> Answer | None:
        """The body of a PUT has arrived; if that was the end of the file, it is checked in a thread."""
        upload = request.sink
        assert isinstance(upload, Upload)
        if upload.at < upload.total:
            return Answer(202, b'{"ok": true}\n', headers=upload.offset())
        upload.busy = True
        self.bus.loop.in_thread(upload.finish, lambda status: self.stored(request.peer, upload, status))
        return None

    def stored(self, connection: Connection, upload: Upload, status: Any) -> None:
        """The end of finish(): `status` is its result, or the exception that it raised."""
        upload.busy = False
        if status == 200 or isinstance(status, Refused):  # after an error the part stays
            self.removed(upload.part, upload.at)
        elif status == 201 and upload.part.name in self.owners:
            self.owners[upload.file.name] = self.owners.pop(upload.part.name)
        if isinstance(status, Refused):
            answer = refusal(status)
        elif isinstance(status, Exception):
            answer = refusal(Refused(507, f"the bus cannot store the file: {status}"))
        else:
            answer = Answer(status, b'{"ok": true}\n')
        upload.close()
        connection.answer(answer)

    def get(self, request: Request) -> Answer:
        self.bus.storms.read(request.owner())
        request.grant.check((request.grant.name,))  # 403 if it may only send
        file = self.place(request)
        try:
            stream = file.open("rb")
        except (FileNotFoundError, IsADirectoryError, PermissionError):  # other errors do not say that it is not there
            offset = ("Upload-Offset", str(size_of(file.with_suffix(".part"))))
            raise Refused(404, "the bus does not have this file, or not all of it", offset) from None
        self.touch(file)
        size = os.fstat(stream.fileno()).st_size
        wanted = re.fullmatch("bytes=([0-9]{1,15})-", request.fields.get("range", ""))
        start = int(wanted[1]) if wanted else 0
        if wanted and start >= size:
            stream.close()
            why = f"the file has {size} bytes: Range must start before its end"
            raise Refused(416, why, ("Content-Range", f"bytes */{size}"))
        stream.seek(start)
        span = (("Content-Range", f"bytes {start}-{size - 1}/{size}"),) if wanted else ()
        status, rest = (206 if wanted else 200), Download(stream, size - start, None if start else file)
        return Answer(status, b"", "application/octet-stream", span, file=rest)

    def touch(self, file: pathlib.Path) -> None:
        """It was sent or requested now. If the clock is behind, as before the network is up, the mail knows better."""
        with contextlib.suppress(OSError):  # it was removed just now, or belongs to another user
            os.utime(file, 2 * (max(self.bus.view.clock(), self.bus.last) / 1000000,))

    def forget(self) -> tuple[list[tuple[pathlib.Path, int]], int, int]:
        """In a thread: remove old files, and parts whose upload nobody continued.

        Returns each with its bytes; the bytes of all others, and how many they are.

        A file is old if nobody sent or requested it during --keep. A part takes room and nobody can read it, so it is
        removed after PART_SECONDS even if everything else is kept for ever. Nothing is, while the clock is not trusted;
        by now it may be wrong, so the time is that of the look at it.
        """
        now, keep, gone = self.bus.retention.looked or 0.0, self.bus.retention.keep, list[tuple[pathlib.Path, int]]()
        used = files = 0
        for file in self.folder.glob("*"):
            with contextlib.suppress(OSError):  # somebody else put a folder or a broken link here: go on
                status = file.stat()
                patience = min(keep or math.inf, self.PART_SECONDS if file.suffix == ".part" else math.inf)
                is_old = self.bus.retention.trusted <= now > status.st_mtime + patience
                if is_old and file.stem not in self.arriving:
                    file.unlink()
                    gone.append((file, status.st_size))
                else:
                    used, files = used + status.st_size, files + 1
        return gone, used, files

    def forgotten(self, outcome: Any) -> None:
        if isinstance(outcome, tuple):
            gone, used, files = outcome
            for file, size in gone:
                self.removed(file, size)
            if self.shared:
                self.used, self.files = used, files
