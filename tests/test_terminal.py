"""What reaches a terminal: every character of a foreign text, none of its commands."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from fs_plugins.terminal import Terminal, bars, shown, styled, watched

FOREIGN = (
    "[person]",
    "[/INST]",
    "[bold]loud[/bold]",
    "[link=https://x.example]y[/link]",
    r"\[escaped]",
    ":smiley:",
    "a\x1b[31mred",
    "\x1b]0;title\x07",
    "over\rwritten",
    "b\x08\x7f\x9b2J",
    "\u202egnp.exe",
    "\u2066x\u2069",
    "\udcff.png",
    "\u2028two",
    "日本 é 🙂",
    "{task.fields[x]}",
)
"""Markup, controls, turned text, half a surrogate pair, and what must come through as it is."""


def told(*what: object) -> str:
    out = io.StringIO()
    terminal = Terminal(file=out, width=200, force_terminal=True, color_system="truecolor", no_color=True)
    terminal.print(*what)
    return out.getvalue()


@pytest.mark.parametrize("text", FOREIGN)
def test_every_way_of_saying_a_text_says_all_of_it_and_obeys_none_of_it(text):
    table = Table(text)
    table.add_row(text)
    table.add_row(styled(text, "bold"))
    for way in (text, styled(text, "bold"), table):
        said = told(way)
        assert shown(text) in said.replace("\x1b[1m", "").replace("\x1b[0m", "")
        assert not set(said.replace("\x1b[1m", "").replace("\x1b[0m", "")) & set("\x1b\x07\r\x08\x7f\x9b\u202e\u2066")
        said.encode("utf-8")


@pytest.mark.parametrize("text", FOREIGN)
def test_progress_bars_say_names_as_they_are(text, capfd):
    with bars("{task.completed}") as progress:
        progress.console.width = 200
        progress.add_task(text)
    assert shown(text) in capfd.readouterr().err
    with watched(io.BytesIO(b"abc"), 3, text, hidden=False) as stream:
        stream.read()
    assert shown(text)[:8].strip() in capfd.readouterr().err


def test_what_steers_a_terminal_is_an_escape_and_all_else_is_as_it_was():
    assert shown("a\x1b[0m\udcff\u202e\x85") == r"a\x1b[0m\udcff\u202e\x85"
    assert shown("line\nline\ttab\r\nend") == "line\nline\ttab\nend"
    assert shown("日本 é 🙂 [x] \\") == "日本 é 🙂 [x] \\"


@given(st.text(st.characters(codec=None)))
def test_any_text_can_be_written_and_steers_nothing(text):
    said = shown(text)
    said.encode("utf-8")
    assert not [c for c in said if (c < " " and c not in "\n\t") or "\x7f" <= c <= "\x9f"]
    assert shown(said) == said
