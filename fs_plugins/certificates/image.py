"""One image's certificate: draws are made until the plan's last look, or until a look settles it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fs_plugins.certificates.angular import Angular
from fs_plugins.certificates.bounds import margin_scores, pilot_threshold
from fs_plugins.certificates.certificate import Certificate
from fs_plugins.certificates.plan import Plan, pilot_size
from fs_plugins.certificates.prediction import PredictionCertificate
from fs_plugins.certificates.sampling import Sampler, unheard
from fs_plugins.certificates.values import FRESH, C
from fs_plugins.smoothing import FeatureSmoother


def certify_image(
    smoother: FeatureSmoother,
    image: Tensor,
    plan: Plan,
    *,
    key: bytes,
    rows: int = 32,
    advance: Callable[[int], None] = unheard,
    encoder: tuple[float, ...] | None = None,
    seed: str = FRESH,
    unrelated: float | None = None,
    watch: Callable[[Certificate], object] | None = None,
) -> Certificate:
    """One image's certificate.

    Args:
        smoother: what is certified; sigma must be positive.
        image: (C, H, W) in [0, 1] at the resolution the encoder sees.
        plan: see Plan.
        key: the draws follow from it and from the image.
        rows: draws per forward of the encoder.
        advance: told of draws as they are made.
        encoder, seed, unrelated: fields of the certificate.
        watch: shown what the draws so far would certify if the plan had ended there, after each forward of the encoder.
            Whoever picks one of these, or stops at one, has no certificate: only what is returned is one.

    Raises:
        SettingError: sigma is 0.
        ModelError: the clean image has no feature to certify.
    """
    sampler = Sampler(smoother, image, key=key, rows=rows, advance=advance)
    if plan.pilot:
        delta = (plan.target or smoother.sigma) / smoother.sigma
        sampler.t0 = pilot_threshold(sampler.pilot(plan.pilot), n=plan.n, delta=delta)

    def certificate(left: int) -> Certificate:
        return Certificate.from_scores(
            np.concatenate([sampler.scores, np.ones(left)]),
            sigma=smoother.sigma,
            alpha=plan.alpha,
            method=plan.method,
            angular=_at_best(sampler.angular, left),
            share=plan.share,
            non_finite=sampler.non_finite,
            encoder=encoder,
            seed=seed,
            unrelated=unrelated,
            **_about(smoother, image),
        )

    if watch is not None:
        for _ in range(0, plan.looks[0], rows):
            sampler.extend(min(rows, plan.looks[0] - len(sampler.scores)))
            watch(certificate(0))
    return _draw(sampler, plan, certificate, lambda found: found.radius(plan.threshold))


def certify_prediction(
    smoother: FeatureSmoother,
    image: Tensor,
    directions: Tensor,
    plan: Plan,
    *,
    key: bytes,
    bias: Tensor | None = None,
    labels: Sequence[str] | None = None,
    rows: int = 32,
    advance: Callable[[int], None] = unheard,
    encoder: tuple[float, ...] | None = None,
    seed: str = FRESH,
) -> PredictionCertificate:
    """One image's prediction certificate: the class is chosen on pilot draws, the radii come from others.

    Args:
        directions: (K, E), a row a class: text embeddings, or a linear head's weight.
        bias: (K,), the head's, on features as they are and not at unit length. Then only votes are certified.
        labels: the K classes' names.
        smoother, image, plan, key, rows, advance, encoder, seed: as for ``certify_image``; of the plan, n, alpha and
            target count.

    Raises:
        SettingError: directions of another width, fewer than two, or two that are equal.
        ModelError: the clean image has no feature to certify.
    """
    sampler = Sampler(smoother, image, key=key, rows=rows, directions=directions, bias=bias, advance=advance)
    predicted = sampler.favourite(pilot_size(plan.n))
    rays = directions.detach().double().cpu().numpy()

    def certificate(left: int) -> PredictionCertificate:
        products = sampler.products
        return PredictionCertificate.from_draws(
            _votes(products, predicted) + left,
            _margins(products, rays, predicted, left) if bias is None else None,
            n=len(products) + left,
            predicted=predicted,
            label=labels[predicted] if labels else None,
            sigma=smoother.sigma,
            alpha=plan.alpha,
            share=plan.share,
            non_finite=sampler.non_finite,
            encoder=encoder,
            seed=seed,
            **_about(smoother, image),
        )

    return _draw(sampler, plan, certificate, lambda found: found.radius)


def _votes(products: NDArray[np.float64], predicted: int) -> int:
    """How many draws predict this class; one without a feature, NaN in (n, K) products, votes for nobody."""
    finite = ~np.isnan(products[:, 0])
    return int((products[finite].argmax(axis=1) == predicted).sum())


def _margins(
    products: NDArray[np.float64], rays: NDArray[np.float64], predicted: int, left: int
) -> NDArray[np.float64]:
    """Every draw's margins over the other classes, (n, K - 1), and so many further ones of 1; -1 without a feature.

    Args:
        products: (n, K), NaN for a draw without a feature.
        rays: (K, E), the classes' directions.
    """
    finite = ~np.isnan(products[:, 0])
    margins = margin_scores(np.where(finite[:, None], products, 0.0), rays, predicted)
    margins[~finite] = -1.0
    return np.concatenate([margins, np.ones((left, margins.shape[1]))])


def _at_best(angular: Angular | None, left: int) -> Angular | None:
    """The statistics after ``left`` further draws that are the reference itself.

    They cancel none of the orthogonal part, but thin it out.
    """
    if angular is None or not left:
        return angular
    n = angular.n + left
    return replace(angular, count=angular.count + left, norm=angular.norm * angular.n / n, n=n)


class _About(TypedDict):
    image_shape: tuple[int, ...]
    readouts: tuple[str, ...]
    psm: str | None


def _about(smoother: FeatureSmoother, image: Tensor) -> _About:
    return {
        "image_shape": tuple(image.shape),
        "readouts": tuple(readout.name for readout in smoother.call.readouts),
        "psm": smoother.psm.config.name if smoother.psm else None,
    }


def _draw(sampler: Sampler, plan: Plan, certificate: Callable[[int], C], radius: Callable[[C], float | None]) -> C:
    """Draw until the plan's last look, or until a look finds its target reached or out of reach.

    Args:
        certificate: what the draws so far give, with so many further ones that all are as good as can be.
        radius: of a certificate, that the target speaks of.
    """

    def reaches(found: C, target: float) -> bool:
        return (radius(found) or 0.0) >= target

    for look in plan.looks:
        sampler.extend(look - len(sampler.scores))
        found = certificate(0)
        target = plan.target
        if target is None or reaches(found, target) or not reaches(certificate(plan.n - look), target):
            break
    return found
