"""The loop of the gradient attacks, in its ball."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import length, rand, randn

from fs_plugins import ModelError
from fs_plugins.attacks import Ball, ascend


@settings(max_examples=30)
@given(
    st.sampled_from(["linf", "l2"]), st.floats(0.001, 1.0), st.floats(0.001, 1.0), st.integers(1, 4), st.integers(0, 99)
)
def test_attacked_images_stay_in_the_ball_and_in_the_unit_cube(norm, eps, step_size, steps, seed):
    images = rand(2, 3, 4, 4, seed=seed)
    attacked = ascend(
        lambda x, step, draw: (x**3).flatten(1).sum(1), images, ball=Ball(norm, eps), step_size=step_size, steps=steps
    )
    far = (attacked - images).abs().amax((1, 2, 3)) if norm == "linf" else length(attacked - images)
    assert (far <= eps + 1e-6).all()
    assert attacked.min() >= 0
    assert attacked.max() <= 1


def test_a_large_picture_stays_in_a_large_l2_ball():
    images = torch.full((1, 3, 224, 224), 0.5)
    attacked = ascend(lambda x, *_: x.flatten(1).sum(1), images, ball=Ball("l2", 24.3), steps=3)
    assert 24.2 < (attacked - images).double().norm() <= 24.3 + 1e-6


def test_few_steps_are_long_enough_to_reach_the_ball():
    images = torch.full((1, 3, 4, 4), 0.5)
    for steps in (3, 300):
        attacked = ascend(lambda x, *_: x.flatten(1).sum(1), images, ball=Ball("linf", 16 / 255), steps=steps)
        assert torch.allclose(attacked - images, torch.tensor(16 / 255))


def test_an_objective_without_a_gradient_is_told():
    with pytest.raises(ModelError, match="No gradient reaches the pixels"):
        ascend(lambda x, *_: x.detach().flatten(1).sum(1), rand(1, 3, 4, 4), ball=Ball(), steps=1)


def test_a_linear_objective_is_solved_exactly_in_both_norms():
    slope = randn(1, 3, 4, 4)
    images = torch.full((1, 3, 4, 4), 0.5)

    def line(x, step, draw):
        return (x * slope).flatten(1).sum(1)

    attacked = ascend(line, images, ball=Ball("linf", 0.1), step_size=0.02, steps=10)
    assert torch.allclose(attacked, images + 0.1 * slope.sign(), atol=1e-6)
    attacked = ascend(line, images, ball=Ball("l2", 0.5), steps=10)
    assert torch.allclose(attacked, images + 0.5 * slope / slope.norm(), atol=1e-6)


def test_the_gradient_is_summed_over_draws():
    slopes = randn(4, 3, 4, 4)
    images = torch.full((1, 3, 4, 4), 0.5)
    seen = []

    def noisy(x, step, draw):
        seen.append((step, draw))
        return (x * slopes[draw]).flatten(1).sum(1)

    attacked = ascend(noisy, images, ball=Ball("l2", 0.25), steps=2, draws=4)
    together = slopes.sum(0)
    assert torch.allclose(attacked, images + 0.25 * together / together.norm(), atol=1e-6)
    assert seen == [(step, draw) for step in (1, 2) for draw in range(4)]


def test_a_zero_gradient_moves_nothing():
    images = rand(1, 3, 4, 4)
    for norm in ("linf", "l2"):
        assert torch.equal(ascend(lambda x, *_: 0 * x.flatten(1).sum(1), images, ball=Ball(norm, 0.1), steps=2), images)
