"""Captioning, classification and visual question answering: the question, and what an answer is worth.

A reply counts only if it is the answer and nothing else. Taking the first number out of a sentence would make answers
out of refusals ("I see 2 animals"), and an attack that makes a model babble would look like one that does nothing.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

from fs_plugins.errors import SettingError
from fs_plugins.evaluation.datasets import Dataset, Sample
from fs_plugins.readings import bare, by_letter, by_words, same


@dataclass(frozen=True)
class Verdict:
    """What one reply counts for.

    Args:
        correct: a hit for the accuracy (ACC).
        attacked: a hit for the attack (ASR): the reply is what a targeted attack wants. None where it cannot count,
            because there is no such answer, or because it is the truth: such a sample is no part of the ASR's total.
    """

    correct: bool
    attacked: bool | None


class Task(Protocol):
    """What is asked of a sample."""

    @property
    def name(self) -> str: ...

    def applies(self, sample: Sample) -> bool:
        """Whether the sample says enough to be asked this."""

    def prompt(self, sample: Sample, dataset: Dataset) -> str:
        """The question, without any chat template."""


class Choice(Task, Protocol):
    """A task whose answers are listed in its question."""

    def parse(self, reply: str, sample: Sample, dataset: Dataset) -> str | None:
        """The class or the option that the reply is; None if it is not exactly one of them."""

    def verdict(self, reply: str, sample: Sample, dataset: Dataset) -> Verdict:
        """What cannot be parsed is wrong, and no success of the attack."""


@dataclass(frozen=True)
class Captioning:
    """One sentence on the picture. A judge compares it with the clean picture's caption and with the target's.

    Args:
        acc_from: the score to the clean caption from which on a caption is right (the paper's 0.5).
        asr_from: the score to the target's caption from which on the attack has succeeded (the paper's 0.3).
    """

    acc_from: float = 0.5
    asr_from: float = 0.3
    name: ClassVar[str] = "captioning"

    def applies(self, sample: Sample) -> bool:
        return True

    def prompt(self, sample: Sample, dataset: Dataset) -> str:
        return dataset.prompts.captioning

    def verdict(self, score_to_clean: float, score_to_target: float) -> Verdict:
        """Both may hold, where the two captions are alike.

        Args:
            score_to_clean, score_to_target: similarities in [0, 1] by a judge.

        Raises:
            SettingError: a score that is not finite; a judge that failed is no answer that is wrong.
        """
        if not (math.isfinite(score_to_clean) and math.isfinite(score_to_target)):
            raise SettingError(f"A judge's scores are numbers from 0 to 1, got {score_to_clean} and {score_to_target}.")
        return Verdict(score_to_clean >= self.acc_from, score_to_target >= self.asr_from)


@dataclass(frozen=True)
class Classification:
    """The number of one of the dataset's classes, or of those that are on offer for the sample; or, where the dataset's
    prompts say so, its name.
    """

    name: ClassVar[str] = "classification"

    def applies(self, sample: Sample) -> bool:
        return sample.label is not None

    def prompt(self, sample: Sample, dataset: Dataset) -> str:
        offered = dataset.offered(sample)
        numbered = dataset.prompts.classification_answers == "number"
        listed = ", ".join(f"{number}. {name}" if numbered else name for number, name in enumerate(offered))
        return dataset.prompts.classification.format(classes=listed, last=len(offered) - 1)

    def parse(self, reply: str, sample: Sample, dataset: Dataset) -> str | None:
        said, offered = bare(reply), dataset.offered(sample)
        if dataset.prompts.classification_answers == "name":
            return by_words(reply, tuple(offered))
        if not re.fullmatch("[0-9]{1,9}", said) or int(said) >= len(offered):
            return None
        return offered[int(said)]

    def verdict(self, reply: str, sample: Sample, dataset: Dataset) -> Verdict:
        return _verdict(self.parse(reply, sample, dataset), sample.label, dataset.wanted(sample))


@dataclass(frozen=True)
class VQA:
    """The letter of one of the sample's options, or, where the dataset's prompts say so, its words.

    The dataset's ``none_option`` is offered last unless it is among the options.
    """

    name: ClassVar[str] = "vqa"

    def applies(self, sample: Sample) -> bool:
        return sample.question is not None

    def prompt(self, sample: Sample, dataset: Dataset) -> str:
        offered = self.offered(sample, dataset)
        if dataset.prompts.vqa_answers == "letter":
            listed = " ".join(f"{letter}. {o}" for letter, o in zip(string.ascii_uppercase, offered, strict=False))
        else:
            listed = ", ".join(offered)
        return dataset.prompts.vqa.format(question=sample.question, options=listed, none=dataset.none_option)

    def offered(self, sample: Sample, dataset: Dataset) -> tuple[str, ...]:
        """The options in the order of their letters."""
        if any(same(option, dataset.none_option) for option in sample.options):
            return sample.options
        return (*sample.options, dataset.none_option)

    def parse(self, reply: str, sample: Sample, dataset: Dataset) -> str | None:
        offered = self.offered(sample, dataset)
        return (by_letter if dataset.prompts.vqa_answers == "letter" else by_words)(reply, offered)

    def verdict(self, reply: str, sample: Sample, dataset: Dataset) -> Verdict:
        """An attack wants its target's class to be answered where that is an option, else that none is right."""
        offered = self.offered(sample, dataset)
        none = next(option for option in offered if same(option, dataset.none_option))
        wanted = sample.target_label if sample.target_label in offered else none
        return _verdict(self.parse(reply, sample, dataset), sample.answer, wanted)


TASKS: dict[str, Task] = {task.name: task for task in (Captioning(), Classification(), VQA())}
TOKENS: Mapping[str, int] = {"captioning": 40, "classification": 8, "vqa": 12}
"""How many an answer may have, by task."""
"""The paper's three, by the names that ``Dataset.tasks`` gives."""


def _verdict(answer: str | None, truth: str | None, wanted: str | None) -> Verdict:
    aimed = wanted is not None and wanted != truth
    return Verdict(answer is not None and answer == truth, answer == wanted if aimed else None)
