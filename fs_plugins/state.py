"""What ``status`` answers, as values."""

from __future__ import annotations

from dataclasses import dataclass

from fs_plugins.noise import Noise, NoiseScope
from fs_plugins.patch import SmoothingHook


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
    tested: bool = True


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
                f"fs_plugins: enabled on {v.encoder} through {v.adapter}" + ("" if v.tested else ", untested family"),
                f"  PSM       {psm}; purifier {v.purifier or 'none'}",
                f"  noise     sigma {v.sigma:g} in [0, 1] pixels, n0 {v.n0}, {v.noise}, fresh per {v.noise_scope}",
                f"  pixels    mean and std: {v.pixels}; images {v.image_size}",
                f"  features  {features}",
                f"  so far    {v.calls} smoothed calls, {v.images} images, {v.draws} draws, "
                f"{v.non_finite} not finite, {v.seconds:.2f} s",
            ]
        return "\n".join(lines + [f"  warning   {warning}" for warning in self.warnings])


def vision_status(hook: SmoothingHook) -> VisionStatus:
    """One encoder's status, from its hook."""
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
        tested=smoother.call.tested,
    )
