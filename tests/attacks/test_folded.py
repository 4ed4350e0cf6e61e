"""Batch normalisation folded away: the same function, and nothing done to the model."""

from __future__ import annotations

import copy

import pytest
import torch
from support import TinyEncoder, tiny_call
from tiny import rand
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import fs_plugins
from fs_plugins.attacks import attack
from fs_plugins.attacks.folded import folded


def classifier() -> nn.Module:
    """A small ResNet of transformers whose statistics are not those of a new net."""
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(0)
    facts = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    model = ResNetModel(ResNetConfig(**facts)).eval().requires_grad_(False)
    for part in model.modules():
        if isinstance(part, _BatchNorm):
            for value in (part.weight, part.bias, part.running_mean, part.running_var):
                value.copy_(torch.rand_like(value) + 0.5)
    return model


@pytest.fixture
def call():
    pixels = fs_plugins.PixelSpace((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    return fs_plugins.vision_call(classifier(), processor=pixels)


def test_it_is_the_same_function_without_batch_normalisation(call):
    before = copy.deepcopy(call.module.state_dict())
    images = rand(3, 3, 32, 32)
    found = folded(call, images)
    assert found.module is not call.module
    assert not any(isinstance(part, _BatchNorm) for part in found.module.modules())
    assert torch.allclose(found.embed(found.encode(images)), call.embed(call.encode(images)), atol=1e-5)
    assert any(isinstance(part, _BatchNorm) for part in call.module.modules())
    assert all(torch.equal(value, before[name]) for name, value in call.module.state_dict().items())
    assert not any(part._forward_hooks for part in found.module.modules())


def test_an_attack_on_it_is_an_attack_on_the_encoder(call):
    images, targets = rand(3, 3, 32, 32), rand(3, 3, 32, 32, seed=1)
    ways = [attack(one, images, targets, steps=8, eps=0.1) for one in (call, folded(call, images))]
    gained = [
        torch.cosine_similarity(call.embed(call.encode(way)), call.embed(call.encode(targets)), dim=-1) for way in ways
    ]
    assert torch.allclose(*gained, atol=1e-2)


class Twice(nn.Module):
    """A convolution whose output is seen by more than its normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
        self.norm.running_mean += 3.0

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        made = self.convolution(pixels)
        return (self.norm(made) + made).mean((2, 3))


def test_what_would_not_be_the_same_function_is_left_as_it_is():
    call = tiny_call(TinyEncoder())
    assert folded(call, rand(2, 3, 8, 8)) is call, "there is no batch normalisation"
    timm_like = fs_plugins.VisionCall(
        module=Twice().eval(),
        pixels=call.pixels,
        readouts=(fs_plugins.vision.Readout("features", (), width=3),),
        image_size=None,
        architecture={"family": "twice"},
    )
    assert folded(timm_like, rand(2, 3, 8, 8)) is timm_like
