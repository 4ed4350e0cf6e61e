"""Radii within which a label stays, from votes and margins."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from line_encoders import table_scores, unit
from scipy.stats import binomtest, norm

from fs_plugins import SettingError
from fs_plugins.certificates import Certificate, PredictionCertificate
from fs_plugins.certificates.bounds import (
    Band,
    argmax_radius,
    binomial_lower,
    furthest,
    margin_scores,
    vote_radius,
)


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
