"""What can be certified of images: their features, or their labels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol, Required, Self, TypedDict, TypeVar, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from fs_plugins.certificates.certificate import Certificate
from fs_plugins.certificates.image import certify_image, certify_prediction
from fs_plugins.certificates.plan import Plan
from fs_plugins.certificates.prediction import PredictionCertificate
from fs_plugins.certificates.values import Stored
from fs_plugins.errors import ModelError, SettingError
from fs_plugins.head import Head
from fs_plugins.smoothing import FeatureSmoother
from fs_plugins.vision import VisionCall

Directions = Tensor | Mapping[str, Tensor] | nn.Linear | Head | None
"""What a classifier decides by: directions, a row a class; a linear layer; None for a model's own head."""

C_co = TypeVar("C_co", bound=Stored, covariant=True)


class Drawing(TypedDict, total=False):
    """How an image's draws are made, and what its certificate says of them; see ``certify_image``."""

    key: Required[bytes]
    rows: int
    advance: Callable[[int], None]
    encoder: tuple[float, ...] | None
    seed: str


class Certifier(Protocol[C_co]):
    """What is certified of images: ``Features``, ``Labels`` or ``Replies``."""

    @property
    def smoother(self) -> FeatureSmoother: ...

    @property
    def plan(self) -> Any:
        """A dataclass of plain values, part of a file's settings."""

    @property
    def kind(self) -> type[C_co]:
        """Of certificate."""

    @property
    def settings(self) -> Mapping[str, object]:
        """What the certificates depend on beside smoother and plan, as JSON."""

    @property
    def draws(self) -> int:
        """Of one image, where no target stops them early."""

    def rows(self, name: str) -> Sequence[str]:
        """What the certificates of an image of this name are called in files."""

    def __call__(self, image: Tensor, **drawing: Unpack[Drawing]) -> Sequence[C_co]:
        """The certificates of one image, (C, H, W) in [0, 1] at the resolution the encoder sees, one for each row."""

    def trial(self, draws: int) -> Self:
        """The same from at most so many draws of one image, to see how long they take."""


class OneEach:
    """One certificate an image, by a ``Plan``."""

    plan: Plan

    @property
    def draws(self) -> int:
        return self.plan.pilot + self.plan.n

    def rows(self, name: str) -> Sequence[str]:
        return (name,)


@dataclass(frozen=True, eq=False)
class Features(OneEach):
    """Each image's feature is certified.

    Args:
        smoother: vision call, PSM and sigma. Its n0 and its noise play no part.
        plan: see Plan.
        background: images for ``Certificate.unrelated``, (C, H, W) in [0, 1].
        watch: see ``certify_image``.
    """

    smoother: FeatureSmoother
    plan: Plan
    background: Sequence[Tensor] = ()
    watch: Callable[[Certificate], object] | None = None

    kind: ClassVar[type[Certificate]] = Certificate
    settings: ClassVar[Mapping[str, object]] = {}

    @cached_property
    def unrelated(self) -> float | None:
        """See ``Certificate``."""
        return unrelated_cosine(self.smoother, [self.smoother.call.beside(image) for image in self.background])

    def __call__(self, image: Tensor, **drawing: Unpack[Drawing]) -> Sequence[Certificate]:
        found = certify_image(self.smoother, image, self.plan, unrelated=self.unrelated, watch=self.watch, **drawing)
        return (found,)

    def trial(self, draws: int) -> Features:
        return replace(self, plan=replace(self.plan, n=min(draws, self.plan.n), target=None), background=())


@dataclass(frozen=True, eq=False)
class Labels(OneEach):
    """Each image's label is certified.

    Args:
        smoother, plan: as for ``Features``.
        directions: (K, E), a row a class.
        labels: the K classes' names, where they have any.
        bias: (K,), of a head that has one.
    """

    smoother: FeatureSmoother
    plan: Plan
    directions: Tensor
    labels: Sequence[str] | None = None
    bias: Tensor | None = None

    kind: ClassVar[type[PredictionCertificate]] = PredictionCertificate

    @classmethod
    def among(cls, smoother: FeatureSmoother, plan: Plan, directions: Directions) -> Labels:
        """``directions`` as users give them, see ``fs_plugins.certify_predictions``.

        Raises:
            SettingError: fewer than two, of different widths, not finite, or equal.
            ModelError: none are given, and the model has no head of its own; or see ``Head.affine``.
        """
        found = classes_of(smoother.call, directions)
        return cls._by(smoother, plan, found) if isinstance(found, Head) else cls(smoother, plan, *found)

    @classmethod
    def _by(cls, smoother: FeatureSmoother, plan: Plan, head: Head) -> Labels:
        weight, bias = head.affine()
        if len(weight) < 2:
            raise SettingError(f"A classifier has K >= 2 classes to choose from; this head has {len(weight)}.")
        _check_rows(torch.cat([weight, bias[:, None]], dim=1))
        return cls(smoother, plan, weight, head.labels or None, bias if bias.any() else None)

    @property
    def settings(self) -> Mapping[str, object]:
        found = {"directions": _digest(self.directions), "labels": self.labels}
        return found if self.bias is None else {**found, "bias": _digest(self.bias)}

    def __call__(self, image: Tensor, **drawing: Unpack[Drawing]) -> Sequence[PredictionCertificate]:
        classes, names = self.directions, self.labels
        return (certify_prediction(self.smoother, image, classes, self.plan, bias=self.bias, labels=names, **drawing),)

    def trial(self, draws: int) -> Labels:
        return replace(self, plan=replace(self.plan, n=min(draws, self.plan.n), target=None))


def classes_of(call: VisionCall, directions: Directions) -> Head | tuple[Tensor, list[str] | None]:
    """What a classifier decides by, as users give it: a head, or (K, E), a row a class, and the classes' names.

    Raises:
        SettingError: fewer than two directions, of different widths, not finite, or equal.
        ModelError: none are given, and the model has no head of its own.
    """
    if directions is None:
        directions = call.head
        if directions is None:
            raise ModelError(
                "This model has no head of its own that names classes. Pass directions: text embeddings for "
                "zero-shot classification, or an nn.Linear on its embedded feature."
            )
    if isinstance(directions, nn.Linear | Head):
        return Head.of(directions) if isinstance(directions, nn.Linear) else directions
    labels = [str(name) for name in directions] if isinstance(directions, Mapping) else None
    try:
        # Not by torch from lists: their numbers would be rounded to its default type, which is the user's.
        given = [
            row if isinstance(row, Tensor) else torch.from_numpy(np.array(row))
            for row in (directions.values() if isinstance(directions, Mapping) else directions)
        ]
    except (TypeError, ValueError) as error:
        raise SettingError(f"directions must be numbers, (K, E), a row a class: {error}") from None
    shapes = {tuple(row.shape) for row in given}
    if len(given) < 2 or len(shapes) > 1 or len(*shapes) != 1:
        raise SettingError(
            f"directions must be (K, E), a row for each of K >= 2 classes; got {len(given)} of {shapes or 'none'}."
        )
    matrix = torch.stack(given)
    if matrix.is_complex():
        raise SettingError(f"directions must be real numbers, got {matrix.dtype}.")
    _check_rows(matrix)
    return matrix, labels


def _check_rows(matrix: Tensor) -> None:
    if not matrix.isfinite().all() or len(matrix.unique(dim=0)) < len(matrix):
        raise SettingError("directions has equal or non-finite rows, so that nothing could tell these classes apart.")


def _digest(numbers: Tensor) -> str:
    return hashlib.sha256(numbers.detach().double().cpu().numpy().tobytes()).hexdigest()


def unrelated_cosine(smoother: FeatureSmoother, images: Sequence[Tensor], most: int = 32) -> float | None:
    """Mean cosine between the plain features of different images, (C, H, W) in [0, 1], of the first one's size.

    None where there are fewer than two.
    """
    alike: list[Tensor] = []
    for image in images:
        if image.shape == images[0].shape and not any(torch.equal(image, other) for other in alike):
            alike.append(image)
        if len(alike) == most:
            break
    if len(alike) < 2:
        return None
    call = smoother.call
    with torch.no_grad():
        features = torch.cat([call.embed(call.encode(image[None])) for image in alike]).double()
    units = torch.nn.functional.normalize(features, dim=-1)
    cosines = units @ units.T
    return float((cosines.sum() - cosines.trace()) / (len(alike) * (len(alike) - 1)))
