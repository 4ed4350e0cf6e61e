"""OpenFlamingo: an open_clip tower whose tokens go to the perceiver."""

from __future__ import annotations

from fs_plugins.adapters.openclip import architecture, image_size, pixel_space
from torch import nn

from fs_plugins import hookimpl
from fs_plugins.vision import Readout, VisionCall, is_a, unwrapped


@hookimpl
def fs_packages() -> tuple[str, ...]:
    return ("open_flamingo", "open_clip_torch")


@hookimpl
def fs_vision_call(model: nn.Module) -> VisionCall | None:
    """Flamingo of the package open_flamingo: item 1 of the tower's answer, the tokens of each of b * T * F frames.

    It runs the tower under ``no_grad`` on its own account, so the tower is the gradient scope.
    """
    flamingo = unwrapped(model)
    if not is_a(flamingo, "open_flamingo", "Flamingo"):
        return None
    tower = flamingo.vision_encoder
    return VisionCall(
        module=tower,
        pixels=pixel_space(tower, argument="x"),
        readouts=(Readout("tokens", (1,), width=flamingo.vis_dim, tokens=None),),
        image_size=image_size(tower),
        architecture=architecture(tower),
        inputs=("vision_x",),
        grad_scope=tower,
    )
