"""The suite autoattack: another package's attack through the defence, and a record of what it left right."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from painting import Painter
from support import make_clip

import fs_plugins
from fs_plugins import SettingError
from fs_plugins.evaluation import Results, evaluate
from fs_plugins.evaluation.autoattack import EOT_STEPS, Scorer
from fs_plugins.evaluation.robustbench import FILE, records
from fs_plugins.evaluation.settings import Settings
from fs_plugins.evaluation.subjects import Headed
from fs_plugins.evaluation.suites import AUTOATTACK, FS_PSM, NONE, SUITES, chosen

SUITE, EPS = SUITES[AUTOATTACK], 16 / 255
KEYS = (
    "link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "architecture", "eps",
    "clean_acc", "reported", "autoattack_acc", "footnote", "n0", "sigma", "eot_steps", "certified_radius",
)  # fmt: skip


class StandIn:
    """One long step along the gradient, in the place of AutoAttack; it leaves the ball."""

    made: list  # one for each batch

    def __init__(self, model, **settings):
        self.model, self.settings = model, settings
        StandIn.made.append(self)

    def run_standard_evaluation(self, images, labels, /, *, batch_size):
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.twice = [self.model(images), self.model(images)]
        shown = images.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(self.model(shown), labels)
        attacked = images + 2 * self.settings["eps"] * torch.autograd.grad(loss, shown)[0].sign()
        return attacked, labels


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    StandIn.made = []
    monkeypatch.setitem(sys.modules, "pyautoattack", SimpleNamespace(AutoAttack=StandIn))
    return StandIn.made


@pytest.fixture
def headed(data):
    """A head that tells the squares apart, among more classes, as long as nobody attacks."""
    model = make_clip().requires_grad_(False)
    call = fs_plugins.vision_call(model)
    images = torch.stack([data.image(sample, (16, 16)) for sample in data.samples])
    features = torch.nn.functional.normalize(call.embed(call.encode(images)), dim=-1)
    names = ["yellow", "green", "blue", "red"]
    wanted = torch.zeros(len(images), 4, dtype=torch.float32, device="cpu")
    wanted[range(len(images)), [names.index(sample.label) for sample in data.samples]] = 1
    head = torch.nn.Linear(24, 4, bias=False).requires_grad_(False)
    head.weight.copy_(torch.linalg.lstsq(features, wanted).solution.T)
    return Headed(model, head, names)


@pytest.fixture
def ran(start, headed):
    """Suites -> the results of an evaluation of them with the head."""

    def run(*suites, **changes):
        evaluation = start(*suites, **{"sigma": 0.01, "psm": "none", "adaptive_images": None, **changes})
        evaluation = replace(evaluation, load=lambda tower: headed)
        evaluation.run()
        return Results(evaluation.store.folder)

    return run


def test_it_goes_through_the_defence_to_the_classes_of_the_data(ran, stand_in, data, headed):
    results = ran(SUITE)
    for one in stand_in:
        assert one.settings == {
            "norm": "Linf", "eps": EPS, "version": "rand", "seed": 0, "device": one.images.device
        }  # fmt: skip
        assert one.labels.tolist() == [data.classes.index(name) for name in named(data, one.images)]
        first, second = one.twice
        assert first.shape == (len(one.images), len(data.classes))
        assert not torch.equal(first, second), "each look draws its own noise"
        embedded = headed.call.embed(headed.call.encode(one.images))
        order = [headed.names.index(name) for name in data.classes]
        assert torch.equal(first.argmax(1), headed.scores(embedded)[:, order].argmax(1))
    names = [sample.image for sample in data.samples]
    assert sum(len(one.images) for one in stand_in) == len(names)
    for sample in data.samples:
        attacked = results.store.attacked("fs_psm/autoattack-16-adaptive", sample.image)
        far = (attacked - data.image(sample, (16, 16))).abs().max().item()
        assert far == pytest.approx(EPS, abs=1e-6), "what left the ball is pulled back"
    [table] = results.tables()
    assert [row[0] for row in table.rows] == ["clean", "AutoAttack (rand) 16/255, adaptive", "worst up to 16/255"]


def named(data, images):
    """The labels of clean pictures."""
    return [next(s.label for s in data.samples if torch.equal(data.image(s, (16, 16)), image)) for image in images]


def test_what_is_left_right_is_a_record_as_robustbench_keeps_it(ran, data, tmp_path):
    far = replace(SUITE, conditions=(replace(SUITE.conditions[0], eps255=128),))
    results = ran(far, replace(SUITES["table2"], sigmas=(), defences=(FS_PSM,)), n0=2)
    results.write(tmp_path / "written")
    [record] = json.loads((tmp_path / "written" / FILE).read_text("utf-8"))
    assert tuple(record) == KEYS
    table = results.tables()[0]
    clean, left = table.rows[0][3].estimate.value, table.rows[-1][3].estimate.value
    assert record["clean_acc"] == f"{100 * clean:.2f}" == "100.00"
    assert record["autoattack_acc"] == f"{100 * left:.2f}"
    assert left < clean
    assert (record["eps"], record["dataset"], record["architecture"]) == ("128/255", data.name, "tiny")
    assert (record["n0"], record["number_forward_passes"], record["sigma"]) == (2, 2, 0.01)
    assert record["eot_steps"] == EOT_STEPS == 20
    radii = [one.radius(0.5) or 0.0 for one in results.certificates(FS_PSM)[0.01].values()]
    assert record["certified_radius"] == pytest.approx(sum(radii) / 2)
    assert "Accuracy on 5 pictures" in record["footnote"]


def test_what_is_not_certified_has_no_radius_and_what_is_wrong_is_not_attacked(ran, stand_in, headed, tmp_path):
    headed.head.weight[headed.names.index("red")] *= -1
    odd = replace(SUITE, conditions=(replace(SUITE.conditions[0], eps255=0.5),))
    results = ran(odd)
    assert sum(len(one.images) for one in stand_in) == 2, "two of the five are green"
    [record] = records(results)
    assert record["certified_radius"] is None
    assert (record["eps"], record["clean_acc"]) == ("1/510", "40.00")
    other = ran(replace(SUITES["table3"], defences=(NONE,), conditions=()))
    assert records(other) == []
    other.write(tmp_path / "other")
    assert not (tmp_path / "other" / FILE).exists()


def test_a_model_that_answers_in_words_and_data_that_do_not_do_are_refused(start, headed, data):
    with pytest.raises(SettingError, match=r"answers in words.*suite worst"):
        start(SUITE).run()
    with pytest.raises(SettingError, match="the data has 2 classes"):
        Scorer(headed, replace(data, classes=("red", "green"), target_class="red"))
    with pytest.raises(SettingError, match="scores no class 'purple'"):
        Scorer(headed, replace(data, classes=("red", "green", "purple"), target_class="red"))
    with pytest.raises(SettingError, match="answers in words"):
        Scorer(Painter(headed.model), data)


def test_a_package_that_is_missing_is_said_before_anything_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(SettingError, match=r"pip install \"fs-plugins\[autoattack\]\".*pyautoattack==0\.2\.0"):
        evaluate(Settings(suite=(AUTOATTACK,), out=tmp_path / "out"), lambda *_: pytest.fail("a model is loaded"))
    assert not (tmp_path / "out").exists()


def test_all_suites_are_those_that_need_no_package_and_no_night():
    everything = {suite.name for suite in chosen(["all"])}
    assert everything == SUITES.keys() - {AUTOATTACK, "curves", "answers"}
    assert {suite.name for suite in chosen([AUTOATTACK, "all"])} == everything | {AUTOATTACK}
    [scaled] = chosen([AUTOATTACK], "4/255")
    assert [condition.eps255 for condition in scaled.conditions] == [4]
