"""Certificates of what a defended model answers: each picture is asked its own question, all are in one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import fs_plugins
from fs_plugins.certificates.asking import AnswerPlan, Question, Replies
from fs_plugins.certificates.run import certify_named
from fs_plugins.errors import ModelError
from fs_plugins.evaluation.datasets import Dataset, Sample
from fs_plugins.evaluation.defended import Options
from fs_plugins.evaluation.means import Means
from fs_plugins.evaluation.plan import Plan
from fs_plugins.evaluation.subjects import Speaking, Subject, size_of
from fs_plugins.evaluation.suites import Defence
from fs_plugins.evaluation.tasks import TASKS, Choice
from fs_plugins.files import locked_file
from fs_plugins.readings import Judged


@dataclass(frozen=True, eq=False)
class _OneOfAll(Replies):
    """The answers to one question, kept in a file with those to others.

    Args:
        every: the settings of all questions.
    """

    every: Mapping[str, object]

    @property
    def settings(self) -> Mapping[str, object]:
        return self.every


def speaking(subject: Subject) -> Speaking:
    """The subject, if it can be asked in words.

    Raises:
        ModelError: it cannot.
    """
    if not isinstance(subject, Speaking):
        raise ModelError(
            "This model is not asked in words, so no answers of it can be certified. The label that a head or class "
            "names give is certified by fs_plugins.certify_predictions."
        )
    return subject


def certify_asked(
    subject: Subject, defence: Defence, chosen: Options, task: str, samples: Sequence[Sample], plan: Plan, means: Means
) -> None:
    """Certify the answers about samples, in so far as they have not been, by this process.

    Args:
        chosen: how ``enable`` is told of the defence; its draws become independent.
        task: a ``Choice``, whose prompt is the question and whose parser the reading.
        samples: the task applies to all.

    Raises:
        ModelError: see ``speaking``.
        FSPluginsError: see ``fs_plugins.certify_answers``.
    """
    asker = speaking(subject).asker(TASKS[task])
    smoother = fs_plugins.smoothers(subject.model, **chosen, noise="iid")[0]
    effort = AnswerPlan(n=plan.setup.certified_draws, n0=chosen["n0"])
    by_question: dict[str, list[Sample]] = {}
    for sample in samples:
        by_question.setdefault(TASKS[task].prompt(sample, plan.dataset), []).append(sample)
    asked = {text: _question(text, task, some[0], plan.dataset) for text, some in by_question.items()}
    every = Replies(smoother, effort, asker, list(asked.values()))
    settings = every.settings
    mine = {sample.image for sample in means.mine(samples)}
    advance = means.track(f"certifying answers, {defence.title}", len(mine) * every.draws)
    out, size = means.store.answers_file(defence.name, task, means.share), size_of(subject.call)
    with locked_file(out, "these certificates"):
        for text, some in by_question.items():
            images = {sample.image: plan.dataset.image(sample, size) for sample in some if sample.image in mine}
            if images:
                replies = _OneOfAll(smoother, effort, asker, [asked[text]], settings)
                seed, rows = plan.setup.seed, means.chunk_size
                certify_named(replies, images, seed=seed, rows=rows, out=out, advance=advance)


def _question(text: str, task: str, sample: Sample, data: Dataset) -> Question:
    """A sample's, read as its task reads replies."""
    choice = cast(Choice, TASKS[task])
    return Question(
        text, Judged(lambda reply: choice.parse(reply, sample, data), f"of {task}, by the question's own list")
    )
