"""An evaluation's folder is enough: tables, notes and report are redrawn without model, PSM, attack or data."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from pages import make
from painting import SUITE

import fs_plugins
from fs_plugins import SettingError, kept
from fs_plugins.evaluation import Results
from fs_plugins.evaluation.suites import CLEAN, FS_PSM, NONE, SUITES


@pytest.fixture
def ran(start, data, tmp_path):
    """The folder of a run; the data and the PSM it had are gone."""
    captions = replace(SUITES["table1"], defences=(NONE, FS_PSM), conditions=SUITE.conditions)
    sure = replace(SUITES["table2"], sigmas=(), defences=(FS_PSM,))
    start(
        SUITE, captions, sure, SUITES["masking"], replace(SUITE, name="robust", defences=SUITES["table3"].defences)
    ).run()
    Results(tmp_path / "out").write(tmp_path / "before")
    shutil.rmtree(data.root)
    shutil.rmtree(tmp_path / "psm")
    return tmp_path / "out"


def test_a_folder_is_redrawn_to_the_byte_without_a_model(ran, tmp_path, monkeypatch):
    for verb in ("enable", "smoothers", "certify", "vision_call"):
        monkeypatch.setattr(
            fs_plugins, verb, lambda *args, **kwargs: pytest.fail("nothing is computed again"), raising=False
        )
    monkeypatch.setattr("torch.nn.Module.__call__", lambda *args, **kwargs: pytest.fail("no model is run"))
    moved = tmp_path / "elsewhere"
    ran.rename(moved)
    results = Results(moved)
    results.write(tmp_path / "after")
    before, after = (sorted((tmp_path / name).iterdir()) for name in ("before", "after"))
    assert [path.name for path in after] == [
        "masking.csv", "mine.csv", "report.html", "robust.csv", "summary.json", "table1.csv", "table2.csv"
    ]  # fmt: skip
    for one, other in zip(before, after, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name
    page = (tmp_path / "after" / "report.html").read_text("utf-8")
    assert "attacked, purified" in page
    assert [note for note in results.notes() if "fare" in note] == [
        "There is no fare tower for this model, so its rows are left out."
    ]
    told = json.loads((tmp_path / "after" / "summary.json").read_text("utf-8"))
    assert set(told["tables"]) == {"mine", "table1", "table2", "masking", "robust"}
    assert told["seconds"] > 0
    assert len(list(results.answers(NONE, CLEAN, "classification"))) == 5


def test_rows_of_an_earlier_version_are_refused_with_what_to_do_and_read_after_it(start, tmp_path):
    start().run()
    (tmp_path / "out" / "evaluation.json").unlink()  # as earlier versions left their folders
    with pytest.raises(SettingError, match="Run the same command again"):
        Results(tmp_path / "out")
    again = start()
    again.run()
    assert again.load.painters[0].asked == []
    assert len(Results(tmp_path / "out").tables()) == 1


def test_a_folder_of_something_else_or_of_another_format_is_refused(tmp_path):
    with pytest.raises(SettingError, match="holds no evaluation"):
        Results(tmp_path)
    results = make(tmp_path)
    record = results.folder / "evaluation.json"
    told = kept.read(record, "an evaluation")
    kept.write(record, {**told, "format": 99})
    with pytest.raises(SettingError, match="of format 99"):
        Results(tmp_path)
    record.write_text("{", "utf-8")
    with pytest.raises(SettingError, match="is not what an evaluation wrote"):
        Results(tmp_path)
    del told["suites"]
    kept.write(record, told)
    with pytest.raises(SettingError, match="is not what an evaluation wrote"):
        Results(tmp_path)


def test_an_interrupted_run_can_be_read(start, tmp_path, monkeypatch):
    evaluation = start()
    monkeypatch.setattr(evaluation.store, "add", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        evaluation.run()
    results = Results(tmp_path / "out")
    assert results.tables()[0].rows == ()
    assert "seconds" not in results.summary()
    assert results.write(tmp_path / "half").exists()


def test_a_clean_picture_is_served_twice_where_a_suite_asks(start, tmp_path):
    start(replace(SUITE, twice=True)).run()
    results = Results(tmp_path / "out")
    samples = results.plan.dataset.samples
    bare, smoothed = (results.cosine(one, CLEAN, samples, kind="again").estimate.value for one in (NONE, FS_PSM))
    assert bare == pytest.approx(1, abs=1e-6)
    assert 0 < smoothed < 1 - 1e-6, "other draws"
    assert results.tables()[0].rows[0][5] == "", "the table compares clean pictures with nothing"


def test_robust_towers_may_get_fewer_pictures(start, tmp_path):
    suite = replace(SUITE, defences=(NONE, SUITES["table3"].defences[2]))
    start(suite, towers=("none", "fare"), robust_images=2).run()
    [table] = Results(tmp_path / "out").tables()
    assert [(row[1], row[2]) for row in table.rows] == [("none", 5), ("FARE", 2)] * 2
    rows = Results(tmp_path / "out").rows(suite.defences[1], CLEAN)
    assert {image for image, _ in rows} == {"0.png", "1.png"}
