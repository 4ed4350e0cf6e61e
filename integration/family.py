"""What the conformance kit needs to know of one small real model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from packaging.version import Version
from torch import Tensor, nn
from versions import INSTALLED

Inputs = dict[str, Any]


def logits(model: nn.Module, inputs: Inputs) -> Tensor:
    return model(**inputs).logits


@dataclass(frozen=True)
class Family:
    """One small model, how to ask it about images in [0, 1], and what the images do to its answer."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module, Tensor], Inputs]
    image_size: tuple[int, int] = (16, 16)
    outcome: Callable[[nn.Module, Inputs], Tensor] = logits
    generate: Callable[[nn.Module, Inputs], Tensor] | None = None
    #: Whether it is not smooth.
    kinks: bool = False
    #: The package that it is run where it is installed, beside transformers.
    needs: str = "transformers"
    #: The first transformers it works on, or None if 4.57.6 is one.
    since: str | None = None
    #: How often one greedy generation, with the cache on, runs the vision module.
    calls_per_generate: int = 1

    @property
    def runs_here(self) -> bool:
        """Whether the transformers that is installed has it."""
        return self.since is None or Version(self.since) <= INSTALLED
