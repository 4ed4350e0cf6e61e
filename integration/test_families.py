"""The conformance kit on every family of every framework that is installed here."""

from __future__ import annotations

import importlib.util

import exceptions
import transformers
from families import FAMILIES
from family import Family
from frameworks import FRAMEWORKS
from image_families import IMAGE_FAMILIES
from packaging.version import Version

from fs_plugins.testing import AdapterConformance

INSTALLED = Version(transformers.__version__)

# Tiles, frames or padding are made of the images before the encoder sees them.
CUT = (
    "LLaVA-NeXT",
    "LLaVA-OneVision",
    "Video-LLaVA videos",
    "Idefics2",
    "Qwen2-VL video",
    "Mllama",
    "original LLaVA tiles",
)


def suite(family: Family) -> type[AdapterConformance]:
    """A test class for one small model."""
    return type(
        "Test" + "".join(c for c in family.name.title() if c.isalnum()),
        (AdapterConformance,),
        {
            "__module__": __name__,
            "image_size": family.image_size,
            "shown_whole": family.name not in CUT,
            "family": family.name,
            "expected_failures": exceptions.of(family.name, INSTALLED, now_and_then=False),
            "not_run": exceptions.of(family.name, INSTALLED, now_and_then=True),
            "calls_per_generate": family.calls_per_generate,
            "make_model": lambda self: family.build(),
            "make_inputs": lambda self, model, images: family.inputs(model, images),
            "outcome": lambda self, model, inputs: family.outcome(model, inputs),
            "generate": lambda self, model, inputs: family.generate and family.generate(model, inputs),
        },
    )


def known() -> list[Family]:
    """The families of the frameworks that are installed here."""
    return [family for family in (*FAMILIES, *IMAGE_FAMILIES, *FRAMEWORKS) if importlib.util.find_spec(family.needs)]


def runs_here(family: Family) -> bool:
    return family.since is None or Version(family.since) <= INSTALLED


def absent() -> list[str]:
    """Families that this transformers does not have."""
    return [family.name for family in known() if not runs_here(family)]


for _family in filter(runs_here, known()):
    _suite = suite(_family)
    globals()[_suite.__name__] = _suite
