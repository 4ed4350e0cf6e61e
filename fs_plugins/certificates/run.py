"""From named images to certificates, with a row in a file for each image that is finished."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from fs_plugins import checks
from fs_plugins.certificates.certificate import Certificate
from fs_plugins.certificates.certifiers import Certifier, Directions, Features, Labels
from fs_plugins.certificates.ledger import Ledger
from fs_plugins.certificates.plan import Plan
from fs_plugins.certificates.prediction import PredictionCertificate
from fs_plugins.certificates.sampling import unheard
from fs_plugins.certificates.values import FRESH, C
from fs_plugins.choice import check_pixels
from fs_plugins.errors import SettingError
from fs_plugins.files import locked_file
from fs_plugins.identity import digest, fingerprint, is_readable
from fs_plugins.pictures import channels_first, check_unit
from fs_plugins.smoothing import FeatureSmoother


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
    for i, image in enumerate(background or ()):
        _check_image(f"{i} of the background", image, smoother)
    features = Features(smoother, plan, list(images.values()) if background is None else background)
    with nullcontext() if out is None else locked_file(Path(out), "these certificates"):
        return certify_named(features, images, encoder=encoder, seed=seed, rows=rows, out=out, advance=advance)


def certify_labels(
    smoother: FeatureSmoother,
    images: Mapping[str, Tensor],
    directions: Directions,
    plan: Plan,
    *,
    encoder: int = 0,
    seed: int | None = None,
    rows: int = 32,
    out: str | os.PathLike[str] | None = None,
    advance: Callable[[int], None] | None = None,
) -> list[PredictionCertificate]:
    """A certificate of each image's label, in order: ``certify_predictions`` once it is known what is certified.

    Args:
        smoother, images, plan, encoder, seed, rows, out, advance: as for ``certify_features``.
        directions: as for ``fs_plugins.certify_predictions``.

    Raises:
        SettingError, ModelError: as for ``fs_plugins.certify_predictions``.
    """
    labels = Labels.among(smoother, plan, directions)
    with nullcontext() if out is None else locked_file(Path(out), "these certificates"):
        return certify_named(labels, images, encoder=encoder, seed=seed, rows=rows, out=out, advance=advance)


def certify_named(
    certifier: Certifier[C],
    images: Mapping[str, Tensor],
    *,
    encoder: int = 0,
    seed: int | None = None,
    rows: int = 32,
    out: str | os.PathLike[str] | None = None,
    advance: Callable[[int], None] | None = None,
) -> list[C]:
    """The certificates of each image, in order, kept in the file ``out``, which no other run may have, and taken from
    it.

    Args:
        certifier: ``Features``, ``Labels`` or ``Replies``.
        images, encoder, seed, rows, out, advance: as for ``certify_features``.

    Raises:
        SettingError, ModelError: as for ``fs_plugins.certify``.
    """
    call, told = certifier.smoother.call, advance or unheard
    seed = None if seed is None else checks.seed(seed)
    rows = checks.whole("chunk_size (draws per forward)", rows)
    check(certifier.smoother, images)
    identity = fingerprint(call.module) if is_readable(call.module) else None  # not if offloaded or quantised
    seeded = FRESH if seed is None else f"seed {seed}"
    ledger = None if out is None else ledger_of(certifier, out, encoder=encoder, seed=seed)
    key = _key(seed) if ledger is None else ledger.key
    certificates: list[C] = []
    for name, image in images.items():
        names = certifier.rows(name)
        there = {} if ledger is None else {row: one for row in names if (one := ledger.kept(row, image)) is not None}
        if len(there) == len(names):
            told(max(one.n for one in there.values()))
        else:
            here = call.beside(image)
            drawn = certifier(here, key=key, rows=rows, advance=told, encoder=identity, seed=seeded)
            fresh = dict(zip(names, drawn, strict=True))
            if ledger is not None:
                for row in [row for row in names if row not in there]:
                    ledger.add(row, image, fresh[row])
            there = {**fresh, **there}
        certificates += [there[row] for row in names]
    return certificates


def ledger_of(
    certifier: Certifier[C], out: str | os.PathLike[str], *, encoder: int = 0, seed: int | None = None
) -> Ledger[C]:
    """The file of this run's certificates, begun or gone on with. Reads every weight, which takes a while.

    Raises:
        SettingError: it is of another run, damaged, or no such file.
    """
    call, psm = certifier.smoother.call, certifier.smoother.psm
    seed = None if seed is None else checks.seed(seed)
    settings = {
        **asdict(certifier.plan),
        "encoder": (checks.whole("encoder", encoder, least=0), call.architecture, digest(*call.modules)),
        **certifier.settings,
        "sigma": certifier.smoother.sigma,
        "seed": seed,
        "psm": (psm.config.name, digest(psm), psm.config.structure) if psm else None,
        "readouts": [readout.name for readout in call.readouts],
        "pixels": (call.pixels.mean, call.pixels.std),
    }
    return Ledger(out, certifier.kind, settings, _key(seed))


def check(smoother: FeatureSmoother, images: Mapping[str, Tensor]) -> None:
    """Refuse, before a draw, what cannot be certified.

    Raises:
        ModelError: the encoder or the PSM is in training mode.
        SettingError: sigma is 0, nobody knows how pixels are normalised, or an image of another size or range.
    """
    check_pixels([smoother.call], certain=True)
    smoother.check_eval()
    if smoother.sigma <= 0:
        raise SettingError("sigma must be > 0 to certify (0.25 is usual): without noise nothing can be certified.")
    for name, image in images.items():
        _check_image(name, image, smoother)


def _check_image(name: str, image: Tensor, smoother: FeatureSmoother) -> None:
    size = smoother.call.image_size
    channels = len(smoother.call.pixels.mean)
    if image.ndim != 3 or len(image) != channels or size not in (None, tuple(image.shape[-2:])):
        wanted = f"({channels}, {size[0]}, {size[1]})" if size else f"({channels}, H, W)"
        raise SettingError(
            f"Image {name} must be {wanted} at the resolution the encoder sees, got {tuple(image.shape)}."
            f"{channels_first(image.shape)}"
        )
    check_unit(f"Image {name}", image)
    if wrong := smoother.unfit(image[None]):
        raise SettingError(wrong)


def _key(seed: int | None) -> bytes:
    """That the draws follow from."""
    return secrets.token_bytes(32) if seed is None else f"certificate seed {seed}".encode()
