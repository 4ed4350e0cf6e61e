"""Pictures certified in a folder: with rows that an interrupted run goes on from, by one process or by several."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol

from torch import Tensor

from fs_plugins.certificates.certificate import Certificate
from fs_plugins.certificates.certifiers import Certifier, Features
from fs_plugins.certificates.ledger import merge
from fs_plugins.certificates.plan import Plan
from fs_plugins.certificates.run import certify_named, check, ledger_of
from fs_plugins.certificates.sampling import unheard
from fs_plugins.certificates.values import C
from fs_plugins.errors import SettingError
from fs_plugins.files import locked, replace
from fs_plugins.pictures import EXTENSIONS, Picture, named, pictures_below, read
from fs_plugins.smoothing import FeatureSmoother

ROWS = "certificates.jsonl"
"""The file that ``certify_folder`` leaves in its folder."""

Track = Callable[[str, int], Callable[[int], None]]
"""What is being done and how many draws it takes -> told of draws as they are made."""


class Crew(Protocol):
    """The processes that share the pictures, and which of them this is, from 0."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def wait(self) -> Callable[[], None]:
        """Until all processes are here."""


@dataclass(frozen=True)
class Alone:
    """The only process."""

    rank: int = 0
    size: int = 1

    def wait(self) -> None:
        """There is nobody to wait for."""


def certify_folder(
    smoother: FeatureSmoother,
    pictures: Mapping[str, Picture],
    out: str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    seed: int | None = None,
    crew: Crew = Alone(),
    track: Track | None = None,
) -> dict[str, Certificate]:
    """Certify each picture's feature; an interrupted call goes on from the rows in ``out`` when it is made again.

    For labels, several pipelines or an estimate of the time see ``FolderRun``.

    Args:
        smoother: one of ``fs_plugins.smoothers(model, psm=..., sigma=...)``.
        pictures: names -> (3, H, W) in [0, 1], as ``pictures_of`` reads them, or PIL images.
        out: a folder for the rows, ``certificates.jsonl``. One run at a time.
        plan, seed: how each is certified; see Plan and ``fs_plugins.certify``.
        crew: the processes that share the pictures; all of them make this call.
        track: for progress bars.

    Returns:
        names -> certificates, in order; those of this process alone in all but the first.

    Raises:
        SettingError: no picture, one of another size or range, rows of another run, or a folder that is in use.
        ModelError: see ``fs_plugins.certify``.
    """
    found = named(pictures)
    features = Features(smoother, plan or Plan(), list(found.values()))
    run = FolderRun(Path(out), found, {ROWS: features}, seed=seed, crew=crew)
    run.check()
    with run.held():
        return run.certify(track)[ROWS]


def pictures_of(paths: Sequence[str | os.PathLike[str]], size: tuple[int, int]) -> dict[str, Tensor]:
    """PNG and JPEG files, and folders of them, searched by ``pictures_below`` -> path -> (3, H, W) in [0, 1].

    Args:
        size: (H, W) to fit and centre-crop to; ``vision_call(model).image_size`` for encoders that have one.

    Raises:
        SettingError: no such file, no image, or a folder without any.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        below = pictures_below(path) if os.path.isdir(path) else [path]
        if not below:
            raise SettingError(f"No {', '.join(EXTENSIONS)} below {path}.")
        found += below
    return {str(path): read(path, size) for path in found}


@dataclass(frozen=True)
class FolderRun(Generic[C]):
    """Pictures to be certified, by one certifier or by several in turn, each with a file of rows in a folder.

    ``check``, then ``certify`` while the folder is ``held``. Of several processes each does its share of the pictures
    in a file of its own; the first merges them.

    Args:
        out: the folder.
        pictures: names -> (3, H, W) in [0, 1] at the resolution the encoder sees.
        certifiers: names of files in ``out`` -> ``Features``, ``Labels`` or ``Replies``.
        encoder: the number of the vision call in its model.
        seed: reproducible draws; several processes need one.
        crew: the processes.

    Raises:
        SettingError: no picture, or several processes without a seed.
    """

    out: Path
    pictures: Mapping[str, Tensor]
    certifiers: Mapping[str, Certifier[C]]
    encoder: int = 0
    seed: int | None = None
    crew: Crew = Alone()

    def __post_init__(self) -> None:
        if not self.pictures:
            raise SettingError("Nothing to certify: there is no picture.")
        if self.crew.size > 1 and self.seed is None:
            raise SettingError("Several processes need a seed, so that their draws are one run's.")

    @property
    def draws(self) -> int:
        """Of each certifier, over all pictures, where no target stops them early."""
        return len(self.pictures) * max(one.draws for one in self.certifiers.values())

    def check(self) -> None:
        """Refuse, before a draw, what cannot be certified, and rows of another run.

        Raises:
            ModelError, SettingError: see ``run.check`` and ``Ledger``.
        """
        for file, certifier in self.certifiers.items():
            check(certifier.smoother, self.pictures)
            if (self.out / file).exists():
                ledger_of(certifier, self.out / file, encoder=self.encoder, seed=self.seed)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other runs out of the folder.

        Raises:
            SettingError: another run has it; the message says which process.
        """
        with locked(self.out, "these certificates") if self.crew.rank == 0 else nullcontext():
            self.crew.wait()
            yield

    def seconds(self) -> float:
        """About how long ``certify`` takes from the start, from a few draws of the first picture."""
        name, image = next(iter(self.pictures.items()))
        each = [_seconds_per_draw(one.trial(64), name, image) * one.draws for one in self.certifiers.values()]
        return sum(each) * len(self.pictures) / self.crew.size

    def certify(self, track: Track | None = None) -> dict[str, dict[str, C]]:
        """File -> picture -> certificate, in order; those of this process alone in all but the first.

        Raises:
            ModelError: a picture has no feature.
            SettingError: a file cannot be written, or another process left its share undone.
        """
        return {file: self._one(file, certifier, track) for file, certifier in self.certifiers.items()}

    def _one(self, file: str, certifier: Certifier[C], track: Track | None) -> dict[str, C]:
        crew, rows = self.crew, self.out / file
        mine = {name: self.pictures[name] for name in list(self.pictures)[crew.rank :: crew.size]}
        advance = unheard if track is None else track(rows.stem, len(mine) * certifier.draws)
        parts = [rows.with_suffix(f".{i + 1}-of-{crew.size}.jsonl") for i in range(crew.size)]
        own = parts[crew.rank] if crew.size > 1 else rows
        if own != rows and rows.exists() and not own.exists():
            replace(own, rows.read_bytes())  # a finished run's rows count
        found = certify_named(certifier, mine, encoder=self.encoder, seed=self.seed, out=own, advance=advance)
        if crew.size > 1:
            crew.wait()
            if crew.rank == 0:
                return merge(
                    parts, rows, [row for name in self.pictures for row in certifier.rows(name)], certifier.kind
                )
        return dict(zip([row for name in mine for row in certifier.rows(name)], found, strict=True))


def _seconds_per_draw(certifier: Certifier[C], name: str, image: Tensor) -> float:
    """From a short run's own blocks, without what it takes to load and to warm up."""
    marks: list[tuple[float, int]] = []
    certify_named(certifier, {name: image}, advance=lambda draws: marks.append((time.perf_counter(), draws)))
    (first, _), *later = marks
    return (later[-1][0] - first) / sum(draws for _, draws in later) if later else 0.0
