"""An evaluation as a picture: what was shown, what was changed, what the purifier makes of it, what was said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

import fs_plugins
from fs_plugins.evaluation.datasets import Dataset, Sample
from fs_plugins.evaluation.defended import options
from fs_plugins.evaluation.plan import attacked_key
from fs_plugins.evaluation.results import Results
from fs_plugins.evaluation.subjects import Subject, size_of
from fs_plugins.evaluation.suites import CLEAN, FS_PSM, NONE, Condition, Defence, Smoothing
from fs_plugins.evaluation.tasks import TASKS, Choice
from fs_plugins.files import atomically
from fs_plugins.noise import normal

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

_COLUMNS = ("clean", "attacked", "the difference, x 8", "one noisy draw", "purified", "")
_RIGHT, _WRONG, _INK = "#1b7f4b", "#b3261e", "#222222"


@dataclass(frozen=True)
class Panel:
    """One row of it: images (3, H, W) in [0, 1], what the model said of them, and what is proven of the clean one.

    ``right`` says of the three replies whether they count as right.
    """

    truth: str
    clean: Tensor
    attacked: Tensor
    noisy: Tensor
    purified: Tensor
    said_clean: str
    said_attacked: str
    said_protected: str
    right: tuple[bool, bool, bool]
    sigma: float
    certificate: fs_plugins.Certificate | None = None

    @property
    def radii(self) -> dict[str, float | None]:
        """The l2 radius for cosine >= .5 by the paper's formula, by its bound with confidence, and ours; same draws."""
        one = self.certificate
        if one is None:
            return {}
        return {"plugin": one.by("plugin").radius(), "mean": one.by("mean").radius(), "certified": one.radius()}


@torch.no_grad()
def panels(
    results: Results,
    data: Dataset,
    subject: Subject,
    shown: Sequence[Sample],
    attacked: Condition,
    task: str = "captioning",
) -> list[Panel]:
    """What an evaluation of this data has of these samples, and one noisy draw of each attacked picture.

    Args:
        task: what was asked.
    """
    setup, store = results.plan.setup, results.store
    smoother = fs_plugins.smoothers(subject.model, **options(subject, setup, Smoothing()))[0]
    size = size_of(subject.call)
    generator = torch.Generator().manual_seed(setup.seed)

    def said(defence: Defence, condition: Condition, sample: Sample) -> tuple[str, bool]:
        (answer,) = results.answers(defence, condition, task, [sample])
        words = answer.reply
        if task == "classification":
            words = cast(Choice, TASKS[task]).parse(words, sample, results.plan.dataset) or words
        return words, answer.verdict.correct

    drawn = []
    for sample in shown:
        clean = data.image(sample, size)
        moved = store.attacked(attacked_key(NONE, attacked), sample.image)
        assert moved is not None
        noise = normal(generator, moved.shape)
        cells = ((NONE, CLEAN), (NONE, attacked), (FS_PSM, attacked))
        (plain, a), (fooled, b), (kept, c) = (said(*cell, sample) for cell in cells)
        drawn.append(
            Panel(
                (sample.label if task == "classification" else sample.caption) or "",
                clean,
                moved,
                moved + smoother.sigma * noise,
                smoother.views(moved[None], noise[None])[0],
                plain,
                fooled,
                kept,
                (a, b, c),
                smoother.sigma,
            )
        )
    return drawn


def titled(attacked: Condition, *, steps: int, n0: int, sigma: float) -> str:
    """What stands above the picture."""
    return (
        f"A targeted attack on the vision tower (l-inf {attacked.eps255:g}/255, {steps} steps), "
        f"and the same model with fs_plugins.enable (sigma {sigma:g}, n0 {n0})"
    )


def draw(drawn: Sequence[Panel], title: str, path: Path) -> None:
    """Write the picture as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = len(drawn)
    figure = Figure(figsize=(14.5, 1.95 * rows + 0.9), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        rows, 6, width_ratios=(1, 1, 1, 1, 1, 2.9), left=0.01, right=0.99, top=1 - 0.95 / (1.95 * rows + 0.9),
        bottom=0.02, wspace=0.05, hspace=0.08,
    )  # fmt: skip
    figure.suptitle(title, fontsize=12.5, x=0.01, ha="left", color=_INK)
    for i, panel in enumerate(drawn):
        images = (panel.clean, panel.attacked, difference(panel.clean, panel.attacked), panel.noisy, panel.purified)
        for j, image in enumerate(images):
            axes = figure.add_subplot(grid[i, j])
            axes.imshow(_pixels(image), interpolation="nearest")
            axes.set_axis_off()
            if i == 0:
                axes.set_title(_COLUMNS[j], fontsize=10.5, color=_INK)
        axes = figure.add_subplot(grid[i, 5])
        axes.set_axis_off()
        _say(axes, panel)
    atomically(path, lambda file: figure.savefig(file, format="png", metadata={"Software": "fs-plugins"}))


def difference(clean: Tensor, attacked: Tensor) -> Tensor:
    """What an attack changed, eight times as much, around mid grey; pictures (..., H, W) in [0, 1]."""
    return 0.5 + 8 * (attacked - clean)


def _say(axes: Axes, panel: Panel) -> None:
    lines = (
        ("clean picture", panel.said_clean),
        ("attacked, no defence", panel.said_attacked),
        ("attacked, with the plugin", panel.said_protected),
    )
    for k, ((who, said), right) in enumerate(zip(lines, panel.right, strict=True)):
        y = 0.86 - 0.33 * k
        text = axes.text
        text(0.03, y, who, fontsize=8.5, color="#777777", va="center")
        colour = _RIGHT if right else _WRONG
        text(0.03, y - 0.145, f"“{_short(said)}”", fontsize=10.5, color=colour, va="center", parse_math=False)
    if panel.certificate is not None:
        radius = panel.radii["certified"]
        proven = f"cosine ≥ .5 within l2 {radius:.2f}" if radius else "nothing"
        axes.text(0.97, 0.86, f"proven: {proven}", fontsize=8.5, color="#777777", va="center", ha="right")


def _short(words: str, most: int = 64) -> str:
    return words if len(words) <= most else f"{words[: most - 1]}…"


def _pixels(image: Tensor) -> np.ndarray:
    return image.clamp(0, 1).permute(1, 2, 0).numpy()
