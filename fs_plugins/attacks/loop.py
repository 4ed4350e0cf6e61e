"""The one loop of the gradient attacks: iterated steps that climb an objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fs_plugins.attacks.ball import Ball, check_distance
from fs_plugins.errors import ModelError, SettingError

Objective = Callable[[Tensor, int, int], Tensor]
"""(B, C, H, W) images in [0, 1], step from 1 and draw from 0 -> (B,) scores; each depends on its own image only."""


def ascend(
    objective: Objective,
    images: Tensor,
    *,
    ball: Ball,
    step_size: float | None = None,
    steps: int,
    draws: int = 1,
    start: Tensor | None = None,
    report: Callable[[int], Any] | None = None,
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
        SettingError: a value out of range.
        ModelError: the objective has no gradient.
    """
    for name, value in (("steps", steps), ("draws", draws)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SettingError(f"{name} must be a whole number >= 1, got {value!r}.")
    if step_size is None:
        step_size = max(1 / 255 if ball.norm == "linf" else 0.0, 2.5 * ball.eps / steps)
        step_size = min(step_size, 1.0) if ball.norm == "linf" else step_size
    elif ball.norm == "linf":
        check_distance("step_size", step_size)
    elif not step_size > 0:
        raise SettingError(f"step_size is an l2 length in [0, 1] pixel units and must be above 0, got {step_size!r}.")
    attacked = ball.project((images if start is None else start).detach(), images)
    for step in range(1, steps + 1):
        attacked.requires_grad_(True)
        slope = torch.zeros_like(attacked)
        for draw in range(draws):
            with torch.enable_grad():
                score = objective(attacked, step, draw).sum()
                grads = torch.autograd.grad(score, attacked, allow_unused=True) if score.requires_grad else (None,)
                if grads[0] is None:
                    raise ModelError(
                        "No gradient reaches the pixels: something on the way detaches it. A defence that cannot be "
                        "differentiated is not robust for that; try the gradient-free attack (fs_plugins.attacks.square)."
                    )
                slope += grads[0]
        attacked = ball.project(attacked.detach() + step_size * ball.steepest(slope), images)
        if report is not None:
            report(step)
    return attacked
