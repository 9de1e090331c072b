"""A bus inside the test: with its extensions and without a socket, so that a test takes its turns and says its time."""
import hashlib
from types import SimpleNamespace

import bus_server
from bus_server import CLIENTS, OPEN, REPORT, Query, State, command_line, make_bus, start_extensions
from tests.kit.forker import remember_extensions
from tests.kit.loops import stop

remember_extensions(bus_server)  # they keep nothing beside what start() makes

FILE = b"in a file " * 10_000
FILE_PATH = f"/blob/{hashlib.sha256(FILE).hexdigest()}"
# What is behind the path of an endpoint when a test asks for the largest answer; ROOT is the id of a message.
ASKED = {"/recv": "?to=bob&since=0&max=1000", "/log": "?since=0&max=1000", "/message/": "ROOT", "/thread/": "ROOT",
         "/blob/": FILE_PATH[6:], "/digest": "?to=bob&since=0", "/search": "?q=x&max=1000"}  # fmt: skip


def make(path, *options):
    """A Bus on the database at `path`, made as run_server makes it. It has no rate limit and keeps for ever."""
    options = command_line(["--db", str(path), "--rate", "0", "--keep", "0", *options])
    bus = make_bus(options, State(options.db))
    start_extensions(bus, options)
    return bus


def mailboxes(clock, wall=bus_server.wall_clock):
    """Those of a bus without a file."""
    nothing = {"look": lambda channel, own, upto, most, above: (None, above, 0), "mailboxes": lambda last: ()}
    state = SimpleNamespace(view=SimpleNamespace(clock=wall, **nothing), last=0, lost=0, forgotten=0)
    return bus_server.Mailboxes(clock, state, lambda token: True)


def close(bus):
    stop(bus.loop)
    bus.state.close()


def looks():
    """A request for each GET endpoint of the core and the extensions, so that none is forgotten; one client is enough.

    The bus that is asked must have FILE and a message ROOT: then each answers 200.
    """
    bus = make(":memory:")
    close(bus)
    others = sorted(CLIENTS)[1:]
    return [path + ASKED.get(path, "") for method, path in bus.routes if method == "GET" and path not in others]


class Asks:
    """A request with this query, to be handed to an endpoint."""

    def __init__(self, query=""):
        self.query, self.grant, self.owner = lambda: Query(query), OPEN, lambda: "x"

    def plain(self):
        return False


def said(capfd):
    """What a bus in this process has written to stderr, which a thread of its own does."""
    REPORT.flush(20)
    return capfd.readouterr().err
