"""What the draws say about the part of the mean feature that is orthogonal to the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fs_plugins.certificates.bounds import Array, angular_cosine, binomial_lower, perpendicular_upper
from fs_plugins.checks import number, settle, whole
from fs_plugins.errors import SettingError


@dataclass(frozen=True)
class Angular:
    """What the angular refinement needs to know about n draws (see ``bounds.angular_cosine``).

    Args:
        t0: the threshold in [0, 1], chosen on a pilot sample that is then discarded.
        count: how many of the n draws have a score of at least t0.
        norm: that of (1/n) sum u_perp over those draws, u_perp = u - <u, v> v; a running sum suffices.
        n: draws. They may be the ones the scores come from.

    Raises:
        SettingError: numbers that cannot come from n draws.
    """

    t0: float
    count: int
    norm: float
    n: int

    def __post_init__(self) -> None:
        near = "t0, the score above which a draw counts as near, must be in [0, 1]"
        settle(
            self,
            t0=number(near, self.t0, lambda score: 0 <= score <= 1),
            count=whole("count", self.count, least=0),
            norm=number("norm is a length and must be >= 0", self.norm, lambda length: length >= 0),
            n=whole("n", self.n),
        )
        if self.count > self.n:
            raise SettingError(f"count must be between 0 and n, got count = {self.count} and n = {self.n}.")
        longest = self.count / self.n * math.sqrt(1 - self.t0**2)
        # Near a score of 1, rounding it by 1e-6 is 1.4e-3 of length.
        if self.norm > longest + 2e-3:
            raise SettingError(
                f"norm, the length of the mean of u_perp over draws with a score >= t0 = {self.t0:g}, is at most "
                f"{longest:g} for {self.count} of {self.n} draws, got {self.norm}. Divide the running sum by n."
            )

    def cosine(self, inner: Array, delta: Array, alpha: float) -> Array:
        """The bound of the cosine out of one of the inner product, which is wrong with probability at most alpha.

        Half of alpha goes to P(s >= t0) and half to the orthogonal part.

        Args:
            inner: the bound of <m(x'), v> at distances ``delta`` = eps / sigma.
        """
        mass = binomial_lower(self.count, self.n, alpha / 2)
        mu = perpendicular_upper(self.norm, t0=self.t0, n=self.n, alpha=alpha / 2)
        return np.asarray(angular_cosine(inner, mass=mass, mu=mu, t0=self.t0, delta=delta))
