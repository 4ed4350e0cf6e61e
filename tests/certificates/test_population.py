"""Bounds where the law of the score is known: exact values, and never above the truth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from line_encoders import EPS, SIGN_FLIP, half_space, random_encoder
from scipy.stats import norm

from fs_plugins.certificates import Certificate
from fs_plugins.certificates.bounds import (
    angular_population,
    distribution_population,
    mean_population,
    shifted,
)


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


def test_a_mean_that_rounds_above_1_is_1():
    sixths = np.full(6, 1e-6) / np.full(6, 1e-6).sum()
    assert float(sixths @ np.ones(6)) > 1
    assert (mean_population(np.ones(6), sixths, EPS) == 1).all()
    assert mean_population(-np.ones(6), sixths, 0.5) == -1


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
