"""The one writer of durable files: whole after a kill at any moment, and one process's at a time where they must be.

Whatever is read again by a later run (ledgers, stores, checkpoints, registries, downloads) or published (PSMs, reports)
is written here. Text is UTF-8 whatever the platform; readers take a byte order mark.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from fs_plugins.errors import SettingError

_PARTIAL = ".fs-plugins-partial-"
LOCK = ".lock"


def atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that, whenever the machine stops, either the old or the new one is there, whole.

    Raises:
        OSError: the folder is not there, or cannot be written to; nothing is left behind.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
    _flush(path.parent)


def replace(path: Path, content: str | bytes) -> None:
    """``atomically`` for what is at hand; text is UTF-8. The folder is made.

    Raises:
        OSError: the folder cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes) else content.encode()
    atomically(path, lambda file: file.write(data))


def text(path: Path) -> str:
    """What a text file says, in UTF-8, with or without a byte order mark.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8.
    """
    return path.read_text("utf-8-sig")


def parsed(text: str | bytes) -> Any:
    """JSON -> what it says; whatever is wrong with it is a ValueError, also nesting deeper than Python goes, or a name
    that is given twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    told = dict(pairs)
    if len(told) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return told


def value(path: Path) -> Any:
    """What a JSON file says.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON in UTF-8.
    """
    return parsed(text(path))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush(folder: Path) -> None:
    if os.name == "posix":  # elsewhere folders cannot be flushed
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class Lines:
    """A file of JSON values, one a line, that grows: whatever was appended is on disk when ``append`` returns.

    A line that a kill cut off in the middle of writing is not there for readers, and makes way for the next.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def read(self) -> list[Any]:
        """Every whole line's value; none where there is no file.

        Raises:
            ValueError: a whole line is no JSON, with its number.
        """
        values = []
        for number, line in enumerate(whole_lines(self.path), start=1):
            try:
                values.append(parsed(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
        return values

    def append(self, values: Iterable[Any]) -> None:
        """Add lines.

        Raises:
            OSError: it cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # half a line would swallow the next one
                    file.truncate(self.path.read_bytes().rfind(b"\n") + 1)
            file.write("".join(json.dumps(value) + "\n" for value in values).encode())
            file.flush()
            os.fsync(file.fileno())

    def replace(self, values: Iterable[Any]) -> None:
        """Put these lines in place of all there are."""
        replace(self.path, "".join(json.dumps(value) + "\n" for value in values))


def whole_lines(path: Path) -> list[str]:
    """A file's lines, none where there is no file; what follows the last line break was never finished."""
    if not path.exists():
        return []
    data = path.read_bytes()
    return data[: data.rfind(b"\n") + 1].decode().splitlines()


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Hold a folder for this process; another one that wants it is told who has it.

    Released when the block or the process ends, however it ends. The processes of one run take it once, by their first.

    Args:
        what: that the folder is held for, such as "a training".

    Raises:
        SettingError: another process holds it, or it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, blocking=False)
        lock.acquire()
    except Timeout:
        owner = "another process"
        with suppress(OSError):
            owner = (folder / f"{LOCK}-owner").read_text("utf-8").strip() or owner
        raise SettingError(f"{folder} is in use by {owner}. Wait for it, or give another folder for {what}.") from None
    except OSError as error:
        raise SettingError(f"Nothing can be written to {folder}: {error}.") from None
    try:
        (folder / f"{LOCK}-owner").write_text(f"process {os.getpid()} on {socket.gethostname()}\n", "utf-8")
        yield
    finally:
        with suppress(OSError):
            (folder / f"{LOCK}-owner").unlink()
        lock.release()


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """A scratch folder; if the block ends well its files go to ``folder``, each whole, when all of them are on disk.

    Several processes may fill a folder with the same files at once. What one that was killed left is removed by the
    next: its lock is free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_PARTIAL}*"):
        if left.is_dir():
            with suppress(OSError), _owning(left) as sure:
                if sure:
                    shutil.rmtree(left)
    fresh = folder / f"{_PARTIAL}{uuid.uuid4().hex}"
    with _owning(fresh):
        try:
            fresh.mkdir(mode=0o700)
            yield fresh
            for path in fresh.iterdir():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
            for path in sorted(fresh.iterdir()):
                os.replace(path, folder / path.name)
            _flush(folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


@contextmanager
def _owning(scratch: Path) -> Iterator[bool]:
    """Hold what stands for a scratch folder, from before it is made until it is gone; not surely, where the file system
    knows no locks.

    Raises:
        OSError: another process holds it.
    """
    lock = FileLock(f"{scratch}{LOCK}", blocking=False)
    with suppress(NotImplementedError):
        lock.acquire()
    try:
        yield lock.is_locked
    finally:
        lock.release()
        with suppress(OSError):
            os.unlink(lock.lock_file)


def unused(folder: Path, mark: str, what: str) -> None:
    """Refuse a folder that holds something else.

    Args:
        mark: the file by which a folder of this kind is known; hidden files do not count.
        what: it should hold, such as "a training".

    Raises:
        SettingError: it is a file, or a folder of other things.
    """
    others = [item.name for item in folder.glob("[!.]*")] if folder.is_dir() else []
    if folder.is_file() or (others and mark not in others):
        raise SettingError(f"{folder} exists and holds no {what}; choose another folder or empty it.")


def hold(path: Path, settings: Mapping[str, Any], what: str) -> None:
    """Write down what a run depends on, or compare it with what an earlier run wrote.

    Raises:
        SettingError: other settings, which are named; a file that nothing of ours wrote, or that cannot be written.
    """
    if path.exists():
        agree(path, settings, what)
        return
    try:
        replace(path, json.dumps(settings, indent=2) + "\n")
    except OSError as error:
        raise SettingError(f"Nothing can be written to {path.parent}: {error}.") from None


def agree(path: Path, settings: Mapping[str, Any], what: str) -> None:
    """Compare settings with those in a file.

    Raises:
        SettingError: they differ, or the file holds none.
    """
    try:
        different = changed(value(path), settings)
    except (ValueError, AttributeError) as error:
        raise SettingError(f"{path} is not what {what} wrote: {error}.") from None
    if different:
        raise SettingError(
            f"{path.parent} holds {what} with other settings: {'; '.join(different[:4])}. Give the same ones, or "
            "another folder."
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
