"""The worst case: attacks one after the other, each on the pictures that are right so far."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from painting import COLOURS, Painter
from support import make_llava

from fs_plugins import ModelError, SettingError
from fs_plugins.answers import Classes
from fs_plugins.evaluation import Results, curves
from fs_plugins.evaluation.suites import CLEAN, FS_PSM, NONE, SUITES, Condition, chosen, strongest
from fs_plugins.evaluation.tables import title_of

WORST = SUITES["worst"]
SUITE = replace(
    WORST, defences=(NONE, FS_PSM), conditions=(*strongest(4)[:3], replace(strongest(8)[3], draws=2), strongest(8)[5])
)


class Answering(Painter):
    """Answers that can be attacked; some pictures are answered wrongly from the n-th time on that they are shown."""

    wrong_from: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, model):
        super().__init__(model)
        self.times: Counter[str] = Counter()

    def answers(self, task, samples, dataset):
        return Classes(self.call, lambda embedded: embedded[:, :3])

    def reply(self, task, images, samples, dataset):
        said = super().reply(task, images, samples, dataset)
        self.times.update(sample.image for sample in samples)
        limits = [self.wrong_from.get(sample.image, 99) for sample in samples]
        aim = str(list(COLOURS).index("blue"))
        return [
            aim if self.times[sample.image] >= limit else one
            for one, sample, limit in zip(said, samples, limits, strict=True)
        ]


@pytest.fixture
def found(start, monkeypatch):
    """What an evaluation wrote in which two pictures fall: at the second attack, and at the fourth."""

    class Falling(Answering):
        wrong_from = {"0.png": 3, "1.png": 5}  # noqa: RUF012

    monkeypatch.setattr("painting.Painter", lambda model: Falling(model))
    evaluation = start(replace(SUITE, defences=(FS_PSM,)), adaptive_images=4)
    evaluation.run()
    return Results(evaluation.store.folder), evaluation


def test_each_attack_has_the_pictures_that_are_right_so_far(found):
    results, evaluation = found
    suite = results.plan.suites[0]
    asked = {
        condition.name: {answer.sample.image for answer in results.answers(FS_PSM, condition, "classification")}
        for condition in suite.asked
    }
    every = {sample.image for sample in evaluation.plan.samples(4)}
    assert {"0.png", "1.png"} < every
    names = [condition.name for condition in suite.conditions]
    assert asked["clean"] == asked[names[0]] == asked[names[1]] == every
    assert asked[names[2]] == asked[names[3]] == every - {"0.png"}
    assert asked[names[4]] == every - {"0.png", "1.png"}
    attacked = {path.name: len(list(path.iterdir())) for path in (results.folder / "attacked" / "fs_psm").iterdir()}
    assert attacked == {name: len(asked[name]) for name in names}


def test_what_counts_is_the_worst_of_all_up_to_a_radius(found):
    results, _ = found
    table, _certified = results.tables()
    by_row = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    for radius, right in ((4, 3 / 4), (8, 2 / 4)):
        row = by_row[f"worst up to {radius}/255"]
        assert row["n"] == 4
        assert row["ACC"].estimate.value == right
        assert row["ASR"].estimate.value == 1 - right
        assert row["FCS"] == ""
    assert "right under every attack" in table.note


def test_each_norm_has_curves_of_its_own_and_is_no_part_of_the_others(start, monkeypatch):
    class Falling(Answering):
        wrong_from = {"0.png": 3}  # noqa: RUF012

    monkeypatch.setattr("painting.Painter", lambda model: Falling(model))
    radii = (*(Condition("answer", eps, adaptive=True) for eps in (2, 4)), Condition("answer", l2=1, adaptive=True))
    suite = replace(SUITES["curves"], defences=(FS_PSM,), conditions=(*radii, replace(radii[-1], l2=2)))
    evaluation = start(suite, adaptive_images=4)
    evaluation.run()
    results = Results(evaluation.store.folder)
    counts = [len(list(results.answers(FS_PSM, one, "classification"))) for one in (CLEAN, *suite.conditions)]
    assert counts == [
        4,
        4,
        4,
        4,
        3,
    ]  # what falls at l-inf 4 is asked again at l2 1, for no ball of one is in the other's
    found = [results.worst(suite, FS_PSM, one) for one in suite.conditions]
    assert [sum(answer.verdict.correct for answer in answers) for answers in found] == [4, 3, 3, 3]
    assert [row[0] for row in results.tables()[0].rows][-4:] == [
        *("worst up to 2/255", "worst up to 4/255", "worst up to l2 1", "worst up to l2 2")
    ]
    image = evaluation.plan.dataset.image(evaluation.plan.samples(1)[0], (16, 16))
    shown = evaluation.store.attacked("fs_psm/answer-l2-2-adaptive", evaluation.plan.samples(1)[0].image)
    assert 0.5 < (shown - image).norm() < 2 + 1e-5
    drawn = curves.worst(results)
    assert "l-inf, 255ths" in drawn.svg
    assert "l2, [0, 1] pixels" in drawn.svg


def test_a_run_goes_on_with_what_was_right(found, start):
    results, evaluation = found
    before = {path: path.read_bytes() for path in (results.folder / "answers").rglob("*.jsonl")}
    evaluation.run()
    assert {path: path.read_bytes() for path in (results.folder / "answers").rglob("*.jsonl")} == before


def test_what_another_suite_asks_too_is_asked_about_all_its_pictures(start, monkeypatch):
    class Falling(Answering):
        wrong_from = {"0.png": 1}  # noqa: RUF012

    monkeypatch.setattr("painting.Painter", lambda model: Falling(model))
    whole = replace(SUITES["adaptive"], conditions=(SUITE.conditions[1],))
    evaluation = start(replace(SUITE, defences=(FS_PSM,)), whole, adaptive_images=4)
    evaluation.run()
    results = Results(evaluation.store.folder)
    counts = [len(list(results.answers(FS_PSM, one, "classification"))) for one in (CLEAN, *SUITE.conditions)]
    assert counts == [4, 3, 4, 3, 3, 3]


def test_captions_in_the_same_run_are_no_matter_of_the_worst_case(start, monkeypatch):
    monkeypatch.setattr("painting.Painter", Answering)
    captions = replace(SUITES["table1"], defences=(FS_PSM,), conditions=())
    evaluation = start(captions, replace(SUITE, defences=(FS_PSM,)))
    evaluation.run()
    assert {table.name for table in Results(evaluation.store.folder).tables()} == {"table1", "worst", "worst-certified"}


def test_without_smoothing_nothing_is_made_through_another_psm(start, monkeypatch):
    monkeypatch.setattr("painting.Painter", Answering)
    evaluation = start(SUITE)
    asked = {condition for defence, condition in evaluation.plan.cells if defence == NONE}
    assert not any(condition.through for condition in asked)
    evaluation.run()
    table, _certified = Results(evaluation.store.folder).tables()
    assert {row[1] for row in table.rows if row[0] == "worst up to 8/255"} == {"none", "FS-PSM"}


def test_a_model_whose_answers_cannot_be_attacked_is_told(start):
    with pytest.raises(ModelError, match="answers cannot be attacked"):
        start(SUITE).run()


def test_conditions_have_names_and_titles_of_their_own():
    conditions = WORST.conditions
    assert len({one.name for one in conditions}) == len({title_of(one) for one in conditions}) == len(conditions)
    one = Condition("answer-apgd", 8, adaptive=True, draws=4, restarts=2, through="light")
    assert one.name == "answer-apgd-8-adaptive-eot4-x2-through-light"
    assert title_of(one) == "APGD on the answer 8/255, adaptive, 4 draws a step, 2 starts, through light"
    assert Condition("foa", 16, adaptive=True).name == "foa-16-adaptive"


def test_the_language_models_own_answers_are_what_is_attacked():
    from fs_plugins.demo import dataset, world
    from fs_plugins.evaluation.subjects import Answering as Protocol
    from fs_plugins.evaluation.tasks import TASKS, TOKENS
    from fs_plugins.hf.subjects import loader

    assert isinstance(Answering(make_llava()), Protocol)
    subject = loader("demo")("", None)
    assert isinstance(subject, Protocol)
    scene = world.scene("heldout", 0)
    sample = dataset._sample(scene)
    data = type("Data", (), {"prompts": dataset.PROMPTS, "offered": lambda self, one: list(world.CLASSES)})()
    answers = subject.answers(TASKS["classification"], [sample], data)
    assert "What is the main shape" in answers.question(sample.image)
    assert answers.max_new_tokens == TOKENS["classification"]


def test_curves_show_what_is_left_and_what_is_proven(found, tmp_path):
    results, _ = found
    drawn = curves.worst(results)
    assert drawn.titles == "FS-PSM"
    assert drawn.svg.startswith("<svg")
    assert "right under every attack" in drawn.svg
    suite = results.plan.suites[0]
    line = curves._line(results, suite, FS_PSM, [suite.conditions[0], suite.conditions[-1]])
    assert [point[:2] for point in line.points] == [(0, 1), (4, 3 / 4), (8, 2 / 4)]
    results.write(tmp_path / "report")
    assert (tmp_path / "report" / "worst.svg").read_text("utf-8") == drawn.svg
    assert drawn.svg in (tmp_path / "report" / "report.html").read_text("utf-8")


def test_a_proof_in_l2_counts_for_the_linf_ball_inside(found):
    results, _ = found
    proofs = results.certificates(FS_PSM)[0.25]
    for norm, unit in (("linf", 255 / (3 * 16 * 16) ** 0.5), ("l2", 1)):
        eps, share = curves._proven(results, FS_PSM, 16.0, norm)
        assert len(eps) == len(share) == 200
        for one, wanted in zip(eps, share, strict=True):
            held = [unit * (proof.radius(0.5) or 0.0) >= one for proof in proofs.values()]
            assert wanted == pytest.approx(sum(held) / len(held))


def test_only_some_attacks_of_a_suite_are_made_where_somebody_says_which():
    (suite,) = chosen(["worst"], attacks="answer, attackvlm")
    assert {one.method for one in suite.conditions} == {"answer", "attackvlm"}
    assert len(suite.conditions) == 9
    with pytest.raises(SettingError, match=r"has an attack 'foa'\. Theirs are: answer, answer-target"):
        chosen(["worst"], attacks="foa")
