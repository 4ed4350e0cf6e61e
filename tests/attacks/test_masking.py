"""Whether gradients are honest."""

from __future__ import annotations

import pytest
from support import TinyEncoder, make_psm, tiny_call
from tiny import rand, smoother
from torch import nn

import fs_plugins
from fs_plugins import ModelError, SettingError
from fs_plugins.attacks import check_gradients
from fs_plugins.smoothing import FeatureSmoother


class Rounder(nn.Module):
    """A purifier that lets a thousandth of the gradient through, and that in the wrong direction."""

    def forward(self, images, sigma):
        return images.detach() - 1e-3 * (images - images.detach())


def report_of(purifier, **changes):
    call = tiny_call(TinyEncoder())
    psm = None
    if purifier is not None:
        psm = make_psm(call, mapper=False, sigma=0.05)
        psm.purifier = purifier.eval()
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
