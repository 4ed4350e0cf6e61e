"""The stages as modules that compute their losses, and the optimisation that they share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fs_plugins.answers import Answers, Spoken
from fs_plugins.attacks.ball import Ball, project
from fs_plugins.errors import SettingError
from fs_plugins.noise import keyed, normal, uniform
from fs_plugins.psm import PSM
from fs_plugins.psm.protocols import Calibrates, Denoises
from fs_plugins.smoothing import FeatureSmoother
from fs_plugins.training import losses
from fs_plugins.training.config import TrainingConfig
from fs_plugins.training.crew import Crew
from fs_plugins.training.data import Pictures, batches, drawn, samples
from fs_plugins.training.reader import Read, learned
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


@dataclass(frozen=True)
class Reference:
    """What attacked pictures are held to: all of the plain model, on the clean ones.

    Args:
        embedded: (B, E).
        answers, given, spoken: how the model is asked, what it answers, and what it would say in the answers' places;
            None where it cannot be asked.
    """

    embedded: Tensor
    answers: Answers | None = None
    given: Any = None
    spoken: Spoken | None = None


class AdversarialTerms(nn.Module):
    """Of attacked pictures, against the clean ones: l_adv (of features), l_mse (of purified pixels), l_say (of answers,
    where the model can be asked) and, where some are pulled towards other pictures, l_pull.
    """

    def __init__(self, psm: PSM, call: VisionCall, processes: int) -> None:
        super().__init__()
        self.psm = psm
        self.road = FeatureSmoother(call, psm=psm, sigma=psm.config.sigma)

    @torch.no_grad()
    def reference(self, clean: Tensor, answers: Answers | None) -> Reference:
        """What the plain model makes of (B, C, H, W) images in [0, 1]."""
        call = self.road.call
        output = call.look(clean)
        embedded = call.embed(call.wide(output))
        if answers is None:
            return Reference(embedded)
        given = answers.given(output, range(len(clean)))
        return Reference(embedded, answers, given, answers.spoken(output, given))

    def forward(
        self, shown: Tensor, clean: Tensor, noise: Tensor, sigma: float, held: Reference, pulled: Tensor
    ) -> Terms:
        """(B, C, H, W) attacked and clean images in [0, 1], standard normal noise, (B,) 1 where pulled -> the terms."""
        call = self.road.call
        purified = self.road.views(shown, noise, sigma)
        output = call.look(purified)
        mapped = self.road.mapped(call.features(output), sigma)
        embedded = call.embed(mapped)
        terms = {
            "l_adv": losses.consistency(embedded, held.embedded),
            "l_mse": losses.reconstruction(purified, clean),
        }
        if bool(pulled.any()):
            other = torch.cosine_similarity(embedded, held.embedded.roll(1, 0), dim=-1)
            terms["l_pull"] = (pulled * other).mean()
        if held.answers is not None and held.spoken is not None:
            for readout in call.readouts:
                output = readout.put(output, mapped[readout.name].to(readout.get(output).dtype))
            terms["l_say"] = held.answers.spoken(output, held.given).divergence(held.spoken).mean()
        return terms


def trained(psm: PSM, stage: str) -> nn.Module:
    """What a stage trains."""
    if stage == "adversarial":
        return psm
    found = psm.purifier if stage == "purifier" else psm.mappers
    assert found is not None
    return found


_TERMS = {"purifier": PurifierTerms, "mapper": MapperTerms, "adversarial": AdversarialTerms}


class Optimisation:
    """One stage, step by step, from its start or from a checkpoint.

    Args:
        name: "purifier", "mapper" or "adversarial".
        psm: holds what is trained; of its part, the weights in its state (an adapter's, say, not its base's).
        crew: the processes that train together.
        kept: what ``state`` returned in an earlier life.
        workers: threads that load images and draw noise.
        answers: of the model, for the adversarial stage, which asks one a step.
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
        answers: Sequence[Answers] = (),
    ) -> None:
        self.answers = answers
        self.readers: list[Read] = []
        self.name, self.config, self.crew = name, config, crew
        self.stage = config.stages[name]
        self.done: int = kept["step"] if kept else 0
        self.module: Any = trained(psm, name)
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
        if name == "adversarial" and config.adversarial is not None and config.adversarial.reader and answers:
            if kept:
                self.readers = [Read.of(call, told, crew.device) for told in kept["readers"]]
            else:
                self.readers = self._taught(psm, call, images)
        terms = _TERMS[name](psm, call, crew.num_processes)
        self.own: Any = terms
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

    def _taught(self, psm: PSM, call: VisionCall, images: Pictures) -> list[Read]:
        """A reader for each way to ask, which every process teaches alike."""
        adversary, config = self.config.adversarial, self.config
        assert adversary is not None
        steps, sigma = adversary.reader_steps, config.sigmas[1]
        return learned(self.answers, call, psm, images, sigma=sigma, seed=config.seed, steps=steps)

    def _asked(self, marks: Sequence[object]) -> Answers | None:
        """Whom a step asks: one of the ways to ask, the model itself or, in so many steps, its reader."""
        if not self.answers:
            return None
        place = int(len(self.answers) * uniform(keyed(*marks, "question")).item())
        share = self.config.adversarial.reader if self.config.adversarial else 0.0
        by_reader = bool(self.readers) and uniform(keyed(*marks, "reader")).item() < share
        return self.readers[place] if by_reader else self.answers[place]

    def sigma(self) -> float:
        """The next step's noise level."""
        low, high = self.config.sigmas
        share = uniform(keyed(self.config.seed, self.name, self.done, "sigma")).item()
        return low + (high - low) * share

    def advance(self) -> dict[str, float]:
        """One step of the optimiser.

        Returns:
            the loss terms, averaged over the step's images in all processes; of attacked ones, those of the last pass.

        Raises:
            SettingError: a loss is not finite.
        """
        _seed(self.device, self.config.seed, self.name, self.done, self.crew.process_index)  # for plugins' dropout
        for group in self.optimizer.param_groups:
            group["lr"] = self.stage.rate(self.done)
        told = self._attacked() if self.name == "adversarial" else self._accumulated()
        self.done += 1
        return told

    def _accumulated(self) -> dict[str, float]:
        stage, crew, sigma = self.stage, self.crew, self.sigma()
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
        values = self._told(told)
        self._update()
        return values

    def _attacked(self) -> dict[str, float]:
        """One batch: the attack moves at every pass, the weights at every ``update_every``-th."""
        adversary, sigma, weights = self.config.adversarial, self.sigma(), self.config.weights(self.name)
        assert adversary is not None
        clean, noise, level = (value.to(self.device) for value in next(self.batches))
        marks = (self.config.seed, self.name, self.done)
        held = self.own.reference(clean, self._asked(marks))
        pulled = (uniform(keyed(*marks, self.crew.process_index, "aims"), (len(clean),)) < adversary.targeted).to(clean)
        radii = adversary.radii(self.done / self.stage.steps, level).to(clean).view(-1, 1, 1, 1)
        towards = Ball(adversary.norm).steepest
        off = normal(keyed(*marks, self.crew.process_index, "start"), clean.shape).to(clean)
        shown = project(adversary.norm, radii, clean + radii * towards(off), clean)
        told: dict[str, Tensor] = {}
        for turn in range(self.stage.draws):
            learns = turn % adversary.update_every == adversary.update_every - 1
            shown = shown.detach().requires_grad_(True)
            with nullcontext() if learns else self.crew.no_sync(self.terms):
                terms = self.terms(shown, clean, noise[:, turn], sigma, held, pulled)
                loss = sum((weights[name] * value for name, value in terms.items()), clean.new_zeros(()))
                if learns:
                    self.crew.backward(loss)
                    slope = shown.grad
                else:
                    scaled = loss if self.crew.scaler is None else self.crew.scaler.scale(loss)
                    (slope,) = torch.autograd.grad(scaled, shown)
            assert slope is not None
            with torch.no_grad():
                shown = project(adversary.norm, radii, shown + adversary.step_size * radii * towards(slope), clean)
            told = {name: value.detach().float() for name, value in terms.items()}
            if learns:
                self._update()
        return self._told(told)

    def _told(self, told: dict[str, Tensor]) -> dict[str, float]:
        """The terms' means over all processes.

        Raises:
            SettingError: one is not finite.
        """
        values = dict(zip(told, self.crew.reduce(torch.stack(list(told.values())), "mean").tolist(), strict=True))
        if not all(map(math.isfinite, values.values())):
            raise SettingError(
                f"Step {self.done + 1} of the {self.name}'s training gave a loss that is not finite ({values}). Lower "
                "its learning rate, or train in fp32."
            )
        return values

    def _update(self) -> None:
        self.crew.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for key, value in self.average.items():
                value.lerp_(self.trained[key], 1 - (self.decay or 0.0))

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
            **({"readers": [reader.state() for reader in self.readers]} if self.readers else {}),
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
