"""A gradient-free attack, to catch defences that only hide their gradients.

Square Attack: Andriushchenko et al., ECCV 2020 (arXiv 1912.00049), its l-inf form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fs_plugins.attacks.ball import Ball
from fs_plugins.attacks.loop import Objective
from fs_plugins.attacks.victim import Stream
from fs_plugins.errors import SettingError

_HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
"""Shares of the queries after which the squares' area is halved: the paper's schedule for 10,000, scaled."""


@torch.no_grad()
def square(
    objective: Objective,
    images: Tensor,
    *,
    eps: float = 16 / 255,
    queries: int = 1000,
    area: float = 0.8,
    stream: Stream,
    report: Callable[[int], Any] | None = None,
) -> Tensor:
    """Search ``objective`` inside the l-inf ball by random squares, kept where they help.

    Args:
        objective: called with the number of the query as its step, and draw 0.
        images: (B, C, H, W) in [0, 1].
        eps: l-inf radius in [0, 1] pixel units.
        queries: how many candidates are tried for each image.
        area: share of the picture that the first squares have.
        stream: of the squares' places and colours.
        report: called after each query with its number, from 1.

    Returns:
        (B, C, H, W) attacked images, in the ball and in [0, 1].

    Raises:
        SettingError: eps outside (0, 1], or no query.
    """
    ball = Ball("linf", eps)
    if queries < 1:
        raise SettingError(f"queries must be at least 1, got {queries}.")
    channels, height, width = images.shape[1:]
    generators = stream.generators(torch.empty(len(images)))

    def signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return (2 * torch.randint(2, shape, generator=generator) - 1).to(images)

    stripes = torch.stack([signs((channels, 1, width), generator) for generator in generators])
    best = ball.project(images + eps * stripes, images)
    for query in range(1, queries + 1):
        share = area / 2 ** sum(query / queries > point for point in _HALVINGS)
        side = min(max(1, round((share * height * width) ** 0.5)), height, width)
        tried = best.clone()
        for i, generator in enumerate(generators):
            top = int(torch.randint(height - side + 1, (), generator=generator))
            left = int(torch.randint(width - side + 1, (), generator=generator))
            box = (i, slice(None), slice(top, top + side), slice(left, left + side))
            tried[box] = images[box] + eps * signs((channels, 1, 1), generator)
        tried = ball.project(tried, images)
        # Both under the same noise: the best score ever seen would be that of a lucky draw.
        better = objective(tried, query, 0) > objective(best, query, 0)
        best = torch.where(better.view(-1, 1, 1, 1), tried, best)
        if report is not None:
            report(query)
    return best
