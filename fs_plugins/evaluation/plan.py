"""What an evaluation is to do: which cells there are, which pictures each is about. Values; no model is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import fs_plugins
from fs_plugins import checks
from fs_plugins.errors import SettingError
from fs_plugins.evaluation.datasets import Dataset, Sample
from fs_plugins.evaluation.suites import CLEAN, NONE, TARGET, Condition, Defence, Suite
from fs_plugins.evaluation.tasks import TASKS

FEATURES, AGAIN = "features", "again"
"""Beside the tasks: the row of a picture's feature, and that of a second serving of it with other draws."""

PURIFYING = "bfloat16"
"""What torch calls the lower precision that purifiers may work in."""

SHOWN = 6
"""How many pictures a report shows."""

Cell = tuple[Defence, Condition]
Asked = dict[str, tuple[Sample, ...]]
"""What a defence is asked under a condition, task by task, and about which pictures."""


@dataclass(frozen=True)
class Setup:
    """What every row of an evaluation depends on, beside model, towers and data.

    Args:
        steps: of the attacks on bare encoders (the papers: 300).
        adaptive_steps, adaptive_draws: of those on defences, and draws that each step's gradient is averaged over
            (EOT).
        adaptive_images: how many pictures defences are attacked on; all if None.
        aside_images: how many pictures the supplement's tables get; all if None.
        psm, light: the PSM of the smoothed defences, and of their light form, as ``enable`` takes them.
        mapper_only: a PSM for the ablation's mapper without a purifier; the PSM's own mapper if None.
        purifying: a lower precision that purifiers work in, ``"bfloat16"``; their own if None.
        sigma: noise in [0, 1] pixels; the PSM's own if None.
        n0: draws per picture.
        certified_images, certified_draws: how many pictures are certified, from how many draws each.
        masking_images, masking_queries: pictures of the search for masked gradients, and the queries that its
            gradient-free attack has for each.
        seed: of everything random.
        robust_images: how many of the pictures robust towers get, the first ones; all if None.
        aside_certified, aside_adaptive: how many pictures are certified, and attacked adaptively, for tables that a
            part is enough for; as for others if None.
    """

    steps: int = 300
    adaptive_steps: int = 100
    adaptive_draws: int = 2
    adaptive_images: int | None = None
    aside_images: int | None = None
    psm: str = "auto"
    light: str = "photo-light"
    mapper_only: str | None = None
    sigma: float | None = None
    n0: int = 4
    certified_images: int = 100
    certified_draws: int = 1000
    masking_images: int = 32
    masking_queries: int = 500
    seed: int = 0
    robust_images: int | None = None
    aside_certified: int | None = None
    aside_adaptive: int | None = None
    purifying: str | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).copy().items():
            if name == "seed":
                checks.settle(self, seed=checks.seed(value))
            elif name == "sigma":
                checks.settle(self, sigma=None if value is None else checks.sigma(value))
            elif name == "purifying":
                if value not in (None, PURIFYING):
                    raise SettingError(
                        f"Purifiers work in float32, their own precision, or in {PURIFYING}; got {value!r}."
                    )
            elif name not in ("psm", "light", "mapper_only") and value is not None:
                checks.settle(self, **{name: checks.whole(name, value, least=0)})


@dataclass(frozen=True)
class Plan:
    """Suites on a model and its robust towers.

    Args:
        suites: which tables.
        dataset: what is asked.
        setup: see there.
        towers: the names there are; ``"none"`` is the model's own encoder.
        tasks: what the model can be asked; None before anybody knows.
    """

    suites: tuple[Suite, ...]
    dataset: Dataset
    setup: Setup
    towers: tuple[str, ...] = (NONE.tower,)
    tasks: tuple[str, ...] | None = None

    @cached_property
    def cells(self) -> dict[Cell, Asked]:
        """Every defence under every condition that a suite asks about."""
        found: dict[Cell, dict[str, set[str]]] = {}
        for suite in self.suites:
            for cell, task, samples in self._asked(suite):
                names = found.setdefault(cell, {}).setdefault(task, set())
                names.update(sample.image for sample in samples)
        everything = self.dataset.samples
        return {
            cell: {task: tuple(s for s in everything if s.image in names) for task, names in tasks.items()}
            for cell, tasks in found.items()
            if cell[0].tower in self.towers
        }

    def _asked(self, suite: Suite) -> Iterator[tuple[Cell, str, tuple[Sample, ...]]]:
        if suite.task is None or not self.can(suite.task):
            return
        for defence in suite.defences:
            samples = self.pictures(suite, defence)
            if suite.compared and not defence.served:
                yield (defence, CLEAN), FEATURES, samples
            if suite.twice:
                yield (defence, CLEAN), AGAIN, samples
            for condition in suite.asked:
                if condition.through is not None and defence.smoothing is None:
                    continue
                if condition != CLEAN and not defence.served:
                    yield (defence, condition), FEATURES, samples
                yield (defence, condition), suite.task, samples
        if suite.task == "captioning":  # what captions are compared with
            for condition in (CLEAN, TARGET):
                yield (NONE, condition), suite.task, self.pictures(suite, NONE)

    def before(self, defence: Defence, condition: Condition) -> tuple[Condition, ...] | None:
        """What comes before a condition where only the worst case counts; None where a suite wants all pictures."""
        found: set[Condition] = set()
        for suite in self.suites:
            if defence in suite.defences and condition in suite.asked:
                if not suite.worst or condition not in suite.conditions:
                    return None
                found.update(one for one in suite.asked[: suite.asked.index(condition)] if one.within(condition))
        return tuple(sorted(found, key=lambda one: one.name))

    def can(self, task: str) -> bool:
        """Whether data and model are for a task."""
        return task in self.dataset.tasks and (self.tasks is None or task in self.tasks)

    def pictures(self, suite: Suite, defence: Defence) -> tuple[Sample, ...]:
        """What a suite asks a defence about; what an adaptive attack is compared with must be of the same ones."""
        setup, counts = self.setup, [len(self.dataset.samples)]
        if suite.aside and setup.aside_images is not None:
            counts.append(setup.aside_images)
        if any(condition.adaptive for condition in suite.conditions):
            few = (setup.adaptive_images, setup.aside_adaptive if suite.aside else None)
            counts += [count for count in few if count is not None]
        robust = None if defence.tower == NONE.tower else setup.robust_images
        return self.samples(min(counts))[:robust]

    def samples(self, count: int | None = None) -> tuple[Sample, ...]:
        """So many of the samples, of all labels alike, or all; more contain fewer."""
        every = self.dataset.samples
        return every if count is None or count >= len(every) else self.dataset.some(count, self.setup.seed).samples

    @property
    def needed(self) -> set[str]:
        """The towers that the suites ask for, whether or not there are any."""
        return {defence.tower for suite in self.suites for defence in suite.defences}

    def certified(self, defence: Defence) -> dict[float | None, int]:
        """The noise levels that a defence is certified at, and for how many pictures each; None is its own."""
        found: dict[float | None, int] = {}
        for suite in self.suites:
            if suite.certified and defence in suite.defences and defence.smoothing is not None:
                own = self.setup.sigma if defence.smoothing.sigma is None else defence.smoothing.sigma
                for sigma in suite.sigmas or (own,):
                    found[sigma] = max(found.get(sigma, 0), self.certified_pictures(suite))
        return found

    def answered(self, suite: Suite) -> tuple[Sample, ...]:
        """The pictures about which a suite certifies what is answered."""
        if suite.task is None or not suite.answers or not self.can(suite.task):
            return ()
        task = TASKS[suite.task]
        return tuple(one for one in self.samples(self.certified_pictures(suite)) if task.applies(one))

    def certified_pictures(self, suite: Suite) -> int:
        """How many pictures a suite certifies."""
        few = self.setup.aside_certified if suite.aside else None
        return self.setup.certified_images if few is None else few

    @property
    def masking_eps(self) -> float | None:
        """The l-inf radius of the search for masked gradients; None if no suite wants one."""
        return next((suite.conditions[0].eps for suite in self.suites if suite.masking), None)


def attacked_key(defence: Defence, condition: Condition) -> str:
    """Where a cell's attacked pictures lie: by tower, as the paper shares them, unless made through the defence."""
    return f"{defence.name if condition.adaptive else defence.tower}/{condition.name}"


def answers_key(defence: Defence, condition: Condition) -> str:
    """Where a cell's rows lie."""
    return f"{defence.name}/{condition.name}"


_LATER = {"robust_images", "aside_certified", "aside_adaptive", "purifying"}
"""Settings that came later: folders from before there were any go on."""


def fixed(model: str, towers: Mapping[str, str], dataset: Dataset, setup: Setup) -> dict[str, Any]:
    """What ``Store`` holds a run to, the same wherever the package lies."""
    told = asdict(setup)
    if setup.mapper_only is not None:
        told["mapper_only"] = Path(setup.mapper_only).name
    for name in _LATER:
        if told[name] is None:
            del told[name]
    return {"version": fs_plugins.__version__, "model": model, "towers": dict(towers), "data": dataset.digest, **told}


def setup_of(kept: Mapping[str, Any]) -> Setup:
    """The setup out of what ``fixed`` told.

    Raises:
        KeyError: that told no such thing.
    """
    names = {one.name for one in fields(Setup)} - (_LATER - kept.keys())
    return Setup(**{name: kept[name] for name in names})
