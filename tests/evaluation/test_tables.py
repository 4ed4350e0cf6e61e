"""Tables: what is counted, how it is named and drawn."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console

from fs_plugins.cli.tables import drawn
from fs_plugins.evaluation import Results
from fs_plugins.evaluation.metrics import Estimate, mean, proportion
from fs_plugins.evaluation.suites import CLEAN, DEFENCES, FOA, FS_PSM, NONE, SUITES, TARGET, Condition
from fs_plugins.evaluation.tables import Figure, Table, title_of
from fs_plugins.kept import Lines


def test_tables_count_what_was_said(start):
    evaluation = start()
    evaluation.run()
    store = evaluation.store
    # What the model said is replaced: two right, one the attacker's, one refusal, one wrong.
    path = store.folder / "answers" / "none" / "attackvlm-16.0.jsonl"
    said = {"0.png": "0", "1.png": "1.", "2.png": "2", "3.png": "I cannot say.", "4.png": "1"}
    rows = Lines(path).read()
    for row in rows:
        if row["task"] == "classification":
            row["reply"] = said[row["image"]]
    Lines(path).replace(rows)
    [table] = Results(evaluation.store.folder).tables()
    by_cell = {(row[0], row[1]): dict(zip(table.columns, row, strict=True)) for row in table.rows}
    cell = by_cell[("AttackVLM 16/255", "none")]
    assert cell["n"] == 5
    assert cell["ACC"].estimate.value == 2 / 5
    assert cell["ASR"].estimate.value == 1 / 5
    cosines = [row["cosine"] for row in rows if row["task"] == "features"]
    assert cell["FCS"].estimate.value == pytest.approx(sum(cosines) / 5)
    assert by_cell[("clean", "none")]["ACC"].estimate.value == 1
    assert by_cell[("clean", "none")]["FCS"] == ""
    table.write_csv(store.folder / "t.csv")
    lines = (store.folder / "t.csv").read_text("utf-8").splitlines()
    assert lines[0].startswith("pictures,defence,n,ACC,ACC low,ACC high,ASR")
    assert "AttackVLM 16/255,none,5,0.4," in lines[3]


def test_captions_are_compared_with_the_clean_one_and_the_targets(start):
    evaluation = start(replace(SUITES["table1"], defences=(NONE,), conditions=(Condition("attackvlm", 16),)))
    evaluation.run()
    assert ("target.0.jsonl") in [path.name for path in (evaluation.store.folder / "answers" / "none").iterdir()]
    [answer, *_] = Results(evaluation.store.folder).answers(NONE, CLEAN, "captioning")
    assert answer.reply == "a red square"
    assert answer.scores == (1.0, 0.0)
    assert (answer.verdict.correct, answer.verdict.attacked) == (True, False)


def test_adaptive_attacks_go_through_the_defence_on_a_part_of_the_pictures(start):
    evaluation = start(SUITES["adaptive"])
    evaluation.run()
    attacked = {
        path.relative_to(evaluation.store.folder / "attacked").as_posix(): len(list(path.iterdir()))
        for path in (evaluation.store.folder / "attacked").glob("*/*")
    }
    assert attacked["fs_psm/foa-16-adaptive"] == 2
    assert attacked["none/foa-16"] == 2
    [table] = Results(evaluation.store.folder).tables()
    assert {row[2] for row in table.rows} == {2}, "the oblivious attack is counted on the same pictures"
    assert [row[0] for row in table.rows][:2] == ["M-Attack 16/255", "M-Attack 16/255, adaptive"]


def test_certificates_and_ablation_parts(start):
    evaluation = start(SUITES["table2"], replace(SUITES["table5"], conditions=()))
    evaluation.run()
    assert any("not certified at sigma 0.5" in note for note in Results(evaluation.store.folder).notes()), (
        "the tiny PSM covers .25 alone"
    )
    two, _asked, five = Results(evaluation.store.folder).tables()
    assert [row[:3] for row in two.rows] == [("FS", "0.25", 2), ("FS", "0.5", 2), ("FS-PSM", "0.25", 2)]
    assert [row[0] for row in five.rows] == ["FS", "FS + M", "FS + P", "FS-PSM"]
    certificates = Results(evaluation.store.folder).certificates(FS_PSM)[0.25]
    assert set(certificates) == {sample.image for sample in evaluation.plan.samples(2)}
    value = five.rows[-1][-1].estimate.value
    assert value == pytest.approx(sum(c.radius(0.5) or 0 for c in certificates.values()) / 2)


def test_masked_gradients_are_searched_for_once(start):
    suite = replace(SUITES["masking"])
    evaluation = start(suite)
    evaluation.run()
    [table] = Results(evaluation.store.folder).tables()
    assert [row[0] for row in table.rows] == [
        "no attack",
        "oblivious",
        "gradient-free",
        "adaptive, a quarter",
        "adaptive",
        "adaptive, eps 1, untargeted",
    ]
    assert all(row[1] == 3 for row in table.rows)


def test_names_of_conditions_are_readable():
    assert title_of(FOA) == "FOA-Attack 16/255"
    assert title_of(replace(FOA, adaptive=True)) == "FOA-Attack 16/255, adaptive"
    assert (CLEAN.name, TARGET.name, FOA.name, replace(FOA, adaptive=True).name) == (
        "clean",
        "target",
        "foa-16",
        "foa-16-adaptive",
    )
    assert math.isclose(FOA.eps, 16 / 255)


def test_a_table_fits_a_terminal_and_breaks_no_figure():
    share, number = Figure(proportion([True] * 195 + [False] * 5), "share"), Figure(mean([0.5, 0.6, 0.7]), "number")
    rows = tuple(
        (title, defence.title, 200, share, share, "" if title == "clean" else number, number, number, number, number)
        for title in ("clean", "FOA-Attack 16/255")
        for defence in DEFENCES
    )
    columns = (
        "pictures",
        "defence",
        "n",
        "ACC",
        "ASR",
        "FCS",
        "unrelated",
        "FCS pooled",
        "unrelated pooled",
        "target score",
    )
    written = io.StringIO()
    Console(file=written, width=80).print(drawn(Table("x", "X", columns, rows)))
    lines = [line.rstrip() for line in written.getvalue().splitlines()]
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["defence", "n", "ACC", "%", "ASR", "%", "FCS", "unrelated"]
    assert "FOA-Attack 16/255" in lines
    # t(0.975, 2) = 4.302653, times .1 / sqrt(3)
    wanted = ["200", "97.5", "(94-99)", "97.5", "(94-99)", "0.600", "\u00b1.248", "0.600", "\u00b1.248"]
    assert sum(line.split()[-len(wanted) :] == wanted for line in lines) == len(DEFENCES)


def test_figures_say_their_intervals_whatever_their_size():
    assert Figure(Estimate(0.5, 0.25, 0.75), "number").parts == ("0.500", "\u00b1.250")
    assert Figure(Estimate(-0.5, -10.75, 9.75), "number").parts == ("-0.500", "\u00b110.250")
    assert Figure(mean([0.5]), "number").parts == ("0.500", "")
    assert Figure(Estimate(0.5, 0.094, 0.906), "share").parts == ("50.0", "(9-91)")
    assert str(Figure(mean([]), "number")) == "-"
