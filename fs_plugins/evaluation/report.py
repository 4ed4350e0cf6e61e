"""An evaluation as one HTML file that needs nothing else: tables, pictures, what was said of each, certificates.

The same rows give the same bytes, so that two reports can be compared: it bears no date.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from fs_plugins.errors import SettingError
from fs_plugins.evaluation import curves
from fs_plugins.evaluation.captions import captions
from fs_plugins.evaluation.datasets import Sample
from fs_plugins.evaluation.plan import SHOWN, attacked_key
from fs_plugins.evaluation.record import settings_of
from fs_plugins.evaluation.store import SHOWN as PICTURES
from fs_plugins.evaluation.suites import CLEAN, NONE, TARGET, Condition, Defence, Suite
from fs_plugins.evaluation.tables import Table, parted, title_of
from fs_plugins.evaluation.tasks import TASKS, VQA, Choice, Verdict
from fs_plugins.files import replace
from fs_plugins.kept import flat
from fs_plugins.pictures import address, png, to_pil

if TYPE_CHECKING:
    from fs_plugins.evaluation.results import Answer, Results

ENLARGED = 8
"""How much larger than it is an attack's change is shown."""

_UNSET = {
    "adaptive_images": "all",
    "mapper_only": "the PSM's own mapper",
    "sigma": "the PSM's own",
}
"""What a setting that is None means, in words."""

_GENERATOR = '<meta name="generator" content="fs-plugins">'


def write(results: Results, path: Path, *, shown: int = SHOWN, further: Sequence[Table] = ()) -> None:
    """Write the report.

    Args:
        results: of an evaluation that has run, or of as much as there is of one.
        path: of the HTML file; it is replaced whole.
        shown: how many pictures are shown, the first ones, as far as the folder has them; the tables and answers are of
            all.
        further: tables to stand after those of the evaluation.

    Raises:
        SettingError: ``shown`` is negative, or a purified picture in the folder has another shape than the attacked
            one.
    """
    if shown < 0:
        raise SettingError(f"shown is a number of pictures, 0 or more, got {shown}.")
    plan, said = results.plan, _Said(results)
    settings = settings_of(results.folder)
    pictures = list(_pictures(said, plan.dataset.samples[:shown]))
    page = _template().render(
        model=settings.pop("model", "a model"),
        data=plan.dataset.name,
        settings=_settings(settings, results),
        notes=[*results.notes(), *(f"Skipped: {sentence}" for sentence in plan.dataset.skipped)],
        tables=[_grouped(table) for table in (*results.tables(), *further)],
        curves=curves.certified(results),
        worst=curves.worst(results),
        answered=curves.answers(results),
        enlarged=ENLARGED,
        purified=any(attack["purified"] for picture in pictures for attack in picture["attacks"]),
        pictures=pictures,
        suites=[asked for suite in plan.suites if (asked := _asked(said, suite)) is not None],
    )
    replace(path, page.encode(errors="replace"))  # a reply may hold half a surrogate pair, which no file can


def is_one(path: Path) -> bool:
    """Whether a file is a report that ``write`` wrote."""
    try:
        with path.open("rb") as file:
            return _GENERATOR.encode() in file.read(2000)
    except OSError:
        return False


def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    source = resources.files(__package__).joinpath("report.html").read_text("utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source)


def _settings(kept: Mapping[str, Any], results: Results) -> list[tuple[str, str]]:
    """What the rows depend on, in words; the run's own record of it."""
    told = {"suites": ", ".join(suite.name for suite in results.plan.suites), "judge": results.record.judge}
    told |= {name: _UNSET.get(name, "none") if value is None else str(value) for name, value in flat(kept).items()}
    return [
        (name.replace("_", " ").replace("towers.", "tower "), value or "the model's own")
        for name, value in told.items()
    ]


def _grouped(table: Table) -> dict[str, Any]:
    """A table with its row headers.

    Two where words stand in the second column too, and then rows with the same first one are together.
    """
    nested = bool(table.rows) and all(len(row) > 1 and isinstance(row[1], str) for row in table.rows)
    groups = []
    for head, some in groupby(table.rows, key=lambda row: row[0] if nested else ""):
        rows = list(some)
        lines = []
        for place, row in enumerate(rows):
            heads = [(str(row[0]), "row", 1)]
            if nested:
                heads = [(str(head), "rowgroup", len(rows))] if place == 0 else []
                heads.append((str(row[1]), "row", 1))
            lines.append({"heads": heads, "cells": [parted(cell) for cell in row[2 if nested else 1 :]]})
        groups.append(lines)
    return {"name": table.name, "title": table.title, "note": table.note, "columns": table.headings, "groups": groups}


@dataclass(frozen=True)
class Mark:
    """A verdict in a word, a sign and a colour's name, so that nobody depends on seeing colours."""

    word: str
    sign: str
    style: str


_RIGHT, _WRONG = Mark("right", "\u2713", "right"), Mark("wrong", "\u2717", "wrong")
_ATTACKED = Mark("the attacker's", "\u26a0", "attacked")
_BOTH = Mark("right, and the attacker's too", "\u26a0", "attacked")


def _mark(verdict: Verdict) -> Mark:
    if verdict.attacked:
        return _BOTH if verdict.correct else _ATTACKED
    return _RIGHT if verdict.correct else _WRONG


@dataclass(frozen=True)
class Reply:
    """One answer as it is shown; ``means`` is the class or option, where the words themselves do not say it."""

    text: str
    means: str | None
    mark: Mark


class _Said:
    """What was said, by picture, and what should have been; each file is read once."""

    def __init__(self, results: Results) -> None:
        self.results, self.plan = results, results.plan
        self.cells = self.plan.cells
        self.by_picture = cache(self._by_picture)
        self.references = cache(self._references)

    def reply(self, defence: Defence, condition: Condition, task: str, sample: Sample) -> Reply | None:
        answer = self.by_picture(defence, condition, task).get(sample.image)
        if answer is None:
            return None
        means = None
        if task != "captioning":
            means = cast(Choice, TASKS[task]).parse(answer.reply, sample, self.plan.dataset)
        return Reply(answer.reply, None if means == answer.reply else means, _mark(answer.verdict))

    def wanted(self, task: str, sample: Sample) -> tuple[str, str]:
        """The right answer and the attacker's; empty where there is none, or where it is the truth and counts not."""
        dataset = self.plan.dataset
        if task == "captioning":
            return self.references().get(sample.image, (sample.caption or "", ""))
        right, aim = sample.label, dataset.wanted(sample)
        if task == "vqa":
            right, aim = sample.answer, dataset.none_option
        if right is None or aim is None or right.casefold() == aim.casefold():
            return right or "", ""
        return right, aim

    def _by_picture(self, defence: Defence, condition: Condition, task: str) -> dict[str, Answer]:
        return {answer.sample.image: answer for answer in self.results.answers(defence, condition, task)}

    def _references(self) -> dict[str, tuple[str, str]]:
        found = captions(self.results.store, NONE, CLEAN, self.plan.dataset.samples)
        return {sample.image: (own, aim) for sample, _, own, aim in found}


def _pictures(said: _Said, samples: Sequence[Sample]) -> Iterator[dict[str, Any]]:
    """Those of the samples that have been attacked: clean, and under each attack on the model's own encoder."""
    store = said.results.store
    tasks = list(dict.fromkeys(task for asked in said.cells.values() for task in asked if task in TASKS))
    attacks = _attacks(said)
    for sample in samples:
        clean = store.picture(f"{PICTURES}/clean", sample.image)
        found = {key: picture for key in attacks if (picture := store.attacked(key, sample.image)) is not None}
        if clean is None or not found:
            continue
        aim = store.picture(f"{PICTURES}/target", sample.image)
        yield {
            "name": sample.image,
            "facts": _facts(said, sample, tasks),
            "clean": _png(clean),
            "aim": None if aim is None else _png(aim),
            "small": clean.shape[-1] < 200,
            "replies": _replies(said, sample, CLEAN, None),
            "attacks": [
                {
                    "title": _titled(*attacks[key]),
                    "attacked": _png(attacked),
                    "difference": _png(0.5 + ENLARGED * (attacked - clean)),
                    "purified": _purified(said, key, sample, attacked),
                    "replies": _replies(said, sample, *attacks[key]),
                }
                for key, attacked in found.items()
            ],
        }


def _attacks(said: _Said) -> dict[str, tuple[Condition, Defence | None]]:
    """Where attacked pictures lie -> the attack, and the defence they were made through if there is one."""
    found: dict[str, tuple[Condition, Defence | None]] = {}
    for defence, condition in said.cells:
        if defence.tower == NONE.tower and condition not in (CLEAN, TARGET):
            found[attacked_key(defence, condition)] = condition, defence if condition.adaptive else None
    return found


def _purified(said: _Said, key: str, sample: Sample, attacked: Tensor) -> str | None:
    """The attacked picture with noise added and purified, where the run kept such a view."""
    view = said.results.store.picture(f"{PICTURES}/purified/{key}", sample.image)
    if view is not None and view.shape != attacked.shape:
        raise SettingError(
            f"The purified picture of {sample.image} in {said.results.folder} must have the attacked one's shape, "
            f"{tuple(attacked.shape)}, and has {tuple(view.shape)}. Delete the folder {PICTURES} in it and evaluate "
            "again."
        )
    return None if view is None else _png(view)


def _titled(condition: Condition, maker: Defence | None) -> str:
    return title_of(condition) + (f", made through {maker.title}" if maker is not None else "")


def _facts(said: _Said, sample: Sample, tasks: Sequence[str]) -> list[dict[str, str | None]]:
    """What each task asks of the picture, and the answers that count."""
    facts = []
    for task in tasks:
        if TASKS[task].applies(sample):
            right, aim = said.wanted(task, sample)
            facts.append({"task": _name(task), "question": _question(task, sample, said), "right": right, "aim": aim})
    return facts


def _question(task: str, sample: Sample, said: _Said) -> str | None:
    if task != "vqa":
        return None
    offered = VQA().offered(sample, said.plan.dataset)
    return f"{sample.question} ({' / '.join(offered)})"


def _name(task: str) -> str:
    return {"captioning": "Caption", "classification": "Class", "vqa": "Question"}[task]


def _replies(said: _Said, sample: Sample, condition: Condition, maker: Defence | None) -> dict[str, Any] | None:
    """What each defence said under a condition. ``others``: whether another picture was attacked, on its own tower."""
    cells = {
        defence: tasks
        for (defence, other), tasks in said.cells.items()
        if other == condition and maker in (None, defence)
    }
    wanted = list(dict.fromkeys(task for tasks in cells.values() for task in tasks if task in TASKS))
    lines: list[dict[str, Any]] = []
    for defence in cells:
        replies = [said.reply(defence, condition, task, sample) for task in wanted]
        if any(replies):
            other = condition != CLEAN and defence.tower != NONE.tower
            lines.append({"defence": defence.title, "other": other, "replies": replies})
    kept = [place for place, _ in enumerate(wanted) if any(line["replies"][place] for line in lines)]
    for line in lines:
        line["replies"] = [line["replies"][place] for place in kept]
    return {"tasks": [_name(wanted[place]) for place in kept], "lines": lines} if lines else None


def _asked(said: _Said, suite: Suite) -> dict[str, Any] | None:
    """A suite's answers: a row for each picture, a column for each condition and defence that has any."""
    if suite.task is None:
        return None
    task = suite.task
    cells = [
        (condition, defence)
        for condition in suite.asked
        for defence in suite.defences
        if (defence, condition) in said.cells and said.by_picture(defence, condition, task)
    ]
    rows = []
    for sample in said.plan.dataset.samples:
        replies = [said.reply(defence, condition, task, sample) for condition, defence in cells]
        if any(replies):
            right, aim = said.wanted(task, sample)
            rows.append(
                {
                    "name": sample.image,
                    "question": _question(task, sample, said),
                    "right": right,
                    "aim": aim,
                    "replies": replies,
                }
            )
    if not rows:
        return None
    heads = [(title_of(condition), [d.title for _, d in some]) for condition, some in groupby(cells, lambda c: c[0])]
    return {"name": suite.name, "title": suite.title, "heads": heads, "rows": rows}


def _png(image: Tensor) -> str:
    """(3, H, W), clipped to [0, 1] -> a data: address."""
    return address(png(to_pil(image)))
