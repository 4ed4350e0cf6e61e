"""``fs-plugins certify``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fs_plugins.cli.base import (
    Crew,
    console,
    duration,
    errors_for_people,
    needs,
    note,
    plain_table,
    progress,
    promise,
    short,
)
from fs_plugins.errors import SettingError
from fs_plugins.terminal import styled

if TYPE_CHECKING:
    from torch import Tensor

    from fs_plugins.certificates import Certificate, Plan, PredictionCertificate
    from fs_plugins.certificates.folder import FolderRun
    from fs_plugins.certificates.table import Average
    from fs_plugins.certificates.values import C

DISTANCES = (0.05, 0.1, 0.25, 0.5)


def certify(
    images: Annotated[list[Path] | None, typer.Argument(help="PNG or JPEG files, or folders of them.")] = None,
    model: Annotated[
        str,
        typer.Option(
            help="Folder or hub id of a transformers model, or an encoder of the registry; "
            '"demo", "demo-clip" and "photo-vlm" ship.'
        ),
    ] = "demo",
    processor: Annotated[
        str | None, typer.Option(help="Folder or hub id of the model's processor, where none is beside the model.")
    ] = None,
    psm: Annotated[
        str,
        typer.Option(help='"auto", "photo-light", "diffusion", "none" for plain smoothing, a PSM folder or hub id.'),
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
    features: Annotated[
        bool, typer.Option("--features", help="Certify the features of an image classifier, not its labels.")
    ] = False,
    ask: Annotated[
        str | None, typer.Option(help="Certify the answers to this question; several with | between them.")
    ] = None,
    choices: Annotated[str | None, typer.Option(help='What answers are read as, such as "cat, dog".')] = None,
    reading: Annotated[
        str,
        typer.Option(
            help="words, letters or likeliest (of --choices); yes-no, number, exact, alike; or a regular expression "
            "between slashes."
        ),
    ] = "words",
    n0: Annotated[
        int | None, typer.Option(min=1, help="Draws per serving; left out, a pilot chooses 1, 2 or 4 for each image.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 16,
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

    Of an image classifier its label is certified, with --ask a model's answer: how far an image can move before it may
    change.

    An interrupted run goes on from OUT. Under accelerate launch the images are shared among the processes.
    """
    with errors_for_people():
        needs("transformers", "matplotlib")
        plan = _plan(n, alpha, method, target, threshold, table=table, classes=classes)
        if ask is not None and (features or classes is not None or table):
            raise SettingError("--ask certifies answers; leave --classes, --features and --table out.")
        if ask is None and (choices is not None or reading != "words" or n0 is not None or max_new_tokens != 16):
            raise SettingError("--choices, --reading, --n0 and --max-new-tokens are about answers: ask with --ask.")
        if ask is not None:
            _check_of_labels(method, threshold)
        if features and classes is not None:
            raise SettingError("--features certifies features, --classes predictions: leave one out.")
        from fs_plugins import vision_call
        from fs_plugins.certificates import table as papers
        from fs_plugins.certificates.certifiers import Features, Labels
        from fs_plugins.certificates.folder import ROWS, FolderRun
        from fs_plugins.choice import choose
        from fs_plugins.hf.load import load_model, place, quieten, source

        quieten()
        crew = Crew.assemble()
        if crew.size > 1 and seed is None:
            raise SettingError("Several processes need --seed, so that their draws are one run's.")
        loaded = load_model(model, processor=processor).to(place())
        wanted = vision_call(loaded, encoder=0).image_size or ((size, size) if size else None)
        if wanted is None:
            raise SettingError("This encoder takes images of any size: say which with --size.")
        pictures = _pictures(images or [], scenes, wanted)
        if ask is not None:
            from fs_plugins.certificates.asking import AnswerPlan
            from fs_plugins.cli import answers

            asked = answers.Asked(ask, choices, reading, max_new_tokens, processor or model)
            effort = AnswerPlan(n=n, alpha=alpha, n0=n0, target=target)
            replies = answers.replies(asked, loaded, effort, psm=psm, sigma=sigma, seed=seed)
            run = FolderRun(out, pictures, {answers.ROWS: replies}, seed=seed, crew=crew)
            found = _certified(run)[answers.ROWS]
            if crew.rank == 0:
                answers.show(found, out)
            return
        directions = None
        if classes is not None:
            from fs_plugins.hf.zeroshot import directions_of

            names = [name.strip() for name in classes.split(",") if name.strip()]
            directions = directions_of(loaded, source(model), names, prompt)
        if table:
            sigmas = papers.SIGMAS if sigma is None else (sigma,)
            jobs = papers.certifiers(loaded, pictures, plan, psm=psm, sigmas=sigmas)
            _table(FolderRun(out, pictures, jobs, seed=seed, crew=crew), threshold)
            return
        smoother = choose(loaded, psm=psm, sigma=sigma, encoder=0, certain=True)[1][0]
        if directions is not None or (smoother.call.head is not None and not features):
            _check_of_labels(method, threshold)
            labels = Labels.among(smoother, plan, directions)
            _labels(FolderRun(out, pictures, {"predictions.jsonl": labels}, seed=seed, crew=crew))
        else:
            certifier = Features(smoother, plan, list(pictures.values()))
            _features(FolderRun(out, pictures, {ROWS: certifier}, seed=seed, crew=crew), threshold)


def _plan(
    n: int, alpha: float, method: str, target: float | None, threshold: float, *, table: bool, classes: str | None
) -> Plan:
    """How each picture is certified, unless the options contradict each other."""
    from fs_plugins.certificates.methods import DEFAULT
    from fs_plugins.certificates.plan import Plan

    if table and (classes is not None or method != DEFAULT or target is not None):
        raise SettingError(
            "--table shows every method for features, all from n draws; leave --classes, --method and --target out."
        )
    if classes is not None:
        _check_of_labels(method, threshold)
    return Plan(n=n, alpha=alpha, method=method, target=target, threshold=threshold)


def _check_of_labels(method: str, threshold: float) -> None:
    from fs_plugins.certificates.methods import DEFAULT

    if method != DEFAULT or threshold != 0.5:
        raise SettingError(
            "--method and --threshold are about features; of zero-shot classes and image classifiers the prediction is "
            "certified, with --ask the answer. Leave them out, or add --features for a classifier's features."
        )


def _pictures(given: list[Path], scenes: int, size: tuple[int, int]) -> dict[str, Tensor]:
    """Files, folders, and scenes that are drawn -> name -> (3, H, W) in [0, 1]."""
    from fs_plugins.certificates import pictures_of
    from fs_plugins.demo import world
    from fs_plugins.pictures import fitted

    pictures = pictures_of(given, size)
    pictures |= {f"scene {i}": fitted(scene.draw(), size) for i, scene in enumerate(world.scenes("heldout", scenes))}
    if not pictures:
        raise SettingError("Nothing to certify: give image files or folders, or --scenes.")
    return pictures


def _features(run: FolderRun[Certificate], threshold: float) -> None:
    found = _certified(run)
    if run.crew.rank != 0:
        return
    from fs_plugins.certificates import plot

    [(file, certificates)] = found.items()
    rows = run.out / file
    picture = rows.with_suffix(".png")
    plot.draw(list(certificates.values()), picture)
    _show_certificates(certificates, threshold)
    console.print(f"\nWritten: {rows} and {picture}", soft_wrap=True)


def _labels(run: FolderRun[PredictionCertificate]) -> None:
    found = _certified(run)
    if run.crew.rank == 0:
        [(file, certificates)] = found.items()
        _show_predictions(certificates)
        console.print(f"\nWritten: {run.out / file}", soft_wrap=True)


def _table(run: FolderRun[Certificate], threshold: float) -> None:
    found = _certified(run)
    if run.crew.rank != 0:
        return
    from fs_plugins.certificates import plot, table

    groups = []
    for file, certificates in found.items():
        plot.draw(list(certificates.values()), (run.out / file).with_suffix(".png"))
        groups.append(table.averages(list(certificates.values()), threshold=threshold))
    written = run.out / "table.csv"
    table.write(written, [row for rows in groups for row in rows])
    _show_table(groups, next(iter(found.values())), threshold)
    console.print(f"\nWritten: {written}, and rows and a plot of each run beside it", soft_wrap=True)


def _certified(run: FolderRun[C]) -> dict[str, dict[str, C]]:
    """Each file's certificates, with a word of how long it will take.

    Raises:
        SettingError: the folder holds something else, of which plots and tables could replace a part.
    """
    from fs_plugins.files import unused

    unused(run.out, "certificates*.jsonl", "predictions*.jsonl", "answers*.jsonl", what="certificates")
    run.check()
    with run.held():
        if run.crew.rank == 0:
            several = f" {len(run.certifiers)} times" if len(run.certifiers) > 1 else ""
            console.print(f"{len(run.pictures)} images, {run.draws:,} draws{several}: about {duration(run.seconds())}.")
        with progress() as track:
            return run.certify(track)


def _show_certificates(certificates: Mapping[str, Certificate], threshold: float) -> None:
    table = plain_table("image", "mean", *(f"eps {eps:g}" for eps in DISTANCES), f"R {threshold:g}", "in l-inf")
    for name, one in short(certificates).items():
        radius, inner = one.radius(threshold), one.linf_radius(threshold)
        row = [promise(one.fcsb(eps)) for eps in DISTANCES]
        table.add_row(name, f"{one.mean:.3f}", *row, promise(radius), promise(inner, 255))
    console.print(table)
    first = next(iter(certificates.values()))
    kind = (
        "the paper's estimate, which holds at no confidence"
        if first.is_estimate
        else (f"lower bounds, each wrong with probability at most {first.alpha:g}")
    )
    beside = f" Unrelated images: cosine {first.unrelated:.3f}." if first.unrelated is not None else ""
    note(
        "mean: cosine of single draws to the clean feature. eps: the cosine certified within that l2 distance in "
        f"[0, 1] pixels, {kind}; none: nothing is promised. R: the l2 distance within which it stays at least "
        f"{threshold:g}, and the l-inf ball inside, in 255ths. {first.method}, sigma {first.sigma:g}, PSM "
        f"{first.psm or 'none'}.{beside}"
    )


def _show_predictions(certificates: Mapping[str, PredictionCertificate]) -> None:
    table = plain_table("image", "predicted", "draws", "votes", "R vote", "R average", "R")
    for name, one in short(certificates).items():
        radii = [promise(radius) for radius in (one.vote_radius, one.feature_radius, one.radius)]
        table.add_row(
            name,
            one.label or f"class {one.predicted}",
            f"{one.n:,}",
            f"{100 * one.votes / one.n:.1f} %",
            *radii,
        )
    console.print(table)
    first = next(iter(certificates.values()))
    note(
        "votes: share of single draws that predict this class. R vote: the l2 distance in [0, 1] pixels within which "
        "the majority of draws stays with it. R average: within which the averaged feature does (never of a head with "
        f"a bias). Both hold together, wrong with probability at most {first.alpha:g}; none: it abstains. "
        f"sigma {first.sigma:g}, PSM {first.psm or 'none'}."
    )


def _show_table(groups: Sequence[Sequence[Average]], certificates: Mapping[str, Certificate], threshold: float) -> None:
    """Averages over images, a group for each sigma and PSM."""
    from fs_plugins.certificates.table import DISTANCES

    shown = plain_table("average certified cosine at eps", *(f"{eps:g}" for eps in DISTANCES), "R")
    for rows in groups:
        psm = f"PSM {rows[0].psm}" if rows[0].psm else "plain smoothing"
        shown.add_row(styled(f"sigma {rows[0].sigma:g}, {psm}", "bold"))
        for row in rows:
            values = [promise(value or None) for value in (*row.cosines, row.radius)]
            shown.add_row(f"  {row.title}", *values, end_section=row is rows[-1])
    console.print(shown)
    one = next(iter(certificates.values()))
    note(
        f"Averages over {len(certificates)} images of the certified cosine at l2 distances in [0, 1] pixels, and of R, "
        f"the distance within which it stays at least {threshold:g}; an image without a promise counts as 0, none: no "
        f"image has one. All methods on the same {one.n:,} draws an image. The paper's estimate holds at no "
        f"confidence; each certificate is wrong with probability at most {one.alpha:g}, of which mean and distribution "
        "alone have a quarter each and the refinement to the cosine a half."
    )
