"""From images to certificates: how many draws, when to stop early, what is written down about each."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fs_plugins.certificates.bounds import margin_scores, pilot_threshold
from fs_plugins.certificates.certificate import (
    FRESH,
    Angular,
    AnyCertificate,
    Certificate,
    Method,
    PredictionCertificate,
    check_settings,
    from_json,
)
from fs_plugins.certificates.sampling import Sampler
from fs_plugins.errors import ModelError, SettingError
from fs_plugins.identity import digest, fingerprint, is_readable
from fs_plugins.smoothing import FeatureSmoother
from fs_plugins.vision import VisionCall

T = TypeVar("T")

LOOKS = (0.125, 0.25, 0.5, 1.0)
"""With a target radius: after which parts of n the certificate is looked at, each at an equal share of alpha."""


@dataclass(frozen=True)
class Plan:
    """How one image is certified.

    Args:
        n: draws at most.
        alpha: the probability that a certificate may be wrong.
        method: see Certificate.
        angular: whether to refine the inner product to a cosine; costs a pilot of n / 10 draws, at most 100.
        target: an l2 radius for ``threshold``. Sampling stops as soon as it is certified, or as soon as not even
            scores of 1 from then on could certify it. Fixed looks share alpha, so what is certified holds.
        threshold: the cosine that ``target`` speaks of.

    Raises:
        SettingError: a value out of range.
    """

    n: int = 1000
    alpha: float = 1e-3
    method: Method = "best"
    angular: bool = True
    target: float | None = None
    threshold: float = 0.5

    def __post_init__(self) -> None:
        check_settings(alpha=self.alpha, method=self.method)
        if not 0 <= self.threshold <= 1:
            raise SettingError(f"threshold is a cosine in [0, 1] (0.5 is usual), got {self.threshold!r}.")
        if isinstance(self.n, bool) or not isinstance(self.n, int) or self.n < 1:
            raise SettingError(f"n (draws per image) must be a whole number >= 1, got {self.n!r}.")
        if self.target is not None and not 0 < self.target < math.inf:
            raise SettingError(f"target must be an l2 radius > 0 in [0, 1] pixels, got {self.target!r}.")

    @property
    def pilot(self) -> int:
        """Draws that choose the angular threshold."""
        return pilot_size(self.n) if self.angular and self.method != "plugin" else 0

    @property
    def looks(self) -> tuple[int, ...]:
        """After how many draws the certificate is looked at."""
        if self.target is None:
            return (self.n,)
        return tuple(sorted({max(1, math.ceil(part * self.n)) for part in LOOKS}))


def pilot_size(n: int) -> int:
    """How many draws choose settings for n others."""
    return min(100, max(10, n // 10))


def certify_image(
    smoother: FeatureSmoother,
    image: Tensor,
    plan: Plan,
    *,
    key: bytes,
    rows: int = 32,
    advance: Callable[[int], None] = lambda draws: None,
    **details: Any,
) -> Certificate:
    """One image's certificate.

    Args:
        smoother: what is certified; sigma must be positive.
        image: (C, H, W) in [0, 1] at the resolution the encoder sees.
        plan: see Plan.
        key: the draws follow from it and from the image.
        rows: draws per forward of the encoder.
        advance: told of draws as they are made.
        details: further fields of the certificate.

    Raises:
        SettingError: sigma is 0.
        ModelError: the clean image has no feature to certify.
    """
    sampler = Sampler(smoother, image, key=key, rows=rows, advance=advance)
    if plan.pilot:
        delta = (plan.target or smoother.sigma) / smoother.sigma
        sampler.t0 = pilot_threshold(sampler.pilot(plan.pilot), n=plan.n, delta=delta)
    share = 1 / len(plan.looks)
    described = {**_described(smoother, image), **details}

    def certificate(scores: Any, angular: Angular | None) -> Certificate:
        return Certificate.from_scores(
            scores,
            sigma=smoother.sigma,
            alpha=plan.alpha,
            method=plan.method,
            angular=angular,
            share=share,
            non_finite=sampler.non_finite,
            **described,
        )

    def now() -> Certificate:
        return certificate(sampler.scores, sampler.angular)

    def at_best(left: int) -> Certificate:
        angular = sampler.angular
        if angular is not None:
            # Draws that are the reference itself would cancel none of the orthogonal part, but thin it out.
            angular = replace(angular, count=angular.count + left, norm=angular.norm * angular.n / plan.n, n=plan.n)
        return certificate(np.concatenate([sampler.scores, np.ones(left)]), angular)

    def reached(found: Certificate) -> bool:
        radius = found.radius(plan.threshold)
        return radius is not None and plan.target is not None and radius >= plan.target

    return _draw(sampler, plan, now, at_best, reached)


def certify_prediction(
    smoother: FeatureSmoother,
    image: Tensor,
    directions: Tensor,
    plan: Plan,
    *,
    key: bytes,
    labels: Sequence[str] | None = None,
    rows: int = 32,
    advance: Callable[[int], None] = lambda draws: None,
    **details: Any,
) -> PredictionCertificate:
    """One image's prediction certificate: the class is chosen on pilot draws, the radii come from others.

    Args:
        directions: (K, E), a row a class: text embeddings, or a linear head's weight.
        labels: the K classes' names.
        smoother, image, plan, key, rows, advance, details: as for ``certify_image``; of the plan, n, alpha and target count.

    Raises:
        SettingError: directions of another width, fewer than two, or two that are equal.
        ModelError: the clean image has no feature to certify.
    """
    sampler = Sampler(smoother, image, key=key, rows=rows, directions=directions, advance=advance)
    predicted = sampler.favourite(pilot_size(plan.n))
    rays = directions.detach().double().cpu().numpy()
    described = {**_described(smoother, image), "label": labels[predicted] if labels else None, **details}
    share = 1 / len(plan.looks)

    def certificate(left: int) -> PredictionCertificate:
        """With ``left`` further draws that all are as good as can be."""
        products = sampler.products
        finite = ~np.isnan(products[:, 0])
        margins = margin_scores(np.where(finite[:, None], products, 0.0), rays, predicted)
        margins[~finite] = -1.0
        return PredictionCertificate.from_draws(
            int((products[finite].argmax(axis=1) == predicted).sum()) + left,
            np.concatenate([margins, np.ones((left, margins.shape[1]))]),
            predicted=predicted,
            sigma=smoother.sigma,
            alpha=plan.alpha,
            share=share,
            non_finite=sampler.non_finite,
            **described,
        )

    def reached(found: PredictionCertificate) -> bool:
        return found.radius is not None and plan.target is not None and found.radius >= plan.target

    return _draw(sampler, plan, lambda: certificate(0), certificate, reached)


def _described(smoother: FeatureSmoother, image: Tensor) -> dict[str, Any]:
    return {
        "image_shape": tuple(image.shape),
        "readouts": tuple(readout.name for readout in smoother.call.readouts),
        "psm": smoother.psm.config.name if smoother.psm else None,
    }


def _draw(
    sampler: Sampler, plan: Plan, now: Callable[[], T], at_best: Callable[[int], T], reached: Callable[[T], bool]
) -> T:
    """Draw until the plan's last look, or until a look finds its target reached or out of reach.

    Args:
        now: the certificate from the draws so far.
        at_best: what so many further draws, as good as can be, would make of it.
        reached: whether a certificate reaches the target.
    """
    for look in plan.looks:
        sampler.extend(look - len(sampler.scores))
        certificate = now()
        if plan.target is None or reached(certificate) or not reached(at_best(plan.n - look)):
            break
    return certificate


def encoder_of(smoother: FeatureSmoother) -> tuple[float, ...] | None:
    """The encoder's fingerprint, None where its weights cannot be read (offloaded, quantised)."""
    module = smoother.call.module
    return fingerprint(module) if is_readable(module) else None


def unrelated(smoother: FeatureSmoother, images: Sequence[Tensor], most: int = 32) -> float | None:
    """Mean cosine between the plain features of different images, (C, H, W) in [0, 1], of the first one's size.

    None where there are fewer than two.
    """
    alike: list[Tensor] = []
    for image in images:
        if image.shape == images[0].shape and not any(torch.equal(image, other) for other in alike):
            alike.append(image)
        if len(alike) == most:
            break
    if len(alike) < 2:
        return None
    call = smoother.call
    with torch.no_grad():
        features = torch.cat([call.embed(call.encode(image[None])) for image in alike]).double()
    units = torch.nn.functional.normalize(features, dim=-1)
    cosines = units @ units.T
    return float((cosines.sum() - cosines.trace()) / (len(alike) * (len(alike) - 1)))


def certify_features(
    smoother: FeatureSmoother,
    images: Mapping[str, Tensor],
    plan: Plan,
    *,
    background: Sequence[Tensor] | None = None,
    encoder: int = 0,
    seed: int | None = None,
    rows: int = 32,
    out: str | os.PathLike[str] | None = None,
    advance: Callable[[int], None] | None = None,
) -> list[Certificate]:
    """A certificate of each image's feature, in order: ``fs_plugins.certify`` once it is known what is certified.

    Args:
        smoother: vision call, PSM and sigma. Its n0 and its noise play no part.
        images: names -> (C, H, W) in [0, 1] at the resolution the encoder sees.
        encoder: the number of the vision call in its model, for the file's settings.
        background, seed, out, advance: as for ``fs_plugins.certify``; ``rows`` is its ``chunk_size``.

    Raises:
        SettingError, ModelError: as for ``fs_plugins.certify``.
    """
    check(smoother, images)
    told = advance or _unheard
    among = list(images.values()) if background is None else background
    apart = unrelated(smoother, [_beside(image, smoother.call) for image in among])

    def one(image: Tensor, **details: Any) -> Certificate:
        return certify_image(smoother, image, plan, rows=rows, advance=told, unrelated=apart, **details)

    return _each(smoother, images, one, {**asdict(plan), "encoder": encoder}, seed, out, told)


def certify_labels(
    smoother: FeatureSmoother,
    images: Mapping[str, Tensor],
    directions: Tensor | Mapping[str, Tensor],
    plan: Plan,
    *,
    encoder: int = 0,
    seed: int | None = None,
    rows: int = 32,
    out: str | os.PathLike[str] | None = None,
    advance: Callable[[int], None] | None = None,
) -> list[PredictionCertificate]:
    """A certificate of each image's label, in order: ``fs_plugins.certify_predictions`` once it is known what is certified.

    Raises:
        SettingError, ModelError: as for ``fs_plugins.certify_predictions``.
    """
    labels = [str(name) for name in directions] if isinstance(directions, Mapping) else None
    given = list(directions.values() if isinstance(directions, Mapping) else directions)
    shapes = {tuple(torch.as_tensor(row).shape) for row in given}
    if len(given) < 2 or len(shapes) > 1 or len(*shapes) != 1:
        raise SettingError(
            f"directions must be (K, E), a row for each of K >= 2 classes; got {len(given)} of {shapes or 'none'}."
        )
    matrix = torch.stack([torch.as_tensor(row) for row in given])
    if not matrix.isfinite().all() or len(matrix.unique(dim=0)) < len(matrix):
        raise SettingError("directions has equal or non-finite rows, so that nothing could tell these classes apart.")
    check(smoother, images)
    told = advance or _unheard

    def one(image: Tensor, **details: Any) -> PredictionCertificate:
        return certify_prediction(smoother, image, matrix, plan, labels=labels, rows=rows, advance=told, **details)

    exact = hashlib.sha256(matrix.detach().double().cpu().numpy().tobytes()).hexdigest()
    settings = {**asdict(plan), "encoder": encoder, "directions": exact, "labels": labels}
    return _each(smoother, images, one, settings, seed, out, told)


def check(smoother: FeatureSmoother, images: Mapping[str, Tensor]) -> None:
    """Refuse, before a draw, what cannot be certified.

    Raises:
        ModelError: the encoder is in training mode.
        SettingError: sigma is 0, or an image of another size or range.
    """
    if any(part.training for part in smoother.call.module.modules()):
        raise ModelError(
            "The vision encoder is in training mode, where its features are random. Call model.eval() first."
        )
    if smoother.sigma <= 0:
        raise SettingError("sigma must be > 0 to certify (0.25 is usual): without noise nothing can be certified.")
    for name, image in images.items():
        _check_image(name, image, smoother)


def _unheard(draws: int) -> None:
    """Nobody watches the progress."""


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
            "encoder": (settings["encoder"], call.architecture, digest(*call.modules)),
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


class Ledger:
    """A JSON-lines file with one flushed row per finished image, so that an interrupted run goes on where it stopped.

    The first row holds the settings and the key of the draws; a file of other settings is refused, as is a row of another
    image by the same name. A row cut off in the middle of writing is dropped.

    Raises:
        SettingError: the file exists and is of another run, or is no ledger.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any], key: bytes) -> None:
        self.path = Path(path)
        self.key = key
        self._done: dict[str, tuple[str, AnyCertificate]] = {}
        wanted = json.loads(json.dumps(dict(settings), default=dict))
        text = self.path.read_text() if self.path.exists() else ""
        whole, _, cut = text.rpartition("\n")  # what follows the last line break was never finished
        if not whole:
            if not '{"settings": '.startswith(cut[:13]):
                raise SettingError(f"{self.path} is not a file of certificates that certify wrote.")
            self._replace(json.dumps({"settings": wanted, "key": key.hex()}) + "\n")
            return
        try:
            head, *rows = map(json.loads, whole.split("\n"))
            self.key = bytes.fromhex(head["key"])
            found = head["settings"]
            for row in rows:
                certificate = from_json(json.dumps(row["certificate"]))
                self._done[row["image"]] = (row["sha256"], certificate)
        except (ValueError, KeyError, TypeError) as error:
            raise SettingError(f"{self.path} is not a file of certificates that certify wrote: {error}") from None
        if found != wanted:
            changed = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
            raise SettingError(
                f"{self.path} was written with other settings ({', '.join(changed)}). Give another file, or the same settings."
            )
        if cut:
            self._replace(whole + "\n")

    def kept(self, name: str, image: Tensor) -> AnyCertificate | None:
        """The finished certificate of this image, None if there is none.

        Raises:
            SettingError: there is one by this name, of another image.
        """
        if name not in self._done:
            return None
        digest, certificate = self._done[name]
        if digest != _digest(image):
            raise SettingError(f"{self.path} has a row for another image called {name}. Give another file.")
        return certificate

    def add(self, name: str, image: Tensor, certificate: AnyCertificate) -> None:
        """Write a finished row, on disk when this returns."""
        digest = _digest(image)
        row = {"image": name, "sha256": digest, "certificate": json.loads(certificate.to_json())}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._done[name] = (digest, certificate)

    def _replace(self, text: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_name(f".{self.path.name}")
        fresh.write_text(text)
        os.replace(fresh, self.path)


def _digest(image: Tensor) -> str:
    return hashlib.sha256(image.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()


def merge(parts: Sequence[Path], into: Path, order: Sequence[str]) -> dict[str, AnyCertificate]:
    """Rows that several processes wrote -> one ledger in the order of the images; the parts are removed.

    Raises:
        SettingError: a part is missing rows, is of another run, or is no ledger.
    """
    headers: list[str] = []
    rows: dict[str, str] = {}
    for part in parts:
        head, *lines = part.read_text().splitlines()
        headers.append(head)
        rows |= {json.loads(line)["image"]: line for line in lines}
    if len(set(headers)) > 1:
        raise SettingError(
            f"{', '.join(map(str, parts))} were written with different settings; remove them and run again."
        )
    missing = [name for name in order if name not in rows]
    if missing:
        raise SettingError(f"No process certified {', '.join(missing[:5])}; run the same command again.")
    fresh = into.with_name(f".{into.name}")
    others = [name for name in rows if name not in set(order)]  # of an earlier run of more images
    fresh.write_text("\n".join([headers[0], *(rows[name] for name in [*order, *others])]) + "\n")
    os.replace(fresh, into)
    for part in parts:
        part.unlink()
    return {name: from_json(json.dumps(json.loads(rows[name])["certificate"])) for name in order}
