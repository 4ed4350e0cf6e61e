"""What is evaluated: a model with one vision encoder that answers what a task asks about pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

import fs_plugins
from fs_plugins.answers import Answers, Classes
from fs_plugins.certificates.asking import Asker
from fs_plugins.errors import ModelError
from fs_plugins.evaluation.datasets import Dataset, Sample
from fs_plugins.evaluation.tasks import Task
from fs_plugins.vision import VisionCall


class Subject(Protocol):
    """A model under evaluation: its vision encoder, and what it says."""

    model: nn.Module
    call: VisionCall

    @property
    def tasks(self) -> tuple[str, ...]:
        """What it can be asked, by the names of ``TASKS``."""

    def reply(self, task: Task, images: Tensor, samples: Sequence[Sample], dataset: Dataset) -> list[str]:
        """(B, C, H, W) images in [0, 1] at the encoder's size, and what is asked of each -> the replies."""


@runtime_checkable
class Answering(Protocol):
    """A subject whose answers can be attacked: what it says has gradients to what its encoder shows."""

    def answers(self, task: Task, samples: Sequence[Sample], dataset: Dataset) -> Answers:
        """What is said about samples, by their images' names."""


@runtime_checkable
class Speaking(Protocol):
    """A subject that can be asked in words about whatever its encoder shows, so that its answers can be certified."""

    def asker(self, task: Task) -> Asker:
        """How it is asked what the task asks."""


@runtime_checkable
class Scoring(Protocol):
    """A subject that scores every class by the encoder's embedded feature alone."""

    @property
    def names(self) -> Sequence[str]:
        """The K classes."""

    def scores(self, embedded: Tensor) -> Tensor:
        """(B, E) served embeddings -> (B, K) class scores, as logits are. Gradients flow through."""


@runtime_checkable
class Reader(Protocol):
    """A subject that classifies by the encoder's embedded feature alone, which is seen once for answer and cosine."""

    def scores(self, embedded: Tensor) -> Tensor:
        """(B, E) served embeddings -> (B, K) class scores. Gradients flow through."""

    def read(self, embedded: Tensor, samples: Sequence[Sample], dataset: Dataset) -> list[str]:
        """(B, E) served embeddings -> the replies to ``classification``."""


class Headed:
    """An encoder with a linear head of its own over named classes.

    Args:
        model: that an adapter claims and ``enable`` smooths.
        head: on the encoder's embedded feature (B, E) -> logits (B, K).
        names: the K classes.

    Raises:
        ModelError: the encoder takes pictures of any size.
    """

    tasks = ("classification",)

    def __init__(self, model: nn.Module, head: nn.Module, names: Sequence[str]) -> None:
        self.model, self.head = model, head
        self.call = fs_plugins.vision_call(model)
        self.names = list(names)
        self.numbers = {name: number for number, name in enumerate(names)}
        size_of(self.call)

    def scores(self, embedded: Tensor) -> Tensor:
        like = next(self.head.parameters(), embedded)  # of a head that does nothing there are none
        scores: Tensor = self.head(embedded.to(like)).float()
        return scores

    def answers(self, task: Task, samples: Sequence[Sample], dataset: Dataset) -> Answers:
        return Classes(self.call, self.scores)

    @torch.no_grad()
    def read(self, embedded: Tensor, samples: Sequence[Sample], dataset: Dataset) -> list[str]:
        """Of the classes on offer that with the largest logit.

        Raises:
            ModelError: the head does not know one of them.
        """
        logits = self.scores(embedded)
        return [likeliest(row, self.numbers, one, dataset) for row, one in zip(logits, samples, strict=True)]

    def reply(self, task: Task, images: Tensor, samples: Sequence[Sample], dataset: Dataset) -> list[str]:
        with torch.no_grad():
            embedded = self.call.served(images)
        return self.read(embedded, samples, dataset)


def likeliest(scores: Tensor, numbers: Mapping[str, int], sample: Sample, dataset: Dataset) -> str:
    """The reply that names the class with the largest score, of those on offer for a sample.

    Args:
        scores: (K,).
        numbers: the K classes' places.

    Raises:
        ModelError: one on offer is none of them.
    """
    offered = dataset.offered(sample)
    if unknown := next((name for name in offered if name not in numbers), None):
        raise ModelError(
            f"This model knows {len(numbers)} classes, and {unknown!r} is none of them. Name classes in dataset.json "
            f"as it does: {', '.join(list(numbers)[:5])} ..."
        )
    place = int(scores[[numbers[name] for name in offered]].argmax())
    return offered[place] if dataset.prompts.classification_answers == "name" else str(place)


def size_of(call: VisionCall) -> tuple[int, int]:
    """(H, W) that the encoder takes, or else that its preprocessing makes.

    Raises:
        ModelError: both take any.
    """
    size = call.image_size or call.pixels.size
    if size is None:
        raise ModelError(
            "This encoder takes pictures of any size, so what was attacked would not be what is asked about. "
            "Evaluation is for encoders of a fixed size."
        )
    return size
