"""Model cards of the PSMs that ship: by the hub's own reader, and figure by figure."""

from __future__ import annotations

import re

import pytest
from huggingface_hub import ModelCard

from fs_plugins import PSM, files
from fs_plugins.psm.card import figure, head, headed
from tools.cards import ASSETS, DEMO, PHOTOS, demo_card, of_photographs, photo_card

CARDS = [*(ASSETS / name / "README.md" for name in DEMO), *map(of_photographs, PHOTOS)]


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.parent.name)
def test_a_card_that_ships_says_its_figures_twice_and_the_same(path):
    card = ModelCard(files.text(path))
    data = card.data
    assert (data.library_name, data.license) == ("fs-plugins", "apache-2.0")
    assert {"fs-plugins", "feature-space-smoothing", "certified-robustness"} <= set(data.tags)
    assert data.model_name == PSM.from_pretrained(path.parent).config.name
    told = data.eval_results
    assert told
    rows = [[cell.strip(" *") for cell in line.split("|")] for line in card.text.splitlines() if line.startswith("|")]
    for result in told:
        sigma = result.metric_args["sigma"]
        cells = [cell for row in rows if f"{sigma:g}" in row[:2] for cell in row[2:] if re.fullmatch(r"[\d.]+", cell)]
        assert result.metric_value in map(float, cells), result


@pytest.mark.parametrize("name", DEMO)
def test_the_demos_cards_are_what_the_worlds_card_says(name):
    assert files.text(ASSETS / name / "README.md") == demo_card(name), "python -m tools.cards"
    assert ModelCard(demo_card(name)).data.base_model == "demo-clip"


@pytest.mark.parametrize("name", PHOTOS)
def test_a_photo_purifiers_head_follows_from_its_text(name):
    text = files.text(of_photographs(name))
    assert photo_card(name, text) == text, f"python -m tools.cards {name}"


def test_a_head_takes_the_place_of_another_and_keeps_figures_of_other_data_apart():
    results = [
        figure("psnr", value, "PSNR", data=data, sigma=0.5) for value, data in ((20.5, "these"), (21.5, "those"))
    ]
    card = headed(
        "---\nlicense: mit\n---\n\n# A\n\ntext\n", head("a", base_model="o/m", license="other", results=results)
    )
    assert card.startswith("---\n")
    assert card.endswith("---\n\n# A\n\ntext\n")
    read = ModelCard(card).data
    assert (read.license, read.base_model) == ("other", "o/m")
    assert [(one.dataset_name, one.metric_value) for one in read.eval_results] == [("these", 20.5), ("those", 21.5)]
    assert headed("# B\n", head("b")).endswith("---\n\n# B\n")
