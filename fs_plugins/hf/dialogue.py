"""How a Hugging Face image-text-to-text model is spoken to: prompts, inputs, new text, and the pixels it wants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fs_plugins.checks import words
from fs_plugins.errors import ModelError, SettingError
from fs_plugins.evaluation.subjects import size_of
from fs_plugins.pictures import to_rgb
from fs_plugins.vision import PixelSpace, VisionCall


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


def about(processor: Any, call: VisionCall, questions: Sequence[str]) -> Any:
    """What the model is given for one question an image, about blank pictures of the encoder's size: what is asked is
    about other pixels, or about what the encoder has shown.

    Raises:
        ModelError: the processor makes something else of a picture than one image of the encoder's size.
        SettingError: see ``dialogue``.
    """
    height, width = size_of(call)
    blank = Image.new("RGB", (width, height))
    prompts = [dialogue(processor, question) for question in questions]
    inputs = encode(processor, prompts, [[blank]] * len(questions))
    given = inputs.get("pixel_values")
    wanted = (len(questions), len(call.pixels.mean), height, width)
    if given is None or tuple(given.shape) != wanted:
        shape = None if given is None else tuple(given.shape)
        raise ModelError(
            f"This model's processor makes {shape} of {len(questions)} pictures, where {wanted} was expected (tiles "
            "or patches?). Models that see one picture of a fixed size, as LLaVA-1.5 does, can be asked about exactly "
            "the pixels that were attacked or made noisy; for others use fs_plugins.attacks and "
            "fs_plugins.evaluation's parts."
        )
    return inputs


def continued(inputs: Mapping[str, Any], words: Tensor) -> dict[str, Any]:
    """Prompts that go on with (B, R) words: masks and token types grow along."""
    found, prompts = dict(inputs), inputs["input_ids"].shape
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape == prompts:
            more = words if name == "input_ids" else torch.full_like(words, int(name == "attention_mask"))
            found[name] = torch.cat([value, more.to(value)], 1)
    return found


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


def pixels_of(processor: Any) -> PixelSpace | None:
    """Mean and std, if it says them; the resolution is for the encoder to say, whose weights may have been swapped."""
    if not hasattr(getattr(processor, "image_processor", processor), "image_mean"):
        return None
    return replace(PixelSpace.from_processor(processor), size=None)
