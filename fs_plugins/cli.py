"""``fs-plugins``: the demo, one question to any model, and a look at what is installed."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import HORIZONTALS
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from fs_plugins import errors

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()


@app.command()
def demo(
    full: Annotated[bool, typer.Option("--full", help="1,000 scenes instead of 220.")] = False,
    images: Annotated[
        int | None, typer.Option(min=11, help="How many held-out scenes (every eleventh has no shape).")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the attack.")] = 100,
    eps: Annotated[
        str, typer.Option(help="l-inf radius of the attack in [0, 1] pixels, as people write it.")
    ] = "16/255",
    n0: Annotated[int, typer.Option(min=1, help="Noisy draws per image.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the serving noise, so that a run can be repeated.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for summary.json and demo.png.")] = Path("runs/demo"),
) -> None:
    """Attack a small real LLaVA live, without and with the plugin. Offline, about two minutes on two cores."""
    with _errors_for_people():
        _needs("transformers", "matplotlib")
        _quieten()
        from fs_plugins.demo import picture, run

        settings = run.Settings(images or (1000 if full else 220), _radius(eps), steps, n0, seed)
        with _progress() as track:
            result = run.run(settings, track)
        summary = run.write_summary(result, out)
        picture.draw(result, out / "demo.png")
        _show(result)
        console.print(f"\nWritten: {summary} and {out / 'demo.png'}", soft_wrap=True)


@app.command()
def ask(
    model: Annotated[
        str, typer.Argument(help='Folder or hub id of an image-text-to-text model; "demo" is the one that ships.')
    ],
    image: Annotated[Path, typer.Argument(help="A PNG or JPEG file.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    psm: Annotated[str, typer.Option(help='"auto", "none" for plain smoothing, a PSM folder or hub id.')] = "auto",
    sigma: Annotated[float | None, typer.Option(help="Noise level in [0, 1] pixels; left out, the PSM's own.")] = None,
    n0: Annotated[int, typer.Option(min=1, help="Noisy draws per image.")] = 4,
    seed: Annotated[int | None, typer.Option(help="Reproducible noise.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
) -> None:
    """The answer without and with smoothing, side by side, with the time each took."""
    with _errors_for_people():
        _needs("transformers")
        _quieten()
        import fs_plugins
        from fs_plugins.evaluation import ask as answer

        picture = _picture(image)
        loaded, processor = _load(model)

        def timed() -> tuple[str, float]:
            began = time.perf_counter()
            return answer(loaded, processor, [picture], [question], max_new_tokens=max_new_tokens)[
                0
            ], time.perf_counter() - began

        answer(loaded, processor, [picture], [question], max_new_tokens=1)  # the first call pays for warming up
        plain, plain_seconds = timed()
        chosen = None if psm == "none" else psm
        with fs_plugins.enable(loaded, psm=chosen, sigma=sigma, n0=n0, seed=seed) as handle:
            smoothed, smoothed_seconds = timed()
            told = handle.status()
        console.print(f"{image.name}: {question}", markup=False, highlight=False)
        table = Table(box=HORIZONTALS)
        table.add_column("")
        table.add_column("answer", overflow="fold")
        table.add_column("seconds", justify="right")
        table.add_row("without", plain or "(nothing)", f"{plain_seconds:.2f}")
        table.add_row("with fs_plugins", smoothed or "(nothing)", f"{smoothed_seconds:.2f}")
        console.print(table)
        console.print(str(told), style="dim", highlight=False, soft_wrap=True)


@app.command()
def certify(
    images: Annotated[list[Path], typer.Argument(help="PNG or JPEG files, or folders of them.")],
    model: Annotated[
        str, typer.Option(help='Folder or hub id of a transformers model; "demo" is the one that ships.')
    ] = "demo",
    psm: Annotated[str, typer.Option(help='"auto", "none" for plain smoothing, a PSM folder or hub id.')] = "auto",
    sigma: Annotated[float | None, typer.Option(help="Noise level in [0, 1] pixels; left out, the PSM's own.")] = None,
    n: Annotated[int, typer.Option("--n", "--draws", min=1, help="Draws per image.")] = 1000,
    alpha: Annotated[float, typer.Option(help="Each certificate may be wrong with this probability.")] = 1e-3,
    method: Annotated[str, typer.Option(help="best, distribution, mean or plugin (the paper's estimate).")] = "best",
    target: Annotated[float | None, typer.Option(help="An l2 radius at which to stop early.")] = None,
    threshold: Annotated[float, typer.Option(help="The cosine that radii speak of.")] = 0.5,
    seed: Annotated[int | None, typer.Option(help="Reproducible draws.")] = None,
    size: Annotated[int | None, typer.Option(help="Side of the images, for encoders that take any.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for certificates.jsonl and certificates.png.")] = Path(
        "runs/certify"
    ),
) -> None:
    """How far each image's smoothed feature can turn under attack: a table, JSON lines, and a plot.

    An interrupted run goes on from OUT. Under torchrun or accelerate launch the images are shared among the processes.
    """
    with _errors_for_people():
        _needs("transformers", "matplotlib")
        _quieten()
        import fs_plugins
        from fs_plugins.certificates import plot
        from fs_plugins.certificates.run import Plan, merge

        plan = Plan(n=n, alpha=alpha, method=method, target=target, threshold=threshold)  # type: ignore[arg-type]
        rank, processes, wait = _processes()
        loaded = _load_any(model).to(_device())
        wanted = fs_plugins.vision_call(loaded).image_size or ((size, size) if size else None)
        if wanted is None:
            raise errors.SettingError("This encoder takes images of any size: say which with --size.")
        pictures = _pictures(images, wanted)
        settings: dict[str, Any] = {
            "n": n, "alpha": alpha, "method": method, "target": target, "threshold": threshold,
            "psm": None if psm == "none" else psm, "sigma": sigma,
        }  # fmt: skip
        rows = out / "certificates.jsonl"
        if processes > 1 and seed is None:
            raise errors.SettingError("Several processes need --seed, so that their draws are one run's.")
        mine = {name: picture for i, (name, picture) in enumerate(pictures.items()) if i % processes == rank}
        parts = [out / f"certificates.{i + 1}-of-{processes}.jsonl" for i in range(processes)]
        draws = len(mine) * (n + plan.pilot)
        if rank == 0:
            estimate = draws * _seconds_per_draw(
                lambda advance: fs_plugins.certify(
                    loaded, next(iter(mine.values()))[None], **{**settings, "n": 96, "target": None}, advance=advance
                )
            )
            console.print(
                f"{len(pictures)} images, {len(pictures) * (n + plan.pilot):,} draws: about {_duration(estimate)}.",
                highlight=False,
            )
        with _progress() as track:
            bar = track("draws", draws)
            told = fs_plugins.certify(
                loaded,
                mine,
                **settings,
                seed=seed,
                out=parts[rank] if processes > 1 else rows,
                background=list(pictures.values()),
                advance=bar,
            )
        certificates = dict(zip(mine, told, strict=True))
        if processes > 1:
            wait()
            if rank > 0:
                return
            certificates = merge(parts, rows, list(pictures))
        picture = out / "certificates.png"
        plot.draw(list(certificates.values()), picture)
        _show_certificates(certificates, threshold)
        console.print(f"\nWritten: {rows} and {picture}", soft_wrap=True)


@app.command()
def doctor(
    model: Annotated[
        str | None, typer.Argument(help='Folder or hub id of a transformers model; "demo" is the one that ships.')
    ] = None,
) -> None:
    """What is installed, which adapters loaded, and what enable would find in a model."""
    with _errors_for_people():
        from fs_plugins import doctor as consulting

        table = _plain_table("framework", "version")
        for name, number in consulting.frameworks().items():
            table.add_row(name, number or "[dim]not installed[/]")
        console.print(table)
        table = _plain_table("plugin", "from", "provides")
        for plugin in consulting.plugins():
            provides = ", ".join(plugin.hooks) if plugin.problem is None else f"[red]{escape(plugin.problem)}[/]"
            table.add_row(plugin.name, f"{plugin.distribution}\n[dim]{escape(plugin.location)}[/]", provides)
        console.print(table)
        if model is None:
            return
        _needs("transformers")
        _quieten()
        found = consulting.diagnose(_load_any(model))
        lines = [("model", found.model)]
        lines += [("claimed by", f"{name}: {rule}") for name, rule in found.rules.items()]
        for encoder in found.encoders:
            lines += [
                ("encoder", f"{encoder.module}, images {encoder.image_size}"),
                ("mean, std", encoder.pixels),
                ("features", ", ".join(encoder.readouts)),
                ("recognised", ", ".join(encoder.recognised) or "no entry of the registry has this encoder"),
                ("PSM", encoder.psm),
            ]
        table = Table(box=None, show_header=False)
        for what, told in lines:
            table.add_row(f"[bold]{what}[/]", escape(told))
        console.print(table)
        if found.problem:
            raise errors.ModelError(found.problem)


def main() -> None:
    """Entry point."""
    warnings.showwarning = _show_warning
    app()


def _load(name: str) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from fs_plugins.demo import assets

    source = str(assets.LLAVA) if name == "demo" else name
    try:
        processor = AutoProcessor.from_pretrained(source)
        model = AutoModelForImageTextToText.from_pretrained(source, dtype="auto")
    except (OSError, ValueError) as error:
        raise errors.ModelError(f"Cannot load {name!r} as an image-text-to-text model: {error}") from None
    return model.eval().to(_device()), processor


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _load_any(name: str) -> Any:
    """A transformers model of whatever class its configuration names."""
    import transformers

    from fs_plugins.demo import assets

    source = str(assets.LLAVA) if name == "demo" else name
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        own = [kind for kind in getattr(config, "architectures", None) or () if hasattr(transformers, kind)]
        kind = getattr(transformers, own[0]) if own else transformers.AutoModel
        return kind.from_pretrained(source, dtype="auto").eval()
    except (OSError, ValueError) as error:
        raise errors.ModelError(f"Cannot load {name!r} with transformers: {error}") from None


def _picture(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except FileNotFoundError:
        raise errors.SettingError(f"There is no file {path}.") from None
    except (UnidentifiedImageError, OSError) as error:
        raise errors.SettingError(f"{path} is not a readable image: {error}") from None


def _radius(text: str) -> float:
    try:
        return float(Fraction(text.replace(" ", "")))
    except (ValueError, ZeroDivisionError):
        raise errors.SettingError(f"eps is a number or a fraction such as 16/255, got {text!r}.") from None


def _needs(*packages: str) -> None:
    from importlib.util import find_spec

    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise errors.SettingError(f'This command needs {" and ".join(missing)}: pip install "fs-plugins[demo]".')


_LABELS = {"acc": "class ACC", "asr": "ASR", "fcs": "FCS", "caption_acc": "caption", "vqa_acc": "question"}
_DEFENCES = {"none": "no defence", "fs_psm": "FS-PSM"}
_PARTS = {
    "none": "none",
    "fs": "noise + average",
    "fs_m": "... + mapper",
    "fs_p": "... + purifier",
    "fs_pm": "... + both",
}


def _quieten() -> None:
    """Keep transformers' loading bars and notices out of a command's output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _show(result: Any) -> None:
    settings = result.settings
    console.print(
        f"[bold]{settings.images} held-out scenes[/], targeted attack at l-inf {settings.eps * 255:g}/255, "
        f"{settings.steps} steps\n",
        highlight=False,
    )
    table = _table(list(_LABELS))
    for which, rows in (("clean", result.clean), ("attacked", result.attacked)):
        for name, row in rows.items():
            _row(table, f"{which}, {_DEFENCES[name]}", row, list(_LABELS), last=name == "fs_psm")
    console.print(table)
    console.print("\n[bold]What each part does[/] to the attacked pictures\n")
    ablation = _table(["acc", "asr", "fcs"])
    for name, label in _PARTS.items():
        _row(ablation, label, result.ablation[name], ["acc", "asr", "fcs"])
    console.print(ablation)
    console.print(
        f"\nsigma {result.sigma:g}, n0 {settings.n0}. In per cent with 95 % intervals: class ACC, ASR (answers the attacker's "
        "class), exact captions, multiple-choice questions. FCS: cosine of the features consumed from "
        "the clean and the attacked picture (of two runs, for clean ones). The attack is made against "
        f"the undefended tower. Empirical robustness is not a certificate. {result.seconds:.0f} s.",
        style="dim",
        highlight=False,
    )


def _pictures(given: list[Path], size: tuple[int, int]) -> dict[str, Any]:
    """Files and folders -> path as written -> (3, H, W) in [0, 1]."""
    from fs_plugins.training.data import ImageFolder, read

    paths: list[Path] = []
    for path in given:
        paths += ImageFolder(path, size).paths if path.is_dir() else [path]
    return {str(path): read(path, size) for path in paths}


def _show_certificates(certificates: dict[str, Any], threshold: float) -> None:
    distances = (0.05, 0.1, 0.25, 0.5)
    table = _plain_table("image", "mean", *(f"eps {eps:g}" for eps in distances), f"R {threshold:g}", "in l-inf")
    for name, one in certificates.items():
        radius, inner = one.radius(threshold), one.linf_radius(threshold)
        row = [_promise(one.fcsb(eps)) for eps in distances]
        table.add_row(escape(Path(name).name), f"{one.mean:.3f}", *row, _promise(radius), _promise(inner, 255))
    console.print(table)
    first = next(iter(certificates.values()))
    kind = (
        "the paper's estimate, which holds at no confidence"
        if first.is_estimate
        else (f"lower bounds, each wrong with probability at most {first.alpha:g}")
    )
    beside = f" Unrelated images: cosine {first.unrelated:.3f}." if first.unrelated is not None else ""
    console.print(
        f"mean: cosine of single draws to the clean feature. eps: the cosine certified within that l2 distance in [0, 1] "
        f"pixels, {kind}; none: nothing is promised. R: the l2 distance within which it stays at least {threshold:g}, and "
        f"the l-inf ball inside, in 255ths. {first.method}, sigma {first.sigma:g}, PSM {first.psm or 'none'}.{beside}",
        style="dim",
        highlight=False,
    )


def _processes() -> tuple[int, int, Any]:
    """Which of how many processes this is, and how to wait for the others (``torchrun``, ``accelerate launch``)."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return 0, 1, lambda: None
    _needs("accelerate")
    from accelerate import PartialState

    state = PartialState(cpu=_device() == "cpu")
    return state.process_index, state.num_processes, state.wait_for_everyone


def _seconds_per_draw(certify: Any) -> float:
    """From a short run's own blocks, without what it takes to load and to warm up."""
    marks: list[tuple[float, int]] = []
    certify(lambda draws: marks.append((time.perf_counter(), draws)))
    (first, _), *later = marks
    return (later[-1][0] - first) / sum(draws for _, draws in later)


def _promise(value: float | None, units: int = 1) -> str:
    return "none" if value is None else f"{value:.3f}" if units == 1 else f"{value * units:.2f}/{units}"


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )


def _plain_table(*columns: str) -> Table:
    table = Table(box=HORIZONTALS, show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _table(keys: list[str]) -> Table:
    table = Table(box=HORIZONTALS, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.add_column("", min_width=18)
    for key in keys:
        table.add_column(_LABELS[key], justify="right")
    return table


def _row(table: Table, label: str, row: Any, keys: list[str], *, last: bool = False) -> None:
    estimates = row.estimates()
    table.add_row(label, *(_cell(estimates[key], key) for key in keys), end_section=last)


def _cell(estimate: Any, key: str) -> str:
    """Value and interval, in per cent but for cosines."""
    value, low, high = estimate.value, estimate.low, estimate.high
    if key == "fcs":
        return f"{value:.2f} [dim]{low:.2f}-{high:.2f}[/]".replace("0.", ".")
    shown = f"{100 * value:.1f}" if 0 < value < 0.1 else f"{100 * value:.0f}"
    return f"{shown} [dim]{100 * low:.0f}-{100 * high:.0f}[/]"


@contextmanager
def _progress() -> Iterator[Any]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:

        def track(what: str, total: int) -> Any:
            task = bars.add_task(what, total=total)
            return lambda done: bars.advance(task, done)

        yield track


@contextmanager
def _errors_for_people() -> Iterator[None]:
    try:
        yield
    except errors.FSPluginsError as error:
        console.print(f"[bold red]Error[/]  {type(error).__name__}:", end=" ")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


def _show_warning(message: Any, category: Any, filename: Any, lineno: Any, file: Any = None, line: Any = None) -> None:
    if issubclass(category, errors.FSPluginsWarning):
        Console(stderr=True).print(f"Warning: {message}", style="yellow", markup=False, soft_wrap=True)
    elif not sys.warnoptions:
        return


if __name__ == "__main__":
    main()
