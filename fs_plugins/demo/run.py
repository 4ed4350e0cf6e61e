"""The demo: ask the small LLaVA about held-out scenes, attack its vision tower, watch the plugin hold.

The same with the tower fine-tuned by FARE and by TeCoA; each tower is attacked itself. It is an evaluation of its own
suites on the embedded world, and a picture. Everything is computed while it runs; only the scenes are fixed.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import fs_plugins
from fs_plugins.certificates.plan import Plan as Certification
from fs_plugins.demo import assets, dataset, shipped
from fs_plugins.demo.result import Demo
from fs_plugins.demo.settings import Settings
from fs_plugins.demo.suites import attack, glimpse, suites
from fs_plugins.errors import SettingError
from fs_plugins.evaluation import picture
from fs_plugins.evaluation.datasets import SETTINGS as DATASET
from fs_plugins.evaluation.datasets import Dataset, Sample, open_dataset
from fs_plugins.evaluation.judges import ExactMatch
from fs_plugins.evaluation.means import Track
from fs_plugins.evaluation.picture import Panel, panels
from fs_plugins.evaluation.plan import Plan, Setup, fixed
from fs_plugins.evaluation.results import ROWS, Results
from fs_plugins.evaluation.run import Evaluation
from fs_plugins.evaluation.store import SETTINGS, Store
from fs_plugins.evaluation.subjects import Subject, size_of
from fs_plugins.evaluation.suites import Condition
from fs_plugins.evaluation.whole import Loader
from fs_plugins.files import locked, unused
from fs_plugins.kept import read
from fs_plugins.settings import build

BATCH = 44
MADE_BY = "the demo"


def run(
    settings: Settings,
    load: Loader,
    *,
    track: Track = lambda what, count: lambda done: None,
    first: Callable[[Path, Panel], None] = lambda path, panel: None,
) -> Demo:
    """Run the demo, and write summary.json, demo.png and all answers into ``settings.out``.

    Args:
        load: loads the model, as for ``fs_plugins.evaluation.evaluate``.
        track: makes a progress bar for each part that takes long.
        first: is told early of ``first.png`` and one of the pictures on it, before the rest is computed.

    Raises:
        SettingError: a setting out of range, or the folder holds something else or is in use.
    """
    settings = build(Settings, vars(settings))
    began, out, attacked = time.time(), settings.out, attack(settings.eps)
    unused(out, f"{ROWS}/{SETTINGS}", f"scenes-*/{DATASET}", what="demo")
    with locked(out, "this demo"):
        _clear(out / ROWS)
        data = open_dataset(dataset.write(out / f"scenes-{settings.count}", settings.count))
        own = load("", data)
        shown = [sample for sample in data.samples if sample.label is not None][:8:2]  # not chosen by outcome
        _glimpse(settings, own, data, shown[:2], attacked, first)
        plan = Plan(suites(attacked), data, _setup(settings), ("none", *shipped.ROBUST))
        kept = {**fixed("demo", {"none": "", **shipped.ROBUST}, data, plan.setup), "made_by": MADE_BY}
        evaluation = Evaluation(
            load=lambda tower: own if tower == "none" else load(shipped.ROBUST[tower], data),
            plan=plan,
            store=Store.begin(out / ROWS, kept),
            judge=ExactMatch(),
            track=track,
            batch_size=BATCH,
        )
        evaluation.run()
        results = Results(out)
        drawn = panels(results, data, own, shown, attacked)
        certified = _certified(settings, own, data, shown, track)
        drawn = [replace(panel, certificate=one) for panel, one in zip(drawn, certified, strict=True)]
        demo = Demo(settings, results, attacked, drawn, time.time() - began)
        demo.write(out)
        picture.draw(drawn, _title(settings, attacked, drawn), out / "demo.png")
    return demo


def _setup(settings: Settings) -> Setup:
    return Setup(
        steps=settings.steps,
        n0=settings.n0,
        seed=settings.seed,
        mapper_only=str(assets.PSM_NO_PURIFIER),
        robust_images=settings.robust_count,
    )


def _clear(rows: Path) -> None:
    """A demo computes everything anew; what an evaluation left in the folder is not thrown away."""
    if (rows / SETTINGS).exists():
        if read(rows / SETTINGS, "a demo").get("made_by") != MADE_BY:
            raise SettingError(f"{rows} holds an evaluation that is no demo's; give another folder.")
        shutil.rmtree(rows)


def _glimpse(
    settings: Settings,
    own: Subject,
    data: Dataset,
    shown: Sequence[Sample],
    attacked: Condition,
    first: Callable[[Path, Panel], None],
) -> None:
    """Attack a few pictures and ask about them before all others; nothing of it is used later."""
    few = replace(data, samples=tuple(shown))
    plan = Plan((glimpse(attacked),), few, _setup(settings))
    with TemporaryDirectory() as folder:
        store = Store.begin(Path(folder) / ROWS, fixed("demo", {}, few, plan.setup))
        Evaluation(lambda tower: own, plan, store, ExactMatch()).run()
        drawn = panels(Results(folder), few, own, shown, attacked)
    path = settings.out / "first.png"
    picture.draw(drawn, _title(settings, attacked, drawn), path)
    first(path, drawn[0])


def _title(settings: Settings, attacked: Condition, drawn: Sequence[Panel]) -> str:
    return picture.titled(attacked, steps=settings.steps, n0=settings.n0, sigma=drawn[0].sigma)


def _certified(
    settings: Settings, own: Subject, data: Dataset, shown: Sequence[Sample], track: Track
) -> list[fs_plugins.Certificate]:
    plan = Certification(n=settings.draws)
    places = [data.samples.index(sample) for sample in shown]
    return fs_plugins.certify(
        own.model,
        {str(i): data.image(sample, size_of(own.call)) for i, sample in zip(places, shown, strict=True)},
        n=plan.n,
        psm=assets.PSM_LLAVA,
        seed=settings.seed,
        advance=track("certifying the shown pictures", len(shown) * (plan.n + plan.pilot)),
    )
