"""What cannot be written: a file in the way, a full disk. A sentence and exit code 2, and nothing is half written."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import pytest
import torch
from support import make_psm, scenes, tiny_call
from typer.testing import CliRunner

import fs_plugins
from fs_plugins import OutputError, files, kept
from fs_plugins.certificates import folder, pictures_of
from fs_plugins.certificates.certifiers import Features
from fs_plugins.certificates.plan import Plan
from fs_plugins.cli import app
from fs_plugins.hf.load import load_model

QUICK = ("--steps", "1", "--mapper-steps", "1", "--batch-size", "2", "--draws", "1", "--certify", "0")


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def pictures(tmp_path) -> Path:
    return scenes(tmp_path / "pictures", 4)


def commands(pictures: Path, out: Path) -> dict[str, list[str]]:
    told = {
        "certify": ["certify", pictures, "--psm", "none", "--sigma", "0.25", "--n", "5", "--out", out],
        "train": ["train", pictures, "--model", "demo-clip", "--out", out, *QUICK],
        "evaluate": ["evaluate", "--suite", "table3", "--quick", "--images", "2", "--steps", "1", "--out", out],
        "demo": ["demo", "--images", "11", "--steps", "1", "--out", out],
    }
    return {name: list(map(str, arguments)) for name, arguments in told.items()}


def refused(arguments: list[str], **env: str) -> str:
    result = CliRunner().invoke(app, arguments, env=env)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


@pytest.mark.parametrize("command", ["certify", "train", "evaluate", "demo"])
@pytest.mark.parametrize("below", [False, True])
def test_a_file_where_a_folder_should_be_is_told_and_stays(pictures, tmp_path, command, below):
    (tmp_path / "file").write_text("mine", "utf-8")
    out = tmp_path / "file" / "out" if below else tmp_path / "file"
    assert str(tmp_path / "file") in refused(commands(pictures, out)[command])
    assert (tmp_path / "file").read_text("utf-8") == "mine"


@pytest.mark.parametrize("command", ["certify", "train", "demo"])
def test_a_full_disk_is_told_and_nothing_is_half_written(pictures, tmp_path, command, monkeypatch):
    monkeypatch.setattr(os, "fsync", full)
    assert os.strerror(errno.ENOSPC) in refused(commands(pictures, tmp_path / "out")[command])
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and not path.name.startswith(".lock")]
    assert not left


def test_a_registry_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("", "utf-8")
    psm = make_psm(tiny_call(torch.nn.Linear(1, 1)))
    psm.save_pretrained(tmp_path / "psm")
    place = str(tmp_path / "file" / "registry.yaml")
    assert place in refused(["registry", "add", str(tmp_path / "psm")], FS_PLUGINS_REGISTRY=place)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: files.replace(path, "text"),
        lambda path: files.atomically(path, lambda file: torch.save({"a": torch.zeros(9)}, file)),
        lambda path: files.begun(path),
        lambda path: kept.Lines(path).append([{"a": 1}]),
        lambda path: kept.write(path, {"a": 1}),
        lambda path: kept.hold(path, {"a": 1}, "a run"),
        lambda path: make_psm(tiny_call(torch.nn.Linear(1, 1))).save_pretrained(path),
    ],
    ids=["replace", "atomically", "begun", "append", "write", "hold", "save_pretrained"],
)
def test_every_writer_names_the_place_in_an_error_of_ours(tmp_path, write):
    (tmp_path / "file").write_text("mine", "utf-8")
    with pytest.raises(OutputError, match=r"file/x cannot be written: (Not a directory|File exists)\. Make room"):
        write(tmp_path / "file" / "x")
    assert (tmp_path / "file").read_text("utf-8") == "mine"


@pytest.mark.parametrize("at", ["fsync", "replace", "chmod"])
def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path, monkeypatch, at):
    files.replace(tmp_path / "x", "old")
    monkeypatch.setattr(os, at, full)
    with pytest.raises(OutputError, match="No space left"):
        files.replace(tmp_path / "x", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text("utf-8") == "old"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_torchs_own_writer_on_a_full_disk_is_understood(tmp_path, monkeypatch):
    def opened(handle: int, mode: str) -> io.FileIO:
        os.close(handle)
        return io.FileIO("/dev/full", "wb")

    monkeypatch.setattr(os, "fdopen", opened)
    with pytest.raises(OutputError, match="No space left"):
        files.atomically(tmp_path / "x", lambda file: torch.save({"a": torch.zeros(99)}, file))
    assert not list(tmp_path.iterdir())


def test_the_python_verbs_raise_it_too(pictures, tmp_path):
    (tmp_path / "file").write_text("", "utf-8")
    model = load_model("demo")
    call = fs_plugins.vision_call(model)
    found = pictures_of([pictures], call.image_size)
    with pytest.raises(OutputError, match="file/rows"):
        fs_plugins.certify(model, found, n=5, psm="none", sigma=0.25, out=tmp_path / "file" / "rows.jsonl")
    smoother = fs_plugins.smoothers(model, psm="none", sigma=0.25)[0]
    run = folder.FolderRun(tmp_path / "file" / "out", found, {"rows.jsonl": Features(smoother, Plan(n=5), [])})
    run.check()
    with pytest.raises(fs_plugins.FSPluginsError, match="cannot be written"), run.held():
        run.certify()


@pytest.mark.parametrize("prompt", ["a {} {}", "a", "a {0}", "a {name}", "{", "}", "{:d}", "{!r}", "{.x}", "{} {x}"])
def test_a_prompt_with_other_braces_than_one_pair_is_refused(pictures, tmp_path, prompt):
    arguments = ["certify", str(pictures), "--model", "demo-clip", "--classes", "star, cross", "--prompt", prompt]
    assert "The prompt must say where the class goes" in refused([*arguments, "--out", str(tmp_path / "out")])


def test_a_prompt_may_hold_braces_that_stay():
    from fs_plugins.hf.zeroshot import directions_of

    model = load_model("demo-clip")
    from fs_plugins.hf.load import source

    assert set(directions_of(model, source("demo-clip"), ["star", "cross"], "a {{x}} {}")) == {"star", "cross"}
