"""The demo's PSMs: one purifier, then a mapper for each readout."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import torch

import fs_plugins
from fs_plugins.demo import world
from fs_plugins.demo.scenes import Scenes
from fs_plugins.pictures import to_unit
from fs_plugins.psm import PSM, Part
from fs_plugins.training import Stage, TrainingConfig, robustness_score, train_psm
from tools.world.data import TRAIN_SCENES
from tools.world.llava import build_llava

PURIFIER = Part(kind="unet", args={"channels": [64, 128], "layers": 1, "unshuffle": 4})
PURIFIER_STAGE = Stage(steps=2400, batch_size=16, draws=2, lr=1e-3, ema=0.99)
WIDER_STAGE = Stage(steps=1600, batch_size=16, draws=2, lr=6e-4, ema=0.99)
SIGMAS = (0.25, 0.5)
"""What one PSM covers: the purifier is trained at the lower one first, then over the range, as the mappers are."""
MAPPER_STAGE = Stage(steps=400, batch_size=16, draws=4, lr=2e-3)
LAMBDA3 = 1.0
"""The paper's 100 drowns the consistency loss here: this tower's features are larger than CLIP-L's."""


def train_parts(what: str, assets: Path, steps: int | None, seed: int) -> None:
    """One of the demo's PSMs: the shared purifier (trained on LLaVA's readout), then a mapper for each readout."""
    from transformers import CLIPModel, LlavaForConditionalGeneration

    if what == "psm-clip":
        model = CLIPModel.from_pretrained(assets / "clip").eval()
    elif (assets / "llava" / "config.json").exists():
        model = LlavaForConditionalGeneration.from_pretrained(assets / "llava").eval()
    else:
        model = build_llava(assets / "clip").eval()
    stage = {"purifier": PURIFIER_STAGE, "purifier-wider": WIDER_STAGE}.get(what, MAPPER_STAGE)
    stage = replace(stage, steps=steps or stage.steps)
    alone = what.startswith("purifier")
    config = TrainingConfig(
        sigma=SIGMAS[0],
        sigma_range=None if what in ("purifier", "psm-llava-no-purifier") else SIGMAS,
        purifier=None if what == "psm-llava-no-purifier" else PURIFIER,
        mapper=None if alone else Part(kind="residual", args={"ratio": 2}),
        purifier_stage=stage if alone else replace(stage, steps=0),
        mapper_stage=stage,
        lambda3=LAMBDA3,
        seed=seed,
    )
    before = {"purifier-wider": "purifier", "psm-llava": "purifier-wider", "psm-clip": "purifier-wider"}
    start = PSM.from_pretrained(assets / before[what]) if what in before else None
    call = fs_plugins.vision_call(model)
    images = Scenes(TRAIN_SCENES, (world.IMAGE_SIZE, world.IMAGE_SIZE))
    began = time.time()

    def report(name: str, step: int, total: int, values: dict[str, float]) -> None:
        if step % 25 == 0 or step == total:
            shown = " ".join(f"{key} {value:.4f}" for key, value in values.items())
            print(f"{what} {name} {step}/{total} {shown} {time.time() - began:.0f}s", flush=True)

    encoder = "demo-clip"
    psm = train_psm(call, images, config, name=f"demo-{what}", encoder=encoder, start=start, report=report)
    psm.save_pretrained(assets / what, dtype=torch.float16)
    held = torch.stack([to_unit(s.draw()) for s in world.scenes("heldout", 110)])
    scores = {"plain noise": None, "purifier": psm.only(mapper=False), "mapper": psm.only(purifier=False), "both": psm}
    for sigma in sorted({config.sigma, *(config.sigma_range or ())}):
        print(
            f"sigma {sigma}", json.dumps({k: robustness_score(call, part, held, sigma) for k, part in scores.items()})
        )
