"""The one way to a terminal: what is not ours (of files, models, users, servers) is shown as it is, and never obeyed.

No string is read as rich's markup, and no character steers the terminal. Styles are given beside the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

# Controls but for line breaks and tabs, half surrogate pairs, line separators, and what turns the direction of text.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str) -> str:
    r"""Text with all that would steer a terminal, or that no encoding has, as escapes such as \x1b."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text.replace("\r\n", "\n"))


def styled(text: str, style: str = "") -> Text:
    """``shown`` in a style, to be printed or put into a table."""
    return Text(shown(text), style)


class Terminal(Console):
    """rich's console, on standard output unless told otherwise."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **how: Any) -> Text:
        """What every string becomes on its way, also one in a table."""
        return super().render_str(shown(text), **how)


class Words(TextColumn):
    """What a progress bar says beside itself."""

    def render(self, task: Task) -> Text:
        return styled(self.text_format.format(task=task), str(self.style))


def bars(count: str, *more: Words) -> Progress:
    """Progress bars on stderr; ``count`` says how far a task is, ``more`` comes last."""
    first = (Words("{task.description}"), BarColumn(), Words(count))
    return Progress(*first, TimeElapsedColumn(), TimeRemainingColumn(), *more, console=Terminal(stderr=True))


@contextmanager
def watched(file: BinaryIO, size: int, name: str, *, hidden: bool) -> Iterator[BinaryIO]:
    """A file whose reading moves a bar on stderr, unless it is ``hidden``."""
    columns = (Words("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Terminal(stderr=True), disable=hidden) as progress:
        yield progress.wrap_file(file, total=size, description=name)
