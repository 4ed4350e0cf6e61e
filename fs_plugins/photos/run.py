"""The evaluation on photographs: a real encoder, two attacks, and what the plugin makes of them.

It is an evaluation of its own suites, of the encoder through its head and of the small language model that sees by it,
and a picture. Everything is computed while it runs, or taken from an earlier run with the same settings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import fs_plugins
from fs_plugins import checks
from fs_plugins.errors import PSMError
from fs_plugins.evaluation import picture, report
from fs_plugins.evaluation.clock import Clock
from fs_plugins.evaluation.datasets import SETTINGS as DATASET
from fs_plugins.evaluation.datasets import Dataset, Prompts, open_dataset
from fs_plugins.evaluation.defended import options
from fs_plugins.evaluation.judges import ExactMatch, Judge
from fs_plugins.evaluation.means import Track
from fs_plugins.evaluation.picture import panels
from fs_plugins.evaluation.plan import PURIFYING, Plan, Setup, fixed
from fs_plugins.evaluation.results import ROWS, Results
from fs_plugins.evaluation.run import Evaluation
from fs_plugins.evaluation.store import SETTINGS, Store
from fs_plugins.evaluation.subjects import Subject, size_of
from fs_plugins.evaluation.suites import FS_PSM, Smoothing
from fs_plugins.evaluation.whole import Loader
from fs_plugins.files import locked, unused
from fs_plugins.photos.cost import cost
from fs_plugins.photos.result import Photos
from fs_plugins.photos.settings import Settings
from fs_plugins.photos.suites import attacks, spoken, suites
from fs_plugins.plugins import known_encoders
from fs_plugins.registry import StandIn
from fs_plugins.settings import build

SPOKEN = "spoken"
"""The folder of the language model's rows."""
SHOWN = 4
TOGETHER = 8
"""Views that go through at once: more of them leave the caches of a CPU, and take up to a third longer."""


def run(
    settings: Settings,
    photographs: Callable[[], Path],
    load: Loader,
    *,
    model: str,
    speaker: Loader | None = None,
    judge: Judge | None = None,
    track: Track = lambda what, count: lambda done: None,
) -> Photos:
    """Measure, and write summary.json, photos.png, report.html and all answers into ``settings.out``.

    Args:
        photographs: writes them, and gives the folder of their dataset.
        load: loads the encoder with its head, as for ``fs_plugins.evaluation.evaluate``.
        model: what it is called in the folder's settings.
        speaker: loads the language model with the same encoder, if there is one.
        judge: compares its captions; equal ones are alike if None.
        track: makes a progress bar for each part that takes long.

    Raises:
        SettingError: a setting out of range, or the folder holds something else, is in use, or was begun with others.
    """
    settings = build(Settings, vars(settings))
    checks.sigma(settings.sigma)
    out = settings.out
    unused(out, f"{ROWS}/{SETTINGS}", f"photographs-*/{DATASET}", what="evaluation on photographs")
    with locked(out, "this evaluation on photographs"):
        clock = Clock(out / ROWS)
        track = clock.on(track)
        data = open_dataset(photographs(), seed=settings.seed)
        subject = load("", data)
        own, setup = _defence(settings, subject)
        plan = Plan(suites(settings, own), _of_all_classes(data), setup)
        store = Store.begin(out / ROWS, {**fixed(model, {"none": ""}, plan.dataset, setup), "made_by": "photos"})
        Evaluation(lambda tower: subject, plan, store, ExactMatch(), track, settings.batch_size, TOGETHER).run()
        results = Results(out)
        said = _spoken(settings, data, store, speaker, judge, track)
        shown = plan.samples(setup.certified_images)[:SHOWN]  # not chosen by outcome
        attacked = attacks(settings.eps)[0]
        drawn = panels(results, plan.dataset, subject, shown, attacked, "classification")
        certified = results.certificates(FS_PSM)[settings.sigma]
        drawn = [
            replace(panel, certificate=certified[sample.image]) for panel, sample in zip(drawn, shown, strict=True)
        ]
        smoother = fs_plugins.smoothers(subject.model, **options(subject, setup, Smoothing()))[0]
        image = plan.dataset.image(shown[0], size_of(subject.call)).to(subject.call.device)
        photos = Photos(settings, own, results, said, drawn, cost(smoother, image), clock.seconds)
        photos.write(out)
        title = picture.titled(attacked, steps=settings.steps, n0=settings.n0, sigma=settings.sigma)
        picture.draw(drawn, title, out / "photos.png")
        report.write(results, out / "report.html", further=photos.further())
        clock.write()
    return photos


def _of_all_classes(data: Dataset) -> Dataset:
    """An encoder with a head of its own chooses among all classes, by their numbers; nothing is said to it."""
    samples = tuple(sample.model_copy(update={"choices": ()}) for sample in data.samples)
    return replace(data, samples=samples, prompts=Prompts())


def _defence(settings: Settings, subject: Subject) -> tuple[bool, Setup]:
    """Whether the encoder has a PSM of its own, and how everything is set up."""
    psm, own = settings.psm, True
    if psm == "auto" and isinstance(known_encoders().choose(subject.call, settings.sigma), StandIn):
        psm, own = settings.general, False
    return own, Setup(
        steps=settings.steps,
        adaptive_steps=settings.effort("adaptive_steps"),
        adaptive_draws=1,
        adaptive_images=settings.effort("adaptive_images"),
        aside_images=settings.effort("sigma_images"),
        aside_adaptive=settings.effort("adaptive_images") // 2,
        psm=psm,
        purifying=_precision(settings.purifying, subject.call.device),
        sigma=settings.sigma,
        n0=settings.n0,
        certified_images=settings.effort("certified_images"),
        aside_certified=settings.effort("sigma_certified_images"),
        certified_draws=settings.draws,
        seed=settings.seed,
    )


def _precision(asked: str, device: torch.device) -> str | None:
    """What purifiers work in, None for float32, their own."""
    if asked == "auto":
        found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch says nothing of it
        return PURIFYING if device.type != "cpu" or found.get("amx_bf16") else None
    return None if asked == "float32" else asked


def _fitting(settings: Settings, subject: Subject) -> Setup:
    """The same for the language model, which may consume another readout than the PSM was made for."""
    _, setup = _defence(settings, subject)
    try:
        fs_plugins.smoothers(subject.model, psm=setup.psm, sigma=setup.sigma)
    except PSMError:
        return replace(setup, psm=settings.general)
    return setup


def _spoken(
    settings: Settings,
    data: Dataset,
    attacked: Store,
    speaker: Loader | None,
    judge: Judge | None,
    track: Track,
) -> Results | None:
    """Ask the language model about the same pictures; None where there is none."""
    if speaker is None:
        return None
    data = data.some(settings.effort("spoken_images"), settings.seed)
    subject, folder = speaker("", data), settings.out / SPOKEN
    setup = _fitting(settings, subject)
    plan = Plan(spoken(settings), data, setup)
    kept = {**fixed("photo-vlm", {"none": ""}, data, setup), "made_by": "photos"}
    store = Store.begin(folder / ROWS, kept)
    store.borrow(attacked)
    compares = judge or ExactMatch()
    Evaluation(lambda tower: subject, plan, store, compares, track, settings.batch_size, TOGETHER).run()
    return Results(folder)
