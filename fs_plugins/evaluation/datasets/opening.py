"""From a folder to a dataset whose pictures can all be read, each with something for attacks to aim at."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

from fs_plugins.errors import PluginError, SettingError
from fs_plugins.evaluation.datasets.dataset import Dataset, Sample, shuffled
from fs_plugins.evaluation.datasets.plain import read as read_pictures
from fs_plugins.evaluation.datasets.readers import READERS, known_readers
from fs_plugins.files import real
from fs_plugins.hooks import DISABLE
from fs_plugins.pictures import EXTENSIONS, check, pictures_below

Corrupt = Literal["refuse", "skip"]


def open_dataset(
    path: str | os.PathLike[str],
    *,
    targets: str | os.PathLike[str] | None = None,
    corrupt: Corrupt = "refuse",
    seed: int = 0,
) -> Dataset:
    """Read a folder and decode each of its pictures once.

    The folder holds samples.jsonl, or is the NIPS 2017 competition's (images.csv), ScienceQA's (problems.json),
    ImageNet's (a folder for each synset), is what a plugin reads (the hook ``fs_datasets``), or has any PNG and JPEG
    files in it.

    A sample without a target picture of its own gets one: those of ``targets`` in turn, else the target class's in turn
    (ImageNet), else another of the dataset's pictures by a seeded permutation that leaves none in its place. Where no
    class is named that attacks want, it is that of the picture they aim at, if that is a labelled one of the dataset.

    Args:
        targets: a folder of pictures for attacks to aim at.
        corrupt: "refuse" a dataset with pictures that cannot be read, or "skip" them and say so in ``skipped``.
        seed: of that permutation.

    Raises:
        SettingError: nothing to read, a file that breaks its format, a picture that is missing or corrupt, or nothing
            for an attack to aim at.
        PluginError: a plugin's readers cannot be used, or several recognise the folder.
    """
    root = Path(path)
    if not os.path.isdir(root):
        raise SettingError(f"{root} is no folder; a dataset is a folder with pictures.")
    if corrupt not in get_args(Corrupt):
        raise SettingError(f"corrupt is 'refuse' or 'skip', got {corrupt!r}.")
    aims = None if targets is None else Path(targets)
    dataset = _read(root, aims)
    pool: Sequence[Path] = dataset.pool
    if aims is not None:
        pool = pictures_below(aims)
        if not pool:
            raise SettingError(f"No {', '.join(EXTENSIONS)} below {aims}, where the target pictures were to be.")
    dataset, pool = _whole(dataset, pool, corrupt)
    return _told(replace(dataset, aims=_aims(dataset, pool, seed), pool=()))


def _told(dataset: Dataset) -> Dataset:
    """What attacks want to be answered where nobody says it: the class of the sample whose picture they aim at."""
    if dataset.target_class is not None:
        return dataset
    labels = {dataset.root / sample.image: sample.label for sample in dataset.samples}

    def told(sample: Sample) -> Sample:
        if sample.target_label is not None:
            return sample
        found = labels.get(dataset.target_path(sample))
        return sample if found is None else sample.model_copy(update={"target_label": found})

    return replace(dataset, samples=tuple(map(told, dataset.samples)))


def _read(root: Path, targets: Path | None) -> Dataset:
    """What the one reader for this folder makes of it; no picture is opened."""
    known = known_readers()
    there = [name for name, reader in known.items() if reader.recognises(root)]
    chosen = [name for name in there if name in READERS][:1] or there
    if len(chosen) > 1:
        raise PluginError(
            f"Several readers of datasets recognise {root}: {', '.join(chosen)}. Turn a plugin off with "
            f"{DISABLE}=<its name>."
        )
    if chosen:
        dataset = known[chosen[0]].read(root)
        if not isinstance(dataset, Dataset):
            raise PluginError(f"The reader {chosen[0]!r} must read a Dataset; of {root} it read {dataset!r}.")
        return dataset
    pictures = read_pictures(root, aside=targets)
    if pictures is None:
        files = [sign for reader in known.values() for sign in reader.signs if not sign.endswith("/")]
        wanted = ", ".join([*files, *(f"*{end}" for end in EXTENSIONS)])
        raise SettingError(f"{root} has nothing to evaluate on; expected one of {wanted}.")
    return pictures


def _whole(dataset: Dataset, pool: Sequence[Path], corrupt: Corrupt) -> tuple[Dataset, list[Path]]:
    """What can be read of the samples and of the pool."""
    root = dataset.root
    named = [root / name for sample in dataset.samples for name in (sample.image, sample.target) if name is not None]
    paths = list(dict.fromkeys([*named, *pool]))
    if missing := [path for path in paths if not os.path.isfile(path)]:
        raise SettingError(
            f"{len(missing)} of the {len(paths)} pictures of {root} are missing, the first {missing[0]}. Put them "
            "there, or take them out of the list."
        )
    with ThreadPoolExecutor() as threads:  # decoding releases the interpreter
        faults = {path: fault for path, fault in zip(paths, threads.map(_fault, paths), strict=True) if fault}
    if faults and corrupt == "refuse":
        raise SettingError(
            f"{len(faults)} of the {len(paths)} pictures of {root} cannot be read. "
            f"{' '.join(list(faults.values())[:3])} "
            'Replace them, or leave them out with corrupt="skip".'
        )
    kept, skipped = [], []
    for sample in dataset.samples:
        if fault := faults.get(root / sample.image):
            skipped.append(fault)
        elif sample.target is not None and (fault := faults.get(root / sample.target)):
            skipped.append(f"{root / sample.image} is left out for its target: {fault}")
        else:
            kept.append(sample)
    skipped += [faults[path] for path in pool if path in faults]
    if not kept:
        raise SettingError(f"None of the {len(dataset.samples)} samples of {root} can be read. {skipped[0]}")
    told = tuple(sentence.replace(f"{root}{os.sep}", "") for sentence in skipped)
    return replace(dataset, samples=tuple(kept), skipped=told), [path for path in pool if path not in faults]


def _fault(path: Path) -> str | None:
    try:
        check(path)
    except SettingError as error:
        return f"{str(error).rstrip('.')}."
    return None


def _aims(dataset: Dataset, pool: Sequence[Path], seed: int) -> dict[str, Path]:
    """A target picture for each sample that names none."""
    root = dataset.root
    without = [sample for sample in dataset.samples if sample.target is None]
    if not without:
        return {}
    if pool:
        return {sample.image: _in_turn(pool, turn, root / sample.image) for turn, sample in enumerate(without)}
    if dataset.target_class is not None and any(sample.label is not None for sample in without):
        raise SettingError(
            f"{root} has no picture of {dataset.target_class!r}, which attacks on its {len(without)} pictures without "
            "a target are to make the model see. Name a target in each sample, or give a folder of such pictures as "
            "targets."
        )
    if len(dataset.samples) < 2:
        raise SettingError(f"{root} has one picture, and none for an attack on it to aim at. Give a folder as targets.")
    order = shuffled([sample.image for sample in dataset.samples], seed, "aims")
    following = dict(zip(order, order[1:] + order[:1], strict=True))
    return {sample.image: root / following[sample.image] for sample in without}


def _in_turn(pool: Sequence[Path], turn: int, own: Path) -> Path:
    for choice in (pool[turn % len(pool)], pool[(turn + 1) % len(pool)]):
        if real(choice) != real(own):
            return choice
    raise SettingError(f"The only target picture is {own} itself; give a folder with another as targets.")
