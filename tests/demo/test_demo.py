"""The demo: an evaluation of its own suites on the embedded world, and a picture."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fs_plugins import SettingError
from fs_plugins.demo import dataset, shipped, world
from fs_plugins.demo.run import run
from fs_plugins.demo.settings import Settings
from fs_plugins.demo.suites import attack, suites
from fs_plugins.evaluation import Evaluation, Plan, Results, Setup, Store, open_dataset
from fs_plugins.evaluation.judges import ExactMatch
from fs_plugins.evaluation.plan import fixed
from fs_plugins.evaluation.suites import DEFENCES as ALL
from fs_plugins.hf.subjects import loader
from fs_plugins.pictures import to_unit

ROOT = Path(__file__).parents[2]
QUICK = Settings(images=11, steps=2, n0=2, draws=100)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A short demo, and what it told of first."""
    told = []
    settings = replace(QUICK, out=tmp_path_factory.mktemp("demo"))
    return run(settings, loader("demo"), first=lambda path, panel: told.append((path, panel))), told


def test_a_short_demo_has_the_promised_summary_and_picture(quick):
    result, _ = quick
    out = result.settings.out
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    assert list(summary["clean"]) == list(summary["attacked"]) == list(DEFENCES.values())
    for rows in (summary["clean"], summary["attacked"]):
        for row in rows.values():
            assert set(row) == {"acc", "asr", "fcs", "caption_acc", "vqa_acc"}
            assert all(0 <= value <= 1 for name, value in row.items() if name != "fcs")
    assert list(summary["ablation"]) == ["none", "fs", "fs_m", "fs_p", "fs_pm"]
    assert all(set(row) == {"acc", "asr", "fcs"} for row in summary["ablation"].values())
    assert summary["ablation"]["none"]["fcs"] == summary["attacked"]["none"]["fcs"]
    assert len(summary["certificates"]) == 4
    for row, panel in zip(summary["certificates"], result.pictures, strict=True):
        assert row["picture"] == panel.truth
        assert row["certified"] == pytest.approx(panel.certificate.radius(), abs=1e-4)
        assert row["plugin"] > row["certified"] > row["mean"] > 0
    assert (summary["images"], summary["robust_images"], summary["seed"]) == (11, 11, 0)
    assert summary["seconds"] > 0
    assert (out / "demo.png").stat().st_size > 20_000


def test_every_value_of_the_summary_has_its_interval(quick):
    summary = json.loads((quick[0].settings.out / "summary.json").read_text("utf-8"))
    for which in ("clean", "attacked", "ablation"):
        for name, row in summary[which].items():
            assert set(summary["intervals"][which][name]) == set(row)
            for key, value in row.items():
                low, high = summary["intervals"][which][name][key]
                assert low <= value <= high
    # Wilson's for 10 of 10 scenes with a shape: 1 / (1 + 1.959964**2 / 10)
    sure = [r for r in summary["clean"] if summary["clean"][r]["acc"] == 1]
    assert sure
    assert all(summary["intervals"]["clean"][r]["acc"] == [0.7225, 1.0] for r in sure)


def test_a_clean_picture_is_served_twice_with_other_draws(quick):
    summary = json.loads((quick[0].settings.out / "summary.json").read_text("utf-8"))
    for name, row in summary["clean"].items():
        assert row["fcs"] < 1 if name.endswith("fs_psm") else row["fcs"] == 1


def test_the_first_pictures_are_told_of_before_the_rest(quick):
    result, [(path, panel)] = quick
    assert path == result.settings.out / "first.png"
    assert path.stat().st_size > 20_000
    final = result.pictures[0]
    assert (panel.truth, panel.certificate) == (final.truth, None)
    assert torch.equal(panel.clean, final.clean)
    assert panel.said_clean == final.said_clean


def test_panels_show_the_scenes_that_were_attacked(quick):
    result, _ = quick
    assert len(result.pictures) == 4
    for panel in result.pictures:
        far = (panel.attacked - panel.clean).abs().max().item()
        assert far == pytest.approx(result.attacked.eps, abs=1e-6)
    first = world.scene("heldout", 0)
    assert torch.equal(result.pictures[0].clean, to_unit(first.draw()))
    moved = result.results.store.attacked("none/attackvlm-16", "images/0000.png")
    assert torch.equal(result.pictures[0].attacked, moved)


def test_tables_and_summary_say_the_same_and_can_be_read_back(quick):
    result, _ = quick
    classes, words, parts, certificates = result.tables()
    summary = result.summary()
    for table, keys in ((classes, ("acc", "asr", "fcs")), (words, ("caption_acc", "vqa_acc"))):
        for row in table.rows:
            quoted = summary[row[0]][DEFENCES[row[1]]]
            assert [round(cell.estimate.value, 4) for cell in row[3:]] == [quoted[key] for key in keys]
    assert [row[2] for row in classes.rows] == [10] * 12, "every eleventh scene has no shape"
    assert [row[2] for row in words.rows] == [11] * 12
    assert (len(parts.rows), len(certificates.rows)) == (5, 4)
    tables = {table.name: table for table in Results(result.settings.out).tables()}
    assert list(tables) == ["classes", "captions", "questions", "parts"]
    assert tables["classes"].rows[0][3] == classes.rows[0][3]


def test_a_demo_begins_anew_and_throws_nothing_of_others_away(tmp_path):
    settings = replace(QUICK, steps=1, n0=1, draws=10, out=tmp_path)
    data = open_dataset(dataset.write(tmp_path / "scenes", 2))
    Store.begin(tmp_path / "results", fixed("mine", {}, data, Setup()))
    with pytest.raises(SettingError, match="no demo's"):
        run(settings, loader("demo"))


@pytest.mark.parametrize("eps", ["many", "16", "1/0"])
def test_a_radius_that_is_none_is_refused(tmp_path, eps):
    with pytest.raises(SettingError, match="16/255"):
        run(replace(QUICK, eps=eps, out=tmp_path / "out"), lambda *args: pytest.fail("nothing is loaded"))
    assert not (tmp_path / "out").exists()


DEFENCES = {
    "none": "none",
    "FS-PSM": "fs_psm",
    "FARE": "fare",
    "FARE + FS-PSM": "fare_fs_psm",
    "TeCoA": "tecoa",
    "TeCoA + FS-PSM": "tecoa_fs_psm",
}


def documented() -> dict[str, list[float]]:
    """The documented table of attacks: defence -> ACC of clean pictures, ACC and ASR of those that AttackVLM made."""
    rows = {}
    for line in (ROOT / "docs" / "explanation" / "results.md").read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in DEFENCES and len(cells) == 5 and all(" / " in cell for cell in cells[1:]):
            (clean, _), *_, (attacked, asr) = (cell.split(" / ") for cell in cells[1:])
            rows[cells[0]] = [float(percent) / 100 for percent in (clean, attacked, asr)]
    return rows


@pytest.mark.slow
def test_the_demo_holds_what_the_project_promises_and_documents(tmp_path):
    """The project's own thresholds, and the documented table on half of its scenes; robust towers on fewer.

    Where ``make demo`` has just been run, it is about what that wrote.
    """
    made = os.environ.get("FS_PLUGINS_DEMO")
    if made is None:
        run(Settings(out=tmp_path), loader("demo"))
    summary = json.loads((Path(made or tmp_path) / "summary.json").read_text("utf-8"))
    table = documented()
    assert set(table) == set(DEFENCES)
    for defence, quoted in table.items():
        name = DEFENCES[defence]
        for value, (which, key) in zip(
            quoted, (("clean", "acc"), ("attacked", "acc"), ("attacked", "asr")), strict=True
        ):
            measured = summary[which][name][key]
            low, high = (measured, measured) if name in ("none", "fs_psm") else summary["intervals"][which][name][key]
            # Half of the table's scenes, and another processor rounds differently, which may turn a few answers.
            assert low - 0.03 <= value <= high + 0.03, (which, defence, key, measured, value)
    clean, attacked, ablation = summary["clean"], summary["attacked"], summary["ablation"]
    assert clean["none"]["acc"] >= 0.95
    assert clean["none"]["caption_acc"] >= 0.90
    assert attacked["none"]["acc"] <= 0.15
    assert attacked["none"]["asr"] >= 0.85
    assert attacked["fs_psm"]["acc"] >= 0.80
    assert attacked["fs_psm"]["asr"] <= 0.05
    assert clean["fs_psm"]["acc"] >= 0.85
    assert attacked["fs_psm"]["fcs"] > attacked["none"]["fcs"]
    for tower in ("fare", "tecoa"):
        assert attacked[tower]["acc"] < attacked["fs_psm"]["acc"], "16/255 is beyond what they were trained against"
        assert attacked[tower]["asr"] < attacked["none"]["asr"]
    assert ablation["fs_pm"]["acc"] > ablation["fs"]["acc"]
    lines = (ROOT / "docs" / "explanation" / "results.md").read_text("utf-8").splitlines()
    for row in summary["certificates"]:
        [quoted] = [line.strip("| ").split(" | ")[1:] for line in lines if line.startswith(f"| {row['picture']} |")]
        measured = [row[name] for name in ("plugin", "mean", "certified")]
        assert measured == pytest.approx([float(value) for value in quoted], abs=0.01)
    assert all(row["certified"] > 1.1 * row["mean"] for row in summary["certificates"])


@pytest.mark.slow
def test_fare_and_tecoa_withstand_what_they_were_trained_against(tmp_path):
    """At 4/255, on 100 scenes with a shape: 2 % for the vanilla tower, 37 % for FARE and 22 % for TeCoA, where trained.

    Another processor rounds differently, which may turn a few answers.
    """
    data = open_dataset(dataset.write(tmp_path / "scenes", 110))
    bare = tuple(defence for defence in ALL if defence.smoothing is None)
    suite = replace(suites(attack("4/255"))[0], defences=bare, twice=False, plain=False)
    plan = Plan((suite,), data, Setup(steps=100), ("none", *shipped.ROBUST))
    store, load = Store.begin(tmp_path / "rows", fixed("demo", {}, data, plan.setup)), loader("demo")
    Evaluation(lambda tower: load(shipped.ROBUST.get(tower, ""), data), plan, store, ExactMatch(), batch_size=44).run()
    [table] = Results(tmp_path / "rows").tables()
    accuracy = {DEFENCES[row[1]]: row[3].estimate.value for row in table.rows}
    assert accuracy["fare"] >= accuracy["none"] + 0.2, accuracy
    assert accuracy["tecoa"] >= accuracy["none"] + 0.15, accuracy
