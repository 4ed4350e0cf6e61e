"""Every function and every file that takes a noise level refuses the same ones, in the same words."""

from __future__ import annotations

import json
import math

import pytest
import torch
from support import make_psm
from typer.testing import CliRunner

import fs_plugins
from fs_plugins import PSM, FSPluginsError, SettingError
from fs_plugins.certificates import Certificate, PredictionCertificate
from fs_plugins.certificates.bounds import argmax_radius, vote_radius
from fs_plugins.cli import app
from fs_plugins.evaluation.settings import Settings as Evaluation
from fs_plugins.psm import PSMConfig
from fs_plugins.settings import build
from fs_plugins.smoothing import FeatureSmoother
from fs_plugins.training import TrainingConfig, robustness_score
from fs_plugins.training.settings import Settings as Training

WRONG = [math.nan, math.inf, -math.inf, -0.25, True, 64, "0.25", [0.25], 10**400]
MESSAGE = r"sigma (must be a finite number >=? 0 in|is in) \[0, 1\] pixel units"


def certificate(sigma):
    return Certificate.from_scores([0.9] * 50, sigma=sigma)


def prediction(sigma):
    return PredictionCertificate.from_draws(45, [[0.5]] * 50, predicted=0, sigma=sigma)


def training(sigma):
    return TrainingConfig(sigma=sigma)


def training_range(sigma):
    return TrainingConfig(sigma=0.25, sigma_range=(0.25, sigma))


MAKERS = [certificate, prediction, training, training_range]


@pytest.mark.parametrize("sigma", WRONG, ids=lambda sigma: repr(sigma)[:8])
@pytest.mark.parametrize("make", MAKERS)
def test_values_refuse_what_is_no_noise_level(make, sigma):
    with pytest.raises(SettingError, match=MESSAGE):
        make(sigma)
    assert make(0.5)


@pytest.mark.parametrize("sigma", WRONG, ids=lambda sigma: repr(sigma)[:8])
def test_verbs_refuse_what_is_no_noise_level(llava, call, sigma):
    image, options = torch.rand(3, 16, 16), {"psm": None, "sigma": sigma}
    for verb in (
        lambda: fs_plugins.enable(llava, **options),
        lambda: fs_plugins.certify(llava, image, **options),
        lambda: fs_plugins.certify_predictions(llava, image, directions=torch.rand(2, 8), **options),
        lambda: fs_plugins.smoothers(llava, **options),
        lambda: FeatureSmoother(call, psm=None, sigma=sigma),
        lambda: robustness_score(call, None, torch.rand(1, 3, 8, 8), sigma),
    ):
        with pytest.raises(SettingError, match=MESSAGE):
            verb()
    assert not fs_plugins.status(llava).enabled


@pytest.mark.parametrize("sigma", [*WRONG, None], ids=lambda sigma: repr(sigma)[:8])
def test_configurations_refuse_what_is_no_noise_level(call, tmp_path, sigma):
    make_psm(call).save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text("utf-8"))
    for name, value in (("sigma", sigma), ("sigma_range", [0.25, sigma]), ("sigma_range", [sigma, 0.25])):
        with pytest.raises(ValueError, match=f"(?s){name}.*{MESSAGE}"):
            PSMConfig.model_validate({**told, name: value})
        if sigma != 10**400:
            (tmp_path / "config.json").write_text(json.dumps({**told, name: value}), "utf-8")
            with pytest.raises(FSPluginsError, match=rf"config\.json is not a PSM configuration: {name}"):
                PSM.from_pretrained(tmp_path)


def test_only_a_psm_without_mappers_is_for_pictures_without_noise(call):
    told = make_psm(call).config.model_dump()
    for facts in ({"sigma_range": (0, 0.25)}, {"sigma": 0, "sigma_range": (0, 0)}):
        with pytest.raises(ValueError, match="a mapper refines features of noisy pictures"):
            PSMConfig.model_validate({**told, **facts})
        assert PSMConfig.model_validate({**told, **facts, "readouts": ()}).sigma_range[0] == 0
    with pytest.raises(ValueError, match="must hold sigma"):
        PSMConfig.model_validate({**told, "sigma": 0})


@pytest.mark.parametrize("sigma", [*WRONG, 0], ids=lambda sigma: repr(sigma)[:8])
def test_bounds_know_no_units_and_refuse_what_is_no_noise_level_in_any(sigma):
    for bound in (
        lambda sigma: vote_radius(45, 50, sigma=sigma, alpha=1e-3),
        lambda sigma: argmax_radius(torch.full((50, 1), 0.5).double().numpy(), sigma=sigma, alpha=1e-3),
    ):
        if sigma == 64:
            assert bound(64) == pytest.approx(64 * bound(1), rel=1e-3)
        else:
            with pytest.raises(SettingError, match="sigma must be a finite number > 0, got"):
                bound(sigma)


def test_a_certificate_of_another_space_may_have_another_unit():
    whole = Certificate.from_scores([0.9] * 50, sigma=64, space="l2 distance in pixels from 0 to 255")
    assert whole.fcsb(6.4) == pytest.approx(certificate(0.25).fcsb(0.025))
    assert Certificate.from_json(whole.to_json()) == whole


@pytest.mark.parametrize("text", [".nan", ".inf", "-1", "yes", "64", "true", "[0.25]", "much"])
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_settings_files_refuse_what_is_no_noise_level(tmp_path, monkeypatch, command, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.yaml").write_text(f"sigma: {text}\nout: {tmp_path / 'out'}", "utf-8")
    result = CliRunner().invoke(app, [command, "--config", "settings.yaml"])
    assert result.exit_code == 2, result.output
    assert "sigma" in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_no_number_of_any_settings_may_be_a_truth_value_or_infinite():
    for kind in (Training, Evaluation):
        for name, default in vars(kind()).items():
            if isinstance(default, int | float) and not isinstance(default, bool):
                for wrong in (True, math.nan, math.inf):
                    with pytest.raises(SettingError, match=name):
                        build(kind, {name: wrong})
                assert build(kind, {name: default or 1})
    with pytest.raises(SettingError, match="sigma_range"):
        build(Training, {"sigma_range": [0.25, True]})
    with pytest.raises(SettingError, match="sigma_range"):
        build(Training, {"sigma_range": [0.25, math.nan]})
    assert build(Training, {"augment": True, "sigma_range": [0.25, 0.5], "lr": "1e-3"}).lr == 1e-3
