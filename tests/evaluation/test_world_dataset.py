"""The demo's world as a dataset."""

from __future__ import annotations

import pytest
import torch
from folders import documented
from PIL import Image

from fs_plugins.demo import assets, world
from fs_plugins.demo.dataset import write
from fs_plugins.errors import SettingError
from fs_plugins.evaluation.datasets import open_dataset
from fs_plugins.evaluation.tasks import TASKS, VQA, Captioning, Classification, Verdict
from fs_plugins.hf.chat import ask
from fs_plugins.pictures import to_unit


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return open_dataset(write(tmp_path_factory.mktemp("world") / "shapes", 22))


def test_the_worlds_dataset_asks_what_the_demo_asks(shapes):
    assert shapes.tasks == ("captioning", "classification", "vqa")
    for sample, scene in zip(shapes.samples, world.scenes("heldout", 22), strict=True):
        assert Captioning().prompt(sample, shapes) == world.CAPTION_PROMPT
        assert Classification().prompt(sample, shapes) == world.CLASS_PROMPT
        assert VQA().prompt(sample, shapes) == scene.question().prompt
        assert (sample.caption, sample.label, sample.answer) == (scene.caption, scene.shape, scene.question().answer)


def test_the_worlds_pictures_are_the_scenes_to_the_bit(shapes):
    for i, sample in enumerate(shapes.samples):
        assert torch.equal(shapes.image(sample, (64, 64)), to_unit(world.scene("heldout", i).draw()))
        assert torch.equal(shapes.target(sample, (64, 64)), to_unit(world.scene("target", i).draw()))


def test_exact_answers_are_right_and_the_worlds_aim_is_a_success_of_the_attack(shapes):
    for sample, scene in zip(shapes.samples, world.scenes("heldout", 22), strict=True):
        if scene.shape is not None:
            assert Classification().verdict(str(scene.label), sample, shapes) == Verdict(True, False)
            assert Classification().verdict("10", sample, shapes) == Verdict(False, True)
        hopeless = scene.question().answer == world.NONE
        assert VQA().verdict(scene.question().answer, sample, shapes) == Verdict(True, None if hopeless else False)
        assert VQA().verdict(world.NONE, sample, shapes) == (Verdict(True, None) if hopeless else Verdict(False, True))


def test_the_demos_model_answers_the_dataset(shapes):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(assets.LLAVA).eval()
    processor = AutoProcessor.from_pretrained(assets.LLAVA)
    right = {"classification": [], "vqa": [], "captioning": []}
    for name, task in TASKS.items():
        samples = [sample for sample in shapes.samples if task.applies(sample)]
        pictures = [Image.open(shapes.root / sample.image) for sample in samples]
        replies = ask(model, processor, pictures, [task.prompt(sample, shapes) for sample in samples])
        for reply, sample in zip(replies, samples, strict=True):
            right[name].append(
                reply == sample.caption if name == "captioning" else task.verdict(reply, sample, shapes).correct
            )
    assert {name: len(hits) for name, hits in right.items()} == {"classification": 20, "vqa": 22, "captioning": 22}
    assert all(sum(hits) >= 0.9 * len(hits) for hits in right.values())


def test_an_interrupted_write_is_written_again(tmp_path, monkeypatch):
    drawn = world.Scene.draw
    monkeypatch.setattr(world.Scene, "draw", lambda scene: 1 / 0 if scene.index == 2 else drawn(scene))
    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "d", 4)
    assert not (tmp_path / "d" / "samples.jsonl").exists()
    monkeypatch.undo()
    assert not list((tmp_path / "d" / "images").iterdir()), "all of them come at once"
    (tmp_path / "d" / "images" / "0001.png").write_bytes(b"half a picture")  # as earlier versions left it
    again = open_dataset(write(tmp_path / "d", 4))
    assert again.digest == open_dataset(write(tmp_path / "other", 4)).digest
    assert not list(tmp_path.rglob(".*.png"))


def test_scenes_keep_their_numbers_and_other_folders_are_left_alone(tmp_path):
    later = open_dataset(write(tmp_path / "d", 2, start=10))
    assert [sample.image for sample in later.samples] == ["images/0010.png", "images/0011.png"]
    assert later.samples[0].label is None
    assert len(open_dataset(write(tmp_path / "d", 3)).samples) == 3
    other = documented(tmp_path / "other", [{"image": "1.png"}])
    with pytest.raises(SettingError, match="another dataset"):
        write(other, 1)
    for count, start in ((0, 0), (1, -1)):
        with pytest.raises(SettingError, match="At least one scene"):
            write(tmp_path / "d", count, start=start)
