"""The probability of an answer: exact values, coverage whenever one stops, and what is left of it under attack."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import ndtr, ndtri

from fs_plugins import SettingError
from fs_plugins.certificates.chances import RUNNING, answer_radius, kept, lower, probability_for, running_lower


def wealth(count, missed, p):
    """K_n(p) of the docstring, by quadrature."""
    return quad(lambda u: (1 + u * (1 / p - 1)) ** count * (1 - u) ** missed, 0, 1)[0]


@pytest.mark.parametrize(("count", "n"), [(1, 1), (10, 10), (19, 20), (50, 80), (3, 40)])
def test_the_running_bound_is_where_the_wealth_reaches_its_limit(count, n):
    found = running_lower(count, n, alpha=0.01)
    assert wealth(count, n - count, found) == pytest.approx(100, rel=1e-4)
    assert found < lower(count, n, alpha=0.01)


def test_one_success_of_one_shows_about_half_of_alpha():
    """K_1(p) = (1 + 1/p)/2, so that the bound is 1/(2/alpha - 1)."""
    assert running_lower(1, 1, alpha=0.01) == pytest.approx(1 / 199, abs=1e-9)
    assert running_lower(0, 5, alpha=0.01) == 0.0


def limits(bound, longest, *, p, alpha):
    """For n = 1 to ``longest``, from which count on a bound is above p, which grows with n."""
    found, count = [], 0
    for n in range(1, longest + 1):
        while count <= n and bound(count, n, alpha=alpha) <= p:
            count += 1
        found.append(count)
    return np.array(found)


@pytest.mark.parametrize("p", [0.3, 0.6, 0.95])
def test_the_running_bound_is_ever_wrong_in_at_most_alpha_of_all_runs(p):
    """At no n up to 400: it is above p where the wealth at p has reached 1/alpha."""
    rng, alpha, runs, longest = np.random.default_rng(1), 0.05, 4000, 400
    counts = (rng.random((runs, longest)) < p).cumsum(1)
    missed = (counts >= limits(running_lower, longest, p=p, alpha=alpha)).any(1).mean()
    assert missed <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / runs)
    assert missed > 0.002  # and is not wrong by never saying anything


def test_clopper_and_pearson_looked_at_again_and_again_would_not_hold():
    rng, alpha, p = np.random.default_rng(2), 0.05, 0.6
    counts = (rng.random((1000, 300)) < p).cumsum(1)
    assert (counts >= limits(lower, 300, p=p, alpha=alpha)).any(1).mean() > 2 * alpha


@given(p=st.floats(0.501, 0.999), sigma=st.floats(0.05, 1.0), n0=st.integers(1, 8), share=st.floats(0.0, 1.5))
def test_radius_and_what_is_kept_are_one_statement(p, sigma, n0, share):
    radius = answer_radius(p, sigma=sigma, n0=n0)
    assert kept(p, radius, sigma=sigma, n0=n0) == pytest.approx(0.5)
    assert kept(p, 0.0, sigma=sigma, n0=n0) == pytest.approx(p)
    assert kept(p, share * radius, sigma=sigma, n0=n0) == pytest.approx(ndtr((1 - share) * ndtri(p)))
    assert probability_for(radius, sigma=sigma, n0=n0) == pytest.approx(p)
    assert radius == pytest.approx(answer_radius(p, sigma=sigma, n0=1) / math.sqrt(n0))


def test_without_a_majority_there_is_no_radius():
    assert answer_radius(0.5, sigma=0.25, n0=1) is None
    assert answer_radius(0.0, sigma=0.25, n0=4) is None
    assert kept(0.0, 1.0, sigma=0.25, n0=4) == 0.0


def chance(kind, cuts, x, *, sigma, n0):
    """Of an answer that is cut at some places by n0 noisy copies of the number x: exactly."""
    if kind in ("mean", "first"):
        width = sigma / math.sqrt(n0) if kind == "mean" else sigma
        return float(np.diff([0.0, *ndtr((cuts - x) / width), 1.0])[::2].sum())
    if kind == "largest":
        return float(ndtr((cuts[0] - x) / sigma) ** n0)
    return float(1 - ndtr((cuts[0] - x) / sigma) ** n0)


def test_the_bound_holds_for_every_answer_of_any_number_of_copies():
    """10,000 answers whose probabilities are known exactly, at the image and at the worst shift along a line.

    Of the mean of n0 copies, cut at up to four places; of the largest or the smallest copy; of the first alone.
    """
    rng = np.random.default_rng(3)
    tight = 0
    for _ in range(10_000):
        n0, sigma, shift = int(rng.choice([1, 2, 4])), rng.uniform(0.1, 1), rng.normal() * rng.choice([0.1, 1])
        at, kind = rng.normal(), str(rng.choice(["mean", "largest", "smallest", "first"]))
        cuts = np.sort(rng.normal(size=rng.integers(1, 5)))
        here, there = (chance(kind, cuts, x, sigma=sigma, n0=n0) for x in (at, at + shift))
        promised = kept(min(here, 1 - 1e-9), abs(shift), sigma=sigma, n0=n0)
        assert there >= promised - 1e-7
        tight += there < promised + 1e-6 and 0.01 < here < 0.99 and abs(shift) > 0.05
    assert tight > 100  # half-spaces of the mean reach the bound: nothing better holds for all answers


def test_antithetic_pairs_would_make_it_false():
    """An answer that reads both copies of a pair knows x itself: it is sure here, and gone a hair's breadth away."""
    rng, sigma, at, near = np.random.default_rng(4), 0.25, 0.3, 0.3 + 1e-3

    def answers(x, pairs, size=1000):
        noise = sigma * rng.normal(size=size)
        other = -noise if pairs else sigma * rng.normal(size=size)
        return (np.abs((x + noise + x + other) / 2 - at) < 1e-6).mean()

    assert answers(at, pairs=True) == 1.0
    assert answers(near, pairs=True) == 0.0
    assert kept(0.99, 1e-3, sigma=sigma, n0=2) > 0.98  # what would have been promised
    assert answers(at, pairs=False) < 0.01


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: running_lower(3, 2, alpha=0.1), "count must be between 0 and n = 2"),
        (lambda: running_lower(1, 0, alpha=0.1), "n \\(servings\\)"),
        (lambda: running_lower(1, 2, alpha=1.0), "alpha is the probability"),
        (lambda: lower(1, 2, alpha=0.0, method=RUNNING), "alpha is the probability"),
        (lambda: answer_radius(1.0, sigma=0.25, n0=1), "probability must be in"),
        (lambda: answer_radius(0.9, sigma=0.0, n0=1), "sigma must be"),
        (lambda: kept(0.9, -1.0, sigma=0.25, n0=1), "eps is an l2 distance"),
        (lambda: kept(0.9, 0.1, sigma=0.25, n0=0), "n0"),
    ],
)
def test_what_is_no_probability_is_refused(make, said):
    with pytest.raises(SettingError, match=said):
        make()
