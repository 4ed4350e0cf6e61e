from __future__ import annotations

import copy
import types
from collections import namedtuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import TinyEncoder, make_llava, randomise

from fs_plugins import ModelError, PixelError, PixelSpace, Readout, SettingError
from fs_plugins.identity import fingerprint, has_adapters, same_encoder
from fs_plugins.vision import Field, is_a, map_tensors, unwrapped

CLIP = PixelSpace((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@given(
    st.lists(st.floats(0, 1), min_size=3, max_size=3),
    st.lists(st.floats(0.05, 2), min_size=3, max_size=3),
    st.integers(0, 1000),
)
def test_to_unit_and_from_unit_are_inverse_up_to_rounding(mean, std, seed):
    space = PixelSpace(tuple(mean), tuple(std))
    images = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    assert (space.to_unit(space.from_unit(images, torch.float32)) - images).abs().max() < 1e-6
    assert (space.to_unit(space.from_unit(images, torch.float64)) - images).abs().max() < 1e-6


def test_to_unit_is_the_processors_normalisation_undone():
    pixels = (torch.full((1, 3, 1, 1), 0.5) - torch.tensor(CLIP.mean).view(3, 1, 1)) / torch.tensor(CLIP.std).view(
        3, 1, 1
    )
    assert torch.allclose(CLIP.to_unit(pixels), torch.full((1, 3, 1, 1), 0.5))
    assert CLIP.to_unit(pixels.bfloat16()).dtype == torch.float32
    assert CLIP.from_unit(torch.rand(1, 3, 2, 2), torch.bfloat16).dtype == torch.bfloat16


def test_pixel_space_reads_a_processor_and_says_what_it_misses():
    plain = types.SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    assert PixelSpace.from_processor(types.SimpleNamespace(image_processor=plain)).mean == (0.5, 0.5, 0.5)
    unnormalised = types.SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.5] * 3, do_normalize=False)
    assert PixelSpace.from_processor(unnormalised).std == (1.0, 1.0, 1.0)
    with pytest.raises(SettingError, match="image_mean"):
        PixelSpace.from_processor(object())
    with pytest.raises(SettingError, match="do_rescale=False"):
        PixelSpace.from_processor(types.SimpleNamespace(image_mean=[0.5], image_std=[0.5], do_rescale=False))
    with pytest.raises(SettingError, match="instead of 1/255"):
        PixelSpace.from_processor(types.SimpleNamespace(image_mean=[0.5], image_std=[0.5], rescale_factor=1 / 127.5))
    with pytest.raises(SettingError, match="positive"):
        PixelSpace((0.5,), (0.0,))
    with pytest.raises(SettingError, match="one mean and one std"):
        PixelSpace((0.5,), (0.1, 0.2))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        ([1.0], "must be a tensor"),
        (torch.zeros(3, 8, 8), r"must be \(images, 3, height, width\)"),
        (torch.zeros(1, 1, 8, 8), "must be"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "floating point"),
        (torch.full((1, 3, 8, 8), float("nan")), "NaN"),
        (torch.full((1, 3, 8, 8), float("inf")), "NaN or infinite"),
        (torch.full((1, 3, 8, 8), 255.0), r"instead of \[0, 1\]"),
    ],
)
def test_impossible_pixels_are_refused(pixels, message):
    def check():
        CLIP.check(pixels)
        CLIP.check_range(CLIP.to_unit(pixels))

    with pytest.raises(PixelError, match=message):
        check()


def test_pixels_a_little_out_of_range_are_warned_about_and_honest_ones_are_not():
    images = torch.rand(1, 3, 8, 8)
    assert CLIP.check_range(CLIP.to_unit(CLIP.from_unit(images, torch.float32))) is None
    assert CLIP.check_range(CLIP.to_unit(CLIP.from_unit(images, torch.bfloat16))) is None
    assert "a little outside" in str(CLIP.check_range(images * 1.2 - 0.1))


Pair = namedtuple("Pair", "pooled layers")


def outputs():
    layers = (torch.arange(12.0).view(1, 4, 3), torch.ones(1, 4, 3))
    return [
        {"pooled": torch.zeros(1, 3), "layers": layers},
        (torch.zeros(1, 3), layers),
        Pair(torch.zeros(1, 3), list(layers)),
    ]


@pytest.mark.parametrize("output", outputs(), ids=["mapping", "tuple", "namedtuple"])
def test_readouts_get_and_put_without_touching_the_original(output):
    readout = Readout("layers[-2][1:]", (Field("layers", 1), -2), width=3, tokens=3, skip=1)
    before = copy.deepcopy(output)
    assert torch.equal(readout.get(output), torch.arange(12.0).view(1, 4, 3)[:, 1:])
    changed = readout.put(output, torch.full((1, 3, 3), 7.0))
    assert type(changed) is type(output)
    assert torch.equal(readout.get(changed), torch.full((1, 3, 3), 7.0))
    layers = changed["layers"] if isinstance(changed, dict) else changed[1]
    assert torch.equal(layers[-2][:, 0], torch.tensor([[0.0, 1.0, 2.0]])), "the skipped class token stays"
    assert torch.equal(layers[-1], torch.ones(1, 4, 3))
    map_tensors([before, output], lambda pair: torch.testing.assert_close(*pair))


def test_readouts_work_on_transformers_outputs():
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    output = BaseModelOutputWithPooling(pooler_output=torch.zeros(2, 3), hidden_states=(torch.zeros(2, 4, 3),) * 2)
    changed = Readout("pooler_output", (Field("pooler_output", 1),), width=3).put(output, torch.ones(2, 3))
    assert isinstance(changed, BaseModelOutputWithPooling)
    assert torch.equal(changed.pooler_output, torch.ones(2, 3))
    assert torch.equal(output.pooler_output, torch.zeros(2, 3))
    assert changed.last_hidden_state is None


@pytest.mark.parametrize("output", [{}, (), {"layers": None}, {"layers": (torch.zeros(1),)}])
def test_a_missing_readout_says_how_to_get_it(output):
    with pytest.raises(ModelError, match="output_hidden_states"):
        Readout("layers[-2]", (Field("layers", 1), -2), width=3).get(output)


def test_fingerprint_knows_an_encoder_in_any_precision_and_no_other():
    one = TinyEncoder(seed=1)
    own = fingerprint(one)
    assert same_encoder(own, fingerprint(copy.deepcopy(one).half()))
    assert same_encoder(own, fingerprint(copy.deepcopy(one).bfloat16()))
    assert not same_encoder(own, fingerprint(TinyEncoder(seed=2)))


def test_fingerprint_tells_fine_tuning_from_rounding():
    tower = make_llava().model.vision_tower
    tuned = copy.deepcopy(tower)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(0.03 * p.abs().mean() * torch.randn(p.shape, generator=generator))
    assert same_encoder(fingerprint(tower), fingerprint(copy.deepcopy(tower).bfloat16()))
    assert not same_encoder(fingerprint(tower), fingerprint(tuned))


def test_fingerprint_needs_real_weights():
    with pytest.raises(ModelError, match="meta device"):
        fingerprint(torch.nn.Linear(2, 2, device="meta"))
    quantised = torch.nn.Linear(2, 2)
    quantised.weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match="quantised"):
        fingerprint(quantised)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["vision_tower"]}])
def test_wrappers_change_neither_the_model_found_nor_its_fingerprint(options):
    peft = pytest.importorskip("peft")
    llava = make_llava()
    own = fingerprint(llava.model.vision_tower)
    wrapped = peft.get_peft_model(llava, peft.LoraConfig(target_modules=["q_proj"], r=2, **options))
    found = unwrapped(torch.compile(wrapped))
    assert found is llava
    assert same_encoder(own, fingerprint(found.model.vision_tower))
    assert has_adapters(found.model.vision_tower) == (not options)


def test_is_a_asks_by_package_and_base_class():
    class Mine(type(make_llava())):
        pass

    mine = Mine.__new__(Mine)
    assert is_a(mine, "transformers", "LlavaForConditionalGeneration")
    assert not is_a(randomise(TinyEncoder()), "transformers", "TinyEncoder")
