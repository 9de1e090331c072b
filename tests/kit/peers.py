"""What the tests of kinds of fault say to a bus: one exchange, requests behind each other, tokens, memory."""
import contextlib
import hashlib
import json
import os
import pathlib
import re
import resource
import secrets
import socket
import sqlite3
import time
from typing import NamedTuple

from tests.kit import forked
from tests.kit.processes import COMMAND, PATIENCE, wait_until
from tests.kit.serving import Beside

TIMED_OUT = (TimeoutError, socket.timeout)  # noqa: UP041  (two classes before Python 3.10)


class Reply(NamedTuple):
    status: int
    fields: dict
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)


class Closed(Exception):
    """The bus hung up before a whole answer."""


class Peer:
    """One connection. Requests may be sent behind each other; answers come one by one."""

    def __init__(self, bus, token=None, patience=PATIENCE, room=None, source=None):
        self.sock = socket.socket()
        if room:  # bytes that this side takes unread
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        if source:  # an address of its own, as 127.0.0.2: a peer that has budgets of its own
            self.sock.bind((source, 0))
        self.sock.settimeout(patience)
        self.sock.connect(("127.0.0.1", bus.port))
        self.token, self.unread = token, b""

    def request(self, method, path, body=b"", **fields):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        if self.token:
            fields["Authorization"] = f"Bearer {self.token}"
        if body or method in ("POST", "PUT"):
            fields.setdefault("Content_Length", len(body))
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost"]
        lines += [f"{field.replace('_', '-')}: {value}" for field, value in fields.items()]
        return "\r\n".join([*lines, "", ""]).encode() + body

    def send(self, method, path, body=b"", **fields):
        self.sock.sendall(self.request(method, path, body, **fields))
        return self

    def more(self):
        data = self.sock.recv(1 << 20)
        if not data:
            raise Closed
        self.unread += data

    def answer(self, bare=False):
        """The next answer; Closed if there is none, TimeoutError if the bus says nothing."""
        while b"\r\n\r\n" not in self.unread:
            self.more()
        head, _, self.unread = self.unread.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        length = 0 if bare else int(fields.get("content-length", 0))
        pieces, size = [self.unread], len(self.unread)
        while size < length:
            pieces.append(self.sock.recv(1 << 20))
            if not pieces[-1]:
                raise Closed
            size += len(pieces[-1])
        whole = b"".join(pieces)
        self.unread = whole[length:]
        return Reply(int(status.split()[1]), fields, whole[:length])

    def outcome(self):
        """The status of the next answer; 0 if the bus hung up, None if it says nothing."""
        try:
            return self.answer().status
        except TIMED_OUT:
            return None
        except (OSError, Closed):
            return 0

    def close(self):
        self.sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def closed(peer):
    """The bus has hung up on it, with an answer or without. Then so have we."""
    peer.settimeout(0)
    try:
        while peer.recv(65536):
            pass
    except BlockingIOError:
        return False
    except OSError:
        pass
    peer.close()
    return True


def ask(bus, method, path, body=b"", token=None, patience=PATIENCE, source=None, **fields):
    """One exchange on a connection of its own."""
    with Peer(bus, token, patience, source=source) as peer:
        return peer.send(method, path, body, **fields).answer()


def post(bus, to, msg="x", sender="ann", token=None, **members):
    body = {"from": sender, "to": to, "msg": msg, **members}
    return ask(bus, "POST", "/send", body, token)


def stored(bus, to, msg="x", sender="ann", token=None, **members):
    """The id of a message that was stored."""
    reply = post(bus, to, msg, sender, token, **members)
    assert reply.status == 200, reply
    return reply.json["id"]


def fill(bus, to, count, msg="x", sender="ann", token=None, at_once=200):
    """Store many, in arrays."""
    with Peer(bus, token) as peer:
        for start in range(0, count, at_once):
            some = [{"from": sender, "to": to, "msg": msg}] * min(at_once, count - start)
            assert peer.send("POST", "/send", some).answer().status == 200


def log_of(bus, name):
    """The texts of all messages to a name that the bus still has."""
    return [each["msg"] for each in json.loads(bus.get(f"/log?to={name}&max=1000"))["messages"]]


def metric(bus, name, token=None):
    """A number of /metrics that has no labels."""
    lines = ask(bus, "GET", "/metrics", token=token).body.decode().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"agent_bus_{name} ")))


def run(*arguments):
    """(exit code, stdout, stderr) of bus_server.py, which is expected to end."""
    done = forked.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=PATIENCE)
    return done.returncode, done.stdout, done.stderr


def command(bus, *arguments, code=0):
    """Run a command beside the bus; returns what it printed."""
    done = run(*arguments, "--db", bus.db)
    assert done[0] == code, done
    return done[1] + done[2]


def invite(bus, *arguments):
    """The token that the command `invite` prints, as an operator runs it beside the bus."""
    return re.search(r"abt_[0-9a-f]{8}_[\w-]{43}", command(bus, "invite", *arguments))[0]


def mint(path, **grants):
    """The tokens of some names, written as `invite` does, before the bus starts; options as those of invite."""
    tokens, rows = {}, []
    for name, options in grants.items():
        token, secret = f"abt_{secrets.token_hex(4)}", secrets.token_urlsafe(32)
        also = options[options.index("--also") + 1].split(",") if "--also" in options else []
        row = {"id": token, "hash": hashlib.sha256(secret.encode()).hexdigest(), "name": name, "also": also}
        row.update(made=int(time.time()), revoked=None)
        rows.append({**row, "send_only": "--send-only" in options, "operator": "--operator" in options})
        tokens[name] = f"{token}_{secret}"
    pathlib.Path(f"{path}.tokens").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return tokens


def set_revoked(bus, name, when=1):
    """What `revoke` writes, or with None takes it back; without its process, and without its wait for the server."""
    set_in_tokens(bus, name, revoked=when)


def set_expires(bus, name, when):
    """As if the tokens of this name had been made to expire then."""
    set_in_tokens(bus, name, expires=when)


def set_in_tokens(bus, name, **members):
    file = pathlib.Path(f"{bus.db}.tokens")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        if row["name"] == name:
            row.update(members)
    fresh = file.with_suffix(".fresh")
    fresh.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    fresh.replace(file)


def marks_are_written(bus):
    """Wait until the marks of all who have read so far are on the disk: those of `herald`, who reads last, are."""
    herald = f"herald-{secrets.token_hex(4)}"
    one = stored(bus, herald)
    assert ask(bus, "GET", f"/recv?to={herald}&since={int(one, 16) / 1e6:.6f}").status == 200

    def written():
        with contextlib.closing(sqlite3.connect(f"file:{bus.db}?mode=ro", uri=True)) as database:
            return database.execute("SELECT 1 FROM mailboxes WHERE name = ? AND read > 0", (herald,)).fetchall()

    wait_until(written)


def sockets(bus):
    """How many the server has open."""
    links = []
    for file in pathlib.Path(f"/proc/{bus.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since
            links.append(os.readlink(file))
    return sum(link.startswith("socket:") for link in links)


def resident(bus):
    """Bytes of memory that the server has now."""
    status = pathlib.Path(f"/proc/{bus.process.pid}/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmRSS"))


def alive(bus):
    """It answers, and in good time."""
    return bus.process.poll() is None and ask(bus, "GET", "/healthz", patience=5).status == 200


def cpu(bus):
    """Seconds that the server has computed, in its first thread: the loop."""
    return int(pathlib.Path(f"/proc/{bus.process.pid}/schedstat").read_text().split()[0]) / 1e9


class Slowest(Beside):
    """Another client asks for /healthz all the while; `worst` is the longest that an answer took, in s.

    `work` is the most that the bus computed meanwhile, in s of CPU: whoever else uses the machine does not change it.
    """

    def __init__(self, bus, path="/healthz"):
        super().__init__()
        self.bus, self.path = bus, path
        self.worst, self.work, self.count, self.failure = 0.0, 0.0, 0, None

    def run(self):
        try:
            with Peer(self.bus) as peer:
                while not self.over.is_set():
                    began, computed = time.monotonic(), cpu(self.bus)
                    peer.send("GET", self.path).answer()
                    self.worst, self.count = max(self.worst, time.monotonic() - began), self.count + 1
                    self.work = max(self.work, cpu(self.bus) - computed)
                    time.sleep(0.002)  # one that asks all the while, and takes no CPU from those who are watched
        except (OSError, Closed) as error:
            self.failure = error


@contextlib.contextmanager
def many_files():
    """As many descriptors as this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
