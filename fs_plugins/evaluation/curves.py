"""Curves of an evaluation as SVG: what is certified against the distance, and what is left right against the radius.

The same rows give the same bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fs_plugins.certificates import Certificate
from fs_plugins.certificates.bounds import Array
from fs_plugins.evaluation.metrics import proportion
from fs_plugins.evaluation.suites import Defence, Suite

if TYPE_CHECKING:
    from fs_plugins.evaluation.results import Results

_STYLES = ("-", "--", "-.", ":")
PROVEN = 0.5
"""The cosine that has to be proven for a picture to count as certified."""


@dataclass(frozen=True)
class Curves:
    """An SVG element, safe to stand in HTML, and what its lines are called."""

    svg: Any
    titles: str


def certified(results: Results) -> Curves | None:
    """The mean certified cosine against eps of every certified defence and noise level; None without any."""
    lines: dict[tuple[str, float], list[Certificate]] = {}
    for suite in results.plan.suites:
        for defence in suite.defences if suite.certified else ():
            if defence.smoothing is not None:
                for sigma, by_picture in sorted(results.certificates(defence).items()):
                    lines[defence.title, sigma] = [by_picture[name] for name in sorted(by_picture)]
    if not lines:
        return None
    everything = [one for some in lines.values() for one in some]
    furthest = max((one.radius(0.0) or 0.0 for one in everything), default=0.0)
    # Scores that are all 1 have an infinite estimate; without any promise there is no scale either.
    limit = furthest if 0 < furthest < np.inf else max(one.sigma for one in everything)
    eps = np.linspace(0, limit, 200)

    def draw(axes: Any) -> None:
        for place, ((title, sigma), some) in enumerate(lines.items()):
            average = _average(some, eps)
            label = f"{title}, sigma {sigma:g} (n = {len(some)})"
            axes.plot(eps, np.where(average > 0, average, np.nan), _STYLES[place % 4], label=label)
        unrelated = [one.unrelated for one in everything if one.unrelated is not None]
        if unrelated:
            level = float(np.mean(unrelated))
            axes.axhline(level, color="0.6", linewidth=0.8, zorder=0, label=f"unrelated pictures ({level:.2f})")
        axes.set(xlabel="eps (l2, [0, 1] pixels)", ylabel="certified cosine", xlim=(0, limit), ylim=(0, 1))

    return Curves(_svg(draw), ", ".join(f"{title} at sigma {sigma:g}" for title, sigma in lines))


def worst(results: Results) -> Curves | None:
    """The accuracy under the worst attack against its radius, with its interval; None without a suite that asks for it
    at several.

    Beneath, dotted, the share of pictures with a proven cosine of .5 within the l2 ball around the l-inf one, of
    defences that were certified as well.
    """
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    proven: dict[str, tuple[list[float], list[float]]] = {}
    furthest = 0.0
    for suite in results.plan.suites:
        several = len({condition.eps255 for condition in suite.conditions}) > 1
        for defence in suite.defences if suite.worst and several else ():
            if points := _left(results, suite, defence):
                lines[defence.title] = points
                furthest = max(furthest, points[-1][0])
                if defence.smoothing is not None and (found := _proven(results, defence, points[-1][0])):
                    proven[defence.title] = found
    if not lines:
        return None

    def draw(axes: Any) -> None:
        for place, (title, points) in enumerate(lines.items()):
            radii, value, low, high = np.array(points).T
            (line,) = axes.plot(radii, 100 * value, _STYLES[place % 4], marker="o", markersize=3, label=title)
            axes.fill_between(radii, 100 * low, 100 * high, color=line.get_color(), alpha=0.12, linewidth=0)
            if title in proven:
                eps, share = proven[title]
                label = f"{title}: proven cosine {PROVEN:g}"
                axes.plot(eps, [100 * one for one in share], ":", color=line.get_color(), linewidth=0.9, label=label)
        axes.set(xlabel="eps (l-inf, 255ths)", ylabel="right under every attack, %", xlim=(0, furthest), ylim=(0, 101))

    return Curves(_svg(draw), ", ".join(lines))


def _left(results: Results, suite: Suite, defence: Defence) -> list[tuple[float, float, float, float]]:
    """Radius, accuracy under the worst attack up to it, and the ends of its interval."""
    points = []
    for eps255 in sorted({condition.eps255 for condition in suite.asked}):
        if answers := results.worst(suite, defence, eps255):
            found = proportion([answer.verdict.correct for answer in answers])
            points.append((eps255, found.value, found.low, found.high))
    return points


def _proven(results: Results, defence: Defence, limit: float) -> tuple[list[float], list[float]] | None:
    """l-inf radii in 255ths, and the share of certified pictures whose l2 radius holds such a ball."""
    by_sigma = results.certificates(defence)
    level = results.record.levels.get(defence.name)
    some = list(by_sigma.get(level, {}).values()) if level is not None else []
    if not some:
        return None
    radii = np.sort([255 * (one.radius(PROVEN) or 0.0) / math.sqrt(math.prod(one.image_shape or (1,))) for one in some])
    eps = np.linspace(0, limit, 200)
    share = 1 - np.searchsorted(radii, eps, side="left") / len(radii)
    return eps.tolist(), share.tolist()


def _svg(draw: Callable[[Any], None]) -> Any:
    """What ``draw`` puts on axes, as an SVG element."""
    import matplotlib
    from markupsafe import Markup
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context({"svg.hashsalt": "fs-plugins", "svg.fonttype": "none", "text.parse_math": False}):
        figure = Canvas(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.grid(color="0.9")
        axes.legend(frameon=False, fontsize=8)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = drawn.getvalue()
    # What stands before <svg> is for files of their own. matplotlib has escaped the labels.
    return Markup(svg[svg.index("<svg") :])


def _average(certificates: Sequence[Certificate], eps: Array) -> Array:
    """Where a picture has no promise, 0 counts, as in the tables."""
    return np.asarray(np.mean([np.nan_to_num(one.curve(eps)) for one in certificates], axis=0))
