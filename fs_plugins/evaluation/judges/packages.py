"""Optional packages that judges need."""

from __future__ import annotations

import importlib
from types import ModuleType

from fs_plugins.errors import SettingError


def package(name: str, who: str) -> ModuleType:
    """An optional package, imported when a judge that needs it is made: before hours of captions, not after."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        distribution = name.replace("_", "-")
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            raise SettingError(f'{who} needs {distribution}: pip install "fs-plugins[judges]".') from None
        raise SettingError(
            f"{who} needs {distribution}, which is installed and cannot be imported: {error}."
        ) from error
