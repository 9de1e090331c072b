"""A bus whose time passes as fast as a test wants."""
import os

from tests.kit.processes import ROOT, Server, wait_until

STEP = """
real, real_ns, wall = time.monotonic, time.monotonic_ns, time.time_ns
def ahead():
    try:
        return float(open(os.environ["AHEAD"]).read() or 0)
    except OSError:
        return 0.0
if os.environ["STEADY"] == "moves":
    time.monotonic = lambda: real() + ahead()
    time.monotonic_ns = lambda: real_ns() + int(ahead() * 1e9)
time.time_ns = lambda: wall() + int(ahead() * 1e9)
time.time = lambda: time.time_ns() / 1e9
bus_server.TIDY_SECONDS = 0.05
tidy = bus_server.Bus.tidy
def counted(bus):
    tidy(bus)
    with open(os.environ["TIDIED"], "ab") as file:
        file.write(b".")
bus_server.Bus.tidy = counted
"""


class Moved:
    """A bus whose clocks go ahead by as much as the test says: all of them, or its wall clock alone.

    It looks twenty times a second for what is too old.
    """

    def __init__(self, place, *options, wall_alone=False):
        self.file, self.tidied = place / "ahead", place / "tidied"
        self.tidied.touch()
        program = [str(ROOT / "tests/kit/raising_server.py")]
        env = {"PATCH": "import time\n" + STEP, "FAULT_PORT": "0", "AHEAD": str(self.file), "TIDIED": str(self.tidied)}
        env["STEADY"] = "stays" if wall_alone else "moves"
        self.bus = Server(place / "bus.db", *options, program=program, env=env)

    def go(self, seconds):
        fresh = self.file.with_suffix(".new")
        fresh.write_text(str(seconds))
        os.replace(fresh, self.file)

    def looks(self, times):
        """Wait until it has looked so often from now on; the look that is being taken does not count."""
        enough = self.tidied.stat().st_size + 1 + times
        wait_until(lambda: self.tidied.stat().st_size >= enough)
