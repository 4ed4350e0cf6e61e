"""Attack libraries climb through an enabled model as through any other: torchattacks and foolbox."""

from __future__ import annotations

import pytest
import torch
from support import Classifier
from torch import nn

import fs_plugins

torchattacks = pytest.importorskip("torchattacks")
foolbox = pytest.importorskip("foolbox")
EPS, STEPS = 8 / 255, 5


def by_torchattacks(name, **settings):
    def attacked(model, images, labels):
        return getattr(torchattacks, name)(model, eps=EPS, steps=STEPS, **settings)(images, labels)

    return attacked


def by_foolbox(model, images, labels):
    attack = foolbox.attacks.LinfProjectedGradientDescentAttack(steps=STEPS, random_start=False)
    return attack(foolbox.PyTorchModel(model, bounds=(0, 1)), images, labels, epsilons=EPS)[1]


@pytest.mark.parametrize(
    "attack",
    [
        by_torchattacks("PGD", random_start=False),
        by_torchattacks("EOTPGD", random_start=False, eot_iter=2),
        by_torchattacks("MIFGSM"),
        by_foolbox,
    ],
    ids=["PGD", "EOTPGD", "MIFGSM", "foolbox"],
)
def test_an_attack_climbs_and_each_of_its_steps_is_smoothed(attack):
    model = Classifier().eval()
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = model(images).argmax(1)
    loss = nn.CrossEntropyLoss()
    with fs_plugins.enable(model.llava, psm=None, sigma=0.25, n0=4, noise_scope="image", seed=1) as handle:
        attacked = attack(model, images, labels)
        assert handle.status().vision[0].calls >= STEPS
        assert (attacked - images).abs().max() <= EPS + 1e-6
        with torch.no_grad():
            assert loss(model(attacked), labels) > loss(model(images), labels)
