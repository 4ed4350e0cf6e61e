"""Certificates of zero-shot and linear predictions, from a model to the certificate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import TinyEncoder, make_psm, tiny_call
from torch import nn

import fs_plugins
from fs_plugins import FeatureSmoother, PredictionCertificate, SettingError
from fs_plugins.certificates.bounds import argmax_radius, margin_scores, vote_radius
from fs_plugins.certificates.image import certify_prediction
from fs_plugins.certificates.plan import Plan
from fs_plugins.certificates.sampling import Sampler

SIGMA = 0.25


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def directions() -> torch.Tensor:
    return torch.randn(5, 24, generator=torch.Generator().manual_seed(1))


def test_votes_and_margins_are_those_of_a_plain_loop_over_the_same_draws(call, image, directions):
    torch.manual_seed(0)
    sigma = 0.02
    smoother = FeatureSmoother(call, psm=make_psm(call, sigma=sigma), sigma=sigma)
    found = certify_prediction(smoother, image, directions, Plan(n=800), key=b"key", labels="abcde", rows=7)
    generator = Sampler(smoother, image, key=b"key")._stream("bound")
    noise = [torch.randn(image.shape, generator=generator) for _ in range(800)]
    units = []
    for e in noise:
        z = call.encode(smoother.psm.purify((image + sigma * e)[None], sigma))["tokens"]
        units.append(nn.functional.normalize(smoother.psm.map("tokens", z, sigma).flatten(), dim=0))
    u, t = torch.stack(units).double().detach(), directions.double()
    votes = (u @ t.T).argmax(1)
    assert found.votes == int((votes == found.predicted).sum())
    assert found.label == "abcde"[found.predicted]
    assert found.predicted == int(votes.mode().values)
    margins = margin_scores((u @ t.T).numpy(), t.numpy(), found.predicted)
    assert found.vote_radius == pytest.approx(vote_radius(found.votes, 800, sigma=sigma, alpha=5e-4))
    assert found.feature_radius == pytest.approx(argmax_radius(margins, sigma=sigma, alpha=5e-4), abs=1e-6)


def test_the_class_is_chosen_on_draws_that_have_no_part_in_the_bound(image, directions):
    smoother = FeatureSmoother(tiny_call(TinyEncoder()), psm=None, sigma=SIGMA)
    sampler = Sampler(smoother, image, key=b"key", directions=directions)
    seen: list[torch.Tensor] = []
    block = sampler._block
    sampler._block = lambda generator, size: (seen.append((drawn := block(generator, size))[0]), drawn)[1]
    sampler.favourite(40)
    sampler.extend(40)
    pilot, bound = torch.cat(seen).split(40)
    assert not torch.isclose(pilot[:, None], bound[None], atol=1e-6).all(-1).any()


class Sided(nn.Module):
    """The feature is the signed distance to a plane through the middle of the cube, beside a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(
            nn.functional.normalize(torch.randn(192, generator=torch.Generator().manual_seed(2)), dim=0)
        )

    def forward(self, pixel_values):
        side = (pixel_values.flatten(1) - 0.5) @ self.w
        return {"tokens": torch.stack([side, torch.full_like(side, 0.5)], dim=1)}


def sided_call():
    from fs_plugins import Field, PixelSpace, Readout

    plain = PixelSpace((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return tiny_call(Sided(), pixels=plain, readouts=(Readout("tokens", (Field("tokens", 0),), width=2, tokens=0),))


def test_the_radius_of_a_half_space_is_its_distance_and_never_more():
    call = sided_call()
    sides = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    w = call.module.w.detach()
    for distance in (0.1, 0.3, -0.4):
        image = (0.5 + distance * w).view(3, 8, 8)
        smoother = FeatureSmoother(call, psm=None, sigma=SIGMA)
        found = certify_prediction(smoother, image, sides, Plan(n=4000), key=b"key")
        assert found.predicted == (distance < 0)
        # The smoothed vote and the smoothed feature both change sides exactly at the plane.
        assert 0.8 * abs(distance) < found.vote_radius < abs(distance)
        assert found.feature_radius < abs(distance)


def test_draws_without_a_feature_vote_for_nobody(image, directions):
    class Fragile(TinyEncoder):
        def forward(self, pixel_values):
            output = super().forward(pixel_values)
            tokens = output["tokens"].clone()
            if len(tokens) > 1:
                tokens[::2] = float("nan")
            return {**output, "tokens": tokens}

    whole = FeatureSmoother(tiny_call(TinyEncoder()), psm=None, sigma=0.01)
    lame = FeatureSmoother(tiny_call(Fragile()), psm=None, sigma=0.01)
    good = certify_prediction(whole, image, directions, Plan(n=300), key=b"key", rows=10)
    bad = certify_prediction(lame, image, directions, Plan(n=300), key=b"key", rows=10)
    assert (good.votes, good.non_finite) == (300, 0)
    assert (bad.votes, bad.non_finite) == (150, 150)
    assert good.radius > 0
    assert bad.radius is None


def test_sampling_stops_where_the_target_is_reached_or_out_of_reach(image, directions):
    smoother = FeatureSmoother(tiny_call(TinyEncoder()), psm=None, sigma=0.02)
    full = certify_prediction(smoother, image, directions, Plan(n=800), key=b"key")
    near = certify_prediction(smoother, image, directions, Plan(n=800, target=full.radius / 3), key=b"key")
    assert near.n < 800
    assert near.radius >= full.radius / 3
    assert near.share == 0.25, "of four looks"
    assert near.vote_radius == pytest.approx(vote_radius(near.votes, near.n, sigma=0.02, alpha=1e-3 / 8))
    assert certify_prediction(smoother, image, directions, Plan(n=800, target=10.0), key=b"key").n == 100


def test_a_models_predictions_are_kept_and_an_interrupted_run_goes_on(clip, images, tmp_path):
    texts = torch.randn(4, 24, generator=torch.Generator().manual_seed(5))
    named = dict(zip(("cat", "dog", "owl", "fox"), texts, strict=True))
    settings = {"n": 60, "psm": None, "sigma": 0.1, "seed": 0}
    rows = tmp_path / "rows.jsonl"
    whole = fs_plugins.certify_predictions(clip, images, named, **settings, out=rows)
    assert [one.label for one in whole] == [list(named)[one.predicted] for one in whole]
    assert all(one.image_shape == (3, 16, 16) and one.seed == "seed 0" for one in whole)
    lines = rows.read_text("utf-8").splitlines()
    rows.write_text("\n".join([*lines[:2], lines[2][:40]]), "utf-8")
    assert fs_plugins.certify_predictions(clip, images, named, **settings, out=rows) == whole
    assert rows.read_text("utf-8").splitlines() == lines
    assert isinstance(whole[0], PredictionCertificate)
    with pytest.raises(SettingError, match=r"other settings \(directions"):
        fs_plugins.certify_predictions(clip, images, -texts, **settings, out=rows)
    with pytest.raises(SettingError, match="other settings"):
        fs_plugins.certify(clip, images, **settings, out=rows)
    with torch.no_grad():
        clip.visual_projection.weight.mul_(torch.linspace(0.5, 1.5, 24)[:, None])
    with pytest.raises(SettingError, match=r"other settings \(encoder"):
        fs_plugins.certify_predictions(clip, images, named, **settings, out=rows)


def test_classes_may_be_called_by_numbers(clip, images, tmp_path):
    texts = torch.randn(2, 24, generator=torch.Generator().manual_seed(5))
    settings = {"n": 20, "psm": None, "sigma": 0.1, "seed": 0, "out": tmp_path / "rows.jsonl"}
    told = fs_plugins.certify_predictions(clip, images, {7: texts[0], 8: texts[1]}, **settings)
    assert {one.label for one in told} <= {"7", "8"}
    assert fs_plugins.certify_predictions(clip, images, {7: texts[0], 8: texts[1]}, **settings) == told


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.ones(1, 24), "K >= 2"),
        ({}, "K >= 2"),
        ({"a": torch.ones(24), "b": torch.ones(23)}, "K >= 2"),
        (torch.ones(3, 24), "equal or non-finite"),
        (torch.full((2, 24), torch.nan), "equal or non-finite"),
        (torch.eye(4), r"\(K, 24\)"),
    ],
)
def test_directions_that_cannot_tell_classes_apart_are_refused(clip, images, wrong, message):
    with pytest.raises(SettingError, match=message):
        fs_plugins.certify_predictions(clip, images, wrong, n=20, psm=None, sigma=0.1)


def test_products_are_in_the_order_of_the_draws_whatever_the_rows(image, directions):
    smoother = FeatureSmoother(tiny_call(TinyEncoder()), psm=None, sigma=SIGMA)
    one = Sampler(smoother, image, key=b"key", rows=64, directions=directions)
    other = Sampler(smoother, image, key=b"key", rows=3, directions=directions)
    one.extend(20)
    for part in (5, 15):
        other.extend(part)
    assert one.products.shape == (20, 5)
    assert np.allclose(one.products, other.products, atol=1e-6)
