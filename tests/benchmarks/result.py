"""The result of a benchmark: values with their spread, compared with its targets."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from .measure import Contest, Spread

UNITS = {"us": 1e6, "ms": 1e3, "s": 1.0}
"""Factors from seconds."""


@dataclass(frozen=True)
class Value:
    """A measured value, in the unit it is shown in."""

    name: str
    spread: Spread
    unit: str


@dataclass(frozen=True)
class Aim:
    """A target: a value should be at most the limit (or at least, for speeds)."""

    text: str
    spread: Spread
    limit: float
    unit: str = "x"
    at_least: bool = False

    @property
    def is_reached(self) -> bool:
        return self.spread.median >= self.limit if self.at_least else self.spread.median <= self.limit


@dataclass
class Result:
    """The outcome of a benchmark."""

    title: str
    values: list[Value] = field(default_factory=list)
    aims: list[Aim] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, seconds: Spread, unit: str) -> None:
        """Add a time that was measured in seconds."""
        self.values.append(Value(name, seconds.scaled(UNITS[unit]), unit))

    def add_contest(self, contest: Contest, unit: str, names: Iterable[str] | None = None) -> None:
        for name in contest.costs if names is None else names:
            self.add(name, contest.spread(name), unit)

    def aim(self, text: str, spread: Spread, limit: float, unit: str = "x", at_least: bool = False) -> None:
        self.aims.append(Aim(text, spread, limit, unit, at_least))

    def as_json(self) -> dict[str, Any]:
        aims = [{**asdict(aim), "is_reached": aim.is_reached} for aim in self.aims]
        return {"title": self.title, "values": [asdict(value) for value in self.values], "aims": aims} | (
            {"notes": self.notes}
        )

    def markdown(self) -> Iterator[str]:
        """Yield the lines of two tables: what was measured, and how that compares with the aims."""
        yield f"### {self.title}"
        yield ""
        if self.values:
            yield "| measured | median | quartiles |"
            yield "|---|---|---|"
        for value in self.values:
            spread = value.spread
            yield f"| {value.name} | {number(spread.median)} {value.unit} | {_range(spread)} |"
        if self.aims:
            yield ""
            yield "| compared | median | quartiles | aim | |"
            yield "|---|---|---|---|---|"
        for aim in self.aims:
            sign, word = ("≥" if aim.at_least else "≤"), ("reached" if aim.is_reached else "missed")
            median = f"{number(aim.spread.median)} {aim.unit}"
            yield f"| {aim.text} | {median} | {_range(aim.spread)} | {sign} {number(aim.limit)} {aim.unit} | {word} |"
        if self.notes:
            yield ""
            yield from (f"- {note}" for note in self.notes)


def number(value: float) -> str:
    """Write a number with three significant digits, large ones in full."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _range(spread: Spread) -> str:
    return f"{number(spread.low)} to {number(spread.high)}"
