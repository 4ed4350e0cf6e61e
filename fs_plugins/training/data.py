"""Image folders as training data, and the order in which training looks at them.

Nothing here depends on the state of a random generator: an epoch's order, an image's crop and its noise each follow
from the seed and from which sample it is. So a resumed run draws what the uninterrupted one would have drawn, and
several processes draw together what one would.
"""

from __future__ import annotations

import copy
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fs_plugins import files
from fs_plugins.errors import SettingError
from fs_plugins.noise import keyed, normal, uniform
from fs_plugins.pictures import EXTENSIONS, pictures_below, read
from fs_plugins.training.config import Stage, TrainingConfig


class Pictures(Protocol):
    """What is trained on: (C, H, W) floats in [0, 1], no labels. Any ``torch.utils.data.Dataset`` of a known length."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Tensor: ...


@runtime_checkable
class Varied(Protocol):
    """Pictures that can be cropped and mirrored at random (``TrainingConfig.augment``)."""

    def varied(self, index: int, generator: torch.Generator) -> Tensor:
        """A picture's view that the generator chooses, of the same size."""
        ...


@runtime_checkable
class Identified(Protocol):
    """Pictures that say which they are: a training goes on only with pictures of the same digest."""

    @property
    def digest(self) -> str: ...


class ImageFolder(Dataset[Tensor]):
    """Every PNG and JPEG below a folder, cropped to the encoder's size.

    Args:
        folder: searched through all its subfolders by ``pictures_below``, in sorted order.
        size: (H, W) to fit and centre-crop to.
        paths: those below the folder to take, in place of all; subclasses that read elsewhere name theirs.

    Raises:
        SettingError: no image found, or a file that is no image (named).
    """

    def __init__(
        self, folder: str | os.PathLike[str], size: tuple[int, int], paths: Sequence[Path] | None = None
    ) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.paths = pictures_below(self.folder) if paths is None else list(paths)
        self.size = size
        if not self.paths:
            raise SettingError(f"No {', '.join(EXTENSIONS)} below {folder}.")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """(3, H, W) fp32 in [0, 1]."""
        return self.read(self.paths[index])

    def read(self, path: Path, **fit: Any) -> Tensor:
        """One picture; ``fit`` goes to ``fitted``. Subclasses may take theirs from elsewhere."""
        return read(path, self.size, **fit)

    def varied(self, index: int, generator: torch.Generator) -> Tensor:
        """The same picture, off centre, up to a quarter nearer on every side, and mirrored half of the time."""
        nearer, x, y, mirror = uniform(generator, (4,)).tolist()
        image = self.read(self.paths[index], bleed=nearer / 4, centering=(x, y))
        return image.flip(-1) if mirror < 0.5 else image

    def split(self, count: int, seed: int) -> tuple[ImageFolder, ImageFolder]:
        """The pictures to train on, and ``count`` that are held out, chosen by their names and the seed."""
        marks = [files.mark(f"{seed}/{name}") for name in self.names]
        held = {path for _, path in sorted(zip(marks, self.paths, strict=True))[:count]}
        return self._only([path for path in self.paths if path not in held]), self._only(sorted(held))

    @property
    def names(self) -> list[str]:
        """The pictures' paths below the folder."""
        return [path.relative_to(self.folder).as_posix() for path in self.paths]

    @property
    def digest(self) -> str:
        """A digest of the pictures' names and file sizes, whatever the folder is called."""
        listed = "\n".join(f"{name} {self.bytes(path)}" for name, path in zip(self.names, self.paths, strict=True))
        return f"{len(self)} images, {files.mark(listed)[:16]}"

    def bytes(self, path: Path) -> int:
        return path.stat().st_size

    def _only(self, paths: list[Path]) -> ImageFolder:
        part = copy.copy(self)
        part.paths = paths
        return part


Sample = tuple[int, int, int]
"""Step, place in the step's images (of all processes), and the image's index."""


def samples(
    count: int, config: TrainingConfig, name: str, *, first: int = 0, process: int = 0, processes: int = 1
) -> Iterator[list[Sample]]:
    """One process's share of ``count`` images, a list a forward, from step ``first`` to the stage's last.

    Epochs follow each other without a break, each in an order of its own.
    """
    stage = config.stages[name]

    @lru_cache(maxsize=2)
    def order(epoch: int) -> list[int]:
        return torch.randperm(count, generator=keyed(config.seed, name, "epoch", epoch), device="cpu").tolist()

    for step in range(first, stage.steps):
        for forward in range(stage.accumulate):
            start = (forward * processes + process) * stage.batch_size
            places = range(start, start + stage.batch_size)
            positions = [step * stage.images(processes) + place for place in places]
            yield [
                (step, place, order(position // count)[position % count])
                for place, position in zip(places, positions, strict=True)
            ]


def drawn(images: Pictures, config: TrainingConfig, name: str, sample: Sample) -> tuple[Tensor, Tensor, Tensor]:
    """A sample's picture (C, H, W) in [0, 1], its standard normal noise (draws, C, H, W), and a number in [0, 1)."""
    step, place, index = sample
    if config.augment and isinstance(images, Varied):
        image = images.varied(index, keyed(config.seed, name, step, place, "view"))
    else:
        image = images[index]
    generator = keyed(config.seed, name, step, place, "noise")
    noise = normal(generator, (config.stages[name].draws, *image.shape))
    return image, noise, uniform(generator)


def batches(
    one: Callable[[Sample], tuple[Tensor, ...]], lists: Iterable[list[Sample]], *, workers: int, ahead: int = 2
) -> Generator[tuple[Tensor, ...]]:
    """``one`` of every sample, stacked a list each, read by threads ``ahead`` of who takes them, in the lists' order.

    Threads, because decoding, resizing and drawing all release Python's lock, and nothing is copied between processes.
    """
    pool = ThreadPoolExecutor(workers)
    waiting: deque[list[Any]] = deque()
    try:
        for some in lists:
            waiting.append([pool.submit(one, sample) for sample in some])
            if len(waiting) > ahead:
                yield _stacked(waiting.popleft())
        while waiting:
            yield _stacked(waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _stacked(futures: list[Any]) -> tuple[Tensor, ...]:
    return tuple(map(torch.stack, zip(*(future.result() for future in futures), strict=True)))


def check(images: Pictures, config: TrainingConfig, *, processes: int = 1, workers: int = 8) -> None:
    """Read every picture that the training will look at.

    Raises:
        SettingError: those that cannot be read, by name; or fewer than one batch.
    """
    used: set[int] = set()
    for name, stage in config.stages.items():
        check_count(len(images), stage, processes)
        whole = stage.steps * stage.images(processes) >= len(images)
        for process in range(0 if whole else processes):
            for some in samples(len(images), config, name, process=process, processes=processes):
                used |= {index for _, _, index in some}
        used |= set(range(len(images) if whole else 0))

    def problem(index: int) -> str | None:
        try:
            images[index]
        except SettingError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(workers) as pool:
        problems = [told for told in pool.map(problem, sorted(used)) if told]
    if problems:
        more = f" {len(problems) - 3} more are not." if len(problems) > 3 else ""
        raise SettingError(f"{' '.join(problems[:3])}{more} Repair them, or take them out of the folder.")


def check_count(count: int, stage: Stage, processes: int) -> None:
    """Refuse fewer images than one step of the optimiser takes."""
    if count < stage.images(processes):
        raise SettingError(f"Fewer training images ({count}) than one batch of {stage.images(processes)}.")
