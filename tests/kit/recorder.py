"""Write down what test_bus.py and a server say to each other, and compare two such recordings.

    python -m tests.kit.recorder --server old/bus_server.py --suite old/test_bus.py --out old.txt
    python -m tests.kit.recorder --server bus_server.py --suite old/test_bus.py --out new.txt
    python -m tests.kit.recorder --compare old.txt new.txt

The first two start the server, put a proxy before it, make the checks of the suite one by one, and write every request
and every answer, check by check and connection by connection: first on an open bus, then on one with tokens. The third
prints each difference and ends with 1 if there is one. Use the same suite for both servers.

A recording has no value that differs between two runs of one server: `Recording.plain` replaces it. Left as they are:
statuses, header names and their order, member names and their order, spacing, texts, counts. Replaced: times and ids
(by the order in which they first appear in their check: TICK1 and ID1 are one message), the id of the bus, leases,
tokens, the Date, the port, lengths of texts, seconds to wait, the values of metrics, and the sentence of an error.

To make two runs alike, a suite that is recorded gets names that are counted instead of random (`Counted`); what it does
in the background has reached the server before it goes on; and while it waits for a fact, only the last look is kept.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import difflib
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import types
import uuid

from tests.kit.serving import Serving

PATIENCE = 30  # s for the server to start, for a connection to end
SETTLED = 0.1  # s in which a server reads a request that has reached it, and parks it
SHOWN = 2000  # characters of a line; of a longer one the first ones and a hash
ASKED = 400  # characters of a request body: an early answer may cut off what follows


class Conversation:
    """The bytes of one connection, in each direction. Written by the two threads of the proxy that serve it."""

    def __init__(self):
        self.asked, self.answered = bytearray(), bytearray()
        self.ended = threading.Event()


class Proxy(Serving, socketserver.ThreadingTCPServer):
    """It passes every byte on, at once and unchanged, and keeps a copy. `take` hands out what was said since."""

    daemon_threads, request_queue_size = True, 128

    def __init__(self, behind):
        super().__init__(("127.0.0.1", 0), Passing)
        self.behind = behind
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.conversations = []  # in the order in which they began
        self.muted = False
        self.requests = 0  # that have reached the server

    def take(self):
        """The conversations since the last call, each of them complete."""
        taken, self.conversations = self.conversations, []
        for each in taken:
            assert each.ended.wait(PATIENCE), f"a connection was not closed: {bytes(each.asked[:200])!r}"
        return taken

    @contextlib.contextmanager
    def mute(self):
        """What begins within is not kept."""
        self.muted = True
        try:
            yield
        finally:
            self.muted = False

    def process_request(self, request, client_address):
        """In the accepting thread, so that the order of conversations is the order of their connections."""
        request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        conversation = Conversation()
        if not self.muted:
            self.conversations.append(conversation)
        threading.Thread(target=Passing, args=[request, conversation, self], daemon=True).start()


class Passing:
    """One connection: it lives until both sides have said their last."""

    def __init__(self, client, conversation, proxy):
        self.proxy = proxy
        with client, socket.create_connection(proxy.behind) as server:
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            upwards = threading.Thread(target=self.upwards, args=[client, server, conversation.asked], daemon=True)
            upwards.start()
            self.downwards(server, client, conversation.answered)
            upwards.join()
        conversation.ended.set()

    def upwards(self, client, server, kept):
        """Read the client to its end, also when the server does not listen any more: it would never see the answer."""
        for piece in pieces(client):
            kept += piece
            with contextlib.suppress(OSError):
                server.sendall(piece)
            self.proxy.requests += 1
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_WR)

    def downwards(self, server, client, kept):
        for piece in pieces(server):
            kept += piece
            with contextlib.suppress(OSError):
                client.sendall(piece)
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_WR)


def pieces(source):
    """What a socket has to say, until it ends or breaks."""
    with contextlib.suppress(OSError):
        yield from iter(lambda: source.recv(65536), b"")


# ── What is written down ─────────────────────────────────────────────────────────────────────────────────────────────


class Recording:
    """One check: its lines, and the ticks that were seen in it."""

    ANSWERED = r'("(?:ts|now|cursor|from|to)": |Bus-Now: )(\d{9,10}\.\d{6})(?!\d)'
    PRESENTED = r"([?&]since=)(\d{9,10}\.\d+)"  # by a client that has computed with it

    def __init__(self, names, port):
        self.names, self.port = names, port  # names: what the check calls its own, see Counted
        self.ticks = collections.OrderedDict()
        self.short_lived = False  # it has sent a message that expires at once, or a little later: it is unread or not

    def number(self, tick):
        return self.ticks.setdefault(tick, len(self.ticks) + 1)

    def plain(self, text):
        """The text without what differs from run to run."""
        text = text.replace(f"127.0.0.1:{self.port}", "HOST").replace(f"127.0.0.1%3A{self.port}", "HOST")
        text = re.sub(r"\babt_[0-9a-f]{8}_[\w-]{43}", "TOKEN", text)
        text = re.sub(r'"error": "(?:[^"\\]|\\.)*"', '"error": SENTENCE', text)
        text = re.sub(r'("bus": "|[?&]bus=|Bus-Id: )[0-9a-f]{16}\b', r"\1BUS", text)
        text = re.sub(r'("lease": ")[^"]+"', r'\1LEASE"', text)
        text = re.sub(r'("key": ")([0-9a-f]{32})"', self.key, text)
        text = re.sub(f"{self.ANSWERED}|{self.PRESENTED}", self.tick, text)
        text = re.sub(r"([?&]since=)\d{13}\b", r"\1MILLISECONDS", text)
        text = re.sub(r"\b\d{9,10}\.\d{6}\b", "TIME", text)
        text = re.sub(r"\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "DAY", text)
        return re.sub(r"(?<![\w-])([0-9a-f]{13}|[0-9A-F]{13})(?![\w-])", self.ident, text)

    def ident(self, found):
        upper = "" if found[0] == found[0].lower() else " IN CAPITALS"
        return f"ID{self.number(int(found[0], 16))}{upper}"

    def tick(self, found):
        before, digits = filter(None, found.groups())
        return f"{before}TICK{self.number(round(float(digits) * 1000000))}"

    def key(self, found):
        """A client program makes a random key; one that the suite has made is the same in each run."""
        return found[0] if self.own(found[2]) else f'{found[1]}KEY"'

    def own(self, name):
        """Is it a name of this check, and not of an earlier one?"""
        return any(each in name for each in self.names)

    def lines(self, conversation):
        """What was said on a connection, each line with who said it."""
        asked = bytes(conversation.asked).decode("utf-8", "surrogateescape")
        head, _, body = asked.partition("\r\n\r\n")
        yield from (f"> {short(line)}" for line in self.fields(head.split("\r\n")))
        if body:
            yield f"> {self.plain(body)[:ASKED]!r}"
        target = head.split(" ")[1] if head.count(" ") > 1 else ""
        self.short_lived = self.short_lived or '"ttl": 0.001' in body
        rest = bytes(conversation.answered)
        while rest:
            head, _, rest = rest.partition(b"\r\n\r\n")
            fields = head.decode("latin-1").split("\r\n")
            lengths = [int(line.split(":")[1]) for line in fields if line.lower().startswith("content-length:")]
            length = lengths[0] if lengths and not asked.startswith("HEAD ") else 0
            body, rest = rest[:length], rest[length:]
            kept = target.startswith("/blob/") and fields[0].split(" ")[1][0] == "2"  # its length is what it is
            yield from (f"< {short(line)}" for line in self.fields(fields, kept))
            yield from (f"< {short(line)}" for line in self.body(target, body, kept))
        if not conversation.answered:
            yield "< nothing"

    def fields(self, lines, kept_length=False):
        for line in lines:
            name, colon, value = line.partition(": ")
            if name in ("Date", "Retry-After") or (name == "Content-Length" and not kept_length):
                value = name.upper()
            yield self.plain(name + colon + value)

    def body(self, target, body, binary):
        path = target.partition("?")[0]
        if path.startswith("/bus_") and body[:2] == b"#!":
            yield "A PROGRAM"
        elif binary and not body.startswith(b"{"):
            yield f"{len(body)} bytes, {hashlib.sha256(body).hexdigest()}"
        elif path in ("/agents", "/inbox") and b'"error"' not in body:
            yield self.plain(self.of_this_check(body.decode()))
        elif path == "/metrics" and b'"error"' not in body:
            yield from self.metrics(body.decode())
        elif path == "/send" and self.short_lived:
            yield re.sub(r'"unread": \d+', '"unread": N', self.plain(body.decode()))
        else:
            yield from self.plain(body.decode("utf-8", "surrogateescape")).splitlines()

    def of_this_check(self, text):
        """An answer about everybody, without the names of other checks: who of those is online depends on the time."""
        answer = json.loads(text, parse_float=Spelled)
        if "agents" in answer:
            answer["agents"] = [each for each in answer["agents"] if self.own(each["name"] + " " + each["channel"])]
        else:
            everything = answer["recipients"].items()
            found = {channel: {name: unread for name, unread in boxes.items() if self.own(channel + " " + name)}
                     for channel, boxes in everything}
            answer["recipients"] = {channel: boxes for channel, boxes in found.items() if boxes}
        return re.sub(r'"\\u0001([\d.]+)"', r"\1", json.dumps(answer))

    def metrics(self, text):
        for line in text.splitlines():
            name, _, value = line.rpartition(" ")
            if line.startswith("#"):
                yield line
            elif 'name="' not in name or self.own(name):
                yield f"{name} {'N' if re.fullmatch(r'[-+.0-9e]+', value) else value}"


class Spelled(str):
    """A decimal of JSON, that keeps its digits."""

    def __new__(cls, digits):
        return super().__new__(cls, "\x01" + digits)


def short(line):
    line = line.encode("utf-8", "backslashreplace").decode()
    if len(line) <= SHOWN:
        return line
    digest = hashlib.sha256(line.encode()).hexdigest()[:16]
    return f"{line[:SHOWN // 4]} ... {len(line)} characters, {digest}"


# ── How a suite is made to say the same twice ────────────────────────────────────────────────────────────────────────


class Counted:
    """In the place of the module uuid: each check gets the same values in each run."""

    def __init__(self):
        self.check, self.given = "", []

    def begin(self, check):
        self.check, self.given = check, []

    def uuid4(self):
        value = uuid.UUID(bytes=hashlib.sha256(f"{self.check}/{len(self.given)}".encode()).digest()[:16])
        self.given.append(value.hex[:12])  # what `fresh` takes of it
        return value


def load(path):
    """The suite as a module of its own, whose clients are those beside it."""
    spec = importlib.util.spec_from_file_location("recorded_suite", path)
    suite = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(suite)
    return suite


def tame(suite, proxy, counted):
    """Let nothing in it depend on chance, or on which thread is faster."""
    really_in_background, really_soon = suite.in_background, suite.soon

    def in_background(action, *arguments, **options):
        if "<locals>" in getattr(action, "__qualname__", ""):  # several requests: which of them came first, is chance
            future = concurrent.futures.Future()
            future.set_result(action(*arguments, **options))
            return future
        before = proxy.requests
        future = really_in_background(action, *arguments, **options)
        deadline = time.monotonic() + PATIENCE
        while proxy.requests == before and not future.done() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(SETTLED)
        return future

    def soon(fact):
        with proxy.mute():
            really_soon(fact)
        fact()

    suite.uuid = types.SimpleNamespace(uuid4=counted.uuid4)
    suite.in_background, suite.soon = in_background, soon


@contextlib.contextmanager
def serving(program, database):
    """A bus on a free port: (its port, its process)."""
    command = [sys.executable, program, "--port", "0", "--db", database]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        first = server.stdout.readline()
        assert first.startswith("listening on "), first
        yield int(first.split()[-1].rpartition(":")[2])
    finally:
        server.terminate()
        server.wait(PATIENCE)
        server.stdout.close()


def invited(program, database):
    """The token of an operator of a bus that does not run yet."""
    command = [sys.executable, program, "invite", "op", "--operator", "--db", database]
    said = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
    return re.search(r"abt_[0-9a-f]{8}_[\w-]{43}", said)[0]


def record(program, suite_path, out):
    """Both phases of a recording; the number of checks that failed."""
    failed = 0
    with open(out, "w", encoding="utf-8") as file, tempfile.TemporaryDirectory() as folder:
        for phase in ("open", "with tokens"):
            database = os.path.join(folder, phase.replace(" ", "-"), "bus.db")
            os.mkdir(os.path.dirname(database))
            token = invited(program, database) if phase == "with tokens" else ""
            with serving(program, database) as port, Proxy(("127.0.0.1", port)) as proxy:
                failed += record_phase(phase, load(suite_path), proxy, token, file)
    return failed


def record_phase(phase, suite, proxy, token, file):
    counted, failed = Counted(), 0
    tame(suite, proxy, counted)
    counted.begin(f"{phase} who am I")
    bus = suite.Bus(proxy.url, token)
    for check in [check for name, check in vars(suite).items() if name.startswith("test_")]:
        number = check.__doc__.split()[0]
        reason = suite.reason_to_skip(check, bus)
        proxy.take()  # what was asked to learn the reason
        counted.begin(f"{phase} {number}")
        if reason:
            file.write(f"== {phase}: {number} skipped: {reason}\n")
            continue
        outcome = "passed"
        try:
            check(bus)
        except Exception as error:
            failed += 1
            outcome = "FAILED"
            print(f"{phase}: {number} failed: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
        file.write(f"== {phase}: {number} {outcome}\n")
        recording = Recording(counted.given, proxy.server_address[1])
        for place, conversation in enumerate(proxy.take(), 1):
            lines = "\n".join(recording.lines(conversation))
            file.write(f"-- connection {place}\n{lines}\n")
        file.flush()
    return failed


# ── Comparing ────────────────────────────────────────────────────────────────────────────────────────────────────────


def checks_in(path):
    """{the check: its lines} of a recording; what is behind the number is a line."""
    found, check = {}, None
    for line in pathlib.Path(path).read_text(encoding="utf-8").split("\n"):
        if line.startswith("== "):
            check, _, outcome = re.fullmatch(r"== ((open|with tokens): [\d.]+) (.*)", line).groups()
            found[check] = [outcome]
        elif check:
            found[check].append(line)
    return found


def compare(one, other):
    """Print every difference; how many checks have one."""
    first, second = checks_in(one), checks_in(other)
    different = 0
    for check in [*first, *(check for check in second if check not in first)]:
        mine, theirs = first.get(check, ["not recorded"]), second.get(check, ["not recorded"])
        if mine != theirs:
            different += 1
            print(f"== {check}")
            lines = difflib.unified_diff(mine, theirs, str(one), str(other), n=4, lineterm="")
            print("\n".join(lines))
    print(f"{different} of {len(first.keys() | second.keys())} checks differ")
    return different


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--server", help="the bus_server.py to record")
    parser.add_argument("--suite", help="the test_bus.py that talks to it; its folder has the clients")
    parser.add_argument("--out", help="the recording")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two recordings")
    options = parser.parse_args()
    if options.compare:
        return 1 if compare(*options.compare) else 0
    if not (options.server and options.suite and options.out):
        parser.error("give --server, --suite and --out, or --compare A B")
    failed = record(options.server, options.suite, options.out)
    print(f"{options.out}: {failed} checks failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
