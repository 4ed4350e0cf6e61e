"""What vLLM's processes are kept from, without vLLM: its places are called as it calls them."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import subprocess
import sys
import types
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fs_plugins
from fs_plugins import ModelError, PSMError, SettingError
from fs_plugins.patch import SmoothingEvent
from fs_plugins.vllm import VARIABLE, counts
from fs_plugins.vllm.guard import Guard, check, install, normalising
from fs_plugins.vllm.settings import Settings, parsed
from fs_plugins.vllm.worker import check_plain, check_sizes


def test_without_settings_nothing_is_said_and_left_out_they_are_those_of_enable():
    enable = inspect.signature(fs_plugins.enable).parameters
    shared = {one.name: one.default for one in fields(Settings) if one.name in enable}
    assert parsed("{}") == Settings()
    assert shared == {name: enable[name].default for name in shared}
    assert {one.name for one in fields(Settings)} - set(shared) == {"share_draws"}
    assert set(enable) - set(shared) == {"model", "processor"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("psm: auto", "is JSON"),
        ("[]", "is a JSON object"),
        ('{"sigmma": 0.25}', "no setting 'sigmma'. The settings are: psm, sigma"),
        ('{"n0": 0}', "n0 must be at least 1"),
        ('{"n0": 2.5}', "n0"),
        ('{"n0": true}', "n0 is no yes or no"),
        ('{"noise": "uniform"}', "noise"),
        ('{"noise_scope": "batch"}', "noise_scope"),
        ('{"share_draws": "sometimes"}', "share_draws"),
        ('{"sigma": 0}', "sigma must be a finite number > 0"),
        ('{"sigma": 64}', "did you mean 0.251"),
        ('{"sigma": NaN}', "sigma"),
        ('{"psm": null}', "needs a sigma"),
        ('{"psm": "none"}', "needs a sigma"),
    ],
)
def test_settings_that_cannot_be_used_are_a_sentence(text, says):
    with pytest.raises(SettingError, match=r"FS_PLUGINS|sigma|n0") as caught:
        parsed(text)
    assert says in str(caught.value)


@pytest.mark.parametrize("psm", ["nowhere", "./nowhere"])
def test_a_psm_that_is_not_there_is_refused_before_there_is_a_model(psm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PSMError):
        parsed(json.dumps({"psm": psm}))


@pytest.mark.parametrize("psm", ["auto", "robust", "photo-light", None])
def test_what_enable_takes_is_taken(psm):
    assert parsed(json.dumps({"psm": psm, "sigma": 0.25})).psm == psm


def test_features_made_otherwise_are_kept_under_another_name():
    others = [Settings(n0=2), Settings(sigma=0.5), Settings(psm="photo"), Settings(seed=0), Settings(noise="iid")]
    assert len({one.mark for one in [Settings(), *others]}) == 6
    assert Settings().mark == Settings().mark


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in (VARIABLE, counts.FOLDER)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**kept, **environment})


ASLEEP = """
import sys
from fs_plugins.vllm.plugin import register
register()
assert not {"torch", "vllm", "pydantic", "wrapt"} & set(sys.modules), sorted(sys.modules)
"""


@pytest.mark.parametrize("environment", [{}, {VARIABLE: ""}, {VARIABLE: " "}])
def test_it_sleeps_unless_it_is_asked_to_smooth(environment):
    done = run(ASLEEP, **environment)
    assert done.returncode == 0, done.stderr


def test_asked_with_nonsense_it_stops_the_process():
    done = run("from fs_plugins.vllm.plugin import register; register()", **{VARIABLE: '{"psm": 3}'})
    assert done.returncode == 1
    assert "FS_PLUGINS cannot be used: psm" in done.stderr


def test_vllm_finds_it_by_its_entry_point():
    (point,) = fs_plugins.hooks.entry_points(group="vllm.general_plugins", name="fs_plugins")
    assert point.value == "fs_plugins.vllm.plugin:register"


class Limits(SimpleNamespace):
    def get_limit_per_prompt(self, modality: str) -> int:
        return self.limits.get(modality, 0)


def config(**changed: Any) -> SimpleNamespace:
    """As much of a VllmConfig as is looked at, of a model that can be smoothed."""
    told: dict[str, Any] = {"limits": {"image": 1}, "enable_mm_embeds": False, "mm_processor_kwargs": None}
    whole = SimpleNamespace(
        model_config=SimpleNamespace(
            model="some/model",
            multimodal_config=Limits(**{**told, **{k: v for k, v in changed.items() if k in told}}),
            enable_prompt_embeds=changed.get("enable_prompt_embeds", False),
        ),
        compilation_config=SimpleNamespace(
            cudagraph_mm_encoder=changed.get("cudagraph_mm_encoder", False),
            compile_mm_encoder=changed.get("compile_mm_encoder", False),
        ),
        lora_config=changed.get("lora_config"),
    )
    if changed.get("text"):
        whole.model_config.multimodal_config = None
    return whole


def test_an_ordinary_configuration_passes():
    check(config())
    check(config(limits={"video": 1}))
    check(config(lora_config=SimpleNamespace(enable_tower_connector_lora=False)))


@pytest.mark.parametrize(
    ("changed", "kind", "says"),
    [
        ({"text": True}, ModelError, "reads text alone"),
        ({"limits": {}}, ModelError, "it is shown none"),
        ({"limits": {"audio": 3}}, ModelError, "looks at no images"),
        ({"enable_mm_embeds": True}, SettingError, "--enable-mm-embeds"),
        ({"enable_prompt_embeds": True}, SettingError, "--enable-prompt-embeds"),
        ({"cudagraph_mm_encoder": True}, SettingError, "cudagraph_mm_encoder"),
        ({"compile_mm_encoder": True}, SettingError, "compile_mm_encoder"),
        ({"lora_config": SimpleNamespace(enable_tower_connector_lora=True)}, SettingError, "tower_connector_lora"),
    ],
)
def test_what_goes_around_smoothing_is_refused(changed, kind, says):
    with pytest.raises(kind, match=says):
        check(config(**changed))


def test_another_front_end_is_refused(monkeypatch):
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(SettingError, match="VLLM_USE_RUST_FRONTEND"):
        check(config())


def test_the_configuration_is_checked_and_pixels_stay_numbers():
    made = config(mm_processor_kwargs={"image_std": [1, 1, 1]})
    made.model_config.multimodal_config.mm_device_do_normalize = True
    guard = Guard(Settings())
    assert guard.configured(lambda: made, None, (), {}) is made
    assert made.model_config.multimodal_config.mm_device_do_normalize is False
    assert guard.normalising == {"image_std": [1, 1, 1]}
    with pytest.raises(ModelError):
        guard.configured(lambda: config(text=True), None, (), {})


def named(guard: Guard) -> str:
    return guard.named(lambda mm_hash, lora: mm_hash, None, ("abc", None), {})


def test_a_pictures_features_are_kept_apart_from_those_made_otherwise():
    assert named(Guard(Settings())) == named(Guard(Settings())) == f"{Settings().mark}:abc"
    assert named(Guard(Settings(n0=2))) != named(Guard(Settings()))


def test_draws_that_are_not_shared_are_kept_under_a_name_of_their_own():
    guard = Guard(Settings(share_draws=False))
    assert named(guard) != named(guard)
    assert named(guard).endswith(":abc")


@pytest.mark.parametrize("told", [{"do_rescale": False}, {"images_kwargs": {"image_std": [1, 1, 1]}}])
def test_a_request_may_not_change_what_a_pixel_means(told):
    guard = Guard(Settings())
    guard.configured(config, None, (), {})
    inputs = SimpleNamespace(hf_processor_mm_kwargs={"size": {"height": 64}, "images_kwargs": {"size": 3}})
    guard.processed(lambda: None, inputs, (), {})
    inputs.hf_processor_mm_kwargs = told
    with pytest.raises(SettingError, match="normalised"):
        guard.processed(lambda: None, inputs, (), {})


def test_what_the_server_itself_says_of_normalisation_stays():
    guard = Guard(Settings())
    guard.configured(lambda: config(mm_processor_kwargs={"image_mean": [0, 0, 0]}), None, (), {})
    guard.processed(lambda: None, SimpleNamespace(hf_processor_mm_kwargs={"image_mean": [0, 0, 0]}), (), {})
    with pytest.raises(SettingError):
        guard.processed(lambda: None, SimpleNamespace(hf_processor_mm_kwargs={}), (), {})


def test_words_of_normalisation_are_found_at_every_depth():
    told = {"size": 1, "do_normalize": True, "images_kwargs": {"rescale_factor": 1, "size": 2}}
    assert normalising(told) == {"do_normalize": True, "images_kwargs.rescale_factor": 1}


class Asked:
    """An engine, or what runs its workers: what these say when they are asked."""

    def __init__(self, told: list[bool] | Exception) -> None:
        self.told, self.times = told, 0

    def collective_rpc(self, method: str) -> list[bool]:
        assert method == "fs_plugins_protected"
        self.times += 1
        if isinstance(self.told, Exception):
            raise self.told
        return self.told


class AskedLater(Asked):
    async def collective_rpc(self, method: str) -> list[bool]:
        return super().collective_rpc(method)


def opened(guard: Guard, told: list[bool] | Exception, *, times: int = 1, later: bool = False) -> Asked:
    async def tasks() -> tuple[str, ...]:
        return ("generate",)

    engine = AskedLater(told) if later else Asked(told)
    for _ in range(times):
        if later:
            assert asyncio.run(guard.opening_server(tasks, engine, (), {})) == ("generate",)
        else:
            assert guard.opening(lambda: ("generate",), engine, (), {}) == ("generate",)
    return engine


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("told", [[True, False], [False], [], NotImplementedError("no such method")])
def test_an_engine_whose_workers_do_not_smooth_takes_no_requests(told, later):
    with pytest.raises(ModelError, match="Is FS_PLUGINS set on every machine"):
        opened(Guard(Settings()), told, later=later)


@pytest.mark.parametrize("later", [False, True])
def test_an_engine_whose_workers_all_smooth_does_and_is_asked_once(later):
    assert opened(Guard(Settings()), [True, True], times=3, later=later).times == 1


def test_an_engine_does_not_start_whose_workers_do_not_smooth():
    guard = Guard(Settings())
    guard.started(lambda: None, Asked([True]), (), {})
    with pytest.raises(ModelError, match="1 of 2 workers of vLLM hold a model that is not smoothed"):
        guard.started(lambda: None, Asked([True, False]), (), {})


def test_a_worker_smooths_what_it_loads_and_says_so(monkeypatch):
    """Whatever it loads, and however often; a worker that is not made by vLLM's own code is asked in vain."""
    loaded = []
    worker = SimpleNamespace(load_model=lambda **options: loaded.append(options), vllm_config=config())
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    logger = types.ModuleType("vllm.logger")
    logger.init_logger = lambda name: SimpleNamespace(info=lambda *told: None)
    monkeypatch.setitem(sys.modules, "vllm.logger", logger)
    monkeypatch.setattr("fs_plugins.vllm.guard.protect", lambda worker, settings: loaded.append(settings) or worker)
    monkeypatch.setattr("fs_plugins.vllm.guard.is_protected", lambda worker: len(loaded) == 2)
    worker.status = lambda: "enabled"
    guard = Guard(Settings(n0=2))
    guard.made(lambda: None, worker, (), {})
    assert not worker.fs_plugins_protected()
    worker.load_model(load_dummy_weights=True)
    assert loaded == [{"load_dummy_weights": True}, Settings(n0=2)]
    assert worker.fs_plugins_protected()


def test_it_stands_where_vllm_comes_by_as_soon_as_that_is_imported(monkeypatch):
    """And not before: modules of these names are what is waited for."""
    for name in (VARIABLE, counts.FOLDER):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_RAY_EXTRA_ENV_VARS_TO_COPY", "MINE")
    made = types.ModuleType("vllm.v1.engine.input_processor")

    class InputProcessor:
        def _get_mm_identifier(self, mm_hash: str, lora: None) -> str:
            return mm_hash

    made.InputProcessor = InputProcessor
    with monkeypatch.context() as inside:
        inside.setitem(sys.modules, made.__name__, made)
        install('{"n0": 3}')
    assert InputProcessor()._get_mm_identifier("abc", None) == f"{Settings(n0=3).mark}:abc"
    assert os.environ["VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"] == "FS_PLUGINS,FS_PLUGINS_COUNTS,MINE"
    monkeypatch.delenv(counts.FOLDER)


def test_what_is_smoothed_is_counted_over_all_processes(monkeypatch, tmp_path):
    monkeypatch.setenv(counts.FOLDER, str(tmp_path))
    assert counts.totals() == dict.fromkeys(counts.NUMBERS, 0)
    tally = counts.Tally()
    for _ in range(2):
        tally.fs_after_smoothing(SmoothingEvent("vllm", images=3, n0=4, sigma=0.25, seconds=0.5, non_finite=1))
    np.array([1, 2, 3, 4], dtype=np.float64).tofile(tmp_path / "another")
    (tmp_path / "begun").write_bytes(b"")
    assert list(counts.totals().values()) == [7, 26, 4, 6]


class Quantised(nn.Linear):
    quant_method = type("Fp8LinearMethod", (), {})()


class Plain(nn.Linear):
    quant_method = type("UnquantizedLinearMethod", (), {})()


def test_a_quantised_encoder_is_refused_by_name():
    tower = nn.Sequential(Plain(2, 2), nn.Sequential(Quantised(2, 2)))
    call = SimpleNamespace(module=tower)
    with pytest.raises(ModelError, match=r"quantised \(1.0: Fp8LinearMethod\)"):
        check_plain(call)
    check_plain(SimpleNamespace(module=tower[0]))
    tower[0].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match="quantised"):
        check_plain(call)


class StageMissingLayer(nn.Module):
    """vLLM's own is called so."""


def test_an_encoder_that_vllm_left_out_is_no_encoder():
    with pytest.raises(ModelError, match="nothing to smooth: allow images"):
        check_plain(SimpleNamespace(module=StageMissingLayer()))


@pytest.mark.parametrize(
    ("size", "mapped", "fits"), [(None, ("tokens",), False), (None, (), True), ((64, 64), ("tokens",), True)]
)
def test_a_psm_that_would_have_to_refuse_pictures_is_refused_itself(size, mapped, fits):
    psm = SimpleNamespace(mapped=mapped, config=SimpleNamespace(name="mine"))
    smoother = SimpleNamespace(call=SimpleNamespace(image_size=size), psm=psm)
    if fits:
        check_sizes(smoother)
        check_sizes(SimpleNamespace(call=smoother.call, psm=None))
        return
    with pytest.raises(PSMError, match="would end the whole engine"):
        check_sizes(smoother)
