"""Graphs that leave Python: an enabled model is refused in words by whatever way it is to be exported or traced."""

from __future__ import annotations

import pytest
import torch
from support import knowing, randomise, vision_config

import fs_plugins
from fs_plugins import ModelError


@pytest.fixture
def tower():
    from transformers import CLIPVisionModelWithProjection

    return knowing(randomise(CLIPVisionModelWithProjection(vision_config())))


@pytest.fixture
def pixels(tower, images):
    return fs_plugins.vision_call(tower).pixels.from_unit(images, torch.float32)


class Whole(torch.nn.Module):
    """A model around the encoder."""

    def __init__(self, tower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixels):
        return self.tower(pixels).image_embeds * 2


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
WAYS = {
    "export": lambda model, pixels, path: torch.export.export(model, (pixels,), strict=False),
    "strict export": lambda model, pixels, path: torch.export.export(model, (pixels,), strict=True),
    "trace": lambda model, pixels, path: torch.jit.trace(model, (pixels,), strict=False),
    "unchecked trace": lambda model, pixels, path: torch.jit.trace(model, (pixels,), strict=False, check_trace=False),
    "trace of its module": lambda model, pixels, path: torch.jit.trace_module(
        model, {"forward": (pixels,)}, strict=False
    ),
    "ONNX by tracing": lambda model, pixels, path: torch.onnx.export(model, (pixels,), path, dynamo=False),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_no_way_out_of_python_takes_one_calls_noise_along(way, inside, tower, pixels, tmp_path):
    plain = tower(pixels).image_embeds
    model = Whole(tower).eval() if inside else tower
    with fs_plugins.enable(tower, psm=None, sigma=0.25, n0=2) as handle:
        # Strict export does not run the hooks; dynamo refuses them with the reason that we give it.
        refused = torch._dynamo.exc.Unsupported if way == "strict export" else ModelError
        with pytest.raises(refused, match=r"for ever\. Export the model without it"):
            WAYS[way](model, pixels, str(tmp_path / "model"))
        assert not torch.equal(tower(pixels).image_embeds, plain), "the next call is smoothed"
        assert handle.status().vision[0].calls == 1
    assert torch.equal(tower(pixels).image_embeds, plain)


def test_what_changes_nothing_may_be_exported(tower, pixels):
    plain = tower(pixels).image_embeds
    exported = torch.export.export(tower, (pixels,), strict=False)
    with fs_plugins.enable(tower, psm=None, sigma=0):
        traced = torch.jit.trace(Whole(tower).eval(), (pixels,), strict=False)
    assert torch.allclose(exported.module()(pixels).image_embeds, plain, atol=1e-6)
    assert torch.allclose(traced(pixels), 2 * plain, atol=1e-6)
