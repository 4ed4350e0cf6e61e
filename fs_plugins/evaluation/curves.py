"""Curves of an evaluation as SVG: what is certified, and what is left right under attack, against the distance.

The same rows give the same bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fs_plugins.certificates import Certificate
from fs_plugins.certificates.bounds import Array
from fs_plugins.evaluation.metrics import proportion
from fs_plugins.evaluation.suites import CLEAN, Condition, Defence, Suite

if TYPE_CHECKING:
    from fs_plugins.attacks.ball import Norm
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
    at several. Each norm has axes of its own.

    Beneath, dotted, the share of pictures with a proven cosine of .5 within the ball (for l-inf within the l2 ball
    around it), of defences that were certified as well.
    """
    panels: dict[Norm, dict[str, _Line]] = {}
    for suite in results.plan.suites:
        for norm in dict.fromkeys(condition.norm for condition in suite.conditions) if suite.worst else ():
            radii = {condition.radius: condition for condition in suite.conditions if condition.norm == norm}
            for defence in suite.defences if len(radii) > 1 else ():
                if line := _line(results, suite, defence, list(radii.values())):
                    panels.setdefault(norm, {})[defence.title] = line
    if not panels:
        return None

    def draw(norm: Norm, axes: Any) -> None:
        lines = panels[norm]
        for place, (title, line) in enumerate(lines.items()):
            radii, value, low, high = np.array(line.points).T
            (drawn,) = axes.plot(radii, 100 * value, _STYLES[place % 4], marker="o", markersize=3, label=title)
            axes.fill_between(radii, 100 * low, 100 * high, color=drawn.get_color(), alpha=0.12, linewidth=0)
            if line.proven is not None:
                eps, share = line.proven
                label = f"{title}: proven cosine {PROVEN:g}"
                axes.plot(eps, 100 * share, ":", color=drawn.get_color(), linewidth=0.9, label=label)
        furthest = max(line.points[-1][0] for line in lines.values())
        unit = "l-inf, 255ths" if norm == "linf" else "l2, [0, 1] pixels"
        axes.set(xlabel=f"eps ({unit})", ylabel="right under every attack, %", xlim=(0, furthest), ylim=(0, 101))

    titles = ", ".join(dict.fromkeys(title for lines in panels.values() for title in lines))
    return Curves(_svg(*(partial(draw, norm) for norm in panels)), titles)


def answers(results: Results) -> Curves | None:
    """The certified accuracy of answers against the l2 radius, as Cohen et al. (ICML 2019) draw it: a line a defence;
    None where none were certified.
    """
    suites = [suite for suite in results.plan.suites if suite.answers]
    lines = {d.title: reach for suite in suites for d in suite.defences if (reach := results.reach(d, suite))}
    if not lines:
        return None
    known = {title: np.sort([far for far in reach if far is not None]) for title, reach in lines.items()}
    furthest = max((float(radii[-1]) for radii in known.values() if len(radii)), default=0.0)
    limit = 1.05 * furthest or 1.0

    def draw(axes: Any) -> None:
        for place, (title, radii) in enumerate(known.items()):
            left = 100 * np.arange(len(radii), -1, -1) / len(lines[title])
            label = f"{title} (n = {len(lines[title])})"
            axes.step([0, *radii, limit], [*left, 0], _STYLES[place % 4], where="post", label=label)
        axes.set(xlabel="radius (l2, [0, 1] pixels)", ylabel="certified to be right, %", xlim=(0, limit), ylim=(0, 101))

    return Curves(_svg(draw), ", ".join(lines))


@dataclass(frozen=True)
class _Line:
    """A defence's.

    Args:
        points: the radius, as the axis has it, the accuracy under the worst attack up to it, and its interval's ends.
        proven: radii, and the share of certified pictures with such a ball.
    """

    points: list[tuple[float, float, float, float]]
    proven: tuple[Array, Array] | None


def _line(results: Results, suite: Suite, defence: Defence, radii: Sequence[Condition]) -> _Line | None:
    points, unit = [], 255 if radii[0].norm == "linf" else 1
    for condition in (CLEAN, *sorted(radii, key=lambda one: one.eps)):
        if answers := results.worst(suite, defence, condition):
            found = proportion([answer.verdict.correct for answer in answers])
            points.append((unit * condition.eps, found.value, found.low, found.high))
    return _Line(points, _proven(results, defence, points[-1][0], radii[0].norm)) if points else None


def _proven(results: Results, defence: Defence, limit: float, norm: Norm) -> tuple[Array, Array] | None:
    by_sigma = results.certificates(defence)
    level = results.record.levels.get(defence.name)
    some = list(by_sigma.get(level, {}).values()) if level is not None else []
    if not some or defence.smoothing is None:
        return None

    def radius(one: Certificate) -> float:
        found = one.radius(PROVEN) or 0.0
        return found if norm == "l2" else 255 * found / math.sqrt(math.prod(one.image_shape or (1,)))

    eps = np.linspace(0, limit, 200)
    return eps, 1 - np.searchsorted(np.sort([radius(one) for one in some]), eps, side="left") / len(some)


def _svg(*draws: Callable[[Any], None]) -> Any:
    """What each puts on axes, side by side, as an SVG element."""
    import matplotlib
    from markupsafe import Markup
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context({"svg.hashsalt": "fs-plugins", "svg.fonttype": "none", "text.parse_math": False}):
        figure = Canvas(figsize=(7 if len(draws) == 1 else 5 * len(draws), 4), layout="constrained")
        for draw, axes in zip(draws, figure.subplots(1, len(draws), squeeze=False).flat, strict=True):
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
