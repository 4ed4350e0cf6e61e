"""``fs-plugins demo``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fs_plugins.cli.base import console, duration, needs, progress
from fs_plugins.cli.options import command
from fs_plugins.demo.settings import Settings

if TYPE_CHECKING:
    from fs_plugins.evaluation.picture import Panel


def _demo(settings: Settings) -> None:
    """Attack a small real LLaVA live, without and with the plugin. Offline, about a minute and a half on two cores."""
    needs("transformers", "matplotlib")
    from fs_plugins.cli import tables
    from fs_plugins.demo import run as demos
    from fs_plugins.hf.load import quieten
    from fs_plugins.hf.subjects import loader

    quieten()

    with progress() as track:
        result = demos.run(settings, loader("demo"), track=track, first=_first)
    console.print(
        f"{settings.count} held-out scenes, targeted attack at l-inf {result.attacked.eps255:g}/255, "
        f"{settings.steps} steps; sigma {result.sigma:g}, n0 {settings.n0}"
    )
    tables.show(result.tables())
    written = f"{settings.out / 'summary.json'}, {settings.out / 'demo.png'} and all answers beside them"
    console.print(f"\n{duration(result.seconds)}. Written: {written}", soft_wrap=True)


demo = command(Settings, _demo)


def _first(path: Path, panel: Panel) -> None:
    console.print(
        f"The first pictures are attacked: {path}. Of one the model said “{panel.said_clean}” before, "
        f"“{panel.said_attacked}” after, and “{panel.said_protected}” with the plugin.\n",
        soft_wrap=True,
    )
