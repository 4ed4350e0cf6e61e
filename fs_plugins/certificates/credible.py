"""Whether a certificate that is read back can be one that the settings of its file gave."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any

import numpy as np

from fs_plugins.certificates.answer import AnswerCertificate
from fs_plugins.certificates.bounds import Band, argmax_radius, ranks, vote_radius
from fs_plugins.certificates.certificate import Certificate
from fs_plugins.certificates.chances import lower
from fs_plugins.certificates.methods import Statistic, method_of
from fs_plugins.certificates.plan import Plan
from fs_plugins.certificates.prediction import PredictionCertificate
from fs_plugins.certificates.values import FRESH, Stored

_ROUNDING = 1e-6


def doubts(certificate: Stored, settings: Mapping[str, Any]) -> list[str]:
    """What of a certificate its file's settings contradict, or n draws cannot give, in words; usually nothing.

    Args:
        settings: as ``ledger_of`` writes them; what they do not say is not compared.

    Raises:
        SettingError, TypeError: the settings are none.
    """
    found = [f"{name} is {is_} for {wanted}" for name, is_, wanted in _compared(certificate, settings) if is_ != wanted]
    return found or list(_impossible(certificate, votes_alone="bias" in settings))


def _compared(certificate: Stored, settings: Mapping[str, Any]) -> Iterator[tuple[str, object, object]]:
    """What certificate and settings both say."""
    told: dict[str, Any] = {**vars(certificate), "psm": getattr(certificate, "psm", None)}
    for name in ("sigma", "alpha", "method"):
        if name in settings and name in told:
            yield name, told[name], settings[name]
    if "psm" in settings:
        psm = settings["psm"]
        yield "psm", told["psm"], psm and psm[0]
    if "readouts" in settings:
        yield "readouts", list(certificate.readouts), list(settings["readouts"])
    if "seed" in settings:
        yield "seed", told["seed"], FRESH if settings["seed"] is None else f"seed {settings['seed']}"
    if isinstance(certificate, AnswerCertificate) and "questions" in settings:
        asked = {question: prompt for question, prompt, _ in settings["questions"]}
        yield "prompt", certificate.prompt, asked.get(certificate.question)
        if certificate.n > max(settings["n"], settings["pilot"]):
            yield "n", certificate.n, f"at most {settings['n']}"
        if settings["n0"] is not None:
            yield "n0", certificate.n0, settings["n0"]
    if isinstance(certificate, PredictionCertificate) and "labels" in settings:
        labels = settings["labels"] or []
        yield "label", certificate.label, labels[certificate.predicted] if certificate.predicted < len(labels) else None
    names = {one.name for one in fields(Plan)}
    if names <= settings.keys():
        plan = Plan(**{name: settings[name] for name in names})
        yield "n", certificate.n, certificate.n if certificate.n in plan.looks else " or ".join(map(str, plan.looks))
        yield "share", certificate.share, plan.share
        if isinstance(certificate, Certificate):
            yield "the refinement", certificate.angular is not None, plan.pilot > 0


def _impossible(certificate: Stored, *, votes_alone: bool) -> Iterator[str]:
    """Statistics that no n scores give at this alpha, of which votes have all where a head's bias leaves them alone."""
    n, spent = certificate.n, certificate.alpha * certificate.share
    if isinstance(certificate, PredictionCertificate):
        votes = vote_radius(certificate.votes, n, sigma=certificate.sigma, alpha=spent / (1 if votes_alone else 2))
        if not _near(certificate.vote_radius, votes):
            yield f"vote_radius is {certificate.vote_radius} for {certificate.votes} votes of {n}, which give {votes}"
        most = None if votes_alone else argmax_radius(np.ones((n, 1)), sigma=certificate.sigma, alpha=spent / 2)
        if (certificate.feature_radius or 0.0) > (most or 0.0) + _ROUNDING:
            yield f"feature_radius is {certificate.feature_radius}, and {n} draws give {most} at most"
    elif isinstance(certificate, AnswerCertificate):
        found = lower(certificate.count, n, alpha=certificate.alpha, method=certificate.method)
        if not math.isclose(certificate.probability, max(0.0, found - certificate.error), abs_tol=_ROUNDING):
            yield f"probability is {certificate.probability}, and {certificate.count} of {n} servings give {found}"
    elif isinstance(certificate, Certificate):
        if certificate.angular is not None and certificate.angular.n != n:
            yield f"the refinement is of {certificate.angular.n} draws for {n}"
        best = _best(certificate.method, n, spent / (1 if certificate.angular is None else 2))
        if certificate.lower is not None:
            most = min(certificate.mean, float(best.get("lower", 1.0)))  # type: ignore[arg-type]
            if certificate.lower > most + _ROUNDING:
                yield f"lower is {certificate.lower}, and {n} draws of this mean give {most} at most"
        if certificate.band is not None and not _fits(certificate.band, best["band"], certificate.mean, n):
            yield f"its band is none that {n} draws of this mean give"


@lru_cache(maxsize=64)
def _best(method: str, n: int, alpha: float) -> dict[str, Statistic]:
    """What scores of 1 give, which none exceeds."""
    return method_of(method).statistics(np.ones(n), alpha)


def _fits(band: Band, best: Statistic, mean: float, n: int) -> bool:
    """A band's survival bounds follow from n and alpha alone; its points are scores, of which the mean is told."""
    assert isinstance(best, Band)
    alike = len(band.survival) == len(best.survival) and np.allclose(band.survival, best.survival, rtol=1e-6, atol=0)
    if not alike:
        return False
    chosen = ranks(n)
    below = np.concatenate([[-1.0], band.support])
    counts = np.diff([0, *(chosen - 1), n])
    return bool(below @ counts / n <= mean + _ROUNDING)


def _near(one: float | None, other: float | None) -> bool:
    return one is other or (one is not None and other is not None and math.isclose(one, other, rel_tol=1e-6))
