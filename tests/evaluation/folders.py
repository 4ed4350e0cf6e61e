"""Folders of pictures, as datasets are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from fs_plugins.errors import SettingError
from fs_plugins.evaluation.datasets import open_dataset

OCEANS = ("the Arctic Ocean", "the Atlantic Ocean", "the Pacific Ocean", "the Southern Ocean")
ASKED = {"question": "Which ocean is highlighted?", "options": list(OCEANS), "answer": OCEANS[0]}


def picture(path: Path, level: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").resize((40, 30)).point(lambda v: (v + level) % 256).convert("RGB").save(path)
    return path


def cut(path: Path) -> Path:
    """Header and size are left, the last rows are not."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    return path


def documented(root: Path, samples: list[dict], **settings) -> Path:
    """A folder in the documented format; pictures that are named are drawn."""
    root.mkdir(parents=True, exist_ok=True)
    for sample in samples:
        for name in (sample["image"], sample.get("target")):
            if name is not None:
                picture(root / name)
    (root / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples), "utf-8")
    if settings:
        (root / "dataset.json").write_text(json.dumps(settings), "utf-8")
    return root


def refused(path: Path, *words: str, **options) -> str:
    with pytest.raises(SettingError) as error:
        open_dataset(path, **options)
    for word in words:
        assert word in str(error.value)
    return str(error.value)
