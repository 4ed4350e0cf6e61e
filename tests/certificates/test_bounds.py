"""The certificates' mathematics: exact values, the table of what it buys, and soundness where the law is known."""

from __future__ import annotations

import itertools
import json
import math
import time
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import ndtr, ndtri
from scipy.stats import beta as beta_law
from scipy.stats import binomtest, norm

from fs_plugins import SettingError
from fs_plugins.certificates import Angular, Certificate, PredictionCertificate
from fs_plugins.certificates.bounds import (
    Band,
    angular_cosine,
    angular_population,
    argmax_radius,
    betting_lower,
    binomial_lower,
    distribution_population,
    furthest,
    hoeffding_lower,
    margin_scores,
    mean_bound,
    mean_population,
    perpendicular_upper,
    pilot_threshold,
    plugin_mean,
    ranks,
    served_quantile,
    shifted,
    vote_radius,
)

EPS = np.linspace(0, 4, 41)


@dataclass(frozen=True)
class LineEncoder:
    """An encoder of numbers: the unit vector ``units[j]`` between ``cuts[j - 1]`` and ``cuts[j]``. Noise has sigma = 1.

    The clean image is 0. Of it, everything under attack is known exactly.
    """

    cuts: np.ndarray
    units: np.ndarray
    v: np.ndarray

    @property
    def scores(self) -> np.ndarray:
        return self.units @ self.v

    @property
    def perpendicular(self) -> np.ndarray:
        return self.units - self.scores[:, None] * self.v

    def probabilities(self, x=0.0) -> np.ndarray:
        """(..., k) for x (...): the law of a draw's piece around x."""
        edges = np.concatenate([[-np.inf], self.cuts, [np.inf]])
        return np.diff(ndtr(edges - np.asarray(x, dtype=float)[..., None]), axis=-1)

    def cosine(self, x) -> np.ndarray:
        mean = self.probabilities(x) @ self.units
        length = np.linalg.norm(mean, axis=-1)
        return mean @ self.v / np.where(length > 0, length, 1.0)

    def worst(self, eps: float) -> float:
        """The smallest cosine within eps: a fine grid, refined twice around its lowest point."""
        low, high = -eps, eps
        for _ in range(3):
            x = np.linspace(low, high, 201)
            at = x[np.argmin(self.cosine(x))]
            step = (high - low) / 200
            low, high = max(-eps, at - step), min(eps, at + step)
        return float(self.cosine(x).min())

    def draws(self, generator: np.random.Generator, *shape: int) -> np.ndarray:
        """Pieces of i.i.d. draws around the clean image."""
        return np.searchsorted(self.cuts, generator.standard_normal(shape))

    def served(self, x: float, n0: int, noise: str) -> tuple[np.ndarray, np.ndarray]:
        """The exact law of the cosine of the served mean of n0 draws around x: (values, probabilities)."""
        single = list(zip(self.units, self.probabilities(x), strict=True))
        edges = np.sort(np.concatenate([self.cuts - x, x - self.cuts]))
        inside = np.concatenate([edges[:1] - 1, (edges[1:] + edges[:-1]) / 2, edges[-1:] + 1])
        mass = np.diff(ndtr(np.concatenate([[-np.inf], edges, [np.inf]])))
        both = self.units[np.searchsorted(self.cuts, x + inside)] + self.units[np.searchsorted(self.cuts, x - inside)]
        parts = [single] * n0
        if noise == "antithetic":
            parts = [list(zip(both, mass, strict=True))] * (n0 // 2) + [single] * (n0 % 2)
        total, probability = np.zeros((1, self.units.shape[1])), np.ones(1)
        for part in parts:
            total = (total[:, None] + np.array([u for u, _ in part])).reshape(-1, total.shape[1])
            probability = (probability[:, None] * np.array([p for _, p in part])).ravel()
        length = np.linalg.norm(total, axis=1)
        return total @ self.v / np.where(length > 1e-12, length, 1.0), probability


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def random_encoder(generator: np.random.Generator) -> LineEncoder:
    """Between two and six pieces in two or three dimensions, from tight to scattered; some ordered or two-faced."""
    pieces, width = generator.integers(2, 7), generator.integers(2, 4)
    cuts = np.sort(generator.standard_normal(pieces - 1) * generator.uniform(0.3, 2))
    centre = unit(generator.standard_normal(width))
    spread = generator.choice([0.1, 0.3, 1.0, 3.0])
    units = unit(centre + spread * generator.standard_normal((pieces, width)))
    kind = generator.integers(6)
    if kind == 0:
        units = np.where(generator.random((pieces, 1)) < 0.7, centre, -centre)
    if kind == 1:
        units = units[np.argsort(-(units @ centre))]
    encoder = LineEncoder(cuts, units, centre)
    mean = encoder.probabilities() @ units
    reference = [centre, units[np.searchsorted(cuts, 0.0)], mean if np.linalg.norm(mean) > 1e-6 else centre]
    return replace(encoder, v=unit(reference[generator.integers(3)]))


def half_space(scores) -> LineEncoder:
    """Scores that fall along the line, on pieces of random width: attacks cannot be worse."""
    scores = np.sort(np.asarray(scores, dtype=float))[::-1]
    cuts = ndtri(np.arange(1, len(scores)) / len(scores))
    return LineEncoder(cuts, np.stack([scores, np.sqrt(1 - scores**2)], axis=1), np.array([1.0, 0.0]))


SIGN_FLIP = LineEncoder(np.array([-0.5]), np.array([[-1.0], [1.0]]), np.array([1.0]))
"""-1 below -sigma/2, +1 above: at eps = sigma the paper's formula says -0.383 and the cosine is -1."""


# g, and the population level.


def test_shifted_is_exact_at_the_ends_and_at_no_distance():
    p = np.array([0.0, 1e-300, 0.2, 0.5, 0.999999, 1.0])
    assert np.array_equal(shifted(p, 0), p)
    for delta in (1e-9, 1.0, 8.0, 100.0, np.inf):
        assert shifted(0.0, delta) == 0
        assert shifted(1.0, delta) == 1
    assert np.allclose(shifted(p, 0.7), norm.cdf(norm.ppf(p) - 0.7), atol=1e-15)
    assert shifted(0.5, 1.0) == pytest.approx(0.15865525393145707, abs=1e-16)
    assert shifted(p[:, None], np.ones(3)).shape == (6, 3)


def test_population_bounds_by_hand():
    delta = np.array([0.0, 0.5, 1.0])
    values, probabilities = [1.0, -1.0], [0.9, 0.1]
    wanted = 2 * norm.cdf(norm.ppf(0.9) - delta) - 1
    assert np.allclose(mean_population(values, probabilities, delta), wanted)
    assert np.allclose(distribution_population(values, probabilities, delta), wanted)
    three = distribution_population([0.2, 0.8, 0.5], [0.3, 0.3, 0.4], 1.0)
    g = norm.cdf(norm.ppf([0.7, 0.3]) - 1)
    assert three == pytest.approx(-1 + 1.2 + 0.3 * g[0] + 0.3 * g[1], abs=1e-15)


def test_a_constant_score_cannot_be_attacked_at_population_level():
    for delta in (0.0, 3.0, 1e6, np.inf):
        assert distribution_population([0.8], [1.0], delta) == pytest.approx(0.8, abs=1e-15)
    assert mean_population([1.0], [1.0], 5.0) == 1


def test_the_low_tail_keeps_its_digits():
    """P(s = -1) = 1e-20 vanishes beside 1, and yet decides at a large distance."""
    bound = distribution_population([-1.0, 1.0], [1e-20, 1.0], 9.0)
    assert bound == pytest.approx(1 - 2 * norm.cdf(norm.ppf(1e-20) + 9), rel=1e-9)


laws = st.integers(1, 8).flatmap(
    lambda k: st.tuples(
        hnp.arrays(float, k, elements=st.floats(-1, 1)), hnp.arrays(float, k, elements=st.floats(1e-6, 1))
    )
)


@settings(max_examples=300)
@given(laws)
def test_the_distribution_bound_is_never_below_the_mean_bound(law):
    values, weights = law
    probabilities = weights / weights.sum()
    mean = mean_population(values, probabilities, EPS)
    distribution = distribution_population(values, probabilities, EPS)
    assert (distribution >= mean - 1e-12).all()
    assert (np.diff(distribution) <= 1e-12).all()
    assert distribution[0] == pytest.approx(float(values @ probabilities), abs=1e-12)


@settings(max_examples=200)
@given(hnp.arrays(float, st.integers(2, 12), elements=st.floats(-1, 1)), st.floats(0, 4))
def test_a_half_space_ordering_attains_the_distribution_bound(scores, delta):
    encoder = half_space(scores)
    bound = distribution_population(encoder.scores, encoder.probabilities(), delta)
    attained = encoder.probabilities(delta) @ encoder.scores
    assert attained == pytest.approx(bound, abs=1e-9)


def test_no_population_bound_exceeds_the_truth():
    generator = np.random.default_rng(0)
    promised = {"mean": 0, "distribution": 0, "angular": 0}
    refined = 0
    for _ in range(10_000):
        encoder = random_encoder(generator)
        eps, t0 = generator.uniform(0.05, 2.5), generator.choice([0.0, 0.3, 0.7, 0.95])
        scores, law = np.clip(encoder.scores, -1, 1), encoder.probabilities()
        bounds = {
            "mean": mean_population(scores, law, eps),
            "distribution": distribution_population(scores, law, eps),
            "angular": angular_population(scores, law, encoder.perpendicular, t0, eps),
        }
        worst = encoder.worst(eps)
        for name, bound in bounds.items():
            if bound >= 0:
                promised[name] += 1
                assert bound <= worst + 1e-9, (name, bound, worst, encoder, eps)
        assert bounds["mean"] <= bounds["distribution"] + 1e-12
        assert bounds["distribution"] <= bounds["angular"]
        refined += bounds["angular"] > bounds["distribution"] + 0.01
    assert promised["mean"] > 2500
    assert promised["distribution"] > 3500
    assert refined > 700


def test_where_the_formula_is_negative_the_cosine_is_worse_and_nothing_is_promised():
    scores, law = SIGN_FLIP.scores, SIGN_FLIP.probabilities()
    assert mean_population(scores, law, 1.0) == pytest.approx(-0.383, abs=1e-3)
    assert SIGN_FLIP.worst(1.0) == -1
    draws = np.repeat(scores, np.rint(law * 100_000).astype(int))
    for method in ("plugin", "mean", "distribution", "best"):
        certificate = Certificate.from_scores(draws, sigma=1, method=method)
        assert certificate.fcsb(1.0) is None
        assert certificate.radius(0.0) <= 0.5 + 1e-3, "the cosine flips at sigma / 2"


# The mean of the score.


def naive_capital(x: np.ndarray, m: float, alpha: float) -> float:
    from fs_plugins.certificates.bounds import _bets

    bets, weights = _bets(len(x), alpha)
    return sum(w * math.prod(1 + c * (value / m - 1) for value in x) for c, w in zip(bets, weights, strict=True))


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 200])
@pytest.mark.parametrize("alpha", [0.05, 1e-3])
def test_the_betting_bound_is_where_the_capital_reaches_one_over_alpha(n, alpha):
    scores = np.clip(np.random.default_rng(n).normal(0.7, 0.2, n), -1, 1)
    lower = betting_lower(scores, alpha)
    m = (1 + lower) / 2
    if lower == -1:
        assert naive_capital((1 + scores) / 2, 1e-6, alpha) < 1 / alpha
    else:
        assert naive_capital((1 + scores) / 2, m, alpha) >= 1 / alpha
        assert naive_capital((1 + scores) / 2, m + 1e-7, alpha) < 1 / alpha


def test_a_bet_is_fair_when_the_mean_is_right():
    """E K(mu) = 1 exactly, over all outcomes of four draws from a three-point law."""
    x, law = np.array([0.1, 0.6, 1.0]), np.array([0.2, 0.5, 0.3])
    mu = float(x @ law)
    total = sum(
        math.prod(law[list(outcome)]) * naive_capital(x[list(outcome)], mu, 0.01)
        for outcome in itertools.product(range(3), repeat=4)
    )
    assert total == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("n", [100, 1000, 30_000])
def test_betting_is_far_tighter_than_hoeffding_for_scores_that_vary_little(n):
    scores = table_scores(0.95, 0.02, n)
    hoeffding, betting = hoeffding_lower(scores, 1e-3), betting_lower(scores, 1e-3)
    assert hoeffding < betting < plugin_mean(scores)
    assert plugin_mean(scores) - betting < (plugin_mean(scores) - hoeffding) / 2


@pytest.mark.parametrize("score", [-1.0, -0.999999, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("n", [1, 2, 1000, 100_000])
def test_equal_scores_are_no_special_case(score, n):
    scores = np.full(n, score)
    assert -1 <= betting_lower(scores, 1e-3) <= score
    certificate = Certificate.from_scores(scores, sigma=0.25)
    value = certificate.fcsb(0.0)
    assert value is None or value <= score
    if n == 100_000 and score > 0:
        assert value > score - 1e-3


# The table of what the distribution bound buys.

# mean, sd, n | eps = sigma: plugin, betting, distribution | 2 sigma: plugin, distribution |
# R: plugin, Hoeffding, betting, distribution
TABLE = [
    (0.984, 0.004, 1_000, 0.841, 0.693, 0.806, 0.317, 0.265, 1.73, 0.83, 1.35, 1.66),
    (0.984, 0.004, 10_000, 0.841, 0.823, 0.944, 0.317, 0.713, 1.73, 1.26, 1.68, 2.41),
    (0.984, 0.004, 100_000, 0.841, 0.839, 0.972, 0.317, 0.894, 1.73, 1.53, 1.73, 3.03),
    (0.95, 0.02, 1_000, 0.663, 0.558, 0.756, None, 0.222, 1.29, 0.71, 1.09, 1.57),
    (0.95, 0.02, 10_000, 0.663, 0.651, 0.889, None, 0.653, 1.29, 1.04, 1.26, 2.31),
    (0.90, 0.03, 1_000, 0.481, 0.403, 0.698, None, 0.177, 0.97, 0.56, 0.85, 1.48),
    (0.90, 0.03, 10_000, 0.481, 0.472, 0.826, None, 0.590, 0.97, 0.81, 0.96, 2.20),
    (0.72, 0.05, 1_000, 0.064, 0.022, 0.509, None, 0.036, 0.41, 0.17, 0.35, 1.03),
    (0.72, 0.05, 10_000, 0.064, 0.059, 0.622, None, 0.394, 0.41, 0.33, 0.40, 1.67),
]


def table_scores(mean: float, sd: float, n: int) -> np.ndarray:
    return np.clip(mean + sd * ndtri((np.arange(1, n + 1) - 0.5) / n), -1, 1)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: "{}/{}, {}".format(*row[:3]))
def test_the_table_is_reached_or_exceeded(row):
    mean, sd, n, plugin1, betting1, distribution1, plugin2, distribution2, *radii = row
    scores = table_scores(mean, sd, n)
    sigma = 0.25
    plugin, betting, distribution = (
        Certificate.from_scores(scores, sigma=sigma, method=method) for method in ("plugin", "mean", "distribution")
    )
    hoeffding = hoeffding_lower(scores, 1e-3)
    assert plugin.fcsb(sigma) == pytest.approx(plugin1, abs=0.002)
    assert betting.fcsb(sigma) >= betting1 - 0.001
    assert distribution.fcsb(sigma) >= distribution1 - 0.001
    assert (plugin.fcsb(2 * sigma) or 0) == pytest.approx(plugin2 or 0, abs=0.002)
    assert distribution.fcsb(2 * sigma) >= distribution2 - 0.001
    reached = [
        plugin.radius() / sigma,
        furthest(lambda delta: mean_bound(hoeffding, delta), 0.5),
        betting.radius() / sigma,
        distribution.radius() / sigma,
    ]
    assert reached[0] == pytest.approx(radii[0], abs=0.006)
    assert reached[1] == pytest.approx(radii[1], abs=0.006)
    assert reached[2] >= radii[2] - 0.006
    assert reached[3] >= radii[3] - 0.001
    best = Certificate.from_scores(scores, sigma=sigma)
    assert best.radius() / sigma >= radii[3] - 0.02, "best spends half of alpha on each of its two bounds"


def test_betting_can_be_a_hair_better_at_a_small_distance_and_best_takes_it():
    scores = table_scores(0.95, 0.02, 1000)
    by = {m: Certificate.from_scores(scores, sigma=1, method=m) for m in ("mean", "distribution", "best")}
    assert by["mean"].fcsb(0.02) > by["distribution"].fcsb(0.02)
    assert by["distribution"].fcsb(0.5) > by["mean"].fcsb(0.5)
    for eps in (0.02, 0.5):
        assert by["best"].fcsb(eps) > min(by["mean"].fcsb(eps), by["distribution"].fcsb(eps))


# Bands.


@pytest.mark.parametrize("n", [1, 2, 3, 10, 49, 1000, 10**6])
def test_ranks_are_fixed_by_n_and_cover_it(n):
    chosen = ranks(n)
    assert chosen[0] == 1
    assert chosen[-1] == n
    assert (np.diff(chosen) > 0).all()
    assert len(chosen) <= 20


def test_a_band_is_made_of_beta_quantiles_that_spend_alpha():
    n, alpha = 1000, 1e-3
    band = Band.from_scores(np.linspace(-0.5, 0.9, n), alpha)
    chosen = ranks(n)
    spent = [beta_law.cdf(p, n - i + 1, i) for p, i in zip(band.survival, chosen, strict=True)]
    assert sum(spent) <= alpha * (1 + 1e-6)
    assert sum(spent) >= alpha * 0.999
    assert np.allclose(band.support, np.linspace(-0.5, 0.9, n)[chosen - 1])


def test_a_band_serves_every_distance_and_its_worst_law_has_the_bound_as_its_mean():
    band = Band.from_scores(table_scores(0.9, 0.03, 1000), 1e-3)
    together = band.bound(EPS.reshape(-1, 1))
    assert together.shape == (41, 1)
    for delta, value in zip(EPS, together.ravel(), strict=True):
        assert band.bound(delta) == pytest.approx(value, abs=1e-15)
        values, probabilities = band.under_attack(float(delta))
        assert probabilities.min() >= 0
        assert probabilities.sum() == pytest.approx(1)
        assert values @ probabilities == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    "wrong",
    [
        ((), ()),
        ((0.5,), (0.9, 0.8)),
        ((0.5, 0.4), (0.9, 0.8)),
        ((0.4, 0.5), (0.8, 0.9)),
        ((0.4, 1.5), (0.9, 0.8)),
        ((0.5,), (1.1,)),
        ((0.5,), (float("nan"),)),
    ],
)
def test_a_band_that_is_none_is_refused(wrong):
    with pytest.raises(SettingError, match="band"):
        Band(*wrong)


# The angular refinement.


def test_the_angular_bound_by_hand():
    a, mass, mu, t0, delta = 0.7, 0.99, 0.1, 0.8, 0.5
    c = 0.6
    b = c * (2 * norm.cdf(norm.ppf((1 + mu / c) / 2) + delta) - 1) + 1 - norm.cdf(norm.ppf(mass) - delta)
    wanted = a / math.hypot(a, b)
    assert angular_cosine(a, mass=mass, mu=mu, t0=t0, delta=delta) == pytest.approx(wanted, abs=1e-12)
    assert wanted > a


def test_the_angular_bound_in_its_corners():
    assert angular_cosine(-0.1, mass=1.0, mu=0.0, t0=0.5, delta=0.0) == -0.1
    assert angular_cosine(0.0, mass=1.0, mu=0.0, t0=0.5, delta=0.0) == 0.0
    assert angular_cosine(0.9, mass=1.0, mu=0.0, t0=1.0, delta=3.0) == 1.0, "every draw is v itself"
    assert angular_cosine(0.2, mass=0.0, mu=1.0, t0=0.0, delta=9.0) == 0.2, "no use, no harm"
    with pytest.raises(SettingError, match="t0"):
        angular_cosine(0.5, mass=1.0, mu=0.0, t0=-0.1, delta=0.0)
    assert perpendicular_upper(0.1, t0=0.8, n=10_000, alpha=1e-3) == pytest.approx(0.1 + 0.6 * 0.037169, abs=1e-5)
    assert perpendicular_upper(0.1, t0=0.8, n=1, alpha=1e-3) == pytest.approx(0.6)


def test_a_certificate_uses_angular_statistics_and_pays_for_them():
    scores = table_scores(0.9, 0.03, 10_000)
    t0 = pilot_threshold(scores[::100], n=len(scores))
    assert 0.7 < t0 < 0.9
    angular = Angular(t0=t0, count=int((scores >= t0).sum()), norm=0.05, n=len(scores))
    plain = Certificate.from_scores(scores, sigma=0.25)
    refined = Certificate.from_scores(scores, sigma=0.25, angular=angular)
    assert refined.lower < plain.lower
    assert refined.fcsb(0.25) > plain.fcsb(0.25) + 0.02
    assert refined.radius() > plain.radius()
    assert refined.radius(0.0) <= plain.radius(0.0), "where nothing is left of the inner product, nothing is gained"
    assert (np.diff(refined.curve(np.linspace(0, 0.5, 51))) <= 0).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"t0": -0.1},
        {"t0": float("nan")},
        {"count": 11},
        {"count": -1},
        {"n": 0},
        {"norm": 0.9},
        {"norm": float("nan")},
        {"norm": 5.0},
    ],
)
def test_angular_statistics_that_cannot_be_are_refused(wrong):
    with pytest.raises(SettingError):
        Angular(**{"t0": 0.8, "count": 9, "norm": 0.1, "n": 10, **wrong})


def test_the_paper_s_formula_takes_no_angular_statistics():
    with pytest.raises(SettingError, match="plugin"):
        Certificate.from_scores([0.9], sigma=1, method="plugin", angular=Angular(t0=0.5, count=1, norm=0.1, n=1))


# What is served.


@pytest.mark.parametrize("n0", [1, 2, 3, 4])
@pytest.mark.parametrize("beta", [0.5, 0.1, 0.01])
def test_the_served_quantile_is_the_enumerated_one_rounded_down(n0, beta):
    band = Band((-0.3, 0.313, 0.777, 0.9), (0.99, 0.95, 0.8, 0.3))
    values, probabilities = band.under_attack(0.4)
    outcomes = list(itertools.product(range(len(values)), repeat=n0))
    means = np.array([values[list(o)].mean() for o in outcomes])
    mass = np.array([probabilities[list(o)].prod() for o in outcomes])
    order = np.argsort(means)
    exact = means[order][np.searchsorted(np.cumsum(mass[order]), beta, side="right")]
    got = served_quantile(band, 0.4, n0, beta, "iid")
    assert exact - 2**-13 <= got <= exact + 1e-12


def test_antithetic_pairs_count_by_their_smaller_score():
    band = Band((0.2, 0.6, 0.9), (0.99, 0.95, 0.8))
    values, probabilities = band.under_attack(0.3)
    smaller = np.diff(np.minimum(1, 2 * np.cumsum(probabilities)), prepend=0)
    for beta in (0.5, 0.1, 0.03):
        pair = values[np.searchsorted(np.cumsum(smaller), beta, side="right")]
        assert served_quantile(band, 0.3, 2, beta, "antithetic") == pytest.approx(pair, abs=2**-13)
        outcomes = itertools.product(range(4), repeat=2)
        law = sorted((2 * values[i] / 3 + values[j] / 3, smaller[i] * probabilities[j]) for i, j in outcomes)
        three = law[int(np.searchsorted(np.cumsum([p for _, p in law]), beta, side="right"))][0]
        assert served_quantile(band, 0.3, 3, beta, "antithetic") == pytest.approx(three, abs=2**-13)
        assert served_quantile(band, 0.3, 1, beta, "antithetic") == served_quantile(band, 0.3, 1, beta, "iid")


def test_many_served_draws_approach_the_mean_from_below():
    band = Band.from_scores(table_scores(0.9, 0.03, 10_000), 1e-3)
    inner = band.bound(1.0)
    served = [served_quantile(band, 1.0, n0, 0.01, "iid") for n0 in (4, 64, 1024)]
    assert served[0] < served[1] < served[2] < inner
    assert served[2] > inner - 0.03


def test_no_served_quantile_exceeds_the_truth_where_the_law_is_known():
    generator = np.random.default_rng(1)
    promised = 0
    for _ in range(400):
        encoder = random_encoder(generator)
        order = np.argsort(encoder.scores)
        law = encoder.probabilities()[order]
        survival = np.minimum.accumulate(np.clip(1 - np.concatenate([[0], np.cumsum(law)[:-1]]), 0, 1))
        band = Band(tuple(np.clip(encoder.scores[order], -1, 1)), tuple(survival))
        eps, beta, n0 = generator.uniform(0.05, 1), generator.choice([0.3, 0.1]), int(generator.integers(1, 4))
        for noise in ("iid", "antithetic"):
            q = served_quantile(band, eps, n0, beta, noise)
            if q < 0:
                continue
            promised += 1
            for x in (-eps, -eps / 2, 0.0, eps / 2, eps):
                cosines, mass = encoder.served(x, n0, noise)
                assert mass[cosines < q - 1e-9].sum() <= beta + 1e-9
    assert promised > 200


def test_served_needs_a_band_and_says_so():
    scores = table_scores(0.95, 0.02, 10_000)
    certificate = Certificate.from_scores(scores, sigma=0.25)
    iid, paired = (certificate.served_fcsb(0.125, 4, 0.1, noise=noise) for noise in ("iid", "antithetic"))
    assert 0.5 < paired <= iid < 0.95
    assert certificate.served_fcsb(0.125, 4, 0.1) == paired
    assert certificate.served_fcsb(0.5, 4, 1e-6) is None
    with pytest.raises(SettingError, match="best"):
        Certificate.from_scores(scores, sigma=0.25, method="mean").served_fcsb(0.1, 4, 0.1)
    for wrong in ({"n0": 0}, {"n0": 2.5}, {"n0": True}, {"beta": 0.0}, {"beta": 1.0}, {"noise": "sobol"}, {"eps": -1}):
        with pytest.raises(SettingError, match=next(iter(wrong))):
            certificate.served_fcsb(**{"eps": 0.1, "n0": 4, "beta": 0.1, **wrong})


# Predictions.


@pytest.mark.parametrize(("count", "n"), [(0, 10), (7, 10), (10, 10), (990, 1000), (1, 1)])
def test_the_binomial_bound_is_clopper_and_pearson_s(count, n):
    exact = binomtest(count, n, alternative="greater").proportion_ci(0.999, method="exact").low
    assert binomial_lower(count, n, 1e-3) == pytest.approx(exact, abs=1e-12)


def test_votes_by_hand_and_abstention():
    p = binomial_lower(990, 1000, 1e-3)
    assert vote_radius(990, 1000, sigma=0.25, alpha=1e-3) == pytest.approx(0.25 * norm.ppf(p))
    assert vote_radius(520, 1000, sigma=0.25, alpha=1e-3) is None
    assert vote_radius(1, 1, sigma=0.25, alpha=1e-3) is None
    with pytest.raises(SettingError, match="count"):
        vote_radius(11, 10, sigma=0.25, alpha=1e-3)


def test_margins_are_scores_against_unit_differences():
    generator = np.random.default_rng(0)
    directions = unit(generator.standard_normal((4, 6)))
    u = unit(generator.standard_normal((5, 6)))
    margins = margin_scores(u @ directions.T, directions, 2)
    for column, other in enumerate((0, 1, 3)):
        assert np.allclose(margins[:, column], u @ unit(directions[2] - directions[other]))
    with pytest.raises(SettingError, match="same direction"):
        margin_scores(u @ directions[[0, 0]].T, directions[[0, 0]], 1)
    with pytest.raises(SettingError, match="K >= 2"):
        margin_scores(u @ directions.T, directions[:3], 1)
    with pytest.raises(SettingError, match="predicted"):
        margin_scores(u @ directions.T, directions, 4)


def test_the_averaged_feature_keeps_its_class_while_every_margin_is_positive():
    margins = np.stack([table_scores(0.6, 0.05, 2000), table_scores(0.4, 0.05, 2000)], axis=1)
    radius = argmax_radius(margins, sigma=0.25, alpha=1e-3)
    closest = Band.from_scores(margins[:, 1], 5e-4)
    assert radius == pytest.approx(0.25 * furthest(closest.bound, 0.0), abs=1e-9)
    assert argmax_radius(margins[:, :1], sigma=0.25, alpha=1e-3) > radius
    assert argmax_radius(-margins, sigma=0.25, alpha=1e-3) is None
    assert argmax_radius(np.zeros((1, 3)), sigma=0.25, alpha=1e-3) is None


def test_a_prediction_certificate_reports_both_radii_and_what_the_larger_means():
    margins = table_scores(0.6, 0.05, 2000)[:, None]
    kept = PredictionCertificate.from_draws(1990, margins, predicted=3, sigma=0.25, psm="demo", image_shape=[3, 8, 8])
    assert kept.radius == max(kept.vote_radius, kept.feature_radius) > 0
    assert kept.vote_radius == vote_radius(1990, 2000, sigma=0.25, alpha=5e-4)
    assert kept.feature_radius == argmax_radius(margins, sigma=0.25, alpha=5e-4)
    assert "class 3" in kept.meaning
    one = PredictionCertificate.from_draws(1000, margins, predicted=3, sigma=0.25)
    assert one.vote_radius is None
    assert one.radius == one.feature_radius
    assert "averaged" in one.meaning
    none = PredictionCertificate.from_draws(1000, -margins, predicted=3, sigma=0.25)
    assert none.radius is None
    assert "abstains" in none.meaning
    for certificate in (kept, one, none):
        assert PredictionCertificate.from_json(certificate.to_json()) == certificate
    with pytest.raises(SettingError, match="votes"):
        replace(kept, votes=2001)
    with pytest.raises(SettingError, match=r"\(n, K - 1\)"):
        PredictionCertificate.from_draws(9, margins[:, 0], predicted=0, sigma=0.25)
    with pytest.raises(SettingError, match="prediction"):
        PredictionCertificate.from_json(Certificate.from_scores([0.9], sigma=1).to_json())


# The value.

METHODS = ("plugin", "mean", "distribution", "best")
samples = hnp.arrays(float, st.integers(1, 300), elements=st.floats(-1, 1)) | st.tuples(
    st.floats(0, 0.99), st.floats(0, 0.1), st.integers(1, 3000)
).map(lambda law: table_scores(*law))


@settings(max_examples=100)
@given(samples, st.sampled_from(METHODS), st.floats(0.01, 2), st.floats(1e-6, 0.5), st.booleans())
def test_whatever_the_scores(scores, method, sigma, alpha, refined):
    angular = (
        Angular(t0=0.5, count=len(scores) - 1, norm=0.0, n=len(scores)) if refined and method != "plugin" else None
    )
    certificate = Certificate.from_scores(scores, sigma=sigma, alpha=alpha, method=method, angular=angular)
    shuffled = np.random.default_rng(0).permutation(scores)
    assert Certificate.from_scores(shuffled, sigma=sigma, alpha=alpha, method=method, angular=angular) == certificate
    assert Certificate.from_json(certificate.to_json()) == certificate
    eps = EPS * sigma
    curve = certificate.curve(eps)
    promised = ~np.isnan(curve)
    assert (np.diff(promised.astype(int)) <= 0).all(), "what is given up is not promised again farther out"
    assert (np.diff(curve[promised]) <= 1e-12).all()
    assert (curve[promised] >= 0).all()
    assert (curve[promised] <= 1).all()
    assert [certificate.fcsb(e) for e in eps] == [None if math.isnan(c) else c for c in curve]
    assert certificate.is_empty == (not promised[0])
    if method != "plugin" and not refined and promised[0]:
        assert curve[0] <= scores.mean() + 1e-12
    for threshold in (0.0, 0.3, 0.5):
        radius = certificate.radius(threshold)
        if radius is None:
            assert not promised[0] or curve[0] < threshold
        elif math.isinf(radius):
            assert method == "plugin"
        else:
            assert certificate.fcsb(radius) >= threshold
            farther = certificate.fcsb(radius + 1e-9 * sigma)
            assert farther is None or farther <= threshold + 1e-6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_too_few_draws_promise_nothing_and_say_so(n, method):
    certificate = Certificate.from_scores([0.99] * n, sigma=0.25, method=method)
    if method == "plugin":
        assert certificate.is_estimate
        assert "estimate, not a certificate" in str(certificate)
    else:
        assert certificate.is_empty
        assert certificate.radius(0.0) is None
        assert "nothing is promised" in str(certificate)


def test_a_huge_distance_promises_nothing():
    certificate = Certificate.from_scores(table_scores(0.99, 0.001, 100_000), sigma=0.25)
    for eps in (10.0, 1e6, math.inf):
        assert certificate.fcsb(eps) is None
    assert np.isnan(certificate.curve([5.0, 1e300])).all()
    assert certificate.curve([]).shape == (0,)


def test_the_estimate_of_perfect_scores_reaches_everywhere():
    certificate = Certificate.from_scores(np.ones(10), sigma=0.25, method="plugin")
    assert certificate.fcsb(100.0) == 1
    assert certificate.radius() == math.inf


def test_arrays_tensors_and_lists_of_any_width_give_one_certificate():
    scores = (np.round(table_scores(0.9, 0.03, 200) * 128) / 128).tolist()
    wanted = Certificate.from_scores(scores, sigma=0.25)
    for given_as in (
        np.array(scores),
        np.array(scores, dtype=np.float32),
        torch.tensor(scores),
        torch.tensor(scores, dtype=torch.bfloat16),
        torch.tensor(scores, requires_grad=True),
        tuple(scores),
    ):
        assert Certificate.from_scores(given_as, sigma=0.25) == wanted


def test_rounding_is_clipped_and_more_is_not():
    assert Certificate.from_scores([1 + 1e-7] * 3, sigma=1).mean == 1
    assert Certificate.from_scores([-1 - 1e-7] * 3, sigma=1).mean == -1
    for score in (1 + 1e-5, -1.1, float("inf")):
        with pytest.raises(SettingError, match=r"\[-1, 1\]"):
            Certificate.from_scores([0.5, score], sigma=1)


def test_radii_in_other_norms():
    scores = table_scores(0.95, 0.02, 1000)
    certificate = Certificate.from_scores(scores, sigma=0.25, image_shape=torch.Size([3, 224, 224]))
    radius = certificate.radius(0.6)
    assert certificate.linf_radius(0.6) == pytest.approx(radius / math.sqrt(3 * 224 * 224))
    assert certificate.l1_radius(0.6) == radius
    assert certificate.linf_radius(0.99) is None
    with pytest.raises(SettingError, match="image_shape"):
        Certificate.from_scores(scores, sigma=0.25).linf_radius()


def test_a_look_spends_its_share_and_promises_the_whole_alpha():
    scores = table_scores(0.95, 0.02, 1000)
    share = Certificate.from_scores(scores, sigma=1, alpha=1e-3, share=0.25)
    alone = Certificate.from_scores(scores, sigma=1, alpha=2.5e-4)
    assert share.alpha == 1e-3
    assert (share.lower, share.band) == (alone.lower, alone.band)


def test_what_a_certificate_depends_on_travels_with_it():
    certificate = Certificate.from_scores(
        table_scores(0.9, 0.03, 500),
        sigma=np.float32(0.25),
        angular=Angular(t0=0.8, count=np.int64(480), norm=np.float64(0.01), n=500),
        image_shape=[3, 16, 16],
        readouts=["tokens"],
        encoder=[0.1, -0.2],
        psm="demo-llava",
        seed="seed 3",
        non_finite=2,
        unrelated=0.31,
        reference="the smoothed clean feature",
    )
    again = Certificate.from_json(certificate.to_json())
    assert again == certificate
    assert np.array_equal(again.curve(EPS / 4), certificate.curve(EPS / 4), equal_nan=True)
    assert again.radius() == certificate.radius()
    assert again.served_fcsb(0.1, 4, 0.1) == certificate.served_fcsb(0.1, 4, 0.1)
    assert "\n" not in certificate.to_json()
    assert len(certificate.to_json()) < 3000
    with pytest.raises(AttributeError):
        certificate.sigma = 1.0
    assert hash(again) == hash(certificate)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 2}, "alpha"),
        ({"method": "magic"}, "method"),
        ({"band": None}, "band"),
        ({"band": {"support": [0.5, 0.1], "survival": [0.9, 0.8]}}, "ascend"),
        ({"lower": None}, "mean score"),
        ({"n": 0}, "n >= 1"),
        ({"version": 2}, "version 2"),
        ({"certificate": "prediction"}, "features"),
        ({"radius": 3}, "radius"),
        ({"sigma": "wide"}, "sigma"),
        ({"unrelated": 1.5}, "unrelated"),
        ({"image_shape": []}, "image_shape"),
    ],
)
def test_a_damaged_line_is_refused(change, message):
    fields = json.loads(Certificate.from_scores(table_scores(0.9, 0.03, 50), sigma=0.25).to_json())
    with pytest.raises(SettingError, match=message):
        Certificate.from_json(json.dumps({**fields, **change}))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}"])
def test_a_line_that_is_no_certificate_is_refused(text):
    with pytest.raises(SettingError, match="not a features certificate"):
        Certificate.from_json(text)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([], "no scores"),
        (np.zeros((3, 2)), "shape"),
        (0.5, "shape"),
        ([0.5, float("nan")], "1 of 2 scores are NaN"),
        (["high"], "numbers"),
        (None, "NaN|shape|numbers"),
    ],
)
def test_scores_that_are_none_are_refused(scores, message):
    with pytest.raises(SettingError, match=message):
        Certificate.from_scores(scores, sigma=0.25)


@pytest.mark.parametrize(
    "wrong",
    [
        {"sigma": 0},
        {"sigma": -0.25},
        {"sigma": float("nan")},
        {"sigma": float("inf")},
        {"sigma": "0.25"},
        {"alpha": 0},
        {"alpha": 1},
        {"alpha": -0.1},
        {"alpha": float("nan")},
        {"alpha": "small"},
        {"share": 0},
        {"share": 1.5},
        {"method": "hoeffding"},
        {"method": None},
        {"non_finite": 3},
        {"unrelated": 2.0},
        {"image_shape": (3, 0, 4)},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(SettingError, match=next(iter(wrong)).replace("non_finite", "non-finite")):
        Certificate.from_scores([0.9, 0.8], **{"sigma": 0.25, **wrong})


def test_questions_out_of_range_are_refused():
    certificate = Certificate.from_scores(table_scores(0.9, 0.03, 1000), sigma=0.25)
    for eps in (-0.1, float("nan"), "far", [0.1, 0.2]):
        with pytest.raises(SettingError, match="eps"):
            certificate.fcsb(eps)
    with pytest.raises(SettingError, match="eps"):
        certificate.curve([0.1, -0.1])
    for threshold in (-0.1, 1.1, float("nan")):
        with pytest.raises(SettingError, match="threshold"):
            certificate.radius(threshold)
    for law in (([0.5], [0.9]), ([1.5], [1.0]), ([0.5, 0.6], [1.0]), ([], []), ([0.5, 0.6], [1.5, -0.5])):
        with pytest.raises(SettingError):
            distribution_population(*law, 1.0)
    with pytest.raises(SettingError, match="delta"):
        mean_population([0.5], [1.0], -1.0)
    with pytest.raises(SettingError, match="alpha"):
        betting_lower(np.array([0.5]), 1.0)


@pytest.mark.parametrize(("n", "seconds"), [(1_000, 0.02), (1_000_000, 2.0)])
def test_a_certificate_and_its_curve_are_quick(n, seconds):
    scores = np.random.default_rng(0).permutation(table_scores(0.9, 0.03, n))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        Certificate.from_scores(scores, sigma=0.25).curve(np.linspace(0, 1, 50))
        times.append(time.perf_counter() - start)
    assert min(times) < seconds


@pytest.mark.parametrize("refined", [False, True])
def test_a_certificate_says_what_each_of_its_bounds_says_alone(refined):
    scores = table_scores(0.9, 0.03, 1000)
    angular = Angular(t0=0.5, count=1000, norm=0.1, n=1000) if refined else None
    best = Certificate.from_scores(scores, sigma=0.25, alpha=1e-3, angular=angular)
    spent = 1e-3 / (4 if refined else 2)
    eps = np.linspace(0, 0.5, 9)
    for method in ("mean", "distribution"):
        alone = Certificate.from_scores(scores, sigma=0.25, alpha=spent, method=method)
        assert np.array_equal(best.by(method).curve(eps), alone.curve(eps), equal_nan=True)
        assert best.by(method).radius() == alone.radius()
        assert best.by(method).alpha * best.by(method).share == pytest.approx(spent)
    plugin = Certificate.from_scores(scores, sigma=0.25, method="plugin")
    assert best.by("plugin").is_estimate
    assert best.by("plugin").radius() == plugin.radius()
    inner = np.fmax(best.by("mean").curve(eps), best.by("distribution").curve(eps))
    assert np.array_equal(best.by("best").curve(eps), inner, equal_nan=True)
    assert (best.by("best") is best) == (not refined)
    assert Certificate.from_json(best.by("mean").to_json()) == best.by("mean")
    for method, other in (("mean", "distribution"), ("distribution", "mean"), ("plugin", "mean"), ("mean", "best")):
        with pytest.raises(SettingError, match=f"no bound '{other}'"):
            Certificate.from_scores(scores, sigma=0.25, method=method).by(other)
    with pytest.raises(SettingError, match="method must be one of"):
        best.by("hope")
