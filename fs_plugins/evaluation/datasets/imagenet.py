"""ImageNet's validation pictures, of the paper's classes."""

from __future__ import annotations

from pathlib import Path

from fs_plugins.errors import SettingError
from fs_plugins.evaluation.datasets.dataset import Dataset
from fs_plugins.evaluation.datasets.reader import Reader, sample_of
from fs_plugins.pictures import EXTENSIONS, pictures_below

IMAGENET = {
    "n01514668": "rooster",
    "n02483362": "gibbon",
    "n02099601": "golden retriever",
    "n01443537": "goldfish",
    "n01514859": "hen",
    "n01729322": "hognose snake",
    "n02134084": "ice bear",
    "n02071294": "killer whale",
    "n01981276": "king crab",
    "n01608432": "kite",
}
"""The paper's ten classes (section S.9.1), in its order."""
IMAGENET_TARGET = ("n01484850", "shark")
"""The eleventh: what a targeted attack wants to be answered."""


def read(root: Path) -> Dataset:
    """The pictures in the synsets' folders, in the root or in val/."""
    base = next(base for base in (root, root / "val") if any((base / synset).is_dir() for synset in IMAGENET))
    pictures = {name: pictures_below(base / synset) for synset, name in IMAGENET.items()}
    present = [name for name, found in pictures.items() if found]
    if not present:
        raise SettingError(f"The synset folders in {base} have no {', '.join(EXTENSIONS)} in them.")
    samples = tuple(sample_of(root, path, label=name) for name in present for path in pictures[name])
    synset, target = IMAGENET_TARGET
    aims = tuple(pictures_below(base / synset))
    return Dataset("ImageNet", root, samples, (*present, target), target, pool=aims)


IMAGENET_FOLDERS = Reader(tuple(f"{base}{synset}/" for base in ("", "val/") for synset in IMAGENET), read)
