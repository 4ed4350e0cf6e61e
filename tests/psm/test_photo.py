"""The purifier of photographs: how it is trained, and the one that ships."""

from __future__ import annotations

import csv
import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support import TinyEncoder, tiny_call

from fs_plugins import PSM, registry
from tools.photos import purifier as photo

SHIPPED = registry.shipped_path().parent / "fs_plugins" / "psm" / "photo"


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(21):
        pixels = torch.randint(0, 256, (24, 24, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i:02}.png")
    return folder


def test_crops_are_parts_of_the_photographs_half_of_them_mirrored():
    """Of a photograph no larger than they are, so that none is scaled."""
    pictures = [torch.arange(3 * 8 * 50).remainder(256).byte().view(3, 8, 50)]
    found = photo.crops(pictures, 8, 64, torch.Generator().manual_seed(0))
    assert found.shape == (64, 3, 8, 8)
    windows = pictures[0].unfold(2, 8, 1).permute(2, 0, 1, 3).float() / 255
    straight = [bool((windows == crop).flatten(1).all(1).any()) for crop in found]
    mirrored = [bool((windows == crop.flip(-1)).flatten(1).all(1).any()) for crop in found]
    assert all(one != other for one, other in zip(straight, mirrored, strict=True))
    assert 16 < sum(mirrored) < 48


def test_crops_are_of_any_scale():
    ramp = torch.linspace(0, 255, 60).round().byte().expand(3, 60, 60).contiguous()
    found = photo.crops([ramp], 10, 64, torch.Generator().manual_seed(0))
    across = (found[:, 0, 0].amax(1) - found[:, 0, 0].amin(1)) * 60 / 10
    assert across.min() < 1.5
    assert across.max() > 4
    assert found.min() >= 0
    assert found.max() <= 1


def test_training_holds_photographs_out_follows_from_its_seed_and_names_whose_they_are(photos, tmp_path, monkeypatch):
    opened = []
    whole = photo.ImageFolder.__getitem__
    monkeypatch.setattr(photo.ImageFolder, "__getitem__", lambda self, i: opened.append(i) or whole(self, i))
    monkeypatch.setattr(photo, "SMALL", 16)
    monkeypatch.setattr(photo, "UNET", {"channels": [8, 16], "layers": 1, "unshuffle": 2})
    settings = {"steps": 4, "batch": 2, "size": 16, "lr": 1e-3, "seed": 0, "side": 24}
    for name in ("one", "two"):
        photo.finish(photo.train(photos, tmp_path / name, (), **settings), tmp_path / name)
    assert sorted(set(opened)) == [i for i in range(21) if i % 5]
    one, two = (PSM.from_pretrained(tmp_path / name / "psm") for name in ("one", "two"))
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    assert (one.config.fingerprint, one.config.image_size, one.mapped) == ((), None, ())
    listed = tmp_path / "images.csv"
    rows = [f"{i:02},Ren\\303\\251 {i},https://example.org/{i}" for i in range(21)]
    listed.write_text("\n".join(["ImageId,Author,OriginalLandingURL", *rows]) + "\n", "utf-8")
    photo.credit(photos, listed, tmp_path / "one" / "psm")
    named = list(csv.reader((tmp_path / "one" / "psm" / "photographs.csv").open(encoding="utf-8")))
    assert named[0] == ["photograph", "author", "source"]
    assert named[1] == ["01", "René 1", "https://example.org/1"]
    assert len(named) == 1 + 16


def test_features_come_in_late_and_move_the_weights(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(photo, "SMALL", 16)
    monkeypatch.setattr(photo, "UNET", {"channels": [8, 16], "layers": 1, "unshuffle": 2})
    settings = {"batch": 2, "size": 8, "lr": 1e-3, "seed": 0, "side": 24}
    encoders = [TinyEncoder(seed).requires_grad_(False) for seed in (0, 1)]
    photo.train(photos, tmp_path / "one", [tiny_call(encoder) for encoder in encoders], steps=10, **settings)
    assert [len(encoder.seen) for encoder in encoders] == [4, 2], "clean and purified, by turns in steps 8, 9 and 10"
    photo.train(photos, tmp_path / "two", (), steps=10, **settings)
    one, two = (load_file(tmp_path / name / "ema.safetensors") for name in ("one", "two"))
    assert any(not torch.equal(value, two[name]) for name, value in one.items())


def test_the_purifier_that_ships_is_small_names_its_photographs_and_removes_noise():
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 16e6
    named = list(csv.DictReader((SHIPPED / "photographs.csv").open(encoding="utf-8")))
    assert len(named) == 950
    assert all(row["author"] and row["source"].startswith("http") for row in named)
    psm = registry.shipped().purifier("photo")
    assert psm.config.sigma_range == (0.05, 0.5)
    y, x = torch.meshgrid(torch.linspace(0, 1, 100), torch.linspace(0, 1, 90), indexing="ij")
    clean = torch.stack([x, y, (x + y) / 2])[None]
    for sigma, decibels in ((0.1, 33), (0.25, 30), (0.5, 26)):
        noisy = clean + sigma * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        error = (psm.purify(noisy, sigma) - clean).square().mean()
        assert -10 * error.log10() > decibels, (sigma, -10 * error.log10())


@pytest.mark.slow
def test_it_beats_all_of_scikit_images_denoisers_on_photographs_it_never_saw():
    """The model card's second table, on photographs that scikit-image ships."""
    bench = runpy.run_path(str(SHIPPED.parents[2] / "benchmarks" / "denoise.py"))
    photos = [bench["cropped"](photo) for photo in bench["shipped_with_scikit_image"]()]
    found = bench["compare"](PSM.from_pretrained(SHIPPED), photos, seed=0)
    card = (SHIPPED / "README.md").read_text("utf-8").splitlines()
    for sigma, scores in found.items():
        peers = ("total variation", "wavelets", "non-local means")
        assert scores["ours"] > max(scores[name] for name in peers), (sigma, scores)
        quoted = [line.strip("| ").split(" | ") for line in card if line.startswith(f"| {sigma:g} |")][-1]
        measured = [scores[name] for name in ("noisy", *peers, "ours")]
        assert measured == pytest.approx([float(quoted[i]) for i in (1, 2, 3, 4, -1)], abs=0.05)
