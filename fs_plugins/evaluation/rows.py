"""The figures of a defence under a condition, for a summary that machines read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isnan

from fs_plugins.evaluation.datasets import Sample
from fs_plugins.evaluation.plan import AGAIN, FEATURES
from fs_plugins.evaluation.results import Results, accuracy, success
from fs_plugins.evaluation.suites import CLEAN, Condition, Defence
from fs_plugins.evaluation.tables import Figure

Row = dict[str, Figure]
Rows = dict[str, Row]
"""By the defences' names."""


def row(
    results: Results, defence: Defence, condition: Condition, task: str, samples: Iterable[Sample] | None = None
) -> Row:
    """ACC and ASR of a task, and FCS; on clean pictures FCS is between two servings with independent draws.

    Args:
        samples: the pictures in question; all if None.
    """
    some = list(results.plan.dataset.samples if samples is None else samples)
    answers = list(results.answers(defence, condition, task, some))
    fcs = results.cosine(defence, condition, some, kind=AGAIN if condition == CLEAN else FEATURES)
    return {"acc": accuracy(answers), "asr": success(answers), "fcs": fcs}


def values(rows: Mapping[str, Row]) -> dict[str, dict[str, float | None]]:
    """What ``summary.json`` holds of rows: None where there was nothing to measure."""
    return {who: {name: rounded(one.estimate.value) for name, one in row.items()} for who, row in rows.items()}


def intervals(rows: Mapping[str, Row]) -> dict[str, dict[str, list[float | None]]]:
    """The ends of the 95 % intervals of the same."""
    return {
        who: {name: [rounded(one.estimate.low), rounded(one.estimate.high)] for name, one in row.items()}
        for who, row in rows.items()
    }


def rounded(value: float) -> float | None:
    return None if isnan(value) else round(value, 4)
