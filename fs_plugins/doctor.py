"""What is installed here, which plugins loaded and from where, and what would happen to a model."""

from __future__ import annotations

import inspect
import platform
from dataclasses import dataclass
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from typing import Any

from torch import nn

from fs_plugins.errors import FSPluginsError
from fs_plugins.hooks import DISABLE, GROUP, disabled, new_manager, plugin_manager, register
from fs_plugins.plugins import claims, known_encoders, unclaimed
from fs_plugins.vision import VisionCall

OWN = ("fs-plugins", "torch", "diffusers")
"""Distributions that are looked for whatever plugins there are."""


@dataclass(frozen=True)
class Plugin:
    """One entry of the group ``fs_plugins``.

    Args:
        hooks: those that it implements.
        problem: why it is not in use, if it is not.
        packages: the distributions that it is for, by its own word.
    """

    name: str
    distribution: str
    location: str
    hooks: tuple[str, ...]
    problem: str | None = None
    packages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Encoder:
    """One vision encoder of a model, as its adapter describes it. ``psm`` names what ``psm="auto"`` takes, and why."""

    module: str
    pixels: str
    image_size: str
    readouts: tuple[str, ...]
    recognised: tuple[str, ...]
    psm: str


@dataclass(frozen=True)
class Diagnosis:
    """What ``enable`` would find in a model. ``rules`` are the claiming adapters' own words for what they claim."""

    model: str
    rules: dict[str, str]
    problem: str | None
    encoders: tuple[Encoder, ...] = ()


def frameworks() -> dict[str, str | None]:
    """Python, fs-plugins, what it is built on and what plugins are for -> version, None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in (*OWN, *(package for plugin in plugins() for package in plugin.packages)):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def plugins() -> list[Plugin]:
    """Every plugin that is installed, each loaded on its own so that a broken one hides no other."""
    return [_plugin(point) for point in entry_points(group=GROUP)]


def _plugin(point: EntryPoint) -> Plugin:
    origin = f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown distribution"
    if point.name in disabled():
        return Plugin(point.name, origin, point.value, (), f"turned off by {DISABLE}")
    try:
        plugin = point.load()
        manager = new_manager()
        register(manager, plugin, point.name)
        packages = tuple(name for answer in manager.hook.fs_packages() for name in answer)
    except Exception as error:
        return Plugin(point.name, origin, point.value, (), f"{type(error).__name__}: {error}")
    hooks = tuple(sorted(caller.name for caller in manager.get_hookcallers(plugin) or ()))
    return Plugin(point.name, origin, getattr(plugin, "__file__", None) or point.value, hooks, packages=packages)


def diagnose(model: nn.Module, adapter: str | None = None, processor: Any = None) -> Diagnosis:
    """Who claims this model, where its pixels' normalisation comes from, which PSM fits. Changes nothing.

    Args:
        adapter, processor: as for ``enable``.
    """
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    try:
        answers = claims(model, adapter, processor)
    except FSPluginsError as error:
        return Diagnosis(kind, {}, str(error))
    rules = {name: _rule(name) for name in answers}
    if len(answers) != 1:
        several = f"several adapters claim it; choose with enable(..., adapter=...) or {DISABLE}=<name>"
        return Diagnosis(kind, rules, several if answers else f"no adapter claims it. {unclaimed(model)}")
    (calls,) = answers.values()
    if not all(call.tested for call in calls):
        rules = {name: f"{rule} Untested family: a probe agreed." for name, rule in rules.items()}
    return Diagnosis(kind, rules, None, tuple(map(_encoder, calls)))


def _encoder(call: VisionCall) -> Encoder:
    registry = known_encoders()
    recognised: tuple[str, ...] = ()
    try:
        recognised = tuple(registry.recognise(call))
        psm = str(registry.choose(call))
    except FSPluginsError as error:
        psm = str(error)
    return Encoder(
        module=type(call.module).__name__,
        pixels=call.pixels.source or "unknown: pass enable(..., processor=...)",
        image_size=call.size_in_words,
        readouts=tuple(readout.name for readout in call.readouts),
        recognised=recognised,
        psm=psm,
    )


def _rule(adapter: str) -> str:
    """What an adapter claims, in its own words: the first paragraph of its hook's docstring."""
    claim = getattr(plugin_manager().get_plugin(adapter), "fs_vision_call", None)
    return " ".join((inspect.getdoc(claim) or "it does not say").split("\n\n")[0].split())
