"""The two stages as modules that compute their losses, and the optimisation that both share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fs_plugins.errors import SettingError
from fs_plugins.noise import keyed, normal, uniform
from fs_plugins.psm import PSM
from fs_plugins.psm.protocols import Calibrates, Denoises
from fs_plugins.smoothing import FeatureSmoother
from fs_plugins.training import losses
from fs_plugins.training.config import TrainingConfig
from fs_plugins.training.crew import Crew
from fs_plugins.training.data import Pictures, batches, drawn, samples
from fs_plugins.vision import VisionCall

Terms = dict[str, Tensor]
"""Loss term -> its value, a scalar."""


class PurifierTerms(nn.Module):
    """l_rb, l_mse and, of purifiers that have a loss of their own (``Denoises``), l_diff (eqs. 7 to 9)."""

    def __init__(self, psm: PSM, call: VisionCall, processes: int) -> None:
        super().__init__()
        self.purifier = psm.purifier
        self.road = FeatureSmoother(call, psm=psm, sigma=psm.config.sigma)

    def forward(self, clean: Tensor, noise: Tensor, sigma: float, level: Tensor) -> Terms:
        """(B, C, H, W) images in [0, 1], (B, n0, C, H, W) standard normal noise, (B,) in [0, 1) -> the terms."""
        call, draws = self.road.call, noise.shape[1]
        with torch.no_grad():
            reference = call.embed(call.encode(clean)).repeat_interleave(draws, 0)
        repeated = clean.repeat_interleave(draws, 0)
        purified = self.road.views(repeated, noise.flatten(0, 1), sigma)
        terms = {
            "l_rb": losses.consistency(call.embed(call.encode(purified)), reference),
            "l_mse": losses.reconstruction(purified, repeated),
        }
        if isinstance(self.purifier, Denoises):
            terms["l_diff"] = self.purifier.denoising_loss(clean, noise[:, 0], level)
        return terms


class MapperTerms(nn.Module):
    """l_rb, l_stats and l_id (eqs. 11 to 13), the last two summed over the readouts."""

    def __init__(self, psm: PSM, call: VisionCall, processes: int) -> None:
        super().__init__()
        self.psm = psm
        self.road = FeatureSmoother(call, psm=psm, sigma=psm.config.sigma)
        self.average = _over_processes if processes > 1 else lambda mean: mean

    def forward(self, clean: Tensor, noise: Tensor, sigma: float, level: Tensor) -> Terms:
        """As for ``PurifierTerms``; ``level`` plays no part."""
        call, draws, names = self.road.call, noise.shape[1], self.psm.mapped
        with torch.no_grad():
            features = call.encode(clean)
            reference = call.embed(features).repeat_interleave(draws, 0)
            noisy = call.encode(self.road.views(clean.repeat_interleave(draws, 0), noise.flatten(0, 1), sigma))
        mapped, still = self.road.mapped(noisy, sigma), self.road.mapped(noisy, 0.0)
        stats = [losses.statistics(mapped[name], features[name], self.average) for name in names]
        return {
            "l_rb": losses.consistency(call.embed(mapped), reference),
            "l_stats": torch.stack(stats).sum(),
            "l_id": torch.stack([losses.identity(still[name] - noisy[name]) for name in names]).sum(),
        }


class Optimisation:
    """One stage, step by step, from its start or from a checkpoint.

    Args:
        name: "purifier" or "mapper".
        psm: holds what is trained; of its part, the weights in its state (an adapter's, say, not its base's).
        crew: the processes that train together.
        kept: what ``state`` returned in an earlier life.
        workers: threads that load images and draw noise.
    """

    def __init__(
        self,
        name: str,
        psm: PSM,
        call: VisionCall,
        images: Pictures,
        config: TrainingConfig,
        crew: Crew,
        *,
        kept: dict[str, Any] | None = None,
        workers: int = 1,
    ) -> None:
        self.name, self.config, self.crew = name, config, crew
        self.stage = config.stages[name]
        self.done: int = kept["step"] if kept else 0
        self.module: Any = getattr(psm, "purifier" if name == "purifier" else "mappers")
        own = self.module.state_dict()
        self.trained = {key: value for key, value in self.module.named_parameters() if key in own}
        for parameter in self.trained.values():
            parameter.requires_grad_(True)
        self.module.train()
        self.decay = self.stage.ema
        averaged = self.trained if self.decay is not None else {}
        self.average = {key: value.detach().clone() for key, value in averaged.items()}
        optimizer = torch.optim.AdamW(self.trained.values(), lr=self.stage.lr)
        if kept:
            optimizer.load_state_dict(kept["optimizer"])
            for key, value in self.average.items():
                value.copy_(kept["average"][key])
            if crew.scaler is not None:
                crew.scaler.load_state_dict(kept["scaler"])
        terms = (PurifierTerms if name == "purifier" else MapperTerms)(psm, call, crew.num_processes)
        self.terms, self.optimizer = crew.prepare(terms, optimizer)
        self.device = next(iter(self.trained.values())).device
        self.batches = batches(
            lambda sample: drawn(images, config, name, sample),
            samples(
                len(images),
                config,
                name,
                first=self.done,
                process=crew.process_index,
                processes=crew.num_processes,
            ),
            workers=workers,
        )

    def sigma(self) -> float:
        """The next step's noise level."""
        low, high = self.config.sigmas
        share = uniform(keyed(self.config.seed, self.name, self.done, "sigma")).item()
        return low + (high - low) * share

    def advance(self) -> dict[str, float]:
        """One step of the optimiser.

        Returns:
            the loss terms, averaged over the step's images in all processes.

        Raises:
            SettingError: a loss is not finite.
        """
        stage, crew, sigma = self.stage, self.crew, self.sigma()
        _seed(self.device, self.config.seed, self.name, self.done, crew.process_index)  # for plugins that have dropout
        for group in self.optimizer.param_groups:
            group["lr"] = stage.rate(self.done)
        weights = self.config.weights(self.name)
        told: dict[str, Tensor] = {}
        for forward in range(stage.accumulate):
            clean, noise, level = (value.to(self.device) for value in next(self.batches))
            last = forward == stage.accumulate - 1
            with nullcontext() if last else crew.no_sync(self.terms):
                terms = self.terms(clean, noise, sigma, level)
                crew.backward(sum(weights[name] * value for name, value in terms.items()) / stage.accumulate)
            for name, value in terms.items():
                told[name] = told.get(name, 0) + value.detach().float() / stage.accumulate
        values = dict(zip(told, crew.reduce(torch.stack(list(told.values())), "mean").tolist(), strict=True))
        if not all(map(math.isfinite, values.values())):
            raise SettingError(
                f"Step {self.done + 1} of the {self.name}'s training gave a loss that is not finite ({values}). Lower "
                "its learning rate, or train in fp32."
            )
        crew.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        with torch.no_grad():
            for key, value in self.average.items():
                value.lerp_(self.trained[key], 1 - (self.decay or 0.0))
        return values

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, beside the PSM's weights."""
        scaler = None if self.crew.scaler is None else self.crew.scaler.state_dict()
        optimizer = self.optimizer.state_dict()
        return {
            "stage": self.name,
            "step": self.done,
            "optimizer": optimizer,
            "average": self.average,
            "scaler": scaler,
        }

    @contextmanager
    def as_served(self) -> Iterator[None]:
        """Inside, the module is in eval mode and, where there is a moving average, has its weights."""
        current = {key: value.detach().clone() for key, value in self.trained.items() if key in self.average}
        self._take(self.average)
        self.module.eval()
        try:
            yield
        finally:
            self._take(current)
            self.module.train()

    def close(self) -> None:
        """Leave the module as it is served, and let go of everything else."""
        self.batches.close()
        self._take(self.average)
        self.module.eval().requires_grad_(False)
        del self.terms, self.optimizer
        self.crew.free_memory()

    @torch.no_grad()
    def _take(self, weights: dict[str, Tensor]) -> None:
        for key, value in weights.items():
            self.trained[key].copy_(value)


def calibrate(psm: PSM, call: VisionCall, images: Pictures, config: TrainingConfig) -> None:
    """Let mappers that can set their initial scale (``Calibrates``) do so on the first few images, made noisy."""
    clean = torch.stack([images[i] for i in range(min(len(images), 8))])
    noise = normal(keyed(config.seed, "calibration"), clean.shape)
    device = next(psm.mappers.parameters()).device
    road = FeatureSmoother(call, psm=psm, sigma=config.sigma)
    with torch.no_grad():
        features = call.encode(road.views(clean.to(device), noise.to(device)))
    for name, mapper in zip(psm.mapped, psm.mappers, strict=True):
        if isinstance(mapper, Calibrates):
            mapper.calibrate(features[name], config.sigma)


@contextmanager
def own_random(device: torch.device, seed: int) -> Iterator[None]:
    """torch's global generators start from the seed inside, and go on outside as if nothing had been."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        _seed(device, seed)
        yield


def _seed(device: torch.device, *marks: object) -> None:
    seed = keyed(*marks).initial_seed()
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _over_processes(mean: Tensor) -> Tensor:
    return _MeanOverProcesses.apply(mean)


class _MeanOverProcesses(torch.autograd.Function):
    """Each process's (D,) mean -> the mean over processes; its gradient is the mean of theirs, for it is linear."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor) -> Tensor:
        total = mean.clone()
        torch.distributed.all_reduce(total)
        return total / torch.distributed.get_world_size()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _MeanOverProcesses.forward(ctx, grads[0])
