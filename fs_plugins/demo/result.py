"""What the demo measured: for people and for machines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fs_plugins.demo.settings import Settings
from fs_plugins.evaluation.picture import Panel
from fs_plugins.evaluation.results import Answer, Results, accuracy
from fs_plugins.evaluation.rows import Row, Rows, intervals, row, values
from fs_plugins.evaluation.suites import ABLATION, CLEAN, DEFENCES, Condition, Defence
from fs_plugins.evaluation.tables import Table
from fs_plugins.files import replace

_PARTS = {
    "none": ("none", "none"),
    "fs": ("fs", "noise + average"),
    "fs_m": ("fs_m", "... + mapper"),
    "fs_p": ("fs_p", "... + purifier"),
    "fs_psm": ("fs_pm", "... + both"),
}
"""The ablation's defences -> their names in summary.json, and for people."""


@dataclass(frozen=True)
class Demo:
    """One run.

    Args:
        settings: of the run.
        results: all answers and features.
        attacked: the attack.
        pictures: the ones that are drawn, certified.
        seconds: of all of it.
    """

    settings: Settings
    results: Results
    attacked: Condition
    pictures: list[Panel]
    seconds: float

    @property
    def sigma(self) -> float:
        return self.pictures[0].sigma

    def rows(self, condition: Condition) -> Rows:
        """Of every defence, on the clean or on the attacked pictures."""
        return {defence.name: self._row(defence, condition) for defence in DEFENCES}

    def _row(self, defence: Defence, condition: Condition) -> Row:
        captions, questions = (self._answers(defence, condition, task) for task in ("captioning", "vqa"))
        return {
            **row(self.results, defence, condition, "classification"),
            "caption_acc": accuracy(captions),
            "vqa_acc": accuracy(questions),
        }

    def ablation(self) -> Rows:
        """Of the parts of the defence, on the attacked pictures."""
        return {
            _PARTS[defence.name][0]: row(self.results, defence, self.attacked, "classification") for defence in ABLATION
        }

    def _answers(self, defence: Defence, condition: Condition, task: str) -> list[Answer]:
        return list(self.results.answers(defence, condition, task))

    def tables(self) -> list[Table]:
        """For people."""
        return [self._classes(), self._words(), self._parts(), self._certificates()]

    def _classes(self) -> Table:
        lines = []
        for condition in (CLEAN, self.attacked):
            for defence in DEFENCES:
                found = self._row(defence, condition)
                count = len(self._answers(defence, condition, "classification"))
                lines.append((_named(condition), defence.title, count, found["acc"], found["asr"], found["fcs"]))
        note = (
            "ACC: right answers to the eleven-way question. ASR: the attacker's class. FCS: cosine between what is "
            "served for the clean and for the attacked picture by the same defence; for clean rows, between two "
            "servings of the clean picture, with independent draws. 95 % intervals. The attack is made against each "
            "tower itself, without smoothing. FARE and TeCoA towers were trained against 4/255; theirs are the "
            f"first {self.settings.robust_count} scenes. FS-PSM with them is the vanilla tower's. Empirical "
            "robustness is not a certificate."
        )
        columns = ("pictures", "defence", "n", "ACC", "ASR", "FCS")
        return Table("classes", "Which shape is it?", columns, tuple(lines), note)

    def _words(self) -> Table:
        lines = []
        for condition in (CLEAN, self.attacked):
            for defence in DEFENCES:
                found = self._row(defence, condition)
                count = len(self._answers(defence, condition, "captioning"))
                lines.append((_named(condition), defence.title, count, found["caption_acc"], found["vqa_acc"]))
        columns = ("pictures", "defence", "n", "exact captions", "questions")
        return Table("words", "What it says of them", columns, tuple(lines))

    def _parts(self) -> Table:
        names = dict(_PARTS.values())
        lines = tuple((names[name], one["acc"], one["asr"], one["fcs"]) for name, one in self.ablation().items())
        return Table("parts", "What each part does to the attacked pictures", ("parts", "ACC", "ASR", "FCS"), lines)

    def _certificates(self) -> Table:
        lines = tuple(
            (panel.truth, *("none" if radius is None else f"{radius:.3f}" for radius in panel.radii.values()))
            for panel in self.pictures
        )
        alpha = next(panel.certificate.alpha for panel in self.pictures if panel.certificate)
        furthest = self.attacked.eps * self.pictures[0].clean.numel() ** 0.5
        note = (
            "The l2 distance in [0, 1] pixels within which the cosine to the clean feature stays at least .5: by "
            "the paper's formula, which holds at no confidence, by the same formula with a confidence of "
            f"{1 - alpha:g}, and by fs_plugins.certify with that confidence (its mean bound, at the quarter of alpha "
            f"that it has there, is the column before). The attack above moves a picture by up to {furthest:.1f}."
        )
        title = f"What is proven of four of the pictures, from the same {self.settings.draws:,} draws of each"
        return Table("certificates", title, ("picture", "paper's estimate", "mean bound", "ours"), lines, note)

    def summary(self) -> dict[str, object]:
        """What ``summary.json`` holds: values, and in ``intervals`` the 95 % interval of each."""
        rows = {"clean": self.rows(CLEAN), "attacked": self.rows(self.attacked), "ablation": self.ablation()}
        told = {"steps": self.settings.steps, "n0": self.settings.n0, "draws": self.settings.draws}
        return {
            **{which: values(some) for which, some in rows.items()},
            "intervals": {which: intervals(some) for which, some in rows.items()},
            "certificates": [
                {"picture": panel.truth, **{name: round(r, 4) if r else None for name, r in panel.radii.items()}}
                for panel in self.pictures
            ],
            "images": self.settings.count,
            "robust_images": self.settings.robust_count,
            "seconds": round(self.seconds, 1),
            "seed": self.settings.seed,
            "settings": {
                "images": self.settings.count,
                "robust_images": self.settings.robust_count,
                "eps": self.attacked.eps,
                **told,
                "seed": self.settings.seed,
                "sigma": self.sigma,
                "norm": "linf",
                "attack": "AttackVLM",
            },
        }

    def write(self, folder: Path) -> Path:
        """Write summary.json."""
        replace(folder / "summary.json", json.dumps(self.summary(), indent=2) + "\n")
        return folder / "summary.json"


def _named(condition: Condition) -> str:
    return "clean" if condition == CLEAN else "attacked"
