"""What smoothing costs beyond its floor, and what bounds its memory.

    python benchmarks/serving.py            # the demo's tower and a CLIP-L/14-sized one
    python benchmarks/serving.py --tower demo

The floor of a smoothed vision call is the same work without the plugin: n0 noisy pictures through purifier,
encoder and mapper as one batch. Both are timed in turn, in one process; what is printed is the ratio of each
pair (median, and the span). Peak memory is that of a fresh process for each chunk size (read from /proc: Linux only).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import CLIPVisionConfig, CLIPVisionModel

import fs_plugins
from fs_plugins.demo import assets
from fs_plugins.identity import fingerprint
from fs_plugins.psm import PSM, Part, PSMConfig, ReadoutSpec
from fs_plugins.vision import VisionCall

DRAWS = (1, 2, 4, 8, 16)
CLIP_L = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "patch_size": 14, "image_size": 224,
}  # fmt: skip


def tower(name: str) -> tuple[CLIPVisionModel, VisionCall, PSM]:
    """A vision model and a PSM of the demo's kind for it."""
    torch.manual_seed(0)
    model = (
        CLIPVisionModel.from_pretrained(assets.CLIP) if name == "demo" else CLIPVisionModel(CLIPVisionConfig(**CLIP_L))
    )
    model.eval().requires_grad_(False)
    call = fs_plugins.vision_call(model)
    mapper = Part(kind="residual", args={"width": call.readouts[0].width})
    config = PSMConfig(
        name="benchmark",
        sigma=0.25,
        sigma_range=(0.25, 0.25),
        image_size=call.image_size,
        purifier=Part(kind="unet", args={"channels": [64, 128], "unshuffle": 4}),
        readouts=(ReadoutSpec(name=call.readouts[0].name, width=call.readouts[0].width, tokens=0, mapper=mapper),),
        encoder=name,
        fingerprint=fingerprint(model),
    )
    return model, call, PSM(config)


def floor(call: VisionCall, psm: PSM, images: torch.Tensor, n0: int) -> Callable[[], object]:
    repeated = images.repeat(n0, 1, 1, 1)

    def run() -> object:
        noisy = repeated + 0.25 * torch.randn_like(repeated)
        return psm.map(call.readouts[0].name, call.encode(psm.purify(noisy, 0.25))[call.readouts[0].name], 0.25)

    return run


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


@torch.no_grad()
def ratios(name: str, pairs: int) -> Table:
    model, call, psm = tower(name)
    batch = 8 if name == "demo" else 1
    images = torch.rand(batch, 3, *call.image_size)
    pixels = call.pixels.from_unit(images, torch.float32)
    table = Table(
        title=f"Smoothed vision call / floor, {name} tower, {batch} image(s), {pairs} pairs", title_justify="left"
    )
    for column in ("n0", "floor, s", "smoothed, s", "ratio (median)", "span"):
        table.add_column(column, justify="right")
    for n0 in DRAWS:
        plain = floor(call, psm, images, n0)
        with fs_plugins.enable(model, psm=psm, n0=n0, chunk_size=batch * n0):
            timed = [(seconds(plain), seconds(lambda: model(pixels))) for _ in range(pairs + 1)][1:]
        quotients = sorted(mine / theirs for theirs, mine in timed)
        table.add_row(
            str(n0),
            f"{statistics.median(t for t, _ in timed):.3f}",
            f"{statistics.median(m for _, m in timed):.3f}",
            f"{statistics.median(quotients):.3f}",
            f"{quotients[0]:.2f} - {quotients[-1]:.2f}",
        )
    return table


@torch.no_grad()
def peak(name: str, n0: int, chunk_size: int) -> dict[str, float]:
    """Peak resident memory of one smoothed call in this process, above what was resident before it, in MB."""
    model, call, psm = tower(name)
    pixels = call.pixels.from_unit(torch.rand(1, 3, *call.image_size), torch.float32)
    with fs_plugins.enable(model, psm=psm, n0=n0, chunk_size=chunk_size):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak so far
        before = resident("VmRSS")
        model(pixels)
        return {"mb": (resident("VmHWM") - before) / 1024}


def resident(field: str) -> int:
    """A field of /proc/self/status in kB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def memory(name: str) -> Table:
    table = Table(
        title=f"Peak memory of one smoothed call above the loaded model, {name} tower, MB", title_justify="left"
    )
    chunks = (1, 4, 16)
    table.add_column("n0", justify="right")
    for chunk in chunks:
        table.add_column(f"chunk_size {chunk}", justify="right")
    for n0 in (4, 16, 64) if name == "demo" else (4, 16):
        row = []
        for chunk in chunks:
            command = [sys.executable, __file__, "--tower", name, "--peak", str(n0), str(chunk)]
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            row.append(f"{json.loads(told.splitlines()[-1])['mb']:.0f}")
        table.add_row(str(n0), *row)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tower", choices=["demo", "clip-l", "both"], default="both")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--peak", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print(json.dumps(peak(arguments.tower, *arguments.peak)))
        return
    for name in ("demo", "clip-l") if arguments.tower == "both" else (arguments.tower,):
        Console().print(ratios(name, arguments.pairs))
        if Path("/proc/self/clear_refs").exists():
            Console().print(memory(name))


if __name__ == "__main__":
    main()
