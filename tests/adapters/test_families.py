"""What the Hugging Face adapters answer for small models of the real classes, and where they take mean and std from."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fs_plugins.adapters.hf_layouts import Packed, PatchBatch, PatchRows, Tiles
from support import knowing, make_llava, make_psm, randomise

import fs_plugins
from fs_plugins import ModelError, PixelError, PixelSpace, PSMError, SettingError
from fs_plugins.layouts import Layout
from fs_plugins.vision import FlattenedTokens, LinearEmbedding

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
          "image_size": 16, "patch_size": 4}  # fmt: skip
SIGLIP = {"model_type": "siglip_vision_model", **VISION}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 40,
        "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
LLAMA = {"model_type": "llama", **TEXT, "num_key_value_heads": 4}
QWEN = {"depth": 2, "num_heads": 4, "hidden_size": 24, "embed_dim": 32, "mlp_ratio": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2}  # fmt: skip
MLLAMA = {**VISION, "attention_heads": 4, "num_global_layers": 1, "intermediate_layers_indices": [0, 2],
          "vision_output_dim": 3 * 32}  # fmt: skip
ROTARY = {**LLAMA, "hidden_size": 24, "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 1]}}


def make(name: str, **config):
    import transformers

    kind = getattr(transformers, name)
    # Configuration classes write into the dicts they are given.
    return randomise(kind(kind.config_class(**deepcopy(config))))


def llava(vision: dict, **changes):
    settings = {
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "full",
        "image_token_index": 30,
        **changes,
    }
    return make("LlavaForConditionalGeneration", text_config=LLAMA, vision_config=vision, **settings)


def qwen():
    without_type = {key: value for key, value in ROTARY.items() if key != "model_type"}
    tokens = {"image_token_id": 30, "video_token_id": 31, "vision_start_token_id": 32, "vision_end_token_id": 33}
    return make("Qwen2VLForConditionalGeneration", text_config=without_type, vision_config=QWEN, **tokens)


def video_llava():
    clip = {**VISION, "model_type": "clip_vision_model"}
    settings = {"vision_feature_layer": -2, "image_token_index": 30, "video_token_index": 31}
    return knowing(make("VideoLlavaForConditionalGeneration", text_config=LLAMA, vision_config=clip, **settings))


FAMILIES = {
    "SigLIP": (
        lambda: make("SiglipModel", text_config=TEXT, vision_config=SIGLIP),
        {"readouts": ["pooler_output"], "width": 32, "size": (16, 16), "layout": Layout,
         "family": "siglip_vision_model", "norm": HALF, "inputs": ()},
    ),
    "SigLIP vision model": (
        lambda: make("SiglipVisionModel", **VISION),
        {"readouts": ["pooler_output"], "width": 32, "size": (16, 16), "layout": Layout,
         "family": "siglip_vision_model", "norm": HALF, "inputs": ()},
    ),
    "SigLIP vision model without a head": (
        lambda: make("SiglipVisionModel", **VISION, vision_use_head=False),
        {"readouts": ["last_hidden_state"], "width": 32, "size": (16, 16), "layout": Layout,
         "family": "siglip_vision_model", "norm": HALF, "inputs": ()},
    ),
    "SigLIP2": (
        lambda: make("Siglip2Model", text_config=TEXT, vision_config={**VISION, "num_patches": 16}),
        {"readouts": ["pooler_output"], "width": 32, "size": None, "layout": PatchBatch,
         "family": "siglip2_vision_model", "norm": HALF, "inputs": ()},
    ),
    "LLaVA with SigLIP": (
        lambda: llava({**SIGLIP, "vision_use_head": False}),
        {"readouts": ["hidden_states[-2]"], "width": 32, "size": (16, 16), "layout": Layout,
         "family": "siglip_vision_model", "norm": HALF, "inputs": ("pixel_values",)},
    ),
    "LLaVA with CLIP, two layers": (
        lambda: llava({**VISION, "model_type": "clip_vision_model"}, vision_feature_layer=[-2, 1],
                      vision_feature_select_strategy="default"),
        {"readouts": ["hidden_states[-2][1:]", "hidden_states[1][1:]"], "width": 32, "size": (16, 16), "layout": Layout,
         "family": "clip_vision", "norm": CLIP, "inputs": ("pixel_values",)},
    ),
    "LLaVA with Pixtral": (
        lambda: llava({**VISION, "model_type": "pixtral"}),
        {"readouts": ["hidden_states[-2]"], "width": 32, "size": None, "layout": Packed, "family": "pixtral",
         "norm": CLIP, "inputs": ("pixel_values",)},
    ),
    "Qwen2-VL": (
        qwen,
        {"readouts": ["pooler_output"], "width": 24, "size": None, "layout": PatchRows, "norm": CLIP,
         "inputs": ("pixel_values", "pixel_values_videos")},
    ),
    "Mllama": (
        lambda: make("MllamaForConditionalGeneration", vision_config=MLLAMA, image_token_index=30,
                     text_config={**LLAMA, "num_hidden_layers": 2, "cross_attention_layers": [1],
                                  "rope_scaling": {"rope_type": "default"}}),
        {"readouts": ["last_hidden_state"], "width": 96, "size": (16, 16), "layout": Tiles,
         "family": "mllama_vision_model", "norm": CLIP, "inputs": ("pixel_values",)},
    ),
    "Idefics3": (
        lambda: make("Idefics3ForConditionalGeneration", text_config=LLAMA, vision_config=VISION, scale_factor=2,
                     image_token_id=30, tie_word_embeddings=False),
        {"readouts": ["last_hidden_state"], "width": 32, "size": (16, 16), "layout": Layout,
         "norm": HALF, "inputs": ("pixel_values",)},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("build", "wanted"), FAMILIES.values(), ids=FAMILIES)
def test_a_family_is_described_as_it_really_is(build, wanted):
    model = build()
    call = fs_plugins.vision_call(model)
    assert [readout.name for readout in call.readouts] == wanted["readouts"]
    assert {readout.width for readout in call.readouts} == {wanted["width"]}
    assert call.image_size == wanted["size"]
    assert type(call.pixels.layout) is wanted["layout"]
    assert (call.pixels.mean, call.pixels.std) == wanted["norm"]
    vision = getattr(model.config, "vision_config", model.config)
    assert call.pixels.source == f"the default of {vision.model_type} (no processor found beside the checkpoint)"
    assert call.pixels.assumed
    assert call.architecture["family"] == wanted.get("family", vision.model_type)
    assert call.inputs == wanted["inputs"]
    with torch.no_grad():
        features = call.encode(torch.rand(2, 3, 16, 16))
    for readout in call.readouts:
        value = features[readout.name]
        assert (len(value), value.shape[-1]) == (2, readout.width)
        if readout.tokens is not None:
            assert (value.shape[1] if value.ndim == 3 else 0) == readout.tokens


@pytest.mark.parametrize(("build", "wanted"), FAMILIES.values(), ids=FAMILIES)
def test_a_familys_encoder_is_smoothed_in_the_shape_it_answers(build, wanted):
    model = knowing(build())
    call = fs_plugins.vision_call(model)
    argument, others = call.pixels.layout.still(call.pixels.from_unit(torch.rand(2, 3, 16, 16), torch.float32))
    given = {call.pixels.argument: argument, **others, **call.kwargs}
    with torch.no_grad():
        plain = call.module(**given)
        with fs_plugins.enable(model, psm=None, sigma=0.25, n0=3) as handle:
            served = call.module(**given)
            assert [(v.calls, v.images, v.draws) for v in handle.status().vision] == [(1, 2, 6)]
    for readout in call.readouts:
        before, after = readout.get(plain), readout.get(served)
        assert after.shape == before.shape
        assert not torch.allclose(after, before, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "SigLIP2"])  # by name only on transformers 4
def test_a_familys_plain_tuples_hold_the_same_readouts(name):
    call = fs_plugins.vision_call(FAMILIES[name][0]())
    argument, others = call.pixels.layout.still(call.pixels.from_unit(torch.rand(2, 3, 16, 16), torch.float32))
    given = {call.pixels.argument: argument, **others, **call.kwargs}
    with torch.no_grad():
        named = call.module(**given)
        plain = call.module(**given, return_dict=False)
    for readout in call.readouts:
        assert torch.equal(readout.get(plain), readout.get(named))


def test_projections_are_the_certified_embedding_only_where_there_is_one(clip):
    assert isinstance(fs_plugins.vision_call(clip).embed, LinearEmbedding)
    assert isinstance(fs_plugins.vision_call(FAMILIES["SigLIP"][0]()).embed, FlattenedTokens)


# Where mean, std and size come from.


@pytest.fixture
def siglip():
    return FAMILIES["SigLIP"][0]()


def saved_beside(model, folder, **processor):
    """The model, saved with a preprocessor_config.json beside it and loaded again."""
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), "utf-8")
    return type(model).from_pretrained(folder).eval()


SAVED = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}


def test_the_processor_given_goes_before_the_checkpoints_own_and_that_before_the_familys(siglip, tmp_path):
    def enabled(model, **settings):
        with fs_plugins.enable(model, psm=None, sigma=0.25, **settings) as handle:
            (told,), (smoother,) = handle.status().vision, handle.smoothers
            assert told.pixels == smoother.call.pixels.source
            return smoother.call.pixels, smoother.call.image_size

    with pytest.warns(fs_plugins.FSPluginsWarning, match="assumed"):
        default, size = enabled(siglip)
    assert (default.mean, default.std) == HALF
    assert "default of siglip_vision_model" in default.source
    assert size == (16, 16)

    loaded = saved_beside(siglip, tmp_path, **SAVED, size={"height": 24, "width": 32})
    own, size = enabled(loaded)
    assert (own.mean, own.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert own.source == f"the image processor of {tmp_path}"
    assert size == (24, 32)

    processor = Processor(image_mean=[0.7] * 3, image_std=[0.8] * 3, size={"height": 20, "width": 20})
    given, size = enabled(loaded, processor=processor)
    assert (given.mean, given.std, given.source) == ((0.7,) * 3, (0.8,) * 3, "the processor given")
    assert size == (20, 20)

    by_hand, size = enabled(loaded, processor=PixelSpace((0.9,) * 3, (1.0,) * 3))
    assert (by_hand.mean, by_hand.source) == ((0.9,) * 3, "given by hand")
    assert size == (24, 32), "a space without a size leaves the one known"


class Processor:
    """A stand-in for an image processor."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)


def test_the_real_image_processors_are_read_as_the_ones_on_disk(siglip, tmp_path):
    import transformers

    crop = {**SAVED, "do_center_crop": True, "crop_size": {"height": 12, "width": 12}, "size": {"shortest_edge": 20}}
    whole = {**SAVED, "size": {"height": 8, "width": 12}}
    kinds = {"CLIPImageProcessor": (crop, (12, 12)), "SiglipImageProcessor": (whole, (8, 12))}
    for kind, (saved, size) in kinds.items():
        loaded = saved_beside(siglip, tmp_path, **saved, image_processor_type=kind)
        found = fs_plugins.vision_call(loaded).pixels
        # Transformers 5 has two of each; this one does without torchvision.
        real = getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind)
        live = PixelSpace.from_processor(real.from_pretrained(tmp_path))
        assert (live.mean, live.std, live.size) == (found.mean, found.std, found.size)
        assert found.size == size


@pytest.mark.parametrize(
    ("words", "size"),
    [
        ({"do_center_crop": True, "crop_size": {"height": 12, "width": 8}, "size": {"shortest_edge": 20}}, (12, 8)),
        ({"do_center_crop": True, "crop_size": 12, "size": 20}, (12, 12)),
        ({"do_center_crop": False, "crop_size": {"height": 12, "width": 8}, "size": {"height": 9, "width": 7}}, (9, 7)),
        ({"size": {"height": 9, "width": 7}}, (9, 7)),
        ({"size": {"shortest_edge": 20}}, None),
        ({"do_center_crop": False, "size": {"shortest_edge": 20, "longest_edge": 40}}, None),
        ({"size": 20}, None),
        ({}, None),
    ],
)
def test_a_processors_size_is_what_it_makes_of_every_picture(siglip, words, size):
    processor = Processor(image_mean=[0.5] * 3, image_std=[0.5] * 3, **words)
    assert PixelSpace.from_processor(processor).size == size
    with fs_plugins.enable(siglip, psm=None, sigma=0.25, processor=processor) as handle:
        assert handle.smoothers[0].call.image_size == (size or (16, 16))


def test_a_processor_that_keeps_timms_record_is_read_by_it():
    record = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "input_size": (3, 24, 32), "crop_pct": 0.9}
    space = PixelSpace.from_processor(Processor(data_config=record))
    assert (space.mean, space.std, space.size) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (24, 32))
    with pytest.raises(SettingError, match="no image_mean"):
        PixelSpace.from_processor(Processor(data_config={"std": (0.4, 0.5, 0.6)}))


def test_encoders_of_any_size_stay_so_whatever_the_processor_says():
    model = qwen()
    processor = Processor(image_mean=[0.5] * 3, image_std=[0.5] * 3, size={"height": 16, "width": 16})
    with fs_plugins.enable(model, psm=None, sigma=0.25, processor=processor) as handle:
        assert handle.smoothers[0].call.image_size is None
        assert isinstance(handle.smoothers[0].call.pixels.layout, PatchRows)


def test_a_checkpoint_that_does_not_normalise_is_taken_at_its_word(siglip, tmp_path):
    found = fs_plugins.vision_call(saved_beside(siglip, tmp_path, **SAVED, do_normalize=False)).pixels
    assert (found.mean, found.std) == ((0.0,) * 3, (1.0,) * 3)


def test_an_unknown_tower_asks_for_a_processor_and_is_content_with_one(images):
    model = llava({**VISION, "model_type": "deit"})
    hooked = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(SettingError, match=r"\(deit\).*processor="):
        fs_plugins.enable(model, psm=None, sigma=0.25)
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooked
    space = PixelSpace(*HALF)
    with fs_plugins.enable(model, psm=None, sigma=0.25, processor=space) as handle, torch.no_grad():
        model.model.vision_tower(space.from_unit(images, torch.float32))
        assert handle.status().vision[0].calls == 1


def test_an_unknown_tower_is_content_with_its_checkpoints_processor(tmp_path):
    loaded = saved_beside(llava({**VISION, "model_type": "deit"}), tmp_path, **SAVED)
    with fs_plugins.enable(loaded, psm=None, sigma=0.25) as handle:
        assert handle.smoothers[0].call.pixels.mean == (0.1, 0.2, 0.3)


# A PSM for each encoder.


def test_a_model_that_was_built_without_its_encoder_is_nobodys():
    """Gemma 4 is, where its configuration has nothing about vision."""
    model = llava({**SIGLIP, "vision_use_head": False})
    model.model.vision_tower = None
    with pytest.raises(ModelError, match="LlavaForConditionalGeneration"):
        fs_plugins.enable(model, psm=None, sigma=0.25)


def test_encoders_that_are_alike_are_warned_about_once():
    model = video_llava()
    with pytest.warns(fs_plugins.FSPluginsWarning) as told:
        handle = fs_plugins.enable(model)
    assert len(told) == 1
    assert [vision.psm for vision in handle.status().vision] == ["photo-light", "photo-light"]
    assert len({id(smoother.psm) for smoother in handle.smoothers}) == 1, "it is loaded once"


def test_a_model_with_several_encoders_is_asked_about_one():
    model = video_llava()
    with pytest.raises(ModelError, match=r"has 2 vision encoders \(0: CLIPVision.*, 1: CLIPVision.*\)\. Say which"):
        fs_plugins.vision_call(model)
    towers = [fs_plugins.vision_call(model, encoder=i).module for i in range(2)]
    assert towers == [model.model.image_tower, model.model.video_tower]
    with pytest.raises(SettingError, match="there is no 2"):
        fs_plugins.vision_call(model, encoder=2)
    assert len(fs_plugins.smoothers(model, psm=None, sigma=0.25)) == 2


def test_video_llava_takes_a_psm_for_each_of_its_encoders(images):
    model = video_llava()
    _, (image, video) = fs_plugins.plugins.claim(model)
    assert (image.module, video.module) == (model.model.image_tower, model.model.video_tower)
    assert [r.name for call in (image, video) for r in call.readouts] == ["hidden_states[-2][1:]", "hidden_states[-2]"]
    assert [r.tokens for call in (image, video) for r in call.readouts] == [16, 17]
    assert (image.inputs, video.inputs) == (("pixel_values_images",), ("pixel_values_videos",))
    psms = [make_psm(image, name="for images"), make_psm(video, name="for videos", purifier=False)]
    pixels = PixelSpace(*CLIP).from_unit(images, torch.float32)
    with fs_plugins.enable(model, psm=psms) as handle, torch.no_grad():

        def seen():
            return {v.psm: (v.purifier, v.images) for v in handle.status().vision}

        assert {s.psm.config.name: s.call.module for s in handle.smoothers} == {
            "for images": model.model.image_tower,
            "for videos": model.model.video_tower,
        }
        model.model.image_tower(pixels)
        assert seen() == {"for images": ("unet", 3), "for videos": (None, 0)}
        model.model.video_tower(pixels[:2])
        assert seen() == {"for images": ("unet", 3), "for videos": (None, 2)}
    with fs_plugins.enable(model, psm=(psms[0], None), sigma=0.25) as handle:
        assert {v.psm for v in handle.status().vision} == {"for images", None}


def test_status_tells_of_encoders_in_the_order_in_which_psms_are_given():
    model = video_llava()
    psms = [make_psm(call, name=name) for call, name in zip(fs_plugins.plugins.claim(model)[1], "ab", strict=True)]
    with fs_plugins.enable(model, psm=psms) as handle:
        assert [v.psm for v in handle.status().vision] == ["a", "b"]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_list_of_psms_has_one_for_each_encoder(count):
    model = video_llava()
    with pytest.raises(SettingError, match=f"2 vision encoders; psm is a list of {count}"):
        fs_plugins.enable(model, psm=[None] * count, sigma=0.25)
    assert not fs_plugins.status(model).enabled


@pytest.mark.filterwarnings("ignore::fs_plugins.FSPluginsWarning")
def test_psms_in_the_wrong_order_are_refused_before_anything_is_attached():
    model = video_llava()
    psms = [make_psm(call) for call in fs_plugins.plugins.claim(model)[1]]
    with pytest.raises(PSMError, match="maps readout 'hidden_states"):
        fs_plugins.enable(model, psm=psms[::-1])
    assert not fs_plugins.status(model).enabled


def test_a_psm_for_another_readout_is_refused_with_both_names():
    psm = make_psm(fs_plugins.vision_call(make_llava()))
    other = make_llava(vision_feature_layer=-1)
    with pytest.raises(PSMError, match=r"maps readout 'hidden_states\[-2\]\[1:\]'.*consumes hidden_states\[-1\]\[1:\]"):
        fs_plugins.enable(other, psm=psm)
    with fs_plugins.enable(other, psm=psm.only(mapper=False)) as handle:
        assert handle.status().vision[0].purifier == "unet", "a purifier fits every readout"


# Videos.


def of_frames(frames: torch.Tensor) -> dict[str, torch.Tensor]:
    """(frames, 3, H, W) in [0, 1] -> a Qwen video, written by its processor's rule for patch 4, merge 2, 2 frames."""
    pixels = PixelSpace(*CLIP).from_unit(frames, torch.float32)
    t, h, w = len(frames) // 2, frames.shape[2] // 4, frames.shape[3] // 4
    rows = pixels.view(t, 2, 3, h // 2, 2, 4, w // 2, 2, 4).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return {"hidden_states": rows.reshape(t * h * w, -1), "grid_thw": torch.tensor([[t, h, w]])}


def qwen_psm(call, **changes):
    """For single images of 16 x 16, which are 4 tokens."""
    readouts = tuple(replace(readout, tokens=4) for readout in call.readouts)
    return make_psm(replace(call, image_size=(16, 16), readouts=readouts), **changes)


@pytest.mark.parametrize("count", [2, 4])
def test_a_mapper_for_images_is_refused_on_a_video_and_the_purifier_is_not(count):
    model = knowing(qwen())
    psm = qwen_psm(fs_plugins.vision_call(model))
    frames = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    visual, video, image = model.model.visual, of_frames(frames), of_frames(frames[:1].repeat(2, 1, 1, 1))
    readout = fs_plugins.vision_call(model).readouts[0]
    with torch.no_grad():
        with fs_plugins.enable(model, psm=psm) as handle:
            with pytest.raises(PixelError, match=f"video of {count} distinct frames.*only\\(mapper=False\\)"):
                visual(**video)
            assert handle.status().vision[0].calls == 0
            visual(**image)
            assert handle.status().vision[0].calls == 1, "a still image is no video"
        plain = readout.get(visual(**video))
        with fs_plugins.enable(model, psm=None, sigma=psm.config.sigma, seed=1):
            noisy = readout.get(visual(**video))
        with fs_plugins.enable(model, psm=psm.only(mapper=False), seed=1) as handle:
            purified = readout.get(visual(**video))
            assert handle.status().vision[0].images == 1
    assert purified.shape == noisy.shape == plain.shape == (count // 2 * 4, 24)
    assert purified.isfinite().all()
    assert not torch.allclose(purified, noisy, atol=1e-4)


def test_a_mapper_is_refused_at_another_size_and_the_purifier_is_not():
    model = knowing(qwen())
    psm = qwen_psm(fs_plugins.vision_call(model))
    larger = of_frames(torch.rand(1, 3, 24, 16).repeat(2, 1, 1, 1))
    with torch.no_grad():
        with fs_plugins.enable(model, psm=psm), pytest.raises(PixelError, match="24x16 pixels; its PSM was made for"):
            model.model.visual(**larger)
        with fs_plugins.enable(model, psm=psm.only(mapper=False)) as handle:
            model.model.visual(**larger)
            assert handle.status().vision[0].calls == 1


def deepseek_hybrid():
    sam = {"model_type": "sam_vision_model", **VISION, "output_channels": 8, "mlp_dim": 48, "window_size": 2,
           "global_attn_indexes": [1]}  # fmt: skip
    towers = {"vision_config": {**SIGLIP, "vision_use_head": False}, "high_res_vision_config": sam}
    return make("DeepseekVLHybridForConditionalGeneration", text_config=LLAMA, image_token_id=30, **towers)


TWO_COLOURS = {
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
    "size": {"height": 8, "width": 8},
    "high_res_image_mean": [0.3, 0.2, 0.1],
    "high_res_image_std": [0.6, 0.5, 0.4],
    "high_res_size": {"height": 16, "width": 16},
}


@pytest.mark.parametrize("given", [True, False], ids=["given", "saved beside the checkpoint"])
def test_a_processor_tells_two_encoders_apart(given, tmp_path):
    model = deepseek_hybrid() if given else saved_beside(deepseek_hybrid(), tmp_path, **TWO_COLOURS)
    settings = {"processor": SimpleNamespace(**TWO_COLOURS)} if given else {}
    with fs_plugins.enable(model, psm=None, sigma=0.25, **settings) as handle:
        low, high = (smoother.call.pixels for smoother in handle.smoothers)
    assert (low.mean, low.std, low.size) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (8, 8))
    assert (high.mean, high.std, high.size) == ((0.3, 0.2, 0.1), (0.6, 0.5, 0.4), (16, 16))


def test_a_processor_without_a_word_for_the_second_encoder_is_refused():
    with pytest.raises(SettingError, match="has no high_res_image_mean and high_res_image_std"):
        fs_plugins.enable(deepseek_hybrid(), psm=None, sigma=0.25, processor=SimpleNamespace(**SAVED))
