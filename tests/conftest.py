"""Settings of all tests, and the fixtures that many share; what they are made by is in ``support``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# For tools and benchmarks; last, so that an installed fs_plugins is the one that is tested.
sys.path.append(str(Path(__file__).parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["FS_PLUGINS_REGISTRY"] = os.devnull  # a developer's own file is no part of the tests
os.environ.pop("COLUMNS", None)  # the command line's console would keep the width that it finds when it is made

import pytest
import torch
from hub_server import serving
from hypothesis import HealthCheck, settings
from support import TinyEncoder, make_clip, make_llava, tiny_call
from torch import Tensor

import fs_plugins.cli.base  # noqa: F401  (makes that console before a test sets a width of its own)
from fs_plugins import (
    VisionCall,
    hooks,
    torchvision_schemas,  # noqa: F401  (where there is torchvision)
)

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: one thread each
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"

# A busy machine is no failure.
settings.register_profile("fs", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fs")


@pytest.fixture
def clip():
    return make_clip()


@pytest.fixture
def llava():
    return make_llava()


@pytest.fixture
def live_hub(monkeypatch, tmp_path):
    """A stand-in for the Hugging Face hub that answers; nobody is logged in until a test sets HF_TOKEN."""
    with serving(monkeypatch, tmp_path) as hub:
        yield hub


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def encoder() -> TinyEncoder:
    return TinyEncoder()


@pytest.fixture
def call(encoder: TinyEncoder) -> VisionCall:
    return tiny_call(encoder)


@pytest.fixture
def one_road_through_attention():
    """Under a default device, which is a function mode, torch's attention takes another road and rounds apart."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.fixture
def manager():
    """The plugin manager of one test's own, with the adapters that ship."""
    hooks.plugin_manager.cache_clear()
    yield hooks.plugin_manager()
    hooks.plugin_manager.cache_clear()
