"""Class names as directions in a model's embedding, as zero-shot classification uses them."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fs_plugins.api import vision_call
from fs_plugins.checks import words
from fs_plugins.errors import ModelError, SettingError
from fs_plugins.evaluation.datasets import Dataset, Sample
from fs_plugins.evaluation.subjects import likeliest, size_of
from fs_plugins.evaluation.tasks import Task
from fs_plugins.hf.load import load_tokenizer


@torch.no_grad()
def directions_of(model: Any, origin: str, classes: Sequence[str], prompt: str) -> dict[str, Tensor]:
    """Class names -> unit text embeddings (E,), of a transformers model that embeds texts (CLIP, SigLIP).

    Args:
        origin: the folder or hub id of its tokenizer.
        classes: two different names or more.
        prompt: what a class is called in a sentence, with ``{}`` for its name.

    Raises:
        SettingError: fewer than two classes, or a prompt that has not ``{}`` once; or what is no text.
        ModelError: the model embeds no texts.
    """
    if len(set(classes)) < 2 or len(set(classes)) < len(classes):
        raise SettingError(
            f'Zero-shot classes are two different names or more, such as "cat, dog"; got {list(classes)}.'
        )
    if not _takes_one(words("The prompt", prompt)):
        raise SettingError(
            f"The prompt must say where the class goes with {{}}, once and with no other braces, got {prompt!r}."
        )
    if not hasattr(model, "get_text_features"):
        raise ModelError(
            f"Zero-shot classification needs a model that embeds texts, such as CLIP or SigLIP; {type(model).__name__} "
            "does not. For a linear head of your own, pass its weight to fs_plugins.certify_predictions."
        )
    tokenizer = load_tokenizer(origin)
    tokens = tokenizer(
        [prompt.format(words("A class", name)) for name in classes],
        padding="max_length",  # as SigLIP was trained
        max_length=getattr(model.config, "text_config", model.config).max_position_embeddings,
        truncation=True,
        return_tensors="pt",
    )
    found = model.get_text_features(**tokens.to(model.device))
    features = getattr(found, "pooler_output", found)
    return dict(zip(classes, torch.nn.functional.normalize(features.float(), dim=-1), strict=True))


def _takes_one(prompt: str) -> bool:
    try:
        parts = list(string.Formatter().parse(prompt))
    except ValueError:
        return False
    return [part[1:] for part in parts if part[1] is not None] == [("", "", None)]


class ZeroShot:
    """A model of images and texts that takes the class whose name is nearest (CLIP, SigLIP)."""

    tasks = ("classification",)

    def __init__(self, model: nn.Module, directions: Mapping[str, Tensor]) -> None:
        self.model = model
        self.call = vision_call(model)
        size_of(self.call)
        self.names = list(directions)
        self.directions = torch.stack([directions[name] for name in self.names])

    def reply(self, task: Task, images: Tensor, samples: Sequence[Sample], dataset: Dataset) -> list[str]:
        call = self.call
        argument, others = call.pixels.layout.still(call.pixels.from_unit(images.to(call.device), call.dtype))
        with torch.no_grad():
            output = call.module(argument, **others, **call.kwargs)  # not call.forward, which goes around smoothing
            embedded = call.embed(call.features(call.pixels.layout.opened(output, len(images)))).float()
        scores, numbers = embedded @ self.directions.to(embedded).T, {name: i for i, name in enumerate(self.names)}
        return [likeliest(row, numbers, sample, dataset) for row, sample in zip(scores, samples, strict=True)]
