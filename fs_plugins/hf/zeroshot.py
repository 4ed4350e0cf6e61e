"""Class names as directions in a model's embedding, as zero-shot classification uses them."""

from __future__ import annotations

import os
import string
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fs_plugins.answers import Answers, Classes
from fs_plugins.api import vision_call
from fs_plugins.checks import words
from fs_plugins.errors import ModelError, SettingError
from fs_plugins.evaluation.datasets import Dataset, Sample
from fs_plugins.evaluation.subjects import likeliest, size_of
from fs_plugins.evaluation.tasks import Task
from fs_plugins.hf.load import load_tokenizer
from fs_plugins.vision import is_a


@torch.no_grad()
def directions_of(model: Any, origin: Any, classes: Sequence[str], prompt: str) -> dict[str, Tensor]:
    """Class names -> unit text embeddings (E,), of a model that embeds texts (CLIP, SigLIP; open_clip's).

    Args:
        origin: its tokenizer, or a processor with it; or the folder or hub id of a tokenizer of transformers.
        classes: two different names or more.
        prompt: what a class is called in a sentence, with ``{}`` for its name.

    Raises:
        SettingError: fewer than two classes, or a prompt that has not ``{}`` once; or what is no text; no tokenizer.
        ModelError: the model embeds no texts, or there is no tokenizer of that name.
    """
    names = [] if isinstance(classes, str) else [words("A class", name) for name in classes]
    if len(set(names)) < max(2, len(names)):
        raise SettingError(
            f'Zero-shot classes are two different names or more, such as "cat, dog"; got {names or classes}.'
        )
    if not _takes_one(words("The prompt", prompt)):
        raise SettingError(
            f"The prompt must say where the class goes with {{}}, once and with no other braces, got {prompt!r}."
        )
    embed = _by_transformers if hasattr(model, "get_text_features") else _by_open_clip
    if embed is _by_open_clip and not is_a(model, "open_clip", "CLIP", "CustomTextCLIP"):
        raise ModelError(
            f"Zero-shot classification needs a model that embeds texts, such as CLIP or SigLIP; {type(model).__name__} "
            "does not. For a linear head of your own, pass its weight to fs_plugins.certify_predictions, or the layer "
            "to fs_plugins.zero_shot."
        )
    features = embed(model, origin, [prompt.format(name) for name in names])
    return dict(zip(names, torch.nn.functional.normalize(features.float(), dim=-1), strict=True))


def _by_transformers(model: Any, origin: Any, texts: Sequence[str]) -> Tensor:
    if not origin:
        raise SettingError("This model does not say where it was loaded from. Pass its tokenizer.")
    named = isinstance(origin, str | os.PathLike)
    tokenizer = load_tokenizer(os.fspath(origin)) if named else getattr(origin, "tokenizer", origin)
    tokens = tokenizer(
        texts,
        padding="max_length",  # as SigLIP was trained
        max_length=getattr(model.config, "text_config", model.config).max_position_embeddings,
        truncation=True,
        return_tensors="pt",
    )
    found = model.get_text_features(**tokens.to(model.device))
    features: Tensor = getattr(found, "pooler_output", found)
    return features


def _by_open_clip(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    if not callable(tokenizer):
        raise SettingError(f"open_clip's models need their tokenizer, open_clip.get_tokenizer(...); got {tokenizer!r}.")
    features: Tensor = model.encode_text(tokenizer(texts).to(model.logit_scale.device))
    return features


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
        with torch.no_grad():
            embedded = self.call.served(images).float()
        scores, numbers = self._cosines(embedded), {name: i for i, name in enumerate(self.names)}
        return [likeliest(row, numbers, sample, dataset) for row, sample in zip(scores, samples, strict=True)]

    def answers(self, task: Task, samples: Sequence[Sample], dataset: Dataset) -> Answers:
        return Classes(self.call, self.scores)

    def scores(self, embedded: Tensor) -> Tensor:
        """(B, E) served embeddings -> (B, K) cosines to the classes, scaled as the model does."""
        scale = getattr(self.model, "logit_scale", None)
        factor = 100.0 if scale is None else float(scale.exp())
        return factor * self._cosines(normalize(embedded, dim=-1))

    def _cosines(self, embedded: Tensor) -> Tensor:
        return embedded @ self.directions.to(embedded).T
