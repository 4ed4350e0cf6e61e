"""``fs-plugins evaluate``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

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
    quieten,
    source,
)

DEMO: dict[str, Any] = {
    "images": 220,
    "steps": 100,
    "aside_images": 55,
    "adaptive_images": 44,
    "adaptive_steps": 60,
    "adaptive_draws": 1,
    "certified_images": 11,
    "certified_draws": 500,
    "masking_images": 11,
    "masking_queries": 200,
}
"""On the embedded world: pictures, and how much work each gets, for two cores."""
QUICK: dict[str, Any] = {
    "images": 22,
    "steps": 20,
    "aside_images": 11,
    "adaptive_images": 4,
    "adaptive_steps": 8,
    "adaptive_draws": 1,
    "certified_images": 3,
    "certified_draws": 100,
    "masking_images": 4,
    "masking_queries": 10,
}
"""The same for ``--quick``."""


def evaluate(
    suite: Annotated[
        list[str] | None,
        typer.Option(help="table1 to table5, s6, s7, s8, adaptive, masking, or all; may be given several times."),
    ] = None,
    model: Annotated[
        str, typer.Option(help='Folder or hub id of a transformers model; "demo" and "demo-clip" ship.')
    ] = "demo",
    data: Annotated[
        Path | None,
        typer.Option(help="A dataset (docs/evaluation-data.md); left out, held-out scenes of the embedded world."),
    ] = None,
    targets: Annotated[Path | None, typer.Option(help="Pictures that attacks aim at, where the data has none.")] = None,
    corrupt: Annotated[str, typer.Option(help="refuse or skip pictures that cannot be read.")] = "refuse",
    images: Annotated[int | None, typer.Option(min=2, help="How many pictures; all of the data if left out.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the attacks; 300 in the papers.")] = None,
    eps: Annotated[
        str | None, typer.Option(help="Another l-inf radius for the suites' attacks, in [0, 1] pixels, such as 8/255.")
    ] = None,
    aside_images: Annotated[int | None, typer.Option(min=1, help="Pictures of the suites s6, s7 and s8.")] = None,
    adaptive_images: Annotated[int | None, typer.Option(min=1, help="Pictures of the adaptive attacks.")] = None,
    adaptive_steps: Annotated[int | None, typer.Option(min=1, help="Steps of the adaptive attacks.")] = None,
    adaptive_draws: Annotated[int | None, typer.Option(min=1, help="Draws that each such step averages over.")] = None,
    certified_images: Annotated[int | None, typer.Option(min=1, help="Pictures that are certified.")] = None,
    certified_draws: Annotated[int | None, typer.Option(min=1, help="Draws of each certificate.")] = None,
    masking_images: Annotated[int | None, typer.Option(min=2, help="Pictures of the suite masking.")] = None,
    masking_queries: Annotated[
        int | None, typer.Option(min=1, help="Queries of its gradient-free attack, a picture.")
    ] = None,
    psm: Annotated[str, typer.Option(help='"auto", "photo", "diffusion", a PSM folder or hub id.')] = "auto",
    light: Annotated[str, typer.Option(help="The light PSM of suite s6.")] = "photo",
    sigma: Annotated[float | None, typer.Option(help="Noise level in [0, 1] pixels; left out, the PSM's own.")] = None,
    n0: Annotated[int, typer.Option(min=1, help="Noisy draws per picture.")] = 4,
    fare: Annotated[
        str | None, typer.Option(help='The FARE encoder, as swap_encoder takes it; "none" leaves its rows out.')
    ] = None,
    tecoa: Annotated[str | None, typer.Option(help="The TeCoA encoder.")] = None,
    class_prompt: Annotated[
        str, typer.Option(help="What CLIP and SigLIP are told a class is called.")
    ] = "a photo of a {}",
    judge: Annotated[
        str, typer.Option(help="exact, similarity, endpoint, or a plugin's: compares captions.")
    ] = "exact",
    judge_model: Annotated[str | None, typer.Option(help="Model of the judge.")] = None,
    judge_url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible endpoint; its key is read from OPENAI_API_KEY.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Pictures at once, 8 by default; bounds memory, changes no result.")
    ] = None,
    chunk_size: Annotated[
        int, typer.Option(min=1, help="Noisy copies that a smoothed encoder takes at once; the same.")
    ] = 32,
    seed: Annotated[int, typer.Option(help="Of attacks, serving noise and certificates.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few pictures and steps, to see that all works; intervals are wide.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for everything; an interrupted run goes on from it. runs/evaluate, with --quick runs/evaluate-quick."
        ),
    ] = None,
) -> None:
    """The paper's tables on a model: attacks, defences, tasks, certificates. Terminal, CSV and one HTML report.

    Under accelerate launch the pictures are shared among the processes.
    """
    with errors_for_people():
        needs("transformers", "matplotlib", "ot", extra="evaluate")
        quieten()
        from fs_plugins.evaluation.datasets import open_dataset
        from fs_plugins.evaluation.judges import judge as judge_by_name
        from fs_plugins.evaluation.results import Results
        from fs_plugins.evaluation.run import Evaluation, Settings, fixed
        from fs_plugins.evaluation.store import Store
        from fs_plugins.smoothing import check_sigma

        began = time.time()
        out = out or Path("runs/evaluate-quick" if quick else "runs/evaluate")
        suites = _suites(suite or ["table3"], eps)
        if sigma is not None:
            check_sigma(sigma)
        crew = Crew.assemble()
        defaults = dict(QUICK if quick else DEMO if data is None else {})
        few = defaults.pop("images", None)
        count = images or few
        given = {
            "steps": steps,
            "aside_images": aside_images,
            "masking_images": masking_images,
            "masking_queries": masking_queries,
            "adaptive_images": adaptive_images,
            "adaptive_steps": adaptive_steps,
            "adaptive_draws": adaptive_draws,
            "certified_images": certified_images,
            "certified_draws": certified_draws,
        }
        settings = Settings(
            **{**defaults, **{name: value for name, value in given.items() if value is not None}},
            psm=psm,
            light=light,
            mapper_only=_mapper_only(model),
            sigma=sigma,
            n0=n0,
            seed=seed,
        )
        if judge == "endpoint" and not (judge_url and judge_model):
            raise errors.SettingError(
                "--judge endpoint needs --judge-url, such as http://localhost:8000/v1, and --judge-model."
            )
        told = {"model": judge_model, "url": judge_url}
        compares = judge_by_name(judge, **{name: value for name, value in told.items() if value is not None})
        towers = _towers(model, fare, tecoa)
        dataset = open_dataset(
            _scenes(out, count, crew) if data is None else data,
            targets=targets,
            corrupt=corrupt,  # type: ignore[arg-type]
            seed=seed,
        )
        if images is not None or quick:
            dataset = dataset.some(images or min(few, len(dataset.samples)), seed)
        if not any(one.task is None or one.task in dataset.tasks for one in suites):
            raise errors.SettingError(
                f"{dataset.name} can be asked for {', '.join(dataset.tasks)}, and {', '.join(one.name for one in suites)} asks "
                "for something else (docs/evaluation-data.md says what each task needs)."
            )
        for sentence in dataset.skipped:
            console.print(f"[yellow]Skipped[/]  {sentence}", highlight=False)
        kept = {**fixed(model, towers, dataset, settings), "class_prompt": class_prompt}
        if crew.rank == 0:
            Store(out / "results", kept)
        crew.wait()
        store = Store(out / "results", kept, crew.rank)
        with progress() as track:
            evaluation = Evaluation(
                load=_loader(model, towers, dataset, class_prompt),
                towers=list(towers),
                dataset=dataset,
                suites=suites,
                settings=settings,
                store=store,
                judge=compares,
                track=track,
                batch_size=batch_size or (44 if data is None else 8),
                chunk_size=chunk_size,
                share=(crew.rank, crew.size),
                wait=crew.wait,
            )
            failed = None
            try:
                evaluation.run()
            except errors.JudgeError as error:  # everything else is there
                failed = error
        if crew.rank == 0:
            _show(Results(evaluation), out, began)
        if failed is not None:
            raise failed


def _suites(names: list[str], eps: str | None) -> list[Any]:
    from fs_plugins.attacks import Ball
    from fs_plugins.evaluation.suites import SUITES

    wanted = list(SUITES) if "all" in names else list(dict.fromkeys(names))
    for name in wanted:
        if name not in SUITES:
            raise errors.SettingError(f"There is no suite {name!r}. The suites are: {', '.join(SUITES)}, all.")
    chosen = [SUITES[name] for name in wanted]
    if eps is None:
        return chosen
    try:
        radius = float(Fraction(eps))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise errors.SettingError(f"--eps is a number such as 16/255 or 0.05, got {eps!r}.") from None
    Ball("linf", radius)
    scale = 255 * radius / 16  # the suites' own is 16, and 32 for s7
    return [
        replace(
            one,
            conditions=tuple(
                replace(each, eps255=min(255.0, round(scale * each.eps255, 6))) for each in one.conditions
            ),
        )
        for one in chosen
    ]


def _mapper_only(model: str) -> str | None:
    """The demo ships a mapper that was trained without a purifier, as the ablation wants it."""
    from fs_plugins.demo import assets

    return str(assets.PSM_NO_PURIFIER) if model == "demo" else None


def _towers(model: str, fare: str | None, tecoa: str | None) -> dict[str, str]:
    """Names of towers -> what ``swap_encoder`` is told; the model's own first."""
    demo = model in ("demo", "demo-clip")
    defaults = {"fare": "demo-fare", "tecoa": "demo-tecoa"} if demo else {"fare": "fare4-clip", "tecoa": "tecoa4-clip"}
    given = {"fare": fare, "tecoa": tecoa}
    found = {name: given[name] or defaults[name] for name in defaults}
    return {"none": "", **{name: what for name, what in found.items() if what != "none"}}


def _scenes(out: Path, count: int, crew: Crew) -> Path:
    from fs_plugins.demo.dataset import write

    folder = out / f"scenes-{count}"
    if crew.rank == 0:
        try:
            write(folder, count)
        except OSError as error:
            raise errors.SettingError(f"Nothing can be written to {out}: {error}.") from None
    crew.wait()
    return folder


def _loader(model: str, towers: dict[str, str], dataset: Any, class_prompt: str) -> Callable[[str], Any]:
    """A tower's name -> the model with it, ready to be asked."""

    def loaded(tower: str) -> Any:
        import fs_plugins
        from fs_plugins.hf.chat import Chat
        from fs_plugins.hf.zeroshot import ZeroShot, directions_of

        one = load(model).to(device()).requires_grad_(False)
        talks = callable(getattr(one, "generate", None))
        processor = None
        if talks:
            from transformers import AutoProcessor

            try:
                processor = AutoProcessor.from_pretrained(source(model))
            except (OSError, ValueError) as error:
                raise errors.ModelError(f"Cannot load a processor for {model!r}: {error}") from None
        if towers[tower]:
            fs_plugins.swap_encoder(one, towers[tower], processor=processor)
        if talks:
            return Chat(one, processor)
        return ZeroShot(one, directions_of(one, source(model), dataset.classes, class_prompt))

    return loaded


def _show(results: Any, out: Path, began: float) -> None:
    from fs_plugins.evaluation.report import write

    evaluation = results.evaluation
    tables = results.tables()
    said = set()
    for table in tables:
        console.print(f"\n[bold]{table.title}[/]\n")
        console.print(_drawn(table))
        if table.note not in said:
            console.print(table.note, style="dim", highlight=False)
        said.add(table.note)
        table.write_csv(out / f"{table.name}.csv")
    for note in results.notes():
        console.print(f"[yellow]Left out[/]  {note}", highlight=False, soft_wrap=True)
    settings = evaluation.settings
    # A run that was resumed took longer than its last part.
    took = time.time() - began
    (out / "summary.json").write_text(json.dumps({**results.summary(), "seconds": round(took, 1)}, indent=2) + "\n")
    write(results, out / "report.html", purify=evaluation.purify)
    console.print(
        f"\n{len(evaluation.dataset.samples)} pictures, attacks of {settings.steps} steps; on "
        f"{settings.adaptive_images or 'all'} of them adaptive ones, {settings.adaptive_steps} steps of "
        f"{settings.adaptive_draws} x n0 draws; seed {settings.seed}. {duration(took)}.\n"
        f"Written: {out / 'report.html'}, and a CSV of each table, summary.json and all rows beside it",
        highlight=False,
        soft_wrap=True,
    )


def _drawn(table: Any) -> Table:
    """For 80 columns: rows with the same first cell are a section under it; pooled cosines and scores are left to CSV and report."""
    from fs_plugins.evaluation.results import parted

    kept = [place for place, column in enumerate(table.columns) if not {"pooled", "score"} & set(column.split())]
    groups = [(head, list(rows)) for head, rows in groupby(table.rows, key=lambda row: row[0])]
    sections = "defence" in table.columns[1:] and len(groups) < len(table.rows)
    kept = kept[1:] if sections else kept
    words = {place for place in kept if all(isinstance(row[place], str) for row in table.rows)}
    shown = plain_table()
    shown.padding = (0, 1, 0, 0)
    for place in kept:
        # Words are broken rather than figures, as long as figures are few.
        whole = place not in words and len(kept) <= 6
        shown.add_column(
            table.headings[place], justify="left" if place in words else "right", overflow="fold", no_wrap=whole
        )
    for head, rows in groups:
        if sections:
            shown.add_section()
            shown.add_row(Text(str(head), style="bold"))
        for row in rows:
            cells = (parted(row[place]) for place in kept)
            shown.add_row(*(Text.assemble(said, " " * bool(interval), (interval, "dim")) for said, interval in cells))
    return shown
