"""The model cards of the PSMs that ship: what their texts say, again as data in a YAML head.

    python -m tools.cards [photo|photo-light]

The demo's PSMs have a short card each, whose figures are those of the embedded world's card, which the trainings print.
A purifier of photographs gets the head that its own text says. No figure is made here.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fs_plugins.demo import assets
from fs_plugins.files import replace, text
from fs_plugins.psm import PSM
from fs_plugins.psm.card import ROBUSTNESS, about, figure, head, headed

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

ASSETS = Path(assets.CLIP).parent
PHOTOS = ("photo", "photo-light")
IN_REGISTRY = ("psm-clip", "psm-llava")
DEMO = (*IN_REGISTRY, "psm-llava-no-purifier")
_MEASURED = "110 held-out scenes of the embedded world"
LICENCE = "apache-2.0"


def tables(card: str) -> Iterator[tuple[list[str], list[list[str]]]]:
    """The tables of a text in Markdown: heads and rows."""
    for block in re.findall(r"(?:^\|.*\|$\n?)+", card, flags=re.MULTILINE):
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        if len(lines) > 2:
            yield lines[0], lines[2:]


def demo_card(name: str) -> str:
    """The card of one of the demo's PSMs, from its configuration and the world's card."""
    kinds, rows = next(
        (columns[2:], rows) for columns, rows in tables(text(ASSETS / "README.md")) if columns[:2] == ["PSM", "sigma"]
    )
    config = PSM.from_pretrained(ASSETS / name).config
    own = [row[1:] for row in rows if re.match(rf"`{name}`", row[0])]
    kinds = [{"its purifier alone": "purifier"}.get(kind, kind) for kind in kinds]
    if config.purifier is None:
        kinds = ["mapper" if kind == "both" else kind for kind in kinds]
    results = [
        figure(
            ROBUSTNESS,
            float(value),
            f"Mean cosine of single noisy draws to the clean picture, {kind}, sigma {sigma}",
            data=_MEASURED,
            sigma=float(sigma),
            parts=kind,
        )
        for sigma, *values in own
        for kind, value in zip(kinds, values, strict=True)
        if value != "-"
    ]
    body = [
        *about(config, "demo-clip", "auto" if name in IN_REGISTRY else f"fs_plugins/demo/assets/{name}"),
        "",
        "## Scores",
        "",
        f"Mean cosine between the feature of a single noisy draw and of the clean picture, {_MEASURED}, 8 draws",
        "(`fs_plugins.training.robustness_score`, printed at the end of its training):",
        "",
        *(f"| {' | '.join(row)} |" for row in (["sigma", *kinds], ["---"] * (1 + len(kinds)), *own)),
        "",
        "Data, training and limits: [the card of the embedded world's models](../README.md).",
        "",
        "Licence: Apache-2.0.",
        "",
    ]
    return headed("\n".join(body), head(config.name, base_model="demo-clip", license=LICENCE, results=results))


def of_photographs(name: str) -> Path:
    """The card of a purifier of photographs."""
    return ASSETS.parents[1] / "psm" / name / "README.md"


def photo_card(name: str, card: str) -> str:
    """The card of a purifier of photographs with the head that its text says: PSNR, where a table has a column "ours"
    for each sigma.
    """
    results: list[EvalResult] = []
    for columns, rows in tables(card):
        if columns[0] == "sigma" and columns[-1] == "ours":
            data = "50 held-out photographs" if not results else "five photographs of scikit-image"
            results += [
                figure("psnr", float(row[-1].strip("*")), f"PSNR in dB, sigma {row[0]}", data=data,
                       task="image-to-image", sigma=float(row[0]))
                for row in rows
            ]  # fmt: skip
    return headed(card, head(name, license=LICENCE, results=results, tags=["denoising"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=PHOTOS)
    if name := parser.parse_args().what:
        replace(of_photographs(name), photo_card(name, text(of_photographs(name))))
    for name in DEMO:
        replace(ASSETS / name / "README.md", demo_card(name))


if __name__ == "__main__":
    main()
