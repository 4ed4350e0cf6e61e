"""``fs-plugins certify``."""

from __future__ import annotations

import csv
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from fs_plugins import errors
from fs_plugins.cli.base import (
    Crew,
    console,
    device,
    duration,
    errors_for_people,
    load,
    needs,
    plain_table,
    progress,
    promise,
    quieten,
    source,
)

DISTANCES = (0.05, 0.1, 0.25, 0.5)
TABLE_SIGMAS = (0.25, 0.5)
TABLE_DISTANCES = (0.125, 0.25, 0.375, 0.5, 0.75)
"""The noise levels and l2 distances of the paper's Table 2."""

_METHODS = {
    "plugin": "paper's estimate",
    "mean": "mean (betting)",
    "distribution": "distribution",
    "certified": "certified",
}


def certify(
    images: Annotated[list[Path] | None, typer.Argument(help="PNG or JPEG files, or folders of them.")] = None,
    model: Annotated[
        str,
        typer.Option(
            help='Folder or hub id of a transformers model, or an encoder of the registry; "demo" and "demo-clip" ship.'
        ),
    ] = "demo",
    psm: Annotated[
        str, typer.Option(help='"auto", "photo", "diffusion", "none" for plain smoothing, a PSM folder or hub id.')
    ] = "auto",
    sigma: Annotated[float | None, typer.Option(help="Noise level in [0, 1] pixels; left out, the PSM's own.")] = None,
    n: Annotated[int, typer.Option("--n", "--draws", min=1, help="Draws per image.")] = 1000,
    alpha: Annotated[float, typer.Option(help="Each certificate may be wrong with this probability.")] = 1e-3,
    method: Annotated[str, typer.Option(help="best, distribution, mean or plugin (the paper's estimate).")] = "best",
    target: Annotated[float | None, typer.Option(help="An l2 radius at which to stop early.")] = None,
    threshold: Annotated[float, typer.Option(help="The cosine that radii speak of.")] = 0.5,
    table: Annotated[
        bool,
        typer.Option(
            "--table", help="The paper's Table 2: averages at sigma .25 and .5, without and with PSM, for all methods."
        ),
    ] = False,
    classes: Annotated[
        str | None, typer.Option(help='Certify zero-shot predictions among these, such as "cat, dog" (CLIP, SigLIP).')
    ] = None,
    prompt: Annotated[str, typer.Option(help="What a class is called in a sentence.")] = "a photo of a {}",
    scenes: Annotated[
        int, typer.Option(min=0, help="So many held-out scenes of the embedded world beside IMAGES.")
    ] = 0,
    seed: Annotated[int | None, typer.Option(help="Reproducible draws.")] = None,
    size: Annotated[int | None, typer.Option(help="Side of the images, for encoders that take any.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the rows (JSON lines) and the plot or table.")] = Path(
        "runs/certify"
    ),
) -> None:
    """How far each image's smoothed feature can turn under attack: a table, JSON lines, and a plot.

    An interrupted run goes on from OUT. Under accelerate launch the images are shared among the processes.
    """
    with errors_for_people():
        needs("transformers", "matplotlib")
        quieten()
        import fs_plugins
        from fs_plugins.certificates.run import Plan

        if table and (classes is not None or method != "best" or target is not None):
            raise errors.SettingError(
                "--table shows every method for features, all from n draws; leave --classes, --method and --target out."
            )
        if classes is not None and (method != "best" or threshold != 0.5):
            raise errors.SettingError("--method and --threshold are about features; --classes certifies predictions.")
        plan = Plan(n=n, alpha=alpha, method=method, target=target, threshold=threshold)  # type: ignore[arg-type]
        crew = Crew.assemble()
        if crew.size > 1 and seed is None:
            raise errors.SettingError("Several processes need --seed, so that their draws are one run's.")
        loaded = load(model).to(device())
        wanted = fs_plugins.vision_call(loaded).image_size or ((size, size) if size else None)
        if wanted is None:
            raise errors.SettingError("This encoder takes images of any size: say which with --size.")
        pictures = _pictures(images or [], scenes, wanted)
        draw: Any = partial(fs_plugins.certify, method=plan.method, threshold=threshold)
        background: dict[str, Any] = {"background": list(pictures.values())}
        if classes is not None:
            from fs_plugins.hf.zeroshot import directions_of

            names = [name.strip() for name in classes.split(",") if name.strip()]
            directions = directions_of(loaded, source(model), names, prompt)
            draw, background = partial(fs_plugins.certify_predictions, directions=directions), {}
        verb = partial(draw, loaded, n=n, alpha=alpha, target=target, seed=seed)
        run = _Run(crew, verb, background, pictures, plan.pilot + n)
        chosen = None if psm == "none" else psm
        if not table:
            rows = out / ("certificates.jsonl" if classes is None else "predictions.jsonl")
            [certified] = run({rows: {"psm": chosen, "sigma": sigma}})
            if crew.rank == 0:
                _finish(certified, rows, threshold, predictions=classes is not None)
            return
        sigmas = TABLE_SIGMAS if sigma is None else (sigma,)
        jobs = {
            out / f"certificates-sigma{level:g}-{'plain' if part is None else 'psm'}.jsonl": {
                "psm": part,
                "sigma": level,
            }
            for level in sigmas
            for part in dict.fromkeys((None, chosen))
        }
        results = run(jobs)
        if crew.rank == 0:
            from fs_plugins.certificates import plot

            for rows, certificates in zip(jobs, results, strict=True):
                plot.draw(list(certificates.values()), rows.with_suffix(".png"))
            _show_table(results, threshold, out / "table.csv")
            console.print(f"\nWritten: {out / 'table.csv'}, and rows and a plot of each run beside it", soft_wrap=True)


@dataclass(frozen=True)
class _Run:
    """Certify the pictures once or several times, this process its share of them."""

    crew: Crew
    verb: Callable[..., list[Any]]
    background: dict[str, Any]
    pictures: dict[str, Any]
    draws: int

    def __call__(self, jobs: dict[Path, dict[str, Any]]) -> list[dict[str, Any]]:
        """A file of rows -> its settings; for each, image -> certificate (of this process only, but in the first)."""
        for rows, settings in jobs.items():
            self.verb(images={}, **settings, out=rows if rows.exists() else None)  # refuses what cannot be, undrawn
        if self.crew.rank == 0:
            first = dict([next(iter(self.pictures.items()))])
            seconds = sum(
                _seconds_per_draw(partial(self.verb, images=first, **{**s, "n": min(64, self.draws), "target": None}))
                for s in jobs.values()
            )
            total = len(self.pictures) * self.draws
            several = f" {len(jobs)} times" if len(jobs) > 1 else ""
            console.print(
                f"{len(self.pictures)} images, {total:,} draws{several}: about "
                f"{duration(seconds * total / self.crew.size)}.",
                highlight=False,
            )
        with progress() as track:
            return [self._one(rows, settings, track) for rows, settings in jobs.items()]

    def _one(self, rows: Path, settings: dict[str, Any], track: Any) -> dict[str, Any]:
        from fs_plugins.certificates.run import merge

        crew = self.crew
        mine = {name: image for i, (name, image) in enumerate(self.pictures.items()) if i % crew.size == crew.rank}
        bar = track(rows.stem, len(mine) * self.draws)
        parts = [rows.with_suffix(f".{i + 1}-of-{crew.size}.jsonl") for i in range(crew.size)]
        own = parts[crew.rank] if crew.size > 1 else rows
        if own != rows and rows.exists() and not own.exists():
            shutil.copy(rows, own)  # a finished run's rows count
        told = self.verb(images=mine, **settings, **self.background, out=own, advance=bar)
        if crew.size > 1:
            crew.wait()
            if crew.rank == 0:
                return merge(parts, rows, list(self.pictures))
        return dict(zip(mine, told, strict=True))


def _pictures(given: list[Path], scenes: int, size: tuple[int, int]) -> dict[str, Any]:
    """Files, folders, and scenes that are drawn -> name -> (3, H, W) in [0, 1]."""
    from fs_plugins.demo import world
    from fs_plugins.pictures import fitted, read
    from fs_plugins.training.data import ImageFolder

    paths: list[Path] = []
    for path in given:
        paths += ImageFolder(path, size).paths if path.is_dir() else [path]
    pictures = {str(path): read(path, size) for path in paths}
    pictures |= {f"scene {i}": fitted(scene.draw(), size) for i, scene in enumerate(world.scenes("heldout", scenes))}
    if not pictures:
        raise errors.SettingError("Nothing to certify: give image files or folders, or --scenes.")
    return pictures


def _finish(certificates: dict[str, Any], rows: Path, threshold: float, *, predictions: bool) -> None:
    if predictions:
        _show_predictions(certificates)
        console.print(f"\nWritten: {rows}", soft_wrap=True)
        return
    from fs_plugins.certificates import plot

    picture = rows.with_suffix(".png")
    plot.draw(list(certificates.values()), picture)
    _show_certificates(certificates, threshold)
    console.print(f"\nWritten: {rows} and {picture}", soft_wrap=True)


def _show_certificates(certificates: dict[str, Any], threshold: float) -> None:
    table = plain_table("image", "mean", *(f"eps {eps:g}" for eps in DISTANCES), f"R {threshold:g}", "in l-inf")
    for name, one in _short(certificates).items():
        radius, inner = one.radius(threshold), one.linf_radius(threshold)
        row = [promise(one.fcsb(eps)) for eps in DISTANCES]
        table.add_row(escape(name), f"{one.mean:.3f}", *row, promise(radius), promise(inner, 255))
    console.print(table)
    first = next(iter(certificates.values()))
    kind = (
        "the paper's estimate, which holds at no confidence"
        if first.is_estimate
        else (f"lower bounds, each wrong with probability at most {first.alpha:g}")
    )
    beside = f" Unrelated images: cosine {first.unrelated:.3f}." if first.unrelated is not None else ""
    _note(
        f"mean: cosine of single draws to the clean feature. eps: the cosine certified within that l2 distance in [0, 1] "
        f"pixels, {kind}; none: nothing is promised. R: the l2 distance within which it stays at least {threshold:g}, and "
        f"the l-inf ball inside, in 255ths. {first.method}, sigma {first.sigma:g}, PSM {first.psm or 'none'}.{beside}"
    )


def _short(certificates: dict[str, Any]) -> dict[str, Any]:
    """Files by their names alone, where these differ."""
    alone = Counter(Path(name).name for name in certificates)
    return {Path(name).name if alone[Path(name).name] == 1 else name: one for name, one in certificates.items()}


def _show_predictions(certificates: dict[str, Any]) -> None:
    table = plain_table("image", "predicted", "draws", "votes", "R vote", "R average", "R")
    for name, one in _short(certificates).items():
        radii = [promise(radius) for radius in (one.vote_radius, one.feature_radius, one.radius)]
        table.add_row(escape(name), escape(one.label), f"{one.n:,}", f"{100 * one.votes / one.n:.1f} %", *radii)
    console.print(table)
    first = next(iter(certificates.values()))
    _note(
        f"votes: share of single draws that predict this class. R vote: the l2 distance in [0, 1] pixels within "
        f"which the majority of draws stays with it. R average: within which the averaged feature does. Both hold together, "
        f"wrong with probability at most {first.alpha:g}; none: it abstains. sigma {first.sigma:g}, PSM "
        f"{first.psm or 'none'}."
    )


def _show_table(results: Sequence[dict[str, Any]], threshold: float, path: Path) -> None:
    """Averages over images, and the same as CSV; an image without a promise counts as 0."""
    columns = ["sigma", "PSM", "method", *(f"{eps:g}" for eps in TABLE_DISTANCES), "R"]
    shown = plain_table("average certified cosine at eps", *columns[3:])
    lines = []
    for certificates in results:
        some = list(certificates.values())
        label = [f"{some[0].sigma:g}", some[0].psm or "none"]
        shown.add_row(
            f"[bold]sigma {label[0]}, {'PSM ' + escape(some[0].psm) if some[0].psm else 'plain smoothing'}[/]"
        )
        for name, title in _METHODS.items():
            alone = some if name == "certified" else [one.by(name) for one in some]
            averages = [_mean([one.fcsb(eps) for one in alone]) for eps in TABLE_DISTANCES]
            averages.append(_mean([one.radius(threshold) for one in alone]))
            shown.add_row(
                f"  {title}",
                *(promise(value or None) for value in averages),
                end_section=name == "certified",
            )
            lines.append([*label, name, *averages])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *lines])
    console.print(shown)
    one = next(iter(results[0].values()))
    _note(
        f"Averages over {len(results[0])} images of the certified cosine at l2 distances in [0, 1] pixels, and of R, the "
        f"distance within which it stays at least {threshold:g}; an image without a promise counts as 0, none: no image has one. "
        f"All methods on the same {one.n:,} draws an image. The paper's estimate holds at no confidence; each certificate is wrong "
        f"with probability at most {one.alpha:g}, of which mean and distribution alone have a quarter each and the refinement "
        "to the cosine a half."
    )


def _mean(values: Sequence[float | None]) -> float:
    return sum(value or 0.0 for value in values) / len(values)


def _note(text: str) -> None:
    console.print(text, style="dim", highlight=False)


def _seconds_per_draw(certify: Callable[..., Any]) -> float:
    """From a short run's own blocks, without what it takes to load and to warm up."""
    marks: list[tuple[float, int]] = []
    certify(advance=lambda draws: marks.append((time.perf_counter(), draws)))
    (first, _), *later = marks
    return (later[-1][0] - first) / sum(draws for _, draws in later) if later else 0.0
