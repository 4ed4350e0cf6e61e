"""Other encoders into CLIP and LLaVA: the two layouts hold the same function, and a refused swap changes nothing."""

from __future__ import annotations

import dataclasses
import json
import pickle
import runpy
from collections import OrderedDict
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import IMAGE_TOKEN, llava_inputs, make_llava, pixels_of, randomise, vision_config
from torch import Tensor, nn

import fs_plugins
from fs_plugins import ModelError, RegistryError, SettingError
from fs_plugins.demo import assets
from fs_plugins.hf import towers
from fs_plugins.hf.towers import EncoderSwap, swap_encoder, to_open_clip, to_transformers
from fs_plugins.identity import fingerprint
from fs_plugins.registry import Registry

# Where open_clip is, there is torchvision, which needs this before it can be imported beside a CPU-only torch.
SCHEMAS = runpy.run_path(str(Path(__file__).parents[2] / "integration" / "torchvision_schemas.py"))
transformers = pytest.importorskip("transformers")


# open_clip's VisionTransformer, stated plainly: its parameters' names, and what it computes.


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        layers = [("c_fc", nn.Linear(width, mlp)), ("gelu", QuickGELU()), ("c_proj", nn.Linear(mlp, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class OpenClipTower(nn.Module):
    def __init__(self, *, size=16, patch=4, width=32, layers=3, heads=4, mlp=48, out=24) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((size // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(Block(width, heads, mlp) for _ in range(layers))
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.zeros(width, out))

    def hidden_states(self, pixels: Tensor) -> list[Tensor]:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], dim=1)
        states = [self.ln_pre(tokens + self.positional_embedding)]
        for block in self.transformer.resblocks:
            states.append(block(states[-1]))
        return states

    def forward(self, pixels: Tensor) -> Tensor:
        return self.ln_post(self.hidden_states(pixels)[-1][:, 0]) @ self.proj


def norms_around_one(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gains around zero would hide what comes before them."""
    randomise(model, seed=seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.add_(1)
    return model


def tower(seed: int = 1, **changes) -> OpenClipTower:
    return norms_around_one(OpenClipTower(**changes), seed)


def pixels(size: int = 16, count: int = 3) -> Tensor:
    return pixels_of(torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(size)))


def with_projection(**changes):
    return norms_around_one(transformers.CLIPVisionModelWithProjection(vision_config(**changes)))


def as_saved(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The converted names as they are in a CLIPVisionModelWithProjection."""
    return {name if name.startswith("visual_") else f"vision_model.{name}": value for name, value in weights.items()}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one.std() > 0.1) and torch.allclose(one, other, rtol=0, atol=1e-5))


@torch.no_grad()
def agree(ours: OpenClipTower, theirs: nn.Module, size: int) -> bool:
    given = pixels(size)
    output = theirs(given, output_hidden_states=True)
    states = zip(ours.hidden_states(given), output.hidden_states, strict=True)
    return all(close(*pair) for pair in states) and close(ours(given), output.image_embeds)


# The conversion.


def test_open_clips_weights_compute_the_same_in_transformers():
    ours, theirs = tower(), with_projection()
    assert not agree(ours, theirs, 16)
    theirs.load_state_dict(as_saved(to_transformers(ours.state_dict())))
    assert agree(ours, theirs, 16)


def test_transformers_weights_compute_the_same_in_open_clip():
    ours, theirs = tower(), with_projection()
    ours.load_state_dict(to_open_clip(theirs.state_dict()))
    assert agree(ours, theirs, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_either_conversion_undoes_the_other_bit_for_bit(dtype):
    state = tower().to(dtype).state_dict()
    assert same_bits(to_open_clip(to_transformers(state)), state)
    core = to_transformers(state)
    assert same_bits(to_transformers(to_open_clip(core)), core)
    assert "visual_projection.weight" in core
    del state["proj"], core["visual_projection.weight"]
    assert same_bits(to_transformers(state), core)
    assert same_bits(to_open_clip(core), state)


def test_the_encoder_is_found_inside_a_whole_model(clip):
    ours, theirs = tower(), clip.state_dict()
    whole = {f"visual.{name}": value for name, value in ours.state_dict().items()} | {"logit_scale": torch.ones(())}
    whole["transformer.resblocks.0.ln_1.weight"] = torch.ones(8)  # the text's
    assert same_bits(to_transformers(whole), to_transformers(ours.state_dict()))
    expected = to_open_clip({name: value for name, value in theirs.items() if name.startswith("vis")})
    assert same_bits(to_open_clip(theirs), expected)
    assert "proj" in expected
    ids = {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
    assert same_bits(to_open_clip(theirs | ids), expected)


def test_converted_weights_can_be_saved(tmp_path):
    converted = to_transformers(tower().state_dict())
    save_file(converted, tmp_path / "x.safetensors")
    assert same_bits(load_file(tmp_path / "x.safetensors"), converted)


def test_what_does_not_convert_is_named():
    state = tower().state_dict()
    for extra in ("transformer.resblocks.0.ls_1.gamma", "attn_pool.query", "transformer.resblocks.1.ln_1_weight"):
        with pytest.raises(ModelError, match=extra):
            to_transformers(state | {extra: torch.ones(4)})
    core = to_transformers(state)
    with pytest.raises(ModelError, match=r"head\.weight"):
        to_open_clip(core | {"head.weight": torch.ones(4)})
    del core["encoder.layers.1.self_attn.v_proj.bias"]
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.q_proj\.bias"):
        to_open_clip(core)
    with pytest.raises(ModelError, match=r"no CLIP vision encoder of open_clip.*stem\.weight"):
        to_transformers({"stem.weight": torch.ones(4)})
    with pytest.raises(ModelError, match=r"several vision encoders.*a\., b\."):
        to_transformers({f"{side}.{name}": value for side in "ab" for name, value in state.items()})


# Into CLIP.


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


# Into LLaVA.


def llava_encoder(model: nn.Module) -> nn.Module:
    return model.model.vision_tower


@torch.no_grad()
def language_sees(model: nn.Module, size: int) -> Tensor:
    """The patch tokens before the projector."""
    return llava_encoder(model)(pixels(size), output_hidden_states=True).hidden_states[-2][:, 1:]


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


def llava_next():
    config = transformers.LlavaNextConfig(
        vision_config=vision_config(),
        text_config=make_llava().config.text_config,
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=[[16, 32], [32, 16]],
    )
    return transformers.LlavaNextForConditionalGeneration(config).eval()


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


# Processors.


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


# Where weights come from.


@pytest.mark.parametrize("layout", ["open_clip", "transformers"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "visual.", "module."])
def test_files_of_either_layout_are_read(tmp_path, layout, suffix, prefix):
    ours = tower(size=8)
    state = ours.state_dict() if layout == "open_clip" else as_saved(to_transformers(ours.state_dict()))
    state = {f"{prefix}{name}": value for name, value in state.items()}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(state if not prefix else {"epoch": 3, "state_dict": state}, path)
    else:
        save_file(state, path)
    projecting = with_projection()
    done = swap_encoder(projecting, path)
    assert (done.source, done.projection) == (str(path), True)
    assert agree(ours, projecting, 8)


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_folders_are_read(tmp_path, name):
    ours = tower(size=8)
    save = save_file if name.endswith("safetensors") else torch.save
    save({f"visual.{key}": value for key, value in ours.state_dict().items()}, tmp_path / name)
    projecting = with_projection()
    swap_encoder(projecting, tmp_path)
    assert agree(ours, projecting, 8)


def test_a_saved_model_is_a_source(llava, tmp_path):
    source = with_projection(image_size=8)
    source.save_pretrained(tmp_path)
    done = swap_encoder(llava, tmp_path)
    assert (done.size, done.tokens) == (8, 4)
    with torch.no_grad():
        expected = source(pixels(8), output_hidden_states=True).hidden_states[-2][:, 1:]
    assert close(language_sees(llava, 8), expected)


ENTRY = """
  {name}:
    kind: fare
    architecture:
      {{family: clip_vision, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 3, num_attention_heads: 4,
       patch_size: 4, image_size: {size}, hidden_act: {act}}}
    weights: {weights}
    preprocessing: {{mean: [{mean}, 0.4578275, 0.40821073], std: [0.26862954, 0.26130258, 0.27577711]}}
    fingerprint: {print}
    psms: [{{readout: "{readout}", state: not trained yet}}]
"""


@pytest.fixture
def known(tmp_path, monkeypatch):
    """Entries into the registry, which swap_encoder then looks into."""

    def write(**entries) -> None:
        text = "version: 1\nencoders:"
        for name, changes in entries.items():
            weights = "{source: hub, location: someone/robust, format: open_clip}"
            usual = {
                "size": 8,
                "act": "quick_gelu",
                "weights": weights,
                "mean": 0.48145466,
                "readout": "pooler_output",
                "print": "unverified",
            }
            text += ENTRY.format(**{"name": name.replace("_", "-"), **usual, **changes})
        (tmp_path / "registry.yaml").write_text(text)
        monkeypatch.setattr(towers, "known_encoders", lambda: Registry([tmp_path / "registry.yaml"]))

    return write


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that has what is put into it, by (repository, file name), and notes what it is asked."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    files: dict[tuple[str, str], Path] = {}
    asked: list[tuple[str, str, str | None]] = []

    def download(repository, name, *, revision=None, local_files_only=False):
        asked.append((repository, name, revision))
        if (repository, name) not in files:
            raise EntryNotFoundError(f"no {name}")
        return str(files[repository, name])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return SimpleNamespace(files=files, asked=asked)


def on_disk(folder: Path, name: str, state: dict[str, Tensor]) -> Path:
    path = folder / name
    (save_file if path.suffix == ".safetensors" else torch.save)(state, path)
    return path


@pytest.mark.parametrize("asked", ["small-fare", "small"])
@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_registry_names_and_their_beginnings_are_fetched_from_the_hub(known, hub, tmp_path, asked, name):
    known(small_fare={}, other={})
    ours = tower(size=8)
    whole = {f"visual.{key}": value for key, value in ours.state_dict().items()}
    hub.files["someone/robust", name] = on_disk(tmp_path, name, whole)
    projecting = with_projection()
    assert swap_encoder(projecting, asked, revision="v1").source == "small-fare"
    assert agree(ours, projecting, 8)
    assert hub.asked[-1] == ("someone/robust", name, "v1")
    assert hub.asked[0] == ("someone/robust", "open_clip_model.safetensors", "v1")


def test_hub_ids_are_fetched_and_their_activation_compared(hub, tmp_path):
    ours = tower(size=8)
    state = as_saved(to_transformers(ours.state_dict()))
    hub.files["someone/clip", "model.safetensors"] = on_disk(tmp_path, "model.safetensors", state)
    projecting = with_projection()
    assert swap_encoder(projecting, "someone/clip").source == "someone/clip"
    assert agree(ours, projecting, 8)
    assert ("someone/clip", "config.json", None) in hub.asked
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {"hidden_act": "gelu"}}))
    hub.files["someone/clip", "config.json"] = tmp_path / "config.json"
    with pytest.raises(ModelError, match="hidden_act gelu against the model's quick_gelu"):
        swap_encoder(projecting, "someone/clip")
    with pytest.raises(RegistryError, match=r"someone/empty has none of open_clip_model\.safetensors"):
        swap_encoder(projecting, "someone/empty")


def test_offline_is_said_with_a_way_out(known, monkeypatch):
    # conftest sets HF_HUB_OFFLINE; nothing is in the cache under this name.
    known(small_fare={})
    with pytest.raises(RegistryError, match=r"someone/robust.*Offline\?.*open_clip_pytorch_model\.bin.*pass its path"):
        swap_encoder(with_projection(), "small-fare")


def test_the_registry_must_be_right_about_its_weights(known, hub, tmp_path):
    known(small_fare={"size": 16})
    hub.files["someone/robust", "open_clip_pytorch_model.bin"] = on_disk(tmp_path, "x.bin", tower(size=8).state_dict())
    with pytest.raises(RegistryError, match="image_size 8 instead of 16"):
        swap_encoder(with_projection(), "small-fare")


def test_an_unfit_entry_is_refused_before_anything_is_fetched(known, hub):
    known(small_fare={"act": "gelu"})
    with pytest.raises(ModelError, match="hidden_act gelu against the model's quick_gelu"):
        swap_encoder(with_projection(), "small-fare")
    assert not hub.asked


def test_the_shipped_registry_knows_fare_by_its_short_name(hub, llava):
    for name in ("fare4", "tecoa2", "fare4-clip"):
        with pytest.raises(ModelError, match=rf"^{name[:5]}.*num_hidden_layers 24 against the model's 3"):
            swap_encoder(llava, name)
    assert not hub.asked
    model = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig.from_pretrained(assets.CLIP, image_size=32)
    ).eval()
    done = swap_encoder(model, "demo-clip")
    assert (done.source, done.size_before, done.size, done.projection) == ("demo-clip", 32, 64, True)
    reference = transformers.CLIPModel.from_pretrained(assets.CLIP).eval()
    with torch.no_grad():
        expected = reference.visual_projection(reference.vision_model(pixels(64)).pooler_output)
        assert torch.equal(model(pixels(64)).image_embeds, expected)


def test_a_file_beside_is_no_registry_name_and_the_other_way_round(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    on_disk(tmp_path, "fare4.pt", tower(size=8).state_dict())
    (tmp_path / "fare4").write_bytes((tmp_path / "fare4.pt").read_bytes())
    assert swap_encoder(with_projection(), "fare4").size == 8
    (tmp_path / "fare4").rename("fare4-clip")
    with pytest.raises(ModelError, match="num_hidden_layers 24"):
        swap_encoder(with_projection(), "fare4-clip")
    assert swap_encoder(with_projection(), Path("fare4-clip")).size == 8


# What is refused, and that nothing has happened then.


class Bomb:
    """A pickle of it writes a file when it is loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def replaced(changes: dict[str, Tensor | None], **settings) -> dict[str, Tensor]:
    state = {**tower(**settings).state_dict(), **changes}
    return {name: value for name, value in state.items() if value is not None}


def snapshot(model: nn.Module, processor) -> object:
    """Everything that a swap could change."""
    images = getattr(processor, "image_processor", None)
    return (
        {name: (value.dtype, value.device.type, value.shape, value if value.is_meta else value.clone()) for name, value in model.state_dict().items()},
        [id(parameter) for parameter in model.parameters()],
        [m.config.to_dict() for m in model.modules() if hasattr(m, "config")],
        [(m.image_size, m.num_patches, m.num_positions, m.position_ids.tolist()) for m in model.modules()
         if type(m).__name__ == "CLIPVisionEmbeddings" and not m.position_ids.is_meta],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        deepcopy(vars(images)) if images else None,
    )  # fmt: skip


def untouched(before, after) -> bool:
    (weights, *rest), (new_weights, *new_rest) = before, after
    return (
        rest == new_rest
        and weights.keys() == new_weights.keys()
        and all(
            one[:3] == new_weights[name][:3]
            and (one[3].is_meta or torch.equal(one[3].nan_to_num(), new_weights[name][3].nan_to_num()))
            for name, one in weights.items()
        )
    )


SOURCES = {
    "layers": (lambda: tower(layers=2).state_dict(), r"num_hidden_layers 2 against the model's 3"),
    "width": (lambda: tower(width=16).state_dict(), r"hidden_size 16 against the model's 32"),
    "mlp": (lambda: tower(mlp=40).state_dict(), r"intermediate_size 40 against the model's 48"),
    "patches": (lambda: tower(patch=8).state_dict(), r"patch_size 8 against the model's 4"),
    "embedding": (lambda: tower(size=8, out=20).state_dict(), r"visual_projection.weight.*\(20, 32\).*\(24, 32\)"),
    "lacks": (lambda: replaced({"ln_post.bias": None}), r"lacks post_layernorm\.bias"),
    "more": (lambda: replaced({"transformer.resblocks.0.ls_1.gamma": torch.ones(32)}), r"ls_1\.gamma"),
    "more in transformers' layout": (lambda: as_saved(to_transformers(tower().state_dict())) | {"vision_model.head.weight": torch.ones(1)}, r"has head\.weight"),
    "a wrong shape": (lambda: replaced({"ln_pre.bias": torch.ones(31)}), r"pre_layrnorm\.bias.*\(31,\).*\(32,\)"),
    "not square": (lambda: replaced({"positional_embedding": torch.ones(16, 32)}), r"no whole CLIP vision encoder of square"),
    "no positions": (lambda: replaced({"positional_embedding": None}), r"no whole CLIP vision encoder"),
    "not finite": (lambda: replaced({"ln_pre.bias": torch.full((32,), torch.nan)}), r"pre_layrnorm\.bias.*not finite"),
    "quantised": (lambda: replaced({"ln_pre.bias": torch.ones(32, dtype=torch.int8)}), r"pre_layrnorm\.bias.*int8"),
    "meta": (lambda: replaced({"ln_pre.bias": torch.ones(32, device="meta")}), r"pre_layrnorm\.bias.*meta"),
    "a resnet": (lambda: {"visual.conv1.weight": torch.ones(8, 3, 3, 3)}, r"no CLIP vision encoder in.*visual\.conv1"),
    "nothing": (dict, r"begins with nothing"),
}  # fmt: skip


@pytest.mark.parametrize("case", SOURCES)
@pytest.mark.parametrize("size", [None, 8])
def test_unfit_weights_change_nothing(clip, case, size):
    make, message = SOURCES[case]
    state = make()
    if size and case in ("lacks", "not finite"):  # found late, when a resize is on its way
        state["positional_embedding"] = torch.ones(5, 32)
    before = snapshot(clip, None)
    with pytest.raises(ModelError, match=message):
        swap_encoder(clip, state)
    assert untouched(before, snapshot(clip, None))


def test_values_beyond_the_models_dtype_are_refused():
    half = with_projection().half()
    before = snapshot(half, None)
    with pytest.raises(ModelError, match=r"layrnorm\.bias.*not finite in the model's torch\.float16"):
        swap_encoder(half, replaced({"ln_pre.bias": torch.full((32,), 1e6)}, size=8))
    assert untouched(before, snapshot(half, None))


def damage(folder: Path) -> dict[str, Path]:
    whole = on_disk(folder, "whole.pt", tower().state_dict()).read_bytes()
    safe = on_disk(folder, "whole.safetensors", tower().state_dict()).read_bytes()
    files = {
        "truncated.pt": whole[: len(whole) // 2],
        "truncated.safetensors": safe[: len(safe) // 2],
        "a page.pt": b"<html>Not found</html>",
        "empty.pt": b"",
        "empty.safetensors": b"",
        "bomb.pt": pickle.dumps({"visual.conv1.weight": Bomb(folder / "ran")}, protocol=2),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    torch.save({"conv1.weight": torch.ones(1), "x": Bomb(folder / "ran")}, folder / "zipped bomb.pt")
    torch.save(tower(), folder / "module.pt")
    return {path.name: path for path in folder.iterdir() if not path.name.startswith("whole")}


def test_damaged_and_dangerous_files_are_refused_and_not_run(clip, tmp_path):
    files = damage(tmp_path)
    assert len(files) == 8
    before = snapshot(clip, None)
    for path in files.values():
        with pytest.raises(ModelError, match="cannot be read as weights") as caught:
            swap_encoder(clip, path)
        assert path.name in str(caught.value)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "zipped bomb.pt", weights_only=False)
    assert (tmp_path / "ran").exists()
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    with pytest.raises(ModelError, match="holds a list instead of a state dict"):
        swap_encoder(clip, tmp_path / "list.pt")
    assert untouched(before, snapshot(clip, None))


def test_sources_that_are_nowhere(clip, tmp_path, hub):
    before = snapshot(clip, None)
    with pytest.raises(SettingError, match=r"beginning of clip-vit-base-patch16, clip-vit-large"):
        swap_encoder(clip, "clip-vit")
    for wrong in ("fare9", "weights/fare4.pt", str(tmp_path / "none"), "./a/b", ""):
        with pytest.raises(SettingError, match=r"fare4-clip|has none of"):
            swap_encoder(clip, wrong)
    assert not hub.asked
    with pytest.raises(SettingError, match=r"has none of open_clip_model\.safetensors"):
        swap_encoder(clip, tmp_path)
    on_disk(tmp_path, "model.safetensors", as_saved(to_transformers(tower().state_dict())))
    for config, message in (
        ({"num_attention_heads": 8}, "num_attention_heads 8 against the model's 4"),
        ([], "is no model configuration"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match=message):
            swap_encoder(clip, tmp_path)
    assert untouched(before, snapshot(clip, None))


def smoothed():
    model = make_llava()
    fs_plugins.enable(model, psm=None, sigma=0.25)
    return model


def offloaded():
    model = make_llava()
    llava_encoder(model).to("meta")
    return model


def quantised():
    model = make_llava()
    linear = next(m for m in llava_encoder(model).modules() if isinstance(m, nn.Linear))
    linear.weight = nn.Parameter(linear.weight.data.to(torch.int8), requires_grad=False)
    return model


class Sharded(Tensor):
    """Stands for DTensor and torchao's quantised tensors: floating point, but no plain tensor."""


def sharded():
    model = make_llava()
    linear = next(m for m in llava_encoder(model).modules() if isinstance(m, nn.Linear))
    linear.weight = nn.Parameter(linear.weight.data.as_subclass(Sharded))
    return model


def adapted():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(make_llava(), peft.LoraConfig(target_modules=r".*vision_tower.*q_proj"))


def two():
    return nn.ModuleDict({"image": with_projection(), "video": with_projection()})


def siglip():
    config = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**config, image_size=16, patch_size=4))


MODELS = {
    "smoothed": (smoothed, r"Smoothing is enabled.*disable\(model\)"),
    "offloaded": (offloaded, "meta device"),
    "quantised": (quantised, r"int8 in a Tensor \(quantised, or sharded\?\)"),
    "sharded": (sharded, r"float32 in a Sharded"),
    "adapted": (adapted, "LoRA"),
    "two encoders": (two, r"ModuleDict has 2 \(image.*video"),
    "no CLIP": (siglip, r"SiglipVisionModel has none.*load_state_dict"),
    "tiles": (llava_next, r"sees 8 pixels, LlavaNextForConditionalGeneration has an encoder of 16"),
    "a stranger": (lambda: nn.Sequential(with_projection()), r"sees 8 pixels, Sequential has an encoder of 16"),
}


@pytest.mark.parametrize("case", MODELS)
def test_models_that_cannot_take_it_stay_as_they_were(case):
    make, message = MODELS[case]
    model = make()
    before = snapshot(model, None)
    with pytest.raises(ModelError, match=message):
        swap_encoder(model, tower(size=8).state_dict())
    assert untouched(before, snapshot(model, None))


def test_only_models_are_models():
    with pytest.raises(ModelError, match=r"takes a torch\.nn\.Module, got str"):
        swap_encoder("llava", "fare4")


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (SimpleNamespace(image_processor=SimpleNamespace(size={"shortest_edge": 16}, crop_size=12)), "crop_size is 12"),
        (SimpleNamespace(image_processor=SimpleNamespace(size={"shortest_edge": 20}, crop_size=16)), "size is .*20"),
        (SimpleNamespace(tokenizer=None), "has no size and no crop_size"),
    ],
)
def test_processors_that_do_not_go_with_the_model_stop_the_swap(llava, processor, message):
    before = snapshot(llava, processor)
    with pytest.raises(SettingError, match=message):
        swap_encoder(llava, tower(size=8).state_dict(), processor=processor)
    assert untouched(before, snapshot(llava, processor))


def test_what_was_done_cannot_be_rewritten(clip):
    done = swap_encoder(clip, tower().state_dict())
    with pytest.raises(dataclasses.FrozenInstanceError):
        done.size = 3


# open_clip itself.


@pytest.fixture(scope="module")
def open_clip():
    return pytest.importorskip("open_clip", exc_type=ImportError)


def open_clip_model(open_clip, *, quick: bool) -> nn.Module:
    vision = {"image_size": 24, "layers": 3, "width": 32, "patch_size": 4, "head_width": 8, "mlp_ratio": 1.5}
    text = {"context_length": 8, "vocab_size": 40, "width": 32, "heads": 4, "layers": 1}
    return norms_around_one(open_clip.CLIP(24, vision, text, quick_gelu=quick), seed=5)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_a_real_open_clip_model_gives_its_encoder(open_clip, tmp_path, act):
    source = open_clip_model(open_clip, quick=act == "quick_gelu")
    torch.save(source.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    torch.save(source.visual.state_dict(), tmp_path / "visual.pt")
    for path in (tmp_path, tmp_path / "visual.pt"):
        projecting = with_projection(hidden_act=act)
        assert swap_encoder(projecting, path).tokens == 36
        with torch.no_grad():
            assert close(source.encode_image(pixels(24)), projecting(pixels(24)).image_embeds)


def test_a_real_open_clip_model_takes_the_encoder_back(open_clip):
    theirs, source = with_projection(image_size=24), open_clip_model(open_clip, quick=True)
    source.visual.load_state_dict(to_open_clip(theirs.state_dict()))
    with torch.no_grad():
        assert close(source.encode_image(pixels(24)), theirs(pixels(24)).image_embeds)
    state = source.visual.state_dict()
    assert same_bits(to_open_clip(to_transformers(source.state_dict())), state)


def test_open_clips_own_models_are_told_their_way(open_clip):
    with pytest.raises(ModelError, match=r"CLIP has none.*model\.visual\.load_state_dict"):
        swap_encoder(open_clip_model(open_clip, quick=True), tower().state_dict())


@pytest.mark.parametrize("name", ["demo-fare", "demo-tecoa"])
def test_an_encoder_of_the_registry_is_loaded_without_the_model_around_it(name):
    model = towers.load_encoder(name)
    call = fs_plugins.vision_call(model)
    assert type(model).__name__ == "CLIPVisionModelWithProjection"
    assert call.embed(call.encode(torch.rand(1, 3, 64, 64))).shape == (1, 64)
    entry = towers.known_encoders().entries[name]
    assert entry.has(fingerprint(call.module)), "the encoder's own weights"


def test_an_encoder_of_llavas_readout_comes_in_a_small_llava(known, tmp_path):
    source = with_projection()
    source.save_pretrained(tmp_path / "tower")
    readout = "hidden_states[-2][1:]"
    known(mine={"size": 16, "weights": f"{{source: folder, location: {tmp_path / 'tower'}}}", "readout": readout})
    model = towers.load_encoder("mine")
    assert [r.name for r in fs_plugins.vision_call(model).readouts] == [readout]
    images = torch.rand(2, 3, 16, 16)
    call = fs_plugins.vision_call(model)
    with torch.no_grad():
        hidden = source(call.pixels.from_unit(images, torch.float32), output_hidden_states=True).hidden_states
        assert close(call.encode(images)[readout], hidden[-2][:, 1:])
    known(mine={"size": 16, "weights": f"{{source: folder, location: {tmp_path / 'tower'}}}", "mean": 0.5})
    with pytest.raises(SettingError, match="Load the model around it"):
        towers.load_encoder("mine")
    known(mine={"readout": "tokens"})
    with pytest.raises(SettingError, match="cannot be loaded without the model around it"):
        towers.load_encoder("mine")
    with pytest.raises(SettingError, match="It has: mine"):
        towers.load_encoder("yours")
    known(mine={"size": 16, "weights": f"{{source: folder, location: {tmp_path / 'tower'}}}", "print": [1.0] * 16})
    with pytest.raises(RegistryError, match="another fingerprint"):
        towers.load_encoder("mine")
    (tmp_path / "bare").mkdir()
    bare = {
        key: value
        for key, value in load_file(tmp_path / "tower" / "model.safetensors").items()
        if "visual_projection" not in key
    }
    save_file(bare, tmp_path / "bare" / "model.safetensors")
    known(mine={"size": 16, "weights": f"{{source: folder, location: {tmp_path / 'bare'}}}"})
    assert type(towers.load_encoder("mine")).__name__ == "CLIPVisionModel"


def test_a_folder_comes_before_an_encoder_of_the_registry_of_its_name(tmp_path, monkeypatch):
    from fs_plugins.cli.base import load

    assert type(load("demo-fare")).__name__ == "CLIPVisionModelWithProjection"
    with_projection(size=16).save_pretrained(tmp_path / "demo-fare")
    monkeypatch.chdir(tmp_path)
    assert load("demo-fare").config.hidden_size == 32
