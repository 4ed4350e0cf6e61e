"""Datasets in the documented format, what their samples aim at, and parts of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from folders import ASKED, cut, documented, picture, refused
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fs_plugins.errors import SettingError
from fs_plugins.evaluation.datasets import Dataset, Prompts, Sample, open_dataset
from fs_plugins.pictures import to_unit


def test_a_folder_in_the_documented_format_says_what_its_files_say(tmp_path):
    root = documented(
        tmp_path / "animals",
        [
            {"image": "a/1.png", "target": "t.png", "caption": "a cat", "label": "cat"},
            {"image": "a/2.jpg", "target": "t.png", **ASKED},
        ],
        name="zoo",
        classes=["dog", "cat"],
        target_class="dog",
        none_option="nothing",
        prompts={"captioning": "What is this?"},
    )
    found = open_dataset(root)
    assert (found.name, found.classes, found.target_class, found.none_option) == (
        "zoo",
        ("dog", "cat"),
        "dog",
        "nothing",
    )
    assert found.prompts == Prompts(captioning="What is this?")
    assert found.samples == (
        Sample(image="a/1.png", target="t.png", caption="a cat", label="cat"),
        Sample(image="a/2.jpg", target="t.png", **ASKED),
    )
    assert found.tasks == ("captioning", "classification", "vqa")
    assert found.skipped == ()
    with Image.open(root / "a/1.png") as image:
        assert torch.equal(found.image(found.samples[0], (30, 40)), to_unit(image))
    assert found.target(found.samples[1], (8, 12)).shape == (3, 8, 12)


def test_settings_are_optional_and_classes_are_those_of_the_labels(tmp_path):
    root = documented(tmp_path / "zoo", [{"image": f"{i}.png", "label": name} for i, name in enumerate("cab")])
    found = open_dataset(root)
    assert (found.name, found.classes, found.target_class) == ("zoo", ("a", "b", "c"), None)
    assert found.tasks == ("captioning", "classification")


def test_empty_lines_other_line_separators_and_a_byte_order_mark_are_no_error(tmp_path):
    documented(tmp_path, [{"image": "1.png"}, {"image": "2.png"}])
    lines = '\ufeff{"image": "1.png", "caption": "two\u2028lines"}\r\n\n{"image": "2.png"}'
    (tmp_path / "samples.jsonl").write_bytes(lines.encode())
    assert [sample.caption for sample in open_dataset(tmp_path).samples] == ["two\u2028lines", None]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{image: 1.png}", "Invalid JSON"),
        ('["1.png"]', "an object"),
        ('{"image": "2.png", "lable": "cat"}', "lable: Extra inputs"),
        ('{"caption": "a cat"}', "image: Field required"),
        ('{"image": "2.png", "label": 3}', "label: Input should be a valid string"),
        ('{"image": "2.png", "question": "Who?"}', "question, options and answer come together"),
        ('{"image": "2.png", "options": ["a", "b"], "answer": "a"}', "question, options and answer come together"),
        (
            '{"image": "2.png", "question": "Who?", "options": ["a", "b"], "answer": "A"}',
            "none of the options ['a', 'b']",
        ),
        (
            json.dumps({"image": "2.png", "question": "?", "answer": "1", "options": list("1234567890") * 3}),
            "at most 25",
        ),
        *(
            (json.dumps({"image": path}), "no plain path below")
            for path in (
                "",
                ".",
                "/etc/2.png",
                "../2.png",
                "a/../../2.png",
                "./2.png",
                "a//2.png",
                "a\\2.png",
                "C:/2.png",
            )
        ),
        ('{"image": "2.png", "target": "../2.png"}', "no plain path below"),
        (b'{"image": "\xff.png"}', "samples.jsonl, line 3"),
    ],
)
def test_a_line_that_breaks_the_format_is_named_with_what_was_expected(tmp_path, line, expected):
    documented(tmp_path, [{"image": "1.png"}])
    with (tmp_path / "samples.jsonl").open("ab") as file:
        file.write(b"\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    refused(tmp_path, "samples.jsonl, line 3: ", expected, "A line is a JSON object with image")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"clases": ["a", "b"]}, ["dataset.json: clases", "classes, target_class"]),
        ({"prompts": {"classification": "One of {classes}!"}}, ["{classes} and {last}"]),
        ({"prompts": {"classification": "{classes} {last} {question}"}}, ["no other braces"]),
        ({"prompts": {"vqa": "{question} {options"}}, ["{question} and {options}"]),
        ({"prompts": {"vqa_answers": "number"}}, ["'letter' or 'option'"]),
        ({"classes": ["cat"]}, ["['cat']", "at least two"]),
        ({"classes": ["cat", "cat", "dog"]}, ["cat is listed twice"]),
        ({"classes": ["dog", "cow"]}, ["1.png", "'cat'", "none of the classes dog, cow"]),
        ({"classes": ["dog", "cat"], "target_class": "shark"}, ["'shark'", "none of the classes"]),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, settings, expected):
    documented(tmp_path, [{"image": "1.png", "label": "cat", "target": "2.png"}], **settings)
    refused(tmp_path, *expected)


def test_one_label_alone_is_no_choice(tmp_path):
    refused(
        documented(tmp_path, [{"image": "1.png", "label": "cat"}, {"image": "2.png", "label": "cat"}]), "at least two"
    )


def test_two_samples_of_one_name_would_share_their_results(tmp_path):
    refused(documented(tmp_path, [{"image": "1.png"}, {"image": "2.png"}, {"image": "1.png"}]), "the image 1.png")


def test_missing_pictures_are_named_also_where_corrupt_ones_are_skipped(tmp_path):
    root = documented(tmp_path, [{"image": "1.png"}, {"image": "2.png", "target": "3.png"}, {"image": "4.png"}])
    (root / "3.png").unlink()
    for corrupt in ("refuse", "skip"):
        refused(root, "1 of the 4 pictures", "3.png", corrupt=corrupt)


@pytest.mark.parametrize(
    "damage", [cut, lambda path: path.write_text("no picture", "utf-8"), lambda path: path.write_bytes(b"")]
)
@pytest.mark.parametrize("end", [".png", ".jpg", ".JPEG"])
def test_corrupt_pictures_are_refused_or_left_out_by_name(tmp_path, damage, end):
    root = documented(tmp_path / "d", [{"image": f"{i}{end}"} for i in range(4)])
    damage(root / f"2{end}")
    refused(root, f"1 of the 4 pictures of {root}", f"2{end} is not a readable image", 'corrupt="skip"')
    found = open_dataset(root, corrupt="skip")
    assert [sample.image for sample in found.samples] == [f"{i}{end}" for i in (0, 1, 3)]
    (told,) = found.skipped
    assert told.startswith(f"2{end} is not a readable image: ")
    assert str(tmp_path) not in told
    assert all(f"2{end}" != found.target_path(sample).name for sample in found.samples)


def test_a_sample_goes_with_its_corrupt_target(tmp_path):
    root = documented(tmp_path, [{"image": f"{i}.png", "target": f"t{i}.png"} for i in range(3)])
    cut(root / "t1.png")
    refused(root, "t1.png is not a readable image")
    found = open_dataset(root, corrupt="skip")
    assert [sample.image for sample in found.samples] == ["0.png", "2.png"]
    assert found.skipped[0].startswith("1.png is left out for its target: t1.png is not a readable image")


def test_nothing_is_left_where_all_is_corrupt(tmp_path):
    cut(picture(tmp_path / "1.png"))
    refused(tmp_path, "None of the 1 samples", "1.png is not a readable image", corrupt="skip")


def test_what_is_no_dataset_is_refused(tmp_path):
    refused(tmp_path / "none", "is no folder")
    refused(picture(tmp_path / "1.png"), "is no folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "samples.jsonl, images.csv, problems.json, *.png")
    (tmp_path / "empty" / "samples.jsonl").touch()
    refused(tmp_path / "empty", "has no samples")
    refused(tmp_path, "'refuse' or 'skip'", corrupt="ignore")


def test_targets_are_the_samples_own_else_those_of_a_folder_in_turn(tmp_path):
    root = documented(
        tmp_path / "d", [{"image": f"{i}.png"} for i in range(5)] + [{"image": "5.png", "target": "t.png"}]
    )
    aims = [picture(tmp_path / "aims" / name) for name in ("a.png", "b.JPG")]
    found = open_dataset(root, targets=tmp_path / "aims")
    paths = [found.target_path(sample) for sample in found.samples]
    assert paths == [aims[0], aims[1], aims[0], aims[1], aims[0], root / "t.png"]


@given(st.integers(2, 12), st.integers())
def test_else_they_are_another_picture_by_a_permutation_that_leaves_none_in_its_place(count, seed):
    from fs_plugins.evaluation.datasets.opening import _aims

    samples = tuple(Sample(image=f"{i}.png") for i in range(count))
    aims = _aims(Dataset("", Path("d"), samples), [], seed)
    assert sorted(aims) == sorted(path.name for path in aims.values()) == sorted(sample.image for sample in samples)
    assert all(name != path.name for name, path in aims.items())
    assert aims == _aims(Dataset("", Path("d"), samples[::-1]), [], seed)


def test_the_seed_chooses_among_targets(tmp_path):
    root = documented(tmp_path, [{"image": f"{i}.png"} for i in range(8)])
    assert open_dataset(root, seed=1).aims == open_dataset(root, seed=1).aims != open_dataset(root, seed=2).aims


def test_a_picture_is_never_its_own_target(tmp_path):
    refused(documented(tmp_path / "one", [{"image": "1.png"}]), "one picture")
    refused(tmp_path / "one", "itself", targets=tmp_path / "one")
    root = documented(tmp_path / "two", [{"image": "1.png"}, {"image": "2.png"}])
    for options in ({}, {"targets": root}):
        found = open_dataset(root, **options)
        assert [found.target_path(sample).name for sample in found.samples] == ["2.png", "1.png"]


def test_a_folder_of_targets_needs_pictures_that_can_be_read(tmp_path):
    root = documented(tmp_path / "d", [{"image": "1.png"}])
    (tmp_path / "aims").mkdir()
    refused(root, "No .png, .jpg, .jpeg below", targets=tmp_path / "aims")
    picture(tmp_path / "aims" / "b.png")
    cut(picture(tmp_path / "aims" / "a.png"))
    refused(root, "a.png is not a readable image", targets=tmp_path / "aims")
    found = open_dataset(root, targets=tmp_path / "aims", corrupt="skip")
    assert found.target_path(found.samples[0]).name == "b.png"
    assert len(found.samples) == len(found.skipped) == 1


def test_attacks_that_want_a_class_are_not_aimed_at_just_any_picture(tmp_path):
    samples = [{"image": f"{name}.png", "label": name} for name in ("cat", "dog")]
    root = documented(tmp_path / "d", samples, classes=["cat", "dog", "shark"], target_class="shark")
    refused(root, "no picture of 'shark'", "targets")
    picture(tmp_path / "sharks" / "1.png")
    assert open_dataset(root, targets=tmp_path / "sharks").target_class == "shark"


def test_the_digest_depends_on_what_is_evaluated_and_not_on_where_it_lies(tmp_path):
    samples = [{"image": f"{i}.png", "label": name} for i, name in enumerate("ab")]
    digest = open_dataset(documented(tmp_path / "one", samples)).digest
    assert digest == open_dataset(documented(tmp_path / "two", samples)).digest
    assert digest.startswith("2 samples, ")
    picture(tmp_path / "aims" / "0.png")
    others = [
        open_dataset(documented(tmp_path / "3", [samples[0], samples[1] | {"caption": "b"}])),
        open_dataset(documented(tmp_path / "4", samples, prompts={"captioning": "What?"})),
        open_dataset(documented(tmp_path / "5", samples, classes=["b", "a"])),
        open_dataset(documented(tmp_path / "6", samples), targets=tmp_path / "aims"),
        open_dataset(documented(tmp_path / "7", samples[::-1])),
        open_dataset(tmp_path / "one").some(1),
    ]
    with (tmp_path / "two" / "1.png").open("ab") as file:
        file.write(b"more")
    digests = [digest, open_dataset(tmp_path / "two").digest, *(other.digest for other in others)]
    assert len(set(digests)) == len(digests)


@given(st.lists(st.sampled_from(["cat", "dog", "cow", None]), min_size=1, max_size=30), st.data())
def test_some_samples_are_balanced_in_order_and_part_of_more(labels, data):
    samples = tuple(Sample(image=f"{i}.png", label=label) for i, label in enumerate(labels))
    whole = Dataset("", Path("d"), samples, ("cat", "dog", "cow"))
    count, seed = data.draw(st.integers(1, len(labels))), data.draw(st.integers(0, 99))
    part = whole.some(count, seed).samples
    assert len(part) == count
    assert list(part) == [sample for sample in samples if sample in part]
    assert set(part) <= set(whole.some(min(count + 3, len(labels)), seed).samples)
    had, got = Counter(labels), Counter(sample.label for sample in part)
    most = max(got.values())
    assert all(got[label] >= min(had[label], most - 1) for label in had)


def test_some_is_drawn_by_the_seed_and_refuses_more_than_there_are():
    whole = Dataset("it", Path("d"), tuple(Sample(image=f"{i}.png") for i in range(40)))
    assert whole.some(10, 1) == whole.some(10, 1) != whole.some(10, 2)
    assert whole.some(40) == whole
    for count in (0, 41):
        with pytest.raises(SettingError, match=f"it has 40 samples; {count} of them"):
            whole.some(count)


def test_attacks_want_the_class_of_the_labelled_picture_they_aim_at(tmp_path):
    samples = [{"image": f"{i}.png", "label": "cat" if i % 2 else "dog"} for i in range(4)]
    samples[0] |= {"target": "other.png", "target_label": "cow"}
    samples[1] |= {"target": "other.png"}
    root = documented(tmp_path / "d", samples, classes=["cat", "cow", "dog"])
    data = open_dataset(root)
    by_name = {sample.image: sample.label for sample in data.samples}
    wanted = [data.wanted(sample) for sample in data.samples]
    assert wanted == ["cow", None, *(by_name[data.target_path(sample).name] for sample in data.samples[2:])]
    named = documented(tmp_path / "n", samples[:1], classes=["cat", "cow", "dog"], target_class="cat")
    assert open_dataset(named).wanted(open_dataset(named).samples[0]) == "cow"


def test_choices_hold_the_label_and_are_classes(tmp_path):
    for choices, expected in ((["cat"], "the label 'dog' among them"), (["dog", "cow"], "the choice 'cow'")):
        root = documented(
            tmp_path / expected[:3] / choices[0], [{"image": "0.png", "label": "dog", "choices": choices}],
            classes=["cat", "dog"],
        )  # fmt: skip
        with pytest.raises(SettingError, match=expected):
            open_dataset(root)
