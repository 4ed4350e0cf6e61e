"""What transformers calls image-text-to-text, and what becomes of each class: claimed, refused, or forgotten."""

from __future__ import annotations

from functools import cache

from families import FAMILIES
from family import Family
from fs_plugins.adapters import hf_multimodal
from gridded_families import GRIDDED_FAMILIES
from newest_families import NEWEST_FAMILIES
from patched_families import PATCHED_FAMILIES
from tower_families import TOWER_FAMILIES

from fs_plugins.plugins import claims

LANGUAGE_FAMILIES: tuple[Family, ...] = (
    *FAMILIES,
    *TOWER_FAMILIES,
    *GRIDDED_FAMILIES,
    *PATCHED_FAMILIES,
    *NEWEST_FAMILIES,
)
"""Models of transformers whose language side looks at images, and a few bare encoders of theirs."""
TIMM = {"FastVlmForConditionalGeneration", "Gemma3nForConditionalGeneration", "PerceptionLMForConditionalGeneration"}
"""Classes whose towers are timm's, which the kit knows where timm is installed."""


def classes() -> list[str]:
    """All of the mapping, by name."""
    from transformers.models.auto import modeling_auto

    named = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
    return sorted({name for value in named for name in ([value] if isinstance(value, str) else value)})


@cache
def claimed() -> frozenset[str]:
    """Classes of which a small model of the kit's, built here, is claimed by exactly one adapter, and timm's."""
    models = [family.build() for family in LANGUAGE_FAMILIES if family.runs_here]
    return TIMM | {type(model).__name__ for model in models if len(claims(model)) == 1}


def refused() -> dict[str, str]:
    """Classes of the mapping -> why they cannot be covered."""
    return {name: why for name, why in hf_multimodal.REFUSED.items() if name in classes()}


def forgotten() -> list[str]:
    """Classes that are neither, or both."""
    return [name for name in classes() if (name in claimed()) == (name in refused())]
