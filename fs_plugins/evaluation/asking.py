"""Asking one defence: the replies about pictures, and how far its features have turned."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, cast

import torch
from torch import Tensor

from fs_plugins.attacks.victim import Stream, Victim
from fs_plugins.errors import SettingError
from fs_plugins.evaluation.datasets import Sample
from fs_plugins.evaluation.defended import Encoder
from fs_plugins.evaluation.means import Means
from fs_plugins.evaluation.plan import AGAIN, FEATURES, Asked, Plan, answers_key, attacked_key
from fs_plugins.evaluation.store import Row
from fs_plugins.evaluation.subjects import Reader, Subject, size_of
from fs_plugins.evaluation.suites import CLEAN, TARGET, Condition, Defence
from fs_plugins.evaluation.tasks import TASKS, Task
from fs_plugins.noise import NoiseSource, Source
from fs_plugins.smoothing import FeatureSmoother

MOST_KEPT = 1 << 16
"""Numbers of a feature that is kept after it was asked about."""


class Served(NamedTuple):
    """What a defence serves for one picture: all that is consumed (E,), and pooled (P,)."""

    embedding: Tensor
    pooled: Tensor


class Asking:
    """The rows of one defence.

    Args:
        subject: the model, defended.
        encoder: its encoder as it is served.
        defence: which.
        plan, means: of the evaluation.
    """

    def __init__(self, subject: Subject, encoder: Encoder, defence: Defence, plan: Plan, means: Means) -> None:
        self.subject, self.encoder, self.defence = subject, encoder, defence
        self.plan, self.means = plan, means
        self.size = size_of(subject.call)
        self.device = subject.call.device
        self._kept: dict[tuple[str, str], Served | None] = {}

    def run(self, asked: dict[Condition, Asked]) -> None:
        """Ask what has not been answered."""
        for condition, tasks in asked.items():
            key = answers_key(self.defence, condition)
            left = self._left(key, tasks)
            mine = [sample for sample in self.means.mine(self.plan.dataset.samples) if sample.image in left]
            if not mine:
                continue
            advance = self.means.track(f"{condition.name} pictures, {self.defence.title}", len(mine))
            for some in self.means.batches(mine):
                self.means.store.add(key, list(self._rows(condition, some, left)))
                advance(len(some))

    def _left(self, key: str, tasks: Asked) -> dict[str, list[str]]:
        """Pictures' names -> the tasks that have no row yet."""
        done = self.means.store.rows(key)
        left: dict[str, list[str]] = {}
        for task, samples in tasks.items():
            for sample in samples:
                applies = task not in TASKS or TASKS[task].applies(sample)
                if applies and (sample.image, task) not in done:
                    left.setdefault(sample.image, []).append(task)
        return left

    def _rows(self, condition: Condition, some: Sequence[Sample], left: dict[str, list[str]]) -> Iterator[Row]:
        def wanting(name: str) -> list[Sample]:
            return [sample for sample in some if name in left[sample.image]]

        for name, task in TASKS.items():
            if samples := wanting(name):
                yield from self._replies(task, condition, samples)
        for name in (FEATURES, AGAIN):
            if samples := wanting(name):
                yield from self._cosines(name, condition, samples)

    def _images(self, condition: Condition, samples: Sequence[Sample]) -> Tensor:
        """(B, C, H, W) in [0, 1] where the encoder is."""
        return torch.stack([self._shown(condition, sample) for sample in samples]).to(self.device)

    def _shown(self, condition: Condition, sample: Sample) -> Tensor:
        if condition in (CLEAN, TARGET):
            read = self.plan.dataset.image if condition == CLEAN else self.plan.dataset.target
            return read(sample, self.size)
        found = self.means.store.attacked(attacked_key(self.defence, condition), sample.image)
        if found is None:
            raise SettingError(
                f"The attacked picture of {sample.image} is missing in {self.means.store.folder}. Run the same "
                "command again."
            )
        return found

    def _replies(self, task: Task, condition: Condition, samples: Sequence[Sample]) -> Iterator[Row]:
        began = time.perf_counter()
        votes = self.defence.smoothing.votes if self.defence.smoothing else 1
        told = [self._said(task, condition, samples, vote) for vote in range(votes)]
        replies = [max(said, key=said.count) for said in zip(*told, strict=True)]  # the first of those as frequent
        seconds = round((time.perf_counter() - began) / len(samples), 5)
        for sample, reply in zip(samples, replies, strict=True):
            yield {"image": sample.image, "task": task.name, "reply": reply, "seconds": seconds}

    def _said(self, task: Task, condition: Condition, samples: Sequence[Sample], vote: int) -> list[str]:
        """The replies to one serving of the pictures."""
        with self._noise_of(vote):
            if isinstance(self.subject, Reader):
                seen = self._see(self._images(condition, samples)) if vote else self._served(condition, samples)
                embedded = torch.stack([one.embedding for one in seen])
                return self.subject.read(embedded, samples, self.plan.dataset)
            return self.subject.reply(task, self._images(condition, samples), samples, self.plan.dataset)

    @contextmanager
    def _noise_of(self, vote: int) -> Iterator[None]:
        """Inside, the encoder draws by a vote's own seed; the first vote's is the encoder's."""
        if vote == 0 or not isinstance(self.encoder, FeatureSmoother):
            yield
            return
        own = self.encoder.source
        self.encoder.source = NoiseSource(own.scope, self.plan.setup.seed + vote)
        try:
            yield
        finally:
            self.encoder.source = own

    def _cosines(self, name: str, condition: Condition, samples: Sequence[Sample]) -> Iterator[Row]:
        """Of an attacked picture to the clean one; of a clean one to the attack's target, or to itself served again."""
        if name == AGAIN:
            anew = Stream((self.plan.setup.seed, AGAIN), tuple(sample.image for sample in samples))
            others = self._see(self._images(CLEAN, samples), anew)
        else:
            others = self._served(TARGET if condition == CLEAN else CLEAN, samples)
        for sample, one, other in zip(samples, self._served(condition, samples), others, strict=True):
            near, pooled = (
                torch.cosine_similarity(a, b, dim=-1).item()
                for a, b in ((one.embedding, other.embedding), (one.pooled, other.pooled))
            )
            yield {"image": sample.image, "task": name, "cosine": near, "pooled": pooled}

    def _served(self, condition: Condition, samples: Sequence[Sample]) -> list[Served]:
        """What the defence serves for pictures; small features are kept, for one picture is compared several times."""
        kept = {sample.image: self._kept.get((condition.name, sample.image)) for sample in samples}
        missing = [sample for sample in samples if kept[sample.image] is None]
        if missing:
            seen = self._see(self._images(condition, missing))
            kept.update({sample.image: one for sample, one in zip(missing, seen, strict=True)})
            if seen[0].embedding.numel() <= MOST_KEPT:
                self._kept.update({(condition.name, one.image): kept[one.image] for one in missing})
        return [cast(Served, kept[sample.image]) for sample in samples]

    @torch.no_grad()
    def _see(self, images: Tensor, source: Source | None = None) -> list[Served]:
        """What is served for (B, C, H, W) images, each.

        Args:
            source: of the noise; the smoother's own if None.
        """
        own = self.encoder.source if isinstance(self.encoder, FeatureSmoother) else Stream((), ())
        seen = Victim(self.encoder).see(images, own if source is None else source)
        return [Served(*pair) for pair in zip(seen.embedding, seen.pooled, strict=True)]
