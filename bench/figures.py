"""Rounds, medians, ratios, and what they are held against."""
from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple


class Run(NamedTuple):
    """What one round of one contender gave: the figure of the row, and what was seen beside it."""

    value: float
    beside: dict[str, float] = {}  # never changed


class Figure(NamedTuple):
    """All rounds of one contender."""

    contender: str
    unit: str
    rounds: list[float]
    beside: dict[str, list[float]]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


class Claim(NamedTuple):
    """Something the goals table asks for, with what was measured in each round."""

    about: str
    unit: str
    rounds: list[float]
    first: float | None  # the first bar; None if there is none for this
    goal: float | None
    at_least: bool  # else at most

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def holds(self, bar: float) -> bool:
        return self.median >= bar if self.at_least else self.median <= bar

    @property
    def verdict(self) -> str:
        if self.goal is not None and self.holds(self.goal):
            return "goal met"
        if self.first is not None:
            return "first bar met" if self.holds(self.first) else "missed"
        return "goal missed"


class Result(NamedTuple):
    """A row that was measured."""

    figures: list[Figure]
    claims: list[Claim]
    notes: list[str]  # what the reader must know: who is absent, what was scaled


def interleaved(runs: dict[str, Callable[[], Run]], rounds: int, unit: str) -> dict[str, Figure]:
    """Each contender in each round, beginning with another one each time; what disturbs the machine disturbs all."""
    figures = {name: Figure(name, unit, [], {}) for name in runs}
    names = list(runs)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            run = runs[name]()
            figures[name].rounds.append(run.value)
            for what, value in run.beside.items():
                figures[name].beside.setdefault(what, []).append(value)
    return figures


def ratios(ours: Iterable[float], theirs: Iterable[float]) -> list[float]:
    """Round by round, so that a slow spell of the machine is in both."""
    return [one / other for one, other in zip(ours, theirs)]


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that at least this share of them does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def shown(value: float, unit: str = "") -> str:
    """With three digits that say something, and a blank in thousands."""
    digits = 0 if abs(value) >= 100 or not value else 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 4
    return spaced(round(value, digits), digits) + ("x" if unit == "x" else f" {unit}" if unit else "")


def spaced(value: float, digits: int = 0) -> str:
    return f"{value:,.{digits}f}".replace(",", " ")
