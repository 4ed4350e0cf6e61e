"""What the mean of a few served draws is certified to be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from line_encoders import random_encoder, table_scores

from fs_plugins import SettingError
from fs_plugins.certificates import Certificate
from fs_plugins.certificates.bounds import (
    Band,
    served_quantile,
)


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
