"""A tiny LLaVA that answers by the colour it sees."""

from __future__ import annotations

import torch
from support import make_llava

import fs_plugins
from fs_plugins.evaluation.suites import FS_PSM, NONE, Condition, Suite

COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}
SUITE = Suite("mine", "Mine", "classification", (NONE, FS_PSM), (Condition("attackvlm", 16),))


class Painter:
    """Names the strongest colour of the pixels it is shown; the model only lends its vision encoder."""

    tasks = ("captioning", "classification", "vqa")

    def __init__(self, model):
        self.model, self.call, self.asked = model, fs_plugins.vision_call(model), []

    def reply(self, task, images, samples, dataset):
        with torch.no_grad():  # so that smoothing, where it is enabled, serves a call
            self.call.module(self.call.pixels.from_unit(images, torch.float32), output_hidden_states=True)
        names = [list(COLOURS)[i] for i in images.mean((2, 3)).argmax(1).tolist()]
        self.asked += [(task.name, sample.image) for sample in samples]
        return [
            str(dataset.classes.index(n))
            if task.name == "classification"
            else f"a {n} square"
            if task.name == "captioning"
            else n
            for n in names
        ]


class Loaded:
    """Loads painters, and remembers them."""

    def __init__(self, load=None):
        self.load, self.painters = load, []

    def __call__(self, tower):
        if self.load is not None:
            self.load(tower)
        self.painters.append(Painter(make_llava().requires_grad_(False)))
        return self.painters[-1]
