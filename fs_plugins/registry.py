"""registry.yaml: encoders -> architecture, weights, preprocessing and the PSM that fits.

An encoder is found by what it *is*: its architecture, and a fingerprint of its weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from fs_plugins.errors import PSMError, RegistryError
from fs_plugins.identity import fingerprint, same_encoder
from fs_plugins.psm import PSM
from fs_plugins.psm.bundle import CONFIG_NAME, WEIGHTS_NAME, fetch
from fs_plugins.vision import VisionCall


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Architecture(_Strict):
    """What kind of network the encoder is."""

    family: Literal["clip_vision"]
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int
    image_size: int
    hidden_act: Literal["quick_gelu", "gelu"]


class Preprocessing(_Strict):
    """How images become the encoder's pixels, in [0, 1] units."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear"]


class Weights(_Strict):
    """Where the encoder's weights come from."""

    source: Literal["shipped", "hub"]
    location: str
    format: Literal["transformers", "open_clip"] = "transformers"
    training: str | None = None


class PSMEntry(_Strict):
    """A trained PSM for one readout of the encoder, or the statement that there is none yet.

    ``sigma`` is what it serves at when nobody asks for another within ``sigma_range``. ``path`` is a folder (relative to
    the registry file, or ``package:`` inside fs_plugins) or a hub id; ``sha256`` covers its config.json and
    psm.safetensors, in this order.
    """

    readout: str
    state: Literal["shipped", "hub", "not trained yet"]
    sigma: float | None = None
    sigma_range: tuple[float, float] | None = None
    path: str | None = None
    revision: str | None = None
    sha256: str | None = None

    @model_validator(mode="after")
    def _whole(self) -> PSMEntry:
        given = [name for name in ("sigma", "path", "sha256") if getattr(self, name) is not None]
        if self.state == "not trained yet" and given:
            raise ValueError(f"a PSM that is 'not trained yet' has no {', '.join(given)}")
        if self.state != "not trained yet" and len(given) < 3:
            raise ValueError("a PSM needs sigma, path and sha256, or state: not trained yet")
        if self.sigma_range is not None and not (
            self.sigma is not None and 0 < self.sigma_range[0] <= self.sigma <= self.sigma_range[1]
        ):
            raise ValueError(f"sigma_range {list(self.sigma_range)} does not hold sigma {self.sigma}")
        return self

    def covers(self, sigma: float | None) -> bool:
        """Whether there is a PSM that serves at this sigma; None asks for any."""
        if self.sigma is None or sigma is None:
            return self.sigma is not None
        low, high = self.sigma_range or (self.sigma, self.sigma)
        return low - 1e-9 <= sigma <= high + 1e-9

    @property
    def sigmas(self) -> str:
        """What it covers, in words."""
        if self.sigma_range is None:
            return f"sigma {self.sigma:g}"
        return f"sigma {self.sigma_range[0]:g} to {self.sigma_range[1]:g}"


class Entry(_Strict):
    """One encoder. ``psm_of`` names the entry whose PSMs it uses unchanged (FARE and TeCoA use the vanilla one's)."""

    kind: Literal["vanilla", "fare", "tecoa"]
    used_by: tuple[str, ...] = ()
    architecture: Architecture
    weights: Weights
    preprocessing: Preprocessing
    fingerprint: tuple[float, ...] | Literal["unverified"]
    psms: tuple[PSMEntry, ...] = ()
    psm_of: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Entry:
        if bool(self.psms) == (self.psm_of is not None):
            raise ValueError("give either psms or psm_of")
        return self


class _File(_Strict):
    version: Literal[1]
    encoders: dict[str, Entry]

    @model_validator(mode="after")
    def _references(self) -> _File:
        for name, entry in self.encoders.items():
            if entry.psm_of is not None and entry.psm_of not in self.encoders:
                raise ValueError(f"{name}.psm_of names {entry.psm_of!r}, which is no entry")
        return self


@dataclass(frozen=True)
class Match:
    """What ``find`` found: the encoder's entry, the PSM's, and how sure it is."""

    name: str
    psm_name: str
    psm: PSMEntry
    root: Path


class Registry:
    """Encoders by name, from one or several files; the first file that has a name wins."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.entries: dict[str, Entry] = {}
        self._roots: dict[str, Path] = {}
        for path in files:
            for name, entry in load(path).encoders.items():
                if name not in self.entries:
                    self.entries[name] = entry
                    self._roots[name] = path.parent

    def recognise(self, call: VisionCall) -> list[str]:
        """Names of the entries with this encoder's weights; else of those of its architecture that nobody could verify."""
        alike = [
            name for name, entry in self.entries.items() if entry.architecture.model_dump() == dict(call.architecture)
        ]
        known = [name for name in alike if self.entries[name].fingerprint != "unverified"]
        if known:
            own = fingerprint(call.module)
            same = [name for name in known if same_encoder(own, self.entries[name].fingerprint)]  # type: ignore[arg-type]
            if same:
                return same
        return [name for name in alike if self.entries[name].fingerprint == "unverified"]

    def find(self, call: VisionCall, sigma: float | None = None) -> Match:
        """The PSM for this encoder, readout and resolution.

        Raises:
            RegistryError: there is none, with what there is and what can be done.
        """
        readouts = [readout.name for readout in call.readouts]
        names = self.recognise(call)
        for name in names:
            owner = self.entries[name].psm_of or name
            for psm in self.entries[owner].psms:
                if psm.readout in readouts and psm.covers(sigma):
                    return Match(name, owner, psm, self._roots[owner])
        raise RegistryError(self._nothing(call, names, readouts, sigma))

    def load(self, match: Match, **parts: Any) -> PSM:
        """Fetch a match's PSM, its checksum compared before a byte is parsed.

        Raises:
            PSMError, RegistryError: damaged, missing, or not what the entry says.
        """
        psm = match.psm
        assert psm.path is not None
        if psm.state == "shipped":
            folder = _resolve(psm.path, match.root)
            if not folder.is_dir():
                raise RegistryError(
                    f"The registry's PSM of {match.psm_name!r} is not at {folder}. Reinstall fs-plugins."
                )
        else:
            folder = fetch(psm.path, psm.revision)
        found = checksum(folder)
        if found != psm.sha256:
            raise PSMError(
                f"The PSM of {match.psm_name!r} in {folder} does not have the registry's checksum "
                f"(found {found}, expected {psm.sha256}): damaged, or changed by somebody. Reinstall or fetch it again."
            )
        return PSM.from_pretrained(folder, **parts)

    def _nothing(self, call: VisionCall, names: list[str], readouts: list[str], sigma: float | None) -> str:
        trained = [
            f"{name} ({psm.readout}, {entry.architecture.image_size}x{entry.architecture.image_size}, {psm.sigmas})"
            for name, entry in self.entries.items()
            for psm in entry.psms
            if psm.sigma is not None
        ]
        architecture = ", ".join(f"{key} {value}" for key, value in call.architecture.items())
        known = f"It has the architecture of {', '.join(names)}. " if names else ""
        at = f" at sigma {sigma:g}" if sigma is not None else ""
        return (
            f"No PSM in the registry fits this encoder ({architecture}) and readout {', '.join(readouts)}{at}. {known}"
            f"Trained PSMs exist for: {'; '.join(trained) or 'none'}. Train one with "
            "fs_plugins.training.train_psm (docs/training.md) and pass its folder as psm=..., or pass psm=None with a "
            "sigma (0.25 is usual) for plain smoothing."
        )


def load(path: Path) -> _File:
    """Read and validate one registry file.

    Raises:
        RegistryError: unreadable, not YAML, an unknown key or a wrong type, with its place in the file.
    """
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise RegistryError(f"Cannot read the registry {path}: {error}.") from None
    except yaml.YAMLError as error:
        raise RegistryError(f"The registry {path} is not YAML: {error}") from None
    try:
        return _File.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors()[:5])
        raise RegistryError(f"The registry {path} breaks its schema: {problems}.") from None


def shipped_path() -> Path:
    """registry.yaml: inside the installed package, or at the top of a checkout."""
    package = Path(__file__).parent
    inside = package / "registry.yaml"
    return inside if inside.exists() else package.parent / "registry.yaml"


@cache
def shipped() -> Registry:
    return Registry([shipped_path()])


def checksum(folder: Path) -> str:
    """SHA-256 over a PSM folder's config.json and psm.safetensors, in this order."""
    digest = hashlib.sha256()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        path = folder / name
        if not path.is_file():
            raise PSMError(f"{folder} is no PSM folder: {name} is missing.")
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _resolve(path: str, root: Path) -> Path:
    if path.startswith("package:"):
        return Path(__file__).parent / path.removeprefix("package:")
    return root / path
