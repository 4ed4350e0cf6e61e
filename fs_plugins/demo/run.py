"""The demo: ask the small LLaVA about held-out scenes, attack its vision tower, watch the plugin hold.

The same with the tower fine-tuned by FARE and by TeCoA; each tower is attacked itself.

Everything is computed while it runs; only the scenes are fixed.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fs_plugins
from fs_plugins.attacks import attack
from fs_plugins.certificates.run import Plan
from fs_plugins.demo import assets, world
from fs_plugins.evaluation import Estimate, mean, proportion
from fs_plugins.hf.chat import Chat
from fs_plugins.pictures import to_unit
from fs_plugins.psm import PSM
from fs_plugins.vision import VisionCall

BATCH = 44
TOWERS = {"none": None, "fare": assets.FARE, "tecoa": assets.TECOA}
"""The defence that a tower is by itself -> its weights; None for those of the model that ships."""
Advance = Callable[[int], None]
Track = Callable[[str, int], Advance]
"""(what, how many images or draws) -> a function that is told how many more are done."""


@dataclass(frozen=True)
class Settings:
    """One demo run. ``eps`` is l-inf in [0, 1] pixel units, ``draws`` what a shown picture is certified with."""

    images: int = 220
    eps: float = 16 / 255
    steps: int = 100
    n0: int = 4
    seed: int = 0
    draws: int = 1000

    @property
    def robust_images(self) -> int:
        """How many of the scenes the FARE and TeCoA towers get: a quarter, for time."""
        return min(self.images, max(11, self.images // 4))


@dataclass
class Row:
    """One defence on one set of pictures, per scene."""

    acc: list[bool] = field(default_factory=list)
    asr: list[bool] = field(default_factory=list)
    fcs: list[float] = field(default_factory=list)
    caption_acc: list[bool] = field(default_factory=list)
    vqa_acc: list[bool] = field(default_factory=list)

    def estimates(self) -> dict[str, Estimate]:
        shares = {name: proportion(getattr(self, name)) for name in ("acc", "asr", "caption_acc", "vqa_acc")}
        return {**shares, "fcs": mean(self.fcs)}


@dataclass
class Result:
    """All that the demo measured; ``summary`` is what ``summary.json`` holds."""

    settings: Settings
    sigma: float
    clean: dict[str, Row]
    attacked: dict[str, Row]
    ablation: dict[str, Row]
    seconds: float
    pictures: list[Panel]

    def summary(self) -> dict[str, Any]:
        keys = ("acc", "asr", "fcs", "caption_acc", "vqa_acc")

        def values(rows: dict[str, Row], names: tuple[str, ...]) -> dict[str, dict[str, float]]:
            return {k: {n: round(row.estimates()[n].value, 4) for n in names} for k, row in rows.items()}

        return {
            "clean": values(self.clean, keys),
            "attacked": values(self.attacked, keys),
            "ablation": values(self.ablation, keys[:3]),
            "certificates": [
                {"picture": panel.truth, **{name: round(r, 4) if r else None for name, r in panel.radii.items()}}
                for panel in self.pictures
            ],
            "images": self.settings.images,
            "robust_images": self.settings.robust_images,
            "seconds": round(self.seconds, 1),
            "seed": self.settings.seed,
            "settings": {**asdict(self.settings), "sigma": self.sigma, "norm": "linf", "attack": "AttackVLM"},
        }


@dataclass(frozen=True)
class Panel:
    """One scene for the picture: images (3, H, W) in [0, 1] and what the model said of them."""

    truth: str
    clean: Tensor
    attacked: Tensor
    noisy: Tensor
    purified: Tensor
    said_clean: str
    said_attacked: str
    said_protected: str
    certificate: fs_plugins.Certificate

    @property
    def radii(self) -> dict[str, float | None]:
        """The l2 radius for cosine >= .5 by the paper's formula, by its bound with confidence, and ours; the same draws."""
        one = self.certificate
        return {"plugin": one.by("plugin").radius(), "mean": one.by("mean").radius(), "certified": one.radius()}


def run(settings: Settings, track: Track) -> Result:
    """Run the demo.

    Args:
        track: makes a progress bar for each part that takes long.

    Raises:
        SettingError: a setting out of range.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    began = time.time()
    processor = AutoProcessor.from_pretrained(assets.LLAVA)
    vanilla = AutoModelForImageTextToText.from_pretrained(assets.LLAVA).eval().requires_grad_(False)
    facts = world.scenes("heldout", settings.images)
    aims = world.scenes("target", settings.images)
    clean, targets = _pictures(facts), _pictures(aims)

    tables: dict[str, dict[str, Row]] = {"clean": {}, "attacked": {}}
    said: dict[str, dict[str, list[str]]] = {}
    attacked: dict[str, Tensor] = {}
    for tower, source in TOWERS.items():
        model, count = vanilla, settings.images
        if source is not None:
            model, count = copy.deepcopy(vanilla), settings.robust_images
            fs_plugins.swap_encoder(model, source)
        call = fs_plugins.vision_call(model)
        attacked[tower] = _attack(call, clean[:count], targets[:count], settings, track, tower)
        shown = {"clean": clean[:count], "attacked": attacked[tower]}
        for name, options in ((tower, None), (_smoothed(tower), {"psm": "auto"})):
            rows, said[name] = _measure(model, processor, facts[:count], shown, options, settings, track, name)
            for which, row in rows.items():
                tables[which][name] = row

    psm = PSM.from_pretrained(assets.PSM_LLAVA)
    call = fs_plugins.vision_call(vanilla)
    parts: dict[str, PSM | None] = {
        "fs": None,
        "fs_m": PSM.from_pretrained(assets.PSM_NO_PURIFIER),
        "fs_p": psm.only(mapper=False),
    }
    ablation = {"none": tables["attacked"]["none"]}
    for name, part in parts.items():
        smoothed = {"psm": part, "sigma": psm.config.sigma}
        ablation[name] = _ablate(
            vanilla, processor, call, facts, clean, attacked["none"], smoothed, settings, track(name, len(facts))
        )
    ablation["fs_pm"] = tables["attacked"]["fs_psm"]

    panels = _panels(vanilla, psm, facts, clean, attacked["none"], said, settings, track)
    return Result(
        settings, psm.config.sigma, tables["clean"], tables["attacked"], ablation, time.time() - began, panels
    )


def write_summary(result: Result, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "summary.json"
    path.write_text(json.dumps(result.summary(), indent=2) + "\n")
    return path


def _pictures(facts: list[world.Scene]) -> Tensor:
    return torch.stack([to_unit(scene.draw()) for scene in facts])


def _smoothed(tower: str) -> str:
    """A tower -> the name of the defence that smooths it."""
    return "fs_psm" if tower == "none" else f"{tower}_fs_psm"


def _attack(call: VisionCall, clean: Tensor, targets: Tensor, settings: Settings, track: Track, tower: str) -> Tensor:
    what = "vision tower" if tower == "none" else f"{tower} tower"
    advance = track(f"attacking the {what}, {settings.steps} steps", settings.steps * len(clean))
    return attack(
        "attackvlm", call, clean, targets, eps=settings.eps, steps=settings.steps, batch_size=BATCH, report=advance
    )


def _measure(
    model: Any,
    processor: Any,
    facts: list[world.Scene],
    shown: dict[str, Tensor],
    options: dict[str, Any] | None,
    settings: Settings,
    track: Track,
    name: str,
) -> tuple[dict[str, Row], dict[str, list[str]]]:
    """The rows of one defence, and its captions, on the clean and on the attacked pictures."""
    call = fs_plugins.vision_call(model)
    rows: dict[str, Row] = {which: Row() for which in shown}
    said: dict[str, list[str]] = {which: [] for which in shown}
    features: dict[str, list[Tensor]] = {which: [] for which in shown}
    for which, images in shown.items():
        advance = track(f"{which} pictures, defence {name}", 3 * len(facts))
        with _defended(model, options, settings):
            for start in range(0, len(facts), BATCH):
                some, pixels = facts[start : start + BATCH], images[start : start + BATCH]
                answers, feature, again = _interview(model, processor, call, some, pixels, rows[which], advance)
                said[which] += answers
                features[which].append(feature)
                if which == "clean":
                    rows[which].fcs += torch.cosine_similarity(feature, again, dim=-1).tolist()
    pair = torch.cat(features["clean"]), torch.cat(features["attacked"])
    rows["attacked"].fcs = torch.cosine_similarity(*pair, dim=-1).tolist()
    return rows, said


@contextmanager
def _defended(model: Any, options: dict[str, Any] | None, settings: Settings) -> Iterator[None]:
    if options is None:
        yield
        return
    with fs_plugins.enable(model, n0=settings.n0, seed=settings.seed, **options):
        yield


def _interview(
    model: Any,
    processor: Any,
    call: VisionCall,
    facts: list[world.Scene],
    images: Tensor,
    row: Row,
    advance: Advance,
) -> tuple[list[str], Tensor, Tensor]:
    """Ask the three questions of each scene; returns captions and the features consumed in two of the calls."""
    captions, first = _answers(model, processor, call, images, [world.CAPTION_PROMPT] * len(facts))
    advance(len(facts))
    row.caption_acc += [said == scene.caption for said, scene in zip(captions, facts, strict=True)]
    questions = [scene.question() for scene in facts]
    replies, _ = _answers(model, processor, call, images, [question.prompt for question in questions])
    advance(len(facts))
    row.vqa_acc += [said == question.answer for said, question in zip(replies, questions, strict=True)]
    second = _classify(model, processor, call, facts, images, row)
    advance(len(facts))
    return captions, first, second


def _classify(
    model: Any, processor: Any, call: VisionCall, facts: list[world.Scene], images: Tensor, row: Row
) -> Tensor:
    """The eleven-way question; scenes without a shape have no answer to it and do not count."""
    labels, consumed = _answers(model, processor, call, images, [world.CLASS_PROMPT] * len(facts))
    target = str(world.CLASSES.index(world.TARGET_SHAPE))
    for said, scene in zip(labels, facts, strict=True):
        if scene.shape is not None:
            row.acc.append(said == str(scene.label))
            row.asr.append(said == target)
    return consumed


def _answers(
    model: Any, processor: Any, call: VisionCall, images: Tensor, questions: list[str]
) -> tuple[list[str], Tensor]:
    """Greedy answers, and the features that the language side consumed, embedded: (B, E)."""
    consumed: list[Tensor] = []

    def keep(module: Any, arguments: Any, output: Any) -> None:
        consumed.append(call.embed(call.features(output)).float())

    listener = call.module.register_forward_hook(keep)
    try:
        said = Chat(model, processor).say(images, questions, max_new_tokens=12)
    finally:
        listener.remove()
    return said, consumed[-1]


def _ablate(
    model: Any,
    processor: Any,
    call: VisionCall,
    facts: list[world.Scene],
    clean: Tensor,
    attacked: Tensor,
    options: dict[str, Any],
    settings: Settings,
    advance: Advance,
) -> Row:
    row = Row()
    with _defended(model, options, settings):
        for start in range(0, len(facts), BATCH):
            some = facts[start : start + BATCH]
            feature = _classify(model, processor, call, some, attacked[start : start + BATCH], row)
            pixels = call.pixels.from_unit(clean[start : start + BATCH], model.dtype)
            with torch.no_grad():
                reference = call.embed(call.features(call.module(pixels, **call.kwargs)))
            row.fcs += torch.cosine_similarity(feature, reference, dim=-1).tolist()
            advance(len(some))
    return row


def _panels(
    model: Any,
    psm: PSM,
    facts: list[world.Scene],
    clean: Tensor,
    attacked: Tensor,
    said: dict[str, dict[str, list[str]]],
    settings: Settings,
    track: Track,
) -> list[Panel]:
    """The first four scenes with shapes that differ: not chosen by outcome."""
    generator = torch.Generator().manual_seed(settings.seed)
    shown = [i for i, scene in enumerate(facts) if scene.shape][:8:2]
    plan = Plan(n=settings.draws)
    certificates = fs_plugins.certify(
        model,
        {str(i): clean[i] for i in shown},
        n=plan.n,
        psm=psm,
        seed=settings.seed,
        advance=track("certifying the shown pictures", len(shown) * (plan.n + plan.pilot)),
    )
    panels = []
    for i, certificate in zip(shown, certificates, strict=True):
        noisy = attacked[i] + psm.config.sigma * torch.randn(attacked[i].shape, generator=generator)
        with torch.no_grad():
            purified = psm.purify(noisy[None], psm.config.sigma)[0]
        panels.append(
            Panel(
                facts[i].caption,
                clean[i],
                attacked[i],
                noisy,
                purified,
                said["none"]["clean"][i],
                said["none"]["attacked"][i],
                said["fs_psm"]["attacked"][i],
                certificate,
            )
        )
    return panels
