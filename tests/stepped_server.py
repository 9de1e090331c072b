"""bus_server.py with a wall clock that a test can step: it is wrong by the seconds in the file $CLOCK_ERROR."""
import functools
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import bus_server  # noqa: E402

ERROR = pathlib.Path(os.environ["CLOCK_ERROR"])


def stepped_clock():
    return bus_server.wall_clock() + int(ERROR.read_text()) * 1000000


bus_server.Log = functools.partial(bus_server.Log, clock=stepped_clock)
sys.exit(bus_server.main())
