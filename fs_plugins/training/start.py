"""From settings, as people write them, to what is trained and what it starts from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from fs_plugins import files
from fs_plugins.attacks.ball import Norm, radius
from fs_plugins.choice import named_psm
from fs_plugins.errors import SettingError
from fs_plugins.plugins import plugin_parts
from fs_plugins.psm import PAPER_UNET, PSM, Part, PSMConfig
from fs_plugins.psm.bundle import CASCADE
from fs_plugins.psm.diffusion import load_guided_diffusion
from fs_plugins.training.config import Adversary, Stage, TrainingConfig
from fs_plugins.training.settings import Settings

SCRATCH, FINE = 1e-3, 5e-5
"""Learning rates of a purifier from scratch, and of one that is fine-tuned."""


def configured(settings: Settings) -> tuple[TrainingConfig, PSM | None]:
    """The training that settings describe, and the PSM whose purifier it starts from, if not from scratch.

    Raises:
        SettingError: a value out of range, or settings that do not go together.
        PSMError, RegistryError: ``start`` or ``purifier_weights`` cannot be read.
    """
    purifier, start = _purifier(settings)
    purifier = _repeated(purifier, settings.times)
    lr = (FINE if start is not None or settings.lora is not None else SCRATCH) if settings.lr is None else settings.lr
    return TrainingConfig(
        sigma=settings.sigma,
        sigma_range=settings.sigma_range,
        purifier=purifier,
        mapper=None if settings.mapper == "none" else _part(settings.mapper, settings.mapper_args, "--mapper-args"),
        adversarial=_adversary(settings) if settings.adversarial else None,
        purifier_stage=_stage(settings, settings.steps, lr, settings.ema or None),
        mapper_stage=_stage(settings, settings.mapper_steps, settings.mapper_lr, None),
        lambda1=settings.lambda1,
        lambda2=settings.lambda2,
        lambda3=settings.lambda3,
        lambda4=settings.lambda4,
        adversarial_stage=replace(
            _stage(settings, settings.adversarial_steps, settings.adversarial_lr, settings.ema or None),
            draws=settings.passes,
        ),
        lambda_adv=settings.lambda_adv,
        lambda_say=settings.lambda_say,
        lambda_pixels=settings.lambda_pixels,
        seed=settings.seed,
        augment=settings.augment,
    ), start


def _adversary(settings: Settings) -> Adversary:
    return Adversary(
        norm=cast(Norm, settings.norm),
        eps=radius(settings.eps, cast(Norm, settings.norm)),
        ramp=settings.ramp,
        targeted=settings.targeted,
        update_every=settings.update_every,
        reader=settings.reader,
    )


def _stage(settings: Settings, steps: int, lr: float, ema: float | None) -> Stage:
    return Stage(
        steps,
        batch_size=settings.batch_size,
        draws=settings.draws,
        lr=lr,
        warmup=settings.warmup,
        ema=ema,
        accumulate=settings.accumulate,
    )


def _purifier(settings: Settings) -> tuple[Part | None, PSM | None]:
    """The purifier to train, and the PSM that has the weights it starts from."""
    kind, weights, lora = settings.purifier, settings.purifier_weights, settings.lora
    if (settings.start is not None or kind != "diffusion") and (weights or lora):
        raise SettingError("--purifier-weights and --lora go with --purifier diffusion, and not with --start.")
    if settings.start is not None:
        started = named_psm(settings.start)
        if started.config.purifier is None:
            raise SettingError(f"--start {settings.start} has no purifier to go on from.")
        part = started.config.purifier
        if "," not in kind:
            return part, started
        if {one.strip() for one in kind.split(",")} != {part.kind}:
            raise SettingError(f"--start {settings.start} has a purifier {part.kind}, --purifier says {kind}.")
        return Part.cascade([part] * len(kind.split(","))), started
    if kind == "none":
        return None, None
    if "," in kind:
        return _cascade(kind.split(","), settings.purifier_args), None
    part = _part(kind, settings.purifier_args, "--purifier-args")
    if kind == "unet-paper":
        return Part(kind="unet", args={**PAPER_UNET, "channels": list(PAPER_UNET["channels"]), **part.args}), None
    return _diffusion(part, weights, lora) if kind == "diffusion" else (part, None)


def _repeated(purifier: Part | None, times: int) -> Part | None:
    if times == 1:
        return purifier
    if purifier is None:
        raise SettingError(f"--times {times} repeats a purifier, and --purifier none leaves it out.")
    parts = [Part.model_validate(one) for one in purifier.args["parts"]] if purifier.kind == CASCADE else [purifier]
    return Part.cascade(parts, times)


def _cascade(kinds: Sequence[str], text: str) -> Part:
    """Several purifiers, each with its own arguments or all with none."""
    every = _parsed(text, "--purifier-args")
    if every == {}:
        every = [{}] * len(kinds)
    if not isinstance(every, list) or len(every) != len(kinds) or not all(isinstance(one, dict) for one in every):
        raise SettingError(
            f"--purifier-args of {len(kinds)} purifiers is a JSON list of {len(kinds)} objects, got {text}."
        )
    return Part.cascade([Part(kind=kind.strip(), args=args) for kind, args in zip(kinds, every, strict=True)])


def _diffusion(part: Part, weights: Path | None, lora: int | None) -> tuple[Part, PSM | None]:
    """The public model, to be fine-tuned whole, or by low-rank updates, which know their base themselves."""
    if weights is None or not weights.is_file():
        raise SettingError(
            "--purifier diffusion is fine-tuned: give the public checkpoint, 256x256_diffusion_uncond.pt, with "
            f"--purifier-weights; {'there is no file ' + str(weights) if weights else 'there is none yet'}."
        )
    if lora is not None:
        with weights.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        base = {"base": str(files.real(weights)), "sha256": digest, "rank": lora}
        return Part(kind="lora", args={**base, **part.args}), None
    known = PSMConfig(
        name="base", sigma=0.25, sigma_range=(0.25, 0.25), image_size=(256, 256), purifier=part, encoder="none",
        fingerprint=(),
    )  # fmt: skip
    started = PSM(known, **plugin_parts())
    started.purifier = load_guided_diffusion(weights, **part.args)
    return part, started


def _parsed(text: str, flag: str) -> object:
    try:
        return files.parsed(text)
    except ValueError as error:
        raise SettingError(f"{flag} is JSON, such as '{{\"channels\": [32, 64]}}'; {error}.") from None


def _part(kind: str, text: str, flag: str) -> Part:
    given = _parsed(text, flag)
    if not isinstance(given, dict):
        raise SettingError(f"{flag} is a JSON object, got {text}.")
    return Part(kind=kind, args=given)
