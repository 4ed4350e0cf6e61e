"""What stands between transformers' server and a model, tried without a server: none is installed here."""

from __future__ import annotations

import inspect
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import fs_plugins
from fs_plugins import ModelError, PSMError, SettingError
from fs_plugins.cli import app
from fs_plugins.cli.serve import TRIED
from fs_plugins.demo import assets

pytest.importorskip("transformers.cli.serving")

from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import BaseHandler, GenerationState

from fs_plugins.hf import serving


@pytest.fixture(scope="module")
def served():
    return serving.smoothed("demo", n0=1)


@pytest.fixture
def handler(served, monkeypatch):
    """What every route of transformers' asks for a model."""
    monkeypatch.setitem(sys.modules, "fastapi", SimpleNamespace(HTTPException=RuntimeError))
    return BaseHandler(serving.OneModel(served), GenerationState())


def test_handlers_are_given_the_smoothed_model(served, handler):
    for body in ({}, {"model": "demo"}):
        name, model, processor = handler._resolve_model(body)
        assert model is served.model
        assert processor is served.processor
        assert name == "demo@main"
    assert fs_plugins.status(served.model).enabled


def test_transformers_server_asks_for_models_where_we_stand():
    """``load_model_and_processor`` is all that its handlers and routes call, and ``_load_model`` all that loads.

    It is no public interface. Where this fails, read ``transformers.cli.serving`` again: a server that finds another
    way to a model serves it unprotected.
    """
    ours, theirs = (
        list(inspect.signature(kind.load_model_and_processor).parameters) for kind in (serving.OneModel, ModelManager)
    )
    assert ours == theirs
    package = Path(inspect.getfile(ModelManager)).parent
    loads = sum(path.read_text("utf-8").count(".from_pretrained(") for path in package.glob("*.py"))
    ways = (ModelManager._load_model, ModelManager._load_processor)
    assert loads == sum(inspect.getsource(way).count(".from_pretrained(") for way in ways)
    assert "self.model_manager.load_model_and_processor(" in inspect.getsource(BaseHandler._resolve_model)
    assert "self.load_model_and_processor," in inspect.getsource(ModelManager.load_model_streaming)


@pytest.mark.parametrize("name", ["gpt2", "demo@main@main", "demo@v2", "demo:q4.gguf"])
def test_another_model_is_refused_not_loaded(handler, name, monkeypatch):
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *args, **kwargs: pytest.fail("it loads"))
    manager = handler.model_manager
    repository, _, file = name.partition(":")
    with pytest.raises(SettingError, match="This server has 'demo' alone"):
        manager.load_model_and_processor(manager.process_model_name(repository), gguf_file=file or None)
    with pytest.raises(SettingError, match="loads no other model"):
        manager._load_model(name)


def test_the_model_stays_when_models_are_to_be_unloaded(served, handler):
    handler.model_manager.shutdown()
    assert handler._resolve_model({})[1] is served.model


def test_the_list_of_models_has_this_one(handler):
    assert [one["id"] for one in handler.model_manager.get_gen_models()] == ["demo"]


def test_continuous_batching_and_compilation_are_off(served):
    state = GenerationState()
    assert not state.use_continuous_batching(served.model, None)
    assert not state._compile


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"psm": str(assets.PSM_CLIP)}, PSMError, "maps readout"),
        ({"psm": "none"}, SettingError, "sigma"),
        ({"psm": "none", "sigma": 0.0}, SettingError, "sigma 0 adds no noise"),
        ({"sigma": -1.0}, SettingError, "sigma"),
        ({"n0": 0}, SettingError, "n0"),
        ({"name": "demo-clip"}, ModelError, "Cannot load 'demo-clip' as an image-text-to-text model"),
        ({"processor": "demo-clip"}, ModelError, "no chat template"),
    ],
)
def test_what_would_not_be_protected_is_refused_at_the_start(settings, error, says):
    with pytest.raises(error, match=says):
        serving.smoothed(**{"name": "demo", **settings})


def test_a_model_that_nobody_claims_is_refused(monkeypatch):
    loaded = torch.nn.Linear(2, 2).eval(), SimpleNamespace(chat_template="{{ messages }}")
    monkeypatch.setattr(serving, "load_chat", lambda name, processor: loaded)
    with pytest.raises(ModelError, match="claims"):
        serving.smoothed("unknown")


def test_addresses():
    with serving.bound("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        assert serving.address(first) == f"http://127.0.0.1:{port}"
        first.listen()
        with pytest.raises(SettingError, match=f"host '127.0.0.1', port {port}: Address already in use"):
            serving.bound("127.0.0.1", port)
    for host in ("203.0.113.7", "a\x00b", "x" * 300, "..", "\udcff"):
        with pytest.raises(SettingError, match="Give another --host"):
            serving.bound(host, 0)
    if socket.has_ipv6:
        with serving.bound("::1", 0) as at:
            assert serving.address(at).startswith("http://[::1]:")


def test_the_command_refuses_a_server_that_nobody_tried(monkeypatch):
    command = sys.modules["fs_plugins.cli.serve"]  # the package has the function under this name
    monkeypatch.setattr("fs_plugins.cli.base.missing", lambda *packages: [])
    for found in ("5.24.0", "4.57.6", "5.170.0"):
        monkeypatch.setattr(command, "version", lambda name, found=found: found)
        answered = CliRunner().invoke(app, ["serve", "demo"], env={"COLUMNS": "400"})
        assert answered.exit_code == 2
        assert f"it is tried with {TRIED}, and {found} is installed" in answered.output


def test_the_version_that_is_tried_is_the_one_of_the_extra_and_of_the_constraints():
    root = Path(__file__).parents[2]
    major, minor = map(int, TRIED.split("."))
    assert f'"transformers[serving]>={TRIED},<{major}.{minor + 1}"' in (root / "pyproject.toml").read_text("utf-8")
    assert f"\ntransformers=={TRIED}." in (root / "constraints.txt").read_text("utf-8")


def test_the_command_says_what_it_needs(monkeypatch):
    monkeypatch.setattr("fs_plugins.cli.base.missing", lambda *packages: ["uvicorn"])
    answered = CliRunner().invoke(app, ["serve", "demo"], env={"COLUMNS": "200"})
    assert answered.exit_code == 2
    assert 'needs uvicorn: pip install "fs-plugins[serve]"' in answered.output
