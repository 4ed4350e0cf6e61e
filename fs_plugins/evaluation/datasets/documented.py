"""The documented format.

samples.jsonl    one Sample a line
dataset.json     optional: name, classes, target_class, none_option, prompts
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from fs_plugins.errors import SettingError
from fs_plugins.evaluation.datasets.dataset import NONE_OPTION, Dataset, Prompts, Sample, Strict
from fs_plugins.evaluation.datasets.reader import Reader, first_of
from fs_plugins.files import bare, real

SAMPLES, SETTINGS = "samples.jsonl", "dataset.json"


class _Settings(Strict):
    name: str | None = None
    classes: tuple[str, ...] | None = None
    target_class: str | None = None
    none_option: str = NONE_OPTION
    prompts: Prompts = Prompts()


def read(root: Path) -> Dataset:
    settings = _Settings()
    if (root / SETTINGS).exists():
        try:
            settings = _Settings.model_validate_json(bare(root / SETTINGS))
        except ValidationError as error:
            raise SettingError(
                f"{root / SETTINGS}: {first_of(error)}. It holds {', '.join(_Settings.model_fields)}."
            ) from None
    samples = []
    for number, line in enumerate(bare(root / SAMPLES).splitlines(), start=1):
        if line.strip():
            try:
                samples.append(Sample.model_validate_json(line))
            except ValidationError as error:
                raise SettingError(
                    f"{root / SAMPLES}, line {number}: {first_of(error)}. A line is a JSON object with image and, "
                    f"where they are known, {', '.join(name for name in Sample.model_fields if name != 'image')}."
                ) from None
    classes = settings.classes
    if classes is None:
        classes = tuple(sorted({sample.label for sample in samples if sample.label is not None}))
    return Dataset(
        settings.name or real(root).name,
        root,
        tuple(samples),
        classes,
        settings.target_class,
        settings.none_option,
        settings.prompts,
    )


DOCUMENTED = Reader((SAMPLES,), read)
