"""Folders in the layouts of others."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from folders import picture, refused

from fs_plugins.evaluation.datasets import IMAGENET, Sample, open_dataset


def nips17(root: Path, names=("0c7ac4a8", "f43fbfe8"), end=".png") -> Path:
    for name in names:
        picture(root / "images" / f"{name}{end}")
    with (root / "images.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["ImageId", "URL", "TrueLabel"], *([name, "https://x, y", 306] for name in names)])
    return root


@pytest.mark.parametrize("end", [".png", ".jpg", ".JPEG"])
def test_nips_2017(tmp_path, end):
    root = nips17(tmp_path, end=end)
    picture(root / "images" / "unlisted.png")
    found = open_dataset(root)
    assert [sample.image for sample in found.samples] == [f"images/0c7ac4a8{end}", f"images/f43fbfe8{end}"]
    assert (found.name, found.tasks) == ("NIPS 2017", ("captioning",))


def test_nips_2017_with_pictures_missing_or_a_table_of_another_kind(tmp_path):
    root = nips17(tmp_path)
    (root / "images" / "f43fbfe8.png").unlink()
    refused(root, "1 of the 2 pictures", "f43fbfe8.png", "take their rows out", corrupt="skip")
    (root / "images.csv").write_text("name,label\na,1\n", "utf-8")
    refused(root, "column ImageId")
    (root / "images.csv").write_bytes(b"ImageId\n\xff\xfe\n")
    refused(root, "is no CSV file")


PROBLEMS = {
    "2": {"question": "Which ocean?", "choices": ["one", "two"], "answer": 1, "image": "image.png", "split": "test"},
    "3": {"question": "Why?", "choices": ["a", "b"], "answer": 0, "image": None, "split": "test", "hint": "words"},
    "7": {"question": "Who?", "choices": ["x", "y", "z"], "answer": 0, "image": "image.png", "split": "train"},
}


@pytest.mark.parametrize("base", ["images/", ""])
def test_scienceqa(tmp_path, base):
    (tmp_path / "problems.json").write_text(json.dumps(PROBLEMS), "utf-8")
    picture(tmp_path / base / "test" / "2" / "image.png")
    picture(tmp_path / base / "train" / "7" / "image.png")
    found = open_dataset(tmp_path)
    assert found.samples == (
        Sample(image=f"{base}test/2/image.png", question="Which ocean?", options=("one", "two"), answer="two"),
        Sample(image=f"{base}train/7/image.png", question="Who?", options=("x", "y", "z"), answer="x"),
    )
    assert found.tasks == ("captioning", "vqa")


def test_scienceqa_of_one_split_and_with_pictures_that_do_not_match(tmp_path):
    (tmp_path / "problems.json").write_text(json.dumps(PROBLEMS), "utf-8")
    refused(tmp_path, "2 problems with a picture", "test/ or train/")
    picture(tmp_path / "images" / "test" / "2" / "image.png")
    found = open_dataset(tmp_path, targets=picture(tmp_path / "aims" / "1.png").parent)
    assert [sample.answer for sample in found.samples] == ["two"]
    (tmp_path / "images" / "train").mkdir()
    refused(tmp_path, "1 of the 2 pictures", "missing", "image.png")
    for wrong, expected in (({"answer": 2}, "none of the 2 choices"), ({"split": "../.."}, "no plain path")):
        (tmp_path / "problems.json").write_text(json.dumps({"2": PROBLEMS["2"] | wrong}), "utf-8")
        refused(tmp_path, expected)
    (tmp_path / "problems.json").write_text("[]", "utf-8")
    refused(tmp_path, "is not ScienceQA's")


def imagenet(base: Path, *names: str, each: int = 2) -> Path:
    synsets = {name: synset for synset, name in IMAGENET.items()} | {"shark": "n01484850", "tench": "n01440764"}
    for name in names:
        for i in range(each):
            picture(base / synsets[name] / f"ILSVRC2012_val_{i}.JPEG")
    return base


@pytest.mark.parametrize("below", ["", "val/"])
def test_imagenet_has_the_papers_classes_in_its_order_and_aims_at_sharks(tmp_path, below):
    imagenet(tmp_path / below, "kite", "hen", "rooster", "shark", "tench", each=2)
    found = open_dataset(tmp_path)
    assert found.classes == ("rooster", "hen", "kite", "shark")
    assert found.target_class == "shark"
    assert [sample.label for sample in found.samples] == ["rooster", "rooster", "hen", "hen", "kite", "kite"]
    assert found.samples[0].image == f"{below}n01514668/ILSVRC2012_val_0.JPEG"
    aims = [found.target_path(sample).relative_to(tmp_path).as_posix() for sample in found.samples]
    assert aims == [f"{below}n01484850/ILSVRC2012_val_{i % 2}.JPEG" for i in range(6)]


def test_imagenet_without_sharks_needs_target_pictures(tmp_path):
    imagenet(tmp_path / "d", "hen")
    refused(tmp_path / "d", "no picture of 'shark'")
    picture(tmp_path / "sharks" / "1.png")
    found = open_dataset(tmp_path / "d", targets=tmp_path / "sharks")
    assert found.classes == ("hen", "shark")
    assert {found.target_path(sample).name for sample in found.samples} == {"1.png"}
    (tmp_path / "empty" / "n01514668").mkdir(parents=True)
    refused(tmp_path / "empty", "synset folders")


def test_any_folder_of_pictures(tmp_path):
    for name in ("b.PNG", "a/c.JPG", "a/d.jpeg", ".hidden/e.png", "._b.png", "aims/t.png"):
        picture(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.txt").write_text("words", "utf-8")
    found = open_dataset(tmp_path / "photos", targets=tmp_path / "photos" / "aims")
    assert {sample.image for sample in found.samples} == {"b.PNG", "a/c.JPG", "a/d.jpeg"}
    assert (found.name, found.tasks) == ("photos", ("captioning",))
    assert len(open_dataset(tmp_path / "photos").samples) == 4
