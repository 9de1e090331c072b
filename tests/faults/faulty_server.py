"""bus_server.py with a fault, or several, which $FAULT names, and which the checker must find.

Nothing is wrong with such a bus for as long as its day is good. With $CLOCK_ERROR, a file, its wall clock is wrong by
the nanoseconds that are written there, as one integer of 8 bytes; FAULT=none has nothing but that.
"""
import json
import mmap
import os
import pathlib
import sqlite3
import struct
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent.parent))
import bus_server  # noqa: E402

LATER = 0.1  # s, or with the first message after that


class Late:
    """A database connection that puts off its COMMIT; transactions that come meanwhile join the one that is open."""

    def __init__(self, database):
        self.database, self.due = database, 0
        self.in_transaction = False  # as whoever uses this connection believes

    def execute(self, statement, *values):
        if statement in ("COMMIT", "ROLLBACK"):
            self.in_transaction = False
        if statement == "COMMIT":
            return None
        if statement == "BEGIN IMMEDIATE":
            self.in_transaction = True
            if self.database.in_transaction and time.monotonic() < self.due:
                return None
            if self.database.in_transaction:
                self.database.execute("COMMIT")
            self.due = time.monotonic() + LATER
        return self.database.execute(statement, *values)

    def __getattr__(self, name):
        return getattr(self.database, name)


class EarlyState(bus_server.State):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.view.database.close()
        self.view.database = self.writing  # only the one who wrote it sees what is not committed
        self.writing = Late(self.writing)

    def close(self):
        self.view.database.commit()
        super().close()


def early():
    """It acknowledges at once, and commits a little later."""
    bus_server.State = EarlyState


def normal():
    """It does not wait for the disk: a commit is in the memory of the system, which writes it out when it likes."""
    prepare = bus_server.prepare

    def prepare_and_relax(database, *arguments):
        prepare(database, *arguments)
        database.execute("PRAGMA synchronous=NORMAL")

    bus_server.prepare = prepare_and_relax


class Deaf:
    """A database connection on which every COMMIT is said to have worked, and every statement that is its own one."""

    def __init__(self, database):
        self.database = database

    def execute(self, statement, *values):
        alone = not self.database.in_transaction
        try:
            return self.database.execute(statement, *values)
        except sqlite3.Error:
            if statement != "COMMIT" and not alone:
                raise
            self.database.rollback()
            return None

    def __getattr__(self, name):
        return getattr(self.database, name)


def deaf():
    """It does not hear what the disk says to a commit."""
    reload = bus_server.State.reload

    def reload_and_stop_listening(state):
        state.writing = Deaf(state.writing)
        reload(state)

    bus_server.State.reload = reload_and_stop_listening


def inline():
    """It has no deputy: while the disk is busy, nobody is served."""
    bus_server.Loop.stand_in = lambda loop: None


def raw_clock():
    """Its ticks are the wall clock, also when that stepped back."""
    apply = bus_server.State.apply

    def raw(state, operations, now):
        state.last = min(state.last, now.wall)
        return apply(state, operations, now)

    bus_server.State.apply = raw


def silent():
    """It does not say that messages are gone."""
    bus_server.Mailboxes.gap = lambda mailboxes, *_: None


def blind():
    """It takes what SQLite could read of its log for all that there was."""
    bus_server.State.damaged_wal = lambda state, commits: False


def hasty():
    """No fault: it has less patience with slow heads and bodies, so that a test of their deadlines is over sooner."""
    bus_server.HEAD_SECONDS = bus_server.BODY_SECONDS = float(os.environ["PATIENCE"])


def tidy():
    """No fault: it looks five times a second for what is too old, and at once believes a clock that jumps.

    So a test of --keep need not wait for a minute, and may step the clock.
    """
    bus_server.TIDY_SECONDS = 0.2
    bus_server.Retention.JUMP = bus_server.Retention.SLACK = 1e9  # s; 30 years


def stumbling():
    """It has not thought of NaN: an error of its own, and a traceback."""

    def no_constant(word):
        raise KeyError(word)

    bus_server.decode = json.JSONDecoder(parse_constant=no_constant).raw_decode


def step(path):
    """Make the wall clock of this process wrong by what is in a file. It is mapped: no descriptor is needed to look."""
    with path.open("rb") as file:
        error = mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)
    right = time.time_ns
    time.time_ns = lambda: right() + struct.unpack("q", error)[0]
    time.time = lambda: time.time_ns() / 1e9


FAULTS = {
    "none": lambda: None,
    "hasty": hasty,
    "tidy": tidy,
    "stumbling": stumbling,
    "early": early,
    "synchronous=NORMAL": normal,
    "deaf": deaf,
    "inline": inline,
    "raw clock": raw_clock,
    "silent": silent,
    "blind": blind,
}

if "CLOCK_ERROR" in os.environ:
    step(pathlib.Path(os.environ["CLOCK_ERROR"]))
for fault in os.environ["FAULT"].split(","):
    FAULTS[fault]()
sys.exit(bus_server.main())
