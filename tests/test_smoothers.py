"""``fs_plugins.smoothers``: the pipelines that ``enable`` would attach, without touching the model."""

from __future__ import annotations

import pytest
import torch
from support import llava_inputs, make_psm

import fs_plugins
from fs_plugins import FSPluginsWarning, ModelError, SettingError


def test_the_pipeline_is_the_one_that_enable_attaches_and_the_model_is_left_alone(llava, images):
    psm = make_psm(fs_plugins.vision_call(llava))
    before = llava(**llava_inputs(images)).logits
    (alone,) = fs_plugins.smoothers(llava, psm=psm, n0=3, seed=5)
    assert not fs_plugins.status(llava).enabled
    assert torch.equal(llava(**llava_inputs(images)).logits, before)
    with fs_plugins.enable(llava, psm=psm, n0=3, seed=5) as handle, torch.no_grad():
        (attached,) = handle.smoothers
        assert (alone.sigma, alone.n0, alone.psm) == (attached.sigma, attached.n0, attached.psm)
        (one,), (other,) = (smoother.smooth(images).values() for smoother in (alone, attached))
        assert torch.equal(one, other)


def test_it_takes_a_vision_call_and_is_to_be_had_while_smoothing_is_enabled(llava):
    call = fs_plugins.vision_call(llava)
    (smoother,) = fs_plugins.smoothers(call, psm=None, sigma=0.1)
    assert (smoother.call, smoother.sigma, smoother.psm) == (call, 0.1, None)
    with fs_plugins.enable(llava, psm=None, sigma=0.25):
        assert fs_plugins.smoothers(llava, psm=None, sigma=0.5)[0].sigma == 0.5


def test_none_in_words_is_no_psm_everywhere(llava, images):
    assert fs_plugins.smoothers(llava, psm="none", sigma=0.2)[0].psm is None
    with fs_plugins.enable(llava, psm="none", sigma=0.2) as handle:
        assert handle.status().vision[0].psm is None
    (one,) = fs_plugins.certify(llava, images[:1], psm="none", sigma=0.2, n=20, seed=0)
    assert one.psm is None
    with pytest.raises(SettingError, match="needs a sigma"):
        fs_plugins.smoothers(llava, psm="none")


def test_certify_takes_a_pipeline_and_refuses_a_second_opinion(llava, images):
    (smoother,) = fs_plugins.smoothers(llava, psm=None, sigma=0.2)
    by_pipeline = fs_plugins.certify(smoother, images[:1], n=20, seed=0)
    assert by_pipeline == fs_plugins.certify(llava, images[:1], psm=None, sigma=0.2, n=20, seed=0)
    assert by_pipeline == fs_plugins.certify(smoother.call, images[:1], psm=None, sigma=0.2, n=20, seed=0)
    with pytest.raises(SettingError, match="has its own PSM"):
        fs_plugins.certify(smoother, images[:1], sigma=0.3)


def test_a_choice_warns_whoever_made_it_once(llava):
    with pytest.warns(FSPluginsWarning, match="stands in") as told:
        fs_plugins.smoothers(llava)
    assert [one.filename for one in told] == [__file__]


def test_what_is_no_model_is_refused_in_words():
    with pytest.raises(ModelError, match="VisionCall was expected, got str"):
        fs_plugins.smoothers("llava")


def test_a_handle_says_what_it_holds(llava):
    handle = fs_plugins.enable(llava, psm=None, sigma=0.25)
    assert repr(handle) == (
        "<SmoothingHandle of LlavaForConditionalGeneration, CLIPVisionModel with no PSM, sigma 0.25, n0 4>"
    )
    handle.disable()
    assert repr(handle) == "<SmoothingHandle of LlavaForConditionalGeneration, disabled>"
