"""The adapter for vLLM's classes, without vLLM: classes of its names, with encoders that return what its own return."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fs_plugins.adapters.hf_layouts import PatchRows
from fs_plugins.adapters.vllm import Pictures, Rows, saved
from support import MEAN, STD, knowing, make_llava, randomise
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

import fs_plugins
from fs_plugins import Field, ModelError, PixelError, PixelSpace, Readout, VisionCall
from fs_plugins.identity import fingerprint
from fs_plugins.patch import SmoothingHook
from fs_plugins.smoothing import FeatureSmoother


def of_vllm(name: str, **parts: Any) -> nn.Module:
    """A model of a class of vLLM's of this name."""
    model = type(name, (nn.Module,), {"__module__": "vllm.model_executor.models.some"})()
    for part, value in parts.items():
        setattr(model, part, value)
    return model.eval()


class Selecting(nn.Module):
    """CLIP's encoder as vLLM has it: the layer asked for and no other, and the class token if it is wanted."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixel_values: Tensor, feature_select_strategy: str | None = None) -> Tensor:
        tokens = self.tower(pixel_values, output_hidden_states=True).hidden_states[-2]
        return tokens[:, 1:] if feature_select_strategy == "default" else tokens


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A LLaVA of transformers that lies on disk, as it is loaded from there."""
    folder = tmp_path_factory.mktemp("llava")
    make_llava().save_pretrained(folder)
    return knowing(LlavaForConditionalGeneration.from_pretrained(folder).eval())


def test_llava_is_known_and_smoothed_as_transformers_is(kept):
    ours = fs_plugins.vision_call(kept)
    parts = {"config": kept.config, "vision_tower": Selecting(ours.module)}
    served = knowing(of_vllm("LlavaForConditionalGeneration", **parts))
    theirs = fs_plugins.vision_call(served)
    assert [one.name for one in theirs.readouts] == [one.name for one in ours.readouts]
    assert (theirs.architecture, theirs.image_size, theirs.tested) == (ours.architecture, ours.image_size, True)
    assert theirs.fingerprint() == fingerprint(ours.module)
    images = torch.rand(2, 3, *ours.image_size)
    how: dict[str, Any] = {"psm": None, "sigma": 0.25, "n0": 3, "seed": 0}
    (expected,) = fs_plugins.smoothers(kept, **how)[0].smooth(images).values()
    with fs_plugins.enable(served, **how), torch.no_grad():
        torch.testing.assert_close(theirs.served(images), expected.flatten(1))


def test_a_model_that_runs_on_transformers_is_claimed_through_it(kept):
    served = of_vllm("TransformersMultiModalForCausalLM", model=kept.model)
    call = fs_plugins.vision_call(served)
    assert call.module is fs_plugins.vision_call(kept).module
    assert call.fingerprint() == fingerprint(call.module)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen2AudioForConditionalGeneration"])
def test_what_it_does_not_know_it_leaves_to_others(name):
    with pytest.raises(ModelError, match="No adapter claims"):
        fs_plugins.vision_call(of_vllm(name, config=SimpleNamespace()))


def test_pixtral_in_mistrals_own_format_takes_a_list_of_pictures():
    told = SimpleNamespace(hidden_size=8, patch_size=4)
    model = of_vllm("PixtralForConditionalGeneration", vision_args=told, vision_encoder=Patched(), config=None)
    call = fs_plugins.vision_call(model)
    assert (call.pixels.argument, call.tested, call.image_size) == ("images", True, None)


def test_weights_are_those_of_the_checkpoint_and_of_nothing_else(kept):
    tower = kept.model.vision_tower
    assert fingerprint(saved(kept.config, "vision_tower")) == fingerprint(tower)
    with pytest.raises(ModelError, match="no safetensors of visual"):
        saved(kept.config, "visual")
    with pytest.raises(ModelError, match="nowhere on this machine"):
        saved(SimpleNamespace(_name_or_path="", model_type="llava"), "vision_tower")


class Patched(nn.Module):
    """Pixtral's encoder: (C, H, W) pictures of any size in a list -> (L, D) tokens of each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, stride=4)
        randomise(self)

    def forward(self, pixel_values: list[Tensor]) -> tuple[Tensor, ...]:
        assert isinstance(pixel_values, list)
        return tuple(self.conv(one).flatten(1).T for one in pixel_values)


def listed() -> tuple[Patched, SmoothingHook]:
    encoder = Patched()
    readout = Readout("last_hidden_state", (Field("last_hidden_state", 0),), width=8, tokens=None)
    call = VisionCall(encoder, PixelSpace(MEAN, STD, layout=Pictures()), (readout,), None, {"family": "pixtral"})
    return encoder, SmoothingHook(FeatureSmoother(call, psm=None, sigma=1e-6, n0=3), "test", None)


def sized(*shapes: tuple[int, int]) -> list[Tensor]:
    return [(torch.rand(3, *shape) - 0.5) / 0.25 * 0.2 for shape in shapes]


def test_a_list_of_pictures_comes_back_in_its_order():
    encoder, hook = listed()
    pictures = sized((8, 8), (8, 4), (8, 8), (4, 12), (8, 4))
    with torch.no_grad():
        plain = encoder(pictures)
        hook.attach()
        smoothed = encoder(pictures)
    assert isinstance(smoothed, tuple)
    assert (hook.images, hook.draws) == (5, 15)
    for one, other in zip(smoothed, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "pictures", [[torch.rand(4, 8, 8)], [torch.rand(3, 8)], ["picture"], [torch.zeros(3, 8, 8).int()]]
)
def test_a_list_of_something_else_is_refused(pictures):
    encoder, hook = listed()
    hook.attach()
    with pytest.raises(PixelError):
        encoder(pictures)


@pytest.mark.parametrize("grids", [[[1, 4, 4]], [[1, 4, 8], [2, 4, 4], [1, 4, 8]]])
def test_rows_are_those_of_transformers_with_their_grids_in_lists(grids):
    theirs, ours = Rows(2, 2, 2), PatchRows(2, 2, 2)
    pixels = torch.rand(sum(t * h * w for t, h, w in grids), 3 * 2 * 4)
    got = theirs.groups(pixels, {"grid_thw": grids})
    expected = ours.groups(pixels, {"grid_thw": torch.tensor(grids)})
    assert [one.units for one in got] == [one.units for one in expected]
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.companions["grid_thw"], other.companions["grid_thw"])
        taken = theirs.taken({"grid_thw": one.companions["grid_thw"], "x": pixels})
        assert taken["grid_thw"] == other.companions["grid_thw"].tolist()
    argument, others = theirs.still(torch.rand(2, 3, 8, 8))
    assert (len(argument), others) == (32, {"grid_thw": [[1, 4, 4], [1, 4, 4]]})
