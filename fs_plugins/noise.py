"""Gaussian draws: i.i.d. or antithetic, fresh or reproducible.

Every image of every vision call has its own generator, so an image's draws depend neither on its
neighbours in the batch nor on how the work is cut into chunks.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from fs_plugins.pickled import Pickled

Noise = Literal["iid", "antithetic"]
NoiseScope = Literal["call", "image"]


class Source(Protocol):
    """Hands out the generators of a vision call's noise."""

    def generators(self, images: Sequence[Tensor] | Tensor) -> list[torch.Generator]:
        """One for each image, on the images' device."""


def draws(generator: torch.Generator, shape: tuple[int, ...], noise: Noise, count: int) -> Iterator[Tensor]:
    """Yield ``count`` standard normal tensors of ``shape`` (fp32, on the generator's device).

    ``antithetic`` yields e, -e, e', -e', ...; an odd count ends with one unpaired draw. Each draw is
    N(0, I); within a pair the two are dependent, so only ``iid`` draws may certify.
    """
    drawn: Tensor | None = None
    for _ in range(count):
        if drawn is None:
            fresh = normal(generator, shape)
            drawn = fresh if noise == "antithetic" else None
            yield fresh
        else:
            yield -drawn
            drawn = None


def normal(generator: torch.Generator, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers, fp32, on the generator's device. Torch's default type and device are the user's, and
    would change which numbers a seed gives."""
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device=generator.device)


def uniform(generator: torch.Generator, shape: Sequence[int] = ()) -> Tensor:
    """Numbers in [0, 1), made as ``normal`` makes its own."""
    return torch.rand(tuple(shape), generator=generator, dtype=torch.float32, device=generator.device)


def keyed(*marks: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose stream follows from these marks alone."""
    return seeded("/".join(map(str, marks)).encode(), device)


def seeded(mark: bytes, device: torch.device | str) -> torch.Generator:
    """A generator whose stream follows from these bytes alone."""
    digest = hashlib.sha256(mark).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class NoiseSource(Pickled):
    """Hands out one generator per image of a vision call.

    ``scope="call"``: fresh, independent draws at every call. ``scope="image"``: an image's draws follow
    from a secret key and its content, so that a repeated call sees the same noise; who can query the
    model at will can then also search it, so prefer ``"call"`` unless the caller recomputes the tower.
    ``seed`` makes either reproducible (the k-th call after construction, or the key); without it
    the entropy comes from the operating system, not from torch's global generator. Mind that torch's CPU generator
    keeps 32 bits of a seed, so an image's draws are one of 2^32 sets there. ``key`` is a secret of several processes
    that share the work, in place of either: they draw the same noise for an image that all of them have at their k-th
    call, and other noise for images that only one of them has.
    """

    _fresh = (("_lock", threading.Lock),)

    def __init__(self, scope: NoiseScope = "call", seed: int | None = None, key: bytes | None = None) -> None:
        self.scope = scope
        self.seed = seed
        self._key = key or (secrets.token_bytes(32) if seed is None else f"seed {seed}".encode())
        self._shared = key is not None
        self._calls = 0
        self._lock = threading.Lock()

    def generators(self, images: Sequence[Tensor] | Tensor) -> list[torch.Generator]:
        """One seeded generator for each image of a vision call, on the images' device."""
        if self.scope == "image":
            marks = [b"image" + _content(image) for image in images]
        else:
            with self._lock:
                call = self._calls
                self._calls += 1
            marks = [
                f"call {call} image {i}".encode() + (_content(image) if self._shared else b"")
                for i, image in enumerate(images)
            ]
        return [seeded(self._key + mark, image.device) for mark, image in zip(marks, images, strict=True)]

    def __getstate__(self) -> dict[str, object]:
        """A copy of an unseeded source gets a key of its own: two models never share their noise."""
        state = super().__getstate__()
        if self.seed is None:
            state["_key"] = secrets.token_bytes(32)
        return state


def _content(image: Tensor) -> bytes:
    return image.detach().float().cpu().contiguous().numpy().tobytes()
