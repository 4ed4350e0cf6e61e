"""Which image processor lies beside the checkpoint that a model of transformers was loaded from.

A model keeps the name it was loaded by and, from the hub, often the commit; never ``cache_dir``, ``subfolder`` or the
working directory. So every place that it can have come from is looked at, on this machine only, and what they say
counts if they agree.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fs_plugins

Saved = dict[str, Any]


def processors(config: Any) -> list[tuple[Path, Saved | None]]:
    """Folders that the model can have come from, each with the image processor saved in it or above it, if any."""
    kind = getattr(config, "model_type", None)
    found = []
    commit = vars(config).get("_commit_hash")  # as an attribute Qwen2-VL's, until transformers 5, is its text part's
    for root in _roots(getattr(config, "_name_or_path", None) or "", commit):
        checkpoints = list(_checkpoints(root))
        alike = [folder for folder, its in checkpoints if its == kind] or [folder for folder, _ in checkpoints]
        found += [(folder, _beside(folder, root)) for folder in alike or [root]]
    return found


def _roots(name: str, commit: str | None) -> list[Path]:
    """What the name can stand for: a folder, also as seen from where this process began, else the hub's cache."""
    if not name:
        return []
    paths: set[Path] = set()
    if commit is None or os.path.isabs(name):
        paths = {Path(base, name) for base in (fs_plugins._began_in, _here())}
    folders = {path if path.is_dir() else path.parent for path in paths if path.exists()}
    return sorted(folders) or list(_snapshots(name, commit))


def _here() -> str:
    with suppress(OSError):  # it was removed
        return os.getcwd()
    return ""


def _snapshots(name: str, commit: str | None) -> Iterator[Path]:
    """The commit's folder in the cache; every commit's, if the model does not know its own."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from transformers.utils import hub

    for cache in {HF_HUB_CACHE, getattr(hub, "TRANSFORMERS_CACHE", HF_HUB_CACHE)}:  # the second until transformers 5
        folder = Path(cache) / f"models--{name.replace('/', '--')}" / "snapshots"
        with suppress(OSError):
            yield from (one for one in sorted(folder.iterdir()) if commit in (None, one.name) and one.is_dir())


def _checkpoints(root: Path) -> Iterator[tuple[Path, str | None]]:
    """Folders with a configuration, down to where ``subfolder=`` usually points, and the model_type it names."""
    for pattern in ("config.json", "*/config.json", "*/*/config.json"):
        for file in sorted(root.glob(pattern)):
            kind = None
            with suppress(OSError, ValueError, AttributeError, RecursionError):
                kind = json.loads(file.read_text(encoding="utf-8")).get("model_type")
            yield file.parent, kind


def _beside(folder: Path, root: Path) -> Saved | None:
    from transformers.image_processing_base import ImageProcessingMixin

    for place in (folder, *folder.parents):
        with suppress(OSError, ValueError, TypeError, RecursionError):  # none, or a damaged one
            return {**ImageProcessingMixin.get_image_processor_dict(str(place), local_files_only=True)[0]}
        if place == root:
            break
    return None
