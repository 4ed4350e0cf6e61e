"""Figures with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % confidence interval; NaN where there was nothing to measure."""

    value: float
    low: float
    high: float


def proportion(hits: Sequence[bool]) -> Estimate:
    """The share of hits, with Wilson's interval."""
    if not hits:
        return Estimate(math.nan, math.nan, math.nan)
    interval = stats.binomtest(sum(hits), len(hits)).proportion_ci(method="wilson")
    return Estimate(sum(hits) / len(hits), float(interval.low), float(interval.high))


def mean(values: Sequence[float]) -> Estimate:
    """The mean, with Student's interval; one value has none (NaN)."""
    if not values:
        return Estimate(math.nan, math.nan, math.nan)
    centre = sum(values) / len(values)
    if len(values) == 1:
        return Estimate(centre, math.nan, math.nan)
    if max(values) == min(values):
        return Estimate(centre, centre, centre)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=centre, scale=stats.sem(values))
    return Estimate(centre, float(low), float(high))
