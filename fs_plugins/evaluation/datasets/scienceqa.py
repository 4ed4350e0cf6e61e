"""ScienceQA."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, TypeAdapter, ValidationError, model_validator

from fs_plugins.errors import SettingError
from fs_plugins.evaluation.datasets.dataset import Dataset
from fs_plugins.evaluation.datasets.reader import Reader, first_of, sample_of
from fs_plugins.files import bare


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


def read(root: Path) -> Dataset:
    """The problems that have a picture, of those splits that are there."""
    listing = root / "problems.json"
    try:
        problems = TypeAdapter(dict[str, _Problem]).validate_json(bare(listing))
    except ValidationError as error:
        raise SettingError(f"{listing} is not ScienceQA's: {first_of(error)}.") from None
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
        sample_of(
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


SCIENCEQA = Reader(("problems.json",), read)
