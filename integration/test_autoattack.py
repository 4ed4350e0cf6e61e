"""AutoAttack's own code through a defence, as the suite autoattack runs it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support import make_clip
from torch.nn.functional import normalize

import fs_plugins
from fs_plugins.evaluation.autoattack import Scorer
from fs_plugins.hf.zeroshot import ZeroShot

pytest.importorskip("pyautoattack")
NAMES = ("circle", "square", "star", "ring")


def test_it_turns_classes_inside_its_ball_and_leaves_what_it_cannot_turn():
    clip = make_clip().requires_grad_(False)
    directions = normalize(torch.randn(4, 24, generator=torch.Generator().manual_seed(2)), dim=-1)
    subject = ZeroShot(clip, dict(zip(NAMES, directions, strict=True)))
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    (pipeline,) = fs_plugins.smoothers(clip, psm=None, sigma=0.02, n0=1)
    embedded = subject.call.embed(subject.call.encode(images))
    samples = [SimpleNamespace(label=NAMES[i]) for i in subject.scores(embedded).argmax(1)]
    scorer = Scorer(subject, SimpleNamespace(classes=NAMES))
    attacked = scorer.attack(pipeline, images, samples, eps=0.5, seed=0, batch_size=3)
    far = (attacked - images).abs().flatten(1).amax(1)
    assert (far <= 0.5 + 1e-6).all()
    after = subject.scores(subject.call.embed(subject.call.encode(attacked))).argmax(1)
    turned = [NAMES[i] != sample.label for i, sample in zip(after, samples, strict=True)]
    assert any(turned)
    assert all(moved > 0 for moved, one in zip(far.tolist(), turned, strict=True) if one)
