"""A diffusion purifier that is fine-tuned by low-rank updates (LoRA): a few MB instead of two GB."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fs_plugins import sources
from fs_plugins.checks import whole
from fs_plugins.errors import PSMError, SettingError
from fs_plugins.psm.diffusion import load_guided_diffusion

_MARK = "lora_"


class LoRAPurifier(nn.Module):
    """A public diffusion model as it is, with low-rank updates (PEFT) of its attention, linear and convolution layers.

    Only the updates are in its ``state_dict``; the base is read from its own file, which must be the same one.

    Args:
        base: the base's checkpoint, a file. On a machine that does not have it there, the one of this digest that the
            registry's purifiers left in the cache (``enable(model, psm="diffusion")`` fetches the public one).
        sha256: its digest in hexadecimal.
        rank: of the updates, at most 512.
        sizes: as for ``DiffusionPurifier``; none for the public model.

    Raises:
        SettingError: PEFT is not installed, or a rank that is none.
        PSMError: no such file, or another one.
    """

    def __init__(self, *, base: str, sha256: str, rank: int = 4, **sizes: Any) -> None:
        super().__init__()
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise SettingError('LoRA needs peft: pip install "fs-plugins[train]".') from None
        if whole("LoRAPurifier.rank", rank) > 512:
            raise SettingError(f"LoRAPurifier.rank must be at most 512, got {rank}.")
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise PSMError(f"LoRAPurifier.sha256 must be 64 hexadecimal digits, got {sha256!r}.")
        place = Path(base)
        if not place.is_file() and (kept := sources.cached(sha256)):
            place = next(kept.glob("*.pt"), place)
        if not place.is_file():
            raise PSMError(
                f"The model that this LoRA purifier was trained on is not at {base}, and not in the cache. Put it "
                'there; enable(model, psm="diffusion") fetches the public one.'
            )
        with torch.device("cpu"):  # for real, also where a PSM is built on the meta device to be filled from its file
            self.purifier = load_guided_diffusion(place, sha256=sha256, **sizes)
            parts = self.purifier.net.named_modules()
            layers = [re.escape(name) for name, part in parts if isinstance(part, nn.Linear | nn.Conv2d)]
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=f"(?:{'|'.join(layers)})")
            inject_adapter_in_model(config, self.purifier.net)
        self.register_load_state_dict_post_hook(_base_is_here)

    def forward(self, images: Tensor, sigma: float | Tensor) -> Tensor:
        """(N, 3, H, W) noisy images and sigma -> images, in [0, 1] pixel units."""
        return self.purifier(images, sigma)

    def denoising_loss(self, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """As for ``DiffusionPurifier``."""
        return self.purifier.denoising_loss(clean, noise, level)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The updates alone."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        for name in [name for name in state if name.startswith(prefix + "purifier.") and _MARK not in name]:
            del state[name]
        return state


def _base_is_here(module: nn.Module, keys: Any) -> None:
    base = tuple(name for name, _ in torch.nn.Module.named_parameters(module) if _MARK not in name)
    keys.missing_keys[:] = [key for key in keys.missing_keys if not key.endswith(base)]
