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

from families import FAMILIES
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model

import fs_plugins
from fs_plugins import VisionCall
from fs_plugins.identity import same_encoder
from fs_plugins.vllm.worker import check_plain

pytestmark = pytest.mark.filterwarnings("ignore:Nobody knows how this model's pixels are normalised")

BY_NAME = {family.name: family for family in FAMILIES}
KINDS = (
    "LLaVA CLIP -2 default",
    "LLaVA SigLIP full -1",
    "LLaVA Pixtral",
    "LLaVA-NeXT",
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
def pair(request: pytest.FixtureRequest, world: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A model of transformers, and vLLM's of the same checkpoint."""
    name = request.param
    original = BY_NAME[name].build().eval()
    folder = tmp_path_factory.mktemp("checkpoint")
    original.save_pretrained(folder)
    as_on_the_hub(folder / "model.safetensors", original)
    # vLLM's configuration of a checkpoint, which has no tokenizer.
    config = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        hf_overrides=OVERRIDES.get(name, {}),
    ).create_engine_config()
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized() or not _parallel():
            initialize_model_parallel(1, 1)
        yield original, get_model(vllm_config=config)


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
