"""The suite answers: how many pictures' answers are certified to be right, and within which distance."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import cycle

import pytest
from painting import Painter
from scipy.special import ndtri

from fs_plugins import ModelError, SettingError
from fs_plugins.evaluation import Results, curves
from fs_plugins.evaluation.results import REACHES
from fs_plugins.evaluation.subjects import Speaking
from fs_plugins.evaluation.suites import SUITES, chosen

ANSWERS = SUITES["answers"]
NOISE, FS_PSM_4 = ANSWERS.defences[0], ANSWERS.defences[-1]
SUITE = replace(ANSWERS, defences=(NOISE, FS_PSM_4))
N = 60
SAID = {
    "0.png": ["0"],  # red, which it is
    "1.png": ["2"],  # blue, which it is not
    "2.png": ["0", "0.", "'0'", "1"],  # red, three times of four
    "3.png": ["a green square"],  # no class
    "4.png": ["0", "2"],  # red half of the time, which is too seldom
}


class Speaker(Painter):
    """Answers, serving after serving, what is written for the picture that its encoder has just seen."""

    settings = {"it": "speaks"}  # noqa: RUF012
    generation = "by heart"

    def __init__(self, model, data, said):
        super().__init__(model)
        self.said = {name: cycle(some) if isinstance(some, list) else some for name, some in said.items()}
        self.clean = {one.image: data.image(one, (16, 16)) for one in data.samples}
        self.times: Counter[str] = Counter()
        self.call.module.register_forward_pre_hook(self.see, with_kwargs=True)

    def see(self, module, args, kwargs):
        pixels = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
        self.seen = self.call.pixels.to_unit(pixels).mean(0)

    def asker(self, task):
        assert task.name == "classification"
        return self

    def prompt(self, question):
        return f"USER: {question}"

    def replies(self, output, question, reading):
        name = min(self.clean, key=lambda one: (self.clean[one] - self.seen).norm())
        rows = len(next(iter(self.call.features(output).values())))
        self.times[name] += rows
        return [next(self.said[name]) for _ in range(rows)]


@pytest.fixture
def speaking(start, data, monkeypatch):
    """Suites and changes -> an evaluation of a model that speaks; ``said`` is what it says."""

    def started(*suites, said=SAID, shown=data, **changes):
        monkeypatch.setattr("painting.Painter", lambda model: Speaker(model, data, said))
        evaluation = start(*(suites or (SUITE,)), **{"certified_draws": N, "certified_images": 5, **changes})
        return replace(evaluation, plan=replace(evaluation.plan, dataset=shown))

    return started


def ran(evaluation):
    evaluation.run()
    return Results(evaluation.store.folder)


def shares(table):
    """A row's title -> the share of pictures at each radius."""
    assert table.columns[3:] == tuple(f"l2 {radius:g}" for radius in REACHES)
    return {row[0]: tuple(cell.estimate.value for cell in row[3:]) for row in table.rows}


def test_what_counts_is_right_certified_and_far_enough(speaking):
    results = ran(speaking())
    [table] = results.tables()
    # All of 60 servings show a probability of .001 ** (1 / 60), so a radius of .308 at n0 = 1 and half of it at n0 = 4.
    assert shares(table) == {"none with noise": (0.4, 0.2, 0.2, 0), "FS-PSM, n0 4": (0.4, 0.2, 0, 0)}
    assert [(row[1], row[2]) for row in table.rows] == [("0.25", 5)] * 2
    assert "wrong with probability at most 0.001, from 60 servings" in table.note
    for defence, n0 in ((NOISE, 1), (FS_PSM_4, 4)):
        found = {sample.image: one for sample, one in results.answered(defence, SUITE).items()}
        assert {name: (one.predicted, one.count) for name, one in found.items()} == {
            "0.png": ("red", 60), "1.png": ("blue", 60), "2.png": ("red", 45), "3.png": (None, 0), "4.png": ("red", 30),
        }  # fmt: skip
        assert {(one.n0, one.sigma, one.psm) for one in found.values()} == {(n0, 0.25, "random" if n0 == 4 else None)}
        assert "Output only a single integer" in found["0.png"].question
        sure, wrong, often, unheard, seldom = results.reach(defence, SUITE)
        assert sure == pytest.approx(0.25 / n0**0.5 * ndtri(0.001 ** (1 / 60)))
        assert 0 < often < 0.125
        assert wrong is unheard is seldom is None


def test_a_run_goes_on_with_what_is_certified(speaking):
    def until(servings):
        yield from ["0"] * servings
        raise SettingError("It is tired.")

    broken = speaking(said={**SAID, "2.png": until(50)})
    with pytest.raises(SettingError, match="It is tired"):
        broken.run()
    [kept] = broken.store.answers_files(NOISE.name, "classification")
    before = kept.read_bytes()
    assert before.count(b"\n") == 1 + 2  # the settings, and two pictures
    again = speaking()
    again.run()
    assert kept.read_bytes().startswith(before)
    times = again.load.painters[0].times
    pilot = 32
    once, both = pilot + N, 2 * (pilot + N)
    assert times == {"0.png": once, "1.png": once, "2.png": both, "3.png": 2 * pilot, "4.png": both}
    told = kept.read_bytes()
    last = speaking()
    last.run()
    assert not last.load.painters[0].times
    assert kept.read_bytes() == told


def test_processes_share_the_pictures(speaking):
    for share in ((1, 2), (0, 2)):
        evaluation = speaking(replace(SUITE, defences=(NOISE,)), share=share)
        evaluation.run()
    files = evaluation.store.answers_files(NOISE.name, "classification")
    assert [path.name for path in files] == ["fs_n1.0-of-2.jsonl", "fs_n1.1-of-2.jsonl"]
    assert sorted(evaluation.load.painters[0].times) == ["0.png", "2.png", "4.png"]
    assert shares(Results(evaluation.store.folder).tables()[0]) == {"none with noise": (0.4, 0.2, 0.2, 0)}


def test_each_picture_is_asked_its_own_question_and_those_that_have_none_are_not(speaking, data):
    own = {"0.png": {"choices": ("green", "red")}, "1.png": {"label": None}, "2.png": {"choices": ("red", "blue")}}
    samples = tuple(one.model_copy(update=own.get(one.image, {})) for one in data.samples)
    said = {**{name: ["0"] for name in SAID}, "3.png": ["1"]}
    results = ran(speaking(replace(SUITE, defences=(NOISE,)), said=said, shown=replace(data, samples=samples)))
    found = {sample.image: one for sample, one in results.answered(NOISE, SUITE).items()}
    classes = {name: one.predicted for name, one in found.items()}
    assert classes == {"0.png": "green", "2.png": "red", "3.png": "green", "4.png": "red"}
    assert "0. green, 1. red" in found["0.png"].question
    assert "0. red, 1. blue" in found["2.png"].prompt
    assert shares(results.tables()[0]) == {"none with noise": (0.75, 0.75, 0.75, 0)}


def test_the_report_shows_figures_and_curve(speaking, tmp_path):
    results = ran(speaking(replace(SUITE, defences=(NOISE,))))
    out = tmp_path / "written"
    results.write(out)
    drawn = curves.answers(results)
    assert drawn.titles == "none with noise"
    assert drawn.svg == (out / "answers.svg").read_text("utf-8")
    page = (out / "report.html").read_text("utf-8")
    assert drawn.svg in page
    assert 'id="certified-answers"' in page
    assert "Certified accuracy of answers" in page
    head, row = (out / "answers.csv").read_text("utf-8").splitlines()
    assert head.startswith("defence,sigma,n,l2 0,l2 0 low,l2 0 high,l2 0.125,")
    assert row.startswith("none with noise,0.25,5,0.4,")


def test_the_curve_falls_where_a_picture_is_certified_no_further(speaking, monkeypatch):
    results = ran(speaking(replace(SUITE, defences=(NOISE,))))
    drawn = {}

    class Axes:
        def step(self, radii, left, style, *, where, label):
            drawn[label] = (list(radii), list(left), where)

        def set(self, **settings):
            drawn["limits"] = settings["xlim"]

    monkeypatch.setattr(curves, "_svg", lambda draw: draw(Axes()))
    curves.answers(results)
    sure, _, often, *_ = results.reach(NOISE, SUITE)
    assert drawn["none with noise (n = 5)"] == ([0, often, sure, pytest.approx(1.05 * sure)], [40, 20, 0, 0], "post")
    assert drawn["limits"] == (0, pytest.approx(1.05 * sure))


def test_without_certified_answers_there_is_no_curve(speaking):
    unheard = {name: ["no idea"] for name in SAID}
    results = ran(speaking(replace(SUITE, defences=(NOISE,)), said=unheard))
    assert shares(results.tables()[0]) == {"none with noise": (0, 0, 0, 0)}
    assert "none with noise" in curves.answers(results).titles  # a line at 0
    assert curves.answers(ran(speaking(replace(SUITE, answers=False), folder="other"))) is None


def test_a_model_that_is_not_asked_in_words_is_told_before_anything_is_made(start):
    evaluation = start(SUITE, SUITES["table3"])
    with pytest.raises(ModelError, match=r"not asked in words.*certify_predictions"):
        evaluation.run()
    assert not (evaluation.store.folder / "certificates").exists()
    assert not (evaluation.store.folder / "attacked").exists()


def test_data_without_classes_are_left_out_with_a_note(speaking, data):
    samples = tuple(one.model_copy(update={"label": None}) for one in data.samples)
    results = ran(speaking(shown=replace(data, samples=samples)))
    assert results.tables() == []
    assert results.notes() == [
        "Certified accuracy of answers: left out, because the data or the model is not for classification."
    ]


def test_the_suite_is_asked_for_by_name_and_has_each_defence_once():
    assert ANSWERS not in chosen(["all"])
    assert chosen(["answers"]) == (ANSWERS,)
    titles = [one.title for one in ANSWERS.defences]
    assert titles == ["none with noise", "FS, n0 2", "FS, n0 4", "FS-PSM, n0 1", "FS-PSM, n0 2", "FS-PSM, n0 4"]
    assert [one.smoothing.n0 for one in ANSWERS.defences] == [1, 2, 4] * 2
    known = {one.name: one for suite in SUITES.values() for one in suite.defences}
    assert all(known[one.name] == one for one in ANSWERS.defences)


def test_a_language_model_is_asked_as_the_task_asks_it():
    from fs_plugins.evaluation.tasks import TASKS, TOKENS
    from fs_plugins.hf.subjects import loader

    subject = loader("demo")("", None)
    assert isinstance(subject, Speaking)
    asker = subject.asker(TASKS["classification"])
    assert asker.max_new_tokens == TOKENS["classification"] == 8
    assert asker.call is subject.call
    assert not isinstance(Painter(subject.model), Speaking)
