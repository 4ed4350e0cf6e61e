"""Class names as directions in a model's embedding, as zero-shot classification uses them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fs_plugins.errors import ModelError, SettingError


@torch.no_grad()
def directions_of(model: Any, origin: str, classes: Sequence[str], prompt: str) -> dict[str, Tensor]:
    """Class names -> unit text embeddings (E,), of a transformers model that embeds texts (CLIP, SigLIP).

    Args:
        origin: the folder or hub id of its tokenizer.
        classes: two different names or more.
        prompt: what a class is called in a sentence, with ``{}`` for its name.

    Raises:
        SettingError: fewer than two classes, or a prompt without ``{}``.
        ModelError: the model embeds no texts.
    """
    from transformers import AutoTokenizer

    if len(set(classes)) < 2 or len(set(classes)) < len(classes):
        raise SettingError(
            f'Zero-shot classes are two different names or more, such as "cat, dog"; got {list(classes)}.'
        )
    if "{}" not in prompt:
        raise SettingError(f"The prompt must say where the class goes with {{}}, got {prompt!r}.")
    if not hasattr(model, "get_text_features"):
        raise ModelError(
            f"Zero-shot classification needs a model that embeds texts, such as CLIP or SigLIP; {type(model).__name__} does not. For a "
            "linear head of your own, pass its weight to fs_plugins.certify_predictions."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(origin)
    except (OSError, ValueError) as error:
        raise ModelError(f"Cannot load a tokenizer from {origin!r}: {error}") from None
    tokens = tokenizer(
        [prompt.format(name) for name in classes],
        padding="max_length",  # as SigLIP was trained
        max_length=getattr(model.config, "text_config", model.config).max_position_embeddings,
        truncation=True,
        return_tensors="pt",
    )
    found = model.get_text_features(**tokens.to(model.device))
    features = getattr(found, "pooler_output", found)
    return dict(zip(classes, torch.nn.functional.normalize(features.float(), dim=-1), strict=True))
