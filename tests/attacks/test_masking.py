"""Whether gradients are honest."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from support import TinyEncoder, make_psm, randomise, tiny_call
from tiny import rand, smoother
from torch import Tensor, nn

import fs_plugins
from fs_plugins import ModelError, PixelSpace, Readout, SettingError
from fs_plugins.answers import Classes
from fs_plugins.attacks import check_gradients
from fs_plugins.attacks.masking import effort
from fs_plugins.smoothing import FeatureSmoother
from fs_plugins.vision import Field


class Rounder(nn.Module):
    """A purifier that lets a thousandth of the gradient through, and that in the wrong direction."""

    def forward(self, images, sigma):
        return images.detach() - 1e-3 * (images - images.detach())


def report_of(purifier, head=None, **changes):
    call = tiny_call(TinyEncoder())
    psm = None
    if purifier is not None:
        psm = make_psm(call, mapper=False, sigma=0.05)
        psm.purifier = purifier.eval()
    through = FeatureSmoother(call, psm=psm, sigma=0.05, n0=2, seed=0)
    images, targets = rand(6, 3, 8, 8), rand(6, 3, 8, 8, seed=1)
    if head is not None:
        changes["answers"] = Classes(call, head)
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


def test_a_defence_without_gradients_is_told_so(head):
    class Cut(nn.Module):
        def forward(self, images, sigma):
            return images.detach()

    report = report_of(Cut(), head, steps=2, queries=2)
    (problem,) = report.problems
    assert "No gradient reaches the pixels" in problem
    for some in (report.attacks, report.answers):
        assert [one.name for one in some] == ["no attack", "oblivious", "gradient-free"]


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


@pytest.fixture
def head():
    return randomise(nn.Linear(24, 3, bias=False), 2.0)


def test_attacks_on_answers_must_be_ordered_too(head):
    fewer = {"steps": 12, "queries": 30}
    honest = report_of(None, head, **fewer)
    margins = {one.name: one.mean for one in honest.answers}
    assert honest.problems == ()
    assert margins["no attack"] < margins["gradient-free"] < margins["adaptive"] + 0.1
    assert margins["attack on features"] < margins["adaptive"]
    masked = report_of(Rounder(), head, **fewer)
    assert "The adaptive attack on the answer is weaker than a gradient-free search." in masked.problems
    assert "The adaptive attack on the answer is weaker than the oblivious one." in masked.problems


def test_each_image_is_asked_by_its_name_and_all_work_is_told(head):
    class Asked(Classes):
        keys: ClassVar[list] = []

        def given(self, output, keys):
            Asked.keys.append(tuple(keys))
            return super().given(output, keys)

    call, told = tiny_call(TinyEncoder()), []
    settings = {"steps": 5, "queries": 3, "batch_size": 2, "names": ["a", "b", "c"], "advance": told.append}
    pictures = rand(3, 3, 8, 8), rand(3, 3, 8, 8, seed=1)
    bare = FeatureSmoother(call, psm=None, sigma=0.25, n0=1)
    report = check_gradients(bare, *pictures, answers=Asked(call, head), **settings)
    assert set(Asked.keys) == {("a", "b"), ("c",)}
    assert sum(told) == effort(3, steps=5, queries=3, answers=True)
    assert len(report.answers) == 6
    with pytest.raises(SettingError, match="a key for each of 3 images"):
        check_gradients(bare, *pictures, names=["a"])


class Stubborn(nn.Module):
    """(B, 3, 8, 8) -> {"tokens": (B, 2)}: whether a picture is bright, which is nearly all of the feature and which no
    small change moves, and a small pattern in its last channel.
    """

    def __init__(self) -> None:
        super().__init__()
        signs = torch.tensor([1.0, -1.0], dtype=torch.float32, device="cpu").repeat(32).view(8, 8)
        self.pattern = nn.Parameter(signs / 64)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        bright = torch.tanh(6 * (pixel_values[:, :2].mean((1, 2, 3)) - 0.5))
        small = (pixel_values[:, 2] * self.pattern).sum((1, 2))
        return {"tokens": torch.stack([10 * bright, small], 1)}


def planted():
    """A defence whose features hold and whose answers do not; images, targets of the same answer, and the answers."""
    encoder = Stubborn().eval()
    call = tiny_call(
        encoder,
        pixels=PixelSpace((0.0,) * 3, (1.0,) * 3),
        readouts=(Readout("tokens", (Field("tokens", 0),), width=2),),
    )
    images, kinds = rand(8, 3, 8, 8) * 0.1, torch.arange(8, dtype=torch.int64, device="cpu")
    images[:, :2] += 0.7 - 0.5 * (kinds % 2).view(-1, 1, 1, 1)
    images[:, 2] = 0.5 + 0.04 * (kinds // 2 % 2 * 2 - 1).view(-1, 1, 1) * 64 * encoder.pattern.detach()
    targets = images.clone()
    targets[:, :2] = 1 - images[:, :2]
    read = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        read.weight.copy_(torch.tensor([[0.0, 100.0], [0.0, -100.0]], dtype=torch.float32, device="cpu"))
    pipeline = FeatureSmoother(call, psm=None, sigma=0.05, n0=2, seed=0)
    return pipeline, images, targets, Classes(call, read)


def test_a_defence_that_only_resists_attacks_on_features_is_found_out_by_its_answers():
    pipeline, images, targets, answers = planted()
    options = {"eps": 0.1, "steps": 12, "draws": 1, "queries": 12}
    without = check_gradients(pipeline, images, targets, **options)
    assert without.problems == without.answers == ()
    assert {one.name: one.success for one in without.attacks}["adaptive"] == 0
    report = check_gradients(pipeline, images, targets, answers=answers, **options)
    assert report.attacks == without.attacks
    assert report.problems == (
        "Features hold, answers do not: the attack on the answer breaks 100% of the images, the one on features 0%. "
        "Judge this defence by its answers.",
    )
    turned = {one.name: one for one in report.answers}
    assert list(turned) == [
        "no attack", "oblivious", "gradient-free", "adaptive, a quarter", "adaptive", "attack on features"
    ]  # fmt: skip
    assert (turned["no attack"].success, turned["attack on features"].success) == (0, 0)
    assert turned["adaptive"].turned == (True,) * 8
    assert "answer: adaptive             success 100.0%" in str(report)
