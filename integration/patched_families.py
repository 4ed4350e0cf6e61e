"""Small real models of Hugging Face families that pack patches in ways of their own, or keep their encoder deep inside.

As in ``families``, nothing here comes from the package or its adapters.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from families import (
    BOS,
    CLIP_NORM,
    GEMMA,
    GEMMA3,
    HALF_NORM,
    IMAGE,
    IMAGENET_NORM,
    LAYERS,
    LLAMA,
    NAFLEX_VISION,
    SIGLIP_TOWER,
    TOKENS,
    VIDEO,
    VISION,
    VISION_END,
    VISION_START,
    Asking,
    Norm,
    frames_of,
    greedy,
    grid_images,
    gridded,
    make,
    normalise,
    prompt,
    sizes,
    talks,
    with_text,
)
from family import Family, Inputs
from torch import Tensor, nn

UNIT_NORM: Norm = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
FORMULA_NORM: Norm = ((0.7931, 0.7931, 0.7931), (0.1738, 0.1738, 0.1738))

LFM2 = {
    **LLAMA,
    "model_type": "lfm2",
    "layer_types": ["conv", "full_attention"],
    "block_auto_adjust_ff_dim": False,
    "conv_L_cache": 3,
}
GEMMA4_VISION = {
    **LAYERS,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "patch_size": 4,
    "pooling_kernel_size": 2,
    "position_embedding_size": 16,
}
GEMMA4_TEXT = {
    key: value
    for key, value in {**GEMMA3, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 64}.items()
    if key != "model_type"
}

T5GEMMA2_TEXT = {**GEMMA4_TEXT, "num_key_value_heads": 2}
COMPASS_TEXT = {
    **LLAMA,
    "layer_types": ["full_attention", "full_attention"],
    "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}},
}
DEEPSEEK_TEXT = {**LLAMA, "model_type": "deepseek_ocr2_text", "mlp_layer_types": ["dense", "dense"]}
SAM = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 4,
    "output_channels": 16,
    "window_size": 4,
    "global_attn_indexes": [1],
    "mlp_dim": 48,
}
TROCR = {
    **TOKENS,
    "d_model": 24,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "is_decoder": True,
    "add_cross_attention": True,
}
FORMULA_TEXT = {
    **TOKENS,
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": BOS,
    "forced_eos_token_id": None,
}

DEEPSEEK = {
    "text_config": DEEPSEEK_TEXT,
    "vision_config": {
        "sam_config": {**SAM, "downsample_channels": [16, 32]},
        "encoder_config": {**LLAMA, "model_type": "deepseek_ocr2_encoder", "num_hidden_layers": 2},
    },
    "image_token_id": IMAGE,
}
DONUT = {
    "model_type": "donut-swin",
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
}
MBART = {
    **TOKENS,
    "model_type": "mbart",
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "is_decoder": True,
    "add_cross_attention": True,
    "decoder_start_token_id": BOS,
    "forced_eos_token_id": None,
}


def donut() -> nn.Module:
    """Donut and Nougat have the same encoder, and each its own constants: the model says which."""
    model = make("VisionEncoderDecoderModel", encoder=DONUT, decoder=MBART)()
    mean, std = IMAGENET_NORM
    model.image_processor = SimpleNamespace(image_mean=mean, image_std=std)
    return model


def patches(images: Tensor, norm: Norm, patch: int, longest: int) -> Tensor:
    """(B, longest, P * P * C): patches in reading order, channels last, then rows of zeros."""
    batch, channels, height, width = images.shape
    h, w = height // patch, width // patch
    rows = normalise(images, norm).reshape(batch, channels, h, patch, w, patch).permute(0, 2, 4, 3, 5, 1)
    return F.pad(rows.reshape(batch, h * w, -1), (0, 0, 0, longest - h * w))


def lfm2(model: nn.Module, images: Tensor) -> Inputs:
    """LFM2-VL: SigLIP2's patches, here all of them real; the projector joins two by two."""
    h, w = images.shape[-2] // 4, images.shape[-1] // 4
    return {
        **prompt(images, *[IMAGE] * (h * w // 4)),
        "pixel_values": patches(images, HALF_NORM, 4, h * w),
        "pixel_attention_mask": torch.ones(len(images), h * w, dtype=torch.int32, device=images.device),
        "spatial_shapes": sizes(images, h, w),
    }


def places(images: Tensor, patch: int, longest: int) -> Tensor:
    """(B, longest, 2): column and row of each patch, and -1 twice for padding."""
    h, w = images.shape[-2] // patch, images.shape[-1] // patch
    rows = [[x, y] for y in range(h) for x in range(w)] + [[-1, -1]] * (longest - h * w)
    return torch.tensor([rows], device=images.device).repeat(len(images), 1, 1)


def gemma4(patch: int, merge: int, extra: int = 0) -> Asking:
    """Gemma 4: pixels in [0, 1] and the place of each patch, padded by ``extra`` patches."""

    def inputs(model: nn.Module, images: Tensor) -> Inputs:
        count = images.shape[-2] * images.shape[-1] // patch**2
        text = prompt(images, VISION_START, *[IMAGE] * (count // merge**2), VISION_END)
        return {
            **text,
            "pixel_values": patches(images, UNIT_NORM, patch, count + extra),
            "image_position_ids": places(images, patch, count + extra),
            "mm_token_type_ids": (text["input_ids"] == IMAGE).int(),
        }

    return inputs


def gemma4_film(model: nn.Module, images: Tensor) -> Inputs:
    """Two frames, each with places of its own. Later releases of transformers 5 take all films' frames in a row."""
    film = frames_of(images, 2).flatten(0, 1)
    count = images.shape[-2] * images.shape[-1] // 4**2
    text = prompt(images, VISION_START, *[VIDEO] * (2 * count // 4), VISION_END)
    given = {"pixel_values_videos": patches(film, UNIT_NORM, 4, count), "video_position_ids": places(film, 4, count)}
    if "num_frames_per_video" in inspect.signature(model.forward).parameters:
        given["num_frames_per_video"] = sizes(images, 2)[:, 0]
    else:
        given = {name: value.unflatten(0, (len(images), 2)) for name, value in given.items()}
    return {**text, **given, "mm_token_type_ids": (text["input_ids"] == VIDEO).int() * 2}


def diffused(model: nn.Module, images: Tensor) -> Inputs:
    """DiffusionGemma: the prompt of Gemma 4, and a canvas of words to be improved on."""
    canvas = torch.tensor([[9, 8, 7, 6]], device=images.device).repeat(len(images), 1)
    return {**gemma4(4, 2)(model, images), "decoder_input_ids": canvas}


def strips(model: nn.Module, images: Tensor) -> Inputs:
    """MiniCPM-V: patches of all images side by side, each P high; sixteen make a token."""
    h, w = images.shape[-2] // 4, images.shape[-1] // 4
    pixels = normalise(images, HALF_NORM)
    rows = [image[:, top : top + 4] for image in pixels for top in range(0, images.shape[-2], 4)]
    return {
        **prompt(images, *[IMAGE] * (h * w // 16)),
        "pixel_values": torch.cat(rows, dim=-1)[None],
        "target_sizes": sizes(images, h, w).int(),
    }


def page(model: nn.Module, images: Tensor) -> Inputs:
    """DeepSeek-OCR 2: the whole, and its left and right halves as tiles; each makes 144 tokens."""
    halves = torch.stack([images[..., :16], images[..., 16:]], dim=1).flatten(0, 1)
    halves = F.interpolate(halves, size=(32, 32), mode="bilinear")
    return {
        **with_text(HALF_NORM, 3 * 144 + 1)(model, images),
        "pixel_values_local": normalise(halves, HALF_NORM),
        "num_local_patches": [2] * len(images),
    }


def answered(norm: Norm, tokens: int = 0) -> Asking:
    """Encoder and decoder: the answer's beginning goes in beside the question."""

    def inputs(model: nn.Module, images: Tensor) -> Inputs:
        begun = torch.tensor([[BOS, 9, 8]], device=images.device).repeat(len(images), 1)
        return {**with_text(norm, tokens)(model, images), "decoder_input_ids": begun}

    return inputs


def transcribed(norm: Norm) -> Asking:
    """As above without a question."""

    def inputs(model: nn.Module, images: Tensor) -> Inputs:
        given = answered(norm)(model, images)
        return {name: given[name] for name in ("pixel_values", "decoder_input_ids")}

    return inputs


def acting(model: nn.Module, images: Tensor) -> Inputs:
    """PI0: one camera, the robot's state, and the noise that actions are made of."""
    count, device = len(images), images.device
    return {
        **prompt(images, *[IMAGE] * 16),
        "pixel_values": normalise(images, HALF_NORM)[:, None],
        "pixel_attention_mask": torch.ones(count, 1, dtype=torch.bool, device=device),
        "state": torch.linspace(-1, 1, 6, device=device).repeat(count, 1),
        "noise": torch.linspace(-1, 1, 4 * 6, device=device).view(1, 4, 6).repeat(count, 1, 1),
        "timestep": torch.full((count,), 0.5, device=device),
    }


def actions(model: Any, inputs: Inputs) -> Tensor:
    given = {name: value for name, value in inputs.items() if name != "timestep"}
    return model.sample_actions(**given, num_steps=2)


GEMMA4 = {"text_config": GEMMA4_TEXT, "image_token_id": IMAGE, "video_token_id": VIDEO, "audio_token_id": 59}
TALL = (16, 24)

PATCHED_FAMILIES: tuple[Family, ...] = (
    talks("Gemma 4", "Gemma4", gemma4(4, 2, extra=8), TALL, since="5.5.0", **GEMMA4, vision_config=GEMMA4_VISION),
    talks("Gemma 4 video", "Gemma4", gemma4_film, TALL, since="5.5.0", **GEMMA4, vision_config=GEMMA4_VISION),
    talks(
        "Gemma 4 unified",
        "Gemma4Unified",
        gemma4(8, 1),
        TALL,
        since="5.17.0",
        **GEMMA4,
        vision_config={
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "mm_embed_dim": 32,
            "mm_posemb_size": 8,
            "output_proj_dims": 32,
        },
    ),
    Family(
        "DiffusionGemma",
        make(
            "DiffusionGemmaForBlockDiffusion",
            text_config={**GEMMA4_TEXT, "num_experts": 2, "top_k_experts": 2, "moe_intermediate_size": 16},
            vision_config=GEMMA4_VISION,
            image_token_id=IMAGE,
            canvas_length=4,
        ),
        diffused,
        TALL,
        since="5.17.0",
    ),
    talks(
        "LFM2-VL",
        "Lfm2Vl",
        lfm2,
        TALL,
        text_config=LFM2,
        vision_config={"model_type": "siglip2_vision_model", **NAFLEX_VISION, "vision_use_head": False},
        image_token_id=IMAGE,
        projector_hidden_size=32,
        downsample_factor=2,
    ),
    talks(
        "MiniCPM-V 4.6",
        "MiniCPMV4_6",
        strips,
        (16, 32),
        since="5.17.0",
        text_config=LLAMA,
        vision_config={**VISION, "image_size": 32, "num_hidden_layers": 2},
        insert_layer_id=0,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    ),
    talks(
        "T5Gemma 2",
        "T5Gemma2",
        answered(HALF_NORM, 4),
        since="5.0.0",
        encoder={
            "text_config": T5GEMMA2_TEXT,
            "vision_config": SIGLIP_TOWER,
            "mm_tokens_per_image": 4,
            "boi_token_index": VISION_START,
            "eoi_token_index": VISION_END,
        },
        decoder=T5GEMMA2_TEXT,
        image_token_index=IMAGE,
    ),
    Family(
        "PI0",
        make(
            "PI0ForConditionalGeneration",
            vlm_config={
                "model_type": "paligemma",
                "text_config": GEMMA,
                "vision_config": SIGLIP_TOWER,
                "image_token_index": IMAGE,
                "projection_dim": 32,
                "hidden_size": 32,
            },
            dit_config=GEMMA,
            chunk_size=4,
            max_state_dim=6,
            max_action_dim=6,
        ),
        acting,
        generate=actions,
        since="5.17.0",
    ),
    Family(
        "TrOCR",
        make(
            "VisionEncoderDecoderModel",
            encoder={"model_type": "vit", **VISION},
            decoder={"model_type": "trocr", **TROCR},
        ),
        transcribed(HALF_NORM),
        generate=greedy,
    ),
    Family("Donut", donut, transcribed(IMAGENET_NORM), (32, 32), generate=greedy),
    talks(
        "Cohere Compass",
        "CohereCompass",
        grid_images(CLIP_NORM),
        TALL,
        since="5.17.0",
        **gridded(COMPASS_TEXT, num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
    ),
    talks("DeepSeek-OCR 2", "DeepseekOcr2", with_text(HALF_NORM, 145), (32, 32), since="5.17.0", **DEEPSEEK),
    replace(
        talks("DeepSeek-OCR 2 tiles", "DeepseekOcr2", page, (32, 32), since="5.17.0", **DEEPSEEK), calls_per_generate=2
    ),
    talks(
        "PP-FormulaNet",
        "PPFormulaNet",
        transcribed(FORMULA_NORM),
        (32, 32),
        since="5.17.0",
        text_config=FORMULA_TEXT,
        vision_config={
            **SAM,
            "post_conv_in_channels": 16,
            "post_conv_mid_channels": 16,
            "post_conv_out_channels": 24,
            "decoder_hidden_size": 32,
        },
    ),
)
