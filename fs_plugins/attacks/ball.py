"""Where an attack may go: an l-inf or l2 ball around each image, inside [0, 1]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fs_plugins import checks
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
        checks.settle(self, eps=self.length("eps", self.eps))

    def length(self, name: str, value: float) -> float:
        """A positive length in this norm, within [0, 1] for l-inf.

        Raises:
            SettingError: it is none.
        """
        if self.norm == "l2":
            expected = f"{name} is an l2 distance in [0, 1] pixel units and must be above 0"
            return checks.number(expected, value, lambda found: found > 0)
        found = checks.plain(value)
        if found is None or not 0 < found <= 1:
            hint = f"; did you mean {found:g}/255?" if found is not None and 1 < found <= 255 else ""
            raise SettingError(
                f"{name} is in [0, 1] pixel units and must be in (0, 1], got {checks.shown(value)}{hint}"
            )
        return float(found)

    def project(self, images: Tensor, centres: Tensor) -> Tensor:
        """(B, C, H, W) images -> those of the balls around ``centres``, in [0, 1], that are nearest by clipping."""
        return project(self.norm, self.eps, images, centres)

    def steepest(self, slope: Tensor) -> Tensor:
        """The gradient (B, C, H, W) of an objective -> the direction of length 1 in this norm that climbs fastest."""
        if self.norm == "linf":
            return slope.sign()
        length = slope.flatten(1).norm(dim=1).view(-1, *[1] * (slope.ndim - 1))
        return torch.where(length > 0, slope / length.where(length > 0, 1.0), 0.0)


def project(norm: Norm, eps: float | Tensor, images: Tensor, centres: Tensor) -> Tensor:
    """``Ball.project``, also with a radius for each image: eps is then (B, 1, 1, 1)."""
    if norm == "linf":
        return images.clamp((centres - eps).clamp(0, 1), (centres + eps).clamp(0, 1))
    change = images - centres
    length = change.flatten(1).double().norm(dim=1).view(-1, *[1] * (images.ndim - 1))
    inside = torch.as_tensor(eps, dtype=length.dtype, device=length.device) * (1 - 1e-6)  # singles round many pixels
    shorter = change * (inside / length.maximum(inside).clamp_min(1e-30)).to(change.dtype)
    # Clipping to [0, 1] only shortens a change, for the centres are in [0, 1].
    return (centres + shorter).clamp(0, 1)


def radius(text: str, norm: Norm = "linf") -> float:
    """A radius in [0, 1] pixel units, as people write it: ``"16/255"`` or ``"0.05"``.

    Raises:
        SettingError: it is none in this norm.
    """
    try:
        over, _, under = text.partition("/")
        value = float(over) / float(under or 1)  # a Fraction would write out the zeros of 1e999999999
    except (ValueError, ZeroDivisionError, OverflowError):
        raise SettingError(f"--eps is a number such as 16/255 or 0.05, got {text!r}.") from None
    return Ball(norm, value).eps
