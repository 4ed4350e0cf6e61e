"""The attack without gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TinyEncoder, make_psm, tiny_call
from tiny import cosine, rand, randn
from torch import nn

from fs_plugins import ModelError
from fs_plugins.attacks import METHODS, attack, square
from fs_plugins.attacks.victim import Stream, Victim
from fs_plugins.smoothing import FeatureSmoother


@settings(max_examples=15)
@given(st.floats(0.01, 1.0), st.integers(0, 50))
def test_square_stays_in_the_ball_and_only_ever_climbs(eps, seed):
    images = rand(2, 3, 6, 6, seed=seed)
    values = []

    def objective(x, step, draw):
        values.append((x * slope).flatten(1).sum(1))
        return values[-1]

    slope = randn(3, 6, 6).double()  # a sum near zero has no digits to lose
    found = square(objective, images, eps=eps, queries=30, stream=Stream((seed,), (0, 1)))
    assert (found - images).abs().max() <= eps + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1
    assert torch.allclose((found * slope).flatten(1).sum(1), torch.stack(values).amax(0))


def test_square_nears_the_optimum_of_a_linear_objective_and_repeats_itself():
    slope, images = randn(3, 6, 6), torch.full((2, 3, 6, 6), 0.5)

    def line(x, step, draw):
        return (x * slope).flatten(1).sum(1)

    found = square(line, images, eps=0.1, queries=1500, stream=Stream((0,), (0, 1)))
    assert ((line(found, 0, 0) - line(images, 0, 0)) > 0.9 * 0.1 * slope.abs().sum()).all()
    assert torch.equal(found, square(line, images, eps=0.1, queries=1500, stream=Stream((0,), (0, 1))))


def test_square_comes_by_the_same_door_and_needs_no_gradient():
    call = tiny_call(TinyEncoder())
    images, targets, told = rand(3, 3, 8, 8), rand(3, 3, 8, 8, seed=1), []

    class Cut(nn.Module):
        def forward(self, images, sigma):
            return images.detach()

    psm = make_psm(call, mapper=False, sigma=0.05)
    psm.purifier = Cut().eval()
    through = FeatureSmoother(call, psm=psm, sigma=0.05, n0=2, seed=0)
    with pytest.raises(ModelError, match=r'No gradient reaches the pixels.*method="square"'):
        attack(through, images, targets, steps=1)
    options = {"method": "square", "eps": 0.2, "steps": 300, "batch_size": 2}
    attacked = attack(through, images, targets, report=told.append, **options)
    assert (attacked - images).abs().max() <= 0.2 + 1e-6
    assert (cosine(call, attacked, targets) > cosine(call, images, targets)).all()
    assert sum(told) == 300 * len(images), "its steps are queries"
    objective = METHODS["square"].objective([Victim(through)], targets, Stream((0, "square"), (0, 1, 2)), 1)
    alone = square(objective, images, eps=0.2, queries=300, stream=Stream((0, "square"), (0, 1, 2)))
    assert torch.allclose(alone, attacked, atol=1e-6)


def test_square_averages_over_draws():
    seen = []

    def objective(x, step, draw):
        seen.append((step, draw))
        return (x.flatten(1).sum(1)) * (-1 if draw else 2)

    found = square(objective, rand(1, 3, 4, 4), eps=0.1, queries=20, draws=2, stream=Stream((0,), (0,)))
    assert seen[:4] == [(1, 0), (1, 1)] * 2
    assert found.sum() > rand(1, 3, 4, 4).sum()
