"""A command whose options are a settings dataclass: flags, ``--config file.yaml``, and the dataclass's own defaults."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from fs_plugins.errors import SettingError
from fs_plugins.settings import build, default, knobs, read

S = TypeVar("S")
CONFIG = "config"


def command(kind: type[S], run: Callable[[S], None], *, argument: str | None = None) -> Callable[..., None]:
    """A function for ``typer.Typer.command`` with ``kind``'s knobs as options, that calls ``run`` with the settings.

    What a flag says wins over what the file says, and that over the defaults.

    Args:
        kind: a frozen dataclass of ``knob``s.
        run: the command; its docstring is the command's help, its name without underscores in front the command's name.
        argument: the knob that is given by position.
    """
    assert is_dataclass(kind)
    hints = get_type_hints(kind)
    given_config = typer.Option(f"--{CONFIG}", help="A YAML file of these settings by their names; flags win over it.")
    parameters = [
        inspect.Parameter(
            CONFIG, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, given_config]
        )
    ]
    for one, about in knobs(kind):
        shown = default(one)
        told: dict[str, Any] = {"help": about.help}
        if one.name == argument:
            option: Any = typer.Argument(**told)
        else:
            flag = about.flag or f"--{one.name.replace('_', '-')}"
            if hints[one.name] is not bool:
                told["show_default"] = False if shown is None or shown == () else str(shown)
            option = typer.Option(flag, rich_help_panel=about.panel, **told)
        parameters.append(
            inspect.Parameter(
                one.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[_optional(hints[one.name]), option],
            )
        )

    def called(config: Path | None = None, **flags: Any) -> None:
        from fs_plugins.cli.base import errors_for_people

        with errors_for_people():
            if config is not None and not os.path.isfile(config):
                raise SettingError(f"There is no file {config} to read settings from.")
            filed = read(kind, config) if config is not None else {}
            asked = {name: value for name, value in flags.items() if value is not None and value != []}
            settings = build(kind, {**filed, **asked}, str(config) if config is not None else "These options")
            run(settings)

    called.__doc__ = run.__doc__
    called.__name__ = run.__name__.lstrip("_")
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {one.name: one.annotation for one in parameters}
    return called


def _optional(hint: Any) -> Any:
    """A knob that no flag sets is None here. ``tuple[str, ...]`` may be given several times."""
    return list[str] | None if hint == tuple[str, ...] else hint | None
