"""Model in, scores out: i.i.d. draws of one image through noise, purifier, encoder and mapper, streamed.

Memory holds one forward's features, n scores (or n x K products) and one running sum: never n features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fs_plugins.certificates.angular import Angular
from fs_plugins.errors import ModelError, SettingError
from fs_plugins.noise import normal, seeded
from fs_plugins.smoothing import FeatureSmoother


def unheard(draws: int) -> None:
    """Nobody watches the progress."""


class Sampler:
    """Certification draws of one image: independent, unclamped, in fp32, never those of serving.

    Args:
        smoother: the road that is certified: vision call, PSM and sigma. Its n0 and its noise play no part.
        image: (C, H, W) in [0, 1] at the resolution the encoder sees.
        key: bytes from which the draws follow; the same key and image give the same draws.
        rows: draws per forward of the encoder. Bounds memory; which numbers are drawn does not depend on it.
        reference: (E,) unit vector; by default the plain encoder's feature of the clean image.
        directions: (K, E), the class directions or head rows of a classifier whose ``products`` are wanted too.
        bias: (K,), of a head that has one.
        advance: told of draws as they are made.

    Raises:
        ModelError: the clean image's feature is zero or not finite, so that there is no direction to certify.
        SettingError: directions of another width than the feature's.
    """

    def __init__(
        self,
        smoother: FeatureSmoother,
        image: Tensor,
        *,
        key: bytes,
        rows: int = 32,
        reference: Tensor | None = None,
        directions: Tensor | None = None,
        bias: Tensor | None = None,
        advance: Callable[[int], None] = unheard,
    ) -> None:
        self.smoother = smoother
        self.advance = advance
        self.image = image.detach().float()
        self.rows = rows
        self.reference = self._clean() if reference is None else reference
        self.directions = None if directions is None else directions.detach().double().to(self.reference.device)
        self.bias = None if bias is None else bias.detach().double().to(self.reference.device)
        if self.directions is not None and self.directions.shape[1:] != self.reference.shape:
            raise SettingError(
                f"directions must be (K, {len(self.reference)}) to be multiplied with this encoder's feature, got "
                f"{tuple(self.directions.shape)}."
            )
        self.t0: float | None = None
        self.non_finite = self._near = 0
        self._scores: list[NDArray[np.float64]] = []
        self._products: list[NDArray[np.float64]] = []
        self._total = torch.zeros_like(self.reference, dtype=torch.float64)
        self._key = key + hashlib.sha256(self.image.cpu().contiguous().numpy().tobytes()).digest()
        self._generator = self._stream("bound")

    @property
    def scores(self) -> NDArray[np.float64]:
        """(n,) inner products with the reference so far, in [-1, 1]; -1 for a non-finite draw."""
        return np.concatenate(self._scores) if self._scores else np.empty(0)

    @property
    def products(self) -> NDArray[np.float64]:
        """(n, K) inner products of unit features with the ``directions``; NaN for a non-finite draw.

        With a bias the head's scores of the features as they are, over the features' lengths, which orders the classes
        in the same way.
        """
        return np.concatenate(self._products)

    @property
    def angular(self) -> Angular | None:
        """Statistics for the angular refinement, where ``t0`` was set before the first draw."""
        n = sum(map(len, self._scores))
        if self.t0 is None or n == 0:
            return None
        return Angular(t0=self.t0, count=self._near, norm=float(self._total.norm()) / n, n=n)

    def pilot(self, n: int) -> NDArray[np.float64]:
        """n scores to choose settings by; they have no part in any bound."""
        generator = self._stream("pilot")
        return np.concatenate([self._block(generator, size)[1].cpu().numpy() for size in self._sizes(n)])

    def favourite(self, n: int) -> int:
        """The class whose direction has the largest product with the average of n pilot draws.

        With a bias, the class that most of them predict.
        """
        assert self.directions is not None
        generator = self._stream("pilot")
        if self.bias is None:
            total = torch.stack([self._block(generator, size)[0].sum(0) for size in self._sizes(n)]).sum(0)
            return int((self.directions @ total).argmax())
        told = torch.cat([self._told(*self._block(generator, size)) for size in self._sizes(n)])
        return int(told[~told[:, 0].isnan()].argmax(1).bincount(minlength=len(self.directions)).argmax())

    def extend(self, n: int) -> None:
        """n more draws."""
        for size in self._sizes(n):
            units, products, finite, lengths = self._block(self._generator, size)
            self._scores.append(products.cpu().numpy())
            if self.directions is not None:
                self._products.append(self._told(units, products, finite, lengths).cpu().numpy())
            self.non_finite += int((~finite).sum())
            if self.t0 is not None:
                near = finite & (products >= self.t0)
                self._near += int(near.sum())
                self._total += near.double() @ units - products[near].sum() * self.reference.double()

    def _told(self, units: Tensor, products: Tensor, finite: Tensor, lengths: Tensor) -> Tensor:
        """A block -> (size, K), see ``products``."""
        assert self.directions is not None
        told = units @ self.directions.T
        if self.bias is not None:
            told = told + self.bias / lengths.double()[:, None]
        return told.where(finite[:, None], torch.nan)

    def _sizes(self, n: int) -> list[int]:
        return [min(self.rows, n - start) for start in range(0, n, self.rows)]

    def _stream(self, purpose: str) -> torch.Generator:
        return seeded(self._key + purpose.encode(), self.image.device)

    def _block(self, generator: torch.Generator, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Unit features (size, E) and their scores (size,) in fp64, which draws were finite, the features' lengths."""
        noise = torch.stack([normal(generator, self.image.shape) for _ in range(size)])
        single, finite, lengths = self._units(noise)
        units = single.double()
        self.advance(size)
        return units, (units @ self.reference.double()).clamp(-1, 1).where(finite, -1.0), finite, lengths

    def _units(self, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, C, H, W) standard normal noise -> (N, E) unit features, 0 where there is none; finite ones; lengths."""
        call = self.smoother.call
        with torch.no_grad():
            embedded = call.embed(self.smoother.draw(self.image.expand(noise.shape), noise)).float()
        lengths = embedded.norm(dim=-1)
        finite = lengths.isfinite() & (lengths > 0)
        units = F.normalize(embedded.where(finite[:, None], 0.0), dim=-1)
        return units, finite, lengths

    def _clean(self) -> Tensor:
        call = self.smoother.call
        with torch.no_grad():
            feature = call.embed(call.encode(self.image[None]))[0].float()
        length = feature.norm()
        if not (torch.isfinite(length) and length > 0):
            raise ModelError("The clean image's feature is zero or not finite, so there is no direction to certify.")
        return feature / length
