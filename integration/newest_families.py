"""Small real models of the Hugging Face families that came last; most are kin of others.

As in ``families``, nothing here comes from the package or its adapters.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from families import (
    CLIP_NORM,
    HALF_NORM,
    IMAGE,
    LAYERS,
    LLAMA,
    PIXTRAL_VISION,
    TEXT,
    VIDEO,
    VISION,
    VISION_END,
    VISION_START,
    Asking,
    Norm,
    about_vision,
    frames_of,
    greedy,
    grid_images,
    gridded,
    make,
    normalise,
    prompt,
    sizes,
    with_sizes,
    with_text,
)
from family import Family, Inputs
from gridded_families import (
    HEADS,
    HUNYUAN_VISION,
    INKLING_TEXT,
    MARKED,
    MERGED,
    MUSE_TEXT,
    MUSE_VISION,
    PATCHED,
    ROPE_3D,
    ROUTED,
    WINDOWED,
    blocks,
    muse,
    muse_film,
    patches,
    seen,
)
from patched_families import SAM, TALL, strips
from torch import Tensor, nn
from tower_families import with_processor

LATEST = "5.24.0"
"""None of these classes is in 5.17; in which release between it came is not asked."""

# Few keys, all of which every query chooses.
INDEXED = {"index_topk": 64, "index_head_dim": 8, "index_n_heads": 2}
LATENT = {
    **TEXT,
    **ROUTED,
    **INDEXED,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "mlp_layer_types": ["dense", "sparse"],
}
HY_TEXT = {
    **LATENT,
    "q_lora_rank": 16,
    "hc_mult": 2,
    "rope_parameters": {**ROPE_3D, "rope_theta": 1e4},
}
DOTS_TEXT = {
    **LATENT,
    "q_lora_rank": 16,
    "n_group": 1,
    "topk_group": 1,
    "shared_experts_intermediate_size": 24,
    "layer_types": ["full_attention", "full_attention"],
}
DOTS_VISION = {
    **MERGED,
    "moe_intermediate_size": 24,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "num_local_experts": 2,
    "num_experts_per_tok": 2,
    "adapter_in_dim": 32,
    "adapter_out_dim": 32,
}
DOTS_AUDIO = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "feature_size": 8,
    "downsample_hidden_size": 8,
    "adapter_input_size": 32,
    "adapter_out_dim": 32,
}
LFM3_TEXT = {**LLAMA, **HEADS, "model_type": "lfm3", "layer_types": ["conv", "full_attention"], "conv_L_cache": 3}
LFM3_VISION = {**MERGED, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention", "conv"]}
SPARK_TEXT = {
    **MUSE_TEXT,
    "num_local_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "moe_hidden_size": 16,
    "mlp_layer_types": ["dense", "sparse"],
}
SPARK_AUDIO = {
    "patch_sizes": [4, 4],
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "num_hidden_layers": 2,
    "conv_kernel_size": 3,
    "out_hidden_size": 32,
}
CANVAS_TEXT = {**LLAMA, "model_type": "qwen2_5_vl_text", "rope_parameters": {**ROPE_3D, "rope_theta": 1e4}}
INKLING2_TEXT = {
    **{name: value for name, value in INKLING_TEXT.items() if name not in ("n_shared_experts", "mlp_layer_types")},
    "unpadded_vocab_size": 64,
    "n_layers_per_attn_res_block": 1,
}
INKLING2_VISION = {
    **PATCHED,
    "posemb_grid_size": 4,
    "projection_hidden_dim": 32,
    "text_hidden_size": 32,
}
LOOPED = {
    "num_hidden_layers": 3,
    "layer_types": ["hybrid_sliding", "hybrid", "hybrid"],
    "loop_layer_index_start": 1,
    "loop_layer_index_end": 2,
    "loop_num_passes": 2,
    "loop_gate_rank": 8,
}
UNLIMITED = {
    "image_token_id": IMAGE,
    "text_config": {**LLAMA, "model_type": "unlimited_ocr_text", "mlp_layer_types": ["dense", "dense"]},
    "vision_config": {
        "sam_config": {**SAM, "downsample_channels": [16, 32]},
        "encoder_config": {**LAYERS, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8},
    },
}
DOCLING = {
    "image_token_id": IMAGE,
    "pad_token_id": 0,
    "text_config": {
        **TEXT,
        "num_key_value_heads": 2,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    "vision_config": {**VISION, "out_hidden_size": 32, "scale_factor": 2, "deepstack_visual_indexes": [0, 1]},
}
MOLMO = {
    "text_config": {**TEXT, **HEADS, "num_key_value_heads": 2, "additional_vocab_size": 8},
    "vision_config": {**LAYERS, **HEADS, "num_key_value_heads": 4, "image_size": [16, 16], "patch_size": 4},
    "adapter_config": {
        **HEADS,
        "vision_feature_layer": [2, 0],
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 48,
        "text_hidden_size": 32,
    },
    "image_patch_id": IMAGE,
}
NEMOTRON = {
    "text_config": {
        **TEXT,
        **HEADS,
        "model_type": "nemotron_h",
        "num_key_value_heads": 2,
        "layer_types": ["full_attention", "mlp"],
    },
    "vision_config": {
        "model_type": "radio",
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "mlp_ratio": 2.0,
        "patch_size": 4,
        "image_size": 16,
        "max_img_size": 32,
        "num_cls_tokens": 2,
        "num_registers": 1,
        "video_temporal_patch_size": 2,
    },
    "vision_hidden_size": 32,
    "projector_hidden_size": 32,
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
}


def pairs(norm: Norm) -> Asking:
    """Qwen's patches, which here carry no kind of token with them."""

    def inputs(model: nn.Module, images: Tensor) -> Inputs:
        given = grid_images(norm)(model, images)
        given.pop("mm_token_type_ids", None)
        return given

    return inputs


def dots(model: nn.Module, images: Tensor) -> Inputs:
    return seen(model, images, blocks(patches(images[:, None], CLIP_NORM)).flatten(6).flatten(0, 5))


def lines(film: Tensor, norm: Norm) -> Tensor:
    """HY 4: patches of all frames in reading order."""
    return patches(film, norm).flatten(4).flatten(0, 3)


def hy_image(model: nn.Module, images: Tensor) -> Inputs:
    """A token ends each line of merged patches."""
    tokens = images.shape[-2] // 8 * (images.shape[-1] // 8 + 1)
    return seen(model, images, lines(images[:, None], CLIP_NORM), tokens)


def canvas(merge: int) -> Asking:
    """MiniCPM-V: as version 4.6, with marks before and behind a picture, and ``merge`` x ``merge`` patches a token."""

    def inputs(model: nn.Module, images: Tensor) -> Inputs:
        count = images.shape[-2] * images.shape[-1] // (4 * merge) ** 2
        return {**strips(model, images), **about_vision(model, images, IMAGE, count)}

    return inputs


def inkling2(model: nn.Module, images: Tensor) -> Inputs:
    """Blocks of 2 x 2 patches as small images, channels last; one token each."""
    height, width = images.shape[-2:]
    framed = F.pad(images, (0, -width % 8, 0, -height % 8), value=-1 / 255)
    tiles = patches(framed[:, None], HALF_NORM, patch=8)
    rows, columns = tiles.shape[2:4]
    return {
        **prompt(images, *[IMAGE] * (rows * columns)),
        "pixel_values": tiles.flatten(0, 3).movedim(1, -1),
        "image_grid_thw": sizes(images, 1, rows, columns),
    }


def unlimited_page(model: nn.Module, images: Tensor) -> Inputs:
    """The whole, and its left and right halves as tiles, of 2 x 2 tokens each; every line ends with one, and all do."""
    halves = torch.stack([images[..., :16], images[..., 16:]], dim=1).flatten(0, 1)
    halves = F.interpolate(halves, size=(32, 32), mode="bilinear")
    return {
        **with_text(HALF_NORM, 2 * (4 + 1) + 2 * (2 + 1) + 1)(model, images),
        "pixel_values_local": normalise(halves, HALF_NORM),
        "num_local_patches": [2] * len(images),
        "patches_grid": [[2, 1]] * len(images),
    }


def docling(tokens: int) -> Asking:
    """A page of one tile, and an empty one, as when another page of the batch has two."""

    def inputs(model: nn.Module, images: Tensor) -> Inputs:
        tile = normalise(images, CLIP_NORM)
        real = torch.tensor([True, False], device=images.device).repeat(len(images), 1)
        chosen = {"tile_fine_mask": real[:, 0]} if tokens == 16 else {}
        return {
            **prompt(images, *[IMAGE] * tokens),
            "pixel_values": torch.stack([tile, torch.zeros_like(tile)], dim=1),
            "pixel_attention_mask": real,
            **chosen,
        }

    return inputs


def pooled(count: int, like: Tensor) -> Tensor:
    """Which of the 4 x 4 patches of ``count`` pictures make a token: two by two."""
    grid = torch.arange(count * 16, device=like.device).view(count, 2, 2, 2, 2)
    return grid.transpose(2, 3).reshape(count * 4, 4)


def channels_last(film: Tensor) -> Tensor:
    """Molmo: (pictures, 16, P * P * C), patches in reading order."""
    return patches(film, HALF_NORM).movedim(4, -1).flatten(4).flatten(2, 3).flatten(0, 1)


def molmo(model: nn.Module, images: Tensor) -> Inputs:
    return {
        **typed(prompt(images, *[IMAGE] * 4)),
        "pixel_values": channels_last(images[:, None]),
        "image_token_pooling": pooled(len(images), images),
        "image_grids": sizes(images, 2, 2, 0, 0),
        "image_num_crops": sizes(images, 1)[:, 0],
    }


def molmo_crops(model: nn.Module, images: Tensor) -> Inputs:
    """The picture, and a quarter of it as large again, which makes tokens of its own."""
    closer = F.interpolate(images[..., :8, :8], size=(16, 16), mode="bilinear")
    return {
        **typed(prompt(images, *[IMAGE] * 8)),
        "pixel_values": channels_last(torch.stack([images, closer], dim=1)),
        "image_token_pooling": pooled(2 * len(images), images),
        "image_grids": sizes(images, 2, 2, 2, 2),
        "image_num_crops": sizes(images, 2)[:, 0],
    }


def molmo_film(model: nn.Module, images: Tensor) -> Inputs:
    return {
        **typed(prompt(images, *[IMAGE] * 8)),
        "pixel_values_videos": channels_last(frames_of(images, 2)),
        "video_token_pooling": pooled(2 * len(images), images),
        "video_grids": sizes(images, 2, 2, 2),
    }


def typed(text: Inputs) -> Inputs:
    return {**text, "mm_token_type_ids": (text["input_ids"] == IMAGE).long()}


def nemotron(model: nn.Module, images: Tensor) -> Inputs:
    """Patches in reading order; four make a token."""
    h, w = images.shape[-2] // 4, images.shape[-1] // 4
    return {
        **prompt(images, *[IMAGE] * (h * w // 4)),
        "pixel_values": lines(images[:, None], CLIP_NORM),
        "image_grid_hw": sizes(images, h, w),
    }


def nemotron_film(model: nn.Module, images: Tensor) -> Inputs:
    """Four frames, two and two one behind the other."""
    film = normalise(frames_of(images, 4), CLIP_NORM)
    count = 2 * images.shape[-2] * images.shape[-1] // 8**2
    pixels = film.unflatten(1, (2, 2)).flatten(2, 3)
    return {**prompt(images, *[IMAGE] * count), "pixel_values_videos": pixels}


def newest(
    name: str, model: str, inputs: Asking, size: tuple[int, int] = TALL, calls: int = 1, **config: Any
) -> Family:
    named = model if model.endswith("V3") else f"{model}ForConditionalGeneration"
    return Family(name, make(named, **config), inputs, size, generate=greedy, since=LATEST, calls_per_generate=calls)


NEWEST_FAMILIES: tuple[Family, ...] = (
    newest(
        "Mistral Large 4",
        "MistralLarge4",
        with_sizes(CLIP_NORM, 6),
        text_config=LATENT,
        vision_config=PIXTRAL_VISION,
        image_token_index=IMAGE,
    ),
    newest(
        "HyperCLOVA X Vision 2",
        "HyperCLOVAXVisionV2",
        pairs(CLIP_NORM),
        text_config={**LLAMA, "model_type": "hyperclovax"},
        vision_config={**gridded({}, **WINDOWED)["vision_config"], "model_type": "qwen2_5_vl_vision"},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    ),
    with_processor(
        newest("LFM3-VL", "Lfm3Vl", pairs(HALF_NORM), **MARKED, text_config=LFM3_TEXT, vision_config=LFM3_VISION),
        HALF_NORM,
    ),
    with_processor(
        newest(
            "Dots3 Note",
            "Dots3Note",
            dots,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            text_config=DOTS_TEXT,
            vision_config=DOTS_VISION,
            audio_config=DOTS_AUDIO,
        ),
        CLIP_NORM,
    ),
    newest(
        "HY 4 VL",
        "HYV4VL",
        hy_image,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        text_config=HY_TEXT,
        vision_config={**HUNYUAN_VISION, "out_hidden_size": 32},
    ),
    *(
        newest(
            name,
            "MuseSpark",
            inputs,
            **MARKED,
            text_config=SPARK_TEXT,
            vision_config=MUSE_VISION,
            audio_config=SPARK_AUDIO,
            out_hidden_size=4 * 32,
            projector_hidden_size=32,
        )
        for name, inputs in (("Muse-Spark", muse), ("Muse-Spark video", muse_film))
    ),
    newest(
        "MiniCPM-V 4.7",
        "MiniCPMV4_7",
        canvas(4),
        (16, 32),
        text_config=CANVAS_TEXT,
        vision_config={**VISION, "image_size": 32, "num_hidden_layers": 2},
        insert_layer_id=0,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_id=VISION_START,
        image_end_id=VISION_END,
        slice_start_id=57,
        slice_end_id=58,
        newline_id=59,
    ),
    newest(
        "MiniCPM-OCR",
        "MiniCPMOcr",
        canvas(2),
        (16, 32),
        text_config=LLAMA,
        vision_config={**VISION, "image_size": 32, "num_hidden_layers": 2},
        insert_layer_id=0,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    ),
    newest(
        "Inkling 2",
        "Inkling2",
        inkling2,
        image_token_id=IMAGE,
        text_config=INKLING2_TEXT,
        vision_config=INKLING2_VISION,
    ),
    newest(
        "Inkling 2 looped",
        "Inkling2Loop",
        inkling2,
        image_token_id=IMAGE,
        text_config={**INKLING2_TEXT, **LOOPED},
        vision_config={"model_type": "inkling2_vision", **INKLING2_VISION},
    ),
    *(
        newest(name, "UnlimitedOcr", inputs, (32, 32), calls, **UNLIMITED)
        for name, inputs, calls in (
            ("Unlimited-OCR", with_text(HALF_NORM, 2 * (2 + 1) + 1), 1),
            ("Unlimited-OCR tiles", unlimited_page, 2),
        )
    ),
    *(
        newest(name, "GraniteDocling", docling(tokens), (16, 16), **DOCLING)
        for name, tokens in (("Granite Docling", 4), ("Granite Docling fine", 16))
    ),
    *(
        newest(name, "Molmo2", inputs, (16, 16), **MOLMO)
        for name, inputs in (("Molmo 2", molmo), ("Molmo 2 crops", molmo_crops), ("Molmo 2 video", molmo_film))
    ),
    *(
        newest(name, "NemotronH_Omni_Reasoning_V3", inputs, **NEMOTRON)
        for name, inputs in (("Nemotron 3 Omni", nemotron), ("Nemotron 3 Omni video", nemotron_film))
    ),
)
