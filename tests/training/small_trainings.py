"""Trainings of a second or two: pictures, settings, and what came out."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from fs_plugins import PSM
from fs_plugins.psm import Part
from fs_plugins.training import Stage, TrainingConfig


class Blobs(Dataset):
    """Smooth pictures: a denoiser has something to learn."""

    def __init__(self, count: int = 64) -> None:
        coarse = torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(0))
        self.images = torch.nn.functional.interpolate(coarse, size=8, mode="bilinear")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def config(**changes) -> TrainingConfig:
    settings = {
        "purifier": Part(kind="unet", args={"channels": [16, 16], "unshuffle": 2}),
        "mapper": Part(kind="residual", args={"heads": 2}),
        "purifier_stage": Stage(steps=80, batch_size=16, draws=2, lr=3e-3, warmup=5, ema=0.9),
        "mapper_stage": Stage(steps=60, batch_size=16, draws=2, lr=3e-3, warmup=5),
        "lambda3": 1.0,
    }
    return TrainingConfig(**{**settings, **changes})


def flat(psm: PSM) -> torch.Tensor:
    return torch.cat([p.flatten() for p in psm.parameters()])
