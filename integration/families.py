"""Small real models of every Hugging Face family, with inputs written by each family's own rule.

Nothing here comes from the package or its adapters: constants and patch orders are spelled out again, so that an
adapter that gets them wrong disagrees with this file.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from family import Family, Inputs
from torch import Tensor, nn

PAD, BOS, EOS = 0, 1, 2
IMAGE, VIDEO, VISION_START, VISION_END = 60, 61, 62, 63

Asking = Callable[[nn.Module, Tensor], Inputs]
Norm = tuple[tuple[float, ...], tuple[float, ...]]
CLIP_NORM: Norm = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF_NORM: Norm = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET_NORM: Norm = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def output(field: str) -> Callable[[nn.Module, Inputs], Tensor]:
    return lambda model, inputs: getattr(model(**inputs), field)


def answer_loss(model: nn.Module, inputs: Inputs) -> Tensor:
    # Without labels BLIP for question answering returns no more than the vision features.
    return model(**inputs, labels=inputs["input_ids"]).loss.reshape(1)


def greedy(model: Any, inputs: Inputs) -> Tensor:
    # A random model would emit placeholders, which have no image behind them.
    placeholders = [IMAGE, VIDEO, VISION_START, VISION_END]
    return model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, suppress_tokens=placeholders)


def make(name: str, **config: Any) -> Callable[[], nn.Module]:
    """A builder of the class ``transformers.<name>``; nested configurations are given as dicts."""

    def build() -> nn.Module:
        import transformers

        model_class = getattr(transformers, name)
        # Configuration classes write into the dicts they are given.
        return randomise(model_class(model_class.config_class(**deepcopy(config))))

    return build


def randomise(model: nn.Module, std: float = 0.15) -> nn.Module:
    # Default initialisation hides the image: some gates and projectors start at zero. Gains around zero would hide
    # it too, so norms, gates and layer scales are drawn around one.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = parameter.numel() == 1 or (parameter.ndim == 1 and name.endswith(("weight", "lambda_1", "lambda_2")))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + gain)
    return model.eval()


# Configurations, most of them shared.

LAYERS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION = {**LAYERS, "image_size": 16, "patch_size": 4}
CLIP_VISION = {"model_type": "clip_vision_model", **VISION, "projection_dim": 24}
SIGLIP_VISION = {"model_type": "siglip_vision_model", **VISION}
# Without the pooling head, as in every language model built on SigLIP.
SIGLIP_TOWER = {**SIGLIP_VISION, "vision_use_head": False}
NAFLEX_VISION = {**LAYERS, "patch_size": 4, "num_patches": 16}
PIXTRAL_VISION = {"model_type": "pixtral", **VISION, "image_size": 32}
INTERNVL_VISION = {**VISION, "image_size": [16, 16], "patch_size": [4, 4]}
MLLAMA_VISION = {
    **VISION,
    "attention_heads": 4,
    "num_global_layers": 1,
    "intermediate_layers_indices": [0, 2],
    "vision_output_dim": 3 * 32,
}

TOKENS = {"vocab_size": 64, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
TEXT = {**TOKENS, **LAYERS, "num_hidden_layers": 2, "max_position_embeddings": 256}
SHORT_TEXT = {**TEXT, "max_position_embeddings": 16}
BLIP_TEXT = {**TEXT, "is_decoder": True, "sep_token_id": EOS}
LLAMA = {"model_type": "llama", **TEXT, "num_key_value_heads": 2}
QWEN2 = {**LLAMA, "model_type": "qwen2"}
MISTRAL = {**LLAMA, "model_type": "mistral", "head_dim": 8}
GEMMA = {**LLAMA, "model_type": "gemma", "head_dim": 8}
GEMMA3 = {**GEMMA, "model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"]}
COHERE2 = {**LLAMA, "model_type": "cohere2", "sliding_window": 16, "layer_types": GEMMA3["layer_types"]}
MLLAMA_TEXT = {**LLAMA, "cross_attention_layers": [1], "rope_scaling": {"rope_type": "default"}}
ROTARY = {**LLAMA, "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
QWEN3_5_TEXT = {
    **ROTARY,
    "head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}

QFORMER = {**LAYERS, "vocab_size": 64, "cross_attention_frequency": 1, "max_position_embeddings": 64}
PERCEIVER = {
    "hidden_size": 32,
    "resampler_n_latents": 4,
    "resampler_depth": 1,
    "resampler_n_heads": 4,
    "resampler_head_dim": 8,
    "num_key_value_heads": 2,
}

# Tying is said outright where transformers 4 and 5 have different defaults.
UNTIED = {"image_token_id": IMAGE, "tie_word_embeddings": False}
LLAVA = {"text_config": LLAMA, "image_token_index": IMAGE}
LLAVA_CLIP = {**LLAVA, "vision_config": CLIP_VISION}
WHOLE = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
TILED = {"image_token_index": IMAGE, "image_grid_pinpoints": [[32, 16]]}
BLIP = {"text_config": BLIP_TEXT, "vision_config": VISION}
QUERIES = {"text_config": LLAMA, "vision_config": VISION, "qformer_config": QFORMER, "num_query_tokens": 4}
IDEFICS3 = {**UNTIED, "vision_config": VISION, "text_config": LLAMA, "scale_factor": 2, "pad_token_id": PAD}


def gridded(text: dict[str, Any], **vision: Any) -> dict[str, Any]:
    """Configuration of the families that take flattened patches and a grid."""
    blocks = {"depth": 3, "num_heads": 4, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32}
    patches = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    # Qwen says vision_start, GLM image_start; each ignores the other's name.
    markers = {f"{kind}_start_token_id": VISION_START for kind in ("vision", "image")}
    markers |= {f"{kind}_end_token_id": VISION_END for kind in ("vision", "image")}
    return {
        "text_config": {key: value for key, value in text.items() if key != "model_type"},
        "vision_config": {**blocks, **patches, **vision},
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        **markers,
    }


# From images in [0, 1] to what a model takes.


def normalise(images: Tensor, norm: Norm) -> Tensor:
    mean, std = (torch.tensor(values, dtype=images.dtype, device=images.device).view(3, 1, 1) for values in norm)
    return (images - mean) / std


def prompt(images: Tensor, *placeholders: int) -> Inputs:
    """The same question about every image of the batch."""
    ids = torch.tensor([[BOS, *placeholders, 5, 6, 7]], device=images.device).repeat(len(images), 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def sizes(images: Tensor, *size: int) -> Tensor:
    return torch.tensor([size], device=images.device).repeat(len(images), 1)


def vision_only(norm: Norm) -> Asking:
    return lambda model, images: {"pixel_values": normalise(images, norm)}


def with_text(norm: Norm, tokens: int = 0) -> Asking:
    """Pixels as they are, and ``tokens`` placeholders for each image."""

    def inputs(model: nn.Module, images: Tensor) -> Inputs:
        return {**prompt(images, *[IMAGE] * tokens), "pixel_values": normalise(images, norm)}

    return inputs


def with_sizes(norm: Norm, tokens: int) -> Asking:
    plain = with_text(norm, tokens)
    return lambda model, images: {**plain(model, images), "image_sizes": sizes(images, *images.shape[-2:])}


def with_types(norm: Norm, tokens: int) -> Asking:
    """As Gemma 3: tokens of one image attend to each other both ways."""

    def inputs(model: nn.Module, images: Tensor) -> Inputs:
        given = with_text(norm, tokens)(model, images)
        return {**given, "token_type_ids": (given["input_ids"] == IMAGE).long()}

    return inputs


def tiled(norm: Norm) -> Asking:
    """As LLaVA-NeXT: the image at the encoder's size, then the two tiles of a picture twice as high.

    Language tokens: 4 x 4 of the whole, and 8 rows of 4 with a line break each.
    """

    def inputs(model: nn.Module, images: Tensor) -> Inputs:
        tall = F.interpolate(images, size=(32, 16), mode="bilinear")
        tiles = torch.stack([images, tall[:, :, :16], tall[:, :, 16:]], dim=1)
        text = prompt(images, *[IMAGE] * (4 * 4 + 8 * (4 + 1)))
        return {**text, "pixel_values": normalise(tiles, norm), "image_sizes": sizes(images, 32, 16)}

    return inputs


def frames_of(images: Tensor, count: int) -> Tensor:
    """A film in which no two frames are equal: (B, count, 3, H, W)."""
    return torch.stack([images, images.flip(-1), images.flip(-2), 1 - images][:count], dim=1)


def video_llava_images(model: nn.Module, images: Tensor) -> Inputs:
    return {**prompt(images, *[IMAGE] * 16), "pixel_values_images": normalise(images, CLIP_NORM)}


def video_llava_frames(model: nn.Module, images: Tensor) -> Inputs:
    # The class token is kept for films, dropped for images.
    film = normalise(frames_of(images, 2), CLIP_NORM)
    return {**prompt(images, *[VIDEO] * (2 * 17)), "pixel_values_videos": film}


def instructed(model: nn.Module, images: Tensor) -> Inputs:
    question = torch.tensor([[BOS, 8, 9]], device=images.device).repeat(len(images), 1)
    asked = {"qformer_input_ids": question, "qformer_attention_mask": torch.ones_like(question)}
    return {**with_text(CLIP_NORM, 4)(model, images), **asked}


def naflex(model: nn.Module, images: Tensor) -> Inputs:
    """SigLIP2: patches in reading order, channels last, then rows of zeros up to 16 patches."""
    (height, width), patch, longest = images.shape[-2:], 4, 16
    h, w = height // patch, width // patch
    patches = normalise(images, HALF_NORM).reshape(len(images), 3, h, patch, w, patch).permute(0, 2, 4, 3, 5, 1)
    patches = F.pad(patches.reshape(len(images), h * w, -1), (0, 0, 0, longest - h * w))
    mask = (torch.arange(longest, device=images.device) < h * w).int().repeat(len(images), 1)
    packed = {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": sizes(images, h, w)}
    return {**prompt(images), **packed}


def idefics(model: nn.Module, images: Tensor) -> Inputs:
    """One image, padded to 16 x 16, and an empty second one, as when another prompt of the batch has two."""
    space = (0, 16 - images.shape[-1], 0, 16 - images.shape[-2])
    pixels = F.pad(normalise(images, HALF_NORM), space)
    mask = F.pad(torch.ones_like(images[:, 0], dtype=torch.long), space)
    return {
        **prompt(images, *[IMAGE] * 4),
        "pixel_values": torch.stack([pixels, torch.zeros_like(pixels)], dim=1),
        "pixel_attention_mask": torch.stack([mask, torch.zeros_like(mask)], dim=1),
    }


def mllama(model: nn.Module, images: Tensor) -> Inputs:
    """Two tiles of a picture twice as wide, two empty ones."""
    wide = normalise(F.interpolate(images, size=(16, 32), mode="bilinear"), CLIP_NORM)
    tiles = torch.stack([wide[..., :16], wide[..., 16:]], dim=1)
    tiles = torch.cat([tiles, torch.zeros_like(tiles)], dim=1)
    text = prompt(images, IMAGE)
    filled = torch.tensor([1, 1, 0, 0], device=images.device)
    # Text before the picture does not see it.
    looks = (text["input_ids"] == IMAGE).long().cumsum(1)
    return {
        **text,
        "pixel_values": tiles[:, None],
        # 1-based, in the list [1, 1], [1, 2], [1, 3], ... of (high, wide)
        "aspect_ratio_ids": sizes(images, 2),
        "aspect_ratio_mask": filled.repeat(len(images), 1, 1),
        "cross_attention_mask": looks[:, :, None, None] * filled,
    }


def flattened(film: Tensor, norm: Norm, patch: int = 4, merge: int = 2, together: int = 2) -> tuple[Tensor, Tensor]:
    """Qwen and GLM: (B, frames, 3, H, W) to the patches of all films below each other, and their grids.

    Patches that the merger joins are neighbours; in a patch the order is channel, frame, row, column.
    """
    batch, frames, channels, height, width = film.shape
    t, h, w = frames // together, height // patch, width // patch
    patches = normalise(film, norm).reshape(
        batch, t, together, channels, h // merge, merge, patch, w // merge, merge, patch
    )
    patches = patches.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)
    return patches.reshape(batch * t * h * w, -1), sizes(film, t, h, w)


def about_vision(model: nn.Module, images: Tensor, token: int, tokens: int) -> Inputs:
    text = prompt(images, VISION_START, *[token] * tokens, VISION_END)
    # Later releases of transformers 5 demand them; before, generate() refuses them.
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        text["mm_token_type_ids"] = (text["input_ids"] == token).int() * (2 if token == VIDEO else 1)
    return text


def grid_images(norm: Norm) -> Asking:
    def inputs(model: nn.Module, images: Tensor) -> Inputs:
        # A still image is a film of the same frame twice.
        pixels, grid = flattened(torch.stack([images, images], dim=1), norm)
        text = about_vision(model, images, IMAGE, tokens=int(grid[0].prod()) // 4)
        return {**text, "pixel_values": pixels, "image_grid_thw": grid}

    return inputs


def grid_frames(norm: Norm) -> Asking:
    def inputs(model: nn.Module, images: Tensor) -> Inputs:
        pixels, grid = flattened(frames_of(images, 4), norm)
        text = about_vision(model, images, VIDEO, tokens=int(grid[0].prod()) // 4)
        return {**text, "pixel_values_videos": pixels, "video_grid_thw": grid}

    return inputs


# The families.


def embeds(
    name: str, model: str, inputs: Asking, field: str, size: tuple[int, int] = (16, 16), **config: Any
) -> Family:
    return Family(name, make(model, **config), inputs, size, outcome=output(field))


def talks(
    name: str, model: str, inputs: Asking, size: tuple[int, int] = (16, 16), since: str | None = None, **config: Any
) -> Family:
    return Family(name, make(f"{model}ForConditionalGeneration", **config), inputs, size, generate=greedy, since=since)


FAMILIES: tuple[Family, ...] = (
    embeds(
        "CLIP",
        "CLIPModel",
        with_text(CLIP_NORM),
        "image_embeds",
        text_config=SHORT_TEXT,
        vision_config=CLIP_VISION,
        projection_dim=24,
    ),
    embeds("CLIP vision model", "CLIPVisionModel", vision_only(CLIP_NORM), "pooler_output", **VISION),
    embeds(
        "CLIP vision model with projection",
        "CLIPVisionModelWithProjection",
        vision_only(CLIP_NORM),
        "image_embeds",
        **VISION,
        projection_dim=24,
    ),
    embeds(
        "SigLIP",
        "SiglipModel",
        with_text(HALF_NORM),
        "image_embeds",
        text_config=SHORT_TEXT,
        vision_config=SIGLIP_VISION,
    ),
    embeds("SigLIP vision model", "SiglipVisionModel", vision_only(HALF_NORM), "pooler_output", **VISION),
    embeds(
        "SigLIP2", "Siglip2Model", naflex, "image_embeds", (16, 12), text_config=SHORT_TEXT, vision_config=NAFLEX_VISION
    ),
    talks("LLaVA CLIP -2 default", "Llava", with_text(CLIP_NORM, 16), **LLAVA_CLIP, vision_feature_layer=-2),
    talks("LLaVA CLIP full -1", "Llava", with_text(CLIP_NORM, 17), **LLAVA_CLIP, **WHOLE),
    talks("LLaVA CLIP several layers", "Llava", with_text(CLIP_NORM, 16), **LLAVA_CLIP, vision_feature_layer=[-2, 1]),
    talks("LLaVA SigLIP full -1", "Llava", with_text(HALF_NORM, 16), **LLAVA, **WHOLE, vision_config=SIGLIP_TOWER),
    talks(
        "LLaVA Pixtral", "Llava", with_sizes(CLIP_NORM, 24), (16, 24), **LLAVA, **WHOLE, vision_config=PIXTRAL_VISION
    ),
    talks("VipLlava", "VipLlava", with_text(CLIP_NORM, 16), **LLAVA_CLIP, vision_feature_layers=[-2, -3, 1]),
    talks("LLaVA-NeXT", "LlavaNext", tiled(CLIP_NORM), **TILED, text_config=LLAMA, vision_config=CLIP_VISION),
    talks(
        "LLaVA-OneVision", "LlavaOnevision", tiled(HALF_NORM), **TILED, text_config=QWEN2, vision_config=SIGLIP_TOWER
    ),
    talks("Video-LLaVA images", "VideoLlava", video_llava_images, **LLAVA_CLIP, video_token_index=VIDEO),
    talks("Video-LLaVA videos", "VideoLlava", video_llava_frames, **LLAVA_CLIP, video_token_index=VIDEO),
    embeds("BLIP with text", "BlipModel", with_text(CLIP_NORM), "image_embeds", **BLIP, projection_dim=24),
    talks("BLIP", "Blip", with_text(CLIP_NORM), **BLIP),
    Family(
        "BLIP question answering",
        make("BlipForQuestionAnswering", **BLIP),
        with_text(CLIP_NORM),
        outcome=answer_loss,
        generate=greedy,
    ),
    talks("BLIP-2", "Blip2", with_text(CLIP_NORM, 4), **QUERIES, image_token_index=IMAGE),
    talks("InstructBLIP", "InstructBlip", instructed, **QUERIES, image_token_index=IMAGE),
    talks(
        "PaliGemma",
        "PaliGemma",
        with_text(HALF_NORM, 16),
        text_config=GEMMA,
        vision_config=SIGLIP_TOWER,
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
    ),
    talks(
        "Gemma 3",
        "Gemma3",
        with_types(HALF_NORM, 4),
        text_config=GEMMA3,
        vision_config=SIGLIP_TOWER,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
    ),
    talks(
        "Idefics2",
        "Idefics2",
        idefics,
        (16, 12),
        **UNTIED,
        text_config=MISTRAL,
        vision_config=VISION,
        perceiver_config=PERCEIVER,
    ),
    talks("Idefics3", "Idefics3", idefics, **IDEFICS3),
    talks("SmolVLM", "SmolVLM", idefics, **IDEFICS3),
    *(
        talks(
            f"InternVL layer {layer}",
            "InternVL",
            with_text(IMAGENET_NORM, 4),
            since=since,
            **UNTIED,
            text_config=QWEN2,
            vision_config=INTERNVL_VISION,
            vision_feature_layer=layer,
        )
        # In 4.57 no inner layer can be chosen: the model looks for its tower under another name.
        for layer, since in ((-1, None), (-2, "5.0.0"))
    ),
    *(
        talks(name, "Qwen2VL", inputs, (16, 24), **gridded(ROTARY, embed_dim=32, mlp_ratio=2))
        for name, inputs in (("Qwen2-VL", grid_images(CLIP_NORM)), ("Qwen2-VL video", grid_frames(CLIP_NORM)))
    ),
    talks(
        "Qwen2.5-VL",
        "Qwen2_5_VL",
        grid_images(CLIP_NORM),
        (16, 24),
        **gridded(ROTARY, window_size=16, fullatt_block_indexes=[1]),
    ),
    talks(
        "Qwen3-VL",
        "Qwen3VL",
        grid_images(HALF_NORM),
        (16, 24),
        **gridded({**ROTARY, "head_dim": 8}, num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
    ),
    talks(
        "Qwen3.5",
        "Qwen3_5",
        grid_images(HALF_NORM),
        (16, 24),
        since="5.2.0",
        **gridded(QWEN3_5_TEXT, num_position_embeddings=64),
    ),
    talks("GLM-4V", "Glm4v", grid_images(CLIP_NORM), (16, 24), **gridded(ROTARY, image_size=32)),
    talks("Mllama", "Mllama", mllama, text_config=MLLAMA_TEXT, vision_config=MLLAMA_VISION, image_token_index=IMAGE),
    talks(
        "AyaVision",
        "AyaVision",
        with_text(HALF_NORM, 4),
        text_config=COHERE2,
        vision_config=SIGLIP_TOWER,
        image_token_index=IMAGE,
    ),
    talks(
        "Mistral 3",
        "Mistral3",
        with_sizes(CLIP_NORM, 6),
        (16, 24),
        **UNTIED,
        text_config=MISTRAL,
        vision_config=PIXTRAL_VISION,
    ),
)
