"""The models of the page: what each can do, and the one of them that is in memory."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor, nn

import fs_plugins
from fs_plugins import AnswerCertificate, FSPluginsWarning, PredictionCertificate, VisionCall
from fs_plugins.errors import ModelError, SettingError
from fs_plugins.evaluation.subjects import size_of
from fs_plugins.hf.chat import Answer, Comparison, compare
from fs_plugins.hf.classifier import zero_shot
from fs_plugins.hf.dialogue import pixels_of
from fs_plugins.hf.load import load_chat, load_model, place, source
from fs_plugins.hf.zeroshot import directions_of
from fs_plugins.pictures import to_unit
from fs_plugins.playground.state import State
from fs_plugins.psm import PSM

ZERO_SHOT_PROMPT = "a small white {} on the left"
"""What the choices of a zero-shot model stand in, until somebody writes another sentence."""


@dataclass(frozen=True)
class Facts:
    """What the page must know of a model to offer what it can do.

    Args:
        talks: whether it answers questions; else it takes the nearest of the choices.
        size: (H, W) that its encoder sees.
        sigma: the PSM's own noise level, in [0, 1] pixels.
        sigmas: the lowest and highest that the PSM allows.
        notes: what whoever enables it is warned of.
    """

    name: str
    talks: bool
    size: tuple[int, int]
    sigma: float
    sigmas: tuple[float, float]
    notes: tuple[str, ...] = ()


class Subject(Protocol):
    """A model of the page."""

    model: nn.Module
    call: VisionCall
    psm: PSM | None

    @property
    def talks(self) -> bool:
        """See ``Facts``."""

    def compare(self, image: Image.Image, question: str, state: State, sigma: float) -> Comparison:
        """The answer without and with the plugin."""

    def prove(
        self, image: Tensor, state: State, sigma: float, advance: Callable[[int], None]
    ) -> AnswerCertificate | PredictionCertificate:
        """How far (C, H, W) may move before the answer may change."""


def _psm(call: VisionCall, psm: str) -> PSM | None:
    return None if psm == "none" else fs_plugins.smoothers(call, psm=psm)[0].psm


class Talker:
    """An image-text-to-text model."""

    talks = True

    def __init__(self, name: str, psm: str) -> None:
        self.model, self.processor = load_chat(name)
        self.call = fs_plugins.vision_call(self.model, processor=pixels_of(self.processor))
        self.psm = _psm(self.call, psm)

    def compare(self, image: Image.Image, question: str, state: State, sigma: float) -> Comparison:
        return compare(
            self.model,
            self.processor,
            image,
            question,
            psm=self.psm,
            sigma=sigma,
            n0=state.n0,
            seed=state.seed,
        )

    def prove(self, image: Tensor, state: State, sigma: float, advance: Callable[[int], None]) -> AnswerCertificate:
        found = fs_plugins.certify_answers(
            self.model,
            self.processor,
            image[None],
            state.question,
            reading=state.reading,
            n=state.servings,
            psm=self.psm,
            sigma=sigma,
            seed=state.seed,
            advance=advance,
        )
        return found[0]


class Namer:
    """A model of images and texts that takes the nearest of some classes (CLIP, SigLIP)."""

    talks = False

    def __init__(self, name: str, psm: str) -> None:
        self.model, self.origin = load_model(name).to(place()), source(name)
        self.call = fs_plugins.vision_call(self.model)
        self.psm = _psm(self.call, psm)

    def compare(self, image: Image.Image, question: str, state: State, sigma: float) -> Comparison:
        classifier = zero_shot(self.model, state.classes, prompt=question, tokenizer=self.origin)
        pixels = to_unit(image)[None].to(self.call.device)

        @torch.no_grad()
        def answer() -> Answer:
            began = time.perf_counter()
            chances = classifier(pixels)[0].softmax(0)
            best = int(chances.argmax())
            said = f"{classifier.names[best]} ({100 * float(chances[best]):.0f} %)"
            return Answer(said, time.perf_counter() - began)

        without = answer()
        with fs_plugins.enable(self.model, psm=self.psm, sigma=sigma, n0=state.n0, seed=state.seed) as handle:
            return Comparison(without, answer(), handle.status())

    def prove(self, image: Tensor, state: State, sigma: float, advance: Callable[[int], None]) -> PredictionCertificate:
        found = fs_plugins.certify_predictions(
            self.model,
            image[None],
            directions_of(self.model, self.origin, state.classes, state.question),
            n=state.draws,
            psm=self.psm,
            sigma=sigma,
            seed=state.seed,
            advance=advance,
        )
        return found[0]


class Models:
    """Those that the page was started with. One of them is in memory.

    Args:
        names: as commands take them: folders, hub ids, ``"demo"``, ``"demo-clip"``, ``"photo-vlm"``.
        psm: as commands take it, for all of them.

    Raises:
        FSPluginsError: one cannot be loaded, or not smoothed.
    """

    def __init__(self, names: Iterable[str], psm: str = "auto") -> None:
        self.names, self.psm = tuple(dict.fromkeys(names)), psm
        if not self.names:
            raise SettingError("A page without a model shows nothing: name one.")
        self._held: tuple[str, Subject] | None = None
        self.facts: dict[str, Facts] = {}
        for name in reversed(self.names):  # the first stays
            self.facts[name] = self._facts(name)

    def about(self, name: str) -> Facts:
        """What is known of a model; of the first, if it has no name.

        Raises:
            SettingError: the page was not started with it.
        """
        found = self.facts.get(name or self.names[0])
        if found is None:
            raise SettingError(f"This page has no model {name[:80]!r}. It has: {', '.join(self.names)}.")
        return found

    def get(self, name: str) -> Subject:
        """The model, in the place of the one that was in memory. For who has the page's computer to themselves.

        Raises:
            SettingError: the page was not started with it.
        """
        wanted = self.about(name).name
        if self._held is None or self._held[0] != wanted:
            self._held = None  # gone before the other comes
            self._held = (wanted, _loaded(wanted, self.psm))
        return self._held[1]

    def sigma(self, state: State) -> float:
        """The noise level that a state speaks of.

        Raises:
            SettingError: there is no such model, or its PSM is for other levels.
        """
        facts = self.about(state.model)
        level = facts.sigma if state.sigma is None else state.sigma
        low, high = facts.sigmas
        if not low <= level <= high:
            raise SettingError(f"The PSM of {facts.name} is for sigma from {low:g} to {high:g}, not for {level:g}.")
        return level

    def _facts(self, name: str) -> Facts:
        self._held = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", FSPluginsWarning)
            subject = _loaded(name, self.psm)
        self._held = (name, subject)
        notes = dict.fromkeys(str(one.message) for one in caught if issubclass(one.category, FSPluginsWarning))
        config = None if subject.psm is None else subject.psm.config
        sigma, sigmas = (0.25, (0.01, 1.0)) if config is None else (config.sigma, config.sigma_range)
        return Facts(name, subject.talks, size_of(subject.call), sigma, sigmas, tuple(notes))


def _loaded(name: str, psm: str) -> Subject:
    try:
        return Talker(name, psm)
    except ModelError as error:
        with suppress(ModelError):
            found = Namer(name, psm)
            if hasattr(found.model, "get_text_features"):
                return found
        raise error
