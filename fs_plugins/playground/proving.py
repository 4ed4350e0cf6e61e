"""Proofs that are watched while their draws come in."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fs_plugins import AnswerCertificate, Certificate, PredictionCertificate
from fs_plugins.certificates import Plan
from fs_plugins.certificates.certifiers import Features
from fs_plugins.certificates.plot import figure
from fs_plugins.certificates.run import certify_named
from fs_plugins.playground.live import Tell
from fs_plugins.playground.models import Subject
from fs_plugins.playground.pictures import Picture
from fs_plugins.playground.state import State
from fs_plugins.smoothing import FeatureSmoother


@dataclass(frozen=True)
class SoFar:
    """What the draws so far show; a certificate only when they are all there."""

    certificate: Certificate
    draws: int


@dataclass(frozen=True)
class Progress:
    """Draws of an answer's certificate that were made."""

    draws: int


@dataclass(frozen=True)
class Proven:
    """The certificates of one picture.

    Args:
        answer: None where it was not asked for.
    """

    features: Certificate
    answer: AnswerCertificate | PredictionCertificate | None = None

    def to_json(self) -> str:
        """One certificate a line."""
        several = [self.features] if self.answer is None else [self.features, self.answer]
        return "".join(f"{one.to_json()}\n" for one in several)


def features(smoother: FeatureSmoother, state: State, clean: Picture, tell: Tell[SoFar]) -> Certificate:
    """What ``fs_plugins.certify`` proves of the picture.

    Raises:
        FSPluginsError: see there.
    """
    certifier = Features(smoother, Plan(n=state.draws), watch=lambda found: tell(SoFar(found, found.n)))
    return certify_named(certifier, {"picture": clean.image}, seed=state.seed)[0]


def answer(
    subject: Subject, state: State, sigma: float, clean: Picture, tell: Tell[Progress]
) -> AnswerCertificate | PredictionCertificate:
    """What ``fs_plugins.certify_answers``, or ``certify_predictions`` for a zero-shot model, proves of the picture.

    Raises:
        FSPluginsError: see there.
    """
    return subject.prove(clean.image, state, sigma, _counting(tell))


def _counting(tell: Tell[Progress]) -> Callable[[int], None]:
    made = 0

    def advance(draws: int) -> None:
        nonlocal made
        made += draws
        tell(Progress(made))

    return advance


def curve(certificate: Certificate, limit: float) -> bytes:
    """A PNG of the certified cosine against eps, as ``fs-plugins certify`` draws it."""
    file = io.BytesIO()
    figure([certificate], limit).savefig(file, format="png", dpi=130)
    return file.getvalue()


def sentences(proven: Proven, moved: float | None) -> list[str]:
    """What the numbers promise, each in one sentence.

    Args:
        moved: the l2 distance of the attacked picture, where there is one.
    """
    one = proven.features
    radius = one.radius()
    sure = f"with confidence {100 * (1 - one.alpha):g} %"
    if radius is None:
        told = [f"Of the feature nothing is promised at a cosine of .5, {sure}: too few draws, or too much noise."]
    else:
        told = [
            f"However anyone moves this picture within an l2 distance of {radius:.3f}, the average smoothed feature "
            f"keeps a cosine of at least .5 to the clean picture's, {sure} over the {one.n:,} draws."
        ]
    estimate: Any = one.by("plugin").radius()
    if estimate is not None:
        told.append(f"The paper's estimate, which holds at no confidence, says {estimate:.3f} from the same draws.")
    if proven.answer is not None:
        told.append(_of_answer(proven.answer))
    if moved is not None:
        inside = "inside" if radius is not None and moved <= radius else "outside"
        told.append(
            f"The attack above moved the picture by {moved:.2f}, {inside} what is promised of the feature: a "
            "certificate is about the ball it names, and an answer that withstood more than that is luck or skill, "
            "not proof."
        )
    return told


def distance(one: Any, other: Any) -> float:
    """The l2 distance of two pictures (C, H, W) in [0, 1]."""
    return math.sqrt(float((one.double() - other.double()).square().sum()))


def _of_answer(found: AnswerCertificate | PredictionCertificate) -> str:
    sure = f"with confidence {100 * (1 - found.alpha):g} %"
    if isinstance(found, AnswerCertificate):
        if found.radius is None:
            return f"Of the answer nothing is promised: it {found.meaning}."
        return (
            f"Within {found.radius:.3f}, {found.meaning}, {sure} over {found.n:,} servings of {found.n0} independent "
            "draws each."
        )
    if found.radius is None:
        return f"Of the choice nothing is promised, {sure}: too few of the {found.n:,} draws agree."
    return f"Within {found.radius:.3f} the choice stays {found.label}, {sure} over {found.n:,} draws."
