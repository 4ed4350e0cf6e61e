"""An attack that is watched while it runs, and can be stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fs_plugins.attacks import METHODS, Attack, Objective, Optimiser, attack
from fs_plugins.playground.live import Stopped, Tell
from fs_plugins.playground.models import Subject
from fs_plugins.playground.pictures import Picture, rounded
from fs_plugins.playground.state import State
from fs_plugins.smoothing import FeatureSmoother


@dataclass(frozen=True, eq=False)
class Frame:
    """How far an attack is.

    Args:
        image: (C, H, W) in [0, 1], after ``step`` steps of ``steps``.
    """

    image: Tensor
    step: int
    steps: int


@dataclass(frozen=True, eq=False)
class Attacked:
    """What an attack has come to.

    Args:
        image: (C, H, W) in [0, 1], multiples of 1/255.
        steps: that were made; fewer than asked for, if it was stopped.
    """

    image: Tensor
    steps: int


@dataclass(frozen=True)
class Watched:
    """An attack whose objective is seen before every step: (B, C, H, W) images, and the steps that made them."""

    of: Attack
    see: Callable[[Tensor, int], object]

    @property
    def name(self) -> str:
        return self.of.name

    @property
    def optimiser(self) -> Optimiser:
        return self.of.optimiser

    def objective(self, victims: Sequence[Any], aims: Tensor, stream: Any, sign: int) -> Objective:
        climbed = self.of.objective(victims, aims, stream, sign)

        def watched(images: Tensor, step: int, draw: int) -> Tensor:
            if draw == 0:
                self.see(images.detach(), step - 1)
            return climbed(images, step, draw)

        return watched


def attacked(
    subject: Subject,
    smoother: FeatureSmoother,
    state: State,
    clean: Picture,
    aim: Picture | None,
    tell: Tell[Frame],
) -> Attacked:
    """Attack a picture as a state says: ``fs_plugins.attacks.attack``, rounded to what a PNG keeps.

    Where ``tell`` raises ``Stopped``, that is the picture after the steps that were made: what an attack of so many
    steps of this size gives.

    Raises:
        SettingError, ModelError: as for ``attack``.
    """
    last = Frame(clean.image, 0, state.steps)

    def see(images: Tensor, step: int) -> None:
        nonlocal last
        last = Frame(images[0], step, state.steps)
        tell(last)

    try:
        found = attack(
            smoother if state.adaptive else subject.call,
            clean.image[None],
            None if aim is None else aim.image[None],
            method=Watched(METHODS[state.attack], see),
            eps=state.eps / 255,
            step_size=state.step_size / 255,
            steps=state.steps,
            seed=state.seed,
        )
    except Stopped:
        return Attacked(rounded(last.image), last.step)
    return Attacked(rounded(found[0]), state.steps)
