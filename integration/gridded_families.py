"""Small real models of the Hugging Face families that take flattened patches and a grid, as Qwen-VL does, and kin.

Written by each family's own rule, as in ``families``, from which the shared configurations come.
"""

from __future__ import annotations

from typing import Any

from families import (
    CLIP_NORM,
    HALF_NORM,
    LLAMA,
    QWEN3_5_TEXT,
    ROTARY,
    greedy,
    grid_images,
    gridded,
    make,
)
from family import Family

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
EXAONE4 = {**LLAMA, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}


def asks(name: str, model: str, inputs: Any, since: str | None = LATER, **config: Any) -> Family:
    build = make(f"{model}ForConditionalGeneration", **config)
    return Family(name, build, inputs, (16, 24), generate=greedy, since=since)


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
    asks("EXAONE 4.5", "Exaone4_5_", grid_images(CLIP_NORM), **gridded(EXAONE4, **WINDOWED, num_key_value_heads=2)),
)
