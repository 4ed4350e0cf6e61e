"""The demo's picture: what was shown, what was changed, what the purifier makes of it, what was said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from fs_plugins.demo.run import Panel, Result

_COLUMNS = ("clean", "attacked", "the difference, x 8", "one noisy draw", "purified", "")
_RIGHT, _WRONG, _INK = "#1b7f4b", "#b3261e", "#222222"


def draw(result: Result, path: Path) -> None:
    """Write the picture as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = len(result.pictures)
    figure = Figure(figsize=(14.5, 1.95 * rows + 0.9), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        rows, 6, width_ratios=(1, 1, 1, 1, 1, 2.9), left=0.01, right=0.99, top=1 - 0.95 / (1.95 * rows + 0.9), bottom=0.02,
        wspace=0.05, hspace=0.08,
    )  # fmt: skip
    settings = result.settings
    figure.suptitle(
        f"A targeted attack on the vision tower (l-inf {_fraction(settings.eps)}, {settings.steps} steps), and the same "
        f"model with fs_plugins.enable (sigma {result.sigma:g}, n0 {settings.n0})",
        fontsize=12.5, x=0.01, ha="left", color=_INK,
    )  # fmt: skip
    for i, panel in enumerate(result.pictures):
        images = (panel.clean, panel.attacked, 0.5 + 8 * (panel.attacked - panel.clean), panel.noisy, panel.purified)
        for j, image in enumerate(images):
            axes = figure.add_subplot(grid[i, j])
            axes.imshow(_pixels(image), interpolation="nearest")
            axes.set_axis_off()
            if i == 0:
                axes.set_title(_COLUMNS[j], fontsize=10.5, color=_INK)
        axes = figure.add_subplot(grid[i, 5])
        axes.set_axis_off()
        _say(axes, panel)
    figure.savefig(path, metadata={"Software": "fs-plugins demo"})


def _say(axes: Any, panel: Panel) -> None:
    lines = (
        ("clean picture", panel.said_clean),
        ("attacked, no defence", panel.said_attacked),
        ("attacked, with the plugin", panel.said_protected),
    )
    for k, (who, said) in enumerate(lines):
        y = 0.86 - 0.33 * k
        text = axes.text
        text(0.03, y, who, fontsize=8.5, color="#777777", va="center")
        colour = _RIGHT if said == panel.truth else _WRONG
        text(0.03, y - 0.145, f"“{said}”", fontsize=10.5, color=colour, va="center")
    radius = panel.radii["certified"]
    proven = f"cosine ≥ .5 within l2 {radius:.2f}" if radius else "nothing"
    axes.text(0.97, 0.86, f"proven: {proven}", fontsize=8.5, color="#777777", va="center", ha="right")


def _pixels(image: Tensor) -> Any:
    return image.clamp(0, 1).permute(1, 2, 0).numpy()


def _fraction(eps: float) -> str:
    return f"{eps * 255:g}/255"
