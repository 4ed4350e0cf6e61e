"""``fs-plugins doctor``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from fs_plugins import errors
from fs_plugins.cli.base import console, errors_for_people, needs, plain_table
from fs_plugins.terminal import styled


def doctor(
    model: Annotated[
        str | None, typer.Argument(help='Folder or hub id of a transformers model; "demo" and "photo-vlm" ship.')
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help='Ask this one alone, such as "hf_any" about a family that nobody has tested.')
    ] = None,
) -> None:
    """What is installed, which adapters loaded, and what enable would find in a model."""
    with errors_for_people():
        from fs_plugins import doctor as consulting

        table = plain_table("framework", "version")
        for name, number in consulting.frameworks().items():
            table.add_row(name, number or styled("not installed", "dim"))
        console.print(table)
        table = plain_table("plugin", "from", "provides")
        for plugin in consulting.plugins():
            provides = ", ".join(plugin.hooks) if plugin.problem is None else styled(plugin.problem, "red")
            origin = styled(f"{plugin.distribution}\n") + styled(plugin.location, "dim")
            table.add_row(plugin.name, origin, provides)
        console.print(table)
        if model is None:
            if adapter is not None:
                raise errors.SettingError("--adapter is asked about a model: name one.")
            return
        needs("transformers")
        from fs_plugins.hf.load import load_model, load_processor, quieten

        quieten()
        found = consulting.diagnose(load_model(model), adapter, load_processor(model) if adapter else None)
        lines = [("model", found.model)]
        lines += [("claimed by", f"{name}: {rule}") for name, rule in found.rules.items()]
        for encoder in found.encoders:
            lines += [
                ("encoder", f"{encoder.module}, images {encoder.image_size}"),
                ("mean, std", encoder.pixels),
                ("features", ", ".join(encoder.readouts)),
                ("recognised", ", ".join(encoder.recognised) or "no entry of the registry has this encoder"),
                ("PSM", encoder.psm),
            ]
        table = Table(box=None, show_header=False)
        for what, told in lines:
            table.add_row(styled(what, "bold"), told)
        console.print(table)
        if found.problem:
            raise errors.ModelError(found.problem)
