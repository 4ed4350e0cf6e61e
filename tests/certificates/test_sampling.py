"""From a model and an image to scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import TinyEncoder, make_psm, tiny_call

from fs_plugins import FeatureSmoother, ModelError
from fs_plugins.certificates.image import certify_image
from fs_plugins.certificates.plan import Plan
from fs_plugins.certificates.sampling import Sampler

SIGMA = 0.25


@pytest.fixture
def smoother(call) -> FeatureSmoother:
    torch.manual_seed(0)  # the purifier's own initialisation
    return FeatureSmoother(call, psm=make_psm(call), sigma=SIGMA)


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(3))


def test_scores_are_products_of_unit_features_with_the_plain_clean_feature(smoother, image):
    sampler = Sampler(smoother, image, key=b"key", rows=7)
    sampler.extend(20)
    call = smoother.call
    clean = call.encode(image[None])["tokens"].flatten()
    generator = sampler._stream("bound")
    wanted = []
    for _ in range(20):
        noise = torch.randn(image.shape, generator=generator)
        z = smoother.psm.purify((image + SIGMA * noise)[None], SIGMA)
        z = smoother.psm.map("tokens", call.encode(z)["tokens"], SIGMA).flatten()
        wanted.append(float(torch.cosine_similarity(z, clean, dim=0)))
    assert np.allclose(sampler.scores, wanted, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 5, 100])
def test_neither_rows_nor_steps_change_what_is_drawn(smoother, image, rows):
    whole = Sampler(smoother, image, key=b"key", rows=64)
    whole.t0 = 0.2
    whole.extend(40)
    pieces = Sampler(smoother, image, key=b"key", rows=rows)
    pieces.t0 = 0.2
    for part in (3, 30, 7):
        pieces.extend(part)
    assert np.allclose(whole.scores, pieces.scores, atol=1e-6)
    assert whole.angular.count == pieces.angular.count
    assert whole.angular.norm == pytest.approx(pieces.angular.norm, abs=1e-6)


def test_the_pilot_has_no_part_in_the_bound(smoother, image):
    one, other = (Sampler(smoother, image, key=b"key") for _ in range(2))
    pilot = one.pilot(30)
    one.extend(30)
    other.extend(30)
    assert np.array_equal(one.scores, other.scores)
    assert not np.isin(pilot, one.scores).any()


def test_the_angular_statistics_are_those_of_the_draws(smoother, image):
    sampler = Sampler(smoother, image, key=b"key", rows=8)
    sampler.t0 = t0 = float(np.median(sampler.pilot(50)).clip(0, 1))
    seen = []
    block = sampler._block

    def watched(generator, size):
        seen.append(block(generator, size))
        return seen[-1]

    sampler._block = watched
    sampler.extend(50)
    units = torch.cat([units for units, *_ in seen]).double()
    scores = torch.cat([products for _, products, *_ in seen])
    across = units - scores[:, None] * sampler.reference.double()
    near = scores >= t0
    assert sampler.angular.count == int(near.sum())
    assert sampler.angular.norm == pytest.approx(float(across[near].sum(0).norm()) / 50, abs=1e-6)


def test_another_key_or_image_has_other_draws(smoother, image):
    def scores(key, picture):
        sampler = Sampler(smoother, picture, key=key)
        sampler.extend(10)
        return sampler.scores

    own = scores(b"key", image)
    assert np.array_equal(own, scores(b"key", image))
    assert not np.array_equal(own, scores(b"other", image))
    assert not np.array_equal(own, scores(b"key", image.flip(-1)))


class Fragile(TinyEncoder):
    """Every third image is not finite, or has a zero feature."""

    def forward(self, pixel_values):
        output = super().forward(pixel_values)
        tokens = output["tokens"].clone()
        if len(tokens) > 1:
            tokens[::3] = float("nan")
            tokens[1::3] = 0
        return {**output, "tokens": tokens}


def test_draws_without_a_direction_count_as_minus_one(image):
    sampler = Sampler(FeatureSmoother(tiny_call(Fragile()), psm=None, sigma=SIGMA), image, key=b"key", rows=30)
    sampler.t0 = 0.0
    sampler.extend(30)
    assert sampler.non_finite == 20
    assert (sampler.scores[[0, 1, 3, 4]] == -1).all()
    assert (sampler.scores[2::3] > -1).all()
    assert np.isfinite(sampler.angular.norm)


def test_an_image_without_a_clean_feature_is_an_error(image):
    class Dead(TinyEncoder):
        def forward(self, pixel_values):
            return {"tokens": torch.zeros(len(pixel_values), 4, 6)}

    with pytest.raises(ModelError, match="no direction"):
        Sampler(FeatureSmoother(tiny_call(Dead()), psm=None, sigma=SIGMA), image, key=b"")


@pytest.mark.parametrize("target", [None, 0.01])
def test_whoever_watches_sees_the_certificate_come_and_changes_nothing(smoother, image, target):
    plan, seen = Plan(n=40, target=target), []
    alone = certify_image(smoother, image, plan, key=b"key", rows=16)
    watched = certify_image(smoother, image, plan, key=b"key", rows=16, watch=seen.append)
    assert watched == alone
    assert [one.n for one in seen] == ([16, 32, 40] if target is None else [5])
    assert seen[-1] == (alone if target is None else seen[-1])
