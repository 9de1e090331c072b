"""A file that is arriving, and one that is being sent. Part of files.py, which is loaded with this file."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import pathlib
import re
from typing import IO, TYPE_CHECKING, Any

import bus_server
from bus_server import BODY_RATE, BODY_SECONDS, Refused

if TYPE_CHECKING:
    from files import Blobs

PIECE = 65536  # bytes that are read at once


def size_of(file: pathlib.Path) -> int:
    """The size of a file in bytes; 0 if there is no such file."""
    try:
        return file.stat().st_size if file.is_file() else 0
    except OSError:
        return 0


def not_here(*offset: tuple[str, str]) -> Refused:
    why = "another upload of this file is under way, or this one must go on where it stopped"
    return Refused(409, f"{why}: send the bytes from Upload-Offset on", *offset)


def open_part(part: pathlib.Path, start: int) -> IO[bytes]:
    """The part, to be written from `start` on. BlockingIOError if another front is writing it, or has just finished."""
    stream = part.open("ab", buffering=0)  # no buffer of ours
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_part = part.exists() and os.path.samestat(os.fstat(stream.fileno()), part.stat())
        if not is_part:  # it has the name of a file by now, and must not be touched
            raise BlockingIOError
        stream.truncate(start)
    except OSError:
        stream.close()
        raise
    return stream


def content_range(field: str | None, length: int) -> tuple[int, int]:
    """(start, total) of `Content-Range: bytes START-END/TOTAL`; without one, the body is the whole file."""
    if field is None:
        return 0, length
    match = re.fullmatch("bytes ([0-9]{1,15})-([0-9]{1,15})/([0-9]{1,15})", field)
    if not match or int(match[2]) - int(match[1]) + 1 != length or int(match[2]) >= int(match[3]):
        raise Refused(400, "Content-Range must be: bytes START-END/TOTAL, and the body must have that length")
    return int(match[1]), int(match[3])


class Upload:
    """The Sink of a file that is arriving. If the connection breaks, the bytes that arrived are kept."""

    def __init__(self, blobs: Blobs, file: pathlib.Path, start: int, length: int, total: int, token: str) -> None:
        self.blobs, self.file, self.part, self.token = blobs, file, file.with_suffix(".part"), token
        self.at = self.marked = start
        self.missing, self.total = length, total
        self.busy = False
        try:
            blobs.folder.mkdir(mode=0o700, exist_ok=True)
            there, is_new = size_of(self.part), not self.part.exists()
            self.stream = open_part(self.part, start)
        except BlockingIOError:
            raise not_here(*self.offset()) from None
        except OSError as error:
            raise Refused(507, f"the bus cannot store the file: {error.strerror}") from None
        blobs.arriving.add(file.name)
        blobs.own(self.part, token, there, 0 if is_new else 1)
        blobs.count(self.part, start - there, int(is_new))

    def write(self, data: bytes) -> int:
        if self.blobs.full(self.token, len(data)):  # other files took the room meanwhile
            return 0
        done = 0
        with contextlib.suppress(OSError):
            while done < len(data):
                done += self.stream.write(data[done:])
        return done

    def wrote(self, written: Any, size: int) -> None:
        length = written if isinstance(written, int) else 0
        self.at += length
        self.missing -= length
        self.blobs.count(self.part, length)
        if length < size:
            raise Refused(507, "the bus has no room for the rest of this file", *self.offset())

    def far_enough(self) -> bool:
        """See Sink: is the upload as fast as BODY_RATE?"""
        moved = self.at - self.marked >= BODY_SECONDS * BODY_RATE
        self.marked = self.at if moved else self.marked
        return moved

    def offset(self) -> tuple[tuple[str, str]]:
        return (("Upload-Offset", str(self.at)),)

    def finish(self) -> int:
        """In a thread: check the hash, make the file durable and give it its name. Returns the status.

        If the hash is wrong, or the token was revoked while that took seconds, the part is removed.
        """
        digest = hashlib.sha256()
        with self.part.open("rb") as whole:
            for piece in iter(lambda: whole.read(1 << 20), b""):
                digest.update(piece)
            os.fsync(whole.fileno())
        try:
            if digest.hexdigest() != self.file.name:
                raise Refused(422, "the bytes that arrived do not have this sha256; nothing was stored")
            self.blobs.bus.check_token(self.token)  # not in a turn: the rest would then wait for a thread
        except Refused:
            self.part.unlink(missing_ok=True)
            raise
        self.blobs.touch(self.part)
        known = self.file.exists()
        self.part.replace(self.file)
        bus_server.keep_names(str(self.file))
        return 200 if known else 201

    def close(self) -> None:
        if not self.busy:
            self.stream.close()
            self.blobs.arriving.discard(self.file.name)


class Download:
    """The Stream of a file that is being sent: the part that is still to come.

    `file` is its path, if it is sent from its beginning. If it then does not have its hash, its last piece is not sent.
    """

    def __init__(self, stream: IO[bytes], length: int, file: pathlib.Path | None) -> None:
        self.stream, self.length, self.file = stream, length, file
        self.digest = hashlib.sha256()
        self.busy = False

    def read(self) -> bytes:
        piece = self.stream.read(min(PIECE, self.length))
        self.length = self.length - len(piece) if piece else 0
        self.digest.update(piece)
        if self.file and not self.length and self.digest.hexdigest() != self.file.name:
            self.put_aside(self.file)
            return b""
        return piece

    def put_aside(self, file: pathlib.Path) -> None:
        with contextlib.suppress(OSError):  # it was removed just now, or replaced by one that is whole
            if os.path.samestat(os.fstat(self.stream.fileno()), file.stat()):
                aside = file.rename(file.with_suffix(".damaged"))
                bus_server.say(f"bus_server: the disk has damaged a file, which is now {aside}: send it again")

    def close(self) -> None:
        self.stream.close()
