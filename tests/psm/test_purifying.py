"""A purifier in a lower precision than its own."""

from __future__ import annotations

import torch

from fs_plugins import PSM, registry


def test_what_a_lower_precision_changes_is_far_below_the_noise_and_has_gradients():
    psm = registry.shipped().purifier("photo")
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    plain = psm.purify(images, 0.25)
    psm.purifying = torch.bfloat16
    lower = psm.purify(images, 0.25)
    assert isinstance(psm.only(mapper=False), PSM)
    assert psm.only(mapper=False).purifying is torch.bfloat16
    assert lower.dtype == torch.float32
    assert 0 < (plain - lower).abs().max() < 0.02
    lower.sum().backward()
    assert images.grad.isfinite().all()
