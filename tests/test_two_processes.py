"""Two real processes that want one folder or file: the second is told who has it, or waits; nobody loses a thing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support import TinyEncoder, command_line, scenes, tiny_call
from typer.testing import CliRunner

import fs_plugins
from fs_plugins import SettingError, registry
from fs_plugins.cli import app
from fs_plugins.psm import Part
from fs_plugins.training import Stage, TrainingConfig, train_psm

HOLD = "import sys; from pathlib import Path; from fs_plugins.files import {0}\nwith {0}(Path(sys.argv[1]), 'it'):\n"
HOLD += "    print('held', flush=True); sys.stdin.read()"
PUT = """
import sys
from pathlib import Path
from fs_plugins import files, registry_files
files.begun(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for i in range(15):
    entry = {"kind": "unet", "state": "not trained yet"}
    registry_files.put(Path(sys.argv[1]), "purifiers", f"{sys.argv[2]}{i}", entry)
"""


@contextmanager
def process(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A process of this script that has said its first word."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=environment) as started:
        assert started.stdout is not None
        assert started.stdin is not None
        assert started.stdout.readline()
        yield started
        started.stdin.close()
        assert started.wait() == 0


@pytest.fixture
def picture(tmp_path) -> Path:
    return scenes(tmp_path / "pictures", 3)


COMMANDS = {
    "certify": ["certify", "{pictures}", "--n", "20", "--seed", "0"],
    "evaluate": ["evaluate", "--suite", "table1", "--quick", "--images", "2"],
    "demo": ["demo"],
    "train": [
        "train",
        "{pictures}",
        "--model",
        "demo-clip",
        "--steps",
        "2",
        "--mapper-steps",
        "2",
        "--batch-size",
        "2",
    ],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_told_which_process_has_its_folder(name, picture, tmp_path):
    if name == "train":
        pytest.importorskip("accelerate")
    out = tmp_path / "out"
    with process(HOLD.format("locked"), out) as other:
        command = [word.format(pictures=picture) for word in COMMANDS[name]]
        result = CliRunner().invoke(app, [*command, "--out", str(out)])
        assert result.exit_code == 2, result.output
        assert f"is in use by process {other.pid} on" in " ".join(result.output.split())
    assert not any(out.glob("[!.]*")), "nothing was begun"


@pytest.mark.parametrize("verb", ["certify", "certify_predictions"])
def test_a_file_of_certificates_has_one_writer(verb, images, clip, tmp_path):
    smoother, path = fs_plugins.smoothers(clip, psm=None, sigma=0.1)[0], tmp_path / "rows.jsonl"

    def run():
        beside = {"certify_predictions": (torch.eye(24)[:2],)}.get(verb, ())
        return getattr(fs_plugins, verb)(smoother, images, *beside, n=20, seed=0, out=path)

    with process(HOLD.format("locked_file"), path) as other:
        with pytest.raises(SettingError, match=rf"rows\.jsonl is in use by process {other.pid} on .* another file"):
            run()
        assert not path.exists()
    assert len(run()) == 3


def test_a_training_in_python_is_told_too(tmp_path):
    stage = Stage(steps=2, batch_size=2, draws=1, lr=1e-3, warmup=1)
    config = TrainingConfig(
        purifier=Part(kind="unet", args={"channels": [8, 8], "unshuffle": 2}),
        mapper=None,
        purifier_stage=stage,
        mapper_stage=stage,
    )
    pictures = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with process(HOLD.format("locked"), tmp_path) as other:
        with pytest.raises(SettingError, match=f"in use by process {other.pid}"):
            train_psm(tiny_call(TinyEncoder()), pictures, config, name="t", encoder="e", out=tmp_path)
        assert not any(tmp_path.glob("[!.]*"))


def test_two_processes_put_entries_into_a_registry_and_none_is_lost(tmp_path):
    path = tmp_path / "registry.yaml"
    with process(PUT, path, "one") as one, process(PUT, path, "two") as two:
        for writer in (one, two):
            writer.stdin.write("go\n")
            writer.stdin.flush()
    assert set(registry.load(path).purifiers) == {f"{who}{i}" for who in ("one", "two") for i in range(15)}


def test_a_name_that_another_process_took_meanwhile_is_refused(tmp_path):
    path = tmp_path / "registry.yaml"
    path.write_text("version: 1\n", "utf-8")
    entry = {"kind": "unet", "state": "not trained yet"}
    registry.put(path, "purifiers", "mine", entry, replace=False)
    with pytest.raises(fs_plugins.RegistryError, match=r"'mine' is in .* already"):
        registry.put(path, "purifiers", "mine", entry, replace=False)


STRANGERS = ("summary.json", "report.html", "table1.csv", "table.csv", "demo.png", "certificates.png", "README.md")


@pytest.mark.parametrize("stranger", STRANGERS)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_of_others_is_left_as_it_is(name, stranger, picture, tmp_path):
    if name == "train":
        pytest.importorskip("accelerate")
    out = tmp_path / "out"
    (out / "results").mkdir(parents=True)
    (out / stranger).write_text("years of work", "utf-8")
    command = [word.format(pictures=picture) for word in COMMANDS[name]]
    result = CliRunner().invoke(app, [*command, "--out", str(out)])
    assert result.exit_code == 2, result.output
    assert "choose another folder or empty it" in " ".join(result.output.split())
    assert {path.name for path in out.glob("[!.]*")} == {"results", stranger}
    assert (out / stranger).read_text("utf-8") == "years of work"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_in_place_of_the_folder_is_a_sentence(name, picture, tmp_path):
    (tmp_path / "out").write_text("years of work", "utf-8")
    command = [word.format(pictures=picture) for word in COMMANDS[name]]
    result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2, result.output
    assert (tmp_path / "out").read_text("utf-8") == "years of work"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["certify", "evaluate", "train"])
def test_of_two_commands_in_one_folder_one_does_all_and_one_is_told(name, picture, tmp_path):
    command = [word.format(pictures=picture) for word in COMMANDS[name]]
    arguments = [sys.executable, "-m", "fs_plugins.cli", *command, "--out", str(tmp_path / "out")]
    both = [subprocess.Popen(arguments, stdout=-1, stderr=-2, text=True) for _ in range(2)]
    told = [one.communicate()[0] for one in both]
    codes = sorted(one.returncode for one in both)
    assert codes in ([0, 0], [0, 2]), told
    # By process N, or, in the moment before that one has written its name, by another process.
    assert codes == [0, 0] or any("is in use by " in " ".join(one.split()) for one in told), told
    again = command_line(1, *command, "--out", tmp_path / "out")
    assert again.returncode == 0, again.stdout
