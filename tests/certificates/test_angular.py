"""The refinement of inner products to cosines."""

from __future__ import annotations

import math

import numpy as np
import pytest
from line_encoders import table_scores
from scipy.stats import norm

from fs_plugins import SettingError
from fs_plugins.certificates import Angular, Certificate
from fs_plugins.certificates.bounds import (
    angular_cosine,
    perpendicular_upper,
    pilot_threshold,
)


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
