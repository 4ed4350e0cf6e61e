"""Names and answers of others, and terminals and platforms with an encoding of their own, through whole commands."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import fs_plugins
from fs_plugins.cli import app
from fs_plugins.demo import world
from fs_plugins.errors import SettingError
from fs_plugins.terminal import shown

NAMES = ("[INST].png", "[bold]x.png", "\x1b[31mred.png", "\udcff.png", "=cmd.png", "é.png", "-dash.png")


@pytest.fixture
def odd(tmp_path):
    folder = tmp_path / "pictures [INST]"
    folder.mkdir()
    for i, name in enumerate(NAMES):
        world.scene("heldout", i).draw().save(folder / name, "PNG")
    return folder


def said(*arguments, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    assert "\x1b" not in result.output
    return " ".join(result.output.split())


def test_certify_names_each_picture_and_each_file_as_it_is_called(odd, tmp_path):
    out = tmp_path / "o_[v2][/]"
    told = said("certify", odd, "--psm", "none", "--sigma", "0.25", "--n", "10", "--seed", "0", "--out", out)
    for name in NAMES:
        assert f"{shown(name)} " in told
    assert f"Written: {out}/certificates.jsonl" in told
    rows = [json.loads(line) for line in (out / "certificates.jsonl").read_text("utf-8").splitlines()[1:]]
    assert {row["image"] for row in rows} == {f"{odd}/{name}" for name in NAMES}


@pytest.mark.parametrize("text", ["[person]", "[/INST]", "[bold]x[/bold]", ":smiley:", "\x1b[2Jx", "\udcff", "a\\[b]"])
def test_an_answer_is_shown_exactly_as_the_model_gave_it(odd, monkeypatch, text):
    from fs_plugins.hf import chat, load

    answer = SimpleNamespace(text=text, seconds=1.0)
    told = SimpleNamespace(without=answer, smoothed=answer, status="status [x]")
    monkeypatch.setattr(load, "load_chat", lambda model: (None, None))
    monkeypatch.setattr(chat, "compare", lambda *given, **settings: told)
    output = said("ask", "demo", odd / "[INST].png", "what is [this]?")
    assert output.count(shown(text)) == 2
    assert "[INST].png: what is [this]?" in output
    assert "status [x]" in output


@pytest.mark.parametrize("text", ["[/INST]", "[red]no[/red]", "\x1b]0;title\x07", "\udcff\n{x}"])
def test_errors_and_warnings_say_names_as_they_are(text, capsys):
    from fs_plugins.cli import _show_warning
    from fs_plugins.cli.base import errors_for_people

    with pytest.raises(BaseException, match="2"), errors_for_people():
        raise SettingError(f"about {text}")
    _show_warning(f"about {text}", fs_plugins.FSPluginsWarning, "", 0)
    out, err = capsys.readouterr()
    assert f"SettingError: about {shown(text)}" in out
    assert f"Warning: about {shown(text)}" in err


def test_tables_of_others_names_hold_no_formulas(tmp_path):
    from fs_plugins.certificates.table import Average, write

    write(tmp_path / "table.csv", [Average(0.25, '=HYPERLINK("x")', "mean", "mean", (-0.5,) * 5, -1.0)])
    with (tmp_path / "table.csv").open(encoding="utf-8", newline="") as file:
        row = list(csv.reader(file))[1]
    assert row == ["0.25", '\'=HYPERLINK("x")', "mean", *["-0.5"] * 5, "-1.0"]


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["ask", "demo", "{picture}", "what \udcff"], r"A question must be text in the terminal's encoding"),
        (["ask", "demo", "{picture}", "<image> and <image>"], "A question must not hold <image>"),
        (["certify", "{picture}", "--classes", "a\udcff, b", "--model", "demo-clip"], "A class must be text"),
        (
            ["certify", "{picture}", "--classes", "a, b", "--prompt", "\udcff{}", "--model", "demo-clip"],
            "The prompt must",
        ),
    ],
)
def test_words_that_no_model_can_read_are_refused(odd, tmp_path, typed, told, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert told in said(*(odd / "é.png" if one == "{picture}" else one for one in typed), code=2)


@pytest.mark.parametrize("question", ["", " ", "[x]", "</s>", "日本?", "a\x00b", "x " * 40])
def test_any_other_question_is_asked(odd, question):
    told = said("ask", "demo", odd / "é.png", question, "--psm", "none", "--sigma", "0.1", "--max-new-tokens", "1")
    assert "with fs_plugins" in told


PLATFORM = """
import locale, sys, warnings
assert locale.getpreferredencoding(False).upper() not in ("UTF-8", "UTF8"), locale.getpreferredencoding(False)
warnings.filterwarnings("error", category=EncodingWarning, module="fs_plugins")
from fs_plugins import cli
pictures, out = sys.argv[1:]
short = ["--steps", "1", "--mapper-steps", "1", "--batch-size", "2", "--draws", "1", "--certify", "0"]
for arguments in (
    ["train", pictures, "--model", "demo-clip", "--out", out + "/psm", "--name", "\\xe9\\u65e5", *short],
    ["certify", pictures, "--model", "demo-clip", "--psm", out + "/psm", "--n", "5", "--out", out + "/rows"],
    ["ask", "demo", pictures + "/-dash.png", "which shape?", "--max-new-tokens", "1"],
):
    sys.argv[1:] = arguments
    try:
        cli.main()
    except SystemExit as left:
        assert not left.code, arguments
"""


def test_a_platform_without_utf8_writes_and_reads_what_any_other_does(odd, tmp_path):
    """An ASCII terminal shows escapes for what it lacks, after the work, and files are UTF-8 as everywhere."""
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONIOENCODING", None)
    command = [sys.executable, "-X", "warn_default_encoding", "-c", PLATFORM, odd, tmp_path / "é"]
    done = subprocess.run(command, capture_output=True, env=env, timeout=280)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    out = done.stdout.decode("ascii")
    assert r"PSM \xe9\u65e5" in out
    assert "with fs_plugins" in out
    psm = fs_plugins.PSM.from_pretrained(tmp_path / "é" / "psm")
    assert psm.config.name == "é日"
    assert "# é日\n" in (tmp_path / "é" / "psm" / "README.md").read_text("utf-8")
