"""The file that a run's certificates are kept in: JSON lines, first the run's settings, then a row for each image.

This is the only place that knows its format.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Generic

from fs_plugins.certificates.credible import doubts
from fs_plugins.certificates.values import C
from fs_plugins.errors import SettingError
from fs_plugins.kept import Lines

if TYPE_CHECKING:
    from torch import Tensor

_ADVICE = "Remove the line, or the file, and run again."
_START = b'{"settings": '


@dataclass(frozen=True)
class Row(Generic[C]):
    """A finished image.

    Args:
        image: its name.
        sha256: of its pixels.
    """

    image: str
    sha256: str
    certificate: C

    @property
    def line(self) -> dict[str, object]:
        kept = json.loads(self.certificate.to_json())
        return {"image": self.image, "sha256": self.sha256, "certificate": kept}


@dataclass(frozen=True)
class File:
    """What a file of certificates says.

    Args:
        settings: all that the certificates depend on, besides the images.
        key: that the draws follow from.
        lines: of finished images, in the order they were finished.
    """

    path: Path
    settings: Mapping[str, object]
    key: bytes
    lines: Sequence[Mapping[str, object]] = ()

    @classmethod
    def read(cls, path: Path) -> File | None:
        """None where there is no file, or one that was cut off before it said anything.

        A row that was cut off in the middle of writing is not there.

        Raises:
            SettingError: the file is none of ours, or damaged; the message says where.
        """
        try:
            start = path.read_bytes()[: len(_START)] if path.exists() else b""
        except OSError as error:
            raise SettingError(f"{path} cannot be read: {error}. {_ADVICE}") from None
        if not _START.startswith(start):
            raise SettingError(f"{path} is not a file of certificates that certify wrote. Give another file.")
        lines = Lines(path).read() if start == _START else []
        if not lines:
            return None
        with _line(path, 1):
            return cls(path, dict(lines[0]["settings"]), bytes.fromhex(lines[0]["key"]), lines[1:])

    def rows(self, kind: type[C]) -> dict[str, Row[C]]:
        """The finished images by their names.

        Raises:
            SettingError: a row that is none, that repeats another, that holds another kind of certificate, or one that
                the file's settings cannot have given; the message says which.
        """
        rows: dict[str, Row[C]] = {}
        for number, line in enumerate(self.lines, start=2):
            with _line(self.path, number):
                name, certificate = str(line["image"]), kind.from_json(json.dumps(line["certificate"]))
                if name in rows:
                    raise ValueError(f"it is a second row of {name}")
                if wrong := doubts(certificate, self.settings):
                    raise ValueError(f"its certificate is not of these settings: {'; '.join(wrong)}")
                rows[name] = Row(name, str(line["sha256"]), certificate)
        return rows

    def write(self) -> None:
        """All of it, in place of what is there.

        Raises:
            OutputError: it cannot be written.
        """
        Lines(self.path).replace([{"settings": self.settings, "key": self.key.hex()}, *self.lines])


@contextmanager
def _line(path: Path, number: int) -> Iterator[None]:
    """What is wrong with a line's value is an error that says which line it was."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else error
        raise SettingError(
            f"{path} is not a file of certificates that certify wrote, or is damaged, in line {number}: {what}. "
            f"{_ADVICE}"
        ) from None


class Ledger(Generic[C]):
    """A file of certificates that grows by a row as each image is finished, so that an interrupted run goes on from it.

    A row is on disk when ``add`` returns; one that was cut off in the middle of writing is dropped. A file of other
    settings is refused, as is a row of another image by the same name.

    Args:
        path: a JSON-lines file, begun if it is not there.
        kind: of certificate.
        settings: all that the certificates depend on, besides the images.
        key: that the draws of a new file follow from; a file that is there has its own.

    Raises:
        SettingError: the file exists and is of another run, is no ledger, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], kind: type[C], settings: Mapping[str, object], key: bytes) -> None:
        self.path = Path(path)
        wanted = json.loads(json.dumps(dict(settings), default=dict))
        file = File.read(self.path)
        if file is None:
            file = File(self.path, wanted, key)
            file.write()
        found = file.settings
        different = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        if different:
            raise SettingError(
                f"{self.path} was written with other settings ({', '.join(different)}). Give another file, or the same "
                "settings."
            )
        self.key = file.key
        self._rows = file.rows(kind)

    def kept(self, name: str, image: Tensor) -> C | None:
        """The finished certificate of this image, None if there is none.

        Raises:
            SettingError: there is one by this name, of another image.
        """
        row = self._rows.get(name)
        if row is not None and row.sha256 != _digest(image):
            raise SettingError(f"{self.path} has a row for another image called {name}. Give another file.")
        return None if row is None else row.certificate

    def add(self, name: str, image: Tensor, certificate: C) -> None:
        """Write a finished row, on disk when this returns."""
        row = Row(name, _digest(image), certificate)
        Lines(self.path).append([row.line])
        self._rows[name] = row


def merge(parts: Sequence[Path], into: Path, order: Sequence[str], kind: type[C]) -> dict[str, C]:
    """Rows that several processes wrote -> one file in the order of the images; then the parts are removed.

    Rows of images that are not in ``order``, of an earlier run of more images, follow the others.

    Raises:
        SettingError: the parts lack a row, are of different runs, or one is no file of such certificates.
    """
    files = [file for part in parts if (file := File.read(part)) is not None]
    if any((file.settings, file.key) != (files[0].settings, files[0].key) for file in files):
        raise SettingError(
            f"{', '.join(map(str, parts))} were written with different settings; remove them and run again."
        )
    rows = {name: row for file in files for name, row in file.rows(kind).items()}
    missing = [name for name in order if name not in rows]
    if missing or not files:
        raise SettingError(f"No process certified {', '.join(missing[:5])}; run the same command again.")
    lines = [rows[name].line for name in dict.fromkeys([*order, *rows])]
    replace(files[0], path=into, lines=lines).write()
    for part in parts:
        part.unlink(missing_ok=True)
    return {name: rows[name].certificate for name in order}


def _digest(image: Tensor) -> str:
    return hashlib.sha256(image.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()
