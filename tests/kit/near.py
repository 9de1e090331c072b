"""A bus in a thread of the test's own process, with a port: a sixth of the CPU that starting a Server takes."""
import threading

from bus_server import TIDY_SECONDS, Deadlines, State, command_line, make_bus, start_extensions, tcp_listener
from tests.kit.loops import stop
from tests.kit.processes import PATIENCE, UNHURRIED, Server, free_port


class Near:
    """As Server, where neither the process is the claim nor its end, nor its log."""

    def __init__(self, db, *options):
        self.db, self.port = str(db), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.options = command_line(["--port", str(self.port), "--db", self.db, *UNHURRIED, *options])
        self.bus = self.loop = self.error = None
        self.begun, self.over = threading.Event(), False
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self):
        try:
            state = State(self.db)
            bus = make_bus(self.options, state)
            start_extensions(bus, self.options)
            bus.listeners.insert(0, tcp_listener(bus, self.options, None))
            state.sign(self.url)
            bus.tidy()
            self.bus, self.loop = bus, bus.loop
        except BaseException as error:
            self.error = error
            raise
        finally:
            self.begun.set()
        bus.loop.every(TIDY_SECONDS, bus.tidy)
        bus.loop.every(Deadlines.SLOT, bus.sweep)
        bus.loop.run(lambda: self.over or bus.broken)
        for _, listener in bus.listeners:
            listener.close()
        for connection in list(bus.door.connections):
            connection.transport.abort()
        stop(bus.loop)
        state.close()

    get = Server.get

    def later(self, seconds):
        """From now on it is so much later for leases and delays; but what waits for a moment does so as before."""
        clock, now = self.bus.clock, self.bus.clock.now
        clock.now = lambda: now()._replace(steady=now().steady + int(seconds * 1_000_000))

    def __enter__(self):
        self.thread.start()
        assert self.begun.wait(PATIENCE) and not self.error, self.error
        return self

    def end(self):
        self.over = True

    def __exit__(self, *_):
        self.loop.tell(self.end)
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
