"""Commands that come back to a folder with a damaged file, or are given damaged data: a sentence, no traceback."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fs_plugins
from fs_plugins.cli import app
from fs_plugins.demo import assets, dataset, world
from fs_plugins.files import LOCK
from fs_plugins.hf.load import load_model

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "cut": lambda data: data[: len(data) // 2],
    "no text": lambda data: b"\xff\xfe" + data,
    "a list": lambda data: b"[1]\n",
    "deep": lambda data: b"[" * 50_000 + b"]" * 50_000 + b"\n",
    "a number": lambda data: b"3\n",
    "names of nothing": lambda data: b'{"a": {"b": null}}\n',
    "long number": lambda data: b'{"seed": ' + b"9" * 5000 + b"}\n",
    "flipped": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :],
}
FEW = 5


def ends(arguments: list[str]) -> str | None:
    """What is wrong with how a command ends, if anything is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return "".join(traceback.format_exception(result.exception))
    said = result.exit_code in (0, 1, 2) and len(result.output.split()) > 2 and "\x1b" not in result.output
    return None if said else f"it left with {result.exit_code} and said {result.output!r}"


def sweep(whole: Path, arguments: Callable[[Path], list[str]], tmp_path: Path, share: int | None) -> dict[str, str]:
    """Faults by file and damage: each file of a folder is damaged in each way in a copy of its own."""
    files = [path for path in sorted(whole.rglob("*")) if path.is_file() and not path.name.startswith(LOCK)]
    cases = [(path.relative_to(whole), damage) for path in files for damage in DAMAGE]
    chosen = cases if share is None else random.Random(whole.name).sample(cases, share)
    faults = {}
    for i, (name, damage) in enumerate(chosen):
        copy = tmp_path / str(i)
        shutil.copytree(whole, copy)
        (copy / name).write_bytes(DAMAGE[damage]((copy / name).read_bytes()))
        if fault := ends(arguments(copy)):
            faults[f"{name}, {damage}"] = fault
        shutil.rmtree(copy)
    return faults


every = pytest.mark.parametrize("share", [FEW, pytest.param(None, marks=pytest.mark.slow)], ids=["a few", "all"])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for i in range(4):
        world.scene("heldout", i).draw().save(root / f"{i}.png")
    return root


@every
def test_certificates_that_were_begun(pictures, tmp_path, share):
    def again(out: Path) -> list[str]:
        told = ["certify", pictures, "--model", "demo-clip", "--psm", "none", "--sigma", "0.25", "--n", "5", "--seed"]
        return [*map(str, told), "0", "--out", str(out)]

    assert CliRunner().invoke(app, again(tmp_path / "whole")).exit_code == 0
    assert not sweep(tmp_path / "whole", again, tmp_path, share)


@every
def test_a_training_that_ended(pictures, tmp_path, share):
    def again(out: Path) -> list[str]:
        short = ["--steps", "1", "--mapper-steps", "1", "--batch-size", "2", "--draws", "1", "--certify", "0"]
        return ["train", str(pictures), "--model", "demo-clip", "--out", str(out), *short]

    assert CliRunner().invoke(app, again(tmp_path / "whole")).exit_code == 0
    assert not sweep(tmp_path / "whole", again, tmp_path, share)


@every
def test_a_psm_of_others(pictures, tmp_path, share):
    def served(psm: Path) -> list[str]:
        told = [
            "certify",
            pictures / "0.png",
            "--model",
            "demo-clip",
            "--psm",
            psm,
            "--n",
            "5",
            "--out",
            tmp_path / "o",
        ]
        return list(map(str, told))

    assert not sweep(assets.PSM_CLIP, served, tmp_path, share)


@every
def test_a_model_of_others(pictures, tmp_path, share):
    assert not sweep(assets.CLIP, lambda model: ["doctor", str(model)], tmp_path, share)


@every
def test_a_dataset_of_others(tmp_path, share):
    whole = dataset.write(tmp_path / "whole", 2)

    def evaluated(data: Path) -> list[str]:
        told = ["evaluate", "--data", data, "--quick", "--model", "nowhere", "--out", tmp_path / "out"]
        return list(map(str, told))

    assert not sweep(whole, evaluated, tmp_path, share)


@pytest.mark.parametrize(
    "typed",
    [
        [b"--\x1b[31mx\x1b]0;t\x07"],
        [b"\xff\x1b[2J"],
        [b"certify", b"\xff[/INST].png"],
        [b"certify", b"--", b"-x=\x1b[2J"],
        [b"registry", b"show", b"=cmd\x9b[/]"],
    ],
)
def test_bytes_that_are_no_text_are_told_as_escapes(typed):
    done = subprocess.run([sys.executable, "-m", "fs_plugins.cli", *typed], capture_output=True)
    said = (done.stdout + done.stderr).decode("utf-8")
    assert done.returncode == 2
    assert len(said.split()) > 2
    assert "Traceback" not in said
    assert not set(said) & set("\x1b\x07\x9b")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("typed", [["--version"], ["--help"], ["registry", "list"], ["certify", "nowhere.png"]])
def test_standard_output_that_is_full_is_told_on_standard_error(typed):
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "fs_plugins.cli", *typed]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2
    assert done.stderr.startswith(b"Error")
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("text", ["[1]", "3", '[["a", 1]]', '"a"', "null", "{", "[" * 50_000])
def test_a_processor_that_is_none_counts_as_none(tmp_path, text):
    shutil.copytree(assets.CLIP, tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").write_text(text, "utf-8")
    model = load_model(str(tmp_path / "clip"))
    assert fs_plugins.vision_call(model).pixels.source.endswith("(no processor found beside the checkpoint)")
