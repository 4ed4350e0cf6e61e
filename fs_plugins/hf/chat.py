"""Asking a Hugging Face image-text-to-text model one question about each of several images."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from fs_plugins.answers import Answers
from fs_plugins.api import enable, vision_call
from fs_plugins.choice import PSMChoice
from fs_plugins.errors import SettingError
from fs_plugins.evaluation.datasets import Dataset, Sample
from fs_plugins.evaluation.subjects import size_of
from fs_plugins.evaluation.tasks import TOKENS, Task
from fs_plugins.hf.dialogue import about, dialogue, encode, generate, pixels_of
from fs_plugins.hf.replies import Replier
from fs_plugins.hf.speech import Speech
from fs_plugins.state import Status


@torch.no_grad()
def ask(
    model: nn.Module,
    processor: Any,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    *,
    max_new_tokens: int = 16,
) -> list[str]:
    """Greedy answers, one for each image and its question, in one batch.

    Raises:
        SettingError: as many questions as images were expected; and see ``dialogue``.
    """
    if len(images) != len(questions):
        raise SettingError(f"One question for each image: got {len(images)} images and {len(questions)} questions.")
    prompts = [dialogue(processor, question) for question in questions]
    inputs = encode(processor, prompts, [[image] for image in images])
    return [text.strip() for text in generate(model, processor, inputs, max_new_tokens=max_new_tokens)]


@dataclass(frozen=True)
class Answer:
    """What a model said, and the seconds it took."""

    text: str
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """The same question without and with smoothing; ``status`` says what served the second answer."""

    without: Answer
    smoothed: Answer
    status: Status


def compare(
    model: nn.Module,
    processor: Any,
    image: Image.Image,
    question: str,
    *,
    psm: PSMChoice = "auto",
    sigma: float | None = None,
    n0: int = 4,
    seed: int | None = None,
    max_new_tokens: int = 64,
) -> Comparison:
    """One question about one image, without and with smoothing, each timed; afterwards the model is as it was.

    Args:
        psm, sigma, n0, seed: as ``fs_plugins.enable`` takes them.

    Raises:
        FSPluginsError: see ``fs_plugins.enable``, and ``prompt``.
    """

    def answer() -> Answer:
        began = time.perf_counter()
        (text,) = ask(model, processor, [image], [question], max_new_tokens=max_new_tokens)
        return Answer(text, time.perf_counter() - began)

    ask(model, processor, [image], [question], max_new_tokens=1)  # the first call pays for warming up
    without = answer()
    with enable(model, psm=psm, sigma=sigma, n0=n0, seed=seed, processor=pixels_of(processor)) as handle:
        return Comparison(without, answer(), handle.status())


class Chat:
    """An image-text-to-text model of transformers whose encoder takes pictures of one size, one a question."""

    tasks = ("captioning", "classification", "vqa")

    def __init__(self, model: nn.Module, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.call = vision_call(model, processor=pixels_of(processor))
        size_of(self.call)

    def reply(self, task: Task, images: Tensor, samples: Sequence[Sample], dataset: Dataset) -> list[str]:
        prompts = [task.prompt(sample, dataset) for sample in samples]
        return self.say(images, prompts, TOKENS[task.name])

    def answers(self, task: Task, samples: Sequence[Sample], dataset: Dataset) -> Answers:
        """What the model says to each sample's question, by its image's name."""
        questions = {sample.image: task.prompt(sample, dataset) for sample in samples}
        most = TOKENS[task.name]
        return Speech(self.model, self.processor, questions.__getitem__, max_new_tokens=most, call=self.call)

    def asker(self, task: Task) -> Replier:
        most = TOKENS[task.name]
        return Replier(self.model, self.processor, max_new_tokens=most, call=self.call)

    def say(self, images: Tensor, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """Greedy answers about exactly these pixels: they do not pass through the processor's resizing and rounding.

        Raises:
            ModelError: the processor makes something else of a picture than one image of the encoder's size.
        """
        inputs = about(self.processor, self.call, prompts)
        inputs["pixel_values"] = self.call.pixels.from_unit(images, torch.float32)
        said = generate(self.model, self.processor, inputs, max_new_tokens=max_new_tokens)
        return [text.strip() for text in said]
