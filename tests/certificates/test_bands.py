"""Lower bands of the score's distribution, and what they buy over bounds of the mean."""

from __future__ import annotations

import numpy as np
import pytest
from line_encoders import EPS, table_scores
from scipy.stats import beta as beta_law

from fs_plugins import SettingError
from fs_plugins.certificates import Certificate
from fs_plugins.certificates.bounds import (
    Band,
    furthest,
    hoeffding_lower,
    mean_bound,
    ranks,
)


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
