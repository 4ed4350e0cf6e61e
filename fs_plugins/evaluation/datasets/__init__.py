"""What a model is evaluated on: pictures, what is true of them, what is asked, and what an attack aims at.

samples.jsonl    one Sample a line
dataset.json     optional: name, classes, target_class, none_option, prompts
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator
from torch import Tensor

from fs_plugins.errors import SettingError
from fs_plugins.pictures import EXTENSIONS, check, read

SAMPLES, SETTINGS = "samples.jsonl", "dataset.json"
NONE_OPTION = "None of the above"
Corrupt = Literal["refuse", "skip"]

IMAGENET = {
    "n01514668": "rooster",
    "n02483362": "gibbon",
    "n02099601": "golden retriever",
    "n01443537": "goldfish",
    "n01514859": "hen",
    "n01729322": "hognose snake",
    "n02134084": "ice bear",
    "n02071294": "killer whale",
    "n01981276": "king crab",
    "n01608432": "kite",
}
"""The paper's ten classes (section S.9.1), in its order."""
IMAGENET_TARGET = ("n01484850", "shark")
"""The eleventh: what a targeted attack wants to be answered."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Sample(_Strict):
    """One picture and what is true of it.

    Args:
        image: path below the dataset's root, with forward slashes; the picture's name in every result.
        target: the picture that a targeted attack aims at, path below the root.
        caption: what a good caption says.
        label: one of the dataset's classes.
        question, options, answer: a multiple-choice question; the answer is one of the options.
    """

    image: str
    target: str | None = None
    caption: str | None = None
    label: str | None = None
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
        return self


class Prompts(_Strict):
    """What the model is asked; the paper's words (section S.9.1) unless told otherwise.

    Args:
        captioning: as it is.
        classification: with ``{classes}`` ("0. rooster, 1. gibbon") and ``{last}``, the last class's number.
        vqa: with ``{question}``, ``{options}`` and, where wanted, ``{none}``, the dataset's ``none_option``.
        vqa_answers: whether options are lettered and a letter is the answer, or an option's own words are.
    """

    captioning: str = "Describe this image in one concise sentence, no longer than 20 words."
    classification: str = (
        "You are a precise visual classifier. What are the main objects in this image?: {classes}. Output only a single "
        "integer between 0 and {last} with no explanation, no text, no punctuation."
    )
    vqa: str = (
        "You are a knowledgeable multimodal assistant. Please answer the multiple-choice question ONLY by outputting the "
        "single letter of the correct option. Do not include explanations or extra text. Question: {question} Options: "
        "{options}. If the visual information is not clear or uncorrelated with the questions, you should select the "
        "choice: {none}. Answer with exactly one letter from the options above (e.g., A)."
    )
    vqa_answers: Literal["letter", "option"] = "letter"

    @field_validator("classification")
    @classmethod
    def _of_classes(cls, template: str) -> str:
        return _template(template, "classes", "last")

    @field_validator("vqa")
    @classmethod
    def _of_questions(cls, template: str) -> str:
        return _template(template, "question", "options", allowed="none")


def _template(text: str, *needed: str, allowed: str = "") -> str:
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(text)]
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
        aims: the target pictures of those samples that name none, by ``Sample.image``.

    Raises:
        SettingError: no samples, two with one name, fewer than two classes, or a label that is none of them.
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
        for sample in self.samples:
            if sample.label is not None and sample.label not in self.classes:
                raise SettingError(
                    f"{sample.image} in {self.root} has the label {sample.label!r}, which is none of the classes "
                    f"{', '.join(self.classes)}. Correct it, or list it among the classes."
                )
        if self.target_class is not None and self.target_class not in self.classes:
            raise SettingError(
                f"The target class {self.target_class!r} of {self.root} is none of the classes {list(self.classes)}; the "
                "attack's answer has to be on offer."
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
            listed.append(f"{sample.model_dump_json()} {aim and _name(aim, self.root)} {sizes}")
        content = "\n".join(listed).encode()
        return f"{len(self.samples)} samples, {hashlib.sha256(content).hexdigest()[:16]}"

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
        for name in _shuffled(by_name, seed, "some"):
            turns.append((seen[by_name[name].label], name))
            seen[by_name[name].label] += 1
        chosen = {name for _, name in sorted(turns, key=lambda turn: turn[0])[:count]}
        return replace(self, samples=tuple(sample for sample in self.samples if sample.image in chosen))


def open_dataset(
    path: str | os.PathLike[str],
    *,
    targets: str | os.PathLike[str] | None = None,
    corrupt: Corrupt = "refuse",
    seed: int = 0,
) -> Dataset:
    """Read a folder and decode each of its pictures once.

    The folder holds samples.jsonl, or is the NIPS 2017 competition's (images.csv), ScienceQA's (problems.json), ImageNet's
    (a folder for each synset), or has any PNG and JPEG files in it.

    A sample without a target picture of its own gets one: those of ``targets`` in turn, else the target class's in turn
    (ImageNet), else another of the dataset's pictures by a seeded permutation that leaves none in its place.

    Args:
        targets: a folder of pictures for attacks to aim at.
        corrupt: "refuse" a dataset with pictures that cannot be read, or "skip" them and say so in ``skipped``.
        seed: of that permutation.

    Raises:
        SettingError: nothing to read, a file that breaks its format, a picture that is missing or corrupt, or nothing for
            an attack to aim at.
    """
    root = Path(path)
    if not root.is_dir():
        raise SettingError(f"{root} is no folder; a dataset is a folder with pictures.")
    if corrupt not in get_args(Corrupt):
        raise SettingError(f"corrupt is 'refuse' or 'skip', got {corrupt!r}.")
    aims = None if targets is None else Path(targets)
    dataset, pool = _found(root, aims)
    if aims is not None:
        pool = _pictures(aims)
        if not pool:
            raise SettingError(f"No {', '.join(EXTENSIONS)} below {aims}, where the target pictures were to be.")
    dataset, pool = _whole(dataset, pool, corrupt)
    return replace(dataset, aims=_aims(dataset, pool, seed))


def _found(root: Path, targets: Path | None) -> tuple[Dataset, list[Path]]:
    """The dataset, and the pictures of its target class that are no samples; no picture is opened."""
    for name, reader in _READERS.items():
        if (root / name).is_file():
            return reader(root), []
    for base in (root, root / "val"):
        if any((base / synset).is_dir() for synset in IMAGENET):
            return _imagenet(root, base)
    found = _pictures(root)
    if targets is not None and root.resolve() in targets.resolve().parents:
        aside = targets.resolve().relative_to(root.resolve())
        found = [path for path in found if not path.is_relative_to(root / aside)]
    if not found:
        wanted = ", ".join([*_READERS, *(f"*{end}" for end in EXTENSIONS)])
        raise SettingError(f"{root} has nothing to evaluate on; expected one of {wanted}.")
    return Dataset(root.resolve().name, root, tuple(_sample(root, path) for path in found)), []


class _Settings(_Strict):
    name: str | None = None
    classes: tuple[str, ...] | None = None
    target_class: str | None = None
    none_option: str = NONE_OPTION
    prompts: Prompts = Prompts()


def _documented(root: Path) -> Dataset:
    settings = _Settings()
    if (root / SETTINGS).exists():
        try:
            settings = _Settings.model_validate_json((root / SETTINGS).read_bytes())
        except ValidationError as error:
            raise SettingError(
                f"{root / SETTINGS}: {_first(error)}. It holds {', '.join(_Settings.model_fields)}."
            ) from None
    samples = []
    for number, line in enumerate((root / SAMPLES).read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if line.strip():
            try:
                samples.append(Sample.model_validate_json(line))
            except ValidationError as error:
                raise SettingError(
                    f"{root / SAMPLES}, line {number}: {_first(error)}. A line is a JSON object with image and, where they "
                    f"are known, {', '.join(name for name in Sample.model_fields if name != 'image')}."
                ) from None
    classes = settings.classes
    if classes is None:
        classes = tuple(sorted({sample.label for sample in samples if sample.label is not None}))
    return Dataset(
        settings.name or root.resolve().name,
        root,
        tuple(samples),
        classes,
        settings.target_class,
        settings.none_option,
        settings.prompts,
    )


def _nips17(root: Path) -> Dataset:
    """The competition's labels are numbers of ImageNet's thousand classes, too many to ask for: captioning only."""
    listing = root / "images.csv"
    try:
        with listing.open(encoding="utf-8-sig", newline="") as file:
            names = [row.get("ImageId") for row in csv.DictReader(file)]
    except (csv.Error, UnicodeDecodeError) as error:
        raise SettingError(f"{listing} is no CSV file: {error}.") from None
    if not all(names):
        raise SettingError(
            f"{listing} needs a column ImageId with a name in every row, as in the NIPS 2017 competition."
        )
    there = {path.stem: path for path in reversed(_pictures(root / "images"))}
    if missing := [name for name in names if name not in there]:
        raise SettingError(
            f"{len(missing)} of the {len(names)} pictures of {listing} are not in {root / 'images'}, the first "
            f"{missing[0]}.png. Put them there, or take their rows out."
        )
    return Dataset("NIPS 2017", root, tuple(_sample(root, there[name]) for name in names if name))


class _Problem(BaseModel):
    question: str
    choices: tuple[str, ...]
    answer: int
    image: str | None = None
    split: str

    @model_validator(mode="after")
    def _answered(self) -> _Problem:
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(f"the answer {self.answer} is none of the {len(self.choices)} choices")
        return self


def _scienceqa(root: Path) -> Dataset:
    """The problems that have a picture, of those splits that are there."""
    listing = root / "problems.json"
    try:
        problems = TypeAdapter(dict[str, _Problem]).validate_json(listing.read_bytes())
    except ValidationError as error:
        raise SettingError(f"{listing} is not ScienceQA's: {_first(error)}.") from None
    base = root / "images" if (root / "images").is_dir() else root
    pictured = {name: problem for name, problem in problems.items() if problem.image}
    splits = {problem.split for problem in pictured.values() if (base / problem.split).is_dir()}
    if not splits:
        wanted = " or ".join(sorted({f"{problem.split}/" for problem in pictured.values()}))
        raise SettingError(
            f"{listing} has {len(pictured)} problems with a picture, and {base} has no pictures for them: expected "
            f"{wanted or 'a problem with a picture'}, with a folder for each problem."
        )
    samples = [
        _sample(
            root,
            base / problem.split / name / str(problem.image),
            question=problem.question,
            options=problem.choices,
            answer=problem.choices[problem.answer],
        )
        for name, problem in pictured.items()
        if problem.split in splits
    ]
    return Dataset("ScienceQA", root, tuple(samples))


_READERS: dict[str, Callable[[Path], Dataset]] = {
    SAMPLES: _documented,
    "images.csv": _nips17,
    "problems.json": _scienceqa,
}


def _imagenet(root: Path, base: Path) -> tuple[Dataset, list[Path]]:
    pictures = {name: _pictures(base / synset) for synset, name in IMAGENET.items()}
    present = [name for name, found in pictures.items() if found]
    if not present:
        raise SettingError(f"The synset folders in {base} have no {', '.join(EXTENSIONS)} in them.")
    samples = [_sample(root, path, label=name) for name in present for path in pictures[name]]
    synset, target = IMAGENET_TARGET
    dataset = Dataset("ImageNet", root, tuple(samples), (*present, target), target)
    return dataset, _pictures(base / synset)


def _sample(root: Path, path: Path, **facts: object) -> Sample:
    try:
        return Sample.model_validate({"image": path.relative_to(root).as_posix(), **facts})
    except ValidationError as error:
        raise SettingError(f"{path} cannot be a sample: {_first(error)}.") from None


def _pictures(folder: Path) -> list[Path]:
    """Every PNG and JPEG below a folder, sorted; hidden files (of editors, of macOS) are none of it."""
    found = [path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file()]
    return sorted(path for path in found if not any(p.startswith(".") for p in path.relative_to(folder).parts))


def _whole(dataset: Dataset, pool: Sequence[Path], corrupt: Corrupt) -> tuple[Dataset, list[Path]]:
    """What can be read of the samples and of the pool."""
    root = dataset.root
    named = [root / name for sample in dataset.samples for name in (sample.image, sample.target) if name is not None]
    paths = list(dict.fromkeys([*named, *pool]))
    if missing := [path for path in paths if not path.is_file()]:
        raise SettingError(
            f"{len(missing)} of the {len(paths)} pictures of {root} are missing, the first {missing[0]}. Put them there, or "
            "take them out of the list."
        )
    with ThreadPoolExecutor() as threads:  # decoding releases the interpreter
        faults = {path: fault for path, fault in zip(paths, threads.map(_fault, paths), strict=True) if fault}
    if faults and corrupt == "refuse":
        raise SettingError(
            f"{len(faults)} of the {len(paths)} pictures of {root} cannot be read. {' '.join(list(faults.values())[:3])} "
            'Replace them, or leave them out with corrupt="skip".'
        )
    kept, skipped = [], []
    for sample in dataset.samples:
        if fault := faults.get(root / sample.image):
            skipped.append(fault)
        elif sample.target is not None and (fault := faults.get(root / sample.target)):
            skipped.append(f"{root / sample.image} is left out for its target: {fault}")
        else:
            kept.append(sample)
    skipped += [faults[path] for path in pool if path in faults]
    if not kept:
        raise SettingError(f"None of the {len(dataset.samples)} samples of {root} can be read. {skipped[0]}")
    told = tuple(sentence.replace(f"{root}{os.sep}", "") for sentence in skipped)
    return replace(dataset, samples=tuple(kept), skipped=told), [path for path in pool if path not in faults]


def _fault(path: Path) -> str | None:
    try:
        check(path)
    except SettingError as error:
        return f"{str(error).rstrip('.')}."
    return None


def _aims(dataset: Dataset, pool: Sequence[Path], seed: int) -> dict[str, Path]:
    """A target picture for each sample that names none."""
    root = dataset.root
    without = [sample for sample in dataset.samples if sample.target is None]
    if not without:
        return {}
    if pool:
        return {sample.image: _in_turn(pool, turn, root / sample.image) for turn, sample in enumerate(without)}
    if dataset.target_class is not None and any(sample.label is not None for sample in without):
        raise SettingError(
            f"{root} has no picture of {dataset.target_class!r}, which attacks on its {len(without)} pictures without a "
            "target are to make the model see. Name a target in each sample, or give a folder of such pictures as targets."
        )
    if len(dataset.samples) < 2:
        raise SettingError(f"{root} has one picture, and none for an attack on it to aim at. Give a folder as targets.")
    order = _shuffled([sample.image for sample in dataset.samples], seed, "aims")
    following = dict(zip(order, order[1:] + order[:1], strict=True))
    return {sample.image: root / following[sample.image] for sample in without}


def _in_turn(pool: Sequence[Path], turn: int, own: Path) -> Path:
    for choice in (pool[turn % len(pool)], pool[(turn + 1) % len(pool)]):
        if choice.resolve() != own.resolve():
            return choice
    raise SettingError(f"The only target picture is {own} itself; give a folder with another as targets.")


def _shuffled(names: Iterable[str], seed: int, purpose: str) -> list[str]:
    """In an order that depends on the names and the seed alone."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{purpose}/{name}".encode()).digest())


def _doubled(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def _first(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(map(str, problem["loc"]))
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
