"""A defence of a suite as the options of ``enable``, and a model under it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypedDict

import torch

import fs_plugins
from fs_plugins.evaluation.plan import Setup
from fs_plugins.evaluation.rivals import TRANSFORMATIONS, transformation
from fs_plugins.evaluation.subjects import Subject
from fs_plugins.evaluation.suites import LIGHT, Defence, Smoothing
from fs_plugins.noise import NoiseScope
from fs_plugins.psm import PSM
from fs_plugins.smoothing import DEFAULT_CHUNK_SIZE, FeatureSmoother
from fs_plugins.vision import PixelSpace, VisionCall

Encoder = VisionCall | FeatureSmoother
"""A vision encoder, bare or as it is smoothed."""


class Options(TypedDict):
    """Of ``enable`` and ``smoothers``."""

    psm: str | PSM | None
    sigma: float | None
    n0: int
    seed: int
    noise_scope: NoiseScope
    chunk_size: int
    processor: PixelSpace


def options(
    subject: Subject,
    setup: Setup,
    smoothing: Smoothing,
    *,
    sigma: float | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> Options:
    """How ``enable`` is told to smooth.

    A picture's draws follow from seed and content: a run that is resumed, shared or asked about other pictures as well
    serves the same.

    Args:
        sigma: in place of the smoothing's own, and the setup's.

    Raises:
        PSMError, RegistryError: the parts of a PSM are wanted, and it cannot be had.
    """
    sigma = next((one for one in (sigma, smoothing.sigma, setup.sigma) if one is not None), None)
    pixels = replace(subject.call.pixels, size=None)  # its resolution is the encoder's own
    psm: str | PSM | None = _named(smoothing.psm, setup)
    if smoothing.parts == "mapper" and setup.mapper_only is not None:
        psm = setup.mapper_only
    elif smoothing.parts == "none" and sigma is not None:
        psm = None
    elif smoothing.parts != "both":
        whole = fs_plugins.smoothers(subject.model, psm=psm, sigma=sigma, processor=pixels)[0].psm
        assert whole is not None
        if smoothing.parts == "none":
            psm, sigma = None, whole.config.sigma
        else:
            psm = whole.only(mapper=False) if smoothing.parts == "purifier" else whole.only(purifier=False)
    if setup.purifying is not None and psm not in (None, "none"):
        found = fs_plugins.smoothers(subject.model, psm=psm, sigma=sigma, processor=pixels)[0].psm
        if found is not None:
            found.purifying = getattr(torch, setup.purifying)
            psm = found
    return {
        "psm": psm,
        "sigma": sigma,
        "n0": smoothing.n0 or setup.n0,
        "seed": setup.seed,
        "noise_scope": "image",
        "chunk_size": chunk_size,
        "processor": pixels,
    }


def _named(psm: str | None, setup: Setup) -> str | PSM:
    """What a smoothing's PSM stands for."""
    if psm in TRANSFORMATIONS:
        return transformation(psm)
    return setup.light if psm == LIGHT else psm or setup.psm


@contextmanager
def defended(subject: Subject, chosen: Options | None) -> Iterator[Encoder]:
    """A subject that is smoothed, or left as it is, and its encoder as an adaptive attacker sees it."""
    if chosen is None:
        yield subject.call
        return
    with fs_plugins.enable(subject.model, **chosen) as handle:
        yield handle.smoothers[0]


def asked_for(setup: Setup, defence: Defence) -> bool:
    """Whether somebody named the PSM, or the noise level, that a defence of the model's own encoder has."""
    named = setup.psm != "auto" or setup.sigma is not None
    return named and defence.tower == "none" and defence.smoothing is not None and defence.smoothing.psm is None
