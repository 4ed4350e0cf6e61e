"""What is certified about one image's label, as a value: made from votes and margins, asked for radii, kept as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from fs_plugins.certificates.bounds import argmax_radius, vote_radius
from fs_plugins.certificates.values import FRESH, PIXELS, Stored, alpha_of, scores_of, share_of, sigma_of
from fs_plugins.checks import number, settle, whole
from fs_plugins.errors import SettingError


@dataclass(frozen=True, kw_only=True)
class PredictionCertificate(Stored):
    """How far an image can move before a zero-shot or linear classifier's answer may change.

    **The contract.** With probability at least 1 - alpha over the n draws behind it, for every image within the l2
    distance in question of the certified one,

    - ``vote_radius``: a single noisy draw's own prediction is ``predicted`` with probability above 1/2, so
      that the majority vote over draws stays;
    - ``feature_radius``: of all classes, ``predicted`` has the largest product with the *averaged* unit feature.

    Each spends half of alpha, so both hold together. None is an abstention. ``predicted`` was chosen on other draws.

    A head with a bias decides by the feature's length too, which no bound of its direction knows: of such a head only
    the vote is certified, with all of alpha, and ``feature_radius`` is None.

    Args:
        sigma: standard deviation of the noise, in the units of ``space``.
        n: draws.
        alpha: the probability that the certificate may be wrong.
        predicted: the index of the certified class.
        label: its name, where it has one.
        votes: how many of the n draws predicted it by themselves.
        vote_radius, feature_radius: l2 distances in ``space``, or None.
        share, space, image_shape, readouts, encoder, psm, seed, non_finite: as for ``Certificate``.
    """

    sigma: float
    n: int
    alpha: float
    predicted: int
    votes: int
    vote_radius: float | None
    feature_radius: float | None
    label: str | None = None
    share: float = 1.0
    space: str = PIXELS
    image_shape: tuple[int, ...] | None = None
    readouts: tuple[str, ...] = ()
    encoder: tuple[float, ...] | None = None
    psm: str | None = None
    seed: str = FRESH
    non_finite: int = 0

    kind: ClassVar[str] = "prediction"

    def __post_init__(self) -> None:
        self._settle()
        settle(
            self,
            predicted=whole("predicted (the certified class)", self.predicted, least=0),
            votes=whole("votes", self.votes, least=0),
        )
        if self.votes > self.n:
            raise SettingError(f"votes must be between 0 and n, got {self.votes} votes of {self.n}.")
        for name in ("vote_radius", "feature_radius"):
            if (radius := getattr(self, name)) is not None:
                settle(self, **{name: number(f"{name} must be an l2 distance >= 0", radius, lambda found: found >= 0)})

    @classmethod
    def from_draws(
        cls,
        votes: int,
        margins: Any | None,
        *,
        n: int | None = None,
        predicted: int,
        sigma: float,
        alpha: float = 1e-3,
        share: float = 1.0,
        **details: Any,
    ) -> Self:
        """The certificate that n i.i.d. draws give.

        Args:
            votes: how many draws predicted class ``predicted`` by themselves; a non-finite draw votes for nobody.
            margins: (n, K - 1) from ``bounds.margin_scores``; rows of a non-finite draw are -1. None for a head with
                a bias, of which the vote alone is certified.
            n: how many draws there were, where there are no margins to say so.
            predicted: the class, chosen on other draws.
            sigma, alpha, share: see the class.
            details: the class's descriptive fields.

        Raises:
            SettingError: a value out of range.
        """
        sigma, alpha, share = sigma_of(sigma, details.get("space", PIXELS)), alpha_of(alpha), share_of(share)
        votes = whole("votes", votes, least=0)
        values = None if margins is None else scores_of(margins, dimensions=2)
        n = whole("n", n) if values is None else len(values)
        spent = alpha * share / (1 if values is None else 2)
        return cls(
            sigma=sigma,
            n=n,
            alpha=alpha,
            predicted=predicted,
            votes=votes,
            vote_radius=vote_radius(votes, n, sigma=sigma, alpha=spent),
            feature_radius=None if values is None else argmax_radius(values, sigma=sigma, alpha=spent),
            share=share,
            **details,
        )

    @property
    def radius(self) -> float | None:
        """The larger of the two radii; ``meaning`` says what holds within it."""
        return max((r for r in (self.vote_radius, self.feature_radius) if r is not None), default=None)

    def __str__(self) -> str:
        """One line for people."""
        within = "" if self.radius is None else f" within l2 distance {self.radius:.3f}"
        origin = f"n = {self.n}, sigma = {self.sigma:g}, confidence {1 - self.alpha:.6g}"
        return f"certificate ({origin}): {self.meaning}{within}"

    @property
    def meaning(self) -> str:
        """What stays the same within ``radius``, in words."""
        if self.radius is None:
            return f"abstains: nothing is promised at alpha = {self.alpha:g} from {self.n} draws"
        if self.radius == self.vote_radius:
            return f"the majority vote over noisy draws stays {self._name}"
        return f"the averaged feature's nearest class stays {self._name}"

    @property
    def _name(self) -> str:
        return f"class {self.predicted}" if self.label is None else self.label
