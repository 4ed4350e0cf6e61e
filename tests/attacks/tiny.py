"""What the tests of attacks share: small images, features and smoothers."""

from __future__ import annotations

import torch
from support import make_psm

from fs_plugins.smoothing import FeatureSmoother


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def randn(*shape: int, seed: int = 0, **kwargs) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **kwargs)


def cosine(call, images, targets):
    return torch.cosine_similarity(call.embed(call.encode(images)), call.embed(call.encode(targets)), dim=-1)


def smoother(call, **changes):
    return FeatureSmoother(call, psm=make_psm(call), sigma=0.25, **{"n0": 2, "seed": 0, **changes})


def length(change):
    return change.flatten(1).norm(dim=1)
