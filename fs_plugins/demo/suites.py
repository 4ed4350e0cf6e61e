"""What the demo asks: three tables on the embedded world, and what each part of the defence does."""

from __future__ import annotations

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
        Suite("classes", "Which shape is it?", "classification", DEFENCES, (attacked,), twice=True),
        Suite("captions", "What does the picture show?", "captioning", DEFENCES, (attacked,)),
        Suite("questions", "Questions about the picture", "vqa", DEFENCES, (attacked,)),
        Suite("parts", "What each part does", "classification", ABLATION, (attacked,), plain=False),
    )


def glimpse(attacked: Condition) -> Suite:
    """What is shown first, of a few pictures."""
    return Suite("first", "The first pictures", "captioning", (NONE, FS_PSM), (attacked,))
