"""``fs-plugins``: the demo, one question to any model, certificates, training, evaluation, a look at what is installed.

A command imports torch, and what comes after it, only when it runs: help and version are quick.
"""

from __future__ import annotations

import sys
import warnings
from io import TextIOWrapper
from typing import Annotated, TextIO

import typer

from fs_plugins import (
    __version__,
    errors,
    torchvision_schemas,  # noqa: F401  (every command may import torchvision, if it is there)
)
from fs_plugins.cli.ask import ask
from fs_plugins.cli.base import complaints, console
from fs_plugins.cli.certify import certify
from fs_plugins.cli.demo import demo
from fs_plugins.cli.doctor import doctor
from fs_plugins.cli.evaluate import evaluate
from fs_plugins.cli.photos import photos
from fs_plugins.cli.playground import playground
from fs_plugins.cli.registry import app as registry
from fs_plugins.cli.serve import serve
from fs_plugins.cli.train import train

app = typer.Typer(
    help=__doc__.split("\n")[0], no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
for command in (demo, photos, playground, ask, serve, certify, evaluate, train, doctor):
    app.command()(command)
app.add_typer(registry, name="registry")


def _tell_version(wanted: bool) -> None:
    if wanted:
        console.print(__version__)
        raise typer.Exit


@app.callback()
def _every(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a character that the terminal lacks must not undo the work before it
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = _show_warning
    warnings.filterwarnings("once", category=errors.FSPluginsWarning)  # however often a command asks
    try:
        app()
    except OSError as error:  # standard output itself cannot be written to: in help, in the version
        if error.errno is None:
            raise
        complaints.print(f"Error  {error.strerror}")
        sys.exit(2)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Ours in a sentence; those of others, who speak to programmers, not at all."""
    if issubclass(category, errors.FSPluginsWarning):
        complaints.print(f"Warning: {message}", style="yellow", soft_wrap=True)
