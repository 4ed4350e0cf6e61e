"""Answers certified from servings, by models whose answers' probabilities are known exactly."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import ndtr, ndtri
from scipy.stats import binom
from support import tiny_call
from torch import nn

from fs_plugins import AnswerCertificate, PixelSpace, Readout, SettingError
from fs_plugins.certificates import AnswerPlan, Question
from fs_plugins.certificates.asking import Asker, Replies, certify_replies
from fs_plugins.certificates.run import certify_named
from fs_plugins.readings import Alike, Compared, Exact, Judged, Letters, Number, Pattern, Words, YesNo
from fs_plugins.smoothing import FeatureSmoother
from fs_plugins.vision import Field

SIGMA = 0.25
IMAGE = torch.full((3, 8, 8), 0.5)


class Steps(nn.Module):
    """Its feature is one of two unit vectors, by whether the first pixel is above a threshold."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(threshold))
        self.calls = 0

    def forward(self, pixel_values):
        self.calls += 1
        above = (pixel_values[:, 0, 0, 0] > self.threshold).float()
        return {"tokens": torch.stack([above, 1 - above], 1)[:, None]}


class Table:
    """A language model that looks its answers up: one where at least a share of the draws was above, else another."""

    settings = {"table": 1}  # noqa: RUF012
    generation = "a table"

    def __init__(self, yes: str, no: str, share: float = 0.5) -> None:
        self.said, self.share = (no, yes), share

    def prompt(self, question):
        if "<image>" in question:
            raise SettingError("A question must not hold <image>.")
        return f"USER: {question}"

    def replies(self, output, question, reading):
        return [self.said[int(above >= self.share - 1e-6)] for above in output["tokens"][:, 0, 0].tolist()]


class Overlap:
    name = "overlap"

    def scores(self, pairs):
        yield from (float(one == other) for one, other in pairs)


READINGS = {
    "words": (Words(["cat", "dog"]), "Cat.", "dog"),
    "letters": (Letters(["cat", "dog"]), "A", "(B) dog"),
    "yes or no": (YesNo(), "Yes, I do.", "no"),
    "exact": (Exact(), "a cat", "a dog"),
    "number": (Number(), "there are 2", "3"),
    "pattern": (Pattern("cat|dog"), "it is a cat", "one dog"),
    "judged": (Judged(lambda answer: answer[:1], "first letter"), "cat", "dog"),
    "alike": (Alike(Overlap()), "cat", "dog"),
    "likeliest": (Compared(["cat", "dog"]), "cat", "dog"),
    "other": (Words(["cat", "cow"]), "cat", "I cannot say"),
}


def smoother(chance: float, **changes) -> FeatureSmoother:
    """Whose single draw is above the threshold with this probability, of IMAGE."""
    call = tiny_call(
        Steps(0.5 + SIGMA * float(ndtri(1 - chance))).eval(),
        pixels=PixelSpace((0.0,) * 3, (1.0,) * 3),
        readouts=(Readout("tokens", (Field("tokens", 0),), width=2, tokens=1),),
    )
    return FeatureSmoother(call, psm=None, sigma=SIGMA, **{"noise": "iid", **changes})


def truth(chance: float, n0: int, share: float = 0.5) -> float:
    """The probability of the table's first answer."""
    return float(binom.sf(math.ceil(n0 * share - 1e-6) - 1, n0, chance))


def replies(chance=0.9, asker=None, questions=None, **plan) -> Replies:
    reading, yes, no = READINGS["words"]
    return Replies(
        smoother(chance),
        AnswerPlan(**{"n": 60, "alpha": 0.05, "n0": 1, "pilot": 8, **plan}),
        asker or Table(yes, no),
        questions or [Question("what is it?", reading)],
    )


def test_what_is_asked_is_an_asker():
    assert all(hasattr(Table("a", "b"), name) for name in ("settings", "generation", "prompt", "replies"))
    asker: Asker = Table("a", "b")
    assert asker.prompt("x") == "USER: x"


def missed(kind: str, n0: int, runs: int, chance: float = 0.8) -> int:
    """Certificates that promise more than is true, of runs that stop early."""
    reading, yes, no = READINGS[kind]
    target = 0.3 * SIGMA / math.sqrt(n0)
    asked = replies(chance, Table(yes, no), [Question("?", reading)], n0=n0, target=target)
    p = truth(chance, n0)
    wrong = 0
    for run in range(runs):
        (one,) = certify_replies(asked, IMAGE, key=f"{kind} {run}".encode(), rows=64)
        first = one.predicted == (reading.fitted([yes, yes, no]).read(yes))
        wrong += one.probability > (p if first else 1 - p)
        assert one.n == 60 or one.radius is None or one.radius >= target - 1e-9 or one.n < 60
    return wrong


@pytest.mark.parametrize("n0", [1, 2, 4])
def test_certificates_are_wrong_at_most_as_often_as_they_say(n0):
    runs = 60
    assert missed("words", n0, runs) <= 0.05 * runs + 3 * math.sqrt(0.05 * 0.95 * runs)


@pytest.mark.slow
@pytest.mark.parametrize("n0", [1, 2, 4])
@pytest.mark.parametrize("kind", READINGS)
def test_certificates_of_every_reading_are_wrong_at_most_as_often_as_they_say(kind, n0):
    runs = 300
    assert missed(kind, n0, runs) <= 0.05 * runs + 3 * math.sqrt(0.05 * 0.95 * runs)


def test_the_bound_says_what_the_servings_show():
    (found,) = certify_replies(replies(n=200), IMAGE, key=b"k", encoder=(1.0,), seed="seed 1")
    assert found.predicted == "cat"
    assert found.count / found.n == pytest.approx(0.9, abs=0.07)
    assert found.probability < 0.9 < found.probability + 0.15
    assert found.method == "clopper-pearson"
    assert dict(found.said) == {"Cat.": found.count, "dog": 200 - found.count}
    assert found.radius == pytest.approx(SIGMA * float(ndtri(found.probability)))
    assert found.linf_radius == pytest.approx(found.radius / math.sqrt(192))
    assert (found.prompt, found.question, found.reading) == ("USER: what is it?", "what is it?", "one of: cat, dog")
    assert (found.encoder, found.seed, found.image_shape, found.readouts) == ((1.0,), "seed 1", (3, 8, 8), ("tokens",))
    assert "the vote over servings stays cat within l2 distance" in str(found)
    assert AnswerCertificate.from_json(found.to_json()) == found


def test_a_serving_draws_its_own_noise_whatever_is_in_a_batch_with_it():
    for n0 in (1, 3):
        asked = replies(0.6, n0=n0, n=150)
        found = [certify_replies(asked, IMAGE, key=b"k", rows=rows) for rows in (1, 7, 64)]
        assert found[0] == found[1] == found[2]
        others = [certify_replies(asked, IMAGE, key=mark)[0].count for mark in (b"1", b"2", b"3")]
        others += [certify_replies(asked, IMAGE + 1e-6 * i, key=b"k")[0].count for i in (1, 2, 3)]
        assert len({found[0][0].count, *others}) > 3


@pytest.mark.parametrize(("chance", "chosen"), [(0.995, 1), (0.6, 2)])
def test_the_pilot_chooses_how_many_draws_a_serving_has(chance, chosen):
    """Sure answers only lose by more draws; of unsure ones, here by one of two, more is won than lost."""
    asked = replies(chance, Table("cat", "dog", share=0.5), n0=None, n=400, pilot=200)
    (found,) = certify_replies(asked, IMAGE, key=b"k")
    assert found.n0 == chosen
    assert found.n == 400
    assert found.probability < truth(chance, chosen)


def test_servings_stop_where_the_target_is_reached_and_where_it_is_out_of_reach():
    near, hopeless = (
        certify_replies(replies(chance, n=1000, target=0.5 * SIGMA), IMAGE, key=b"k")[0] for chance in (0.95, 0.62)
    )
    assert near.n < 200
    assert near.radius >= 0.5 * SIGMA
    assert near.method == "betting"
    assert hopeless.n < 1000
    assert (hopeless.radius or 0.0) < 0.5 * SIGMA


def test_draws_that_were_spared_are_told_of_in_the_end():
    for asked in (replies(n0=None), replies(0.95, n=1000, target=0.5 * SIGMA), replies(asker=Table("?", "!"))):
        told = []
        certify_replies(asked, IMAGE, key=b"k", advance=told.append)
        assert sum(told) == asked.draws
        assert min(told) >= 0


def test_questions_about_one_image_share_its_draws():
    reading = READINGS["words"][0]
    one, both = replies(), replies(questions=[Question("what?", reading), Question("and?", READINGS["exact"][0])])
    counts, found = [], []
    for asked in (one, both):
        found.append(certify_replies(asked, IMAGE, key=b"k"))
        counts.append(asked.smoother.call.module.calls)
    assert counts[0] == counts[1]
    assert [certificate.predicted for certificate in found[1]] == ["cat", "cat"] or found[1][1].predicted == "cat."
    assert found[1][0].count == found[0][0].count


def test_an_answer_of_no_class_is_no_vote_and_without_any_nothing_is_certified():
    asked = replies(asker=Table("I cannot say", "As an AI"))
    (found,) = certify_replies(asked, IMAGE, key=b"k")
    assert found.predicted is None
    assert found.radius is None
    assert (found.count, found.n, found.probability, found.kept(0.0)) == (0, 8, 0.0, 0.0)
    assert "no answer was read as one of: cat, dog (most often 'I cannot say')" in str(found)
    assert AnswerCertificate.from_json(found.to_json()) == found


def test_a_judges_error_is_taken_off_the_probability():
    sure, unsure = (
        certify_replies(
            replies(questions=[Question("?", Judged(lambda answer: answer[:1], "j", error=error))]), IMAGE, key=b"k"
        )[0]
        for error in (0.0, 0.1)
    )
    assert unsure.probability == pytest.approx(sure.probability - 0.1)
    assert unsure.error == 0.1


def test_a_judge_that_errs_as_often_as_it_may_leaves_the_truth_certified():
    """Of true dogs it calls some cats, a tenth of all answers: the bound is below how often it is a cat indeed."""
    rng = np.random.default_rng(0)
    asked = replies(0.6, Table("cat", "dog"), n=1000, alpha=0.05)
    wrong = 0
    for run in range(20):
        judge = Judged(lambda answer: "cat" if answer == "cat" or rng.random() < 0.25 else "dog", "j", error=0.1)
        question = [Question("?", judge)]
        (found,) = certify_replies(replace(asked, questions=question), IMAGE, key=str(run).encode(), rows=512)
        wrong += found.predicted == "cat" and found.probability > 0.6
    assert wrong <= 4


def test_a_run_that_was_interrupted_goes_on_and_gives_the_same(tmp_path):
    images = {"a": IMAGE, "b": IMAGE * 0.9}
    questions = [Question("what?", READINGS["words"][0]), Question("and?", READINGS["exact"][0])]
    whole = certify_named(replies(questions=questions), images, seed=1, out=tmp_path / "whole")

    class Fails(Table):
        left = 7

        def replies(self, output, question, reading):
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("the power is gone")
            return super().replies(output, question, reading)

    with pytest.raises(RuntimeError, match="power"):
        certify_named(replies(asker=Fails("Cat.", "dog"), questions=questions), images, seed=1, out=tmp_path / "part")
    kept = len((tmp_path / "part").read_text("utf-8").splitlines())
    assert 1 < kept < 5
    again = certify_named(replies(questions=questions), images, seed=1, out=tmp_path / "part")
    assert again == whole
    lines = [json.loads(line) for line in (tmp_path / "whole").read_text("utf-8").splitlines()]
    assert [line["image"] for line in lines[1:]] == ["a: what?", "a: and?", "b: what?", "b: and?"]
    with pytest.raises(SettingError, match="questions"):
        certify_named(replies(), images, seed=1, out=tmp_path / "whole")


def test_a_row_that_its_count_cannot_have_given_is_refused(tmp_path):
    from fs_plugins.certificates.credible import doubts

    (found,) = certify_named(replies(), {"a": IMAGE}, seed=1, out=tmp_path / "rows")
    settings = json.loads((tmp_path / "rows").read_text("utf-8").splitlines()[0])["settings"]
    assert doubts(found, settings) == []
    for changes, said in (
        ({"probability": 0.99}, "probability is 0.99"),
        ({"count": found.count - 9}, "servings give"),
        ({"prompt": "another"}, "prompt is another"),
        ({"n0": 2}, "n0 is 2 for 1"),
        ({"alpha": 0.01}, "alpha is 0.01"),
    ):
        assert said in "; ".join(doubts(replace(found, **changes), settings))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Replies(smoother(0.9, noise="antithetic"), AnswerPlan(), Table("a", "b"), [Question("?", Exact())]),
         "together show x itself, so nothing can be promised"),
        (lambda: replies(questions=[Question("a", Exact()), Question("a", YesNo())]), "'a' is asked twice"),
        (lambda: Replies(smoother(0.9), AnswerPlan(), Table("a", "b"), []), "no question"),
        (lambda: replies(questions=[Question("<image>?", Exact())]), "must not hold <image>"),
        (lambda: replies(n=4, alpha=0.05), r"show a probability of 0\.47, and more than \.5 is needed"),
        (lambda: replies(n=20, target=1.0), "out of reach of n = 20 servings"),
        (lambda: Question(" ", Exact()), "A question is empty"),
        (lambda: Question("what?", "words"), "A reading has read, settled"),
        (lambda: AnswerPlan(n=0), "n \\(servings"),
        (lambda: AnswerPlan(n0=0), "n0 \\(draws"),
        (lambda: AnswerPlan(target=-1.0), "target must be"),
        (lambda: AnswerPlan(alpha=1.0), "alpha is the probability"),
        (lambda: certify_named(replace(replies(), smoother=smoother(0.9, n0=1)), {"a": IMAGE * 3}), "must be"),
    ],
)  # fmt: skip
def test_what_cannot_be_certified_is_refused(make, said):
    with pytest.raises(SettingError, match=said):
        make()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"count": 11}, "count must be between 0 and n"),
        ({"predicted": None}, "and 0 without a class"),
        ({"method": "hope"}, "method must be one of clopper-pearson, betting"),
        ({"n0": 0}, "n0 \\(draws"),
        ({"error": 1.0}, "error is a rate"),
        ({"said": (("a", 0),)}, "its count"),
        ({"probability": 1.0}, "probability is a lower bound"),
    ],
)
def test_a_certificate_holds_together(changes, said):
    known = {"sigma": 0.25, "n": 10, "n0": 1, "alpha": 0.05, "question": "?", "reading": "r", "predicted": "a"}
    known |= {"count": 9, "probability": 0.6}
    assert AnswerCertificate(**known).radius == pytest.approx(0.25 * 0.2533471, rel=1e-5)
    with pytest.raises(SettingError, match=said):
        AnswerCertificate(**{**known, **changes})


def test_what_is_kept_falls_as_the_normal_law_says():
    found = AnswerCertificate.from_count(99, 100, alpha=0.05, sigma=0.5, n0=4, question="?", reading="r", predicted="a")
    assert found.kept(0.1) == pytest.approx(ndtr(ndtri(found.probability) - 2 * 0.1 / 0.5))
    assert found.kept(found.radius) == pytest.approx(0.5)
    with pytest.raises(SettingError, match="eps is an l2 distance"):
        found.kept(-0.1)
