"""torch.compile and smoothing: compiled code sees it come and go, and nobody else's code is touched."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from support import llava_inputs, pixels_of
from torch import nn

import fs_plugins

PLAIN = {"psm": None, "sigma": 0.25}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@dataclass
class Compilations:
    """A backend that counts what it is asked to compile."""

    count: int = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


def test_a_models_twin_that_was_compiled_first_does_not_run_it_unsmoothed(llava, images):
    """Dynamo tells models of one class apart by what it checks, and by default it checks no hooks."""

    twin = copy.deepcopy(llava)
    compilations = Compilations()
    ours, theirs = (torch.compile(one, backend=compilations) for one in (llava, twin))
    inputs = llava_inputs(images)
    with fs_plugins.enable(llava, **PLAIN) as handle, torch.no_grad():
        plain = theirs(**inputs).logits
        smoothed = ours(**inputs).logits
        assert handle.status().vision[0].calls == 1
        assert not torch.allclose(plain, smoothed, atol=1e-3)
        assert torch.equal(theirs(**inputs).logits, plain)
        assert handle.status().vision[0].calls == 1
    with torch.no_grad():
        assert torch.allclose(ours(**inputs).logits, plain, atol=1e-5)


def test_enabling_leaves_the_compiled_code_of_other_models_alone(clip, llava, images):

    compilations = Compilations()
    other = torch.compile(nn.Sequential(nn.Linear(4, 4), nn.GELU()).eval(), backend=compilations)
    with torch.no_grad():
        other(torch.ones(2, 4))
        before = compilations.count
        assert before
        with fs_plugins.enable(llava, **PLAIN):
            llava(**llava_inputs(images))
            other(torch.ones(2, 4))
        other(torch.ones(2, 4))
    assert compilations.count == before


def test_a_compiled_function_around_a_model_sees_smoothing_come_and_go(clip, images):

    @torch.compile(backend="eager")
    def embed(pixels):
        return clip.get_image_features(pixel_values=pixels)

    pixels = pixels_of(images)
    with torch.no_grad():
        embed(pixels)
        with fs_plugins.enable(clip, **PLAIN) as handle:
            embed(pixels)
            assert handle.status().vision[0].calls == 1
        embed(pixels)
        assert not fs_plugins.status(clip).enabled


def test_compiled_models_see_hooks_come_and_go(clip, images):
    ids = torch.tensor([[1, 4, 39]])

    def embed(model):
        with torch.no_grad():
            return model(input_ids=ids, pixel_values=pixels_of(images)).image_embeds

    compiled = torch.compile(clip, backend="eager")
    before = embed(compiled)
    with fs_plugins.enable(compiled, **PLAIN) as handle:
        assert not torch.allclose(embed(compiled), before, atol=1e-3)
        assert handle.status().vision[0].calls == 1
    assert torch.allclose(embed(compiled), before, atol=1e-5)


def test_dynamo_is_told_to_check_hooks_whenever_it_is_imported():
    script = """
import sys, fs_plugins
from fs_plugins.patch import recompile
assert "torch._dynamo" not in sys.modules
recompile([])
assert "torch._dynamo" not in sys.modules
import torch._dynamo
assert torch._dynamo.config.skip_nnmodule_hook_guards is False
"""
    subprocess.run([sys.executable, "-c", script], check=True)
