"""``fs-plugins ask``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.box import HORIZONTALS
from rich.table import Table

from fs_plugins.cli.base import console, errors_for_people, needs


def ask(
    model: Annotated[
        str, typer.Argument(help='Folder or hub id of an image-text-to-text model; "demo" and "photo-vlm" ship.')
    ],
    image: Annotated[Path, typer.Argument(help="A PNG or JPEG file.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    psm: Annotated[
        str,
        typer.Option(help='"auto", "photo-light", "diffusion", "none" for plain smoothing, a PSM folder or hub id.'),
    ] = "auto",
    sigma: Annotated[float | None, typer.Option(help="Noise level in [0, 1] pixels; left out, the PSM's own.")] = None,
    n0: Annotated[int, typer.Option(min=1, help="Noisy draws per image.")] = 4,
    seed: Annotated[int | None, typer.Option(help="Reproducible noise.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
) -> None:
    """The answer without and with smoothing, side by side, with the time each took."""
    with errors_for_people():
        needs("transformers")
        from fs_plugins import pictures
        from fs_plugins.hf.chat import compare
        from fs_plugins.hf.load import load_chat, quieten

        quieten()
        picture = pictures.rgb(image)
        loaded, processor = load_chat(model)
        told = compare(
            loaded, processor, picture, question, psm=psm, sigma=sigma, n0=n0, seed=seed, max_new_tokens=max_new_tokens
        )
        console.print(f"{image.name}: {question}")
        table = Table(box=HORIZONTALS)
        table.add_column("")
        table.add_column("answer", overflow="fold")
        table.add_column("seconds", justify="right")
        for way, answer in (("without", told.without), ("with fs_plugins", told.smoothed)):
            table.add_row(way, answer.text or "(nothing)", f"{answer.seconds:.2f}")
        console.print(table)
        console.print(str(told.status), style="dim", soft_wrap=True)
