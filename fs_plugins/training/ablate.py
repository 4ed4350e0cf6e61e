"""What each term of the losses does: short trainings without it, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fs_plugins.answers import Answers
from fs_plugins.attacks import Answer, attack
from fs_plugins.noise import keyed, normal, uniform
from fs_plugins.psm import PSM
from fs_plugins.psm.protocols import Denoises
from fs_plugins.smoothing import FeatureSmoother
from fs_plugins.training.config import TrainingConfig
from fs_plugins.training.psm import robustness_score, train_psm
from fs_plugins.training.stages import AdversarialTerms, MapperTerms, PurifierTerms
from fs_plugins.vision import VisionCall

TERMS = {
    "purifier": {"l_diff": "lambda_diff", "l_rb": "lambda1", "l_mse": "lambda2"},
    "mapper": {"l_stats": "lambda3", "l_id": "lambda4"},
    "adversarial": {"l_adv": "lambda_adv", "l_say": "lambda_say", "l_mse": "lambda_pixels"},
}
"""Stage -> term -> its weight. The mapper's l_rb has none: without it there is nothing to learn."""


@dataclass(frozen=True)
class Trial:
    """One short training.

    Args:
        stage: whose loss was changed.
        without: the term whose weight was 0; None for all terms.
        score: robustness score on held-out pictures, of the purifier alone or with its mapper.
        terms: the loss terms on the same pictures, unweighted.
        idle: whether the term does nothing: it was 0 in every step, or the weights came out bit for bit as with it.
    """

    stage: str
    without: str | None
    score: float
    terms: dict[str, float]
    idle: bool = False


def ablate(
    call: VisionCall,
    images: Any,
    held: Tensor,
    config: TrainingConfig,
    *,
    report: Callable[[str, int, int, dict[str, float]], None] | None = None,
    **options: Any,
) -> Iterator[Trial]:
    """Train each stage with all its terms, then without each of them.

    Args:
        call, images, config: as for ``train_psm``; the stages' steps are those of every short training.
        held: (B, C, H, W) held-out pictures in [0, 1].
        report: called after each step with what is being trained, step, steps, losses.
        options: further arguments of ``train_psm``.
    """
    start = options.pop("start", None)
    for stage in config.stages:
        if stage == "purifier":
            base = replace(config, mapper=None)
        else:
            base = replace(config, purifier_stage=replace(config.purifier_stage, steps=0))
            if stage == "adversarial":
                base = replace(base, mapper_stage=replace(config.mapper_stage, steps=0))
        base = base if stage == "adversarial" else replace(base, adversarial=None)
        whole: PSM | None = None
        for without in (None, *TERMS[stage]):
            if without == "l_diff" and not isinstance(whole and whole.purifier, Denoises):
                continue
            if without == "l_say" and not options.get("answers"):
                continue
            trial = base if without is None else replace(base, **{TERMS[stage][without]: 0.0})  # type: ignore[arg-type]
            label = stage if without is None else f"{stage} without {without}"
            peak: dict[str, float] = {}

            def told(name: str, step: int, steps: int, values: dict[str, float]) -> None:
                for term, value in values.items():
                    peak[term] = max(peak.get(term, 0.0), abs(value))  # noqa: B023
                if report:
                    report(label, step, steps, values)  # noqa: B023

            psm = train_psm(call, images, trial, name="trial", encoder="trial", start=start, report=told, **options)
            if without is None:
                whole = psm
            idle = without is not None and (peak[without] == 0 or _equal(psm, whole))
            yield Trial(
                stage,
                without,
                robustness_score(call, psm, held, config.sigma),
                _terms(psm, call, held, trial, stage, options.get("answers", ())),
                idle,
            )
        start = whole


def _equal(one: PSM, other: PSM | None) -> bool:
    assert other is not None
    mine, theirs = one.state_dict(), other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in mine.items())


@torch.no_grad()
def _terms(
    psm: PSM, call: VisionCall, held: Tensor, config: TrainingConfig, stage: str, answers: Sequence[Answers]
) -> dict[str, float]:
    """The loss terms on held-out pictures, two draws each; of the adversarial stage one draw, of attacked pictures."""
    generator = keyed(config.seed, "trial")
    if stage == "adversarial":
        return _attacked(psm, call, held, config, answers)
    noise = normal(generator, (len(held), 2, *held.shape[1:]))
    level = uniform(generator, (len(held),))
    terms = (PurifierTerms if stage == "purifier" else MapperTerms)(psm, call, 1)
    found = terms(held, noise.to(held.device), config.sigma, level.to(held.device))
    return {name: value.item() for name, value in found.items()}


def _attacked(
    psm: PSM, call: VisionCall, held: Tensor, config: TrainingConfig, answers: Sequence[Answers]
) -> dict[str, float]:
    assert config.adversarial is not None
    ball, asked = config.adversarial, answers[0] if answers else None
    smoother = FeatureSmoother(call, psm=psm, sigma=config.sigma, n0=1)
    method: str | Answer = "attackvlm" if asked is None else Answer(asked)
    with torch.enable_grad():
        shown = attack(
            smoother,
            held,
            method=method,
            norm=ball.norm,
            eps=ball.eps,
            steps=config.adversarial_stage.draws,
            seed=config.seed,
        )
    terms = AdversarialTerms(psm, call, 1)
    noise = normal(keyed(config.seed, "trial"), held.shape).to(held.device)
    found = terms(shown, held, noise, config.sigma, terms.reference(held, asked), held.new_zeros(len(held)))
    return {name: value.item() for name, value in found.items()}
