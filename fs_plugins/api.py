"""The verbs on a model: enable, disable, status, smoothers, vision_call, certify, certify_predictions."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import nn

from fs_plugins.certificates import Certificate, PredictionCertificate
from fs_plugins.certificates.certifiers import Directions
from fs_plugins.certificates.plan import Plan
from fs_plugins.certificates.run import certify_features, certify_labels
from fs_plugins.choice import Draws, PSMChoice, Smoothable, choose, numbered
from fs_plugins.errors import ModelError, SettingError, warn
from fs_plugins.hooks import plugin_manager
from fs_plugins.noise import Noise, NoiseScope
from fs_plugins.patch import SmoothingEvent, SmoothingHook, attach, detach, hooks_of, patched, recompile
from fs_plugins.pictures import Picture, named
from fs_plugins.plugins import claim
from fs_plugins.smoothing import DEFAULT_CHUNK_SIZE, FeatureSmoother
from fs_plugins.state import Status, vision_status
from fs_plugins.vision import VisionCall


class SmoothingHandle:
    """What ``enable`` returns: ``disable()`` and ``status()`` of that model, and a context manager."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def disable(self) -> None:
        """Undo ``enable``; harmless if it has been undone already."""
        if hooks_of(self._model)[0]:
            disable(self._model)

    def status(self) -> Status:
        return status(self._model)

    @property
    def smoothers(self) -> tuple[FeatureSmoother, ...]:
        """One per vision encoder."""
        return tuple(hook.smoother for hook in hooks_of(self._model)[0])

    def __repr__(self) -> str:
        hooks = hooks_of(self._model)[0]
        kind = type(self._model).__name__
        if not hooks:
            return f"<SmoothingHandle of {kind}, disabled>"
        return f"<SmoothingHandle of {kind}, {', '.join(hook.smoother.in_words for hook in hooks)}>"

    def __enter__(self) -> SmoothingHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()


def enable(
    model: nn.Module,
    *,
    psm: PSMChoice | Sequence[PSMChoice] = "auto",
    sigma: float | None = None,
    n0: int = 4,
    noise: Noise = "antithetic",
    noise_scope: NoiseScope = "call",
    seed: int | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    processor: Any = None,
    adapter: str | None = None,
) -> SmoothingHandle:
    """Smooth every image that ``model`` looks at from now on; its weights stay as they are.

    Args:
        model: any model an adapter claims, also inside PEFT, torch.compile or DDP; in eval mode.
        psm: ``"auto"`` takes the registry's PSM for this encoder, readout and resolution, or else its purifier
            ``"photo-light"``, with a warning; ``"photo-light"``, ``"photo"``, ``"diffusion"`` or another of the
            registry's purifiers by name, a PSM, its folder or its hub id is used as given (a folder of such a name is
            ``./photo``); ``None`` is plain smoothing at ``sigma``. A list has one for each vision encoder of a model
            that has several (Video-LLaVA: images, then video).
        sigma: standard deviation of the noise in [0, 1] pixel units at the resolution the encoder sees.
            Left out, the PSM's own. Required with ``psm=None``.
        n0: draws per image. More is steadier and slower.
        noise: ``"antithetic"`` (pairs e, -e) or ``"iid"``.
        noise_scope: ``"call"`` draws afresh at every vision call. ``"image"`` fixes an image's draws by a secret
            key and its content: for callers that recompute the encoder, or repeat its images, within one answer
            (beams and ``use_cache=False`` on older transformers, gradient checkpointing around the encoder).
        seed: reproducible draws, for experiments. An attacker who knows the seed knows the noise.
        chunk_size: rows (draws times images) per forward of the encoder; bounds memory, never the result.
        processor: the model's processor, image processor or a PixelSpace, where mean and std cannot be found. Where
            nobody says them, those that are usual for the family are taken, with a warning.
        adapter: the plugin to use where several claim the model.

    Returns:
        a handle; also a context manager that disables on leaving.

    Raises:
        ModelError: no adapter, or several, claim the model; it is enabled already; it is in training mode.
        SettingError, PSMError, RegistryError, PluginError: see their docstrings.
        Nothing is attached to the model unless everything is in order.
    """
    if isinstance(model, nn.Module) and hooks_of(model)[0]:
        raise ModelError(
            "Smoothing is enabled on this model already. Call fs_plugins.disable(model) first to change it."
        )
    if not isinstance(model, nn.Module):
        raise ModelError(f"enable takes a torch.nn.Module, got {type(model).__name__}.")
    draws = Draws(n0, noise, noise_scope, seed, chunk_size)
    name, chosen = choose(model, psm=psm, sigma=sigma, draws=draws, processor=processor, adapter=adapter)
    observer = _notify if plugin_manager().hook.fs_after_smoothing.get_hookimpls() else None
    hooks = [SmoothingHook(smoother, name, observer, place) for place, smoother in enumerate(chosen)]
    calls = [smoother.call for smoother in chosen]
    detach(model)  # what disabling an inner model may have left on its wrapper
    attach(hooks, model, [name for call in calls for name in call.inputs or (call.pixels.argument,)])
    recompile(patched(model))
    return SmoothingHandle(model)


def disable(model: nn.Module) -> None:
    """Undo ``enable``: the model computes bit for bit what it computed before.

    Raises:
        ModelError: smoothing is not enabled on this model.
    """
    if not hooks_of(model)[0]:
        raise ModelError("Smoothing is not enabled on this model, so there is nothing to disable.")
    modules = patched(model)
    detach(model)
    recompile(modules)


def status(model: nn.Module) -> Status:
    """Whether the model is smoothed, how, and how often it has been: a proof of life.

    A model that was called with pixels while no vision call was smoothed raises an FSPluginsWarning.
    """
    hooks, witnesses = hooks_of(model)
    if not hooks:
        return Status(enabled=False)
    model_calls = sum(witness.calls for witness in witnesses)
    problems = []
    # Fewer smoothed calls than model calls are no sign: CoCa's generate hands its cached features back with the pixels.
    if model_calls and not any(hook.calls for hook in hooks):
        problems.append(
            f"the model was called with pixels {model_calls} times and its vision encoder was never smoothed; "
            "the encoder was replaced or is bypassed. Disable and enable again"
        )
    problems += [f"{hook.non_finite} draws were not finite" for hook in hooks if hook.non_finite]
    for problem in problems:
        warn(problem)
    return Status(True, tuple(map(vision_status, hooks)), model_calls, tuple(problems))


def smoothers(
    model: Smoothable,
    *,
    psm: PSMChoice | Sequence[PSMChoice] = "auto",
    sigma: float | None = None,
    n0: int = 4,
    noise: Noise = "antithetic",
    noise_scope: NoiseScope = "call",
    seed: int | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    processor: Any = None,
    adapter: str | None = None,
) -> tuple[FeatureSmoother, ...]:
    """The pipelines that ``enable`` would put around the model's vision encoders, one each; the model is not touched.

    For attacking, measuring and looking: a FeatureSmoother smooths images by itself (``smooth``, ``look``) and says
    what was chosen (``psm``, ``sigma``).

    Args:
        model: any model an adapter claims, in eval mode, whether or not smoothing is enabled on it; or a VisionCall.
        psm, sigma, n0, noise, noise_scope, seed, chunk_size, processor, adapter: as for ``enable``.

    Raises:
        ModelError, SettingError, PSMError, RegistryError, PluginError: as for ``enable``.
    """
    draws = Draws(n0, noise, noise_scope, seed, chunk_size)
    return tuple(choose(model, psm=psm, sigma=sigma, draws=draws, processor=processor, adapter=adapter)[1])


def vision_call(
    model: nn.Module, *, processor: Any = None, adapter: str | None = None, encoder: int | None = None
) -> VisionCall:
    """Where this model looks at images, by the adapter that claims it.

    Args:
        processor, adapter: as for ``enable``.
        encoder: which place, from 0, of a model that has several (Video-LLaVA: images, then video).

    Raises:
        ModelError: no adapter, or several, claim the model; it has several vision encoders and ``encoder`` is left out.
        SettingError: there is no such encoder, or a processor that is not for it.
    """
    calls = claim(model, adapter, processor)[1]
    if encoder is None and len(calls) > 1:
        kinds = ", ".join(f"{i}: {type(call.module).__name__}" for i, call in enumerate(calls))
        raise ModelError(f"This model has {len(calls)} vision encoders ({kinds}). Say which with encoder=0, say.")
    call = numbered(calls, 0 if encoder is None else encoder)
    return call if processor is None else call.with_processor(processor)


def certify(
    model: Smoothable | FeatureSmoother,
    images: Picture | Iterable[Picture] | Mapping[str, Picture],
    *,
    n: int = 1000,
    alpha: float = 1e-3,
    method: str = "best",
    angular: bool = True,
    target: float | None = None,
    threshold: float = 0.5,
    psm: PSMChoice = "auto",
    sigma: float | None = None,
    seed: int | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    out: str | os.PathLike[str] | None = None,
    processor: Any = None,
    adapter: str | None = None,
    encoder: int = 0,
    background: Iterable[Picture] | None = None,
    advance: Callable[[int], None] | None = None,
) -> list[Certificate]:
    """Prove how far the smoothed feature of each image can turn within an l2 ball around it.

    Certifies the road image -> noise -> purifier -> encoder -> mapper of one vision encoder, against the plain
    encoder's feature of the clean image. Whether smoothing is enabled on the model plays no part.

    Args:
        model: any model an adapter claims; a VisionCall; or a FeatureSmoother, which says psm and sigma itself.
        images: (B, 3, H, W) floats in [0, 1] at the resolution the encoder sees, as a tensor or a numpy array; a PIL
            image; a list of PIL images or of (3, H, W); or names -> such.
        n: i.i.d. draws per image; 1,000 as in the paper, 10,000 certifies about half as far again.
        alpha: each certificate may be wrong with this probability over its draws.
        method: ``"best"``, ``"distribution"``, ``"mean"`` or the paper's estimate ``"plugin"`` (see Certificate).
        angular: refine the inner product to a cosine, at the price of a short pilot sample.
        target: an l2 radius at which sampling stops early, or as soon as it is out of reach.
        threshold: the cosine that ``target`` speaks of.
        psm, sigma, processor, adapter: as for ``enable``, but that mean and std must be known.
        seed: reproducible draws; without it the entropy is the operating system's.
        chunk_size: draws per forward of the encoder; bounds memory, never the result.
        out: a JSON-lines file that gets a row as each image is finished. A run that was interrupted goes on from it
            and gives the same certificates.
        encoder: which vision encoder of a model that has several.
        background: images for ``Certificate.unrelated``; the certified ones if left out.
        advance: called with the number of draws as they are made, or as they are found in ``out``, for progress bars.

    Returns:
        a certificate for each image, in order.

    Raises:
        SettingError: a value out of range, images of another size or range, a file of another run, or nobody knows how
            the model's pixels are normalised.
        ModelError: no adapter claims the model, it is in training mode, or an image has no feature.
        PSMError, RegistryError, PluginError: see their docstrings.
    """
    plan = Plan(n=n, alpha=alpha, method=method, angular=angular, target=target, threshold=threshold)
    smoother = _pipeline(model, psm, sigma, processor, adapter, encoder)
    return certify_features(
        smoother,
        named(images),
        plan,
        background=None if background is None else list(named(background).values()),
        encoder=encoder,
        seed=seed,
        rows=chunk_size,
        out=out,
        advance=advance,
    )


def certify_predictions(
    model: Smoothable | FeatureSmoother,
    images: Picture | Iterable[Picture] | Mapping[str, Picture],
    directions: Directions = None,
    *,
    n: int = 1000,
    alpha: float = 1e-3,
    target: float | None = None,
    psm: PSMChoice = "auto",
    sigma: float | None = None,
    seed: int | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    out: str | os.PathLike[str] | None = None,
    processor: Any = None,
    adapter: str | None = None,
    encoder: int = 0,
    advance: Callable[[int], None] | None = None,
) -> list[PredictionCertificate]:
    """Prove how far each image can move in l2 before a classifier's answer may change.

    Args:
        directions: what the classifier decides by. Left out, the model's own head: image classifiers of transformers
            and timm have one. (K, E), a row a class, or names -> (E,): text embeddings for zero-shot CLIP, or the
            weight of a linear head without bias on the encoder's embedded feature. An ``nn.Linear`` on that feature,
            as the encoder gives it and not at unit length: with a bias, only the vote is certified.
        target: an l2 radius at which sampling stops early, or as soon as it is out of reach.
        model, images, n, alpha, psm, sigma, seed, chunk_size, out, processor, adapter, encoder, advance: as for
            ``certify``.

    Returns:
        a certificate for each image, in order; its ``radius`` is None where it abstains.

    Raises:
        SettingError: a value out of range, images of another size or range, fewer than two directions, equal ones, or
            some of another width than the feature; a file of another run.
        ModelError: also if no directions are given and the model has no head of its own.
        ModelError, PSMError, RegistryError, PluginError: as for ``certify``.
    """
    plan = Plan(n=n, alpha=alpha, target=target)
    smoother = _pipeline(model, psm, sigma, processor, adapter, encoder)
    return certify_labels(
        smoother,
        named(images),
        directions,
        plan,
        encoder=encoder,
        seed=seed,
        rows=chunk_size,
        out=out,
        advance=advance,
    )


def _pipeline(
    model: Smoothable | FeatureSmoother,
    psm: PSMChoice,
    sigma: float | None,
    processor: Any,
    adapter: str | None,
    encoder: int,
) -> FeatureSmoother:
    """What is to be certified."""
    if not isinstance(model, FeatureSmoother):
        return choose(model, psm=psm, sigma=sigma, processor=processor, adapter=adapter, encoder=encoder, certain=True)[
            1
        ][0]
    if psm != "auto" or sigma is not None or processor is not None:
        raise SettingError(
            "A FeatureSmoother has its own PSM, sigma and pixel space; leave psm, sigma and processor out."
        )
    return model


def _notify(event: SmoothingEvent) -> None:
    plugin_manager().hook.fs_after_smoothing(event=event)
