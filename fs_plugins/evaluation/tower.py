"""One tower's part of an evaluation: attack it, ask every defence on it, certify, search for masked gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

import fs_plugins
from fs_plugins.answers import Answers
from fs_plugins.attacks import APGD, Answer, Squares, attack
from fs_plugins.attacks.feature import NoTokensError
from fs_plugins.attacks.folded import folded
from fs_plugins.attacks.masking import check_gradients, effort
from fs_plugins.errors import ModelError, PSMError, RegistryError
from fs_plugins.evaluation.answered import certify_asked, speaking
from fs_plugins.evaluation.asking import Asking
from fs_plugins.evaluation.autoattack import Scorer
from fs_plugins.evaluation.datasets import Sample
from fs_plugins.evaluation.defended import Encoder, Options, asked_for, defended, options
from fs_plugins.evaluation.means import Means
from fs_plugins.evaluation.plan import Asked, Plan, answers_key, attacked_key
from fs_plugins.evaluation.served import Elsewhere, ServedModel
from fs_plugins.evaluation.subjects import Answering, Subject, size_of
from fs_plugins.evaluation.suites import ANSWERS, AUTOATTACK, CLEAN, FS_PSM, TARGET, Condition, Defence, Smoothing
from fs_plugins.evaluation.tables import title_of
from fs_plugins.evaluation.tasks import TASKS, Choice, Classification
from fs_plugins.identity import digest
from fs_plugins.kept import write
from fs_plugins.smoothing import FeatureSmoother
from fs_plugins.vision import VisionCall

CLASSES = Classification.name


@dataclass
class Found:
    """What a run finds out that no row says.

    Args:
        notes: what was left out, and why.
        levels: sigma of the defences that were certified at their own, by their names.
        shown: the pipeline of the default defence, whose views the report shows.
    """

    notes: list[str] = field(default_factory=list)
    levels: dict[str, float] = field(default_factory=dict)
    shown: FeatureSmoother | None = None


class Tower:
    """The rows of one tower.

    Args:
        name: the tower's; ``"none"`` is the model's own encoder.
        subject: the model with it.
        plan, means: of the evaluation.
        found: is added to.
        served: who answers for the defence ``SERVED``.
    """

    def __init__(
        self,
        name: str,
        subject: Subject,
        plan: Plan,
        means: Means,
        found: Found,
        served: ServedModel | None = None,
    ) -> None:
        self.name, self.subject, self.plan, self.means, self.found = name, subject, plan, means, found
        self.served = served
        self.size = size_of(subject.call)
        self.store = means.store
        self.device = subject.call.device
        subject.call.check_eval()

    def run(self) -> None:
        """Do what is still to be done."""
        cells = {cell: asked for cell, asked in self.plan.cells.items() if cell[0].tower == self.name}
        if any(condition.method == AUTOATTACK for _, condition in cells):
            Scorer(self.subject, self.plan.dataset)  # says what it cannot do before anything that takes long
        if any(self.plan.answered(suite) for suite in self.plan.suites):
            speaking(self.subject)
        ready = self._ready(list(cells))
        for condition, wanted in _oblivious(cells, ready).items():
            samples = tuple(sample for sample in self.plan.dataset.samples if sample.image in wanted)
            what = f"{condition.name} on tower {self.name}"
            try:
                self._attack(self.subject.call, f"{self.name}/{condition.name}", condition, samples, what)
            except NoTokensError as error:
                self.found.notes.append(f"The rows of {title_of(condition)} are left out: {error}")
                cells = {cell: asked for cell, asked in cells.items() if cell[1].method != condition.method}
        for defence, chosen in ready.items():
            asked = {condition: tasks for (other, condition), tasks in cells.items() if other == defence}
            with defended(self.subject, chosen) as encoder:
                asking = Asking(self._speaker(defence), encoder, defence, self.plan, self.means)
                for condition, tasks in asked.items():
                    left = self._left(defence, condition, tasks)
                    if condition.adaptive:
                        what = f"{condition.name}, {defence.title}"
                        samples = max(left.values(), key=len)
                        through = self._through(defence, condition, encoder)
                        self._attack(through, attacked_key(defence, condition), condition, samples, what)
                    asking.run({condition: left})
                if defence == FS_PSM and isinstance(encoder, FeatureSmoother):
                    self.found.shown = encoder
                    self._search(encoder)
            self._certify(defence)
            self._certify_answers(defence, chosen)

    def _speaker(self, defence: Defence) -> Subject:
        """Who answers."""
        if not defence.served:
            return self.subject
        assert self.served is not None
        self.store.hold(defence.name, {"model": self.served.model, "endpoint": self.served.where})
        return Elsewhere(self.subject, self.served)

    def _left(self, defence: Defence, condition: Condition, tasks: Asked) -> Asked:
        """What a condition is asked about: where only the worst case counts, the pictures that are right so far."""
        before = self.plan.before(defence, condition)
        if before is None:
            return tasks
        data, told = self.plan.dataset, [self.store.rows(answers_key(defence, earlier)) for earlier in before]
        asked = [task for task in tasks if task in TASKS]
        spared = {one.image for one in data.samples if not any(TASKS[task].applies(one) for task in asked)}
        wrong = {
            image
            for rows in told
            for (image, task), row in rows.items()
            if task in asked and not cast(Choice, TASKS[task]).verdict(row["reply"], self._sample[image], data).correct
        }
        done = wrong | spared
        return {task: tuple(one for one in samples if one.image not in done) for task, samples in tasks.items()}

    @cached_property
    def _sample(self) -> dict[str, Sample]:
        return {sample.image: sample for sample in self.plan.dataset.samples}

    def _through(self, defence: Defence, condition: Condition, encoder: Encoder) -> Encoder:
        """What an attack is made through: the defence, or another PSM in its place."""
        if condition.through is None or not isinstance(encoder, FeatureSmoother):
            return encoder
        smoothing = Smoothing(psm=condition.through, n0=encoder.n0, sigma=encoder.sigma)
        chosen = options(self.subject, self.plan.setup, smoothing, chunk_size=self.means.chunk_size)
        return fs_plugins.smoothers(self.subject.model, **chosen)[0]

    def _ready(self, cells: Sequence[tuple[Defence, Condition]]) -> dict[Defence, Options | None]:
        """Those defences that can be had, and how; asked before anything that takes long.

        A PSM that is there by default and does not fit leaves its rows out; one that somebody asked for, by name or by
        its noise level, is an error.
        """
        unasked = [
            defence
            for suite in self.plan.suites
            if suite.task is None or suite.answers
            for defence in suite.defences
            if defence.tower == self.name
        ]
        ready: dict[Defence, Options | None] = {}
        for defence in dict.fromkeys([*(defence for defence, _ in cells), *unasked]):
            if defence.smoothing is None:
                ready[defence] = None
                continue
            try:
                chosen = self._options(defence)
                smoother = fs_plugins.smoothers(self.subject.model, **chosen)[0]
            except (PSMError, RegistryError) as error:
                if asked_for(self.plan.setup, defence):
                    raise
                self.found.notes.append(f"{defence.title} is left out: {error}")
                continue
            psm = smoother.psm
            made_of = [psm.config.name, digest(psm), psm.config.structure] if psm else None
            votes = {"votes": defence.smoothing.votes} if defence.smoothing.votes > 1 else {}
            self.store.hold(defence.name, {"psm": made_of, "sigma": smoother.sigma, "n0": chosen["n0"], **votes})
            ready[defence] = chosen
        return ready

    def _options(self, defence: Defence, sigma: float | None = None) -> Options:
        assert defence.smoothing is not None
        return options(
            self.subject,
            self.plan.setup,
            defence.smoothing,
            sigma=sigma,
            chunk_size=self.means.chunk_size,
        )

    def _attack(self, encoder: Encoder, key: str, condition: Condition, samples: Sequence[Sample], what: str) -> None:
        """Make the attacked pictures that are missing."""
        setup = self.plan.setup
        steps, draws = setup.steps, 1
        if condition.adaptive:
            steps, draws = setup.adaptive_steps, condition.draws or setup.adaptive_draws
        if condition.method == "answer-square":
            steps, draws = setup.masking_queries, 1
        missing = [s for s in self.means.mine(samples) if not self.store.has(key, s.image)]
        if not missing:
            return
        if condition.method == AUTOATTACK:
            self._auto_attack(encoder, key, condition, missing, what)
            return
        advance = self.means.track(what, steps * condition.restarts * len(missing))
        if isinstance(encoder, VisionCall):
            encoder = folded(encoder, self._pairs(missing[:1])[0])
        for some in self.means.batches(missing):
            images, targets = self._pairs(some)
            attacked = attack(
                encoder,
                images,
                None if condition.method in ANSWERS and condition.method != "answer-target" else targets,
                method=self._method(condition, some),
                norm=condition.norm,
                eps=condition.eps,
                steps=steps,
                draws=draws,
                restarts=condition.restarts,
                seed=setup.seed,
                names=[sample.image for sample in some],
                batch_size=self.means.batch_size,
                report=advance,
            )
            for sample, image in zip(some, attacked, strict=True):
                self.store.keep(key, sample.image, image)

    def _auto_attack(
        self, encoder: Encoder, key: str, condition: Condition, samples: Sequence[Sample], what: str
    ) -> None:
        scorer, advance = Scorer(self.subject, self.plan.dataset), self.means.track(what, len(samples))
        for some in self.means.batches(samples):
            data, seed = self.plan.dataset, self.plan.setup.seed
            images = torch.stack([data.image(sample, self.size) for sample in some]).to(self.device)
            attacked = scorer.attack(
                encoder, images, some, eps=condition.eps, seed=seed, batch_size=self.means.batch_size
            )
            for sample, image in zip(some, attacked, strict=True):
                self.store.keep(key, sample.image, image)
            advance(len(some))

    def _method(self, condition: Condition, samples: Sequence[Sample]) -> str | Answer:
        if condition.method not in ANSWERS:
            return condition.method
        if not isinstance(self.subject, Answering):
            raise ModelError("This model's answers cannot be attacked: nothing says how they follow from its features.")
        answers = self.subject.answers(TASKS[self._askable(samples)[0]], samples, self.plan.dataset)
        if condition.method == "answer-apgd":
            return Answer(answers, optimiser=APGD())
        return Answer(answers, optimiser=Squares()) if condition.method == "answer-square" else Answer(answers)

    def _askable(self, samples: Sequence[Sample]) -> list[str]:
        """The tasks that data and model are for and all samples have; classification first."""
        tasks = [task for task in self.plan.tasks or self.subject.tasks if self.plan.can(task)]
        asked = [task for task in tasks if all(TASKS[task].applies(sample) for sample in samples)] or tasks
        return sorted(asked, key=lambda task: task != CLASSES)

    def _pairs(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """The pictures and what attacks on them aim at, (B, C, H, W) in [0, 1] on the encoder's device."""
        data = self.plan.dataset
        images = torch.stack([data.image(sample, self.size) for sample in samples])
        targets = torch.stack([data.target(sample, self.size) for sample in samples])
        return images.to(self.device), targets.to(self.device)

    def _certify(self, defence: Defence) -> None:
        """Certify at every noise level that a suite wants, each once; a level that no PSM is for is a note."""
        wanted = self.plan.certified(defence)
        if not wanted:
            return
        setup, done = self.plan.setup, set[float]()
        for sigma in sorted(wanted, key=lambda one: one or 0):  # None is the PSM's own
            try:
                chosen = self._options(defence, sigma)
                level = chosen["sigma"]
                if level is None:
                    level = fs_plugins.smoothers(self.subject.model, **chosen)[0].sigma
                if sigma in (None, setup.sigma, defence.smoothing.sigma if defence.smoothing else None):
                    self.found.levels[defence.name] = level
                if level not in done:
                    done.add(level)
                    samples = self.means.mine(self.plan.samples(wanted[sigma]))
                    images = {sample.image: self.plan.dataset.image(sample, self.size) for sample in samples}
                    self._certify_at(level, defence, chosen, images)
            except (PSMError, RegistryError) as error:
                self.found.notes.append(f"{defence.title} is not certified at sigma {sigma}: {error}")

    def _certify_at(self, sigma: float, defence: Defence, chosen: Options, images: dict[str, Tensor]) -> None:
        draws = self.plan.setup.certified_draws
        rows = self.store.certificates_file(defence.name, sigma, self.means.share)
        fs_plugins.certify(
            self.subject.model,
            images,
            n=draws,
            psm=chosen["psm"],
            processor=chosen["processor"],
            sigma=sigma,
            seed=self.plan.setup.seed,
            out=rows,
            chunk_size=self.means.chunk_size,
            advance=self.means.track(f"certifying, {defence.title}, sigma {sigma:g}", len(images) * draws),
        )

    def _certify_answers(self, defence: Defence, chosen: Options | None) -> None:
        for suite in self.plan.suites:
            samples = self.plan.answered(suite) if defence in suite.defences else ()
            if samples and suite.task is not None and chosen is not None:
                certify_asked(self.subject, defence, chosen, suite.task, samples, self.plan, self.means)

    def _search(self, smoother: FeatureSmoother) -> None:
        """Compare attacks that must be ordered if the defence's gradients are honest; kept as a file."""
        eps, setup = self.plan.masking_eps, self.plan.setup
        if self.means.share[0] or eps is None or self.store.masking_file(eps).exists():
            return
        samples = self.plan.samples(setup.masking_images)
        images, targets = self._pairs(samples)
        answers = self._answers(samples, images)
        steps, queries = setup.adaptive_steps, setup.masking_queries
        passes = effort(len(images), steps=steps, queries=queries, answers=answers is not None)
        report = check_gradients(
            smoother,
            images,
            targets,
            answers=answers,
            eps=eps,
            draws=setup.adaptive_draws,
            seed=setup.seed,
            names=[sample.image for sample in samples],
            batch_size=self.means.batch_size,
            advance=self.means.track("masked gradients?", passes),
            steps=steps,
            queries=queries,
        )
        write(self.store.masking_file(eps), asdict(report))

    def _answers(self, samples: Sequence[Sample], images: Tensor) -> Answers | None:
        """How to ask about pictures, if the subject can be; a note where it says that it cannot."""
        if not isinstance(self.subject, Answering) or not self._askable(samples):
            return None
        try:
            answers = self.subject.answers(TASKS[self._askable(samples)[0]], samples, self.plan.dataset)
            answers.given(self.subject.call.look(images[:1]), [samples[0].image])
        except ModelError as error:
            self.found.notes.append(f"The search for masked gradients attacks no answers: {error}")
            return None
        return answers


def _oblivious(
    cells: dict[tuple[Defence, Condition], Asked], ready: dict[Defence, Options | None]
) -> dict[Condition, set[str]]:
    """The attacks on the bare encoder that some defence is asked about, each with its pictures' names."""
    wanted: dict[Condition, set[str]] = {}
    for (defence, condition), tasks in cells.items():
        if defence in ready and condition not in (CLEAN, TARGET) and not condition.adaptive:
            names = wanted.setdefault(condition, set())
            names.update(sample.image for samples in tasks.values() for sample in samples)
    return wanted
