"""The one writer of durable files: whole after a kill at any moment, and one process's at a time where they must be.

Whatever is read again by a later run (ledgers, stores, checkpoints, registries, downloads) or published (PSMs, reports)
is written here. Text is UTF-8 whatever the platform; readers take a byte order mark.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from fs_plugins.errors import OutputError, SettingError

_ARMED = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_PARTIAL = ".fs-plugins-partial-"
LOCK = ".lock"


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """What hinders the system in writing there is said of the place.

    Raises:
        OutputError: in place of any other OSError.
    """
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise _unwritten(place, error) from error


def _unwritten(place: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{place} cannot be written: {error.strerror or error}. Make room for it, or give another place."
    )


def atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that, whenever the machine stops, either the old or the new one is there, whole. The folder is
    made.

    Raises:
        OutputError: it cannot be written; nothing is left behind.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _atomically(path, write)


def _atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w+b") as file:
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
    """``atomically`` for what is at hand; text is UTF-8.

    Raises:
        OutputError: it cannot be written.
    """
    data = content if isinstance(content, bytes) else spelled(content).encode()
    atomically(path, lambda file: file.write(data))


def begun(path: Path) -> None:
    """An empty file, unless there is one already, which another process may have made just now. The folder is made.

    Raises:
        OutputError: it cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            path.open("xb").close()


def real(path: str | os.PathLike[str]) -> Path:
    """Where a path leads by links. One whose links go in a circle is as it was, and cannot be opened."""
    return Path(os.path.realpath(path))


def spelled(text: str) -> str:
    """A text as UTF-8 can hold it: half a surrogate pair, as names of files have that are no text, is an escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def mark(text: str) -> str:
    """SHA-256 of a text, such as a name, also of one that no file can hold."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def table(rows: Iterable[Iterable[object]]) -> str:
    """CSV. A text that a spreadsheet would run as a formula gets an apostrophe before it; numbers stay numbers."""
    written = io.StringIO(newline="")
    csv.writer(written).writerows([_unarmed(cell) for cell in row] for row in rows)
    return written.getvalue()


def _unarmed(cell: object) -> object:
    if not isinstance(cell, str) or not cell.startswith(_ARMED):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


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


def bare(path: Path) -> bytes:
    """What a text file holds, without a byte order mark; for those who decode it themselves.

    Raises:
        OSError: it cannot be read.
    """
    return path.read_bytes().removeprefix(codecs.BOM_UTF8)


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


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Hold a folder for this process; another one that wants it is told who has it.

    Released when the block or the process ends, however it ends. The processes of one run take it once, by their first.

    Args:
        what: that the folder is held for, such as "a training".

    Raises:
        SettingError: another process holds it.
        OutputError: it cannot be written to.
    """
    with _held(folder / LOCK, folder, f"Wait for it, or give another folder for {what}.", 0.0):
        yield


@contextmanager
def locked_file(path: Path, what: str, wait: float = 0.0) -> Iterator[None]:
    """``locked`` for one file, by a hidden one beside it.

    Args:
        wait: seconds to wait for another process.

    Raises:
        SettingError, OutputError: as for ``locked``.
    """
    with _held(path.with_name(f".{path.name}{LOCK}"), path, f"Wait for it, or give another file for {what}.", wait):
        yield


@contextmanager
def _held(place: Path, held: Path, advice: str, wait: float) -> Iterator[None]:
    told = place.with_name(f"{place.name}-owner")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place)
        lock.acquire(timeout=wait)
    except Timeout:
        owner = "another process"
        with suppress(OSError, ValueError):
            owner = text(told).strip() or owner
        raise SettingError(f"{held} is in use by {owner}. {advice}") from None
    except OSError as error:
        raise _unwritten(held, error) from error
    try:
        with suppress(OSError):
            replace(told, f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        with suppress(OSError):
            told.unlink()
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


def unused(folder: Path, *marks: str, what: str) -> None:
    """Refuse a folder that holds something else.

    Args:
        marks: patterns of the files by which a folder of this kind is known; one of them will do.
        what: it should hold, such as "a training". Hidden files do not count.

    Raises:
        SettingError: it is a file, or a folder of other things.
    """
    others = folder.is_dir() and any(folder.glob("[!.]*"))
    if folder.is_file() or (others and not any(path for mark in marks for path in folder.glob(mark))):
        raise SettingError(f"{folder} exists and holds no {what}; choose another folder or empty it.")
