"""What a model says of what its encoder shows: what an attacker wants to turn, and robust training to hold.

Shapes: B images, A places in their answers (a class is one place, a sentence as many as it has words), V words or
classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fs_plugins.head import Head
from fs_plugins.vision import VisionCall


@dataclass(frozen=True)
class Spoken:
    """What a model would say at every place of answers that are given.

    Args:
        log_probs: (A, V) logarithms of the words' probabilities.
        said: (A,) the words that the answers have there.
        image: (A,) whose answer the place belongs to, from 0.
        images: B.
    """

    log_probs: Tensor
    said: Tensor
    image: Tensor
    images: int

    def likelihood(self) -> Tensor:
        """(B,) log-probability of each image's whole answer."""
        return self._summed(self.log_probs.gather(1, self.said[:, None])[:, 0])

    def kept(self) -> Tensor:
        """(B,) whether each image's answer is the likeliest word by word."""
        return self._summed((self.log_probs.argmax(1) != self.said).long()) == 0

    def divergence(self, reference: Spoken) -> Tensor:
        """(B,) Kullback-Leibler divergence of this from a reference for the same answers, summed over their places."""
        return self._summed((reference.log_probs.exp() * (reference.log_probs - self.log_probs)).sum(1))

    def _summed(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.images).index_add(0, self.image, values)


@runtime_checkable
class Answers(Protocol):
    """A way to ask a model about images, by what its encoder shows of them. ``str()`` of it says what is asked.

    Args:
        modules: what answers are made by beside the encoder. Training freezes them.
    """

    @property
    def modules(self) -> tuple[nn.Module, ...]: ...

    def given(self, output: Any, keys: Sequence[object]) -> Any:
        """The answers that follow from an encoder's output, one row an image, for ``spoken`` alone to read.

        Args:
            output: as ``VisionCall.look`` and ``FeatureSmoother.look`` give it.
            keys: which images these are; what is asked may depend on it.
        """

    def spoken(self, output: Any, given: Any) -> Spoken:
        """What would be said of an encoder's output in the place of answers given. Gradients follow the output."""


@dataclass(frozen=True)
class Classes:
    """The answers of a head over classes.

    Args:
        call: whose embedded feature it reads.
        head: (B, E) -> (B, K) scores: a classifier's own, a linear layer's, or cosines to texts, scaled as logits are.
        name: what is asked, for people.
    """

    call: VisionCall
    head: Callable[[Tensor], Tensor]
    name: str = "classes"

    def __str__(self) -> str:
        return self.name

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        if isinstance(self.head, Head):
            return self.head.layers
        owner = getattr(self.head, "__self__", self.head)
        return (owner,) if isinstance(owner, nn.Module) else ()

    @torch.no_grad()
    def given(self, output: Any, keys: Sequence[object]) -> Tensor:
        """(B,) the classes with the largest scores."""
        return self._scores(output).argmax(-1)

    def spoken(self, output: Any, given: Tensor) -> Spoken:
        return Spoken(
            self._scores(output).log_softmax(-1), given, torch.arange(len(given), device=given.device), len(given)
        )

    def _scores(self, output: Any) -> Tensor:
        return self.head(self.call.embed(self.call.wide(output)))
