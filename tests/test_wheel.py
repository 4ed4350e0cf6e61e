"""The wheel, away from the checkout: what a stranger installs."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from fs_plugins import registry

ROOT = Path(__file__).parent.parent

SCRIPT = """
import sys
import fs_plugins, fs_plugins.adapters.hf_clip as adapter, fs_plugins.registry as registry
from pathlib import Path
from transformers import AutoModelForImageTextToText
from fs_plugins.demo import assets
from importlib.metadata import entry_points

home = Path(fs_plugins.__file__).parent
assert home.is_relative_to(sys.prefix), home
assert Path(adapter.__file__) == home / "adapters" / "hf_clip.py", adapter.__file__
assert registry.shipped_path() == home / "registry.yaml", registry.shipped_path()
assert (home / "py.typed").exists()
assert {"hf_clip", "hf_multimodal"} <= {point.name for point in entry_points(group="fs_plugins")}
model = AutoModelForImageTextToText.from_pretrained(assets.LLAVA).eval()
print(fs_plugins.enable(model).status())
"""


def build(folder: Path) -> Path:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)], check=True, capture_output=True
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_every_package_is_in_the_list_of_packages():
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    there = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "fs_plugins").rglob("__init__.py")}
    assert set(listed) == there | {"fs_plugins.adapters"}


def test_every_stub_of_public_names_is_in_the_package_data():
    """Without it, importing that package from a wheel fails."""
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-data"]
    there = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "fs_plugins").rglob("__init__.pyi")}
    assert there == {package for package, names in listed.items() if "__init__.pyi" in names}


def test_every_psm_that_ships_is_in_the_package_data():
    import tomllib
    from fnmatch import fnmatch

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-data"]
    known = registry.shipped()
    shipped = [psm for entry in known.entries.values() for psm in entry.psms] + list(known.purifiers.values())
    places = {trained.path.removeprefix("package:") for trained in shipped if trained.state == "shipped"}
    assert len(places) > 3
    for place in places:
        package, _, inside = place.partition("/")
        patterns = listed[f"fs_plugins.{package}"]
        assert any(fnmatch(f"{inside}/psm.safetensors", pattern) for pattern in patterns), place


@pytest.mark.slow
def test_the_wheel_works_away_from_the_checkout(tmp_path):
    """In an environment that has nothing of its own; what it depends on is the tests' own environment's."""
    wheel = build(tmp_path)
    names = zipfile.ZipFile(wheel).namelist()
    assert {"fs_plugins/registry.yaml", "fs_plugins/evaluation/report.html"} <= set(names)
    assert "fs_plugins/adapters/hf_multimodal.py" in names
    assert not any(name.startswith(("adapters/", "tests/")) for name in names), "PyPI has a package called adapters"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    place = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], capture_output=True, text=True
    ).stdout.strip()
    (Path(place) / "beneath.pth").write_text(sysconfig.get_paths()["purelib"], "utf-8")
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", str(wheel)], check=True, cwd=tmp_path)
    helped = subprocess.run([tmp_path / "venv" / "bin" / "fs-plugins", "--help"], capture_output=True, text=True)
    assert helped.returncode == 0, helped.stderr
    (tmp_path / "try.py").write_text(SCRIPT, "utf-8")
    told = subprocess.run([python, "try.py"], cwd=tmp_path, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert "demo-psm-llava" in told.stdout
