"""What every command shares: errors, tables and progress for people, and the processes of a run."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, TypeVar

import typer
from rich.box import HORIZONTALS
from rich.table import Table

from fs_plugins import errors
from fs_plugins.terminal import Terminal, bars, styled

T = TypeVar("T")

console, complaints = Terminal(), Terminal(stderr=True)


def needs(*packages: str, extra: str = "demo") -> None:
    """Raise a SettingError if packages are missing that an extra of ours brings."""
    if absent := missing(*packages):
        raise errors.SettingError(f'This command needs {" and ".join(absent)}: pip install "fs-plugins[{extra}]".')


def missing(*packages: str) -> list[str]:
    """Those that are not installed."""
    from importlib.util import find_spec

    return [package for package in packages if find_spec(package) is None]


def plain_table(*columns: str) -> Table:
    """A table without edges whose cells fold."""
    table = Table(box=HORIZONTALS, show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def promise(value: float | None, units: int = 1) -> str:
    """A certified cosine or distance; None is "none". ``units`` = 255 writes it in 255ths."""
    return "none" if value is None else f"{value:.3f}" if units == 1 else f"{value * units:.2f}/{units}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, as they are said."""
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )


@contextmanager
def progress() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """A bar for each ``track(what, total)``, which gives what moves it on by so much."""
    with bars("{task.percentage:>3.0f} %") as shown:

        def track(what: str, total: int) -> Callable[[int], None]:
            task = shown.add_task(what, total=total)
            return lambda done: shown.advance(task, done)

        yield track


@contextmanager
def errors_for_people() -> Iterator[None]:
    """Errors that are a user's to mend are told in a sentence, and the process leaves with 2; others are not hidden."""
    try:
        yield
    except errors.FSPluginsError as error:
        _leave(error, "")
    except OSError as error:
        if error.errno in (None, errno.EPIPE):  # nobody reads on: no error of this command
            raise
        where = "" if error.filename is None else f": {error.filename}"
        _leave(errors.OutputError(f"{error.strerror}{where}."), "")
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; not every command has imported it
            raise
        _leave(error, " Less at once needs less: a smaller --batch-size or --chunk-size, where this command has them.")


def _leave(error: Exception, advice: str) -> NoReturn:
    told = (styled("Error", "bold red"), f" {type(error).__name__}: {error}{advice}")
    try:
        console.print(*told, soft_wrap=True)
    except OSError as full:
        if full.errno == errno.EPIPE:
            raise
        complaints.print(*told, soft_wrap=True)
    raise typer.Exit(2) from None


@dataclass(frozen=True)
class Crew:
    """The processes that share the images (``accelerate launch``, ``torchrun``), and which of them this is."""

    rank: int = 0
    size: int = 1
    wait: Callable[[], None] = lambda: None

    @classmethod
    def assemble(cls) -> Crew:
        """This process alone, or all that a launcher started."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        needs("accelerate")
        from accelerate import PartialState

        from fs_plugins.hf.load import place

        # Shares differ in length: whoever is done first waits for the last.
        state = PartialState(cpu=place() == "cpu", timeout=timedelta(days=7))
        return cls(state.process_index, state.num_processes, state.wait_for_everyone)


def short(certificates: Mapping[str, T]) -> dict[str, T]:
    """Files by their names alone, where these differ."""
    alone = Counter(Path(name).name for name in certificates)
    return {Path(name).name if alone[Path(name).name] == 1 else name: one for name, one in certificates.items()}


def note(text: str) -> None:
    console.print(text, style="dim")
