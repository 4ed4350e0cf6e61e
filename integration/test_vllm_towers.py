"""vLLM's own encoders, without an engine: small checkpoints of transformers, loaded by both, see the same and are
smoothed alike.

Runs in an environment that has vLLM; elsewhere it is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from families import FAMILIES, LLAMA
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tower_families import TOWER_FAMILIES
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, SiglipVisionConfig
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.model_executor.models import phi4mm
from vllm.model_executor.models.idefics2_vision_model import Idefics2VisionTransformer

import fs_plugins
from fs_plugins import ModelError, SettingError, VisionCall
from fs_plugins.demo import assets
from fs_plugins.identity import same_encoder
from fs_plugins.vllm.guard import check
from fs_plugins.vllm.worker import check_plain

pytestmark = pytest.mark.filterwarnings("ignore:Nobody knows how this model's pixels are normalised")

BY_NAME = {family.name: family for family in (*FAMILIES, *TOWER_FAMILIES)}
KINDS = (
    "LLaVA CLIP -2 default",
    "LLaVA SigLIP full -1",
    "LLaVA Pixtral",
    "LLaVA-NeXT",
    "LLaVA-NeXT-Video",
    "Cohere 2 Vision",
    "LLaVA-OneVision",
    "PaliGemma",
    "Gemma 3",
    "Mistral 3",
    "Idefics3",
    "SmolVLM",
    "InternVL layer -1",
    "Qwen2-VL",
    "Qwen2.5-VL",
    "Qwen3-VL",
    "GLM-4V",
)
"""Families of the kit that vLLM has classes of its own for."""
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0, "mrope_section": [2, 1, 1]}
OVERRIDES = {"GLM-4V": {"text_config": {"rope_parameters": ROPE}}}
"""What vLLM's language models want of a configuration this small."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one, as vLLM's layers want it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "empty_cache", lambda: None)  # there is none, and vLLM's workers know
        init_distributed_environment(1, 0, f"file://{tmp_path_factory.mktemp('world') / 'store'}", 0, "gloo")
        yield


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, world: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of transformers, and vLLM's of the same checkpoint."""
    name = request.param
    original = BY_NAME[name].build().eval()
    folder = tmp_path_factory.mktemp("checkpoint")
    original.save_pretrained(folder)
    as_on_the_hub(folder / "model.safetensors", original)
    return original, loaded(configured(folder, hf_overrides=OVERRIDES.get(name, {})))


def configured(folder: Path, **options: Any) -> VllmConfig:
    """vLLM's configuration of a checkpoint, which has no tokenizer."""
    how: dict[str, Any] = {"skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True, "max_model_len": 64}
    return EngineArgs(model=str(folder), **{**how, **options}).create_engine_config()


def loaded(config: VllmConfig) -> nn.Module:
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized() or not _parallel():
            initialize_model_parallel(1, 1)
        return get_model(vllm_config=config)


def _parallel() -> bool:
    from vllm.distributed.parallel_state import model_parallel_is_initialized

    return model_parallel_is_initialized()


def as_on_the_hub(file: Path, model: nn.Module) -> None:
    """Checkpoints of LLaVA have a word more in the names of CLIP's and SigLIP's weights than transformers 5 writes."""
    if model.config.vision_config.model_type not in ("clip_vision_model", "siglip_vision_model"):
        return
    old, new = "vision_tower.", "vision_tower.vision_model."
    weights = {key if new in key else key.replace(old, new): value for key, value in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})


def calls(pair: Any) -> tuple[VisionCall, VisionCall]:
    original, served = pair
    return fs_plugins.vision_call(original), fs_plugins.vision_call(served)


def pictures(call: VisionCall, count: int = 2) -> Tensor:
    return torch.rand(count, 3, *(call.image_size or (32, 32)), generator=torch.Generator().manual_seed(0))


def whole(features: dict[str, Tensor]) -> Tensor:
    """Side by side: vLLM returns in one tensor what transformers has in several."""
    return torch.cat(list(features.values()), dim=-1)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * other.detach().abs().max().item())


def test_it_is_known_for_what_it_is(pair):
    ours, theirs = calls(pair)
    assert theirs.architecture == ours.architecture
    assert " + ".join(one.name for one in ours.readouts) == " + ".join(one.name for one in theirs.readouts)
    assert (theirs.image_size, theirs.pixels.mean, theirs.pixels.std) == (
        ours.image_size,
        ours.pixels.mean,
        ours.pixels.std,
    )
    assert same_encoder(ours.fingerprint(), theirs.fingerprint())
    check_plain(theirs)


def test_it_sees_what_transformers_sees(pair):
    ours, theirs = calls(pair)
    images = pictures(ours)
    with torch.no_grad():
        close(whole(theirs.encode(images)), whole(ours.encode(images)))


@pytest.mark.parametrize("n0", [1, 3])
def test_it_is_smoothed_as_transformers_is(pair, n0):
    ours, theirs = calls(pair)
    images = pictures(ours)
    how: dict[str, Any] = {"psm": None, "sigma": 0.25, "n0": n0, "seed": 0, "chunk_size": 4}
    expected = fs_plugins.smoothers(pair[0], **how)[0].smooth(images)
    with torch.no_grad(), fs_plugins.enable(pair[1], **how) as handle:
        got = theirs.served(images)
        (vision,) = handle.status().vision
    assert (vision.adapter, vision.images, vision.draws) == ("vllm", 2, 2 * n0)
    close(got, whole(expected).flatten(1))


Shown = dict[str, Any]


def plain(call: VisionCall, images: Tensor) -> Shown:
    return {"pixel_values": call.pixels.from_unit(images, torch.float32)}


def rows(call: VisionCall, images: Tensor) -> Shown:
    argument, others = call.pixels.layout.still(call.pixels.from_unit(images, torch.float32))
    return {"pixel_values": argument, "image_grid_thw": torch.tensor(others["grid_thw"])}


def several(call: VisionCall, images: Tensor) -> Shown:
    """Pictures of two sizes, in a list."""
    pixels = call.pixels.from_unit(images, torch.float32)
    return {"pixel_values": [pixels[0], pixels[1][:, :16]]}


FORMS: dict[str, Callable[[VisionCall, Tensor], Shown]] = {
    "LLaVA CLIP -2 default": plain,
    "LLaVA SigLIP full -1": plain,
    "LLaVA Pixtral": several,
    "Mistral 3": several,
    "Gemma 3": lambda call, images: {**plain(call, images), "num_patches": torch.ones(len(images), dtype=torch.long)},
    "Qwen2-VL": rows,
    "Qwen2.5-VL": rows,
    "Qwen3-VL": rows,
    "GLM-4V": rows,
}


def test_what_vllm_itself_asks_for_is_smoothed_and_given_back_bit_for_bit(pair, request):
    name = request.node.callspec.params["pair"]
    if name not in FORMS:
        pytest.skip("its processor prepares what the model is asked with")
    _, call = calls(pair)
    served = pair[1]
    shown = FORMS[name](call, pictures(call))

    def embedded() -> Tensor:
        with torch.no_grad():
            return torch.cat([one.flatten(0, -2) for one in served.embed_multimodal(**shown)])

    bare = embedded()
    with fs_plugins.enable(served, psm=None, sigma=0.25, n0=2, seed=0) as handle:
        first, second = embedded(), embedded()
        (vision,) = handle.status().vision
    assert (vision.images, vision.draws) == (4, 8)
    assert first.shape == bare.shape
    assert not torch.allclose(first, bare, atol=1e-3)
    assert not torch.equal(first, second), "every call has noise of its own"
    assert torch.equal(embedded(), bare)
    with fs_plugins.enable(served, psm=None, sigma=1e-7, n0=2):  # the whole road and its packing
        close(embedded(), bare)


# Formats of their own, which transformers has no classes for: nothing to compare with but the model itself.

TEXT = LlamaConfig(**LLAMA, architectures=["LlamaForCausalLM"], dtype="float32")
VISION_SMALL = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def internvl_chat() -> PreTrainedConfig:
    vision = {
        **VISION_SMALL,
        "image_size": 28,
        "patch_size": 14,
        "num_channels": 3,
        "qkv_bias": True,
        "qk_normalization": False,
        "norm_type": "layer_norm",
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
        "initializer_factor": 0.1,
        "model_type": "intern_vit_6b",
    }
    return PreTrainedConfig.from_dict(
        {
            "model_type": "internvl_chat",
            "architectures": ["InternVLChatModel"],
            "vision_config": PreTrainedConfig.from_dict(vision),
            "text_config": TEXT,
            "force_image_size": 28,
            "downsample_ratio": 0.5,
            "ps_version": "v2",
            "select_layer": -1,
        }
    )


def pixtral() -> PreTrainedConfig:
    vision = {
        **VISION_SMALL,
        "image_size": 64,
        "patch_size": 8,
        "num_channels": 3,
        "rope_theta": 1e4,
        "image_token_id": 9,
    }
    return PreTrainedConfig.from_dict(
        {
            "model_type": "pixtral",
            "architectures": ["PixtralForConditionalGeneration"],
            "vision_config": PreTrainedConfig.from_dict(vision),
            "text_config": TEXT,
        }
    )


def phi4mm_config() -> PreTrainedConfig:
    audio = {"audio_embd_layer": {"embedding_cls": "audio"}}
    return LlamaConfig(
        **LLAMA, architectures=["Phi4MMForCausalLM"], dtype="float32", img_processor=None, embd_layer=audio
    )


def small_phi4_encoder(layer_idx: int) -> nn.Module:
    """Phi-4-MM's encoder has its size in the code, 400 million weights."""
    config = SiglipVisionConfig(**VISION_SMALL, image_size=448, patch_size=14)
    layers = config.num_hidden_layers + layer_idx + 1
    return Idefics2VisionTransformer(config=config, require_post_norm=False, num_hidden_layers_override=layers)


def random_weights(loader: DummyModelLoader, model: nn.Module, config: Any) -> None:
    """vLLM's own are so small that a model says the same of everything."""
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.data.normal_(0, 0.3, generator=generator)


def tiles(call: VisionCall) -> Shown:
    """Two pictures, of one tile and of two."""
    pixels = call.pixels.from_unit(pictures(call, 3), torch.float32)
    return {"pixel_values_flat": pixels, "image_num_patches": torch.tensor([1, 2]), "image_token_id": 9}


def listed_pictures(call: VisionCall) -> Shown:
    pixels = call.pixels.from_unit(pictures(call), torch.float32)
    return {"images": [pixels[0], pixels[1][:, :16]]}


def crops(call: VisionCall) -> Shown:
    """Two pictures: the whole and one crop; the whole and two crops, of which the second is half padding."""
    pixels = call.pixels.from_unit(pictures(call, 5), torch.float32)
    seen = torch.ones(5, 32, 32)
    seen[4, :, 16:] = 0
    return {
        "input_image_embeds": [pixels[:2], pixels[2:]],
        "image_sizes": torch.tensor([[448, 448], [448, 896]]),
        "image_attention_mask": [seen[:2], seen[2:]],
        "num_img_tokens": torch.tensor([1, 1]),
    }


FORMATS: dict[str, tuple[Callable[[], PreTrainedConfig], Callable[[VisionCall], Shown], int]] = {
    "InternVL": (internvl_chat, tiles, 3),
    "Pixtral": (pixtral, listed_pictures, 2),
    "Phi-4-MM": (phi4mm_config, crops, 6),
}
"""How each is made, what its processor asks with, and how many images the encoder sees then (it fills up crops)."""


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_of_its_own_is_smoothed_and_given_back_bit_for_bit(name, world, tmp_path, monkeypatch):
    make, ask, images = FORMATS[name]
    monkeypatch.setattr(phi4mm, "get_navit_vision_model", small_phi4_encoder)
    monkeypatch.setattr(phi4mm, "AudioEmbedding", lambda *args, **kwargs: nn.Identity())
    monkeypatch.setattr(DummyModelLoader, "load_weights", random_weights)
    BY_NAME["LLaVA CLIP -2 default"].build().save_pretrained(tmp_path)  # its engine settings are all that is taken
    config = make()
    served = loaded(configured(tmp_path, load_format="dummy").with_hf_config(config, config.architectures))
    call = fs_plugins.vision_call(served)
    assert call.tested
    (readout,) = call.readouts
    images_seen = pictures(call)
    with torch.no_grad():
        features = call.encode(images_seen)[readout.name]
    assert features.shape[0] == 2
    assert features.shape[-1] == readout.width
    shown = ask(call)

    def embedded() -> Tensor:
        with torch.no_grad():
            return torch.cat([one.flatten(0, -2) for one in served.embed_multimodal(**shown)])

    bare = embedded()
    with fs_plugins.enable(served, psm=None, sigma=0.25, n0=2, noise="iid", seed=0) as handle:
        first, second = embedded(), embedded()
        (vision,) = handle.status().vision
    assert (vision.images, vision.draws) == (2 * images, 4 * images)
    assert not torch.allclose(first, bare, atol=1e-3)
    assert not torch.equal(first, second), "every call has noise of its own"
    assert torch.equal(embedded(), bare)
    with fs_plugins.enable(served, psm=None, sigma=1e-7, n0=2):
        close(embedded(), bare)


CONSUMER = {"ec_connector": "ECExampleConnector", "ec_role": "ec_consumer"}
"""An engine whose pictures another one encodes."""


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"enable_lora": True, "enable_tower_connector_lora": True}, SettingError, "enable_tower_connector_lora runs"),
        ({"compilation_config": {"compile_mm_encoder": True}}, SettingError, "compile_mm_encoder runs"),
        ({"compilation_config": {"cudagraph_mm_encoder": True}}, SettingError, "cudagraph_mm_encoder runs"),
        ({"ec_transfer_config": CONSUMER}, SettingError, "only consumes .ec_role ec_consumer."),
        ({"enable_mm_embeds": True}, SettingError, "--enable-mm-embeds lets a request bring"),
        ({"enable_prompt_embeds": True}, SettingError, "--enable-prompt-embeds lets a request bring"),
        ({"limit_mm_per_prompt": {"image": 0, "video": 0}}, ModelError, "is shown none"),
        ({"model": "text"}, ModelError, "reads text alone"),
    ],
)
def test_the_real_options_of_vllm_that_go_around_smoothing_are_refused(options, error, says, world, tmp_path):
    folder = tmp_path / "model"
    if options == {"model": "text"}:
        LlamaForCausalLM(TEXT).save_pretrained(folder)
    else:
        BY_NAME["LLaVA CLIP -2 default"].build().save_pretrained(folder)
        check(configured(folder))
    config = configured(folder, **{name: value for name, value in options.items() if name != "model"})
    with pytest.raises(error, match=says):
        check(config)


@pytest.mark.parametrize("spared", [[], ["re:.*vision_tower.*"]])
def test_a_quantised_encoder_is_refused_and_one_beside_a_quantised_language_model_is_smoothed(spared, world):
    eights = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**eights, "strategy": "channel", "dynamic": False},
        "input_activations": {**eights, "strategy": "token", "dynamic": True},
    }
    quantised = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", *spared],
        "config_groups": {"group_0": group},
    }
    overrides = {"quantization_config": quantised}
    served = loaded(configured(assets.LLAVA, dtype="bfloat16", load_format="dummy", hf_overrides=overrides))
    call = fs_plugins.vision_call(served)
    if not spared:
        with pytest.raises(ModelError, match=r"quantised \(.*: CompressedTensorsLinearMethod\)"):
            check_plain(call)
        return
    check_plain(call)
    images = pictures(call)
    with torch.no_grad():
        bare = call.served(images)
        with fs_plugins.enable(served, psm=None, sigma=0.25, n0=2, noise="iid") as handle:
            assert not torch.equal(call.served(images), bare)
            assert handle.status().vision[0].draws == 4
