"""What the plugins of this process answer: whose model this is, and what they provide by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from fs_plugins import registry
from fs_plugins.errors import FSPluginsError, ModelError, PluginError
from fs_plugins.hooks import DISABLE, plugin_manager
from fs_plugins.vision import VisionCall

T = TypeVar("T")


def claim(model: nn.Module, adapter: str | None = None, processor: Any = None) -> tuple[str, tuple[VisionCall, ...]]:
    """The adapter that claims this model, and its whole answer.

    Args:
        adapter: the one that may; None for any.
        processor: the model's, if the user has given one.

    Raises:
        ModelError: no adapter, or several, claim the model.
        PluginError: the adapter asked for does not exist, fails, or answers nonsense.
    """
    found = claims(model, adapter, processor)
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if not found:
        asked = adapter or ", ".join(sorted(_names()))
        raise ModelError(f"No adapter claims {kind} (asked: {asked}). {unclaimed(model)}")
    if len(found) > 1:
        raise ModelError(
            f"Several adapters claim {kind}: {', '.join(sorted(found))}. Choose with enable(..., adapter=...), or turn "
            f"one off with {DISABLE}=<name>."
        )
    return next(iter(found.items()))


def unclaimed(model: nn.Module) -> str:
    """What plugins know of a model that none of them claims, or else what to do about any."""
    told = [one for one in plugin_manager().hook.fs_unclaimed(model=model) if one]
    return " ".join(told) or "docs/how-to/write-an-adapter.md shows how to write one, in about 40 lines."


def claims(model: nn.Module, adapter: str | None = None, processor: Any = None) -> dict[str, tuple[VisionCall, ...]]:
    """Every adapter that claims this model, or the one asked for if it does -> its answer.

    Args:
        adapter, processor: as for ``claim``.

    Raises:
        PluginError: the adapter asked for does not exist, fails, or answers nonsense.
    """
    if adapter is not None and adapter not in _names():
        raise PluginError(f"No plugin is called {adapter!r}; there are {', '.join(_names())}.")
    given = {"model": model, "named": adapter is not None, "processor": processor}
    answers = {
        one.plugin_name: _ask(one.plugin_name, partial(one.function, *(given[name] for name in one.argnames)), model)
        for one in plugin_manager().hook.fs_vision_call.get_hookimpls()
        if adapter in (None, one.plugin_name)
    }
    return {name: answer for name, answer in answers.items() if answer is not None}


def _names() -> list[str]:
    return [name for name, plugin in plugin_manager().list_name_plugin() if plugin is not None]


def _ask(name: str, claim: Callable[[], Any], model: nn.Module) -> tuple[VisionCall, ...] | None:
    """One adapter's answer, as a tuple."""
    try:
        answer = claim()
    except FSPluginsError:
        raise
    except Exception as error:
        raise PluginError(
            f"Adapter {name!r} failed on {type(model).__name__}: {type(error).__name__}: {error}. "
            f"Choose another with enable(..., adapter=...), or turn it off with {DISABLE}={name}."
        ) from error
    if answer is None:
        return None
    calls = (answer,) if isinstance(answer, VisionCall) else answer
    if not isinstance(calls, Sequence) or not calls or not all(isinstance(call, VisionCall) for call in calls):
        raise PluginError(f"Adapter {name!r} must answer a VisionCall, several, or None; it answered {answer!r}.")
    return tuple(calls)


def known_encoders() -> registry.Registry:
    """The user's registry, then those of plugins, then the one that ships: the first that has a name wins."""
    plugins = [Path(path) for answer in plugin_manager().hook.fs_registries() for path in answer]
    return registry.Registry([*registry.user_files(), *plugins, registry.shipped_path()], encoder_families())


def encoder_families() -> dict[str, Mapping[str, type[int] | type[str]]]:
    """Families of encoders that plugins describe -> what a registry has to say of their architecture.

    Raises:
        PluginError: a plugin fails, answers nonsense, or describes a family that another one does.
    """
    fields = "what it says, each int or str"
    return provided("fs_encoder_families", "architecture", fields, _NO_FAMILIES, _describes)


_NO_FAMILIES: Mapping[str, Mapping[str, type[int] | type[str]]] = {}


def _describes(given: object) -> bool:
    return isinstance(given, Mapping) and all(isinstance(name, str) and given[name] in (int, str) for name in given)


def plugin_parts() -> registry.Parts:
    """Purifiers and mappers that plugins provide, by kind."""
    hook = plugin_manager().hook
    purifiers: dict[str, type[nn.Module]] = {}
    mappers: dict[str, type[nn.Module]] = {}
    for kinds in hook.fs_purifiers():
        purifiers |= kinds
    for kinds in hook.fs_mappers():
        mappers |= kinds
    return {"purifiers": purifiers, "mappers": mappers}


def provided(
    hook: str, noun: str, value: str, shipped: Mapping[str, T], fits: Callable[[object], bool]
) -> dict[str, T]:
    """What ships and what plugins add to it, by name. A name has one meaning.

    Args:
        hook: that they answer, with a dict of names.
        noun: what a name stands for, in one word.
        value: what a plugin has to give for a name, in words.
        shipped: what is there without any plugin.
        fits: whether something is such a value.

    Raises:
        PluginError: a plugin fails, answers nonsense, or takes a name that ships or is another plugin's.
    """
    found = dict(shipped)
    owners = dict.fromkeys(shipped, "fs_plugins itself")
    for implementation in getattr(plugin_manager().hook, hook).get_hookimpls():
        plugin = implementation.plugin_name
        try:
            answer = implementation.function()
        except Exception as error:
            raise PluginError(
                f"Plugin {plugin!r} failed to name its {noun}s: {type(error).__name__}: {error}. "
                f"Repair it, or turn it off with {DISABLE}={plugin}."
            ) from error
        if not isinstance(answer, dict) or not all(isinstance(name, str) and fits(answer[name]) for name in answer):
            raise PluginError(f"Plugin {plugin!r} must answer {hook} with name -> {value}; it answered {answer!r}.")
        for name, given in answer.items():
            if other := owners.get(name):
                article = "an" if noun[0] in "aeiou" else "a"
                raise PluginError(
                    f"Plugin {plugin!r} provides {article} {noun} {name!r}, and so does {other}. A name has one "
                    f"meaning in every result file: rename the plugin's {noun}, or turn a plugin off with "
                    f"{DISABLE}=<its name>."
                )
            found[name], owners[name] = given, plugin
    return found
