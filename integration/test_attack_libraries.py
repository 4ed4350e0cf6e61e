"""Attack libraries climb through an enabled model as through any other: torchattacks and foolbox."""

from __future__ import annotations

import pytest
import torch
from support import Classifier, make_clip
from torch import nn
from torch.nn.functional import normalize

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


def of_a_chat_model():
    model = Classifier().eval()
    return model, model.llava


def of_clip():
    """As ``zero_shot`` gives it, and ten random texts."""
    clip = make_clip()
    return fs_plugins.zero_shot(clip, normalize(torch.randn(10, 24, generator=torch.Generator().manual_seed(2)))), clip


@pytest.mark.parametrize("build", [of_a_chat_model, of_clip])
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
def test_an_attack_climbs_and_each_of_its_steps_is_smoothed(attack, build):
    model, enabled = build()
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = model(images).argmax(1)
    loss = nn.CrossEntropyLoss()
    with fs_plugins.enable(enabled, psm=None, sigma=0.25, n0=4, noise_scope="image", seed=1) as handle:
        attacked = attack(model, images, labels)
        assert handle.status().vision[0].calls >= STEPS
        assert (attacked - images).abs().max() <= EPS + 1e-6
        with torch.no_grad():
            assert loss(model(attacked), labels) > loss(model(images), labels)
