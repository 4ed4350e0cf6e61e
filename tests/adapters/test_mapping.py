"""Whatever transformers calls image-text-to-text is claimed, as a model of the kit's, or refused with a reason."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def mapping():
    """The conformance kit's models live beside the tests, not among them."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "integration"))
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
