"""What is measured on photographs: two attacks, adaptive ones, noise levels, certificates; and what a model says."""

from __future__ import annotations

from dataclasses import replace

from fs_plugins.evaluation.suites import ANSWER, FS, FS_PSM, NONE, Condition, Defence, Smoothing, Suite, radius
from fs_plugins.photos.settings import Settings

SIGMAS = (0.0625, 0.125, 0.25, 0.5)
CLOSER = (FS, FS_PSM)
"""Those that are attacked adaptively and certified."""
OTHER = "other-attack"
"""The suite of the attacks but the first one, which a part of the photographs is enough for."""


def general(purifier: str) -> Defence:
    """FS-PSM with a purifier that knows no encoder."""
    return Defence("fs_photo", "FS-PSM, general", smoothing=Smoothing(psm=purifier))


def defences(settings: Settings, own: bool) -> tuple[Defence, ...]:
    """None, plain smoothing, the general purifier, and the encoder's own PSM.

    Args:
        own: whether there is one; otherwise the general purifier stands in for it, and stands once.
    """
    return (NONE, FS, *((general(settings.general),) if own else ()), FS_PSM)


def attacks(eps: str) -> tuple[Condition, ...]:
    """AttackVLM and M-Attack within an l-inf radius, as people write it.

    Raises:
        SettingError: ``eps`` is no radius in [0, 1] pixels.
    """
    size = round(255 * radius(eps), 6)
    return (Condition("attackvlm", size), Condition("m-attack", size))


def on_the_answer(condition: Condition) -> Condition:
    """The same, on the class that is answered rather than on the feature."""
    return replace(condition, method=ANSWER)


def at(sigma: float, usual: float) -> Defence:
    """FS-PSM at a noise level; at its usual one it is the same as everywhere."""
    if sigma == usual:
        return FS_PSM
    return Defence(f"fs_psm_sigma{sigma:g}", f"FS-PSM, sigma {sigma:g}", smoothing=Smoothing(sigma=sigma))


def suites(settings: Settings, own: bool) -> tuple[Suite, ...]:
    """All that the encoder is asked.

    Args:
        own: see ``defences``.
    """
    oblivious = attacks(settings.eps)
    adaptive = replace(oblivious[0], adaptive=True)
    everybody, classification = defences(settings, own), "classification"
    levels = tuple(at(sigma, settings.sigma) for sigma in SIGMAS)
    return (
        Suite(
            "classes", "What is in the photograph? Of a thousand classes", classification, everybody, oblivious[:1],
            compared=False, twice=True,
        ),
        Suite(
            OTHER, "The same, by another attack", classification, everybody, oblivious[1:], plain=False, aside=True,
            compared=False,
        ),
        Suite(
            "adaptive", "The attack on the defence itself, through noise, purifier, mapper and average", classification,
            CLOSER, (oblivious[0], adaptive, on_the_answer(adaptive)), compared=False,
        ),
        Suite(
            "sigmas", "Noise levels", classification, levels, oblivious[:1], certified=True, aside=True, compared=False,
        ),
        Suite(
            "sigmas-adaptive", "Noise levels, attacked adaptively", classification, levels, (adaptive,), plain=False,
            aside=True, compared=False,
        ),
        Suite("certificates", "Certified cosine of features", None, CLOSER, certified=True),
    )  # fmt: skip


def spoken(settings: Settings) -> tuple[Suite, ...]:
    """What the small language model is asked, without and with FS-PSM."""
    oblivious, some = attacks(settings.eps), (NONE, FS_PSM)
    asked = (
        ("captions", "What the model says of the photographs", "captioning"),
        ("choices", "Which of ten classes?", "classification"),
        ("questions", "Questions about the photographs", "vqa"),
    )
    return tuple(Suite(name, title, task, some, oblivious[:1], compared=False) for name, title, task in asked)
