"""registry.yaml: encoders -> architecture, weights, preprocessing and the PSM that fits; purifiers for any encoder.

An encoder is found by what it *is*: its architecture, and a fingerprint of its weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fs_plugins import sources
from fs_plugins.errors import FSPluginsError, ModelError, PSMError, RegistryError
from fs_plugins.files import filling
from fs_plugins.identity import fingerprint, same_encoder
from fs_plugins.psm import PSM, Part, PSMConfig
from fs_plugins.psm.diffusion import load_guided_diffusion
from fs_plugins.sources import Source, checksum
from fs_plugins.vision import VisionCall

USER = "FS_PLUGINS_REGISTRY"
"""Environment variable: the user's registry file."""

STAND_IN = "photo"
"""The purifier that serves encoders without a PSM of their own."""

_CLIP_VISION = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size", "hidden_act",
)  # fmt: skip


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Architecture(BaseModel):
    """What kind of network the encoder is, in its adapter's words (``VisionCall.architecture``)."""

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, int | str]

    family: str

    @model_validator(mode="after")
    def _whole(self) -> Architecture:
        said = self.__pydantic_extra__
        wrong = said.keys() ^ set(_CLIP_VISION)
        wrong |= {key for key, value in said.items() if isinstance(value, str) != (key == "hidden_act")}
        if self.family == "clip_vision" and wrong:
            raise ValueError(
                f"{', '.join(sorted(wrong))}: clip_vision has {', '.join(_CLIP_VISION)}; all but the last are numbers"
            )
        return self


class Preprocessing(_Strict):
    """How images become the encoder's pixels, in [0, 1] units."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear"] | None = None


class Weights(_Strict):
    """Where the encoder's weights come from."""

    source: Literal["shipped", "folder", "hub"]
    location: str
    format: Literal["transformers", "open_clip"] = "transformers"
    training: str | None = None


class Trained(Source):
    """A trained PSM or purifier and where it is, or the statement that there is none yet.

    ``sigma`` is what it serves at when nobody asks for another within ``sigma_range``.
    """

    sigma: float | None = None
    sigma_range: tuple[float, float] | None = None
    licence: str | None = None

    @model_validator(mode="after")
    def _whole(self) -> Trained:
        if self.trained != (self.sigma is not None):
            raise ValueError(f"sigma {self.sigma} does not go with state: {self.state}")
        if self.sigma_range is not None and not (
            self.sigma is not None and 0 < self.sigma_range[0] <= self.sigma <= self.sigma_range[1]
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
    """A PSM for one readout of the encoder."""

    readout: str


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


class _File(_Strict):
    version: Literal[1]
    encoders: dict[str, Entry] = Field(default_factory=dict)
    purifiers: dict[str, PurifierEntry] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _references(self) -> _File:
        for name, entry in self.encoders.items():
            if entry.psm_of is not None and entry.psm_of not in self.encoders:
                raise ValueError(f"{name}.psm_of names {entry.psm_of!r}, which is no entry")
        if both := self.encoders.keys() & self.purifiers.keys():
            raise ValueError(f"{', '.join(both)} is the name of an encoder and of a purifier")
        return self


@dataclass(frozen=True)
class Match:
    """What ``find`` found; ``str()`` of it is for people.

    Args:
        name, psm_name: the encoder's entry, and the one whose PSM it uses: another for FARE and TeCoA.
        file: the registry file that has the PSM.
        verified: whether the encoder's fingerprint says so, or its architecture alone.
        passed_over: further entries with a PSM that fits.
    """

    name: str
    psm_name: str
    psm: PSMEntry
    file: Path
    verified: bool
    passed_over: tuple[str, ...] = ()

    def __str__(self) -> str:
        how = "fingerprint" if self.verified else "architecture alone, nobody has verified its weights"
        borrowed = f" of {self.psm_name}, used unchanged" if self.name != self.psm_name else ""
        passed_over = f"; passed over: {', '.join(self.passed_over)}" if self.passed_over else ""
        return (
            f"{self.name} (by its {how}): PSM{borrowed}, {self.psm.readout}, sigma {self.psm.sigmas}, {self.psm.origin}, "
            f"as {self.file} says{passed_over}"
        )


@dataclass(frozen=True)
class StandIn:
    """A purifier in place of the PSM that an encoder does not have; ``str()`` of it is for people.

    Args:
        name: of the purifier.
        reason: why no PSM was taken, a sentence.
        unreadable: whether the encoder could not be recognised, for it is quantised or offloaded.
    """

    name: str
    reason: str
    unreadable: bool = False

    def __str__(self) -> str:
        exact = (
            "If you have a PSM of its own, pass psm=FOLDER."
            if self.unreadable
            else "Train one with `fs-plugins train PHOTOS --model MODEL --out FOLDER` (docs/how-to/train-a-psm.md) and "
            "pass psm=FOLDER."
        )
        return (
            f"{self.reason} The purifier {self.name!r} stands in, without a mapper: it knows pictures, not this encoder, so accuracy "
            f"and certificates are usually lower than with a PSM of its own. {exact} psm={self.name!r} is the same without this "
            "warning."
        )


@dataclass(frozen=True)
class Check:
    """One thing that ``verify`` looked at; ``right`` is None where it could not be checked."""

    what: str
    right: bool | None
    told: str


class Registry:
    """Encoders and purifiers by name, from one or several files; the first file that has a name wins.

    ``files`` has all files that define a name, the winner first.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.entries: dict[str, Entry] = {}
        self.purifiers: dict[str, PurifierEntry] = {}
        self.files: dict[str, list[Path]] = {}
        for path in dict.fromkeys(files):
            content = load(path)
            for name in (*content.encoders, *content.purifiers):
                self.files.setdefault(name, []).append(path)
            self.entries |= {name: e for name, e in content.encoders.items() if self.files[name] == [path]}
            self.purifiers |= {name: p for name, p in content.purifiers.items() if self.files[name] == [path]}
        self._roots = {name: paths[0].parent for name, paths in self.files.items()}

    def psms(self, name: str) -> tuple[PSMEntry, ...]:
        """The PSMs of an encoder: its own, or those it uses of another."""
        owner = self.entries.get(self.entries[name].psm_of or name)
        return owner.psms if owner else ()  # a purifier of another file may have taken its name

    def place(self, name: str, path: str) -> Path:
        """A path that an entry gives, on this machine."""
        return sources.resolve(path, self._roots[name])

    def passed_over(self, name: str) -> dict[str, list[str]]:
        """Entries that come before this one for the same weights -> the readouts that both have PSMs for."""
        served = {psm.readout for psm in self.psms(name) if psm.trained}
        found = {}
        for other in list(self.entries)[: list(self.entries).index(name)]:
            both = [psm.readout for psm in self.psms(other) if psm.trained and psm.readout in served]
            if both and self.entries[other].has(self.entries[name].fingerprint):
                found[other] = both
        return found

    def recognise(self, call: VisionCall) -> list[str]:
        """Names of the entries with this encoder's weights; else of those of its architecture that nobody could verify."""
        alike = [
            name for name, entry in self.entries.items() if entry.architecture.model_dump() == dict(call.architecture)
        ]
        if any(self.entries[name].verified for name in alike):
            own = fingerprint(call.module)
            if same := [name for name in alike if self.entries[name].has(own)]:
                return same
        return [name for name in alike if not self.entries[name].verified]

    def find(self, call: VisionCall, sigma: float | None = None) -> Match:
        """The PSM for this encoder, readout and resolution.

        Raises:
            RegistryError: there is none, with what there is and what can be done.
        """
        readouts = [readout.name for readout in call.readouts]
        names = self.recognise(call)
        fits = [
            (name, psm) for name in names for psm in self.psms(name) if psm.readout in readouts and psm.covers(sigma)
        ]
        if not fits:
            raise RegistryError(self._nothing(call, names, readouts, sigma))
        name, psm = fits[0]
        entry = self.entries[name]
        owner = entry.psm_of or name
        others = tuple(dict.fromkeys(other for other, _ in fits if other != name))
        return Match(name, owner, psm, self.files[owner][0], entry.verified, others)

    def choose(self, call: VisionCall, sigma: float | None = None) -> Match | StandIn:
        """The PSM for this encoder, else the purifier that stands in for one.

        Raises:
            RegistryError: there is neither at this sigma, or for images that are not RGB.
            ModelError: the encoder's weights cannot be read to recognise it, and there is no purifier.
        """
        try:
            return self.find(call, sigma)
        except (ModelError, RegistryError) as error:
            stand_in = self.purifiers.get(STAND_IN)
            if stand_in is None or not stand_in.covers(sigma) or len(call.pixels.mean) != 3:
                raise
            unreadable = isinstance(error, ModelError)
            reason = (
                str(error).partition(". ")[0] if unreadable else f"No PSM in the registry fits this encoder{_at(sigma)}"
            )
            return StandIn(STAND_IN, f"{reason}.", unreadable)

    def load(self, match: Match | StandIn, **parts: Any) -> PSM:
        """Fetch what was chosen, its checksum compared before a byte is parsed.

        Raises:
            PSMError, RegistryError: damaged, missing, or not what the entry says.
        """
        if isinstance(match, StandIn):
            return self.purifier(match.name, **parts)
        folder = match.psm.fetch(match.file.parent, f"The PSM of {match.psm_name!r}")
        return PSM.from_pretrained(folder, **parts)

    def purifier(self, name: str, **parts: Any) -> PSM:
        """A purifier by name, as a PSM without mappers that serves any encoder at any resolution.

        A public checkpoint is converted once, into the cache; only tensors are read, no code in it is run.

        Raises:
            RegistryError: no such purifier, or not trained yet, or not to be had.
            PSMError: damaged, or not what the entry says.
        """
        entry = self.purifiers.get(name)
        if entry is None or not entry.trained:
            trained = ", ".join(name for name, other in self.purifiers.items() if other.trained) or "none"
            wrong = "is not trained yet" if entry else "is no purifier of the registry"
            raise RegistryError(f"{name!r} {wrong}. Trained ones: {trained}.")
        what = f"The purifier {name!r}"
        if not entry.one_file:
            psm = PSM.from_pretrained(entry.fetch(self._roots[name], what), **parts)
            if psm.mapped or psm.config.purifier is None or psm.config.purifier.kind != entry.kind:
                raise PSMError(f"{what} must be a PSM of a purifier of kind {entry.kind!r} and no mapper.")
            return psm
        folder = _conversion(entry)
        try:
            psm = PSM.from_pretrained(folder, **parts)
        except PSMError:  # not there yet, or damaged
            _convert(entry, entry.fetch(self._roots[name], what), folder)
            psm = PSM.from_pretrained(folder, **parts)
        psm.config = psm.config.model_copy(update={"name": name, "sigma": entry.sigma, "sigma_range": entry.span})
        return psm

    def verify(self, name: str | None = None, **parts: Any) -> Iterator[Check]:
        """Compare every PSM and purifier, or those of one entry, with what its entry says, if it is on this machine."""
        for encoder in self.entries if name is None else self.entries.keys() & {name}:
            owner = self.entries[encoder].psm_of or encoder
            for psm in self.psms(encoder) if name or owner == encoder else ():
                yield from self._checks(f"{owner}, {psm.readout}", owner, psm, parts)
        for purifier in self.purifiers if name is None else self.purifiers.keys() & {name}:
            yield from self._checks(purifier, purifier, self.purifiers[purifier], parts)

    def _checks(self, what: str, name: str, trained: Trained, parts: dict[str, Any]) -> Iterator[Check]:
        if not trained.trained:
            return
        folder = trained.here(self._roots[name])
        if folder is None:
            right = False if trained.state in ("shipped", "folder") else None
            yield Check(what, right, f"not on this machine: {trained.origin}")
        elif (found := checksum(folder, trained.names)) != trained.sha256:
            yield Check(what, False, f"{folder} has the checksum {found}, not {trained.sha256}")
        elif trained.one_file:
            yield Check(what, True, f"{folder} has its checksum")
        else:
            yield self._compared(what, folder, name, trained, parts)
        if trained.one_file and _conversion(trained).is_dir():
            yield self._compared(f"{what}, converted", _conversion(trained), name, trained, parts)

    def _compared(self, what: str, folder: Path, name: str, trained: Trained, parts: dict[str, Any]) -> Check:
        """What a PSM says of itself beside what its entry says."""
        try:
            config = PSM.from_pretrained(folder, **parts).config
        except FSPluginsError as error:  # of a purifier that needs a package, say
            return Check(what, False, str(error))
        wrong = []
        if (config.sigma, config.sigma_range) != (trained.sigma, trained.span) and not trained.one_file:
            wrong.append(
                f"serves at sigma {config.sigma:g} of {config.sigma_range}, not {trained.sigma} of {trained.span}"
            )
        if isinstance(trained, PSMEntry) and config.readouts:
            if trained.readout not in [readout.name for readout in config.readouts]:
                wrong.append(f"has no mapper for {trained.readout}")
            if self.entries[name].verified and not self.entries[name].has(config.fingerprint):
                wrong.append("was trained for other weights")
        return Check(what, not wrong, f"{folder} {' and '.join(wrong) or 'is what its entry says'}")

    def _nothing(self, call: VisionCall, names: list[str], readouts: list[str], sigma: float | None) -> str:
        trained = [
            f"{name} ({psm.readout}, {entry.architecture.model_dump().get('image_size')} pixels, sigma {psm.sigmas})"
            for name, entry in self.entries.items()
            for psm in entry.psms
            if psm.trained
        ]
        architecture = ", ".join(f"{key} {value}" for key, value in call.architecture.items())
        known = f"It has the architecture of {', '.join(names)}. " if names else ""
        return (
            f"No PSM in the registry fits this encoder ({architecture}) and readout {', '.join(readouts)}{_at(sigma)}. {known}"
            f"Trained PSMs exist for: {'; '.join(trained) or 'none'}. Train one with `fs-plugins train` "
            "(docs/how-to/train-a-psm.md) and pass its folder as psm=..., or pass psm=None with a sigma (0.25 is usual) for "
            "plain smoothing."
        )


def _at(sigma: float | None) -> str:
    return "" if sigma is None else f" at sigma {sigma:g}"


def _conversion(entry: Trained) -> Path:
    return sources.cache() / f"{entry.sha256}-converted"


def _convert(entry: PurifierEntry, checkpoint: Path, folder: Path) -> None:
    """Write guided-diffusion's checkpoint, just verified, as a PSM."""
    facts: dict[str, Any] = {
        "name": entry.names[0],
        "sigma": entry.sigma,
        "sigma_range": entry.span,
        "image_size": None,
    }
    purifier = Part(kind=entry.kind, args=entry.args)
    with torch.device("meta"):
        psm = PSM(PSMConfig(**facts, purifier=purifier, encoder="any", fingerprint=()))
    psm.purifier = load_guided_diffusion(checkpoint / entry.names[0], **entry.args)
    with filling(folder) as fresh:
        psm.save_pretrained(fresh)


def load(path: Path) -> _File:
    """Read and validate one registry file.

    Raises:
        RegistryError: unreadable, not YAML, an unknown key or a wrong type, with its place in the file.
    """
    return _valid(_read(path), path)


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text()) or {"version": 1}  # an empty file is an empty registry
    except OSError as error:
        raise RegistryError(f"Cannot read the registry {path}: {error}.") from None
    except yaml.YAMLError as error:
        raise RegistryError(f"The registry {path} is not YAML: {error}") from None


def _valid(data: Any, path: Path) -> _File:
    try:
        return _File.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors()[:5])
        raise RegistryError(f"The registry {path} breaks its schema: {problems}.") from None


def put(path: Path, section: Literal["encoders", "purifiers"], name: str, entry: dict[str, Any]) -> None:
    """Put an entry at the top of a file's section, in place of any of its name; the file is replaced whole.

    Comments in the file are lost.

    Raises:
        RegistryError: the file, or the entry, breaks the schema; the file is as it was.
    """
    path = path.resolve()
    if not path.is_file():
        raise RegistryError(f"{path} is no file to write a registry to.")
    data = _read(path)
    _valid(data, path)
    for entries in (data.get("encoders", {}), data.get("purifiers", {})):
        entries.pop(name, None)
    data[section] = {name: entry, **data.get(section, {})}
    _valid(data, path)
    with filling(path.parent) as fresh:
        text = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=120)
        (fresh / path.name).write_text(text)


def user_path() -> Path:
    """The user's registry file: FS_PLUGINS_REGISTRY, or ~/.config/fs-plugins/registry.yaml."""
    if given := os.environ.get(USER):
        return Path(given).expanduser().absolute()
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    return folder / "fs-plugins" / "registry.yaml"


def user_files() -> list[Path]:
    """The user's registry file, if there is one; what FS_PLUGINS_REGISTRY names has to be there, if only as /dev/null."""
    path = user_path()
    return [path] if path.exists() or os.environ.get(USER) else []


def shipped_path() -> Path:
    """registry.yaml: inside the installed package, or at the top of a checkout."""
    package = Path(__file__).parent
    inside = package / "registry.yaml"
    return inside if inside.exists() else package.parent / "registry.yaml"


@cache
def shipped() -> Registry:
    return Registry([shipped_path()])
