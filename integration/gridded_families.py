"""Small real models of the Hugging Face families that take flattened patches and a grid, as Qwen-VL does, and kin.

Written by each family's own rule, as in ``families``, from which the shared configurations come.
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
    QWEN2,
    QWEN3_5_TEXT,
    ROTARY,
    TEXT,
    VIDEO,
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
    with_text,
)
from family import Family, Inputs
from torch import Tensor, nn

LATER = "5.17.0"
"""None of these classes is in 4.57; in which release between it came is not asked."""

# Every expert is used: which ones would change by jumps.
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTED = {"n_routed_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 24}

QWEN3_VISION = {"num_position_embeddings": 64}
DEEP_VISION = {**QWEN3_VISION, "deepstack_visual_indexes": [0, 1]}
WINDOWED = {"window_size": 16, "fullatt_block_indexes": [1]}
HEADS = {"head_dim": 8}

OMNI_AUDIO = {
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "num_mel_bins": 8,
    "output_dim": 32,
    "downsample_hidden_size": 8,
}
OMNI = {"audio_config": OMNI_AUDIO, "audio_token_id": 59, "audio_start_token_id": 58, "position_id_per_seconds": 25}

QWEN4_TEXT = {
    **QWEN3_5_TEXT,
    **SHARED,
    "layer_types": ["linear_attention", "qwen_sparse_attention"],
    "hc_count": 2,
    "hc_lowrank": 8,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 32,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
GLM_MOE_TEXT = {**ROTARY, **ROUTED, "n_shared_experts": 1, "first_k_dense_replace": 1, "partial_rotary_factor": 1.0}
GLM5_TEXT = {
    **{key: value for key, value in LLAMA.items() if key != "num_key_value_heads"},
    **ROUTED,
    "num_key_value_heads": 4,
    "layer_types": ["linear_attention", "deepseek_sparse_attention"],
    "mlp_layer_types": ["dense", "sparse"],
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "v_head_dim": 8,
    "qk_nope_head_dim": 8,
    "index_topk": 64,
    "index_kpool": 4,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "hc_mult": 2,
}
EXAONE4 = {
    **LLAMA,
    "model_type": "exaone4",
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}


ROPE_3D = {"rope_type": "default", "mrope_section": [1, 1, 2]}
ERNIE_TEXT = {
    **ROTARY,
    "rope_scaling": ROPE_3D,
    "moe_intermediate_size": [24, 24],
    "moe_k": 2,
    "moe_num_experts": 2,
    "moe_num_shared_experts": 1,
    "mlp_layer_types": ["dense", "sparse"],
}
ERNIE_VISION = {"temporal_merge_size": 2}
PATCHED = {**LAYERS, "patch_size": 4}
MERGED = {**PATCHED, "spatial_merge_size": 2}
MARKED = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
UNTIED = {"tie_word_embeddings": False}
NARROW = {**{key: value for key, value in ROTARY.items() if key != "model_type"}, **HEADS}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    **TEXT,
    **ROUTED,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
KIMI_VISION = {**PATCHED, "pos_emb_height": 4, "pos_emb_width": 4, "merge_kernel_size": [2, 2]}
HUNYUAN_VISION = {**MERGED, "max_image_size": 32}
EDGE_TEXT = {**NARROW, "rope_parameters": {**ROPE_3D, "rope_theta": 1e4}}
MUSE_TEXT = {**TEXT, **HEADS, "num_key_value_heads": 2, "layer_types": ["sliding_attention", "full_attention"]}
MUSE_VISION = {**PATCHED, "pos_emb_height": 4, "pos_emb_width": 4}
STEP_TEXT = {
    **TEXT,
    **HEADS,
    **ROUTED,
    "num_key_value_heads": 2,
    "share_expert_dim": 24,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse"],
}
STEP_VISION = {**PATCHED, "image_size": 32, "mlp_ratio": 2.0}
INKLING_TEXT = {
    **TEXT,
    **HEADS,
    **ROUTED,
    "num_key_value_heads": 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "n_shared_experts": 1,
    "layer_types": ["hybrid_sliding", "hybrid"],
    "mlp_layer_types": ["dense", "sparse"],
    "rel_extent": 16,
    "d_rel": 4,
}


def patches(film: Tensor, norm: Norm, patch: int = 4) -> Tensor:
    """(B, frames, 3, H, W) -> (B, frames, h, w, 3, patch, patch): in reading order, nothing flattened."""
    batch, frames, channels, height, width = film.shape
    cut = normalise(film, norm).reshape(batch, frames, channels, height // patch, patch, width // patch, patch)
    return cut.permute(0, 1, 3, 5, 2, 4, 6)


def blocks(read: Tensor, merge: int = 2) -> Tensor:
    """The same in blocks of merge x merge patches: (B, frames, h / merge, w / merge, merge, merge, ...)."""
    return read.unflatten(3, (-1, merge)).unflatten(2, (-1, merge)).transpose(3, 4)


def seen(model: nn.Module, images: Tensor, pixels: Tensor, tokens: int | None = None) -> Inputs:
    """About still images that came as these pixels."""
    grid = sizes(images, 1, images.shape[-2] // 4, images.shape[-1] // 4)
    text = about_vision(model, images, IMAGE, tokens or int(grid[0].prod()) // 4)
    return {**text, "pixel_values": pixels, "image_grid_thw": grid}


def ernie(model: nn.Module, images: Tensor) -> Inputs:
    given = seen(model, images, blocks(patches(images[:, None], CLIP_NORM)).flatten(6).flatten(0, 5))
    kinds = torch.isin(given["input_ids"], torch.tensor([IMAGE, VISION_START, VISION_END], device=images.device))
    return {**given, "moe_mm_token_type_ids": kinds.long()}


def maps(norm: Norm) -> Asking:
    """Kimi and PaddleOCR: patches as small images, in reading order."""
    return lambda model, images: seen(model, images, patches(images[:, None], norm).flatten(0, 3))


def hunyuan(model: nn.Module, images: Tensor) -> Inputs:
    """A token ends each line of merged patches, one stands before all and one behind."""
    tokens = 2 + images.shape[-2] // 8 * (images.shape[-1] // 8 + 1)
    return seen(model, images, patches(images[:, None], CLIP_NORM).flatten(4).flatten(0, 3), tokens)


def cosmos(model: nn.Module, images: Tensor) -> Inputs:
    read = blocks(patches(images[:, None], HALF_NORM)).movedim(-3, -1)
    return seen(model, images, read.flatten(6).flatten(0, 5))


def muse(model: nn.Module, images: Tensor) -> Inputs:
    twice = patches(images[:, None], HALF_NORM).squeeze(1).unsqueeze(3).repeat(1, 1, 1, 2, 1, 1, 1)
    return seen(model, images, twice.flatten(3).flatten(0, 2))


def muse_film(model: nn.Module, images: Tensor) -> Inputs:
    pairs = patches(frames_of(images, 4), HALF_NORM).unflatten(1, (2, 2)).movedim(2, 4)
    grid = sizes(images, 2, images.shape[-2] // 4, images.shape[-1] // 4)
    text = about_vision(model, images, VIDEO, int(grid[0].prod()) // 4)
    return {**text, "pixel_values_videos": pairs.flatten(4).flatten(0, 3), "video_grid_thw": grid}


def video_llama(model: nn.Module, images: Tensor) -> Inputs:
    """Images are not merged."""
    rows = patches(images[:, None], HALF_NORM).flatten(4).flatten(0, 3)
    given = seen(model, images, rows, tokens=len(rows) // len(images))
    return {**given, "image_merge_sizes": sizes(images, 1)[:, 0]}


def video_llama_film(model: nn.Module, images: Tensor) -> Inputs:
    """Films are, by two."""
    rows = blocks(patches(frames_of(images, 2), HALF_NORM)).flatten(6).flatten(0, 5)
    grid = sizes(images, 2, images.shape[-2] // 4, images.shape[-1] // 4)
    text = about_vision(model, images, VIDEO, int(grid[0].prod()) // 4)
    merges = sizes(images, 2)[:, 0]
    return {**text, "pixel_values_videos": rows, "video_grid_thw": grid, "video_merge_sizes": merges}


def step(model: nn.Module, images: Tensor) -> Inputs:
    """The whole image at 32 x 32: 2 x 2 tokens."""
    return with_text(CLIP_NORM, 4)(model, images)


def step_tiles(model: nn.Module, images: Tensor) -> Inputs:
    """It, and the two halves of a picture twice as wide, which go before it."""
    wide = F.interpolate(images, size=(32, 64), mode="bilinear")
    tiles = torch.stack([wide[..., :32], wide[..., 32:]], dim=1)
    return {
        **with_text(CLIP_NORM, 3 * 4)(model, images),
        "pixel_values_local": normalise(tiles, CLIP_NORM).flatten(0, 1),
        "num_local_patches": [2] * len(images),
    }


def inkling(model: nn.Module, images: Tensor) -> Inputs:
    """Tiles of 8 x 8 with two equal frames, channels last; one token each. There is always a margin to the right."""
    height, width = images.shape[-2:]
    framed = F.pad(images, (0, 8 - width % 8, 0, -height % 8), value=-1 / 255)
    tiles = patches(framed[:, None], CLIP_NORM, patch=8).flatten(0, 3)
    pixels = tiles[..., None].repeat(1, 1, 1, 1, 2).permute(0, 4, 2, 3, 1)
    return {**prompt(images, *[IMAGE] * (len(tiles) // len(images))), "pixel_values": pixels}


def asks(
    name: str,
    model: str,
    inputs: Asking,
    size: tuple[int, int] = (16, 24),
    since: str | None = LATER,
    calls: int = 1,
    **config: Any,
) -> Family:
    build = make(f"{model}ForConditionalGeneration", **config)
    return Family(name, build, inputs, size, generate=greedy, since=since, calls_per_generate=calls)


GRIDDED_FAMILIES: tuple[Family, ...] = (
    asks(
        "Qwen3-VL MoE",
        "Qwen3VLMoe",
        grid_images(HALF_NORM),
        since=None,
        **gridded({**ROTARY, **HEADS, **EXPERTS}, **DEEP_VISION),
    ),
    asks("Qwen3.5 MoE", "Qwen3_5Moe", grid_images(HALF_NORM), **gridded({**QWEN3_5_TEXT, **SHARED}, **QWEN3_VISION)),
    asks("Qwen4-Exp", "Qwen4Exp", grid_images(HALF_NORM), **gridded(QWEN4_TEXT, **QWEN3_VISION)),
    asks(
        "Qwen2.5-Omni thinker",
        "Qwen2_5OmniThinker",
        grid_images(CLIP_NORM),
        since=None,
        **gridded(ROTARY, **WINDOWED),
        **OMNI,
    ),
    asks(
        "Qwen3-Omni thinker",
        "Qwen3OmniMoeThinker",
        grid_images(HALF_NORM),
        since=None,
        **gridded({**ROTARY, **HEADS, **EXPERTS}, **DEEP_VISION),
        **OMNI,
    ),
    asks("GLM-4.6V", "Glm46V", grid_images(CLIP_NORM), **gridded(ROTARY, image_size=32)),
    asks("GLM-4.5V", "Glm4vMoe", grid_images(CLIP_NORM), since=None, **gridded(GLM_MOE_TEXT, image_size=32)),
    asks("GLM-OCR", "GlmOcr", grid_images(CLIP_NORM), **gridded({**ROTARY, **HEADS}, image_size=32)),
    asks(
        "GLM-5-Next",
        "Glm5Next",
        grid_images(CLIP_NORM),
        **gridded(GLM5_TEXT, image_size=32, projection_intermediate_size=48),
    ),
    asks(
        "EXAONE 4.5",
        "Exaone4_5_",
        grid_images(CLIP_NORM),
        # Later releases of transformers 5 ask its text configuration for a model_type, and have no default.
        **(gridded(EXAONE4, **WINDOWED, num_key_value_heads=2) | {"text_config": EXAONE4}),
    ),
    asks(
        "Cosmos3-Omni",
        "Cosmos3Omni",
        grid_images(HALF_NORM),
        **gridded({**ROTARY, **HEADS}, **DEEP_VISION),
    ),
    asks("ERNIE 4.5 VL", "Ernie4_5_VLMoe", ernie, **gridded(ERNIE_TEXT, **ERNIE_VISION)),
    asks(
        "PaddleOCR-VL",
        "PaddleOCRVL",
        maps(CLIP_NORM),
        **MARKED,
        **UNTIED,
        text_config=NARROW,
        vision_config={**MERGED, "image_size": 16},
    ),
    asks("HunYuan-VL", "HunYuanVL", hunyuan, **MARKED, **UNTIED, text_config=NARROW, vision_config=HUNYUAN_VISION),
    asks(
        "Kimi K2.5",
        "Kimi_K25",
        maps(HALF_NORM),
        **MARKED,
        **UNTIED,
        text_config=DEEPSEEK,
        vision_config=KIMI_VISION,
        projection_hidden_size=32,
    ),
    asks(
        "Cosmos3-Edge",
        "Cosmos3Edge",
        cosmos,
        **MARKED,
        text_config=EDGE_TEXT,
        vision_config={**MERGED, "num_patches": 16},
        projector_hidden_size=32,
    ),
    *(
        asks(
            name,
            "MuseGlimmer",
            inputs,
            **MARKED,
            text_config=MUSE_TEXT,
            vision_config=MUSE_VISION,
            out_hidden_size=4 * 32,
            projector_hidden_size=32,
        )
        for name, inputs in (("Muse-Glimmer", muse), ("Muse-Glimmer video", muse_film))
    ),
    *(
        asks(name, "VideoLlama3", inputs, **MARKED, **UNTIED, text_config=QWEN2, vision_config=PATCHED)
        for name, inputs in (("VideoLLaMA 3", video_llama), ("VideoLLaMA 3 video", video_llama_film))
    ),
    *(
        asks(
            name,
            "Step3p7",
            inputs,
            (32, 32),
            calls=calls,
            image_token_id=IMAGE,
            text_config=STEP_TEXT,
            vision_config=STEP_VISION,
        )
        for name, inputs, calls in (("Step 3.7", step, 1), ("Step 3.7 tiles", step_tiles, 2))
    ),
    asks(
        "Inkling",
        "Inkling",
        inkling,
        image_token_id=IMAGE,
        text_config=INKLING_TEXT,
        vision_config={"patch_size": 8, "num_hidden_layers": 3},
        audio_config={"n_mel_bins": 4, "mel_vocab_size": 8},
    ),
)
