from __future__ import annotations

import pytest
import torch
from conftest import TinyEncoder, tiny_call
from hypothesis import given, settings
from hypothesis import strategies as st

from fs_plugins import SettingError
from fs_plugins.attacks import ascend, attack_vlm


@settings(max_examples=30, deadline=None)
@given(st.floats(0.001, 1.0), st.floats(0.001, 1.0), st.integers(1, 4), st.integers(0, 100))
def test_attacked_images_stay_in_the_ball_and_in_the_unit_cube(eps, step_size, steps, seed):
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    attacked = ascend(lambda x: (x**3).flatten(1).sum(1), images, eps=eps, step_size=step_size, steps=steps)
    assert (attacked - images).abs().max() <= eps + 1e-6
    assert attacked.min() >= 0
    assert attacked.max() <= 1


def test_a_linear_objective_is_solved_exactly():
    slope = torch.randn(1, 3, 4, 4)
    images = torch.full((1, 3, 4, 4), 0.5)
    attacked = ascend(lambda x: (x * slope).flatten(1).sum(1), images, eps=0.1, step_size=0.02, steps=10)
    assert torch.allclose(attacked, images + 0.1 * slope.sign(), atol=1e-6)


def test_attack_vlm_raises_the_cosine_to_the_target_deterministically_and_for_any_batch():
    call = tiny_call(TinyEncoder())
    images, targets = torch.rand(3, 3, 8, 8), torch.rand(3, 3, 8, 8)
    options = {"eps": 16 / 255, "steps": 20}
    attacked = attack_vlm(call, images, targets, **options)

    def cosine(x):
        return torch.cosine_similarity(call.embed(call.encode(x)), call.embed(call.encode(targets)), dim=-1)

    assert (cosine(attacked) > cosine(images)).all()
    assert torch.equal(attack_vlm(call, images, targets, **options), attacked)
    alone = torch.cat([attack_vlm(call, images[i : i + 1], targets[i : i + 1], **options) for i in range(3)])
    assert torch.allclose(alone, attacked, atol=1e-6)
    assert not attacked.requires_grad


def test_the_oblivious_attack_sees_the_plain_tower_even_when_smoothing_is_enabled(llava):
    import fs_plugins

    call = fs_plugins.vision_call(llava)
    images, targets = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    plain = attack_vlm(call, images, targets, steps=2)
    with fs_plugins.enable(llava, psm=None, sigma=0.25) as handle:
        assert torch.equal(attack_vlm(call, images, targets, steps=2), plain)
        assert handle.status().vision[0].calls == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 16}, "did you mean 16/255"),
        ({"eps": 0}, "eps"),
        ({"eps": -0.1}, "eps"),
        ({"eps": float("nan")}, "eps"),
        ({"step_size": 0}, "step_size"),
        ({"steps": 0}, "steps"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(SettingError, match=message):
        attack_vlm(tiny_call(TinyEncoder()), torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8), **options)
