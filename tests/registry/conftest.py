"""Registries, sites, hubs and checkpoints of one test's own."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from guided_diffusion import TINY, GuidedDiffusion
from registering import COMMIT, DATA
from support import make_psm

import fs_plugins
from fs_plugins import registry, sources
from fs_plugins.identity import fingerprint


@pytest.fixture
def online(tmp_path, monkeypatch):
    """An empty cache, no registry of the user's, and leave to fetch."""
    for name in ("FS_PLUGINS_REGISTRY", *sources.OFFLINE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FS_PLUGINS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "cache"


@pytest.fixture
def own(llava, tmp_path) -> dict:
    """A registry entry for the test's LLaVA with a PSM beside the file."""
    call = fs_plugins.vision_call(llava)
    make_psm(call).save_pretrained(tmp_path / "psm")
    entry = copy.deepcopy(DATA["encoders"]["demo-clip"])
    entry |= {"architecture": dict(call.architecture), "fingerprint": list(fingerprint(call.module))}
    entry["psms"] = [
        {
            "readout": call.readouts[0].name,
            "state": "shipped",
            "sigma": 0.25,
            "path": "psm",
            "sha256": registry.checksum(tmp_path / "psm"),
        }
    ]
    return {"version": 1, "encoders": {"mine": entry}}


@pytest.fixture
def site(tmp_path, call):
    """A PSM that somebody publishes."""
    make_psm(call).save_pretrained(tmp_path / "site")
    return tmp_path / "site"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    torch.manual_seed(0)
    torch.save(GuidedDiffusion(**TINY).state_dict(), tmp_path / "model.pt")
    return tmp_path / "model.pt"


@pytest.fixture
def hub(call, tmp_path, monkeypatch, online):
    """The hub's own cache on disk with one PSM at one commit; it is offline all the time."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "hub" / "models--someone--psm" / "snapshots" / COMMIT
    make_psm(call).save_pretrained(folder)
    return folder


@pytest.fixture
def trained(online, llava, tmp_path) -> tuple[Path, Path]:
    """A small model on disk, and a PSM that was trained for it."""
    llava.save_pretrained(tmp_path / "model")
    pixels = llava.image_processor
    (tmp_path / "model" / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": pixels.mean, "image_std": pixels.std}), encoding="utf-8"
    )
    make_psm(fs_plugins.vision_call(llava), name="new").save_pretrained(tmp_path / "psm")
    return tmp_path / "model", tmp_path / "psm"
