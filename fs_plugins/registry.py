"""registry.yaml: encoders -> architecture, weights, preprocessing and the PSM that fits; purifiers for any encoder.

An encoder is found by what it *is*: its architecture, and a fingerprint of its weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import nn

from fs_plugins import sources
from fs_plugins.errors import FSPluginsError, ModelError, PSMError, RegistryError
from fs_plugins.files import filling, writing
from fs_plugins.psm import PSM, Part, PSMConfig
from fs_plugins.psm.diffusion import load_guided_diffusion
from fs_plugins.registry_entries import Entry, Families, PSMEntry, PurifierEntry, Trained
from fs_plugins.registry_files import USER as USER
from fs_plugins.registry_files import load as load
from fs_plugins.registry_files import put as put
from fs_plugins.registry_files import shipped_path as shipped_path
from fs_plugins.registry_files import user_files as user_files
from fs_plugins.registry_files import user_path as user_path
from fs_plugins.sources import checksum
from fs_plugins.vision import VisionCall

STAND_IN = "photo-light"
"""The purifier that serves encoders without a PSM of their own: of those that ship the one that costs a quarter and,
on an encoder that neither knows, leaves the class right as often (``benchmarks/features.py``)."""


class Parts(TypedDict, total=False):
    """What plugins add to the purifiers and mappers that ship, by kind."""

    purifiers: dict[str, type[nn.Module]]
    mappers: dict[str, type[nn.Module]]


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
        alone = "" if self.psm.mapped else " by its purifier alone"
        return (
            f"{self.name} (by its {how}): PSM{borrowed}, {self.psm.readout}{alone}, sigma {self.psm.sigmas}, "
            f"{self.psm.origin}, as {self.file} says{passed_over}"
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
            f"{self.reason} The purifier {self.name!r} stands in, without a mapper: it knows pictures, not this "
            f"encoder, so accuracy and certificates are usually lower than with a PSM of its own. {exact} "
            f"psm={self.name!r} is the same without this warning."
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

    Args:
        files: the first has the first word.
        families: what the architectures of known families must say; plugins know
            (``fs_plugins.plugins.encoder_families``).
    """

    def __init__(self, files: Sequence[Path], families: Families | None = None) -> None:
        self.entries: dict[str, Entry] = {}
        self.purifiers: dict[str, PurifierEntry] = {}
        self.files: dict[str, list[Path]] = {}
        for path in dict.fromkeys(files):
            content = load(path, families)
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

    def notes(self, name: str) -> list[str]:
        """What of an entry is not in use, in sentences without their subject."""
        first, *hidden = self.files[name]
        others = self.passed_over(name) if name in self.entries else {}
        return [f"{first} hides what {file} says of it" for file in hidden] + [
            f"{other} comes first for {', '.join(readouts)} of the same weights" for other, readouts in others.items()
        ]

    def recognise(self, call: VisionCall) -> list[str]:
        """Names of the entries with this encoder's weights; else of those of its architecture that nobody verified."""
        alike = [
            name for name, entry in self.entries.items() if entry.architecture.model_dump() == dict(call.architecture)
        ]
        if any(self.entries[name].verified for name in alike):
            own = call.fingerprint()
            if same := [name for name in alike if self.entries[name].has(own)]:
                return same
        return [name for name in alike if not self.entries[name].verified]

    @property
    def variants(self) -> tuple[str, ...]:
        """The names by which PSMs are asked for that ``"auto"`` does not take."""
        named = [psm.variant for entry in self.entries.values() for psm in entry.psms if psm.variant is not None]
        return tuple(dict.fromkeys(named))

    def find(self, call: VisionCall, sigma: float | None = None, variant: str | None = None) -> Match:
        """The PSM for this encoder, readout and resolution.

        Args:
            variant: one of ``variants``; None for the PSM that ``"auto"`` takes.

        Raises:
            RegistryError: there is none, with what there is and what can be done.
        """
        readouts = [readout.name for readout in call.readouts]
        names = self.recognise(call)
        fits = [
            (name, psm)
            for name in names
            for psm in self.psms(name)
            if psm.readout in readouts and psm.covers(sigma) and psm.variant == variant
        ]
        if not fits:
            raise RegistryError(self._nothing(call, names, readouts, sigma, variant))
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

    def load(self, match: Match | StandIn, **parts: Unpack[Parts]) -> PSM:
        """Fetch what was chosen, its checksum compared before a byte is parsed.

        Raises:
            PSMError, RegistryError: damaged, missing, or not what the entry says.
        """
        if isinstance(match, StandIn):
            return self.purifier(match.name, **parts)
        folder = match.psm.fetch(match.file.parent, f"The PSM of {match.psm_name!r}")
        psm = PSM.from_pretrained(folder, **parts)
        return psm if match.psm.mapped else psm.only(mapper=False)

    def purifier(self, name: str, **parts: Unpack[Parts]) -> PSM:
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
        folder = sources.cache() / _converted(entry)
        try:
            psm = PSM.from_pretrained(folder, **parts)
        except PSMError:  # not there yet, or damaged
            _convert(entry, entry.fetch(self._roots[name], what), folder)
            psm = PSM.from_pretrained(folder, **parts)
        psm.config = psm.config.model_copy(update={"name": name, "sigma": entry.sigma, "sigma_range": entry.span})
        return psm

    def verify(self, name: str | None = None, **parts: Unpack[Parts]) -> Iterator[Check]:
        """Compare every PSM and purifier, or those of one entry, with what its entry says, if it is on this machine."""
        for encoder in self.entries if name is None else self.entries.keys() & {name}:
            owner = self.entries[encoder].psm_of or encoder
            for psm in self.psms(encoder) if name or owner == encoder else ():
                yield from self._checks(f"{owner}, {psm.readout}", owner, psm, parts)
        for purifier in self.purifiers if name is None else self.purifiers.keys() & {name}:
            yield from self._checks(purifier, purifier, self.purifiers[purifier], parts)

    def _checks(self, what: str, name: str, trained: Trained, parts: Parts) -> Iterator[Check]:
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
        if trained.one_file and (folder := sources.cached(_converted(trained))):
            yield self._compared(f"{what}, converted", folder, name, trained, parts)

    def _compared(self, what: str, folder: Path, name: str, trained: Trained, parts: Parts) -> Check:
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
        if isinstance(trained, PSMEntry) and config.readouts and trained.mapped:
            if trained.readout not in [readout.name for readout in config.readouts]:
                wrong.append(f"has no mapper for {trained.readout}")
            if self.entries[name].verified and not self.entries[name].has(config.fingerprint):
                wrong.append("was trained for other weights")
        return Check(what, not wrong, f"{folder} {' and '.join(wrong) or 'is what its entry says'}")

    def _nothing(
        self, call: VisionCall, names: list[str], readouts: list[str], sigma: float | None, variant: str | None
    ) -> str:
        trained = [
            f"{name} ({psm.readout}, {entry.architecture.model_dump().get('image_size')} pixels, sigma {psm.sigmas})"
            for name, entry in self.entries.items()
            for psm in entry.psms
            if psm.trained and psm.variant == variant
        ]
        architecture = ", ".join(f"{key} {value}" for key, value in call.architecture.items())
        known = f"It has the architecture of {', '.join(names)}. " if names else ""
        return (
            f"No {variant + ' ' if variant else ''}PSM in the registry fits this encoder ({architecture}) and readout "
            f"{', '.join(readouts)}{_at(sigma)}. {known}Trained PSMs exist for: {'; '.join(trained) or 'none'}. Train "
            "one with `fs-plugins train` (docs/how-to/train-a-psm.md) and pass its folder as psm=..., or pass psm=None "
            "with a sigma (0.25 is usual) for plain smoothing."
        )


def _at(sigma: float | None) -> str:
    return "" if sigma is None else f" at sigma {sigma:g}"


def _converted(entry: Trained) -> str:
    return f"{entry.sha256}-converted"


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
    with writing(folder), filling(folder) as fresh:
        psm.save_pretrained(fresh)


@cache
def shipped() -> Registry:
    """The registry that ships, alone."""
    return Registry([shipped_path()])
