"""Another encoder into CLIP and LLaVA, and the processor that goes with it."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from open_clip_tower import (
    OpenClipTower,
    agree,
    as_saved,
    close,
    language_sees,
    llava_next,
    pixels,
    same_bits,
    tower,
    transformers,
    with_projection,
)
from support import IMAGE_TOKEN, llava_inputs, make_llava, vision_config
from torch import Tensor, nn

import fs_plugins
from fs_plugins.demo import assets
from fs_plugins.hf.conversion import to_transformers
from fs_plugins.hf.towers import EncoderSwap, swap_encoder


def test_clip_gets_the_encoder_and_the_projection_and_keeps_its_text(clip):
    ours, before = tower(), deepcopy(clip.state_dict())
    parameters = dict(clip.named_parameters())
    done = swap_encoder(clip, ours.state_dict())
    assert done == EncoderSwap("the state dict given", "vision_model", 16, 16, 16, 16, True)
    assert "as before" in str(done)
    with torch.no_grad():
        embedded = clip.visual_projection(clip.vision_model(pixels()).pooler_output)
        assert close(ours(pixels()), embedded)
    after = clip.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith(("vision_model.", "visual_projection."))}
    assert before.keys() == after.keys()
    assert all(parameter is parameters[name] for name, parameter in clip.named_parameters())


def test_another_resolution_survives_saving(clip, tmp_path):
    ours = tower(size=24)
    done = swap_encoder(clip, ours.state_dict())
    assert (done.size_before, done.size, done.tokens_before, done.tokens) == (16, 24, 16, 36)
    clip.save_pretrained(tmp_path)
    for model in (clip, transformers.CLIPModel.from_pretrained(tmp_path)):
        with torch.no_grad():
            assert close(ours(pixels(24)), model.visual_projection(model.vision_model(pixels(24)).pooler_output))
        assert model.config.vision_config.image_size == 24
        with pytest.raises(ValueError, match=r"16\*16.*24\*24"):
            model.vision_model(pixels(16))


@pytest.mark.parametrize("size", [16, 24])
def test_encoders_alone_are_swapped_too(size):
    ours = tower(size=size)
    alone = transformers.CLIPVisionModel(vision_config()).eval()
    done = swap_encoder(alone, ours.state_dict())
    assert not done.projection
    with torch.no_grad():
        assert close(ours(pixels(size)), alone(pixels(size)).pooler_output @ ours.proj)
    assert alone.config.image_size == size
    projecting = with_projection()
    assert swap_encoder(projecting, ours.state_dict()).projection
    assert agree(ours, projecting, size)


def test_a_source_without_projection_leaves_the_models_and_says_so():
    projecting = with_projection()
    own = projecting.visual_projection.weight.clone()
    state = tower().state_dict()
    del state["proj"]
    done = swap_encoder(projecting, state)
    assert not done.projection
    assert "visual_projection" in done.remaining[0]
    assert torch.equal(projecting.visual_projection.weight, own)


@pytest.mark.parametrize("size", [16, 24])
def test_the_models_dtype_and_training_flags_stay(size):
    projecting = with_projection().to(torch.bfloat16)
    projecting.requires_grad_(False)
    projecting.vision_model.post_layernorm.weight.requires_grad_(True)
    swap_encoder(projecting, tower(size=size).state_dict())
    assert {p.dtype for p in projecting.parameters()} == {torch.bfloat16}
    trained = [name for name, p in projecting.named_parameters() if p.requires_grad]
    assert trained == ["vision_model.post_layernorm.weight"]
    expected = to_transformers(tower(size=size).to(torch.bfloat16).state_dict())
    assert same_bits(as_saved(expected), projecting.state_dict())


@torch.no_grad()
@torch.no_grad()
def language_should_see(ours: OpenClipTower, size: int) -> Tensor:
    return ours.hidden_states(pixels(size))[-2][:, 1:]


def answer(model: nn.Module, size: int, tokens: int) -> Tensor:
    given = llava_inputs(torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(size)), tokens)
    return model.generate(
        **given, max_new_tokens=3, min_new_tokens=3, do_sample=False, suppress_tokens=[IMAGE_TOKEN],
        output_logits=True, return_dict_in_generate=True,
    ).logits[0]  # fmt: skip


@pytest.mark.parametrize(("size", "tokens"), [(8, 4), (16, 16), (24, 36)])
def test_llava_sees_with_the_new_encoder(llava, tmp_path, size, tokens):
    ours, before = tower(size=size), deepcopy(llava.state_dict())
    old_answer = answer(llava, 16, 16)
    done = swap_encoder(llava, ours.state_dict())
    assert (done.size_before, done.size, done.tokens_before, done.tokens) == (16, size, 16, tokens)
    assert done.encoder.startswith("model.vision_tower")
    assert not done.projection
    assert close(language_sees(llava, size), language_should_see(ours, size))
    new_answer = answer(llava, size, tokens)
    assert not torch.allclose(new_answer, old_answer, atol=1e-2)
    after = llava.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before if "vision_tower" not in name)

    llava.save_pretrained(tmp_path)
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(language_sees(again, size), language_sees(llava, size))
    assert torch.equal(answer(again, size, tokens), new_answer)


def test_llava_at_another_resolution_says_so_everywhere(llava):
    swap_encoder(llava, tower(size=8).state_dict())
    configs = {id(m.config): m.config for m in llava.modules() if hasattr(m, "config")}.values()
    sizes = [c.image_size for c in [*configs, llava.config.vision_config] if c.model_type == "clip_vision_model"]
    assert len(sizes) > 1
    assert set(sizes) == {8}
    assert llava.config.image_seq_length == 4
    embeddings = next(m for m in llava.modules() if type(m).__name__ == "CLIPVisionEmbeddings")
    assert (embeddings.image_size, embeddings.num_patches, embeddings.num_positions) == (8, 4, 5)
    assert embeddings.position_ids.tolist() == [[0, 1, 2, 3, 4]]
    assert embeddings.position_embedding.num_embeddings == 5
    assert not [name for name in llava.state_dict() if "position_ids" in name]
    assert fs_plugins.vision_call(llava).image_size == (8, 8)
    assert fs_plugins.vision_call(llava).readouts[0].tokens == 4
    with pytest.raises(ValueError, match=r"16\*16.*8\*8"):
        answer(llava, 16, 16)
    with pytest.raises(ValueError, match="image tokens do not match"):
        answer(llava, 8, 16)


def test_the_class_token_counts_where_llava_keeps_it():
    llava = make_llava(vision_feature_select_strategy="full", image_seq_length=17)
    assert swap_encoder(llava, tower(size=8).state_dict()).tokens == 4
    assert llava.config.image_seq_length == 5
    assert answer(llava, 8, 5).isfinite().all()


def test_vip_llava_and_llava_next():
    text = make_llava().config.text_config
    vip = transformers.VipLlavaForConditionalGeneration(
        transformers.VipLlavaConfig(vision_config=vision_config(), text_config=text, image_token_index=IMAGE_TOKEN)
    ).eval()
    assert swap_encoder(vip, tower(size=8).state_dict()).tokens == 4
    assert vip.config.image_seq_length == 4
    following = llava_next()
    swap_encoder(following, tower().state_dict())
    assert close(language_sees(following, 16), language_should_see(tower(), 16))


def test_wrappers_are_looked_through(llava):
    wrapped = torch.compile(llava, backend="eager")
    swap_encoder(wrapped, tower(size=8).state_dict())
    assert close(language_sees(llava, 8), language_should_see(tower(size=8), 8))
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(make_llava(), peft.LoraConfig(target_modules=r".*language_model.*q_proj"))
    assert swap_encoder(tuned, tower(size=8).state_dict()).tokens == 4
    assert tuned.config.image_seq_length == 4


@pytest.mark.slow
def test_compiled_code_that_has_run_takes_the_new_encoder():
    projecting, ours = with_projection(), tower(size=24)
    compiled = torch.compile(projecting, backend="eager")
    with torch.no_grad():
        compiled(pixels(16))
        swap_encoder(compiled, ours.state_dict())
        assert close(ours(pixels(24)), compiled(pixels(24)).image_embeds)


def test_the_swapped_model_can_be_smoothed(llava):
    ours = tower(size=8)
    swap_encoder(llava, ours.state_dict())
    plain = answer(llava, 8, 4)
    with fs_plugins.enable(llava, psm=None, sigma=0.5, seed=0) as handle:
        assert not torch.allclose(answer(llava, 8, 4), plain, atol=1e-3)
        assert handle.status().vision[0].images == 3
    assert torch.equal(answer(llava, 8, 4), plain)


def demo_llava():
    model = transformers.AutoModelForImageTextToText.from_pretrained(assets.LLAVA).eval()
    return model, transformers.AutoProcessor.from_pretrained(assets.LLAVA)


def demo_tower(size: int) -> OpenClipTower:
    return tower(size=size, patch=8, width=128, layers=4, heads=4, mlp=512, out=64)


def test_the_real_processor_follows_and_the_whole_model_answers():
    model, processor = demo_llava()
    patch_size, extra = processor.patch_size, processor.num_additional_image_tokens
    ours = demo_tower(32)
    done = swap_encoder(model, ours.state_dict(), processor=processor)
    assert (done.size_before, done.size, done.tokens_before, done.tokens) == (64, 32, 64, 16)
    assert (processor.patch_size, processor.num_additional_image_tokens) == (patch_size, extra)
    picture = torch.randint(0, 256, (3, 90, 120), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    given = processor(text="<image> Which shape?", images=picture, return_tensors="pt")
    assert given["pixel_values"].shape == (1, 3, 32, 32)
    assert (given["input_ids"] == model.config.image_token_id).sum() == 16
    assert model.generate(**given, max_new_tokens=2, min_new_tokens=2, do_sample=False).shape[1] >= 2
    with fs_plugins.enable(model, psm=None, sigma=0.25, processor=processor) as handle:
        model.generate(**given, max_new_tokens=2, min_new_tokens=2, do_sample=False)
        assert handle.smoothers[0].call.image_size == (32, 32)
        assert handle.status().vision[0].images >= 1
    assert swap_encoder(model, assets.LLAVA, processor=processor).size == 64
    assert processor(text="<image>", images=picture, return_tensors="pt")["pixel_values"].shape == (1, 3, 64, 64)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}},
         {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}),
        ({"size": {"height": 16, "width": 16}}, {"size": {"height": 8, "width": 8}}),
        ({"size": 16, "crop_size": 16}, {"size": 8, "crop_size": 8}),
        ({"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}},
         {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}),
    ],
)  # fmt: skip
def test_sizes_are_written_in_the_processors_own_way(llava, given, expected):
    images = SimpleNamespace(**given, image_mean=[0.5] * 3)
    done = swap_encoder(llava, tower(size=8).state_dict(), processor=SimpleNamespace(image_processor=images))
    assert vars(images) == {**expected, "image_mean": [0.5] * 3}
    assert not any("Set size" in sentence for sentence in done.remaining)


def test_without_a_processor_the_user_is_told(llava):
    done = swap_encoder(llava, tower(size=8).state_dict())
    assert "image processor to 8" in str(done)
    assert "16 -> 8 pixels, 16 -> 4 tokens" in str(done)
    assert not swap_encoder(llava, tower(size=8).state_dict()).remaining
