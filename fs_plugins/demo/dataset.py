"""The embedded world's held-out scenes as a dataset on disk, with captions, classes and answers that are exact."""

from __future__ import annotations

import json
import os
from pathlib import Path

from fs_plugins.demo import world
from fs_plugins.errors import SettingError
from fs_plugins.evaluation.datasets import SAMPLES, SETTINGS, Prompts, Sample
from fs_plugins.files import filling, replace, writing

_OFFER = " Output one: "

PROMPTS = Prompts(
    captioning=world.CAPTION_PROMPT,
    classification=(
        "You are a precise visual classifier. What is the main shape in this image? {classes}. Output only a single "
        "integer between 0 and {last} with no explanation."
    ),
    vqa=f"{{question}}{_OFFER}{{options}}.",
    vqa_answers="option",
)
"""The words that the demo's models were taught."""


def write(folder: str | os.PathLike[str], count: int, *, start: int = 0) -> Path:
    """Write ``count`` held-out scenes, each with a scene of the attack's shape to aim at; returns the folder.

    Scene 17 is images/0017.png and targets/0017.png. samples.jsonl comes last, so a folder that has it is whole: after
    an interruption, write again.

    Raises:
        SettingError: the folder holds another dataset, or the numbers are out of range.
    """
    if count < 1 or start < 0:
        raise SettingError(f"At least one scene from number 0 on was expected, got count={count} and start={start}.")
    root = Path(folder)
    settings = {
        "name": "shapes",
        "classes": world.CLASSES,
        "target_class": world.TARGET_SHAPE,
        "none_option": world.NONE,
        "prompts": PROMPTS.model_dump(),
    }
    told = json.dumps(settings, indent=2).encode() + b"\n"
    kept = (root / SETTINGS).read_bytes() if (root / SETTINGS).exists() else None
    if kept not in (None, told) or (kept is None and (root / SAMPLES).exists()):
        raise SettingError(f"{root} holds another dataset; choose a folder that is new or empty.")
    replace(root / SETTINGS, told)
    scenes = world.scenes("heldout", count, start)
    for part, some in (("images", scenes), ("targets", world.scenes("target", count, start))):
        with writing(root / part), filling(root / part) as fresh:
            for scene in some:
                scene.draw().save(fresh / f"{scene.index:04d}.png")
    lines = [_sample(scene).model_dump_json(exclude_none=True) for scene in scenes]
    replace(root / SAMPLES, "".join(f"{line}\n" for line in lines))
    return root


def _sample(scene: world.Scene) -> Sample:
    """A scene without a shape has no label; nobody asks what class it is."""
    question = scene.question()
    asked, _, offered = question.prompt.removesuffix(".").partition(_OFFER)
    return Sample(
        image=f"images/{scene.index:04d}.png",
        target=f"targets/{scene.index:04d}.png",
        caption=scene.caption,
        label=scene.shape,
        question=asked,
        options=tuple(offered.split(", ")),
        answer=question.answer,
    )
