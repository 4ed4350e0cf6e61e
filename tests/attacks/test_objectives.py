"""What attacks climb: similarities of features, seen plain or through a smoother."""

from __future__ import annotations

import pytest
import torch
from support import TinyEncoder, make_psm, tiny_call
from tiny import cosine, rand, randn, smoother

import fs_plugins
from fs_plugins import ModelError, Readout
from fs_plugins.attacks import METHODS, Method, attack
from fs_plugins.attacks.victim import Stream, Victim
from fs_plugins.smoothing import FeatureSmoother
from fs_plugins.vision import Field


def test_the_pooled_feature_is_the_mean_of_what_is_consumed_or_the_embedding():
    encoder = TinyEncoder()
    images, stream = rand(2, 3, 8, 8), Stream((0,), (0, 1))
    tokens = tiny_call(encoder).encode(images)["tokens"]
    seen = Victim(tiny_call(encoder)).see(images, stream)
    assert torch.equal(seen.tokens, tokens)
    assert torch.equal(seen.embedding, tokens.flatten(1))
    assert torch.allclose(seen.pooled, tokens.mean(1))
    without = Readout("tokens", (Field("tokens", 0),), width=6, tokens=3, skip=1)
    seen = Victim(tiny_call(encoder, readouts=(without,))).see(images, stream)
    assert torch.allclose(seen.pooled, tokens[:, 1:].mean(1)), "the class token is not consumed"
    assert torch.equal(seen.tokens, tokens[:, 1:])
    extra = Readout("extra", (Field("extra", 1),), width=2)
    seen = Victim(tiny_call(encoder, readouts=(extra,))).see(images, stream)
    assert torch.equal(seen.pooled, seen.embedding)
    assert seen.tokens is None


@pytest.mark.parametrize("method", list(METHODS))
def test_every_adaptive_attack_goes_through_purifier_and_mapper(llava, method):
    call = fs_plugins.vision_call(llava.requires_grad_(False))
    whole = make_psm(call)
    slopes = []
    for psm in (whole, whole.only(mapper=False), whole.only(purifier=False)):
        through = FeatureSmoother(call, psm=psm, sigma=0.25, n0=2)
        objective = METHODS[method].objective([Victim(through)], rand(1, 3, 16, 16, seed=1), Stream((0,), ("a",)), 1)
        image = rand(1, 3, 16, 16).requires_grad_(True)
        slopes += torch.autograd.grad(objective(image, 1, 0).sum(), image)
    assert not torch.allclose(slopes[0], slopes[1], rtol=1e-2)
    assert not torch.allclose(slopes[0], slopes[2], rtol=1e-2)


def test_foa_needs_tokens_and_finds_those_beside_a_pooled_vector(clip):
    extra = tiny_call(TinyEncoder(), readouts=(Readout("extra", (Field("extra", 1),), width=2),))
    with pytest.raises(ModelError, match=r"pooled vectors only.*M-Attack"):
        attack(extra, rand(1, 3, 8, 8), rand(1, 3, 8, 8, seed=1), method="foa", steps=1)
    images, targets = rand(1, 3, 16, 16), rand(1, 3, 16, 16, seed=1)
    call = fs_plugins.vision_call(clip)
    attacked = attack(call, images, targets, method="foa", steps=10)
    assert cosine(call, attacked, targets) > cosine(call, images, targets)


def test_the_adaptive_attack_differentiates_noise_purifier_encoder_mapper_and_average():
    call = tiny_call(TinyEncoder())
    torch.manual_seed(4)  # of the PSM's weights: some are curved so much that single precision sees no slope
    through = smoother(call, n0=3)
    aims, stream = rand(1, 3, 8, 8, seed=1), Stream((0,), ("a",))
    objective = METHODS["attackvlm"].objective([Victim(through)], aims, stream, 1)
    image = rand(1, 3, 8, 8).requires_grad_(True)
    (slope,) = torch.autograd.grad(objective(image, 1, 0).sum(), image)
    for direction in (slope, randn(1, 3, 8, 8, seed=2)):  # a PSM works in single precision, so steps are not small
        step = 0.01 * direction / direction.norm()
        with torch.no_grad():
            rise = (objective(image + step, 1, 0) - objective(image - step, 1, 0)) / 2
        assert (slope * step).sum().item() == pytest.approx(rise.item(), rel=0.01, abs=1e-6)
    values = [objective(image, step, draw).item() for step, draw in ((1, 0), (1, 0), (1, 1), (2, 0))]
    assert values[0] == values[1], "the same draw repeats itself"
    assert len(set(values)) == 3, "every step and every draw has noise of its own"


def test_a_frugal_backward_pass_computes_again_and_gives_the_same_gradient():
    encoder = TinyEncoder()
    through = smoother(tiny_call(encoder), n0=4, chunk_size=2)
    stream, slopes = Stream((0,), (0, 1)), []
    for frugal, runs in ((False, 2 * 2), (True, 2 * 2 * 2)):
        image = rand(2, 3, 8, 8).requires_grad_(True)
        encoder.seen.clear()
        served = through.call.embed(through.call.features(through.look(image, source=stream, frugal=frugal)))
        slopes += torch.autograd.grad(served.square().sum(), image)
        assert len(encoder.seen) == runs
    assert torch.allclose(slopes[0], slopes[1], atol=1e-6)


def test_foa_weighs_surrogates_by_how_slowly_they_gave_way():
    class Steady:
        """Sees (B, 1) numbers; its similarity at step t is ``scores[t]`` for every image."""

        call = tiny_call(TinyEncoder())

        def __init__(self, *scores):
            self.scores = iter(scores)

        def see(self, images, stream):
            return next(self.scores) + 0 * images.flatten(1).sum(1)

        def see_plain(self, images):
            return None

    method = Method("probe", lambda one, other: one, dynamic=True, top=1.2)
    for sign, losses in ((1, [(0.7, 0.3), (0.8, 0.7)]), (-1, [(1.7, 2.1), (1.6, 1.7)])):
        two = [Steady(0.5, 0.9), Steady(0.4, 0.5)]
        objective = method.objective(two, torch.zeros(1, 1), Stream((0,), (0,)), sign)
        images = torch.zeros(1, 1)
        assert objective(images, 1, 0).item() == pytest.approx(sign * 0.45), "at first all count alike"
        ratios = torch.tensor([now / former for former, now in losses])
        weights = 2 * torch.softmax(ratios, 0)
        assert objective(images, 2, 0).item() == pytest.approx(sign * (weights @ torch.tensor([0.9, 0.5]) / 2).item())
        slower = 1 if sign == 1 else 0
        assert weights.argmax() == slower, "what gave way more slowly counts more"
