"""Running suites on a tiny LLaVA: what is asked, kept, resumed and shared."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from painting import SUITE, Painter
from support import make_llava, make_psm

import fs_plugins
from fs_plugins import JudgeError, ModelError, PSMError, SettingError, attacks
from fs_plugins.attacks.feature import NoTokensError
from fs_plugins.evaluation import Results
from fs_plugins.evaluation.defended import options
from fs_plugins.evaluation.judges import ExactMatch
from fs_plugins.evaluation.plan import Setup
from fs_plugins.evaluation.store import Store
from fs_plugins.evaluation.suites import DEFENCES, LIGHT, NONE, SUITES, Condition, Smoothing


def rows_of(evaluation, *cells):
    return {cell: evaluation.store.rows(cell) for cell in cells}


def test_every_defence_is_asked_about_every_condition_once(start):
    evaluation = start()
    evaluation.run()
    asked = evaluation.load.painters[0].asked
    assert len(asked) == 2 * 2 * 5
    rows = rows_of(evaluation, "none/clean", "fs_psm/clean", "none/attackvlm-16", "fs_psm/attackvlm-16")
    assert all(len(cell) == 2 * 5 for cell in rows.values()), "a reply and a feature for each picture"
    assert {task for _, task in rows["none/clean"]} == {"classification", "features"}
    clean = rows["none/clean"][("0.png", "classification")]
    assert clean["reply"] == "0"
    assert clean["seconds"] > 0


def test_attacked_pictures_are_made_once_for_a_tower_and_shown_as_they_are(start, data):
    evaluation = start()
    evaluation.run()
    folders = [
        path.relative_to(evaluation.store.folder / "attacked").as_posix()
        for path in (evaluation.store.folder / "attacked").glob("*/*")
    ]
    assert folders == ["none/attackvlm-16"]
    for sample in data.samples:
        attacked = evaluation.store.attacked("none/attackvlm-16", sample.image)
        far = (attacked - data.image(sample, (16, 16))).abs().max().item()
        assert far == pytest.approx(16 / 255, abs=1e-6), "two steps are long enough to reach the ball's edge"


def test_the_same_command_again_asks_nothing_and_another_suite_shares_the_attacks(start):
    start().run()
    again = start()
    again.run()
    assert again.load.painters[0].asked == []
    other = start(replace(SUITE, name="other", task="vqa"))
    before = {path: path.stat().st_mtime_ns for path in other.store.folder.glob("attacked/*/*/*")}
    other.run()
    assert len(other.load.painters[0].asked) == 2 * 2 * 5
    assert {name for name, _ in other.load.painters[0].asked} == {"vqa"}
    assert {path: path.stat().st_mtime_ns for path in other.store.folder.glob("attacked/*/*/*")} == before


def test_a_run_that_was_killed_goes_on_to_the_same_rows(start, monkeypatch):
    whole = start(folder="whole")
    whole.run()
    killed = start(folder="killed")
    add, left = Store.add, [3]

    def dies(self, key, rows):
        left[0] -= 1
        if left[0] == 0:
            path = self.folder / "answers" / f"{key}.0.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write('{"image": "2.png", "ta')
            raise KeyboardInterrupt
        add(self, key, rows)

    monkeypatch.setattr(Store, "add", dies)
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    monkeypatch.undo()
    pictures = sorted(killed.store.folder.glob("attacked/*/*/*.safetensors"))
    pictures[0].write_bytes(pictures[0].read_bytes()[:50])
    resumed = start(folder="killed")
    resumed.run()

    def told(evaluation):
        cells = rows_of(evaluation, "none/clean", "fs_psm/clean", "none/attackvlm-16", "fs_psm/attackvlm-16")
        return {
            cell: {key: {n: v for n, v in row.items() if n != "seconds"} for key, row in rows.items()}
            for cell, rows in cells.items()
        }

    assert told(resumed).keys() == told(whole).keys()
    for cell, rows in told(whole).items():
        for key, row in rows.items():
            other = told(resumed)[cell][key]
            assert other.keys() == row.keys()
            for name, value in row.items():
                assert other[name] == (pytest.approx(value, abs=1e-4) if isinstance(value, float) else value), (
                    cell,
                    key,
                )


def test_two_processes_do_what_one_does(start):
    one = start(folder="one")
    one.run()
    parts = [start(folder="two", share=(rank, 2)) for rank in (1, 0)]
    for part in parts:
        part.run()
    assert sorted(len(part.load.painters[0].asked) for part in parts) == [2 * 2 * 2, 2 * 2 * 3]
    tables = [Results(evaluation.store.folder).tables() for evaluation in (one, parts[1])]
    for mine, theirs in zip(*(t[0].rows for t in tables), strict=True):
        assert mine[:3] == theirs[:3]
        for a, b in zip(mine[3:], theirs[3:], strict=True):
            assert a == b or a.estimate.value == pytest.approx(b.estimate.value, abs=1e-4)


def test_other_settings_in_the_same_folder_are_refused_by_name(start, tmp_path):
    start()
    with pytest.raises(SettingError, match="steps was 2 and is 3 now"):
        start(steps=3)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine", "utf-8")
    with pytest.raises(SettingError, match="holds no evaluation"):
        start(folder="full")


def test_a_judge_that_fails_loses_nothing_that_was_scored(start):
    class Frail(ExactMatch):
        asked = 0

        def scores(self, pairs):
            for pair in pairs:
                Frail.asked += 1
                if Frail.asked == 3:
                    raise JudgeError("The endpoint is down.")
                yield from super().scores([pair])

    suite = replace(SUITES["table1"], defences=(NONE,), conditions=(Condition("attackvlm", 16),))
    with pytest.raises(JudgeError, match="down"):
        start(suite, judge=Frail()).run()
    again = start(suite, judge=Frail())
    assert len(again.store.scores("exact")) == 2
    again.run()
    assert again.load.painters[0].asked == [], "captions were not asked for again"
    pairs = {
        ("a red square", "a red square"),
        ("a green square", "a green square"),
        ("a red square", "a blue square"),
        ("a green square", "a blue square"),
    }
    assert set(again.store.scores("exact")) == pairs
    assert Frail.asked == 5, "of four pairs two were scored, one failed and was scored later"


def test_a_tower_or_psm_that_is_not_there_is_said(start):
    evaluation = start(replace(SUITE, defences=(NONE, *DEFENCES[2:4])))
    evaluation.run()
    assert Results(evaluation.store.folder).notes() == [
        "There is no fare tower for this model, so its rows are left out."
    ]
    evaluation = start(
        replace(SUITES["s6"], defences=(NONE, SUITES["s6"].defences[1])), folder="light", light="/nowhere"
    )
    evaluation.run()
    assert (
        Results(evaluation.store.folder)
        .notes()[0]
        .startswith("FS-PSM (light) is left out: No PSM folder at '/nowhere'")
    )
    assert {row[1] for row in Results(evaluation.store.folder).tables()[0].rows} == {"none"}, (
        "the undefended rows are there"
    )
    evaluation = start(SUITE, folder="asked", psm="/nowhere")
    with pytest.raises(PSMError, match="nowhere"):
        evaluation.run()
    assert not (evaluation.store.folder / "attacked").exists(), "it is told before anything that takes long"


def test_a_tower_that_does_not_load_leaves_its_rows_out(start):
    def frail(tower):
        if tower == "fare":
            raise ModelError("Its layers are of another size.")

    evaluation = start(replace(SUITE, defences=(NONE, DEFENCES[2])), towers=("none", "fare"), load=frail)
    evaluation.run()
    assert Results(evaluation.store.folder).notes() == [
        "The rows of the fare tower are left out: Its layers are of another size."
    ]
    assert {row[1] for row in Results(evaluation.store.folder).tables()[0].rows} == {"none"}


def test_another_psm_in_the_same_place_is_refused(start, psm, tmp_path):
    start().run()
    make_psm(fs_plugins.vision_call(make_llava()), name="other").save_pretrained(tmp_path / "fresh")
    shutil.rmtree(psm)
    (tmp_path / "fresh").rename(psm)
    with pytest.raises(SettingError, match=r"psm was .*random.* and is .*other.* now"):
        start().run()


def test_subsets_are_of_all_labels_and_nested(start):
    evaluation = start()
    assert len({sample.label for sample in evaluation.plan.samples(2)}) == 2
    assert set(evaluation.plan.samples(2)) < set(evaluation.plan.samples(4)) < set(evaluation.plan.samples())


def test_rows_of_one_radius_are_not_those_of_another(start):
    store = start().store
    store.add("none/foa-12", [{"image": "a", "task": "vqa", "reply": "A"}])
    store.add("none/foa-12.75", [{"image": "a", "task": "vqa", "reply": "B"}])
    assert store.rows("none/foa-12")[("a", "vqa")]["reply"] == "A"
    assert store.rows("none/foa-12.75")[("a", "vqa")]["reply"] == "B"


def test_light_and_n0_reach_enable(start, psm):
    setup, subject = start().plan.setup, Painter(make_llava())
    light = next(d for d in SUITES["s6"].defences if d.smoothing)
    assert light.smoothing.psm == LIGHT
    assert options(subject, setup, light.smoothing)["psm"] == psm
    assert [options(subject, setup, d.smoothing)["n0"] for d in SUITES["s8"].defences] == [1, 2, 4, 8, 16]
    plain = options(subject, setup, SUITES["table5"].defences[1].smoothing)
    assert (plain["psm"], plain["sigma"]) == (None, 0.25)
    for place, (purifier, mapped) in ((2, (False, True)), (3, (True, False))):
        part = options(subject, setup, SUITES["table5"].defences[place].smoothing)["psm"]
        assert (part.config.purifier is not None, bool(part.mapped)) == (purifier, mapped)


def test_an_attack_that_needs_tokens_of_an_encoder_without_is_left_out_with_a_note(start, monkeypatch):
    def attack(*args, method, **options):
        if method == "foa":
            raise NoTokensError("This encoder gives no tokens.")
        return attacks.attack(*args, method=method, **options)

    monkeypatch.setattr("fs_plugins.evaluation.tower.attack", attack)
    both = tuple(Condition(method, 16) for method in ("foa", "attackvlm"))
    evaluation = start(replace(SUITE, conditions=both))
    evaluation.run()
    found = Results(evaluation.store.folder)
    assert found.notes() == ["The rows of FOA-Attack 16/255 are left out: This encoder gives no tokens."]
    assert {row[0] for row in found.tables()[0].rows} == {"clean", "AttackVLM 16/255"}


def test_purifiers_work_in_a_lower_precision_where_the_setup_says_so(psm):
    subject = Painter(make_llava())
    lower = options(subject, Setup(psm=psm, purifying="bfloat16"), Smoothing())["psm"]
    assert (lower.purifying, lower.mapped) == (torch.bfloat16, fs_plugins.PSM.from_pretrained(psm).mapped)
    assert options(subject, Setup(psm=psm), Smoothing())["psm"] == psm
    assert options(subject, Setup(psm=psm, sigma=0.25, purifying="bfloat16"), Smoothing("none"))["psm"] is None
    with pytest.raises(SettingError, match="got 'float16'"):
        Setup(purifying="float16")
