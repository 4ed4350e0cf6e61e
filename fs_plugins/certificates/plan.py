"""How one image is certified: how many draws, by which method, when to stop early."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fs_plugins.certificates.methods import DEFAULT, method_of
from fs_plugins.certificates.values import alpha_of
from fs_plugins.checks import number, settle, whole

LOOKS = (0.125, 0.25, 0.5, 1.0)
"""With a target radius: after which parts of n the certificate is looked at, each at an equal share of alpha."""


@dataclass(frozen=True)
class Plan:
    """How one image is certified.

    Args:
        n: draws at most.
        alpha: the probability that a certificate may be wrong.
        method: see Certificate.
        angular: whether to refine the inner product to a cosine; costs a pilot of n / 10 draws, at most 100.
        target: an l2 radius for ``threshold``. Sampling stops as soon as it is certified, or as soon as not even
            scores of 1 from then on could certify it. Fixed looks share alpha, so what is certified holds.
        threshold: the cosine that ``target`` speaks of.

    Raises:
        SettingError: a value out of range.
    """

    n: int = 1000
    alpha: float = 1e-3
    method: str = DEFAULT
    angular: bool = True
    target: float | None = None
    threshold: float = 0.5

    def __post_init__(self) -> None:
        method_of(self.method)
        cosine = "threshold is a cosine in [0, 1] (0.5 is usual)"
        settle(
            self,
            n=whole("n (draws per image)", self.n),
            alpha=alpha_of(self.alpha),
            threshold=number(cosine, self.threshold, lambda threshold: 0 <= threshold <= 1),
        )
        if self.target is not None:
            expected = "target must be an l2 radius > 0 in [0, 1] pixels"
            settle(self, target=number(expected, self.target, lambda radius: radius > 0))

    @property
    def pilot(self) -> int:
        """Draws that choose the angular threshold."""
        return pilot_size(self.n) if self.angular and not method_of(self.method).is_estimate else 0

    @property
    def looks(self) -> tuple[int, ...]:
        """After how many draws the certificate is looked at."""
        if self.target is None:
            return (self.n,)
        return tuple(sorted({max(1, math.ceil(part * self.n)) for part in LOOKS}))

    @property
    def share(self) -> float:
        """The part of alpha that each look may spend."""
        return 1 / len(self.looks)


def pilot_size(n: int) -> int:
    """How many draws choose settings for n others."""
    return min(100, max(10, n // 10))
