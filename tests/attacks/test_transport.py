"""FOA-Attack's clusters of tokens, and their transport."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny import randn

from fs_plugins.attacks import METHODS
from fs_plugins.attacks.transport import centres, transported
from fs_plugins.attacks.victim import Seen


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
