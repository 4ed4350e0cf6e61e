"""What is shown to a model, and what it is asked."""

from __future__ import annotations

import pytest
import torch

import fs_plugins
from fs_plugins import ModelError
from fs_plugins.hf.chat import Chat
from fs_plugins.hf.zeroshot import ZeroShot


@pytest.fixture(scope="module")
def demo():
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from fs_plugins.demo import assets

    return Chat(
        AutoModelForImageTextToText.from_pretrained(assets.LLAVA).eval(), AutoProcessor.from_pretrained(assets.LLAVA)
    )


def test_a_model_is_shown_exactly_the_pixels_that_were_attacked(demo):
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    seen = []
    listener = demo.call.module.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((args, kwargs)), with_kwargs=True
    )
    try:
        said = demo.say(pixels, ["Which shape is in this image?"] * 2, 3)
    finally:
        listener.remove()
    args, kwargs = seen[0]
    shown = args[0] if args else kwargs["pixel_values"]
    assert torch.allclose(demo.call.pixels.to_unit(shown), pixels, atol=1e-6)
    assert len(said) == 2


def test_models_that_cut_pictures_up_are_refused(demo):
    class Tiles:
        chat_template, image_token, tokenizer = None, "<image>", demo.processor.tokenizer

        def __call__(self, **kwargs):
            from transformers import BatchFeature

            return BatchFeature({"input_ids": torch.ones(1, 3).long(), "pixel_values": torch.zeros(1, 5, 3, 64, 64)})

    with pytest.raises(ModelError, match=r"straight into the model, but its processor makes \(1, 5, 3, 64, 64\)"):
        Chat(demo.model, Tiles()).say(torch.rand(1, 3, 64, 64), ["?"], 2)


def test_zero_shot_takes_the_nearest_class_and_is_smoothed(clip, data):
    directions = {
        name: torch.nn.functional.normalize(torch.randn(24, generator=torch.Generator().manual_seed(i)), dim=0)
        for i, name in enumerate(["blue", "red"])
    }
    subject = ZeroShot(clip, directions)
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    embedded = subject.call.embed(subject.call.encode(images))
    wanted = [
        data.classes.index(["blue", "red"][i]) for i in (embedded @ torch.stack(list(directions.values())).T).argmax(1)
    ]
    assert subject.reply(None, images, data.samples[:4], data) == [str(i) for i in wanted]
    with fs_plugins.enable(clip, psm=None, sigma=0.25) as handle:
        subject.reply(None, images, data.samples[:4], data)
        assert handle.status().vision[0].calls == 1
