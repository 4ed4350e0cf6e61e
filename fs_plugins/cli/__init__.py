"""``fs-plugins``: the demo, one question to any model, certificates, training, evaluation, and a look at what is installed."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import typer
from rich.console import Console

from fs_plugins import errors
from fs_plugins.cli.ask import ask
from fs_plugins.cli.certify import certify
from fs_plugins.cli.demo import demo
from fs_plugins.cli.doctor import doctor
from fs_plugins.cli.evaluate import evaluate
from fs_plugins.cli.registry import app as registry
from fs_plugins.cli.train import train

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for command in (demo, ask, certify, evaluate, train, doctor):
    app.command()(command)
app.add_typer(registry, name="registry")


def main() -> None:
    """Entry point."""
    warnings.showwarning = _show_warning
    warnings.filterwarnings("once", category=errors.FSPluginsWarning)  # however often a command asks
    app()


def _show_warning(message: Any, category: Any, filename: Any, lineno: Any, file: Any = None, line: Any = None) -> None:
    if issubclass(category, errors.FSPluginsWarning):
        Console(stderr=True).print(f"Warning: {message}", style="yellow", markup=False, soft_wrap=True)
    elif not sys.warnoptions:
        return
