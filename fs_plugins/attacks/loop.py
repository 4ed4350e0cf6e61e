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
from fs_plugins.noise import normal


def ascend(
    objective: Objective,
    images: Tensor,
    *,
    ball: Ball,
    step_size: float | None = None,
    steps: int,
    draws: int = 1,
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
    step_size = _step_size(step_size, ball, steps)
    attacked = ball.project((images if start is None else start).detach(), images)
    for step in range(1, steps + 1):
        attacked.requires_grad_(True)
        slope = torch.zeros_like(attacked)
        for draw in range(draws):
            slope += _slope(objective, attacked, step, draw)
        attacked = ball.project(attacked.detach() + step_size * ball.steepest(slope), images)
        if report is not None:
            report(step)
    return attacked


def _step_size(given: float | None, ball: Ball, steps: int) -> float:
    if given is None:
        usual = max(1 / 255 if ball.norm == "linf" else 0.0, 2.5 * ball.eps / steps)
        return min(usual, 1.0) if ball.norm == "linf" else usual
    return ball.length("step_size", given)


def _slope(objective: Objective, attacked: Tensor, step: int, draw: int) -> Tensor:
    with torch.enable_grad():
        score = objective(attacked, step, draw).sum()
        grads = torch.autograd.grad(score, attacked, allow_unused=True) if score.requires_grad else (None,)
    if grads[0] is None:
        raise ModelError(
            "No gradient reaches the pixels: something on the way detaches it. A defence that cannot be "
            'differentiated is not robust for that; try the gradient-free attack (method="square").'
        )
    return grads[0]


@dataclass(frozen=True)
class Ascent:
    """Follows gradients; see ``ascend``. Away from an image itself it begins a little beside it."""

    marks: tuple[object, ...] = ()

    def __call__(self, objective: Objective, images: Tensor, search: Search, stream: Stream) -> Tensor:
        told = search.report
        return ascend(
            objective,
            images,
            ball=search.ball,
            step_size=search.step_size,
            steps=search.steps,
            draws=search.draws,
            start=None if search.targeted else _beside(images, search.ball, stream),
            report=None if told is None else lambda step: told(len(images)),
        )


def _beside(images: Tensor, ball: Ball, stream: Stream) -> Tensor:
    """A little off the images, where the gradient of their similarity to themselves is not zero."""
    generators = stream.at("start").generators(images)
    off = torch.stack([normal(generator, image.shape) for image, generator in zip(images, generators, strict=True)])
    return images + ball.eps / 10 * ball.steepest(off.to(images.dtype))
