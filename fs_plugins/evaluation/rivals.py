"""What one would pick instead of smoothing: transformations of the input, as purifiers of pictures without noise.

They come in as a stranger's would, by the hook ``fs_purifiers``. An adaptive attacker gets the honest gradient of each:
the true one where there is one, else the identity's (``straight_through``).
"""

from __future__ import annotations

import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from fs_plugins import checks
from fs_plugins.errors import SettingError
from fs_plugins.hooks import hookimpl, plugin_manager, register
from fs_plugins.pictures import through_jpeg
from fs_plugins.plugins import plugin_parts
from fs_plugins.psm import PSM, Part, PSMConfig

TRANSFORMATIONS = {
    "jpeg-75": Part(kind="jpeg", args={"quality": 75}),
    "jpeg-50": Part(kind="jpeg", args={"quality": 50}),
    "median-filter": Part(kind="median-filter", args={"width": 3}),
    "bit-depth": Part(kind="bit-depth", args={"bits": 3}),
    "total-variation": Part(kind="total-variation", args={"weight": 0.1}),
}
"""By the names that ``Smoothing.psm`` knows them by."""


def transformation(name: str) -> PSM:
    """One of ``TRANSFORMATIONS`` as a PSM without mappers, for any encoder, at any resolution, without noise.

    Raises:
        SettingError: there is none of this name.
        PSMError, PluginError: a plugin has taken its purifier's kind.
    """
    if name not in TRANSFORMATIONS:
        raise SettingError(f"There is no transformation {name!r}. There are: {', '.join(TRANSFORMATIONS)}.")
    known, here = plugin_manager(), sys.modules[__name__]
    if not known.is_registered(here):
        register(known, here, __name__)
    config = PSMConfig(
        name=name,
        sigma=0.0,
        sigma_range=(0.0, 0.0),
        image_size=None,
        purifier=TRANSFORMATIONS[name],
        encoder="any",
        fingerprint=(),
    )
    return PSM(config, **plugin_parts())


@hookimpl
def fs_purifiers() -> dict[str, type[nn.Module]]:
    return {
        "jpeg": JPEG,
        "median-filter": MedianFilter,
        "bit-depth": BitDepth,
        "total-variation": TotalVariation,
    }


def straight_through(images: Tensor, served: Tensor) -> Tensor:
    """``served``, bit for bit, with the gradient of ``images``.

    That is how an attacker goes through what has no gradient but stays near its input (BPDA with the identity; Athalye,
    Carlini & Wagner, ICML 2018, section 4.1).
    """
    return served.detach() + (images - images.detach())


class JPEG(nn.Module):
    """Pillow's JPEG and back (Guo et al., ICLR 2018); straight-through.

    Args:
        quality: Pillow's, from 1 to 95.

    Raises:
        SettingError: another quality.
    """

    def __init__(self, quality: int) -> None:
        super().__init__()
        self.quality = _upto("quality of a JPEG", quality, 95)

    def forward(self, images: Tensor, sigma: float | Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] -> what is decoded, multiples of 1/255. They are rounded to 8 bits before."""
        eight = (images.detach().clamp(0, 1) * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
        read = [np.array(through_jpeg(Image.fromarray(pixels), self.quality)) for pixels in eight]
        decoded = [torch.from_numpy(pixels).permute(2, 0, 1) for pixels in read]
        return straight_through(images, torch.stack(decoded).to(images) / 255)


class MedianFilter(nn.Module):
    """The median of each pixel's neighbourhood, channel by channel, edges repeated (Xu et al., NDSS 2018).

    Its gradient is the true one: that of the pixel which is the median.

    Args:
        width: of the square neighbourhood, odd, at most 31.

    Raises:
        SettingError: another width.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = _upto("width of a median filter", width, 31)
        if self.width % 2 == 0:
            raise SettingError(f"width of a median filter must be odd, got {width}.")

    def forward(self, images: Tensor, sigma: float | Tensor) -> Tensor:
        """(N, 3, H, W) -> the same shape."""
        padded = F.pad(images, [self.width // 2] * 4, mode="replicate")
        windows = padded.unfold(2, self.width, 1).unfold(3, self.width, 1)
        return windows.flatten(4).median(dim=-1).values


class BitDepth(nn.Module):
    """Fewer levels of each colour (feature squeezing; Xu et al., NDSS 2018, section III.A); straight-through.

    Args:
        bits: a channel, from 1 to 8.

    Raises:
        SettingError: another number.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = _upto("bits a channel", bits, 8)

    def forward(self, images: Tensor, sigma: float | Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] -> multiples of 1 / (2^bits - 1)."""
        most = 2**self.bits - 1
        return straight_through(images, (images.detach().clamp(0, 1) * most).round() / most)


class TotalVariation(nn.Module):
    """Of all pictures u the one that minimises |u - x|^2 / 2 + weight TV(u) (Rudin, Osher & Fatemi, Physica D, 1992).

    Guo et al. (ICLR 2018) defend by it. TV is isotropic, channel by channel. It is found as x - weight div p by
    Chambolle's dual problem (Journal of Mathematical Imaging and Vision, 2004), |p| <= 1, with the fast gradient
    projection of Beck & Teboulle (IEEE Transactions on Image Processing, 2009). The gradient is the true one of all
    steps.

    Args:
        weight: of the total variation beside half the squared distance, in [0, 1] pixels.
        steps: of the projection, at most 1,000.

    Raises:
        SettingError: another weight or number of steps.
    """

    def __init__(self, weight: float, steps: int = 25) -> None:
        super().__init__()
        self.weight = checks.number("weight of the total variation must be > 0", weight, lambda found: found > 0)
        self.steps = _upto("steps of the total variation", steps, 1000)

    def forward(self, images: Tensor, sigma: float | Tensor) -> Tensor:
        """(N, 3, H, W) -> the same shape."""
        p = ahead = (torch.zeros_like(images), torch.zeros_like(images))
        pace = 1.0
        for _ in range(self.steps):
            before, p = p, self._projected(images, *ahead)
            pace, last = (1 + math.sqrt(1 + 4 * pace**2)) / 2, pace
            push = (last - 1) / pace
            ahead = (p[0] + push * (p[0] - before[0]), p[1] + push * (p[1] - before[1]))
        return images - self.weight * divergence(*p)

    def _projected(self, images: Tensor, down: Tensor, across: Tensor) -> tuple[Tensor, Tensor]:
        """One step from p; 8 bounds the squared norm of the gradient."""
        slopes = gradient(divergence(down, across) - images / self.weight)
        down, across = down + slopes[0] / 8, across + slopes[1] / 8
        within = (down.square() + across.square()).clamp(min=1).rsqrt()  # unlike a norm's its gradient at 0 is finite
        return down * within, across * within


def gradient(u: Tensor) -> tuple[Tensor, Tensor]:
    """(..., H, W) -> the differences to the next pixel down and across, 0 where there is none."""
    return F.pad(u.diff(dim=-2), (0, 0, 0, 1)), F.pad(u.diff(dim=-1), (0, 1))


def divergence(down: Tensor, across: Tensor) -> Tensor:
    """Minus the adjoint of ``gradient``, for what is 0 where that is."""
    return down + across - F.pad(down[..., :-1, :], (0, 0, 1, 0)) - F.pad(across[..., :-1], (1, 0))


def _upto(name: str, value: int, most: int) -> int:
    found = checks.whole(name, value)
    if found > most:
        raise SettingError(f"{name} must be at most {most}, got {found}.")
    return found
