"""From finite samples: how often a certificate is wrong, on encoders whose truth is known exactly.

A certificate misses if it exceeds the truth at any eps. The strict count is harder: it may not even exceed the bound
that the exact law of the draws gives, which lies below the truth.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from line_encoders import SIGN_FLIP, LineEncoder, half_space, random_encoder, table_scores, unit
from scipy.special import ndtri

from fs_plugins.certificates import Angular, Certificate, PredictionCertificate
from fs_plugins.certificates.bounds import (
    Band,
    angular_population,
    binomial_lower,
    distribution_population,
    furthest,
    hoeffding_lower,
    margin_scores,
    mean_population,
    pilot_threshold,
)

pytestmark = pytest.mark.slow

ALPHA = 0.05
REPETITIONS = 1200
EPS = np.array([0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.3, 1.6, 2.0, 2.5])


def skewed(generator: np.random.Generator) -> np.ndarray:
    """Scores with a long low tail, and one draw in a hundred that failed."""
    scores = 1 - 0.05 * generator.exponential(size=200)
    scores[:2] = -1
    return np.clip(scores, -1, 1)


ENCODERS = {
    "tight": half_space(table_scores(0.95, 0.02, 200)),
    "wide": half_space(table_scores(0.5, 0.3, 200)),
    "skewed": half_space(skewed(np.random.default_rng(0))),
    "rare": LineEncoder(np.array([ndtri(0.985)]), np.array([[1.0, 0.0], [-0.8, 0.6]]), np.array([1.0, 0.0])),
    "two-faced": SIGN_FLIP,
    "coin": LineEncoder(np.array([0.0]), np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([1.0, 0.0])),
    **{f"random {seed}": random_encoder(np.random.default_rng(seed)) for seed in (12, 15, 24)},
}


def misses(encoder: LineEncoder, n: int, repetitions: int, certify, population) -> tuple[float, float]:
    """The share of certificates that exceed the truth somewhere, and that exceed the population bound."""
    generator = np.random.default_rng(n)
    truth = np.array([encoder.worst(eps) for eps in EPS])
    wrong = strict = 0
    for pieces in encoder.draws(generator, repetitions, n):
        curve = np.nan_to_num(certify(pieces).curve(EPS), nan=-2.0)
        wrong += bool((curve > truth + 1e-9).any())
        strict += bool((curve > population + 1e-9).any())
    return wrong / repetitions, strict / repetitions


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("n", [30, 400])
@pytest.mark.parametrize("method", ["mean", "distribution", "best"])
def test_a_method_misses_less_often_than_alpha(method, n, name):
    encoder = ENCODERS[name]
    scores, law = np.clip(encoder.scores, -1, 1), encoder.probabilities()
    population = (mean_population if method == "mean" else distribution_population)(scores, law, EPS)
    wrong, strict = misses(
        encoder,
        n,
        REPETITIONS,
        lambda pieces: Certificate.from_scores(scores[pieces], sigma=1, alpha=ALPHA, method=method),
        population,
    )
    assert wrong <= strict < ALPHA


def test_the_estimate_does_miss_so_the_count_can_see_it():
    encoder = ENCODERS["tight"]
    scores, law = encoder.scores, encoder.probabilities()
    _, strict = misses(
        encoder,
        400,
        500,
        lambda pieces: Certificate.from_scores(scores[pieces], sigma=1, method="plugin"),
        mean_population(scores, law, EPS),
    )
    assert strict > 0.3


@pytest.mark.parametrize("mean", [0.02, 0.5, 0.98])
@pytest.mark.parametrize("n", [10, 100, 1000])
def test_the_betting_bound_holds_for_the_hardest_law_and_for_sorted_draws(n, mean):
    """Scores of -1 and 1 alone leave the least slack; the order they come in must not matter."""
    generator = np.random.default_rng(n)
    scores = np.sort(np.where(generator.random((REPETITIONS, n)) < mean, 1.0, -1.0), axis=1)
    lower = [
        Certificate.from_scores(draws[:: (-1) ** i], sigma=1, alpha=ALPHA, method="mean").lower
        for i, draws in enumerate(scores)
    ]
    assert np.mean(np.array(lower) > 2 * mean - 1) < ALPHA
    assert np.mean([hoeffding_lower(draws, ALPHA) > 2 * mean - 1 for draws in scores]) < ALPHA


@pytest.mark.parametrize("n", [1, 2, 10, 100, 1000])
def test_a_band_holds_everywhere_at_once(n):
    """Uniform scores, whose survival function is a line; 20,000 bands."""
    generator = np.random.default_rng(n)
    wrong, repetitions = 0, 20_000 if n < 1000 else 5_000
    for scores in generator.uniform(-1, 1, (repetitions, n)):
        band = Band.from_scores(scores, ALPHA)
        wrong += bool((np.array(band.survival) > (1 - np.array(band.support)) / 2).any())
    # A single score attains alpha exactly.
    assert wrong / repetitions < ALPHA + (3 * math.sqrt(ALPHA / repetitions) if n == 1 else 0)


# C: the angular refinement, with its threshold from a pilot that is discarded.


def angular_of(encoder: LineEncoder, pieces: np.ndarray, t0: float) -> Angular:
    near = pieces[encoder.scores[pieces] >= t0]
    norm = float(np.linalg.norm(encoder.perpendicular[near].sum(axis=0))) / len(pieces)
    return Angular(t0=t0, count=len(near), norm=norm, n=len(pieces))


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("n", [50, 400])
def test_the_angular_refinement_misses_less_often_than_alpha(n, name):
    encoder = ENCODERS[name]
    scores, law = np.clip(encoder.scores, -1, 1), encoder.probabilities()
    pilot = encoder.draws(np.random.default_rng(1), 50)
    for t0 in (pilot_threshold(scores[pilot], n=n), 0.0):
        wrong, strict = misses(
            encoder,
            n,
            REPETITIONS // 2,
            lambda pieces, t0=t0: Certificate.from_scores(
                scores[pieces], sigma=1, alpha=ALPHA, method="distribution", angular=angular_of(encoder, pieces, t0)
            ),
            angular_population(scores, law, encoder.perpendicular, t0, EPS),
        )
        assert wrong <= strict < ALPHA


# B: what n0 draws serve.


@pytest.mark.parametrize("name", ["random 12", "random 15", "random 24", "rare", "coin", "ordered"])
@pytest.mark.parametrize("noise", ["iid", "antithetic"])
@pytest.mark.parametrize(("n0", "beta"), [(1, 0.1), (2, 0.1), (3, 0.3), (4, 0.1)])
def test_what_is_served_misses_less_often_than_promised(n0, beta, noise, name):
    """A certificate misses if, at the worst place within eps, the served cosine is below it more often than beta."""
    encoder = half_space([0.95, 0.93, 0.9, 0.85, 0.7]) if name == "ordered" else ENCODERS[name]
    scores, n = np.clip(encoder.scores, -1, 1), 400
    generator = np.random.default_rng(n0)
    places = {eps: [encoder.served(x, n0, noise) for x in np.linspace(-eps, eps, 9)] for eps in (0.0, 0.1, 0.4)}
    wrong = 0
    for pieces in encoder.draws(generator, REPETITIONS // 3, n):
        certificate = Certificate.from_scores(scores[pieces], sigma=1, alpha=ALPHA, method="distribution")
        wrong += any(
            (q := certificate.served_fcsb(eps, n0, beta, noise)) is not None
            and any(mass[cosine < q - 1e-9].sum() > beta for cosine, mass in laws)
            for eps, laws in places.items()
        )
    assert wrong / (REPETITIONS // 3) < ALPHA


# D: predictions.

CLASSES = unit(np.array([[1.0, 0.2], [0.9, -0.5], [-0.3, 1.0]]))


def first_change(kept, limit: float = 6.0) -> float:
    """The smallest distance at which ``kept`` (for an array of places) fails."""
    x = np.linspace(0, limit, 60_001)
    fails = ~(kept(x) & kept(-x))
    return float(x[np.argmax(fails)]) if fails.any() else math.inf


@pytest.mark.parametrize("name", ["tight", "skewed", "rare", "coin", *(f"random {seed}" for seed in (12, 15, 24))])
@pytest.mark.parametrize("n", [50, 400])
def test_a_prediction_changes_within_the_radius_less_often_than_alpha(n, name):
    encoder = ENCODERS[name]
    classes = np.concatenate([CLASSES, np.zeros((3, encoder.units.shape[1] - 2))], axis=1)
    products = encoder.units @ classes.T
    predicted = int(np.argmax(encoder.probabilities() @ products))
    votes = products.argmax(axis=1) == predicted
    margins = margin_scores(products, classes, predicted)
    law = encoder.probabilities()

    true_vote = first_change(lambda x: encoder.probabilities(x) @ votes > 0.5)
    true_feature = first_change(lambda x: (encoder.probabilities(x) @ products).argmax(axis=-1) == predicted)
    strict_vote = max(0.0, float(ndtri(min(1.0, law @ votes))))
    strict_feature = min(
        furthest(lambda delta, column=column: distribution_population(column, law, delta), 0.0) or 0.0
        for column in margins.T
    )
    assert strict_vote <= true_vote + 1e-3
    assert strict_feature <= true_feature + 1e-3

    wrong = strict = 0
    for pieces in encoder.draws(np.random.default_rng(n), REPETITIONS, n):
        certificate = PredictionCertificate.from_draws(
            int(votes[pieces].sum()), margins[pieces], predicted=predicted, sigma=1, alpha=ALPHA
        )
        vote, feature = certificate.vote_radius or 0.0, certificate.feature_radius or 0.0
        wrong += vote > true_vote + 1e-3 or feature > true_feature + 1e-3
        strict += vote > strict_vote + 1e-9 or feature > strict_feature + 1e-9
    assert wrong / REPETITIONS <= strict / REPETITIONS < ALPHA


@pytest.mark.parametrize(("p", "n"), [(0.6, 50), (0.9, 100), (0.97, 400), (0.999, 1000)])
def test_votes_alone_miss_less_often_than_alpha(p, n):
    votes = np.random.default_rng(n).binomial(n, p, 100_000)
    bound = {count: binomial_lower(int(count), n, ALPHA) for count in np.unique(votes)}
    assert np.mean([bound[count] > p for count in votes]) < ALPHA


# Looks that stop early.


def test_stopping_at_the_look_one_likes_misses_less_often_than_alpha():
    """Four sample sizes, alpha split between them beforehand; the certificate with the largest radius is kept."""
    encoder = ENCODERS["skewed"]
    scores, law = encoder.scores, encoder.probabilities()
    population = distribution_population(scores, law, EPS)
    wrong = 0
    for pieces in encoder.draws(np.random.default_rng(0), REPETITIONS, 400):
        looks = [
            Certificate.from_scores(scores[pieces[:n]], sigma=1, alpha=ALPHA, method="distribution", share=0.25)
            for n in (50, 100, 200, 400)
        ]
        curves = np.nan_to_num([look.curve(EPS) for look in looks], nan=-2.0)
        wrong += bool((curves.max(axis=0) > population + 1e-9).any())
    assert wrong / REPETITIONS < ALPHA
