"""The mathematics of the certificates: numbers in, bounds out.

Letters as on paper. ``s = <u, v>`` in [-1, 1] is the score of one draw: its unit feature ``u`` against a fixed unit
reference ``v``. ``m(x')`` is the mean of ``u`` over Gaussian noise of standard deviation sigma around ``x'``, and
``delta = eps / sigma`` the l2 distance of ``x'`` from the clean image ``x``. All bounds hold for every ``x'`` within
``delta`` at once and never rise with it. They bound ``<m(x'), v>``, and so the cosine of ``m(x')`` and ``v`` where
they are not negative; **a negative bound promises nothing about the cosine**.

The bounds under attack rest on one lemma: for every event ``E`` that happens at ``x`` with probability ``p``,
``P_x'(E) >= g(p) = Phi(Phi^-1(p) - delta)`` (Cohen, Rosenfeld and Kolter 2019, "Certified adversarial robustness via
randomized smoothing", Lemma 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.fft
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import betaincinv, logsumexp, ndtr, ndtri

from fs_plugins import checks
from fs_plugins.checks import number, settle, whole
from fs_plugins.errors import SettingError

if TYPE_CHECKING:
    from fs_plugins.noise import Noise

Array = NDArray[np.float64]

FARTHEST = 64.0
"""In standard deviations: beyond it g is 0 in double precision for every p < 1."""


def shifted(p: ArrayLike, delta: ArrayLike) -> Any:
    """g(p) = Phi(Phi^-1(p) - delta), elementwise; exact at p = 0, p = 1 and delta = 0.

    ``shifted(q, -delta)`` is the most that an event of probability q can gain.
    """
    p, delta = np.asarray(p, dtype=np.float64), np.asarray(delta, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        moved = ndtr(ndtri(p) - delta)
    return np.where((delta == 0) | (p == 0) | (p == 1), p, moved)[()]


def furthest(bound: Callable[[float], float], level: float) -> float | None:
    """The largest delta at which a bound that never rises is at least ``level``, rounded down by at most 1e-10.

    None where it is below the level even at delta = 0; infinity where it never falls below.
    """
    if not bound(0.0) >= level:
        return None
    if bound(FARTHEST) >= level:
        return math.inf
    low, high = 0.0, FARTHEST
    while high - low > 1e-10:
        middle = (low + high) / 2
        low, high = (middle, high) if bound(middle) >= level else (low, middle)
    return low


# The population level: the law of the score is known.


def mean_population(values: ArrayLike, probabilities: ArrayLike, delta: ArrayLike) -> Any:
    """The paper's bound 2 g(E[(1 + s)/2]) - 1 (arXiv 2601.16200, Theorem 1) for a discrete law of s.

    Args:
        values, probabilities: (k,) each; the values in [-1, 1], the probabilities adding up to 1.
        delta: any shape; the result has it too.

    Raises:
        SettingError: not a law, or a negative delta.
    """
    values, probabilities = _law(values, probabilities)
    return mean_bound(float(np.clip(probabilities @ values, -1, 1)), delta)  # the sum rounds


def mean_bound(mean: float, delta: ArrayLike) -> Any:
    """2 g((1 + mean)/2) - 1 for a mean score (or a lower bound of it) in [-1, 1]; the shape of ``delta``."""
    return 1 - 2 * shifted((1 - mean) / 2, -_distance(delta))


def distribution_population(values: ArrayLike, probabilities: ArrayLike, delta: ArrayLike) -> Any:
    """-1 + the integral of g(P(s > t)) over t in [-1, 1], for a discrete law of s. Arguments as ``mean_population``.

    The lemma applies to every event {s > t}. As g is convex this is never below the mean bound, and an encoder
    whose score falls along one line attains it, so that nothing better follows from the law of s alone.
    """
    values, probabilities = _law(values, probabilities)
    order = np.argsort(values, kind="stable")
    # P(s < value) rather than P(s >= value): near a probability of 1 only the small tail has digits left.
    below = np.minimum(np.concatenate([[0.0], np.cumsum(probabilities[order])[:-1]]), 1.0)
    survival = 1 - shifted(below, -_distance(delta)[..., None])
    return (survival * np.diff(values[order], prepend=-1.0)).sum(axis=-1) - 1


def angular_population(
    values: ArrayLike, probabilities: ArrayLike, perpendicular: ArrayLike, t0: float, delta: ArrayLike
) -> Any:
    """The distribution bound with its angular refinement, for a discrete law of u. See ``angular_cosine``.

    Args:
        perpendicular: (k, E), for each value of s the part of u that is orthogonal to v, averaged where several
            u share the value.
    """
    values, probabilities = _law(values, probabilities)
    near = probabilities * (values >= t0)
    mu = float(np.linalg.norm(near @ np.asarray(perpendicular, dtype=np.float64)))
    inner = distribution_population(values, probabilities, delta)
    return angular_cosine(inner, mass=min(1.0, float(near.sum())), mu=mu, t0=t0, delta=delta)


def _law(values: ArrayLike, probabilities: ArrayLike) -> tuple[Array, Array]:
    values, probabilities = np.asarray(values, dtype=np.float64), np.asarray(probabilities, dtype=np.float64)
    if values.ndim != 1 or values.shape != probabilities.shape or not len(values):
        raise SettingError(
            f"A law needs one probability per value, in one dimension, got {probabilities.shape} for {values.shape}."
        )
    if not (np.abs(values) <= 1).all():
        raise SettingError(f"Scores lie in [-1, 1], got values from {values.min():g} to {values.max():g}.")
    if not ((probabilities >= 0).all() and abs(probabilities.sum() - 1) <= 1e-9):
        raise SettingError(f"Probabilities must be >= 0 and add up to 1, got a sum of {probabilities.sum():.12g}.")
    return values, probabilities


# Finite samples: the mean of the score.


def plugin_mean(scores: Array) -> float:
    """The sample mean of n scores: an estimate, what the paper reports."""
    return float(np.clip(scores.mean(), -1.0, 1.0))


def hoeffding_lower(scores: Array, alpha: float) -> float:
    """E s is at least this with probability >= 1 - alpha (Hoeffding 1963); for comparison, betting is tighter."""
    _level(alpha)
    return max(-1.0, float(scores.mean()) - math.sqrt(2 * math.log(1 / alpha) / len(scores)))


def betting_lower(scores: Array, alpha: float) -> float:
    """E s is at least this with probability >= 1 - alpha: the betting bound of Waudby-Smith and Ramdas.

    With x = (1 + s)/2, one bets on every draw a constant fraction c of what may be lost if E x = m; the capital
    K_c(m) = prod_i (1 + c (x_i/m - 1)) has mean 1 if E x = m, and so has its average over a fixed set of c. By
    Markov's inequality it reaches 1/alpha with probability at most alpha. As it falls in m, the largest m at which
    it does is a lower bound of E x.

    The product does not depend on the order of the draws. A bet that follows the draws so far would: then an
    order that is not independent of the scores (sorted ones, say) makes the bound wrong, shuffled by a fixed
    permutation or not.

    Source: "Estimating means of bounded random variables by betting", JRSS B 86 (2024): their capital process, with
    constant bets averaged over a grid in place of predictable ones.
    """
    _level(alpha)
    x = (1 + scores) / 2
    mean, n = float(x.mean()), len(x)
    target = math.log(1 / alpha)
    bets, weights = _bets(n, alpha)

    def excess(m: float) -> float:
        return float(logsumexp([_log_capital(x, c, m) for c in bets], b=weights)) - target

    # Bets below this have no use, and above it no product of a block overflows.
    lowest = 1e-6
    if mean <= lowest or excess(lowest) < 0:
        return -1.0
    # By Jensen the capital at the sample mean is at most 1; a little below the normal approximation it should
    # already exceed the target, which saves most of the search.
    guess = mean - 1.5 * (float(x.std()) * math.sqrt(2 * target / n) + 2 * target / n)
    low = guess if guess > lowest and excess(guess) >= 0 else lowest
    tolerance = 1e-9
    root = brentq(excess, low, mean, xtol=tolerance)
    return max(-1.0, 2 * (root - 2 * tolerance) - 1)


def _bets(n: int, alpha: float) -> tuple[Array, Array]:
    """Fractions c and their weights, from n and alpha alone.

    The best c in hindsight is about m sqrt(2 ln(1/alpha)/n) / sd(x), at most 1: from the largest sd that x in [0, 1]
    can have to a cap that survives a few scores of -1. Real scores vary little, hence the larger weights of large c.
    """
    cap = 0.95
    smallest = min(0.5, 2 * math.sqrt(2 * math.log(1 / alpha) / n))
    bets = np.geomspace(cap, smallest, 1 + math.ceil(math.log2(cap / smallest)))
    weights = 1 / np.arange(1, len(bets) + 1)
    return bets, weights / weights.sum()


def _log_capital(x: Array, c: float, m: float) -> float:
    """sum_i log(1 + c (x_i/m - 1)), with one logarithm for 32 factors."""
    factors = (c / m) * x + (1 - c)
    whole = len(x) // 32 * 32
    blocks = factors[:whole].reshape(32, -1).prod(axis=0)
    return float(np.log(blocks).sum() + np.log(factors[whole:]).sum())


def binomial_lower(count: int, n: int, alpha: float) -> float:
    """The probability of an event seen ``count`` times in n draws is at least this, with probability >= 1 - alpha.

    Clopper and Pearson (1934), exact.
    """
    _level(alpha)
    if not 0 <= count <= n or n < 1:
        raise SettingError(f"count must be between 0 and n, and n at least 1, got count = {count} and n = {n}.")
    return float(betaincinv(count, n - count + 1, alpha)) if count else 0.0


# Finite samples: the distribution of the score.


def ranks(n: int) -> NDArray[np.int64]:
    """The order statistics that a band looks at, 1 the smallest score: twelve geometric and eight even, from n alone.

    The geometric ones resolve the low tail, which decides at a large delta; the even ones the bulk. Fewer for n < 50.
    """
    chosen = np.concatenate([np.geomspace(1, n, 12), np.linspace(0, n, 9)[1:]])
    return np.unique(np.clip(np.rint(chosen), 1, n).astype(np.int64))


@dataclass(frozen=True)
class Band:
    """A lower band of a score's survival function: P(s >= support[j]) >= survival[j], for all j at once.

    Args:
        support: points in [-1, 1], ascending.
        survival: probabilities, descending.
    """

    support: tuple[float, ...]
    survival: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("support", "survival"):
            expected = f"A band's {name} must hold numbers"
            settle(self, **{name: tuple(number(expected, value) for value in getattr(self, name))})
        support, survival = np.array(self.support), np.array(self.survival)
        if len(support) != len(survival) or not len(support):
            raise SettingError(f"A band needs one survival bound per point, got {len(survival)} for {len(support)}.")
        if not ((np.abs(support) <= 1).all() and (np.diff(support) >= 0).all()):
            raise SettingError("A band's support must ascend within [-1, 1].")
        if not ((survival >= 0).all() and (survival <= 1).all() and (np.diff(survival) <= 0).all()):
            raise SettingError("A band's survival bounds must be probabilities that descend.")

    @classmethod
    def from_scores(cls, scores: Array, alpha: float) -> Band:
        """The band that holds with probability >= 1 - alpha over n i.i.d. scores, in any order.

        P(s < s_(i)) is stochastically at most Beta(i, n - i + 1), whatever the law. The j-th of the chosen ranks
        may err with probability alpha j^-2 / sum_k k^-2: the lowest ranks, which a large delta weighs most,
        are given most of alpha.
        """
        _level(alpha)
        ordered = np.sort(scores)
        chosen, survival = _survival(len(ordered), alpha)
        return cls(tuple(ordered[chosen - 1].tolist()), tuple(survival.tolist()))

    def bound(self, delta: ArrayLike) -> Any:
        """The bound of <m(x'), v>: -1 + sum_j (support[j] - support[j - 1]) g(survival[j]), with support[-1] = -1.

        Of the shape of ``delta``.
        """
        kept = shifted(np.array(self.survival), _distance(delta)[..., None])
        return (kept * np.diff(self.support, prepend=-1.0)).sum(axis=-1) - 1

    def under_attack(self, delta: float) -> tuple[Array, Array]:
        """Values and probabilities of S*: every draw's score under attack is stochastically at least S*."""
        kept = shifted(np.array(self.survival), _distance(delta))
        return np.array([-1.0, *self.support]), -np.diff(kept, prepend=1.0, append=0.0)


def _survival(n: int, alpha: float) -> tuple[NDArray[np.int64], Array]:
    """The ranks of n and the lower bounds of P(s >= s_(i)) at them, all holding together."""
    chosen = ranks(n)
    shares = 1.0 / np.arange(1, len(chosen) + 1) ** 2
    survival = betaincinv(n - chosen + 1, chosen, alpha * shares / shares.sum())
    # A survival function descends: what holds at a higher point holds at a lower one.
    return chosen, np.maximum.accumulate(survival[::-1])[::-1]


# The angular refinement.


def angular_cosine(inner: ArrayLike, *, mass: float, mu: float, t0: float, delta: ArrayLike) -> Any:
    """A bound of cos(m(x'), v) out of one of <m(x'), v>: ||m(x')|| <= 1, and the bound uses by how much.

    With A = {s >= t0} and c = sqrt(1 - t0^2), the part of m(x') orthogonal to v is at most

        b = c (2 Phi(Phi^-1((1 + mu/c)/2) + delta) - 1) + 1 - g(P(A)),

    and cos >= inner / sqrt(inner^2 + b^2) where inner > 0. Never below ``inner``; where that is not positive
    the result is ``inner`` itself, a promise of nothing.

    Args:
        inner: the bound of <m(x'), v> at ``delta``, of its shape.
        mass: P(A) at the clean image, or a lower bound of it.
        mu: ||E[u_perp 1_A]|| at the clean image, or an upper bound of it.
        t0: the threshold, in [0, 1].

    Raises:
        SettingError: t0 outside [0, 1], or a negative delta.
    """
    _threshold(t0)
    inner, delta = np.asarray(inner, dtype=np.float64), _distance(delta)
    c = math.sqrt(1 - t0**2)
    share = min(1.0, mu / c) if c else 0.0
    b = c * (2 * shifted((1 + share) / 2, -delta) - 1) + 1 - shifted(mass, delta)
    length = np.where(inner > 0, np.hypot(inner, b), 1.0)
    return np.maximum(inner, inner / length)[()]


def perpendicular_upper(norm: float, *, t0: float, n: int, alpha: float) -> float:
    """mu = ||E[u_perp 1_A]|| is at most this with probability >= 1 - alpha.

    ``norm`` is that of the mean of u_perp 1_A over n draws. One draw moves the norm by at most 2c/n (McDiarmid 1989),
    and its expectation is at least mu (Jensen).
    """
    _level(alpha)
    _threshold(t0)
    c = math.sqrt(1 - t0**2)
    return min(c, norm + c * math.sqrt(2 * math.log(1 / alpha) / n))


def pilot_threshold(scores: Array, *, n: int, delta: float = 1.0) -> float:
    """A good t0 for the angular refinement of n other draws at ``delta``, from a pilot sample's scores.

    Any t0 is sound that the n draws had no part in. This one makes b of ``angular_cosine`` smallest for normal scores
    a little wider than the pilot's, orthogonal parts that cancel, and the P(A) that n draws can show at best.
    """
    candidates = np.linspace(0.0, 1.0, 1001)
    width = max(1.25 * float(scores.std()), 1e-6)
    mass = ndtr((float(scores.mean()) - candidates) / width) * n / (n + 8)
    b = np.sqrt(1 - candidates**2) * (2 * ndtr(delta) - 1) + 1 - shifted(mass, _distance(delta))
    return float(candidates[np.argmin(b)])


def _threshold(t0: float) -> None:
    if not 0 <= t0 <= 1:
        raise SettingError(f"t0, the score above which a draw counts as near, must be in [0, 1], got {t0}.")


# What is served: the mean of n0 draws.


def served_quantile(band: Band, delta: float, n0: int, beta: float, noise: Noise) -> float:
    """The mean score of n0 served draws is at least this, with probability >= 1 - beta over them.

    Every draw's score under attack is stochastically at least S* (see ``Band.under_attack``), so the mean of n0
    independent draws is at least the beta-quantile of the mean of n0 independent S*. Antithetic draws depend on each
    other within a pair: a pair's mean is at least the smaller of its two scores, for which
    P(min <= t) <= 2 P(S* <= t); pairs are independent. Of an odd n0 one draw is unpaired.

    The values of S* are rounded down onto a grid, and the largest error that the Fourier transform can make
    is taken off beta, so that the result stays a lower bound of the quantile (by 2^-13 at most for n0 <= 64).

    Raises:
        SettingError: n0 < 1, beta outside (0, 1), an unknown kind of noise, or a negative delta.
    """
    n0 = whole("n0 (draws per served image)", n0)
    chance = "beta, the probability that a served answer may miss, must be in (0, 1)"
    beta = number(chance, beta, lambda found: 0 < found < 1)
    if noise not in ("iid", "antithetic"):
        raise SettingError(f'noise must be "iid" or "antithetic", got {noise!r}.')
    cells = max(256, min(2**14, 2**20 // n0))
    values, probabilities = band.under_attack(delta)
    single = np.bincount(np.floor((1 + values) / 2 * cells).astype(np.int64), probabilities, cells + 1)
    length = n0 * cells + 1
    padded = scipy.fft.next_fast_len(length, real=True)
    pairs, singles = (0, n0) if noise == "iid" else divmod(n0, 2)
    spectrum = scipy.fft.rfft(single, padded) ** singles
    if pairs:
        smaller = np.diff(np.minimum(1.0, 2 * np.cumsum(single)), prepend=0.0)
        spread = np.zeros(2 * cells + 1)
        spread[::2] = smaller
        spectrum = spectrum * scipy.fft.rfft(spread, padded) ** pairs
    cumulative = np.cumsum(scipy.fft.irfft(spectrum, padded)[:length])
    error = length * n0 * math.log2(padded) * np.finfo(np.float64).eps
    reached = np.flatnonzero(cumulative > beta - error)
    return float(2 * reached[0] / (length - 1) - 1) if len(reached) else 1.0


# Predictions.


def vote_radius(votes: int, n: int, *, sigma: float, alpha: float) -> float | None:
    """The l2 radius within which a class keeps more than half of the votes of single draws; None to abstain.

    sigma Phi^-1(p) for p the lower bound of the class's probability from its votes among n draws (Cohen et al. 2019,
    Theorem 1 with p_B = 1 - p_A). Holds with probability >= 1 - alpha. The class must have been chosen on other draws.

    Raises:
        SettingError: a value out of range.
    """
    sigma = checks.sigma(sigma, noisy=True, pixels=False)
    p = binomial_lower(votes, n, alpha)
    return sigma * float(ndtri(p)) if p > 0.5 else None


def margin_scores(products: ArrayLike, directions: ArrayLike, predicted: int) -> Array:
    """<u, (t_A - t_B)/||t_A - t_B||> of every draw against every other class B, in the order of the classes.

    Args:
        products: (n, K), <u, t_k> of each draw's unit feature with each class's direction (or a bias-free head's row).
        directions: (K, E), the t_k.
        predicted: the index of class A.

    Returns:
        (n, K - 1).

    Raises:
        SettingError: shapes that do not fit, fewer than two classes, or another class with A's direction.
    """
    products, directions = np.asarray(products, dtype=np.float64), np.asarray(directions, dtype=np.float64)
    if products.ndim != 2 or directions.ndim != 2 or products.shape[1] != len(directions) or len(directions) < 2:
        raise SettingError(
            "margin_scores needs products (n, K) and directions (K, E) of K >= 2 classes, "
            f"got {products.shape} and {directions.shape}."
        )
    if not 0 <= predicted < len(directions):
        raise SettingError(f"predicted must be one of the classes 0 to {len(directions) - 1}, got {predicted}.")
    others = np.arange(len(directions)) != predicted
    lengths = np.linalg.norm(directions[predicted] - directions[others], axis=1)
    if not (lengths > 0).all():
        twin = np.flatnonzero(others)[np.argmin(lengths)]
        raise SettingError(f"Classes {predicted} and {twin} have the same direction; no feature tells them apart.")
    return np.clip((products[:, [predicted]] - products[:, others]) / lengths, -1.0, 1.0)


def argmax_radius(margins: Array, *, sigma: float, alpha: float) -> float | None:
    """The l2 radius within which class A has the largest product with the *averaged* feature; None to abstain.

    The distribution bound on every column of margins, each at alpha/(K - 1), stays positive.
    Holds with probability >= 1 - alpha. The class must have been chosen on other draws.

    Args:
        margins: (n, K - 1), from ``margin_scores``.

    Raises:
        SettingError: a value out of range.
    """
    _level(alpha)
    sigma = checks.sigma(sigma, noisy=True, pixels=False)
    n, rivals = margins.shape
    chosen, survival = _survival(n, alpha / rivals)
    steps = np.diff(np.sort(margins, axis=0)[chosen - 1], axis=0, prepend=-1.0)
    farthest = furthest(lambda delta: float((shifted(survival, delta) @ steps).min()) - 1, 0.0)
    return sigma * farthest if farthest else None


def _level(alpha: float) -> None:
    if not 0 < alpha < 1:
        raise SettingError(
            f"alpha, the probability that a certificate may be wrong, must be in (0, 1) (0.001 is usual), got {alpha}."
        )


def _distance(delta: ArrayLike) -> Array:
    delta = np.asarray(delta, dtype=np.float64)
    if not (delta >= 0).all():
        raise SettingError(f"delta = eps / sigma is a distance and must be >= 0, got {delta.min():g}.")
    return delta
