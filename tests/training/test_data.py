"""Which pictures training looks at, in which order, with which noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image
from small_trainings import Blobs, config

from fs_plugins import SettingError
from fs_plugins.noise import keyed
from fs_plugins.training import ImageFolder, Stage
from fs_plugins.training.data import batches, check, drawn, samples


def test_every_epoch_is_a_permutation_and_processes_share_it():
    chosen = config(purifier_stage=Stage(steps=6, batch_size=4, draws=1, accumulate=2))
    alone = list(samples(16, chosen, "purifier"))
    assert len(alone) == 12
    indices = [index for some in alone for _, _, index in some]
    for epoch in range(3):
        assert sorted(indices[16 * epoch : 16 * (epoch + 1)]) == list(range(16))
    assert indices[:16] != indices[16:32]
    assert list(samples(16, chosen, "purifier", first=2)) == alone[4:]
    half = replace(chosen, purifier_stage=Stage(steps=6, batch_size=2, draws=1, accumulate=2))
    shares = [list(samples(16, half, "purifier", process=process, processes=2)) for process in (0, 1)]
    assert [first + second for first, second in zip(*shares, strict=True)] == alone


def test_noise_follows_from_seed_stage_step_and_place_alone():
    chosen = config(purifier_stage=Stage(steps=2, draws=3))
    image, noise, level = drawn(Blobs(4), chosen, "purifier", (1, 0, 2))
    assert torch.equal(image, Blobs(4)[2])
    assert noise.shape == (3, 3, 8, 8)
    assert 0 <= level < 1
    again = drawn(Blobs(4), chosen, "purifier", (1, 0, 3))
    assert torch.equal(noise, again[1]), "the noise does not depend on the image"
    others = [
        ("mapper", (1, 0, 2), 0),
        ("purifier", (0, 0, 2), 0),
        ("purifier", (1, 1, 2), 0),
        ("purifier", (1, 0, 2), 1),
    ]
    for stage, sample, seed in others:
        other = drawn(Blobs(4), replace(chosen, seed=seed), stage, sample)[1]
        assert not torch.equal(noise[: len(other)], other[: len(noise)])


def test_batches_come_in_order_however_many_threads_read_them():
    import time

    def one(sample):
        time.sleep(0.003 * (sample[2] % 3))
        return (torch.tensor(sample[2]),)

    lists = [[(0, 0, i), (0, 1, i + 1)] for i in range(0, 20, 2)]
    told = [batch[0].tolist() for batch in batches(one, lists, workers=4)]
    assert told == [[i, i + 1] for i in range(0, 20, 2)]
    first = batches(one, lists, workers=1)
    next(first)
    first.close()


def folder_of(path, count: int, size: tuple[int, int] = (20, 16)) -> ImageFolder:
    path.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (24, 24), (10 * i, 5, 200)).save(path / f"{i}.png")
    return ImageFolder(path, size)


def test_a_folder_is_split_by_the_names_of_its_pictures_and_the_seed(tmp_path):
    folder = folder_of(tmp_path / "a", 20)
    train, held = folder.split(5, seed=0)
    assert (len(train), len(held)) == (15, 5)
    assert sorted(train.paths + held.paths) == folder.paths
    moved = folder_of(tmp_path / "b", 20)
    assert [p.name for p in moved.split(5, seed=0)[1].paths] == [p.name for p in held.paths]
    assert moved.digest == folder.digest != train.digest
    assert folder.split(5, seed=1)[1].paths != held.paths
    Image.new("RGB", (99, 24)).save(tmp_path / "b" / "3.png")
    assert ImageFolder(tmp_path / "b", (20, 16)).digest != folder.digest


def test_augmentation_follows_from_its_generator(tmp_path):
    (tmp_path / "a").mkdir()
    ramp = torch.arange(256, dtype=torch.uint8).repeat(64, 1)
    Image.fromarray(ramp.numpy()).save(tmp_path / "a" / "ramp.png")
    folder = ImageFolder(tmp_path / "a", (16, 16))
    views = [folder.varied(0, keyed(i)) for i in range(12)]
    assert all(view.shape == (3, 16, 16) for view in views)
    assert torch.equal(views[3], folder.varied(0, keyed(3)))
    rising = {bool(view[0, 0, -1] > view[0, 0, 0]) for view in views}
    assert rising == {True, False}, "some are mirrored"
    assert len({view[0, 0].min().item() for view in views}) > 6, "they are of different places"
    chosen = config(augment=True, purifier_stage=Stage(steps=2, draws=1))
    one, other = (drawn(folder, chosen, "purifier", (step, 0, 0))[0] for step in (0, 1))
    assert not torch.equal(one, other)


def test_pictures_are_read_before_the_training_and_named_if_they_are_broken(tmp_path):
    folder = folder_of(tmp_path / "a", 8)
    whole = config(purifier_stage=Stage(steps=9, batch_size=4), mapper=None)
    check(folder, whole)
    data = folder.paths[3].read_bytes()
    folder.paths[3].write_bytes(data[: len(data) // 2])
    folder.paths[5].write_bytes(b"nothing")
    with pytest.raises(SettingError, match=r"3\.png is not a readable.*5\.png is not a readable") as told:
        check(folder, whole)
    assert "0.png" not in str(told.value)
    with pytest.raises(SettingError, match=r"Fewer training images \(8\) than one batch of 16"):
        check(folder, config(purifier_stage=Stage(steps=1, batch_size=8), mapper=None), processes=2)
    used = {
        i
        for some in samples(8, replace(whole, purifier_stage=Stage(steps=1, batch_size=2)), "purifier")
        for *_, i in some
    }
    unused = next(i for i in range(8) if i not in used | {3, 5})
    for i in (3, 5):
        folder.paths[i].write_bytes(data)
    folder.paths[unused].write_bytes(b"nothing")
    check(folder, replace(whole, purifier_stage=Stage(steps=1, batch_size=2)))  # what is not used is not read


def test_image_folder_reads_crops_and_names_what_it_cannot_read(tmp_path):
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (40, 20), (255, 0, 0)).save(tmp_path / "a.png")
    Image.new("L", (9, 9), 128).save(tmp_path / "sub" / "b.JPG")
    (tmp_path / "notes.txt").write_text("not an image", "utf-8")
    folder = ImageFolder(tmp_path, (16, 12))
    assert len(folder) == 2
    assert folder[0].shape == (3, 16, 12)
    assert torch.allclose(folder[0][:, 5, 5], torch.tensor([1.0, 0.0, 0.0]))
    (tmp_path / "c.png").write_bytes(b"not a png")
    with pytest.raises(SettingError, match=r"c\.png is not a readable image"):
        ImageFolder(tmp_path, (8, 8))[1]
    with pytest.raises(SettingError, match=r"No \.png"):
        ImageFolder(tmp_path / "sub" / "deeper", (8, 8))
