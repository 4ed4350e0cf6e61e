"""AttackVLM's targeted feature attack (MF-ii of Zhao et al., NeurIPS 2023, arXiv 2305.16934)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fs_plugins.attacks.loop import ascend
from fs_plugins.vision import VisionCall


def attack_vlm(
    call: VisionCall,
    images: Tensor,
    targets: Tensor,
    *,
    eps: float = 16 / 255,
    step_size: float = 1 / 255,
    steps: int = 300,
    report: Callable[[int], None] | None = None,
) -> Tensor:
    """Move the images' features towards the targets', white-box on the plain encoder.

    Maximises the cosine between ``call.embed`` of the attacked image and of its target.

    Args:
        call: the victim's vision call; any smoothing that is enabled is ignored (the oblivious attack).
        images, targets: (B, C, H, W) in [0, 1].
        eps, step_size: l-inf, in [0, 1] pixel units.

    Returns:
        (B, C, H, W) attacked images.
    """
    with torch.no_grad():
        wanted = call.embed(call.encode(targets))

    def towards_target(attacked: Tensor) -> Tensor:
        return torch.cosine_similarity(call.embed(call.encode(attacked)), wanted, dim=-1)

    return ascend(towards_target, images, eps=eps, step_size=step_size, steps=steps, report=report)
