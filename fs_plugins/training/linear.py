"""A linear head on a frozen encoder's embedded feature, as linear probes of CLIP are trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fs_plugins.checks import number, whole
from fs_plugins.choice import Smoothable, calls_of
from fs_plugins.errors import SettingError
from fs_plugins.pictures import Picture, named


def train_linear_head(
    model: Smoothable,
    images: Iterable[Picture],
    labels: Sequence[int] | Tensor,
    *,
    penalty: float = 1e-3,
    processor: Any = None,
    adapter: str | None = None,
    encoder: int = 0,
) -> nn.Linear:
    """Multinomial logistic regression of labels on the plain encoder's embedded features: the one optimum there is.

    ``certify_predictions(model, images, head)`` certifies what the head answers.

    Args:
        images: as for ``fs_plugins.certify``, at the resolution the encoder sees.
        labels: (B,) numbers of classes, from 0; their largest is the last class.
        penalty: weight of the weights' squared length, each feature at unit variance, beside the mean cross-entropy.
        model, processor, adapter, encoder: as for ``fs_plugins.certify``.

    Returns:
        a linear layer with a bias, on the embedded feature as it is.

    Raises:
        SettingError: another number of labels than of images, labels that are no classes, or fewer than two classes.
        ModelError: no adapter claims the model, or it is in training mode.
    """
    penalty = number("penalty must be positive (0.001 is usual)", penalty, lambda found: found > 0)
    [call] = calls_of(model, processor=processor, adapter=adapter, encoder=encoder, certain=True)[1]
    call.check_eval()
    pictures = list(named(images).values())
    classes = torch.tensor([whole("A label", one, least=0) for one in labels], dtype=torch.long, device="cpu")
    if len(classes) != len(pictures) or len(classes.unique()) < 2:
        raise SettingError(
            f"A linear head is trained on images of two classes or more with a label each; got {len(pictures)} images "
            f"and {len(classes)} labels of {len(classes.unique())} classes."
        )
    with torch.no_grad():
        features = torch.cat([call.embed(call.encode([one])) for one in pictures]).double().cpu()
    centre, spread = features.mean(0), features.std(0).clamp_min(1e-12)
    weight, bias = _fitted((features - centre) / spread, classes, penalty)
    head = nn.Linear(features.shape[1], len(bias), device="cpu", dtype=torch.float32).requires_grad_(False)
    head.weight.copy_(weight / spread)
    head.bias.copy_(bias - (weight / spread) @ centre)
    return head


def _fitted(features: Tensor, classes: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """(B, E) features at zero mean and unit variance -> weight (K, E) and bias (K,)."""
    count = int(classes.max()) + 1
    weight = features.new_zeros(count, features.shape[1], requires_grad=True)
    bias = features.new_zeros(count, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        solver.zero_grad()
        found = nn.functional.cross_entropy(features @ weight.T + bias, classes) + penalty * weight.square().sum()
        found.backward()
        return found

    with torch.enable_grad():
        solver.step(loss)
    return weight.detach(), bias.detach()
