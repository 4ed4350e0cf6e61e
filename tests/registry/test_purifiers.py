"""Purifiers by name: public checkpoints are verified, converted once, and no code in them is run."""

from __future__ import annotations

import hashlib
import pickle

import pytest
import torch
from guided_diffusion import TINY
from pydantic import ValidationError
from registering import SHIPPED, Bomb, any_size, corrupted, in_folder, in_one_file, killed, purifiers, truncated, write
from support import TinyEncoder, make_psm, tiny_call

import fs_plugins
from fs_plugins import PSM, PSMError, RegistryError
from fs_plugins.choice import find_psm
from fs_plugins.psm import PSMConfig
from fs_plugins.psm.diffusion import load_guided_diffusion
from fs_plugins.smoothing import FeatureSmoother


def test_a_bomb_goes_off_if_it_is_loaded(tmp_path):
    """The tests below could not fail otherwise."""
    torch.save({"w": Bomb(tmp_path / "mark")}, tmp_path / "model.pt")
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_that_bears_code_is_refused_and_nothing_in_it_is_run(online, tmp_path, legacy):
    torch.save({"w": Bomb(tmp_path / "mark")}, tmp_path / "model.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(PSMError, match="something other than tensors"):
        purifiers(tmp_path, **in_one_file(tmp_path / "model.pt")).purifier("mine")
    assert not (tmp_path / "mark").exists()


def test_a_pickle_in_the_place_of_safetensors_is_refused_and_nothing_in_it_is_run(call, tmp_path):
    make_psm(call).save_pretrained(tmp_path / "psm")
    data = pickle.dumps(Bomb(tmp_path / "mark"))
    old = hashlib.sha256((tmp_path / "psm" / "psm.safetensors").read_bytes()).hexdigest()
    (tmp_path / "psm" / "psm.safetensors").write_bytes(data)
    config = (tmp_path / "psm" / "config.json").read_text("utf-8")
    (tmp_path / "psm" / "config.json").write_text(config.replace(old, hashlib.sha256(data).hexdigest()), "utf-8")
    with pytest.raises(PSMError, match="does not hold the weights"):
        PSM.from_pretrained(tmp_path / "psm")
    assert not (tmp_path / "mark").exists()


def test_a_checkpoint_with_another_checksum_is_not_parsed(online, checkpoint, tmp_path, monkeypatch):
    known = purifiers(tmp_path, **{**in_one_file(checkpoint), "state": "folder", "path": str(checkpoint)})
    checkpoint.write_bytes(corrupted(checkpoint.read_bytes()))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("parsed before it was verified"))
    with pytest.raises(PSMError, match=r"The purifier 'mine' in .* does not have the registry's checksum"):
        known.purifier("mine")


def test_a_checkpoint_is_converted_once_into_a_psm_for_any_encoder(online, checkpoint, tmp_path, monkeypatch):
    reference = load_guided_diffusion(checkpoint, **TINY)
    known = purifiers(tmp_path, **in_one_file(checkpoint))
    first = known.purifier("mine")
    assert (first.config.name, first.config.sigma, first.config.sigma_range) == ("mine", 0.25, (0.1, 1.0))
    assert (first.config.image_size, first.config.fingerprint, first.mapped) == (None, (), ())
    assert not any(parameter.requires_grad for parameter in first.parameters())
    monkeypatch.setenv("FS_PLUGINS_OFFLINE", "1")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("converted again"))
    checkpoint.unlink()
    again = known.purifier("mine")
    assert again.config == first.config
    for size in ((8, 8), (16, 20)):
        images = torch.rand(2, 3, *size)
        expected = reference(images, 0.25)
        assert torch.equal(first.purify(images, 0.25), expected)
        assert torch.equal(again.purify(images, 0.25), expected)


def test_a_damaged_conversion_is_made_again(online, checkpoint, tmp_path):
    known = purifiers(tmp_path, **in_one_file(checkpoint))
    expected = known.purifier("mine").state_dict()
    (weights,) = online.glob("*-converted/psm.safetensors")
    weights.write_bytes(truncated(weights.read_bytes()))
    found = known.purifier("mine").state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.slow
def test_a_conversion_that_is_killed_leaves_nothing_that_looks_finished(online, checkpoint, tmp_path):
    known = purifiers(tmp_path, **in_one_file(checkpoint))
    script = f"""
import io
import time
from pathlib import Path
from fs_plugins import files, registry

whole = files.atomically

def half(path, write):
    def cut(file):
        buffer = io.BytesIO()
        write(buffer)
        file.write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
        file.flush()
        time.sleep(60)

    whole(path, cut if path.name == "psm.safetensors" else write)

files.atomically = half
registry.Registry([Path({str(tmp_path / "purifiers.yaml")!r})]).purifier("mine")
"""
    killed(script, lambda: [path for path in online.rglob(".psm.safetensors-*") if path.stat().st_size])
    assert not list(online.glob("*-converted/psm.safetensors"))
    assert not list(online.glob("*-converted/config.json"))
    assert known.purifier("mine").purifier is not None


def test_enable_takes_a_purifier_by_its_name(online, checkpoint, tmp_path, llava, monkeypatch):
    """A registry of the user's puts a small checkpoint in the public one's place."""
    entry = {"kind": "diffusion", "args": TINY, "sigma": 0.25, "sigma_range": [0.1, 1.0], **in_one_file(checkpoint)}
    write(tmp_path / "own.yaml", {"version": 1, "purifiers": {"diffusion": entry}})
    monkeypatch.setenv("FS_PLUGINS_REGISTRY", str(tmp_path / "own.yaml"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "diffusion").mkdir()
    with fs_plugins.enable(llava, psm="diffusion", sigma=0.5) as handle:
        (vision,) = handle.status().vision
        assert (vision.psm, vision.purifier, vision.sigma) == ("diffusion", "diffusion", 0.5)
    with pytest.raises(PSMError, match="is no PSM folder"):
        fs_plugins.enable(llava, psm="./diffusion")


def test_purifiers_that_are_none_are_told(online, call, tmp_path):
    with pytest.raises(RegistryError, match="'mine' is not trained yet"):
        purifiers(tmp_path, state="not trained yet", sigma=None, sigma_range=None).purifier("mine")
    with pytest.raises(RegistryError, match=r"'nobody' is no purifier.*Trained ones: .*diffusion"):
        SHIPPED.purifier("nobody")
    make_psm(call).save_pretrained(tmp_path / "psm")
    facts = in_folder(tmp_path)
    with pytest.raises(PSMError, match="no mapper"):
        purifiers(tmp_path, **facts).purifier("mine")


def test_a_psm_without_mappers_may_serve_any_size_and_encoder(call, llava, tmp_path, monkeypatch):
    any_size(call).save_pretrained(tmp_path / "psm")
    facts = in_folder(tmp_path)
    purifier = purifiers(tmp_path, **facts).purifier("mine")
    for other in (call, fs_plugins.vision_call(llava)):
        purifier.check(other, 0.25)
        assert find_psm(other, purifier, None, pytest.fail) == (purifier, []), "and nobody is warned of other weights"
    free = tiny_call(TinyEncoder(), image_size=None)
    smoother = FeatureSmoother(free, psm=purifier, sigma=0.25, seed=0)
    assert smoother.smooth(torch.rand(1, 3, 8, 8))["tokens"].shape == (1, 4, 6)


@pytest.mark.parametrize("change", [{"image_size": None}, {"fingerprint": ()}])
def test_a_mapper_belongs_to_one_encoder(call, change):
    config = make_psm(call).config.model_dump()
    with pytest.raises(ValidationError, match="a mapper belongs to one encoder"):
        PSMConfig.model_validate(config | change)
