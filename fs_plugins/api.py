"""The verbs on a model: enable, disable, status, certify, certify_predictions."""

from __future__ import annotations

import functools
import hashlib
import os
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn

from fs_plugins import registry
from fs_plugins.certificates import Certificate, PredictionCertificate
from fs_plugins.certificates.certificate import FRESH, Method
from fs_plugins.certificates.run import Ledger, Plan, certify_image, certify_prediction, encoder_of, unrelated
from fs_plugins.errors import FSPluginsError, FSPluginsWarning, ModelError, PluginError, PSMError, SettingError
from fs_plugins.hooks import DISABLE, plugin_manager
from fs_plugins.identity import digest, fingerprint, has_adapters, is_readable, same_encoder
from fs_plugins.noise import Noise, NoiseScope
from fs_plugins.patch import SmoothingEvent, SmoothingHook, attach, detach, hooks_of, recompile
from fs_plugins.psm import PSM
from fs_plugins.smoothing import DEFAULT_CHUNK_SIZE, FeatureSmoother, check_sigma
from fs_plugins.vision import PixelSpace, VisionCall

PSMChoice = str | os.PathLike[str] | PSM | None


@dataclass(frozen=True)
class ReadoutStatus:
    """One consumed feature, and whether a mapper refines it."""

    name: str
    mapped: bool


@dataclass(frozen=True)
class VisionStatus:
    """One smoothed vision encoder and what it has done so far."""

    adapter: str
    encoder: str
    psm: str | None
    purifier: str | None
    sigma: float
    n0: int
    noise: Noise
    noise_scope: NoiseScope
    pixels: str
    image_size: str
    readouts: tuple[ReadoutStatus, ...]
    calls: int
    images: int
    draws: int
    non_finite: int
    seconds: float


@dataclass(frozen=True)
class Status:
    """What ``status`` answers; ``str()`` of it is for people.

    ``model_calls`` counts calls of the model that carried pixels; if it is above 0 and no vision encoder
    was smoothed, something goes around the protection, and ``warnings`` says so.
    """

    enabled: bool
    vision: tuple[VisionStatus, ...] = ()
    model_calls: int = 0
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.enabled:
            return "fs_plugins: not enabled on this model."
        lines = []
        for v in self.vision:
            psm = v.psm or "none (plain smoothing)"
            features = ", ".join(r.name + ("" if r.mapped else " (no mapper)") for r in v.readouts)
            lines += [
                f"fs_plugins: enabled on {v.encoder} through {v.adapter}",
                f"  PSM       {psm}; purifier {v.purifier or 'none'}",
                f"  noise     sigma {v.sigma:g} in [0, 1] pixels, n0 {v.n0}, {v.noise}, fresh per {v.noise_scope}",
                f"  pixels    mean and std: {v.pixels}; images {v.image_size}",
                f"  features  {features}",
                f"  so far    {v.calls} smoothed calls, {v.images} images, {v.draws} draws, "
                f"{v.non_finite} not finite, {v.seconds:.2f} s",
            ]
        return "\n".join(lines + [f"  warning   {warning}" for warning in self.warnings])


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
            ``"photo"``, with a warning; ``"photo"``, ``"diffusion"`` or another of the registry's purifiers by name, a PSM,
            its folder or its hub id is used as given (a folder of such a name is ``./photo``); ``None`` is plain smoothing at
            ``sigma``. A list has one for each vision encoder of a model that has several (Video-LLaVA: images, then video).
        sigma: standard deviation of the noise in [0, 1] pixel units at the resolution the encoder sees.
            Left out, the PSM's own. Required with ``psm=None``.
        n0: draws per image. More is steadier and slower.
        noise: ``"antithetic"`` (pairs e, -e) or ``"iid"``.
        noise_scope: ``"call"`` draws afresh at every vision call. ``"image"`` fixes an image's draws by a secret
            key and its content: for callers that recompute the encoder, or repeat its images, within one answer
            (beams and ``use_cache=False`` on older transformers, gradient checkpointing around the encoder).
        seed: reproducible draws, for experiments. An attacker who knows the seed knows the noise.
        chunk_size: rows (draws times images) per forward of the encoder; bounds memory, never the result.
        processor: the model's processor, image processor or a PixelSpace, where mean and std cannot be found.
        adapter: the plugin to use where several claim the model.

    Returns:
        a handle; also a context manager that disables on leaving.

    Raises:
        ModelError: no adapter, or several, claim the model; it is enabled already; it is in training mode.
        SettingError, PSMError, RegistryError, PluginError: see their docstrings.
        Nothing is attached to the model unless everything is in order.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"enable takes a torch.nn.Module, got {type(model).__name__}.")
    if hooks_of(model)[0]:
        raise ModelError(
            "Smoothing is enabled on this model already. Call fs_plugins.disable(model) first to change it."
        )
    name, chosen = _choose(model, psm, sigma, processor, adapter)
    observer = _notify if plugin_manager().hook.fs_after_smoothing.get_hookimpls() else None
    hooks = []
    for place, (call, found, level) in enumerate(chosen):
        smoother = FeatureSmoother(
            call, psm=found, sigma=level, n0=n0, noise=noise, noise_scope=noise_scope, seed=seed, chunk_size=chunk_size
        )
        hooks.append(SmoothingHook(smoother, name, observer, place))
    calls = [call for call, _, _ in chosen]
    detach(model)  # what disabling an inner model may have left on its wrapper
    attach(hooks, model, [name for call in calls for name in call.inputs or (call.pixels.argument,)])
    recompile()
    return SmoothingHandle(model)


def _choose(
    model: nn.Module,
    psm: PSMChoice | Sequence[PSMChoice],
    sigma: float | None,
    processor: Any,
    adapter: str | None,
    only: int | None = None,
) -> tuple[str, list[tuple[VisionCall, PSM | None, float]]]:
    """The claiming adapter, and for each vision encoder, or ``only`` that one, its call, its PSM and sigma."""
    if model.training:
        raise ModelError("The model is in training mode, where its features are random. Call model.eval() first.")
    if sigma is not None:
        check_sigma(sigma)
    name, calls = claim(model, adapter)
    if only is not None:
        if not 0 <= only < len(calls):
            raise SettingError(f"This model has {len(calls)} vision encoders, numbered from 0; there is no {only}.")
        calls = calls[only : only + 1]
    if processor is not None:
        pixels = processor if isinstance(processor, PixelSpace) else PixelSpace.from_processor(processor)
        calls = tuple(call.with_pixels(pixels) for call in calls)
    for call in calls:
        if not call.pixels.source:
            raise SettingError(
                f"Nobody knows how pixels are normalised for this encoder ({call.architecture.get('family')}): there is "
                "no processor beside the checkpoint. Pass processor=<the model's processor or a PixelSpace>."
            )
    inside = set(model.modules())
    for call in calls:
        for part in (call.module, call.grad_scope):
            if part is not None and part not in inside:
                raise PluginError(
                    f"Adapter {name!r} points at a {type(part).__name__} that is no submodule of {type(model).__name__} (kept in "
                    "a list?), so smoothing could not be found again to undo it. Register it as a submodule."
                )
    psms = list(psm) if isinstance(psm, list | tuple) else [psm] * len(calls)
    if len(psms) != len(calls):
        raise SettingError(f"This model has {len(calls)} vision encoders; psm is a list of {len(psms)}.")
    chosen, notices = [], []
    purifier = functools.cache(lambda name: known_encoders().purifier(name, **plugin_parts()))
    for call, choice in zip(calls, psms, strict=True):
        found, said = _find_psm(call, choice, sigma, purifier)
        notices += said
        if found is None and sigma is None:
            raise SettingError("psm=None is plain smoothing and needs a sigma in [0, 1] pixel units; 0.25 is usual.")
        level = sigma if sigma is not None else cast(PSM, found).config.sigma
        if found is not None:
            found.check(call, level)
        chosen.append((call, found, level))
    for notice in dict.fromkeys(notices):  # once for encoders that are alike
        warnings.warn(notice, FSPluginsWarning, stacklevel=3 if only is None else 4)  # from enable; certify's _road
    return name, chosen


def disable(model: nn.Module) -> None:
    """Undo ``enable``: the model computes bit for bit what it computed before.

    Raises:
        ModelError: smoothing is not enabled on this model.
    """
    if not hooks_of(model)[0]:
        raise ModelError("Smoothing is not enabled on this model, so there is nothing to disable.")
    detach(model)
    recompile()


def certify(
    model: nn.Module,
    images: Tensor | Mapping[str, Tensor],
    *,
    n: int = 1000,
    alpha: float = 1e-3,
    method: Method = "best",
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
    background: Sequence[Tensor] | None = None,
    advance: Callable[[int], None] | None = None,
) -> list[Certificate]:
    """Prove how far the smoothed feature of each image can turn within an l2 ball around it.

    Certifies the road image -> noise -> purifier -> encoder -> mapper of one vision encoder, against the plain
    encoder's feature of the clean image. Whether smoothing is enabled on the model plays no part.

    Args:
        model: any model an adapter claims.
        images: (B, 3, H, W) in [0, 1] at the resolution the encoder sees, or names -> (3, H, W).
        n: i.i.d. draws per image; 1,000 as in the paper, 10,000 certifies about half as far again.
        alpha: each certificate may be wrong with this probability over its draws.
        method: ``"best"``, ``"distribution"``, ``"mean"`` or the paper's estimate ``"plugin"`` (see Certificate).
        angular: refine the inner product to a cosine, at the price of a short pilot sample.
        target: an l2 radius at which sampling stops early, or as soon as it is out of reach.
        threshold: the cosine that ``target`` speaks of.
        psm, sigma, processor, adapter: as for ``enable``.
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
        SettingError: a value out of range, images of another size or range, or a file of another run.
        ModelError: no adapter claims the model, it is in training mode, or an image has no feature.
        PSMError, RegistryError, PluginError: see their docstrings.
    """
    plan = Plan(n=n, alpha=alpha, method=method, angular=angular, target=target, threshold=threshold)
    named = images if isinstance(images, Mapping) else {str(i): image for i, image in enumerate(images)}
    smoother = _road(model, named, psm, sigma, processor, adapter, encoder)
    among = list(named.values()) if background is None else background
    apart = unrelated(smoother, [_beside(image, smoother.call) for image in among])

    def one(image: Tensor, **details: Any) -> Certificate:
        return certify_image(
            smoother, image, plan, rows=chunk_size, advance=advance or _unheard, unrelated=apart, **details
        )

    return _each(smoother, named, one, {**asdict(plan), "encoder": encoder}, seed, out, advance or _unheard)


def certify_predictions(
    model: nn.Module,
    images: Tensor | Mapping[str, Tensor],
    directions: Tensor | Mapping[str, Tensor],
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
    """Prove how far each image can move in l2 before a zero-shot or linear classifier's answer may change.

    Args:
        directions: (K, E), a row a class, or names -> (E,): text embeddings for zero-shot CLIP, or the weight of a linear head
            without bias on the encoder's embedded feature.
        target: an l2 radius at which sampling stops early, or as soon as it is out of reach.
        model, images, n, alpha, psm, sigma, seed, chunk_size, out, processor, adapter, encoder, advance: as for ``certify``.

    Returns:
        a certificate for each image, in order; its ``radius`` is None where it abstains.

    Raises:
        SettingError: a value out of range, images of another size or range, fewer than two directions, equal ones, or some of
            another width than the feature; a file of another run.
        ModelError, PSMError, RegistryError, PluginError: as for ``certify``.
    """
    plan = Plan(n=n, alpha=alpha, target=target)
    named = images if isinstance(images, Mapping) else {str(i): image for i, image in enumerate(images)}
    labels = [str(name) for name in directions] if isinstance(directions, Mapping) else None
    rows = list(directions.values() if isinstance(directions, Mapping) else directions)
    shapes = {tuple(torch.as_tensor(row).shape) for row in rows}
    if len(rows) < 2 or len(shapes) > 1 or len(*shapes) != 1:
        raise SettingError(
            f"directions must be (K, E), a row for each of K >= 2 classes; got {len(rows)} of {shapes or 'none'}."
        )
    matrix = torch.stack([torch.as_tensor(row) for row in rows])
    if not matrix.isfinite().all() or len(matrix.unique(dim=0)) < len(matrix):
        raise SettingError("directions has equal or non-finite rows, so that nothing could tell these classes apart.")
    smoother = _road(model, named, psm, sigma, processor, adapter, encoder)

    def one(image: Tensor, **details: Any) -> PredictionCertificate:
        return certify_prediction(
            smoother, image, matrix, plan, labels=labels, rows=chunk_size, advance=advance or _unheard, **details
        )

    exact = hashlib.sha256(matrix.detach().double().cpu().numpy().tobytes()).hexdigest()
    settings = {**asdict(plan), "encoder": encoder, "directions": exact, "labels": labels}
    return _each(smoother, named, one, settings, seed, out, advance or _unheard)


def _unheard(draws: int) -> None:
    """Nobody watches the progress."""


def _road(
    model: nn.Module,
    images: Mapping[str, Tensor],
    psm: PSMChoice,
    sigma: float | None,
    processor: Any,
    adapter: str | None,
    encoder: int,
) -> FeatureSmoother:
    """What is to be certified, after all has been checked that can be without a draw."""
    _, [(call, found, level)] = _choose(model, psm, sigma, processor, adapter, only=encoder)
    smoother = FeatureSmoother(call, psm=found, sigma=level)
    if any(part.training for part in call.module.modules()):
        raise ModelError(
            "The vision encoder is in training mode, where its features are random. Call model.eval() first."
        )
    if level <= 0:
        raise SettingError("sigma must be > 0 to certify (0.25 is usual): without noise nothing can be certified.")
    for name, image in images.items():
        _check_image(name, image, smoother)
    return smoother


def _each(
    smoother: FeatureSmoother,
    images: Mapping[str, Tensor],
    one: Callable[..., Any],
    settings: dict[str, Any],
    seed: int | None,
    out: str | os.PathLike[str] | None,
    advance: Callable[[int], None],
) -> list[Any]:
    """A certificate by ``one`` for each image, kept in the file ``out`` and taken from it."""
    call, psm = smoother.call, smoother.psm
    key = secrets.token_bytes(32) if seed is None else f"certificate seed {seed}".encode()
    identity = encoder_of(smoother)
    ledger = None
    if out is not None:  # reading every weight takes a while
        settings = {
            **settings,
            "sigma": smoother.sigma,
            "seed": seed,
            "psm": (psm.config.name, digest(psm), psm.config.structure) if psm else None,
            "encoder": (settings["encoder"], call.architecture, digest(call.module, *_modules(call.embed))),
            "readouts": [readout.name for readout in call.readouts],
            "pixels": (call.pixels.mean, call.pixels.std),
        }
        ledger = Ledger(out, settings, key)
    certificates = []
    for name, image in images.items():
        certificate = ledger.kept(name, image) if ledger is not None else None
        if certificate is not None:
            advance(certificate.n)
        else:
            certificate = one(
                _beside(image, call),
                key=ledger.key if ledger is not None else key,
                encoder=identity,
                seed=f"seed {seed}" if seed is not None else FRESH,
            )
            if ledger is not None:
                ledger.add(name, image, certificate)
        certificates.append(certificate)
    return certificates


def _modules(embed: Any) -> list[nn.Module]:
    """The modules that an embedding is made of."""
    if isinstance(embed, nn.Module):
        return [embed]
    return [part for part in getattr(embed, "__dict__", {}).values() if isinstance(part, nn.Module)]


def _beside(image: Tensor, call: VisionCall) -> Tensor:
    """The image where the encoder's weights are; where it is, if they are offloaded."""
    device = next((parameter.device for parameter in call.module.parameters()), image.device)
    return image if device.type == "meta" else image.to(device)


def _check_image(name: str, image: Tensor, smoother: FeatureSmoother) -> None:
    size = smoother.call.image_size
    channels = len(smoother.call.pixels.mean)
    if image.ndim != 3 or len(image) != channels or size not in (None, tuple(image.shape[-2:])):
        wanted = f"({channels}, {size[0]}, {size[1]})" if size else f"({channels}, H, W)"
        raise SettingError(
            f"Image {name} must be {wanted} at the resolution the encoder sees, got {tuple(image.shape)}."
        )
    if not (image.is_floating_point() and float(image.min()) >= 0 and float(image.max()) <= 1):
        raise SettingError(
            f"Image {name} must be floating point in [0, 1], before mean/std normalisation; it spans "
            f"[{float(image.min()):.2f}, {float(image.max()):.2f}] in {image.dtype}."
        )
    if wrong := smoother.unfit(image[None]):
        raise SettingError(wrong)


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
        warnings.warn(problem, FSPluginsWarning, stacklevel=2)
    return Status(True, tuple(map(_vision_status, hooks)), model_calls, tuple(problems))


def vision_call(model: nn.Module, *, adapter: str | None = None) -> VisionCall:
    """Where this model looks at images, by the adapter that claims it; the first place where there are several.

    Raises:
        ModelError: no adapter, or several, claim the model.
    """
    return claim(model, adapter)[1][0]


def claim(model: nn.Module, adapter: str | None = None) -> tuple[str, tuple[VisionCall, ...]]:
    """The adapter that claims this model, and its whole answer.

    Raises:
        ModelError: no adapter, or several, claim the model.
        PluginError: the adapter asked for does not exist, fails, or answers nonsense.
    """
    manager = plugin_manager()
    names = [name for name, plugin in manager.list_name_plugin() if plugin is not None]
    if adapter is not None and adapter not in names:
        raise PluginError(f"No plugin is called {adapter!r}; there are {', '.join(names)}.")
    found = claims(model, adapter)
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if not found:
        asked = adapter or ", ".join(sorted(names))
        raise ModelError(
            f"No adapter claims {kind} (asked: {asked}). docs/adapters.md shows how to write one, in about 40 lines."
        )
    if len(found) > 1:
        raise ModelError(
            f"Several adapters claim {kind}: {', '.join(sorted(found))}. Choose with enable(..., adapter=...), or turn "
            f"one off with {DISABLE}=<name>."
        )
    return next(iter(found.items()))


def claims(model: nn.Module, adapter: str | None = None) -> dict[str, tuple[VisionCall, ...]]:
    """Every adapter that claims this model, or the one asked for if it does -> its answer.

    Raises:
        PluginError: an adapter fails, or answers nonsense.
    """
    answers = {
        implementation.plugin_name: _ask(implementation.plugin_name, implementation.function, model)
        for implementation in plugin_manager().hook.fs_vision_call.get_hookimpls()
        if adapter in (None, implementation.plugin_name)
    }
    return {name: answer for name, answer in answers.items() if answer is not None}


def _ask(name: str, claim: Callable[[nn.Module], Any], model: nn.Module) -> tuple[VisionCall, ...] | None:
    """One adapter's answer, as a tuple."""
    try:
        answer = claim(model)
    except FSPluginsError:
        raise
    except Exception as error:
        raise PluginError(
            f"Adapter {name!r} failed on {type(model).__name__}: {type(error).__name__}: {error}. "
            f"Choose another with enable(..., adapter=...), or turn it off with {DISABLE}={name}."
        ) from error
    if answer is None:
        return None
    calls = (answer,) if isinstance(answer, VisionCall) else answer
    if not isinstance(calls, Sequence) or not calls or not all(isinstance(call, VisionCall) for call in calls):
        raise PluginError(f"Adapter {name!r} must answer a VisionCall, several, or None; it answered {answer!r}.")
    return tuple(calls)


def _notify(event: SmoothingEvent) -> None:
    plugin_manager().hook.fs_after_smoothing(event=event)


def _find_psm(
    call: VisionCall, psm: Any, sigma: float | None, purifier: Callable[[str], PSM]
) -> tuple[PSM | None, list[str]]:
    """What a choice means for this encoder, and what its user should know of it.

    Args:
        purifier: how to get one of the registry's purifiers by name.
    """
    notices = []
    if psm is None or isinstance(psm, PSM):
        found = psm
    elif psm == "auto":
        known = known_encoders()
        chosen = known.choose(call, sigma)
        if isinstance(chosen, registry.StandIn):
            found = purifier(chosen.name)
            notices.append(str(chosen))
        else:
            found = known.load(chosen, **plugin_parts())
    elif isinstance(psm, str) and not {"/", os.sep} & set(psm):
        purifiers = known_encoders().purifiers
        if psm not in purifiers and not Path(psm).exists():
            raise PSMError(
                f"No PSM folder at {psm!r}, and the registry has no purifier of that name. It has: {', '.join(purifiers)}."
            )
        found = purifier(psm) if psm in purifiers else PSM.from_pretrained(psm, **plugin_parts())
    elif isinstance(psm, str | os.PathLike):
        found = PSM.from_pretrained(psm, **plugin_parts())
    else:
        raise SettingError(
            'psm must be "auto", None, a PSM, its folder or its hub id, or the name of one of the registry\'s purifiers; '
            f"got {type(psm).__name__}."
        )
    if found is None or not found.config.fingerprint:  # the second serves any encoder
        return found, notices
    if has_adapters(call.module):
        notices.append(
            f"The vision encoder carries LoRA weights; PSM {found.config.name!r} was trained for the weights beneath them."
        )
    if (
        psm != "auto"
        and is_readable(call.module)
        and not same_encoder(found.config.fingerprint, fingerprint(call.module))
    ):
        notices.append(
            f"PSM {found.config.name!r} was trained for {found.config.encoder}, and this encoder's weights are "
            "others. It may still help (FARE and TeCoA encoders use the vanilla one's PSM); measure it."
        )
    return found, notices


def known_encoders() -> registry.Registry:
    """The user's registry, then those of plugins, then the one that ships: the first that has a name wins."""
    plugins = [Path(path) for answer in plugin_manager().hook.fs_registries() for path in answer]
    return registry.Registry([*registry.user_files(), *plugins, registry.shipped_path()])


def plugin_parts() -> dict[str, Any]:
    """Purifiers and mappers that plugins provide, by kind."""
    hook = plugin_manager().hook
    parts: dict[str, Any] = {"purifiers": {}, "mappers": {}}
    answers: tuple[tuple[str, Sequence[dict[str, type[nn.Module]]]], ...] = (
        ("purifiers", hook.fs_purifiers()),
        ("mappers", hook.fs_mappers()),
    )
    for what, given in answers:
        for kinds in given:
            parts[what].update(kinds)
    return parts


def _vision_status(hook: SmoothingHook) -> VisionStatus:
    smoother = hook.smoother
    psm = smoother.psm
    return VisionStatus(
        adapter=hook.adapter,
        encoder=type(smoother.call.module).__name__,
        psm=psm.config.name if psm else None,
        purifier=psm.config.purifier.kind if psm and psm.config.purifier else None,
        sigma=smoother.sigma,
        n0=smoother.n0,
        noise=smoother.noise,
        noise_scope=smoother.source.scope,
        pixels=smoother.call.pixels.source,
        image_size=smoother.call.size_in_words,
        readouts=tuple(
            ReadoutStatus(readout.name, psm is not None and readout.name in psm.mapped)
            for readout in smoother.call.readouts
        ),
        calls=hook.calls,
        images=hook.images,
        draws=hook.draws,
        non_finite=hook.non_finite,
        seconds=hook.seconds,
    )
