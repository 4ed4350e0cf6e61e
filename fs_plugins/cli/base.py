"""What every command shares: errors and progress for people, models by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.box import HORIZONTALS
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from fs_plugins import errors

console = Console()


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def source(name: str) -> str:
    """A model's folder or hub id; "demo" and "demo-clip" are those that ship."""
    from fs_plugins.demo import assets

    return {"demo": str(assets.LLAVA), "demo-clip": str(assets.CLIP)}.get(name, name)


def load(name: str) -> Any:
    """A transformers model of whatever class its configuration names, or an encoder of the registry."""
    import transformers

    from fs_plugins.api import known_encoders
    from fs_plugins.towers import load_encoder

    if source(name) == name and not Path(name).exists() and name in known_encoders().entries:
        return load_encoder(name)
    try:
        config = transformers.AutoConfig.from_pretrained(source(name))
        own = [kind for kind in getattr(config, "architectures", None) or () if hasattr(transformers, kind)]
        kind = getattr(transformers, own[0]) if own else transformers.AutoModel
        return kind.from_pretrained(source(name), dtype="auto").eval()
    except (OSError, ValueError) as error:
        raise errors.ModelError(f"Cannot load {name!r} with transformers: {error}") from None


def needs(*packages: str, extra: str = "demo") -> None:
    from importlib.util import find_spec

    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise errors.SettingError(f'This command needs {" and ".join(missing)}: pip install "fs-plugins[{extra}]".')


def quieten() -> None:
    """Keep transformers' loading bars and notices out of a command's output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def plain_table(*columns: str) -> Table:
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


def bars(count: str, *more: TextColumn) -> Progress:
    """Progress bars on stderr; ``count`` says how far a task is, ``more`` comes last."""
    first = (TextColumn("{task.description}"), BarColumn(), TextColumn(count))
    return Progress(*first, TimeElapsedColumn(), TimeRemainingColumn(), *more, console=Console(stderr=True))


@contextmanager
def progress() -> Iterator[Any]:
    with bars("{task.percentage:>3.0f} %") as shown:

        def track(what: str, total: int) -> Any:
            task = shown.add_task(what, total=total)
            return lambda done: shown.advance(task, done)

        yield track


@contextmanager
def errors_for_people() -> Iterator[None]:
    try:
        yield
    except errors.FSPluginsError as error:
        _leave(error, "")
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; not every command has imported it
            raise
        _leave(error, " Less at once needs less: a smaller --batch-size or --chunk-size, where this command has them.")


def _leave(error: Exception, advice: str) -> NoReturn:
    console.print(f"[bold red]Error[/]  {type(error).__name__}:", end=" ")
    console.print(f"{error}{advice}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(2) from None


@dataclass(frozen=True)
class Crew:
    """The processes that share the images (``accelerate launch``, ``torchrun``), and which of them this is."""

    rank: int = 0
    size: int = 1
    wait: Callable[[], None] = lambda: None

    @classmethod
    def assemble(cls) -> Crew:
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        needs("accelerate")
        from accelerate import PartialState

        # Shares differ in length: whoever is done first waits for the last.
        state = PartialState(cpu=device() == "cpu", timeout=timedelta(days=7))
        return cls(state.process_index, state.num_processes, state.wait_for_everyone)
