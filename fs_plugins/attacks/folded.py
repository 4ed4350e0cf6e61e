"""An encoder without its batch normalisation: the same function, which is faster to climb.

In eval mode a batch normalisation scales and shifts, which the convolution before it can do itself. Where memory is
slow that is a third of a small net's gradient.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fs_plugins.vision import VisionCall

_NEAR = 1e-3
"""Relative; a fold that is wrong is wrong altogether."""


@torch.no_grad()
def folded(call: VisionCall, images: Tensor) -> VisionCall:
    """The same encoder with each batch normalisation folded into the convolution whose output it alone sees.

    The model is left as it is: the encoder is copied. Where nothing can be folded, or it would not be the same function
    on these images, the encoder itself comes back.

    Args:
        images: (B, C, H, W) in [0, 1], some of those that it will see.
    """
    if call.dtype != torch.float32 or not any(isinstance(part, _BatchNorm) for part in call.module.modules()):
        return call
    found = replace(call, module=copy.deepcopy(call.module))
    pairs = _pairs(found, images[:1])
    places = {part: name for name, part in found.module.named_modules()}
    for convolution, norm in pairs:
        fused = fuse_conv_bn_eval(convolution, norm)
        convolution.weight, convolution.bias = fused.weight, fused.bias
        parent, _, name = places[norm].rpartition(".")
        after = nn.Sequential(*norm.children()).eval()  # timm's has an activation
        found.module.get_submodule(parent).register_module(name, after)
    found.module.requires_grad_(False)
    wanted, given = (one.embed(one.encode(images)) for one in (call, found))
    return found if pairs and bool((given - wanted).norm() <= _NEAR * wanted.norm()) else call


def _pairs(call: VisionCall, image: Tensor) -> list[tuple[nn.Conv2d, _BatchNorm]]:
    """Convolutions, each called once, and the normalisation that was handed what it made."""
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # with its output, so that no other tensor takes its place in memory
    called: list[nn.Module] = []
    pairs: list[tuple[nn.Conv2d, _BatchNorm]] = []

    def seen(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        called.append(module)
        if isinstance(module, nn.Conv2d):
            made[id(output)] = (module, output)
        elif given and id(given[0]) in made and module.running_mean is not None:
            assert isinstance(module, _BatchNorm)
            pairs.append((made[id(given[0])][0], module))

    kinds = (nn.Conv2d, _BatchNorm)
    hooks = [part.register_forward_hook(seen) for part in call.module.modules() if isinstance(part, kinds)]
    call.encode(image)
    for hook in hooks:
        hook.remove()
    return [pair for pair in pairs if all(called.count(part) == 1 for part in pair)]
