"""Import this first: it makes the published torchvision importable beside a CPU-only torch.

torchvision's wheel is built for CUDA, so its operators do not load there, and ``import torchvision`` then fails while
it registers shape functions for two of them. Their schemas are enough for the import; calling them still fails. Does
nothing where torchvision works or is not installed.
"""

from __future__ import annotations

import torch

try:
    import torchvision
except ImportError:
    pass
except RuntimeError as error:
    if "operator torchvision::" not in str(error):
        raise
    # Kept in a name of its own: the schemas are withdrawn when the library object goes.
    SCHEMAS = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        SCHEMAS.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401
