"""A linear head is trained on a frozen encoder, and what it answers is certified."""

from __future__ import annotations

import pytest
import torch

import fs_plugins
from fs_plugins import SettingError
from fs_plugins.training import train_linear_head

COLOURS = torch.tensor([[0.9, 0.2, 0.2], [0.2, 0.8, 0.3], [0.2, 0.3, 0.9]])


def shown(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy pictures of three colours, and which."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    noise = 0.1 * torch.rand(count, 3, 16, 16, generator=generator)
    return COLOURS[labels][..., None, None] * 0.9 + noise, labels


def test_a_head_on_clip_names_held_out_pictures_and_its_answers_are_certified(clip):
    head = train_linear_head(clip, *shown(30, seed=0))
    held, labels = shown(9, seed=1)
    call = fs_plugins.vision_call(clip)
    with torch.no_grad():
        assert torch.equal(head(call.embed(call.encode(held))).argmax(1), labels)
    found = fs_plugins.certify_predictions(clip, held[:3], head, n=200, psm=None, sigma=0.02, seed=0)
    assert [one.predicted for one in found] == [0, 1, 2]
    assert all(one.vote_radius and one.feature_radius is None for one in found)


def test_the_head_is_the_optimum_of_its_loss(clip):
    images, labels = shown(30, seed=0)
    head = train_linear_head(clip, images, labels, penalty=0.01)
    call = fs_plugins.vision_call(clip)
    with torch.no_grad():
        features = call.embed(call.encode(images)).double()
    spread = features.std(0)

    def loss(weight, bias):
        scores = features @ weight.T + bias
        return torch.nn.functional.cross_entropy(scores, labels) + 0.01 * (weight * spread).square().sum()

    at = head.weight.double().requires_grad_(), head.bias.double().requires_grad_()
    slopes = torch.autograd.grad(loss(*at), at)
    # The head is in single precision, and this random encoder's features are close to each other.
    assert max(float((slope / scale).abs().max()) for slope, scale in zip(slopes, (spread, 1.0), strict=True)) < 1e-3


@pytest.mark.parametrize("labels", [[0, 1], [0, 0, 0], [0, 1, -1], [0, 1, 0.5]])
def test_labels_that_are_none_are_refused(clip, labels):
    with pytest.raises(SettingError):
        train_linear_head(clip, torch.rand(3, 3, 16, 16), labels)
