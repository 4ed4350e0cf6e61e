"""The light purifier of photographs: a U-Net that denoises photographs, for any encoder and a range of sigma.

    python -m tools.photos.purifier PHOTOS --out FOLDER --credits images.csv

Trained on crops of the photographs in a folder but for every fifth, which are held out. It goes on from its last
checkpoint; every step's crops and noise follow from the seed and the step's number. ``images.csv`` is the list that
comes with the photographs of the NIPS 2017 adversarial competition; whom it names is named beside the purifier.

Several encoders have a say in it, by turns, and none of them is the one that it is judged on. So this is no stage of
``fs_plugins.training``, where one encoder has all: pixels come first (features alone lead nowhere from scratch), each
crop has a sigma of its own, the rate is one cycle, and the average forgets faster at first.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor

import fs_plugins
from fs_plugins.files import atomically, replace
from fs_plugins.photos.parts import tower
from fs_plugins.photos.photographs import HELD_OUT
from fs_plugins.psm import PSM, Part, PSMConfig
from fs_plugins.psm.purifier import UNetPurifier, spectrum
from fs_plugins.training.data import ImageFolder
from tools.photos.pictures import credit

UNET = {"channels": [64, 80, 128, 192], "layers": 1, "unshuffle": 4}
"""With the photographs' own spectrum."""
SIGMAS = (0.03, 0.5)
ENCODERS = ("efficientnet_lite1", "efficientnet_lite2")
POOLED, TOKENS = 0.005, 0.0025
"""Weights of 1 - cosine beside the mean absolute error of pixels: of the mean over tokens, and of each token. At twenty
times these the gradient that comes from features is some eighty times that from pixels. From the first fifth of all
steps on and at twice these, pixels were learnt no better from then on, and features worse than from pixels alone.
"""
RISE = (0.7, 0.75)
"""Features come in between these parts of all steps: once pixels are learnt, and at a small rate."""
SMALL = 128
"""Side of the crops until features come in; an encoder wants to see more."""


def crops(photos: Sequence[Tensor], size: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` random crops (count, 3, size, size) in [0, 1], of any scale up to the whole, half mirrored."""
    found = []
    for _ in range(count):
        pick, scale, top, left, mirror = torch.rand(5, generator=generator).tolist()
        photo = photos[int(pick * len(photos))]
        side = size + int(scale * (min(photo.shape[1:]) - size + 1))
        y, x = int(top * (photo.shape[1] - side + 1)), int(left * (photo.shape[2] - side + 1))
        crop = photo[None, :, y : y + side, x : x + side].float() / 255
        if side != size:
            crop = F.interpolate(crop, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
        found.append(crop.flip(-1) if mirror < 0.5 else crop)
    return torch.cat(found).clamp(0, 1)


def encoders() -> list[fs_plugins.VisionCall]:
    """Those that have a say, as maps."""
    found = [tower(name, num_classes=0, global_pool="").requires_grad_(False) for name in ENCODERS]
    return [fs_plugins.vision_call(encoder.to(memory_format=torch.channels_last)) for encoder in found]


def train(
    photos: Path,
    out: Path,
    calls: Sequence[fs_plugins.VisionCall],
    *,
    steps: int,
    batch: int,
    size: int,
    lr: float,
    seed: int,
    side: int,
) -> Part:
    """``steps`` steps in all, or those that are left of them; the moving average is in ``ema.safetensors``.

    Args:
        calls: encoders with one readout of tokens, frozen, by turns; none for pixels alone.

    Returns:
        what was trained.
    """
    folder = ImageFolder(photos, (side, side))
    pictures = [(folder[i] * 255).round().byte() for i in range(len(folder)) if i % HELD_OUT]
    full = [picture.float() / 255 for picture in pictures]
    part = Part(kind="unet", args={**UNET, "spectrum": spectrum(full, UNET["unshuffle"])})
    work = Work(part, seed, lr, steps, out / "checkpoint.pt")
    began = time.time()
    for step in range(work.done + 1, steps + 1):
        generator = torch.Generator().manual_seed((seed << 32) + step)
        share = bool(calls) * min(1.0, max(0.0, (step / steps - RISE[0]) / (RISE[1] - RISE[0])))
        clean = crops(pictures, size if share else SMALL, batch, generator).contiguous(
            memory_format=torch.channels_last
        )
        low, high = SIGMAS
        sigma = low + (high - low) * torch.rand(batch, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        losses = work.advance(clean, sigma, noise, calls[step % len(calls)] if share else None, share)
        if step % 50 == 0 or step == steps:
            told = " ".join(f"{name} {value:.4f}" for name, value in losses.items())
            print(f"{step}/{steps} {told} {time.time() - began:.0f}s", flush=True)
        if step % 200 == 0 or step == steps:
            work.save()
            replace(out / "ema.safetensors", save({name: value.contiguous() for name, value in work.ema.items()}))
    return part


def turned(purified: Tensor, clean: Tensor, call: fs_plugins.VisionCall) -> dict[str, Tensor]:
    """1 - cosine of an encoder's features of (B, 3, H, W) pictures: of their mean over tokens, and of each token."""
    (found,) = call.encode(purified).values()
    with torch.no_grad():
        (wanted,) = call.encode(clean).values()
    found, wanted = found.float(), wanted.float()
    return {
        "pooled": 1 - torch.cosine_similarity(found.mean(1), wanted.mean(1), dim=-1).mean(),
        "tokens": 1 - torch.cosine_similarity(found, wanted, dim=-1).mean(),
    }


class Work:
    """The net, its moving average and its optimiser, as they are after ``done`` steps.

    Args:
        steps: how many there will be.
        checkpoint: the file to go on from, if it is there.
    """

    def __init__(self, part: Part, seed: int, lr: float, steps: int, checkpoint: Path) -> None:
        torch.manual_seed(seed)
        self.net = UNetPurifier(**part.args).train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
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

    def advance(
        self, clean: Tensor, sigma: Tensor, noise: Tensor, call: fs_plugins.VisionCall | None, share: float
    ) -> dict[str, float]:
        """One step, in bfloat16.

        Args:
            clean, sigma, noise: (B, 3, H, W) crops, (B,) noise levels and standard normal noise.
            call: whose features are to stay, if any.
            share: of the weights of features, from 0 (pixels alone) to 1.
        """
        with torch.autocast(clean.device.type, torch.bfloat16):
            purified = self.net(clean + sigma.view(-1, 1, 1, 1) * noise, sigma)
            features = turned(purified, clean, call) if call else {}
        losses = {"l1": (purified.float() - clean).abs().mean(), **features}
        loss = losses["l1"]
        if call:
            loss = loss + share * (POOLED * losses["pooled"] + TOKENS * losses["tokens"])
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.done += 1
        with torch.no_grad():
            for name, value in self.net.state_dict().items():
                self.ema[name].lerp_(value, 1 - min(0.999, self.done / (self.done + 10)))
        return {name: value.item() for name, value in losses.items()}

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


def finish(part: Part, out: Path) -> None:
    """The moving average as a PSM without a mapper, for any encoder."""
    config = PSMConfig(
        name="photo-light",
        sigma=0.125,
        sigma_range=SIGMAS,
        image_size=None,
        purifier=part,
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
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=192, help="side of the crops once features come in")
    parser.add_argument("--side", type=int, default=299, help="side that photographs are fitted to first")
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    listed = options.pop("credits")
    photos, out = options.pop("photos"), options.pop("out")
    part = train(photos, out, encoders(), **options)
    finish(part, out)
    if listed:
        credit(photos, listed, out / "psm")


if __name__ == "__main__":
    main()
