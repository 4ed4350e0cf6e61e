"""Small classifiers and bare image models of transformers, with inputs normalised by colours that each is given.

Their processors' own constants differ from checkpoint to checkpoint, so every model carries an image processor here.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from families import LAYERS, VISION, make, normalise
from family import Family, Inputs
from torch import Tensor, nn

MEAN, STD = (0.45, 0.5, 0.4), (0.25, 0.3, 0.2)
CLASSES = {"num_labels": 8}


def build(name: str, size: int, **config: Any) -> nn.Module:
    model = steady(make(name, **config)(), size)
    if not hasattr(model.config, "pretrained_cfg"):
        model.image_processor = SimpleNamespace(image_mean=MEAN, image_std=STD)
    return model


def steady(model: nn.Module, size: int) -> nn.Module:
    """Running statistics of images, as training leaves them, so that deep random nets neither fade nor explode."""
    for norm in (part for part in model.modules() if isinstance(part, nn.BatchNorm2d | nn.BatchNorm1d)):
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    with torch.no_grad():
        images = torch.rand(64, 3, size, size, generator=torch.Generator().manual_seed(1))
        model(**inputs(model, images))
    return model.eval()


def inputs(model: nn.Module, images: Tensor) -> Inputs:
    return {"pixel_values": normalise(images, (MEAN, STD))}


def fields(model: nn.Module, inputs: Inputs) -> Tensor:
    """All that a bare model tells: its last tokens or map, and what is pooled of them, if anything is."""
    output = model(**inputs)
    found = [output.last_hidden_state, getattr(output, "pooler_output", None)]
    return torch.cat([one.flatten(1) for one in found if one is not None], dim=1)


def classifier(name: str, size: int = 16, ending: str = "ForImageClassification", **config: Any) -> Family:
    make_it = partial(build, f"{name}{ending}", size, **CLASSES, **config)
    return Family(f"{name}{ending}", make_it, inputs, (size, size))


def bare(name: str, size: int = 16, **config: Any) -> Family:
    return Family(f"{name}Model", partial(build, f"{name}Model", size, **config), inputs, (size, size), outcome=fields)


kinked = partial(replace, kinks=True)
"""Of families whose activations are ReLU, or bend like it."""
TEACHER = "ForImageClassificationWithTeacher"
DINO = {**LAYERS, "mlp_ratio": 2, "image_size": 16, "patch_size": 4}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
WINDOWS = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
MOBILE = {"image_size": 32, "depth_multiplier": 0.25, "min_depth": 8}
RESIDUAL = {**STAGES, "embedding_size": 8}
LEVIT = {
    "image_size": 64,
    "hidden_sizes": [32, 48, 64],
    "num_attention_heads": [2, 3, 4],
    "depths": [1, 1, 1],
    "key_dim": [8, 8, 8],
}
PYRAMID = {
    "image_size": 64,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 2, 4],
    "sr_ratios": [4, 2, 1, 1],
    "mlp_ratios": [2, 2, 2, 2],
}
EFFICIENT = {"image_size": 32, "width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128}
VIT_LIKE = ("ViT", "ViTMSN", "DeiT", "IJepa")

# A bare timm model in transformers, and with its head.
TIMM = {"architecture": "test_efficientnet", "pretrained_cfg": {"mean": MEAN, "std": STD, "input_size": [3, 64, 64]}}
TIMM_TOKENS = {**TIMM, "architecture": "test_vit3", "model_args": {"img_size": 32}}

IMAGE_FAMILIES: tuple[Family, ...] = (
    *(kind(name, **VISION) for name in VIT_LIKE for kind in (classifier, bare)),
    classifier("DeiT", ending=TEACHER, **VISION),
    *(kind(name, **DINO) for name in ("Dinov2", "Dinov2WithRegisters") for kind in (classifier, bare)),
    bare("DINOv3ViT", **VISION, num_register_tokens=2),
    bare("DINOv3ConvNext", 32, **STAGES, image_size=32),
    *(classifier(name, **VISION) for name in ("Beit", "Data2VecVision")),
    bare("Beit", **VISION),
    *(kind(name, 32, image_size=32, **STAGES) for name in ("ConvNext", "ConvNextV2") for kind in (classifier, bare)),
    *(kind(name, 32, **WINDOWS) for name in ("Swin", "Swinv2") for kind in (classifier, bare)),
    *(kind("EfficientNet", 32, **EFFICIENT) for kind in (classifier, bare)),
    *(kinked(kind(name, 32, **MOBILE)) for name in ("MobileNetV1", "MobileNetV2") for kind in (classifier, bare)),
    *(
        kind("MobileViT", 64, image_size=64, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32])
        for kind in (classifier, bare)
    ),
    *(kinked(kind(name, 32, **RESIDUAL)) for name in ("ResNet", "RegNet") for kind in (classifier, bare)),
    *(kinked(kind("Bit", 32, **RESIDUAL, num_groups=4)) for kind in (classifier, bare)),
    *(
        kind("FocalNet", 32, image_size=32, embed_dim=16, depths=[1, 1], focal_levels=[1, 1], focal_windows=[3, 3])
        for kind in (classifier, bare)
    ),
    *(
        kind(
            "Hiera",
            32,
            image_size=[32, 32],
            patch_stride=[4, 4],
            embed_dim=16,
            depths=[1, 1],
            num_heads=[1, 2],
            query_stride=[2, 2],
            masked_unit_size=[4, 4],
            masked_unit_attention=[True, False],
            num_query_pool=1,
        )
        for kind in (classifier, bare)
    ),
    *(kinked(kind("Levit", 64, **LEVIT)) for kind in (classifier, bare)),
    kinked(classifier("Levit", 64, ending=TEACHER, **LEVIT)),
    *(kind("PvtV2", 64, **PYRAMID) for kind in (classifier, bare)),
    classifier("CLIP", vision_config=VISION),
    classifier("Siglip", vision_config=VISION),
    replace(classifier("TimmWrapper", 64, **TIMM), needs="timm"),
    replace(bare("TimmWrapper", 64, **TIMM), needs="timm"),
    replace(bare("TimmWrapper", 32, **TIMM_TOKENS, do_pooling=False), name="TimmWrapperModel tokens", needs="timm"),
)

ONE_OF_EACH_KIND = {
    "ViTForImageClassification",  # the head sees the class token
    "ViTModel",  # tokens and a pooler
    "ViTMSNModel",  # tokens alone
    "DeiTForImageClassificationWithTeacher",  # two tokens, two heads
    "Dinov2ForImageClassification",  # the class token and the patches' mean
    "Dinov2WithRegistersForImageClassification",  # registers between them
    "BeitForImageClassification",  # the pooler's output
    "ConvNextModel",  # a map and a pooler
    "ResNetForImageClassification",  # pooled maps of one place
    "MobileViTModel",  # a pooler that is switched on
    "LevitForImageClassificationWithTeacher",  # the mean of tokens, two heads
    "PvtV2ForImageClassification",  # the mean of a map
    "CLIPForImageClassification",  # an encoder inside another model's vision_model
    "SiglipForImageClassification",
    "TimmWrapperForImageClassification",
    "TimmWrapperModel",
    "TimmWrapperModel tokens",
}
"""Families that go every way through their adapter. The others go one of these ways too."""
