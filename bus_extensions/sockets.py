"""Unix sockets (PROTOCOL.md section 19): `--listen unix:PATH`, for programs that have a directory and no network."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import stat

from bus_server import Bus, Door, Listener, Unusable

TABLES, NOUN, OPERATIONS = None, "", ()


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--listen",
        action="append",
        default=[],
        type=path_of,
        metavar="unix:PATH",
        help="listen on this Unix socket; without --host and --port on nothing else",
    )


def start(bus: Bus, options: argparse.Namespace) -> None:
    for path in options.listen:
        bus.listeners.append((f"unix:{path}", LocalListener(bus.door, path)))


def path_of(text: str) -> str:
    kind, _, path = text.partition(":")
    if kind != "unix" or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not a socket like unix:/run/agent-bus/socket")
    return os.path.abspath(path)


class LocalListener(Listener):
    """Accepts connections on a Unix socket. Its file is for this user alone, and is removed at the end."""

    def __init__(self, door: Door, path: str) -> None:
        self.path = path
        try:
            remove_stale(path)
            sock = socket.socket(socket.AF_UNIX)
            sock.bind(path)  # main() has set a umask that lets nobody else in
            os.chmod(path, 0o600)
            sock.listen(4096)
            self.file = os.stat(path).st_ino
        except OSError as error:
            raise Unusable(f"cannot listen on {path}: {error.strerror or error}: choose another path") from None
        super().__init__(door, sock, None)

    def close(self) -> None:
        super().close()
        with contextlib.suppress(OSError):  # it has gone, or another server has replaced it
            if os.stat(self.path).st_ino == self.file:
                os.unlink(self.path)


def remove_stale(path: str) -> None:
    """Remove the socket of a server that was killed. Unusable, if something else is there."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise Unusable(f"cannot listen on {path}: it is there, and is no socket: choose another path")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
                return
        used = f"another server listens there: use it (AGENT_BUS_URL=unix:{path}), or choose another path"
        raise Unusable(f"cannot listen on {path}: {used}")
