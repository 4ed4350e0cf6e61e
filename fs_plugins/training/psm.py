"""Train a PSM for any vision call: the purifier first, then the mapper with the purifier frozen (Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from fs_plugins.errors import SettingError
from fs_plugins.identity import fingerprint
from fs_plugins.psm import PSM, Part, PSMConfig, ReadoutSpec, ResidualMapper
from fs_plugins.training import losses
from fs_plugins.vision import Features, VisionCall

Report = Callable[[str, int, int, dict[str, float]], None]
"""Called after each step: stage, step (from 1), steps, losses."""


@dataclass(frozen=True)
class Stage:
    """Optimisation of one stage: AdamW with warm-up and cosine annealing."""

    steps: int
    batch_size: int = 16
    draws: int = 8
    lr: float = 2e-4
    warmup: int = 100
    ema: float | None = None


@dataclass(frozen=True)
class TrainingConfig:
    """The paper's settings by default.

    Args:
        sigma: noise level to serve at, in [0, 1] pixel units; ``sigma_range`` is what is drawn in training.
        lambda1, lambda2: weights of consistency and reconstruction in the purifier's loss (eq. 9).
        lambda3, lambda4: weights of statistics and identity in the mapper's loss (eq. 13).
        purifier, mapper: which parts, with which arguments; None leaves one out.
    """

    sigma: float = 0.25
    sigma_range: tuple[float, float] | None = None
    purifier: Part | None = field(default_factory=lambda: Part(kind="unet"))
    mapper: Part | None = field(default_factory=lambda: Part(kind="residual"))
    purifier_stage: Stage = Stage(steps=12_000, lr=5e-5, ema=0.99)
    mapper_stage: Stage = Stage(steps=2_500)
    lambda1: float = 0.25
    lambda2: float = 0.25
    lambda3: float = 100.0
    lambda4: float = 0.25
    seed: int = 0


def train_psm(
    call: VisionCall,
    images: Dataset[Tensor],
    config: TrainingConfig,
    *,
    name: str,
    encoder: str,
    start: PSM | None = None,
    report: Report | None = None,
) -> PSM:
    """Train a PSM for ``call``, self-supervised.

    Args:
        call: the encoder, frozen; from ``fs_plugins.vision_call(model)``.
        images: (C, H, W) floats in [0, 1], no labels, at ``call.image_size``; where the encoder takes any
            size, all at the one size that the PSM is to serve.
        config: see TrainingConfig.
        name, encoder: written into the PSM's configuration.
        start: a PSM whose purifier the training goes on from; with ``purifier_stage.steps = 0`` it is taken as it is.
        report: called after each step.

    Raises:
        SettingError: images of another size or range, or nothing to train.
    """
    if config.purifier is None and config.mapper is None:
        raise SettingError("Nothing to train: both purifier and mapper are None.")
    first = images[0]
    height, width = call.image_size or first.shape[-2:]
    if tuple(first.shape[-2:]) != (height, width) or first.min() < 0 or first.max() > 1:
        raise SettingError(
            f"Training images must be (C, {height}, {width}) in [0, 1]; the first is "
            f"{tuple(first.shape)} in [{first.min():.2f}, {first.max():.2f}]."
        )
    torch.manual_seed(config.seed)
    readouts = {}
    if config.mapper is not None:
        with torch.no_grad():
            sample = call.encode(first[None].to(next(call.module.parameters()).device))
        readouts = {name: (value.shape[1] if value.ndim == 3 else 0, value.shape[-1]) for name, value in sample.items()}
    psm = PSM(
        PSMConfig(
            name=name,
            sigma=config.sigma,
            sigma_range=config.sigma_range or (config.sigma, config.sigma),
            image_size=(height, width),
            purifier=config.purifier,
            readouts=tuple(
                ReadoutSpec(name=readout, width=size, tokens=tokens, mapper=_sized(config.mapper, size))
                for readout, (tokens, size) in readouts.items()
                if config.mapper is not None
            ),
            encoder=encoder,
            fingerprint=fingerprint(call.module),
        )
    )
    report = report or (lambda stage, step, steps, losses: None)
    device = next(call.module.parameters()).device
    psm.to(device)
    with _frozen(call.module):
        if start is not None:
            if config.purifier != start.config.purifier or psm.purifier is None or start.purifier is None:
                raise SettingError(f"start has purifier {start.config.purifier}, the configuration {config.purifier}.")
            psm.purifier.load_state_dict(start.purifier.state_dict())
        if psm.purifier is not None and config.purifier_stage.steps:
            _train_purifier(psm.purifier, call, images, config, report)
        if readouts:
            _train_mapper(psm, call, images, config, report)
    return psm.eval().requires_grad_(False)


def robustness_score(
    call: VisionCall, psm: PSM | None, images: Tensor, sigma: float, *, draws: int = 8, seed: int = 0
) -> float:
    """Mean cosine between single smoothed draws and the clean feature, over (B, C, H, W) images in [0, 1]."""
    from fs_plugins.smoothing import FeatureSmoother

    smoother = FeatureSmoother(call, psm=psm, sigma=sigma, n0=1, noise="iid", seed=seed)
    with torch.no_grad():
        clean = call.embed(call.encode(images))
        scores = [torch.cosine_similarity(call.embed(smoother.smooth(images)), clean, dim=-1) for _ in range(draws)]
    return torch.stack(scores).mean().item()


def _train_purifier(
    purifier: nn.Module, call: VisionCall, images: Dataset[Tensor], config: TrainingConfig, report: Report
) -> None:
    stage = config.purifier_stage
    purifier.train().requires_grad_(True)
    ema = AveragedModel(purifier, multi_avg_fn=get_ema_multi_avg_fn(stage.ema)) if stage.ema else None
    optimizer, scheduler = _optimiser(purifier, stage)
    for step, clean in enumerate(_batches(images, stage, config.seed + 1), start=1):
        clean = clean.to(next(purifier.parameters()).device)
        sigma = _sigma(config)
        with torch.no_grad():
            reference = call.embed(call.encode(clean)).repeat(stage.draws, 1)
        repeated = clean.repeat(stage.draws, 1, 1, 1)
        purified = purifier(repeated + sigma * torch.randn_like(repeated), sigma)
        rb = losses.consistency(call.embed(call.encode(purified)), reference)
        mse = losses.reconstruction(purified, repeated)
        _update(config.lambda1 * rb + config.lambda2 * mse, purifier, optimizer, scheduler)
        if ema is not None:
            ema.update_parameters(purifier)
        report("purifier", step, stage.steps, {"l_rb": rb.item(), "l_mse": mse.item()})
    if ema is not None:
        purifier.load_state_dict(ema.module.state_dict())
    purifier.eval().requires_grad_(False)


def _train_mapper(psm: PSM, call: VisionCall, images: Dataset[Tensor], config: TrainingConfig, report: Report) -> None:
    stage = config.mapper_stage
    psm.mappers.train().requires_grad_(True)
    optimizer, scheduler = _optimiser(psm.mappers, stage)
    for step, clean in enumerate(_batches(images, stage, config.seed + 2), start=1):
        clean = clean.to(next(psm.mappers.parameters()).device)
        sigma = _sigma(config)
        with torch.no_grad():
            features = call.encode(clean)
            reference = call.embed(features).repeat(stage.draws, 1)
            repeated = clean.repeat(stage.draws, 1, 1, 1)
            noised = call.encode(psm.purify(repeated + sigma * torch.randn_like(repeated), sigma))
        if step == 1:
            _calibrate(psm, noised, sigma)
        mapped = {name: psm.map(name, value, sigma) for name, value in noised.items()}
        rb = losses.consistency(call.embed(mapped), reference)
        stats = torch.stack([losses.statistics(mapped[name], features[name]) for name in psm.mapped]).sum()
        still = torch.stack([losses.identity(psm.map(n, noised[n], 0.0) - noised[n]) for n in psm.mapped]).sum()
        _update(rb + config.lambda3 * stats + config.lambda4 * still, psm.mappers, optimizer, scheduler)
        report("mapper", step, stage.steps, {"l_rb": rb.item(), "l_stats": stats.item(), "l_id": still.item()})
    psm.mappers.eval().requires_grad_(False)


def _calibrate(psm: PSM, features: Features, sigma: float) -> None:
    """Let mappers that can set their initial scale do so on real features."""
    for name, mapper in zip(psm.mapped, psm.mappers, strict=True):
        if isinstance(mapper, ResidualMapper):
            mapper.calibrate(features[name], sigma)


def _sized(mapper: Part, width: int) -> Part:
    return Part(kind=mapper.kind, args={"width": width, **mapper.args})


def _sigma(config: TrainingConfig) -> float:
    low, high = config.sigma_range or (config.sigma, config.sigma)
    return low if low == high else low + (high - low) * torch.rand(()).item()


def _optimiser(module: nn.Module, stage: Stage) -> tuple[torch.optim.Optimizer, LambdaLR]:
    optimizer = torch.optim.AdamW(module.parameters(), lr=stage.lr)

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / max(1, stage.warmup))
        return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, step / stage.steps)))

    return optimizer, LambdaLR(optimizer, factor)


def _update(loss: Tensor, module: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LambdaLR) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    scheduler.step()


def _batches(images: Dataset[Tensor], stage: Stage, seed: int) -> Iterator[Tensor]:
    """``stage.steps`` shuffled batches, epoch after epoch, in an order fixed by the seed."""
    generator = torch.Generator().manual_seed(seed)
    loader: DataLoader[Any] = DataLoader(images, stage.batch_size, shuffle=True, drop_last=True, generator=generator)
    if len(loader) == 0:
        raise SettingError(f"Fewer training images than one batch of {stage.batch_size}.")
    done = 0
    while done < stage.steps:
        for batch in loader:
            yield batch
            done += 1
            if done == stage.steps:
                return


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """The encoder in eval mode and without parameter gradients; both are put back."""
    modes = {m: m.training for m in module.modules()}
    wanted = {p: p.requires_grad for p in module.parameters()}
    module.eval().requires_grad_(False)
    try:
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode
        for p, flag in wanted.items():
            p.requires_grad_(flag)
