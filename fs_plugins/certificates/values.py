"""What both kinds of certificates share: how they are kept as JSON, and which numbers they refuse."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import ConfigDict, TypeAdapter, ValidationError

from fs_plugins import checks
from fs_plugins.checks import number, plain, settle, whole
from fs_plugins.errors import SettingError
from fs_plugins.files import parsed

PIXELS = (
    "l2 distance in [0, 1] pixels of one image as the encoder sees it (a tile or frame where the model cuts pictures): "
    "after resizing, before normalisation"
)
CLEAN = "the plain encoder's feature of the clean image"
FRESH = "fresh entropy from the operating system"

_ROUNDING = 1e-6
_VERSION = 1


class Stored:
    """A frozen dataclass that is kept as one line of JSON, which says of which ``kind`` it is."""

    kind: ClassVar[str]
    sigma: float
    n: int
    space: str
    alpha: float
    share: float
    image_shape: tuple[int, ...] | None
    readouts: tuple[str, ...]
    encoder: tuple[float, ...] | None
    non_finite: int
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    def to_json(self) -> str:
        """All of the certificate on one line; floats keep every digit."""
        # numpy's numbers, whose item() is Python's, come from samplers.
        fields = {"certificate": self.kind, "version": _VERSION, **asdict(self)}  # type: ignore[call-overload]
        return json.dumps(fields, allow_nan=False, default=lambda number: number.item())

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The certificate that ``to_json`` wrote; equal to the original.

        Raises:
            SettingError: not such a line.
        """
        try:
            fields = parsed(text)
            if not isinstance(fields, dict) or fields.pop("certificate", None) != cls.kind:
                raise ValueError(f'it does not say "certificate": "{cls.kind}"')
            if (version := fields.pop("version", None)) != _VERSION:
                raise ValueError(f"it has version {version}; this release reads {_VERSION}")
            return TypeAdapter(cls).validate_python(fields)
        except (ValueError, ValidationError) as error:
            raise SettingError(f"This is not a {cls.kind} certificate written by to_json: {error}") from error

    def _settle(self) -> None:
        """Hold plain numbers and tuples, whatever they come as: numpy's numbers, a list, a torch.Size.

        Raises:
            SettingError: a value out of range.
        """
        settle(
            self,
            sigma=sigma_of(self.sigma, self.space),
            alpha=alpha_of(self.alpha),
            share=share_of(self.share),
            n=whole("n", self.n, least=None),
            non_finite=whole("non_finite", self.non_finite, least=0),
            readouts=tuple(self.readouts),
        )
        if self.n < 1 or self.non_finite > self.n:
            raise SettingError(
                f"A certificate needs n >= 1 scores, got n = {self.n} with {self.non_finite} non-finite."
            )
        if self.image_shape is not None:
            name = "image_shape must be sizes such as (3, 224, 224), each of which"
            settle(self, image_shape=tuple(whole(name, size) for size in self.image_shape))
            if not self.image_shape:
                raise SettingError("image_shape must be sizes such as (3, 224, 224), got none.")
        if self.encoder is not None:
            marks = tuple(number("encoder is a fingerprint and must hold numbers", mark) for mark in self.encoder)
            settle(self, encoder=marks)


C = TypeVar("C", bound=Stored)
"""A kind of certificate."""


def alpha_of(given: Any) -> float:
    """The probability that a certificate may be wrong.

    Raises:
        SettingError: it is none.
    """
    expected = "alpha is the probability that the certificate may be wrong (0.001 is usual) and must be between 0 and 1"
    return number(expected, given, lambda alpha: 0 < alpha < 1)


def share_of(given: Any) -> float:
    """The part of alpha that a certificate may spend.

    Raises:
        SettingError: it is none.
    """
    expected = "share is the part of alpha that this certificate may spend and must be between 0 and 1"
    return number(expected, given, lambda share: 0 < share <= 1)


def sigma_of(given: Any, space: str = PIXELS) -> float:
    """The noise level of a certificate, in the units of its space; without noise nothing can be certified.

    Raises:
        SettingError: it is none.
    """
    return checks.sigma(given, noisy=True, pixels=space == PIXELS)


def scores_of(given: Any, dimensions: int = 1) -> NDArray[np.float64]:
    """Scores, (n,) or (n, K - 1), as float64, checked and clipped to [-1, 1].

    Args:
        given: a numpy array, a torch tensor or a list.

    Raises:
        SettingError: they are none.
    """
    values = _array("scores", given)
    if values.ndim != dimensions:
        wanted = (
            "one score per draw, shape (n,)" if dimensions == 1 else "one row of margins per draw, shape (n, K - 1)"
        )
        raise SettingError(f"A certificate needs {wanted}, got shape {values.shape}.")
    if not values.size:
        raise SettingError("There are no scores to certify with. Draw at least one; a thousand is usual.")
    low, high = float(values.min()), float(values.max())
    if math.isnan(low) or math.isnan(high):
        raise SettingError(
            f"{int(np.isnan(values).sum())} of {values.size} scores are NaN. "
            "Count a draw that failed as -1, the sound choice."
        )
    if low < -1 - _ROUNDING or high > 1 + _ROUNDING:
        raise SettingError(
            f"Scores are inner products of unit vectors and lie in [-1, 1], got {low:.6g} to {high:.6g}. "
            "Normalise each draw's feature, and the reference, before multiplying."
        )
    return np.clip(values, -1.0, 1.0)


def distances_of(eps: ArrayLike) -> NDArray[np.float64]:
    """l2 distances, checked.

    Raises:
        SettingError: no numbers, or negative ones.
    """
    values = _array("eps", eps)
    if not (values >= 0).all():
        raise SettingError(f"eps is an l2 distance and must be >= 0, got {values.min():g}.")
    return values


def _array(what: str, given: Any) -> NDArray[np.float64]:
    """Numbers of Python, numpy and torch, one or many, as float64.

    Raises:
        SettingError: they are none; truth values are none either.
    """
    if (single := plain(given)) is not None:
        return np.asarray(single, dtype=np.float64)
    try:
        if callable(getattr(given, "detach", None)):  # numpy knows no bfloat16
            given = given.detach().cpu()
            given = given.double().numpy() if given.is_floating_point() else given.numpy()
        values = np.asarray(given)
        if values.dtype.kind in "iuf" or not values.size:
            return values.astype(np.float64)
        wrong = f"an array of {values.dtype}"
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        wrong = f"a {type(given).__name__}: {error}"
    raise SettingError(f"{what} must be numbers, got {wrong}.")


def distance_of(eps: ArrayLike) -> NDArray[np.float64]:
    """One l2 distance, of shape ().

    Raises:
        SettingError: several, no number, or a negative one.
    """
    if np.ndim(eps):
        raise SettingError(
            f"eps must be one number here, got shape {np.shape(eps)}. For many, use Certificate.curve(eps)."
        )
    return distances_of(eps)
