"""The attack on the answer: it climbs what a head makes of the feature, not a similarity of features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fs_plugins.attacks.loop import Ascent
from fs_plugins.attacks.protocols import Objective, Optimiser
from fs_plugins.attacks.victim import Stream, Victim


@dataclass(frozen=True)
class Answer:
    """An ``Attack`` on a classifier's answer, by the cross-entropy of its classes (PGD; Madry et al., ICLR 2018).

    With targets it wants the class that the head finds in each; without, any class but the one that the head finds in
    the image itself. Features may stay alike while an answer changes, so a defence of answers has to stand this too.

    Args:
        head: (B, E) embedded features -> (B, K) class scores: a linear head, or the cosines to texts of a zero-shot
            classifier, on the victims' device. One for all victims.
        name: for tables.
        optimiser: along gradients, or ``Squares()`` without.
    """

    head: Callable[[Tensor], Tensor]
    name: str = "answer"
    optimiser: Optimiser = field(default_factory=Ascent)

    def objective(self, victims: Sequence[Victim], aims: Tensor, stream: Stream, sign: int) -> Objective:
        """The log-probability of the classes that the head finds in ``aims`` (sign 1), or its opposite (sign -1)."""
        wanted = [self.head(victim.see_plain(aims).embedding).argmax(-1, keepdim=True) for victim in victims]

        def climbed(images: Tensor, step: int, draw: int) -> Tensor:
            now = stream.at(step, draw)
            scores = [
                self.head(victim.see(images, now.at("noise", i)).embedding).log_softmax(-1).gather(-1, classes)[:, 0]
                for i, (victim, classes) in enumerate(zip(victims, wanted, strict=True))
            ]
            return sign * sum(scores[1:], scores[0]) / len(scores)

        return climbed
