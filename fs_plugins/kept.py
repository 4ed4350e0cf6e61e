"""What a later run reads back: it says its own checksum, so that a bit that flipped is refused and never believed.

A JSON text has a last member ``seal``, a safetensors file a ``seal`` in its metadata: the first half of the SHA-256 of
all its bytes, where the seal's own digits count as zeros. A file that others write ends in a line with its SHA-256. A
folder of results has ``SHA256SUMS``, for ``sha256sum -c``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from fs_plugins.errors import SettingError
from fs_plugins.files import parsed, replace, writing

SUMS = "SHA256SUMS"
SEAL = "seal"
UNSEALED = {SEAL: 32 * "0"}
"""A member that ``stamped`` fills in."""

_SEAL = re.compile(rb'"seal": ?"([0-9a-f]{32})"')
_LAST_LINE = re.compile(rb"\nSHA-256 ([0-9a-f]{64})\n")
_LAST_LINE_SIZE = 74
_BLOCK = 1 << 20


def stamped(data: bytes) -> bytes:
    """Bytes whose last ``seal`` is ``UNSEALED`` -> the same with their seal."""
    start, end = _place(data)
    return data[:start] + _seal(data, start, end) + data[end:]


def check(data: bytes) -> None:
    """Whether bytes are as ``stamped`` made them.

    Raises:
        ValueError: they are not.
    """
    start, end = _place(data)
    if data[start:end] != _seal(data, start, end):
        raise ValueError("its checksum says that it was changed or damaged")


def _place(data: bytes) -> tuple[int, int]:
    found = list(_SEAL.finditer(data))
    if not found:
        raise ValueError("it has no checksum, so that it is damaged, or an older version of fs-plugins wrote it")
    return found[-1].span(1)


def _seal(data: bytes, start: int, end: int) -> bytes:
    digest = hashlib.sha256(data[:start])
    digest.update(b"0" * (end - start))
    digest.update(data[end:])
    return digest.hexdigest()[: end - start].encode()


def sealed(value: Mapping[str, Any], indent: int | None = None) -> bytes:
    """A JSON object with its seal."""
    return stamped(json.dumps({**value, **UNSEALED}, indent=indent).encode())


def unsealed(data: bytes) -> dict[str, Any]:
    """What ``sealed`` was given.

    Raises:
        ValueError: the bytes are not as it made them.
    """
    check(data)
    value = parsed(data)
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    value.pop(SEAL, None)
    return value


def write(path: Path, value: Mapping[str, Any]) -> None:
    """Put a sealed JSON object in place of what is there.

    Raises:
        OutputError: it cannot be written.
    """
    replace(path, sealed(value, indent=1) + b"\n")


def read(
    path: Path, what: str, advice: str = "Put back a copy that is whole, or begin anew in another folder."
) -> dict[str, Any]:
    """What ``write`` wrote.

    Args:
        what: writes such files, such as "a training".
        advice: what to do where it is damaged.

    Raises:
        SettingError: the file is not there, damaged, or nothing of ours.
    """
    try:
        return unsealed(path.read_bytes().removesuffix(b"\n"))
    except (OSError, ValueError) as error:
        raise SettingError(f"{path} is not what {what} wrote: {error}. {advice}") from None


class Lines:
    """A file of sealed JSON objects, one a line, that grows: whatever was appended is on disk when ``append`` returns.

    A line that a kill cut off in the middle of writing is not there for readers, and makes way for the next.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def read(self) -> list[dict[str, Any]]:
        """Every whole line's value; none where there is no file.

        Raises:
            SettingError: it cannot be read, or a line is damaged, with its number.
        """
        try:
            lines = whole_lines(self.path)
        except OSError as error:
            raise SettingError(f"{self.path} cannot be read: {error}.") from None
        values = []
        for number, line in enumerate(lines, start=1):
            try:
                values.append(unsealed(line))
            except ValueError as error:
                raise self.damaged(number, error) from None
        return values

    def keyed(self, *names: str) -> dict[tuple[str, ...], dict[str, Any]]:
        """The lines by what they say under these names.

        Raises:
            SettingError: as for ``read``; or a line lacks a name, or repeats an earlier one.
        """
        found: dict[tuple[str, ...], dict[str, Any]] = {}
        for number, line in enumerate(self.read(), start=1):
            key = tuple(str(line.get(name)) for name in names)
            if not all(isinstance(line.get(name), str) for name in names):
                raise self.damaged(number, f"it does not say {' and '.join(names)}")
            if key in found:
                raise self.damaged(number, f"it says again what is known of {', '.join(key)}")
            found[key] = line
        return found

    def damaged(self, number: int, why: object) -> SettingError:
        """What is wrong with a line, and what to do."""
        return SettingError(
            f"{self.path} is damaged in line {number}: {why}. Remove the line, or the file, and run again: what it "
            "held is then done again."
        )

    def append(self, values: Iterable[Mapping[str, Any]]) -> None:
        """Add lines.

        Raises:
            OutputError: it cannot be written.
        """
        data = b"".join(sealed(value) + b"\n" for value in values)
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._append(data)

    def _append(self, data: bytes) -> None:
        with self.path.open("a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # half a line would swallow the next one
                    file.truncate(self.path.read_bytes().rfind(b"\n") + 1)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def replace(self, values: Iterable[Mapping[str, Any]]) -> None:
        """Put these lines in place of all there are."""
        replace(self.path, b"".join(sealed(value) + b"\n" for value in values))


def whole_lines(path: Path) -> list[bytes]:
    """A file's lines, none where there is no file; what follows the last line break was never finished."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def end(file: IO[bytes]) -> None:
    """Write a file's SHA-256 as its last line, which readers of zip archives pass over.

    Args:
        file: open for writing and reading.
    """
    digest = _digest(file, file.seek(0, os.SEEK_END))
    file.write(f"\nSHA-256 {digest}\n".encode())


def check_end(file: IO[bytes]) -> None:
    """Whether a file is as ``end`` left it; it is at its start afterwards.

    Raises:
        ValueError: it is not.
    """
    size = max(0, file.seek(0, os.SEEK_END) - _LAST_LINE_SIZE)
    file.seek(size)
    found = _LAST_LINE.fullmatch(file.read())
    if found is None:
        raise ValueError("it has no checksum at its end")
    if found[1].decode() != _digest(file, size):
        raise ValueError("its checksum says that it was changed or damaged")
    file.seek(0)


def _digest(file: IO[bytes], size: int) -> str:
    """The SHA-256 of a file's first bytes, after which it is."""
    digest = hashlib.sha256()
    file.seek(0)
    while block := file.read(min(size - file.tell(), _BLOCK)):
        digest.update(block)
    return digest.hexdigest()


def write_sums(folder: Path, names: Iterable[str]) -> None:
    """Write ``SHA256SUMS`` of these files of a folder.

    Raises:
        OutputError: one cannot be read, or it cannot be written.
    """
    with writing(folder / SUMS):
        replace(folder / SUMS, "".join(f"{_sum(folder / name)}  {name}\n" for name in names))


def wrong_sums(folder: Path, names: Iterable[str]) -> list[str]:
    """What is wrong with a folder that ``write_sums`` was called for with at least these files, in words."""
    try:
        told = [line.partition("  ")[::2] for line in (folder / SUMS).read_text("ascii").splitlines()]
        expected = {name: digest for digest, name in told}
    except (OSError, ValueError):
        return [f"{SUMS} is missing or damaged"]
    if len(expected) < len(told):
        return [f"{SUMS} is damaged: it lists a file twice"]
    wrong = [f"{SUMS} does not list {name}" for name in names if name not in expected]
    for name, digest in expected.items():
        path = folder / name
        if not name or not path.is_file():
            wrong.append(f"{name or 'a file'}, which {SUMS} lists, is missing")
        elif _sum(path) != digest:
            wrong.append(f"{name} is damaged: it has another checksum than {SUMS} says")
    return wrong


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hold(path: Path, settings: Mapping[str, Any], what: str) -> None:
    """Write down what a run depends on, or compare it with what an earlier run wrote.

    Raises:
        SettingError: other settings, which are named; a file that nothing of ours wrote.
        OutputError: it cannot be written.
    """
    if path.exists():
        agree(path, settings, what)
        return
    write(path, settings)


def agree(path: Path, settings: Mapping[str, Any], what: str) -> None:
    """Compare settings with those in a file.

    Raises:
        SettingError: they differ, or the file holds none.
    """
    different = changed(read(path, what), settings)
    if different:
        raise SettingError(
            f"{path.parent} holds {what} with other settings ({path.name}): {'; '.join(different[:4])}. Give the same "
            "ones, or another folder."
        )


def changed(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs between two runs' settings, in words."""
    before, now = flat(found), flat(wanted)
    return [
        f"{name} was {before.get(name)} and is {now.get(name)} now"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]


def flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested settings -> dotted names, as JSON would give them back."""
    told: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(settings)).items():
        told |= flat(value, f"{above}{name}.") if isinstance(value, dict) else {above + name: value}
    return told
