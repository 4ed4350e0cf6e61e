"""What a PSM's parts are, and what they may do beside it. A plugin's classes get all that ours get: nobody is asked for
their class or base class, only for these methods.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Purifier(Protocol):
    """Takes noise off pictures. An ``nn.Module`` whose ``forward`` is this call."""

    def __call__(self, images: Tensor, sigma: float | Tensor) -> Tensor:
        """(N, 3, H, W) noisy images, unclamped, in [0, 1] pixel units, and their noise level -> purified images."""
        ...


@runtime_checkable
class Mapper(Protocol):
    """Refines features. An ``nn.Module`` whose ``forward`` is this call and whose constructor takes ``width``."""

    def __call__(self, z: Tensor, sigma: float | Tensor) -> Tensor:
        """(N, L, D) tokens or (N, D) pooled vectors, and the pictures' noise level -> features of the same shape."""
        ...


@runtime_checkable
class Denoises(Protocol):
    """A purifier with a loss of its own, which training minimises beside the others (l_diff, eq. 9)."""

    def denoising_loss(self, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """The loss, a scalar.

        Args:
            clean: (N, 3, H, W) images in [0, 1].
            noise: standard normal, of the same shape.
            level: (N,) uniform numbers in [0, 1) that choose a step of its diffusion.
        """
        ...


@runtime_checkable
class Calibrates(Protocol):
    """A mapper that sets its initial scale by the features it will see."""

    def calibrate(self, z: Tensor, sigma: float) -> None:
        """Begin at a scale that suits (N, L, D) or (N, D) features of noisy pictures at this noise level."""
        ...
