"""How well a purifier denoises, beside scikit-image's denoisers: PSNR in dB on photographs.

    pip install scikit-image PyWavelets     # the peers; with bm3d, whose licence is non-commercial, one column more
    python -m benchmarks.denoise --psm PSM  # from the repository's root: photographs that scikit-image ships
    python -m benchmarks.denoise --psm PSM --photos FOLDER  # those of a folder that tools.photos.purifier held out

Centre crops of at most 288 x 288, noise of sigma in [0, 1] pixels, not clamped; results are. The peers are told sigma,
and get the setting that is best for them on these very photographs, one per sigma.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fs_plugins.photos.photographs import HELD_OUT
from fs_plugins.pictures import rgb, to_unit
from fs_plugins.psm import PSM
from fs_plugins.training.data import ImageFolder

SIGMAS = (0.1, 0.25, 0.5)
SIDE = 288
Denoiser = Callable[[np.ndarray], np.ndarray]


def peers(sigma: float) -> dict[str, list[Denoiser]]:
    """A denoiser's name -> itself at several settings, on (H, W, 3) arrays."""
    from skimage.restoration import denoise_nl_means, denoise_tv_chambolle, denoise_wavelet

    means: dict[str, Any] = {"patch_size": 5, "patch_distance": 6, "fast_mode": True, "channel_axis": -1}
    found: dict[str, list[Denoiser]] = {
        "total variation": [
            partial(denoise_tv_chambolle, weight=factor * sigma, channel_axis=-1)
            for factor in (0.6, 0.8, 1.0, 1.3, 1.7)
        ],
        "wavelets": [
            partial(
                denoise_wavelet, sigma=sigma, method=method, convert2ycbcr=True, channel_axis=-1, rescale_sigma=True
            )
            for method in ("BayesShrink", "VisuShrink")
        ],
        "non-local means": [
            partial(denoise_nl_means, h=factor * sigma, sigma=sigma, **means) for factor in (0.4, 0.6, 0.8, 1.0)
        ],
    }
    if find_spec("bm3d"):
        from bm3d import bm3d_rgb

        found["BM3D"] = [partial(bm3d_rgb, sigma_psd=sigma)]
    return found


def psnr(clean: np.ndarray, found: np.ndarray) -> float:
    return float(-10 * np.log10(np.square(clean - np.clip(found, 0, 1)).mean()))


def shipped_with_scikit_image() -> Iterable[torch.Tensor]:
    from skimage import data

    for name in ("astronaut", "cat", "coffee", "rocket"):
        yield torch.from_numpy(getattr(data, name)().copy()).permute(2, 0, 1).float() / 255
    yield torch.from_numpy(data.stereo_motorcycle()[0].copy()).permute(2, 0, 1).float() / 255


def held_out(folder: Path) -> Iterable[torch.Tensor]:
    """Every fourth of them: fifty of the competition's thousand."""
    for path in ImageFolder(folder, (SIDE, SIDE)).paths[:: 4 * HELD_OUT]:
        yield to_unit(rgb(path))


def cropped(photo: torch.Tensor) -> torch.Tensor:
    height, width = photo.shape[1:]
    top, left = max(0, (height - SIDE) // 2), max(0, (width - SIDE) // 2)
    return photo[:, top : top + SIDE, left : left + SIDE]


def compare(purifier: PSM, photos: list[torch.Tensor], seed: int) -> dict[float, dict[str, float]]:
    """sigma -> denoiser -> mean PSNR in dB over the photographs."""
    found = {}
    for sigma in SIGMAS:
        generator = torch.Generator().manual_seed(seed)
        noisy = [photo + sigma * torch.randn(photo.shape, generator=generator) for photo in photos]
        pairs = [(c.permute(1, 2, 0).numpy(), y.permute(1, 2, 0).numpy()) for c, y in zip(photos, noisy, strict=True)]
        scores = {"noisy": float(np.mean([psnr(clean, y) for clean, y in pairs]))}
        for name, settings in peers(sigma).items():
            scores[name] = max(float(np.mean([psnr(clean, run(y)) for clean, y in pairs])) for run in settings)
        with torch.no_grad():
            ours = [purifier.purify(y[None], sigma)[0].permute(1, 2, 0).numpy() for y in noisy]
        scores["ours"] = float(np.mean([psnr(clean, y) for (clean, _), y in zip(pairs, ours, strict=True)]))
        found[sigma] = scores
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--psm", type=Path, required=True, help="a PSM with a purifier")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    photos = [cropped(p) for p in (held_out(options.photos) if options.photos else shipped_with_scikit_image())]
    found = compare(PSM.from_pretrained(options.psm), photos, options.seed)
    columns = list(next(iter(found.values())))
    table = Table("sigma", *columns, title=f"PSNR in dB, mean of {len(photos)} photographs")
    for sigma, scores in found.items():
        table.add_row(f"{sigma:g}", *(f"{scores[name]:.2f}" for name in columns))
    Console().print(table)


if __name__ == "__main__":
    main()
