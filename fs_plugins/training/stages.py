"""The two stages as modules that compute their losses, and the optimisation that both share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fs_plugins.errors import SettingError
from fs_plugins.noise import keyed
from fs_plugins.psm import PSM, ResidualMapper
from fs_plugins.training import losses
from fs_plugins.training.config import TrainingConfig
from fs_plugins.training.data import batches, drawn, samples
from fs_plugins.vision import VisionCall

Terms = dict[str, Tensor]
"""Loss term -> its value, a scalar."""


class PurifierTerms(nn.Module):
    """l_rb, l_mse and, of purifiers that have one, l_diff (eqs. 7 to 9).

    Such a purifier has ``denoising_loss(clean, noise, level)``: (N, 3, H, W) images in [0, 1], standard normal noise of the
    same shape, and (N,) uniform numbers in [0, 1) that choose a step of its diffusion; it returns a scalar.
    """

    def __init__(self, psm: PSM, call: VisionCall, processes: int) -> None:
        super().__init__()
        self.purifier: Any = psm.purifier
        self.call = call

    def forward(self, clean: Tensor, noise: Tensor, sigma: float, level: Tensor) -> Terms:
        """(B, C, H, W) images in [0, 1], (B, n0, C, H, W) standard normal noise, (B,) in [0, 1) -> the terms."""
        with torch.no_grad():
            reference = self.call.embed(self.call.encode(clean))
        repeated = clean.repeat_interleave(noise.shape[1], 0)
        purified = self.purifier(repeated + sigma * noise.flatten(0, 1), sigma)
        terms = {
            "l_rb": losses.consistency(
                self.call.embed(self.call.encode(purified)), reference.repeat_interleave(noise.shape[1], 0)
            ),
            "l_mse": losses.reconstruction(purified, repeated),
        }
        if hasattr(self.purifier, "denoising_loss"):
            terms["l_diff"] = self.purifier.denoising_loss(clean, noise[:, 0], level)
        return terms


class MapperTerms(nn.Module):
    """l_rb, l_stats and l_id (eqs. 11 to 13), the last two summed over the readouts."""

    def __init__(self, psm: PSM, call: VisionCall, processes: int) -> None:
        super().__init__()
        self.psm = psm
        self.call = call
        self.average = _over_processes if processes > 1 else lambda mean: mean

    def forward(self, clean: Tensor, noise: Tensor, sigma: float, level: Tensor) -> Terms:
        """As for ``PurifierTerms``; ``level`` plays no part."""
        psm = self.psm
        with torch.no_grad():
            features = self.call.encode(clean)
            reference = self.call.embed(features).repeat_interleave(noise.shape[1], 0)
            noisy = clean.repeat_interleave(noise.shape[1], 0) + sigma * noise.flatten(0, 1)
            noised = self.call.encode(psm.purify(noisy, sigma))
        mapped = {name: psm.map(name, value, sigma) for name, value in noised.items()}
        stats = [losses.statistics(mapped[name], features[name], self.average) for name in psm.mapped]
        still = [losses.identity(psm.map(name, noised[name], 0.0) - noised[name]) for name in psm.mapped]
        return {
            "l_rb": losses.consistency(self.call.embed(mapped), reference),
            "l_stats": torch.stack(stats).sum(),
            "l_id": torch.stack(still).sum(),
        }


class Optimisation:
    """One stage, step by step, from its start or from a checkpoint.

    Args:
        name: "purifier" or "mapper".
        psm: holds what is trained; of its part, those weights that are in its state (an adapter's, say, not its base's).
        crew: an ``accelerate.Accelerator``, or ``Alone``.
        kept: what ``state`` returned in an earlier life.
        workers: threads that load images and draw noise.
    """

    def __init__(
        self,
        name: str,
        psm: PSM,
        call: VisionCall,
        images: Any,
        config: TrainingConfig,
        crew: Any,
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
        share = torch.rand((), generator=keyed(self.config.seed, self.name, self.done, "sigma")).item()
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
                f"Step {self.done + 1} of the {self.name}'s training gave a loss that is not finite ({values}). Lower its "
                "learning rate, or train in fp32."
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


class Alone:
    """What is used of ``accelerate.Accelerator``, for one process in full precision without accelerate."""

    process_index, num_processes, is_main_process = 0, 1, True
    mixed_precision, scaler = "no", None

    def prepare(self, *things: Any) -> tuple[Any, ...]:
        return things

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip_grad_norm_(self, parameters: Any, most: float) -> Tensor:
        return nn.utils.clip_grad_norm_(list(parameters), most)

    def reduce(self, value: Tensor, how: str) -> Tensor:
        return value

    def no_sync(self, module: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def wait_for_everyone(self) -> None: ...

    def free_memory(self) -> None: ...


def calibrate(psm: PSM, call: VisionCall, images: Any, config: TrainingConfig) -> None:
    """Let mappers that can set their initial scale do so on the features of the first few noisy images."""
    clean = torch.stack([images[i] for i in range(min(len(images), 8))])
    noise = torch.randn(clean.shape, generator=keyed(config.seed, "calibration"))
    device = next(psm.mappers.parameters()).device
    with torch.no_grad():
        features = call.encode(psm.purify((clean + config.sigma * noise).to(device), config.sigma))
    for name, mapper in zip(psm.mapped, psm.mappers, strict=True):
        if isinstance(mapper, ResidualMapper):
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
