"""Certified cosine against eps, as a paper would print it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fs_plugins.certificates.answer import AnswerCertificate
from fs_plugins.certificates.certificate import Certificate
from fs_plugins.certificates.methods import CERTIFIED, METHODS
from fs_plugins.files import atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LineStyle = str | tuple[int, tuple[int, ...]]

_STYLES = ("-.", "--", (0, (3, 1, 1, 1, 1, 1)))


def draw(certificates: Sequence[Certificate], path: Path) -> None:
    """Write a PNG or PDF of ``figure``."""
    drawn = figure(certificates)
    atomically(path, lambda file: drawn.savefig(file, dpi=200, format=path.suffix[1:] or None))


def figure(certificates: Sequence[Certificate], limit: float | None = None) -> Figure:
    """Each bound's average over images on the same draws, an image without a promise counting as 0.

    The certified curves of single images are drawn faintly behind.

    Args:
        limit: the l2 distance up to which it is drawn; left out, as far as anything is promised.
    """
    from matplotlib.figure import Figure

    furthest = max((c.radius(0.0) or 0.0 for c in certificates), default=0.0)
    eps = np.linspace(0, limit or (1.05 * furthest if furthest else certificates[0].sigma), 300)
    drawn = Figure(figsize=(5, 3.4), layout="constrained")
    axes = drawn.subplots()
    curves = [c.curves(eps) for c in certificates]
    for own in curves[:50]:
        axes.plot(eps, own.get(CERTIFIED, next(iter(own.values()))), color="C0", alpha=0.12, linewidth=0.6)
    for name, label, colour, style in _lines():
        have = [np.nan_to_num(own[name]) for own in curves if name in own]
        if have:
            average = np.mean(have, axis=0)
            axes.plot(eps, np.where(average > 0, average, np.nan), linestyle=style, color=colour, label=label)
    unrelated = [c.unrelated for c in certificates if c.unrelated is not None]
    if unrelated:
        axes.axhline(float(np.mean(unrelated)), color="0.7", linewidth=0.8, zorder=0)
        axes.text(
            eps[-1], float(np.mean(unrelated)), "unrelated images", color="0.5", ha="right", va="bottom", fontsize=7
        )
    axes.set(xlabel="eps (l2, [0, 1] pixels)", ylabel="cosine to the clean feature", ylim=(0, 1), xlim=(0, eps[-1]))
    axes.legend(frameon=False, fontsize=8)
    count = "1 image" if len(certificates) == 1 else f"{len(certificates)} images"
    axes.set_title(f"{count}, {certificates[0]}".split(":")[0], fontsize=8)
    return drawn


def draw_answers(certificates: Sequence[AnswerCertificate], path: Path) -> None:
    """Write a PNG or PDF: the share of images whose answer is certified, against the radius."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(5, 3.4), layout="constrained")
    axes = drawn.subplots()
    furthest = max((one.radius or 0.0 for one in certificates), default=0.0) or certificates[0].sigma
    for question in dict.fromkeys(one.question for one in certificates):
        own = [one.radius for one in certificates if one.question == question]
        radii = np.sort([radius for radius in own if radius is not None])
        steps = np.concatenate([[0.0], radii])
        left = 1 - np.arange(len(steps)) / len(own) - (len(own) - len(radii)) / len(own)
        label = textwrap.shorten(question, 60)
        axes.step([*steps, 1.05 * furthest], [*left, 0.0], where="post", label=f"{label} (n = {len(own)})")
    axes.set(xlabel="radius (l2, [0, 1] pixels)", ylabel="answers certified", ylim=(0, 1.02), xlim=(0, 1.05 * furthest))
    axes.legend(frameon=False, fontsize=7)
    atomically(path, lambda file: drawn.savefig(file, dpi=200, format=path.suffix[1:] or None))


def _lines() -> list[tuple[str, str, str, LineStyle]]:
    """The curves that a certificate may have, what promises most first: name, legend, colour and line style."""
    proved = [one for one in METHODS.values() if not one.is_estimate]
    lines: list[tuple[str, str, str, LineStyle]] = [(CERTIFIED, CERTIFIED, "C0", "-")]
    for one in reversed(METHODS.values()):
        if one.is_estimate:
            lines.append((one.name, f"{one.title} (no confidence)", "0.5", ":"))
        else:
            place = proved.index(one)
            lines.append((one.name, one.title, f"C{place + 1}", _STYLES[place % len(_STYLES)]))
    return lines
