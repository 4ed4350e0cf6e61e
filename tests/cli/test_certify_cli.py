"""``fs-plugins certify``, as a user calls it."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pytest
from support import make_classifier
from typer.testing import CliRunner

from fs_plugins import Certificate
from fs_plugins.certificates.methods import METHODS
from fs_plugins.certificates.table import DISTANCES
from fs_plugins.cli import app
from fs_plugins.demo import world
from fs_plugins.files import locked

runner = CliRunner()


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "scene.png"
    world.scene("heldout", 1).draw().resize((90, 120)).save(path)
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
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
        (["certify", "{picture}", "--classes", "a, b", "--features"], "leave one out"),
        (["certify", "{picture}", "--table", "--target", "0.1"], "leave --classes, --method and --target out"),
        (["certify", "{picture}", "--ask", "what?"], 'needs choices: "cat, dog"'),
        (["certify", "{picture}", "--ask", "what?", "--choices", "cat"], "at least two classes, got 1"),
        (["certify", "{picture}", "--ask", "what?", "--choices", "a,A."], "read alike"),
        (["certify", "{picture}", "--ask", "what?", "--reading", "hope"], "A reading is one of words, letters"),
        (["certify", "{picture}", "--ask", "a | ", "--reading", "exact"], "A question is empty"),
        (["certify", "{picture}", "--ask", "a | a", "--reading", "exact"], "asked twice"),
        (["certify", "{picture}", "--ask", "a", "--reading", "exact", "--n", "5"], "servings can certify nothing"),
        (["certify", "{picture}", "--ask", "a", "--table"], "leave --classes, --features and --table out"),
        (["certify", "{picture}", "--ask", "a", "--method", "mean"], "with --ask the answer"),
        (["certify", "{picture}", "--choices", "a, b"], "ask with --ask"),
        (["certify", "{picture}", "--ask", "a", "--reading", "exact", "--model", "demo-clip"], "it generates no text"),
        (
            ["certify", "{picture}", "--model", "demo-clip", "--classes", "star, cross", "--prompt", "x"],
            "The prompt must",
        ),
    ],
)
def test_mistakes_are_told_in_a_sentence_and_exit_with_2(picture, tmp_path, arguments, message):
    (tmp_path / "notes.png").write_text("no image", "utf-8")
    folder = tmp_path / "empty"
    folder.mkdir()
    filled = [a.format(text=tmp_path / "notes.png", folder=folder, picture=picture) for a in arguments]
    result = runner.invoke(app, [*filled, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_certify_writes_rows_a_table_and_a_plot_and_goes_on_from_them(picture, tmp_path):
    from PIL import Image

    out = tmp_path / "out"
    arguments = ["certify", str(picture), "--n", "40", "--seed", "0", "--out", str(out)]
    result = runner.invoke(app, arguments, env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert re.search(r"1 images, 50 draws: about \d+ s", result.output)
    assert "scene.png" in result.output
    assert "each wrong with probability at most 0.001" in " ".join(result.output.split())
    rows = (out / "certificates.jsonl").read_text("utf-8")
    assert rows.count("\n") == 2
    with Image.open(out / "certificates.png") as plot:
        assert plot.size[0] > 500
    again = runner.invoke(app, arguments, env={"COLUMNS": "160"})
    assert again.exit_code == 0, again.output
    assert (out / "certificates.jsonl").read_text("utf-8") == rows


def test_certify_prints_the_papers_table_of_averages_and_writes_it(picture, tmp_path):
    out = tmp_path / "out"
    arguments = ["certify", str(picture), "--scenes", "1", "--table", "--sigma", "0.5", "--n", "30", "--seed", "0"]
    result = runner.invoke(app, [*arguments, "--out", str(out)])
    assert result.exit_code == 0, result.output
    for expected in ("sigma 0.5, plain smoothing", "sigma 0.5, PSM demo-psm-llava", "paper's estimate", "certified"):
        assert expected in result.output
    with (out / "table.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["plugin", "mean", "distribution", "certified"] * 2
    lines = (out / "certificates-sigma0.5-psm.jsonl").read_text("utf-8").splitlines()[1:]
    certificates = [Certificate.from_json(json.dumps(json.loads(line)["certificate"])) for line in lines]
    for row in rows[-4:]:
        assert (row["sigma"], row["PSM"]) == ("0.5", "demo-psm-llava")
        alone = [one if row["method"] == "certified" else one.by(row["method"]) for one in certificates]
        for eps in DISTANCES:
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
    assert (tmp_path / "out" / "predictions.jsonl").read_text("utf-8").count("\n") == 2


def test_certify_asks_questions_and_certifies_the_answers(picture, tmp_path):
    out = tmp_path / "out"
    asked = (
        "What is the main shape in this image? | Describe this image in one concise sentence, no longer than 20 words."
    )
    arguments = ["certify", str(picture), "--ask", asked, "--n", "16", "--alpha", ".1", "--n0", "1", "--seed", "0"]
    arguments += ["--reading", r"/(star|square|circle)/", "--out", str(out)]
    result = runner.invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert len(re.findall(r"square\s+16\s+100.0 %\s+1\s+0\.\d+", result.output)) == 2
    assert 'serve with enable(model, n0=..., noise="iid")' in " ".join(result.output.split())
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text("utf-8").splitlines()]
    assert [row["certificate"]["question"] for row in rows[1:]] == asked.split(" | ")
    assert (out / "answers.png").stat().st_size > 10_000
    again = runner.invoke(app, arguments, env={"COLUMNS": "200"})
    assert again.exit_code == 0
    assert len((out / "answers.jsonl").read_text("utf-8").splitlines()) == 3


def test_a_classifiers_label_is_certified_by_its_own_head_and_names(picture, tmp_path):
    folder = tmp_path / "classifier"
    make_classifier().save_pretrained(folder)
    saved = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(saved), "utf-8")
    arguments = ["certify", str(picture), "--model", str(folder), "--psm", "none", "--sigma", "0.05", "--n", "60"]

    result = runner.invoke(app, [*arguments, "--seed", "0", "--out", str(tmp_path / "labels")])
    assert result.exit_code == 0, result.output
    found = re.search(r"scene.png\s+(cat|dog|newt)\s+60\s+\d", result.output)
    rows = (tmp_path / "labels" / "predictions.jsonl").read_text("utf-8").splitlines()
    assert json.loads(rows[1])["certificate"]["label"] == found[1]

    result = runner.invoke(app, [*arguments, "--features", "--out", str(tmp_path / "features")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "features" / "certificates.jsonl").exists()

    result = runner.invoke(app, [*arguments, "--method", "mean", "--out", str(tmp_path / "none")])
    assert result.exit_code == 2
    assert "--features" in result.output


def test_a_second_run_in_a_folder_is_told_who_holds_it(picture, tmp_path):
    out = tmp_path / "out"
    with locked(out, "these certificates"):
        result = runner.invoke(app, ["certify", str(picture), "--n", "20", "--seed", "0", "--out", str(out)])
    assert result.exit_code == 2, result.output
    assert re.search(r"is in use by process \d+ on", " ".join(result.output.split()))
    assert not (out / "certificates.jsonl").exists()


def test_the_help_of_method_names_every_method():
    result = runner.invoke(app, ["certify", "--help"], env={"COLUMNS": "300"})
    told = next(line for line in result.output.splitlines() if "--method" in line)
    assert all(name in told for name in METHODS)
