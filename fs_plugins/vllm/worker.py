"""In a worker: the model is smoothed as soon as it is loaded, before vLLM measures what memory it takes."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from fs_plugins.api import SmoothingHandle, enable
from fs_plugins.choice import calls_of
from fs_plugins.errors import ModelError, PSMError
from fs_plugins.hooks import plugin_manager
from fs_plugins.noise import NoiseSource
from fs_plugins.patch import hooks_of
from fs_plugins.smoothing import FeatureSmoother
from fs_plugins.vision import PixelSpace, VisionCall
from fs_plugins.vllm import VARIABLE
from fs_plugins.vllm.counts import Tally
from fs_plugins.vllm.settings import Settings

_COUNTING = "fs_plugins.vllm"
LEFT_OUT = "StageMissingLayer"
"""What vLLM has in the place of a module that it does not need."""


def protect(worker: Any, settings: Settings) -> SmoothingHandle:
    """Smooth the model that a worker of vLLM has loaded.

    Raises:
        ModelError: nobody claims it, or its encoder is quantised.
        PSMError: the PSM does not fit it, or not everything that requests may show it.
        SettingError, RegistryError, PluginError: see ``fs_plugins.enable``.
    """
    from vllm.distributed.parallel_state import get_tp_group

    model, group = worker.get_model(), get_tp_group()
    processor = normalisation(worker.vllm_config.model_config)
    for call in calls_of(model, processor=processor, adapter=settings.adapter)[1]:
        check_plain(call)
    # Ranks that hold parts of one encoder have to draw the same noise; one of them counts, unless each has its own.
    key = None if settings.seed is not None else group.broadcast_object(secrets.token_bytes(32), src=0)
    each = worker.vllm_config.model_config.multimodal_config.mm_encoder_tp_mode == "data"
    if (each or group.rank_in_group == 0) and not plugin_manager().has_plugin(_COUNTING):
        plugin_manager().register(Tally(), _COUNTING)
    handle = enable(
        model,
        psm=settings.psm,
        sigma=settings.sigma,
        n0=settings.n0,
        noise=settings.noise,
        noise_scope=settings.noise_scope,
        seed=settings.seed,
        chunk_size=settings.chunk_size,
        processor=processor,
        adapter=settings.adapter,
    )
    for smoother in handle.smoothers:
        check_sizes(smoother)
        smoother.source = NoiseSource(settings.noise_scope, settings.seed, key)
    return handle


def is_protected(worker: Any) -> bool:
    """Whether a worker's model is smoothed."""
    return bool(hooks_of(worker.get_model())[0])


def normalisation(model_config: Any) -> PixelSpace | None:
    """Mean and std of the processor that vLLM itself makes pixels with, if it says them."""
    from vllm.multimodal import MULTIMODAL_REGISTRY

    told: Mapping[str, Any] = model_config.multimodal_config.mm_processor_kwargs or {}
    try:
        processor = MULTIMODAL_REGISTRY.create_processor(model_config).info.get_hf_processor(**told)
    except (AttributeError, TypeError, ValueError):  # some families have one of vLLM's own making
        return None
    if getattr(getattr(processor, "image_processor", processor), "image_mean", None) is None:
        return None
    return replace(PixelSpace.from_processor(processor, source="the processor of vLLM"), size=None)


def check_plain(call: VisionCall) -> None:
    """Refuse an encoder whose weights are not the checkpoint's own numbers, or that has been left out.

    Raises:
        ModelError: they are quantised, or there is none, because requests may show it nothing.
    """
    if type(call.module).__name__ == LEFT_OUT:
        raise ModelError(
            "By --limit-mm-per-prompt this model is shown none of what its vision encoder takes, and vLLM has left the "
            f"encoder out. There is nothing to smooth: allow images, or unset {VARIABLE}."
        )
    for name, module in call.module.named_modules():
        method = type(getattr(module, "quant_method", None)).__name__
        if (method != "NoneType" and not method.startswith("Unquantized")) or _is_packed(module):
            raise ModelError(
                f"The vision encoder is quantised ({name}: {method}), and nobody has measured what smoothing does to "
                "one that is. Keep it out of the quantisation (the checkpoint's quantization_config lists modules to "
                f"ignore), or unset {VARIABLE} to serve without smoothing."
            )


def check_sizes(smoother: FeatureSmoother) -> None:
    """Refuse a PSM that would have to refuse some pictures: vLLM answers that by ending the engine, for all requests.

    Raises:
        PSMError: it has a mapper, which knows pictures of one size, and the encoder takes any.
    """
    if smoother.call.image_size is None and smoother.psm is not None and smoother.psm.mapped:
        raise PSMError(
            f"PSM {smoother.psm.config.name!r} has a mapper for pictures of one size, and this encoder takes any, and "
            "films: a request with another would end the whole engine. Save it without its mapper "
            "(psm.only(mapper=False).save_pretrained(FOLDER)), and name that folder as psm."
        )


def _is_packed(module: nn.Module) -> bool:
    return any(not parameter.is_floating_point() for parameter in module.parameters(recurse=False))
