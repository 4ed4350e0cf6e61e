"""What a training is: its stages, the weights of their losses, and which parts they train."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import BaseModel
from torch import Tensor

from fs_plugins import checks
from fs_plugins.attacks.ball import Ball, Norm
from fs_plugins.errors import SettingError
from fs_plugins.psm import Part


@dataclass(frozen=True)
class Stage:
    """Optimisation of one stage: AdamW with warm-up and cosine annealing.

    Args:
        steps: of the optimiser; 0 leaves the stage out.
        batch_size: images a forward, in every process.
        draws: noisy copies of each image.
        lr: the highest learning rate, reached after ``warmup`` steps.
        ema: decay of the moving average that is kept in the end; None keeps the last weights.
        accumulate: forwards a step, for batches that do not fit memory. The moments of ``losses.statistics`` are each
            forward's own; the other losses are the same as in one forward.

    Raises:
        SettingError: a value out of range.
    """

    steps: int
    batch_size: int = 16
    draws: int = 8
    lr: float = 2e-4
    warmup: int = 100
    ema: float | None = None
    accumulate: int = 1

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("batch_size", 1), ("draws", 1), ("warmup", 0), ("accumulate", 1)):
            checks.settle(self, **{name: checks.whole(f"A stage's {name}", getattr(self, name), least=least)})
        lr = checks.number("A stage's lr (learning rate) must be positive", self.lr, lambda rate: rate > 0)
        checks.settle(self, lr=lr)
        if self.ema is not None:
            expected = "A stage's ema is a decay in [0, 1) (0.99 is the paper's), or None"
            checks.settle(self, ema=checks.number(expected, self.ema, lambda decay: 0 <= decay < 1))

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        return self.lr * rise * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))

    def images(self, processes: int) -> int:
        """Images in one step of the optimiser."""
        return self.batch_size * self.accumulate * processes


@dataclass(frozen=True)
class Adversary:
    """The attacker of the adversarial stage, who knows of the smoothing: its gradients go through the whole pipeline.

    Each picture of a batch is attacked for as many passes as the stage has ``draws``, with fresh noise in each, from a
    random start in its ball. A pass moves the attack, and every ``update_every``-th one the weights as well ("free"
    training; Shafahi et al., NeurIPS 2019).

    Args:
        norm, eps: the largest ball around each picture, in [0, 1] pixel units; see ``attacks.Ball``. Each picture has a
            radius of its own, evenly from an eighth of it to all of it.
        step_size: share of the radius.
        ramp: share of the stage's steps in which ``eps`` rises from 0.
        targeted: share of the pictures that are pulled towards another picture's feature or answer; the others are
            driven from their own.
        update_every: passes an update of the weights; 1 moves them at each.
        reader: share of the batches that ask, in the model's place, a small net that learned before what it says of
            features. It costs next to nothing.
        reader_steps: of that learning.

    Raises:
        SettingError: a value out of range.
    """

    norm: Norm = "linf"
    eps: float = 16 / 255
    step_size: float = 0.4
    ramp: float = 0.15
    targeted: float = 0.0
    update_every: int = 1
    reader: float = 0.0
    reader_steps: int = 400

    def __post_init__(self) -> None:
        ball = Ball(self.norm, self.eps)
        every = checks.whole("The adversary's update_every", self.update_every)
        steps = checks.whole("The adversary's reader_steps", self.reader_steps)
        checks.settle(self, eps=ball.eps, update_every=every, reader_steps=steps)
        expected = "The adversary's step_size is a share of the radius and must be above 0"
        checks.settle(self, step_size=checks.number(expected, self.step_size, lambda share: share > 0))
        for name in ("ramp", "targeted", "reader"):
            expected = f"The adversary's {name} is a share in [0, 1]"
            checks.settle(self, **{name: checks.number(expected, getattr(self, name), lambda share: 0 <= share <= 1)})

    def radii(self, progress: float, places: Tensor) -> Tensor:
        """(B,) numbers in [0, 1) -> the pictures' radii, after this share of the stage."""
        grown = min(1.0, progress / self.ramp) if self.ramp else 1.0
        return grown * self.eps * (1 + 7 * places) / 8


@dataclass(frozen=True)
class TrainingConfig:
    """The paper's settings by default.

    Args:
        sigma: noise level to serve at, in [0, 1] pixel units; ``sigma_range`` is what is drawn in training.
        lambda1, lambda2: weights of consistency and reconstruction in the purifier's loss (eq. 9).
        lambda3, lambda4: weights of statistics and identity in the mapper's loss (eq. 13).
        lambda_diff: weight of the denoising loss, of purifiers that have one (1 in eq. 9).
        lambda_adv, lambda_say, lambda_pixels: weights of the adversarial stage's losses: consistency and, where the
            model can be asked, the divergence of its answers, and reconstruction, all of attacked pictures.
        purifier, mapper: which parts, with which arguments; None leaves one out. Several purifiers are a cascade: each
            sees what the one before made.
        adversarial: the attacker of the third stage, which trains all parts together; None leaves it out.
        seed: of the weights, the order of the images, and every draw.
        augment: crops and mirror images in place of the centre crop, of data sets that have them (``ImageFolder``).

    Raises:
        SettingError: a value out of range, or nothing to train.
    """

    sigma: float = 0.25
    sigma_range: tuple[float, float] | None = None
    purifier: Part | Sequence[Part] | None = field(default_factory=lambda: Part(kind="unet"))
    mapper: Part | None = field(default_factory=lambda: Part(kind="residual"))
    purifier_stage: Stage = Stage(steps=12_000, lr=5e-5, ema=0.99)
    mapper_stage: Stage = Stage(steps=2_500)
    adversarial: Adversary | None = None
    adversarial_stage: Stage = Stage(steps=6_000, batch_size=32, draws=4, lr=5e-4, ema=0.998)
    lambda1: float = 0.25
    lambda2: float = 0.25
    lambda3: float = 100.0
    lambda4: float = 0.25
    lambda_diff: float = 1.0
    lambda_adv: float = 0.5
    lambda_say: float = 1.0
    lambda_pixels: float = 0.02
    seed: int = 0
    augment: bool = False

    def __post_init__(self) -> None:
        checks.settle(self, sigma=checks.sigma(self.sigma), seed=checks.seed(self.seed))
        if self.sigma_range is not None:
            checks.settle(self, sigma_range=_span(self.sigma_range))
        low, high = self.sigmas
        if not 0 < low <= self.sigma <= high:
            raise SettingError(
                f"sigma must be positive, in [0, 1] pixel units (0.25 is usual), and inside sigma_range; "
                f"got sigma {self.sigma!r} and sigma_range {self.sigma_range!r}."
            )
        checks.settle(self, purifier=self.purifying)
        if self.adversarial is not None and self.adversarial_stage.accumulate > 1:
            raise SettingError("The adversarial stage attacks one batch at a time: its accumulate must be 1.")
        for name in _WEIGHTS:
            expected = f"{name} weighs a loss and must be >= 0"
            checks.settle(self, **{name: checks.number(expected, getattr(self, name), lambda weight: weight >= 0)})
        if self.purifier is None and self.mapper is None:
            raise SettingError("Nothing to train: both purifier and mapper are None.")

    @property
    def purifying(self) -> Part | None:
        """The purifier; several as the cascade that they are."""
        return (
            self.purifier if self.purifier is None or isinstance(self.purifier, Part) else Part.cascade(self.purifier)
        )

    @property
    def sigmas(self) -> tuple[float, float]:
        """The lowest and the highest noise level."""
        return self.sigma_range or (self.sigma, self.sigma)

    @property
    def stages(self) -> dict[str, Stage]:
        """The stages that there are to run, in order."""
        parts = {
            "purifier": (self.purifier, self.purifier_stage),
            "mapper": (self.mapper, self.mapper_stage),
            "adversarial": (self.adversarial, self.adversarial_stage),
        }
        return {name: stage for name, (part, stage) in parts.items() if part is not None and stage.steps}

    def weights(self, stage: str) -> dict[str, float]:
        """Loss term -> its weight in this stage."""
        if stage == "purifier":
            return {"l_diff": self.lambda_diff, "l_rb": self.lambda1, "l_mse": self.lambda2}
        if stage == "adversarial":
            adv, say, pixels = self.lambda_adv, self.lambda_say, self.lambda_pixels
            return {"l_adv": adv, "l_pull": adv, "l_say": say, "l_mse": pixels}
        return {"l_rb": 1.0, "l_stats": self.lambda3, "l_id": self.lambda4}

    def as_json(self) -> dict[str, Any]:
        """The same as plain values."""
        told = asdict(self)
        if self.adversarial is None:  # what came later leaves trainings without it as they were
            told = {name: value for name, value in told.items() if name not in _LATER}
        return {name: value.model_dump() if isinstance(value, BaseModel) else value for name, value in told.items()}


_LATER = ("adversarial", "adversarial_stage", "lambda_adv", "lambda_say", "lambda_pixels")
_WEIGHTS = ("lambda1", "lambda2", "lambda3", "lambda4", "lambda_diff", "lambda_adv", "lambda_say", "lambda_pixels")


def _span(given: Any) -> tuple[float, float]:
    try:
        low, high = given
    except (TypeError, ValueError):
        raise SettingError(f"sigma_range is the lowest and the highest noise level, got {given!r}.") from None
    return checks.sigma(low), checks.sigma(high)
