"""How far names were read on this machine: the files of bus_recv.Cursor."""
from __future__ import annotations  # needs Python 3.9 or later

import contextlib
import glob
import json
import os
from decimal import Decimal

import bus_recv

REACHED = "~reached"  # ends the file beside a cursor; see bus_recv.Cursor


class Places:
    """The cursors of the names on a channel of the bus at a URL. `bus`: the id of a bus."""

    def __init__(self, url: str, channel: str) -> None:
        self.url, self.channel = url, channel

    def by_bus(self, name: str) -> dict[str, str]:
        """By bus: the cursor that readers of this machine have saved for a name. Of our bus alone, if it is known."""
        files = cursors(bus_at(self.url), self.channel, name)
        found = {bus: own_cursor(bus, self.channel, name) for bus in (path.split(os.sep)[-3] for path in files)}
        return {bus: at for bus, at in found.items() if at != "last"}

    def of(self, bus: str, reader: str, name: str) -> str:
        """How far the reader of a name has read the mail for this name; "0" if it has not read here."""
        own = own_cursor(bus, self.channel, reader)
        return max("0" if own == "last" else own, self.reached(bus, reader).get(name, "0"), key=Decimal)

    def reached(self, bus: str, name: str) -> dict[str, str]:
        """How far each name of a session was read before it was renamed to this name; see bus_recv.Cursor."""
        with contextlib.suppress(OSError, ValueError, TypeError), open(self.path(bus, name) + REACHED) as file:
            return dict(json.load(file))
        return {}

    def write(self, bus: str, name: str, at: str, reached: dict[str, str]) -> None:
        """Readers of this name begin at `at`, but pass over what was read before."""
        above = {each: its for each, its in reached.items() if Decimal(its) > Decimal(at)}
        for path, text in ((self.path(bus, name) + REACHED, json.dumps(above)), (self.path(bus, name), f"{at}\n")):
            with bus_recv.private_file(path, os.O_WRONLY | os.O_TRUNC, "w") as file:
                file.write(text)

    def path(self, bus: str, name: str) -> str:
        """The path of the file that bus_recv.Cursor has for a name."""
        place = map(bus_recv.file_name, (bus, self.channel, name))
        return os.path.join(bus_recv.state_directory(), "cursors", *place)


def own_cursor(bus: str, channel: str, name: str) -> str:
    """The cursor that readers of this machine have saved for a name; `bus` may be `*`, for the one saved last."""
    files = cursors(bus, channel, name)
    with contextlib.suppress(OSError, ValueError), open(max(files, key=os.path.getmtime), encoding="ascii") as file:
        at = file.read(64).strip()
        return at if bus_recv.DECIMAL.fullmatch(at) else "last"
    return "last"


def bus_at(url: str) -> str:
    """The id of the bus that was found at this URL last; or `*`, each, if none was found since we keep that."""
    path = bus_recv.place_of("buses", url)
    with contextlib.suppress(OSError), open(path, encoding="ascii", errors="replace") as file:
        return file.read(200).strip() or "*"
    return "*"


def keep_bus(url: str, bus: str) -> None:
    """Note which bus is at this URL: with that, the cursors of a name there are told from those on other buses."""
    with contextlib.suppress(OSError):  # on a full disk all cursors count
        if bus != bus_at(url):
            with bus_recv.private_file(bus_recv.place_of("buses", url), os.O_WRONLY | os.O_TRUNC, "w") as file:
                file.write(bus)


def cursors(bus: str, channel: str, name: str) -> list[str]:
    """The files of the cursors of a name; `bus` may be `*`, for all buses."""
    place = (bus if bus == "*" else bus_recv.file_name(bus), *map(bus_recv.file_name, (channel, name)))
    return glob.glob(os.path.join(glob.escape(bus_recv.state_directory()), "cursors", *place))
