"""Small models of the real classes, made on the spot, and encoders with known answers."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

import fs_plugins
from fs_plugins import PSM, PixelSpace, Readout, VisionCall, hookimpl
from fs_plugins.demo import world
from fs_plugins.identity import fingerprint
from fs_plugins.psm import Part, PSMConfig, ReadoutSpec
from fs_plugins.vision import Field

DEFAULTS = [torch.bfloat16, torch.float16, torch.float64, "meta"]
"""What may be set as torch's default type or device while everything of ours stays the same."""


@contextmanager
def default(what: torch.dtype | str) -> Iterator[None]:
    """torch's default type, or its default device, inside."""
    dtype = torch.get_default_dtype()
    if isinstance(what, str):
        torch.set_default_device(what)
    else:
        torch.set_default_dtype(what)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_default_device(None)


def command_line(processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run fs-plugins in a process of its own, or in several that ``accelerate launch`` starts."""
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes), "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m"]
    command = [sys.executable, "-m", *(launch if processes > 1 else ()), "fs_plugins.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
IMAGE_TOKEN = 30


def randomise(model: nn.Module, std: float = 0.15, seed: int = 0) -> nn.Module:
    """Default initialisation hides the image; make it matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


def knowing(model: nn.Module) -> nn.Module:
    """A model of transformers that carries what is usual for its family: one made on the spot has no processor beside
    it, and every verb would say so.
    """
    from fs_plugins.adapters.hf import DEFAULTS

    vision = getattr(model.config, "vision_config", model.config)
    model.image_processor = PixelSpace(*DEFAULTS[vision.model_type], source="the tests")
    return model


def vision_config(**changes):
    from transformers import CLIPVisionConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    return CLIPVisionConfig(**{**sizes, "image_size": 16, "patch_size": 4, "projection_dim": 24, **changes})


def make_llava(**changes):
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision_config(),
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        **{"image_seq_length": 16, "vision_feature_layer": -2, "vision_feature_select_strategy": "default", **changes},
    )
    return knowing(randomise(LlavaForConditionalGeneration(config)))


def make_clip():
    from transformers import CLIPConfig, CLIPModel

    text = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
        "vocab_size": 40, "max_position_embeddings": 16, "eos_token_id": 39, "bos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config=vision_config().to_dict(), projection_dim=24)
    return knowing(randomise(CLIPModel(config)))


def llava_inputs(images: Tensor, tokens: int = 16) -> dict[str, Tensor]:
    ids = torch.tensor([[1, *[IMAGE_TOKEN] * tokens, 5, 6, 7]]).repeat(len(images), 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels_of(images)}


def pixels_of(images: Tensor) -> Tensor:
    from fs_plugins.adapters.hf import CLIP

    return PixelSpace(*CLIP).from_unit(images, torch.float32)


class TinyEncoder(nn.Module):
    """(B, 3, 8, 8) -> {"tokens": (B, 4, 6), "extra": (B, 2)}: a smooth map, quick and exact to reason about."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.tokens = nn.Linear(48, 6)
        self.extra = nn.Linear(192, 2)
        randomise(self, 0.3, seed)
        self.seen: list[Tensor] = []

    def forward(self, pixel_values: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        self.seen.append(pixel_values.detach())
        patches = pixel_values.reshape(len(pixel_values), 4, 48)
        tokens = torch.tanh(self.tokens(patches))
        if scale is not None:
            tokens = tokens * scale.view(-1, 1, 1)
        return {"tokens": tokens, "extra": self.extra(pixel_values.flatten(1))}


class Classifier(nn.Module):
    """What attack libraries take: (B, 3, H, W) in [0, 1] -> logits of ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.llava = make_llava()
        self.call = fs_plugins.vision_call(self.llava)

    def forward(self, images: Tensor) -> Tensor:
        ids = llava_inputs(images.detach())
        ids.pop("pixel_values")
        pixels = self.call.pixels.from_unit(images, torch.float32)
        return self.llava(**ids, pixel_values=pixels).logits[:, -1, :10]


def scenes(folder: Path, count: int) -> Path:
    """The folder, with so many held-out scenes of the embedded world as 0.png, 1.png ..."""
    folder.mkdir()
    for i in range(count):
        world.scene("heldout", i).draw().save(folder / f"{i}.png")
    return folder


def tiny_call(encoder: nn.Module, **changes) -> VisionCall:
    settings = {
        "module": encoder,
        "pixels": PixelSpace(MEAN, STD),
        "readouts": (Readout("tokens", (Field("tokens", 0),), width=6, tokens=4),),
        "image_size": (8, 8),
        "architecture": {"family": "tiny"},
    }
    return VisionCall(**{**settings, **changes})


def make_psm(call: VisionCall, *, sigma: float = 0.25, purifier: bool = True, mapper: bool = True, **changes) -> PSM:
    """A PSM with random weights that fits ``call``."""
    config = {
        "name": "random",
        "sigma": sigma,
        "sigma_range": (sigma, sigma),
        "image_size": call.image_size,
        "purifier": Part(kind="unet", args={"channels": [8, 16], "unshuffle": 2}) if purifier else None,
        "readouts": tuple(
            ReadoutSpec(
                name=r.name,
                width=r.width,
                tokens=r.tokens,
                mapper=Part(kind="residual", args={"width": r.width, "heads": 2}),
            )
            for r in call.readouts
            if mapper
        ),
        "encoder": "test",
        "fingerprint": fingerprint(call.module),
    }
    with torch.random.fork_rng(devices=[]):  # the same one whatever ran before
        torch.manual_seed(3)
        psm = PSM(PSMConfig(**{**config, **changes}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in psm.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return psm


def plugin(**implementations) -> types.ModuleType:
    """A plugin with these hooks."""
    module = types.ModuleType("plugin")
    for name, function in implementations.items():
        setattr(module, name, hookimpl(function))
    return module


def make_classifier(**changes):
    """A small ViT that tells three animals apart, if by chance."""
    from transformers import ViTConfig, ViTForImageClassification

    layers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    names = {0: "cat", 1: "dog", 2: "newt"}
    config = ViTConfig(**{**layers, "image_size": 16, "patch_size": 4, "id2label": names, **changes})
    return randomise(ViTForImageClassification(config), 0.3)
