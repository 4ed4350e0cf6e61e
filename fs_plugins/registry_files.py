"""Registry files: where they are, reading them, and putting an entry into one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from fs_plugins import files, plain_yaml
from fs_plugins.errors import OutputError, RegistryError, SettingError
from fs_plugins.registry_entries import Content, Families
from fs_plugins.sources import at_home

USER = "FS_PLUGINS_REGISTRY"
"""Environment variable: the user's registry file."""
_TURN = 60.0
"""Seconds that a writer waits for others."""


def load(path: Path, families: Families | None = None) -> Content:
    """Read and validate one registry file.

    Args:
        families: what the architectures of known families must say.

    Raises:
        RegistryError: unreadable, not YAML, an unknown key or a wrong type, with its place in the file.
    """
    return _valid(_read(path), path, families)


def _read(path: Path) -> Any:
    try:
        return plain_yaml.value(path) or {"version": 1}  # an empty file is an empty registry
    except OSError as error:
        raise RegistryError(f"Cannot read the registry {path}: {error}.") from None
    except UnicodeDecodeError as error:
        raise RegistryError(f"The registry {path} is not text in UTF-8: {error}.") from None
    except ValueError as error:
        raise RegistryError(f"The registry {path} is not YAML: {error}.") from None


def _valid(data: object, path: Path, families: Families | None) -> Content:
    try:
        return Content.model_validate(data, context=families)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors()[:5])
        raise RegistryError(f"The registry {path} breaks its schema: {problems}.") from None


def put(
    path: Path,
    section: Literal["encoders", "purifiers"],
    name: str,
    entry: Mapping[str, Any],
    families: Families | None = None,
    *,
    replace: bool = True,
) -> None:
    """Put an entry at the top of a file's section, in place of any of its name; the file is replaced whole.

    Comments in the file are lost. Several processes may do this at once; each waits for its turn.

    Args:
        families: what the architectures of known families must say.
        replace: whether an entry of the file that has this name already makes way.

    Raises:
        RegistryError: the file, or the entry, breaks the schema, or the name is taken; the file is as it was.
        OutputError: it cannot be written.
    """
    path = files.real(path)
    if not path.is_file():
        raise RegistryError(f"{path} is no file to write a registry to.")
    try:
        with files.locked_file(path, "this entry", wait=_TURN):
            _put(path, section, name, entry, families, replace)
    except OutputError:
        raise
    except SettingError as error:
        raise RegistryError(str(error)) from None


def _put(
    path: Path,
    section: Literal["encoders", "purifiers"],
    name: str,
    entry: Mapping[str, Any],
    families: Families | None,
    replace: bool,
) -> None:
    data = _read(path)
    _valid(data, path, families)
    if not replace and any(name in data.get(part, {}) for part in ("encoders", "purifiers")):
        raise RegistryError(f"{name!r} is in {path} already.")
    for entries in (data.get("encoders", {}), data.get("purifiers", {})):
        entries.pop(name, None)
    data[section] = {name: dict(entry), **data.get(section, {})}
    _valid(data, path, families)
    text = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
    files.replace(path, text)


def user_path() -> Path:
    """The user's registry file: FS_PLUGINS_REGISTRY, or ~/.config/fs-plugins/registry.yaml.

    Raises:
        RegistryError: that would be in a home directory, and nobody knows where it is.
    """
    if given := os.environ.get(USER):
        return at_home(given).absolute()
    return at_home(os.environ.get("XDG_CONFIG_HOME") or "~/.config") / "fs-plugins" / "registry.yaml"


def user_files() -> list[Path]:
    """The user's registry file, if there is one; what FS_PLUGINS_REGISTRY names has to be there, if only /dev/null.

    Raises:
        RegistryError: FS_PLUGINS_REGISTRY is in a home directory that nobody knows.
    """
    if os.environ.get(USER):
        return [user_path()]
    with suppress(RegistryError):  # no home directory, no file in it
        if os.path.exists(path := user_path()):  # unlike Path's, False also where one may not look
            return [path]
    return []


def shipped_path() -> Path:
    """registry.yaml: inside the installed package, or at the top of a checkout."""
    package = Path(__file__).parent
    inside = package / "registry.yaml"
    return inside if inside.exists() else package.parent / "registry.yaml"
