"""What certifying costs and what its draws buy: speed beside other samplers, memory, draws needed, radii.

    python benchmarks/certify.py                    # speed, memory, draws needed, arithmetic: about ten minutes
    python benchmarks/certify.py --only speed       # one of them
    python benchmarks/certify.py --radii --save radii.npz --scenes 20 --n 10000    # half an hour by itself
    python benchmarks/certify.py --radii --load radii.npz                          # its tables again, without drawing

All of it on the embedded demo: its LLaVA's tower, its PSM, its held-out scenes, sigma .25, cosine >= .5, alpha = .001.

- Speed: draws per second of the certifier's sampler over those of (a) the bare pipeline, (b) a plain loop as published
  smoothing codes have it, (c) adversarial-robustness-toolbox's randomised smoothing of a zero-shot head on the same
  pipeline. All take turns in one process, with as many rows per forward; printed are the ratios (median, and the span).
  (c) needs ``pip install adversarial-robustness-toolbox==1.20.1``, which changes none of the versions in constraints.txt.
- Memory: peak of ``fs_plugins.certify`` in a fresh process for each n (read from /proc: Linux only).
- Draws needed for one radius, the one that the paper's bound with Hoeffding's inequality certifies from a whole stream of
  draws. The other bounds get prefixes of that stream. Each prefix is certified at alpha as if it had been all: this
  compares bounds, and is no way to choose n for a certificate (that shares alpha, as ``certify(target=...)`` does).
- Arithmetic: ``Certificate.from_scores`` and a curve of 50 points.
- Radii: means over scenes, every bound on the same draws; a scene without a radius counts as 0.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import time
import timeit
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from serving import resident
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

import fs_plugins
from fs_plugins.certificates import Angular, Certificate
from fs_plugins.certificates.bounds import furthest, hoeffding_lower, mean_bound, pilot_threshold
from fs_plugins.certificates.certificate import Method
from fs_plugins.certificates.run import Plan
from fs_plugins.certificates.sampling import Sampler
from fs_plugins.demo import assets, world
from fs_plugins.psm import PSM
from fs_plugins.smoothing import DEFAULT_CHUNK_SIZE, FeatureSmoother
from fs_plugins.training.data import to_unit

ALPHA = 1e-3
THRESHOLD = 0.5
ROWS = DEFAULT_CHUNK_SIZE
KEY = b"benchmark"
METHODS: dict[str, Method] = {"betting": "mean", "distribution": "distribution", "best": "best"}
ANGULAR = "best + angular"
BOUNDS = ("Hoeffding", *METHODS, ANGULAR)
Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Demo:
    """The demo's model, smoothed."""

    psm: Path
    sigma: float

    @cached_property
    def model(self) -> nn.Module:
        model: nn.Module = AutoModelForImageTextToText.from_pretrained(assets.LLAVA)
        return model.eval().requires_grad_(False)

    @cached_property
    def smoother(self) -> FeatureSmoother:
        call = fs_plugins.vision_call(self.model)
        return FeatureSmoother(call, psm=PSM.from_pretrained(self.psm).eval(), sigma=self.sigma)

    def sampler(self, index: int, n: int, advance: Callable[[int], None] = lambda draws: None) -> Sampler:
        """What ``certify`` draws with for n draws of this held-out scene. The draws are those of any other n."""
        sampler = Sampler(self.smoother, scene(index), key=KEY, rows=ROWS, advance=advance)
        sampler.t0 = pilot_threshold(sampler.pilot(Plan(n=n).pilot), n=n)
        return sampler


def scene(index: int) -> Tensor:
    return to_unit(world.scene("heldout", index).draw())


def table(title: str, *columns: str) -> Table:
    made = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left")
    return made


# Speed.


class Pipeline(nn.Module):
    """Noisy images -> the embedded features of the purified, encoded, mapped draws, and nothing else."""

    def __init__(self, smoother: FeatureSmoother) -> None:
        super().__init__()
        assert smoother.psm is not None
        self.encoder, self.psm = smoother.call.module, smoother.psm
        self.call, self.sigma = smoother.call, smoother.sigma

    def forward(self, noisy: Tensor) -> Tensor:
        features = self.call.encode(self.psm.purify(noisy, self.sigma))
        return self.call.embed({name: self.psm.map(name, value, self.sigma) for name, value in features.items()})


class ZeroShot(nn.Module):
    """The pipeline as a classifier: products with fixed directions. Counts the draws it is shown."""

    def __init__(self, pipeline: Pipeline, directions: Tensor) -> None:
        super().__init__()
        self.pipeline = pipeline
        self.register_buffer("directions", directions)
        self.draws = 0

    def forward(self, noisy: Tensor) -> Tensor:
        self.draws += len(noisy)
        return F.normalize(self.pipeline(noisy), dim=-1) @ self.get_buffer("directions").T


def bare(pipeline: Pipeline, image: Tensor, draws: int) -> Callable[[], int]:
    repeated = image.repeat(ROWS, 1, 1, 1)

    def run() -> int:
        for _ in range(draws // ROWS):
            pipeline(repeated + pipeline.sigma * torch.randn_like(repeated))
        return draws

    return run


def plain_loop(pipeline: Pipeline, image: Tensor, draws: int) -> Callable[[], int]:
    reference = F.normalize(pipeline.call.embed(pipeline.call.encode(image[None])), dim=-1)[0]

    def run() -> int:
        scores: list[float] = []
        for _ in range(draws // ROWS):
            batch = image.repeat(ROWS, 1, 1, 1)
            noise = torch.randn_like(batch) * pipeline.sigma
            features = F.normalize(pipeline(batch + noise), dim=-1)
            scores += (features @ reference).tolist()
        return len(scores)

    return run


def toolbox(pipeline: Pipeline, image: Tensor, draws: int) -> Callable[[], int] | None:
    """adversarial-robustness-toolbox's prediction by a majority of draws; None where it is not installed."""
    try:
        art: Any = importlib.import_module("art.estimators.certification.randomized_smoothing")
    except ImportError:
        return None
    width = pipeline.call.embed(pipeline.call.encode(image[None])).shape[-1]
    directions = F.normalize(torch.randn(len(world.CLASSES), width, generator=torch.Generator().manual_seed(0)), dim=-1)
    head = ZeroShot(pipeline, directions)
    peer = art.PyTorchRandomizedSmoothing(
        head,
        nn.CrossEntropyLoss(),
        tuple(image.shape),
        len(directions),
        device_type="cpu",
        sample_size=draws,
        scale=pipeline.sigma,
        alpha=ALPHA,
    )

    def run() -> int:
        before = head.draws
        peer.predict(image[None].numpy(), batch_size=ROWS, is_abstain=False)
        return head.draws - before

    return run


def rate(run: Callable[[], int]) -> float:
    began = time.perf_counter()
    return run() / (time.perf_counter() - began)


@torch.no_grad()
def speed(demo: Demo, rounds: int, draws: int) -> Table:
    image, pipeline = scene(0), Pipeline(demo.smoother)
    sampler = demo.sampler(0, 1000)

    def ours() -> int:
        before = len(sampler.scores)
        sampler.extend(draws)
        return len(sampler.scores) - before

    others = {
        "the bare pipeline": (bare(pipeline, image, draws), 0.95),
        "a plain loop": (plain_loop(pipeline, image, draws), 1.0),
        "adversarial-robustness-toolbox": (toolbox(pipeline, image, draws), 1.0),
    }
    made = table(
        f"Draws per second of the sampler over those of ..., {ROWS} rows per forward, {rounds} rounds of {draws} draws",
        "over", "ratio (median)", "span", "wanted",
    )  # fmt: skip
    turns = [run for run, _ in others.values() if run is not None]
    rates: dict[Callable[[], int], list[tuple[float, float]]] = {run: [] for run in turns}
    for turn in range(-1, rounds):
        for run in turns:
            # Who goes first changes sides: the machine's load may drift within a pair.
            first, second = (ours, run) if turn % 2 else (run, ours)
            measured = {first: rate(first), second: rate(second)}
            if turn >= 0:
                rates[run].append((measured[ours], measured[run]))
    for name, (peer, wanted) in others.items():
        if peer is None:
            made.add_row(name, "not installed", "", f">= {wanted:g}")
            continue
        quotients = sorted(mine / theirs for mine, theirs in rates[peer])
        made.add_row(
            name,
            f"{statistics.median(quotients):.3f}",
            f"{quotients[0]:.2f} - {quotients[-1]:.2f}",
            f">= {wanted:g}",
        )
    return made


# Memory.


def peak(demo: Demo, n: int) -> dict[str, float]:
    """Peak resident memory of one certificate in this process, and what of it the loaded model does not hold, in MB."""
    image, psm = scene(0)[None], PSM.from_pretrained(demo.psm)
    model = demo.model
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    fs_plugins.certify(model, image, n=n, psm=psm, sigma=demo.sigma, seed=0)
    highest = resident("VmHWM")
    return {"peak": highest / 1024, "growth": (highest - before) / 1024}


def memory(demo: Demo, sizes: tuple[int, ...]) -> Table:
    made = table(
        "Peak memory of one certificate, MB", "n", "in all", "above the loaded model", "in all, over the first"
    )
    first = None
    for n in sizes:
        command = [sys.executable, __file__, "--psm", str(demo.psm), "--sigma", str(demo.sigma), "--peak", str(n)]
        told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        first = first or told["peak"]
        made.add_row(f"{n:,}", f"{told['peak']:.0f}", f"{told['growth']:.0f}", f"{told['peak'] / first:.3f}")
    return made


# What the draws buy.


def radii(scores: Scores, sigma: float, angular: Angular | None) -> dict[str, float]:
    """The radius by each of BOUNDS, 0 for none; each may be wrong with probability ALPHA."""
    lower = hoeffding_lower(scores, ALPHA)
    found = {"Hoeffding": sigma * (furthest(lambda delta: float(mean_bound(lower, delta)), THRESHOLD) or 0.0)}
    for name, method in METHODS.items():
        found[name] = certificate(scores, method, sigma).radius(THRESHOLD) or 0.0
    if angular is not None:
        found[ANGULAR] = certificate(scores, "best", sigma, angular).radius(THRESHOLD) or 0.0
    return found


def certificate(scores: Scores, method: Method, sigma: float, angular: Angular | None = None) -> Certificate:
    return Certificate.from_scores(scores, sigma=sigma, alpha=ALPHA, method=method, angular=angular)


def needed(demo: Demo, most: int) -> Table:
    whole = demo.sampler(0, most)
    whole.extend(most)
    scores = whole.scores
    wanted = radii(scores, demo.sigma, None)["Hoeffding"]
    sizes = [n for n in (round(2 ** (k / 2)) for k in range(8, 60)) if n < most] + [most]
    reached: dict[str, int] = {}
    for n in sizes:
        angular = None
        if ANGULAR not in reached:
            again = demo.sampler(0, n)  # the same draws, for a t0 that is chosen as certify does at this n
            again.extend(n)
            angular = again.angular
        for name, value in radii(scores[:n], demo.sigma, angular).items():
            if value >= wanted > 0:
                reached.setdefault(name, n)
    made = table(
        f"Draws for radius {wanted:.4f} (what Hoeffding certifies from {most:,}; held-out scene 0, sigma {demo.sigma:g})",
        "bound", "draws", "Hoeffding's, over these",
    )  # fmt: skip
    for name in BOUNDS:
        if name not in reached:
            made.add_row(name, "not reached", "")
            continue
        pilot = Plan(n=reached[name]).pilot if name == ANGULAR else 0
        drawn = f"{reached[name]:,}" + (f" + {pilot} pilot" if pilot else "")
        made.add_row(name, drawn, f"{reached['Hoeffding'] / (reached[name] + pilot):.1f}")
    return made


def draw_scenes(demo: Demo, scenes: int, n: int) -> dict[str, Any]:
    """Scores (scenes, n) and angular statistics (sizes, scenes) of held-out scenes, for n draws and the first 1,000."""
    sizes = sorted({min(1000, n), n})
    drawn: dict[str, Any] = {"sigma": demo.sigma, "psm": demo.psm.name, "sizes": sizes, "scores": []}
    drawn |= {name: [[] for _ in sizes] for name in ("t0", "count", "norm")}
    with Progress() as progress:
        task = progress.add_task("draws", total=scenes * sum(size + Plan(n=size).pilot for size in sizes))
        for index in range(scenes):
            for place, size in enumerate(sizes):  # once for each, as certify chooses t0 for its n
                sampler = demo.sampler(index, size, advance=lambda draws: progress.advance(task, draws))
                sampler.extend(size)
                for name in ("t0", "count", "norm"):
                    drawn[name][place].append(getattr(sampler.angular, name))
            drawn["scores"].append(sampler.scores)
    return {name: np.array(value) for name, value in drawn.items()}


def average_radii(drawn: Mapping[str, Any]) -> list[Table]:
    """From what ``draw_scenes`` gives."""
    sigma, sizes, scenes = float(drawn["sigma"]), drawn["sizes"].tolist(), drawn["scores"]
    averages = []
    for place, n in enumerate(sizes):
        each = []
        for i, scores in enumerate(scenes):
            t0, count, norm = (drawn[name][place, i].item() for name in ("t0", "count", "norm"))
            each.append(radii(scores[:n], sigma, Angular(t0=t0, count=int(count), norm=norm, n=n)))
        averages.append({name: statistics.fmean(found[name] for found in each) for name in BOUNDS})
    columns = [f"n = {n:,}" for n in sizes]
    means = table(
        f"Average radius for cosine >= {THRESHOLD:g}, alpha {ALPHA:g}: {len(scenes)} held-out scenes, {drawn['psm']}, sigma {sigma:g}",
        "bound", *columns,
    )  # fmt: skip
    for name in BOUNDS:
        means.add_row(name, *(f"{average[name]:.4f}" for average in averages))
    ratios = table("Ratios of these averages", "over", *columns, "wanted")
    for mine, theirs, wanted in (
        ("best", "Hoeffding", "best >= 1.5 at n = 1,000"),
        ("best", "betting", "best >= 1.3 at n = 10,000"),
        (ANGULAR, "best", ""),
    ):
        quotients = (f"{a[mine] / a[theirs]:.3f}" if a[theirs] else "-" for a in averages)
        ratios.add_row(f"{mine} / {theirs}", *quotients, wanted)
    return [means, ratios]


# Arithmetic.


def arithmetic() -> Table:
    made = table(
        "Certificate.from_scores and a curve of 50 points",
        "method", "1,000 scores, ms (< 20)", "1,000,000 scores, s (< 2)", "peak MB of these",
    )  # fmt: skip
    eps = np.linspace(0, 0.75, 50)
    few, many = (np.clip(np.random.default_rng(0).normal(0.95, 0.02, n), -1, 1) for n in (1_000, 1_000_000))
    cases: list[tuple[str, Method, bool]] = [(name, name, False) for name in get_args(Method)]
    for label, method, refined in [*cases, (ANGULAR, "best", True)]:

        def work(scores: Scores, method: Method = method, refined: bool = refined) -> None:
            n = len(scores)
            angular = Angular(t0=0.9, count=int((scores >= 0.9).sum()), norm=0.05, n=n) if refined else None
            certificate(scores, method, 0.25, angular).curve(eps)

        tracemalloc.start()
        work(many)
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        made.add_row(
            label, f"{1000 * seconds(work, few, 51):.2f}", f"{seconds(work, many, 5):.3f}", f"{highest / 2**20:.0f}"
        )
    return made


def seconds(work: Callable[[Scores], None], scores: Scores, times: int) -> float:
    """The median of so many runs."""
    return statistics.median(timeit.repeat(lambda: work(scores), number=1, repeat=times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--psm", type=Path, default=assets.PSM_LLAVA, help="a PSM's folder, by default the demo's")
    parser.add_argument("--sigma", type=float, default=0.25, help="of the noise, in [0, 1] pixels")
    parser.add_argument("--only", choices=["speed", "memory", "needed", "arithmetic"])
    parser.add_argument("--rounds", type=int, default=9, help="speed: pairs with each peer")
    parser.add_argument("--draws", type=int, default=256, help=f"speed: draws a round, a multiple of {ROWS}")
    parser.add_argument("--most", type=int, default=4096, help="needed: draws that Hoeffding's inequality is given")
    parser.add_argument("--radii", action="store_true", help="average radii over scenes, and nothing else")
    parser.add_argument("--scenes", type=int, default=20, help="radii: held-out scenes")
    parser.add_argument("--n", type=int, default=10_000, help="radii: draws for each")
    parser.add_argument("--save", type=Path, help="radii: an .npz file for the draws' scores")
    parser.add_argument("--load", type=Path, help="radii: an .npz file that --save wrote, in place of drawing")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    demo, show = Demo(arguments.psm, arguments.sigma), Console().print
    if arguments.peak:
        print(json.dumps(peak(demo, arguments.peak)))
    elif arguments.radii:
        drawn = np.load(arguments.load) if arguments.load else draw_scenes(demo, arguments.scenes, arguments.n)
        if arguments.save:
            np.savez(arguments.save, **drawn)
        show(*average_radii(drawn), sep="\n")
    else:
        sections: dict[str, Callable[[], Table]] = {
            "speed": lambda: speed(demo, arguments.rounds, arguments.draws),
            "memory": lambda: memory(demo, (1_000, 20_000)),
            "needed": lambda: needed(demo, arguments.most),
            "arithmetic": arithmetic,
        }
        for name, section in sections.items():
            if arguments.only in (None, name):
                show(section())


if __name__ == "__main__":
    main()
