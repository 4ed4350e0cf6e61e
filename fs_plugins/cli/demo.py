"""``fs-plugins demo``."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import HORIZONTALS
from rich.table import Table

from fs_plugins import errors
from fs_plugins.cli.base import console, errors_for_people, needs, plain_table, progress, promise, quieten


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
    """Attack a small real LLaVA live, without and with the plugin. Offline, under three minutes on two cores."""
    with errors_for_people():
        needs("transformers", "matplotlib")
        quieten()
        from fs_plugins.demo import picture, run

        settings = run.Settings(images or (1000 if full else 220), _radius(eps), steps, n0, seed)
        with progress() as track:
            result = run.run(settings, track)
        summary = run.write_summary(result, out)
        picture.draw(result, out / "demo.png")
        _show(result)
        console.print(f"\nWritten: {summary} and {out / 'demo.png'}", soft_wrap=True)


_LABELS = {"acc": "class ACC", "asr": "ASR", "fcs": "FCS", "caption_acc": "caption", "vqa_acc": "question"}
_DEFENCES = {
    "none": "no defence",
    "fs_psm": "FS-PSM",
    "fare": "FARE",
    "fare_fs_psm": "FARE + FS",
    "tecoa": "TeCoA",
    "tecoa_fs_psm": "TeCoA + FS",
}
_PARTS = {
    "none": "none",
    "fs": "noise + average",
    "fs_m": "... + mapper",
    "fs_p": "... + purifier",
    "fs_pm": "... + both",
}


def _radius(text: str) -> float:
    try:
        return float(Fraction(text.replace(" ", "")))
    except (ValueError, ZeroDivisionError):
        raise errors.SettingError(f"eps is a number or a fraction such as 16/255, got {text!r}.") from None


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
            _row(table, f"{which}, {_DEFENCES[name]}", row, list(_LABELS), last=name == list(rows)[-1])
    console.print(table)
    console.print("\n[bold]What each part does[/] to the attacked pictures\n")
    ablation = _table(["acc", "asr", "fcs"])
    for name, label in _PARTS.items():
        _row(ablation, label, result.ablation[name], ["acc", "asr", "fcs"])
    console.print(ablation)
    certified = plain_table("", "paper's estimate", "mean bound", "ours")
    for panel in result.pictures:
        certified.add_row(panel.truth, *(promise(radius) for radius in panel.radii.values()))
    console.print(
        f"\n[bold]What is proven[/] of four of the pictures, from the same {settings.draws:,} draws of each\n"
    )
    console.print(certified)
    console.print(
        "\nThe l2 distance in [0, 1] pixels within which the cosine to the clean feature stays at least .5: by the paper's "
        "formula, which holds at no confidence, by the same formula with a confidence of "
        f"{1 - result.pictures[0].certificate.alpha:g}, and by fs_plugins.certify with that confidence (its mean bound, at the "
        "quarter of alpha that it has there, is the column before). The attack above moves "
        f"a picture by up to {settings.eps * result.pictures[0].clean.numel() ** 0.5:.1f}.",
        style="dim",
        highlight=False,
    )
    console.print(
        f"\nsigma {result.sigma:g}, n0 {settings.n0}. In per cent with 95 % intervals: class ACC, ASR (answers the attacker's "
        "class), exact captions, multiple-choice questions. FCS: cosine of the features consumed from "
        "the clean and the attacked picture (of two runs, for clean ones). The attack is made against "
        "each tower itself, without smoothing. FARE and TeCoA towers were trained against 4/255; their rows are of the first "
        f"{settings.robust_images} scenes; FS with them is the vanilla tower's PSM. "
        f"Empirical robustness is not a certificate. {result.seconds:.0f} s.",
        style="dim",
        highlight=False,
    )


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
