"""The attack on the answer."""

from __future__ import annotations

import pytest
import torch
from support import TinyEncoder, tiny_call
from tiny import length, rand, smoother
from torch import nn

from fs_plugins.attacks import Answer, attack

WIDTH = tiny_call(TinyEncoder()).embed(tiny_call(TinyEncoder()).encode(rand(1, 3, 8, 8))).shape[1]


@pytest.fixture
def head() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, 5).double().requires_grad_(False)


def scores(encoder, head, images):
    call = getattr(encoder, "call", encoder)
    seen = encoder.smooth(images) if hasattr(encoder, "smooth") else call.encode(images)
    return head(call.embed(seen).double())


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_moves_the_class_that_is_answered_inside_its_ball(head, adaptive, norm):
    call = tiny_call(TinyEncoder().double())
    encoder = smoother(call) if adaptive else call
    images = rand(6, 3, 8, 8).double()
    eps = 0.3 if norm == "linf" else 4.0
    own = scores(call, head, images).argmax(-1)
    attacked = attack(encoder, images, method=Answer(head), norm=norm, eps=eps, steps=30, seed=1)
    far = (attacked - images).abs().max() if norm == "linf" else length(attacked - images).max()
    assert far <= eps + 1e-6
    before, after = (scores(encoder, head, shown).log_softmax(-1) for shown in (images, attacked))
    lost = before.gather(1, own[:, None]) - after.gather(1, own[:, None])
    assert (lost > 0).all()
    assert torch.equal(attack(encoder, images, method=Answer(head), norm=norm, eps=eps, steps=30, seed=1), attacked)


def test_with_targets_it_reaches_their_class(head):
    call = tiny_call(TinyEncoder().double())
    images, targets = rand(8, 3, 8, 8).double(), rand(8, 3, 8, 8, seed=1).double()
    wanted = scores(call, head, targets).argmax(-1)
    attacked = attack(call, images, targets, method=Answer(head), eps=1.0, steps=60)
    assert torch.equal(scores(call, head, attacked).argmax(-1), wanted)


def test_it_takes_more_of_the_answer_than_the_attack_on_the_feature(head):
    call = tiny_call(TinyEncoder().double())
    images = rand(8, 3, 8, 8).double()
    own = scores(call, head, images).argmax(-1, keepdim=True)
    left = [
        scores(call, head, attack(call, images, method=method, norm="l2", eps=1.0, steps=40)).log_softmax(-1)
        for method in (Answer(head), "attackvlm")
    ]
    on_answer, on_feature = (found.gather(1, own).mean() for found in left)
    assert on_answer < on_feature
