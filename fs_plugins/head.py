"""A classifier's own head: class scores that are affine in the embedded feature.

Shapes: N rows, E the width of the embedded feature, K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fs_plugins.errors import ModelError
from fs_plugins.identity import is_readable

__all__ = ["Head"]


@dataclass(frozen=True)
class Head:
    """What a classifier makes its scores by: a linear layer, or the mean of several on parts of the embedded feature.

    Args:
        layers: (N, E), or a part of it -> (N, K); affine in eval mode.
        width: E.
        parts: what each layer sees of the embedded feature, where not each sees all of it.
        labels: the K classes' names, where they have any.
    """

    layers: tuple[nn.Module, ...]
    width: int
    parts: tuple[slice, ...] = ()
    labels: tuple[str, ...] = ()

    @classmethod
    def of(cls, linear: nn.Linear) -> Head:
        """The head that is one linear layer on the whole embedded feature."""
        return cls((linear,), linear.in_features)

    def __call__(self, embedded: Tensor) -> Tensor:
        """(N, E), of the layers' type -> (N, K) class scores, by the layers themselves. Gradients follow."""
        return self._scores(self.layers, embedded)

    @torch.no_grad()
    def affine(self) -> tuple[Tensor, Tensor]:
        """Weight (K, E) and bias (K,), in double precision on the CPU: scores = weight @ feature + bias.

        Raises:
            ModelError: the layers' weights are quantised, sharded or offloaded, or they are not affine.
        """
        if not all(is_readable(layer) for layer in self.layers):
            raise ModelError(
                "The weights of this model's head are quantised, sharded or offloaded, so nothing can be proved of its "
                "labels. Keep the head out of the quantisation, or pass directions=<its nn.Linear>."
            )
        layers = [copy.deepcopy(layer).to("cpu", torch.float64).eval() for layer in self.layers]
        bias = self._scores(layers, torch.zeros(1, self.width, dtype=torch.float64, device="cpu"))
        weight = (self._scores(layers, torch.eye(self.width, dtype=torch.float64, device="cpu")) - bias).T
        probe = torch.linspace(-1, 1, self.width, dtype=torch.float64, device="cpu")[None]
        if not torch.allclose(self._scores(layers, probe), probe @ weight.T + bias, rtol=1e-6, atol=1e-9):
            raise ModelError("This model's head is not affine in the embedded feature, so nothing is proved of it.")
        return weight.contiguous(), bias[0]

    def linear(self) -> nn.Linear:
        """The same as one layer, in single precision on the CPU.

        Raises:
            ModelError: see ``affine``.
        """
        weight, bias = self.affine()
        classes, width = weight.shape
        layer = nn.Linear(width, classes, device="cpu", dtype=torch.float32).requires_grad_(False)
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
        return layer

    def _scores(self, layers: Sequence[nn.Module], embedded: Tensor) -> Tensor:
        parts = self.parts or (slice(None),) * len(layers)
        return torch.stack([layer(embedded[:, part]) for layer, part in zip(layers, parts, strict=True)]).mean(0)
