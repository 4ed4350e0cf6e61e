"""The one loop of the l-inf attacks: iterated sign steps that climb an objective."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fs_plugins.errors import SettingError


def ascend(
    objective: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    start: Tensor | None = None,
    report: Callable[[int], None] | None = None,
) -> Tensor:
    """Climb ``objective`` inside the l-inf ball around ``images``.

    Args:
        objective: (B, C, H, W) images in [0, 1] -> (B,) scores; each depends on its own image only.
        images: (B, C, H, W) in [0, 1].
        eps: radius of the ball, in [0, 1] pixel units (16/255 is usual).
        step_size: length of a sign step, same units.
        steps: how many.
        start: (B, C, H, W) where to begin, pulled into the ball; by default the images themselves.
        report: called after each step with its number, from 1.

    Returns:
        (B, C, H, W) attacked images, in the ball and in [0, 1].

    Raises:
        SettingError: eps or step_size outside (0, 1], or no step to take.
    """
    for name, value in (("eps", eps), ("step_size", step_size)):
        if not (math.isfinite(value) and 0 < value <= 1):
            hint = f"; did you mean {value:g}/255?" if 1 < value <= 255 else ""
            raise SettingError(f"{name} is in [0, 1] pixel units and must be in (0, 1], got {value:g}{hint}")
    if steps < 1:
        raise SettingError(f"steps must be at least 1, got {steps}.")
    low, high = (images - eps).clamp(0, 1), (images + eps).clamp(0, 1)
    attacked = (images if start is None else start).detach().clamp(low, high)
    for step in range(1, steps + 1):
        attacked.requires_grad_(True)
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(objective(attacked).sum(), attacked)
        attacked = (attacked.detach() + step_size * slope.sign()).clamp(low, high)
        if report is not None:
            report(step)
    return attacked
