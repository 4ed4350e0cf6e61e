"""The photo purifier that ships: a U-Net that denoises photographs, for any encoder and a range of sigma.

    python -m tools.photo PHOTOS --out FOLDER --credits images.csv

Trained on crops of the photographs in a folder but for every twentieth, which are held out. It goes on from its last
checkpoint; every step's crops and noise follow from the seed and the step's number. ``images.csv`` is the list that
comes with the photographs of the NIPS 2017 adversarial competition; whom it names is named beside the purifier.

No encoder has a say in it, so this is no stage of ``fs_plugins.training``: the loss is l1 alone, each crop has a sigma
of its own, the rate is one cycle, and the average forgets faster at first.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from fs_plugins.files import atomically, replace
from fs_plugins.psm import PSM, Part, PSMConfig
from fs_plugins.psm.purifier import UNetPurifier
from fs_plugins.training.data import ImageFolder

PURIFIER = Part(kind="unet", args={"channels": [48, 96, 192], "layers": 1, "unshuffle": 2})
SIGMAS = (0.05, 0.5)
HELD_OUT = 20
"""One photograph in so many, in the order of their names and from the first on, is never trained on."""


def crops(photos: list[Tensor], size: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` random crops (count, 3, size, size) in [0, 1], half of them mirrored."""
    found = []
    for _ in range(count):
        pick, top, left, mirror = torch.rand(4, generator=generator).tolist()
        photo = photos[int(pick * len(photos))]
        y, x = int(top * (photo.shape[1] - size + 1)), int(left * (photo.shape[2] - size + 1))
        crop = photo[:, y : y + size, x : x + size]
        found.append(crop.flip(-1) if mirror < 0.5 else crop)
    return torch.stack(found).float() / 255


def train(photos: Path, out: Path, *, steps: int, batch: int, size: int, lr: float, seed: int, side: int) -> None:
    """``steps`` steps in all, or those that are left of them; the moving average is in ``ema.safetensors``."""
    folder = ImageFolder(photos, (side, side))
    pictures = [(folder[i] * 255).round().byte() for i in range(len(folder)) if i % HELD_OUT]
    work = Work(seed, lr, steps, out / "checkpoint.pt")
    began = time.time()
    for step in range(work.done + 1, steps + 1):
        generator = torch.Generator().manual_seed((seed << 32) + step)
        clean = crops(pictures, size, batch, generator).contiguous(memory_format=torch.channels_last)
        low, high = SIGMAS
        sigma = low + (high - low) * torch.rand(batch, generator=generator)
        purified, loss = work.advance(clean, sigma, torch.randn(clean.shape, generator=generator))
        if step % 100 == 0 or step == steps:
            error = (purified.float() - clean).square().mean().item()
            print(f"{step}/{steps} l1 {loss.item():.4f} mse {error:.5f} {time.time() - began:.0f}s", flush=True)
        if step % 200 == 0 or step == steps:
            work.save()
            replace(out / "ema.safetensors", save({name: value.contiguous() for name, value in work.ema.items()}))


class Work:
    """The net, its moving average and its optimiser, as they are after ``done`` steps.

    Args:
        steps: how many there will be.
        checkpoint: the file to go on from, if it is there.
    """

    def __init__(self, seed: int, lr: float, steps: int, checkpoint: Path) -> None:
        torch.manual_seed(seed)
        self.net = UNetPurifier(**PURIFIER.args).train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = {name: value.detach().clone() for name, value in self.net.state_dict().items()}
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=lr, weight_decay=1e-4)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, lr, total_steps=steps, pct_start=0.03)
        self.done, self.checkpoint = 0, checkpoint
        if checkpoint.exists():
            kept = torch.load(checkpoint, weights_only=True)
            self.done, self.ema = kept["step"], kept["ema"]
            self.net.load_state_dict(kept["net"])
            self.optimizer.load_state_dict(kept["optimizer"])
            self.schedule.load_state_dict(kept["schedule"])
            print(f"going on from step {self.done}", flush=True)

    def advance(self, clean: Tensor, sigma: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) crops, (B,) noise levels and standard normal noise -> what the net makes of them, and its loss.

        In bfloat16.
        """
        with torch.autocast(clean.device.type, torch.bfloat16):
            purified = self.net(clean + sigma.view(-1, 1, 1, 1) * noise, sigma)
        loss = (purified.float() - clean).abs().mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.done += 1
        with torch.no_grad():
            for name, value in self.net.state_dict().items():
                self.ema[name].lerp_(value, 1 - min(0.999, self.done / (self.done + 10)))
        return purified, loss

    def save(self) -> None:
        """Replace the checkpoint."""
        state = {
            "step": self.done,
            "net": self.net.state_dict(),
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        atomically(self.checkpoint, lambda file: torch.save(state, file))


def credit(photos: Path, listed: Path, out: Path) -> None:
    """Write down whose photographs were trained on; the list has bytes beyond ASCII as ``\\303\\251``."""
    with listed.open(newline="", encoding="utf-8") as file:
        rows = {row["ImageId"]: row for row in csv.DictReader(file)}
    trained_on = [path.stem for i, path in enumerate(ImageFolder(photos, (1, 1)).paths) if i % HELD_OUT]
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("photograph", "author", "source"))
    for name in trained_on:
        author = re.sub(r"\\(\d{3})", lambda byte: chr(int(byte[1], 8)), rows[name]["Author"])
        author = author.encode("latin-1").decode() if author != rows[name]["Author"] else author
        writer.writerow((name, author, rows[name]["OriginalLandingURL"]))
    replace(out / "psm" / "photographs.csv", table.getvalue())


def finish(out: Path) -> None:
    """The moving average as a PSM without a mapper, for any encoder."""
    config = PSMConfig(
        name="photo",
        sigma=0.25,
        sigma_range=SIGMAS,
        image_size=None,
        purifier=PURIFIER,
        encoder="any",
        fingerprint=(),
    )
    psm = PSM(config)
    assert psm.purifier is not None
    psm.purifier.load_state_dict(load_file(out / "ema.safetensors"))
    psm.save_pretrained(out / "psm", dtype=torch.float16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--credits", type=Path, help="CSV with ImageId, Author and OriginalLandingURL")
    parser.add_argument("--steps", type=int, default=5500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=96, help="side of the crops")
    parser.add_argument("--side", type=int, default=299, help="side that photographs are fitted to first")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    listed = options.pop("credits")
    train(**options)
    finish(options["out"])
    if listed:
        credit(options["photos"], listed, options["out"])


if __name__ == "__main__":
    main()
