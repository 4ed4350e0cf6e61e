from __future__ import annotations

import pytest
import torch
from conftest import TinyEncoder, tiny_call
from PIL import Image
from torch.utils.data import Dataset

from fs_plugins import PSM, SettingError
from fs_plugins.psm import Part, ResidualMapper
from fs_plugins.training import ImageFolder, Stage, TrainingConfig, losses, robustness_score, train_psm


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


def test_identity_is_the_mean_squared_norm_and_idle_for_the_papers_mapper():
    assert losses.identity(torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]])).item() == pytest.approx(2.5)
    z = torch.randn(3, 4, 8)
    assert losses.identity(ResidualMapper(8)(z, 0.0) - z).item() == 0


class Blobs(Dataset):
    """Smooth pictures: a denoiser has something to learn."""

    def __init__(self, count: int = 64) -> None:
        coarse = torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(0))
        self.images = torch.nn.functional.interpolate(coarse, size=8, mode="bilinear")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def config(**changes) -> TrainingConfig:
    settings = {
        "purifier": Part(kind="unet", args={"channels": [16, 16], "unshuffle": 2}),
        "mapper": Part(kind="residual", args={"heads": 2}),
        "purifier_stage": Stage(steps=80, batch_size=16, draws=2, lr=3e-3, warmup=5, ema=0.9),
        "mapper_stage": Stage(steps=60, batch_size=16, draws=2, lr=3e-3, warmup=5),
        "lambda3": 1.0,
    }
    return TrainingConfig(**{**settings, **changes})


def test_both_stages_raise_the_robustness_score():
    call, images = tiny_call(TinyEncoder()), Blobs()
    stages = []
    psm = train_psm(call, images, config(), name="t", encoder="tiny", report=lambda *told: stages.append(told[:3]))
    assert stages[0] == ("purifier", 1, 80)
    assert stages[-1] == ("mapper", 60, 60)
    held = images.images[:32]
    plain, purified, both = (
        robustness_score(call, part, held, 0.25, draws=16) for part in (None, psm.only(mapper=False), psm)
    )
    assert purified > plain + 0.02
    assert both > purified


def test_training_leaves_the_encoder_as_it_was():
    encoder = TinyEncoder().train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    one = Stage(steps=1, batch_size=4, draws=1)
    train_psm(tiny_call(encoder), Blobs(8), config(purifier_stage=one, mapper_stage=one), name="t", encoder="tiny")
    assert encoder.training
    assert all(p.requires_grad and p.grad is None for p in encoder.parameters())
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_training_repeats_under_its_seed():
    short = Stage(steps=3, batch_size=4, draws=2)
    runs = [
        train_psm(
            tiny_call(TinyEncoder()),
            Blobs(8),
            config(purifier_stage=short, mapper_stage=short, seed=4),
            name="t",
            encoder="e",
        )
        for _ in range(2)
    ]
    weights = [torch.cat([p.flatten() for p in run.parameters()]) for run in runs]
    assert torch.equal(weights[0], weights[1])


def test_a_purifier_can_be_taken_over_and_only_a_mapper_trained():
    call = tiny_call(TinyEncoder())
    short = Stage(steps=2, batch_size=4, draws=1)
    first = train_psm(call, Blobs(8), config(purifier_stage=short, mapper=None), name="p", encoder="e")
    assert first.mapped == ()
    taken = config(purifier_stage=Stage(steps=0), mapper_stage=short)
    second = train_psm(call, Blobs(8), taken, name="m", encoder="e", start=first)
    for one, other in zip(first.purifier.parameters(), second.purifier.parameters(), strict=True):
        assert torch.equal(one, other)
    slow = Stage(steps=1, batch_size=4, draws=1, lr=1e-9)
    further = config(purifier_stage=slow, mapper=None, sigma_range=(0.25, 0.5))
    third = train_psm(call, Blobs(8), further, name="w", encoder="e", start=first)
    assert third.config.sigma_range == (0.25, 0.5)
    for one, other in zip(first.purifier.parameters(), third.purifier.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    alone = train_psm(call, Blobs(8), config(purifier=None, mapper_stage=short), name="m", encoder="e")
    assert alone.purifier is None
    assert alone.mapped == ("tokens",)


def test_the_result_is_a_psm_that_goes_to_disk_and_serves(tmp_path):
    import fs_plugins

    call = tiny_call(TinyEncoder())
    short = Stage(steps=1, batch_size=4, draws=1)
    psm = train_psm(call, Blobs(8), config(purifier_stage=short, mapper_stage=short), name="t", encoder="e")
    psm.save_pretrained(tmp_path / "psm")
    smoother = fs_plugins.FeatureSmoother(call, psm=PSM.from_pretrained(tmp_path / "psm"), sigma=0.25)
    assert smoother.smooth(Blobs(2).images)["tokens"].isfinite().all()


@pytest.mark.parametrize(
    ("images", "changes", "message"),
    [
        (torch.rand(8, 3, 4, 4), {}, r"\(C, 8, 8\)"),
        (torch.rand(8, 3, 8, 8) * 255, {}, r"in \[0, 1\]"),
        (torch.rand(2, 3, 8, 8), {}, "Fewer training images"),
        (torch.rand(8, 3, 8, 8), {"purifier": None, "mapper": None}, "Nothing to train"),
    ],
)
def test_unusable_training_data_is_refused(images, changes, message):
    with pytest.raises(SettingError, match=message):
        train_psm(tiny_call(TinyEncoder()), images, config(**changes), name="t", encoder="e")


def test_image_folder_reads_crops_and_names_what_it_cannot_read(tmp_path):
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (40, 20), (255, 0, 0)).save(tmp_path / "a.png")
    Image.new("L", (9, 9), 128).save(tmp_path / "sub" / "b.JPG")
    (tmp_path / "notes.txt").write_text("not an image")
    folder = ImageFolder(tmp_path, (16, 12))
    assert len(folder) == 2
    assert folder[0].shape == (3, 16, 12)
    assert torch.allclose(folder[0][:, 5, 5], torch.tensor([1.0, 0.0, 0.0]))
    (tmp_path / "c.png").write_bytes(b"not a png")
    with pytest.raises(SettingError, match=r"c\.png is not a readable image"):
        ImageFolder(tmp_path, (8, 8))[1]
    with pytest.raises(SettingError, match=r"No \.png"):
        ImageFolder(tmp_path / "sub" / "deeper", (8, 8))
