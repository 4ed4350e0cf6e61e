"""Whatever transformers calls image-text-to-text is claimed, as a model of the kit's, or refused with a reason."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

import pytest
import torch

import fs_plugins

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def mapping():
    """The conformance kit's models live beside the tests, not among them."""
    sys.path.insert(0, str(ROOT / "integration"))
    try:
        import mapping
    finally:
        del sys.path[0]
    return mapping


def test_no_class_of_transformers_is_forgotten(mapping):
    """One that is new wants a line in FAMILIES and a model in the kit, or its reason in REFUSED."""
    assert not mapping.forgotten()


def test_a_class_that_nobody_declared_would_be_seen(mapping, monkeypatch):
    from transformers.models.auto import modeling_auto

    names = {**modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "newcomer": "NewcomerForConditionalGeneration"}
    monkeypatch.setattr(modeling_auto, "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", names)
    assert "NewcomerForConditionalGeneration" in mapping.forgotten()


def test_every_refusal_is_of_a_class_and_has_a_reason(mapping):
    from fs_plugins.adapters.hf_multimodal import REFUSED

    assert all(len(reason.split()) > 4 and not reason.endswith(".") for reason in REFUSED.values())


@pytest.mark.parametrize(
    ("name", "config", "thinks"),
    [
        ("Qwen2_5OmniForConditionalGeneration", "Qwen2_5OmniConfig", "Qwen2.5-Omni thinker"),
        ("Qwen3OmniMoeForConditionalGeneration", "Qwen3OmniMoeConfig", "Qwen3-Omni thinker"),
    ],
)
def test_a_model_that_speaks_aloud_is_smoothed_where_its_thinker_looks(mapping, name, config, thinks):
    """The whole has no forward, so the kit asks its thinker; people load and generate with the whole."""
    import transformers

    (family,) = [one for one in mapping.LANGUAGE_FAMILIES if one.name == thinks]
    thinker = family.build()
    silent = getattr(transformers, config)(thinker_config=thinker.config.to_dict(), enable_audio_output=False)
    whole = getattr(transformers, name)(silent).eval()
    whole.thinker = thinker
    inputs = family.inputs(thinker, torch.rand(1, 3, *family.image_size, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = thinker(**inputs).logits
        with fs_plugins.enable(whole, psm=None, sigma=0.25) as handle:
            assert not torch.equal(thinker(**inputs).logits, before)
            assert handle.status().vision[0].calls == 1
        assert torch.equal(thinker(**inputs).logits, before)


def test_the_readme_counts_what_the_pinned_transformers_has(mapping):
    import transformers

    (count, total, version) = re.search(
        r"on (\d+) of the (\d+) classes that transformers ([\d.]+) lists", (ROOT / "README.md").read_text("utf-8")
    ).groups()
    if not transformers.__version__.startswith(f"{version}."):
        pytest.skip("the README speaks of the pinned transformers")
    assert (int(count), int(total)) == (len(mapping.claimed() & set(mapping.classes())), len(mapping.classes()))
