"""``fs-plugins train``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from rich.progress import TaskID

from fs_plugins.cli.base import console, duration, needs, plain_table
from fs_plugins.cli.options import command
from fs_plugins.terminal import Words, bars
from fs_plugins.training.settings import Settings

if TYPE_CHECKING:
    from fs_plugins.training.ablate import Trial
    from fs_plugins.training.crew import Crew
    from fs_plugins.training.publish import Scores
    from fs_plugins.training.work import Work


def _train(settings: Settings) -> None:
    """Train a purifier and a mapper for any model, from any folder of pictures.

    An interrupted training goes on from OUT, to the same result. Several GPUs:
    accelerate launch --multi_gpu --num_processes 2 -m fs_plugins.cli train ...
    """
    needs("transformers")
    from fs_plugins.demo.scenes import Scenes
    from fs_plugins.hf.load import load_model, quieten
    from fs_plugins.hf.speech import asked
    from fs_plugins.training.work import Work

    quieten()
    load = partial(load_model, settings.model, processor=settings.processor)
    work = Work.of(settings, load, scenes=Scenes, asking=asked)
    _say(work.crew, f"{len(work.pictures)} pictures to train on, {len(work.held)} held out.")
    if settings.dry_run:
        _dry_run(work)
    elif settings.ablate:
        _ablate(work)
    else:
        _publish(work)
    work.crew.end_training()


train = command(Settings, _train, argument="photos")


def _publish(work: Work) -> None:
    from fs_plugins.cli.registry import say_pushed
    from fs_plugins.training.work import train_and_publish

    finished = work.folder is not None and work.folder.finished
    commits: list[str] = []
    with _progress(work.crew) as report:
        scores = train_and_publish(work, report=report, command=_command(work.crew), pushed=commits.append)
    if finished:
        _say(work.crew, f"Finished already: {work.settings.out}")
    if scores is not None:
        _show_scores(scores)
        console.print(
            f"\nWritten: {work.settings.out} (config.json, psm.safetensors, README.md, held-out.txt, log.csv)",
            soft_wrap=True,
        )
    for commit in commits:
        say_pushed(commit, work.settings.out)


def _ablate(work: Work) -> None:
    from fs_plugins.training.psm import robustness_score
    from fs_plugins.training.work import trials

    with _progress(work.crew) as report:
        done = list(trials(work, report=report))
    if work.crew.is_main_process:
        _show_trials(done, robustness_score(work.call, None, work.shown, work.config.sigma))


def _dry_run(work: Work) -> None:
    from fs_plugins.training.work import dry_run, peak

    costs = dry_run(work)
    if not work.crew.is_main_process:
        return
    table = plain_table("stage", "parameters", "weights, gradients, Adam, average", "a step", "loading", "steps", "all")
    for cost in costs:
        table.add_row(
            *(cost.stage, f"{cost.parameters:,}", _bytes(cost.memory), f"{cost.step:.2f} s", f"{cost.loading:.2f} s"),
            *(f"{cost.steps:,}", duration(cost.seconds)),
        )
    console.print(table)
    most = peak(work.crew.device)
    _say(
        work.crew,
        f"About {duration(sum(cost.seconds for cost in costs))} and {_bytes(most) if most else 'an unknown amount'} of "
        "memory at the peak, a process. Loading runs beside the steps and costs no time as long as it is the shorter "
        "of the two. Nothing was written.",
    )


def _say(crew: Crew, text: str) -> None:
    if crew.is_main_process:
        console.print(text, soft_wrap=True)


@contextmanager
def _progress(crew: Crew) -> Iterator[Callable[[str, int, int, dict[str, float]], None] | None]:
    if not crew.is_main_process:
        yield None
        return
    losses_column = Words("{task.fields[losses]}", style="dim")
    with bars("{task.completed}/{task.total}", losses_column) as shown:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, step: int, steps: int, values: dict[str, float]) -> None:
            if stage not in tasks:
                tasks[stage] = shown.add_task(stage, total=steps, completed=step - 1, losses="")
            losses = " ".join(f"{name} {value:.4g}" for name, value in values.items())
            shown.update(tasks[stage], completed=step, losses=losses)

        yield report


def _command(crew: Crew) -> str:
    """What was typed, as far as it was."""
    given = shlex.join(["train", *sys.argv[sys.argv.index("train") + 1 :]] if "train" in sys.argv else ["train"])
    if crew.num_processes == 1:
        return f"fs-plugins {given}"
    return f"accelerate launch --num_processes {crew.num_processes} -m fs_plugins.cli {given}"


def _show_scores(scores: Scores) -> None:
    kinds = list(next(iter(scores.robustness.values())))
    table = plain_table("robustness score", *kinds)
    for sigma, row in scores.robustness.items():
        table.add_row(f"sigma {sigma:g}", *(f"{row[kind]:.4f}" for kind in kinds))
    console.print(table)
    console.print(
        f"Mean cosine between single noisy draws and the clean picture, {scores.images} held-out pictures.", style="dim"
    )
    for name, radius in scores.radii.items():
        console.print(
            f"average certified radius, {name}: {radius:.4f} ({scores.certified} pictures, {scores.n} draws, "
            f"alpha {scores.alpha:g})",
        )


def _show_trials(trials: list[Trial], plain: float) -> None:
    for stage in dict.fromkeys(trial.stage for trial in trials):
        those = [trial for trial in trials if trial.stage == stage]
        terms = list(those[0].terms)
        table = plain_table(stage, "score", *terms)
        for trial in those:
            label = f"without {trial.without}" if trial.without else "all terms"
            table.add_row(label, f"{trial.score:.4f}", *(f"{trial.terms[term]:.4g}" for term in terms))
        console.print(table)
    for trial in trials:
        if trial.idle:
            console.print(f"{trial.without} does nothing: the {trial.stage} is the same without it.")
    console.print(
        "score: mean cosine between single noisy draws and the clean picture, held-out pictures; plain noise has "
        f"{plain:.4f}. The terms are measured on the same pictures, unweighted.",
        style="dim",
    )


def _bytes(count: float) -> str:
    return f"{count / 2**30:.1f} GB" if count >= 2**30 else f"{count / 2**20:.0f} MB"
