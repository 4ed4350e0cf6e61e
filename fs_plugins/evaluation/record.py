"""What a run wrote down of itself, beside its rows: enough to read them without the model, the data or the PSM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from fs_plugins.errors import SettingError
from fs_plugins.evaluation.datasets import Dataset, Prompts, Sample
from fs_plugins.evaluation.plan import Plan, setup_of
from fs_plugins.evaluation.store import SETTINGS
from fs_plugins.evaluation.suites import Suite
from fs_plugins.kept import read, write

RECORD, FORMAT = "evaluation.json", 1
_DATASET = ("name", "classes", "target_class", "none_option", "skipped")


@dataclass(frozen=True)
class Record:
    """One run.

    Args:
        plan: what it was to do; ``plan.tasks`` is what the model could be asked.
        judge: the name of the one whose scores count.
        notes: what was left out, and why.
        levels: sigma of the defences that were certified at their own, by their names.
        seconds: how long it took, if it has ended.
    """

    plan: Plan
    judge: str
    notes: tuple[str, ...] = ()
    levels: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None

    def write(self, folder: Path) -> None:
        """Keep it beside the rows, in place of an earlier run's."""
        plan, data = self.plan, self.plan.dataset
        told = {
            "format": FORMAT,
            "suites": [asdict(suite) for suite in plan.suites],
            "towers": plan.towers,
            "tasks": plan.tasks,
            "judge": self.judge,
            "notes": self.notes,
            "levels": dict(self.levels),
            "seconds": self.seconds,
            "dataset": {
                **{name: getattr(data, name) for name in _DATASET},
                "prompts": data.prompts.model_dump(),
                "samples": [sample.model_dump(exclude_none=True) for sample in data.samples],
            },
        }
        write(folder / RECORD, told)

    @classmethod
    def read(cls, folder: Path) -> Record:
        """The latest run's.

        Raises:
            SettingError: there is none, it is one of another version, or it is damaged.
        """
        kept = settings_of(folder)
        if not (folder / RECORD).is_file():
            raise SettingError(
                f"{folder} was written by an earlier version of fs-plugins, or its run was stopped before it began: "
                f"it has answers but no {RECORD}, which says what they are about. Run the same command again with "
                "the same folder; what is there is not asked again, and the folder can be read afterwards."
            )
        told = read(folder / RECORD, "an evaluation")
        if told.get("format") != FORMAT:
            raise SettingError(
                f"{folder / RECORD} is of format {told.get('format')}; this version of fs-plugins reads {FORMAT}. "
                "Read it with the version that wrote it, or evaluate into another folder."
            )
        try:
            suites = TypeAdapter(tuple[Suite, ...]).validate_python(told["suites"])
            dataset = _dataset(folder, told["dataset"])
            tasks = None if told["tasks"] is None else tuple(told["tasks"])
            plan = Plan(suites, dataset, setup_of(kept), tuple(told["towers"]), tasks)
            return cls(plan, told["judge"], tuple(told["notes"]), told["levels"], told["seconds"])
        except (KeyError, TypeError, ValueError) as error:
            raise SettingError(f"{folder / RECORD} is not what an evaluation wrote: {error}") from None


def _dataset(root: Path, told: Mapping[str, Any]) -> Dataset:
    return Dataset(
        name=told["name"],
        root=root,
        samples=tuple(Sample.model_validate(sample) for sample in told["samples"]),
        classes=tuple(told["classes"]),
        target_class=told["target_class"],
        none_option=told["none_option"],
        prompts=Prompts(**told["prompts"]),
        skipped=tuple(told["skipped"]),
    )


def settings_of(folder: Path) -> dict[str, Any]:
    """What every row of the run in this folder depends on.

    Raises:
        SettingError: there is no run, or the file is damaged.
    """
    if not (folder / SETTINGS).is_file():
        raise SettingError(f"{folder} holds no evaluation: it has no {SETTINGS}.")
    return read(folder / SETTINGS, "an evaluation")
