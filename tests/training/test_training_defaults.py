"""A training follows from its settings, not from torch's default type and device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_trainings import Blobs, config, flat
from support import DEFAULTS, TinyEncoder, default, tiny_call

from fs_plugins.training import Stage, train_psm
from fs_plugins.training.ablate import ablate

pytestmark = pytest.mark.usefixtures("one_road_through_attention")
SHORT = Stage(steps=2, batch_size=4, draws=2)
TRAINING = config(purifier_stage=replace(SHORT, ema=0.9), mapper_stage=SHORT, sigma_range=(0.2, 0.3))


@pytest.mark.parametrize("what", DEFAULTS, ids=str)
def test_a_training_gives_the_same_weights_under_every_default(what):
    call, images = tiny_call(TinyEncoder()), Blobs(8)
    wanted = train_psm(call, images, TRAINING, name="t", encoder="e")
    with default(what):
        found = train_psm(call, images, TRAINING, name="t", encoder="e")
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in found.parameters())
    assert torch.equal(flat(found), flat(wanted))


@pytest.mark.parametrize("what", DEFAULTS, ids=str)
def test_an_ablation_is_the_same_under_every_default(what):
    call, images = tiny_call(TinyEncoder()), Blobs(8)
    wanted = list(ablate(call, images, images.images[:2], TRAINING))
    with default(what):
        assert list(ablate(call, images, images.images[:2], TRAINING)) == wanted
