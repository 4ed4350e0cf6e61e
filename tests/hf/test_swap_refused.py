"""What a swap refuses, and that nothing has happened then."""

from __future__ import annotations

import dataclasses
import json
import pickle
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from open_clip_tower import as_saved, llava_encoder, llava_next, on_disk, tower, transformers, with_projection
from support import make_llava
from torch import Tensor, nn

import fs_plugins
from fs_plugins import ModelError, SettingError
from fs_plugins.hf.conversion import to_transformers
from fs_plugins.hf.towers import swap_encoder


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
        {
            name: (value.dtype, value.device.type, value.shape, value if value.is_meta else value.clone())
            for name, value in model.state_dict().items()
        },
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
    "more in transformers' layout": (
        lambda: as_saved(to_transformers(tower().state_dict())) | {"vision_model.head.weight": torch.ones(1)},
        r"has head\.weight",
    ),
    "a wrong shape": (lambda: replaced({"ln_pre.bias": torch.ones(31)}), r"pre_layrnorm\.bias.*\(31,\).*\(32,\)"),
    "not square": (
        lambda: replaced({"positional_embedding": torch.ones(16, 32)}),
        r"no whole CLIP vision encoder of square",
    ),
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
        (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
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
