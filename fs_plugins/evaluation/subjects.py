"""What is evaluated: a model that is asked in words, or one that chooses among class names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

import fs_plugins
from fs_plugins.errors import ModelError
from fs_plugins.evaluation.answers import dialogue, encode, generate
from fs_plugins.evaluation.data import Dataset, Sample
from fs_plugins.evaluation.tasks import Task
from fs_plugins.vision import VisionCall


class Subject(Protocol):
    """A model under evaluation: its vision encoder, and what it says."""

    model: nn.Module
    call: VisionCall
    tasks: tuple[str, ...]

    def reply(self, task: Task, images: Tensor, samples: Sequence[Sample], dataset: Dataset) -> list[str]:
        """(B, C, H, W) images in [0, 1] at the encoder's size, and what is asked of each -> the replies."""


class Chat:
    """An image-text-to-text model of transformers whose encoder takes pictures of one size, one a question."""

    tasks = ("captioning", "classification", "vqa")
    max_new_tokens: Mapping[str, int] = {"captioning": 40, "classification": 8, "vqa": 12}

    def __init__(self, model: nn.Module, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.call = fs_plugins.vision_call(model)
        self.size = size_of(self.call)

    def reply(self, task: Task, images: Tensor, samples: Sequence[Sample], dataset: Dataset) -> list[str]:
        prompts = [task.prompt(sample, dataset) for sample in samples]
        return self.say(images, prompts, self.max_new_tokens[task.name])

    def say(self, images: Tensor, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """Greedy answers about exactly these pixels: they do not pass through the processor's resizing and rounding.

        Raises:
            ModelError: the processor makes something else of a picture than one image of the encoder's size.
        """
        height, width = self.size
        blank = Image.new("RGB", (width, height))
        told = [dialogue(self.processor, prompt) for prompt in prompts]
        inputs = encode(self.processor, told, [[blank]] * len(images))
        device = next(self.model.parameters()).device
        pixels = self.call.pixels.from_unit(images.to(device), torch.float32)
        given = inputs.get("pixel_values")
        if given is None or tuple(given.shape) != tuple(pixels.shape):
            shape = None if given is None else tuple(given.shape)
            raise ModelError(
                f"Evaluation puts attacked pixels of shape {tuple(pixels.shape)} straight into the model, but its processor "
                f"makes {shape} of such pictures (tiles or patches). Models that see one picture of a fixed size, as "
                "LLaVA-1.5 does, can be evaluated; for others use fs_plugins.attacks and fs_plugins.evaluation's parts."
            )
        inputs["pixel_values"] = pixels
        said = generate(self.model, self.processor, inputs, max_new_tokens=max_new_tokens)
        return [text.strip() for text in said]


class ZeroShot:
    """A model of images and texts that takes the class whose name is nearest (CLIP, SigLIP)."""

    tasks = ("classification",)

    def __init__(self, model: nn.Module, directions: Mapping[str, Tensor]) -> None:
        self.model = model
        self.call = fs_plugins.vision_call(model)
        size_of(self.call)
        self.names = list(directions)
        self.directions = torch.stack([directions[name] for name in self.names])

    def reply(self, task: Task, images: Tensor, samples: Sequence[Sample], dataset: Dataset) -> list[str]:
        call = self.call
        device = next(self.model.parameters()).device
        argument, others = call.pixels.layout.still(call.pixels.from_unit(images.to(device), call.dtype))
        with torch.no_grad():
            output = call.module(argument, **others, **call.kwargs)  # not call.forward, which goes around smoothing
            embedded = call.embed(call.features(call.pixels.layout.opened(output, len(images)))).float()
        nearest = (embedded @ self.directions.to(embedded).T).argmax(1)
        return [str(dataset.classes.index(self.names[i])) for i in nearest.tolist()]


def size_of(call: VisionCall) -> tuple[int, int]:
    """(H, W) that the encoder takes.

    Raises:
        ModelError: it takes any.
    """
    if call.image_size is None:
        raise ModelError(
            "This encoder takes pictures of any size, so what was attacked would not be what is asked about. Evaluation is for "
            "encoders of a fixed size."
        )
    return call.image_size
