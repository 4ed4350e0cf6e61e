"""What certifying costs and what its draws buy: speed beside other samplers, memory, draws needed, radii.

    python benchmarks/certify.py                   # speed, memory, draws needed, arithmetic: some minutes
    python benchmarks/certify.py --only speed      # one of the four
    python benchmarks/certify.py --radii --save radii.npz    # half an hour by itself; --load shows the file again

All on the embedded demo: its LLaVA's tower, its PSM, its held-out scenes. Radii are for cosine >= .5 at alpha = .001.

- Speed: draws per second of the certifier's sampler over those of the bare pipeline, of a plain loop as in published
  smoothing codes, and of adversarial-robustness-toolbox's randomised smoothing of a zero-shot head on the same
  pipeline. Each is timed in turn with the sampler, in one process, with as many rows per forward; what is printed is
  the ratio of each pair (median, and the span). The toolbox is no dependency; ``pip install
  adversarial-robustness-toolbox==1.20.1`` changes no version in constraints.txt.
- Memory: peak of ``fs_plugins.certify`` in a fresh process for each n (read from /proc: Linux only).
- Draws needed for one radius: the one that the paper's bound with Hoeffding's inequality certifies from all draws of a
  stream. The others get prefixes of it, each certified at alpha as if it were all there is. That compares bounds; to
  stop at the first that suffices, alpha must be shared among the looks, as ``certify(target=...)`` does. The larger the
  radius, the larger the factors: ``--most`` sets it.
- Arithmetic: ``Certificate.from_scores`` and its curve at 50 points.
- Radii: averages over scenes, every bound from the same draws. A scene without a radius counts as 0.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
import timeit
import tracemalloc
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

import fs_plugins
from fs_plugins.certificates import Angular, Certificate
from fs_plugins.certificates.bounds import furthest, hoeffding_lower, mean_bound, pilot_threshold
from fs_plugins.certificates.methods import METHODS as KNOWN
from fs_plugins.certificates.plan import Plan
from fs_plugins.certificates.sampling import Sampler
from fs_plugins.demo import assets, world
from fs_plugins.pictures import to_unit
from fs_plugins.psm import PSM
from fs_plugins.smoothing import DEFAULT_CHUNK_SIZE, FeatureSmoother

ALPHA = 1e-3
THRESHOLD = 0.5
ROWS = DEFAULT_CHUNK_SIZE
METHODS = {"betting": "mean", "distribution": "distribution", "best": "best"}
ANGULAR = "best + angular"
BOUNDS = ("Hoeffding", *METHODS, ANGULAR)
Scores = NDArray[np.float64]


def load_model() -> nn.Module:
    model: nn.Module = AutoModelForImageTextToText.from_pretrained(assets.LLAVA)
    return model.eval().requires_grad_(False)


def load_smoother(psm: Path, sigma: float) -> FeatureSmoother:
    return FeatureSmoother(fs_plugins.vision_call(load_model()), psm=PSM.from_pretrained(psm), sigma=sigma)


def scene(index: int) -> Tensor:
    return to_unit(world.scene("heldout", index).draw())


def drawn(
    smoother: FeatureSmoother, index: int, n: int, advance: Callable[[int], None] = lambda draws: None
) -> Sampler:
    """n draws of a held-out scene, t0 chosen as ``certify`` does; a shorter run's are the first of a longer one's."""
    sampler = Sampler(smoother, scene(index), key=b"benchmark", rows=ROWS, advance=advance)
    sampler.t0 = pilot_threshold(sampler.pilot(Plan(n=n).pilot), n=n)
    sampler.extend(n)
    return sampler


def table(title: str, first: str, *columns: str) -> Table:
    made = Table(first, title=title, title_justify="left")
    for column in columns:
        made.add_column(column, justify="right")
    return made


# Speed.


def pipeline(smoother: FeatureSmoother, noisy: Tensor) -> Tensor:
    """The embedded features of purified, encoded, mapped draws, and nothing else."""
    psm, sigma = smoother.psm, smoother.sigma
    assert psm is not None
    features = smoother.call.encode(psm.purify(noisy, sigma))
    return smoother.call.embed({name: psm.map(name, value, sigma) for name, value in features.items()})


def bare(sampler: Sampler, draws: int) -> int:
    repeated = sampler.image.repeat(ROWS, 1, 1, 1)
    for _ in range(draws // ROWS):
        pipeline(sampler.smoother, repeated + sampler.smoother.sigma * torch.randn_like(repeated))
    return draws // ROWS * ROWS


def plain_loop(sampler: Sampler, draws: int) -> int:
    scores: list[float] = []
    for _ in range(draws // ROWS):
        batch = sampler.image.repeat(ROWS, 1, 1, 1)
        noise = torch.randn_like(batch) * sampler.smoother.sigma
        features = F.normalize(pipeline(sampler.smoother, batch + noise), dim=-1)
        scores += (features @ sampler.reference).tolist()
    return len(scores)


class ZeroShot(nn.Module):
    """The pipeline as a classifier, by products with fixed directions. Counts the draws it is shown."""

    def __init__(self, smoother: FeatureSmoother, width: int) -> None:
        super().__init__()
        self.smoother, self.draws = smoother, 0
        self.directions = F.normalize(torch.randn(len(world.CLASSES), width), dim=-1)

    def forward(self, noisy: Tensor) -> Tensor:
        self.draws += len(noisy)
        return F.normalize(pipeline(self.smoother, noisy), dim=-1) @ self.directions.T


def toolbox(sampler: Sampler, draws: int) -> Callable[[], int] | None:
    """adversarial-robustness-toolbox's smoothed prediction; None where it is not installed."""
    try:
        art: Any = importlib.import_module("art.estimators.certification.randomized_smoothing")
    except ImportError:
        return None
    head, image = ZeroShot(sampler.smoother, len(sampler.reference)), sampler.image
    peer = art.PyTorchRandomizedSmoothing(
        head, nn.CrossEntropyLoss(), tuple(image.shape), len(head.directions), device_type="cpu",
        sample_size=draws, scale=sampler.smoother.sigma, alpha=ALPHA,
    )  # fmt: skip

    def run() -> int:
        before = head.draws
        peer.predict(image[None].numpy(), batch_size=ROWS, is_abstain=False)
        return head.draws - before

    return run


@torch.no_grad()
def speed(smoother: FeatureSmoother, pairs: int, draws: int) -> Table:
    sampler = drawn(smoother, 0, 1000)

    def ours() -> int:
        before = len(sampler.scores)
        sampler.extend(draws)
        return len(sampler.scores) - before

    title = f"Draws per second of the sampler / those of, {ROWS} rows per forward, {pairs} pairs of {draws} draws"
    made = table(title, "", "ratio (median)", "span", "wanted")
    for name, peer, wanted in (
        ("the bare pipeline", partial(bare, sampler, draws), ">= 0.95"),
        ("a plain loop", partial(plain_loop, sampler, draws), ">= 1"),
        ("adversarial-robustness-toolbox", toolbox(sampler, draws), ">= 1"),
    ):
        if peer is None:
            made.add_row(name, "not installed", "", wanted)
            continue
        quotients = []
        for turn in range(pairs + 1):
            # They change places, so that neither always runs on what the other left in the caches.
            rates = {run: rate(run) for run in ((ours, peer) if turn % 2 else (peer, ours))}
            quotients.append(rates[ours] / rates[peer])
        quotients = sorted(quotients[1:])
        span = f"{quotients[0]:.2f} - {quotients[-1]:.2f}"
        made.add_row(name, f"{statistics.median(quotients):.3f}", span, wanted)
    return made


def rate(run: Callable[[], int]) -> float:
    """Draws per second."""
    began = time.perf_counter()
    return run() / (time.perf_counter() - began)


# Memory.


def peak(psm: Path, sigma: float, n: int) -> dict[str, float]:
    """Peak resident memory of one certificate in this process, and above what was resident before it, in MB."""
    model, loaded, images = load_model(), PSM.from_pretrained(psm), scene(0)[None]
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak so far
    before = resident("VmRSS")
    fs_plugins.certify(model, images, n=n, psm=loaded, sigma=sigma, chunk_size=ROWS, seed=0)
    highest = resident("VmHWM")
    return {"all": highest, "above": highest - before}


def resident(field: str) -> float:
    """A field of /proc/self/status in MB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def memory(psm: Path, sigma: float, sizes: tuple[int, int] = (1_000, 20_000)) -> Table:
    made = table("Peak memory of one certificate, MB", "", *(f"n = {n:,}" for n in sizes), "ratio", "wanted")
    if not Path("/proc/self/clear_refs").exists():
        made.add_row("there is no /proc here")
        return made
    # By default glibc grows a heap whose layout, and so the peak, differs by some 30 MB between runs of the same n.
    steady = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16)}
    told = []
    for n in sizes:
        command = [sys.executable, __file__, "--psm", str(psm), "--sigma", str(sigma), "--peak", str(n)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True, env=steady).stdout
        told.append(json.loads(printed.splitlines()[-1]))
    for name, key in (("the process", "all"), ("above the loaded model", "above")):
        few, many = (each[key] for each in told)
        made.add_row(name, f"{few:.1f}", f"{many:.1f}", f"{many / few:.3f}", "<= 1.05")
    return made


# What the draws buy.


def certificate(scores: Scores, method: str, sigma: float, angular: Angular | None = None) -> Certificate:
    return Certificate.from_scores(scores, sigma=sigma, alpha=ALPHA, method=method, angular=angular)


def radii(scores: Scores, sigma: float, angular: Angular | None = None) -> dict[str, float]:
    """The radius by each of BOUNDS, 0 where there is none."""
    lower = hoeffding_lower(scores, ALPHA)
    found = {"Hoeffding": sigma * (furthest(lambda delta: float(mean_bound(lower, delta)), THRESHOLD) or 0.0)}
    for name, method in METHODS.items():
        found[name] = certificate(scores, method, sigma).radius(THRESHOLD) or 0.0
    if angular is not None:
        found[ANGULAR] = certificate(scores, "best", sigma, angular).radius(THRESHOLD) or 0.0
    return found


def needed(smoother: FeatureSmoother, most: int) -> Table:
    scores, sigma = drawn(smoother, 0, most).scores, smoother.sigma
    wanted = radii(scores, sigma)["Hoeffding"]
    if not wanted:
        raise SystemExit(f"Hoeffding certifies no radius from {most:,} draws; give more with --most.")
    prefixes = [n for n in (round(2 ** (k / 2)) for k in range(8, 50)) if n < most]
    reached: dict[str, int] = {}
    for n in [*prefixes, most]:
        # The refinement's t0 depends on n, so that its statistics take a run of their own over the same draws.
        angular = None if ANGULAR in reached else drawn(smoother, 0, n).angular
        for name, radius in radii(scores[:n], sigma, angular).items():
            if radius >= wanted:
                reached.setdefault(name, n)
    title = (
        f"Draws for radius {wanted:.4f}, which Hoeffding certifies from {most:,} (held-out scene 0, sigma {sigma:g})"
    )
    made = table(title, "bound", "draws", "fewer than Hoeffding", "wanted")
    for name, n in sorted(reached.items(), key=lambda row: BOUNDS.index(row[0])):
        pilot = Plan(n=n).pilot if name == ANGULAR else 0
        factor = f"{reached['Hoeffding'] / (n + pilot):.1f} x"
        made.add_row(name, f"{n:,}" + f" + {pilot}" * bool(pilot), factor, ">= 10 x" if name == "best" else "")
    return made


def draw_scenes(psm: Path, sigma: float, scenes: int, n: int) -> dict[str, Any]:
    """Scores (scenes, n) of held-out scenes; t0, count and norm (sizes, scenes, 3) for n draws and the first 1,000."""
    smoother, sizes = load_smoother(psm, sigma), sorted({min(1000, n), n})
    scores: list[Scores] = []
    angular: list[list[tuple[float, ...]]] = [[] for _ in sizes]
    with Progress() as progress:
        task = progress.add_task("draws", total=scenes * sum(size + Plan(n=size).pilot for size in sizes))
        for index in range(scenes):
            for size, row in zip(sizes, angular, strict=True):
                sampler = drawn(smoother, index, size, lambda draws: progress.advance(task, draws))
                seen = sampler.angular
                assert seen is not None
                row.append((seen.t0, seen.count, seen.norm))
            scores.append(sampler.scores)
    found = {"psm": psm.name, "sigma": sigma, "sizes": sizes, "scores": scores, "angular": angular}
    return {name: np.array(value) for name, value in found.items()}


def average_radii(found: Mapping[str, Any]) -> list[Table]:
    """From what ``draw_scenes`` gives."""
    sigma, sizes, scores = float(found["sigma"]), found["sizes"].tolist(), found["scores"]
    averages = []
    for n, row in zip(sizes, found["angular"], strict=True):
        refined = [Angular(t0=t0, count=int(count), norm=norm, n=n) for t0, count, norm in row.tolist()]
        each = [radii(stream[:n], sigma, angular) for stream, angular in zip(scores, refined, strict=True)]
        averages.append({name: statistics.fmean(one[name] for one in each) for name in BOUNDS})
    columns = [f"n = {n:,}" for n in sizes]
    means = table(f"Average radius, {len(scores)} held-out scenes, {found['psm']}, sigma {sigma:g}", "bound", *columns)
    for name in BOUNDS:
        means.add_row(name, *(f"{average[name]:.4f}" for average in averages))
    ratios = table("Ratios of these averages", "", *columns, "wanted")
    for mine, theirs, goal in (
        ("best", "Hoeffding", ">= 1.5 at n = 1,000"),
        ("best", "betting", ">= 1.3 at n = 10,000"),
        (ANGULAR, "best", ""),
    ):
        quotients = (f"{average[mine] / average[theirs]:.3f}" if average[theirs] else "-" for average in averages)
        ratios.add_row(f"{mine} / {theirs}", *quotients, goal)
    return [means, ratios]


# Arithmetic.


def arithmetic() -> Table:
    few, many = (np.clip(np.random.default_rng(0).normal(0.95, 0.02, n), -1, 1) for n in (1_000, 1_000_000))
    made = table(
        "Certificate.from_scores and its curve at 50 points",
        "method", "1,000 scores, ms (wanted < 20)", "1,000,000, s (wanted < 2)", "1,000,000, peak MB",
    )  # fmt: skip
    cases: dict[str, tuple[str, bool]] = {method: (method, False) for method in KNOWN}
    for name, case in {**cases, ANGULAR: ("best", True)}.items():
        short = timeit.repeat(partial(curve, few, *case), number=1, repeat=51)
        long = timeit.repeat(partial(curve, many, *case), number=1, repeat=5)
        tracemalloc.start()
        curve(many, *case)
        highest = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
        made.add_row(name, f"{1000 * statistics.median(short):.2f}", f"{statistics.median(long):.3f}", f"{highest:.0f}")
    return made


def curve(scores: Scores, method: str, refine: bool) -> Scores:
    count = int((scores >= 0.9).sum())
    angular = Angular(t0=0.9, count=count, norm=0.05, n=len(scores)) if refine else None
    return certificate(scores, method, 0.25, angular).curve(np.linspace(0, 0.75, 50))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--psm", type=Path, default=assets.PSM_LLAVA, help="a PSM's folder, by default the demo's")
    parser.add_argument("--sigma", type=float, default=0.25, help="of the noise, in [0, 1] pixels")
    parser.add_argument("--only", choices=["speed", "memory", "needed", "arithmetic"])
    parser.add_argument("--pairs", type=int, default=31, help="speed: measurements beside each peer")
    parser.add_argument("--draws", type=int, default=64, help=f"speed: of one measurement, a multiple of {ROWS}")
    parser.add_argument("--most", type=int, default=4096, help="draws needed: of the stream that Hoeffding is given")
    parser.add_argument("--radii", action="store_true", help="average radii, and nothing else")
    parser.add_argument("--scenes", type=int, default=20, help="radii: held-out scenes")
    parser.add_argument("--n", type=int, default=10_000, help="radii: draws for each scene")
    parser.add_argument("--save", type=Path, help="radii: an .npz file for the scores")
    parser.add_argument("--load", type=Path, help="radii: an .npz file that --save wrote, in place of new draws")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    psm, sigma, show = asked.psm, asked.sigma, Console().print
    if asked.peak:
        print(json.dumps(peak(psm, sigma, asked.peak)))
    elif asked.radii:
        if asked.save:
            asked.save.parent.mkdir(parents=True, exist_ok=True)
        found = np.load(asked.load) if asked.load else draw_scenes(psm, sigma, asked.scenes, asked.n)
        if asked.save:
            np.savez(asked.save, **found)
        for made in average_radii(found):
            show(made)
    else:
        sections: dict[str, Callable[[], Table]] = {
            "speed": lambda: speed(load_smoother(psm, sigma), asked.pairs, asked.draws),
            "memory": lambda: memory(psm, sigma),
            "needed": lambda: needed(load_smoother(psm, sigma), asked.most),
            "arithmetic": arithmetic,
        }
        for name in [asked.only] if asked.only else sections:
            show(sections[name]())


if __name__ == "__main__":
    main()
