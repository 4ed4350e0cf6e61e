"""What one would pick instead: what each transformation does, its gradient, its table; and answers that vote."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import median_filter

import fs_plugins
from fs_plugins import PSM, PSMError, SettingError
from fs_plugins.evaluation import Results
from fs_plugins.evaluation.defended import options
from fs_plugins.evaluation.plan import Setup
from fs_plugins.evaluation.rivals import (
    JPEG,
    TRANSFORMATIONS,
    BitDepth,
    MedianFilter,
    TotalVariation,
    divergence,
    gradient,
    transformation,
)
from fs_plugins.evaluation.subjects import Headed
from fs_plugins.evaluation.suites import FS, FS_PSM, NONE, RIVALS, SUITES, Defence, Smoothing, Suite, chosen
from fs_plugins.evaluation.tables import title_of
from fs_plugins.plugins import plugin_parts


def pictures(*shape, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def variation(images):
    return torch.stack(gradient(images)).norm(dim=0).sum()


@pytest.mark.parametrize("quality", [50, 75])
def test_jpeg_is_pillows(quality):
    images = pictures(2, 3, 12, 20) * 1.2 - 0.1
    for given, served in zip(images, JPEG(quality)(images, 0.0), strict=True):
        file = io.BytesIO()
        eight = np.rint(given.clamp(0, 1).permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        Image.fromarray(eight).save(file, "JPEG", quality=quality)
        wanted = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255
        assert torch.equal(served, wanted)
        assert not torch.equal(served, given)


def test_bit_depth_has_exactly_its_levels():
    served = BitDepth(3)(pictures(1, 3, 32, 32) * 1.2 - 0.1, 0.0)
    assert torch.equal(served.unique(), torch.arange(8) / 7)
    levels = (torch.arange(8) / 7).view(1, 1, 1, 8).expand(1, 3, 1, 8)
    assert torch.equal(BitDepth(3)(levels, 0.0), levels)
    assert BitDepth(1)(torch.tensor([0.0, 0.49, 0.51, 1.0]), 0.0).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("part", [JPEG(75), BitDepth(3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_has_no_gradient_hands_it_straight_through(part, dtype):
    images, wanted = pictures(2, 3, 8, 8, dtype=dtype).requires_grad_(), torch.randn(2, 3, 8, 8, dtype=dtype)
    served = part(images, 0.0)
    assert served.dtype == dtype
    served.backward(wanted)
    assert torch.equal(images.grad, wanted)


def test_median_is_scipys_and_its_gradient_that_of_the_median_pixel():
    images = pictures(2, 3, 7, 9)
    wanted = median_filter(images.numpy(), size=(1, 1, 3, 3), mode="nearest")
    assert torch.equal(MedianFilter(3)(images, 0.0), torch.from_numpy(wanted))
    speck = torch.zeros(1, 3, 5, 5)
    speck[..., 2, 2] = 1
    assert not MedianFilter(3)(speck, 0.0).any()
    values = torch.tensor([[0.1, 0.9, 0.3], [0.8, 0.7, 0.2], [0.4, 0.6, 0.5]])
    known = values.expand(1, 3, 3, 3).clone().requires_grad_()
    MedianFilter(3)(known, 0.0)[..., 1, 1].sum().backward()
    assert torch.equal(known.grad, (values == 0.5).float().expand(1, 3, 3, 3))


def test_total_variation_is_the_minimiser_where_it_is_known():
    flat = torch.full((1, 3, 6, 6), 0.3, dtype=torch.float64)
    assert torch.equal(TotalVariation(0.1)(flat, 0.0), flat)
    step = torch.full((1, 3, 6, 8), 0.2, dtype=torch.float64)
    step[..., 4:] = 0.8
    wanted = step + 0.1 / 4 * torch.tensor([1.0] * 4 + [-1.0] * 4)  # either side, four wide, gives way by weight / 4
    assert torch.allclose(TotalVariation(0.1, steps=300)(step, 0.0), wanted, atol=1e-6)
    assert torch.allclose(TotalVariation(0.1)(step, 0.0), wanted, atol=2e-3)


def test_total_variation_minimises_what_it_says():
    images = pictures(1, 3, 12, 12, dtype=torch.float64)
    found = TotalVariation(0.1, steps=1000)(images, 0.0)

    def cost(u):
        return ((u - images) ** 2).sum() / 2 + 0.1 * variation(u)

    assert variation(found) < variation(TotalVariation(0.01)(images, 0.0)) < variation(images)
    for seed in range(5):
        elsewhere = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert all(cost(found + length * elsewhere) > cost(found) for length in (1e-3, 0.1))
    p = gradient(pictures(1, 3, 12, 12, dtype=torch.float64))
    adjoint = -(divergence(*p) * images).sum()
    assert adjoint == pytest.approx(sum((a * b).sum().item() for a, b in zip(p, gradient(images), strict=True)))


def test_total_variation_is_that_of_others():
    restoration = pytest.importorskip("skimage.restoration")
    images = pictures(1, 3, 10, 10, dtype=torch.float64)
    theirs = restoration.denoise_tv_chambolle(images[0].numpy(), weight=0.1, eps=0, max_num_iter=2000, channel_axis=0)
    assert torch.allclose(TotalVariation(0.1, steps=500)(images, 0.0)[0], torch.from_numpy(theirs), atol=1e-4)


def test_total_variation_has_the_true_gradient():
    images = pictures(1, 3, 3, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda some: TotalVariation(0.1, steps=10)(some, 0.0), images)
    flat = torch.full((1, 3, 4, 4), 0.5, requires_grad=True)
    TotalVariation(0.1)(flat, 0.0).sum().backward()
    assert torch.allclose(flat.grad, torch.ones_like(flat)), "finite, and the mean of the picture is kept"


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: JPEG(96), "at most 95, got 96"),
        (lambda: MedianFilter(4), "must be odd, got 4"),
        (lambda: MedianFilter(33), "at most 31"),
        (lambda: BitDepth(0), ">= 1, got 0"),
        (lambda: TotalVariation(0.0), "must be > 0, got 0.0"),
        (lambda: TotalVariation(0.1, steps=10**6), "at most 1000"),
        (lambda: transformation("gif"), "no transformation 'gif'. There are: jpeg-75, jpeg-50"),
    ],
)
def test_what_cannot_be_is_refused_in_words(make, told):
    with pytest.raises(SettingError, match=told):
        make()


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_transformations_come_by_the_hook_and_are_saved_like_any_psm(manager, name, tmp_path):
    psm = transformation(name)
    assert not list(psm.state_dict())
    psm.save_pretrained(tmp_path / "psm")
    with pytest.raises(PSMError, match="Is the plugin that provides it installed"):
        PSM.from_pretrained(tmp_path / "psm")
    again = PSM.from_pretrained(tmp_path / "psm", **plugin_parts())
    assert again.config.structure == psm.config.structure
    images = pictures(2, 3, 8, 8)
    assert torch.equal(again.purify(images, 0.0), psm.purifier(images, 0.0))


def test_a_transformation_is_served_without_noise(llava, images):
    call = fs_plugins.vision_call(llava)
    [smoother] = fs_plugins.smoothers(llava, psm=transformation("bit-depth"), n0=1)
    assert smoother.sigma == 0
    found, wanted = (call.embed(one) for one in (smoother.smooth(images), call.encode(BitDepth(3)(images, 0.0))))
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.fixture
def subject(clip):
    """Three colours by a random head on what CLIP embeds, whose answers can be attacked."""
    head = torch.nn.Linear(24, 3)
    with torch.no_grad():
        head.weight.copy_(torch.randn(3, 24, generator=torch.Generator().manual_seed(2)))
        grey = torch.full((1, 3, 16, 16), 0.5)
        call = fs_plugins.vision_call(clip)
        head.bias.copy_(-head.weight @ call.embed(call.encode(grey))[0])  # no colour is ahead
    return Headed(clip.requires_grad_(False), head.requires_grad_(False), ["green", "blue", "red"])


def test_the_suite_names_defences_that_can_be_had(subject):
    setup = Setup(psm="none", sigma=0.5)
    for defence in RIVALS:
        told = options(subject, setup, defence.smoothing)
        assert told["n0"] == 1
        if isinstance(told["psm"], PSM):
            assert (told["psm"].config.name.replace("-", "_"), told["sigma"]) == (defence.name, 0)
        else:
            assert (told["psm"], told["sigma"]) == (None, 0.1)
    assert SUITES["rivals"] in chosen(["all"])
    assert SUITES["rivals"].defences == (NONE, *RIVALS, FS, FS_PSM)


def test_every_rival_is_attacked_through_itself(subject, start):
    suite = SUITES["rivals"]
    assert [title_of(condition) for condition in suite.conditions] == [
        "AttackVLM 16/255",
        "AttackVLM 16/255, adaptive",
        "attack on the answer 8/255, adaptive",
        "attack on the answer 16/255, adaptive",
    ]
    few = replace(suite, conditions=suite.conditions[1:3], plain=False, compared=False)
    evaluation = start(few, sigma=0.5, psm="none", adaptive_images=1)
    replace(evaluation, load=lambda tower: subject).run()
    [table] = Results(evaluation.store.folder).tables()
    cells = [(title_of(condition), defence.title, 1) for condition in few.conditions for defence in suite.defences]
    assert [row[:3] for row in table.rows] == cells
    made = {path.parent.name for path in (evaluation.store.folder / "attacked").glob("*/answer-8-adaptive")}
    assert made == {defence.name for defence in suite.defences}
    assert "single draws" in table.note


def test_the_most_frequent_reply_counts_and_of_those_as_frequent_the_first(start, monkeypatch):
    vote = Defence("vote", "vote", smoothing=Smoothing("none", n0=1, votes=5))
    evaluation = start(Suite("votes", "Votes", "classification", (vote,)), sigma=0.5, psm="none")
    said = iter(["2", "0", "1", "1", "0"] * 2 + ["2"] * 5)
    seeds = []

    def load(tower):
        painter = type(evaluation.load(tower))(evaluation.load.painters[-1].model)

        def reply(task, images, samples, dataset):
            [smoother] = [hook.smoother for hook in fs_plugins.patch.hooks_of(painter.model)[0]]
            seeds.append(smoother.source.seed)
            return [next(said)] * len(samples)

        painter.reply = reply
        return painter

    replace(evaluation, load=load).run()
    rows = evaluation.store.rows("vote/clean")
    assert [rows[f"{i}.png", "classification"]["reply"] for i in range(5)] == ["0", "0", "0", "0", "2"]
    assert seeds == [0, 1, 2, 3, 4] * 3


def test_votes_are_of_servings_of_their_own(subject, start):
    vote = Defence("vote", "vote", smoothing=Smoothing("none", n0=1, votes=3))
    evaluation = start(Suite("votes", "Votes", "classification", (vote, FS)), sigma=1.0, psm="none", seed=7, n0=1)
    replace(evaluation, load=lambda tower: subject).run()
    data = evaluation.plan.dataset
    images = torch.stack([data.image(sample, (16, 16)) for sample in data.samples])
    said = []
    for seed in (7, 8, 9):
        with fs_plugins.enable(subject.model, psm=None, sigma=1.0, n0=1, seed=seed, noise_scope="image"):
            said.append(subject.reply(None, images, data.samples, data))
    rows, single = evaluation.store.rows("vote/clean"), evaluation.store.rows("fs/clean")
    for place, sample in enumerate(data.samples):
        three = [replies[place] for replies in said]
        assert rows[sample.image, "classification"]["reply"] == max(three, key=three.count)
        assert single[sample.image, "classification"]["reply"] == three[0]
    assert len({tuple(replies) for replies in said}) > 1
