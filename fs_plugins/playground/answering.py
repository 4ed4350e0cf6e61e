"""What the model says of a picture without and with the plugin, and what the plugin showed it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fs_plugins.demo.world import CAPTION_PROMPT
from fs_plugins.hf.chat import Comparison
from fs_plugins.noise import draws
from fs_plugins.pictures import to_pil
from fs_plugins.playground.models import Subject
from fs_plugins.playground.state import State
from fs_plugins.smoothing import FeatureSmoother


@dataclass(frozen=True, eq=False)
class Said:
    """Of one picture.

    Args:
        caption: None of a model that does not talk.
    """

    answer: Comparison
    caption: Comparison | None


@dataclass(frozen=True, eq=False)
class Views:
    """The n0 noisy copies that a serving is made of, (n0, C, H, W), and what the purifier made of them."""

    noisy: Tensor
    purified: Tensor


@dataclass(frozen=True)
class Cosines:
    """FCS: the cosine between what the model is given of the clean and of the attacked picture, without and with the
    plugin.
    """

    without: float
    smoothed: float


def said(subject: Subject, state: State, sigma: float, image: Tensor) -> Said:
    """The answers about (C, H, W) in [0, 1], multiples of 1/255.

    Raises:
        FSPluginsError: see ``fs_plugins.hf.compare`` and ``fs_plugins.zero_shot``.
    """
    shown = to_pil(image)
    answer = subject.compare(shown, state.question, state, sigma)
    return Said(answer, subject.compare(shown, CAPTION_PROMPT, state, sigma) if subject.talks else None)


@torch.no_grad()
def views(smoother: FeatureSmoother, image: Tensor) -> Views:
    """Those of the first picture that a smoother like this one serves; it must not have served any."""
    (generator,) = smoother.source.generators([image])
    noise = torch.stack(list(draws(generator, tuple(image.shape), smoother.noise, smoother.n0)))
    copies = image.expand(noise.shape)
    return Views(copies + smoother.sigma * noise, smoother.views(copies, noise))


@torch.no_grad()
def cosines(subject: Subject, plain: FeatureSmoother, other: FeatureSmoother, clean: Tensor, moved: Tensor) -> Cosines:
    """Between two pictures (C, H, W).

    Args:
        plain, other: smoothers that have served nothing, one for each picture.
    """
    call = subject.call
    bare = [call.embed(call.encode(image[None])) for image in (clean, moved)]
    served = [call.embed(one.smooth(image[None])) for one, image in ((plain, clean), (other, moved))]
    return Cosines(_cosine(bare), _cosine(served))


def _cosine(pair: list[Tensor]) -> float:
    one, other = (features.double().flatten() for features in pair)
    return float(torch.cosine_similarity(one, other, dim=0))
