"""Feature-space smoothing of one vision call: noise -> purify -> encode -> map -> average.

The road is the same for serving, training and measuring; only the draws and what is kept differ.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fs_plugins import checks
from fs_plugins.errors import ModelError, SettingError
from fs_plugins.layouts import Group, Layout
from fs_plugins.noise import Noise, NoiseScope, NoiseSource, Source, draws
from fs_plugins.outputs import map_tensors
from fs_plugins.pickled import Pickled
from fs_plugins.pictures import Picture
from fs_plugins.psm import PSM
from fs_plugins.vision import Features, VisionCall

DEFAULT_CHUNK_SIZE = 32


@dataclass(frozen=True)
class Pass:
    """One forward of the encoder: ``draws`` noisy copies of some ``images`` of a group, draw by draw.

    ``pixels`` are (draws * images, ..., C, H, W), normalised.
    """

    group: Group
    images: slice
    draws: int
    pixels: Tensor

    def arguments(self, argument: str) -> dict[str, Tensor]:
        """The encoder's pixel argument and the others that go with these rows, by name."""
        template = None if self.group.template is None else self._expanded(self.group.template)
        companions = {name: self._expanded(value) for name, value in self.group.companions.items()}
        return {**companions, argument: self.group.pack(self.pixels, template)}

    def _expanded(self, value: Tensor) -> Tensor:
        part = value[self.images]
        return part.repeat(self.draws, *[1] * (part.ndim - 1))


@dataclass
class Tally:
    """What a smoothed call did: images, draws per image, and draws left out because they were not finite."""

    images: int = 0
    draws: int = 0
    non_finite: int = 0


class FeatureSmoother(Pickled):
    """Smooths one VisionCall.

    What is served is the mean of the draws' unit embeddings, scaled to the draws' mean length:
    draw i's features z_i (purified, encoded, mapped) are averaged with weights proportional to
    1/||embed(z_i)||, one weight per draw and image. Every other field of the output with a row per image is the
    plain mean over draws, so that none of them has escaped smoothing. A draw of zero or non-finite
    length has weight 0. A draw in which a field is not finite is counted, and left out of that field's mean, or of
    every mean where its length is not finite. A field of an image that no draw is finite in is NaN, as the model alone
    would give it.

    Args:
        call: the adapter's answer.
        psm: purifier and mappers, or None for plain smoothing.
        sigma: standard deviation of the noise, in [0, 1] pixel units, at the resolution the encoder sees.
        n0: draws per image.
        noise: ``"antithetic"`` pairs e, -e (serving) or ``"iid"``.
        noise_scope: ``"call"`` for fresh draws at every call, ``"image"`` for draws fixed by the image.
        seed: makes the draws reproducible.
        chunk_size: rows (draws times images) per forward of the encoder; bounds memory, never the result.

    Raises:
        SettingError: a value out of range.
        PSMError: the PSM does not fit the call or sigma.
    """

    _fresh = (("_lock", threading.Lock), ("_psms", dict))

    def __init__(
        self,
        call: VisionCall,
        *,
        psm: PSM | None,
        sigma: float,
        n0: int = 4,
        noise: Noise = "antithetic",
        noise_scope: NoiseScope = "call",
        seed: int | None = None,
        chunk_size: int = DEFAULT_CHUNK_SIZE,
    ) -> None:
        level = checks.sigma(sigma)
        n0 = checks.whole("n0 (draws per image)", n0)
        chunk_size = checks.whole("chunk_size (rows per forward)", chunk_size)
        seed = None if seed is None else checks.seed(seed)
        if noise not in get_args(Noise):
            raise SettingError(f"noise must be one of {get_args(Noise)}, got {noise!r}.")
        if noise_scope not in get_args(NoiseScope):
            raise SettingError(f"noise_scope must be one of {get_args(NoiseScope)}, got {noise_scope!r}.")
        if psm is not None:
            psm.check(call, level)
        self.call = call
        self.psm = psm
        self.sigma = level
        self.n0 = n0
        self.noise: Noise = noise
        self.chunk_size = chunk_size
        self.source = NoiseSource(noise_scope, seed)
        self._psms: dict[torch.device, PSM] = {}
        self._lock = threading.Lock()

    @property
    def is_identity(self) -> bool:
        """Whether smoothing would change nothing: no PSM and no noise."""
        return self.psm is None and self.sigma == 0

    def check_eval(self) -> None:
        """Refuse training mode, see ``VisionCall.check_eval``.

        Raises:
            ModelError: a part of the encoder or of the PSM is in training mode.
        """
        self.call.check_eval()
        if self.psm is not None and any(part.training for part in self.psm.modules()):
            raise ModelError("The PSM is in training mode, where it is not what is served. Call psm.eval() first.")

    def unfit(self, pixels: Tensor) -> str | None:
        """Why the PSM cannot serve (B, C, H, W) images or (B, F, C, H, W) videos like these; None if it can."""
        if self.psm is None:
            return None
        any_size = self.call.image_size is None
        if any_size and self.psm.mapped and pixels.ndim > 4:
            return (
                f"The encoder was given a video of {pixels.shape[1]} distinct frames; the PSM's mapper "
                f"({', '.join(self.psm.mapped)}) was made for the tokens of single images. Its purifier applies to "
                "videos: enable with psm.only(mapper=False)."
            )
        size = self.psm.config.image_size
        if size is None or size == tuple(pixels.shape[-2:]) or (any_size and not self.psm.mapped):
            return None
        height, width = size
        return (
            f"The encoder was given {pixels.shape[-2]}x{pixels.shape[-1]} pixels; its PSM was made for "
            f"{height}x{width}. Resize the images, or enable with psm=None."
        )

    def smooth(self, images: Picture | Iterable[Picture]) -> Features:
        """(B, C, H, W) still images in [0, 1], or a list of pictures -> the served features, without the model.

        Raises:
            SettingError: something else than tensors, numpy arrays and PIL images; those are checked, tensors are not.
        """
        return self.call.features(self.look(images))

    def look(self, images: Picture | Iterable[Picture], *, source: Source | None = None, frugal: bool = False) -> Any:
        """(B, C, H, W) still images in [0, 1] -> the encoder's smoothed output, a row per image.

        Gradients follow the images: this is what an adaptive attack differentiates.

        Args:
            source: of the noise; the smoother's own if left out.
            frugal: keep no activations of purifier, encoder and mapper for the backward pass; it computes them again.
        """
        run = _recomputed if frugal else _once
        shown = images if isinstance(images, Tensor) else self.call.batch("images", images)
        units = tuple(range(len(shown)))
        wide = torch.promote_types(shown.dtype, torch.float32)
        still = Group(units, self.call.pixels.from_unit(shown, wide), {})
        steps = self.passes([still], self.call.dtype, Tally(), source=source, run=run)
        step = next(steps)
        while True:
            output = run(self.call.forward, step.pixels)
            try:
                step = steps.send(output)
            except StopIteration as stop:
                return Layout().closed(stop.value, units, shown)

    @property
    def in_words(self) -> str:
        """What smooths, for people."""
        psm = f"PSM {self.psm.config.name}" if self.psm else "no PSM"
        return f"{type(self.call.module).__name__} with {psm}, sigma {self.sigma:g}, n0 {self.n0}"

    def __repr__(self) -> str:
        return f"<FeatureSmoother of {self.in_words}>"

    def draw(self, images: Tensor, noise: Tensor, sigma: float | None = None) -> Features:
        """The road of every single draw: noise -> purify -> encode -> map.

        Args:
            images: (N, C, H, W) still images in [0, 1].
            noise: standard normal, of the same shape.
            sigma: another noise level than the smoother's own, for training.

        Returns:
            the N draws' features, fp32. Gradients follow the images and the PSM's weights.
        """
        return self.mapped(self.call.encode(self.views(images, noise, sigma)), sigma)

    def views(self, images: Tensor, noise: Tensor, sigma: float | None = None) -> Tensor:
        """Images and standard normal noise of one shape -> what the encoder is shown: P(x + sigma e), fp32."""
        level = self.sigma if sigma is None else sigma
        noisy = images + level * noise
        psm = self._psm_on(images.device)
        if psm is None:
            return noisy
        frames = noisy.flatten(0, -4)
        return psm.purify(frames, level).to(noisy.dtype).view(noisy.shape)

    def mapped(self, features: Features, sigma: float | None = None) -> Features:
        """The encoder's features -> the same after their mappers, fp32."""
        level = self.sigma if sigma is None else sigma
        psm = self._psm_on(next(iter(features.values())).device)
        wide = {name: value.to(torch.promote_types(value.dtype, torch.float32)) for name, value in features.items()}
        return wide if psm is None else {name: psm.map(name, value, level) for name, value in wide.items()}

    def passes(
        self,
        groups: Sequence[Group],
        dtype: torch.dtype,
        tally: Tally,
        *,
        source: Source | None = None,
        run: Callable[..., Any] | None = None,
    ) -> Generator[Pass, Any, list[Any]]:
        """Yield what the encoder must be run on, take its raw outputs by ``send``, return the smoothed ones.

        Args:
            groups: the images of one vision call.
            dtype: of the pixels the encoder expects.
            tally: counts images, draws and non-finite draws as they come.
            source: of the noise; the smoother's own if left out.
            run: calls purifier and mapper, as ``function(*arguments)`` if left out.

        Returns:
            smoothed outputs, opened (one row per image), whose rows are the groups' images in order.
        """
        layout = self.call.pixels.layout
        views = [self.call.pixels.to_unit(group.pixels) for group in groups]
        by_unit = dict(
            pair for group, images in zip(groups, views, strict=True) for pair in zip(group.units, images, strict=True)
        )
        tally.images, tally.draws = len(by_unit), self.n0
        run = run or _once
        generators = (source or self.source).generators([by_unit[unit] for unit in range(len(by_unit))])
        done = []
        for group, images in zip(groups, views, strict=True):
            size = min(len(images), self.chunk_size)
            per_pass = min(self.n0, self.chunk_size // size)
            for start in range(0, len(images), size):
                part = slice(start, min(start + size, len(images)))
                streams = [
                    draws(generators[unit], tuple(images.shape[1:]), self.noise, self.n0) for unit in group.units[part]
                ]
                mean = _Mean(self, run)
                for first in range(0, self.n0, per_pass):
                    count = min(per_pass, self.n0 - first)
                    noise = torch.stack([torch.stack([next(stream) for stream in streams]) for _ in range(count)])
                    copies = images[part].repeat(count, *[1] * (images.ndim - 1))
                    shown = run(self.views, copies, noise.flatten(0, 1))
                    output = yield Pass(group, part, count, self.call.pixels.from_unit(shown, dtype))
                    mean.add(layout.opened(output, len(shown)), count)
                tally.non_finite += mean.non_finite
                done.append(mean.result())
        return done

    def _psm_on(self, device: torch.device) -> PSM | None:
        """The PSM on the device the pixels are on; a model split over devices gets a copy for each."""
        if self.psm is None:
            return None
        with self._lock:
            if device not in self._psms:
                own = next((parameter.device for parameter in self.psm.parameters()), device)
                with torch.inference_mode(False):  # a copy made in the mode would never have gradients
                    self._psms[device] = self.psm if own == device else copy.deepcopy(self.psm).to(device)
            return self._psms[device]


def _once(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


class _Mean:
    """Running average of a group's outputs over passes of (draws, images, ...)."""

    def __init__(self, smoother: FeatureSmoother, run: Callable[..., Any]) -> None:
        self.smoother = smoother
        self.run = run
        self.non_finite = 0
        self.output: Any = None
        self.dtypes: Any = None
        self.units: Features = {}
        self.lengths: list[Tensor] = []
        self.lost: Any = None
        """For each field, how many draws of each image are left out of its mean; None while there were none."""

    def add(self, output: Any, draws: int) -> None:
        features = self.run(self.smoother.mapped, self.smoother.call.features(output))
        lengths = self.smoother.call.embed(features).norm(dim=-1)
        rows = len(lengths)
        finite = lengths.isfinite()
        sound = [finite]
        map_tensors(
            [output], lambda one: sound.append(_sound(one[0]).to(finite.device)) if _batched(one[0], rows) else 0
        )
        whole = torch.stack(sound).all(0)
        if not bool(whole.all()):
            self.non_finite += int((~whole).sum())
            output = self._without(output, finite, draws)
            features = {name: value.where(_column(finite, value), 0.0) for name, value in features.items()}
        counted = finite & (lengths > 0)
        weights = torch.where(counted, 1 / lengths.where(counted, 1.0), 0.0)
        units = {name: _over_draws(value * _column(weights, value), draws) for name, value in features.items()}
        share = 1 / self.smoother.n0
        if self.output is None:
            self.dtypes = map_tensors([output], lambda one: one[0].dtype)
            self.output = map_tensors(
                [output], lambda one: _over_draws(one[0], draws) * share if _batched(one[0], rows) else one[0]
            )
            self.units = units
        else:
            self.output = map_tensors(
                [output, self.output],
                lambda pair: pair[1] + _over_draws(pair[0], draws) * share if _batched(pair[0], rows) else pair[1],
            )
            self.units = {name: self.units[name] + value for name, value in units.items()}
        self.lengths.append(lengths.where(finite, torch.nan).view(draws, -1))

    def _without(self, output: Any, finite: Tensor, draws: int) -> Any:
        """The output with zeros for the draws that a field is left out in: its own fault, or that of the readouts."""
        rows = len(finite)
        kept = map_tensors(
            [output], lambda one: _sound(one[0]) & finite.to(one[0].device) if _batched(one[0], rows) else None
        )
        lost = map_tensors(
            [output, kept],
            lambda pair: None if pair[1] is None else (~pair[1]).view(draws, -1).sum(0, dtype=torch.long),
        )
        self.lost = lost if self.lost is None else _added(output, self.lost, lost)
        return map_tensors(
            [output, kept], lambda pair: pair[0] if pair[1] is None else pair[0].where(_column(pair[1], pair[0]), 0.0)
        )

    def result(self) -> Any:
        """The module's output with every field averaged and the readouts' smoothed features in place."""
        lengths = torch.cat(self.lengths)
        if self.non_finite and bool(lengths.isnan().all(0).any()):
            raise ModelError(
                "Every draw of an image gave NaN or infinite features, so there is nothing to average. "
                "If the model runs in float16, its encoder may overflow: try bfloat16 or float32."
            )
        direction = self.smoother.call.embed(self.units).norm(dim=-1)
        scale = lengths.nanmean(0) / direction.where(direction > 0, 1.0)
        output = self.output
        if self.lost is not None:  # draws that were left out count in no average; without any it is NaN
            n0 = self.smoother.n0
            output = map_tensors(
                [output, self.lost],
                lambda pair: (
                    pair[0] if pair[1] is None else pair[0] * _column(n0 / (n0 - pair[1]).to(pair[0]), pair[0])
                ),
            )
        output = map_tensors([output, self.dtypes], lambda pair: pair[0].to(pair[1]))
        for readout in self.smoother.call.readouts:
            value = self.units[readout.name]
            smoothed = torch.where(_column(direction > 0, value), value * _column(scale, value), 0.0)
            output = readout.put(output, smoothed.to(readout.get(output).dtype))
        return output


def _batched(value: Tensor, rows: int) -> bool:
    return value.is_floating_point() and value.ndim > 0 and len(value) == rows


def _sound(value: Tensor) -> Tensor:
    """(N, ...) -> (N,) which rows are finite throughout."""
    return value.isfinite().flatten(1).all(1) if value.ndim > 1 else value.isfinite()


def _added(like: Any, one: Any, other: Any) -> Any:
    """Sums of the numbers that two outputs of the same structure hold, None where they hold none."""
    return map_tensors([like, one, other], lambda parts: None if parts[1] is None else parts[1] + parts[2])


def _over_draws(value: Tensor, draws: int) -> Tensor:
    """(draws * images, ...) -> the sum over draws, (images, ...), in fp32 at least."""
    wide = torch.promote_types(value.dtype, torch.float32)
    return value.reshape(draws, -1, *value.shape[1:]).sum(0, dtype=wide)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))
