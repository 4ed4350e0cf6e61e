"""What a plugin's purifiers and mappers get when they have the methods, whatever their classes."""

from __future__ import annotations

import torch
from support import make_psm
from torch import nn

from fs_plugins.psm import PAPER_UNET, Part, ResidualMapper, UNetPurifier
from fs_plugins.psm.diffusion import DiffusionPurifier
from fs_plugins.psm.lora import LoRAPurifier
from fs_plugins.psm.protocols import Calibrates, Denoises, Mapper, Purifier
from fs_plugins.training import Stage, TrainingConfig, train_psm
from fs_plugins.training import psm as training
from fs_plugins.training.ablate import ablate


class Grey(nn.Module):
    """A stranger's purifier with a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.tensor(0.5))

    def forward(self, images, sigma):
        return images - self.share * (images - 0.5)

    def denoising_loss(self, clean, noise, level):
        return (self.share - 0.75).square() * clean.mean()


class Gain(nn.Module):
    """A stranger's mapper that begins at the features' own scale."""

    calibrated: tuple = ()

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(width))

    def forward(self, z, sigma):
        return z + sigma * self.gain

    def calibrate(self, z, sigma):
        type(self).calibrated = (tuple(z.shape), sigma)


class Blobs:
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index):
        return torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(index))


def own(steps: int = 1) -> TrainingConfig:
    stage = Stage(steps=steps, batch_size=4, draws=1, lr=1e-3, warmup=1)
    return TrainingConfig(
        purifier=Part(kind="grey"), mapper=Part(kind="gain"), purifier_stage=stage, mapper_stage=stage
    )


def strangers(monkeypatch) -> None:
    monkeypatch.setattr(training, "plugin_parts", lambda: {"purifiers": {"grey": Grey}, "mappers": {"gain": Gain}})


def test_parts_are_what_they_can_do():
    with torch.device("meta"):
        unet = UNetPurifier(**PAPER_UNET)
    assert isinstance(unet, Purifier)
    assert not isinstance(unet, Denoises)
    assert isinstance(ResidualMapper(8), Mapper)
    assert isinstance(ResidualMapper(8), Calibrates)
    assert all(issubclass(kind, Denoises) for kind in (DiffusionPurifier, LoRAPurifier, Grey))
    assert isinstance(Grey(), Purifier)
    assert isinstance(Gain(3), Mapper)
    assert isinstance(Gain(3), Calibrates)
    assert not isinstance(object(), Purifier | Mapper)


def test_a_strangers_mapper_is_calibrated_on_noisy_features(call, monkeypatch):
    strangers(monkeypatch)
    train_psm(call, Blobs(), own(), name="t", encoder="e")
    assert Gain.calibrated == ((8, 4, 6), 0.25)


def test_a_strangers_denoising_loss_is_minimised_and_left_out_in_an_ablation(call, monkeypatch):
    strangers(monkeypatch)
    logged: list[dict] = []
    train_psm(call, Blobs(), own(), name="t", encoder="e", report=lambda *told: logged.append(told[3]))
    assert "l_diff" in logged[0]
    held = torch.stack([Blobs()[i] for i in range(2)])
    trials = list(ablate(call, Blobs(), held, own()))
    assert ("purifier", "l_diff") in [(trial.stage, trial.without) for trial in trials]


def test_the_road_of_training_is_the_smoothers(call):
    """Its noise level is an argument: what is trained at another one is what would be served at it."""
    from fs_plugins.smoothing import FeatureSmoother
    from fs_plugins.training.stages import MapperTerms

    psm = make_psm(call)
    terms = MapperTerms(psm, call, 1)
    images = torch.stack([Blobs()[i] for i in range(2)])
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    drawn = terms.road.draw(images, noise, 0.25)
    served = FeatureSmoother(call, psm=psm, sigma=0.25).draw(images, noise)
    assert all(torch.equal(value, served[name]) for name, value in drawn.items())
