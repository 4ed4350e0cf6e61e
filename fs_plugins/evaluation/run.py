"""Running suites: attack each encoder once, ask every defence about the same pictures, write all down."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fs_plugins
from fs_plugins.attacks import attack
from fs_plugins.attacks.masking import check_gradients, effort
from fs_plugins.attacks.victim import Stream, Victim
from fs_plugins.errors import FSPluginsError, PSMError, RegistryError, SettingError
from fs_plugins.evaluation.data import Dataset, Sample
from fs_plugins.evaluation.judges import Judge
from fs_plugins.evaluation.store import Store
from fs_plugins.evaluation.subjects import Subject
from fs_plugins.evaluation.suites import CLEAN, FS_PSM, LIGHT, NONE, TARGET, Condition, Defence, Suite
from fs_plugins.evaluation.tasks import TASKS
from fs_plugins.files import atomically
from fs_plugins.noise import keyed
from fs_plugins.psm import PSM
from fs_plugins.smoothing import FeatureSmoother
from fs_plugins.vision import VisionCall

Track = Callable[[str, int], Callable[[int], None]]
"""(what, how many pictures) -> a function that is told how many more are done."""

FEATURES = "features"
"""Beside the tasks: the row of a picture's feature."""
MASKING = "masking.json"


@dataclass(frozen=True)
class Settings:
    """What every row of an evaluation depends on, beside model, towers and data.

    Args:
        steps: of the attacks on bare encoders (the papers: 300).
        adaptive_steps, adaptive_draws: of those on defences, and draws that each step's gradient is averaged over (EOT).
        adaptive_images: how many pictures, the first ones, defences are attacked on; all if None.
        psm, light: the PSM of the smoothed defences, and of their light form, as ``enable`` takes them.
        mapper_only: a PSM for the ablation's mapper without a purifier; the PSM's own mapper if None.
        sigma: noise in [0, 1] pixels; the PSM's own if None.
        n0: draws per picture.
        certified_images, certified_draws: how many pictures, the first ones, are certified, from how many draws each.
        masking_images, masking_queries: pictures, the first ones, of the search for masked gradients, and the queries that its
            gradient-free attack has for each.
        seed: of everything random.
    """

    steps: int = 300
    adaptive_steps: int = 100
    adaptive_draws: int = 2
    adaptive_images: int | None = None
    psm: str = "auto"
    light: str = "photo"
    mapper_only: str | None = None
    sigma: float | None = None
    n0: int = 4
    certified_images: int = 100
    certified_draws: int = 1000
    masking_images: int = 32
    masking_queries: int = 500
    seed: int = 0


@dataclass
class Evaluation:
    """One run of suites on one model and its robust towers.

    Args:
        load: a tower's name (``"none"`` is the model's own) -> the model with it; called once for each.
        towers: the names there are.
        dataset: what is asked.
        suites: which tables.
        settings: see there.
        store: where everything is kept, and taken from.
        judge: compares captions.
        track: makes progress bars.
        batch_size: pictures at once; changes no result.
        share: this process's number and how many there are; they divide the pictures among them.
        wait: until all processes are here.
        notes: what was left out, and why.
        tasks: what the model can be asked.
        levels: sigma of the defences that were certified at their own, by their names.
        purify: pictures (B, 3, H, W) in [0, 1] -> one noisy view of each as the default defence shows it to the encoder.
    """

    load: Callable[[str], Subject]
    towers: Sequence[str]
    dataset: Dataset
    suites: Sequence[Suite]
    settings: Settings
    store: Store
    judge: Judge
    track: Track
    batch_size: int = 32
    share: tuple[int, int] = (0, 1)
    wait: Callable[[], None] = lambda: None
    notes: list[str] = field(default_factory=list)
    tasks: tuple[str, ...] = ()
    levels: dict[str, float] = field(default_factory=dict)
    purify: Callable[[Tensor], Tensor] | None = None

    def run(self) -> None:
        """Do what is still to be done. ``results`` then has something to show."""
        for tower in self._needed_towers():
            subject = self.load(tower)
            self.tasks = subject.tasks
            self._tower(tower, subject)
            del subject  # before the next one is loaded
        self.wait()
        if self.share[0] == 0:
            self._judge()

    def cells(self) -> dict[tuple[Defence, Condition], tuple[str, ...]]:
        """Every defence under every condition that a suite asks about, and the tasks."""
        found: dict[tuple[Defence, Condition], dict[str, None]] = {}
        for suite in self.suites:
            if suite.task is None or not self.can(suite.task):
                continue
            for defence in suite.defences:
                for condition in suite.asked:
                    found.setdefault((defence, condition), {})[suite.task] = None
            if suite.task == "captioning":  # what captions are compared with
                for condition in (CLEAN, TARGET):
                    found.setdefault((NONE, condition), {})[suite.task] = None
        return {cell: tuple(tasks) for cell, tasks in found.items() if cell[0].tower in self.towers}

    def can(self, task: str) -> bool:
        return task in self.dataset.tasks and (not self.tasks or task in self.tasks)

    def samples(self, condition: Condition) -> tuple[Sample, ...]:
        """The samples that this condition is for."""
        count = self.settings.adaptive_images if condition.adaptive else None
        return self.dataset.samples[:count]

    def _needed_towers(self) -> list[str]:
        needed = {defence.tower for suite in self.suites for defence in suite.defences}
        for tower in sorted(needed - set(self.towers)):
            self.notes.append(f"There is no {tower} tower for this model, so its rows are left out.")
        return [tower for tower in self.towers if tower in needed or tower == "none"]

    def _tower(self, tower: str, subject: Subject) -> None:
        settings = self.settings
        cells = {key: tasks for key, tasks in self.cells().items() if key[0].tower == tower}
        for condition in dict.fromkeys(condition for _, condition in cells):
            if condition.name not in ("clean", "target") and not condition.adaptive:
                self._attack(subject.call, f"{tower}/{condition.name}", condition, f"{condition.name} on tower {tower}")
        others = [one for suite in self.suites for one in suite.defences if one.tower == tower and suite.task is None]
        for defence in dict.fromkeys([*(defence for defence, _ in cells), *others]):
            asked = {condition: tasks for (other, condition), tasks in cells.items() if other == defence}
            try:
                with self._defended(subject, defence) as encoder:
                    for condition in asked:
                        if condition.adaptive:
                            self._attack(
                                encoder, self._key(defence, condition), condition, f"{condition.name}, {defence.title}"
                            )
                    self._ask(subject, encoder, defence, asked)
                    if defence == FS_PSM and isinstance(encoder, FeatureSmoother):
                        self.purify = partial(_purified, encoder, settings.seed)
                        self._search(encoder)
            except (PSMError, RegistryError) as error:
                if defence.smoothing is None:
                    raise
                self.notes.append(f"{defence.title} is left out: {error}")
                continue
            self._certify(subject, defence)

    def _key(self, defence: Defence, condition: Condition) -> str:
        """Where a cell's attacked pictures lie: by tower, as the paper shares them, unless they were made for the defence."""
        return f"{defence.name if condition.adaptive else defence.tower}/{condition.name}"

    def _mine(self, samples: Sequence[Sample]) -> list[Sample]:
        rank, size = self.share
        return [sample for i, sample in enumerate(samples) if i % size == rank]

    def _batches(self, samples: Sequence[Sample]) -> Iterator[list[Sample]]:
        for first in range(0, len(samples), self.batch_size):
            yield list(samples[first : first + self.batch_size])

    @contextmanager
    def _defended(self, subject: Subject, defence: Defence) -> Iterator[VisionCall | FeatureSmoother]:
        if defence.smoothing is None:
            yield subject.call
            return
        with fs_plugins.enable(subject.model, **self.options(subject, defence)) as handle:
            yield handle.smoothers[0]

    def options(self, subject: Subject, defence: Defence, sigma: float | None = None) -> dict[str, Any]:
        """How ``enable`` is told to defend. An image's draws follow from its content, so that a resumed run serves the same."""
        smoothing, settings = defence.smoothing, self.settings
        assert smoothing is not None
        sigma = sigma or settings.sigma
        psm: str | PSM | None = settings.light if smoothing.psm == LIGHT else smoothing.psm or settings.psm
        if smoothing.parts == "mapper" and settings.mapper_only is not None:
            psm = settings.mapper_only
        elif smoothing.parts == "none" and sigma is not None:
            psm = None
        elif smoothing.parts != "both":
            with fs_plugins.enable(subject.model, psm=psm, sigma=sigma) as handle:
                whole = handle.smoothers[0].psm
            assert whole is not None
            if smoothing.parts == "none":
                psm, sigma = None, whole.config.sigma
            else:
                psm = whole.only(mapper=False) if smoothing.parts == "purifier" else whole.only(purifier=False)
        return {
            "psm": psm,
            "sigma": sigma,
            "n0": smoothing.n0 or settings.n0,
            "seed": settings.seed,
            "noise_scope": "image",
        }

    def _attack(self, encoder: VisionCall | FeatureSmoother, key: str, condition: Condition, what: str) -> None:
        """Make the attacked pictures that are missing."""
        settings, size = self.settings, _call(encoder).image_size
        assert size is not None
        steps, draws = settings.steps, 1
        if condition.adaptive:
            steps, draws = settings.adaptive_steps, settings.adaptive_draws
        samples = self._mine(self.samples(condition))
        missing = [sample for sample in samples if self.store.attacked(key, sample.image) is None]
        if not missing:
            return
        advance = self.track(what, steps * len(missing))
        for some in self._batches(missing):
            images, targets = (
                torch.stack([read(s, size) for s in some]) for read in (self.dataset.image, self.dataset.target)
            )
            device = _device(encoder)
            attacked = attack(
                condition.method,
                encoder,
                images.to(device),
                targets.to(device),
                eps=condition.eps,
                steps=steps,
                draws=draws,
                seed=settings.seed,
                names=[sample.image for sample in some],
                batch_size=self.batch_size,
                report=advance,
            )
            for sample, image in zip(some, attacked, strict=True):
                self.store.keep(key, sample.image, image)

    def _ask(
        self,
        subject: Subject,
        encoder: VisionCall | FeatureSmoother,
        defence: Defence,
        asked: dict[Condition, tuple[str, ...]],
    ) -> None:
        for condition, tasks in asked.items():
            key = f"{defence.name}/{condition.name}"
            done = self.store.rows(key)
            samples = self._mine(self.samples(condition))

            def open_tasks(sample: Sample, tasks: tuple[str, ...] = tasks, done: Any = done) -> list[str]:
                wanted = [*(name for name in tasks if TASKS[name].applies(sample)), FEATURES]
                return [name for name in wanted if (sample.image, name) not in done]

            left = [sample for sample in samples if open_tasks(sample)]
            if not left:
                continue
            advance = self.track(f"{condition.name} pictures, {defence.title}", len(left))
            for some in self._batches(left):
                self.store.add(key, self._rows(subject, encoder, defence, condition, some, open_tasks))
                advance(len(some))

    def _rows(
        self,
        subject: Subject,
        encoder: VisionCall | FeatureSmoother,
        defence: Defence,
        condition: Condition,
        some: list[Sample],
        open_tasks: Callable[[Sample], list[str]],
    ) -> list[dict[str, Any]]:
        size, device = _call(encoder).image_size, _device(encoder)
        assert size is not None

        def shown(sample: Sample) -> Tensor:
            if condition in (CLEAN, TARGET):
                return (self.dataset.image if condition == CLEAN else self.dataset.target)(sample, size)
            found = self.store.attacked(self._key(defence, condition), sample.image)
            if found is None:
                raise SettingError(
                    f"The attacked picture of {sample.image} is missing in {self.store.folder}. Run the same command again."
                )
            return found

        images = torch.stack([shown(sample) for sample in some]).to(device)
        rows: list[dict[str, Any]] = []
        for name, task in TASKS.items():
            places = [i for i, sample in enumerate(some) if name in open_tasks(sample)]
            if not places:
                continue
            began = time.perf_counter()
            replies = subject.reply(task, images[places], [some[i] for i in places], self.dataset)
            seconds = (time.perf_counter() - began) / len(places)
            rows += [
                {"image": some[i].image, "task": name, "reply": reply, "seconds": round(seconds, 5)}
                for i, reply in zip(places, replies, strict=True)
            ]
        places = [i for i, sample in enumerate(some) if FEATURES in open_tasks(sample)]
        if places and condition != TARGET:
            # Beside an attacked picture the clean one; beside a clean one the attack's target, a picture of something else.
            other = self.dataset.target if condition == CLEAN else self.dataset.image
            beside = torch.stack([other(some[i], size) for i in places]).to(device)
            near, pooled = _cosines(encoder, images[places], beside)
            rows += [
                {"image": some[i].image, "task": FEATURES, "cosine": a, "pooled": b}
                for i, a, b in zip(places, near, pooled, strict=True)
            ]
        elif places:
            rows += [{"image": some[i].image, "task": FEATURES} for i in places]
        return rows

    def _to_certify(self, tower: str) -> list[Defence]:
        return [
            defence
            for suite in self.suites
            if suite.certified
            for defence in suite.defences
            if defence.tower == tower and defence.smoothing is not None
        ]

    def _certify(self, subject: Subject, defence: Defence) -> None:
        if defence not in self._to_certify(defence.tower):
            return
        sigmas = {
            sigma
            for suite in self.suites
            if suite.certified and defence in suite.defences
            for sigma in suite.sigmas or (self.settings.sigma,)
        }
        size = subject.call.image_size
        assert size is not None
        samples = self.dataset.samples[: self.settings.certified_images]
        mine = {sample.image: self.dataset.image(sample, size) for sample in self._mine(samples)}
        for sigma in sorted(sigmas, key=lambda one: one or 0):  # None is the PSM's own
            try:
                options = self.options(subject, defence, sigma)
                level = options["sigma"]
                if level is None:
                    with fs_plugins.enable(subject.model, **options) as handle:
                        level = handle.smoothers[0].sigma
                if sigma is None or sigma == self.settings.sigma:
                    self.levels[defence.name] = level
                rows = (
                    self.store.folder
                    / "certificates"
                    / f"{defence.name}-sigma{level:g}.{self.share[0]}-of-{self.share[1]}.jsonl"
                )
                rows.parent.mkdir(exist_ok=True)
                fs_plugins.certify(
                    subject.model,
                    mine,
                    n=self.settings.certified_draws,
                    psm=options["psm"],
                    sigma=level,
                    seed=self.settings.seed,
                    out=rows,
                    chunk_size=4 * self.batch_size,
                    advance=self.track(
                        f"certifying, {defence.title}, sigma {level:g}", len(mine) * self.settings.certified_draws
                    ),
                )
            except FSPluginsError as error:
                if not isinstance(error, PSMError | RegistryError):
                    raise
                self.notes.append(f"{defence.title} is not certified at sigma {sigma}: {error}")

    def _search(self, smoother: FeatureSmoother) -> None:
        """Compare attacks that must be ordered if the defence's gradients are honest; kept as a file."""
        path = self.store.folder / MASKING
        if self.share[0] or path.exists() or not any(suite.masking for suite in self.suites):
            return
        settings, size, device = self.settings, smoother.call.image_size, _device(smoother)
        assert size is not None
        samples = self.dataset.samples[: settings.masking_images]
        images, targets = (
            torch.stack([one(sample, size) for sample in samples]).to(device)
            for one in (self.dataset.image, self.dataset.target)
        )
        steps, queries = settings.adaptive_steps, settings.masking_queries
        report = check_gradients(
            smoother,
            images,
            targets,
            draws=settings.adaptive_draws,
            seed=settings.seed,
            batch_size=self.batch_size,
            advance=self.track("masked gradients?", effort(len(images), steps=steps, queries=queries)),
            steps=steps,
            queries=queries,
        )
        atomically(path, lambda file: file.write(json.dumps(asdict(report)).encode()))

    def _judge(self) -> None:
        """Score the captions that have not been, against the clean picture's and the target's."""
        wanted = dict.fromkeys(
            (said, reference)
            for (defence, condition), tasks in self.cells().items()
            if "captioning" in tasks and condition != TARGET
            for _, said, own, aim in self.captions(defence, condition)
            for reference in (own, aim)
        )
        known = self.store.scores(self.judge.name)
        left = [pair for pair in wanted if pair not in known]
        if not left:
            return
        advance = self.track(f"judging captions, {self.judge.name}", len(left))
        for (said, reference), score in zip(left, self.judge.scores(left), strict=True):
            self.store.score(self.judge.name, said, reference, score)
            advance(1)

    def captions(self, defence: Defence, condition: Condition) -> Iterator[tuple[Sample, str, str, str]]:
        """Sample, what was said of it, what should be, and what the undefended model says of the attack's target.

        What should be said is the dataset's caption where it has one, else what the undefended model says of the clean picture.
        """
        said = self.store.rows(f"{defence.name}/{condition.name}")
        clean, targets = (self.store.rows(f"{NONE.name}/{one.name}") for one in (CLEAN, TARGET))
        for sample in self.samples(condition):
            rows = [found.get((sample.image, "captioning")) for found in (said, clean, targets)]
            if all(rows):
                reply, own, aim = (row["reply"] for row in rows if row is not None)
                yield sample, reply, sample.caption or own, aim


@torch.no_grad()
def _cosines(encoder: VisionCall | FeatureSmoother, images: Tensor, others: Tensor) -> tuple[list[float], list[float]]:
    """Cosines between what is served for pairs of pictures: of all that is consumed, and of pooled features."""
    victim = Victim(encoder)
    source = encoder.source if isinstance(encoder, FeatureSmoother) else Stream((), ())
    one, other = victim.see(images, source), victim.see(others, source)
    return (
        torch.cosine_similarity(one.embedding, other.embedding, dim=-1).tolist(),
        torch.cosine_similarity(one.pooled, other.pooled, dim=-1).tolist(),
    )


@torch.no_grad()
def _purified(smoother: FeatureSmoother, seed: int, images: Tensor) -> Tensor:
    device = _device(smoother)
    noise = torch.randn(images.shape, generator=keyed(seed, "shown"))
    return smoother.views(images.to(device), noise.to(device)).clamp(0, 1).cpu()


def _call(encoder: VisionCall | FeatureSmoother) -> VisionCall:
    return encoder.call if isinstance(encoder, FeatureSmoother) else encoder


def _device(encoder: VisionCall | FeatureSmoother) -> torch.device:
    return next(_call(encoder).module.parameters()).device


def fixed(model: str, towers: dict[str, str], dataset: Dataset, settings: Settings) -> dict[str, Any]:
    """What ``Store`` holds a run to, the same wherever the package lies."""
    told = asdict(settings)
    if settings.mapper_only is not None:
        told["mapper_only"] = Path(settings.mapper_only).name
    return {"model": model, "towers": towers, "data": dataset.digest, **told}
