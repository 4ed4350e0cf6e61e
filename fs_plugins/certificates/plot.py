"""Certified cosine against eps, as a paper would print it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fs_plugins.certificates.certificate import Certificate

_LINES = {
    "certified": ("certified", "C0", "-"),
    "distribution": ("distribution bound", "C2", "--"),
    "mean": ("mean bound (betting)", "C1", "-."),
    "plugin": ("paper's estimate (no confidence)", "0.5", ":"),
}


def draw(certificates: Sequence[Certificate], path: Path) -> None:
    """Write a PNG or PDF: each bound's average over images on the same draws, an image without a promise counting as 0.

    The certified curves of single images are drawn faintly behind.
    """
    from matplotlib.figure import Figure

    furthest = max((c.radius(0.0) or 0.0 for c in certificates), default=0.0)
    eps = np.linspace(0, 1.05 * furthest if furthest else certificates[0].sigma, 300)
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    curves = [c.curves(eps) for c in certificates]
    for own in curves[:50]:
        axes.plot(eps, own.get("certified", own["plugin"]), color="C0", alpha=0.12, linewidth=0.6)
    for name, (label, colour, style) in _LINES.items():
        have = [np.nan_to_num(own[name]) for own in curves if name in own]
        if have:
            average = np.mean(have, axis=0)
            axes.plot(eps, np.where(average > 0, average, np.nan), style, color=colour, label=label)
    unrelated = [c.unrelated for c in certificates if c.unrelated is not None]
    if unrelated:
        axes.axhline(float(np.mean(unrelated)), color="0.7", linewidth=0.8, zorder=0)
        axes.text(
            eps[-1], float(np.mean(unrelated)), "unrelated images", color="0.5", ha="right", va="bottom", fontsize=7
        )
    axes.set(xlabel="eps (l2, [0, 1] pixels)", ylabel="cosine to the clean feature", ylim=(0, 1), xlim=(0, eps[-1]))
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(f"{len(certificates)} images, {certificates[0]}".split(":")[0], fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200)
