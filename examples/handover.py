#!/usr/bin/env python3
"""A sensitive file changes hands by its path and its hash: it never passes through the bus, nor through a context.

    AGENT_NAME=spark python3 examples/handover.py offer /srv/shared/key.pem dell     # waits for dell's answer
    AGENT_NAME=dell python3 examples/handover.py accept ~/key.pem                      # the next file that is offered

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
    for message in bus_recv.receive(os.environ["AGENT_NAME"], once=True, timeout=PATIENCE):
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
    offering = commands.add_parser("offer")
    offering.add_argument("path")
    offering.add_argument("to")
    commands.add_parser("accept").add_argument("target")
    given = parser.parse_args()
    return offer(given.path, given.to) if given.command == "offer" else accept(given.target)


if __name__ == "__main__":
    sys.exit(main())
