"""Suites on a tiny LLaVA that answers by the colour it sees: what is asked, kept, resumed, shared and counted."""

from __future__ import annotations

import io
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from rich.console import Console
from support import command_line, make_llava, make_psm
from typer.testing import CliRunner

import fs_plugins
from fs_plugins import JudgeError, ModelError, PSMError, SettingError
from fs_plugins.cli import app
from fs_plugins.cli.evaluate import _drawn
from fs_plugins.evaluation.datasets import open_dataset
from fs_plugins.evaluation.judges import ExactMatch
from fs_plugins.evaluation.metrics import Estimate, mean, proportion
from fs_plugins.evaluation.results import Figure, Results, Table, title_of
from fs_plugins.evaluation.run import Evaluation, Settings, fixed
from fs_plugins.evaluation.store import Store
from fs_plugins.evaluation.suites import CLEAN, DEFENCES, FOA, FS_PSM, LIGHT, NONE, SUITES, TARGET, Condition, Suite
from fs_plugins.hf.chat import Chat
from fs_plugins.hf.zeroshot import ZeroShot

COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}
SUITE = Suite("mine", "Mine", "classification", (NONE, FS_PSM), (Condition("attackvlm", 16),))


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for i in range(5):
        name = list(COLOURS)[i % 2]
        generator = torch.Generator().manual_seed(i)
        noise = torch.randint(-25, 26, (16, 16, 3), generator=generator)
        pixels = (torch.tensor(COLOURS[name]) + noise).clamp(0, 255).to(torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
        rows.append(
            {"image": f"{i}.png", "target": "aim.png", "label": name, "question": "Which colour?",
             "options": list(COLOURS)[:2], "answer": name}
        )  # fmt: skip
    Image.new("RGB", (16, 16), COLOURS["blue"]).save(folder / "aim.png")
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "classes": list(COLOURS),
        "target_class": "blue",
        "prompts": {"vqa_answers": "option", "vqa": "{question} {options}"},
    }
    (folder / "dataset.json").write_text(json.dumps(settings))
    return open_dataset(folder)


class Painter:
    """Names the strongest colour of the pixels it is shown; the model only lends its vision encoder."""

    tasks = ("captioning", "classification", "vqa")

    def __init__(self, model):
        self.model, self.call, self.asked = model, fs_plugins.vision_call(model), []

    def reply(self, task, images, samples, dataset):
        with torch.no_grad():  # so that smoothing, where it is enabled, serves a call
            self.call.module(self.call.pixels.from_unit(images, torch.float32), output_hidden_states=True)
        names = [list(COLOURS)[i] for i in images.mean((2, 3)).argmax(1).tolist()]
        self.asked += [(task.name, sample.image) for sample in samples]
        return [
            str(dataset.classes.index(n))
            if task.name == "classification"
            else f"a {n} square"
            if task.name == "captioning"
            else n
            for n in names
        ]


@pytest.fixture
def psm(tmp_path):
    folder = tmp_path / "psm"
    make_psm(fs_plugins.vision_call(make_llava())).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def start(data, psm, tmp_path):
    def started(*suites, folder="out", share=(0, 1), judge=None, towers=("none",), **changes):
        settings = Settings(
            **{"steps": 2, "adaptive_steps": 1, "adaptive_draws": 1, "adaptive_images": 2, "psm": psm, "light": psm,
               "n0": 2, "certified_images": 2, "certified_draws": 20, "masking_images": 3, "masking_queries": 2, **changes}
        )  # fmt: skip
        store = Store(tmp_path / folder, fixed("tiny", dict.fromkeys(towers, ""), data, settings), share[0])
        loaded = []

        def load(tower):
            loaded.append(Painter(make_llava().requires_grad_(False)))
            return loaded[-1]

        evaluation = Evaluation(
            load, towers, data, suites or (SUITE,), settings, store, judge or ExactMatch(),
            lambda what, total: lambda done: None, batch_size=2, share=share,
        )  # fmt: skip
        evaluation.loaded = loaded
        return evaluation

    return started


def rows_of(evaluation, *cells):
    return {cell: evaluation.store.rows(cell) for cell in cells}


def test_every_defence_is_asked_about_every_condition_once(start):
    evaluation = start()
    evaluation.run()
    asked = evaluation.loaded[0].asked
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
    assert again.loaded[0].asked == []
    other = start(replace(SUITE, name="other", task="vqa"))
    before = {path: path.stat().st_mtime_ns for path in other.store.folder.glob("attacked/*/*/*")}
    other.run()
    assert len(other.loaded[0].asked) == 2 * 2 * 5
    assert {name for name, _ in other.loaded[0].asked} == {"vqa"}
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
            with path.open("a") as file:
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
    assert sorted(len(part.loaded[0].asked) for part in parts) == [2 * 2 * 2, 2 * 2 * 3]
    tables = [Results(evaluation).tables() for evaluation in (one, parts[1])]
    for mine, theirs in zip(*(t[0].rows for t in tables), strict=True):
        assert mine[:3] == theirs[:3]
        for a, b in zip(mine[3:], theirs[3:], strict=True):
            assert a == b or a.estimate.value == pytest.approx(b.estimate.value, abs=1e-4)


def test_other_settings_in_the_same_folder_are_refused_by_name(start, tmp_path):
    start()
    with pytest.raises(SettingError, match="steps was 2 and is 3 now"):
        start(steps=3)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(SettingError, match="holds no evaluation"):
        start(folder="full")


def test_tables_count_what_was_said(start):
    evaluation = start()
    evaluation.run()
    store = evaluation.store
    # What the model said is replaced: two right, one the attacker's, one refusal, one wrong.
    path = store.folder / "answers" / "none" / "attackvlm-16.0.jsonl"
    said = {"0.png": "0", "1.png": "1.", "2.png": "2", "3.png": "I cannot say.", "4.png": "1"}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["task"] == "classification":
            row["reply"] = said[row["image"]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [table] = Results(evaluation).tables()
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
    lines = (store.folder / "t.csv").read_text().splitlines()
    assert lines[0].startswith("pictures,defence,n,ACC,ACC low,ACC high,ASR")
    assert "AttackVLM 16/255,none,5,0.4," in lines[3]


def test_captions_are_compared_with_the_clean_one_and_the_targets(start):
    evaluation = start(replace(SUITES["table1"], defences=(NONE,), conditions=(Condition("attackvlm", 16),)))
    evaluation.run()
    assert ("target.0.jsonl") in [path.name for path in (evaluation.store.folder / "answers" / "none").iterdir()]
    [answer, *_] = Results(evaluation).answers(NONE, CLEAN, "captioning")
    assert answer.reply == "a red square"
    assert answer.scores == (1.0, 0.0)
    assert (answer.verdict.correct, answer.verdict.attacked) == (True, False)


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
    assert again.loaded[0].asked == [], "captions were not asked for again"
    pairs = {
        ("a red square", "a red square"),
        ("a green square", "a green square"),
        ("a red square", "a blue square"),
        ("a green square", "a blue square"),
    }
    assert set(again.store.scores("exact")) == pairs
    assert Frail.asked == 5, "of four pairs two were scored, one failed and was scored later"


def test_adaptive_attacks_go_through_the_defence_on_a_part_of_the_pictures(start):
    evaluation = start(SUITES["adaptive"])
    evaluation.run()
    attacked = {
        path.relative_to(evaluation.store.folder / "attacked").as_posix(): len(list(path.iterdir()))
        for path in (evaluation.store.folder / "attacked").glob("*/*")
    }
    assert attacked["fs_psm/foa-16-adaptive"] == 2
    assert attacked["none/foa-16"] == 2
    [table] = Results(evaluation).tables()
    assert {row[2] for row in table.rows} == {2}, "the oblivious attack is counted on the same pictures"
    assert [row[0] for row in table.rows][:2] == ["M-Attack 16/255", "M-Attack 16/255, adaptive"]


def test_certificates_and_ablation_parts(start):
    evaluation = start(SUITES["table2"], replace(SUITES["table5"], conditions=()))
    evaluation.run()
    assert any("not certified at sigma 0.5" in note for note in evaluation.notes), "the tiny PSM covers .25 alone"
    two, _asked, five = Results(evaluation).tables()
    assert [row[:3] for row in two.rows] == [("FS", "0.25", 2), ("FS", "0.5", 2), ("FS-PSM", "0.25", 2)]
    assert [row[0] for row in five.rows] == ["FS", "FS + M", "FS + P", "FS-PSM"]
    certificates = Results(evaluation).certificates(FS_PSM)[0.25]
    assert set(certificates) == {sample.image for sample in evaluation.samples(2)}
    value = five.rows[-1][-1].estimate.value
    assert value == pytest.approx(sum(c.radius(0.5) or 0 for c in certificates.values()) / 2)


def test_masked_gradients_are_searched_for_once(start):
    suite = replace(SUITES["masking"])
    evaluation = start(suite)
    evaluation.run()
    [table] = Results(evaluation).tables()
    assert [row[0] for row in table.rows] == [
        "no attack",
        "oblivious",
        "gradient-free",
        "adaptive, a quarter",
        "adaptive",
        "adaptive, eps 1, untargeted",
    ]
    assert all(row[1] == 3 for row in table.rows)


def test_a_tower_or_psm_that_is_not_there_is_said(start):
    evaluation = start(replace(SUITE, defences=(NONE, *DEFENCES[2:4])))
    evaluation.run()
    assert evaluation.notes == ["There is no fare tower for this model, so its rows are left out."]
    evaluation = start(
        replace(SUITES["s6"], defences=(NONE, SUITES["s6"].defences[1])), folder="light", light="/nowhere"
    )
    evaluation.run()
    assert evaluation.notes[0].startswith("FS-PSM (light) is left out: No PSM folder at '/nowhere'")
    assert {row[1] for row in Results(evaluation).tables()[0].rows} == {"none"}, "the undefended rows are there"
    evaluation = start(SUITE, folder="asked", psm="/nowhere")
    with pytest.raises(PSMError, match="nowhere"):
        evaluation.run()
    assert not (evaluation.store.folder / "attacked").exists(), "it is told before anything that takes long"


def test_a_tower_that_does_not_load_leaves_its_rows_out(start):
    evaluation = start(replace(SUITE, defences=(NONE, DEFENCES[2])), towers=("none", "fare"))
    load = evaluation.load

    def frail(tower):
        if tower == "fare":
            raise ModelError("Its layers are of another size.")
        return load(tower)

    evaluation.load = frail
    evaluation.run()
    assert evaluation.notes == ["The rows of the fare tower are left out: Its layers are of another size."]
    assert {row[1] for row in Results(evaluation).tables()[0].rows} == {"none"}


def test_another_psm_in_the_same_place_is_refused(start, psm, tmp_path):
    start().run()
    make_psm(fs_plugins.vision_call(make_llava()), name="other").save_pretrained(tmp_path / "fresh")
    shutil.rmtree(psm)
    (tmp_path / "fresh").rename(psm)
    with pytest.raises(SettingError, match=r"psm was .*random.* and is .*other.* now"):
        start().run()


def test_subsets_are_of_all_labels_and_nested(start):
    evaluation = start()
    assert len({sample.label for sample in evaluation.samples(2)}) == 2
    assert set(evaluation.samples(2)) < set(evaluation.samples(4)) < set(evaluation.samples())


def test_rows_of_one_radius_are_not_those_of_another(start):
    store = start().store
    store.add("none/foa-12", [{"image": "a", "task": "vqa", "reply": "A"}])
    store.add("none/foa-12.75", [{"image": "a", "task": "vqa", "reply": "B"}])
    assert store.rows("none/foa-12")[("a", "vqa")]["reply"] == "A"
    assert store.rows("none/foa-12.75")[("a", "vqa")]["reply"] == "B"


def test_light_and_n0_reach_enable(start, psm):
    evaluation = start()
    subject = Painter(make_llava())
    light = next(d for d in SUITES["s6"].defences if d.smoothing)
    assert light.smoothing.psm == LIGHT
    assert evaluation.options(subject, light)["psm"] == psm
    assert [evaluation.options(subject, d)["n0"] for d in SUITES["s8"].defences] == [1, 2, 4, 8, 16]
    plain = evaluation.options(subject, SUITES["table5"].defences[1])
    assert (plain["psm"], plain["sigma"]) == (None, 0.25)
    for place, (purifier, mapped) in ((2, (False, True)), (3, (True, False))):
        part = evaluation.options(subject, SUITES["table5"].defences[place])["psm"]
        assert (part.config.purifier is not None, bool(part.mapped)) == (purifier, mapped)


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


# What is asked


@pytest.fixture(scope="module")
def demo():
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from fs_plugins.demo import assets

    return Chat(
        AutoModelForImageTextToText.from_pretrained(assets.LLAVA).eval(), AutoProcessor.from_pretrained(assets.LLAVA)
    )


def test_a_model_is_shown_exactly_the_pixels_that_were_attacked(demo):
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    seen = []
    listener = demo.call.module.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((args, kwargs)), with_kwargs=True
    )
    try:
        said = demo.say(pixels, ["Which shape is in this image?"] * 2, 3)
    finally:
        listener.remove()
    args, kwargs = seen[0]
    shown = args[0] if args else kwargs["pixel_values"]
    assert torch.allclose(demo.call.pixels.to_unit(shown), pixels, atol=1e-6)
    assert len(said) == 2


def test_models_that_cut_pictures_up_are_refused(demo):
    class Tiles:
        chat_template, image_token, tokenizer = None, "<image>", demo.processor.tokenizer

        def __call__(self, **kwargs):
            from transformers import BatchFeature

            return BatchFeature({"input_ids": torch.ones(1, 3).long(), "pixel_values": torch.zeros(1, 5, 3, 64, 64)})

    with pytest.raises(ModelError, match=r"straight into the model, but its processor makes \(1, 5, 3, 64, 64\)"):
        Chat(demo.model, Tiles()).say(torch.rand(1, 3, 64, 64), ["?"], 2)


def test_zero_shot_takes_the_nearest_class_and_is_smoothed(clip, data):
    directions = {
        name: torch.nn.functional.normalize(torch.randn(24, generator=torch.Generator().manual_seed(i)), dim=0)
        for i, name in enumerate(["blue", "red"])
    }
    subject = ZeroShot(clip, directions)
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    embedded = subject.call.embed(subject.call.encode(images))
    wanted = [
        data.classes.index(["blue", "red"][i]) for i in (embedded @ torch.stack(list(directions.values())).T).argmax(1)
    ]
    assert subject.reply(None, images, data.samples[:4], data) == [str(i) for i in wanted]
    with fs_plugins.enable(clip, psm=None, sigma=0.25) as handle:
        subject.reply(None, images, data.samples[:4], data)
        assert handle.status().vision[0].calls == 1


# The command


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
    told = json.loads((out / "summary.json").read_text())
    first = told["tables"]["table3"][0]
    assert (first["pictures"], first["defence"], first["n"]) == ("clean", "none", 4)
    assert first["ACC"]["value"] == 1.0
    assert (out / "table3.csv").exists()
    assert "FOA-Attack" in (out / "report.html").read_text()
    again = CliRunner().invoke(app, [*command[:-1], str(out), "--seed", "1"])
    assert again.exit_code == 2
    assert "seed was 0 and is 1 now" in " ".join(again.output.split())


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
    drawn = io.StringIO()
    Console(file=drawn, width=80).print(_drawn(Table("x", "X", columns, rows)))
    lines = [line.rstrip() for line in drawn.getvalue().splitlines()]
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


def test_a_corrupt_picture_is_refused_by_name_or_skipped(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        Image.effect_noise((64, 64), 60).convert("RGB").save(folder / f"{i}.png")
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])
    command = ["evaluate", "--suite", "table1", "--quick", "--images", "2", "--steps", "1", "--fare", "none", "--tecoa", "none",
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
    command = ["evaluate", "--suite", "table3", "--model", "demo-clip", "--quick", "--images", "4", "--steps", "1", "--fare", "none",
               "--tecoa", "none", "--class-prompt", "a large red {} in the middle", "--out", str(tmp_path / "out")]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())["tables"]["table3"]
    assert rows[0]["n"] == 4


@pytest.mark.slow
def test_the_papers_ordering_holds_on_the_embedded_world(tmp_path):
    command = ["evaluate", "--suite", "table3", "--images", "66", "--steps", "100", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "summary.json").read_text())["tables"]["table3"]
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
        told.append(json.loads((tmp_path / name / "summary.json").read_text())["tables"])
    parts = {path.name for path in (tmp_path / "two" / "results" / "answers" / "none").iterdir()}
    assert {"clean.0.jsonl", "clean.1.jsonl"} <= parts
    for table, rows in told[0].items():
        for one, two in zip(rows, told[1][table], strict=True):
            for column, value in one.items():
                if isinstance(value, dict):
                    assert two[column]["value"] == pytest.approx(value["value"], abs=2e-3), (table, column)
                else:
                    assert two[column] == value
