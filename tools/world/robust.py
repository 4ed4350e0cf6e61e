"""The robust towers: the small CLIP's vision encoder, fine-tuned by FARE and by TeCoA.

Both are adversarial: every update first looks for the worst picture within l-inf eps by projected gradient ascent. FARE
(Schlarmann et al., ICML 2024, arXiv 2402.12336) keeps the attacked picture's embedding where the frozen encoder has the
clean one's, without labels. TeCoA (Mao et al., ICLR 2023, arXiv 2212.07016) classifies it right against text
embeddings, here those of the world's 396 captions of a shape.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fs_plugins.attacks import Ball, ascend
from fs_plugins.demo import world
from tools.world.clip import caption_directions, caption_labels
from tools.world.data import TRAIN_SCENES, batches, normalise, pictures, schedule, update

EPS = 4 / 255
STEP = 1.5 / 255
STEPS = 5
LR = {"fare": 3e-4, "tecoa": 1e-4}
UPDATES = {"fare": 600, "tecoa": 300}


def train_robust(
    what: Literal["fare", "tecoa"], clip_folder: Path, out: Path, cache: Path, steps: int, batch: int, seed: int
) -> None:
    """Fine-tune and save the vision encoder alone, as a ``CLIPVisionModelWithProjection`` in fp16."""
    from transformers import CLIPModel, CLIPVisionModelWithProjection

    torch.manual_seed(seed)
    clip = CLIPModel.from_pretrained(clip_folder).eval().requires_grad_(False)
    frozen = CLIPVisionModelWithProjection.from_pretrained(clip_folder).eval().requires_grad_(False)
    tower = copy.deepcopy(frozen).requires_grad_(True)
    tower.visual_projection.requires_grad_(False)
    if (
        what == "tecoa"
    ):  # what reads the tokens that LLaVA consumes: without a reference they would drift from its projector
        tower.vision_model.encoder.layers[-1].requires_grad_(False)
    facts = world.scenes("train", TRAIN_SCENES)
    known = [i for i, scene in enumerate(facts) if scene.shape]
    captions, labels = caption_labels([facts[i] for i in known])
    directions = clip.logit_scale.exp() * caption_directions(clip, captions)
    images = pictures("train", TRAIN_SCENES, cache)[known]
    parameters = [p for p in tower.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR[what], weight_decay=1e-4)
    scheduler = schedule(optimizer, steps, steps // 14)
    began = time.time()
    for step, chosen in enumerate(batches(len(images), batch, steps, seed)):
        clean = images[chosen].float() / 255
        loss = losses(what, embedding(frozen, clean), directions, labels[chosen])
        around = clean + EPS * (2 * torch.rand_like(clean) - 1)
        worst = ascend(
            lambda x, *_: loss(embedding(tower, x)),  # noqa: B023
            clean, ball=Ball("linf", EPS), step_size=STEP, steps=STEPS, start=around,
        )  # fmt: skip
        value = loss(embedding(tower, worst)).mean()
        update(value, optimizer, scheduler)
        if step % 20 == 0 or step == steps - 1:
            with torch.no_grad():
                still = F.cosine_similarity(embedding(tower, clean), embedding(frozen, clean)).mean().item()
                moved = F.cosine_similarity(embedding(tower, worst), embedding(frozen, clean)).mean().item()
            print(
                f"{what} {step}/{steps} loss {value.item():.4f} cosine clean {still:.3f} attacked {moved:.3f} "
                f"{time.time() - began:.0f}s",
                flush=True,
            )
        if step % 100 == 99 or step == steps - 1:
            copy.deepcopy(tower).half().save_pretrained(out)


def embedding(tower: Any, images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, E) projected, not normalised."""
    return tower(normalise(images)).image_embeds


def losses(
    what: Literal["fare", "tecoa"], reference: Tensor, directions: Tensor, labels: Tensor
) -> Callable[[Tensor], Tensor]:
    """(B, E) embeddings of attacked pictures -> (B,): what the attack climbs and the update descends."""
    if what == "fare":
        return lambda found: (found - reference).square().sum(-1)
    return lambda found: F.cross_entropy(F.normalize(found, dim=-1) @ directions.T, labels, reduction="none")
