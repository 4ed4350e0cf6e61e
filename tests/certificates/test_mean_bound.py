"""Lower bounds of the mean score from finite samples."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from line_encoders import table_scores

from fs_plugins.certificates import Certificate
from fs_plugins.certificates.bounds import (
    betting_lower,
    hoeffding_lower,
    plugin_mean,
)


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
