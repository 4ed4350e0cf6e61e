"""Configurations that somebody else wrote: refused in words before memory or time is spent on them."""

from __future__ import annotations

import json
import math
from contextlib import suppress

import pytest
import torch
from guided_diffusion import TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import make_psm
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fs_plugins import PSM, FSPluginsError, PSMError
from fs_plugins.psm import Part, PSMConfig
from fs_plugins.psm.lora import LoRAPurifier
from fs_plugins.training.settings import Settings
from fs_plugins.training.start import configured

NUMBERS = [-1, 0, 0.5, math.nan, math.inf, True, None, "8", [8], {}, 10**6, 2**31, 2**63, 10**30]
LISTS = [
    [],
    [-8],
    [0],
    [8.0],
    [8, None],
    [True, 8],
    ["8"],
    [math.nan],
    8,
    None,
    "88",
    {"8": 8},
    [8] * 3000,
    [2**40] * 2,
]
WRONG = {
    "unet": {"channels": LISTS, "layers": NUMBERS, "unshuffle": NUMBERS, "attention": [0, 1, "yes", None, [True]]},
    "diffusion": {
        "channels": [*LISTS, [40]],
        "layers": NUMBERS,
        "attention": [[-1], [6], [0.5], ["0"], [True], [None], 3, [3] * 3000 + [7]],
        "head_dim": NUMBERS,
    },
    "residual": {"width": NUMBERS, "blocks": NUMBERS, "heads": NUMBERS, "ratio": NUMBERS},
    "lora": {"rank": NUMBERS, "sha256": ["../../x", "A" * 64, 5, None], "base": [5, None, "/nowhere"]},
}
FIT = {
    "unet": {"channels": [8, 16], "unshuffle": 2},
    "diffusion": dict(TINY),
    "residual": {"width": 6, "heads": 2},
    "lora": {"base": "/nowhere", "sha256": "a" * 64},
}
CASES = [(kind, name, value) for kind, names in WRONG.items() for name, values in names.items() for value in values]


class Watch(TorchDispatchMode):
    """What is made for real, and how many layers."""

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        self.largest, self.layers = 0, 0
        real = nn.Module.__init__

        def counted(module, *args, **kwargs):
            self.layers += 1
            return real(module, *args, **kwargs)

        monkeypatch.setattr(nn.Module, "__init__", counted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, list | tuple) else [made]:
            if isinstance(one, torch.Tensor) and not one.is_meta:
                self.largest = max(self.largest, one.numel())
        return made


class Plugins(nn.Module):
    """A mapper with a number of its own, which no file has."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("own", torch.full((width,), 3.0), persistent=False)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, z, sigma):
        return z * self.scale * self.own


@pytest.fixture
def folder(call, tmp_path):
    make_psm(call).save_pretrained(tmp_path / "psm")
    return tmp_path / "psm"


def rewritten(folder, kind, args) -> None:
    told = json.loads((folder / "config.json").read_text("utf-8"))
    part = {"kind": kind, "args": args}
    if kind == "residual":
        told["readouts"][0]["mapper"] = part
    else:
        told["purifier"] = part
    (folder / "config.json").write_text(json.dumps(told), "utf-8")


@pytest.mark.parametrize(("kind", "name", "value"), CASES, ids=lambda value: repr(value)[:12])
def test_wrong_arguments_are_refused_before_anything_is_built(folder, monkeypatch, kind, name, value):
    rewritten(folder, kind, FIT[kind] | {name: value})
    for added in ({}, {"mappers": {"plugins": Plugins}}):
        with Watch(monkeypatch) as watch, pytest.raises(PSMError, match=f"{kind}|does not hold the weights"):
            PSM.from_pretrained(folder, **added)
        assert watch.largest < 100_000
        assert watch.layers < 3_000


def test_sizes_that_the_file_does_not_have_are_refused_without_memory_for_them(folder, monkeypatch):
    for kind, args in (
        ("unet", {"channels": [1024, 1024]}),
        ("unet", {"channels": [64] * 7, "layers": 32, "unshuffle": 4}),
        ("residual", {"width": 1024, "blocks": 32}),
        ("diffusion", {}),
    ):
        rewritten(folder, kind, args)
        with Watch(monkeypatch) as watch, pytest.raises(PSMError, match="does not hold the weights") as told:
            PSM.from_pretrained(folder, mappers={"plugins": Plugins})
        assert watch.largest < 100_000
        assert len(str(told.value)) < 2000


def test_what_would_not_fit_any_machine_is_not_built_for_training(monkeypatch):
    with Watch(monkeypatch) as watch:
        for kind, args in (
            ("unet", {"channels": [65536, 65536]}),
            ("diffusion", {"channels": [32768], "attention": []}),
        ):
            part = Part(kind=kind, args=args)
            config = {"name": "x", "sigma": 0.25, "sigma_range": (0.25, 0.25), "image_size": None, "encoder": "any"}
            with pytest.raises(PSMError, match="at most 1,073,741,824 are built"):
                PSM(PSMConfig(**config, purifier=part, fingerprint=()))
    assert watch.largest < 100_000


@pytest.mark.parametrize("rank", [-1, 0, 513, True, 0.5])
def test_ranks_are_checked_before_the_base_is_read(rank):
    with pytest.raises(FSPluginsError, match="rank"):
        LoRAPurifier(base="/nowhere", sha256="a" * 64, rank=rank)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"channels": [8], "channels": [16]}', "'channels' is given twice"),
        ("[" * 5000, "nested too deeply"),
        ('{"layers": ' + "9" * 5000 + "}", "4300"),
        ("[1]", "JSON object"),
        ("{", "is JSON"),
    ],
    ids=lambda text: text[:12],
)
def test_arguments_that_are_no_json_are_refused(text, message):
    for name in ("purifier_args", "mapper_args"):
        with pytest.raises(FSPluginsError, match=f"--{name.replace('_', '-')} .*{message}"):
            configured(Settings(**{name: text}))


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
values = st.recursive(
    plain, lambda inside: st.lists(inside) | st.dictionaries(st.text(max_size=5), inside), max_leaves=9
)


@given(
    st.sampled_from(["sigma", "sigma_range", "image_size", "readouts", "purifier", "fingerprint", "name", "format"]),
    values,
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_configuration_says_is_read_or_refused_in_words(folder, name, value):
    before = (folder / "config.json").read_text("utf-8")
    try:
        (folder / "config.json").write_text(json.dumps({**json.loads(before), name: value}), "utf-8")
        with suppress(PSMError):
            PSM.from_pretrained(folder)
    finally:
        (folder / "config.json").write_text(before, "utf-8")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a PSM configuration"),
        (b"\xff\xfe", "utf-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"sigma": ' + b"9" * 5000 + b"}", "4300"),
        (b'{"sigma": 0.25, "sigma": 0.5}', "'sigma' is given twice"),
        (b"[]", "valid dictionary"),
        (b" " * (2 << 20), "longer than 1,048,576 bytes"),
    ],
    ids=lambda data: data[:12],
)
def test_files_that_are_no_configuration_are_named(folder, data, message):
    (folder / "config.json").write_bytes(data)
    with pytest.raises(PSMError, match=rf"config\.json is not a PSM configuration: .*{message}|{message}"):
        PSM.from_pretrained(folder)


def test_readouts_are_counted(folder):
    told = json.loads((folder / "config.json").read_text("utf-8"))
    told["readouts"] *= 33
    (folder / "config.json").write_text(json.dumps(told), "utf-8")
    with pytest.raises(PSMError, match=r"readouts: .* at most 32 items"):
        PSM.from_pretrained(folder)


def test_a_plugins_part_keeps_what_no_file_has_beside_parts_of_ours(call, tmp_path):
    psm = make_psm(call)
    spec = psm.config.readouts[0].model_copy(update={"mapper": Part(kind="plugins", args={"width": 6})})
    made = PSM(psm.config.model_copy(update={"readouts": (spec,)}), mappers={"plugins": Plugins})
    made.save_pretrained(tmp_path / "psm")
    again = PSM.from_pretrained(tmp_path / "psm", mappers={"plugins": Plugins})
    assert not any(value.is_meta for value in [*again.parameters(), *again.buffers()])
    assert torch.equal(again.map("tokens", torch.ones(1, 4, 6), 0.25), torch.full((1, 4, 6), 3.0))
