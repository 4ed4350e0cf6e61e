"""``fs-plugins ask``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import HORIZONTALS
from rich.table import Table

from fs_plugins import errors
from fs_plugins.cli.base import console, errors_for_people, needs


def ask(
    model: Annotated[
        str, typer.Argument(help='Folder or hub id of an image-text-to-text model; "demo" is the one that ships.')
    ],
    image: Annotated[Path, typer.Argument(help="A PNG or JPEG file.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    psm: Annotated[
        str, typer.Option(help='"auto", "photo", "diffusion", "none" for plain smoothing, a PSM folder or hub id.')
    ] = "auto",
    sigma: Annotated[float | None, typer.Option(help="Noise level in [0, 1] pixels; left out, the PSM's own.")] = None,
    n0: Annotated[int, typer.Option(min=1, help="Noisy draws per image.")] = 4,
    seed: Annotated[int | None, typer.Option(help="Reproducible noise.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
) -> None:
    """The answer without and with smoothing, side by side, with the time each took."""
    with errors_for_people():
        needs("transformers")
        import fs_plugins
        from fs_plugins.hf.chat import ask as answer
        from fs_plugins.hf.load import load_chat, quieten

        quieten()

        picture = _picture(image)
        loaded, processor = load_chat(model)

        def timed() -> tuple[str, float]:
            began = time.perf_counter()
            return answer(loaded, processor, [picture], [question], max_new_tokens=max_new_tokens)[
                0
            ], time.perf_counter() - began

        answer(loaded, processor, [picture], [question], max_new_tokens=1)  # the first call pays for warming up
        plain, plain_seconds = timed()
        with fs_plugins.enable(loaded, psm=psm, sigma=sigma, n0=n0, seed=seed) as handle:
            smoothed, smoothed_seconds = timed()
            told = handle.status()
        console.print(f"{image.name}: {question}", markup=False, highlight=False)
        table = Table(box=HORIZONTALS)
        table.add_column("")
        table.add_column("answer", overflow="fold")
        table.add_column("seconds", justify="right")
        table.add_row("without", plain or "(nothing)", f"{plain_seconds:.2f}")
        table.add_row("with fs_plugins", smoothed or "(nothing)", f"{smoothed_seconds:.2f}")
        console.print(table)
        console.print(str(told), style="dim", highlight=False, soft_wrap=True)


def _picture(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except FileNotFoundError:
        raise errors.SettingError(f"There is no file {path}.") from None
    except (UnidentifiedImageError, OSError) as error:
        raise errors.SettingError(f"{path} is not a readable image: {error}") from None
