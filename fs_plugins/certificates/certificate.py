"""What is certified about one image's feature, as a value: made from scores, asked for bounds, kept as JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike

from fs_plugins.certificates.angular import Angular
from fs_plugins.certificates.bounds import Array, Band, furthest, plugin_mean, served_quantile
from fs_plugins.certificates.methods import CERTIFIED, DISTRIBUTION, METHODS, Method, method_of
from fs_plugins.certificates.values import (
    CLEAN,
    FRESH,
    PIXELS,
    Stored,
    alpha_of,
    distance_of,
    distances_of,
    scores_of,
    share_of,
    sigma_of,
)
from fs_plugins.checks import number, settle
from fs_plugins.errors import SettingError

if TYPE_CHECKING:
    from fs_plugins.noise import Noise


@dataclass(frozen=True, kw_only=True)
class Certificate(Stored):
    """How far the smoothed feature of one image can turn under attack.

    **The contract.** Let v be the fixed unit ``reference``, m(x') the mean unit feature of the smoothed encoder at
    x' (unit features averaged over N(x', sigma^2 I)), and eps an l2 distance in the certified ``space``. With
    probability at least 1 - alpha over the n draws behind this certificate, at once for every eps and every
    image x' within eps of the certified one (also one chosen after seeing the draws),

        cos(m(x'), v) >= fcsb(eps)   wherever fcsb(eps) is not None,

    so that the cosine stays at ``threshold`` or above within ``radius(threshold)``. None means that nothing is
    promised, never that something bad happens. The statement is about the infinite average m; ``served_fcsb`` is about
    the n0 draws that are really served. It assumes that the draws were i.i.d. Gaussian with standard deviation sigma,
    that the clean image was chosen without knowledge of them, and that no pixel was clamped between
    image + noise and the function that is certified.

    ``method`` says how:

    - ``"plugin"``: the paper's formula with the sample mean in it. **An estimate, not a certificate**: nothing is
      promised at any confidence, and the contract above does not apply. For comparison with published tables.
    - ``"mean"``: the paper's formula with a betting lower bound of the mean score.
    - ``"distribution"``: every event {s > t} at once, with a lower band of the score's distribution.
    - ``"best"``: the larger of the last two at every eps, each at half of alpha.

    With ``angular`` statistics the inner product is turned into a cosine. Then half of alpha goes to the
    method's bound of the inner product, a quarter to P(s >= t0) and a quarter to the orthogonal part.

    Of all that it holds, only ``share`` of alpha is spent: a sampler that looks at several sample sizes and stops at
    one it likes gives the looks shares that were fixed beforehand and add up to at most 1; then the one it stops at
    holds with probability at least 1 - alpha.

    Args:
        sigma: standard deviation of the noise, in the units of ``space``.
        n: scores.
        alpha: the probability that the certificate may be wrong.
        method: one of the above.
        mean: the sample mean of the scores.
        lower: the lower confidence bound of the mean score (``mean`` and ``best``).
        band: the lower band of the score's distribution (``distribution`` and ``best``).
        angular: statistics for the angular refinement.
        share: the part of alpha that this certificate may spend.
        space: in which space, and by which norm, eps and sigma are measured.
        image_shape: of the certified tensor, (C, H, W) or with tiles or frames in front; the attacker may
            change all of it.
        readouts: what of the encoder's output is certified.
        reference: what v is.
        encoder: the encoder's fingerprint.
        psm: the PSM's name, None for plain smoothing.
        seed: how the noise was seeded.
        non_finite: draws with NaN or infinite features, which count as a score of -1.
        unrelated: the mean cosine between features of unrelated clean images of this encoder, so that a reader can
            see how far a threshold is from nothing.

    Raises:
        SettingError: a value out of range, or statistics that the method lacks.
    """

    sigma: float
    n: int
    alpha: float
    method: str
    mean: float
    lower: float | None = None
    band: Band | None = None
    angular: Angular | None = None
    share: float = 1.0
    space: str = PIXELS
    image_shape: tuple[int, ...] | None = None
    readouts: tuple[str, ...] = ()
    reference: str = CLEAN
    encoder: tuple[float, ...] | None = None
    psm: str | None = None
    seed: str = FRESH
    non_finite: int = 0
    unrelated: float | None = None

    kind: ClassVar[str] = "features"

    def __post_init__(self) -> None:
        self._settle()
        _method(self.method, self.angular).check(self)
        for name in ("mean", "lower", "unrelated"):
            if (value := getattr(self, name)) is not None:
                expected = f"{name} is a cosine and must be in [-1, 1]"
                settle(self, **{name: number(expected, value, lambda cosine: -1 <= cosine <= 1)})

    @classmethod
    def from_scores(
        cls,
        scores: Any,
        *,
        sigma: float,
        alpha: float = 1e-3,
        method: str = "best",
        angular: Angular | None = None,
        share: float = 1.0,
        **details: Any,
    ) -> Self:
        """The certificate that n i.i.d. scores give.

        Args:
            scores: (n,) numpy array, torch tensor or list of <u, v> in [-1, 1], in any order. Rounding up to 1e-6
                outside is clipped.
            sigma, alpha, method, angular, share: see the class.
            details: the class's descriptive fields (``space``, ``image_shape``, ``readouts``, ``reference``,
                ``encoder``, ``psm``, ``seed``, ``non_finite``, ``unrelated``).

        Raises:
            SettingError: scores that are none, a setting out of range, or an unknown method.
        """
        # Sorted, so that not even the rounding depends on the order they came in.
        values = np.sort(scores_of(scores))
        sigma, alpha, share = sigma_of(sigma, details.get("space", PIXELS)), alpha_of(alpha), share_of(share)
        spent = alpha * share / (1 if angular is None else 2)
        statistics: dict[str, Any] = {"mean": plugin_mean(values), **_method(method, angular).statistics(values, spent)}
        return cls(
            sigma=sigma,
            n=len(values),
            alpha=alpha,
            method=method,
            angular=angular,
            share=share,
            **statistics,
            **details,
        )

    @property
    def is_estimate(self) -> bool:
        """Whether this is the paper's estimate, which holds at no confidence, rather than a certificate."""
        return method_of(self.method).is_estimate

    @property
    def is_empty(self) -> bool:
        """Whether nothing is promised even without an attack: scores too low, or too few for alpha."""
        return self.fcsb(0.0) is None

    def fcsb(self, eps: float) -> float | None:
        """The certified cosine at l2 distance eps, in [0, 1]; None where nothing is promised.

        Raises:
            SettingError: a negative eps.
        """
        value = float(self._bound(distance_of(eps)))
        return value if value > 0 else None

    def curve(self, eps: ArrayLike) -> Array:
        """``fcsb`` at many l2 distances at once, of their shape; NaN where nothing is promised."""
        value = self._bound(distances_of(eps))
        return np.where(value > 0, value, np.nan)

    def by(self, method: str) -> Certificate:
        """What one of this certificate's bounds says alone, for comparison on the same draws.

        It spends only its own part of alpha (a quarter where "best" was refined, see the class), and has no angular
        refinement. ``"plugin"`` is the paper's estimate and no certificate.

        Raises:
            SettingError: this certificate has no such bound.
        """
        wanted, own = method_of(method), method_of(self.method)
        if wanted is own and self.angular is None:
            return self
        if not all(own.holds(part) for part in wanted.parts):
            raise SettingError(f"This certificate was made with method={own.name!r} and has no bound {wanted.name!r}.")
        share = self.share / (1 if self.angular is None else 2) * (len(wanted.parts) / len(own.parts))
        needed = {part.field for part in wanted.parts}
        others: dict[str, Any] = {part.field: None for part in own.parts if part.field not in needed}
        if wanted.is_estimate:  # which spends nothing
            share = self.share
        return replace(self, method=wanted.name, angular=None, share=share, **others)

    def curves(self, eps: ArrayLike) -> dict[str, Array]:
        """What each bound of this certificate says by itself (see ``by``); NaN where it says nothing.

        ``"plugin"`` is the paper's estimate on the same draws and no certificate. ``"certified"`` is ``curve``.
        """
        found = {one.name: self.by(one.name).curve(eps) for one in method_of(self.method).alone()}
        return found if self.is_estimate else {**found, CERTIFIED: self.curve(eps)}

    def radius(self, threshold: float = 0.5) -> float | None:
        """The largest l2 distance at which the certified cosine is at least ``threshold``.

        None where it is not even without an attack. Infinite only for the estimate of scores that are all 1.

        Raises:
            SettingError: a threshold outside [0, 1].
        """
        expected = "threshold is a cosine that can be certified, in [0, 1] (0.5 is usual)"
        threshold = number(expected, threshold, lambda cosine: 0 <= cosine <= 1)
        # At 0 itself nothing is promised.
        level = max(threshold, float(np.finfo(np.float64).tiny))
        delta = furthest(lambda delta: float(self._bound(np.array(delta * self.sigma))), level)
        return None if delta is None else delta * self.sigma

    def linf_radius(self, threshold: float = 0.5) -> float | None:
        """The l-inf distance that is certainly within ``radius``: divided by the root of the number of values.

        Raises:
            SettingError: ``image_shape`` is unknown.
        """
        if self.image_shape is None:
            raise SettingError(
                "An l-inf radius needs the number of values in the image, and this certificate has no image_shape. "
                "Pass image_shape=(C, H, W) to Certificate.from_scores."
            )
        radius = self.radius(threshold)
        return None if radius is None else radius / math.sqrt(math.prod(self.image_shape))

    def l1_radius(self, threshold: float = 0.5) -> float | None:
        """The l1 distance that is certainly within ``radius``: the same number, as l2 never exceeds l1."""
        return self.radius(threshold)

    def served_fcsb(self, eps: float, n0: int, beta: float, noise: Noise = "antithetic") -> float | None:
        """The certified cosine of what n0 draws serve, rather than of the infinite average.

        With probability at least 1 - alpha over the draws behind this certificate, the following holds for every
        image within l2 distance eps that was chosen without knowledge of the serving noise: with probability at
        least 1 - beta over that noise, the cosine of the served mean of n0 unit features and the reference is at
        least this. None where nothing is promised, which is often the case: one draw in 1/beta must not be lost.

        Args:
            eps: l2 distance in ``space``.
            n0: draws per served image.
            beta: the probability that one served answer may miss.
            noise: how the draws are served, ``"antithetic"`` (the default of ``enable``) or ``"iid"``.

        Raises:
            SettingError: a value out of range, or a method without a band.
        """
        if self.band is None:
            able = " or ".join(sorted(f'"{one.name}"' for one in METHODS.values() if DISTRIBUTION in one.parts))
            raise SettingError(
                f"method={self.method!r} knows only the mean score; what n0 draws serve follows from its distribution. "
                f"Make the certificate with method={able}."
            )
        value = served_quantile(self.band, float(distance_of(eps)) / self.sigma, n0, beta, noise)
        return value if value > 0 else None

    def __str__(self) -> str:
        """One line for people."""
        origin = f"{self.method}, n = {self.n}, sigma = {self.sigma:g}"
        if self.is_estimate:
            kind = f"estimate, not a certificate ({origin})"
        else:
            kind = f"certificate ({origin}, confidence {1 - self.alpha:.6g})"
        if self.is_empty:
            return f"{kind}: nothing is promised, the scores are too low or too few for alpha = {self.alpha:g}"
        radius = self.radius()
        if radius is None:
            return f"{kind}: cosine >= {self.fcsb(0.0):.3f} without an attack, nowhere >= 0.5"
        return f"{kind}: cosine >= 0.5 within l2 distance {radius:.3f}"

    def _bound(self, eps: Array) -> Array:
        """The bound of the cosine at l2 distances eps, where it is not negative."""
        delta = eps / self.sigma
        inner = method_of(self.method).bound(self, delta)
        if self.angular is None:
            return inner
        return self.angular.cosine(inner, delta, self.alpha * self.share / 2)


def _method(name: str, angular: Angular | None) -> Method:
    method = method_of(name)
    if method.is_estimate and angular is not None:
        raise SettingError(f"method={name!r} is an estimate ({method.title}); it takes no angular statistics.")
    return method
