"""The evaluation on photographs, of a tiny encoder with a random head: what is written follows from the answers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from support import make_psm

import fs_plugins
from fs_plugins.errors import SettingError
from fs_plugins.evaluation.datasets import open_dataset
from fs_plugins.evaluation.report import is_one
from fs_plugins.evaluation.results import ROWS, accuracy
from fs_plugins.evaluation.subjects import Headed
from fs_plugins.evaluation.suites import CLEAN, FS, FS_PSM, NONE
from fs_plugins.photos import run as photos
from fs_plugins.photos.dataset import write
from fs_plugins.photos.photographs import held_out
from fs_plugins.photos.settings import Settings

NAMES = [f"thing {i}" for i in range(5)]


class Speaker:
    """Says the same of every photograph."""

    tasks = ("captioning", "classification", "vqa")

    def __init__(self, subject):
        self.model, self.call, self.shown = subject.model, subject.call, []

    def reply(self, task, images, samples, dataset):
        self.shown += [image.clone() for image in images]
        return {"captioning": ["A photo of a thing 0."], "classification": ["thing 1"], "vqa": ["thing 0"]}[
            task.name
        ] * len(samples)


@pytest.fixture
def headed(clip):
    generator = torch.Generator().manual_seed(1)
    head = torch.nn.Linear(24, len(NAMES)).requires_grad_(False)
    head.weight.copy_(torch.randn(head.weight.shape, generator=generator))
    return Headed(clip.requires_grad_(False), head, NAMES)


@pytest.fixture
def measure(headed, tmp_path):
    """Settings and a speaker -> what is measured of four photographs."""
    psm, general = tmp_path / "own", tmp_path / "general"
    levels = {"sigma_range": (0.05, 0.5)}
    make_psm(headed.call, **levels).save_pretrained(psm)
    make_psm(headed.call, mapper=False, fingerprint=(), image_size=None, **levels).save_pretrained(general)
    shown = [replace(one, label=i % len(NAMES)) for i, one in enumerate(held_out()[:6])]
    usual = {
        "images": 4,
        "steps": 2,
        "adaptive_images": 2,
        "adaptive_steps": 1,
        "sigma_images": 3,
        "certified_images": 4,
        "draws": 40,
        "n0": 2,
        "purifying": "float32",
        "psm": str(psm),
        "general": str(general),
        "out": tmp_path / "out",
    }

    def measured(speaker=None, track=lambda what, count: lambda done: None, **changes):
        settings = Settings(**{**usual, **changes})
        return photos.run(
            settings,
            lambda: write(settings.out / "photographs-4", shown, NAMES, 4),
            lambda encoder, data: headed,
            model="tiny",
            speaker=speaker and (lambda encoder, data: speaker),
            track=track,
        )

    return measured


def suite_of(found, name):
    return next(suite for suite in found.results.plan.suites if suite.name == name)


def test_the_second_attack_has_a_part_of_the_photographs_and_its_rows_say_so(measure):
    found = measure()
    (table,) = (table for table in found.tables() if table.name == "classes")
    counts = {(str(row[0]), row[2]) for row in table.rows}
    assert counts == {("clean", 4), ("AttackVLM 16/255", 4), ("M-Attack 16/255", 3)}


def test_what_is_written_is_what_was_answered(measure, headed, tmp_path):
    found = measure()
    told = json.loads((tmp_path / "out/summary.json").read_text("utf-8"))
    kinds = ("clean", "attacked", "attacked_m_attack", "adaptive")
    assert [set(told[kind]) for kind in kinds[:3]] == [{"none", "fs", "fs_photo", "fs_psm"}] * 3
    assert set(told["adaptive"]) == {"none", "fs", "fs_psm"}
    assert set(told["adaptive_answer"]) == {"fs", "fs_psm"}
    assert all(set(row) == {"acc", "asr", "fcs"} for kind in kinds for row in told[kind].values())
    assert (told["images"], told["adaptive_images"], told["seed"], told["own_psm"]) == (4, 2, 0, True)
    data = open_dataset(tmp_path / "out/photographs-4")
    images = torch.stack([data.image(sample, (16, 16)) for sample in data.samples])
    logits = headed.head(headed.call.embed(headed.call.encode(images)))
    right = [NAMES[i] == sample.label for i, sample in zip(logits.argmax(1).tolist(), data.samples, strict=True)]
    assert told["clean"]["none"]["acc"] == sum(right) / 4
    assert [row["sigma"] for row in told["sigmas"]] == ["0.0625", "0.125", "0.25", "0.5"]
    assert {name: told["certificates"][name]["n"] for name in ("fs", "fs_psm")} == {"fs": 4, "fs_psm": 4}
    assert told["cost"]["smoothed"] == 2 * told["cost"]["draw"] > 2 * told["cost"]["encoder"] > 0
    assert is_one(tmp_path / "out/report.html")
    assert (tmp_path / "out/photos.png").read_bytes()[:4] == b"\x89PNG"
    assert [table.name for table in found.tables()] == ["classes", "adaptive", "sigmas", "certificates", "cost"]


def test_nothing_is_adaptive_about_attacking_no_defence(measure):
    found = measure()
    few = found.results.plan.pictures(suite_of(found, "adaptive"), FS)
    plain = accuracy(found.results.answers(NONE, found.attacked[0], "classification", few))
    assert found.rows(found.adaptive)["none"]["acc"] == plain
    assert len(few) == 2
    store = found.results.store
    for sample in few:
        through = store.attacked("fs_psm/attackvlm-16-adaptive", sample.image)
        assert not torch.equal(through, store.attacked("none/attackvlm-16", sample.image))


def test_noise_levels_are_those_of_the_table(measure):
    found = measure()
    for sigma, suite in ((0.125, "fs_psm_sigma0.125"), (0.25, "fs_psm")):
        defence = next(one for one in suite_of(found, "sigmas").defences if one.name == suite)
        assert set(found.results.certificates(defence)) == {sigma}
        assert json.loads((found.results.folder / f"defences/{suite}.json").read_bytes())["sigma"] == sigma


def test_a_run_goes_on_where_it_was_and_is_held_to_its_settings(measure, monkeypatch):
    first = measure().results.summary()["tables"]
    monkeypatch.setattr("fs_plugins.evaluation.tower.attack", None)
    assert measure().results.summary()["tables"] == first
    with pytest.raises(SettingError, match="steps"):
        measure(steps=3)
    with pytest.raises(SettingError, match="float32, their own precision, or in bfloat16; got 'float16'"):
        measure(purifying="float16")


@pytest.mark.parametrize(
    ("capable", "lower"), [({"amx_bf16": True}, "bfloat16"), ({"amx_bf16": False}, None), ({}, None)]
)
def test_purifiers_work_in_a_lower_precision_where_the_processor_does(capable, lower, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capable, raising=False)
    cpu = torch.device("cpu")
    assert photos._precision("auto", cpu) == lower
    assert photos._precision("auto", torch.device("cuda")) == "bfloat16"
    assert (photos._precision("float32", cpu), photos._precision("bfloat16", cpu)) == (None, "bfloat16")


def test_its_seconds_are_those_of_all_its_parts(measure, monkeypatch, tmp_path):
    ticks = iter(range(0, 10**6, 10))  # ten seconds between any two looks at the clock
    monkeypatch.setattr("fs_plugins.evaluation.clock.monotonic", lambda: next(ticks))
    done = []

    def stops(what, count):
        def advance(some):
            done.append(some)
            if len(done) == 8:
                raise KeyboardInterrupt

        return advance

    with pytest.raises(KeyboardInterrupt):
        measure(track=stops)
    assert (tmp_path / f"out/{ROWS}/settings.json").exists()
    before = json.loads((tmp_path / f"out/{ROWS}/seconds.json").read_bytes())["seconds"]
    assert before >= 7 * 10
    began = next(ticks)
    found = measure()
    assert found.seconds > before + 10
    assert found.seconds == pytest.approx(before + next(ticks) - began, abs=60)
    assert json.loads((tmp_path / "out/summary.json").read_text("utf-8"))["seconds"] == round(found.seconds, 1)
    (tmp_path / f"out/{ROWS}/seconds.json").write_text("7", "utf-8")
    with pytest.raises(SettingError, match=r"seconds\.json is not what an evaluation wrote.*Delete it"):
        measure()


def test_the_speaker_is_shown_the_same_attacked_pictures(measure, headed):
    speaker = Speaker(headed)
    found = measure(speaker)
    assert found.said is not None
    attacked = found.results.store.attacked("none/attackvlm-16", found.results.plan.dataset.samples[0].image)
    assert any(torch.equal(attacked, image) for image in speaker.shown)
    assert [table.name for table in found.tables()][-3:] == ["captions", "choices", "questions"]
    said = [answer.reply for answer in found.said.answers(FS_PSM, CLEAN, "captioning")]
    assert said == ["A photo of a thing 0."] * 4
    data = found.said.plan.dataset
    hits = [answer.verdict.correct for answer in found.said.answers(NONE, CLEAN, "classification")]
    assert hits == [sample.label == "thing 1" for sample in data.samples]


def test_a_speaker_that_consumes_something_else_is_smoothed_with_the_general_purifier(measure, llava):
    speaker = Speaker(Headed(llava.requires_grad_(False), torch.nn.Identity(), NAMES))
    found = measure(speaker, spoken_images=2)
    assert found.said.plan.setup.psm == found.settings.general != found.results.plan.setup.psm
    assert "smoothed with" in found.notes()[0]
    assert len(found.said.plan.dataset.samples) == 2
    assert len(list(found.said.answers(FS_PSM, found.attacked[0], "vqa"))) == 2


def test_without_a_psm_of_its_own_the_general_one_stands_once(measure):
    found = measure(psm="auto", n0=1)
    assert not found.own
    assert [one.name for one in found.defences] == ["none", "fs", "fs_psm"]
    assert "no PSM of its own" in found.notes()[0]
    assert fs_plugins.PSM.from_pretrained(found.settings.general).config.name == "random"
