"""FOA-Attack's local term: clusters of patch tokens, and how well one picture's can be transported onto another's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from fs_plugins.errors import SettingError


def centres(tokens: Tensor, k: int = 10, iterations: int = 100) -> Tensor:
    """k-means of each image's tokens, by Lloyd's iterations from tokens at equal distances.

    Args:
        tokens: (B, L, D) with L >= 1.
        k: how many clusters, at most L.

    Returns:
        (B, min(k, L), D) centres, the means of their clusters; gradients follow the tokens, as if the clusters stayed.
    """
    count = tokens.shape[1]
    k = min(k, count)
    points = tokens.detach()
    found = points[:, [(2 * i + 1) * count // (2 * k) for i in range(k)]]
    members = _members(points, found)
    for _ in range(iterations):
        found = _means(points, members, found)
        again = _members(points, found)
        if torch.equal(again, members):
            break
        members = again
    return _means(tokens, members, found)


def _members(points: Tensor, found: Tensor) -> Tensor:
    """(B, L, K) one-hot: the nearest centre of each token."""
    return one_hot(torch.cdist(points, found).argmin(-1), found.shape[1]).to(points.dtype)


def _means(tokens: Tensor, members: Tensor, former: Tensor) -> Tensor:
    """The clusters' means; an empty cluster stays where it was."""
    sizes = members.sum(1)[..., None]
    return torch.where(sizes > 0, members.transpose(1, 2) @ tokens / sizes.clamp(min=1), former)


def transported(source: Tensor, target: Tensor, *, reg: float = 0.1, iterations: int = 100) -> Tensor:
    """Similarity of two sets of vectors under their entropic optimal transport.

    The cost is 1 - cosine, the marginals are uniform. The plan (POT's log-domain Sinkhorn) is held fixed, so gradients
    follow the similarities alone.

    Args:
        source, target: (B, K, D) and (B, K', D).
        reg: of the entropy.

    Returns:
        (B,) the sum of plan times cosine.

    Raises:
        SettingError: POT is not installed.
    """
    try:
        from ot.batch import solve_batch
    except ImportError:
        raise SettingError('FOA-Attack needs POT: pip install "fs-plugins[evaluate]".') from None
    similar = normalize(source, dim=-1) @ normalize(target, dim=-1).transpose(1, 2)
    # tol 0: the number of iterations must not depend on which other images are in the batch.
    plan = solve_batch(
        1 - similar.detach(), reg=reg, max_iter=iterations, tol=0, method="log_sinkhorn", grad="detach"
    ).plan
    return (plan * similar).sum((1, 2))
