"""A user that the system does not know, as in containers, has no home directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fs_plugins
from fs_plugins import RegistryError, registry, sources
from fs_plugins.cli import app


@pytest.fixture
def homeless(monkeypatch):
    """What Python says of a home directory that it cannot find."""
    for name in (sources.CACHE, registry.USER, "XDG_CACHE_HOME", "XDG_CONFIG_HOME", *sources.OFFLINE):
        monkeypatch.delenv(name, raising=False)

    def unknown(path: Path) -> Path:
        if str(path).startswith("~"):
            raise RuntimeError("Could not determine home directory.")
        return path

    monkeypatch.setattr(Path, "expanduser", unknown)


def test_enable_needs_no_home_directory(homeless, llava):
    with pytest.warns(fs_plugins.FSPluginsWarning, match="stands in"), fs_plugins.enable(llava):
        assert fs_plugins.status(llava).enabled


def test_registries_need_no_home_directory(homeless):
    for arguments in (["list"], ["show", "diffusion"], ["verify", "photo"], ["verify", "diffusion"]):
        result = CliRunner().invoke(app, ["registry", *arguments], env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
    assert sources.cached("a" * 64) is None


def test_what_does_need_one_says_so(homeless, monkeypatch):
    with pytest.raises(RegistryError, match=r"No home directory is known for ~/\.cache\. Set HOME"):
        registry.shipped().purifier("diffusion")
    monkeypatch.setenv(registry.USER, "~/registry.yaml")
    with pytest.raises(RegistryError, match=r"No home directory is known for ~/registry\.yaml"):
        registry.user_files()


@pytest.mark.skipif(sys.platform == "win32" or os.getuid() != 0, reason="only root can become nobody known")
def test_a_process_of_an_unknown_user_finds_the_registry_that_ships(homeless, tmp_path):
    script = (
        "import os, pathlib, pwd; from fs_plugins import registry_files as r\n"
        "os.setuid(54321); os.environ.pop('HOME', None); print(r.user_files())"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert told.stdout == "[]\n", told.stderr
    script = script.replace("os.environ.pop('HOME', None)", f"os.environ['HOME'] = {str(tmp_path / 'x')!r}")
    (tmp_path / "x").mkdir(mode=0o700)
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert told.stdout == "[]\n", told.stderr
