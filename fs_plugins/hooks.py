"""Hook specifications: what a plugin may provide. This file is the documentation.

A plugin is a module (or object) that implements some of these with ``@fs_plugins.hookimpl`` and is named in
the entry-point group ``fs_plugins`` of its distribution. The adapters that ship come in by the same door.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

from fs_plugins.errors import PluginError

if TYPE_CHECKING:
    from torch import nn

    from fs_plugins.attacks.protocols import Attack
    from fs_plugins.evaluation.datasets.reader import Reader
    from fs_plugins.evaluation.judges.protocol import Judge
    from fs_plugins.patch import SmoothingEvent
    from fs_plugins.vision import VisionCall

GROUP = "fs_plugins"
DISABLE = "FS_PLUGINS_DISABLE"
"""Environment variable: comma-separated plugin names (entry points) that are not loaded."""

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def fs_vision_call(model: nn.Module, named: bool, processor: Any) -> VisionCall | Sequence[VisionCall] | None:
    """Claim a model: say where it looks at images.

    Called once by every ``enable``. Exactly one plugin may answer; two answers are an error that names both.
    Look through wrappers with ``fs_plugins.vision.unwrapped``; import the framework only inside. Most take the model
    alone; arguments that an implementation leaves out are not passed.

    :param model: what the user passed to ``enable``.
    :param named: whether the user asked for this plugin by its name (``enable(..., adapter=...)``).
    :param processor: what the user passed as ``processor=``, or None.
    :returns: one VisionCall for each vision encoder, or None if the model is not of this framework.

    .. versionadded:: 0.1
    """


@hookspec
def fs_unclaimed(model: nn.Module) -> str | None:
    """Say what is known of a model that no plugin claims: why it cannot be covered, or what its user can do.

    :param model: what the user passed to ``enable``.
    :returns: a sentence or two for the error, or None for models of other frameworks.

    .. versionadded:: 0.1
    """


@hookspec
def fs_purifiers() -> dict[str, type[nn.Module]]:
    """Provide purifiers by kind, the name that a PSM's ``config.json`` uses.

    A purifier takes its ``args`` as keywords and is called as ``purifier(images, sigma)`` with (N, 3, H, W)
    noisy images in [0, 1] units, unclamped; it returns images of the same shape.

    :returns: kind -> class.

    .. versionadded:: 0.1
    """
    raise AssertionError("a specification is never called")


@hookspec
def fs_mappers() -> dict[str, type[nn.Module]]:
    """Provide mappers by kind, the name that a PSM's ``config.json`` uses.

    A mapper takes its ``args`` as keywords and is called as ``mapper(z, sigma)`` with (N, L, D) tokens or (N, D)
    pooled vectors; it returns the same shape.

    :returns: kind -> class.

    .. versionadded:: 0.1
    """
    raise AssertionError("a specification is never called")


@hookspec
def fs_attacks() -> dict[str, Attack]:
    """Provide attacks by name, for ``fs_plugins.attacks.attack(..., method=name)`` and the suites of an evaluation.

    An attack has a ``name`` for tables, an ``optimiser`` (``Ascent()`` along gradients, ``Squares()`` without), and
    ``objective(victims, aims, stream, sign)``, which returns what is climbed. ``fs_plugins.attacks.Method`` makes one
    from a similarity of pictures. The names of the attacks that ship, and of another plugin's, are taken.

    :returns: name -> attack.

    .. versionadded:: 0.1
    """
    raise AssertionError("a specification is never called")


@hookspec
def fs_datasets() -> dict[str, Reader]:
    """Provide readers of folders by name, for ``fs_plugins.evaluation.open_dataset(folder)`` and all that evaluates.

    A ``fs_plugins.evaluation.datasets.Reader`` says by which file or folder it recognises its data, and reads a
    ``Dataset``. What a reader that ships recognises, it reads. The names of the readers that ship, and of another
    plugin's, are taken.

    :returns: name -> reader.

    .. versionadded:: 0.1
    """
    raise AssertionError("a specification is never called")


@hookspec
def fs_judges() -> dict[str, Callable[..., Judge]]:
    """Provide judges by name, for ``fs_plugins.evaluation.judges.judge(name, **options)``.

    A factory takes its options as keywords and returns a ``Judge``: a ``name`` for result files, and ``scores(pairs)``,
    which yields a score in [0, 1] for each (said, reference) in order, and raises ``fs_plugins.JudgeError`` at a pair
    that gets none. The names of the judges that ship, and of another plugin's, are taken.

    :returns: name -> factory.

    .. versionadded:: 0.1
    """
    raise AssertionError("a specification is never called")


@hookspec
def fs_registries() -> Sequence[Path]:
    """Provide further registry files (the schema of ``registry.yaml``), searched after the
    user's file and before the one that ships.

    :returns: paths of YAML files; folders inside them are relative to the file.

    .. versionadded:: 0.1
    """
    raise AssertionError("a specification is never called")


@hookspec
def fs_encoder_families() -> dict[str, Mapping[str, type[int] | type[str]]]:
    """Say what a registry has to tell of an encoder's architecture, by family: ``VisionCall.architecture["family"]``.

    An entry of such a family that leaves something out, or says something else, is refused when it is read; one of a
    family that nobody describes is taken as it is, and an encoder is then not recognised if the entry is wrong.

    :returns: family -> all that ``VisionCall.architecture`` says beside the family, each ``int`` or ``str``.

    .. versionadded:: 0.1
    """
    raise AssertionError("a specification is never called")


@hookspec
def fs_packages() -> Sequence[str]:
    """Name the packages that your plugin is for: ``fs-plugins doctor`` lists their versions, or that they are missing.

    :returns: names of distributions, as pip knows them.

    .. versionadded:: 0.1
    """
    raise AssertionError("a specification is never called")


@hookspec
def fs_after_smoothing(event: SmoothingEvent) -> None:
    """Observe: called after each smoothed vision call, in the thread that made it.

    :param event: adapter, images, n0, sigma, seconds, non-finite draws.

    .. versionadded:: 0.1
    """


@cache
def plugin_manager() -> pluggy.PluginManager:
    """The process's plugins, loaded once. ``plugin_manager.cache_clear()`` forgets them.

    Raises:
        PluginError: a plugin cannot be imported, or implements a hook that does not exist or with an
            argument the specification lacks.
    """
    manager = new_manager()
    for point in entry_points(group=GROUP):
        if point.name in disabled() or manager.has_plugin(point.name):
            continue
        try:
            plugin = point.load()
        except Exception as error:
            origin = point.dist.name if point.dist else "an unknown distribution"
            raise PluginError(
                f"Plugin {point.name!r} ({point.value}, from {origin}) cannot be imported: "
                f"{type(error).__name__}: {error}. Repair or uninstall it, or set {DISABLE}={point.name}."
            ) from error
        register(manager, plugin, point.name)
    return manager


def disabled() -> set[str]:
    """Names of plugins that the environment turns off."""
    return {name.strip() for name in os.environ.get(DISABLE, "").split(",")} - {""}


def new_manager() -> pluggy.PluginManager:
    """A manager with the specifications and no plugin."""
    import sys

    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(sys.modules[__name__])
    return manager


def register(manager: pluggy.PluginManager, plugin: object, name: str) -> None:
    """Register a plugin, or refuse it with both sides of what does not match.

    Raises:
        PluginError: see ``plugin_manager``.
    """
    try:
        manager.register(plugin, name)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        if manager.has_plugin(name):
            manager.unregister(name=name)
        known = ", ".join(sorted(hook for hook in vars(manager.hook) if hook.startswith("fs_")))
        raise PluginError(f"Plugin {name!r} breaks the hook specification: {error}. The hooks are: {known}.") from error
