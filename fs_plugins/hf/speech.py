"""What an image-text-to-text model of transformers says of what its encoder shows, word by word and with gradients.

Shapes: B images, T tokens of a prompt, R of a reply.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fs_plugins.answers import Answers, Classes, Spoken
from fs_plugins.api import vision_call
from fs_plugins.errors import ModelError, SettingError
from fs_plugins.evaluation.subjects import size_of
from fs_plugins.hf.classifier import zero_shot
from fs_plugins.hf.dialogue import about, continued, pixels_of
from fs_plugins.hf.load import load_processor, source
from fs_plugins.vision import VisionCall


@dataclass(frozen=True)
class Replies:
    """Prompts and the replies to them.

    Args:
        inputs: of the prompts, as the model takes them.
        words: (B, R) tokens.
        counted: (B, R) which of them are the reply's, its end included.
    """

    inputs: dict[str, Any]
    words: Tensor
    counted: Tensor


class Speech:
    """The ``Answers`` of a model to one question an image.

    It never looks at pixels: the model goes on from what its encoder has shown, plain, smoothed, or attacked.

    Args:
        model, processor: of transformers, an image-text-to-text model whose encoder takes pictures of one size, one a
            question (``evaluate`` asks the same ones), in eval mode.
        question: what is asked; or what is asked of an image, by its key.
        max_new_tokens: that a reply may have.

    Raises:
        ModelError: no adapter claims the model, or its encoder takes pictures of any size.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        question: str | Callable[[Any], str],
        *,
        max_new_tokens: int = 16,
        call: VisionCall | None = None,
    ) -> None:
        self.model: Any = model
        self.processor = processor
        self.question = question
        self.max_new_tokens = max_new_tokens
        self.call = vision_call(model, processor=pixels_of(processor)) if call is None else call
        size_of(self.call)
        self.brief = "logits_to_keep" in inspect.signature(model.forward).parameters

    def __str__(self) -> str:
        return self.question if isinstance(self.question, str) else "questions of each image's own"

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return (self.model,)

    @torch.no_grad()
    def given(self, output: Any, keys: Sequence[object]) -> Replies:
        """The greedy replies to the question about each image."""
        questions = [self.question if isinstance(self.question, str) else self.question(key) for key in keys]
        inputs = dict(about(self.processor, self.call, questions).to(self.call.device, self.call.dtype))
        tokenizer = self.processor.tokenizer
        with self.call.showing(output):
            tokens = self.model.generate(
                **inputs, pad_token_id=tokenizer.pad_token_id, do_sample=False, max_new_tokens=self.max_new_tokens
            )
        words = tokens[:, inputs["input_ids"].shape[1] :]
        ends = words == tokenizer.eos_token_id
        return Replies(inputs, words, ends.cumsum(1) - ends.long() == 0)

    def spoken(self, output: Any, given: Replies) -> Spoken:
        """The words' distributions at the places of the replies. Gradients follow the output."""
        words = given.words
        inputs = continued(given.inputs, words)
        if self.brief:
            inputs["logits_to_keep"] = words.shape[1] + 1
        with self.call.showing(output):
            logits = self.model(**inputs, use_cache=False).logits
        places = logits[:, -words.shape[1] - 1 : -1][given.counted]
        image = given.counted.nonzero()[:, 0]
        wide = torch.promote_types(places.dtype, torch.float32)
        return Spoken(places.to(wide).log_softmax(-1), words[given.counted], image, len(words))


def asked(model: nn.Module, call: VisionCall, settings: Any) -> list[Answers]:
    """The answers that a training holds (``fs-plugins train --ask`` and ``--classes``).

    Args:
        call: the model's one vision call.
        settings: with ``model``, ``processor``, ``ask``, ``classes`` and ``prompt``.

    Raises:
        ModelError: the model cannot be asked, or embeds no texts.
        SettingError: no question, or no two classes.
    """
    found: list[Answers] = []
    if settings.ask is not None:
        questions = [question.strip() for question in settings.ask.split("|")]
        if not all(questions):
            raise SettingError(f"--ask holds an empty question: {settings.ask!r}.")
        if not callable(getattr(model, "generate", None)):
            raise ModelError(f"{type(model).__name__} answers no questions; of image and text encoders, use --classes.")
        processor = load_processor(settings.processor or settings.model)
        found += [Speech(model, processor, question, call=call) for question in questions]
    if settings.classes is not None:
        names = [name.strip() for name in settings.classes.split(",") if name.strip()]
        place = source(settings.processor or settings.model)
        scores = zero_shot(model, names, prompt=settings.prompt, tokenizer=place).scores
        found.append(Classes(call, scores, ", ".join(names)))
    return found
