"""All that ``fs-plugins evaluate`` can be told, each knob once: for flags, ``--config`` and Python alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fs_plugins.settings import knob

_RUN, _WORK, _DEFENCE = "Model and data", "How much work", "Defences"
_JUDGE, _MACHINE = "Judge of captions", "Machine"


@dataclass(frozen=True)
class Settings:
    """What is evaluated, on what, how thoroughly; None means what each knob says."""

    suite: tuple[str, ...] = knob(
        ("table3",),
        "table1 to table5, s6, s7, s8, adaptive, worst, rivals, masking, curves, autoattack, answers, or all but the "
        "last three; can be given several times.",
        panel=_RUN,
    )
    model: str = knob(
        "demo", 'Folder or hub id of a transformers model; "demo", "demo-clip" and "photo-vlm" ship.', panel=_RUN
    )
    processor: str | None = knob(
        None, "Folder or hub id of the model's processor, where none is beside the model.", panel=_RUN
    )
    endpoint: str | None = knob(
        None,
        "A served model, in OpenAI's protocol: what it answers to pictures attacked on --model, the open weights. Its "
        "key is read from OPENAI_API_KEY.",
        panel=_RUN,
    )
    endpoint_model: str | None = knob(None, "The name that its server knows it by; --model if left out.", panel=_RUN)
    data: Path | None = knob(
        None,
        "A dataset (docs/reference/dataset-format.md); left out, held-out scenes of the embedded world.",
        panel=_RUN,
    )
    targets: Path | None = knob(None, "Pictures that attacks aim at, where the data has none.", panel=_RUN)
    corrupt: str = knob("refuse", "refuse or skip pictures that cannot be read.", panel=_RUN)
    images: int | None = knob(None, "How many pictures; all of the data if left out.", panel=_RUN, least=2)
    class_prompt: str = knob("a photo of a {}", "What CLIP and SigLIP are told a class is called.", panel=_RUN)
    steps: int | None = knob(None, "Steps of the attacks; 300 in the papers.", panel=_WORK, least=1)
    eps: str | None = knob(
        None, "Another l-inf radius for the suites' attacks, in [0, 1] pixels, such as 8/255.", panel=_WORK
    )
    attacks: str | None = knob(
        None, "Only these of the suites' attacks, by their names, with commas between them.", panel=_WORK
    )
    aside_images: int | None = knob(None, "Pictures of the suites s6, s7 and s8.", panel=_WORK, least=1)
    adaptive_images: int | None = knob(None, "Pictures of the adaptive attacks.", panel=_WORK, least=1)
    adaptive_steps: int | None = knob(None, "Steps of the adaptive attacks.", panel=_WORK, least=1)
    adaptive_draws: int | None = knob(None, "Draws that each such step averages over.", panel=_WORK, least=1)
    certified_images: int | None = knob(None, "Pictures that are certified.", panel=_WORK, least=1)
    certified_draws: int | None = knob(None, "Draws of each certificate.", panel=_WORK, least=1)
    masking_images: int | None = knob(None, "Pictures of the suite masking.", panel=_WORK, least=2)
    masking_queries: int | None = knob(None, "Queries of its gradient-free attack, a picture.", panel=_WORK, least=1)
    quick: bool = knob(False, "Few pictures and steps, to see that all works; intervals are wide.", panel=_WORK)
    psm: str = knob("auto", '"auto", "photo-light", "diffusion", a PSM folder or hub id.', panel=_DEFENCE)
    light: str = knob("photo-light", "The light PSM of suite s6.", panel=_DEFENCE)
    sigma: float | None = knob(None, "Noise level in [0, 1] pixels; left out, the PSM's own.", panel=_DEFENCE)
    n0: int = knob(4, "Noisy draws per picture.", panel=_DEFENCE, least=1)
    fare: str | None = knob(
        None, 'The FARE encoder, as swap_encoder takes it; "none" leaves its rows out.', panel=_DEFENCE
    )
    tecoa: str | None = knob(None, "The TeCoA encoder.", panel=_DEFENCE)
    judge: str = knob("exact", "exact, similarity, endpoint, or a plugin's: compares captions.", panel=_JUDGE)
    judge_model: str | None = knob(None, "Model of the judge.", panel=_JUDGE)
    judge_url: str | None = knob(
        None, "An OpenAI-compatible endpoint; its key is read from OPENAI_API_KEY.", panel=_JUDGE
    )
    batch_size: int | None = knob(
        None, "Pictures at once, 8 by default; bounds memory, changes no result.", panel=_MACHINE, least=1
    )
    chunk_size: int = knob(32, "Noisy copies that a smoothed encoder takes at once; the same.", panel=_MACHINE, least=1)
    seed: int = knob(0, "Of attacks, serving noise and certificates.", panel=_MACHINE)
    out: Path | None = knob(
        None,
        "Folder for everything; an interrupted run goes on from it. runs/evaluate, with --quick runs/evaluate-quick.",
        panel=_MACHINE,
    )

    @property
    def folder(self) -> Path:
        """``out``, or what stands in for it."""
        return self.out or Path("runs/evaluate-quick" if self.quick else "runs/evaluate")

    @property
    def effort(self) -> dict[str, int]:
        """How much work each part gets, where somebody says so: these settings, else ``QUICK`` or ``WORLD``."""
        usual = QUICK if self.quick else WORLD if self.data is None else {}
        given = {name: getattr(self, name) for name in WORLD}
        return {**usual, **{name: value for name, value in given.items() if value is not None}}


WORLD: Mapping[str, int] = {
    "images": 220,
    "steps": 100,
    "aside_images": 55,
    "adaptive_images": 44,
    "adaptive_steps": 60,
    "adaptive_draws": 1,
    "certified_images": 11,
    "certified_draws": 500,
    "masking_images": 11,
    "masking_queries": 200,
}
"""On the embedded world: pictures, and how much work each gets, for two cores."""

QUICK: Mapping[str, int] = {
    "images": 22,
    "steps": 20,
    "aside_images": 11,
    "adaptive_images": 4,
    "adaptive_steps": 8,
    "adaptive_draws": 1,
    "certified_images": 3,
    "certified_draws": 100,
    "masking_images": 4,
    "masking_queries": 10,
}
"""The same for ``--quick``."""
