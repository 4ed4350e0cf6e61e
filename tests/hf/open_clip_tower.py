"""open_clip's vision tower, stated plainly, and what tests of encoders share."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import IMAGE_TOKEN, make_llava, pixels_of, randomise, vision_config
from torch import Tensor, nn

from fs_plugins import torchvision_schemas  # noqa: F401  (open_clip imports torchvision)

transformers = pytest.importorskip("transformers")


# open_clip's VisionTransformer, stated plainly: its parameters' names, and what it computes.


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        layers = [("c_fc", nn.Linear(width, mlp)), ("gelu", QuickGELU()), ("c_proj", nn.Linear(mlp, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class OpenClipTower(nn.Module):
    def __init__(self, *, size=16, patch=4, width=32, layers=3, heads=4, mlp=48, out=24) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((size // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(Block(width, heads, mlp) for _ in range(layers))
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.zeros(width, out))

    def hidden_states(self, pixels: Tensor) -> list[Tensor]:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], dim=1)
        states = [self.ln_pre(tokens + self.positional_embedding)]
        for block in self.transformer.resblocks:
            states.append(block(states[-1]))
        return states

    def forward(self, pixels: Tensor) -> Tensor:
        return self.ln_post(self.hidden_states(pixels)[-1][:, 0]) @ self.proj


def norms_around_one(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gains around zero would hide what comes before them."""
    randomise(model, seed=seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.add_(1)
    return model


def tower(seed: int = 1, **changes) -> OpenClipTower:
    return norms_around_one(OpenClipTower(**changes), seed)


def pixels(size: int = 16, count: int = 3) -> Tensor:
    return pixels_of(torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(size)))


def with_projection(**changes):
    return norms_around_one(transformers.CLIPVisionModelWithProjection(vision_config(**changes)))


def as_saved(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The converted names as they are in a CLIPVisionModelWithProjection."""
    return {name if name.startswith("visual_") else f"vision_model.{name}": value for name, value in weights.items()}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one.std() > 0.1) and torch.allclose(one, other, rtol=0, atol=1e-5))


@torch.no_grad()
def agree(ours: OpenClipTower, theirs: nn.Module, size: int) -> bool:
    given = pixels(size)
    output = theirs(given, output_hidden_states=True)
    states = zip(ours.hidden_states(given), output.hidden_states, strict=True)
    return all(close(*pair) for pair in states) and close(ours(given), output.image_embeds)


def llava_encoder(model: nn.Module) -> nn.Module:
    return model.model.vision_tower


def language_sees(model: nn.Module, size: int) -> Tensor:
    """The patch tokens before the projector."""
    return llava_encoder(model)(pixels(size), output_hidden_states=True).hidden_states[-2][:, 1:]


def llava_next():
    config = transformers.LlavaNextConfig(
        vision_config=vision_config(),
        text_config=make_llava().config.text_config,
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=[[16, 32], [32, 16]],
    )
    return transformers.LlavaNextForConditionalGeneration(config).eval()


def on_disk(folder: Path, name: str, state: dict[str, Tensor]) -> Path:
    path = folder / name
    (save_file if path.suffix == ".safetensors" else torch.save)(state, path)
    return path
