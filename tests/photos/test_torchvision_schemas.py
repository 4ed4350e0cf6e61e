"""A torchvision that was built for another torch can be imported, one that works is left alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FAILS = """
import torch
from torchvision import ops
handle = torch.library.register_fake("torchvision::nms")(lambda dets, scores, iou_threshold: dets)
"""
START = "import sys; sys.path.insert(0, sys.argv[1]); from fs_plugins.photos import torchvision_schemas; "


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
