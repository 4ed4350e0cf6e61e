"""Training pictures and schedules that the embedded world's models share."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fs_plugins.demo import world

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
TRAIN_SCENES = 50_000


def _draw(split: world.Split, index: int) -> np.ndarray:
    return np.asarray(world.scene(split, index).draw())


def pictures(split: world.Split, count: int, cache: Path | None = None) -> Tensor:
    """(count, 3, 64, 64) uint8. ``cache`` keeps the drawn pixels between runs."""
    if cache is not None and cache.exists():
        drawn = np.load(cache)
    else:
        with ProcessPoolExecutor() as pool:
            drawn = np.stack(list(pool.map(partial(_draw, split), range(count), chunksize=500)))
        if cache is not None:
            cache.parent.mkdir(parents=True, exist_ok=True)
            np.save(cache, drawn)
    return torch.from_numpy(drawn[:count]).permute(0, 3, 1, 2)


def normalise(images: Tensor) -> Tensor:
    """uint8 or [0, 1] images to what the towers see."""
    unit = images.float() / 255 if images.dtype == torch.uint8 else images
    return (unit - unit.new_tensor(MEAN).view(3, 1, 1)) / unit.new_tensor(STD).view(3, 1, 1)


def batches(count: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:size]
        order = order[size:]


def schedule(optimizer: torch.optim.Optimizer, steps: int, warmup: int) -> torch.optim.lr_scheduler.LambdaLR:
    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def update(loss: Tensor, optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LambdaLR) -> None:
    """One step down, the gradient clipped to length 1."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    scheduler.step()


def write_image_processor(out: Path, processor_class: str) -> None:
    """Write preprocessor_config.json by hand, so that transformers 4.57 and 5.x both load it."""
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": processor_class,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": world.IMAGE_SIZE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": world.IMAGE_SIZE, "width": world.IMAGE_SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }
    (out / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
