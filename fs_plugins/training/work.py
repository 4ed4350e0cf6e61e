"""From settings and a model to a PSM that is published: trained, measured, with card and list of held-out pictures.

work = Work.of(Settings(photos=Path("photos"), out=Path("my-psm")), lambda: model)
train_and_publish(work)
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from fs_plugins import files
from fs_plugins.answers import Answers, Classes
from fs_plugins.certificates.plan import Plan
from fs_plugins.certificates.run import check as check_certifiable
from fs_plugins.choice import Smoothable, choose
from fs_plugins.errors import FSPluginsError, ModelError, SettingError
from fs_plugins.plugins import known_encoders
from fs_plugins.psm import PSM
from fs_plugins.psm.hub import Repository
from fs_plugins.publishing import push
from fs_plugins.settings import build
from fs_plugins.smoothing import FeatureSmoother
from fs_plugins.training import data, publish
from fs_plugins.training.ablate import Trial, ablate
from fs_plugins.training.config import Stage, TrainingConfig
from fs_plugins.training.crew import Crew, assemble
from fs_plugins.training.data import ImageFolder
from fs_plugins.training.folder import HELD_OUT, SETTINGS, TrainingFolder
from fs_plugins.training.psm import Report, check_trainable, train_psm
from fs_plugins.training.settings import Settings
from fs_plugins.training.stages import trained
from fs_plugins.training.start import configured
from fs_plugins.vision import VisionCall

MEASURED, WATCHED = 64, 16
"""Held-out pictures that scores are of in the end, and while training goes on."""
OWN = "its own classes"
"""How a classifier is asked that has a head."""
CERTIFICATES = "certificates"
"""What ``report`` calls the draws of certificates, after the stages' steps."""

Asking = Callable[[Any, VisionCall, Settings], Sequence[Answers]]
"""Ways to ask a model, with one vision call, that settings speak of."""
Drawn = Callable[[int, tuple[int, int]], ImageFolder]
"""So many scenes at a size, (H, W), as pictures."""


@dataclass(frozen=True)
class Work:
    """A training that can begin: settings, model and pictures go together, and every picture can be read.

    Args:
        settings: what was asked for.
        call: the encoder, on the crew's device, in fp32.
        pictures, held: what is trained on, and what never is.
        config, start: as for ``train_psm``.
        answers: of the model, for the adversarial stage.
        crew: the processes that train; see ``accelerate launch``.
        folder: where it is kept; None for what writes nothing.
    """

    settings: Settings
    call: VisionCall
    pictures: ImageFolder
    held: ImageFolder
    config: TrainingConfig
    start: PSM | None
    crew: Crew
    folder: TrainingFolder | None
    answers: tuple[Answers, ...] = ()

    @classmethod
    def of(
        cls,
        settings: Settings,
        load: Callable[[], Smoothable],
        *,
        scenes: Drawn | None = None,
        asking: Asking | None = None,
    ) -> Work:
        """Check everything that can be checked before anything is trained or written.

        Args:
            load: gives the model, in eval mode; called once the settings by themselves are known to be good. It is put
                on a GPU where there is one, and its encoder in fp32.
            scenes: draws ``settings.scenes`` of the embedded world (``fs_plugins.demo.scenes.Scenes``).
            asking: makes the model's answers that ``settings.ask`` and ``settings.classes`` speak of
                (``fs_plugins.hf.speech.asked``).

        Raises:
            SettingError: a value out of range, settings or pictures that do not go together, or a missing package.
            PSMError, ModelError: what is to be trained for, or gone on from, cannot be used.
        """
        settings = build(Settings, vars(settings))
        crew = assemble(settings.precision)
        config, start = configured(settings)
        if settings.push is not None and crew.is_main_process:
            Repository(settings.push).check()
        trial = settings.dry_run or settings.ablate
        folder = None if trial else _folder(settings)
        model = load()
        call = _certifiable(model, settings)
        answers = _answers(model, call, settings, asking)
        pictures, held = _split(settings, _image_size(call, settings.size), scenes)
        if trial or not (settings.out / SETTINGS).exists():
            data.check(pictures, config, processes=crew.num_processes, workers=_threads(settings))
        # Half precision would swallow gradients; a language model comes along if it is asked.
        for module in (*call.modules, *(module for one in answers for module in one.modules)):
            module.to(crew.device, torch.float32)
        return cls(settings, call, pictures, held, config, start, crew, folder, answers)

    @cached_property
    def shown(self) -> Tensor:
        """(B, 3, H, W): the held-out pictures that scores are of."""
        first = [self.held[i] for i in range(min(MEASURED, len(self.held)))]
        return torch.stack(first).to(self.crew.device)

    @property
    def workers(self) -> int:
        """Threads that load pictures."""
        return _threads(self.settings)


def train_and_publish(
    work: Work, *, report: Report | None = None, command: str = "", pushed: Callable[[str], None] | None = None
) -> publish.Scores | None:
    """Train, or go on from where it stopped; then measure, certify, and write the PSM, its card and ``held-out.txt``.

    Where ``settings.push`` names a repository, it is pushed there, also if it was finished before.

    Args:
        report: called after each step (and then with the stage ``CERTIFICATES``), in the first process.
        command: that does it again, for the card.
        pushed: called with owner/name@commit once it is on the hub.

    Returns:
        the scores; None in other processes than the first, and where the training was finished already.

    Raises:
        SettingError: as for ``train_psm``; or another process is at work in the folder.
        SettingError, OutputError: it is finished, and could not be pushed.
    """
    settings, folder = work.settings, work.folder
    if folder is None:
        raise SettingError("A dry run and an ablation write nothing: leave dry_run and ablate out to train.")
    folder.held = work.shown[:WATCHED]
    with folder.using():
        psm = train_psm(
            work.call,
            work.pictures,
            work.config,
            name=settings.title,
            encoder=settings.encoder,
            start=work.start,
            answers=work.answers,
            report=report if work.crew.is_main_process else None,
            out=folder,
            accelerator=work.crew,
            workers=work.workers,
        )
        if not work.crew.is_main_process:
            return None
        scores = None if folder.finished else _finish(work, folder, psm, report, command)
        if settings.push is not None:
            commit = _push(folder, settings.push, settings.private or None)
            if pushed is not None:
                pushed(commit)
    return scores


def _finish(work: Work, folder: TrainingFolder, psm: PSM, report: Report | None, command: str) -> publish.Scores:
    """Measure what was trained, and publish it in its folder, with its card and the list of held-out pictures."""
    settings = work.settings
    scores = publish.measure(
        work.call,
        psm,
        work.shown,
        certified=settings.certify,
        n=settings.n,
        alpha=settings.alpha,
        seed=settings.seed,
        advance=_counted(report, settings, min(settings.certify, len(work.shown))),
    )
    card = publish.card(
        psm,
        work.config,
        scores,
        command=command,
        model=settings.encoder,
        data=[_about(work)],
        place=settings.push,
        base_model=_base_model(settings.model),
        license=settings.license,
    )
    files.replace(folder.path / HELD_OUT, "".join(f"{name}\n" for name in work.held.names))
    folder.publish(psm, card)
    return scores


def _push(folder: TrainingFolder, repo_id: str, private: bool | None) -> str:
    try:
        return push(folder.path, repo_id, private=private)
    except FSPluginsError as error:
        again = shlex.join(["fs-plugins", "registry", "push", str(folder.path), repo_id])
        raise type(error)(f"{error} The PSM is finished, in {folder.path}. To push it later: {again}") from error


def _base_model(model: str) -> str | None:
    """What a card calls the model: its id on the hub, or the name of one that ships; None for a folder."""
    if os.path.exists(model):
        return None
    entry = known_encoders().entries.get(model)
    return entry.weights.location if entry is not None and entry.weights.source == "hub" else model


@dataclass(frozen=True)
class Cost:
    """What a stage takes in one process.

    Args:
        stage: its name.
        parameters: of what is trained.
        memory: bytes of weights, gradients, Adam's two moments and the moving average.
        step, loading: seconds a step, and seconds to load its pictures, which runs beside it.
        steps: how many there will be.
    """

    stage: str
    parameters: int
    memory: int
    step: float
    loading: float
    steps: int

    @property
    def seconds(self) -> float:
        """Of the whole stage."""
        return self.step * self.steps


def dry_run(work: Work, steps: int = 3) -> list[Cost]:
    """Try a few steps of each stage, in memory; nothing is written."""
    few = replace(
        work.config,
        purifier_stage=_short(work.config.purifier_stage, steps),
        mapper_stage=_short(work.config.mapper_stage, steps),
        adversarial_stage=_short(work.config.adversarial_stage, steps),
    )
    marks: dict[str, list[float]] = {}

    def mark(stage: str, step: int, steps: int, values: dict[str, float]) -> None:
        marks.setdefault(stage, []).append(time.perf_counter())

    psm = train_psm(
        work.call,
        work.pictures,
        few,
        name="dry",
        encoder="dry",
        start=work.start,
        answers=work.answers,
        report=mark,
        accelerator=work.crew,
        workers=work.workers,
    )
    costs = []
    for name, stage in work.config.stages.items():
        count = sum(value.numel() for value in trained(psm, name).state_dict().values())
        copies = 4 + (stage.ema is not None)
        seconds = (marks[name][-1] - marks[name][0]) / max(1, len(marks[name]) - 1)
        costs.append(Cost(name, count, 4 * copies * count, seconds, _loading(work, few, name), stage.steps))
    return costs


def peak(device: torch.device) -> int | None:
    """Bytes of memory that this process had at the most, on a GPU the GPU's; None where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def trials(work: Work, *, report: Report | None = None) -> Iterator[Trial]:
    """Short trainings without each of the losses' terms, scored on held-out pictures (``ablate``)."""
    return ablate(
        work.call,
        work.pictures,
        work.shown,
        work.config,
        report=report if work.crew.is_main_process else None,
        start=work.start,
        answers=work.answers,
        accelerator=work.crew,
        workers=work.workers,
    )


def _folder(settings: Settings) -> TrainingFolder:
    return TrainingFolder(
        settings.out,
        save_every=settings.save_every,
        log_every=settings.log_every,
        tensorboard=settings.tensorboard,
    )


def _threads(settings: Settings) -> int:
    return settings.workers or min(8, os.cpu_count() or 1)


def _certifiable(model: Smoothable, settings: Settings) -> VisionCall:
    """The model's one vision call; what could not be certified in the end is refused now."""
    Plan(n=settings.n, alpha=settings.alpha)
    smoothers: list[FeatureSmoother] = choose(model, psm=None, sigma=settings.sigma, certain=True)[1]
    if len(smoothers) > 1:
        raise ModelError(f"This model has {len(smoothers)} vision encoders; a PSM is trained for one at a time.")
    check_certifiable(smoothers[0], {})
    check_trainable(smoothers[0].call)
    return smoothers[0].call


def _answers(model: Smoothable, call: VisionCall, settings: Settings, asking: Asking | None) -> tuple[Answers, ...]:
    """The ways to ask the model that settings speak of; of a classifier, failing these, its own head."""
    if settings.ask is None and settings.classes is None:
        return (Classes(call, call.head, OWN),) if settings.adversarial and call.head is not None else ()
    if not settings.adversarial:
        raise SettingError("--ask and --classes are for the adversarial stage: add --adversarial, or leave them out.")
    if asking is None:
        raise SettingError("Nobody said how the model is asked: pass asking=fs_plugins.hf.speech.asked.")
    return tuple(asking(model, call, settings))


def _image_size(call: VisionCall, side: int | None) -> tuple[int, int]:
    if len(call.pixels.mean) != 3:
        raise SettingError(f"Purifiers take RGB images; this encoder's have {len(call.pixels.mean)} channels.")
    wanted = call.image_size
    if wanted is None:
        if side is None:
            raise SettingError("This encoder takes images of any size: say which with --size.")
        return side, side
    if side is not None and wanted != (side, side):
        raise SettingError(f"--size {side}: this encoder sees {call.size_in_words} pixels; leave --size out.")
    return wanted


def _split(settings: Settings, size: tuple[int, int], scenes: Drawn | None) -> tuple[ImageFolder, ImageFolder]:
    """What is trained on, and what is held out."""
    photos = settings.photos
    if (photos is None) == (settings.scenes == 0):
        raise SettingError("Give a folder of pictures, or --scenes, to train on.")
    if photos is not None and not photos.is_dir():
        raise SettingError(f"There is no folder {photos}.")
    if photos is not None:
        whole = ImageFolder(photos, size)
    elif scenes is not None:
        whole = scenes(settings.scenes, size)
    else:
        raise SettingError("Nobody said how scenes are drawn: pass scenes=fs_plugins.demo.scenes.Scenes.")
    count = min(64, max(1, len(whole) // 10)) if settings.held_out is None else settings.held_out
    if not 1 <= count < len(whole):
        raise SettingError(f"Cannot hold out {count} of {len(whole)} pictures: hold out at least 1, and leave some.")
    return whole.split(count, settings.seed)


def _about(work: Work) -> str:
    """The card's sentence on the pictures."""
    return (
        f"{len(work.pictures)} pictures to train on ({work.pictures.digest}); {len(work.held)} more are held out "
        f"(`{HELD_OUT}`), chosen by their names and the seed. Whose they are and what may be done with them is for you "
        "to say."
    )


def _counted(report: Report | None, settings: Settings, certified: int) -> Callable[[int], None] | None:
    """Draws as they are made, without the PSM and with it -> a report of how many there are."""
    if report is None:
        return None
    plan = Plan(n=settings.n, alpha=settings.alpha)
    whole = 2 * certified * (plan.n + plan.pilot)
    done = 0

    def advance(draws: int) -> None:
        nonlocal done
        done += draws
        report(CERTIFICATES, done, whole, {})

    return advance


def _short(stage: Stage, steps: int) -> Stage:
    return replace(stage, steps=min(steps, stage.steps))


def _loading(work: Work, config: TrainingConfig, stage: str) -> float:
    """Seconds to load the pictures of a step."""
    lists = data.samples(len(work.pictures), config, stage)
    began = time.perf_counter()
    for _ in data.batches(partial(data.drawn, work.pictures, config, stage), lists, workers=work.workers):
        pass
    return (time.perf_counter() - began) / config.stages[stage].steps
