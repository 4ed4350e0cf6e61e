"""The attack on the answer: it climbs what a model makes of the feature, not a similarity of features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fs_plugins.answers import Answers, Classes
from fs_plugins.attacks.loop import Ascent
from fs_plugins.attacks.protocols import Objective, Optimiser
from fs_plugins.attacks.victim import Stream, Victim


@dataclass(frozen=True)
class Answer:
    """An ``Attack`` on what a model says, by the cross-entropy of its answer (PGD; Madry et al., ICLR 2018).

    With targets it wants the answer that the plain model gives to each; without, any but the one that it gives to the
    image itself. Features may stay alike while an answer changes, so a defence of answers has to stand this too.

    Args:
        head: (B, E) embedded features -> (B, K) class scores: a linear head, or the cosines to texts of a zero-shot
            classifier, on the victims' device; or an ``Answers``, such as a language model's
            (``fs_plugins.hf.speech.Speech``). One for all victims.
        name: for tables.
        optimiser: along gradients, or ``Squares()`` without.
    """

    head: Callable[[Tensor], Tensor] | Answers
    name: str = "answer"
    optimiser: Optimiser = field(default_factory=lambda: Ascent(momentum=0.75))

    def objective(self, victims: Sequence[Victim], aims: Tensor, stream: Stream, sign: int) -> Objective:
        """The log-probability of the answers that the plain model gives to ``aims`` (sign 1), or its opposite."""
        said = [self._answers(victim) for victim in victims]
        wanted = [
            answers.given(victim.see_plain(aims).output, stream.keys)
            for victim, answers in zip(victims, said, strict=True)
        ]

        def climbed(images: Tensor, step: int, draw: int) -> Tensor:
            now = stream.at(step, draw)
            scores = [
                answers.spoken(victim.see(images, now.at("noise", i)).output, given).likelihood()
                for i, (victim, answers, given) in enumerate(zip(victims, said, wanted, strict=True))
            ]
            return sign * sum(scores[1:], scores[0]) / len(scores)

        return climbed

    def _answers(self, victim: Victim) -> Answers:
        return self.head if isinstance(self.head, Answers) else Classes(victim.call, self.head)
