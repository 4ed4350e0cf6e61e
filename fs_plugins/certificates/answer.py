"""What is certified about a model's answer, as a value: made from counts, asked for radii, kept as JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from fs_plugins.certificates.chances import FIXED, METHODS, answer_radius, kept, lower
from fs_plugins.certificates.values import FRESH, PIXELS, Stored
from fs_plugins.checks import number, settle, whole, words
from fs_plugins.errors import SettingError


@dataclass(frozen=True, kw_only=True)
class AnswerCertificate(Stored):
    """How far an image can move before a model's answer to a fixed question may change.

    A *serving* draws n0 independent noisy copies of the image, purifies, encodes and maps each, averages, lets the
    model answer, and reads the answer as one of some classes.

    **The contract.** With probability at least 1 - alpha over the n servings behind it, for every image within the l2
    distance eps of the certified one, a single fresh serving is read as ``predicted`` with probability at least
    ``kept(eps)``. Up to ``radius`` that is above 1/2, so that the vote over fresh servings stays ``predicted``.
    ``predicted`` and n0 were chosen on other draws. With n0 = 1 it is Cohen et al.'s theorem (ICML 2019).

    It speaks of independent draws: of antithetic pairs x + e, x - e, which together show x itself, nothing can be
    promised.

    Args:
        sigma: standard deviation of the noise, in the units of ``space``.
        n: servings.
        n0: draws of each.
        alpha: the probability that the certificate may be wrong.
        question: as it was put; ``prompt`` is all that the model read.
        reading: how answers were read, in words.
        generation: how they were made.
        predicted: the certified class, None where no answer of the pilot was of any.
        count: how many of the n servings were read as it.
        probability: a lower bound of a serving's, at the image itself.
        method: ``"clopper-pearson"``, for an n fixed beforehand, or ``"betting"``.
        error: of the reading; taken off the probability.
        said: the most frequent answers, each with its count, for people.
        share, space, image_shape, readouts, encoder, psm, seed, non_finite: as for ``Certificate``.
    """

    sigma: float
    n: int
    n0: int
    alpha: float
    question: str
    reading: str
    predicted: str | None
    count: int
    probability: float
    method: str = FIXED
    error: float = 0.0
    prompt: str = ""
    generation: str = ""
    said: tuple[tuple[str, int], ...] = ()
    share: float = 1.0
    space: str = PIXELS
    image_shape: tuple[int, ...] | None = None
    readouts: tuple[str, ...] = ()
    encoder: tuple[float, ...] | None = None
    psm: str | None = None
    seed: str = FRESH
    non_finite: int = 0

    kind: ClassVar[str] = "answer"

    def __post_init__(self) -> None:
        self._settle()
        chance = "probability is a lower bound and must be in [0, 1)"
        settle(
            self,
            n0=whole("n0 (draws per serving)", self.n0),
            count=whole("count", self.count, least=0),
            probability=number(chance, self.probability, lambda found: 0 <= found < 1),
            error=number("error is a rate in [0, 1)", self.error, lambda found: 0 <= found < 1),
            said=tuple((words("An answer", text), whole("its count", times)) for text, times in self.said),
        )
        if self.count > self.n or (self.predicted is None and self.count):
            raise SettingError(f"count must be between 0 and n, and 0 without a class, got {self.count} of {self.n}.")
        if self.method not in METHODS:
            raise SettingError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}.")

    @classmethod
    def from_count(
        cls, count: int, n: int, *, alpha: float = 1e-3, method: str = FIXED, error: float = 0.0, **details: Any
    ) -> Self:
        """The certificate of n servings, of which ``count`` were read as the class that other draws chose.

        Args:
            method: ``"betting"`` if the servings themselves decided how many they are.
            details: the class's other fields.

        Raises:
            SettingError: a value out of range.
        """
        found = max(0.0, lower(count, n, alpha=alpha, method=method) - error)
        return cls(count=count, n=n, alpha=alpha, method=method, error=error, probability=found, **details)

    @property
    def radius(self) -> float | None:
        """The l2 distance in ``space`` within which the vote over servings stays; None to abstain."""
        return answer_radius(self.probability, sigma=self.sigma, n0=self.n0)

    @property
    def linf_radius(self) -> float | None:
        """The l-inf distance that is certainly within ``radius``; None to abstain, or of an image of unknown size."""
        if self.radius is None or self.image_shape is None:
            return None
        return self.radius / math.sqrt(math.prod(self.image_shape))

    def kept(self, eps: float) -> float:
        """The probability, at least, that a single serving of an image within l2 distance ``eps`` is read alike.

        Raises:
            SettingError: a negative distance.
        """
        return kept(self.probability, eps, sigma=self.sigma, n0=self.n0)

    @property
    def meaning(self) -> str:
        """What stays the same within ``radius``, or why nothing is promised, in words."""
        if self.predicted is None:
            heard = f" (most often {self.said[0][0]!r})" if self.said else ""
            return f"abstains: no answer was read as {self.reading}{heard}"
        if self.radius is None:
            heard = f"{self.count} of {self.n} servings answered {self.predicted}"
            return f"abstains: nothing is promised at alpha = {self.alpha:g}, where {heard}"
        return f"the vote over servings stays {self.predicted}"

    def __str__(self) -> str:
        """One line for people."""
        within = "" if self.radius is None else f" within l2 distance {self.radius:.3f}"
        origin = f"n = {self.n}, n0 = {self.n0}, sigma = {self.sigma:g}, confidence {1 - self.alpha:.6g}"
        return f"certificate ({origin}): {self.meaning}{within}"
