"""A torchvision that was built for another torch can be imported, one that works is left alone."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FAILS = """
import torch
from torchvision import ops
handle = torch.library.register_fake("torchvision::nms")(lambda dets, scores, iou_threshold: dets)
"""
START = "import sys; sys.path.insert(0, sys.argv[1]); from fs_plugins import torchvision_schemas; "


def imported(folder: Path, code: str, then: str) -> subprocess.CompletedProcess[str]:
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(code, encoding="utf-8")
    (package / "ops.py").write_text("", encoding="utf-8")
    command = [sys.executable, "-c", START + then, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8")


def test_one_that_misses_its_operators_gets_their_schemas(tmp_path):
    done = imported(tmp_path, FAILS, "import torchvision.ops; print(torchvision.handle is not None)")
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize(
    ("code", "error"), [("import nobody_has_this", "nobody_has_this"), ("raise RuntimeError(1)", "1")]
)
def test_other_faults_are_its_own(tmp_path, code, error):
    done = imported(tmp_path, code, "import torchvision")
    assert done.returncode
    assert error in done.stderr.splitlines()[-1]


def test_one_that_works_is_imported_once(tmp_path):
    done = imported(tmp_path, "print('once')", "import torchvision; assert 'torch' not in sys.modules")
    assert done.stdout == "once\n", done.stderr


def test_a_purifier_is_made_beside_the_torchvision_that_is_installed():
    """By the plain Python API: nobody else has imported what transformers and diffusers need then."""
    if find_spec("torchvision") is None:
        pytest.skip("needs torchvision")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from support import TinyEncoder, tiny_call; import fs_plugins; "
        "assert 'torchvision' not in sys.modules; smoothers = fs_plugins.smoothers; "
        "print(smoothers(tiny_call(TinyEncoder()), psm='photo-light')[0].psm.config.name)"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parents[1])]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert done.stdout == "photo-light\n", done.stderr
