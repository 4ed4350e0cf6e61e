"""Where an attack may go: an l-inf or l2 ball around each image, inside [0, 1]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fs_plugins.checks import is_number
from fs_plugins.errors import SettingError

Norm = Literal["linf", "l2"]


@dataclass(frozen=True)
class Ball:
    """All images within ``eps`` of an image, in [0, 1] pixel units.

    Args:
        norm: ``"linf"``, where eps is the most that one pixel value changes, or ``"l2"``, where it is the length of the
            whole change.
        eps: in (0, 1] for l-inf; any positive length for l2.

    Raises:
        SettingError: eps out of range.
    """

    norm: Norm = "linf"
    eps: float = 16 / 255

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise SettingError(f"norm must be one of {get_args(Norm)}, got {self.norm!r}.")
        if self.norm == "linf":
            check_distance("eps", self.eps)
        elif not (is_number(self.eps) and self.eps > 0):
            raise SettingError(f"eps is an l2 distance in [0, 1] pixel units and must be above 0, got {self.eps!r}.")

    def project(self, images: Tensor, centres: Tensor) -> Tensor:
        """(B, C, H, W) images -> those of the balls around ``centres``, in [0, 1], that are nearest by clipping."""
        if self.norm == "linf":
            return images.clamp((centres - self.eps).clamp(0, 1), (centres + self.eps).clamp(0, 1))
        change = images - centres
        length = change.flatten(1).double().norm(dim=1).view(-1, *[1] * (images.ndim - 1))
        inside = self.eps * (1 - 1e-6)  # single precision rounds each of many pixels
        shorter = change * (inside / length.clamp(min=inside)).to(change.dtype)
        # Clipping to [0, 1] only shortens a change, for the centres are in [0, 1].
        return (centres + shorter).clamp(0, 1)

    def steepest(self, slope: Tensor) -> Tensor:
        """The gradient (B, C, H, W) of an objective -> the direction of length 1 in this norm that climbs fastest."""
        if self.norm == "linf":
            return slope.sign()
        length = slope.flatten(1).norm(dim=1).view(-1, *[1] * (slope.ndim - 1))
        return torch.where(length > 0, slope / length.where(length > 0, 1.0), 0.0)


def check_distance(name: str, value: float) -> None:
    """Refuse an l-inf distance outside (0, 1], and guess what was meant."""
    if not (is_number(value) and 0 < value <= 1):
        hint = f"; did you mean {value:g}/255?" if is_number(value) and 1 < value <= 255 else ""
        raise SettingError(f"{name} is in [0, 1] pixel units and must be in (0, 1], got {value!r}{hint}")
