"""The one loop of the gradient attacks: iterated steps that climb an objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fs_plugins import checks
from fs_plugins.attacks.ball import Ball
from fs_plugins.attacks.protocols import Objective, Search
from fs_plugins.attacks.victim import Stream
from fs_plugins.errors import ModelError
from fs_plugins.noise import normal, uniform


def ascend(
    objective: Objective,
    images: Tensor,
    *,
    ball: Ball,
    step_size: float | None = None,
    steps: int,
    draws: int = 1,
    momentum: float = 0.0,
    start: Tensor | None = None,
    report: Callable[[int], object] | None = None,
) -> Tensor:
    """Climb ``objective`` inside the ball around each image.

    Args:
        objective: what to climb.
        images: (B, C, H, W) in [0, 1].
        ball: where the attack may go.
        step_size: length of a step in the ball's norm, [0, 1] pixel units; by default 2.5 eps / steps,
            and for l-inf 1/255 at least.
        steps: how many.
        draws: the objective's gradient is summed over so many draws at every step (expectation over transformation).
        momentum: what is kept of the direction so far, in [0, 1): gradients of mean size 1 are added up (Dong et al.,
            CVPR 2018). Against a defence that draws noise it averages over steps.
        start: (B, C, H, W) where to begin, pulled into the ball; by default the images themselves.
        report: called after each step with its number, from 1.

    Returns:
        (B, C, H, W) attacked images, in the ball and in [0, 1].

    Raises:
        SettingError: a value out of range, or it is called inside ``torch.inference_mode``.
        ModelError: the objective has no gradient.
    """
    checks.recording("An attack by gradients")
    steps, draws = checks.whole("steps", steps), checks.whole("draws", draws)
    momentum = checks.number("momentum must be in [0, 1)", momentum, lambda share: 0 <= share < 1)
    step_size = _step_size(step_size, ball, steps)
    attacked = ball.project((images if start is None else start).detach(), images)
    kept = torch.zeros_like(attacked)
    for step in range(1, steps + 1):
        _, slope = slope_of(objective, attacked, step, draws)
        if momentum:
            kept = slope = momentum * kept + _evened(slope)
        attacked = ball.project(attacked + step_size * ball.steepest(slope), images)
        if report is not None:
            report(step)
    return attacked


def _step_size(given: float | None, ball: Ball, steps: int) -> float:
    if given is None:
        usual = max(1 / 255 if ball.norm == "linf" else 0.0, 2.5 * ball.eps / steps)
        return min(usual, 1.0) if ball.norm == "linf" else usual
    return ball.length("step_size", given)


def slope_of(objective: Objective, images: Tensor, step: int, draws: int) -> tuple[Tensor, Tensor]:
    """The objective's scores (B,) and its gradient (B, C, H, W), summed over draws.

    Raises:
        ModelError: the objective has no gradient.
    """
    shown = images.detach().requires_grad_(True)
    scores, slope = images.new_zeros(len(images)), torch.zeros_like(images)
    for draw in range(draws):
        found, own = _slope(objective, shown, step, draw)
        scores, slope = scores + found.to(scores), slope + own
    return scores, slope


def _evened(slope: Tensor) -> Tensor:
    """Each image's gradient, of mean size 1; none stays none."""
    size = slope.abs().flatten(1).mean(1).view(-1, *[1] * (slope.ndim - 1))
    return torch.where(size > 0, slope / size.where(size > 0, 1.0), 0.0)


def _slope(objective: Objective, attacked: Tensor, step: int, draw: int) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        scores = objective(attacked, step, draw)
        total = scores.sum()
        grads = torch.autograd.grad(total, attacked, allow_unused=True) if total.requires_grad else (None,)
    if grads[0] is None:
        raise ModelError(
            "No gradient reaches the pixels: something on the way detaches it. A defence that cannot be "
            'differentiated is not robust for that; try the gradient-free attack (method="square").'
        )
    return scores.detach(), grads[0]


@dataclass(frozen=True)
class Ascent:
    """Follows gradients; see ``ascend``. Away from an image itself it begins a little beside it, and another start
    anywhere in the ball.
    """

    momentum: float = 0.0
    marks: tuple[object, ...] = ()

    def __call__(self, objective: Objective, images: Tensor, search: Search, stream: Stream) -> Tensor:
        return ascend(
            objective,
            images,
            ball=search.ball,
            step_size=search.step_size,
            steps=search.steps,
            draws=search.draws,
            momentum=self.momentum,
            start=self._start(images, search, stream),
            report=search.told(images),
        )

    def _start(self, images: Tensor, search: Search, stream: Stream) -> Tensor | None:
        if search.start:
            return anywhere(images, search.ball, stream)
        return None if search.targeted else _beside(images, search.ball, stream)


def _beside(images: Tensor, ball: Ball, stream: Stream) -> Tensor:
    """A little off the images, where the gradient of their similarity to themselves is not zero."""
    return images + ball.eps / 10 * ball.steepest(_normal(images, stream))


def anywhere(images: Tensor, ball: Ball, stream: Stream) -> Tensor:
    """Somewhere in the balls: for l-inf any of their points alike, for l2 on their rim."""
    if ball.norm == "l2":
        return images + ball.eps * ball.steepest(_normal(images, stream))
    generators = stream.at("start").generators(images)
    off = [uniform(generator, image.shape) for image, generator in zip(images, generators, strict=True)]
    return images + ball.eps * (2 * torch.stack(off).to(images) - 1)


def _normal(images: Tensor, stream: Stream) -> Tensor:
    generators = stream.at("start").generators(images)
    off = [normal(generator, image.shape) for image, generator in zip(images, generators, strict=True)]
    return torch.stack(off).to(images.dtype)
