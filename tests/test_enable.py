from __future__ import annotations

import copy
import pickle
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import yaml
from support import llava_inputs, make_llava, make_psm, pixels_of

import fs_plugins
from fs_plugins import FSPluginsWarning, ModelError, PixelError, PSMError, RegistryError, SettingError, registry
from fs_plugins.demo import assets
from fs_plugins.patch import hooks_of


def consumed(llava, images) -> torch.Tensor:
    """What the language model is given."""
    with torch.no_grad():
        output = llava.get_image_features(pixel_values=pixels_of(images))
    return torch.stack(list(getattr(output, "pooler_output", output)))


def logits(llava, images) -> torch.Tensor:
    with torch.no_grad():
        return llava(**llava_inputs(images)).logits


PLAIN = {"psm": None, "sigma": 0.25}


def test_sigma_zero_without_psm_is_bit_for_bit_the_model(llava, images):
    before = logits(llava, images)
    with fs_plugins.enable(llava, psm=None, sigma=0):
        assert torch.equal(logits(llava, images), before)


def test_the_forced_full_path_at_sigma_zero_agrees_to_rounding(llava, images, monkeypatch):
    before = logits(llava, images)
    monkeypatch.setattr(fs_plugins.FeatureSmoother, "is_identity", False)
    with fs_plugins.enable(llava, psm=None, sigma=0, n0=3) as handle:
        assert (logits(llava, images) - before).abs().max() < 1e-5 * before.abs().max()
        assert handle.status().vision[0].draws == 9


def test_disable_restores_bit_for_bit_and_leaves_no_trace(llava, images):
    before, keys = logits(llava, images), list(llava.state_dict())
    hooked = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in llava.modules()]
    with fs_plugins.enable(llava, psm=make_psm(fs_plugins.vision_call(llava))):
        assert not torch.equal(logits(llava, images), before)
        assert list(llava.state_dict()) == keys
    assert torch.equal(logits(llava, images), before)
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in llava.modules()] == hooked
    for module in llava.modules():
        assert not module._forward_pre_hooks_with_kwargs or module._forward_pre_hooks
        assert not module._forward_hooks_always_called or module._forward_hooks


def test_an_exception_inside_the_tower_leaves_everything_in_order(llava, images):
    before = logits(llava, images)
    layer = (
        llava.model.vision_tower.encoder.layers[1]
        if hasattr(llava.model.vision_tower, "encoder")
        else (llava.model.vision_tower.vision_model.encoder.layers[1])
    )

    def fail(*_):
        raise RuntimeError("inside the tower")

    handle = fs_plugins.enable(llava, **PLAIN, seed=1)
    bomb = layer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="inside the tower"):
        logits(llava, images)
    bomb.remove()
    smoothed = logits(llava, images)
    assert handle.status().vision[0].calls == 1
    handle.disable()
    assert torch.equal(logits(llava, images), before)
    with fs_plugins.enable(llava, **PLAIN, seed=1):
        logits(llava, images)
        assert torch.equal(logits(llava, images), smoothed), "the failed call had taken the first draws, no more"


def test_what_the_language_model_consumes_is_the_served_feature(llava, images):
    psm = make_psm(fs_plugins.vision_call(llava))
    with fs_plugins.enable(llava, psm=psm, seed=3) as handle, torch.no_grad():
        wanted = copy.deepcopy(handle.smoothers[0]).smooth(images)["hidden_states[-2][1:]"]
        assert torch.allclose(consumed(llava, images), llava.model.multi_modal_projector(wanted), atol=1e-4)


def test_clip_zero_shot_serves_the_mean_unit_projection(clip, images):
    psm = make_psm(fs_plugins.vision_call(clip))
    with fs_plugins.enable(clip, psm=psm, seed=3) as handle, torch.no_grad():
        pooled = copy.deepcopy(handle.smoothers[0]).smooth(images)["pooler_output"]
        ids = torch.tensor([[1, 4, 39]])
        got = clip(input_ids=ids, pixel_values=pixels_of(images)).image_embeds
        wanted = torch.nn.functional.normalize(clip.visual_projection(pooled), dim=-1)
        assert torch.allclose(got, wanted, atol=1e-5)


def test_vision_models_are_claimed_alone(images):
    from support import knowing, randomise, vision_config
    from transformers import CLIPVisionModel, CLIPVisionModelWithProjection

    for kind in (CLIPVisionModel, CLIPVisionModelWithProjection):
        model = knowing(randomise(kind(vision_config())))
        with torch.no_grad():
            before = model(pixels_of(images))[0]
            with fs_plugins.enable(model, **PLAIN) as handle:
                assert not torch.equal(model(pixel_values=pixels_of(images))[0], before)
                model(pixels_of(images), return_dict=False)
                assert handle.status().vision[0].calls == 2
            assert torch.equal(model(pixels_of(images))[0], before)


def test_several_layers_and_full_strategy_have_a_readout_each(images):
    llava = make_llava(vision_feature_layer=[-2, -1], vision_feature_select_strategy="full", image_seq_length=17)
    call = fs_plugins.vision_call(llava)
    assert [r.name for r in call.readouts] == ["hidden_states[-2]", "hidden_states[-1]"]
    with fs_plugins.enable(llava, psm=make_psm(call)) as handle, torch.no_grad():
        llava(**llava_inputs(images, tokens=17))
        assert handle.status().vision[0].calls == 1


def test_generate_calls_the_tower_once_and_status_counts(llava, images):
    with fs_plugins.enable(llava, **PLAIN, n0=3) as handle:
        llava.generate(**llava_inputs(images), max_new_tokens=4, do_sample=False, suppress_tokens=[30])
        seen = handle.status().vision[0]
        assert (seen.calls, seen.images, seen.draws, seen.non_finite) == (1, 3, 9, 0)
        llava.generate(**llava_inputs(images), max_new_tokens=4, num_beams=2, do_sample=False, suppress_tokens=[30])
        assert handle.status().vision[0].calls == 2


def test_status_of_a_bypassed_encoder_warns(llava, images):
    with fs_plugins.enable(llava, **PLAIN) as handle:

        class Bypass(list):  # a list on transformers 4, an output with a field on 5
            pooler_output = property(list)

        llava.model.get_image_features = lambda **_: Bypass(torch.zeros(len(images), 16, 32))
        logits(llava, images)
        with pytest.warns(FSPluginsWarning, match="never smoothed"):
            assert "never smoothed" in str(handle.status())


def test_status_speaks_to_people(llava, images):
    assert "not enabled" in str(fs_plugins.status(llava))
    with fs_plugins.enable(llava, **PLAIN) as handle:
        logits(llava, images)
        told = str(handle.status())
        for part in (
            "CLIPVisionModel",
            "hf_multimodal",
            "plain smoothing",
            "sigma 0.25",
            "n0 4",
            "no mapper",
            "1 smoothed calls",
        ):
            assert part in told


def test_gradients_reach_the_pixels_through_the_whole_model(llava, images):
    inputs = llava_inputs(images)
    inputs["pixel_values"].requires_grad_(True)
    with fs_plugins.enable(llava, psm=make_psm(fs_plugins.vision_call(llava)), n0=2, chunk_size=3):
        llava(**inputs).logits.square().sum().backward()
    assert (inputs["pixel_values"].grad != 0).float().mean() > 0.99


def test_no_graph_is_built_where_nobody_asked_for_one(llava, images):
    with fs_plugins.enable(llava, psm=make_psm(fs_plugins.vision_call(llava))), torch.no_grad():
        assert not llava(**llava_inputs(images)).logits.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite_and_close(llava, images, dtype):
    psm = make_psm(fs_plugins.vision_call(llava))
    with fs_plugins.enable(llava, psm=psm, seed=1):
        wide = consumed(llava, images)
    half = copy.deepcopy(llava).to(dtype)
    with fs_plugins.enable(half, psm=psm, seed=1), torch.no_grad():
        output = half.get_image_features(pixel_values=pixels_of(images).to(dtype))
        got = torch.stack(list(getattr(output, "pooler_output", output)))
    assert got.dtype == dtype
    assert got.isfinite().all()
    assert (got.float() - wide).norm() < 0.1 * wide.norm()


def test_deepcopy_is_enabled_on_its_own_tower(llava, images):
    fs_plugins.enable(llava, **PLAIN, seed=1)
    twin = copy.deepcopy(llava)
    with torch.no_grad():
        for p in twin.model.vision_tower.parameters():
            p.zero_()
    assert hooks_of(twin)[0][0].smoother.call.module is twin.model.vision_tower
    assert not torch.equal(consumed(twin, images), consumed(llava, images))
    fs_plugins.disable(twin)
    assert fs_plugins.status(llava).enabled
    fs_plugins.disable(llava)


def test_pickle_keeps_the_protection(images):
    llava = make_llava()
    fs_plugins.enable(llava, psm=make_psm(fs_plugins.vision_call(llava)), seed=1)
    twin = pickle.loads(pickle.dumps(llava))
    assert fs_plugins.status(twin).enabled
    assert torch.equal(consumed(twin, images), consumed(llava, images))


def test_saving_and_reloading_drops_the_protection_as_documented(llava, tmp_path):
    fs_plugins.enable(llava, **PLAIN)
    llava.save_pretrained(tmp_path)
    assert not fs_plugins.status(type(llava).from_pretrained(tmp_path)).enabled


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["vision_tower"]}])
@pytest.mark.parametrize("order", ["wrap, enable", "enable, wrap"])
def test_peft_models_are_smoothed(images, options, order):
    peft = pytest.importorskip("peft")
    llava = make_llava()
    config = peft.LoraConfig(target_modules=r".*language_model.*q_proj", r=2, **options)
    if order == "wrap, enable":
        model = peft.get_peft_model(llava, config).eval()
        fs_plugins.enable(model, **PLAIN)
    else:
        fs_plugins.enable(llava, **PLAIN)
        model = peft.get_peft_model(llava, config).eval()
    with torch.no_grad():
        model(**llava_inputs(images))
    assert sum(v.calls for v in fs_plugins.status(model).vision) == 1
    fs_plugins.disable(model)
    assert not fs_plugins.status(model).enabled


def test_clip_in_peft_is_smoothed(clip, images):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(clip, peft.LoraConfig(target_modules=r".*text_model.*q_proj", r=2)).eval()
    ids = torch.tensor([[1, 4, 39]])
    with fs_plugins.enable(model, psm=make_psm(fs_plugins.vision_call(model))) as handle, torch.no_grad():
        model(input_ids=ids, pixel_values=pixels_of(images))
        assert handle.status().vision[0].calls == 1


def test_draws_are_fresh_per_call_or_fixed_per_image(llava, images):
    with fs_plugins.enable(llava, **PLAIN):
        assert not torch.equal(consumed(llava, images), consumed(llava, images))
    with fs_plugins.enable(llava, **PLAIN, noise_scope="image"):
        assert torch.equal(consumed(llava, images), consumed(llava, images))
        repeated = consumed(llava, images[[0, 0, 1]])
        assert torch.allclose(repeated[0], repeated[1], atol=1e-5)
        assert not torch.allclose(repeated[0], repeated[2], atol=1e-2)


def test_lora_on_the_tower_is_smoothed_and_mentioned(images):
    peft = pytest.importorskip("peft")
    llava = make_llava()
    psm = make_psm(fs_plugins.vision_call(llava))
    model = peft.get_peft_model(llava, peft.LoraConfig(target_modules=["q_proj"], r=2)).eval()
    with pytest.warns(FSPluginsWarning, match="LoRA"):
        fs_plugins.enable(model, psm=psm)
    with torch.no_grad():
        model(**llava_inputs(images))
    assert fs_plugins.status(model).vision[0].calls == 1


def test_threads_do_not_disturb_each_other(llava, images):
    with fs_plugins.enable(llava, **PLAIN, noise_scope="image", seed=1, chunk_size=2) as handle:
        wanted = [consumed(llava, images[i : i + 1]) for i in range(3)]
        wrong: list[int] = []

        def work(i: int) -> None:
            for _ in range(5):
                if not torch.allclose(consumed(llava, images[i : i + 1]), wanted[i], atol=1e-5):
                    wrong.append(i)

        threads = [threading.Thread(target=work, args=(i % 3,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert handle.status().vision[0].calls == 3 + 8 * 5


@pytest.mark.slow
def test_twelve_threads_of_six_hundred_calls_each_get_their_own_answer(llava, images):
    call = fs_plugins.vision_call(llava)
    pixels = [pixels_of(images[i : i + 1]) for i in range(3)]
    with fs_plugins.enable(llava, **PLAIN, noise_scope="image", seed=1, n0=2, chunk_size=1) as handle, torch.no_grad():

        def ask(i: int) -> torch.Tensor:
            return call.module(pixels[i], output_hidden_states=True).hidden_states[-2]

        wanted = [ask(i) for i in range(3)]

        def work(i: int) -> int:
            with torch.no_grad():
                return sum(not torch.allclose(ask(i), wanted[i], atol=1e-5) for _ in range(600))

        with ThreadPoolExecutor(12) as pool:
            assert list(pool.map(work, [i % 3 for i in range(12)])) == [0] * 12
        seen = handle.status().vision[0]
        assert (seen.calls, seen.images, seen.draws) == (7203, 7203, 14406)


def test_second_enable_and_disable_without_enable_are_errors(llava):
    with fs_plugins.enable(llava, **PLAIN) as handle:
        with pytest.raises(ModelError, match="already"):
            fs_plugins.enable(llava, **PLAIN)
        handle.disable()
        with pytest.raises(ModelError, match="not enabled"):
            fs_plugins.disable(llava)


def hook_count(model) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"psm": None}, SettingError, "needs a sigma"),
        ({"psm": None, "sigma": -1}, SettingError, "sigma"),
        ({"sigma": "loud"}, SettingError, "finite"),
        ({"psm": None, "sigma": float("nan")}, SettingError, "finite"),
        ({"psm": None, "sigma": 64}, SettingError, "did you mean 0.251"),
        ({"psm": None, "sigma": 0.25, "n0": 0}, SettingError, "n0"),
        ({"psm": None, "sigma": 0.25, "noise": "halton"}, SettingError, "noise"),
        ({"psm": 3}, SettingError, "psm must be"),
        ({"psm": "auto", "sigma": 0.7}, RegistryError, "psm=None"),
        ({"psm": "./nowhere"}, PSMError, "No PSM folder"),
        ({"psm": None, "sigma": 0.25, "processor": object()}, SettingError, "image_mean"),
        ({"psm": None, "sigma": 0.25, "adapter": "nobody"}, fs_plugins.PluginError, "nobody"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_attached(llava, options, error, message):
    before = hook_count(llava)
    with pytest.raises(error, match=message):
        fs_plugins.enable(llava, **options)
    assert hook_count(llava) == before


def test_no_psm_error_names_what_exists_and_how_to_train_one(llava):
    with pytest.raises(RegistryError) as error:
        fs_plugins.enable(llava, sigma=0.7)
    for part in ("demo-clip", "hidden_states[-2][1:]", "fs-plugins train", "psm=None"):
        assert part in str(error.value)


def test_an_encoder_without_a_psm_gets_the_photo_purifier_and_one_warning(llava, images):
    with pytest.warns(FSPluginsWarning) as told:
        handle = fs_plugins.enable(llava)
    assert len(told) == 1
    assert told[0].filename == __file__
    for part in (
        "No PSM in the registry fits this encoder",
        "'photo-light' stands in",
        "fs-plugins train PHOTOS",
        "psm='photo-light'",
    ):
        assert part in str(told[0].message)
    (vision,) = handle.status().vision
    assert (vision.psm, vision.purifier, vision.sigma) == ("photo-light", "unet", 0.125)
    assert not any(readout.mapped for readout in vision.readouts)
    handle.disable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fs_plugins.enable(llava, psm="photo-light", seed=3) as asked, torch.no_grad():
            served = consumed(llava, images)
            assert asked.status().vision[0].images == len(images)
    with pytest.warns(FSPluginsWarning, match="stands in"), fs_plugins.enable(llava, seed=3), torch.no_grad():
        assert torch.equal(consumed(llava, images), served)


def test_a_certificate_of_an_encoder_without_a_psm_is_the_photo_purifiers(llava, images):
    with pytest.warns(FSPluginsWarning, match="stands in") as told:
        (one,) = fs_plugins.certify(llava, images[:1], n=20, seed=0)
    assert told[0].filename == __file__
    (same,) = fs_plugins.certify(llava, images[:1], n=20, seed=0, psm="photo-light")
    assert one == same


def test_a_damaged_psm_is_an_error_and_nothing_stands_in_for_it(tmp_path, monkeypatch):
    from transformers import CLIPModel

    (tmp_path / "psm").mkdir()
    for name in ("config.json", "psm.safetensors"):
        (tmp_path / "psm" / name).write_bytes((assets.PSM_CLIP / name).read_bytes() + b" ")
    known = yaml.safe_load(registry.shipped_path().read_text("utf-8"))
    for psm in known["encoders"]["demo-clip"]["psms"]:
        psm.update(state="folder", path=str(tmp_path / "psm"))
    (tmp_path / "registry.yaml").write_text(yaml.safe_dump(known), "utf-8")
    monkeypatch.setenv(registry.USER, str(tmp_path / "registry.yaml"))
    clip = CLIPModel.from_pretrained(assets.CLIP).eval()
    with pytest.raises(PSMError, match="does not have the registry's checksum"):
        fs_plugins.enable(clip)
    assert hook_count(clip) == 0


def test_an_encoder_of_other_than_colour_images_is_told_to_go_without_a_psm():
    from support import vision_config
    from transformers import CLIPVisionModel

    gray = CLIPVisionModel(vision_config(num_channels=1)).eval()
    space = fs_plugins.PixelSpace((0.5,), (0.5,), source="this test")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RegistryError, match="pass psm=None with a sigma"):
            fs_plugins.enable(gray, processor=space)
        with pytest.raises(PSMError, match=r"1 channels\. Pass psm=None"):
            fs_plugins.enable(gray, processor=space, psm="photo")


def test_an_encoder_in_double_precision_is_served_too(images):
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(assets.CLIP).eval()
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) - 0.5
    # The tower alone: transformers 4's text model builds a mask that overflows in double precision.
    with fs_plugins.enable(clip, seed=0), torch.no_grad():
        single = clip.vision_model(pixels).pooler_output
    with fs_plugins.enable(clip.double(), seed=0), torch.no_grad():
        double = clip.vision_model(pixels.double()).pooler_output
    assert double.dtype == torch.float64
    assert torch.allclose(double.float(), single, atol=1e-4)


def test_names_are_looked_up_and_paths_are_not(llava, monkeypatch):
    with pytest.raises(
        PSMError, match=r"No PSM folder at 'fotos', and the registry has no purifier of that name.*photo"
    ):
        fs_plugins.enable(llava, psm="fotos")
    monkeypatch.setenv(registry.USER, "/nowhere.yaml")
    with fs_plugins.enable(llava, psm=str(registry.shipped().place("photo", "package:psm/photo"))) as handle:
        assert handle.status().vision[0].psm == "photo", "a path needs no registry"


def test_a_quantised_encoder_is_served_by_the_photo_purifier():
    """It cannot be recognised, which is no reason to leave it unprotected."""
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(assets.CLIP).eval()
    with fs_plugins.enable(clip) as handle:
        assert handle.status().vision[0].psm == "demo-psm-clip"
    clip.vision_model.register_parameter("packed", torch.nn.Parameter(torch.zeros(2).byte(), requires_grad=False))
    with pytest.warns(FSPluginsWarning, match="weights are quantised.*stands in"), fs_plugins.enable(clip) as handle:
        assert handle.status().vision[0].psm == "photo-light"


def test_models_in_training_mode_and_strange_objects_are_refused(llava):
    with pytest.raises(ModelError, match=r"model\.eval\(\)"):
        fs_plugins.enable(llava.train(), **PLAIN)
    with pytest.raises(ModelError, match=r"No adapter claims torch\.nn\.modules\.linear\.Linear"):
        fs_plugins.enable(torch.nn.Linear(2, 2).eval(), **PLAIN)
    with pytest.raises(ModelError, match=r"torch\.nn\.Module"):
        fs_plugins.enable("llava", **PLAIN)


def test_training_mode_after_enable_is_warned_about_once(llava, images):
    with fs_plugins.enable(llava, **PLAIN):
        llava.train()
        with pytest.warns(FSPluginsWarning, match="training mode"):
            consumed(llava, images)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            consumed(llava, images)


def test_bad_pixels_are_refused_at_the_call_and_the_next_call_is_fine(llava, images):
    with fs_plugins.enable(llava, **PLAIN) as handle:
        for wrong in (images * 255, images * float("nan")):
            with pytest.raises(PixelError):
                consumed(llava, wrong)
        consumed(llava, images)
        assert handle.status().vision[0].calls == 1


def test_a_call_that_was_refused_is_no_bypass(llava, images):
    with fs_plugins.enable(llava, **PLAIN) as handle:
        with pytest.raises(PixelError):
            logits(llava, images * 255)
        assert not handle.status().warnings


def test_another_resolution_is_refused_where_a_psm_is_tied_to_one(llava):
    psm = make_psm(fs_plugins.vision_call(llava))
    with fs_plugins.enable(llava, psm=psm), pytest.raises(PixelError, match="24x24"):
        llava.model.vision_tower(pixels_of(torch.rand(1, 3, 24, 24)), interpolate_pos_encoding=True)


def test_a_psm_of_another_encoder_is_used_but_said(llava, images):
    psm = make_psm(fs_plugins.vision_call(llava), fingerprint=(0.0,) * 16)
    with pytest.warns(FSPluginsWarning, match="weights are others"):
        fs_plugins.enable(llava, psm=psm)


def test_a_processor_overrides_the_pixel_space(llava, images):
    space = fs_plugins.PixelSpace((0.5,) * 3, (0.5,) * 3)
    with fs_plugins.enable(llava, **PLAIN, processor=space) as handle, torch.no_grad():
        llava.model.vision_tower(space.from_unit(images, torch.float32))
        assert handle.status().vision[0].pixels == "given by hand"
        assert handle.smoothers[0].call.pixels.mean == (0.5, 0.5, 0.5)


def test_a_direct_call_of_the_tower_gets_its_hidden_states_asked_for(llava, images):
    with fs_plugins.enable(llava, **PLAIN) as handle, torch.no_grad():
        output = llava.model.vision_tower(pixels_of(images))
        assert handle.status().vision[0].calls == 1
        assert output.hidden_states[-2].shape == (3, 17, 32)


def test_text_only_calls_pass_through(llava):
    ids = torch.tensor([[1, 4, 5]])
    with fs_plugins.enable(llava, **PLAIN) as handle, torch.no_grad():
        llava(input_ids=ids)
        told = handle.status()
        assert (told.model_calls, told.vision[0].calls, told.warnings) == (0, 0, ())


def test_importing_and_asking_the_adapters_imports_no_framework():
    import subprocess
    import sys

    code = """
import sys, fs_plugins, torch
try:
    fs_plugins.vision_call(torch.nn.Linear(2, 2))
except fs_plugins.ModelError:
    pass
frameworks = ("transformers", "diffusers", "peft", "accelerate", "open_clip", "open_flamingo", "llava", "torchvision")
print([name for name in frameworks if name in sys.modules])
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
