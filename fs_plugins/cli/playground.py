"""``fs-plugins playground``."""

from __future__ import annotations

from typing import Annotated

import typer

from fs_plugins.cli.base import console, errors_for_people, needs


def playground(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help='Folders or hub ids of image-text-to-text models, or of models like CLIP; "demo", "demo-clip" and '
            '"photo-vlm" ship. demo and demo-clip, if left out. Visitors choose among them; one is in memory.'
        ),
    ] = None,
    psm: Annotated[
        str,
        typer.Option(help='"auto", "photo-light", "diffusion", "none" for plain smoothing, a PSM folder or hub id.'),
    ] = "auto",
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is to everybody.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Left out, the first that is free from 7860 on.")
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Also serve to everybody, through a tunnel of gradio's makers.")
    ] = False,
) -> None:
    """A page to look at: attack a picture live, ask the model without and with the plugin, certify. Until Ctrl-C."""
    with errors_for_people():
        needs("transformers", "matplotlib", "gradio", extra="playground")
        from fs_plugins.hf.load import quieten
        from fs_plugins.playground.server import DEFAULT_MODELS, serve

        quieten()

        def ready(address: str) -> None:
            console.print(f"The playground is at {address}. Ctrl-C ends it.", soft_wrap=True)

        serve(models or DEFAULT_MODELS, psm=psm, host=host, port=port, share=share, ready=ready)
