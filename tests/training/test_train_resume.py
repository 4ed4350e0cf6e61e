"""A training that is stopped, at whatever moment, goes on to the result it would have had."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_trainings import Blobs, config, flat
from support import TinyEncoder, tiny_call
from torch import nn

from fs_plugins import PSM, PSMError, SettingError
from fs_plugins.psm import Part
from fs_plugins.training import Stage, TrainingFolder, folder, robustness_score, train_psm
from fs_plugins.training import psm as training

STEPS = {
    "purifier_stage": Stage(steps=7, batch_size=4, draws=2, lr=1e-3, warmup=2, ema=0.8, accumulate=2),
    "mapper_stage": Stage(steps=5, batch_size=4, draws=2, lr=1e-3, warmup=2),
    "sigma_range": (0.2, 0.3),
}


class StopError(Exception):
    """In place of a kill."""


def run(out, *, stop: tuple[str, int] | None = None, images=None, name: str = "t", accelerator=None, **changes) -> PSM:
    """A short training, which stops after a step."""

    def report(stage, step, steps, losses):
        if (stage, step) == stop:
            raise StopError

    kept = TrainingFolder(out, save_every=3, log_every=2, held=Blobs(4).images) if out else None
    chosen = config(**{**STEPS, **changes})
    call = tiny_call(TinyEncoder())
    return train_psm(
        call, images or Blobs(8), chosen, name=name, encoder="e", out=kept, report=report, accelerator=accelerator
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted training and its folder."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return run(out), out


def test_a_folder_changes_nothing_about_the_result(whole):
    assert torch.equal(flat(run(None)), flat(whole[0]))


def test_the_score_that_is_logged_is_that_of_what_is_served(whole):
    call, held = tiny_call(TinyEncoder()), Blobs(4).images
    rows = {
        tuple(row.split(",")[:2]): row.split(",")[-1] for row in (whole[1] / "log.csv").read_text("utf-8").splitlines()
    }
    for last, psm in ((("purifier", "7"), whole[0].only(mapper=False)), (("mapper", "5"), whole[0])):
        assert rows[last] == f"{robustness_score(call, psm, held, 0.25):.6g}"


@pytest.mark.parametrize(
    "stops",
    [
        [("purifier", 1)],
        [("purifier", 3)],
        [("purifier", 4), ("purifier", 7)],
        [("mapper", 1)],
        [("purifier", 5), ("mapper", 3), ("mapper", 4), ("mapper", 5)],
    ],
    ids=str,
)
def test_a_stopped_training_goes_on_to_the_same_weights_and_the_same_log(whole, tmp_path, stops):
    for stop in stops:
        with pytest.raises(StopError):
            run(tmp_path / "out", stop=stop)
    psm = run(tmp_path / "out")
    assert torch.equal(flat(psm), flat(whole[0]))
    log = (tmp_path / "out" / "log.csv").read_text("utf-8")
    assert log == (whole[1] / "log.csv").read_text("utf-8")
    rows = [row.split(",")[:2] for row in log.splitlines()]
    assert rows[1:] == [["purifier", n] for n in "2467"] + [["mapper", n] for n in "245"]


def test_a_finished_training_is_not_repeated(whole):
    told = []
    call = tiny_call(TinyEncoder())
    again = train_psm(
        call, Blobs(8), config(**STEPS), name="t", encoder="e", out=whole[1], report=lambda *step: told.append(step)
    )
    assert not told
    assert torch.equal(flat(again), flat(whole[0]))


@pytest.mark.parametrize("kind", ["fp32", "bf16", "scaled"])
def test_accelerate_resumes_as_well_in_half_precision_and_with_a_loss_scale(whole, tmp_path, kind):
    accelerate = pytest.importorskip("accelerate")

    def crew():
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        made = accelerate.Accelerator(cpu=True, mixed_precision="bf16" if kind == "bf16" else "no")
        if kind == "scaled":  # what fp16 has on a GPU; its gradients are clipped before they are unscaled here
            made.scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=2)
        return made

    try:
        expected = run(None, accelerator=crew())
        assert torch.equal(flat(expected), flat(whole[0])) == (kind == "fp32")
        for stop in (("purifier", 5), ("mapper", 1), ("mapper", 4)):
            with pytest.raises(StopError):
                run(tmp_path / "out", stop=stop, accelerator=crew())
        kept = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
        assert (kept["stage"], kept["step"]) == ("mapper", 3)
        assert kind != "scaled" or kept["scaler"]["scale"] == 2.0, "it starts anew with each stage"
        assert torch.equal(flat(run(tmp_path / "out", accelerator=crew())), flat(expected))
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


class Dropout(nn.Module):
    """A plugin's purifier that asks torch's global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, images, sigma):
        return nn.functional.dropout(images * self.scale, 0.3, self.training)


def test_purifiers_with_dropout_resume_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "plugin_parts", lambda: {"purifiers": {"dropout": Dropout}, "mappers": {}})
    own = {"purifier": Part(kind="dropout"), "mapper": None}
    expected = run(None, **own)
    with pytest.raises(StopError):
        run(tmp_path / "out", stop=("purifier", 5), **own)
    torch.manual_seed(99)
    assert torch.equal(flat(run(tmp_path / "out", **own)), flat(expected))


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(whole, tmp_path, monkeypatch):
    real = torch.save

    def killed(state, file):
        if state["step"] == 6:
            file.write(b"half a che")
            raise StopError
        real(state, file)

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(StopError):
        run(tmp_path / "out")
    assert torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["step"] == 3
    monkeypatch.setattr(torch, "save", real)
    assert torch.equal(flat(run(tmp_path / "out")), flat(whole[0]))


def test_what_is_left_of_a_first_write_does_not_make_the_folder_somebody_elses(whole, tmp_path):
    (tmp_path / ".training.json").write_text("half", "utf-8")
    assert torch.equal(flat(run(tmp_path)), flat(whole[0]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lambda3": 2.0}, r"config\.lambda3 was 1\.0 and is 2\.0 now"),
        ({"seed": 3}, r"config\.seed was 0 and is 3 now"),
        ({"mapper_stage": replace(STEPS["mapper_stage"], steps=6)}, r"config\.mapper_stage\.steps was 5 and is 6 now"),
        (
            {"purifier": Part(kind="unet", args={"channels": [8, 8], "unshuffle": 2})},
            r"config\.purifier\.args\.channels",
        ),
        ({"images": Blobs(9)}, r"images was 8 images, \w+ and is 9 images"),
        ({"name": "other"}, "name was t and is other now"),
    ],
)
def test_another_training_is_refused_with_what_is_different(whole, changes, message):
    before = {path: path.stat().st_mtime_ns for path in whole[1].iterdir()}
    with pytest.raises(SettingError, match=message):
        run(whole[1], **changes)
    assert {path: path.stat().st_mtime_ns for path in whole[1].iterdir()} == before


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work", "utf-8")
    with pytest.raises(SettingError, match="holds no training"):
        run(tmp_path)
    with pytest.raises(SettingError, match="holds no training"):
        run(tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_damaged_files_are_named(whole, tmp_path):
    with pytest.raises(StopError):
        run(tmp_path / "out", stop=("purifier", 4))
    data = (tmp_path / "out" / "checkpoint.pt").read_bytes()
    (tmp_path / "out" / "checkpoint.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(SettingError, match=r"checkpoint\.pt is damaged .* Delete it"):
        run(tmp_path / "out")
    (tmp_path / "out" / "checkpoint.pt").unlink()
    assert torch.equal(flat(run(tmp_path / "out")), flat(whole[0]))
    (tmp_path / "out" / "training.json").write_text("{", "utf-8")
    with pytest.raises(SettingError, match=r"training\.json is not what a training wrote"):
        run(tmp_path / "out")


def test_a_row_that_was_cut_off_is_dropped(tmp_path):
    kept = TrainingFolder(tmp_path)
    kept.begin({}, {"purifier": 40, "mapper": 9}, "purifier", 0)
    for stage, step in (("purifier", 10), ("purifier", 20), ("mapper", 5)):
        kept.log(stage, step, {"l_rb": 0.5})
    with (tmp_path / "log.csv").open("a", encoding="utf-8") as file:
        file.write("mapper,1")  # of 12
    TrainingFolder(tmp_path).begin({}, {"purifier": 40, "mapper": 9}, "mapper", 9)
    rows = (tmp_path / "log.csv").read_text("utf-8").splitlines()
    assert rows[1:] == ["purifier,10,,,,0.5,,,,", "purifier,20,,,,0.5,,,,", "mapper,5,,,,0.5,,,,"]
    TrainingFolder(tmp_path).begin({}, {"purifier": 40, "mapper": 9}, "purifier", 15)
    assert (tmp_path / "log.csv").read_text("utf-8").splitlines()[1:] == ["purifier,10,,,,0.5,,,,"]


def test_tensorboard_has_each_step_once_after_a_resume(tmp_path):
    board = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first in (0, 4):
        kept = TrainingFolder(tmp_path, tensorboard=True)
        kept.begin({}, {"purifier": 6, "mapper": 3}, "purifier", first)
        for step in range(first + 1, 7):
            kept.log("purifier", step, {"l_rb": step / 10})
    events = board.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("purifier/l_rb")] == list(range(1, 7))


def test_there_is_a_psm_only_when_all_of_it_is_there(whole, tmp_path, monkeypatch):
    kept = TrainingFolder(tmp_path)
    kept.begin({}, {"purifier": 1}, "done", 0)
    kept.save({"stage": "done"})
    real = os.replace

    def killed(source, target):
        if Path(target) == tmp_path / "config.json":
            raise StopError
        real(source, target)

    monkeypatch.setattr(folder.os, "replace", killed)
    with pytest.raises(StopError):
        kept.publish(whole[0], "# card\n")
    with pytest.raises(PSMError, match=r"config\.json is missing"):
        PSM.from_pretrained(tmp_path)
    assert (tmp_path / "checkpoint.pt").exists()
    monkeypatch.setattr(folder.os, "replace", real)
    kept.publish(whole[0], "# card\n")
    assert torch.equal(flat(PSM.from_pretrained(tmp_path)), flat(whole[0]))
    names = {path.name for path in tmp_path.iterdir()}
    assert {"README.md", "config.json", "psm.safetensors", "log.csv", "training.json"} <= names
    assert "checkpoint.pt" not in names
    assert not (tmp_path / ".psm").exists()


SCRIPT = """
import sys
sys.path[:0] = {tests!r}
from test_train_resume import killable
killable({out!r})
"""


def killable(out: str) -> None:
    """A training of a few seconds that saves at every step."""
    chosen = config(
        purifier_stage=Stage(steps=60, batch_size=8, draws=2, lr=1e-3, ema=0.9),
        mapper_stage=Stage(steps=60, batch_size=8, draws=2, lr=1e-3),
    )
    kept = TrainingFolder(out, save_every=1, log_every=1)
    psm = train_psm(tiny_call(TinyEncoder()), Blobs(16), chosen, name="t", encoder="e", out=kept, workers=2)
    kept.publish(psm, "# card\n")


@pytest.mark.slow
def test_a_training_survives_sigkill_at_arbitrary_moments(tmp_path):
    out, expected = tmp_path / "killed", tmp_path / "whole"
    killable(str(expected))
    script = SCRIPT.format(tests=[str(Path(__file__).parent), str(Path(__file__).parents[1])], out=str(out))
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    seconds = random.Random(time.time())
    kills = 0
    while kills < 2:
        process = subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE)
        began = (out / "log.csv").stat().st_mtime_ns if (out / "log.csv").exists() else 0
        while process.poll() is None and not (
            (out / "log.csv").exists() and (out / "log.csv").stat().st_mtime_ns > began
        ):
            time.sleep(0.01)
        time.sleep(seconds.uniform(0, 0.7))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()
        assert not (out / "config.json").exists()
        kills += 1
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(flat(PSM.from_pretrained(out)), flat(PSM.from_pretrained(expected)))
    for name in ("log.csv", "psm.safetensors", "config.json"):
        assert (out / name).read_bytes() == (expected / name).read_bytes()
    assert json.loads((out / "training.json").read_text("utf-8"))["name"] == "t"
