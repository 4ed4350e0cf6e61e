"""Pictures, what is true of them, what is asked of a model, and what an attack aims at."""

from __future__ import annotations

import json
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from torch import Tensor

from fs_plugins.errors import SettingError
from fs_plugins.files import mark
from fs_plugins.pictures import read

NONE_OPTION = "None of the above"


class Strict(BaseModel):
    """What has no other fields than these, and does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Sample(Strict):
    """One picture and what is true of it.

    Args:
        image: path below the dataset's root, with forward slashes; the picture's name in every result.
        target: the picture that a targeted attack aims at, path below the root.
        target_label: the class of that picture: what such an attack wants to be answered instead of the dataset's
            ``target_class``.
        caption: what a good caption says.
        label: one of the dataset's classes.
        choices: the classes that are on offer, the label among them; all of the dataset's if empty.
        question, options, answer: a multiple-choice question; the answer is one of the options.
    """

    image: str
    target: str | None = None
    target_label: str | None = None
    caption: str | None = None
    label: str | None = None
    choices: tuple[str, ...] = ()
    question: str | None = None
    options: tuple[str, ...] = Field(default=(), max_length=25)
    answer: str | None = None

    @field_validator("image", "target")
    @classmethod
    def _below(cls, path: str | None) -> str | None:
        if path is not None:
            posix = PurePosixPath(path)
            outside = posix.is_absolute() or ".." in posix.parts or "\\" in path or PureWindowsPath(path).drive
            if outside or not posix.parts or posix.as_posix() != path:
                raise ValueError(f"{path!r} is no plain path below the dataset's folder, like images/0001.png")
        return path

    @model_validator(mode="after")
    def _asked(self) -> Sample:
        given = (self.question is not None, bool(self.options), self.answer is not None)
        if any(given) and not all(given):
            raise ValueError("question, options and answer come together, or not at all")
        if self.answer is not None and self.answer not in self.options:
            raise ValueError(f"the answer {self.answer!r} is none of the options {list(self.options)}")
        if self.choices and (self.label not in self.choices or len(set(self.choices)) < max(2, len(self.choices))):
            raise ValueError(
                f"choices are two classes or more, each once, and the label {self.label!r} among them; they are "
                f"{list(self.choices)}"
            )
        return self


class Prompts(Strict):
    """What the model is asked; the paper's words (section S.9.1) unless told otherwise.

    Args:
        captioning: as it is.
        classification_answers: whether classes are numbered and a number is the answer, or a class's own name is.
        classification: with ``{classes}`` ("0. rooster, 1. gibbon") and ``{last}``, the last class's number; names need
            no ``{last}``.
        vqa: with ``{question}``, ``{options}`` and, where wanted, ``{none}``, the dataset's ``none_option``.
        vqa_answers: whether options are lettered and a letter is the answer, or an option's own words are.
    """

    captioning: str = "Describe this image in one concise sentence, no longer than 20 words."
    classification_answers: Literal["number", "name"] = "number"
    classification: str = (
        "You are a precise visual classifier. What are the main objects in this image?: {classes}. Output only a "
        "single integer between 0 and {last} with no explanation, no text, no punctuation."
    )
    vqa: str = (
        "You are a knowledgeable multimodal assistant. Please answer the multiple-choice question ONLY by outputting "
        "the single letter of the correct option. Do not include explanations or extra text. Question: {question} "
        "Options: {options}. If the visual information is not clear or uncorrelated with the questions, you should "
        "select the choice: {none}. Answer with exactly one letter from the options above (e.g., A)."
    )
    vqa_answers: Literal["letter", "option"] = "letter"

    @field_validator("classification")
    @classmethod
    def _of_classes(cls, template: str, info: ValidationInfo) -> str:
        numbered = info.data.get("classification_answers") == "number"
        return _template(template, "classes", "last") if numbered else _template(template, "classes", allowed="last")

    @field_validator("vqa")
    @classmethod
    def _of_questions(cls, template: str) -> str:
        return _template(template, "question", "options", allowed="none")


def _template(text: str, *needed: str, allowed: str = "") -> str:
    try:
        parts = list(string.Formatter().parse(text))
        if any(width or conversion for _, _, width, conversion in parts):
            raise ValueError  # {classes:>9999999999} would fill the memory
        fields = [name for _, name, _, _ in parts]
        text.format(**dict.fromkeys((*needed, allowed), ""))
    except (ValueError, KeyError, IndexError, AttributeError):
        fields = []
    if not set(needed) <= set(fields):
        names = " and ".join(f"{{{name}}}" for name in needed)
        raise ValueError(f"a template with {names} was expected, and no other braces (write {{{{ for one that stays)")
    return text


@dataclass(frozen=True)
class Dataset:
    """Samples, and what they have in common. ``open_dataset`` makes one from a folder.

    Args:
        name: what reports call it.
        root: the folder that the samples' paths start from.
        classes: what classification chooses from, in the order of their numbers.
        target_class: the class that a targeted attack wants to be answered, one of ``classes``.
        none_option: the option that an attack on a question wants to be answered.
        skipped: a sentence on each picture that was left out because it cannot be read.
        aims: the target pictures of those samples that name none, by ``Sample.image``; ``open_dataset`` chooses them.
        pool: pictures, none of them a sample, among which it chooses in turn; of ``target_class``, where there is one.

    Raises:
        SettingError: no samples, two with one name, fewer than two classes, or a label or a choice that is none of
            them.
    """

    name: str
    root: Path
    samples: tuple[Sample, ...]
    classes: tuple[str, ...] = ()
    target_class: str | None = None
    none_option: str = NONE_OPTION
    prompts: Prompts = field(default_factory=Prompts)
    skipped: tuple[str, ...] = ()
    aims: Mapping[str, Path] = field(default_factory=dict, hash=False, repr=False)
    pool: tuple[Path, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not self.samples:
            raise SettingError(f"{self.root} has no samples; at least one is needed.")
        if doubled := _doubled(sample.image for sample in self.samples):
            raise SettingError(f"{self.root} has several samples with the image {doubled}; its name must be its own.")
        if doubled := _doubled(self.classes):
            raise SettingError(f"The class {doubled} is listed twice in {self.root}; each class has one number.")
        labels = {sample.label for sample in self.samples} - {None}
        if (self.classes or labels) and len(self.classes) < 2:
            raise SettingError(f"{self.root} has the classes {list(self.classes)}; a choice needs at least two.")
        known = set(self.classes)
        for sample in self.samples:
            named = {"label": (sample.label,), "target_label": (sample.target_label,), "choice": sample.choices}
            for what, classes in named.items():
                for one in classes:
                    if one is not None and one not in known:
                        raise SettingError(
                            f"{sample.image} in {self.root} has the {what} {one!r}, which is none of the classes "
                            f"{_listed(self.classes)}. Correct it, or list it among the classes."
                        )
        if self.target_class is not None and self.target_class not in self.classes:
            raise SettingError(
                f"The target class {self.target_class!r} of {self.root} is none of the classes {list(self.classes)}; "
                "the attack's answer has to be on offer."
            )

    def image(self, sample: Sample, size: tuple[int, int]) -> Tensor:
        """The picture, fitted and centre-cropped to (H, W): (3, H, W) fp32 in [0, 1]."""
        return read(self.root / sample.image, size)

    def target(self, sample: Sample, size: tuple[int, int]) -> Tensor:
        """The picture that a targeted attack on this sample aims at, as ``image`` gives pictures.

        Raises:
            SettingError: it has none.
        """
        return read(self.target_path(sample), size)

    def target_path(self, sample: Sample) -> Path:
        if sample.target is not None:
            return self.root / sample.target
        if sample.image not in self.aims:
            raise SettingError(f"{sample.image} in {self.root} has no target picture. Name one, or use open_dataset.")
        return self.aims[sample.image]

    def wanted(self, sample: Sample) -> str | None:
        """The class that a targeted attack on this sample wants to be answered, if there is one."""
        return sample.target_label or self.target_class

    def offered(self, sample: Sample) -> tuple[str, ...]:
        """The classes that are on offer for this sample, in the order of their numbers."""
        return sample.choices or self.classes

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that at least one sample is for."""
        asked = {
            "captioning": True,
            "classification": any(sample.label is not None for sample in self.samples),
            "vqa": any(sample.question is not None for sample in self.samples),
        }
        return tuple(name for name, applies in asked.items() if applies)

    @property
    def digest(self) -> str:
        """A digest of samples, prompts and classes, and of all pictures' names and file sizes.

        It is the same wherever the folder lies and whatever it is called.
        """
        settings = [self.classes, self.target_class, self.none_option, self.prompts.model_dump()]
        listed = [json.dumps(settings, sort_keys=True)]
        for sample in self.samples:
            aim = self.target_path(sample) if sample.target or sample.image in self.aims else None
            sizes = [path.stat().st_size for path in (self.root / sample.image, aim) if path is not None]
            facts = {name: fact for name, fact in sample.model_dump().items() if fact or name not in _LATER}
            told = json.dumps(facts, ensure_ascii=False, separators=(",", ":"))
            listed.append(f"{told} {aim and _name(aim, self.root)} {sizes}")
        content = "\n".join(listed)
        return f"{len(self.samples)} samples, {mark(content)[:16]}"

    def some(self, count: int, seed: int = 0) -> Dataset:
        """``count`` of the samples in their order, of all labels as equally many as there are.

        A larger count with the same seed holds those of a smaller one.

        Raises:
            SettingError: there are not so many.
        """
        if not 1 <= count <= len(self.samples):
            raise SettingError(f"{self.name} has {len(self.samples)} samples; {count} of them were asked for.")
        by_name = {sample.image: sample for sample in self.samples}
        seen: Counter[str | None] = Counter()
        turns: list[tuple[int, str]] = []
        for name in shuffled(by_name, seed, "some"):
            turns.append((seen[by_name[name].label], name))
            seen[by_name[name].label] += 1
        chosen = {name for _, name in sorted(turns, key=lambda turn: turn[0])[:count]}
        return replace(self, samples=tuple(sample for sample in self.samples if sample.image in chosen))


_LATER = ("target_label", "choices")
"""Fields that came later: digests of data without them are what they were."""


def _listed(names: Sequence[str], most: int = 20) -> str:
    return ", ".join(names) if len(names) <= most else f"{', '.join(names[:most])} and {len(names) - most} more"


def shuffled(names: Iterable[str], seed: int, purpose: str) -> list[str]:
    """The names in an order that depends on the names and the seed alone."""
    return sorted(names, key=lambda name: mark(f"{seed}/{purpose}/{name}"))


def _doubled(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
