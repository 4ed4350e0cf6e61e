"""Whose weights an encoder has: a fingerprint to look it up by, and an exact digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fs_plugins.contents import feed, is_plain
from fs_plugins.errors import ModelError

_SKETCH_LENGTH = 16
_SKETCH_SAMPLE = 16_384
_SKETCH_TOLERANCE = 0.004
# Names under which wrappers hold an encoder: PEFT's, torch.compile's, transformers' around towers and timm's models.
_WRAPPERS = ("base_layer", "_orig_mod", "vision_model", "timm_model")


def fingerprint(encoder: nn.Module | Mapping[str, Tensor]) -> tuple[float, ...]:
    """Sixteen numbers that say whose weights these are, the same in fp32, fp16 and bf16.

    Random signed sums of up to 16,384 evenly spaced weights of every tensor, each tensor at unit length.
    Rounding to bf16 moves them by about 0.001, fine-tuning by ten times that and more, another
    encoder by about 1.4. Names that wrappers add (PEFT, compile, transformers around timm) are ignored, as are LoRA
    weights.
    An identity for look-ups, not a checksum: it does not detect a malicious change of few weights.

    Args:
        encoder: the module, or its weights by name.

    Raises:
        ModelError: weights on the meta device (offloaded), quantised or sharded ones cannot be read.
    """
    if hidden := _hidden(encoder) if isinstance(encoder, nn.Module) else []:
        raise ModelError(
            f"The encoder's weights are quantised or sharded ({hidden[0]}), so it cannot be recognised. "
            "Pass psm=<a PSM or its folder>, or keep the encoder out of the quantisation."
        )
    total = torch.zeros(_SKETCH_LENGTH, dtype=torch.float64, device="cpu")
    count = 0
    state = encoder.state_dict() if isinstance(encoder, nn.Module) else encoder
    for name, tensor in sorted(_canonical(state).items()):
        if tensor.is_meta:
            raise ModelError(
                f"{name} is on the meta device (offloaded?), so the encoder cannot be recognised. "
                "Pass psm=<a PSM or its folder>."
            )
        flat = tensor.detach().flatten()
        flat = flat[:: max(1, flat.numel() // _SKETCH_SAMPLE)].double().cpu()
        length = flat.norm()
        if length == 0:
            continue
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        generator = torch.Generator("cpu").manual_seed(seed)
        heads = torch.randint(0, 2, (_SKETCH_LENGTH, len(flat)), generator=generator, device="cpu")
        total += (2 * heads - 1).double() @ flat / length
        count += 1
    return tuple(round(value, 6) for value in (total / max(1, count) ** 0.5).tolist())


def digest(*modules: nn.Module) -> str:
    """SHA-256 of all that the state dicts hold, bit for bit, with types and shapes, packed and quantised weights too.

    Of offloaded weights only types and shapes.

    Raises:
        ModelError: a module keeps something in its state dict that cannot be written down.
    """
    found = hashlib.sha256()
    for module in modules:
        state = module.state_dict()
        for name in sorted(state):
            feed(found, name, state[name])
    return found.hexdigest()


def is_readable(module: nn.Module) -> bool:
    """Whether ``fingerprint`` can tell: the weights are here, and are neither quantised nor sharded."""
    return not any(parameter.is_meta for parameter in module.parameters()) and not _hidden(module)


def packed(module: nn.Module) -> list[str]:
    """Names of weights in the packed form of torch's own quantisation, through which no gradient flows."""
    return [
        name
        for name, value in module.state_dict().items()
        if not _is_extra(name) and (value.is_quantized if isinstance(value, Tensor) else True)
    ]


def _hidden(module: nn.Module) -> list[str]:
    """Names of weights that are no plain floating-point tensors."""
    others = [name for name, parameter in module.named_parameters() if not parameter.is_floating_point()]
    state = module.state_dict()
    return others + [name for name, value in state.items() if not is_plain(value) and not _is_extra(name)]


def _is_extra(name: str) -> bool:
    """Whether an entry of a state dict is what a module adds by ``get_extra_state``."""
    return name.rpartition(".")[2] == "_extra_state"


def same_encoder(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two fingerprints are of the same weights, up to half-precision rounding."""
    difference = np.subtract(one, other)
    return bool(np.sqrt(np.mean(difference**2)) < _SKETCH_TOLERANCE)


def has_adapters(module: nn.Module) -> bool:
    """Whether LoRA-like weights sit on top of the encoder's own."""
    return any("lora_" in name for name, _ in module.named_parameters())


def _canonical(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's own floating-point weights by the names they have without wrappers."""
    found = {}
    for name, tensor in state.items():
        if "lora_" in name or "original_module." in name or _is_extra(name) or not tensor.is_floating_point():
            continue
        parts = [part for part in name.split(".") if part not in _WRAPPERS]
        name = ".".join(parts)
        if "modules_to_save." in name:
            name = name.split("modules_to_save.", 1)[1].split(".", 1)[1]
        found[name] = tensor
    return found
