"""The attack that the documentation writes by hand, with enable and autograd alone, beside ours."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import fs_plugins
from fs_plugins.attacks import Answer, attack
from fs_plugins.attacks.strengths import LOST, Judge
from fs_plugins.demo import world
from fs_plugins.hf.chat import dialogue
from fs_plugins.hf.load import load_chat
from fs_plugins.hf.speech import Speech

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "attack.md"


def by_hand():
    """``climb`` of the page."""
    code = re.search(r"^def climb.*?^    return .*?$", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    names = {"torch": torch}
    exec(code[0], names)
    return names["climb"]


def test_it_is_no_stronger_than_ours():
    model, processor = load_chat("demo", device="cpu")
    model.requires_grad_(False)
    speech, count = Speech(model, processor, world.CLASS_PROMPT), 4
    pictures = [scene.draw() for scene in world.scenes("heldout", count)]
    inputs = processor(images=pictures, text=[dialogue(processor, speech.question)] * count, return_tensors="pt")
    images = speech.call.pixels.to_unit(inputs["pixel_values"])
    answer = speech.given(speech.call.look(images), range(count)).words
    search = {"eps": 8 / 255, "steps": 8, "draws": 1}
    torch.manual_seed(0)
    with fs_plugins.enable(model, n0=1, seed=0):
        theirs = speech.call.pixels.to_unit(by_hand()(model, processor, inputs, answer, **search)).detach()
        ours = attack(model, images, method=Answer(speech), **search)
    (pipeline,) = fs_plugins.smoothers(model, n0=1)
    judged = Judge(pipeline, range(count), seed=1, batch_size=count).on_answers(images, speech)
    clean, hand, our = (judged("", some) for some in (images, theirs, ours))
    assert (theirs - images).abs().max() <= search["eps"] + 1e-6
    assert clean.success == 0
    assert hand.success >= 0.5, "it is an attack"
    assert our.success >= hand.success
    lost = [torch.tensor(one.margins, dtype=torch.float64, device="cpu").clamp(max=LOST) for one in (hand, our)]
    assert lost[1].mean() > lost[0].mean() - 0.25
