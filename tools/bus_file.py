#!/usr/bin/env python3
"""Store a file on an agent-bus and announce it, or get a file. A file's name on the bus is its sha256.

    AGENT_BUS_URL=http://10.0.0.5:8080 AGENT_NAME=spark python3 tools/bus_file.py put weights.bin --to dell
    python3 tools/bus_file.py get 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08 -o weights.bin

`put` sends the bytes that the bus does not have yet, then one message: `file weights.bin 1234 bytes`, `sha256 9f86...`
on a line of its own, and how to get it.
`get` downloads a file. Both resume after an interruption, use little memory, and show a bar if stderr is a terminal. A
download is named PATH.HASH.part until it is complete and its hash is right; the next `get` continues that part.

It takes the variables of bus_send.py. Exit code: 0 done, 1 refused by the bus, or the content does not have its hash,
2 usage, or a file that cannot be read or written, 75 the bus is not reachable: run the same command again to resume.
"""
from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client
import json
import os
import random
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

# Python 3.8 prints this text. Older ones show the line in a SyntaxError, because they do not know `:=`.
if sys.version_info < (3, 9) and (needs := "bus_file.py needs Python 3.9 or later"):  # noqa: UP036
    sys.exit(needs)
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path += [HERE, os.path.dirname(HERE)]  # the clients lie beside this file or one folder up, or are installed
sys.path.sort(key=lambda folder: folder.endswith("-packages"))  # else an older version that is installed wins
try:
    import bus_recv
    import bus_send
except ModuleNotFoundError as missing:
    print(f"bus_file: {missing.name}.py is missing in {HERE}: run curl -fO $AGENT_BUS_URL/{missing.name}.py there",
          file=sys.stderr)  # fmt: skip
    sys.exit(2)

PIECE = 1 << 18  # bytes in memory at a time
STALL_SECONDS = 60.0  # without a byte; at the end of an upload the bus reads the whole file once more
RATE = 8192  # bytes per second; a slower transfer is cut off, and resumed
PATIENCE = 60.0  # s without progress, then we give up
BAR = 30  # characters
HOW_TO_GET = "to get it: agent-bus file get SHA256, or python3 bus_file.py get SHA256"
NOTHING = hashlib.sha256().hexdigest()  # the hash of an empty file


class Damaged(Exception):
    """The content does not have its hash."""


class Progress:
    """A line on the terminal, about ten times a second; nothing if stderr is not a terminal."""

    def __init__(self, name: str, total: int = 0) -> None:
        self.name, self.total, self.drawn = bus_recv.visible(name), total, 0.0
        self.shown = sys.stderr is not None and sys.stderr.isatty()

    def at(self, done: int) -> None:
        now = time.monotonic()
        if self.shown and (now - self.drawn > 0.1 or done == self.total):
            part = done / self.total if self.total else 1.0
            line = f"{self.name} [{'#' * int(BAR * part):<{BAR}}] {part:4.0%} of {self.total:,} bytes"
            print(f"\r{line}", end="", file=sys.stderr, flush=True)
            self.drawn = now

    def end(self) -> None:
        if self.drawn:
            print(file=sys.stderr)


class Patience:
    """Endures faults until there has been no progress for `seconds`. The first fault is told on stderr."""

    def __init__(self, url: str, seconds: float) -> None:
        self.url, self.seconds, self.furthest, self.told = url, seconds, -1, False

    def endure(self, fault: bus_send.Unreachable, at: int) -> None:
        """Wait for the next attempt, or raise the fault. `at`: how many bytes were transferred so far."""
        now, tried = time.monotonic(), bus_send.urls_of(self.url)[0]
        bus_send.FAILURES[tried] = bus_send.FAILURES.get(tried, 0) + 1  # so that the next attempt is at another URL
        if at > self.furthest:
            self.furthest, self.end, self.pause = at, now + self.seconds, bus_send.FIRST_PAUSE
        rest = max(self.pause * random.uniform(0.5, 1), fault.retry_after)
        if now + rest >= self.end:
            raise bus_send.Unreachable(bus_send.no_bus(self.url, fault)) from fault
        if not self.told:
            complain(bus_send.no_bus(self.url, fault, f"; still trying, up to {self.seconds:.0f} s"))
            self.told = True
        time.sleep(rest)
        self.pause = min(2 * self.pause, bus_send.LONGEST_PAUSE)


def put(path: str, url: str, seconds: float) -> tuple[str, int]:
    """Store the file on the bus; returns its sha256 and size. It gives up after `seconds` without progress.

    Raises bus_send.Refused, bus_send.Unreachable; Damaged, if the file changed meanwhile; OSError for the file.
    """
    with open(path, "rb") as file:
        digest, size = hashed(file).hexdigest(), file.tell()
        patience, progress, at = Patience(url, seconds), Progress(os.path.basename(path), size), 0
        try:
            while True:
                try:
                    there = held(url, digest, size)
                    if there is None or upload(url, digest, file, at := there, size, progress):
                        return digest, size
                    if not at:
                        raise Damaged(f"{path} changed while it was read")
                except bus_send.Unreachable as fault:
                    patience.endure(fault, at)
        finally:
            progress.end()


def held(url: str, digest: str, size: int) -> int | None:
    """How many bytes of the file the bus has, or 0 if this token may not ask; None if it has all."""
    with answered(url, "HEAD", digest) as response:
        if response.status == 403:  # a token made with --send-only: it may put
            return 0
        if response.status == 200 and response.headers.get("Content-Length") == str(size):
            return None
        offset = response.headers.get("Upload-Offset", "")
        if response.status == 404 and offset.isdecimal():
            return int(offset) if int(offset) < size else 0
    with answered(url, "GET", digest) as response:  # the error of a refused GET has a sentence
        raise refusal(response)


def upload(url: str, digest: str, file: IO[bytes], at: int, size: int, progress: Progress) -> bool:
    """Send the missing bytes. False if the bus dropped the file, because its content does not have its hash."""

    def rest() -> Iterator[bytes]:
        file.seek(at)
        while file.tell() < size:
            piece = file.read(min(PIECE, size - file.tell()))
            if not piece:
                raise Damaged(f"{file.name} changed while it was read")
            yield piece
            progress.at(file.tell())

    span = {"Content-Range": f"bytes {at}-{size - 1}/{size}"} if at else {}
    with answered(url, "PUT", digest, {"Content-Length": str(size - at), **span}, rest(), size - at) as response:
        if response.status == 422:
            return False
        if response.status not in (200, 201):
            raise refusal(response)
        if said(response.read(bus_send.ANSWER_BYTES)).get("ok") is not True:
            raise bus_send.Unreachable(f"{response.status}: not from a bus")
        return True


def get(digest: str, path: str, url: str, seconds: float) -> None:
    """Download the file to `path`. It gives up after `seconds` without progress.

    Raises bus_send.Refused, bus_send.Unreachable; Damaged, if the content does not have its hash; OSError for the file.
    """
    part = f"{path}.{digest[:16]}.part"
    patience, progress = Patience(url, seconds), Progress(os.path.basename(path))
    with opened_part(part) as file:
        if not bus_recv.try_lock(file, part):
            raise OSError(f"another process writes to {part}")
        try:
            while (found := hashed(file)).hexdigest() != digest:
                at = file.tell()
                try:
                    for piece in download(url, digest, at, progress):
                        file.write(piece)
                        found.update(piece)
                        progress.at(file.tell())
                except bus_send.Unreachable as fault:
                    patience.endure(fault, file.tell())
                    continue
                if found.hexdigest() != digest:
                    file.truncate(0)
                    if not at:  # else the part that was here before may be wrong
                        raise Damaged(f"the file from the bus does not have the sha256 {digest}")
            os.fsync(file.fileno())
        finally:
            progress.end()
            if os.path.getsize(part) == 0 and digest != NOTHING:
                os.unlink(part)
    os.replace(part, path)


def opened_part(part: str) -> IO[bytes]:
    """This file, made if need be. OSError if it is a link or another user's, who could change it later."""
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)
    try:
        return open(os.open(part, flags | os.O_CREAT | os.O_EXCL, 0o600), "r+b")
    except FileExistsError:
        number = os.open(part, flags)
    if os.name == "posix" and os.fstat(number).st_uid != os.geteuid():
        os.close(number)
        raise OSError(f"{part} belongs to another user: give another -o")
    return open(number, "r+b")


def download(url: str, digest: str, at: int, progress: Progress) -> Iterator[bytes]:
    """The bytes of the file from `at` on; no piece if the file is shorter."""
    with answered(url, "GET", digest, {"Range": f"bytes={at}-"} if at else {}) as response:
        if response.status == 416:
            return
        if response.status not in (200, 206):
            raise refusal(response)
        known = 0 if response.status == 200 else at  # some proxies know no ranges
        if not response.headers.get("Content-Range", f"bytes {known}-").startswith(f"bytes {known}-"):
            raise bus_send.Unreachable("the answer has another part of the file than the one requested")
        progress.total = known + (response.length or 0)
        while piece := response.read(PIECE):
            yield piece[at - known :]
            known += min(len(piece), at - known)
        if response.length:
            raise http.client.IncompleteRead(b"", response.length)


@contextlib.contextmanager
def answered(
    url: str, method: str, digest: str, headers: dict[str, str] | None = None, body: Iterable[bytes] = (), size: int = 0
) -> Iterator[http.client.HTTPResponse]:
    """The answer to one request. Every fault, also while the answer is read, is bus_send.Unreachable."""
    where = bus_send.urls_of(url)[0]
    connection, prefix, usual = bus_send.connect(where, bus_send.GRACE_SECONDS)
    headers = {**usual, **bus_send.credentials(url), **(headers or {})}
    try:
        with bus_send.told_of_silence(where) as silence:
            connection.connect()
            sock = connection.sock
            sock.settimeout(STALL_SECONDS)
            with bus_send.hung_up_after(STALL_SECONDS + size / RATE, sock):
                connection.putrequest(method, f"{prefix}/blob/{digest}")
                for name, value in headers.items():
                    connection.putheader(name, value)
                connection.endheaders()
                if body:  # then there is a bar to look at
                    silence.close()
                with contextlib.suppress(ConnectionError):  # the bus may answer before it has the whole body
                    for piece in body:
                        connection.send(piece)
                response = connection.getresponse()
        where = ""  # its answer has begun
        with bus_send.hung_up_after(STALL_SECONDS + min(response.length or 0, 1 << 45) / RATE, sock):
            yield response
    except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: a chunk of negative size
        raise bus_send.Unreachable(bus_send.worded(error, where)) from error
    finally:
        connection.close()


def refusal(response: http.client.HTTPResponse) -> Exception:
    """The exception for an answer that is not a success."""
    body = response.read(bus_send.ANSWER_BYTES)
    error = said(body).get("error")
    if response.status == 501 and error:
        return bus_send.Refused(501, str(error))
    try:
        bus_send.judged(response, body)
    except bus_send.Refused as refused:
        if refused.status != 409:  # 409: another upload of this file, or our earlier one, is not over yet
            return refused
        return bus_send.Unreachable(str(refused))
    except bus_send.Unreachable as fault:
        return fault
    return bus_send.Unreachable("the answer is not a file of a bus")


def said(body: bytes) -> dict[str, Any]:
    """The JSON object in this body; an empty one if there is none."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(body)
        return value if isinstance(value, dict) else {}
    return {}


def hashed(file: IO[bytes]) -> hashlib._Hash:
    """The sha256 of the file. Reads it to its end."""
    digest = hashlib.sha256()
    file.seek(0)
    while piece := file.read(PIECE):
        digest.update(piece)
    return digest


def complain(line: str) -> None:
    bus_recv.complain(line, "bus_file")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Store a file on an agent-bus and announce it, or get a file.")
    commands = parser.add_subparsers(dest="command")
    putting = commands.add_parser("put", help="upload a file, and send its hash to somebody")
    putting.add_argument("path", metavar="PATH")
    putting.add_argument("--to", metavar="NAME", required=True, help="who gets the hash")
    putting.add_argument("--subject", help="subject of the message, in one line")
    putting.add_argument("--from", dest="sender", metavar="NAME", help="the sender ($AGENT_NAME)")
    putting.add_argument("--channel", help="the channel ($AGENT_BUS_CHANNEL, or 'default')")
    getting = commands.add_parser("get", help="download a file")
    getting.add_argument("digest", metavar="SHA256")
    where = "file or folder to write to (.); in a folder, the file is named by the hash"
    getting.add_argument("-o", dest="path", metavar="PATH", help=where)
    for command in (putting, getting):
        command.add_argument("--bus", type=bus_send.profile, metavar="PROFILE",
                             help="the bus in ~/.config/agent-bus/PROFILE.env")  # fmt: skip
        command.add_argument("--timeout", type=bus_recv.duration, default=PATIENCE, metavar="S",
                             help="give up after S seconds without progress (60)")  # fmt: skip
    options = parser.parse_args(argv)
    if not options.command:
        parser.error("say what to do: put PATH --to NAME, or get SHA256")
    bus_send.tell_people(complain)
    try:
        if options.command == "put":
            return leave(options)
        if not re.fullmatch("[0-9a-f]{64}", options.digest):
            raise ValueError(f"{options.digest!r} is not a sha256: give 64 hex digits (0-9 a-f)")
        path = place_of(options.path or options.digest, options.digest)
        get(options.digest, path, bus_send.settings()["AGENT_BUS_URL"], options.timeout)
        complain(f"the file is in {path}")
    except (ValueError, OSError, Damaged, bus_send.Refused, bus_send.Unreachable) as error:
        said = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        complain(said)
        return {bus_send.Refused: 1, Damaged: 1, bus_send.Unreachable: 75}.get(type(error), 2)
    except KeyboardInterrupt:
        complain("stopped: the same command goes on from here")
        return 130
    return 0


def place_of(path: str, digest: str) -> str:
    """The file to write: in a folder, one with the name of the hash. ValueError if something else is there."""
    path = os.path.join(path, digest) if os.path.isdir(path) else path
    if path == "-" or (os.path.lexists(path) and not os.path.isfile(path)):  # a device, a pipe: it would be replaced
        raise ValueError(f"{path} is no plain file, and stays as it is: give -o another path, or a folder")
    if os.path.isfile(path):
        with open(path, "rb") as file:
            if hashed(file).hexdigest() != digest:
                raise ValueError(f"{path} is there already, and is another file: remove it first, or give another -o")
    return path


def leave(options: argparse.Namespace) -> int:
    """Upload the file, then announce it, so that its receiver can get it at once."""
    url, draft = bus_send.compose(options.to, "", sender=options.sender, channel=options.channel)
    to = [draft["to"]] if isinstance(draft["to"], str) else draft["to"]
    for name in [draft[member] for member in ("from", "channel") if member in draft] + to:  # before the upload
        bus_recv.check_name(name)
    digest, size = put(options.path, url, options.timeout)
    name = os.path.basename(options.path).encode(errors="replace").decode()  # on this disk it need not be UTF-8
    said = {"name": name, "size": size, "sha256": digest}
    # A line of its own fits into 80 columns, so that it can be copied from a terminal.
    msg = f"file {bus_recv.word(name)} {size} bytes\nsha256 {digest}\n{HOW_TO_GET}"
    given = {"sender": options.sender, "channel": options.channel, "type": "file", "subject": options.subject}
    complain(f"{bus_recv.word(name)} is on the bus, its sha256 is {digest}")
    bus_send.report(bus_send.send(options.to, msg, fields=said, **given), options.to)
    return 0


if __name__ == "__main__":
    sys.exit(main())
