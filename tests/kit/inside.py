"""A bus inside the test: with its extensions and without a socket, so that a test takes its turns and says its time."""
from bus_server import State, command_line, make_bus, start_extensions


def make(path, *options):
    """A Bus on the database at `path`, made as run_server makes it. It has no rate limit and keeps for ever."""
    options = command_line(["--db", str(path), "--rate", "0", "--keep", "0", *options])
    bus = make_bus(options, State(options.db))
    start_extensions(bus, options)
    return bus


def close(bus):
    bus.loop.close()
    bus.state.close()
