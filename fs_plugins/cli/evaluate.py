"""``fs-plugins evaluate``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from fs_plugins.cli.base import Crew, console, duration, needs, progress
from fs_plugins.cli.options import command
from fs_plugins.evaluation.settings import Settings
from fs_plugins.terminal import styled

if TYPE_CHECKING:
    from fs_plugins.evaluation import Results


def _evaluate(settings: Settings) -> None:
    """The paper's tables on a model: attacks, defences, tasks, certificates. Terminal, CSV and one HTML report.

    Under accelerate launch the pictures are shared among the processes.
    """
    needs("transformers", "matplotlib", "ot", extra="evaluate")
    from fs_plugins.demo import shipped
    from fs_plugins.demo.dataset import write
    from fs_plugins.evaluation import whole
    from fs_plugins.hf.load import quieten
    from fs_plugins.hf.subjects import loader

    quieten()
    began, crew = time.time(), Crew.assemble()
    written: list[Results] = []
    try:
        with progress() as track:
            whole.evaluate(
                settings,
                loader(settings.model, settings.class_prompt, processor=settings.processor),
                scenes=write,
                **shipped.belongings(settings.model),
                track=track,
                share=(crew.rank, crew.size),
                wait=crew.wait,
                ready=written.append,
            )
    finally:  # also where a judge failed
        for results in written:
            _show(results, settings, began)


evaluate = command(Settings, _evaluate)


def _show(results: Results, settings: Settings, began: float) -> None:
    from fs_plugins.cli import tables

    for sentence in results.plan.dataset.skipped:
        console.print(styled("Skipped", "yellow"), f" {sentence}")
    tables.show(results.tables())
    for note in results.notes():
        console.print(styled("Left out", "yellow"), f" {note}", soft_wrap=True)
    setup = results.plan.setup
    console.print(
        f"\n{len(results.plan.dataset.samples)} pictures, attacks of {setup.steps} steps; on "
        f"{setup.adaptive_images or 'all'} of them adaptive ones, {setup.adaptive_steps} steps of "
        f"{setup.adaptive_draws} x n0 draws; seed {setup.seed}. {duration(time.time() - began)}.\n"
        f"Written: {settings.folder / 'report.html'}, and a CSV of each table, summary.json and all rows beside it",
        soft_wrap=True,
    )
