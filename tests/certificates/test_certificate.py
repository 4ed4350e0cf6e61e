"""The certificate as a value: made from scores, asked for bounds, kept as JSON."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from line_encoders import EPS, table_scores

from fs_plugins import SettingError
from fs_plugins.certificates import Angular, Certificate
from fs_plugins.certificates.bounds import betting_lower, distribution_population, mean_population
from fs_plugins.certificates.methods import METHODS

samples = hnp.arrays(float, st.integers(1, 300), elements=st.floats(-1, 1)) | st.tuples(
    st.floats(0, 0.99), st.floats(0, 0.1), st.integers(1, 3000)
).map(lambda law: table_scores(*law))


@settings(max_examples=100)
@given(samples, st.sampled_from(list(METHODS)), st.floats(0.01, 2), st.floats(1e-6, 0.5), st.booleans())
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
