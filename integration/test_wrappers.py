"""What people put around models: whatever the order, the protection stays in force, and disable ends it.

Draws are fixed by seed and image, so every smoothed call of a family must give the same outcome as its bare model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CLIP_NORM, CLIP_VISION, FAMILIES, IMAGE, LLAMA, make, normalise, prompt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from versions import INSTALLED, PINNED

import fs_plugins
from fs_plugins import FSPluginsWarning
from fs_plugins.testing import AdapterConformance

pytestmark = AdapterConformance.pytestmark  # the kit's models, made on the spot, have no processor beside them

TOWERS = {
    "CLIP": "vision_model",
    "LLaVA CLIP -2 default": "vision_tower",
    "Qwen2-VL": "visual",
    "Gemma 3": "vision_tower",
}
CLIP, LLAVA, QWEN, _ = TOWERS
DRAWS: dict[str, Any] = {"seed": 1, "noise_scope": "image"}
SMOOTHING: dict[str, Any] = {"psm": None, "sigma": 0.25, **DRAWS}
DEMO = Path(fs_plugins.__file__).parent / "demo/assets"
Wrap = Callable[[nn.Module], nn.Module]

all_families = pytest.mark.parametrize("name", TOWERS)
both_orders = pytest.mark.parametrize("order", ["enable, wrap", "wrap, enable"])


def distance(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


def close(got: Tensor, wanted: Tensor) -> bool:
    """Equal but for other rounding: compilers fuse, adapters are merged."""
    return distance(got, wanted) < 1e-4


def calls(model: nn.Module) -> int:
    status = fs_plugins.status(model)
    assert not status.warnings
    return sum(vision.calls for vision in status.vision)


class Subject:
    """A family's small model, and its outcome without smoothing and with it."""

    def __init__(self, name: str) -> None:
        self.family = next(family for family in FAMILIES if family.name == name)
        self.build = self.family.build
        self.images = torch.rand(2, 3, *self.family.image_size, generator=torch.Generator().manual_seed(7))
        model = self.build()
        # Some inputs depend on the signature of forward, which wrappers hide.
        self.inputs = self.family.inputs(model, self.images)
        self.plain, self.smoothed = self.both(model)
        assert distance(self.smoothed, self.plain) > 0.1

    def ask(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return self.family.outcome(model, self.inputs)

    def both(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        with fs_plugins.enable(model, **SMOOTHING):
            smoothed = self.ask(model)
        return self.ask(model), smoothed

    def gradient(self, model: nn.Module) -> Tensor:
        images = self.images.clone().requires_grad_()
        outcome = self.family.outcome(model, self.family.inputs(model, images))
        # Plain squares of unit embeddings would add up to a constant.
        (outcome * torch.linspace(-1, 1, outcome.numel()).view_as(outcome)).sum().backward()
        return images.grad

    def put(self, order: str, wrap: Wrap) -> nn.Module:
        """A fresh model, enabled before or after it is wrapped."""
        model = self.build()
        if order == "enable, wrap":
            fs_plugins.enable(model, **SMOOTHING)
        model = wrap(model).eval()
        if order == "wrap, enable":
            fs_plugins.enable(model, **SMOOTHING)
        return model

    def check(self, model: nn.Module, same: Callable[[Tensor, Tensor], bool] = torch.equal) -> None:
        """An enabled model that has not been called is smoothed as the bare one is, until it is disabled."""
        assert same(self.ask(model), self.smoothed)
        assert calls(model) == 1
        fs_plugins.disable(model)
        assert same(self.ask(model), self.plain)


subject = cache(Subject)


def demo_llava() -> tuple[nn.Module, dict[str, Tensor]]:
    """The shipped model, which the registry knows, and a question about two images."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(DEMO / "llava").eval().requires_grad_(False)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(7))
    asked = prompt(images, *[model.config.image_token_index] * 64)
    return model, {**asked, "pixel_values": normalise(images, CLIP_NORM)}


# accelerate


def accelerated(model: nn.Module, kind: str, folder: Path) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    if kind == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device="cpu")
    if kind == "disk_offload":
        return accelerate.disk_offload(model, str(folder), execution_device="cpu")
    # One device alone gets no hooks unless they are asked for.
    return accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=kind == "dispatch_model with hooks")


@both_orders
@pytest.mark.parametrize("kind", ["dispatch_model", "dispatch_model with hooks", "cpu_offload", "disk_offload"])
@all_families
def test_accelerate_comes_and_goes(name, kind, order, tmp_path):
    family = subject(name)
    model = family.put(order, lambda model: accelerated(model, kind, tmp_path))
    assert any(p.is_meta for p in model.parameters()) == kind.endswith("offload")
    family.check(model)
    fs_plugins.enable(model, **SMOOTHING)
    pytest.importorskip("accelerate").hooks.remove_hook_from_module(model, recurse=True)
    assert not any(p.is_meta for p in model.parameters())
    family.check(model)


@pytest.mark.parametrize("kind", ["cpu_offload", "disk_offload"])
def test_a_psm_serves_an_offloaded_tower_but_is_not_found_for_it(kind, tmp_path):
    model, inputs = demo_llava()
    plain = model(**inputs).logits
    with fs_plugins.enable(model, psm="auto", **DRAWS):
        smoothed = model(**inputs).logits
        accelerated(model, kind, tmp_path)
        assert torch.equal(model(**inputs).logits, smoothed)
    with pytest.warns(FSPluginsWarning, match=r"on the meta device \(offloaded\?\).*'photo-light' stands in"):
        fs_plugins.enable(model, psm="auto", **DRAWS).disable()
    assert torch.equal(model(**inputs).logits, plain)
    with fs_plugins.enable(model, psm=DEMO / "psm-llava", **DRAWS):
        assert torch.equal(model(**inputs).logits, smoothed)
        assert calls(model) == 1
    assert distance(smoothed, plain) > 0.01


# torch.compile. What becomes of a graph is torch's affair, which is the same in all environments, and takes it long:
# its own backend is run on the pinned transformers, and elsewhere the graphs are run as they were traced.

BACKEND = "inductor" if INSTALLED == PINNED else "eager"


@pytest.fixture
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("name", [CLIP, LLAVA])
def test_compiled_code_sees_smoothing_come_and_go(name):
    family = subject(name)
    model = family.build()
    compiled = torch.compile(model, backend=BACKEND)
    assert close(family.ask(compiled), family.plain)
    for enabled in (compiled, model):
        with fs_plugins.enable(enabled, **SMOOTHING):
            assert close(family.ask(compiled), family.smoothed)
            assert calls(compiled) == calls(model) == fs_plugins.status(enabled).model_calls == 1
        assert close(family.ask(compiled), family.plain)
    fs_plugins.enable(model, **SMOOTHING)
    model.compile(backend=BACKEND)
    family.check(model, close)
    fs_plugins.enable(model, **SMOOTHING)
    assert close(family.ask(torch.compile(model, backend=BACKEND)), family.smoothed)


@pytest.mark.usefixtures("compiler")
@both_orders
@pytest.mark.parametrize("name", [CLIP, LLAVA])
def test_a_compiled_tower_is_smoothed(name, order):
    def compile_tower(model: nn.Module) -> nn.Module:
        parent = model if name == CLIP else model.model
        setattr(parent, TOWERS[name], torch.compile(getattr(parent, TOWERS[name]), backend=BACKEND))
        return model

    subject(name).check(subject(name).put(order, compile_tower), close)


@pytest.mark.usefixtures("compiler")
def test_a_graph_that_must_not_break_is_an_error_never_unprotected():
    family = subject(CLIP)
    compiled = torch.compile(family.build(), fullgraph=True, backend="eager")
    with fs_plugins.enable(compiled, **SMOOTHING), pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
        family.ask(compiled)
    assert close(family.ask(compiled), family.plain)


# Gradient checkpointing


@pytest.mark.parametrize("options", [None, {"use_reentrant": True}, {"use_reentrant": False}])
@all_families
def test_checkpointed_layers_give_the_same_gradients(name, options):
    family = subject(name)
    model = family.build().requires_grad_(False)
    tower = fs_plugins.vision_call(model).module
    layer = next(module for module in tower.modules() if isinstance(module, GradientCheckpointingLayer))
    runs: list[nn.Module] = []
    # Of something inside it: transformers 5.23 leaves a layer's own hooks out of the second computation.
    next(layer.children()).register_forward_pre_hook(lambda part, _: runs.append(part))
    with fs_plugins.enable(model, **SMOOTHING, chunk_size=3):
        wanted = family.gradient(model)
        once = len(runs)
        model.gradient_checkpointing_enable(options)
        tower.train()
        with pytest.warns(FSPluginsWarning, match="training mode"):
            got = family.gradient(model)
        assert len(runs) == 3 * once, "the layers were not computed again"
        assert calls(model) == 2
    assert wanted.abs().amax() > 1e-4
    assert close(got, wanted)


@pytest.mark.parametrize("reentrant", [True, False])
@all_families
def test_a_checkpoint_around_the_tower_needs_noise_fixed_by_the_image(name, reentrant):
    family = subject(name)
    model = family.build().requires_grad_(False)
    call = fs_plugins.vision_call(model)
    given = call.kwargs | ({"grid_thw": family.inputs["image_grid_thw"]} if name == QWEN else {})

    def served(pixels: Tensor) -> Tensor:
        return next(iter(call.features(call.module(pixels, **given)).values()))

    def gradient(function: Callable[[Tensor], Tensor]) -> Tensor:
        pixels = family.inputs["pixel_values"].clone().requires_grad_()
        function(pixels).square().sum().backward()
        return pixels.grad

    for scope in ("image", "call"):
        with fs_plugins.enable(model, **SMOOTHING | {"noise_scope": scope}):
            wanted = gradient(served)
        with fs_plugins.enable(model, **SMOOTHING | {"noise_scope": scope}):
            got = gradient(lambda pixels: checkpoint(served, pixels, use_reentrant=reentrant))
            # The other kind leaves by an exception, out of our hook, as soon as it has what backward needs.
            assert calls(model) == 1 + reentrant
            assert torch.equal(family.ask(model), family.smoothed) == (scope == "image")
        assert close(got, wanted) == (scope == "image")


# PEFT

BESIDE = {"target_modules": r".*(text|language)_model.*q_proj"}
WITHIN = {"target_modules": r".*(vision_model|vision_tower|visual).*(q_proj|qkv)", "init_lora_weights": False}


def lora(model: nn.Module, **options: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, **options)).eval()


@both_orders
@all_families
def test_the_copy_of_the_tower_that_peft_trains_is_smoothed(name, order):
    family = subject(name)
    model = family.put(order, partial(lora, **BESIDE, modules_to_save=[TOWERS[name]]))
    own = family.build()
    copied = [parameter for name, parameter in model.named_parameters() if "modules_to_save" in name]
    with torch.no_grad():
        for parameter in [*copied, *fs_plugins.vision_call(own).module.parameters()]:
            parameter.mul_(1.2)
    plain, smoothed = family.both(own)
    assert torch.equal(family.ask(model), smoothed)
    with model.disable_adapter():
        assert torch.equal(family.ask(model), family.smoothed)
    assert calls(model) == 2
    fs_plugins.disable(model)
    assert torch.equal(family.ask(model), plain)


@both_orders
@pytest.mark.parametrize("options", [WITHIN, BESIDE], ids=["LoRA on the tower", "modules_to_save"])
@all_families
def test_merging_adapters_keeps_the_smoothing(name, options, order):
    family = subject(name)
    if options is BESIDE:
        options = {**BESIDE, "modules_to_save": [TOWERS[name]]}
    plain, smoothed = family.both(lora(family.build(), **options).merge_and_unload())
    model = family.put(order, partial(lora, **options))
    assert close(family.ask(model), smoothed)
    merged = model.merge_and_unload()
    assert torch.equal(family.ask(merged), smoothed)
    assert calls(merged) == 2
    fs_plugins.disable(merged)
    assert torch.equal(family.both(merged)[0], plain)
    assert torch.equal(family.both(merged)[1], smoothed)


# bitsandbytes

EIGHT = {"load_in_8bit": True}
FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}


@pytest.mark.parametrize("quantised", [EIGHT, FOUR], ids=["8-bit", "4-bit"])
def test_quantised_models(quantised, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

    family = subject(LLAVA)
    # Widths of whole blocks of 4-bit weights.
    text, vision = ({**sizes, "hidden_size": 64, "intermediate_size": 128} for sizes in (LLAMA, CLIP_VISION))
    layer = {"image_token_index": IMAGE, "vision_feature_layer": -2}
    full = make("LlavaForConditionalGeneration", text_config=text, vision_config=vision, **layer)()
    full.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**quantised)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path, quantization_config=config, device_map="cpu").eval()
    assert any(not p.is_floating_point() for p in fs_plugins.vision_call(model).module.parameters())

    with fs_plugins.enable(full, **SMOOTHING), fs_plugins.enable(model, **SMOOTHING):
        # bitsandbytes packs 4-bit weights for good at the first call without gradients, so gradients come first.
        gradients = [family.gradient(one).flatten() for one in (model, full)]
        assert torch.cosine_similarity(*gradients, dim=0) > 0.7
        smoothed, wanted = family.ask(model), family.ask(full)
        assert torch.equal(family.ask(model), smoothed)
        assert calls(model) == 3
    plain = family.ask(model)
    assert distance(smoothed, wanted) < 0.7 * distance(plain, wanted)
    with fs_plugins.enable(model, psm=None, sigma=0):
        assert torch.equal(family.ask(model), plain)
    assert torch.equal(family.ask(model), plain)


# torch's own wrappers and modes


@pytest.fixture
def group_of_one() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group_of_one")
@both_orders
@pytest.mark.parametrize("wrap", [nn.parallel.DistributedDataParallel, nn.DataParallel])
@all_families
def test_parallel_models(name, wrap, order):
    subject(name).check(subject(name).put(order, wrap))


def test_disabling_the_model_inside_a_wrapper_leaves_nothing_that_counts_later():
    wrapper = subject(CLIP).put("wrap, enable", nn.DataParallel)
    subject(CLIP).ask(wrapper)
    fs_plugins.disable(wrapper.module)
    with fs_plugins.enable(wrapper, **SMOOTHING):
        assert fs_plugins.status(wrapper).model_calls == 0


@all_families
def test_inference_mode_and_autocast(name):
    family = subject(name)
    model = family.build()
    with fs_plugins.enable(model, **SMOOTHING):
        wanted = family.gradient(model)
        with torch.inference_mode():
            assert torch.equal(family.ask(model), family.smoothed)
        assert torch.equal(family.gradient(model), wanted)
        assert calls(model) == 3
    with torch.autocast("cpu", torch.bfloat16):
        plain, smoothed = family.both(model)
        assert 0 < distance(smoothed.float(), family.smoothed) < 0.05
        with fs_plugins.enable(model, psm=None, sigma=0):
            assert torch.equal(family.ask(model), plain)


def test_a_psm_in_inference_mode_and_under_autocast():
    model, inputs = demo_llava()
    plain = model(**inputs).logits
    with fs_plugins.enable(model, **DRAWS):
        with torch.inference_mode():
            smoothed = model(**inputs).logits
            with torch.autocast("cpu", torch.bfloat16):
                rough = model(**inputs).logits
        pixels = inputs["pixel_values"].requires_grad_()
        wide = model(**inputs).logits
        wide.square().sum().backward()
        assert calls(model) == 3
    assert close(wide, smoothed)
    assert (pixels.grad != 0).float().mean() > 0.99
    assert 0 < distance(rough, smoothed) < 0.2 * distance(smoothed, plain)


def test_a_psm_copied_to_another_device_in_inference_mode_serves_gradients_later():
    smoother = fs_plugins.enable(demo_llava()[0], **DRAWS).smoothers[0]
    # Not equal to "cpu", so it is another device to us and the same to torch.
    device = torch.device("cpu", 0)
    with torch.inference_mode():
        smoother._psm_on(device)
    images = torch.rand(1, 3, 64, 64, requires_grad=True)
    smoother._psm_on(device).purify(images, 0.25).sum().backward()
    assert images.grad.abs().sum() > 0
