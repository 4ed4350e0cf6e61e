"""Figures with their intervals, and tables of them: the one kind that commands, CSV and report show."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from fs_plugins.attacks.methods import known_attacks
from fs_plugins.evaluation.metrics import Estimate
from fs_plugins.evaluation.suites import ANSWER, AUTOATTACK, CLEAN, TARGET, Condition
from fs_plugins.files import replace, table

Unit = Literal["share", "number"]


@dataclass(frozen=True)
class Figure:
    """A measured value and its 95 % interval. For people, shares are in per cent and cosines from 0 to 1."""

    estimate: Estimate
    unit: Unit

    def __str__(self) -> str:
        return " ".join(filter(None, self.parts))

    @property
    def parts(self) -> tuple[str, str]:
        """The value and its interval, which is empty where there is none."""
        value, low, high = self.estimate.value, self.estimate.low, self.estimate.high
        if math.isnan(value):
            return "-", ""
        if self.unit == "share":
            said, interval = f"{100 * value:.1f}", f"({100 * low:.0f}-{100 * high:.0f})"
        else:
            half = f"{(high - low) / 2:.3f}"
            said, interval = f"{value:.3f}", "\u00b1" + half.removeprefix("0")
        return said, "" if math.isnan(low) else interval


Cell = str | int | Figure


def parted(cell: Cell) -> tuple[str, str]:
    """What a cell says, and a figure's interval, which is set apart."""
    return cell.parts if isinstance(cell, Figure) else (str(cell), "")


@dataclass(frozen=True)
class Table:
    """One suite's table: ``columns``, and ``rows`` as wide."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    @property
    def headings(self) -> tuple[str, ...]:
        """The columns' names for people: those of shares say that they are in per cent."""
        shares = {
            i for row in self.rows for i, cell in enumerate(row) if isinstance(cell, Figure) and cell.unit == "share"
        }
        return tuple(f"{column} %" if place in shares else column for place, column in enumerate(self.columns))

    def records(self) -> list[dict[str, object]]:
        """The rows for machines: by columns' names, figures as value, low and high, each None where there is none."""
        return [dict(zip(self.columns, map(_plain, row), strict=True)) for row in self.rows]

    def write_csv(self, path: Path) -> None:
        """Figures take three columns: value, low and high (shares from 0 to 1)."""
        wide = {place for row in self.rows for place, cell in enumerate(row) if isinstance(cell, Figure)}
        head: list[str] = []
        for place, column in enumerate(self.columns):
            head += [column, f"{column} low", f"{column} high"] if place in wide else [column]
        lines: list[list[str | float]] = [[*head]]
        for row in self.rows:
            line: list[str | float] = []
            for cell in row:
                if isinstance(cell, Figure):
                    line += [cell.estimate.value, cell.estimate.low, cell.estimate.high]
                else:
                    line.append(cell)
            lines.append(line)
        replace(path, table(lines))


def _plain(cell: Cell) -> object:
    if not isinstance(cell, Figure):
        return cell
    return {name: None if math.isnan(value) else value for name, value in asdict(cell.estimate).items()}


_NAMES = {
    ANSWER: "attack on the answer",
    "answer-apgd": "APGD on the answer",
    "answer-target": "attack to the target's answer",
    "answer-square": "Square Attack on the answer",
    AUTOATTACK: "AutoAttack (rand)",
}


def title_of(condition: Condition) -> str:
    """A condition for people."""
    if condition in (CLEAN, TARGET):
        return condition.method
    attack = known_attacks().get(condition.method)  # a plugin's may be gone when its results are read
    name = condition.method if attack is None else attack.name
    name = _NAMES.get(condition.method, name)
    parts = [f"{name} {condition.radius}", "adaptive" if condition.adaptive else ""]
    parts += [f"{condition.draws} draws a step" if condition.draws else ""]
    parts += [f"{condition.restarts} starts" if condition.restarts > 1 else ""]
    parts += [f"through {condition.through}" if condition.through else ""]
    return ", ".join(filter(None, parts))
