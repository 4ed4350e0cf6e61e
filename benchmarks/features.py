"""How much of an encoder's feature is left behind purifiers that do not know it: on the held-out photographs that ship.

    python -m benchmarks.features PSM [PSM ...] [--images 200] [--unseen]

For each PSM, by folder or by its name in the registry, and each noise level: the cosine between what is served with
n0 = 4 draws and the clean feature, and how often the encoder's own head still finds the photograph's class, with 95 %
intervals. The encoder is EfficientNet-Lite0, from ``fs-plugins[photos]``. "none" is plain smoothing. Purifiers work in
bfloat16. With ``--unseen``, only those photographs that nothing which ships was trained on.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import fs_plugins
from fs_plugins.evaluation.metrics import Estimate, mean, proportion
from fs_plugins.evaluation.subjects import size_of
from fs_plugins.hf.encoders import load_encoder, load_head
from fs_plugins.photos.photographs import FOLDER, held_out, trained_on
from fs_plugins.training.data import ImageFolder

ENCODER = "efficientnet-lite0"
SIGMAS = (0.0625, 0.125, 0.25, 0.5)
N0, TOGETHER = 4, 10


@torch.no_grad()
def measured(
    model: nn.Module, head: nn.Module, pictures: torch.Tensor, labels: torch.Tensor, psm: str | None, sigma: float
) -> tuple[Estimate, Estimate]:
    """The cosine of served to clean features, and the share of photographs whose class is still found.

    Args:
        pictures: (B, C, H, W) in [0, 1].
        labels: (B,) numbers of their classes.
    """
    smoother = fs_plugins.smoothers(model, psm=psm, sigma=sigma, n0=N0, seed=0)[0]
    if smoother.psm is not None:
        smoother.psm.purifying = torch.bfloat16
    cosines: list[float] = []
    right: list[bool] = []
    for batch, wanted in zip(pictures.split(TOGETHER), labels.split(TOGETHER), strict=True):
        clean = smoother.call.embed(smoother.call.encode(batch))
        served = smoother.call.embed(smoother.smooth(batch))
        cosines += torch.cosine_similarity(clean, served, dim=-1).tolist()
        right += (head(served).argmax(-1) == wanted).tolist()
    return mean(cosines), proportion(right)


def told(found: Estimate) -> str:
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("psm", nargs="+")
    parser.add_argument("--images", type=int, default=len(held_out()))
    parser.add_argument("--unseen", action="store_true")
    options = parser.parse_args()
    model, head = load_encoder(ENCODER), load_head(ENCODER)
    folder = ImageFolder(FOLDER, size_of(fs_plugins.vision_call(model)))
    seen = trained_on()
    places = [i for i, one in enumerate(held_out()) if not (options.unseen and one.name in seen)][: options.images]
    chosen = [held_out()[i] for i in places]
    pictures = torch.stack([folder[i] for i in places])
    labels = torch.tensor([one.label for one in chosen])
    console = Console()
    for name in options.psm:
        psm = None if name == "none" else name
        rows = [(sigma, *measured(model, head, pictures, labels, psm, sigma)) for sigma in SIGMAS]
        table = Table("sigma", "cosine", "class found", title=f"{name}, {len(chosen)} photographs, n0 = {N0}")
        for sigma, cosine, right in rows:
            table.add_row(f"{sigma:g}", told(cosine), told(right))
        console.print(table)
    if learnt := len({one.name for one in chosen} & seen):
        console.print(f"Something that ships was trained on {learnt} of these photographs.")


if __name__ == "__main__":
    main()
