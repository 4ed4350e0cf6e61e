"""A training as the library's functions give it, without the command line."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_trainings import Blobs, config
from support import knowing, make_classifier, make_llava, make_psm

import fs_plugins
from fs_plugins import PSM, ModelError, SettingError
from fs_plugins.demo import world
from fs_plugins.demo.scenes import Scenes
from fs_plugins.files import locked
from fs_plugins.pictures import to_unit
from fs_plugins.settings import build, read
from fs_plugins.training import Settings, Stage, TrainingFolder, Work, robustness_score, train_and_publish, train_psm
from fs_plugins.training.psm import one_call
from fs_plugins.training.start import configured

SHORT = {"batch_size": 4, "draws": 1, "steps": 1, "mapper_steps": 1, "certify": 1, "n": 20}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    state = pytest.importorskip("accelerate.state").AcceleratorState
    yield
    state._reset_state(reset_partial_state=True)


def test_a_training_is_published_from_settings_and_a_model(tmp_path):
    settings = Settings(scenes=12, out=tmp_path / "mine", model="tiny", **SHORT)
    work = Work.of(settings, make_llava, scenes=Scenes)
    stages: list[tuple[str, int, int]] = []
    scores = train_and_publish(work, report=lambda *told: stages.append(told[:3]), command="again")
    assert stages[0] == ("purifier", 1, 1)
    assert stages[-1][0] == "certificates"
    assert stages[-1][1] == stages[-1][2], "all draws are counted, those of the pilot too"
    assert (scores.images, scores.certified, scores.n) == (1, 1, 20)
    psm = PSM.from_pretrained(tmp_path / "mine")
    assert (psm.config.name, psm.config.encoder) == ("mine", "tiny")
    assert "    again\n" in (tmp_path / "mine" / "README.md").read_text("utf-8")
    assert train_and_publish(work) is None, "it is finished"


def test_a_classifier_is_held_to_its_own_classes_by_its_attacker(tmp_path):
    model = knowing(make_classifier())
    attacked = {"adversarial": True, "adversarial_steps": 2, "passes": 2}
    work = Work.of(Settings(scenes=12, out=tmp_path / "mine", **SHORT, **attacked), lambda: model, scenes=Scenes)
    (own,) = work.answers
    shown = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    output = work.call.look(shown)
    assert torch.equal(own.given(output, range(3)), work.call.head(work.call.embed(work.call.encode(shown))).argmax(-1))
    assert set(own.modules) == set(work.call.head.layers)
    train_and_publish(work)
    rows = list(csv.DictReader((tmp_path / "mine" / "log.csv").read_text("utf-8").splitlines()))
    assert float(rows[-1]["l_say"]) > 0
    assert "Three stages" in (tmp_path / "mine" / "README.md").read_text("utf-8")
    plain = Work.of(Settings(scenes=12, out=tmp_path / "plain", **SHORT), lambda: model, scenes=Scenes)
    assert not plain.answers, "without an attacker nobody is asked"


def test_what_writes_nothing_has_no_folder_to_publish_in(tmp_path):
    work = Work.of(Settings(scenes=12, out=tmp_path / "x", dry_run=True, **SHORT), make_llava, scenes=Scenes)
    with pytest.raises(SettingError, match="write nothing"):
        train_and_publish(work)
    assert not (tmp_path / "x").exists()


def test_a_training_goes_on_from_a_purifier_by_the_names_that_enable_takes(call, tmp_path, monkeypatch):
    start = configured(Settings(start="photo-light"))[1]
    named = fs_plugins.smoothers(call, psm="photo-light")[0].psm
    assert start.config == named.config
    assert all(torch.equal(value, named.state_dict()[name]) for name, value in start.state_dict().items())
    mine = make_psm(call)
    mine.save_pretrained(tmp_path / "photo-light")
    monkeypatch.chdir(tmp_path)
    assert configured(Settings(start="photo-light"))[1].config == named.config
    assert configured(Settings(start="./photo-light"))[1].config.name == mine.config.name


def test_scenes_need_somebody_who_draws_them(tmp_path):
    with pytest.raises(SettingError, match=r"pass scenes=fs_plugins\.demo\.scenes\.Scenes"):
        Work.of(Settings(scenes=12, out=tmp_path / "x", **SHORT), make_llava)


def test_scenes_are_pictures_like_any(tmp_path):
    scenes = Scenes(5, (32, 32))
    assert len(scenes) == 5
    assert scenes[4].shape == (3, 32, 32)
    assert scenes.names[4] == "000004"
    train, held = scenes.split(2, 0)
    assert sorted(train.paths + held.paths) == scenes.paths
    assert scenes.digest == Scenes(5, (64, 64)).digest
    assert torch.equal(Scenes(5, (64, 64))[4], to_unit(world.scene("train", 4).draw())), "at their own size, as drawn"


def test_two_trainings_do_not_share_a_folder(call, tmp_path):
    one = Stage(steps=1, batch_size=4, draws=1)
    chosen = config(purifier_stage=one, mapper=None)
    owned = r"is in use by process \d+ on .*another folder for this training"
    with locked(tmp_path, "another training"), pytest.raises(SettingError, match=owned):
        train_psm(call, Blobs(8), chosen, name="t", encoder="e", out=tmp_path)
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    train_psm(call, Blobs(8), chosen, name="t", encoder="e", out=tmp_path)
    folder = TrainingFolder(tmp_path)
    with folder.using():
        folder.own()
        with folder.using():
            folder.own()
        other = TrainingFolder(tmp_path)
        with other.using(), pytest.raises(SettingError, match="is in use"):
            other.own()
    with locked(tmp_path, "it is free again"):
        pass


def test_a_model_or_its_call_is_trained_and_scored(clip):
    one = Stage(steps=1, batch_size=4, draws=1)
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    chosen = config(purifier_stage=one, mapper_stage=one)
    call = fs_plugins.vision_call(clip)
    first, second = (train_psm(given, images, chosen, name="t", encoder="e") for given in (clip, call))
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    assert robustness_score(clip, first, images, 0.25) == robustness_score(call, first, images, 0.25)


def test_a_model_of_several_encoders_must_say_which(monkeypatch, call):
    monkeypatch.setattr("fs_plugins.training.psm.claim", lambda model: ("adapter", (call, call)))
    with pytest.raises(ModelError, match="2 vision encoders"):
        one_call(torch.nn.Identity())


def test_settings_are_read_from_a_file(tmp_path):
    (tmp_path / "train.yaml").write_text("sigma_range: [0.2, 0.3]\nlora: 4\nphotos: pictures\n", "utf-8")
    found = build(Settings, read(Settings, tmp_path / "train.yaml"))
    assert (found.sigma_range, found.lora, found.photos) == ((0.2, 0.3), 4, Path("pictures"))


def test_settings_and_the_command_cost_no_torch():
    code = (
        "import json, sys; import fs_plugins.training; from fs_plugins.training import Settings; "
        "import fs_plugins.cli.train; "
        "print(json.dumps([name for name in ('torch', 'transformers', 'diffusers', 'scipy') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
