"""A whole evaluation: from settings to results in a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from fs_plugins import checks
from fs_plugins.errors import JudgeError, SettingError
from fs_plugins.evaluation import autoattack
from fs_plugins.evaluation.datasets import SETTINGS as DATASET
from fs_plugins.evaluation.datasets import Corrupt, Dataset, open_dataset
from fs_plugins.evaluation.judges import Judge, judge
from fs_plugins.evaluation.means import Track
from fs_plugins.evaluation.plan import Plan, Setup, fixed
from fs_plugins.evaluation.results import ROWS, Results
from fs_plugins.evaluation.run import Evaluation
from fs_plugins.evaluation.served import ServedModel, refuse_smoothing
from fs_plugins.evaluation.settings import Settings
from fs_plugins.evaluation.store import SETTINGS, Store
from fs_plugins.evaluation.subjects import Subject
from fs_plugins.evaluation.suites import AUTOATTACK, NONE, Suite, as_served, chosen
from fs_plugins.files import locked, unused
from fs_plugins.settings import build

Loader = Callable[[str, Dataset], Subject]
"""(weights of a tower as ``swap_encoder`` takes them, or "" for the model's own; the data) -> the model with it."""

Scenes = Callable[[Path, int], object]
"""(folder, count) -> so many pictures of a world of its own, written there as a dataset."""

ROBUST = {"fare": "fare4-clip", "tecoa": "tecoa4-clip"}
"""The public robust encoders, by the names of their towers."""


def evaluate(
    settings: Settings,
    load: Loader,
    *,
    scenes: Scenes | None = None,
    robust: Mapping[str, str] = ROBUST,
    mapper_only: str | os.PathLike[str] | None = None,
    track: Track = lambda what, count: lambda done: None,
    share: tuple[int, int] = (0, 1),
    wait: Callable[[], None] = lambda: None,
    ready: Callable[[Results], None] = lambda results: None,
) -> Results:
    """Run suites on a model and write tables, CSV, summary.json and report.html into ``settings.folder``.

    Whatever an earlier run with the same settings did there is taken from it.

    Args:
        settings: what is evaluated, on what, how thoroughly.
        load: loads the model; ``fs_plugins.hf.subjects.loader`` makes one for models of transformers.
        scenes: writes pictures where the settings name no data; ``fs_plugins.demo.dataset.write``.
        robust: encoders of the robust towers where the settings name none.
        mapper_only: a PSM of a mapper that was trained without a purifier, for the ablation.
        track: makes progress bars.
        share: this process's number and how many share the pictures. The first one writes the results.
        wait: until all processes are here.
        ready: called by the first process with what is written, also where a judge failed.

    Raises:
        SettingError: a setting out of range, or a folder of something else or in use by another run; see
            ``open_dataset``.
        JudgeError: the judge failed; all that needs none is written all the same, and the same call goes on from there.
        FSPluginsError: see ``Evaluation.run``.
    """
    settings = build(Settings, vars(settings))
    first, folder = share[0] == 0, settings.folder
    suites = chosen(settings.suite, settings.eps, settings.attacks)
    if any(condition.method == AUTOATTACK for suite in suites for condition in suite.conditions):
        autoattack.package()
    if settings.sigma is not None:
        checks.sigma(settings.sigma)
    compares, served = _judge(settings), _served(settings)
    if served is not None:
        suites = as_served(suites)
    with ExitStack() as held:
        data = settings.data or _scenes(settings, scenes, held if first else None, wait)
        dataset = _dataset(settings, data, suites)
        if settings.data is not None and first:  # a picture that cannot be read is told before anything is begun
            _hold(folder, held)
        towers = _towers(settings, robust)
        plan = Plan(suites, dataset, _setup(settings, mapper_only), tuple(towers))
        kept = {**fixed(settings.model, towers, dataset, plan.setup), "class_prompt": settings.class_prompt}
        if first:
            Store.begin(folder / ROWS, kept)
        wait()
        evaluation = Evaluation(
            load=lambda tower: load(towers[tower], dataset),
            plan=plan,
            store=Store.begin(folder / ROWS, kept, share[0]),
            judge=compares,
            track=track,
            batch_size=settings.batch_size or (44 if settings.data is None else 8),
            chunk_size=settings.chunk_size,
            share=share,
            wait=wait,
            served=served,
        )
        failed = None
        try:
            evaluation.run()
        except JudgeError as error:  # everything else is there
            failed = error
        results = Results(folder)
        if first:
            results.write(folder)
            ready(results)
        if failed is not None:
            raise failed
    return results


def _hold(folder: Path, held: ExitStack) -> None:
    """Keep other evaluations out of a folder, which is new, empty, or an evaluation's.

    Raises:
        SettingError: it is in use, or holds something else, of which nothing may be replaced.
    """
    unused(folder, f"{ROWS}/{SETTINGS}", f"scenes-*/{DATASET}", what="evaluation")
    held.enter_context(locked(folder, "this evaluation"))


def _judge(settings: Settings) -> Judge:
    if settings.judge == "endpoint" and not (settings.judge_url and settings.judge_model):
        raise SettingError("--judge endpoint needs --judge-url, such as http://localhost:8000/v1, and --judge-model.")
    told = {"model": settings.judge_model, "url": settings.judge_url}
    return judge(settings.judge, **{name: value for name, value in told.items() if value is not None})


def _served(settings: Settings) -> ServedModel | None:
    if settings.endpoint is None:
        if settings.endpoint_model is not None:
            raise SettingError("--endpoint-model names a model at an --endpoint, and none is given.")
        return None
    refuse_smoothing(settings.psm, settings.sigma, settings.n0)
    return ServedModel(settings.endpoint, settings.endpoint_model or settings.model)


def _scenes(settings: Settings, scenes: Scenes | None, held: ExitStack | None, wait: Callable[[], None]) -> Path:
    """The folder of the embedded world's pictures, written by the first process."""
    if scenes is None:
        raise SettingError("There is nothing to evaluate on: name a dataset with data=, or pass scenes=.")
    count = settings.effort["images"]
    folder = settings.folder / f"scenes-{count}"
    if held is not None:
        _hold(settings.folder, held)
        scenes(folder, count)
    wait()
    return folder


def _dataset(settings: Settings, folder: Path, suites: tuple[Suite, ...]) -> Dataset:
    dataset = open_dataset(
        folder, targets=settings.targets, corrupt=cast(Corrupt, settings.corrupt), seed=settings.seed
    )
    if settings.images is not None or settings.quick:
        count = settings.images or min(settings.effort["images"], len(dataset.samples))
        dataset = dataset.some(count, settings.seed)
    if not any(suite.task is None or suite.task in dataset.tasks for suite in suites):
        raise SettingError(
            f"{dataset.name} can be asked for {', '.join(dataset.tasks)}, and "
            f"{', '.join(one.name for one in suites)} asks for something else (docs/reference/dataset-format.md says "
            "what each task needs)."
        )
    return dataset


def _towers(settings: Settings, robust: Mapping[str, str]) -> dict[str, str]:
    """Names of towers -> what ``swap_encoder`` is told; the model's own first."""
    if settings.endpoint is not None:
        return {NONE.tower: ""}
    given = {"fare": settings.fare, "tecoa": settings.tecoa}
    found = {name: given.get(name) or usual for name, usual in robust.items()}
    return {NONE.tower: "", **{name: what for name, what in found.items() if what != "none"}}


def _setup(settings: Settings, mapper_only: str | os.PathLike[str] | None) -> Setup:
    names = {one.name for one in fields(Setup)}
    effort: dict[str, Any] = {name: value for name, value in settings.effort.items() if name in names}
    return Setup(
        **effort,
        psm=settings.psm,
        light=settings.light,
        mapper_only=None if mapper_only is None else str(mapper_only),
        sigma=settings.sigma,
        n0=settings.n0,
        seed=settings.seed,
    )
