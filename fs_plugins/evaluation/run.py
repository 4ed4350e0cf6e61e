"""Running suites: attack each encoder once, ask every defence about the same pictures, write all down."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from fs_plugins.evaluation.datasets import Dataset, Sample
from fs_plugins.evaluation.judges import Judge
from fs_plugins.evaluation.store import Store
from fs_plugins.evaluation.subjects import Subject
from fs_plugins.evaluation.suites import CLEAN, FS_PSM, LIGHT, NONE, TARGET, Condition, Defence, Suite
from fs_plugins.evaluation.tasks import TASKS
from fs_plugins.files import atomically
from fs_plugins.identity import digest
from fs_plugins.noise import keyed
from fs_plugins.psm import PSM
from fs_plugins.smoothing import DEFAULT_CHUNK_SIZE, FeatureSmoother
from fs_plugins.vision import VisionCall

Track = Callable[[str, int], Callable[[int], None]]
"""(what, how many pictures) -> a function that is told how many more are done."""

FEATURES = "features"
"""Beside the tasks: the row of a picture's feature."""


@dataclass(frozen=True)
class Settings:
    """What every row of an evaluation depends on, beside model, towers and data.

    Args:
        steps: of the attacks on bare encoders (the papers: 300).
        adaptive_steps, adaptive_draws: of those on defences, and draws that each step's gradient is averaged over (EOT).
        adaptive_images: how many pictures defences are attacked on; all if None.
        aside_images: how many pictures the supplement's tables get; all if None.
        psm, light: the PSM of the smoothed defences, and of their light form, as ``enable`` takes them.
        mapper_only: a PSM for the ablation's mapper without a purifier; the PSM's own mapper if None.
        sigma: noise in [0, 1] pixels; the PSM's own if None.
        n0: draws per picture.
        certified_images, certified_draws: how many pictures are certified, from how many draws each.
        masking_images, masking_queries: pictures of the search for masked gradients, and the queries that its
            gradient-free attack has for each.
        seed: of everything random.
    """

    steps: int = 300
    adaptive_steps: int = 100
    adaptive_draws: int = 2
    adaptive_images: int | None = None
    aside_images: int | None = None
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
        batch_size, chunk_size: pictures at once, and rows (draws times pictures) of a smoothed encoder at once; they bound memory
            and change no result.
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
    chunk_size: int = DEFAULT_CHUNK_SIZE
    share: tuple[int, int] = (0, 1)
    wait: Callable[[], None] = lambda: None
    notes: list[str] = field(default_factory=list)
    tasks: tuple[str, ...] = ()
    levels: dict[str, float] = field(default_factory=dict)
    purify: Callable[[Tensor], Tensor] | None = None

    def run(self) -> None:
        """Do what is still to be done. ``Results`` then has something to show, also where a judge failed."""
        for tower in self._needed_towers():
            try:
                subject = self.load(tower)
            except FSPluginsError as error:
                if tower == "none":
                    raise
                self.notes.append(f"The rows of the {tower} tower are left out: {error}")
                continue
            self.tasks = subject.tasks
            self._tower(tower, subject)
            del subject  # before the next one is loaded
        self.wait()
        if self.share[0] == 0:
            self._judge()

    def cells(self) -> dict[tuple[Defence, Condition], dict[str, int]]:
        """Every defence under every condition that a suite asks about: each task, and of how many pictures."""
        found: dict[tuple[Defence, Condition], dict[str, int]] = {}

        def ask(defence: Defence, condition: Condition, task: str, count: int) -> None:
            tasks = found.setdefault((defence, condition), {})
            tasks[task] = max(count, tasks.get(task, 0))

        for suite in self.suites:
            if suite.task is None or not self.can(suite.task):
                continue
            count = self.count(suite)
            for defence in suite.defences:
                ask(defence, CLEAN, FEATURES, count)  # what little a cosine means
                for condition in suite.asked:
                    ask(defence, condition, FEATURES, count)
                    ask(defence, condition, suite.task, count)
            if suite.task == "captioning":  # what captions are compared with
                for condition in (CLEAN, TARGET):
                    ask(NONE, condition, suite.task, count)
        return {cell: tasks for cell, tasks in found.items() if cell[0].tower in self.towers}

    def can(self, task: str) -> bool:
        return task in self.dataset.tasks and (not self.tasks or task in self.tasks)

    def count(self, suite: Suite) -> int:
        """How many pictures a suite is for; what an adaptive attack is compared with must be of the same ones."""
        count = len(self.dataset.samples)
        if suite.aside and self.settings.aside_images is not None:
            count = min(count, self.settings.aside_images)
        if any(condition.adaptive for condition in suite.conditions) and self.settings.adaptive_images is not None:
            count = min(count, self.settings.adaptive_images)
        return count

    def samples(self, count: int | None = None) -> tuple[Sample, ...]:
        """So many of the samples, of all labels alike, or all; more contain fewer."""
        every = self.dataset.samples
        return every if count is None or count >= len(every) else self.dataset.some(count, self.settings.seed).samples

    def key(self, defence: Defence, condition: Condition) -> str:
        """Where a cell's attacked pictures lie: by tower, as the paper shares them, unless they were made for the defence."""
        return f"{defence.name if condition.adaptive else defence.tower}/{condition.name}"

    def _needed_towers(self) -> list[str]:
        needed = {defence.tower for suite in self.suites for defence in suite.defences}
        for tower in sorted(needed - set(self.towers)):
            self.notes.append(f"There is no {tower} tower for this model, so its rows are left out.")
        return [tower for tower in self.towers if tower in needed or tower == "none"]

    def _tower(self, tower: str, subject: Subject) -> None:
        cells = {cell: tasks for cell, tasks in self.cells().items() if cell[0].tower == tower}
        others = [one for suite in self.suites for one in suite.defences if one.tower == tower and suite.task is None]
        ready = self._ready(subject, dict.fromkeys([*(defence for defence, _ in cells), *others]))
        wanted: dict[Condition, int] = {}
        for (defence, condition), tasks in cells.items():
            if defence in ready and condition not in (CLEAN, TARGET) and not condition.adaptive:
                wanted[condition] = max([wanted.get(condition, 0), *tasks.values()])
        for condition, count in wanted.items():
            what = f"{condition.name} on tower {tower}"
            self._attack(subject.call, f"{tower}/{condition.name}", condition, count, what)
        for defence, options in ready.items():
            asked = {condition: tasks for (other, condition), tasks in cells.items() if other == defence}
            with self._defended(subject, options) as encoder:
                for condition, tasks in asked.items():
                    if condition.adaptive:
                        what = f"{condition.name}, {defence.title}"
                        self._attack(encoder, self.key(defence, condition), condition, max(tasks.values()), what)
                self._ask(subject, encoder, defence, asked)
                if defence == FS_PSM and isinstance(encoder, FeatureSmoother):
                    self.purify = partial(_purified, encoder, self.settings.seed)
                    self._search(encoder)
            self._certify(subject, defence)

    def _ready(self, subject: Subject, defences: Iterable[Defence]) -> dict[Defence, dict[str, Any] | None]:
        """Those defences that can be had, and how; asked before anything that takes long.

        A PSM that is there by default and does not fit leaves its rows out; one that somebody asked for, by name or by its noise
        level, is an error.
        """
        ready: dict[Defence, dict[str, Any] | None] = {}
        for defence in defences:
            if defence.smoothing is None:
                ready[defence] = None
                continue
            try:
                options = self.options(subject, defence)
                with fs_plugins.enable(subject.model, **options) as handle:
                    psm, sigma = handle.smoothers[0].psm, handle.smoothers[0].sigma
            except (PSMError, RegistryError) as error:
                asked_for = self.settings.psm != "auto" or self.settings.sigma is not None
                if asked_for and defence.smoothing.psm is None and defence.tower == "none":
                    raise
                self.notes.append(f"{defence.title} is left out: {error}")
                continue
            made_of = [psm.config.name, digest(psm), psm.config.structure] if psm else None
            self.store.hold(defence.name, {"psm": made_of, "sigma": sigma, "n0": options["n0"]})
            ready[defence] = options
        return ready

    def _mine(self, samples: Sequence[Sample]) -> list[Sample]:
        rank, size = self.share
        return [sample for i, sample in enumerate(samples) if i % size == rank]

    def _batches(self, samples: Sequence[Sample]) -> Iterator[list[Sample]]:
        for first in range(0, len(samples), self.batch_size):
            yield list(samples[first : first + self.batch_size])

    @contextmanager
    def _defended(self, subject: Subject, options: dict[str, Any] | None) -> Iterator[VisionCall | FeatureSmoother]:
        if options is None:
            yield subject.call
            return
        with fs_plugins.enable(subject.model, **options) as handle:
            yield handle.smoothers[0]

    def options(self, subject: Subject, defence: Defence, sigma: float | None = None) -> dict[str, Any]:
        """How ``enable`` is told to defend. An image's draws follow from its content, so that a resumed run serves the same."""
        smoothing, settings = defence.smoothing, self.settings
        assert smoothing is not None
        sigma = settings.sigma if sigma is None else sigma
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
            "chunk_size": self.chunk_size,
        }

    def _attack(
        self, encoder: VisionCall | FeatureSmoother, key: str, condition: Condition, count: int, what: str
    ) -> None:
        """Make the attacked pictures that are missing."""
        settings, size = self.settings, _call(encoder).image_size
        assert size is not None
        steps, draws = settings.steps, 1
        if condition.adaptive:
            steps, draws = settings.adaptive_steps, settings.adaptive_draws
        missing = [s for s in self._mine(self.samples(count)) if self.store.attacked(key, s.image) is None]
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
        asked: dict[Condition, dict[str, int]],
    ) -> None:
        for condition, tasks in asked.items():
            key = f"{defence.name}/{condition.name}"
            done = self.store.rows(key)
            open_tasks: dict[str, list[str]] = {}
            for task, count in tasks.items():
                for sample in self.samples(count):
                    applies = task == FEATURES or TASKS[task].applies(sample)
                    if applies and (sample.image, task) not in done:
                        open_tasks.setdefault(sample.image, []).append(task)
            left = [sample for sample in self._mine(self.dataset.samples) if sample.image in open_tasks]
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
        open_tasks: dict[str, list[str]],
    ) -> list[dict[str, Any]]:
        size, device = _call(encoder).image_size, _device(encoder)
        assert size is not None

        def shown(sample: Sample) -> Tensor:
            if condition in (CLEAN, TARGET):
                return (self.dataset.image if condition == CLEAN else self.dataset.target)(sample, size)
            found = self.store.attacked(self.key(defence, condition), sample.image)
            if found is None:
                raise SettingError(
                    f"The attacked picture of {sample.image} is missing in {self.store.folder}. Run the same command again."
                )
            return found

        images = torch.stack([shown(sample) for sample in some]).to(device)
        rows: list[dict[str, Any]] = []
        for name, task in TASKS.items():
            places = [i for i, sample in enumerate(some) if name in open_tasks[sample.image]]
            if not places:
                continue
            began = time.perf_counter()
            replies = subject.reply(task, images[places], [some[i] for i in places], self.dataset)
            seconds = (time.perf_counter() - began) / len(places)
            rows += [
                {"image": some[i].image, "task": name, "reply": reply, "seconds": round(seconds, 5)}
                for i, reply in zip(places, replies, strict=True)
            ]
        places = [i for i, sample in enumerate(some) if FEATURES in open_tasks[sample.image]]
        if places:
            # Beside an attacked picture the clean one; beside a clean one the attack's target, a picture of something else.
            other = self.dataset.target if condition == CLEAN else self.dataset.image
            beside = torch.stack([other(some[i], size) for i in places]).to(device)
            near, pooled = _cosines(encoder, images[places], beside)
            rows += [
                {"image": some[i].image, "task": FEATURES, "cosine": a, "pooled": b}
                for i, a, b in zip(places, near, pooled, strict=True)
            ]
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
        mine = {
            sample.image: self.dataset.image(sample, size)
            for sample in self._mine(self.samples(self.settings.certified_images))
        }
        done: set[float] = set()
        for sigma in sorted(sigmas, key=lambda one: one or 0):  # None is the PSM's own
            try:
                options = self.options(subject, defence, sigma)
                level = options["sigma"]
                if level is None:
                    with fs_plugins.enable(subject.model, **options) as handle:
                        level = handle.smoothers[0].sigma
                if sigma is None or sigma == self.settings.sigma:
                    self.levels[defence.name] = level
                if level in done:
                    continue
                done.add(level)
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
                    chunk_size=self.chunk_size,
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
        eps = next((suite.conditions[0].eps for suite in self.suites if suite.masking), None)
        if self.share[0] or eps is None or masking_file(self.store, eps).exists():
            return
        settings, size, device = self.settings, smoother.call.image_size, _device(smoother)
        assert size is not None
        samples = self.samples(settings.masking_images)
        images, targets = (
            torch.stack([one(sample, size) for sample in samples]).to(device)
            for one in (self.dataset.image, self.dataset.target)
        )
        steps, queries = settings.adaptive_steps, settings.masking_queries
        report = check_gradients(
            smoother,
            images,
            targets,
            eps=eps,
            draws=settings.adaptive_draws,
            seed=settings.seed,
            batch_size=self.batch_size,
            advance=self.track("masked gradients?", effort(len(images), steps=steps, queries=queries)),
            steps=steps,
            queries=queries,
        )
        atomically(masking_file(self.store, eps), lambda file: file.write(json.dumps(asdict(report)).encode()))

    def _judge(self) -> None:
        """Score the captions that have not been, against the clean picture's and the target's."""
        wanted = dict.fromkeys(
            (said, reference)
            for (defence, condition), tasks in self.cells().items()
            if "captioning" in tasks and condition != TARGET
            for _, said, own, aim in self.captions(defence, condition, tasks["captioning"])
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

    def captions(
        self, defence: Defence, condition: Condition, count: int | None = None
    ) -> Iterator[tuple[Sample, str, str, str]]:
        """Sample, what was said of it, what should be, and what the undefended model says of the attack's target.

        What should be said is the dataset's caption where it has one, else what the undefended model says of the clean picture.
        """
        said = self.store.rows(f"{defence.name}/{condition.name}")
        clean, targets = (self.store.rows(f"{NONE.name}/{one.name}") for one in (CLEAN, TARGET))
        for sample in self.samples(count):
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


def masking_file(store: Store, eps: float) -> Path:
    """Where the search for masked gradients at this l-inf eps is kept."""
    return store.folder / f"masking-{255 * eps:g}.json"


def fixed(model: str, towers: dict[str, str], dataset: Dataset, settings: Settings) -> dict[str, Any]:
    """What ``Store`` holds a run to, the same wherever the package lies."""
    told = asdict(settings)
    if settings.mapper_only is not None:
        told["mapper_only"] = Path(settings.mapper_only).name
    return {"version": fs_plugins.__version__, "model": model, "towers": towers, "data": dataset.digest, **told}
