"""How vLLM's encoders are smoothed, as ``FS_PLUGINS`` says it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from fs_plugins import checks, files
from fs_plugins.choice import named_psm
from fs_plugins.errors import SettingError
from fs_plugins.noise import Noise, NoiseScope
from fs_plugins.plugins import known_encoders
from fs_plugins.settings import build, knob, only
from fs_plugins.smoothing import DEFAULT_CHUNK_SIZE
from fs_plugins.vllm import VARIABLE


@dataclass(frozen=True)
class Settings:
    """What ``fs_plugins.enable`` takes, in JSON, and what vLLM's caches add."""

    psm: str | None = knob("auto", "As for fs_plugins.enable; null is plain smoothing.")
    sigma: float | None = knob(None, "Noise level in [0, 1] pixels; left out, the PSM's own.")
    n0: int = knob(4, "Noisy draws per image.", least=1)
    noise: Noise = knob("antithetic", "antithetic or iid.")
    noise_scope: NoiseScope = knob("call", "call or image.")
    seed: int | None = knob(None, "Reproducible noise, for experiments.")
    chunk_size: int = knob(DEFAULT_CHUNK_SIZE, "Rows per forward of the encoder.", least=1)
    adapter: str | None = knob(None, "The plugin to use where several claim the model.")
    share_draws: bool = knob(
        True, "Whether requests that show one picture get one set of draws while vLLM keeps its features."
    )

    @property
    def mark(self) -> str:
        """What sets features made under these settings apart from all others, in caches and stores."""
        said = json.dumps({**asdict(self), "version": version("fs-plugins")}, sort_keys=True)
        return f"fs-{hashlib.sha256(said.encode()).hexdigest()[:16]}"


def parsed(text: str) -> Settings:
    """The settings that a JSON object says; nothing of the model is looked at.

    Raises:
        SettingError: no JSON object, an unknown name, a value of the wrong type or out of range, or no noise.
        PSMError: ``psm`` is a folder or hub id where there is no PSM.
    """
    try:
        given: Any = files.parsed(text)
    except ValueError as error:
        raise SettingError(f'{VARIABLE} is JSON, such as {{"psm": "auto", "n0": 4}}; {error}.') from None
    if not isinstance(given, dict):
        raise SettingError(f'{VARIABLE} is a JSON object, such as {{"psm": "auto", "n0": 4}}, got {text}.')
    only(Settings, given, VARIABLE)
    made = build(Settings, given, VARIABLE)
    if made.sigma is not None:
        checks.sigma(made.sigma, noisy=True)
    elif made.psm in (None, "none"):
        raise SettingError(
            f"{VARIABLE}: psm null is plain smoothing and needs a sigma in [0, 1] pixels; 0.25 is usual."
        )
    if made.psm is not None and made.psm not in ("none", "auto", *known_encoders().variants):
        named_psm(made.psm)
    return made
