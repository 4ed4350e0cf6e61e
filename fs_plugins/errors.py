"""Everything that fs_plugins raises at a user is an FSPluginsError."""

from __future__ import annotations

import sys
import warnings


class FSPluginsError(Exception):
    """Base of all user errors. The message says what was wrong, what was expected and what to do."""


class SettingError(FSPluginsError, ValueError):
    """An argument is out of range or does not go with another."""


class ModelError(FSPluginsError, TypeError):
    """The model is not one that can be smoothed: nobody claims it, several do, or its state forbids it."""


class PixelError(FSPluginsError, ValueError):
    """The pixels that reached the vision encoder are not what the adapter declared."""


class PSMError(FSPluginsError, ValueError):
    """A PSM does not fit the encoder, or its checkpoint is damaged."""


class RegistryError(FSPluginsError, ValueError):
    """A registry file breaks its schema, or an entry does not resolve."""


class PluginError(FSPluginsError, RuntimeError):
    """A plugin cannot be imported or breaks the hook specification."""


class JudgeError(FSPluginsError, RuntimeError):
    """A judge gives no score: its model cannot be loaded, its endpoint not be reached, or what it says is no score."""


class EndpointError(FSPluginsError, RuntimeError):
    """A served model gives no answer: its server refuses, cannot be reached, or speaks another protocol."""


class OutputError(SettingError, OSError):
    """A file, a folder or a repository of the hub cannot be written: it is in the way, protected, the disk is full, or
    the network is gone. What was there stays.
    """


class FSPluginsWarning(UserWarning):
    """Something legitimate that weakens, or may weaken, the protection."""


def warn(message: str) -> None:
    """Warn whoever called into fs_plugins, however deep inside this is."""
    package, level = __name__.partition(".")[0] + ".", 2
    frame = sys._getframe(1)
    while frame.f_back is not None and f"{frame.f_globals.get('__name__')}.".startswith(package):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, FSPluginsWarning, stacklevel=level)
