"""A ledger in memory, with each fault of an engine on demand, and fronts in this process that share it."""
import itertools
import threading
import time

from bus_server import command_line, make_bus, start_extensions, wall_clock
from ledgers import READ_BYTES, Unknown


class Log:
    """What the engine keeps. `wall` is its clock."""

    def __init__(self, wall=wall_clock):
        self.wall = wall
        self.entries, self.places, self.tells = [], {}, []
        self.lock = threading.Lock()

    def store(self, entry, id):
        with self.lock:
            if id not in self.places:
                self.entries.append((len(self.entries) + 1, self.wall(), entry))
                self.places[id] = self.entries[-1][:2]
            return self.places[id]


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
        for each in self.log.entries[above : above + limit]:
            found.append(each)
            size += len(each[2])
            if size >= READ_BYTES:
                break
        return found

    def listen(self, tell):
        self.told.append(tell)
        self.log.tells.append(tell)

    def close(self):
        for tell in self.told:
            self.log.tells.remove(tell)
        self.told = []


def front(path, ledger, *options):
    """A Bus as run_server makes it, which is a front of this ledger; inside.close() ends it."""
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
    while any(bus.loop.actions or bus.loop.told for bus in buses):
        for bus in buses:
            if bus.loop.actions or bus.loop.told:
                bus.loop.take_turn()


def rows(bus):
    """All that is in all tables of a front's copy, but its index."""
    ask = bus.state.writing.execute
    tables = [name for (name,) in ask("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
    return {each: sorted(map(repr, ask(f"SELECT * FROM {each}"))) for each in tables if each not in ("places", "runs")}
