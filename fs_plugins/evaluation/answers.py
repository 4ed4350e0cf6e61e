"""Asking a Hugging Face image-text-to-text model one question about each of several images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn

from fs_plugins.errors import SettingError


def dialogue(processor: Any, question: str) -> str:
    """The prompt for one image and one question, by the processor's chat template, else LLaVA-1.5's."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return f"USER: <image>\n{question} ASSISTANT:"


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
        SettingError: as many questions as images were expected.
    """
    if len(images) != len(questions):
        raise SettingError(f"One question for each image: got {len(images)} images and {len(questions)} questions.")
    inputs = encode(processor, images, questions).to(model.device)
    return generate(model, processor, inputs, max_new_tokens=max_new_tokens)


def encode(processor: Any, images: Sequence[Image.Image], questions: Sequence[str]) -> Any:
    """What the model is given: token ids, mask and pixels."""
    prompts = [dialogue(processor, question) for question in questions]
    padding = {"padding": True} if len(prompts) > 1 else {}
    return processor(images=list(images), text=prompts, return_tensors="pt", **padding)


@torch.no_grad()
def generate(model: Any, processor: Any, inputs: Any, *, max_new_tokens: int) -> list[str]:
    """Greedy decoding; the new text only."""
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
