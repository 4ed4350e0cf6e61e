from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from fs_plugins.cli import app
from fs_plugins.cli.base import errors_for_people
from fs_plugins.demo import world

runner = CliRunner()


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "scene.png"
    world.scene("heldout", 1).draw().resize((90, 120)).save(path)
    return path


def test_ask_answers_without_and_with_side_by_side(picture):
    result = runner.invoke(app, ["ask", "demo", str(picture), world.CAPTION_PROMPT, "--seed", "1"])
    assert result.exit_code == 0, result.output
    assert re.search(r"without\s+a large green square", result.output)
    assert re.search(r"with fs_plugins\s+a ", result.output)
    assert "1 smoothed calls" in result.output


def test_out_of_memory_says_what_to_do_and_other_errors_are_not_hidden(capsys):
    with pytest.raises(typer.Exit) as left, errors_for_people():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert left.value.exit_code == 2
    told = " ".join(capsys.readouterr().out.split())
    assert "Tried to allocate 2.00 GiB" in told
    assert "--batch-size" in told
    with pytest.raises(RuntimeError, match="something else"), errors_for_people():
        raise RuntimeError("something else")


def test_ask_takes_jpeg_plain_smoothing_and_a_folder(picture, tmp_path):
    from fs_plugins.demo import assets

    photo = tmp_path / "photo.jpg"
    world.scene("heldout", 2).draw().convert("L").save(photo)
    plain = runner.invoke(
        app, ["ask", str(assets.LLAVA), str(photo), "what is this", "--psm", "none", "--sigma", "0.1"]
    )
    assert plain.exit_code == 0, plain.output
    assert "plain smoothing" in plain.output
    given = runner.invoke(app, ["ask", "demo", str(photo), "what is this", "--psm", str(assets.PSM_LLAVA)])
    assert given.exit_code == 0, given.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "demo", "nowhere.png", "what?"], "There is no file nowhere.png"),
        (["ask", "demo", "{text}", "what?"], "not a readable image"),
        (["ask", "{folder}", "{picture}", "what?"], "Cannot load"),
        (["ask", "demo", "{picture}", "what?", "--psm", "none"], "needs a sigma"),
        (["ask", "demo", "{picture}", "what?", "--sigma", "0.7"], "No PSM in the registry fits"),
        (["ask", "demo", "{picture}", "what?", "--psm", "{folder}"], "is no PSM folder"),
        (["demo", "--eps", "sixteen"], "16/255"),
        (["certify"], "Nothing to certify"),
        (["certify", "nowhere.png"], "There is no file nowhere.png"),
        (["certify", "{text}"], "not a readable image"),
        (["certify", "{folder}"], "No .png, .jpg, .jpeg below"),
        (["certify", "{picture}", "--method", "hope"], "method must be one of"),
        (["certify", "{picture}", "--psm", "none"], "needs a sigma"),
        (["certify", "{picture}", "--table", "--method", "mean"], "--table shows every method"),
        (["certify", "{picture}", "--table", "--sigma", "0.7"], "No PSM in the registry fits"),
        (["certify", "{picture}", "--classes", "star, cross"], "needs a model that embeds texts"),
        (["certify", "{picture}", "--model", "demo-clip", "--classes", "star, star"], "two different names"),
        (["certify", "{picture}", "--model", "demo-clip", "--classes", ","], "two different names"),
        (["certify", "{picture}", "--model", "demo-clip", "--classes", "a, b", "--method", "mean"], "about features"),
        (["certify", "{picture}", "--table", "--target", "0.1"], "leave --classes, --method and --target out"),
        (
            ["certify", "{picture}", "--model", "demo-clip", "--classes", "star, cross", "--prompt", "x"],
            "The prompt must",
        ),
        (["demo", "--images", "11", "--eps", "16"], "did you mean 16/255"),
    ],
)
def test_mistakes_are_told_in_a_sentence_and_exit_with_2(picture, tmp_path, arguments, message):
    (tmp_path / "notes.png").write_text("no image")
    folder = tmp_path / "empty"
    folder.mkdir()
    filled = [a.format(text=tmp_path / "notes.png", folder=folder, picture=picture) for a in arguments]
    result = runner.invoke(app, filled)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_help_lists_the_commands():
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "demo" in result.output
    assert "ask" in result.output


def test_certify_writes_rows_a_table_and_a_plot_and_goes_on_from_them(picture, tmp_path):
    from PIL import Image

    out = tmp_path / "out"
    arguments = ["certify", str(picture), "--n", "40", "--seed", "0", "--out", str(out)]
    result = runner.invoke(app, arguments, env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert re.search(r"1 images, 50 draws: about \d+ s", result.output)
    assert "scene.png" in result.output
    assert "each wrong with probability at most 0.001" in " ".join(result.output.split())
    rows = (out / "certificates.jsonl").read_text()
    assert rows.count("\n") == 2
    with Image.open(out / "certificates.png") as plot:
        assert plot.size[0] > 500
    again = runner.invoke(app, arguments, env={"COLUMNS": "160"})
    assert again.exit_code == 0, again.output
    assert (out / "certificates.jsonl").read_text() == rows


def test_certify_prints_the_papers_table_of_averages_and_writes_it(picture, tmp_path):
    import csv

    from fs_plugins import Certificate
    from fs_plugins.cli.certify import TABLE_DISTANCES

    out = tmp_path / "out"
    arguments = ["certify", str(picture), "--scenes", "1", "--table", "--sigma", "0.5", "--n", "30", "--seed", "0"]
    result = runner.invoke(app, [*arguments, "--out", str(out)])
    assert result.exit_code == 0, result.output
    for expected in ("sigma 0.5, plain smoothing", "sigma 0.5, PSM demo-psm-llava", "paper's estimate", "certified"):
        assert expected in result.output
    with (out / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["plugin", "mean", "distribution", "certified"] * 2
    lines = (out / "certificates-sigma0.5-psm.jsonl").read_text().splitlines()[1:]
    certificates = [Certificate.from_json(json.dumps(json.loads(line)["certificate"])) for line in lines]
    for row in rows[-4:]:
        assert (row["sigma"], row["PSM"]) == ("0.5", "demo-psm-llava")
        alone = [one if row["method"] == "certified" else one.by(row["method"]) for one in certificates]
        for eps in TABLE_DISTANCES:
            assert float(row[f"{eps:g}"]) == pytest.approx(np.mean([one.fcsb(eps) or 0 for one in alone]))
        assert float(row["R"]) == pytest.approx(np.mean([one.radius(0.5) or 0 for one in alone]))
    assert float(rows[-4]["R"]) > 0
    assert (out / "certificates-sigma0.5-plain.png").stat().st_size > 10_000


def test_certify_names_zero_shot_predictions(picture, tmp_path):
    arguments = [
        "certify",
        str(picture),
        "--model",
        "demo-clip",
        "--classes",
        "star, square",
        "--prompt",
        "a large green {}",
    ]
    result = runner.invoke(app, [*arguments, "--n", "50", "--seed", "0", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert re.search(r"scene.png\s+square\s+50\s+100.0 %\s+0\.\d+", result.output)
    assert (tmp_path / "out" / "predictions.jsonl").read_text().count("\n") == 2
