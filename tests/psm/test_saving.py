"""Where a PSM is saved: through links, beside what else is there, and whole whenever it is stopped."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from dying import dying
from support import make_psm

from fs_plugins import PSM, PSMError, registry, sources
from fs_plugins.psm.bundle import CONFIG_NAME, WEIGHTS_NAME
from fs_plugins.sources import checksum
from fs_plugins.training.folder import TrainingFolder

ERRORS = (None, OSError("no space left on device"), KeyboardInterrupt())


def litter(folder: Path) -> list[str]:
    """What is hidden in a folder or beside it."""
    return sorted(path.name for path in [*folder.glob(".*"), *folder.parent.glob(".*")])


@pytest.fixture
def psms(call) -> tuple[PSM, PSM]:
    """An old one and a new one, of other weights and another sigma; small, as they are saved and read very often."""
    old, new = (make_psm(call, sigma=sigma, purifier=False) for sigma in (0.25, 0.5))
    with torch.no_grad():
        next(new.parameters()).add_(1)
    return old, new


@pytest.fixture
def kept(psms, tmp_path) -> Path:
    """The old one on disk, with a card and a folder of its own beside."""
    folder = tmp_path / "kept" / "psm"
    psms[0].save_pretrained(folder)
    (folder / "README.md").write_text("card", "utf-8")
    (folder / "runs").mkdir()
    (folder / "runs" / "log").write_text("log", "utf-8")
    return folder


@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize("links", [True, False])
def test_whenever_a_save_is_stopped_the_old_psm_or_the_new_one_is_there(
    psms, kept, tmp_path, monkeypatch, error, links
):
    psms[1].save_pretrained(tmp_path / "new")
    if not links:
        monkeypatch.setattr("fs_plugins.psm.bundle.os.link", lambda *_: (_ for _ in ()).throw(OSError("no links")))
    sums = [checksum(kept), checksum(tmp_path / "new")]
    found = set()
    for step in range(1, 100):
        folder = tmp_path / f"at{step}" / "psm"
        shutil.copytree(kept, folder)
        stopped = True
        with suppress(OSError, KeyboardInterrupt), dying(step, error) as done:
            psms[1].save_pretrained(folder)
            stopped = False
        sigma = PSM.from_pretrained(folder).config.sigma
        assert checksum(folder) == sums[sigma == 0.5]
        found.add((stopped, sigma))
        if stopped and done[step - 1] == "replace":
            assert sigma == 0.25, "only the last of them makes it the new one"
        assert (folder / "README.md").read_text("utf-8") == "card"
        assert (folder / "runs" / "log").read_text("utf-8") == "log"
        for psm in psms:  # and it goes on from there
            psm.save_pretrained(folder)
            assert PSM.from_pretrained(folder).config.sigma == psm.config.sigma
            assert not list(folder.glob(f".{WEIGHTS_NAME}-{'?' * 64}"))
        if len(done) < step:
            break
    assert step > 8
    assert {(True, 0.25), (False, 0.5)} <= found


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_whenever_a_first_save_is_stopped_nothing_looks_like_a_psm_or_all_of_it_is_there(psms, tmp_path, error):
    for step in range(1, 100):
        folder = tmp_path / f"at{step}" / "psm"
        with suppress(OSError, KeyboardInterrupt), dying(step, error) as done:
            psms[0].save_pretrained(folder)
        if (folder / CONFIG_NAME).exists():
            assert PSM.from_pretrained(folder).config.sigma == 0.25
        else:
            with pytest.raises(PSMError):
                PSM.from_pretrained(folder)
        psms[0].save_pretrained(folder)
        assert PSM.from_pretrained(folder).config.sigma == 0.25
        if len(done) < step:
            break
    assert step > 8


def test_an_error_leaves_nothing_hidden_behind(psms, kept):
    for step in range(1, 100):
        try:
            with dying(step, OSError("no space left on device")) as done:
                psms[1].save_pretrained(kept)
        except OSError:
            psms[0].save_pretrained(kept)
        assert litter(kept) == []
        if len(done) < step:
            break


def test_a_link_is_written_through_and_its_target_keeps_its_place(psms, kept, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(kept)
    psms[1].save_pretrained(link)
    assert link.is_symlink()
    assert link.resolve() == kept
    assert PSM.from_pretrained(kept).config.sigma == 0.5
    assert sorted(path.name for path in kept.iterdir()) == ["README.md", CONFIG_NAME, WEIGHTS_NAME, "runs"]
    assert [path.name for path in kept.parent.iterdir()] == ["psm"]


def test_a_link_to_what_is_not_there_yet_makes_it(psms, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "psm")
    psms[0].save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert PSM.from_pretrained(tmp_path / "disk" / "psm").config.sigma == 0.25


def test_weights_that_are_a_link_into_a_cache_leave_the_cache_as_it_was(psms, kept, tmp_path):
    blob = tmp_path / "blob"
    (kept / WEIGHTS_NAME).rename(blob)
    (kept / WEIGHTS_NAME).symlink_to(blob)
    before = blob.read_bytes()
    psms[1].save_pretrained(kept)
    assert blob.read_bytes() == before
    assert PSM.from_pretrained(kept).config.sigma == 0.5


def test_what_is_no_folder_is_said(psms, tmp_path):
    (tmp_path / "file").write_text("a thesis", "utf-8")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name in ("file", "loop", "link"):
        with pytest.raises(PSMError, match="give another"):
            psms[0].save_pretrained(tmp_path / name)
    assert (tmp_path / "file").read_text("utf-8") == "a thesis"
    assert os.readlink(tmp_path / "loop") == str(tmp_path / "loop")


def test_whenever_publishing_is_stopped_there_is_no_psm_or_all_of_it(psms, tmp_path):
    for step in range(1, 100):
        folder = TrainingFolder(tmp_path / f"at{step}")
        folder.path.mkdir()
        folder.save({"stage": "done"})
        with dying(step) as done:
            folder.publish(psms[0], "card")
        if folder.finished:
            assert PSM.from_pretrained(folder.path).config.sigma == 0.25
            assert (folder.path / "README.md").read_text("utf-8") == "card"
        else:
            assert (folder.path / "checkpoint.pt").exists()
        if len(done) < step:
            break
    assert step > 8
    assert folder.finished


def test_whenever_a_registry_is_written_to_the_old_one_or_the_new_one_is_there(tmp_path):
    entry = {"kind": "unet", "state": "not trained yet"}
    for step in range(1, 100):
        path = tmp_path / f"{step}.yaml"
        registry.put(_fresh(path), "purifiers", "old", entry)
        with dying(step) as done:
            registry.put(path, "purifiers", "new", entry)
        assert list(registry.load(path).purifiers) in (["old"], ["new", "old"])
        if len(done) < step:
            break
    assert step > 3
    assert list(registry.load(path).purifiers) == ["new", "old"]


def _fresh(path: Path) -> Path:
    path.write_text("", encoding="utf-8")
    return path


def test_bytes_are_compared_before_anything_of_a_download_is_parsed(kept, monkeypatch):
    monkeypatch.setattr(sources, "value", lambda path: pytest.fail("parsed"))
    assert checksum(kept)
