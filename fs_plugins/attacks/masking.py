"""Does a defence hold, or does it only hide its gradients? The tests of Athalye et al. (ICML 2018, arXiv 1802.00420)
and Carlini et al. (2019, arXiv 1902.06705), on the features that a smoothed encoder serves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from fs_plugins import checks
from fs_plugins.attacks.ball import Ball
from fs_plugins.attacks.methods import attack_of
from fs_plugins.attacks.protocols import Attack, Objective
from fs_plugins.attacks.run import aims_of, attack
from fs_plugins.attacks.squares import Squares
from fs_plugins.attacks.victim import Attackable, Stream, Victim, victims
from fs_plugins.errors import ModelError, SettingError
from fs_plugins.pictures import Picture
from fs_plugins.smoothing import FeatureSmoother
from fs_plugins.vision import VisionCall

REPEATS = 4
"""Served features that each attacked image is judged by, from draws that no attack has seen."""


@dataclass(frozen=True)
class Strength:
    """How far one attack got.

    Args:
        name: which.
        margins: for each image, cosine of the served feature to the target's less that to the image's own. Above 0 the
            attack has succeeded.
    """

    name: str
    margins: tuple[float, ...]

    @property
    def success(self) -> float:
        return sum(margin > 0 for margin in self.margins) / len(self.margins)

    @property
    def mean(self) -> float:
        return sum(self.margins) / len(self.margins)


@dataclass(frozen=True)
class MaskingReport:
    """What ``check_gradients`` found; ``str()`` of it is for people.

    Args:
        eps: l-inf, in [0, 1] pixel units.
        attacks: none, oblivious, gradient-free, and adaptive with a quarter of the steps and with all.
        unbounded: share of images that the adaptive attack makes unlike themselves when eps is 1.
        problems: what speaks for masked gradients; empty if nothing does.
    """

    eps: float
    attacks: tuple[Strength, ...]
    unbounded: float
    problems: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{one.name:28} success {one.success:6.1%}   margin {one.mean:+.3f}" for one in self.attacks]
        lines.append(f"{'adaptive, eps 1, untargeted':28} success {self.unbounded:6.1%}")
        verdict = self.problems or ("Nothing speaks for masked gradients.",)
        return "\n".join([f"l-inf eps {255 * self.eps:g}/255, {len(self.attacks[0].margins)} images", *lines, *verdict])


def check_gradients(
    model: Attackable | Sequence[Attackable],
    images: Picture | Iterable[Picture],
    targets: Picture | Iterable[Picture],
    *,
    eps: float = 16 / 255,
    steps: int = 100,
    draws: int = 2,
    queries: int = 500,
    method: str | Attack = "attackvlm",
    seed: int = 0,
    batch_size: int = 32,
    confidence: float = 0.99,
    advance: Callable[[int], object] | None = None,
) -> MaskingReport:
    """Compare attacks that must be ordered if the gradients are honest.

    The adaptive attack must be no weaker than the oblivious one, than itself with a quarter of the steps, and than a
    gradient-free search; and without a bound on eps it must make every image unlike itself. "Weaker" is a paired
    one-sided t-test of the margins at this confidence.

    Args:
        model: the defence: one of ``fs_plugins.smoothers(model)``, or a model on which smoothing is enabled.
        images, targets: (B, C, H, W) in [0, 1], B >= 2, or a list of pictures, see ``attack``.
        eps: l-inf, in [0, 1] pixel units.
        steps, draws, method, seed, batch_size: of the attacks, see ``attack``; the method follows gradients.
        queries: of the gradient-free search, which climbs the method's objective.
        advance: called with numbers of forward-backward passes of images, which are ``effort`` in all.

    Raises:
        SettingError: fewer than two images, a method that follows no gradients, or see ``attack``.
        ModelError: nothing is smoothed.
    """
    smoother, chosen = _defence(model), attack_of(method)
    eps, steps = Ball("linf", eps).eps, checks.whole("steps", steps)
    draws, queries = checks.whole("draws", draws), checks.whole("queries", queries)
    seed, batch_size = checks.seed(seed), checks.whole("batch_size", batch_size)
    level = "confidence is that of a test and must be in (0, 1)"
    confidence = checks.number(level, confidence, lambda found: 0 < found < 1)
    shown = smoother.call.batch("images", images)
    aims = aims_of(smoother.call, targets, shown)
    if len(shown) < 2:
        raise SettingError(f"Attacks are compared over at least two images, got {len(shown)}.")
    if isinstance(chosen.optimiser, Squares):
        raise SettingError(f"{chosen.name} follows no gradients, so it cannot test any; take another method.")
    options: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "report": advance}

    def adaptive(count: int) -> Tensor:
        return attack(smoother, shown, aims, method=chosen, eps=eps, steps=count, draws=draws, **options)

    searched = _Searched(chosen)
    found = {
        "no attack": shown,
        "oblivious": attack(smoother.call, shown, aims, method=chosen, eps=eps, steps=steps, **options),
        "gradient-free": attack(smoother, shown, aims, method=searched, eps=eps, steps=queries, **options),
    }
    problems: list[str] = []
    unbounded = 0.0
    try:
        found["adaptive, a quarter"] = adaptive(max(1, steps // 4))
        found["adaptive"] = adaptive(steps)
        free = attack(smoother, shown, method=chosen, eps=1.0, steps=steps, draws=draws, **options)
    except ModelError as error:
        problems.append(str(error))
    else:
        unbounded = _estranged(smoother.call, shown, _served(smoother, free, seed, batch_size))
    own, aim = (_cosines_to(smoother.call, some) for some in (shown, aims))
    strengths = {}
    for name, attacked in found.items():
        served = _served(smoother, attacked, seed, batch_size)
        strengths[name] = Strength(name, tuple((aim(served) - own(served)).tolist()))
    if not problems:
        problems += _disordered(strengths, confidence, unbounded)
    return MaskingReport(eps, tuple(strengths.values()), unbounded, tuple(problems))


def _defence(model: Attackable | Sequence[Attackable]) -> FeatureSmoother:
    """The one pipeline that is to be tested."""
    several = victims(model)
    if len(several) > 1 or several[0].smoother is None:
        raise ModelError(
            "check_gradients tests one defence: one of fs_plugins.smoothers(model), or a model on which smoothing is "
            "enabled. Without smoothing there is nothing to test."
        )
    return several[0].smoother


@dataclass(frozen=True)
class _Searched:
    """An attack's objective, climbed without gradients."""

    follows: Attack
    optimiser: Squares = field(default_factory=Squares)

    @property
    def name(self) -> str:
        return f"{self.follows.name}, gradient-free"

    def objective(self, victims: Sequence[Victim], aims: Tensor, stream: Stream, sign: int) -> Objective:
        return self.follows.objective(victims, aims, stream, sign)


def _disordered(strengths: dict[str, Strength], confidence: float, unbounded: float) -> list[str]:
    """What is not as it must be if the gradients are honest."""
    rivals = {
        "the oblivious one": "oblivious",
        "a gradient-free search": "gradient-free",
        "itself with a quarter of the steps": "adaptive, a quarter",
    }
    problems = [
        f"The adaptive attack is weaker than {what}."
        for what, name in rivals.items()
        if _weaker(strengths["adaptive"].margins, strengths[name].margins, confidence)
    ]
    if unbounded < 1:
        problems.append(f"With eps 1, where any picture is allowed, {1 - unbounded:.0%} of the images still resist.")
    return problems


def effort(images: int, *, steps: int = 100, queries: int = 500) -> int:
    """How much ``check_gradients`` will tell ``advance`` in all."""
    return images * (steps + queries + max(1, steps // 4) + 2 * steps)


@torch.no_grad()
def _served(smoother: FeatureSmoother, images: Tensor, seed: int, batch_size: int) -> Tensor:
    """(REPEATS, B, E): what is served for the images, at draws of the judge's own."""
    victim, keys = Victim(smoother), tuple(range(len(images)))
    repeats = []
    for i in range(REPEATS):
        parts = [slice(first, first + batch_size) for first in range(0, len(images), batch_size)]
        repeats.append(torch.cat([victim.see(images[p], Stream((seed, "judge", i), keys[p])).embedding for p in parts]))
    return torch.stack(repeats)


@torch.no_grad()
def _cosines_to(call: VisionCall, images: Tensor) -> Callable[[Tensor], Tensor]:
    """Served features (R, B, E) -> (B,) mean cosine to the plain features of these images."""
    plain = Victim(call).see_plain(images).embedding
    return lambda served: torch.cosine_similarity(served, plain[None], dim=-1).mean(0)


def _estranged(call: VisionCall, images: Tensor, served: Tensor) -> float:
    """Share of images whose served feature is nearer to another image's plain feature than to its own."""
    plain = torch.nn.functional.normalize(Victim(call).see_plain(images).embedding, dim=-1)
    near = torch.nn.functional.normalize(served.mean(0), dim=-1) @ plain.T
    return (near.argmax(1) != torch.arange(len(images), device=near.device)).float().mean().item()


def _weaker(ours: tuple[float, ...], rivals: tuple[float, ...], confidence: float) -> bool:
    """Whether the rival's margins are larger, image by image, beyond what chance explains."""
    apart = np.subtract(rivals, ours)
    if np.ptp(apart) == 0:
        return bool(apart[0] > 0)
    return bool(stats.ttest_1samp(apart, 0, alternative="greater").pvalue < 1 - confidence)
