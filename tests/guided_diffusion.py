"""openai/guided-diffusion's architecture, stated once more in plain torch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TINY = {"channels": (32,), "layers": 1, "attention": (), "head_dim": 32}


class ResBlock(nn.Module):
    """Scale-shift norm; up and down sampling sit between the first activation and the first convolution."""

    def __init__(self, width: int, embedded: int, out: int, resample: str = "") -> None:
        super().__init__()
        self.resample = resample
        self.in_layers = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedded, 2 * out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(out, out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if width == out else nn.Conv2d(width, out, 1)

    def resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.resample == "up" else x

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        h = self.in_layers[2](self.resampled(F.silu(self.in_layers[0](x))))
        scale, shift = self.emb_layers(embedded)[..., None, None].chunk(2, dim=1)
        h = self.out_layers[3](F.silu(self.out_layers[0](h) * (1 + scale) + shift))
        return self.skip_connection(self.resampled(x)) + h


class AttentionBlock(nn.Module):
    """Legacy order: the channels are split into heads first, each head's into q, k and v. Else the other way round."""

    legacy = True

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.heads = width // head_dim
        self.norm = nn.GroupNorm(32, width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, *_ = x.shape
        d = c // self.heads
        qkv = self.qkv(self.norm(x.flatten(2)))
        if self.legacy:
            q, k, v = qkv.reshape(n, self.heads, 3, d, -1).unbind(2)
        else:
            q, k, v = qkv.reshape(n, 3, self.heads, d, -1).unbind(1)
        weights = torch.softmax(torch.einsum("nhdt,nhds->nhts", q, k) / math.sqrt(d), dim=-1)
        h = torch.einsum("nhts,nhds->nhdt", weights, v)
        return x + self.proj_out(h.reshape(n, c, -1)).view_as(x)


class Block(nn.Sequential):
    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        for part in self:
            x = part(x, embedded) if isinstance(part, ResBlock) else part(x)
        return x


class GuidedDiffusion(nn.Module):
    """openai/guided-diffusion's U-Net with resblock_updown, use_scale_shift_norm and learn_sigma; its key names."""

    def __init__(self, channels: tuple[int, ...], layers: int, attention: tuple[int, ...], head_dim: int) -> None:
        super().__init__()
        first, last = channels[0], len(channels) - 1
        self.width, embedded = first, 4 * first
        self.time_embed = nn.Sequential(nn.Linear(first, embedded), nn.SiLU(), nn.Linear(embedded, embedded))

        def attend(level: int, width: int) -> list[nn.Module]:
            return [AttentionBlock(width, head_dim)] if level in attention else []

        blocks, skips, width = [Block(nn.Conv2d(3, first, 3, padding=1))], [first], first
        for level, out in enumerate(channels):
            for _ in range(layers):
                blocks.append(Block(ResBlock(width, embedded, out), *attend(level, out)))
                width = out
                skips.append(width)
            if level < last:
                blocks.append(Block(ResBlock(width, embedded, width, "down")))
                skips.append(width)
        self.input_blocks = nn.ModuleList(blocks)
        self.middle_block = Block(
            ResBlock(width, embedded, width), AttentionBlock(width, head_dim), ResBlock(width, embedded, width)
        )
        blocks = []
        for level, out in reversed(list(enumerate(channels))):
            for layer in range(layers + 1):
                block: list[nn.Module] = [ResBlock(width + skips.pop(), embedded, out), *attend(level, out)]
                width = out
                if level and layer == layers:
                    block.append(ResBlock(width, embedded, width, "up"))
                blocks.append(Block(*block))
        self.output_blocks = nn.ModuleList(blocks)
        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, 6, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        half = self.width // 2
        angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half) / half)
        embedded = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype))
        skips = []
        for block in self.input_blocks:
            x = block(x, embedded)
            skips.append(x)
        x = self.middle_block(x, embedded)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), embedded)
        return self.out(x)


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """No parameter at an initial value that hides it (zero outputs, unit norms)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(1.5 * noise / p[0].numel() ** 0.5)
            else:
                p.copy_(0.3 * noise + (1.0 if name.endswith("weight") else 0.0))
    return model.eval()
