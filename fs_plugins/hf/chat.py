"""Asking a Hugging Face image-text-to-text model one question about each of several images."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from fs_plugins.answers import Answers
from fs_plugins.api import enable, vision_call
from fs_plugins.checks import words
from fs_plugins.choice import PSMChoice
from fs_plugins.errors import ModelError, SettingError
from fs_plugins.evaluation.datasets import Dataset, Sample
from fs_plugins.evaluation.subjects import size_of
from fs_plugins.evaluation.tasks import Task
from fs_plugins.pictures import to_rgb
from fs_plugins.state import Status
from fs_plugins.vision import PixelSpace


def dialogue(processor: Any, question: str) -> str:
    """The prompt for one image and one question.

    Raises:
        SettingError: the question is no text, or holds what stands for an image; and see ``prompt``.
    """
    words("A question", question)
    place = getattr(processor, "image_token", None)
    if isinstance(place, str) and place in question:
        raise SettingError(f"A question must not hold {place}, which stands for an image; got {question!r}.")
    return prompt(processor, [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}])


def prompt(processor: Any, messages: Sequence[Mapping[str, Any]]) -> str:
    """What the model reads, by the processor's chat template, else as LLaVA-1.5 was trained.

    Args:
        messages: Hugging Face's: ``{"role": ..., "content": [{"type": "image"} or {"type": "text", "text": ...}]}``.

    Raises:
        SettingError: no chat template, and images are not written as LLaVA-1.5 writes them.
    """
    if getattr(processor, "chat_template", None):
        return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    if getattr(processor, "image_token", None) != "<image>":
        raise SettingError(
            f"{type(processor).__name__} has no chat template, so nobody knows how this model wants to be asked. "
            "Save one beside the checkpoint (chat_template.jinja)."
        )
    turns = []
    for message in messages:
        images = sum(part["type"] == "image" for part in message["content"])
        text = "\n".join(part["text"] for part in message["content"] if part["type"] == "text")
        turns.append(f"{message['role'].upper()}: " + "<image>\n" * images + text)
    return " ".join([*turns, "ASSISTANT:"])


def encode(processor: Any, prompts: Sequence[str], images: Sequence[Sequence[Any]]) -> Any:
    """Prompts and the images of each -> what the model is given, padded on the left.

    ``images`` has one list of PIL images for each prompt, either none of them empty or all; the processor is given them
    as ``pictures.to_rgb`` shows them.
    """
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    begun = tokenizer.bos_token is not None and prompts[0].startswith(tokenizer.bos_token)
    more: dict[str, Any] = {"add_special_tokens": False} if begun else {}
    if any(images):
        more["images"] = [[to_rgb(image) for image in own] for own in images]
    return processor(text=list(prompts), padding=True, return_tensors="pt", **more)


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


@torch.no_grad()
def generate(model: Any, processor: Any, inputs: Any, **settings: Any) -> list[str]:
    """The new text for what ``encode`` gave.

    Args:
        settings: those of the model's ``generate``; greedy if they say nothing.
    """
    inputs = inputs.to(model.device, model.dtype)
    pad = processor.tokenizer.pad_token_id
    tokens = model.generate(**inputs, pad_token_id=pad, **{"do_sample": False, **settings})
    new = tokens[:, inputs["input_ids"].shape[1] :]
    return list(processor.batch_decode(new, skip_special_tokens=True))


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


def pixels_of(processor: Any) -> PixelSpace | None:
    """Mean and std, if it says them; the resolution is for the encoder to say, whose weights may have been swapped."""
    if not hasattr(getattr(processor, "image_processor", processor), "image_mean"):
        return None
    return replace(PixelSpace.from_processor(processor), size=None)


class Chat:
    """An image-text-to-text model of transformers whose encoder takes pictures of one size, one a question."""

    tasks = ("captioning", "classification", "vqa")
    max_new_tokens: Mapping[str, int] = {"captioning": 40, "classification": 8, "vqa": 12}

    def __init__(self, model: nn.Module, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.call = vision_call(model, processor=pixels_of(processor))
        self.size = size_of(self.call)

    def reply(self, task: Task, images: Tensor, samples: Sequence[Sample], dataset: Dataset) -> list[str]:
        prompts = [task.prompt(sample, dataset) for sample in samples]
        return self.say(images, prompts, self.max_new_tokens[task.name])

    def answers(self, task: Task, samples: Sequence[Sample], dataset: Dataset) -> Answers:
        """What the model says to each sample's question, by its image's name."""
        from fs_plugins.hf.speech import Speech  # which asks in this module's words

        questions = {sample.image: task.prompt(sample, dataset) for sample in samples}
        most = self.max_new_tokens[task.name]
        return Speech(self.model, self.processor, questions.__getitem__, max_new_tokens=most, call=self.call)

    def say(self, images: Tensor, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """Greedy answers about exactly these pixels: they do not pass through the processor's resizing and rounding.

        Raises:
            ModelError: the processor makes something else of a picture than one image of the encoder's size.
        """
        height, width = self.size
        blank = Image.new("RGB", (width, height))
        told = [dialogue(self.processor, prompt) for prompt in prompts]
        inputs = encode(self.processor, told, [[blank]] * len(images))
        pixels = self.call.pixels.from_unit(images, torch.float32)
        given = inputs.get("pixel_values")
        if given is None or tuple(given.shape) != tuple(pixels.shape):
            shape = None if given is None else tuple(given.shape)
            raise ModelError(
                f"Evaluation puts attacked pixels of shape {tuple(pixels.shape)} straight into the model, but its "
                f"processor makes {shape} of such pictures (tiles or patches). Models that see one picture of a fixed "
                "size, as LLaVA-1.5 does, can be evaluated; for others use fs_plugins.attacks and "
                "fs_plugins.evaluation's parts."
            )
        inputs["pixel_values"] = pixels
        said = generate(self.model, self.processor, inputs, max_new_tokens=max_new_tokens)
        return [text.strip() for text in said]
