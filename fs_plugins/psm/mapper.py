"""The residual smoothness mapper (arXiv 2601.16200, section 4.2 and appendix S.8.2).

``ResidualMapper`` is the paper's: z -> z + M(z, sigma), with M the sum of k noise-aware residual blocks.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fs_plugins.checks import whole
from fs_plugins.errors import SettingError
from fs_plugins.psm.purifier import depth

_SIGMA_FLOOR = 1e-4


class FiLM(nn.Module):
    """sigma -> (gamma, beta), each (D,): W2 GELU(W1 sigma), without biases as printed (eq. S.29).

    Without biases both vanish at sigma = 0, which makes the whole mapper exactly the identity there.
    """

    def __init__(self, width: int, hidden: int = 64) -> None:
        super().__init__()
        self.first = nn.Linear(1, hidden, bias=False)
        self.second = nn.Linear(hidden, 2 * width, bias=False)
        nn.init.zeros_(self.second.weight)

    def forward(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        gamma, beta = self.second(F.gelu(self.first(sigma.view(1)))).chunk(2)
        return gamma, beta


class MapperBlock(nn.Module):
    """One block m_i: (N, L, D), sigma -> the update (N, L, D) (eqs. S.28 to S.32).

    Three branches on the normalised feature, h = h_attn + h_mlp + 0.5 h_conv; attention in the first block only.
    The update is (1 + gamma) * v * alpha * sigma^beta' + beta * scale with v = h / ||h|| per token.
    """

    def __init__(self, width: int, *, heads: int, ratio: int, attention: bool, fixup: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.film = FiLM(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True) if attention else None
        self.mlp = nn.Sequential(nn.Linear(width, ratio * width), nn.GELU(), nn.Linear(ratio * width, width))
        self.conv = nn.Conv1d(width, width, 3, padding=1, groups=width)
        self.amplitude = nn.Sequential(nn.Linear(2, 32), nn.GELU(), nn.Linear(32, 1))
        self.exponent = nn.Sequential(nn.Linear(1, 32), nn.GELU(), nn.Linear(32, 1))
        self.scale = nn.Parameter(torch.full((width,), 5e-4))
        outs: list[Any] = [self.mlp[2], self.conv]
        if self.attention is not None:
            outs.append(self.attention.out_proj)
        amplitude: Any = self.amplitude[2]
        with torch.no_grad():
            for out in outs:
                out.weight.mul_(fixup)
                nn.init.zeros_(out.bias)
            # The direction has unit length whatever the branches' scale, so the block starts small here.
            nn.init.zeros_(amplitude.weight)
            nn.init.constant_(amplitude.bias, -2.0)

    def forward(self, z: Tensor, sigma: Tensor) -> Tensor:
        gamma, beta = self.film(sigma)
        x = self.norm(z)
        h = self.mlp(x) + 0.5 * self.conv(x.transpose(1, 2)).transpose(1, 2)
        if self.attention is not None:
            h = h + self.attention(x, x, x, need_weights=False)[0]
        v = h / h.norm(dim=-1, keepdim=True).clamp_min(1e-8)
        floored = sigma.clamp_min(_SIGMA_FLOOR)
        alpha = F.softplus(self.amplitude(torch.stack([sigma, floored.log()])))
        exponent = F.softplus(self.exponent(sigma.view(1)))
        strength = torch.where(sigma > 0, alpha * floored**exponent, torch.zeros_like(alpha))
        return (1 + gamma) * v * strength + beta * self.scale


class ResidualMapper(nn.Module):
    """z + M(z, sigma), k = 3 blocks (eq. 10). Exactly the identity at sigma = 0.

    Args:
        width: D of the readout.
        blocks: k.
        heads: attention heads of the first block.
        ratio: hidden width of the MLP branch over ``width`` (the paper gives none).

    Raises:
        SettingError: sizes that no such net has.
    """

    def __init__(self, width: int, *, blocks: int = 3, heads: int = 4, ratio: int = 4) -> None:
        super().__init__()
        width, heads = whole("ResidualMapper.width", width), whole("ResidualMapper.heads", heads)
        blocks, ratio = depth("ResidualMapper.blocks", blocks), whole("ResidualMapper.ratio", ratio)
        if width % heads:
            raise SettingError(f"ResidualMapper.heads must divide the width {width}, got {heads}.")
        self.width = width
        self.blocks = nn.ModuleList(
            MapperBlock(width, heads=heads, ratio=ratio, attention=i == 0, fixup=blocks**-0.5) for i in range(blocks)
        )

    @torch.no_grad()
    def calibrate(self, z: Tensor, sigma: float, share: float = 0.05) -> None:
        """Start every block's update at this share of the tokens' mean length, at this sigma.

        The printed update has a length of its own, whatever the features'; training from the wrong order of
        magnitude would spend itself on reaching the right one. An initialisation, not part of the formula.
        """
        wanted = share * z.norm(dim=-1).mean()
        for block in self.blocks:
            block = cast(MapperBlock, block)
            level = torch.tensor(sigma, dtype=z.dtype, device=z.device)
            alpha = wanted / level ** F.softplus(block.exponent(level.view(1)))
            last = cast(nn.Linear, block.amplitude[2])
            nn.init.zeros_(last.weight)
            last.bias.copy_(alpha + torch.log(-torch.expm1(-alpha)))

    def forward(self, z: Tensor, sigma: float | Tensor) -> Tensor:
        """(N, L, D) tokens or (N, D) pooled vectors, sigma in [0, 1] pixel units -> the same shape."""
        level = torch.as_tensor(sigma, dtype=z.dtype, device=z.device)
        tokens = z.unsqueeze(1) if z.ndim == 2 else z
        for block in self.blocks:
            tokens = tokens + cast(MapperBlock, block)(tokens, level)
        return tokens.squeeze(1) if z.ndim == 2 else tokens
