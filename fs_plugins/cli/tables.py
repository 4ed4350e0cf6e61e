"""Tables of an evaluation in a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING

from rich.table import Table as Drawn

from fs_plugins.cli.base import console, plain_table
from fs_plugins.terminal import styled

if TYPE_CHECKING:
    from fs_plugins.evaluation import Table


def show(tables: Iterable[Table]) -> None:
    """Print tables with their titles, and each note once."""
    said = {""}
    for table in tables:
        console.print(styled(f"\n{table.title}\n", "bold"))
        console.print(drawn(table))
        if table.note not in said:
            console.print(table.note, style="dim")
        said.add(table.note)


def drawn(table: Table) -> Drawn:
    """Rows with the same first cell are a section under it; pooled cosines and scores are left to CSV and report."""
    from fs_plugins.evaluation.tables import parted

    kept = [place for place, column in enumerate(table.columns) if not {"pooled", "score"} & set(column.split())]
    groups = [(head, list(rows)) for head, rows in groupby(table.rows, key=lambda row: row[0])]
    sections = "defence" in table.columns[1:] and len(groups) < len(table.rows)
    kept = kept[1:] if sections else kept
    words = {place for place in kept if all(isinstance(row[place], str) for row in table.rows)}
    shown = plain_table()
    shown.padding = (0, 1, 0, 0)
    for place in kept:
        # Words are broken rather than figures, as long as figures are few.
        whole = place not in words and len(kept) <= 6
        shown.add_column(
            table.headings[place], justify="left" if place in words else "right", overflow="fold", no_wrap=whole
        )
    for head, rows in groups:
        if sections:
            shown.add_section()
            shown.add_row(styled(str(head), "bold"))
        for row in rows:
            cells = (parted(row[place]) for place in kept)
            shown.add_row(*(styled(said + " " * bool(interval)) + styled(interval, "dim") for said, interval in cells))
    return shown
