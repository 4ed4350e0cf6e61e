"""The probability of an answer: what draws show of it, and what is left of it under attack.

A *serving* of an image answers after n0 independent noisy copies of it, x + sigma e_i. The copies together are one
normal vector, and a change of the image by delta moves its mean by sqrt(n0) ||delta||: the lemma of Neyman and Pearson
(as in Cohen et al., ICML 2019) then says all of what follows. Proofs: docs/explanation/proofs.md.
"""

from __future__ import annotations

import math

from scipy.optimize import brentq
from scipy.special import betaincc, betaln, ndtr, ndtri

from fs_plugins.certificates.bounds import binomial_lower
from fs_plugins.certificates.values import alpha_of, distance_of, sigma_of
from fs_plugins.checks import number, whole
from fs_plugins.errors import SettingError

FIXED = "clopper-pearson"
RUNNING = "betting"
METHODS = {FIXED: "exact for a number of servings fixed beforehand", RUNNING: "holds whenever one stops"}


def lower(count: int, n: int, *, alpha: float, method: str = FIXED) -> float:
    """The probability of an event seen ``count`` times in n draws is at least this, with probability >= 1 - alpha.

    Args:
        method: ``"clopper-pearson"`` for an n that was fixed beforehand; ``"betting"`` for one that the draws chose.

    Raises:
        SettingError: a value out of range.
    """
    return binomial_lower(count, n, alpha) if method == FIXED else running_lower(count, n, alpha=alpha)


def running_lower(count: int, n: int, *, alpha: float) -> float:
    """The same at all n together: with probability >= 1 - alpha no n is ever reached at which it is wrong.

    K_n(p) = int_0^1 (1 + u (1/p - 1))^count (1 - u)^(n - count) du is the wealth of all bets of a share u on the event,
    at the odds of p, started with 1 and averaged over u; where p is the truth it is a martingale, which ever reaches
    1/alpha with probability at most alpha (Ville 1939). It falls in p, so all p below the bound are refuted.

    Source: the betting of Waudby-Smith and Ramdas (JRSS B 86, 2024), for events and with a uniform mixture of bets, as
    Robbins (1970) mixes.

    Raises:
        SettingError: a value out of range.
    """
    alpha = alpha_of(alpha)
    n = whole("n (servings)", n)
    count = whole("count", count, least=0)
    if count > n:
        raise SettingError(f"count must be between 0 and n = {n}, got {count}.")
    missed, target = n - count, -math.log(alpha)
    whole_mass = betaln(count + 1, missed + 1)

    def excess(p: float) -> float:
        mass = whole_mass + math.log(betaincc(count + 1, missed + 1, p))
        return mass - count * math.log(p) - (missed + 1) * math.log1p(-p) - target

    # At the observed share no bet wins, and below it betaincc is far from 0.
    least, most = 1e-9, min(count / n, 1 - 1e-9)
    if not count or excess(least) <= 0:
        return 0.0
    if excess(most) >= 0:
        return most
    found: float = brentq(excess, least, most, xtol=1e-12)
    return max(0.0, found - 1e-11)


def answer_radius(probability: float, *, sigma: float, n0: int) -> float | None:
    """The l2 distance within which a serving gives the class with probability above 1/2; None where it never does.

    sigma / sqrt(n0) Phi^-1(p), for the probability p at the image itself, or a lower bound of it.

    Raises:
        SettingError: a value out of range.
    """
    p, sigma, n0 = _probability(probability), sigma_of(sigma), whole("n0 (draws per serving)", n0)
    return sigma / math.sqrt(n0) * float(ndtri(p)) if p > 0.5 else None


def probability_for(radius: float, *, sigma: float, n0: int) -> float:
    """The probability at the image that ``answer_radius`` needs for a radius."""
    return float(ndtr(math.sqrt(n0) * radius / sigma))


def kept(probability: float, eps: float, *, sigma: float, n0: int) -> float:
    """The probability that a serving gives the class, for every image within the l2 distance ``eps``.

    Phi(Phi^-1(p) - sqrt(n0) eps / sigma).

    Raises:
        SettingError: a value out of range.
    """
    p, sigma, n0 = _probability(probability), sigma_of(sigma), whole("n0 (draws per serving)", n0)
    return float(ndtr(ndtri(p) - math.sqrt(n0) * float(distance_of(eps)) / sigma))


def _probability(given: float) -> float:
    return number("A probability must be in [0, 1)", given, lambda found: 0 <= found < 1)
