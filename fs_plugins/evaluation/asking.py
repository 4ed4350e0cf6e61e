"""Asking one defence: the replies about pictures, and how far its features have turned."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fs_plugins.attacks.victim import Stream, Victim
from fs_plugins.errors import SettingError
from fs_plugins.evaluation.datasets import Sample
from fs_plugins.evaluation.defended import Encoder
from fs_plugins.evaluation.means import Means
from fs_plugins.evaluation.plan import AGAIN, FEATURES, Asked, Plan, answers_key, attacked_key
from fs_plugins.evaluation.store import Row
from fs_plugins.evaluation.subjects import Subject, size_of
from fs_plugins.evaluation.suites import CLEAN, TARGET, Condition, Defence
from fs_plugins.evaluation.tasks import TASKS, Task
from fs_plugins.noise import Source
from fs_plugins.smoothing import FeatureSmoother


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
        images = torch.stack([self._shown(condition, sample) for sample in some]).to(self.device)
        for name, task in TASKS.items():
            places = [i for i, sample in enumerate(some) if name in left[sample.image]]
            if places:
                yield from self._replies(task, images[places], [some[i] for i in places])
        for name in (FEATURES, AGAIN):
            places = [i for i, sample in enumerate(some) if name in left[sample.image]]
            if places:
                yield from self._cosines(name, condition, images[places], [some[i] for i in places])

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

    def _replies(self, task: Task, images: Tensor, samples: Sequence[Sample]) -> Iterator[Row]:
        began = time.perf_counter()
        replies = self.subject.reply(task, images, samples, self.plan.dataset)
        seconds = round((time.perf_counter() - began) / len(samples), 5)
        for sample, reply in zip(samples, replies, strict=True):
            yield {"image": sample.image, "task": task.name, "reply": reply, "seconds": seconds}

    def _cosines(self, name: str, condition: Condition, images: Tensor, samples: Sequence[Sample]) -> Iterator[Row]:
        """Of an attacked picture to the clean one; of a clean one to the attack's target, or to itself served again."""
        again = name == AGAIN
        read = self.plan.dataset.target if condition == CLEAN and not again else self.plan.dataset.image
        beside = torch.stack([read(sample, self.size) for sample in samples]).to(self.device)
        anew = Stream((self.plan.setup.seed, AGAIN), tuple(sample.image for sample in samples)) if again else None
        near, pooled = cosines(self.encoder, images, beside, anew)
        for sample, a, b in zip(samples, near, pooled, strict=True):
            yield {"image": sample.image, "task": name, "cosine": a, "pooled": b}


@torch.no_grad()
def cosines(
    encoder: Encoder, images: Tensor, others: Tensor, anew: Source | None = None
) -> tuple[list[float], list[float]]:
    """Cosines between what is served for pairs of pictures: of all that is consumed, and of pooled features.

    Args:
        anew: the source of the others' noise; the smoother's own if None, as for the images.
    """
    victim = Victim(encoder)
    source = encoder.source if isinstance(encoder, FeatureSmoother) else Stream((), ())
    one, other = victim.see(images, source), victim.see(others, source if anew is None else anew)
    return (
        torch.cosine_similarity(one.embedding, other.embedding, dim=-1).tolist(),
        torch.cosine_similarity(one.pooled, other.pooled, dim=-1).tolist(),
    )
