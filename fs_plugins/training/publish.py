"""What a finished PSM is worth on held-out pictures, and its model card."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fs_plugins.certificates.plan import Plan
from fs_plugins.certificates.run import certify_features
from fs_plugins.choice import choose
from fs_plugins.psm import PSM, PSMConfig
from fs_plugins.psm.card import RADIUS, ROBUSTNESS, about, figure, head, headed
from fs_plugins.training.config import TrainingConfig
from fs_plugins.training.psm import robustness_score
from fs_plugins.vision import VisionCall

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

THRESHOLD = 0.5
"""The cosine that certified radii speak of, as in the paper."""


@dataclass(frozen=True)
class Scores:
    """Of held-out pictures.

    Args:
        robustness: sigma -> parts of the PSM -> robustness score.
        radii: parts -> average certified l2 radius at ``config.sigma``; an image without one counts as 0.
        images, certified: how many pictures each was measured on.
        n, alpha: draws per certificate, and the probability with which each may be wrong.
    """

    robustness: Mapping[float, Mapping[str, float]]
    radii: Mapping[str, float]
    images: int
    certified: int
    n: int
    alpha: float


def parts(psm: PSM) -> dict[str, PSM | None]:
    """The PSM taken apart, as in the paper's ablation."""
    found: dict[str, PSM | None] = {"plain noise": None}
    if psm.purifier is not None:
        found["purifier"] = psm.only(mapper=False)
    if psm.mapped:
        found["mapper"] = psm.only(purifier=False)
    return found | ({"both": psm} if len(found) == 3 else {})


def measure(
    call: VisionCall,
    psm: PSM,
    images: Tensor,
    *,
    certified: int,
    n: int,
    alpha: float,
    seed: int,
    advance: Callable[[int], None] | None = None,
) -> Scores:
    """Scores of (B, C, H, W) held-out pictures in [0, 1], the first ``certified`` of which get certificates."""
    levels = sorted({psm.config.sigma, *psm.config.sigma_range})
    robustness = {
        sigma: {name: robustness_score(call, part, images, sigma, seed=seed) for name, part in parts(psm).items()}
        for sigma in levels
    }
    radii = {}
    named = {str(i): image for i, image in enumerate(images[:certified])}
    for name, part in (("plain noise", None), ("this PSM", psm)) if certified else ():
        smoother = choose(call, psm=part, sigma=psm.config.sigma)[1][0]
        found = certify_features(smoother, named, Plan(n=n, alpha=alpha), seed=seed, advance=advance)
        radii[name] = sum(one.radius(THRESHOLD) or 0.0 for one in found) / len(found)
    return Scores(robustness, radii, len(images), min(certified, len(images)), n, alpha)


def card(
    psm: PSM,
    config: TrainingConfig,
    scores: Scores,
    *,
    command: str,
    model: str,
    data: Sequence[str],
    place: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
) -> str:
    """The model card, Markdown with a YAML head that says the same figures.

    Args:
        command: what to run to get the same PSM again.
        model: whose encoder it is for, as the command named it.
        data: what was trained on and what was held out, in sentences.
        place: where it will be, as ``enable`` is told; left out, in a folder of its name.
        base_model, license: as for ``fs_plugins.psm.card.head``.
    """
    made = psm.config
    kinds = list(next(iter(scores.robustness.values())))
    table = [[f"{sigma:g}", *(f"{row[kind]:.4f}" for kind in kinds)] for sigma, row in scores.robustness.items()]
    lines = [
        *about(made, model, place or made.name),
        "",
        "## Scores",
        "",
        f"Mean cosine between the feature of a single noisy draw and of the clean picture, {scores.images} held-out "
        "pictures, 8 draws each (`fs_plugins.training.robustness_score`):",
        "",
        *_table(["sigma", *kinds], table),
    ]
    if scores.radii:
        lines += [
            "",
            f"Average certified l2 radius (cosine at least {THRESHOLD:g}, [0, 1] pixels, sigma {made.sigma:g}) of "
            f"{scores.certified} held-out pictures, {scores.n} draws each; every certificate is wrong with probability "
            f"at most {scores.alpha:g}, a picture without one counts as 0:",
            "",
            *_table(list(scores.radii), [[f"{value:.4f}" for value in scores.radii.values()]]),
        ]
    text = "\n".join([
        *lines,
        "",
        "## Training",
        "",
        *data,
        f"{_course(config)}; the encoder frozen throughout. Settings:",
        "",
        *(f"    {name}: {json.dumps(value)}" for name, value in config.as_json().items()),
        "",
        f"{_count(psm.purifier)} in the purifier, {_count(psm.mappers)} in the mappers. To make it again, with the "
        "same pictures:",
        "",
        f"    {command}",
        "",
        "## Limits",
        "",
        "- It fits this encoder (and fine-tuned ones like it), readout, resolution and sigma, and no other.",
        "- The pictures held out are from the same folder as those trained on. No attack was run on it.",
        "- Certificates speak of the infinite average of draws, not of the few that are served.",
        "",
        f"Licence: {license}." if license else "Licence: not chosen yet. Say it here, and as `license:` in the head.",
        "",
    ])  # fmt: skip
    return headed(text, head(made.name, base_model=base_model, license=license, results=_figures(made, scores)))


def _course(config: TrainingConfig) -> str:
    """What was trained when."""
    if config.adversarial is None:
        return "Two stages: the purifier, then the mapper with the purifier frozen"
    return "Three stages: the purifier, the mapper with the purifier frozen, both against an attacker who knows of them"


def _figures(made: PSMConfig, scores: Scores) -> list[EvalResult]:
    """The scores as the card's text has them, digit by digit."""
    found = [
        figure(
            ROBUSTNESS,
            round(value, 4),
            f"Mean cosine of single noisy draws to the clean picture, {kind}, sigma {sigma:g}",
            data=f"{scores.images} held-out pictures",
            sigma=sigma,
            parts=kind,
        )
        for sigma, row in scores.robustness.items()
        for kind, value in row.items()
    ]
    return found + [
        figure(
            RADIUS,
            round(value, 4),
            f"Average certified l2 radius, {kind}, sigma {made.sigma:g}",
            data=f"{scores.images} held-out pictures",
            sigma=made.sigma,
            parts=kind,
            pictures=scores.certified,
            n=scores.n,
            alpha=scores.alpha,
        )
        for kind, value in scores.radii.items()
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _count(module: nn.Module | None) -> str:
    total = sum(p.numel() for p in module.parameters()) if module is not None else 0
    return f"{total:,} parameters"
