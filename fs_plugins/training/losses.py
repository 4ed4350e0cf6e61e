"""The losses of PSM training (arXiv 2601.16200, eqs. 7 to 13). Each is to be minimised."""

from __future__ import annotations

import torch
from torch import Tensor


def consistency(embedded: Tensor, reference: Tensor) -> Tensor:
    """l_rb: 1 - mean cosine of (N, E) embeddings (eqs. 8 and 11, which print the cosine to be maximised)."""
    return 1 - torch.cosine_similarity(embedded, reference, dim=-1).mean()


def reconstruction(purified: Tensor, clean: Tensor) -> Tensor:
    """l_mse: mean over images of the l2 norm ||x - P(x + e)||, in [0, 1] pixel units (eq. 7, not squared)."""
    return (purified - clean).flatten(1).norm(dim=1).mean()


def statistics(mapped: Tensor, clean: Tensor) -> Tensor:
    """l_stats: squared differences of per-channel mean and standard deviation, averaged over D (eq. 12).

    Moments are over batch and tokens: (N, L, D) or (N, D); both arguments may differ in N.
    """
    mapped, clean = mapped.flatten(0, -2), clean.flatten(0, -2)
    means = (mapped.mean(0) - clean.mean(0)).square()
    deviations = (mapped.std(0, correction=0) - clean.std(0, correction=0)).square()
    return (means + deviations).mean()


def identity(update: Tensor) -> Tensor:
    """l_id: mean over images of ||M(z, 0)||^2 (eq. 12). Exactly zero for ResidualMapper, by construction."""
    return update.flatten(1).square().sum(1).mean()
