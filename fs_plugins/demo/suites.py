"""What the demo asks: three tables on the embedded world, and what each part of the defence does."""

from __future__ import annotations

from dataclasses import replace

from fs_plugins.evaluation.suites import ABLATION, DEFENCES, FS_PSM, NONE, Condition, Suite, radius


def attack(eps: str) -> Condition:
    """AttackVLM within an l-inf radius, as people write it.

    Raises:
        SettingError: ``eps`` is no radius in [0, 1] pixels.
    """
    return Condition("attackvlm", round(255 * radius(eps), 6))


def suites(attacked: Condition) -> tuple[Suite, ...]:
    """All that is measured."""
    return (
        replace(_asked("classes", "Which shape is it?", "classification", attacked), twice=True),
        _asked("captions", "What does the picture show?", "captioning", attacked),
        _asked("questions", "Questions about the picture", "vqa", attacked),
        Suite("parts", "What each part does", "classification", ABLATION, (attacked,), plain=False, compared=False),
    )


def _asked(name: str, title: str, task: str, attacked: Condition) -> Suite:
    return Suite(name, title, task, DEFENCES, (attacked,), compared=False)


def glimpse(attacked: Condition) -> Suite:
    """What is shown first, of a few pictures."""
    return Suite("first", "The first pictures", "captioning", (NONE, FS_PSM), (attacked,), compared=False)
