"""What is certified about one image, as values: made from scores, asked for bounds and radii, kept as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from numbers import Real
from typing import Any, ClassVar, Literal, Self, get_args

import numpy as np
from numpy.typing import ArrayLike
from pydantic import ConfigDict, TypeAdapter, ValidationError

from fs_plugins.certificates.bounds import (
    Array,
    Band,
    angular_cosine,
    argmax_radius,
    betting_lower,
    binomial_lower,
    furthest,
    mean_bound,
    perpendicular_upper,
    plugin_mean,
    served_quantile,
    vote_radius,
)
from fs_plugins.errors import SettingError
from fs_plugins.noise import Noise

Method = Literal["plugin", "mean", "distribution", "best"]

PIXELS = (
    "l2 distance in [0, 1] pixels of one image as the encoder sees it (a tile or frame where the model cuts pictures): "
    "after resizing, before normalisation"
)
CLEAN = "the plain encoder's feature of the clean image"
FRESH = "fresh entropy from the operating system"

_ROUNDING = 1e-6
_VERSION = 1


@dataclass(frozen=True)
class Angular:
    """What the angular refinement needs to know about n draws (see ``bounds.angular_cosine``).

    Args:
        t0: the threshold in [0, 1], chosen on a pilot sample that is then discarded.
        count: how many of the n draws have a score of at least t0.
        norm: that of (1/n) sum u_perp over those draws, u_perp = u - <u, v> v; a running sum suffices.
        n: draws. They may be the ones the scores come from.

    Raises:
        SettingError: numbers that cannot come from n draws.
    """

    t0: float
    count: int
    norm: float
    n: int

    def __post_init__(self) -> None:
        if not 0 <= self.t0 <= 1:
            raise SettingError(f"t0, the score above which a draw counts as near, must be in [0, 1], got {self.t0}.")
        if self.n < 1 or not 0 <= self.count <= self.n:
            raise SettingError(
                f"count must be between 0 and n, and n at least 1, got count = {self.count} and n = {self.n}."
            )
        longest = self.count / self.n * math.sqrt(1 - self.t0**2)
        # Near a score of 1, rounding it by 1e-6 is 1.4e-3 of length.
        if not 0 <= self.norm <= longest + 2e-3:
            raise SettingError(
                f"norm, the length of the mean of u_perp over draws with a score >= t0 = {self.t0:g}, is at most "
                f"{longest:g} for {self.count} of {self.n} draws, got {self.norm}. Divide the running sum by n."
            )


class _Stored:
    """A frozen value that is kept as one line of JSON, which says of which ``_kind`` it is."""

    _kind: ClassVar[str]
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    def to_json(self) -> str:
        """All of the certificate on one line; floats keep every digit."""
        # numpy's numbers, whose item() is Python's, come from samplers.
        fields = {"certificate": self._kind, "version": _VERSION, **asdict(self)}  # type: ignore[call-overload]
        return json.dumps(fields, allow_nan=False, default=lambda number: number.item())

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The certificate that ``to_json`` wrote; equal to the original.

        Raises:
            SettingError: not such a line.
        """
        try:
            fields = json.loads(text)
            if not isinstance(fields, dict) or fields.pop("certificate", None) != cls._kind:
                raise ValueError(f'it does not say "certificate": "{cls._kind}"')
            if (version := fields.pop("version", None)) != _VERSION:
                raise ValueError(f"it has version {version}; this release reads {_VERSION}")
            return TypeAdapter(cls).validate_python(fields)
        except (ValueError, ValidationError) as error:
            raise SettingError(f"This is not a {cls._kind} certificate written by to_json: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Certificate(_Stored):
    """How far the smoothed feature of one image can turn under attack.

    **The contract.** Let v be the fixed unit ``reference``, m(x') the mean unit feature of the smoothed encoder at
    x' (unit features averaged over N(x', sigma^2 I)), and eps an l2 distance in the certified ``space``. With
    probability at least 1 - alpha over the n draws behind this certificate, at once for every eps and every
    image x' within eps of the certified one (also one chosen after seeing the draws),

        cos(m(x'), v) >= fcsb(eps)   wherever fcsb(eps) is not None,

    so that the cosine stays at ``threshold`` or above within ``radius(threshold)``. None means that nothing is
    promised, never that something bad happens. The statement is about the infinite average m; ``served_fcsb`` is about
    the n0 draws that are really served. It assumes that the draws were i.i.d. Gaussian with standard deviation sigma,
    that the clean image was chosen without knowledge of them, and that no pixel was clamped between
    image + noise and the function that is certified.

    ``method`` says how:

    - ``"plugin"``: the paper's formula with the sample mean in it. **An estimate, not a certificate**: nothing is
      promised at any confidence, and the contract above does not apply. For comparison with published tables.
    - ``"mean"``: the paper's formula with a betting lower bound of the mean score.
    - ``"distribution"``: every event {s > t} at once, with a lower band of the score's distribution.
    - ``"best"``: the larger of the last two at every eps, each at half of alpha.

    With ``angular`` statistics the inner product is turned into a cosine. Then half of alpha goes to the
    method's bound of the inner product, a quarter to P(s >= t0) and a quarter to the orthogonal part.

    Of all that it holds, only ``share`` of alpha is spent: a sampler that looks at several sample sizes and stops at
    one it likes gives the looks shares that were fixed beforehand and add up to at most 1; then the one it stops at
    holds with probability at least 1 - alpha.

    Args:
        sigma: standard deviation of the noise, in the units of ``space``.
        n: scores.
        alpha: the probability that the certificate may be wrong.
        method: one of the above.
        mean: the sample mean of the scores.
        lower: the lower confidence bound of the mean score (``mean`` and ``best``).
        band: the lower band of the score's distribution (``distribution`` and ``best``).
        angular: statistics for the angular refinement.
        share: the part of alpha that this certificate may spend.
        space: in which space, and by which norm, eps and sigma are measured.
        image_shape: of the certified tensor, (C, H, W) or with tiles or frames in front; the attacker may
            change all of it.
        readouts: what of the encoder's output is certified.
        reference: what v is.
        encoder: the encoder's fingerprint.
        psm: the PSM's name, None for plain smoothing.
        seed: how the noise was seeded.
        non_finite: draws with NaN or infinite features, which count as a score of -1.
        unrelated: the mean cosine between features of unrelated clean images of this encoder, so that a reader can
            see how far a threshold is from nothing.

    Raises:
        SettingError: a value out of range, or statistics that the method lacks.
    """

    sigma: float
    n: int
    alpha: float
    method: Method
    mean: float
    lower: float | None = None
    band: Band | None = None
    angular: Angular | None = None
    share: float = 1.0
    space: str = PIXELS
    image_shape: tuple[int, ...] | None = None
    readouts: tuple[str, ...] = ()
    reference: str = CLEAN
    encoder: tuple[float, ...] | None = None
    psm: str | None = None
    seed: str = FRESH
    non_finite: int = 0
    unrelated: float | None = None

    _kind: ClassVar[str] = "features"

    def __post_init__(self) -> None:
        _as_tuples(self, "image_shape", "readouts", "encoder")
        _check(self.sigma, self.alpha, self.share)
        _check_method(self.method, self.angular)
        if self.n < 1 or not 0 <= self.non_finite <= self.n:
            raise SettingError(
                f"A certificate needs n >= 1 scores, got n = {self.n} with {self.non_finite} non-finite."
            )
        if (self.lower is None) != (self.method not in ("mean", "best")):
            raise SettingError(f"A certificate by {self.method!r} and a bound of the mean score do not go together.")
        if (self.band is None) != (self.method not in ("distribution", "best")):
            raise SettingError(f"A certificate by {self.method!r} and a band do not go together.")
        for name in ("mean", "lower", "unrelated"):
            if (value := getattr(self, name)) is not None and not -1 <= value <= 1:
                raise SettingError(f"{name} is a cosine and must be in [-1, 1], got {value}.")
        if self.image_shape is not None and not (self.image_shape and min(self.image_shape) >= 1):
            raise SettingError(f"image_shape must be sizes >= 1 such as (3, 224, 224), got {self.image_shape}.")

    @classmethod
    def from_scores(
        cls,
        scores: Any,
        *,
        sigma: float,
        alpha: float = 1e-3,
        method: Method = "best",
        angular: Angular | None = None,
        share: float = 1.0,
        **details: Any,
    ) -> Self:
        """The certificate that n i.i.d. scores give.

        Args:
            scores: (n,) numpy array, torch tensor or list of <u, v> in [-1, 1], in any order. Rounding up to 1e-6
                outside is clipped.
            sigma, alpha, method, angular, share: see the class.
            details: the class's descriptive fields (``space``, ``image_shape``, ``readouts``, ``reference``,
                ``encoder``, ``psm``, ``seed``, ``non_finite``, ``unrelated``).

        Raises:
            SettingError: scores that are none, a setting out of range, or an unknown method.
        """
        # Sorted, so that not even the rounding depends on the order they came in.
        values = np.sort(_scores(scores))
        _check(sigma, alpha, share)
        _check_method(method, angular)
        spent = alpha * share / (1 if angular is None else 2) / (2 if method == "best" else 1)
        return cls(
            sigma=float(sigma),
            n=len(values),
            alpha=float(alpha),
            method=method,
            mean=plugin_mean(values),
            lower=betting_lower(values, spent) if method in ("mean", "best") else None,
            band=Band.from_scores(values, spent) if method in ("distribution", "best") else None,
            angular=angular,
            share=float(share),
            **details,
        )

    @property
    def is_estimate(self) -> bool:
        """Whether this is the paper's estimate, which holds at no confidence, rather than a certificate."""
        return self.method == "plugin"

    @property
    def is_empty(self) -> bool:
        """Whether nothing is promised even without an attack: scores too low, or too few for alpha."""
        return self.fcsb(0.0) is None

    def fcsb(self, eps: float) -> float | None:
        """The certified cosine at l2 distance eps, in [0, 1]; None where nothing is promised.

        Raises:
            SettingError: a negative eps.
        """
        value = float(self._bound(_distance(eps)))
        return value if value > 0 else None

    def curve(self, eps: ArrayLike) -> Array:
        """``fcsb`` at many l2 distances at once, of their shape; NaN where nothing is promised."""
        value = self._bound(_distances(eps))
        return np.where(value > 0, value, np.nan)

    def by(self, method: Method) -> Certificate:
        """What one of this certificate's bounds says alone, for comparison on the same draws.

        It spends only its own part of alpha (a quarter where "best" was refined, see the class), and has no angular refinement.
        ``"plugin"`` is the paper's estimate and no certificate.

        Raises:
            SettingError: this certificate has no such bound.
        """
        _check_method(method, None)
        if method == self.method and self.angular is None:
            return self
        inner = self.share / (1 if self.angular is None else 2)
        own = inner / (2 if self.method == "best" and method != "best" else 1)
        parts = {
            "plugin": {"lower": None, "band": None, "share": self.share},
            "mean": {"lower": self.lower, "band": None, "share": own},
            "distribution": {"lower": None, "band": self.band, "share": own},
            "best": {"share": inner},
        }
        try:
            return replace(self, method=method, angular=None, **parts[method])  # type: ignore[arg-type]
        except SettingError:
            raise SettingError(
                f"This certificate was made with method={self.method!r} and has no bound {method!r}."
            ) from None

    def curves(self, eps: ArrayLike) -> dict[str, Array]:
        """What each bound of this certificate says by itself (see ``by``); NaN where it says nothing.

        ``"plugin"`` is the paper's estimate on the same draws and no certificate. ``"certified"`` is ``curve``.
        """
        names: list[Method] = ["plugin"]
        names += ["mean"] if self.lower is not None else []
        names += ["distribution"] if self.band is not None else []
        found = {str(name): self.by(name).curve(eps) for name in names}
        return found if self.is_estimate else {**found, "certified": self.curve(eps)}

    def radius(self, threshold: float = 0.5) -> float | None:
        """The largest l2 distance at which the certified cosine is at least ``threshold``.

        None where it is not even without an attack. Infinite only for the estimate of scores that are all 1.

        Raises:
            SettingError: a threshold outside [0, 1].
        """
        if not 0 <= threshold <= 1:
            raise SettingError(
                f"threshold is a cosine that can be certified, in [0, 1] (0.5 is usual), got {threshold}."
            )
        # At 0 itself nothing is promised.
        level = max(threshold, float(np.finfo(np.float64).tiny))
        delta = furthest(lambda delta: float(self._bound(np.array(delta * self.sigma))), level)
        return None if delta is None else delta * self.sigma

    def linf_radius(self, threshold: float = 0.5) -> float | None:
        """The l-inf distance that is certainly within ``radius``: divided by the root of the number of values.

        Raises:
            SettingError: ``image_shape`` is unknown.
        """
        if self.image_shape is None:
            raise SettingError(
                "An l-inf radius needs the number of values in the image, and this certificate has no image_shape. "
                "Pass image_shape=(C, H, W) to Certificate.from_scores."
            )
        radius = self.radius(threshold)
        return None if radius is None else radius / math.sqrt(math.prod(self.image_shape))

    def l1_radius(self, threshold: float = 0.5) -> float | None:
        """The l1 distance that is certainly within ``radius``: the same number, as l2 never exceeds l1."""
        return self.radius(threshold)

    def served_fcsb(self, eps: float, n0: int, beta: float, noise: Noise = "antithetic") -> float | None:
        """The certified cosine of what n0 draws serve, rather than of the infinite average.

        With probability at least 1 - alpha over the draws behind this certificate, the following holds for every
        image within l2 distance eps that was chosen without knowledge of the serving noise: with probability at
        least 1 - beta over that noise, the cosine of the served mean of n0 unit features and the reference is at
        least this. None where nothing is promised, which is often the case: one draw in 1/beta must not be lost.

        Args:
            eps: l2 distance in ``space``.
            n0: draws per served image.
            beta: the probability that one served answer may miss.
            noise: how the draws are served, ``"antithetic"`` (the default of ``enable``) or ``"iid"``.

        Raises:
            SettingError: a value out of range, or a method without a band.
        """
        if self.band is None:
            raise SettingError(
                f"method={self.method!r} knows only the mean score; what n0 draws serve follows from its distribution. "
                'Make the certificate with method="best" or "distribution".'
            )
        value = served_quantile(self.band, float(_distance(eps)) / self.sigma, n0, beta, noise)
        return value if value > 0 else None

    def __str__(self) -> str:
        """One line for people."""
        origin = f"{self.method}, n = {self.n}, sigma = {self.sigma:g}"
        if self.is_estimate:
            kind = f"estimate, not a certificate ({origin})"
        else:
            kind = f"certificate ({origin}, confidence {1 - self.alpha:.6g})"
        if self.is_empty:
            return f"{kind}: nothing is promised, the scores are too low or too few for alpha = {self.alpha:g}"
        radius = self.radius()
        if radius is None:
            return f"{kind}: cosine >= {self.fcsb(0.0):.3f} without an attack, nowhere >= 0.5"
        return f"{kind}: cosine >= 0.5 within l2 distance {radius:.3f}"

    def _bound(self, eps: Array) -> Array:
        """The bound of the cosine at l2 distances eps, where it is not negative."""
        delta = eps / self.sigma
        inner = self._inner(delta)
        if self.angular is None:
            return inner
        spent = self.alpha * self.share / 4
        t0, n = self.angular.t0, self.angular.n
        return np.asarray(
            angular_cosine(
                inner,
                mass=binomial_lower(self.angular.count, n, spent),
                mu=perpendicular_upper(self.angular.norm, t0=t0, n=n, alpha=spent),
                t0=t0,
                delta=delta,
            )
        )

    def _inner(self, delta: Array) -> Array:
        """The method's bound of <m(x'), v>."""
        bounds = [] if self.band is None else [self.band.bound(delta)]
        if self.method != "distribution":
            bounds.append(mean_bound(self.mean if self.lower is None else self.lower, delta))
        return np.max(bounds, axis=0)


@dataclass(frozen=True, kw_only=True)
class PredictionCertificate(_Stored):
    """How far an image can move before a zero-shot or linear classifier's answer may change.

    **The contract.** With probability at least 1 - alpha over the n draws behind it, for every image within the l2
    distance in question of the certified one,

    - ``vote_radius``: a single noisy draw's own prediction is ``predicted`` with probability above 1/2, so
      that the majority vote over draws stays;
    - ``feature_radius``: of all classes, ``predicted`` has the largest product with the *averaged* unit feature.

    Each spends half of alpha, so both hold together. None is an abstention. ``predicted`` was chosen on other draws.

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

    _kind: ClassVar[str] = "prediction"

    def __post_init__(self) -> None:
        _as_tuples(self, "image_shape", "readouts", "encoder")
        _check(self.sigma, self.alpha, self.share)
        if self.n < 1 or not 0 <= self.votes <= self.n:
            raise SettingError(f"votes must be between 0 and n, and n >= 1, got {self.votes} votes of {self.n}.")

    @classmethod
    def from_draws(
        cls,
        votes: int,
        margins: Any,
        *,
        predicted: int,
        sigma: float,
        alpha: float = 1e-3,
        share: float = 1.0,
        **details: Any,
    ) -> Self:
        """The certificate that n i.i.d. draws give.

        Args:
            votes: how many draws predicted class ``predicted`` by themselves; a non-finite draw votes for nobody.
            margins: (n, K - 1) from ``bounds.margin_scores``; rows of a non-finite draw are -1.
            predicted: the class, chosen on other draws.
            sigma, alpha, share: see the class.
            details: the class's descriptive fields.

        Raises:
            SettingError: a value out of range.
        """
        _check(sigma, alpha, share)
        values = _scores(margins, dimensions=2)
        half = alpha * share / 2
        return cls(
            sigma=float(sigma),
            n=len(values),
            alpha=float(alpha),
            predicted=int(predicted),
            votes=int(votes),
            vote_radius=vote_radius(int(votes), len(values), sigma=sigma, alpha=half),
            feature_radius=argmax_radius(values, sigma=sigma, alpha=half),
            share=float(share),
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


AnyCertificate = Certificate | PredictionCertificate


def from_json(text: str) -> AnyCertificate:
    """The certificate of either kind that ``to_json`` wrote.

    Raises:
        SettingError: not such a line.
    """
    kind = PredictionCertificate if f'"{PredictionCertificate._kind}"' in text[:40] else Certificate
    return kind.from_json(text)


def _scores(scores: Any, dimensions: int = 1) -> Array:
    """Scores as float64, checked and clipped to [-1, 1]."""
    if callable(getattr(scores, "detach", None)):
        # numpy knows no bfloat16.
        scores = scores.detach().cpu().double().numpy()
    try:
        values = np.asarray(scores, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise SettingError(f"scores must be numbers, got {type(scores).__name__}: {error}.") from error
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


def _distances(eps: ArrayLike) -> Array:
    try:
        values = np.asarray(eps, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise SettingError(f"eps must be numbers, got {eps!r}.") from error
    if not (values >= 0).all():
        raise SettingError(f"eps is an l2 distance and must be >= 0, got {values.min():g}.")
    return values


def _distance(eps: Any) -> Array:
    if np.ndim(eps):
        raise SettingError(
            f"eps must be one number here, got shape {np.shape(eps)}. For many, use Certificate.curve(eps)."
        )
    return _distances(eps)


def _check(sigma: float, alpha: float, share: float) -> None:
    for name, value, meaning in (
        ("alpha", alpha, "the probability that the certificate may be wrong (0.001 is usual)"),
        ("share", share, "the part of alpha that this certificate may spend"),
    ):
        if not isinstance(value, Real) or not 0 < value <= 1 or (name == "alpha" and value == 1):
            raise SettingError(f"{name} is {meaning} and must be between 0 and 1, got {value!r}.")
    if isinstance(sigma, bool) or not isinstance(sigma, Real) or not 0 < sigma < math.inf:
        raise SettingError(
            f"sigma must be a finite number > 0 in [0, 1] pixel units (0.25 is usual), got {sigma!r}. "
            "Without noise nothing can be certified."
        )


def check_settings(*, alpha: float, method: str) -> None:
    """Refuse an alpha or a method that no certificate can have, before anything is drawn."""
    _check(1.0, alpha, 1.0)
    _check_method(method, None)


def _check_method(method: Any, angular: Angular | None) -> None:
    if method not in get_args(Method):
        raise SettingError(f"method must be one of {get_args(Method)}, got {method!r}.")
    if method == "plugin" and angular is not None:
        raise SettingError('method="plugin" is the paper\'s formula as printed; it takes no angular statistics.')


def _as_tuples(certificate: Any, *names: str) -> None:
    """A shape may come as a list or a torch.Size; a frozen value holds tuples."""
    for name in names:
        if (value := getattr(certificate, name)) is not None:
            object.__setattr__(certificate, name, tuple(value))
