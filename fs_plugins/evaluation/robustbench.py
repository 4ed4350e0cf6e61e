"""What AutoAttack left right, as RobustBench keeps it (Croce et al., NeurIPS 2021, arXiv 2010.09670).

One record a defence, with the keys of its ``model_info`` files and what is ours to add.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from fs_plugins.evaluation.autoattack import EOT_STEPS
from fs_plugins.evaluation.metrics import mean
from fs_plugins.evaluation.record import settings_of
from fs_plugins.evaluation.suites import AUTOATTACK, CLEAN, Condition, Defence, Suite

if TYPE_CHECKING:
    from fs_plugins.evaluation.results import Answer, Results

FILE = "robustbench.json"

_FOOTNOTE = (
    "Accuracy on {count} pictures. AutoAttack's version for randomised defences (APGD on cross-entropy and DLR, 100 "
    "steps, {draws} draws a step) through the defence, on those that are right as they are; a picture counts where it "
    "is right as attacked too, served with draws that the attack has not seen."
)


def records(results: Results) -> list[dict[str, Any]]:
    """One for each defence and radius that AutoAttack was tried on: none where no suite wanted it.

    Accuracies and eps are texts, as there. Who publishes a record fills in link, authors, venue and what its own paper
    reported.
    """
    return [
        _record(results, suite, defence, condition)
        for suite in results.plan.suites
        for condition in suite.conditions
        if condition.method == AUTOATTACK
        for defence in suite.defences
        if suite.task is not None and any(results.answers(defence, CLEAN, suite.task))
    ]


def _record(results: Results, suite: Suite, defence: Defence, condition: Condition) -> dict[str, Any]:
    assert suite.task is not None
    pictures = results.plan.pictures(suite, defence)
    clean, attacked = (list(results.answers(defence, asked, suite.task, pictures)) for asked in (CLEAN, condition))
    count = len(clean)  # and only those that were right were attacked
    made_of = results.store.made_of(defence.name)
    n0, sigma = made_of.get("n0", 1), made_of.get("sigma", 0.0)
    model = settings_of(results.folder)["model"]
    certificates = results.certificates(defence).get(sigma, {}).values()
    return {
        "link": "",
        "name": f"{defence.title}, {model}",
        "authors": "",
        "additional_data": None,
        "number_forward_passes": n0,
        "dataset": results.plan.dataset.name,
        "venue": "",
        "architecture": model,
        "eps": _in_255ths(condition.eps255),
        "clean_acc": _per_cent(clean, count),
        "reported": "",
        "autoattack_acc": _per_cent(attacked, count),
        "footnote": _FOOTNOTE.format(count=count, draws=EOT_STEPS),
        "n0": n0,
        "sigma": sigma,
        "eot_steps": EOT_STEPS,
        "certified_radius": mean([one.radius(0.5) or 0.0 for one in certificates]).value if certificates else None,
    }


def _per_cent(answers: Sequence[Answer], count: int) -> str:
    return f"{100 * sum(answer.verdict.correct for answer in answers) / count:.2f}"


def _in_255ths(eps255: float) -> str:
    """As people write radii: ``"16/255"``; ``"1/510"`` and the like where it is no whole number of 255ths."""
    whole = Fraction(eps255).limit_denominator(1000)
    return f"{whole.numerator}/{255 * whole.denominator}"
