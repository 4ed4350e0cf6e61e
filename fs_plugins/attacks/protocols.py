"""What an attack is: something to climb, and how to climb it. The hooks speak of it, so it knows next to nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

from fs_plugins import checks
from fs_plugins.attacks.ball import Ball

if TYPE_CHECKING:
    from fs_plugins.attacks.victim import Stream, Victim

Objective = Callable[[Tensor, int, int], Tensor]
"""(B, C, H, W) images in [0, 1], step from 1 and draw from 0 -> (B,) scores; each depends on its own image only."""


@dataclass(frozen=True)
class Search:
    """Where and how long an optimiser may look.

    Args:
        ball: where the attacked images may be.
        steps: how many; of a search without gradients, its queries.
        draws: the objective is averaged over so many draws at every step (expectation over transformation).
        step_size: length of a step in the ball's norm, [0, 1] pixel units; None is the optimiser's own choice.
        targeted: whether images shall become like their aims, or else unlike themselves.
        report: called after each step of a batch with the number of its images.
        start: which start this is, from 0; others than the first are at random.

    Raises:
        SettingError: steps, draws or step_size out of range.
    """

    ball: Ball
    steps: int
    draws: int = 1
    step_size: float | None = None
    targeted: bool = True
    report: Callable[[int], object] | None = None
    start: int = 0

    def __post_init__(self) -> None:
        step_size = None if self.step_size is None else self.ball.length("step_size", self.step_size)
        checks.settle(
            self, steps=checks.whole("steps", self.steps), draws=checks.whole("draws", self.draws), step_size=step_size
        )

    def told(self, images: Tensor) -> Callable[[int], object] | None:
        """``report`` as a loop over these images calls it: after each step, with the step's number."""
        report = self.report
        return None if report is None else lambda step: report(len(images))


class Optimiser(Protocol):
    """Climbs objectives: ``Ascent`` along gradients, ``Squares`` without.

    ``marks`` are of its randomness, beside the seed: optimisers of different marks draw apart.
    """

    @property
    def marks(self) -> tuple[object, ...]: ...

    def __call__(self, objective: Objective, images: Tensor, search: Search, stream: Stream) -> Tensor:
        """(B, C, H, W) images in [0, 1] -> attacked ones, in the ball and in [0, 1], of no more gradient.

        Args:
            stream: of all its own randomness.

        Raises:
            SettingError: the search has something that this optimiser cannot do.
            ModelError: the objective cannot be climbed.
        """


@runtime_checkable
class Attack(Protocol):
    """What ``attack(..., method=...)`` takes. ``Method`` is one that a similarity of pictures makes."""

    @property
    def name(self) -> str:
        """For tables."""

    @property
    def optimiser(self) -> Optimiser:
        """How the objective is climbed."""

    def objective(self, victims: Sequence[Victim], aims: Tensor, stream: Stream, sign: int) -> Objective:
        """What is climbed for one batch of images.

        Args:
            victims: the encoders; several are an ensemble.
            aims: (B, C, H, W) in [0, 1]: the targets, or the images themselves.
            stream: the images' randomness; ``stream.at(step, draw)`` is that of one draw.
            sign: 1 to become like the aims, -1 to become unlike them.

        Raises:
            ModelError: the encoders show nothing that this attack could climb.
        """
