"""The door that every attack comes by: what is attacked, how far, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from support import TinyEncoder, plugin, tiny_call
from tiny import cosine, length, rand, smoother
from torch import nn

import fs_plugins
from fs_plugins import ModelError, SettingError, hooks
from fs_plugins.attacks import METHODS, attack
from fs_plugins.attacks.victim import Stream, Victim, victims


@pytest.mark.parametrize(
    ("method", "norm", "eps"),
    [(name, "linf", 0.1) for name in METHODS] + [(name, "l2", 0.7) for name in METHODS if name != "square"],
)
@pytest.mark.parametrize("targeted", [True, False])
@pytest.mark.parametrize("adaptive", [True, False])
def test_every_attack_climbs_its_objective_in_its_ball_and_repeats_itself(method, targeted, norm, eps, adaptive):
    # In double precision: where a slope is all but zero, a sign step makes a whole step of a rounding error.
    call = tiny_call(TinyEncoder().double())
    images, targets = rand(3, 3, 8, 8).double(), rand(3, 3, 8, 8, seed=1).double()
    encoder = smoother(call) if adaptive else call
    aims = targets if targeted else None
    steps = {"steps": 24} if method == "square" else {"steps": 5, "step_size": eps / 2}
    options = {"norm": norm, "eps": eps, **steps, "draws": 2 if adaptive else 1, "seed": 3}
    attacked = attack(encoder, images, aims, method=method, **options)
    far = (attacked - images).abs().max() if norm == "linf" else length(attacked - images).max()
    assert far <= eps + 1e-6
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert not attacked.requires_grad
    victim, sign = Victim(encoder), 1 if targeted else -1
    objective = METHODS[method].objective([victim], targets if targeted else images, Stream((9,), (0, 1, 2)), sign)
    with torch.no_grad():
        before, after = (torch.stack([objective(x, step, 0) for step in range(6)]).mean(0) for x in (images, attacked))
    assert after.mean() > before.mean()
    assert torch.equal(attack(encoder, images, aims, method=method, **options), attacked)
    other = attack(encoder, images, aims, method=method, **{**options, "seed": 4})
    drawn = adaptive or not targeted or method == "square" or METHODS[method].crop is not None
    assert torch.equal(other, attacked) is not drawn


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("adaptive", [True, False])
def test_the_batch_size_changes_nothing(method, adaptive):
    # In double precision: a sign step makes 1/255 of a rounding error.
    call = tiny_call(TinyEncoder().double())
    images, targets = rand(5, 3, 8, 8).double(), rand(5, 3, 8, 8, seed=1).double()
    encoder = smoother(call) if adaptive else call
    options = {"steps": 4, "seed": 3, "names": list("abcde")}
    whole = attack(encoder, images, targets, method=method, batch_size=5, **options)
    assert torch.allclose(attack(encoder, images, targets, method=method, batch_size=2, **options), whole, atol=1e-6)
    options["names"] = ["d"]
    alone = attack(encoder, images[3:4], targets[3:4], method=method, **options)
    assert torch.allclose(alone, whole[3:4], atol=1e-6)


def test_attackvlm_raises_the_cosine_to_the_target():
    call = tiny_call(TinyEncoder())
    images, targets = rand(3, 3, 8, 8), rand(3, 3, 8, 8, seed=1)
    attacked = attack(call, images, targets, method="attackvlm", steps=20)
    assert (cosine(call, attacked, targets) > cosine(call, images, targets)).all()


def test_untargeted_attacks_leave_the_image_and_succeed_without_bound():
    call = tiny_call(TinyEncoder())
    images = rand(4, 3, 8, 8)
    near = attack(call, images, method="attackvlm", eps=8 / 255, steps=40)
    far = attack(call, images, method="attackvlm", eps=1.0, step_size=0.1, steps=40)
    assert (cosine(call, near, images) < 1 - 1e-4).all()
    assert (cosine(call, far, images) < cosine(call, near, images)).all()
    assert (cosine(call, far, images) < 0).all()


def test_the_oblivious_attack_sees_the_plain_tower_even_when_smoothing_is_enabled(llava):
    call = fs_plugins.vision_call(llava)
    images, targets = rand(2, 3, 16, 16), rand(2, 3, 16, 16, seed=1)
    plain = attack(call, images, targets, method="attackvlm", steps=2)
    with fs_plugins.enable(llava, psm=None, sigma=0.25) as handle:
        assert torch.equal(attack(call, images, targets, method="attackvlm", steps=2), plain)
        through = attack(handle.smoothers[0], images, targets, method="attackvlm", steps=2)
        assert not torch.equal(through, plain)
        assert handle.status().vision[0].calls == 0, "an attacker's own passes are no smoothed calls of the model"


def test_a_model_is_attacked_as_it_serves(llava):
    images, targets = rand(2, 3, 16, 16), rand(2, 3, 16, 16, seed=1)
    plain = attack(fs_plugins.vision_call(llava), images, targets, steps=2)
    assert torch.equal(attack(llava, images, targets, steps=2), plain), "nothing is enabled: its plain encoder"
    (pipeline,) = fs_plugins.smoothers(llava, psm=None, sigma=0.25)
    adaptive = attack(pipeline, images, targets, steps=2)
    with fs_plugins.enable(llava, psm=None, sigma=0.25):
        assert torch.equal(attack(llava, images, targets, steps=2), adaptive), "smoothing is enabled: through it"
        assert torch.equal(attack([llava], images, targets, steps=2), adaptive), "also in an ensemble"
    assert not torch.equal(adaptive, plain)
    assert torch.equal(attack(llava, images, targets, steps=2), plain)
    with pytest.raises(ModelError, match="training mode"):
        attack(copy.deepcopy(llava).train(), images, targets)


def test_a_model_with_several_encoders_is_attacked_at_one_of_them(manager):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.video = TinyEncoder(1), TinyEncoder(2)

    def claim(model):
        return [tiny_call(model.image), tiny_call(model.video)] if isinstance(model, Two) else None

    hooks.register(manager, plugin(fs_vision_call=claim), "two")
    model, images = Two().eval(), rand(1, 3, 8, 8)
    with pytest.raises(ModelError, match=r"2 vision encoders. Attack one: fs_plugins.vision_call\(model, encoder=0\)"):
        attack(model, images, steps=1)
    assert attack(fs_plugins.vision_call(model, encoder=1), images, steps=1).shape == images.shape


def test_an_ensemble_climbs_the_mean_and_sees_images_in_each_ones_size():
    small, large = tiny_call(TinyEncoder(1)), tiny_call(TinyEncoder(2))
    images, targets = rand(2, 3, 12, 12), rand(2, 3, 12, 12, seed=1)
    attacked = attack([small, large], images, targets, method="m-attack", steps=30, eps=0.2)
    assert attacked.shape == images.shape
    for call in (small, large):
        resized = [
            torch.nn.functional.interpolate(x, (8, 8), mode="bilinear", antialias=True)
            for x in (attacked, images, targets)
        ]
        assert (cosine(call, resized[0], resized[2]) > cosine(call, resized[1], resized[2])).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 16}, "did you mean 16/255"),
        ({"eps": 0}, "eps"),
        ({"eps": -0.1}, "eps"),
        ({"eps": float("nan")}, "eps"),
        ({"eps": True}, "eps"),
        ({"eps": 300}, r"must be in \(0, 1\], got 300$"),
        ({"norm": "l2", "eps": 0}, "l2 distance"),
        ({"norm": "l1"}, "norm must be one of"),
        ({"step_size": 0}, "step_size"),
        ({"step_size": 2}, "did you mean 2/255"),
        ({"norm": "l2", "step_size": -1}, "step_size"),
        ({"steps": 0}, "steps"),
        ({"draws": 0}, "draws"),
        ({"batch_size": 0}, "batch_size"),
        ({"names": ["a", "b"]}, "a key for each of 1 images, got 2"),
        ({"method": "pgd"}, "The attacks are: attackvlm, m-attack, foa, square"),
        ({"method": "square", "norm": "l2"}, "searches l-inf balls, and the norm is 'l2'"),
        ({"method": "square", "step_size": 0.1}, "no step_size; leave it out"),
        ({"targets": torch.rand(2, 3, 8, 8)}, r"must both be \(B, C, H, W\)"),
        ({"images": torch.rand(1, 3, 8, 8) * 3 - 1}, "images must be in .*Undo the model's normalisation"),
        ({"targets": torch.rand(1, 3, 8, 8) * 3 - 1}, "targets must be in .*Undo the model's normalisation"),
    ],
)
def test_bad_settings_are_refused(options, message):
    given = {"method": "m-attack", "images": torch.rand(1, 3, 8, 8), "targets": torch.rand(1, 3, 8, 8), **options}
    with pytest.raises(SettingError, match=message):
        attack(tiny_call(TinyEncoder()), given.pop("images"), given.pop("targets"), **given)


def test_what_is_no_encoder_is_refused():
    with pytest.raises(ModelError, match=r"a VisionCall \(fs_plugins.vision_call\(model\)\).*got str"):
        victims("llava")
    with pytest.raises(ModelError, match="No adapter claims"):
        victims(nn.Linear(1, 1).eval())
    with pytest.raises(ModelError, match="at least one"):
        victims([])
