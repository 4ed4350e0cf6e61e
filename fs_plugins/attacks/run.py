"""The door that every attack comes by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fs_plugins import checks
from fs_plugins.attacks.ball import Ball, Norm
from fs_plugins.attacks.methods import attack_of
from fs_plugins.attacks.protocols import Attack, Objective, Search
from fs_plugins.attacks.victim import Attackable, Stream, victims
from fs_plugins.errors import SettingError
from fs_plugins.pictures import Picture
from fs_plugins.vision import VisionCall

JUDGED = 3
"""Draws that several starts are compared by, beside those of a step."""


def attack(
    model: Attackable | Sequence[Attackable],
    images: Picture | Iterable[Picture],
    targets: Picture | Iterable[Picture] | None = None,
    *,
    method: str | Attack = "attackvlm",
    norm: Norm = "linf",
    eps: float = 16 / 255,
    step_size: float | None = None,
    steps: int = 300,
    draws: int = 1,
    restarts: int = 1,
    seed: int = 0,
    names: Sequence[object] | None = None,
    batch_size: int = 32,
    report: Callable[[int], object] | None = None,
) -> Tensor:
    """Move images so that an encoder takes them for others, or no longer for themselves.

    White-box on ``model``. Memory is bounded: activations are computed again rather than kept. The features aimed at
    are the plain encoder's.

    Args:
        model: what is attacked, and with it what the attacker knows:

            - a model: what it serves. Where smoothing is enabled on it, the attack is adaptive and goes through it;
              where it is not, its plain encoder is attacked.
            - a VisionCall (``fs_plugins.vision_call(model)``): the plain encoder, whatever smoothing is enabled on the
              model. Of a protected model this attack is oblivious, and a robustness that was measured by it flatters.
            - a FeatureSmoother (one of ``fs_plugins.smoothers(model)``): adaptive. Gradients go through noise,
              purifier, encoder, mapper and average, with fresh draws at every step.
            - a sequence of these: an ensemble of surrogates, whose mean is climbed.
        images: (B, C, H, W) floats in [0, 1], as a tensor or a numpy array; a PIL image; or a list of PIL images or of
            (C, H, W), of one size. An encoder of another size sees them resized.
        targets: the same, of the same shape, what the images shall be taken for; None attacks without a target, away
            from the image itself.
        method: ``"attackvlm"``, ``"m-attack"``, ``"foa"``, ``"square"`` (without gradients, l-inf only), one of a
            plugin's (the hook ``fs_attacks``), or an Attack of your own, such as a ``Method``.
        norm, eps: the ball, see ``Ball``.
        step_size, steps: see ``ascend``; the papers take 300 steps of 1/255. The steps of ``"square"`` are its queries,
            of which it needs thousands, and it has no step_size.
        draws: every step averages over so many draws of noise and crops (EOT). For an adaptive attack, more is
            stronger.
        restarts: how often each image is attacked, from a start of its own; the best of these is kept.
        seed: of crops, noise and random starts.
        names: a key for each image; its randomness follows from seed and key alone. Positions by default.
        batch_size: images at once; the result does not depend on it, up to rounding.
        report: called with the number of images after each of their steps, of every start.

    Returns:
        (B, C, H, W) attacked images, in the ball and in [0, 1].

    Raises:
        SettingError: a value out of range or not for this method, an unknown method, shapes that do not match, or
            gradients inside ``torch.inference_mode``.
        ModelError: no encoder, one that the method cannot attack, one in training mode, or a model that no adapter
            claims.
        PluginError: see its docstring.
    """
    chosen, several = attack_of(method), victims(model)
    search = Search(Ball(norm, eps), steps, draws, step_size, targets is not None, report)
    shown = several[0].call.batch("images", images)
    aims, sign = (shown, -1) if targets is None else (aims_of(several[0].call, targets, shown), 1)
    seed, batch_size = checks.seed(seed), checks.whole("batch_size", batch_size)
    restarts = checks.whole("restarts", restarts)
    keys = keys_of(names, len(shown))
    done = []
    for first in range(0, len(shown), batch_size):
        part = slice(first, first + batch_size)
        stream = Stream((seed, *chosen.optimiser.marks), keys[part])
        found = []
        for start in range(restarts):
            own = stream.at("restart", start) if start else stream
            objective = chosen.objective(several, aims[part], own, sign)
            found.append(chosen.optimiser(objective, shown[part], replace(search, start=start), own))
        if restarts > 1:
            judged = chosen.objective(several, aims[part], stream.at("best"), sign)
            done.append(_best(judged, found, search.draws))
        else:
            done += found
    return torch.cat(done) if done else shown


def keys_of(names: Sequence[object] | None, count: int) -> tuple[object, ...]:
    """A key for each of so many images: their names, or their positions.

    Raises:
        SettingError: there is another number of names.
    """
    keys = tuple(range(count)) if names is None else tuple(names)
    if len(keys) != count:
        raise SettingError(f"names must have a key for each of {count} images, got {len(keys)}.")
    return keys


@torch.no_grad()
def _best(objective: Objective, found: Sequence[Tensor], draws: int) -> Tensor:
    """Of several attacks on the same images (B, C, H, W) each image's best, by draws that none of them has seen."""
    scores = [sum(objective(images, 0, draw) for draw in range(draws + JUDGED)) for images in found]
    place = torch.stack(scores).argmax(0)  # type: ignore[arg-type]
    return torch.stack(list(found))[place, torch.arange(len(place), device=place.device)]


def aims_of(call: VisionCall, targets: Picture | Iterable[Picture], images: Tensor) -> Tensor:
    """What images (B, C, H, W) are to be taken for, of their shape and where the encoder is.

    Raises:
        SettingError: see ``pictures.batch``; or another shape.
    """
    aims = call.batch("targets", targets)
    if aims.shape != images.shape:
        raise SettingError(
            f"images and targets must both be (B, C, H, W), got {tuple(images.shape)} and targets {tuple(aims.shape)}."
        )
    return aims
