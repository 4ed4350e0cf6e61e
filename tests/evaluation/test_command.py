"""``fs-plugins evaluate``."""

from __future__ import annotations

import json
import os

import pytest
from PIL import Image
from support import command_line
from typer.testing import CliRunner

from fs_plugins.cli import app
from fs_plugins.evaluation import Results
from fs_plugins.evaluation.suites import DEFENCES
from fs_plugins.files import locked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "table9"], "There is no suite 'table9'. The suites are: table1"),
        (["--eps", "16"], "did you mean 16/255"),
        (["--eps", "many"], "--eps is a number such as 16/255"),
        (["--data", "{empty}"], "no"),
        (
            ["--suite", "table4", "--data", "{pictures}"],
            "can be asked for captioning, and table4 asks for something else",
        ),
        (["--judge", "oracle"], "oracle"),
        (["--judge", "endpoint"], "--judge endpoint needs --judge-url"),
        (["--sigma", "3"], "at sigma 3"),
        (["--corrupt", "perhaps"], "perhaps"),
        (["--model", "nowhere"], "Cannot load 'nowhere'"),
    ],
)
def test_mistakes_are_told_in_a_sentence_and_exit_with_2(tmp_path, arguments, message):
    for name in ("empty", "pictures"):
        (tmp_path / name).mkdir()
    for i in range(2):
        Image.effect_noise((64, 64), 60).convert("RGB").save(tmp_path / "pictures" / f"{i}.png")
    filled = [a.format(empty=tmp_path / "empty", pictures=tmp_path / "pictures") for a in arguments]
    result = CliRunner().invoke(app, ["evaluate", "--quick", "--images", "2", "--out", str(tmp_path / "out"), *filled])
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_the_command_writes_tables_csv_summary_and_report(tmp_path):
    out = tmp_path / "out"
    command = [
        "evaluate",
        "--suite",
        "table3",
        "--quick",
        "--images",
        "4",
        "--steps",
        "1",
        "--fare",
        "none",
        "--tecoa",
        "none",
        "--out",
        str(out),
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "Classification under three attacks" in result.output
    assert "There is no fare tower" in " ".join(result.output.split())
    told = json.loads((out / "summary.json").read_text("utf-8"))
    first = told["tables"]["table3"][0]
    assert (first["pictures"], first["defence"], first["n"]) == ("clean", "none", 4)
    assert first["ACC"]["value"] == 1.0
    assert (out / "table3.csv").exists()
    assert "FOA-Attack" in (out / "report.html").read_text("utf-8")
    again = CliRunner().invoke(app, [*command[:-1], str(out), "--seed", "1"])
    assert again.exit_code == 2
    assert "seed was 0 and is 1 now" in " ".join(again.output.split())


def test_a_corrupt_picture_is_refused_by_name_or_skipped(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        Image.effect_noise((64, 64), 60).convert("RGB").save(folder / f"{i}.png")
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])
    command = ["evaluate", "--suite", "table1", "--quick", "--images", "2", "--steps", "1",
               "--fare", "none", "--tecoa", "none",
               "--data", str(folder), "--out", str(tmp_path / "out")]  # fmt: skip
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2
    assert "1.png" in refused.output
    assert not (tmp_path / "out").exists(), "nothing was begun"
    skipped = CliRunner().invoke(app, [*command, "--corrupt", "skip"])
    assert skipped.exit_code == 0, skipped.output
    assert "Skipped" in skipped.output
    assert "1.png" in skipped.output


def test_zero_shot_clip_is_evaluated_by_class_names(tmp_path):
    command = ["evaluate", "--suite", "table3", "--model", "demo-clip", "--quick", "--images", "4", "--steps", "1",
               "--fare", "none", "--tecoa", "none", "--class-prompt", "a large red {} in the middle",
               "--out", str(tmp_path / "out")]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out" / "summary.json").read_text("utf-8"))["tables"]["table3"]
    assert rows[0]["n"] == 4


def test_settings_come_from_a_file_and_flags_win(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "suite: [table3]\nimages: 4\nsteps: 1\nquick: true\nfare: none\ntecoa: none\n", "utf-8"
    )
    command = ["evaluate", "--config", str(tmp_path / "run.yaml"), "--images", "3", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out" / "summary.json").read_text("utf-8"))["tables"]["table3"]
    assert rows[0]["n"] == 3
    assert Results(tmp_path / "out").plan.setup.steps == 1
    (tmp_path / "run.yaml").write_text("stepps: 1\n", "utf-8")
    wrong = CliRunner().invoke(app, command)
    assert wrong.exit_code == 2
    assert "there is no setting 'stepps'" in " ".join(wrong.output.split())


@pytest.mark.parametrize("data", [[], ["--data", "{pictures}"]])
def test_a_second_process_is_told_who_has_the_folder(tmp_path, data):
    (tmp_path / "pictures").mkdir()
    for i in range(2):
        Image.effect_noise((64, 64), 60).convert("RGB").save(tmp_path / "pictures" / f"{i}.png")
    given = [one.format(pictures=tmp_path / "pictures") for one in data]
    with locked(tmp_path / "out", "this test"):
        command = ["evaluate", "--suite", "table1", "--quick", "--images", "2", "--out", str(tmp_path / "out"), *given]
        result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert f"is in use by process {os.getpid()}" in " ".join(result.output.split())


@pytest.mark.slow
def test_the_papers_ordering_holds_on_the_embedded_world(tmp_path):
    command = ["evaluate", "--suite", "table3", "--images", "33", "--steps", "60", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "summary.json").read_text("utf-8"))["tables"]["table3"]
    cell = {(row["pictures"], row["defence"]): row for row in rows}
    for attack in ("M-Attack 16/255", "FOA-Attack 16/255", "AttackVLM 16/255"):
        acc, asr = ({d.title: cell[(attack, d.title)][what]["value"] for d in DEFENCES} for what in ("ACC", "ASR"))
        assert asr["none"] >= 0.8, attack
        assert asr["FS-PSM"] <= 0.05, attack
        assert acc["FS-PSM"] >= 0.8, attack
        for tower in ("FARE", "TeCoA"):
            assert acc[f"{tower} + FS-PSM"] > acc[tower], attack
            assert asr[f"{tower} + FS-PSM"] <= asr[tower], attack


@pytest.mark.slow
def test_accelerate_shares_the_pictures_among_processes(tmp_path):
    pytest.importorskip("accelerate")
    command = ["evaluate", "--suite", "table1", "--suite", "table2", "--quick", "--images", 5, "--steps", 2]
    command += ["--fare", "none", "--tecoa", "none"]
    told = []
    for name, processes in (("one", 1), ("two", 2)):
        done = command_line(processes, *command, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
        told.append(json.loads((tmp_path / name / "summary.json").read_text("utf-8"))["tables"])
    parts = {path.name for path in (tmp_path / "two" / "results" / "answers" / "none").iterdir()}
    assert {"clean.0.jsonl", "clean.1.jsonl"} <= parts
    for table, rows in told[0].items():
        for one, two in zip(rows, told[1][table], strict=True):
            for column, value in one.items():
                if isinstance(value, dict):
                    assert two[column]["value"] == pytest.approx(value["value"], abs=2e-3), (table, column)
                else:
                    assert two[column] == value
