"""What the conformance kit cannot ask of a family, and whose cause it is. The only place that says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gridded_families import GRIDDED_FAMILIES
from newest_families import LATEST, NEWEST_FAMILIES
from packaging.version import Version
from patched_families import PATCHED_FAMILIES

from fs_plugins.testing import AdapterConformance


@dataclass(frozen=True)
class Exemption:
    """A test of the kit that families fail. ``now_and_then`` ones are not run; the others must really fail."""

    families: tuple[str, ...]
    test: str
    reason: str
    on: Callable[[Version], bool] = lambda version: True
    now_and_then: bool = False


def _four(version: Version) -> bool:
    return version.major == 4


def _since_5_24(version: Version) -> bool:
    return version >= Version("5.24.0")


def _all_but(test: str) -> list[str]:
    return [name for name in dir(AdapterConformance) if name.startswith("test_") and name != test]


EXEMPTIONS = (
    Exemption(
        ("LevitForImageClassification", "LevitForImageClassificationWithTeacher", "LevitModel"),
        "test_half_precision",
        "transformers' LeViT keeps the attention biases of its first call, so a model that was run before cannot "
        "change its precision",
    ),
    Exemption(
        ("LevitForImageClassification", "LevitForImageClassificationWithTeacher", "LevitModel"),
        "test_chunks_never_change_a_result",
        "a small LeViT of random weights magnifies rounding, and some processors round a batch of another size "
        "otherwise: by up to 1.5e-4 of the largest number in single precision, by 1e-14 in double",
        now_and_then=True,
    ),
    Exemption(
        ("LLaVA SigLIP full -1", "LLaVA-OneVision", "AyaVision", "Cohere 2 Vision", "Aria", "DeepSeek-VL hybrid"),
        "test_threads_do_not_disturb_each_other",
        "transformers 4 collects hidden states by replacing the layers' forward for the duration of a call "
        "(check_model_inputs), so two threads mix theirs, with or without smoothing",
        on=_four,
        now_and_then=True,
    ),
    Exemption(
        ("GIT", "GIT video"),
        "test_calls_per_generate",
        "transformers 4 hands GIT the picture at every step of a generation, and it encodes it every time",
        on=_four,
    ),
    Exemption(
        ("Inkling 2", "Inkling 2 looped"),
        "test_half_precision",
        "transformers' Inkling 2 chooses experts in full precision, by weights that it keeps in it where it loads a "
        "checkpoint, but not in model.to()",
    ),
    Exemption(
        ("Granite Docling fine",),
        "test_encoding_images_directly_gives_the_models_features",
        "whether Granite Docling makes four times as many tokens of a page is said at each call, and its encoder alone "
        "makes the fewer",
    ),
    Exemption(
        ("OpenFlamingo OPT", "OpenFlamingo LLaMA", "OpenFlamingo GPT-NeoX interleaved"),
        "test_threads_do_not_disturb_each_other",
        "OpenFlamingo leaves the images' tokens in its layers during a call (condition_vis_x), so two threads use "
        "each other's, with or without smoothing",
        now_and_then=True,
    ),
    *(
        Exemption(
            ("Llama 4",),
            test,
            "transformers 5.24.0 asks Llama 4's language model for the images' outputs (image_outputs), which it does "
            "not have, so no call of the whole model returns, with or without smoothing",
            on=_since_5_24,
        )
        for test in _all_but("test_exactly_one_adapter_claims_the_model")
    ),
)

ABSENT = {
    "Qwen3.5": "the class came with transformers 5.2",
    "InternVL layer -2": "transformers 4.57 calls self.vision_model, but the module is vision_tower, "
    "for any layer but -1",
    "PP-Chart2Table": "the class came with transformers 5.4",
    "LightOn OCR": "the class came with transformers 5.0",
    "Granite 4 Vision": "the class came with transformers 5.8",
    "Qianfan OCR layer -1": "the class came with transformers 5.6",
    "Qianfan OCR layer -2": "the class came with transformers 5.6",
    "FastVLM": "the class came with transformers 5.0",
    **dict.fromkeys(
        (family.name for family in (*GRIDDED_FAMILIES, *PATCHED_FAMILIES) if family.since),
        "the class came with a transformers 5",
    ),
    **{family.name: f"the class came with transformers {LATEST}, or shortly before" for family in NEWEST_FAMILIES},
    "original LLaVA": "generate() of transformers 4.38 to 5.3 passes cache_position, which LLaVA's forward "
    "does not take",
}
"""Why a family is not run below its ``since``."""


def of(family: str, version: Version, *, now_and_then: bool) -> dict[str, str]:
    """Test -> reason."""
    return {
        exemption.test: exemption.reason
        for exemption in EXEMPTIONS
        if family in exemption.families and exemption.on(version) and exemption.now_and_then == now_and_then
    }
