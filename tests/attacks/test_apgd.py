"""APGD, and what all attacks by gradients share: momentum and starts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TinyEncoder, tiny_call
from tiny import cosine, length, rand, randn, smoother

from fs_plugins import SettingError
from fs_plugins.attacks import Ascent, Ball, ascend, attack
from fs_plugins.attacks.apgd import APGD, apgd, checkpoints
from fs_plugins.attacks.feature import Method, whole


def test_checkpoints_are_the_papers():
    # 0.22, then 0.19, 0.16 ... further on, at least 0.06 apart (Croce and Hein, section 3.1)
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]


@settings(max_examples=20)
@given(st.sampled_from(["linf", "l2"]), st.floats(0.001, 1.0), st.integers(1, 12), st.integers(0, 99))
def test_it_stays_in_the_ball_and_in_the_unit_cube(norm, eps, steps, seed):
    images = rand(2, 3, 4, 4, seed=seed)
    start = images + randn(*images.shape, seed=seed)
    attacked = apgd(
        lambda x, step, draw: (x**3).flatten(1).sum(1), images, ball=Ball(norm, eps), steps=steps, start=start
    )
    far = (attacked - images).abs().amax((1, 2, 3)) if norm == "linf" else length(attacked - images)
    assert (far <= eps + 1e-6).all()
    assert attacked.min() >= 0
    assert attacked.max() <= 1


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_narrow_hill_is_climbed_by_steps_that_grow_small(norm):
    images = torch.full((2, 3, 4, 4), 0.5, dtype=torch.float64)
    ball = Ball(norm, 0.2)
    top = images + 0.3 * ball.steepest(randn(2, 3, 4, 4, dtype=torch.float64)) * 0.5

    def hill(x, step, draw):
        return -(x - top).flatten(1).abs().sum(1)

    start = images + 0.1 * ball.steepest(randn(2, 3, 4, 4, seed=1, dtype=torch.float64))
    fixed = ascend(hill, images, ball=ball, steps=100, step_size=2 * ball.eps, start=start)
    found = apgd(hill, images, ball=ball, steps=100, start=start)
    assert (hill(found, 0, 0) > 0.2 * hill(fixed, 0, 0)).all()


def test_a_step_size_of_its_own_for_each_image():
    """What one image does is no matter of another's."""
    images = rand(3, 3, 4, 4).double()
    slopes = randn(3, 3, 4, 4, dtype=torch.float64)

    def objective(part):
        return lambda x, step, draw: torch.sin(7 * (x * slopes[part]).flatten(1).sum(1))

    alone = [apgd(objective(slice(i, i + 1)), images[i : i + 1], ball=Ball("linf", 0.1), steps=30) for i in range(3)]
    together = apgd(objective(slice(0, 3)), images, ball=Ball("linf", 0.1), steps=30)
    torch.testing.assert_close(together, torch.cat(alone))


def test_it_has_no_step_size_to_be_told():
    call = tiny_call(TinyEncoder())
    method = Method("apgd", whole, optimiser=APGD())
    with pytest.raises(SettingError, match="chooses its step sizes itself"):
        attack(call, rand(1, 3, 8, 8), method=method, steps=2, step_size=0.1)


@pytest.mark.parametrize("optimiser", [Ascent(), Ascent(momentum=0.75), APGD()])
@pytest.mark.parametrize("targeted", [True, False])
def test_every_optimiser_climbs_and_repeats_itself(optimiser, targeted):
    call = tiny_call(TinyEncoder().double())
    images, targets = rand(4, 3, 8, 8).double(), rand(4, 3, 8, 8, seed=1).double()
    aims = targets if targeted else None
    options = {"method": Method("m", whole, optimiser=optimiser), "eps": 0.2, "steps": 20, "draws": 2, "seed": 5}
    encoder = smoother(call)
    attacked = attack(encoder, images, aims, **options)
    before, after = (cosine(call, shown, targets if targeted else images) for shown in (images, attacked))
    assert ((after > before) if targeted else (after < before)).all()
    assert torch.equal(attack(encoder, images, aims, **options), attacked)
    half = attack(encoder, images[2:], None if aims is None else aims[2:], names=[2, 3], **options)
    assert torch.allclose(half, attacked[2:], atol=1e-6)


def test_momentum_averages_over_noise():
    """Where each draw's slope is mostly noise, adding up slopes goes further than following each."""
    images = torch.full((8, 3, 8, 8), 0.5, dtype=torch.float64)
    slope = randn(3, 8, 8, dtype=torch.float64)

    def noisy(x, step, draw):
        off = randn(8, 3, 8, 8, seed=step, dtype=torch.float64) * 3
        return (x * (slope + off)).flatten(1).sum(1)

    gains = []
    for momentum in (0.0, 0.75):
        found = ascend(noisy, images, ball=Ball("l2", 1.0), steps=40, step_size=0.05, momentum=momentum)
        gains.append(((found - images) * slope).flatten(1).sum(1).mean())
    assert gains[1] > 1.2 * gains[0]


def test_of_several_starts_each_image_keeps_its_best():
    call = tiny_call(TinyEncoder().double())
    images = rand(6, 3, 8, 8).double()
    options = {"eps": 0.3, "steps": 3, "seed": 2}
    told = []
    one, several = (attack(call, images, restarts=count, report=told.append, **options) for count in (1, 4))
    own = [cosine(call, shown, images) for shown in (one, several)]
    assert (own[1] <= own[0]).all()
    assert (own[1] < own[0]).any()
    assert sum(told) == 6 * 3 * 5
    with pytest.raises(SettingError, match="restarts"):
        attack(call, images, restarts=0, **options)
