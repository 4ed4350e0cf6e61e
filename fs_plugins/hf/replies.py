"""An image-text-to-text model of transformers that answers about what its encoder shows, no longer than is needed.

Shapes: B images, K choices.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fs_plugins.api import vision_call
from fs_plugins.checks import seed as checked_seed
from fs_plugins.checks import whole
from fs_plugins.errors import ModelError, SettingError
from fs_plugins.hf.dialogue import about, continued, dialogue, pixels_of
from fs_plugins.identity import digest
from fs_plugins.readings import Compared, Reading
from fs_plugins.vision import VisionCall

REFUSED = ("num_return_sequences", "streamer", "stopping_criteria", "return_dict_in_generate", "max_length")
"""Settings of ``generate`` under which an answer is not one text an image."""


class Replier:
    """Answers a question about each row of an encoder's output; a ``certificates.asking.Asker``.

    Args:
        model, processor: of transformers, an image-text-to-text model whose encoder takes pictures of one size, in eval
            mode.
        max_new_tokens: of an answer.
        generation: more settings of the model's ``generate``; greedy if they say nothing.
        seed: of the words, where ``generation`` samples them.

    Raises:
        ModelError: the model does not generate text, is in training mode, no adapter claims it, or its encoder takes
            pictures of any size.
        SettingError: settings under which an answer is not one text, or sampled words without a seed.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        max_new_tokens: int = 16,
        generation: Mapping[str, Any] | None = None,
        seed: int | None = None,
        call: VisionCall | None = None,
    ) -> None:
        if not callable(getattr(model, "generate", None)):
            raise ModelError(f"{type(model).__name__} answers no questions: it generates no text.")
        if any(part.training for part in model.modules()):
            raise ModelError("The model is in training mode, where its answers are random. Call model.eval() first.")
        if getattr(processor, "tokenizer", None) is None:
            raise SettingError(f"A processor with a tokenizer was expected, got {type(processor).__name__}.")
        self.model: Any = model
        self.processor = processor
        self.call = vision_call(model, processor=pixels_of(processor)) if call is None else call
        self.chosen: dict[str, Any] = {"do_sample": False, **(generation or {})}
        if refused := [name for name in REFUSED if name in self.chosen]:
            raise SettingError(f"{', '.join(refused)} cannot be set: an answer is one text an image.")
        if self.chosen["do_sample"] and seed is None:
            raise SettingError(
                "do_sample=True draws words at random: give a seed, so that the answers can be had again, or leave it "
                "out for greedy answers."
            )
        self.seed = None if seed is None else checked_seed(seed)
        self.max_new_tokens = whole("max_new_tokens", max_new_tokens)
        self.brief = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._encoded = lru_cache(maxsize=64)(self._encoded_once)

    @property
    def settings(self) -> Mapping[str, object]:
        own = self.model.generation_config.to_diff_dict()
        return {
            "model": digest(self.model),
            "generation": self.generation,
            "of the model": {name: repr(value) for name, value in sorted(own.items())},
        }

    @property
    def generation(self) -> str:
        chosen = {name: value for name, value in self.chosen.items() if name != "do_sample"}
        words = "sampled words" if self.chosen["do_sample"] else "the likeliest words"
        more = "".join(f", {name} {value!r}" for name, value in sorted(chosen.items()))
        drawn = f", seed {self.seed}" if self.chosen["do_sample"] else ""
        return f"{words}, at most {self.max_new_tokens} tokens{more}{drawn}"

    def prompt(self, question: str) -> str:
        return dialogue(self.processor, question)

    @torch.no_grad()
    def replies(self, output: Any, question: str, reading: Reading) -> list[str]:
        rows = len(next(iter(self.call.features(output).values())))
        if isinstance(reading, Compared):
            return [reading.classes[place] for place in self._likeliest(output, question, reading, rows).tolist()]
        from transformers import StoppingCriteriaList

        inputs = self._inputs(question, rows)
        begins = inputs["input_ids"].shape[1]
        tokenizer = self.processor.tokenizer
        enough = _Enough(tokenizer, begins, reading)
        devices = [self.call.device] if self.call.device.type == "cuda" else []
        with self.call.showing(output), torch.random.fork_rng(devices, enabled=self.chosen["do_sample"]):
            if self.chosen["do_sample"]:
                torch.manual_seed(self._seed_of(output, question))
            tokens = self.model.generate(
                **inputs,
                pad_token_id=tokenizer.pad_token_id,
                max_new_tokens=self.max_new_tokens,
                stopping_criteria=StoppingCriteriaList([enough]),
                **self.chosen,
            )
        said = self.processor.batch_decode(tokens[:, begins:], skip_special_tokens=True)
        return [text.strip() for text in said]

    def _likeliest(self, output: Any, question: str, reading: Compared, rows: int) -> Tensor:
        """(B,) the place of the choice with the largest probability, all its tokens together."""
        tokens = self._tokens(reading)
        longest = max(map(len, tokens))
        scores: list[Tensor] = []
        for choice in tokens[:1] if longest == 1 else tokens:
            more = torch.tensor(choice[:-1], device=self.call.device, dtype=torch.long).expand(rows, -1)
            inputs = continued(self._inputs(question, rows), more)
            if self.brief:
                inputs["logits_to_keep"] = len(choice)
            with self.call.showing(output):
                logits = self.model(**inputs, use_cache=False).logits[:, -len(choice) :]
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            if longest == 1:
                return wide[:, 0, [one[0] for one in tokens]].argmax(1)
            wanted = torch.tensor(choice, device=wide.device, dtype=torch.long).expand(rows, -1)
            scores.append(wide.gather(2, wanted[..., None])[..., 0].sum(1))
        return torch.stack(scores, 1).argmax(1)

    def _tokens(self, reading: Compared) -> list[list[int]]:
        """Of each choice.

        Raises:
            SettingError: one begins as another is, so that the shorter could never be less likely.
        """
        tokens = [self.processor.tokenizer(one, add_special_tokens=False)["input_ids"] for one in reading.classes]
        for one, choice in zip(tokens, reading.classes, strict=True):
            for other, longer in zip(tokens, reading.classes, strict=True):
                if choice != longer and other[: len(one)] == one:
                    raise SettingError(
                        f"The choice {choice!r} is how {longer!r} begins, and so is never less likely. Let the model "
                        "answer in words, or name them differently."
                    )
        return tokens

    def _seed_of(self, output: Any, question: str) -> int:
        """The same for the same features, so that a run that goes on gives what it would have given."""
        features = self.call.features(output)
        shown = b"".join(value.float().cpu().contiguous().numpy().tobytes() for value in features.values())
        mark = hashlib.sha256(f"{self.seed} {question}".encode() + shown).digest()
        return int.from_bytes(mark[:8], "big") >> 1

    def _inputs(self, question: str, rows: int) -> dict[str, Any]:
        """What the model is given for one question about so many images: read once, and repeated."""
        return {name: value.expand(rows, *value.shape[1:]) for name, value in self._encoded(question).items()}

    def _encoded_once(self, question: str) -> dict[str, Tensor]:
        return dict(about(self.processor, self.call, [question]).to(self.call.device, self.call.dtype))


class _Enough:
    """transformers asks it after every token, of each row, whether there are enough."""

    def __init__(self, tokenizer: Any, begins: int, reading: Reading) -> None:
        self.tokenizer, self.begins, self.reading = tokenizer, begins, reading

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        said = self.tokenizer.batch_decode(input_ids[:, self.begins :], skip_special_tokens=True)
        # The last character may be half of one.
        done = [not text.endswith("\ufffd") and self.reading.settled(text) for text in said]
        return torch.tensor(done, device=input_ids.device, dtype=torch.bool)
