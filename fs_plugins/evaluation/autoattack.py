"""AutoAttack in its version for randomised defences, made by its authors' own code.

Croce and Hein, ICML 2020 (arXiv 2003.01690): APGD on the cross-entropy, then on the difference of logits ratio, 100
steps each, whose gradients are means over ``EOT_STEPS`` draws. Nothing of it is to be set. The package ``pyautoattack``
has it.

Shapes: B images, C channels, H x W pixels, E the width of the embedded feature, K classes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from fs_plugins.attacks.ball import Ball
from fs_plugins.attacks.victim import Stream, Victim
from fs_plugins.errors import SettingError
from fs_plugins.evaluation.datasets import Dataset, Sample
from fs_plugins.evaluation.defended import Encoder
from fs_plugins.evaluation.subjects import Scoring, Subject

EOT_STEPS = 20
"""Draws that each gradient is the mean of."""

FEWEST = 3
"""Classes that the difference of logits ratio compares."""


def package() -> Any:
    """``pyautoattack``.

    Raises:
        SettingError: it is not installed.
    """
    try:
        return importlib.import_module("pyautoattack")
    except ImportError:
        raise SettingError(
            'The suite autoattack needs the package pyautoattack: pip install "fs-plugins[autoattack]", or pip install '
            "pyautoattack==0.2.0, which needs nothing more."
        ) from None


class Scorer:
    """Attacks a subject that scores classes.

    Args:
        subject: the model.
        dataset: whose classes are told apart.

    Raises:
        SettingError: the subject has no class scores, or there are fewer than three classes; a class of the data that
            the model does not know.
    """

    def __init__(self, subject: Subject, dataset: Dataset) -> None:
        if not isinstance(subject, Scoring):
            raise SettingError(
                "AutoAttack needs a score for each class, and this model answers in words. Evaluate a classifier, or a "
                "model of images and texts such as demo-clip; or take the suite worst, which attacks what a language "
                "model says."
            )
        names = list(subject.names)
        if len(dataset.classes) < FEWEST:
            raise SettingError(
                f"AutoAttack compares the three largest class scores, and the data has {len(dataset.classes)} classes. "
                "Take data with three or more, or the suite adaptive."
            )
        if unknown := next((name for name in dataset.classes if name not in names), None):
            raise SettingError(f"The model scores no class {unknown!r}, which the data has, so no AutoAttack is made.")
        self.columns = [names.index(name) for name in dataset.classes]
        self.classes, self.scores = list(dataset.classes), subject.scores

    def attack(
        self,
        encoder: Encoder,
        images: Tensor,
        samples: Sequence[Sample],
        *,
        eps: float,
        seed: int,
        batch_size: int,
    ) -> Tensor:
        """Attacked images (B, C, H, W) in [0, 1]; those whose class no attack turns, as they were.

        Args:
            encoder: what the attack is made through.
            images: (B, C, H, W) in [0, 1].
            samples: theirs, with labels.
            eps: l-inf radius in [0, 1] pixels.
            seed: of the attack and of the draws that it faces, which are others at every call.
            batch_size: images at once.
        """
        labels = torch.tensor(
            [self.classes.index(sample.label or "") for sample in samples], dtype=torch.int64, device=images.device
        )
        served = _Served(encoder, lambda embedded: self.scores(embedded)[:, self.columns], seed)
        with torch.random.fork_rng():
            attacker = package().AutoAttack(
                served, norm="Linf", eps=eps, version="rand", seed=seed, device=images.device
            )
            attacked: Tensor = attacker.run_standard_evaluation(images, labels, batch_size=batch_size)[0]
        return Ball("linf", eps).project(attacked.detach(), images)


class _Served(nn.Module):
    """(B, C, H, W) images in [0, 1] -> (B, K) class scores, each call of fresh draws."""

    def __init__(self, encoder: Encoder, scores: Callable[[Tensor], Tensor], seed: int) -> None:
        super().__init__()
        self.victim, self.scores, self.seed, self.calls = Victim(encoder), scores, seed, count()
        self.training = False

    def forward(self, images: Tensor) -> Tensor:
        stream = Stream((self.seed, "autoattack", next(self.calls)), tuple(range(len(images))))
        return self.scores(self.victim.see(images, stream).embedding)
