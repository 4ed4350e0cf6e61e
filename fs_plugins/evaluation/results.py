"""What an evaluation found, read back from its folder without any model: tables, per-picture answers, certificates."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import TypeAdapter

from fs_plugins.attacks.masking import MaskingReport, on_the_answer
from fs_plugins.attacks.strengths import Strength
from fs_plugins.certificates import AnswerCertificate, Certificate
from fs_plugins.certificates.ledger import File
from fs_plugins.errors import SettingError
from fs_plugins.evaluation import curves, report, robustbench
from fs_plugins.evaluation.captions import captions
from fs_plugins.evaluation.datasets import Sample
from fs_plugins.evaluation.metrics import mean, proportion
from fs_plugins.evaluation.plan import FEATURES, answers_key
from fs_plugins.evaluation.record import RECORD, Record
from fs_plugins.evaluation.store import SETTINGS, Row, Store
from fs_plugins.evaluation.suites import CLEAN, Condition, Defence, Suite
from fs_plugins.evaluation.tables import Cell, Figure, Table, title_of
from fs_plugins.evaluation.tasks import TASKS, Captioning, Choice, Verdict
from fs_plugins.files import replace, unused
from fs_plugins.kept import read

ROWS = "results"
"""The folder of rows in that of an evaluation, beside tables and report."""

_ANEW = "Delete it and run the same command again: it is then made anew."
COSINES = ("FCS", "unrelated", "FCS pooled", "unrelated pooled")
DISTANCES = (0.125, 0.25, 0.375, 0.5, 0.75)
"""The l2 distances of the paper's Table 2, in [0, 1] pixels."""
REACHES = (0.0, 0.125, 0.25, 0.5)
"""The l2 radii at which answers are counted, in [0, 1] pixels."""


@dataclass(frozen=True)
class Answer:
    """What one defence said of one picture under one condition, and what that counts for."""

    sample: Sample
    reply: str
    verdict: Verdict
    scores: tuple[float, float] | None = None


class Results:
    """What an evaluation wrote, from its folder alone.

    Args:
        folder: that ``fs-plugins evaluate`` was given as ``--out``, or the folder of rows in it.

    Raises:
        SettingError: it holds no evaluation, one that an earlier version wrote, or a damaged one.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        root = Path(folder)
        inner = root / ROWS
        self.folder = inner if (inner / SETTINGS).is_file() and not (root / SETTINGS).is_file() else root
        self.record = Record.read(self.folder)
        self.plan = self.record.plan
        self.store = Store(self.folder)
        self._rows: dict[str, dict[tuple[str, str], Row]] = {}

    def tables(self) -> list[Table]:
        """One for each suite that had anything to measure, and one for what was certified in it."""
        tables = []
        for suite in self.plan.suites:
            if suite.answers and self.plan.answered(suite):
                tables.append(self._answered(suite))
            elif suite.task is not None and self.plan.can(suite.task):
                tables.append(self._asked(suite))
            if suite.certified:
                tables.append(self._certified(suite))
            if suite.masking and self.store.masking_file(suite.conditions[0].eps).exists():
                tables.append(self._masking(suite))
        return tables

    def notes(self) -> list[str]:
        """What was left out, and why."""
        unasked = [
            f"{suite.title}: left out, because the data or the model is not for {suite.task}."
            for suite in self.plan.suites
            if suite.task is not None and not self.plan.can(suite.task)
        ]
        return list(dict.fromkeys([*self.record.notes, *unasked]))

    def summary(self) -> dict[str, Any]:
        """The tables and notes for machines, and how many seconds the run took (its last part, if it was resumed)."""
        told: dict[str, Any] = {
            "tables": {table.name: table.records() for table in self.tables()},
            "notes": self.notes(),
        }
        return told if self.record.seconds is None else {**told, "seconds": self.record.seconds}

    def write(self, out: str | os.PathLike[str]) -> Path:
        """Write a CSV of each table, summary.json and report.html, worst.svg where a suite asks for worst cases, and
        answers.svg where one certifies answers.

        What AutoAttack left right is in robustbench.json. The same results give the same bytes.

        Args:
            out: the evaluation's folder; or another, which is new, empty, or was written to in this way before.

        Returns:
            the report.

        Raises:
            SettingError: the folder holds something else.
        """
        folder = Path(out)
        page = folder / "report.html"
        if not report.is_one(page):
            unused(folder, RECORD, f"{ROWS}/{RECORD}", what="results of an evaluation")
        report.write(self, page)  # the first, for it marks the folder
        for table in self.tables():
            table.write_csv(folder / f"{table.name}.csv")
        for name, drawn in (("worst", curves.worst(self)), ("answers", curves.answers(self))):
            if drawn is not None:
                replace(folder / f"{name}.svg", drawn.svg)
        replace(folder / "summary.json", json.dumps(self.summary(), indent=2) + "\n")
        if records := robustbench.records(self):
            replace(folder / robustbench.FILE, json.dumps(records, indent=2) + "\n")
        return page

    def answers(
        self, defence: Defence, condition: Condition, task: str, samples: Iterable[Sample] | None = None
    ) -> Iterator[Answer]:
        """What was said about these samples, or about all."""
        wanted = self.plan.dataset.samples if samples is None else samples
        if task == Captioning.name:
            yield from self._captions(defence, condition, wanted)
            return
        rows, choice = self.rows(defence, condition), cast(Choice, TASKS[task])
        for sample in wanted:
            row = rows.get((sample.image, task))
            if row is not None:
                yield Answer(sample, row["reply"], choice.verdict(row["reply"], sample, self.plan.dataset))

    def _captions(self, defence: Defence, condition: Condition, samples: Iterable[Sample]) -> Iterator[Answer]:
        scores, captioning = self.store.scores(self.record.judge), cast(Captioning, TASKS[Captioning.name])
        for sample, said, own, aim in captions(self.store, defence, condition, samples):
            near, far = scores.get((said, own)), scores.get((said, aim))
            if near is not None and far is not None:
                yield Answer(sample, said, captioning.verdict(near, far), (near, far))

    def rows(self, defence: Defence, condition: Condition) -> dict[tuple[str, str], Row]:
        """(picture, task) -> its row."""
        key = answers_key(defence, condition)
        if key not in self._rows:
            self._rows[key] = self.store.rows(key)
        return self._rows[key]

    def cosine(
        self,
        defence: Defence,
        condition: Condition,
        samples: Iterable[Sample],
        *,
        of: str = "cosine",
        kind: str = FEATURES,
    ) -> Figure:
        """FCS under an attack: the mean cosine between what a defence serves for clean and for attacked pictures.

        Args:
            condition: for ``CLEAN``, the cosine is to the attack's target, a picture of something else.
            of: "cosine" of all that the model consumes, or "pooled".
            kind: ``AGAIN``, with ``CLEAN``: the cosine between two servings of the clean picture, with independent
                draws.
        """
        rows = self.rows(defence, condition)
        found = [rows.get((sample.image, kind)) for sample in samples]
        return Figure(mean([row[of] for row in found if row is not None]), "number")

    def certificates(self, defence: Defence, suite: Suite | None = None) -> dict[float, dict[str, Certificate]]:
        """sigma -> picture -> certificate, of all processes.

        Args:
            suite: of the pictures that this one certifies; of all if None.

        Raises:
            SettingError: a row is damaged, or none of its file's settings; the message says where.
        """
        found: dict[float, dict[str, Certificate]] = {}
        setup = self.plan.setup
        count = setup.certified_images if suite is None else self.plan.certified_pictures(suite)
        wanted = {one.image for one in self.plan.samples(count)}
        for path in self.store.certificates(defence.name):
            file = File.read(path)
            for name, row in file.rows(Certificate).items() if file else ():
                if name in wanted:
                    found.setdefault(row.certificate.sigma, {})[name] = row.certificate
        return found

    def answered(self, defence: Defence, suite: Suite) -> dict[Sample, AnswerCertificate]:
        """What is certified of a defence's answers, by picture, in the order of the suite's.

        Raises:
            SettingError: as for ``certificates``.
        """
        if suite.task is None:
            return {}
        found: dict[str, AnswerCertificate] = {}
        for path in self.store.answers_files(defence.name, suite.task):
            file = File.read(path)
            found |= {name: row.certificate for name, row in file.rows(AnswerCertificate).items()} if file else {}
        return {one: found[one.image] for one in self.plan.answered(suite) if one.image in found}

    def reach(self, defence: Defence, suite: Suite) -> list[float | None]:
        """The l2 distance within which each picture's answer is certified to stay right; None where it abstains or the
        certified class is wrong.
        """
        return [
            one.radius if one.predicted == sample.label else None
            for sample, one in self.answered(defence, suite).items()
        ]

    def _asked(self, suite: Suite) -> Table:
        assert suite.task is not None
        judged = ("score", "target score") if suite.task == Captioning.name else ()
        columns = ("pictures", "defence", "n", "ACC", "ASR", *COSINES, *judged)
        columns = (*columns, "s a picture") if suite.timed else columns
        lines = []
        for condition in suite.asked:
            for defence in suite.defences:
                answers = list(self.answers(defence, condition, suite.task, self.plan.pictures(suite, defence)))
                if answers:
                    lines.append(self._line(suite, defence, condition, answers))
        if suite.worst:
            lines += self._worst(suite, len(columns))
        return Table(suite.name, suite.title, columns, tuple(lines), self._note(suite))

    def worst(self, suite: Suite, defence: Defence, up_to: Condition) -> list[Answer]:
        """For each picture an answer that an attack within this one's ball got: a wrong one if there is any.

        It counts for the attacker if any of the answers does.
        """
        assert suite.task is not None
        found: dict[str, list[Answer]] = {}
        for condition in suite.asked:
            if condition.within(up_to):
                for one in self.answers(defence, condition, suite.task, self.plan.pictures(suite, defence)):
                    found.setdefault(one.sample.image, []).append(one)
        return [_worst(answers) for answers in found.values()]

    def _worst(self, suite: Suite, width: int) -> Iterator[tuple[Cell, ...]]:
        for condition in {condition.radius: condition for condition in suite.conditions}.values():
            for defence in suite.defences:
                if answers := self.worst(suite, defence, condition):
                    line = (f"worst up to {condition.radius}", defence.title, len(answers))
                    figures = (accuracy(answers), success(answers))
                    yield (*line, *figures, *("",) * (width - len(line) - len(figures)))

    def _line(self, suite: Suite, defence: Defence, condition: Condition, answers: list[Answer]) -> tuple[Cell, ...]:
        samples = [answer.sample for answer in answers]
        line: list[Cell] = [
            title_of(condition),
            defence.title,
            len(answers),
            accuracy(answers),
            success(answers),
        ]
        for of in ("cosine", "pooled"):
            if defence.served:
                line += ["", ""]
                continue
            line.append("" if condition == CLEAN else self.cosine(defence, condition, samples, of=of))
            line.append(self.cosine(defence, CLEAN, samples, of=of))
        if suite.task == Captioning.name:
            scores = [answer.scores for answer in answers if answer.scores]
            line += [Figure(mean([pair[place] for pair in scores]), "number") for place in range(2)]
        if suite.timed:  # pictures of a batch are no independent samples of it
            rows = self.rows(defence, condition)
            seconds = [rows[(sample.image, suite.task or "")]["seconds"] for sample in samples]
            line.append(f"{sum(seconds) / len(seconds):.3f}")
        return tuple(line)

    def _note(self, suite: Suite) -> str:
        said = "ACC: right answers. ASR: the attacker's answers. Of n pictures, with 95 % intervals (Wilson). "
        said += (
            "FCS: cosine between what is served for the clean and for the attacked picture, of all that the model "
            "consumes, and (in CSV and report) of pooled features, with Student's intervals; unrelated: of a clean "
            "picture and its attack's target, by the same defence. A cosine that is no higher than that says "
            "nothing."
        )
        if suite.worst:
            said += (
                " Each attack had only the pictures that were right under all rows before it. Worst: right under every "
                "attack up to this radius, of all pictures; each serving draws its own noise, so a picture that is "
                "wrong by chance in one of them counts as well."
            )
        if any(defence.smoothing and defence.smoothing.votes > 1 for defence in suite.defences):
            said += " A vote is adaptively attacked through single draws, fresh in each step; its FCS is of one draw."
        if any(defence.served for defence in suite.defences):
            said += (
                " As served: the answers of an endpoint to pictures that were attacked on the open weights, in eight "
                "bits. What withstands such a transfer may fall to an attack through the defence."
            )
        if suite.timed:
            said += " Seconds are of pictures in batches."
        if suite.task == Captioning.name:
            said += (
                f" Captions by the judge {self.record.judge}: right from .5 to the clean caption, the attacker's "
                "from .3 to the target's."
            )
        return said

    def _certified(self, suite: Suite) -> Table:
        columns = ("defence", "sigma", "n", *(f"eps {eps:g}" for eps in DISTANCES), "R .5")
        lines: list[tuple[Cell, ...]] = []
        note = ""
        for defence in suite.defences:
            if defence.smoothing is None:
                continue
            for sigma, by_picture in sorted(self.certificates(defence, suite).items()):
                some = list(by_picture.values())
                note = note or _certificates_note(some[0])
                if sigma not in (suite.sigmas or (self.record.levels.get(defence.name),)):
                    continue
                values = [Figure(mean([one.fcsb(eps) or 0.0 for one in some]), "number") for eps in DISTANCES]
                radius = Figure(mean([one.radius(0.5) or 0.0 for one in some]), "number")
                lines.append((defence.title, f"{sigma:g}", len(some), *values, radius))
        name, title = (
            (f"{suite.name}-certified", f"{suite.title}, certified") if suite.task else (suite.name, suite.title)
        )
        return Table(name, title, columns, tuple(lines), note)

    def _answered(self, suite: Suite) -> Table:
        columns = ("defence", "sigma", "n", *(f"l2 {radius:g}" for radius in REACHES))
        lines: list[tuple[Cell, ...]] = []
        note = ""
        for defence in suite.defences:
            if certificates := list(self.answered(defence, suite).values()):
                reach, one = self.reach(defence, suite), certificates[0]
                note = note or _answers_note(one, self.plan.setup.certified_draws)
                right = [proportion([far is not None and far >= radius for far in reach]) for radius in REACHES]
                lines.append((defence.title, f"{one.sigma:g}", len(reach), *(Figure(some, "share") for some in right)))
        return Table(suite.name, suite.title, columns, tuple(lines), note)

    def _masking(self, suite: Suite) -> Table:
        found = self._searched(suite.conditions[0].eps)
        lines = [_compared(one.name, one) for one in found.attacks]
        count = len(found.attacks[0].margins)
        hits = round(found.unbounded * count)
        away = proportion([i < hits for i in range(count)])
        lines.append(("adaptive, eps 1, untargeted", count, Figure(away, "share"), ""))
        lines += [_compared(on_the_answer(one), one) for one in found.answers]
        verdict = " ".join(found.problems) or "Nothing speaks for masked gradients."
        note = (
            f"{verdict} l-inf {suite.conditions[0].eps255:g}/255. Margin: cosine of the served feature to the "
            "target's less that to the picture's own; above 0 the attack has succeeded. The adaptive attack must "
            "not be weaker than the others, and without a bound it must reach every picture."
        )
        if found.answers:
            note += (
                " Of attacks on the answer, minus the log-likelihood of the answer to the clean picture; they have "
                "succeeded where mostly another one is served."
            )
        return Table(suite.name, suite.title, ("attack", "n", "success", "margin"), tuple(lines), note)

    def _searched(self, eps: float) -> MaskingReport:
        path = self.store.masking_file(eps)
        told = read(path, "an evaluation", _ANEW)
        try:
            return TypeAdapter(MaskingReport).validate_python(told)
        except ValueError as error:
            raise SettingError(f"{path} is not what an evaluation wrote: {error}. {_ANEW}") from None


def _compared(name: str, one: Strength) -> tuple[Cell, ...]:
    """An attack's line in the search for masked gradients."""
    return name, len(one.margins), Figure(proportion(one.succeeded), "share"), Figure(mean(one.margins), "number")


def _worst(answers: list[Answer]) -> Answer:
    """The first that is wrong, or the first; its verdict counts for the attacker if any does."""
    one = next((answer for answer in answers if not answer.verdict.correct), answers[0])
    attacked = [answer.verdict.attacked for answer in answers if answer.verdict.attacked is not None]
    return Answer(one.sample, one.reply, Verdict(one.verdict.correct, any(attacked) if attacked else None), one.scores)


def accuracy(answers: Iterable[Answer]) -> Figure:
    """ACC: the share of right answers."""
    return Figure(proportion([answer.verdict.correct for answer in answers]), "share")


def success(answers: Iterable[Answer]) -> Figure:
    """ASR: the share of the attacker's answers, of those that can be."""
    verdicts = [answer.verdict.attacked for answer in answers]
    return Figure(proportion([one for one in verdicts if one is not None]), "share")


def _certificates_note(one: Certificate) -> str:
    return (
        "The cosine certified within an l2 distance eps in [0, 1] pixels, and the distance within which it stays .5 "
        f"or more; averages over n pictures, each certificate wrong with probability at most {one.alpha:g}, from "
        f"{one.n:,} draws; where nothing is promised, 0 counts."
    )


def _answers_note(one: AnswerCertificate, servings: int) -> str:
    return (
        "Certified accuracy: pictures whose certified answer is right and stays so within the l2 distance, in [0, 1] "
        "pixels; at 0, right and certified at all. Of n pictures, with 95 % intervals (Wilson); each certificate is "
        f"wrong with probability at most {one.alpha:g}, from {servings:,} servings. A serving answers after n0 "
        "independent draws, and its answer has a vote; without a PSM and with one draw that is randomised smoothing "
        "(Cohen et al., ICML 2019)."
    )
