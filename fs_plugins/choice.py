"""``psm=`` and ``sigma=`` as users write them -> FeatureSmoothers. Every verb, command and suite chooses here."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from fs_plugins import checks
from fs_plugins.errors import ModelError, PluginError, PSMError, SettingError, warn
from fs_plugins.identity import has_adapters, same_encoder
from fs_plugins.noise import Noise, NoiseScope
from fs_plugins.plugins import claim, known_encoders, plugin_parts
from fs_plugins.psm import PSM
from fs_plugins.registry import StandIn
from fs_plugins.smoothing import DEFAULT_CHUNK_SIZE, FeatureSmoother
from fs_plugins.vision import PixelSpace, VisionCall

PSMChoice = str | os.PathLike[str] | PSM | None
"""``"auto"``, a variant (``"robust"``) or purifier of the registry, a folder or hub id, a PSM, or None (``"none"`` in
text) for plain smoothing."""

Smoothable = nn.Module | VisionCall
"""A model that an adapter claims, or an adapter's answer."""


@dataclass(frozen=True)
class Draws:
    """How a smoother draws when it serves; see ``FeatureSmoother``."""

    n0: int = 4
    noise: Noise = "antithetic"
    noise_scope: NoiseScope = "call"
    seed: int | None = None
    chunk_size: int = DEFAULT_CHUNK_SIZE


def choose(
    model: Smoothable,
    *,
    psm: PSMChoice | Sequence[PSMChoice] = "auto",
    sigma: float | None = None,
    draws: Draws = Draws(),
    processor: Any = None,
    adapter: str | None = None,
    encoder: int | None = None,
    certain: bool = False,
) -> tuple[str, list[FeatureSmoother]]:
    """The claiming adapter, and a smoother for each vision encoder, or for the one numbered ``encoder``.

    Everything is checked and nothing touched. What its user should know of a choice is said as an FSPluginsWarning.

    Args:
        certain: refuse where mean and std are only assumed, for what proves something.

    Raises:
        ModelError: no adapter, or several, claim the model; it is in training mode.
        SettingError: a value out of range, or one that is missing.
        PSMError, RegistryError, PluginError: see their docstrings.
    """
    name, calls = calls_of(model, processor=processor, adapter=adapter, encoder=encoder, certain=certain)
    sigma = None if sigma is None else checks.sigma(sigma)
    psms: list[PSMChoice] = list(psm) if isinstance(psm, list | tuple) else [cast(PSMChoice, psm)] * len(calls)
    if len(psms) != len(calls):
        raise SettingError(f"This model has {len(calls)} vision encoders; psm is a list of {len(psms)}.")
    chosen, notices = [], []
    purifier = functools.cache(lambda name: known_encoders().purifier(name, **plugin_parts()))
    for call, choice in zip(calls, psms, strict=True):
        found, told = find_psm(call, choice, sigma, purifier)
        notices += told
        if found is None and sigma is None:
            raise SettingError("psm=None is plain smoothing and needs a sigma in [0, 1] pixel units; 0.25 is usual.")
        level = sigma if sigma is not None else cast(PSM, found).config.sigma
        chosen.append(FeatureSmoother(call, psm=found, sigma=level, **vars(draws)))
    for notice in dict.fromkeys(notices):  # once for encoders that are alike
        warn(notice)
    return name, chosen


def calls_of(
    model: Smoothable,
    *,
    processor: Any = None,
    adapter: str | None = None,
    encoder: int | None = None,
    certain: bool = False,
) -> tuple[str, tuple[VisionCall, ...]]:
    """The claiming adapter, and the vision calls that can be smoothed: all, or the one numbered ``encoder``.

    Raises:
        ModelError: no adapter, or several, claim the model; it is in training mode.
        SettingError: there is no such encoder, or see ``check_pixels``.
        PluginError: the adapter's answer cannot be used.
    """
    calls: tuple[VisionCall, ...]
    if isinstance(model, VisionCall):
        name, calls = adapter or "the caller", (model,)
    elif not isinstance(model, nn.Module):
        raise ModelError(f"A torch.nn.Module or a VisionCall was expected, got {type(model).__name__}.")
    elif model.training:
        raise ModelError("The model is in training mode, where its features are random. Call model.eval() first.")
    else:
        name, calls = claim(model, adapter, processor)
    if encoder is not None:
        calls = (numbered(calls, encoder),)
    if processor is not None:
        calls = tuple(call.with_processor(processor) for call in calls)
    for call in calls:
        call.check_eval()
    if isinstance(model, nn.Module):
        _inside(model, name, calls)
    check_pixels(calls, certain=certain)
    return name, calls


def check_pixels(calls: Sequence[VisionCall], *, certain: bool = False) -> None:
    """Refuse encoders of which nobody knows how pixels are normalised, and warn where that is assumed.

    Args:
        certain: refuse these too.

    Raises:
        SettingError: mean and std are not known.
    """
    for call in calls:
        if not call.pixels.source:
            channels = len(call.pixels.mean)
            raise SettingError(
                f"Nobody knows how pixels are normalised for this encoder ({call.architecture.get('family')}): there "
                f"is no processor beside the checkpoint that says it for images of {channels} "
                f"{'channels' if channels > 1 else 'channel'}. Pass processor=<the model's processor or a PixelSpace>."
            )
    for guess in dict.fromkeys(_guess(call.pixels) for call in calls if call.pixels.assumed):
        if certain:
            raise SettingError(f"{guess} A certificate, or a PSM, would speak of another sigma.")
        warn(guess)


def _guess(pixels: PixelSpace) -> str:
    return (
        f"Nobody knows how this model's pixels are normalised; assumed are mean {pixels.mean} and std {pixels.std}, "
        f"{pixels.source}. If its processor has others, sigma and eps are not what they say. Tell it with "
        "processor=<the model's processor or a PixelSpace>, which enable, smoothers, certify and vision_call take "
        "(commands: --processor)."
    )


def numbered(calls: Sequence[VisionCall], encoder: int) -> VisionCall:
    """One of a model's vision calls.

    Raises:
        SettingError: there is no such.
    """
    place = checks.whole("encoder", encoder, least=None)
    if not 0 <= place < len(calls):
        raise SettingError(f"This model has {len(calls)} vision encoders, numbered from 0; there is no {place}.")
    return calls[place]


def _inside(model: nn.Module, adapter: str, calls: Sequence[VisionCall]) -> None:
    inside = set(model.modules())
    for call in calls:
        for part in (call.module, call.grad_scope):
            if part is not None and part not in inside:
                raise PluginError(
                    f"Adapter {adapter!r} points at a {type(part).__name__} that is no submodule of "
                    f"{type(model).__name__} (kept in a list?), so smoothing could not be found again to undo it. "
                    "Register it as a submodule."
                )


def find_psm(
    call: VisionCall, psm: PSMChoice, sigma: float | None, purifier: Callable[[str], PSM]
) -> tuple[PSM | None, list[str]]:
    """What a choice means for this encoder, and what its user should know of it.

    Args:
        purifier: how to get one of the registry's purifiers by name.
    """
    notices = []
    if psm is None or isinstance(psm, PSM) or psm == "none":
        found = psm if isinstance(psm, PSM) else None
    elif psm == "auto":
        known = known_encoders()
        chosen = known.choose(call, sigma)
        if isinstance(chosen, StandIn):
            found = purifier(chosen.name)
            notices.append(str(chosen))
        else:
            found = known.load(chosen, **plugin_parts())
    elif isinstance(psm, str) and _is_word(psm) and psm in (known := known_encoders()).variants:
        found = known.load(known.find(call, sigma, psm), **plugin_parts())
    elif isinstance(psm, str | os.PathLike):
        found = named_psm(psm, purifier)
    else:
        raise SettingError(
            'psm must be "auto", None, a PSM, its folder or hub id, or the name of a variant or purifier of the '
            f"registry; got {type(psm).__name__}."
        )
    if found is None or not found.config.fingerprint:  # the second serves any encoder
        return found, notices
    if has_adapters(call.module):
        notices.append(
            f"The vision encoder carries LoRA weights; PSM {found.config.name!r} was trained for the weights beneath "
            "them."
        )
    if psm != "auto" and not _may_be(call, found):
        notices.append(
            f"PSM {found.config.name!r} was trained for {found.config.encoder}, and this encoder's weights are "
            "others. It may still help (FARE and TeCoA encoders use the vanilla one's PSM); measure it."
        )
    return found, notices


def _may_be(call: VisionCall, psm: PSM) -> bool:
    """Whether the encoder is the one that the PSM was trained for, as far as anybody can tell."""
    try:
        return same_encoder(psm.config.fingerprint, call.fingerprint())
    except ModelError:  # quantised, sharded or offloaded
        return True


def named_psm(psm: str | os.PathLike[str], purifier: Callable[[str], PSM] | None = None) -> PSM:
    """The PSM that a purifier's name, a folder or a hub id stands for; a folder of a purifier's name is ``./NAME``.

    Args:
        purifier: as for ``find_psm``.

    Raises:
        PSMError: there is none, or it is damaged.
        RegistryError: a purifier that is not trained yet, or not to be had.
    """
    if isinstance(psm, str) and _is_word(psm):
        known = known_encoders()
        if psm in known.purifiers:
            return purifier(psm) if purifier is not None else known.purifier(psm, **plugin_parts())
        if not os.path.exists(psm):
            raise PSMError(
                f"No PSM folder at {psm!r}, and the registry has no purifier of that name. It has: "
                f"{', '.join(known.purifiers)}."
            )
    return PSM.from_pretrained(psm, **plugin_parts())


def _is_word(psm: str) -> bool:
    """Whether it can be a name of the registry, rather than a path or a hub id."""
    return not {"/", os.sep} & set(psm)
