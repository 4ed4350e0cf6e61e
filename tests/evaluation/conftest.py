"""Coloured squares, and evaluations of a tiny model on them."""

from __future__ import annotations

import json

import pytest
import torch
from painting import COLOURS, SUITE, Loaded
from PIL import Image
from support import make_llava, make_psm

import fs_plugins
from fs_plugins.evaluation.datasets import open_dataset
from fs_plugins.evaluation.judges import ExactMatch
from fs_plugins.evaluation.plan import Plan, Setup, fixed
from fs_plugins.evaluation.run import Evaluation
from fs_plugins.evaluation.store import Store


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for i in range(5):
        name = list(COLOURS)[i % 2]
        generator = torch.Generator().manual_seed(i)
        noise = torch.randint(-25, 26, (16, 16, 3), generator=generator)
        pixels = (torch.tensor(COLOURS[name]) + noise).clamp(0, 255).to(torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
        rows.append(
            {"image": f"{i}.png", "target": "aim.png", "label": name, "question": "Which colour?",
             "options": list(COLOURS)[:2], "answer": name}
        )  # fmt: skip
    Image.new("RGB", (16, 16), COLOURS["blue"]).save(folder / "aim.png")
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    settings = {
        "classes": list(COLOURS),
        "target_class": "blue",
        "prompts": {"vqa_answers": "option", "vqa": "{question} {options}"},
    }
    (folder / "dataset.json").write_text(json.dumps(settings), "utf-8")
    return open_dataset(folder)


@pytest.fixture
def psm(tmp_path):
    folder = tmp_path / "psm"
    make_psm(fs_plugins.vision_call(make_llava())).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def start(data, psm, tmp_path):
    """Suites -> an evaluation of them; ``load.painters`` of it are the models it loaded."""

    def started(*suites, folder="out", share=(0, 1), judge=None, towers=("none",), load=None, **changes):
        usual = {
            "steps": 2,
            "n0": 2,
            "psm": psm,
            "light": psm,
            "adaptive_steps": 1,
            "adaptive_draws": 1,
            "adaptive_images": 2,
            "certified_images": 2,
            "certified_draws": 20,
            "masking_images": 3,
            "masking_queries": 2,
        }
        setup = Setup(**{**usual, **changes})
        store = Store.begin(tmp_path / folder, fixed("tiny", dict.fromkeys(towers, ""), data, setup), share[0])
        loaded = Loaded(load)
        plan = Plan(suites or (SUITE,), data, setup, tuple(towers))
        return Evaluation(loaded, plan, store, judge or ExactMatch(), batch_size=2, share=share)

    return started
