"""The model that lmms-eval makes for ``--model fs_plugins``; imported by lmms-eval alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import eval_logger
from PIL import Image
from tqdm import tqdm

import fs_plugins
from fs_plugins.errors import SettingError
from fs_plugins.hf import lmms as ours
from fs_plugins.hf.dialogue import encode, generate, prompt
from fs_plugins.hf.load import load_chat
from fs_plugins.noise import Noise, NoiseScope
from fs_plugins.pictures import rgb


class SmoothedModel(lmms):
    """Any Hugging Face image-text-to-text model with a chat template, or LLaVA-1.5, behind ``fs_plugins.enable``.

    Args:
        pretrained: folder or hub id; "demo" and "photo-vlm" ship.
        smooth: False for the model as it is, to compare with.
        psm, sigma, n0, noise, noise_scope, seed, pin: see ``fs_plugins.hf.lmms.smooth``.
        dtype: as transformers names it; "auto" is the checkpoint's.
        device: by default accelerate's. With several processes it is always that.
        device_map: accelerate's, "auto" for a model that no device holds alone; instead of ``device``.
        batch_size: answers at a time.
        max_batch_size: lmms-eval passes it to every model; unused.

    ``str()`` of it is its arguments in full. lmms-eval's response cache has that in its key where a program passes the
    model itself, and what was typed where it makes the model.

    Raises:
        SettingError, ModelError and others of ``fs_plugins.enable``.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        *,
        smooth: bool = True,
        psm: str = "auto",
        sigma: float | str | None = None,
        n0: float = 4,
        noise: Noise = "antithetic",
        noise_scope: NoiseScope = "image",
        seed: float = 0,
        pin: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        device_map: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(smooth, bool):
            raise SettingError(f"smooth must be true or false, got {smooth!r}.")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise SettingError(f"batch_size must be a whole number from 1 on, got {batch_size!r}.")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        asked = torch.device(device) if device and self.world_size == 1 else self.accelerator.device
        self._model, self._processor = load_chat(str(pretrained), dtype=dtype, device=asked, device_map=device_map)
        self.device = self._model.device
        told = ours.arguments({"pretrained": pretrained, "dtype": dtype})
        if smooth:
            told += "," + ours.smooth(
                self._model,
                psm=psm,
                sigma=sigma,
                n0=n0,
                noise=noise,
                noise_scope=noise_scope,
                seed=seed,
                pin=pin,
            )
        elif pin is not None:
            raise SettingError("pin stands for a smoothing, and smooth=false has none. Leave one of them out.")
        else:
            told += ",smooth=false"
        self._told = told
        eval_logger.info(f"{ours.MODEL_ID}, arguments in full: {told}")

    def __repr__(self) -> str:
        return f"{ours.MODEL_ID}({self._told})"

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """An answer for each request, in their order.

        Raises:
            SettingError: a request has videos or sound in it.
        """
        answers = [""] * len(requests)
        settings = [request.args[2] for request in requests]
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding") as bar:
            for places in ours.batches(settings, self.batch_size):
                asked = {place: self._messages(*requests[place].args) for place in places}
                seeing = [place for place in places if asked[place][1]]
                blind = [place for place in places if not asked[place][1]]  # processors take images for all or for none
                for alike in filter(None, (seeing, blind)):
                    said = self._answer([asked[place] for place in alike], settings[alike[0]])
                    for place, text in zip(alike, said, strict=True):
                        answers[place] = text
                bar.update(len(places))
        eval_logger.info(str(fs_plugins.status(self._model)))
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            f"{ours.MODEL_ID} generates answers and scores none: lmms-eval's interface asks for log-probabilities here "
            "and its scorer for losses. Choose a task whose output_type is generate_until."
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError(
            f"{ours.MODEL_ID} answers one round. Choose a task whose output_type is generate_until."
        )

    def _messages(
        self, context: str, doc_to_messages: Any, settings: Any, document: Any, task: str, split: str
    ) -> tuple[list[dict[str, Any]], list[Any]]:
        """One request as messages for a chat template, and its images."""
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][document])).to_hf_messages()
        parts = [part for message in messages for part in message["content"]]
        others = sorted({part["type"] for part in parts} - {"text", "image"})
        if others:
            raise SettingError(f"Task {task} shows {' and '.join(others)}; {ours.MODEL_ID} takes images and text only.")
        return messages, [_picture(part["image"]) for part in parts if part["type"] == "image"]

    def _answer(self, asked: Sequence[tuple[list[dict[str, Any]], list[Any]]], settings: Any) -> list[str]:
        prompts = [prompt(self._processor, messages) for messages, _ in asked]
        inputs = encode(self._processor, prompts, [images for _, images in asked])
        said = generate(self._model, self._processor, inputs, **ours.generation(settings))
        return [ours.until(text, settings) for text in said]


def _picture(shown: Any) -> Image.Image:
    """What a task shows: a PIL image, a PNG or JPEG file, or what transformers fetches (an address, base64)."""
    if isinstance(shown, Image.Image):
        return shown
    if os.path.isfile(shown):
        return rgb(Path(shown))
    from transformers.image_utils import load_image

    return load_image(shown)
