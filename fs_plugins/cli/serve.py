"""``fs-plugins serve``."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from fs_plugins.cli.base import console, errors_for_people, needs
from fs_plugins.errors import SettingError

TRIED = "5.17"
"""The version of transformers whose server ours is made on."""


def serve(
    model: Annotated[
        str, typer.Argument(help='Folder or hub id of an image-text-to-text model; "demo" and "photo-vlm" ship.')
    ],
    processor: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of the model's processor, where none is beside the model."),
    ] = None,
    psm: Annotated[
        str,
        typer.Option(help='"auto", "photo-light", "diffusion", "none" for plain smoothing, a PSM folder or hub id.'),
    ] = "auto",
    sigma: Annotated[float | None, typer.Option(help="Noise level in [0, 1] pixels; left out, the PSM's own.")] = None,
    n0: Annotated[int, typer.Option(min=1, help="Noisy draws per image.")] = 4,
    seed: Annotated[
        int | None, typer.Option(help="Reproducible noise, for experiments: who knows the seed knows the noise.")
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is to everybody.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any that is free.")] = 8000,
) -> None:
    """One smoothed model behind OpenAI's protocol, on transformers' own server. It starts protected or not at all."""
    with errors_for_people():
        needs("transformers", "fastapi", "uvicorn", "openai", extra="serve")
        found = version("transformers")
        if not found.startswith(f"{TRIED}."):
            raise SettingError(
                f"This stands inside transformers' server, which changes with its versions and might find another way "
                f'to a model: it is tried with {TRIED}, and {found} is installed. pip install "fs-plugins[serve]".'
            )
        from fs_plugins.hf import serving
        from fs_plugins.hf.load import quieten

        quieten()
        with serving.bound(host, port) as at:
            served = serving.smoothed(model, processor=processor, psm=psm, sigma=sigma, n0=n0, seed=seed)
            app = serving.application(served)
            console.print(str(served.handle.status()), style="dim", soft_wrap=True)
            place = serving.address(at)
            console.print(
                f"Serving {model!r} at {place}/v1; {place}{serving.STATUS} says what was smoothed. Ctrl-C ends it.",
                soft_wrap=True,
            )
            serving.run(app, at)
