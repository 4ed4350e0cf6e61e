"""A family of transformers that nobody has tested: what the probe finds, and the ways around that it refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from fs_plugins.adapters import hf_any, hf_multimodal
from support import llava_inputs, make_classifier, make_llava

import fs_plugins
from fs_plugins import ModelError, doctor
from fs_plugins.demo import assets
from fs_plugins.hf.load import load_model, load_processor
from fs_plugins.plugins import claim
from fs_plugins.probing import probe

pytestmark = pytest.mark.filterwarnings("ignore::fs_plugins.FSPluginsWarning")


def planted(base: type, **methods: object) -> type:
    """A class of transformers that no adapter declares."""
    return type("Newcomer", (base,), {"__module__": "transformers.models.newcomer", **methods})


def newcomer(**changes):
    """A LLaVA by another name."""
    import transformers

    llava = make_llava(**changes)
    llava.__class__ = planted(transformers.LlavaForConditionalGeneration)
    return llava


@pytest.fixture
def undeclared(monkeypatch):
    """LLaVA's own declaration is not there, nor is that of classes that derive from it."""
    kept = tuple(family for family in hf_multimodal.FAMILIES if "Llava" not in family.models)
    monkeypatch.setattr(hf_multimodal, "FAMILIES", kept)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}, ["hidden_states[-2][1:]"]),
        ({"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}, ["hidden_states[-1]"]),
        (
            {"vision_feature_layer": [-2, 1], "vision_feature_select_strategy": "default"},
            ["hidden_states[-2][1:]", "hidden_states[1][1:]"],
        ),
    ],
)
def test_the_probe_finds_what_is_declared_for_a_tested_family(changes, names):
    llava = make_llava(**changes)
    found = claim(llava, "hf_any")[1]
    assert [readout.name for call in found for readout in call.readouts] == names
    assert names == [readout.name for call in claim(llava)[1] for readout in call.readouts]


@pytest.mark.usefixtures("undeclared")
def test_a_newcomer_is_claimed_by_name_alone_and_said_to_be_untested(images):
    model = newcomer()
    with pytest.raises(ModelError, match=r"Newcomer.*Nobody has tested this family.*adapter='hf_any'"):
        fs_plugins.enable(model, psm=None, sigma=0.25)
    with torch.no_grad():
        before = model(**llava_inputs(images)).logits
        with fs_plugins.enable(model, psm=None, sigma=0.25, adapter="hf_any") as handle:
            assert not torch.equal(model(**llava_inputs(images)).logits, before)
            assert "untested family" in str(handle.status())
            assert not handle.status().vision[0].tested
        assert torch.equal(model(**llava_inputs(images)).logits, before)


def test_a_tested_family_is_not_called_untested():
    with fs_plugins.enable(make_llava(), psm=None, sigma=0.25) as handle:
        assert "untested" not in str(handle.status())


def test_the_models_own_processor_makes_the_pictures():
    model, processor = load_model("demo"), load_processor("demo")
    asked = []

    class Watched:
        tokenizer, chat_template, image_token = processor.tokenizer, processor.chat_template, processor.image_token
        image_processor = processor.image_processor
        apply_chat_template = staticmethod(processor.apply_chat_template)

        def __call__(self, **given):
            asked.append(given["text"])
            return processor(**given)

    call = fs_plugins.vision_call(model, processor=Watched(), adapter="hf_any")
    assert [readout.name for readout in call.readouts] == [
        readout.name for readout in fs_plugins.vision_call(model).readouts
    ]
    assert len(asked) == 2
    assert "What is this?" in asked[0][0]
    assert assets.PSM_LLAVA.is_dir()


def around_by_pixels(self, pixel_values=None, **given):
    output = self.before(pixel_values=pixel_values, **given)
    output.logits = output.logits + pixel_values.mean()
    return output


def around_by_another_layer(self, pixel_values=None, **given):
    seen = []
    first = self.model.vision_tower.encoder.layers[0] if hasattr(self.model.vision_tower, "encoder") else None
    first = first or self.model.vision_tower.vision_model.encoder.layers[0]
    handle = first.register_forward_hook(lambda module, args, output: seen.append(output))
    output = self.before(pixel_values=pixel_values, **given)
    handle.remove()
    value = seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0]
    output.logits = output.logits + value.mean()
    return output


def around_the_hooks(self, pixel_values=None, **given):
    tower = self.model.vision_tower
    self.model.__dict__["vision_tower"] = SimpleNamespace(config=tower.config, __call__=None)
    del self.model.__dict__["vision_tower"]
    called, tower.__class__.__call__ = (
        tower.__class__.__call__,
        lambda own, *args, **kwargs: own.forward(*args, **kwargs),
    )
    try:
        return self.before(pixel_values=pixel_values, **given)
    finally:
        tower.__class__.__call__ = called


def blind(self, pixel_values=None, **given):
    return self.before(pixel_values=0 * pixel_values, **given)


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (around_by_pixels, "takes more from a picture than"),
        (around_by_another_layer, "takes more from a picture than"),
        (around_the_hooks, "was not called as a module"),
        (blind, "answers alike whatever picture"),
    ],
)
@pytest.mark.usefixtures("undeclared")
def test_a_planted_way_around_is_refused(forward, words, images):
    import transformers

    model = make_llava()
    base = transformers.LlavaForConditionalGeneration
    model.__class__ = planted(base, before=base.forward, forward=forward)
    with pytest.raises(ModelError, match=words):
        fs_plugins.enable(model, psm=None, sigma=0.25, adapter="hf_any")
    assert not fs_plugins.status(model).enabled


@pytest.mark.parametrize(
    ("forward", "words"), [(around_by_pixels, "takes more"), (around_by_another_layer, "takes more")]
)
def test_probe_refuses_what_an_adapter_overlooks(forward, words, images):
    """As users call it: two inputs of their own, and the adapter's answer."""
    import transformers

    model, base = make_llava(), transformers.LlavaForConditionalGeneration
    one, other = llava_inputs(images), llava_inputs(1 - images)
    probe(model, one, other)
    with fs_plugins.enable(model, psm=None, sigma=0.25):
        probe(model, one, other)
    model.__class__ = planted(base, before=base.forward, forward=forward)
    with pytest.raises(ModelError, match=words):
        fs_plugins.probe(model, one, other)


def test_two_towers_cannot_be_told_apart_by_pictures():
    from test_families import video_llava

    with pytest.raises(ModelError, match=r"looks with CLIPVisionModel and CLIPVisionModel.*adapter of its own"):
        claim(video_llava(), "hf_any")


def test_a_class_that_cannot_be_covered_says_why(monkeypatch):
    model = newcomer()
    monkeypatch.setitem(hf_multimodal.REFUSED, "Newcomer", "it has no eyes")
    monkeypatch.setattr(hf_multimodal, "FAMILIES", ())
    for adapter in (None, "hf_any"):
        with pytest.raises(ModelError, match="Newcomer cannot be smoothed: it has no eyes"):
            fs_plugins.enable(model, psm=None, sigma=0.25, adapter=adapter)
    assert "it has no eyes" in doctor.diagnose(model).problem


def test_what_has_no_vision_encoder_is_not_offered_a_probe():
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=16
    )
    for model in (torch.nn.Linear(2, 2).eval(), transformers.LlamaForCausalLM(config).eval()):
        with pytest.raises(ModelError, match="about 40 lines") as error:
            fs_plugins.enable(model, psm=None, sigma=0.25)
        assert "hf_any" not in str(error.value).partition(").")[2]


def test_image_classifiers_are_left_to_their_own_adapter():
    assert hf_any.fs_unclaimed(make_classifier()) is None
