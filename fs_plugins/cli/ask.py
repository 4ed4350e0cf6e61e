"""``fs-plugins ask``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.box import HORIZONTALS
from rich.table import Table

from fs_plugins.cli.base import console, errors_for_people, needs


def ask(
    model: Annotated[
        str,
        typer.Argument(
            help='Folder or hub id of an image-text-to-text model; "demo" and "photo-vlm" ship. With --endpoint the '
            "name that the server knows."
        ),
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
    endpoint: Annotated[
        str | None,
        typer.Option(
            help="Ask a served model instead, in OpenAI's protocol: fs-plugins serve, vLLM, others. Such as "
            "http://127.0.0.1:8000/v1; a key is read from OPENAI_API_KEY."
        ),
    ] = None,
) -> None:
    """The answer without and with smoothing, side by side, with the time each took; or that of a served model."""
    with errors_for_people():
        if endpoint is not None:
            from fs_plugins.evaluation.served import refuse_smoothing

            refuse_smoothing(psm, sigma, n0, seed)
            _ask_served(endpoint, model, image, question, max_new_tokens)
            return
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
        answers = (("without", told.without), ("with fs_plugins", told.smoothed))
        _show(image, question, *((way, answer.text, answer.seconds) for way, answer in answers))
        console.print(str(told.status), style="dim", soft_wrap=True)


def _ask_served(endpoint: str, model: str, image: Path, question: str, max_new_tokens: int) -> None:
    from fs_plugins import pictures
    from fs_plugins.evaluation.served import Question, ServedModel

    served = ServedModel(endpoint, model, retries=0)
    asked = Question(pictures.rgb(image), question, max_new_tokens)
    began = time.perf_counter()
    (said,) = served.each([asked])
    _show(image, question, ("as served", said, time.perf_counter() - began))


def _show(image: Path, question: str, *answers: tuple[str, str, float]) -> None:
    console.print(f"{image.name}: {question}")
    table = Table(box=HORIZONTALS)
    table.add_column("")
    table.add_column("answer", overflow="fold")
    table.add_column("seconds", justify="right")
    for way, text, seconds in answers:
        table.add_row(way, text or "(nothing)", f"{seconds:.2f}")
    console.print(table)
