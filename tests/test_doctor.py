from __future__ import annotations

import importlib.metadata
import types

import pytest
import torch
from support import make_llava
from typer.testing import CliRunner

from fs_plugins import doctor, hooks
from fs_plugins.cli import app


def told(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_frameworks_are_told_with_versions_or_their_absence():
    found = doctor.frameworks()
    assert list(found)[:3] == ["python", "fs-plugins", "torch"]
    adapters_are_for = {"transformers", "open_clip_torch", "open_flamingo", "llava-torch", "peft", "accelerate"}
    assert adapters_are_for | {"bitsandbytes", "diffusers"} <= set(found)
    assert found["torch"] == importlib.metadata.version("torch")
    assert found["transformers"] == importlib.metadata.version("transformers")
    if "open_flamingo" not in {d.metadata["Name"] for d in importlib.metadata.distributions()}:
        assert found["open_flamingo"] is None
        assert "open_flamingo not installed" in told()


def test_the_adapters_that_ship_are_listed_with_their_files():
    listed = {plugin.name: plugin for plugin in doctor.plugins()}
    assert {"hf_clip", "hf_multimodal", "openclip", "openflamingo", "llava_original"} <= set(listed)
    assert listed["openclip"].location.endswith("openclip.py")
    assert listed["openclip"].hooks == ("fs_packages", "fs_vision_call")
    assert listed["openclip"].distribution.startswith("fs-plugins ")
    assert all(plugin.problem is None for plugin in listed.values())


def test_plugins_that_are_off_or_broken_are_told_and_hide_no_other(monkeypatch):
    def entry(name, load):
        return types.SimpleNamespace(name=name, value=f"{name}_module", dist=None, load=load)

    def missing():
        raise ImportError("No module named 'flux_capacitor'")

    misspelled = types.ModuleType("misspelled")
    misspelled.fs_vision_cal = hooks.hookimpl(lambda model: None)
    real = importlib.metadata.entry_points(group=hooks.GROUP)
    monkeypatch.setattr(
        doctor,
        "entry_points",
        lambda group: [entry("broken", missing), entry("misspelled", lambda: misspelled), *real],
    )
    monkeypatch.setenv("FS_PLUGINS_DISABLE", "openclip")
    listed = {plugin.name: plugin.problem for plugin in doctor.plugins()}
    assert "flux_capacitor" in listed["broken"]
    assert "fs_vision_cal" in listed["misspelled"]
    assert "fs_vision_call" in listed["misspelled"], "both sides"
    assert listed["openclip"] == "turned off by FS_PLUGINS_DISABLE"
    assert listed["hf_clip"] is None
    assert "turned off by FS_PLUGINS_DISABLE" in told()


def test_doctor_says_who_claims_a_model_and_what_enable_would_find():
    answer = told("demo")
    for part in (
        "LlavaForConditionalGeneration",
        "claimed by hf_multimodal: Language models of transformers",
        "CLIPVisionModel, images 64x64",
        "the image processor of",
        "hidden_states[-2][1:]",
        "recognised demo-clip",
        "demo-clip (by its fingerprint): PSM, hidden_states[-2][1:], sigma 0.25 to 0.5, shipped package:demo/assets/"
        "psm-llava",
    ):
        assert part in answer


def test_doctor_says_which_psm_is_missing_for_an_unknown_encoder():
    llava = make_llava()
    del llava.image_processor
    found = doctor.diagnose(llava)
    (encoder,) = found.encoders
    assert found.problem is None
    assert encoder.recognised == ()
    assert "No PSM in the registry fits" in encoder.psm
    assert "'photo-light' stands in" in encoder.psm
    assert "the default of clip_vision_model" in encoder.pixels


def test_doctor_on_a_model_that_nobody_claims():
    found = doctor.diagnose(torch.nn.Linear(2, 2))
    assert found.encoders == ()
    assert "no adapter claims it" in found.problem


def test_one_adapter_can_be_asked_alone():
    result = CliRunner().invoke(app, ["doctor", "demo", "--adapter", "hf_any"])
    assert result.exit_code == 0
    assert "Untested family: a probe agreed" in " ".join(result.output.split())
    assert "hidden_states[-2][1:]" in result.output
    result = CliRunner().invoke(app, ["doctor", "demo", "--adapter", "timm"])
    assert result.exit_code == 2
    assert "no adapter claims it" in " ".join(result.output.split())
    result = CliRunner().invoke(app, ["doctor", "demo", "--adapter", "hf_amy"])
    assert result.exit_code == 2
    assert "No plugin is called 'hf_amy'; there are hf_any" in " ".join(result.output.split())
    result = CliRunner().invoke(app, ["doctor", "--adapter", "hf_any"])
    assert result.exit_code == 2


def test_doctor_changes_nothing(images):
    from support import llava_inputs

    llava = make_llava()
    with torch.no_grad():
        before = llava(**llava_inputs(images)).logits
        doctor.diagnose(llava)
        assert torch.equal(llava(**llava_inputs(images)).logits, before)


@pytest.mark.parametrize("name", ["./nowhere", "{folder}"])
def test_a_model_that_cannot_be_loaded_is_an_error_in_a_sentence(name, tmp_path):
    result = CliRunner().invoke(app, ["doctor", name.format(folder=tmp_path)])
    assert result.exit_code == 2
    assert "Cannot load" in result.output
    assert "Traceback" not in result.output
