"""Operations as bytes, and those of fronts: where a ledger begins and ends, and up to which entry a file has come."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, cast

from bus_server import Now, Operation, State, encode

if TYPE_CHECKING:
    from .mirror import Mirror


FORMAT = 1  # of the bytes of an operation


def to_line(operation: Operation) -> str:
    """As one line of JSON: [format, kind, {slot: value}]."""
    return encode([FORMAT, operation.kind, {slot: getattr(operation, slot) for slot in operation.__slots__}])


def operation_of(line: str, kinds: dict[str, type[Operation]]) -> Operation:
    """The operation in a line of to_line(). ValueError if its format or its kind is not known."""
    version, kind, fields = json.loads(line)
    if version != FORMAT or kind not in kinds:
        raise ValueError(f"an operation {kind!r} of format {version} is not known here")
    return kinds[kind].from_fields(fields)


class Begin(Operation):
    """A front has started. The first entry of a ledger says which bus it is. The result is the id of the bus."""

    __slots__ = ("bus",)
    kind = "begin"

    def __init__(self, bus: str) -> None:
        self.bus = bus

    def apply(self, state: State, now: Now) -> str:
        if state.ask("SELECT position FROM front") == (0,):
            state.writing.execute("UPDATE bus SET id = ?", (self.bus,))
            state.bus = self.bus
        return state.bus


class Moved(Operation):
    """The first entry of a ledger onto which a bus was moved. No front applies it: its mail is in copies only."""

    __slots__ = ("bus",)
    kind = "moved"

    def __init__(self, bus: str) -> None:
        self.bus = bus


class Left(Operation):
    """The bus leaves the ledger: the file of one front, up to here, is a bus of its own from now on."""

    __slots__ = ("front",)
    kind = "left"

    def __init__(self, front: str) -> None:
        self.front = front

    def apply(self, state: State, now: Now) -> None:
        cast("Mirror", state).left = self.front


class Next(Operation):
    """In a list of several entries, it stands between two of them: the time of the second one. It is in no entry."""

    __slots__ = ("now",)
    kind, rank, is_local = "next", 0, True

    def __init__(self, now: Now) -> None:
        self.now = now

    def apply(self, state: State, now: Now) -> None:
        mirror = cast("Mirror", state)
        mirror.add_entry_to_sum()
        mirror.now = self.now


class Position(Operation):
    """The last operation of each list: up to which entry this file has come. It is in no entry."""

    __slots__ = ("position",)
    kind, rank, is_local = "position", 6, True  # it writes the sum down

    def __init__(self, position: int) -> None:
        self.position = position

    def apply(self, state: State, now: Now) -> None:
        mirror = cast("Mirror", state)
        mirror.add_entry_to_sum()
        values = self.position, now.wall, now.steady, mirror.sum
        mirror.writing.execute("UPDATE front SET position = ?, time = ?, steady = ?, sum = ?", values)
