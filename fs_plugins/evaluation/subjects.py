"""What is evaluated: a model with one vision encoder that answers what a task asks about pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

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


def size_of(call: VisionCall) -> tuple[int, int]:
    """(H, W) that the encoder takes.

    Raises:
        ModelError: it takes any.
    """
    if call.image_size is None:
        raise ModelError(
            "This encoder takes pictures of any size, so what was attacked would not be what is asked about. "
            "Evaluation is for encoders of a fixed size."
        )
    return call.image_size
