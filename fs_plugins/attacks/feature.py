"""Attacks that make pictures alike, or unlike, as an encoder sees them: similarities, and what is climbed.

AttackVLM: Zhao et al., NeurIPS 2023 (arXiv 2305.16934), its MF-ii. M-Attack: Li et al. 2025 (arXiv 2503.10635).
FOA-Attack: Jia et al., NeurIPS 2025 (arXiv 2505.21494).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fs_plugins.attacks.crop import Crop
from fs_plugins.attacks.loop import Ascent
from fs_plugins.attacks.protocols import Objective, Optimiser
from fs_plugins.attacks.transport import centres, transported
from fs_plugins.attacks.victim import Seen, Stream, Victim
from fs_plugins.errors import ModelError


# Zhao et al. take CLIP's pooled feature, as a surrogate; here the victim's own consumed features are at hand.
def whole(one: Seen, other: Seen) -> Tensor:
    """Cosine of all that the model consumes."""
    return torch.cosine_similarity(one.embedding, other.embedding, dim=-1)


def pooled(one: Seen, other: Seen) -> Tensor:
    """Cosine of the pictures' pooled features."""
    return torch.cosine_similarity(one.pooled, other.pooled, dim=-1)


class NoTokensError(ModelError):
    """The attack compares tokens, and the encoder gives none."""


def pooled_and_parts(one: Seen, other: Seen) -> Tensor:
    """FOA-Attack's: cosine of the pooled features + .2 of the similarity of transported clusters of tokens.

    Raises:
        NoTokensError: the encoder shows none.
    """
    if one.tokens is None or other.tokens is None:
        raise NoTokensError(
            "FOA-Attack compares the tokens of pictures, and this encoder gives pooled vectors only. Take M-Attack, or "
            "make it give tokens (open_clip: model.visual.output_tokens = True)."
        )
    return pooled(one, other) + 0.2 * transported(centres(one.tokens), centres(other.tokens))


@dataclass(frozen=True)
class Method:
    """An ``Attack``: what it makes alike (or unlike), on which part of the pictures it looks, how it climbs.

    Args:
        name: for tables.
        similarity: of two pictures as one encoder sees them, (B,).
        crop: the law of the crops of both pictures, drawn afresh at every step; None looks at whole pictures.
        dynamic: whether an ensemble's members are weighed by how slowly they gave way at the last step.
        top: the largest value that the similarity can have.
        optimiser: along gradients, or ``Squares()`` without.
    """

    name: str
    similarity: Callable[[Seen, Seen], Tensor]
    crop: Crop | None = None
    dynamic: bool = False
    top: float = 1.0
    optimiser: Optimiser = field(default_factory=Ascent)

    def objective(self, victims: Sequence[Victim], aims: Tensor, stream: Stream, sign: int) -> Objective:
        """The images' similarity to ``aims`` (sign 1), or the opposite (sign -1); see ``Attack.objective``."""
        fixed = [victim.see_plain(aims) for victim in victims] if self.crop is None else None
        former: dict[int, Tensor] = {}
        # Scales that steps do not see keep the gradients of a half-precision encoder from vanishing.
        scale = 2.0**12 if any(victim.call.dtype == torch.float16 for victim in victims) else 1.0

        def climbed(images: Tensor, step: int, draw: int) -> Tensor:
            now = stream.at(step, draw)
            shown, wanted = images, fixed
            if self.crop is not None:
                shown = self.crop(images, now.at("crop"))
                seen_by = self.crop(aims, now.at("aim"))
                wanted = [victim.see_plain(seen_by) for victim in victims]
            assert wanted is not None
            pairs = zip(victims, wanted, strict=True)
            scores = torch.stack(
                [self.similarity(victim.see(shown, now.at("noise", i)), aim) for i, (victim, aim) in enumerate(pairs)]
            )
            weights = torch.ones_like(scores)
            if self.dynamic and len(victims) > 1:
                left = (self.top - sign * scores.detach()).clamp(min=1e-6)
                weights = len(scores) * torch.softmax(left / former.get(draw, left), dim=0)
                former[draw] = left
            return scale * sign * (weights * scores).mean(0)

        return climbed
