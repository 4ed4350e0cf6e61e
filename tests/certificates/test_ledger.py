"""The file of certificates: what an interrupted run goes on from, and what is refused."""

from __future__ import annotations

import json
import re

import pytest
import torch
from support import make_llava, make_psm

import fs_plugins
from fs_plugins import Certificate, SettingError
from fs_plugins.certificates.ledger import Ledger, merge
from fs_plugins.certificates.plan import Plan


def test_an_interrupted_run_goes_on_and_gives_the_same_rows(images, tmp_path):
    llava = make_llava()
    settings = {"n": 40, "psm": None, "sigma": 0.1}
    named = dict(zip("abc", images, strict=True))
    whole = fs_plugins.certify(llava, named, **settings, out=tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_text("utf-8").splitlines(keepends=True)
    assert [json.loads(line).get("image") for line in lines] == [None, "a", "b", "c"]
    cut = tmp_path / "cut.jsonl"
    cut.write_text("".join(lines[:2]) + lines[2][:50], "utf-8")
    draws = []
    again = fs_plugins.certify(llava, named, **settings, out=cut, advance=draws.append)
    assert again == whole
    assert cut.read_text("utf-8") == (tmp_path / "whole.jsonl").read_text("utf-8")
    assert draws[0] == 40, "the finished image is not drawn again"
    assert sum(draws[1:]) == 2 * (40 + Plan(n=40).pilot)


def test_a_ledger_of_another_run_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    Ledger(path, Certificate, {"n": 10, "sigma": 0.25}, b"key")
    assert Ledger(path, Certificate, {"n": 10, "sigma": 0.25}, b"other").key == b"key"
    with pytest.raises(SettingError, match=r"other settings \(n\)"):
        Ledger(path, Certificate, {"n": 20, "sigma": 0.25}, b"key")
    path.write_text("something else\n", "utf-8")
    with pytest.raises(SettingError, match="not a file of certificates"):
        Ledger(path, Certificate, {}, b"key")


def test_rows_of_another_model_or_another_image_are_never_handed_out(images, tmp_path):
    settings = {"n": 20, "psm": None, "sigma": 0.1, "seed": 0, "out": tmp_path / "rows.jsonl"}
    fs_plugins.certify(make_llava(), images[:1], **settings)
    other = make_llava()
    with torch.no_grad():
        next(other.model.vision_tower.parameters()).add_(0.5)
    with pytest.raises(SettingError, match=r"other settings \(encoder\)"):
        fs_plugins.certify(other, images[:1], **settings)
    with pytest.raises(SettingError, match="another image called 0"):
        fs_plugins.certify(make_llava(), images[1:2], **settings)


def test_rows_of_a_whole_psm_are_not_those_of_its_parts(images, tmp_path):
    llava = make_llava()
    psm = make_psm(fs_plugins.vision_call(llava), sigma=0.1)
    settings = {"n": 20, "seed": 0, "out": tmp_path / "rows.jsonl"}
    fs_plugins.certify(llava, images, psm=psm, **settings)
    for other in (psm.only(mapper=False), make_psm(fs_plugins.vision_call(llava), sigma=0.1, purifier=False)):
        with pytest.raises(SettingError, match=r"other settings \(psm"):
            fs_plugins.certify(llava, images, psm=other, **settings)


def test_a_foreign_file_is_never_overwritten(images, tmp_path):
    for text in ("precious single line", "precious\nlines\n"):
        (tmp_path / "notes.txt").write_text(text, "utf-8")
        with pytest.raises(SettingError, match="not a file of certificates"):
            fs_plugins.certify(make_llava(), images, n=10, psm=None, sigma=0.1, out=tmp_path / "notes.txt")
        assert (tmp_path / "notes.txt").read_text("utf-8") == text


def test_rows_of_several_processes_are_merged_in_order_or_refused(images, tmp_path):
    llava = make_llava()
    named = dict(zip("abc", images, strict=True))
    settings = {"n": 20, "psm": None, "sigma": 0.1, "seed": 3, "background": list(images)}
    whole = fs_plugins.certify(llava, named, **settings, out=tmp_path / "whole.jsonl")
    parts = [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
    fs_plugins.certify(llava, {"a": images[0], "c": images[2]}, **settings, out=parts[0])
    fs_plugins.certify(llava, {}, **settings, out=parts[1])
    with pytest.raises(SettingError, match="No process certified b"):
        merge(parts, tmp_path / "merged.jsonl", list(named), Certificate)
    fs_plugins.certify(llava, {"b": images[1]}, **settings, out=parts[1])
    assert list(merge(parts, tmp_path / "merged.jsonl", list(named), Certificate).values()) == whole
    assert (tmp_path / "merged.jsonl").read_text("utf-8") == (tmp_path / "whole.jsonl").read_text("utf-8")
    assert not any(part.exists() for part in parts)
    again = tmp_path / "again.jsonl"
    again.write_text((tmp_path / "merged.jsonl").read_text("utf-8"), "utf-8")
    assert list(merge([again], tmp_path / "merged.jsonl", ["b"], Certificate)) == ["b"]
    assert (tmp_path / "merged.jsonl").read_text("utf-8").count("\n") == 4, (
        "rows of images that are not asked for now are kept"
    )


@pytest.fixture
def ledger(images, tmp_path):
    """A file of two finished images, and the call that made it."""
    path, llava = tmp_path / "rows.jsonl", make_llava()

    def certify():
        return fs_plugins.certify(llava, images[:2], n=20, psm=None, sigma=0.1, seed=0, out=path)

    certify()
    return path, certify


@pytest.mark.parametrize("tail", [b'{"image": "2", "sha', b"\xff\xfe\x00", b"\0" * 700])
def test_an_unfinished_last_line_is_dropped_whatever_it_is(ledger, tail):
    path, certify = ledger
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert len(certify()) == 2
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + tail)
    certify()
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("line", "damage"),
    [
        (0, b"[]"),
        (0, b'{"settings": 3, "key": "00"}'),
        (0, b'{"settings": {}, "key": "no digits"}'),
        (0, b'{"settings": {}}'),
        (1, b"\xff"),
        (1, b"{"),
        (1, b"7"),
        (1, b'{"image": "0", "sha256": ""}'),
        (1, b'{"image": "0", "sha256": "", "certificate": {}}'),
        (2, b'{"image": "1", "sha256": "", "certificate": null}'),
    ],
)
def test_other_damage_is_told_in_a_sentence_and_nothing_is_lost(ledger, line, damage):
    path, certify = ledger
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line] = damage + b"\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(SettingError, match=re.escape(str(path))) as told:
        certify()
    assert line == 0 or "utf-8" in str(told.value) or f"line {line + 1}" in str(told.value)
    with pytest.raises(SettingError, match=re.escape(str(path))):
        merge([path], path.with_name("merged.jsonl"), ["0"], Certificate)
    assert path.read_bytes() == b"".join(lines)


def test_a_file_that_cannot_be_written_or_read_is_told(images, tmp_path):
    settings = {"n": 10, "psm": None, "sigma": 0.1, "seed": 0}
    with pytest.raises(SettingError, match="cannot be read"):
        fs_plugins.certify(make_llava(), images, **settings, out=tmp_path)
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(SettingError, match="cannot be"):
        fs_plugins.certify(make_llava(), images, **settings, out=tmp_path / "file" / "rows.jsonl")


def test_parts_are_removed_only_when_the_merged_file_is_on_disk(ledger, tmp_path, monkeypatch):
    path, _ = ledger
    flushed: list[bytes] = []

    def fsync(handle):
        flushed.append(b"")
        if len(flushed) == 1:
            raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(SettingError, match="No space left"):
        merge([path], tmp_path / "merged.jsonl", ["0", "1"], Certificate)
    assert path.exists()
    assert not (tmp_path / "merged.jsonl").exists()
    unlink = type(path).unlink
    before: list[int] = []
    monkeypatch.setattr(type(path), "unlink", lambda *told, **how: (before.append(len(flushed)), unlink(*told, **how)))
    merge([path], tmp_path / "merged.jsonl", ["0", "1"], Certificate)
    assert before == [3], "the file and its folder are flushed first"
    assert not path.exists()


def test_a_process_that_wrote_nothing_is_no_traceback(ledger, tmp_path):
    path, _ = ledger
    (tmp_path / "empty.jsonl").write_text("", "utf-8")
    parts = [path, tmp_path / "empty.jsonl", tmp_path / "none.jsonl"]
    with pytest.raises(SettingError, match="No process certified 2"):
        merge(parts, tmp_path / "merged.jsonl", ["0", "2"], Certificate)
    assert list(merge(parts, tmp_path / "merged.jsonl", ["1", "0"], Certificate)) == ["1", "0"]
    assert [one.name for one in tmp_path.glob("[!.]*")] == ["merged.jsonl"]
