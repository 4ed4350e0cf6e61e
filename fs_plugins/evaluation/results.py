"""What an evaluation found: tables of figures with their intervals, per-picture answers, certificates."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from fs_plugins.attacks import METHODS
from fs_plugins.certificates import Certificate
from fs_plugins.evaluation.datasets import Sample
from fs_plugins.evaluation.metrics import Estimate, mean, proportion
from fs_plugins.evaluation.run import FEATURES, Evaluation, masking_file
from fs_plugins.evaluation.suites import CLEAN, TARGET, Condition, Defence, Suite
from fs_plugins.evaluation.tasks import TASKS, Captioning, Choice, Verdict
from fs_plugins.files import whole_lines

Unit = Literal["share", "number"]
COSINES = ("FCS", "unrelated", "FCS pooled", "unrelated pooled")
DISTANCES = (0.125, 0.25, 0.375, 0.5, 0.75)
"""The l2 distances of the paper's Table 2, in [0, 1] pixels."""


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

    def write_csv(self, path: Path) -> None:
        """Figures take three columns: value, low and high (shares from 0 to 1)."""
        wide = {place for row in self.rows for place, cell in enumerate(row) if isinstance(cell, Figure)}
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            head: list[str] = []
            for place, column in enumerate(self.columns):
                head += [column, f"{column} low", f"{column} high"] if place in wide else [column]
            writer.writerow(head)
            for row in self.rows:
                line: list[Any] = []
                for cell in row:
                    if isinstance(cell, Figure):
                        line += [cell.estimate.value, cell.estimate.low, cell.estimate.high]
                    else:
                        line.append(cell)
                writer.writerow(line)


@dataclass(frozen=True)
class Answer:
    """What one defence said of one picture under one condition, and what that counts for."""

    sample: Sample
    reply: str
    verdict: Verdict
    scores: tuple[float, float] | None = None


class Results:
    """Reads what an evaluation wrote."""

    def __init__(self, evaluation: Evaluation) -> None:
        self.evaluation = evaluation
        self._rows: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}

    def tables(self) -> list[Table]:
        told = []
        evaluation = self.evaluation
        for suite in evaluation.suites:
            if suite.task is not None and evaluation.can(suite.task):
                told.append(self._asked(suite))
            if suite.certified:
                told.append(self._certified(suite))
            if suite.masking and masking_file(evaluation.store, suite.conditions[0].eps).exists():
                told.append(self._masking(suite))
        return told

    def notes(self) -> list[str]:
        """What was left out, and why."""
        evaluation = self.evaluation
        unasked = [
            f"{suite.title}: left out, because the data or the model is not for {suite.task}."
            for suite in evaluation.suites
            if suite.task is not None and not evaluation.can(suite.task)
        ]
        return list(dict.fromkeys([*evaluation.notes, *unasked]))

    def answers(self, defence: Defence, condition: Condition, task: str, count: int | None = None) -> Iterator[Answer]:
        """What was said about ``count`` pictures, or about all."""
        evaluation = self.evaluation
        if task == "captioning":
            scores = evaluation.store.scores(evaluation.judge.name)
            captioning = cast(Captioning, TASKS[task])
            for sample, reply, own, aim in evaluation.captions(defence, condition, count):
                pair = scores.get((reply, own)), scores.get((reply, aim))
                if pair[0] is not None and pair[1] is not None:
                    verdict = captioning.verdict(pair[0], pair[1])
                    yield Answer(sample, reply, verdict, (pair[0], pair[1]))
            return
        rows, choice = self.rows(defence, condition), cast(Choice, TASKS[task])
        for sample in evaluation.samples(count):
            row = rows.get((sample.image, task))
            if row is not None:
                verdict = choice.verdict(row["reply"], sample, evaluation.dataset)
                yield Answer(sample, row["reply"], verdict)

    def rows(self, defence: Defence, condition: Condition) -> dict[tuple[str, str], dict[str, Any]]:
        key = f"{defence.name}/{condition.name}"
        if key not in self._rows:
            self._rows[key] = self.evaluation.store.rows(key)
        return self._rows[key]

    def certificates(self, defence: Defence) -> dict[float, dict[str, Certificate]]:
        """sigma -> picture -> certificate, of all processes."""
        found: dict[float, dict[str, Certificate]] = {}
        wanted = {one.image for one in self.evaluation.samples(self.evaluation.settings.certified_images)}
        for path in sorted((self.evaluation.store.folder / "certificates").glob(f"{defence.name}-sigma*.jsonl")):
            for line in whole_lines(path)[1:]:
                row = json.loads(line)
                if row["image"] in wanted:
                    one = Certificate.from_json(json.dumps(row["certificate"]))
                    found.setdefault(one.sigma, {})[row["image"]] = one
        return found

    def _asked(self, suite: Suite) -> Table:
        assert suite.task is not None
        evaluation = self.evaluation
        judged = ("score", "target score") if suite.task == "captioning" else ()
        columns = ("pictures", "defence", "n", "ACC", "ASR", *COSINES, *judged)
        columns = (*columns, "s a picture") if suite.timed else columns
        count = evaluation.count(suite)
        lines: list[tuple[Cell, ...]] = []
        for condition in suite.asked:
            for defence in suite.defences:
                answers = list(self.answers(defence, condition, suite.task, count))
                if not answers:
                    continue
                rows = self.rows(defence, condition)
                attacked = [a.verdict.attacked for a in answers if a.verdict.attacked is not None]
                apart = self.rows(defence, CLEAN)

                def cosines(found: Any, name: str, some: Any = answers) -> Figure:
                    kept = [found.get((one.sample.image, FEATURES)) for one in some]
                    return Figure(mean([row[name] for row in kept if row is not None]), "number")

                line: tuple[Cell, ...] = (
                    title_of(condition),
                    defence.title,
                    len(answers),
                    Figure(proportion([answer.verdict.correct for answer in answers]), "share"),
                    Figure(proportion(attacked), "share"),
                    "" if condition == CLEAN else cosines(rows, "cosine"),
                    cosines(apart, "cosine"),
                    "" if condition == CLEAN else cosines(rows, "pooled"),
                    cosines(apart, "pooled"),
                )
                for place in range(len(judged)):
                    line += (Figure(mean([answer.scores[place] for answer in answers if answer.scores]), "number"),)
                if suite.timed:
                    seconds = [rows[(answer.sample.image, suite.task)]["seconds"] for answer in answers]
                    line += (
                        f"{sum(seconds) / len(seconds):.3f}",
                    )  # pictures of a batch are no independent samples of it
                lines.append(line)
        return Table(suite.name, suite.title, columns, tuple(lines), self._note(suite))

    def _note(self, suite: Suite) -> str:
        said = "ACC: right answers. ASR: the attacker's answers. Of n pictures, with 95 % intervals (Wilson). "
        said += (
            "FCS: cosine between what is served for the clean and for the attacked picture, of all that the model consumes, "
            "and (in CSV and report) of pooled features, with Student's intervals; unrelated: of a clean picture and its attack's "
            "target, by the same defence. A cosine that is no higher than that says nothing."
        )
        if suite.timed:
            said += " Seconds are of pictures in batches."
        if suite.task == "captioning":
            judge = self.evaluation.judge.name
            said += f" Captions by the judge {judge}: right from .5 to the clean caption, the attacker's from .3 to the target's."
        return said

    def _certified(self, suite: Suite) -> Table:
        columns = ("defence", "sigma", "n", *(f"eps {eps:g}" for eps in DISTANCES), "R .5")
        lines: list[tuple[Cell, ...]] = []
        sigmas = suite.sigmas
        for defence in suite.defences:
            if defence.smoothing is None:
                continue
            for sigma, by_picture in sorted(self.certificates(defence).items()):
                if sigma not in (sigmas or (self.evaluation.levels.get(defence.name),)):
                    continue
                some = list(by_picture.values())
                values = [Figure(mean([one.fcsb(eps) or 0.0 for one in some]), "number") for eps in DISTANCES]
                radius = Figure(mean([one.radius(0.5) or 0.0 for one in some]), "number")
                lines.append((defence.title, f"{sigma:g}", len(some), *values, radius))
        certificates = next(
            (c for d in suite.defences for s in self.certificates(d).values() for c in s.values()), None
        )
        note = ""
        if certificates is not None:
            note = (
                f"The cosine certified within an l2 distance eps in [0, 1] pixels, and the distance within which it stays .5 or "
                f"more; averages over n pictures, each certificate wrong with probability at most {certificates.alpha:g}, from "
                f"{certificates.n:,} draws; where nothing is promised, 0 counts."
            )
        return Table(
            f"{suite.name}-certified" if suite.task else suite.name,
            suite.title + (", certified" if suite.task else ""),
            columns,
            tuple(lines),
            note,
        )

    def _masking(self, suite: Suite) -> Table:
        found = json.loads(masking_file(self.evaluation.store, suite.conditions[0].eps).read_text())
        lines: list[tuple[Cell, ...]] = [
            (
                one["name"],
                len(one["margins"]),
                Figure(proportion([margin > 0 for margin in one["margins"]]), "share"),
                Figure(mean(one["margins"]), "number"),
            )
            for one in found["attacks"]
        ]
        count = len(found["attacks"][0]["margins"])
        hits = round(found["unbounded"] * count)
        away = proportion([i < hits for i in range(count)])
        lines.append(("adaptive, eps 1, untargeted", count, Figure(away, "share"), ""))
        verdict = " ".join(found["problems"]) or "Nothing speaks for masked gradients."
        note = (
            f"{verdict} l-inf {suite.conditions[0].eps255:g}/255. Margin: cosine of the served feature to the target's less that to the picture's own; above 0 the attack has "
            "succeeded. The adaptive attack must not be weaker than the others, and without a bound it must reach every picture."
        )
        return Table(suite.name, suite.title, ("attack", "n", "success", "margin"), tuple(lines), note)

    def summary(self) -> dict[str, Any]:
        """The tables and notes for machines."""

        def told(cell: Cell) -> Any:
            if not isinstance(cell, Figure):
                return cell
            e = cell.estimate
            return {name: None if math.isnan(value) else value for name, value in asdict(e).items()}

        return {
            "tables": {
                table.name: [dict(zip(table.columns, map(told, row), strict=True)) for row in table.rows]
                for table in self.tables()
            },
            "notes": self.notes(),
        }


def title_of(condition: Condition) -> str:
    """A condition for people."""
    if condition in (CLEAN, TARGET):
        return condition.method
    return f"{METHODS[condition.method].name} {condition.eps255:g}/255{', adaptive' if condition.adaptive else ''}"
