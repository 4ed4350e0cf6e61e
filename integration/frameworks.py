"""Small random models of what needs more than transformers: open_clip, OpenFlamingo, the original LLaVA, timm.

Every model is an instance of the framework's own class and none is downloaded. ``inputs`` normalises by each
framework's own rule, written out here, so that it checks the adapters rather than repeats them.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import families
import torch
from families import IMAGE, QWEN2, greedy
from family import Family, Inputs
from torch import Tensor, nn

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# What open_clip records for its SigLIP models.
HALF_MEAN, HALF_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

WIDTH, HEADS, VOCABULARY = 32, 4, 40
PAD, START, END = 0, 1, 2
# OpenFlamingo's <|endofchunk|> and <image>, each one token that its tokenizer adds.
END_OF_CHUNK, MEDIA = 38, 39


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Default initialisation hides the image, and OpenFlamingo's gates start closed; make the image matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # A contrastive model's temperature is a scalar and already large.
            if parameter.ndim:
                # Small scales of normalisation layers would hide the image again, and so would narrow layers.
                centre = 1.0 if parameter.ndim == 1 and name.endswith(("weight", "_gate")) else 0.0
                std = max(0.15, parameter[0].numel() ** -0.5) if parameter.ndim > 1 else 0.15
                parameter.copy_(centre + std * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def normalised(images: Tensor, mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD) -> Tensor:
    """torchvision's ``Normalize`` and CLIPImageProcessor's, which are the same."""
    return (images - images.new_tensor(mean).view(3, 1, 1)) / images.new_tensor(std).view(3, 1, 1)


def open_clip_vision(**changes: Any) -> Inputs:
    sizes = {"layers": 3, "width": WIDTH, "head_width": WIDTH // HEADS, "mlp_ratio": 1.5}
    return {**sizes, "patch_size": 4, "image_size": 16, **changes}


def open_clip_text(**changes: Any) -> Inputs:
    return {"context_length": 8, "vocab_size": VOCABULARY, "width": WIDTH, "heads": HEADS, "layers": 1, **changes}


def recorded(model: nn.Module, mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD) -> nn.Module:
    """What ``open_clip.create_model`` does last: note on the tower how its pixels are made."""
    from open_clip.model import set_model_preprocess_cfg
    from open_clip.transform import PreprocessCfg

    set_model_preprocess_cfg(model, asdict(PreprocessCfg(size=model.visual.image_size, mean=mean, std=std)))
    return model


def build_clip(**vision: Any) -> nn.Module:
    from open_clip import CLIP

    model = CLIP(24, vision_cfg=open_clip_vision(**vision), text_cfg=open_clip_text(), quick_gelu=True)
    return randomise(recorded(model))


def build_custom_text_clip(embedding: int = 24, **vision: Any) -> nn.Module:
    from open_clip import CustomTextCLIP

    text = open_clip_text(pool_type="last", no_causal_mask=True, proj_bias=True)
    model = CustomTextCLIP(embedding, vision_cfg=open_clip_vision(**vision), text_cfg=text, init_logit_bias=-1.0)
    if hasattr(model.visual, "set_input_size"):
        # A timm trunk is made for its own size; create_model(force_image_size=...) changes it afterwards as here.
        model.visual.set_input_size(model.visual.image_size)
    return randomise(recorded(model, HALF_MEAN, HALF_STD))


def build_coca() -> nn.Module:
    from open_clip import CoCa

    pooler = {"attentional_pool": True, "attn_pooler_heads": HEADS, "attn_pooler_queries": 6}
    model = CoCa(
        WIDTH,
        multimodal_cfg=open_clip_text(attn_pooler_heads=HEADS),
        text_cfg=open_clip_text(embed_cls=True, output_tokens=True),
        vision_cfg=open_clip_vision(**pooler, output_tokens=True),
    )
    return randomise(recorded(model))


def clip_inputs(model: nn.Module, images: Tensor, *colours: tuple[float, ...]) -> Inputs:
    prompts = [[START, 5, 6, 7, END, 0, 0, 0], [START, 8, 9, 10, 11, 12, END, 0]]
    return {"image": normalised(images, *colours), "text": torch.tensor(prompts)}


def siglip_inputs(model: nn.Module, images: Tensor) -> Inputs:
    return clip_inputs(model, images, HALF_MEAN, HALF_STD)


def clip_outcome(model: nn.Module, inputs: Inputs) -> Tensor:
    image, text, scale, *bias = model(**inputs)
    return scale * image @ text.T + sum(bias)


def coca_inputs(model: nn.Module, images: Tensor) -> Inputs:
    # The captioner reads one text for each image, and the text tower appends a token of its own.
    text = torch.tensor([[START, 5, 6, 7, 8, 9, END]]).repeat(len(images), 1)
    return {"image": normalised(images), "text": text}


def coca_outcome(model: nn.Module, inputs: Inputs) -> Tensor:
    """Captions and the contrastive embedding, which read the two outputs of the tower."""
    outputs = model(**inputs)
    return torch.cat([outputs["logits"].flatten(1), outputs["image_features"]], dim=1)


def coca_generate(model: nn.Module, inputs: Inputs) -> Tensor:
    import transformers
    from open_clip import coca_model

    # open_clip gives up generating altogether because transformers 5 has no BeamSearchScorer; the rest is all there.
    coca_model._has_transformers = True
    coca_model.GENERATION_TYPES["top_k"] = transformers.TopKLogitsWarper
    # Padding with the end token too: it is held back until min_seq_len, another padding token would stop at once.
    ends = {"sot_token_id": START, "eos_token_id": END, "pad_token_id": END}
    return model.generate(inputs["image"], seq_len=6, min_seq_len=4, generation_type="top_k", top_k=1, **ends)


def build_flamingo(language: str) -> nn.Module:
    """What ``create_model_and_transforms`` does, less its downloads."""
    import open_clip
    import transformers
    from open_flamingo import Flamingo
    from open_flamingo.src.factory import _infer_decoder_layers_attr_name
    from open_flamingo.src.flamingo_lm import FlamingoLMMixin
    from open_flamingo.src.utils import extend_instance

    clip = recorded(open_clip.CLIP(24, vision_cfg=open_clip_vision(), text_cfg=open_clip_text(), quick_gelu=True))
    clip.visual.output_tokens = True

    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    special = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END, "max_position_embeddings": 64}
    inner = {"ffn_dim": 48, "word_embed_proj_dim": WIDTH} if language == "OPT" else {"intermediate_size": 48}
    config = getattr(transformers, f"{language}Config")(**sizes, **special, **inner)
    decoder = getattr(transformers, f"{language}ForCausalLM")(config)
    extend_instance(decoder, FlamingoLMMixin)
    decoder.set_decoder_layers_attr_name(_infer_decoder_layers_attr_name(decoder))
    return randomise(Flamingo(clip, decoder, END_OF_CHUNK, MEDIA, vis_dim=WIDTH))


def flamingo_inputs(model: nn.Module, images: Tensor) -> Inputs:
    """One text for each image: (b, T, F, 3, H, W) with T = F = 1."""
    return flamingo_texts([[MEDIA, 5, 6, 7]] * len(images), normalised(images)[:, None, None])


def interleaved_inputs(model: nn.Module, images: Tensor) -> Inputs:
    """All images in one text, as in few-shot prompts: b = 1 and T images."""
    chunks = [[MEDIA, 5 + index, 6, END_OF_CHUNK] for index in range(len(images))]
    return flamingo_texts([[token for chunk in chunks for token in chunk][:-1]], normalised(images)[None, :, None])


def flamingo_texts(texts: list[list[int]], pixels: Tensor) -> Inputs:
    # Padded on the left as its evaluation does: transformers >= 5.18 drops a mask of ones only, and OpenFlamingo's
    # forward has no default for it.
    ids = torch.tensor([[PAD, START, *text] for text in texts])
    return {"vision_x": pixels, "lang_x": ids, "attention_mask": (ids != PAD).long()}


def flamingo_generate(model: nn.Module, inputs: Inputs) -> Tensor:
    suppressed = [MEDIA, END_OF_CHUNK]
    return model.generate(**inputs, max_new_tokens=3, do_sample=False, suppress_tokens=suppressed, pad_token_id=PAD)


def build_llava(feature: str = "patch") -> nn.Module:
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    layers = {"hidden_size": WIDTH, "intermediate_size": 48, "num_attention_heads": HEADS}
    vision = CLIPVisionConfig(**layers, num_hidden_layers=3, image_size=16, patch_size=4)
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    # The tower accepts nothing but the name of a checkpoint, so give it one.
    with TemporaryDirectory() as checkpoint:
        CLIPVisionModel(vision).save_pretrained(checkpoint)
        processor.save_pretrained(checkpoint)
        config = LlavaConfig(
            **layers, vocab_size=VOCABULARY, num_hidden_layers=2, num_key_value_heads=HEADS,
            max_position_embeddings=128,
            pad_token_id=PAD, bos_token_id=START, eos_token_id=END,
            mm_vision_tower=checkpoint, mm_hidden_size=WIDTH, mm_projector_type="mlp2x_gelu",
            mm_vision_select_layer=-2, mm_vision_select_feature=feature,
        )  # fmt: skip
        model = LlavaLlamaForCausalLM(config)
        model.get_vision_tower().load_model()
    return randomise(model)


def llava_inputs(model: nn.Module, images: Tensor, *, listed: bool = False) -> Inputs:
    from llava.constants import IMAGE_TOKEN_INDEX

    # A single placeholder stands for all tokens of an image.
    ids = torch.tensor([[START, IMAGE_TOKEN_INDEX, 5, 6, 7]]).repeat(len(images), 1)
    pixels = normalised(images)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "images": list(pixels) if listed else pixels}


def tiled_inputs(model: nn.Module, images: Tensor) -> Inputs:
    """(b, tiles, 3, H, W): the images as the tiles of one large image."""
    return {**llava_inputs(model, images[:1]), "images": normalised(images)[None]}


def llava_generate(model: nn.Module, inputs: Inputs) -> Tensor:
    prompt = {"attention_mask": inputs["attention_mask"], "images": inputs["images"]}
    return model.generate(inputs["input_ids"], **prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False)


def build_timm(name: str, **changes: Any) -> nn.Module:
    import timm

    return randomise(timm.create_model(name, **changes))


def timm_inputs(model: nn.Module, images: Tensor) -> Inputs:
    """timm's own transform, by the colours that it notes on a model."""
    record = model.pretrained_cfg
    return {"x": normalised(images, record["mean"], record["std"])}


def timm_outcome(model: nn.Module, inputs: Inputs) -> Tensor:
    found = model(**inputs)
    return torch.cat([one.flatten(1) for one in found], dim=1) if isinstance(found, list) else found


def wrapped(architecture: str, size: int, **config: Any) -> dict[str, Any]:
    """Configuration of a timm model in transformers, with timm's record of weights that has colours of its own."""
    record = {"mean": list(OWN_MEAN), "std": list(OWN_STD), "input_size": [3, size, size]}
    return {"architecture": architecture, "pretrained_cfg": record, **config}


def build_vlm(name: str, **config: Any) -> nn.Module:
    return randomise(families.make(f"{name}ForConditionalGeneration", **config)())


def with_tokens(tokens: int) -> Any:
    """As many placeholders as the tower's map has places."""

    def inputs(model: nn.Module, images: Tensor) -> Inputs:
        return {**families.prompt(images, *[IMAGE] * tokens), "pixel_values": normalised(images, OWN_MEAN, OWN_STD)}

    return inputs


def perception_inputs(model: nn.Module, images: Tensor) -> Inputs:
    """(B, tiles, 3, H, W)."""
    text = with_tokens(100)(model, images)
    return {**text, "pixel_values": text["pixel_values"][:, None]}


OWN_MEAN, OWN_STD = (0.4, 0.5, 0.45), (0.3, 0.2, 0.25)
RESNET = {"layers": (1, 1, 1, 1), "width": 8, "head_width": 64, "image_size": 32}
# Pooling and projection of open_clip's SigLIP models.
TIMM = {"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none", "image_size": 32, "embedding": 64}

FASTVLM = {
    "text_config": QWEN2,
    "vision_config": wrapped("test_efficientnet", 64, model_type="timm_wrapper", hidden_size=256),
    "image_token_index": IMAGE,
}
GEMMA3N = {
    "text_config": {
        **families.TEXT,
        "intermediate_size": 48,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "vision_config": wrapped("test_efficientnet", 64, hidden_size=256, vocab_offset=64, vocab_size=8),
    "audio_config": {
        "hidden_size": 32,
        "conf_num_hidden_layers": 1,
        "conf_num_attention_heads": 4,
        "sscp_conv_channel_size": [4, 4],
        "input_feat_size": 16,
        "vocab_offset": 72,
        "vocab_size": 8,
    },
    "vision_soft_tokens_per_image": 4,
    "image_token_id": IMAGE,
    "audio_token_id": 61,
    "boi_token_id": 62,
    "eoi_token_id": 63,
}
PERCEPTION = {
    "text_config": families.LLAMA,
    # Its projector reads the width there, and timm is told it.
    "vision_config": wrapped("test_vit", 160, model_args={"embed_dim": 64}),
    "image_token_id": IMAGE,
    "video_token_id": 61,
}

CLIP_LIKE = {"outcome": clip_outcome, "needs": "open_clip"}
COCA = {"outcome": coca_outcome, "generate": coca_generate, "needs": "open_clip"}
FLAMINGO = {"generate": flamingo_generate, "needs": "open_flamingo"}
# Between 4.38 and 5.3 transformers' generate() passes an argument that LLaVA's forward does not know.
LLAVA = {"generate": llava_generate, "needs": "llava", "since": "5.4"}
HEADLESS = {"num_classes": 0, "global_pool": ""}
PLAIN = {"outcome": timm_outcome, "needs": "timm"}
TOWER = {"generate": greedy, "needs": "timm"}

FRAMEWORKS = (
    Family("open_clip CLIP", build_clip, clip_inputs, **CLIP_LIKE),
    Family("open_clip ResNet", partial(build_clip, **RESNET), clip_inputs, (32, 32), **CLIP_LIKE),
    Family("open_clip CustomTextCLIP", partial(build_custom_text_clip, pool_type="avg"), siglip_inputs, **CLIP_LIKE),
    Family("open_clip timm", partial(build_custom_text_clip, **TIMM), siglip_inputs, (32, 32), **CLIP_LIKE),
    Family("open_clip CoCa", build_coca, coca_inputs, **COCA),
    Family("OpenFlamingo OPT", partial(build_flamingo, "OPT"), flamingo_inputs, **FLAMINGO),
    Family("OpenFlamingo LLaMA", partial(build_flamingo, "Llama"), flamingo_inputs, **FLAMINGO),
    Family("OpenFlamingo GPT-NeoX interleaved", partial(build_flamingo, "GPTNeoX"), interleaved_inputs, **FLAMINGO),
    Family("original LLaVA", build_llava, llava_inputs, **LLAVA),
    Family("original LLaVA list", build_llava, partial(llava_inputs, listed=True), **LLAVA),
    Family("original LLaVA cls_patch", partial(build_llava, "cls_patch"), llava_inputs, **LLAVA),
    Family("original LLaVA tiles", build_llava, tiled_inputs, **LLAVA),
    Family("timm classifier", partial(build_timm, "test_efficientnet"), timm_inputs, (32, 32), **PLAIN),
    Family("timm pooled", partial(build_timm, "test_convnext", num_classes=0), timm_inputs, (32, 32), **PLAIN),
    Family("timm map", partial(build_timm, "test_efficientnet", **HEADLESS), timm_inputs, (32, 32), **PLAIN),
    Family("timm tokens", partial(build_timm, "test_vit", **HEADLESS), timm_inputs, (160, 160), **PLAIN),
    Family("timm maps", partial(build_timm, "test_resnet", features_only=True), timm_inputs, (64, 64), **PLAIN),
    Family("FastVLM", partial(build_vlm, "FastVlm", **FASTVLM), with_tokens(4), (64, 64), **TOWER, since="5.0.0"),
    Family("Gemma 3n", partial(build_vlm, "Gemma3n", **GEMMA3N), with_tokens(4), (64, 64), **TOWER),
    Family("PerceptionLM", partial(build_vlm, "PerceptionLM", **PERCEPTION), perception_inputs, (160, 160), **TOWER),
)
