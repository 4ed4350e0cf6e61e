"""The losses' terms are those of the paper."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_trainings import Blobs, config
from support import make_psm
from torch import nn

from fs_plugins.psm import Part, ResidualMapper
from fs_plugins.training import Stage, losses, train_psm
from fs_plugins.training import psm as training
from fs_plugins.training.stages import MapperTerms, PurifierTerms


def test_consistency_is_one_minus_the_mean_cosine():
    a = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    b = torch.tensor([[0.0, 2.0], [3.0, 4.0]])
    assert losses.consistency(a, b).item() == pytest.approx(1 - (0 + 1) / 2)


def test_reconstruction_is_the_mean_l2_norm():
    clean = torch.zeros(2, 1, 1, 2)
    purified = torch.tensor([[[[3.0, 4.0]]], [[[0.0, 1.0]]]])
    assert losses.reconstruction(purified, clean).item() == pytest.approx((5 + 1) / 2)


def test_statistics_compare_moments_per_channel():
    mapped = torch.tensor([[[1.0, 0.0], [3.0, 0.0]]])
    clean = torch.tensor([[[0.0, 2.0], [0.0, 4.0]]])
    # channel 0: means 2, 0; deviations 1, 0. channel 1: means 0, 3; deviations 0, 1.
    assert losses.statistics(mapped, clean).item() == pytest.approx(((4 + 1) + (9 + 1)) / 2)


def test_statistics_ignore_which_token_is_which():
    z = torch.randn(4, 5, 3)
    shuffled = z.flatten(0, 1)[torch.randperm(20)].view(4, 5, 3)
    assert losses.statistics(shuffled, z).item() == pytest.approx(0, abs=1e-10)
    assert losses.statistics(z[:, 0], z[:, 0] + 1).item() == pytest.approx(1, rel=1e-5)


def test_statistics_of_a_batch_in_two_parts_need_the_moments_of_the_whole():
    """What two processes exchange: here the other one's means are known beforehand."""
    z = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    clean = z.roll(1, -1) * 2 + 1
    others = [part.flatten(0, 1) for part in (z[2:], clean[2:])]
    other = iter([f(part) for part in others for f in (lambda p: p.mean(0), lambda p: p)])

    means: list[torch.Tensor] = []

    def average(mean):
        theirs = next(other)
        if theirs.ndim > 1:  # the second moment, around the mean of both
            theirs = (theirs - means[-1]).square().mean(0)
        means.append((mean + theirs) / 2)
        return means[-1]

    spread = losses.statistics(z[:2], clean[:2], average)
    assert spread.item() == pytest.approx(losses.statistics(z, clean).item(), rel=1e-5)
    assert spread.item() != pytest.approx(losses.statistics(z[:2], clean[:2]).item(), rel=1e-2)


def test_statistics_of_a_constant_channel_have_a_gradient():
    z = torch.ones(2, 3, 4, requires_grad=True)
    losses.statistics(z, torch.randn(2, 3, 4)).backward()
    assert z.grad.isfinite().all()


def test_identity_is_the_mean_squared_norm_and_idle_for_the_papers_mapper():
    assert losses.identity(torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]])).item() == pytest.approx(2.5)
    z = torch.randn(3, 4, 8)
    assert losses.identity(ResidualMapper(8)(z, 0.0) - z).item() == 0


class Denoiser(nn.Module):
    """A purifier that takes a share of the image's difference to grey off, and has a denoising loss."""

    def __init__(self, share: float = 0.5) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.tensor(share))
        self.seen: list[tuple] = []

    def forward(self, images, sigma):
        return images - self.share * (images - 0.5)

    def denoising_loss(self, clean, noise, level):
        self.seen.append((clean.shape, noise.shape, level))
        return (self.share - 0.75).square()


def fake_batch(count: int = 3, draws: int = 2):
    generator = torch.Generator().manual_seed(5)
    clean = Blobs(count).images
    return (
        clean,
        torch.randn(count, draws, *clean.shape[1:], generator=generator),
        torch.rand(count, generator=generator),
    )


def test_the_purifiers_terms_are_those_of_the_paper(call):
    psm = make_psm(call)
    psm.purifier = Denoiser()
    clean, noise, level = fake_batch()
    terms = PurifierTerms(psm, call, 1)(clean, noise, 0.25, level)
    cosines, norms = [], []
    for image, draws in zip(clean, noise, strict=True):
        z = call.embed(call.encode(image[None]))
        for e in draws:
            purified = image + 0.25 * e - 0.5 * (image + 0.25 * e - 0.5)
            cosines.append(torch.cosine_similarity(call.embed(call.encode(purified[None])), z).item())
            norms.append((purified - image).norm().item())
    assert terms["l_rb"].item() == pytest.approx(1 - sum(cosines) / 6, rel=1e-5)
    assert terms["l_mse"].item() == pytest.approx(sum(norms) / 6, rel=1e-5)
    assert terms["l_diff"].item() == pytest.approx((0.5 - 0.75) ** 2)
    assert psm.purifier.seen[0][:2] == (clean.shape, clean.shape)
    assert torch.equal(psm.purifier.seen[0][2], level)


def test_the_mappers_terms_are_those_of_the_paper(call):
    psm = make_psm(call)
    clean, noise, level = fake_batch()
    terms = MapperTerms(psm, call, 1)(clean, noise, 0.25, level)
    noisy = torch.cat([image + 0.25 * draws for image, draws in zip(clean, noise, strict=True)])
    z = call.encode(psm.purify(noisy, 0.25))["tokens"]
    mapped, plain = psm.map("tokens", z, 0.25), call.encode(clean)["tokens"]
    cosines = torch.cosine_similarity(mapped.flatten(1), plain.flatten(1).repeat_interleave(2, 0))
    assert terms["l_rb"].item() == pytest.approx(1 - cosines.mean().item(), rel=1e-5)
    assert terms["l_stats"].item() == pytest.approx(losses.statistics(mapped, plain).item(), rel=1e-5)
    assert terms["l_id"].item() == 0


def test_the_denoising_loss_is_minimised_where_a_purifier_has_one(call, monkeypatch):
    monkeypatch.setattr(training, "plugin_parts", lambda: {"purifiers": {"half": Denoiser}, "mappers": {}})
    stage = Stage(steps=150, batch_size=4, draws=1, lr=0.02, warmup=1)
    own = config(purifier=Part(kind="half"), purifier_stage=stage, mapper=None, lambda1=0.0, lambda2=0.0)
    assert train_psm(call, Blobs(8), own, name="t", encoder="e").purifier.share.item() == pytest.approx(0.75, abs=0.01)
    without = train_psm(call, Blobs(8), replace(own, lambda_diff=0.0), name="t", encoder="e")
    assert without.purifier.share.item() == pytest.approx(0.5, abs=0.03)  # weight decay alone
