"""lmms-eval's benchmarks on a smoothed model: its entry point, and what the model does with its arguments.

Nothing here imports lmms_eval but ``manifest``, which lmms-eval itself calls; ``lmms_model`` has the class.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from torch import nn

import fs_plugins
from fs_plugins import checks
from fs_plugins.errors import SettingError
from fs_plugins.identity import digest
from fs_plugins.noise import Noise, NoiseScope

MODEL_ID = "fs_plugins"
DEFAULT_NEW_TOKENS = 1024  # lmms-eval's own models', where a task does not say


def manifest() -> Any:
    """The payload of our entry point in the group ``lmms_eval.models``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL_ID, chat_class_path="fs_plugins.hf.lmms_model.SmoothedModel")


def smooth(
    model: nn.Module,
    *,
    psm: str = "auto",
    sigma: float | str | None = None,
    n0: float = 4,
    noise: Noise = "antithetic",
    noise_scope: NoiseScope = "image",
    seed: float = 0,
    pin: str | None = None,
) -> str:
    """Enable smoothing as the arguments of ``--model_args`` say.

    lmms-eval keeps answers under the arguments as they were typed, resumes from them and spreads requests over
    processes. So an answer must follow from the arguments and the request alone: the noise has a seed, and belongs to
    the image.

    Args:
        psm, sigma, n0, noise, noise_scope, seed: as for ``fs_plugins.enable``; psm and sigma also as the text "none".
        pin: refuse any smoothing but the one that this stands for.

    Returns:
        the same arguments in full, in lmms-eval's syntax, with their pin.

    Raises:
        SettingError: a value that is out of range or no number, or another pin. The model is left as it was.
        ModelError, PSMError, RegistryError, PluginError: see ``fs_plugins.enable``.
    """
    if isinstance(psm, bool):
        raise SettingError(
            f"psm={str(psm).lower()} is no PSM. Use auto, none, photo, a folder or a hub id; smooth=false is no "
            "smoothing."
        )
    draws: dict[str, Any] = {
        "n0": _whole("n0", n0),
        "noise": noise,
        "noise_scope": noise_scope,
        "seed": _whole("seed", seed),
    }
    chosen = None if str(psm).lower() == "none" else str(psm)
    handle = fs_plugins.enable(model, psm=chosen, sigma=_number("sigma", sigma), **draws)
    told = {"psm": psm, **_sigma(handle), **draws}
    found = _pin(handle, draws)
    if pin not in (None, found):
        handle.disable()
        raise SettingError(
            f"These arguments stand for the smoothing {found} today, not for {pin}: the PSM, the registry, fs-plugins "
            f"or an argument is another. Answers that lmms-eval has kept under pin={pin} are not of this one; write "
            f"pin={found}, or leave it out, to go on with this one."
        )
    return arguments({**told, "pin": found})


def arguments(values: Mapping[str, Any]) -> str:
    """``--model_args``, as it is typed."""
    return ",".join(f"{name}={value}" for name, value in values.items())


def _number(name: str, value: Any) -> float | None:
    if value is None or str(value).lower() == "none":
        return None
    return checks.number(f"{name} must be a number", value)


def _whole(name: str, value: Any) -> int:
    """lmms-eval's parser makes -1 and 1e3 floats."""
    number = _number(name, value)
    if number is None or number % 1:
        why = (
            " The noise needs a seed, because lmms-eval keeps answers and resumes from them." if name == "seed" else ""
        )
        raise SettingError(f"{name} must be a whole number, got {value!r}.{why}")
    return int(number)


def _sigma(handle: fs_plugins.SmoothingHandle) -> dict[str, float]:
    """The noise level that was chosen, unless the PSMs of several encoders differ in it."""
    levels = {smoother.sigma for smoother in handle.smoothers}
    return {"sigma": levels.pop()} if len(levels) == 1 else {}


def _pin(handle: fs_plugins.SmoothingHandle, draws: Mapping[str, Any]) -> str:
    """Stands for all that smoothing is made of, weights too; no number, so that lmms-eval's parser leaves it alone."""
    parts = [
        [smoother.sigma, (digest(smoother.psm), smoother.psm.config.structure) if smoother.psm else None]
        for smoother in handle.smoothers
    ]
    content = json.dumps([fs_plugins.__version__, parts, draws], sort_keys=True).encode()
    return f"fs-{hashlib.sha256(content).hexdigest()[:12]}"


def generation(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A task's generation settings -> those of ``generate``; it samples only above temperature 0, as lmms-eval's do."""
    temperature = settings.get("temperature") or 0
    sampled = temperature > 0
    repetition = settings.get("repetition_penalty")
    return {
        "max_new_tokens": int(settings.get("max_new_tokens") or settings.get("max_gen_toks") or DEFAULT_NEW_TOKENS),
        "num_beams": int(settings.get("num_beams") or 1),
        "do_sample": sampled,
        "temperature": temperature if sampled else None,
        "top_p": settings.get("top_p") if sampled else None,
        "top_k": settings.get("top_k") if sampled else None,
        **({"repetition_penalty": repetition} if repetition else {}),
    }


def until(text: str, settings: Mapping[str, Any]) -> str:
    """The answer up to the first of a task's stopping sequences."""
    stops = settings.get("until") or []
    for stop in [stops] if isinstance(stops, str) else stops:
        if stop:
            text = text.split(stop)[0]
    return text.strip()


def batches(settings: Sequence[Mapping[str, Any]], size: int) -> Iterator[list[int]]:
    """Places of requests, at most ``size`` at once, with the same generation settings in a batch."""
    keys = [json.dumps(one, sort_keys=True, default=str) for one in settings]
    for _, alike in groupby(sorted(range(len(keys)), key=keys.__getitem__), key=keys.__getitem__):
        places = list(alike)
        for start in range(0, len(places), size):
            yield places[start : start + size]
