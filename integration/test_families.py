"""The conformance kit on every family of every framework that is installed here."""

from __future__ import annotations

import copy
import importlib.util
from functools import cache

import exceptions
import versions
from families import FAMILIES
from family import Family
from frameworks import FRAMEWORKS
from image_families import IMAGE_FAMILIES, ONE_OF_EACH_KIND
from mapping import LANGUAGE_FAMILIES, forgotten
from packaging.version import Version
from versions import INSTALLED, PINNED

from fs_plugins.testing import AdapterConformance

# What a version of transformers may change about a model, rather than about how any is smoothed.
ABOUT_THE_MODEL = {
    "test_exactly_one_adapter_claims_the_model",
    "test_disabling_restores_bit_for_bit_and_leaves_no_trace",
    "test_pixels_are_images_in_unit_range",
    "test_what_is_consumed_is_the_smoothed_feature",
    "test_nothing_but_the_readouts_reaches_the_language_side",
    "test_every_readout_matters",
    "test_encoding_images_directly_gives_the_models_features",
    "test_status_is_a_proof_of_life",
    "test_gradients_match_finite_differences",
}

# Tiles, frames or padding are made of the images before the encoder sees them.
CUT = (
    "LLaVA-NeXT",
    "LLaVA-OneVision",
    "LLaVA-NeXT-Video images",
    "LLaVA-NeXT-Video",
    "GIT video",
    "Granite 4 Vision",
    "Idefics",
    "Idefics resampled",
    "InstructBLIP video",
    "Video-LLaVA videos",
    "Gemma 4 video",
    "DeepSeek-OCR 2 tiles",
    "Idefics2",
    "Qwen2-VL video",
    "Mllama",
    "original LLaVA tiles",
    "Muse-Glimmer video",
    "VideoLLaMA 3 video",
    "Step 3.7 tiles",
    "Inkling",
    "Muse-Spark video",
    "Molmo 2 crops",
    "Molmo 2 video",
    "Nemotron 3 Omni video",
)


def is_brief(family: Family) -> bool:
    """Whether only those are asked: image models have one adapter, so off the pinned version some stand for all. With
    ``--brief`` those that are used most stand for those that speak as well.
    """
    if INSTALLED == PINNED or family.name in ONE_OF_EACH_KIND:
        return False
    only_here = family.since is not None and Version(family.since) > PINNED
    return family in IMAGE_FAMILIES or (versions.brief and family not in FAMILIES and not only_here)


def brief() -> list[str]:
    return [family.name for family in here() if is_brief(family)]


def suite(family: Family) -> type[AdapterConformance]:
    """A test class for one small model, which is built once; each test gets a copy."""
    built = cache(family.build)
    tests = [name for name in dir(AdapterConformance) if name.startswith("test_")]
    left_out = {name for name in tests if is_brief(family) and name not in ABOUT_THE_MODEL}

    def exempt(*, now_and_then: bool) -> dict[str, str]:
        known = exceptions.of(family.name, INSTALLED, now_and_then=now_and_then)
        return {test: reason for test, reason in known.items() if test not in left_out}

    return type(
        "Test" + "".join(c for c in family.name.title() if c.isalnum()),
        (AdapterConformance,),
        {
            "__module__": __name__,
            "image_size": family.image_size,
            "shown_whole": family.name not in CUT,
            "family": family.name,
            "expected_failures": exempt(now_and_then=False),
            "not_run": exempt(now_and_then=True),
            "kinks": family.kinks,
            "calls_per_generate": family.calls_per_generate,
            "make_model": lambda self: copy.deepcopy(built()),
            "make_inputs": lambda self, model, images: family.inputs(model, images),
            "outcome": lambda self, model, inputs: family.outcome(model, inputs),
            "generate": lambda self, model, inputs: family.generate and family.generate(model, inputs),
            **dict.fromkeys(left_out),
        },
    )


def known() -> list[Family]:
    """The families of the frameworks that are installed here."""
    every = (*LANGUAGE_FAMILIES, *IMAGE_FAMILIES, *FRAMEWORKS)
    return [family for family in every if importlib.util.find_spec(family.needs)]


def here() -> list[Family]:
    return [family for family in known() if family.runs_here]


def absent() -> list[str]:
    """Families that this transformers does not have."""
    return [family.name for family in known() if not family.runs_here]


for _family in here():
    _suite = suite(_family)
    globals()[_suite.__name__] = _suite


def test_no_class_of_transformers_is_forgotten() -> None:
    """One that is new wants a line in FAMILIES and a model in the kit, or its reason in REFUSED."""
    assert not forgotten()
