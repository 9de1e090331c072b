#!/usr/bin/env python3
"""Leave a file on an agent-bus for somebody, and get one: by the sha256 of what is in it, in as many tries as it takes.

    AGENT_BUS_URL=http://10.0.0.5:8080 AGENT_NAME=spark python3 tools/bus_file.py put weights.bin --to dell
    python3 tools/bus_file.py get 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08 -o weights.bin

`put` sends what the bus does not have of the file, and then one message: `file weights.bin 1234 bytes sha256 9f86...`.
`get` is the other half. Both go on where they were cut, use little memory, and show a bar if stderr is a terminal. What
was got is named PATH only when its hash is right; until then it is PATH.HASH.part, and the next `get` goes on with it.

It has the environment of bus_send.py. Exit code: 0 done, 1 refused by the bus, or the file is not what its hash says,
2 usage or a file that cannot be read or written, 75 out of reach: the same call goes on where this one ended.
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

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path += [HERE, os.path.dirname(HERE)]  # the clients lie beside this file or one folder up, or are installed
try:
    import bus_recv
    import bus_send
except ModuleNotFoundError as missing:
    print(f"bus_file: {missing.name}.py is missing in {HERE}: run curl -fO $AGENT_BUS_URL/{missing.name}.py there",
          file=sys.stderr)  # fmt: skip
    sys.exit(2)

PIECE = 1 << 18  # bytes in memory at a time
STALL_SECONDS = 60.0  # without a byte; at the end of an upload the bus reads the whole file once more
RATE = 8192  # bytes per second; what is slower is cut, and goes on from there
PATIENCE = 60.0  # s without getting any further
BAR = 30  # characters
NOTHING = hashlib.sha256().hexdigest()  # what an empty file is called


class Damaged(Exception):
    """What arrived is not what its hash says."""


class Progress:
    """A line on the terminal, about ten times a second; nothing if stderr is none."""

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
    """Endures faults, until there was no progress for so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.furthest = seconds, -1

    def endure(self, fault: bus_send.Unreachable, at: int) -> None:
        """Wait for the next attempt, or raise the fault. `at` is how many bytes are through."""
        now = time.monotonic()
        if at > self.furthest:
            self.furthest, self.end, self.pause = at, now + self.seconds, bus_send.FIRST_PAUSE
        rest = max(self.pause * random.uniform(0.5, 1), fault.retry_after)
        if now + rest >= self.end:
            raise fault
        time.sleep(rest)
        self.pause = min(2 * self.pause, bus_send.LONGEST_PAUSE)


def put(path: str, url: str, seconds: float) -> tuple[str, int]:
    """Have the file on the bus; its sha256 and size. `seconds` without getting further are endured.

    Raises bus_send.Refused, bus_send.Unreachable; Damaged, if the file changed meanwhile; OSError for the file.
    """
    with open(path, "rb") as file:
        digest, size = hashed(file).hexdigest(), file.tell()
        patience, progress, at = Patience(seconds), Progress(os.path.basename(path), size), 0
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
    """How many bytes of the file the bus has; None if it has all."""
    with answered(url, "HEAD", digest) as response:
        if response.status == 200 and response.headers.get("Content-Length") == str(size):
            return None
        offset = response.headers.get("Upload-Offset", "")
        if response.status == 404 and offset.isdecimal():
            return int(offset) if int(offset) < size else 0
    with answered(url, "GET", digest) as response:  # a refusal of this has words
        raise refusal(response)


def upload(url: str, digest: str, file: IO[bytes], at: int, size: int, progress: Progress) -> bool:
    """Send what is missing. False if the bus has thrown it away, because the whole is not what its hash says."""

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
    """Have the file at `path`. `seconds` without getting further are endured.

    Raises bus_send.Refused, bus_send.Unreachable; Damaged, if it is not what its hash says; OSError for the file.
    """
    part = f"{path}.{digest[:16]}.part"
    patience, progress = Patience(seconds), Progress(os.path.basename(path))
    with open(os.open(part, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
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
                    if not at:  # else the part that was here may be to blame
                        raise Damaged(f"what the bus has is not {digest}")
            os.fsync(file.fileno())
        finally:
            progress.end()
            if os.path.getsize(part) == 0 and digest != NOTHING:
                os.unlink(part)
    os.replace(part, path)


def download(url: str, digest: str, at: int, progress: Progress) -> Iterator[bytes]:
    """The bytes from there on. None if there are not so many."""
    with answered(url, "GET", digest, {"Range": f"bytes={at}-"} if at else {}) as response:
        if response.status == 416:
            return
        if response.status not in (200, 206):
            raise refusal(response)
        known = 0 if response.status == 200 else at  # some proxies know no ranges
        if not response.headers.get("Content-Range", f"bytes {known}-").startswith(f"bytes {known}-"):
            raise bus_send.Unreachable("this is not the part that was asked for")
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
    """What is answered to one request. bus_send.Unreachable for all that goes wrong, also while it is read."""
    connection, prefix, usual = bus_send.connect(url, bus_send.GRACE_SECONDS)
    headers = {**usual, **bus_send.credentials(url), **(headers or {})}
    try:
        connection.connect()
        sock = connection.sock
        sock.settimeout(STALL_SECONDS)
        with bus_send.hung_up_after(STALL_SECONDS + size / RATE, sock):
            connection.putrequest(method, f"{prefix}/blob/{digest}")
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders()
            with contextlib.suppress(ConnectionError):  # it may have answered before it has all
                for piece in body:
                    connection.send(piece)
            response = connection.getresponse()
        with bus_send.hung_up_after(STALL_SECONDS + (response.length or 0) / RATE, sock):
            yield response
    except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: a chunk of negative size
        raise bus_send.Unreachable(getattr(error, "strerror", None) or str(error) or type(error).__name__) from error
    finally:
        connection.close()


def refusal(response: http.client.HTTPResponse) -> Exception:
    """What an answer means that is none of the good ones."""
    body = response.read(bus_send.ANSWER_BYTES)
    error = said(body).get("error")
    if response.status == 501 and error:
        return bus_send.Refused(501, str(error))
    try:
        bus_send.judged(response, body)
    except bus_send.Refused as refused:
        if refused.status != 409:  # another upload of the same file, or one of ours that the bus still believes in
            return refused
        return bus_send.Unreachable(str(refused))
    except bus_send.Unreachable as fault:
        return fault
    return bus_send.Unreachable("no file of a bus")


def said(body: bytes) -> dict[str, Any]:
    """The JSON object that this is, or an empty one."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(body)
        return value if isinstance(value, dict) else {}
    return {}


def hashed(file: IO[bytes]) -> hashlib._Hash:
    """The sha256 so far; after this the file stands at its end."""
    digest = hashlib.sha256()
    file.seek(0)
    while piece := file.read(PIECE):
        digest.update(piece)
    return digest


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Leave a file on an agent-bus for somebody, or get one.")
    commands = parser.add_subparsers(dest="command", required=True)
    putting = commands.add_parser("put", help="upload a file, and tell somebody its hash")
    putting.add_argument("path", metavar="PATH")
    putting.add_argument("--to", metavar="NAME", required=True, type=bus_send.receivers, help="whom to tell")
    putting.add_argument("--subject", help="what it is about, in one line")
    putting.add_argument("--from", dest="sender", metavar="NAME", help="default: $AGENT_NAME")
    putting.add_argument("--channel", help="default: $AGENT_BUS_CHANNEL, or 'default'")
    getting = commands.add_parser("get", help="download a file")
    getting.add_argument("digest", metavar="SHA256")
    getting.add_argument("-o", dest="path", metavar="PATH", help="where to; default: the hash")
    for command in (putting, getting):
        command.add_argument("--timeout", type=float, default=PATIENCE, metavar="S",
                             help="give up after S seconds without getting further (60)")  # fmt: skip
    options = parser.parse_args(argv)
    try:
        if options.command == "put":
            return leave(options)
        if not re.fullmatch("[0-9a-f]{64}", options.digest):
            raise ValueError(f"a sha256 has 64 of 0-9 a-f, and this is {options.digest!r}")
        url = os.environ.get("AGENT_BUS_URL") or bus_send.DEFAULT_URL
        get(options.digest, options.path or options.digest, url, options.timeout)
    except (ValueError, OSError, Damaged, bus_send.Refused, bus_send.Unreachable) as error:
        said = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        print("bus_file:", bus_recv.visible(said.replace("\n", " ")), file=sys.stderr)
        return {bus_send.Refused: 1, Damaged: 1, bus_send.Unreachable: 75}.get(type(error), 2)
    except KeyboardInterrupt:
        return 130
    return 0


def leave(options: argparse.Namespace) -> int:
    """Upload, then tell: who is told can get it."""
    url, _ = bus_send.compose(options.to, "", None, options.sender, options.channel, None, {})
    digest, size = put(options.path, url, options.timeout)
    name = os.path.basename(options.path)
    said = {"type": "file", "name": name, "size": size, "sha256": digest, "subject": options.subject}
    msg = f"file {bus_recv.word(name)} {size} bytes sha256 {digest}"
    bus_send.report(bus_send.send(options.to, msg, sender=options.sender, channel=options.channel, **said), options.to)
    return 0


if __name__ == "__main__":
    sys.exit(main())
