"""The paper's Table 2 for one's own pictures: certified cosines on average, without and with a PSM, by every method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fs_plugins.certificates.certificate import Certificate
from fs_plugins.certificates.certifiers import Features
from fs_plugins.certificates.methods import CERTIFIED, method_of
from fs_plugins.certificates.plan import Plan
from fs_plugins.choice import PSMChoice, Smoothable, choose
from fs_plugins.files import replace, table

SIGMAS = (0.25, 0.5)
DISTANCES = (0.125, 0.25, 0.375, 0.5, 0.75)
"""The noise levels and l2 distances of the paper's Table 2."""


@dataclass(frozen=True)
class Average:
    """What one method certifies of pictures on average; one without a promise counts as 0.

    Args:
        sigma, psm: of the certificates.
        method: a method's name, or ``"certified"`` for all that the certificates hold.
        title: what a table calls it.
        cosines: at each of the table's distances.
        radius: the l2 distance within which the cosine stays at the threshold.
    """

    sigma: float
    psm: str | None
    method: str
    title: str
    cosines: tuple[float, ...]
    radius: float


def certifiers(
    model: Smoothable,
    pictures: Mapping[str, Tensor],
    plan: Plan,
    *,
    psm: PSMChoice = "auto",
    sigmas: Sequence[float] = SIGMAS,
    encoder: int = 0,
) -> dict[str, Features]:
    """The table's runs, for a ``FolderRun``: plain smoothing and the PSM at each sigma, by their files' names.

    Raises:
        FSPluginsError: the model or the PSM cannot be had at a sigma; see ``fs_plugins.enable``.
    """
    parts: tuple[PSMChoice, ...] = (None,) if psm in (None, "none") else (None, psm)
    background = list(pictures.values())
    return {
        f"certificates-sigma{sigma:g}-{'plain' if part is None else 'psm'}.jsonl": Features(
            choose(model, psm=part, sigma=sigma, encoder=encoder, certain=True)[1][0], plan, background
        )
        for sigma in sigmas
        for part in parts
    }


def averages(
    certificates: Sequence[Certificate], *, threshold: float = 0.5, distances: Sequence[float] = DISTANCES
) -> list[Average]:
    """Every bound of certificates of one kind, on the same draws, averaged over them.

    Args:
        certificates: at least one, all of one method, sigma and PSM.
        threshold: the cosine that radii speak of.
        distances: l2 distances in the certificates' space.
    """
    first = certificates[0]
    bounds = {one.name: (one.title, [c.by(one.name) for c in certificates]) for one in method_of(first.method).alone()}
    if not first.is_estimate:
        bounds[CERTIFIED] = (CERTIFIED, list(certificates))
    return [
        Average(
            sigma=first.sigma,
            psm=first.psm,
            method=name,
            title=title,
            cosines=tuple(_mean(one.fcsb(eps) for one in alone) for eps in distances),
            radius=_mean(one.radius(threshold) for one in alone),
        )
        for name, (title, alone) in bounds.items()
    ]


def write(path: Path, rows: Iterable[Average], *, distances: Sequence[float] = DISTANCES) -> None:
    """The averages as CSV.

    Raises:
        OutputError: it cannot be written.
    """
    head = ["sigma", "PSM", "method", *(f"{eps:g}" for eps in distances), "R"]
    lines = [[f"{row.sigma:g}", row.psm or "none", row.method, *row.cosines, row.radius] for row in rows]
    replace(path, table([head, *lines]))


def _mean(values: Iterable[float | None]) -> float:
    known = [value or 0.0 for value in values]
    return sum(known) / len(known)
