"""What a model's digest is of: packed and quantised weights too, and whatever else a state dict holds."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from support import TinyEncoder, make_psm, pixels_of, tiny_call
from torch import nn

import fs_plugins
from fs_plugins import ModelError, Readout, SettingError
from fs_plugins.attacks import attack
from fs_plugins.contents import is_plain
from fs_plugins.identity import digest, fingerprint, is_readable, packed
from fs_plugins.training import TrainingConfig, train_psm
from fs_plugins.vision import Field, LinearEmbedding

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch")

PLAIN = {"psm": None, "sigma": 0.25}


def quantised(model: nn.Module, *kinds: type[nn.Module], dtype: torch.dtype = torch.qint8) -> nn.Module:
    """By ``quantize_dynamic``, every Linear if nothing is said."""
    return torch.ao.quantization.quantize_dynamic(model, set(kinds or (nn.Linear,)), dtype=dtype)


class Extra(nn.Module):
    """Ordinary weights, the same in all, and something beside them."""

    def __init__(self, kept: object) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.kept = kept

    def get_extra_state(self) -> object:
        return self.kept

    def set_extra_state(self, state: object) -> None:
        self.kept = state


def per_channel(weight: torch.Tensor) -> torch.Tensor:
    scales = torch.linspace(0.01, 0.02, len(weight))
    return torch.quantize_per_channel(weight, scales, torch.zeros(len(weight), dtype=torch.long), 0, torch.qint8)


def with_buffer(value: torch.Tensor) -> nn.Module:
    module = nn.Module()
    module.register_buffer("value", value)
    return module


def two(value: torch.Tensor, other: torch.Tensor) -> nn.Module:
    """A tensor made of two, as torchao's are."""
    from torch.testing._internal.two_tensor import TwoTensor

    module = nn.Module()
    module.weight = nn.Parameter(TwoTensor(value, other), requires_grad=False)
    return module


# A number -> a module in which that number is somewhere that is no plain tensor of a state dict.
HIDDEN = {
    "Linear, int8": lambda n: quantised(nn.Sequential(nn.Linear(4, 3))),
    "Linear, fp16": lambda n: quantised(nn.Sequential(nn.Linear(4, 3)), dtype=torch.float16),
    "LSTM": lambda n: quantised(nn.Sequential(nn.LSTM(3, 3)), nn.LSTM),
    "GRU cell": lambda n: quantised(nn.Sequential(nn.GRUCell(3, 3)), nn.GRUCell),
    "convolution": lambda n: torch.ao.nn.quantized.Conv2d(3, 4, 1).requires_grad_(False),
    "per tensor": lambda n: with_buffer(torch.quantize_per_tensor(torch.randn(4, 3), 0.1, 0, torch.qint8)),
    "only the scale": lambda n: with_buffer(torch.quantize_per_tensor(torch.zeros(4), 0.1 + n, 0, torch.qint8)),
    "per channel": lambda n: with_buffer(per_channel(torch.randn(4, 3))),
    "a tensor of tensors": lambda n: two(torch.ones(3), torch.randn(3)),
    "a number": lambda n: Extra(n),
    "a tensor": lambda n: Extra(torch.full((2,), float(n))),
    "bytes": lambda n: Extra(bytes([n])),
    "a tree": lambda n: Extra({"a": [torch.ones(2), (n, "b")], "c": {1.5, None, f"{n}"}, "d": torch.float16}),
    "an object": lambda n: Extra(torch.Generator().manual_seed(n).get_state()),
    "numpy": lambda n: Extra(torch.full((2,), float(n)).numpy()),
    "a path": lambda n: Extra(Path(str(n))),
}


def built(kind: str, number: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(number)
        return HIDDEN[kind](number)


@pytest.mark.parametrize("kind", HIDDEN)
def test_what_no_plain_tensor_holds_is_digested_too(kind):
    one, again, other = built(kind, 1), built(kind, 1), built(kind, 2)
    if kind == "convolution":
        for module, seed in ((one, 1), (again, 1), (other, 2)):
            weight = torch.randn(4, 3, 1, 1, generator=torch.Generator().manual_seed(seed))
            module.set_weight_bias(torch.quantize_per_tensor(weight, 0.05, 0, torch.qint8), None)
    assert digest(one) == digest(again) == digest(copy.deepcopy(one))
    assert digest(one) != digest(other)


def test_another_process_finds_the_same_digests():
    here = {kind: digest(built(kind, 1)) for kind in HIDDEN if kind != "convolution"}
    program = (
        "import json, sys, warnings; warnings.simplefilter('ignore'); import test_identity as t\n"
        "print(json.dumps({k: t.digest(t.built(k, 1)) for k in t.HIDDEN if k != 'convolution'}))"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "5"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert json.loads(done.stdout.splitlines()[-1]) == here, done.stderr


def test_digests_of_ordinary_models_are_what_they_were(llava):
    """Ledgers hold them."""
    found = hashlib.sha256()
    for name, tensor in sorted(llava.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    assert digest(llava) == found.hexdigest()
    assert digest(nn.BatchNorm1d(2)) == "a7f01c1627ba1c6e109af0136ae08d882d8745ec3137a568806935cc01eb019f"
    assert digest(nn.Linear(2, 2, device="meta")) == digest(nn.Linear(2, 2, device="meta"))


def test_what_cannot_be_written_down_is_refused_by_its_name():
    cycle: list[object] = []
    cycle.append(cycle)
    for kept in (threading.Lock(), (i for i in range(3)), cycle):
        with pytest.raises(ModelError, match=r"_extra_state of the model is a .*cannot be read"):
            digest(nn.Sequential(Extra(kept)))


def test_extra_state_beside_ordinary_weights_does_not_hide_them():
    encoder = TinyEncoder()
    own = fingerprint(encoder)
    encoder.add_module("beside", Extra({"amax": torch.ones(2), "note": b"x"}))
    del encoder.beside.weight
    assert "beside._extra_state" in encoder.state_dict()
    assert is_readable(encoder)
    assert fingerprint(encoder) == own
    assert not packed(encoder)


@pytest.mark.parametrize("kind", ["Linear, int8", "Linear, fp16", "LSTM", "convolution", "per channel"])
def test_packed_weights_are_no_fingerprint(kind):
    module = built(kind, 1)
    assert packed(module)
    assert not is_readable(module)
    with pytest.raises(ModelError, match=r"quantised or sharded \(.*Pass psm="):
        fingerprint(module)


def test_tensors_of_tensors_are_no_fingerprint_and_may_have_gradients():
    module = two(torch.ones(3), torch.ones(3))
    assert not is_plain(module.weight)
    assert not is_readable(module)
    assert not packed(module)


# All verbs on a quantised encoder.


@pytest.fixture
def small(clip) -> nn.Module:
    """CLIP with every Linear packed, that of its projection too."""
    return quantised(clip)


def test_a_quantised_encoder_is_smoothed_and_certified(small, images, tmp_path):
    with torch.no_grad(), fs_plugins.enable(small, **PLAIN, n0=3) as handle:
        assert small.get_image_features(pixel_values=pixels_of(images)) is not None
        assert handle.status().vision[0].draws == 9
    with pytest.warns(fs_plugins.FSPluginsWarning, match="stands in"), fs_plugins.enable(small) as handle:
        assert handle.status().vision[0].psm == "photo-light"
    rows = tmp_path / "rows.jsonl"
    settings = {"n": 60, **PLAIN, "seed": 1}
    first = fs_plugins.certify(small, images, **settings, out=rows)
    assert fs_plugins.certify(small, images, **settings, out=rows) == first
    assert len(rows.read_text(encoding="utf-8").splitlines()) == 1 + len(images)


def test_rows_of_another_quantised_encoder_are_not_taken_for_this_ones(clip, images, tmp_path):
    other = copy.deepcopy(clip)
    with torch.no_grad():
        other.vision_model.encoder.layers[0].mlp.fc1.weight.mul_(-1)
    fs_plugins.certify(quantised(clip), images, n=60, **PLAIN, seed=1, out=tmp_path / "rows.jsonl")
    with pytest.raises(SettingError, match="encoder"):
        fs_plugins.certify(quantised(other), images, n=60, **PLAIN, seed=1, out=tmp_path / "rows.jsonl")


def test_an_encoder_without_a_single_parameter_is_served(images):
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3 * 16 * 16, 5)

        def forward(self, pixel_values):
            return {"embedding": self.linear(pixel_values.flatten(1))}

    encoder = quantised(Bare().eval())
    assert not list(encoder.parameters())
    projection = quantised(nn.Sequential(nn.Linear(5, 4, bias=False)).eval())
    readout = Readout("embedding", (Field("embedding", 0),), width=5, tokens=0)
    call = tiny_call(encoder, readouts=(readout,), image_size=(16, 16), embed=LinearEmbedding("embedding", projection))
    assert (call.device.type, call.dtype) == ("cpu", torch.float32)
    assert len(fs_plugins.certify(call, images, n=60, **PLAIN)) == 3


@pytest.mark.parametrize("smoothed", [False, True])
def test_a_gradient_that_does_not_flow_is_said_before_the_first_step(small, images, smoothed):
    """Around the packed weights some gradient does flow, and an attack that follows it is weak."""
    victim = fs_plugins.smoothers(small, **PLAIN)[0] if smoothed else small
    with pytest.raises(ModelError, match=r"quantised \(.*_packed_params.*square"):
        attack(victim, images, steps=2)
    found = attack(victim, images, steps=3, method="square")
    assert 0 < float((found - images).abs().max()) <= 16 / 255 + 1e-6


def test_a_psm_is_trained_for_the_encoder_before_it_was_quantised(small, clip, images):
    with pytest.raises(ModelError, match=r"quantised.*Train for the encoder that it was made from"):
        train_psm(small, images, TrainingConfig(), name="x", encoder="x")
    psm = make_psm(fs_plugins.vision_call(clip))
    with fs_plugins.enable(small, psm=psm) as handle:
        assert handle.status().vision[0].psm == "random"
