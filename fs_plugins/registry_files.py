"""Registry files: where they are, reading them, and putting an entry into one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from fs_plugins import files
from fs_plugins.errors import RegistryError
from fs_plugins.registry_entries import Content, Families

USER = "FS_PLUGINS_REGISTRY"
"""Environment variable: the user's registry file."""


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
        return yaml.safe_load(path.read_text("utf-8")) or {"version": 1}  # an empty file is an empty registry
    except OSError as error:
        raise RegistryError(f"Cannot read the registry {path}: {error}.") from None
    except UnicodeDecodeError as error:
        raise RegistryError(f"The registry {path} is not text in UTF-8: {error}.") from None
    except yaml.YAMLError as error:
        raise RegistryError(f"The registry {path} is not YAML: {error}") from None


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
) -> None:
    """Put an entry at the top of a file's section, in place of any of its name; the file is replaced whole.

    Comments in the file are lost.

    Args:
        families: what the architectures of known families must say.

    Raises:
        RegistryError: the file, or the entry, breaks the schema, or it cannot be written; the file is as it was.
    """
    path = path.resolve()
    if not path.is_file():
        raise RegistryError(f"{path} is no file to write a registry to.")
    data = _read(path)
    _valid(data, path, families)
    for entries in (data.get("encoders", {}), data.get("purifiers", {})):
        entries.pop(name, None)
    data[section] = {name: dict(entry), **data.get(section, {})}
    _valid(data, path, families)
    text = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
    try:
        files.replace(path, text)
    except OSError as error:
        raise RegistryError(f"The registry {path} cannot be written: {error}.") from None


def user_path() -> Path:
    """The user's registry file: FS_PLUGINS_REGISTRY, or ~/.config/fs-plugins/registry.yaml."""
    if given := os.environ.get(USER):
        return Path(given).expanduser().absolute()
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    return folder / "fs-plugins" / "registry.yaml"


def user_files() -> list[Path]:
    """The user's registry file, if there is one; what FS_PLUGINS_REGISTRY names has to be there, if only /dev/null."""
    path = user_path()
    return [path] if path.exists() or os.environ.get(USER) else []


def shipped_path() -> Path:
    """registry.yaml: inside the installed package, or at the top of a checkout."""
    package = Path(__file__).parent
    inside = package / "registry.yaml"
    return inside if inside.exists() else package.parent / "registry.yaml"
