"""Models of transformers, their processors and tokenizers by folder or hub id: the one place that loads them.

``"demo"`` and ``"demo-clip"`` are the models that ship, ``"photo-vlm"`` is put together of what ``fs-plugins[photos]``
installs; an encoder of the registry is loaded without the model around it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from fs_plugins import torchvision_schemas  # noqa: F401  (transformers imports torchvision)
from fs_plugins.demo.shipped import MODELS
from fs_plugins.errors import FSPluginsError, ModelError
from fs_plugins.photos import vlm
from fs_plugins.plugins import known_encoders


def source(name: str) -> str:
    """What transformers is to be told: a folder or hub id.

    Raises:
        SettingError: the parts of ``"photo-vlm"`` are not installed.
        OutputError: there is no room for it.
    """
    if name == vlm.NAME:
        return str(vlm.folder())
    return str(MODELS.get(name, name))


def load_model(name: str, *, processor: str | None = None) -> nn.Module:
    """A model of whatever class its configuration names, or an encoder of the registry; in eval mode.

    It carries the image processor that says how its pixels are normalised, as its ``image_processor``.

    Args:
        processor: folder or hub id of that, where none is beside the model.

    Raises:
        ModelError: transformers cannot load it, there is no such processor, or see ``load_encoder``.
    """
    import transformers

    from fs_plugins.hf.encoders import load_encoder

    if name not in MODELS and not os.path.exists(name) and name in known_encoders().entries:
        model = load_encoder(name)
        return model if processor is None else _carrying(model, processor)
    with _loading(f"{name!r} with transformers"):
        config = transformers.AutoConfig.from_pretrained(source(name))
        own = [kind for kind in getattr(config, "architectures", None) or () if hasattr(transformers, kind)]
        kind = getattr(transformers, own[0]) if own else _unnamed(config)
        model = kind.from_pretrained(source(name), dtype="auto").eval()
    with suppress(ModelError) if processor is None else nullcontext():
        return _carrying(model, processor or name)
    return model


def _unnamed(config: Any) -> Any:
    """The class for a configuration that names none: timm's own checkpoints, which have a head or not."""
    import transformers

    if config.model_type == "timm_wrapper" and config.num_labels:
        return transformers.AutoModelForImageClassification
    return transformers.AutoModel


def _carrying(model: Any, processor: str) -> nn.Module:
    """The model, with what an image processor says of mean, std and size; its pictures are none of our business."""
    from transformers.image_processing_base import ImageProcessingMixin

    with _loading(f"an image processor from {processor!r}"):
        saved, _ = ImageProcessingMixin.get_image_processor_dict(source(processor))
        told = {**saved, "source": f"the image processor of {source(processor)}"}  # no mapping, where it is damaged
    model.image_processor = SimpleNamespace(**told)
    return model


def load_chat(
    name: str,
    *,
    processor: str | None = None,
    dtype: str = "auto",
    device: torch.device | str | None = None,
    device_map: str | None = None,
) -> tuple[Any, Any]:
    """An image-text-to-text model in eval mode, and its processor.

    Args:
        name: folder, hub id, ``"demo"`` or ``"photo-vlm"``.
        processor: folder or hub id of that, where none is beside the model.
        dtype, device_map: as ``from_pretrained`` takes them.
        device: where to put it, unless ``device_map`` says; ``place()`` if left out.

    Raises:
        ModelError: transformers cannot load it.
    """
    from transformers import AutoModelForImageTextToText

    found = load_processor(processor or name)
    with _loading(f"{name!r} as an image-text-to-text model"):
        model: Any = AutoModelForImageTextToText.from_pretrained(source(name), dtype=dtype, device_map=device_map)
    model.image_processor = getattr(found, "image_processor", found)
    return (model if device_map else model.to(device or place())).eval(), found


def load_processor(name: str) -> Any:
    """The processor saved beside a model.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoProcessor

    with _loading(f"a processor for {name!r}"):
        return AutoProcessor.from_pretrained(source(name))


def load_tokenizer(name: str) -> Any:
    """The tokenizer saved beside a model.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoTokenizer

    with _loading(f"a tokenizer from {name!r}"):
        return AutoTokenizer.from_pretrained(source(name))


@contextmanager
def _loading(what: str) -> Iterator[None]:
    """What transformers raises for names and files that it cannot use depends on where they are wrong.

    Raises:
        ModelError: in place of all that, but for a want of memory.
    """
    try:
        yield
    except (FSPluginsError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ModelError(f"Cannot load {what}: {error or type(error).__name__}") from error


def place() -> str:
    """The device that commands use: a GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def quieten() -> None:
    """Keep transformers' loading bars and notices out of a command's output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
