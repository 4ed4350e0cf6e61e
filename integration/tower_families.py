"""More small models of transformers that look at images through one plain vision tower, or two.

As in ``families``, inputs are written by each family's own rule. Where checkpoints of a family normalise in other
colours than its processor does of itself, the model carries an image processor.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from families import (
    CLIP_NORM,
    CLIP_VISION,
    COHERE2,
    EOS,
    HALF_NORM,
    IMAGE,
    IMAGENET_NORM,
    INTERNVL_VISION,
    LAYERS,
    LLAMA,
    PIXTRAL_VISION,
    QFORMER,
    QUERIES,
    QWEN2,
    SIGLIP_TOWER,
    TEXT,
    TILED,
    TOKENS,
    UNTIED,
    VIDEO,
    VISION,
    Norm,
    frames_of,
    greedy,
    instructed,
    make,
    normalise,
    prompt,
    randomise,
    talks,
    tiled,
    with_sizes,
    with_text,
)
from family import Family, Inputs
from torch import Tensor, nn

INDICATORS = [50, 51, 52, 53, 54]

BART_LAYERS = {"layers": 2, "ffn_dim": 48, "attention_heads": 4}
QWEN3 = {**QWEN2, "model_type": "qwen3", "head_dim": 8}
BART = {
    **TOKENS,
    "model_type": "bart",
    "d_model": 32,
    "max_position_embeddings": 64,
    "decoder_start_token_id": EOS,
    "forced_eos_token_id": None,
    **{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in BART_LAYERS.items()},
}
FLORENCE_VISION = {
    "depths": [1, 1],
    "patch_size": [3, 3],
    "patch_stride": [2, 2],
    "patch_padding": [1, 1],
    "patch_prenorm": [False, True],
    "embed_dim": [16, 32],
    "num_heads": [2, 4],
    "num_groups": [2, 4],
    "window_size": 2,
    "projection_dim": 32,
}
# As Segment Anything's: windows in all layers but one, and a map in the end.
MAPS = {
    **LAYERS,
    "image_size": 16,
    "patch_size": 2,
    "output_channels": 16,
    "window_size": 4,
    "global_attn_indexes": [1],
    "mlp_dim": 48,
}
ARIA = {
    # Every token goes to all experts: a small change of the picture would otherwise choose others.
    "text_config": {**LLAMA, "model_type": "aria_text", "moe_num_experts": 2, "moe_topk": 2},
    "vision_config": VISION,
}
IDEFICS_PERCEIVER = {
    "resampler_n_latents": 4,
    "resampler_depth": 1,
    "resampler_n_heads": 4,
    "resampler_head_dim": 8,
}


def carrying(build: Callable[[], nn.Module], norm: Norm, **others: Any) -> Callable[[], nn.Module]:
    """The model with an image processor that says so."""

    def built() -> nn.Module:
        model = build()
        model.image_processor = SimpleNamespace(image_mean=norm[0], image_std=norm[1], **others)
        return model

    return built


def with_processor(family: Family, norm: Norm, calls: int = 1, **others: Any) -> Family:
    return replace(family, build=carrying(family.build, norm, **others), calls_per_generate=calls)


def got_ocr(configuration: str, **config: Any) -> Callable[[], nn.Module]:
    """One class for several configurations."""

    def build() -> nn.Module:
        import transformers

        given = getattr(transformers, configuration)(**deepcopy(config))
        return randomise(transformers.GotOcr2ForConditionalGeneration(given))

    return build


def tiled_frames(model: nn.Module, images: Tensor) -> Inputs:
    """LLaVA-NeXT-Video: two frames, and of each the 4 x 4 tokens pooled to 2 x 2."""
    film = normalise(frames_of(images, 2), CLIP_NORM)
    return {**prompt(images, *[VIDEO] * (2 * 4)), "pixel_values_videos": film}


def masked(model: nn.Module, images: Tensor) -> Inputs:
    """Aria: which pixels are the picture's; here all are."""
    mask = torch.ones_like(images[:, 0], dtype=torch.long)
    return {**with_text(HALF_NORM, 4)(model, images), "pixel_mask": mask}


def between_indicators(model: nn.Module, images: Tensor) -> Inputs:
    """Ovis: tokens of its own vocabulary of pictures say where one begins and ends."""
    first, *_, final = INDICATORS
    text = prompt(images, first, *[IMAGE] * 16, final)
    return {**text, "pixel_values": normalise(images, CLIP_NORM)}


def film(model: nn.Module, images: Tensor, *placeholders: int) -> Inputs:
    return {**prompt(images, *placeholders), "pixel_values": normalise(frames_of(images, 2), CLIP_NORM)}


def with_places(model: nn.Module, images: Tensor) -> Inputs:
    """Kosmos: a mask says where in the text the picture's tokens go."""
    given = with_text(CLIP_NORM, 4)(model, images)
    return {**given, "image_embeds_position_mask": (given["input_ids"] == IMAGE).long()}


def interleaved(model: nn.Module, images: Tensor) -> Inputs:
    """Idefics: a picture that all of the text looks at, and an empty one that none does."""
    text, pixels = prompt(images), normalise(images, CLIP_NORM)
    looks = torch.tensor([1, 0], device=images.device).expand(*text["input_ids"].shape, 2)
    return {
        **text,
        "pixel_values": torch.stack([pixels, torch.zeros_like(pixels)], dim=1),
        "image_attention_mask": looks,
    }


def instructed_film(model: nn.Module, images: Tensor) -> Inputs:
    """InstructBLIP's four query tokens, of each of two frames."""
    return {**instructed(model, images), **film(model, images, *[VIDEO] * (2 * 4))}


def twice(model: nn.Module, images: Tensor) -> Inputs:
    """DeepSeek-VL hybrid: the picture in two sizes, which are one here, and two colours."""
    return {**with_text(HALF_NORM, 16)(model, images), "high_res_pixel_values": normalise(images, CLIP_NORM)}


def windowed(model: nn.Module, images: Tensor) -> Inputs:
    """Granite: tiles as LLaVA-NeXT's, with a quarter of the tokens: 2 x 2, and 4 rows of 2 with a line break each."""
    return {**tiled(HALF_NORM)(model, images), **prompt(images, *[IMAGE] * (2 * 2 + 4 * (2 + 1)))}


TOWER_FAMILIES: tuple[Family, ...] = (
    talks(
        "Llama 4",
        "Llama4",
        with_text(HALF_NORM, 4),
        image_token_index=IMAGE,
        # No experts, between which a small change of the picture might choose others.
        text_config={
            **LLAMA,
            "model_type": "llama4_text",
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "moe_layers": [],
        },
        vision_config={
            **VISION,
            "intermediate_size": 32 * 4,
            "projector_input_dim": 24,
            "projector_output_dim": 24,
            "vision_output_dim": 24,
        },
    ),
    *(
        talks(
            name,
            "LlavaNextVideo",
            inputs,
            **TILED,
            video_token_index=VIDEO,
            text_config=LLAMA,
            vision_config=CLIP_VISION,
        )
        for name, inputs in (("LLaVA-NeXT-Video images", tiled(CLIP_NORM)), ("LLaVA-NeXT-Video", tiled_frames))
    ),
    talks(
        "Cohere 2 Vision",
        "Cohere2Vision",
        with_text(HALF_NORM, 4),
        text_config=COHERE2,
        vision_config=SIGLIP_TOWER,
        image_token_id=IMAGE,
        alignment_intermediate_size=48,
    ),
    talks(
        "DeepSeek-VL", "DeepseekVL", with_text(HALF_NORM, 16), **UNTIED, text_config=LLAMA, vision_config=SIGLIP_TOWER
    ),
    with_processor(
        talks(
            "Janus",
            "Janus",
            with_text(HALF_NORM, 16),
            **UNTIED,
            text_config=LLAMA,
            vision_config={**VISION, "projection_dim": 32},
            vq_config={
                "embed_dim": 8,
                "num_embeddings": 16,
                "latent_channels": 32,
                "base_channels": 32,
                "channel_multiplier": [1],
                "num_res_blocks": 1,
                "num_patches": 4,
                "projection_dim": 32,
                "image_token_embed_dim": 32,
            },
        ),
        HALF_NORM,
    ),
    *(
        Family(
            name,
            got_ocr(config, vision_config=MAPS, text_config=QWEN2, image_token_index=IMAGE, tie_word_embeddings=False),
            with_text(CLIP_NORM, 4),
            generate=greedy,
            since=since,
        )
        for name, config, since in (
            ("GOT-OCR 2", "GotOcr2Config", None),
            ("PP-Chart2Table", "PPChart2TableConfig", "5.4.0"),
        )
    ),
    talks(
        "Ovis 2",
        "Ovis2",
        between_indicators,
        **UNTIED,
        text_config=QWEN2,
        vision_config={**VISION, "vocab_size": 41, "num_visual_indicator_tokens": 5},
        hidden_size=32,
        vocab_size=64,
        visual_indicator_token_ids=INDICATORS,
    ),
    with_processor(
        talks(
            "Florence 2",
            "Florence2",
            with_text(IMAGENET_NORM, 4 * 4 + 1),
            image_token_id=IMAGE,
            text_config=BART,
            vision_config=FLORENCE_VISION,
        ),
        IMAGENET_NORM,
    ),
    *(
        Family(
            name,
            make("GitForCausalLM", **TEXT, vision_config=VISION, num_image_with_embedding=frames),
            inputs,
            generate=greedy,
            calls_per_generate=frames or 1,
        )
        for name, inputs, frames in (("GIT", with_text(CLIP_NORM), None), ("GIT video", film, 2))
    ),
    talks(
        "Kosmos 2",
        "Kosmos2",
        with_places,
        text_config={**TOKENS, "embed_dim": 32, "layers": 2, "ffn_dim": 48, "attention_heads": 4},
        vision_config=VISION,
        latent_query_num=4,
    ),
    *(
        Family(
            name,
            make(
                "IdeficsForVisionText2Text",
                **TEXT,
                cross_layer_interval=1,
                use_resampler=resampled,
                vision_config={**VISION, "embed_dim": 32},
                perceiver_config=IDEFICS_PERCEIVER,
            ),
            interleaved,
            generate=greedy,
        )
        for name, resampled in (("Idefics", False), ("Idefics resampled", True))
    ),
    talks("InstructBLIP video", "InstructBlipVideo", instructed_film, **QUERIES, video_token_index=VIDEO),
    talks("Aria", "Aria", masked, image_token_index=IMAGE, projector_patch_to_query_dict={16: 4}, **ARIA),
    with_processor(
        talks(
            "DeepSeek-VL hybrid",
            "DeepseekVLHybrid",
            twice,
            **UNTIED,
            text_config=LLAMA,
            vision_config=SIGLIP_TOWER,
            high_res_vision_config={**MAPS, "patch_size": 4, "window_size": 2},
        ),
        HALF_NORM,
        calls=2,
        high_res_image_mean=CLIP_NORM[0],
        high_res_image_std=CLIP_NORM[1],
    ),
    talks(
        "LightOn OCR",
        "LightOnOcr",
        with_sizes(CLIP_NORM, 6),
        (16, 24),
        since="5.0.0",
        **UNTIED,
        text_config=QWEN3,
        vision_config=PIXTRAL_VISION,
    ),
    talks(
        "Granite 4 Vision",
        "Granite4Vision",
        windowed,
        since="5.8.0",
        **TILED,
        text_config={**LLAMA, "model_type": "granite4_vision_text", "num_hidden_layers": 6},
        vision_config={**SIGLIP_TOWER, "hidden_size": 64},
        qformer_config={**QFORMER, "use_qformer_text_input": False, "hidden_size": 64, "encoder_hidden_size": 64},
        vision_feature_select_strategy="full",
        downsample_rate="1/2",
        deepstack_layer_map=[[1, 0], [-2, 1]],
        spatial_target_layers=[2, 3, 4, 5],
    ),
    *(
        with_processor(
            talks(
                f"Qianfan OCR layer {layer}",
                "QianfanOCR",
                with_text(IMAGENET_NORM, 4),
                since="5.6.0",
                **UNTIED,
                text_config=QWEN3,
                vision_config=INTERNVL_VISION,
                vision_feature_layer=layer,
            ),
            IMAGENET_NORM,
        )
        for layer in (-1, -2)
    ),
)
