"""Train a PSM for any vision call: the purifier first, then the mapper with the purifier frozen (Algorithm 1), then, if
wanted, both against an attacker who knows of them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fs_plugins.answers import Answers
from fs_plugins.checks import recording, whole
from fs_plugins.choice import Smoothable, check_pixels
from fs_plugins.errors import ModelError, SettingError
from fs_plugins.identity import digest, fingerprint, is_readable
from fs_plugins.pictures import Picture, channels_first, check_unit
from fs_plugins.plugins import claim, plugin_parts
from fs_plugins.psm import PSM, Part, PSMConfig, ReadoutSpec
from fs_plugins.psm.bundle import CASCADE, plainly
from fs_plugins.psm.purifier import UNSHUFFLE, CascadePurifier, spectrum
from fs_plugins.smoothing import FeatureSmoother
from fs_plugins.training.config import TrainingConfig
from fs_plugins.training.crew import Alone, Crew
from fs_plugins.training.data import Identified, Pictures, check_count
from fs_plugins.training.folder import DONE, TrainingFolder
from fs_plugins.training.stages import Optimisation, calibrate, own_random
from fs_plugins.vision import VisionCall

Report = Callable[[str, int, int, dict[str, float]], None]
"""Called after each step: stage, step (from 1), steps, losses (and the score, where it was logged)."""


def train_psm(
    model: Smoothable,
    images: Pictures,
    config: TrainingConfig,
    *,
    name: str,
    encoder: str,
    start: PSM | None = None,
    answers: Sequence[Answers] = (),
    report: Report | None = None,
    out: str | os.PathLike[str] | TrainingFolder | None = None,
    accelerator: Crew | None = None,
    workers: int = 1,
) -> PSM:
    """Train a PSM for a model's vision encoder, self-supervised.

    On a CPU the result follows from the arguments bit for bit; torch's global generators play no part.

    Args:
        model: any model with one vision encoder that an adapter claims, or a VisionCall; frozen meanwhile.
        images: (C, H, W) floats in [0, 1], no labels, at ``call.image_size``; where the encoder takes any
            size, all at the one size that the PSM is to serve.
        config: see TrainingConfig.
        name, encoder: written into the PSM's configuration.
        start: a PSM whose purifier the training goes on from, also as each part of a cascade that is such a one; with
            ``purifier_stage.steps = 0`` it is taken as it is. With ``mapper_stage.steps = 0`` so are its mappers, where
            they are for the same readouts.
        answers: ways to ask the model, such as ``fs_plugins.hf.speech.Speech``; the adversarial stage holds what it
            says, one of them a step. Without any it holds features alone.
        report: called after each step.
        out: a folder for checkpoints and a log. A training that was stopped, at whatever moment, goes on from it to the
            same result; the finished PSM is for the caller to save.
        accelerator: an ``accelerate.Accelerator``, for several processes or another precision. N processes with batches
            of b do what one does with batches of N b.
        workers: threads that load images.

    Raises:
        SettingError: images of another size or range, too few, ``out`` holds something else or another training, it is
            called inside ``torch.inference_mode``, or nobody knows how the encoder's pixels are normalised.
        ModelError: no adapter claims the model, it has several vision encoders, or see ``check_trainable``.
    """
    recording("Training")
    call, crew = one_call(model, certain=True), accelerator or Alone()
    check_trainable(call)
    size = _image_size(call, images, config, crew.num_processes)
    folder = out if isinstance(out, TrainingFolder) or out is None else TrainingFolder(out)
    device = call.device
    with (
        torch.enable_grad(),
        own_random(device, config.seed),
        _frozen(call, answers),
        folder.using() if folder else nullcontext(),
    ):
        psm = _initial(call, images, config, size, name, encoder, start).to(device)
        settings: dict[str, Any] = {
            "name": name,
            "encoder": encoder,
            "weights": list(fingerprint(call.module)),
            "images": _digest(images),
            "image_size": list(size),
            "start": start and digest(start),
            "processes": crew.num_processes,
            "precision": {"no": "fp32"}.get(crew.mixed_precision, crew.mixed_precision),
            "config": config.as_json(),
        }
        if config.adversarial is not None:
            settings["asked"] = [str(one) for one in answers]
        kept = _resumed(folder, settings, crew) if folder else None
        if kept:
            psm.load_state_dict(kept["psm"])
        crew.wait_for_everyone()  # before one of them writes, all have read
        writes = folder if crew.is_main_process else None
        _Stages(psm, call, images, config, crew, workers, writes, report, tuple(answers)).run(kept, settings)
    return psm.eval().requires_grad_(False)


def _resumed(folder: TrainingFolder, settings: Mapping[str, Any], crew: Crew) -> dict[str, Any] | None:
    """What an earlier run left, if any; the folder is this training's from here on."""
    folder.agree(settings)
    if crew.is_main_process:
        folder.own()
    return folder.load(settings)


@dataclass(frozen=True)
class _Stages:
    """A training from its start, or from a checkpoint, to its end; arguments as for ``train_psm``."""

    psm: PSM
    call: VisionCall
    images: Pictures
    config: TrainingConfig
    crew: Crew
    workers: int
    folder: TrainingFolder | None
    report: Report | None
    answers: tuple[Answers, ...]

    def run(self, kept: dict[str, Any] | None, settings: Mapping[str, Any]) -> None:
        names = [*self.config.stages, DONE]
        at, step = (kept["stage"], kept["step"]) if kept else (names[0], 0)
        if self.folder:
            steps = {name: stage.steps for name, stage in self.config.stages.items()}
            self.folder.begin(settings, steps, at, step, kept.get("log") if kept else None)
        fresh = self.crew.scaler and self.crew.scaler.state_dict()
        for stage, following in pairwise(names[names.index(at) :]):
            if stage == "mapper" and not step:
                calibrate(self.psm, self.call, self.images, self.config)
            if fresh:  # a stage must not depend on whether the one before ran in this process
                self.crew.scaler.load_state_dict(fresh)
            self._stage(stage, kept if step else None)
            kept, step = None, 0
            if self.folder:
                self.folder.save({"stage": following, "step": 0, "psm": self.psm.state_dict()})

    def _stage(self, name: str, kept: dict[str, Any] | None) -> None:
        work = Optimisation(
            name,
            self.psm,
            self.call,
            self.images,
            self.config,
            self.crew,
            kept=kept,
            workers=self.workers,
            answers=self.answers,
        )
        while work.done < work.stage.steps:
            row = {"lr": work.stage.rate(work.done), "sigma": work.sigma()}
            values = work.advance()
            if self.folder:
                values |= _keep(self.folder, work, self.psm, self.call, self.config, row | values)
            if self.report:
                self.report(name, work.done, work.stage.steps, values)
        work.close()


def robustness_score(
    model: Smoothable,
    psm: PSM | None,
    images: Picture | Iterable[Picture],
    sigma: float,
    *,
    draws: int = 8,
    seed: int = 0,
) -> float:
    """Mean cosine between single smoothed draws and the clean feature.

    Args:
        model: as for ``train_psm``, in eval mode, as the PSM.
        images: (B, C, H, W) floats in [0, 1] as a tensor or a numpy array, a PIL image, or a list of pictures.

    Raises:
        SettingError: a value out of range, or images that are none.
        ModelError: model or PSM are not in eval mode; or see ``train_psm``.
    """
    call, draws = one_call(model), whole("draws", draws)
    shown = call.batch("images", images)
    smoother = FeatureSmoother(call, psm=psm, sigma=sigma, n0=1, noise="iid", seed=seed)
    smoother.check_eval()
    with torch.no_grad():
        clean = torch.cat([call.embed(call.encode(some)) for some in shown.split(smoother.chunk_size)])
        scores = [torch.cosine_similarity(call.embed(smoother.smooth(shown)), clean, dim=-1) for _ in range(draws)]
    return torch.stack(scores).mean().item()


def one_call(model: Smoothable, *, certain: bool = False) -> VisionCall:
    """A VisionCall itself, or a model's only one.

    Raises:
        ModelError: no adapter, or several, claim the model, or it has several vision encoders.
        SettingError: see ``choice.check_pixels``, also for ``certain``.
    """
    calls = (model,) if isinstance(model, VisionCall) else claim(model)[1]
    if len(calls) > 1:
        raise ModelError(
            f"This model has {len(calls)} vision encoders, and a PSM is for one: pass "
            "vision_call(model, encoder=0), say."
        )
    check_pixels(calls, certain=certain)
    return calls[0]


def check_trainable(call: VisionCall) -> None:
    """Refuse an encoder that a PSM could not be trained through, or not be known by afterwards.

    Raises:
        ModelError: its weights are quantised, sharded or offloaded.
    """
    if not is_readable(call.module):
        raise ModelError(
            "The encoder's weights are quantised, sharded or offloaded, so a PSM can neither be trained through it nor "
            "be recognised as its own. Train for the encoder that it was made from, and pass that PSM to this one "
            "(enable(model, psm=<its folder>))."
        )


def _image_size(call: VisionCall, images: Pictures, config: TrainingConfig, processes: int) -> tuple[int, int]:
    first = images[0]
    if not isinstance(first, Tensor):
        raise SettingError(
            f"Training images must be tensors, (C, H, W) floats in [0, 1]; the first is a {type(first).__name__}. A "
            "folder of files is read by fs_plugins.training.ImageFolder."
        )
    if first.ndim != 3:
        raise SettingError(f"Training images must be (C, H, W) in [0, 1]; the first is {tuple(first.shape)}.")
    height, width = call.image_size or first.shape[-2:]
    if tuple(first.shape[-2:]) != (height, width):
        raise SettingError(
            f"Training images must be (C, {height}, {width}) in [0, 1]; the first is {tuple(first.shape)}."
            f"{channels_first(first.shape)}"
        )
    check_unit("Training images", first)
    for stage in config.stages.values():
        check_count(len(images), stage, processes)
    return height, width


def _initial(
    call: VisionCall,
    images: Pictures,
    config: TrainingConfig,
    size: tuple[int, int],
    name: str,
    encoder: str,
    start: PSM | None,
) -> PSM:
    """The PSM before its first step, on the CPU."""
    readouts = {}
    if config.mapper is not None:
        with torch.no_grad():
            sample = call.encode(images[0][None].to(call.device))
        readouts = {name: (value.shape[1] if value.ndim == 3 else 0, value.shape[-1]) for name, value in sample.items()}
    made_for = PSMConfig(
        name=name,
        sigma=config.sigma,
        sigma_range=config.sigmas,
        image_size=size,
        purifier=_measured(config.purifying, images),
        readouts=tuple(
            ReadoutSpec(name=readout, width=width, tokens=tokens, mapper=_sized(config.mapper, width))
            for readout, (tokens, width) in readouts.items()
            if config.mapper is not None
        ),
        encoder=encoder,
        fingerprint=fingerprint(call.module),
    )
    with plainly():
        psm = PSM(made_for, **plugin_parts())
    if start is not None:
        places = _places(psm, start)
        if not places or start.purifier is None:
            raise SettingError(f"start has purifier {start.config.purifier}, the configuration {config.purifier}.")
        for place in places:
            place.load_state_dict(start.purifier.state_dict())
        if not config.mapper_stage.steps and start.config.readouts == psm.config.readouts:
            psm.mappers.load_state_dict(start.mappers.state_dict())
    return psm


MEASURED = "measured"


def _measured(part: Part | None, images: Pictures) -> Part | None:
    """The purifier with the spectrum of these images, where its ``spectrum`` says "measured"; also in a cascade."""
    if part is None:
        return None
    if part.kind == CASCADE:
        parts = [_measured(Part.model_validate(one), images) for one in part.args["parts"]]
        return Part(kind=part.kind, args={**part.args, "parts": [one.model_dump() for one in parts if one]})
    if part.args.get("spectrum") != MEASURED:
        return part
    folds = part.args.get("unshuffle", UNSHUFFLE)
    first = [images[i] for i in range(min(len(images), 64))]
    return Part(kind=part.kind, args={**part.args, "spectrum": spectrum(first, folds)})


def _places(psm: PSM, start: PSM) -> list[nn.Module]:
    """Where the weights of another PSM's purifier fit: the purifier, or parts of a cascade that are such a one."""
    part = psm.config.purifier
    if part is None or psm.purifier is None:
        return []
    if part == start.config.purifier:
        return [psm.purifier]
    own = start.config.purifier and start.config.purifier.model_dump()
    if not isinstance(psm.purifier, CascadePurifier):
        return []
    pairs = zip(psm.purifier.parts, part.args["parts"], strict=True)
    return [place for place, one in pairs if one == own]


def _sized(mapper: Part, width: int) -> Part:
    return Part(kind=mapper.kind, args={"width": width, **mapper.args})


def _keep(
    folder: TrainingFolder,
    work: Optimisation,
    psm: PSM,
    call: VisionCall,
    config: TrainingConfig,
    row: dict[str, float],
) -> dict[str, float]:
    """Log and save what is due; the score, where it was."""
    score = {}
    last = work.done == work.stage.steps
    if last or work.done % folder.log_every == 0:
        if folder.held is not None:
            served = _without_mappers(psm) if work.name == "purifier" else psm
            with work.as_served():
                score["score"] = robustness_score(call, served, folder.held.to(work.device), config.sigma)
        folder.log(work.name, work.done, row | score)
    if not last and work.done % folder.save_every == 0:
        folder.save({**work.state(), "psm": psm.state_dict()})
    return score


def _without_mappers(psm: PSM) -> PSM:
    """The same purifier, not a copy of it, without the mappers that are yet to be trained."""
    alone = PSM(psm.config.model_copy(update={"purifier": None, "readouts": ()}))
    alone.purifier, alone.config = psm.purifier, psm.config.model_copy(update={"readouts": ()})
    return alone


def _digest(images: Pictures) -> str:
    """What the images are: their own ``digest``, or that of the first and the last and how many they are."""
    if isinstance(images, Identified):
        return images.digest
    ends = b"".join(image.detach().cpu().numpy().tobytes() for image in (images[0], images[len(images) - 1]))
    return f"{len(images)} images, {hashlib.sha256(ends).hexdigest()[:16]}"


@contextmanager
def _frozen(call: VisionCall, answers: Sequence[Answers]) -> Iterator[None]:
    """The encoder, and what its features are embedded and answers are made by, in eval mode, without parameter
    gradients; all is put back.
    """
    held = (*call.modules, *(module for one in answers for module in one.modules))
    modes = {m: m.training for module in held for m in module.modules()}
    wanted = {p: p.requires_grad for module in held for p in module.parameters()}
    for module in held:
        module.eval().requires_grad_(False)
    try:
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode
        for p, flag in wanted.items():
            p.requires_grad_(flag)
