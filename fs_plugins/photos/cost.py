"""What a defence costs: operations, counted, and seconds, measured side by side with one forward of the encoder."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fs_plugins.smoothing import FeatureSmoother

CLIP_SIDE = 336


@dataclass(frozen=True)
class Cost:
    """Of one picture. Operations are two for a multiplication and the addition that goes with it.

    Args:
        n0: draws.
        encoder: operations of one forward of the encoder.
        draw: of one draw: purifier, encoder and mapper.
        smoothed: of all ``n0``.
        clip: of one forward of a CLIP-L/14 at 336x336.
        clip_draw: of one draw around that encoder, with the same purifier at its size.
        forward_seconds, smoothed_seconds: of one forward, and of ``n0`` draws, the fastest of several.
    """

    n0: int
    encoder: int
    draw: int
    smoothed: int
    clip: int
    clip_draw: int
    forward_seconds: float
    smoothed_seconds: float

    @property
    def times(self) -> float:
        """How many forwards of the encoder serving takes, by the clock."""
        return self.smoothed_seconds / self.forward_seconds

    @property
    def clip_times(self) -> float:
        """How many times its n0 forwards serving a CLIP-L/14-336 takes, by operations."""
        return self.clip_draw / self.clip


@torch.no_grad()
def cost(smoother: FeatureSmoother, image: Tensor, rounds: int = 5) -> Cost:
    """What serving one picture costs.

    Args:
        smoother: as it serves.
        image: (C, H, W) in [0, 1] at the encoder's size, where the encoder is.
        rounds: how often both are timed, by turns.
    """
    one, call = image[None], smoother.call
    noise = torch.zeros_like(one)
    encoder = operations(lambda: call.encode(one))
    draw = operations(lambda: smoother.draw(one, noise))
    clip = operations(_clip_forward())
    large = one.new_zeros(1, one.shape[1], CLIP_SIDE, CLIP_SIDE)
    purifier = operations(lambda: smoother.views(large, torch.zeros_like(large)))
    plain, smoothed = [], []
    for _ in range(rounds + 1):  # the first of each warms up
        plain.append(_seconds(lambda: call.encode(one)))
        smoothed.append(_seconds(lambda: smoother.smooth(one)))
    return Cost(
        n0=smoother.n0,
        encoder=encoder,
        draw=draw,
        smoothed=smoother.n0 * draw,
        clip=clip,
        clip_draw=clip + purifier,
        forward_seconds=min(plain[1:]),
        smoothed_seconds=min(smoothed[1:]),
    )


def operations(work: Callable[[], Any]) -> int:
    """What torch's counter counts: convolutions and products of matrices."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def _clip_forward() -> Callable[[], Any]:
    """A forward of LLaVA-1.5's encoder, of no weights and on no device."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096}
    layers: dict[str, Any] = {"num_hidden_layers": 24, "num_attention_heads": 16}
    config: Any = CLIPVisionConfig(**sizes, **layers, patch_size=14, image_size=CLIP_SIDE)
    config._attn_implementation = "eager"  # products that the counter knows
    with torch.device("meta"):
        model: nn.Module = CLIPVisionModel(config).eval()
        pixels = torch.zeros(1, 3, CLIP_SIDE, CLIP_SIDE, dtype=torch.float32, device="meta")
    return lambda: model(pixels)


def _seconds(work: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
