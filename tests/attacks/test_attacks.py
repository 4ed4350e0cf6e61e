from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TinyEncoder, make_psm, plugin, tiny_call
from torch import nn

import fs_plugins
from fs_plugins import ModelError, Readout, SettingError, hooks
from fs_plugins.attacks import METHODS, Ball, Crop, Method, ascend, attack, check_gradients, square
from fs_plugins.attacks.transport import centres, transported
from fs_plugins.attacks.victim import Seen, Stream, Victim, victims
from fs_plugins.noise import keyed
from fs_plugins.smoothing import FeatureSmoother
from fs_plugins.vision import Field


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def randn(*shape: int, seed: int = 0, **kwargs) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **kwargs)


def cosine(call, images, targets):
    return torch.cosine_similarity(call.embed(call.encode(images)), call.embed(call.encode(targets)), dim=-1)


def smoother(call, **changes):
    return FeatureSmoother(call, psm=make_psm(call), sigma=0.25, **{"n0": 2, "seed": 0, **changes})


def length(change):
    return change.flatten(1).norm(dim=1)


# The ball


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


@pytest.mark.parametrize(
    ("method", "norm", "eps"),
    [(name, "linf", 0.1) for name in METHODS] + [(name, "l2", 0.7) for name in METHODS if name != "square"],
)
@pytest.mark.parametrize("targeted", [True, False])
@pytest.mark.parametrize("adaptive", [True, False])
def test_every_attack_climbs_its_objective_in_its_ball_and_repeats_itself(method, targeted, norm, eps, adaptive):
    call = tiny_call(TinyEncoder())
    images, targets = rand(3, 3, 8, 8), rand(3, 3, 8, 8, seed=1)
    encoder = smoother(call) if adaptive else call
    aims = targets if targeted else None
    steps = {"steps": 60} if method == "square" else {"steps": 8, "step_size": eps / 3}
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
        before, after = (torch.stack([objective(x, step, 0) for step in range(12)]).mean(0) for x in (images, attacked))
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
    options = {"steps": 8, "seed": 3, "names": list("abcde")}
    whole = attack(encoder, images, targets, method=method, batch_size=5, **options)
    assert torch.allclose(attack(encoder, images, targets, method=method, batch_size=2, **options), whole, atol=1e-6)
    options["names"] = ["d"]
    alone = attack(encoder, images[3:4], targets[3:4], method=method, **options)
    assert torch.allclose(alone, whole[3:4], atol=1e-6)


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


# What is climbed


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


# Crops


@given(st.integers(4, 40), st.integers(4, 40), st.integers(0, 200))
def test_crops_lie_in_the_picture_and_obey_their_law(height, width, seed):
    crop = Crop()
    top, left, h, w = crop.box((height, width), keyed(seed))
    assert top >= 0
    assert left >= 0
    assert top + h <= height
    assert left + w <= width
    assert h >= 1
    assert w >= 1
    if height == width > 20:
        assert 0.5 - 3 / height <= h * w / (height * width) <= 0.9 + 3 / height
        assert 3 / 4 - 4 / height <= w / h <= 4 / 3 + 4 / height


def test_crops_are_cut_and_enlarged():
    image = rand(1, 3, 10, 10)
    top, left, h, w = Crop().box((10, 10), keyed(5, "a"))
    cut = Crop()(image, Stream((5,), ("a",)))
    expected = torch.nn.functional.interpolate(image[..., top : top + h, left : left + w], (10, 10), mode="bilinear")
    assert torch.equal(cut, expected)
    assert (h, w) != (10, 10)


# Clusters and their transport


def test_the_plan_is_pots_own():
    import ot

    source, target = randn(3, 10, 16), randn(3, 10, 16, seed=1)
    got = transported(source, target)
    for one, other, value in zip(source.double(), target.double(), got, strict=True):
        similar = torch.nn.functional.normalize(one, dim=-1) @ torch.nn.functional.normalize(other, dim=-1).T
        uniform = np.full(10, 0.1)
        plan = ot.sinkhorn(uniform, uniform, (1 - similar).numpy(), reg=0.1, numItermax=100, stopThr=1e-12)
        assert value.item() == pytest.approx((plan * similar.numpy()).sum(), abs=1e-4)


def test_sets_that_are_the_same_are_carried_onto_themselves():
    points = torch.eye(6)[None]
    # Every point to itself at cost 0, or to another at cost 1: each share is 1 / (1 + 5 exp(-10)).
    assert transported(points, points.flip(1)).item() == pytest.approx(1 / (1 + 5 * math.exp(-10)), abs=1e-5)


def test_clusters_far_apart_are_found_and_their_centres_are_means():
    middles = 10 * torch.eye(3, 4)
    tokens = torch.stack([middles[i % 3] + 0.1 * randn(4, seed=i) for i in range(12)])[None]
    found = centres(tokens, k=3)
    wanted = torch.stack([tokens[0, i::3].mean(0) for i in range(3)])
    order = torch.cdist(found[0], wanted).argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2]
    assert torch.allclose(found[0], wanted[order], atol=1e-6)


def test_clustering_agrees_with_scikit_learn_from_the_same_start():
    cluster = pytest.importorskip("sklearn.cluster")
    tokens = randn(1, 60, 5)
    start = tokens[0, [(2 * i + 1) * 60 // 20 for i in range(10)]].numpy()
    known = cluster.KMeans(10, init=start, n_init=1, max_iter=100, tol=0, algorithm="lloyd").fit(tokens[0].numpy())
    assert np.allclose(centres(tokens)[0].numpy(), known.cluster_centers_, atol=1e-5)


def test_an_image_is_clustered_alike_alone_and_in_company():
    tokens = randn(4, 30, 5)
    together = centres(tokens)
    assert all(torch.allclose(centres(tokens[i : i + 1])[0], together[i], atol=1e-6) for i in range(4))


def test_fewer_tokens_than_clusters_are_their_own_centres():
    tokens = randn(2, 4, 5)
    assert torch.allclose(centres(tokens), tokens, atol=1e-6)


def test_gradients_of_clusters_and_transport_are_those_of_finite_differences():
    tokens = (10 * torch.eye(3, 4).repeat(4, 1) + randn(12, 4)).double()[None].requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: centres(x, k=3), (tokens,))
    # The plan is held fixed, so the gradient is that of plan * similarity at this plan.
    source = randn(1, 5, 4).double().requires_grad_(True)
    target = randn(1, 5, 4, seed=1).double()
    (slope,) = torch.autograd.grad(transported(source, target).sum(), source)

    from ot.batch import solve_batch

    def similarity(x):
        return torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(target, dim=-1).mT

    fixed = solve_batch(
        1 - similarity(source.detach()), reg=0.1, max_iter=100, tol=0, method="log_sinkhorn", grad="detach"
    ).plan
    for place in ((0, 0, 0), (0, 2, 1), (0, 4, 3)):
        nudge = torch.zeros_like(source)
        nudge[place] = 1e-6
        rise = (
            (fixed * similarity(source.detach() + nudge)).sum() - (fixed * similarity(source.detach() - nudge)).sum()
        ) / 2e-6
        assert slope[place].item() == pytest.approx(rise.item(), abs=1e-6)


def test_foas_similarity_is_pooled_cosine_and_a_fifth_of_the_transport():
    one = Seen(randn(2, 8), randn(2, 4, seed=1), randn(2, 12, 4, seed=2))
    other = Seen(randn(2, 8, seed=3), randn(2, 4, seed=4), randn(2, 12, 4, seed=5))
    wanted = torch.cosine_similarity(one.pooled, other.pooled) + 0.2 * transported(
        centres(one.tokens), centres(other.tokens)
    )
    assert torch.allclose(METHODS["foa"].similarity(one, other), wanted)


# Without gradients


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
    psm.purifier = Cut()
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


# Masked gradients


class Rounder(nn.Module):
    """A purifier that lets a thousandth of the gradient through, and that in the wrong direction."""

    def forward(self, images, sigma):
        return images.detach() - 1e-3 * (images - images.detach())


def report_of(purifier, **changes):
    call = tiny_call(TinyEncoder())
    psm = None
    if purifier is not None:
        psm = make_psm(call, mapper=False, sigma=0.05)
        psm.purifier = purifier
    through = FeatureSmoother(call, psm=psm, sigma=0.05, n0=2, seed=0)
    images, targets = rand(6, 3, 8, 8), rand(6, 3, 8, 8, seed=1)
    return check_gradients(through, images, targets, **{"eps": 0.2, "steps": 24, "draws": 1, "queries": 60, **changes})


def test_an_honest_defence_passes_and_the_attacks_are_ordered():
    report = report_of(None)
    margins = {one.name: one.mean for one in report.attacks}
    assert margins["no attack"] < margins["adaptive, a quarter"] <= margins["adaptive"] + 0.02
    assert margins["gradient-free"] < margins["adaptive"] + 0.02
    assert margins["oblivious"] <= margins["adaptive"] + 0.02
    assert report.unbounded == 1
    assert report.problems == ()
    assert "Nothing speaks for masked gradients." in str(report)


def test_a_defence_with_wrong_gradients_is_found_out():
    report = report_of(Rounder())
    assert "The adaptive attack is weaker than a gradient-free search." in report.problems
    assert "The adaptive attack is weaker than the oblivious one." in report.problems
    assert "success" in str(report)


def test_a_defence_without_gradients_is_told_so():
    class Cut(nn.Module):
        def forward(self, images, sigma):
            return images.detach()

    report = report_of(Cut(), steps=2, queries=2)
    assert "No gradient reaches the pixels" in report.problems[0]
    assert [one.name for one in report.attacks] == ["no attack", "oblivious", "gradient-free"]


def test_one_image_compares_nothing():
    with pytest.raises(SettingError, match="at least two"):
        check_gradients(smoother(tiny_call(TinyEncoder())), rand(1, 3, 8, 8), rand(1, 3, 8, 8))


def test_what_is_no_defence_or_follows_no_gradient_is_not_tested(llava):
    images = rand(2, 3, 16, 16)
    with pytest.raises(ModelError, match=r"tests one defence.*nothing to test"):
        check_gradients(llava, images, images)
    (pipeline,) = fs_plugins.smoothers(llava, psm=None, sigma=0.25)
    with pytest.raises(ModelError, match="tests one defence"):
        check_gradients([pipeline, pipeline], images, images)
    with pytest.raises(SettingError, match="Square Attack follows no gradients"):
        check_gradients(pipeline, images, images, method="square")
    options = {"steps": 2, "queries": 2, "draws": 1}
    wanted = check_gradients(pipeline, images, images.flip(0), **options)
    with fs_plugins.enable(llava, psm=None, sigma=0.25):
        assert check_gradients(llava, images, images.flip(0), **options) == wanted


# Refusals


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
