#!/usr/bin/env python3
"""A sensitive file changes hands by its path and its hash: it never passes through the bus, nor through a context.

    AGENT_NAME=spark python3 examples/handover.py offer /srv/shared/key.pem dell
    AGENT_NAME=dell python3 examples/handover.py accept ~/key.pem

`offer` waits for dell's answer; `accept` takes the next file that is offered.

What it shows: both agents see the same directory, and the bus only has `path`, `size` and `sha256` as fields of a
message. `accept` opens the path once. It refuses a file that is not plain, that others can read, or that has another
hash, and says so. `offer` asks (bus_send.ask), so it learns the outcome. If the two agents have no directory in common,
tools/bus_file.py transfers the bytes.
"""
import argparse
import contextlib
import hashlib
import os
import pathlib
import stat
import sys

# Python 3.8 prints this text. Older ones show the line in a SyntaxError, because they do not know `:=`.
if sys.version_info < (3, 9) and (needs := "handover.py needs Python 3.9 or later"):  # noqa: UP036
    sys.exit(needs)
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))  # the clients, unless they are installed
import bus_recv
import bus_send

PATIENCE = 300  # s
LARGEST = 1 << 20  # bytes; this is for keys, not for archives


def offer(path, to):
    content = pathlib.Path(path).read_bytes()
    about = {"path": os.path.abspath(path), "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    reply = bus_send.ask(to, f"a file for you: {path}", type="handover", timeout=PATIENCE, fields=about)["reply"]
    print(reply["msg"] if reply else "nobody took it")
    return 0 if reply and reply.get("accepted") is True else 1


def accept(target):
    """Take the file that a waiting message, or the next one, offers. Returns 0 if it was taken."""
    code = 1
    for message in bus_recv.receive(bus_recv.settings()["AGENT_NAME"], once=True, timeout=PATIENCE):
        if message.get("type") == "handover":
            try:
                take(message, target)
                said, code = "taken: it is what you said", 0
            except (OSError, ValueError) as error:
                said, code = f"not taken: {error}", 1
            key = f"handover-{message['id']}"
            bus_send.send(message["from"], said, reply_to=message["id"], key=key, fields={"accepted": code == 0})
            print(said)
    return code


def take(message, target):
    """Copy the offered file. The bytes that were read are checked, so nobody can exchange the file in between."""
    with open(os.open(message["path"], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o077:
            raise ValueError("it is not a plain file with mode 600")
        content = file.read(LARGEST)
    if len(content) != message["size"] or hashlib.sha256(content).hexdigest() != message["sha256"]:
        raise ValueError("its hash is not the one that was offered")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(target)
    with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


def main():
    parser = argparse.ArgumentParser(description="Hand a sensitive file over by path and hash.")
    commands = parser.add_subparsers(dest="command", required=True)
    offering = commands.add_parser("offer", help="offer a file, and wait until somebody has taken it")
    offering.add_argument("path", help="the file; its mode must be 600")
    offering.add_argument("to", help="the name of the agent that gets it")
    accepting = commands.add_parser("accept", help="take the next file that is offered to $AGENT_NAME")
    accepting.add_argument("target", help="where the copy goes")
    given = parser.parse_args()
    if not bus_recv.settings().get("AGENT_NAME"):
        parser.error("AGENT_NAME is missing: set it to your own name")
    url = bus_recv.settings()["AGENT_BUS_URL"]
    try:
        bus_recv.ask(url, "/inbox", 5)  # a look: is a bus there, and may we use it?
    except bus_recv.Unreachable as fault:
        raise OSError(bus_recv.no_bus(url, fault)) from fault
    return offer(given.path, given.to) if given.command == "offer" else accept(given.target)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (bus_recv.Refused, bus_send.Refused, bus_send.Unreachable, ValueError, OSError) as error:
        sys.exit(f"handover: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
