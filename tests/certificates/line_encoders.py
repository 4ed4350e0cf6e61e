"""Encoders of numbers, of which everything under attack is known exactly, and scores of known mean and spread."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.special import ndtr, ndtri

EPS = np.linspace(0, 4, 41)


@dataclass(frozen=True)
class LineEncoder:
    """An encoder of numbers: the unit vector ``units[j]`` between ``cuts[j - 1]`` and ``cuts[j]``. Noise has sigma = 1.

    The clean image is 0. Of it, everything under attack is known exactly.
    """

    cuts: np.ndarray
    units: np.ndarray
    v: np.ndarray

    @property
    def scores(self) -> np.ndarray:
        return self.units @ self.v

    @property
    def perpendicular(self) -> np.ndarray:
        return self.units - self.scores[:, None] * self.v

    def probabilities(self, x=0.0) -> np.ndarray:
        """(..., k) for x (...): the law of a draw's piece around x."""
        edges = np.concatenate([[-np.inf], self.cuts, [np.inf]])
        return np.diff(ndtr(edges - np.asarray(x, dtype=float)[..., None]), axis=-1)

    def cosine(self, x) -> np.ndarray:
        mean = self.probabilities(x) @ self.units
        length = np.linalg.norm(mean, axis=-1)
        return mean @ self.v / np.where(length > 0, length, 1.0)

    def worst(self, eps: float) -> float:
        """The smallest cosine within eps: a fine grid, refined twice around its lowest point."""
        low, high = -eps, eps
        for _ in range(3):
            x = np.linspace(low, high, 201)
            at = x[np.argmin(self.cosine(x))]
            step = (high - low) / 200
            low, high = max(-eps, at - step), min(eps, at + step)
        return float(self.cosine(x).min())

    def draws(self, generator: np.random.Generator, *shape: int) -> np.ndarray:
        """Pieces of i.i.d. draws around the clean image."""
        return np.searchsorted(self.cuts, generator.standard_normal(shape))

    def served(self, x: float, n0: int, noise: str) -> tuple[np.ndarray, np.ndarray]:
        """The exact law of the cosine of the served mean of n0 draws around x: (values, probabilities)."""
        single = list(zip(self.units, self.probabilities(x), strict=True))
        edges = np.sort(np.concatenate([self.cuts - x, x - self.cuts]))
        inside = np.concatenate([edges[:1] - 1, (edges[1:] + edges[:-1]) / 2, edges[-1:] + 1])
        mass = np.diff(ndtr(np.concatenate([[-np.inf], edges, [np.inf]])))
        both = self.units[np.searchsorted(self.cuts, x + inside)] + self.units[np.searchsorted(self.cuts, x - inside)]
        parts = [single] * n0
        if noise == "antithetic":
            parts = [list(zip(both, mass, strict=True))] * (n0 // 2) + [single] * (n0 % 2)
        total, probability = np.zeros((1, self.units.shape[1])), np.ones(1)
        for part in parts:
            total = (total[:, None] + np.array([u for u, _ in part])).reshape(-1, total.shape[1])
            probability = (probability[:, None] * np.array([p for _, p in part])).ravel()
        length = np.linalg.norm(total, axis=1)
        return total @ self.v / np.where(length > 1e-12, length, 1.0), probability


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def random_encoder(generator: np.random.Generator) -> LineEncoder:
    """Between two and six pieces in two or three dimensions, from tight to scattered; some ordered or two-faced."""
    pieces, width = generator.integers(2, 7), generator.integers(2, 4)
    cuts = np.sort(generator.standard_normal(pieces - 1) * generator.uniform(0.3, 2))
    centre = unit(generator.standard_normal(width))
    spread = generator.choice([0.1, 0.3, 1.0, 3.0])
    units = unit(centre + spread * generator.standard_normal((pieces, width)))
    kind = generator.integers(6)
    if kind == 0:
        units = np.where(generator.random((pieces, 1)) < 0.7, centre, -centre)
    if kind == 1:
        units = units[np.argsort(-(units @ centre))]
    encoder = LineEncoder(cuts, units, centre)
    mean = encoder.probabilities() @ units
    reference = [centre, units[np.searchsorted(cuts, 0.0)], mean if np.linalg.norm(mean) > 1e-6 else centre]
    return replace(encoder, v=unit(reference[generator.integers(3)]))


def half_space(scores) -> LineEncoder:
    """Scores that fall along the line, on pieces of random width: attacks cannot be worse."""
    scores = np.sort(np.asarray(scores, dtype=float))[::-1]
    cuts = ndtri(np.arange(1, len(scores)) / len(scores))
    return LineEncoder(cuts, np.stack([scores, np.sqrt(1 - scores**2)], axis=1), np.array([1.0, 0.0]))


SIGN_FLIP = LineEncoder(np.array([-0.5]), np.array([[-1.0], [1.0]]), np.array([1.0]))
"""-1 below -sigma/2, +1 above: at eps = sigma the paper's formula says -0.383 and the cosine is -1."""


def table_scores(mean: float, sd: float, n: int) -> np.ndarray:
    return np.clip(mean + sd * ndtri((np.arange(1, n + 1) - 0.5) / n), -1, 1)
