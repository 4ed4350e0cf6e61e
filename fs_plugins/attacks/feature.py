"""The field's three feature attacks, one loop and three similarities.

AttackVLM: Zhao et al., NeurIPS 2023 (arXiv 2305.16934), its MF-ii. M-Attack: Li et al. 2025 (arXiv 2503.10635).
FOA-Attack: Jia et al., NeurIPS 2025 (arXiv 2505.21494).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fs_plugins.attacks.ball import Ball, Norm
from fs_plugins.attacks.crop import Crop
from fs_plugins.attacks.loop import Objective, ascend
from fs_plugins.attacks.transport import centres, transported
from fs_plugins.attacks.victim import Attackable, Seen, Stream, Victim, victims
from fs_plugins.errors import ModelError, SettingError


@dataclass(frozen=True)
class Method:
    """An attack: what it makes alike (or unlike), and on which part of the pictures it looks.

    Args:
        name: for tables.
        similarity: of two pictures as one encoder sees them, (B,).
        crop: the law of the crops of both pictures, drawn afresh at every step; None looks at whole pictures.
        dynamic: whether an ensemble's members are weighed by how slowly they gave way at the last step.
        top: the largest value that the similarity can have.
    """

    name: str
    similarity: Callable[[Seen, Seen], Tensor]
    crop: Crop | None = None
    dynamic: bool = False
    top: float = 1.0


# Zhao et al. take CLIP's pooled feature, as a surrogate; here the victim's own consumed features are at hand.
def whole(one: Seen, other: Seen) -> Tensor:
    """Cosine of all that the model consumes."""
    return torch.cosine_similarity(one.embedding, other.embedding, dim=-1)


def pooled(one: Seen, other: Seen) -> Tensor:
    """Cosine of the pictures' pooled features."""
    return torch.cosine_similarity(one.pooled, other.pooled, dim=-1)


def pooled_and_parts(one: Seen, other: Seen) -> Tensor:
    """FOA-Attack's: cosine of the pooled features + .2 of the similarity of transported clusters of tokens.

    Raises:
        ModelError: the encoder shows no tokens.
    """
    if one.tokens is None or other.tokens is None:
        raise ModelError(
            "FOA-Attack compares the tokens of pictures, and this encoder gives pooled vectors only. Take M-Attack, or make it "
            "give tokens (open_clip: model.visual.output_tokens = True)."
        )
    return pooled(one, other) + 0.2 * transported(centres(one.tokens), centres(other.tokens))


METHODS = {
    "attackvlm": Method("AttackVLM", whole),
    "m-attack": Method("M-Attack", pooled, Crop()),
    "foa": Method("FOA-Attack", pooled_and_parts, Crop(), dynamic=True, top=1.2),
}


def attack(
    model: Attackable | Sequence[Attackable],
    images: Tensor,
    targets: Tensor | None = None,
    *,
    method: str | Method = "attackvlm",
    norm: Norm = "linf",
    eps: float = 16 / 255,
    step_size: float | None = None,
    steps: int = 300,
    draws: int = 1,
    seed: int = 0,
    names: Sequence[object] | None = None,
    batch_size: int = 32,
    report: Callable[[int], Any] | None = None,
) -> Tensor:
    """Move images so that an encoder takes them for others, or no longer for themselves.

    White-box on ``model``. Memory is bounded: activations are computed again rather than kept. The features aimed at are
    the plain encoder's.

    Args:
        model: what is attacked, and with it what the attacker knows:

            - a model: what it serves. Where smoothing is enabled on it, the attack is adaptive and goes through it; where
              it is not, its plain encoder is attacked.
            - a VisionCall (``fs_plugins.vision_call(model)``): the plain encoder, whatever smoothing is enabled on the
              model. Of a protected model this attack is oblivious, and a robustness that was measured by it flatters.
            - a FeatureSmoother (one of ``fs_plugins.smoothers(model)``): adaptive. Gradients go through noise, purifier,
              encoder, mapper and average, with fresh draws at every step.
            - a sequence of these: an ensemble of surrogates, whose mean is climbed.
        images: (B, C, H, W) in [0, 1]. An encoder of another size sees them resized.
        targets: (B, C, H, W) in [0, 1], what the images shall be taken for; None attacks without a target, away from the
            image itself.
        method: ``"attackvlm"``, ``"m-attack"``, ``"foa"``, or a Method of your own.
        norm, eps: the ball, see ``Ball``.
        step_size, steps: see ``ascend``; the papers take 300 steps of 1/255.
        draws: gradients are averaged over so many draws of noise and crops at every step (EOT). For an adaptive attack,
            more is stronger.
        seed: of crops, noise and random starts.
        names: a key for each image; its randomness follows from seed and key alone. Positions by default.
        batch_size: images at once; the result does not depend on it, up to rounding.
        report: called with the number of images after each of their steps.

    Returns:
        (B, C, H, W) attacked images, in the ball and in [0, 1].

    Raises:
        SettingError: a value out of range, an unknown method, or shapes that do not match.
        ModelError: no encoder, one that the method cannot attack, or a model that no adapter claims.
        PluginError: see its docstring.
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise SettingError(f"There is no attack {method!r}. The attacks are: {', '.join(METHODS)}.")
        method = METHODS[method]
    ball, several = Ball(norm, eps), victims(model)
    if images.ndim != 4 or (targets is not None and targets.shape != images.shape):
        other = "" if targets is None else f" and targets {tuple(targets.shape)}"
        raise SettingError(f"images and targets must both be (B, C, H, W), got {tuple(images.shape)}{other}.")
    for what, given in (("images", images), ("targets", targets)):
        if given is not None and len(given) and not (given.min() >= 0 and given.max() <= 1):
            raise SettingError(
                f"{what} must be in [0, 1], got {given.min():.3g} to {given.max():.3g}. Undo the model's normalisation first."
            )
    keys = tuple(range(len(images))) if names is None else tuple(names)
    if len(keys) != len(images):
        raise SettingError(f"names must have a key for each of {len(images)} images, got {len(keys)}.")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise SettingError(f"batch_size must be a whole number >= 1, got {batch_size!r}.")
    done = []
    for first in range(0, len(images), batch_size):
        part = slice(first, first + batch_size)
        stream, some = Stream((seed,), keys[part]), images[part]
        aims = some if targets is None else targets[part]
        objective = climbed(method, several, aims, stream, -1 if targets is None else 1)
        done.append(
            ascend(
                objective,
                some,
                ball=ball,
                step_size=step_size,
                steps=steps,
                draws=draws,
                start=_beside(some, ball, stream) if targets is None else None,
                report=None if report is None else partial(_moved, report, len(some)),
            )
        )
    return torch.cat(done) if done else images


def _moved(report: Callable[[int], Any], images: int, step: int) -> None:
    report(images)


def climbed(method: Method, several: Sequence[Victim], aims: Tensor, stream: Stream, sign: int) -> Objective:
    """What an attack climbs: the images' similarity to ``aims`` (sign 1), or the opposite (sign -1)."""
    fixed = [victim.see_plain(aims) for victim in several] if method.crop is None else None
    former: dict[int, Tensor] = {}
    # Scales that steps do not see keep the gradients of a half-precision encoder from vanishing.
    scale = 2.0**12 if any(victim.call.dtype == torch.float16 for victim in several) else 1.0

    def objective(images: Tensor, step: int, draw: int) -> Tensor:
        now = stream.at(step, draw)
        shown, wanted = images, fixed
        if method.crop is not None:
            shown = method.crop(images, now.at("crop"))
            seen_by = method.crop(aims, now.at("aim"))
            wanted = [victim.see_plain(seen_by) for victim in several]
        assert wanted is not None
        pairs = zip(several, wanted, strict=True)
        scores = torch.stack(
            [method.similarity(victim.see(shown, now.at("noise", i)), aim) for i, (victim, aim) in enumerate(pairs)]
        )
        weights = torch.ones_like(scores)
        if method.dynamic and len(several) > 1:
            left = (method.top - sign * scores.detach()).clamp(min=1e-6)
            weights = len(scores) * torch.softmax(left / former.get(draw, left), dim=0)
            former[draw] = left
        return scale * sign * (weights * scores).mean(0)

    return objective


def _beside(images: Tensor, ball: Ball, stream: Stream) -> Tensor:
    """A little off the images, where the gradient of their similarity to themselves is not zero."""
    generators = stream.at("start").generators(images)
    off = torch.stack(
        [
            torch.randn(image.shape, generator=generator, device=image.device)
            for image, generator in zip(images, generators, strict=True)
        ]
    )
    return images + ball.eps / 10 * ball.steepest(off.to(images.dtype))
