"""``fs-plugins playground`` as far as it goes without gradio, and the Space that is the same."""

from __future__ import annotations

import os
import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fs_plugins.cli import app
from fs_plugins.playground.__main__ import main

SPACE = Path(__file__).parents[2] / "docs" / "space"


def test_without_gradio_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gradio" else find_spec(name))
    answered = CliRunner().invoke(app, ["playground"], env={"COLUMNS": "200"})
    assert answered.exit_code == 2
    assert 'pip install "fs-plugins[playground]"' in answered.stdout


@pytest.mark.parametrize("space", [True, False])
def test_visitors_of_a_space_are_told_apart_by_its_proxy(monkeypatch, space):
    monkeypatch.setattr("fs_plugins.playground.__main__.serve", lambda ready: ready("http://here"))
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "")  # restored afterwards, whoever sets it
    monkeypatch.delenv("FORWARDED_ALLOW_IPS")
    monkeypatch.delenv("SPACE_ID", raising=False)
    if space:
        monkeypatch.setenv("SPACE_ID", "owner/name")
    main()
    assert os.environ.get("FORWARDED_ALLOW_IPS") == ("*" if space else None)


def test_the_space_is_the_module():
    assert runpy.run_path(str(SPACE / "app.py"), run_name="app")["main"] is main
    assert (SPACE / "requirements.txt").read_text("utf-8") == "fs-plugins[playground]\n"
    assert "app_file: app.py" in (SPACE / "README.md").read_text("utf-8")
