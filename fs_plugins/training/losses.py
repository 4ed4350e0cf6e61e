"""The losses of PSM training (arXiv 2601.16200, eqs. 7 to 13). Each is to be minimised.

The denoising loss l_diff is the purifier's own where it has one: see ``fs_plugins.psm.protocols.Denoises``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def consistency(embedded: Tensor, reference: Tensor) -> Tensor:
    """l_rb: 1 - mean cosine of (N, E) embeddings (eqs. 8 and 11, which print the cosine to be maximised)."""
    return 1 - torch.cosine_similarity(embedded, reference, dim=-1).mean()


def reconstruction(purified: Tensor, clean: Tensor) -> Tensor:
    """l_mse: mean over images of the l2 norm ||x - P(x + e)||, in [0, 1] pixel units (eq. 7, not squared)."""
    return (purified - clean).flatten(1).norm(dim=1).mean()


def statistics(mapped: Tensor, clean: Tensor, average: Callable[[Tensor], Tensor] = lambda mean: mean) -> Tensor:
    """l_stats: squared differences of per-channel mean and standard deviation, averaged over D (eq. 12).

    Moments are over batch and tokens: (N, L, D) or (N, D); both arguments may differ in N.

    Args:
        average: a process's mean -> the mean over all processes, differentiable, for a batch spread over several.
    """
    (mean, deviation), (clean_mean, clean_deviation) = _moments(mapped, average), _moments(clean, average)
    return ((mean - clean_mean).square() + (deviation - clean_deviation).square()).mean()


def _moments(features: Tensor, average: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    flat = features.flatten(0, -2)
    mean = average(flat.mean(0))
    variance = average((flat - mean).square().mean(0))
    return mean, variance.clamp_min(1e-20).sqrt()  # a constant channel has a gradient of 0, not of infinity


def identity(update: Tensor) -> Tensor:
    """l_id: mean over images of ||M(z, 0)||^2 (eq. 12). Exactly zero for ResidualMapper, by construction."""
    return update.flatten(1).square().sum(1).mean()
