"""Random crops, enlarged to the picture's size: what makes an attack's pattern independent of where it stands."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fs_plugins.attacks.victim import Stream
from fs_plugins.noise import uniform


@dataclass(frozen=True)
class Crop:
    """The law of torchvision's ``RandomResizedCrop``.

    Args:
        scale: share of the picture's area, from and to.
        ratio: width to height, from and to.
    """

    scale: tuple[float, float] = (0.5, 0.9)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __call__(self, images: Tensor, stream: Stream) -> Tensor:
        """(B, C, H, W) -> each image's own crop, (B, C, H, W). Gradients follow the images."""
        size = (images.shape[-2], images.shape[-1])
        crops = []
        for image, generator in zip(images, stream.choices(), strict=True):
            top, left, height, width = self.box(size, generator)
            part = image[None, :, top : top + height, left : left + width]
            crops.append(torch.nn.functional.interpolate(part, size, mode="bilinear", align_corners=False))
        return torch.cat(crops)

    def box(self, size: tuple[int, int], generator: torch.Generator) -> tuple[int, int, int, int]:
        """Top, left, height and width of a crop of an (H, W) picture."""

        def between(low: float, high: float) -> float:
            return low + (high - low) * uniform(generator).item()

        height, width = size
        for _ in range(10):
            area = height * width * between(*self.scale)
            ratio = math.exp(between(*map(math.log, self.ratio)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(between(0, height - h + 1)), int(between(0, width - w + 1)), h, w
        # No such box fits: the largest in the middle whose ratio is allowed.
        w, h = width, height
        if width / height < self.ratio[0]:
            h = round(w / self.ratio[0])
        elif width / height > self.ratio[1]:
            w = round(h * self.ratio[1])
        return (height - h) // 2, (width - w) // 2, h, w
