"""From a model and its images to certificates."""

from __future__ import annotations

import pytest
import torch
from support import make_llava, make_psm

import fs_plugins
from fs_plugins import Certificate, FeatureSmoother, ModelError, SettingError
from fs_plugins.certificates.image import certify_image
from fs_plugins.certificates.plan import Plan

SIGMA = 0.25


@pytest.fixture
def smoother(call) -> FeatureSmoother:
    torch.manual_seed(0)  # the purifier's own initialisation
    return FeatureSmoother(call, psm=make_psm(call), sigma=SIGMA)


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(3))


def test_sampling_stops_at_a_reached_target_and_where_it_is_out_of_reach(smoother, image):
    def n(target, **plan):
        plan = Plan(n=800, target=target, **plan)
        return certify_image(smoother, image, plan, key=b"key")

    full = n(None)
    assert full.n == 800
    assert full.share == 1
    assert n(full.radius() * 0.2).n < 800
    assert n(full.radius() * 0.2).radius() >= full.radius() * 0.2
    assert n(1e3).n == 100, "not even perfect scores would certify this"
    assert n(full.radius() * 0.2).share == 0.25


def test_certificates_of_a_model_say_what_they_depend_on(images):
    llava = make_llava()
    psm = make_psm(fs_plugins.vision_call(llava))
    one, two, three = fs_plugins.certify(llava, images, n=60, psm=psm, seed=1)
    assert isinstance(one, Certificate)
    assert (one.sigma, one.n, one.alpha, one.method) == (0.25, 60, 1e-3, "best")
    assert one.image_shape == (3, 16, 16)
    assert one.readouts == ("hidden_states[-2][1:]",)
    assert one.psm == "random"
    assert one.encoder == psm.config.fingerprint
    assert one.seed == "seed 1"
    assert -1 <= one.unrelated <= 1
    assert one.angular is not None
    assert len({one.mean, two.mean, three.mean}) == 3
    assert not fs_plugins.status(llava).enabled


def test_smoothing_that_is_enabled_plays_no_part(images):
    llava = make_llava()
    settings = {"n": 40, "psm": None, "sigma": 0.1, "seed": 1}
    before = fs_plugins.certify(llava, images, **settings)
    with fs_plugins.enable(llava, psm=None, sigma=0.5) as handle:
        assert fs_plugins.certify(llava, images, **settings) == before
        assert handle.status().vision[0].calls == 0


def test_copies_of_an_image_are_not_unrelated(images):
    settings = {"n": 10, "psm": None, "sigma": 0.1, "seed": 0}
    [whole, *_] = fs_plugins.certify(make_llava(), images, **settings)
    [doubled, *_] = fs_plugins.certify(make_llava(), torch.cat([images, images[:2]]), **settings)
    assert doubled.unrelated == pytest.approx(whole.unrelated)
    assert fs_plugins.certify(make_llava(), images[[0, 0]], **settings)[0].unrelated is None


def test_progress_counts_images_that_were_finished_before(images, tmp_path):
    told: list[int] = []
    settings = {"n": 20, "psm": None, "sigma": 0.1, "seed": 0, "out": tmp_path / "rows.jsonl", "angular": False}
    fs_plugins.certify(make_llava(), images, **settings)
    fs_plugins.certify(make_llava(), images, **settings, advance=told.append)
    assert told == [20, 20, 20]


@pytest.mark.parametrize(
    "wrong", [{"alpha": 2.0}, {"method": "bogus"}, {"threshold": 7.0, "target": 0.1}, {"sigma": 0}]
)
def test_bad_settings_cost_no_draw_and_leave_no_file(images, tmp_path, wrong):
    drawn = []
    settings = {"n": 10, "psm": None, "sigma": 0.1, **wrong}
    with pytest.raises(SettingError):
        fs_plugins.certify(make_llava(), images, **settings, out=tmp_path / "rows.jsonl", advance=drawn.append)
    assert not drawn
    assert not (tmp_path / "rows.jsonl").exists()


def test_an_encoder_in_training_mode_is_refused(images):
    llava = make_llava()
    llava.model.vision_tower.train()
    with pytest.raises(ModelError, match="vision encoder is in training mode"):
        fs_plugins.certify(llava, images, psm=None, sigma=0.25)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n": 0}, "n .*whole number"),
        ({"target": -1}, "target"),
        ({"alpha": 1.5}, "alpha"),
        ({"method": "hope"}, "method"),
        ({"sigma": 0}, "sigma"),
        ({"encoder": 1}, "1 vision encoders"),
    ],
)
def test_bad_settings_are_refused(images, wrong, message):
    settings = {"n": 10, "psm": None, "sigma": 0.25, **wrong}
    with pytest.raises(SettingError, match=message):
        fs_plugins.certify(make_llava(), images, **settings)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x * 255, r"floating point in \[0, 1\]"),
        (lambda x: x[..., :8], r"must be \(3, 16, 16\)"),
        (lambda x: x[:1], r"must be \(3, 16, 16\)"),
        (lambda x: (x * 255).byte(), "floating point"),
    ],
)
def test_bad_images_are_refused_by_name(images, spoil, message):
    with pytest.raises(SettingError, match="Image dog " + message if "must" in message else "Image dog must be"):
        fs_plugins.certify(make_llava(), {"dog": spoil(images[0])}, n=10, psm=None, sigma=0.25)


def test_a_model_in_training_mode_is_refused(images):
    with pytest.raises(ModelError, match="training mode"):
        fs_plugins.certify(make_llava().train(), images, psm=None, sigma=0.25)
