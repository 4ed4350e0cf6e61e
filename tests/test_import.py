"""What an import and a command's help cost: little, and no heavy package."""

from __future__ import annotations

import subprocess
import sys

import pytest

IMPORT = """
import sys, time, torch
before = set(sys.modules)
began = time.process_time()
import fs_plugins
spent = time.process_time() - began
for name in fs_plugins.__all__:
    getattr(fs_plugins, name)
heavy = {"torch._dynamo", "scipy.stats", "diffusers", "transformers"} & (set(sys.modules) - before)
assert not heavy, heavy
print(spent)
"""

COMMAND = """
import sys, time
began = time.process_time()
sys.argv = ["fs-plugins", *sys.argv[1:]]
from fs_plugins.cli import main
try:
    main()
except SystemExit as left:
    assert not left.code, left.code
print("CPU", time.process_time() - began)
assert "torch" not in sys.modules
"""


def run(script: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_costs_nothing_after_torch_and_no_public_name_brings_a_heavy_package():
    assert float(run(IMPORT)) <= 0.3


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["evaluate", "--help"], ["train", "--help"], ["registry", "--help"]]
)
def test_help_and_version_are_quick_and_need_no_torch(arguments):
    told = run(COMMAND, *arguments)
    assert float(told.rpartition("CPU ")[2]) < 1


def test_the_version_is_that_of_the_package():
    import fs_plugins

    assert run(COMMAND, "--version").splitlines()[0] == fs_plugins.__version__
