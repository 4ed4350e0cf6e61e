"""How far attacks got: what is served for the pictures that they made, at draws that none of them has seen.

Shapes: B images, E the width of the embedded feature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from fs_plugins.answers import Answers
from fs_plugins.attacks.victim import Stream, Victim
from fs_plugins.smoothing import FeatureSmoother
from fs_plugins.vision import VisionCall

REPEATS = 4
"""How often each attacked image is served to be judged, from draws that no attack has seen."""

LOST = 7.0
"""Minus the log-likelihood of an answer that is given less than once in a thousand times. How much less says nothing,
so attacks are compared up to here.
"""


@dataclass(frozen=True)
class Strength:
    """How far one attack got.

    Args:
        name: which.
        margins: for each image; larger ones are the attack's success. On features, the cosine of the served feature to
            the target's less that to the image's own: above 0 the attack has succeeded. On answers, minus the
            log-likelihood, as served, of the answer that the plain model gives to the clean image.
        turned: on answers, for each image whether more than half of the times that it was served another answer was
            the likeliest; None on features.
    """

    name: str
    margins: tuple[float, ...]
    turned: tuple[bool, ...] | None = None

    @property
    def succeeded(self) -> tuple[bool, ...]:
        """For each image, whether the attack did."""
        return tuple(margin > 0 for margin in self.margins) if self.turned is None else self.turned

    @property
    def success(self) -> float:
        return sum(self.succeeded) / len(self.succeeded)

    @property
    def mean(self) -> float:
        return sum(self.margins) / len(self.margins)


@dataclass(frozen=True)
class Judge:
    """Serves pictures by a defence.

    Args:
        smoother: the defence.
        keys: the images'; the noise of each follows from seed and key.
        seed: of the draws.
        batch_size: images at once.
    """

    smoother: FeatureSmoother
    keys: Sequence[object]
    seed: int
    batch_size: int

    @torch.no_grad()
    def embedded(self, images: Tensor) -> Tensor:
        """(REPEATS, B, E): what is served for the images."""
        victim = Victim(self.smoother)
        repeats = [
            torch.cat([victim.see(images[part], self._stream(repeat, part)).embedding for part in self._parts()])
            for repeat in range(REPEATS)
        ]
        return torch.stack(repeats)

    def on_features(self, images: Tensor, targets: Tensor) -> Callable[[str, Tensor], Strength]:
        """What judges attacks that shall make images (B, C, H, W) alike to targets: attacked ones -> how far."""
        own, aim = (_cosines_to(self.smoother.call, some) for some in (images, targets))

        def judged(name: str, attacked: Tensor) -> Strength:
            served = self.embedded(attacked)
            return Strength(name, tuple((aim(served) - own(served)).tolist()))

        return judged

    def on_answers(self, images: Tensor, answers: Answers) -> Callable[[str, Tensor], Strength]:
        """What judges attacks that shall turn the answers to images (B, C, H, W): attacked ones -> how far."""
        victim = Victim(self.smoother)
        given = [answers.given(victim.see_plain(images[part]).output, tuple(self.keys[part])) for part in self._parts()]

        @torch.no_grad()
        def judged(name: str, attacked: Tensor) -> Strength:
            lost, other = [], []
            for part, own in zip(self._parts(), given, strict=True):
                served = [victim.see(attacked[part], self._stream(repeat, part)).output for repeat in range(REPEATS)]
                spoken = [answers.spoken(output, own) for output in served]
                lost.append(-torch.stack([one.likelihood() for one in spoken]).mean(0))
                other.append(torch.stack([~one.kept() for one in spoken]).sum(0) > REPEATS / 2)
            return Strength(name, tuple(torch.cat(lost).tolist()), tuple(torch.cat(other).tolist()))

        return judged

    def _parts(self) -> Iterator[slice]:
        for first in range(0, len(self.keys), self.batch_size):
            yield slice(first, first + self.batch_size)

    def _stream(self, repeat: int, part: slice) -> Stream:
        return Stream((self.seed, "judge", repeat), tuple(self.keys[part]))


@torch.no_grad()
def _cosines_to(call: VisionCall, images: Tensor) -> Callable[[Tensor], Tensor]:
    """Served features (R, B, E) -> (B,) mean cosine to the plain features of these images."""
    plain = Victim(call).see_plain(images).embedding
    return lambda served: torch.cosine_similarity(served, plain[None], dim=-1).mean(0)


def weaker(ours: Sequence[float], rivals: Sequence[float], confidence: float) -> bool:
    """Whether the rival's values are larger, image by image, beyond chance (a paired one-sided t-test)."""
    apart = np.subtract(rivals, ours, dtype=float)
    if np.ptp(apart) == 0:
        return bool(apart[0] > 0)
    return bool(stats.ttest_1samp(apart, 0, alternative="greater").pvalue < 1 - confidence)
