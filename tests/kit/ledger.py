"""A ledger in memory, with each fault of an engine on demand, and fronts in this process that share it."""
import faulthandler
import itertools
import json
import secrets
import threading
import time

import bus_server
from bus_server import Put, command_line, make_bus, start_extensions, wall_clock
from ledgers import READ_BYTES, Unknown
from tests.kit.loops import stop
from tests.kit.processes import comes_true

SECOND = 1000000  # us


class Log:
    """What the engine keeps. `wall` is its clock."""

    def __init__(self, wall=wall_clock):
        self.wall = wall
        self.entries, self.places, self.tells = [], {}, []
        self.lock = threading.Lock()

    def store(self, entry, id):
        with self.lock:
            if id not in self.places:
                self.entries.append((self.entries[-1][0] + 1 if self.entries else 1, self.wall(), entry))
                self.places[id] = self.entries[-1][:2]
            return self.places[id]

    def written(self):
        """The entries that do more than say that a front lives."""
        kinds = [[json.loads(line)[1] for line in entry.decode().split("\n")[1:]] for _, _, entry in self.entries]
        return [each for each in kinds if set(each) != {"beat"}]


class Fake:
    """A Ledger: one front's way to a Log.

    `faults` has what happens to the next appends, one after the other:
    "lost" is Unknown and was not stored, "stored" is Unknown though it was, "late" is Unknown and is stored when
    deliver() is called. While `out`, each call is Unknown. `slow` is how long each call takes, in s. `hints` makes of
    the positions that others should be told those that they are told: [] for none, several for too many.
    """

    def __init__(self, log):
        self.log, self.faults, self.out, self.slow = log, [], False, 0
        self.hints = lambda position: [position]
        self.late, self.told = [], []

    def check(self, deadline):
        if self.slow:
            time.sleep(min(self.slow, max(deadline - time.monotonic(), 0)))
        if self.out or time.monotonic() > deadline:
            raise Unknown("the fake is out")

    def append(self, entry, id, deadline):
        self.check(deadline)
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "late":
            self.late.append((entry, id))
        if fault in ("lost", "late"):
            raise Unknown(fault)
        position, at = self.log.store(entry, id)
        if fault:
            raise Unknown(fault)
        for tell, hint in itertools.product(list(self.log.tells), self.hints(position)):
            tell(hint)
        return position, at

    def deliver(self):
        """What was late comes now."""
        while self.late:
            self.log.store(*self.late.pop(0))

    def read(self, above, limit, deadline):
        self.check(deadline)
        found, size = [], 0
        entries = self.log.entries
        first = max(above - entries[0][0] + 1, 0) if entries else 0
        for each in entries[first : first + limit]:
            found.append(each)
            size += len(each[2])
            if size >= READ_BYTES:
                break
        return found

    def trim(self, upto, before, deadline):
        self.check(deadline)
        with self.log.lock:
            while self.log.entries[0][0] <= upto and self.log.entries[0][1] < before and len(self.log.entries) > 1:
                del self.log.entries[0]

    def about(self):
        return "memory", ""

    def listen(self, tell):
        self.told.append(tell)
        self.log.tells.append(tell)

    def close(self):
        for tell in self.told:
            self.log.tells.remove(tell)
        self.told = []


def front(path, ledger, *options):
    """A Bus as run_server makes it, which is a front of this ledger; end() or kill() ends it."""
    options = command_line(["--db", str(path), "--rate", "0", "--keep", "0", "--ledger", "postgresql:", *options])
    bus = make_bus(options, options.front.follow(options, ledger))
    start_extensions(bus, options)
    options.front.start(bus, options)
    return bus


def settle(*buses):
    """Take the turns of these fronts until none has anything to do."""
    for bus in buses:
        bus.ledger.look()
    turns(*buses)


def turns(*buses):
    """The same, without a look at the ledger first."""
    while any(bus.loop.actions for bus in buses):
        for bus in buses:
            if bus.loop.actions:
                bus.loop.take_turn()


def rows(bus):
    """All that is in all tables of a front's copy, but its index."""
    ask = bus.state.writing.execute
    tables = [name for (name,) in ask("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
    return {each: sorted(map(repr, ask(f"SELECT * FROM {each}"))) for each in tables if each not in ("places", "runs")}


class Clock:
    """A wall clock that the test sets, in us."""

    def __init__(self, wall=1795000000 * SECOND):
        self.wall = wall

    def __call__(self):
        self.wall += 1
        return self.wall


def end(bus):
    faulthandler.cancel_dump_traceback_later()  # of a front that drained: it would end this process
    bus.state.close()
    stop(bus.loop)


def kill(bus):
    """End a front without a word to the others."""
    bus.state.is_live = False
    end(bus)


def draft(sender="ann", to="bob", msg="x", key=None, **members):
    return bus_server.draft({"from": sender, "to": to, "msg": msg, **members}, key)


def do(bus, operation):
    """The result of an operation of this front, when it was announced; None if it was refused."""
    results = []
    bus.do(operation, None, lambda _, __, result: results.append(result))
    settle(bus)
    return results[0] if results else None


def put(bus, **fields):
    """The ticks of one message that is sent at this front."""
    [stored] = do(bus, Put([draft(**fields)]))
    return stored.ticks


class Transport:
    """Takes every answer at once."""

    unsent, closing = b"", False

    def __init__(self):
        self.written = b""

    def write(self, data):
        self.written += data

    def peer(self):
        return "127.0.0.1"

    def pause_reading(self):
        """A sink takes what came."""

    def resume_reading(self):
        pass

    def write_eof(self):
        pass


def request(bus, method, path, body=None, authorization=""):
    """Give a request to a front; `answer()` of what is returned is its answer so far: (status, JSON).

    `answer.written()` is the same as bytes.
    """
    body = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    head += f"Authorization: {authorization}\r\n\r\n" if authorization else "\r\n"
    connection, transport = bus_server.Connection(bus.door), Transport()
    connection.connection_made(transport)
    connection.data_received(head.encode() + body)

    def answer():
        head, _, body = transport.written.partition(b"\r\n\r\n")
        return (int(head.split()[1]), json.loads(body)) if head else None

    answer.written = lambda: transport.written
    return answer


def ask(bus, *asked):
    answer = request(bus, *asked)
    settle(bus)
    return answer()


def log_of(bus):
    return [each["msg"] for each in ask(bus, "GET", "/log?since=0&max=1000")[1]["messages"]]


def same(*buses):
    """They have the same in all tables. A heartbeat that is due meanwhile reaches the others with their next look."""
    comes_true(lambda: settle(*buses) or len({str(rows(bus)["front"]) for bus in buses}) == 1, 2)
    first, *others = [rows(bus) for bus in buses]
    for other in others:
        for table, its in first.items():
            assert other[table] == its, table


def invited(bus, name="ann", expires=None):
    """The token of a new name, as the command invite makes it beside this front."""
    secret = f"abt_{secrets.token_hex(4)}_{secrets.token_urlsafe(32)}"
    token, digest = bus_server.presented(f"Bearer {secret}")
    row = {"id": token, "name": name, "also": [], "send_only": False, "operator": False, "hash": digest,
           "made": 1, "revoked": None, "expires": expires}  # fmt: skip
    bus.gate.tokens.change(lambda rows: [*rows, row])
    return secret


def common_look(bus):
    """As the loop does it each second."""
    bus.loop.attempt(bus.ledger.elsewhere["tokens"].__self__.look)
