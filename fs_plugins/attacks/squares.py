"""A gradient-free attack, to catch defences that only hide their gradients.

Square Attack: Andriushchenko et al., ECCV 2020 (arXiv 1912.00049), its l-inf form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fs_plugins import checks
from fs_plugins.attacks.ball import Ball
from fs_plugins.attacks.protocols import Objective, Search
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
    draws: int = 1,
    area: float = 0.8,
    stream: Stream,
    report: Callable[[int], object] | None = None,
) -> Tensor:
    """Search ``objective`` inside the l-inf ball by random squares, kept where they help.

    Args:
        objective: called with the number of the query as its step.
        images: (B, C, H, W) in [0, 1].
        eps: l-inf radius in [0, 1] pixel units.
        queries: how many candidates are tried for each image.
        draws: candidates are compared by their scores' sum over so many draws.
        area: share of the picture that the first squares have.
        stream: of the squares' places and colours.
        report: called after each query with its number, from 1.

    Returns:
        (B, C, H, W) attacked images, in the ball and in [0, 1].

    Raises:
        SettingError: eps outside (0, 1], or no query or draw.
    """
    ball = Ball("linf", eps)
    queries, draws = checks.whole("queries", queries), checks.whole("draws", draws)
    area = checks.number("area must be a share in (0, 1]", area, lambda share: 0 < share <= 1)
    generators = stream.choices()
    stripes = torch.stack([_signs((images.shape[1], 1, images.shape[3]), one, images) for one in generators])
    best = ball.project(images + ball.eps * stripes, images)
    for query in range(1, queries + 1):
        share = area / 2 ** sum(query / queries > point for point in _HALVINGS)
        tried = ball.project(_squared(best, images, ball.eps, share, generators), images)
        # Both under the same noise: the best score ever seen would be that of a lucky draw.
        better = _score(objective, tried, query, draws) > _score(objective, best, query, draws)
        best = torch.where(better.view(-1, 1, 1, 1), tried, best)
        if report is not None:
            report(query)
    return best


def _squared(best: Tensor, images: Tensor, eps: float, share: float, generators: list[torch.Generator]) -> Tensor:
    """The best images so far, each with one square of this share of its area anew."""
    channels, height, width = images.shape[1:]
    side = min(max(1, round((share * height * width) ** 0.5)), height, width)
    tried = best.clone()
    for i, generator in enumerate(generators):
        top = int(torch.randint(height - side + 1, (), generator=generator, device="cpu"))
        left = int(torch.randint(width - side + 1, (), generator=generator, device="cpu"))
        box = (i, slice(None), slice(top, top + side), slice(left, left + side))
        tried[box] = images[box] + eps * _signs((channels, 1, 1), generator, images)
    return tried


def _signs(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    return (2 * torch.randint(2, shape, generator=generator, device="cpu") - 1).to(like)


def _score(objective: Objective, images: Tensor, query: int, draws: int) -> Tensor:
    return torch.stack([objective(images, query, draw) for draw in range(draws)]).sum(0)


@dataclass(frozen=True)
class Squares:
    """Tries random squares; see ``square``. Its steps are queries."""

    area: float = 0.8
    marks: tuple[object, ...] = ("square",)

    def __call__(self, objective: Objective, images: Tensor, search: Search, stream: Stream) -> Tensor:
        if search.ball.norm != "linf":
            raise SettingError(
                f'Square Attack searches l-inf balls, and the norm is {search.ball.norm!r}. Take norm="linf", or an '
                "attack that follows gradients."
            )
        if search.step_size is not None:
            raise SettingError("Square Attack takes no step along a gradient, so it has no step_size; leave it out.")
        return square(
            objective,
            images,
            eps=search.ball.eps,
            queries=search.steps,
            draws=search.draws,
            area=self.area,
            stream=stream,
            report=search.told(images),
        )
