"""Ascent that chooses its own step size.

APGD: Croce and Hein, ICML 2020 (arXiv 2003.01690), Algorithm 1. Every image has a step size of its own: it begins with
the ball's diameter, and is halved at checkpoints where the objective has stopped rising.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fs_plugins import checks
from fs_plugins.attacks.ball import Ball
from fs_plugins.attacks.loop import anywhere, slope_of
from fs_plugins.attacks.protocols import Objective, Search
from fs_plugins.attacks.victim import Stream
from fs_plugins.errors import SettingError

_MOMENTUM, _RISING = 0.75, 0.75
"""The paper's alpha and rho."""


def checkpoints(steps: int) -> list[int]:
    """After which steps the step size is looked at again (the paper's w_j)."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return [math.ceil(round(share * steps, 6)) for share in shares[1:] if share < 1]


def apgd(
    objective: Objective,
    images: Tensor,
    *,
    ball: Ball,
    steps: int,
    draws: int = 1,
    start: Tensor | None = None,
    report: Callable[[int], object] | None = None,
) -> Tensor:
    """Climb ``objective`` inside the ball around each image; arguments and errors as for ``ascend``.

    Returns:
        (B, C, H, W) the last images, in the ball and in [0, 1]. The best ones that were seen are gone back to whenever
        a step size is halved; of an objective that draws noise the very best may be a lucky draw.
    """
    checks.recording("An attack by gradients")
    steps, draws = checks.whole("steps", steps), checks.whole("draws", draws)
    now = ball.project((images if start is None else start).detach(), images)
    halving = _Halving.of(now, ball)
    before = now
    marks = _marks(steps)
    for step in range(1, steps + 1):
        scores, slope = slope_of(objective, now, step, draws)
        if step > 1:
            halving.seen(now, scores, slope)
        else:
            halving.first(now, scores, slope)
        if step - 1 in marks:
            now, slope, before = halving.checked(now, slope, before, marks[step - 1])
        stepped = ball.project(now + halving.size.view(-1, 1, 1, 1) * ball.steepest(slope), images)
        if step > 1:
            stepped = ball.project(now + _MOMENTUM * (stepped - now) + (1 - _MOMENTUM) * (now - before), images)
        before, now = now, stepped
        if report is not None:
            report(step)
    return now


def _marks(steps: int) -> dict[int, int]:
    """Checkpoint -> steps since the one before."""

    def apart() -> Iterator[tuple[int, int]]:
        last = 0
        for mark in checkpoints(steps):
            if mark > last:
                yield mark, mark - last
            last = mark

    return dict(apart())


@dataclass
class _Halving:
    """Step sizes (B,), and what each image's next one depends on."""

    size: Tensor
    best: Tensor
    top: Tensor
    slope: Tensor
    last: Tensor
    rises: Tensor
    halved: Tensor
    top_before: Tensor

    @classmethod
    def of(cls, images: Tensor, ball: Ball) -> _Halving:
        none = images.new_zeros(len(images))
        return cls(
            none + 2 * ball.eps, images, none, images, none, none.clone(), none.to(torch.bool), none - float("inf")
        )

    def first(self, images: Tensor, scores: Tensor, slope: Tensor) -> None:
        self.best, self.top, self.slope, self.last = images, scores, slope, scores

    def seen(self, images: Tensor, scores: Tensor, slope: Tensor) -> None:
        """Another step's images, and what they scored."""
        self.rises += scores > self.last
        better = scores > self.top
        wide = better.view(-1, 1, 1, 1)
        self.best, self.slope = torch.where(wide, images, self.best), torch.where(wide, slope, self.slope)
        self.top, self.last = torch.where(better, scores, self.top), scores

    def checked(self, now: Tensor, slope: Tensor, before: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """Halve where it stopped rising, and go back to the best there; images, gradients and those before."""
        stuck = self.rises < _RISING * steps
        idle = ~self.halved & (self.top <= self.top_before)
        halved = stuck | idle
        self.size = torch.where(halved, self.size / 2, self.size)
        self.halved, self.top_before, self.rises = halved, self.top, torch.zeros_like(self.rises)
        wide = halved.view(-1, 1, 1, 1)
        return (
            torch.where(wide, self.best, now),
            torch.where(wide, self.slope, slope),
            torch.where(wide, self.best, before),
        )


@dataclass(frozen=True)
class APGD:
    """Follows gradients with step sizes that it chooses itself; see ``apgd``. It begins anywhere in the ball."""

    marks: tuple[object, ...] = ("apgd",)

    def __call__(self, objective: Objective, images: Tensor, search: Search, stream: Stream) -> Tensor:
        if search.step_size is not None:
            raise SettingError("APGD chooses its step sizes itself, so it has no step_size; leave it out.")
        return apgd(
            objective,
            images,
            ball=search.ball,
            steps=search.steps,
            draws=search.draws,
            start=anywhere(images, search.ball, stream),
            report=search.told(images),
        )
