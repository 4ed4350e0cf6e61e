"""What ``photo-vlm`` says of the held-out photographs, and how often that is right.

    python -m tools.photos.vlm_scores [MODEL] [--count 200] [--out ANSWERS.csv]

Each is asked about as ``fs-plugins photos`` does: which of ten classes it shows, a question of four options, and for a
caption, which names the class or does not; and what it shows, in words. The photographs whose class is on none that was
trained on are counted once more on their own. The language model runs in bfloat16.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fs_plugins.evaluation.datasets import open_dataset
from fs_plugins.evaluation.metrics import proportion
from fs_plugins.evaluation.tasks import VQA, Classification
from fs_plugins.files import replace, table, text
from fs_plugins.hf import load_chat
from fs_plugins.hf.chat import ask
from fs_plugins.photos import vlm
from fs_plugins.photos.dataset import write
from fs_plugins.photos.photographs import Photograph, class_names, held_out
from fs_plugins.photos.prompts import PROMPTS, QUESTION, answer, caption
from fs_plugins.pictures import rgb

TOGETHER = 8
"""Photographs in one batch."""


def replies(
    name: str, photographs: tuple[Photograph, ...], names: tuple[str, ...]
) -> dict[str, tuple[list[str], list[bool]]]:
    """Task -> what the model said of each photograph, and whether that is right."""
    with TemporaryDirectory() as folder:
        data = open_dataset(write(folder, held_out(), names, len(photographs)))
    model, processor = load_chat(name)

    def said(prompts: list[str], length: int = 16) -> list[str]:
        found: list[str] = []
        for start in range(0, len(prompts), TOGETHER):
            images = [rgb(one.path) for one in photographs[start : start + TOGETHER]]
            with torch.autocast(model.device.type, torch.bfloat16):
                found += ask(model, processor, images, prompts[start : start + TOGETHER], max_new_tokens=length)
        return found

    answers: dict[str, tuple[list[str], list[bool]]] = {}
    for task in (Classification(), VQA()):
        given = said([task.prompt(sample, data) for sample in data.samples])
        verdicts = [task.verdict(reply, sample, data) for reply, sample in zip(given, data.samples, strict=True)]
        answers[task.name] = given, [verdict.correct for verdict in verdicts]
    for what, prompt, right in (("captioning", PROMPTS.captioning, caption), ("in words", QUESTION, answer)):
        given = said([prompt] * len(photographs))
        hits = [reply == right(names[one.label]) for reply, one in zip(given, photographs, strict=True)]
        answers[what] = given, hits
    return answers


def labels_trained_on() -> frozenset[int]:
    """The classes, by their numbers, of the photographs that ``photo-vlm`` was trained on."""
    return frozenset(int(row["label"]) for row in csv.DictReader(text(vlm.SHIPPED / "photographs.csv").splitlines()))


def told(hits: list[bool]) -> str:
    found = proportion(hits)
    return f"{sum(hits)} of {len(hits)}: {found.value:.1%} [{found.low:.1%}, {found.high:.1%}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="photo-vlm")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--out", type=Path, help="CSV of all that was said")
    options = parser.parse_args()
    names, photographs = class_names(), held_out()[: options.count]
    answers = replies(options.model, photographs, names)
    known = labels_trained_on()
    new = [one.label not in known for one in photographs]
    for what, (_, hits) in answers.items():
        unseen = [hit for hit, one in zip(hits, new, strict=True) if one]
        print(f"{what:14s} {told(hits)}; of classes on no photograph trained on, {told(unseen)}")
    if options.out:
        shown = [(one.name, names[one.label]) for one in photographs]
        rows = [(*one, *given) for one, *given in zip(shown, *(given for given, _ in answers.values()), strict=True)]
        replace(options.out, table([("photograph", "class", *answers), *rows]))


if __name__ == "__main__":
    main()
