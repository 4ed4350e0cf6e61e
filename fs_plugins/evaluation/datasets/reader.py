"""What reads a folder of one layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from fs_plugins.errors import SettingError
from fs_plugins.evaluation.datasets.dataset import Dataset, Sample


@dataclass(frozen=True)
class Reader:
    """Reads folders of one layout.

    Args:
        signs: paths below the folder, with forward slashes, that tell its layout, any one of them: a file, or a folder
            with a slash at its end.
        read: (folder) -> the dataset. It opens no picture; all are decoded afterwards, and missing ones are told.
    """

    signs: tuple[str, ...]
    read: Callable[[Path], Dataset]

    def recognises(self, root: Path) -> bool:
        """Whether a folder is of this layout."""
        return any((root / sign).is_dir() if sign.endswith("/") else (root / sign).is_file() for sign in self.signs)


def sample_of(root: Path, path: Path, **facts: object) -> Sample:
    """A picture below the dataset's root, and what is true of it.

    Raises:
        SettingError: it cannot be one.
    """
    try:
        return Sample.model_validate({"image": path.relative_to(root).as_posix(), **facts})
    except ValidationError as error:
        raise SettingError(f"{path} cannot be a sample: {first_of(error)}.") from None


def first_of(error: ValidationError) -> str:
    """The first of a file's faults: where it is, and what."""
    problem = error.errors()[0]
    where = ".".join(map(str, problem["loc"]))
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
