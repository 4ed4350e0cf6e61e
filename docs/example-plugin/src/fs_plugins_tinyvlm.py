"""Tells fs-plugins where a TinyVLM looks at images."""

from fs_plugins import Field, PixelSpace, Readout, VisionCall, hookimpl
from fs_plugins.vision import is_a, unwrapped


@hookimpl
def fs_vision_call(model):
    """TinyVLM of the package tinyvlm: the tokens of its eye."""
    vlm = unwrapped(model)  # through torch.compile, DDP and PEFT
    if not is_a(vlm, "tinyvlm", "TinyVLM"):  # by name: nothing is imported for models that are not ours
        return None
    from tinyvlm import MEAN, STD

    return VisionCall(
        module=vlm.eye,
        pixels=PixelSpace(MEAN, STD, argument="image", source="tinyvlm's constants"),
        readouts=(Readout("tokens", (Field("tokens", 0),), width=24, tokens=16),),
        image_size=(32, 32),
        architecture={"family": "tinyvlm_eye", "hidden_size": 24, "patch_size": 8, "image_size": 32},
    )
