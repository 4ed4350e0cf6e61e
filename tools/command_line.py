"""Writes docs/reference/command-line.md from the options themselves: ``python -m tools.command_line``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from fs_plugins.cli import app

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "command-line.md"
HEAD = """# The command line

What `fs-plugins COMMAND --help` says, on one page. `fs-plugins` and `python -m fs_plugins.cli` are the same. This page
is written by `python -m tools.command_line`. `fs-plugins --version` prints the version.

A command leaves with 0, with 1 where `registry verify` found something wrong, and with 2 and a sentence where it was
asked for what cannot be done or written. What models, files and servers say is shown as it is: nothing of it is read as
markup, and characters that would steer the terminal, or that it lacks, are shown as escapes (`\\x1b`). In CSV files a
text that a spreadsheet would run as a formula begins with an apostrophe.
"""


def page() -> str:
    """The page, a section a command."""
    return "\n".join([HEAD, *_sections("fs-plugins", typer.main.get_command(app))])


def _sections(name: str, command: Any) -> Iterator[str]:
    if hasattr(command, "commands"):
        for inner, one in command.commands.items():
            yield from _sections(f"{name} {inner}", one)
        return
    given = [one.name.upper() for one in command.params if one.param_type_name == "argument"]
    yield f"## {name}\n\n    {' '.join([name, *given])}\n\n{_sentence(command.help)}\n"
    if rows := [_row(one) for one in command.params if not one.hidden]:
        yield "| | if left out | |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def _row(one: Any) -> str:
    positional = one.param_type_name == "argument"
    flags = [one.name.upper()] if positional else [*one.opts, *one.secondary_opts]
    return f"| {', '.join(f'`{flag}`' for flag in flags)} | {_default(one)} | {_sentence(one.help)} |"


def _default(one: Any) -> str:
    """What the help calls the default."""
    if one.required:
        return "required"
    if isinstance(one.show_default, str):
        return f"`{one.show_default}`"
    if one.show_default is False or one.default in (None, "", ()) or one.default is False:
        return ""
    return f"`{one.default}`"


def _sentence(help: str | None) -> str:
    return " ".join((help or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
