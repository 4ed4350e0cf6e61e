"""Import this before anything that imports torchvision: it then also works beside a CPU-only torch.

The torchvision of the package index is built for CUDA, so its operators do not load beside a CPU-only torch, and
``import torchvision`` fails while it registers shape functions for two of them. With it fail timm, and all of
transformers and diffusers that looks for it. The two operators' schemas are enough for the import; calling them still
fails. Where torchvision works, or is not installed, nothing is changed; nothing is imported before it is wanted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_NAME = "torchvision"
_KEPT: list[Any] = []
"""The schemas are withdrawn when the library object goes."""


class _Again(Loader):
    """Runs a module's code, and once more with the schemas where these were missing."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        try:
            self.loader.exec_module(module)
        except RuntimeError as error:
            if f"operator {_NAME}::" not in str(error):
                raise
            for name in [name for name in sys.modules if name.startswith(f"{_NAME}.")]:
                del sys.modules[name]
            _define()
            self.loader.exec_module(module)


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == _NAME else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Again(spec.loader)
        return spec


def _define() -> None:
    import torch

    library = torch.library.Library(_NAME, "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)


if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
    sys.meta_path.insert(0, _Finder())
